// exchange.h
// Owns:     one request on a proxied endpoint, from its head to its metrics record: route, attempts, retries, relay.
// Promises: every request is recorded exactly once, when it is over; what it holds (pending, place, memory) goes back
//           with it; another backend is tried only while no byte went to the client; a broken answer never looks whole.
// Leaves:   reading the request and what follows it on the connection to worker.h; choosing to candidate_picker.h; a
// try at
//           one backend to attempt.h; an answer's head to response.h, its body to response.h; writing to
//           response.h.
// Threads:  its worker's. The session that owns it calls on it for each event and asks state() afterwards.
#pragma once

#include <algorithm>
#include <cassert>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/api/endpoints.h"
#include "nexus/api/errors.h"
#include "nexus/http/body_framing.h"
#include "nexus/http/head_writer.h"
#include "nexus/proxy/asked.h"
#include "nexus/proxy/attempt.h"
#include "nexus/proxy/candidate_picker.h"
#include "nexus/proxy/response.h"
#include "nexus/proxy/tally.h"
#include "nexus/proxy/upstream_pool.h"
#include "nexus/proxy/upstream_request.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {

constexpr Ns kLookAgain = 100 * kMillisecond;  // from the queue, at what was ejected
constexpr Ns kCountAgain = 100 * kMillisecond;
constexpr std::uint32_t kReadsPerTurn = 16;  // of one answer, before others get their turn

template <class Net>
class Exchange {
 public:
  enum class State : std::uint8_t {
    idle,        // no request
    reading,     // opened at its head; the session reads the body
    queued,      // every candidate is full
    connecting,  // to a backend
    sending,     // the request goes out
    awaiting,    // the answer's head
    streaming,   // the answer's body
    finishing,   // all is written; the client's kernel buffer has not taken all of it
    counting,    // all is done, but there was no memory to count it: soon again
    over,        // recorded; the session looks at keep_alive()
  };

  Exchange(Handle owner, WorkerContext<Net>& core, UpstreamPool<Net>& pool, Connection<Net>& client)
      : owner_(owner), context_(core), picker_(core), attempt_(owner, core, pool), client_(core, client) {}
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  State state() const { return state_; }
  bool active() const { return state_ != State::idle && state_ != State::over; }
  bool keep_alive() const { return client_.keep_alive(); }
  bool cut() const { return client_.cut(); }  // the connection must be reset, so that what was sent does not look whole
  Ns deadline() const { return std::min(deadline_, request_deadline_); }

  // A request's head is complete. `client_name` is its address, for the log.
  void open(const Endpoint& endpoint, const RequestHead& head, const char* base, const FieldTable& fields,
            std::string_view client_name) {
    assert(state_ == State::idle);
    state_ = State::reading;
    endpoint_ = &endpoint;
    client_name_ = client_name;
    tally_.started_ns = context_.now;
    client_.open(head.http_1_0, head.keep_alive && !context_.draining);
    snapshot_ = context_.snapshot.again();
    context_.take_request_id(base, &fields, request_id_);
  }

  // Refuses the request; `keep_alive` only where its body was read whole.
  [[gnu::cold]] void refuse(ApiError refusal, bool keep_alive, std::string_view message = {},
                            std::string_view param = {}) {
    assert(active());
    close_upstream();
    leave_backend();
    const ApiErrorRow& row = row_of(refusal);
    if (!keep_alive) client_.end_connection();
    tally_.record.status = row.status;
    tally_.record.error = row.label;
    if (!client_.send_error(refusal, message, param, request_id_)) return client_failed();
    finish();
  }

