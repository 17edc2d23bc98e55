// resolver.h
// Owns:     DNS lookups by c-ares, on the loop of the thread that asks. (A static binary cannot use getaddrinfo().)
// Promises: each lookup is answered once, within limit_ns of its start, unless the resolver is destroyed before, and
//           no other lookup delays or spoils it; IPv4 and IPv6 addresses are asked for apart, and one kind is enough;
//           /etc/hosts comes before DNS, and localhost needs neither; both system files are read anew for each lookup;
//           the order of an answer does not depend on the order of the server's records.
// Leaves:   numeric addresses and the retry schedule to the caller, caching to the DNS server.
// Threads:  the loop's own thread. No call blocks, except turn().
// Tested by: tests/resolver_test.cpp
#pragma once

#include <ares.h>
#include <netdb.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <list>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/net/epoll.h"

namespace nexus {

constexpr std::uint8_t kResolverKind = 12;  // kind of a Handle: a socket of c-ares; its slot is the descriptor

struct ResolverOptions {
  Ns limit_ns = 10 * kSecond;  // per lookup, retries included
  std::string servers;         // "127.0.0.1:53, …" instead of those in /etc/resolv.conf
};

class Resolver {
 public:
  // Called by step(). The addresses carry the port of the lookup, IPv4 first. With an error beside them, some may be
  // missing. It may throw: the resolver then goes on with the next lookup.
  using Answer = std::function<void(std::uint64_t id, std::vector<Address> addresses, std::string error)>;

  static constexpr std::size_t kMaxWaiting = 1024;
  static constexpr std::size_t kMaxInFlight = 32;
  static constexpr std::size_t kMaxAddresses = 16;   // per answer
  static constexpr std::size_t kMaxNameBytes = 253;  // RFC 1035 2.3.4, without the length byte of the root
  // After the addresses of one family, for those of the other: RFC 8305 3, but generous, because no user waits.
  static constexpr Ns kOtherFamilyTime = 500 * kMillisecond;

  Resolver(EpollNet& net, Answer answer, ResolverOptions options = {})
      : net_(net), answer_(std::move(answer)), options_(std::move(options)) {
    ares_library_init(ARES_LIB_INIT_ALL);
  }
  Resolver(const Resolver&) = delete;
  Resolver& operator=(const Resolver&) = delete;
  ~Resolver() {
    in_flight_.clear();
    ares_library_cleanup();
  }

  // Queues a lookup, which the next step() starts; the answer carries `id`. False if kMaxWaiting others are queued.
  bool lookup(std::string host, std::uint16_t port, std::uint64_t id) {
    if (waiting_.size() >= kMaxWaiting) return false;
    Query& query = waiting_.emplace_back(net_);
    query.host = std::move(host);
    query.port = port;
    query.id = id;
    return true;
  }

  // The time of the next step(), even without an event; kNever if there is nothing to do.
  Ns next() const {
    if (!waiting_.empty() && in_flight_.size() < kMaxInFlight) return 0;
    Ns soonest = kNever;
    for (const Query& query : in_flight_) {
      soonest = std::min(soonest, query.is_over() ? 0 : query.deadline_ns);
      timeval left{};
      if (query.channel == nullptr || ares_timeout(query.channel, nullptr, &left) == nullptr) continue;
      soonest = std::min(soonest, net_.now() + left.tv_sec * kSecond + left.tv_usec * kMicrosecond);
    }
    return soonest;
  }

  // For each event of kResolverKind. step() must follow.
  void on_event(const Event& event) {
    assert(event.token.kind() == kResolverKind);
    const auto fd = static_cast<ares_socket_t>(event.token.slot());
    for (Query& query : in_flight_) {  // none, if its socket was closed after the event was fetched
      if (std::find(query.sockets.begin(), query.sockets.end(), fd) == query.sockets.end()) continue;
      return ares_process_fd(query.channel, event.readable ? fd : ARES_SOCKET_BAD,
                             event.writable ? fd : ARES_SOCKET_BAD);
    }
  }

