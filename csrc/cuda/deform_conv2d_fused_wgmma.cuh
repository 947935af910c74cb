// SPDX-License-Identifier: Apache-2.0
// What both forms of Note [Fused forward] for compute capability 9.0 share. Thread 0 also copies the weights into a
// ring of kStages, one bulk copy for each step. Each stage has a barrier for full and one for empty.
#pragma once

#include <algorithm>

#include "deform_conv2d_fused.cuh"
#include "deform_conv2d_fused_forms.h"
#include "device.cuh"

namespace mmdcn {

// Sizes of a block. Each of its warps has kWarpOperand bytes of shared memory for its left operand.
template <typename T, int kGroups, int kBlockColumns, int kBlockStages, int kBlocks, int kWarpOperand>
struct Wgmma {
  using scalar_t = T;
  using Sums = float[kBlockColumns / 2];
  static constexpr int kWarps = 4 * kGroups, kThreads = 32 * kWarps, kRows = 64 * kGroups;
  static constexpr int kColumns = kBlockColumns, kStages = kBlockStages, kResident = kBlocks;
  static constexpr int kStageBytes = kColumns * kRowBytes, kWarpRows = 16;
  static constexpr int kLag = kStages > 3 ? 3 : 2;            // steps until a stage is refilled
  static constexpr int kHalves = kColumns > 128 ? 2 : 1;      // parts in which the result is written
  static constexpr int kPitch = kColumns / kHalves * 2 + 16;  // row pitch of the result
  static constexpr int kTapBytes = kWarpRows * kEntryBytes, kWeights = kTapBytes / 2;

  // Shared memory: the ring of weights, each warp's left operand, the barriers of the ring, the rows of each warp's
  // positions, and each warp's table, which its result overwrites.
  static constexpr int kOperandBytes = kWarpOperand, kOperands = kStages * kStageBytes;
  static constexpr int kBarriers = kOperands + kWarps * kOperandBytes, kRowNumbers = kBarriers + kStages * 16;
  static constexpr int kTables = kRowNumbers + kWarps * kWarpRows * 4;

  __host__ __device__ static constexpr int table_bytes(int taps) {
    return taps * kTapBytes > kWarpRows * kPitch ? taps * kTapBytes : kWarpRows * kPitch;
  }
  __host__ __device__ static constexpr int shared_bytes(int taps) { return kTables + kWarps * table_bytes(taps); }
};

// A thread's warp, and its parts of shared memory.
template <typename Form>
struct Warp {
  const FusedSteps& plan;
  const int32_t lane = threadIdx.x % 32, index = threadIdx.x / 32, quad = lane / 4, in_quad = lane % 4;
  const uint32_t operand = shared_address(dynamic_shared()) + Form::kOperands + index * Form::kOperandBytes;
  const uint32_t rows = shared_address(dynamic_shared()) + Form::kRowNumbers + index * Form::kWarpRows * 4;
  const uint32_t table = shared_address(dynamic_shared()) + Form::kTables + index * plan.table_bytes;
};

// The ring of weights, and the thread's progress through it.
template <typename Form>
struct Ring {
  static constexpr int kStages = Form::kStages, kStageBytes = Form::kStageBytes, kLag = Form::kLag;

  const FusedForward& call;
  const FusedSteps& plan;
  const int32_t total;  // steps of the block
  const uint32_t stages = shared_address(dynamic_shared());
  // The number of blocks is a multiple of the column tiles: all tiles of a block have the same weights.
  const int32_t column_tile = blockIdx.x % plan.column_tiles;
  int32_t copy_step = 0;        // the step whose weights thread 0 copies next
  int32_t stage = 0, done = 0;  // steps done, and the stage of the next one
  uint32_t parity = 0;          // of that stage's barriers; it changes with each round

  __device__ __forceinline__ static Ring of(const FusedForward& call, const FusedSteps& plan) {
    if (threadIdx.x == 0) {
      for (int32_t stage = 0; stage < kStages; ++stage) {
        init_barrier(full(stage), 1);
        init_barrier(empty(stage), Form::kWarps);
      }
      fence_barriers();
    }
    __syncthreads();

    const int32_t own_tiles = (plan.tiles - static_cast<int32_t>(blockIdx.x) + static_cast<int32_t>(gridDim.x) - 1) /
                              static_cast<int32_t>(gridDim.x);
    return {call, plan, own_tiles * plan.steps};
  }

  // The barriers of a stage: its weights have arrived; all warps have used them.
  __device__ __forceinline__ static uint32_t full(int32_t stage) {
    return shared_address(dynamic_shared()) + Form::kBarriers + stage * 16;
  }
  __device__ __forceinline__ static uint32_t empty(int32_t stage) { return full(stage) + 8; }

  __device__ __forceinline__ uint64_t weights() const { return swizzled_rows(stages + stage * kStageBytes); }

  // The descriptor of rows of 128 bytes in shared memory, 8 rows to a 1024-byte swizzled block.
  __device__ __forceinline__ static uint64_t swizzled_rows(uint32_t address) {
    return uint64_t{address >> 4 & 0x3fff} | 1ull << 16 | 64ull << 32 | 1ull << 62;
  }

