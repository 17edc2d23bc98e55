// activation.h
// Owns:     listening sockets that the service manager opened and passed on (sd_listen_fds(3)).
// Promises: only what was meant for this process is taken, and only what is a listening TCP socket; a passed one is set
//           not to block and not to outlive an exec.
// Leaves:   which addresses they stand in for to daemon.h.
// Threads:  the main thread's, at the start.
#pragma once

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "notify.h"
#include "text.h"

namespace nexus {

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

}  // namespace nexus
