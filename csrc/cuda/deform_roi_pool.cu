// SPDX-License-Identifier: Apache-2.0
// The host code. See Note [Deformable RoI pooling on CUDA].
#include "deform_roi_pool_input.cuh"
#include "deform_roi_pool_patches.cuh"
#include "deform_roi_pool_vectors.cuh"

#include <optional>
#include <vector>

#include "../core/dispatch.h"
#include "../ops/deform_roi_pool.h"
#include "device.cuh"

namespace mmdcn {
namespace {

// Returns the tensor itself if it has the type and is contiguous.
Tensor contiguous_values(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type && tensor.is_contiguous() ? tensor : contiguous_as(tensor, type);
}

// The tensors that determine where each bin samples, in the compute type.
template <typename T>
class RoITensors {
 public:
  RoITensors(const Tensor& rois, const std::optional<Tensor>& offset, ScalarType type)
      : rois_(contiguous_values(rois, type)),
        offset_(offset ? std::optional(contiguous_values(*offset, type)) : std::nullopt) {}

  template <typename scalar_t>
  RoIs<scalar_t> view(const RoIGeometry& g) const {
    return {g, data<T>(rois_), offset_ ? data<T>(*offset_) : nullptr};
  }

 private:
  Tensor rois_;                   // [N, 5]
  std::optional<Tensor> offset_;  // [N, 2, ph, pw]
};

template <typename scalar_t>
ImageView<scalar_t> image_view(const Tensor& images) {
  return {static_cast<scalar_t*>(images.data_ptr()), images.stride(0), images.stride(1), images.stride(2),
          images.stride(3)};
}

// Whether the bins of [N, C, ph, pw] have one stride, also across rows.
bool has_bin_stride(const Tensor& bins) {
  return bins.size(2) == 1 || bins.size(3) == 1 || bins.stride(2) == bins.size(3) * bins.stride(3);
}

template <typename scalar_t>
BinView<scalar_t> bin_view(const Tensor& bins) {
  return {static_cast<scalar_t*>(bins.data_ptr()), bins.stride(0), bins.stride(1),
          bins.size(3) == 1 ? bins.stride(2) : bins.stride(3)};
}

// Whether the channels of each pixel can be read and written as vectors.
template <typename scalar_t>
bool has_vectors(const Tensor& images) {
  constexpr int kVector = kMaxVector<scalar_t>;
  const bool fits = images.size(1) % kVector == 0 && images.stride(1) == 1;
  const bool aligned = reinterpret_cast<uintptr_t>(images.data_ptr()) % kVectorBytes == 0;
  return fits && aligned && images.stride(0) % kVector == 0 && images.stride(2) % kVector == 0 &&
         images.stride(3) % kVector == 0;
}

// The kernels index bins and channels with 32 bits.
void check_counts(const RoIGeometry& g) {
  MMDCN_CHECK(g.channels <= INT32_MAX, "input must have fewer than 2^31 channels, got ", g.channels);
  MMDCN_CHECK(g.rois == 0 || g.bins() <= INT32_MAX / g.rois,
              "rois and output_size must give fewer than 2^31 bins, got ", g.rois, " regions of ", g.bins());
}

Tensor deform_roi_pool(const DeformRoIPoolCall& call) {
  const RoIGeometry& g = call.geometry;
  check_counts(g);
  const int32_t device = call.input.get_device_index();
  const DeviceGuard guard(device);
  const ScalarType type = call.input.scalar_type();
  const Tensor output = torch::stable::empty({g.rois, g.channels, g.out_height, g.out_width}, type, std::nullopt,
                                             call.input.device(), std::nullopt, memory_format(call.input));
  if (output.numel() == 0) return output;
  dispatch_storage(type, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const RoITensors<compute_t<scalar_t>> tensors(call.rois, call.offset, compute_type(type));
    const auto regions = tensors.template view<scalar_t>(g);
    const auto images = image_view<const scalar_t>(call.input);
    if (has_vectors<scalar_t>(call.input) && has_vectors<scalar_t>(output)) {
      launch(PoolVectors<scalar_t, kMaxVector<scalar_t>>{{regions, images}, data<scalar_t>(output)}, device);
    } else {
      launch(PoolPatches<scalar_t>{{regions, images}, bin_view<scalar_t>(output)}, device);
    }
  });
  return output;
}

template <typename scalar_t, typename T = compute_t<scalar_t>>
void write_grad_input(const RoIs<scalar_t>& regions, const BinView<const scalar_t>& grad_output,
                      const Tensor& grad_input, int32_t device) {
  const RoIGeometry& g = regions.geometry;
  const Tensor workspace = torch::stable::empty({BinTable<T>::bytes(g.rois, regions.bins())}, ScalarType::Byte,
                                                std::nullopt, grad_input.device());
  const BinTable<T> located(workspace.data_ptr(), g.rois, regions.bins());
  if (g.rois > 0) launch(LocateRegions<scalar_t>{regions, located}, device);
  const auto images = image_view<scalar_t>(grad_input);
  if (has_vectors<scalar_t>(grad_input)) {
    launch(GatherGradient<scalar_t, kMaxVector<scalar_t>>{g, grad_output, located, images}, device);
  } else {
    launch(GatherGradient<scalar_t, 1>{g, grad_output, located, images}, device);
  }
}

template <typename scalar_t, typename T = compute_t<scalar_t>>
void write_grad_offset(const RoIs<scalar_t>& regions, const BinView<const scalar_t>& grad_output, const Tensor& input,
                       const Tensor& grad_offset, int32_t device) {
  const auto images = image_view<const scalar_t>(input);
  if (has_vectors<scalar_t>(input)) {
    launch(OffsetGradientVectors<scalar_t, kMaxVector<scalar_t>>{{regions, images}, grad_output, data<T>(grad_offset)},
           device);
    return;
  }
  OffsetGradientPatches<scalar_t> gradient{{regions, images}, grad_output, data<T>(grad_offset)};
  const int64_t count = gradient.channel_blocks(), size = grad_offset.numel();
  if (count == 1) {
    launch(gradient, device);
    return;
  }
  const Tensor partials = empty_matrix(grad_offset, grad_offset.scalar_type(), count, size);
  gradient.partial_grad_offset = data<T>(partials);
  launch(gradient, device);
  launch(SumPartials<T>{data<T>(partials), data<T>(grad_offset), count, size}, device);
}

DeformRoIPoolGradients deform_roi_pool_backward(const DeformRoIPoolCall& call, const Tensor& grad_output,
                                                const std::vector<bool>& output_mask) {
  const RoIGeometry& g = call.geometry;
  check_counts(g);
  const int32_t device = call.input.get_device_index();
  const DeviceGuard guard(device);
  const ScalarType type = call.input.scalar_type();
  const Tensor grad_input = empty_gradient(output_mask[0], call.input, type, memory_format(call.input));
  const Tensor grad_offset = empty_gradient(output_mask[1], call.offset.value_or(call.rois), compute_type(type));
  const Tensor grads = has_bin_stride(grad_output) ? grad_output : torch::stable::contiguous(grad_output);
  dispatch_storage(type, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const RoITensors<compute_t<scalar_t>> tensors(call.rois, call.offset, compute_type(type));
    const auto regions = tensors.template view<scalar_t>(g);
    const auto bins = bin_view<const scalar_t>(grads);
    if (grad_input.numel() > 0) write_grad_input(regions, bins, grad_input, device);
    if (grad_offset.numel() > 0) write_grad_offset(regions, bins, call.input, grad_offset, device);
  });
  if (!output_mask[1] || grad_offset.scalar_type() == call.offset->scalar_type()) return {grad_input, grad_offset};
  return {grad_input, torch::stable::to(grad_offset, call.offset->scalar_type())};
}

}  // namespace

MMDCN_CUDA_KERNELS(library) { DeformRoIPoolKernels<&deform_roi_pool, &deform_roi_pool_backward>::add_to(library); }

}  // namespace mmdcn
