// policy.h
// Owns:     the check of the backends that a request is sent to: no ejected one while another could serve it, one
//           half-open probe at a time, none twice, another one after a failure while there is one; and nobody is
//           overtaken in the queue.
// Promises: judges by the fleet and the breakers as they were in the turn in which Nexus chose. A request is wrong only
//           if that holds whatever its attempts were that no backend has seen.
// Leaves:   whether the fleet was current to freshness.h, caps to audit.h and simulation.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "circuits.h"
#include "freshness.h"

namespace nexus::sim {

class Policy {
 public:
  Policy(Ledger& ledger, const Wire& wire, const Freshness& freshness, const Gateway& gateway, const Circuits& circuits)
      : ledger_(ledger), wire_(wire), freshness_(freshness), gateway_(gateway), circuits_(circuits) {}

  void note(const Settings& settings) {
    least_retries_ = std::min(least_retries_, settings.routing.retries);
    request_timeout_ |= settings.upstream.request_timeout_ns > 0;
  }

  // After each turn of a loop.
  void end_turn(std::uint32_t loop) {
    if (ledger_.memory_faults) return;
    const std::uint64_t turn = wire_.turn;
    const Ns now = wire_.now();
    if (std::exchange(lacks_, wire_.lacks) != wire_.lacks) lacked_.push_back(now);
    const SnapshotPtr& fleet = gateway_.control().published();
    const bool settled = circuits_.all_closed();
    if (!settled) turns_.push_back({turn, now, fleet, circuits_.all()});
    if (!settled || std::exchange(fleet_, fleet.get()) != fleet.get()) unsettled_ = turn;
    if (loop < gateway_.workers()) look_at_queue(loop, turn, *fleet);
  }

  // The request `number` has come to a server.
  void on_request(const Link& link, std::size_t number, std::string_view model, bool first, const Flow::Mark& sent) {
    if (ledger_.memory_faults || (first && freshness_.connects_again(link))) return;
    const Arrival arrival{link.peer, std::string(model), first ? link.made_turn : sent.turn,
                          first ? link.made_at : sent.at};
    auto& arrivals = arrivals_[number];
    arrivals.push_back(arrival);
    check_again(number, arrivals);
    // Over a kept connection the first byte may be written after the turn of the choice.
    const auto sending = sending_.find(static_cast<std::int64_t>(number));
    const bool late = !first && sending != sending_.end() && sending->second.since < arrival.turn;
    if (!late) check_ejected(number, arrival);
  }

  void check_at_end() {
    if (ledger_.memory_faults) return;
    std::set<Trial> begun;
    for (const Suspect& suspect : suspects_) {
      const Request& request = ledger_.requests[suspect.number];
      if (request.lines != 1 || suspect.others < request.line_attempts) continue;
      const bool may_be_trial = suspect.trial != Trial{} && (!suspect.second_trial || told_of_quota(suspect.at));
      if (may_be_trial && (request.client_left || begun.insert(suspect.trial).second)) continue;
      ledger_.wrong("r%zu: came to server %u, which is ejected, and %u others could serve it, in %u attempts",
                    suspect.number, suspect.server, suspect.others, request.line_attempts);
    }
    if (ledger_.draining || ledger_.stopped || request_timeout_) return;
    for (std::size_t i = 0; i < ledger_.requests.size() && ledger_.ok(); ++i) check_given_up(i);
  }

 private:
  struct Turn {
    std::uint64_t turn;
    Ns at;
    SnapshotPtr fleet;
    std::vector<Breaker> breakers;
  };
  struct Arrival {
    std::uint32_t server;
    std::string model;
    std::uint64_t turn;  // of the choice
    Ns at;
  };
  using Trial = std::pair<std::uint64_t, std::uint64_t>;  // the breaker, and the turn in which its trial began
  struct Suspect {
    Trial trial;  // one request that has this one was the trial
    std::size_t number;
    std::uint32_t server;
    std::uint32_t others;
    Ns at;
    bool second_trial;  // another trial was running when the turn began
  };
  struct Waiting {
    std::int64_t number = -1;
    std::string model;
    bool untried = false;  // it waits for its first backend
    std::uint64_t since = 0;
  };

  struct Sending {
    std::uint64_t since = 0, last = 0;  // turns
  };

  // True if the backend serves any request of the simulated clients for the model.
  static bool serves(const Snapshot& fleet, const BackendView& backend, std::string_view model, Api api) {
    const ModelEntry* entry = fleet.find(model);
    if (entry == nullptr || !backend.healthy) return false;
    return std::any_of(entry->offers.begin(), entry->offers.end(), [&](const Offer& offer) {
      const Capabilities& can = offer.capabilities;
      return &fleet.backends[offer.backend] == &backend && speaks(backend, api) && can.vision && can.tools &&
             can.json_mode && can.context_tokens == 0;
    });
  }
  static bool offers(const Snapshot& fleet, const BackendView& backend, std::string_view model) {
    const ModelEntry* entry = fleet.find(model);
    return entry != nullptr && std::any_of(entry->offers.begin(), entry->offers.end(), [&](const Offer& offer) {
             return &fleet.backends[offer.backend] == &backend;
           });
  }

