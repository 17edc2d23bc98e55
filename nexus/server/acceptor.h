// acceptor.h
// Owns:     a worker's listeners while it takes connections from them, and which worker gets each new one.
// Promises: [server] max_connections holds exactly over all workers; accepting pauses where there is no descriptor, and
//           goes on by itself.
// Leaves:   what a connection becomes to worker.h.
// Threads:  its worker's; the counts of WorkerLoad and Placement are every worker's.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "nexus/net/epoll.h"
#include "nexus/net/timer_wheel.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {

constexpr std::uint8_t kListenerKind = 1;  // of a Handle
constexpr std::uint8_t kAcceptTimerKind = 4;

constexpr std::uint32_t kAcceptsPerTurn = 64;
constexpr Ns kAcceptPause = 100 * kMillisecond;  // after a descriptor was not to be had

// How many connections each worker holds or was handed: counted by the worker that places a new one, so that those on
// their way to another count too; given back by the one that closes it. Relaxed: numbers alone.
struct alignas(64) WorkerLoad {
  std::atomic<std::uint32_t> connections{0};
  std::atomic<bool> stopped{false};  // it takes none any more
};

struct Placement {
  std::vector<WorkerLoad> loads;
  std::atomic<std::uint32_t> connections{0};  // over all workers, for [server] max_connections; relaxed

  // The worker for a new connection, which is counted there: `mine`, or the one that holds clearly fewer. Streams are
  // long, and chance alone would leave one thread loaded and another idle. Nothing where there are `most` already.
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

  // The one for `from` could not be handed over: `to` keeps it.
  void move(std::uint32_t from, std::uint32_t to) {
    loads[from].connections.fetch_sub(1, std::memory_order_relaxed);
    loads[to].connections.fetch_add(1, std::memory_order_relaxed);
  }

  void give_back(std::uint32_t worker) {
    loads[worker].connections.fetch_sub(1, std::memory_order_relaxed);
    connections.fetch_sub(1, std::memory_order_relaxed);
  }
};

template <class Net>
class Acceptor {
 public:
  explicit Acceptor(WorkerContext<Net>& core) : context_(core), timer_(Handle::make(kAcceptTimerKind, 0, 0)) {}
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  // False where the kernel refuses.
  bool add(typename Net::Socket listener, bool metrics_only) {
    listeners_.push_back({listener, metrics_only});
    return watch(listeners_.size() - 1);
  }

  // An event of a listener: takes what waits there, `take(socket, peer, metrics_only)` each.
  template <class Take>
  void on_event(Handle token, Take&& take) {
    accept_from(listeners_[token.slot()], take);
  }

  // Takes what was let in before, then nothing any more.
  template <class Take>
  void stop(Take&& take) {
    if (open_) {
      for (Listener& listener : listeners_) accept_from(listener, take);
    }
    unwatch_all();
    context_.wheel.cancel(timer_);
    stopped_ = true;
  }

  // Where accepting paused: a descriptor may be to be had again. Also what its timer's deadline calls for.
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
    bool metrics_only;
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
  void accept_from(const Listener& listener, Take&& take) {
    for (std::uint32_t i = 0; i < kAcceptsPerTurn; ++i) {
      typename Net::Opened opened = context_.net.accept(listener.socket);
      switch (opened.outcome) {
        case SocketOutcome::ok: take(opened.socket, opened.peer, listener.metrics_only); break;
        case SocketOutcome::again: return;
        case SocketOutcome::failed: continue;  // that connection broke before it was taken
        case SocketOutcome::no_descriptor:
        case SocketOutcome::no_memory:
          context_.slab.limit_hit(opened.outcome == SocketOutcome::no_memory ? Limit::memory : Limit::descriptors);
          return pause();
      }
    }
  }

  // The connections wait in the backlog; looking at them in every turn would only spin.
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
