// session_driver.h
// Owns:     the client connections of one worker, and the course of each: heads, bodies, responses, idle times, ends.
// Promises: requests of a connection are answered in order, one at a time; every wait has a deadline; a connection's
//           memory is bounded; if memory runs out only the connection in hand ends, with an error response if it can.
// Leaves:   accepting to acceptor.h and worker.h; a proxied request after its head to proxy/exchange.h; responses of
//           our own to builtin_pages.h; handshakes, idle times and ends to session_ends.h, which its users include.
// Threads:  its worker's.
// Tested by: tests/worker_test.cpp, tests/hostile_requests_test.cpp, tests/sim, tests/e2e/limits.test.mjs
#pragma once

#include <algorithm>
#include <cassert>
#include <functional>
#include <new>
#include <optional>
#include <string_view>
#include <utility>

#include "nexus/api/endpoints.h"
#include "nexus/base/limits.h"
#include "nexus/server/acceptor.h"
#include "nexus/server/builtin_pages.h"
#include "nexus/server/client_keys.h"
#include "nexus/server/session.h"

namespace nexus {

template <class Net>
class SessionDriver {
 public:
  using Context = WorkerContext<Net>;
  using SessionT = Session<Net>;
  using State = SessionState;
  // Asks the control thread for a page. False if there is no memory for the message.
  using AskPage = std::function<bool(std::uint32_t worker, Handle session, std::uint32_t number, WantedPage page)>;

  // `ask_page` may be set until the first session is added.
  SessionDriver(Context& context, Placement& placement, Acceptor<Net>& acceptor, const AskPage& ask_page,
                Ns process_started)
      : context_(context),
        placement_(placement),
        acceptor_(acceptor),
        ask_page_(ask_page),
        pool_(context),
        sessions_(kSessionKind),
        pages_(context, process_started) {}

  UpstreamPool<Net>& pool() { return pool_; }
  BuiltinPages<Net>& pages() { return pages_; }
  std::size_t live() const { return sessions_.live(); }
  // Objects of requests, which no session holds at rest.
  std::size_t taken_objects() const { return inputs_.taken() + exchanges_.taken(); }
  // Frees what was not needed since the last call. Returns its size, in bytes.
  std::size_t trim() { return inputs_.trim() + exchanges_.trim() + sessions_.trim() + pool_.trim(); }
  // For the simulator: calls `visit(const Session&)` for each session.
  template <class Visit>
  void each(Visit&& visit) {
    sessions_.each(visit);
  }

  // ---- events ----

  // Takes over a connection that placement_ has counted for this worker.
  [[gnu::cold]] void add(typename Net::Socket socket, const Address& peer, ListenerUse use) {
    SessionT* session = sessions_.make(peer, use.metrics_only);
    const auto tls = use.tls ? context_.settings().server.tls : nullptr;
    if (session == nullptr || !context_.make_turn(session->handle)) {
      context_.net.close(socket);
      if (session != nullptr) sessions_.destroy(session->handle);
    } else if (session->connection.adopt(context_.net, socket, session->handle, tls) != SocketOutcome::ok) {
      sessions_.destroy(session->handle);
    } else {
      context_.slab.add_client_connections(1);
      return arm(*session, context_.settings().server.header_timeout_ns);
    }
    context_.slab.limit_hit(Limit::memory);
    placement_.give_back(context_.worker);
  }

  void on_event(const Event& event) {
    with_session(event.token, [&](SessionT& session) { on_client(session, event); });
  }

  void on_upstream(const Event& event) {
    Upstream<Net>* upstream = pool_.get(event.token);
    if (upstream == nullptr) return;
    if (upstream->owner.value == 0) return pool_.on_idle_event(*upstream);
    with_session(upstream->owner, [&](SessionT& session) {
      assert(session.state == State::exchanging);
      session.exchange->on_upstream();
      drive(session);
    });
  }

  // The turn that reschedule() asked for.
  void resume(Handle handle) {
    with_session(handle, [&](SessionT& session) {
      if (session.state == State::exchanging) session.exchange->resume();
      drive(session);
    });
  }

  void on_deadline(Handle handle) {
    with_session(handle, [&](SessionT& session) { on_session_deadline(session); });
  }

  void on_grant(Handle handle) {
    with_session(handle, [&](SessionT& session) {
      if (session.state == State::exchanging) {
        session.exchange->on_grant();
      } else if (session.waits_for_checks()) {
        answer_page(session);
      } else {
        return;
      }
      drive(session);
    });
  }
  // The fleet has changed, or a grant's message was lost for want of memory: every request that waits looks again.
  void look_for_grants() {
    sessions_.each([this](SessionT& session) { on_grant(session.handle); });
  }

