// admission_test.cpp
// Goal:   a cap is never exceeded, the queue is first come first served, and no place is lost, in any order of events.
// Method: the rules one by one; random steps against a simple model of the queue; threads that compete for places.
#include "nexus/fleet/admission.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <latch>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

using namespace nexus;

namespace {

using Place = Admission::Place;
using Ticket = Admission::Ticket;
using Outcome = Admission::Outcome;

constexpr BackendId kA{1};
constexpr BackendId kB{2};
constexpr BackendId kC{3};

Handle token(std::uint32_t number) { return Handle::make(1, 0, number); }

// An Admission that records the wake-ups.
struct Gate {
  std::vector<std::uint32_t> woken;  // the numbers of the waiters, in order
  std::vector<std::uint32_t> workers;
  Admission admission{[this](std::uint32_t worker, Handle waiter) {
    workers.push_back(worker);
    woken.push_back(waiter.slot());
  }};

  void cap(std::uint32_t a, std::uint32_t b = 0, std::uint32_t queue_size = 100) {
    const Admission::Cap caps[] = {{kA, a}, {kB, b}};
    admission.configure(caps, queue_size);
  }
  Place enter(BackendId backend) {
    Place place;
    CHECK(admission.try_enter(backend, 1, place));
    return place;
  }
  bool refuses(BackendId backend) {
    Place place;
    return !admission.try_enter(backend, 1, place);
  }
  Ticket wait(std::vector<BackendId> candidates, std::uint32_t number, std::uint32_t worker = 0) {
    Ticket ticket;
    Place place;
    CHECK(admission.enqueue(candidates, worker, token(number), ticket, place) == Outcome::queued);
    return ticket;
  }
};

using Numbers = std::vector<std::uint32_t>;

}  // namespace

TEST_CASE("there are as many places as the cap, and each is given back") {
  for (const std::uint32_t cap : {1u, 2u, 64u}) {
    CAPTURE(cap);
    Gate gate;
    gate.cap(cap);
    std::vector<Place> places;
    for (std::uint32_t i = 0; i < cap; ++i) places.push_back(gate.enter(kA));
    CHECK(gate.refuses(kA));
    CHECK(gate.admission.running_on(kA) == cap);
    places.pop_back();
    CHECK(gate.admission.running_on(kA) == cap - 1);
    places.push_back(gate.enter(kA));
    CHECK(gate.refuses(kA));
    places.clear();
    CHECK(gate.admission.running_on(kA) == 0);
  }
}

TEST_CASE("without a cap every request enters and nothing is counted") {
  Gate gate;
  std::vector<Place> places(100);
  for (Place& place : places) {
    CHECK(gate.admission.try_enter(kC, 0, place));
    CHECK_FALSE(place.held());
  }
  CHECK(gate.admission.running_on(kC) == 0);
}

TEST_CASE("a place that is moved, overwritten or moved to itself is given back once") {
  Gate gate;
  gate.cap(2, 1);
  Place place = gate.enter(kA);
  Place moved = std::move(place);
  CHECK_FALSE(place.held());
  CHECK(moved.backend() == kA);
  CHECK(gate.admission.running_on(kA) == 1);
  Place& same = moved;
  moved = std::move(same);
  CHECK(moved.held());
  CHECK(gate.admission.try_enter(kB, 1, moved));  // a retry elsewhere, into the same object
  CHECK(gate.admission.running_on(kA) == 0);
  CHECK(gate.admission.running_on(kB) == 1);
  CHECK(gate.admission.try_enter(kC, 0, moved));
  CHECK(gate.admission.running_on(kB) == 0);
}

TEST_CASE("a refused request keeps its previous place") {
  Gate gate;
  gate.cap(1, 1);
  Place place = gate.enter(kA);
  const Place other = gate.enter(kB);
  CHECK_FALSE(gate.admission.try_enter(kB, 1, place));
  CHECK(place.backend() == kA);
  CHECK(gate.admission.running_on(kA) == 1);
}

