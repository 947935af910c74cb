// SPDX-License-Identifier: Apache-2.0
// The host's twin of csrc/cuda/device.cuh.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../core/stable_ops.h"
#include "fibers.h"
#include "kernel.cuh"

namespace mmdcn {

// So little that a small call has several tiles and rounds.
constexpr int64_t kTileBytes = 4000, kCopyBytes = 3000;

struct DeviceGuard {
  explicit DeviceGuard(int32_t device) {}
};

// Of a small device and of none, so that blocks are of few and of many positions.
inline int64_t multiprocessors(int32_t device) { return host_seed() % 2; }

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};

// Of a device of compute capability MMDCN_HOST_CAPABILITY, 80, 86 or 90; without it, of one without tensor cores.
inline int attribute(cudaDeviceAttr name, int32_t device) {
  const char* const given = std::getenv("MMDCN_HOST_CAPABILITY");
  const int capability = given ? std::atoi(given) : 0;
  switch (name) {
    case cudaDevAttrComputeCapabilityMajor:
      return capability / 10;
    case cudaDevAttrComputeCapabilityMinor:
      return capability % 10;
    default:
      return (capability == 90 ? 227 : capability == 86 ? 99 : capability == 80 ? 163 : 0) << 10;
  }
}

inline void clear(void* target, int64_t bytes, int32_t device) { std::memset(target, 0, bytes); }

template <typename scalar_t>
void unpack_pair(uint32_t word, float& first, float& second) {
  scalar_t pair[2];
  std::memcpy(pair, &word, sizeof(word));
  first = pair[0], second = pair[1];
}

template <typename scalar_t>
uint32_t pack_pair(float first, float second) {
  const scalar_t pair[2] = {first, second};
  uint32_t word;
  std::memcpy(&word, pair, sizeof(word));
  return word;
}

template <typename V>
V load(const V* source) {
  check_alignment(source, sizeof(V));
  return *source;
}

template <typename V>
void store(V* target, const V& value) {
  check_alignment(target, sizeof(V));
  *target = value;
}

template <typename V>
V load_before_write(const V* source) {
  return load(source);
}

inline void prefetch(const void* source) {}

template <typename V>
V load_once(const V* source) {
  return load(source);
}

template <typename V>
void store_once(V* target, const V& value) {
  store(target, value);
}

template <typename V>
void store_once_if(bool condition, V* target, const V& value) {
  if (condition) store(target, value);
}

template <typename V>
V* element(V* base, uint32_t number) {
  return base + number;
}

template <typename V>
V opaque(V value) {
  return value;
}

inline uint32_t bits_set(uint32_t word) { return std::popcount(word); }
inline uint32_t lowest_bit(uint32_t word) { return std::countr_zero(word); }

// What a block leaves in `shared` is nothing that the next may count on.
template <typename Shared>
void forget(Shared& shared) {
  std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared));
}

template <typename Body>
void launch(const Body& body, int32_t device) {
  constexpr uint32_t kGroups = 3;
  typename Body::Shared shared;
  run_blocks(
      body.blocks(), std::min(std::bit_ceil(body.max_lanes()), kWarp), kGroups,
      [&](uint32_t, Fibers&) { forget(shared); },
      [&](uint32_t block, const Threads& threads) { body.run(body.block(block), shared, threads); });
}

extern "C" __attribute__((visibility("default"))) inline uint32_t mmdcn_host_launches_of_warps = 0;

template <typename Body>
void launch_warps(const Body& body, int32_t device) {
  typename Body::Shared shared;
  ++mmdcn_host_launches_of_warps;
  run_blocks(
      body.blocks(), kWarp, Body::kWarps, [&](uint32_t, Fibers&) { forget(shared); },
      [&](uint32_t block, const Threads& threads) { body.run(block, shared, threads); });
}

}  // namespace mmdcn
