// SPDX-License-Identifier: Apache-2.0
// Note: [Deformable RoI pooling]
//
// A region of interest is divided into P = out_height * out_width bins. A bin is the mean of samples on a regular
// grid, which the bin's offset moves. A sample (y, x) is bilinear as in RoIAlign: it is zero unless
// -1 <= y <= height and -1 <= x <= width, and a coordinate beyond the first or last pixel is clamped to that pixel.
//
// Each weight is a factor of y times a factor of x, and so is the mean over the grid:
//
//   bin = sum over rows and columns of  weight_y(row) * weight_x(column) * image[row, column]
//
// where weight_y(row) is the mean over the grid's y of max(0, 1 - |y - row|). So the cost of a bin is its number of
// pixels, not four times its number of samples, and no region costs more than the image. The samples form an
// arithmetic progression. Those with row - 1 <= y < row, whose weights rise towards the row, have a sum in closed form,
// and so do those with row <= y < row + 1, whose weights fall:
//
//   samples i .. j-1 rise:  (j - i) * (1 - (row - mean)),  mean = first + step * (i + j - 1) / 2
//
// An offset moves all samples of the bin together, so d bin / d y has slope_y(row) instead of weight_y(row): the number
// of rising samples minus the number of falling ones, divided by the number of samples. At an integer coordinate this
// is the right-hand derivative.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

namespace mmdcn {

// All sizes of a pooling.
struct RoIGeometry {
  int64_t batch, channels, height, width;
  int64_t rois, out_height, out_width;
  double spatial_scale, gamma;
  int64_t sampling_ratio;  // samples of a bin along each axis; 0: its length in pixels, rounded up
  bool aligned;  // if false, the centre of the first pixel is at 0 instead of 0.5, and a region has at least one pixel

  C10_HOST_DEVICE int64_t bins() const { return out_height * out_width; }
};

template <typename T>
struct AxisWeight {
  T weight, slope;

  C10_HOST_DEVICE bool is_zero() const { return (weight == 0) & (slope == 0); }  // without a branch
};

// The samples of a bin along one axis: first + i * step, for i from 0 to count - 1. Any of them may be outside the
// image.
template <typename T>
struct AxisSamples {
  T first, step;  // step >= 0
  T density;      // 1 / step; 0 if all samples coincide
  T count;        // a whole number, possibly too large for an integer type
  T share;        // weight of a sample in the mean
  int32_t size;   // of the image

  // Only the pixels begin() .. end() - 1 can have a nonzero weight.
  C10_HOST_DEVICE int32_t begin() const { return pixel(std::floor(first)); }
  C10_HOST_DEVICE int32_t end() const { return pixel(std::floor(first + step * (count - 1)) + 1) + 1; }

  C10_HOST_DEVICE AxisWeight<T> at(int32_t pixel) const {
    const bool is_first = pixel == 0, is_last = pixel == size - 1;
    const T place = static_cast<T>(pixel);
    const T i = below(place - 1), j = below(place), k = is_last ? through(place + 1) : below(place + 1);
    const T rise = is_first ? 0 : within(place - mean(i, j), 0, 1),
            fall = is_last ? 0 : within(mean(j, k) - place, 0, 1);
    return {((j - i) * (1 - rise) + (k - j) * (1 - fall)) * share,
            ((is_first ? 0 : j - i) - (is_last ? 0 : k - j)) * share};
  }

  C10_HOST_DEVICE bool is_nan() const { return std::isnan(first); }

 private:
  C10_HOST_DEVICE int32_t pixel(T place) const {
    return static_cast<int32_t>(within(place, 0, static_cast<T>(size - 1)));
  }

  // The number of samples below a coordinate, and the number at or below it.
  C10_HOST_DEVICE T below(T place) const {
    if (density == 0) return first < place ? count : 0;
    return within(std::ceil((place - first) * density), 0, count);
  }
  C10_HOST_DEVICE T through(T place) const {
    if (density == 0) return first <= place ? count : 0;
    return within(std::floor((place - first) * density) + 1, 0, count);
  }

  C10_HOST_DEVICE static T within(T value, T low, T high) { return value < low ? low : value > high ? high : value; }

  C10_HOST_DEVICE T mean(T i, T j) const { return first + step * (i + j - 1) / 2; }
};

// One of `bins` bins of a region that goes from `start` to `start + length`.
template <typename T>
C10_HOST_DEVICE AxisSamples<T> axis_samples(T start, T length, int64_t bins, int64_t bin, int64_t sampling_ratio,
                                            int32_t size) {
  const T bin_length = length / static_cast<T>(bins);
  const T count = sampling_ratio > 0 ? static_cast<T>(sampling_ratio) : std::ceil(bin_length);
  const T bin_start = start + static_cast<T>(bin) * bin_length;
  if (!std::isfinite(bin_length)) return {static_cast<T>(NAN), 0, 0, 0, 0, size};
  if (!(count > 0)) return {bin_start, 0, 0, 0, 0, size};
  const T step = bin_length / count, first = bin_start + step / 2, share = 1 / count;
  if (step < 0) return {first + step * (count - 1), -step, -1 / step, count, share, size};
  return {first, step, step > 0 ? 1 / step : step, count, share, size};
}

template <typename T>
struct Bin {
  int64_t image;  // kNoImage if the region's image index is out of range
  AxisSamples<T> y, x;
  T shift_y, shift_x;  // pixels by which an offset of 1 moves the samples

  C10_HOST_DEVICE bool is_nan() const { return image < 0 || y.is_nan() || x.is_nan(); }
};

constexpr int64_t kNoImage = -1;

// Bin `index` = out_y * out_width + out_x of a region.
template <typename T>
C10_HOST_DEVICE Bin<T> bin_of(const RoIGeometry& g, const T* rois, const T* offset, int64_t roi, int64_t index) {
  const T* region = rois + 5 * roi;  // image, x1, y1, x2, y2
  const T scale = static_cast<T>(g.spatial_scale), gamma = static_cast<T>(g.gamma);
  const T half = static_cast<T>(g.aligned ? 0.5 : 0);
  const T start_x = region[1] * scale - half, start_y = region[2] * scale - half;
  T length_x = region[3] * scale - half - start_x, length_y = region[4] * scale - half - start_y;
  if (!g.aligned) length_x = length_x < 1 ? 1 : length_x, length_y = length_y < 1 ? 1 : length_y;
  Bin<T> bin;
  bin.image = region[0] >= 0 && region[0] < static_cast<T>(g.batch) ? static_cast<int64_t>(region[0]) : kNoImage;
  bin.shift_x = gamma * length_x, bin.shift_y = gamma * length_y;
  T move_x = 0, move_y = 0;
  if (offset) {
    const T* own = offset + 2 * roi * g.bins() + index;
    move_x = bin.shift_x * own[0], move_y = bin.shift_y * own[g.bins()];
  }
  bin.y = axis_samples(start_y + move_y, length_y, g.out_height, index / g.out_width, g.sampling_ratio,
                       static_cast<int32_t>(g.height));
  bin.x = axis_samples(start_x + move_x, length_x, g.out_width, index % g.out_width, g.sampling_ratio,
                       static_cast<int32_t>(g.width));
  return bin;
}

}  // namespace mmdcn
