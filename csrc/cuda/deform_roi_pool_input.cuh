// SPDX-License-Identifier: Apache-2.0
// The gradient of the input, gathered from the gradients of all bins that cover a block's pixels.
#pragma once

#include "deform_roi_pool_bins.cuh"

namespace mmdcn {

// What LocateRegions computes for each region and bin.
template <typename T>
struct BinTable {
  Box* boxes;    // [N*P], one for each bin
  Box* regions;  // [N]
  Bin<T>* bins;  // [N*P]

  BinTable(void* memory, int64_t rois, int64_t count)
      : boxes(static_cast<Box*>(memory)), regions(boxes + count), bins(reinterpret_cast<Bin<T>*>(regions + rois)) {}

  static int64_t bytes(int64_t rois, int64_t count) { return (rois + count) * sizeof(Box) + count * sizeof(Bin<T>); }
};

template <typename scalar_t>
struct LocateRegions : RoIs<scalar_t> {
  using typename RoIs<scalar_t>::T;

  static constexpr uint32_t kResident = 0, kRegions = 8, kLanes = 32;

  struct Shared {
    Box boxes[kRegions][kLanes];
  };

  BinTable<T> located;

  C10_HOST_DEVICE uint32_t max_lanes() const { return kLanes; }
  C10_HOST_DEVICE uint32_t blocks() const { return (this->geometry.rois + kRegions - 1) / kRegions; }
  C10_HOST_DEVICE int64_t block(uint32_t index) const { return int64_t{index} * kRegions; }

  template <typename Threads>
  C10_HOST_DEVICE void run(int64_t first, Shared& shared, const Threads& threads) const {
    const int64_t rest = this->geometry.rois - first, count = rest < kRegions ? rest : kRegions;
    const int64_t bins = this->geometry.bins();
    for (int64_t i = threads.group; i < count; i += threads.groups) {
      Box all = {};
      for (int64_t index = threads.lane; index < bins; index += kLanes) {
        const Bin<T> bin = this->bin(first + i, index);
        const Box box = box_of(bin);
        located.bins[(first + i) * bins + index] = bin, located.boxes[(first + i) * bins + index] = box;
        all.unite(box);
      }
      shared.boxes[i][threads.lane] = all;
    }
    threads.sync();
    for (int64_t i = threads.index(); i < count; i += threads.count()) {
      Box all = {};
      for (const Box& of_lane : shared.boxes[i]) {
        all.unite(of_lane);
      }
      located.regions[first + i] = all;
    }
  }
};

// Some pixels of an image, and some of its channels.
struct TileBlock {
  int32_t image, row, column, first_channel;
};

template <typename scalar_t, int kVector>
struct GatherGradient {
  using T = compute_t<scalar_t>;

  static constexpr uint32_t kResident = sizeof(T) == 4 ? 3 : 1;
  static constexpr uint32_t kRows = 4, kColumns = 8, kLanes = kRows * kColumns;
  static constexpr uint32_t kLaneChannels = 32;  // channels of a thread
  static constexpr uint32_t kGradients = 2;      // output gradients at a time; more would spill registers
  static constexpr uint32_t kGroups = kBlockThreads / kLanes;

  struct Shared {
    uint32_t votes[kGroups];
    uint32_t rois[kBlockThreads];
    uint32_t bins[kBlockThreads];   // index of each bin among those of all regions
    int64_t starts[kBlockThreads];  // start of each bin's gradients
    T rows[kBlockThreads][kRows], columns[kBlockThreads][kColumns];
    alignas(kVectorBytes) T grads[kGroups][kGradients][kLaneChannels];
  };

  RoIGeometry geometry;
  BinView<const scalar_t> grad_output;
  BinTable<T> located;
  ImageView<scalar_t> grad_input;

  C10_HOST_DEVICE uint32_t max_lanes() const { return kLanes; }
  C10_HOST_DEVICE uint32_t tile_rows() const { return (geometry.height + kRows - 1) / kRows; }
  C10_HOST_DEVICE uint32_t tile_columns() const { return (geometry.width + kColumns - 1) / kColumns; }
  C10_HOST_DEVICE uint32_t channel_blocks() const {
    return (geometry.channels + kLaneChannels * kGroups - 1) / (kLaneChannels * kGroups);
  }
  C10_HOST_DEVICE uint32_t blocks() const { return geometry.batch * tile_rows() * tile_columns() * channel_blocks(); }
  C10_HOST_DEVICE TileBlock block(uint32_t index) const {
    const uint32_t rows = tile_rows(), columns = tile_columns(), column = index % columns;
    const uint32_t row = index / columns % rows, image_and_block = index / columns / rows;
    const uint32_t batch = geometry.batch, channel_block = image_and_block / batch;
    return {static_cast<int32_t>(image_and_block % batch), static_cast<int32_t>(row * kRows),
            static_cast<int32_t>(column * kColumns), static_cast<int32_t>(channel_block * kLaneChannels * kGroups)};
  }

  template <typename Threads>
  C10_HOST_DEVICE void run(const TileBlock& tile, Shared& shared, const Threads& threads) const {
    for (uint32_t first_group = 0; first_group < kGroups; first_group += threads.groups) {
      const uint32_t group = first_group + threads.group;
      const int32_t channel = group < kGroups ? tile.first_channel + group * kLaneChannels : geometry.channels;
      T sum[kLaneChannels] = {};
      const uint32_t rois = geometry.rois;
      for (uint32_t roi = 0; roi < rois; roi += threads.count()) {
        const uint32_t candidates = choose_rois(tile, roi, shared, threads) * static_cast<uint32_t>(geometry.bins());
        for (uint32_t candidate = 0; candidate < candidates; candidate += threads.count()) {
          const uint32_t bins = choose_bins(tile, candidate, candidates, shared, threads);
          if (channel < geometry.channels) add(bins, channel, sum, shared, threads);
        }
      }
      if (channel < geometry.channels) write(tile, channel, sum, threads);
    }
  }

