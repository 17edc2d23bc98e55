// wake_time.cpp
// Owns:     how late this machine wakes a process that sleeps until a set time: what no proxy that sleeps can do
// without. Promises: one wake a millisecond, with the timer's slack at its least. Prints the median and the 99th
// percentile, µs. Leaves:   the core to the caller. usage:    wake_time SECONDS
#include <sys/prctl.h>

#include <algorithm>
#include <vector>

#include "loopback.h"

using namespace nexus::bench;

int main(int argc, char** argv) {
  const long seconds = argc == 2 ? std::strtol(argv[1], nullptr, 10) : 0;
  if (seconds < 1 || seconds > 60) {
    std::fprintf(stderr, "usage: wake_time SECONDS    (1 to 60)\n");
    return 2;
  }
  prctl(PR_SET_TIMERSLACK, 1);
  constexpr Ns kApart = 1'000'000;
  const Ns end_ns = now_ns() + seconds * 1'000'000'000;
  std::vector<Ns> late;
  for (Ns at_ns = now_ns() + kApart; at_ns < end_ns; at_ns = std::max(at_ns + kApart, now_ns())) {
    const timespec at{at_ns / 1'000'000'000, at_ns % 1'000'000'000};
    if (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, nullptr) != 0) die("clock_nanosleep");
    late.push_back(now_ns() - at_ns);
  }
  std::sort(late.begin(), late.end());
  std::printf("%lld %lld\n", static_cast<long long>(late[late.size() / 2] / 1000),
              static_cast<long long>(late[late.size() * 99 / 100] / 1000));
}
