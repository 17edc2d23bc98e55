// sse_backend.cpp
// Owns:     a model server's manners without a model: it reads a whole request, then answers with a completion of about
//           350 bytes, or streams chunks at the pace that the request's body names.
// Promises: each chunk is one send and one HTTP chunk, with the time of that send in it ("t", CLOCK_REALTIME in ns); a
//           chunk is never sent early, and one that is late does not move the next; connections are kept alive.
// Leaves:   counting to sse_client. Of a body it looks for three words: "stream":true, "max_tokens":CHUNKS and
//           "pace_us":PACE, at its front or end (0: as fast as the socket takes them).
// usage:    sse_backend PORT     (on 127.0.0.1, one thread)
#include <sys/epoll.h>
#include <sys/prctl.h>

#include <algorithm>
#include <array>
#include <queue>
#include <string>
#include <string_view>
#include <vector>

#include "loopback.h"

using namespace nexus::bench;

namespace {

constexpr int kMaxEvents = 512;
constexpr std::size_t kChunksPerTurn = 16;     // of one flat-out stream, before others get their turn
constexpr std::size_t kFrontBytes = 4u << 10;  // of a body, where the words are looked for; and as many at its end

constexpr std::string_view kCompletion =
    R"({"id":"chatcmpl-9f2c4a7e1b","object":"chat.completion","created":1735689600,"model":"bench-stream","choices":[{"index":0,)"
    R"("message":{"role":"assistant","content":"The quick brown fox jumps over the lazy dog while the gateway forwards this answer."},)"
    R"("finish_reason":"stop"}],"usage":{"prompt_tokens":42,"completion_tokens":21,"total_tokens":63}})";

// With its size line: the usage, the end of the stream, the end of the body.
constexpr std::string_view kLastEvents =
    "9a\r\ndata: {\"id\":\"chatcmpl-9f2c4a7e1b\",\"object\":\"chat.completion.chunk\",\"choices\":[],"
    "\"usage\":{\"prompt_tokens\":42,\"completion_tokens\":200,\"total_tokens\":242}}\n\n\r\n"
    "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

// The number behind `word` in `text`, or `missing`.
std::uint64_t number_behind(std::string_view text, std::string_view word, std::uint64_t missing) {
  const std::size_t at = text.find(word);
  if (at == std::string_view::npos) return missing;
  return std::strtoull(std::string(text.substr(at + word.size(), 20)).c_str(), nullptr, 10);
}

struct Peer {
  int fd = -1;
  bool closed = false;
  bool planned = false;  // due_ names it
  // The request being read.
  std::string front;            // its head and the front of its body
  std::string tail;             // the last bytes of its body
  std::size_t head_bytes = 0;   // 0: not whole yet
  std::uint64_t body_left = 0;  // still to come
  // The answer being sent.
  std::string out;
  std::size_t out_sent = 0;
  std::uint64_t chunks_left = 0;
  std::uint64_t chunk = 0;
  Ns pace_ns = 0;
  Ns due_ns = 0;
};

struct Due {
  Ns at_ns;
  Peer* peer;
  bool operator<(const Due& other) const { return at_ns > other.at_ns; }  // the earliest on top
};

class Server {
 public:
  explicit Server(int listener) : listener_(listener), epoll_(epoll_create1(EPOLL_CLOEXEC)) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = nullptr;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, listener_, &event);
  }

  void turn() {
    const int count = wait();
    for (int i = 0; i < count; ++i) {
      const epoll_event& event = events_[static_cast<std::size_t>(i)];
      if (event.data.ptr == nullptr) {
        accept_all();
      } else {
        on_event(*static_cast<Peer*>(event.data.ptr), event.events);
      }
    }
    send_due();
    std::vector<Peer*> again;
    again.swap(again_);
    for (Peer* peer : again) stream_on(*peer);
    bury();
  }

 private:
  int wait() {
    timespec limit{};
    const timespec* timeout = nullptr;
    if (!again_.empty()) {
      timeout = &limit;
    } else if (!due_.empty()) {
      const Ns left = std::max<Ns>(due_.top().at_ns - now_ns(), 0);
      limit = {left / 1'000'000'000, left % 1'000'000'000};
      timeout = &limit;
    }
    return epoll_pwait2(epoll_, events_.data(), kMaxEvents, timeout, nullptr);
  }

  void accept_all() {
    for (;;) {
      const int fd = accept_from(listener_);
      if (fd < 0) return;
      auto* peer = new Peer;
      peer->fd = fd;
      epoll_event event{};
      event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
      event.data.ptr = peer;
      epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
    }
  }

  void on_event(Peer& peer, std::uint32_t events) {
    if (peer.closed) return;
    if ((events & EPOLLOUT) != 0 && !peer.out.empty() && flush(peer) && peer.pace_ns == 0) stream_on(peer);
    if (!peer.closed && (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0)
      read_all(peer, (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0);
  }

  // `hangup`: a FIN stands behind what can be read, so that a short read does not empty the socket.
  void read_all(Peer& peer, bool hangup) {
    for (;;) {
      const ssize_t got = recv(peer.fd, buffer_.data(), buffer_.size(), 0);
      if (got < 0 && errno == EAGAIN) return;
      if (got <= 0) return end(peer);
      const auto bytes = static_cast<std::size_t>(got);
      if (!take({buffer_.data(), bytes}, peer) || (bytes < buffer_.size() && !hangup)) return;
    }
  }

  // Reads on in the request; answers where it is whole. False where the peer is gone. No request may follow before its
  // answer.
  bool take(std::string_view bytes, Peer& peer) {
    if (peer.head_bytes == 0) {
      peer.front += bytes;
      const std::size_t head_end = peer.front.find("\r\n\r\n");
      if (head_end == std::string::npos) return true;
      peer.head_bytes = head_end + 4;
      std::string head = peer.front.substr(0, peer.head_bytes);
      std::transform(head.begin(), head.end(), head.begin(),
                     [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 32) : c; });
      peer.body_left = number_behind(head, "content-length:", 0);
      bytes = std::string_view(peer.front).substr(peer.head_bytes);
    } else if (peer.front.size() < kFrontBytes) {
      peer.front += bytes;
    }
    if (bytes.size() >= kFrontBytes) {
      peer.tail = bytes.substr(bytes.size() - kFrontBytes);
    } else {
      peer.tail += bytes;
      if (peer.tail.size() > 2 * kFrontBytes) peer.tail.erase(0, peer.tail.size() - kFrontBytes);
    }
    peer.body_left -= std::min<std::uint64_t>(peer.body_left, bytes.size());
    if (peer.body_left > 0) return true;
    answer(peer);
    return !peer.closed;
  }

  void answer(Peer& peer) {
    const std::string said = peer.front.substr(peer.head_bytes, kFrontBytes) + peer.tail;
    peer.front.clear();
    peer.tail.clear();
    peer.head_bytes = 0;
    if (said.find("\"stream\":true") == std::string::npos) {
      peer.out =
          "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " + std::to_string(kCompletion.size()) +
          "\r\n\r\n";
      peer.out += kCompletion;
      flush(peer);
      return;
    }
    peer.out = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    peer.chunks_left = std::max<std::uint64_t>(number_behind(said, "\"max_tokens\":", 200), 1);
    peer.pace_ns = static_cast<Ns>(number_behind(said, "\"pace_us\":", 0)) * 1000;
    peer.chunk = 0;
    peer.due_ns = now_ns();
    if (peer.pace_ns == 0) return stream_on(peer);
    send_chunk(peer);
    plan_next(peer);
  }

  // Flat out: chunk by chunk, until the socket is full or its turn is over.
  void stream_on(Peer& peer) {
    for (std::size_t i = 0; !peer.closed && peer.chunks_left > 0 && (peer.out.empty() || peer.chunk == 0); ++i) {
      if (i == kChunksPerTurn) return again_.push_back(&peer);
      if (!send_chunk(peer)) return;
    }
  }

  void plan_next(Peer& peer) {
    if (peer.closed || peer.chunks_left == 0) return;
    peer.due_ns += peer.pace_ns;
    due_.push({peer.due_ns, &peer});
    peer.planned = true;
  }

  void send_due() {
    while (!due_.empty() && due_.top().at_ns <= now_ns()) {
      Peer* const peer = due_.top().peer;
      due_.pop();
      peer->planned = false;
      if (peer->closed) {
        closed_.push_back(peer);
        continue;
      }
      send_chunk(*peer);
      plan_next(*peer);
    }
  }

  // False where the socket did not take all of it, or the peer is gone.
  bool send_chunk(Peer& peer) {
    char event[320];
    int bytes =
        snprintf(event, sizeof event,
                 "data: {\"id\":\"chatcmpl-9f2c4a7e1b\",\"object\":\"chat.completion.chunk\",\"created\":1735689600,"
                 "\"model\":\"bench-stream\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" "
                 "fox\"},\"finish_reason\":null}],"
                 "\"t\":%lld}\n\n",
                 static_cast<long long>(wall_ns()));
    char line[16];
    peer.chunk += 1;
    peer.chunks_left -= 1;
    peer.out.append(line,
                    static_cast<std::size_t>(snprintf(line, sizeof line, "%x\r\n", static_cast<unsigned>(bytes))));
    peer.out.append(event, static_cast<std::size_t>(bytes)).append("\r\n");
    if (peer.chunks_left == 0) peer.out.append(kLastEvents);
    return flush(peer);
  }

  // True where all is sent.
  bool flush(Peer& peer) {
    while (peer.out_sent < peer.out.size()) {
      const ssize_t sent =
          send(peer.fd, peer.out.data() + peer.out_sent, peer.out.size() - peer.out_sent, MSG_NOSIGNAL);
      if (sent < 0 && errno == EAGAIN) return false;
      if (sent < 0) {
        end(peer);
        return false;
      }
      peer.out_sent += static_cast<std::size_t>(sent);
    }
    peer.out.clear();
    peer.out_sent = 0;
    return true;
  }

  void end(Peer& peer) {
    close(peer.fd);
    peer.closed = true;
    if (!peer.planned) closed_.push_back(&peer);
  }

  // Frees those who are gone, at a turn's end: no event and no plan names them.
  void bury() {
    if (closed_.empty()) return;
    std::erase_if(again_, [](const Peer* peer) { return peer->closed; });
    for (Peer* peer : closed_) delete peer;
    closed_.clear();
  }

  int listener_;
  int epoll_;
  std::array<epoll_event, kMaxEvents> events_;
  std::array<char, 256u << 10> buffer_;
  std::priority_queue<Due> due_;
  std::vector<Peer*> again_;
  std::vector<Peer*> closed_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: sse_backend PORT\n");
    return 2;
  }
  prctl(PR_SET_TIMERSLACK, 1);
  raise_descriptor_limit();
  static Server server(listen_on(port_of(argv[1])));
  for (;;) server.turn();
}
