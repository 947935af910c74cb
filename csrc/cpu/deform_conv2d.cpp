// SPDX-License-Identifier: Apache-2.0
// Note: [Deformable convolution on the CPU]
//
// A deformable convolution is a plan (where each tap of each output position samples), a sampling into columns and
// a matrix product with the weight. All of it works on NHWC rows, so that one sample is four contiguous vector
// loads, and on tiles of positions, so that the columns stay in cache and the workspace does not grow with the
// image or the batch. Positions are numbered over a batch: (b * H_out + out_y) * W_out + out_x.
//
// Forward: the threads share the tiles.
//
// Backward: chunk by chunk of positions, the threads share the blocks of channels. A block owns its channels of
// grad_input and of grad_weight, and leaves its part of grad_offset and grad_mask to be added up in the order of
// the blocks. So no two threads write one address, and since neither tiles, chunks nor blocks depend on the number
// of threads, neither do the bits of the result.
//
// Images that are not NHWC in the compute type are brought there by copies, a few images (a round) at a time.
#include "../ops/deform_conv2d.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../core/bilinear.h"
#include "../core/dispatch.h"
#include "../core/nhwc.h"
#include "linear.h"
#include "parallel.h"

namespace mmdcn {
namespace {

constexpr int64_t kTileBytes = 5 << 18;  // of columns: about what a core's own cache holds
constexpr int64_t kMaxTilePositions = 256;
constexpr int64_t kBackwardTilePositions = 512;
constexpr int64_t kChunkPositions = 4 * kBackwardTilePositions;
constexpr int64_t kBlockChannels = 32;
constexpr int64_t kRoundBytes = 8 << 20;

// Channels that share a group of the weight and a group of the offsets.
struct ChannelBlock {
  int64_t group, offset_group, begin, end;
  int64_t size() const { return end - begin; }
};

std::vector<ChannelBlock> channel_blocks(const ConvGeometry& g, int64_t max_channels) {
  std::vector<ChannelBlock> blocks;
  for (int64_t begin = 0; begin < g.in_channels;) {
    const int64_t group = begin / g.group_in_channels(), offset_group = begin / g.offset_group_channels();
    const int64_t end = std::min(
        {begin + max_channels, (group + 1) * g.group_in_channels(), (offset_group + 1) * g.offset_group_channels()});
    blocks.push_back({group, offset_group, begin, end});
    begin = end;
  }
  return blocks;
}

int64_t images_per_round(const ConvGeometry& g, bool copies_input, bool copies_output, int64_t element_size) {
  const int64_t bytes = element_size * (copies_input * g.in_channels * g.height * g.width +
                                        copies_output * g.out_channels * g.positions());
  return bytes == 0 ? g.batch : std::max<int64_t>(kRoundBytes / bytes, 1);
}

template <typename T>
struct Sample {
  BilinearCell<T> cell;
  T mask;
};

// Where the taps sample.
template <typename T>
class Sampling {
 public:
  Sampling(const ConvGeometry& g, const Tensor& offset, const std::optional<Tensor>& mask, ScalarType type)
      : g_(g),
        offset_(torch::stable::to(offset, type)),
        mask_(mask ? std::optional<Tensor>(torch::stable::to(*mask, type)) : std::nullopt) {}

  int64_t samples_per_position() const { return g_.offset_groups * g_.taps(); }

  // samples [count, offset_groups, K] of positions first, first + 1, ... of the whole batch, as pixels of the
  // images from first_image on.
  void plan(int64_t first_image, int64_t first, int64_t count, Sample<T>* samples) const {
    for (int64_t position = first; position < first + count; ++position) {
      const int64_t image = position / g_.positions();
      const int64_t out_y = position % g_.positions() / g_.out_width, out_x = position % g_.out_width;
      const T* offset = at(offset_, image, out_y, out_x);
      const T* mask = mask_ ? at(*mask_, image, out_y, out_x) : nullptr;
      const int64_t first_pixel = (image - first_image) * g_.height * g_.width;
      for (int64_t s = 0; s < samples_per_position(); ++s, ++samples) {
        const int64_t tap = s % g_.taps();
        const T y = static_cast<T>(g_.regular_y(out_y, tap)) + offset[2 * s * offset_.stride(1)];
        const T x = static_cast<T>(g_.regular_x(out_x, tap)) + offset[(2 * s + 1) * offset_.stride(1)];
        samples->cell = locate(g_.height, g_.width, y, x);
        samples->mask = mask ? mask[s * mask_->stride(1)] : static_cast<T>(1);
        for (int64_t& pixel : samples->cell.pixel) {
          pixel += pixel == kOutside ? 0 : first_pixel;
        }
      }
    }
  }

