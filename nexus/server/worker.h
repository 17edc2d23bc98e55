// worker.h
// Owns:     a worker: its loop, the client connections and what is asked of them.
// Promises: requests of a connection are answered in order, one at a time; every wait has a deadline; what one
//           connection may hold is bounded; a connection is closed with its descriptors, memory and counts; where
//           memory is short it is the connection in hand that ends, with an answer if none was begun (see guarded()).
// Leaves:   taking connections to acceptor.h, proxied requests to exchange.h from their head on, what Nexus answers
//           itself to builtin_pages.h, the fleet to control.h.
// Threads:  run() is the worker thread; post() may be called from any.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <new>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "nexus/api/endpoints.h"
#include "nexus/base/mailbox.h"
#include "nexus/server/acceptor.h"
#include "nexus/server/builtin_pages.h"
#include "nexus/server/session.h"
#include "nexus/server/worker_message.h"

namespace nexus {

constexpr std::uint8_t kDrainTimerKind = 5;  // of a Handle

constexpr std::size_t kFirstReadBytes = 16u << 10;
constexpr std::size_t kMostReadBytes = 128u << 10;  // still in the processor's cache when it is looked at
// Before others get their turn. A turn may come by an event and by reschedule(): a quarter of a megabyte in all, for
// which even the most awkward JSON takes no more than some 3 ms, also on a slow machine.
constexpr std::uint32_t kClientReadsPerTurn = 1;
constexpr std::size_t kMaxLingerBytes = 64u << 20;  // a refused body on its way: reading it away costs little
constexpr Ns kLingerTime = 5 * kSecond;
constexpr Ns kHandOverTime = 100 * kMillisecond;  // of a drain: another worker may be handing a connection over
constexpr Ns kFarewellTime = kSecond;             // of a drain: kept connections get to see our FIN
constexpr Ns kFirstRequestTime = kSecond;         // of a drain: a request may be on its way, or begun

template <class Net>
class Worker {
 public:
  using Adopt = typename WorkerMessage<Net>::Adopt;
  using NewSnapshot = typename WorkerMessage<Net>::NewSnapshot;
  using RenderedPage = typename WorkerMessage<Net>::RenderedPage;
  using Grant = typename WorkerMessage<Net>::Grant;
  using Drain = typename WorkerMessage<Net>::Drain;
  using Stop = typename WorkerMessage<Net>::Stop;
  using Message = typename WorkerMessage<Net>::Any;

  // What the workers know of each other, and how they ask for pages.
  struct Peers {
    std::vector<Worker*> workers;
    Placement placement;
    std::function<bool(std::uint32_t worker, Handle session, PageKind kind)> ask_page;  // false: there is no memory
  };

  Worker(Net& net, Shared& shared, Slab& slab, Log log, std::uint32_t index, std::uint64_t seed, SnapshotPtr snapshot,
         Peers& peers, Ns process_started)
      : log_(std::move(log)),
        context_(net, shared, slab, log_, index, seed, std::move(snapshot)),
        pool_(context_),
        sessions_(kSessionKind),
        peers_(peers),
        acceptor_(context_),
        own_(context_, process_started),
        drain_timer_(Handle::make(kDrainTimerKind, 0, 0)) {}
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() { close_all(); }

  // Before run(): takes connections from this socket. False where the kernel refuses.
  [[gnu::cold]] bool add_listener(typename Net::Socket listener, bool metrics_only) {
    return acceptor_.add(listener, metrics_only);
  }

  // Any thread. It is posted, or memory is too short, or this worker has ended.
  using Posted = typename Mailbox<Message>::Posted;
  Posted post(Message message) noexcept {
    const Posted posted = put(std::move(message));
    if (posted == Posted::first) context_.net.wake();
    return posted;
  }
  // The same, but whoever puts it there sees to wake().
  Posted put(Message message) noexcept { return mailbox_.post(std::move(message)); }
  void wake() noexcept { context_.net.wake(); }
  // Any thread, from whatever frees a place: it can't fail.
  void grant(Handle session) noexcept {
    if (post(Grant{session}) != Posted::no_memory) return;
    grants_missed_.store(true, std::memory_order_relaxed);  // wake() makes it seen
    context_.net.wake();
  }

