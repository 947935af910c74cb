// SPDX-License-Identifier: Apache-2.0
// Checks that keep an operator from reading outside a tensor, whoever calls it. When one fails, mmdcn/ops explains the
// error in the terms of its Python arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "readable_errors.h"

namespace mmdcn {

template <typename Sizes>
std::string to_string(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text << (i ? ", " : "") << sizes[i];
  }
  text << "]";
  return text.str();
}

inline void check_rank(const torch::stable::Tensor& tensor, const char* name, int64_t rank) {
  MMDCN_CHECK(tensor.dim() == rank, name, " must have ", rank, " dimensions, got shape ", to_string(tensor.sizes()));
}

inline void check_shape(const torch::stable::Tensor& tensor, const char* name, const std::vector<int64_t>& expected) {
  const auto sizes = tensor.sizes();
  const bool same = std::vector<int64_t>(sizes.begin(), sizes.end()) == expected;
  MMDCN_CHECK(same, name, " must have shape ", to_string(expected), ", got ", to_string(sizes));
}

inline void check_floating(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  const bool floating = type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
                        type == ScalarType::BFloat16;
  MMDCN_CHECK(floating, name, " must be float64, float32, float16 or bfloat16, got ", toString(type));
}

inline void check_same_type(const torch::stable::Tensor& tensor, const char* name, torch::headeronly::ScalarType type) {
  MMDCN_CHECK(tensor.scalar_type() == type, name, " must be ", toString(type), ", got ",
              toString(tensor.scalar_type()));
}

// Coordinates have the image's type, or float32, since narrower types cannot count many pixels.
inline void check_place_type(const torch::stable::Tensor& tensor, const char* name,
                             const torch::stable::Tensor& input) {
  using torch::headeronly::ScalarType;
  check_floating(tensor, name);
  const bool wider = tensor.scalar_type() == ScalarType::Float && input.scalar_type() != ScalarType::Double;
  if (!wider) check_same_type(tensor, name, input.scalar_type());
}

// Keeps sums and products of these values within 64 bits.
inline void check_below_2_31(const std::vector<int64_t>& values, const char* name) {
  for (const int64_t value : values) {
    MMDCN_CHECK(value <= INT32_MAX, name, " must be less than 2^31, got ", to_string(values));
  }
}

inline void check_same_device(const torch::stable::Tensor& tensor, const char* name,
                              const torch::stable::Tensor& input) {
  MMDCN_CHECK(tensor.device() == input.device(), name, " must be on the device of input");
}

}  // namespace mmdcn
