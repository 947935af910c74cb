// SPDX-License-Identifier: Apache-2.0
// The blocks of channels that the threads of the backward share, each with its weights and their gradient.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../core/conv_geometry.h"
#include "../core/dispatch.h"
#include "../core/stable_ops.h"
#include "bfloat16_product.h"
#include "deform_conv2d_plan.h"
#include "matrix_product.h"

namespace mmdcn {

constexpr int64_t kMaxBlockChannels = 64;

// The weights [C_out/groups, K, channels] of some channels of a group.
template <typename T>
struct BlockWeight {
  GroupChannels channels;
  int64_t columns, lanes;       // K * channels, in whole vectors
  std::unique_ptr<T[]> packed;  // the elements of `weight`
  PackedMatrix<T> weight;
  std::unique_ptr<T[]> gradient;  // [C_out/groups, columns]

  BlockWeight(const ConvGeometry& g, const GroupChannels& range, int64_t vector_lanes)
      : channels(range),
        columns(round_up(g.taps() * range.size(), vector_lanes)),
        lanes(vector_lanes),
        packed(std::make_unique_for_overwrite<T[]>(
            PackedMatrix<T>::elements(g.group_out_channels(), columns, vector_lanes))),
        weight(g.group_out_channels(), columns, vector_lanes, packed.get()),
        gradient(std::make_unique<T[]>(g.group_out_channels() * columns)) {}
};

// Channels of one group, or several whole groups if the channels of each fill whole vectors. In a depthwise convolution
// all channels of the block count as one group. The columns are [positions, K, channels], in rows of whole vectors.
template <typename T>
struct ChannelBlock : ChannelRange {
  std::vector<BlockWeight<T>> groups;
  std::vector<GroupChannels> offset_groups;
  int64_t first_range;  // the number of offset groups in the preceding blocks
  int64_t column_stride;

  // columns [count, column_stride] = grad_output [count, C_out] x weight
  void columns_gradient(const ConvGeometry& g, const T* grad_output, int64_t count, T* columns) const {
    if (g.is_depthwise()) {
      for_each_depthwise_column(g, count, [&](int64_t weight, int64_t output, int64_t column) {
        columns[column] = grad_output[output] * groups[0].packed[weight];
      });
      return;
    }
    for (const BlockWeight<T>& part : groups) {
      MatrixProduct<T> product{.rows = count,
                               .depth = g.group_out_channels(),
                               .left = grad_output + part.channels.group * g.group_out_channels(),
                               .left_stride = g.out_channels,
                               .result = columns + part.channels.begin - this->begin,
                               .result_stride = column_stride,
                               .result_vector_stride = vector_stride(part),
                               .accumulates = false};
      part.weight.set_right(product, 0);
      multiply<false>(product);
    }
  }

  void add_weight_gradient(const ConvGeometry& g, const T* grad_output, int64_t count, const T* columns) {
    if (g.is_depthwise()) {
      std::vector<T> sums(g.taps() * this->size());  // of these positions alone, for small rounding errors
      for_each_depthwise_column(g, count, [&](int64_t weight, int64_t output, int64_t column) {
        sums[weight] += grad_output[output] * columns[column];
      });
      for (size_t i = 0; i < sums.size(); ++i) groups[0].gradient[i] += sums[i];
      return;
    }
    for (BlockWeight<T>& part : groups) {
      multiply<true>(MatrixProduct<T>{.rows = g.group_out_channels(),
                                      .columns = part.columns,
                                      .depth = count,
                                      .lanes = part.lanes,
                                      .left = grad_output + part.channels.group * g.group_out_channels(),
                                      .left_stride = g.out_channels,
                                      .right = columns + part.channels.begin - this->begin,
                                      .right_stride = column_stride,
                                      .right_vector_stride = vector_stride(part),
                                      .result = part.gradient.get(),
                                      .result_stride = part.columns,
                                      .result_vector_stride = part.lanes});
    }
  }

 private:
  // Calls body(index in the weight, index in the output's rows, index in the columns) for each column. The weight is a
  // single row [K * channels].
  template <typename Body>
  void for_each_depthwise_column(const ConvGeometry& g, int64_t count, const Body& body) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t tap = 0; tap < g.taps(); ++tap) {
        const int64_t weight = tap * this->size(), output = i * g.out_channels + this->begin;
        const int64_t column = i * column_stride + weight;
#pragma omp simd
        for (int64_t c = 0; c < this->size(); ++c) {
          body(weight + c, output + c, column + c);
        }
      }
    }
  }

  int64_t vector_stride(const BlockWeight<T>& part) const { return groups.size() > 1 ? this->size() : part.lanes; }
};

// The weights of a block of one group in bfloat16: [pairs of C_out, K * channels].
inline std::unique_ptr<BFloat16Pair[]> weight_pairs(const ConvGeometry& g, const ChannelBlock<float>& block) {
  const PackedMatrix<float>& weight = block.groups[0].weight;
  const int64_t columns = block.column_stride, rows = g.group_out_channels();
  auto pairs = std::make_unique_for_overwrite<BFloat16Pair[]>((rows + 1) / 2 * columns);
  for (int64_t row = 0; row < rows; row += 2) {
    for (int64_t first = 0; first < columns; first += weight.panel_columns()) {
      const int64_t count = std::min(weight.panel_columns(), columns - first);
      const float *even = &weight.at(row, first), *odd = row + 1 < rows ? &weight.at(row + 1, first) : nullptr;
      BFloat16Pair* pair = pairs.get() + row / 2 * columns + first;
      for (int64_t column = 0; column < count; ++column) {
        pair[column] = bfloat16_pair(even[column], odd ? odd[column] : 0.0f);
      }
    }
  }
  return pairs;
}

