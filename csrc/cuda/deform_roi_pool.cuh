// SPDX-License-Identifier: Apache-2.0
// See Note [Deformable RoI pooling] for what a bin is.
//
// A thread block works on some bins, each of which one of its threads locates. Then the lanes of a group share a bin:
// they move over its channels in 16-byte vectors, and each over all of its pixels. So one group sees all that a bin's
// offset moves, and grad_offset needs no atomics; grad_input does. If it is to be deterministic, blocks own channels of
// an image instead, and go over all its bins in their order.
//
// This file is what the threads of a block compute, for any number of them. It is C++ without CUDA, so that the host
// can run it too (tests/cuda_host).
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

#include "../core/roi_bins.h"
#include "vector.cuh"

namespace mmdcn {

// Calls body(pixel of the batch, weights of its row, weights of its column) for each pixel that has a weight.
template <typename T, typename Body>
C10_HOST_DEVICE void each_pixel(const RoIGeometry& g, const Bin<T>& bin, const Body& body) {
  for (int32_t row = bin.y.begin(); row < bin.y.end(); ++row) {
    const AxisWeight<T> y = bin.y.at(row);
    if (y.is_zero()) continue;
    for (int32_t column = bin.x.begin(); column < bin.x.end(); ++column) {
      const AxisWeight<T> x = bin.x.at(column);
      if (!x.is_zero()) body((bin.image * g.height + row) * g.width + column, y, x);
    }
  }
}

struct BinBlock {
  int64_t first;
  uint32_t count;
};

constexpr uint32_t kBlockBins = 8;

template <typename scalar_t>
struct RoIs {
  using T = compute_t<scalar_t>;

  static constexpr uint32_t kResident = 2;  // to have more, the compiler would spill registers

  RoIGeometry geometry;
  const T* regions;  // [N, 5]
  const T* offset;   // [N, 2, P]; null if there is none

  struct Shared {
    Bin<T> bins[kBlockBins];
  };

  C10_HOST_DEVICE int64_t bins() const { return geometry.rois * geometry.bins(); }
  C10_HOST_DEVICE uint32_t bin_blocks() const { return (bins() + kBlockBins - 1) / kBlockBins; }
  C10_HOST_DEVICE BinBlock bin_block(int64_t index) const {
    const int64_t first = index * kBlockBins, rest = bins() - first;
    return {first, rest < kBlockBins ? static_cast<uint32_t>(rest) : kBlockBins};
  }

  template <typename Threads>
  C10_HOST_DEVICE void locate_bins(const BinBlock& block, Shared& shared, const Threads& threads) const {
    for (uint32_t i = threads.index(); i < block.count; i += threads.count()) {
      const int64_t bin = block.first + i;
      shared.bins[i] = bin_of(geometry, regions, offset, bin / geometry.bins(), bin % geometry.bins());
    }
    threads.sync();
  }
};

// What bodies have in common whose blocks are of bins.
template <typename scalar_t, int kVector>
struct OverBins : RoIs<scalar_t> {
  C10_HOST_DEVICE uint32_t blocks() const { return this->bin_blocks(); }
  C10_HOST_DEVICE uint32_t shares() const { return this->geometry.channels / kVector; }
  C10_HOST_DEVICE BinBlock block(uint32_t index) const { return this->bin_block(index); }
};

template <typename scalar_t, int kVector>
struct PoolBins : OverBins<scalar_t, kVector> {
  using typename RoIs<scalar_t>::T;
  using typename RoIs<scalar_t>::Shared;

  const scalar_t* input;  // [B*H*W, C]
  int64_t pixel_stride;
  scalar_t* output;  // [N*P, C]

  template <typename Threads>
  C10_HOST_DEVICE void run(const BinBlock& block, Shared& shared, const Threads& threads) const {
    this->locate_bins(block, shared, threads);
    for (uint32_t i = threads.group; i < block.count; i += threads.groups) {
      for (int64_t c = threads.lane * kVector; c < this->geometry.channels; c += threads.lanes * kVector) {
        pool(shared.bins[i], c).store(output + (block.first + i) * this->geometry.channels + c);
      }
    }
  }

 private:
  C10_HOST_DEVICE Vector<scalar_t, kVector> pool(const Bin<T>& bin, int64_t channel) const {
    T sum[kVector] = {};
    if (bin.is_nan()) {
      for (T& value : sum) {
        value = static_cast<T>(NAN);
      }
    } else {
      each_pixel(this->geometry, bin, [&](int64_t pixel, const AxisWeight<T>& y, const AxisWeight<T>& x) {
        const auto values = Vector<scalar_t, kVector>::at(input + pixel * pixel_stride + channel);
        for (int c = 0; c < kVector; ++c) {
          sum[c] += y.weight * x.weight * values[c];
        }
      });
    }
    Vector<scalar_t, kVector> rounded;
    for (int c = 0; c < kVector; ++c) {
      rounded.values[c] = static_cast<scalar_t>(sum[c]);
    }
    return rounded;
  }
};

template <typename scalar_t, int kVector>
struct BackpropagateBins : OverBins<scalar_t, kVector> {
  using typename RoIs<scalar_t>::T;
  using typename RoIs<scalar_t>::Shared;

