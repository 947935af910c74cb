// SPDX-License-Identifier: Apache-2.0
// Note [Deformable RoI pooling] defines a bin.
//
// Note: [Deformable RoI pooling on CUDA]
//
// A thread block locates some bins and stores the weights of their rows and columns in shared memory, once for all
// channels. Then the lanes of a group share a bin: each lane iterates over its channels and all pixels of the bin.
//
// If channels are adjacent in memory and aligned (channels_last), a lane reads 16-byte vectors of channels, and a block
// has a few bins. Otherwise (NCHW) a block has the bins of one region, and copies the patch of pixels around them to
// shared memory, some channels at a time. Lanes correspond to channels in both cases, so no tensor is rearranged.
//
// The gradient of the input is gathered: a block owns a few pixels and iterates over all bins that cover them, in
// order. So each pixel is written once, without atomics and without a copy in a wider type.
//
// This file contains what the threads of a block compute, for any number of threads. It is C++ without CUDA, so the
// host can run it too (tests/cuda_host).
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

#include "../core/roi_bins.h"
#include "vector.cuh"

namespace mmdcn {

constexpr uint32_t kBlockThreads = 256;  // maximum

// Images [B, C, H, W] of any strides.
template <typename scalar_t>
struct ImageView {
  scalar_t* data;
  int64_t image_stride, channel_stride, row_stride, column_stride;

  C10_HOST_DEVICE scalar_t* at(int64_t image, int64_t channel, int64_t row, int64_t column) const {
    return data + image * image_stride + channel * channel_stride + row * row_stride + column * column_stride;
  }
};

// A value for each bin and channel, [N, C, P].
template <typename scalar_t>
struct BinView {
  scalar_t* data;
  int64_t roi_stride, channel_stride, bin_stride;

  C10_HOST_DEVICE scalar_t* at(int64_t roi, int64_t channel, int64_t bin) const {
    return data + roi * roi_stride + channel * channel_stride + bin * bin_stride;
  }
};

// Pixels begin .. end - 1 along one axis.
struct Span {
  int32_t begin, end;

  C10_HOST_DEVICE int32_t size() const { return end - begin; }
  // `&` instead of `&&`, so that both ends are loaded together.
  C10_HOST_DEVICE bool reaches(int32_t first, int32_t count) const { return (begin < first + count) & (end > first); }
  C10_HOST_DEVICE void unite(const Span& other) {
    if (other.size() == 0) return;
    begin = size() > 0 && begin < other.begin ? begin : other.begin;
    end = end > other.end ? end : other.end;
  }
};

struct alignas(16) Box {
  Span y, x;

  C10_HOST_DEVICE void unite(const Box& other) { y.unite(other.y), x.unite(other.x); }
};

// The pixels that can have a nonzero weight; none if all samples are far outside the image.
template <typename T>
C10_HOST_DEVICE Span span_of(const AxisSamples<T>& axis) {
  const T last = axis.first + axis.step * (axis.count - 1);
  if (!(last >= -2 && axis.first <= static_cast<T>(axis.size) + 1)) return {0, 0};
  return {axis.begin(), axis.end()};
}

template <typename T>
C10_HOST_DEVICE Box box_of(const Bin<T>& bin) {
  const Span y = span_of(bin.y), x = span_of(bin.x);
  if (bin.image < 0 || y.size() == 0 || x.size() == 0) return {};
  return {y, x};
}

// Reads kVector channels of an image, as one vector if kAdjacent.
template <typename scalar_t, int kVector, bool kAdjacent, typename Stride>
struct Pixels {
  const scalar_t* first;
  int32_t first_row, first_column;
  Stride row_stride, column_stride, channel_stride;

