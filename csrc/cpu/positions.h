// SPDX-License-Identifier: Apache-2.0
// Output positions of images [N, C, H, W] of any strides and type, as rows [count, C] in the compute type.
// Positions are numbered over the images: (n * H + y) * W + x.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../core/dispatch.h"
#include "../core/stable_ops.h"

namespace mmdcn {

// Calls body(offset, row, length) for runs of at most 16 adjacent positions in a row of an image, which fill a cache
// line of a plane. `offset` is the memory offset of the first one.
template <typename Body>
void for_each_run(const Tensor& images, int64_t first, int64_t count, const Body& body) {
  constexpr int64_t kRun = 16;
  const int64_t height = images.size(2), width = images.size(3);
  for (int64_t row = 0; row < count;) {
    const int64_t position = first + row, x = position % width, y = position / width % height;
    const int64_t image = position / (width * height), length = std::min({kRun, count - row, width - x});
    body(image * images.stride(0) + y * images.stride(2) + x * images.stride(3), row, length);
    row += length;
  }
}

// Calls body(index in the tensor's memory, index in the rows) for each element, in the order of the tensor's memory.
template <typename Body>
void for_each_number(const Tensor& images, int64_t first, int64_t count, const Body& body) {
  const int64_t channels = images.size(1), channel_stride = images.stride(1), stride = images.stride(3);
  for_each_run(images, first, count, [&](int64_t offset, int64_t row, int64_t length) {
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

template <typename T>
void read_positions(const Tensor& images, int64_t first, int64_t count, T* rows) {
  dispatch_storage(images.scalar_type(), "images", [&](auto zero) {
    const auto* from = data<const decltype(zero)>(images);
    for_each_number(images, first, count, [&](int64_t i, int64_t j) { rows[j] = static_cast<T>(from[i]); });
  });
}

template <typename T>
void write_positions(const T* rows, const Tensor& images, int64_t first, int64_t count) {
  dispatch_storage(images.scalar_type(), "images", [&](auto zero) {
    auto* to = data<decltype(zero)>(images);
    for_each_number(images, first, count, [&](int64_t i, int64_t j) { to[i] = static_cast<decltype(zero)>(rows[j]); });
  });
}

}  // namespace mmdcn
