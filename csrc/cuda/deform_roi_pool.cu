// SPDX-License-Identifier: Apache-2.0
// What the host does. See Note [Deformable RoI pooling on CUDA].
#include "deform_roi_pool.cuh"

#include <optional>
#include <vector>

#include "../core/dispatch.h"
#include "../core/readable_errors.h"
#include "../ops/deform_roi_pool.h"
#include "device.cuh"

namespace mmdcn {
namespace {

// As it is, if it has the type and is contiguous.
Tensor contiguous_values(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type && tensor.is_contiguous() ? tensor : contiguous_as(tensor, type);
}

// The tensors that say where each bin samples.
template <typename T>
class Places {
 public:
  Places(const Tensor& rois, const std::optional<Tensor>& offset, ScalarType type)
      : rois_(contiguous_values(rois, type)),
        offset_(offset ? std::optional(contiguous_values(*offset, type)) : std::nullopt) {}

  template <typename scalar_t>
  RoIs<scalar_t> of(const RoIGeometry& g) const {
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

// Whether bins [N, C, ph, pw] have one stride, over the rows too.
bool has_bin_stride(const Tensor& bins) {
  return bins.size(2) == 1 || bins.size(3) == 1 || bins.stride(2) == bins.size(3) * bins.stride(3);
}

template <typename scalar_t>
BinView<scalar_t> bin_view(const Tensor& bins) {
  return {static_cast<scalar_t*>(bins.data_ptr()), bins.stride(0), bins.stride(1),
          bins.size(3) == 1 ? bins.stride(2) : bins.stride(3)};
}

// Whether the channels of each pixel may be read and written in vectors.
template <typename scalar_t>
bool has_vectors(const Tensor& images) {
  constexpr int kVector = kMaxVector<scalar_t>;
  const bool fits = images.size(1) % kVector == 0 && images.stride(1) == 1;
  const bool aligned = reinterpret_cast<uintptr_t>(images.data_ptr()) % kVectorBytes == 0;
  return fits && aligned && images.stride(0) % kVector == 0 && images.stride(2) % kVector == 0 &&
         images.stride(3) % kVector == 0;
}

// Kernels count bins and channels in 32 bits.
void check_counts(const RoIGeometry& g) {
  STD_TORCH_CHECK(g.channels <= INT32_MAX, "input must have fewer than 2^31 channels, got ", g.channels);
  STD_TORCH_CHECK(g.rois == 0 || g.bins() <= INT32_MAX / g.rois,
                  "rois and output_size must give fewer than 2^31 bins, got ", g.rois, " regions of ", g.bins());
}

Tensor deform_roi_pool(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
                       const std::vector<int64_t>& output_size, double spatial_scale, int64_t sampling_ratio,
                       double gamma, bool aligned) {
  const RoIGeometry g =
      deform_roi_pool_geometry(input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, aligned);
  check_counts(g);
  const int32_t device = input.get_device_index();
  const DeviceGuard guard(device);
  const ScalarType type = input.scalar_type();
  const Tensor output = torch::stable::empty({g.rois, g.channels, g.out_height, g.out_width}, type, std::nullopt,
                                             input.device(), std::nullopt, memory_format(input));
  if (output.numel() == 0) return output;
  dispatch_storage(type, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const Places<compute_t<scalar_t>> places(rois, offset, compute_type(type));
    const auto on = places.template of<scalar_t>(g);
    const auto images = image_view<const scalar_t>(input);
    if (has_vectors<scalar_t>(input) && has_vectors<scalar_t>(output)) {
      launch(PoolVectors<scalar_t, kMaxVector<scalar_t>>{{on, images}, data<scalar_t>(output)}, device);
    } else {
      launch(PoolPatches<scalar_t>{{on, images}, bin_view<scalar_t>(output)}, device);
    }
  });
  return output;
}

template <typename scalar_t, typename T = compute_t<scalar_t>>
void write_grad_input(const RoIs<scalar_t>& on, const BinView<const scalar_t>& grad_output, const Tensor& grad_input,
                      int32_t device) {
  const RoIGeometry& g = on.geometry;
  const Tensor workspace =
      torch::stable::empty({Located<T>::bytes(g.rois, on.bins())}, ScalarType::Byte, std::nullopt, grad_input.device());
  const Located<T> located(workspace.data_ptr(), g.rois, on.bins());
  if (g.rois > 0) launch(LocateRegions<scalar_t>{on, located}, device);
  const auto images = image_view<scalar_t>(grad_input);
  if (has_vectors<scalar_t>(grad_input)) {
    launch(GatherGradient<scalar_t, kMaxVector<scalar_t>>{g, grad_output, located, images}, device);
  } else {
    launch(GatherGradient<scalar_t, 1>{g, grad_output, located, images}, device);
  }
}

template <typename scalar_t, typename T = compute_t<scalar_t>>
void write_grad_offset(const RoIs<scalar_t>& on, const BinView<const scalar_t>& grad_output, const Tensor& input,
                       const Tensor& grad_offset, int32_t device) {
  const auto images = image_view<const scalar_t>(input);
  if (has_vectors<scalar_t>(input)) {
    launch(MoveVectors<scalar_t, kMaxVector<scalar_t>>{{on, images}, grad_output, data<T>(grad_offset)}, device);
    return;
  }
  MovePatches<scalar_t> move{{on, images}, grad_output, data<T>(grad_offset)};
  const int64_t count = move.channel_blocks(), size = grad_offset.numel();
  if (count == 1) {
    launch(move, device);
    return;
  }
  const Tensor parts = empty_matrix(grad_offset, grad_offset.scalar_type(), count, size);
  move.parts_of_grad_offset = data<T>(parts);
  launch(move, device);
  launch(AddParts<T>{data<T>(parts), data<T>(grad_offset), count, size}, device);
}

// The sums are made in an order that never changes, so that `deterministic` asks for nothing more.
DeformRoIPoolGradients deform_roi_pool_backward(const Tensor& grad_output, const Tensor& input, const Tensor& rois,
                                                const std::optional<Tensor>& offset, double spatial_scale,
                                                int64_t sampling_ratio, double gamma,
                                                const std::vector<bool>& output_mask, bool deterministic,
                                                bool aligned) {
  check_deform_roi_pool_backward(grad_output, input, rois, offset, output_mask);
  const RoIGeometry g = deform_roi_pool_geometry(input, rois, offset, {grad_output.size(2), grad_output.size(3)},
                                                 spatial_scale, sampling_ratio, gamma, aligned);
  check_counts(g);
  const int32_t device = input.get_device_index();
  const DeviceGuard guard(device);
  const ScalarType type = input.scalar_type();
  const Tensor grad_input = empty_gradient(output_mask[0], input, type, memory_format(input));
  const Tensor grad_offset = empty_gradient(output_mask[1], offset.value_or(rois), compute_type(type));
  const Tensor grads = has_bin_stride(grad_output) ? grad_output : torch::stable::contiguous(grad_output);
  dispatch_storage(type, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const Places<compute_t<scalar_t>> places(rois, offset, compute_type(type));
    const auto on = places.template of<scalar_t>(g);
    const auto bins = bin_view<const scalar_t>(grads);
    if (grad_input.numel() > 0) write_grad_input(on, bins, grad_input, device);
    if (grad_offset.numel() > 0) write_grad_offset(on, bins, input, grad_offset, device);
  });
  if (!output_mask[1] || grad_offset.scalar_type() == offset->scalar_type()) return {grad_input, grad_offset};
  return {grad_input, torch::stable::to(grad_offset, offset->scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&Readable<&deform_roi_pool>::call));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&Readable<&deform_roi_pool_backward>::call));
}

}  // namespace mmdcn
