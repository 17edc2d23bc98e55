// circuit_breaker_test.cpp
// Goal:   a failing backend is ejected for the right time and comes back through exactly one probe.
// Method: sequences of results and the state expected after each, on the test's own clock; then racing threads.
#include "nexus/fleet/circuit_breaker.h"

#include <doctest/doctest.h>

#include <barrier>
#include <thread>
#include <vector>

using namespace nexus;

namespace {

constexpr HealthSettings kSettings{};  // three in a row, 5 s
constexpr AttemptOutcome kWhy = AttemptOutcome::connect_error;

// Sends `times` requests that fail at once. Returns the length of the last ejection.
Ns fail(CircuitBreaker& breaker, Ns now, int times = 1, std::optional<Ns> retry_after = {}) {
  Ns ejected = 0;
  for (int i = 0; i < times; ++i) ejected = breaker.enter(now).failed(now, kSettings, kWhy, retry_after);
  return ejected;
}
void succeed(CircuitBreaker& breaker, Ns now) { breaker.enter(now).succeeded(now); }

}  // namespace

TEST_CASE("the eject_after-th consecutive failure ejects, not the one before it") {
  CircuitBreaker breaker;
  CHECK(fail(breaker, 0, 2) == 0);
  CHECK(breaker.usable(0));
  CHECK(fail(breaker, 0) == 5 * kSecond);
  CHECK_FALSE(breaker.usable(0));
  CHECK(breaker.enter(0).circuit_open());
}

TEST_CASE("it says since when it is ejected, and since when it is not") {
  CircuitBreaker breaker;
  CHECK(breaker.changed_ns(kSecond) == 0);
  fail(breaker, 10 * kSecond, 3);
  CHECK(breaker.changed_ns(12 * kSecond) == 10 * kSecond);
  fail(breaker, 13 * kSecond, 1, 20 * kSecond);  // longer, but the same ejection
  CHECK(breaker.changed_ns(14 * kSecond) == 10 * kSecond);
  CHECK(breaker.changed_ns(34 * kSecond) == 33 * kSecond);  // it is over
  fail(breaker, 35 * kSecond);                              // the probe's
  CHECK(breaker.changed_ns(36 * kSecond) == 35 * kSecond);
  succeed(breaker, 100 * kSecond);
  CHECK(breaker.changed_ns(101 * kSecond) == 100 * kSecond);
}

TEST_CASE("eject_after is obeyed at its least and at its most") {
  for (const std::uint32_t eject_after : {1u, 2u, 1000u}) {
    CAPTURE(eject_after);
    CircuitBreaker breaker;
    HealthSettings settings;
    settings.eject_after = eject_after;
    for (std::uint32_t i = 1; i < eject_after; ++i) CHECK(breaker.enter(0).failed(0, settings, kWhy) == 0);
    CHECK(breaker.enter(0).failed(0, settings, kWhy) == 5 * kSecond);
  }
}

TEST_CASE("a success resets the count of consecutive failures") {
  CircuitBreaker breaker;
  for (int i = 0; i < 10; ++i) {
    CHECK(fail(breaker, 0, 2) == 0);
    succeed(breaker, 0);
  }
  CHECK(breaker.usable(0));
  CHECK(fail(breaker, 0, 3) > 0);
}

TEST_CASE("a request that ends without a result counts neither way") {
  CircuitBreaker breaker;
  fail(breaker, 0, 2);
  { const CircuitBreaker::Permit left = breaker.enter(0); }
  CHECK(fail(breaker, 0) == 5 * kSecond);
}

TEST_CASE("the ejection lasts to its end, and then one request is the probe") {
  CircuitBreaker breaker;
  const Ns start = 1234 * kSecond;
  fail(breaker, start, 3);
  CHECK_FALSE(breaker.usable(start + 5 * kSecond - 1));
  CHECK(breaker.enter(start + 5 * kSecond - 1).circuit_open());
  const Ns due = start + 5 * kSecond;
  CHECK(breaker.usable(due));
  CircuitBreaker::Permit probe = breaker.enter(due);
  CHECK(probe.is_probe());
  CHECK_FALSE(probe.circuit_open());
  CHECK_FALSE(breaker.usable(due + 3600 * kSecond));  // however long the probe takes
  CHECK(breaker.enter(due + 3600 * kSecond).circuit_open());

  SUBCASE("its success closes the circuit") {
    probe.succeeded(0);
    CHECK(breaker.usable(due));
    const CircuitBreaker::Permit permit = breaker.enter(due);
    CHECK_FALSE(permit.is_probe());
    CHECK_FALSE(permit.circuit_open());
    CHECK(fail(breaker, due, 2) == 0);
    CHECK(fail(breaker, due) == 5 * kSecond);  // the doubling starts again too
  }
  SUBCASE("its failure ejects at once, for twice the time") {
    CHECK(probe.failed(due, kSettings, kWhy) == 10 * kSecond);
    CHECK_FALSE(breaker.usable(due + 10 * kSecond - 1));
    CHECK(breaker.usable(due + 10 * kSecond));
  }
  SUBCASE("dropped without a result, the next request is the probe") {
    probe = CircuitBreaker::Permit();
    CHECK(breaker.usable(due));
    CHECK(breaker.enter(due).is_probe());
  }
  SUBCASE("moved, it is still one probe") {
    CircuitBreaker::Permit moved = std::move(probe);
    CHECK(breaker.enter(due).circuit_open());
    moved.succeeded(0);
    CHECK_FALSE(breaker.enter(due).is_probe());
  }
  SUBCASE("of two results only the first counts") {
    probe.succeeded(0);
    CHECK(probe.failed(due, kSettings, kWhy) == 0);
    CHECK(breaker.usable(due));
  }
}

