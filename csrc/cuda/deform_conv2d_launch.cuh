// SPDX-License-Identifier: Apache-2.0
// Launches of the kernels for the tiles of a call. See Note [Deformable convolution on CUDA].
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "../core/conv_geometry.h"
#include "deform_conv2d_backpropagate.cuh"
#include "deform_conv2d_columns.cuh"
#include "deform_conv2d_input.cuh"
#include "device.cuh"
#include "new_kernels.h"

namespace mmdcn {

// A call and one of its tiles.
template <typename scalar_t>
struct Sampling {
  using T = compute_t<scalar_t>;

  ConvGeometry geometry;
  Planes<T> offset;       // [B, 2*G*K, H_out, W_out]
  Planes<T> mask;         // [B, G*K, H_out, W_out]
  const scalar_t* input;  // [B*H*W, C_in]
  int64_t pixel_stride;
  scalar_t* columns;     // [groups, count, K, C_in/groups], dense, at a multiple of kVectorBytes
  int64_t first, count;  // positions of the batch
  int32_t device;
};

// Whether 32 bits suffice for all numbers that the kernels hold in 32 bits, for this number of images and tiles of this
// many positions. Fewer of either may fit, unless a single image has too many pixels.
inline bool fits(const ConvGeometry& g, int64_t pixel_stride, int64_t tile_positions) {
  constexpr double kSigned = int64_t{1} << 31, kUnsigned = 2 * kSigned, kCoordinate = kSigned / 2;
  const auto product = [](auto... factors) { return (static_cast<double>(factors) * ...); };  // cannot overflow
  const auto farthest = [&](int64_t out, int64_t stride, int64_t kernel, int64_t dilation) {
    return product(out - 1, stride) + product(kernel - 1, dilation);
  };
  return product(g.batch, g.height, g.width, pixel_stride) < kUnsigned &&
         product(g.batch, g.height, g.width, g.offset_groups) < kSigned &&
         product(g.batch, g.out_height, g.out_width) < kSigned &&
         product(tile_positions, g.taps(), g.in_channels) < kUnsigned &&
         product(tile_positions, g.samples_per_position(), 4) < kSigned &&  // the corners
         std::max(g.padding_y, g.padding_x) < kCoordinate &&
         farthest(g.out_height, g.stride_y, g.kernel_height, g.dilation_y) < kCoordinate &&
         farthest(g.out_width, g.stride_x, g.kernel_width, g.dilation_x) < kCoordinate;
}

namespace launching {

constexpr int64_t kPatchWidth = 8;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every vector of channels is aligned and lies within one group.
template <typename scalar_t>
bool is_vectorized(const Sampling<scalar_t>& s) {
  constexpr int kVector = kMaxVector<scalar_t>;
  return s.geometry.group_in_channels() % kVector == 0 && s.geometry.offset_group_channels() % kVector == 0 &&
         s.pixel_stride % kVector == 0 && reinterpret_cast<uintptr_t>(s.input) % kVectorBytes == 0;
}

// A patch is processed by `warps_per_patch` warps. In a tile of few positions, patches are made smaller until there are
// `wanted_warps` warps, so that no multiprocessor is idle.
template <typename scalar_t, int kVector>
Tile<scalar_t, kVector> make_tile(const Sampling<scalar_t>& s, int64_t warps_per_patch, int64_t wanted_warps) {
  const ConvGeometry& g = s.geometry;
  const auto number = [](int64_t n) { return static_cast<uint32_t>(n); };
  const auto division = [](int64_t n) { return Division(static_cast<uint32_t>(std::max<int64_t>(n, 1))); };
  Tile<scalar_t, kVector> tile{};
  tile.input = reinterpret_cast<const Vector<scalar_t, kVector>*>(s.input);
  tile.pixel_vectors = number(s.pixel_stride / kVector);
  tile.height = g.height, tile.width = g.width;
  tile.stride_y = g.stride_y, tile.stride_x = g.stride_x;
  tile.padding_y = g.padding_y, tile.padding_x = g.padding_x;
  tile.dilation_y = g.dilation_y, tile.dilation_x = g.dilation_x;
  tile.groups = number(g.groups);
  tile.group_vectors = number(g.group_in_channels() / kVector);
  tile.offset_group_vectors = number(g.offset_group_channels() / kVector);
  tile.in_channels = number(g.in_channels);
  tile.kernel_width = division(g.kernel_width);
  tile.taps = division(g.taps());
  tile.offset_groups = division(g.offset_groups);
  tile.positions = division(g.positions());
  tile.out_width = division(g.out_width);
  tile.vectors_of_group = division(tile.group_vectors);
  tile.offset = s.offset;
  tile.mask = s.mask;
  tile.first = number(s.first);
  tile.count = number(s.count);
  tile.columns = reinterpret_cast<Vector<scalar_t, kVector>*>(s.columns);

  const bool is_grid = g.out_width >= kPatchWidth && s.first % g.out_width == 0 && s.count % g.out_width == 0;
  tile.grid_width = number(is_grid ? g.out_width : s.count);
  tile.grid_rows = number(is_grid ? s.count / g.out_width : 1);
  int64_t members = kWarp;
  while (members > kPatchWidth && s.count / members * warps_per_patch < wanted_warps) {
    members /= 2;
  }
  const int64_t width = is_grid ? kPatchWidth : members;
  tile.patch_log_width = std::bit_width(number(width)) - 1;
  tile.patch_rows = number(members / width);
  tile.patch_columns = division(ceil_div(tile.grid_width, width));
  tile.patches = tile.patch_columns.divisor * number(ceil_div(tile.grid_rows, tile.patch_rows));
  return tile;
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls body(vector, lanes): the number of channels that a lane processes at a time, and of lanes that share a sample.
template <typename scalar_t, typename Body>
void with_vector_and_lanes(const Sampling<scalar_t>& s, const Body& body) {
  constexpr Constant<kMaxVector<scalar_t>> vector;
  if (!is_vectorized(s)) return body(Constant<1>(), Constant<32>());
  const int64_t vectors = s.geometry.offset_group_channels() / vector;
  if (vectors > 16) return body(vector, Constant<32>());
  if (vectors > 8) return body(vector, Constant<16>());
  body(vector, Constant<8>());
}

// Calls body(vector, lanes, single): `single` tells whether each lane has at most one vector.
template <typename scalar_t, typename Body>
void with_single(const Sampling<scalar_t>& s, const Body& body) {
  with_vector_and_lanes(s, [&](auto vector, auto lanes) {
    if constexpr (lanes < 32) {
      body(vector, lanes, std::true_type());
    } else if (vector > 1 && s.geometry.offset_group_channels() <= vector * lanes) {
      if constexpr (vector > 1) body(vector, lanes, std::true_type());
    } else {
      body(vector, lanes, std::false_type());
    }
  });
}

template <bool kDots, bool kBlend, typename scalar_t>
void launch_columns(const Sampling<scalar_t>& s, compute_t<scalar_t>* grad_offset, compute_t<scalar_t>* grad_mask) {
  if (s.count == 0) return;
  with_single(s, [&](auto vector, auto lanes, auto single) {
    const auto tile = make_tile<scalar_t, vector>(s, s.geometry.samples_per_position(), 32 * multiprocessors(s.device));
    launch_warps(Columns<scalar_t, vector, lanes, single, kDots, kBlend>{tile, grad_offset, grad_mask}, s.device);
  });
}

template <typename scalar_t>
void launch_input_gradient(const Sampling<scalar_t>& s, compute_t<scalar_t>* grad_input) {
  if (s.count == 0) return;
  with_single(s, [&](auto vector, auto lanes, auto single) {
    const auto tile = make_tile<scalar_t, vector>(s, s.geometry.offset_groups, 2 * multiprocessors(s.device));
    launch_warps(AddToInput<scalar_t, vector, lanes, single>{tile, grad_input}, s.device);
  });
}

// Returns false, and launches nothing, if too many warps have no tap.
template <int kVector, int kLanes, typename scalar_t>
bool launch_backpropagate(const Sampling<scalar_t>& s, compute_t<scalar_t>* grad_input,
                          compute_t<scalar_t>* grad_offset, compute_t<scalar_t>* grad_mask) {
  using Body = Backpropagate<scalar_t, kVector, kLanes>;
  const int64_t taps = s.geometry.taps(), warps = ceil_div(taps, Body::kWarps) * Body::kWarps;
  if (8 * (warps - taps) > warps) return false;
  const auto tile =
      make_tile<scalar_t, kVector>(s, s.geometry.offset_groups, Body::kResident * multiprocessors(s.device));
  launch_warps(Body{{tile, grad_input}, {tile, grad_offset, grad_mask}}, s.device);
  return true;
}

// Computes all three gradients with one kernel, if it suits the call; else returns false. It has not run on a GPU yet.
template <typename scalar_t>
bool launch_at_once(const Sampling<scalar_t>& s, compute_t<scalar_t>* grad_input, compute_t<scalar_t>* grad_offset,
                    compute_t<scalar_t>* grad_mask) {
  if (s.count == 0 || !runs_new_kernels()) return false;
  bool launched = false;
  with_single(s, [&](auto vector, auto lanes, auto single) {
    if constexpr (vector > 1 && single && sizeof(scalar_t) <= 4) {
      launched = launch_backpropagate<vector, lanes>(s, grad_input, grad_offset, grad_mask);
    }
  });
  return launched;
}

}  // namespace launching

// Fills the columns with the samples.
template <typename scalar_t>
void launch_sample_columns(const Sampling<scalar_t>& s) {
  launching::launch_columns<false, true>(s, nullptr, nullptr);
}

// From the columns' gradient, adds the gradient of the input to grad_input [B*H*W, C_in], aligned to kVectorBytes, and
// writes those of offset [B, 2*G*K, H_out, W_out] and mask [B, G*K, H_out, W_out], both dense. Each is null if not
// needed. If `samples`, then overwrites the columns with the samples.
template <typename scalar_t>
void launch_gradients(const Sampling<scalar_t>& s, compute_t<scalar_t>* grad_input, compute_t<scalar_t>* grad_offset,
                      compute_t<scalar_t>* grad_mask, bool samples) {
  const bool needs_sampling = grad_offset || grad_mask;
  if (grad_input && needs_sampling && samples && launching::launch_at_once(s, grad_input, grad_offset, grad_mask)) {
    return;
  }
  if (grad_input) launching::launch_input_gradient(s, grad_input);
  if (!needs_sampling) {
    if (samples) launch_sample_columns(s);
  } else if (samples) {
    launching::launch_columns<true, true>(s, grad_offset, grad_mask);
  } else {
    launching::launch_columns<true, false>(s, grad_offset, grad_mask);
  }
}

// The gradient of the input in a fixed order, in two steps. In between, the host sorts: `order` is the stable argsort
// of the pixels. All arrays have 4 * count * K * G elements.
template <typename scalar_t>
void launch_list_corners(const Sampling<scalar_t>& s, const Corners<compute_t<scalar_t>>& corners) {
  if (s.count == 0) return;
  const auto tile = launching::make_tile<scalar_t, 1>(s, 1, 0);
  launch_warps(ListCorners<scalar_t, 1>{tile, corners}, s.device);
}

template <typename scalar_t>
void launch_add_sorted_corners(const Sampling<scalar_t>& s, const Corners<compute_t<scalar_t>>& corners,
                               const int64_t* order, compute_t<scalar_t>* grad_input) {
  if (s.count == 0) return;
  launching::with_vector_and_lanes(s, [&](auto vector, auto lanes) {
    const auto tile = launching::make_tile<scalar_t, vector>(s, 1, 0);
    launch_warps(AddSortedCorners<scalar_t, vector, lanes>{tile, corners, order, grad_input}, s.device);
  });
}

}  // namespace mmdcn
