// worker.h
// Owns:     a worker thread: its event loop, its mailbox, its listeners, its drain.
// Promises: an event reaches the session or upstream connection that its handle names, or nobody; messages are handled
//           before events; a drain ends when no client is waiting for a response.
// Leaves:   accepting to acceptor.h, client connections to session_driver.h, the fleet to control.h.
// Threads:  run() is the worker's thread; post(), put(), wake() and grant() may be called from any.
// Tested by: tests/worker_test.cpp, tests/sim, tests/hostile
#pragma once

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "nexus/base/limits.h"
#include "nexus/base/mailbox.h"
#include "nexus/os/systemd.h"
#include "nexus/server/acceptor.h"
#include "nexus/server/event_queue.h"
#include "nexus/server/session_driver.h"
#include "nexus/server/session_ends.h"

namespace nexus {

constexpr std::uint8_t kDrainTimerKind = 5;  // of a Handle
constexpr std::uint8_t kTrimTimerKind = 6;

template <class Net>
class Worker {
 public:
  using Context = WorkerContext<Net>;

  // ---- messages ----

  // A new connection, which is already counted as this worker's.
  struct Adopt {
    typename Net::Socket socket;
    Address peer;
    ListenerUse use;
  };
  struct NewSnapshot {
    std::unique_ptr<LocalSnapshot> snapshot;  // made by the sender, so that taking it over needs no memory
  };
  // The page that the session waits for.
  struct RenderedPage {
    Handle session;
    std::uint32_t number = 0;
    std::shared_ptr<const TextBuffer> body;  // null: metrics_unavailable
    PageKind kind = PageKind::metrics;
  };
  // A place on a backend for the session's queued request.
  struct Grant {
    Handle session;
  };
  struct Drain {};  // stop accepting, finish the requests in flight
  struct Stop {};   // end now
  using Message = std::variant<Adopt, NewSnapshot, RenderedPage, Grant, Drain, Stop, Heartbeat>;
  using Posted = typename Mailbox<Message>::Posted;

  // The workers' view of each other, and the way to ask for pages.
  struct Peers {
    std::vector<Worker*> workers;
    Placement placement;
    typename SessionDriver<Net>::AskPage ask_page;
  };

  Worker(Net& net, Shared& shared, Slab& slab, Log log, std::uint32_t index, std::uint64_t seed, SnapshotPtr snapshot,
         Peers& peers, Ns process_started)
      : log_(std::move(log)),
        context_(net, shared, slab, log_, index, seed, std::move(snapshot)),
        peers_(peers),
        acceptor_(context_),
        sessions_(context_, peers.placement, acceptor_, peers.ask_page, process_started),
        drain_timer_(Handle::make(kDrainTimerKind, 0, 0)),
        trim_timer_(Handle::make(kTrimTimerKind, 0, 0)) {}
  ~Worker() { close_all(); }

  // Call before run(): accepts connections from this socket. False if the kernel refuses.
  [[gnu::cold]] bool add_listener(typename Net::Socket listener, ListenerUse use) {
    return acceptor_.add(listener, use);
  }

  // Any thread. `no_memory` and `closed` (this worker has ended): the message was not taken.
  Posted post(Message message) noexcept {
    const Posted posted = put(std::move(message));
    if (posted == Posted::first) wake();
    return posted;
  }
  // Like post(), but the caller must call wake() afterwards.
  Posted put(Message message) noexcept { return mailbox_.post(std::move(message)); }
  void wake() noexcept { context_.net.wake(); }
  // Any thread, from whatever frees a place: cannot fail.
  void grant(Handle session) noexcept {
    if (post(Grant{session}) != Posted::no_memory) return;
    grants_missed_.store(true, std::memory_order_relaxed);  // published by wake()
    wake();
  }

  void run() {
    while (!stopped_) turn();
    close_all();
  }

