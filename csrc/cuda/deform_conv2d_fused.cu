// SPDX-License-Identifier: Apache-2.0
// The form of Note [Fused forward] for compute capability 8.0 and later, and the choice between the forms. A block
// gathers a step's left operand [kRows, 64] into shared memory, swizzled to avoid bank conflicts in ldmatrix, while it
// multiplies the previous step. Asynchronous copies load the weights into a ring of kStages.
#include "deform_conv2d_fused.cuh"

#include "deform_conv2d_fused_forms.h"
#include "device.cuh"
#include "new_kernels.h"

namespace mmdcn {
namespace {

template <typename T, int kBlockRows, int kBlockColumns, int kWarpRows, int kWarpColumns, int kBlockStages, int kBlocks>
struct Mma {
  using scalar_t = T;
  static constexpr int kRows = kBlockRows, kColumns = kBlockColumns, kStages = kBlockStages, kResident = kBlocks;
  static constexpr int kThreads = (kRows / kWarpRows) * (kColumns / kWarpColumns) * 32;
  static constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;
  static constexpr int kVectors = kRows * 8 / kThreads,
                       kVectorRows = kThreads / 8;  // vectors of a thread in a step; rows between them
  static constexpr int kOperandBytes = kRows * kRowBytes, kStageBytes = kColumns * kRowBytes;
  static constexpr int kTapBytes = kRows * kEntryBytes, kWeights = kTapBytes / 2, kPitch = kColumns * 2 + 16;

  // Two left operands, the ring of weights and the table; later the result and its rows overwrite them.
  __host__ __device__ static constexpr int shared_bytes(int taps) {
    const int gather = 2 * kOperandBytes + kStages * kStageBytes + taps * kTapBytes;
    const int result = kRows * kPitch + kRows * 4;
    return gather > result ? gather : result;
  }

  struct Slot {
    FusedCorners corners;
    float4 weights;

    __device__ __forceinline__ void load(const void* input, uint32_t entry, uint32_t channel) {
      corners.load(load_shared(entry), input, channel);
      weights = load_shared_float4(entry + kWeights);
    }
  };

  // The samples of a step: the thread's first entry in the table, and its channels, in vectors.
  struct Place {
    uint32_t entry, channel;
  };

  // Multiplies a step. Meanwhile gathers the next step's operand from `slots` and `next`, and loads the first vectors
  // of the step after that from `after`.
  template <bool kGather>
  __device__ __forceinline__ static void step(const void* input, float (&sum)[kRowTiles][kColumnTiles][4],
                                              Slot (&slots)[2], uint32_t operand, uint32_t target, uint32_t weights,
                                              const Place& next, const Place& after, uint32_t own_row,
                                              uint32_t own_column) {
    constexpr int kProducts = kRowTiles * kColumnTiles, kWords = kVectors, kProductsOfWord = kProducts / kWords;
    static_assert(kVectors % 2 == 0 && kProducts % kWords == 0);
    uint32_t vector[4];
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      uint32_t a[kRowTiles][4], b[kColumnTiles / 2][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_matrices(a[i], operand + (own_row ^ (quarter << 5)) + i * 16 * kRowBytes);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles / 2; ++j) {
        load_matrices(b[j], weights + (own_column ^ (quarter << 5)) + j * 16 * kRowBytes);
      }
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int number = quarter * kWords + i, own = number / 4, word = number % 4;
        if (kGather) {
          Slot& slot = slots[own % 2];
          vector[word] = slot.corners.template blend<scalar_t>(slot.weights, word);
          if (word == 3) {
            store_shared(target + own * kVectorRows * kRowBytes,
                         make_uint4(vector[0], vector[1], vector[2], vector[3]));
            const bool same_step = own + 2 < kVectors;
            const Place& place = same_step ? next : after;
            slot.load(input, place.entry + (same_step ? own + 2 : own + 2 - kVectors) * kVectorRows * 16,
                      place.channel);
          }
        }
#pragma unroll
        for (int j = 0; j < kProductsOfWord; ++j) {
          const int product = i * kProductsOfWord + j, row = product / kColumnTiles, column = product % kColumnTiles;
          Pair<scalar_t>::multiply(sum[row][column], a[row], b[column / 2][column % 2 * 2],
                                   b[column / 2][column % 2 * 2 + 1]);
        }
      }
    }
  }