  // The body is complete: read it, find a backend, and be on the way. `incremental`: where it was skimmed as it came.
  void submit(const RequestView& request, IncrementalJson* incremental) {
    assert(state_ == State::reading);
    request_ = request;
    tally_.complete_ns = context_.now;
    const bool find_messages = snapshot_->any_vision_stated;
    const BodyError error =
        incremental != nullptr
            ? incremental->read(context_.json, request.body, request.body_bytes, facts_, find_messages)
            : context_.json.read_body(request.body, request.body_bytes, facts_, find_messages);
    if (error != BodyError::none) return refuse_body(error);
    asked_.assign(facts_.model.substr(0, kMaxModelBytes));
    entry_ = snapshot_->find(facts_.model);
    tally_.record.stream = facts_.stream && endpoint_->streams;
    if (entry_ == nullptr) return refuse_unknown_model();
    tally_.record.model = entry_->id;
    if (context_.settings().upstream.request_timeout_ns > 0) {
      request_deadline_ = deadline_after(context_.now, context_.settings().upstream.request_timeout_ns);
    }
    if (!take_overall_place()) return refuse(ApiError::overload, true);
    picker_.begin(*snapshot_, *entry_, needs_of(request_, facts_));
    next_attempt();
  }

  // The client is gone: nothing more can be sent to it. Ends the exchange at once.
  [[gnu::cold]] void client_left() {
    assert(active());
    if (state_ == State::counting) return;
    const bool waiting =
        state_ == State::queued || state_ == State::connecting || state_ == State::sending || state_ == State::awaiting;
    tally_.record.disconnect = state_ == State::reading ? DisconnectPhase::request
                               : waiting                ? DisconnectPhase::waiting
                                                        : DisconnectPhase::streaming;
    if (!client_.has_begun()) tally_.record.status = 499;
    // A FIN is the proper end of a body without length: it must not follow half of one.
    const bool answering = state_ == State::streaming || state_ == State::finishing;
    if (answering && answer_.lasts_until_close()) client_.cut_connection();
    tally_.record.error = ErrorType::client_closed;
    if (state_ == State::streaming) note_usage();
    attempt_.end(AttemptOutcome::cancelled);
    close_upstream();
    client_.end_connection();
    tally_.cut_short = true;
    commit();
  }

  // A write to the client failed.
  [[gnu::cold]] void client_failed() {
    if (!client_.out_of_memory()) return client_left();
    context_.slab.limit_hit(Limit::memory);
    tally_.record.error = ErrorType::other;
    if (!client_.has_begun()) tally_.record.status = 499;
    abandon();
  }

  // There was no memory for something on the way, which was left undone.
  void on_no_memory() {
    if (state_ != State::counting) out_of_memory();
  }

  // The process ends: it is counted now or never.
  void count_now() {
    if (state_ != State::counting) return;
    count();
    state_ = State::over;
  }

  // An event of the backend connection in use.
  void on_upstream(const Event& event) {
    assert(attempt_.upstream() != nullptr);
    attempt_.connection().note(event);
    if (state_ == State::connecting) {
      if (event.writable || event.hangup) on_connected();
      return;
    }
    // An answer that is there before the request is sent whole is read first: its connection must not be used again.
    const Upstream<Net>* const upstream = attempt_.upstream();
    if (state_ == State::sending) read_answer();
    if (attempt_.upstream() != upstream) return;
    if (state_ == State::sending && event.writable) send_request();
    if (attempt_.upstream() == upstream && state_ != State::connecting) read_answer();
  }

  // The client's socket took what waited, or the turn comes round again: go on reading, or sending.
  void resume() {
    if (state_ == State::sending) {
      send_request();
    } else if (state_ == State::streaming || state_ == State::awaiting) {
      if (!client_.waits()) {
        if (state_ == State::streaming) note_stall_deadline();
        read_answer();
      } else {
        note_write_deadline();
      }
    } else if (state_ == State::finishing) {
      if (!client_.waits()) return commit();
      note_write_deadline();
    }
  }

  [[gnu::cold]] void on_deadline() {
    switch (state_) {
      case State::queued: return on_queue_deadline();
      case State::connecting:
      case State::sending:
      case State::awaiting: return fail_attempt(AttemptOutcome::timeout, ApiError::backend_timeout);
      case State::streaming:
        if (client_.waits()) return cut_client();
        return break_stream(AttemptOutcome::timeout, ApiError::backend_timeout);
      case State::finishing: return cut_client();
      case State::counting: return count();
      case State::idle:
      case State::reading:
      case State::over: assert(false);
    }
  }

