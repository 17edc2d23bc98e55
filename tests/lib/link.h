// link.h
// Owns:     the values that describe the simulated network: a connection with its two byte flows, the network's faults,
//           and the events that its peers are told of.
// Promises: plain values.
// Leaves:   what happens to them to wire.h.
// Threads:  one.
// Tested by: tests/sim/main.cpp
#pragma once

#include <cassert>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/net/epoll.h"
#include "tests/lib/dice.h"

namespace nexus::sim {

class TlsPeer;  // tls_peer.h

using LinkId = std::uint32_t;
constexpr LinkId kNoLink = UINT32_MAX;

// The network's faults. All zero: none.
struct Weather {
  Rate eagain_read, eagain_write;  // although there are bytes, or room
  Rate short_read, short_write;
  Rate accept_fails, connect_fails, watch_fails;
  Rate spurious_event;
  Rate reset_overtakes;  // a reset discards the bytes in transit
  Ns edge_delay_ns = kMillisecond;
};

// The properties of one connection.
struct Shape {
  Ns latency_ns = 50 * kMicrosecond;
  Ns jitter_ns = 0;
  Rate split;  // how often a write arrives in several pieces
  std::uint32_t most_pieces = 1;
  Ns gap_ns = 0;  // at most this much between pieces
  std::size_t window_bytes = 256u << 10;
};

// One direction of a connection. Positions count bytes from the beginning of the connection.
struct Flow {
  std::string bytes;  // [start, written)
  std::uint64_t start = 0;
  std::uint64_t read = 0;
  std::uint64_t arrived = 0;
  std::uint64_t written = 0;
  bool fin_sent = false;
  bool fin_arrived = false;
  Ns last_at = 0;  // arrival of the last piece
  // Of each write: first position, time, and the turn in which Nexus made it.
  struct Mark {
    std::uint64_t from = 0;
    Ns at = 0;
    std::uint64_t turn = 0;
  };
  std::deque<Mark> marks;

  std::size_t unread() const { return static_cast<std::size_t>(arrived - read); }
  std::size_t held() const { return static_cast<std::size_t>(written - read); }
  std::string_view view() const { return std::string_view(bytes).substr(read - start, unread()); }
  void take(std::size_t count) {
    assert(count <= unread());
    read += count;
    if (read == written) {
      bytes.clear();
      start = read;
    } else if (read - start > 64u << 10) {
      bytes.erase(0, read - start);
      start = read;
    }
    while (marks.size() > 1 && marks[1].from <= read) marks.pop_front();
  }
};

struct Link {
  std::uint32_t generation = 0;
  bool live = false;
  bool to_backend = false;  // else from a client
  std::uint32_t peer = 0;   // number of the client or backend
  Ns made_at = 0;           // when it was begun
  std::uint64_t made_turn = 0;
  Shape shape;
  Flow to_nexus, to_peer;
  // Nexus's end.
  bool in_backlog = false;
  bool nexus_open = false;
  bool nexus_shut = false;
  bool connected = false;
  bool refused = false;
  bool reset_seen = false;  // a reset arrived at Nexus
  bool unasked = false;     // bytes that no request asked for have arrived at Nexus
  bool broken = false;      // a call on it was made to fail, as if the peer had ended it
  int error = 0;            // reported once, by the next call
  std::int32_t loop = -1;   // the loop that watches it
  Handle token;
  bool queued = false;           // an event is queued
  std::shared_ptr<TlsPeer> tls;  // null: in clear
  bool wants_room = false;
  Ns read_at = 0;         // when Nexus last got a byte
  Ns edge_due = 0;        // until then an EAGAIN has hidden bytes that are there
  Ns blocked_since = -1;  // start of the time in which Nexus wanted to write and could not; -1: it can
  // The peer's end.
  bool peer_open = false;
  bool peer_shut = false;
  bool peer_wants_room = false;
};

// An event for the peers.
struct Notice {
  enum class Kind : std::uint8_t {
    none,
    connected,  // Nexus connected to a backend
    data,
    fin,
    reset,
    room,
    client_timer,
    backend_timer,
    script,
  };
  Kind kind = Kind::none;
  LinkId link = kNoLink;  // of a timer: the number of the client or of the script's step
  std::uint64_t value = 0;
};

// The outcome of one lookup by Nexus.
struct Looked {
  static constexpr Ns kNotTaken = -1;  // the resolver has too many others
  Ns after = 0;
  std::vector<Address> addresses;
  std::string error;
};
constexpr Ns kLookupLimit = 10 * kSecond;  // as ResolverOptions has it

// The outcome of one connect() by Nexus.
struct ConnectFate {
  enum class Kind : std::uint8_t { accepted, refused, refused_at_once, ignored };
  Kind kind = Kind::accepted;
  std::uint32_t backend = 0;
  Shape shape;
};

}  // namespace nexus::sim