TEST_CASE("the queue is served in order of arrival, and each waiter is woken once, on its own worker") {
  Gate gate;
  gate.cap(1);
  Place running = gate.enter(kA);
  std::vector<Ticket> tickets;
  for (std::uint32_t i = 0; i < 5; ++i) tickets.push_back(gate.wait({kA}, i, i % 2));
  CHECK(gate.admission.waiting() == 5);
  CHECK(gate.admission.waiting_for(kA) == 5);
  for (std::uint32_t i = 0; i < 5; ++i) {
    CHECK_FALSE(gate.admission.take_grant(tickets[i]));
    running = Place();
    CHECK(gate.woken.size() == i + 1);
    CHECK(gate.refuses(kA));  // the place is the waiter's, even before it takes it
    auto granted = gate.admission.take_grant(tickets[i]);
    REQUIRE(granted);
    CHECK_FALSE(tickets[i].held());
    running = std::move(*granted);
    CHECK(running.backend() == kA);
    CHECK(gate.admission.running_on(kA) == 1);
  }
  CHECK(gate.woken == Numbers{0, 1, 2, 3, 4});
  CHECK(gate.workers == Numbers{0, 1, 0, 1, 0});
  running = Place();
  CHECK(gate.admission.running_on(kA) == 0);
}

TEST_CASE("a newcomer does not overtake waiting requests") {
  Gate gate;
  gate.cap(2);
  Place first = gate.enter(kA), second = gate.enter(kA);
  const Ticket waiting = gate.wait({kA}, 1);
  first = Place();
  CHECK(gate.refuses(kA));
  Ticket ticket;
  Place place;
  const BackendId candidates[] = {kA};
  CHECK(gate.admission.enqueue(candidates, 0, token(2), ticket, place) == Outcome::queued);
}

TEST_CASE("a request that waits for two backends gets the first free place and leaves both queues") {
  Gate gate;
  gate.cap(1, 1);
  Place a = gate.enter(kA), b = gate.enter(kB);
  Ticket either = gate.wait({kA, kB}, 1);
  Ticket only_a = gate.wait({kA}, 2);
  CHECK(gate.admission.waiting() == 2);
  CHECK(gate.admission.waiting_for(kA) == 2);
  CHECK(gate.admission.waiting_for(kB) == 1);
  b = Place();
  CHECK(gate.woken == Numbers{1});
  CHECK(gate.admission.waiting_for(kA) == 1);
  CHECK(gate.admission.waiting_for(kB) == 0);
  a = Place();
  CHECK(gate.woken == Numbers{1, 2});
  CHECK(gate.admission.take_grant(either)->backend() == kB);
  CHECK(gate.admission.take_grant(only_a)->backend() == kA);
}

TEST_CASE("enqueue takes a place that became free meanwhile, the first in the request's order") {
  Gate gate;
  gate.cap(1, 1);
  Ticket ticket;
  Place place;
  const BackendId candidates[] = {kB, kA};
  CHECK(gate.admission.enqueue(candidates, 0, token(1), ticket, place) == Outcome::entered);
  CHECK(place.backend() == kB);
  CHECK_FALSE(ticket.held());
  CHECK(gate.admission.waiting() == 0);
}

TEST_CASE("the queue is bounded: one below, at and above its size, and with size 0") {
  for (const std::uint32_t size : {0u, 1u, 3u}) {
    CAPTURE(size);
    Gate gate;
    gate.cap(1, 1, size);
    const Place a = gate.enter(kA), b = gate.enter(kB);
    std::vector<Ticket> tickets;
    for (std::uint32_t i = 0; i < size; ++i) tickets.push_back(gate.wait({i % 2 == 0 ? kA : kB}, i));
    Ticket ticket;
    Place place;
    const BackendId candidates[] = {kA};
    CHECK(gate.admission.enqueue(candidates, 0, token(9), ticket, place) == Outcome::full);
    CHECK_FALSE(ticket.held());
    CHECK_FALSE(place.held());
    CHECK(gate.admission.waiting() == size);
    if (tickets.empty()) continue;
    tickets.pop_back();
    CHECK(gate.admission.enqueue(candidates, 0, token(9), ticket, place) == Outcome::queued);
  }
}

