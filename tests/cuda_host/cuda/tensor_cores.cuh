// SPDX-License-Identifier: Apache-2.0
// The host's twin of csrc/cuda/tensor_cores.cuh: what its instructions do, and where the elements of their matrices
// lie, as the PTX ISA defines it. What is asynchronous is done at once or as late as it may, by the seed.
#pragma once

#include "device.cuh"

namespace mmdcn {

using __half = torch::headeronly::Half;
using __nv_bfloat16 = torch::headeronly::BFloat16;

constexpr uint32_t kSystemShared = 1024;  // bytes before those of the launch

inline uint32_t shared_address(const void* pointer) {
  return kSystemShared + static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - kernel_block.shared);
}

inline unsigned char* shared_at(uint32_t address, uint32_t bytes, uint32_t alignment) {
  const int64_t place = int64_t{address} - kSystemShared;
  if (place < 0 || place + bytes > kernel_block.shared_bytes) throw std::out_of_range("shared memory ends before this");
  check_alignment(kernel_block.shared + place, alignment);
  return kernel_block.shared + place;
}

template <typename V>
V load_shared_as(uint32_t address) {
  V value;
  std::memcpy(&value, shared_at(address, sizeof(V), sizeof(V)), sizeof(V));
  return value;
}

inline uint4 load_global(const void* pointer) { return load(static_cast<const uint4*>(pointer)); }
inline uint4 load_global_in_order(const void* pointer) { return load_global(pointer); }
inline uint4 load_shared(uint32_t address) { return load_shared_as<uint4>(address); }
inline float4 load_shared_float4(uint32_t address) { return load_shared_as<float4>(address); }
inline int32_t load_shared_int(uint32_t address) { return load_shared_as<int32_t>(address); }

template <typename V>
void store_shared(uint32_t address, V value) {
  std::memcpy(shared_at(address, sizeof(V), sizeof(V)), &value, sizeof(V));
}

inline void pin(uint32_t&) {}

inline uint32_t select_bytes(uint32_t word, uint32_t order) {
  uint32_t selected = 0;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t byte = order >> 4 * i & 7;
    if (byte < 4) selected |= (word >> 8 * byte & 0xff) << 8 * i;
  }
  return selected;
}

// Does it now or leaves it for later.
inline void begin(bool is_late, std::vector<std::function<void()>>& later, std::function<void()> work) {
  if (is_late) {
    later.push_back(std::move(work));
  } else {
    work();
  }
}

inline void finish(std::vector<std::function<void()>>& later) {
  for (const auto& work : std::exchange(later, {})) {
    work();
  }
}

// ---- Products of a warp

// One of the two numbers in a word.
template <typename scalar_t>
float number_of(uint32_t word, uint32_t which) {
  const uint16_t bits = word >> 16 * which;
  return std::bit_cast<scalar_t>(bits);
}

// Element [row, k] of the left operand [16, 16], of which each lane has four words.
template <typename scalar_t, typename Fragments>
float left_element(const Fragments& lanes, uint32_t row, uint32_t k) {
  return number_of<scalar_t>(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2);
}

// Where element `i` of the sum [16, columns] that a lane holds is.
inline uint32_t sum_row(uint32_t i) { return kernel_block.lane() / 4 + i / 2 % 2 * 8; }
inline uint32_t sum_column(uint32_t i) { return i / 4 * 8 + kernel_block.lane() % 4 * 2 + i % 2; }

template <typename scalar_t>
struct Pair {
  static float low(uint32_t word) { return number_of<scalar_t>(word, 0); }
  static float high(uint32_t word) { return number_of<scalar_t>(word, 1); }
  static uint32_t of(float low, float high) { return pack_pair<scalar_t>(low, high); }

  static void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b) { multiply(sum, {a0, a1, 0, 0}, b, 0); }

  static void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragments {
      uint32_t a[4], b[2];
    };
    const auto lanes = kernel_block.exchange("mma", Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    for (uint32_t i = 0; i < 4; ++i) {
      for (uint32_t k = 0; k < 16; ++k) {
        const float right = number_of<scalar_t>(lanes[sum_column(i) * 4 + k % 8 / 2].b[k / 8], k % 2);
        sum[i] += left_element<scalar_t>(lanes, sum_row(i), k) * right;
      }
    }
  }
};

inline void load_matrices(uint32_t (&v)[4], uint32_t address) {
  const auto rows = kernel_block.exchange("ldmatrix", load_shared_as<std::array<uint32_t, 4>>(address));
  for (uint32_t matrix = 0; matrix < 4; ++matrix) {
    v[matrix] = rows[matrix * 8 + kernel_block.lane() / 4][kernel_block.lane() % 4];
  }
}

// ---- Copies

