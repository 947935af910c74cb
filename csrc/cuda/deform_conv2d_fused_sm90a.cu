// SPDX-License-Identifier: Apache-2.0
// The form `wgmma` of Note [Fused forward].
#include "deform_conv2d_fused_wgmma.cuh"

namespace mmdcn {
namespace {

constexpr int kAhead = 2;  // vectors that are loaded before they are blended

// Blends a vector of 8 channels into its words of the left operand.
template <typename scalar_t>
__device__ __forceinline__ void blend(uint32_t* fragment, const FusedCorners& corners, const float4& weights) {
  fragment[0] = corners.template blend<scalar_t>(weights, 0);
  fragment[2] = corners.template blend<scalar_t>(weights, 1);
  fragment[4] = corners.template blend<scalar_t>(weights, 2);
  fragment[6] = corners.template blend<scalar_t>(weights, 3);
}

// Exchanges the halves of a row's channels in the left operand.
__device__ __forceinline__ void exchange_halves(uint32_t* fragment, bool exchanges) {
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
template <typename Form>
__device__ __forceinline__ void add_group(const FusedForward& call, const FusedSteps& plan, Ring<Form>& ring,
                                          typename Form::Sums& sum, const Warp<Form>& warp, int32_t offset_group) {
  constexpr int32_t kTapBytes = Form::kTapBytes, kWeights = Form::kWeights;
  uint32_t operand[2][16];
  FusedCorners corners[kAhead];
  const bool is_odd = warp.quad % 2 != 0;
  const uint32_t own_table = warp.table + warp.quad * 16;
  uint32_t channel = offset_group * (call.channels / call.offset_groups / 8) + warp.in_quad + (is_odd ? 4 : 0);
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
    target.load(vectors, call.input, channel + (vector % 2 == 0 ? 0 : is_odd ? -4 : 4));
  };
  const auto gather = [&](uint32_t (&a)[16]) {
#pragma unroll
    for (int32_t vector = 0; vector < 4; ++vector) {
      if (vector % 2 == 0) weights = load_shared_float4(own_table + blend_tap + kWeights + vector / 2 * 128);
      blend<typename Form::scalar_t>(a + vector % 2 * 8 + vector / 2, corners[vector % kAhead], weights);
      if (vector % 2 == 1) exchange_halves(a + vector / 2, is_odd);
      if (vector + kAhead == 4) advance_loads();
      load(corners[vector % kAhead], (vector + kAhead) % 4);
    }
    blend_tap += kTapBytes;
    if (blend_tap == plan.table_end) blend_tap = 0;
  };
  const auto multiply_and_gather = [&](uint32_t (&a)[16], uint32_t (&next)[16]) {
    start_product<Form>(sum, a, ring.weights());
    const uint32_t used = ring.empty(ring.stage);
    ring.advance();
    ring.refill();  // its branch keeps the gather behind the start of the products, the next wait ahead of their end
    gather(next);
#pragma unroll
    for (int32_t i = 0; i < 16; ++i) {
      pin(next[i]);
    }
    if (ring.done < ring.total) ring.wait_for_weights();
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

template <typename Form>
__global__ void __launch_bounds__(Form::kThreads, Form::kResident)
    fused_wgmma(const __grid_constant__ FusedForward call, const __grid_constant__ FusedSteps plan) {
  const Warp<Form> warp{plan};
  Ring<Form> ring = Ring<Form>::of(call, plan);
  ring.start();
  if (ring.done < ring.total) ring.wait_for_weights();

  typename Form::Sums sum = {};
  while (ring.done < ring.total) {  // an offset group of a tile; both follow from `done`, which saves registers
    const int32_t tile = static_cast<int32_t>(blockIdx.x + ring.done / plan.steps * gridDim.x);
    const int32_t offset_group = ring.done % plan.steps / plan.group_steps;
    write_table(call, warp, tile / plan.column_tiles * Form::kRows, offset_group,
                [](const float4& weights) { return weights; });
    add_group(call, plan, ring, sum, warp, offset_group);

    if (ring.done % plan.steps != 0) continue;
    write_result(call, warp, sum, ring.column_tile * Form::kColumns);
#pragma unroll
    for (float& number : sum) {
      number = 0;
    }
  }
}

template <typename scalar_t>
void run(const FusedForward& call, int32_t device) {
  with_wgmma_form<scalar_t, 0>(call, [&](auto form) {
    using Form = decltype(form);
    launch_wgmma<Form>(fused_wgmma<Form>, call, device);
  });
}

}  // namespace

FusedShape fused_wgmma_shape(const FusedForward& call) { return wgmma_shape<0>(call); }

void run_fused_wgmma(const FusedForward& call, bool is_half, int32_t device) {
  is_half ? run<__half>(call, device) : run<__nv_bfloat16>(call, device);
}

}  // namespace mmdcn
