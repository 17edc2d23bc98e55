// upstream_pool.h
// Owns:     the worker's connections to backends: each in use by one exchange, or idle and kept for the next.
// Promises: an idle connection on which anything comes (bytes, FIN, reset) is closed, if not before, then when it is to
//           be taken: bytes before the request are no answer to it (RFC 9112 9.2). A wait tells of all connections, and
//           holds for kFreshEvents; after a large read, and if the wait left events with the kernel, that is asked
//           about the one that is to be taken. The most recently used one is taken first, so that the others can time
//           out; the counts per backend are exact. Unless idle_connections sets a bound, a connection is kept for
//           idle_timeout: so many are open as were in use at once within that time, and when there is no descriptor for
//           a new one, idle ones are closed.
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

using SharedTls = std::shared_ptr<const TlsClient>;  // null: clear text
inline std::uint64_t identity_of(const SharedTls& tls) { return tls == nullptr ? 0 : tls->identity(); }

template <class Net>
struct Upstream {
  Upstream(Handle handle_in, BackendId backend_in, const Address& address_in)
      : handle(handle_in), backend(backend_in), address(address_in), timer(handle_in) {}

  Handle handle;
  Connection<Net> connection;
  BackendId backend;
  Address address;
  std::uint64_t tls_identity = 0;      // of the context that it was made with; 0: clear text
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

  // Records an event of a connection, in use or idle. Call for every event of a wait before any is handled. True if an
  // exchange uses the connection.
  bool note(const Event& event) {
    if (event.token.kind() != kUpstreamKind) return false;
    Upstream<Net>* const upstream = upstreams_.get(event.token);
    if (upstream == nullptr) return false;
    upstream->connection.note(event);
    return upstream->owner.value != 0;
  }

  // An idle connection to `backend` at `address`, or nullptr.
  Upstream<Net>* take_idle(BackendId backend, const Address& address, Handle owner, const SharedTls& tls = nullptr) {
    if (index_of(backend) >= lines_.size()) return nullptr;
    while (Upstream<Net>* upstream = lines_[index_of(backend)].newest) {
      unlink(*upstream);
      const bool same = upstream->address == address && upstream->tls_identity == identity_of(tls);
      if (same && is_quiet(upstream->connection)) {
        context_.wheel.cancel(upstream->timer);
        upstream->owner = owner;
        return upstream;
      }
      drop(*upstream);
    }
    return nullptr;
  }

  // Starts a new connection: sets `upstream` if the outcome is `ok`.
  SocketOutcome connect(BackendId backend, const Address& address, Handle owner, Upstream<Net>*& upstream,
                        const SharedTls& tls = nullptr) {
    Upstream<Net>* const made = upstreams_.make(backend, address);
    if (made == nullptr) return SocketOutcome::no_memory;
    made->tls_identity = identity_of(tls);
    const TlsTicket* const ticket = ticket_for(*made);
    SocketOutcome outcome = made->connection.connect(context_.net, address, made->handle, tls, ticket);
    if (outcome == SocketOutcome::no_descriptor && shed()) {
      outcome = made->connection.connect(context_.net, address, made->handle, tls, ticket);
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
    keep_ticket(line, upstream);
    const bool drained = !upstream.connection.may_read() || upstream.connection.is_quiet(context_.net);
    const bool quiet = drained && !upstream.connection.hangup();
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

  // Closes an idle connection on which bytes or the end have come: it cannot be used again. TLS has messages of its
  // own, which are none of these.
  void on_idle_event(Upstream<Net>& upstream) {
    assert(upstream.owner.value == 0);
    if (!upstream.connection.may_read() && !upstream.connection.hangup()) return;
    if (upstream.connection.tls() != nullptr && upstream.connection.is_quiet(context_.net)) return;
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
  // Frees the memory of connections that were closed. Returns its size, in bytes.
  std::size_t trim() { return upstreams_.trim(); }

 private:
  // True if nothing has come on an idle connection.
  bool is_quiet(Connection<Net>& connection) {
    const bool known = context_.events_fresh && !connection.may_read() && !connection.hangup();
    return known || connection.is_quiet(context_.net);
  }

  static bool belongs(const Upstream<Net>& upstream, const Snapshot& snapshot) {
    return std::any_of(snapshot.backends.begin(), snapshot.backends.end(), [&](const BackendView& backend) {
      return backend.id == upstream.backend && backend.address == upstream.address &&
             identity_of(backend.tls) == upstream.tls_identity;
    });
  }

  struct Line {
    Upstream<Net>* newest = nullptr;
    std::uint32_t idle = 0;
    TlsTicket ticket;  // of the last connection that got one
    std::uint64_t ticket_identity = 0;
  };

  const TlsTicket* ticket_for(const Upstream<Net>& upstream) const {
    if (upstream.tls_identity == 0 || index_of(upstream.backend) >= lines_.size()) return nullptr;
    const Line& line = lines_[index_of(upstream.backend)];
    return line.ticket_identity == upstream.tls_identity ? &line.ticket : nullptr;
  }

  static void keep_ticket(Line& line, const Upstream<Net>& upstream) {
    if (upstream.tls_identity == 0 || upstream.reused) return;
    line.ticket = upstream.connection.tls()->ticket();
    line.ticket_identity = upstream.tls_identity;
  }

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
