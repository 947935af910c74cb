// SPDX-License-Identifier: Apache-2.0
// C++ without CUDA, like the bodies of the kernels.
#pragma once

#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "../core/dispatch.h"
#include "device.cuh"

namespace mmdcn {

constexpr int64_t kVectorBytes = 16;

template <typename scalar_t>
constexpr int kMaxVector = kVectorBytes / sizeof(scalar_t);

// Adjacent channels of a row, loaded and stored together. The address must be a multiple of their size.
template <typename scalar_t, int kVector>
struct alignas(sizeof(scalar_t) * kVector) Vector {
  using T = compute_t<scalar_t>;

  static constexpr bool kPairs = kVector % 2 == 0 && sizeof(scalar_t) == 2;

  scalar_t values[kVector];

  // Only for a row that is not written while the kernel runs.
  C10_DEVICE static Vector at(const scalar_t* row) { return load(reinterpret_cast<const Vector*>(row)); }
  C10_DEVICE void store(scalar_t* row) const { mmdcn::store(reinterpret_cast<Vector*>(row), *this); }
  C10_HOST_DEVICE T operator[](int i) const { return static_cast<T>(values[i]); }

  C10_DEVICE void unpack(T (&numbers)[kVector]) const {
    if constexpr (kPairs) {
      uint32_t words[kVector / 2];
      memcpy(words, values, sizeof(words));
      for (int i = 0; i < kVector / 2; ++i) {
        unpack_pair<scalar_t>(words[i], numbers[2 * i], numbers[2 * i + 1]);
      }
    } else {
      for (int i = 0; i < kVector; ++i) {
        numbers[i] = static_cast<T>(values[i]);
      }
    }
  }

  C10_DEVICE static Vector pack(const T (&numbers)[kVector]) {
    Vector packed;
    if constexpr (kPairs) {
      uint32_t words[kVector / 2];
      for (int i = 0; i < kVector / 2; ++i) {
        words[i] = pack_pair<scalar_t>(numbers[2 * i], numbers[2 * i + 1]);
      }
      memcpy(packed.values, words, sizeof(words));
    } else {
      for (int i = 0; i < kVector; ++i) {
        packed.values[i] = static_cast<scalar_t>(numbers[i]);
      }
    }
    return packed;
  }
};

}  // namespace mmdcn
