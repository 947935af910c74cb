// SPDX-License-Identifier: Apache-2.0
// The gradient of the input from the gradient of a tile's columns. See Note [Deformable convolution on CUDA].
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <type_traits>

#include "deform_conv2d.cuh"

namespace mmdcn {

// Adds to the image with atomics. A block processes at most 9 taps of one offset group for a patch, one warp each. It
// sorts the corners of the samples by pixel and sums those of a pixel before it adds them to the image, since the
// kernel is bound by the rate of atomics. kLanes lanes share a pixel; with kSingle each has at most one vector. With
// kReadOnly the kernel does not write the columns. Without, as part of Backpropagate, it has not run on a GPU yet, and
// has loops that should be faster.
template <typename scalar_t, int kVector, int kLanes, bool kSingle, bool kReadOnly = true>
struct AddToInput {
  using T = compute_t<scalar_t>;
  using V = Vector<scalar_t, kVector>;

  static constexpr uint32_t kWarps = 9, kThreads = kWarps * kWarp, kCorners = 4 * kThreads;
  static constexpr uint32_t kBatch = sizeof(T) == 8 ? 2 : 8;  // corners of a pixel whose loads are in flight
  static constexpr uint32_t kLastBatch = kReadOnly ? kBatch : kBatch / 2;
  static constexpr uint32_t kResident = 2;
  static constexpr uint32_t kSlotRows = 32, kSlotColumns = 64, kSlots = kSlotRows * kSlotColumns, kNone = ~0u;
  static_assert(kSlots > kCorners);

  // A slot of a hash table of pixels.
  struct alignas(8) Slot {
    uint32_t pixel;
    uint32_t corners;  // the number of corners; later their range in the sorted list: first | number << 16

    C10_DEVICE uint32_t begin() const { return corners & 0xffff; }
    C10_DEVICE uint32_t end() const { return begin() + (corners >> 16); }
  };

  struct alignas(2 * sizeof(T)) Corner {
    uint32_t column;
    T weight;
  };

  struct Shared {
    Slot slots[kSlots];
    Corner corners[kCorners];
    uint16_t used[kCorners];  // the slots in use
    uint32_t used_count, corner_count;
  };

  Tile<scalar_t, kVector> tile;
  T* grad_input;  // [B*H*W, C_in]

  C10_HOST_DEVICE uint32_t tap_blocks() const { return (tile.taps.divisor + kWarps - 1) / kWarps; }
  C10_HOST_DEVICE uint32_t blocks() const { return tile.patches * tile.offset_groups.divisor * tap_blocks(); }

  // The samples of a warp; there are none if the tap is not less than the number of taps.
  struct Samples {
    uint32_t patch, offset_group, tap;
  };

  C10_DEVICE Samples samples(uint32_t block, const Threads& threads) const {
    const uint32_t tap = block % tap_blocks() * kWarps + threads.group;
    const Divided at = divide(block / tap_blocks(), tile.offset_groups);
    return {at.quotient, at.rest, tap};
  }

  C10_DEVICE void run(uint32_t block, Shared& shared, const Threads& threads) const {
    const auto [patch, offset_group, tap] = samples(block, threads);
    for (uint32_t i = threads.index(); i < kSlots; i += kThreads) {
      shared.slots[i] = {kNone, 0};
    }
    if (threads.index() == 0) shared.used_count = shared.corner_count = 0;
    Point<T> point{};
    if (tap < tile.taps.divisor) point = tile.locate(patch, threads.lane, offset_group, tap);
    threads.sync();
    uint32_t places[4] = {kNone, kNone, kNone, kNone};
    if (point.inside) count_corners(point, shared, places, threads);
    threads.sync();
    divide_list(shared, threads);
    threads.sync();
    sort_corners(point, tile.column(point.position, tap), shared, places, threads);
    threads.sync();
    add_pixels(shared, offset_group * tile.offset_group_vectors, threads);
  }

