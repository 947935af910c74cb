// SPDX-License-Identifier: Apache-2.0
// The form of Note [Fused forward] that compiles only for compute capability 9.0, in a separate source.
#pragma once

#include "deform_conv2d_fused.h"

namespace mmdcn {

// A block's output positions, output channels and bytes of shared memory.
struct FusedShape {
  int32_t rows, columns, shared_bytes;
};

FusedShape fused_wgmma_shape(const FusedForward& call);

void run_fused_wgmma(const FusedForward& call, bool is_half, int32_t device);

}  // namespace mmdcn
