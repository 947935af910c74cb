// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "../core/dispatch.h"
#include "../core/stable_ops.h"

// Whether oneDNN's operators have the arguments that are passed below. Schemas cannot be read here, and torch keeps
// only those of its native operators stable, so mmdcn._extension compares them and sets this.
extern "C" {
__attribute__((visibility("default"))) inline bool mmdcn_knows_onednn = false;
}

namespace mmdcn {

// x @ weight^T + bias in bfloat16, for many x and one weight. oneDNN packs the weight once, where torch's own product
// packs it again for each x. Not every processor supports it.
class Linear {
 public:
  // oneDNN compiles a kernel for each new number of rows. Only multiples of this are used, so that new image sizes
  // rarely cost a compilation.
  static constexpr int64_t kRows = 32;

  Linear(const Tensor& weight,                              // [N, K]
         const std::optional<Tensor>& bias = std::nullopt)  // [N]
      : weight_(pack(weight)), bias_(bias) {}

  // The result may have more rows than x; ignore those after M.
  Tensor operator()(const Tensor& x  // [M, K]
  ) const {                          // [M or more, N]
    const int64_t missing = (kRows - x.size(0) % kRows) % kRows;
    const std::vector<int64_t> no_scalars;
    return call_torch("mkldnn::_linear_pointwise", "", missing ? torch::stable::pad(x, {0, 0, 0, missing}) : x, weight_,
                      bias_, std::string("none"), no_scalars, std::optional<std::string>());
  }

  // Whether oneDNN supports these products on this processor and they can be called.
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
