// resolver.h
// Owns:     host names to addresses, by c-ares in a thread of its own: a static binary must not call getaddrinfo, and
//           nobody else should wait for a DNS server.
// Promises: each lookup is answered once, within limit_ns of its start, but not after stop(); /etc/hosts goes before
//           DNS, and localhost needs neither; both files of the system are read anew, so that a change is seen; an
//           answer is the same whatever order the server lists it in; the thread exists from the first lookup on.
// Leaves:   when to ask again, and numeric addresses, to the caller; the cache to the DNS server.
// Threads:  lookup() and stop(): the owner's. The answer is called in the resolver's thread.
#pragma once

#include <ares.h>
#include <netdb.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/threads.h"
#include "nexus/net/epoll.h"

namespace nexus {

struct ResolverOptions {
  Ns limit_ns = 10 * kSecond;  // of one lookup, with all its tries
  std::string servers;         // "127.0.0.1:53, …" in place of what /etc/resolv.conf names
};

class Resolver {
 public:
  // `error` is empty where there are addresses. They bear the port that was asked with; IPv4 comes first.
  using Answer = std::function<void(std::uint64_t id, std::vector<Address> addresses, std::string error)>;

  static constexpr std::size_t kMaxWaiting = 1024;
  static constexpr std::size_t kMaxInFlight = 32;
  static constexpr std::size_t kMaxAddresses = 16;   // of one answer
  static constexpr std::size_t kMaxNameBytes = 253;  // RFC 1035 2.3.4, without the final dot's length byte

  explicit Resolver(Answer answer, ResolverOptions options = {})
      : answer_(std::move(answer)), options_(std::move(options)) {}
  Resolver(const Resolver&) = delete;
  Resolver& operator=(const Resolver&) = delete;
  ~Resolver() {
    stop();
    if (wake_ >= 0) ::close(wake_);
  }

  // Asks for `host`; the answer carries `id`. False where kMaxWaiting others wait, or no thread can be had.
  bool lookup(std::string host, std::uint16_t port, std::uint64_t id) {
    {
      const std::lock_guard lock(mutex_);
      if (stopping_ || waiting_.size() >= kMaxWaiting) return false;
      waiting_.push_back({std::move(host), port, id});
    }
    if (thread_.joinable() || start()) {
      wake();
      return true;
    }
    const std::lock_guard lock(mutex_);
    waiting_.pop_back();
    return false;
  }

  // Ends the thread; what was not answered is not.
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    if (!thread_.joinable()) return;
    wake();
    thread_.join();
  }

 private:
  struct Asked {
    std::string host;
    std::uint16_t port = 0;
    std::uint64_t id = 0;
  };
  // What c-ares works on; it calls back once for each, also when its channel is destroyed.
  struct Query {
    Resolver* self;
    std::uint16_t port;
    std::uint64_t id;
    Ns deadline_ns;
    bool answered = false;
    bool over = false;  // c-ares called back
  };

  bool start() {
    if (wake_ < 0) wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (wake_ < 0) return false;
    thread_ = start_thread("nexus-dns", [this] { run(); });
    return thread_.joinable();
  }

