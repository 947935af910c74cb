// SPDX-License-Identifier: Apache-2.0
// The host's twin of csrc/cuda/matrix_product.cuh: the same products, by loops.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"

namespace mmdcn {

struct Matrices {
  void* data;
  int64_t stride, batch_stride;
  torch::headeronly::ScalarType type;
  bool transposed = false;

  template <typename scalar_t>
  scalar_t& at(int64_t matrix, int64_t row, int64_t column) const {
    const int64_t place = transposed ? column * stride + row : row * stride + column;
    return static_cast<scalar_t*>(data)[matrix * batch_stride + place];
  }
};

template <typename In, typename Out>
void multiply(const Matrices& a, const Matrices& b, const Matrices& c, int64_t batch, int64_t rows, int64_t columns,
              int64_t depth, bool add) {
  for (int64_t matrix = 0; matrix < batch; ++matrix) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        Out& target = c.at<Out>(matrix, row, column);
        double sum = add ? static_cast<double>(target) : 0;
        for (int64_t k = 0; k < depth; ++k) {
          sum += static_cast<double>(a.at<In>(matrix, row, k)) * static_cast<double>(b.at<In>(matrix, k, column));
        }
        target = static_cast<Out>(sum);
      }
    }
  }
}

inline void matrix_product(const Matrices& a, const Matrices& b, const Matrices& c, int64_t batch, int64_t rows,
                           int64_t columns, int64_t depth, bool add, bool) {
  dispatch_storage(a.type, "a", [&](auto zero) {
    using In = decltype(zero);
    if (c.type == a.type) return multiply<In, In>(a, b, c, batch, rows, columns, depth, add);
    multiply<In, compute_t<In>>(a, b, c, batch, rows, columns, depth, add);
  });
}

}  // namespace mmdcn
