// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "matrix_product.h"

namespace mmdcn {

// The side of the square that the registers transpose.
template <typename T>
constexpr int64_t kTransposedSide = kRegisterBytes / sizeof(T);

template <typename T>
void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int kSide = kTransposedSide<T>;
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(kRegisterBytes)));
  typedef Index Order __attribute__((vector_size(kRegisterBytes)));
  Order low, high;  // of two vectors, the lower halves interleaved, and the upper halves
  for (int i = 0; i < kSide; ++i) {
    low[i] = i / 2 + i % 2 * kSide;
    high[i] = low[i] + kSide / 2;
  }
  Vector rows[kSide];
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    memcpy(&rows[i], from + i * from_stride, sizeof(Vector));
  }
  // After log2(kSide) rounds of interleaving the rows of one half with those of the other, the rows are the columns.
#pragma GCC unroll 4
  for (int round = 1; round < kSide; round *= 2) {
    Vector next[kSide];
#pragma GCC unroll 8
    for (int i = 0; i < kSide / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kSide / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kSide / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) {
      rows[i] = next[i];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    memcpy(to + i * to_stride, &rows[i], sizeof(Vector));
  }
}

// to[column][row] = from[row][column], one column of squares after the other.
template <typename T>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int64_t kSide = kTransposedSide<T>;
  for (int64_t column = 0; column < columns; column += kSide) {
    for (int64_t row = 0; row < rows; row += kSide) {
      const T* source = from + row * from_stride + column;
      T* target = to + column * to_stride + row;
      if (row + kSide <= rows && column + kSide <= columns) {
        transpose_square(source, from_stride, target, to_stride);
        continue;
      }
      for (int64_t c = 0; c < std::min(kSide, columns - column); ++c) {
        for (int64_t r = 0; r < std::min(kSide, rows - row); ++r) {
          target[c * to_stride + r] = source[r * from_stride + c];
        }
      }
    }
  }
}

}  // namespace mmdcn
