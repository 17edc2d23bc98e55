// upstream_pool.h
// Owns:     the worker's connections to backends: each in use by one exchange, or idle and kept for the next.
// Promises: an idle connection on which anything comes (bytes, FIN, reset) is closed, if not before, then when it is to
//           be taken: bytes before the request are no answer to it (RFC 9112 9.2); the most recently used one is taken
//           first, so that the others can time out; the counts per backend are exact. Unless idle_connections sets a
//           bound, a connection is kept for idle_timeout: so many are open as were in use at once within that time,
//           and when there is no descriptor for a new one, idle ones are closed.
// Leaves:   the bytes on a connection to exchange.h.
// Threads:  one worker's.
// Tested by: tests/upstream_pool_test.cpp, tests/sim, tests/e2e/proxy.test.mjs
#pragma once

#include <algorithm>
#include <cassert>
#include <vector>

#include "nexus/net/connection.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {

constexpr std::uint8_t kUpstreamKind = 3;  // of a Handle

template <class Net>
struct Upstream {
  Upstream(Handle handle_in, BackendId backend_in, const Address& address_in)
      : handle(handle_in), backend(backend_in), address(address_in), timer(handle_in) {}

  Handle handle;
  Connection<Net> connection;
  BackendId backend;
  Address address;
  Handle owner;                        // the session whose exchange uses it; its value is 0 while idle
  std::uint64_t snapshot_version = 0;  // the last one in which the backend had this address
  bool reused = false;                 // for a second or later exchange
  Timer timer;                         // runs while idle
  Upstream* newer = nullptr;
  Upstream* older = nullptr;
};

template <class Net>
class UpstreamPool {
 public:
  explicit UpstreamPool(WorkerContext<Net>& core) : context_(core), upstreams_(kUpstreamKind) {}
  UpstreamPool(const UpstreamPool&) = delete;
  UpstreamPool& operator=(const UpstreamPool&) = delete;
  ~UpstreamPool() {
    upstreams_.each([this](Upstream<Net>& upstream) { drop(upstream); });
  }

  Upstream<Net>* get(Handle handle) { return upstreams_.get(handle); }

  // An idle connection to `backend` at `address`, or nullptr.
  Upstream<Net>* take_idle(BackendId backend, const Address& address, Handle owner) {
    if (index_of(backend) >= lines_.size()) return nullptr;
    while (Upstream<Net>* upstream = lines_[index_of(backend)].newest) {
      unlink(*upstream);
      if (upstream->address == address && upstream->connection.is_quiet(context_.net)) {
        context_.wheel.cancel(upstream->timer);
        upstream->owner = owner;
        return upstream;
      }
      drop(*upstream);
    }
    return nullptr;
  }

  // Starts a new connection: sets `upstream` if the outcome is `ok`.
  SocketOutcome connect(BackendId backend, const Address& address, Handle owner, Upstream<Net>*& upstream) {
    Upstream<Net>* const made = upstreams_.make(backend, address);
    if (made == nullptr) return SocketOutcome::no_memory;
    SocketOutcome outcome = made->connection.connect(context_.net, address, made->handle);
    if (outcome == SocketOutcome::no_descriptor && shed()) {
      outcome = made->connection.connect(context_.net, address, made->handle);
    }
    if (outcome != SocketOutcome::ok) {
      upstreams_.destroy(made->handle);
      return outcome;
    }
    made->owner = owner;
    context_.slab.add_backend_connections(backend, 1);
    upstream = made;
    return outcome;
  }

  // Keeps a connection after an exchange that left it usable.
  void give_back(Upstream<Net>& upstream) {
    const UpstreamSettings& settings = context_.settings().upstream;
    if (!make_room(lines_, index_of(upstream.backend))) return drop(upstream);
    Line& line = lines_[index_of(upstream.backend)];
    upstream.owner = Handle{};
    if (upstream.snapshot_version != context_.snapshot->version) {  // made before a reload
      if (!belongs(upstream, *context_.snapshot)) return drop(upstream);
      upstream.snapshot_version = context_.snapshot->version;
    }
    const bool full = line.idle >= settings.idle_connections;  // never if it is kAutomatic
    const bool quiet = !upstream.connection.hangup() && !upstream.connection.may_read();
    if (context_.draining || !quiet || full) return drop(upstream);
    upstream.reused = true;
    upstream.newer = nullptr;
    upstream.older = line.newest;
    if (line.newest != nullptr) line.newest->newer = &upstream;
    line.newest = &upstream;
    line.idle += 1;
    context_.wheel.arm(upstream.timer, deadline_after(context_.now, settings.idle_timeout_ns));
  }

  // Closes a connection, in use or (unlinked) idle.
  void drop(Upstream<Net>& upstream) {
    upstream.connection.close(context_.net);
    context_.slab.add_backend_connections(upstream.backend, -1);
    upstreams_.destroy(upstream.handle);
  }

  // Closes an idle connection: whatever it reports, it cannot be used again.
  void on_idle_event(Upstream<Net>& upstream, const Event& event) {
    assert(upstream.owner.value == 0);
    if (!event.readable && !event.hangup) return;
    unlink(upstream);
    drop(upstream);
  }

  void on_deadline(Handle handle) {
    Upstream<Net>* upstream = upstreams_.get(handle);
    if (upstream == nullptr || upstream->owner.value != 0) return;
    unlink(*upstream);
    drop(*upstream);
  }

  // Closes the idle connections to backends that are not in `snapshot`, or have another address there.
  void forget_departed(const Snapshot& snapshot) {
    for (std::uint32_t i = 0; i < lines_.size(); ++i) {
      for (Upstream<Net>* upstream = lines_[i].newest; upstream != nullptr;) {
        Upstream<Net>* const older = upstream->older;
        if (!belongs(*upstream, snapshot)) {
          unlink(*upstream);
          drop(*upstream);
        }
        upstream = older;
      }
    }
  }

  // Closes up to kShedAtOnce idle connections, because descriptors are short. False if there is none. Not
  // for newcomers that wait to be accepted: requests of those who are in need the idle ones.
  [[gnu::cold]] bool shed() {
    const auto fullest =
        std::max_element(lines_.begin(), lines_.end(), [](const Line& a, const Line& b) { return a.idle < b.idle; });
    if (fullest == lines_.end() || fullest->idle == 0) return false;
    for (std::uint32_t i = 0; i < kShedAtOnce && fullest->newest != nullptr; ++i) {
      Upstream<Net>& upstream = *fullest->newest;
      unlink(upstream);
      drop(upstream);
    }
    return true;
  }

  std::size_t open() const { return upstreams_.live(); }

 private:
  static bool belongs(const Upstream<Net>& upstream, const Snapshot& snapshot) {
    return std::any_of(snapshot.backends.begin(), snapshot.backends.end(), [&](const BackendView& backend) {
      return backend.id == upstream.backend && backend.address == upstream.address;
    });
  }

  struct Line {
    Upstream<Net>* newest = nullptr;
    std::uint32_t idle = 0;
  };

  void unlink(Upstream<Net>& upstream) {
    Line& line = lines_[index_of(upstream.backend)];
    (upstream.newer == nullptr ? line.newest : upstream.newer->older) = upstream.older;
    if (upstream.older != nullptr) upstream.older->newer = upstream.newer;
    upstream.newer = upstream.older = nullptr;
    line.idle -= 1;
  }

  WorkerContext<Net>& context_;
  SlotMap<Upstream<Net>> upstreams_;
  std::vector<Line> lines_;  // by BackendId
};

}  // namespace nexus
