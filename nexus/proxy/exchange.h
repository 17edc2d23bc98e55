// exchange.h
// Owns:     one request on a proxied endpoint, from its head to its metrics record: route, attempts, retries, response.
// Promises: a request is counted exactly once, when it is over; its counts and memory go back with it; another backend
//           is tried only while no byte went to the client; a broken response never looks whole.
// Leaves:   reading the request, and the connection afterwards, to server/session_driver.h; choosing to
//           candidate_picker.h; a try at one backend to attempt.h; the response's bytes to response.h.
// Threads:  its worker's. The session that owns it calls it for each event and looks at state() afterwards.
// Tested by: tests/sim, tests/hostile, tests/e2e
//
// drive() runs one step after the other until one has to wait. No step calls another step; go() alone changes the
// state. Every failure is a row of kEndings (exchange_state.h), acted on by end().
#pragma once

#include <algorithm>
#include <cassert>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/api/endpoints.h"
#include "nexus/proxy/attempt.h"
#include "nexus/proxy/candidate_picker.h"
#include "nexus/proxy/exchange_state.h"
#include "nexus/proxy/exchange_summary.h"
#include "nexus/proxy/held_counts.h"
#include "nexus/proxy/request_needs.h"
#include "nexus/proxy/response.h"

namespace nexus {

constexpr Ns kRecheckEjected = 100 * kMillisecond;  // how often a queued request re-checks ejected backends
constexpr Ns kCountRetry = 100 * kMillisecond;      // after there was no memory to count a request
constexpr std::uint32_t kReadsPerTurn = 16;         // of one response, before other sessions get their turn

template <class Net>
class Exchange {
 public:
  using State = ExchangeState;
  using Context = WorkerContext<Net>;

  Exchange(Handle owner, Context& context, UpstreamPool<Net>& pool, Connection<Net>& client)
      : owner_(owner), context_(context), picker_(context), attempt_(owner, context, pool), client_(context, client) {}
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  State state() const { return state_; }
  bool active() const { return state_ != State::idle && state_ != State::over; }
  bool keep_alive() const { return client_.keep_alive(); }
  bool cut() const { return client_.cut(); }  // the connection must be reset, so that what was sent does not look whole
  Ns deadline() const { return std::min(deadline_, request_deadline_); }

  // The request's head is complete. `client_name` is the client's address, for the log.
  void open(const Endpoint& endpoint, const RequestHead& head, const char* base, const FieldTable& fields,
            std::string_view client_name) {
    go(State::reading);
    endpoint_ = &endpoint;
    client_name_ = client_name;
    summary_.started_ns = context_.now;
    client_.open(head.http_1_0, head.keep_alive && !context_.draining);
    snapshot_ = context_.snapshot.again();
    context_.take_request_id(base, &fields, request_id_);
  }

  // Refuses the request before its body was read whole: the connection ends with it.
  [[gnu::cold]] void refuse_unread(ApiError error) {
    refuse(error, false);
    drive();
  }

  // The body is complete. `incremental`: its reader, if it was read while it came.
  void submit(const RequestView& request, IncrementalJson* incremental) {
    assert(state_ == State::reading);
    request_ = request;
    summary_.complete_ns = context_.now;
    start_routing(incremental);
    drive();
  }

  // The client closed its connection. Ends the exchange at once.
  [[gnu::cold]] void client_left() {
    assert(active());
    if (state_ == State::counting) return;
    end(Ending::client_left);
    drive();
  }

  // Writing to the client failed outside of the exchange.
  [[gnu::cold]] void client_failed() {
    end(client_ending());
    drive();
  }

  // A step threw std::bad_alloc and was left undone.
  [[gnu::cold]] void on_no_memory() {
    if (state_ != State::counting) end(Ending::out_of_memory);
    drive();
  }

  // The process ends: the last chance to be counted.
  void count_now() {
    if (state_ != State::counting) return;
    deadline_ = kNever;
    count();
    if (state_ != State::over) go(State::over);
  }

  // An event of the backend connection in use.
  void on_upstream(const Event& event) {
    assert(attempt_.upstream() != nullptr);
    attempt_.connection().note(event);
    drive();
  }

  // The client took bytes, or the exchange's next turn has come.
  void resume() {
    if (state_ == State::streaming) arm_stall_deadline();
    drive();
  }

