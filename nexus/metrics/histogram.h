// histogram.h
// Owns:     the bucket bounds of every histogram family, and a histogram of integer cells.
// Promises: observe() is two plain adds and finds its bucket without a loop over the bounds; the count is the sum of
//           the buckets, so no reader can catch the two apart. Values are integers (ns or tokens), sums are exact.
// Leaves:   how bounds and sums are written to prometheus.h.
// Threads:  observe(): the owning thread alone. add_to(): any thread.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "nexus/base/clock.h"
#include "nexus/metrics/counters.h"

namespace nexus {

enum class Unit : std::uint8_t { seconds, tokens };  // of the exposition; values and bounds inside are ns or tokens

template <std::size_t N>
struct Bounds {
  Unit unit;
  std::array<std::int64_t, N> upper;  // ascending; a value equal to a bound belongs to its bucket
};

namespace detail {
constexpr Ns kUs = kMicrosecond;
constexpr Ns kMs = kMillisecond;
}  // namespace detail

inline constexpr Bounds<11> kDurationBounds{
    Unit::seconds,
    {100 * detail::kMs, 250 * detail::kMs, 500 * detail::kMs, kSecond, 2500 * detail::kMs, 5 * kSecond, 10 * kSecond,
     30 * kSecond, 60 * kSecond, 120 * kSecond, 300 * kSecond}};

inline constexpr Bounds<12> kTokenBounds{Unit::tokens,
                                         {10, 50, 100, 500, 1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000}};

// A cold model load takes minutes, hence the long tail.
inline constexpr Bounds<21> kFirstTokenBounds{
    Unit::seconds,
    {1 * detail::kMs,    5 * detail::kMs,   10 * detail::kMs,   20 * detail::kMs,  40 * detail::kMs,  60 * detail::kMs,
     80 * detail::kMs,   100 * detail::kMs, 250 * detail::kMs,  500 * detail::kMs, 750 * detail::kMs, kSecond,
     2500 * detail::kMs, 5 * kSecond,       7500 * detail::kMs, 10 * kSecond,      20 * kSecond,      40 * kSecond,
     80 * kSecond,       160 * kSecond,     640 * kSecond}};

inline constexpr Bounds<14> kPerTokenBounds{
    Unit::seconds,
    {1 * detail::kMs, 2500 * detail::kUs, 5 * detail::kMs, 10 * detail::kMs, 25 * detail::kMs, 50 * detail::kMs,
     75 * detail::kMs, 100 * detail::kMs, 150 * detail::kMs, 200 * detail::kMs, 300 * detail::kMs, 500 * detail::kMs,
     kSecond, 2500 * detail::kMs}};

inline constexpr Bounds<12> kOverheadBounds{
    Unit::seconds,
    {10 * detail::kUs, 25 * detail::kUs, 50 * detail::kUs, 100 * detail::kUs, 250 * detail::kUs, 500 * detail::kUs,
     1 * detail::kMs, 2500 * detail::kUs, 5 * detail::kMs, 10 * detail::kMs, 50 * detail::kMs, 100 * detail::kMs}};

inline constexpr Bounds<12> kLoopStallBounds{
    Unit::seconds,
    {100 * detail::kUs, 250 * detail::kUs, 500 * detail::kUs, 1 * detail::kMs, 2500 * detail::kUs, 5 * detail::kMs,
     10 * detail::kMs, 25 * detail::kMs, 50 * detail::kMs, 100 * detail::kMs, 500 * detail::kMs, kSecond}};

namespace detail {

// Finds a bucket by the value's width in bits: all bounds below that power of two are passed at once, and the few
// within it are compared side by side. A linear search costs a mispredicted branch a histogram.
template <std::size_t N>
struct BucketFinder {
  static constexpr std::size_t kWidths = 65;
  std::array<std::uint8_t, kWidths> passed{};  // by bit width: how many bounds lie below every such value
  std::array<std::int64_t, N + 8> upper{};     // padded, so that a compare past the last bound is false
  std::size_t compares = 0;                    // the most bounds that share one bit width

  constexpr explicit BucketFinder(const Bounds<N>& bounds) {
    static_assert(N < 256);
    upper.fill(INT64_MAX);
    std::copy(bounds.upper.begin(), bounds.upper.end(), upper.begin());
    for (std::size_t width = 1; width < kWidths - 1; ++width) {
      const std::int64_t least = std::int64_t{1} << (width - 1);
      std::size_t below = 0, within = 0;
      for (std::int64_t bound : bounds.upper) {
        if (bound < least) {
          ++below;
        } else if (static_cast<std::size_t>(std::bit_width(static_cast<std::uint64_t>(bound))) == width) {
          ++within;
        }
      }
      passed[width] = static_cast<std::uint8_t>(below);
      compares = std::max(compares, within);
    }
  }
};

}  // namespace detail

// The index of the bucket that `value` belongs to: the number of bounds that it exceeds.
template <const auto& kBounds>
[[gnu::always_inline]] inline std::size_t bucket_of(std::int64_t value) {
  static constexpr detail::BucketFinder kFinder(kBounds);
  static_assert(kFinder.compares >= 1 && kFinder.compares <= 4 && kBounds.upper[0] >= 1);
  assert(value >= 0);
  const auto width = static_cast<std::size_t>(std::bit_width(static_cast<std::uint64_t>(value | 1)));  // 0 as 1
  const std::size_t start = kFinder.passed[width];
  return [&]<std::size_t... i>(std::index_sequence<i...>) {
    return (start + ... + static_cast<std::size_t>(value > kFinder.upper[start + i]));
  }
  (std::make_index_sequence<kFinder.compares>{});
}

// What a reader adds up from the threads' histograms: plain numbers.
template <const auto& kBounds>
struct HistogramValues {
  static constexpr std::size_t kBuckets = kBounds.upper.size() + 1;  // the last one is +Inf
  std::array<std::uint64_t, kBuckets> buckets{};                     // not cumulative
  std::uint64_t sum = 0;

  std::uint64_t count() const {
    std::uint64_t n = 0;
    for (std::uint64_t bucket : buckets) n += bucket;
    return n;
  }
};

// The buckets alone. Where several histograms are recorded at once, their sums stand together in one cache line.
template <const auto& kBounds>
class Buckets {
 public:
  using Values = HistogramValues<kBounds>;

  [[gnu::always_inline]] void observe(std::int64_t value, Counter& sum) {
    cells_[bucket_of<kBounds>(value)].add(1);
    sum.add_signed(value);
  }

  void add_to(Values& out, const Counter& sum) const {
    for (std::size_t i = 0; i < cells_.size(); ++i) out.buckets[i] += cells_[i].read();
    out.sum += sum.read();
  }

 private:
  std::array<Counter, Values::kBuckets> cells_{};
};

// A sum of nanoseconds wraps after 584 years of observed time, which Prometheus would take for a restart.
template <const auto& kBounds>
class Histogram {
 public:
  [[gnu::always_inline]] void observe(std::int64_t value) { buckets_.observe(value, sum_); }
  void add_to(HistogramValues<kBounds>& out) const { buckets_.add_to(out, sum_); }

 private:
  Counter sum_;
  Buckets<kBounds> buckets_;
};

}  // namespace nexus
