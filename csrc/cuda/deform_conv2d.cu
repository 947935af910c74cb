// SPDX-License-Identifier: Apache-2.0
// The operator on CUDA. See Note [Deformable convolution on CUDA].
//
// A call of torch costs as much as a kernel, so there are few: one allocates each result, and one a workspace that
// holds everything else. Images that are not NHWC rows are copied to NHWC rows, and results back, in sub-batches.
#include <optional>
#include <vector>

#include "../core/dispatch.h"
#include "../ops/deform_conv2d.h"
#include "deform_conv2d_backward.cuh"
#include "deform_conv2d_forward.cuh"

namespace mmdcn {
namespace {

Tensor deform_conv2d(const DeformConv2dCall& call, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& /*packed_weight*/) {
  const ConvGeometry& g = call.geometry;
  const DeviceGuard guard(call.input.get_device_index());
  const Tensor output =
      torch::stable::empty({g.batch, g.out_channels, g.out_height, g.out_width}, call.input.scalar_type(), std::nullopt,
                           call.input.device(), std::nullopt, memory_format(call.input));
  if (g.batch == 0) return output;
  dispatch_storage(call.input.scalar_type(), "input", [&](auto zero) {
    DeviceCall<decltype(zero)> device_call(call);
    forward(device_call, bias, output);
  });
  return output;
}

DeformConv2dGradients deform_conv2d_backward(const DeformConv2dCall& call, const Tensor& grad_output,
                                             const std::vector<bool>& output_mask, bool deterministic) {
  const Tensor &input = call.input, &offset = call.offset, &weight = call.weight;
  const DeviceGuard guard(input.get_device_index());
  const ScalarType type = compute_type(input.scalar_type());
  const Gradients gradients{.input = empty_gradient(output_mask[0], input, input.scalar_type(), memory_format(input)),
                            .offset = empty_gradient(output_mask[1], offset, type),
                            .mask = empty_gradient(output_mask[2], call.mask.value_or(offset), type),
                            .weight = empty_gradient(output_mask[3], weight, weight.scalar_type()),
                            .needs_input = output_mask[0],
                            .needs_offset = output_mask[1],
                            .needs_mask = output_mask[2],
                            .needs_weight = output_mask[3]};
  if (call.geometry.batch == 0) {
    clear(gradients.weight.data_ptr(), gradients.weight.numel() * weight.element_size(), input.get_device_index());
  } else {
    dispatch_storage(input.scalar_type(), "input", [&](auto zero) {
      DeviceCall<decltype(zero)> device_call(call);
      backward(device_call, grad_output, gradients, deterministic);
    });
  }
  return {gradients.input, in_type(gradients.offset, offset.scalar_type()),
          in_type(gradients.mask, offset.scalar_type()), gradients.weight};
}

}  // namespace

MMDCN_CUDA_KERNELS(library) { DeformConv2dKernels<&deform_conv2d, &deform_conv2d_backward>::add_to(library); }

}  // namespace mmdcn
