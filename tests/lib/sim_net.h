// sim_net.h
// Owns:     the socket calls of one of Nexus's loops on the simulated network: the tests' only implementation of the
//           interface of nexus/net/epoll.h besides EpollNet itself.
// Promises: edges as in epoll(7): an event is queued when something new happens and reports the state at the time it is
//           fetched; after a short read or write, or EAGAIN, another edge follows; using a closed descriptor aborts.
// Leaves:   the bytes in transit to wire.h; when a loop takes its turn to sim/simulation.h and script.h.
// Threads:  one.
// Tested by: tests/sim/main.cpp
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <cassert>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "tests/lib/faults.h"
#include "tests/lib/wire.h"

namespace nexus::sim {

// A defect that a run has on purpose, to prove that the checks notice it.
enum class Canary : std::uint8_t {
  none,
  flip_a_byte,  // sent to a client
  drop_a_byte,
  repeat_a_write,     // to a client
  fin_for_reset,      // makes a truncated body that ends with the connection look complete
  keep_a_descriptor,  // a close() that does nothing
  resend_to_backend,  // a request is sent twice
  forget_an_edge,
  stale_fleet,            // a worker goes back to its first snapshot
  lack_as_refusal,        // a lack of this host looks to a worker as if the backend had refused
  check_lack_as_refusal,  // to a health check
  refusal_as_lack,
  deaf_to_backends,  // bytes of a backend are there, and no event says so
  flattered_status,  // a 500 is read as 200
  eject_the_innocent,
  blind_to_ejection,  // the workers do not see that a backend is ejected
  no_retries,         // whatever the configuration says
  twin_backends,      // a worker takes each backend for two
  raised_caps,
  late_grant,  // a queued request hears of its place after the next one
  keep_a_place,
  blind_to_unasked,     // bytes that no request asked for are not seen on an idle connection
  cached_names,         // a lookup is answered with what the first one said
  shared_lookup_fault,  // a lookup that fails takes all others with it
  lost_lookup,          // one is never answered
  count,
};

class SimNet {
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

  // Looks names up at Wire::on_lookup. As nexus::Resolver: each lookup is answered once, by step().
  class Resolver {
   public:
    using Answer =
        std::function<void(std::uint64_t id, const std::vector<Address>& addresses, const std::string& error)>;

    Resolver(SimNet& net, Answer answer) : wire_(net.wire_), canary_(net.canary_), answer_(std::move(answer)) {}

    bool lookup(const std::string& host, std::uint16_t port, std::uint64_t id) {
      const Runs simulation(false);
      if (!wire_.on_lookup) return false;
      Looked looked = wire_.on_lookup(id, host, port);
      if (looked.after == Looked::kNotTaken) wire_.on_looked_up(id, {});
      if (looked.after == Looked::kNotTaken) return false;
      if (canary_ == Canary::lost_lookup && wire_.dice().one_in(8)) return true;
      const Ns at = wire_.now() + looked.after;
      flights_.push_back({id, at, std::move(looked)});
      return true;
    }
    Ns next() const {
      Ns soonest = kNever;
      for (const Flight& flight : flights_) soonest = std::min(soonest, flight.at);
      return soonest;
    }
    void on_event(const Event&) {}
    void step() {
      const auto due = [this](const Flight& flight) { return flight.at <= wire_.now(); };
      for (auto at = flights_.begin(); (at = std::find_if(at, flights_.end(), due)) != flights_.end();) {
        std::vector<Flight> arrived;
        {
          const Runs simulation(false);
          arrived.push_back(std::move(*at));
          at = flights_.erase(at);
          wire_.on_looked_up(arrived[0].id, arrived[0].looked);
          misbehave(arrived);
        }
        for (const Flight& flight : arrived) answer_(flight.id, flight.looked.addresses, flight.looked.error);
        const Runs simulation(false);
        arrived = {};
      }
    }

   private:
    struct Flight {
      std::uint64_t id;
      Ns at;
      Looked looked;
    };

    void misbehave(std::vector<Flight>& arrived) {
      const Looked& looked = arrived[0].looked;
      if (canary_ == Canary::cached_names && !looked.addresses.empty()) {
        arrived[0].looked.addresses = cache_.try_emplace(arrived[0].id, looked.addresses).first->second;
      }
      if (canary_ == Canary::shared_lookup_fault && looked.addresses.empty()) {
        for (const Flight& flight : flights_) arrived.push_back({flight.id, 0, {0, {}, looked.error}});
      }
    }