  // A thread's view of its block: the parts of shared memory, and the positions and output channels to compute.
  struct Block {
    const FusedForward& call;
    const FusedSteps& plan;
    const int32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const uint32_t operands = shared_address(dynamic_shared()), stages = operands + 2 * kOperandBytes;
    const uint32_t table = stages + kStages * kStageBytes;
    const int32_t first_row = blockIdx.x / plan.column_tiles * kRows;
    const int32_t first_column = blockIdx.x % plan.column_tiles * kColumns;
    const int64_t step_bytes = static_cast<int64_t>(call.out_channels) * kRowBytes;
    const char* const own_weights = static_cast<const char*>(call.weight) + first_column * kRowBytes + thread * 16;
    const int32_t row = thread / 8;  // the first one that the thread gathers
    const int32_t warp_row = warp % (kRows / kWarpRows) * kWarpRows;
    const int32_t warp_column = warp / (kRows / kWarpRows) * kWarpColumns;

    __device__ __forceinline__ void copy_weights(int32_t step, int32_t stage) const {
#pragma unroll
      for (int i = 0; i < kColumns * 8 / kThreads; ++i) {
        copy_async<16>(stages + stage * kStageBytes + (thread + i * kThreads) * 16,
                       own_weights + step * step_bytes + i * kThreads * 16);
      }
    }

    __device__ __forceinline__ void copy_first_weights() const {
#pragma unroll
      for (int32_t i = 0; i < kStages - 1; ++i) {
        if (i < plan.steps) copy_weights(i, i);
        commit_copies();
      }
    }

    // Writes the samples of an offset group to the table.
    __device__ __forceinline__ void write_table(int32_t offset_group) const {
      for (int32_t i = thread; i < kRows * call.taps; i += kThreads) {
        const int32_t tap = i / kRows, of_tap = i - tap * kRows;
        const bool valid = first_row + of_tap < call.positions();
        const OutputPosition at = output_position(call, valid ? first_row + of_tap : 0);
        const FusedSample sample =
            fused_sample(call, at, valid, tap, [&]() { return load_offsets(call, at, offset_group, tap); });
        const uint32_t entry = table + tap * kTapBytes + of_tap * 16;
        store_shared(entry, sample.vectors);
        store_shared(entry + kWeights, sample.weights);
      }
    }

    // Gathers the operand of a first step, and loads the first vectors of the second.
    __device__ __forceinline__ void gather_first(Slot (&slots)[2], uint32_t target, const Place& first,
                                                 const Place& second) const {
#pragma unroll
      for (int own = 0; own < kVectors; ++own) {
        Slot& slot = slots[own % 2];
        uint32_t vector[4];
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          vector[word] = slot.corners.template blend<scalar_t>(slot.weights, word);
        }
        store_shared(target + own * kVectorRows * kRowBytes, make_uint4(vector[0], vector[1], vector[2], vector[3]));
        const bool same_step = own + 2 < kVectors;
        const Place& from = same_step ? first : second;
        slot.load(call.input, from.entry + (same_step ? own + 2 : own + 2 - kVectors) * kVectorRows * 16, from.channel);
      }
    }

