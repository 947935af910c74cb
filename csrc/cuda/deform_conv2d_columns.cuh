// SPDX-License-Identifier: Apache-2.0
// Sampling pixels into the columns of a tile, and its backward. See Note [Deformable convolution on CUDA].
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <type_traits>

#include "deform_conv2d.cuh"

namespace mmdcn {

// The samples of a warp that are inside their image, without gaps. No corner is outside: the row or column of the cell
// that is inside replaces the one outside, and each gets half the weight. Halving is exact, and no pixel outside the
// sample's cell, which could be NaN, enters the sum.
template <typename T>
struct alignas(16) WarpSamples {
  struct alignas(16) Pixels {
    uint32_t at[4];  // the first vectors of the corners
  };

  Pixels pixels[kWarp];
  T weights[kWarp][4];
  uint32_t columns[kWarp];

  template <typename Tile>
  C10_DEVICE void put(uint32_t slot, const Tile& tile, const Point<T>& point, uint32_t column) {
    const int32_t top = point.has_top ? point.top : point.top + 1, left = point.has_left ? point.left : point.left + 1;
    const int32_t bottom = point.has_bottom ? point.top + 1 : point.top;
    const int32_t right = point.has_right ? point.left + 1 : point.left;
    T rows[2], sides[2];
    halve(point.has_top, point.has_bottom, point.fy, rows);
    halve(point.has_left, point.has_right, point.fx, sides);
    const uint32_t first_row = point.image * tile.height;
    const uint32_t top_row = (first_row + top) * tile.width, bottom_row = (first_row + bottom) * tile.width;
    pixels[slot] = {{(top_row + left) * tile.pixel_vectors, (top_row + right) * tile.pixel_vectors,
                     (bottom_row + left) * tile.pixel_vectors, (bottom_row + right) * tile.pixel_vectors}};
    weights[slot][0] = rows[0] * sides[0] * point.mask;
    weights[slot][1] = rows[0] * sides[1] * point.mask;
    weights[slot][2] = rows[1] * sides[0] * point.mask;
    weights[slot][3] = rows[1] * sides[1] * point.mask;
    columns[slot] = column;
  }

 private:
  C10_DEVICE static void halve(bool has_first, bool has_second, T fraction, T (&weights)[2]) {
    const bool has_both = has_first && has_second;
    const T half = static_cast<T>(0.5) * (has_first ? 1 - fraction : fraction);
    weights[0] = has_both ? 1 - fraction : half;
    weights[1] = has_both ? fraction : half;
  }
};

// The data of a lane's point that are needed at the end. They wait in shared memory, since registers are scarce.
template <typename T>
struct KeptPoint : Fractions<T> {
  T mask;
  uint32_t image, place;
  uint8_t slot;
  bool valid;
  uint8_t corners;  // one bit for each corner inside the image

  KeptPoint() = default;
  C10_DEVICE KeptPoint(const Point<T>& point, uint32_t slot)
      : Fractions<T>(point),
        mask(point.mask),
        image(point.image),
        place(point.place),
        slot(slot),
        valid(point.valid),
        corners(0) {
    bool inside[4];
    corners_inside(point, inside);
    for (int k = 0; k < 4; ++k) {
      corners |= inside[k] << k;
    }
  }
};

// At the end the corners' dot products with the column's gradient overwrite the weights.
template <typename T>
struct WarpSamplesAndPoints : WarpSamples<T> {
  KeptPoint<T> points[kWarp];  // one for each lane
};

// Sums each of four values over kLanes lanes. Each quarter of the lanes returns one of the four sums; `lane` is the
// index of the lane among them.
template <int kLanes, typename T>
C10_DEVICE T sum_of_quarter(const T (&values)[4], uint32_t lane, const Threads& threads) {
  const bool high = lane & (kLanes / 2), odd = lane & (kLanes / 4);
  const T a = (high ? values[2] : values[0]) + threads.shuffle_xor(high ? values[0] : values[2], kLanes / 2);
  const T b = (high ? values[3] : values[1]) + threads.shuffle_xor(high ? values[1] : values[3], kLanes / 2);
  T sum = (odd ? b : a) + threads.shuffle_xor(odd ? a : b, kLanes / 4);
  for (int distance = kLanes / 8; distance > 0; distance /= 2) {
    sum += threads.shuffle_xor(sum, distance);
  }
  return sum;
}

// With kDots, computes the gradients of offset and mask from the gradient of the columns. With kBlend, then overwrites
// the columns with the samples. kLanes lanes share a sample; with kSingle each has at most one vector.
template <typename scalar_t, int kVector, int kLanes, bool kSingle, bool kDots, bool kBlend>
struct Columns {
  using T = compute_t<scalar_t>;
  using V = Vector<scalar_t, kVector>;