  void wake() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(wake_, &one, sizeof one);
  }

  // ---- the resolver's thread ----

  void run() {
    ares_library_init(ARES_LIB_INIT_ALL);
    while (begin_waiting()) {
      wait();
      expire();
      std::erase_if(queries_, [](const auto& query) { return query->over; });
      // None that anybody still waits for: the next one finds the system's files read anew.
      const bool idle =
          std::all_of(queries_.begin(), queries_.end(), [](const auto& query) { return query->answered; });
      if (idle) close_channel();
    }
    for (const auto& query : queries_) query->answered = true;  // too late to tell
    close_channel();
    ares_library_cleanup();
  }

  // Starts what was asked for. False once the thread is to end.
  bool begin_waiting() {
    for (;;) {
      Asked asked;
      {
        const std::lock_guard lock(mutex_);
        if (stopping_) return false;
        if (waiting_.empty() || queries_.size() >= kMaxInFlight) return true;
        asked = std::move(waiting_.front());
        waiting_.pop_front();
      }
      begin(asked);
    }
  }

  void begin(const Asked& asked) {
    if (asked.host.empty() || asked.host.size() > kMaxNameBytes || asked.host.find('\0') != std::string::npos) {
      return answer_(asked.id, {}, "not a host name");
    }
    if (const int status = open_channel(); status != ARES_SUCCESS) return answer_(asked.id, {}, ares_strerror(status));
    const Ns deadline = deadline_after(monotonic_now(), options_.limit_ns);
    queries_.push_back(std::make_unique<Query>(Query{this, asked.port, asked.id, deadline}));
    ares_addrinfo_hints hints{};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = ARES_AI_NOSORT;  // we sort; c-ares would connect a socket to each to find its favourite
    ares_getaddrinfo(channel_, asked.host.c_str(), nullptr, &hints, &Resolver::on_result, queries_.back().get());
  }

  int open_channel() {
    if (channel_ != nullptr) return ARES_SUCCESS;
    char files_first[] = "fb";
    ares_options options{};
    options.timeout = 2000;  // ms, of the first try; it doubles with each
    options.tries = 3;
    options.lookups = files_first;
    int status = ares_init_options(&channel_, &options, ARES_OPT_TIMEOUTMS | ARES_OPT_TRIES | ARES_OPT_LOOKUPS);
    if (status != ARES_SUCCESS) {
      channel_ = nullptr;
      return status;
    }
    if (!options_.servers.empty()) status = ares_set_servers_ports_csv(channel_, options_.servers.c_str());
    if (status != ARES_SUCCESS) close_channel();
    return status;
  }

  // Calls back for every query that is not over.
  void close_channel() {
    if (channel_ != nullptr) ares_destroy(channel_);
    channel_ = nullptr;
    queries_.clear();
  }

  // Waits until a socket of c-ares, a time limit or the owner has something for us, and lets c-ares work.
  void wait() {
    std::array<pollfd, ARES_GETSOCK_MAXNUM + 1> entries;
    entries[0] = {wake_, POLLIN, 0};
    nfds_t count = 1;
    if (channel_ != nullptr) {
      std::array<ares_socket_t, ARES_GETSOCK_MAXNUM> sockets;
      const int set = ares_getsock(channel_, sockets.data(), ARES_GETSOCK_MAXNUM);
      for (int i = 0; i < ARES_GETSOCK_MAXNUM; ++i) {
        const int events = (ARES_GETSOCK_READABLE(set, i) ? POLLIN : 0) | (ARES_GETSOCK_WRITABLE(set, i) ? POLLOUT : 0);
        if (events != 0) entries[count++] = {sockets[static_cast<std::size_t>(i)], static_cast<short>(events), 0};
      }
    }
    const int ready = ::poll(entries.data(), count, timeout_ms());
    assert(ready >= 0 || errno == EINTR);
    if (entries[0].revents != 0 && ready > 0) {
      std::uint64_t drained;
      [[maybe_unused]] const ssize_t n = ::read(wake_, &drained, sizeof drained);
    }
    if (channel_ == nullptr) return;
    for (nfds_t i = 1; i < count && ready > 0; ++i) {
      const bool readable = (entries[i].revents & (POLLIN | POLLERR | POLLHUP)) != 0;
      const bool writable = (entries[i].revents & (POLLOUT | POLLERR | POLLHUP)) != 0;
      if (!readable && !writable) continue;
      ares_process_fd(channel_, readable ? entries[i].fd : ARES_SOCKET_BAD, writable ? entries[i].fd : ARES_SOCKET_BAD);
    }
    ares_process_fd(channel_, ARES_SOCKET_BAD, ARES_SOCKET_BAD);  // its own time limits
  }

  int timeout_ms() const {
    if (queries_.empty()) return -1;
    const Ns now = monotonic_now();
    Ns left = 3600 * kSecond;
    for (const auto& query : queries_) {
      if (query->over) return 0;  // answered from a file: swept before the next sleep
      if (!query->answered && query->deadline_ns != kNever) left = std::min(left, query->deadline_ns - now);
    }
    timeval most{3600, 0};
    timeval own{};
    const timeval* next = ares_timeout(channel_, &most, &own);
    left = std::min(left, next->tv_sec * kSecond + next->tv_usec * kMicrosecond);
    return static_cast<int>((std::max<Ns>(left, 0) + kMillisecond - 1) / kMillisecond);
  }

  void expire() {
    const Ns now = monotonic_now();
    for (const auto& query : queries_) {
      if (!query->answered && query->deadline_ns <= now) tell(*query, {}, "no answer in time");
    }
  }

  void tell(Query& query, std::vector<Address> addresses, std::string error) {
    assert(!query.answered);
    query.answered = true;
    answer_(query.id, std::move(addresses), std::move(error));
  }

  // From c-ares, maybe from within ares_getaddrinfo(); it owns nothing of the query.
  static void on_result(void* argument, int status, int, ares_addrinfo* result) {
    Query& query = *static_cast<Query*>(argument);
    query.over = true;
    if (!query.answered) {
      std::vector<Address> addresses;
      if (status == ARES_SUCCESS) addresses = addresses_of(result, query.port);
      if (status == ARES_SUCCESS && addresses.empty()) status = ARES_ENODATA;
      query.self->tell(query, std::move(addresses), status == ARES_SUCCESS ? "" : ares_strerror(status));
    }
    if (result != nullptr) ares_freeaddrinfo(result);
  }

  static std::vector<Address> addresses_of(const ares_addrinfo* result, std::uint16_t port) {
    std::vector<Address> addresses;
    for (const ares_addrinfo_node* node = result->nodes; node != nullptr; node = node->ai_next) {
      Address address;
      address.port = port;
      address.v6 = node->ai_family == AF_INET6;
      if (node->ai_family == AF_INET6) {
        std::memcpy(address.ip.data(), &reinterpret_cast<const sockaddr_in6*>(node->ai_addr)->sin6_addr, 16);
      } else if (node->ai_family == AF_INET) {
        std::memcpy(address.ip.data(), &reinterpret_cast<const sockaddr_in*>(node->ai_addr)->sin_addr, 4);
      } else {
        continue;
      }
      addresses.push_back(address);
    }
    const auto key = [](const Address& a) { return std::tie(a.v6, a.ip); };
    std::sort(addresses.begin(), addresses.end(), [&](const Address& a, const Address& b) { return key(a) < key(b); });
    addresses.erase(std::unique(addresses.begin(), addresses.end()), addresses.end());
    if (addresses.size() > kMaxAddresses) addresses.resize(kMaxAddresses);
    return addresses;
  }

  const Answer answer_;
  const ResolverOptions options_;
  int wake_ = -1;
  std::thread thread_;
  std::mutex mutex_;  // guards the next two
  std::deque<Asked> waiting_;
  bool stopping_ = false;
  // The thread's own.
  ares_channel channel_ = nullptr;
  std::vector<std::unique_ptr<Query>> queries_;
};

}  // namespace nexus
