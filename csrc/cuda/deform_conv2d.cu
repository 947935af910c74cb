// SPDX-License-Identifier: Apache-2.0
// What the host does: rounds of images, tiles of positions, launches and matrix products. See Note [Deformable
// convolution on CUDA].
//
// A call of torch costs as much as a kernel, so that there are few: the results are allocated, and one workspace, of
// which each part is a pointer. Images that are not NHWC rows are copied to such, and results from such, by rounds of
// images.
#include "deform_conv2d.cuh"

#include <algorithm>
#include <optional>
#include <vector>

#include "../core/dispatch.h"
#include "../core/readable_errors.h"
#include "../ops/deform_conv2d.h"
#include "copy_images.cuh"
#include "deform_conv2d_fused.h"
#include "deform_conv2d_fused_weight.cuh"
#include "deform_conv2d_launch.cuh"
#include "device.cuh"
#include "matrix_product.cuh"

namespace mmdcn {
namespace {

constexpr int64_t kTileRows = 4;  // a tile has a multiple of so many, as patches do

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor in_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// Whether the images are dense NHWC, at a multiple of kVectorBytes.
bool is_rows(const Tensor& images) {
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  const auto is = [&](int64_t dim, int64_t stride) { return images.size(dim) == 1 || images.stride(dim) == stride; };
  return is(1, 1) && is(3, channels) && is(2, width * channels) && is(0, height * width * channels) &&
         reinterpret_cast<uintptr_t>(images.data_ptr()) % kVectorBytes == 0;
}

// Parts of one buffer.
class Workspace {
 public:
  // The place of a part that `take` will give.
  template <typename T>
  int64_t add(int64_t count) {
    const int64_t place = bytes_;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return place;
  }

  void allocate(const Tensor& like) {
    buffer_ = torch::stable::empty({std::max<int64_t>(bytes_, 1)}, ScalarType::Byte, std::nullopt, like.device());
  }

  template <typename T>
  T* take(int64_t place) const {
    return reinterpret_cast<T*>(data<char>(*buffer_) + place);
  }

 private:
  static constexpr int64_t kAlignment = 256;

  int64_t bytes_ = 0;
  std::optional<Tensor> buffer_;
};

// Images [B, C, H, W] of any layout as NHWC rows, some at a time: the tensor's own, or a copy.
template <typename scalar_t>
class ImageRows {
 public:
  explicit ImageRows(const Tensor& images, bool copied)
      : data_(static_cast<scalar_t*>(images.data_ptr())),
        strides_(ImageStrides::of(images)),
        channels_(images.size(1)),
        height_(images.size(2)),
        width_(images.size(3)),
        device_(images.get_device_index()),
        copied_(copied) {}

  bool copied() const { return copied_; }
  int64_t image_size() const { return channels_ * height_ * width_; }
  int64_t copied_bytes() const { return copied_ ? image_size() * static_cast<int64_t>(sizeof(scalar_t)) : 0; }

  void add_to(Workspace& workspace, int64_t images) {
    if (copied_) place_ = workspace.add<scalar_t>(images * image_size());
  }

  // The rows of the images from `first` on.
  scalar_t* at(const Workspace& workspace, int64_t first) const {
    return copied_ ? workspace.take<scalar_t>(place_) : data_ + first * image_size();
  }

  scalar_t* read(const Workspace& workspace, int64_t first, int64_t count) const {
    if (copied_)
      copy_images(data_ + first * strides_.image, strides_, at(workspace, first), rows(), count, channels_, height_,
                  width_, device_);
    return at(workspace, first);
  }

  template <typename From>
  void write(const From* source, int64_t first, int64_t count) const {
    copy_images(source, rows(), data_ + first * strides_.image, strides_, count, channels_, height_, width_, device_);
  }

 private:
  ImageStrides rows() const { return ImageStrides::rows(channels_, height_, width_); }

