// log_thread.h
// Owns:     the log lines' way to their files: a ring for each logging thread, and the writer, a thread that empties
//           the rings into standard error and the access log.
// Promises: put() never blocks or allocates, and makes a system call only if the writer sleeps or the ring fills up. A
//           line is written complete and in order, or it is counted as dropped. The writer sleeps while there are no
//           lines, and gathers the lines of 20 ms into one write. A write that fails delays nobody, and the next lines
//           are tried again; a line that it cut is ended by a '\n' first. stop() leaves no line in a ring.
// Leaves:   the text of a line to log.h; when to reopen a file to daemon.h.
// Threads:  a ring has one putting thread; the writer takes from all. LogWriter belongs to one thread, but dropped() is
//           for any.
// Tested by: tests/log_test.cpp
#pragma once

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/mailbox.h"

namespace nexus {

constexpr std::size_t kLogRingBytes = 256u << 10;  // about 600 access lines; memory is used as far as it was ever full

// The writer's sleep, a futex with a timeout (std::atomic::wait has none). The word and each ring's head are read and
// written seq_cst: either the writer, about to sleep, sees the new line, or the thread that put it sees the writer
// asleep. An order is never overwritten by a line, and the writer resets the word before it looks for orders.
class LogWake {
 public:
  LogWake() = default;
  LogWake(const LogWake&) = delete;
  LogWake& operator=(const LogWake&) = delete;

  // After a line was put. `filling`: its ring has little room left, so that gathering must end.
  void line_put(bool filling) {
    const std::uint32_t word = word_.load(std::memory_order_seq_cst);
    if (word == kAsleep || (word == kGathering && filling)) {
      if (change(word, kAwake)) wake();
    }
  }

  // After an order was given: ends the sleep at once, or the next one.
  void order_given() {
    word_.exchange(kOrdered, std::memory_order_seq_cst);
    wake();
  }

  // The writer's side: sleeps until a line or an order comes; after a line, gathers more of them for `gather`.
  template <class AnyLine>
  void wait(Ns gather, AnyLine&& any_line) {
    if (change(kAwake, kAsleep) && !any_line()) {
      while (word_.load(std::memory_order_seq_cst) == kAsleep) sleep_while(kAsleep, nullptr);
    }
    if (change(kAsleep, kGathering) || change(kAwake, kGathering)) {
      const timespec limit{static_cast<time_t>(gather / kSecond), static_cast<long>(gather % kSecond)};
      sleep_while(kGathering, &limit);
    }
    word_.store(kAwake, std::memory_order_seq_cst);
  }

 private:
  static constexpr std::uint32_t kAwake = 0;
  static constexpr std::uint32_t kAsleep = 1;
  static constexpr std::uint32_t kGathering = 2;
  static constexpr std::uint32_t kOrdered = 3;
  static_assert(sizeof(std::atomic<std::uint32_t>) == 4);  // a futex word

  bool change(std::uint32_t from, std::uint32_t to) {
    return word_.compare_exchange_strong(from, to, std::memory_order_seq_cst);
  }
  void wake() { syscall(SYS_futex, &word_, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0); }
  void sleep_while(std::uint32_t value, const timespec* limit) {
    syscall(SYS_futex, &word_, FUTEX_WAIT_PRIVATE, value, limit, nullptr, 0);
  }

  std::atomic<std::uint32_t> word_{kAwake};
};

// The lines of one thread to one file, as a ring of bytes.
class LogLane {
 public:
  // `wake`: the writer's, or null in tests without one. `bytes` is a power of two.
  LogLane(LogWake* wake, std::size_t bytes)
      : bytes_(std::make_unique_for_overwrite<char[]>(bytes)), capacity_(bytes), wake_(wake) {
    assert(std::has_single_bit(bytes));
  }
  LogLane(const LogLane&) = delete;
  LogLane& operator=(const LogLane&) = delete;

  // Copies a line in, with its '\n'. False if there is no room: the line is counted as dropped.
  bool put(std::string_view line) {
    const std::uint64_t head = head_.load(std::memory_order_relaxed);  // only this thread changes it
    // Reads the tail only if the last known one leaves little room: its cache line belongs to the writer's core.
    // acquire: the writer has read the bytes before the tail, so that they may be overwritten.
    if (room(head) < line.size() + capacity_ / 2) tail_seen_ = tail_.load(std::memory_order_acquire);
    if (line.size() > room(head)) {
      dropped_.fetch_add(1, std::memory_order_relaxed);
      return false;
    }
    const std::size_t at = index(head);
    const std::size_t first = std::min(line.size(), capacity_ - at);
    std::memcpy(bytes_.get() + at, line.data(), first);
    std::memcpy(bytes_.get(), line.data() + first, line.size() - first);
    head_.store(head + line.size(), std::memory_order_seq_cst);  // publishes the bytes; seq_cst: see LogWake
    if (wake_ != nullptr) wake_->line_put(room(head + line.size()) < capacity_ / 2);
    return true;
  }

