// router.h
// Owns:     the list of backends that a request may be tried on, their order, and the text of X-Nexus-Route-Reason.
// Promises: pure functions of their arguments: every candidate is healthy and has the needed capabilities, none is
//           listed twice for one model, ejected ones come last within their model, and equal candidates share the load
//           evenly. The order is found one by one, because the first is mostly enough. The only memory used is the
//           caller's `out`, which keeps its capacity between calls.
// Leaves:   load to slab.h, latency to worker_context.h, keys and their hashes to affinity.h, ejection to
//           circuit_breaker.h, hard caps to admission.h, retries to candidate_picker.h.
// Threads:  any; a snapshot is immutable.
// Tested by: tests/router_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/text.h"
#include "nexus/config/settings.h"
#include "nexus/fleet/affinity.h"
#include "nexus/fleet/registry.h"
#include "nexus/metrics/ids.h"
#include "nexus/metrics/slab.h"

namespace nexus {

// The endpoint and the capabilities that a request needs.
struct RouteNeeds {
  const Endpoint* endpoint = &kEndpoints.front();
  std::optional<BackendId> only = {};  // the backend that holds the stored response that it is about
  bool vision = false;
  bool tools = false;
  bool json_mode = false;
  std::uint64_t context_tokens = 0;  // an estimate
  std::uint64_t affinity = 0;        // the key of its session; 0: none
  std::uint16_t seen_at = 0;         // the backend_mark() of where that was seen lately; 0: nowhere
};

// The current load of a backend.
struct BackendLoad {
  std::int64_t pending = 0;  // requests in flight over all threads
  Ns latency_ns = 0;         // smoothed time to the first byte; 0: unknown or outdated
  bool ejected = false;
};

enum class RouteReason : std::uint8_t {
  smart,  // this and the next four: the Strategy of the same value chose among several
  round_robin,
  priority,
  random,
  least_pending,
  only_candidate,
  alias,
  fallback,
  affinity,  // the key of the session chose among several
};
inline constexpr std::array<std::string_view, 9> kRouteReasonNames{
    "smart", "round robin", "priority", "random", "least pending", "only candidate", "alias", "fallback", "affinity"};
constexpr std::string_view to_string(RouteReason reason) { return kRouteReasonNames[static_cast<std::size_t>(reason)]; }

constexpr RouteReason reason_of(Strategy strategy) { return static_cast<RouteReason>(strategy); }
static_assert(reason_of(Strategy::smart) == RouteReason::smart && reason_of(Strategy::random) == RouteReason::random);
static_assert(reason_of(Strategy::least_pending) == RouteReason::least_pending &&
              to_string(RouteReason::affinity) == "affinity");

// A backend to try, and the model to request from it.
struct Choice {
  std::uint32_t backend = 0;                // index into Snapshot::backends
  ModelId model{};                          // of *model_name
  const std::string* model_name = nullptr;  // lives as long as the snapshot
  std::uint32_t standing = kNotByKey;       // lower is better, and comes before the rank
  bool fallback = false;
  bool considered = false;  // by BestFirst
  AffinityOutcome affinity{};
  RouteReason reason{};
  std::int64_t pending = 0;  // from load_of; 0 if this is the model's only candidate
  Ns latency_ns = 0;         // the same
  std::uint64_t rank = 0;    // lower is better; the unit depends on the strategy