  void run() {
    while (!stopped_) turn();
    close_all();
  }

  // One wait and what it brought. The simulator calls this itself.
  void turn() {
    bool woken = false;
    const Ns deadline = context_.again.empty() ? context_.wheel.next() : context_.now;
    const std::size_t count = context_.net.wait(events_, deadline, woken);
    context_.now = context_.net.now();
    const Ns turn_began = context_.now;
    // First, and unasked: who was told by another worker that a backend is healthy must not hear the contrary here.
    if (mailbox_.has_any()) take_messages();
    for (std::size_t i = 0; i < count; ++i) dispatch(events_[i]);
    reschedule();
    context_.wheel.fire(context_.now, [this](Handle token) { on_deadline(token); });
    if (woken && grants_missed_.exchange(false, std::memory_order_relaxed)) look_for_grants();
    if (context_.draining && is_drained()) end_drain();
    context_.slab.loop_stall(context_.net.now() - turn_began);
  }

  bool stopped() const { return stopped_; }
  std::size_t connections() const { return sessions_.live(); }
  std::size_t upstreams() const { return pool_.open(); }
  std::size_t armed_timers() const { return context_.wheel.armed(); }
  std::size_t taken_bytes() const { return context_.blocks.taken_bytes(); }

 private:
  using SessionT = Session<Net>;
  using State = typename SessionT::State;

  // ---- where memory is short ----

  // Runs what is to be done for one session. Blocks and slots say "no memory" as a value; what throws are the strings
  // and lists of a request's way, and their owner has to be able to go on from there: an exchange is then ended, and
  // counted, from whatever state it was left in.
  template <class Work>
  void guarded(Handle token, Work&& work) {
    try {
      work();
    } catch (const std::bad_alloc&) {
      on_no_memory(token);
    }
  }

  // Says so where an answer can still be given, and ends the connection where not even for that there is memory.
  void on_no_memory(Handle token) {
    SessionT* session = sessions_.get(token);
    if (session == nullptr) return context_.slab.limit_hit(Limit::memory);
    try {
      if (session->exchange.active()) {
        session->state = State::exchanging;
        session->exchange.on_no_memory();
      } else {
        context_.slab.limit_hit(Limit::memory);
        switch (session->state) {
          case State::reading_head:
            if (session->input.empty()) return client_gone(*session);  // nothing was asked: nothing to answer
            own_.refuse_head(*session, ApiError::out_of_memory);
            break;
          case State::waiting_page: own_.answer_error(*session, ApiError::out_of_memory); break;
          default: return client_gone(*session);
        }
      }
      drive(*session);
    } catch (const std::bad_alloc&) {
      if ((session = sessions_.get(token)) != nullptr) client_gone(*session);
    }
  }

  // ---- events ----

  void dispatch(const Event& event) {
    switch (event.token.kind()) {
      case kListenerKind: return acceptor_.on_event(event.token, placer());
      case kSessionKind:
        if (SessionT* session = sessions_.get(event.token)) {
          guarded(event.token, [&] { on_session(*session, event); });
        }
        return;
      case kUpstreamKind:
        if (Upstream<Net>* upstream = pool_.get(event.token)) on_upstream(*upstream, event);
        return;
      default: assert(false);
    }
  }

  void on_session(SessionT& session, const Event& event) {
    session.connection.note(event);
    if (event.writable && session.connection.pending() > 0 && !session.connection.flush(context_.net)) {
      return client_gone(session);
    }
    if (session.state == State::exchanging) {
      if (event.writable) session.exchange.resume();  // first: its last byte may just have gone
      if (event.hangup && session.exchange.active()) return client_gone(session);
    }
    drive(session);
  }

  void on_upstream(Upstream<Net>& upstream, const Event& event) {
    if (upstream.owner.value == 0) return pool_.on_idle_event(upstream, event);
    SessionT* session = sessions_.get(upstream.owner);
    assert(session != nullptr && session->state == State::exchanging);
    guarded(session->token, [&] {
      session->exchange.on_upstream(event);
      drive(*session);
    });
  }