    // The result passes through shared memory, so that whole rows are written.
    __device__ __forceinline__ void write_result(const float (&sum)[kRowTiles][kColumnTiles][4]) const {
      unsigned char* const shared = dynamic_shared();
      int32_t* const rows = reinterpret_cast<int32_t*>(shared + kRows * kPitch);
      for (int32_t i = thread; i < kRows; i += kThreads) {
        rows[i] = first_row + i < call.positions() ? output_position(call, first_row + i).row(call) : -1;
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          const int32_t column = warp_column + j * 8 + lane % 4 * 2, channel = first_column + column;
          const uint32_t target = operands + (warp_row + i * 16 + lane / 4) * kPitch + column * 2;
          store_shared(target, with_bias<scalar_t>(call, channel, sum[i][j][0], sum[i][j][1]));
          store_shared(target + 8 * kPitch, with_bias<scalar_t>(call, channel, sum[i][j][2], sum[i][j][3]));
        }
      }
      __syncthreads();
      for (int32_t i = thread; i < kRows * kColumns / 8; i += kThreads) {
        const int32_t of_block = i / (kColumns / 8), vector = i % (kColumns / 8), target = rows[of_block];
        if (target < 0) continue;
        scalar_t* const output = static_cast<scalar_t*>(call.output);
        *reinterpret_cast<uint4*>(output + static_cast<int64_t>(target) * call.out_channels + first_column +
                                  vector * 8) =
            *reinterpret_cast<const uint4*>(shared + of_block * kPitch + vector * 16);
      }
    }
  };

  __device__ __forceinline__ static void run(const FusedForward& call, const FusedSteps& plan) {
    const Block block{call, plan};
    const int32_t thread = block.thread, lane = block.lane, row = block.row;
    block.copy_first_weights();
    const uint32_t own_target = row * kRowBytes + (((thread & 7) ^ (row & 7)) << 4);
    const uint32_t own_row = (block.warp_row + lane % 16) * kRowBytes + (((lane >> 4) ^ (lane & 7)) << 4);
    const uint32_t own_column =
        (block.warp_column + (lane & 7) + (lane >> 4 << 3)) * kRowBytes + (((lane >> 3 & 1) ^ (lane & 7)) << 4);
    const uint32_t own_table = block.table + row * 16, operands = block.operands;
    float sum[kRowTiles][kColumnTiles][4] = {};
    int32_t stage = 0, copy_stage = kStages - 1, done = 0;

    for (int32_t offset_group = 0; offset_group < call.offset_groups; ++offset_group) {
      __syncthreads();  // the table and the operands have been read
      block.write_table(offset_group);
      __syncthreads();

      const int32_t group_end = done + plan.group_steps;
      Place place{own_table, offset_group * (call.channels / call.offset_groups / 8) + thread % 8u};
      const auto advance_to = [&](int32_t step) {  // stays at the last step
        if (step >= group_end) return;
        place.entry += kTapBytes;
        if (place.entry != own_table + plan.table_end) return;
        place.entry = own_table;
        place.channel += kChunk / 8;
      };
      Slot slots[2];
      slots[0].load(call.input, place.entry, place.channel);
      slots[1].load(call.input, place.entry + kVectorRows * 16, place.channel);
      const Place first = place;
      advance_to(done + 1);
      Place next = place;
      block.gather_first(slots, operands + own_target, first, next);
      advance_to(done + 2);
      uint32_t operand = 0;
      wait_for_copies<kStages - 2>();
      __syncthreads();
      for (; done < group_end; ++done) {
        if (done + kStages - 1 < plan.steps) block.copy_weights(done + kStages - 1, copy_stage);
        commit_copies();
        const uint32_t weights = block.stages + stage * kStageBytes;
        if (done + 1 < group_end) {
          step<true>(call.input, sum, slots, operands + operand, operands + (operand ^ kOperandBytes) + own_target,
                     weights, next, place, own_row, own_column);
        } else {
          step<false>(call.input, sum, slots, operands + operand, 0, weights, next, place, own_row, own_column);
        }
        next = place;
        advance_to(done + 3);
        operand ^= kOperandBytes;
        stage = stage + 1 == kStages ? 0 : stage + 1;
        copy_stage = copy_stage + 1 == kStages ? 0 : copy_stage + 1;
        wait_for_copies<kStages - 2>();
        __syncthreads();
      }
    }
    block.write_result(sum);
  }
};