  [[gnu::cold]] void on_deadline() {
    switch (state_) {
      case State::queued: on_queue_deadline(); break;
      case State::connecting:
      case State::sending:
      case State::awaiting: end(Ending::backend_silent); break;
      case State::streaming: end(client_.waits() ? Ending::client_stalled : Ending::backend_silent); break;
      case State::finishing: end(Ending::client_stalled); break;
      case State::counting: break;
      case State::idle:
      case State::reading:
      case State::choosing:
      case State::over: assert(false);
    }
    drive();
  }

  // A place was granted to this request while it waited.
  [[gnu::cold]] void on_grant() {
    if (state_ != State::queued) return;
    take_grant();
    drive();
  }

  // Prepares for the next request on this connection.
  void reset() {
    assert(attempt_.upstream() == nullptr);
    if (state_ == State::over) go(State::idle);
    snapshot_ = SnapshotUse();
    entry_ = nullptr;
    summary_ = ExchangeSummary{};
    attempt_.reset();
    response_.reset();
    client_.reset();
    request_deadline_ = deadline_ = queue_deadline_ = kNever;
    model_.clear();
    last_failure_ = ApiError::no_healthy_backend;
    retry_reason_ = {};
  }

 private:
  using Next = typename CandidatePicker<Net>::Next;

  // ---- the loop ----

  void drive() {
    for (std::uint32_t reads = 0; step(reads) == Step::again;) {
    }
  }

  // One step of the present state. `reads` counts the reads of this turn.
  Step step(std::uint32_t& reads) {
    switch (state_) {
      case State::choosing: return follow(picker_.next());
      case State::connecting: return finish_connecting();
      case State::sending: return send_request(reads);
      case State::awaiting:
      case State::streaming: return read_response(reads);
      case State::finishing: return finish();
      case State::counting: return count();
      case State::reading:
      case State::queued: return Step::wait;
      case State::idle:
      case State::over: return Step::over;
    }
    return Step::over;
  }

  // The only place where the state changes. Sets the deadline that belongs to the new state.
  Step go(State next) {
    assert(may_follow(state_, next));
    state_ = next;
    deadline_ = kNever;
    switch (next) {
      case State::queued: arm_queue_deadline(); break;
      case State::connecting: deadline_ = after(snapshot_->settings->upstream.connect_timeout_ns); break;
      case State::sending:
      case State::awaiting: arm_first_byte_deadline(); break;
      case State::streaming: arm_stall_deadline(); break;
      case State::finishing:
        request_deadline_ = kNever;  // from here on only the client's own time counts
        arm_write_deadline();
        break;
      case State::counting: request_deadline_ = kNever; break;
      default: break;
    }
    return Step::again;
  }

  Ns after(Ns span) const { return deadline_after(context_.now, span); }

  void arm_first_byte_deadline() { deadline_ = after(snapshot_->settings->upstream.first_byte_timeout_ns); }

  void arm_queue_deadline() {
    deadline_ = queue_deadline_;
    if (picker_.passed_over_ejected()) deadline_ = std::min(deadline_, context_.now + kRecheckEjected);
  }

  // Time runs for the client while bytes wait for it, else for the backend.
  void arm_stall_deadline() {
    if (client_.waits()) return arm_write_deadline();
    client_.forget_waiting();
    deadline_ = after(snapshot_->settings->upstream.stall_timeout_ns);
  }

  // The client's time starts anew only if it took bytes.
  void arm_write_deadline() {
    if (client_.has_moved()) write_deadline_ = after(context_.settings().server.write_timeout_ns);
    deadline_ = write_deadline_;
  }

  // ---- the request ----

  void start_routing(IncrementalJson* incremental) {
    const bool find_messages = snapshot_->any_vision_stated;
    const BodyError error =
        incremental != nullptr
            ? incremental->read(context_.json, request_.body, request_.body_bytes, facts_, find_messages)
            : context_.json.read_body(request_.body, request_.body_bytes, facts_, find_messages);
    if (error != BodyError::none) return refuse_body(error);
    model_.assign(facts_.model.substr(0, kMaxModelBytes));
    entry_ = snapshot_->find(facts_.model);
    summary_.record.stream = facts_.stream && endpoint_->streams;
    if (entry_ == nullptr) return refuse_unknown_model();
    summary_.record.model = entry_->id;
    const Settings& settings = context_.settings();
    if (settings.upstream.request_timeout_ns > 0) request_deadline_ = after(settings.upstream.request_timeout_ns);
    if (settings.server.max_pending > 0) {
      overall_place_ = take_overall_place(context_.shared.in_flight, settings.server.max_pending);
      if (!overall_place_) {
        context_.slab.limit_hit(Limit::max_pending);
        return refuse(ApiError::overload, true);
      }
    }
    picker_.begin(*snapshot_, *entry_, needs_of(request_, facts_));
    go(State::choosing);
  }

