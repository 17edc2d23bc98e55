// bare_slab.h
// Owns:     the anchor that recording is measured against: the same numbers as a Slab in the plainest memory that could
//           hold them, fixed arrays that one thread reads and writes.
// Promises: only the arithmetic: no table to search, no atomics, nothing that another thread could read, nothing that
//           grows.
// Leaves:   being of use.
// Threads:  one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "nexus/metrics/histogram.h"
#include "nexus/metrics/slab.h"

namespace nexus::bench {

template <const auto& kBounds>
struct BareHistogram {
  std::array<std::uint64_t, kBounds.upper.size() + 1> buckets{};
  std::uint64_t sum = 0;

  void observe(std::int64_t value) {
    ++buckets[bucket_of<kBounds>(value)];
    sum += static_cast<std::uint64_t>(value);
  }
};

class alignas(kCacheAlign) BareSlab {
 public:
  BareSlab(std::size_t models, std::size_t backends)
      : backends_count_(backends), pairs_(models * backends), backends_(backends), errors_(models) {}

  void begin(BackendId backend) { ++backends_[index_of(backend)].pending; }

  void end(const RequestRecord& r) {
    Pair& pair = pairs_[index_of(r.model) * backends_count_ + index_of(r.backend)];
    Backend& backend = backends_[index_of(r.backend)];
    ++backend.attempts[0];
    ++pair.statuses[r.status / 100u];
    if (r.reached_backend) pair.duration.observe(r.duration_ns);
    if (r.prompt_tokens >= 0) pair.prompt.observe(r.prompt_tokens);
    if (r.completion_tokens >= 0) pair.completion.observe(r.completion_tokens);
    if (r.stream && r.first_byte_ns >= 0) pair.first_token.observe(r.first_byte_ns);
    if (r.stream && r.per_token_ns >= 0) pair.per_token.observe(r.per_token_ns);
    if (r.overhead_ns >= 0) overhead_.observe(r.overhead_ns);
    if (r.error != ErrorType::none) ++errors_[index_of(r.model)][static_cast<std::size_t>(r.error)];
    if (r.without_usage) ++backend.without_usage;
    --backend.pending;
  }

 private:
  struct alignas(kCacheAlign) Pair {
    std::array<std::uint64_t, 8> statuses{};
    BareHistogram<kDurationBounds> duration;
    BareHistogram<kTokenBounds> prompt, completion;
    BareHistogram<kFirstTokenBounds> first_token;
    BareHistogram<kPerTokenBounds> per_token;
  };
  struct alignas(kCacheAlign) Backend {
    std::uint64_t pending = 0, without_usage = 0;
    std::array<std::uint64_t, 8> attempts{};
  };

  std::size_t backends_count_;
  std::vector<Pair> pairs_;
  std::vector<Backend> backends_;
  std::vector<std::array<std::uint64_t, 8>> errors_;
  BareHistogram<kOverheadBounds> overhead_;
};

}  // namespace nexus::bench
