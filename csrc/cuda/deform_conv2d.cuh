// SPDX-License-Identifier: Apache-2.0
// Note: [Deformable convolution on CUDA]
//
// As on the CPU, a deformable convolution is a sampling of NHWC pixels into columns and a matrix product with the
// weight, tile by tile of output positions, so that the columns of a tile fit the L2 cache and the workspace does not
// grow with the image or the batch. The positions of the whole batch are numbered (b * H_out + out_y) * W_out + out_x.
// The columns of a tile are [groups, positions, K, C_in/groups] in the type of the input, for tensor cores.
//
//   forward:   columns = samples;                            output       = columns x weight^T
//   backward:  columns = grad_output x weight;               grad_offset, grad_mask, grad_input from them; then
//              columns = samples, in the place of their gradient;  grad_weight += grad_output^T x columns
//
// A thread block works on all taps, if they are at most 9, of adjacent positions, for one offset group. Their samples
// share most of their pixels, which so come from the multiprocessor's own cache (benchmarks/gpu_floor.py counts them):
//
//   1. each of its first threads locates one sample, so that the offsets of adjacent positions are read together
//   2. then the lanes of a group, at most a warp, share a sample: they move over its channels in 16-byte vectors
//
// One group of lanes thus sees all channels that share an offset, so grad_offset and grad_mask need no atomics.
//
// grad_input sums up in the compute type. What the samples of a block add to one pixel, the block sums up first, and
// adds it to the image by atomics, whose order and so whose last bits change from run to run. If it is to be
// deterministic, the corners' contributions are written out instead, each with the row it belongs to (a pixel's
// channels of one offset group), and torch's sorting index_put_ adds them up in a fixed order.
//
// This file is what the threads of a block compute, for any number of them. It is C++ without CUDA, so that the host
// can run it too (tests/cuda_host).
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

#include "../core/bilinear.h"
#include "../core/conv_geometry.h"
#include "vector.cuh"

namespace mmdcn {

// A tensor [B, channels, H_out, W_out] of any strides.
template <typename T>
struct Planes {
  const T* data;  // null if there is no such tensor
  int64_t image_stride, channel_stride, y_stride, x_stride;

  C10_HOST_DEVICE T at(int64_t image, int64_t channel, int64_t out_y, int64_t out_x) const {
    return data[image * image_stride + channel * channel_stride + out_y * y_stride + out_x * x_stride];
  }
};

// `count` positions of the batch, the first of which is position `place` of an image.
struct Tile {
  int64_t image;
  uint32_t place, count;
};

struct Position {
  int64_t image;
  uint32_t place, out_y, out_x;
};

template <typename T>
struct Sample {
  BilinearCell<T> cell;  // in pixels of the batch
  T mask;
  uint32_t position, tap;  // position of the tile
};

// The samples of a thread block: some taps of one offset group at some positions of the tile.
struct Block {
  uint32_t offset_group, first_tap, taps, first_position, positions;

  C10_HOST_DEVICE uint32_t count() const { return taps * positions; }
};

constexpr uint32_t kBlockTaps = 9, kBlockSamples = 8 * kBlockTaps;

// The corners of a block's samples, grouped by their pixels. Corner c of sample i has the number 4 * i + c.
struct CornersByPixel {
  static constexpr uint32_t kCorners = 4 * kBlockSamples, kLogSlots = 9, kSlots = 1 << kLogSlots, kNone = ~0u;
  static_assert(kSlots > kCorners);

  uint32_t slots[kSlots];    // a hash table of the pixels: the first corner of each
  uint32_t first[kCorners];  // the same, without gaps
  uint32_t pixels;           // how many
  uint32_t next[kCorners];   // the next corner at the same pixel

  template <typename T, typename Threads>
  C10_HOST_DEVICE void fill(const Sample<T>* samples, uint32_t count, const Threads& threads) {
    for (uint32_t i = threads.index(); i < kSlots; i += threads.count()) {
      slots[i] = kNone;
    }
    for (uint32_t i = threads.index(); i < kCorners; i += threads.count()) {
      next[i] = kNone;
    }
    if (threads.index() == 0) pixels = 0;
    threads.sync();
    for (uint32_t i = threads.index(); i < 4 * count; i += threads.count()) {
      if (pixel(samples, i) != kOutside) insert(samples, i, threads);
    }
    threads.sync();
  }

  template <typename T>
  C10_HOST_DEVICE static int64_t pixel(const Sample<T>* samples, uint32_t corner) {
    return samples[corner / 4].cell.pixel[corner % 4];
  }

