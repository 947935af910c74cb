// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace mmdcn {

// All sizes of a deformable convolution. K = kernel_height * kernel_width taps, row-major.
struct ConvGeometry {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int64_t groups, offset_groups;

  C10_HOST_DEVICE int64_t taps() const { return kernel_height * kernel_width; }
  C10_HOST_DEVICE int64_t positions() const { return out_height * out_width; }
  C10_HOST_DEVICE int64_t group_in_channels() const { return in_channels / groups; }
  C10_HOST_DEVICE int64_t group_out_channels() const { return out_channels / groups; }
  C10_HOST_DEVICE bool is_depthwise() const { return in_channels == groups && out_channels == groups; }
  C10_HOST_DEVICE int64_t samples_per_position() const { return offset_groups * taps(); }
  C10_HOST_DEVICE int64_t offset_group_channels() const { return in_channels / offset_groups; }

  // Where a tap would sample without an offset.
  C10_HOST_DEVICE int64_t regular_y(int64_t out_y, int64_t tap) const {
    return out_y * stride_y - padding_y + tap / kernel_width * dilation_y;
  }
  C10_HOST_DEVICE int64_t regular_x(int64_t out_x, int64_t tap) const {
    return out_x * stride_x - padding_x + tap % kernel_width * dilation_x;
  }
};

}  // namespace mmdcn
