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
// Images that are not NHWC in the right type are brought there by copies, a few images (a round) at a time, or, if one
// image is too large for that, a part of its channels (a pass) at a time. The products of a pass are added to those of
// the passes before.
//
// Types: samples are computed in T, float32 or float64. E is the type of the images' rows, the columns and the product:
// bfloat16 where the processor multiplies in it (with float32 sums), else T.
#include "../ops/deform_conv2d.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <type_traits>
#include <vector>

#include "../core/bilinear.h"
#include "../core/dispatch.h"
#include "../core/nhwc.h"
#include "../core/readable_errors.h"
#include "linear.h"
#include "parallel.h"

namespace mmdcn {
namespace {

constexpr int64_t kTileBytes = 5 << 18;  // of columns: about what a core's own cache holds
constexpr int64_t kMaxTilePositions = 256;
constexpr int64_t kBackwardTilePositions = 512;
constexpr int64_t kMaxChunkPositions = 4 * kBackwardTilePositions;
constexpr int64_t kPlanBytes = 4 << 20;    // of a thread's samples, of which many offset groups have many
constexpr int64_t kChunkBytes = 16 << 20;  // of a chunk's samples and their gradients, which the threads share
constexpr int64_t kBlockChannels = 32;
constexpr int64_t kCopyBytes = 9 << 20;   // of the copies of images at one time
constexpr int64_t kBatchedChannels = 16;  // of groups that are multiplied all in one call

struct Channels {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Channels that share a group of the weight and a group of the offsets.
struct ChannelBlock : Channels {
  int64_t group, offset_group;
};

std::vector<ChannelBlock> channel_blocks(const ConvGeometry& g, const Channels& channels, int64_t max_channels) {
  std::vector<ChannelBlock> blocks;
  for (int64_t begin = channels.begin; begin < channels.end;) {
    const int64_t group = begin / g.group_in_channels(), offset_group = begin / g.offset_group_channels();
    const int64_t end = std::min({begin + max_channels, (group + 1) * g.group_in_channels(),
                                  (offset_group + 1) * g.offset_group_channels(), channels.end});
    blocks.push_back({{begin, end}, group, offset_group});
    begin = end;
  }
  return blocks;
}

// How many images, or how many channels of one image, are worked on at one time.
struct Round {
  int64_t images, channels;
};

Round copy_round(const ConvGeometry& g, bool copies, bool may_split, int64_t element_size) {
  if (!copies) return {g.batch, g.in_channels};
  const int64_t plane_bytes = g.height * g.width * element_size;
  const int64_t fitting = std::max<int64_t>(kCopyBytes / plane_bytes / kBlockChannels, 1) * kBlockChannels;
  if (may_split && fitting < g.in_channels) return {1, fitting};
  return {std::clamp<int64_t>(kCopyBytes / (plane_bytes * g.in_channels), 1, std::max<int64_t>(g.batch, 1)),
          g.in_channels};
}

// As many positions as a product takes without a row to pad, at most `positions` unless these are too few.
int64_t whole_rows(int64_t positions) { return std::max(positions / Linear::kRows * Linear::kRows, Linear::kRows); }

// Calls body(segment, row) for positions first .. first + count - 1 of images [N, P, C], image by image: segment [n, C]
// holds those from first + row on.
template <typename Body>
void each_segment(const Tensor& images, int64_t first, int64_t count, const Body& body) {
  const int64_t positions = images.size(1);
  for (int64_t row = 0; row < count;) {
    const int64_t image = (first + row) / positions, place = (first + row) % positions;
    const int64_t length = std::min(count - row, positions - place);
    body(slice(torch::stable::select(images, 0, image), 0, place, length), row);
    row += length;
  }
}

Tensor row_major(const Tensor& matrix, ScalarType type) {
  Tensor copy = empty_matrix(matrix, type, matrix.size(0), matrix.size(1));
  return torch::stable::copy_(copy, matrix);
}

// sum += addend, both contiguous
template <typename T>
void add(const Tensor& addend, const Tensor& sum) {
  const T* from = static_cast<const T*>(addend.data_ptr());
  T* to = static_cast<T*>(sum.data_ptr());
#pragma omp simd
  for (int64_t i = 0; i < addend.numel(); ++i) {
    to[i] += from[i];
  }
}

template <typename T>
struct Sample {
  BilinearCell<T> cell;
  T mask;
};

// Where the taps of some images sample.
template <typename T>
class Sampling {
 public:
  Sampling(const ConvGeometry& g, const Tensor& offset, const std::optional<Tensor>& mask, ScalarType type)
      : g_(g),
        offset_(torch::stable::to(offset, type)),
        mask_(mask ? std::optional<Tensor>(torch::stable::to(*mask, type)) : std::nullopt) {}