template <int kBytes>
void copy_async(uint32_t target, const void* source) {
  check_alignment(source, kBytes);
  unsigned char* const to = shared_at(target, kBytes, kBytes);
  begin(kernel_block.late_copies, kernel_block.of_thread().copies.back(), [=] { std::memcpy(to, source, kBytes); });
}

inline void commit_copies() { kernel_block.of_thread().copies.emplace_back(); }

template <int kCount>
void wait_for_copies() {
  auto& groups = kernel_block.of_thread().copies;
  while (groups.size() > kCount + 1) {
    finish(groups.front());
    groups.erase(groups.begin());
  }
}

inline void init_barrier(uint32_t barrier, int32_t arrivals) {
  shared_at(barrier, 8, 8);
  kernel_block.barriers[barrier] = {arrivals, arrivals};
}

inline void fence_barriers() {}  // what one thread writes here, all see at once

inline void complete(Barrier& barrier, int32_t arrivals, int32_t bytes) {
  barrier.missing -= arrivals, barrier.bytes -= bytes;
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
  for (const uint32_t thread : std::exchange(barrier.sleeping, {})) {
    kernel_block.fibers->make_ready(thread);
  }
}

inline void arrive(uint32_t barrier) { complete(kernel_block.barriers.at(barrier), 1, 0); }

inline void arrive_expecting(uint32_t barrier, int32_t bytes) {
  complete(kernel_block.barriers.at(barrier), 1, -bytes);
}

inline void wait(uint32_t barrier, uint32_t parity) {
  Barrier& waited = kernel_block.barriers.at(barrier);
  finish(waited.copies);
  while (waited.phase % 2 == parity) {
    waited.sleeping.push_back(kernel_block.fibers->current());
    kernel_block.fibers->pause();
  }
}

inline void copy_bulk(uint32_t target, const void* source, int32_t bytes, uint32_t barrier) {
  check_alignment(source, 16);
  unsigned char* const to = shared_at(target, bytes, 16);
  Barrier& counting = kernel_block.barriers.at(barrier);
  begin(kernel_block.late_copies, counting.copies, [=, &counting] {
    std::memcpy(to, source, bytes);
    complete(counting, 0, bytes);
  });
  if (!counting.sleeping.empty()) finish(counting.copies);
}

// ---- Products of four warps

inline void fence_products() { kernel_block.of_thread().fenced = true; }

inline void commit_products() {
  Unfinished& own = kernel_block.of_thread();
  std::move(own.products.begin(), own.products.end(), std::back_inserter(own.committed_products));
  own.products.clear();
}

inline void wait_for_products() {
  finish(kernel_block.of_thread().committed_products);
  kernel_block.exchange("wait_for_products", true);  // those of the other lanes too
  kernel_block.of_thread().fenced = false;
}

// Element [k, column] of the right operand by its descriptor ("Matrix Descriptor Format", "Strides" for a matrix that
// is K-major): 8 rows of 128 bytes, one for each column, are swizzled together; bits 4 to 6 of an address are
// exclusive-ored with bits 7 to 9.
template <typename scalar_t>
float right_element(uint64_t descriptor, uint32_t k, uint32_t column) {
  const uint32_t first = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = first + column / 8 * stride + column % 8 * 128 + k * 2;
  return load_shared_as<scalar_t>(address ^ (address >> 7 & 7) << 4);
}

inline void check_descriptor(uint64_t descriptor) {
  const uint32_t first = (descriptor & 0x3fff) << 4;
  if (descriptor >> 62 != 1) throw std::invalid_argument("the descriptor is of another swizzle than that of 128 bytes");
  if ((descriptor >> 49 & 7) != 0 || first % 1024 >= 128) {
    throw std::invalid_argument("the matrix does not begin at a multiple of 1024 bytes");
  }
}

template <typename scalar_t, int kColumns>
void multiply(float (&sum)[kColumns / 2], const uint32_t* a, uint64_t descriptor) {
  struct Fragments {
    uint32_t a[4];
  };
  Unfinished& own = kernel_block.of_thread();
  if (!own.fenced) throw std::logic_error("products read registers that were written without a fence");
  check_descriptor(descriptor);
  begin(kernel_block.late_products, own.products, [&sum, a, descriptor] {
    const auto lanes = kernel_block.exchange("wgmma", Fragments{{a[0], a[1], a[2], a[3]}});
    for (uint32_t i = 0; i < kColumns / 2; ++i) {
      for (uint32_t k = 0; k < 16; ++k) {
        sum[i] += left_element<scalar_t>(lanes, sum_row(i), k) * right_element<scalar_t>(descriptor, k, sum_column(i));
      }
    }
  });
}

}  // namespace mmdcn
