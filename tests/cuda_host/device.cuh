// SPDX-License-Identifier: Apache-2.0
// The host's twin of csrc/cuda/device.cuh: one block at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cstdint>
#include <deque>
#include <numeric>
#include <thread>
#include <vector>

#include "../core/stable_ops.h"

namespace mmdcn {

struct DeviceGuard {
  explicit DeviceGuard(int32_t device) {}
};

inline int64_t l2_bytes(int32_t device) { return 0; }

inline Tensor bmm_as(const Tensor& a, const Tensor& b, torch::headeronly::ScalarType type) {
  return call_torch("aten::bmm", "", torch::stable::to(a, type), torch::stable::to(b, type));
}

struct Group {
  explicit Group(uint32_t lanes) : all(lanes), values(lanes) {}

  std::barrier<> all;
  std::vector<double> values;
};

struct Threads {
  uint32_t lane, lanes, group, groups;
  Group& own;
  std::barrier<>& block;

  uint32_t index() const { return group * lanes + lane; }
  uint32_t count() const { return groups * lanes; }
  void sync() const { block.arrive_and_wait(); }

  void sync_group() const { own.all.arrive_and_wait(); }

  uint32_t ballot(bool vote) const {
    own.values[lane] = vote;
    own.all.arrive_and_wait();
    uint32_t votes = 0;
    for (uint32_t i = 0; i < lanes; ++i) {
      votes |= static_cast<uint32_t>(own.values[i]) << i;
    }
    own.all.arrive_and_wait();
    return votes;
  }
  uint32_t count_bits(uint32_t bits) const { return std::popcount(bits); }

  template <typename T>
  T sum(T value) const {
    own.values[lane] = value;
    own.all.arrive_and_wait();
    const T total = static_cast<T>(std::accumulate(own.values.begin(), own.values.end(), 0.0));
    own.all.arrive_and_wait();
    return total;
  }

  template <typename T, int kCount>
  void add(T* target, const T (&values)[kCount]) const {
    for (int i = 0; i < kCount; ++i) {
      std::atomic_ref(target[i]).fetch_add(values[i]);
    }
  }

  uint32_t increment(uint32_t* target) const { return std::atomic_ref(*target).fetch_add(1); }
  uint32_t exchange(uint32_t* target, uint32_t value) const { return std::atomic_ref(*target).exchange(value); }
  uint32_t compare_and_exchange(uint32_t* target, uint32_t expected, uint32_t value) const {
    std::atomic_ref(*target).compare_exchange_strong(expected, value);
    return expected;
  }
};

template <typename Body>
void launch(const Body& body, int32_t device) {
  constexpr uint32_t kGroups = 3;
  const uint32_t lanes = std::min(std::bit_ceil(body.shares()), 32u);
  typename Body::Shared shared;
  std::barrier<> block(kGroups * lanes);
  std::deque<Group> groups;
  std::vector<std::jthread> threads;
  for (uint32_t group = 0; group < kGroups; ++group) {
    groups.emplace_back(lanes);
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      threads.emplace_back([&, own = Threads{lane, lanes, group, kGroups, groups.back(), block}] {
        for (uint32_t index = 0; index < body.blocks(); ++index) {
          body.run(body.block(index), shared, own);
          own.sync();
        }
      });
    }
  }
}

}  // namespace mmdcn