  // A place was granted to this request while it waited.
  [[gnu::cold]] void on_grant() {
    if (state_ != State::queued) return;
    if (const auto next = picker_.take_grant()) return follow(*next);
    arm_queue_deadline();
  }

  // Makes ready for the next request on this connection.
  void reset() {
    assert(!active() && attempt_.upstream() == nullptr);
    state_ = State::idle;
    snapshot_ = SnapshotUse();
    entry_ = nullptr;
    tally_ = Tally{};
    attempt_.reset();
    answer_.reset();
    client_.reset();
    request_deadline_ = deadline_ = queue_deadline_ = kNever;
    asked_.clear();
    last_failure_ = ApiError::no_healthy_backend;
    retry_reason_ = {};
  }

 private:
  // ---- the request ----

  // One of [server] max_pending places, where there is such a limit.
  bool take_overall_place() {
    const std::uint32_t limit = context_.settings().server.max_pending;
    if (limit == 0) return true;
    if (context_.shared.in_flight.fetch_add(1, std::memory_order_relaxed) < limit) {
      overall_place_ = true;
      return true;
    }
    context_.shared.in_flight.fetch_sub(1, std::memory_order_relaxed);
    context_.slab.limit_hit(Limit::max_pending);
    return false;
  }

  [[gnu::cold]] void refuse_body(BodyError error) {
    if (error == BodyError::too_deep) context_.slab.limit_hit(Limit::json_depth);
    if (error == BodyError::out_of_memory) context_.slab.limit_hit(Limit::memory);
    refuse(refusal_of(error), true, {}, error == BodyError::no_model ? "model" : "");
  }

  [[gnu::cold]] void refuse_unknown_model() {
    if (snapshot_->discovering) return refuse(ApiError::no_healthy_backend, true);
    refuse(ApiError::model_not_found, true, unknown_model_message(*snapshot_, asked_), "model");
  }

  // ---- choosing a backend ----

  void next_attempt() { follow(picker_.next()); }

  void follow(typename CandidatePicker<Net>::Next next) {
    using Next = typename CandidatePicker<Net>::Next;
    switch (next) {
      case Next::chosen: return begin_attempt();
      case Next::all_full: return wait_in_queue();
      case Next::queue_full:
        context_.slab.queue_rejected(QueueRejection::full);
        context_.slab.limit_hit(Limit::queue_size);
        return refuse(ApiError::queue_full, true);
      case Next::nothing_left: return refuse(last_failure_, true);
      case Next::unknown_model: return refuse_unknown_model();
      case Next::none_healthy: return refuse(ApiError::no_healthy_backend, true);
      case Next::not_capable: return refuse(ApiError::not_capable, true);
    }
  }

  // Every candidate is at its cap: wait for the first place on any of them.
  [[gnu::cold]] void wait_in_queue() {
    const auto next = picker_.wait_in_queue(owner_);
    if (next != CandidatePicker<Net>::Next::all_full) return follow(next);
    state_ = State::queued;
    // One wait, however often the request is queued: it began with the first.
    if (queue_deadline_ == kNever) {
      queue_deadline_ = deadline_after(context_.now, snapshot_->settings->queue.timeout_ns);
    }
    arm_queue_deadline();
  }

  void arm_queue_deadline() {
    deadline_ = queue_deadline_;
    if (picker_.passed_over_ejected()) deadline_ = std::min(deadline_, context_.now + kLookAgain);
  }

  [[gnu::cold]] void on_queue_deadline() {
    on_grant();  // it may have come just now
    if (state_ != State::queued) return;
    if (context_.now < std::min(queue_deadline_, request_deadline_)) {
      if (const auto next = picker_.look_again()) return follow(*next);
      return arm_queue_deadline();
    }
    context_.slab.queue_rejected(QueueRejection::timeout);
    context_.slab.limit_hit(Limit::queue_timeout);
    refuse(ApiError::queue_timeout, true);
  }

  // ---- an attempt ----