    Wire& wire_;
    const Canary canary_;
    const Answer answer_;
    std::vector<Flight> flights_;
    std::map<std::uint64_t, std::vector<Address>> cache_;  // of a canary
  };

  static constexpr std::size_t kMaxEvents = 256;
  static constexpr std::size_t kEndRecordBytes = 31;  // at most, of close_notify
  static constexpr int kListenerFd = 0;

  SimNet(Wire& wire, std::uint32_t loop, Canary canary = Canary::none) : wire_(wire), loop_(loop), canary_(canary) {}
  SimNet(const SimNet&) = delete;
  SimNet& operator=(const SimNet&) = delete;

  Ns now() const { return wire_.now(); }
  Ns wall_now() const { return wire_.now(); }

  // Never blocks: the scheduler checks waiting() and the deadline first.
  std::size_t wait(std::span<Event> out, Ns deadline, bool& woken) {
    const Runs simulation(false);
    wait_until_ = deadline;
    slept_ = !woken_ && deadline > wire_.now();
    woken = woken || std::exchange(woken_, false);
    std::size_t filled = 0;
    if (std::exchange(listener_ready_, false) || watches_listener()) filled = listener_event(out);
    std::size_t taken = 0;
    for (; taken < ready_.size() && filled < out.size(); ++taken) {
      const LinkId id = ready_[taken];
      Link& link = wire_.at(id);
      link.queued = false;
      if (link.loop != static_cast<std::int32_t>(loop_)) continue;
      filled += event_of(id, link, out[filled]) ? 1 : 0;
    }
    ready_.erase(ready_.begin(), ready_.begin() + static_cast<std::ptrdiff_t>(taken));
    slept_ = slept_ && filled == 0;
    return filled;
  }

  void wake() { woken_ = true; }

  static Socket listening_socket() { return Socket{kListenerFd}; }
  bool watch_listener(Socket socket, Handle token) {
    const Runs simulation(false);
    if (call_fails(Call::watch_listener) != 0) return false;
    assert(socket.fd == kListenerFd);
    if (fails(wire_.weather.watch_fails)) return false;
    wire_.listener.watchers.emplace_back(loop_, token);
    wire_.wake_listener();
    return true;
  }

  // Only for the listener: Nexus calls it for nothing else.
  void unwatch(Socket socket) {
    const Runs simulation(false);
    assert(socket.fd == kListenerFd);
    std::erase_if(wire_.listener.watchers, [this](const auto& watcher) { return watcher.first == loop_; });
  }

  Opened accept(Socket) {
    const Runs simulation(false);
    Opened opened;
    if (const int error = call_fails(Call::accept)) return fail(opened, error, outcome_of(error));
    if (wire_.listener.backlog.empty()) return fail(opened, EAGAIN, SocketOutcome::again);
    if (out_of_descriptors() || fails(wire_.weather.accept_fails)) return fail_somehow(opened);
    const LinkId id = wire_.listener.backlog.front();
    wire_.listener.backlog.pop_front();
    wire_.accepted(id);
    opened.outcome = SocketOutcome::ok;
    opened.socket = socket_of(id);
    opened.peer.ip = {192, 0, 2, static_cast<std::uint8_t>(wire_.at(id).peer)};
    opened.peer.port = static_cast<std::uint16_t>(1024 + id);
    wire_.note(1, id, loop_);
    wire_.tell("accepted", id);
    return opened;
  }

  Opened connect(const Address& address) {
    const Runs simulation(false);
    Opened opened;
    if (const int error = call_fails(Call::connect)) return lack(opened, error);
    if (wire_.connect_error != 0) return lack(opened, wire_.connect_error);
    if (out_of_descriptors() || fails(wire_.weather.connect_fails)) {
      fail_somehow(opened);
      return lack(opened, opened.error);
    }
    const ConnectFate fate = wire_.fate_of(address);
    if (fate.kind == ConnectFate::Kind::refused_at_once) {
      if (canary_ == Canary::refusal_as_lack) return fail(opened, EMFILE, SocketOutcome::no_descriptor);
      return fail(opened, ECONNREFUSED, SocketOutcome::failed);
    }
    const LinkId id = wire_.nexus_connects(fate);
    opened.outcome = SocketOutcome::ok;
    opened.socket = socket_of(id);
    opened.peer = address;
    wire_.note(2, id, loop_);
    wire_.tell("connecting", id);
    return opened;
  }

