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
#include "positions.h"

namespace mmdcn {

struct ChannelRange {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The parts of the channels that lie in one group each, of `group_channels` channels.
struct GroupChannels : ChannelRange {
  int64_t group;
};

inline std::vector<GroupChannels> split_by_groups(const ChannelRange& channels, int64_t group_channels) {
  std::vector<GroupChannels> parts;
  for (int64_t begin = channels.begin; begin < channels.end; begin = parts.back().end) {
    const int64_t group = begin / group_channels;
    parts.push_back({{begin, std::min((group + 1) * group_channels, channels.end)}, group});
  }
  return parts;
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

  // samples [count, offset_groups, K] of positions first, first + 1, ... of all the images. Adjacent positions share
  // the cache lines of the offsets' planes, so that these are read for some positions at a time.
  void locate_samples(int64_t first, int64_t count, PlannedSample<T>* samples) const {
    for_each_run(offset_, first, count, [&](int64_t offset_begin, int64_t row, int64_t length) {
      const int64_t position = first + row, image = position / g_.positions();
      const int64_t out_y = position % g_.positions() / g_.out_width, out_x = position % g_.out_width;
      const T* offset = data<const T>(offset_) + offset_begin;
      const T* mask = mask_ ? at(*mask_, image, out_y, out_x) : nullptr;
      for (int64_t s = 0; s < g_.samples_per_position(); ++s) {
        const int64_t tap = s % g_.taps();
        const int64_t regular_y = g_.regular_y(out_y, tap), regular_x = g_.regular_x(out_x, tap);
        for (int64_t i = 0; i < length; ++i) {
          const T* own = offset + 2 * s * offset_.stride(1) + i * offset_.stride(3);
          const T y = static_cast<T>(regular_y) + own[0];
          const T x = static_cast<T>(regular_x + i * g_.stride_x) + own[offset_.stride(1)];
          PlannedSample<T>& sample = samples[(row + i) * g_.samples_per_position() + s];
          sample.cell = locate(g_.height, g_.width, y, x);
          sample.mask = mask ? mask[s * mask_->stride(1) + i * mask_->stride(3)] : static_cast<T>(1);
          for (int64_t& pixel : sample.cell.pixel) {
            pixel += pixel == kOutside ? 0 : image * g_.height * g_.width;
          }
        }
      }
    });
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
