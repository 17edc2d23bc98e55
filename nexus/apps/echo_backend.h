// echo_backend.h
// Owns:     the built-in backend (`type = echo`): a thread that serves a small OpenAI-compatible model on a loopback
//           port.
// Promises: HTTP/1.1 with keep-alive, streams and whole answers, a delay per token; a client that leaves (its FIN
//           counts) is dropped at once; memory is bounded per connection and overall; a slow reader pauses its stream.
// Leaves:   what the model understands and says to echo_question.h and echo_answer.h.
// Threads:  start() and stop() are the owner's; all else runs in the server's own.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "nexus/apps/echo_answer.h"
#include "nexus/apps/echo_question.h"
#include "nexus/base/clock.h"
#include "nexus/base/slot_map.h"
#include "nexus/base/text.h"
#include "nexus/base/threads.h"
#include "nexus/http/chunked.h"
#include "nexus/http/head_parser.h"
#include "nexus/net/connection.h"
#include "nexus/net/epoll.h"
#include "nexus/net/timer_wheel.h"

namespace nexus {

struct EchoOptions {
  std::vector<std::string> models{"echo"};
  Ns token_delay_ns = 0;  // before each token; a whole answer waits for all of them
};

constexpr std::size_t kMaxEchoHeadBytes = 16u << 10;
constexpr std::size_t kMaxEchoBodyBytes = 64u << 20;
constexpr std::size_t kMaxEchoMemoryBytes = 1u << 30;  // of all buffers together; over it: 503
constexpr std::size_t kMaxEchoSessions = 4096;
constexpr std::size_t kEchoReadBytes = 16u << 10;      // of one read
constexpr std::size_t kEchoWriteBytes = 16u << 10;     // of events that are written together, about
constexpr Ns kEchoIdleNs = 300 * kSecond;              // a connection on which nothing moves
constexpr Ns kEchoClosingNs = 2 * kSecond;             // to read away what a refused client still sends
constexpr Ns kEchoAcceptPauseNs = 100 * kMillisecond;  // after the system had no descriptor

namespace detail {

// What a request's line asks for, before its body is read.
struct EchoRoute {
  EchoEndpoint endpoint = EchoEndpoint::models;
  unsigned status = 200;   // or 404, 405
  std::string_view allow;  // where 405
};

inline EchoRoute route_echo(std::uint8_t method, std::string_view target) {
  struct Row {
    std::string_view path;
    EchoEndpoint endpoint;
  };
  constexpr std::array kRows{Row{"/v1/models", EchoEndpoint::models}, Row{"/v1/chat/completions", EchoEndpoint::chat},
                             Row{"/v1/completions", EchoEndpoint::completions},
                             Row{"/v1/embeddings", EchoEndpoint::embeddings}};
  const std::string_view path = target.substr(0, target.find('?'));
  for (const Row& row : kRows) {
    if (row.path != path) continue;
    const bool models = row.endpoint == EchoEndpoint::models;
    const bool allowed = models ? method == HTTP_GET || method == HTTP_HEAD : method == HTTP_POST;
    if (allowed) return {row.endpoint, 200, {}};
    return {row.endpoint, 405, models ? "GET, HEAD" : "POST"};
  }
  return {EchoEndpoint::models, 404, {}};
}

inline std::string_view reason_of(unsigned status) {
  switch (status) {
    case 200: return "OK";
    case 400: return "Bad Request";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 413: return "Content Too Large";
    case 417: return "Expectation Failed";
    case 431: return "Request Header Fields Too Large";
    case 501: return "Not Implemented";
    default: return "Service Unavailable";
  }
}

// One client's connection.
struct EchoSession {
  enum class State : std::uint8_t {
    head,       // a request's head is read
    body,       // its body is read
    waiting,    // a whole answer is ready, its time has not come
    streaming,  // events go out as they fall due
    closing,    // the last answer is on its way; what still comes is read away
  };

  EchoSession(Handle own, EpollNet::Socket socket) : token(own), timer(own) { io.attach(socket); }

  const Handle token;
  Connection<EpollNet> io;
  Timer timer;
  State state = State::head;
  Ns moved_ns = 0;  // when a byte last came or went
  Ns due_ns = 0;    // waiting, streaming: when the next text is

