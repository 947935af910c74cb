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

// x @ weight^T + bias in bfloat16, for many x and one weight, by oneDNN with the weight packed once: torch's own
// product packs it again for every x. Not every processor has it.
class Linear {
 public:
  // oneDNN compiles a kernel for each number of rows that it meets. So that images of all sizes do not each cost a
  // compilation, it gets multiples of this alone.
  static constexpr int64_t kRows = 32;

  Linear(const Tensor& weight,                              // [N, K]
         const std::optional<Tensor>& bias = std::nullopt)  // [N]
      : weight_(pack(weight)), bias_(bias) {}

  // The result may have more rows than x: those after M mean nothing.
  Tensor operator()(const Tensor& x  // [M, K]
  ) const {                          // [M or more, N]
    const int64_t missing = (kRows - x.size(0) % kRows) % kRows;
    const std::vector<int64_t> no_scalars;
    return call_torch("mkldnn::_linear_pointwise", "", missing ? torch::stable::pad(x, {0, 0, 0, missing}) : x, weight_,
                      bias_, std::string("none"), no_scalars, std::optional<std::string>());
  }

  // Whether oneDNN has such products on this processor, and they can be called.
  static bool is_available() {
    static const bool available = can_pack();
    return available;
  }

 private:
  static Tensor pack(const Tensor& weight) {
    return call_torch("mkldnn::_reorder_linear_weight", "", weight, std::optional<int64_t>(kRows));
  }

  static bool can_pack() {
    if (!mmdcn_knows_onednn) return false;
    try {
      pack(torch::stable::empty({1, 1}, ScalarType::BFloat16));
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }

  Tensor weight_;
  std::optional<Tensor> bias_;
};

}  // namespace mmdcn
