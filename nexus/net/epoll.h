// epoll.h
// Owns:     every system call on a socket: the epoll loop, listening, accepting, connecting, reading, writing.
// Promises: edge-triggered, one registration for a connection's life; an event carries the token it was registered
//           with, which names its owner by slot and generation, so that a stale one is recognised; no call blocks but
//           wait(); every result says ok, again, eof or failed, with errno.
// Leaves:   what the bytes mean; buffering to connection.h. The simulator offers the same members (tests/sim).
// Threads:  one EpollNet a thread; only wake() may be called from others.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
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
  std::array<std::uint8_t, 16> ip{};  // v4: the first four bytes
  std::uint16_t port = 0;
  bool v6 = false;
  bool operator==(const Address&) const = default;
};

// The address that `host` spells ("127.0.0.1", "::1"), or nothing where it is a name.
inline std::optional<Address> parse_address(const std::string& host, std::uint16_t port) {
  Address address;
  address.port = port;
  if (inet_pton(AF_INET, host.c_str(), address.ip.data()) == 1) return address;
  address.v6 = true;
  if (inet_pton(AF_INET6, host.c_str(), address.ip.data()) == 1) return address;
  return std::nullopt;
}

// `127.0.0.1:8000`, `[::1]:8000`.
inline std::string to_string(const Address& address) {
  char text[INET6_ADDRSTRLEN] = "";
  inet_ntop(address.v6 ? AF_INET6 : AF_INET, address.ip.data(), text, sizeof text);
  return host_port(text, address.port);
}

struct IoResult {
  enum class Kind : std::uint8_t { ok, again, eof, failed };
  Kind kind = Kind::ok;
  std::size_t bytes = 0;
  int error = 0;  // errno, where failed

  bool ok() const { return kind == Kind::ok; }
};

struct Event {
  Handle token;
  bool readable = false;
  bool writable = false;
  bool hangup = false;  // the peer sent its FIN, or the connection broke
};

// How accept() and connect() ended.
enum class SocketOutcome : std::uint8_t { ok, again, no_descriptor, no_memory, failed };

class EpollNet {
 public:
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

  static constexpr std::size_t kMaxEvents = 256;  // of one wait()
  static constexpr int kBacklog = 4096;           // the kernel caps it at net.core.somaxconn

  EpollNet() = default;
  EpollNet(const EpollNet&) = delete;
  EpollNet& operator=(const EpollNet&) = delete;
  ~EpollNet() {
    if (epoll_ >= 0) ::close(epoll_);
    if (wake_ >= 0) ::close(wake_);
  }

