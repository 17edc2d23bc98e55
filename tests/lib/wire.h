// wire.h
// Owns:     the simulated network: its clock, the queue of events to come, and every connection with its bytes in
//           transit.
// Promises: TCP as Linux shows it: bytes arrive in order with a FIN behind them; a reset is
//           reported once and then reads as an end of file; bytes for a closed socket are answered with a reset.
//           Events happen in order of time.
// Leaves:   Nexus's socket calls to sim_net.h; what the peers do to sim/clients.h, sim/fleet.h and script.h.
// Threads:  one.
// Tested by: tests/sim/main.cpp
#pragma once

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tests/lib/link.h"
#include "tests/lib/tls_peer.h"

namespace nexus::sim {

class Wire {
 public:
  Wire(std::uint64_t seed, std::function<ConnectFate(const Address&)> on_connect)
      : dice_(seed), on_connect_(std::move(on_connect)) {}

  Ns now() const { return now_; }
  Ns next_at() const { return due_.empty() ? kNever : due_.front().at; }
  void advance(Ns to) {
    assert(to >= now_);
    now_ = to;
  }
  Dice& dice() { return dice_; }
  Weather weather;

  // A hash of everything that happened: two runs of a seed must have the same one.
  std::uint64_t trace() const { return trace_; }
  void note(std::uint64_t what, std::uint64_t a = 0, std::uint64_t b = 0) {
    trace_ = mix(trace_ ^ (what << 56) ^ (a << 24) ^ b) + static_cast<std::uint64_t>(now_);
  }

  // If set, receives the run in words.
  std::FILE* story = nullptr;
  void tell(const char* what, LinkId id, std::string_view bytes = {}) {
    if (story == nullptr) return;
    const Link& link = at(id);
    std::fprintf(story, "%10.3f ms  %-12s %s%u link %u  ", static_cast<double>(now_ - 1000 * kSecond) / 1e6, what,
                 link.to_backend ? "backend " : "client ", link.peer, id);
    for (const char c : bytes.substr(0, 600)) {
      if (c == '\r')
        std::fputs("\\r", story);
      else if (c == '\n')
        std::fputs("\\n", story);
      else
        std::fputc(c >= 0x20 && c < 0x7f ? c : '?', story);
    }
    std::fprintf(story, bytes.empty() ? "\n" : " [%zu]\n", bytes.size());
  }

  Link& at(LinkId id) { return *links_[id]; }
  // Without these, no lookup is taken.
  std::function<Looked(std::uint64_t id, const std::string& host, std::uint16_t port)> on_lookup;
  std::function<void(std::uint64_t id, const Looked& told)> on_looked_up;  // Nexus is about to be told
  std::size_t descriptors() const { return descriptors_; }
  std::size_t most_descriptors = SIZE_MAX;
  int connect_error = 0;    // if set, every connect() of Nexus fails with it
  std::uint64_t lacks = 0;  // connections to backends that failed for want of something on this host
  std::uint64_t turn = 0;   // the number of the present turn of a loop
  std::size_t links() const { return links_.size() - free_.size(); }
  std::size_t all_links() const { return links_.size(); }  // including closed ones

  // If set, connections of clients, or to backends, are TLS for Nexus.
  const TlsWorld* tls_clients = nullptr;
  const TlsWorld* tls_backends = nullptr;

  // ---- events ----

  void timer(Notice::Kind kind, std::uint32_t whom, Ns at, std::uint64_t value) {
    push({std::max(at, now_), 0, Due::Kind::timer, kind, whom, 0, value});
  }
  // A timer of a link's peer; it does not fire once the link is closed.
  void link_timer(Notice::Kind kind, LinkId link, Ns at, std::uint64_t value) {
    push({std::max(at, now_), 0, Due::Kind::link_timer, kind, link, links_[link]->generation, value});
  }

