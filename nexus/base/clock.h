// clock.h
// Owns:     the unit of time (`Ns`) and the only two reads of the system's clocks.
// Promises: monotonic_now() never goes backwards; both cost one vDSO call.
// Leaves:   when to read the clock to epoll.h; everything above takes `now` as an argument.
// Threads:  any.
#pragma once

#include <time.h>

#include <cstdint>

namespace nexus {

using Ns = std::int64_t;  // a point in time or a span, in nanoseconds

constexpr Ns kMicrosecond = 1'000;
constexpr Ns kMillisecond = 1'000'000;
constexpr Ns kSecond = 1'000'000'000;
constexpr Ns kNever = INT64_MAX;  // a deadline that is not armed

namespace detail {
inline Ns read_clock(clockid_t id) {
  timespec t{};
  clock_gettime(id, &t);
  return Ns{t.tv_sec} * kSecond + t.tv_nsec;
}
}  // namespace detail

// Time for durations and deadlines; its zero has no meaning.
inline Ns monotonic_now() { return detail::read_clock(CLOCK_MONOTONIC); }

// Time since 1970-01-01 UTC, for log lines and timestamps people read. It may jump.
inline Ns wall_now() { return detail::read_clock(CLOCK_REALTIME); }

// `start + span`, or never where either is: a deadline that can't overflow.
inline Ns deadline_after(Ns start, Ns span) {
  if (span <= 0 || span >= kNever - start) return kNever;
  return start + span;
}

}  // namespace nexus
