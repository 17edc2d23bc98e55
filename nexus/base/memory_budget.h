// memory_budget.h
// Owns:     the limit on the memory of all buffered bodies together (`body_memory`), shared by the worker threads.
// Promises: the sum of all shares never exceeds the limit; a share is given back when it is destroyed; a small body
//           writes to no memory that another thread writes, because each thread reserves steps of kStepBytes.
// Leaves:   the memory itself to buffer.h.
// Threads:  BodyBudget: all. ThreadBudget and BodyShare: one thread.
// Tested by: tests/memory_budget_test.cpp
#pragma once

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstddef>
#include <utility>

namespace nexus {

class BodyBudget {
 public:
  explicit BodyBudget(std::size_t limit_bytes) : limit_(limit_bytes) {}

  // For a reload. Memory that is held stays held, even if it exceeds the new limit.
  void set_limit(std::size_t bytes) { limit_.store(bytes, std::memory_order_relaxed); }

  // Takes `bytes` if they are free. Relaxed: the number publishes no other memory.
  bool take(std::size_t bytes) {
    std::size_t used = used_.load(std::memory_order_relaxed);
    do {
      const std::size_t limit = limit_.load(std::memory_order_relaxed);
      if (used > limit || bytes > limit - used) return false;
    } while (!used_.compare_exchange_weak(used, used + bytes, std::memory_order_relaxed));
    return true;
  }
  void give_back(std::size_t bytes) {
    [[maybe_unused]] const std::size_t before = used_.fetch_sub(bytes, std::memory_order_relaxed);
    assert(before >= bytes);
  }
  std::size_t used() const { return used_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::size_t> limit_;
  alignas(64) std::atomic<std::size_t> used_{0};
};

// The part of the budget that one thread has reserved.
class ThreadBudget {
 public:
  static constexpr std::size_t kStepBytes = 256u << 10;  // holds many ordinary requests, and little per thread

  explicit ThreadBudget(BodyBudget& shared) : shared_(shared) {}
  ThreadBudget(const ThreadBudget&) = delete;
  ThreadBudget& operator=(const ThreadBudget&) = delete;
  ~ThreadBudget() { shared_.give_back(spare_); }

  bool take(std::size_t bytes) {
    if (bytes > spare_) {
      const std::size_t missing = bytes - spare_;
      const std::size_t step = std::max(missing, kStepBytes);
      if (shared_.take(step)) {
        spare_ += step;
      } else if (shared_.take(missing)) {
        spare_ += missing;
      } else {
        return false;
      }
    }
    spare_ -= bytes;
    return true;
  }
  // Keeps up to two steps, so that bodies that come and go do not touch the shared budget.
  void give_back(std::size_t bytes) {
    spare_ += bytes;
    if (spare_ <= 2 * kStepBytes) return;
    shared_.give_back(spare_ - kStepBytes);
    spare_ = kStepBytes;
  }

 private:
  BodyBudget& shared_;
  std::size_t spare_ = 0;  // reserved, but held by no share
};

// One body's share of the budget.
class BodyShare {
 public:
  BodyShare() = default;
  BodyShare(const BodyShare&) = delete;
  BodyShare& operator=(const BodyShare&) = delete;
  ~BodyShare() { give_back(); }

  // Grows the share to `bytes` in total. False, with the share unchanged, if the budget has not enough left.
  bool grow_to(ThreadBudget& budget, std::size_t bytes) {
    if (bytes <= bytes_) return true;
    if (!budget.take(bytes - bytes_)) return false;
    budget_ = &budget;
    bytes_ = bytes;
    return true;
  }
  void give_back() {
    if (bytes_ > 0) budget_->give_back(std::exchange(bytes_, 0));
  }
  // Takes over what `other` has.
  void take_over(BodyShare& other) {
    give_back();
    budget_ = other.budget_;
    bytes_ = std::exchange(other.bytes_, 0);
  }

 private:
  ThreadBudget* budget_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace nexus
