// hash.h
// Owns:      the hash finaliser of splitmix64, and the random sequence that it makes.
// Promises:  the same input gives the same number on every machine. Not for secrets.
// Leaves:    choosing seeds to the callers.
// Threads:   pure functions.
// Tested by: tests/router_test.cpp
#pragma once

#include <cstdint>

namespace nexus {

// Spreads every bit of `x` over the whole result; 0 stays 0.
constexpr std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// The n-th number of the random sequence that starts at `seed`.
constexpr std::uint64_t random_at(std::uint64_t seed, std::uint64_t n) {
  return mix(seed + (n + 1) * 0x9e3779b97f4a7c15);
}

}  // namespace nexus
