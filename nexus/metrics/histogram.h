// histogram.h
// Owns:     the bucket bounds of every histogram family, and a histogram of integer cells.
// Promises: observe() is two plain adds and finds its bucket without a loop over the bounds; the count is the sum of
//           the buckets, so no reader sees them disagree. Values are integers (ns or tokens) and sums are exact.
// Leaves:   the text of bounds and sums to prometheus.h.
// Threads:  observe(): the owning thread alone. add_to(): any thread.
// Tested by: tests/slab_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>

#include "nexus/base/clock.h"
#include "nexus/metrics/counters.h"

namespace nexus {

enum class Unit : std::uint8_t { seconds, tokens };  // of the exposition; here values and bounds are ns or tokens

template <std::size_t N>
struct Bounds {
  Unit unit;
  std::array<std::int64_t, N> upper;  // ascending; a value equal to a bound belongs to its bucket
};

template <class... Values>
constexpr Bounds<sizeof...(Values)> multiples_of(Ns step, Values... values) {
  return {Unit::seconds, {values * step...}};
}

inline constexpr auto kDurationBounds =
    multiples_of(kMillisecond, 100, 250, 500, 1'000, 2'500, 5'000, 10'000, 30'000, 60'000, 120'000, 300'000);

inline constexpr Bounds<12> kTokenBounds{Unit::tokens,
                                         {10, 50, 100, 500, 1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000}};

// Up to 640 s, because loading a model from disk takes minutes.
inline constexpr auto kFirstTokenBounds =
    multiples_of(kMillisecond, 1, 5, 10, 20, 40, 60, 80, 100, 250, 500, 750, 1'000, 2'500, 5'000, 7'500, 10'000, 20'000,
                 40'000, 80'000, 160'000, 640'000);

inline constexpr auto kPerTokenBounds = multiples_of(kMicrosecond, 1'000, 2'500, 5'000, 10'000, 25'000, 50'000, 75'000,
                                                     100'000, 150'000, 200'000, 300'000, 500'000, 1'000'000, 2'500'000);

inline constexpr auto kOverheadBounds =
    multiples_of(kMicrosecond, 10, 25, 50, 100, 250, 500, 1'000, 2'500, 5'000, 10'000, 50'000, 100'000);

inline constexpr auto kLoopStallBounds =
    multiples_of(kMicrosecond, 100, 250, 500, 1'000, 2'500, 5'000, 10'000, 25'000, 50'000, 100'000, 500'000, 1'000'000);

namespace detail {

// Finds a bucket by the value's bit width: a table says how many bounds are smaller than every value of that width, and
// the few bounds of the same width are compared without branches. (A linear search costs a mispredicted branch.)
template <std::size_t N>
struct BucketFinder {
  static constexpr std::size_t kWidths = 65;
  std::array<std::uint8_t, kWidths> passed{};  // by bit width: the bounds smaller than every such value
  std::array<std::int64_t, N + 8> upper{};     // padded, so that a comparison past the last bound is false
  std::size_t compares = 0;                    // the most bounds that have the same bit width

  constexpr explicit BucketFinder(const Bounds<N>& bounds) {
    static_assert(N < 256);
    upper.fill(INT64_MAX);
    std::copy(bounds.upper.begin(), bounds.upper.end(), upper.begin());
    for (std::size_t width = 1; width < kWidths - 1; ++width) {
      const std::int64_t least = std::int64_t{1} << (width - 1);
      const auto first = std::lower_bound(bounds.upper.begin(), bounds.upper.end(), least);
      const auto last = std::upper_bound(first, bounds.upper.end(), least + (least - 1));
      passed[width] = static_cast<std::uint8_t>(first - bounds.upper.begin());
      compares = std::max(compares, static_cast<std::size_t>(last - first));
    }
  }
};

}  // namespace detail

// The index of the bucket of `value`: the number of bounds that it exceeds.
template <const auto& kBounds>
[[gnu::always_inline]] inline std::size_t bucket_of(std::int64_t value) {
  static constexpr detail::BucketFinder kFinder(kBounds);
  static_assert(kFinder.compares >= 1 && kFinder.compares <= 4 && kBounds.upper[0] >= 1);
  assert(value >= 0);
  const auto width = static_cast<std::size_t>(std::bit_width(static_cast<std::uint64_t>(value | 1)));  // 0 counts as 1
  const std::size_t start = kFinder.passed[width];
  return [&]<std::size_t... i>(std::index_sequence<i...>) {
    return (start + ... + static_cast<std::size_t>(value > kFinder.upper[start + i]));
  }
  (std::make_index_sequence<kFinder.compares>{});
}

// The sums over the threads' histograms, as plain numbers.
template <const auto& kBounds>
struct HistogramValues {
  static constexpr std::size_t kBuckets = kBounds.upper.size() + 1;  // the last one is +Inf
  std::array<std::uint64_t, kBuckets> buckets{};                     // not cumulative
  std::uint64_t sum = 0;

  std::uint64_t count() const { return std::accumulate(buckets.begin(), buckets.end(), std::uint64_t{0}); }
  // The values above `bound`, which is one of kBounds.
  std::uint64_t above(std::int64_t bound) const {
    const auto first = buckets.begin() + static_cast<std::ptrdiff_t>(bucket_of<kBounds>(bound)) + 1;
    return std::accumulate(first, buckets.end(), std::uint64_t{0});
  }
};

// A histogram without its sum: PairCounters keeps the sums of its histograms in one cache line.
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

// The sum wraps after 584 years of observed time; Prometheus takes that for a restart.
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