  void on_deadline(Handle token) {
    switch (token.kind()) {
      case kUpstreamKind: return pool_.on_deadline(token);
      case kAcceptTimerKind: return acceptor_.resume();
      case kDrainTimerKind: return on_drain_deadline();
      case kSessionKind:
        if (SessionT* session = sessions_.get(token)) guarded(token, [&] { on_session_deadline(*session); });
        return;
      default: assert(false);
    }
  }

  // Those whose reading stopped at its budget.
  void reschedule() {
    again_.swap(context_.again);
    for (const Handle token : again_) {
      SessionT* session = sessions_.get(token);
      if (session == nullptr) continue;
      guarded(token, [&] {
        if (session->state == State::exchanging) session->exchange.resume();
        drive(*session);
      });
    }
    again_.clear();
  }

  void take_messages() {
    mailbox_.take(messages_);
    for (Message& message : messages_) {
      std::visit([this](auto& m) { this->on_message(m); }, message);
    }
    messages_.clear();
  }

  void on_message(Adopt& adopt) { add_session(adopt.socket, adopt.peer, adopt.metrics_only); }
  void on_message(NewSnapshot& m) {
    context_.use(std::move(m.snapshot));
    pool_.forget_departed(*context_.snapshot);
    const LogSettings& log = context_.settings().log;
    log_.configure(log_config(log, log_.config().journald));
  }
  void on_message(Grant& grant) {
    if (SessionT* session = sessions_.get(grant.session)) look_for_grant(*session);
  }
  void on_message(RenderedPage& page) {
    SessionT* session = sessions_.get(page.session);
    if (session == nullptr || session->state != State::waiting_page) return;
    guarded(page.session, [&] {
      own_.begin_page(*session, std::move(page.body), page.kind);
      drive(*session);
    });
  }
  void on_message(Drain&) {
    acceptor_.stop(placer());  // who was let in before is served
    context_.draining = true;
    drain_began_ns_ = context_.now;
    context_.wheel.arm(drain_timer_, context_.now + kHandOverTime);  // so that is_drained() is asked again
  }
  void on_message(Stop&) { stopped_ = true; }
  void on_message(Heartbeat& ping) { ping.answer(); }

  void look_for_grant(SessionT& session) {
    if (session.state != State::exchanging) return;
    guarded(session.token, [&] {
      session.exchange.on_grant();
      drive(session);
    });
  }
  void look_for_grants() {
    sessions_.each([this](SessionT& session) { look_for_grant(session); });
  }

  // ---- accepting ----

  auto placer() {
    return [this](typename Net::Socket socket, const Address& peer, bool metrics_only) {
      place(socket, peer, metrics_only);
    };
  }

  // Keeps a new connection, or hands it to another worker.
  [[gnu::cold]] void place(typename Net::Socket socket, const Address& peer, bool metrics_only) {
    const auto worker = peers_.placement.take(context_.worker, context_.settings().server.max_connections);
    if (!worker) {
      context_.slab.limit_hit(Limit::max_connections);
      return own_.turn_away(socket);
    }
    if (*worker != context_.worker) {
      const Posted posted = peers_.workers[*worker]->post(Adopt{socket, peer, metrics_only});
      if (posted != Posted::no_memory && posted != Posted::closed) return;
      peers_.placement.move(*worker, context_.worker);
    }
    add_session(socket, peer, metrics_only);
  }

  // For a connection that place() counted.
  [[gnu::cold]] void add_session(typename Net::Socket socket, const Address& peer, bool metrics_only) {
    SessionT* session = sessions_.make(context_, pool_, socket, peer, metrics_only);
    if (session == nullptr || !context_.net.watch(socket, session->token)) {
      context_.slab.limit_hit(Limit::memory);
      if (session != nullptr) sessions_.destroy(session->token);
      peers_.placement.give_back(context_.worker);
      return context_.net.close(socket);
    }
    context_.slab.add_client_connections(1);
    context_.wheel.arm(session->timer, deadline_after(context_.now, context_.settings().server.header_timeout_ns));
  }