  void begin_attempt() {
    const BackendView& backend = *picker_.backend();
    const Choice& choice = picker_.choice();
    tally_.record.backend = backend.id;
    if (choice.fallback) {
      tally_.record.fell_back = true;
      tally_.record.fallback_from = entry_->target_id;
      tally_.record.fallback_to = choice.model;
    }
    attempt_.begin(backend);
    adds_usage_event_ = asks_for_usage(backend, facts_, tally_.record.stream);
    const std::string& model = *choice.model_name;
    attempt_.compose(request_, facts_, model == entry_->name ? std::string_view() : model, adds_usage_event_,
                     request_id_);
    if (!attempt_.take_kept()) return connect();
    begin_sending();
  }

  [[gnu::cold]] void connect() {
    if (!attempt_.connect()) return fail_attempt(AttemptOutcome::connect_error, ApiError::connect_failed);
    state_ = State::connecting;
    deadline_ = deadline_after(context_.now, snapshot_->settings->upstream.connect_timeout_ns);
  }

  [[gnu::cold]] void on_connected() {
    assert(state_ == State::connecting);
    if (!attempt_.is_connected()) return fail_attempt(AttemptOutcome::connect_error, ApiError::connect_failed);
    // What comes before the request is no answer to it, and no further edge would tell of it.
    if (attempt_.connection().may_read()) {
      char early = 0;
      const IoResult result = attempt_.connection().read(context_.net, &early, 1);
      if (result.ok()) {
        log_bad_answer("it came before the request");
        return fail_attempt(AttemptOutcome::bad_response, ApiError::backend_not_http);
      }
      if (result.kind != IoResult::Kind::again) return fail_attempt(AttemptOutcome::truncated, ApiError::backend_broke);
    }
    begin_sending();
  }

  void begin_sending() {
    state_ = State::sending;
    attempt_.begin_sending();
    tally_.record.reached_backend = true;
    note_first_byte_deadline();
    send_request();
  }

  void send_request() {
    assert(state_ == State::sending);
    const std::size_t sent_before = attempt_.sent_bytes();
    const auto sent = attempt_.send(request_.body);
    if (attempt_.sent_bytes() > sent_before) note_first_byte_deadline();
    switch (sent) {
      case Attempt<Net>::Sent::some: return;
      case Attempt<Net>::Sent::share: return context_.reschedule(owner_);
      case Attempt<Net>::Sent::all:
        state_ = State::awaiting;
        if (picker_.tries() == 1 && attempt_.is_first()) tally_.note_request_sent(attempt_.sent_ns());
        return;
      // A backend may refuse in the middle of a body and close: what it said can still be read.
      case Attempt<Net>::Sent::failed: state_ = State::awaiting; return read_answer();
    }
  }

  // ---- the answer ----

  void read_answer() {
    if (state_ != State::sending && state_ != State::awaiting && state_ != State::streaming) return;
    const std::uint32_t tries = picker_.tries();
    Upstream<Net>* const upstream = attempt_.upstream();
    for (std::uint32_t reads = 0; upstream->connection.may_read(); ++reads) {
      if (state_ == State::streaming && client_.waits()) return note_write_deadline();
      if (reads == kReadsPerTurn) return context_.reschedule(owner_);
      char* scratch = context_.scratch();
      if (scratch == nullptr) return out_of_memory();
      const IoResult result = upstream->connection.read(context_.net, scratch, context_.scratch_bytes());
      switch (result.kind) {
        case IoResult::Kind::again: return;
        case IoResult::Kind::eof: return on_upstream_end(false);
        case IoResult::Kind::failed: return on_upstream_end(true);
        case IoResult::Kind::ok: break;
      }
      attempt_.note_answer();
      if (state_ == State::streaming) {
        relay({}, scratch, result.bytes);
      } else {
        read_head(scratch, result.bytes);
      }
      if (attempt_.upstream() != upstream || picker_.tries() != tries) return;  // this answer is done with
    }
  }

