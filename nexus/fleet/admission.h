// admission.h
// Owns:     how many requests run on each backend that has a cap (`max_pending`), the queue of waiting requests, and
//           the counts that a request holds while it is in flight, each as a pointer that owns one unit of it.
// Promises: a cap holds over all threads; a place that becomes free goes to a waiting request, in the order of
//           fair_queue.h, never to a newcomer; the queue is bounded. A place, a queue position or a unit is given back
//           exactly once: by reset(), by assigning another one, or by the destructor.
// Leaves:   the timeout of a wait and its response to exchange.h; passing a wake-up to its thread to worker.h; body
//           memory to base/memory_budget.h.
// Threads:  any. One mutex guards everything and is taken only for capped backends: these get a few requests a
//           second, each with two short critical sections, so finer locking would gain nothing. Without a cap no
//           shared memory is touched.
// Tested by: tests/admission_test.cpp, tests/held_counts_test.cpp, tests/sim
#pragma once

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "nexus/base/slot_map.h"
#include "nexus/fleet/fair_queue.h"
#include "nexus/fleet/registry.h"
#include "nexus/metrics/ids.h"
#include "nexus/metrics/slab.h"

namespace nexus {

namespace detail {

struct GivePendingBack {
  BackendId backend{};
  void operator()(Slab* slab) const { slab->add_in_flight(backend, -1); }
};

struct GiveKeyBack {
  void operator()(KeyCounters* cells) const { cells->pending.add_signed(-1); }
};

struct LeaveQueue {
  BackendId backend{};
  KeyCounters* key = nullptr;
  Histogram<kDurationBounds>* waits = nullptr;  // of the model
  Ns since_ns = 0;
  const Ns* now = nullptr;
  void operator()(Slab* slab) const {
    slab->add_queued(backend, -1);
    waits->observe(*now - since_ns);
    key->queue_waits.add(1);
    key->queue_wait_ns.add_signed(*now - since_ns);
  }
};

struct GivePlaceBack {
  void operator()(std::atomic<std::uint32_t>* in_flight) const { in_flight->fetch_sub(1, std::memory_order_relaxed); }
};

}  // namespace detail

// One unit of nexus_backend_in_flight.
using PendingCount = std::unique_ptr<Slab, detail::GivePendingBack>;

inline PendingCount count_pending(Slab& slab, BackendId backend) {
  slab.add_in_flight(backend, 1);
  return {&slab, {backend}};
}

// One unit of nexus_key_pending.
using KeyCount = std::unique_ptr<KeyCounters, detail::GiveKeyBack>;

inline KeyCount count_key(Slab& slab, KeyId key) {
  KeyCounters& cells = slab.key_cells(key);
  cells.pending.add(1);
  return KeyCount(&cells);
}

// One queued request, in nexus_queue_depth of `backend`; when it is given back, the wait for `model` since `now` is
// recorded, and that of `key`. `now` is the worker's clock and outlives the count. The cells are found first: giving
// back must not throw.
using QueuedCount = std::unique_ptr<Slab, detail::LeaveQueue>;

inline QueuedCount count_queued(Slab& slab, BackendId backend, ModelId model, KeyId key, const Ns& now) {
  Histogram<kDurationBounds>& waits = slab.queue_waits(model);
  KeyCounters& key_cells = slab.key_cells(key);
  slab.add_queued(backend, 1);
  return {&slab, {backend, &key_cells, &waits, now, &now}};
}

// The request waits for `backend` from now on.
inline void move_queued(QueuedCount& count, BackendId backend) {
  BackendId& from = count.get_deleter().backend;
  count->add_queued(backend, 1);
  count->add_queued(std::exchange(from, backend), -1);
}

// One of the [server] max_pending places.
using OverallPlace = std::unique_ptr<std::atomic<std::uint32_t>, detail::GivePlaceBack>;

// Empty if all `limit` places are taken. Relaxed: the number alone is shared.
inline OverallPlace take_overall_place(std::atomic<std::uint32_t>& in_flight, std::uint32_t limit) {
  if (in_flight.fetch_add(1, std::memory_order_relaxed) < limit) return OverallPlace(&in_flight);
  in_flight.fetch_sub(1, std::memory_order_relaxed);
  return nullptr;
}

class Admission {
  struct Waiter;
  struct GiveBack {
    BackendId backend;
    void operator()(Admission* admission) const { admission->give_back(backend); }
  };
  struct LeaveQueue {
    Admission* admission;
    void operator()(Waiter* waiter) const {
      admission->leave(*waiter);
      delete waiter;
    }
  };