  // ---- a session's course ----

  // Goes on until the session waits for something, and arms its deadline. The session may be gone afterwards.
  void drive(SessionT& session) {
    std::uint32_t reads = 0;
    for (;;) {
      switch (session.state) {
        case State::reading_head:
        case State::reading_body: {
          const Progress progress = session.state == State::reading_head ? parse_head(session) : parse_body(session);
          if (progress == Progress::moved) break;
          if (!session.connection.may_read()) return;
          if (++reads > kClientReadsPerTurn) return context_.reschedule(session.token);
          if (!read_more(session)) return;
          break;
        }
        case State::exchanging:
          if (session.exchange.active()) {
            if (session.exchange.state() == Exchange<Net>::State::streaming) release_request(session);
            return arm(session, session.exchange.deadline());
          }
          if (!end_exchange(session)) return;
          break;
        case State::waiting_page: return;
        case State::sending_page:
          switch (own_.send_page(session)) {
            case BuiltinPages<Net>::Sent::whole: break;
            case BuiltinPages<Net>::Sent::share: return context_.reschedule(session.token);
            case BuiltinPages<Net>::Sent::waits: return;
            case BuiltinPages<Net>::Sent::failed: return close(session);
          }
          break;
        case State::answering:
          if (session.connection.pending() > 0) return;
          if (!end_answer(session)) return;
          break;
        case State::lingering: return linger(session);
      }
    }
  }

  enum class Progress : std::uint8_t { waiting, moved };

  void arm(SessionT& session, Ns deadline) { context_.wheel.arm(session.timer, deadline); }

  // Reads once into the session's input. False where the session is gone.
  bool read_more(SessionT& session) {
    const std::size_t wanted = session.state == State::reading_body
                                   ? session.body.room_wanted(session.head, session.input, kFirstReadBytes,
                                                              context_.settings().server.max_body_bytes)
                                   : kFirstReadBytes;
    if (session.input.room() == 0 || session.state == State::reading_body) {
      if (!session.input.reserve(context_.blocks, wanted)) {
        context_.slab.limit_hit(Limit::memory);
        if (session.exchange.active()) {
          refuse_body(session, ApiError::out_of_memory);
          return true;
        }
        close(session);
        return false;
      }
    }
    const std::size_t bytes = std::min(session.input.room(), kMostReadBytes);
    const IoResult result = session.connection.read(context_.net, session.input.tail(), bytes);
    switch (result.kind) {
      case IoResult::Kind::ok: session.input.commit(result.bytes); return true;
      case IoResult::Kind::again: return true;
      case IoResult::Kind::eof:
      case IoResult::Kind::failed: client_gone(session); return false;
    }
    return false;
  }

  // ---- the head ----

  Progress parse_head(SessionT& session) {
    skip_empty_line(session);
    if (session.input.size() == session.parsed) return Progress::waiting;
    const ServerSettings& server = context_.settings().server;
    if (!session.head_started) {
      session.fields = context_.tables.take();
      if (!session.fields) {
        context_.slab.limit_hit(Limit::memory);
        return refuse_head(session, ApiError::out_of_memory);
      }
      session.head_started = true;
      session.reader.start(session.fields.get());
      arm_head_deadline(session);
    }
    session.parsed = session.input.size();
    const HeadResult result = session.reader.feed(session.input.data(), session.parsed, session.head);
    if (result.status == HeadResult::Status::failed) {
      if (result.error == HeadError::too_many_fields) return refuse_large_head(session);
      context_.slab.http_rejected(HttpRejection::malformed);
      context_.log.event(LogLevel::debug, "malformed request", {{"client", session.client_name}, {"why", result.why}});
      return refuse_head(session, ApiError::malformed);
    }
    if (result.status == HeadResult::Status::need_more) {
      if (session.parsed >= server.max_header_bytes) return refuse_large_head(session);
      return Progress::waiting;
    }
    if (result.head_bytes > server.max_header_bytes) return refuse_large_head(session);
    on_head(session);
    return Progress::moved;
  }

