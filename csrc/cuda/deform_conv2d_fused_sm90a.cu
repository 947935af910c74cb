// SPDX-License-Identifier: Apache-2.0
// The form of Note [Fused forward] for compute capability 9.0. Thread 0 also copies the weights into a ring of kStages,
// one bulk copy for each step. Each stage has a barrier for full and one for empty.
#include "deform_conv2d_fused.cuh"
#include "deform_conv2d_fused_forms.h"
#include "device.cuh"

namespace mmdcn {
namespace {

// The descriptor of rows of 128 bytes in shared memory, 8 rows to a 1024-byte swizzled block.
__device__ __forceinline__ uint64_t swizzled_rows(uint32_t address) {
  return uint64_t{address >> 4 & 0x3fff} | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

template <typename T, int kGroups, int kBlockColumns, int kStages, int kBlocks>
struct Wgmma {
  using scalar_t = T;
  static constexpr int kWarps = 4 * kGroups, kThreads = 32 * kWarps, kRows = 64 * kGroups;
  static constexpr int kColumns = kBlockColumns, kResident = kBlocks;
  static constexpr int kStageBytes = kColumns * kRowBytes, kWarpRows = 16;
  static constexpr int kLag = kStages > 3 ? 3 : 2;            // steps until a stage is refilled
  static constexpr int kHalves = kColumns > 128 ? 2 : 1;      // parts in which the result is written
  static constexpr int kPitch = kColumns / kHalves * 2 + 16;  // row pitch of the result
  static constexpr int kTapBytes = kWarpRows * kEntryBytes, kWeights = kTapBytes / 2;
  static constexpr int kAhead = 2;  // vectors that are loaded before they are blended

  // Shared memory: the ring of weights, its barriers, the rows of each warp's positions, and each warp's table, which
  // its result overwrites.
  static constexpr int kBarriers = kStages * kStageBytes, kRowNumbers = kBarriers + kStages * 16;
  static constexpr int kTables = kRowNumbers + kWarps * kWarpRows * 4;

  __host__ __device__ static constexpr int table_bytes(int taps) {
    return taps * kTapBytes > kWarpRows * kPitch ? taps * kTapBytes : kWarpRows * kPitch;
  }
  __host__ __device__ static constexpr int shared_bytes(int taps) { return kTables + kWarps * table_bytes(taps); }

  __device__ __forceinline__ static void run(const FusedForward& call, const FusedSteps& plan) {
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, in_quad = lane % 4;
    const uint32_t stages = shared_address(dynamic_shared()), barriers = stages + kBarriers;
    const uint32_t rows = stages + kRowNumbers + warp * kWarpRows * 4;
    const uint32_t table = stages + kTables + warp * plan.table_bytes;
    const auto full = [&](int32_t stage) { return barriers + stage * 16; };
    const auto empty = [&](int32_t stage) { return barriers + stage * 16 + 8; };
    if (threadIdx.x == 0) {
      for (int32_t stage = 0; stage < kStages; ++stage) {
        init_barrier(full(stage), 1);
        init_barrier(empty(stage), kWarps);
      }
      fence_barriers();
    }
    __syncthreads();

    const int32_t own_tiles = (plan.tiles - static_cast<int32_t>(blockIdx.x) + static_cast<int32_t>(gridDim.x) - 1) /
                              static_cast<int32_t>(gridDim.x);
    const int32_t total = own_tiles * plan.steps;

    // The number of blocks is a multiple of the column tiles: all tiles of a block have the same weights.
    const int32_t column_tile = blockIdx.x % plan.column_tiles;
    int32_t copy_step = 0;  // the step whose weights thread 0 copies next
    const auto copy_to = [&](int32_t stage) {
      arrive_expecting(full(stage), kStageBytes);
      const int64_t source = static_cast<int64_t>(copy_step * plan.column_tiles + column_tile) * kStageBytes;
      copy_bulk(stages + stage * kStageBytes, static_cast<const char*>(call.weight) + source, kStageBytes, full(stage));
      copy_step = copy_step + 1 == plan.steps ? 0 : copy_step + 1;
    };
    if (threadIdx.x == 0) {
      for (int32_t stage = 0; stage < kStages && stage < total; ++stage) {
        copy_to(stage);
      }
    }
    wait(full(0), 0);

    // Steps done, the stage of the next one, and the parity of its barriers, which changes with each round.
    int32_t stage = 0, done = 0;
    uint32_t parity = 0;
    const auto tile_of = [&](int32_t step) { return static_cast<int32_t>(blockIdx.x + step / plan.steps * gridDim.x); };
    float sum[kColumns / 2] = {};
    while (done < total) {  // an offset group of a tile; both follow from `done`, which saves registers
      {
        const int32_t tile = tile_of(done), offset_group = done % plan.steps / plan.group_steps;
        const int32_t position = tile / plan.column_tiles * kRows + warp * kWarpRows + lane % kWarpRows;
        const bool valid = position < call.positions();
        const OutputPosition at = output_position(call, valid ? position : 0);
        __syncwarp();  // the table, or the result in its place, has been read
        if (lane < kWarpRows) store_shared(rows + lane * 4, static_cast<uint32_t>(valid ? at.row(call) : -1));
        for (int32_t tap = lane / kWarpRows; tap < call.taps; tap += 2) {
          const FusedSample sample = fused_sample(call, at, valid, offset_group, tap);
          const uint32_t entry = table + tap * kTapBytes + lane % kWarpRows * 16;
          store_shared(entry, sample.vectors);
          store_shared(entry + kWeights, sample.weights);
        }
        __syncwarp();

        uint32_t operand[2][16];
        FusedCorners corners[kAhead];
        // Loads run kAhead vectors ahead of blends. A step has four vectors of 8 channels: those at `in_quad` and
        // `in_quad` + 4 of row `quad`, then of row `quad` + 8.
        const uint32_t own_table = table + quad * 16;
        const char* load_channel = static_cast<const char*>(call.input) + in_quad * 16 +
                                   offset_group * (call.channels / call.offset_groups) * 2;
        int32_t load_tap = 0, blend_tap = 0;  // in bytes of the table
        const int32_t group_end = done + plan.group_steps;
        const auto advance_loads = [&]() {  // stays at the last step
          if (done + 1 >= group_end) return;
          load_tap += kTapBytes;
          if (load_tap != plan.table_end) return;
          load_tap = 0;
          load_channel += kRowBytes;
        };
        const auto load = [&](FusedCorners& target, int32_t vector) {
          const uint4 vectors = load_shared(own_table + load_tap + vector / 2 * 128);
          target.load(vectors, load_channel + vector % 2 * 64);
        };
        const auto gather = [&](uint32_t (&a)[16]) {
#pragma unroll
          for (int32_t vector = 0; vector < 4; ++vector) {
            FusedCorners& own = corners[vector % kAhead];
            const float4 weights = load_shared_float4(own_table + blend_tap + kWeights + vector / 2 * 128);
            uint32_t* const fragment = a + vector % 2 * 8 + vector / 2;
            fragment[0] = own.template blend<scalar_t>(weights, 0);
            fragment[2] = own.template blend<scalar_t>(weights, 1);
            fragment[4] = own.template blend<scalar_t>(weights, 2);
            fragment[6] = own.template blend<scalar_t>(weights, 3);
            if (vector + kAhead == 4) advance_loads();
            load(own, (vector + kAhead) % 4);
          }
          blend_tap += kTapBytes;
          if (blend_tap == plan.table_end) blend_tap = 0;
        };
        const auto multiply_and_gather = [&](uint32_t (&a)[16], uint32_t (&next)[16]) {
          const uint64_t weights = swizzled_rows(stages + stage * kStageBytes);
#pragma unroll
          for (int32_t i = 0; i < 16; ++i) {
            pin(a[i]);
          }
          fence_products();
#pragma unroll
          for (int32_t i = 0; i < 4; ++i) {
            multiply<scalar_t, kColumns>(sum, a + 4 * i, weights + 2 * i);
          }
          commit_products();
          const uint32_t used = empty(stage);
          if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
          }
          if (++done < total) wait(full(stage), parity);  // also keeps the gather after the products
          gather(next);
#pragma unroll
          for (int32_t i = 0; i < 16; ++i) {
            pin(next[i]);
          }
          if (threadIdx.x == 0 && done >= kLag && done + kStages - kLag < total) {
            const int32_t used_before = stage < kLag ? stage + kStages - kLag : stage - kLag;
            wait(empty(used_before), parity ^ (stage < kLag));
            copy_to(used_before);
          }
          wait_for_products();
          if (lane == 0) arrive(used);
        };

#pragma unroll
        for (int32_t vector = 0; vector < kAhead; ++vector) {
          load(corners[vector], vector);
        }
        gather(operand[0]);
        while (done + 1 < group_end) {
          multiply_and_gather(operand[0], operand[1]);
          multiply_and_gather(operand[1], operand[0]);
        }
        if (done < group_end) multiply_and_gather(operand[0], operand[1]);
      }

      if (done % plan.steps != 0) continue;
      constexpr int32_t kWidth = kColumns / kHalves;
      const int32_t first_column = column_tile * kColumns;
#pragma unroll
      for (int32_t half = 0; half < kHalves; ++half) {
        __syncwarp();
#pragma unroll
        for (int32_t j = 0; j < kWidth / 8; ++j) {
          const int32_t column = j * 8 + in_quad * 2, channel = first_column + half * kWidth + column;
          const uint32_t target = table + quad * kPitch + column * 2;
          const float* own = sum + (half * (kWidth / 8) + j) * 4;
          store_shared(target, with_bias<scalar_t>(call, channel, own[0], own[1]));
          store_shared(target + 8 * kPitch, with_bias<scalar_t>(call, channel, own[2], own[3]));
        }
        __syncwarp();
        for (int32_t i = lane; i < kWarpRows * kWidth / 8; i += 32) {
          const int32_t row = i / (kWidth / 8), vector = i % (kWidth / 8);
          const int32_t target = load_shared_int(rows + row * 4);
          const uint4 values = load_shared(table + row * kPitch + vector * 16);
          if (target < 0) continue;
          const int64_t channel =
              static_cast<int64_t>(target) * call.out_channels + first_column + half * kWidth + vector * 8;
          *reinterpret_cast<uint4*>(static_cast<scalar_t*>(call.output) + channel) = values;
        }
      }
#pragma unroll
      for (int32_t i = 0; i < kColumns / 2; ++i) {
        sum[i] = 0;
      }
    }
  }
};

template <typename Form>
__global__ void __launch_bounds__(Form::kThreads, Form::kResident)
    fused_wgmma(const __grid_constant__ FusedForward call, const __grid_constant__ FusedSteps plan) {
  Form::run(call, plan);
}

// Calls body with the form for the number of output channels.
template <typename scalar_t, typename Body>
auto with_wgmma_form(const FusedForward& call, const Body& body) {
  if (call.out_channels % 256 == 0) return body(Wgmma<scalar_t, 2, 256, 3, 1>{});
  if (call.out_channels % 128 == 0) return body(Wgmma<scalar_t, 3, 128, 5, 1>{});
  return body(Wgmma<scalar_t, 1, 64, 4, 3>{});
}

template <typename scalar_t>
void run_wgmma(const FusedForward& call, int32_t device) {
  with_wgmma_form<scalar_t>(call, [&](auto form) {
    using Form = decltype(form);
    const FusedSteps plan =
        FusedSteps::of(call, Form::kRows, Form::kColumns, Form::kTapBytes, Form::table_bytes(call.taps));
    const int64_t resident = multiprocessors(device) * Form::kResident / plan.column_tiles * plan.column_tiles;
    const int64_t blocks = std::min<int64_t>(plan.tiles, std::max<int64_t>(resident, plan.column_tiles));
    launch_kernel(fused_wgmma<Form>, blocks, Form::kThreads, Form::shared_bytes(call.taps), device, call, plan);
  });
}

}  // namespace

FusedShape fused_wgmma_shape(const FusedForward& call) {
  return with_wgmma_form<__half>(
      call, [&](auto form) -> FusedShape { return {form.kRows, form.kColumns, form.shared_bytes(call.taps)}; });
}

void run_fused_wgmma(const FusedForward& call, bool is_half, int32_t device) {
  if (is_half) {
    run_wgmma<__half>(call, device);
  } else {
    run_wgmma<__nv_bfloat16>(call, device);
  }
}

}  // namespace mmdcn
