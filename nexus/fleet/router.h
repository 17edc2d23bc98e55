// router.h
// Owns:     which backends a request may be tried on, in which order, and the words for why.
// Promises: a pure function of its arguments: every candidate is healthy and can do what the request needs, none comes
//           twice, the ejected come last among those of their model, and equal candidates share the load evenly.
//           Nothing is allocated but the room of `out`, which is kept between calls.
// Leaves:   load and latency to the metrics; who is ejected to circuit_breaker.h; hard caps to admission.h; retries to
//           exchange.h.
// Threads:  any; a snapshot is immutable.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/hash.h"
#include "nexus/config/settings.h"
#include "nexus/fleet/registry.h"
#include "nexus/metrics/ids.h"

namespace nexus {

// What a request needs of the model that serves it.
struct RouteNeeds {
  bool vision = false;
  bool tools = false;
  bool json_mode = false;
  std::uint64_t context_tokens = 0;  // an estimate
};

// How a backend stands now.
struct BackendLoad {
  std::int64_t pending = 0;  // requests in flight over all threads
  Ns latency_ns = 0;         // smoothed time to the first byte; 0: not known, or too old to be believed
  bool ejected = false;
};

enum class RouteReason : std::uint8_t {
  only_candidate,
  alias,
  priority,
  round_robin,
  random,
  least_pending,
  smart,
  fallback,
};

// One backend to try, and the model to ask it for.
struct Choice {
  std::uint32_t backend = 0;                // index into Snapshot::backends
  ModelId model{};                          // of *model_name
  const std::string* model_name = nullptr;  // what to ask that backend for; lives as long as the snapshot
  bool fallback = false;
  bool ejected = false;  // it stands behind the others, and is there so that the last candidate can be tried
  RouteReason reason = RouteReason::only_candidate;
  std::int64_t pending = 0;  // as load_of told it; 0 where it was not asked
  Ns latency_ns = 0;         // the same
  std::uint64_t rank = 0;    // lower is better; its unit is the strategy's
};

enum class RouteOutcome : std::uint8_t {
  ok,
  unknown_model,  // no backend offers the model or one of its fallbacks: 404
  none_healthy,   // some that could serve it do, none of them is healthy now: 503
  not_capable,    // healthy ones offer it, and no backend can do what the request needs: 400
};

namespace route_detail {

constexpr std::uint64_t kPart = 1'000;            // a component of `smart` goes from 0 to this
constexpr std::uint64_t kScoreScale = 1'000'000;  // the best score there is
constexpr std::uint64_t kRoundsPerDeal = 4;
constexpr Ns kNoiseNs = 50 * kMillisecond;  // times to a first byte below this are alike: a model takes longer

inline bool can_serve(const Capabilities& has, const RouteNeeds& needs) {
  if (needs.vision && !has.vision) return false;
  if (needs.tools && !has.tools) return false;
  if (needs.json_mode && !has.json_mode) return false;
  return has.context_tokens == 0 || needs.context_tokens <= has.context_tokens;
}

// Why a request finds no candidate, gathered over the models that were looked at.
struct Seen {
  bool offered = false;
  bool healthy = false;
  bool capable = false;

  RouteOutcome outcome() const {
    if (!offered) return RouteOutcome::unknown_model;
    return healthy && !capable ? RouteOutcome::not_capable : RouteOutcome::none_healthy;
  }
};

// Appends what can serve the request of one model's offers.
inline void gather(const Snapshot& snapshot, const ModelEntry& entry, const RouteNeeds& needs, bool fallback,
                   Seen& seen, std::vector<Choice>& out) {
  const std::size_t first = out.size();
  for (const Offer& offer : entry.offers) {
    seen.offered = true;
    const bool healthy = snapshot.backends[offer.backend].healthy;
    const bool capable = can_serve(offer.capabilities, needs);
    seen.healthy |= healthy;
    seen.capable |= capable;
    if (!healthy || !capable) continue;
    // Offers stand in the backends' order, so one that is listed twice follows itself.
    if (out.size() > first && out.back().backend == offer.backend) continue;
    Choice choice;
    choice.backend = offer.backend;
    choice.model = entry.target_id;
    choice.model_name = &entry.target;
    choice.fallback = fallback;
    out.push_back(choice);
  }
}

// `smart`, from 0 (worst) to kScoreScale. In whole numbers, so that what is equal compares equal. Latency counts in
// tenths of the fastest's, and below kNoiseNs not at all: a difference of a few per cent or milliseconds is noise, and
// must not send all requests to one of two equals.
struct Smart {
  const RoutingSettings& weights;
  std::int64_t most_pending = 0;
  Ns fastest_ns = 0;  // 0: none is known