 private:
  static const T* at(const Tensor& tensor, int64_t image, int64_t out_y, int64_t out_x) {
    return static_cast<const T*>(tensor.data_ptr()) + image * tensor.stride(0) + out_y * tensor.stride(2) +
           out_x * tensor.stride(3);
  }

  const ConvGeometry& g_;
  Tensor offset_;               // [B, 2*G*K, H_out, W_out]
  std::optional<Tensor> mask_;  // [B, G*K, H_out, W_out]
};

// The channels of a cell's corners; a corner outside the image reads `outside`, which is zero.
template <typename T>
struct Corners {
  const T* values[4];

  Corners(const BilinearCell<T>& cell, const Rows<T>& rows, int64_t channel, const T* outside) {
    for (int i = 0; i < 4; ++i) {
      values[i] = cell.pixel[i] == kOutside ? outside : rows.at(cell.pixel[i], channel);
    }
  }
};

template <typename T, typename Channels>
void sample_channels(const Corners<T>& corners, const T (&weight)[4], Channels channels, T* __restrict out) {
  const T *v0 = corners.values[0], *v1 = corners.values[1], *v2 = corners.values[2], *v3 = corners.values[3];
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = weight[0] * v0[c] + weight[1] * v1[c] + weight[2] * v2[c] + weight[3] * v3[c];
  }
}

// The transpose of sample_channels. Nothing is added to a corner outside.
template <typename T, typename Channels>
void scatter_channels(const BilinearCell<T>& cell, const T (&weight)[4], const T* __restrict grad, Channels channels,
                      const Rows<T>& rows, int64_t channel) {
  for (int i = 0; i < 4; ++i) {
    if (cell.pixel[i] == kOutside) continue;
    T* __restrict row = rows.at(cell.pixel[i], channel);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      row[c] += weight[i] * grad[c];
    }
  }
}

template <typename T, typename Channels>
void dot_corners(const Corners<T>& corners, const T* grad, Channels channels, T (&dot)[4]) {
  const T *v0 = corners.values[0], *v1 = corners.values[1], *v2 = corners.values[2], *v3 = corners.values[3];
  T d0 = 0, d1 = 0, d2 = 0, d3 = 0;
#pragma omp simd reduction(+ : d0, d1, d2, d3)
  for (int64_t c = 0; c < channels; ++c) {
    d0 += grad[c] * v0[c];
    d1 += grad[c] * v1[c];
    d2 += grad[c] * v2[c];
    d3 += grad[c] * v3[c];
  }
  dot[0] = d0, dot[1] = d1, dot[2] = d2, dot[3] = d3;
}

// weight [C_out, C_in/groups, kh, kw] as [C_out, K, C_in/groups] in the compute type.
Tensor tap_major(const ConvGeometry& g, const Tensor& weight, ScalarType type) {
  const Tensor taps_first = permute(values_as(weight, type), {0, 2, 3, 1});
  return torch::stable::reshape(taps_first, {g.out_channels, g.taps(), g.group_in_channels()});
}