  // ---- the same backend again ----

  void check_again(std::size_t number, const std::vector<Arrival>& arrivals) {
    const Arrival& last = arrivals.back();
    const auto times = std::count_if(arrivals.begin(), arrivals.end(), [&](const Arrival& arrival) {
      return arrival.server == last.server && arrival.model == last.model;
    });
    if (times < 2) return;
    std::set<std::uint64_t> there;
    freshness_.each_fleet(arrivals.front().at, last.at, [&](const Snapshot& fleet) {
      for (const BackendView& backend : fleet.backends) {
        const bool here = backend.address && server_at(*backend.address) == last.server;
        if (here && offers(fleet, backend, last.model)) there.insert(backend.circuit->server());
      }
    });
    if (static_cast<std::size_t>(times) <= there.size()) return;
    ledger_.wrong("r%zu: came again to server %u, %lld times for %zu backends", number, last.server,
                  static_cast<long long>(times), there.size());
  }

  // ---- an ejected backend ----

  static const Breaker* breaker_of(const Turn& turn, const BackendView& backend) {
    const auto found = std::find_if(turn.breakers.begin(), turn.breakers.end(),
                                    [&](const Breaker& breaker) { return breaker.circuit == backend.circuit; });
    return found == turn.breakers.end() ? nullptr : &*found;
  }

  void check_ejected(std::size_t number, const Arrival& arrival) {
    const auto turn = std::lower_bound(turns_.begin(), turns_.end(), arrival.turn,
                                       [](const Turn& one, std::uint64_t wanted) { return one.turn < wanted; });
    if (turn == turns_.end() || turn->turn != arrival.turn) return;
    std::uint32_t here = 0, others = 0;
    Trial trial;
    bool second_trial = false;
    for (const BackendView& backend : turn->fleet->backends) {
      const Breaker* breaker = breaker_of(*turn, backend);
      if (breaker == nullptr) continue;
      const bool closed = breaker->before == Circuit::closed && breaker->after == Circuit::closed;
      if (breaker->server != arrival.server) {
        others += closed && serves(*turn->fleet, backend, arrival.model, ledger_.requests[number].api->api) ? 1 : 0;
      } else if (offers(*turn->fleet, backend, arrival.model)) {
        here += 1;
        const bool on_trial = breaker->before == Circuit::half_open && is_shut(breaker->after);
        if (!on_trial && (!is_shut(breaker->before) || !is_shut(breaker->after))) return;
        // Its trial may have succeeded, so that it was closed until something else failed.
        if (breaker->before == Circuit::probing && breaker->after == Circuit::open) return;
        if (on_trial && trial != Trial{} && !second_trial) return;  // it may be the trial of either
        const bool begun_before = breaker->before == Circuit::probing && trial == Trial{};
        if (!on_trial && !begun_before) continue;
        trial = {breaker->circuit->server(), arrival.turn};
        second_trial = begun_before;
      }
    }
    if (here > 0 && others > 0) suspects_.push_back({trial, number, arrival.server, others, arrival.at, second_trial});
  }
  // True if a 429 was passed on then. To the client's own key it ends a trial without a result, and another one begins.
  bool told_of_quota(Ns at) const {
    return std::any_of(ledger_.requests.begin(), ledger_.requests.end(),
                       [at](const Request& request) { return request.status == 429 && request.answered_at == at; });
  }
  // True if requests are kept away, unless there is nobody else.
  static bool is_shut(Circuit state) { return state == Circuit::open || state == Circuit::probing; }

  // ---- a failure, and nobody else was asked ----

  void check_given_up(std::size_t number) {
    const Request& request = ledger_.requests[number];
    const std::string& error = request.line_error;
    const bool failed = error == "timeout" || error == "backend_error" || error == "parse_error";
    const bool of_backend = request.attempt >= 0;
    const bool bad_status = request.status == 429 || request.status >= 500;
    if (!failed || request.lines != 1 || request.client_left || request.asked_at < 0 || !bad_status) return;
    if (request.line_attempts == 0 || request.line_attempts > least_retries_ || request.line_cut) return;
    // Without memory for a connection nobody else is asked.
    const auto lacked = std::lower_bound(lacked_.begin(), lacked_.end(), request.asked_at);
    if (lacked != lacked_.end() && *lacked <= request.answered_at) return;
    const std::size_t could = stable(request.asked_at, request.answered_at, request).size();
    if (could <= request.line_attempts) return;
    ledger_.wrong("r%zu: %s (%u%s) after %u attempts, and was not tried on each of %zu backends that could serve it",
                  number, error.c_str(), request.status, of_backend ? ", a backend's" : "", request.line_attempts,
                  could);
  }

