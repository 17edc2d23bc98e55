// clock.h
// Owns:     the unit of time (`Ns`) and the only two reads of the system's clocks.
// Promises: monotonic_now() never goes backwards; each read is one vDSO call.
// Leaves:   when to read the clock to epoll.h; all code above takes `now` as an argument.
// Threads:  any.
// Tested by: tests/timer_wheel_test.cpp, tests/epoll_test.cpp
#pragma once

#include <time.h>

#include <cstdint>

namespace nexus {

using Ns = std::int64_t;  // a point in time or a duration, in nanoseconds

constexpr Ns kMicrosecond = 1'000;
constexpr Ns kMillisecond = 1'000'000;
constexpr Ns kSecond = 1'000'000'000;
constexpr Ns kNever = INT64_MAX;  // no deadline

namespace detail {
inline Ns read_clock(clockid_t id) {
  timespec t{};
  clock_gettime(id, &t);
  return Ns{t.tv_sec} * kSecond + t.tv_nsec;
}
}  // namespace detail

// For durations and deadlines; its zero has no meaning.
inline Ns monotonic_now() { return detail::read_clock(CLOCK_MONOTONIC); }

// Time since 1970-01-01 UTC, for log lines and timestamps. It may jump.
inline Ns wall_now() { return detail::read_clock(CLOCK_REALTIME); }

// `start + span` without overflow: kNever if either is unlimited (a span of 0 or less means no limit).
inline Ns deadline_after(Ns start, Ns span) {
  if (span <= 0 || span >= kNever - start) return kNever;
  return start + span;
}

}  // namespace nexus