  C10_HOST_DEVICE const scalar_t* at(int32_t row, int32_t column) const {
    return first + (row - first_row) * row_stride + (column - first_column) * column_stride;
  }
  C10_HOST_DEVICE Vector<scalar_t, kVector> right_of(const scalar_t* pixel, int32_t columns) const {
    const scalar_t* at = pixel + columns * column_stride;
    if constexpr (kAdjacent) {
      return Vector<scalar_t, kVector>::at(at);
    } else {
      Vector<scalar_t, kVector> values;
      for (int c = 0; c < kVector; ++c) {
        values.values[c] = at[c * channel_stride];
      }
      return values;
    }
  }
};

struct BinBlock {
  int64_t first;
  uint32_t count;
};

// The bins of a block, in shared memory.
template <typename T, uint32_t kBins>
struct LocatedBins {
  static constexpr uint32_t kWeights = 16 * kBins;

  Bin<T> bins[kBins];
  Box boxes[kBins];
  Box all;                                      // the union of the boxes
  T empty_sums[kBins];                          // NaN if the bin's coordinates are NaN, else 0
  uint32_t counts[kBins];                       // number of weights of each bin
  uint32_t firsts[kBins];                       // first weight of each bin; its rows come first, then its columns
  alignas(16) AxisWeight<T> weights[kWeights];  // weights that do not fit are computed at each use

  C10_HOST_DEVICE uint32_t sum_of_counts(uint32_t end) const {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < end; ++i) {
      sum += counts[i];
    }
    return sum;
  }

  C10_HOST_DEVICE Box united(uint32_t end) const {
    Box box = {};
    for (uint32_t i = 0; i < end; ++i) {
      box.unite(boxes[i]);
    }
    return box;
  }

  template <typename AllPixels, int kVector>
  C10_HOST_DEVICE void pool(uint32_t i, const AllPixels& pixels, T (&sum)[kVector]) const {
    for (T& value : sum) {
      value = empty_sums[i];
    }
    for_each_row(i, pixels, [&](const auto* first, const AxisWeight<T>& y, const Columns& x) {
      T of_row[kVector] = {};
      for (int32_t k = 0; k < kColumns; ++k) {
        if (!x.has[k]) continue;
        const auto pixel = pixels.right_of(first, k);
        for (int c = 0; c < kVector; ++c) {
          of_row[c] += x.weights[k].weight * pixel[c];
        }
      }
      for (int c = 0; c < kVector; ++c) {
        sum[c] += y.weight * of_row[c];
      }
    });
  }

  // Adds the bin's contribution to the gradients of its coordinates.
  template <typename AllPixels, int kVector>
  C10_HOST_DEVICE void add_position_gradient(uint32_t i, const AllPixels& pixels, const T (&grad)[kVector], T& grad_y,
                                             T& grad_x) const {
    for_each_row(i, pixels, [&](const auto* first, const AxisWeight<T>& y, const Columns& x) {
      T weighted = 0, sloped = 0;
      for (int32_t k = 0; k < kColumns; ++k) {
        if (!x.has[k]) continue;
        const auto pixel = pixels.right_of(first, k);
        T product = 0;
        for (int c = 0; c < kVector; ++c) {
          product += grad[c] * pixel[c];
        }
        weighted += x.weights[k].weight * product, sloped += x.weights[k].slope * product;
      }
      grad_y += y.slope * weighted, grad_x += y.weight * sloped;
    });
  }

 private:
  static constexpr int32_t kColumns = 4;

  // Adjacent columns, and which of them have a nonzero weight.
  struct Columns {
    AxisWeight<T> weights[kColumns];
    bool has[kColumns];
  };

  // Calls body(first pixel, weights of the row, columns) for each row with a nonzero weight, for every kColumns columns
  // of the bin. Columns are the outer loop, so their weights stay in registers.
  template <typename AllPixels, typename Body>
  C10_HOST_DEVICE void for_each_row(uint32_t i, const AllPixels& pixels, const Body& body) const {
    const Box box = boxes[i];
    const uint32_t first = firsts[i];
    if (first + counts[i] <= kWeights) {
      const AxisWeight<T>*y = weights + first, *x = y + box.y.size() - box.x.begin;
      for_each_weighted_row(
          box, [y](int32_t) mutable { return *y++; }, [x](int32_t column) { return x[column]; }, pixels, body);
    } else {
      for_each_weighted_row(
          box, [&](int32_t row) { return bins[i].y.at(row); }, [&](int32_t column) { return bins[i].x.at(column); },
          pixels, body);
    }
  }