  void note(const Choice& choice) {
    most_pending = std::max(most_pending, choice.pending);
    const Ns latency_ns = std::max(choice.latency_ns, kNoiseNs);
    if (choice.latency_ns > 0 && (fastest_ns == 0 || latency_ns < fastest_ns)) fastest_ns = latency_ns;
  }

  std::uint64_t score(const Choice& choice, std::uint32_t priority) const {
    const std::uint64_t total = std::uint64_t{weights.weight_priority} + weights.weight_load + weights.weight_latency;
    if (total == 0) return kScoreScale;
    const std::uint64_t sum = weights.weight_priority * priority_part(priority) +
                              weights.weight_load * load_part(choice.pending) +
                              weights.weight_latency * latency_part(choice.latency_ns);
    return sum * (kScoreScale / kPart) / total;
  }

  static std::uint64_t priority_part(std::uint32_t priority) {
    return (100 - std::min(priority, 100u)) * (kPart / 100);
  }

  std::uint64_t load_part(std::int64_t pending) const {
    if (most_pending <= 0) return kPart;
    const std::int64_t below = most_pending - std::max<std::int64_t>(pending, 0);
    return kPart * static_cast<std::uint64_t>(below) / static_cast<std::uint64_t>(most_pending);
  }

  // One that is not known counts as the fastest: a request is the only way to learn it.
  std::uint64_t latency_part(Ns latency_ns) const {
    if (latency_ns <= 0 || fastest_ns == 0) return kPart;
    const double share = static_cast<double>(fastest_ns) / static_cast<double>(std::max(latency_ns, kNoiseNs));
    return static_cast<std::uint64_t>(share * 10.0 + 0.5) * (kPart / 10);
  }
};

// Sets the rank of each of `group`, whose load is known.
inline void rank(const Snapshot& snapshot, const RoutingSettings& routing, std::uint64_t random_bits, Choice* first,
                 Choice* last) {
  Smart smart{routing};
  if (routing.strategy == Strategy::smart) {
    for (const Choice* choice = first; choice != last; ++choice) {
      if (!choice->ejected) smart.note(*choice);
    }
  }
  for (Choice* choice = first; choice != last; ++choice) {
    const std::uint32_t priority = snapshot.backends[choice->backend].priority;
    switch (routing.strategy) {
      case Strategy::smart: choice->rank = kScoreScale - smart.score(*choice, priority); break;
      case Strategy::round_robin: choice->rank = 0; break;
      case Strategy::priority: choice->rank = priority; break;
      case Strategy::random: choice->rank = random_at(random_bits, static_cast<std::uint64_t>(choice - first)); break;
      case Strategy::least_pending:
        choice->rank = static_cast<std::uint64_t>(std::max<std::int64_t>(choice->pending, 0));
        break;
    }
  }
}

// Orders equals: the first by turns, the others at random, so that a first one that fails sheds evenly too.
// A turn that counts other requests as well could be in step with this one's (every second request is of this model,
// and there are two backends); so the deal is changed every few rounds, and each round still serves each one once.
inline void share_evenly(Choice* first, std::size_t count, std::uint64_t turn, std::uint64_t salt) {
  if (count < 2) return;
  const std::uint64_t deal = turn / (count * kRoundsPerDeal);
  const std::size_t picked = (turn % count + mix(deal ^ salt << 48) % count) % count;
  std::swap(first[0], first[picked]);
  for (std::size_t left = count - 1; left > 1; --left) {
    std::swap(first[left], first[1 + random_at(turn ^ salt << 48, left) % left]);
  }
}

constexpr RouteReason reason_of(Strategy strategy) {
  switch (strategy) {
    case Strategy::smart: return RouteReason::smart;
    case Strategy::round_robin: return RouteReason::round_robin;
    case Strategy::priority: return RouteReason::priority;
    case Strategy::random: return RouteReason::random;
    case Strategy::least_pending: return RouteReason::least_pending;
  }
  return RouteReason::smart;
}

inline bool better(const Choice& a, const Choice& b) {
  if (a.ejected != b.ejected) return b.ejected;
  if (a.rank != b.rank) return a.rank < b.rank;
  return a.backend < b.backend;
}

inline bool equal(const Choice& a, const Choice& b) { return a.ejected == b.ejected && a.rank == b.rank; }

// Orders one model's candidates, from out[begin] on, by the strategy.
template <class LoadOf>
void order(const Snapshot& snapshot, const RoutingSettings& routing, std::uint64_t turn, std::uint64_t random_bits,
           LoadOf&& load_of, std::size_t begin, std::vector<Choice>& out) {
  const std::size_t count = out.size() - begin;
  if (count < 2) return;
  Choice* const first = out.data() + begin;
  Choice* const last = first + count;
  for (Choice* choice = first; choice != last; ++choice) {
    const BackendLoad load = load_of(snapshot.backends[choice->backend]);
    choice->pending = load.pending;
    choice->latency_ns = load.latency_ns;
    choice->ejected = load.ejected;
  }
  rank(snapshot, routing, random_bits, first, last);
  std::sort(first, last, better);
  for (Choice* run = first; run != last;) {
    Choice* end = run + 1;
    while (end != last && equal(*run, *end)) ++end;
    share_evenly(run, static_cast<std::size_t>(end - run), turn, static_cast<std::uint64_t>(run - out.data()));
    run = end;
  }
}

inline RouteReason why(const ModelEntry& asked, bool fallback, std::size_t candidates, Strategy strategy) {
  if (fallback) return RouteReason::fallback;
  if (asked.is_alias()) return RouteReason::alias;
  return candidates == 1 ? RouteReason::only_candidate : reason_of(strategy);
}

// True where the fallback `entry`, the n-th of `asked`, names a model that was looked at already.
inline bool seen_before(const Snapshot& snapshot, const ModelEntry& asked, std::size_t n, const ModelEntry& entry) {
  if (entry.target == asked.target) return true;
  for (std::size_t i = 0; i < n; ++i) {
    const ModelEntry* earlier = snapshot.find(asked.fallbacks[i]);
    if (earlier != nullptr && earlier->target == entry.target) return true;
  }
  return false;
}

}  // namespace route_detail

// Fills `out` with every backend that `asked` may be tried on, best first; it is empty unless the outcome is `ok`.
// First come those of the model itself, then those of its fallbacks, in their order (an alias among them is followed,
// their own fallbacks are not). `turn` counts requests and decides between equals, `random_bits` is new for each
// request and serves the strategy `random`. `load_of`: BackendLoad(const BackendView&), asked once for each of two
// candidates or more.
template <class LoadOf>
RouteOutcome route(const Snapshot& snapshot, const ModelEntry& asked, const RouteNeeds& needs,
                   const RoutingSettings& routing, std::uint64_t turn, std::uint64_t random_bits, LoadOf&& load_of,
                   std::vector<Choice>& out) {
  out.clear();
  route_detail::Seen seen;
  const auto take = [&](const ModelEntry& entry, bool fallback) {
    const std::size_t begin = out.size();
    route_detail::gather(snapshot, entry, needs, fallback, seen, out);
    route_detail::order(snapshot, routing, turn, random_bits, load_of, begin, out);
    const RouteReason reason = route_detail::why(asked, fallback, out.size() - begin, routing.strategy);
    for (std::size_t i = begin; i < out.size(); ++i) out[i].reason = reason;
  };
  take(asked, false);
  for (std::size_t i = 0; i < asked.fallbacks.size(); ++i) {
    const ModelEntry* fallback = snapshot.find(asked.fallbacks[i]);
    if (fallback == nullptr || route_detail::seen_before(snapshot, asked, i, *fallback)) continue;
    take(*fallback, true);
  }
  return out.empty() ? seen.outcome() : RouteOutcome::ok;
}

// The choice in words, for X-Nexus-Route-Reason: `only candidate`, `least pending 2`, `smart 0.85`, …
inline void append_reason(std::string& out, const Choice& choice) {
  char digits[24];
  const auto append_number = [&](std::uint64_t number) {
    out.append(digits, static_cast<std::size_t>(std::to_chars(digits, digits + sizeof digits, number).ptr - digits));
  };
  switch (choice.reason) {
    case RouteReason::only_candidate: out += "only candidate"; break;
    case RouteReason::alias: out += "alias"; break;
    case RouteReason::priority: out += "priority"; break;
    case RouteReason::round_robin: out += "round robin"; break;
    case RouteReason::random: out += "random"; break;
    case RouteReason::fallback: out += "fallback"; break;
    case RouteReason::least_pending:
      out += "least pending ";
      append_number(choice.rank);
      break;
    case RouteReason::smart: {
      const std::uint64_t hundredths = (route_detail::kScoreScale - choice.rank) / (route_detail::kScoreScale / 100);
      out += "smart ";
      append_number(hundredths / 100);
      out += hundredths % 100 < 10 ? ".0" : ".";
      append_number(hundredths % 100);
      break;
    }
  }
}

}  // namespace nexus
