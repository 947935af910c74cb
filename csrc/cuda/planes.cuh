// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace mmdcn {

// A tensor [B, channels, H_out, W_out] of any strides.
template <typename T>
struct Planes {
  const T* data;  // null if there is no such tensor
  int64_t image_stride, channel_stride, y_stride, x_stride;

  C10_DEVICE const T* at(uint32_t image, uint32_t channel, uint32_t out_y, uint32_t out_x) const {
    return data + image * image_stride + channel * channel_stride + out_y * y_stride + out_x * x_stride;
  }
};

}  // namespace mmdcn