template <typename T>
class Forward {
 public:
  Forward(const ConvGeometry& g, const Sampling<T>& sampling, const Tensor& weight, const std::optional<Tensor>& bias,
          ScalarType type)
      : g_(g),
        sampling_(sampling),
        type_(type),
        tile_positions_(tile_positions(g)),
        blocks_(channel_blocks(g, g.in_channels)),
        outside_(g.in_channels, 0) {
    const Tensor rows = torch::stable::reshape(tap_major(g, weight, type), {g.out_channels, group_columns()});
    for (int64_t first = 0; first < g.out_channels; first += g.group_out_channels()) {
      linears_.emplace_back(
          slice(rows, 0, first, g.group_out_channels()),
          bias ? std::optional(slice(values_as(*bias, type), 0, first, g.group_out_channels())) : std::nullopt);
    }
  }

  // Fills output [N*H_out*W_out, C_out] for the images in `rows`, which begin with first_image.
  void run(const Rows<T>& rows, int64_t first_image, const Tensor& output) const {
    const int64_t positions = output.size(0);
    const int64_t tiles = (positions + tile_positions_ - 1) / tile_positions_;
    share_items(tiles, [&](int64_t begin, int64_t end) {
      std::vector<Sample<T>> samples(tile_positions_ * sampling_.samples_per_position());
      const Tensor columns = empty_matrix(output, type_, g_.groups * tile_positions_, group_columns());
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * tile_positions_, count = std::min(tile_positions_, positions - first);
        sampling_.plan(first_image, first_image * g_.positions() + first, count, samples.data());
        sample(rows, samples.data(), count, static_cast<T*>(columns.data_ptr()));
        multiply(columns, slice(output, 0, first, count));
      }
    });
  }

 private:
  // As many as fit the cache, but enough tiles of a small batch for several threads.
  static int64_t tile_positions(const ConvGeometry& g) {
    const int64_t fitting = kTileBytes / static_cast<int64_t>(sizeof(T)) / (g.taps() * g.in_channels);
    const int64_t fair = g.batch * g.positions() / 4;
    return std::clamp(std::min(fitting, fair) / Linear::kRows * Linear::kRows, Linear::kRows, kMaxTilePositions);
  }

  int64_t group_columns() const { return g_.taps() * g_.group_in_channels(); }

  // Fills columns [groups, tile_positions, K * C_in/groups].
  void sample(const Rows<T>& rows, const Sample<T>* samples, int64_t count, T* columns) const {
    for (int64_t i = 0; i < count; ++i) {
      for (const ChannelBlock& block : blocks_) {
        const Sample<T>* taps = samples + (i * g_.offset_groups + block.offset_group) * g_.taps();
        T* out = columns + (block.group * tile_positions_ + i) * group_columns() + block.begin % g_.group_in_channels();
        for (int64_t tap = 0; tap < g_.taps(); ++tap, out += g_.group_in_channels()) {
          T weight[4];
          taps[tap].cell.weights(taps[tap].mask, weight);
          const Corners<T> corners(taps[tap].cell, rows, block.begin, outside_.data());
          sample_channels(corners, weight, block.size(), out);
        }
      }
    }
  }

  void multiply(const Tensor& columns, const Tensor& output) const {
    for (int64_t group = 0; group < g_.groups; ++group) {
      const Tensor tile = slice(columns, 0, group * tile_positions_, output.size(0));
      Tensor target = slice(output, 1, group * g_.group_out_channels(), g_.group_out_channels());
      torch::stable::copy_(target, linears_[group](tile));
    }
  }

  const ConvGeometry& g_;
  const Sampling<T>& sampling_;
  ScalarType type_;
  int64_t tile_positions_;
  std::vector<ChannelBlock> blocks_;
  std::vector<Linear> linears_;  // of each group: [C_out/groups, K * C_in/groups]
  std::vector<T> outside_;       // [C_in], zeros
};

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                     int64_t offset_groups) {
  const ConvGeometry g =
      deform_conv2d_geometry(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
  check_bias(bias, input, g.out_channels);
  const Tensor output = torch::stable::empty({g.batch, g.out_channels, g.out_height, g.out_width}, input.scalar_type(),
                                             std::nullopt, input.device(), std::nullopt, memory_format(input));
  const ScalarType type = compute_type(input.scalar_type());
  dispatch_compute(type, [&](auto zero) {
    using T = decltype(zero);
    const Sampling<T> sampling(g, offset, mask, type);
    const Forward<T> forward(g, sampling, weight, bias, type);
    const bool copies_output = !is_nhwc_matrix(output, type);
    const int64_t round = images_per_round(g, !is_nhwc_rows(input, type), copies_output, sizeof(T));
    for (int64_t first = 0; first < g.batch; first += round) {
      const int64_t count = std::min(round, g.batch - first);
      const Rows<T> rows = nhwc_rows<T>(input, first, count, type);
      Tensor target = nhwc_view(output, first, count);
      const Tensor matrix = copies_output ? empty_matrix(input, type, count * g.positions(), g.out_channels)
                                          : torch::stable::view(target, {-1, g.out_channels});
      forward.run(rows, first, matrix);
      if (copies_output) torch::stable::copy_(target, torch::stable::view(matrix, target.sizes()));
    }
  });
  return output;
}

template <typename T>
class Backward {
 public:
  Backward(const ConvGeometry& g, const Sampling<T>& sampling, const Tensor& weight,
           const std::vector<bool>& output_mask, ScalarType type)
      : g_(g),
        sampling_(sampling),
        needs_input_(output_mask[0]),
        needs_sampling_(output_mask[1] || output_mask[2]),
        needs_weight_(output_mask[3]),
        blocks_(channel_blocks(g, kBlockChannels)),
        outside_(kBlockChannels, 0),
        samples_(kChunkPositions * sampling.samples_per_position()),
        partials_(needs_sampling_ ? blocks_.size() * kChunkPositions * g.taps() : 0) {
    const Tensor weight_taps = tap_major(g, weight, type);
    for (const ChannelBlock& block : blocks_) {
      const Tensor rows = slice(weight_taps, 0, block.group * g.group_out_channels(), g.group_out_channels());
      const Tensor channels = slice(rows, 2, block.begin % g.group_in_channels(), block.size());
      linears_.emplace_back(
          torch::stable::reshape(permute(channels, {1, 2, 0}), {g.taps() * block.size(), g.group_out_channels()}));
      Tensor sum = empty_matrix(weight, type, g.group_out_channels(), needs_weight_ ? g.taps() * block.size() : 0);
      grad_weights_.push_back(torch::stable::zero_(sum));
    }
  }

  // Adds to grad_rows and to the gradient of the weight, and fills the images' part of grad_offset
  // [B, 2*G*K, H_out, W_out] and grad_mask [B, G*K, H_out, W_out] (contiguous; null where not needed), from
  // grad_output [N*H_out*W_out, C_out] of the images in `rows`, which begin with first_image.
  void run(const Rows<T>& rows, const Rows<T>& grad_rows, int64_t first_image, const Tensor& grad_output,
           T* grad_offset, T* grad_mask) {
    for (int64_t chunk = 0; chunk < grad_output.size(0); chunk += kChunkPositions) {
      const int64_t count = std::min(kChunkPositions, grad_output.size(0) - chunk);
      const int64_t first = first_image * g_.positions() + chunk;
      const Tensor chunk_grad = slice(grad_output, 0, chunk, count);
      constexpr int64_t kGrain = 64;
      torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
        Sample<T>* samples = samples_.data() + begin * sampling_.samples_per_position();
        sampling_.plan(first_image, first + begin, end - begin, samples);
      });
      share_items(blocks_.size(), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          run_block(block, rows, grad_rows, chunk_grad);
        }
      });
      if (!needs_sampling_) continue;
      torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          add_partials(i, first + i, grad_offset, grad_mask);
        }
      });
    }
  }

  void write_grad_weight(const Tensor& grad_weight) const {
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const ChannelBlock& block = blocks_[i];
      const Tensor rows = slice(grad_weight, 0, block.group * g_.group_out_channels(), g_.group_out_channels());
      Tensor target = slice(rows, 1, block.begin % g_.group_in_channels(), block.size());
      const Tensor sum = torch::stable::view(
          grad_weights_[i], {g_.group_out_channels(), g_.kernel_height, g_.kernel_width, block.size()});
      torch::stable::copy_(target, permute(sum, {0, 3, 1, 2}));
    }
  }

 private:
  // One block's share of the gradients of a sample.
  struct Partial {
    T y, x, mask;
  };

  void run_block(int64_t index, const Rows<T>& rows, const Rows<T>& grad_rows, const Tensor& grad_output) {
    const Tensor group_grad = slice(grad_output, 1, blocks_[index].group * g_.group_out_channels(),
                                    g_.group_out_channels());  // [chunk, C_out/groups]
    for (int64_t first = 0; first < group_grad.size(0); first += kBackwardTilePositions) {
      const int64_t count = std::min(kBackwardTilePositions, group_grad.size(0) - first);
      run_tile(index, first, rows, grad_rows, slice(group_grad, 0, first, count));
    }
  }

  void run_tile(int64_t index, int64_t first, const Rows<T>& rows, const Rows<T>& grad_rows,
                const Tensor& grad_output) {
    const ChannelBlock& block = blocks_[index];
    const int64_t count = grad_output.size(0);
    const Tensor columns = needs_input_ || needs_sampling_
                               ? linears_[index](grad_output)
                               : empty_matrix(grad_output, grad_output.scalar_type(), count, g_.taps() * block.size());
    T* column = static_cast<T*>(columns.data_ptr());
    // A loop over a constant number of channels has no ends to look after.
    if (block.size() == kBlockChannels) {
      run_samples(std::integral_constant<int64_t, kBlockChannels>(), index, first, count, rows, grad_rows, column);
    } else {
      run_samples(block.size(), index, first, count, rows, grad_rows, column);
    }
    if (needs_weight_) add_grad_weight(grad_output, columns, grad_weights_[index]);
  }

  static void add_grad_weight(const Tensor& grad_output, const Tensor& columns, const Tensor& grad_weight) {
    const Tensor product = call_torch("aten::mm", "", torch::stable::transpose(grad_output, 0, 1), columns);
    const T* addend = static_cast<const T*>(product.data_ptr());
    T* sum = static_cast<T*>(grad_weight.data_ptr());
#pragma omp simd
    for (int64_t i = 0; i < product.numel(); ++i) {
      sum[i] += addend[i];
    }
  }

  template <typename Channels>
  void run_samples(Channels channels, int64_t index, int64_t first, int64_t count, const Rows<T>& rows,
                   const Rows<T>& grad_rows, T* column) {
    const ChannelBlock& block = blocks_[index];
    Partial* partial = partials_.data() + (index * kChunkPositions + first) * g_.taps();
    for (int64_t i = first; i < first + count; ++i) {
      const Sample<T>* samples = samples_.data() + (i * g_.offset_groups + block.offset_group) * g_.taps();
      for (int64_t tap = 0; tap < g_.taps(); ++tap, column += channels, ++partial) {
        run_sample(channels, samples[tap], block.begin, rows, grad_rows, column, partial);
      }
    }
  }

  // Uses the gradient of a column, then puts the column itself in its place.
  template <typename Channels>
  void run_sample(Channels channels, const Sample<T>& sample, int64_t first_channel, const Rows<T>& rows,
                  const Rows<T>& grad_rows, T* column, Partial* partial) const {
    const BilinearCell<T>& cell = sample.cell;
    const Corners<T> corners(cell, rows, first_channel, outside_.data());
    T weight[4];
    if (needs_sampling_) {
      T dot[4];
      dot_corners(corners, column, channels, dot);
      cell.weights(1, weight);
      *partial = {sample.mask * cell.derivative_y(dot), sample.mask * cell.derivative_x(dot),
                  weight[0] * dot[0] + weight[1] * dot[1] + weight[2] * dot[2] + weight[3] * dot[3]};
    }
    cell.weights(sample.mask, weight);
    if (needs_input_) scatter_channels(cell, weight, column, channels, grad_rows, first_channel);
    if (needs_weight_) sample_channels(corners, weight, channels, column);
  }

  void add_partials(int64_t chunk_position, int64_t position, T* grad_offset, T* grad_mask) const {
    const int64_t image = position / g_.positions(), place = position % g_.positions();
    for (int64_t sample = 0; sample < sampling_.samples_per_position(); ++sample) {
      Partial sum{0, 0, 0};
      for (size_t block = 0; block < blocks_.size(); ++block) {
        if (blocks_[block].offset_group != sample / g_.taps()) continue;
        const Partial& part = partials_[(block * kChunkPositions + chunk_position) * g_.taps() + sample % g_.taps()];
        sum.y += part.y, sum.x += part.x, sum.mask += part.mask;
      }
      const int64_t plane = image * sampling_.samples_per_position() + sample;
      if (grad_offset) {
        grad_offset[2 * plane * g_.positions() + place] = sum.y;
        grad_offset[(2 * plane + 1) * g_.positions() + place] = sum.x;
      }
      if (grad_mask) grad_mask[plane * g_.positions() + place] = sum.mask;
    }
  }

  const ConvGeometry& g_;
  const Sampling<T>& sampling_;
  bool needs_input_, needs_sampling_, needs_weight_;
  std::vector<ChannelBlock> blocks_;
  std::vector<T> outside_;            // [kBlockChannels], zeros
  std::vector<Linear> linears_;       // of each block: [K * block, C_out/groups]
  std::vector<Tensor> grad_weights_;  // of each block: [C_out/groups, K * block]
  std::vector<Sample<T>> samples_;    // [kChunkPositions, offset_groups, K]
  std::vector<Partial> partials_;     // [blocks, kChunkPositions, K]
};

