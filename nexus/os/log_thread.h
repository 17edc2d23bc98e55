// log_thread.h
// Owns:     the way of a finished line from the thread that wrote it to the one that puts it in a file.
// Promises: put() never blocks and never allocates; a line comes out whole and in order, or was refused and counted; a
//           put() makes a system call only where the writer sleeps, or where the ring fills while it gathers.
// Leaves:   what a line says to log.h; files to log_thread.h.
// Threads:  one that puts (a worker, or control), one that takes (the writer); dropped() is for any.
// Owns:     the thread that writes the log: from all rings to standard error and to the access log's file.
// Promises: it sleeps while there is nothing to write, and gathers what comes within 20 ms into one write; no failure
//           to write stops or delays anybody: lines are dropped and counted, and the next ones tried anew; a line that
//           was cut by a failure is ended before the next begins; flush() and stop() leave nothing behind in a ring.
// Leaves:   the form of a line to log.h; SIGHUP to the control thread, which calls reopen().
// Threads:  add_ring(), start(), reopen(), reconfigure(), flush(), stop(): the owner's. dropped(): any.
#pragma once

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cassert>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/threads.h"

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

namespace detail {

// A file that lines go to, and those that wait for it.
class LogFile {
 public:
  LogFile() = default;
  LogFile(const LogFile&) = delete;
  LogFile& operator=(const LogFile&) = delete;
  ~LogFile() { drop_file(); }

  // Writes to `fd` from now on, or nowhere where it is -1; closes it in the end if it is `owned`.
  void attach(int fd, bool owned) {
    drop_file();
    fd_ = fd;
    owned_ = owned;
    mid_line_ = false;
    stalled_ = false;
    struct stat status {};
    regular_ = fd >= 0 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  }

  void take_from(LogRing& ring) {
    ring.take(waiting_);
    if (waiting_.size() >= kMaxWaitingBytes) write_out();
  }

  // Writes all that waits, or drops what could not be written.
  void write_out() {
    std::string_view rest = waiting_;
    if (fd_ >= 0 && !rest.empty()) {
      const bool on_new_line = !mid_line_ || write_some("\n") == 1;
      while (on_new_line && !rest.empty()) {
        const std::size_t written = write_some(rest);
        if (written == 0) break;
        rest.remove_prefix(written);
      }
      // Every line ends in its only '\n', so those left over are the lines that are lost.
      const auto lost = static_cast<std::uint64_t>(std::count(rest.begin(), rest.end(), '\n'));
      dropped_.store(dropped_.load(std::memory_order_relaxed) + lost, std::memory_order_relaxed);
    }
    waiting_.clear();
  }

  std::uint64_t dropped() const { return dropped_.load(std::memory_order_relaxed); }  // a count, orders nothing

 private:
  static constexpr std::size_t kMaxWaitingBytes = 64u << 10;
  static constexpr std::size_t kPipeBytes = 4096;  // PIPE_BUF: a pipe that poll() calls writable takes so many at once
  static constexpr int kPatienceMs = 1000;         // for a reader that stopped reading, once

  void drop_file() {
    if (owned_) ::close(fd_);
    fd_ = -1;
    owned_ = false;
  }

  // The bytes written, or 0 where the file takes none. What may block (a pipe, a terminal) is asked first.
  std::size_t write_some(std::string_view bytes) {
    for (;;) {
      if (!regular_ && !wait_writable()) return 0;
      const std::size_t most = regular_ ? bytes.size() : std::min(bytes.size(), kPipeBytes);
      const ssize_t n = ::write(fd_, bytes.data(), most);
      if (n > 0) {
        stalled_ = false;
        mid_line_ = bytes[static_cast<std::size_t>(n) - 1] != '\n';
        return static_cast<std::size_t>(n);
      }
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EAGAIN && !regular_ && !stalled_) {
        stalled_ = true;  // poll() was wrong about it: not asked again in this round
        continue;
      }
      return 0;
    }
  }

  bool wait_writable() {
    pollfd entry{fd_, POLLOUT, 0};
    const int ready = ::poll(&entry, 1, stalled_ ? 0 : kPatienceMs);
    if (ready > 0) return true;  // also where it failed: write() says how
    stalled_ = true;
    return false;
  }

  int fd_ = -1;
  bool owned_ = false;
  bool regular_ = false;   // writing to it may be slow, but doesn't block for ever
  bool mid_line_ = false;  // the last byte written was not a line's end
  bool stalled_ = false;   // its reader has not read for kPatienceMs: no waiting until it does
  std::string waiting_;
  std::atomic<std::uint64_t> dropped_{0};  // the writer's; read by any
};

}  // namespace detail

class LogWriter {
 public:
  static constexpr Ns kGatherNs = 20 * kMillisecond;

  explicit LogWriter(int events_fd = STDERR_FILENO) : events_fd_(events_fd) {
    file(LogDestination::events).attach(events_fd, false);
  }
  LogWriter(const LogWriter&) = delete;
  LogWriter& operator=(const LogWriter&) = delete;
  ~LogWriter() {
    stop();
    if (next_ && next_->owned) ::close(next_->fd);
  }

