// echo_backend.h
// Owns:     the built-in backend (`type = echo`): a thread that serves the model of echo_model.h on a loopback port.
// Promises: HTTP/1.1 with keep-alive, whole answers and streams, a delay per token; a client that closes or half-closes
//           is dropped at once; a slow reader pauses its own stream only; buffers are bounded per connection and
//           overall.
// Leaves:   chunked request bodies, 100-continue, streams to HTTP/1.0 and idle timeouts: the only client is Nexus.
// Threads:  start() and stop() belong to the owner's thread; everything else runs in the server's own thread.
// Tested by: tests/echo_backend_test.cpp, tests/e2e/cli.test.mjs, tests/e2e/readme.test.mjs
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>

#include "nexus/apps/echo_model.h"
#include "nexus/base/mailbox.h"
#include "nexus/base/slot_map.h"
#include "nexus/http/head_parser.h"
#include "nexus/http/head_writer.h"
#include "nexus/net/connection.h"
#include "nexus/net/epoll.h"
#include "nexus/net/timer_wheel.h"

namespace nexus {

struct EchoOptions {
  std::vector<std::string> models{"echo"};
  Ns token_delay_ns = 0;  // before each token; a whole answer waits for the sum
};

constexpr std::size_t kMaxEchoHeadBytes = 128u << 10;  // twice the largest max_header: Nexus adds fields of its own
constexpr std::size_t kMaxEchoBodyBytes = 64u << 20;
// Of all buffers; above it, new bytes are answered 503. The texts that are echoed are copies: they may double it.
constexpr std::size_t kMaxEchoMemoryBytes = 1u << 30;
constexpr std::size_t kMaxEchoSessions = 4096;
constexpr std::size_t kEchoTransferBytes = 16u << 10;             // of one read, and roughly of one write to a stream
constexpr auto kEchoAcceptPause = std::chrono::milliseconds(10);  // after accept() failed

class EchoServer {
 public:
  explicit EchoServer(EchoOptions options) { configure(std::move(options)); }
  ~EchoServer() { stop(); }

  // Any thread: later requests get answers by these options.
  void configure(EchoOptions options) {
    auto made = std::make_shared<const EchoOptions>(std::move(options));
    const std::lock_guard lock(options_mutex_);
    options_.swap(made);
  }

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
  // One client's connection.
  struct Session {
    explicit Session(Handle own) : token(own), timer(own) {}

    const Handle token;
    Connection<EpollNet> io;
    Timer timer;
    bool closing = false;  // the last response is sent; what the client still sends is read and dropped
    Buffer in;             // the request, until it is answered, and what came behind it
    FieldTable fields;
    RequestReader reader;
    RequestHead head;  // head_bytes: 0 until it is complete
    EchoQuestion question;
    std::optional<EchoAnswer> answer;  // to `question`: sent when it is due, whole or token by token
    Ns token_delay_ns = 0;             // of `answer`
    Ns due_ns = 0;                     // when its next token is due
  };

  enum class Step : std::uint8_t { again, wait, gone };

  static constexpr std::uint8_t kListenerKind = 1;
  static constexpr std::uint8_t kSessionKind = 2;
  static constexpr Handle kListenerToken = Handle::make(kListenerKind, 0, 0);
  static constexpr int kStepsPerTurn = 64;  // of one connection, before the others have their turn

  // ---- the loop ----

  void run() {
    std::array<Event, EpollNet::kMaxEvents> events;
    while (!stopping_.load(std::memory_order_relaxed)) {
      bool woken = false;
      const std::size_t count = net_.wait(events, wheel_.next(), woken);
      now_ = net_.now();
      wheel_.fire(now_, [this](Handle token) { advance(*sessions_.get(token)); });
      for (std::size_t i = 0; i < count; ++i) {
        if (events[i].token == kListenerToken) {
          accept_clients();
        } else if (Session* session = sessions_.get(events[i].token)) {
          session->io.note(events[i]);
          advance(*session);
        }
      }
    }
    sessions_.each([this](Session& session) { drop(session); });
  }

