// SPDX-License-Identifier: Apache-2.0
// Code that both forms of Note [Fused forward] share: the positions and samples of a block, and the blending of
// samples.
#pragma once

#include "deform_conv2d_fused.h"
#include "tensor_cores.cuh"

namespace mmdcn {

constexpr int32_t kChunk = 64;       // channels of a step
constexpr int32_t kRowBytes = 128;   // of a chunk
constexpr int32_t kEntryBytes = 32;  // of a sample in the table: its vectors and, kRows entries later, its weights

// Quantities that follow from a call and its form. The host computes them: kernel parameters take no registers.
struct FusedSteps {
  int32_t tiles, column_tiles;  // tiles of the output; tiles with the same positions
  int32_t steps, group_steps;   // steps of a tile; of one of its offset groups
  int32_t table_end;            // bytes of an offset group's table
  int32_t table_bytes;          // of shared memory for it

  static FusedSteps of(const FusedForward& call, int32_t rows, int32_t columns, int32_t tap_bytes,
                       int32_t table_bytes) {
    const int32_t column_tiles = call.out_channels / columns, steps = call.channels / kChunk * call.taps;
    return {(call.positions() + rows - 1) / rows * column_tiles,
            column_tiles,
            steps,
            steps / call.offset_groups,
            call.taps * tap_bytes,
            table_bytes};
  }
};

struct OutputPosition {
  int32_t image, y, x;

  __device__ __forceinline__ int32_t row(const FusedForward& call) const {
    return (image * call.out_height + y) * call.out_width + x;
  }
};

// The position at `index` in the note's order.
__device__ __forceinline__ OutputPosition output_position(const FusedForward& call, int32_t index) {
  const int32_t image_size = call.out_height * call.out_width, image = index / image_size;
  const int32_t in_image = index - image * image_size, band_size = call.band * call.out_width;
  const int32_t band = in_image / band_size, in_band = in_image - band * band_size;
  const int32_t height = min(call.band, call.out_height - band * call.band), x = in_band / height;
  return {image, band * call.band + (in_band - x * height), x};
}

// The offsets of a sample, y and x, and its mask, if there are masks.
__device__ __forceinline__ float4 load_offsets(const FusedForward& call, const OutputPosition& at, int32_t offset_group,
                                               int32_t tap) {
  const int32_t channel = offset_group * call.taps + tap;
  return {__ldg(call.offset.at(at.image, 2 * channel, at.y, at.x)),
          __ldg(call.offset.at(at.image, 2 * channel + 1, at.y, at.x)),
          call.mask.data ? __ldg(call.mask.at(at.image, channel, at.y, at.x)) : 1.0f, 0};
}

// Starts to copy the same to shared memory. On their way they take no registers, so that many can be in flight.
__device__ __forceinline__ void copy_offsets(const FusedForward& call, const OutputPosition& at, bool valid,
                                             int32_t offset_group, int32_t tap, uint32_t target) {
  if (!valid) return;
  const int32_t channel = offset_group * call.taps + tap;
  copy_async<4>(target, call.offset.at(at.image, 2 * channel, at.y, at.x));
  copy_async<4>(target + 4, call.offset.at(at.image, 2 * channel + 1, at.y, at.x));
  if (call.mask.data) copy_async<4>(target + 8, call.mask.at(at.image, channel, at.y, at.x));
}

struct FusedSample {
  uint4 vectors;  // int32, relative to the input
  float4 weights;
};

// The sample of one tap. `valid` is false beyond the last position; otherwise offsets() gives its offsets and mask.
template <typename Offsets>
__device__ __forceinline__ FusedSample fused_sample(const FusedForward& call, const OutputPosition& at, bool valid,
                                                    int32_t tap, const Offsets& offsets) {
  const int32_t tap_y = tap / call.kernel_width, tap_x = tap - tap_y * call.kernel_width;
  float y = static_cast<float>(at.y * call.stride_y - call.padding_y + tap_y * call.dilation_y);
  float x = static_cast<float>(at.x * call.stride_x - call.padding_x + tap_x * call.dilation_x);
  float mask = 0;
  if (valid) {
    const float4 own = offsets();
    y += own.x, x += own.y;
    mask = call.mask.data ? own.z : 1.0f;
  }
  const bool inside =
      valid && y > -1 && x > -1 && y < static_cast<float>(call.height) && x < static_cast<float>(call.width);
  const float floor_y = floorf(y), floor_x = floorf(x), fy = y - floor_y, fx = x - floor_x;
  const int32_t top = static_cast<int32_t>(floor_y), left = static_cast<int32_t>(floor_x);
  const bool has_top = inside && top >= 0, has_bottom = inside && top + 1 < call.height;
  const bool has_left = left >= 0, has_right = left + 1 < call.width;
  const int32_t pixel = call.channels / 8, row = call.width * pixel;
  const int32_t first = ((at.image * call.height + top) * call.width + left) * pixel;
  const float top_weight = (1 - fy) * mask, bottom_weight = fy * mask;
  // Outside, a NaN coordinate and 0 times an infinite mask still give NaN.
  const float outside = inside ? 0.0f : (isnan(y) || isnan(x) ? NAN : 0.0f * mask);
  FusedSample sample;
  sample.vectors.x = has_top && has_left ? first : call.zeros;
  sample.vectors.y = has_top && has_right ? first + pixel : call.zeros;
  sample.vectors.z = has_bottom && has_left ? first + row : call.zeros;
  sample.vectors.w = has_bottom && has_right ? first + row + pixel : call.zeros;
  sample.weights.x = has_top && has_left ? top_weight * (1 - fx) : outside;
  sample.weights.y = has_top && has_right ? top_weight * fx : 0;
  sample.weights.z = has_bottom && has_left ? bottom_weight * (1 - fx) : 0;
  sample.weights.w = has_bottom && has_right ? bottom_weight * fx : 0;
  return sample;
}

__device__ __forceinline__ const char* vector_at(const void* base, uint32_t vector) {
  return static_cast<const char*>(base) + static_cast<int64_t>(static_cast<int32_t>(vector)) * 16;
}

// A 16-byte vector of channels from each corner.
struct FusedCorners {
  uint4 values[4];