  __device__ __forceinline__ void copy_to(int32_t to_stage) {
    arrive_expecting(full(to_stage), kStageBytes);
    const int64_t source = static_cast<int64_t>(copy_step * plan.column_tiles + column_tile) * kStageBytes;
    copy_bulk(stages + to_stage * kStageBytes, static_cast<const char*>(call.weight) + source, kStageBytes,
              full(to_stage));
    copy_step = copy_step + 1 == plan.steps ? 0 : copy_step + 1;
  }

  // Fills the stages for the steps of the block, from its first one on.
  __device__ __forceinline__ void start() {
    done = 0;
    if (threadIdx.x == 0) {
      for (int32_t i = 0; i < kStages && i < total; ++i) {
        copy_to((stage + i) % kStages);
      }
    }
  }

  // Waits for the weights of the current step.
  __device__ __forceinline__ void wait_for_weights() { wait(full(stage), parity); }

  // The weights of the step before have been used.
  __device__ __forceinline__ void release() {
    if (threadIdx.x % 32 == 0) arrive(empty(stage == 0 ? kStages - 1 : stage - 1));
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

// Writes a warp's samples of an offset group, and the rows of its positions, to shared memory. The table holds the
// weights as stored(weights) returns them.
template <typename Form, typename Stored>
__device__ __forceinline__ void write_table(const FusedForward& call, const Warp<Form>& warp, int32_t first_position,
                                            int32_t offset_group, const Stored& stored) {
  const int32_t lane = warp.lane, position = first_position + warp.index * Form::kWarpRows + lane % Form::kWarpRows;
  const bool valid = position < call.positions();
  const OutputPosition at = output_position(call, valid ? position : 0);
  __syncwarp();  // the table, or the result in its place, has been read
  if (lane < Form::kWarpRows) store_shared(warp.rows + lane * 4, static_cast<uint32_t>(valid ? at.row(call) : -1));
  const uint32_t entries = warp.table + lane % Form::kWarpRows * 16;
  for (int32_t tap = lane / Form::kWarpRows; tap < call.taps; tap += 2) {
    copy_offsets(call, at, valid, offset_group, tap, entries + tap * Form::kTapBytes);
  }
  commit_copies();
  wait_for_copies<0>();
  for (int32_t tap = lane / Form::kWarpRows; tap < call.taps; tap += 2) {
    const uint32_t entry = entries + tap * Form::kTapBytes;
    const FusedSample sample = fused_sample(call, at, valid, tap, [&]() { return load_shared_float4(entry); });
    store_shared(entry, sample.vectors);
    store_shared(entry + Form::kWeights, stored(sample.weights));
  }
  __syncwarp();
}

// Writes a warp's part of the result. It passes through shared memory, so that whole rows are written.
template <typename Form>
__device__ __forceinline__ void write_result(const FusedForward& call, const Warp<Form>& warp,
                                             const typename Form::Sums& sum, int32_t first_column) {
  using scalar_t = typename Form::scalar_t;
  constexpr int32_t kHalves = Form::kHalves, kPitch = Form::kPitch, kWidth = Form::kColumns / kHalves;
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
    for (int32_t i = warp.lane; i < Form::kWarpRows * kWidth / 8; i += 32) {
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
template <typename Form>
__device__ __forceinline__ void start_product(typename Form::Sums& sum, uint32_t* a, uint64_t weights) {
#pragma unroll
  for (int32_t i = 0; i < 16; ++i) {
    pin(a[i]);
  }
  fence_products();
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    multiply<typename Form::scalar_t, Form::kColumns>(sum, a + 4 * i, weights + 2 * i);
  }
  commit_products();
}

// Calls body with the form for the number of output channels.
template <typename scalar_t, int kOperandBytes, typename Body>
auto with_wgmma_form(const FusedForward& call, const Body& body) {
  if (call.out_channels % 256 == 0) return body(Wgmma<scalar_t, 2, 256, 3, 1, kOperandBytes>{});
  if (call.out_channels % 128 == 0) return body(Wgmma<scalar_t, 3, 128, 5, 1, kOperandBytes>{});
  constexpr int kStages = kOperandBytes > 0 ? 3 : 4;  // three blocks then leave as much of the L1 cache to the input
  return body(Wgmma<scalar_t, 1, 64, kStages, 3, kOperandBytes>{});
}

template <int kOperandBytes>
FusedShape wgmma_shape(const FusedForward& call) {
  return with_wgmma_form<__half, kOperandBytes>(
      call, [&](auto form) -> FusedShape { return {form.kRows, form.kColumns, form.shared_bytes(call.taps)}; });
}

template <typename Form, typename Kernel>
void launch_wgmma(Kernel* kernel, const FusedForward& call, int32_t device) {
  const FusedSteps plan =
      FusedSteps::of(call, Form::kRows, Form::kColumns, Form::kTapBytes, Form::table_bytes(call.taps));
  const int64_t resident = multiprocessors(device) * Form::kResident / plan.column_tiles * plan.column_tiles;
  const int64_t blocks = std::min<int64_t>(plan.tiles, std::max<int64_t>(resident, plan.column_tiles));
  launch_kernel(kernel, blocks, Form::kThreads, Form::shared_bytes(call.taps), device, call, plan);
}

}  // namespace mmdcn
