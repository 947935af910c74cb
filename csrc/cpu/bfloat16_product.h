// SPDX-License-Identifier: Apache-2.0
// Products in bfloat16 whose sums are and stay float32, on raw memory: oneDNN's, as torch's own attention uses them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <exception>

// They are not in torch's stable ABI. Where a torch lacks them with these very arguments, their addresses are null.
namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t rows, int64_t columns, int64_t depth, int64_t left_stride,
                                  int64_t right_stride, int64_t result_stride, bool accumulates,
                                  const c10::BFloat16* left, const c10::BFloat16* right, float* result,
                                  bool right_in_pairs);
__attribute__((weak)) void brgemm_release(bool right_in_pairs);
}  // namespace at::native::cpublas

namespace mmdcn {

using torch::headeronly::BFloat16;

// oneDNN compiles a kernel for each size that it meets, so that numbers of positions are rounded up to multiples of
// this.
constexpr int64_t kBFloat16Positions = 32;

// Two numbers of a column, in rows 2i and 2i + 1: the order in which the processor multiplies them.
using BFloat16Pair = uint32_t;

inline BFloat16Pair bfloat16_pair(BFloat16 even, BFloat16 odd) { return even.x | static_cast<uint32_t>(odd.x) << 16; }

// result [rows, columns] = or += left [rows, depth] x right [depth, columns], which is in pairs [depth / 2, columns].
struct BFloat16Product {
  int64_t rows, columns, depth;
  const BFloat16* left;
  int64_t left_stride;
  const BFloat16Pair* right;  // rows lie `columns` apart, as those of the result
  float* result;
  bool accumulates;
};

inline void multiply(const BFloat16Product& p) {
  at::native::cpublas::brgemm(p.rows, p.columns, p.depth, p.left_stride, p.columns, p.columns, p.accumulates, p.left,
                              reinterpret_cast<const BFloat16*>(p.right), p.result, /*right_in_pairs=*/true);
}

// To be called by each thread after its last product: some processors keep a state for them.
inline void release_bfloat16_product() { at::native::cpublas::brgemm_release(/*right_in_pairs=*/true); }

// Whether this torch has such products, on this processor and as its oneDNN is switched on or off.
inline bool has_bfloat16_product() {
  const auto multiplies = [] {
    if (!at::native::cpublas::brgemm || !at::native::cpublas::brgemm_release) return false;
    try {
      const BFloat16 left[2] = {1.0f, 2.0f};
      const BFloat16Pair right = bfloat16_pair(3.0f, 4.0f);
      float result = 0;
      multiply({1, 1, 2, left, 2, &right, &result, false});
      release_bfloat16_product();
      return result == 11;
    } catch (const std::exception&) {
      return false;
    }
  };
  static const bool at_first = multiplies();  // a refusal takes its time
  return at_first && multiplies();
}

}  // namespace mmdcn
