// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "../core/conv_geometry.h"
#include "../core/dispatch.h"
#include "cache.h"
#include "deform_conv2d_plan.h"
#include "deform_conv2d_sampling.h"
#include "group_weights.h"
#include "linear.h"
#include "nhwc.h"
#include "parallel.h"
#include "positions.h"

namespace mmdcn {

constexpr int64_t kMaxTilePositions = 192;
constexpr int64_t kLeastTilePositions = 24;  // with fewer, the weights are read too often
constexpr int64_t kTileDepth = 384;          // approximate length of a product's sum
constexpr int64_t kTileRows = 6;             // rows that a product computes at a time
constexpr int64_t kSampleWork = 8;           // cost of one element of a column, in multiplications

// The contribution of some channels of the image to the output.
template <typename scalar_t>
class ConvForward {
  using T = compute_t<scalar_t>;
  static constexpr bool kOwnProduct = std::is_same_v<scalar_t, T>;
  static constexpr int64_t kRows = kOwnProduct ? kTileRows : Linear::kRows;

 public:
  ConvForward(const ConvGeometry& g, const ChannelRange& channels, const Tensor& weight,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& packed_weight,
              ScalarType type)  // of scalar_t
      : g_(g), channels_(channels), type_(type), outside_(channels.size(), scalar_t(0)) {
    set_tile();
    if constexpr (kOwnProduct) {
      weights_.emplace(g, channels, weight, packed_weight);
      bias_.resize(g.out_channels, 0);
      if (bias) std::copy_n(data<const T>(contiguous_as(*bias, type)), g.out_channels, bias_.begin());
    } else {
      const Tensor taps_first = permute(values_as(weight, type), {0, 2, 3, 1});
      const Tensor columns = torch::stable::reshape(taps_first, {g.out_channels, g.taps() * g.in_channels});
      linear_.emplace(columns, bias ? std::optional(values_as(*bias, type)) : std::nullopt);
    }
  }

  // Writes the output [N, C_out, H_out, W_out] of the images in `rows`; channels other than the first add to it. The
  // threads share the positions equally, and each splits its positions into tiles.
  void run(const SamplePlan<T>& plan, const Rows<scalar_t>& rows, const Tensor& output) const {
    const int64_t positions = output.size(0) * g_.positions();
    const int64_t items = (positions + kRows - 1) / kRows;
    const auto body = [&](int64_t begin, int64_t end) {
      const auto samples =
          std::make_unique_for_overwrite<PlannedSample<T>[]>(tile_positions_ * g_.samples_per_position());
      const int64_t first = begin * kRows, last = std::min(end * kRows, positions);
      if constexpr (kOwnProduct) {
        run_tiles(plan, rows, output, samples.get(), first, last);
      } else {
        run_tiles_of_linear(plan, rows, output, samples.get(), first, last);
      }
    };
    if constexpr (kOwnProduct) {
      const int64_t work = kRows * g_.taps() * channels_.size() * (g_.group_out_channels() + kSampleWork);
      torch::stable::parallel_for(0, items, kThreadWork / work + 1, body);
    } else {
      share_items(items, body);
    }
  }

 private:
  void set_tile() {
    const int64_t row_bytes = channels_.size() * static_cast<int64_t>(sizeof(scalar_t));
    const int64_t plan_bytes = g_.samples_per_position() * static_cast<int64_t>(sizeof(PlannedSample<T>));
    const int64_t cache = core_cache_bytes();
    const int64_t column_bytes = kOwnProduct ? cache / 4 : cache;
    const int64_t depth = std::min(channels_.size(), g_.group_in_channels());  // of a tap
    const int64_t taps = std::min(kTileDepth / depth, column_bytes / (kLeastTilePositions * row_bytes));
    tile_taps_ = kOwnProduct ? std::clamp<int64_t>(taps, 1, g_.taps()) : g_.taps();
    const int64_t fitting = std::min(column_bytes / (tile_taps_ * row_bytes), cache / plan_bytes);
    tile_positions_ = std::clamp<int64_t>(fitting / kRows, 1, kMaxTilePositions / kRows) * kRows;
  }

