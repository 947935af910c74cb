// SPDX-License-Identifier: Apache-2.0
// Where the samples of a deformable convolution lie, and the channels that share them.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../core/bilinear.h"
#include "../core/conv_geometry.h"
#include "../core/dispatch.h"
#include "../core/stable_ops.h"

namespace mmdcn {

struct ChannelRange {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Channels that share a group of the weight and a group of the offsets.
struct ChannelBlock : ChannelRange {
  int64_t group, offset_group;
};

inline std::vector<ChannelBlock> channel_blocks(const ConvGeometry& g, const ChannelRange& channels,
                                                int64_t max_channels) {
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

template <typename T>
struct PlannedSample {
  BilinearCell<T> cell;
  T mask;
};

// Where the taps of some images sample.
template <typename T>
class SamplePlan {
 public:
  SamplePlan(const ConvGeometry& g, const Tensor& offset, const std::optional<Tensor>& mask, ScalarType type)
      : g_(g),
        offset_(torch::stable::to(offset, type)),
        mask_(mask ? std::optional<Tensor>(torch::stable::to(*mask, type)) : std::nullopt) {}

  // samples [count, offset_groups, K] of positions first, first + 1, ... of all the images.
  void locate_samples(int64_t first, int64_t count, PlannedSample<T>* samples) const {
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
SamplePlan<T> sample_plan(const ConvGeometry& g, const Tensor& offset, const std::optional<Tensor>& mask,
                          ScalarType type, int64_t first, int64_t count) {
  return {g, slice(offset, 0, first, count), mask ? std::optional(slice(*mask, 0, first, count)) : std::nullopt, type};
}

}  // namespace mmdcn
