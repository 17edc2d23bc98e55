// pulse.h
// Owns:     whether every loop still turns: a number that each is asked to say back, and when to ask next.
// Promises: due() is true only where every loop has answered since it was true last; a loop that hangs is asked once,
//           so that its mailbox does not fill; a loop that has ended on purpose counts as turning.
// Leaves:   carrying the question to a loop, and telling the service manager, to daemon.h.
// Threads:  the main thread's; Ping::answer() and over() are the loop's own, over() its last word.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "clock.h"

namespace nexus {

// A message to a loop: say the number back.
struct Ping {
  std::atomic<std::uint64_t>* heard = nullptr;
  std::uint64_t number = 0;

  // What it proves is that the loop came by; nothing else is read by way of it.
  void answer() const { heard->store(number, std::memory_order_relaxed); }
};

class Pulse {
 public:
  // `limit_ns`: the service manager restarts what is silent for so long; 0: nobody watches.
  Pulse(std::size_t loops, Ns limit_ns, Ns now)
      : heard_(loops), limit_ns_(limit_ns), next_ns_(limit_ns > 0 ? now : kNever) {}

  Ns next() const { return next_ns_; }

  // Whether to say that all is well. Then every loop is asked anew: post(number of the loop, Ping). Where one has not
  // answered yet, it looks again soon: a loop that was only slow must not cost a restart.
  template <class Post>
  bool due(Ns now, Post&& post) {
    if (now < next_ns_) return false;
    if (!all_answered()) {
      next_ns_ = now + std::max<Ns>(limit_ns_ / 16, kMillisecond);
      return false;
    }
    next_ns_ = now + std::max<Ns>(limit_ns_ / 2, kMillisecond);
    asked_ += 1;
    for (std::size_t i = 0; i < heard_.size(); ++i) post(i, Ping{&heard_[i], asked_});
    return true;
  }

  // The loop has ended, as it should.
  void over(std::size_t loop) { heard_[loop].store(UINT64_MAX, std::memory_order_relaxed); }

 private:
  bool all_answered() const {
    return std::all_of(heard_.begin(), heard_.end(), [this](const std::atomic<std::uint64_t>& heard) {
      return heard.load(std::memory_order_relaxed) >= asked_;
    });
  }

  std::vector<std::atomic<std::uint64_t>> heard_;  // by loop: the last number that it said back
  std::uint64_t asked_ = 0;
  Ns limit_ns_;
  Ns next_ns_;
};

}  // namespace nexus