 public:
  // Called for each queued request that gets a place, with the arguments of its enqueue(). It runs without the mutex on
  // the thread that freed the place, so it should only post a message, and must not throw. It may run after the ticket
  // was used or destroyed: only take_grant() tells.
  using Wake = std::function<void(std::uint32_t worker, Handle waiter)>;

  struct Cap {
    BackendId backend;
    std::uint32_t places;  // 0: no cap
  };

  // The right to run one request on a backend, until it is destroyed. Empty if the backend has no cap.
  class Place {
   public:
    Place() = default;
    bool held() const { return admission_ != nullptr; }
    BackendId backend() const { return admission_.get_deleter().backend; }

   private:
    friend class Admission;
    Place(Admission* admission, BackendId backend) : admission_(admission, GiveBack{backend}) {}
    std::unique_ptr<Admission, GiveBack> admission_;
  };

  // A position in the queue. Its destructor leaves the queue, and passes on a place that was granted but not taken.
  class Ticket {
   public:
    Ticket() = default;
    bool held() const { return waiter_ != nullptr; }

   private:
    friend class Admission;
    Ticket(Admission* admission, std::unique_ptr<Waiter> waiter) : waiter_(waiter.release(), LeaveQueue{admission}) {}
    std::unique_ptr<Waiter, LeaveQueue> waiter_;
  };

  enum class Outcome : std::uint8_t {
    entered,  // a place became free since the caller looked
    queued,
    full,  // the queue has queue_size requests
  };

  explicit Admission(Wake wake) : wake_(std::move(wake)) {}
  ~Admission() { assert(waiting_ == 0); }  // it outlives all places and tickets

  // Sets caps and the queue's size; call it before publishing a snapshot that has them. A lower cap ends no request:
  // none enters until enough have left. A higher one admits waiting requests at once. Backends not in `caps` keep
  // theirs. Requests that started while the backend had no cap are not counted if it gets one.
  void configure(std::span<const Cap> caps, std::uint32_t queue_size) {
    std::vector<Wakeup> granted;
    {
      const std::lock_guard lock(mutex_);
      granted.reserve(waiting_);  // this and the next loop may throw: nothing is changed yet
      for (const Cap& cap : caps) {
        if (cap.places > 0) backends_.try_emplace(cap.backend);
      }
      queue_size_ = queue_size;
      for (const Cap& cap : caps) {
        if (!knows(cap.backend)) continue;  // it has no cap and never had one
        at(cap.backend).cap = cap.places;
        while (auto next = grant_next(cap.backend)) granted.push_back(*next);
      }
    }
    for (const Wakeup& wakeup : granted) wake_(wakeup.worker, wakeup.waiter);
  }

  // Drops what is kept for a backend that nobody names any more. False while a request holds a place there or waits.
  bool forget(BackendId backend) {
    const std::lock_guard lock(mutex_);
    const auto found = backends_.find(backend);
    if (found == backends_.end()) return true;
    if (found->second.running > 0 || !found->second.queue.empty()) return false;
    backends_.erase(found);
    return true;
  }

  // Enters if there is room. `cap` is the snapshot's max_pending of that backend: 0 always enters, with an empty place.
  // While requests wait for this backend there is no room: the next free place is theirs. Without a `claim`, here and
  // in enqueue(), the request costs nothing, and all such requests have one flow.
  bool try_enter(BackendId backend, std::uint32_t cap, Place& place, Claim* claim = nullptr) {
    if (cap == 0) {
      place = Place();
      return true;
    }
    {
      const std::lock_guard lock(mutex_);
      if (!take_room({&backend, 1})) return false;
      if (claim != nullptr) {
        clock_.begin(*claim);
        clock_.charge(*claim);
      }
    }
    place = Place(this, backend);  // without the lock, because this may give back the place held before
    return true;
  }

