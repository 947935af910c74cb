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

// The size of the device's L2 cache.
inline int64_t l2_bytes(int32_t device) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
  return bytes;
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

// A thread of a block. The threads are in groups, each of so many lanes of one warp, a power of two.
struct Threads {
  uint32_t lane, lanes, group, groups;

  __device__ uint32_t index() const { return group * lanes + lane; }
  __device__ uint32_t count() const { return groups * lanes; }
  __device__ uint32_t members() const { return 0xffffffff >> (kWarp - lanes) << (group * lanes % kWarp); }

  // Waits for all threads of the block, and sees what they have written.
  __device__ void sync() const { __syncthreads(); }

  // Waits for the lanes of the group, and sees what they have written.
  __device__ void sync_group() const { __syncwarp(members()); }

  // A bit for each lane of the group. All of them must call it.
  __device__ uint32_t ballot(bool vote) const { return __ballot_sync(members(), vote) >> (group * lanes % kWarp); }
  __device__ uint32_t count_bits(uint32_t bits) const { return __popc(bits); }

  // The sum over the group. All of its lanes must call it.
  template <typename T>
  __device__ T sum(T value) const {
    for (uint32_t distance = lanes / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(members(), value, distance);
    }
    return value;
  }

  template <typename T, int kCount>
  __device__ void add(T* target, const T (&values)[kCount]) const {
    atomic_add(target, values);
  }

  // These give the value before.
  __device__ uint32_t increment(uint32_t* target) const { return atomicAdd(target, 1); }
  __device__ uint32_t exchange(uint32_t* target, uint32_t value) const { return atomicExch(target, value); }
  __device__ uint32_t compare_and_exchange(uint32_t* target, uint32_t expected, uint32_t value) const {
    return atomicCAS(target, expected, value);
  }
};

// Body::kResident blocks, at the least, must fit a multiprocessor at a time; 0 leaves that to the compiler.
template <typename Body>
__global__ void __launch_bounds__(kThreads, Body::kResident) run_block(const __grid_constant__ Body body) {
  __shared__ typename Body::Shared shared;
  body.run(body.block(blockIdx.x), shared, Threads{threadIdx.x, blockDim.x, threadIdx.y, blockDim.y});
}

// Runs the body's blocks, in each as many lanes to a group as can share its work.
template <typename Body>
void launch(const Body& body, int32_t device) {
  const uint32_t lanes = std::min(std::bit_ceil(body.shares()), kWarp);
  run_block<<<body.blocks(), dim3(lanes, kThreads / lanes), 0, current_stream(device)>>>(body);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mmdcn
