// SPDX-License-Identifier: Apache-2.0
// Matrix products with cuBLAS, using torch's handle: one call for a batch, without torch's tensors and dispatcher, and
// with TF32 as the operator's argument says. tests/cuda_host replaces this file on the host.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>

#include <library_types.h>

#include <cstdint>

#include "../core/readable_errors.h"

// Some CUDA toolkits lack the headers of cuBLAS. The library itself comes with torch.
extern "C" int cublasGemmStridedBatchedEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                                          const void* alpha, const void* a, cudaDataType a_type, int a_stride,
                                          long long a_batch_stride, const void* b, cudaDataType b_type, int b_stride,
                                          long long b_batch_stride, const void* beta, void* c, cudaDataType c_type,
                                          int c_stride, long long c_batch_stride, int batch, int compute_type,
                                          int algorithm);

namespace mmdcn {

// A batch of row-major matrices, or column-major if `transposed`.
struct Matrices {
  void* data;
  int64_t stride, batch_stride;  // between rows, or columns if transposed; between matrices
  torch::headeronly::ScalarType type;
  bool transposed = false;
};

inline cudaDataType cuda_type(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Double     ? CUDA_R_64F
         : type == ScalarType::Half     ? CUDA_R_16F
         : type == ScalarType::BFloat16 ? CUDA_R_16BF
                                        : CUDA_R_32F;
}

// c[rows, columns] = a[rows, depth] x b[depth, columns], plus what c was if `add`, on the current device and stream.
// It is computed in float64 for float64, else in float32, where TF32 may round the factors. c must not be transposed.
inline void matrix_product(const Matrices& a, const Matrices& b, const Matrices& c, int64_t batch, int64_t rows,
                           int64_t columns, int64_t depth, bool add, bool allow_tf32) {
  constexpr int kFloat = 68, kFloatFromTf32 = 77, kDouble = 70, kDefaultAlgorithm = -1;  // of cublas_api.h
  const bool is_double = a.type == torch::headeronly::ScalarType::Double;
  const double double_factors[] = {1, add ? 1.0 : 0.0};
  const float float_factors[] = {1, add ? 1.0f : 0.0f};
  const void* const one = is_double ? static_cast<const void*>(&double_factors[0]) : &float_factors[0];
  const void* const beta = is_double ? static_cast<const void*>(&double_factors[1]) : &float_factors[1];
  const bool is_float = a.type == torch::headeronly::ScalarType::Float;
  void* handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  // cuBLAS matrices are column-major, so rows and columns are swapped: c^T = b^T x a^T.
  const int status = cublasGemmStridedBatchedEx(
      handle, b.transposed, a.transposed, static_cast<int>(columns), static_cast<int>(rows), static_cast<int>(depth),
      one, b.data, cuda_type(b.type), static_cast<int>(b.stride), b.batch_stride, a.data, cuda_type(a.type),
      static_cast<int>(a.stride), a.batch_stride, beta, c.data, cuda_type(c.type), static_cast<int>(c.stride),
      c.batch_stride, static_cast<int>(batch),
      is_double                ? kDouble
      : is_float && allow_tf32 ? kFloatFromTf32
                               : kFloat,
      kDefaultAlgorithm);
  MMDCN_CHECK(status == 0, "a product of matrices [", rows, ", ", depth, "] x [", depth, ", ", columns,
              "] failed with cuBLAS's status ", status);
}

}  // namespace mmdcn