  // The breakers of the backends that could serve the model at once, at all times between the two.
  std::set<std::uint64_t> stable(Ns from, Ns to, const Request& request) const {
    std::set<std::uint64_t> out;
    bool first = true;
    freshness_.each_fleet(from, to, [&](const Snapshot& fleet) {
      std::set<std::uint64_t> here;
      for (const BackendView& backend : fleet.backends) {
        const std::uint64_t breaker = backend.circuit->server();
        const bool kept = first || out.contains(breaker);
        if (kept && backend.max_pending == 0 && serves(fleet, backend, request.body.model, request.api->api))
          here.insert(breaker);
      }
      out.swap(here);
      first = false;
    });
    auto turn =
        std::lower_bound(turns_.begin(), turns_.end(), from, [](const Turn& one, Ns at) { return one.at < at; });
    for (; turn != turns_.end() && turn->at <= to; ++turn) {
      for (const Breaker& breaker : turn->breakers) {
        const bool closed = breaker.before == Circuit::closed && breaker.after == Circuit::closed;
        if (!closed) out.erase(breaker.circuit->server());
      }
    }
    return out;
  }

  // ---- the queue ----

  // Of the requests of a key, a place goes to the one that has waited longest for it.
  void look_at_queue(std::uint32_t worker, std::uint64_t turn, const Snapshot& fleet) {
    std::vector<Waiting>& before = waiting_[worker];
    std::vector<Waiting> now;
    std::map<std::int64_t, BackendId> served;  // by request
    gateway_.each_worker()[worker]->sessions().each([&](const auto& session) {
      const ExchangeState state = session.exchange_state();
      if (state < ExchangeState::queued || state > ExchangeState::streaming) return;
      const ExchangeSummary& summary = session.exchange->summary();
      const std::int64_t number = ledger_.number_of(summary.request_id);
      if (state == ExchangeState::sending) note_sending(worker, number, turn);
      if (state != ExchangeState::queued) {
        served.emplace(number, summary.record.backend);
        return;
      }
      const auto known =
          std::find_if(before.begin(), before.end(), [&](const Waiting& one) { return one.number == number; });
      const std::uint64_t since = known == before.end() ? turn : known->since;
      now.push_back({number, summary.model, summary.record.backend == BackendId::none, since});
    });
    last_turns_[worker] = turn;
    for (const Waiting& went : before) {
      const auto at = served.find(went.number);
      if (at == served.end()) continue;
      for (const Waiting& waits : now) check_order(went, at->second, waits, fleet);
    }
    before.swap(now);
  }
  void note_sending(std::uint32_t worker, std::int64_t number, std::uint64_t turn) {
    Sending& sending = sending_[number];
    if (sending.last != last_turns_[worker] || sending.last == 0) sending.since = turn;
    sending.last = turn;
  }

  Api api_of(std::int64_t number) const { return ledger_.requests[static_cast<std::size_t>(number)].api->api; }

  std::string_view key_of(std::int64_t number) const { return ledger_.requests[static_cast<std::size_t>(number)].key; }

  void check_order(const Waiting& went, BackendId backend, const Waiting& waits, const Snapshot& fleet) {
    // Several keys may share an id; and a request that is tried again has its key's place, for which others may wait.
    const bool alike = waits.untried && went.untried && key_of(waits.number) == key_of(went.number);
    if (waits.since >= went.since || waits.since <= unsettled_ || !alike) return;
    const bool could = std::any_of(fleet.backends.begin(), fleet.backends.end(), [&](const BackendView& view) {
      return view.id == backend && serves(fleet, view, waits.model, api_of(waits.number));
    });
    if (!could) return;
    ledger_.wrong("r%lld overtook r%lld in the queue", static_cast<long long>(went.number),
                  static_cast<long long>(waits.number));
  }

  Ledger& ledger_;
  const Wire& wire_;
  const Freshness& freshness_;
  const Gateway& gateway_;
  const Circuits& circuits_;
  std::uint32_t least_retries_ = UINT32_MAX;
  bool request_timeout_ = false;
  std::vector<Turn> turns_;          // those in which a breaker was not closed, in order
  const Snapshot* fleet_ = nullptr;  // the newest
  std::uint64_t lacks_ = 0;
  std::vector<Ns> lacked_;       // when this host lacked something for a connection, in order
  std::uint64_t unsettled_ = 0;  // the last turn with a new fleet, or with a breaker that was not closed
  std::map<std::size_t, std::vector<Arrival>> arrivals_;  // by request
  std::vector<Suspect> suspects_;
  std::array<std::vector<Waiting>, kMostWorkers> waiting_;  // by worker
  std::map<std::int64_t, Sending> sending_;                 // by request
  std::array<std::uint64_t, kMostWorkers> last_turns_{};    // by worker
};

}  // namespace nexus::sim