  const scalar_t* input;  // [B*H*W, C]
  int64_t pixel_stride;
  const scalar_t* grad_output;  // [N*P, C]
  T* grad_input;                // [B*H*W, C], atomically added to; null if not needed
  T* grad_offset;               // [N, 2, P]; null if not needed

  template <typename Threads>
  C10_HOST_DEVICE void run(const BinBlock& block, Shared& shared, const Threads& threads) const {
    this->locate_bins(block, shared, threads);
    for (uint32_t i = threads.group; i < block.count; i += threads.groups) {
      const Bin<T>& bin = shared.bins[i];
      T move_y = 0, move_x = 0;
      for (int64_t c = threads.lane * kVector; c < this->geometry.channels && !bin.is_nan();
           c += threads.lanes * kVector) {
        backpropagate(bin, block.first + i, c, move_y, move_x, threads);
      }
      if (grad_offset) write_moves(bin, block.first + i, threads.sum(move_y), threads.sum(move_x), threads);
    }
  }

 private:
  template <typename Threads>
  C10_HOST_DEVICE void backpropagate(const Bin<T>& bin, int64_t index, int64_t channel, T& move_y, T& move_x,
                                     const Threads& threads) const {
    const int64_t channels = this->geometry.channels;
    const auto grad = Vector<scalar_t, kVector>::at(grad_output + index * channels + channel);
    each_pixel(this->geometry, bin, [&](int64_t pixel, const AxisWeight<T>& y, const AxisWeight<T>& x) {
      if (grad_offset) {
        const auto values = Vector<scalar_t, kVector>::at(input + pixel * pixel_stride + channel);
        T product = 0;
        for (int c = 0; c < kVector; ++c) {
          product += grad[c] * values[c];
        }
        move_y += y.slope * x.weight * product, move_x += y.weight * x.slope * product;
      }
      if (grad_input) {
        T given[kVector];
        for (int c = 0; c < kVector; ++c) {
          given[c] = y.weight * x.weight * grad[c];
        }
        threads.add(grad_input + pixel * channels + channel, given);
      }
    });
  }

  template <typename Threads>
  C10_HOST_DEVICE void write_moves(const Bin<T>& bin, int64_t index, T move_y, T move_x, const Threads& threads) const {
    if (threads.lane != 0) return;
    const int64_t bins = this->geometry.bins();
    T* target = grad_offset + index / bins * 2 * bins + index % bins;
    target[0] = bin.is_nan() ? static_cast<T>(NAN) : bin.shift_x * move_x;
    target[bins] = bin.is_nan() ? static_cast<T>(NAN) : bin.shift_y * move_y;
  }
};

// Some channels of an image, for all of its bins.
struct ChannelsBlock {
  int64_t image, first_channel;
};

// The gradient of the input alone, in an order that does not change.
template <typename scalar_t, int kVector>
struct AddBinsInOrder : RoIs<scalar_t> {
  using typename RoIs<scalar_t>::T;
  using typename RoIs<scalar_t>::Shared;

  const scalar_t* grad_output;  // [N*P, C]
  T* grad_input;                // [B*H*W, C]

  // A few lanes, so that there are many blocks, each with many groups to share the pixels of a bin.
  C10_HOST_DEVICE uint32_t shares() const { return 4; }
  C10_HOST_DEVICE int64_t block_channels() const { return int64_t{shares()} * kVector; }
  C10_HOST_DEVICE int64_t blocks_of_image() const {
    return (this->geometry.channels + block_channels() - 1) / block_channels();
  }
  C10_HOST_DEVICE uint32_t blocks() const { return this->geometry.batch * blocks_of_image(); }
  C10_HOST_DEVICE ChannelsBlock block(uint32_t index) const {
    return {index / blocks_of_image(), index % blocks_of_image() * block_channels()};
  }

  template <typename Threads>
  C10_HOST_DEVICE void run(const ChannelsBlock& own, Shared& shared, const Threads& threads) const {
    const int64_t channel = own.first_channel + threads.lane * kVector;
    for (uint32_t index = 0; index < this->bin_blocks(); ++index) {
      const BinBlock block = this->bin_block(index);
      this->locate_bins(block, shared, threads);
      for (uint32_t i = 0; i < block.count; ++i) {
        const Bin<T>& bin = shared.bins[i];
        const bool adds = !bin.is_nan() && bin.image == own.image && channel < this->geometry.channels;
        if (adds) add(bin, block.first + i, channel, threads);
        threads.sync();
      }
    }
  }

 private:
  template <typename Threads>
  C10_HOST_DEVICE void add(const Bin<T>& bin, int64_t index, int64_t channel, const Threads& threads) const {
    const int64_t channels = this->geometry.channels;
    const auto grad = Vector<scalar_t, kVector>::at(grad_output + index * channels + channel);
    uint32_t turn = 0;
    each_pixel(this->geometry, bin, [&](int64_t pixel, const AxisWeight<T>& y, const AxisWeight<T>& x) {
      const bool own_turn = turn == threads.group;
      turn = turn + 1 == threads.groups ? 0 : turn + 1;
      if (!own_turn) return;
      T* target = grad_input + pixel * channels + channel;
      for (int c = 0; c < kVector; ++c) {
        target[c] += y.weight * x.weight * grad[c];
      }
    });
  }
};

}  // namespace mmdcn