  // samples [count, offset_groups, K] of positions first, first + 1, ... of all the images.
  void plan(int64_t first, int64_t count, Sample<T>* samples) const {
    for (int64_t position = first; position < first + count; ++position) {
      const int64_t image = position / g_.positions();
      const int64_t out_y = position % g_.positions() / g_.out_width, out_x = position % g_.out_width;
      const T* offset = at(offset_, image, out_y, out_x);
      const T* mask = mask_ ? at(*mask_, image, out_y, out_x) : nullptr;
      const int64_t first_pixel = image * g_.height * g_.width;
      for (int64_t s = 0; s < g_.samples_per_position(); ++s, ++samples) {
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
  Tensor offset_;               // [N, 2*G*K, H_out, W_out]
  std::optional<Tensor> mask_;  // [N, G*K, H_out, W_out]
};

template <typename T>
Sampling<T> sampling_of(const ConvGeometry& g, const Tensor& offset, const std::optional<Tensor>& mask, ScalarType type,
                        int64_t first, int64_t count) {
  return {g, slice(offset, 0, first, count), mask ? std::optional(slice(*mask, 0, first, count)) : std::nullopt, type};
}

// The channels of a cell's corners; a corner outside the image reads `outside`, which is zero.
template <typename E>
struct Corners {
  const E* values[4];

  template <typename T>
  Corners(const BilinearCell<T>& cell, const Rows<E>& rows, int64_t channel, const E* outside) {
    for (int i = 0; i < 4; ++i) {
      values[i] = cell.pixel[i] == kOutside ? outside : rows.at(cell.pixel[i], channel);
    }
  }
};

template <typename E, typename T>
E rounded(T value) {
  return static_cast<E>(value);
}

// torch's own conversion branches on NaN, which keeps loops from being vectorised.
template <>
torch::headeronly::BFloat16 rounded(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t to_nearest_even = bits + 0x7FFF + (bits >> 16 & 1), quiet_nan = bits | 0x400000;
  return {static_cast<uint16_t>((value != value ? quiet_nan : to_nearest_even) >> 16),
          torch::headeronly::BFloat16::from_bits()};
}

template <typename E, typename T, typename Count>
void sample_channels(const Corners<E>& corners, const T (&weight)[4], Count channels, E* __restrict out) {
  const E *v0 = corners.values[0], *v1 = corners.values[1], *v2 = corners.values[2], *v3 = corners.values[3];
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = rounded<E, T>(weight[0] * static_cast<T>(v0[c]) + weight[1] * static_cast<T>(v1[c]) +
                           weight[2] * static_cast<T>(v2[c]) + weight[3] * static_cast<T>(v3[c]));
  }
}

// The transpose of sample_channels. Nothing is added to a corner outside.
template <typename T, typename Count>
void scatter_channels(const BilinearCell<T>& cell, const T (&weight)[4], const T* __restrict grad, Count channels,
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

template <typename T, typename Count>
void dot_corners(const Corners<T>& corners, const T* grad, Count channels, T (&dot)[4]) {
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

// The share that some channels of the image have in the output.
template <typename T, typename E>
class Forward {
 public:
  Forward(const ConvGeometry& g, const Channels& channels, const Tensor& weight, const std::optional<Tensor>& bias,
          ScalarType type)  // of E
      : g_(g),
        channels_(channels),
        type_(type),
        tile_positions_(tile_positions(g, channels)),
        blocks_(channel_blocks(g, channels, channels.size())),
        outside_(channels.size(), E(0)) {
    const Tensor weight_taps = tap_major(g, weight, type);
    if (in_one_batch()) {
      const Channels out = out_channels(channels);
      const auto out_rows = [&](const Tensor& t) { return slice(t, 0, out.begin, out.size()); };
      const int64_t groups = channels.size() / g.group_in_channels(), columns = g.taps() * g.group_in_channels();
      batch_.emplace(torch::stable::reshape(out_rows(weight_taps), {groups, g.group_out_channels(), columns}),
                     bias ? std::optional(out_rows(values_as(*bias, type))) : std::nullopt);
      return;
    }
    for (int64_t begin = channels.begin; begin < channels.end; begin = products_.back().channels.end) {
      const Channels part = of_group(begin / g.group_in_channels()), out = out_channels(part);
      const auto out_rows = [&](const Tensor& t) { return slice(t, 0, out.begin, out.size()); };
      const int64_t in_group = begin % g.group_in_channels();
      const Tensor columns = slice(out_rows(weight_taps), 2, in_group, part.size());
      const bool is_first = in_group == 0;
      products_.push_back({part, is_first,
                           Linear(torch::stable::reshape(columns, {g.group_out_channels(), g.taps() * part.size()}),
                                  bias && is_first ? std::optional(out_rows(values_as(*bias, type))) : std::nullopt)});
    }
  }

  // Writes the output [N, P, C_out] of the images in `rows`, or adds to what a group's first channels gave.
  void run(const Sampling<T>& sampling, const Rows<E>& rows, const Tensor& output) const {
    const int64_t positions = output.size(0) * output.size(1);
    const int64_t tiles = (positions + tile_positions_ - 1) / tile_positions_;
    share_items(tiles, [&](int64_t begin, int64_t end) {
      std::vector<Sample<T>> samples(tile_positions_ * g_.samples_per_position());
      const Tensor columns = empty_matrix(output, type_, 1, tile_positions_ * g_.taps() * channels_.size());
      const Tensor target = for_worker(output);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * tile_positions_, count = std::min(tile_positions_, positions - first);
        sampling.plan(first, count, samples.data());
        sample(rows, samples.data(), count, static_cast<E*>(columns.data_ptr()));
        if (batch_) write(channels_, true, multiply_batch(columns, count), target, first);
        for (const Product& product : products_) {
          write(product.channels, product.is_first, multiply(product, columns, count), target, first);
        }
      }
    });
  }

 private:
  // Of the columns [tile_positions, K * channels] with a group's weight [C_out/groups, K * channels].
  struct Product {
    Channels channels;
    bool is_first;  // of the group's
    Linear linear;
  };

  // As many as fit the cache; fewer where that gives the threads more equal shares.
  static int64_t tile_positions(const ConvGeometry& g, const Channels& channels) {
    constexpr int64_t kFairTiles = 64, kFewestTiles = 4;
    const int64_t fitting = kTileBytes / static_cast<int64_t>(sizeof(E)) / (g.taps() * channels.size());
    const int64_t positions = g.batch * g.positions();
    const int64_t fair = std::min(std::clamp(positions / kFairTiles, fitting / 2, fitting), positions / kFewestTiles);
    const int64_t planned = kPlanBytes / static_cast<int64_t>(sizeof(Sample<T>)) / g.samples_per_position();
    return whole_rows(std::min({fair, planned, kMaxTilePositions}));
  }

  // The sums of a batch are rounded to E before the bias is added, so E has to be T.
  bool in_one_batch() const {
    const int64_t size = g_.group_in_channels();
    return std::is_same_v<E, T> && g_.groups > 1 && size <= kBatchedChannels && channels_.begin % size == 0 &&
           channels_.end % size == 0;
  }

  // Those of a group that are among the channels.
  Channels of_group(int64_t group) const {
    const int64_t size = g_.group_in_channels();
    return {std::max(group * size, channels_.begin), std::min((group + 1) * size, channels_.end)};
  }

  // Of the groups that the channels are of.
  Channels out_channels(const Channels& channels) const {
    const int64_t in = g_.group_in_channels(), out = g_.group_out_channels();
    return {channels.begin / in * out, (channels.end + in - 1) / in * out};
  }

  // Where in `columns` those of a group begin.
  int64_t columns_before(int64_t channel) const { return tile_positions_ * g_.taps() * (channel - channels_.begin); }

  void sample(const Rows<E>& rows, const Sample<T>* samples, int64_t count, E* columns) const {
    for (int64_t i = 0; i < count; ++i) {
      for (const ChannelBlock& block : blocks_) {
        const Channels group = of_group(block.group);
        const Sample<T>* taps = samples + (i * g_.offset_groups + block.offset_group) * g_.taps();
        E* out = columns + columns_before(group.begin) + i * g_.taps() * group.size() + block.begin - group.begin;
        for (int64_t tap = 0; tap < g_.taps(); ++tap, out += group.size()) {
          T weight[4];
          taps[tap].cell.weights(taps[tap].mask, weight);
          const Corners<E> corners(taps[tap].cell, rows, block.begin - channels_.begin, outside_.data());
          sample_channels(corners, weight, block.size(), out);
        }
      }
    }
  }

  Tensor multiply(const Product& product, const Tensor& columns, int64_t count) const {
    const int64_t row = g_.taps() * product.channels.size();
    // The tile has these many, so there is nothing to pad.
    const int64_t rows = (count + Linear::kRows - 1) / Linear::kRows * Linear::kRows;
    const Tensor part = slice(columns, 1, columns_before(product.channels.begin), rows * row);
    return slice(product.linear(torch::stable::view(part, {rows, row})), 0, 0, count);
  }

  Tensor multiply_batch(const Tensor& columns, int64_t count) const {
    const int64_t row = g_.taps() * g_.group_in_channels();
    const Tensor groups = torch::stable::view(columns, {-1, tile_positions_, row});
    return torch::stable::transpose((*batch_)(slice(groups, 1, 0, count)), 0, 1);
  }

  // What some channels give, [count, their output channels], to its place in the output.
  void write(const Channels& channels, bool is_first, const Tensor& result, const Tensor& output, int64_t first) const {
    const Channels out = out_channels(channels);
    each_segment(slice(output, 2, out.begin, out.size()), first, result.size(0), [&](Tensor target, int64_t row) {
      const Tensor rows = slice(result, 0, row, target.size(0));
      if (!is_first) add<E>(row_major(target, type_), rows);
      torch::stable::copy_(target, rows);
    });
  }

  const ConvGeometry& g_;
  const Channels channels_;
  ScalarType type_;
  int64_t tile_positions_;
  std::vector<ChannelBlock> blocks_;
  std::optional<BatchedLinear<T>> batch_;  // of all the groups
  std::vector<Product> products_;          // or of each group that the channels are of
  std::vector<E> outside_;                 // [channels], zeros
};

// What is faster on this processor: the type itself, or the one that is computed in.
ScalarType multiply_type(ScalarType storage) { return Linear::packs(storage) ? storage : compute_type(storage); }

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                     int64_t offset_groups, bool /*allow_tf32: there is none*/) {
  const ConvGeometry g =
      deform_conv2d_geometry(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
  check_bias(bias, input, g.out_channels);
  const Tensor output = torch::stable::empty({g.batch, g.out_channels, g.out_height, g.out_width}, input.scalar_type(),
                                             std::nullopt, input.device(), std::nullopt, memory_format(input));
  const ScalarType type = compute_type(input.scalar_type()), product_type = multiply_type(input.scalar_type());
  dispatch_storage(product_type, "input", [&](auto zero) {
    using E = decltype(zero);
    using T = std::conditional_t<std::is_same_v<E, double>, double, float>;
    const bool copies = !is_nhwc_rows(input, product_type) || offset.scalar_type() != type;
    const bool may_split = input.scalar_type() == type;  // else the sum over the passes would be rounded after each
    const Round round = copy_round(g, copies, may_split, sizeof(E));
    for (int64_t begin = 0; begin < g.in_channels; begin += round.channels) {
      const Channels channels{begin, std::min(begin + round.channels, g.in_channels)};
      const Forward<T, E> forward(g, channels, weight, bias, product_type);
      const Tensor part = slice(input, 1, begin, channels.size());
      for (int64_t first = 0; first < g.batch; first += round.images) {
        const int64_t count = std::min(round.images, g.batch - first);
        const Tensor target = nhwc_view(output, first, count);
        forward.run(sampling_of<T>(g, offset, mask, type, first, count), nhwc_rows<E>(part, first, count, product_type),
                    torch::stable::view(target, {count, g.positions(), g.out_channels}));
      }
    }
  });
  return output;
}

template <typename T>
class Backward {
 public:
  Backward(const ConvGeometry& g, const Channels& channels, const Tensor& weight, const std::vector<bool>& output_mask,
           ScalarType type)
      : g_(g),
        channels_(channels),
        type_(type),
        needs_input_(output_mask[0]),
        needs_sampling_(output_mask[1] || output_mask[2]),
        needs_weight_(output_mask[3]),
        blocks_(channel_blocks(g, channels, kBlockChannels)),
        chunk_positions_(chunk_positions(g, std::ssize(blocks_))),
        outside_(kBlockChannels, 0),
        samples_(chunk_positions_ * g_.samples_per_position()),
        partials_(needs_sampling_ ? blocks_.size() * chunk_positions_ * g.taps() : 0) {
    const Tensor weight_taps = tap_major(g, weight, type);
    for (const ChannelBlock& block : blocks_) {
      const Tensor rows = slice(weight_taps, 0, block.group * g.group_out_channels(), g.group_out_channels());
      const Tensor columns = slice(rows, 2, block.begin % g.group_in_channels(), block.size());
      linears_.emplace_back(
          torch::stable::reshape(permute(columns, {1, 2, 0}), {g.taps() * block.size(), g.group_out_channels()}));
      Tensor sum = empty_matrix(weight, type, g.group_out_channels(), needs_weight_ ? g.taps() * block.size() : 0);
      grad_weights_.push_back(torch::stable::zero_(sum));
    }
  }

  // Adds to grad_rows and to the gradient of the weight, and fills, or adds to, grad_offset [N, 2*G*K, H_out, W_out]
  // and grad_mask [N, G*K, H_out, W_out] (contiguous; null where not needed), from grad_output [N, P, C_out].
  void run(const Sampling<T>& sampling, const Rows<T>& rows, const Rows<T>& grad_rows, const Tensor& grad_output,
           T* grad_offset, T* grad_mask) {
    const int64_t positions = grad_output.size(0) * grad_output.size(1);
    for (int64_t first = 0; first < positions; first += chunk_positions_) {
      const int64_t count = std::min(chunk_positions_, positions - first);
      const Tensor chunk_grad = chunk_rows(grad_output, first, count);
      constexpr int64_t kGrain = 64;
      torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
        sampling.plan(first + begin, end - begin, samples_.data() + begin * g_.samples_per_position());
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

  static int64_t chunk_positions(const ConvGeometry& g, int64_t blocks) {
    const int64_t bytes =
        g.offset_groups * static_cast<int64_t>(sizeof(Sample<T>)) + blocks * static_cast<int64_t>(sizeof(Partial));
    return whole_rows(std::min(kChunkBytes / (g.taps() * bytes), kMaxChunkPositions));
  }

  // [count, C_out] of grad_output: itself if it is so already.
  Tensor chunk_rows(const Tensor& grad_output, int64_t first, int64_t count) const {
    if (grad_output.scalar_type() == type_ && grad_output.is_contiguous()) {
      return slice(torch::stable::view(grad_output, {-1, g_.out_channels}), 0, first, count);
    }
    const Tensor rows = empty_matrix(grad_output, type_, count, g_.out_channels);
    each_segment(grad_output, first, count, [&](const Tensor& segment, int64_t row) {
      Tensor target = slice(rows, 0, row, segment.size(0));
      torch::stable::copy_(target, segment);
    });
    return rows;
  }

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
                               ? slice(linears_[index](grad_output), 0, 0, count)
                               : empty_matrix(grad_output, grad_output.scalar_type(), count, g_.taps() * block.size());
    T* column = static_cast<T*>(columns.data_ptr());
    // A loop over a constant number of channels has no ends to look after.
    if (block.size() == kBlockChannels) {
      run_samples(std::integral_constant<int64_t, kBlockChannels>(), index, first, count, rows, grad_rows, column);
    } else {
      run_samples(block.size(), index, first, count, rows, grad_rows, column);
    }
    if (needs_weight_) {
      const Tensor transposed = torch::stable::transpose(grad_output, 0, 1);
      add<T>(mm(transposed, columns), grad_weights_[index]);
    }
  }

  template <typename Count>
  void run_samples(Count channels, int64_t index, int64_t first, int64_t count, const Rows<T>& rows,
                   const Rows<T>& grad_rows, T* column) {
    const ChannelBlock& block = blocks_[index];
    Partial* partial = partials_.data() + (index * chunk_positions_ + first) * g_.taps();
    for (int64_t i = first; i < first + count; ++i) {
      const Sample<T>* samples = samples_.data() + (i * g_.offset_groups + block.offset_group) * g_.taps();
      for (int64_t tap = 0; tap < g_.taps(); ++tap, column += channels, ++partial) {
        run_sample(channels, samples[tap], block.begin - channels_.begin, rows, grad_rows, column, partial);
      }
    }
  }

  // Uses the gradient of a column, then puts the column itself in its place.
  template <typename Count>
  void run_sample(Count channels, const Sample<T>& sample, int64_t first_channel, const Rows<T>& rows,
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
    for (size_t begin = 0, end = 0; begin < blocks_.size(); begin = end) {
      const int64_t offset_group = blocks_[begin].offset_group;
      while (end < blocks_.size() && blocks_[end].offset_group == offset_group) ++end;
      // The first channels of a group set a gradient, those after them add to it.
      const bool is_first = blocks_[begin].begin % g_.offset_group_channels() == 0;
      const auto put = [&](T part, T& gradient) { gradient = is_first ? part : gradient + part; };
      for (int64_t tap = 0; tap < g_.taps(); ++tap) {
        Partial sum{0, 0, 0};
        for (size_t block = begin; block < end; ++block) {
          const Partial& part = partials_[(block * chunk_positions_ + chunk_position) * g_.taps() + tap];
          sum.y += part.y, sum.x += part.x, sum.mask += part.mask;
        }
        const int64_t plane = (image * g_.offset_groups + offset_group) * g_.taps() + tap;
        if (grad_offset) {
          put(sum.y, grad_offset[2 * plane * g_.positions() + place]);
          put(sum.x, grad_offset[(2 * plane + 1) * g_.positions() + place]);
        }
        if (grad_mask) put(sum.mask, grad_mask[plane * g_.positions() + place]);
      }
    }
  }

  const ConvGeometry& g_;
  const Channels channels_;
  ScalarType type_;
  bool needs_input_, needs_sampling_, needs_weight_;
  std::vector<ChannelBlock> blocks_;
  int64_t chunk_positions_;
  std::vector<T> outside_;            // [kBlockChannels], zeros
  std::vector<Linear> linears_;       // of each block: [K * block, C_out/groups]
  std::vector<Tensor> grad_weights_;  // of each block: [C_out/groups, K * block]
  std::vector<Sample<T>> samples_;    // [chunk_positions, offset_groups, K]
  std::vector<Partial> partials_;     // [blocks, chunk_positions, K]
};

DeformConv2dGradients deform_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                             const std::optional<Tensor>& mask, const Tensor& weight,
                                             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation, int64_t groups,
                                             int64_t offset_groups, const std::vector<bool>& output_mask,
                                             bool /*deterministic: always*/, bool /*allow_tf32: there is none*/) {
  const ConvGeometry g =
      deform_conv2d_geometry(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
  check_backward(grad_output, input, mask, output_mask, g);
  const ScalarType type = compute_type(input.scalar_type());
  Tensor grad_input = empty_gradient(output_mask[0], input, input.scalar_type(), memory_format(input));
  const Tensor grad_offset = empty_gradient(output_mask[1], offset, type);
  const Tensor grad_mask = empty_gradient(output_mask[2], mask.value_or(offset), type);
  const Tensor grad_weight = empty_gradient(output_mask[3], weight, weight.scalar_type());

  const Tensor grad_positions =
      torch::stable::reshape(permute(grad_output, {0, 2, 3, 1}), {g.batch, g.positions(), g.out_channels});
  dispatch_compute(type, [&](auto zero) {
    using T = decltype(zero);
    const bool copies_grad_input = output_mask[0] && !is_nhwc_matrix(grad_input, type);
    const bool copies = copies_grad_input || !is_nhwc_rows(input, type) || offset.scalar_type() != type;
    const Round round = copy_round(g, copies, /*may_split=*/true, sizeof(T));
    for (int64_t begin = 0; begin < g.in_channels; begin += round.channels) {
      const Channels channels{begin, std::min(begin + round.channels, g.in_channels)};
      Backward<T> backward(g, channels, weight, output_mask, type);
      const Tensor part = slice(input, 1, begin, channels.size());
      for (int64_t first = 0; first < g.batch; first += round.images) {
        const int64_t count = std::min(round.images, g.batch - first);
        Tensor target =
            output_mask[0] ? nhwc_view(slice(grad_input, 1, begin, channels.size()), first, count) : grad_input;
        Tensor sum = copies_grad_input ? empty_nhwc(part, count, type) : target;
        torch::stable::zero_(sum);
        const Rows<T> grad_rows{sum, static_cast<T*>(sum.data_ptr()),
                                copies_grad_input ? channels.size() : g.in_channels};
        const int64_t samples = first * g.samples_per_position() * g.positions();
        backward.run(sampling_of<T>(g, offset, mask, type, first, count), nhwc_rows<T>(part, first, count, type),
                     grad_rows, slice(grad_positions, 0, first, count),
                     output_mask[1] ? static_cast<T*>(grad_offset.data_ptr()) + 2 * samples : nullptr,
                     output_mask[2] ? static_cast<T*>(grad_mask.data_ptr()) + samples : nullptr);
        if (copies_grad_input) torch::stable::copy_(target, sum);
      }
      if (output_mask[3]) backward.write_grad_weight(grad_weight);
    }
  });
  return {grad_input, torch::stable::to(grad_offset, offset.scalar_type()),
          torch::stable::to(grad_mask, offset.scalar_type()), grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&Readable<&deform_conv2d>::call));
  m.impl("deform_conv2d_backward", TORCH_BOX(&Readable<&deform_conv2d_backward>::call));
}

}  // namespace mmdcn
