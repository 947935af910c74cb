// SPDX-License-Identifier: Apache-2.0
// Host code that the forward and the backward share: sub-batches of images, tiles of positions, and tensors as pointers
// and strides.
#pragma once

#include <algorithm>
#include <optional>

#include "../core/dispatch.h"
#include "../ops/deform_conv2d.h"
#include "deform_conv2d.cuh"
#include "deform_conv2d_launch.cuh"
#include "image_rows.cuh"
#include "matrix_product.cuh"

namespace mmdcn {

constexpr int64_t kTileRows = 4;  // the rows of a tile are a multiple of this, like those of a patch

inline Tensor in_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

template <typename T>
Planes<T> planes(const std::optional<Tensor>& tensor, int64_t first_image) {
  if (!tensor) return {};
  return {data<T>(*tensor) + first_image * tensor->stride(0), tensor->stride(0), tensor->stride(1), tensor->stride(2),
          tensor->stride(3)};
}

// The same call with a different number of images.
inline ConvGeometry with_batch(ConvGeometry g, int64_t images) {
  g.batch = images;
  return g;
}

// The number of images in a sub-batch and of positions in a tile. `copied` is in bytes per image, `columns` in bytes
// per position; `scale` multiplies the limits of both.
struct Tiling {
  int64_t images, tile_positions;

  Tiling(const ConvGeometry& g, int64_t copied, int64_t columns, int64_t scale = 1) {
    const int64_t copy_bytes = scale * kCopyBytes, tile_bytes = scale * kTileBytes;
    int64_t most = g.batch;
    if (copied > 0) most = std::min(most, copy_bytes / copied);
    if (columns > 0) most = std::min(most, tile_bytes / (g.positions() * columns));
    most = std::max<int64_t>(most, 1);
    while (most > 1 && !fits(with_batch(g, most), g.in_channels, g.positions())) {
      most /= 2;
    }
    images = ceil_div(g.batch, ceil_div(g.batch, most));
    const int64_t total = images * g.positions(), tiles = ceil_div(total * columns, tile_bytes);
    const int64_t rows = kTileRows * g.out_width, unit = rows * columns <= tile_bytes ? rows : 1;
    tile_positions = tiles <= 1 ? total : std::min(ceil_div(ceil_div(total, tiles), unit) * unit, total);
    MMDCN_CHECK(fits(with_batch(g, images), g.in_channels, tile_positions),
                "input and offset must have images of fewer than 2^31 elements, got ", g.in_channels, " x ", g.height,
                " x ", g.width, " and ", g.out_height, " x ", g.out_width, " output positions");
  }
};

// Calls body(first image, number of images) for each sub-batch.
template <typename Body>
void for_each_sub_batch(const ConvGeometry& g, const Tiling& tiling, const Body& body) {
  for (int64_t first = 0; first < g.batch; first += tiling.images) {
    body(first, std::min(tiling.images, g.batch - first));
  }
}

// The tensors of a call in the form that the kernels take.
template <typename scalar_t>
struct DeviceCall {
  using T = compute_t<scalar_t>;

  ConvGeometry geometry;
  int32_t device;
  bool allow_tf32;
  Tensor offset;
  std::optional<Tensor> mask;
  ImageRows<scalar_t> input;
  ImageRows<scalar_t> weight;  // [C_out, K, C_in/groups]

  explicit DeviceCall(const DeformConv2dCall& call)
      : geometry(call.geometry),
        device(call.input.get_device_index()),
        allow_tf32(call.allow_tf32),
        offset(in_type(call.offset, compute())),
        mask(call.mask ? std::optional<Tensor>(in_type(*call.mask, compute())) : std::nullopt),
        input(call.input, !is_rows(call.input)),
        weight(call.weight, !is_rows(call.weight)) {}

  int64_t depth() const { return geometry.taps() * geometry.group_in_channels(); }  // length of the products' sums
  int64_t column_bytes() const {
    return geometry.taps() * geometry.in_channels * static_cast<int64_t>(sizeof(scalar_t));
  }
  ScalarType type() const { return torch::headeronly::CppTypeToScalarType<scalar_t>::value; }
  ScalarType compute() const { return torch::headeronly::CppTypeToScalarType<T>::value; }

  Sampling<scalar_t> sampling(scalar_t* rows, int64_t first_image, int64_t images, scalar_t* columns) const {
    return {.geometry = with_batch(geometry, images),
            .offset = planes<T>(offset, first_image),
            .mask = planes<T>(mask, first_image),
            .input = rows,
            .pixel_stride = geometry.in_channels,
            .columns = columns,
            .first = 0,
            .count = 0,
            .device = device};
  }

  // Calls body(tile) for the tiles of a sub-batch.
  template <typename Body>
  void for_each_tile(Sampling<scalar_t> sub_batch, int64_t tile_positions, const Body& body) const {
    const int64_t total = sub_batch.geometry.batch * sub_batch.geometry.positions();
    for (; sub_batch.first < total; sub_batch.first += tile_positions) {
      sub_batch.count = std::min(tile_positions, total - sub_batch.first);
      body(sub_batch);
    }
  }

  // The matrices of each group: rows [positions, C_out] of a tile, columns, and the weight or its gradient.
  Matrices by_group(scalar_t* rows, const Sampling<scalar_t>& tile) const {
    return {rows + tile.first * geometry.out_channels, geometry.out_channels, geometry.group_out_channels(), type()};
  }
  Matrices columns(const Sampling<scalar_t>& tile) const {
    return {tile.columns, depth(), tile.count * depth(), type()};
  }
  Matrices weights(void* data, ScalarType type) const {
    return {data, depth(), geometry.group_out_channels() * depth(), type};
  }
};

}  // namespace mmdcn