  // The head's time runs from its first byte; a new connection's from its beginning, which is armed already.
  void arm_head_deadline(SessionT& session) {
    const Ns deadline = deadline_after(context_.now, context_.settings().server.header_timeout_ns);
    if (!session.timer.armed() || deadline < session.timer.deadline()) arm(session, deadline);
  }

  void skip_empty_line(SessionT& session) {
    if (session.head_started || session.line_skipped || session.input.empty()) return;
    const std::string_view view = session.input.view();
    if (view[0] != '\r') return;
    if (view.size() == 1) {
      session.parsed = 1;
      return;
    }
    session.parsed = 0;
    if (view[1] != '\n') return;
    session.input.consume(2);
    session.line_skipped = true;
  }

  [[gnu::cold]] Progress refuse_large_head(SessionT& session) {
    context_.slab.http_rejected(HttpRejection::header_too_large);
    context_.slab.limit_hit(Limit::max_header);
    return refuse_head(session, ApiError::header_too_large);
  }

  [[gnu::cold]] Progress refuse_head(SessionT& session, ApiError refusal) {
    own_.refuse_head(session, refusal);
    return Progress::moved;
  }

  void on_head(SessionT& session) {
    session.asked = true;
    const char* base = session.input.data();
    std::string_view path(base + session.head.target_at, session.head.target_bytes);
    path = path.substr(0, path.find('?'));
    if (!session.metrics_only) {
      for (const Endpoint& endpoint : kEndpoints) {
        if (path == endpoint.path) return on_endpoint(session, endpoint, base);
      }
    }
    const auto page = own_.answer(session, base, path);
    if (!page || peers_.ask_page(context_.worker, session.token, *page)) return;
    context_.slab.limit_hit(Limit::memory);
    own_.answer_error(session, ApiError::out_of_memory);
  }

  // ---- proxied endpoints ----

  void on_endpoint(SessionT& session, const Endpoint& endpoint, const char* base) {
    const RequestHead& head = session.head;
    if (head.method != HTTP_POST) {
      context_.take_request_id(base, session.fields.get(), session.request_id);
      return own_.answer_error(session, ApiError::method_not_allowed, "Allow: POST\r\n");
    }
    in_flight_ += 1;
    session.state = State::exchanging;
    session.exchange.open(endpoint, head, base, *session.fields, session.client_name);
    if (const auto refusal = refusal_of_head(session, base)) return session.exchange.refuse(*refusal, false);
    session.state = State::reading_body;
    arm(session, deadline_after(context_.now, context_.settings().server.body_timeout_ns));
    const bool body_here = session.input.size() > head.head_bytes;
    if (!head.expects_continue || body_here) return;
    if (session.connection.write(context_.net, context_.blocks, "HTTP/1.1 100 Continue\r\n\r\n")) return;
    session.state = State::exchanging;
    session.exchange.client_failed();
  }

  // What can be said before the body is read.
  std::optional<ApiError> refusal_of_head(SessionT& session, const char* base) {
    const RequestHead& head = session.head;
    const ServerSettings& server = context_.settings().server;
    if (head.refusal == HeadError::unknown_coding) return ApiError::unknown_coding;
    if (head.refusal == HeadError::bad_expectation) return ApiError::bad_expectation;
    if (!is_authorized(server, HeadView{base, session.fields.get(), session.head.head_bytes}))
      return ApiError::unauthorized;
    if (context_.draining) return ApiError::draining;
    if (came_round(HeadView{base, session.fields.get(), session.head.head_bytes}, context_.shared.instance))
      return ApiError::loop_detected;
    return session.body.begin(head, server.max_body_bytes);
  }

  Progress parse_body(SessionT& session) {
    const typename RequestBody<Net>::Step step =
        session.body.read(session.head, session.input, context_.settings().server.max_body_bytes);
    switch (step.status) {
      case RequestBody<Net>::Status::need_more: return Progress::waiting;
      case RequestBody<Net>::Status::whole: return submit(session);
      case RequestBody<Net>::Status::refused: return refuse_body(session, step.refusal);
    }
    assert(false);
    return Progress::waiting;
  }