  static constexpr uint32_t kWarps = 8, kGroups = kWarp / kLanes;
  static constexpr uint32_t kResident = std::is_same_v<scalar_t, double> ? 2 : 4;
  static constexpr int kUnroll = kDots ? 1 : 2;  // samples at a time, to keep 5 or 8 loads in flight

  using WarpShared = std::conditional_t<kDots, WarpSamplesAndPoints<T>, WarpSamples<T>>;
  struct Shared {
    WarpShared warps[kWarps];
  };

  Tile<scalar_t, kVector> tile;
  T* grad_offset;  // [B, 2*G*K, H_out, W_out]; null if not needed
  T* grad_mask;    // [B, G*K, H_out, W_out]; null if not needed

  C10_HOST_DEVICE uint32_t blocks() const {
    return (tile.patches * tile.offset_groups.divisor * tile.taps.divisor + kWarps - 1) / kWarps;
  }

  C10_DEVICE void run(uint32_t block, Shared& shared, const Threads& threads) const {
    const uint32_t warp = opaque(threads.group);
    const Divided by_tap = divide(block * kWarps + warp, tile.taps);
    const Divided by_group = divide(by_tap.quotient, tile.offset_groups);
    const uint32_t tap = by_tap.rest, patch = by_group.quotient, offset_group = by_group.rest;
    if (patch >= tile.patches) return;
    run_warp(patch, offset_group, tap, shared.warps[warp], threads);
  }

  C10_DEVICE C10_ALWAYS_INLINE_ATTRIBUTE void run_warp(uint32_t patch, uint32_t offset_group, uint32_t tap,
                                                       WarpShared& own, const Threads& threads) const {
    const uint32_t lane = opaque(threads.lane);
    const Point<T> point = tile.locate(patch, lane, offset_group, tap);
    const uint32_t inside = threads.ballot(point.inside), slot = bits_set(inside & ((1u << lane) - 1));
    const uint32_t column = tile.column(point.position, tap), first_vector = offset_group * tile.offset_group_vectors;
    if (point.inside) own.put(slot, tile, point, column);
    if constexpr (kDots) own.points[lane] = KeptPoint<T>(point, slot);
    if constexpr (kBlend) fill_outside(point, column, first_vector, lane, threads);
    threads.sync_group();
    move(own, bits_set(inside), first_vector, lane, threads);
    if constexpr (kDots) {
      threads.sync_group();
      const KeptPoint<T> kept = own.points[lane];
      if (kept.valid) write_sampling(kept, own.weights[kept.slot], offset_group, tap);
    }
  }

 private:
  template <typename Samples>
  C10_DEVICE void move(Samples& own, uint32_t samples, uint32_t first_vector, uint32_t lane,
                       const Threads& threads) const {
    const uint32_t sub = lane % kLanes, group = lane / kLanes;
    const V* const input = tile.input + first_vector;
    const V* const first_pixel = opaque(input + sub);
    V* const first_column = opaque(tile.columns + tile.first_column(first_vector + sub));

    for (uint32_t i = group; i < samples + group; i += kGroups * kUnroll) {  // the same number of turns for each group
      typename Samples::Pixels pixels[kUnroll];
      T weights[kUnroll][4], dots[kUnroll][4] = {};
      uint32_t columns[kUnroll];
      bool live[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t sample = i + u * kGroups;
        live[u] = sample < samples;
        const uint32_t from = live[u] ? sample : samples - 1;
        pixels[u] = own.pixels[from];
        for (int k = 0; k < 4; ++k) {
          weights[u][k] = own.weights[from][k];
        }
        columns[u] = own.columns[from];
      }
      if (sub < tile.offset_group_vectors)
        move_vectors(first_pixel, first_column, pixels, weights, columns, live, dots);
      if constexpr (!kSingle) {
#pragma unroll 1
        for (uint32_t c = sub + kLanes; c < tile.offset_group_vectors; c += kLanes) {
          move_vectors(opaque(input + c), opaque(tile.columns + tile.first_column(first_vector + c)), pixels, weights,
                       columns, live, dots);
        }
      }
      if constexpr (kDots) {
        threads.sync_group();  // the weights have been read
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const T sum = sum_of_quarter<kLanes>(dots[u], sub, threads);
          if (live[u] && sub % (kLanes / 4) == 0) own.weights[i + u * kGroups][sub / (kLanes / 4)] = sum;
        }
      }
    }
  }

