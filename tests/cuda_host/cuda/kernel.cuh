// SPDX-License-Identifier: Apache-2.0
// For kernels that are written in CUDA's own names: their launch, and what their threads find. Kernels that are
// launched from several threads of the host at a time are more than this can do.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#include "fibers.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads, blocks)

namespace mmdcn {

using std::min;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// What a thread has begun and not waited for.
struct Unfinished {
  std::vector<std::vector<std::function<void()>>> copies{1};  // by group, the last of which is open
  std::vector<std::function<void()>> products, committed_products;
  bool fenced = false;  // whether products may read the registers
};

// A barrier in shared memory that counts arrivals and bytes.
struct Barrier {
  int32_t arrivals, missing, bytes = 0;
  uint32_t phase = 0;
  std::vector<uint32_t> sleeping;  // threads
  std::vector<std::function<void()>> copies = {};
};

// The block that runs.
struct KernelBlock {
  Fibers* fibers;
  unsigned char* shared;
  int32_t shared_bytes;
  bool late_copies, late_products;  // whether they are done as late as they may, or at once
  std::vector<Unfinished> unfinished;
  std::map<uint32_t, Barrier> barriers = {};  // by address
  bool vote = false;                          // of __syncthreads_or

  uint32_t lane() const { return fibers->current() % kWarp; }
  Unfinished& of_thread() { return unfinished[fibers->current()]; }

  template <typename T>
  std::array<T, kWarp> exchange(const char* place, const T& value) const {
    return fibers->exchange(lane(), fibers->current() / kWarp, place, value);
  }
};

inline KernelBlock kernel_block;

extern "C" __attribute__((visibility("default"))) inline uint32_t mmdcn_host_launches = 0;

struct Coordinate {
  uint32_t x;
};

inline Coordinate blockIdx, gridDim;

struct ThreadIndex {
  struct {
    operator uint32_t() const { return kernel_block.fibers->current(); }
  } x;
};

inline constexpr ThreadIndex threadIdx;

inline void __syncthreads() { kernel_block.fibers->wait_for_block(); }
inline bool __syncthreads_or(bool vote) {
  __syncthreads();
  kernel_block.vote |= vote;
  __syncthreads();
  const bool result = kernel_block.vote;
  __syncthreads();
  kernel_block.vote = false;
  return result;
}

inline void __syncwarp() { kernel_block.exchange("__syncwarp", true); }
inline float __ldg(const float* source) { return *source; }

inline unsigned char* dynamic_shared() { return kernel_block.shared; }

template <typename... Arguments>
void launch_kernel(void (*kernel)(Arguments...), int64_t blocks, int32_t threads, int32_t shared_bytes, int32_t device,
                   const Arguments&... arguments) {
  struct alignas(1024) Kibibyte {
    unsigned char bytes[1024];
  };
  std::vector<Kibibyte> memory(shared_bytes / sizeof(Kibibyte) + 1);
  unsigned char* const shared = memory.data()->bytes;
  ++mmdcn_host_launches;
  gridDim.x = blocks;
  run_blocks(
      blocks, kWarp, threads / kWarp,
      [&](uint32_t block, Fibers& fibers) {
        std::memset(shared, 0xff, shared_bytes);
        blockIdx.x = block;
        kernel_block = {&fibers,
                        shared,
                        shared_bytes,
                        host_seed() / 2 % 2 == 0,
                        host_seed() / 4 % 2 == 0,
                        std::vector<Unfinished>(threads)};
      },
      [&](uint32_t, const Threads&) { kernel(arguments...); });
}

}  // namespace mmdcn
