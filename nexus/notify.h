// notify.h
// Owns:     what Nexus tells the service manager that started it: sd_notify(3)'s messages, over its socket, by hand.
// Promises: without $NOTIFY_SOCKET nothing is sent and nothing fails; a message is one datagram, whole or not at all; a
//           manager that does not read holds a sender up for a second at most.
// Leaves:   when to say what to daemon.h; whether all is well to pulse.h.
// Threads:  the main thread's.
#pragma once

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "clock.h"
#include "text.h"

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

}  // namespace nexus