  void read_head(char* data, std::size_t bytes) {
    const ResponseHeadReader::Result result = response_head_.feed(context_.tables, context_.blocks, data, bytes);
    switch (result.status) {
      case ResponseHeadReader::Status::need_more: return;
      case ResponseHeadReader::Status::done: return on_head(result);
      case ResponseHeadReader::Status::out_of_memory: return out_of_memory();
      case ResponseHeadReader::Status::failed:
        log_bad_answer(result.why);
        return fail_attempt(AttemptOutcome::bad_response, ApiError::backend_not_http);
    }
  }

  void on_head(const ResponseHeadReader::Result& result) {
    const std::uint16_t status = result.head.status;
    context_.note_latency(attempt_.backend()->id, context_.now - attempt_.sent_ns());
    if (status == 429 || status >= 500) {
      note_backend_failure(retry_after_of(response_head_.view(result)));
      if (picker_.another()) return retry_after_status(result);
    } else if (picker_.permit().probe()) {
      picker_.permit().succeeded();  // a stream may last for minutes: others need not wait for its end
    }
    begin_relay(result);
  }

  // The answer is thrown away for another backend's. Its connection is kept where the whole of it has come.
  [[gnu::cold]] void retry_after_status(const ResponseHeadReader::Result& result) {
    const ResponseHead& head = result.head;
    BodyDecoder body;
    body.start(head.framing);
    const BodyDecoder::Piece piece = body.feed(result.data + head.head_bytes, result.bytes - head.head_bytes);
    const bool whole = head.framing.kind == Framing::Kind::none || piece.done;
    const AttemptOutcome outcome = status_outcome(head.status);
    attempt_.end(outcome);
    release_upstream(whole && !piece.excess && !piece.failed && head.keep_alive);
    leave_backend();
    last_failure_ = ApiError::backend_broke;
    retry_reason_ = name_of(outcome);
    next_attempt();
  }

  static AttemptOutcome status_outcome(std::uint16_t status) {
    if (status == 429) return AttemptOutcome::status_429;
    return status >= 500 ? AttemptOutcome::status_5xx : AttemptOutcome::ok;
  }

  // The client gets this answer: from here on nothing is retried.
  void begin_relay(const ResponseHeadReader::Result& result) {
    const ResponseHead& head = result.head;
    const HeadView view = response_head_.view(result);
    state_ = State::streaming;
    answer_.begin(head, view, client_.http_1_0(), adds_usage_event_);
    tally_.record.status = head.status;
    tally_.record.error = answer_.is_success() ? ErrorType::none : ErrorType::backend_error;
    tally_.record.stream = answer_.is_success() && answer_.is_event_stream();
    if (answer_.lasts_until_close()) client_.end_connection();
    context_.text.clear();
    write_head(head, view);
    note_stall_deadline();
    relay(context_.text, result.data + head.head_bytes, result.bytes - head.head_bytes);
    response_head_.clear();  // it is not needed any more, and a stream may be long
  }

  void write_head(const ResponseHead& head, const HeadView& view) {
    reason_.clear();
    if (!retry_reason_.empty()) reason_.append("retry after ").append(retry_reason_).append(", ");
    append_reason(reason_, picker_.choice());
    ClientHead to;
    to.backend_line = attempt_.backend()->answer_line;
    to.request_id = request_id_;
    to.route_reason = reason_;
    if (picker_.choice().fallback) to.fallback_model = *picker_.choice().model_name;
    to.framing = answer_.framing();
    to.http_1_0 = client_.http_1_0();
    to.keep_alive = client_.keep_alive();
    append_response_head(context_.text, view, head, to);
  }

  // Passes a piece of the body on; `head` goes in front of it.
  void relay(std::string_view head, char* data, std::size_t bytes) {
    ClientWrite write;
    const Response::Step step = answer_.feed(context_.blocks, context_.json, context_.now, head, data, bytes, write);
    if (step == Response::Step::out_of_memory) return out_of_memory();
    if (step == Response::Step::whole) return end_of_answer(write);
    if (!client_.send(write)) return client_failed();
    if (!tally_.overhead_noted) tally_.note_answer_sent(context_.now, context_.net.now());
    if (step == Response::Step::holds_back) return end_of_body();
    if (step == Response::Step::broken) {
      log_bad_answer("its chunked coding is broken");
      return break_stream(AttemptOutcome::bad_response, ApiError::backend_not_http);
    }
    note_stall_deadline();
  }