  // Makes the next event happen, which must be due. Returns what a peer has to know of it, or none.
  Notice step() {
    assert(!due_.empty() && due_.front().at <= now_);
    std::pop_heap(due_.begin(), due_.end(), Later());
    const Due due = due_.back();
    due_.pop_back();
    if (due.kind == Due::Kind::timer) return {due.notice, due.link, due.value};
    Link& link = *links_[due.link];
    if (!link.live || link.generation != due.generation) return {};
    return happen(due, link);
  }

  // ---- the peers' side ----

  LinkId client_connects(std::uint32_t client, const Shape& shape) {
    const LinkId id = make_link(shape);
    Link& link = at(id);
    link.peer = client;
    link.peer_open = true;
    link.connected = true;
    later(arrival(link.to_nexus, link), Due::Kind::backlog, id, link);
    return id;
  }

  // Sends as much as there is room for; returns how much.
  std::size_t peer_send(LinkId id, std::string_view bytes) {
    Link& link = at(id);
    assert(link.peer_open && !link.peer_shut);
    const std::size_t room = link.shape.window_bytes - std::min(link.shape.window_bytes, link.to_nexus.held());
    const std::size_t taken = std::min(room, bytes.size());
    if (taken < bytes.size()) link.peer_wants_room = true;
    if (taken > 0) put(id, link, link.to_nexus, bytes.substr(0, taken), Due::Kind::nexus_data);
    if (taken > 0) tell("peer sends", id, bytes.substr(0, taken));
    return taken;
  }
  // Sends bytes that no request asked for. They are in Nexus's socket at once, so that they come before all that Nexus
  // writes from now on. REQUIRES: nothing is in transit to Nexus.
  void peer_sends_unasked(LinkId id, std::string_view bytes) {
    Link& link = at(id);
    assert(link.peer_open && !link.peer_shut && link.to_nexus.arrived == link.to_nexus.written);
    link.to_nexus.bytes.append(bytes);
    link.to_nexus.arrived = link.to_nexus.written += bytes.size();
    link.unasked = true;
    tell("unasked", id, bytes);
    ready(id, link);
  }
  void peer_shut(LinkId id) {
    Link& link = at(id);
    if (!link.peer_open || link.peer_shut) return;
    link.peer_shut = true;
    tell("peer FIN", id);
    send_fin(id, link, link.to_nexus, Due::Kind::nexus_fin);
  }
  std::string_view peer_view(LinkId id) { return at(id).to_peer.view(); }
  void peer_take(LinkId id, std::size_t bytes) {
    Link& link = at(id);
    link.to_peer.take(bytes);
    if (!link.wants_room || bytes == 0) return;
    link.wants_room = false;
    later(now_ + link.shape.latency_ns, Due::Kind::edge, id, link);
  }
  // close(2): sends a FIN, or a reset if there are unread bytes.
  void peer_close(LinkId id) {
    Link& link = at(id);
    if (!link.peer_open) return;
    if (link.to_peer.unread() > 0) return peer_reset(id);
    peer_shut(id);
    link.peer_open = false;
    forget_if_over(id);
  }
  void peer_reset(LinkId id) {
    Link& link = at(id);
    if (!link.peer_open) return;
    link.peer_open = false;
    tell("peer RST", id);
    if (link.in_backlog || link.nexus_open) send_reset_to_nexus(id, link);
    forget_if_over(id);
  }

  // Removes this connection's delays and limits, and wakes a side that waits for room.
  void ease(LinkId id) {
    Link& link = at(id);
    link.shape = Shape{};
    link.shape.window_bytes = 64u << 20;
    later(now_, Due::Kind::edge, id, link);
    if (link.peer_wants_room) {
      later(now_, Due::Kind::peer_room, id, link);
      link.peer_wants_room = false;
    }
  }

  // ---- Nexus's side, for sim_net.h ----

