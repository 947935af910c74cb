// SPDX-License-Identifier: Apache-2.0
// Images that are not NHWC in the compute type are copied to it, a few images at a time, or, if one image is too large
// for that, some of its channels at a time.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mmdcn {

constexpr int64_t kBlockChannels = 32;   // channels that a thread processes at a time
constexpr int64_t kCopyBytes = 9 << 20;  // limit of the copies that exist at a time

// The number of channels of an image that may be copied at a time.
inline int64_t copied_channels(int64_t height, int64_t width, int64_t element_size) {
  return std::max<int64_t>(kCopyBytes / (height * width * element_size) / kBlockChannels, 1) * kBlockChannels;
}

}  // namespace mmdcn