 private:
  // Sets places to slot | rank among the slot's corners << 16.
  C10_DEVICE void count_corners(const Point<T>& point, Shared& shared, uint32_t (&places)[4],
                                const Threads& threads) const {
    bool inside[4];
    corners_inside(point, inside);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!inside[k]) continue;
      const uint32_t y = point.top + k / 2, x = point.left + k % 2, pixel = tile.pixel(point, y, x);
      uint32_t slot = first_slot(y, x);
      while (true) {
        const uint32_t found = threads.compare_and_exchange(&shared.slots[slot].pixel, kNone, pixel);
        if (found == kNone || found == pixel) break;
        slot = (slot + 1) % kSlots;
      }
      places[k] = slot | threads.increment(&shared.slots[slot].corners) << 16;
    }
  }

  // Nearby pixels have nearby slots: 32 adjacent slots are two rows of 16 pixels. They share most of their samples,
  // whose columns are then read from the L1 cache.
  C10_DEVICE static uint32_t first_slot(uint32_t y, uint32_t x) {
    return y % kSlotRows / 2 * (2 * kSlotColumns) + x % kSlotColumns * 2 + y % 2;
  }

  // Lists the slots in use and assigns each its range of the sorted list, in the order of a warp's slots.
  C10_DEVICE void divide_list(Shared& shared, const Threads& threads) const {
    for (uint32_t first = threads.group * kWarp; first < kSlots; first += kThreads) {
      const uint32_t slot = first + threads.lane, count = shared.slots[slot].corners;
      const uint32_t used = threads.ballot(count > 0);
      if (used == 0) continue;
      uint32_t until = count;  // the end of the range, counted from the warp's first corner
      for (uint32_t distance = 1; distance < kWarp; distance *= 2) {
        const uint32_t before = threads.shuffle_up(until, distance);
        until += threads.lane >= distance ? before : 0;
      }
      uint32_t corner = 0, number = 0;
      if (threads.lane == kWarp - 1) {
        corner = threads.increment(&shared.corner_count, until);
        number = threads.increment(&shared.used_count, bits_set(used));
      }
      corner = threads.shuffle(corner, kWarp - 1), number = threads.shuffle(number, kWarp - 1);
      if (count == 0) continue;
      shared.slots[slot].corners = (corner + until - count) | count << 16;
      shared.used[number + bits_set(used & ((1u << threads.lane) - 1))] = slot;
    }
  }

  // Sorts the corners of each pixel by column, so that the order in which the threads counted them does not matter.
  C10_DEVICE void sort_corners(const Point<T>& point, uint32_t column, Shared& shared, uint32_t (&places)[4],
                               const Threads& threads) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (places[k] == kNone) continue;
      shared.corners[shared.slots[places[k] & 0xffff].begin() + (places[k] >> 16)].column = column;
    }
    threads.sync();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (places[k] == kNone) continue;
      const Slot slot = shared.slots[places[k] & 0xffff];
      places[k] = slot.begin();