  // Waits for the first free place on any of `candidates`, which all have caps. `wake(worker, waiter)` is called once
  // the request owns a place; take_grant() returns it.
  Outcome enqueue(std::span<const BackendId> candidates, std::uint32_t worker, Handle waiter, Ticket& ticket,
                  Place& place, Claim* claim = nullptr) {
    assert(!candidates.empty());
    auto made = std::make_unique<Waiter>();
    made->wakeup = {worker, waiter};
    made->candidates.assign(candidates.begin(), candidates.end());
    made->unclaimed.flow = &unclaimed_;
    made->claim = claim != nullptr ? claim : &made->unclaimed;
    Nodes nodes = make_nodes(*made, candidates.size());
    std::optional<BackendId> entered;  // not the waiter's member: once it waits, another thread may write that
    {
      const std::lock_guard lock(mutex_);
      entered = take_room(candidates);
      if (!entered && waiting_ >= queue_size_) return Outcome::full;
      clock_.begin(*made->claim);
      if (entered) {
        clock_.charge(*made->claim);
      } else {
        made->arrival = ++arrivals_;
        join_queues(*made, nodes);
      }
    }
    if (entered) {
      place = Place(this, *entered);
      return Outcome::entered;
    }
    ticket = Ticket(this, std::move(made));
    return Outcome::queued;
  }

  // The place granted to `ticket`, which then becomes empty; nothing if it still waits. Call it when woken, and before
  // giving up on a timeout, because a place may have been granted just then.
  std::optional<Place> take_grant(Ticket& ticket) {
    if (!granted(ticket)) return std::nullopt;
    assert(ticket.waiter_.get_deleter().admission == this);
    // The waiter is in no queue any more, so no other thread has a pointer to it.
    const std::unique_ptr<Waiter> waiter(ticket.waiter_.release());
    return Place(this, *waiter->granted);
  }

  // Gives a waiting request other candidates (the fleet changed); it keeps its position. If one has room, the place is
  // granted at once for take_grant(), without a wake-up. A place that was granted before is kept.
  void renew(Ticket& ticket, std::span<const BackendId> candidates) {
    if (ticket.held()) wait_for(*ticket.waiter_, candidates, false);
  }

  // The backend on which `ticket` was granted a place that take_grant() has not returned yet.
  std::optional<BackendId> granted(const Ticket& ticket) const {
    if (!ticket.held()) return std::nullopt;
    const std::lock_guard lock(mutex_);
    return ticket.waiter_->granted;
  }

  // Passes the place granted to `ticket` on to the next in line (its backend was ejected meanwhile, say) and waits, in
  // the old position, for one of `candidates`, which must not contain that backend. If one has room, as in renew().
  // This may exceed the queue's size, by at most the number of places.
  void decline(Ticket& ticket, std::span<const BackendId> candidates) {
    assert(ticket.held() && !candidates.empty());
    wait_for(*ticket.waiter_, candidates, true);
  }

  // The request of `claim` holds no place and no ticket any more, and has cost so much.
  void settle(Claim& claim, std::uint64_t cost) {
    const std::lock_guard lock(mutex_);
    FairClock::settle(claim, cost);
  }

  // The number of waiting requests, over all backends.
  std::uint32_t waiting() const {
    const std::lock_guard lock(mutex_);
    return waiting_;
  }
  // The number of requests that wait for this backend; one that waits for two backends counts on both.
  std::uint32_t waiting_for(BackendId backend) const {
    const std::lock_guard lock(mutex_);
    return knows(backend) ? static_cast<std::uint32_t>(at(backend).queue.size()) : 0;
  }
  // For the tests: 0 if the backend has none.
  std::uint32_t cap_of(BackendId backend) const {
    const std::lock_guard lock(mutex_);
    return knows(backend) ? at(backend).cap : 0;
  }
  // For the tests: the number of backends and keys of which something is kept.
  std::size_t kept() const {
    const std::lock_guard lock(mutex_);
    return backends_.size();
  }
  // The number of places in use, including those granted but not taken yet.
  std::uint32_t running_on(BackendId backend) const {
    const std::lock_guard lock(mutex_);
    return knows(backend) ? at(backend).running : 0;
  }

 private:
  struct Wakeup {
    std::uint32_t worker = 0;
    Handle waiter;
  };

  // Guarded by the mutex from enqueue() on, until its ticket is used or destroyed.
  struct Waiter {
    std::uint64_t arrival = 0;
    Wakeup wakeup;
    std::vector<BackendId> candidates;
    std::optional<BackendId> granted;  // it holds a place there and is in no queue any more
    Claim* claim = nullptr;
    Claim unclaimed;  // of a request without one
  };

  // Invariant whenever the mutex is free: a backend with a non-empty queue has no room. So a newcomer that finds room
  // overtakes nobody, and a freed place admits exactly one request.
  using Queue = FairQueue<Waiter>;
  using Nodes = std::vector<Queue::Node>;
  struct Backend {
    std::uint32_t cap = 0;  // 0: none
    std::uint32_t running = 0;
    Queue queue;  // a waiter is in the queue of each of its candidates