  Buffer in;    // received, not looked at
  Buffer body;  // of the request that is read
  FieldTable fields;
  RequestReader reader;
  RequestHead head;
  ChunkedDecoder decoder;
  EchoRoute route;
  std::uint64_t body_left = 0;  // where its length was told
  bool head_begun = false;      // the reader was given the request's first byte
  bool shut = false;            // closing: our FIN is sent

  EchoQuestion question;
  std::optional<EchoAnswer> answer;  // refers to `question`
  std::string whole;                 // waiting: what is to be sent
};

}  // namespace detail

class EchoServer {
 public:
  explicit EchoServer(EchoOptions options) : options_(std::move(options)), reader_(options_.models) {}
  EchoServer(const EchoServer&) = delete;
  EchoServer& operator=(const EchoServer&) = delete;
  ~EchoServer() { stop(); }

  // Listens on a port of 127.0.0.1 that the kernel chooses, and serves. 0, or errno. At most once.
  int start() {
    if (const int error = net_.open()) return error;
    const auto opened = EpollNet::listen(*parse_address("127.0.0.1", 0));
    if (opened.outcome != SocketOutcome::ok) return opened.error;
    listener_ = opened.socket;
    address_ = opened.peer;
    if (!net_.watch_listener(listener_, kListenerToken)) return errno;
    thread_ = start_thread("nexus-echo", [this] { run(); });
    return thread_.joinable() ? 0 : EAGAIN;
  }

  Address address() const { return address_; }

  // Cuts every connection and ends the thread.
  void stop() {
    if (thread_.joinable()) {
      stopping_.store(true, std::memory_order_relaxed);  // the eventfd orders it
      net_.wake();
      thread_.join();
    }
    net_.close(listener_);
  }

 private:
  using Session = detail::EchoSession;
  using State = Session::State;
  enum class Step : std::uint8_t { again, wait, gone };

  static constexpr std::uint8_t kListenerKind = 1;
  static constexpr std::uint8_t kSessionKind = 2;
  static constexpr Handle kListenerToken = Handle::make(kListenerKind, 0, 0);
  static constexpr int kStepsPerTurn = 64;  // of one connection, before the others have theirs

  // ---- the loop ----

  void run() {
    std::array<Event, EpollNet::kMaxEvents> events;
    while (!stopping_.load(std::memory_order_relaxed)) {
      bool woken = false;
      const std::size_t count = net_.wait(events, busy_.empty() ? wheel_.next() : Ns{0}, woken);
      now_ = net_.now();
      wheel_.fire(now_, [this](Handle token) { on_timer(token); });
      for (std::size_t i = 0; i < count; ++i) {
        if (events[i].token == kListenerToken) {
          on_listener();
        } else if (Session* session = sessions_.get(events[i].token)) {
          session->io.note(events[i]);
          advance(*session);
        }
      }
      turn_.swap(busy_);
      for (const Handle token : turn_) {
        if (Session* session = sessions_.get(token)) advance(*session);
      }
      turn_.clear();
    }
    sessions_.each([this](Session& session) { drop(session); });
    wheel_.cancel(accept_timer_);
  }

  void on_listener() {
    for (;;) {
      auto opened = net_.accept(listener_);
      if (opened.outcome == SocketOutcome::again) return;
      if (opened.outcome != SocketOutcome::ok) {
        // The listener would be told of again at once: give what is lacking some time to come back.
        net_.unwatch(listener_);
        wheel_.arm(accept_timer_, now_ + kEchoAcceptPauseNs);
        return;
      }
      Session* session = sessions_.live() < kMaxEchoSessions ? sessions_.make(opened.socket) : nullptr;
      if (session == nullptr) {
        net_.close(opened.socket);
        continue;
      }
      if (!net_.watch(opened.socket, session->token)) {
        drop(*session);
        continue;
      }
      await_request(*session);
      set_timer(*session);
    }
  }

