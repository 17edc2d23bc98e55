// log_ring.h
// Owns:     the way of a finished line from the thread that wrote it to the one that puts it in a file.
// Promises: put() never blocks and never allocates; a line comes out whole and in order, or was refused and counted; a
//           put() makes a system call only where the writer sleeps, or where the ring fills while it gathers.
// Leaves:   what a line says to log.h; files to log_writer.h.
// Threads:  one that puts (a worker, or control), one that takes (the writer); dropped() is for any.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "clock.h"

namespace nexus {

enum class LogDestination : std::uint8_t { events, access };
constexpr std::size_t kLogDestinations = 2;
constexpr std::size_t kLogRingBytes = 256u << 10;  // some 600 access lines; touched only as far as it was ever filled

// How the writer sleeps, and who may end it. The word and a ring's head_ are both read and written seq_cst: either the
// writer, about to sleep, sees the new line, or the one that put it sees the writer asleep.
class LogWake {
 public:
  LogWake() = default;
  LogWake(const LogWake&) = delete;
  LogWake& operator=(const LogWake&) = delete;

  // A line was put. `filling`: its ring has little room left.
  void line_put(bool filling) {
    const std::uint32_t word = word_.load(std::memory_order_seq_cst);
    if (word == kAsleep || (word == kGathering && filling)) wake();
  }

  // Ends any sleep, also one that is about to begin.
  void wake() {
    if (word_.exchange(kAwake, std::memory_order_seq_cst) != kAwake) {
      syscall(SYS_futex, &word_, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
    }
  }

  // The writer's side. From here on a wake() counts; what there is to do must be looked for after this.
  void before_sleep() { word_.store(kAsleep, std::memory_order_seq_cst); }
  void stay_awake() { word_.store(kAwake, std::memory_order_seq_cst); }
  // Sleeps until the next wake(), unless there was one since before_sleep().
  void sleep() {
    while (word_.load(std::memory_order_seq_cst) == kAsleep) wait_while(kAsleep, kNever);
  }
  // Lets lines come together for `span`; only a filling ring or wake() ends it.
  void gather(Ns span) {
    word_.store(kGathering, std::memory_order_seq_cst);
    wait_while(kGathering, span);
    word_.store(kAwake, std::memory_order_seq_cst);
  }

 private:
  static constexpr std::uint32_t kAwake = 0;
  static constexpr std::uint32_t kAsleep = 1;
  static constexpr std::uint32_t kGathering = 2;
  static_assert(sizeof(std::atomic<std::uint32_t>) == 4);  // a futex word

  void wait_while(std::uint32_t value, Ns span) {
    const timespec timeout{static_cast<time_t>(span / kSecond), static_cast<long>(span % kSecond)};
    syscall(SYS_futex, &word_, FUTEX_WAIT_PRIVATE, value, span == kNever ? nullptr : &timeout, nullptr, 0);
  }

  std::atomic<std::uint32_t> word_{kAwake};
};

class LogRing {
 public:
  // `wake` is told of each line, where given. `bytes` is a power of two.
  explicit LogRing(LogWake* wake = nullptr, std::size_t bytes = kLogRingBytes)
      : bytes_(std::make_unique_for_overwrite<char[]>(bytes)), mask_(bytes - 1), wake_(wake) {
    assert(std::has_single_bit(bytes));
  }
  LogRing(const LogRing&) = delete;
  LogRing& operator=(const LogRing&) = delete;

  // Takes a line, its '\n' included. False where there is no room: the line is then lost, and counted.
  bool put(LogDestination to, std::string_view line) {
    const std::uint64_t head = head_.load(std::memory_order_relaxed);  // ours alone to change
    const std::size_t needed = sizeof(Mark) + line.size();
    // The tail is looked at only where what was last seen of it leaves little room: it is the other core's line.
    if (room(head) < needed + capacity() / 2)
      tail_seen_ = tail_.load(std::memory_order_acquire);  // frees what lies before
    if (needed > room(head)) {
      auto& dropped = dropped_[static_cast<std::size_t>(to)];
      dropped.store(dropped.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
      return false;
    }
    const Mark mark = static_cast<Mark>(line.size() << 1 | static_cast<std::size_t>(to));
    copy_in(head, {reinterpret_cast<const char*>(&mark), sizeof mark});
    copy_in(head + sizeof mark, line);
    head_.store(head + needed, std::memory_order_seq_cst);  // releases the bytes; seq_cst: see LogWake
    if (wake_ != nullptr) wake_->line_put(room(head + needed) < capacity() / 2);
    return true;
  }

  std::uint64_t dropped(LogDestination to) const {
    return dropped_[static_cast<std::size_t>(to)].load(std::memory_order_relaxed);  // a count, orders nothing
  }
  std::size_t capacity() const { return mask_ + 1; }

  // The taker's side: where the next line is meant to go, or nothing where there is none.
  std::optional<LogDestination> next() const {
    const std::uint64_t tail = tail_.load(std::memory_order_relaxed);  // ours alone to change
    if (head_.load(std::memory_order_seq_cst) == tail) return std::nullopt;
    return static_cast<LogDestination>(mark_at(tail) & 1);
  }

  // Appends the next line, which must be there, to `out`.
  void take(std::string& out) {
    const std::uint64_t tail = tail_.load(std::memory_order_relaxed);
    assert(head_.load(std::memory_order_relaxed) != tail);
    const std::size_t bytes = mark_at(tail) >> 1;
    const std::size_t at = static_cast<std::size_t>(tail + sizeof(Mark)) & mask_;
    const std::size_t first = std::min(bytes, capacity() - at);
    out.append(bytes_.get() + at, first);
    out.append(bytes_.get(), bytes - first);
    tail_.store(tail + sizeof(Mark) + bytes, std::memory_order_release);  // gives the room back
  }

 private:
  using Mark = std::uint32_t;  // before each line: its length × 2 + its destination

  // By what was last seen of the tail: never more than there is.
  std::size_t room(std::uint64_t head) const { return capacity() - static_cast<std::size_t>(head - tail_seen_); }

  void copy_in(std::uint64_t position, std::string_view from) {
    const std::size_t at = static_cast<std::size_t>(position) & mask_;
    const std::size_t first = std::min(from.size(), capacity() - at);
    std::memcpy(bytes_.get() + at, from.data(), first);
    std::memcpy(bytes_.get(), from.data() + first, from.size() - first);
  }

  Mark mark_at(std::uint64_t position) const {
    std::array<char, sizeof(Mark)> bytes;
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = bytes_[static_cast<std::size_t>(position + i) & mask_];
    return std::bit_cast<Mark>(bytes);
  }

  std::unique_ptr<char[]> bytes_;
  std::size_t mask_;
  LogWake* wake_;
  // The putter's: positions count bytes since the start and never wrap.
  alignas(64) std::atomic<std::uint64_t> head_{0};
  std::uint64_t tail_seen_ = 0;
  std::array<std::atomic<std::uint64_t>, kLogDestinations> dropped_{};
  // The taker's.
  alignas(64) std::atomic<std::uint64_t> tail_{0};
};

}  // namespace nexus