  std::uint64_t dropped() const { return dropped_.load(std::memory_order_relaxed); }  // relaxed: it orders nothing

  // The writer's side.
  bool empty() const { return head_.load(std::memory_order_seq_cst) == tail_.load(std::memory_order_relaxed); }

  // Moves the lines that are there to the end of `out`.
  void take(std::string& out) {
    const std::uint64_t head = head_.load(std::memory_order_acquire);
    const std::uint64_t tail = tail_.load(std::memory_order_relaxed);  // only this thread changes it
    const auto bytes = static_cast<std::size_t>(head - tail);
    const std::size_t first = std::min(bytes, capacity_ - index(tail));
    out.append(bytes_.get() + index(tail), first);
    out.append(bytes_.get(), bytes - first);
    tail_.store(head, std::memory_order_release);  // gives the room back to put()
  }

 private:
  std::size_t index(std::uint64_t position) const { return static_cast<std::size_t>(position) & (capacity_ - 1); }
  // The free bytes, by the last known tail: maybe fewer than there are, never more.
  std::size_t room(std::uint64_t head) const { return capacity_ - static_cast<std::size_t>(head - tail_seen_); }

  std::unique_ptr<char[]> bytes_;
  const std::size_t capacity_;
  LogWake* const wake_;
  // Written by the logging thread. Positions count bytes since the start and never wrap.
  alignas(64) std::atomic<std::uint64_t> head_{0};
  std::uint64_t tail_seen_ = 0;
  std::atomic<std::uint64_t> dropped_{0};
  // Written by the writer.
  alignas(64) std::atomic<std::uint64_t> tail_{0};
};

// A logging thread's way to the writer.
struct LogRing {
  explicit LogRing(LogWake* wake = nullptr, std::size_t bytes = kLogRingBytes)
      : events(wake, bytes), access(wake, bytes) {}
  LogLane events;
  LogLane access;
};

namespace detail {

// A destination's file, and the lines that are to be written to it.
class LogFile {
 public:
  LogFile() = default;
  LogFile(const LogFile&) = delete;
  LogFile& operator=(const LogFile&) = delete;
  ~LogFile() { attach(-1, false); }

  // Uses `fd` from now on, and closes it at the end if it is `owned`. With -1 lines are discarded.
  void attach(int fd, bool owned) {
    if (owned_) ::close(fd_);
    fd_ = fd;
    owned_ = owned;
    mid_line_ = stalled_ = false;
    struct stat status {};
    regular_ = fd >= 0 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  }

  void take_from(LogLane& lane) {
    lane.take(waiting_);
    if (waiting_.size() >= kMaxWaitingBytes) write_out();
  }

  // Writes the waiting lines; those that cannot be written are dropped and counted.
  void write_out() {
    std::string_view rest = waiting_;
    if (fd_ >= 0 && !rest.empty()) {
      const bool on_new_line = !mid_line_ || write_some("\n") == 1;
      while (on_new_line && !rest.empty()) {
        const std::size_t written = write_some(rest);
        if (written == 0) break;
        rest.remove_prefix(written);
      }
      // Each line has one '\n', at its end, so the rest has one for each lost line.
      const auto lost = std::count(rest.begin(), rest.end(), '\n');
      dropped_.fetch_add(static_cast<std::uint64_t>(lost), std::memory_order_relaxed);
    }
    waiting_.clear();
  }

  std::uint64_t dropped() const { return dropped_.load(std::memory_order_relaxed); }

 private:
  static constexpr std::size_t kMaxWaitingBytes = 64u << 10;
  static constexpr std::size_t kPipeBytes = 4096;  // PIPE_BUF: a pipe that poll() reports writable takes this much
  static constexpr int kPatienceMs = 1000;         // the wait for a reader that stopped reading, once

  // Returns the bytes written, or 0 if the file takes none. Polls what may block (a pipe, a terminal) first.
  std::size_t write_some(std::string_view bytes) {
    for (;;) {
      pollfd entry{fd_, POLLOUT, 0};
      if (!regular_ && ::poll(&entry, 1, stalled_ ? 0 : kPatienceMs) <= 0) {  // also > 0 after an error: write() has it
        stalled_ = true;
        return 0;
      }
      const ssize_t n = ::write(fd_, bytes.data(), regular_ ? bytes.size() : std::min(bytes.size(), kPipeBytes));
      if (n > 0) {
        stalled_ = false;
        mid_line_ = bytes[static_cast<std::size_t>(n) - 1] != '\n';
        return static_cast<std::size_t>(n);
      }
      const bool not_yet = n < 0 && errno == EAGAIN && !regular_ && !stalled_;
      if (not_yet) stalled_ = true;  // poll() reported it writable, but it is not: poll once more, without waiting
      if (!not_yet && (n == 0 || errno != EINTR)) return 0;
    }
  }

