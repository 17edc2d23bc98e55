// random.h
// Owns:     a generator of random numbers: xorshift64*.
// Promises: next() is never 0; the same seed gives the same numbers.
// Leaves:   secrets to a library: who has seen a number can tell the next.
// Threads:  one.
// Tested by: tests/trace_context_test.cpp
#pragma once

#include <cstdint>

namespace nexus {

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed | 1) {}
  std::uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 2685821657736338717ull;
  }

 private:
  std::uint64_t state_;
};

}  // namespace nexus
