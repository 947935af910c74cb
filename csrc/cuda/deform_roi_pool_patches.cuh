// SPDX-License-Identifier: Apache-2.0
// Pooling of images of any strides: a block copies the patch of pixels around its bins to shared memory.
#pragma once

#include "deform_roi_pool_bins.cuh"

namespace mmdcn {

// Some channels of some bins of a region.
struct PatchBlock : BinBlock {
  int64_t roi, first_channel, end_channel, channel_block;
};

// The pixels around the bins of a block, in shared memory: [channels, pixels].
struct Patch {
  Box box;
  uint32_t channel_stride;
  int32_t log_channels;  // log2 of the number of channels that fit; -1 if none does
};

constexpr uint32_t kPatchBins = 49;       // 7 x 7 is the usual size; odd, so that channels are in different banks
constexpr int32_t kLogPatchChannels = 4;  // log2 of the maximum number of channels at a time
constexpr uint32_t kPatchChannels = 1 << kLogPatchChannels;
constexpr int64_t kBlockChannels = 32;  // channels of a block
constexpr uint32_t kSharedBytes = 48 << 10;

// `Ours` is the data that a body keeps for each bin and channel of the current ones.
template <typename scalar_t, int kLaneChannels>
struct PatchShared {
  using T = compute_t<scalar_t>;

  LocatedBins<T, kPatchBins> located;
  T own[kLaneChannels][kPatchChannels][kPatchBins];

  static constexpr uint32_t kUsed =
      sizeof(LocatedBins<T, kPatchBins>) + sizeof(T) * kLaneChannels * kPatchChannels * kPatchBins + 16;
  static constexpr uint32_t kValues = (kSharedBytes - kUsed) / sizeof(scalar_t);

  scalar_t values[kValues];
};

// A bin and two channels of a patch, for which its weights are read once. Without a second channel the first is used
// twice.
struct ChannelPair {
  uint32_t bin, first, second;
  bool has_second;
};

template <typename scalar_t, int kLaneChannels>
struct PatchPooling : RoIs<scalar_t> {
  using typename RoIs<scalar_t>::T;
  using Shared = PatchShared<scalar_t, kLaneChannels>;

  static constexpr uint32_t kResident = sizeof(T) == 4 ? 4 : 1;

  ImageView<const scalar_t> input;

  C10_HOST_DEVICE uint32_t max_lanes() const { return 32; }
  C10_HOST_DEVICE int64_t bin_blocks() const { return (this->geometry.bins() + kPatchBins - 1) / kPatchBins; }
  C10_HOST_DEVICE int64_t channel_blocks() const {
    return (this->geometry.channels + kBlockChannels - 1) / kBlockChannels;
  }
  C10_HOST_DEVICE uint32_t blocks() const { return this->geometry.rois * bin_blocks() * channel_blocks(); }

  // Blocks iterate over all regions before the next channels, so that the pixels which regions share stay in the cache.
  C10_HOST_DEVICE PatchBlock block(uint32_t index) const {
    const uint32_t bin_blocks = this->bin_blocks(), all_bin_blocks = this->geometry.rois * bin_blocks;
    const uint32_t channel_block = index / all_bin_blocks, bin_block_of_all = index % all_bin_blocks;
    const uint32_t roi = bin_block_of_all / bin_blocks, bin_block = bin_block_of_all % bin_blocks;
    const uint32_t bins = this->geometry.bins(), block_bins = (bins + bin_blocks - 1) / bin_blocks;
    const uint32_t first = bin_block * block_bins, rest = bins - first;
    const int64_t first_channel = channel_block * kBlockChannels, end = first_channel + kBlockChannels;
    PatchBlock block;
    block.first = first, block.count = first < bins ? (rest < block_bins ? rest : block_bins) : 0;
    block.roi = roi, block.channel_block = channel_block, block.first_channel = first_channel;
    block.end_channel = end < this->geometry.channels ? end : this->geometry.channels;
    return block;
  }

