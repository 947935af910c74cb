// SPDX-License-Identifier: Apache-2.0
// Everything specific to CUDA: the device and its stream, launches, memory, and cooperation of threads. tests/cuda_host
// replaces this file on the host.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../core/stable_ops.h"

namespace mmdcn {

using torch::stable::accelerator::DeviceGuard;

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

// Size of a tile's columns. On an H100, tiles that fit in the L2 cache are slower: the forward and backward of 16
// images of 128 x 100 x 168 takes 3.1 ms with 16 MiB, 2.8 ms with 32 to 64 MiB, and 2.3 ms with 128 MiB.
constexpr int64_t kTileBytes = 128 << 20;
constexpr int64_t kCopyBytes = 40 << 20;  // images that are copied at a time, unless a single one is larger

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int attribute(cudaDeviceAttr name, int32_t device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

inline int64_t multiprocessors(int32_t device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

// Sets memory to zero, in stream order.
inline void clear(void* target, int64_t bytes, int32_t device) {
  STD_CUDA_CHECK(cudaMemsetAsync(target, 0, bytes, current_stream(device)));
}

// Launches a kernel with dynamic shared memory; more than 48 KiB must be asked for.
template <typename... Arguments>
void launch_kernel(void (*kernel)(Arguments...), int64_t blocks, int32_t threads, int32_t shared_bytes, int32_t device,
                   const Arguments&... arguments) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<static_cast<uint32_t>(blocks), threads, shared_bytes, current_stream(device)>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// That memory, at a multiple of 1024 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return shared;
}

// Adjacent 16-bit numbers, the first in the lower half of a word.
template <typename scalar_t>
__device__ __forceinline__ void unpack_pair(uint32_t word, float& first, float& second) {
  if constexpr (std::is_same_v<scalar_t, torch::headeronly::BFloat16>) {
    first = __uint_as_float(word << 16);
    second = __uint_as_float(word & 0xffff0000u);
  } else {
    __half2 pair;
    memcpy(&pair, &word, sizeof(word));
    const float2 both = __half22float2(pair);
    first = both.x;
    second = both.y;
  }
}

template <typename scalar_t>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  uint32_t word;
  if constexpr (std::is_same_v<scalar_t, torch::headeronly::BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&word, &pair, sizeof(word));
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&word, &pair, sizeof(word));
  }
  return word;
}

// The type that one instruction loads.
template <int kBytes>
struct RawWord;
template <>
struct RawWord<16> {
  using type = uint4;
};
template <>
struct RawWord<8> {
  using type = uint2;
};
template <>
struct RawWord<4> {
  using type = uint32_t;
};
template <>
struct RawWord<2> {
  using type = unsigned short;
};

template <typename V>
using Raw = typename RawWord<sizeof(V)>::type;

template <typename To, typename From>
__device__ __forceinline__ To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Loads and stores of a number or a vector of at most 16 bytes with one instruction, so the address must be a multiple
// of the size. `load` is only for memory that is not written while the kernel runs: it may read the L1 cache.
template <typename V>
__device__ __forceinline__ V load(const V* source) {
  return bits_of<V>(__ldg(reinterpret_cast<const Raw<V>*>(source)));
}

template <typename V>
__device__ __forceinline__ void store(V* target, const V& value) {
  *reinterpret_cast<Raw<V>*>(target) = bits_of<Raw<V>>(value);
}

// A load through the L1 cache, of 16 bytes that the block writes later. The value must be used before the barrier in
// between. It is assembly because the compiler does not know that an `opaque` pointer points to global memory.
template <typename V>
__device__ __forceinline__ V load_before_write(const V* source) {
  uint4 word;
  asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
      : "l"(source));
  return bits_of<V>(word);
}

// Starts to copy the cache line of an address to the L2 cache.
__device__ __forceinline__ void prefetch(const void* source) { asm volatile("prefetch.global.L2 [%0];" ::"l"(source)); }

// Bypasses the L1 cache, which is left to data that are used again.
template <typename V>
__device__ __forceinline__ V load_once(const V* source) {
  return bits_of<V>(__ldcg(reinterpret_cast<const Raw<V>*>(source)));
}

template <typename V>
__device__ __forceinline__ void store_once(V* target, const V& value) {
  __stcg(reinterpret_cast<Raw<V>*>(target), bits_of<Raw<V>>(value));
}