  int fd_ = -1;
  bool owned_ = false;
  bool regular_ = false;   // a regular file: a write may be slow, but does not block for ever
  bool mid_line_ = false;  // the last byte written was not a '\n'
  bool stalled_ = false;   // its reader has not read for kPatienceMs: do not wait until it reads again
  std::string waiting_;
  std::atomic<std::uint64_t> dropped_{0};  // written by the writer
};

}  // namespace detail

// 0 if the file could be opened for appending, or created; else errno. It is not opened: nothing is created, and the
// reader of a FIFO sees no writer come and go.
inline int append_problem(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) == 0) {
    if (S_ISDIR(status.st_mode)) return EISDIR;
    return ::access(path.c_str(), W_OK) == 0 ? 0 : errno;
  }
  if (errno != ENOENT) return errno;
  const std::size_t slash = path.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  return ::access(directory.c_str(), W_OK | X_OK) == 0 ? 0 : errno;
}

class LogWriter {
 public:
  static constexpr Ns kGatherNs = 20 * kMillisecond;

  explicit LogWriter(int events_fd = STDERR_FILENO) : events_fd_(events_fd) { events_.attach(events_fd, false); }
  LogWriter(const LogWriter&) = delete;
  LogWriter& operator=(const LogWriter&) = delete;
  ~LogWriter() {
    stop();
    set_next_access(kNoChange);
  }

  // Adds a ring for one more thread. Called before start(); the ring lives as long as the writer.
  LogRing* add_ring() {
    assert(!thread_.joinable());
    return rings_.emplace_back(std::make_unique<LogRing>(&wake_)).get();
  }

  // Sets where access lines go: "off", "stderr", or a file's path, which is opened (again) here. Returns 0, or errno:
  // the old file is then kept. Lines that were put shortly before may go to either file.
  int reconfigure(const std::string& access) {
    int fd = access == "stderr" ? events_fd_ : -1;  // -1: off
    if (access != "off" && access != "stderr") {
      // O_NONBLOCK: opening a FIFO without a reader is an error, not a wait without end.
      fd = ::open(access.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0640);
      if (fd < 0) return errno;
    }
    set_next_access(fd);
    wake_.order_given();
    return 0;
  }

  // False if the system has no thread left.
  bool start() {
    assert(!thread_.joinable());
    stopping_.store(false, std::memory_order_seq_cst);
    thread_ = start_thread("nexus-log", [this] { run(); });
    return thread_.joinable();
  }

  // Writes the lines that were put before and ends the thread. start() may follow.
  void stop() {
    if (!thread_.joinable()) return;
    stopping_.store(true, std::memory_order_seq_cst);
    wake_.order_given();
    thread_.join();
  }

  // The lines that were lost since the start, because a ring was full or a file did not take them.
  std::uint64_t dropped() const {
    std::uint64_t sum = events_.dropped() + access_.dropped();
    for (const auto& ring : rings_) sum += ring->events.dropped() + ring->access.dropped();
    return sum;
  }

 private:
  static constexpr int kNoChange = -2;

  bool owns(int fd) const { return fd >= 0 && fd != events_fd_; }

  void set_next_access(int fd) {
    const int before = next_access_.exchange(fd, std::memory_order_seq_cst);
    if (owns(before)) ::close(before);  // the writer had not taken it yet
  }

  // ---- the writer's thread ----

  void run() {
    bool stop = false;
    while (!stop) {
      wake_.wait(kGatherNs, [this] { return any_line(); });
      stop = stopping_.load(std::memory_order_seq_cst);
      const int access = next_access_.exchange(kNoChange, std::memory_order_seq_cst);
      if (access != kNoChange) {
        // One descriptor is one file, which alone knows if its last line was cut.
        access_file_ = access == events_fd_ ? &events_ : &access_;
        access_.attach(owns(access) ? access : -1, owns(access));
      }
      for (const auto& ring : rings_) {
        events_.take_from(ring->events);
        access_file_->take_from(ring->access);
      }
      events_.write_out();
      access_.write_out();
    }
  }

  bool any_line() const {
    return std::any_of(rings_.begin(), rings_.end(),
                       [](const auto& ring) { return !ring->events.empty() || !ring->access.empty(); });
  }

  const int events_fd_;
  LogWake wake_;
  std::vector<std::unique_ptr<LogRing>> rings_;  // fixed once the thread runs
  detail::LogFile events_, access_;              // the writer's, except for their counts
  detail::LogFile* access_file_ = &access_;      // the writer's
  std::thread thread_;
  // Orders to the writer, which looks for them after each wait.
  std::atomic<int> next_access_{kNoChange};
  std::atomic<bool> stopping_{false};
};

}  // namespace nexus