  void on_timer(Handle token) {
    if (token == kListenerToken) {
      if (!net_.watch_listener(listener_, kListenerToken)) wheel_.arm(accept_timer_, now_ + kEchoAcceptPauseNs);
      return;
    }
    Session* session = sessions_.get(token);
    if (session == nullptr) return;
    if (now_ >= give_up_at(*session)) return drop(*session);
    advance(*session);
  }

  static Ns give_up_at(const Session& session) {
    const bool closing = session.state == State::closing && session.io.pending() == 0;
    return session.moved_ns + (closing ? kEchoClosingNs : kEchoIdleNs);
  }

  void set_timer(Session& session) {
    Ns deadline = give_up_at(session);
    const bool answering = session.state == State::waiting || session.state == State::streaming;
    if (answering && session.io.pending() == 0) deadline = session.due_ns;
    wheel_.arm(session.timer, deadline);
  }

  void drop(Session& session) {
    session.io.close(net_);
    sessions_.destroy(session.token);
  }

  // ---- one session ----

  // Does what can be done now: until it must wait for the client or for time, or until the others have their turn.
  void advance(Session& session) {
    const std::size_t unsent = session.io.pending();
    if (!session.io.flush(net_)) return drop(session);
    if (session.io.pending() < unsent) session.moved_ns = now_;
    for (int i = 0; i < kStepsPerTurn; ++i) {
      const Step next = step(session);
      if (next == Step::gone) return drop(session);
      if (next == Step::wait) return set_timer(session);
    }
    busy_.push_back(session.token);
    set_timer(session);
  }

  Step step(Session& session) {
    switch (session.state) {
      case State::head: return session.io.pending() > 0 ? until_hangup(session) : on_head(session);
      case State::body: return on_body(session);
      case State::waiting: return on_waiting(session);
      case State::streaming: return on_streaming(session);
      case State::closing: return on_closing(session);
    }
    return Step::gone;
  }

  static Step until_hangup(const Session& session) { return session.io.hangup() ? Step::gone : Step::wait; }

  void await_request(Session& session) {
    session.state = State::head;
    session.moved_ns = now_;
    session.head_begun = false;
    session.head = RequestHead{};
    session.reader.start(&session.fields);
    session.decoder = ChunkedDecoder{};
    session.body.clear();
    session.answer.reset();
    session.question = EchoQuestion{};
  }

  // Reads once into `in`.
  Step receive(Session& session) {
    if (!session.io.may_read()) return Step::wait;
    if (!session.in.reserve(pool_, kEchoReadBytes)) return Step::gone;
    const IoResult result = session.io.read(net_, session.in.tail(), session.in.room());
    if (result.ok()) {
      session.in.commit(result.bytes);
      session.moved_ns = now_;
      return Step::again;
    }
    if (session.in.empty()) session.in.clear();  // an idle connection holds no block
    return result.kind == IoResult::Kind::again ? Step::wait : Step::gone;
  }

  Step on_head(Session& session) {
    assert(session.state == State::head);
    Buffer& in = session.in;
    // RFC 9112 2.2: empty lines before a request are passed over.
    while (!session.head_begun && !in.empty() && (*in.data() == '\r' || *in.data() == '\n')) in.consume(1);
    if (in.empty()) return receive(session);
    session.head_begun = true;
    const HeadResult result = session.reader.feed(in.data(), in.size(), session.head);
    if (result.status == HeadResult::Status::failed) return refuse(session, status_of(result.error), result.why);
    const bool done = result.status == HeadResult::Status::done;
    if ((done ? result.head_bytes : in.size()) > kMaxEchoHeadBytes)
      return refuse(session, 431, "The head is too large.");
    return done ? on_head_done(session) : receive(session);
  }

  static unsigned status_of(HeadError error) {
    switch (error) {
      case HeadError::too_many_fields: return 431;
      case HeadError::unknown_coding: return 501;
      case HeadError::bad_expectation: return 417;
      default: return 400;
    }
  }

  Step on_head_done(Session& session) {
    const RequestHead& head = session.head;
    session.route = detail::route_echo(head.method, {session.in.data() + head.target_at, head.target_bytes});
    session.in.consume(head.head_bytes);
    if (head.framing.kind == Framing::Kind::none) return answer(session);
    if (head.framing.kind == Framing::Kind::length && head.framing.length > kMaxEchoBodyBytes)
      return refuse_size(session);
    session.body_left = head.framing.length;
    session.state = State::body;
    if (head.expects_continue && session.in.empty() &&
        !session.io.write(net_, pool_, "HTTP/1.1 100 Continue\r\n\r\n")) {
      return Step::gone;
    }
    return Step::again;
  }