  int connect_error(Socket socket) {
    const Runs simulation(false);
    Link& link = link_of(socket);
    if (const int error = call_fails(Call::connect_error)) {
      link.broken = true;
      return error;
    }
    return std::exchange(link.error, 0);
  }

  bool watch(Socket socket, Handle token) {
    const Runs simulation(false);
    Link& link = link_of(socket);
    if (call_fails(Call::watch) != 0 || fails(wire_.weather.watch_fails)) {
      wire_.lacks += link.to_backend ? 1 : 0;
      return false;
    }
    link.loop = static_cast<std::int32_t>(loop_);
    link.token = token;
    if (readable(link) || writable(link) || hung_up(link)) queue(id_of(socket), link);
    return true;
  }

  IoResult read(Socket socket, char* into, std::size_t bytes) {
    const Runs simulation(false);
    return link_of(socket).tls == nullptr ? read_plain(socket, into, bytes) : read_records(socket, into, bytes);
  }

  // Plain bytes come out of the link, and go to Nexus in records.
  IoResult read_records(Socket socket, char* into, std::size_t bytes) {
    Link& link = link_of(socket);
    TlsPeer& peer = *link.tls;
    if (peer.waiting() == 0) {
      // Before the handshake is over, the peer has sent nothing: its bytes wait in the link. Its end does not.
      char plain[16384];
      const bool early = !peer.established() && link.to_nexus.unread() > 0;
      const IoResult result = early ? IoResult{IoResult::Kind::again, 0, 0} : read_plain(socket, plain, sizeof plain);
      if (result.ok()) peer.say({plain, result.bytes});
      if (result.kind == IoResult::Kind::eof) peer.say_end();
      if (peer.waiting() == 0) return result;
    }
    const std::size_t count = peer.give(into, bytes);
    if (count < bytes && (peer.waiting() > 0 || readable(link))) wire_.edge_now(id_of(socket));
    return {IoResult::Kind::ok, count, 0};
  }

  IoResult read_plain(Socket socket, char* into, std::size_t bytes) {
    Link& link = link_of(socket);
    const LinkId id = id_of(socket);
    if (const int error = call_fails(Call::read)) return break_link(id, error);
    const std::size_t there = link.to_nexus.unread();
    if (there == 0) return read_nothing(link);
    if (canary_ == Canary::deaf_to_backends && link.to_backend && wire_.dice().one_in(16)) {
      return {IoResult::Kind::again, 0, 0};
    }
    if (canary_ == Canary::blind_to_unasked && link.unasked && bytes == 1) return {IoResult::Kind::again, 0, 0};
    const Weather& weather = wire_.weather;
    // Behind a FIN or a reset nothing is in transit any more, so EAGAIN would never be followed by an edge. Unasked
    // bytes are there when Nexus looks for them.
    const bool plain = link.to_nexus.fin_arrived || link.reset_seen || link.unasked;
    if (!plain && wire_.dice().chance(weather.eagain_read)) {
      wire_.edge_later(id);
      return {IoResult::Kind::again, 0, 0};
    }
    std::size_t count = std::min(there, bytes);
    if (!plain && count > 1 && wire_.dice().chance(weather.short_read)) {
      count = wire_.dice().skewed(1, static_cast<std::uint32_t>(count - 1));
    }
    // A short read tells Nexus that the socket is empty (epoll(7)): announce the bytes that were kept back as new.
    if (count < bytes && count < there) wire_.edge_later(id);
    link.to_nexus.view().copy(into, count);
    if (canary_ == Canary::flattered_status) flatter(link, std::span(into, count));
    link.to_nexus.take(count);
    link.read_at = wire_.now();
    if (link.to_backend && wire_.on_backend_read) wire_.on_backend_read(id);
    wire_.nexus_took(id);
    wire_.note(3, id, count);
    wire_.tell("nexus read", id, std::string_view(into, count));
    return {IoResult::Kind::ok, count, 0};
  }

