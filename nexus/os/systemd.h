// systemd.h
// Owns:     what Nexus tells the service manager that started it: sd_notify(3)'s messages, over its socket, by hand.
// Promises: without $NOTIFY_SOCKET nothing is sent and nothing fails; a message is one datagram, whole or not at all; a
//           manager that does not read holds a sender up for a second at most.
// Leaves:   when to say what to daemon.h; whether all is well to systemd.h.
// Threads:  the main thread's.
// Owns:     listening sockets that the service manager opened and passed on (sd_listen_fds(3)).
// Promises: only what was meant for this process is taken, and only what is a listening TCP socket; a passed one is set
//           not to block and not to outlive an exec.
// Leaves:   which addresses they stand in for to daemon.h.
// Threads:  the main thread's, at the start.
// Owns:     whether every loop still turns: a number that each is asked to say back, and when to ask next.
// Promises: due() is true only where every loop has answered since it was true last; a loop that hangs is asked once,
//           so that its mailbox does not fill; a loop that has ended on purpose counts as turning.
// Leaves:   carrying the question to a loop, and telling the service manager, to daemon.h.
// Threads:  the main thread's; Heartbeat::answer() and over() are the loop's own, over() its last word.
#pragma once

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/text.h"

namespace nexus {
using GetVariable = std::function<std::optional<std::string>(const char* name)>;

inline std::optional<std::string> process_variable(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) return std::nullopt;
  return std::string(value);
}

// How long the service manager bears silence (sd_watchdog_enabled(3)); 0: it does not watch this process.
inline Ns watchdog_limit_ns(const GetVariable& get, pid_t self) {
  const std::optional<std::string> limit = get("WATCHDOG_USEC");
  if (!limit) return 0;
  if (const auto pid = get("WATCHDOG_PID"); pid && *pid != std::to_string(self)) return 0;
  const std::optional<std::uint64_t> micros = parse_decimal(*limit);
  if (!micros || *micros > static_cast<std::uint64_t>(INT64_MAX / kMicrosecond)) return 0;
  return static_cast<Ns>(*micros) * kMicrosecond;
}

class Notifier {
 public:
  // `path`: a file, or a name in the abstract namespace behind an `@`. Anything else: nobody is told.
  explicit Notifier(const std::optional<std::string>& path) {
    if (!path || path->size() < 2 || path->size() >= sizeof to_.sun_path) return;
    if (path->front() != '/' && path->front() != '@') return;
    socket_ = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (socket_ < 0) return;
    const timeval limit{1, 0};
    ::setsockopt(socket_, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    to_.sun_family = AF_UNIX;
    std::memcpy(to_.sun_path, path->data(), path->size());
    // An abstract name is as long as it is given; a path ends with its NUL.
    if (path->front() == '@') to_.sun_path[0] = '\0';
    length_ = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path->size() + (path->front() == '/' ? 1 : 0));
  }
  Notifier(const Notifier&) = delete;
  Notifier& operator=(const Notifier&) = delete;
  ~Notifier() {
    if (socket_ >= 0) ::close(socket_);
  }

  bool listened_to() const { return socket_ >= 0; }

  // `NAME=value` lines. False where nobody took them.
  bool tell(std::string_view message) {
    if (socket_ < 0) return false;
    for (;;) {
      const ssize_t sent = ::sendto(socket_, message.data(), message.size(), MSG_NOSIGNAL,
                                    reinterpret_cast<const sockaddr*>(&to_), length_);
      if (sent >= 0) return static_cast<std::size_t>(sent) == message.size();
      if (errno != EINTR) return false;
    }
  }

  bool ready(std::string_view status) { return tell("READY=1\nSTATUS=" + std::string(status)); }
  // The time lets the manager tell this reload from an earlier one's message.
  bool reloading(Ns now) { return tell("RELOADING=1\nMONOTONIC_USEC=" + std::to_string(now / kMicrosecond)); }
  bool stopping(std::string_view status) { return tell("STOPPING=1\nSTATUS=" + std::string(status)); }
  bool alive() { return tell("WATCHDOG=1"); }