  Step on_body(Session& session) {
    assert(session.state == State::body);
    Buffer& in = session.in;
    if (in.empty()) return receive(session);
    if (session.head.framing.kind == Framing::Kind::length) {
      const std::size_t bytes = static_cast<std::size_t>(std::min<std::uint64_t>(session.body_left, in.size()));
      if (!keep(session, bytes)) return refuse(session, 503, "Too many large requests at once.");
      in.consume(bytes);
      session.body_left -= bytes;
      return session.body_left == 0 ? answer(session) : Step::again;
    }
    const ChunkedDecoder::Result result = session.decoder.decode(in.data(), in.size());
    if (session.body.size() + result.decoded > kMaxEchoBodyBytes) return refuse_size(session);
    if (!keep(session, result.decoded)) return refuse(session, 503, "Too many large requests at once.");
    in.consume(result.consumed);
    if (result.status == ChunkedDecoder::Status::failed) return refuse(session, 400, "The chunked body is broken.");
    return result.status == ChunkedDecoder::Status::done ? answer(session) : Step::again;
  }

  // Adds the first `bytes` of `in` to the body.
  bool keep(Session& session, std::size_t bytes) {
    if (pool_.taken_bytes() + bytes > kMaxEchoMemoryBytes) return false;
    return session.body.append(pool_, {session.in.data(), bytes});
  }

  // ---- answers ----

  Step answer(Session& session) {
    const detail::EchoRoute& route = session.route;
    if (route.status == 404) return respond(session, 404, echo_error_text({404, "There is nothing here.", {}, {}}));
    if (route.status == 405) {
      return respond(session, 405, echo_error_text({405, "This method is not for this path.", {}, {}}));
    }
    const std::int64_t created_s = wall_now() / kSecond;
    if (route.endpoint == EchoEndpoint::models) {
      return respond(session, 200, echo_model_list(reader_.models(), created_s));
    }
    const std::size_t bytes = session.body.size();
    const auto error = reader_.read(route.endpoint, bytes == 0 ? "" : session.body.data(), bytes, session.question);
    session.body.clear();
    if (error) return respond(session, error->status, echo_error_text(*error));
    if (route.endpoint == EchoEndpoint::embeddings) return respond(session, 200, echo_embeddings(session.question));
    session.answer.emplace(route.endpoint, session.question, ++ordinal_, created_s);
    if (session.question.stream) return begin_stream(session);
    session.whole = session.answer->whole();
    session.due_ns = due_after(session.answer->sent());
    session.state = State::waiting;
    return Step::again;
  }

  Ns due_after(std::uint64_t tokens) const {
    const Ns delay = std::max<Ns>(options_.token_delay_ns, 0);
    if (tokens == 0 || delay == 0) return now_;
    if (tokens > static_cast<std::uint64_t>((kNever / 2 - now_) / delay)) return kNever / 2;
    return now_ + delay * static_cast<Ns>(tokens);
  }

  Step on_waiting(Session& session) {
    assert(session.state == State::waiting);
    if (now_ < session.due_ns) return until_hangup(session);
    const std::string text = std::exchange(session.whole, {});
    return respond(session, 200, text);
  }

  Step begin_stream(Session& session) {
    // HTTP/1.0 knows no chunks: there the end of the connection is the end of the answer.
    if (session.head.http_1_0) session.head.keep_alive = false;
    text_ = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n";
    if (!session.head.http_1_0) text_ += "Transfer-Encoding: chunked\r\n";
    text_ += session.head.keep_alive ? "\r\n" : "Connection: close\r\n\r\n";
    if (!session.io.write(net_, pool_, text_)) return Step::gone;
    session.state = State::streaming;
    session.due_ns = due_after(1);
    session.moved_ns = now_;
    text_.clear();
    session.answer->append_opening(text_);
    return write_events(session) ? Step::again : Step::gone;
  }