  [[gnu::cold]] void refuse_body(BodyError error) {
    if (error == BodyError::too_deep) context_.slab.limit_hit(Limit::json_depth);
    if (error == BodyError::out_of_memory) context_.slab.limit_hit(Limit::memory);
    refuse(api_error_of(error), true, {}, error == BodyError::no_model ? "model" : "");
  }

  [[gnu::cold]] void refuse_unknown_model() {
    if (snapshot_->discovering) return refuse(ApiError::no_healthy_backend, true);
    refuse(ApiError::model_not_found, true, unknown_model_message(*snapshot_, model_), "model");
  }

  // Sends an error of Nexus's own in place of a response. `keep_alive` only if the request's body was read whole.
  [[gnu::cold]] void refuse(ApiError error, bool keep_alive, std::string_view message = {},
                            std::string_view param = {}) {
    assert(active());
    close_upstream();
    leave_backend();
    const ApiErrorRow& row = row_of(error);
    if (!keep_alive) client_.end_connection();
    summary_.record.status = row.status;
    summary_.record.error = row.label;
    if (!client_.send_error(error, message, param, request_id_)) return end(client_ending());
    go(State::finishing);
  }

  // ---- choosing a backend, and waiting for one ----

  Step follow(Next next) {
    if (next == Next::all_full) next = picker_.wait_in_queue(owner_);
    switch (next) {
      case Next::chosen: return begin_attempt();
      case Next::all_full: return begin_waiting();
      case Next::queue_full:
        context_.slab.queue_rejected(QueueRejection::full);
        context_.slab.limit_hit(Limit::queue_size);
        refuse(ApiError::queue_full, true);
        break;
      case Next::nothing_left: refuse(last_failure_, true); break;
      case Next::unknown_model: refuse_unknown_model(); break;
      case Next::none_healthy: refuse(ApiError::no_healthy_backend, true); break;
      case Next::not_capable: refuse(ApiError::not_capable, true); break;
    }
    return Step::again;
  }

  // However often a request is queued, it has one queue timeout, which starts with the first wait.
  [[gnu::cold]] Step begin_waiting() {
    if (queue_deadline_ == kNever) queue_deadline_ = after(snapshot_->settings->queue.timeout_ns);
    return go(State::queued);
  }

  void take_grant() {
    if (const auto next = picker_.take_grant()) {
      follow(*next);
    } else {
      arm_queue_deadline();
    }
  }

  [[gnu::cold]] void on_queue_deadline() {
    take_grant();  // one may have been given just now
    if (state_ != State::queued) return;
    if (context_.now < std::min(queue_deadline_, request_deadline_)) {
      if (const auto next = picker_.look_again()) {
        follow(*next);
      } else {
        arm_queue_deadline();
      }
      return;
    }
    context_.slab.queue_rejected(QueueRejection::timeout);
    context_.slab.limit_hit(Limit::queue_timeout);
    refuse(ApiError::queue_timeout, true);
  }

  // ---- an attempt ----

  Step begin_attempt() {
    const BackendView& backend = *picker_.backend();
    const Choice& choice = picker_.choice();
    summary_.record.backend = backend.id;
    if (choice.fallback) {
      summary_.record.fell_back = true;
      summary_.record.fallback_from = entry_->target_id;
      summary_.record.fallback_to = choice.model;
    }
    attempt_.begin(backend);
    adds_usage_event_ = asks_for_usage(backend, facts_, summary_.record.stream);
    const std::string& model = *choice.model_name;
    attempt_.compose(request_, facts_, model == entry_->name ? std::string_view() : model, adds_usage_event_,
                     request_id_);
    return attempt_.take_kept() ? begin_sending() : connect();
  }

  [[gnu::cold]] Step connect() {
    if (attempt_.connect()) return go(State::connecting);
    end(Ending::not_connected);
    return Step::again;
  }