DeformConv2dGradients deform_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                             const std::optional<Tensor>& mask, const Tensor& weight,
                                             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation, int64_t groups,
                                             int64_t offset_groups, const std::vector<bool>& output_mask,
                                             bool /*deterministic*/) {  // always
  const ConvGeometry g =
      deform_conv2d_geometry(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
  check_backward(grad_output, input, mask, output_mask, g);
  const ScalarType type = compute_type(input.scalar_type());
  Tensor grad_input = empty_gradient(output_mask[0], input, input.scalar_type(), memory_format(input));
  const Tensor grad_offset = empty_gradient(output_mask[1], offset, type);
  const Tensor grad_mask = empty_gradient(output_mask[2], mask.value_or(offset), type);
  const Tensor grad_weight = empty_gradient(output_mask[3], weight, weight.scalar_type());

  dispatch_compute(type, [&](auto zero) {
    using T = decltype(zero);
    const Sampling<T> sampling(g, offset, mask, type);
    Backward<T> backward(g, sampling, weight, output_mask, type);
    const bool copies_grad_input = output_mask[0] && !is_nhwc_matrix(grad_input, type);
    const int64_t round = images_per_round(g, copies_grad_input || !is_nhwc_rows(input, type),
                                           !is_nhwc_matrix(grad_output, type), sizeof(T));
    for (int64_t first = 0; first < g.batch; first += round) {
      const int64_t count = std::min(round, g.batch - first);
      const Rows<T> rows = nhwc_rows<T>(input, first, count, type);
      Tensor target = output_mask[0] ? nhwc_view(grad_input, first, count) : grad_input;
      Tensor sum = copies_grad_input ? empty_nhwc(input, count, type) : target;
      torch::stable::zero_(sum);
      const Rows<T> grad_rows{sum, static_cast<T*>(sum.data_ptr()), g.in_channels};
      backward.run(rows, grad_rows, first, nhwc_matrix(grad_output, first, count, type),
                   output_mask[1] ? static_cast<T*>(grad_offset.data_ptr()) : nullptr,
                   output_mask[2] ? static_cast<T*>(grad_mask.data_ptr()) : nullptr);
      if (copies_grad_input) torch::stable::copy_(target, sum);
    }
    if (output_mask[3]) backward.write_grad_weight(grad_weight);
  });
  return {grad_input, torch::stable::to(grad_offset, offset.scalar_type()),
          torch::stable::to(grad_mask, offset.scalar_type()), grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward));
}

}  // namespace mmdcn
