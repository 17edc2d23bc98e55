// probe_loop.h
// Owns:     the event loop of a command that resolves names and sends probes, and waits for both.
// Promises: a result for every lookup and every probe, within its time limit.
// Leaves:   probing to prober.h, DNS to resolver.h; the results to check.h and top.h.
// Threads:  the main thread's.
// Tested by: tests/e2e/check.test.mjs, tests/e2e/top.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <utility>

#include "nexus/fleet/prober.h"
#include "nexus/net/epoll.h"
#include "nexus/net/resolver.h"
#include "nexus/net/timer_wheel.h"

namespace nexus {

class ProbeLoop {
 public:
  using Done = std::function<void(ProbeResult&&)>;

  ProbeLoop(Resolver::Answer resolved, Done done)
      : resolver_(net_, std::move(resolved)), prober_(net_, wheel_, blocks_, json_), done_(std::move(done)) {}

  // 0, or errno.
  int open() { return net_.open(); }

  // False if too many lookups are waiting.
  bool lookup(const HostPort& where, std::uint64_t id) { return resolver_.lookup(where.host, where.port, id); }

  void start(const ProbeOrder& order) { prober_.start(order, net_.now(), done_); }

  // Waits for events and handles them.
  void turn() {
    std::array<Event, EpollNet::kMaxEvents> events;
    bool woken = false;
    const std::size_t count = net_.wait(events, std::min(wheel_.next(), resolver_.next()), woken);
    for (std::size_t i = 0; i < count; ++i) {
      if (events[i].token.kind() == kResolverKind) {
        resolver_.on_event(events[i]);
      } else {
        prober_.on_event(events[i], net_.now(), done_);
      }
    }
    resolver_.step();
    wheel_.fire(net_.now(), [this](Handle token) { prober_.on_deadline(token, net_.now(), done_); });
  }

 private:
  EpollNet net_;
  TimerWheel wheel_{monotonic_now()};
  BlockPool blocks_;
  JsonReader json_;
  Resolver resolver_;
  Prober<EpollNet> prober_;
  Done done_;
};

}  // namespace nexus