  [[gnu::cold]] Progress refuse_body(SessionT& session, ApiError refusal) {
    session.state = State::exchanging;
    session.exchange.refuse(refusal, false);
    return Progress::moved;
  }

  Progress submit(SessionT& session) {
    session.state = State::exchanging;
    if (session.connection.hangup()) {  // a FIN behind the request: who does not wait for the answer has left
      session.exchange.client_left();
      return Progress::moved;
    }
    RequestView view;
    view.base = session.input.data();
    view.head = &session.head;
    view.fields = session.fields.get();
    view.body = session.input.data() + session.head.head_bytes;
    view.body_bytes = session.body.bytes();
    view.pass_authorization = context_.settings().server.api_keys.empty();
    session.exchange.submit(view, session.body.incremental());
    session.body.end_incremental();
    return Progress::moved;
  }

  // The exchange is over. False where the session is gone.
  bool end_exchange(SessionT& session) {
    in_flight_ -= 1;
    const bool keep_alive = session.exchange.keep_alive();
    const bool cut = session.exchange.cut();
    session.exchange.reset();
    if (cut) {
      session.connection.reset(context_.net);
      close(session);
      return false;
    }
    if (!keep_alive) return begin_linger(session);
    next_request(session, session.request_released ? 0 : session.head.head_bytes + session.body.bytes());
    return true;
  }

  // The answer has begun, so the request is not sent again: its memory is given back before what may be a long stream.
  void release_request(SessionT& session) {
    if (session.request_released) return;
    session.request_released = true;
    session.input.consume(session.head.head_bytes + session.body.bytes());
    session.fields.give_back();
    session.body.give_back();
  }

  // False where the session is gone.
  bool end_answer(SessionT& session) {
    if (session.connection.failed()) {
      close(session);
      return false;
    }
    if (!session.keep_alive) return begin_linger(session);
    next_request(session, session.head.head_bytes);
    return true;
  }

  // ---- the end of a drain ----

  [[gnu::cold]] void on_drain_deadline() {
    const Ns last_ns = drain_began_ns_ + kFirstRequestTime;
    if (context_.now < last_ns) context_.wheel.arm(drain_timer_, last_ns);
  }

  // Asked while draining only: whether nobody is owed an answer. Who was accepted a moment before the drain, maybe by
  // another worker, has sent a request that did not get here yet; closing would reset it.
  bool is_drained() {
    const Ns drained_for = context_.now - drain_began_ns_;
    if (in_flight_ > 0 || drained_for < kHandOverTime) return false;
    bool owed = false;
    sessions_.each([&](SessionT& session) {
      const bool coming = !session.asked || !session.input.empty();  // a request may be, or is: not for ever
      owed |= session.state != State::reading_head || (coming && drained_for < kFirstRequestTime);
    });
    return !owed;
  }

  // Only connections between two requests are left. They get our FIN; what comes from now on is read away for a while
  // and not answered, which its client can tell: a reset could take with it the answer before.
  void end_drain() {
    sessions_.each([this](SessionT& session) {
      if (begin_linger(session)) arm(session, context_.now + kFarewellTime);
    });
    if (sessions_.live() == 0) stopped_ = mailbox_.close_if_empty();
  }

  // ---- between requests, and the end ----

  // Drops the request in hand (`bytes` of the input) and makes ready for the next.
  void next_request(SessionT& session, std::size_t bytes) {
    session.input.consume(bytes);
    session.parsed = 0;
    session.head_started = false;
    session.line_skipped = false;
    session.fields.give_back();
    session.body.reset();
    session.request_released = false;
    session.keep_alive = true;
    session.state = State::reading_head;
    arm(session, deadline_after(context_.now, context_.settings().server.idle_timeout_ns));
  }

