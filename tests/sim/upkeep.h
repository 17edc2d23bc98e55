// upkeep.h
// Owns:     the check of what Nexus must do without being asked: act on each deadline when it has passed, and let go of
//           the connection to a backend that a request gives back while it drains.
// Promises: judges after each turn, by the deadlines of the sessions and by what the servers know of their connections.
// Leaves:   what is left at rest to audit.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "fleet.h"
#include "tests/lib/gateway.h"

namespace nexus::sim {

class Upkeep {
 public:
  Upkeep(Ledger& ledger, Wire& wire, const Fleet& fleet, const Gateway& gateway, Ns slack_ns)
      : ledger_(ledger), wire_(wire), fleet_(fleet), gateway_(gateway), slack_ns_(slack_ns) {}

  // After a turn of this worker.
  void end_turn(std::uint32_t worker) {
    if (gateway_.ended(worker)) return;
    check_deadlines(*gateway_.each_worker()[worker]);
    if (ledger_.draining && !ledger_.memory_faults) check_drain(worker);
  }

 private:
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
    std::vector<Idle> idle;
    for (std::size_t i = 0; i < wire_.all_links(); ++i) {
      const auto id = static_cast<LinkId>(i);
      const Link& link = wire_.at(id);
      const bool here =
          link.live && link.to_backend && link.nexus_open && link.loop == static_cast<std::int32_t>(worker);
      if (here && fleet_.is_idle(id)) idle.push_back({id, link.generation});
    }
    Drained& drained = drained_[worker];
    for (const Idle& one : idle) {
      const bool before = contains(drained.at_first, one), again = contains(drained.idle, one);
      if (drained.turns < kKnowsOfIt || before || !again) continue;
      ledger_.wrong("a worker that drains keeps an idle connection to server %u", wire_.at(one.link).peer);
    }
    if (drained.turns <= kKnowsOfIt) drained.at_first = idle;
    drained.turns += 1;
    drained.idle.swap(idle);
  }

  struct Idle {
    LinkId link;
    std::uint32_t generation;
    bool operator==(const Idle&) const = default;
  };
  struct Drained {
    std::uint32_t turns = 0;  // since the drain
    std::vector<Idle> idle;   // at the end of the last one
    std::vector<Idle> at_first;
  };
  static constexpr std::uint32_t kKnowsOfIt = 2;  // turns
  static bool contains(const std::vector<Idle>& all, const Idle& one) {
    return std::find(all.begin(), all.end(), one) != all.end();
  }

  Ledger& ledger_;
  Wire& wire_;
  const Fleet& fleet_;
  const Gateway& gateway_;
  const Ns slack_ns_;
  std::array<Drained, kMostWorkers> drained_;
};

}  // namespace nexus::sim
