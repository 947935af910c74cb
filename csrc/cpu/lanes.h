// SPDX-License-Identifier: Apache-2.0
// Sums over channels in the lanes of a vector. Compilers add the lanes of a `simd reduction` one by one, which takes
// longer than the rest of the work on 32 channels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "matrix_product.h"

namespace mmdcn {

// Calls body(channels) with a compile-time constant for common numbers of channels, so loops need no remainder.
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

// The number of channels may be a compile-time constant, see with_constant_channels.
template <typename T, typename Count>
constexpr int64_t lanes_of() {
  return lanes_for<T>(std::is_same_v<Count, int64_t> ? 16 : Count());
}

template <typename T, size_t kLanes>
T sum_of_lanes(T (&lanes)[kLanes]) {
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
#pragma omp simd
    for (size_t l = 0; l < half; ++l) {
      lanes[l] += lanes[l + half];
    }
  }
  return lanes[0];
}

template <typename T, typename Count>
T dot_product(const T* a, const T* b, Count channels) {
  constexpr int64_t kLanes = lanes_of<T, Count>();
  T sum[kLanes] = {};
  const int64_t whole = channels / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sum[lane] += a[c + lane] * b[c + lane];
    }
  }
  for (int64_t c = whole; c < channels; ++c) {
    sum[0] += a[c] * b[c];
  }
  return sum_of_lanes(sum);
}

}  // namespace mmdcn
