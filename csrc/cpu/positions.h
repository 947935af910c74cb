// SPDX-License-Identifier: Apache-2.0
// Output positions of images [N, C, H, W] of any strides and type, as rows [count, C] in the compute type.
// Positions are numbered over the images: (n * H + y) * W + x.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../core/dispatch.h"
#include "../core/stable_ops.h"
#include "transpose.h"

namespace mmdcn {

// Calls body(offset, row, length) for runs of at most `longest` positions, which are a stride of x apart in the
// tensor's memory. `offset` is the memory offset of the first one.
template <typename Body>
void for_each_run(const Tensor& images, int64_t first, int64_t count, int64_t longest, const Body& body) {
  const bool rows_adjoin = images.stride(2) == images.size(3) * images.stride(3);
  const int64_t height = rows_adjoin ? 1 : images.size(2);
  const int64_t width = rows_adjoin ? images.size(2) * images.size(3) : images.size(3);
  for (int64_t row = 0; row < count;) {
    const int64_t position = first + row, x = position % width, y = position / width % height;
    const int64_t image = position / (width * height), length = std::min({longest, count - row, width - x});
    body(image * images.stride(0) + y * images.stride(2) + x * images.stride(3), row, length);
    row += length;
  }
}

// Calls body(index in the tensor's memory, index in the rows) for each element, in the order of the tensor's memory.
template <typename Body>
void for_each_number(const Tensor& images, int64_t first, int64_t count, const Body& body) {
  constexpr int64_t kRun = 16;  // positions of a plane, which fill a cache line
  const int64_t channels = images.size(1), channel_stride = images.stride(1), stride = images.stride(3);
  for_each_run(images, first, count, kRun, [&](int64_t offset, int64_t row, int64_t length) {
    if (channel_stride == 1) {
      for (int64_t i = 0; i < length; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          body(offset + i * stride + c, (row + i) * channels + c);
        }
      }
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < length; ++i) {
        body(offset + i * stride + c * channel_stride, (row + i) * channels + c);
      }
    }
  });
}

// Whether the images are planes of adjacent positions, NCHW, of type T.
template <typename T>
bool are_planes(const Tensor& images) {
  return images.scalar_type() == torch::headeronly::CppTypeToScalarType<T>::value && images.stride(3) == 1 &&
         images.stride(1) != 1;
}

constexpr int64_t kPlaneRun = 64;  // positions of a plane at a time

template <typename T>
void read_planes(const Tensor& images, int64_t first, int64_t count, T* rows) {
  const int64_t channels = images.size(1), channel_stride = images.stride(1);
  for_each_run(images, first, count, kPlaneRun, [&](int64_t offset, int64_t row, int64_t length) {
    for (int64_t channel = 0; channel < channels; channel += kTransposedSide<T>) {
      transpose(data<const T>(images) + offset + channel * channel_stride, channel_stride,
                rows + row * channels + channel, channels, std::min(kTransposedSide<T>, channels - channel), length);
    }
  });
}

template <typename T>
void write_planes(const T* rows, const Tensor& images, int64_t first, int64_t count) {
  const int64_t channels = images.size(1);
  for_each_run(images, first, count, kPlaneRun, [&](int64_t offset, int64_t row, int64_t length) {
    transpose(rows + row * channels, channels, data<T>(images) + offset, images.stride(1), length, channels);
  });
}

template <typename T>
void read_positions(const Tensor& images, int64_t first, int64_t count, T* rows) {
  if constexpr (std::is_floating_point_v<T>) {
    if (are_planes<T>(images)) return read_planes(images, first, count, rows);
  }
  dispatch_storage(images.scalar_type(), "images", [&](auto zero) {
    const auto* from = data<const decltype(zero)>(images);
    for_each_number(images, first, count, [&](int64_t i, int64_t j) { rows[j] = static_cast<T>(from[i]); });
  });
}

template <typename T>
void write_positions(const T* rows, const Tensor& images, int64_t first, int64_t count) {
  if constexpr (std::is_floating_point_v<T>) {
    if (are_planes<T>(images)) return write_planes(rows, images, first, count);
  }
  dispatch_storage(images.scalar_type(), "images", [&](auto zero) {
    auto* to = data<decltype(zero)>(images);
    for_each_number(images, first, count, [&](int64_t i, int64_t j) { to[i] = static_cast<decltype(zero)>(rows[j]); });
  });
}

}  // namespace mmdcn
