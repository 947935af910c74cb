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

  // A thread's warp, and its parts of shared memory.
  struct Warp {
    const FusedSteps& plan;
    const int32_t lane = threadIdx.x % 32, index = threadIdx.x / 32, quad = lane / 4, in_quad = lane % 4;
    const uint32_t rows = shared_address(dynamic_shared()) + kRowNumbers + index * kWarpRows * 4;
    const uint32_t table = shared_address(dynamic_shared()) + kTables + index * plan.table_bytes;
  };

  // The barriers of a stage: its weights have arrived; all warps have used them.
  __device__ __forceinline__ static uint32_t full(int32_t stage) {
    return shared_address(dynamic_shared()) + kBarriers + stage * 16;
  }
  __device__ __forceinline__ static uint32_t empty(int32_t stage) { return full(stage) + 8; }

  __device__ __forceinline__ static void init_barriers() {
    if (threadIdx.x == 0) {
      for (int32_t stage = 0; stage < kStages; ++stage) {
        init_barrier(full(stage), 1);
        init_barrier(empty(stage), kWarps);
      }
      fence_barriers();
    }
    __syncthreads();
  }

  // The ring of weights, and the thread's progress through it.
  struct Ring {
    const FusedForward& call;
    const FusedSteps& plan;
    const int32_t total;  // steps of the block
    const uint32_t stages = shared_address(dynamic_shared());
    // The number of blocks is a multiple of the column tiles: all tiles of a block have the same weights.
    const int32_t column_tile = blockIdx.x % plan.column_tiles;
    int32_t copy_step = 0;        // the step whose weights thread 0 copies next
    int32_t stage = 0, done = 0;  // steps done, and the stage of the next one
    uint32_t parity = 0;          // of that stage's barriers; it changes with each round

    __device__ __forceinline__ void copy_to(int32_t to_stage) {
      arrive_expecting(full(to_stage), kStageBytes);
      const int64_t source = static_cast<int64_t>(copy_step * plan.column_tiles + column_tile) * kStageBytes;
      copy_bulk(stages + to_stage * kStageBytes, static_cast<const char*>(call.weight) + source, kStageBytes,
                full(to_stage));
      copy_step = copy_step + 1 == plan.steps ? 0 : copy_step + 1;
    }

    // Fills the stages, and waits for the first.
    __device__ __forceinline__ void start() {
      if (threadIdx.x == 0) {
        for (int32_t i = 0; i < kStages && i < total; ++i) {
          copy_to(i);
        }
      }
      wait_for_weights();
    }

    // Waits for the weights of the current step.
    __device__ __forceinline__ void wait_for_weights() {
      if (done < total) wait(full(stage), parity);
    }

    __device__ __forceinline__ void advance() {
      ++done;
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }

    // Refills the stage of kLag steps ago.
    __device__ __forceinline__ void refill() {
      if (threadIdx.x == 0 && done >= kLag && done + kStages - kLag < total) {
        const int32_t used_before = stage < kLag ? stage + kStages - kLag : stage - kLag;
        wait(empty(used_before), parity ^ (stage < kLag));
        copy_to(used_before);
      }
    }
  };

  // Writes a warp's samples of an offset group, and the rows of its positions, to shared memory.
  __device__ __forceinline__ static void write_table(const FusedForward& call, const Warp& warp, int32_t first_position,
                                                     int32_t offset_group) {
    const int32_t lane = warp.lane, position = first_position + warp.index * kWarpRows + lane % kWarpRows;
    const bool valid = position < call.positions();
    const OutputPosition at = output_position(call, valid ? position : 0);
    __syncwarp();  // the table, or the result in its place, has been read
    if (lane < kWarpRows) store_shared(warp.rows + lane * 4, static_cast<uint32_t>(valid ? at.row(call) : -1));
    const uint32_t entries = warp.table + lane % kWarpRows * 16;
    for (int32_t tap = lane / kWarpRows; tap < call.taps; tap += 2) {
      copy_offsets(call, at, valid, offset_group, tap, entries + tap * kTapBytes);
    }
    commit_copies();
    wait_for_copies<0>();
    for (int32_t tap = lane / kWarpRows; tap < call.taps; tap += 2) {
      const uint32_t entry = entries + tap * kTapBytes;
      const FusedSample sample = fused_sample(call, at, valid, tap, [&]() { return load_shared_float4(entry); });
      store_shared(entry, sample.vectors);
      store_shared(entry + kWeights, sample.weights);
    }
    __syncwarp();
  }

  // Writes a warp's part of the result. It passes through shared memory, so that whole rows are written.
  __device__ __forceinline__ static void write_result(const FusedForward& call, const Warp& warp,
                                                      const float (&sum)[kColumns / 2], int32_t first_column) {
    constexpr int32_t kWidth = kColumns / kHalves;
#pragma unroll
    for (int32_t half = 0; half < kHalves; ++half) {
      __syncwarp();
#pragma unroll
      for (int32_t j = 0; j < kWidth / 8; ++j) {
        const int32_t column = j * 8 + warp.in_quad * 2, channel = first_column + half * kWidth + column;
        const uint32_t target = warp.table + warp.quad * kPitch + column * 2;
        const float* own = sum + (half * (kWidth / 8) + j) * 4;
        store_shared(target, with_bias<scalar_t>(call, channel, own[0], own[1]));
        store_shared(target + 8 * kPitch, with_bias<scalar_t>(call, channel, own[2], own[3]));
      }
      __syncwarp();
      for (int32_t i = warp.lane; i < kWarpRows * kWidth / 8; i += 32) {
        const int32_t row = i / (kWidth / 8), vector = i % (kWidth / 8);
        const int32_t target = load_shared_int(warp.rows + row * 4);
        const uint4 values = load_shared(warp.table + row * kPitch + vector * 16);
        if (target < 0) continue;
        const int64_t channel =
            static_cast<int64_t>(target) * call.out_channels + first_column + half * kWidth + vector * 8;
        *reinterpret_cast<uint4*>(static_cast<scalar_t*>(call.output) + channel) = values;
      }
    }
  }

  // Starts a step's product; its left operand is in registers.
  __device__ __forceinline__ static void start_product(float (&sum)[kColumns / 2], uint32_t (&a)[16],
                                                       uint64_t weights) {
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
  }

  // Blends a vector of 8 channels into its words of the left operand.
  __device__ __forceinline__ static void blend(uint32_t* fragment, const FusedCorners& corners, const float4& weights) {
    fragment[0] = corners.template blend<scalar_t>(weights, 0);
    fragment[2] = corners.template blend<scalar_t>(weights, 1);
    fragment[4] = corners.template blend<scalar_t>(weights, 2);
    fragment[6] = corners.template blend<scalar_t>(weights, 3);
  }

  // Exchanges the halves of a row's channels in the left operand.
  __device__ __forceinline__ static void exchange_halves(uint32_t* fragment, bool exchanges) {
#pragma unroll
    for (int32_t i = 0; i < 8; i += 2) {
      const uint32_t first = fragment[i], second = fragment[i + 8];
      fragment[i] = exchanges ? second : first;
      fragment[i + 8] = exchanges ? first : second;
    }
  }

  // Adds the products of an offset group, whose samples are in the table. Loads run kAhead vectors ahead of blends. A
  // step has four vectors of 8 channels: those at `in_quad` and `in_quad` + 4 of row `quad`, then of row `quad` + 8.
  // Odd quads load the second half of a row first: eight lanes then read all banks of the L1 cache at once. Channels
  // are counted in vectors, which takes fewer registers than addresses.
  __device__ __forceinline__ static void add_group(const FusedForward& call, const FusedSteps& plan, Ring& ring,
                                                   float (&sum)[kColumns / 2], const Warp& warp, int32_t offset_group) {
    uint32_t operand[2][16];
    FusedCorners corners[kAhead];
    const bool is_odd = warp.quad % 2 != 0;
    const uint32_t own_table = warp.table + warp.quad * 16;
    uint32_t channel = offset_group * (call.channels / call.offset_groups / 8) + warp.in_quad + (is_odd ? 4 : 0);
    const int32_t to_other_half = is_odd ? -4 : 4;
    int32_t load_tap = 0, blend_tap = 0;  // in bytes of the table
    const int32_t group_end = ring.done + plan.group_steps;
    uint4 vectors;                      // of the row to load
    float4 weights;                     // of the row to blend
    const auto advance_loads = [&]() {  // stays at the last step
      if (ring.done + 1 >= group_end) return;
      load_tap += kTapBytes;
      if (load_tap != plan.table_end) return;
      load_tap = 0;
      channel += kChunk / 8;
    };
    const auto load = [&](FusedCorners& target, int32_t vector) {
      if (vector % 2 == 0) vectors = load_shared(own_table + load_tap + vector / 2 * 128);
      target.load(vectors, call.input, channel + (vector % 2 == 0 ? 0 : to_other_half));
    };
    const auto gather = [&](uint32_t (&a)[16]) {
#pragma unroll
      for (int32_t vector = 0; vector < 4; ++vector) {
        if (vector % 2 == 0) weights = load_shared_float4(own_table + blend_tap + kWeights + vector / 2 * 128);
        blend(a + vector % 2 * 8 + vector / 2, corners[vector % kAhead], weights);
        if (vector % 2 == 1) exchange_halves(a + vector / 2, is_odd);
        if (vector + kAhead == 4) advance_loads();
        load(corners[vector % kAhead], (vector + kAhead) % 4);
      }
      blend_tap += kTapBytes;
      if (blend_tap == plan.table_end) blend_tap = 0;
    };
    const auto multiply_and_gather = [&](uint32_t (&a)[16], uint32_t (&next)[16]) {
      start_product(sum, a, swizzled_rows(ring.stages + ring.stage * kStageBytes));
      const uint32_t used = empty(ring.stage);
      ring.advance();
      ring.refill();  // its branch keeps the gather behind the start of the products, the next wait ahead of their end
      gather(next);
#pragma unroll
      for (int32_t i = 0; i < 16; ++i) {
        pin(next[i]);
      }
      ring.wait_for_weights();
      wait_for_products();
      if (warp.lane == 0) arrive(used);
    };
#pragma unroll
    for (int32_t vector = 0; vector < kAhead; ++vector) {
      load(corners[vector], vector);
    }
    gather(operand[0]);
    while (ring.done + 1 < group_end) {
      multiply_and_gather(operand[0], operand[1]);
      multiply_and_gather(operand[1], operand[0]);
    }
    if (ring.done < group_end) multiply_and_gather(operand[0], operand[1]);
  }

  __device__ __forceinline__ static void run(const FusedForward& call, const FusedSteps& plan) {
    const Warp warp{plan};
    init_barriers();

    const int32_t own_tiles = (plan.tiles - static_cast<int32_t>(blockIdx.x) + static_cast<int32_t>(gridDim.x) - 1) /
                              static_cast<int32_t>(gridDim.x);
    Ring ring{call, plan, own_tiles * plan.steps};
    ring.start();

    float sum[kColumns / 2] = {};
    while (ring.done < ring.total) {  // an offset group of a tile; both follow from `done`, which saves registers
      const int32_t tile = static_cast<int32_t>(blockIdx.x + ring.done / plan.steps * gridDim.x);
      const int32_t offset_group = ring.done % plan.steps / plan.group_steps;
      write_table(call, warp, tile / plan.column_tiles * kRows, offset_group);
      add_group(call, plan, ring, sum, warp, offset_group);

      if (ring.done % plan.steps != 0) continue;
      write_result(call, warp, sum, ring.column_tile * kColumns);
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