// Without a branch, so that the compiler can move loads across it.
template <typename V>
__device__ __forceinline__ void store_once_if(bool condition, V* target, const V& value) {
  if constexpr (sizeof(V) == 16) {
    const uint4 word = bits_of<uint4>(value);
    asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.cg.v4.b32 [%1], {%2, %3, %4, %5};}" ::"r"(
                     uint32_t{condition}),
                 "l"(target), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
  } else {
    if (condition) store_once(target, value);
  }
}

// base + number, with one instruction.
template <typename V>
__device__ __forceinline__ V* element(V* base, uint32_t number) {
  uint64_t address;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(number), "n"(sizeof(V)), "l"(base));
  return reinterpret_cast<V*>(address);
}

// Keeps a value in its register, so that the compiler does not recompute it at each use. The compiler then no longer
// knows that a pointer points to global memory, which makes atomics slower.
template <typename V>
__device__ __forceinline__ V* opaque(V* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
  asm("" : "+r"(value));
  return value;
}

__device__ __forceinline__ uint32_t bits_set(uint32_t word) { return __popc(word); }
__device__ __forceinline__ uint32_t lowest_bit(uint32_t word) { return __ffs(word) - 1; }

// Float4 is float4 if the device can add it atomically, from compute capability 9.0 on.
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

// A thread of a block. The threads form groups of lanes of one warp; the number of lanes is a power of two.
struct Threads {
  uint32_t lane, lanes, group, groups;

  __device__ uint32_t index() const { return group * lanes + lane; }
  __device__ uint32_t count() const { return groups * lanes; }
  __device__ uint32_t members() const { return 0xffffffff >> (kWarp - lanes) << (group * lanes % kWarp); }

  // Waits for all threads of the block, whose writes are then visible.
  __device__ void sync() const { __syncthreads(); }

  // Waits for the lanes of the group, whose writes are then visible.
  __device__ void sync_group() const { __syncwarp(members()); }

  // One bit for each lane of the group. All lanes must call it.
  __device__ uint32_t ballot(bool vote) const { return __ballot_sync(members(), vote) >> (group * lanes % kWarp); }

  // The sum over the group. All lanes must call it.
  template <typename T>
  __device__ T sum(T value) const {
    for (uint32_t distance = lanes / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(members(), value, distance);
    }
    return value;
  }

  // These require groups of a whole warp. All lanes must call them.
  template <typename T>
  __device__ T shuffle(T value, uint32_t from) const {
    return __shfl_sync(kAllLanes, value, from);
  }
  template <typename T>
  __device__ T shuffle_xor(T value, uint32_t distance) const {
    return __shfl_xor_sync(kAllLanes, value, distance);
  }
  template <typename T>
  __device__ T shuffle_up(T value, uint32_t distance) const {
    return __shfl_up_sync(kAllLanes, value, distance);
  }

  template <typename T, int kCount>
  __device__ void add(T* target, const T (&values)[kCount]) const {
    atomic_add(target, values);
  }

  // These return the previous value.
  __device__ uint32_t increment(uint32_t* target, uint32_t by = 1) const { return atomicAdd(target, by); }
  __device__ uint32_t compare_and_exchange(uint32_t* target, uint32_t expected, uint32_t value) const {
    return atomicCAS(target, expected, value);
  }
};

// At least Body::kResident blocks must fit on a multiprocessor at a time; 0 leaves the choice to the compiler.
template <typename Body>
__global__ void __launch_bounds__(kThreads, Body::kResident) run_block(const __grid_constant__ Body body) {
  __shared__ typename Body::Shared shared;
  body.run(body.block(blockIdx.x), shared, Threads{threadIdx.x, blockDim.x, threadIdx.y, blockDim.y});
}

// Runs the body's blocks, with as many lanes per group as can share its work.
template <typename Body>
void launch(const Body& body, int32_t device) {
  const uint32_t lanes = std::min(std::bit_ceil(body.max_lanes()), kWarp);
  run_block<<<body.blocks(), dim3(lanes, kThreads / lanes), 0, current_stream(device)>>>(body);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The same for a body whose blocks consist of Body::kWarps groups of a whole warp.
template <typename Body>
__global__ void __launch_bounds__(kWarp* Body::kWarps, Body::kResident) run_warps(const __grid_constant__ Body body) {
  __shared__ typename Body::Shared shared;
  body.run(blockIdx.x, shared, Threads{threadIdx.x, kWarp, threadIdx.y, Body::kWarps});
}

template <typename Body>
void launch_warps(const Body& body, int32_t device) {
  run_warps<<<body.blocks(), dim3(kWarp, Body::kWarps), 0, current_stream(device)>>>(body);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mmdcn