  template <typename Y, typename X, typename AllPixels, typename Body>
  C10_HOST_DEVICE static void for_each_weighted_row(const Box& box, const Y& y_from_first_row, const X& x_of,
                                                    const AllPixels& pixels, const Body& body) {
    for (int32_t first = box.x.begin; first < box.x.end; first += kColumns) {
      Columns x = {};
      for (int32_t k = 0; k < kColumns; ++k) {
        if (first + k < box.x.end) x.weights[k] = x_of(first + k);
        x.has[k] = !x.weights[k].is_zero();
      }
      Y y_of = y_from_first_row;
      auto* pixel = pixels.at(box.y.begin, first);
#pragma unroll 1
      for (int32_t row = box.y.begin; row < box.y.end; ++row, pixel += pixels.row_stride) {
        const AxisWeight<T> y = y_of(row);
        if (!y.is_zero()) body(pixel, y, x);
      }
    }
  }
};

template <typename scalar_t>
struct RoIs {
  using T = compute_t<scalar_t>;

  RoIGeometry geometry;
  const T* regions;  // [N, 5]
  const T* offset;   // [N, 2, P]; null if there is none

  C10_HOST_DEVICE int64_t bins() const { return geometry.rois * geometry.bins(); }
  C10_HOST_DEVICE Bin<T> bin(int64_t roi, int64_t index) const { return bin_of(geometry, regions, offset, roi, index); }

  template <uint32_t kBins, typename Threads>
  C10_HOST_DEVICE void locate_bins(const BinBlock& block, LocatedBins<T, kBins>& located,
                                   const Threads& threads) const {
    for (uint32_t i = threads.index(); i < block.count; i += threads.count()) {
      const int64_t index = block.first + i;
      const Bin<T> bin = this->bin(index / geometry.bins(), index % geometry.bins());
      const Box box = box_of(bin);
      located.bins[i] = bin, located.boxes[i] = box, located.counts[i] = box.y.size() + box.x.size();
      located.empty_sums[i] = bin.is_nan() ? static_cast<T>(NAN) : static_cast<T>(0);
    }
    threads.sync();
    for (uint32_t i = threads.index(); i <= block.count; i += threads.count()) {
      if (i < block.count) {
        located.firsts[i] = located.sum_of_counts(i);
      } else {
        located.all = located.united(block.count);
      }
    }
    threads.sync();
    constexpr uint32_t kShares = 16;  // threads that share a bin
    for (uint32_t j = threads.index(); j < block.count * kShares; j += threads.count()) {
      const uint32_t i = j / kShares, first = located.firsts[i], count = located.counts[i];
      const Bin<T>& bin = located.bins[i];
      const Box box = located.boxes[i];
      const uint32_t rows = box.y.size();
      for (uint32_t k = j % kShares; k < count && first + k < located.kWeights; k += kShares) {
        const AxisSamples<T>& axis = k < rows ? bin.y : bin.x;
        located.weights[first + k] = axis.at(k < rows ? box.y.begin + k : box.x.begin + k - rows);
      }
    }
    threads.sync();
  }
};

// Writes the gradient of a bin's offset.
template <typename T>
C10_HOST_DEVICE void write_offset_gradient(const RoIGeometry& g, const Bin<T>& bin, int64_t roi, int64_t index,
                                           T grad_y, T grad_x, T* grad_offset) {
  T* target = grad_offset + roi * 2 * g.bins() + index;
  target[0] = bin.is_nan() ? static_cast<T>(NAN) : bin.shift_x * grad_x;
  target[g.bins()] = bin.is_nan() ? static_cast<T>(NAN) : bin.shift_y * grad_y;
}

}  // namespace mmdcn
