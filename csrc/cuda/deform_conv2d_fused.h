// SPDX-License-Identifier: Apache-2.0
// Note: [Fused forward]
//
// In half types the forward can skip the columns: samples are gathered directly into the tensor cores' operand. This
// requires one weight group, and multiples of 64 for C_in/G and C_out; the weight is packed for it.
//
// A block computes kRows output positions x kColumns output channels. It loops over the offset groups, over their
// chunks of 64 channels, and over the taps: a step is [kRows, 64] x [64, kColumns]. A table in shared memory holds the
// samples of an offset group: the indices of four 16-byte vectors, relative to the input, and four weights, mask
// included. A corner outside the image points to zeros, so the loop has no conditions, and no other pixel's NaN enters.
// While the tensor cores multiply one step, the samples of the next are loaded and blended.
//
// Positions are ordered image by image, in bands of a few rows, and column by column within a band: the positions of a
// block then share most of their pixels, which are read from the L1 cache.
//
// There are three forms: two with `wgmma` for compute capability 9.0, and `mma.sync` for 8.0 and later.
//   wgmma        a warp gathers its 16 rows directly into the register fragments of the left operand. A thread's
//                fragments of a step are 16 channels of two rows, (2t, 2t+1, 2t+8, 2t+9) of each 16. The channels of
//                the packed weight are permuted so that these are two 16-byte vectors of each pixel.
//   wgmma_blend  the tensor cores also blend: Note [Blending on the tensor cores]. A warp gathers its 16 rows into
//                shared memory, and reads the fragments from there.
//   mma.sync     all warps gather the left operand of the next step into shared memory.
#pragma once

#include <cstdint>

#include "planes.cuh"

namespace mmdcn {

struct FusedForward {
  const void* input;   // [B, H, W, C_in], dense and 16-byte aligned
  const void* weight;  // packed, as PackWeight does
  const void* bias;    // [C_out], or null
  void* output;        // [B*H_out*W_out, C_out]
  Planes<float> offset, mask;
  int32_t batch, height, width, channels, out_height, out_width, out_channels;
  int32_t taps, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int32_t offset_groups;
  int32_t zeros;  // position of C_in zeros, in 16-byte vectors from the input
  int32_t band;   // rows of output positions in a band

  C10_HOST_DEVICE int32_t positions() const { return batch * out_height * out_width; }
};

enum class FusedForm { kNone, kMma, kWgmma, kWgmmaBlend };

// The form to run on a device, or kNone if none supports the call or columns are faster.
FusedForm fused_form(const FusedForward& call, int32_t device);

// Launches on the device's current stream. The output's type is half if `is_half`, else bfloat16.
void run_fused(const FusedForward& call, FusedForm form, bool is_half, int32_t device);

}  // namespace mmdcn
