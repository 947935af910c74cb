// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "../core/readable_errors.h"

// Of the OpenMP that torch runs on, if it does.
extern "C" __attribute__((weak)) void omp_set_num_threads(int count);

namespace mmdcn {

// Shares items 0 .. count-1 among the threads: body(begin, end). torch runs a single item on the calling thread, where
// a matrix product takes as many threads as it likes and its bits depend on how many there are. A second, empty item
// sends the first to a team of threads, where each product has one; but oneDNN splits its sums by the threads that the
// next team would have (seen with torch 2.10), so that is one too.
template <typename Body>
void share_items(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    if (omp_set_num_threads) omp_set_num_threads(1);
    if (begin < count) with_readable_errors([&] { body(begin, std::min(end, count)); });
  });
}

}  // namespace mmdcn
