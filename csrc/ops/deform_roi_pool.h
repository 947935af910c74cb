// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../core/checks.h"
#include "../core/library.h"
#include "../core/readable_errors.h"
#include "../core/roi_bins.h"
#include "../core/stable_ops.h"

namespace mmdcn {

// Checks that the tensors of a call fit together, and returns its sizes.
inline RoIGeometry deform_roi_pool_geometry(const Tensor& input,                  // [B, C, H, W]
                                            const Tensor& rois,                   // [N, 5]
                                            const std::optional<Tensor>& offset,  // [N, 2, ph, pw]
                                            const std::vector<int64_t>& output_size, double spatial_scale,
                                            int64_t sampling_ratio, double gamma, bool aligned) {
  check_rank(input, "input", 4);
  check_rank(rois, "rois", 2);
  MMDCN_CHECK(output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0,
              "output_size must be two positive numbers, got ", to_string(output_size));
  check_below_2_31(output_size, "output_size");
  MMDCN_CHECK(sampling_ratio >= 0, "sampling_ratio must not be negative, got ", sampling_ratio);
  check_below_2_31({sampling_ratio}, "sampling_ratio");
  RoIGeometry g{};
  g.batch = input.size(0), g.channels = input.size(1), g.height = input.size(2), g.width = input.size(3);
  g.rois = rois.size(0), g.out_height = output_size[0], g.out_width = output_size[1];
  g.spatial_scale = spatial_scale, g.gamma = gamma, g.sampling_ratio = sampling_ratio;
  g.aligned = aligned;
  MMDCN_CHECK(g.channels > 0 && g.height > 0 && g.width > 0, "input must have channels and pixels, got ",
              to_string(input.sizes()));
  check_below_2_31({g.height, g.width}, "the size of an image");
  check_shape(rois, "rois", {g.rois, 5});
  check_floating(input, "input");
  check_place_type(rois, "rois", input);
  check_same_device(rois, "rois", input);
  if (offset) {
    check_shape(*offset, "offset", {g.rois, 2, g.out_height, g.out_width});
    check_place_type(*offset, "offset", input);
    check_same_device(*offset, "offset", input);
  }
  return g;
}

inline void check_deform_roi_pool_backward(const Tensor& grad_output, const Tensor& input, const Tensor& rois,
                                           const std::optional<Tensor>& offset, const std::vector<bool>& output_mask) {
  check_rank(grad_output, "grad_output", 4);
  MMDCN_CHECK(grad_output.size(0) == rois.size(0) && grad_output.size(1) == input.size(1), "grad_output must have ",
              rois.size(0), " regions and ", input.size(1), " channels, got shape ", to_string(grad_output.sizes()));
  check_same_type(grad_output, "grad_output", input.scalar_type());
  check_same_device(grad_output, "grad_output", input);
  MMDCN_CHECK(output_mask.size() == 2, "output_mask must have 2 elements, got ", output_mask.size());
  MMDCN_CHECK(offset || !output_mask[1], "output_mask asks for the gradient of offsets, but there are none");
}

// grad_input, grad_offset; a gradient that was not requested has no elements.
using DeformRoIPoolGradients = std::tuple<Tensor, Tensor>;

// A call whose tensors have been checked.
struct DeformRoIPoolCall {
  RoIGeometry geometry;
  const Tensor &input, &rois;
  const std::optional<Tensor>& offset;
};

// Registers a device's kForward(call) and kBackward(call, grad_output, output_mask) as its kernels. Both devices sum in
// a fixed order, so `deterministic` changes nothing.
template <auto kForward, auto kBackward>
struct DeformRoIPoolKernels {
  static Tensor forward(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
                        const std::vector<int64_t>& output_size, double spatial_scale, int64_t sampling_ratio,
                        double gamma, bool aligned) {
    return with_readable_errors([&] {
      const RoIGeometry g =
          deform_roi_pool_geometry(input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, aligned);
      return kForward(DeformRoIPoolCall{g, input, rois, offset});
    });
  }

  static DeformRoIPoolGradients backward(const Tensor& grad_output, const Tensor& input, const Tensor& rois,
                                         const std::optional<Tensor>& offset, double spatial_scale,
                                         int64_t sampling_ratio, double gamma, const std::vector<bool>& output_mask,
                                         bool /*deterministic*/, bool aligned) {
    return with_readable_errors([&] {
      check_deform_roi_pool_backward(grad_output, input, rois, offset, output_mask);
      const RoIGeometry g = deform_roi_pool_geometry(input, rois, offset, {grad_output.size(2), grad_output.size(3)},
                                                     spatial_scale, sampling_ratio, gamma, aligned);
      return kBackward(DeformRoIPoolCall{g, input, rois, offset}, grad_output, output_mask);
    });
  }

  static void add_to(auto& library) {
    library.impl("deform_roi_pool", TORCH_BOX(&forward));
    library.impl("deform_roi_pool_backward", TORCH_BOX(&backward));
  }
};

}  // namespace mmdcn
