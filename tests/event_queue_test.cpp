// event_queue_test.cpp
// Goal:   events are handled in the order in which they came, however many come, and the queue knows if it has them
// all. Method: a kernel that has so many events to tell, and tells at most a few in one wait.
#include "nexus/server/event_queue.h"

#include <doctest/doctest.h>

#include <vector>

using nexus::Event;
using nexus::Handle;
using nexus::Ns;

namespace {

struct Kernel {
  static constexpr std::size_t kMaxEvents = 10;
  std::uint64_t told = 0;
  std::uint64_t has = 0;  // counted from the first
  bool wakes = false;
  std::vector<Ns> deadlines;

  std::size_t wait(std::span<Event> out, Ns deadline, bool& woken) {
    deadlines.push_back(deadline);
    REQUIRE(out.size() <= kMaxEvents);
    std::size_t room = out.size(), filled = 0;
    if (wakes) {
      woken = true;
      wakes = false;
      room -= 1;
    }
    for (; filled < room && told < has; ++filled) out[filled].token = Handle{told++};
    return filled;
  }
};

struct Queue {
  Kernel kernel;
  nexus::EventQueue<Kernel> events;
  std::uint64_t handled = 0;
  bool woken = false;

  template <class GoesFirst>
  std::size_t fetch(Ns deadline, GoesFirst&& goes_first) {
    const std::size_t before = events.size();
    events.fetch(kernel, deadline, woken, goes_first);
    return events.size() - before;
  }
  std::size_t fetch(Ns deadline = 0) {
    return fetch(deadline, [](const Event&) { return false; });
  }
  void handle(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) REQUIRE(events.take().token.value == handled++);
  }
};

}  // namespace

TEST_SUITE("event queue") {
  TEST_CASE("one fetch gets all events that there are, and only its first wait may block") {
    for (const std::size_t there : {0, 1, 9, 10, 11, 20, 35, 1023}) {
      Queue queue;
      queue.kernel.has = there;
      CHECK(queue.fetch(77) == there);
      CHECK(queue.events.complete());
      CHECK_FALSE(queue.woken);
      CHECK(queue.kernel.deadlines.size() == there / 10 + 1);
      CHECK(queue.kernel.deadlines[0] == 77);
      for (std::size_t i = 1; i < queue.kernel.deadlines.size(); ++i) CHECK(queue.kernel.deadlines[i] == 0);
      queue.handle(there);
      CHECK(queue.events.empty());
    }
  }

  TEST_CASE("a wake-up takes the place of an event, and is told") {
    for (const std::size_t there : {0, 9, 10}) {
      Queue queue;
      queue.kernel.has = there;
      queue.kernel.wakes = true;
      CHECK(queue.fetch() == there);
      CHECK(queue.woken);
      CHECK(queue.events.complete());
      queue.handle(there);
    }
  }

  TEST_CASE("events that do not fit stay with the kernel, and come in order once there is room") {
    Queue queue;
    queue.kernel.has = nexus::kQueuedEvents + 500;
    CHECK(queue.fetch() == nexus::kQueuedEvents);
    CHECK_FALSE(queue.events.complete());
    CHECK(queue.fetch() == 0);
    CHECK_FALSE(queue.events.complete());
    queue.handle(300);
    CHECK(queue.fetch() == 300);
    CHECK_FALSE(queue.events.complete());
    queue.handle(400);
    CHECK(queue.fetch() == 200);
    CHECK(queue.events.complete());
    queue.handle(nexus::kQueuedEvents - 200);
    CHECK(queue.events.empty());
  }

  TEST_CASE("events that come while others are handled are behind them, for as long as the loop runs") {
    Queue queue;
    for (int i = 0; i < 2000; ++i) {
      queue.kernel.has += static_cast<std::uint64_t>(i % 33);
      queue.fetch();
      REQUIRE(queue.events.complete());
      queue.handle(std::min<std::size_t>(queue.kernel.told - queue.handled, 16));
    }
    queue.handle(queue.kernel.told - queue.handled);
    CHECK(queue.events.empty());
    CHECK(queue.handled == queue.kernel.has);
  }

  TEST_CASE("of each fetch, the first events that are to go first do, in order, and no event is lost or told twice") {
    for (const std::uint64_t one_of : {1, 2, 3, 7, 100}) {
      for (const std::size_t handled_at_once : {1, 5, 16, 40}) {
        Queue queue;
        const auto goes_first = [&](const Event& event) { return event.token.value % one_of == 0; };
        std::vector<std::uint64_t> expected;  // in the order in which they are to be taken
        for (int i = 0; i < 400; ++i) {
          const std::uint64_t from = queue.kernel.told;
          queue.kernel.has += static_cast<std::uint64_t>(i * i % 41);
          queue.fetch(0, goes_first);
          std::size_t ahead = 0;
          for (std::uint64_t token = from; token < queue.kernel.told; ++token) {
            const bool first = token % one_of == 0 && ahead < nexus::kFirstEvents;
            expected.insert(first ? expected.begin() + static_cast<std::ptrdiff_t>(ahead++) : expected.end(), token);
          }
          const std::size_t count = std::min(expected.size(), handled_at_once);
          for (std::size_t j = 0; j < count; ++j) REQUIRE(queue.events.take().token.value == expected[j]);
          expected.erase(expected.begin(), expected.begin() + static_cast<std::ptrdiff_t>(count));
          REQUIRE(queue.events.size() == expected.size());
        }
        for (const std::uint64_t token : expected) REQUIRE(queue.events.take().token.value == token);
        CHECK(queue.events.empty());
      }
    }
  }

  TEST_CASE("events that go first, without an end, leave the others a quarter of what is handled between two fetches") {
    Queue queue;
    queue.kernel.has = 200;
    queue.fetch();
    std::size_t others = 0;
    for (int i = 0; i < 50; ++i) {
      queue.kernel.has += nexus::kFreshEvents;
      queue.fetch(0, [](const Event&) { return true; });
      for (std::size_t j = 0; j < nexus::kFreshEvents; ++j) others += queue.events.take().token.value < 200 ? 1 : 0;
    }
    CHECK(others == 200);
  }
}