#pragma unroll(kReadOnly ? 1 : 4)
      for (const Corner* other = shared.corners + slot.begin(); other != shared.corners + slot.end(); ++other) {
        places[k] += other->column < column;
      }
    }
    threads.sync();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (places[k] != kNone) shared.corners[places[k]] = {column, point.weight(k) * point.mask};
    }
  }

  C10_DEVICE void add_pixels(const Shared& shared, uint32_t first_vector, const Threads& threads) const {
    const uint32_t sub = threads.lane % kLanes, used = shared.used_count;
    if (sub >= tile.offset_group_vectors) return;
    const V* const first_columns = opaque(tile.columns + tile.first_column(first_vector + sub));
    T* const first_target = grad_input + (first_vector + sub) * kVector;
    for (uint32_t i = threads.index() / kLanes; i < used; i += kThreads / kLanes) {
      const Slot slot = shared.slots[shared.used[i]];
      const uint64_t row = uint64_t{slot.pixel} * tile.in_channels;
      add_corners(shared.corners, slot, first_columns, first_target + row, threads);
      if constexpr (!kSingle) {
#pragma unroll 1
        for (uint32_t c = sub + kLanes; c < tile.offset_group_vectors; c += kLanes) {
          add_corners(shared.corners, slot, opaque(tile.columns + tile.first_column(first_vector + c)),
                      grad_input + (first_vector + c) * kVector + row, threads);
        }
      }
    }
  }

  C10_DEVICE void add_corners(const Corner* corners, const Slot& slot, const V* columns, T* target,
                              const Threads& threads) const {
    T sum[kVector] = {};
    uint32_t first = slot.begin();
    if constexpr (!kReadOnly) {
#pragma unroll 1
      for (; first + kBatch <= slot.end(); first += kBatch) {
        add_batch<kBatch, true>(corners, first, slot.end(), columns, sum);
      }
    }
#pragma unroll 1
    for (; first < slot.end(); first += kLastBatch) {
      add_batch<kLastBatch, false>(corners, first, slot.end(), columns, sum);
    }
    threads.add(target, sum);
  }

  // Several corners at a time, so that their loads overlap; after the last one, it is repeated with weight 0.
  template <uint32_t kCount, bool kFull>
  C10_DEVICE C10_ALWAYS_INLINE_ATTRIBUTE static void add_batch(const Corner* corners, uint32_t first, uint32_t end,
                                                               const V* columns, T (&sum)[kVector]) {
    V grads[kCount];
    T weights[kCount];
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
      const bool valid = kFull || first + i < end;
      const Corner corner = corners[valid ? first + i : end - 1];
      const V* const column = element(columns, corner.column);
      if constexpr (kReadOnly) {
        grads[i] = load(column);
      } else {
        grads[i] = load_before_write(column);
      }
      weights[i] = valid ? corner.weight : 0;
    }
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
      T grad[kVector];
      grads[i].unpack(grad);
      for (int v = 0; v < kVector; ++v) {
        sum[v] += weights[i] * grad[v];
      }
    }
  }
};

constexpr int32_t kNoPixel = INT32_MAX;  // for a corner outside the image; sorts last

// The corners of a tile in a fixed order: corner k of the sample of a tap and an offset group at a position has the
// index 4 * ((position * K + tap) * G + offset_group) + k.
template <typename T>
struct Corners {
  int32_t* pixels;  // pixel of the batch * G + offset group, or kNoPixel
  T* weights;       // mask included
};

template <typename scalar_t, int kVector>
struct ListCorners {
  using T = compute_t<scalar_t>;

  static constexpr uint32_t kWarps = 8, kResident = 4;

  struct Shared {};

  Tile<scalar_t, kVector> tile;
  Corners<T> corners;

  C10_HOST_DEVICE uint32_t blocks() const {
    return (tile.patches * tile.offset_groups.divisor * tile.taps.divisor + kWarps - 1) / kWarps;
  }

  C10_DEVICE void run(uint32_t block, Shared&, const Threads& threads) const {
    const Divided by_tap = divide(block * kWarps + threads.group, tile.taps);
    const Divided by_group = divide(by_tap.quotient, tile.offset_groups);
    const uint32_t tap = by_tap.rest, patch = by_group.quotient, offset_group = by_group.rest;
    if (patch >= tile.patches) return;
    const Point<T> point = tile.locate(patch, threads.lane, offset_group, tap);
    if (!point.valid) return;
    bool inside[4];
    corners_inside(point, inside);
    const uint32_t sample = (point.position * tile.taps.divisor + tap) * tile.offset_groups.divisor + offset_group;
    for (uint32_t k = 0; k < 4; ++k) {
      const uint32_t pixel = tile.pixel(point, point.top + k / 2, point.left + k % 2);
      corners.pixels[4 * sample + k] = inside[k] ? pixel * tile.offset_groups.divisor + offset_group : kNoPixel;
      corners.weights[4 * sample + k] = point.weight(k) * point.mask;
    }
  }
};

// Sums the corners of each pixel in the order of their indices. A warp processes the pixels whose corners begin at one
// of 32 adjacent places of the sorted list; its groups of kLanes lanes take turns with the corners of a pixel.
template <typename scalar_t, int kVector, int kLanes>
struct AddSortedCorners {
  using T = compute_t<scalar_t>;
  using V = Vector<scalar_t, kVector>;