  // The same vector of channels of kUnroll samples.
  template <typename Pixels>
  C10_DEVICE C10_ALWAYS_INLINE_ATTRIBUTE void move_vectors(const V* pixel, V* column, const Pixels (&pixels)[kUnroll],
                                                           const T (&weights)[kUnroll][4],
                                                           const uint32_t (&columns)[kUnroll],
                                                           const bool (&live)[kUnroll], T (&dots)[kUnroll][4]) const {
    V corners[kUnroll][4], grads[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      for (int k = 0; k < 4; ++k) {
        corners[u][k] = load(element(pixel, pixels[u].at[k]));
      }
      if constexpr (kDots) grads[u] = load_once(element(column, columns[u]));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      T values[4][kVector];
      for (int k = 0; k < 4; ++k) {
        corners[u][k].unpack(values[k]);
      }
      if constexpr (kDots) {
        T grad[kVector];
        grads[u].unpack(grad);
        for (int v = 0; v < kVector; ++v) {
          for (int k = 0; k < 4; ++k) {
            dots[u][k] += grad[v] * values[k][v];
          }
        }
      }
      if constexpr (kBlend) {
        T blended[kVector];
        for (int v = 0; v < kVector; ++v) {
          blended[v] = weights[u][0] * values[0][v] + weights[u][1] * values[1][v] + weights[u][2] * values[2][v] +
                       weights[u][3] * values[3][v];
        }
        store_once_if(live[u], element(column, columns[u]), V::pack(blended));
      }
    }
  }

  // A sample outside its image is zero, or NaN if its coordinates or mask are.
  C10_DEVICE void fill_outside(const Point<T>& point, uint32_t own_column, uint32_t first_vector, uint32_t lane,
                               const Threads& threads) const {
    uint32_t rest = threads.ballot(point.valid && !point.inside);
    const T own_value = static_cast<T>(0) * point.mask + point.fy;
    while (rest) {
      const uint32_t from = lowest_bit(rest);
      rest &= rest - 1;
      const T value = threads.shuffle(own_value, from);
      const uint32_t column = threads.shuffle(own_column, from);
      T values[kVector];
      for (T& each : values) {
        each = value;
      }
      for (uint32_t c = lane; c < tile.offset_group_vectors; c += kWarp) {
        store_once(tile.columns + tile.first_column(first_vector + c) + column, V::pack(values));
      }
    }
  }

  C10_DEVICE void write_sampling(const KeptPoint<T>& point, const T (&dots)[4], uint32_t offset_group,
                                 uint32_t tap) const {
    T dot[4], weight[4];
    for (int k = 0; k < 4; ++k) {
      dot[k] = point.corners >> k & 1 ? dots[k] : 0;
    }
    point.weights(1, weight);
    const uint64_t plane =
        (uint64_t{point.image} * tile.offset_groups.divisor + offset_group) * tile.taps.divisor + tap;
    const uint64_t positions = tile.positions.divisor;
    if (grad_offset) {
      T* const target = grad_offset + 2 * plane * positions + point.place;
      target[0] = point.mask * point.derivative_y(dot);
      target[positions] = point.mask * point.derivative_x(dot);
    }
    if (grad_mask) {
      grad_mask[plane * positions + point.place] =
          weight[0] * dot[0] + weight[1] * dot[1] + weight[2] * dot[2] + weight[3] * dot[3];
    }
  }
};

}  // namespace mmdcn
