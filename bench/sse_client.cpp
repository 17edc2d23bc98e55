// sse_client.cpp
// Owns:     many event streams at a time, opened through a proxy; what each of their chunks took from the backend's
//           send to this end of the last connection.
// Promises: every stream is checked: status 200, framing, as many chunks as were asked for, `[DONE]` at the end; delays
//           are kept one by one, so that quantiles are exact; the starts are spread over a pace, so that chunks are
//           too. A chunk is here when the kernel has it here: that this client, which shares its core with the backend,
//           reads it later is no proxy's delay.
// Leaves:   the pace to sse_backend.
// usage:    sse_client PORT STREAMS CHUNKS PACE_US SECONDS     new streams on the same connections until SECONDS passed
//           sse_client PORT STREAMS CHUNKS PACE_US hold        opens them, says "ready", holds them until stdin ends
//           sse_client PORT STREAMS CHUNKS PACE_US rest        the same, but holds the connections when their streams
//           end One line of JSON on stdout. Status 1 where a stream was not as it should be.
#include <poll.h>
#include <sys/epoll.h>
#include <sys/prctl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "loopback.h"

using namespace nexus::bench;

namespace {

constexpr int kMaxEvents = 512;
constexpr std::size_t kMostDelays = 20'000'000;

// The chunked coding undone, piece by piece.
class Dechunker {
 public:
  // Appends the payload in `bytes` to `out`. False where the framing is broken.
  bool feed(std::string_view bytes, std::string& out) {
    for (std::size_t i = 0; i < bytes.size() && in_ != In::done;) {
      const char c = bytes[i];
      switch (in_) {
        case In::size:
          i += 1;
          if (c == '\r') break;
          if (c == '\n') {
            in_ = left_ == 0 ? In::last : In::payload;
          } else {
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) return false;
            left_ = left_ * 16 + static_cast<std::size_t>(digit);
          }
          break;
        case In::payload: {
          const std::size_t part = std::min(left_, bytes.size() - i);
          out.append(bytes.substr(i, part));
          i += part;
          left_ -= part;
          if (left_ == 0) in_ = In::behind;
          break;
        }
        case In::behind:
          i += 1;
          if (c == '\n') in_ = In::size;
          break;
        case In::last:
          i += 1;
          if (c == '\n') in_ = In::done;
          break;
        case In::done: break;
      }
    }
    return true;
  }
  bool done() const { return in_ == In::done; }

 private:
  enum class In { size, payload, behind, last, done };
  In in_ = In::size;
  std::size_t left_ = 0;
};

struct Stream {
  int fd = -1;
  bool sent = false;  // its request
  bool in_body = false;
  bool over = false;
  std::string text;  // what is not read yet: of the head, then of the events
  Dechunker body;
  std::uint64_t chunks = 0;
  bool told_done = false;
};

struct Plan {
  std::uint16_t port;
  std::size_t streams;
  std::uint64_t chunks;
  std::uint64_t pace_us;
  bool hold;
  bool rest;
  double seconds;
};

class Client {
 public:
  explicit Client(const Plan& plan) : plan_(plan), epoll_(epoll_create1(EPOLL_CLOEXEC)), streams_(plan.streams) {
    const std::string body = R"({"model":"bench-stream","stream":true,"max_tokens":)" + std::to_string(plan.chunks) +
                             R"(,"pace_us":)" + std::to_string(plan.pace_us) +
                             R"(,"messages":[{"role":"user","content":"Tell me of a fox and a dog, at length."}]})";
    request_ =
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: " +
        std::to_string(body.size()) + "\r\n\r\n" + body;
  }

  bool run() {
    started_ns_ = now_ns();
    open_all();
    while (open_ > 0 && errors_ == 0) {
      const bool all_here =
          plan_.hold && std::all_of(streams_.begin(), streams_.end(), [](const Stream& s) { return s.chunks > 0; });
      if (all_here) return hold();
      wait(1000);
    }
    return plan_.rest && errors_ == 0 ? hold() : report();
  }

