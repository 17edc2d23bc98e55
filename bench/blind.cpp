// blind.cpp
// Owns:     the floor that every proxy is measured against: bytes from one socket to another, and nothing else.
// Promises: one recv and one send each way for a request, one epoll_wait shared by all that is ready; edge-triggered,
//           registered once; a backend connection for each client connection; one thread, TCP_NODELAY, no allocation in
//           the steady state. What a kernel buffer does not take is kept, and its source is not read meanwhile.
// Leaves:   reading what passes. Nothing is parsed, pooled, counted or timed.
// usage:    blind LISTEN_PORT BACKEND_PORT     (both on 127.0.0.1)
#include <sys/epoll.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "loopback.h"

using namespace nexus::bench;

namespace {

constexpr std::size_t kBufferBytes = 128u << 10;  // of one recv: in the second-level cache between the two calls
constexpr std::size_t kReadsPerTurn = 16;         // of one socket, before others get their turn
constexpr int kMaxEvents = 512;

// One of the two sockets of a pair. What is read here goes out at `other`.
struct Side {
  int fd = -1;
  bool readable = false;  // an edge was seen, and no short read since
  bool hangup = false;    // a FIN stands behind what can still be read: no edge will tell of it again
  bool ended = false;     // its FIN was read and passed on
  bool connecting = false;
  Side* other = nullptr;
  struct Pair* pair = nullptr;
  std::string kept;  // waits for this socket to become writable
  std::size_t kept_sent = 0;
};

struct Pair {
  Side client;
  Side backend;
  bool closed = false;
};

class Forwarder {
 public:
  Forwarder(int listener, std::uint16_t backend_port)
      : listener_(listener), epoll_(epoll_create1(EPOLL_CLOEXEC)), backend_port_(backend_port) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = nullptr;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, listener_, &event);
  }

  void turn() {
    const int count = epoll_wait(epoll_, events_.data(), kMaxEvents, again_.empty() ? -1 : 0);
    for (int i = 0; i < count; ++i) {
      const epoll_event& event = events_[static_cast<std::size_t>(i)];
      if (event.data.ptr == nullptr) {
        accept_all();
      } else {
        on_event(*static_cast<Side*>(event.data.ptr), event.events);
      }
    }
    std::vector<Side*> again;
    again.swap(again_);
    for (Side* side : again) pump(*side);
    if (closed_.empty()) return;
    std::erase_if(again_, [](const Side* side) { return side->pair->closed; });
    for (Pair* pair : closed_) delete pair;  // no event of this turn can name them any more
    closed_.clear();
  }

 private:
  void accept_all() {
    for (;;) {
      const int fd = accept_from(listener_);
      if (fd < 0) return;
      const int to = connect_to(backend_port_);
      if (to < 0) {
        close(fd);
        continue;
      }
      begin(fd, to);
    }
  }

  void begin(int client, int backend) {
    auto* pair = new Pair;
    pair->client.fd = client;
    pair->backend.fd = backend;
    pair->backend.connecting = true;
    pair->client.other = &pair->backend;
    pair->backend.other = &pair->client;
    for (Side* side : {&pair->client, &pair->backend}) {
      side->pair = pair;
      epoll_event event{};
      event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
      event.data.ptr = side;
      epoll_ctl(epoll_, EPOLL_CTL_ADD, side->fd, &event);
    }
  }

  void on_event(Side& side, std::uint32_t events) {
    if (side.pair->closed) return;
    if ((events & (EPOLLERR | EPOLLHUP)) != 0) return end(*side.pair);
    if ((events & (EPOLLIN | EPOLLRDHUP)) != 0) side.readable = true;
    if ((events & EPOLLRDHUP) != 0) side.hangup = true;
    if ((events & EPOLLOUT) != 0 && (side.connecting || !side.kept.empty())) {
      side.connecting = false;
      if (!flush(side)) return;
      pump(*side.other);
      if (side.pair->closed) return;
    }
    pump(side);
  }

  // Moves what is there from `side` to the other.
  void pump(Side& side) {
    if (side.pair->closed) return;
    Side& to = *side.other;
    for (std::size_t reads = 0; side.readable && !side.ended && !to.connecting && to.kept.empty(); ++reads) {
      if (reads == kReadsPerTurn) return again_.push_back(&side);
      const ssize_t got = recv(side.fd, buffer_.data(), buffer_.size(), 0);
      if (got < 0) {
        side.readable = false;
        if (errno != EAGAIN) end(*side.pair);
        return;
      }
      if (got == 0) return pass_end(side);
      const auto bytes = static_cast<std::size_t>(got);
      if (bytes < buffer_.size() && !side.hangup) side.readable = false;  // epoll(7): a short read empties the socket
      const ssize_t sent = send(to.fd, buffer_.data(), bytes, MSG_NOSIGNAL);
      if (sent < 0 && errno != EAGAIN) return end(*side.pair);
      const std::size_t taken = sent < 0 ? 0 : static_cast<std::size_t>(sent);
      if (taken < bytes) to.kept.assign(buffer_.data() + taken, bytes - taken);
    }
  }

  // Sends what waits for this socket. False where the pair is gone.
  bool flush(Side& side) {
    while (side.kept_sent < side.kept.size()) {
      const ssize_t sent =
          send(side.fd, side.kept.data() + side.kept_sent, side.kept.size() - side.kept_sent, MSG_NOSIGNAL);
      if (sent < 0 && errno == EAGAIN) return true;
      if (sent < 0) {
        end(*side.pair);
        return false;
      }
      side.kept_sent += static_cast<std::size_t>(sent);
    }
    side.kept.clear();
    side.kept_sent = 0;
    return true;
  }

  void pass_end(Side& side) {
    side.ended = true;
    if (side.other->ended) return end(*side.pair);
    shutdown(side.other->fd, SHUT_WR);
  }

  void end(Pair& pair) {
    pair.closed = true;
    close(pair.client.fd);
    close(pair.backend.fd);
    closed_.push_back(&pair);
  }

  int listener_;
  int epoll_;
  std::uint16_t backend_port_;
  std::array<epoll_event, kMaxEvents> events_;
  std::array<char, kBufferBytes> buffer_;
  std::vector<Side*> again_;
  std::vector<Pair*> closed_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: blind LISTEN_PORT BACKEND_PORT\n");
    return 2;
  }
  raise_descriptor_limit();
  const int listener = listen_on(port_of(argv[1]));
  static Forwarder forwarder(listener, port_of(argv[2]));
  for (;;) forwarder.turn();
}
