// circuits.h
// Owns:     the circuit breakers of a run, as they are before and after each turn of a loop.
// Promises: looks only; a breaker that a reload replaces is not looked at any more.
// Leaves:   which change is wrong to blame.h, which request is wrong to policy.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "swarm.h"
#include "tests/lib/gateway.h"

namespace nexus::sim {

enum class Circuit : std::uint8_t {
  closed,
  half_open,
  probing,
  open,  // the time of the ejection runs
};

struct Breaker {
  std::shared_ptr<CircuitBreaker> circuit;
  BackendId backend{};
  std::uint32_t server = 0;  // of the simulated ones
  Circuit before = Circuit::closed;
  Circuit after = Circuit::closed;
  // An `ok` may not count for it: a reload has replaced the one before, which still gets the results of earlier
  // attempts, or it was closed by the first byte of a trial, whose `ok` comes later.
  bool lax = false;
  Ns until = 0;                // the end of its last ejection; 0: there was none
  bool ejected = false;        // in this turn, or for longer than before
  std::uint32_t failures = 0;  // at most so many of the backend's own came one after the other: see blame.h
};

class Circuits {
 public:
  // The fleet that the workers were given last. False if a backend at another address has kept its breaker: what was
  // true of one server says nothing of another.
  bool note(const Snapshot& fleet) {
    std::vector<Breaker> next;
    bool well = true;
    for (const BackendView& view : fleet.backends) {
      if (!view.address) continue;
      const auto known = std::find_if(all_.begin(), all_.end(),
                                      [&](const Breaker& breaker) { return breaker.circuit == view.circuit; });
      if (known != all_.end()) {
        well &= known->server == server_at(*view.address);
        next.push_back(*known);
        continue;
      }
      Breaker& made = next.emplace_back();
      made.circuit = view.circuit;
      made.backend = view.id;
      made.server = server_at(*view.address);
      made.lax = std::any_of(all_.begin(), all_.end(), [&](const Breaker& old) { return old.backend == view.id; });
    }
    all_ = std::move(next);
    return well;
  }

  void begin_turn(Ns now) {
    for (Breaker& breaker : all_) breaker.before = state_of(breaker, now);
  }
  void end_turn(Ns now) {
    for (Breaker& breaker : all_) {
      const auto ejection = breaker.circuit->ejection(now);
      const Ns until = ejection && ejection->left_ns > 0 ? now + ejection->left_ns : 0;
      breaker.ejected = until > breaker.until;
      if (until > 0) breaker.until = until;
      breaker.after = state_of(breaker, now);
      breaker.lax |= breaker.before == Circuit::probing && breaker.after == Circuit::closed;
    }
  }

  std::vector<Breaker>& all() { return all_; }
  const std::vector<Breaker>& all() const { return all_; }
  bool all_closed() const {
    return std::all_of(all_.begin(), all_.end(), [](const Breaker& breaker) {
      return breaker.before == Circuit::closed && breaker.after == Circuit::closed;
    });
  }

 private:
  // A permit that is given back at once changes nothing.
  static Circuit state_of(const Breaker& breaker, Ns now) {
    if (const auto ejection = breaker.circuit->ejection(now)) {
      return ejection->left_ns > 0 ? Circuit::open : Circuit::probing;
    }
    if (breaker.until == 0) return Circuit::closed;
    return breaker.circuit->enter(now).is_probe() ? Circuit::half_open : Circuit::closed;
  }

  std::vector<Breaker> all_;
};

}  // namespace nexus::sim