  // The page with this number that a session asked for.
  void on_page(Handle handle, std::uint32_t number, std::shared_ptr<const TextBuffer> body, PageKind kind) {
    with_session(handle, [&](SessionT& session) {
      if (session.state != State::waiting_page || session.page_number != number) return;
      pages_.begin_page(session, std::move(body), kind);
      drive(session);
    });
  }

  // ---- the end of a drain ----

  // True if no client is waiting for a response. Called only while draining. A client that was accepted just before the
  // drain may have sent a request that was not received yet; closing would reset it. `first_requests`: wait for those.
  bool is_drained(bool first_requests) {
    if (in_flight_ > 0) return false;
    bool owed = false;
    sessions_.each([&](SessionT& session) {
      const bool coming = !session.asked || !session.input.empty();
      owed |= session.state != State::reading_head || (coming && first_requests);
    });
    return !owed;
  }

  // Ends the connections between two requests; one that has just come is read first.
  [[gnu::cold]] void begin_drain() {
    sessions_.each([this](SessionT& session) {
      if (session.state != State::reading_head) return;
      on_event({.token = session.handle, .readable = true});
    });
  }

  // Sends the FIN on every connection, because a reset could destroy the response before.
  void say_farewell() {
    sessions_.each([this](SessionT& session) { begin_linger(session); });
  }

  [[gnu::cold]] void close_all() {
    sessions_.each([this](SessionT& session) {
      if (session.exchange) session.exchange->give_up();
      client_gone(session);
    });
  }

 private:
  // Runs `work` for one session, if it is still there. Blocks and slots report a lack of memory as a value; strings and
  // vectors on a request's way throw, and the session must go on from wherever that left it.
  template <class Work>
  void with_session(Handle handle, Work&& work) {
    SessionT* session = sessions_.get(handle);
    if (session == nullptr) return;
    try {
      work(*session);
    } catch (const std::bad_alloc&) {
      on_no_memory(handle);
    }
  }

  // Answers 503 if that is still possible; else closes the connection.
  [[gnu::cold]] void on_no_memory(Handle handle) {
    SessionT* session = sessions_.get(handle);
    if (session == nullptr) return context_.slab.limit_hit(Limit::memory);
    try {
      if (session->exchange_active()) {
        session->state = State::exchanging;
        session->exchange->on_no_memory();
      } else {
        context_.slab.limit_hit(Limit::memory);
        const bool reading = session->state == State::reading_head;
        // Nothing was asked, or nothing more can be said.
        if (reading ? session->input.empty() : session->state != State::waiting_page) return client_gone(*session);
        if (reading) {
          pages_.refuse_head(*session, ApiError::out_of_memory);
        } else {
          pages_.answer_error(*session, ApiError::out_of_memory);
        }
      }
      drive(*session);
    } catch (const std::bad_alloc&) {
      if ((session = sessions_.get(handle)) != nullptr) client_gone(*session);
    }
  }

  void on_client(SessionT& session, const Event& event) {
    session.connection.note(event);
    if (session.connection.handshaking() && !finish_handshake(session)) return;
    if (event.writable && session.connection.pending() > 0 && !session.connection.flush(context_.net)) {
      return client_gone(session);
    }
    if (session.state == State::exchanging) {
      if (event.writable) session.exchange->resume();  // first: its last byte may just have gone
      if (event.hangup && session.exchange_active()) return client_gone(session);
    }
    drive(session);
  }

  // ---- a session's course ----

  // Runs steps until the session waits, or is over: then it is gone.
  void drive(SessionT& session) {
    TurnShare share;
    Step next = Step::again;
    while (next == Step::again) next = step(session, share);
    assert(next == Step::over || may_wait(session.state, session.exchange_state()));
  }

  Step step(SessionT& session, TurnShare& share) {
    switch (session.state) {
      case State::reading_head:
        if (share.requests == kRequestsPerTurn && !session.input.empty()) return next_turn(session);
        if (!parse_head(session)) return wait_for_head(session, share);
        share.requests += 1;
        return Step::again;
      case State::reading_body: return parse_body(session) ? Step::again : read_more(session, share);
      case State::exchanging: return follow_exchange(session);
      case State::waiting_page: return Step::wait;
      case State::sending_page: {
        const Step sent = pages_.send_page(session);
        return sent == Step::over ? close(session) : sent;
      }
      case State::answering: return session.connection.pending() > 0 ? Step::wait : end_answer(session);
      case State::lingering: return linger(session, share);
    }
    return Step::over;
  }

  void arm(SessionT& session, Ns span) { arm_at(session, deadline_after(context_.now, span)); }
  void arm_at(SessionT& session, Ns deadline) { context_.wheel.arm(session.timer, deadline); }