  // Sends our FIN and reads away what still comes, up to a bound. False where the session is gone.
  [[gnu::cold]] bool begin_linger(SessionT& session) {
    session.input.clear();
    session.fields.give_back();
    session.body.give_back();
    session.parsed = 0;
    session.lingered_bytes = 0;
    if (session.connection.failed() || session.connection.hangup()) {
      close(session);
      return false;
    }
    context_.net.shut_write(session.connection.socket());
    session.state = State::lingering;
    arm(session, context_.now + kLingerTime);
    return true;
  }

  [[gnu::cold]] void linger(SessionT& session) {
    char* scratch = context_.scratch();
    while (scratch != nullptr && session.connection.may_read()) {
      const IoResult result = session.connection.read(context_.net, scratch, context_.scratch_bytes());
      if (result.kind == IoResult::Kind::again) return;
      session.lingered_bytes += result.bytes;
      if (!result.ok() || session.lingered_bytes > kMaxLingerBytes) return close(session);
    }
  }

  // The client's connection ended or broke.
  [[gnu::cold]] void client_gone(SessionT& session) {
    if (session.exchange.active()) session.exchange.client_left();
    if (session.exchange.active()) {  // it is not counted yet
      session.state = State::exchanging;
      return arm(session, session.exchange.deadline());
    }
    if (session.exchange.state() == Exchange<Net>::State::over) {
      in_flight_ -= 1;
      if (session.exchange.cut()) session.connection.reset(context_.net);
      session.exchange.reset();
    }
    close(session);
  }

  [[gnu::cold]] void close(SessionT& session) {
    assert(!session.exchange.active());
    session.connection.close(context_.net);
    peers_.placement.give_back(context_.worker);
    context_.slab.add_client_connections(-1);
    sessions_.destroy(session.token);
    acceptor_.resume();
  }

  [[gnu::cold]] void on_session_deadline(SessionT& session) {
    switch (session.state) {
      case State::reading_head: return on_head_deadline(session);
      case State::reading_body:
        context_.slab.limit_hit(Limit::body_timeout);
        refuse_body(session, ApiError::body_timeout);
        return drive(session);
      case State::exchanging: session.exchange.on_deadline(); return drive(session);
      case State::waiting_page: own_.answer_error(session, ApiError::metrics_unavailable); return drive(session);
      case State::sending_page:
      case State::answering: context_.slab.limit_hit(Limit::write_timeout); return close(session);
      case State::lingering: return close(session);
    }
  }

  // An idle connection just ends; one in the middle of a head is told.
  [[gnu::cold]] void on_head_deadline(SessionT& session) {
    if (session.input.empty()) {
      context_.slab.limit_hit(Limit::idle_timeout);
      return close(session);
    }
    context_.slab.http_rejected(HttpRejection::header_timeout);
    context_.slab.limit_hit(Limit::header_timeout);
    refuse_head(session, ApiError::header_timeout);
    drive(session);
  }

  [[gnu::cold]] void close_all() {
    peers_.placement.loads[context_.worker].stopped.store(true, std::memory_order_relaxed);
    do {
      mailbox_.take(messages_);
      for (Message& message : messages_) {  // connections that were handed over and never taken
        Adopt* adopt = std::get_if<Adopt>(&message);
        if (adopt == nullptr) continue;
        context_.net.close(adopt->socket);
        peers_.placement.give_back(context_.worker);
      }
      messages_.clear();
    } while (!mailbox_.close_if_empty());
    sessions_.each([this](SessionT& session) {
      session.exchange.count_now();
      client_gone(session);
    });
  }

  Log log_;
  WorkerContext<Net> context_;
  UpstreamPool<Net> pool_;
  SlotMap<SessionT> sessions_;
  Peers& peers_;
  Mailbox<Message> mailbox_;
  std::vector<Message> messages_;
  std::vector<Handle> again_;
  std::array<Event, Net::kMaxEvents> events_;
  Acceptor<Net> acceptor_;
  BuiltinPages<Net> own_;
  Timer drain_timer_;
  std::atomic<bool> grants_missed_{false};
  bool stopped_ = false;
  Ns drain_began_ns_ = 0;
  std::size_t in_flight_ = 0;  // exchanges
};

}  // namespace nexus
