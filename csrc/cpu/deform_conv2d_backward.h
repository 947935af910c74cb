// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "../core/conv_geometry.h"
#include "../core/dispatch.h"
#include "cache.h"
#include "deform_conv2d_blocks.h"
#include "deform_conv2d_plan.h"
#include "deform_conv2d_sampling.h"
#include "matrix_product.h"
#include "nhwc.h"
#include "positions.h"

namespace mmdcn {

constexpr int64_t kMaxBackwardTilePositions = 128;
constexpr int64_t kMaxChunkPositions = 2048;
constexpr int64_t kChunkBytes = 16 << 20;  // limit of a chunk's samples and their gradients, which all threads share

// A chunk of grad_output. In bfloat16 the number of positions is rounded up; the extra positions are zero.
template <typename scalar_t>
struct ChunkGradient {
  const scalar_t* rows;        // [positions, C_out]
  const scalar_t* transposed;  // [C_out, transposed_stride]; only in bfloat16
  int64_t transposed_stride;
};

// scalar_t is the type of the products; in bfloat16 the weight must have one group.
template <typename scalar_t>
class ConvBackward {
  using T = compute_t<scalar_t>;

 public:
  ConvBackward(const ConvGeometry& g, const ChannelRange& channels, const Tensor& weight,
               const std::vector<bool>& output_mask, ScalarType type)
      : g_(g),
        channels_(channels),
        type_(type),
        needs_input_(output_mask[0]),
        needs_sampling_(output_mask[1] || output_mask[2]),
        needs_weight_(output_mask[3]),
        blocks_(channel_blocks<T>(g, channels)),
        chunk_positions_(chunk_positions()),
        outside_(kMaxBlockChannels, 0),
        samples_(std::make_unique_for_overwrite<PlannedSample<T>[]>(chunk_positions_ * g_.samples_per_position())),
        block_gradients_(std::make_unique_for_overwrite<SampleGradient[]>(
            needs_sampling_ ? ranges() * chunk_positions_ * g.taps() : 0)) {
    pack_weight(g, weight, blocks_);
    if constexpr (kInBFloat16) {
      for (const ChannelBlock<T>& block : blocks_) weight_pairs_.push_back(weight_pairs(g, block));
    }
  }

