// kinds.h
// Owns:     the kinds of small runs in which each allocation and each call fails in turn, and which kinds of requests
//           such a run must contain.
// Promises: plain values; a kind counts only if its request ended as it should.
// Leaves:   the runs to every_failure.h and simulation.h.
// Threads:  one.
#pragma once

#include <cstdint>
#include <iterator>

#include "ledger.h"
#include "tests/lib/gateway.h"

namespace nexus::sim {

// The kinds of requests that a small run must contain.
inline constexpr const char* kKinds[] = {"plain answer",
                                         "stream",
                                         "stream with usage added",
                                         "chunked body",
                                         "large body",
                                         "alias",
                                         "fallback",
                                         "retry",
                                         "wait in queue",
                                         "client that leaves",
                                         "kept connection",
                                         "pipelined",
                                         "expects",
                                         "/metrics",
                                         "/v1/models",
                                         "/health",
                                         "refusal",
                                         "client that leaves within its body"};

// Small runs have the same settings for every seed.
enum class Scale : std::uint8_t {
  whole,
  small,
  leavers,
  crowd,   // two keys whose requests always wait
  reload,  // a backend with a cap is added before the first checks have ended
};

constexpr std::uint32_t kWaitInQueue = 1u << 8;
constexpr std::uint32_t kLeavesWithinBody = 1u << (std::size(kKinds) - 1);
constexpr std::uint32_t wanted_kinds(Scale scale) {
  if (scale == Scale::reload) return 1;
  return scale == Scale::leavers ? kLeavesWithinBody : kLeavesWithinBody - 1;
}

constexpr std::uint32_t kMostModels = 64;  // of a run

inline std::uint32_t kinds_of(const Ledger& ledger, const Gateway& gateway) {
  std::uint32_t seen = 0;
  for (const Request& request : ledger.requests) {
    const bool good = request.whole && request.status == 200 && request.attempt >= 0;
    const bool added = good && request.attempts[static_cast<std::size_t>(request.attempt)].extra_bytes > 0;
    const std::size_t body_bytes = request.sent_body.size();
    const bool is[std::size(kKinds)] = {good && !request.event_stream,
                                        good && request.event_stream && !added,
                                        added,
                                        good && request.chunked,
                                        good && body_bytes > 20'000,
                                        good && request.body.model[0] == 'a',
                                        good && !request.fallback_model.empty(),
                                        good && request.line_attempts > 1 && request.fallback_model.empty(),
                                        false,
                                        request.client_left,
                                        good && request.kept,
                                        good && request.pipelined,
                                        good && request.expects_continue,
                                        request.page == "/metrics",
                                        request.page == "/v1/models",
                                        request.page == "/health",
                                        request.status / 100 == 4,
                                        false};
    std::uint32_t bit = 1;
    for (const bool one : is) {
      if (one) seen |= bit;
      bit <<= 1;
    }
  }
  for (const auto& slab : gateway.metrics().slabs()) {
    HistogramValues<kDurationBounds> waits;
    for (std::uint32_t i = 0; i < kMostModels; ++i) {  // control, which knows how many there are, may have ended
      if (const ModelCounters* model = slab->model(ModelId{i})) model->queue_wait.add_to(waits);
    }
    if (waits.count() > 0) seen |= kWaitInQueue;
    if (slab->thread().disconnects[static_cast<std::size_t>(DisconnectPhase::request)].read() > 0) {
      seen |= kLeavesWithinBody;
    }
  }
  return seen;
}

}  // namespace nexus::sim
