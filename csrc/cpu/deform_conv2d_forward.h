// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "../core/conv_geometry.h"
#include "../core/dispatch.h"
#include "../core/nhwc.h"
#include "deform_conv2d_matrices.h"
#include "deform_conv2d_plan.h"
#include "deform_conv2d_sampling.h"
#include "linear.h"
#include "parallel.h"

namespace mmdcn {

constexpr int64_t kTileBytes = 5 << 18;  // of columns: about what a core's own cache holds
constexpr int64_t kMaxTilePositions = 256;
constexpr int64_t kPlanBytes = 4 << 20;   // of a thread's samples, of which many offset groups have many
constexpr int64_t kBatchedChannels = 16;  // of groups that are multiplied all in one call

// The share that some channels of the image have in the output.
template <typename scalar_t>
class ConvForward {
  using T = compute_t<scalar_t>;

 public:
  ConvForward(const ConvGeometry& g, const ChannelRange& channels, const Tensor& weight,
              const std::optional<Tensor>& bias,
              ScalarType type)  // of scalar_t
      : g_(g),
        channels_(channels),
        type_(type),
        tile_positions_(tile_positions(g, channels)),
        blocks_(channel_blocks(g, channels, channels.size())),
        outside_(channels.size(), scalar_t(0)) {
    const Tensor weight_taps = tap_major(g, weight, type);
    if (in_one_batch()) {
      const ChannelRange out = out_channels(channels);
      const auto out_rows = [&](const Tensor& t) { return slice(t, 0, out.begin, out.size()); };
      const int64_t groups = channels.size() / g.group_in_channels(), columns = g.taps() * g.group_in_channels();
      batch_.emplace(torch::stable::reshape(out_rows(weight_taps), {groups, g.group_out_channels(), columns}),
                     bias ? std::optional(out_rows(values_as(*bias, type))) : std::nullopt);
      return;
    }
    for (int64_t begin = channels.begin; begin < channels.end; begin = products_.back().channels.end) {
      const ChannelRange range = of_group(begin / g.group_in_channels()), out = out_channels(range);
      const auto out_rows = [&](const Tensor& t) { return slice(t, 0, out.begin, out.size()); };
      const int64_t in_group = begin % g.group_in_channels();
      const Tensor columns = slice(out_rows(weight_taps), 2, in_group, range.size());
      const bool is_first = in_group == 0;
      products_.push_back({range, is_first,
                           Linear(torch::stable::reshape(columns, {g.group_out_channels(), g.taps() * range.size()}),
                                  bias && is_first ? std::optional(out_rows(values_as(*bias, type))) : std::nullopt)});
    }
  }

  // Writes the output [N, P, C_out] of the images in `rows`, or adds to what a group's first channels gave.
  void run(const SamplePlan<T>& plan, const Rows<scalar_t>& rows, const Tensor& output) const {
    const int64_t positions = output.size(0) * output.size(1);
    const int64_t tiles = (positions + tile_positions_ - 1) / tile_positions_;
    share_items(tiles, [&](int64_t begin, int64_t end) {
      std::vector<PlannedSample<T>> samples(tile_positions_ * g_.samples_per_position());
      const Tensor columns = empty_matrix(output, type_, 1, tile_positions_ * g_.taps() * channels_.size());
      const Tensor target = for_worker(output);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * tile_positions_, count = std::min(tile_positions_, positions - first);
        plan.locate_samples(first, count, samples.data());
        sample(rows, samples.data(), count, static_cast<scalar_t*>(columns.data_ptr()));
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
    ChannelRange channels;
    bool is_first;  // of the group's
    Linear linear;
  };

  // As many as fit the cache; fewer where that gives the threads more equal shares.
  static int64_t tile_positions(const ConvGeometry& g, const ChannelRange& channels) {
    constexpr int64_t kFairTiles = 64, kFewestTiles = 4;
    const int64_t fitting = kTileBytes / static_cast<int64_t>(sizeof(scalar_t)) / (g.taps() * channels.size());
    const int64_t positions = g.batch * g.positions();
    const int64_t fair = std::min(std::clamp(positions / kFairTiles, fitting / 2, fitting), positions / kFewestTiles);
    const int64_t planned = kPlanBytes / static_cast<int64_t>(sizeof(PlannedSample<T>)) / g.samples_per_position();
    return round_to_rows(std::min({fair, planned, kMaxTilePositions}));
  }

  // The sums of a batch are rounded to scalar_t before the bias is added, so scalar_t has to be T.
  bool in_one_batch() const {
    const int64_t size = g_.group_in_channels();
    return std::is_same_v<scalar_t, T> && g_.groups > 1 && size <= kBatchedChannels && channels_.begin % size == 0 &&
           channels_.end % size == 0;
  }

  // Those of a group that are among the channels.
  ChannelRange of_group(int64_t group) const {
    const int64_t size = g_.group_in_channels();
    return {std::max(group * size, channels_.begin), std::min((group + 1) * size, channels_.end)};
  }

  // Of the groups that the channels are of.
  ChannelRange out_channels(const ChannelRange& channels) const {
    const int64_t in = g_.group_in_channels(), out = g_.group_out_channels();
    return {channels.begin / in * out, (channels.end + in - 1) / in * out};
  }

  // Where in `columns` those of a group begin.
  int64_t columns_before(int64_t channel) const { return tile_positions_ * g_.taps() * (channel - channels_.begin); }

  void sample(const Rows<scalar_t>& rows, const PlannedSample<T>* samples, int64_t count, scalar_t* columns) const {
    for (int64_t i = 0; i < count; ++i) {
      for (const ChannelBlock& block : blocks_) {
        const ChannelRange group = of_group(block.group);
        const PlannedSample<T>* taps = samples + (i * g_.offset_groups + block.offset_group) * g_.taps();
        scalar_t* out =
            columns + columns_before(group.begin) + i * g_.taps() * group.size() + block.begin - group.begin;
        for (int64_t tap = 0; tap < g_.taps(); ++tap, out += group.size()) {
          T weight[4];
          taps[tap].cell.weights(taps[tap].mask, weight);
          const CornerRows<scalar_t> corners(taps[tap].cell, rows, block.begin - channels_.begin, outside_.data());
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
  void write(const ChannelRange& channels, bool is_first, const Tensor& result, const Tensor& output,
             int64_t first) const {
    const ChannelRange out = out_channels(channels);
    for_each_segment(slice(output, 2, out.begin, out.size()), first, result.size(0), [&](Tensor target, int64_t row) {
      const Tensor rows = slice(result, 0, row, target.size(0));
      if (!is_first) add<scalar_t>(row_major(target, type_), rows);
      torch::stable::copy_(target, rows);
    });
  }

  const ConvGeometry& g_;
  const ChannelRange channels_;
  ScalarType type_;
  int64_t tile_positions_;
  std::vector<ChannelBlock> blocks_;
  std::optional<BatchedLinear<T>> batch_;  // of all the groups
  std::vector<Product> products_;          // or of each group that the channels are of
  std::vector<scalar_t> outside_;          // [channels], zeros
};

}  // namespace mmdcn