  // Calls body(pair, first channel, pixels) for each bin and pair of channels; a thread has the same bins and channels
  // each time. After each group of channels, calls done(first channel, number of channels).
  template <typename Threads, typename Body, typename Done>
  C10_HOST_DEVICE void for_each_pair(const PatchBlock& block, Shared& shared, const Threads& threads, const Body& body,
                                     const Done& done) const {
    this->locate_bins({block.roi * this->geometry.bins() + block.first, block.count}, shared.located, threads);
    const Patch patch = patch_of(shared.located.all);
    const Box& box = patch.box;
    const bool fits = patch.log_channels >= 0;
    const int64_t image = shared.located.bins[0].image < 0 ? 0 : shared.located.bins[0].image;
    const uint32_t log_channels = fits ? patch.log_channels : kLogPatchChannels, channels = 1 << log_channels;
    const uint32_t log_lanes = log_channels > 0 ? log_channels - 1 : 0, lanes = 1 << log_lanes;
    for (int64_t first = block.first_channel; first < block.end_channel; first += channels) {
      const int64_t rest = block.end_channel - first;
      const uint32_t count = rest < channels ? rest : channels;
      if (fits) copy(patch, input.at(image, first, box.y.begin, box.x.begin), count, shared.values, threads);
      threads.sync();
      for (uint32_t j = threads.index(); j < block.count << log_lanes; j += threads.count()) {
        const uint32_t i = j >> log_lanes, lane = j & (lanes - 1);
        if (lane >= count) continue;
        const bool has_second = lanes < channels && lane + lanes < count;
        const ChannelPair pair = {i, lane, lane + lanes, has_second};
        if (fits) {
          const scalar_t* values = shared.values + lane * patch.channel_stride;
          const int32_t to_second = has_second ? lanes * patch.channel_stride : 0;
          body(pair, first,
               Pixels<scalar_t, 2, false, int32_t>{values, box.y.begin, box.x.begin, box.x.size(), 1, to_second});
        } else {
          const int64_t to_second = has_second ? lanes * input.channel_stride : 0;
          body(pair, first,
               Pixels<scalar_t, 2, false, int64_t>{input.at(image, first + lane, 0, 0), 0, 0, input.row_stride,
                                                   input.column_stride, to_second});
        }
      }
      threads.sync();
      done(first, count);
    }
  }

 private:
  C10_HOST_DEVICE static Patch patch_of(const Box& box) {
    // An odd number of words, so that the channels of a pixel are in different banks.
    constexpr uint32_t kInWord = sizeof(scalar_t) < 4 ? 4 / sizeof(scalar_t) : 1;
    const int64_t pixels = int64_t{box.y.size()} * box.x.size();
    const int64_t stride = ((pixels + kInWord - 1) / kInWord | 1) * kInWord;
    int32_t log_channels = kLogPatchChannels;
    while (log_channels >= 0 && stride << log_channels > Shared::kValues) {
      --log_channels;
    }
    return {box, static_cast<uint32_t>(stride), log_channels};
  }

  // Copies channels of the patch, starting at its first pixel.
  template <typename Threads>
  C10_HOST_DEVICE void copy(const Patch& patch, const scalar_t* first_pixel, uint32_t channels, scalar_t* values,
                            const Threads& threads) const {
    constexpr uint32_t kAtATime = 8;  // loads at a time, to overlap their latency
    const uint32_t width = patch.box.x.size(), pixels = patch.box.y.size() * width;
    for (uint32_t pixel = threads.index(); pixel < pixels; pixel += threads.count()) {
      const uint32_t row = pixel / width, column = pixel - row * width;
      const scalar_t* source = first_pixel + row * input.row_stride + column * input.column_stride;
      scalar_t* target = values + pixel;
      for (uint32_t first = 0; first < channels; first += kAtATime) {
        scalar_t loaded[kAtATime];
        for (uint32_t k = 0; k < kAtATime; ++k, source += input.channel_stride) {
          if (first + k < channels) loaded[k] = *source;
        }
        for (uint32_t k = 0; k < kAtATime; ++k, target += patch.channel_stride) {
          if (first + k < channels) *target = loaded[k];
        }
      }
    }
  }
};

template <typename scalar_t>
struct PoolPatches : PatchPooling<scalar_t, 1> {
  using typename RoIs<scalar_t>::T;
  using typename PatchPooling<scalar_t, 1>::Shared;

