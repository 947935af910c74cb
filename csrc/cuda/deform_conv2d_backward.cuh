// SPDX-License-Identifier: Apache-2.0
// The backward on the host.
#pragma once

#include <optional>
#include <utility>

#include "deform_conv2d_call.cuh"

namespace mmdcn {

// The backward launches more for each tile than the forward: on an H100, twice the memory makes it 5 % faster.
constexpr int64_t kBackwardScale = 2;

// The gradients that are needed, and where they are written.
struct Gradients {
  Tensor input, offset, mask, weight;
  bool needs_input, needs_offset, needs_mask, needs_weight;

  bool needs_columns() const { return needs_input || needs_offset || needs_mask; }
};

// Adds a tile's contribution to the gradient of the input, in a fixed order.
template <typename scalar_t>
void add_deterministically(const Sampling<scalar_t>& tile, const Corners<compute_t<scalar_t>>& corners,
                           const Tensor& like, compute_t<scalar_t>* grad_rows) {
  const int64_t count = 4 * tile.count * tile.geometry.samples_per_position();
  launch_list_corners(tile, corners);
  const Tensor pixels = torch::stable::from_blob(corners.pixels, {count}, {1}, like.device(), ScalarType::Int);
  const bool stable = true, descending = false;
  const Tensor order = call_torch("aten::argsort", "stable", pixels, stable, int64_t{0}, descending);
  launch_add_sorted_corners(tile, corners, data<int64_t>(order), grad_rows);
}

template <typename scalar_t>
void add_weight_gradient(const DeviceCall<scalar_t>& call, scalar_t* grads, const Sampling<scalar_t>& tile,
                         const Matrices& grad_weight, bool adds) {
  Matrices transposed = call.by_group(grads, tile);
  transposed.transposed = true;
  matrix_product(transposed, call.columns(tile), grad_weight, call.geometry.groups, call.geometry.group_out_channels(),
                 call.depth(), tile.count, adds, call.allow_tf32);
}

template <typename scalar_t>
void backward(DeviceCall<scalar_t>& call, const Tensor& grad_output, const Gradients& gradients, bool deterministic) {
  using T = compute_t<scalar_t>;
  const ConvGeometry& g = call.geometry;
  ImageRows<scalar_t> grad_rows(grad_output, !is_rows(grad_output));
  std::optional<ImageRows<scalar_t>> grad_input;
  if (gradients.needs_input) grad_input.emplace(gradients.input, false);
  // The gradient of the input is summed in the compute type, in the tensor itself or in rows to copy from.
  const bool sums = gradients.needs_input && !(std::is_same_v<T, scalar_t> && is_rows(gradients.input));
  const bool sorts = gradients.needs_input && deterministic;
  const int64_t position_corners = 4 * g.samples_per_position();
  const int64_t image_sum = g.height * g.width * g.in_channels;
  const int64_t sorted_bytes = sorts ? position_corners * 32 : 0;  // the corners and the memory that sorting them takes
  const Tiling tiling(g, call.input.copied_bytes() + grad_rows.copied_bytes() + (sums ? image_sum * sizeof(T) : 0),
                      call.column_bytes() + sorted_bytes, kBackwardScale);
  Workspace workspace;
  call.input.add_to(workspace, tiling.images);
  call.weight.add_to(workspace, g.out_channels);
  grad_rows.add_to(workspace, tiling.images);
  const int64_t sum = workspace.add<T>(sums ? tiling.images * image_sum : 0);
  const int64_t columns = workspace.add<scalar_t>(tiling.tile_positions * g.taps() * g.in_channels);
  const int64_t weight_sum = workspace.add<T>(gradients.needs_weight ? g.out_channels * call.depth() : 0);
  const int64_t pixels = workspace.add<int32_t>(sorts ? tiling.tile_positions * position_corners : 0);
  const int64_t weights = workspace.add<T>(sorts ? tiling.tile_positions * position_corners : 0);
  workspace.allocate(grad_output);

  const Matrices weight = call.weights(call.weight.read(workspace, 0, g.out_channels), call.type());
  const Matrices grad_weight = call.weights(workspace.take<T>(weight_sum), call.compute());
  const Corners<T> corners{workspace.take<int32_t>(pixels), workspace.take<T>(weights)};
  const int64_t image_places = g.samples_per_position() * g.positions();
  bool adds = false;
  for_each_sub_batch(g, tiling, [&](int64_t first, int64_t images) {
    scalar_t* const rows = call.input.read(workspace, first, images);
    scalar_t* const grads = grad_rows.read(workspace, first, images);
    T* const grad_offset = gradients.needs_offset ? data<T>(gradients.offset) + first * 2 * image_places : nullptr;
    T* const grad_mask = gradients.needs_mask ? data<T>(gradients.mask) + first * image_places : nullptr;
    T* input_sum = nullptr;
    if (grad_input) {
      input_sum = sums ? workspace.take<T>(sum) : reinterpret_cast<T*>(grad_input->at(workspace, first));
      clear(input_sum, images * image_sum * sizeof(T), call.device);
    }
    const auto sub_batch = call.sampling(rows, first, images, workspace.take<scalar_t>(columns));
    call.for_each_tile(sub_batch, tiling.tile_positions, [&](const Sampling<scalar_t>& tile) {
      if (gradients.needs_columns()) {
        matrix_product(call.by_group(grads, tile), weight, call.columns(tile), g.groups, tile.count, call.depth(),
                       g.group_out_channels(), false, call.allow_tf32);
      }
      if (sorts) add_deterministically(tile, corners, grad_output, input_sum);
      launch_gradients(tile, sorts ? nullptr : input_sum, grad_offset, grad_mask, gradients.needs_weight);
      if (gradients.needs_weight) add_weight_gradient(call, grads, tile, grad_weight, std::exchange(adds, true));
    });
    if (sums) grad_input->write(input_sum, first, images);
  });
  if (gradients.needs_weight) {
    ImageRows<scalar_t>(gradients.weight, false).write(static_cast<const T*>(grad_weight.data), 0, g.out_channels);
  }
}

}  // namespace mmdcn
