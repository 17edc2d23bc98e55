// admission.h
// Owns:     how many requests run on each backend that has a cap (`max_pending`), and the queue of those that wait.
// Promises: a cap holds over all threads; a place that frees up goes to the request that has waited longest for it,
//           never to a newcomer; the queue is bounded; each place and each queue place is given back by a destructor.
// Leaves:   the timeout of a wait and its answer to exchange.h; carrying a wake-up to its thread to worker.h.
// Threads:  any. One mutex guards all, and is only taken where a cap is set: a capped backend takes a handful of
//           requests a second, each two short locks, so nothing finer would be noticed. No cap, no lock, no shared
//           memory touched.
#pragma once

#include <algorithm>
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
#include "nexus/fleet/registry.h"
#include "nexus/metrics/ids.h"

namespace nexus {

class Admission {
 public:
  // Told of each request in the queue that was given a place: `waiter` as it was enqueued, on the thread `worker`. It
  // is called by whatever thread gave the place back, without the mutex held, and should only post a message. It may
  // come after the ticket was taken or dropped: take_grant() says what is the case. It must not throw.
  using Wake = std::function<void(std::uint32_t worker, Handle waiter)>;

  struct Cap {
    BackendId backend;
    std::uint32_t places;  // 0: no cap
  };

  // The right to run one request on a backend until it is destroyed. Empty where the backend has no cap.
  class Place {
   public:
    Place() = default;
    Place(Place&& other) noexcept : admission_(std::exchange(other.admission_, nullptr)), backend_(other.backend_) {}
    Place& operator=(Place&& other) noexcept {
      Place taken(std::move(other));
      std::swap(admission_, taken.admission_);
      std::swap(backend_, taken.backend_);
      return *this;
    }
    ~Place() {
      if (admission_ != nullptr) admission_->give_back(backend_);
    }

    bool held() const { return admission_ != nullptr; }
    BackendId backend() const { return backend_; }

   private:
    friend class Admission;
    Place(Admission* admission, BackendId backend) : admission_(admission), backend_(backend) {}

    Admission* admission_ = nullptr;
    BackendId backend_{};
  };

 private:
  // A request in the queue. Guarded by the mutex from enqueue() on, until its ticket took it out.
  struct Waiter {
    std::uint64_t arrival = 0;
    std::uint32_t worker = 0;
    Handle token;
    std::vector<BackendId> candidates;
    std::optional<BackendId> granted;  // holds a place on it, and stands in no queue any more
  };

 public:
  // A place in the queue. Its destructor leaves the queue, and passes a place on that was granted meanwhile.
  class Ticket {
   public:
    Ticket() = default;
    Ticket(Ticket&& other) noexcept
        : admission_(std::exchange(other.admission_, nullptr)), waiter_(std::move(other.waiter_)) {}
    Ticket& operator=(Ticket&& other) noexcept {
      Ticket taken(std::move(other));
      std::swap(admission_, taken.admission_);
      std::swap(waiter_, taken.waiter_);
      return *this;
    }
    ~Ticket() {
      if (waiter_) admission_->leave(*waiter_);
    }

    bool held() const { return waiter_ != nullptr; }

   private:
    friend class Admission;
    Admission* admission_ = nullptr;
    std::unique_ptr<Waiter> waiter_;  // on the heap: the queue points at it
  };

  enum class Outcome : std::uint8_t {
    entered,  // a place was free after all
    queued,
    full,  // the queue is
  };

  explicit Admission(Wake wake) : wake_(std::move(wake)) {}
  Admission(const Admission&) = delete;
  Admission& operator=(const Admission&) = delete;
  ~Admission() { assert(waiting_ == 0); }  // it outlives all places and tickets

  // Sets caps and the queue's size, before a snapshot that holds them is published. A lower cap ends no request: none
  // enters until enough have left. A higher one lets waiting requests in at once. What is not named keeps its cap.
  // Requests that run on a backend while it has no cap are not counted, should it get one.
  void configure(std::span<const Cap> caps, std::uint32_t queue_size) {
    std::vector<Wakeup> woken;
    {
      const std::lock_guard lock(mutex_);
      woken.reserve(waiting_);  // before anything changes, for memory may be short
      make_room(caps);
      queue_size_ = queue_size;
      for (const Cap& cap : caps) {
        if (!knows(cap.backend)) continue;  // it has no cap and never had one
        at(cap.backend).cap = cap.places;
        while (auto next = grant_next(cap.backend)) woken.push_back(*next);
      }
    }
    for (const Wakeup& wakeup : woken) wake_(wakeup.worker, wakeup.waiter);
  }

