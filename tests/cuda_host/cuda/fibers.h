// SPDX-License-Identifier: Apache-2.0
// One block at a time. Its threads are fibers, of which one runs until it waits for others: for its group where they
// exchange values, for the block at a barrier. Which goes on then is drawn at random, so that a result that depends on
// it, as where a barrier is missing, changes with the seed. What a GPU does not forgive is an error: an unaligned
// vector, lanes of a warp that wait for each other at different places.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace mmdcn {

constexpr uint32_t kWarp = 32;

inline uint32_t host_seed() {
  const char* const seed = std::getenv("MMDCN_HOST_SEED");
  return seed ? std::atoi(seed) : 0;
}

inline void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  throw std::runtime_error("a vector of " + std::to_string(bytes) + " bytes is not at a multiple of its size");
}

// The threads of a block.
class Fibers {
 public:
  Fibers(uint32_t lanes, uint32_t groups)
      : lanes_(lanes),
        groups_(groups),
        fibers_(lanes * groups),
        random_(host_seed()),
        stacks_(new char[fibers_.size() * kStack]) {}

  // Calls body(lane, group) in each thread.
  template <typename Body>
  void run(const Body& body) {
    call_ = [](const void* of, uint32_t lane, uint32_t group) { (*static_cast<const Body*>(of))(lane, group); };
    body_ = &body;
    ready_.clear();
    left_ = fibers_.size();
    at_barrier_ = 0;
    std::fill(groups_.begin(), groups_.end(), Group());
    for (uint32_t i = 0; i < fibers_.size(); ++i) {
      fibers_[i].done = false;
      make_ready(i);
    }
    while (left_ > 0 && !error_) {
      if (ready_.empty()) throw std::logic_error("threads of a block wait for each other at different places");
      run_group(random_() % ready_.size());
    }
    if (error_) std::rethrow_exception(error_);
  }

  void wait_for_block() {
    if (++at_barrier_ == left_) release_block();
    pause();
  }

  // Gives what each lane of the group has given.
  template <typename T>
  std::array<T, kWarp> exchange(uint32_t lane, uint32_t group, const char* place, T value) {
    Group& own = groups_[group];
    if (own.waiting > 0 && own.place != place) throw std::logic_error("lanes of a warp wait at different places");
    own.place = place;
    auto& values = own.values[own.turn];  // of two, since a lane may go on to the next exchange before others read
    static_assert(sizeof(T) <= sizeof(values[0]));
    std::memcpy(&values[lane], &value, sizeof(T));
    if (++own.waiting == lanes_) {
      own.waiting = 0;
      own.turn = 1 - own.turn;
      for (uint32_t i = 0; i < lanes_; ++i) {
        make_ready(group * lanes_ + i);
      }
    }
    pause();
    std::array<T, kWarp> given;
    for (uint32_t i = 0; i < lanes_; ++i) {
      std::memcpy(&given[i], &values[i], sizeof(T));
    }
    return given;
  }

  uint32_t current() const { return current_; }

  // Runs others until one makes this one ready.
  void pause() {
    if (_setjmp(fibers_[current_].place) == 0) _longjmp(scheduler_, 1);
  }

  void make_ready(uint32_t fiber) {
    Group& group = groups_[fiber / lanes_];
    if (group.ready.empty()) ready_.push_back(fiber / lanes_);
    group.ready.push_back(fiber);
  }

 private:
  static constexpr size_t kStack = 64 << 10;

  struct Fiber {
    jmp_buf place;
    bool started = false, done = false;
  };

  struct Group {
    std::vector<uint32_t> ready;
    uint32_t waiting = 0, turn = 0;
    const char* place = nullptr;
    std::array<std::array<std::array<uint64_t, 3>, kWarp>, 2> values;
  };

  // Runs lanes of a group, in any order, until all wait.
  void run_group(uint32_t index) {
    const uint32_t group = ready_[index];
    std::swap(ready_[index], ready_.back());
    ready_.pop_back();
    std::vector<uint32_t> lanes;
    std::swap(lanes, groups_[group].ready);
    std::shuffle(lanes.begin(), lanes.end(), random_);
    for (const uint32_t i : lanes) {
      if (error_) return;
      current_ = i;
      if (_setjmp(scheduler_) == 0) resume(fibers_[i]);
    }
  }