  IoResult write(Socket socket, std::span<const iovec> parts) {
    const Runs simulation(false);
    Link& link = link_of(socket);
    const LinkId id = id_of(socket);
    if (const int error = call_fails(Call::write)) return break_link(id, error);
    if (link.error != 0) return {IoResult::Kind::failed, 0, std::exchange(link.error, 0)};
    if (link.reset_seen || link.nexus_shut) return {IoResult::Kind::failed, 0, EPIPE};
    if (!link.connected) return {IoResult::Kind::again, 0, 0};
    std::size_t total = 0;
    for (const iovec& part : parts) total += part.iov_len;
    const std::size_t count = writable_bytes(id, link, total);
    if (count < total) {
      link.wants_room = true;
      // Not for the end that TLS tells: it is waited for as long as for the client's own.
      const bool only_end = link.tls != nullptr && total <= kEndRecordBytes;
      if ((link.blocked_since < 0 || count > 0) && !only_end) link.blocked_since = wire_.now();
      if (room_of(link) > count) wire_.edge_later(id);
    } else {
      link.blocked_since = -1;
    }
    if (count == 0) return {IoResult::Kind::again, 0, 0};
    text_.clear();
    for (const iovec& part : parts) {
      text_.append(static_cast<const char*>(part.iov_base), std::min(part.iov_len, count - text_.size()));
    }
    if (link.tls != nullptr) {
      text_ = link.tls->take(text_);
      // Records without plain bytes take no room: what the peer has to say, or to take, comes at once.
      if (link.tls->waiting() > 0 || count < total) wire_.edge_now(id);
    }
    send(id, link);
    wire_.note(4, id, digest(text_));
    return {IoResult::Kind::ok, count, 0};
  }

  void shut_write(Socket socket) {
    const Runs simulation(false);
    wire_.nexus_shuts(id_of(socket));
    wire_.note(5, id_of(socket));
  }
  void close(Socket& socket) { close(socket, false); }
  void reset(Socket& socket) { close(socket, canary_ != Canary::fin_for_reset); }

  // ---- the scheduler's side ----

  void make_ready(LinkId id) {
    if (id == kNoLink) {
      listener_ready_ = true;
    } else if (canary_ == Canary::forget_an_edge && wire_.at(id).connected && wire_.dice().one_in(64)) {
      wire_.at(id).queued = false;
    } else {
      ready_.push_back(id);
    }
  }
  // Queues an event without news.
  void spurious(LinkId id) {
    Link& link = wire_.at(id);
    if (link.live && link.nexus_open && link.loop == static_cast<std::int32_t>(loop_)) queue(id, link);
  }
  bool waiting() const { return woken_ || listener_ready_ || !ready_.empty(); }
  Ns wait_until() const { return wait_until_; }
  bool slept() const { return slept_; }  // the last wait() found nothing to do

 private:
  // A descriptor holds the number of its link and the link's generation.
  static constexpr int kLinkBits = 16;
  static constexpr std::uint32_t kLifeMask = 0x3fff;
  Socket socket_of(LinkId id) const {
    assert(id + 1 < (1u << kLinkBits));
    return Socket{static_cast<int>((wire_.at(id).generation & kLifeMask) << kLinkBits | (id + 1))};
  }
  static LinkId id_of(Socket socket) { return static_cast<LinkId>(socket.fd & ((1 << kLinkBits) - 1)) - 1; }
  Link& link_of(Socket socket) {
    assert(socket.fd > 0);
    Link& link = wire_.at(id_of(socket));
    assert(link.live && link.nexus_open);  // else EBADF, or the descriptor of another connection
    assert((link.generation & kLifeMask) == static_cast<std::uint32_t>(socket.fd >> kLinkBits));
    return link;
  }

  bool fails(Rate rate) { return wire_.dice().chance(rate); }
  bool out_of_descriptors() const { return wire_.descriptors() >= wire_.most_descriptors; }
  // Fails the call. The connection is unusable from now on, but its peer does not know.
  IoResult break_link(LinkId id, int error) {
    wire_.at(id).broken = true;
    if (wire_.on_broken) wire_.on_broken(id);
    return {IoResult::Kind::failed, 0, error};
  }
  static Opened& fail(Opened& opened, int error, SocketOutcome outcome) {
    opened.error = error;
    opened.outcome = outcome;
    return opened;
  }
  // This host lacks what a connection to a backend needs.
  Opened& lack(Opened& opened, int error) {
    wire_.lacks += 1;
    if (canary_ == Canary::lack_as_refusal) return fail(opened, ECONNREFUSED, SocketOutcome::failed);
    return fail(opened, error, outcome_of(error));
  }
  static void flatter(const Link& link, std::span<char> bytes) {
    constexpr std::string_view kBad = "HTTP/1.1 500";
    const bool bad = link.to_backend && std::string_view(bytes.data(), bytes.size()).starts_with(kBad);
    if (bad) bytes[kBad.size() - 3] = '2';
  }
  Opened& fail_somehow(Opened& opened) {
    if (out_of_descriptors() || wire_.dice().one_in(2)) return fail(opened, EMFILE, SocketOutcome::no_descriptor);
    return fail(opened, ENOMEM, SocketOutcome::no_memory);
  }

