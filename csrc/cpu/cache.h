// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace mmdcn {

// Bytes of a core's private cache; a common size if the processor does not report it.
inline int64_t core_cache_bytes() {
  static const int64_t bytes = [] {
    const int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return told > 0 ? std::clamp<int64_t>(told, 1 << 18, 2 << 20) : 1 << 19;
  }();
  return bytes;
}

}  // namespace mmdcn