  void resume(Fiber& fiber) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack = {stacks_.get() + current_ * kStack, 0, kStack};
    const uintptr_t self = reinterpret_cast<uintptr_t>(this);
    makecontext(&context, reinterpret_cast<void (*)()>(&Fibers::live), 2, static_cast<uint32_t>(self),
                static_cast<uint32_t>(self >> 32));
    setcontext(&context);
  }

  static void live(uint32_t low, uint32_t high) {
    Fibers& fibers = *reinterpret_cast<Fibers*>(uintptr_t{low} | uintptr_t{high} << 32);
    const uint32_t self = fibers.current_, lane = self % fibers.lanes_, group = self / fibers.lanes_;
    while (true) {
      try {
        fibers.call_(fibers.body_, lane, group);
      } catch (...) {
        fibers.error_ = std::current_exception();
      }
      fibers.fibers_[self].done = true;
      if (--fibers.left_ > 0 && fibers.at_barrier_ == fibers.left_) fibers.release_block();
      fibers.pause();
    }
  }

  void release_block() {
    at_barrier_ = 0;
    for (uint32_t i = 0; i < fibers_.size(); ++i) {
      if (!fibers_[i].done) make_ready(i);
    }
  }

  uint32_t lanes_;
  std::vector<Group> groups_;
  std::vector<Fiber> fibers_;
  std::mt19937 random_;
  std::unique_ptr<char[]> stacks_;
  std::vector<uint32_t> ready_;  // groups that have a lane to run
  uint32_t left_ = 0, at_barrier_ = 0, current_ = 0;
  jmp_buf scheduler_;
  std::exception_ptr error_;
  void (*call_)(const void*, uint32_t, uint32_t) = nullptr;
  const void* body_ = nullptr;
};

struct Threads {
  uint32_t lane, lanes, group, groups;
  Fibers& fibers;

  uint32_t index() const { return group * lanes + lane; }
  uint32_t count() const { return groups * lanes; }
  void sync() const { fibers.wait_for_block(); }

  void sync_group() const { exchange("sync_group", true); }

  uint32_t ballot(bool vote) const {
    const std::array<bool, kWarp> votes = exchange("ballot", vote);
    uint32_t word = 0;
    for (uint32_t i = 0; i < lanes; ++i) {
      word |= static_cast<uint32_t>(votes[i]) << i;
    }
    return word;
  }

  template <typename T>
  T sum(T value) const {
    const std::array<T, kWarp> values = exchange("sum", value);
    return std::accumulate(values.begin(), values.begin() + lanes, static_cast<T>(0));
  }

  template <typename T>
  T shuffle(T value, uint32_t from) const {
    return exchange("shuffle", value)[from % kWarp];
  }
  template <typename T>
  T shuffle_xor(T value, uint32_t distance) const {
    return exchange("shuffle_xor", value)[lane ^ distance];
  }

  template <typename T>
  T shuffle_up(T value, uint32_t distance) const {
    return exchange("shuffle_up", value)[lane < distance ? lane : lane - distance];
  }

  template <typename T, int kCount>
  void add(T* target, const T (&values)[kCount]) const {
    if (kCount % 4 == 0) check_alignment(target, 4 * sizeof(float));
    for (int i = 0; i < kCount; ++i) {
      target[i] += values[i];
    }
  }

  uint32_t increment(uint32_t* target, uint32_t by = 1) const { return std::exchange(*target, *target + by); }
  uint32_t compare_and_exchange(uint32_t* target, uint32_t expected, uint32_t value) const {
    return *target == expected ? std::exchange(*target, value) : *target;
  }

 private:
  template <typename T>
  std::array<T, kWarp> exchange(const char* place, T value) const {
    return fibers.exchange(lane, group, place, value);
  }
};

// Calls begin(block, fibers), then run(block, threads) in each of its threads, for all blocks in any order.
template <typename Begin, typename Run>
void run_blocks(uint32_t blocks, uint32_t lanes, uint32_t groups, const Begin& begin, const Run& run) {
  Fibers fibers(lanes, groups);
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(host_seed()));
  for (const uint32_t block : order) {
    begin(block, fibers);
    fibers.run([&](uint32_t lane, uint32_t group) { run(block, Threads{lane, lanes, group, groups, fibers}); });
  }
}

}  // namespace mmdcn