  bool watches_listener() const {
    if (wire_.listener.backlog.empty()) return false;
    for (const auto& [loop, token] : wire_.listener.watchers) {
      if (loop == loop_) return true;
    }
    return false;
  }
  std::size_t listener_event(std::span<Event> out) {
    if (wire_.listener.backlog.empty()) return 0;
    for (const auto& [loop, token] : wire_.listener.watchers) {
      if (loop != loop_) continue;
      out[0] = Event{token, true, false, false};
      return 1;
    }
    wire_.wake_listener();  // another loop has to handle it
    return 0;
  }

  static bool broken(const Link& link) { return link.refused || link.reset_seen; }
  static bool readable(const Link& link) {
    const bool records = link.tls != nullptr && link.tls->waiting() > 0;
    return records || link.to_nexus.unread() > 0 || link.to_nexus.fin_arrived || broken(link);
  }
  static bool writable(const Link& link) {
    return broken(link) || (link.connected && !link.nexus_shut && room_of(link) > 0);
  }
  static bool hung_up(const Link& link) { return link.to_nexus.fin_arrived || broken(link); }
  static std::size_t room_of(const Link& link) {
    return link.shape.window_bytes - std::min(link.shape.window_bytes, link.to_peer.held());
  }

  void queue(LinkId id, Link& link) {
    if (link.queued) return;
    link.queued = true;
    ready_.push_back(id);
  }

  bool event_of(LinkId id, const Link& link, Event& event) {
    event = Event{link.token, readable(link), writable(link), hung_up(link)};
    if (!event.readable && !event.writable && !event.hangup) return false;
    if (canary_ == Canary::blind_to_unasked && link.unasked) return false;
    wire_.tell(event.hangup ? "event (hup)" : event.readable ? "event (in)" : "event (out)", id);
    wire_.note(6, id, (event.readable ? 1u : 0u) | (event.writable ? 2u : 0u) | (event.hangup ? 4u : 0u));
    return true;
  }

  // Linux reports a reset once; after that reads return the end of file.
  static IoResult read_nothing(Link& link) {
    if (link.error != 0) return {IoResult::Kind::failed, 0, std::exchange(link.error, 0)};
    if (link.to_nexus.fin_arrived || link.reset_seen || link.refused) return {IoResult::Kind::eof, 0, 0};
    return {IoResult::Kind::again, 0, 0};
  }

  std::size_t writable_bytes(LinkId, const Link& link, std::size_t total) {
    const std::size_t count = std::min(total, room_of(link));
    if (count == 0) return count;
    if (wire_.dice().chance(wire_.weather.eagain_write)) return 0;
    if (count > 1 && wire_.dice().chance(wire_.weather.short_write)) {
      return wire_.dice().skewed(1, static_cast<std::uint32_t>(std::min<std::size_t>(count - 1, 1u << 20)));
    }
    return count;
  }

  void send(LinkId id, const Link& link) {
    const bool to_client = !link.to_backend;
    const bool now_and_then = canary_ != Canary::none && wire_.dice().one_in(64);
    if (now_and_then && to_client && canary_ == Canary::flip_a_byte) text_[wire_.dice().index(text_.size())] ^= 1;
    if (now_and_then && to_client && canary_ == Canary::drop_a_byte) text_.erase(wire_.dice().index(text_.size()), 1);
    if (!text_.empty()) wire_.nexus_sends(id, text_);
    const bool again = (to_client && canary_ == Canary::repeat_a_write) || canary_ == Canary::resend_to_backend;
    if (now_and_then && again && to_client != (canary_ == Canary::resend_to_backend)) wire_.nexus_sends(id, text_);
  }

  void close(Socket& socket, bool reset) {
    const Runs simulation(false);
    if (!socket.open()) return;
    link_of(socket);
    const LinkId id = id_of(socket);
    wire_.note(7, id, reset ? 1 : 0);
    const bool keep = canary_ == Canary::keep_a_descriptor && wire_.dice().one_in(64);
    if (!keep) wire_.nexus_closes(id, reset);
    socket.fd = -1;
  }

  Wire& wire_;
  std::uint32_t loop_;
  Canary canary_;
  std::vector<LinkId> ready_;
  bool woken_ = false;
  bool slept_ = false;
  bool listener_ready_ = false;
  Ns wait_until_ = 0;
  std::string text_;  // bytes being sent
};

}  // namespace nexus::sim
