// SPDX-License-Identifier: Apache-2.0
// Products in bfloat16 with float32 sums, on raw memory: those of oneDNN that torch's own attention uses.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <exception>

// These are not part of torch's stable ABI. If torch has no functions with exactly these arguments, they are null.
namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t rows, int64_t columns, int64_t depth, int64_t left_stride,
                                  int64_t right_stride, int64_t result_stride, bool accumulates,
                                  const c10::BFloat16* left, const c10::BFloat16* right, float* result,
                                  bool right_in_pairs);
__attribute__((weak)) void brgemm_release(bool right_in_pairs);
}  // namespace at::native::cpublas

namespace mmdcn {

using torch::headeronly::BFloat16;

// oneDNN compiles a kernel for each new size, so the number of positions is rounded up to a multiple of this.
constexpr int64_t kBFloat16Positions = 32;

// Rows 2i and 2i + 1 of a column: the processor multiplies them as a pair.
using BFloat16Pair = uint32_t;

inline BFloat16Pair bfloat16_pair(BFloat16 even, BFloat16 odd) { return even.x | static_cast<uint32_t>(odd.x) << 16; }

// result [rows, columns] = or += left [rows, depth] x right [depth, columns], stored as pairs [depth / 2, columns].
struct BFloat16Product {
  int64_t rows, columns, depth;
  const BFloat16* left;
  int64_t left_stride;
  const BFloat16Pair* right;  // row stride `columns`, like the result's
  float* result;
  bool accumulates;
};

inline void multiply(const BFloat16Product& p) {
  at::native::cpublas::brgemm(p.rows, p.columns, p.depth, p.left_stride, p.columns, p.columns, p.accumulates, p.left,
                              reinterpret_cast<const BFloat16*>(p.right), p.result, /*right_in_pairs=*/true);
}

// Each thread must call this after its last product: some processors keep state for them.
inline void release_bfloat16_product() { at::native::cpublas::brgemm_release(/*right_in_pairs=*/true); }

// Whether torch has these products, on this processor and with oneDNN switched on.
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
  static const bool at_first = multiplies();  // a failing attempt is slow, so it is made once
  return at_first && multiplies();
}

}  // namespace mmdcn
