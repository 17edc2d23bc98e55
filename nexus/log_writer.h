// log_writer.h
// Owns:     the thread that writes the log: from all rings to standard error and to the access log's file.
// Promises: it sleeps while there is nothing to write, and gathers what comes within 20 ms into one write; no failure
//           to write stops or delays anybody: lines are dropped and counted, and the next ones tried anew; a line that
//           was cut by a failure is ended before the next begins; flush() and stop() leave nothing behind in a ring.
// Leaves:   the form of a line to log.h; SIGHUP to the control thread, which calls reopen().
// Threads:  add_ring(), start(), reopen(), reconfigure(), flush(), stop(): the owner's. dropped(): any.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "clock.h"
#include "log_ring.h"
#include "threads.h"

namespace nexus {

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