 private:
  template <typename T, typename Threads>
  C10_HOST_DEVICE void insert(const Sample<T>* samples, uint32_t corner, const Threads& threads) {
    const int64_t own = pixel(samples, corner);
    uint32_t slot = static_cast<uint32_t>(own) * 2654435769u >> (32 - kLogSlots);  // Fibonacci hashing
    while (true) {
      const uint32_t found = threads.compare_and_exchange(&slots[slot], kNone, corner);
      if (found == kNone) {
        first[threads.increment(&pixels)] = corner;
        return;
      }
      if (pixel(samples, found) == own) {
        next[corner] = threads.exchange(&next[found], corner);
        return;
      }
      slot = (slot + 1) % kSlots;
    }
  }
};

// Where a tile samples, and into which columns.
template <typename scalar_t>
struct Sampling {
  using T = compute_t<scalar_t>;

  static constexpr uint32_t kResident = 0;

  ConvGeometry geometry;
  uint32_t taps, positions, out_width, groups, group_channels, offset_groups, offset_group_channels;  // of geometry
  Planes<T> offset;       // [B, 2*G*K, H_out, W_out]
  Planes<T> mask;         // [B, G*K, H_out, W_out]
  const scalar_t* input;  // [B*H*W, C_in]
  int64_t pixel_stride;
  Tile tile;
  scalar_t* columns;  // [groups, tile.count, K, C_in/groups]

  C10_HOST_DEVICE uint32_t block_taps() const { return taps < kBlockTaps ? taps : kBlockTaps; }
  C10_HOST_DEVICE uint32_t block_positions() const { return kBlockSamples / block_taps(); }

  // Of one offset group at the same positions.
  C10_HOST_DEVICE uint32_t tap_blocks() const { return (taps + block_taps() - 1) / block_taps(); }

  C10_HOST_DEVICE uint32_t blocks() const {
    return (tile.count + block_positions() - 1) / block_positions() * offset_groups * tap_blocks();
  }

  C10_HOST_DEVICE Block block(uint32_t index) const {
    const uint32_t first_tap = index % tap_blocks() * block_taps(), rest_taps = taps - first_tap;
    const uint32_t offset_group = index / tap_blocks() % offset_groups;
    const uint32_t first = index / tap_blocks() / offset_groups * block_positions(), rest = tile.count - first;
    return {offset_group, first_tap, rest_taps < block_taps() ? rest_taps : block_taps(), first,
            rest < block_positions() ? rest : block_positions()};
  }

  // Position i of the tile.
  C10_HOST_DEVICE Position position(uint32_t i) const {
    const uint32_t place = (tile.place + i) % positions;
    return {tile.image + (tile.place + i) / positions, place, place / out_width, place % out_width};
  }

  // Sample i of the block.
  C10_HOST_DEVICE Sample<T> sample(const Block& block, uint32_t i) const {
    const uint32_t in_tile = block.first_position + i % block.positions, tap = block.first_tap + i / block.positions;
    const Position at = position(in_tile);
    const uint32_t channel = block.offset_group * taps + tap;
    const T y = static_cast<T>(geometry.regular_y(at.out_y, tap)) +
                offset.at(at.image, 2 * int64_t{channel}, at.out_y, at.out_x);
    const T x = static_cast<T>(geometry.regular_x(at.out_x, tap)) +
                offset.at(at.image, 2 * int64_t{channel} + 1, at.out_y, at.out_x);
    Sample<T> sample{locate(geometry.height, geometry.width, y, x), static_cast<T>(1), in_tile, tap};
    if (mask.data) sample.mask = mask.at(at.image, channel, at.out_y, at.out_x);
    const int64_t first_pixel = at.image * geometry.height * geometry.width;
    for (int64_t& pixel : sample.cell.pixel) {
      pixel += pixel == kOutside ? 0 : first_pixel;
    }
    return sample;
  }

  template <typename Threads>
  C10_HOST_DEVICE void locate_samples(const Block& block, Sample<T>* samples, const Threads& threads) const {
    for (uint32_t i = threads.index(); i < block.count(); i += threads.count()) {
      samples[i] = sample(block, i);
    }
    threads.sync();
  }

  C10_HOST_DEVICE scalar_t* column(const Sample<T>& sample, uint32_t channel) const {
    const uint32_t group = groups == 1 ? 0 : channel / group_channels;
    const int64_t row = int64_t{group} * tile.count + sample.position;
    return columns + (row * taps + sample.tap) * group_channels + (channel - group * group_channels);
  }
};

// The channels of a cell's corners; a corner outside the image is zero.
template <typename scalar_t, int kVector>
struct Corners {
  using T = compute_t<scalar_t>;

