// fair_queue_test.cpp
// Goal:   who goes next is who was served least, within the bound of the paper; one key is first come, first served.
// Method: a model of places that serve requests of random cost, on the queue alone, without threads or a clock.
#include "nexus/fleet/fair_queue.h"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <deque>
#include <string>
#include <vector>

#include "tests/lib/dice.h"

using namespace nexus;

namespace {

struct Waiter {
  std::uint64_t arrival = 0;
  Claim* claim = nullptr;
  char name = '?';
  std::uint64_t true_cost = 0;
  Claim own{};
};

// A backend with its queue, as admission.h runs one.
struct Model {
  FairClock clock;
  FairQueue<Waiter> queue;
  std::deque<Waiter> made;
  std::uint64_t arrivals = 0;

  Waiter& join(char name, Flow& flow, std::uint64_t estimate, std::uint32_t weight = 1, std::uint32_t priority = 50,
               Ns now = 0, Ns aged_after = kNever) {
    Waiter& waiter = made.emplace_back();
    waiter.own = {&flow, priority, weight, estimate, now, aged_after, false};
    waiter.claim = &waiter.own;
    waiter.name = name;
    waiter.arrival = ++arrivals;
    clock.begin(waiter.own);
    queue.insert(FairQueue<Waiter>::make_node(waiter));
    flow.waiting += 1;
    return waiter;
  }
  Waiter& go() {
    Waiter& next = queue.next(clock.now());
    queue.erase(next);
    next.own.flow->waiting -= 1;
    clock.charge(next.own);
    return next;
  }
  std::string order() {
    std::string names;
    while (!queue.empty()) names += go().name;
    return names;
  }
};

}  // namespace

TEST_CASE("with one key the order is that of arrival, whatever the requests cost") {
  Model model;
  Flow flow;
  std::string names;
  for (char name = 'a'; name <= 'z'; ++name) {
    model.join(name, flow, static_cast<std::uint64_t>(name) * 7919 % 1000);
    names += name;
  }
  CHECK(model.order() == names);
}

TEST_CASE("two keys take turns, each in its own order, however many requests one has") {
  Model model;
  Flow many, few;
  for (const char name : {'A', 'B', 'C', 'D', 'E', 'F'}) model.join(name, many, 10);
  for (const char name : {'x', 'y'}) model.join(name, few, 10);
  CHECK(model.order() == "AxByCDEF");
}

TEST_CASE("a key of twice the weight has twice the turns") {
  Model model;
  Flow heavy, light;
  for (int i = 0; i < 8; ++i) model.join('H', heavy, 10, 2);
  for (int i = 0; i < 8; ++i) model.join('l', light, 10, 1);
  const std::string first = model.order().substr(0, 9);
  CHECK(std::count(first.begin(), first.end(), 'H') == 6);
}

TEST_CASE("a key that was idle has saved no credit, and one that was alone owes none") {
  Model model;
  Flow busy, idle;
  for (int i = 0; i < 100; ++i) model.join('b', busy, 1000);
  for (int i = 0; i < 90; ++i) model.go();
  for (int i = 0; i < 10; ++i) model.join('i', idle, 1000);
  CHECK(model.order() == "ibibibibibibibibibib");
}

TEST_CASE("what a request has cost is put right at its end, once") {
  Model model;
  Flow dear, cheap;
  Waiter& first = model.join('d', dear, 10);
  model.join('d', dear, 10);
  model.join('c', cheap, 10);
  model.join('c', cheap, 10);
  CHECK(model.go().name == 'd');
  FairClock::settle(first.own, 1000);
  CHECK(dear.served == 1000);
  CHECK(model.order() == "ccd");
  Claim never{&cheap, 50, 1, 5, 0, kNever, false};
  const double before = cheap.served;
  FairClock::settle(never, 99);
  CHECK(cheap.served == before);  // it had not gone
}

TEST_CASE("a request is charged once, however often it is tried") {
  FairClock clock;
  Flow flow;
  Claim claim{&flow, 50, 1, 10, 0, kNever, false};
  clock.begin(claim);
  clock.charge(claim);
  clock.charge(claim);
  CHECK(flow.served == 10);
}

TEST_CASE("an incredible count of tokens costs no more than the largest request") {
  Flow flow;
  Claim claim{&flow, 50, 1, 0, 0, kNever, true};
  FairClock::settle(claim, fair_cost(1ull << 40, 1ull << 40));
  CHECK(flow.served == static_cast<double>(kMaxFairCost));
}

TEST_CASE("a lower priority goes first until the other one has waited for its time") {
  Model model;
  Flow batch, chat;
  model.join('b', batch, 10, 1, 90, 0, 5 * kSecond);
  for (int i = 0; i < 3; ++i) model.join('c', chat, 10, 1, 10, kSecond);
  CHECK(model.go().name == 'c');
  model.join('c', chat, 10, 1, 10, 5 * kSecond - 1);
  CHECK(model.go().name == 'c');
  model.join('c', chat, 10, 1, 10, 5 * kSecond);
  CHECK(model.order() == "bccc");
}

TEST_CASE("what two backlogged keys were served differs by at most twice the largest request times the places") {
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    CAPTURE(seed);
    sim::Dice dice(seed);
    Model model;
    const std::uint32_t places = dice.number(1, 8), largest = dice.number(10, 5000);
    std::array<Flow, 2> flows;
    std::array<double, 2> served{};
    std::vector<Waiter*> running;
    const auto join = [&](std::size_t key) {
      Waiter& waiter = model.join(static_cast<char>('0' + key), flows[key], dice.number(0, largest));
      waiter.true_cost = dice.number(1, key == 0 ? largest : 1 + largest / 10);
    };
    for (int i = 0; i < 20; ++i) join(dice.index(2));
    for (int i = 0; i < 10; ++i) join(0), join(1);
    for (int step = 0; step < 500; ++step) {
      if (running.size() < places) {
        running.push_back(&model.go());
        join(static_cast<std::size_t>(running.back()->name - '0'));  // it stays backlogged
        continue;
      }
      const std::size_t at = dice.index(running.size());
      Waiter& ended = *running[at];
      running.erase(running.begin() + static_cast<std::ptrdiff_t>(at));
      FairClock::settle(ended.own, ended.true_cost);
      served[static_cast<std::size_t>(ended.name - '0')] += static_cast<double>(ended.true_cost);
      REQUIRE(std::abs(served[0] - served[1]) <= 2.0 * largest * places);
    }
  }
}