  // The parts of a standing, the least important first.
  static constexpr std::uint32_t kNotByKey = 1;  // not ranked by the session's key: behind those of its model that are
  static constexpr std::uint32_t kEjected = 2;   // a last resort: behind the others of its model
  static constexpr std::uint32_t kFallback = 4;  // this times n: of the n-th fallback
  bool by_key() const { return (standing & kNotByKey) == 0; }
  bool ejected() const { return (standing & kEjected) != 0; }
};

enum class RouteOutcome : std::uint8_t {
  ok,
  unknown_model,  // no backend offers the model or one of its fallbacks: 404
  none_healthy,   // some backend could serve the request, but none of these is healthy: 503
  not_spoken,     // backends offer the model, but none of them speaks the endpoint's API: 501
  not_capable,    // healthy backends offer the model, but no backend has the needed capabilities: 400
};

namespace route_detail {

constexpr std::uint64_t kPart = 1'000;            // each part of a `smart` score is 0 to this
constexpr std::uint64_t kScoreScale = 1'000'000;  // the best `smart` score
constexpr std::uint64_t kRoundsPerDeal = 4;       // rounds of BestFirst with the same order
constexpr Ns kNoiseNs = 50 * kMillisecond;        // latencies below this count as equal: models are slower

inline bool can_serve(const Capabilities& has, const RouteNeeds& needs) {
  if (needs.vision && !has.vision) return false;
  if (needs.tools && !has.tools) return false;
  if (needs.json_mode && !has.json_mode) return false;
  return has.context_tokens == 0 || needs.context_tokens <= has.context_tokens;
}

// Facts about all offers; they decide the error if there is no candidate.
struct Seen {
  bool offered = false;
  bool spoken = false;
  bool healthy = false;
  bool capable = false;

  RouteOutcome outcome() const {
    if (!offered) return RouteOutcome::unknown_model;
    if (!spoken) return RouteOutcome::not_spoken;
    return healthy && !capable ? RouteOutcome::not_capable : RouteOutcome::none_healthy;
  }
};

// The backend where a key belongs: the first in its order, among all that could serve the request if they were usable.
struct Home {
  std::uint32_t backend = UINT32_MAX;
  std::uint32_t priority = UINT32_MAX;
  std::uint64_t rank = 0;

  void note(std::uint32_t index, const BackendView& view, const RouteNeeds& needs) {
    const std::uint64_t its = affinity_rank(needs.affinity, needs.seen_at, view.affinity, false);
    if (backend == UINT32_MAX || std::tie(view.priority, its) < std::tie(priority, rank))
      *this = {index, view.priority, its};
  }
};

// Appends the offers of one model that can serve the request; `group`: 0, or n of its n-th fallback. Returns the home
// of its key, if it has one.
inline Home add_candidates(const Snapshot& snapshot, const ModelEntry& entry, const RouteNeeds& needs,
                           std::uint32_t group, RouteReason reason, Seen& seen, std::vector<Choice>& out) {
  Home home;
  std::uint32_t last = UINT32_MAX;  // the backend that was added last
  for (const Offer& offer : entry.offers) {
    seen.offered = true;
    const BackendView& backend = snapshot.backends[offer.backend];
    if (!backend.speaks(*needs.endpoint)) continue;
    seen.spoken = true;
    if (needs.only && backend.id != *needs.only) continue;
    const bool healthy = backend.healthy;
    const bool capable = can_serve(offer.capabilities, needs);
    seen.healthy |= healthy;
    seen.capable |= capable;
    if (needs.affinity != 0 && capable) home.note(offer.backend, backend, needs);
    if (!healthy || !capable) continue;
    // Offers are in the order of the backends, so duplicates are adjacent.
    if (offer.backend == last) continue;
    last = offer.backend;
    Choice& choice = out.emplace_back();
    choice.backend = offer.backend;
    choice.model = entry.target_id;
    choice.model_name = &entry.target;
    choice.standing = group * Choice::kFallback | Choice::kNotByKey;
    choice.fallback = group > 0;
    choice.reason = reason;
  }
  return home;
}

// The `smart` score, from 0 (worst) to kScoreScale, in integers so that equal candidates compare equal. Latency is
// rounded to tenths of the fastest backend's, and to kNoiseNs: a difference of a few per cent or milliseconds is noise
// and must not send all requests to one of two equal backends.
class Smart {
 public:
  explicit Smart(const RoutingSettings& routing) : routing_(routing) {}

  // Call for each usable candidate before the first score().
  void note(const Choice& choice) {
    most_pending_ = std::max(most_pending_, choice.pending);
    const Ns latency_ns = compared(choice.latency_ns);
    if (latency_ns > 0 && (fastest_ns_ == 0 || latency_ns < fastest_ns_)) fastest_ns_ = latency_ns;
  }

