// SPDX-License-Identifier: Apache-2.0
// The form `wgmma` of Note [Fused forward] that blends on the tensor cores, too.
//
// Note: [Blending on the tensor cores]
//
// Lane 4q + t of a warp loads, from each corner, a vector of 8 channels for position t of four. A word of it, two
// channels, is where mma.m16n8k8 expects row q and columns 2t and 2t + 1 of its left operand. The right operand [8, 8]
// holds the weight of position t at (2t, 2t) and (2t + 1, 2t + 1) and zeros elsewhere. So each lane finds the sum over
// the corners, for its own position and channels, in its own part of the result. A weight is passed as the sum of two
// numbers of the half type, with an error of at most 2^-17 of it in bfloat16, and 2^-23 of it or 2^-25 in float16.
//
// The zeros turn an infinity or a NaN into the NaN of other positions and channels. With such an operand, no result of
// its row is finite. A block whose results are not all finite therefore computes its tiles again, blended in float32.
#include "deform_conv2d_fused_wgmma.cuh"

namespace mmdcn {
namespace {

constexpr int kAhead = 2;                 // vectors that are loaded before they are blended
constexpr int kOperand = 16 * kRowBytes;  // bytes of a warp's left operand of a step, [16, 64]

// A lane's part of a step: one vector of the rows in_quad, in_quad + 4, in_quad + 8 and in_quad + 12 of its warp.
template <typename Form>
struct Part {
  const uint32_t vector;     // such that eight lanes read all banks of the L1 cache at once
  const uint32_t table;      // the first row's entry
  const uint32_t target;     // the first row's vector in the left operand, which is swizzled for ldmatrix
  const uint32_t fragments;  // the row of the left operand that the lane passes to ldmatrix

  __device__ __forceinline__ static Part of(const Warp<Form>& warp) {
    const uint32_t vector = warp.quad ^ 2 * warp.in_quad, row = warp.lane % 16;
    return {vector, opaque(warp.table + warp.in_quad * 16),
            opaque(warp.operand + warp.in_quad * kRowBytes + (vector ^ warp.in_quad) * 16),
            opaque(warp.operand + row * kRowBytes + (warp.lane / 16 ^ row % 8) * 16)};
  }

  __device__ __forceinline__ uint32_t entry(int32_t tap, int32_t i) const { return table + tap + i * 64; }
  __device__ __forceinline__ uint32_t target_of(int32_t i) const { return (target ^ i % 2 * 64) + i * 4 * kRowBytes; }
  __device__ __forceinline__ uint32_t first_channel(const FusedForward& call, int32_t offset_group) const {
    return offset_group * (call.channels / call.offset_groups / 8) + vector;
  }
};

// A weight as the sum of two numbers, the first in the low half of a word.
template <typename scalar_t>
__device__ __forceinline__ uint32_t split(float weight) {
  using Two = Pair<scalar_t>;
  const float first = Two::low(Two::of(weight, 0));
  return Two::of(first, weight - first);
}

// How select_bytes makes a lane's word of the right operand from the weight of its position: from the first number, and
// from the second.
struct ByteOrders {
  uint32_t values[2];

  __device__ __forceinline__ static ByteOrders of(int32_t quad, int32_t in_quad) {
    const uint32_t first = quad / 2 != in_quad ? 0x4444 : quad % 2 == 0 ? 0x4410 : 0x1044;
    return {opaque(first), opaque(first + 0x2222)};
  }
};

// The four words of a vector.
template <typename scalar_t>
__device__ __forceinline__ uint4 blend_on_tensor_cores(const FusedCorners& corners, const uint4& weights,
                                                       const ByteOrders& orders) {
  using Two = Pair<scalar_t>;
  float first[4] = {}, last[4] = {};  // of two words each
  const uint32_t of_corner[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    const uint4& corner = corners.values[i];
#pragma unroll
    for (const uint32_t order : orders.values) {
      const uint32_t weight = select_bytes(of_corner[i], order);
      Two::multiply(first, corner.x, corner.y, weight);
      Two::multiply(last, corner.z, corner.w, weight);
    }
  }
  return make_uint4(Two::of(first[0], first[1]), Two::of(first[2], first[3]), Two::of(last[0], last[1]),
                    Two::of(last[2], last[3]));
}

// Multiplies the left operand in shared memory, which the next step may overwrite. The products go on meanwhile.
template <typename Form>
__device__ __forceinline__ void start_step(Ring<Form>& ring, typename Form::Sums& sum, uint32_t (&operand)[4][4],
                                           uint32_t fragments) {
  ring.wait_for_weights();  // a branch, across which ptxas does not move loads
  wait_for_products();      // of the step before
  if (ring.done > 0) ring.release();
  __syncwarp();
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    load_matrices(operand[i], fragments ^ i * 32);
  }
  __syncwarp();
  start_product<Form>(sum, operand[0], ring.weights());
  ring.advance();
  ring.refill();
}

// Adds the products of an offset group, whose samples are in the table. Loads run kAhead vectors ahead of blends.
template <typename Form>
__device__ __forceinline__ void add_group(const FusedForward& call, const FusedSteps& plan, Ring<Form>& ring,
                                          typename Form::Sums& sum, const Warp<Form>& warp, int32_t offset_group) {
  uint32_t operand[4][4];
  FusedCorners corners[kAhead];
  const Part<Form> part = Part<Form>::of(warp);
  const ByteOrders orders = ByteOrders::of(warp.quad, warp.in_quad);
  const char* input = vector_at(call.input, part.first_channel(call, offset_group));
  int32_t load_tap = 0, blend_tap = 0;  // in bytes of the table
  const int32_t group_end = ring.done + plan.group_steps;
  const auto advance_loads = [&]() {  // stays at the last step
    if (ring.done + 1 >= group_end) return;
    load_tap += Form::kTapBytes;
    if (load_tap != plan.table_end) return;
    load_tap = 0;
    input += kRowBytes;
  };
  const auto load = [&](int32_t i) {
    corners[i % kAhead].load<load_global_in_order>(load_shared(part.entry(load_tap, i)), input);
  };
#pragma unroll
  for (int32_t i = 0; i < kAhead; ++i) {
    load(i);
  }
  do {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const uint4 weights = load_shared(part.entry(blend_tap, i) + Form::kWeights);
      store_shared(part.target_of(i),
                   blend_on_tensor_cores<typename Form::scalar_t>(corners[i % kAhead], weights, orders));
      if (i + kAhead == 4) advance_loads();
      load((i + kAhead) % 4);
      if (i == 2) __syncwarp();  // no loads sink below it
    }
    blend_tap += Form::kTapBytes;
    if (blend_tap == plan.table_end) blend_tap = 0;
    start_step(ring, sum, operand, part.fragments);
  } while (ring.done != group_end);
  wait_for_products();
}

