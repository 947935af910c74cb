// SPDX-License-Identifier: Apache-2.0
// The locations of a deformable convolution's samples, and the channels that share them.
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

// Channels that lie in one group; a group has `group_channels` channels.
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

// Channels that share a weight matrix: those of a group, or all channels of a depthwise convolution.
inline std::vector<GroupChannels> split_by_weights(const ConvGeometry& g, const ChannelRange& channels) {
  if (g.is_depthwise()) return {{channels, channels.begin}};
  return split_by_groups(channels, g.group_in_channels());
}

// The stride of the channels that share a weight matrix, in `weight` or its gradient.
inline int64_t weight_channel_stride(const ConvGeometry& g, const Tensor& weight) {
  return weight.stride(g.is_depthwise() ? 0 : 1);
}

template <typename T>
struct PlannedSample {
  BilinearCell<T> cell;
  T mask;
};

// The sampling locations of all taps in some images.
template <typename T>
class SamplePlan {
 public:
  SamplePlan(const ConvGeometry& g, const Tensor& offset, const std::optional<Tensor>& mask, ScalarType type)
      : g_(g),
        offset_(torch::stable::to(offset, type)),
        mask_(mask ? std::optional<Tensor>(torch::stable::to(*mask, type)) : std::nullopt),
        offsets_(offset_),
        masks_(mask_ ? Planes(*mask_) : Planes()) {}

  // Writes the samples [count, offset_groups, K] of positions first, first + 1, ... over all images. Adjacent positions
  // share cache lines of the offset planes, so offsets are read for several positions at a time.
  void locate_samples(int64_t first, int64_t count, PlannedSample<T>* samples) const {
    constexpr int64_t kRun = 16;
    const int64_t positions = g_.positions(), per_position = g_.samples_per_position();
    for (int64_t row = 0, length; row < count; row += length) {
      const int64_t image = (first + row) / positions, out = (first + row) % positions;
      const int64_t out_y = out / g_.out_width, out_x = out % g_.out_width;
      length = std::min({kRun, count - row, g_.out_width - out_x});
      locate_run(image, out_y, out_x, length, samples + row * per_position);
    }
  }

 private:
  struct Planes {
    const T* data = nullptr;
    int64_t image_stride = 0, channel_stride = 0, y_stride = 0, x_stride = 0;

    Planes() = default;
    explicit Planes(const Tensor& tensor)
        : data(mmdcn::data<const T>(tensor)),
          image_stride(tensor.stride(0)),
          channel_stride(tensor.stride(1)),
          y_stride(tensor.stride(2)),
          x_stride(tensor.stride(3)) {}

    const T* at(int64_t image, int64_t y, int64_t x) const {
      return data + image * image_stride + y * y_stride + x * x_stride;
    }
  };

  // The samples of adjacent positions in a row of an image.
  void locate_run(int64_t image, int64_t out_y, int64_t out_x, int64_t length, PlannedSample<T>* samples) const {
    constexpr int64_t kAhead = 8;  // samples, to prefetch: each is in planes of its own
    const int64_t per_position = g_.samples_per_position(), taps = g_.taps();
    const int64_t first_pixel = image * g_.height * g_.width;
    const T* offset = offsets_.at(image, out_y, out_x);
    const T* mask = masks_.data ? masks_.at(image, out_y, out_x) : nullptr;
    for (int64_t s = 0, tap = 0; s < per_position; ++s, tap = tap + 1 == taps ? 0 : tap + 1) {
      if (s + kAhead < per_position) {
        const T* ahead = offset + 2 * kAhead * offsets_.channel_stride;
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + offsets_.channel_stride);
        if (mask) __builtin_prefetch(mask + kAhead * masks_.channel_stride);
      }
      const int64_t regular_y = g_.regular_y(out_y, tap), regular_x = g_.regular_x(out_x, tap);
      for (int64_t i = 0; i < length; ++i) {
        const T* own = offset + i * offsets_.x_stride;
        PlannedSample<T>& sample = samples[i * per_position + s];
        const T y = static_cast<T>(regular_y) + own[0];
        const T x = static_cast<T>(regular_x + i * g_.stride_x) + own[offsets_.channel_stride];
        sample.cell = locate(g_.height, g_.width, y, x);
        sample.mask = mask ? mask[i * masks_.x_stride] : static_cast<T>(1);
        for (int64_t& pixel : sample.cell.pixel) {
          pixel += pixel == kOutside ? 0 : first_pixel;
        }
      }
      offset += 2 * offsets_.channel_stride;
      if (mask) mask += masks_.channel_stride;
    }
  }

  const ConvGeometry& g_;
  Tensor offset_;               // [N, 2*G*K, H_out, W_out]
  std::optional<Tensor> mask_;  // [N, G*K, H_out, W_out]
  Planes offsets_, masks_;
};

template <typename T>
SamplePlan<T> sample_plan(const ConvGeometry& g, const Tensor& offset, const std::optional<Tensor>& mask,
                          ScalarType type, int64_t first, int64_t count) {
  return {g, slice(offset, 0, first, count), mask ? std::optional(slice(*mask, 0, first, count)) : std::nullopt, type};
}

}  // namespace mmdcn
