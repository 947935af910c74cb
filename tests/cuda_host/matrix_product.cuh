// SPDX-License-Identifier: Apache-2.0
// The host's twin of csrc/cuda/matrix_product.cuh: the same products, by torch.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/stable_ops.h"

namespace mmdcn {

struct Matrices {
  void* data;
  int64_t stride, batch_stride;
  torch::headeronly::ScalarType type;
  bool transposed = false;

  Tensor tensor(int64_t batch, int64_t rows, int64_t columns) const {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    const int64_t row = transposed ? 1 : stride, column = transposed ? stride : 1;
    return torch::stable::from_blob(data, {batch, rows, columns}, {batch_stride, row, column}, cpu, type);
  }
};

inline void matrix_product(const Matrices& a, const Matrices& b, const Matrices& c, int64_t batch, int64_t rows,
                           int64_t columns, int64_t depth, bool add, bool) {
  const ScalarType type = compute_type(a.type);
  Tensor result = c.tensor(batch, rows, columns);
  const Tensor product = call_torch("aten::bmm", "", torch::stable::to(a.tensor(batch, rows, depth), type),
                                    torch::stable::to(b.tensor(batch, depth, columns), type));
  torch::stable::copy_(result, add ? torch::stable::subtract(product, torch::stable::to(result, type), -1.0) : product);
}

}  // namespace mmdcn
