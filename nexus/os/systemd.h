// systemd.h
// Owns:     what Nexus and the service manager say to each other: passed sockets (sd_listen_fds(3)), status messages
//           (sd_notify(3)) and the watchdog (sd_watchdog_enabled(3)), without libsystemd.
// Promises: without its environment variables nothing is sent, taken or failed. Only listening TCP sockets that were
//           passed to this process are taken. A message is one datagram and delays its sender by a second at most. The
//           watchdog reports that all is well only after every loop has answered; it sends a loop that hangs no second
//           heartbeat, so that its mailbox does not fill; a loop that ended on purpose counts as well.
// Leaves:   when to send what, and the delivery of heartbeats, to daemon.h.
// Threads:  the main thread, but Heartbeat::answer() and Watchdog::loop_ended() are called by the loop's own.
// Tested by: tests/systemd_test.cpp, tests/e2e/systemd.test.mjs
#pragma once

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
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

// An environment variable, or nothing if it is not set: ConfigEnvironment::get_env.
using GetVariable = std::function<std::optional<std::string>(const std::string& name)>;

// ---- passed sockets ----

constexpr int kFirstPassedDescriptor = 3;  // SD_LISTEN_FDS_START
constexpr std::uint64_t kMaxPassedSockets = 64;

struct PassedSocket {
  int fd = -1;
  std::string name;  // FileDescriptorName= of the socket unit, by default the name of the unit
};

namespace detail {

// True if `fd` is a listening TCP socket. It is made non-blocking and close-on-exec.
inline bool prepare_listener(int fd) {
  const auto option = [fd](int name) {
    int value = -1;
    socklen_t length = sizeof value;
    return ::getsockopt(fd, SOL_SOCKET, name, &value, &length) == 0 ? value : -1;
  };
  const int domain = option(SO_DOMAIN);
  if (domain != AF_INET && domain != AF_INET6) return false;
  if (option(SO_TYPE) != SOCK_STREAM || option(SO_ACCEPTCONN) != 1) return false;
  const int flags = ::fcntl(fd, F_GETFL);
  return flags >= 0 && ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0 && ::fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

}  // namespace detail

// Takes the sockets that the variables name, from descriptor `first` on: makes them non-blocking and close-on-exec, and
// adds them to `out`; none if none were passed to this process. Returns why what was passed cannot be used, or an empty
// text.
inline std::string passed_sockets(const GetVariable& get, pid_t self, std::vector<PassedSocket>& out,
                                  int first = kFirstPassedDescriptor) {
  const auto pid = get("LISTEN_PID");
  const auto count_text = get("LISTEN_FDS");
  if (!pid || !count_text || *pid != std::to_string(self)) return {};
  const std::optional<std::uint64_t> count = parse_decimal(*count_text);
  if (!count || *count > kMaxPassedSockets) {
    return "LISTEN_FDS: not a number of sockets up to " + std::to_string(kMaxPassedSockets);
  }
  const std::string names = get("LISTEN_FDNAMES").value_or("");  // between colons
  std::string_view rest = names;
  for (int fd = first; fd < first + static_cast<int>(*count); ++fd) {
    if (!detail::prepare_listener(fd)) {
      return "descriptor " + std::to_string(fd) + " was passed, but it is not a listening TCP socket";
    }
    const std::size_t colon = std::min(rest.find(':'), rest.size());
    out.push_back({fd, std::string(rest.substr(0, colon))});
    rest.remove_prefix(std::min(colon + 1, rest.size()));
  }
  return {};
}

// ---- messages to the service manager ----

class Notifier {
 public:
  // `path`: a file, or `@` and a name in the abstract namespace. With anything else no message is sent.
  explicit Notifier(const std::optional<std::string>& path) {
    if (!path || path->size() < 2 || path->size() >= sizeof to_.sun_path) return;
    const bool abstract = path->front() == '@';
    if (path->front() != '/' && !abstract) return;
    socket_ = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (socket_ < 0) return;
    const timeval limit{1, 0};
    ::setsockopt(socket_, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    to_.sun_family = AF_UNIX;
    std::memcpy(to_.sun_path, path->data(), path->size());
    if (abstract) to_.sun_path[0] = '\0';  // unix(7): an abstract name starts with a NUL and does not end with one
    length_ = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path->size() + (abstract ? 0 : 1));
  }
  Notifier(const Notifier&) = delete;
  Notifier& operator=(const Notifier&) = delete;
  ~Notifier() {
    if (socket_ >= 0) ::close(socket_);
  }