TEST_CASE("a request that leaves the queue is not woken; one that leaves with a place passes it on") {
  Gate gate;
  gate.cap(1);
  Place running = gate.enter(kA);
  Ticket first = gate.wait({kA}, 1);
  Ticket second = gate.wait({kA}, 2);
  Ticket third = gate.wait({kA}, 3);
  first = Ticket();
  CHECK(gate.admission.waiting() == 2);
  running = Place();
  CHECK(gate.woken == Numbers{2});
  second = Ticket();  // it has a place, but its client has left
  CHECK(gate.woken == Numbers{2, 3});
  third = Ticket();
  CHECK(gate.admission.running_on(kA) == 0);
  CHECK(gate.admission.waiting() == 0);
}

TEST_CASE(
    "a lowered cap ends no request and admits none until enough have left; a raised one admits the first in line") {
  Gate gate;
  gate.cap(3);
  std::vector<Place> running;
  for (int i = 0; i < 3; ++i) running.push_back(gate.enter(kA));
  std::vector<Ticket> tickets;
  for (std::uint32_t i = 0; i < 5; ++i) tickets.push_back(gate.wait({kA}, i));

  gate.cap(1);
  CHECK(gate.admission.running_on(kA) == 3);
  running.pop_back();
  running.pop_back();
  CHECK(gate.woken.empty());
  CHECK(gate.admission.running_on(kA) == 1);
  running.pop_back();
  CHECK(gate.woken == Numbers{0});

  gate.cap(3);
  CHECK(gate.woken == Numbers{0, 1, 2});
  CHECK(gate.admission.running_on(kA) == 3);
  CHECK(gate.refuses(kA));

  gate.cap(0);  // without a cap all waiting requests enter
  CHECK(gate.woken == Numbers{0, 1, 2, 3, 4});
  CHECK(gate.admission.waiting() == 0);
  tickets.clear();
  CHECK(gate.admission.running_on(kA) == 0);
}

TEST_CASE("a backend that is no longer configured keeps its cap for the requests still on it") {
  Gate gate;
  gate.cap(1);
  Place running = gate.enter(kA);
  Ticket waiting = gate.wait({kA}, 1);
  gate.admission.configure({}, 100);
  CHECK(gate.refuses(kA));
  running = Place();
  CHECK(gate.admission.take_grant(waiting));
}

TEST_CASE("a request with new candidates keeps its position") {
  Gate gate;
  gate.cap(1, 1);
  Place a = gate.enter(kA), b = gate.enter(kB);
  Ticket first = gate.wait({kA}, 1);
  Ticket second = gate.wait({kB}, 2);
  const BackendId both[] = {kA, kB};
  gate.admission.renew(first, both);
  CHECK(gate.admission.waiting() == 2);
  b = Place();
  CHECK(gate.woken == Numbers{1});  // it arrived before the second, and kB is now a candidate

  SUBCASE("if one of them has room it enters at once") {
    a = Place();
    gate.admission.renew(second, both);
    CHECK(gate.admission.waiting() == 0);
    const auto granted = gate.admission.take_grant(second);
    REQUIRE(granted);
    CHECK(granted->backend() == kA);
  }
  SUBCASE("a place that was granted is kept") {
    const BackendId only_a[] = {kA};
    gate.admission.renew(first, only_a);
    const auto granted = gate.admission.take_grant(first);
    REQUIRE(granted);
    CHECK(granted->backend() == kB);
  }
}

