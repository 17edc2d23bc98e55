// key_limits.h
// Owns:     a key's limits of requests and of tokens a minute: what is left of each, and when more is.
// Promises: over all threads no more is taken than the limit; a request is charged when it is admitted, and what it has
//           used is put right at its end, so that one request can pass the limit, and the next ones wait for that. No
//           lock: one compare-and-swap to take, one addition to put right.
// Leaves:   the response that says so to proxy/client_key.h; the numbers to api_keys_file.
// Threads:  any.
// Tested by: tests/key_limits_test.cpp
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "nexus/base/clock.h"

namespace nexus {

// A bucket that holds one minute's worth of its limit. Its only number is the time at which it would be full again
// (the generic cell rate algorithm), so that it means the same share of another limit after a reload.
class MinuteBucket {
 public:
  static constexpr Ns kSpan = 60 * kSecond;

  // Takes `amount` of `limit` a minute. Returns 0 if it was taken, else after how long it can be. More than the whole
  // bucket is taken if the bucket is full.
  Ns take(Ns now, std::uint64_t limit, std::uint64_t amount) {
    const Ns span = span_of(amount, limit);
    Ns full_at = full_at_.load(std::memory_order_relaxed);
    for (;;) {
      const Ns from = std::max(full_at, now);
      const Ns wait = std::min(from + span - kSpan, from) - now;
      if (wait > 0) return wait;
      // Relaxed: the number alone is shared.
      if (full_at_.compare_exchange_weak(full_at, from + span, std::memory_order_relaxed)) return 0;
    }
  }

  // `taken` was taken, and `used` is what should have been.
  void settle(std::uint64_t limit, std::uint64_t taken, std::uint64_t used) {
    full_at_.fetch_add(span_of(used, limit) - span_of(taken, limit), std::memory_order_relaxed);
  }

  std::uint64_t left(Ns now, std::uint64_t limit) const {
    const Ns owed = full_in(now);
    if (owed >= kSpan) return 0;
    return static_cast<std::uint64_t>(
        static_cast<double>(kSpan - owed) / static_cast<double>(kSpan) * static_cast<double>(limit) + 1e-6);
  }
  Ns full_in(Ns now) const { return std::max<Ns>(full_at_.load(std::memory_order_relaxed) - now, 0); }

 private:
  // The time in which `amount` comes in again; of an amount beyond belief, an hour.
  static Ns span_of(std::uint64_t amount, std::uint64_t limit) {
    const double span = static_cast<double>(amount) * static_cast<double>(kSpan) / static_cast<double>(limit);
    return static_cast<Ns>(std::min(span, static_cast<double>(60 * kSpan)));
  }

  std::atomic<Ns> full_at_{0};
};

}  // namespace nexus