  static constexpr uint32_t kWarps = 8, kResident = 4, kGroups = kWarp / kLanes;

  struct Shared {};

  Tile<scalar_t, kVector> tile;
  Corners<T> corners;
  const int64_t* order;  // indices of the corners, sorted by pixel, then by index
  T* grad_input;         // [B*H*W, C_in]

  C10_HOST_DEVICE uint32_t count() const { return 4 * tile.count * tile.taps.divisor * tile.offset_groups.divisor; }
  C10_HOST_DEVICE uint32_t blocks() const { return (count() + kWarps * kWarp - 1) / (kWarps * kWarp); }

  C10_DEVICE void run(uint32_t block, Shared&, const Threads& threads) const {
    const uint32_t first = (block * kWarps + threads.group) * kWarp, place = first + threads.lane;
    const int32_t own_pixel = pixel_at(place), pixel_before = place == 0 ? kNoPixel : pixel_at(place - 1);
    uint32_t begins = threads.ballot(own_pixel != pixel_before && own_pixel != kNoPixel);
    while (begins) {
      const uint32_t from = lowest_bit(begins);
      begins &= begins - 1;
      add_pixel(first + from, threads.shuffle(own_pixel, from), threads);
    }
  }

 private:
  C10_DEVICE int32_t pixel_at(uint32_t place) const {
    return place < count() ? load(corners.pixels + load(order + place)) : kNoPixel;
  }

  C10_DEVICE void add_pixel(uint32_t begin, int32_t own_pixel, const Threads& threads) const {
    const uint32_t sub = threads.lane % kLanes, group = threads.lane / kLanes;
    const Divided at = divide(own_pixel, tile.offset_groups);
    const uint32_t first_vector = at.rest * tile.offset_group_vectors;
    for (uint32_t first = 0; first < tile.offset_group_vectors; first += kLanes) {
      const uint32_t vector = first_vector + first + sub;
      const bool active = first + sub < tile.offset_group_vectors;
      const V* const columns = tile.columns + tile.first_column(vector);
      T sum[kVector] = {};
      for (uint32_t place = begin, found = kWarp; found == kWarp; place += kWarp) {
        found = add_corners(place, own_pixel, active, columns, sum, threads);
      }
      for (uint32_t distance = kLanes; distance < kWarp; distance *= 2) {
        for (T& each : sum) {
          each += threads.shuffle_xor(each, distance);
        }
      }
      if (!active || group != 0) continue;
      T* const target = grad_input + uint64_t{at.quotient} * tile.in_channels + vector * kVector;
      for (int v = 0; v < kVector; ++v) {
        target[v] += sum[v];
      }
    }
  }

  // Adds up to kWarp corners of the pixel from a place on, one per lane, and returns their number.
  C10_DEVICE uint32_t add_corners(uint32_t place, int32_t own_pixel, bool active, const V* columns, T (&sum)[kVector],
                                  const Threads& threads) const {
    const uint32_t corner = place + threads.lane < count() ? load(order + place + threads.lane) : 0;
    const bool own = place + threads.lane < count() && load(corners.pixels + corner) == own_pixel;
    const T own_weight = own ? load(corners.weights + corner) : 0;
    const uint32_t own_column = tile.offset_groups(corner / 4) * tile.group_vectors;
    const uint32_t found = bits_set(threads.ballot(own));
    const uint32_t group = threads.lane / kLanes;
#pragma unroll 4
    for (uint32_t i = group; i < found + group; i += kGroups) {  // the same number of turns for each group
      const uint32_t from = i < found ? i : 0;
      const T weight = threads.shuffle(own_weight, from);
      const uint32_t column = threads.shuffle(own_column, from);
      if (!active || i >= found) continue;
      T grad[kVector];
      load(element(columns, column)).unpack(grad);
      for (int v = 0; v < kVector; ++v) {
        sum[v] += weight * grad[v];
      }
    }
    return found;
  }
};

}  // namespace mmdcn
