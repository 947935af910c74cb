// SPDX-License-Identifier: Apache-2.0
// Note [Deformable RoI pooling] defines a bin.
//
// The images are NHWC rows. Each bin's weights are computed once, first. In the forward the threads share the regions.
// In the backward they share blocks of channels: a block owns its channels of grad_input, and its contribution to
// grad_offset is summed with the others' in the order of the blocks. So no two threads write the same address, and the
// bits do not depend on the number of threads. Images that are not NHWC in the compute type are copied, some channels
// at a time (bounded_copies.h).
#include "../ops/deform_roi_pool.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

#include "../core/dispatch.h"
#include "bounded_copies.h"
#include "lanes.h"
#include "nhwc.h"

namespace mmdcn {
namespace {

// A row or a column with a nonzero weight in a bin.
template <typename T>
struct PixelWeight : AxisWeight<T> {
  int64_t pixel;
};

template <typename T>
using PixelWeights = std::span<const PixelWeight<T>>;

// The bins of a region.
template <typename T>
class PlannedRoI {
 public:
  PlannedRoI() = default;
  PlannedRoI(const RoIGeometry& g, const T* rois, const T* offset, int64_t roi) {
    for (int64_t index = 0; index < g.bins(); ++index) {
      const Bin<T> bin = bin_of(g, rois, offset, roi, index);
      bins_.push_back({bin.shift_y, bin.shift_x, bin.is_nan(), add(bin.is_nan(), bin.y), add(bin.is_nan(), bin.x)});
    }
  }

  PixelWeights<T> rows(int64_t bin) const { return weights(bins_[bin].rows); }
  PixelWeights<T> columns(int64_t bin) const { return weights(bins_[bin].columns); }
  bool is_nan(int64_t bin) const { return bins_[bin].is_nan; }
  T shift_y(int64_t bin) const { return bins_[bin].shift_y; }
  T shift_x(int64_t bin) const { return bins_[bin].shift_x; }

 private:
  struct Range {
    size_t begin, end;
  };
  struct PlannedBin {
    T shift_y, shift_x;
    bool is_nan;
    Range rows, columns;
  };

  Range add(bool is_nan, const AxisSamples<T>& samples) {
    const size_t begin = weights_.size();
    if (is_nan) return {begin, begin};
    for (int32_t pixel = samples.begin(); pixel < samples.end(); ++pixel) {
      const AxisWeight<T> weight = samples.at(pixel);
      if (!weight.is_zero()) weights_.push_back({weight, pixel});
    }
    return {begin, weights_.size()};
  }

  PixelWeights<T> weights(const Range& range) const { return {weights_.data() + range.begin, range.end - range.begin}; }

  std::vector<PlannedBin> bins_;
  std::vector<PixelWeight<T>> weights_;
};

template <typename T>
class Plan {
 public:
  Plan(const RoIGeometry& g, const Tensor& rois, const std::optional<Tensor>& offset, ScalarType type)
      : rois_(g.rois), rois_of_(g.batch) {
    const Tensor regions = contiguous_as(rois, type);
    const std::optional<Tensor> shifts = offset ? std::optional(contiguous_as(*offset, type)) : std::nullopt;
    const T* region = data<const T>(regions);
    for (int64_t roi = 0; roi < g.rois; ++roi) {
      rois_of_[image_of(g, region, roi)].push_back(roi);
    }
    torch::stable::parallel_for(0, g.rois, 1, [&](int64_t begin, int64_t end) {
      for (int64_t roi = begin; roi < end; ++roi) {
        rois_[roi] = {g, region, shifts ? data<const T>(*shifts) : nullptr, roi};
      }
    });
  }

  const std::vector<int64_t>& rois_of(int64_t image) const { return rois_of_[image]; }
  const PlannedRoI<T>& operator[](int64_t roi) const { return rois_[roi]; }

 private:
  static int64_t image_of(const RoIGeometry& g, const T* rois, int64_t roi) {
    const T image = rois[5 * roi];
    MMDCN_CHECK(image >= 0 && image < static_cast<T>(g.batch), "rois[", roi,
                ", 0] must be the number of an image of input, from 0 to ", g.batch - 1, ", got ", image);
    return static_cast<int64_t>(image);
  }