TEST_CASE("each failed probe doubles the time, up to a minute or eject_time if that is longer") {
  struct Row {
    Ns eject_time;
    std::vector<Ns> spans;
  };
  const std::vector<Row> rows = {
      {5 * kSecond, {5 * kSecond, 10 * kSecond, 20 * kSecond, 40 * kSecond, 60 * kSecond, 60 * kSecond}},
      {60 * kSecond, {60 * kSecond, 60 * kSecond}},
      {90 * kSecond, {90 * kSecond, 90 * kSecond}},
      {86'400 * kSecond, {86'400 * kSecond, 86'400 * kSecond}},
      {kMillisecond, {kMillisecond, 2 * kMillisecond, 4 * kMillisecond}},
  };
  for (const Row& row : rows) {
    CAPTURE(row.eject_time);
    CircuitBreaker breaker;
    HealthSettings settings;
    settings.eject_time_ns = row.eject_time;
    settings.eject_after = 1;
    Ns now = kSecond;
    for (const Ns span : row.spans) {
      CHECK(breaker.enter(now).failed(now, settings, kWhy) == span);
      CHECK_FALSE(breaker.usable(now + span - 1));
      now += span;
      CHECK(breaker.usable(now));
    }
    for (int i = 0; i < 100; ++i) {  // it stays at the limit
      now += 86'400 * kSecond;
      REQUIRE(breaker.enter(now).failed(now, settings, kWhy) <= std::max(60 * kSecond, row.eject_time));
    }
  }
}

TEST_CASE("while a backend is ejected only the probe changes its state") {
  CircuitBreaker breaker;
  CircuitBreaker::Permit slow = breaker.enter(0);
  CircuitBreaker::Permit slower = breaker.enter(0);
  fail(breaker, 0, 3);
  slow.succeeded(0);  // sent before the ejection
  CHECK_FALSE(breaker.usable(kSecond));
  CHECK(slower.failed(4 * kSecond, kSettings, kWhy) == 0);
  CHECK(breaker.usable(5 * kSecond));  // not prolonged

  CircuitBreaker::Permit probe = breaker.enter(5 * kSecond);
  CircuitBreaker::Permit last_resort = breaker.enter(5 * kSecond);
  REQUIRE(probe.is_probe());
  REQUIRE(last_resort.circuit_open());
  CHECK(last_resort.failed(5 * kSecond, kSettings, kWhy, 100 * kSecond) == 0);
  probe.succeeded(0);
  CHECK(breaker.usable(5 * kSecond));
}

TEST_CASE("Retry-After ejects from the first failure on, within bounds") {
  struct Row {
    const char* name;
    int failures;
    Ns retry_after;
    Ns ejected;
  };
  const std::vector<Row> rows = {
      {"on the first failure", 1, 2 * kSecond, 2 * kSecond},
      {"zero", 1, 0, 0},
      {"negative", 1, -kSecond, 0},
      {"at the bound", 1, 300 * kSecond, 300 * kSecond},
      {"over the bound", 1, 301 * kSecond, 300 * kSecond},
      {"infinite", 1, kNever, 300 * kSecond},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    CircuitBreaker breaker;
    CHECK(fail(breaker, kSecond, row.failures, row.retry_after) == row.ejected);
    if (row.ejected > 0) CHECK_FALSE(breaker.usable(kSecond + row.ejected - 1));
    CHECK(breaker.usable(kSecond + row.ejected));
  }

  SUBCASE("the longer of Retry-After and the ejection time is used") {
    CircuitBreaker breaker;
    fail(breaker, 0, 2);
    CHECK(fail(breaker, 0, 1, 2 * kSecond) == 5 * kSecond);
    CircuitBreaker other;
    fail(other, 0, 2);
    CHECK(fail(other, 0, 1, 7 * kSecond) == 7 * kSecond);
    CHECK(other.enter(7 * kSecond).failed(7 * kSecond, kSettings, kWhy) == 10 * kSecond);
  }
  SUBCASE("Retry-After alone does not double the time") {
    CircuitBreaker breaker;
    fail(breaker, 0, 1, kSecond);
    CHECK(breaker.enter(kSecond).failed(kSecond, kSettings, kWhy) == 5 * kSecond);
  }
  SUBCASE("an ejected backend can extend its ejection, never shorten it") {
    CircuitBreaker breaker;
    CircuitBreaker::Permit one = breaker.enter(0), other = breaker.enter(0);
    fail(breaker, 0, 3);
    CHECK(one.failed(0, kSettings, kWhy, 20 * kSecond) == 0);  // it is not ejected anew
    CHECK(other.failed(0, kSettings, kWhy, 6 * kSecond) == 0);
    CHECK_FALSE(breaker.usable(20 * kSecond - 1));
    CHECK(breaker.usable(20 * kSecond));
  }
}

TEST_CASE("an ejection tells its reason and the time that is left, and its end is told once") {
  CircuitBreaker breaker;
  CHECK_FALSE(breaker.ejection(0).has_value());
  for (const auto why : {AttemptOutcome::timeout, AttemptOutcome::truncated, AttemptOutcome::status_5xx}) {
    breaker.enter(0).failed(0, kSettings, why);
  }
  REQUIRE(breaker.ejection(kSecond).has_value());
  CHECK(breaker.ejection(kSecond)->left_ns == 4 * kSecond);
  CHECK(breaker.ejection(kSecond)->why == AttemptOutcome::status_5xx);
  // Over, but nobody has tried it: it may get requests.
  CHECK_FALSE(breaker.ejection(5 * kSecond).has_value());
  {
    CircuitBreaker::Permit probe = breaker.enter(6 * kSecond);
    REQUIRE(breaker.ejection(6 * kSecond).has_value());
    CHECK(breaker.ejection(6 * kSecond)->left_ns == 0);
    CHECK(probe.failed(6 * kSecond, kSettings, AttemptOutcome::connect_error) == 10 * kSecond);
  }
  CHECK(breaker.ejection(7 * kSecond)->left_ns == 9 * kSecond);
  CHECK(breaker.ejection(7 * kSecond)->why == AttemptOutcome::connect_error);
  CircuitBreaker::Permit late = breaker.enter(7 * kSecond);
  CHECK_FALSE(late.succeeded(0));
  CircuitBreaker::Permit probe = breaker.enter(16 * kSecond);
  CHECK(probe.succeeded(0));
  CHECK_FALSE(probe.succeeded(0));
  CHECK_FALSE(breaker.enter(16 * kSecond).succeeded(0));
  CHECK_FALSE(breaker.ejection(16 * kSecond).has_value());
}

TEST_CASE("an end between two milliseconds is rounded up, never down") {
  CircuitBreaker breaker;
  const Ns now = 7 * kSecond + 1;
  fail(breaker, now, 3);
  CHECK_FALSE(breaker.usable(now + 5 * kSecond));
  CHECK(breaker.usable(now + 5 * kSecond + kMillisecond));
}

TEST_CASE("of many threads that enter a half-open circuit at once, exactly one gets the probe") {
  constexpr int kThreads = 4;
  constexpr int kRounds = 2'000;
  CircuitBreaker breaker;
  HealthSettings settings;
  settings.eject_after = 1;
  Ns now = kSecond;
  std::atomic<int> probes{0}, admitted{0};
  int wrong = 0;
  REQUIRE(breaker.enter(now).failed(now, settings, kWhy) > 0);
  // One round: all threads enter at once. Between rounds one thread checks the counts and moves the clock. In turn the
  // probe is dropped, fails, and succeeds (then the backend is ejected again for the next round).
  std::vector<CircuitBreaker::Permit> held(kThreads);
  int round = 0;
  auto between = [&]() noexcept {
    if (probes.exchange(0) != 1 || admitted.exchange(0) != 0) ++wrong;
    for (CircuitBreaker::Permit& permit : held) {
      if (permit.is_probe() && round % 3 == 1) permit.failed(now, settings, kWhy);
      if (permit.is_probe() && round % 3 == 2) permit.succeeded(0);
      permit = CircuitBreaker::Permit();
    }
    if (round % 3 == 2) breaker.enter(now).failed(now, settings, kWhy);
    now += 3600 * kSecond;
    ++round;
  };
  now += 3600 * kSecond;
  std::barrier barrier(kThreads, between);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kRounds; ++i) {
        held[t] = breaker.enter(now);
        if (held[t].is_probe()) ++probes;
        if (!held[t].is_probe() && !held[t].circuit_open()) ++admitted;
        barrier.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(round == kRounds);
}

TEST_CASE("simultaneous failures on many threads eject once") {
  constexpr int kThreads = 4;
  CircuitBreaker breaker;
  std::atomic<int> ejections{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) ejections += breaker.enter(kSecond).failed(kSecond, kSettings, kWhy) > 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(ejections == 1);
  CHECK(breaker.usable(6 * kSecond));  // not doubled by the late failures
  CHECK_FALSE(breaker.usable(6 * kSecond - 1));
}