  void run_tiles(const SamplePlan<T>& plan, const Rows<scalar_t>& rows, const Tensor& output, PlannedSample<T>* samples,
                 int64_t begin, int64_t end) const {
    const bool in_place = is_nhwc_matrix(output, type_);
    const auto columns = std::make_unique_for_overwrite<T[]>(tile_positions_ * tile_taps_ * channels_.size());
    const auto sums = std::make_unique_for_overwrite<T[]>(in_place ? 0 : tile_positions_ * g_.out_channels);
    for (int64_t first = begin; first < end; first += tile_positions_) {
      const int64_t count = std::min(tile_positions_, end - first);
      plan.locate_samples(first, count, samples);
      T* sum = in_place ? data<T>(output) + first * g_.out_channels : sums.get();
      if (channels_.begin == 0) {
        for (int64_t i = 0; i < count; ++i) {
          std::copy_n(bias_.data(), g_.out_channels, sum + i * g_.out_channels);
        }
      } else if (!in_place) {
        read_positions(output, first, count, sum);
      }
      for (int64_t tap = 0; tap < g_.taps(); tap += tile_taps_) {
        const int64_t taps = std::min(tile_taps_, g_.taps() - tap);
        sample(rows, samples, count, tap, taps, columns.get());
        weights_->add_product(columns.get(), count, tap, taps, sum);
      }
      if (!in_place) write_positions(sum, output, first, count);
    }
  }

  // Uses oneDNN, with all channels at once.
  void run_tiles_of_linear(const SamplePlan<T>& plan, const Rows<scalar_t>& rows, const Tensor& output,
                           PlannedSample<T>* samples, int64_t begin, int64_t end) const {
    const Tensor columns = empty_matrix(output, type_, tile_positions_, g_.taps() * g_.in_channels);
    for (int64_t first = begin; first < end; first += tile_positions_) {
      const int64_t count = std::min(tile_positions_, end - first);
      plan.locate_samples(first, count, samples);
      sample(rows, samples, count, 0, g_.taps(), data<scalar_t>(columns));
      const Tensor product = (*linear_)(slice(columns, 0, 0, round_up(count, Linear::kRows)));
      write_positions(data<const scalar_t>(product), output, first, count);
    }
  }

  // columns [count, taps, channels] of some taps
  void sample(const Rows<scalar_t>& rows, const PlannedSample<T>* samples, int64_t count, int64_t first_tap,
              int64_t taps, scalar_t* columns) const {
    for (const GroupChannels& range : split_by_groups(channels_, g_.offset_group_channels())) {
      with_constant_channels(range.size(), [&](auto channels) {
        const int64_t first_channel = range.begin - channels_.begin;
        scalar_t* out = columns + first_channel;
        for (int64_t i = 0; i < count; ++i) {
          const PlannedSample<T>* own = samples + (i * g_.offset_groups + range.group) * g_.taps() + first_tap;
          for (int64_t tap = 0; tap < taps; ++tap, out += channels_.size()) {
            T weight[4];
            own[tap].cell.weights(own[tap].mask, weight);
            const CornerRows<scalar_t> corners(own[tap].cell, rows, first_channel, outside_.data());
            sample_channels(corners, weight, channels, out);
          }
        }
      });
    }
  }

  const ConvGeometry& g_;
  const ChannelRange channels_;
  ScalarType type_;
  int64_t tile_positions_, tile_taps_;
  std::optional<GroupWeights<T>> weights_;
  std::vector<T> bias_;            // [C_out]
  std::optional<Linear> linear_;   // used instead of weights_ and bias_ in bfloat16
  std::vector<scalar_t> outside_;  // [channels], zeros
};

}  // namespace mmdcn
