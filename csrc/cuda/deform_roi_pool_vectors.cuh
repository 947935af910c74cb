// SPDX-License-Identifier: Apache-2.0
// Pooling of images whose channels are adjacent in memory: lanes read vectors of channels.
#pragma once

#include "deform_roi_pool_bins.cuh"

namespace mmdcn {

template <typename scalar_t, int kVector>
struct VectorPooling : RoIs<scalar_t> {
  using typename RoIs<scalar_t>::T;

  static constexpr uint32_t kResident = 2, kBlockBins = 8;

  using Shared = LocatedBins<T, kBlockBins>;

  ImageView<const scalar_t> input;

  C10_HOST_DEVICE uint32_t max_lanes() const { return this->geometry.channels / kVector; }
  C10_HOST_DEVICE uint32_t blocks() const { return (this->bins() + kBlockBins - 1) / kBlockBins; }
  C10_HOST_DEVICE BinBlock block(uint32_t index) const {
    const int64_t first = int64_t{index} * kBlockBins, rest = this->bins() - first;
    return {first, rest < kBlockBins ? static_cast<uint32_t>(rest) : kBlockBins};
  }

  // Calls body(channel, pixels) for the lane's channels of a bin.
  template <typename Threads, typename Body>
  C10_HOST_DEVICE void for_each_vector(const Bin<T>& bin, const Threads& threads, const Body& body) const {
    for (int64_t c = threads.lane * kVector; c < this->geometry.channels; c += threads.lanes * kVector) {
      const scalar_t* image = input.at(bin.is_nan() ? 0 : bin.image, c, 0, 0);
      body(c, Pixels<scalar_t, kVector, true, int64_t>{image, 0, 0, input.row_stride, input.column_stride, 1});
    }
  }
};

template <typename scalar_t, int kVector>
struct PoolVectors : VectorPooling<scalar_t, kVector> {
  using typename RoIs<scalar_t>::T;
  using typename VectorPooling<scalar_t, kVector>::Shared;

  scalar_t* output;  // [N*P, C]

  template <typename Threads>
  C10_HOST_DEVICE void run(const BinBlock& block, Shared& shared, const Threads& threads) const {
    this->locate_bins(block, shared, threads);
    for (uint32_t i = threads.group; i < block.count; i += threads.groups) {
      this->for_each_vector(shared.bins[i], threads, [&](int64_t channel, const auto& pixels) {
        T sum[kVector];
        shared.pool(i, pixels, sum);
        Vector<scalar_t, kVector> rounded;
        for (int c = 0; c < kVector; ++c) {
          rounded.values[c] = static_cast<scalar_t>(sum[c]);
        }
        rounded.store(output + (block.first + i) * this->geometry.channels + channel);
      });
    }
  }
};

template <typename scalar_t, int kVector>
struct OffsetGradientVectors : VectorPooling<scalar_t, kVector> {
  using typename RoIs<scalar_t>::T;
  using typename VectorPooling<scalar_t, kVector>::Shared;

  BinView<const scalar_t> grad_output;
  T* grad_offset;  // [N, 2, P]

  template <typename Threads>
  C10_HOST_DEVICE void run(const BinBlock& block, Shared& shared, const Threads& threads) const {
    this->locate_bins(block, shared, threads);
    const int64_t bins = this->geometry.bins();
    for (uint32_t i = threads.group; i < block.count; i += threads.groups) {
      const int64_t roi = (block.first + i) / bins, index = (block.first + i) % bins;
      T grad_y = 0, grad_x = 0;
      this->for_each_vector(shared.bins[i], threads, [&](int64_t channel, const auto& pixels) {
        T grad[kVector];
        for (int c = 0; c < kVector; ++c) {
          grad[c] = static_cast<T>(*grad_output.at(roi, channel + c, index));
        }
        shared.add_position_gradient(i, pixels, grad, grad_y, grad_x);
      });
      grad_y = threads.sum(grad_y), grad_x = threads.sum(grad_x);
      if (threads.lane == 0)
        write_offset_gradient(this->geometry, shared.bins[i], roi, index, grad_y, grad_x, grad_offset);
    }
  }
};

}  // namespace mmdcn