  // Candidates are often equal, and a score costs three divisions: the last one is kept.
  std::uint64_t score(const Choice& choice, std::uint32_t priority) {
    const Facts facts{priority, choice.pending, compared(choice.latency_ns)};
    if (!(facts == last_)) {
      last_ = facts;
      last_score_ = score_of(facts);
    }
    return last_score_;
  }

 private:
  struct Facts {
    std::uint32_t priority = UINT32_MAX;  // of none
    std::int64_t pending = 0;
    Ns latency_ns = 0;
    bool operator==(const Facts&) const = default;
  };

  static Ns compared(Ns latency_ns) { return latency_ns > 0 ? std::max(latency_ns, kNoiseNs) : 0; }

  std::uint64_t score_of(const Facts& facts) const {
    const std::uint64_t priority = routing_.weight_priority, load = routing_.weight_load;
    const std::uint64_t latency = routing_.weight_latency, total = priority + load + latency;
    if (total == 0) return kScoreScale;
    const std::uint64_t sum = priority * priority_part(facts.priority) + load * load_part(facts.pending) +
                              latency * latency_part(facts.latency_ns);
    return sum * (kScoreScale / kPart) / total;
  }

  static std::uint64_t priority_part(std::uint32_t priority) {
    return (100 - std::min(priority, 100u)) * (kPart / 100);
  }

  std::uint64_t load_part(std::int64_t pending) const {
    if (most_pending_ <= 0) return kPart;
    const std::int64_t below = most_pending_ - std::max<std::int64_t>(pending, 0);
    return kPart * static_cast<std::uint64_t>(below) / static_cast<std::uint64_t>(most_pending_);
  }

  // A backend of unknown latency counts as the fastest: only a request can measure it.
  std::uint64_t latency_part(Ns latency_ns) const {
    if (latency_ns == 0 || fastest_ns_ == 0) return kPart;
    const double share = static_cast<double>(fastest_ns_) / static_cast<double>(latency_ns);
    return static_cast<std::uint64_t>(share * 10.0 + 0.5) * (kPart / 10);
  }

