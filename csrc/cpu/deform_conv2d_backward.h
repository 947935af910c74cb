// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <iterator>
#include <optional>
#include <type_traits>
#include <vector>

#include "../core/conv_geometry.h"
#include "../core/dispatch.h"
#include "../core/nhwc.h"
#include "bounded_copies.h"
#include "deform_conv2d_matrices.h"
#include "deform_conv2d_plan.h"
#include "deform_conv2d_sampling.h"
#include "linear.h"
#include "parallel.h"

namespace mmdcn {

constexpr int64_t kBackwardTilePositions = 512;
constexpr int64_t kMaxChunkPositions = 4 * kBackwardTilePositions;
constexpr int64_t kChunkBytes = 16 << 20;  // of a chunk's samples and their gradients, which the threads share

template <typename T>
class ConvBackward {
 public:
  ConvBackward(const ConvGeometry& g, const ChannelRange& channels, const Tensor& weight,
               const std::vector<bool>& output_mask, ScalarType type)
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
        block_gradients_(needs_sampling_ ? blocks_.size() * chunk_positions_ * g.taps() : 0) {
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
  void run(const SamplePlan<T>& plan, const Rows<T>& rows, const Rows<T>& grad_rows, const Tensor& grad_output,
           T* grad_offset, T* grad_mask) {
    const int64_t positions = grad_output.size(0) * grad_output.size(1);
    for (int64_t first = 0; first < positions; first += chunk_positions_) {
      const int64_t count = std::min(chunk_positions_, positions - first);
      const Tensor chunk_grad = chunk_rows(grad_output, first, count);
      constexpr int64_t kGrain = 64;
      torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
        plan.locate_samples(first + begin, end - begin, samples_.data() + begin * g_.samples_per_position());
      });
      share_items(blocks_.size(), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          run_block(block, rows, grad_rows, chunk_grad);
        }
      });
      if (!needs_sampling_) continue;
      torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          add_block_gradients(i, first + i, grad_offset, grad_mask);
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
  // A block's share of the gradients of a sample.
  struct BlockGradient {
    T y, x, mask;
  };

  static int64_t chunk_positions(const ConvGeometry& g, int64_t blocks) {
    const int64_t bytes = g.offset_groups * static_cast<int64_t>(sizeof(PlannedSample<T>)) +
                          blocks * static_cast<int64_t>(sizeof(BlockGradient));
    return round_to_rows(std::min(kChunkBytes / (g.taps() * bytes), kMaxChunkPositions));
  }

  // [count, C_out] of grad_output: itself if it is so already.
  Tensor chunk_rows(const Tensor& grad_output, int64_t first, int64_t count) const {
    if (grad_output.scalar_type() == type_ && grad_output.is_contiguous()) {
      return slice(torch::stable::view(grad_output, {-1, g_.out_channels}), 0, first, count);
    }
    const Tensor rows = empty_matrix(grad_output, type_, count, g_.out_channels);
    for_each_segment(grad_output, first, count, [&](const Tensor& segment, int64_t row) {
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
    BlockGradient* gradient = block_gradients_.data() + (index * chunk_positions_ + first) * g_.taps();
    for (int64_t i = first; i < first + count; ++i) {
      const PlannedSample<T>* samples = samples_.data() + (i * g_.offset_groups + block.offset_group) * g_.taps();
      for (int64_t tap = 0; tap < g_.taps(); ++tap, column += channels, ++gradient) {
        run_sample(channels, samples[tap], block.begin - channels_.begin, rows, grad_rows, column, gradient);
      }
    }
  }

  // Uses the gradient of a column, then puts the column itself in its place.
  template <typename Count>
  void run_sample(Count channels, const PlannedSample<T>& sample, int64_t first_channel, const Rows<T>& rows,
                  const Rows<T>& grad_rows, T* column, BlockGradient* gradient) const {
    const BilinearCell<T>& cell = sample.cell;
    const CornerRows<T> corners(cell, rows, first_channel, outside_.data());
    T weight[4];
    if (needs_sampling_) {
      T dot[4];
      dot_corners(corners, column, channels, dot);
      cell.weights(1, weight);
      *gradient = {sample.mask * cell.derivative_y(dot), sample.mask * cell.derivative_x(dot),
                   weight[0] * dot[0] + weight[1] * dot[1] + weight[2] * dot[2] + weight[3] * dot[3]};
    }
    cell.weights(sample.mask, weight);
    if (needs_input_) scatter_channels(cell, weight, column, channels, grad_rows, first_channel);
    if (needs_weight_) sample_channels(corners, weight, channels, column);
  }

  void add_block_gradients(int64_t chunk_position, int64_t position, T* grad_offset, T* grad_mask) const {
    const int64_t image = position / g_.positions(), place = position % g_.positions();
    for (size_t begin = 0, end = 0; begin < blocks_.size(); begin = end) {
      const int64_t offset_group = blocks_[begin].offset_group;
      while (end < blocks_.size() && blocks_[end].offset_group == offset_group) ++end;
      // The first channels of a group set a gradient, those after them add to it.
      const bool is_first = blocks_[begin].begin % g_.offset_group_channels() == 0;
      const auto set_or_add = [&](T value, T& target) { target = is_first ? value : target + value; };
      for (int64_t tap = 0; tap < g_.taps(); ++tap) {
        BlockGradient sum{0, 0, 0};
        for (size_t block = begin; block < end; ++block) {
          const BlockGradient& share = block_gradients_[(block * chunk_positions_ + chunk_position) * g_.taps() + tap];
          sum.y += share.y, sum.x += share.x, sum.mask += share.mask;
        }
        const int64_t plane = (image * g_.offset_groups + offset_group) * g_.taps() + tap;
        if (grad_offset) {
          set_or_add(sum.y, grad_offset[2 * plane * g_.positions() + place]);
          set_or_add(sum.x, grad_offset[(2 * plane + 1) * g_.positions() + place]);
        }
        if (grad_mask) set_or_add(sum.mask, grad_mask[plane * g_.positions() + place]);
      }
    }
  }

  const ConvGeometry& g_;
  const ChannelRange channels_;
  ScalarType type_;
  bool needs_input_, needs_sampling_, needs_weight_;
  std::vector<ChannelBlock> blocks_;
  int64_t chunk_positions_;
  std::vector<T> outside_;                      // [kBlockChannels], zeros
  std::vector<Linear> linears_;                 // of each block: [K * block, C_out/groups]
  std::vector<Tensor> grad_weights_;            // of each block: [C_out/groups, K * block]
  std::vector<PlannedSample<T>> samples_;       // [chunk_positions, offset_groups, K]
  std::vector<BlockGradient> block_gradients_;  // [blocks, chunk_positions, K]
};

}  // namespace mmdcn
