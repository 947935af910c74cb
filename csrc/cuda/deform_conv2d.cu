// SPDX-License-Identifier: Apache-2.0
// What the host does: tiles, launches and matrix products. See Note [Deformable convolution on CUDA].
#include "deform_conv2d_launch.cuh"

#include <algorithm>
#include <optional>
#include <vector>

#include "../core/dispatch.h"
#include "../core/nhwc.h"
#include "../core/readable_errors.h"
#include "../ops/deform_conv2d.h"
#include "device.cuh"

namespace mmdcn {
namespace {

constexpr int64_t kMinTileBytes = 16 << 20;  // on a GPU of little L2: fewer rows would not occupy its multiprocessors
constexpr int64_t kMinTilePositions = 32;    // of a tile, however many channels they have

// The columns of a tile. The other half of L2 is for pixels, weight and results.
int64_t tile_bytes(int32_t device) { return std::max(l2_bytes(device) / 2, kMinTileBytes); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
Planes<T> planes(const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  return {data<T>(*tensor), tensor->stride(0), tensor->stride(1), tensor->stride(2), tensor->stride(3)};
}

// The first elements of a buffer.
Tensor buffer_view(const Tensor& buffer, const std::vector<int64_t>& sizes) {
  int64_t elements = 1;
  for (const int64_t size : sizes) {
    elements *= size;
  }
  return torch::stable::view(slice(buffer, 0, 0, elements), sizes);
}

Tensor empty_buffer(const Tensor& like, ScalarType type, int64_t elements) {
  return torch::stable::empty({elements}, type, std::nullopt, like.device());
}

// Runs kernels over the tiles of one call.
template <typename scalar_t>
class Tiles {
 public:
  using T = compute_t<scalar_t>;

  // Each element of the columns has `workspace` more bytes beside it.
  Tiles(const ConvGeometry& g, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
        const Tensor& weight, int64_t workspace = 0)
      : g_(g),
        device_(input.get_device_index()),
        offset_(torch::stable::to(offset, compute_type(input.scalar_type()))),
        mask_(mask ? std::optional<Tensor>(torch::stable::to(*mask, offset_.scalar_type())) : std::nullopt),
        rows_(nhwc_rows<scalar_t>(input, 0, g.batch, input.scalar_type())),
        weight_(torch::stable::reshape(permute(weight, {0, 2, 3, 1}), {g.groups, g.group_out_channels(), -1})) {
    const int64_t bytes = g.taps() * g.in_channels * (int64_t{sizeof(scalar_t)} + workspace);  // of one position
    const int64_t wanted = std::max(tile_bytes(device_) / bytes, kMinTilePositions);
    const int64_t tiles = ceil_div(total(), wanted);
    int64_t quantum = 4 * g.out_width;
    while (quantum > wanted) {
      quantum = quantum % g.out_width == 0 && quantum > g.out_width ? quantum - g.out_width : 1;
    }
    positions_ = tiles == 0 ? 0 : std::min(ceil_div(ceil_div(total(), tiles), quantum) * quantum, total());
    STD_TORCH_CHECK(fits(g, rows_.pixel_stride, positions_),
                    "a batch must have fewer than 2^31 elements in its images, and in the positions that a tile has");
    columns_ = empty_buffer(input, input.scalar_type(), positions_ * g.taps() * g.in_channels);
  }

  int64_t total() const { return g_.batch * g_.positions(); }
  int64_t positions() const { return positions_; }  // of the largest tile
  const Tensor& weight() const { return weight_; }  // [groups, C_out/groups, K * C_in/groups]

  // Calls body(first, count, columns) with each tile's positions and columns [groups, count, K * C_in/groups].
  template <typename Body>
  void for_each(const Body& body) {
    for (int64_t first = 0; first < total(); first += positions_) {
      const int64_t count = std::min(positions_, total() - first);
      body(first, count, buffer_view(columns_, {g_.groups, count, g_.taps() * g_.group_in_channels()}));
    }
  }

  Sampling<scalar_t> sampling(int64_t first, int64_t count) const {
    return {.geometry = g_,
            .offset = planes<T>(offset_),
            .mask = planes<T>(mask_),
            .input = rows_.data,
            .pixel_stride = rows_.pixel_stride,
            .columns = data<scalar_t>(columns_),
            .first = first,
            .count = count,
            .device = device_};
  }

 private:
  ConvGeometry g_;
  int32_t device_;
  Tensor offset_;
  std::optional<Tensor> mask_;
  Rows<scalar_t> rows_;
  Tensor weight_;
  int64_t positions_;
  Tensor columns_;
};

// Positions [count, C_out] as [groups, count, C_out/groups].
Tensor by_group(const Tensor& matrix, int64_t first, int64_t count, const ConvGeometry& g) {
  const Tensor rows = slice(matrix, 0, first, count);
  return permute(torch::stable::view(rows, {count, g.groups, g.group_out_channels()}), {1, 0, 2});
}

Tensor plus(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

void bmm_out(const Tensor& a, const Tensor& b, const Tensor& out) { call_torch("aten::bmm", "out", a, b, out); }

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                     int64_t offset_groups) {
  const ConvGeometry g =
      deform_conv2d_geometry(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
  check_bias(bias, input, g.out_channels);
  const DeviceGuard guard(input.get_device_index());
  const ScalarType type = input.scalar_type();
  const Tensor output = torch::stable::empty({g.batch, g.out_channels, g.out_height, g.out_width}, type, std::nullopt,
                                             input.device(), std::nullopt, memory_format(input));
  Tensor target = nhwc_view(output, 0, g.batch);
  const bool in_place = !bias && is_nhwc_matrix(output, type);
  const Tensor matrix = in_place ? torch::stable::view(target, {-1, g.out_channels})
                                 : empty_matrix(input, type, g.batch * g.positions(), g.out_channels);
  dispatch_storage(type, "input", [&](auto zero) {
    Tiles<decltype(zero)> tiles(g, input, offset, mask, weight);
    tiles.for_each([&](int64_t first, int64_t count, const Tensor& columns) {
      launch_sample_columns(tiles.sampling(first, count));
      bmm_out(columns, torch::stable::transpose(tiles.weight(), 1, 2), by_group(matrix, first, count, g));
    });
  });
  if (!in_place) {
    torch::stable::copy_(target, torch::stable::view(bias ? plus(matrix, *bias) : matrix, target.sizes()));
  }
  return output;
}

// Where the gradient of the input sums up, in the compute type: the tensor itself, or one to copy from.
class InputGradient {
 public:
  InputGradient(const ConvGeometry& g, const Tensor& grad_input, ScalarType type, bool needed, bool deterministic,
                int64_t tile_positions)
      : needed_(needed),
        target_(needed ? nhwc_view(grad_input, 0, g.batch) : grad_input),
        copies_(needed && !is_nhwc_matrix(grad_input, type)),
        sum_(copies_ ? empty_nhwc(grad_input, g.batch, type) : target_) {
    torch::stable::zero_(sum_);
    if (!needed || !deterministic) return;
    const int64_t corners = 4 * tile_positions * g.samples_per_position();
    weights_ = empty_buffer(grad_input, type, corners);
    pixels_ = empty_buffer(grad_input, ScalarType::Int, corners);
  }

  // Of a tile whose columns have their gradient.
  template <typename scalar_t>
  void add(const Sampling<scalar_t>& tile) const {
    using T = compute_t<scalar_t>;
    if (!needed_) return;
    if (!pixels_) return launch_input_gradient(tile, data<T>(sum_));
    const Corners<T> corners{data<int32_t>(*pixels_), data<T>(*weights_)};
    launch_list_corners(tile, corners);
    const bool stable = true, descending = false;
    const int64_t dim = 0, count = 4 * tile.count * tile.geometry.samples_per_position();
    const Tensor order = call_torch("aten::argsort", "stable", slice(*pixels_, 0, 0, count), stable, dim, descending);
    launch_add_sorted_corners(tile, corners, data<int64_t>(order), data<T>(sum_));
  }

  void write() {
    if (copies_) torch::stable::copy_(target_, sum_);
  }

 private:
  bool needed_;
  Tensor target_;
  bool copies_;
  Tensor sum_;                              // [B, H, W, C_in]
  std::optional<Tensor> pixels_, weights_;  // of the corners of a tile
};

// grad_weight [C_out, C_in/groups, kh, kw] from its sum [groups, C_out/groups, K * C_in/groups].
void write_grad_weight(const ConvGeometry& g, const std::optional<Tensor>& sum, Tensor grad_weight) {
  if (!sum) {
    torch::stable::zero_(grad_weight);
    return;
  }
  const Tensor taps_last =
      torch::stable::view(*sum, {g.out_channels, g.kernel_height, g.kernel_width, g.group_in_channels()});
  torch::stable::copy_(grad_weight, permute(taps_last, {0, 3, 1, 2}));
}

DeformConv2dGradients deform_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                             const std::optional<Tensor>& mask, const Tensor& weight,
                                             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation, int64_t groups,
                                             int64_t offset_groups, const std::vector<bool>& output_mask,
                                             bool deterministic) {
  const ConvGeometry g =
      deform_conv2d_geometry(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
  check_backward(grad_output, input, mask, output_mask, g);
  const DeviceGuard guard(input.get_device_index());
  const ScalarType type = compute_type(input.scalar_type());
  const Tensor grad_input = empty_gradient(output_mask[0], input, input.scalar_type(), memory_format(input));
  const Tensor grad_offset = empty_gradient(output_mask[1], offset, type);
  const Tensor grad_mask = empty_gradient(output_mask[2], mask.value_or(offset), type);
  const Tensor grad_weight = empty_gradient(output_mask[3], weight, weight.scalar_type());
  const Tensor grad_matrix = nhwc_matrix(grad_output, 0, g.batch, input.scalar_type());

  dispatch_storage(input.scalar_type(), "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = compute_t<scalar_t>;
    // The sort has as much again.
    const int64_t workspace =
        output_mask[0] && deterministic ? ceil_div(4 * (sizeof(T) + 36), g.offset_group_channels()) : 0;
    Tiles<scalar_t> tiles(g, input, offset, mask, weight, workspace);
    InputGradient sum(g, grad_input, type, output_mask[0], deterministic, tiles.positions());
    std::optional<Tensor> grad_weight_sum;
    T* const offset_sum = output_mask[1] ? data<T>(grad_offset) : nullptr;
    T* const mask_sum = output_mask[2] ? data<T>(grad_mask) : nullptr;
    tiles.for_each([&](int64_t first, int64_t count, const Tensor& columns) {
      const Tensor tile_grad = by_group(grad_matrix, first, count, g);
      const Sampling<scalar_t> tile = tiles.sampling(first, count);
      if (output_mask[0] || output_mask[1] || output_mask[2]) {
        bmm_out(tile_grad, tiles.weight(), columns);
        sum.add(tile);
        launch_backpropagate(tile, offset_sum, mask_sum, output_mask[3]);
      } else {
        launch_sample_columns(tile);
      }
      if (!output_mask[3]) return;
      const Tensor product = bmm_as(torch::stable::transpose(tile_grad, 1, 2), columns, type);
      grad_weight_sum = grad_weight_sum ? plus(*grad_weight_sum, product) : product;
    });
    sum.write();
    if (output_mask[3]) write_grad_weight(g, grad_weight_sum, grad_weight);
  });
  return {grad_input, torch::stable::to(grad_offset, offset.scalar_type()),
          torch::stable::to(grad_mask, offset.scalar_type()), grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, m) {
  m.impl("deform_conv2d", TORCH_BOX(&Readable<&deform_conv2d>::call));
  m.impl("deform_conv2d_backward", TORCH_BOX(&Readable<&deform_conv2d_backward>::call));
}

}  // namespace mmdcn
