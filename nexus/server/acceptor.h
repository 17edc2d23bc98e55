// acceptor.h
// Owns:     a worker's listeners while it accepts, and the choice of the worker for each new connection.
// Promises: [server] max_connections holds exactly over all workers; accepting pauses if no descriptor is free, and
//           resumes by itself.
// Leaves:   the accepted connection to worker.h.
// Threads:  its worker's; the counts of WorkerLoad and Placement are shared by all workers.
// Tested by: tests/client_limits_test.cpp, tests/sim, tests/e2e/limits.test.mjs
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "nexus/base/limits.h"
#include "nexus/net/epoll.h"
#include "nexus/net/timer_wheel.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {

constexpr std::uint8_t kListenerKind = 1;  // of a Handle
constexpr std::uint8_t kAcceptTimerKind = 4;

// The connections that a worker holds or was handed. Counted by the worker that accepts, so that connections on their
// way to another worker count too; given back by the worker that closes. Relaxed: the numbers alone are shared.
struct alignas(64) WorkerLoad {
  std::atomic<std::uint32_t> connections{0};
  std::atomic<bool> stopped{false};  // takes no connections any more
};

struct Placement {
  std::vector<WorkerLoad> loads;
  std::atomic<std::uint32_t> connections{0};  // over all workers, for [server] max_connections; relaxed

  // Counts a new connection for a worker and returns its index: `mine`, or one that holds clearly fewer. Streams are
  // long: chance alone would leave one thread loaded and another idle. Nothing if there are `most` already.
  std::optional<std::uint32_t> take(std::uint32_t mine, std::uint32_t most) {
    if (connections.fetch_add(1, std::memory_order_relaxed) >= most) {
      connections.fetch_sub(1, std::memory_order_relaxed);
      return std::nullopt;
    }
    std::uint32_t fewest = mine;
    const std::uint32_t held_here = loads[mine].connections.load(std::memory_order_relaxed);
    std::uint32_t least = held_here;
    for (std::uint32_t i = 0; i < loads.size(); ++i) {
      const std::uint32_t held = loads[i].connections.load(std::memory_order_relaxed);
      if (held >= least || loads[i].stopped.load(std::memory_order_relaxed)) continue;
      fewest = i;
      least = held;
    }
    if (held_here <= least + least / 16) fewest = mine;
    loads[fewest].connections.fetch_add(1, std::memory_order_relaxed);
    return fewest;
  }

  // A connection could not be handed over to `from`: `to` keeps it.
  void move(std::uint32_t from, std::uint32_t to) {
    loads[from].connections.fetch_sub(1, std::memory_order_relaxed);
    loads[to].connections.fetch_add(1, std::memory_order_relaxed);
  }

  void give_back(std::uint32_t worker) {
    loads[worker].connections.fetch_sub(1, std::memory_order_relaxed);
    connections.fetch_sub(1, std::memory_order_relaxed);
  }
};

// For which clients a listener is.
struct ListenerUse {
  bool metrics_only = false;  // of metrics_listen
  bool tls = false;           // of tls_listen
};

template <class Net>
class Acceptor {
 public:
  explicit Acceptor(WorkerContext<Net>& core) : context_(core), timer_(Handle::make(kAcceptTimerKind, 0, 0)) {}
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  // False if the kernel refuses.
  bool add(typename Net::Socket listener, ListenerUse use) {
    listeners_.push_back({listener, use, 0});
    return watch(listeners_.size() - 1);
  }

  // An event of a listener: accepts its backlog, once in a turn, for the kernel tells of it as long as there is one.
  // Calls `take(socket, peer, use)` for each connection.
  template <class Take>
  void on_event(Handle token, std::uint64_t turn, Take&& take) {
    Listener& listener = listeners_[token.slot()];
    if (std::exchange(listener.turn, turn) != turn) accept_from(listener, kAcceptsPerTurn, take);
  }

  // Accepts all that the kernel has accepted so far. Later connections are accepted only if this is called again.
  template <class Take>
  void stop(Take&& take) {
    if (open_) unwatch_all();
    context_.wheel.cancel(timer_);
    stopped_ = true;
    for (Listener& listener : listeners_) accept_from(listener, kAcceptsAtDrain, take);
  }

  // Resumes accepting after a pause, because a descriptor may be free again. Also called when the pause timer fires.
  void resume() {
    if (stopped_ || open_) return;
    open_ = true;
    for (std::size_t i = 0; i < listeners_.size(); ++i) {
      if (watch(i)) continue;
      context_.slab.limit_hit(Limit::memory);
      return pause();
    }
  }

 private:
  struct Listener {
    typename Net::Socket socket;
    ListenerUse use;
    std::uint64_t turn = 0;  // in which it was last accepted from
  };

  bool watch(std::size_t number) {
    return context_.net.watch_listener(listeners_[number].socket,
                                       Handle::make(kListenerKind, 0, static_cast<std::uint32_t>(number)));
  }

  void unwatch_all() {
    for (Listener& listener : listeners_) context_.net.unwatch(listener.socket);
    open_ = false;
  }

  template <class Take>
  void accept_from(const Listener& listener, std::uint32_t most, Take&& take) {
    for (std::uint32_t i = 0; i < most; ++i) {
      typename Net::Opened opened = context_.net.accept(listener.socket);
      switch (opened.outcome) {
        case SocketOutcome::ok: take(opened.socket, opened.peer, listener.use); break;
        case SocketOutcome::again: return;
        case SocketOutcome::no_port:  // not of accept()
        case SocketOutcome::no_route:
        case SocketOutcome::failed: continue;  // the connection broke before it was accepted
        case SocketOutcome::no_descriptor:
        case SocketOutcome::no_memory:
          context_.slab.limit_hit(opened.outcome == SocketOutcome::no_memory ? Limit::memory : Limit::descriptors);
          return pause();
      }
    }
  }

  // The connections wait in the backlog; trying again in every turn would only spin.
  void pause() {
    if (!open_) return;
    unwatch_all();
    context_.wheel.arm(timer_, context_.now + kAcceptPause);
  }

  WorkerContext<Net>& context_;
  std::vector<Listener> listeners_;
  Timer timer_;
  bool open_ = true;
  bool stopped_ = false;
};

}  // namespace nexus
