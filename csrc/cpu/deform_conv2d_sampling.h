// SPDX-License-Identifier: Apache-2.0
// The channels of one sample: sampling, its transpose, and the dot products for the derivatives.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "../core/bilinear.h"
#include "lanes.h"
#include "nhwc.h"

namespace mmdcn {

// The channels of a cell's corners; a corner outside the image points to `outside`, which is zero.
template <typename scalar_t>
struct CornerRows {
  const scalar_t* values[4];

  template <typename T>
  CornerRows(const BilinearCell<T>& cell, const Rows<scalar_t>& rows, int64_t channel, const scalar_t* outside) {
    for (int i = 0; i < 4; ++i) {
      values[i] = cell.pixel[i] == kOutside ? outside : rows.at(cell.pixel[i], channel);
    }
  }
};

template <typename scalar_t, typename T>
scalar_t rounded(T value) {
  return static_cast<scalar_t>(value);
}

// torch's conversion branches on NaN, which prevents vectorization.
template <>
inline torch::headeronly::BFloat16 rounded(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t to_nearest_even = bits + 0x7FFF + (bits >> 16 & 1), quiet_nan = bits | 0x400000;
  return {static_cast<uint16_t>((value != value ? quiet_nan : to_nearest_even) >> 16),
          torch::headeronly::BFloat16::from_bits()};
}

template <typename scalar_t, typename T, typename Count>
void sample_channels(const CornerRows<scalar_t>& corners, const T (&weight)[4], Count channels,
                     scalar_t* __restrict out) {
  const scalar_t *v0 = corners.values[0], *v1 = corners.values[1], *v2 = corners.values[2], *v3 = corners.values[3];
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = rounded<scalar_t, T>(weight[0] * static_cast<T>(v0[c]) + weight[1] * static_cast<T>(v1[c]) +
                                  weight[2] * static_cast<T>(v2[c]) + weight[3] * static_cast<T>(v3[c]));
  }
}

// The transpose of sample_channels. Corners outside the image receive nothing.
template <typename T, typename Count>
void scatter_channels(const BilinearCell<T>& cell, const T (&weight)[4], const T* __restrict grad, Count channels,
                      const Rows<T>& rows, int64_t channel) {
  for (int i = 0; i < 4; ++i) {
    if (cell.pixel[i] == kOutside) continue;
    T* __restrict row = rows.at(cell.pixel[i], channel);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      row[c] += weight[i] * grad[c];
    }
  }
}

// Computes the dot products of the corners with a column's gradient, and calls put(c, sample of channel c), which may
// overwrite the gradient. Each corner is read once for both.
template <typename scalar_t, typename T, typename Count, typename Put>
void dot_and_sample(const CornerRows<scalar_t>& corners, const T (&weight)[4], const T* grad, Count channels,
                    T (&dot)[4], const Put& put) {
  constexpr int64_t kLanes = lanes_of<T, Count>();
  T d0[kLanes] = {}, d1[kLanes] = {}, d2[kLanes] = {}, d3[kLanes] = {};
  const scalar_t *v0 = corners.values[0], *v1 = corners.values[1], *v2 = corners.values[2], *v3 = corners.values[3];
  const auto add = [&](int64_t c, int64_t lane) {
    const T c0 = static_cast<T>(v0[c]), c1 = static_cast<T>(v1[c]), c2 = static_cast<T>(v2[c]),
            c3 = static_cast<T>(v3[c]), g = grad[c];
    d0[lane] += g * c0;
    d1[lane] += g * c1;
    d2[lane] += g * c2;
    d3[lane] += g * c3;
    put(c, weight[0] * c0 + weight[1] * c1 + weight[2] * c2 + weight[3] * c3);
  };
  const int64_t whole = channels / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      add(c + lane, lane);
    }
  }
  for (int64_t c = whole; c < channels; ++c) {
    add(c, 0);
  }
  dot[0] = sum_of_lanes(d0), dot[1] = sum_of_lanes(d1), dot[2] = sum_of_lanes(d2), dot[3] = sum_of_lanes(d3);
}

}  // namespace mmdcn
