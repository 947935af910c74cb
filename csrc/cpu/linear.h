// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "../core/dispatch.h"
#include "../core/stable_ops.h"

// Whether oneDNN's operators have the arguments that are given to them below. mmdcn._extension sets it, since their
// schemas cannot be read here, and torch promises those of its native operators alone.
extern "C" {
__attribute__((visibility("default"))) inline bool mmdcn_knows_onednn = false;
}

namespace mmdcn {

// x @ weight^T + bias, for many x and one weight.
//
// oneDNN computes it where it can, with the weight packed once: torch's own product packs it again for every x, and
// asks BLAS, which on some processors reaches only half of what they can do. float64 oneDNN does not have, and
// bfloat16 not on every processor.
class Linear {
 public:
  // oneDNN compiles a kernel for each number of rows that it meets. So that images of all sizes do not each cost a
  // compilation, it gets multiples of this alone.
  static constexpr int64_t kRows = 32;

  Linear(const Tensor& weight,                              // [N, K]
         const std::optional<Tensor>& bias = std::nullopt)  // [N]
      : packed_(packs(weight.scalar_type())), weight_(packed_ ? pack(weight) : weight), bias_(bias) {}

  // The result may have more rows than x: those after M mean nothing.
  Tensor operator()(const Tensor& x  // [M, K]
  ) const {                          // [M or more, N]
    if (!packed_) return linear(x, weight_, bias_);
    const int64_t missing = (kRows - x.size(0) % kRows) % kRows;
    const std::vector<int64_t> no_scalars;
    return call_torch("mkldnn::_linear_pointwise", "", missing ? torch::stable::pad(x, {0, 0, 0, missing}) : x, weight_,
                      bias_, std::string("none"), no_scalars, std::optional<std::string>());
  }

  // Whether oneDNN has products of a type on this processor, and they can be called.
  static bool packs(ScalarType type) {
    static const bool packs_float = can_pack(ScalarType::Float), packs_bfloat16 = can_pack(ScalarType::BFloat16);
    return (type == ScalarType::Float && packs_float) || (type == ScalarType::BFloat16 && packs_bfloat16);
  }

 private:
  static Tensor pack(const Tensor& weight) {
    return call_torch("mkldnn::_reorder_linear_weight", "", weight, std::optional<int64_t>(kRows));
  }

  static bool can_pack(ScalarType type) {
    if (!mmdcn_knows_onednn) return false;
    try {
      pack(torch::stable::empty({1, 1}, type));
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }

  bool packed_;
  Tensor weight_;
  std::optional<Tensor> bias_;
};

// As many positions as a product takes without a row to pad, at most `positions` unless these are too few.
inline int64_t round_to_rows(int64_t positions) {
  return std::max(positions / Linear::kRows * Linear::kRows, Linear::kRows);
}

// weight @ x^T + bias, for the small weights of many groups, where a call for each would take longer than its product.
template <typename T>
class BatchedLinear {
 public:
  BatchedLinear(const Tensor& weight,               // [groups, N, K]
                const std::optional<Tensor>& bias)  // [groups * N]
      : weight_(weight), bias_(bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt) {}

  Tensor operator()(const Tensor& x  // [groups, M, K]
  ) const {                          // [groups * N, M]
    const Tensor product = bmm(weight_, torch::stable::transpose(x, 1, 2));
    const int64_t rows = product.size(0) * product.size(1), columns = product.size(2);
    for (int64_t row = 0; bias_ && row < rows; ++row) {
      const T addend = static_cast<const T*>(bias_->data_ptr())[row];
      T* values = static_cast<T*>(product.data_ptr()) + row * columns;
      for (int64_t i = 0; i < columns; ++i) {
        values[i] += addend;
      }
    }
    return torch::stable::view(product, {rows, columns});
  }

 private:
  Tensor weight_;
  std::optional<Tensor> bias_;
};

}  // namespace mmdcn