  scalar_t* data_;
  ImageStrides strides_;
  int64_t channels_, height_, width_;
  int32_t device_;
  bool copied_;
  int64_t place_ = 0;
};

template <typename T>
Planes<T> planes(const std::optional<Tensor>& tensor, int64_t first_image) {
  if (!tensor) return {};
  return {data<T>(*tensor) + first_image * tensor->stride(0), tensor->stride(0), tensor->stride(1), tensor->stride(2),
          tensor->stride(3)};
}

// The images of a round, and the positions of a tile. `copied` and `columns` are bytes, of an image and of a position.
struct Rounds {
  int64_t images, tile_positions;

  Rounds(const ConvGeometry& g, int64_t copied, int64_t columns) {
    int64_t most = g.batch;
    if (copied > 0) most = std::min(most, kCopyBytes / copied);
    if (columns > 0) most = std::min(most, kTileBytes / (g.positions() * columns));
    most = std::max<int64_t>(most, 1);
    while (most > 1 && !fits(of(g, most), g.in_channels, g.positions())) {
      most /= 2;
    }
    images = ceil_div(g.batch, ceil_div(g.batch, most));
    const int64_t total = images * g.positions(), tiles = ceil_div(total * columns, kTileBytes);
    const int64_t rows = kTileRows * g.out_width, unit = rows * columns <= kTileBytes ? rows : 1;
    tile_positions = tiles <= 1 ? total : std::min(ceil_div(ceil_div(total, tiles), unit) * unit, total);
    STD_TORCH_CHECK(fits(of(g, images), g.in_channels, tile_positions),
                    "input and offset must have images of fewer than 2^31 elements, got ", g.in_channels, " x ",
                    g.height, " x ", g.width, " and ", g.out_height, " x ", g.out_width, " output positions");
  }

  static ConvGeometry of(ConvGeometry g, int64_t images) {
    g.batch = images;
    return g;
  }
};

// Calls body(first image, their number).
template <typename Body>
void for_each_round(const ConvGeometry& g, const Rounds& rounds, const Body& body) {
  for (int64_t first = 0; first < g.batch; first += rounds.images) {
    body(first, std::min(rounds.images, g.batch - first));
  }
}

// A call, and what its forward and its backward share.
template <typename scalar_t>
struct Call {
  using T = compute_t<scalar_t>;

  ConvGeometry geometry;
  int32_t device;
  bool allow_tf32;
  Tensor offset;
  std::optional<Tensor> mask;
  ImageRows<scalar_t> input;
  ImageRows<scalar_t> weight;  // [C_out, K, C_in/groups]

  Call(const ConvGeometry& g, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
       const Tensor& weight, bool allow_tf32)
      : geometry(g),
        device(input.get_device_index()),
        allow_tf32(allow_tf32),
        offset(in_type(offset, compute_type(input.scalar_type()))),
        mask(mask ? std::optional<Tensor>(in_type(*mask, this->offset.scalar_type())) : std::nullopt),
        input(input, !is_rows(input)),
        weight(weight, !is_rows(weight)) {}

  int64_t depth() const { return geometry.taps() * geometry.group_in_channels(); }  // of the products
  int64_t column_bytes() const {
    return geometry.taps() * geometry.in_channels * static_cast<int64_t>(sizeof(scalar_t));
  }
  ScalarType type() const { return torch::headeronly::CppTypeToScalarType<scalar_t>::value; }
  ScalarType compute() const { return torch::headeronly::CppTypeToScalarType<T>::value; }

  Sampling<scalar_t> sampling(scalar_t* rows, int64_t first_image, int64_t images, scalar_t* columns) const {
    return {.geometry = Rounds::of(geometry, images),
            .offset = planes<T>(offset, first_image),
            .mask = planes<T>(mask, first_image),
            .input = rows,
            .pixel_stride = geometry.in_channels,
            .columns = columns,
            .first = 0,
            .count = 0,
            .device = device};
  }

  // Calls body(tile) for the tiles of a round.
  template <typename Body>
  void for_each_tile(Sampling<scalar_t> round, int64_t tile_positions, const Body& body) const {
    const int64_t total = round.geometry.batch * round.geometry.positions();
    for (; round.first < total; round.first += tile_positions) {
      round.count = std::min(tile_positions, total - round.first);
      body(round);
    }
  }