 private:
  int socket_ = -1;
  sockaddr_un to_{};
  socklen_t length_ = 0;
};

constexpr int kFirstPassedDescriptor = 3;  // SD_LISTEN_FDS_START
constexpr std::uint64_t kMaxPassedSockets = 64;

struct PassedSocket {
  int fd = -1;
  std::string name;  // FileDescriptorName= of the socket unit, by default the unit's own
};

struct PassedSockets {
  std::vector<PassedSocket> sockets;
  std::string error;  // not empty: what was passed cannot be used
};

namespace detail {

// A socket's property, or -1.
inline int socket_option(int fd, int name) {
  int value = 0;
  socklen_t length = sizeof value;
  return ::getsockopt(fd, SOL_SOCKET, name, &value, &length) == 0 ? value : -1;
}

inline bool is_tcp_listener(int fd) {
  const int domain = socket_option(fd, SO_DOMAIN);
  return (domain == AF_INET || domain == AF_INET6) && socket_option(fd, SO_TYPE) == SOCK_STREAM &&
         socket_option(fd, SO_ACCEPTCONN) == 1;
}

inline bool prepare_listener(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  return flags >= 0 && ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0 && ::fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

// The next of the names between colons; `list` loses it.
inline std::string next_name(std::string_view& list) {
  const std::size_t colon = list.find(':');
  const std::string name(list.substr(0, colon));
  list.remove_prefix(colon == std::string_view::npos ? list.size() : colon + 1);
  return name;
}

}  // namespace detail

// What the variables name, from `first` on. Empty without an error: nothing was passed to this process.
inline PassedSockets passed_sockets(const GetVariable& get, pid_t self, int first = kFirstPassedDescriptor) {
  PassedSockets passed;
  const auto pid = get("LISTEN_PID");
  const auto count_text = get("LISTEN_FDS");
  if (!pid || !count_text || *pid != std::to_string(self)) return passed;
  const std::optional<std::uint64_t> count = parse_decimal(*count_text);
  if (!count || *count > kMaxPassedSockets) {
    passed.error = "LISTEN_FDS: not a number of sockets up to " + std::to_string(kMaxPassedSockets);
    return passed;
  }
  const std::string names = get("LISTEN_FDNAMES").value_or("");
  std::string_view rest = names;
  for (int fd = first; fd < first + static_cast<int>(*count); ++fd) {
    if (!detail::is_tcp_listener(fd) || !detail::prepare_listener(fd)) {
      passed.error = "descriptor " + std::to_string(fd) + " was passed, but it is not a listening TCP socket";
      return passed;
    }
    passed.sockets.push_back({fd, detail::next_name(rest)});
  }
  return passed;
}

// A message to a loop: say the number back.
struct Heartbeat {
  std::atomic<std::uint64_t>* heard = nullptr;
  std::uint64_t number = 0;

  // What it proves is that the loop came by; nothing else is read by way of it.
  void answer() const { heard->store(number, std::memory_order_relaxed); }
};

class Watchdog {
 public:
  // `limit_ns`: the service manager restarts what is silent for so long; 0: nobody watches.
  Watchdog(std::size_t loops, Ns limit_ns, Ns now)
      : heard_(loops), limit_ns_(limit_ns), next_ns_(limit_ns > 0 ? now : kNever) {}

  Ns next() const { return next_ns_; }

  // Whether to say that all is well. Then every loop is asked anew: post(number of the loop, Heartbeat). Where one has
  // not answered yet, it looks again soon: a loop that was only slow must not cost a restart.
  template <class Post>
  bool due(Ns now, Post&& post) {
    if (now < next_ns_) return false;
    if (!all_answered()) {
      next_ns_ = now + std::max<Ns>(limit_ns_ / 16, kMillisecond);
      return false;
    }
    next_ns_ = now + std::max<Ns>(limit_ns_ / 2, kMillisecond);
    asked_ += 1;
    for (std::size_t i = 0; i < heard_.size(); ++i) post(i, Heartbeat{&heard_[i], asked_});
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
