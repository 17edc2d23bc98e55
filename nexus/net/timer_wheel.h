// timer_wheel.h
// Owns:     the deadlines of one loop, in a hierarchical wheel of 4 levels with 64 slots each.
// Promises: arm and cancel in O(1), without allocation; a deadline fires once, at or after its time, and the wheel adds
//           at most one tick (1 ms) of delay; a timer cancels itself in its destructor.
// Leaves:   the meaning of a deadline to its owner, reading the clock to epoll.h.
// Threads:  the loop's own thread.
// Tested by: tests/timer_wheel_test.cpp
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

// A deadline, as a member of the object that it belongs to; fire() reports that object by its handle, `owner`.
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
  Ns linked_ns_ = kNever;        // the deadline for which the slot was chosen: not after deadline_ns_
  TimerWheel* wheel_ = nullptr;  // null: not armed, and what follows has no meaning
  Timer* next_ = nullptr;
  Timer** link_ = nullptr;  // the pointer to this timer: the slot's head, or next_ of the one before
  std::uint8_t level_ = 0;
  std::uint8_t slot_ = 0;
};

class TimerWheel {
 public:
  explicit TimerWheel(Ns now) : tick_(now / kTick) {}
  TimerWheel(const TimerWheel&) = delete;
  TimerWheel& operator=(const TimerWheel&) = delete;
  ~TimerWheel() { assert(armed_ == 0); }

  // Sets the timer's deadline; kNever cancels it. If the new deadline is later than the one it is linked for, the timer
  // stays in its slot and is moved when that slot comes, so that postponing a deadline is nearly free.
  void arm(Timer& timer, Ns deadline) {
    if (deadline == kNever) return cancel(timer);
    timer.deadline_ns_ = deadline;
    if (timer.armed()) {
      assert(timer.wheel_ == this);
      if (deadline >= timer.linked_ns_) return;
      unlink(timer);
    }
    link(timer);
  }

  void cancel(Timer& timer) {
    if (timer.armed()) unlink(timer);
    timer.deadline_ns_ = kNever;
  }

  // The time of the next fire() that has work, or kNever. It may be earlier than the first deadline, but not later than
  // the tick after it.
  Ns next() const {
    std::int64_t soonest = INT64_MAX;
    for (unsigned level = 0; level < kLevels; ++level) {
      if (occupied_[level] == 0) continue;
      const std::int64_t position = tick_ >> (level * kBits);
      const int ahead = std::countr_zero(std::rotr(occupied_[level], static_cast<int>(position & kMask)));
      // Above level 0 the slot of the current position was emptied when it began: its timers are one turn ahead.
      const std::int64_t turns = ahead == 0 && level > 0 ? std::int64_t{kSlots} : std::int64_t{ahead};
      soonest = std::min(soonest, (position + turns) << (level * kBits));
    }
    return soonest == INT64_MAX ? kNever : std::max(soonest, tick_) * kTick;
  }

  // Calls `due(Handle)` for each deadline up to `now`. `due` may arm, cancel and destroy any timer.
  template <class Due>
  void fire(Ns now, Due&& due) {
    const std::int64_t until = now / kTick;
    while (tick_ <= until) {
      for (unsigned level = kLevels - 1; level > 0; --level) {
        if ((tick_ & ((std::int64_t{1} << (level * kBits)) - 1)) == 0) cascade(level);
      }
      expire_slot(now, due);
      if (tick_ == until) return;  // the next call looks at this tick again, for timers armed meanwhile
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
  static constexpr unsigned kLevels = 4;  // 64 ms, 4 s, 4.4 min, 4.7 h; later deadlines wait in the last slot

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
    armed_ -= 1;
  }

  // Moves the timers of the slot that begins now to lower levels.
  void cascade(unsigned level) {
    Timer*& head = slots_[level][static_cast<std::size_t>((tick_ >> (level * kBits)) & kMask)];
    while (head != nullptr) {
      Timer& timer = *head;
      unlink(timer);
      link(timer);  // never into this slot: what is due a whole turn later goes to the one before
    }
  }

  template <class Due>
  void expire_slot(Ns now, Due&& due) {
    // One at a time from the head, because `due` may change the list.
    Timer*& head = slots_[0][static_cast<std::size_t>(tick_ & kMask)];
    while (head != nullptr) {
      Timer& timer = *head;
      unlink(timer);
      if (timer.deadline_ns_ > now) {  // postponed since it was linked
        link(timer);
        continue;
      }
      timer.deadline_ns_ = kNever;
      due(timer.owner_);
    }
  }

  // The next tick with a timer at level 0 or a slot to cascade, but no later than `until`.
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
