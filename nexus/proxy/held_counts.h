// held_counts.h
// Owns:     the counts that a request holds while it is in flight, each as a pointer that owns one unit of it.
// Promises: a unit is given back exactly once: by reset(), by assigning another one, or by the destructor.
// Leaves:   caps and their queue to fleet/admission.h, body memory to base/memory_budget.h.
// Threads:  a worker's; OverallPlace counts over all workers.
// Tested by: tests/held_counts_test.cpp, tests/sim
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "nexus/metrics/slab.h"

namespace nexus {

namespace detail {

struct GivePendingBack {
  BackendId backend{};
  void operator()(Slab* slab) const { slab->add_in_flight(backend, -1); }
};

struct LeaveQueue {
  BackendId backend{};
  Histogram<kDurationBounds>* waits = nullptr;  // of the model
  Ns since_ns = 0;
  const Ns* now = nullptr;
  void operator()(Slab* slab) const {
    slab->add_queued(backend, -1);
    waits->observe(*now - since_ns);
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

// One queued request, in nexus_queue_depth of `backend`; when it is given back, the wait for `model` since `now` is
// recorded. `now` is the worker's clock and outlives the count. The cells are found first: giving back must not throw.
using QueuedCount = std::unique_ptr<Slab, detail::LeaveQueue>;

inline QueuedCount count_queued(Slab& slab, BackendId backend, ModelId model, const Ns& now) {
  Histogram<kDurationBounds>& waits = slab.queue_waits(model);
  slab.add_queued(backend, 1);
  return {&slab, {backend, &waits, now, &now}};
}

// One of the [server] max_pending places.
using OverallPlace = std::unique_ptr<std::atomic<std::uint32_t>, detail::GivePlaceBack>;

// Empty if all `limit` places are taken. Relaxed: the number alone is shared.
inline OverallPlace take_overall_place(std::atomic<std::uint32_t>& in_flight, std::uint32_t limit) {
  if (in_flight.fetch_add(1, std::memory_order_relaxed) < limit) return OverallPlace(&in_flight);
  in_flight.fetch_sub(1, std::memory_order_relaxed);
  return nullptr;
}

}  // namespace nexus