  BinView<scalar_t> output;

  template <typename Threads>
  C10_HOST_DEVICE void run(const PatchBlock& block, Shared& shared, const Threads& threads) const {
    this->for_each_pair(
        block, shared, threads,
        [&](const ChannelPair& pair, int64_t, const auto& pixels) {
          T sum[2];
          shared.located.pool(pair.bin, pixels, sum);
          shared.own[0][pair.first][pair.bin] = sum[0];
          if (pair.has_second) shared.own[0][pair.second][pair.bin] = sum[1];
        },
        [&](int64_t first, uint32_t count) {
          for (uint32_t c = threads.group; c < count; c += threads.groups) {
            for (uint32_t i = threads.lane; i < block.count; i += threads.lanes) {
              *output.at(block.roi, first + c, block.first + i) = static_cast<scalar_t>(shared.own[0][c][i]);
            }
          }
        });
  }
};

template <typename scalar_t>
struct OffsetGradientPatches : PatchPooling<scalar_t, 2> {
  using typename RoIs<scalar_t>::T;
  using typename PatchPooling<scalar_t, 2>::Shared;

  BinView<const scalar_t> grad_output;
  T* partial_grad_offset;  // [blocks of channels, N, 2, P]

  template <typename Threads>
  C10_HOST_DEVICE void run(const PatchBlock& block, Shared& shared, const Threads& threads) const {
    auto &grad_y = shared.own[0], &grad_x = shared.own[1];
    for (uint32_t j = threads.index(); j < kPatchChannels * kPatchBins; j += threads.count()) {
      grad_y[j / kPatchBins][j % kPatchBins] = 0, grad_x[j / kPatchBins][j % kPatchBins] = 0;
    }
    this->for_each_pair(
        block, shared, threads,
        [&](const ChannelPair& pair, int64_t first, const auto& pixels) {
          const scalar_t* grads = grad_output.at(block.roi, first, block.first + pair.bin);
          T grad[2] = {static_cast<T>(grads[pair.first * grad_output.channel_stride]), 0};
          if (pair.has_second) grad[1] = static_cast<T>(grads[pair.second * grad_output.channel_stride]);
          T &y = grad_y[pair.first][pair.bin], &x = grad_x[pair.first][pair.bin], sum_y = y, sum_x = x;
          shared.located.add_position_gradient(pair.bin, pixels, grad, sum_y, sum_x);
          y = sum_y, x = sum_x;
        },
        [](int64_t, uint32_t) {});
    T* partial = partial_grad_offset + block.channel_block * 2 * this->bins();
    for (uint32_t i = threads.index(); i < block.count; i += threads.count()) {
      T y = 0, x = 0;
      for (uint32_t lane = 0; lane < kPatchChannels; ++lane) {
        y += grad_y[lane][i], x += grad_x[lane][i];
      }
      write_offset_gradient(this->geometry, shared.located.bins[i], block.roi, block.first + i, y, x, partial);
    }
  }
};

// Sums the partial gradients that OffsetGradientPatches writes for each block of channels.
template <typename T>
struct SumPartials {
  static constexpr uint32_t kResident = 0;

  struct Shared {};

  const T* partials;  // [count, size]
  T* sum;             // [size]
  int64_t count, size;

  C10_HOST_DEVICE uint32_t max_lanes() const { return 32; }
  C10_HOST_DEVICE uint32_t blocks() const { return (size + kBlockThreads - 1) / kBlockThreads; }
  C10_HOST_DEVICE int64_t block(uint32_t index) const { return int64_t{index} * kBlockThreads; }

  template <typename Threads>
  C10_HOST_DEVICE void run(int64_t first, Shared&, const Threads& threads) const {
    const int64_t end = first + kBlockThreads < size ? first + kBlockThreads : size;
    for (int64_t i = first + threads.index(); i < end; i += threads.count()) {
      T total = 0;
      for (int64_t partial = 0; partial < count; ++partial) {
        total += partials[partial * size + i];
      }
      sum[i] = total;
    }
  }
};

}  // namespace mmdcn
