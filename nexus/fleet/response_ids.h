// response_ids.h
// Owns:     which backend holds which stored response (the Responses API), as far as their ids have passed.
// Promises: a table of kResponseIds entries, the oldest of a set is replaced; an id of which nothing is known is
//           answered by none; no allocation after the constructor.
// Leaves:   finding ids in answers to api/usage_scan.h, asking several backends to proxy/exchange.h.
// Threads:  any; an entry is one atomic word, and publishes nothing else.
// Tested by: tests/response_ids_test.cpp, tests/apis_test.cpp
#pragma once

#include <array>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string_view>

#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/metrics/ids.h"

namespace nexus {

class ResponseIds {
 public:
  ResponseIds() : sets_(static_cast<Set*>(std::calloc(kSets, sizeof(Set)))) {
    if (sets_ == nullptr) throw std::bad_alloc();
  }

  // `hash`: of the id, as TextHash gives it.
  void remember(std::uint64_t hash, BackendId backend) {
    Set& set = set_of(hash);
    const std::uint64_t tag = tag_of(hash);
    std::size_t way = kWays;
    for (std::size_t i = 0; i < kWays && way == kWays; ++i) {
      const std::uint64_t word = load(set[i]);
      if (word == 0 || (word & ~kBackendMask) == tag) way = i;
    }
    if (way == kWays) way = next_way_.fetch_add(1, std::memory_order_relaxed) % kWays;
    std::atomic_ref(set[way]).store(tag | (index_of(backend) + 1), std::memory_order_relaxed);
  }

  std::optional<BackendId> find(std::uint64_t hash) const {
    Set& set = set_of(hash);
    for (std::uint64_t& entry : set) {
      const std::uint64_t word = load(entry);
      if (word != 0 && (word & ~kBackendMask) == tag_of(hash)) {
        return static_cast<BackendId>((word & kBackendMask) - 1);
      }
    }
    return std::nullopt;
  }

 private:
  static constexpr std::size_t kWays = 8;  // a cache line
  static constexpr std::size_t kSets = kResponseIds / kWays;
  static constexpr std::uint64_t kBackendMask = 0xffff;  // of a word; the rest is of the hash, and chooses no set
  static_assert(kMaxBackendNames < kBackendMask && (kSets & (kSets - 1)) == 0 && kSets <= kBackendMask + 1);
  using Set = std::array<std::uint64_t, kWays>;

  struct Free {
    void operator()(Set* sets) const { std::free(sets); }
  };

  Set& set_of(std::uint64_t hash) const { return sets_[hash & (kSets - 1)]; }
  static std::uint64_t tag_of(std::uint64_t hash) { return hash & ~kBackendMask; }
  static std::uint64_t load(std::uint64_t& entry) { return std::atomic_ref(entry).load(std::memory_order_relaxed); }

  std::unique_ptr<Set[], Free> sets_;  // from calloc(): a page that no id has touched costs nothing
  std::atomic<std::uint32_t> next_way_{0};
};

}  // namespace nexus