  void accept_clients() {
    for (;;) {
      auto opened = net_.accept(listener_);
      if (opened.outcome == SocketOutcome::again) return;
      // No descriptor or no memory. The listener is level-triggered: without a pause the loop would spin.
      if (opened.outcome != SocketOutcome::ok) return std::this_thread::sleep_for(kEchoAcceptPause);
      Session* session = sessions_.live() < kMaxEchoSessions ? sessions_.make() : nullptr;
      if (session == nullptr) {
        net_.close(opened.socket);
      } else if (session->io.adopt(net_, opened.socket, session->token) != SocketOutcome::ok) {
        drop(*session);
      } else {
        session->reader.start(&session->fields);
      }
    }
  }

  void drop(Session& session) {
    session.io.close(net_);
    sessions_.destroy(session.token);
  }

  // Takes steps until the session must wait for its client or for time, or until the others have their turn.
  void advance(Session& session) {
    if (!session.io.flush(net_)) return drop(session);
    for (int i = 0; i < kStepsPerTurn; ++i) {
      const Step next = step(session);
      if (next == Step::gone) return drop(session);
      if (next == Step::wait) return;
    }
    wheel_.arm(session.timer, now_);  // goes on at the next tick
  }

  Step step(Session& session) {
    if (session.io.pending() > 0) return session.io.hangup() ? Step::gone : Step::wait;
    if (session.closing) {
      // close() with unread bytes would reset the connection, and the client might lose the response.
      session.io.finish(net_, true);
      return receive(session);
    }
    return session.answer ? on_answering(session) : on_request(session);
  }

  // ---- requests ----

  Step receive(Session& session) {
    if (!session.io.may_read()) return Step::wait;
    const IoResult result = session.io.read(net_, scratch_.data(), scratch_.size());
    if (!result.ok()) return result.kind == IoResult::Kind::again ? Step::wait : Step::gone;
    if (session.closing) return Step::again;
    const bool fits = pool_.taken_bytes() <= kMaxEchoMemoryBytes;
    if (fits && session.in.append(pool_, {scratch_.data(), result.bytes})) return Step::again;
    return cut(session, ApiError::out_of_memory);
  }

  Step on_request(Session& session) {
    Buffer& in = session.in;
    RequestHead& head = session.head;
    if (in.empty()) return receive(session);
    if (head.head_bytes == 0) {
      const HeadResult result = session.reader.feed(in.data(), in.size(), head);
      if (result.status == HeadResult::Status::failed) return cut(session, ApiError::malformed);
      const std::size_t bytes = result.status == HeadResult::Status::done ? result.head_bytes : in.size();
      if (bytes > kMaxEchoHeadBytes) return cut(session, ApiError::header_too_large);
      if (result.status != HeadResult::Status::done) return receive(session);
      if (head.framing.kind == Framing::Kind::chunked) return cut(session, ApiError::unknown_coding);
      if (head.framing.length > kMaxEchoBodyBytes) return cut(session, ApiError::body_too_large);
    }
    return in.size() < request_bytes(head) ? receive(session) : answer(session);
  }

  static std::size_t request_bytes(const RequestHead& head) {
    return head.head_bytes + static_cast<std::size_t>(head.framing.length);
  }

  // ---- answers ----

