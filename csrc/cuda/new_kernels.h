// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdlib>
#include <string_view>

namespace mmdcn {

// Whether to run kernels that have not passed their tests on a GPU yet.
inline bool runs_new_kernels() {
  const char* const kernels = std::getenv("MMDCN_CUDA_KERNELS");
  return kernels && std::string_view(kernels) == "new";
}

}  // namespace mmdcn
