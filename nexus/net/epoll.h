// epoll.h
// Owns:     every system call on a TCP socket: epoll, listen, accept, connect, read, write, close.
// Promises: connections are edge-triggered and registered once for their life; an event carries the token of its
//           registration (slot and generation), so that a stale event is recognised; only wait() blocks; every result
//           is ok, again, eof or failed with errno.
// Leaves:   buffering to connection.h, the meaning of the bytes to others. tests/sim/sim_net.h has the same members.
// Threads:  one EpollNet per thread; only wake() may be called from other threads.
// Tested by: tests/epoll_test.cpp
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "nexus/base/clock.h"
#include "nexus/base/slot_map.h"
#include "nexus/base/text.h"

namespace nexus {

// A numeric IPv4 or IPv6 address with its port.
struct Address {
  bool v6 = false;
  std::array<std::uint8_t, 16> ip{};  // v4: the first four bytes
  std::uint16_t port = 0;
  auto operator<=>(const Address&) const = default;  // IPv4 first
};

// Parses a numeric host ("127.0.0.1", "::1"); nullopt if `host` is a name.
inline std::optional<Address> parse_address(const std::string& host, std::uint16_t port) {
  Address address;
  address.port = port;
  if (inet_pton(AF_INET, host.c_str(), address.ip.data()) == 1) return address;
  address.v6 = true;
  if (inet_pton(AF_INET6, host.c_str(), address.ip.data()) == 1) return address;
  return std::nullopt;
}

// Formats as `127.0.0.1:8000` or `[::1]:8000`.
inline std::string to_string(const Address& address) {
  char text[INET6_ADDRSTRLEN] = "";
  inet_ntop(address.v6 ? AF_INET6 : AF_INET, address.ip.data(), text, sizeof text);
  return host_port(text, address.port);
}

// Both have the port at the same place.
static_assert(offsetof(sockaddr_in, sin_port) == offsetof(sockaddr_in6, sin6_port));

// Of AF_INET or AF_INET6; other families give an empty address.
inline Address from_sockaddr(const sockaddr* from) {
  Address address;
  if (from->sa_family != AF_INET && from->sa_family != AF_INET6) return address;
  const auto* v4 = reinterpret_cast<const sockaddr_in*>(from);
  const auto* v6 = reinterpret_cast<const sockaddr_in6*>(from);
  address.v6 = from->sa_family == AF_INET6;
  address.port = ntohs(v4->sin_port);
  address.v6 ? std::memcpy(address.ip.data(), &v6->sin6_addr, 16) : std::memcpy(address.ip.data(), &v4->sin_addr, 4);
  return address;
}

// True if the address is one of this host's interfaces.
inline bool is_of_this_host(const Address& address) {
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return false;
  bool found = false;
  for (const ifaddrs* each = all; each != nullptr; each = each->ifa_next) {
    if (each->ifa_addr == nullptr) continue;
    Address own = from_sockaddr(each->ifa_addr);
    own.port = address.port;
    found |= own == address;
  }
  freeifaddrs(all);
  return found;
}

struct IoResult {
  enum class Kind : std::uint8_t { ok, again, eof, failed };
  Kind kind = Kind::ok;
  std::size_t bytes = 0;
  int error = 0;  // errno if failed

  bool ok() const { return kind == Kind::ok; }
};

struct Event {
  Handle token;
  bool readable = false;
  bool writable = false;
  bool hangup = false;  // the peer sent its FIN, or the connection broke
};

// Result of listen(), accept() and connect(). The no_… are lacks on this host: they say nothing about the peer.
enum class SocketOutcome : std::uint8_t { ok, again, no_descriptor, no_memory, no_port, no_route, failed };

constexpr SocketOutcome outcome_of(int error) {
  switch (error) {
    case EAGAIN:
    case EINTR:
    case ECONNABORTED:
    case EPROTO: return SocketOutcome::again;
    case EMFILE:
    case ENFILE: return SocketOutcome::no_descriptor;
    case ENOMEM:
    case ENOBUFS: return SocketOutcome::no_memory;
    case EADDRNOTAVAIL: return SocketOutcome::no_port;
    case ENETUNREACH:
    case EAFNOSUPPORT: return SocketOutcome::no_route;
    default: return SocketOutcome::failed;
  }
}

// The lack that kept connect() from reaching the peer; empty if the peer was reached, or refused the connection.
constexpr std::string_view lack_of(SocketOutcome outcome) {
  switch (outcome) {
    case SocketOutcome::no_descriptor: return "no file descriptor is free";
    case SocketOutcome::no_memory: return "out of memory";
    case SocketOutcome::again:  // connect(2): too few entries in the routing cache
    case SocketOutcome::no_port: return "no local port is free";
    case SocketOutcome::no_route: return "this host has no route to the backend's network";
    case SocketOutcome::ok:
    case SocketOutcome::failed: break;
  }
  return {};
}

class Resolver;

class EpollNet {
 public:
  using Resolver = nexus::Resolver;  // resolver.h
  struct Socket {
    int fd = -1;
    bool open() const { return fd >= 0; }
  };
  struct Opened {
    SocketOutcome outcome = SocketOutcome::failed;
    Socket socket;
    Address peer;
    int error = 0;
  };

