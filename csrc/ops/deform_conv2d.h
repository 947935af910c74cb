// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../core/checks.h"
#include "../core/conv_geometry.h"
#include "../core/library.h"
#include "../core/readable_errors.h"
#include "../core/stable_ops.h"

namespace mmdcn {

// 0 if the kernel does not fit into the padded image.
inline int64_t conv_output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t last = size + 2 * padding - 1;
  if (kernel > 1 && dilation > last / (kernel - 1)) return 0;  // dilation * (kernel - 1) may overflow
  return (last - dilation * (kernel - 1)) / stride + 1;
}

// Checks that the tensors of a call fit together, and returns its sizes.
inline ConvGeometry deform_conv2d_geometry(const Tensor& input,                // [B, C_in, H, W]
                                           const Tensor& offset,               // [B, 2*G*K, H_out, W_out]
                                           const std::optional<Tensor>& mask,  // [B, G*K, H_out, W_out]
                                           const Tensor& weight,               // [C_out, C_in/groups, kh, kw]
                                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                           const std::vector<int64_t>& dilation, int64_t groups,
                                           int64_t offset_groups) {
  check_rank(input, "input", 4);
  check_rank(weight, "weight", 4);
  MMDCN_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
              "stride, padding and dilation must have 2 elements each");
  MMDCN_CHECK(stride[0] > 0 && stride[1] > 0, "stride must be positive, got ", to_string(stride));
  MMDCN_CHECK(dilation[0] > 0 && dilation[1] > 0, "dilation must be positive, got ", to_string(dilation));
  MMDCN_CHECK(padding[0] >= 0 && padding[1] >= 0, "padding must not be negative, got ", to_string(padding));
  check_below_2_31(stride, "stride");
  check_below_2_31(padding, "padding");
  check_below_2_31(dilation, "dilation");
  MMDCN_CHECK(groups > 0 && offset_groups > 0, "groups and offset_groups must be positive");

  ConvGeometry g{};
  g.batch = input.size(0), g.in_channels = input.size(1), g.height = input.size(2), g.width = input.size(3);
  g.out_channels = weight.size(0), g.kernel_height = weight.size(2), g.kernel_width = weight.size(3);
  g.stride_y = stride[0], g.stride_x = stride[1], g.padding_y = padding[0], g.padding_x = padding[1];
  g.dilation_y = dilation[0], g.dilation_x = dilation[1], g.groups = groups, g.offset_groups = offset_groups;
  MMDCN_CHECK(g.in_channels > 0 && g.height > 0 && g.width > 0 && weight.numel() > 0,
              "input and weight must not be empty, got ", to_string(input.sizes()), " and ", to_string(weight.sizes()));
  check_below_2_31({g.height, g.width}, "the size of an image");
  g.out_height = conv_output_size(g.height, g.kernel_height, g.stride_y, g.padding_y, g.dilation_y);
  g.out_width = conv_output_size(g.width, g.kernel_width, g.stride_x, g.padding_x, g.dilation_x);
  MMDCN_CHECK(g.in_channels % groups == 0 && g.out_channels % groups == 0 && g.in_channels % offset_groups == 0,
              "channels must be divisible by groups and offset_groups");
  MMDCN_CHECK(g.out_height > 0 && g.out_width > 0, "the output would be empty: ", g.out_height, " x ", g.out_width);
  check_below_2_31({g.out_height, g.out_width}, "the size of the output");
  check_shape(weight, "weight", {g.out_channels, g.group_in_channels(), g.kernel_height, g.kernel_width});
  check_shape(offset, "offset", {g.batch, 2 * offset_groups * g.taps(), g.out_height, g.out_width});
  check_floating(input, "input");
  check_place_type(offset, "offset", input);
  check_same_type(weight, "weight", input.scalar_type());
  check_same_device(weight, "weight", input);
  check_same_device(offset, "offset", input);
  if (mask) {
    check_shape(*mask, "mask", {g.batch, offset_groups * g.taps(), g.out_height, g.out_width});
    check_same_type(*mask, "mask", offset.scalar_type());
    check_same_device(*mask, "mask", input);
  }
  return g;
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& input, int64_t out_channels) {
  if (!bias) return;
  check_shape(*bias, "bias", {out_channels});
  check_same_type(*bias, "bias", input.scalar_type());
  check_same_device(*bias, "bias", input);
}

inline void check_backward(const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& mask,
                           const std::vector<bool>& output_mask, const ConvGeometry& g) {
  check_shape(grad_output, "grad_output", {g.batch, g.out_channels, g.out_height, g.out_width});
  check_same_type(grad_output, "grad_output", input.scalar_type());
  check_same_device(grad_output, "grad_output", input);
  MMDCN_CHECK(output_mask.size() == 4, "output_mask must have 4 elements, got ", output_mask.size());
  MMDCN_CHECK(mask || !output_mask[2], "output_mask asks for the gradient of a mask, but there is no mask");
}

// grad_input, grad_offset, grad_mask, grad_weight; a gradient that was not requested has no elements.
using DeformConv2dGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// A call whose tensors have been checked.
struct DeformConv2dCall {
  ConvGeometry geometry;
  const Tensor &input, &offset;
  const std::optional<Tensor>& mask;
  const Tensor& weight;
  bool allow_tf32;
};

// Registers a device's kForward(call, bias, packed_weight) and kBackward(call, grad_output, output_mask, deterministic)
// as its kernels.
template <auto kForward, auto kBackward>
struct DeformConv2dKernels {
  static Tensor forward(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                        const Tensor& weight, const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                        int64_t offset_groups, bool allow_tf32, const std::optional<Tensor>& packed_weight) {
    return with_readable_errors([&] {
      const ConvGeometry g =
          deform_conv2d_geometry(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
      check_bias(bias, input, g.out_channels);
      return kForward(DeformConv2dCall{g, input, offset, mask, weight, allow_tf32}, bias, packed_weight);
    });
  }

  static DeformConv2dGradients backward(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                        const std::optional<Tensor>& mask, const Tensor& weight,
                                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                        const std::vector<int64_t>& dilation, int64_t groups, int64_t offset_groups,
                                        const std::vector<bool>& output_mask, bool deterministic, bool allow_tf32) {
    return with_readable_errors([&] {
      const ConvGeometry g =
          deform_conv2d_geometry(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
      check_backward(grad_output, input, mask, output_mask, g);
      return kBackward(DeformConv2dCall{g, input, offset, mask, weight, allow_tf32}, grad_output, output_mask,
                       deterministic);
    });
  }

  static void add_to(auto& library) {
    library.impl("deform_conv2d", TORCH_BOX(&forward));
    library.impl("deform_conv2d_backward", TORCH_BOX(&backward));
  }
};

}  // namespace mmdcn
