// SPDX-License-Identifier: Apache-2.0
// Products of matrices that fit in a core's cache, on raw memory: no torch operator is called for a tile.
//
// A tile of the result, some rows of a few vectors, stays in registers. Each step along the sum loads the vectors of
// the right matrix and multiplies them by one element of each row of the left matrix. An element of the result is one
// chain of additions, which begins at zero and is then added to the previous value. So its bits depend on neither the
// register tiles nor the threads, and a long sum that is split into several products has small rounding errors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace mmdcn {

constexpr int64_t kRegisterBytes = __BIGGEST_ALIGNMENT__;  // 64 with AVX-512, 32 with AVX2

constexpr int64_t kThreadWork = 1 << 18;  // multiplications that justify a thread

// Elements of a vector: 4, 8 or 16, to waste few on a narrow matrix.
template <typename T>
constexpr int64_t lanes_for(int64_t columns) {
  constexpr int64_t kWidest = std::max<int64_t>(kRegisterBytes / sizeof(T), 4);
  return columns <= 4 ? 4 : columns <= 8 ? 8 : kWidest;
}

// Rows of a tile of one vector: enough independent sums to keep the processor busy.
constexpr int kNarrowTileRows = 12;

// Vectors per row of a tile: as many as the registers hold for six rows.
template <typename T>
constexpr int64_t max_vectors(int64_t lanes) {
  return lanes * static_cast<int64_t>(sizeof(T)) > kRegisterBytes ? 1 : kRegisterBytes == 64 ? 4 : 2;
}

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// result[i][j] = or += sum over s and k of left[i][s][k] * right[s * depth + k][j]
//
// The columns of the right matrix and of the result are vectors of `lanes` elements. The last vector may extend beyond
// the columns: there the right matrix is read, but the result is not written.
template <typename T>
struct MatrixProduct {
  int64_t rows = 0, columns = 0, depth = 0, lanes = 0;
  const T* left = nullptr;
  int64_t left_stride = 0;                   // from row to row; transposed, from k to k
  int64_t segments = 1, segment_stride = 0;  // s
  const T* right = nullptr;
  int64_t right_stride = 0, right_vector_stride = 0;
  int64_t packed_depth = 0, first_packed_row = 0;  // of a PackedMatrix; its strides follow from them
  T* result = nullptr;
  int64_t result_stride = 0, result_vector_stride = 0;
  bool accumulates = true;
};

// A right matrix [depth, columns] packed into consecutive panels as wide as a tile, each row by row in whole vectors.
template <typename T>
class PackedMatrix {
 public:
  PackedMatrix(int64_t depth, int64_t columns, int64_t lanes, T* elements)
      : depth_(depth), columns_(columns), lanes_(lanes), data_(elements) {}

  static int64_t elements(int64_t depth, int64_t columns, int64_t lanes) { return depth * round_up(columns, lanes); }

  int64_t panel_columns() const { return lanes_ * max_vectors<T>(lanes_); }

  // The rest of its row of the panel follows.
  T& at(int64_t row, int64_t column) const {
    const int64_t first = column / panel_columns() * panel_columns();
    const int64_t width = std::min(panel_columns(), round_up(columns_, lanes_) - first);
    return data_[first * depth_ + row * width + column - first];
  }

  void zero_padding() const {
    for (int64_t row = 0; row < depth_; ++row) {
      for (int64_t column = columns_; column < round_up(columns_, lanes_); ++column) {
        at(row, column) = 0;
      }
    }
  }

  // The right matrix of a product whose sum begins at a row.
  void set_right(MatrixProduct<T>& product, int64_t first_row) const {
    product.columns = columns_, product.lanes = lanes_;
    product.right = data_, product.packed_depth = depth_, product.first_packed_row = first_row;
  }

 private:
  int64_t depth_, columns_, lanes_;
  T* data_;
};

template <typename T, bool kTransposed, int kLanes, int kRows, int kVectors>
void multiply_tile(const MatrixProduct<T>& p, const T* __restrict left, const T* __restrict right, int64_t right_stride,
                   int64_t right_vector_stride, T* __restrict result, int64_t result_stride) {
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));
  Vector sum[kRows][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = Vector{};
    }
  }
  for (int64_t s = 0; s < p.segments; ++s, left += p.segment_stride) {
    for (int64_t k = 0; k < p.depth; ++k, right += right_stride) {
      Vector factor[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        memcpy(&factor[v], right + v * right_vector_stride, sizeof(Vector));
      }
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const T number = kTransposed ? left[k * p.left_stride + i] : left[i * p.left_stride + k];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum[i][v] += number * factor[v];
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* target = result + i * result_stride + v * p.result_vector_stride;
      Vector before{};
      if (p.accumulates) memcpy(&before, target, sizeof(Vector));
      sum[i][v] += before;
      memcpy(target, &sum[i][v], sizeof(Vector));
    }
  }
}

