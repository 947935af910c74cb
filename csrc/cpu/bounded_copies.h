// SPDX-License-Identifier: Apache-2.0
// Images that are not NHWC in the type that is computed in are brought there by copies, a few images at a time, or, if
// one image is too large for that, some channels of it at a time.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mmdcn {

constexpr int64_t kBlockChannels = 32;   // that a thread works on at one time
constexpr int64_t kCopyBytes = 9 << 20;  // of the copies of images at one time

// How many channels of an image may be copied at one time.
inline int64_t copied_channels(int64_t height, int64_t width, int64_t element_size) {
  return std::max<int64_t>(kCopyBytes / (height * width * element_size) / kBlockChannels, 1) * kBlockChannels;
}

}  // namespace mmdcn
