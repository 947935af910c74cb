// SPDX-License-Identifier: Apache-2.0
// The images and the weight of a convolution as matrices, and what products do with them.
#pragma once

#include <algorithm>

#include "../core/conv_geometry.h"
#include "../core/dispatch.h"
#include "../core/stable_ops.h"

namespace mmdcn {

// Calls body(segment, row) for positions first .. first + count - 1 of images [N, P, C], image by image: segment [n, C]
// holds those from first + row on.
template <typename Body>
void for_each_segment(const Tensor& images, int64_t first, int64_t count, const Body& body) {
  const int64_t positions = images.size(1);
  for (int64_t row = 0; row < count;) {
    const int64_t image = (first + row) / positions, place = (first + row) % positions;
    const int64_t length = std::min(count - row, positions - place);
    body(slice(torch::stable::select(images, 0, image), 0, place, length), row);
    row += length;
  }
}

inline Tensor row_major(const Tensor& matrix, ScalarType type) {
  Tensor copy = empty_matrix(matrix, type, matrix.size(0), matrix.size(1));
  return torch::stable::copy_(copy, matrix);
}

// sum += addend, both contiguous
template <typename T>
void add(const Tensor& addend, const Tensor& sum) {
  const T* from = static_cast<const T*>(addend.data_ptr());
  T* to = static_cast<T*>(sum.data_ptr());
#pragma omp simd
  for (int64_t i = 0; i < addend.numel(); ++i) {
    to[i] += from[i];
  }
}

// weight [C_out, C_in/groups, kh, kw] as [C_out, K, C_in/groups] in the compute type.
inline Tensor tap_major(const ConvGeometry& g, const Tensor& weight, ScalarType type) {
  const Tensor taps_first = permute(values_as(weight, type), {0, 2, 3, 1});
  return torch::stable::reshape(taps_first, {g.out_channels, g.taps(), g.group_in_channels()});
}

}  // namespace mmdcn
