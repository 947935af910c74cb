// SPDX-License-Identifier: Apache-2.0
// The host's twin of csrc/cuda/device.cuh: one block at a time, each lane a thread.
#pragma once

#include <algorithm>
#include <barrier>
#include <bit>
#include <cstdint>
#include <numeric>
#include <thread>
#include <vector>

#include "../core/stable_ops.h"

namespace mmdcn {

struct DeviceGuard {
  explicit DeviceGuard(int32_t device) {}
};

inline Tensor bmm_as(const Tensor& a, const Tensor& b, torch::headeronly::ScalarType type) {
  return call_torch("aten::bmm", "", torch::stable::to(a, type), torch::stable::to(b, type));
}

struct Lanes {
  uint32_t index, count;
  std::barrier<>& all;
  std::vector<double>& values;

  template <typename T>
  T sum(T value) const {
    values[index] = value;
    all.arrive_and_wait();
    const T total = static_cast<T>(std::accumulate(values.begin(), values.end(), 0.0));
    all.arrive_and_wait();
    return total;
  }

  template <typename T, int kCount>
  void add(T* target, const T (&values)[kCount]) const {
    for (int i = 0; i < kCount; ++i) {
      target[i] += values[i];
    }
  }
};

template <typename Body>
void launch(const Body& body, int32_t device) {
  const uint32_t count = std::min(std::bit_ceil(body.shares()), 32u);
  std::barrier all(count);
  std::vector<double> values(count);
  const auto run_lane = [&](uint32_t lane) {
    for (uint32_t index = 0; index < body.blocks(); ++index) {
      const auto block = body.block(index);
      for (uint32_t i = 0; i < block.count(); ++i) {
        body.run(body.item(block, i), block, Lanes{lane, count, all, values});
      }
      all.arrive_and_wait();
    }
  };
  std::vector<std::jthread> lanes;
  for (uint32_t lane = 0; lane < count; ++lane) {
    lanes.emplace_back(run_lane, lane);
  }
}

}  // namespace mmdcn