 private:
  struct Rank {
    uint32_t own, all;
  };

  // The number of chosen threads before this one, and in total.
  template <typename Threads>
  C10_HOST_DEVICE static Rank rank(bool chosen, Shared& shared, const Threads& threads) {
    const uint32_t vote = threads.ballot(chosen);
    if (threads.lane == 0) shared.votes[threads.group] = vote;
    threads.sync();
    Rank rank = {bits_set(vote & ((1u << threads.lane) - 1)), 0};
    for (uint32_t group = 0; group < threads.groups; ++group) {
      const uint32_t count = bits_set(shared.votes[group]);
      rank.own += group < threads.group ? count : 0, rank.all += count;
    }
    return rank;
  }

  // From as many regions as there are threads, chooses those that cover the tile, in order.
  template <typename Threads>
  C10_HOST_DEVICE uint32_t choose_rois(const TileBlock& tile, uint32_t first, Shared& shared,
                                       const Threads& threads) const {
    const uint32_t roi = first + threads.index();
    const bool chosen = roi < geometry.rois && reaches_tile(located.regions[roi], tile) &&
                        located.bins[roi * geometry.bins()].image == tile.image;
    const Rank rank = this->rank(chosen, shared, threads);
    if (chosen) shared.rois[rank.own] = roi;
    threads.sync();
    return rank.all;
  }

  // Chooses from the bins of these regions in the same way, and lists their weights in the tile.
  template <typename Threads>
  C10_HOST_DEVICE uint32_t choose_bins(const TileBlock& tile, uint32_t first, uint32_t end, Shared& shared,
                                       const Threads& threads) const {
    const uint32_t candidate = first + threads.index(), bins = geometry.bins();
    const bool exists = candidate < end;
    const uint32_t roi = exists ? shared.rois[candidate / bins] : 0, index = candidate % bins;
    const bool chosen = exists && reaches_tile(located.boxes[roi * bins + index], tile);
    const Rank rank = this->rank(chosen, shared, threads);
    if (chosen) {
      shared.bins[rank.own] = roi * bins + index;
      shared.starts[rank.own] = roi * grad_output.roi_stride + index * grad_output.bin_stride;
    }
    threads.sync();
    constexpr uint32_t kShares = 16;  // threads that share a bin; some are idle
#pragma unroll 1                      // otherwise the sums are spilled
    for (uint32_t j = threads.index(); j < rank.all * kShares; j += threads.count()) {
      const uint32_t i = j / kShares, k = j % kShares;
      if (k >= kRows + kColumns) continue;
      const Bin<T>& bin = located.bins[shared.bins[i]];
      const AxisSamples<T>& axis = k < kRows ? bin.y : bin.x;
      T& weight = k < kRows ? shared.rows[i][k] : shared.columns[i][k - kRows];
      weight = axis.at(k < kRows ? tile.row + k : tile.column + k - kRows).weight;
    }
    threads.sync();
    return rank.all;
  }

  C10_HOST_DEVICE static bool reaches_tile(const Box& box, const TileBlock& tile) {
    return box.y.reaches(tile.row, kRows) & box.x.reaches(tile.column, kColumns);
  }

  template <typename Threads>
  C10_HOST_DEVICE void add(uint32_t bins, int32_t channel, T (&sum)[kLaneChannels], Shared& shared,
                           const Threads& threads) const {
    const bool has_channel = channel + threads.lane < geometry.channels;
    const scalar_t* own = grad_output.at(0, has_channel ? channel + threads.lane : channel, 0);
    auto& grads = shared.grads[threads.group];
    const uint32_t row = threads.lane / kColumns, column = threads.lane % kColumns;
    for (uint32_t first = 0; first < bins; first += kGradients) {
      const uint32_t count = bins - first < kGradients ? bins - first : kGradients;
      scalar_t loaded[kGradients];  // loaded together, to overlap their latency
      for (uint32_t i = 0; i < kGradients; ++i) {
        if (i < count) loaded[i] = own[shared.starts[first + i]];
      }
      for (uint32_t i = 0; i < kGradients; ++i) {
        if (i < count) grads[i][threads.lane] = static_cast<T>(loaded[i]);
      }
      threads.sync_group();
      for (uint32_t i = 0; i < count; ++i) {
        const T weight = shared.rows[first + i][row] * shared.columns[first + i][column];
        if (weight == 0) continue;
        for (uint32_t c = 0; c < kLaneChannels; ++c) {
          sum[c] += weight * grads[i][c];
        }
      }
      threads.sync_group();
    }
  }

  template <typename Threads>
  C10_HOST_DEVICE void write(const TileBlock& tile, int32_t channel, const T (&sum)[kLaneChannels],
                             const Threads& threads) const {
    const int32_t row = tile.row + threads.lane / kColumns, column = tile.column + threads.lane % kColumns;
    if (row >= geometry.height || column >= geometry.width) return;
    scalar_t* target = grad_input.at(tile.image, channel, row, column);
    for (uint32_t c = 0; c < kLaneChannels; c += kVector) {
      if (channel + static_cast<int32_t>(c) >= geometry.channels) return;
      Vector<scalar_t, kVector> rounded;
      for (int i = 0; i < kVector; ++i) {
        rounded.values[i] = static_cast<scalar_t>(sum[c + i]);
      }
      rounded.store(target);
      target += kVector * grad_input.channel_stride;
    }
  }
};

}  // namespace mmdcn