  struct Listener {
    std::deque<LinkId> backlog;
    std::vector<std::pair<std::uint32_t, Handle>> watchers;  // loop, token
    bool open = true;
  };
  Listener listener;

  // Tells a loop to look at a link, or at the listener (kNoLink).
  std::function<void(std::uint32_t loop, LinkId link)> on_ready;
  // Called with a link on which a call of Nexus failed through no fault of the peer.
  std::function<void(LinkId link)> on_broken;
  // Called with a backend's link from which Nexus has read, and with one that it is about to close.
  std::function<void(LinkId link)> on_backend_read, on_backend_close;

  LinkId nexus_connects(const ConnectFate& fate) {
    const LinkId id = make_link(fate.shape);
    Link& link = at(id);
    link.to_backend = true;
    link.peer = fate.backend;
    link.made_at = now_;
    link.made_turn = turn;
    link.nexus_open = true;
    descriptors_ += 1;
    if (tls_backends != nullptr) link.tls = std::make_shared<TlsPeer>(*tls_backends, true);
    if (fate.kind == ConnectFate::Kind::ignored) return id;
    const auto kind = fate.kind == ConnectFate::Kind::accepted ? Due::Kind::connected : Due::Kind::refused;
    later(now_ + link.shape.latency_ns + jitter(link), kind, id, link);
    return id;
  }
  ConnectFate fate_of(const Address& address) { return on_connect_(address); }
  void accepted(LinkId id) {
    at(id).in_backlog = false;
    at(id).nexus_open = true;
    if (tls_clients != nullptr) at(id).tls = std::make_shared<TlsPeer>(*tls_clients, false);
    descriptors_ += 1;
  }

  void nexus_sends(LinkId id, std::string_view bytes) {
    Link& link = at(id);
    tell("nexus sends", id, bytes);
    put(id, link, link.to_peer, bytes, Due::Kind::peer_data);
  }
  void nexus_shuts(LinkId id) {
    Link& link = at(id);
    if (link.nexus_shut || link.reset_seen || !link.connected) return;
    link.nexus_shut = true;
    tell("nexus FIN", id);
    send_fin(id, link, link.to_peer, Due::Kind::peer_fin);
  }
  void nexus_took(LinkId id) {
    Link& link = at(id);
    if (!link.peer_wants_room || !link.peer_open) return;
    link.peer_wants_room = false;
    later(now_ + link.shape.latency_ns, Due::Kind::peer_room, id, link);
  }
  void nexus_closes(LinkId id, bool reset) {
    Link& link = at(id);
    assert(link.nexus_open);
    if (link.to_backend && on_backend_close) on_backend_close(id);
    tell(reset ? "nexus RST" : "nexus closes", id);
    if (link.connected && !link.reset_seen) {
      if (reset || link.to_nexus.unread() > 0) {
        later(reset_at(link.to_peer, link), Due::Kind::peer_reset, id, link);
      } else {
        nexus_shuts(id);
      }
    }
    link.nexus_open = false;
    link.loop = -1;
    descriptors_ -= 1;
    forget_if_over(id);
  }
  void edge_now(LinkId id) { later(now_, Due::Kind::edge, id, at(id)); }
  void edge_later(LinkId id) {
    Link& link = at(id);
    const Ns delay = dice_.span(1, std::max<Ns>(1, weather.edge_delay_ns));
    link.edge_due = now_ + delay;
    later(link.edge_due, Due::Kind::edge, id, link);
  }

  // The write in which Nexus wrote the byte at `position` of this flow.
  static Flow::Mark written(const Flow& flow, std::uint64_t position) {
    Flow::Mark found;
    for (const Flow::Mark& mark : flow.marks) {
      if (mark.from > position) break;
      found = mark;
    }
    return found;
  }
  static Ns written_at(const Flow& flow, std::uint64_t position) { return written(flow, position).at; }