// The end of the block that begins at a channel.
inline int64_t block_end(const ConvGeometry& g, int64_t begin, int64_t channels_end) {
  const int64_t most = g.taps() < 4 ? kMaxBlockChannels : kMaxBlockChannels / 2, size = g.group_in_channels();
  const int64_t end = std::min(begin + most, channels_end);
  if (g.is_depthwise()) return end;
  const int64_t group_end = (begin / size + 1) * size;
  const bool groups_are_vectors = size == 4 || size == 8 || size == 16;
  if (end <= group_end || !groups_are_vectors || begin % size != 0) return std::min(end, group_end);
  return begin + (end - begin) / size * size;
}

template <typename T>
std::vector<ChannelBlock<T>> channel_blocks(const ConvGeometry& g, const ChannelRange& channels) {
  std::vector<ChannelBlock<T>> blocks;
  int64_t ranges = 0;
  for (int64_t begin = channels.begin; begin < channels.end; begin = blocks.back().end) {
    ChannelBlock<T>& block = blocks.emplace_back();
    block.begin = begin, block.end = block_end(g, begin, channels.end);
    const std::vector<GroupChannels> groups = split_by_weights(g, block);
    for (const GroupChannels& group : groups) {
      const int64_t lanes = groups.size() > 1 ? group.size() : lanes_for<T>(g.taps() * group.size());
      block.groups.emplace_back(g, group, lanes);
    }
    block.offset_groups = split_by_groups(block, g.offset_group_channels());
    block.first_range = ranges;
    block.column_stride = groups.size() > 1 ? g.taps() * block.size() : block.groups[0].columns;
    ranges += std::ssize(block.offset_groups);
  }
  return blocks;
}

// Calls body(block weight, indices of its columns in a row of the weight [C_out, C_in/groups, kh, kw]) on all threads.
template <typename T, typename Body>
void for_each_block_weight(const ConvGeometry& g, const std::vector<ChannelBlock<T>>& blocks, const Tensor& weight,
                           const Body& body) {
  const int64_t channel_stride = weight_channel_stride(g, weight), y_stride = weight.stride(2),
                x_stride = weight.stride(3);
  torch::stable::parallel_for(0, blocks.size(), kThreadWork / weight.numel() + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (const BlockWeight<T>& part : blocks[i].groups) {
        std::vector<int64_t> indices;
        for (int64_t column = 0; column < g.taps() * part.channels.size(); ++column) {
          const int64_t tap = column / part.channels.size(), c = column % part.channels.size();
          indices.push_back((part.channels.begin % g.group_in_channels() + c) * channel_stride +
                            tap / g.kernel_width * y_stride + tap % g.kernel_width * x_stride);
        }
        body(part, indices);
      }
    }
  });
}

template <typename T>
void pack_weight(const ConvGeometry& g, const Tensor& weight, const std::vector<ChannelBlock<T>>& blocks) {
  dispatch_storage(weight.scalar_type(), "weight", [&](auto zero) {
    const auto* from = data<const decltype(zero)>(weight);
    const int64_t out_stride = weight.stride(0), outputs = g.group_out_channels();
    for_each_block_weight(g, blocks, weight, [&](const BlockWeight<T>& part, const std::vector<int64_t>& indices) {
      const int64_t panel = part.weight.panel_columns();
      for (int64_t o = 0; o < outputs; ++o) {
        const auto* row = from + (part.channels.group * outputs + o) * out_stride;
        for (int64_t first = 0; first < part.columns; first += panel) {
          T* target = &part.weight.at(o, first);
          for (int64_t column = first; column < std::min(first + panel, part.columns); ++column) {
            target[column - first] = column < std::ssize(indices) ? static_cast<T>(row[indices[column]]) : T(0);
          }
        }
      }
    });
  });
}

template <typename T>
void unpack_grad_weight(const ConvGeometry& g, const std::vector<ChannelBlock<T>>& blocks, const Tensor& grad_weight) {
  dispatch_storage(grad_weight.scalar_type(), "weight", [&](auto zero) {
    auto* to = data<decltype(zero)>(grad_weight);
    const int64_t out_stride = grad_weight.stride(0), outputs = g.group_out_channels();
    for_each_block_weight(g, blocks, grad_weight, [&](const BlockWeight<T>& part, const std::vector<int64_t>& indices) {
      for (int64_t o = 0; o < outputs; ++o) {
        auto* row = to + (part.channels.group * outputs + o) * out_stride;
        for (int64_t column = 0; column < std::ssize(indices); ++column) {
          row[indices[column]] = static_cast<decltype(zero)>(part.gradient[o * part.columns + column]);
        }
      }
    });
  });
}

}  // namespace mmdcn
