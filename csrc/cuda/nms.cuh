// SPDX-License-Identifier: Apache-2.0
// Note: [NMS on CUDA]
//
// The boxes are sorted by score. One bit for each pair tells whether the first box overlaps the second by more than the
// threshold; all bits are computed in parallel. Whether a box is kept depends on all boxes before it, so a single
// thread block processes them, 64 at a time: one thread finds which of the 64 are kept, then all threads mark the later
// boxes that the kept ones suppress.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace mmdcn {

constexpr int64_t kWordBits = 64;

template <typename T>
struct Pairs {
  const T* boxes;  // [N, 4]
  int64_t count, words;
  T threshold, offset;

  C10_HOST_DEVICE static T larger(T a, T b) { return a < b ? b : a; }
  C10_HOST_DEVICE static T smaller(T a, T b) { return b < a ? b : a; }

  C10_HOST_DEVICE bool overlap(int64_t i, int64_t j) const {
    const T *a = boxes + 4 * i, *b = boxes + 4 * j;
    const T width = smaller(a[2], b[2]) - larger(a[0], b[0]) + offset;
    const T height = smaller(a[3], b[3]) - larger(a[1], b[1]) + offset;
    const T intersection = larger(0, width) * larger(0, height);
    const T areas = (a[2] - a[0] + offset) * (a[3] - a[1] + offset) + (b[2] - b[0] + offset) * (b[3] - b[1] + offset);
    return intersection > threshold * (areas - intersection);
  }
};

// Sets bit j % 64 of word j / 64 of row i if box i overlaps a later box j. Words before the diagonal are not written.
template <typename T>
struct FindOverlaps {
  static constexpr uint32_t kResident = 0;
  static constexpr int64_t kRows = 256;

  struct Shared {};
  struct Block {
    int64_t row, word;
  };

  Pairs<T> pairs;
  uint64_t* overlaps;  // [N, words]

  C10_HOST_DEVICE uint32_t max_lanes() const { return 32; }
  C10_HOST_DEVICE int64_t row_blocks() const { return (pairs.count + kRows - 1) / kRows; }
  C10_HOST_DEVICE uint32_t blocks() const { return static_cast<uint32_t>(row_blocks() * pairs.words); }
  C10_HOST_DEVICE Block block(uint32_t index) const {
    return {index % row_blocks() * kRows, static_cast<int64_t>(index / row_blocks())};
  }

  template <typename Threads>
  C10_HOST_DEVICE void run(const Block& at, Shared&, const Threads& threads) const {
    const int64_t first = at.word * kWordBits;
    const int64_t end = first + kWordBits < pairs.count ? first + kWordBits : pairs.count;
    const int64_t last_row = at.row + kRows < end ? at.row + kRows : end;
    for (int64_t i = at.row + threads.index(); i < last_row; i += threads.count()) {
      uint64_t bits = 0;
      for (int64_t j = i < first ? first : i + 1; j < end; ++j) {
        bits |= static_cast<uint64_t>(pairs.overlap(i, j)) << (j - first);
      }
      overlaps[i * pairs.words + at.word] = bits;
    }
  }
};

// Runs as one block.
struct KeepBest {
  static constexpr uint32_t kResident = 0;

  struct Shared {
    uint64_t overlaps[kWordBits];
    uint64_t kept;
  };

  const uint64_t* overlaps;  // [N, words]
  uint64_t* suppressed;      // [words], zero at first
  bool* kept;                // [N]
  int64_t count, words;

  C10_HOST_DEVICE uint32_t max_lanes() const { return 32; }
  C10_HOST_DEVICE uint32_t blocks() const { return 1; }
  C10_HOST_DEVICE int64_t block(uint32_t) const { return 0; }

  template <typename Threads>
  C10_HOST_DEVICE void run(int64_t, Shared& shared, const Threads& threads) const {
    for (int64_t word = 0; word < words; ++word) {
      const int64_t first = word * kWordBits, own = count - first < kWordBits ? count - first : kWordBits;
      for (int64_t i = threads.index(); i < own; i += threads.count()) {
        shared.overlaps[i] = overlaps[(first + i) * words + word];
      }
      threads.sync();
      if (threads.index() == 0) shared.kept = keep(shared.overlaps, own, suppressed[word]);
      threads.sync();
      for (int64_t i = threads.index(); i < own; i += threads.count()) {
        kept[first + i] = shared.kept >> i & 1;
      }
      for (int64_t later = word + 1 + threads.index(); later < words; later += threads.count()) {
        suppress(first, own, shared.kept, later);
      }
      threads.sync();
    }
  }

 private:
  C10_HOST_DEVICE static uint64_t keep(const uint64_t (&rows)[kWordBits], int64_t own, uint64_t gone) {
    uint64_t bits = 0;
    for (int64_t i = 0; i < own; ++i) {
      if (gone >> i & 1) continue;
      bits |= uint64_t{1} << i, gone |= rows[i];
    }
    return bits;
  }

  C10_HOST_DEVICE void suppress(int64_t first, int64_t own, uint64_t bits, int64_t later) const {
    uint64_t gone = suppressed[later];
    for (int64_t i = 0; i < own; ++i) {
      if (bits >> i & 1) gone |= overlaps[(first + i) * words + later];
    }
    suppressed[later] = gone;
  }
};

}  // namespace mmdcn