// The same, blended in float32.
template <typename Form>
__device__ __forceinline__ void add_group_in_float(const FusedForward& call, const FusedSteps& plan, Ring<Form>& ring,
                                                   typename Form::Sums& sum, const Warp<Form>& warp,
                                                   int32_t offset_group) {
  uint32_t operand[4][4];
  const Part<Form> part = Part<Form>::of(warp);
  for (int32_t step = 0; step < plan.group_steps; ++step) {
    const int32_t tap = step % call.taps * Form::kTapBytes;
    const uint32_t channel = part.first_channel(call, offset_group) + step / call.taps * (kChunk / 8);
#pragma unroll 1
    for (int32_t i = 0; i < 4; ++i) {
      FusedCorners corners;
      corners.load(load_shared(part.entry(tap, i)), call.input, channel);
      const float4 weights = load_shared_float4(part.entry(tap, i) + Form::kWeights);
      store_shared(part.target_of(i), corners.template blend<typename Form::scalar_t>(weights));
    }
    start_step(ring, sum, operand, part.fragments);
  }
  wait_for_products();
}

// Computes the tiles of a block, and tells whether all results are finite.
template <bool kInFloat, typename Form>
__device__ __forceinline__ bool compute_tiles(const FusedForward& call, const FusedSteps& plan, Ring<Form>& ring,
                                              const Warp<Form>& warp) {
  using scalar_t = typename Form::scalar_t;
  typename Form::Sums sum = {};
  float zero = 0;
  ring.start();
  while (ring.done < ring.total) {  // an offset group of a tile; both follow from `done`, which saves registers
    const int32_t tile = static_cast<int32_t>(blockIdx.x + ring.done / plan.steps * gridDim.x);
    const int32_t first_position = tile / plan.column_tiles * Form::kRows;
    const int32_t offset_group = ring.done % plan.steps / plan.group_steps;
    if constexpr (kInFloat) {
      write_table(call, warp, first_position, offset_group, [](const float4& weights) { return weights; });
      add_group_in_float(call, plan, ring, sum, warp, offset_group);
    } else {
      write_table(call, warp, first_position, offset_group, [](const float4& w) {
        return make_uint4(split<scalar_t>(w.x), split<scalar_t>(w.y), split<scalar_t>(w.z), split<scalar_t>(w.w));
      });
      add_group(call, plan, ring, sum, warp, offset_group);
    }

    if (ring.done % plan.steps != 0) continue;
    write_result(call, warp, sum, ring.column_tile * Form::kColumns);
    float zeros[4] = {zero};  // so that additions do not wait for each other
#pragma unroll
    for (int32_t i = 0; i < Form::kColumns / 2; ++i) {
      zeros[i % 4] = fmaf(sum[i], 0.0f, zeros[i % 4]);
      sum[i] = 0;
    }
    zero = zeros[0] + zeros[1] + (zeros[2] + zeros[3]);
  }
  return zero == 0;
}

template <typename Form>
__global__ void __launch_bounds__(Form::kThreads, Form::kResident)
    fused_wgmma_blend(const __grid_constant__ FusedForward call, const __grid_constant__ FusedSteps plan) {
  const Warp<Form> warp{plan};
  Ring<Form> ring = Ring<Form>::of(call, plan);
  const bool finite = compute_tiles<false>(call, plan, ring, warp);
  ring.release();
  if (__syncthreads_or(!finite)) compute_tiles<true>(call, plan, ring, warp);
}

template <typename scalar_t>
void run(const FusedForward& call, int32_t device) {
  with_wgmma_form<scalar_t, kOperand>(call, [&](auto form) {
    using Form = decltype(form);
    launch_wgmma<Form>(fused_wgmma_blend<Form>, call, device);
  });
}

}  // namespace

FusedShape fused_wgmma_blend_shape(const FusedForward& call) { return wgmma_shape<kOperand>(call); }

void run_fused_wgmma_blend(const FusedForward& call, bool is_half, int32_t device) {
  is_half ? run<__half>(call, device) : run<__nv_bfloat16>(call, device);
}

}  // namespace mmdcn