  Vector<scalar_t, kVector> values[4];

  C10_HOST_DEVICE Corners(const Sampling<scalar_t>& sampling, const BilinearCell<T>& cell, uint32_t channel)
      : values{} {
    for (int i = 0; i < 4; ++i) {
      if (cell.pixel[i] == kOutside) continue;
      values[i] = Vector<scalar_t, kVector>::at(sampling.input + cell.pixel[i] * sampling.pixel_stride + channel);
    }
  }

  C10_HOST_DEVICE Vector<scalar_t, kVector> blend(const T (&weight)[4]) const {
    Vector<scalar_t, kVector> blended;
    for (int c = 0; c < kVector; ++c) {
      blended.values[c] = static_cast<scalar_t>(weight[0] * values[0][c] + weight[1] * values[1][c] +
                                                weight[2] * values[2][c] + weight[3] * values[3][c]);
    }
    return blended;
  }
};

// Fills the columns.
template <typename scalar_t, int kVector>
struct SampleColumns : Sampling<scalar_t> {
  using typename Sampling<scalar_t>::T;

  struct Shared {
    Sample<T> samples[kBlockSamples];
  };

  C10_HOST_DEVICE uint32_t shares() const { return this->offset_group_channels / kVector; }

  template <typename Threads>
  C10_HOST_DEVICE void run(const Block& block, Shared& shared, const Threads& threads) const {
    this->locate_samples(block, shared.samples, threads);
    for (uint32_t i = threads.group; i < block.count(); i += threads.groups) {
      fill_columns(shared.samples[i], block, threads);
    }
  }

 private:
  template <typename Threads>
  C10_HOST_DEVICE void fill_columns(const Sample<T>& sample, const Block& block, const Threads& threads) const {
    T weight[4];
    sample.cell.weights(sample.mask, weight);
    for (uint32_t c = threads.lane * kVector; c < this->offset_group_channels; c += threads.lanes * kVector) {
      const uint32_t channel = block.offset_group * this->offset_group_channels + c;
      const Corners<scalar_t, kVector> corners(*this, sample.cell, channel);
      corners.blend(weight).store(this->column(sample, channel));
    }
  }
};

// Where the gradients go; null where one is not needed.
template <typename T>
struct SamplingGradients {
  T* input;   // [B*H*W, C_in]; atomically added to
  T* offset;  // [B, 2*G*K, H_out, W_out]
  T* mask;    // [B, G*K, H_out, W_out]
  bool weight;
  // In the place of `input`, if it is to be deterministic:
  T* contributions;  // [4, samples of the tile, C_in/G]
  int64_t* rows;     // [4, samples of the tile], pixel * G + offset group
};

// Uses the gradients of the columns, then puts the columns themselves in their place.
template <typename scalar_t, int kVector>
struct BackpropagateColumns : Sampling<scalar_t> {
  using typename Sampling<scalar_t>::T;

  struct Shared {
    Sample<T> samples[kBlockSamples];
    CornersByPixel corners;
  };

  SamplingGradients<T> gradients;

  C10_HOST_DEVICE uint32_t shares() const { return this->offset_group_channels / kVector; }

  template <typename Threads>
  C10_HOST_DEVICE void run(const Block& block, Shared& shared, const Threads& threads) const {
    this->locate_samples(block, shared.samples, threads);
    if (gradients.input) {
      add_to_input(block, shared, threads);
      threads.sync();  // the gradients of the columns have been read
    }
    for (uint32_t i = threads.group; i < block.count(); i += threads.groups) {
      replace_columns(shared.samples[i], block, threads);
    }
  }

 private:
  using Values = Vector<scalar_t, kVector>;

  template <typename Threads>
  C10_HOST_DEVICE void add_to_input(const Block& block, Shared& shared, const Threads& threads) const {
    shared.corners.fill(shared.samples, block.count(), threads);
    for (uint32_t i = threads.group; i < shared.corners.pixels; i += threads.groups) {
      const uint32_t first = shared.corners.first[i];
      const int64_t pixel = CornersByPixel::pixel(shared.samples, first);
      for (uint32_t c = threads.lane * kVector; c < this->offset_group_channels; c += threads.lanes * kVector) {
        const uint32_t channel = block.offset_group * this->offset_group_channels + c;
        T sum[kVector] = {};
        for (uint32_t corner = first; corner != CornersByPixel::kNone; corner = shared.corners.next[corner]) {
          const Sample<T>& sample = shared.samples[corner / 4];
          const Values grad = Values::at(this->column(sample, channel));
          const T weight = sample.cell.weight(corner % 4) * sample.mask;
          for (int v = 0; v < kVector; ++v) {
            sum[v] += weight * grad[v];
          }
        }
        threads.add(gradients.input + pixel * this->geometry.in_channels + channel, sum);
      }
    }
  }