TEST_CASE("a request that finds room among new candidates is charged to its key, as others are") {
  Gate gate;
  gate.cap(1, 1);
  Place a = gate.enter(kA);
  Flow flow;
  Claim claim{.flow = &flow, .cost = 7};
  Ticket ticket;
  Place place;
  REQUIRE(gate.admission.enqueue({{kA}}, 0, token(1), ticket, place, &claim) == Outcome::queued);
  const BackendId only_b[] = {kB};
  gate.admission.renew(ticket, only_b);
  REQUIRE(gate.admission.take_grant(ticket));
  CHECK(claim.charged);
  CHECK(flow.served == 7);
}

TEST_CASE("a declined place goes to the next in line, and the request keeps its position for another") {
  Gate gate;
  gate.cap(1, 1);
  Place a = gate.enter(kA);
  Place b = gate.enter(kB);
  const std::vector<BackendId> both = {kA, kB};
  Ticket first = gate.wait(both, 1);
  Ticket second = gate.wait(both, 2);
  Ticket third = gate.wait({kB}, 3);
  CHECK_FALSE(gate.admission.granted(first));
  a = Place();
  CHECK(gate.woken == Numbers{1});
  CHECK(gate.admission.granted(first) == kA);
  const BackendId only_b[] = {kB};

  SUBCASE("while that is full it waits ahead of later arrivals") {
    gate.admission.decline(first, only_b);
    CHECK(gate.woken == Numbers{1, 2});
    CHECK(gate.admission.granted(second) == kA);
    CHECK_FALSE(gate.admission.granted(first));
    CHECK(gate.admission.running_on(kA) == 1);
    CHECK(gate.admission.waiting() == 2);
    b = Place();
    CHECK(gate.woken == Numbers{1, 2, 1});
    CHECK(gate.admission.take_grant(first)->backend() == kB);
  }
  SUBCASE("if no other request waits for it, it is free") {
    second = Ticket();
    gate.admission.decline(first, only_b);
    CHECK(gate.admission.running_on(kA) == 0);
    CHECK(gate.woken == Numbers{1});
    CHECK(gate.enter(kA).held());
  }
  SUBCASE("if another backend has room that is granted at once, without a wake-up") {
    third = Ticket();
    second = Ticket();
    b = Place();
    gate.admission.decline(first, only_b);
    CHECK(gate.woken == Numbers{1});
    CHECK(gate.admission.granted(first) == kB);
    CHECK(gate.admission.waiting() == 0);
  }
}