  // The body has ended, but the client was not told so yet.
  void end_of_body() {
    ClientWrite write;
    if (answer_.end(context_.blocks, context_.json, write) == Response::Step::out_of_memory) return out_of_memory();
    end_of_answer(write);
  }

  // The answer is whole: the connection goes back, and the client gets the end.
  void end_of_answer(ClientWrite& write) {
    note_usage();
    tally_.record.without_usage = answer_.lacks_usage();
    if (!client_.send(write)) return client_failed();
    const Ns sent_ns = context_.net.now();
    tally_.note_answer_sent(context_.now, sent_ns);
    if (!client_.waits()) tally_.ended_ns = sent_ns;
    picker_.permit().succeeded();
    attempt_.end(status_outcome(answer_.status()));
    release_upstream(answer_.leaves_connection());
    finish();
  }

  void note_usage() {
    answer_.note_usage(tally_.record, tally_.complete_ns, context_.now);
    if (answer_.usage_lost()) context_.slab.limit_hit(Limit::memory);
  }

  // The backend's connection ended.
  [[gnu::cold]] void on_upstream_end(bool broken) {
    if (state_ == State::streaming) {
      if (answer_.ends_with_connection() && !broken && !attempt_.send_failed()) return end_of_body();
      return break_stream(AttemptOutcome::truncated, ApiError::backend_broke);
    }
    if (attempt_.found_closed(state_ == State::sending)) {
      response_head_.clear();
      attempt_.start_over();
      return connect();
    }
    if (attempt_.answered()) log_bad_answer("it ended within its head");
    fail_attempt(AttemptOutcome::truncated, ApiError::backend_broke);
  }

  // ---- ends ----

  // This attempt failed and nothing went to the client: on to the next candidate, or to an error.
  [[gnu::cold]] void fail_attempt(AttemptOutcome outcome, ApiError refusal) {
    note_backend_failure(std::nullopt);
    attempt_.end(outcome);
    close_upstream();
    leave_backend();
    last_failure_ = refusal;
    retry_reason_ = name_of(outcome);
    if (context_.now >= request_deadline_ || !picker_.another()) return refuse(refusal, true);
    next_attempt();
  }

  void note_backend_failure(std::optional<Ns> retry_after) {
    picker_.permit().failed(context_.now, snapshot_->settings->health, retry_after);
  }

  // The answer broke after its head went out: it must not look whole.
  [[gnu::cold]] void break_stream(AttemptOutcome outcome, ApiError refusal) {
    assert(state_ == State::streaming);
    const ApiErrorRow& row = row_of(refusal);
    tally_.record.error = row.label;
    note_usage();
    note_backend_failure(std::nullopt);
    attempt_.end(outcome);
    close_upstream();
    tally_.cut_short = true;
    if (answer_.lasts_until_close()) {
      client_.cut_connection();  // a FIN would be the proper end of this body: only a reset tells
      return commit();
    }
    client_.end_connection();
    if (answer_.is_event_stream() && answer_.is_chunked() && !client_.send_error_event(row)) return commit();
    finish();
  }

  // The client takes nothing: cut it, so that it holds nothing here.
  [[gnu::cold]] void cut_client() {
    context_.slab.limit_hit(Limit::write_timeout);
    tally_.record.error = ErrorType::other;
    if (state_ == State::streaming) note_usage();
    abandon();
  }

  // Nothing more can be sent: the connection is reset, so that what was sent does not look whole.
  [[gnu::cold]] void abandon() {
    attempt_.end(AttemptOutcome::cancelled);
    close_upstream();
    client_.cut_connection();
    tally_.cut_short = true;
    commit();
  }

  [[gnu::cold]] void out_of_memory() {
    context_.slab.limit_hit(Limit::memory);
    if (client_.has_begun()) {
      tally_.record.error = ErrorType::other;
      return abandon();
    }
    attempt_.end(AttemptOutcome::cancelled);
    client_.forget_unsent();
    refuse(ApiError::out_of_memory, state_ != State::reading);
  }