  std::vector<PlannedRoI<T>> rois_;            // [N]
  std::vector<std::vector<int64_t>> rois_of_;  // each image
};

// Some channels of an image, and the regions on it.
struct ImageChannels {
  int64_t image, first_channel, channels;
  const std::vector<int64_t>& rois;
};

// Calls body(part) for each image with regions, or for parts of its channels if they may not all be copied at once.
template <typename T, typename Body>
void for_each_image(const RoIGeometry& g, const Plan<T>& plan, bool copies, const Body& body) {
  const int64_t step = copies ? std::min(copied_channels(g.height, g.width, sizeof(T)), g.channels) : g.channels;
  for (int64_t image = 0; image < g.batch; ++image) {
    if (plan.rois_of(image).empty()) continue;
    for (int64_t first = 0; first < g.channels; first += step) {
      body(ImageChannels{image, first, std::min(step, g.channels - first), plan.rois_of(image)});
    }
  }
}

Tensor channels_of(const Tensor& images, const ImageChannels& part) {
  return slice(images, 1, part.first_channel, part.channels);
}

// Calls body(first, count) for blocks of channels, with a compile-time count for whole blocks.
template <typename Body>
void for_each_block(int64_t channels, const Body& body) {
  int64_t first = 0;
  for (; first + kBlockChannels <= channels; first += kBlockChannels) {
    body(first, std::integral_constant<int64_t, kBlockChannels>());
  }
  if (first < channels) body(first, channels - first);
}

template <typename T, typename Count>
void pool(const PlannedRoI<T>& roi, int64_t bin, const Rows<T>& rows, int64_t width, int64_t channel, Count channels,
          T* sum) {
  std::fill_n(sum, static_cast<int64_t>(channels), roi.is_nan(bin) ? static_cast<T>(NAN) : static_cast<T>(0));
  for (const PixelWeight<T>& y : roi.rows(bin)) {
    for (const PixelWeight<T>& x : roi.columns(bin)) {
      const T weight = y.weight * x.weight;
      const T* pixel = rows.at(y.pixel * width + x.pixel, channel);
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] += weight * pixel[c];
      }
    }
  }
}

Tensor deform_roi_pool(const DeformRoIPoolCall& call) {
  const auto& [g, input, rois, offset] = call;
  const Tensor output = torch::stable::empty({g.rois, g.channels, g.out_height, g.out_width}, input.scalar_type(),
                                             std::nullopt, input.device(), std::nullopt, memory_format(input));
  const int64_t roi_stride = output.stride(0), channel_stride = output.stride(1), bin_stride = output.stride(3);
  const ScalarType type = compute_type(input.scalar_type());
  dispatch_storage(input.scalar_type(), "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = compute_t<scalar_t>;
    const Plan<T> plan(g, rois, offset, type);
    for_each_image(g, plan, !is_nhwc_rows(input, type), [&](const ImageChannels& part) {
      const Rows<T> rows = nhwc_rows<T>(channels_of(input, part), part.image, 1, type);
      scalar_t* target = data<scalar_t>(output) + part.first_channel * channel_stride;
      torch::stable::parallel_for(0, part.rois.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t roi = part.rois[i];
          for (int64_t bin = 0; bin < g.bins(); ++bin) {
            scalar_t* bin_target = target + roi * roi_stride + bin * bin_stride;
            for_each_block(part.channels, [&](int64_t first, auto channels) {
              T sum[kBlockChannels];
              pool(plan[roi], bin, rows, g.width, first, channels, sum);
              for (int64_t c = 0; c < channels; ++c) {
                bin_target[(first + c) * channel_stride] = static_cast<scalar_t>(sum[c]);
              }
            });
          }
        }
      });
    });
  });
  return output;
}

// The derivatives of a bin with respect to a shift of its samples.
template <typename T>
struct ShiftGradient {
  T y, x;
};

// The gradients of some channels of an image.
template <typename T>
class Backward {
 public:
  // Without input rows the gradients of shifts are not computed; without rows of its gradient, that gradient is not.
  Backward(const RoIGeometry& g, const Plan<T>& plan, const ImageChannels& part, const std::optional<Rows<T>>& rows,
           const std::optional<Rows<T>>& grad_rows)
      : g_(g),
        plan_(plan),
        part_(part),
        rows_(rows),
        grad_rows_(grad_rows),
        blocks_((part.channels + kBlockChannels - 1) / kBlockChannels),
        shift_gradients_(rows ? blocks_ * part.rois.size() * g.bins() : 0) {}