// Goal:   arbitrary steps in any order follow the rules.
// Method: each step is done on a plain list of requests in order of arrival and on the Admission; after each, both must
//         agree on the running, the waiting and the woken requests.
TEST_CASE("random steps agree with a plain list of requests in order of arrival") {
  struct Request {
    std::uint32_t number;
    std::vector<BackendId> candidates;
    Ticket ticket;
    Place place;
    bool waits = false;  // according to the list
    BackendId on{};      // the backend it runs on or was granted, according to the list
  };
  std::mt19937 random(5);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  const std::vector<BackendId> backends = {kA, kB, kC};
  for (int probe = 0; probe < 60; ++probe) {
    CAPTURE(probe);
    Gate gate;
    std::vector<std::uint32_t> caps(4), running(4);
    std::uint32_t queue_size = 5;
    std::deque<Request> requests;  // in order of arrival
    Numbers expected_woken;
    const auto configure = [&] {
      std::vector<Admission::Cap> list;
      for (const BackendId id : backends) list.push_back({id, caps[index_of(id)]});
      gate.admission.configure(list, queue_size);
    };
    // Grants the free places of `id` to the waiting requests, the earliest first.
    const auto let_in = [&](BackendId id) {
      for (Request& request : requests) {
        const auto& wants = request.candidates;
        if (!request.waits || std::find(wants.begin(), wants.end(), id) == wants.end()) continue;
        if (running[index_of(id)] >= caps[index_of(id)]) return;
        ++running[index_of(id)];
        request.waits = false;
        request.on = id;
        expected_woken.push_back(request.number);
      }
    };
    for (std::uint32_t& cap : caps) cap = static_cast<std::uint32_t>(1 + below(3));
    configure();
    for (std::uint32_t step = 0; step < 400; ++step) {
      const std::size_t action = below(10);
      if (action < 5) {
        Request request{step, {}, {}, {}};
        for (const BackendId id : backends) {
          if (below(2) == 0) request.candidates.push_back(id);
        }
        if (request.candidates.empty()) request.candidates.push_back(backends[below(3)]);
        BackendId free{};
        for (const BackendId id : request.candidates) {
          if (free == BackendId::none && running[index_of(id)] < caps[index_of(id)]) free = id;
        }
        const auto waiting = std::count_if(requests.begin(), requests.end(), [](const Request& r) { return r.waits; });
        const Outcome outcome =
            gate.admission.enqueue(request.candidates, 0, token(step), request.ticket, request.place);
        if (free != BackendId::none) {
          REQUIRE(outcome == Outcome::entered);
          REQUIRE(request.place.backend() == free);
          ++running[index_of(free)];
          request.on = free;
        } else if (waiting >= static_cast<std::ptrdiff_t>(queue_size)) {
          REQUIRE(outcome == Outcome::full);
          continue;
        } else {
          REQUIRE(outcome == Outcome::queued);
          request.waits = true;
        }
        requests.push_back(std::move(request));
      } else if (action < 9 && !requests.empty()) {
        const auto at = requests.begin() + static_cast<std::ptrdiff_t>(below(requests.size()));
        Request gone = std::move(*at);
        requests.erase(at);
        if (!gone.waits) {
          --running[index_of(gone.on)];
          let_in(gone.on);
        }
        if (below(2) == 0) {  // taken first, or dropped as it is
          auto granted = gate.admission.take_grant(gone.ticket);
          REQUIRE(granted.has_value() == (!gone.waits && !gone.place.held()));
          if (granted) REQUIRE(granted->backend() == gone.on);
        }
      } else {
        const BackendId id = backends[below(3)];
        caps[index_of(id)] = static_cast<std::uint32_t>(1 + below(4));
        queue_size = static_cast<std::uint32_t>(below(8));
        let_in(id);
        configure();
      }
      REQUIRE(gate.woken == expected_woken);
      for (const BackendId id : backends) REQUIRE(gate.admission.running_on(id) == running[index_of(id)]);
    }
    requests.clear();
    for (const BackendId id : backends) {
      REQUIRE(gate.admission.running_on(id) == 0);
      REQUIRE(gate.admission.waiting_for(id) == 0);
    }
  }
}

namespace {

// A worker's inbox of wake-ups.
struct Inbox {
  std::mutex mutex;
  std::condition_variable filled;
  std::vector<std::uint32_t> waiters;
};

}  // namespace

