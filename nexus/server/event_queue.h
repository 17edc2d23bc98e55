// event_queue.h
// Owns:     the events of one loop that were fetched and not handled yet.
// Promises: first come, first served, but for a few of each fetch that the caller puts first. Nothing is allocated.
//           Events that do not fit stay with the kernel.
// Leaves:   what an event means to worker.h; a stale one is known by its token.
// Threads:  one.
// Tested by: tests/event_queue_test.cpp, tests/sim
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cstddef>
#include <cstdint>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/net/epoll.h"

namespace nexus {

template <class Net>
class EventQueue {
 public:
  bool empty() const { return first_ == end_; }
  std::size_t size() const { return end_ - first_; }

  // Fetches what the kernel has to tell; waits for it until `deadline`. A wake() ends the wait and sets `woken`. Calls
  // `goes_first(event)` for each in order: of those for which it is true, the first kFirstEvents are then the first to
  // be taken.
  template <class GoesFirst>
  void fetch(Net& net, Ns deadline, bool& woken, GoesFirst&& goes_first) {
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
    put_first(from, goes_first);
  }
  // True if the last fetch() left nothing with the kernel.
  bool complete() const { return complete_; }

  // The first one, which is then handled: it stays in place until the next fetch(). There must be one.
  const Event& take() {
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

  template <class GoesFirst>
  void put_first(std::uint32_t from, GoesFirst&& goes_first) {
    std::uint32_t count = 0, kept = from;
    for (std::uint32_t i = from; i < end_; ++i) {
      Event& to = goes_first(events_[i]) && count < kFirstEvents ? chosen_[count++] : events_[kept++];
      to = events_[i];
    }
    if (count == 0 || (kept == from && from == first_)) return;  // all are in their places
    end_ = kept;
    if (first_ < count) {  // those that were taken left too little room before the others
      std::copy_backward(events_.begin() + first_, events_.begin() + end_, events_.begin() + (end_ + count - first_));
      end_ += count - first_;
      first_ = count;
    }
    first_ -= count;
    std::copy(chosen_.begin(), chosen_.begin() + count, events_.begin() + first_);
  }

  std::uint32_t first_ = 0, end_ = 0;
  bool complete_ = false;
  std::array<Event, kQueuedEvents> events_;
  std::array<Event, kFirstEvents> chosen_;  // while they are put first
};

}  // namespace nexus