  Step on_streaming(Session& session) {
    assert(session.state == State::streaming);
    if (session.io.hangup()) return Step::gone;
    if (session.io.pending() > 0) return Step::wait;
    EchoAnswer& answer = *session.answer;
    text_.clear();
    while (answer.tokens_left() && session.due_ns <= now_ && text_.size() < kEchoWriteBytes) {
      answer.append_next_token(text_);
      session.due_ns += std::max<Ns>(options_.token_delay_ns, 0);
    }
    const bool over = !answer.tokens_left();
    if (over) answer.append_closing(text_);
    if (text_.empty()) return Step::wait;
    session.moved_ns = now_;
    if (!write_events(session)) return Step::gone;
    if (!over) return Step::again;
    if (!session.head.http_1_0 && !session.io.write(net_, pool_, "0\r\n\r\n")) return Step::gone;
    return finish(session);
  }

  // Sends `text_` as one chunk.
  bool write_events(Session& session) {
    if (text_.empty()) return true;  // an empty chunk would end the body
    if (session.head.http_1_0) return session.io.write(net_, pool_, text_);
    std::string size(Digits(text_.size(), 16).view());
    size += "\r\n";
    text_ += "\r\n";
    std::array<iovec, 2> parts{iovec{size.data(), size.size()}, iovec{text_.data(), text_.size()}};
    return session.io.write(net_, pool_, parts);
  }

  Step refuse_size(Session& session) { return refuse(session, 413, "The body is larger than 64 MiB."); }

  // An answer behind which the rest of the input has no meaning.
  Step refuse(Session& session, unsigned status, std::string_view why) {
    session.head.keep_alive = false;
    return respond(session, status, echo_error_text({status, std::string(why), {}, {}}));
  }

  Step respond(Session& session, unsigned status, const std::string& body) {
    std::string head = "HTTP/1.1 ";
    head += Digits(status).view();
    head += ' ';
    head += detail::reason_of(status);
    head += "\r\nContent-Type: application/json\r\nContent-Length: ";
    head += Digits(body.size()).view();
    head += "\r\n";
    if (status == 405) head += "Allow: " + std::string(session.route.allow) + "\r\n";
    if (!session.head.keep_alive) head += "Connection: close\r\n";
    if (session.head.keep_alive && session.head.http_1_0) head += "Connection: keep-alive\r\n";
    head += "\r\n";
    const bool head_only = session.head.method == HTTP_HEAD;
    std::array<iovec, 2> parts{iovec{head.data(), head.size()},
                               iovec{const_cast<char*>(body.data()), head_only ? 0 : body.size()}};
    if (!session.io.write(net_, pool_, parts)) return Step::gone;
    return finish(session);
  }

  Step finish(Session& session) {
    const bool stays = session.head.keep_alive;
    await_request(session);
    if (!stays) {
      session.in.clear();
      session.state = State::closing;
    }
    return Step::again;
  }

  // A close with bytes unread would reset the connection and might take the answer with it: so they are read away.
  Step on_closing(Session& session) {
    assert(session.state == State::closing);
    if (session.io.pending() > 0) return Step::wait;
    if (!std::exchange(session.shut, true)) session.io.finish(net_);
    if (!session.io.may_read()) return Step::wait;
    const IoResult result = session.io.read(net_, scratch_.data(), scratch_.size());
    if (result.ok()) return Step::again;
    return result.kind == IoResult::Kind::again ? Step::wait : Step::gone;
  }

  const EchoOptions options_;
  EpollNet net_;
  EpollNet::Socket listener_;
  Address address_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;

  // The thread's own.
  EchoReader reader_;
  Ns now_ = monotonic_now();
  BlockPool pool_;
  TimerWheel wheel_{now_};
  SlotMap<Session> sessions_{kSessionKind};
  Timer accept_timer_{kListenerToken};
  std::vector<Handle> busy_;  // those that stopped at kStepsPerTurn, and those of the turn before
  std::vector<Handle> turn_;
  std::string text_;  // what is written next
  std::array<char, kEchoReadBytes> scratch_;
  std::uint64_t ordinal_ = 0;  // of answers
};

}  // namespace nexus