  void release_upstream(bool clean) {
    response_head_.clear();
    attempt_.release(clean);
  }
  void close_upstream() {
    response_head_.clear();
    attempt_.close();
  }

  void leave_backend() {
    picker_.leave();
    attempt_.leave();
  }

  // All is written; over as soon as the kernel has taken it.
  void finish() {
    state_ = State::finishing;
    request_deadline_ = kNever;  // from here on only the client's own time counts
    if (!client_.waits()) return commit();
    note_write_deadline();
  }

  // The client's time to take something runs anew only where it took something.
  void note_write_deadline() {
    if (!client_.has_moved()) return;
    deadline_ = deadline_after(context_.now, context_.settings().server.write_timeout_ns);
  }
  void note_stall_deadline() {
    if (client_.waits()) return note_write_deadline();
    client_.forget_waiting();
    deadline_ = deadline_after(context_.now, snapshot_->settings->upstream.stall_timeout_ns);
  }

  void note_first_byte_deadline() {
    deadline_ = deadline_after(context_.now, snapshot_->settings->upstream.first_byte_timeout_ns);
  }

  // The one place where a request is counted.
  void commit() {
    assert(state_ != State::counting && state_ != State::over && attempt_.upstream() == nullptr);
    leave_backend();
    if (std::exchange(overall_place_, false)) context_.shared.in_flight.fetch_sub(1, std::memory_order_relaxed);
    if (tally_.ended_ns < 0) tally_.ended_ns = context_.net.now();
    tally_.record.duration_ns = tally_.ended_ns - tally_.started_ns;
    if (context_.log.wants_access()) log_access();
    state_ = State::counting;
    count();
  }

  // A count may be late, but it is never lost.
  void count() {
    request_deadline_ = kNever;
    try {
      context_.slab.record(tally_.record);
    } catch (const std::bad_alloc&) {
      context_.slab.limit_hit(Limit::memory);
      deadline_ = context_.now + kCountAgain;
      return;
    }
    deadline_ = kNever;
    state_ = State::over;
  }

  void log_access() {
    AccessEntry entry = tally_.access_entry(answer_.first_body_ns(), client_.sent_bytes());
    entry.wall_ns = wall_now();
    entry.request_id = request_id_;
    entry.client = client_name_;
    entry.method = "POST";
    entry.path = endpoint_->path;
    entry.model = asked_;
    if (attempt_.backend() != nullptr) {
      entry.model_used = *picker_.choice().model_name;
      entry.attempts = picker_.tries();
    }
    if (tally_.record.backend != BackendId::none) entry.backend = attempt_.backend()->name;
    context_.log.access(entry);
  }

  [[gnu::cold]] void log_bad_answer(std::string_view why) {
    context_.log.event(LogLevel::warning, "bad answer from a backend",
                       {{"backend", attempt_.backend()->name}, {"why", why}, {"request_id", request_id_}});
  }

  Handle owner_;
  WorkerContext<Net>& context_;
  State state_ = State::idle;

  // Of the request, from open() on.
  const Endpoint* endpoint_ = nullptr;
  std::string_view client_name_;
  std::string request_id_;
  SnapshotUse snapshot_;
  RequestView request_;
  BodyFacts facts_;
  std::string asked_;
  const ModelEntry* entry_ = nullptr;
  Tally tally_;
  Ns deadline_ = kNever;
  Ns request_deadline_ = kNever;
  Ns queue_deadline_ = kNever;
  bool overall_place_ = false;  // counted in Shared::in_flight

  // Of its attempts.
  CandidatePicker<Net> picker_;
  Attempt<Net> attempt_;
  ResponseHeadReader response_head_;
  bool adds_usage_event_ = false;  // Nexus asked this backend for counts that the client did not ask for
  ApiError last_failure_ = ApiError::no_healthy_backend;  // until one was tried
  std::string_view retry_reason_;
  std::string reason_;  // in words, for the client

  // Of the answer on its way to the client.
  Response answer_;
  ClientResponse<Net> client_;
};

}  // namespace nexus
