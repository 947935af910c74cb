// SPDX-License-Identifier: Apache-2.0
// Note: [Deformable convolution on CUDA]
//
// As on the CPU, a deformable convolution samples NHWC pixels into columns and multiplies them by the weight, one tile
// of output positions at a time, so the workspace does not grow with the image or the batch. Positions are numbered
// over the batch: (b * H_out + out_y) * W_out + out_x. The columns of a tile are [groups, positions, K, C_in/groups] in
// the input's type, for tensor cores.
//
//   forward:   columns = samples;                            output       = columns x weight^T
//   backward:  columns = grad_output x weight;               grad_input, grad_offset, grad_mask from them; then
//              columns = samples, overwriting their gradient;  grad_weight += grad_output^T x columns
//
// So in half types the gradients of input, offset and mask are computed from column gradients rounded to that type. A
// sample that lies entirely outside its image has no gradient, whatever its column's gradient is.
//
// The kernels are bound by the instructions per sample, so nothing is computed twice: a warp processes one tap of one
// offset group for a patch of at most 32 positions (deform_conv2d_columns.cuh).
//
//   1. each lane locates one sample, so the offsets of adjacent positions are read together, and shares with the warp
//      the addresses of its four pixels, as 32-bit vector indices, and their weights, mask included
//   2. then groups of lanes iterate over the samples, each lane over channels in 16-byte vectors
//
// A patch is 8 positions wide and up to 4 high: adjacent samples share most of their pixels, which are then read from
// the L1 cache. One group of lanes sees all channels that share an offset, so grad_offset and grad_mask need no
// atomics.
//
// New, and off until it has run on a GPU: one kernel computes all three gradients of a block's samples
// (deform_conv2d_backpropagate.cuh).
//
// grad_input is summed in the compute type. Each block first sums its samples' contributions to a pixel in a fixed
// order, then adds them to the image with atomics. Their order, and so the last bits, change from run to run. In
// deterministic mode the corners of the tile are sorted by pixel instead (deform_conv2d_input.cuh).
//
// Quantities of 32 bits are wide enough for every call for which `fits` is true (deform_conv2d_launch.cuh).
//
// This file and the others contain what the threads of a block compute. They are C++ without CUDA, so the host can
// run them too (tests/cuda_host).
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <bit>
#include <cstdint>

#include "../core/bilinear.h"
#include "device.cuh"
#include "planes.cuh"
#include "vector.cuh"

namespace mmdcn {

// Computes n / divisor, for n < 2^31, with a multiplication.
struct Division {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Division() = default;
  explicit Division(uint32_t by) : divisor(by), shift(std::bit_width(by - 1)) {
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - by) << 32) / by + 1);
  }

  C10_DEVICE uint32_t operator()(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t{n} * multiplier >> 32) + n) >> shift;
  }
};

struct Divided {
  uint32_t quotient, rest;
};

C10_DEVICE inline Divided divide(uint32_t n, const Division& by) {
  const uint32_t quotient = by(n);
  return {quotient, n - quotient * by.divisor};
}

// A sample at a position of the tile, if `valid`.
template <typename T>
struct Point : Cell<T, int32_t> {
  bool valid;
  uint32_t image, place, position;  // `place` is the position in the image
  T mask;
};

// Some positions of the batch, and their sampling locations. A vector is kVector channels.
template <typename scalar_t, int kVector>
struct Tile {
  using T = compute_t<scalar_t>;
  using V = Vector<scalar_t, kVector>;

  const V* input;          // [B*H*W] pixels
  uint32_t pixel_vectors;  // stride between pixels, in vectors
  int32_t height, width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  uint32_t groups, group_vectors, offset_group_vectors, in_channels;
  Division kernel_width, taps, offset_groups, positions, out_width, vectors_of_group;
  Planes<T> offset;       // [B, 2*G*K, H_out, W_out]
  Planes<T> mask;         // [B, G*K, H_out, W_out]
  uint32_t first, count;  // positions of the batch
  // The positions as a grid, and its patches.
  uint32_t grid_width, grid_rows, patch_log_width, patch_rows, patches;
  Division patch_columns;
  V* columns;  // [groups, count, K, C_in/groups]

  // The start of the columns of a vector of channels.
  C10_DEVICE uint32_t first_column(uint32_t vector) const {
    if (groups == 1) return vector;
    return vectors_of_group(vector) * (count * taps.divisor - 1) * group_vectors + vector;
  }

  // The offset of a position and tap from there.
  C10_DEVICE uint32_t column(uint32_t position, uint32_t tap) const {
    return (position * taps.divisor + tap) * group_vectors;
  }

  C10_DEVICE Point<T> locate(uint32_t patch, uint32_t member, uint32_t offset_group, uint32_t tap) const {
    Point<T> point{};
    const Divided in_grid = divide(patch, patch_columns);
    const uint32_t row = member >> patch_log_width, column = member - (row << patch_log_width);
    const uint32_t grid_y = in_grid.quotient * patch_rows + row, grid_x = (in_grid.rest << patch_log_width) + column;
    if (row >= patch_rows || grid_y >= grid_rows || grid_x >= grid_width) return point;
    const uint32_t position = grid_y * grid_width + grid_x;
    const Divided in_batch = divide(first + position, positions), out = divide(in_batch.rest, out_width);
    const Divided in_kernel = divide(tap, kernel_width);
    const uint32_t image = in_batch.quotient, out_y = out.quotient, out_x = out.rest;
    const uint32_t channel = offset_group * taps.divisor + tap;
    const T* const own_offset = offset.at(image, 2 * channel, out_y, out_x);
    const T y = static_cast<T>(regular(out_y, stride_y, padding_y, in_kernel.quotient, dilation_y)) + load(own_offset);
    const T x = static_cast<T>(regular(out_x, stride_x, padding_x, in_kernel.rest, dilation_x)) +
                load(own_offset + offset.channel_stride);
    const T own_mask = mask.data ? load(mask.at(image, channel, out_y, out_x)) : static_cast<T>(1);
    return {cell_of(height, width, y, x), true, image, in_batch.rest, position, own_mask};
  }

  // The pixel (y, x) of the point's image.
  C10_DEVICE uint32_t pixel(const Point<T>& point, int32_t y, int32_t x) const {
    return (point.image * height + y) * width + x;
  }

 private:
  // Where a tap would sample without an offset.
  C10_DEVICE static int32_t regular(uint32_t out, int32_t stride, int32_t padding, uint32_t tap, int32_t dilation) {
    return static_cast<int32_t>(out) * stride - padding + static_cast<int32_t>(tap) * dilation;
  }
};

// Whether each corner of a point's cell is inside the image.
template <typename T>
C10_DEVICE void corners_inside(const Point<T>& point, bool (&inside)[4]) {
  inside[0] = point.has_top && point.has_left;
  inside[1] = point.has_top && point.has_right;
  inside[2] = point.has_bottom && point.has_left;
  inside[3] = point.has_bottom && point.has_right;
}

}  // namespace mmdcn
