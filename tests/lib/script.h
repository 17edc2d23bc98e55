// script.h
// Owns:     the far ends of all connections on a simulated network without faults and delays, for a test to command.
// Promises: nothing happens except what the test does; every byte that Nexus wrote is kept; the same commands give the
//           same run.
// Leaves:   Nexus's loops to the caller, who gives them turns after each deliver().
// Threads:  one.
// Tested by: tests/prober_test.cpp, tests/hostile_requests_test.cpp
#pragma once

#include <deque>
#include <functional>
#include <string>
#include <string_view>

#include "tests/lib/sim_net.h"

namespace nexus::sim {

// The far end of one connection.
struct Peer {
  LinkId link = kNoLink;
  bool to_backend = false;
  bool reads = true;      // if not, Nexus can write only what the connection's window holds
  std::string received;   // all that Nexus wrote
  bool ended = false;     // Nexus's FIN or reset has arrived
  bool cut = false;       // it was a reset
  bool finished = false;  // this side has sent its FIN or its reset
};

constexpr const char* kSilentHost = "10.0.0.99";  // connections to it are neither accepted nor refused

class Script {
 public:
  Script() = default;
  Script(const Script&) = delete;
  Script& operator=(const Script&) = delete;

  ConnectFate::Kind fate = ConnectFate::Kind::accepted;      // of the next connections to backends
  std::function<ConnectFate::Kind(const Address&)> fate_of;  // if set, in place of `fate`
  Wire wire{1, [this](const Address& to) {
              const bool silent = to == *parse_address(kSilentHost, to.port);
              const ConnectFate::Kind kind = silent ? ConnectFate::Kind::ignored : fate_of ? fate_of(to) : fate;
              return ConnectFate{kind, static_cast<std::uint32_t>(to.port), shape()};
            }};
  std::deque<Peer> peers;                 // in the order in which their connections were made
  std::function<void(Peer&)> on_connect;  // Nexus connected to a backend

  Peer& connect_client() { return add(wire.client_connects(0, shape()), false); }
  // True once Nexus has closed its end.
  bool closed(const Peer& peer) { return !wire.at(peer.link).nexus_open && !wire.at(peer.link).in_backlog; }

  void send(Peer& peer, std::string_view bytes) {
    if (bytes.empty() || peer.finished || peer.ended) return;
    const std::size_t taken = wire.peer_send(peer.link, bytes);
    assert(taken == bytes.size());
  }
  void finish(Peer& peer) {
    if (!peer.finished) wire.peer_shut(peer.link);
    peer.finished = true;
  }
  void break_off(Peer& peer) {
    if (!peer.finished) wire.peer_reset(peer.link);
    peer.finished = true;
  }
  // From now on Nexus can write only so many bytes more.
  void stop_reading(Peer& peer, std::size_t window_bytes) {
    peer.reads = false;
    wire.at(peer.link).shape.window_bytes = window_bytes;
  }
  void read_on(Peer& peer) {
    peer.reads = true;
    wire.at(peer.link).shape.window_bytes = shape().window_bytes;
    wire.peer_take(peer.link, wire.at(peer.link).to_peer.unread());
  }

  // Everything that is in transit arrives.
  void deliver() {
    while (wire.next_at() <= wire.now()) handle(wire.step());
  }

 private:
  static Shape shape() {
    Shape shape;
    shape.latency_ns = 0;
    shape.window_bytes = 64u << 20;
    return shape;
  }

  Peer& add(LinkId link, bool to_backend) {
    if (by_link_.size() <= link) by_link_.resize(link + 1);
    Peer& peer = peers.emplace_back();
    peer.link = link;
    peer.to_backend = to_backend;
    return *(by_link_[link] = &peer);
  }

  void handle(const Notice& notice) {
    if (notice.kind == Notice::Kind::connected) {
      Peer& peer = add(notice.link, true);
      if (on_connect) on_connect(peer);
    }
    if (notice.kind == Notice::Kind::none) return;
    Peer& peer = *by_link_[notice.link];
    const Flow& flow = wire.at(notice.link).to_peer;
    peer.received += flow.view().substr(peer.received.size() - flow.read);
    if (peer.reads) wire.peer_take(notice.link, flow.unread());
    peer.ended = peer.ended || notice.kind == Notice::Kind::fin || notice.kind == Notice::Kind::reset;
    peer.cut = peer.cut || notice.kind == Notice::Kind::reset;
  }

  std::vector<Peer*> by_link_;
};

}  // namespace nexus::sim