  const RoutingSettings& routing_;
  std::int64_t most_pending_ = 0;
  Ns fastest_ns_ = 0;  // 0: no latency is known
  Facts last_;
  std::uint64_t last_score_ = 0;
};

// Lower is better. `n` numbers the candidates of one model.
inline std::uint64_t rank_of(const Choice& choice, Strategy strategy, Smart& smart, std::uint32_t priority,
                             std::uint64_t random_bits, std::uint64_t n) {
  switch (strategy) {
    case Strategy::smart: return kScoreScale - smart.score(choice, priority);
    case Strategy::round_robin: return 0;
    case Strategy::priority: return priority;
    case Strategy::random: return random_at(random_bits, n);
    case Strategy::least_pending: return static_cast<std::uint64_t>(std::max<std::int64_t>(choice.pending, 0));
  }
  return 0;
}

// True if `a` comes before `b`, by what is not equally good in them.
inline bool precedes(const Choice& a, const Choice& b) {
  return a.standing != b.standing ? a.standing < b.standing : a.rank < b.rank;
}

inline bool equally_good(const Choice& a, const Choice& b) { return a.standing == b.standing && a.rank == b.rank; }

// Ranks the usable candidates of the best priority by the session's key: those that have more than their share of the
// load behind the others, and for a new key all that are busy, if one is idle.
inline void rank_by_key(const Snapshot& snapshot, const RoutingSettings& routing, const RouteNeeds& needs,
                        Choice* first, Choice* last) {
  std::uint32_t best = UINT32_MAX;
  for (const Choice* choice = first; choice != last; ++choice) {
    if (!choice->ejected()) best = std::min(best, snapshot.backends[choice->backend].priority);
  }
  std::int64_t in_flight = 0;
  std::size_t count = 0;
  bool idle = false;
  for (Choice* choice = first; choice != last; ++choice) {
    if (choice->ejected() || snapshot.backends[choice->backend].priority != best) continue;
    choice->standing &= ~Choice::kNotByKey;
    if (choice->reason == reason_of(routing.strategy)) choice->reason = RouteReason::affinity;
    in_flight += std::max<std::int64_t>(choice->pending, 0);
    count += 1;
    idle |= choice->pending <= 0;
  }
  const bool is_new = needs.seen_at == 0;
  const std::int64_t bound =
      is_new && idle ? 0 : affinity_bound(in_flight, std::max<std::size_t>(count, 1), routing.affinity_slack);
  for (Choice* choice = first; choice != last; ++choice) {
    if (!choice->by_key()) continue;
    const BackendView& backend = snapshot.backends[choice->backend];
    const bool full = backend.max_pending > 0 && choice->pending >= backend.max_pending;
    choice->rank = affinity_rank(needs.affinity, needs.seen_at, backend.affinity, full || choice->pending > bound);
  }
}

// Ranks the candidates from out[begin] on, all of one model.
template <class LoadOf>
void rank(const Snapshot& snapshot, const RoutingSettings& routing, const RouteNeeds& needs, std::uint64_t random_bits,
          LoadOf&& load_of, std::size_t begin, std::vector<Choice>& out) {
  const std::size_t count = out.size() - begin;
  Choice* const first = out.data() + begin;
  if (count == 1 && first->reason == reason_of(routing.strategy)) first->reason = RouteReason::only_candidate;
  if (count < 2) return;
  Choice* const last = first + count;
  Smart smart(routing);
  for (Choice* choice = first; choice != last; ++choice) {
    const BackendLoad load = load_of(snapshot.backends[choice->backend]);
    choice->pending = load.pending;
    choice->latency_ns = load.latency_ns;
    if (load.ejected) {
      choice->standing |= Choice::kEjected;
    } else {
      smart.note(*choice);
    }
  }
  for (Choice* choice = first; choice != last; ++choice) {
    const std::uint32_t priority = snapshot.backends[choice->backend].priority;
    const auto n = static_cast<std::uint64_t>(choice - first);
    choice->rank = rank_of(*choice, routing.strategy, smart, priority, random_bits, n);
  }
  if (needs.affinity != 0) rank_by_key(snapshot, routing, needs, first, last);
}

// If there are several candidates.
inline RouteReason reason_for(const ModelEntry& requested, bool fallback, Strategy strategy) {
  if (fallback) return RouteReason::fallback;
  return requested.is_alias() ? RouteReason::alias : reason_of(strategy);
}

// Tells each of the candidates of one model if it is where the key belongs, and if not, why.
inline void note_affinity(const Home& home, bool has_key, Choice* first, Choice* last) {
  const bool usable = std::any_of(
      first, last, [&](const Choice& choice) { return choice.backend == home.backend && !choice.ejected(); });
  for (Choice* choice = first; choice != last; ++choice) {
    choice->affinity = !has_key                          ? AffinityOutcome::no_key
                       : choice->backend == home.backend ? AffinityOutcome::kept
                       : usable                          ? AffinityOutcome::moved_load
                                                         : AffinityOutcome::moved_health;
  }
}

// True if `entry`, the n-th fallback of `requested`, resolves to the same model as `requested` or an earlier fallback.
inline bool is_duplicate(const Snapshot& snapshot, const ModelEntry& requested, std::size_t n,
                         const ModelEntry& entry) {
  if (entry.target == requested.target) return true;
  for (std::size_t i = 0; i < n; ++i) {
    const ModelEntry* earlier = snapshot.find(requested.fallbacks[i]);
    if (earlier != nullptr && earlier->target == entry.target) return true;
  }
  return false;
}

}  // namespace route_detail

// Fills `out` with every backend that `requested` may be tried on, for BestFirst; it is empty unless the outcome is
// `ok`. The model's own backends come before those of its fallbacks, which are used in their order (an alias among them
// is resolved; a fallback's own fallbacks are ignored). `random_bits` is new for each request and used by the strategy
// `random`. `load_of`: BackendLoad(const BackendView&), called once per candidate of a model that has at least two.
template <class LoadOf>
RouteOutcome route(const Snapshot& snapshot, const ModelEntry& requested, const RouteNeeds& needs,
                   const RoutingSettings& routing, std::uint64_t random_bits, LoadOf&& load_of,
                   std::vector<Choice>& out) {
  out.clear();
  route_detail::Seen seen;
  const auto add = [&](const ModelEntry& entry, std::uint32_t group) {
    const std::size_t begin = out.size();
    const RouteReason reason = route_detail::reason_for(requested, group > 0, routing.strategy);
    const auto home = route_detail::add_candidates(snapshot, entry, needs, group, reason, seen, out);
    route_detail::rank(snapshot, routing, needs, random_bits, load_of, begin, out);
    if (routing.affinity != Affinity::none)
      route_detail::note_affinity(home, needs.affinity != 0, out.data() + begin, out.data() + out.size());
  };
  add(requested, 0);
  for (std::size_t i = 0; i < requested.fallbacks.size(); ++i) {
    const ModelEntry* fallback = snapshot.find(requested.fallbacks[i]);
    if (fallback == nullptr || route_detail::is_duplicate(snapshot, requested, i, *fallback)) continue;
    add(*fallback, static_cast<std::uint32_t>(i + 1));
  }
  return out.empty() ? seen.outcome() : RouteOutcome::ok;
}

// Finds the choices of a route one by one, best first.
class BestFirst {
 public:
  // `turn` counts requests and orders equal candidates: the first by turns, the others at random, so that the retries
  // after a failure are spread too.
  BestFirst(std::vector<Choice>& choices, std::uint64_t turn) : choices_(choices), turn_(turn) {
    for (Choice& choice : choices_) choice.considered = false;
  }