  // Enters where there is room. `cap` is the snapshot's max_pending of that backend: 0 always enters, with an empty
  // place. Where requests wait for this backend there is no room: what frees up is theirs.
  bool try_enter(BackendId backend, std::uint32_t cap, Place& place) {
    if (cap == 0) {
      place = Place();
      return true;
    }
    {
      const std::lock_guard lock(mutex_);
      if (!take_room(backend)) return false;
    }
    place = Place(this, backend);  // after the lock: what it held before may be given back here
    return true;
  }

  // Waits for a place on the first of `candidates` that has one; all of them have caps. `waiter` is woken on `worker`
  // once it owns a place, which take_grant() hands out.
  Outcome enqueue(std::span<const BackendId> candidates, std::uint32_t worker, Handle waiter, Ticket& ticket,
                  Place& place) {
    assert(!candidates.empty());
    auto made = std::make_unique<Waiter>();
    made->worker = worker;
    made->token = waiter;
    made->candidates.assign(candidates.begin(), candidates.end());
    Nodes nodes = make_nodes(*made, candidates.size());
    std::optional<BackendId> entered;
    {
      const std::lock_guard lock(mutex_);
      entered = take_first_room(candidates);  // one may have left since the caller looked
      if (!entered) {
        if (waiting_ >= queue_size_) return Outcome::full;
        made->arrival = ++arrivals_;
        line_up(*made, nodes);
      }
    }
    if (entered) {
      place = Place(this, *entered);
      return Outcome::entered;
    }
    Ticket queued;
    queued.admission_ = this;
    queued.waiter_ = std::move(made);
    ticket = std::move(queued);
    return Outcome::queued;
  }

  // The place that `ticket` was granted, and the end of the ticket; or nothing, and it waits on. To be asked when
  // woken, and before giving up on a timeout: the place may have come just then.
  std::optional<Place> take_grant(Ticket& ticket) {
    if (!ticket.held()) return std::nullopt;
    assert(ticket.admission_ == this);
    {
      const std::lock_guard lock(mutex_);
      if (!ticket.waiter_->granted) return std::nullopt;
    }
    // It is in no queue any more, so no other thread knows of it.
    const std::unique_ptr<Waiter> waiter = std::move(ticket.waiter_);
    return Place(this, *waiter->granted);
  }

  // Gives a waiting request other candidates (the fleet changed) without its losing its turn. Where one has room, the
  // place is granted at once and take_grant() has it; no wake-up comes for that. A request that was granted one keeps
  // it.
  void renew(Ticket& ticket, std::span<const BackendId> candidates) {
    if (!ticket.held()) return;
    std::vector<BackendId> renewed(candidates.begin(), candidates.end());
    Waiter& waiter = *ticket.waiter_;
    Nodes nodes = make_nodes(waiter, renewed.size());
    const std::lock_guard lock(mutex_);
    if (waiter.granted) return;
    step_out(waiter);
    waiter.candidates.swap(renewed);
    waiter.granted = take_first_room(waiter.candidates);
    if (!waiter.granted) line_up(waiter, nodes);
  }

  // The backend on which `ticket` was granted a place, before take_grant() hands it out.
  std::optional<BackendId> granted(const Ticket& ticket) const {
    if (!ticket.held()) return std::nullopt;
    const std::lock_guard lock(mutex_);
    return ticket.waiter_->granted;
  }

  // Gives the place that `ticket` was granted to the next in line and waits on, in its old turn, for one of
  // `candidates`, which the refused backend is none of: it was ejected meanwhile, say. Where one has room the place is
  // granted at once, as in renew(). The queue may so be longer than its size, by no more than there are places.
  void decline(Ticket& ticket, std::span<const BackendId> candidates) {
    assert(ticket.held() && !candidates.empty());
    std::vector<BackendId> renewed(candidates.begin(), candidates.end());
    Waiter& waiter = *ticket.waiter_;
    Nodes nodes = make_nodes(waiter, renewed.size());
    std::optional<Wakeup> woken;
    {
      const std::lock_guard lock(mutex_);
      assert(waiter.granted);
      const BackendId refused = *waiter.granted;
      assert(std::find(renewed.begin(), renewed.end(), refused) == renewed.end());
      waiter.candidates.swap(renewed);
      waiter.granted = take_first_room(waiter.candidates);
      if (!waiter.granted) line_up(waiter, nodes);
      at(refused).running -= 1;
      woken = grant_next(refused);
    }
    if (woken) wake_(woken->worker, woken->waiter);
  }