 private:
  struct Due {
    enum class Kind : std::uint8_t {
      timer,
      link_timer,
      backlog,
      connected,
      refused,
      nexus_data,
      nexus_fin,
      nexus_reset,
      peer_data,
      peer_fin,
      peer_reset,
      peer_room,
      edge,
    };
    Ns at;
    std::uint64_t order;
    Kind kind;
    Notice::Kind notice;
    std::uint32_t link;
    std::uint32_t generation;
    std::uint64_t value;
  };
  struct Later {
    bool operator()(const Due& a, const Due& b) const { return a.at != b.at ? a.at > b.at : a.order > b.order; }
  };

  void push(Due due) {
    due.order = ++pushed_;
    due_.push_back(due);
    std::push_heap(due_.begin(), due_.end(), Later());
  }

  // Something happens to a link at `at`, unless it is closed before.
  void later(Ns at, Due::Kind kind, LinkId id, const Link& link, std::uint64_t value = 0) {
    push({at, 0, kind, Notice::Kind::none, id, link.generation, value});
  }

  LinkId make_link(const Shape& shape) {
    LinkId id;
    if (free_.empty()) {
      id = static_cast<LinkId>(links_.size());
      links_.push_back(std::make_unique<Link>());
    } else {
      id = free_.back();
      free_.pop_back();
    }
    const std::uint32_t generation = links_[id]->generation;
    *links_[id] = Link{};
    links_[id]->generation = generation;
    links_[id]->live = true;
    links_[id]->shape = shape;
    return id;
  }

  void forget_if_over(LinkId id) {
    Link& link = at(id);
    if (link.nexus_open || link.peer_open || link.in_backlog) return;
    link.live = false;
    link.generation += 1;
    free_.push_back(id);
  }

  Ns jitter(const Link& link) { return link.shape.jitter_ns == 0 ? 0 : dice_.span(0, link.shape.jitter_ns); }
  Ns arrival(Flow& flow, const Link& link) {
    flow.last_at = std::max(flow.last_at, now_ + link.shape.latency_ns + jitter(link));
    return flow.last_at;
  }

  // Sends bytes in one piece or in several; a piece may be one byte.
  void put(LinkId id, Link& link, Flow& flow, std::string_view bytes, Due::Kind kind) {
    if (kind == Due::Kind::peer_data) flow.marks.push_back({flow.written, now_, turn});
    flow.bytes.append(bytes);
    std::uint64_t at = flow.written;
    flow.written += bytes.size();
    if (!dice_.chance(link.shape.split)) return push_piece(id, link, flow, flow.written, kind, false);
    for (std::uint32_t pieces = dice_.number(1, link.shape.most_pieces); pieces > 1 && at < flow.written; --pieces) {
      const auto left = static_cast<std::uint32_t>(std::min<std::uint64_t>(flow.written - at, 1u << 20));
      at += dice_.skewed(1, left);
      push_piece(id, link, flow, at, kind, true);
    }
    if (at < flow.written) push_piece(id, link, flow, flow.written, kind, true);
  }
  void push_piece(LinkId id, Link& link, Flow& flow, std::uint64_t up_to, Due::Kind kind, bool apart) {
    if (apart && link.shape.gap_ns > 0) flow.last_at += dice_.span(0, link.shape.gap_ns);
    later(arrival(flow, link), kind, id, link, up_to);
  }
  void send_fin(LinkId id, Link& link, Flow& flow, Due::Kind kind) {
    flow.fin_sent = true;
    later(arrival(flow, link), kind, id, link);
  }
  // A reset may overtake the bytes in transit, which are then lost.
  Ns reset_at(Flow& flow, Link& link) {
    return dice_.chance(weather.reset_overtakes) ? now_ + link.shape.latency_ns : arrival(flow, link);
  }
  void send_reset_to_nexus(LinkId id, Link& link) {
    later(reset_at(link.to_nexus, link), Due::Kind::nexus_reset, id, link);
  }

