// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "../core/readable_errors.h"

// From the OpenMP library that torch uses; null if it uses none.
extern "C" __attribute__((weak)) void omp_set_num_threads(int count);

namespace mmdcn {

// Shares items 0 .. count-1 among the threads: body(begin, end). torch runs a single item on the calling thread, where
// a matrix product uses many threads and its bits depend on their number. A second, empty item moves the first one to a
// team of threads, where each product uses one. oneDNN splits its sums by the number of threads that a nested team
// would have (seen with torch 2.10), so this is set to one too.
template <typename Body>
void share_items(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    if (omp_set_num_threads) omp_set_num_threads(1);
    if (begin < count) with_readable_errors([&] { body(begin, std::min(end, count)); });
  });
}

}  // namespace mmdcn