  [[gnu::cold]] Step finish_connecting() {
    const IoResult established = attempt_.connection().establish(context_.net);
    if (established.kind == IoResult::Kind::again) return Step::wait;
    if (!established.ok()) {
      end(Ending::not_connected);
      return Step::again;
    }
    // Bytes received before we sent anything are not a response. Check now: edge-triggered epoll reports them only
    // once.
    if (attempt_.connection().may_read()) {
      char early = 0;
      const IoResult result = attempt_.connection().read(context_.net, &early, 1);
      if (result.ok()) log_bad_response("it came before the request");
      if (result.kind != IoResult::Kind::again) {
        end(result.ok() ? Ending::backend_garbled : Ending::backend_closed);
        return Step::again;
      }
    }
    return begin_sending();
  }

  Step begin_sending() {
    attempt_.begin_sending();
    summary_.record.reached_backend = true;
    return go(State::sending);
  }

  // A response that begins before the request is sent whole is read first: its connection must not be reused.
  Step send_request(std::uint32_t& reads) {
    if (attempt_.connection().may_read()) {
      const Step read = read_response(reads);
      if (state_ != State::sending || read != Step::wait) return read;
    }
    if (!attempt_.connection().may_write()) return Step::wait;
    const std::size_t sent_before = attempt_.sent_bytes();
    const auto sent = attempt_.send(request_.body);
    if (attempt_.sent_bytes() > sent_before) arm_first_byte_deadline();
    switch (sent) {
      case Attempt<Net>::Sent::some: return Step::wait;
      case Attempt<Net>::Sent::share: context_.reschedule(owner_); return Step::wait;
      case Attempt<Net>::Sent::all:
        if (picker_.tries() == 1 && attempt_.is_first()) summary_.note_request_sent(attempt_.sent_ns());
        break;
      case Attempt<Net>::Sent::failed: break;  // a backend may refuse within the body, and close: read what it said
    }
    return go(State::awaiting);
  }

  // ---- the response ----

  // Reads once from the backend and passes on what came.
  Step read_response(std::uint32_t& reads) {
    Connection<Net>& upstream = attempt_.connection();
    if (state_ == State::streaming && client_.waits()) {
      arm_write_deadline();
      return Step::wait;
    }
    if (!upstream.may_read()) return Step::wait;
    if (reads++ == kReadsPerTurn) {
      context_.reschedule(owner_);
      return Step::wait;
    }
    char* scratch = context_.scratch();
    if (scratch == nullptr) {
      end(Ending::out_of_memory);
      return Step::again;
    }
    const IoResult result = upstream.read(context_.net, scratch, context_.scratch_bytes());
    switch (result.kind) {
      case IoResult::Kind::again: return Step::wait;
      case IoResult::Kind::eof:
      case IoResult::Kind::failed: return on_upstream_end(result.kind == IoResult::Kind::failed);
      case IoResult::Kind::ok: break;
    }
    attempt_.note_answer();
    if (state_ == State::streaming) {
      relay({}, scratch, result.bytes);
    } else {
      read_head(scratch, result.bytes);
    }
    return Step::again;
  }

  void read_head(char* data, std::size_t bytes) {
    const ResponseHeadReader::Result result = head_.feed(context_.tables, context_.blocks, data, bytes);
    switch (result.status) {
      case ResponseHeadReader::Status::need_more: return;
      case ResponseHeadReader::Status::done: return on_head(result);
      case ResponseHeadReader::Status::out_of_memory: return end(Ending::out_of_memory);
      case ResponseHeadReader::Status::failed: log_bad_response(result.why); return end(Ending::backend_garbled);
    }
  }

  void on_head(const ResponseHeadReader::Result& result) {
    const std::uint16_t status = result.head.status;
    context_.note_latency(attempt_.backend()->id, context_.now - attempt_.sent_ns());
    if (status == 429 || status >= 500) {
      note_backend_failure(retry_after_of(head_.view(result)));
      if (picker_.another()) return retry_after_status(result);
    } else if (picker_.permit().probe()) {
      picker_.permit().succeeded();  // a stream may last for minutes: others need not wait for its end
    }
    begin_relay(result);
  }

  // Drops the response for another backend's. The connection is kept if the whole response has come.
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
    try_elsewhere(outcome, ApiError::backend_broke);
  }

  static AttemptOutcome status_outcome(std::uint16_t status) {
    if (status == 429) return AttemptOutcome::status_429;
    return status >= 500 ? AttemptOutcome::status_5xx : AttemptOutcome::ok;
  }

