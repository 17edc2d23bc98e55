#include "nexus/fleet/admission.h"

#include <doctest/doctest.h>

#include <utility>
#include <vector>

using namespace nexus;

namespace {

constexpr BackendId kBackend{3};

}  // namespace

TEST_CASE("a pending count is given back once, however it ends") {
  Slab slab;
  {
    PendingCount first = count_pending(slab, kBackend);
    CHECK(slab.pending(kBackend) == 1);
    PendingCount moved = std::move(first);
    CHECK(slab.pending(kBackend) == 1);
    moved = count_pending(slab, kBackend);  // the old unit goes back
    CHECK(slab.pending(kBackend) == 1);
    first.reset();  // holds nothing any more
    CHECK(slab.pending(kBackend) == 1);
  }
  CHECK(slab.pending(kBackend) == 0);
}

TEST_CASE("a queued request is pending and in the queue, and its wait is recorded when it leaves") {
  Slab slab;
  Ns now = 10 * kSecond;
  QueuedCount queued = count_queued(slab, kBackend, ModelId{7}, KeyId::none, now);
  CHECK(slab.pending(kBackend) == 1);
  CHECK(slab.backend(kBackend)->queue_depth.read_signed() == 1);
  CHECK(slab.backend(kBackend)->in_flight.read_signed() == 0);
  now += 2 * kSecond;
  queued.reset();
  CHECK(slab.pending(kBackend) == 0);
  CHECK(slab.backend(kBackend)->queue_depth.read_signed() == 0);
  HistogramValues<kDurationBounds> waits;
  slab.model(ModelId{7})->queue_wait.add_to(waits);
  CHECK(waits.count() == 1);
  CHECK(waits.sum == static_cast<std::uint64_t>(2 * kSecond));
}

TEST_CASE("no more places are taken than the limit, and each can be taken again") {
  std::atomic<std::uint32_t> in_flight{0};
  std::vector<OverallPlace> places;
  for (int i = 0; i < 3; ++i) places.push_back(take_overall_place(in_flight, 3));
  for (const OverallPlace& place : places) CHECK(place != nullptr);
  CHECK(take_overall_place(in_flight, 3) == nullptr);
  CHECK(in_flight == 3);  // the refusal took nothing
  places.pop_back();
  CHECK(take_overall_place(in_flight, 3) != nullptr);
  places.clear();
  CHECK(in_flight == 0);
}
