// resolver.h
// Owns:     DNS lookups by c-ares, on the loop of the thread that asks. (A static binary cannot use getaddrinfo().)
// Promises: each lookup is answered once, within limit_ns of its start, unless the resolver is destroyed before;
//           /etc/hosts comes before DNS, and localhost needs neither; when no lookup is running, both system files are
//           read again for the next one; the order of an answer does not depend on the order of the server's records.
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
  // Called by step(). `error` is empty if there are addresses, which carry the port of the lookup, IPv4 first. It may
  // throw: the resolver then goes on with the next lookup.
  using Answer = std::function<void(std::uint64_t id, std::vector<Address> addresses, std::string error)>;

  static constexpr std::size_t kMaxWaiting = 1024;
  static constexpr std::size_t kMaxInFlight = 32;
  static constexpr std::size_t kMaxAddresses = 16;   // per answer
  static constexpr std::size_t kMaxNameBytes = 253;  // RFC 1035 2.3.4, without the length byte of the root

  Resolver(EpollNet& net, Answer answer, ResolverOptions options = {})
      : net_(net), answer_(std::move(answer)), options_(std::move(options)) {
    ares_library_init(ARES_LIB_INIT_ALL);
  }
  Resolver(const Resolver&) = delete;
  Resolver& operator=(const Resolver&) = delete;
  ~Resolver() {
    close_channel();
    ares_library_cleanup();
  }

  // Queues a lookup, which the next step() starts; the answer carries `id`. False if kMaxWaiting others are queued.
  bool lookup(std::string host, std::uint16_t port, std::uint64_t id) {
    if (waiting_.size() >= kMaxWaiting) return false;
    waiting_.push_back({std::move(host), port, id, {}});
    return true;
  }

  // The time of the next step(), even without an event; kNever if there is nothing to do.
  Ns next() const {
    if (!waiting_.empty() && in_flight_.size() < kMaxInFlight) return 0;
    Ns soonest = kNever;
    for (const Query& query : in_flight_) {
      if (!query.answered) soonest = std::min(soonest, query.over ? 0 : query.deadline_ns);
    }
    timeval left{};
    if (channel_ == nullptr || ares_timeout(channel_, nullptr, &left) == nullptr) return soonest;
    return std::min(soonest, net_.now() + left.tv_sec * kSecond + left.tv_usec * kMicrosecond);
  }

  // For each event of kResolverKind. step() must follow.
  void on_event(const Event& event) {
    assert(event.token.kind() == kResolverKind);
    if (channel_ == nullptr) return;  // closed after the event was fetched
    const auto fd = static_cast<ares_socket_t>(event.token.slot());
    ares_process_fd(channel_, event.readable ? fd : ARES_SOCKET_BAD, event.writable ? fd : ARES_SOCKET_BAD);
  }

  // Starts queued lookups and delivers answers.
  void step() {
    const Ns now = net_.now();
    while (!waiting_.empty() && in_flight_.size() < kMaxInFlight) start_first(now);
    if (channel_ != nullptr) ares_process_fd(channel_, ARES_SOCKET_BAD, ARES_SOCKET_BAD);  // retries, timeouts
    bool idle = true;
    for (Query& query : in_flight_) {
      if (!query.answered && (query.over || now >= query.deadline_ns)) {
        query.answered = true;
        answer_(query.id, std::move(query.addresses), query.over ? query.error : "no answer in time");
      }
      idle = idle && query.answered;
    }
    in_flight_.remove_if([](const Query& query) { return query.over; });
    if (idle) close_channel();
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
  // c-ares calls on_result() once for each started query, also when its channel is destroyed.
  struct Query {
    std::string host;
    std::uint16_t port = 0;
    std::uint64_t id = 0;
    std::vector<Address> addresses;
    const char* error = "";
    Ns deadline_ns = kNever;
    bool over = false;  // c-ares is done with it
    bool answered = false;
  };

  void start_first(Ns now) {
    in_flight_.splice(in_flight_.end(), waiting_, waiting_.begin());
    Query& query = in_flight_.back();
    query.deadline_ns = deadline_after(now, options_.limit_ns);
    const std::string& host = query.host;
    const bool is_name = !host.empty() && host.size() <= kMaxNameBytes && host.find('\0') == std::string::npos;
    if (const int status = is_name ? open_channel() : ARES_SUCCESS; !is_name || status != ARES_SUCCESS) {
      query.error = is_name ? ares_strerror(status) : "not a host name";
      query.over = true;
      return;
    }
    ares_addrinfo_hints hints{};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = ARES_AI_NOSORT;  // to sort, c-ares would connect a socket to each address
    ares_getaddrinfo(channel_, host.c_str(), nullptr, &hints, &Resolver::on_result, &query);
  }

  int open_channel() {
    if (channel_ != nullptr) return ARES_SUCCESS;
    char files_first[] = "fb";
    ares_options options{};
    options.timeout = 2000;  // ms, of the first try; doubled for each further one
    options.tries = 3;
    options.lookups = files_first;
    options.sock_state_cb = &Resolver::on_socket_state;  // ares_getsock() is deprecated in 1.34
    options.sock_state_cb_data = this;
    constexpr int kSet = ARES_OPT_TIMEOUTMS | ARES_OPT_TRIES | ARES_OPT_LOOKUPS | ARES_OPT_SOCK_STATE_CB;
    int status = ares_init_options(&channel_, &options, kSet);
    if (status == ARES_SUCCESS && !options_.servers.empty()) {
      status = ares_set_servers_ports_csv(channel_, options_.servers.c_str());
    }
    if (status != ARES_SUCCESS && channel_ != nullptr) ares_destroy(std::exchange(channel_, nullptr));
    return status;
  }

  void close_channel() {
    if (channel_ != nullptr) ares_destroy(std::exchange(channel_, nullptr));  // calls on_result() for each query left
    in_flight_.clear();
  }

  // Called by c-ares, also before it closes the socket. If watching fails, the lookup ends by a timeout.
  static void on_socket_state(void* self, ares_socket_t fd, int readable, int writable) {
    const Handle token = Handle::make(kResolverKind, 0, static_cast<std::uint32_t>(fd));
    static_cast<Resolver*>(self)->net_.watch_foreign(fd, token, readable != 0, writable != 0);
  }

  // Called by c-ares, maybe from within ares_getaddrinfo(). No exception may pass through its frames.
  static void on_result(void* argument, int status, int, ares_addrinfo* result) noexcept {
    Query& query = *static_cast<Query*>(argument);
    query.over = true;
    if (!query.answered && status == ARES_SUCCESS) {
      try {
        query.addresses = addresses_of(result, query.port);
        if (query.addresses.empty()) status = ARES_ENODATA;
      } catch (const std::bad_alloc&) {
        status = ARES_ENOMEM;
      }
    }
    if (status != ARES_SUCCESS) query.error = ares_strerror(status);
    if (result != nullptr) ares_freeaddrinfo(result);
  }

  static std::vector<Address> addresses_of(const ares_addrinfo* result, std::uint16_t port) {
    std::vector<Address> addresses;
    for (const ares_addrinfo_node* node = result->nodes; node != nullptr; node = node->ai_next) {
      if (node->ai_family != AF_INET && node->ai_family != AF_INET6) continue;
      addresses.push_back(from_sockaddr(node->ai_addr));
      addresses.back().port = port;
    }
    std::sort(addresses.begin(), addresses.end());
    addresses.erase(std::unique(addresses.begin(), addresses.end()), addresses.end());
    if (addresses.size() > kMaxAddresses) addresses.resize(kMaxAddresses);
    return addresses;
  }

  EpollNet& net_;
  const Answer answer_;
  const ResolverOptions options_;
  std::list<Query> waiting_;
  std::list<Query> in_flight_;  // at fixed addresses: c-ares holds pointers to them
  ares_channel channel_ = nullptr;
};

}  // namespace nexus