  template <uint4 (*kLoad)(const void*) = load_global>
  __device__ __forceinline__ void load(uint4 vectors, const void* base, uint32_t channel = 0) {
    values[0] = kLoad(vector_at(base, vectors.x + channel));
    values[1] = kLoad(vector_at(base, vectors.y + channel));
    values[2] = kLoad(vector_at(base, vectors.z + channel));
    values[3] = kLoad(vector_at(base, vectors.w + channel));
  }

  // Blends the two channels of one of the four words.
  template <typename scalar_t>
  __device__ __forceinline__ uint32_t blend(const float4& weights, int32_t word) const {
    switch (word) {
      case 0:
        return blend<scalar_t>(weights, values[0].x, values[1].x, values[2].x, values[3].x);
      case 1:
        return blend<scalar_t>(weights, values[0].y, values[1].y, values[2].y, values[3].y);
      case 2:
        return blend<scalar_t>(weights, values[0].z, values[1].z, values[2].z, values[3].z);
      default:
        return blend<scalar_t>(weights, values[0].w, values[1].w, values[2].w, values[3].w);
    }
  }

  // All four words.
  template <typename scalar_t>
  __device__ __forceinline__ uint4 blend(const float4& weights) const {
    return make_uint4(blend<scalar_t>(weights, 0), blend<scalar_t>(weights, 1), blend<scalar_t>(weights, 2),
                      blend<scalar_t>(weights, 3));
  }

 private:
  template <typename scalar_t>
  __device__ __forceinline__ static uint32_t blend(const float4& w, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    using Two = Pair<scalar_t>;
    float low = w.x * Two::low(a), high = w.x * Two::high(a);
    low = fmaf(w.y, Two::low(b), low), high = fmaf(w.y, Two::high(b), high);
    low = fmaf(w.z, Two::low(c), low), high = fmaf(w.z, Two::high(c), high);
    low = fmaf(w.w, Two::low(d), low), high = fmaf(w.w, Two::high(d), high);
    return Two::of(low, high);
  }
};

// Two adjacent output channels, bias added.
template <typename scalar_t>
__device__ __forceinline__ uint32_t with_bias(const FusedForward& call, int32_t channel, float low, float high) {
  if (call.bias) {
    const scalar_t* bias = static_cast<const scalar_t*>(call.bias) + channel;
    low += static_cast<float>(bias[0]);
    high += static_cast<float>(bias[1]);
  }
  return Pair<scalar_t>::of(low, high);
}

}  // namespace mmdcn