  // Requests that wait, over all backends.
  std::uint32_t waiting() const {
    const std::lock_guard lock(mutex_);
    return waiting_;
  }
  // Requests that would take a place on this backend. One that may go to either of two is counted on both.
  std::uint32_t waiting_for(BackendId backend) const {
    const std::lock_guard lock(mutex_);
    return knows(backend) ? static_cast<std::uint32_t>(at(backend).queue.size()) : 0;
  }
  // Places taken, those included that were granted and not fetched yet.
  std::uint32_t running_on(BackendId backend) const {
    const std::lock_guard lock(mutex_);
    return knows(backend) ? at(backend).running : 0;
  }

 private:
  // Invariant whenever the mutex is free: where the queue is not empty, there is no room. So a newcomer that finds room
  // overtakes nobody, and a place that frees up lets in exactly one.
  using Queue = std::map<std::uint64_t, Waiter*>;  // by arrival
  using Nodes = std::vector<Queue::node_type>;
  struct Backend {
    std::uint32_t cap = 0;  // 0: none
    std::uint32_t running = 0;
    Queue queue;  // a waiter stands in that of each of its candidates

    bool room() const { return cap == 0 || running < cap; }
  };

  struct Wakeup {
    std::uint32_t worker;
    Handle waiter;
  };

  bool knows(BackendId backend) const { return index_of(backend) < backends_.size(); }
  Backend& at(BackendId backend) {
    assert(knows(backend));  // a snapshot that says of a cap is published after configure()
    return backends_[index_of(backend)];
  }
  const Backend& at(BackendId backend) const { return backends_[index_of(backend)]; }

  // What follows is called with the mutex held, but for give_back() and leave().

  bool take_room(BackendId id) {
    Backend& backend = at(id);
    if (!backend.room()) return false;
    assert(backend.queue.empty());
    backend.running += 1;
    return true;
  }

  std::optional<BackendId> take_first_room(std::span<const BackendId> candidates) {
    for (const BackendId candidate : candidates) {
      if (take_room(candidate)) return candidate;
    }
    return std::nullopt;
  }

  // What line_up() puts into the queues. Made before anything changes and without the mutex: memory may be short.
  static Nodes make_nodes(Waiter& waiter, std::size_t count) {
    Nodes nodes;
    nodes.reserve(count);
    Queue made;
    for (; nodes.size() < count; nodes.push_back(made.extract(0))) made.emplace(0, &waiter);
    return nodes;
  }

  void line_up(Waiter& waiter, Nodes& nodes) {
    for (std::size_t i = 0; i < waiter.candidates.size(); ++i) {
      nodes[i].key() = waiter.arrival;
      at(waiter.candidates[i]).queue.insert(std::move(nodes[i]));
    }
    waiting_ += 1;
  }

  void make_room(std::span<const Cap> caps) {
    std::size_t wanted = backends_.size();
    for (const Cap& cap : caps) {
      assert(index_of(cap.backend) < kMaxBackendNames);
      if (cap.places > 0) wanted = std::max<std::size_t>(wanted, index_of(cap.backend) + 1);
    }
    backends_.resize(wanted);
  }

  void step_out(Waiter& waiter) {
    for (const BackendId candidate : waiter.candidates) at(candidate).queue.erase(waiter.arrival);
    waiting_ -= 1;
  }

  // Lets the one that has waited longest in, if there is room and somebody waits.
  std::optional<Wakeup> grant_next(BackendId id) {
    Backend& backend = at(id);
    if (!backend.room() || backend.queue.empty()) return std::nullopt;
    Waiter& waiter = *backend.queue.begin()->second;
    step_out(waiter);
    backend.running += 1;
    waiter.granted = id;
    return Wakeup{waiter.worker, waiter.token};
  }

  void give_back(BackendId id) {
    std::optional<Wakeup> woken;
    {
      const std::lock_guard lock(mutex_);
      assert(at(id).running > 0);
      at(id).running -= 1;
      woken = grant_next(id);
    }
    if (woken) wake_(woken->worker, woken->waiter);
  }

  void leave(Waiter& waiter) {
    std::optional<BackendId> granted;
    {
      const std::lock_guard lock(mutex_);
      granted = waiter.granted;
      if (!granted) step_out(waiter);
    }
    if (granted) give_back(*granted);
  }

  const Wake wake_;
  mutable std::mutex mutex_;       // guards all below
  std::vector<Backend> backends_;  // by BackendId, up to the last that had a cap
  std::uint32_t queue_size_ = 0;
  std::uint32_t waiting_ = 0;
  std::uint64_t arrivals_ = 0;
};

}  // namespace nexus