template <typename Form>
__global__ void __launch_bounds__(Form::kThreads, Form::kResident)
    fused_mma(const __grid_constant__ FusedForward call, const __grid_constant__ FusedSteps plan) {
  Form::run(call, plan);
}

// Calls body with the largest form whose columns divide the output channels and whose shared memory the device has. If
// there is none, calls it with the smallest form.
template <typename scalar_t, typename Body>
auto with_mma_form(const FusedForward& call, int32_t device, const Body& body) {
  const int32_t limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const auto fits = [&](auto form) {
    return call.out_channels % form.kColumns == 0 && form.shared_bytes(call.taps) <= limit;
  };
  const Mma<scalar_t, 128, 256, 64, 64, 2, 1> large{};
  const Mma<scalar_t, 64, 128, 32, 64, 3, 2> medium{};
  if (fits(large)) return body(large);
  if (fits(medium)) return body(medium);
  return body(Mma<scalar_t, 64, 64, 32, 32, 3, 3>{});
}

template <typename scalar_t>
void run_mma(const FusedForward& call, int32_t device) {
  with_mma_form<scalar_t>(call, device, [&](auto form) {
    using Form = decltype(form);
    const FusedSteps plan = FusedSteps::of(call, Form::kRows, Form::kColumns, Form::kTapBytes, 0);
    launch_kernel(fused_mma<Form>, plan.tiles, Form::kThreads, Form::shared_bytes(call.taps), device, call, plan);
  });
}

FusedShape mma_shape(const FusedForward& call, int32_t device) {
  return with_mma_form<__half>(
      call, device, [&](auto form) -> FusedShape { return {form.kRows, form.kColumns, form.shared_bytes(call.taps)}; });
}

// For compute capability 9.0: the form that ran on a GPU, at commit ca94760, and one that has not yet run there.
constexpr FusedForm kTested = FusedForm::kWgmma, kNew = FusedForm::kWgmmaBlend;

FusedShape fused_shape(const FusedForward& call, FusedForm form, int32_t device) {
  switch (form) {
    case FusedForm::kWgmma:
      return fused_wgmma_shape(call);
    case FusedForm::kWgmmaBlend:
      return fused_wgmma_blend_shape(call);
    default:
      return mma_shape(call, device);
  }
}

bool fits(const FusedForward& call, FusedForm form, int32_t device) {
  return fused_shape(call, form, device).shared_bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

FusedForm hopper_form(const FusedForward& call, int32_t device) {
  return runs_new_kernels() && fits(call, kNew, device) ? kNew : kTested;
}

// With fewer blocks too many multiprocessors are idle, and columns are faster.
bool occupies(const FusedForward& call, FusedForm form, int32_t device) {
  // Per multiprocessor: 0.6 was measured on an H100, 0.2 is an estimate.
  const double least_blocks = form == kNew ? 0.2 : 0.6;
  const FusedShape shape = fused_shape(call, form, device);
  const int64_t blocks = int64_t{call.positions() + shape.rows - 1} / shape.rows * (call.out_channels / shape.columns);
  return blocks >= least_blocks * multiprocessors(device);
}

}  // namespace

FusedForm fused_form(const FusedForward& call, int32_t device) {
  if (call.channels / call.offset_groups % kChunk != 0 || call.out_channels % 64 != 0) return FusedForm::kNone;
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  const FusedForm form = capability == 90 ? hopper_form(call, device) : FusedForm::kMma;
  const bool runs = fits(call, form, device) && occupies(call, form, device);
  return runs ? form : FusedForm::kNone;
}

void run_fused(const FusedForward& call, FusedForm form, bool is_half, int32_t device) {
  switch (form) {
    case FusedForm::kWgmma:
      return run_fused_wgmma(call, is_half, device);
    case FusedForm::kWgmmaBlend:
      return run_fused_wgmma_blend(call, is_half, device);
    default:
      is_half ? run_mma<__half>(call, device) : run_mma<__nv_bfloat16>(call, device);
  }
}

}  // namespace mmdcn