  // From grad_output [N, C_out, H_out, W_out], adds to grad_rows and to the gradient of the weight, and writes or adds
  // to grad_offset [N, 2*G*K, H_out, W_out] and grad_mask [N, G*K, H_out, W_out] (contiguous; null if not needed).
  void run(const SamplePlan<T>& plan, const Rows<scalar_t>& rows, const Rows<T>& grad_rows, const Tensor& grad_output,
           T* grad_offset, T* grad_mask) {
    const int64_t positions = grad_output.size(0) * g_.positions();
    const bool in_place = !kInBFloat16 && is_nhwc_matrix(grad_output, type_);
    const int64_t stride = kInBFloat16 ? round_up(chunk_positions_, kBFloat16Positions) : chunk_positions_;
    const auto copy = std::make_unique<scalar_t[]>(in_place ? 0 : stride * g_.out_channels);
    const auto transposed = std::make_unique<scalar_t[]>(kInBFloat16 ? stride * g_.out_channels : 0);
    for (int64_t first = 0; first < positions; first += chunk_positions_) {
      const int64_t count = std::min(chunk_positions_, positions - first);
      const scalar_t* rows_of_grad =
          in_place ? data<const scalar_t>(grad_output) + first * g_.out_channels : copy.get();
      const ChunkGradient<scalar_t> chunk_grad{rows_of_grad, transposed.get(), stride};
      torch::stable::parallel_for(0, count, kPositionGrain, [&](int64_t begin, int64_t end) {
        plan.locate_samples(first + begin, end - begin, samples_.get() + begin * g_.samples_per_position());
        if (!in_place) read_positions(grad_output, first + begin, end - begin, copy.get() + begin * g_.out_channels);
        if (kInBFloat16) transpose(copy.get(), begin, end, stride, transposed.get());
      });
      for (int64_t i = count; kInBFloat16 && i < round_up(count, kBFloat16Positions); ++i) {
        std::fill_n(copy.get() + i * g_.out_channels, g_.out_channels, scalar_t(0));
        for (int64_t c = 0; c < g_.out_channels; ++c) transposed[c * stride + i] = scalar_t(0);
      }
      const int64_t work = count * g_.taps() * blocks_[0].size() * (2 * g_.group_out_channels() + kBackwardSampleWork);
      torch::stable::parallel_for(0, blocks_.size(), kThreadWork / work + 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          run_block(block, count, rows, grad_rows, chunk_grad);
        }
        if constexpr (kInBFloat16) release_bfloat16_product();
      });
      if (needs_sampling_) add_block_gradients(first, count, grad_offset, grad_mask);
    }
  }

  void write_grad_weight(const Tensor& grad_weight) const { unpack_grad_weight(g_, blocks_, grad_weight); }

 private:
  static constexpr bool kInBFloat16 = !std::is_same_v<scalar_t, T>;
  static constexpr int64_t kPositionGrain = 64;
  static constexpr int64_t kBackwardSampleWork = 24;  // cost of one element of a column, in multiplications

  // Where the gradient of a sample's columns is stored, and in bfloat16 where the columns are written.
  struct SampleColumn {
    T* gradient;
    BFloat16Pair* pair;
    bool is_odd;
  };

  // The contribution of some channels to the gradients of a sample's coordinates and mask.
  struct SampleGradient {
    T y, x, mask;
  };

  // The channels of all blocks, split by offset groups.
  int64_t ranges() const { return blocks_.back().first_range + std::ssize(blocks_.back().offset_groups); }

  int64_t chunk_positions() const {
    const int64_t bytes = g_.offset_groups * static_cast<int64_t>(sizeof(PlannedSample<T>)) +
                          ranges() * static_cast<int64_t>(sizeof(SampleGradient));
    const int64_t positions = std::max<int64_t>(g_.batch * g_.positions(), 1);
    return std::clamp<int64_t>(kChunkBytes / (g_.taps() * bytes), 1, std::min(kMaxChunkPositions, positions));
  }

  void transpose(const scalar_t* rows, int64_t begin, int64_t end, int64_t stride, scalar_t* transposed) const {
    for (int64_t c = 0; c < g_.out_channels; ++c) {
      for (int64_t i = begin; i < end; ++i) {
        transposed[c * stride + i] = rows[i * g_.out_channels + c];
      }
    }
  }

  void run_block(int64_t index, int64_t chunk, const Rows<scalar_t>& rows, const Rows<T>& grad_rows,
                 const ChunkGradient<scalar_t>& grad_output) {
    ChannelBlock<T>& block = blocks_[index];
    const int64_t row = block.column_stride, fitting = core_cache_bytes() / 4 / (row * static_cast<int64_t>(sizeof(T)));
    const int64_t most = std::min({std::max<int64_t>(fitting, 1), kMaxBackwardTilePositions, chunk});
    const int64_t tile = kInBFloat16 ? round_up(most, kBFloat16Positions) : most;
    const auto columns = std::make_unique<T[]>(tile * row);
    const auto pairs = std::make_unique<BFloat16Pair[]>(kInBFloat16 ? tile / 2 * row : 0);
    for (int64_t first = 0; first < chunk; first += tile) {
      const int64_t count = std::min(tile, chunk - first);
      columns_gradient(index, grad_output, first, count, columns.get());
      for (size_t i = 0; i < block.offset_groups.size(); ++i) {
        with_constant_channels(block.offset_groups[i].size(), [&](auto channels) {
          run_samples(channels, block, i, first, count, rows, grad_rows, columns.get(), pairs.get());
        });
      }
      if (needs_weight_) add_weight_gradient(index, grad_output, first, count, columns.get(), pairs.get());
    }
  }

  void columns_gradient(int64_t index, const ChunkGradient<scalar_t>& grad_output, int64_t first, int64_t count,
                        T* columns) const {
    if (!needs_input_ && !needs_sampling_) return;
    const ChannelBlock<T>& block = blocks_[index];
    const scalar_t* grad = grad_output.rows + first * g_.out_channels;
    if constexpr (kInBFloat16) {
      multiply({.rows = round_up(count, kBFloat16Positions),
                .columns = block.column_stride,
                .depth = g_.out_channels,
                .left = grad,
                .left_stride = g_.out_channels,
                .right = weight_pairs_[index].get(),
                .result = columns,
                .accumulates = false});
    } else {
      block.columns_gradient(g_, grad, count, columns);
    }
  }

  void add_weight_gradient(int64_t index, const ChunkGradient<scalar_t>& grad_output, int64_t first, int64_t count,
                           const T* columns, BFloat16Pair* pairs) {
    ChannelBlock<T>& block = blocks_[index];
    if constexpr (kInBFloat16) {
      const int64_t row = block.column_stride, depth = round_up(count, kBFloat16Positions);
      std::fill(pairs + (count + 1) / 2 * row, pairs + depth / 2 * row, 0);
      multiply({.rows = g_.out_channels,
                .columns = row,
                .depth = depth,
                .left = grad_output.transposed + first,
                .left_stride = grad_output.transposed_stride,
                .right = pairs,
                .result = block.groups[0].gradient.get(),
                .accumulates = true});
    } else {
      block.add_weight_gradient(g_, grad_output.rows + first * g_.out_channels, count, columns);
    }
  }

  template <typename Count>
  void run_samples(Count channels, const ChannelBlock<T>& block, int64_t index, int64_t first, int64_t count,
                   const Rows<scalar_t>& rows, const Rows<T>& grad_rows, T* columns, BFloat16Pair* pairs) {
    const GroupChannels& range = block.offset_groups[index];
    const int64_t first_channel = range.begin - channels_.begin;
    for (int64_t i = 0; i < count; ++i) {
      const PlannedSample<T>* samples = samples_.get() + ((first + i) * g_.offset_groups + range.group) * g_.taps();
      T* column = columns + i * block.column_stride + range.begin - block.begin;
      BFloat16Pair* pair = pairs + i / 2 * block.column_stride + range.begin - block.begin;
      SampleGradient* gradient =
          block_gradients_.get() + (block.first_range + index) * g_.taps() * chunk_positions_ + first + i;
      for (int64_t tap = 0; tap < g_.taps(); ++tap, column += block.size(), gradient += chunk_positions_) {
        const SampleColumn target{column, pair + tap * block.size(), i % 2 != 0};
        run_sample(channels, samples[tap], first_channel, rows, grad_rows, target, gradient);
      }
    }
  }

  // Uses the gradient of a column, then overwrites it with the column itself; in bfloat16 it writes the column's pair.
  template <typename Count>
  void run_sample(Count channels, const PlannedSample<T>& sample, int64_t first_channel, const Rows<scalar_t>& rows,
                  const Rows<T>& grad_rows, const SampleColumn& target, SampleGradient* gradient) const {
    const BilinearCell<T>& cell = sample.cell;
    const CornerRows<scalar_t> corners(cell, rows, first_channel, outside_.data());
    T weight[4], dot[4];
    cell.weights(sample.mask, weight);
    if (needs_input_) scatter_channels(cell, weight, target.gradient, channels, grad_rows, first_channel);
    if (!needs_sampling_ && !needs_weight_) return;
    if constexpr (kInBFloat16) {
      const BFloat16Pair kept = target.is_odd ? 0xFFFF : 0, shift = target.is_odd ? 16 : 0;  // the even one comes first
      BFloat16Pair* pair = target.pair;
      dot_and_sample(corners, weight, target.gradient, channels, dot, [=](int64_t c, float value) {
        pair[c] = (pair[c] & kept) | static_cast<BFloat16Pair>(rounded<BFloat16, float>(value).x) << shift;
      });
    } else {
      T* column = target.gradient;
      dot_and_sample(corners, weight, column, channels, dot, [=](int64_t c, T value) { column[c] = value; });
    }
    if (!needs_sampling_) return;
    cell.weights(1, weight);
    *gradient = {sample.mask * cell.derivative_y(dot), sample.mask * cell.derivative_x(dot),
                 weight[0] * dot[0] + weight[1] * dot[1] + weight[2] * dot[2] + weight[3] * dot[3]};
  }

  // Sums the blocks' contributions to the samples of the chunk's positions, in the order of the blocks.
  void add_block_gradients(int64_t first, int64_t count, T* grad_offset, T* grad_mask) const {
    const int64_t first_group = channels_.begin / g_.offset_group_channels();
    const int64_t groups = (channels_.end - 1) / g_.offset_group_channels() + 1 - first_group;
    const int64_t planes = groups * g_.taps();
    torch::stable::parallel_for(0, planes, kMaxChunkPositions * 4 / count + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        add_plane(first_group + i / g_.taps(), i % g_.taps(), first, count, grad_offset, grad_mask);
      }
    });
  }

  void add_plane(int64_t offset_group, int64_t tap, int64_t first, int64_t count, T* grad_offset, T* grad_mask) const {
    // The first channels of a group set a gradient; the following ones add to it.
    bool is_set =
        std::max(offset_group * g_.offset_group_channels(), channels_.begin) % g_.offset_group_channels() != 0;
    const auto set_or_add = [&](T value, T& target) { target = is_set ? target + value : value; };
    for (const ChannelBlock<T>& block : blocks_) {
      const int64_t index = offset_group - block.offset_groups[0].group;
      if (index < 0 || index >= std::ssize(block.offset_groups)) continue;
      const SampleGradient* gradient =
          block_gradients_.get() + ((block.first_range + index) * g_.taps() + tap) * chunk_positions_;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t image = (first + i) / g_.positions(), place = (first + i) % g_.positions();
        const int64_t plane = (image * g_.offset_groups + offset_group) * g_.taps() + tap;
        if (grad_offset) {
          set_or_add(gradient[i].y, grad_offset[2 * plane * g_.positions() + place]);
          set_or_add(gradient[i].x, grad_offset[(2 * plane + 1) * g_.positions() + place]);
        }
        if (grad_mask) set_or_add(gradient[i].mask, grad_mask[plane * g_.positions() + place]);
      }
      is_set = true;
    }
  }

  const ConvGeometry& g_;
  const ChannelRange channels_;
  ScalarType type_;
  bool needs_input_, needs_sampling_, needs_weight_;
  std::vector<ChannelBlock<T>> blocks_;
  int64_t chunk_positions_;
  std::vector<std::unique_ptr<BFloat16Pair[]>> weight_pairs_;  // of each block; only in bfloat16
  std::vector<scalar_t> outside_;                              // [block], zeros
  std::unique_ptr<PlannedSample<T>[]> samples_;                // [chunk_positions, offset_groups, K]
  std::unique_ptr<SampleGradient[]> block_gradients_;          // [offset groups of all blocks, K, chunk_positions]
};

}  // namespace mmdcn