  // Starts queued lookups and delivers answers.
  void step() {
    const Ns now = net_.now();
    while (!waiting_.empty() && in_flight_.size() < kMaxInFlight) start_first(now);
    for (Query& query : in_flight_) {
      if (query.channel != nullptr) ares_process_fd(query.channel, ARES_SOCKET_BAD, ARES_SOCKET_BAD);  // retries
    }
    const auto is_due = [now](const Query& query) { return query.is_over() || now >= query.deadline_ns; };
    for (auto due = in_flight_.begin(); (due = std::find_if(due, in_flight_.end(), is_due)) != in_flight_.end();) {
      std::list<Query> one;
      one.splice(one.end(), in_flight_, due++);
      answer_(one.front().id, one.front().sorted_addresses(), one.front().error());
    }
  }

  // For a caller without a loop of its own: waits on `net`, which must watch nothing else, and handles the events.
  void turn() {
    std::array<Event, EpollNet::kMaxEvents> events;
    bool woken = false;
    const std::size_t count = net_.wait(events, next(), woken);
    for (std::size_t i = 0; i < count; ++i) on_event(events[i]);
    step();
  }

 private:
  struct Query;

  // One family of a query. c-ares calls on_result() once for it after it was started.
  struct Part {
    Query* query;
    int status = ARES_SUCCESS;
    bool over = true;
  };

  // A lookup, with a channel of its own: c-ares lets one bad answer spoil all lookups of a channel (since 1.31).
  struct Query {
    explicit Query(EpollNet& net_in) : net(net_in) {}
    Query(const Query&) = delete;
    Query& operator=(const Query&) = delete;
    ~Query() { close(); }

    void close() {
      if (channel != nullptr) ares_destroy(std::exchange(channel, nullptr));  // calls on_result() for each open part
    }
    bool is_over() const { return parts[0].over && parts[1].over; }

    std::vector<Address> sorted_addresses() {
      std::sort(addresses.begin(), addresses.end());
      addresses.erase(std::unique(addresses.begin(), addresses.end()), addresses.end());
      if (addresses.size() > kMaxAddresses) addresses.resize(kMaxAddresses);
      return std::move(addresses);
    }

    // Why there are no addresses, or not all. That one family has none is no error beside addresses of the other.
    std::string error() const {
      if (!fault.empty()) return fault;
      int told = ARES_SUCCESS;
      for (const Part& part : parts) {
        if (!part.over) return "no answer in time";
        const bool none = part.status == ARES_ENODATA || part.status == ARES_ENOTFOUND;
        if (part.status == ARES_SUCCESS || (none && has_found)) continue;
        if (told == ARES_SUCCESS || !none) told = part.status;
      }
      return told == ARES_SUCCESS ? std::string() : ares_strerror(told);
    }

    EpollNet& net;
    std::string host;
    std::uint16_t port = 0;
    std::uint64_t id = 0;
    ares_channel channel = nullptr;
    std::vector<ares_socket_t> sockets;
    std::array<Part, 2> parts{Part{this}, Part{this}};  // IPv4, IPv6
    std::vector<Address> addresses;
    bool has_found = false;
    std::string fault;  // why nothing was asked
    Ns deadline_ns = kNever;
  };

  void start_first(Ns now) {
    in_flight_.splice(in_flight_.end(), waiting_, waiting_.begin());
    Query& query = in_flight_.back();
    query.deadline_ns = deadline_after(now, options_.limit_ns);
    const std::string& host = query.host;
    const std::size_t most_bytes = kMaxNameBytes + (host.ends_with('.') ? 1 : 0);
    if (host.empty() || host.size() > most_bytes || host.find('\0') != std::string::npos) {
      query.fault = "not a host name";
    } else if (host == "localhost" || host == "localhost.") {  // RFC 6761 6.3
      for (const char* loopback : {"127.0.0.1", "::1"}) query.addresses.push_back(*parse_address(loopback, query.port));
    } else if (ask(query, "f", {AF_UNSPEC}) && !query.has_found) {
      query.close();
      ask(query, "b", {AF_INET, AF_INET6});
    }
  }

