// SPDX-License-Identifier: Apache-2.0
// What the host does. See Note [Deformable RoI pooling].
#include "deform_roi_pool.cuh"

#include <optional>
#include <vector>

#include "../core/dispatch.h"
#include "../core/nhwc.h"
#include "../core/readable_errors.h"
#include "../ops/deform_roi_pool.h"
#include "device.cuh"

namespace mmdcn {
namespace {

// The tensors that say where each bin samples.
template <typename T>
class Places {
 public:
  Places(const Tensor& rois, const std::optional<Tensor>& offset, ScalarType type)
      : rois_(contiguous_as(rois, type)),
        offset_(offset ? std::optional(contiguous_as(*offset, type)) : std::nullopt) {}

  template <typename scalar_t>
  RoIs<scalar_t> of(const RoIGeometry& g) const {
    return {g, data<T>(rois_), offset_ ? data<T>(*offset_) : nullptr};
  }

 private:
  Tensor rois_;                   // [N, 5]
  std::optional<Tensor> offset_;  // [N, 2, ph, pw]
};

// Calls body(integral_constant) with how many channels may be read as one.
template <typename scalar_t, typename Body>
void dispatch_vector(const RoIGeometry& g, const Rows<scalar_t>& rows, const Body& body) {
  constexpr int kVector = kMaxVector<scalar_t>;
  if (g.channels % kVector == 0 && rows.pixel_stride % kVector == 0 &&
      reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0) {
    body(std::integral_constant<int, kVector>());
  } else {
    body(std::integral_constant<int, 1>());
  }
}

Tensor deform_roi_pool(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
                       const std::vector<int64_t>& output_size, double spatial_scale, int64_t sampling_ratio,
                       double gamma) {
  const RoIGeometry g =
      deform_roi_pool_geometry(input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma);
  const int32_t device = input.get_device_index();
  const DeviceGuard guard(device);
  const ScalarType type = input.scalar_type();
  const Tensor output = torch::stable::empty({g.rois, g.channels, g.out_height, g.out_width}, type, std::nullopt,
                                             input.device(), std::nullopt, memory_format(input));
  if (output.numel() == 0) return output;
  Tensor target = nhwc_view(output, 0, g.rois);
  const bool in_place = is_nhwc_matrix(output, type);
  const Tensor bins = in_place ? target : empty_nhwc(output, g.rois, type);
  dispatch_storage(type, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const Rows<scalar_t> rows = nhwc_rows<scalar_t>(input, 0, g.batch, type);
    const Places<compute_t<scalar_t>> places(rois, offset, compute_type(type));
    dispatch_vector(g, rows, [&](auto vector) {
      launch(
          PoolBins<scalar_t, vector>{
              {places.template of<scalar_t>(g)}, rows.data, rows.pixel_stride, data<scalar_t>(bins)},
          device);
    });
  });
  if (!in_place) torch::stable::copy_(target, bins);
  return output;
}

DeformRoIPoolGradients deform_roi_pool_backward(const Tensor& grad_output, const Tensor& input, const Tensor& rois,
                                                const std::optional<Tensor>& offset, double spatial_scale,
                                                int64_t sampling_ratio, double gamma,
                                                const std::vector<bool>& output_mask, bool deterministic) {
  check_deform_roi_pool_backward(grad_output, input, rois, offset, output_mask);
  const RoIGeometry g = deform_roi_pool_geometry(input, rois, offset, {grad_output.size(2), grad_output.size(3)},
                                                 spatial_scale, sampling_ratio, gamma);
  const int32_t device = input.get_device_index();
  const DeviceGuard guard(device);
  const ScalarType type = input.scalar_type(), sum_type = compute_type(type);
  Tensor grad_input = empty_gradient(output_mask[0], input, type, memory_format(input));
  const Tensor grad_offset = empty_gradient(output_mask[1], offset.value_or(rois), sum_type);
  Tensor target = output_mask[0] ? nhwc_view(grad_input, 0, g.batch) : grad_input;
  const bool copies = output_mask[0] && !is_nhwc_matrix(grad_input, sum_type);
  Tensor sum = copies ? empty_nhwc(input, g.batch, sum_type) : target;
  torch::stable::zero_(sum);
  if (grad_output.numel() > 0) {
    const Tensor grad_bins = torch::stable::contiguous(nhwc_matrix(grad_output, 0, g.rois, type));
    dispatch_storage(type, "input", [&](auto zero) {
      using scalar_t = decltype(zero);
      using T = compute_t<scalar_t>;
      const Rows<scalar_t> rows = nhwc_rows<scalar_t>(input, 0, g.batch, type);
      const Places<T> places(rois, offset, sum_type);
      const RoIs<scalar_t> on = places.template of<scalar_t>(g);
      T* const input_sum = output_mask[0] ? data<T>(sum) : nullptr;
      T* const offset_sum = output_mask[1] ? data<T>(grad_offset) : nullptr;
      dispatch_vector(g, rows, [&](auto vector) {
        const scalar_t* grads = data<scalar_t>(grad_bins);
        if (deterministic && input_sum) launch(AddBinsInOrder<scalar_t, vector>{on, grads, input_sum}, device);
        T* const unordered_sum = deterministic ? nullptr : input_sum;
        if (!unordered_sum && !offset_sum) return;
        launch(
            BackpropagateBins<scalar_t, vector>{{on}, rows.data, rows.pixel_stride, grads, unordered_sum, offset_sum},
            device);
      });
    });
  }
  if (copies) torch::stable::copy_(target, sum);
  return {grad_input, output_mask[1] ? torch::stable::to(grad_offset, offset->scalar_type()) : grad_offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&Readable<&deform_roi_pool>::call));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&Readable<&deform_roi_pool_backward>::call));
}

}  // namespace mmdcn
