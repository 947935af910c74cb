// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <type_traits>

#include "device.cuh"
#include "vector.cuh"

namespace mmdcn {

// The memory layout of images.
struct ImageStrides {
  int64_t image, y, x, channel;

  static ImageStrides of(const Tensor& images) {  // [B, C, H, W]
    return {images.stride(0), images.stride(2), images.stride(3), images.stride(1)};
  }

  // The strides of dense NHWC.
  static ImageStrides rows(int64_t channels, int64_t height, int64_t width) {
    return {height * width * channels, width * channels, channels, 1};
  }
};

// Copies images between any two layouts and types. A block copies 32 pixels of a row, or of an image if its pixels have
// one stride, and 32 channels. It reads and writes along the channels or along the pixels, whichever has the smaller
// stride, and transposes in shared memory.
template <typename In, typename Out>
struct CopyImages {
  static constexpr uint32_t kResident = 0, kSide = 32;

  const In* in;
  Out* out;
  ImageStrides from, to;
  uint32_t channels, rows, row_pixels;  // rows of an image

  struct Block {
    int64_t image;
    uint32_t row, first_pixel, first_channel;
  };

  struct Shared {
    compute_t<In> values[kSide][kSide + 1];
  };

  uint32_t images;

  C10_HOST_DEVICE uint32_t max_lanes() const { return kSide; }
  C10_HOST_DEVICE uint32_t channel_blocks() const { return (channels + kSide - 1) / kSide; }
  C10_HOST_DEVICE uint32_t row_blocks() const { return (row_pixels + kSide - 1) / kSide; }
  C10_HOST_DEVICE uint32_t blocks() const { return images * rows * row_blocks() * channel_blocks(); }

  C10_HOST_DEVICE Block block(uint32_t index) const {
    const uint32_t of_channels = index / channel_blocks(), of_row = of_channels / row_blocks();
    return {of_row / rows, of_row % rows, of_channels % row_blocks() * kSide, index % channel_blocks() * kSide};
  }

  template <typename Threads>
  C10_DEVICE void run(const Block& block, Shared& shared, const Threads& threads) const {
    for_each(block, from, threads, [&](uint32_t pixel, uint32_t channel, int64_t place) {
      shared.values[pixel][channel] = static_cast<compute_t<In>>(in[place]);
    });
    threads.sync();
    for_each(block, to, threads, [&](uint32_t pixel, uint32_t channel, int64_t place) {
      out[place] = static_cast<Out>(shared.values[pixel][channel]);
    });
  }

 private:
  template <typename Threads, typename Body>
  C10_DEVICE void for_each(const Block& block, const ImageStrides& strides, const Threads& threads,
                           const Body& body) const {
    const bool along_channels = strides.channel <= strides.x;
    const int64_t first = block.image * strides.image + block.row * strides.y;
    for (uint32_t i = threads.index(); i < kSide * kSide; i += threads.count()) {
      const uint32_t pixel = along_channels ? i / kSide : i % kSide, channel = along_channels ? i % kSide : i / kSide;
      const uint32_t x = block.first_pixel + pixel, c = block.first_channel + channel;
      if (x < row_pixels && c < channels) body(pixel, channel, first + x * strides.x + c * strides.channel);
    }
  }
};

// Converts a contiguous array to another type. A thread converts kVector elements.
template <typename In, typename Out>
struct CopyNumbers {
  static constexpr uint32_t kResident = 0, kVector = 4, kBlockVectors = 1024;

  const In* in;
  Out* out;
  int64_t count;

  struct Shared {};

  C10_HOST_DEVICE uint32_t max_lanes() const { return 32; }
  C10_HOST_DEVICE uint32_t blocks() const {
    return static_cast<uint32_t>((count + kVector * kBlockVectors - 1) / (kVector * kBlockVectors));
  }
  C10_HOST_DEVICE uint32_t block(uint32_t index) const { return index; }

  template <typename Threads>
  C10_DEVICE void run(uint32_t block, Shared&, const Threads& threads) const {
    for (uint32_t i = threads.index(); i < kBlockVectors; i += threads.count()) {
      const int64_t first = (int64_t{block} * kBlockVectors + i) * kVector;
      if (first + kVector <= count) {
        compute_t<In> numbers[kVector];
        Vector<In, kVector>::at(in + first).unpack(numbers);
        Vector<Out, kVector>::pack(numbers).store(out + first);
      } else {
        for (int64_t rest = first; rest < count; ++rest) {
          out[rest] = static_cast<Out>(in[rest]);
        }
      }
    }
  }
};

// Copies images [images, channels, height, width] on the device's current stream.
template <typename In, typename Out>
void copy_images(const In* in, const ImageStrides& from, Out* out, const ImageStrides& to, int64_t images,
                 int64_t channels, int64_t height, int64_t width, int32_t device) {
  if constexpr (!std::is_same_v<In, Out> && sizeof(In) <= 4) {  // a gradient of rows, summed in float32
    const bool dense = to.channel == 1 && to.x == channels && to.y == width * channels && to.image == height * to.y;
    const bool same = from.channel == 1 && from.x == to.x && from.y == to.y && from.image == to.image;
    const auto is_aligned = [](const void* address) {
      return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0;
    };
    if (dense && same && is_aligned(in) && is_aligned(out)) {
      const CopyNumbers<In, Out> copy{in, out, images * height * width * channels};
      if (copy.blocks() > 0) launch(copy, device);
      return;
    }
  }
  const bool even = from.y == width * from.x && to.y == width * to.x;
  const auto number = [](int64_t n) { return static_cast<uint32_t>(n); };
  const CopyImages<In, Out> copy{.in = in,
                                 .out = out,
                                 .from = from,
                                 .to = to,
                                 .channels = number(channels),
                                 .rows = even ? 1 : number(height),
                                 .row_pixels = number(even ? height * width : width),
                                 .images = number(images)};
  if (copy.blocks() > 0) launch(copy, device);
}

}  // namespace mmdcn