  // The session has used its share of this turn.
  Step next_turn(SessionT& session) {
    context_.reschedule(session.handle);
    return Step::wait;
  }

  // Reads once into the session's input.
  Step read_more(SessionT& session, TurnShare& share) {
    if (!session.connection.may_read()) return Step::wait;
    if (++share.reads > kClientReadsPerTurn) return next_turn(session);
    const bool in_body = session.state == State::reading_body;
    const std::size_t wanted =
        in_body ? session.reading->body.room_wanted(session.head, session.input, kFirstReadBytes) : kFirstReadBytes;
    if ((session.input.room() == 0 || in_body) && !session.input.reserve(context_.blocks, wanted)) {
      context_.slab.limit_hit(Limit::memory);
      if (!session.exchange_active()) return begin_linger(session);
      refuse_body(session, ApiError::out_of_memory);
      return Step::again;
    }
    const std::size_t bytes = std::min(session.input.room(), kMostReadBytes);
    const IoResult result = session.connection.read(context_.net, session.input.tail(), bytes);
    context_.events_fresh &= result.bytes <= kFirstReadBytes;  // to parse more takes a while
    if (result.ok()) session.input.commit(result.bytes);
    if (result.ok() || result.kind == IoResult::Kind::again) return Step::again;
    client_gone(session);
    return Step::over;
  }

  // ---- the head ----

  // A drain does not wait for another request on a kept connection.
  Step wait_for_head(SessionT& session, TurnShare& share) {
    const Step read = read_more(session, share);
    const bool idle = read == Step::wait && session.asked && session.input.empty() && !session.connection.may_read();
    return idle && context_.draining ? begin_linger(session) : read;
  }

  // True if the state has changed; false if more bytes are needed. The same for parse_body().
  bool parse_head(SessionT& session) {
    const ServerSettings& server = context_.settings().server;
    const bool was_started = session.head_input.started();
    const auto take = [&] { return begin_request(session); };
    const HeadInput::Status status = session.head_input.read(session.input, take, context_.known_lines, session.head,
                                                             server.max_header_bytes, server.max_fields);
    // A head has header_timeout from its first byte; the first head of a connection, from the connection's start.
    if (!was_started && session.head_input.started() && session.asked) arm(session, server.header_timeout_ns);
    if (status == HeadInput::Status::need_more) return false;
    status == HeadInput::Status::done ? on_head(session) : refuse_head(session, refusal_of(status));
    return true;
  }

  // Takes what the next request needs. Null if there is no memory.
  RequestInput<Net>* begin_request(SessionT& session) {
    session.reading = inputs_.take(context_);
    session.exchange = exchanges_.take(context_, pool_);
    if (!session.reading || !session.exchange) return nullptr;
    session.exchange->attach(session.handle, session.connection);
    return session.reading.get();
  }

  [[gnu::cold]] void refuse_head(SessionT& session, const HeadRefusal& refusal) {
    if (refusal.counted) context_.slab.http_rejected(*refusal.counted);
    if (refusal.limit) context_.slab.limit_hit(*refusal.limit);
    if (refusal.counted == HttpRejection::malformed) {
      context_.log.event(LogLevel::debug, "malformed request",
                         {{"client", session.client_name}, {"why", session.head_input.why()}});
    }
    pages_.refuse_head(session, refusal.error);
  }

  void on_head(SessionT& session) {
    session.asked = true;
    const char* base = session.input.data();
    const std::string_view path = session.head.path(base);
    const ServerSettings& server = context_.settings().server;
    write_cors_lines(session.cors_lines, server, {base, session.fields(), session.head.head_bytes});
    const Listens on = use_of_listener(session.metrics_only, server);
    const Endpoint* endpoint = find_endpoint(path, on);
    if (endpoint != nullptr && endpoint->serves(session.head.method)) return on_endpoint(session, *endpoint, base);
    session.checks_due_ns = 0;
    answer_page(session);
  }

  [[gnu::cold]] void answer_page(SessionT& session) {
    const char* base = session.input.data();
    auto page = pages_.answer(session, base, session.head.path(base));
    if (!page || ask_page_(context_.worker, session.handle, ++session.page_number, *std::move(page))) return;
    context_.slab.limit_hit(Limit::memory);
    pages_.answer_error(session, ApiError::out_of_memory);
  }

  // ---- proxied endpoints ----

