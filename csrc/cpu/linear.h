// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "../core/dispatch.h"
#include "../core/stable_ops.h"

namespace mmdcn {

// x @ weight^T + bias, for many x and one weight.
//
// In float32 oneDNN computes it, with the weight packed once: torch's own product packs it again for every x, and asks
// BLAS, which on some processors reaches only half of what they can do. float64 oneDNN does not have.
class Linear {
 public:
  // oneDNN compiles a kernel for each number of rows that it meets. So that images of all sizes do not each cost a
  // compilation, it gets multiples of this alone.
  static constexpr int64_t kRows = 64;

  Linear(const Tensor& weight,                              // [N, K]
         const std::optional<Tensor>& bias = std::nullopt)  // [N]
      : weight_(weight), bias_(bias) {
    if (weight.scalar_type() == ScalarType::Float && has_onednn()) packed_ = pack(weight);
  }

  Tensor operator()(const Tensor& x  // [M, K]
  ) const {                          // [M, N]
    if (!packed_ || x.size(0) % kRows != 0) return call_torch("aten::linear", "", x, weight_, bias_);
    const std::vector<int64_t> no_scalars;
    return call_torch("mkldnn::_linear_pointwise", "", x, *packed_, bias_, std::string("none"), no_scalars,
                      std::optional<std::string>());
  }

 private:
  static Tensor pack(const Tensor& weight) {
    return call_torch("mkldnn::_reorder_linear_weight", "", weight, std::optional<int64_t>(kRows));
  }

  static bool has_onednn() {
    static const bool available = [] {
      try {
        pack(torch::stable::empty({1, 1}, ScalarType::Float));
        return true;
      } catch (const std::exception&) {
        return false;
      }
    }();
    return available;
  }

  Tensor weight_;
  std::optional<Tensor> bias_;
  std::optional<Tensor> packed_;
};

}  // namespace mmdcn
