// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../core/conv_geometry.h"
#include "../core/dispatch.h"
#include "../core/stable_ops.h"
#include "deform_conv2d_plan.h"
#include "lanes.h"
#include "matrix_product.h"

namespace mmdcn {

// The weights of the groups to which some channels belong, as right matrices [K * channels, C_out/groups]. Those of a
// depthwise convolution are a single column [K * channels].
template <typename T>
class GroupWeights {
 public:
  // Packs the weight, or takes the packed() weight of another object with the same weight and channels.
  GroupWeights(const ConvGeometry& g, const ChannelRange& channels, const Tensor& weight,
               const std::optional<Tensor>& packed = std::nullopt)
      : g_(g),
        channels_(channels),
        packed_(packed ? *packed : torch::stable::empty({elements(g, channels)}, compute_type(weight.scalar_type()))) {
    T* part = data<T>(packed_);
    for (const GroupChannels& range : split_by_weights(g, channels)) {
      parts_.push_back({range, {g.taps() * range.size(), g.group_out_channels(), lanes(g), part}});
      part += elements(g, range);
    }
    if (packed) return;
    dispatch_storage(weight.scalar_type(), "weight", [&](auto zero) { pack<decltype(zero)>(weight); });
  }

  const Tensor& packed() const { return packed_; }  // [elements]

  static int64_t elements(const ConvGeometry& g, const ChannelRange& channels) {
    return PackedMatrix<T>::elements(g.taps() * channels.size(), g.group_out_channels(), lanes(g));
  }

  // result [count, C_out] += columns [count, taps, channels] of some taps x the weights
  void add_product(const T* columns, int64_t count, int64_t first_tap, int64_t taps, T* result) const {
    if (g_.is_depthwise()) return add_depthwise_product(columns, count, first_tap, taps, result);
    for (const Part& part : parts_) {
      const int64_t depth = part.channels.size();
      MatrixProduct<T> product{.rows = count,
                               .depth = depth,
                               .left = columns + part.channels.begin - channels_.begin,
                               .left_stride = taps * channels_.size(),
                               .segments = taps,
                               .segment_stride = channels_.size(),
                               .result = result + part.channels.group * g_.group_out_channels(),
                               .result_stride = g_.out_channels,
                               .accumulates = true};
      part.weight.set_right(product, first_tap * depth);
      product.result_vector_stride = product.lanes;
      multiply<false>(product);
    }
  }

 private:
  static int64_t lanes(const ConvGeometry& g) { return g.is_depthwise() ? 1 : lanes_for<T>(g.group_out_channels()); }

  void add_depthwise_product(const T* columns, int64_t count, int64_t first_tap, int64_t taps, T* result) const {
    const int64_t size = channels_.size();
    const T* weights = &parts_[0].weight.at(first_tap * size, 0);
    for (int64_t i = 0; i < count; ++i) {
      T* sums = result + i * g_.out_channels + channels_.begin;
      for (int64_t tap = 0; tap < taps; ++tap, columns += size) {
        const T* factors = weights + tap * size;
#pragma omp simd
        for (int64_t c = 0; c < size; ++c) {
          sums[c] += factors[c] * columns[c];
        }
      }
    }
  }

  struct Part {
    GroupChannels channels;
    PackedMatrix<T> weight;
  };

  template <typename scalar_t>
  void pack(const Tensor& weight) const {
    // Outputs that are adjacent in the packed matrix, few enough for their rows of the weight to stay in cache.
    const int64_t step = std::min<int64_t>(parts_[0].weight.panel_columns(), 16);
    const int64_t out_steps = (g_.group_out_channels() + step - 1) / step;
    const int64_t work = weight.numel() / (out_steps * std::ssize(parts_));
    torch::stable::parallel_for(0, out_steps * parts_.size(), kThreadWork / 8 / std::max<int64_t>(work, 1) + 1,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) {
                                    const Part& part = parts_[i / out_steps];
                                    const int64_t first = i % out_steps * step,
                                                  last = std::min(first + step, g_.group_out_channels());
                                    pack_outputs<scalar_t>(weight, part, first, last);
                                  }
                                });
  }

  template <typename scalar_t>
  void pack_outputs(const Tensor& weight, const Part& part, int64_t first, int64_t last) const {
    const int64_t in_group = part.channels.begin % g_.group_in_channels(), size = part.channels.size();
    const int64_t out_stride = weight.stride(0), channel_stride = weight_channel_stride(g_, weight);
    const scalar_t* weights = data<const scalar_t>(weight) +
                              (part.channels.group * g_.group_out_channels() + first) * out_stride +
                              in_group * channel_stride;
    // Few enough for their taps to stay in the L1 cache. A channels_last weight is read in runs of channels.
    const int64_t block = channel_stride == 1 ? 64 : 16;
    with_constant_channels(last - first, [&](auto outputs) {
      for (int64_t channel = 0; channel < size; channel += block) {
        for (int64_t tap = 0; tap < g_.taps(); ++tap) {
          const scalar_t* from =
              weights + tap / g_.kernel_width * weight.stride(2) + tap % g_.kernel_width * weight.stride(3);
          for (int64_t c = channel; c < std::min(channel + block, size); ++c) {
            T* target = &part.weight.at(tap * size + c, first);
            for (int64_t o = 0; o < outputs; ++o) {
              target[o] = static_cast<T>(from[o * out_stride + c * channel_stride]);
            }
          }
        }
      }
    });
    if (last == g_.group_out_channels()) part.weight.zero_padding();
  }

  const ConvGeometry& g_;
  const ChannelRange channels_;
  const Tensor packed_;
  std::vector<Part> parts_;
};

}  // namespace mmdcn
