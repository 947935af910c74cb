// SPDX-License-Identifier: Apache-2.0
// Images [B, C, H, W] of any strides and type as NHWC rows in the compute type. A tensor that already has this layout
// is used in place.
#pragma once

#include <optional>
#include <vector>

#include "../core/dispatch.h"
#include "../core/stable_ops.h"
#include "positions.h"

namespace mmdcn {

// Row `pixel` of N images holds the adjacent channels of pixel (n * H + y) * W + x.
template <typename T>
struct Rows {
  Tensor images;  // [N, H, W, C]
  T* data;
  int64_t pixel_stride;

  T* at(int64_t pixel, int64_t channel) const { return data + pixel * pixel_stride + channel; }
};

inline Tensor nhwc_view(const Tensor& images, int64_t first, int64_t count) {
  return permute(slice(images, 0, first, count), {0, 2, 3, 1});
}

// The stride between pixels, if it is the same across rows and images and the channels are adjacent.
inline std::optional<int64_t> uniform_pixel_stride(const Tensor& nhwc) {
  std::optional<int64_t> pixel_stride;
  int64_t pixels = 1;
  for (int64_t dim = 2; dim >= 0; --dim) {
    if (nhwc.size(dim) != 1) {
      if (!pixel_stride) pixel_stride = nhwc.stride(dim);
      if (nhwc.stride(dim) != *pixel_stride * pixels) return std::nullopt;
    }
    pixels *= nhwc.size(dim);
  }
  if (nhwc.size(3) != 1 && nhwc.stride(3) != 1) return std::nullopt;
  return pixel_stride.value_or(nhwc.size(3));
}

inline bool is_nhwc_rows(const Tensor& images, ScalarType type) {
  return images.scalar_type() == type && uniform_pixel_stride(permute(images, {0, 2, 3, 1}));
}

inline bool is_nhwc_matrix(const Tensor& images, ScalarType type) {
  return images.scalar_type() == type && permute(images, {0, 2, 3, 1}).is_contiguous();
}

inline Tensor empty_nhwc(const Tensor& images, int64_t count, ScalarType type) {
  return torch::stable::empty({count, images.size(2), images.size(3), images.size(1)}, type, std::nullopt,
                              images.device());
}

// Calls body(first pixel of the images, number of pixels, offset of their rows) for the shares of the threads.
template <typename Body>
void share_pixels(const Tensor& images, int64_t first, int64_t count, const Body& body) {
  const int64_t channels = images.size(1), pixels = images.size(2) * images.size(3);
  torch::stable::parallel_for(0, count * pixels, kThreadWork / channels + 1, [&](int64_t begin, int64_t end) {
    body(first * pixels + begin, end - begin, begin * channels);
  });
}

// Copies images to contiguous NHWC, [count, H, W, C]. torch transposes element by element.
template <typename T>
void copy_to_nhwc(const Tensor& images, int64_t first, Tensor& nhwc) {
  const int64_t count = nhwc.size(0);
  if constexpr (std::is_floating_point_v<T>) {
    if (are_planes<T>(images)) {
      share_pixels(images, first, count, [&](int64_t pixel, int64_t pixels, int64_t row) {
        read_planes(images, pixel, pixels, data<T>(nhwc) + row);
      });
      return;
    }
  }
  torch::stable::copy_(nhwc, nhwc_view(images, first, count));
}

// Copies contiguous NHWC, [count, H, W, C], to images.
template <typename T>
void copy_from_nhwc(const Tensor& nhwc, const Tensor& images, int64_t first) {
  const int64_t count = nhwc.size(0);
  if (are_planes<T>(images)) {
    share_pixels(images, first, count, [&](int64_t pixel, int64_t pixels, int64_t row) {
      write_planes(data<const T>(nhwc) + row, images, pixel, pixels);
    });
    return;
  }
  Tensor target = nhwc_view(images, first, count);
  torch::stable::copy_(target, nhwc);
}

template <typename T>
Rows<T> nhwc_rows(const Tensor& images, int64_t first, int64_t count, ScalarType type) {
  Tensor nhwc = nhwc_view(images, first, count);
  std::optional<int64_t> pixel_stride = uniform_pixel_stride(nhwc);
  if (!pixel_stride || images.scalar_type() != type) {
    nhwc = empty_nhwc(images, count, type);
    copy_to_nhwc<T>(images, first, nhwc);
    pixel_stride = images.size(1);
  }
  return {nhwc, static_cast<T*>(nhwc.data_ptr()), *pixel_stride};
}

// [count * H * W, C]
inline Tensor nhwc_matrix(const Tensor& images, int64_t first, int64_t count, ScalarType type) {
  return torch::stable::reshape(values_as(nhwc_view(images, first, count), type), {-1, images.size(1)});
}

}  // namespace mmdcn