// Goal:   with several threads no cap is exceeded, every request is served or has left, and nothing remains.
// Method: each thread has up to eight requests: some enter, some wait, some leave while they wait. Each request that
//         runs counts itself on an atomic of the test's own, which must never exceed the cap.
TEST_CASE("competing threads never exceed a cap, and every request is served or has left") {
  constexpr std::uint32_t kThreads = 4;
  constexpr std::uint32_t kRequests = 4'000;  // per thread
  constexpr std::size_t kAtOnce = 8;
  constexpr std::uint32_t kCaps[] = {0, 3, 2, 1};
  std::vector<Inbox> inboxes(kThreads);
  Admission admission([&](std::uint32_t worker, Handle waiter) {
    Inbox& inbox = inboxes[worker];
    const std::lock_guard lock(inbox.mutex);
    inbox.waiters.push_back(waiter.slot());
    inbox.filled.notify_one();
  });
  const Admission::Cap caps[] = {{kA, kCaps[1]}, {kB, kCaps[2]}, {kC, kCaps[3]}};
  admission.configure(caps, 24);
  std::atomic<std::uint32_t> running[4] = {};
  std::atomic<std::uint32_t> exceeded{0}, served{0}, left{0}, refused{0}, waited{0}, lost{0};

  std::latch start(kThreads);
  struct Request {
    std::uint32_t number;
    Ticket ticket;
    Place place;
    std::uint32_t turns_left = 0;
  };
  const auto work = [&](std::uint32_t worker) {
    std::mt19937 random(worker);
    std::deque<Request> requests;
    const auto any_backend = [&] { return BackendId{static_cast<std::uint32_t>(1 + random() % 3)}; };
    const auto begin = [&](Request& request) {
      const std::uint32_t backend = index_of(request.place.backend());
      if (running[backend].fetch_add(1) >= kCaps[backend]) ++exceeded;
      request.turns_left = random() % 4;
    };
    const auto end = [&](Request& request) {
      running[index_of(request.place.backend())].fetch_sub(1);
      request.place = Place();
      ++served;
    };
    start.arrive_and_wait();
    for (std::uint32_t number = 0; number < kRequests || !requests.empty();) {
      std::this_thread::yield();  // otherwise each thread might finish within one time slice and meet no other
      if (number < kRequests && requests.size() < kAtOnce) {
        Request request{number++, {}, {}};
        std::vector<BackendId> wants = {any_backend()};
        if (random() % 2 == 0) wants.push_back(any_backend());
        Outcome outcome = Outcome::entered;
        if (!admission.try_enter(wants[0], 1, request.place)) {
          outcome = admission.enqueue(wants, worker, token(request.number), request.ticket, request.place);
        }
        if (outcome == Outcome::full) {
          ++refused;
          continue;
        }
        if (outcome == Outcome::entered) begin(request);
        if (outcome == Outcome::queued) ++waited;
        requests.push_back(std::move(request));
      }
      std::vector<std::uint32_t> woken;
      {
        // Block for a wake-up only if all requests wait and no more may be started.
        Inbox& inbox = inboxes[worker];
        std::unique_lock lock(inbox.mutex);
        const bool idle =
            (requests.size() >= kAtOnce || number >= kRequests) && !requests.empty() &&
            std::all_of(requests.begin(), requests.end(), [](const Request& request) { return request.ticket.held(); });
        if (idle && !inbox.filled.wait_for(lock, std::chrono::seconds(30), [&] { return !inbox.waiters.empty(); })) {
          ++lost;
          return;
        }
        woken.swap(inbox.waiters);
      }
      for (const std::uint32_t waiter : woken) {
        const auto at = std::find_if(requests.begin(), requests.end(),
                                     [&](const Request& request) { return request.number == waiter; });
        if (at == requests.end() || !at->ticket.held()) continue;  // it left before it was woken
        auto place = admission.take_grant(at->ticket);
        if (!place) {
          ++lost;
          continue;
        }
        at->place = std::move(*place);
        begin(*at);
      }
      for (auto at = requests.begin(); at != requests.end();) {
        if (at->ticket.held()) {
          const bool leaves = random() % 16 == 0 && requests.size() > 1;
          left += leaves ? 1u : 0u;
          at = leaves ? requests.erase(at) : at + 1;
        } else if (at->turns_left-- == 0) {
          end(*at);
          at = requests.erase(at);
        } else {
          ++at;
        }
      }
    }
  };
  std::vector<std::thread> threads;
  for (std::uint32_t worker = 0; worker < kThreads; ++worker) threads.emplace_back(work, worker);
  for (std::thread& thread : threads) thread.join();

  CHECK(exceeded == 0);
  REQUIRE(lost == 0);  // no wake-up without a place, and none missing
  CHECK(served + left + refused == kThreads * kRequests);
  CHECK(served > kRequests / 2);
  CHECK(left > 0);
  CHECK(waited > kRequests / 4);
  CHECK(admission.waiting() == 0);
  for (const BackendId id : {kA, kB, kC}) {
    CHECK(admission.running_on(id) == 0);
    CHECK(admission.waiting_for(id) == 0);
  }
}