 private:
  // Spread over one pace (or, where that is long or none, some of them a millisecond).
  void open_all() {
    const Ns spread_ns =
        plan_.hold || plan_.rest ? static_cast<Ns>(plan_.streams) * 50'000 : static_cast<Ns>(plan_.pace_us) * 1000;
    for (std::size_t i = 0; i < streams_.size(); ++i) {
      const Ns at_ns = started_ns_ + spread_ns * static_cast<Ns>(i) / static_cast<Ns>(streams_.size());
      do {
        wait(0);
      } while (now_ns() < at_ns);
      open(streams_[i], static_cast<std::uint8_t>(1 + i % 4));  // four addresses: more ports
    }
    const double last = plan_.hold ? 1e9 : plan_.seconds;
    until_ns_ = now_ns() + static_cast<Ns>(last * 1e9);
  }

  void open(Stream& stream, std::uint8_t from) {
    stream.fd = connect_to(plan_.port, from);
    if (stream.fd < 0) return fail("no connection");
    const int on = 1;
    setsockopt(stream.fd, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
    open_ += 1;
    epoll_event event{};
    event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
    event.data.ptr = &stream;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, stream.fd, &event);
  }

  void wait(int ms) {
    const int count = epoll_wait(epoll_, events_.data(), kMaxEvents, ms);
    for (int i = 0; i < count; ++i) {
      const epoll_event& event = events_[static_cast<std::size_t>(i)];
      auto& stream = *static_cast<Stream*>(event.data.ptr);
      if (stream.over) continue;
      if ((event.events & EPOLLOUT) != 0 && !stream.sent) send_request(stream);
      if ((event.events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) read_all(stream);
    }
  }

  void send_request(Stream& stream) {
    stream.sent = true;
    stream.in_body = false;
    stream.text.clear();
    stream.body = Dechunker();
    stream.chunks = 0;
    stream.told_done = false;
    if (send(stream.fd, request_.data(), request_.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(request_.size())) {
      fail("the request was not taken");
    }
  }

  void read_all(Stream& stream) {
    while (!stream.over) {
      Ns came_ns = 0;
      const ssize_t got = receive(stream.fd, came_ns);
      if (got < 0 && errno == EAGAIN) return;
      if (got <= 0) return fail("the connection ended");
      const auto bytes = static_cast<std::size_t>(got);
      take(stream, {buffer_.data(), bytes}, came_ns);
      if (bytes < buffer_.size()) return;
    }
  }

  // `came_ns`: when the kernel had the last of these bytes, by CLOCK_REALTIME.
  ssize_t receive(int fd, Ns& came_ns) {
    iovec piece{buffer_.data(), buffer_.size()};
    alignas(cmsghdr) std::array<char, 64> control;
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ssize_t got = recvmsg(fd, &message, 0);
    const cmsghdr* stamp = got > 0 ? CMSG_FIRSTHDR(&message) : nullptr;
    if (stamp == nullptr || stamp->cmsg_level != SOL_SOCKET || stamp->cmsg_type != SCM_TIMESTAMPNS) {
      came_ns = wall_ns();
      return got;
    }
    timespec at{};
    std::memcpy(&at, CMSG_DATA(stamp), sizeof at);
    came_ns = Ns{at.tv_sec} * 1'000'000'000 + at.tv_nsec;
    return got;
  }

  void take(Stream& stream, std::string_view bytes, Ns came_ns) {
    if (!stream.in_body) {
      stream.text += bytes;
      const std::size_t head_end = stream.text.find("\r\n\r\n");
      if (head_end == std::string::npos) return;
      if (!stream.text.starts_with("HTTP/1.1 200 ")) return fail(stream.text.c_str());
      const std::string rest = stream.text.substr(head_end + 4);
      stream.text.clear();
      stream.in_body = true;
      return take(stream, rest, came_ns);
    }
    if (!stream.body.feed(bytes, stream.text)) return fail("broken framing");
    read_events(stream, came_ns);
    if (stream.body.done()) end(stream);
  }

  void read_events(Stream& stream, Ns came_ns) {
    std::size_t from = 0;
    for (std::size_t end; (end = stream.text.find("\n\n", from)) != std::string::npos; from = end + 2) {
      const std::string_view event = std::string_view(stream.text).substr(from, end - from);
      if (event == "data: [DONE]") stream.told_done = true;
      const std::size_t at = event.rfind("\"t\":");
      if (at == std::string_view::npos) continue;
      stream.chunks += 1;
      all_chunks_ += 1;
      if (delays_.size() < kMostDelays) delays_.push_back(came_ns - std::strtoll(event.data() + at + 4, nullptr, 10));
    }
    stream.text.erase(0, from);
  }

  void end(Stream& stream) {
    if (stream.chunks != plan_.chunks || !stream.told_done) return fail("a stream is not whole");
    all_streams_ += 1;
    if (!plan_.rest && now_ns() < until_ns_) return send_request(stream);
    ended_ns_ = now_ns();
    stream.over = true;
    open_ -= 1;
    if (!plan_.rest) close(stream.fd);
  }

  void fail(const char* why) {
    if (errors_++ == 0) std::fprintf(stderr, "sse_client: %.300s\n", why);
  }

  bool hold() {
    std::printf("ready\n");
    std::fflush(stdout);
    pollfd in{0, POLLIN, 0};
    for (char c; poll(&in, 1, -1) >= 0 && read(0, &c, 1) > 0;) {
    }
    return errors_ == 0;
  }

  double quantile_us(double q) {
    if (delays_.empty()) return 0;
    const auto at = delays_.begin() + static_cast<std::ptrdiff_t>(q * static_cast<double>(delays_.size() - 1));
    std::nth_element(delays_.begin(), at, delays_.end());
    return static_cast<double>(*at) / 1000;
  }

  static double cpu_seconds() {
    rusage used{};
    getrusage(RUSAGE_SELF, &used);
    const auto seconds = [](const timeval& t) {
      return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
    };
    return seconds(used.ru_utime) + seconds(used.ru_stime);
  }

  bool report() {
    const double cpu = cpu_seconds();
    std::printf("{\"streams\":%llu,\"chunks\":%llu,\"seconds\":%.3f,\"client_cpu_seconds\":%.6f,",
                static_cast<unsigned long long>(all_streams_), static_cast<unsigned long long>(all_chunks_),
                static_cast<double>(std::max(ended_ns_, started_ns_) - started_ns_) / 1e9, cpu);
    std::printf("\"p50_us\":%.1f,\"p90_us\":%.1f,\"p99_us\":%.1f,\"max_us\":%.1f,\"errors\":%llu}\n", quantile_us(0.5),
                quantile_us(0.9), quantile_us(0.99), quantile_us(1), static_cast<unsigned long long>(errors_));
    return errors_ == 0;
  }

  Plan plan_;
  int epoll_;
  std::string request_;
  std::vector<Stream> streams_;
  std::array<epoll_event, kMaxEvents> events_;
  std::array<char, 64u << 10> buffer_;
  std::vector<Ns> delays_;
  Ns started_ns_ = 0;
  Ns ended_ns_ = 0;
  Ns until_ns_ = INT64_MAX;
  std::size_t open_ = 0;
  std::uint64_t all_streams_ = 0;
  std::uint64_t all_chunks_ = 0;
  std::uint64_t errors_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: sse_client PORT STREAMS CHUNKS PACE_US SECONDS|hold|rest\n");
    return 2;
  }
  prctl(PR_SET_TIMERSLACK, 1);
  raise_descriptor_limit();
  Plan plan{};
  plan.port = port_of(argv[1]);
  plan.streams = std::strtoull(argv[2], nullptr, 10);
  plan.chunks = std::strtoull(argv[3], nullptr, 10);
  plan.pace_us = std::strtoull(argv[4], nullptr, 10);
  plan.hold = std::string_view(argv[5]) == "hold";
  plan.rest = std::string_view(argv[5]) == "rest";
  plan.seconds = std::strtod(argv[5], nullptr);
  const auto client = std::make_unique<Client>(plan);
  return client->run() ? 0 : 1;
}
