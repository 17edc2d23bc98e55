// pool_stage.h
// Owns:     a worker's context and its pool of connections to backends on a scripted network, without the worker: for
//           tests that command the pool themselves. Backend n has the port kFirstPort + n.
// Promises: nothing happens except what the test does; each event and deadline reaches the pool as from worker.h.
// Leaves:   what the far ends do to the tests.
// Threads:  one.
// Tested by: tests/upstream_pool_test.cpp, tests/attempt_test.cpp
#pragma once

#include <array>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "nexus/proxy/upstream_pool.h"
#include "tests/lib/script.h"

namespace nexus::sim {

class PoolStage {
 public:
  using Pool = UpstreamPool<SimNet>;
  static constexpr std::uint16_t kFirstPort = 8001;
  static constexpr Ns kIdleTime = 10 * kSecond;

  explicit PoolStage(std::uint32_t backends = 1, std::uint32_t most_idle = kAutomatic) {
    script.wire.on_ready = [this](std::uint32_t, LinkId link) { net.make_ready(link); };
    reload(backends, most_idle);
  }

  static BackendId id(std::uint32_t n) { return BackendId{n}; }
  static Address address(std::uint32_t n) {
    return *parse_address("10.0.0.1", static_cast<std::uint16_t>(kFirstPort + n));
  }
  static Handle owner() { return Handle::make(1, 1, 1); }

  // A snapshot with the backends `first` to `backends` - 1, as the worker takes one of a reload.
  void reload(std::uint32_t backends, std::uint32_t most_idle = kAutomatic, std::uint32_t first = 0) {
    auto settings = std::make_shared<Settings>();
    settings->upstream.idle_connections = most_idle;
    settings->upstream.idle_timeout_ns = kIdleTime;
    auto snapshot = std::make_shared<Snapshot>();
    snapshot->version = ++version_;
    snapshot->settings = std::move(settings);
    for (std::uint32_t n = first; n < backends; ++n) {
      BackendView view;
      view.id = id(n);
      view.name = "b" + std::to_string(n);
      view.address = address(n);
      view.circuit = std::make_shared<CircuitBreaker>(n + 1);
      view.facts = std::make_shared<ServerFacts>();
      snapshot->backends.push_back(std::move(view));
    }
    context.use(std::make_unique<LocalSnapshot>(LocalSnapshot{snapshot, 0}));
    pool.forget_departed(*snapshot);
  }

  // Everything that can happen now happens.
  void settle() {
    context.now = net.now();
    for (int i = 0; i < 10; ++i) {
      script.deliver();
      for (const Event& event : note_events()) on_event(event);
    }
    context.wheel.fire(context.now, [this](Handle handle) { pool.on_deadline(handle); });
    script.deliver();
  }
  void pass(Ns span) {
    script.wire.advance(net.now() + span);
    settle();
  }

  // One wait. The connections have noted the events, which are not handled yet.
  std::span<const Event> note_events() {
    bool woken = false;
    const std::size_t count = net.wait(events_, net.now(), woken);
    for (std::size_t at = 0; at < count; ++at) pool.note(events_[at]);
    return {events_.data(), count};
  }

  // A new connection that can be used.
  Upstream<SimNet>& open(std::uint32_t n = 0) {
    Upstream<SimNet>* made = nullptr;
    [[maybe_unused]] const SocketOutcome outcome = pool.connect(id(n), address(n), owner(), made);
    assert(outcome == SocketOutcome::ok);
    settle();
    [[maybe_unused]] const bool established = made->connection.establish(net).ok();
    assert(established);
    return *made;
  }
  // `count` connections at once, all idle; the first one is the oldest.
  void keep(std::uint32_t count, std::uint32_t n = 0) {
    std::vector<Upstream<SimNet>*> made;
    for (std::uint32_t i = 0; i < count; ++i) made.push_back(&open(n));
    for (Upstream<SimNet>* one : made) pool.give_back(*one);
    settle();
  }
  Upstream<SimNet>* take(std::uint32_t n = 0) { return pool.take_idle(id(n), address(n), owner()); }

  std::int64_t counted(std::uint32_t n = 0) const {
    const BackendCounters* cells = slab.backend(id(n));
    return cells == nullptr ? 0 : cells->connections.read_signed();
  }
  // The far ends that Nexus has not closed, as their numbers in the order in which they were made.
  std::vector<std::size_t> open_ends() {
    std::vector<std::size_t> out;
    for (std::size_t i = 0; i < script.peers.size(); ++i) {
      if (!script.closed(script.peers[i])) out.push_back(i);
    }
    return out;
  }

  Script script;
  SimNet net{script.wire, 0};
  Metrics metrics;
  BodyBudget budget{1u << 20};
  Admission admission{[](std::uint32_t, Handle) {}};
  std::atomic<std::uint32_t> in_flight{0};
  Shared shared{metrics, admission, budget, in_flight, "nexus-00000000"};
  Slab slab;
  Log log;
  WorkerContext<SimNet> context{net, shared, slab, log, 0, 1, empty()};
  Pool pool{context};

 private:
  static SnapshotPtr empty() {
    auto snapshot = std::make_shared<Snapshot>();
    snapshot->settings = std::make_shared<Settings>();
    return snapshot;
  }

  void on_event(const Event& event) {
    Upstream<SimNet>* upstream = pool.get(event.token);
    if (upstream == nullptr) return;
    if (upstream->owner.value == 0) pool.on_idle_event(*upstream);
  }

  std::array<Event, SimNet::kMaxEvents> events_;
  std::uint64_t version_ = 0;
};

}  // namespace nexus::sim
