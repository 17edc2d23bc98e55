// upkeep.h
// Owns:     the check of what Nexus must do without being asked: act on each deadline when it has passed, end a request
//           whose client has left or whose model is gone, serve others from a backend as soon as its trial succeeds,
//           let go of the connection to a backend that a request gives back while it drains, and of one on which
//           something comes that nobody asked for.
// Promises: judges after each turn, by the deadlines and states of the sessions and by what the servers know of their
//           connections. A state that a pending event, turn or message may end is wrong only if it lasts.
// Leaves:   what is left at rest to audit.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "circuits.h"
#include "fleet.h"
#include "tests/lib/gateway.h"

namespace nexus::sim {

class Upkeep {
 public:
  Upkeep(Ledger& ledger, Wire& wire, const Fleet& fleet, const Gateway& gateway, const Circuits& circuits, Ns slack_ns)
      : ledger_(ledger), wire_(wire), fleet_(fleet), gateway_(gateway), circuits_(circuits), slack_ns_(slack_ns) {}

  // After a turn of this worker.
  void end_turn(std::uint32_t worker) {
    if (gateway_.ended(worker)) return;
    check_deadlines(*gateway_.each_worker()[worker]);
    if (ledger_.memory_faults) return;
    check_requests(worker);
    check_unread(worker);
    check_trials();
    if (ledger_.draining) check_drain(worker);
  }

 private:
  // Conditions, each by a key, and since when each has held at every look.
  template <class Key>
  class Lasting {
   public:
    // All that holds now. Returns one that has held for longer than `most`, if any.
    std::optional<Key> note(const std::vector<Key>& holds, Ns now, Ns most) {
      std::map<Key, Ns> next;
      std::optional<Key> longest;
      for (const Key& key : holds) {
        const auto before = since_.find(key);
        const Ns since = before == since_.end() ? now : before->second;
        if (now - since > most) longest = key;
        next.emplace(key, since);
      }
      since_.swap(next);
      return longest;
    }

   private:
    std::map<Key, Ns> since_;
  };
  using Life = std::pair<LinkId, std::uint32_t>;  // a link, and its generation

  // A request whose client has left costs its backend work; one whose model is gone can get no place.
  void check_requests(std::uint32_t worker) {
    const SnapshotPtr& fleet = gateway_.control().published();
    std::vector<Life> left;
    std::vector<std::string> hopeless;
    gateway_.each_worker()[worker]->sessions().each([&](const auto& session) {
      const ExchangeState state = session.exchange_state();
      if (state < ExchangeState::queued || state > ExchangeState::streaming) return;
      const LinkId id = link_of(session.client_name);
      const Link& link = wire_.at(id);
      if (link.reset_seen || link.to_nexus.fin_arrived) left.emplace_back(id, link.generation);
      const ExchangeSummary& summary = session.exchange->summary();
      const bool waits = state == ExchangeState::queued && fleet->find(summary.model) == nullptr;
      if (waits) hopeless.emplace_back(summary.request_id);
    });
    if (const auto life = left_[worker].note(left, wire_.now(), slack_ns_)) {
      ledger_.wrong("client %u has left, and its request goes on", wire_.at(life->first).peer);
    }
    if (const auto id = hopeless_[worker].note(hopeless, wire_.now(), slack_ns_)) {
      ledger_.wrong("%s waits in the queue for a model that no backend has any more", id->c_str());
    }
  }
  // SimNet gives each client's connection a port of its own.
  static LinkId link_of(std::string_view client_name) {
    const std::string port(client_name.substr(client_name.rfind(':') + 1));
    return static_cast<LinkId>(std::stoul(port) - 1024);
  }

  // The worker's open connections to backends of which this holds.
  template <class Holds>
  std::vector<Life> upstreams_of(std::uint32_t worker, Holds&& holds) const {
    std::vector<Life> found;
    for (LinkId id = 0; id < wire_.all_links(); ++id) {
      const Link& link = wire_.at(id);
      const bool here =
          link.live && link.to_backend && link.nexus_open && link.loop == static_cast<std::int32_t>(worker);
      if (here && holds(id)) found.emplace_back(id, link.generation);
    }
    return found;
  }

  // An idle connection with bytes on it cannot be used again, and takes up a place.
  void check_unread(std::uint32_t worker) {
    const std::vector<Life> unread = upstreams_of(
        worker, [this](LinkId id) { return wire_.at(id).to_nexus.unread() > 0 && fleet_.is_done_with(id); });
    if (const auto life = unread_[worker].note(unread, wire_.now(), slack_ns_)) {
      ledger_.wrong("an idle connection to server %u is kept with bytes on it", wire_.at(life->first).peer);
    }
  }

  // An ejected backend waits for the answer to one request, and no longer.
  void check_trials() {
    std::vector<std::uint64_t> begun;
    for (const Breaker& breaker : circuits_.all()) {
      const bool on_trial = has_unanswered(breaker.backend) || fleet_.owes_first(breaker.server);
      if (breaker.after == Circuit::probing && !on_trial) {
        begun.push_back(breaker.circuit->server());
      }
    }
    if (trials_.note(begun, wire_.now(), slack_ns_)) {
      ledger_.wrong("a backend stays ejected, though the request on trial is answered or over");
    }
  }
  bool has_unanswered(BackendId backend) const {
    bool found = false;
    for (const auto& worker : gateway_.each_worker()) {
      worker->sessions().each([&](const auto& session) {
        const ExchangeState state = session.exchange_state();
        const bool waits = state >= ExchangeState::choosing && state <= ExchangeState::holding;
        found |= waits && session.exchange->summary().record.backend == backend;
      });
    }
    return found;
  }

  void check_deadlines(SimWorker& worker) {
    worker.sessions().each([this](const auto& session) {
      const Ns late = session.timer.armed() ? wire_.now() - session.timer.deadline() : 0;
      if (late <= slack_ns_) return;
      ledger_.wrong("%s: its deadline passed %lld ms ago, and nothing happened", session.client_name.c_str(),
                    static_cast<long long>(late / kMillisecond));
    });
  }

  // Those that were idle when the drain began may stay until its end.
  void check_drain(std::uint32_t worker) {
    std::vector<Life> idle = upstreams_of(worker, [this](LinkId id) { return fleet_.is_idle(id); });
    Drained& drained = drained_[worker];
    for (const Life& one : idle) {
      const bool before = contains(drained.at_first, one), again = contains(drained.idle, one);
      if (drained.turns < kKnowsOfIt || before || !again) continue;
      ledger_.wrong("a worker that drains keeps an idle connection to server %u", wire_.at(one.first).peer);
    }
    if (drained.turns <= kKnowsOfIt) drained.at_first = idle;
    drained.turns += 1;
    drained.idle.swap(idle);
  }

  struct Drained {
    std::uint32_t turns = 0;  // since the drain
    std::vector<Life> idle;   // at the end of the last one
    std::vector<Life> at_first;
  };
  static constexpr std::uint32_t kKnowsOfIt = 2;  // turns
  static bool contains(const std::vector<Life>& all, const Life& one) {
    return std::find(all.begin(), all.end(), one) != all.end();
  }

  Ledger& ledger_;
  Wire& wire_;
  const Fleet& fleet_;
  const Gateway& gateway_;
  const Circuits& circuits_;
  const Ns slack_ns_;
  std::array<Lasting<Life>, kMostWorkers> left_, unread_;
  std::array<Lasting<std::string>, kMostWorkers> hopeless_;
  Lasting<std::uint64_t> trials_;
  std::array<Drained, kMostWorkers> drained_;
};

}  // namespace nexus::sim
