// SPDX-License-Identifier: Apache-2.0
// Note: [Deformable convolution on the CPU]
//
// A deformable convolution is a plan (where each tap of each output position samples), a sampling into columns and a
// matrix product with the weight. It works on NHWC rows, so a sample is four contiguous vector loads. It works on tiles
// of positions, so the columns stay in cache and the workspace does not grow with the image or the batch. Positions are
// numbered over the batch: (b * H_out + out_y) * W_out + out_x.
//
// Forward: the threads share the positions.
//
// Backward: for each chunk of positions, the threads share the blocks of channels. A block owns its channels of
// grad_input and grad_weight, and stores its contribution to grad_offset and grad_mask. The contributions are then
// summed in the order of the blocks. So no two threads write the same address.
//
// Each element of a product is one chain of additions (matrix_product.h). How the sums are split (into some taps of all
// channels, tiles of positions in the backward, and blocks) does not depend on the number of threads, so the bits of
// the result do not either.
//
// Images that are not NHWC in the right type are copied (bounded_copies.h). If one image is too large for that, the
// products of some channels at a time are accumulated.
//
// Types: T, float32 or float64, is the type of the sums. scalar_t is the type of the images' rows, the columns and the
// products: bfloat16 if the processor multiplies in it (with float32 sums) and there is one group, else T.
//
// deform_conv2d_plan.h locates the samples, deform_conv2d_sampling.h computes one sample and its gradients, and
// deform_conv2d_forward.h and deform_conv2d_backward.h are the two algorithms. The products are those of
// matrix_product.h or, in bfloat16, of linear.h in the forward and bfloat16_product.h in the backward.
#include "../ops/deform_conv2d.h"

#include <algorithm>

#include "../core/dispatch.h"
#include "bounded_copies.h"
#include "deform_conv2d_backward.h"
#include "deform_conv2d_forward.h"
#include "linear.h"
#include "nhwc.h"