  void on_endpoint(SessionT& session, const Endpoint& endpoint, const char* base) {
    const RequestHead& head = session.head;
    in_flight_ += 1;
    session.state = State::exchanging;
    session.exchange->open(endpoint, head, {base, session.fields(), head.head_bytes}, session.client_name,
                           session.cors_lines);
    if (const auto error = error_of_head(session, endpoint, base)) return session.exchange->refuse_unread(*error);
    session.state = State::reading_body;
    arm_body_deadline(session);
    const bool body_here = session.input.size() > head.head_bytes;
    if (!head.expects_continue || body_here) return;
    if (session.connection.write(context_.net, context_.blocks, "HTTP/1.1 100 Continue\r\n\r\n")) return;
    session.state = State::exchanging;
    session.exchange->client_failed();
  }

  // Errors that are known before the body is read.
  std::optional<ApiError> error_of_head(SessionT& session, const Endpoint& endpoint, const char* base) {
    const RequestHead& head = session.head;
    const HeadView view{base, session.fields(), head.head_bytes};
    const ServerSettings& server = context_.settings().server;
    if (head.refusal == HeadError::unknown_coding) return ApiError::unknown_coding;
    if (head.refusal == HeadError::bad_expectation) return ApiError::bad_expectation;
    session.key_checked = !server.api_keys.empty();
    const FoundKey key = find_key(server, view, session.certificate_name);
    session.exchange->use_key(key.index, session.host);
    if (!key.authorized) return ApiError::unauthorized;
    if (context_.draining) return ApiError::draining;
    if (is_loop(view, context_.shared.instance)) return ApiError::loop_detected;
    return session.reading->body.begin(endpoint, head, view, session.host, server.max_body_bytes);
  }

  bool parse_body(SessionT& session) {
    const typename RequestBody<Net>::Step body = session.reading->body.read(session.head, session.input);
    switch (body.status) {
      case RequestBody<Net>::Status::need_more: arm_body_deadline(session); return false;
      case RequestBody<Net>::Status::whole: submit(session); break;
      case RequestBody<Net>::Status::refused: refuse_body(session, body.refusal); break;
    }
    return true;
  }

  void arm_body_deadline(SessionT& session) {
    arm_at(session, std::min(session.reading->body.deadline(), session.exchange->deadline()));
  }

  [[gnu::cold]] void refuse_body(SessionT& session, ApiError error) {
    session.state = State::exchanging;
    session.exchange->refuse_unread(error);
  }

  void submit(SessionT& session) {
    session.state = State::exchanging;
    // A FIN behind the request: a client that does not wait for the response has left.
    if (session.connection.hangup()) return session.exchange->client_left();
    session.exchange->submit(session.request(), session.reading->body.readers());
    session.reading->body.end_incremental();
  }

  Step follow_exchange(SessionT& session) {
    if (!session.exchange_active()) return end_exchange(session);
    if (session.exchange->needs_no_request()) session.release_request();
    arm_at(session, session.exchange->deadline());
    return Step::wait;
  }

  Step end_exchange(SessionT& session) {
    in_flight_ -= 1;
    const bool keep_alive = session.exchange->keep_alive();
    const bool cut = session.exchange->cut();
    const bool whole = !session.exchange->summary().cut_short;
    session.exchange.reset();
    if (cut) {
      session.connection.reset(context_.net);
      return close(session);
    }
    if (!keep_alive) return begin_linger(session, whole);
    return next_request(session);
  }

  Step end_answer(SessionT& session) {
    if (session.connection.failed()) return close(session);
    return session.keep_alive ? next_request(session) : begin_linger(session);
  }

  // ---- between requests, and the end: session_ends.h ----

  Step next_request(SessionT& session);
  // Sends our FIN; from here on received bytes are dropped, up to a bound. `whole`: the response before it is.
  [[gnu::cold]] Step begin_linger(SessionT& session, bool whole = true);
  [[gnu::cold]] Step linger(SessionT& session, TurnShare& share);
  // The client's connection ended or broke.
  [[gnu::cold]] void client_gone(SessionT& session);
  [[gnu::cold]] Step close(SessionT& session);
  [[gnu::cold]] void on_session_deadline(SessionT& session);
  // True if the handshake succeeded, so that bytes can be read. Else the session waits, or is over.
  [[gnu::cold]] bool finish_handshake(SessionT& session);
  // The handshake failed, or had no time left.
  [[gnu::cold]] void end_handshake(SessionT& session);

  Context& context_;
  Placement& placement_;
  Acceptor<Net>& acceptor_;
  const AskPage& ask_page_;
  UpstreamPool<Net> pool_;
  ObjectPool<RequestInput<Net>> inputs_;
  ObjectPool<Exchange<Net>> exchanges_;
  SlotMap<SessionT> sessions_;
  BuiltinPages<Net> pages_;
  std::size_t in_flight_ = 0;  // exchanges
};

}  // namespace nexus