  // Matrices of each group: rows [positions, C_out] from a tile's first on, columns, and the weight or its gradient.
  Matrices by_group(scalar_t* rows, const Sampling<scalar_t>& tile) const {
    return {rows + tile.first * geometry.out_channels, geometry.out_channels, geometry.group_out_channels(), type()};
  }
  Matrices columns(const Sampling<scalar_t>& tile) const {
    return {tile.columns, depth(), tile.count * depth(), type()};
  }
  Matrices weights(void* data, ScalarType type) const {
    return {data, depth(), geometry.group_out_channels() * depth(), type};
  }
};

template <typename scalar_t>
void forward_by_columns(Call<scalar_t>& call, const std::optional<Tensor>& bias, const Tensor& output) {
  const ConvGeometry& g = call.geometry;
  ImageRows<scalar_t> result(output, !is_rows(output));
  const Rounds rounds(g, call.input.copied_bytes() + result.copied_bytes(), call.column_bytes());
  Workspace workspace;
  call.input.add_to(workspace, rounds.images);
  call.weight.add_to(workspace, g.out_channels);
  result.add_to(workspace, rounds.images);
  const int64_t columns = workspace.add<scalar_t>(rounds.tile_positions * g.taps() * g.in_channels);
  workspace.allocate(output);

  Matrices weight = call.weights(call.weight.read(workspace, 0, g.out_channels), call.type());
  weight.transposed = true;
  for_each_round(g, rounds, [&](int64_t first, int64_t images) {
    scalar_t* const rows = call.input.read(workspace, first, images);
    scalar_t* const sums = result.at(workspace, first);
    if (bias) {  // so that the product's sum has it before it is rounded
      copy_images(data<scalar_t>(*bias), {0, 0, 0, bias->stride(0)}, sums,
                  ImageStrides::rows(g.out_channels, g.out_height, g.out_width), images, g.out_channels, g.out_height,
                  g.out_width, call.device);
    }
    const auto round = call.sampling(rows, first, images, workspace.take<scalar_t>(columns));
    call.for_each_tile(round, rounds.tile_positions, [&](const Sampling<scalar_t>& tile) {
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
  constexpr int32_t kBand = 8;  // on an H100, 4 to 16 are alike
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

// False if the zeros are too far from the input for 32 bits, so that the input must be copied.
template <typename scalar_t>
bool forward_fused(Call<scalar_t>& call, FusedForm form, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& output, bool copy_input, const Tensor& input) {
  const ConvGeometry& g = call.geometry;
  ImageRows<scalar_t> images_in(input, copy_input), result(output, !is_rows(output));
  const Rounds rounds(g, images_in.copied_bytes() + result.copied_bytes(), 0);
  Workspace workspace;
  const int64_t packed = workspace.add<scalar_t>(weight.numel() + g.in_channels);
  images_in.add_to(workspace, rounds.images);
  result.add_to(workspace, rounds.images);
  workspace.allocate(output);
  scalar_t* const packed_weight = workspace.take<scalar_t>(packed);
  const scalar_t* const zeros = packed_weight + weight.numel();
  const auto vectors_to_zeros = [&](const scalar_t* rows) {
    return (reinterpret_cast<intptr_t>(zeros) - reinterpret_cast<intptr_t>(rows)) / kVectorBytes;
  };
  const int64_t reach = rounds.images * images_in.image_size() / kMaxVector<scalar_t>;
  for_each_round(g, rounds, [&](int64_t first, int64_t) {
    const int64_t distance = vectors_to_zeros(images_in.at(workspace, first));
    copy_input = copy_input || distance > INT32_MAX - reach || distance < INT32_MIN;
  });
  if (copy_input && !images_in.copied()) return false;

  launch(PackWeight<scalar_t>{data<scalar_t>(weight), ImageStrides::of(weight), static_cast<uint32_t>(g.out_channels),
                              static_cast<uint32_t>(g.in_channels), static_cast<uint32_t>(g.taps()),
                              static_cast<uint32_t>(g.kernel_width), form == FusedForm::kWgmma, packed_weight},
         call.device);
  for_each_round(g, rounds, [&](int64_t first, int64_t images) {
    FusedForward round = fused_call(Rounds::of(g, images));
    const scalar_t* const rows = images_in.read(workspace, first, images);
    scalar_t* const sums = result.at(workspace, first);
    round.input = rows, round.weight = packed_weight, round.output = sums;
    round.bias = bias ? bias->data_ptr() : nullptr;
    round.offset = planes<float>(call.offset, first), round.mask = planes<float>(call.mask, first);
    round.zeros = static_cast<int32_t>(vectors_to_zeros(rows));
    run_fused(round, form, std::is_same_v<scalar_t, torch::headeronly::Half>, call.device);
    if (result.copied()) result.write(sums, first, images);
  });
  return true;
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                     int64_t offset_groups, bool allow_tf32) {
  const ConvGeometry g =
      deform_conv2d_geometry(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
  check_bias(bias, input, g.out_channels);
  const DeviceGuard guard(input.get_device_index());
  const ScalarType type = input.scalar_type();
  const Tensor output = torch::stable::empty({g.batch, g.out_channels, g.out_height, g.out_width}, type, std::nullopt,
                                             input.device(), std::nullopt, memory_format(input));
  if (g.batch == 0) return output;
  dispatch_storage(type, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    Call<scalar_t> call(g, input, offset, mask, weight, allow_tf32);
    if constexpr (kIsHalfType<scalar_t>) {
      const ConvGeometry round = Rounds::of(g, Rounds(g, 0, 0).images);
      const FusedForm form = g.groups == 1 ? fused_form(fused_call(round), call.device) : FusedForm::kNone;
      if (form != FusedForm::kNone && (!bias || bias->stride(0) == 1)) {
        if (!forward_fused(call, form, weight, bias, output, call.input.copied(), input)) {
          forward_fused(call, form, weight, bias, output, true, input);
        }
        return;
      }
    }
    forward_by_columns(call, bias, output);
  });
  return output;
}

// The gradients that are needed, and where they go.
struct Gradients {
  Tensor input, offset, mask, weight;
  bool needs_input, needs_offset, needs_mask, needs_weight;

  bool needs_columns() const { return needs_input || needs_offset || needs_mask; }
};

// Adds the gradient of a tile to that of the input, in an order that does not change.
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
void backward(Call<scalar_t>& call, const Tensor& grad_output, const Gradients& gradients, bool deterministic) {
  using T = compute_t<scalar_t>;
  const ConvGeometry& g = call.geometry;
  ImageRows<scalar_t> grad_rows(grad_output, !is_rows(grad_output));
  std::optional<ImageRows<scalar_t>> grad_input;
  if (gradients.needs_input) grad_input.emplace(gradients.input, false);
  // The gradient of the input sums up in the compute type: in the tensor itself, or in rows to copy from.
  const bool sums = gradients.needs_input && !(std::is_same_v<T, scalar_t> && is_rows(gradients.input));
  const bool sorts = gradients.needs_input && deterministic;
  const int64_t position_corners = 4 * g.samples_per_position();
  const int64_t image_sum = g.height * g.width * g.in_channels;
  const int64_t sorted_bytes = sorts ? position_corners * 32 : 0;  // the corners, and what sorting them takes
  const Rounds rounds(g, call.input.copied_bytes() + grad_rows.copied_bytes() + (sums ? image_sum * sizeof(T) : 0),
                      call.column_bytes() + sorted_bytes);
  Workspace workspace;
  call.input.add_to(workspace, rounds.images);
  call.weight.add_to(workspace, g.out_channels);
  grad_rows.add_to(workspace, rounds.images);
  const int64_t sum = workspace.add<T>(sums ? rounds.images * image_sum : 0);
  const int64_t columns = workspace.add<scalar_t>(rounds.tile_positions * g.taps() * g.in_channels);
  const int64_t weight_sum = workspace.add<T>(gradients.needs_weight ? g.out_channels * call.depth() : 0);
  const int64_t pixels = workspace.add<int32_t>(sorts ? rounds.tile_positions * position_corners : 0);
  const int64_t weights = workspace.add<T>(sorts ? rounds.tile_positions * position_corners : 0);
  workspace.allocate(grad_output);

  const Matrices weight = call.weights(call.weight.read(workspace, 0, g.out_channels), call.type());
  const Matrices grad_weight = call.weights(workspace.take<T>(weight_sum), call.compute());
  const Corners<T> corners{workspace.take<int32_t>(pixels), workspace.take<T>(weights)};
  const int64_t image_places = g.samples_per_position() * g.positions();
  bool adds = false;
  for_each_round(g, rounds, [&](int64_t first, int64_t images) {
    scalar_t* const rows = call.input.read(workspace, first, images);
    scalar_t* const grads = grad_rows.read(workspace, first, images);
    T* const grad_offset = gradients.needs_offset ? data<T>(gradients.offset) + first * 2 * image_places : nullptr;
    T* const grad_mask = gradients.needs_mask ? data<T>(gradients.mask) + first * image_places : nullptr;
    T* input_sum = nullptr;
    if (grad_input) {
      input_sum = sums ? workspace.take<T>(sum) : reinterpret_cast<T*>(grad_input->at(workspace, first));
      clear(input_sum, images * image_sum * sizeof(T), call.device);
    }
    const auto round = call.sampling(rows, first, images, workspace.take<scalar_t>(columns));
    call.for_each_tile(round, rounds.tile_positions, [&](const Sampling<scalar_t>& tile) {
      if (gradients.needs_columns()) {
        matrix_product(call.by_group(grads, tile), weight, call.columns(tile), g.groups, tile.count, call.depth(),
                       g.group_out_channels(), false, call.allow_tf32);
      }
      if (sorts) {
        add_deterministically(tile, corners, grad_output, input_sum);
      } else if (grad_input) {
        launch_input_gradient(tile, input_sum);
      }
      launch_backpropagate(tile, grad_offset, grad_mask, gradients.needs_weight);
      if (!gradients.needs_weight) return;
      Matrices transposed = call.by_group(grads, tile);
      transposed.transposed = true;
      matrix_product(transposed, call.columns(tile), grad_weight, g.groups, g.group_out_channels(), call.depth(),
                     tile.count, adds, call.allow_tf32);
      adds = true;
    });
    if (sums) grad_input->write(input_sum, first, images);
  });
  if (gradients.needs_weight) {
    ImageRows<scalar_t>(gradients.weight, false).write(static_cast<const T*>(grad_weight.data), 0, g.out_channels);
  }
}

DeformConv2dGradients deform_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                             const std::optional<Tensor>& mask, const Tensor& weight,
                                             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation, int64_t groups,
                                             int64_t offset_groups, const std::vector<bool>& output_mask,
                                             bool deterministic, bool allow_tf32) {
  const ConvGeometry g =
      deform_conv2d_geometry(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
  check_backward(grad_output, input, mask, output_mask, g);
  const DeviceGuard guard(input.get_device_index());
  const ScalarType type = compute_type(input.scalar_type());
  const Gradients gradients{.input = empty_gradient(output_mask[0], input, input.scalar_type(), memory_format(input)),
                            .offset = empty_gradient(output_mask[1], offset, type),
                            .mask = empty_gradient(output_mask[2], mask.value_or(offset), type),
                            .weight = empty_gradient(output_mask[3], weight, weight.scalar_type()),
                            .needs_input = output_mask[0],
                            .needs_offset = output_mask[1],
                            .needs_mask = output_mask[2],
                            .needs_weight = output_mask[3]};
  if (g.batch == 0) {
    clear(gradients.weight.data_ptr(), gradients.weight.numel() * weight.element_size(), input.get_device_index());
  } else {
    dispatch_storage(input.scalar_type(), "input", [&](auto zero) {
      Call<decltype(zero)> call(g, input, offset, mask, weight, allow_tf32);
      backward(call, grad_output, gradients, deterministic);
    });
  }
  return {gradients.input, in_type(gradients.offset, offset.scalar_type()),
          in_type(gradients.mask, offset.scalar_type()), gradients.weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, m) {
  m.impl("deform_conv2d", TORCH_BOX(&Readable<&deform_conv2d>::call));
  m.impl("deform_conv2d_backward", TORCH_BOX(&Readable<&deform_conv2d_backward>::call));
}

}  // namespace mmdcn
