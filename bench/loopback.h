// loopback.h
// Owns:     what the benchmark's small servers and clients share: sockets on 127.0.0.1, clocks, the descriptor limit.
// Promises: every socket is non-blocking, close-on-exec and has TCP_NODELAY; what fails ends the process with a reason.
// Leaves:   event loops to each program.
// Threads:  any.
#pragma once

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace nexus::bench {

using Ns = std::int64_t;

inline Ns now_ns() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return Ns{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

// The clock of the kernel's own time stamps.
inline Ns wall_ns() {
  timespec t{};
  clock_gettime(CLOCK_REALTIME, &t);
  return Ns{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

[[noreturn]] inline void die(const char* what) {
  perror(what);
  std::exit(1);
}

inline void raise_descriptor_limit() {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

inline void no_delay(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

// 127.0.0.`host`, any of which is this machine.
inline sockaddr_in loopback(std::uint16_t port, std::uint8_t host = 1) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl((127u << 24) | host);
  return address;
}

inline int new_socket() { return socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0); }

inline int listen_on(std::uint16_t port) {
  const int fd = new_socket();
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  const sockaddr_in address = loopback(port);
  if (bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) die("bind");
  if (listen(fd, 4096) != 0) die("listen");
  return fd;
}

// -1 where there is none, or a socket that connects or has connected. `from`: the last byte of the source address.
inline int connect_to(std::uint16_t port, std::uint8_t from = 1) {
  const int fd = new_socket();
  if (fd < 0) return -1;
  no_delay(fd);
  const int on = 1;
  setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
  const sockaddr_in source = loopback(0, from);
  const sockaddr_in target = loopback(port);
  if (bind(fd, reinterpret_cast<const sockaddr*>(&source), sizeof source) == 0 &&
      (connect(fd, reinterpret_cast<const sockaddr*>(&target), sizeof target) == 0 || errno == EINPROGRESS)) {
    return fd;
  }
  close(fd);
  return -1;
}

inline int accept_from(int listener) {
  const int fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd >= 0) no_delay(fd);
  return fd;
}

// A port given as an argument.
inline std::uint16_t port_of(const char* text) {
  const long port = std::strtol(text, nullptr, 10);
  if (port < 1 || port > 65535) {
    std::fprintf(stderr, "%s is not a port\n", text);
    std::exit(2);
  }
  return static_cast<std::uint16_t>(port);
}

}  // namespace nexus::bench