  // One wait and events that it brought. The simulator calls this itself.
  void turn() {
    turns_ += 1;
    bool woken = false;
    look(events_.empty() && context_.again.empty() ? context_.wheel.next() : 0, woken);
    const Ns turn_began = context_.now;
    const std::size_t events = std::min(events_.size(), kEventsPerTurn);
    for (std::size_t i = 0; i < events; ++i) {
      if (i > 0 && i % kFreshEvents == 0) look(0, woken);  // what comes then is for the next turn
      dispatch(events_.take());
    }
    context_.events_fresh = false;  // a share of long work may take milliseconds
    context_.run_rescheduled([this](Handle session) { sessions_.resume(session); });
    context_.wheel.fire(context_.now, [this](Handle handle) { on_deadline(handle); });
    if (woken && grants_missed_.exchange(false, std::memory_order_relaxed)) sessions_.look_for_grants();
    if (context_.draining && is_drained()) end_drain();
    if (!trim_armed_ && trimmed_turn_ != turns_) arm_trim();
    context_.slab.loop_stall(context_.net.now() - turn_began);
  }

  bool stopped() const { return stopped_; }
  // For the tests:
  std::size_t armed_timers() const { return context_.wheel.armed() - (trim_armed_ ? 1 : 0); }
  SessionDriver<Net>& sessions() { return sessions_; }
  std::size_t taken_bytes() const { return context_.blocks.taken_bytes(); }
  std::size_t taken_objects() const { return context_.taken_objects() + sessions_.taken_objects(); }

 private:
  // Fetches events. They are noted, and messages applied, before any is handled, even without a wake-up: a client that
  // saw a backend healthy on one worker must not see it unhealthy on another. A response goes before new requests: the
  // fewer are in flight, the less memory is in use, and the more of it in the processor's caches.
  void look(Ns deadline, bool& woken) {
    events_.fetch(context_.net, deadline, woken, [this](const Event& event) { return sessions_.pool().note(event); });
    context_.now = context_.net.now();
    context_.events_fresh = events_.complete();  // else the kernel has others
    if (mailbox_.has_any()) take_messages();
  }

  void dispatch(const Event& event) {
    switch (event.token.kind()) {
      case kListenerKind: return acceptor_.on_event(event.token, turns_, placer());
      case kSessionKind: return sessions_.on_event(event);
      case kUpstreamKind: return sessions_.on_upstream(event);
      default: assert(false);
    }
  }

  void on_deadline(Handle handle) {
    switch (handle.kind()) {
      case kUpstreamKind: return sessions_.pool().on_deadline(handle);
      case kAcceptTimerKind: return acceptor_.resume();
      case kDrainTimerKind: return on_drain_deadline();
      case kTrimTimerKind: return trim();
      case kSessionKind: return sessions_.on_deadline(handle);
      default: assert(false);
    }
  }

  void take_messages() {
    mailbox_.take(messages_);
    const bool fleet_changed = take_newest_fleet();
    for (Message& message : messages_) {
      std::visit([this](auto& m) { this->on_message(m); }, message);
    }
    messages_.clear();
    if (fleet_changed) sessions_.look_for_grants();
  }

  // Before all other messages: none of them may lead to a decision by an older fleet. True if there is a new one.
  bool take_newest_fleet() {
    bool changed = false;
    for (Message& message : messages_) {
      NewSnapshot* const m = std::get_if<NewSnapshot>(&message);
      if (m == nullptr) continue;
      context_.use(std::move(m->snapshot));
      changed = true;
    }
    if (!changed) return false;
    sessions_.pool().forget_departed(*context_.snapshot);
    return true;
  }

  void on_message(Adopt& adopt) { sessions_.add(adopt.socket, adopt.peer, adopt.use); }
  void on_message(NewSnapshot&) {}  // see take_newest_fleet()
  void on_message(Grant& grant) { sessions_.on_grant(grant.session); }
  void on_message(RenderedPage& page) { sessions_.on_page(page.session, page.number, std::move(page.body), page.kind); }
  void on_message(Drain&) {
    context_.draining = true;
    drain_began_ns_ = context_.now;
    acceptor_.stop(placer());  // connections that the kernel accepted before are served
    sessions_.begin_drain();
    context_.wheel.arm(drain_timer_, context_.now + kAcceptRest);
  }
  void on_message(Stop&) { stopped_ = true; }
  void on_message(Heartbeat& heartbeat) { heartbeat.answer(); }

