// timer_wheel_test.cpp
// Goal:   every deadline fires once, at its time. Method: cases by hand, then many timers against a plain list of
// times.
#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "nexus/net/timer_wheel.h"

using nexus::deadline_after;
using nexus::Handle;
using nexus::kMillisecond;
using nexus::kNever;
using nexus::kSecond;
using nexus::Ns;
using nexus::Timer;
using nexus::TimerWheel;

namespace {

Handle named(std::uint32_t slot) { return Handle::make(1, 0, slot); }

// The slots of the timers that fire() told of, in order.
std::vector<std::uint32_t> fired(TimerWheel& wheel, Ns now) {
  std::vector<std::uint32_t> slots;
  wheel.fire(now, [&](Handle token) { slots.push_back(token.slot()); });
  return slots;
}

using SlotMap = std::vector<std::uint32_t>;

}  // namespace

TEST_CASE("a deadline fires once, at its time and not before") {
  // From within a tick to beyond the wheel's last turn.
  for (const Ns start : {Ns{0}, 63 * kMillisecond, 1'234'567'891 * kMillisecond + 77}) {
    for (const Ns span : {Ns{1}, kMillisecond - 1, kMillisecond, 63 * kMillisecond, 64 * kMillisecond,
                          65 * kMillisecond, 4095 * kMillisecond, 4096 * kMillisecond, 4097 * kMillisecond,
                          300 * kSecond, 3600 * kSecond, 20'000 * kSecond, 400'000 * kSecond}) {
      CAPTURE(start);
      CAPTURE(span);
      TimerWheel wheel(start);
      Timer timer(named(7));
      wheel.arm(timer, start + span);
      CHECK(timer.armed());
      CHECK(timer.deadline() == start + span);
      CHECK(fired(wheel, start + span - 1).empty());
      CHECK(fired(wheel, start + span + kMillisecond) == SlotMap{7});
      CHECK_FALSE(timer.armed());
      CHECK(timer.deadline() == kNever);
      CHECK(fired(wheel, start + span + 10'000 * kSecond).empty());
      CHECK(wheel.next() == kNever);
    }
  }
}

TEST_CASE("a loop that sleeps until next() fires each deadline within a tick") {
  for (const Ns span : {Ns{1}, kMillisecond, 100 * kMillisecond, 5 * kSecond, 600 * kSecond, 400'000 * kSecond}) {
    CAPTURE(span);
    TimerWheel wheel(0);
    Timer timer(named(1));
    wheel.arm(timer, span);
    int turns = 0;
    Ns now = 0;
    while (timer.armed() && turns < 200) {
      const Ns next = wheel.next();
      REQUIRE(next != kNever);
      REQUIRE(next >= now);
      now = next;
      wheel.fire(now, [](Handle) {});
      turns += 1;
    }
    CHECK_FALSE(timer.armed());
    CHECK(now >= span);
    CHECK(now < span + kMillisecond);
    CHECK(turns <= 64);  // once for each level, and once for each turn of the last one
  }
}

TEST_CASE("a deadline cancelled within its own tick does not fire") {
  TimerWheel wheel(0);
  Timer one(named(1)), two(named(2));
  wheel.arm(one, 5 * kMillisecond);
  wheel.arm(two, 5 * kMillisecond);
  SlotMap seen;
  wheel.fire(5 * kMillisecond, [&](Handle token) {
    seen.push_back(token.slot());
    wheel.cancel(one);
    wheel.cancel(two);
  });
  CHECK(seen.size() == 1);
  CHECK(wheel.armed() == 0);
  wheel.cancel(one);  // cancelling what is not armed is nothing
  CHECK(wheel.armed() == 0);
}

TEST_CASE("a timer that dies is cancelled, also while others fire") {
  TimerWheel wheel(0);
  Timer first(named(1));
  auto second = std::make_unique<Timer>(named(2));
  auto third = std::make_unique<Timer>(named(3));
  for (Timer* timer : {&first, second.get(), third.get()}) wheel.arm(*timer, 3 * kMillisecond);
  SlotMap seen;
  wheel.fire(3 * kMillisecond, [&](Handle token) {
    seen.push_back(token.slot());
    if (seen.size() > 1) return;
    second.reset();
    third.reset();
    wheel.cancel(first);
  });
  CHECK(seen.size() == 1);
  CHECK(wheel.armed() == 0);
}

TEST_CASE("a deadline may be moved on and back, and never cancels") {
  TimerWheel wheel(0);
  Timer timer(named(1));
  wheel.arm(timer, 10 * kMillisecond);
  wheel.arm(timer, 200 * kMillisecond);
  CHECK(fired(wheel, 150 * kMillisecond).empty());
  CHECK(timer.deadline() == 200 * kMillisecond);
  wheel.arm(timer, 160 * kMillisecond);
  CHECK(fired(wheel, 159 * kMillisecond).empty());
  CHECK(fired(wheel, 160 * kMillisecond) == SlotMap{1});

  wheel.arm(timer, 300 * kMillisecond);
  wheel.arm(timer, 900 * kSecond);
  wheel.arm(timer, kNever);
  CHECK_FALSE(timer.armed());
  CHECK(wheel.next() == kNever);
}

TEST_CASE("a deadline moved on by any number of ticks is looked at again at its new time") {
  // By a whole turn of a level it comes to lie in the slot that is being emptied.
  for (const Ns start : {Ns{0}, 63 * kMillisecond, 4095 * kMillisecond}) {
    for (Ns ticks = 1; ticks <= 8200; ticks += ticks < 200 ? 1 : 61) {
      TimerWheel wheel(start);
      Timer timer(named(1));
      const Ns first = start + 10 * kMillisecond, moved = first + ticks * kMillisecond;
      wheel.arm(timer, first);
      wheel.arm(timer, moved);
      REQUIRE(fired(wheel, first).empty());
      REQUIRE(fired(wheel, moved - 1).empty());
      REQUIRE(fired(wheel, moved) == SlotMap{1});
    }
  }
}

TEST_CASE("a callback may arm its own timer again") {
  TimerWheel wheel(0);
  Timer timer(named(1));
  wheel.arm(timer, kMillisecond);
  int times = 0;
  for (Ns now = 0; now <= 10 * kMillisecond; now += kMillisecond) {
    wheel.fire(now, [&](Handle) {
      times += 1;
      wheel.arm(timer, now + 2 * kMillisecond);
    });
  }
  CHECK(times == 5);
}

TEST_CASE("a deadline in the past fires at once, and one within this tick when its time has come") {
  TimerWheel wheel(100 * kMillisecond);
  Timer past(named(1)), soon(named(2));
  wheel.arm(past, 3 * kMillisecond);
  wheel.arm(soon, 100 * kMillisecond + 500);
  CHECK(wheel.next() <= 100 * kMillisecond);
  CHECK(fired(wheel, 100 * kMillisecond + 400) == SlotMap{1});
  CHECK(fired(wheel, 101 * kMillisecond) == SlotMap{2});
}

TEST_CASE("a clock that jumps far fires all that is due, and only that") {
  TimerWheel wheel(0);
  std::vector<std::unique_ptr<Timer>> timers;
  for (std::uint32_t i = 0; i < 200; ++i) {
    timers.push_back(std::make_unique<Timer>(named(i)));
    wheel.arm(*timers.back(), (1 + Ns{i} * i * i) * kMillisecond);
  }
  SlotMap due = fired(wheel, 1'000'000 * kMillisecond);
  std::sort(due.begin(), due.end());
  REQUIRE(due.size() == 100);  // 99³ < 999999 ≤ 100³
  for (std::uint32_t i = 0; i < 100; ++i) CHECK(due[i] == i);
  CHECK(wheel.armed() == 100);
  timers.clear();
  CHECK(wheel.armed() == 0);
}

TEST_CASE("a wheel fires what a list would, whatever is armed, moved and cancelled") {
  // Against plain deadlines: after fire(now) none is left that lay a tick before now, and none fired early.
  for (const unsigned seed : {1u, 2u, 3u}) {
    std::mt19937_64 random(seed);
    const auto draw = [&](std::uint64_t n) { return static_cast<Ns>(random() % n); };
    Ns now = draw(1'000'000'000'000);
    TimerWheel wheel(now);
    constexpr std::uint32_t kTimers = 60;
    std::vector<std::unique_ptr<Timer>> timers;
    std::vector<Ns> deadlines(kTimers, kNever);
    for (std::uint32_t i = 0; i < kTimers; ++i) timers.push_back(std::make_unique<Timer>(named(i)));
    const auto some_span = [&] {  // most are short, some are beyond every level
      const Ns longest[] = {kMillisecond, 100 * kMillisecond, 5 * kSecond, 300 * kSecond, 100'000 * kSecond};
      return draw(static_cast<std::uint64_t>(longest[draw(5)]));
    };
    std::size_t early = 0, unasked = 0, late = 0, misled = 0, count = 0;
    for (int step = 0; step < 30'000; ++step) {
      const auto i = static_cast<std::size_t>(draw(kTimers));
      switch (draw(6)) {
        case 0:
          wheel.cancel(*timers[i]);
          deadlines[i] = kNever;
          break;
        case 1:
        case 2:
        case 3:
          deadlines[i] = now + some_span();
          wheel.arm(*timers[i], deadlines[i]);
          break;
        case 4: now += some_span() / 50; break;
        default: {
          const Ns soonest = *std::min_element(deadlines.begin(), deadlines.end());
          if (wheel.next() != kNever && soonest != kNever) {
            // It may point at an earlier moment, but at none after the tick that follows the first deadline.
            misled += wheel.next() > std::max(soonest, now) + kMillisecond ? 1 : 0;
          }
          misled += (wheel.next() == kNever) != (soonest == kNever) ? 1 : 0;
          wheel.fire(now, [&](Handle token) {
            const std::uint32_t slot = token.slot();
            unasked += deadlines[slot] == kNever ? 1 : 0;
            early += deadlines[slot] > now ? 1 : 0;
            deadlines[slot] = draw(8) == 0 ? now + some_span() + 1 : kNever;
            if (deadlines[slot] != kNever) wheel.arm(*timers[slot], deadlines[slot]);
            count += 1;
          });
          for (const Ns deadline : deadlines) late += deadline <= now - kMillisecond ? 1 : 0;
          break;
        }
      }
      for (std::size_t t = 0; t < kTimers; ++t) unasked += timers[t]->deadline() != deadlines[t] ? 1 : 0;
    }
    CHECK(early == 0);
    CHECK(unasked == 0);
    CHECK(late == 0);
    CHECK(misled == 0);
    CHECK(count > 1000);
  }
}

TEST_CASE("a deadline never overflows, and a span of 0 means none") {
  CHECK(deadline_after(5, 7) == 12);
  for (const Ns span : {Ns{0}, Ns{-1}, kNever, kNever - 5}) CHECK(deadline_after(5, span) == kNever);
  CHECK(deadline_after(5, kNever - 6) == kNever - 1);
}
