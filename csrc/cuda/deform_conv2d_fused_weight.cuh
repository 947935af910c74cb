// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

#include "copy_images.cuh"

namespace mmdcn {

// Packs the weight [C_out, C_in, kh, kw] as [C_in/64, K, C_out, 64] for Note [Fused forward], followed by C_in zeros.
// The 16-byte vectors of a row are swizzled by the row's index, as the tensor cores read them from shared memory. For
// `wgmma` the channels are permuted.
template <typename scalar_t>
struct PackWeight {
  static constexpr uint32_t kResident = 0, kChunk = 64, kVector = 8, kBlockVectors = 256;

  const scalar_t* weight;
  ImageStrides strides;
  uint32_t out_channels, in_channels, taps, kernel_width;
  bool is_wgmma;
  scalar_t* packed;

  struct Shared {};

  C10_HOST_DEVICE uint32_t max_lanes() const { return 32; }
  C10_HOST_DEVICE uint32_t vectors() const { return out_channels * taps * (in_channels / kVector); }
  C10_HOST_DEVICE uint32_t all_vectors() const { return vectors() + in_channels / kVector; }
  C10_HOST_DEVICE uint32_t blocks() const { return (all_vectors() + kBlockVectors - 1) / kBlockVectors; }
  C10_HOST_DEVICE uint32_t block(uint32_t index) const { return index; }

  template <typename Threads>
  C10_DEVICE void run(uint32_t block, Shared&, const Threads& threads) const {
    for (uint32_t i = threads.index(); i < kBlockVectors; i += threads.count()) {
      const uint32_t index = block * kBlockVectors + i;
      if (index < all_vectors()) pack(index);
    }
  }

  // The channel of a chunk that is at `place` in a row of the packed weight.
  C10_HOST_DEVICE uint32_t channel(uint32_t place) const {
    if (!is_wgmma) return place;
    const uint32_t product = place / 16, in_product = place % 16;  // a step has four products
    const uint32_t thread = in_product % 8 / 2, of_thread = in_product / 8 * 2 + in_product % 2;
    return product / 2 * 32 + thread * 8 + product % 2 * 4 + of_thread;
  }

 private:
  C10_DEVICE void pack(uint32_t index) const {
    const uint32_t vector = index % kVector, row = index / kVector, out_channel = row % out_channels;
    const uint32_t tap = row / out_channels % taps, chunk = row / out_channels / taps;
    const scalar_t* const source = weight + out_channel * strides.image + tap / kernel_width * strides.y +
                                   tap % kernel_width * strides.x + chunk * kChunk * strides.channel;
    Vector<scalar_t, kVector> values{};
    for (uint32_t i = 0; i < kVector && index < vectors(); ++i) {
      values.values[i] = source[channel((vector ^ out_channel % 8) * kVector + i) * strides.channel];
    }
    store(reinterpret_cast<Vector<scalar_t, kVector>*>(packed) + index, values);
  }
};

}  // namespace mmdcn
