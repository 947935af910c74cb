// SPDX-License-Identifier: Apache-2.0
// Like the bodies of the kernels, this is C++ without CUDA.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <type_traits>

namespace mmdcn {

constexpr int64_t kVectorBytes = 16;

template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
constexpr int kMaxVector = kVectorBytes / sizeof(scalar_t);

// Adjacent channels of a row, loaded and stored as one.
template <typename scalar_t, int kVector>
struct alignas(sizeof(scalar_t) * kVector) Vector {
  using T = compute_t<scalar_t>;

  scalar_t values[kVector];

  C10_HOST_DEVICE static Vector at(const scalar_t* row) { return *reinterpret_cast<const Vector*>(row); }
  C10_HOST_DEVICE void store(scalar_t* row) const { *reinterpret_cast<Vector*>(row) = *this; }
  C10_HOST_DEVICE T operator[](int i) const { return static_cast<T>(values[i]); }
};

}  // namespace mmdcn
