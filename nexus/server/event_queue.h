// event_queue.h
// Owns:     the events of one loop that were fetched and not handled yet.
// Promises: first come, first served; nothing is allocated; what does not fit stays with the kernel.
// Leaves:   what an event means to worker.h; a stale one is known by its token.
// Threads:  one.
// Tested by: tests/event_queue_test.cpp, tests/sim
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <span>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/net/epoll.h"

namespace nexus {

template <class Net>
class EventQueue {
 public:
  bool empty() const { return first_ == end_; }
  std::size_t size() const { return end_ - first_; }

  // Fetches what the kernel has to tell, and returns it; waits for it until `deadline`. A wake() ends the wait and sets
  // `woken`.
  std::span<const Event> fetch(Net& net, Ns deadline, bool& woken) {
    make_room();
    const std::uint32_t from = end_;
    complete_ = false;
    while (!complete_ && end_ < events_.size()) {
      bool was_woken = false;
      const std::size_t most = std::min(events_.size() - end_, Net::kMaxEvents);
      const std::size_t count = net.wait({events_.data() + end_, most}, from == end_ ? deadline : 0, was_woken);
      end_ += static_cast<std::uint32_t>(count);
      woken = woken || was_woken;
      complete_ = count + (was_woken ? 1 : 0) < most;
    }
    return {events_.data() + from, end_ - from};
  }
  // True if the last fetch() left nothing with the kernel.
  bool complete() const { return complete_; }

  // The first one, which is then handled. There must be one.
  Event take() {
    assert(!empty());
    return events_[first_++];
  }

 private:
  void make_room() {
    if (first_ > 0 && (empty() || events_.size() - end_ < Net::kMaxEvents)) {
      std::copy(events_.begin() + first_, events_.begin() + end_, events_.begin());
      end_ = static_cast<std::uint32_t>(end_ - first_);
      first_ = 0;
    }
  }

  std::uint32_t first_ = 0, end_ = 0;
  bool complete_ = false;
  std::array<Event, kQueuedEvents> events_;
};

}  // namespace nexus
