// dice.h
// Owns:     randomness: the stream of random numbers of one seed (splitmix64), and what is drawn from it.
// Promises: the same seed gives the same draws on every machine.
// Leaves:   what the draws mean to the callers.
// Threads:  one.
// Tested by: tests/sim/main.cpp
#pragma once

#include <bit>
#include <cassert>
#include <cstdint>
#include <string>
#include <string_view>

#include "nexus/base/clock.h"
#include "nexus/base/text.h"

namespace nexus::sim {

// A hash of a text.
constexpr std::uint64_t digest(std::string_view text) {
  std::uint64_t sum = text.size();
  for (; text.size() >= 8; text.remove_prefix(8)) {
    std::uint64_t eight = 0;
    for (std::size_t i = 0; i < 8; ++i) eight |= std::uint64_t{static_cast<unsigned char>(text[i])} << (8 * i);
    sum = (sum ^ eight) * 0x9e3779b97f4a7c15;
    sum ^= sum >> 29;
  }
  for (const char c : text) sum = (sum ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return sum;
}

// How often something happens, in parts of 65536, so that a draw costs one shift and one comparison.
struct Rate {
  std::uint32_t parts = 0;
  bool never() const { return parts == 0; }
};
constexpr Rate per_mille(std::uint32_t n) { return Rate{(n * 65536 + 999) / 1000}; }

class Dice {
 public:
  explicit Dice(std::uint64_t seed) : state_(mix(seed + 0x9e3779b97f4a7c15)) {}

  std::uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15); }
  // 0 … n-1
  std::uint64_t below(std::uint64_t n) {
    assert(n > 0);
    return static_cast<std::uint64_t>(static_cast<unsigned __int128>(next()) * n >> 64);
  }
  std::size_t index(std::size_t n) { return static_cast<std::size_t>(below(n)); }
  std::uint32_t number(std::uint32_t low, std::uint32_t high) {
    return low + static_cast<std::uint32_t>(below(std::uint64_t{high} - low + 1));
  }
  Ns span(Ns low, Ns high) { return low + static_cast<Ns>(below(static_cast<std::uint64_t>(high - low) + 1)); }
  // Draws a magnitude first, then a number of that magnitude: small numbers are as likely as large ones.
  std::uint32_t skewed(std::uint32_t low, std::uint32_t high) {
    const auto bits = static_cast<unsigned>(std::bit_width(high - low));
    const std::uint32_t most = bits == 0 ? 0 : number(0, bits) == bits ? high - low : (1u << number(0, bits - 1));
    return low + number(0, most < high - low ? most : high - low);
  }
  bool chance(Rate rate) { return rate.parts != 0 && (next() >> 48) < rate.parts; }
  bool one_in(std::uint32_t n) { return below(n) == 0; }

 private:
  std::uint64_t state_;
};

// Text without quotes and control characters, long enough that no two pieces of it are alike.
inline std::string_view pattern() {
  static const std::string text = [] {
    constexpr std::size_t kBytes = 512u << 10;
    std::string made;
    for (std::size_t i = 0; i < kBytes; ++i) {
      made += "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"[mix(i) % 64];
    }
    return made;
  }();
  return text;
}

// The piece of the pattern that belongs to `number`.
inline std::string_view pattern_of(std::uint64_t number, std::size_t bytes) {
  const std::size_t half = pattern().size() / 2;
  return pattern().substr(mix(number) % half, bytes < half ? bytes : half);
}

}  // namespace nexus::sim