  // The client gets this response: from here on nothing is retried.
  void begin_relay(const ResponseHeadReader::Result& result) {
    const ResponseHead& head = result.head;
    const HeadView view = head_.view(result);
    response_.begin(head, view, client_.http_1_0(), adds_usage_event_);
    RequestRecord& record = summary_.record;
    record.status = head.status;
    record.error = response_.is_success() ? ErrorType::none : ErrorType::backend_error;
    record.stream = response_.is_success() && response_.is_event_stream();
    if (response_.lasts_until_close()) client_.end_connection();
    context_.text.clear();
    write_head(head, view);
    go(State::streaming);
    relay(context_.text, result.data + head.head_bytes, result.bytes - head.head_bytes);
    head_.clear();  // not needed any more, and a stream may be long
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
    to.framing = response_.framing();
    to.http_1_0 = client_.http_1_0();
    to.keep_alive = client_.keep_alive();
    append_response_head(context_.text, view, head, to);
  }

  // Passes a piece of the body on, behind `head`.
  void relay(std::string_view head, char* data, std::size_t bytes) {
    ClientWrite write;
    const Response::Step step = response_.feed(context_.blocks, context_.json, context_.now, head, data, bytes, write);
    if (step == Response::Step::out_of_memory) return end(Ending::out_of_memory);
    if (step == Response::Step::whole) return end_response(write);
    if (!client_.send(write)) return end(client_ending());
    if (!summary_.overhead_noted) summary_.note_response_sent(context_.now, context_.net.now());
    if (step == Response::Step::holds_back) return end_body();
    if (step == Response::Step::broken) {
      log_bad_response("its chunked coding is broken");
      return end(Ending::backend_garbled);
    }
    arm_stall_deadline();
  }

  // The body has ended, but the client has not been told so.
  void end_body() {
    ClientWrite write;
    if (response_.end(context_.blocks, context_.json, write) == Response::Step::out_of_memory) {
      return end(Ending::out_of_memory);
    }
    end_response(write);
  }

  // The response is whole: the client gets its end, and the connection goes back to the pool.
  void end_response(ClientWrite& write) {
    note_usage();
    summary_.record.without_usage = response_.lacks_usage();
    if (!client_.send(write)) return end(client_ending());
    const Ns sent_ns = context_.net.now();
    summary_.note_response_sent(context_.now, sent_ns);
    if (!client_.waits()) summary_.ended_ns = sent_ns;
    picker_.permit().succeeded();
    attempt_.end(status_outcome(response_.status()));
    release_upstream(response_.leaves_connection());
    go(State::finishing);
  }

  void note_usage() {
    response_.note_usage(summary_.record, summary_.complete_ns, context_.now);
    if (response_.usage_lost()) context_.slab.limit_hit(Limit::memory);
  }

  [[gnu::cold]] Step on_upstream_end(bool broken) {
    if (state_ == State::streaming) {
      if (response_.ends_with_connection() && !broken && !attempt_.send_failed()) {
        end_body();
      } else {
        end(Ending::backend_closed);
      }
    } else if (attempt_.found_closed(state_ == State::sending)) {
      head_.clear();
      attempt_.start_over();
      return connect();
    } else {
      if (attempt_.answered()) log_bad_response("it ended within its head");
      end(Ending::backend_closed);
    }
    return Step::again;
  }

  // ---- ends ----

  // Ends the attempt in hand, and the exchange if nothing else can be tried. The state is another one afterwards.
  [[gnu::cold]] void end(Ending ending) {
    const EndingRow& row = row_of(ending);
    if (row.limit) context_.slab.limit_hit(*row.limit);
    if (ending == Ending::client_left) summary_.record.disconnect = disconnect_phase();
    if (row.fault == Fault::backend) note_backend_failure(std::nullopt);
    if (state_ == State::streaming) note_usage();
    attempt_.end(row.outcome);
    close_upstream();
    if (client_.has_begun()) return cut_response(row);
    if (!row.error) return abandon(row);
    leave_backend();
    if (row.retry && context_.now < request_deadline_ && picker_.another()) {
      return try_elsewhere(row.outcome, *row.error);
    }
    client_.forget_unsent();
    refuse(*row.error, state_ != State::reading);
  }

  DisconnectPhase disconnect_phase() const {
    if (state_ == State::reading) return DisconnectPhase::request;
    const bool answering = state_ == State::streaming || state_ == State::finishing;
    return answering ? DisconnectPhase::streaming : DisconnectPhase::waiting;
  }

  void note_backend_failure(std::optional<Ns> retry_after) {
    picker_.permit().failed(context_.now, snapshot_->settings->health, retry_after);
  }

  // Nothing went to the client: the next candidate gets the request.
  void try_elsewhere(AttemptOutcome outcome, ApiError error) {
    last_failure_ = error;
    retry_reason_ = name_of(outcome);
    go(State::choosing);
  }

