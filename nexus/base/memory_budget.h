// memory_budget.h
// Owns:     the limit on the memory of all buffered bodies together (`body_memory`), shared by the worker threads.
// Promises: the sum of all shares never exceeds the limit; a share is given back when it is destroyed; a small body
//           writes to no memory that another thread uses, because each thread reserves steps of kStepBytes; a reserve
//           is never the reason of a refusal: a thread that finds no free memory takes the reserves of the others.
//           While memory is short, one client address gets a small part of what is left.
// Leaves:   the memory itself to buffer.h.
// Threads:  BodyBudget: all. ThreadBudget and BodyShare: one thread.
// Tested by: tests/memory_budget_test.cpp
#pragma once

#include <algorithm>
#include <array>
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
  std::size_t limit() const { return limit_.load(std::memory_order_relaxed); }
  std::size_t used() const { return used_.load(std::memory_order_relaxed); }  // with the threads' reserves
  // By bodies. Exact while no thread changes its reserve.
  std::size_t held() const {
    const std::size_t used = this->used();
    return used - std::min(used, reserved());
  }

 private:
  friend class ThreadBudget;
  struct alignas(64) Reserve {
    std::atomic<std::size_t> bytes{0};  // relaxed, as used_
  };
  static constexpr std::size_t kReserves = 256;  // more threads than that share them

  Reserve& join() { return reserves_[joined_.fetch_add(1, std::memory_order_relaxed) % kReserves]; }
  std::size_t threads() const { return std::min(joined_.load(std::memory_order_relaxed), kReserves); }
  std::size_t reserved() const {
    std::size_t sum = 0;
    for (std::size_t i = 0; i < threads(); ++i) sum += reserves_[i].bytes.load(std::memory_order_relaxed);
    return sum;
  }
  // Takes the reserves of all threads.
  std::size_t take_reserves() {
    std::size_t sum = 0;
    for (std::size_t i = 0; i < threads(); ++i) sum += reserves_[i].bytes.exchange(0, std::memory_order_relaxed);
    return sum;
  }

  std::atomic<std::size_t> limit_;
  alignas(64) std::atomic<std::size_t> used_{0};
  std::atomic<std::size_t> joined_{0};
  std::array<Reserve, kReserves> reserves_;
};

// The part of the budget that one thread has reserved, and how much of it each client address holds.
class ThreadBudget {
 public:
  static constexpr std::size_t kStepBytes = 256u << 10;  // holds many ordinary requests, and little per thread
  // While more than three quarters are held, one client address may hold this part of the limit per thread.
  static constexpr std::size_t kFairPart = 16;

  explicit ThreadBudget(BodyBudget& shared) : shared_(shared), reserve_(shared.join().bytes) {}
  ThreadBudget(const ThreadBudget&) = delete;
  ThreadBudget& operator=(const ThreadBudget&) = delete;
  ~ThreadBudget() {
    assert(std::all_of(held_by_.begin(), held_by_.end(), [](std::size_t bytes) { return bytes == 0; }));
    shared_.give_back(reserve_.exchange(0, std::memory_order_relaxed));
  }

  // For a body that holds `own` bytes. `client`: a hash of the client's address; addresses with the same remainder
  // share a part.
  bool take(std::size_t bytes, std::size_t client = 0, std::size_t own = 0) {
    if (!take_reserved(bytes) && !(is_fair(bytes, client, own) && take_shared(bytes))) return false;
    held_by_[client % kClients] += bytes;
    return true;
  }
  // Keeps up to two steps, so that bodies that come and go do not touch the shared budget.
  void give_back(std::size_t bytes, std::size_t client = 0) {
    assert(held_by_[client % kClients] >= bytes);
    held_by_[client % kClients] -= bytes;
    const std::size_t reserve = reserve_.fetch_add(bytes, std::memory_order_relaxed) + bytes;
    if (reserve > 2 * kStepBytes && take_reserved(reserve - kStepBytes)) shared_.give_back(reserve - kStepBytes);
  }

  // False if a body of `bytes` would be refused now. Takes nothing.
  bool has_room(std::size_t bytes) const {
    const std::size_t held = shared_.held(), limit = shared_.limit();
    return held <= limit && bytes <= limit - held;
  }
  std::size_t held_by(std::size_t client) const { return held_by_[client % kClients]; }

 private:
  static constexpr std::size_t kClients = 1024;

  bool take_reserved(std::size_t bytes) {
    std::size_t reserve = reserve_.load(std::memory_order_relaxed);
    while (reserve >= bytes) {
      if (reserve_.compare_exchange_weak(reserve, reserve - bytes, std::memory_order_relaxed)) return true;
    }
    return false;
  }

  // True if the body may grow by `bytes`. The last quarter is for clients that hold little of it; a client's only body
  // may use all but a part; a body that nobody shares the memory with may use all of it.
  bool is_fair(std::size_t bytes, std::size_t client, std::size_t own) const {
    const std::size_t limit = shared_.limit(), part = limit / kFairPart, held = shared_.held();
    if (held + bytes <= limit / 4 * 3 || held_by(client) + bytes <= part || held <= own) return true;
    return held_by(client) == own && held + bytes <= limit - part;
  }

  // Takes the missing bytes from the shared budget: a whole step if there is one, else from the other reserves too.
  [[gnu::noinline]] bool take_shared(std::size_t bytes) {
    std::size_t own = reserve_.exchange(0, std::memory_order_relaxed);
    const std::size_t missing = bytes - std::min(bytes, own), step = std::max(missing, kStepBytes);
    if (shared_.take(step)) {
      own += step;
    } else if (shared_.take(missing)) {
      own += missing;
    } else {
      own += shared_.take_reserves();
      if (own < bytes && shared_.take(bytes - own)) own = bytes;
    }
    const bool enough = own >= bytes;
    if (enough) own -= bytes;
    reserve_.fetch_add(own, std::memory_order_relaxed);
    return enough;
  }

  BodyBudget& shared_;
  std::atomic<std::size_t>& reserve_;            // held by no share; other threads may take it
  std::array<std::size_t, kClients> held_by_{};  // bytes of shares, by client address
};

// One body's share of the budget.
class BodyShare {
 public:
  BodyShare() = default;
  BodyShare(const BodyShare&) = delete;
  BodyShare& operator=(const BodyShare&) = delete;
  ~BodyShare() { give_back(); }

  // Grows the share to `bytes` in total, for `client` as in ThreadBudget::take(). False, with the share unchanged, if
  // the budget has not enough left.
  bool grow_to(ThreadBudget& budget, std::size_t bytes, std::size_t client = 0) {
    if (bytes <= bytes_) return true;
    assert(bytes_ == 0 || client == client_);
    if (!budget.take(bytes - bytes_, client, bytes_)) return false;
    budget_ = &budget;
    client_ = client;
    bytes_ = bytes;
    return true;
  }
  void give_back() {
    if (bytes_ > 0) budget_->give_back(std::exchange(bytes_, 0), client_);
  }
  // Takes over what `other` has.
  void take_over(BodyShare& other) {
    give_back();
    budget_ = other.budget_;
    client_ = other.client_;
    bytes_ = std::exchange(other.bytes_, 0);
  }

 private:
  ThreadBudget* budget_ = nullptr;
  std::size_t client_ = 0;
  std::size_t bytes_ = 0;
};

}  // namespace nexus
