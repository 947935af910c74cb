// SPDX-License-Identifier: Apache-2.0
// See Note [Deformable RoI pooling] for what a bin is.
//
// Note: [Deformable RoI pooling on CUDA]
//
// A thread block locates some bins and lists the weights of their rows and columns in shared memory, once for all of
// its channels. Then the lanes of a group share a bin: they move over channels, and each over all of the bin's pixels.
//
// Where channels are adjacent in memory and aligned (channels_last), a lane reads 16-byte vectors of them, and a block
// has a few bins. Elsewhere (NCHW) a block has the bins of one region, and copies the patch of pixels around them to
// shared memory, some channels at a time. Lanes are channels in either case, so no tensor is rearranged.
//
// The gradient of the input is gathered: a block owns a few pixels and goes over all bins that reach them, in their
// order. So each pixel is written once, and there are neither atomics nor a copy in a wider type.
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

constexpr uint32_t kBlockThreads = 256;  // at most

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
  // Without a branch, after which the other end would be loaded.
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

// The pixels that may have a weight; none if all samples are far beyond the image.
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

// One image, of which kVector channels are read: adjacent ones as a vector, if kAdjacent.
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
  Box all;                                      // of them
  T empty_sums[kBins];                          // NaN if the bin is no number
  uint32_t counts[kBins];                       // of weights
  uint32_t firsts[kBins];                       // of the weights of its rows, and then of its columns
  alignas(16) AxisWeight<T> weights[kWeights];  // what does not fit is computed where it is needed

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
    each_run(i, pixels, [&](const auto* first, const AxisWeight<T>& y, const Columns& x) {
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

  // Adds what the bin's gradient gives to those of its place.
  template <typename AllPixels, int kVector>
  C10_HOST_DEVICE void add_moves(uint32_t i, const AllPixels& pixels, const T (&grad)[kVector], T& move_y,
                                 T& move_x) const {
    each_run(i, pixels, [&](const auto* first, const AxisWeight<T>& y, const Columns& x) {
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
      move_y += y.slope * weighted, move_x += y.weight * sloped;
    });
  }

 private:
  static constexpr int32_t kColumns = 4;

  // Adjacent columns, some of which have a weight.
  struct Columns {
    AxisWeight<T> weights[kColumns];
    bool has[kColumns];
  };

  // Calls body(first pixel, weights of the row, columns) for each row of each kColumns columns of the bin, if it has a
  // weight. Columns are outside, so that their weights stay in registers.
  template <typename AllPixels, typename Body>
  C10_HOST_DEVICE void each_run(uint32_t i, const AllPixels& pixels, const Body& body) const {
    const Box box = boxes[i];
    const uint32_t first = firsts[i];
    if (first + counts[i] <= kWeights) {
      const AxisWeight<T>*y = weights + first, *x = y + box.y.size() - box.x.begin;
      each_run_of(box, [y](int32_t) mutable { return *y++; }, [x](int32_t column) { return x[column]; }, pixels, body);
    } else {
      each_run_of(
          box, [&](int32_t row) { return bins[i].y.at(row); }, [&](int32_t column) { return bins[i].x.at(column); },
          pixels, body);
    }
  }

  template <typename Y, typename X, typename AllPixels, typename Body>
  C10_HOST_DEVICE static void each_run_of(const Box& box, const Y& y_from_first_row, const X& x_of,
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
    constexpr uint32_t kShares = 16;  // of threads in a bin
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

// For images whose channels are adjacent.

template <typename scalar_t, int kVector>
struct OverVectors : RoIs<scalar_t> {
  using typename RoIs<scalar_t>::T;

  static constexpr uint32_t kResident = 2, kBlockBins = 8;

  using Shared = LocatedBins<T, kBlockBins>;

  ImageView<const scalar_t> input;

  C10_HOST_DEVICE uint32_t shares() const { return this->geometry.channels / kVector; }
  C10_HOST_DEVICE uint32_t blocks() const { return (this->bins() + kBlockBins - 1) / kBlockBins; }
  C10_HOST_DEVICE BinBlock block(uint32_t index) const {
    const int64_t first = int64_t{index} * kBlockBins, rest = this->bins() - first;
    return {first, rest < kBlockBins ? static_cast<uint32_t>(rest) : kBlockBins};
  }

  // Calls body(channel, pixels) for the lane's channels of a bin.
  template <typename Threads, typename Body>
  C10_HOST_DEVICE void each_vector(const Bin<T>& bin, const Threads& threads, const Body& body) const {
    for (int64_t c = threads.lane * kVector; c < this->geometry.channels; c += threads.lanes * kVector) {
      const scalar_t* image = input.at(bin.is_nan() ? 0 : bin.image, c, 0, 0);
      body(c, Pixels<scalar_t, kVector, true, int64_t>{image, 0, 0, input.row_stride, input.column_stride, 1});
    }
  }
};

template <typename scalar_t, int kVector>
struct PoolVectors : OverVectors<scalar_t, kVector> {
  using typename RoIs<scalar_t>::T;
  using typename OverVectors<scalar_t, kVector>::Shared;

  scalar_t* output;  // [N*P, C]

  template <typename Threads>
  C10_HOST_DEVICE void run(const BinBlock& block, Shared& shared, const Threads& threads) const {
    this->locate_bins(block, shared, threads);
    for (uint32_t i = threads.group; i < block.count; i += threads.groups) {
      this->each_vector(shared.bins[i], threads, [&](int64_t channel, const auto& pixels) {
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

// Writes the gradient of a bin's offset.
template <typename T>
C10_HOST_DEVICE void write_moves(const RoIGeometry& g, const Bin<T>& bin, int64_t roi, int64_t index, T move_y,
                                 T move_x, T* grad_offset) {
  T* target = grad_offset + roi * 2 * g.bins() + index;
  target[0] = bin.is_nan() ? static_cast<T>(NAN) : bin.shift_x * move_x;
  target[g.bins()] = bin.is_nan() ? static_cast<T>(NAN) : bin.shift_y * move_y;
}

template <typename scalar_t, int kVector>
struct MoveVectors : OverVectors<scalar_t, kVector> {
  using typename RoIs<scalar_t>::T;
  using typename OverVectors<scalar_t, kVector>::Shared;

  BinView<const scalar_t> grad_output;
  T* grad_offset;  // [N, 2, P]

  template <typename Threads>
  C10_HOST_DEVICE void run(const BinBlock& block, Shared& shared, const Threads& threads) const {
    this->locate_bins(block, shared, threads);
    const int64_t bins = this->geometry.bins();
    for (uint32_t i = threads.group; i < block.count; i += threads.groups) {
      const int64_t roi = (block.first + i) / bins, index = (block.first + i) % bins;
      T move_y = 0, move_x = 0;
      this->each_vector(shared.bins[i], threads, [&](int64_t channel, const auto& pixels) {
        T grad[kVector];
        for (int c = 0; c < kVector; ++c) {
          grad[c] = static_cast<T>(*grad_output.at(roi, channel + c, index));
        }
        shared.add_moves(i, pixels, grad, move_y, move_x);
      });
      move_y = threads.sum(move_y), move_x = threads.sum(move_x);
      if (threads.lane == 0) write_moves(this->geometry, shared.bins[i], roi, index, move_y, move_x, grad_offset);
    }
  }
};

// For images of any strides.

// Some channels of some bins of a region.
struct PatchBlock : BinBlock {
  int64_t roi, first_channel, end_channel, channel_block;
};

// The pixels around the bins of a block, in shared memory: [channels, pixels].
struct Patch {
  Box box;
  uint32_t channel_stride;
  int32_t log_channels;  // of as many as fit; -1 if not even one does
};

constexpr uint32_t kPatchBins = 49;       // 7 x 7, as most have it; odd, so that channels are in different banks
constexpr int32_t kLogPatchChannels = 4;  // of those at a time, at most
constexpr uint32_t kPatchChannels = 1 << kLogPatchChannels;
constexpr int64_t kBlockChannels = 32;  // of a block
constexpr uint32_t kSharedBytes = 48 << 10;

// Ours are what a body keeps for each bin and channel that it has at a time.
template <typename scalar_t, int kLaneChannels>
struct PatchShared {
  using T = compute_t<scalar_t>;

  LocatedBins<T, kPatchBins> located;
  T own[kLaneChannels][kPatchChannels][kPatchBins];

  static constexpr uint32_t kUsed =
      sizeof(LocatedBins<T, kPatchBins>) + sizeof(T) * kLaneChannels * kPatchChannels * kPatchBins + 16;
  static constexpr uint32_t kValues = (kSharedBytes - kUsed) / sizeof(scalar_t);

  scalar_t values[kValues];
};

// A bin, and two channels of a patch that are worth one look at its weights. Without a second one the first is read
// twice.
struct Two {
  uint32_t bin, first, second;
  bool has_second;
};

template <typename scalar_t, int kLaneChannels>
struct OverPatches : RoIs<scalar_t> {
  using typename RoIs<scalar_t>::T;
  using Shared = PatchShared<scalar_t, kLaneChannels>;

  static constexpr uint32_t kResident = sizeof(T) == 4 ? 4 : 1;

  ImageView<const scalar_t> input;

  C10_HOST_DEVICE uint32_t shares() const { return 32; }
  C10_HOST_DEVICE int64_t parts() const { return (this->geometry.bins() + kPatchBins - 1) / kPatchBins; }
  C10_HOST_DEVICE int64_t channel_blocks() const {
    return (this->geometry.channels + kBlockChannels - 1) / kBlockChannels;
  }
  C10_HOST_DEVICE uint32_t blocks() const { return this->geometry.rois * parts() * channel_blocks(); }

  // All regions of some channels come first: what they share of the image stays in the cache.
  C10_HOST_DEVICE PatchBlock block(uint32_t index) const {
    const uint32_t parts = this->parts(), parts_of_all = this->geometry.rois * parts;
    const uint32_t channel_block = index / parts_of_all, part_of_all = index % parts_of_all;
    const uint32_t roi = part_of_all / parts, part = part_of_all % parts;
    const uint32_t bins = this->geometry.bins(), of_part = (bins + parts - 1) / parts;
    const uint32_t first = part * of_part, rest = bins - first;
    const int64_t first_channel = channel_block * kBlockChannels, end = first_channel + kBlockChannels;
    PatchBlock block;
    block.first = first, block.count = first < bins ? (rest < of_part ? rest : of_part) : 0;
    block.roi = roi, block.channel_block = channel_block, block.first_channel = first_channel;
    block.end_channel = end < this->geometry.channels ? end : this->geometry.channels;
    return block;
  }

  // Calls body(two, first channel, pixels) for each bin and two of the channels from the first on; a thread has the
  // same bins and channels each time. Whenever some channels are done, calls done(first of these channels, how many).
  template <typename Threads, typename Body, typename Done>
  C10_HOST_DEVICE void each_channel(const PatchBlock& block, Shared& shared, const Threads& threads, const Body& body,
                                    const Done& done) const {
    this->locate_bins({block.roi * this->geometry.bins() + block.first, block.count}, shared.located, threads);
    const Patch patch = patch_of(shared.located.all);
    const Box& box = patch.box;
    const bool fits = patch.log_channels >= 0;
    const int64_t image = shared.located.bins[0].image < 0 ? 0 : shared.located.bins[0].image;
    const uint32_t log_channels = fits ? patch.log_channels : kLogPatchChannels, channels = 1 << log_channels;
    const uint32_t log_lanes = log_channels > 0 ? log_channels - 1 : 0, lanes = 1 << log_lanes;
    for (int64_t first = block.first_channel; first < block.end_channel; first += channels) {
      const int64_t rest = block.end_channel - first;
      const uint32_t count = rest < channels ? rest : channels;
      if (fits) copy(patch, input.at(image, first, box.y.begin, box.x.begin), count, shared.values, threads);
      threads.sync();
      for (uint32_t j = threads.index(); j < block.count << log_lanes; j += threads.count()) {
        const uint32_t i = j >> log_lanes, lane = j & (lanes - 1);
        if (lane >= count) continue;
        const bool has_second = lanes < channels && lane + lanes < count;
        const Two two = {i, lane, lane + lanes, has_second};
        if (fits) {
          const scalar_t* values = shared.values + lane * patch.channel_stride;
          const int32_t to_second = has_second ? lanes * patch.channel_stride : 0;
          body(two, first,
               Pixels<scalar_t, 2, false, int32_t>{values, box.y.begin, box.x.begin, box.x.size(), 1, to_second});
        } else {
          const int64_t to_second = has_second ? lanes * input.channel_stride : 0;
          body(two, first,
               Pixels<scalar_t, 2, false, int64_t>{input.at(image, first + lane, 0, 0), 0, 0, input.row_stride,
                                                   input.column_stride, to_second});
        }
      }
      threads.sync();
      done(first, count);
    }
  }

 private:
  C10_HOST_DEVICE static Patch patch_of(const Box& box) {
    // An odd number of words, so that the channels of a pixel are in different banks.
    constexpr uint32_t kInWord = sizeof(scalar_t) < 4 ? 4 / sizeof(scalar_t) : 1;
    const int64_t pixels = int64_t{box.y.size()} * box.x.size();
    const int64_t stride = ((pixels + kInWord - 1) / kInWord | 1) * kInWord;
    int32_t log_channels = kLogPatchChannels;
    while (log_channels >= 0 && stride << log_channels > Shared::kValues) {
      --log_channels;
    }
    return {box, static_cast<uint32_t>(stride), log_channels};
  }

  // Copies channels from the patch's first pixel on.
  template <typename Threads>
  C10_HOST_DEVICE void copy(const Patch& patch, const scalar_t* first_pixel, uint32_t channels, scalar_t* values,
                            const Threads& threads) const {
    constexpr uint32_t kAtATime = 8;  // so that they wait for memory together
    const uint32_t width = patch.box.x.size(), pixels = patch.box.y.size() * width;
    for (uint32_t pixel = threads.index(); pixel < pixels; pixel += threads.count()) {
      const uint32_t row = pixel / width, column = pixel - row * width;
      const scalar_t* source = first_pixel + row * input.row_stride + column * input.column_stride;
      scalar_t* target = values + pixel;
      for (uint32_t first = 0; first < channels; first += kAtATime) {
        scalar_t loaded[kAtATime];
        for (uint32_t k = 0; k < kAtATime; ++k, source += input.channel_stride) {
          if (first + k < channels) loaded[k] = *source;
        }
        for (uint32_t k = 0; k < kAtATime; ++k, target += patch.channel_stride) {
          if (first + k < channels) *target = loaded[k];
        }
      }
    }
  }
};

template <typename scalar_t>
struct PoolPatches : OverPatches<scalar_t, 1> {
  using typename RoIs<scalar_t>::T;
  using typename OverPatches<scalar_t, 1>::Shared;

  BinView<scalar_t> output;

  template <typename Threads>
  C10_HOST_DEVICE void run(const PatchBlock& block, Shared& shared, const Threads& threads) const {
    this->each_channel(
        block, shared, threads,
        [&](const Two& two, int64_t, const auto& pixels) {
          T sum[2];
          shared.located.pool(two.bin, pixels, sum);
          shared.own[0][two.first][two.bin] = sum[0];
          if (two.has_second) shared.own[0][two.second][two.bin] = sum[1];
        },
        [&](int64_t first, uint32_t count) {
          for (uint32_t c = threads.group; c < count; c += threads.groups) {
            for (uint32_t i = threads.lane; i < block.count; i += threads.lanes) {
              *output.at(block.roi, first + c, block.first + i) = static_cast<scalar_t>(shared.own[0][c][i]);
            }
          }
        });
  }
};

template <typename scalar_t>
struct MovePatches : OverPatches<scalar_t, 2> {
  using typename RoIs<scalar_t>::T;
  using typename OverPatches<scalar_t, 2>::Shared;

  BinView<const scalar_t> grad_output;
  T* parts_of_grad_offset;  // [blocks of channels, N, 2, P]

  template <typename Threads>
  C10_HOST_DEVICE void run(const PatchBlock& block, Shared& shared, const Threads& threads) const {
    auto &move_y = shared.own[0], &move_x = shared.own[1];
    for (uint32_t j = threads.index(); j < kPatchChannels * kPatchBins; j += threads.count()) {
      move_y[j / kPatchBins][j % kPatchBins] = 0, move_x[j / kPatchBins][j % kPatchBins] = 0;
    }
    this->each_channel(
        block, shared, threads,
        [&](const Two& two, int64_t first, const auto& pixels) {
          const scalar_t* grads = grad_output.at(block.roi, first, block.first + two.bin);
          T grad[2] = {static_cast<T>(grads[two.first * grad_output.channel_stride]), 0};
          if (two.has_second) grad[1] = static_cast<T>(grads[two.second * grad_output.channel_stride]);
          T &y = move_y[two.first][two.bin], &x = move_x[two.first][two.bin], sum_y = y, sum_x = x;
          shared.located.add_moves(two.bin, pixels, grad, sum_y, sum_x);
          y = sum_y, x = sum_x;
        },
        [](int64_t, uint32_t) {});
    T* part = parts_of_grad_offset + block.channel_block * 2 * this->bins();
    for (uint32_t i = threads.index(); i < block.count; i += threads.count()) {
      T y = 0, x = 0;
      for (uint32_t lane = 0; lane < kPatchChannels; ++lane) {
        y += move_y[lane][i], x += move_x[lane][i];
      }
      write_moves(this->geometry, shared.located.bins[i], block.roi, block.first + i, y, x, part);
    }
  }
};

// The sum of the parts that MovePatches leaves.
template <typename T>
struct AddParts {
  static constexpr uint32_t kResident = 0;

  struct Shared {};

  const T* parts;  // [count, size]
  T* sum;          // [size]
  int64_t count, size;

  C10_HOST_DEVICE uint32_t shares() const { return 32; }
  C10_HOST_DEVICE uint32_t blocks() const { return (size + kBlockThreads - 1) / kBlockThreads; }
  C10_HOST_DEVICE int64_t block(uint32_t index) const { return int64_t{index} * kBlockThreads; }

  template <typename Threads>
  C10_HOST_DEVICE void run(int64_t first, Shared&, const Threads& threads) const {
    const int64_t end = first + kBlockThreads < size ? first + kBlockThreads : size;
    for (int64_t i = first + threads.index(); i < end; i += threads.count()) {
      T total = 0;
      for (int64_t part = 0; part < count; ++part) {
        total += parts[part * size + i];
      }
      sum[i] = total;
    }
  }
};

// The gradient of the input.

// What LocateRegions leaves of each region and bin.
template <typename T>
struct Located {
  Box* boxes;    // [N*P], of bins
  Box* regions;  // [N]
  Bin<T>* bins;  // [N*P]

  Located(void* memory, int64_t rois, int64_t count)
      : boxes(static_cast<Box*>(memory)), regions(boxes + count), bins(reinterpret_cast<Bin<T>*>(regions + rois)) {}

  static int64_t bytes(int64_t rois, int64_t count) { return (rois + count) * sizeof(Box) + count * sizeof(Bin<T>); }
};

template <typename scalar_t>
struct LocateRegions : RoIs<scalar_t> {
  using typename RoIs<scalar_t>::T;

  static constexpr uint32_t kResident = 0, kRegions = 8, kLanes = 32;

  struct Shared {
    Box boxes[kRegions][kLanes];
  };

  Located<T> located;

  C10_HOST_DEVICE uint32_t shares() const { return kLanes; }
  C10_HOST_DEVICE uint32_t blocks() const { return (this->geometry.rois + kRegions - 1) / kRegions; }
  C10_HOST_DEVICE int64_t block(uint32_t index) const { return int64_t{index} * kRegions; }

  template <typename Threads>
  C10_HOST_DEVICE void run(int64_t first, Shared& shared, const Threads& threads) const {
    const int64_t rest = this->geometry.rois - first, count = rest < kRegions ? rest : kRegions;
    const int64_t bins = this->geometry.bins();
    for (int64_t i = threads.group; i < count; i += threads.groups) {
      Box all = {};
      for (int64_t index = threads.lane; index < bins; index += kLanes) {
        const Bin<T> bin = this->bin(first + i, index);
        const Box box = box_of(bin);
        located.bins[(first + i) * bins + index] = bin, located.boxes[(first + i) * bins + index] = box;
        all.unite(box);
      }
      shared.boxes[i][threads.lane] = all;
    }
    threads.sync();
    for (int64_t i = threads.index(); i < count; i += threads.count()) {
      Box all = {};
      for (const Box& of_lane : shared.boxes[i]) {
        all.unite(of_lane);
      }
      located.regions[first + i] = all;
    }
  }
};

// Some pixels of an image, and some of its channels.
struct TileBlock {
  int32_t image, row, column, first_channel;
};

template <typename scalar_t, int kVector>
struct GatherGradient {
  using T = compute_t<scalar_t>;

  static constexpr uint32_t kResident = sizeof(T) == 4 ? 3 : 1;
  static constexpr uint32_t kRows = 4, kColumns = 8, kLanes = kRows * kColumns;
  static constexpr uint32_t kLaneChannels = 32;  // channels of a thread
  static constexpr uint32_t kGradients = 2;      // of the output, at a time; more would spill registers
  static constexpr uint32_t kGroups = kBlockThreads / kLanes;

  struct Shared {
    uint32_t votes[kGroups];
    uint32_t rois[kBlockThreads];
    uint32_t bins[kBlockThreads];   // index of each bin among those of all regions
    int64_t starts[kBlockThreads];  // of its gradients
    T rows[kBlockThreads][kRows], columns[kBlockThreads][kColumns];
    alignas(kVectorBytes) T grads[kGroups][kGradients][kLaneChannels];
  };

  RoIGeometry geometry;
  BinView<const scalar_t> grad_output;
  Located<T> located;
  ImageView<scalar_t> grad_input;

  C10_HOST_DEVICE uint32_t shares() const { return kLanes; }
  C10_HOST_DEVICE uint32_t tile_rows() const { return (geometry.height + kRows - 1) / kRows; }
  C10_HOST_DEVICE uint32_t tile_columns() const { return (geometry.width + kColumns - 1) / kColumns; }
  C10_HOST_DEVICE uint32_t channel_blocks() const {
    return (geometry.channels + kLaneChannels * kGroups - 1) / (kLaneChannels * kGroups);
  }
  C10_HOST_DEVICE uint32_t blocks() const { return geometry.batch * tile_rows() * tile_columns() * channel_blocks(); }
  C10_HOST_DEVICE TileBlock block(uint32_t index) const {
    const uint32_t rows = tile_rows(), columns = tile_columns(), column = index % columns;
    const uint32_t row = index / columns % rows, image_and_block = index / columns / rows;
    const uint32_t batch = geometry.batch, channel_block = image_and_block / batch;
    return {static_cast<int32_t>(image_and_block % batch), static_cast<int32_t>(row * kRows),
            static_cast<int32_t>(column * kColumns), static_cast<int32_t>(channel_block * kLaneChannels * kGroups)};
  }

  template <typename Threads>
  C10_HOST_DEVICE void run(const TileBlock& tile, Shared& shared, const Threads& threads) const {
    for (uint32_t first_group = 0; first_group < kGroups; first_group += threads.groups) {
      const uint32_t group = first_group + threads.group;
      const int32_t channel = group < kGroups ? tile.first_channel + group * kLaneChannels : geometry.channels;
      T sum[kLaneChannels] = {};
      const uint32_t rois = geometry.rois;
      for (uint32_t roi = 0; roi < rois; roi += threads.count()) {
        const uint32_t candidates = choose_rois(tile, roi, shared, threads) * static_cast<uint32_t>(geometry.bins());
        for (uint32_t candidate = 0; candidate < candidates; candidate += threads.count()) {
          const uint32_t bins = choose_bins(tile, candidate, candidates, shared, threads);
          if (channel < geometry.channels) add(bins, channel, sum, shared, threads);
        }
      }
      if (channel < geometry.channels) write(tile, channel, sum, threads);
    }
  }

 private:
  struct Rank {
    uint32_t own, all;
  };

  // How many threads before this one are chosen, and how many there are.
  template <typename Threads>
  C10_HOST_DEVICE static Rank rank(bool chosen, Shared& shared, const Threads& threads) {
    const uint32_t vote = threads.ballot(chosen);
    if (threads.lane == 0) shared.votes[threads.group] = vote;
    threads.sync();
    Rank rank = {bits_set(vote & ((1u << threads.lane) - 1)), 0};
    for (uint32_t group = 0; group < threads.groups; ++group) {
      const uint32_t count = bits_set(shared.votes[group]);
      rank.own += group < threads.group ? count : 0, rank.all += count;
    }
    return rank;
  }

  // Chooses from as many regions as there are threads, in their order, those that reach the tile.
  template <typename Threads>
  C10_HOST_DEVICE uint32_t choose_rois(const TileBlock& tile, uint32_t first, Shared& shared,
                                       const Threads& threads) const {
    const uint32_t roi = first + threads.index();
    const bool chosen = roi < geometry.rois && reaches_tile(located.regions[roi], tile) &&
                        located.bins[roi * geometry.bins()].image == tile.image;
    const Rank rank = this->rank(chosen, shared, threads);
    if (chosen) shared.rois[rank.own] = roi;
    threads.sync();
    return rank.all;
  }

  // Likewise from the bins of these regions, and lists the weights that they have in the tile.
  template <typename Threads>
  C10_HOST_DEVICE uint32_t choose_bins(const TileBlock& tile, uint32_t first, uint32_t end, Shared& shared,
                                       const Threads& threads) const {
    const uint32_t candidate = first + threads.index(), bins = geometry.bins();
    const bool exists = candidate < end;
    const uint32_t roi = exists ? shared.rois[candidate / bins] : 0, index = candidate % bins;
    const bool chosen = exists && reaches_tile(located.boxes[roi * bins + index], tile);
    const Rank rank = this->rank(chosen, shared, threads);
    if (chosen) {
      shared.bins[rank.own] = roi * bins + index;
      shared.starts[rank.own] = roi * grad_output.roi_stride + index * grad_output.bin_stride;
    }
    threads.sync();
    constexpr uint32_t kShares = 16;  // of threads in a bin; some have nothing to do
#pragma unroll 1                      // or the sums would be spilled
    for (uint32_t j = threads.index(); j < rank.all * kShares; j += threads.count()) {
      const uint32_t i = j / kShares, k = j % kShares;
      if (k >= kRows + kColumns) continue;
      const Bin<T>& bin = located.bins[shared.bins[i]];
      const AxisSamples<T>& axis = k < kRows ? bin.y : bin.x;
      T& weight = k < kRows ? shared.rows[i][k] : shared.columns[i][k - kRows];
      weight = axis.at(k < kRows ? tile.row + k : tile.column + k - kRows).weight;
    }
    threads.sync();
    return rank.all;
  }

  C10_HOST_DEVICE static bool reaches_tile(const Box& box, const TileBlock& tile) {
    return box.y.reaches(tile.row, kRows) & box.x.reaches(tile.column, kColumns);
  }

  template <typename Threads>
  C10_HOST_DEVICE void add(uint32_t bins, int32_t channel, T (&sum)[kLaneChannels], Shared& shared,
                           const Threads& threads) const {
    const bool has_channel = channel + threads.lane < geometry.channels;
    const scalar_t* own = grad_output.at(0, has_channel ? channel + threads.lane : channel, 0);
    auto& grads = shared.grads[threads.group];
    const uint32_t row = threads.lane / kColumns, column = threads.lane % kColumns;
    for (uint32_t first = 0; first < bins; first += kGradients) {
      const uint32_t count = bins - first < kGradients ? bins - first : kGradients;
      scalar_t loaded[kGradients];  // so that they wait for memory together
      for (uint32_t i = 0; i < kGradients; ++i) {
        if (i < count) loaded[i] = own[shared.starts[first + i]];
      }
      for (uint32_t i = 0; i < kGradients; ++i) {
        if (i < count) grads[i][threads.lane] = static_cast<T>(loaded[i]);
      }
      threads.sync_group();
      for (uint32_t i = 0; i < count; ++i) {
        const T weight = shared.rows[first + i][row] * shared.columns[first + i][column];
        if (weight == 0) continue;
        for (uint32_t c = 0; c < kLaneChannels; ++c) {
          sum[c] += weight * grads[i][c];
        }
      }
      threads.sync_group();
    }
  }

  template <typename Threads>
  C10_HOST_DEVICE void write(const TileBlock& tile, int32_t channel, const T (&sum)[kLaneChannels],
                             const Threads& threads) const {
    const int32_t row = tile.row + threads.lane / kColumns, column = tile.column + threads.lane % kColumns;
    if (row >= geometry.height || column >= geometry.width) return;
    scalar_t* target = grad_input.at(tile.image, channel, row, column);
    for (uint32_t c = 0; c < kLaneChannels; c += kVector) {
      if (channel + static_cast<int32_t>(c) >= geometry.channels) return;
      Vector<scalar_t, kVector> rounded;
      for (int i = 0; i < kVector; ++i) {
        rounded.values[i] = static_cast<scalar_t>(sum[c + i]);
      }
      rounded.store(target);
      target += kVector * grad_input.channel_stride;
    }
  }
};

}  // namespace mmdcn