  // Makes the epoll set and its wake-up. 0, or errno.
  int open() {
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (epoll_ < 0 || wake_ < 0) return errno;
    epoll_event event{};
    event.events = EPOLLIN | EPOLLET;
    event.data.u64 = kWakeToken.value;
    return epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_, &event) == 0 ? 0 : errno;
  }

  Ns now() const { return monotonic_now(); }

  // Waits for events, at most until `deadline`; fills `out` and says how many. A wake() ends the wait and sets `woken`.
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

  // Ends the current or the next wait(). Any thread.
  void wake() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(wake_, &one, sizeof one);  // full: it is awake already
  }

  // A listening socket, not yet watched. The error is errno.
  static Opened listen(const Address& address) {
    Opened opened;
    const int fd = ::socket(family(address), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return failed(opened, errno);
    opened.socket.fd = fd;
    const int on = 1;
    ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (address.v6) ::setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    sockaddr_storage storage;
    const socklen_t length = to_sockaddr(address, storage);
    if (::bind(fd, reinterpret_cast<sockaddr*>(&storage), length) != 0 || ::listen(fd, kBacklog) != 0) {
      const int error = errno;
      ::close(fd);
      return failed(opened, error);
    }
    opened.outcome = SocketOutcome::ok;
    opened.peer = local_address(opened.socket);
    return opened;
  }

  // Takes connections from `listener`, which other threads' loops may watch too: one of them is woken.
  bool watch_listener(Socket listener, Handle token) {
    epoll_event event{};
    event.events = EPOLLIN | EPOLLEXCLUSIVE;  // level-triggered: a connection left in the backlog is told of again
    event.data.u64 = token.value;
    return epoll_ctl(epoll_, EPOLL_CTL_ADD, listener.fd, &event) == 0;
  }
  void unwatch(Socket socket) { epoll_ctl(epoll_, EPOLL_CTL_DEL, socket.fd, nullptr); }

  Opened accept(Socket listener) {
    Opened opened;
    sockaddr_storage storage;
    socklen_t length = sizeof storage;
    const int fd = ::accept4(listener.fd, reinterpret_cast<sockaddr*>(&storage), &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return failed(opened, errno);
    opened.outcome = SocketOutcome::ok;
    opened.socket.fd = fd;
    opened.peer = from_sockaddr(storage);
    no_delay(fd);
    return opened;
  }

  // Starts to connect; a `writable` event tells that it is decided, connect_error() how.
  Opened connect(const Address& address) {
    Opened opened;
    const int fd = ::socket(family(address), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return failed(opened, errno);
    no_delay(fd);
    sockaddr_storage storage;
    const socklen_t length = to_sockaddr(address, storage);
    if (::connect(fd, reinterpret_cast<sockaddr*>(&storage), length) != 0 && errno != EINPROGRESS) {
      const int error = errno;
      ::close(fd);
      return failed(opened, error);
    }
    opened.outcome = SocketOutcome::ok;
    opened.socket.fd = fd;
    opened.peer = address;
    return opened;
  }

  // 0 once the connection stands, or errno.
  int connect_error(Socket socket) {
    int error = 0;
    socklen_t length = sizeof error;
    if (::getsockopt(socket.fd, SOL_SOCKET, SO_ERROR, &error, &length) != 0) return errno;
    return error;
  }

  // Registers a connection for its life: every edge of readable, writable and hangup comes as an event.
  bool watch(Socket socket, Handle token) {
    epoll_event event{};
    event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
    event.data.u64 = token.value;
    return epoll_ctl(epoll_, EPOLL_CTL_ADD, socket.fd, &event) == 0;
  }

  // recv() and send() without the C library's wrappers, which are points where a thread may be cancelled: two such
  // calls a request each way, and no thread here is ever cancelled.
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

  // New connections are refused from now on; the workers have taken what had come.
  static void refuse_connections(Socket listener) { ::shutdown(listener.fd, SHUT_RDWR); }

  // Sends the FIN and leaves the reading side open.
  void shut_write(Socket socket) { ::shutdown(socket.fd, SHUT_WR); }

  void close(Socket& socket) {
    if (socket.open()) ::close(socket.fd);
    socket.fd = -1;
  }

  // Closes so that the peer sees a reset: what was sent must not look whole.
  void reset(Socket& socket) {
    const linger at_once{1, 0};
    if (socket.open()) ::setsockopt(socket.fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(socket);
  }

  static Address local_address(Socket socket) {
    sockaddr_storage storage{};
    socklen_t length = sizeof storage;
    if (::getsockname(socket.fd, reinterpret_cast<sockaddr*>(&storage), &length) != 0) return {};
    return from_sockaddr(storage);
  }

 private:
  static constexpr Handle kWakeToken{UINT64_MAX};

  static int family(const Address& address) { return address.v6 ? AF_INET6 : AF_INET; }

  static socklen_t to_sockaddr(const Address& address, sockaddr_storage& storage) {
    storage = {};
    if (address.v6) {
      auto& v6 = reinterpret_cast<sockaddr_in6&>(storage);
      v6.sin6_family = AF_INET6;
      v6.sin6_port = htons(address.port);
      std::memcpy(&v6.sin6_addr, address.ip.data(), 16);
      return sizeof v6;
    }
    auto& v4 = reinterpret_cast<sockaddr_in&>(storage);
    v4.sin_family = AF_INET;
    v4.sin_port = htons(address.port);
    std::memcpy(&v4.sin_addr, address.ip.data(), 4);
    return sizeof v4;
  }

  static Address from_sockaddr(const sockaddr_storage& storage) {
    Address address;
    if (storage.ss_family == AF_INET6) {
      const auto& v6 = reinterpret_cast<const sockaddr_in6&>(storage);
      address.v6 = true;
      address.port = ntohs(v6.sin6_port);
      std::memcpy(address.ip.data(), &v6.sin6_addr, 16);
    } else if (storage.ss_family == AF_INET) {
      const auto& v4 = reinterpret_cast<const sockaddr_in&>(storage);
      address.port = ntohs(v4.sin_port);
      std::memcpy(address.ip.data(), &v4.sin_addr, 4);
    }
    return address;
  }

  static void no_delay(int fd) {
    const int on = 1;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }

  static IoResult io_error(int error) {
    if (error == EAGAIN || error == EWOULDBLOCK) return {IoResult::Kind::again, 0, 0};
    return {IoResult::Kind::failed, 0, error};
  }

  static Opened failed(Opened& opened, int error) {
    opened.error = error;
    opened.socket.fd = -1;
    if (error == EAGAIN || error == EWOULDBLOCK || error == EINTR || error == ECONNABORTED || error == EPROTO) {
      opened.outcome = SocketOutcome::again;
    } else if (error == EMFILE || error == ENFILE) {
      opened.outcome = SocketOutcome::no_descriptor;
    } else if (error == ENOMEM || error == ENOBUFS) {
      opened.outcome = SocketOutcome::no_memory;
    } else {
      opened.outcome = SocketOutcome::failed;
    }
    return opened;
  }

  // Rounded up, so that a deadline is past when the wait ends.
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