  // The client can't be told anything.
  void abandon(const EndingRow& row) {
    summary_.record.status = 499;
    summary_.record.error = row.error_type;
    summary_.cut_short = true;
    client_.end_connection();
    if (row.cut == Cut::by_reset) client_.cut_connection();
    commit();
  }

  // The response has begun and will not become whole, and the client must be able to tell.
  void cut_response(const EndingRow& row) {
    summary_.record.error = row.error_type;
    summary_.cut_short = true;
    client_.end_connection();
    // The FIN would be the proper end of a body that lasts until the connection's end.
    if (row.cut == Cut::by_reset || response_.lasts_until_close()) client_.cut_connection();
    const bool tell = row.cut == Cut::by_error_event && !client_.cut();
    if (tell && response_.is_event_stream() && response_.is_chunked() &&
        !client_.send_error_event(row_of(*row.error))) {
      return commit();
    }
    if (!tell) return commit();
    go(State::finishing);
  }

  Ending client_ending() const { return client_.out_of_memory() ? Ending::client_unwritable : Ending::client_left; }

  void release_upstream(bool clean) {
    head_.clear();
    attempt_.release(clean);
  }
  void close_upstream() {
    head_.clear();
    attempt_.close();
  }

  void leave_backend() {
    picker_.leave();
    attempt_.leave();
  }

  Step finish() {
    if (client_.waits()) {
      arm_write_deadline();
      return Step::wait;
    }
    commit();
    return Step::again;
  }

  // The one place where a request gets its record: whatever it held is given back, and it is logged.
  void commit() {
    assert(attempt_.upstream() == nullptr);
    leave_backend();
    overall_place_.reset();
    if (summary_.ended_ns < 0) summary_.ended_ns = context_.net.now();
    summary_.record.duration_ns = summary_.ended_ns - summary_.started_ns;
    if (context_.log.wants_access()) log_access();
    go(State::counting);
  }

  // A count may be late, but it is never lost.
  Step count() {
    if (deadline_ != kNever && context_.now < deadline_) return Step::wait;
    try {
      context_.slab.record(summary_.record);
    } catch (const std::bad_alloc&) {
      context_.slab.limit_hit(Limit::memory);
      deadline_ = context_.now + kCountRetry;
      return Step::wait;
    }
    return go(State::over);
  }

  void log_access() {
    AccessEntry entry = summary_.access_entry(response_.first_body_ns(), client_.sent_bytes());
    entry.wall_ns = wall_now();
    entry.request_id = request_id_;
    entry.client = client_name_;
    entry.method = "POST";
    entry.path = endpoint_->path;
    entry.model = model_;
    if (attempt_.backend() != nullptr) {
      entry.model_used = *picker_.choice().model_name;
      entry.attempts = picker_.tries();
    }
    if (summary_.record.backend != BackendId::none) entry.backend = attempt_.backend()->name;
    context_.log.access(entry);
  }

  [[gnu::cold]] void log_bad_response(std::string_view why) {
    context_.log.event(LogLevel::warning, "bad response from a backend",
                       {{"backend", attempt_.backend()->name},
                        {"why", why},
                        {"state", to_string(state_)},
                        {"request_id", request_id_}});
  }

  Handle owner_;
  Context& context_;
  State state_ = State::idle;

  // Of the request, from open() on.
  const Endpoint* endpoint_ = nullptr;
  std::string_view client_name_;
  std::string request_id_;
  SnapshotUse snapshot_;
  RequestView request_;
  BodyFacts facts_;
  std::string model_;  // as the client asked for it
  const ModelEntry* entry_ = nullptr;
  ExchangeSummary summary_;
  Ns deadline_ = kNever;  // of the state
  Ns request_deadline_ = kNever;
  Ns queue_deadline_ = kNever;
  Ns write_deadline_ = kNever;
  OverallPlace overall_place_;

  // Of its attempts.
  CandidatePicker<Net> picker_;
  Attempt<Net> attempt_;
  ResponseHeadReader head_;
  bool adds_usage_event_ = false;  // Nexus asked this backend for counts that the client did not ask for
  ApiError last_failure_ = ApiError::no_healthy_backend;  // until a backend was tried
  std::string_view retry_reason_;
  std::string reason_;  // of the route, for the client

  // Of the response on its way to the client.
  Response response_;
  ClientResponse<Net> client_;
};

}  // namespace nexus
