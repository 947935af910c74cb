// SPDX-License-Identifier: Apache-2.0
// The gradients of input, offset and mask in one kernel. See Note [Deformable convolution on CUDA].
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

#include "deform_conv2d_columns.cuh"
#include "deform_conv2d_input.cuh"

namespace mmdcn {

// Does what AddToInput does, and then what Columns does, for the samples of a block. The columns of a tile do not fit
// in the L2 cache, but those of the blocks that run at a time may, so that their gradient is read from memory only
// once. It is on its way to that cache while the corners are sorted.
template <typename scalar_t, int kVector, int kLanes>
struct Backpropagate {
  using Input = AddToInput<scalar_t, kVector, kLanes, true, false>;
  using Sampling = Columns<scalar_t, kVector, kLanes, true, true, true>;

  static constexpr uint32_t kWarps = Input::kWarps, kResident = 3;
  static constexpr uint32_t kLine = 128 / sizeof(Vector<scalar_t, kVector>);
  static constexpr uint32_t kPrefetched = 2 * kLine;  // of each sample; more might not stay until it is used

  union Shared {
    typename Input::Shared input;
    typename Sampling::WarpShared sampling[kWarps];
  };

  Input input;
  Sampling sampling;

  C10_HOST_DEVICE uint32_t blocks() const { return input.blocks(); }

  C10_DEVICE void run(uint32_t block, Shared& shared, const Threads& threads) const {
    prefetch_columns(block, threads);
    input.run(block, shared.input, threads);
    threads.sync();
    // Computed again, so that they take no registers in between.
    const auto [patch, offset_group, tap] = input.samples(opaque(block), threads);
    if (tap >= input.tile.taps.divisor) return;
    sampling.run_warp(patch, offset_group, tap, shared.sampling[threads.group], threads);
  }

 private:
  C10_DEVICE void prefetch_columns(uint32_t block, const Threads& threads) const {
    const auto& tile = input.tile;
    const auto [patch, offset_group, tap] = input.samples(block, threads);
    if (tap >= tile.taps.divisor) return;
    const auto point = tile.locate(patch, threads.lane, offset_group, tap);
    if (!point.valid) return;
    const uint32_t first_vector = offset_group * tile.offset_group_vectors;
#pragma unroll 1
    for (uint32_t c = 0; c < tile.offset_group_vectors && c < kPrefetched; c += kLine) {
      prefetch(tile.columns + tile.first_column(first_vector + c) + tile.column(point.position, tap));
    }
  }
};

}  // namespace mmdcn
