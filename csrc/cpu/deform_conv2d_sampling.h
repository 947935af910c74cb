// SPDX-License-Identifier: Apache-2.0
// What is done with the channels of one sample: the sample itself, its transpose, and the dot products of its
// derivatives.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "../core/bilinear.h"
#include "../core/nhwc.h"
#include "bfloat16_product.h"

namespace mmdcn {

// The channels of a cell's corners; a corner outside the image reads `outside`, which is zero.
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

// Calls body(channels) with a number that the compiler knows where it is a common one: such a loop has no ends to look
// after.
template <typename Body>
void with_constant_channels(int64_t channels, const Body& body) {
  switch (channels) {
    case 4:
      return body(std::integral_constant<int64_t, 4>());
    case 8:
      return body(std::integral_constant<int64_t, 8>());
    case 16:
      return body(std::integral_constant<int64_t, 16>());
    case 32:
      return body(std::integral_constant<int64_t, 32>());
    case 64:
      return body(std::integral_constant<int64_t, 64>());
    default:
      return body(channels);
  }
}

template <typename scalar_t, typename T>
scalar_t rounded(T value) {
  return static_cast<scalar_t>(value);
}

// torch's own conversion branches on NaN, which keeps loops from being vectorised.
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

// The same, as the number of an even or an odd row of pairs; the even one comes first.
template <typename Count>
void sample_into_pairs(const CornerRows<BFloat16>& corners, const float (&weight)[4], Count channels, bool is_odd,
                       BFloat16Pair* __restrict out) {
  const BFloat16 *v0 = corners.values[0], *v1 = corners.values[1], *v2 = corners.values[2], *v3 = corners.values[3];
  const BFloat16Pair kept = is_odd ? 0xFFFF : 0, shift = is_odd ? 16 : 0;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    const float value = weight[0] * static_cast<float>(v0[c]) + weight[1] * static_cast<float>(v1[c]) +
                        weight[2] * static_cast<float>(v2[c]) + weight[3] * static_cast<float>(v3[c]);
    out[c] = (out[c] & kept) | static_cast<BFloat16Pair>(rounded<BFloat16, float>(value).x) << shift;
  }
}

// The transpose of sample_channels. Nothing is added to a corner outside.
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

template <typename scalar_t, typename T, typename Count>
void dot_corners(const CornerRows<scalar_t>& corners, const T* grad, Count channels, T (&dot)[4]) {
  const scalar_t *v0 = corners.values[0], *v1 = corners.values[1], *v2 = corners.values[2], *v3 = corners.values[3];
  T d0 = 0, d1 = 0, d2 = 0, d3 = 0;
#pragma omp simd reduction(+ : d0, d1, d2, d3)
  for (int64_t c = 0; c < channels; ++c) {
    d0 += grad[c] * static_cast<T>(v0[c]);
    d1 += grad[c] * static_cast<T>(v1[c]);
    d2 += grad[c] * static_cast<T>(v2[c]);
    d3 += grad[c] * static_cast<T>(v3[c]);
  }
  dot[0] = d0, dot[1] = d1, dot[2] = d2, dot[3] = d3;
}

}  // namespace mmdcn