  // Asks for the addresses of each family in /etc/hosts (`where` f: it is read at once) or DNS (b). False if there is
  // no memory, or no way to ask: then the query has a fault.
  bool ask(Query& query, const char* where, std::initializer_list<int> families) {
    ares_options options{};
    std::string lookups(where);
    options.timeout = 2000;  // ms, of the first try; doubled for each further one
    options.tries = 3;
    options.lookups = lookups.data();
    options.sock_state_cb = &Resolver::on_socket_state;  // ares_getsock() is deprecated in 1.34
    options.sock_state_cb_data = &query;
    constexpr int kSet = ARES_OPT_TIMEOUTMS | ARES_OPT_TRIES | ARES_OPT_LOOKUPS | ARES_OPT_SOCK_STATE_CB;
    int status = ares_init_options(&query.channel, &options, kSet);
    if (status == ARES_SUCCESS && !options_.servers.empty()) {
      status = ares_set_servers_ports_csv(query.channel, options_.servers.c_str());
    }
    if (status != ARES_SUCCESS) {
      query.close();
      query.fault = ares_strerror(status);
      return false;
    }
    for (std::size_t i = 0; const int family : families) {
      ares_addrinfo_hints hints{};
      hints.ai_family = family;
      hints.ai_socktype = SOCK_STREAM;
      hints.ai_flags = ARES_AI_NOSORT;  // to sort, c-ares would connect a socket to each address
      query.parts[i].over = false;
      ares_getaddrinfo(query.channel, query.host.c_str(), nullptr, &hints, &Resolver::on_result, &query.parts[i++]);
    }
    return true;
  }

  // Called by c-ares, also before it closes the socket. If watching fails, the lookup ends by a timeout.
  static void on_socket_state(void* argument, ares_socket_t fd, int readable, int writable) noexcept {
    Query& query = *static_cast<Query*>(argument);
    std::erase(query.sockets, fd);
    if (readable != 0 || writable != 0) {
      try {
        query.sockets.push_back(fd);
      } catch (const std::bad_alloc&) {
        readable = writable = 0;
      }
    }
    const Handle token = Handle::make(kResolverKind, 0, static_cast<std::uint32_t>(fd));
    query.net.watch_foreign(fd, token, readable != 0, writable != 0);
  }

  // Called by c-ares, maybe from within ares_getaddrinfo(). No exception may pass through its frames.
  static void on_result(void* argument, int status, int, ares_addrinfo* result) noexcept {
    Part& part = *static_cast<Part*>(argument);
    part.over = true;
    part.status = status;
    if (status == ARES_SUCCESS) {
      try {
        take(*part.query, result);
      } catch (const std::bad_alloc&) {
        part.status = ARES_ENOMEM;
      }
    }
    if (result != nullptr) ares_freeaddrinfo(result);
  }

  static void take(Query& query, const ares_addrinfo* result) {
    for (const ares_addrinfo_node* node = result->nodes; node != nullptr; node = node->ai_next) {
      if (node->ai_family != AF_INET && node->ai_family != AF_INET6) continue;
      query.addresses.push_back(from_sockaddr(node->ai_addr));
      query.addresses.back().port = query.port;
      if (std::exchange(query.has_found, true)) continue;
      query.deadline_ns = std::min(query.deadline_ns, query.net.now() + kOtherFamilyTime);
    }
  }

  EpollNet& net_;
  const Answer answer_;
  const ResolverOptions options_;
  std::list<Query> waiting_;
  std::list<Query> in_flight_;  // at fixed addresses: c-ares holds pointers to them
};

}  // namespace nexus