  // A ring for one more thread; it lives as long as the writer. Before start().
  LogRing* add_ring(std::size_t bytes = kLogRingBytes) {
    assert(!thread_.joinable());
    rings_.push_back(std::make_unique<LogRing>(&wake_, bytes));
    return rings_.back().get();
  }

  // Where access lines go: "off", "stderr", or a file's path, which is opened here. 0, or errno: all is then as before.
  int reconfigure(const std::string& access) {
    Target target;
    if (const int error = open_target(access, target)) return error;
    access_ = access;
    give(target);
    return 0;
  }

  // Opens the access log's path anew, after it was renamed. 0, or errno: the old file is then kept.
  int reopen() { return access_.empty() ? 0 : reconfigure(access_); }

  // False where the system has no thread to give.
  bool start() {
    assert(!thread_.joinable());
    stopping_ = false;
    thread_ = start_thread("nexus-log", [this] { run(); });
    return thread_.joinable();
  }

  // Returns once all that was put before is written, or dropped.
  void flush() {
    if (!thread_.joinable()) return;
    std::unique_lock lock(mutex_);
    const std::uint64_t mine = ++flushes_asked_;
    order_waits_.store(true, std::memory_order_seq_cst);
    wake_.wake();
    flushed_.wait(lock, [&] { return flushes_done_ >= mine; });
  }

  // Writes what is left and ends the thread. Whoever puts lines must have ended before.
  void stop() {
    if (!thread_.joinable()) return;
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
      order_waits_.store(true, std::memory_order_seq_cst);
    }
    wake_.wake();
    thread_.join();
  }

  // Lines lost since the start: a ring was full, or a file took none.
  std::uint64_t dropped(LogDestination to) const {
    std::uint64_t sum = files_[static_cast<std::size_t>(to)].dropped();
    for (const auto& ring : rings_) sum += ring->dropped(to);
    return sum;
  }

 private:
  struct Target {
    int fd = -1;
    bool owned = false;
  };
  // What the owner asked of the writer's thread.
  struct Orders {
    std::optional<Target> target;
    std::uint64_t flushes = 0;
    bool stop = false;
  };

  detail::LogFile& file(LogDestination to) { return files_[static_cast<std::size_t>(to)]; }

  int open_target(const std::string& access, Target& target) const {
    if (access == "off") return 0;
    if (access == "stderr") {
      target.fd = events_fd_;
      return 0;
    }
    // Not blocking: a FIFO without a reader is an error, not a wait without end.
    target.fd = ::open(access.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0640);
    target.owned = target.fd >= 0;
    return target.owned ? 0 : errno;
  }

  void give(Target target) {
    {
      const std::lock_guard lock(mutex_);
      if (next_ && next_->owned) ::close(next_->fd);  // the writer had not taken it yet
      next_ = target;
      order_waits_.store(true, std::memory_order_seq_cst);
    }
    wake_.wake();
  }

  // ---- the writer's thread ----

  void run() {
    for (;;) {
      wake_.before_sleep();
      if (order_waits_.load(std::memory_order_seq_cst) || line_waits()) {
        wake_.stay_awake();
      } else {
        wake_.sleep();
      }
      if (!order_waits_.load(std::memory_order_seq_cst)) wake_.gather(kGatherNs);
      const Orders orders = take_orders();
      // What was put before a new target was given may go to either file.
      if (orders.target) file(LogDestination::access).attach(orders.target->fd, orders.target->owned);
      for (const auto& ring : rings_) empty(*ring);
      for (auto& each : files_) each.write_out();
      report(orders);
      if (orders.stop) return;
    }
  }

  bool line_waits() const {
    return std::any_of(rings_.begin(), rings_.end(), [](const auto& ring) { return ring->next().has_value(); });
  }

  Orders take_orders() {
    const std::lock_guard lock(mutex_);
    order_waits_.store(false, std::memory_order_seq_cst);
    return {std::exchange(next_, std::nullopt), flushes_asked_, stopping_};
  }

  void report(const Orders& orders) {
    const std::lock_guard lock(mutex_);
    if (flushes_done_ == orders.flushes) return;
    flushes_done_ = orders.flushes;
    flushed_.notify_all();
  }

  // No more lines than the ring can have held when we came, so that a busy one keeps no other waiting.
  void empty(LogRing& ring) {
    const std::size_t most = ring.capacity() / sizeof(std::uint32_t);
    for (std::size_t i = 0; i < most; ++i) {
      const std::optional<LogDestination> to = ring.next();
      if (!to) return;
      file(*to).take_from(ring);
    }
  }

  const int events_fd_;
  std::string access_;  // as last configured; the owner's
  LogWake wake_;
  std::vector<std::unique_ptr<LogRing>> rings_;          // fixed once the thread runs
  std::array<detail::LogFile, kLogDestinations> files_;  // the writer's thread's, but for their counts
  std::thread thread_;

  // Set by the owner before it wakes the writer, seen before the writer sleeps (seq_cst: see LogWake).
  std::atomic<bool> order_waits_{false};
  std::mutex mutex_;  // guards what follows
  std::condition_variable flushed_;
  std::optional<Target> next_;
  std::uint64_t flushes_asked_ = 0;
  std::uint64_t flushes_done_ = 0;
  bool stopping_ = false;
};

}  // namespace nexus