  static constexpr std::size_t kMaxEvents = 256;  // per wait()
  static constexpr int kBacklog = 4096;           // the kernel caps it at net.core.somaxconn

  EpollNet() = default;
  EpollNet(const EpollNet&) = delete;
  EpollNet& operator=(const EpollNet&) = delete;
  ~EpollNet() {
    if (epoll_ >= 0) ::close(epoll_);
    if (wake_ >= 0) ::close(wake_);
  }

  // Creates the epoll set and its wake-up descriptor. Returns 0 or errno.
  int open() {
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (epoll_ < 0 || wake_ < 0) return errno;
    return control(EPOLL_CTL_ADD, wake_, EPOLLIN | EPOLLET, kWakeToken) ? 0 : errno;
  }

  Ns now() const { return monotonic_now(); }
  Ns wall_now() const { return nexus::wall_now(); }

  // Waits for events until `deadline` at most; fills `out` and returns their number. A wake() ends the wait and sets
  // `woken`.
  std::size_t wait(std::span<Event> out, Ns deadline, bool& woken) {
    std::array<epoll_event, kMaxEvents> events;
    const int limit = static_cast<int>(std::min(out.size(), events.size()));
    const int count = epoll_wait(epoll_, events.data(), limit, timeout_ms(deadline));
    if (count < 0) assert(errno == EINTR);
    std::size_t filled = 0;
    for (int i = 0; i < count; ++i) {
      const epoll_event& from = events[static_cast<std::size_t>(i)];
      if (from.data.u64 == kWakeToken.value) {
        woken = true;
        continue;
      }
      Event& to = out[filled++];
      to.token = Handle{from.data.u64};
      to.readable = (from.events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
      to.writable = (from.events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0;
      to.hangup = (from.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
    }
    return filled;
  }

  // Ends the current or the next wait(). Called from any thread.
  void wake() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(wake_, &one, sizeof one);  // EAGAIN: a wake-up is pending already
  }

  // Opens a listening socket, which is not watched yet; `peer` is the address that it is bound to.
  static Opened listen(const Address& address) {
    Opened opened = new_socket(address);
    if (!opened.socket.open()) return opened;
    turn_on(opened.socket, SOL_SOCKET, SO_REUSEADDR);
    if (address.v6) turn_on(opened.socket, IPPROTO_IPV6, IPV6_V6ONLY);
    sockaddr_storage storage;
    const socklen_t length = to_sockaddr(address, storage);
    if (::bind(opened.socket.fd, reinterpret_cast<sockaddr*>(&storage), length) != 0) return failed(opened, errno);
    if (::listen(opened.socket.fd, kBacklog) != 0) return failed(opened, errno);
    opened.peer = local_address(opened.socket);
    return opened;
  }

  // Reports connections that wait in the listener's backlog. Other threads may watch it too: the kernel wakes one.
  // Level-triggered, so that a connection left in the backlog is reported again.
  bool watch_listener(Socket listener, Handle token) {
    return control(EPOLL_CTL_ADD, listener.fd, EPOLLIN | EPOLLEXCLUSIVE, token);
  }
  void unwatch(Socket socket) { control(EPOLL_CTL_DEL, socket.fd, 0, {}); }

  // Watches a descriptor that a library owns, level-triggered, for the given directions; with neither, stops watching
  // it, which must come before its close(). False: errno.
  bool watch_foreign(int fd, Handle token, bool readable, bool writable) {
    const std::uint32_t events = (readable ? std::uint32_t{EPOLLIN} : 0) | (writable ? std::uint32_t{EPOLLOUT} : 0);
    if (events == 0) return control(EPOLL_CTL_DEL, fd, 0, {});
    return control(EPOLL_CTL_MOD, fd, events, token) || (errno == ENOENT && control(EPOLL_CTL_ADD, fd, events, token));
  }

  Opened accept(Socket listener) {
    Opened opened;
    sockaddr_storage storage;
    auto* const from = reinterpret_cast<sockaddr*>(&storage);
    socklen_t length = sizeof storage;
    opened.socket.fd = ::accept4(listener.fd, from, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (!opened.socket.open()) return failed(opened, errno);
    opened.outcome = SocketOutcome::ok;
    opened.peer = from_sockaddr(from);
    turn_on(opened.socket, IPPROTO_TCP, TCP_NODELAY);
    return opened;
  }

  // Starts to connect; a `writable` event reports the end of it, and connect_error() the result.
  Opened connect(const Address& address) {
    Opened opened = new_socket(address);
    if (!opened.socket.open()) return opened;
    turn_on(opened.socket, IPPROTO_TCP, TCP_NODELAY);
    sockaddr_storage storage;
    const socklen_t length = to_sockaddr(address, storage);
    const int result = ::connect(opened.socket.fd, reinterpret_cast<sockaddr*>(&storage), length);
    if (result != 0 && errno != EINPROGRESS) return failed(opened, errno);
    opened.peer = address;
    return opened;
  }

  // Returns 0 if the connection is established, or errno.
  int connect_error(Socket socket) {
    int error = 0;
    socklen_t length = sizeof error;
    if (::getsockopt(socket.fd, SOL_SOCKET, SO_ERROR, &error, &length) != 0) return errno;
    return error;
  }

  // Registers a connection for its life: every edge of readable, writable and hangup becomes an event.
  bool watch(Socket socket, Handle token) {
    return control(EPOLL_CTL_ADD, socket.fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, token);
  }

  // recv() and send() as raw system calls: the C library's wrappers are cancellation points, which cost time in each
  // request, and no thread here is ever cancelled.
  IoResult read(Socket socket, char* into, std::size_t bytes) {
    for (;;) {
      const ssize_t n = ::syscall(SYS_recvfrom, socket.fd, into, bytes, 0, nullptr, nullptr);
      if (n > 0) return {IoResult::Kind::ok, static_cast<std::size_t>(n), 0};
      if (n == 0) return {IoResult::Kind::eof, 0, 0};
      if (errno != EINTR) return io_error(errno);
    }
  }

  IoResult write(Socket socket, std::span<const iovec> parts) {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(parts.data());  // sendmsg reads it only
    message.msg_iovlen = parts.size();
    for (;;) {
      const ssize_t n = parts.size() == 1 ? ::syscall(SYS_sendto, socket.fd, parts[0].iov_base, parts[0].iov_len,
                                                      MSG_NOSIGNAL, nullptr, 0)
                                          : ::sendmsg(socket.fd, &message, MSG_NOSIGNAL);
      if (n >= 0) return {IoResult::Kind::ok, static_cast<std::size_t>(n), 0};
      if (errno != EINTR) return io_error(errno);
    }
  }

  // Makes the kernel refuse new connections, and drop those that still wait in the backlog.
  static void refuse_connections(Socket listener) { ::shutdown(listener.fd, SHUT_RDWR); }

  // Sends a FIN; the reading side stays open.
  void shut_write(Socket socket) { ::shutdown(socket.fd, SHUT_WR); }

  void close(Socket& socket) {
    if (socket.open()) ::close(socket.fd);
    socket.fd = -1;
  }

  // Closes with a reset, so that the peer cannot take a truncated response for a complete one.
  void reset(Socket& socket) {
    const linger at_once{1, 0};
    if (socket.open()) ::setsockopt(socket.fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(socket);
  }

  static Address local_address(Socket socket) {
    sockaddr_storage storage{};
    socklen_t length = sizeof storage;
    if (::getsockname(socket.fd, reinterpret_cast<sockaddr*>(&storage), &length) != 0) return {};
    return from_sockaddr(reinterpret_cast<const sockaddr*>(&storage));
  }

 private:
  static constexpr Handle kWakeToken{UINT64_MAX};

  bool control(int operation, int fd, std::uint32_t events, Handle token) {
    epoll_event event{};
    event.events = events;
    event.data.u64 = token.value;
    return epoll_ctl(epoll_, operation, fd, &event) == 0;
  }

  static Opened new_socket(const Address& address) {
    Opened opened;
    opened.socket.fd = ::socket(address.v6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (!opened.socket.open()) return failed(opened, errno);
    opened.outcome = SocketOutcome::ok;
    return opened;
  }

  static socklen_t to_sockaddr(const Address& address, sockaddr_storage& storage) {
    storage = {};
    storage.ss_family = address.v6 ? AF_INET6 : AF_INET;
    auto& v4 = reinterpret_cast<sockaddr_in&>(storage);
    auto& v6 = reinterpret_cast<sockaddr_in6&>(storage);
    v4.sin_port = htons(address.port);
    address.v6 ? std::memcpy(&v6.sin6_addr, address.ip.data(), 16) : std::memcpy(&v4.sin_addr, address.ip.data(), 4);
    return address.v6 ? sizeof v6 : sizeof v4;
  }

  static void turn_on(Socket socket, int level, int option) {
    const int on = 1;
    ::setsockopt(socket.fd, level, option, &on, sizeof on);
  }

  static IoResult io_error(int error) {
    if (error == EAGAIN || error == EWOULDBLOCK) return {IoResult::Kind::again, 0, 0};
    return {IoResult::Kind::failed, 0, error};
  }

  static Opened failed(Opened& opened, int error) {
    if (opened.socket.open()) ::close(opened.socket.fd);
    opened.socket.fd = -1;
    opened.error = error;
    opened.outcome = outcome_of(error);
    return opened;
  }

  // Rounded up, so that the deadline has passed when the wait ends.
  int timeout_ms(Ns deadline) const {
    if (deadline == kNever) return -1;
    const Ns left = deadline - now();
    if (left <= 0) return 0;
    return static_cast<int>(std::min<Ns>((left + kMillisecond - 1) / kMillisecond, 3'600'000));
  }

  int epoll_ = -1;
  int wake_ = -1;
};

}  // namespace nexus