// All rows of a few vectors of the result.
template <typename T, bool kTransposed, int kLanes, int kVectors>
void multiply_vectors(const MatrixProduct<T>& p, const T* right, int64_t right_stride, int64_t right_vector_stride,
                      T* result, int64_t result_stride, int64_t first_row, int64_t rows) {
  int64_t row = first_row;
  const int64_t end = first_row + rows, left_row = kTransposed ? 1 : p.left_stride;
  const auto tiles = [&]<int kRows>() {
    for (; row + kRows <= end; row += kRows) {
      multiply_tile<T, kTransposed, kLanes, kRows, kVectors>(p, p.left + row * left_row, right, right_stride,
                                                             right_vector_stride,
                                                             result + (row - first_row) * result_stride, result_stride);
    }
  };
  if constexpr (kVectors == 1) tiles.template operator()<kNarrowTileRows>();
  tiles.template operator()<6>();
  tiles.template operator()<2>();
  tiles.template operator()<1>();
}

// The last vector of the result, of which `columns` elements are written.
template <typename T, bool kTransposed, int kLanes>
void multiply_partial_vector(const MatrixProduct<T>& p, const T* right, int64_t right_stride, T* result,
                             int64_t columns) {
  constexpr int64_t kRows = kNarrowTileRows;
  for (int64_t first = 0; first < p.rows; first += kRows) {
    const int64_t rows = std::min(kRows, p.rows - first);
    T vectors[kRows * kLanes] = {};
    T* target = result + first * p.result_stride;
    for (int64_t row = 0; p.accumulates && row < rows; ++row) {
      std::copy_n(target + row * p.result_stride, columns, vectors + row * kLanes);
    }
    multiply_vectors<T, kTransposed, kLanes, 1>(p, right, right_stride, 0, vectors, kLanes, first, rows);
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(vectors + row * kLanes, columns, target + row * p.result_stride);
    }
  }
}

template <typename T, bool kTransposed, int kLanes>
void multiply_with_lanes(const MatrixProduct<T>& p) {
  constexpr int kMax = max_vectors<T>(kLanes);
  const int64_t vectors = round_up(p.columns, kLanes) / kLanes, whole = p.columns / kLanes;
  for (int64_t first = 0, step; first < vectors; first += step) {
    const int64_t in_panel = first % kMax, width = std::min<int64_t>(kMax, vectors - first + in_panel);
    step = first + kMax <= whole && in_panel == 0                    ? kMax
           : kMax > 2 && first + 2 <= whole && in_panel + 2 <= width ? 2
                                                                     : 1;
    const bool packed = p.packed_depth > 0;
    const int64_t stride = packed ? width * kLanes : p.right_stride;
    const int64_t vector_stride = packed ? kLanes : p.right_vector_stride;
    const T* right = packed ? p.right + (first - in_panel) * kLanes * p.packed_depth + p.first_packed_row * stride +
                                  in_panel * kLanes
                            : p.right + first * vector_stride;
    T* result = p.result + first * p.result_vector_stride;
    if (first == whole) {
      multiply_partial_vector<T, kTransposed, kLanes>(p, right, stride, result, p.columns % kLanes);
    } else if (step == kMax) {
      multiply_vectors<T, kTransposed, kLanes, kMax>(p, right, stride, vector_stride, result, p.result_stride, 0,
                                                     p.rows);
    } else if (step == 2) {
      multiply_vectors<T, kTransposed, kLanes, 2>(p, right, stride, vector_stride, result, p.result_stride, 0, p.rows);
    } else {
      multiply_vectors<T, kTransposed, kLanes, 1>(p, right, stride, vector_stride, result, p.result_stride, 0, p.rows);
    }
  }
}

template <bool kTransposed, typename T>
void multiply(const MatrixProduct<T>& product) {
  if (product.lanes == 4) {
    multiply_with_lanes<T, kTransposed, 4>(product);
  } else if (product.lanes == 8) {
    multiply_with_lanes<T, kTransposed, 8>(product);
  } else {
    multiply_with_lanes<T, kTransposed, 16>(product);
  }
}

}  // namespace mmdcn
