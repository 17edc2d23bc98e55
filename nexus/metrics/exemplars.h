// exemplars.h
// Owns:     the exemplars of a model on a backend: of each bucket of two histograms the trace id, the value and the
//           time of the last sampled request that was counted in it.
// Promises: put() is wait-free and allocates nothing; get() gives one request's numbers or none, never those of two.
//           Memory is bounded: kPairExemplarBytes for each pair of model and backend that had a sampled request, and
//           each thread.
// Leaves:   which requests are sampled to proxy/exchange_trace.h; the text to exposition.h.
// Threads:  put(): the owning thread alone. get(): any thread.
// Tested by: tests/exemplars_test.cpp
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "nexus/base/clock.h"
#include "nexus/metrics/histogram.h"

namespace nexus {

constexpr std::size_t kTraceDigits = 32;

// A W3C trace id: the first 16 of its digits, and the last 16.
struct TraceNumber {
  std::uint64_t high = 0, low = 0;
  bool operator==(const TraceNumber&) const = default;
};

// `digits`: kTraceDigits of 0-9a-f.
constexpr TraceNumber trace_number(std::string_view digits) {
  TraceNumber id;
  for (std::size_t i = 0; i < kTraceDigits; ++i) {
    const char c = digits[i];
    const auto nibble = static_cast<std::uint64_t>(c <= '9' ? c - '0' : c - 'a' + 10);
    std::uint64_t& half = i < kTraceDigits / 2 ? id.high : id.low;
    half = half << 4 | nibble;
  }
  return id;
}
static_assert(trace_number("0af7651916cd43dd8448eb211c80319c") == TraceNumber{0x0af7651916cd43dd, 0x8448eb211c80319c});

// The trace of a request that ends now.
struct TraceMark {
  TraceNumber id;
  Ns wall_ns = 0;
};

struct Exemplar {
  TraceMark trace;         // its time is 0: none
  std::int64_t value = 0;  // ns
};

// A slot of one writer. Its number is odd while it is written; a reader that sees it change has read two requests.
// Each field is stored with release order and read with acquire order, so a reader that sees a new field sees the odd
// number too.
class ExemplarSlot {
 public:
  void put(const Exemplar& exemplar) {
    const std::uint64_t number = number_.load(std::memory_order_relaxed);
    number_.store(number + 1, std::memory_order_relaxed);
    const std::array<std::uint64_t, kFields> fields{exemplar.trace.id.high, exemplar.trace.id.low,
                                                    static_cast<std::uint64_t>(exemplar.trace.wall_ns),
                                                    static_cast<std::uint64_t>(exemplar.value)};
    for (std::size_t i = 0; i < kFields; ++i) fields_[i].store(fields[i], std::memory_order_release);
    number_.store(number + 2, std::memory_order_release);
  }

  // Nothing if there is none, or if it is being written.
  std::optional<Exemplar> get() const {
    const std::uint64_t number = number_.load(std::memory_order_acquire);
    if (number == 0 || number % 2 != 0) return std::nullopt;
    std::array<std::uint64_t, kFields> fields;
    for (std::size_t i = 0; i < kFields; ++i) fields[i] = fields_[i].load(std::memory_order_acquire);
    if (number_.load(std::memory_order_relaxed) != number) return std::nullopt;
    return Exemplar{{{fields[0], fields[1]}, static_cast<Ns>(fields[2])}, static_cast<std::int64_t>(fields[3])};
  }

 private:
  static constexpr std::size_t kFields = 4;
  std::atomic<std::uint64_t> number_{0};
  std::array<std::atomic<std::uint64_t>, kFields> fields_{};
};

// One slot for each bucket of a histogram.
template <const auto& kBounds>
class Exemplars {
 public:
  using Newest = std::array<Exemplar, HistogramValues<kBounds>::kBuckets>;

  void put(const TraceMark& trace, std::int64_t value) { slots_[bucket_of<kBounds>(value)].put({trace, value}); }

  // Replaces those that are older.
  void add_to(Newest& newest) const {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      const auto exemplar = slots_[i].get();
      if (exemplar && exemplar->trace.wall_ns > newest[i].trace.wall_ns) newest[i] = *exemplar;
    }
  }

 private:
  std::array<ExemplarSlot, HistogramValues<kBounds>::kBuckets> slots_;
};

struct PairExemplars {
  Exemplars<kDurationBounds> duration;
  Exemplars<kFirstTokenBounds> first_token;
};

constexpr std::size_t kPairExemplarBytes = sizeof(PairExemplars);
static_assert(kPairExemplarBytes == 1360, "nexus.conf(5) says so");

}  // namespace nexus
