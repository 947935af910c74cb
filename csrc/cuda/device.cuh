// SPDX-License-Identifier: Apache-2.0
// All that is CUDA's own: the device and its stream, launches, and what threads do together. tests/cuda_host has a
// twin of this file for the host.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "../core/stable_ops.h"

namespace mmdcn {

using torch::stable::accelerator::DeviceGuard;

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarp = 32;

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// a @ b in a type that may be wider than theirs, which torch has for CUDA only.
inline Tensor bmm_as(const Tensor& a, const Tensor& b, torch::headeronly::ScalarType type) {
  return call_torch("aten::bmm", "dtype", a, b, type);
}

// Float4 is float4 where the device can add one atomically: from compute capability 9.0 on.
template <typename Float4>
concept AtomicallyAdded = requires(Float4* target, Float4 value) { atomicAdd(target, value); };

template <typename T, int kCount>
__device__ void atomic_add(T* target, const T (&values)[kCount]) {
  for (int i = 0; i < kCount; ++i) {
    atomicAdd(target + i, values[i]);
  }
}

template <int kCount, AtomicallyAdded Float4 = float4>
  requires(kCount % 4 == 0)
__device__ void atomic_add(float* target, const float (&values)[kCount]) {
  for (int i = 0; i < kCount; i += 4) {
    atomicAdd(reinterpret_cast<Float4*>(target + i), Float4{values[i], values[i + 1], values[i + 2], values[i + 3]});
  }
}

// The threads that share an item: `count` of one warp, a power of two, side by side in x.
struct Lanes {
  uint32_t index, count;

  // The sum over the lanes. All of them must call it.
  template <typename T>
  __device__ T sum(T value) const {
    const uint32_t first = threadIdx.y * count % kWarp;
    const uint32_t members = 0xffffffff >> (kWarp - count) << first;
    for (uint32_t distance = count / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(members, value, distance);
    }
    return value;
  }

  template <typename T, int kCount>
  __device__ void add(T* target, const T (&values)[kCount]) const {
    atomic_add(target, values);
  }
};

template <typename Body>
__global__ void __launch_bounds__(kThreads) run_block(const __grid_constant__ Body body) {
  __shared__ typename Body::Item items[Body::kBlockItems];
  static_assert(Body::kBlockItems <= kThreads);
  const auto block = body.block(blockIdx.x);
  const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread < block.count()) items[thread] = body.item(block, thread);
  __syncthreads();
  const Lanes lanes{threadIdx.x, blockDim.x};
  for (uint32_t i = threadIdx.y; i < block.count(); i += blockDim.y) {
    body.run(items[i], block, lanes);
  }
}

// For each block of the body: a thread each prepares its items, then as many lanes as can share one run each.
template <typename Body>
void launch(const Body& body, int32_t device) {
  const uint32_t lanes = std::min(std::bit_ceil(body.shares()), kWarp);
  run_block<<<body.blocks(), dim3(lanes, kThreads / lanes), 0, current_stream(device)>>>(body);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mmdcn