namespace mmdcn {
namespace {

// The number of images, or of channels of one image, to process at a time.
struct ImageBatch {
  int64_t images, channels;
};

ImageBatch image_batch(const ConvGeometry& g, bool copies, bool may_split, int64_t element_size) {
  if (!copies) return {g.batch, g.in_channels};
  const int64_t channels = copied_channels(g.height, g.width, element_size);
  if (may_split && channels < g.in_channels) return {1, channels};
  const int64_t image_bytes = g.in_channels * g.height * g.width * element_size;
  return {std::clamp<int64_t>(kCopyBytes / image_bytes, 1, std::max<int64_t>(g.batch, 1)), g.in_channels};
}

// The faster type for products on this processor: the storage type or the compute type.
ScalarType multiply_type(ScalarType storage, const ConvGeometry& g) {
  return storage == ScalarType::BFloat16 && g.groups == 1 && Linear::is_available() ? storage : compute_type(storage);
}

ConvGeometry weight_geometry(const Tensor& weight, int64_t groups) {
  check_rank(weight, "weight", 4);
  check_floating(weight, "weight");
  MMDCN_CHECK(groups > 0 && weight.numel() > 0 && weight.size(0) % groups == 0,
              "weight must not be empty, and groups must divide C_out, got ", to_string(weight.sizes()), " and ",
              groups);
  ConvGeometry g{};
  g.in_channels = weight.size(1) * groups, g.out_channels = weight.size(0), g.groups = groups;
  g.kernel_height = weight.size(2), g.kernel_width = weight.size(3);
  return g;
}

// The weight in the layout of the forward's products, which depends on the library's instruction set.
Tensor deform_conv2d_pack_weight(const Tensor& weight,  // [C_out, C_in/groups, kh, kw]
                                 int64_t groups) {      // [elements]
  return with_readable_errors([&] {
    const ConvGeometry g = weight_geometry(weight, groups);
    Tensor packed;
    dispatch_compute(compute_type(weight.scalar_type()),
                     [&](auto zero) { packed = GroupWeights<decltype(zero)>(g, {0, g.in_channels}, weight).packed(); });
    return packed;
  });
}

template <typename T>
void check_packed_weight(const Tensor& packed, const ConvGeometry& g, const Tensor& input) {
  check_shape(packed, "packed_weight", {GroupWeights<T>::elements(g, {0, g.in_channels})});
  check_same_type(packed, "packed_weight", compute_type(input.scalar_type()));
  check_same_device(packed, "packed_weight", input);
  MMDCN_CHECK(packed.is_contiguous(), "packed_weight must be contiguous");
}

Tensor deform_conv2d(const DeformConv2dCall& call, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& packed_weight) {
  const auto& [g, input, offset, mask, weight, allow_tf32] = call;  // there is no TF32 on a CPU
  const Tensor output = torch::stable::empty({g.batch, g.out_channels, g.out_height, g.out_width}, input.scalar_type(),
                                             std::nullopt, input.device(), std::nullopt, memory_format(input));
  const ScalarType type = compute_type(input.scalar_type()), product_type = multiply_type(input.scalar_type(), g);
  dispatch_storage(product_type, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = compute_t<scalar_t>;
    const bool copies = !is_nhwc_rows(input, product_type) || offset.scalar_type() != type;
    const bool may_split = input.scalar_type() == type;  // else the sum would be rounded after each pass
    const ImageBatch step = image_batch(g, copies, may_split, sizeof(scalar_t));
    if (packed_weight) check_packed_weight<T>(*packed_weight, g, input);
    const bool takes_packed = step.channels == g.in_channels;
    for (int64_t begin = 0; begin < g.in_channels; begin += step.channels) {
      const ChannelRange channels{begin, std::min(begin + step.channels, g.in_channels)};
      const ConvForward<scalar_t> forward(g, channels, weight, bias, takes_packed ? packed_weight : std::nullopt,
                                          product_type);
      const Tensor part = slice(input, 1, begin, channels.size());
      for (int64_t first = 0; first < g.batch; first += step.images) {
        const int64_t count = std::min(step.images, g.batch - first);
        forward.run(sample_plan<T>(g, offset, mask, type, first, count),
                    nhwc_rows<scalar_t>(part, first, count, product_type), slice(output, 0, first, count));
      }
    }
  });
  return output;
}

// The order of the sums is fixed, so `deterministic` changes nothing.
DeformConv2dGradients deform_conv2d_backward(const DeformConv2dCall& call, const Tensor& grad_output,
                                             const std::vector<bool>& output_mask, bool /*deterministic*/) {
  const auto& [g, input, offset, mask, weight, allow_tf32] = call;
  const ScalarType type = compute_type(input.scalar_type());
  Tensor grad_input = empty_gradient(output_mask[0], input, input.scalar_type(), memory_format(input));
  const Tensor grad_offset = empty_gradient(output_mask[1], offset, type);
  const Tensor grad_mask = empty_gradient(output_mask[2], mask.value_or(offset), type);
  const Tensor grad_weight = empty_gradient(output_mask[3], weight, weight.scalar_type());

  const bool in_bfloat16 = input.scalar_type() == ScalarType::BFloat16 && g.groups == 1 && has_bfloat16_product();
  const ScalarType product_type = in_bfloat16 ? ScalarType::BFloat16 : type;
  dispatch_product(product_type, [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = compute_t<scalar_t>;
    const bool copies_grad_input = output_mask[0] && !is_nhwc_matrix(grad_input, type);
    const bool copies = copies_grad_input || !is_nhwc_rows(input, type) || offset.scalar_type() != type;
    const ImageBatch step = image_batch(g, copies, /*may_split=*/true, sizeof(T));
    for (int64_t begin = 0; begin < g.in_channels; begin += step.channels) {
      const ChannelRange channels{begin, std::min(begin + step.channels, g.in_channels)};
      ConvBackward<scalar_t> backward(g, channels, weight, output_mask, type);
      const Tensor part = slice(input, 1, begin, channels.size());
      for (int64_t first = 0; first < g.batch; first += step.images) {
        const int64_t count = std::min(step.images, g.batch - first);
        const Tensor target = output_mask[0] ? slice(grad_input, 1, begin, channels.size()) : grad_input;
        Tensor sum = copies_grad_input ? empty_nhwc(part, count, type)
                     : output_mask[0]  ? nhwc_view(target, first, count)
                                       : grad_input;
        torch::stable::zero_(sum);
        const Rows<T> grad_rows{sum, static_cast<T*>(sum.data_ptr()),
                                copies_grad_input ? channels.size() : g.in_channels};
        const int64_t samples = first * g.samples_per_position() * g.positions();
        backward.run(sample_plan<T>(g, offset, mask, type, first, count),
                     nhwc_rows<scalar_t>(part, first, count, product_type), grad_rows,
                     slice(grad_output, 0, first, count),
                     output_mask[1] ? static_cast<T*>(grad_offset.data_ptr()) + 2 * samples : nullptr,
                     output_mask[2] ? static_cast<T*>(grad_mask.data_ptr()) + samples : nullptr);
        if (copies_grad_input) copy_from_nhwc<T>(sum, target, first);
      }
      if (output_mask[3]) backward.write_grad_weight(grad_weight);
    }
  });
  return {grad_input, torch::stable::to(grad_offset, offset.scalar_type()),
          torch::stable::to(grad_mask, offset.scalar_type()), grad_weight};
}

}  // namespace

MMDCN_CPU_KERNELS(library) {
  DeformConv2dKernels<&deform_conv2d, &deform_conv2d_backward>::add_to(library);
  library.impl("deform_conv2d_pack_weight", TORCH_BOX(&deform_conv2d_pack_weight));
}

}  // namespace mmdcn