  void ready(LinkId id, Link& link) {
    if (!link.nexus_open || link.loop < 0 || link.queued) return;
    link.queued = true;
    on_ready(static_cast<std::uint32_t>(link.loop), id);
  }

  Notice happen(const Due& due, Link& link) {
    const LinkId id = due.link;
    switch (due.kind) {
      case Due::Kind::timer: break;
      case Due::Kind::link_timer: return {due.notice, id, due.value};
      case Due::Kind::backlog:
        if (!listener.open) {
          if (link.peer_open) return {Notice::Kind::reset, id, 0};
          return {};
        }
        link.in_backlog = true;
        listener.backlog.push_back(id);
        wake_listener();
        break;
      case Due::Kind::connected:
        if (!link.nexus_open) break;
        link.connected = link.peer_open = true;
        ready(id, link);
        return {Notice::Kind::connected, id, 0};
      case Due::Kind::refused:
        link.refused = true;
        link.error = ECONNREFUSED;
        ready(id, link);
        break;
      case Due::Kind::nexus_data:
        if (link.reset_seen) break;
        if (!link.nexus_open && !link.in_backlog) return refuse_bytes(id, link);
        link.to_nexus.arrived = std::max(link.to_nexus.arrived, due.value);
        ready(id, link);
        break;
      case Due::Kind::nexus_fin:
        if (link.reset_seen) break;
        link.to_nexus.fin_arrived = true;
        ready(id, link);
        break;
      case Due::Kind::nexus_reset:
        link.reset_seen = true;
        link.error = link.to_nexus.fin_arrived ? EPIPE : ECONNRESET;
        ready(id, link);
        break;
      case Due::Kind::peer_data:
        if (!link.peer_open) {
          if (link.nexus_open && !link.reset_seen) send_reset_to_nexus(id, link);
          break;
        }
        link.to_peer.arrived = std::max(link.to_peer.arrived, due.value);
        return {Notice::Kind::data, id, 0};
      case Due::Kind::peer_fin:
        link.to_peer.fin_arrived = true;
        if (link.peer_open) return {Notice::Kind::fin, id, 0};
        break;
      case Due::Kind::peer_reset:
        if (link.peer_open) return {Notice::Kind::reset, id, 0};
        break;
      case Due::Kind::peer_room:
        if (link.peer_open && !link.peer_shut) return {Notice::Kind::room, id, 0};
        break;
      case Due::Kind::edge: ready(id, link); break;
    }
    return {};
  }

  // Bytes for a socket that Nexus closed are answered with a reset.
  Notice refuse_bytes(LinkId id, Link& link) {
    if (link.peer_open) {
      later(now_ + link.shape.latency_ns, Due::Kind::peer_reset, id, link);
    }
    return {};
  }

 public:
  // Wakes one of the loops that watch the listener, as EPOLLEXCLUSIVE does.
  void wake_listener() {
    if (listener.backlog.empty() || listener.watchers.empty()) return;
    on_ready(listener.watchers[dice_.index(listener.watchers.size())].first, kNoLink);
  }

  // Closes the listening socket. Returns the connections in its backlog, whose clients get a reset.
  std::vector<LinkId> close_listener() {
    listener.open = false;
    std::vector<LinkId> waiting(listener.backlog.begin(), listener.backlog.end());
    listener.backlog.clear();
    for (const LinkId id : waiting) {
      at(id).in_backlog = false;
      forget_if_over(id);
    }
    return waiting;
  }

 private:
  Dice dice_;
  std::function<ConnectFate(const Address&)> on_connect_;
  Ns now_ = 1000 * kSecond;
  std::vector<Due> due_;
  std::uint64_t pushed_ = 0;
  std::vector<std::unique_ptr<Link>> links_;
  std::vector<LinkId> free_;
  std::size_t descriptors_ = 0;
  std::uint64_t trace_ = 0;
};

}  // namespace nexus::sim