  // Adds to grad_rows, and to grad_offset [N, 2, P] if it is not null, from grad_output [N, P, C].
  void run(const T* grad_output, T* grad_offset) {
    torch::stable::parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kBlockChannels, count = std::min(kBlockChannels, part_.channels - first);
        for_each_block(count, [&](int64_t, auto channels) { run_block(block, first, channels, grad_output); });
      }
    });
    if (grad_offset) add_shift_gradients(grad_offset);
  }

 private:
  template <typename Count>
  void run_block(int64_t block, int64_t first, Count channels, const T* grad_output) {
    ShiftGradient<T>* gradient = shift_gradients_.data() + block * part_.rois.size() * g_.bins();
    for (const int64_t roi : part_.rois) {
      for (int64_t bin = 0; bin < g_.bins(); ++bin) {
        const T* grad = grad_output + (roi * g_.bins() + bin) * g_.channels + part_.first_channel + first;
        if (grad_rows_) scatter(plan_[roi], bin, first, channels, grad);
        if (rows_) *gradient++ = dot(plan_[roi], bin, first, channels, grad);
      }
    }
  }

  // The transpose of `pool`.
  template <typename Count>
  void scatter(const PlannedRoI<T>& roi, int64_t bin, int64_t channel, Count channels, const T* __restrict grad) const {
    for (const PixelWeight<T>& y : roi.rows(bin)) {
      for (const PixelWeight<T>& x : roi.columns(bin)) {
        const T weight = y.weight * x.weight;
        T* __restrict pixel = grad_rows_->at(y.pixel * g_.width + x.pixel, channel);
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          pixel[c] += weight * grad[c];
        }
      }
    }
  }

  template <typename Count>
  ShiftGradient<T> dot(const PlannedRoI<T>& roi, int64_t bin, int64_t channel, Count channels, const T* grad) const {
    if (roi.is_nan(bin)) return {static_cast<T>(NAN), static_cast<T>(NAN)};
    ShiftGradient<T> sum{0, 0};
    for (const PixelWeight<T>& y : roi.rows(bin)) {
      for (const PixelWeight<T>& x : roi.columns(bin)) {
        const T product = dot_product(grad, rows_->at(y.pixel * g_.width + x.pixel, channel), channels);
        sum.y += y.slope * x.weight * product, sum.x += y.weight * x.slope * product;
      }
    }
    return {sum.y * roi.shift_y(bin), sum.x * roi.shift_x(bin)};
  }

  void add_shift_gradients(T* grad_offset) const {
    const int64_t bins = part_.rois.size() * g_.bins();
    for (int64_t i = 0; i < bins; ++i) {
      T* target = grad_offset + 2 * part_.rois[i / g_.bins()] * g_.bins() + i % g_.bins();
      for (int64_t block = 0; block < blocks_; ++block) {
        target[0] += shift_gradients_[block * bins + i].x, target[g_.bins()] += shift_gradients_[block * bins + i].y;
      }
    }
  }

  const RoIGeometry& g_;
  const Plan<T>& plan_;
  const ImageChannels& part_;
  const std::optional<Rows<T>>& rows_;
  const std::optional<Rows<T>>& grad_rows_;
  int64_t blocks_;
  std::vector<ShiftGradient<T>> shift_gradients_;  // [blocks, regions of the part, P]
};

DeformRoIPoolGradients deform_roi_pool_backward(const DeformRoIPoolCall& call, const Tensor& grad_output,
                                                const std::vector<bool>& output_mask) {
  const auto& [g, input, rois, offset] = call;
  const ScalarType type = compute_type(input.scalar_type());
  Tensor grad_input = empty_gradient(output_mask[0], input, input.scalar_type(), memory_format(input));
  Tensor grad_offset = empty_gradient(output_mask[1], offset.value_or(rois), type);
  torch::stable::zero_(grad_input);
  torch::stable::zero_(grad_offset);
  const Tensor grad_bins = torch::stable::contiguous(nhwc_matrix(grad_output, 0, g.rois, type));  // [N * P, C]
  dispatch_compute(type, [&](auto zero) {
    using T = decltype(zero);
    const Plan<T> plan(g, rois, offset, type);
    const bool copies_grad_input = output_mask[0] && !is_nhwc_matrix(grad_input, type);
    const bool copies_input = output_mask[1] && !is_nhwc_rows(input, type);
    for_each_image(g, plan, copies_grad_input || copies_input, [&](const ImageChannels& part) {
      const std::optional<Rows<T>> rows =
          output_mask[1] ? std::optional(nhwc_rows<T>(channels_of(input, part), part.image, 1, type)) : std::nullopt;
      std::optional<Rows<T>> grad_rows;
      if (output_mask[0]) {
        Tensor sum = copies_grad_input ? empty_nhwc(channels_of(input, part), 1, type)
                                       : nhwc_view(channels_of(grad_input, part), part.image, 1);
        if (copies_grad_input) torch::stable::zero_(sum);
        grad_rows = Rows<T>{sum, data<T>(sum), copies_grad_input ? part.channels : g.channels};
      }
      Backward<T>(g, plan, part, rows, grad_rows)
          .run(data<const T>(grad_bins), output_mask[1] ? data<T>(grad_offset) : nullptr);
      if (copies_grad_input) copy_from_nhwc<T>(grad_rows->images, channels_of(grad_input, part), part.image);
    });
  });
  return {grad_input, output_mask[1] ? torch::stable::to(grad_offset, offset->scalar_type()) : grad_offset};
}

}  // namespace

MMDCN_CPU_KERNELS(library) { DeformRoIPoolKernels<&deform_roi_pool, &deform_roi_pool_backward>::add_to(library); }

}  // namespace mmdcn