    bool room() const { return cap == 0 || running < cap; }
  };

  bool knows(BackendId backend) const { return backends_.contains(backend); }
  Backend& at(BackendId backend) {
    assert(knows(backend));  // configure() runs before the snapshot with the cap is published
    return backends_.find(backend)->second;
  }
  const Backend& at(BackendId backend) const { return backends_.find(backend)->second; }

  // Takes a place on the first candidate that has one. REQUIRES: mutex_ held.
  std::optional<BackendId> take_room(std::span<const BackendId> candidates) {
    const auto first =
        std::find_if(candidates.begin(), candidates.end(), [this](BackendId id) { return at(id).room(); });
    if (first == candidates.end()) return std::nullopt;
    assert(at(*first).queue.empty());
    at(*first).running += 1;
    return *first;
  }

  // The nodes for join_queues(). Allocated without the mutex and before anything changes, because this may throw.
  static Nodes make_nodes(Waiter& waiter, std::size_t count) {
    Nodes nodes;
    nodes.reserve(count);
    while (nodes.size() < count) nodes.push_back(Queue::make_node(waiter));
    return nodes;
  }

  // REQUIRES: mutex_ held.
  void join_queues(Waiter& waiter, Nodes& nodes) {
    for (std::size_t i = 0; i < waiter.candidates.size(); ++i) {
      at(waiter.candidates[i]).queue.insert(std::move(nodes[i]));
    }
    waiter.claim->flow->waiting += 1;
    waiting_ += 1;
  }

  // REQUIRES: mutex_ held.
  void leave_queues(Waiter& waiter) {
    for (const BackendId candidate : waiter.candidates) at(candidate).queue.erase(waiter);
    waiter.claim->flow->waiting -= 1;
    waiting_ -= 1;
  }

  // Takes a place on one of `candidates`, or joins their queues instead of the present ones. A place that was granted
  // before is passed on if `decline`; else it is kept, and nothing changes.
  void wait_for(Waiter& waiter, std::span<const BackendId> candidates, bool decline) {
    std::vector<BackendId> renewed(candidates.begin(), candidates.end());
    Nodes nodes = make_nodes(waiter, renewed.size());
    std::unique_lock lock(mutex_);
    const std::optional<BackendId> held = waiter.granted;
    assert(held || !decline);
    if (held && !decline) return;
    assert(!held || std::find(renewed.begin(), renewed.end(), *held) == renewed.end());
    if (!held) leave_queues(waiter);
    waiter.candidates.swap(renewed);
    waiter.granted = take_room(waiter.candidates);
    waiter.granted ? clock_.charge(*waiter.claim) : join_queues(waiter, nodes);
    if (held) free_place(std::move(lock), *held);
  }

  // Grants a place to the request that goes next, if there is room and one waits. REQUIRES: mutex_ held.
  std::optional<Wakeup> grant_next(BackendId id) {
    Backend& backend = at(id);
    if (!backend.room() || backend.queue.empty()) return std::nullopt;
    Waiter& waiter = backend.queue.next(clock_.now());
    leave_queues(waiter);
    clock_.charge(*waiter.claim);
    backend.running += 1;
    waiter.granted = id;
    return waiter.wakeup;
  }

  // Passes a place on to the next in line. Takes over the lock of mutex_, because the wake-up must run without it.
  void free_place(std::unique_lock<std::mutex> lock, BackendId id) {
    assert(at(id).running > 0);
    at(id).running -= 1;
    const std::optional<Wakeup> granted = grant_next(id);
    lock.unlock();
    if (granted) wake_(granted->worker, granted->waiter);
  }

  void give_back(BackendId id) { free_place(std::unique_lock(mutex_), id); }

  void leave(Waiter& waiter) {
    std::unique_lock lock(mutex_);
    if (waiter.granted) return free_place(std::move(lock), *waiter.granted);
    leave_queues(waiter);
  }

  const Wake wake_;
  mutable std::mutex mutex_;               // guards all below
  std::map<BackendId, Backend> backends_;  // each that has or had a cap, until forget()
  std::uint32_t queue_size_ = 0;
  std::uint32_t waiting_ = 0;
  std::uint64_t arrivals_ = 0;
  FairClock clock_;
  Flow unclaimed_;
};

}  // namespace nexus