  // Receives instead what others send to `path`: the descriptor for it, or -1.
  int bind() {
    const auto* at = reinterpret_cast<const sockaddr*>(&to_);
    return socket_ >= 0 && ::bind(socket_, at, length_) == 0 ? socket_ : -1;
  }

  // Sends `NAME=value` lines. False if nobody received them.
  bool send(std::string_view message) {
    if (socket_ < 0) return false;
    for (;;) {
      const ssize_t sent = ::sendto(socket_, message.data(), message.size(), MSG_NOSIGNAL,
                                    reinterpret_cast<const sockaddr*>(&to_), length_);
      if (sent >= 0) return static_cast<std::size_t>(sent) == message.size();
      if (errno != EINTR) return false;
    }
  }

  bool ready(std::string_view status) { return send("READY=1\nSTATUS=" + std::string(status)); }
  // The manager tells this reload's READY=1 from an earlier one by the time.
  bool reloading(Ns now) { return send("RELOADING=1\nMONOTONIC_USEC=" + std::to_string(now / kMicrosecond)); }
  bool stopping(std::string_view status) { return send("STOPPING=1\nSTATUS=" + std::string(status)); }
  bool alive() { return send("WATCHDOG=1"); }

 private:
  int socket_ = -1;
  sockaddr_un to_{};
  socklen_t length_ = 0;
};

// True if `fd` is the journal: the file that `stream` ($JOURNAL_STREAM) names by its device and inode
// (systemd.exec(5)). The variable alone does not say so: the children of a service inherit it, and one stream of a
// service may be a file.
inline bool is_journal(const std::optional<std::string>& stream, int fd) {
  struct stat file {};
  return stream && ::fstat(fd, &file) == 0 &&
         *stream == std::to_string(file.st_dev) + ":" + std::to_string(file.st_ino);
}

// ---- watchdog ----

// The silence after which the service manager restarts this process; 0 if it does not watch it.
inline Ns watchdog_limit_ns(const GetVariable& get, pid_t self) {
  const std::optional<std::string> limit = get("WATCHDOG_USEC");
  if (!limit) return 0;
  if (const auto pid = get("WATCHDOG_PID"); pid && *pid != std::to_string(self)) return 0;
  const std::optional<std::uint64_t> micros = parse_decimal(*limit);
  if (!micros || *micros > static_cast<std::uint64_t>(INT64_MAX / kMicrosecond)) return 0;
  return static_cast<Ns>(*micros) * kMicrosecond;
}

// A message to a loop, which must echo the number.
struct Heartbeat {
  std::atomic<std::uint64_t>* heard = nullptr;
  std::uint64_t number = 0;

  // relaxed: the number only shows that the loop turned, and publishes nothing else.
  void answer() const { heard->store(number, std::memory_order_relaxed); }
};

class Watchdog {
 public:
  // `limit_ns`: as watchdog_limit_ns(); with 0 no heartbeat is ever sent.
  Watchdog(std::size_t loops, Ns limit_ns, Ns now)
      : heard_(loops), limit_ns_(limit_ns), next_ns_(limit_ns > 0 ? now : kNever) {}

  Ns next() const { return next_ns_; }  // when to call due()

  // True if the service manager is to be told that all is well. Then it also sends each loop a new heartbeat, by
  // post(index of the loop, Heartbeat). If a loop has not answered yet it looks again soon: a loop that is only slow
  // must not cause a restart.
  template <class Post>
  bool due(Ns now, Post&& post) {
    if (now < next_ns_) return false;
    const bool all_answered = std::all_of(
        heard_.begin(), heard_.end(),
        [this](const std::atomic<std::uint64_t>& heard) { return heard.load(std::memory_order_relaxed) >= sent_; });
    next_ns_ = now + std::max<Ns>(limit_ns_ / (all_answered ? 2 : 16), kMillisecond);
    if (!all_answered) return false;
    sent_ += 1;
    for (std::size_t i = 0; i < heard_.size(); ++i) post(i, Heartbeat{&heard_[i], sent_});
    return true;
  }

  void loop_ended(std::size_t loop) { heard_[loop].store(UINT64_MAX, std::memory_order_relaxed); }

 private:
  std::vector<std::atomic<std::uint64_t>> heard_;  // per loop: the last number that it echoed
  std::uint64_t sent_ = 0;
  Ns limit_ns_;
  Ns next_ns_;
};

}  // namespace nexus