  Step answer(Session& session) {
    const RequestHead& head = session.head;
    const std::string_view request = session.in.view();
    const EchoEndpoint* endpoint = find_echo_endpoint(head.path(request.data()));
    if (endpoint == nullptr) return refuse(session, {ApiError::not_found});
    if (endpoint->allow.find(method_name(head.method)) == std::string_view::npos) {
      return refuse(session, {ApiError::method_not_allowed}, endpoint->allow);
    }
    const std::shared_ptr<const EchoOptions> options = this->options();
    if (endpoint->read == nullptr) return respond(session, echo_model_list(options->models));
    EchoQuestion& question = session.question;
    const std::string_view body = request.substr(head.head_bytes, static_cast<std::size_t>(head.framing.length));
    if (const auto error = read_echo_question(*endpoint, body, options->models, question)) {
      return refuse(session, *error);
    }
    if (!question.inputs.empty()) return respond(session, echo_embeddings(question));
    question.stream = question.stream && !head.http_1_0;
    session.answer.emplace(question, ++ordinal_);
    session.token_delay_ns = options->token_delay_ns;
    session.due_ns = now_ + session.token_delay_ns;
    if (!question.stream) return Step::again;
    std::string text = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n";
    text.append("Transfer-Encoding: chunked\r\n").append(connection_line(false, head.keep_alive)).append("\r\n");
    std::string events;
    session.answer->append_begin(events);
    return send_events(session, std::move(text), events, false);
  }

  // Sends `events` as one chunk behind `text`.
  Step send_events(Session& session, std::string text, const std::string& events, bool last) {
    if (!events.empty()) text.append(Digits(events.size(), 16).view()).append("\r\n").append(events).append("\r\n");
    if (last) return send_last(session, text + "0\r\n\r\n");
    return session.io.write(net_, pool_, text) ? Step::again : Step::gone;
  }

  Step on_answering(Session& session) {
    if (session.io.hangup()) return Step::gone;
    EchoAnswer& answer = *session.answer;
    std::string text;
    for (; answer.tokens_left() && session.due_ns <= now_ && text.size() < kEchoTransferBytes;
         session.due_ns += session.token_delay_ns) {
      answer.append_token(text);
    }
    const bool last = !answer.tokens_left();
    if (last) answer.append_end(text);
    if (text.empty()) {
      wheel_.arm(session.timer, session.due_ns);
      return Step::wait;
    }
    return session.question.stream ? send_events(session, {}, text, last) : respond(session, text);
  }

  // Refuses a request that is not read to its end, and closes the connection.
  Step cut(Session& session, ApiError error) {
    session.head.keep_alive = false;
    return refuse(session, {error});
  }

  Step refuse(Session& session, const EchoError& error, std::string_view extra_fields = {}) {
    std::string text;
    append_own_error(text, error.error, ErrorShape::openai, {.message = error.message, .param = error.param},
                     own_response(session, extra_fields), session.head.method != HTTP_HEAD);
    return send_last(session, text);
  }

  Step respond(Session& session, const std::string& body) {
    std::string text;
    append_own_head(text, own_response(session), body.size());
    return send_last(session, session.head.method == HTTP_HEAD ? text : text + body);
  }

  static OwnResponse own_response(const Session& session, std::string_view extra_fields = {}) {
    OwnResponse response;
    response.extra_fields = extra_fields;
    response.http_1_0 = session.head.http_1_0;
    response.keep_alive = session.head.keep_alive;
    return response;
  }

  // Sends the last bytes of a response, and waits for the next request, or for the end.
  Step send_last(Session& session, std::string_view text) {
    if (!session.io.write(net_, pool_, text)) return Step::gone;
    session.answer.reset();
    session.question = {};
    if (session.head.keep_alive) {
      session.in.consume(request_bytes(session.head));
      session.reader.start(&session.fields);
      session.head = {};
    } else {
      session.in.clear();
      session.closing = true;
    }
    return Step::again;
  }

  std::shared_ptr<const EchoOptions> options() {
    const std::lock_guard lock(options_mutex_);
    return options_;
  }

  std::mutex options_mutex_;
  std::shared_ptr<const EchoOptions> options_;  // guarded by options_mutex_
  EpollNet net_;
  EpollNet::Socket listener_;
  Address address_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;

  // The thread's own.
  Ns now_ = monotonic_now();
  BlockPool pool_;
  TimerWheel wheel_{now_};
  SlotMap<Session> sessions_{kSessionKind};
  std::array<char, kEchoTransferBytes> scratch_;
  std::uint64_t ordinal_ = 0;  // of answers
};

}  // namespace nexus
