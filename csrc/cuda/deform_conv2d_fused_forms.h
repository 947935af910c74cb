// SPDX-License-Identifier: Apache-2.0
// The forms of Note [Fused forward] that compile only for compute capability 9.0, each in a separate source.
#pragma once

#include "deform_conv2d_fused.h"

namespace mmdcn {

// A block's output positions, output channels and bytes of shared memory.
struct FusedShape {
  int32_t rows, columns, shared_bytes;
};

FusedShape fused_wgmma_shape(const FusedForward& call);
FusedShape fused_wgmma_blend_shape(const FusedForward& call);

void run_fused_wgmma(const FusedForward& call, bool is_half, int32_t device);
void run_fused_wgmma_blend(const FusedForward& call, bool is_half, int32_t device);

}  // namespace mmdcn
