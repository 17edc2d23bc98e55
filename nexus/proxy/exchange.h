// exchange.h
// Owns:     one request on a proxied endpoint, from its head to its metrics record: route, attempts, retries, response.
// Promises: a request is counted exactly once, when it is over; its counts and memory go back with it; another backend
//           is tried only while no byte went to the client; a broken response never looks whole.
// Leaves:   reading the request, and the connection afterwards, to server/session_driver.h; choosing to
//           candidate_picker.h; a try at one backend to attempt.h; the response's bytes to response.h.
// Threads:  its worker's. The session that owns it calls it for each event and looks at state() afterwards.
// Tested by: tests/courses_test.cpp, tests/next_request_test.cpp, tests/hostile_reload_test.cpp, tests/sim, tests/e2e
//
// drive() runs one step after the other until one has to wait. No step calls another step; go() alone changes the
// state. Every failure is a row of kEndings (exchange_state.h), acted on by end().
#pragma once

#include <algorithm>
#include <cassert>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/api/endpoints.h"
#include "nexus/base/limits.h"
#include "nexus/fleet/admission.h"
#include "nexus/proxy/attempt.h"
#include "nexus/proxy/candidate_picker.h"
#include "nexus/proxy/client_key.h"
#include "nexus/proxy/exchange_state.h"
#include "nexus/proxy/exchange_times.h"
#include "nexus/proxy/response_relay.h"

namespace nexus {

template <class Net>
class Exchange {
 public:
  using State = ExchangeState;
  using Context = WorkerContext<Net>;

  Exchange(Context& context, UpstreamPool<Net>& pool)
      : context_(context),
        picker_(context),
        attempt_(context, pool),
        client_(context),
        relay_(context, client_, summary_),
        deadlines_(context, client_) {}

  // It is for the requests of the session `owner` from here on, whose connection is `client`.
  void attach(Handle owner, Connection<Net>& client) {
    assert(state_ == State::idle);
    owner_ = owner;
    attempt_.attach(owner);
    client_.attach(client);
  }

  State state() const { return state_; }
  bool active() const { return state_ != State::idle && state_ != State::over; }
  bool keep_alive() const { return client_.keep_alive(); }
  bool cut() const { return client_.cut(); }  // the connection must be reset, so that what was sent does not look whole
  Ns deadline() const { return deadlines_.next(); }

  // For the tests: what is known of the request so far.
  const ExchangeSummary& summary() const { return summary_; }

  // The request's head is complete. `client_name` is the client's address, for the log; `cors_lines` stay in place
  // until the response has begun.
  void open(const Endpoint& endpoint, const RequestHead& head, const HeadView& view, std::string_view client_name,
            std::string_view cors_lines) {
    go(State::reading);
    endpoint_ = &endpoint;
    summary_.path = endpoint.path;
    summary_.record.endpoint = index_of(endpoint);
    summary_.client_name = client_name;
    summary_.method = method_name(head.method);
    summary_.started_ns = context_.now;
    deadlines_.arm_request();
    client_.open(head.http_1_0, head.keep_alive, cors_lines);
    named_id_ = endpoint.id_hash(head.path(view.base));
    context_.take_request_id(view.base, view.fields, summary_.request_id);
    if (context_.watches) begin_trace(view);
  }

  // The client's key, by its place in the settings' api_keys, and a number of the client's host: from here on the
  // request counts under it.
  void use_key(std::optional<std::size_t> index, std::size_t host) {
    key_.enter(context_, index, host);
    summary_.record.key = key_.id();
  }

  // Refuses the request before its body was read whole: the connection ends with it.
  [[gnu::cold]] void refuse_unread(ApiError error) {
    refuse(error, false);
    drive();
  }