  // The best choice that was not returned yet, or null.
  const Choice* next() {
    Choice* best = nullptr;
    std::size_t equals = 0;
    for (Choice& choice : choices_) {
      if (choice.considered) continue;
      if (best == nullptr || route_detail::precedes(choice, *best)) {
        best = &choice;
        equals = 1;
      } else if (route_detail::equally_good(choice, *best)) {
        equals += 1;
      }
    }
    if (equals > 1) best = share(best, equals);
    if (best == nullptr) return nullptr;
    best->considered = true;
    considered_ += 1;
    return last_ = best;
  }

 private:
  // One of `equals` choices, of which `first` is the first. The turn counts requests of all models, so it may be in
  // step with one model's requests (every second one, and two backends). Therefore the order changes every
  // kRoundsPerDeal rounds; each round still begins with each candidate once.
  Choice* share(Choice* first, std::size_t equals) const {
    const std::uint64_t salt = considered_ << 48;
    const bool begins = last_ == nullptr || !route_detail::equally_good(*last_, *first);
    const std::uint64_t deal = turn_ / (equals * route_detail::kRoundsPerDeal);
    std::size_t left = begins ? (turn_ % equals + mix(deal ^ salt) % equals) % equals : mix(turn_ ^ salt) % equals;
    Choice* choice = first;
    while (choice->considered || !route_detail::equally_good(*choice, *first) || left-- > 0) ++choice;
    return choice;
  }

  std::vector<Choice>& choices_;
  std::uint64_t turn_;
  std::uint64_t considered_ = 0;
  const Choice* last_ = nullptr;
};

// Appends the value of X-Nexus-Route-Reason: `only candidate`, `least pending 2`, `smart 0.85`, `affinity moved`, …
inline void append_reason(std::string& out, const Choice& choice) {
  out += to_string(choice.reason);
  if (choice.reason == RouteReason::affinity) {
    if (choice.affinity != AffinityOutcome::kept) out += " moved";
  } else if (choice.reason == RouteReason::least_pending) {
    out.append(" ").append(Digits(choice.rank).view());
  } else if (choice.reason == RouteReason::smart) {
    const std::uint64_t hundredths = (route_detail::kScoreScale - choice.rank) / (route_detail::kScoreScale / 100);
    out.append(hundredths == 100 ? " 1." : " 0.").append(Digits(100 + hundredths % 100).view().substr(1));
  }
}

}  // namespace nexus
