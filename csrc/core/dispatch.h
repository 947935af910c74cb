// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "readable_errors.h"

namespace mmdcn {

using torch::headeronly::ScalarType;

// The compute type: double for double, float for everything narrower.
inline ScalarType compute_type(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The C++ compute type of a C++ storage type.
template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Calls body(T{}) with the C++ type of a compute type.
template <typename Body>
void dispatch_compute(ScalarType type, const Body& body) {
  if (type == ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

// The same, and bfloat16 as well.
template <typename Body>
void dispatch_product(ScalarType type, const Body& body) {
  if (type == ScalarType::BFloat16) return body(torch::headeronly::BFloat16{});
  dispatch_compute(type, body);
}

// Calls body(T{}) with the C++ type of a storage type.
template <typename Body>
void dispatch_storage(ScalarType type, const char* name, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      MMDCN_CHECK(false, name, " must be float64, float32, float16 or bfloat16, got ", toString(type));
  }
}

}  // namespace mmdcn
