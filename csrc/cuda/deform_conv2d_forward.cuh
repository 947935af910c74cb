// SPDX-License-Identifier: Apache-2.0
// The forward on the host: with columns, or fused if the device's tensor cores support the call.
#pragma once

#include <optional>

#include "deform_conv2d_call.cuh"
#include "deform_conv2d_fused.h"
#include "deform_conv2d_fused_weight.cuh"

namespace mmdcn {

template <typename scalar_t>
void forward_by_columns(DeviceCall<scalar_t>& call, const std::optional<Tensor>& bias, const Tensor& output) {
  const ConvGeometry& g = call.geometry;
  ImageRows<scalar_t> result(output, !is_rows(output));
  const Tiling tiling(g, call.input.copied_bytes() + result.copied_bytes(), call.column_bytes());
  Workspace workspace;
  call.input.add_to(workspace, tiling.images);
  call.weight.add_to(workspace, g.out_channels);
  result.add_to(workspace, tiling.images);
  const int64_t columns = workspace.add<scalar_t>(tiling.tile_positions * g.taps() * g.in_channels);
  workspace.allocate(output);

  Matrices weight = call.weights(call.weight.read(workspace, 0, g.out_channels), call.type());
  weight.transposed = true;
  for_each_sub_batch(g, tiling, [&](int64_t first, int64_t images) {
    scalar_t* const rows = call.input.read(workspace, first, images);
    scalar_t* const sums = result.at(workspace, first);
    if (bias) {  // before the product, so that the sum is rounded once
      copy_images(data<scalar_t>(*bias), {0, 0, 0, bias->stride(0)}, sums,
                  ImageStrides::rows(g.out_channels, g.out_height, g.out_width), images, g.out_channels, g.out_height,
                  g.out_width, call.device);
    }
    const auto sub_batch = call.sampling(rows, first, images, workspace.take<scalar_t>(columns));
    call.for_each_tile(sub_batch, tiling.tile_positions, [&](const Sampling<scalar_t>& tile) {
      launch_sample_columns(tile);
      matrix_product(call.columns(tile), weight, call.by_group(sums, tile), g.groups, tile.count,
                     g.group_out_channels(), call.depth(), bias.has_value(), call.allow_tf32);
    });
    if (result.copied()) result.write(sums, first, images);
  });
}

template <typename scalar_t>
constexpr bool kIsHalfType = sizeof(scalar_t) == 2;

FusedForward fused_call(const ConvGeometry& g) {
  const auto number = [](int64_t n) { return static_cast<int32_t>(n); };
  constexpr int32_t kBand = 8;  // on an H100, 4 to 16 are equally fast
  const int64_t bands = ceil_div(g.out_height, kBand);
  FusedForward call{};
  call.batch = number(g.batch), call.channels = number(g.in_channels), call.out_channels = number(g.out_channels);
  call.height = number(g.height), call.width = number(g.width);
  call.out_height = number(g.out_height), call.out_width = number(g.out_width);
  call.taps = number(g.taps()), call.kernel_width = number(g.kernel_width);
  call.stride_y = number(g.stride_y), call.stride_x = number(g.stride_x);
  call.padding_y = number(g.padding_y), call.padding_x = number(g.padding_x);
  call.dilation_y = number(g.dilation_y), call.dilation_x = number(g.dilation_x);
  call.offset_groups = number(g.offset_groups);
  call.band = number(ceil_div(g.out_height, bands));
  return call;
}

template <typename scalar_t>
void forward_fused(DeviceCall<scalar_t>& call, FusedForm form, const std::optional<Tensor>& bias,
                   const Tensor& output) {
  const ConvGeometry& g = call.geometry;
  const int64_t weight_size = g.out_channels * call.weight.image_size();
  ImageRows<scalar_t> result(output, !is_rows(output));
  const Tiling tiling(g, call.input.copied_bytes() + result.copied_bytes(), 0);
  Workspace workspace;
  const int64_t packed = workspace.add<scalar_t>(weight_size + g.in_channels);
  call.input.add_to(workspace, tiling.images);
  result.add_to(workspace, tiling.images);
  workspace.allocate(output);
  scalar_t* const packed_weight = workspace.take<scalar_t>(packed);
  const scalar_t* const zeros = packed_weight + weight_size;
  const auto vectors_to_zeros = [&](const scalar_t* rows) {
    return (reinterpret_cast<intptr_t>(zeros) - reinterpret_cast<intptr_t>(rows)) / kVectorBytes;
  };
  const int64_t reach = tiling.images * call.input.image_size() / kMaxVector<scalar_t>;
  bool are_near = true;
  for_each_sub_batch(g, tiling, [&](int64_t first, int64_t) {
    const int64_t distance = vectors_to_zeros(call.input.at(workspace, first));
    are_near = are_near && INT32_MIN <= distance && distance <= INT32_MAX - reach;
  });
  if (!are_near && !call.input.copied()) {  // the zeros are too far from the input for 32 bits, but not from a copy
    call.input.copy();
    forward_fused(call, form, bias, output);
    return;
  }

  launch(PackWeight<scalar_t>{call.weight.data(), call.weight.strides(), static_cast<uint32_t>(g.out_channels),
                              static_cast<uint32_t>(g.in_channels), static_cast<uint32_t>(g.taps()),
                              static_cast<uint32_t>(g.kernel_width), form == FusedForm::kWgmma, packed_weight},
         call.device);
  for_each_sub_batch(g, tiling, [&](int64_t first, int64_t images) {
    FusedForward sub_batch = fused_call(with_batch(g, images));
    const scalar_t* const rows = call.input.read(workspace, first, images);
    scalar_t* const sums = result.at(workspace, first);
    sub_batch.input = rows, sub_batch.weight = packed_weight, sub_batch.output = sums;
    sub_batch.bias = bias ? bias->data_ptr() : nullptr;
    sub_batch.offset = planes<float>(call.offset, first), sub_batch.mask = planes<float>(call.mask, first);
    sub_batch.zeros = static_cast<int32_t>(vectors_to_zeros(rows));
    run_fused(sub_batch, form, std::is_same_v<scalar_t, torch::headeronly::Half>, call.device);
    if (result.copied()) result.write(sums, first, images);
  });
}

// The fused kernel's form for the call; kNone if the call must use columns.
template <typename scalar_t>
FusedForm fused_form_of(const DeviceCall<scalar_t>& call, const std::optional<Tensor>& bias) {
  if (call.geometry.groups > 1 || (bias && bias->stride(0) != 1)) return FusedForm::kNone;
  return fused_form(fused_call(with_batch(call.geometry, Tiling(call.geometry, 0, 0).images)), call.device);
}

template <typename scalar_t>
void forward(DeviceCall<scalar_t>& call, const std::optional<Tensor>& bias, const Tensor& output) {
  if constexpr (kIsHalfType<scalar_t>) {
    const FusedForm form = fused_form_of(call, bias);
    if (form != FusedForm::kNone) return forward_fused(call, form, bias, output);
  }
  forward_by_columns(call, bias, output);
}

}  // namespace mmdcn