  // The body is complete. `readers`: what has read it while it came.
  void submit(const RequestView& request, const BodyReaders& readers) {
    assert(state_ == State::reading);
    request_ = request;
    summary_.complete_ns = context_.now;
    body_bytes_ = request.body_bytes;
    start_routing(readers);
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

  // An event of the backend connection in use, which has noted it.
  void on_upstream() {
    assert(attempt_.upstream() != nullptr);
    drive();
  }

  // The client took bytes, or the exchange's next turn has come.
  void resume() {
    if (state_ == State::streaming) deadlines_.note_taken();
    drive();
  }
  // True if the response has begun and no more of the request is sent.
  bool needs_no_request() const { return state_ == State::streaming && !sends_on_; }

  [[gnu::cold]] void on_deadline();

  // The process ends: the client is told what it can still be told, and the exchange is counted.
  [[gnu::cold]] void give_up();

  // While this request waited, a place was granted to it, or the fleet has changed.
  [[gnu::cold]] void on_grant() {
    if (state_ == State::expecting && snapshot_ != context_.snapshot) {
      go(State::choosing);
      return drive();
    }
    if (state_ != State::queued) return;
    follow_or_wait(look_at_fleet() ? picker_.look_again() : picker_.take_grant());
    drive();
  }

  // Prepares for the next request on this connection.
  void reset() {
    assert(attempt_.upstream() == nullptr);
    if (state_ == State::over) go(State::idle);
    snapshot_ = SnapshotUse();
    entry_ = nullptr;
    summary_.reset();
    key_.forget();
    attempt_.reset();
    relay_.reset();
    client_.reset();
    deadlines_.reset();
    last_failure_ = ApiError::no_healthy_backend;
    failure_ = retry_reason_ = {};
    kept_.reset();
    answer_failed_ = keeping_ = facts_.stream = false;
    asked_without_usage_ = BackendId::none;
    body_bytes_ = 0;
    reason_.clear();
  }

 private:
  using Next = typename CandidatePicker<Net>::Next;
  // The answer in hand may be about Nexus's own wish for counts, or about the path: it is held until it is whole.
  enum class Doubt : std::uint8_t { none, usage, path };

  // ---- the loop ----

  void drive() {
    for (std::uint32_t reads = 0; step(reads) == Step::again;) {
    }
  }

  // One step of the present state. `reads` counts the reads of this turn.
  Step step(std::uint32_t& reads) {
    switch (state_) {
      case State::choosing: look_at_fleet(); return follow(picker_.next());
      case State::connecting: return finish_connecting();
      case State::sending: return send_request(reads);
      case State::holding:
      case State::streaming:
        if (sends_on_ && reads == 0) [[unlikely]]
          send_on();
        [[fallthrough]];
      case State::awaiting: return read_response(reads);
      case State::finishing: return finish();
      case State::counting: return count();
      case State::reading:
      case State::expecting:
      case State::queued: return Step::wait;
      case State::idle:
      case State::over: return Step::over;
    }
    return Step::over;
  }

  // The only place where the state changes.
  Step go(State next) {
    assert(may_follow(state_, next));
    summary_.end_wait(state_, context_.now);
    state_ = next;
    deadlines_.enter(next);
    return Step::again;
  }

  // ---- the request ----

  void start_routing(const BodyReaders& readers) {
    snapshot_ = context_.snapshot.again();
    const auto error = read_body(context_.json, *endpoint_, readers, request_, snapshot_->any_vision_stated, facts_);
    if (error) return refuse_body(*error);
    summary_.model.assign(facts_.model.substr(0, kMaxModelBytes));
    entry_ = snapshot_->find(facts_.model);
    summary_.record.stream = facts_.stream;
    if (!key_.may_use(facts_.model)) return refuse_by_key(Limit::key_model, ApiError::model_not_found);
    if (entry_ == nullptr && !snapshot_->discovering) return refuse_unknown_model();
    if (endpoint_->model == Model::of_admin && snapshot_->admin == BackendId::none)
      return refuse(ApiError::admin_refused, true);
    if (entry_ != nullptr) summary_.record.model = entry_->id;
    const Settings& settings = context_.settings();
    if (settings.server.max_pending > 0) {
      overall_place_ = take_overall_place(context_.shared.in_flight, settings.server.max_pending);
      if (!overall_place_) {
        context_.slab.limit_hit(Limit::max_pending);
        return refuse(ApiError::overload, true);
      }
    }
    if (const auto refusal = key_.charge(context_, *endpoint_, {request_.body, request_.body_bytes}))
      return refuse_by_key(*refusal == ApiError::key_requests ? Limit::key_requests : Limit::key_tokens, *refusal);
    client_.set_rate_lines(key_.rate_lines());
    picker_.begin(key_, request_.body_bytes);
    prepare_choice();
    go(State::choosing);
  }

  // Each choice is made of the fleet and the settings as they are by then: the body may have taken long to come, an
  // attempt to fail, or the queue to move. True if they have changed.
  bool look_at_fleet() {
    if (snapshot_ == context_.snapshot) return false;
    const bool looked_for_images = snapshot_->any_vision_stated;
    snapshot_ = context_.snapshot.again();
    entry_ = snapshot_->find(summary_.model);
    if (entry_ != nullptr) summary_.record.model = entry_->id;
    if (snapshot_->any_vision_stated && !looked_for_images) {
      facts_.has_images = mentions_images(*endpoint_, {request_.body, request_.body_bytes});
    }
    prepare_choice();
    return true;
  }

  void prepare_choice();

  // True if another candidate may be tried. A request whose work goes on after its answer is not sent twice.
  bool another() {
    if (facts_.background && summary_.record.reached_backend) return false;
    look_at_fleet();
    return picker_.another();
  }

  [[gnu::cold]] void refuse_body(ApiError error) {
    facts_ = BodyFacts();  // they may be of the request before
    if (error == ApiError::too_deep) context_.slab.limit_hit(Limit::json_depth);
    if (error == ApiError::out_of_memory) context_.slab.limit_hit(Limit::memory);
    refuse(error, true, {}, error == ApiError::no_model ? "model" : "");
  }

  // Because of a limit of the client's key.
  [[gnu::cold]] void refuse_by_key(Limit limit, ApiError error);

  [[gnu::cold]] void refuse_unknown_model();

  // Sends an error of Nexus's own in place of a response. `keep_alive` only if the request's body was read whole.
  [[gnu::cold]] void refuse(ApiError error, bool keep_alive, std::string_view message = {},
                            std::string_view param = {});

  // ---- choosing a backend, and waiting for one ----

  Step follow(Next next) {
    if (next == Next::all_full) next = picker_.wait_in_queue(owner_, key_.id());
    switch (next) {
      case Next::chosen: return begin_attempt();
      case Next::all_full: return begin_waiting();
      case Next::no_queue: refuse_unplaced(Limit::backend_max_pending, ApiError::backends_full); break;
      case Next::queue_full: refuse_unplaced(Limit::queue_size, ApiError::queue_full, QueueRejection::full); break;
      case Next::nothing_left: refuse(last_failure_, true); break;
      case Next::unknown_model:
      case Next::not_spoken:
      case Next::none_healthy: return expect_or_refuse(next);
      case Next::not_capable: refuse(ApiError::not_capable, true); break;
    }
    return Step::again;
  }

  // A backend that was never checked may serve the request soon.
  [[gnu::cold]] Step expect_or_refuse(Next next);

  [[gnu::cold]] Step begin_waiting() {
    go(State::queued);
    summary_.begin_wait(context_.now);
    deadlines_.arm_queue(picker_.passed_over_ejected());
    return Step::wait;
  }

  // Goes on with a place that was found, or keeps waiting.
  void follow_or_wait(std::optional<Next> next) {
    if (next) {
      follow(*next);
    } else {
      deadlines_.arm_queue(picker_.passed_over_ejected());
    }
  }

  [[gnu::cold]] void on_queue_deadline();
  // No place, and no wait for one; or its key's limit is the reason, whatever else is full.
  [[gnu::cold]] void refuse_unplaced(Limit limit, ApiError error, std::optional<QueueRejection> counted = {});

  // ---- an attempt and its response: exchange_steps.h ----

  Step begin_attempt();
  [[gnu::cold]] Step connect();
  [[gnu::cold]] Step finish_connecting();
  Step begin_sending();
  // A response that begins before the request is sent whole is read first: it may be a refusal.
  Step send_request(std::uint32_t& reads);
  // Sends more of a request whose response has begun.
  [[gnu::cold]] void send_on();
  // Reads once from the backend and passes on what came.
  Step read_response(std::uint32_t& reads);
  void read_head(char* data, std::size_t bytes);
  void on_head(const ResponseHeadReader::Result& result);
  // Reads a piece of the response, behind `head`, and passes it on.
  void pass(std::string_view head, char* data, std::size_t bytes);
  void pass_on(Response::Step step, ClientWrite& write);
  // The response says something for the first time.
  void note_first();
  // True if the response is not sent to the client yet: another backend may have to give one in its place.
  bool is_held(Response::Step step) const;
  // The client gets this response: from here on nothing is retried.
  void begin_streaming();
  // The facts about the route for the client's head.
  RouteInfo route();
  void on_relayed(RelayOutcome outcome);
  // The response is whole, and its end is written: the connection goes back to the pool.
  void end_response();
  [[gnu::cold]] Step on_upstream_end(bool broken);

  // ---- responses that the client has not got yet: exchange_ends.h ----

  // The backend's answer is an error, by its status or in disguise. It is kept if another backend can be tried.
  [[gnu::cold]] void note_failed_answer(AttemptOutcome outcome);
  // `whole`: the answer has ended. A 2xx that is an error counts against its backend, and another one is asked.
  void look_for_disguise(bool whole);
  [[gnu::cold]] void note_disguise();
  [[gnu::cold]] void hold(Response::Step step, ClientWrite& write);
  // The held answer is whole, or too large to be what was thought of it.
  [[gnu::cold]] void settle_doubt(bool fits, Response::Step step, ClientWrite& write);
  [[gnu::cold]] void ask_without_usage();
  [[gnu::cold]] void note_usage_refused(std::uint16_t status);
  [[gnu::cold]] void pass_over_server();
  [[gnu::cold]] void ask_next_for_id();
  [[gnu::cold]] void end_answered_attempt();
  [[gnu::cold]] void on_hold_deadline();
  // `whole`: it becomes the client's answer if no backend gives a better one.
  [[gnu::cold]] void leave_failed_answer(bool whole);
  [[gnu::cold]] void drop_answer();
  [[gnu::cold]] void keep_answer();
  [[gnu::cold]] void give_kept_answer();
  void note_fallback(RequestRecord& record) const {
    record.fell_back = picker_.choice().fallback;
    record.fallback_to = picker_.choice().model;
  }
  bool failed_for_client() const { return answer_failed_ && client_.has_begun(); }

  // ---- ends: those that are failures are in exchange_ends.h ----

  // Ends the attempt in hand, and the exchange if nothing else can be tried. The state is another one afterwards.
  [[gnu::cold]] void end(Ending ending);
  [[gnu::cold]] DisconnectPhase disconnect_phase() const;
  // `detail` says more than the outcome, for the log.
  [[gnu::cold]] void log_failed_attempt(AttemptOutcome why, std::string_view detail);
  [[gnu::cold]] void note_backend_failure(AttemptOutcome why, std::string_view detail,
                                          std::optional<Ns> retry_after = {});
  void note_backend_success() {
    if (picker_.permit().succeeded(context_.now)) AttemptLog::returned(context_.log, *attempt_.backend());
  }

  // Nothing went to the client: the next candidate gets the request.
  [[gnu::cold]] void try_elsewhere(AttemptOutcome outcome, ApiError error);

  // The response will not become whole, and a client that has got a part of it must be able to tell.
  [[gnu::cold]] void cut_response(const EndingRow& row);

  Ending client_ending() const { return client_.out_of_memory() ? Ending::client_unwritable : Ending::client_left; }

  void release_upstream(bool clean) {
    relay_.drop_head();
    attempt_.release(clean);
  }
  void close_upstream() {
    relay_.drop_head();
    attempt_.close();
  }

  void leave_backend() {
    picker_.leave();
    attempt_.leave();
  }

  Step finish() {
    if (client_.waits()) {
      deadlines_.arm_write();
      return Step::wait;
    }
    commit();
    return Step::again;
  }

  // The one place where a request gets its record: whatever it held is given back, and it is logged.
  void commit();
  // A count may be late, but it is never lost.
  Step count();
  void log_access();
  [[gnu::cold]] void note_failed_request();

  // The trace, and the access log's line: exchange_trace.h.
  [[gnu::cold]] void begin_trace(const HeadView& view);
  [[gnu::cold]] std::string_view begin_span();
  void end_attempt(AttemptOutcome outcome) {
    if (attempt_.end(outcome)) [[unlikely]]
      end_span(outcome);
  }
  [[gnu::cold]] void end_span(AttemptOutcome outcome);
  [[gnu::cold]] void end_trace();
  template <class Fill>
  void hand_over_span(Fill&& fill);
  [[gnu::noinline]] void note_end();

  Handle owner_;
  Context& context_;
  State state_ = State::idle;

  // Of the request, from open() on.
  const Endpoint* endpoint_ = nullptr;
  SnapshotUse snapshot_;
  RequestView request_;
  std::size_t body_bytes_ = 0;  // of the request; it is known also when request_ is gone
  BodyFacts facts_;
  std::uint64_t named_id_ = 0;  // the hash of the id in its path; 0: none
  const ModelEntry* entry_ = nullptr;
  ExchangeSummary summary_;
  OverallPlace overall_place_;
  ClientKey key_;

  // Of its attempts.
  CandidatePicker<Net> picker_;
  Attempt<Net> attempt_;
  bool adds_usage_event_ = false;  // Nexus asked this backend for counts that the client did not ask for
  Doubt doubt_ = Doubt::none;
  BackendId asked_without_usage_ = BackendId::none;       // it has refused the request with that wish
  ApiError last_failure_ = ApiError::no_healthy_backend;  // until a backend was tried
  std::string_view failure_;  // of the attempt that ends next: says more than its ending; a constant text
  std::string_view retry_reason_;
  std::string reason_;  // of the route, for the client

  // The answer of an earlier attempt that client_ keeps.
  struct Kept {
    RequestRecord record;
    std::string backend, model_used;
    Ns first_ns = -1;
    bool ends_connection = false, given = false;  // to the client
  };
  std::unique_ptr<Kept> kept_;  // rarely
  bool answer_failed_ = false;  // the answer in hand is an error: what became of it is failed_outcome_
  bool keeping_ = false;        // it is not for the client yet, because another backend can be tried
  bool sends_on_ = false;       // it has begun before the request was sent whole
  AttemptOutcome failed_outcome_ = AttemptOutcome::ok;

  // Of the response on its way to the client.
  ClientResponse<Net> client_;
  ResponseRelay<Net> relay_;
  ExchangeDeadlines<Net> deadlines_;
};

}  // namespace nexus