  // ---- accepting ----

  auto placer() {
    return [this](typename Net::Socket socket, const Address& peer, ListenerUse use) { place(socket, peer, use); };
  }

  // Keeps a new connection, or hands it to another worker.
  [[gnu::cold]] void place(typename Net::Socket socket, const Address& peer, ListenerUse use) {
    const auto worker = peers_.placement.take(context_.worker, context_.settings().server.max_connections);
    if (!worker) {
      context_.slab.limit_hit(Limit::max_connections);
      return sessions_.pages().turn_away(socket, use.tls);
    }
    if (*worker != context_.worker) {
      const Posted posted = peers_.workers[*worker]->post(Adopt{socket, peer, use});
      if (posted != Posted::no_memory && posted != Posted::closed) return;
      peers_.placement.move(*worker, context_.worker);
    }
    sessions_.add(socket, peer, use);
  }

  // ---- memory ----

  void arm_trim() {
    context_.wheel.arm(trim_timer_, context_.now + kTrimInterval);
    trim_armed_ = true;
  }

  // Frees what no request has needed for a while. Goes on until no other turn comes between and nothing is left to
  // free.
  [[gnu::cold]] void trim() {
    const std::size_t freed = context_.trim() + sessions_.trim();
    const bool rests = turns_ == trimmed_turn_ + 1;
    trimmed_turn_ = turns_;
    if (freed >= kReturnedBytes || rests) malloc_trim(0);  // the C library keeps free memory between used pieces
    trim_armed_ = false;
    if (freed > 0 || !rests) arm_trim();
  }

  // ---- the end ----

  // Wakes the loop, so that is_drained() is asked again. The first time, the connections are accepted that came after
  // the drain began: soon they will be refused (kLastAccepts).
  [[gnu::cold]] void on_drain_deadline() {
    const Ns drained_for = context_.now - drain_began_ns_;
    if (drained_for < kHandOverTime) acceptor_.stop(placer());
    const Ns next = drained_for < kHandOverTime ? kHandOverTime : kFirstRequestTime;
    if (drained_for < next) context_.wheel.arm(drain_timer_, drain_began_ns_ + next);
  }

  bool is_drained() {
    const Ns drained_for = context_.now - drain_began_ns_;
    return drained_for >= kHandOverTime && sessions_.is_drained(drained_for < kFirstRequestTime);
  }

  // Only connections between two requests are left.
  void end_drain() {
    sessions_.say_farewell();
    if (sessions_.live() == 0) stopped_ = mailbox_.close_if_empty();
  }

  [[gnu::cold]] void close_all() {
    peers_.placement.loads[context_.worker].stopped.store(true, std::memory_order_relaxed);
    do {
      mailbox_.take(messages_);
      for (Message& message : messages_) {  // connections that were handed over and never taken
        Adopt* adopt = std::get_if<Adopt>(&message);
        if (adopt == nullptr) continue;
        context_.net.close(adopt->socket);
        peers_.placement.give_back(context_.worker);
      }
      messages_.clear();
    } while (!mailbox_.close_if_empty());
    sessions_.close_all();
  }

  Log log_;
  Context context_;
  Peers& peers_;
  Mailbox<Message> mailbox_;
  std::vector<Message> messages_;
  EventQueue<Net> events_;
  Acceptor<Net> acceptor_;
  SessionDriver<Net> sessions_;
  Timer drain_timer_;
  Timer trim_timer_;
  bool trim_armed_ = false;
  std::uint64_t turns_ = 0;
  std::uint64_t trimmed_turn_ = 0;  // the turn of the last trim()
  std::atomic<bool> grants_missed_{false};
  bool stopped_ = false;
  Ns drain_began_ns_ = 0;
};

}  // namespace nexus