  template <typename Threads>
  C10_HOST_DEVICE void replace_columns(const Sample<T>& sample, const Block& block, const Threads& threads) const {
    const bool needs_sampling = gradients.offset || gradients.mask;
    T weight[4], dot[4] = {0, 0, 0, 0};
    sample.cell.weights(sample.mask, weight);
    for (uint32_t c = threads.lane * kVector; c < this->offset_group_channels; c += threads.lanes * kVector) {
      const uint32_t channel = block.offset_group * this->offset_group_channels + c;
      scalar_t* column = this->column(sample, channel);
      const Values grad = Values::at(column);
      if (needs_sampling || gradients.weight) {
        const Corners<scalar_t, kVector> corners(*this, sample.cell, channel);
        if (needs_sampling) add_dots(corners, grad, dot);
        if (gradients.weight) corners.blend(weight).store(column);
      }
      if (gradients.contributions) write_contributions(sample, weight, grad, block, c);
    }
    if (gradients.contributions && threads.lane == 0) write_rows(sample, block);
    if (needs_sampling) write_sampling(sample, block, dot, threads);
  }

  C10_HOST_DEVICE static void add_dots(const Corners<scalar_t, kVector>& corners, const Values& grad, T (&dot)[4]) {
    for (int corner = 0; corner < 4; ++corner) {
      for (int c = 0; c < kVector; ++c) {
        dot[corner] += grad[c] * corners.values[corner][c];
      }
    }
  }

  // A corner outside has zeros.
  C10_HOST_DEVICE void write_contributions(const Sample<T>& sample, const T (&weight)[4], const Values& grad,
                                           const Block& block, uint32_t group_channel) const {
    for (int corner = 0; corner < 4; ++corner) {
      const bool outside = sample.cell.pixel[corner] == kOutside;
      T* row = gradients.contributions + contribution(corner, sample, block) * this->offset_group_channels;
      for (int c = 0; c < kVector; ++c) {
        row[group_channel + c] = outside ? 0 : weight[corner] * grad[c];
      }
    }
  }

  C10_HOST_DEVICE int64_t contribution(int corner, const Sample<T>& sample, const Block& block) const {
    const int64_t position = int64_t{corner} * this->tile.count + sample.position;
    return (position * this->offset_groups + block.offset_group) * this->taps + sample.tap;
  }

  // The zeros of corners outside are spread over all rows: rows are summed in parallel, their contributions one by one.
  C10_HOST_DEVICE void write_rows(const Sample<T>& sample, const Block& block) const {
    const ConvGeometry& g = this->geometry;
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t number = contribution(corner, sample, block), pixel = sample.cell.pixel[corner];
      gradients.rows[number] = pixel == kOutside ? number % (g.batch * g.height * g.width * g.offset_groups)
                                                 : pixel * g.offset_groups + block.offset_group;
    }
  }

  template <typename Threads>
  C10_HOST_DEVICE void write_sampling(const Sample<T>& sample, const Block& block, const T (&dot)[4],
                                      const Threads& threads) const {
    T weight[4];
    sample.cell.weights(1, weight);
    const T grad_y = sample.mask * threads.sum(sample.cell.derivative_y(dot));
    const T grad_x = sample.mask * threads.sum(sample.cell.derivative_x(dot));
    const T grad_mask = threads.sum(weight[0] * dot[0] + weight[1] * dot[1] + weight[2] * dot[2] + weight[3] * dot[3]);
    if (threads.lane != 0) return;
    const Position at = this->position(sample.position);
    const int64_t plane = (at.image * this->offset_groups + block.offset_group) * this->taps + sample.tap;
    if (gradients.offset) {
      gradients.offset[2 * plane * this->positions + at.place] = grad_y;
      gradients.offset[(2 * plane + 1) * this->positions + at.place] = grad_x;
    }
    if (gradients.mask) gradients.mask[plane * this->positions + at.place] = grad_mask;
  }
};

}  // namespace mmdcn
