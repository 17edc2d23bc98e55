// timer_wheel.h
// Owns:     the slots and links of every armed deadline of one loop: a hierarchical wheel of 4 × 64 slots.
// Promises: arm and cancel in O(1), no allocation; a deadline fires at or after its time, at most one tick (1 ms) late
//           by the wheel's doing, and once; a timer that dies is cancelled.
// Leaves:   what a deadline means to its owner; reading the clock to epoll.h.
// Threads:  the loop's own thread.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cstdint>

#include "nexus/base/clock.h"
#include "nexus/base/slot_map.h"

namespace nexus {

class TimerWheel;

// A deadline, a member of the object it is for. `owner` is what fire() hands out.
class Timer {
 public:
  explicit Timer(Handle owner) : owner_(owner) {}
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  inline ~Timer();

  bool armed() const { return wheel_ != nullptr; }
  Ns deadline() const { return deadline_ns_; }

 private:
  friend class TimerWheel;
  Handle owner_;
  Ns deadline_ns_ = kNever;
  Ns linked_ns_ = kNever;  // the deadline that its slot was chosen for: never after deadline_ns_
  TimerWheel* wheel_ = nullptr;
  Timer* next_ = nullptr;
  Timer** link_ = nullptr;  // what points at this timer: the slot's head, or the next_ before it
  std::uint8_t level_ = 0;
  std::uint8_t slot_ = 0;
};

class TimerWheel {
 public:
  explicit TimerWheel(Ns now) : tick_(now / kTick) {}
  TimerWheel(const TimerWheel&) = delete;
  TimerWheel& operator=(const TimerWheel&) = delete;
  ~TimerWheel() { assert(armed_ == 0); }

  // Sets the timer's deadline. kNever cancels. A later deadline than the one it is linked for is only noted: the
  // wheel looks again when that one comes round, so that moving a deadline to and fro costs nothing.
  void arm(Timer& timer, Ns deadline) {
    if (deadline == kNever) return cancel(timer);
    if (timer.armed()) {
      assert(timer.wheel_ == this);
      timer.deadline_ns_ = deadline;
      if (deadline >= timer.linked_ns_) return;
      unlink(timer);
    } else {
      timer.deadline_ns_ = deadline;
    }
    link(timer);
  }

  void cancel(Timer& timer) {
    if (timer.armed()) unlink(timer);
    timer.deadline_ns_ = kNever;
  }

  // When fire() has something to look at next, or kNever. It may be earlier than the first deadline, never later than
  // the tick that follows it.
  Ns next() const {
    std::int64_t soonest = INT64_MAX;
    for (unsigned level = 0; level < kLevels; ++level) {
      if (occupied_[level] == 0) continue;
      const std::int64_t position = tick_ >> (level * kBits);
      const int ahead = std::countr_zero(std::rotr(occupied_[level], static_cast<int>(position & kMask)));
      // The slot of the current position, above level 0, is always emptied when it begins: what is in it lies a whole
      // turn ahead.
      const std::int64_t turns = ahead == 0 && level > 0 ? std::int64_t{kSlots} : std::int64_t{ahead};
      soonest = std::min(soonest, (position + turns) << (level * kBits));
    }
    return soonest == INT64_MAX ? kNever : std::max(soonest, tick_) * kTick;
  }

  // Calls `due(Handle)` for each deadline at or before `now`. `due` may arm, cancel and destroy any timer.
  template <class Due>
  void fire(Ns now, Due&& due) {
    const std::int64_t until = now / kTick;
    while (tick_ <= until) {
      for (unsigned level = kLevels - 1; level > 0; --level) {
        if ((tick_ & ((std::int64_t{1} << (level * kBits)) - 1)) == 0) cascade(level);
      }
      expire_slot(now, due);
      if (tick_ == until) return;  // what is armed within this tick is looked at again in the next call
      tick_ = next_busy_tick(until);
    }
  }

  std::size_t armed() const { return armed_; }

 private:
  friend class Timer;
  static constexpr Ns kTick = kMillisecond;
  static constexpr unsigned kBits = 6;
  static constexpr unsigned kSlots = 1u << kBits;
  static constexpr std::int64_t kMask = kSlots - 1;
  static constexpr unsigned kLevels = 4;  // 64 ms, 4 s, 4.4 min, 4.7 h; what is later waits in the last slot

  void link(Timer& timer) {
    const std::int64_t due = std::max(timer.deadline_ns_ / kTick + (timer.deadline_ns_ % kTick != 0), tick_);
    const std::int64_t ahead = due - tick_;
    unsigned level = 0;
    while (level + 1 < kLevels && ahead >= std::int64_t{1} << ((level + 1) * kBits)) ++level;
    std::int64_t position = due >> (level * kBits);
    const std::int64_t furthest = (tick_ >> (level * kBits)) + kSlots - 1;
    position = std::min(position, furthest);
    timer.level_ = static_cast<std::uint8_t>(level);
    timer.slot_ = static_cast<std::uint8_t>(position & kMask);
    timer.wheel_ = this;
    timer.linked_ns_ = timer.deadline_ns_;
    Timer*& head = slots_[level][timer.slot_];
    timer.next_ = head;
    timer.link_ = &head;
    if (head != nullptr) head->link_ = &timer.next_;
    head = &timer;
    occupied_[level] |= std::uint64_t{1} << timer.slot_;
    armed_ += 1;
  }

  void unlink(Timer& timer) {
    *timer.link_ = timer.next_;
    if (timer.next_ != nullptr) timer.next_->link_ = timer.link_;
    if (slots_[timer.level_][timer.slot_] == nullptr) {
      occupied_[timer.level_] &= ~(std::uint64_t{1} << timer.slot_);
    }
    timer.wheel_ = nullptr;
    timer.next_ = nullptr;
    timer.link_ = nullptr;
    armed_ -= 1;
  }

  // Moves what lies in the slot that begins now to the levels below.
  void cascade(unsigned level) {
    const auto slot = static_cast<std::size_t>((tick_ >> (level * kBits)) & kMask);
    Timer* timer = slots_[level][slot];
    while (timer != nullptr) {
      Timer* following = timer->next_;
      unlink(*timer);
      link(*timer);
      timer = following;
    }
  }

  template <class Due>
  void expire_slot(Ns now, Due&& due) {
    // One at a time from the head: `due` may change the list under us.
    Timer*& head = slots_[0][static_cast<std::size_t>(tick_ & kMask)];
    while (head != nullptr) {
      Timer& timer = *head;
      unlink(timer);
      if (timer.deadline_ns_ > now) {  // moved on since it was linked: its tick is a later one, and so is its slot
        link(timer);
        continue;
      }
      timer.deadline_ns_ = kNever;
      due(timer.owner_);
    }
  }

  // The next tick at which something lies at level 0 or is to be cascaded, but no later than `until`.
  std::int64_t next_busy_tick(std::int64_t until) const {
    const std::int64_t soonest = next() == kNever ? until : next() / kTick;
    return std::clamp(soonest, tick_ + 1, until);
  }

  std::array<std::array<Timer*, kSlots>, kLevels> slots_{};
  std::array<std::uint64_t, kLevels> occupied_{};
  std::int64_t tick_;
  std::size_t armed_ = 0;
};

inline Timer::~Timer() {
  if (wheel_ != nullptr) wheel_->cancel(*this);
}

}  // namespace nexus
