// script_net.h
// Owns:     a network in memory for one Worker: both far ends of every connection are in a test's hands.
// Promises: nothing happens but what the test does; edges are told once, as epoll's; time stands still until moved.
// Leaves:   what the far ends say to gateway.h; faults and chance to the simulator.
// Threads:  one.
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "nexus/net/epoll.h"

namespace hostile {

using nexus::Address;
using nexus::Event;
using nexus::Handle;
using nexus::IoResult;
using nexus::Ns;
using nexus::SocketOutcome;

// A connection as its far end sees it.
struct Link {
  std::uint32_t id = 0;
  bool to_backend = false;
  Handle token;
  bool watched = false;

  std::string incoming;         // what the far end sent and Nexus has not read yet
  bool fin = false;             // the far end has sent all
  bool broken = false;          // the far end has reset it
  std::string outgoing;         // what Nexus wrote, from the beginning
  bool ended = false;           // Nexus sent its FIN
  bool closed = false;          // Nexus let go of it
  bool cut = false;             // … with a reset
  std::size_t answered = 0;     // of a backend's link: requests that were answered
  std::size_t room = SIZE_MAX;  // what Nexus may still write

  bool readable = false, writable = false, hangup = false;  // edges to tell
};

class ScriptNet {
 public:
  struct Socket {
    std::uint32_t id = 0;
    bool open() const { return id != 0; }
  };
  struct Opened {
    SocketOutcome outcome = SocketOutcome::failed;
    Socket socket;
    Address peer;
    int error = 0;
  };
  static constexpr std::size_t kMaxEvents = 64;

  // ---- the far ends ----

  Link& open_client() { return make(false); }
  void send(Link& link, std::string_view bytes) {
    if (bytes.empty() || link.closed) return;
    link.incoming += bytes;
    link.readable = true;
  }
  void finish(Link& link) {
    if (link.fin || link.closed) return;
    link.fin = link.readable = link.hangup = true;
  }
  void break_off(Link& link) {
    if (link.broken || link.closed) return;
    link.broken = link.readable = link.writable = link.hangup = true;
    link.incoming.clear();
  }
  std::deque<Link>& links() { return links_; }
  std::function<void(Link&)> on_connect;  // a connection to a backend begins
  void move_clock(Ns span) { now_ += span; }

  // Counts what Nexus did: a turn that did nothing is the end of a story.
  std::uint64_t calls() const { return calls_; }
  bool quiet() const {
    return !woken_ && std::none_of(links_.begin(), links_.end(), [](const Link& link) {
      return link.watched && (link.readable || link.writable || link.hangup);
    });
  }

  // ---- what a Worker wants of its Net ----

  Ns now() const { return now_; }

  std::size_t wait(std::span<Event> out, Ns, bool& woken) {
    woken = woken_;
    woken_ = false;
    std::size_t count = 0;
    for (Link& link : links_) {
      if (!link.watched || (!link.readable && !link.writable && !link.hangup) || count == out.size()) continue;
      out[count++] = Event{link.token, link.readable || link.hangup, link.writable, link.hangup};
      link.readable = link.writable = link.hangup = false;
    }
    return count;
  }
  void wake() { woken_ = true; }

  bool watch_listener(Socket, Handle) { return true; }
  Opened accept(Socket) { return {SocketOutcome::again, {}, {}, 0}; }
  Opened connect(const Address& address) {
    ++calls_;
    Link& link = make(true);
    if (on_connect) on_connect(link);
    return {SocketOutcome::ok, Socket{link.id}, address, 0};
  }
  int connect_error(Socket) { return 0; }

  bool watch(Socket socket, Handle token) {
    Link& link = of(socket);
    link.token = token;
    link.watched = link.writable = true;
    link.readable = !link.incoming.empty() || link.fin || link.broken;
    link.hangup = link.fin || link.broken;
    return true;
  }
  void unwatch(Socket socket) {
    if (socket.open()) of(socket).watched = false;
  }

  IoResult read(Socket socket, char* into, std::size_t bytes) {
    ++calls_;
    Link& link = of(socket);
    if (link.broken) return {IoResult::Kind::failed, 0, ECONNRESET};
    const std::size_t there = std::min(bytes, link.incoming.size());
    if (there > 0) {
      link.incoming.copy(into, there);
      link.incoming.erase(0, there);
      return {IoResult::Kind::ok, there, 0};
    }
    return {link.fin ? IoResult::Kind::eof : IoResult::Kind::again, 0, 0};
  }

  IoResult write(Socket socket, std::span<const iovec> parts) {
    ++calls_;
    Link& link = of(socket);
    if (link.broken || link.ended) return {IoResult::Kind::failed, 0, EPIPE};
    std::size_t bytes = 0;
    for (const iovec& part : parts) {
      const std::size_t taken = std::min(part.iov_len, link.room);
      link.outgoing.append(static_cast<const char*>(part.iov_base), taken);
      link.room -= taken;
      bytes += taken;
    }
    if (bytes == 0) return {IoResult::Kind::again, 0, 0};
    return {IoResult::Kind::ok, bytes, 0};
  }

  void shut_write(Socket socket) {
    ++calls_;
    of(socket).ended = true;
  }
  void close(Socket& socket) {
    ++calls_;
    if (socket.open()) {
      Link& link = of(socket);
      link.closed = link.ended = true;
      link.watched = false;
    }
    socket.id = 0;
  }
  void reset(Socket& socket) {
    if (socket.open()) of(socket).cut = true;
    close(socket);
  }

 private:
  Link& make(bool to_backend) {
    Link& link = links_.emplace_back();
    link.id = static_cast<std::uint32_t>(links_.size());
    link.to_backend = to_backend;
    return link;
  }
  Link& of(Socket socket) { return links_[socket.id - 1]; }

  std::deque<Link> links_;
  Ns now_ = nexus::kSecond;
  std::uint64_t calls_ = 0;
  bool woken_ = false;
};

}  // namespace hostile
