// exchange.h
// Owns:     one request on a proxied endpoint, from its head to its metrics record: route, attempts, retries, relay.
// Promises: every request is recorded exactly once, when it is over; what it holds (pending, place, memory) goes back
//           with it; another backend is tried only while no byte went to the client; a broken answer never looks whole.
// Leaves:   reading the request and what follows it on the connection to server.h; choosing to router.h.
// Threads:  its worker's. The session that owns it calls on it for each event and asks state() afterwards.
#pragma once

#include <array>
#include <cassert>
#include <optional>
#include <string>
#include <string_view>

#include "core.h"
#include "heads.h"
#include "openai.h"
#include "pool.h"
#include "relay.h"
#include "request_image.h"
#include "selection.h"
#include "usage.h"

namespace nexus {

// A proxied endpoint: a row here is all it takes.
struct Endpoint {
  std::string_view path;
  bool streams;  // `stream: true` is understood, and `stream_options` with it
};

inline constexpr std::array<Endpoint, 3> kEndpoints{{
    {"/v1/chat/completions", true},
    {"/v1/completions", true},
    {"/v1/embeddings", false},
}};

constexpr std::size_t kMaxModelBytes = 256;  // of an asked name that is kept for the log
constexpr std::size_t kMaxAnswerHeadBytes = 64u << 10;
constexpr std::uint32_t kMaxInterimAnswers = 16;  // 1xx heads before the final one
constexpr Ns kStaleWindow = kSecond;              // a kept connection found closed so soon was closed before
constexpr Ns kLookAgain = 100 * kMillisecond;     // from the queue, at what was ejected
constexpr std::uint32_t kReadsPerTurn = 16;       // of one answer, before others get their turn
constexpr std::uint32_t kBytesPerToken = 4;       // for the estimate of a prompt's length

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
    over,        // recorded; the session looks at keep_alive()
  };

  Exchange(Token owner, Core<Net>& core, Pool<Net>& pool, Connection<Net>& client)
      : owner_(owner), core_(core), pool_(pool), client_(client), selection_(core) {}
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  State state() const { return state_; }
  bool active() const { return state_ != State::idle && state_ != State::over; }
  bool keep_alive() const { return keep_alive_; }
  bool cut() const { return cut_; }  // the connection must be reset, so that what was sent does not look whole
  Ns deadline() const { return std::min(deadline_, request_deadline_); }

  // A request's head is complete. `client_name` is its address, for the log.
  void open(const Endpoint& endpoint, const RequestHead& head, const char* base, const FieldTable& fields,
            std::string_view client_name) {
    assert(state_ == State::idle);
    state_ = State::reading;
    endpoint_ = &endpoint;
    client_name_ = client_name;
    started_ns_ = core_.now;
    http_1_0_ = head.http_1_0;
    keep_alive_ = head.keep_alive && !core_.draining;
    snapshot_ = core_.snapshot.again();
    core_.take_request_id(base, &fields, request_id_);
  }

  // Refuses the request; `keep_alive` only where its body was read whole.
  void refuse(Refusal refusal, bool keep_alive, std::string_view message = {}, std::string_view param = {}) {
    assert(active());
    release_upstream(AttemptEnd::close);
    leave_backend();
    const RefusalRow& row = row_of(refusal);
    keep_alive_ = keep_alive_ && keep_alive;
    record_.status = row.status;
    record_.error = row.label;
    OwnAnswer answer;
    answer.request_id = request_id_;
    answer.http_1_0 = http_1_0_;
    answer.keep_alive = keep_alive_;
    core_.text.clear();
    append_own_error(core_.text, refusal, message, answer, true, param);
    sent_bytes_ += core_.text.size() - (core_.text.find("\r\n\r\n") + 4);
    if (!client_.write(core_.net, core_.blocks, core_.text)) return client_failed();
    status_sent_ = true;
    finish();
  }

  // The body is complete: read it, find a backend, and be on the way.
  void submit(const RequestView& request) {
    assert(state_ == State::reading);
    request_ = request;
    complete_ns_ = core_.now;
    const BodyError error =
        core_.json.read_body(request.body, request.body_bytes, facts_, snapshot_->any_vision_stated);
    if (error != BodyError::none) return refuse_body(error);
    asked_.assign(facts_.model.substr(0, kMaxModelBytes));
    entry_ = snapshot_->find(facts_.model);
    record_.stream = facts_.stream && endpoint_->streams;
    if (entry_ == nullptr) return refuse_unknown_model();
    record_.model = entry_->id;
    if (core_.settings().upstream.request_timeout_ns > 0) {
      request_deadline_ = deadline_after(core_.now, core_.settings().upstream.request_timeout_ns);
    }
    if (!take_overall_place()) return refuse(Refusal::overload, true);
    selection_.begin(*snapshot_, *entry_, needs_of(facts_));
    next_attempt();
  }

  // The client is gone: nothing more can be sent to it. Ends the exchange at once.
  void client_left() {
    assert(active());
    if (state_ == State::over) return;
    const bool waiting =
        state_ == State::queued || state_ == State::connecting || state_ == State::sending || state_ == State::awaiting;
    record_.disconnect = state_ == State::reading ? DisconnectPhase::request
                         : waiting                ? DisconnectPhase::waiting
                                                  : DisconnectPhase::streaming;
    if (!status_sent_) record_.status = 499;
    // A FIN is the proper end of a body without length: it must not follow half of one.
    const bool answering = state_ == State::streaming || state_ == State::finishing;
    cut_ = answering && client_framing_.kind == Framing::Kind::until_close;
    record_.error = ErrorType::client_closed;
    if (state_ == State::streaming) note_usage();
    end_attempt(AttemptOutcome::cancelled);
    release_upstream(AttemptEnd::close);
    keep_alive_ = false;
    cut_short_ = true;
    commit();
  }

  // A write to the client failed.
  void client_failed() {
    if (!client_.out_of_memory()) return client_left();
    core_.slab.limit_hit(Limit::memory);
    record_.error = ErrorType::other;
    abandon();
  }

  // An event of the backend connection in use.
  void on_upstream(const Event& event) {
    assert(upstream_ != nullptr);
    upstream_->connection.note(event);
    if (state_ == State::connecting) {
      if (event.writable || event.hangup) on_connected();
      return;
    }
    // An answer that is there before the request is sent whole is read first: its connection must not be used again.
    const Upstream<Net>* const upstream = upstream_;
    if (state_ == State::sending) read_answer();
    if (upstream_ != upstream) return;
    if (state_ == State::sending && event.writable) send_request();
    if (upstream_ == upstream && state_ != State::connecting) read_answer();
  }

  // The client's socket took what waited, or the turn comes round again: go on reading.
  void resume() {
    if (state_ == State::streaming || state_ == State::awaiting) {
      if (client_.pending() == 0) {
        if (state_ == State::streaming) note_stall_deadline();
        read_answer();
      } else {
        note_write_deadline();
      }
    } else if (state_ == State::finishing) {
      if (client_.pending() == 0) return commit();
      note_write_deadline();
    }
  }

  void on_deadline() {
    switch (state_) {
      case State::queued: return on_queue_deadline();
      case State::connecting:
      case State::sending:
      case State::awaiting: return fail_attempt(AttemptOutcome::timeout, Refusal::backend_timeout);
      case State::streaming:
        if (client_.pending() > 0) return cut_client();
        return break_stream(AttemptOutcome::timeout, Refusal::backend_timeout);
      case State::finishing: return cut_client();
      case State::idle:
      case State::reading:
      case State::over: assert(false);
    }
  }

  // A place was granted to this request while it waited.
  void on_grant() {
    if (state_ != State::queued) return;
    if (const auto next = selection_.take_grant()) return follow(*next);
    arm_queue_deadline();
  }

  // Makes ready for the next request on this connection.
  void reset() {
    assert(!active() && upstream_ == nullptr);
    state_ = State::idle;
    snapshot_ = SnapshotUse();
    entry_ = nullptr;
    record_ = RequestRecord{};
    backend_ = nullptr;
    request_deadline_ = deadline_ = queue_deadline_ = kNever;
    sent_bytes_ = 0;
    first_body_ns_ = ended_ns_ = -1;
    cut_ = cut_short_ = status_sent_ = false;
    blocked_bytes_ = 0;
    client_framing_ = Framing{};
    stale_retry_ = false;
    asked_.clear();
    retry_reason_ = {};
  }

 private:
  enum class AttemptEnd : std::uint8_t { reuse, close };

  // ---- the request ----

  RouteNeeds needs_of(const BodyFacts& facts) const {
    RouteNeeds needs;
    needs.tools = facts.has_tools;
    needs.json_mode = facts.json_mode;
    needs.context_tokens = request_.body_bytes / kBytesPerToken;
    if (snapshot_->any_vision_stated) {
      const std::string_view messages(request_.body + facts.messages.at, facts.messages.bytes);
      needs.vision = messages.find("\"image_url\"") != std::string_view::npos;
    }
    return needs;
  }

  // One of [server] max_pending places, where there is such a limit.
  bool take_overall_place() {
    const std::uint32_t limit = core_.settings().server.max_pending;
    if (limit == 0) return true;
    if (core_.shared.in_flight.fetch_add(1, std::memory_order_relaxed) < limit) {
      overall_place_ = true;
      return true;
    }
    core_.shared.in_flight.fetch_sub(1, std::memory_order_relaxed);
    core_.slab.limit_hit(Limit::max_pending);
    return false;
  }

  void refuse_body(BodyError error) {
    if (error == BodyError::too_deep) core_.slab.limit_hit(Limit::json_depth);
    switch (error) {
      case BodyError::none: assert(false); break;
      case BodyError::not_json: return refuse(Refusal::bad_json, true);
      case BodyError::duplicate_key: return refuse(Refusal::duplicate_key, true);
      case BodyError::no_model: return refuse(Refusal::no_model, true, {}, "model");
      case BodyError::wrong_type: return refuse(Refusal::wrong_type, true);
      case BodyError::too_deep: return refuse(Refusal::too_deep, true);
    }
  }

  // 404 with what could be asked for instead, as far as it fits into a sentence.
  void refuse_unknown_model() {
    if (snapshot_->discovering) return refuse(Refusal::no_healthy_backend, true);
    constexpr std::size_t kListedBytes = 1024;
    std::vector<std::string_view> names;
    for (const auto& [name, entry] : snapshot_->models) {
      if (is_available(entry)) names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    std::string message = "The model '" + asked_ + "' is not available here. ";
    message += names.empty() ? "No model is available now: see /health." : "Available: ";
    const std::size_t start = message.size();
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (message.size() - start + names[i].size() > kListedBytes) {
        message += ", … (GET /v1/models lists all)";
        break;
      }
      if (i > 0) message += ", ";
      message += names[i];
    }
    if (!names.empty()) message += ".";
    refuse(Refusal::model_not_found, true, message, "model");
  }

  bool is_available(const ModelEntry& entry) const {
    return std::any_of(entry.offers.begin(), entry.offers.end(),
                       [&](const Offer& offer) { return snapshot_->backends[offer.backend].healthy; });
  }

  // ---- choosing a backend ----

  void next_attempt() { follow(selection_.next()); }

  void follow(typename Selection<Net>::Next next) {
    using Next = typename Selection<Net>::Next;
    switch (next) {
      case Next::chosen: return begin_attempt();
      case Next::all_full: return wait_in_queue();
      case Next::nothing_left: return refuse(last_failure_, true);
      case Next::unknown_model: return refuse_unknown_model();
      case Next::none_healthy: return refuse(Refusal::no_healthy_backend, true);
      case Next::not_capable: return refuse(Refusal::not_capable, true);
    }
  }

  // Every candidate is at its cap: wait for the first place on any of them.
  void wait_in_queue() {
    using Next = typename Selection<Net>::Next;
    switch (selection_.wait_in_queue(owner_)) {
      case Next::chosen: return begin_attempt();
      case Next::all_full: break;
      default:
        core_.slab.queue_rejected(QueueRejection::full);
        core_.slab.limit_hit(Limit::queue_size);
        return refuse(Refusal::queue_full, true);
    }
    state_ = State::queued;
    // One wait, however often the request is queued: it began with the first.
    if (queue_deadline_ == kNever) {
      queue_deadline_ = deadline_after(core_.now, snapshot_->settings->queue.timeout_ns);
    }
    arm_queue_deadline();
  }

  void arm_queue_deadline() {
    deadline_ = queue_deadline_;
    if (selection_.passed_over_ejected()) deadline_ = std::min(deadline_, core_.now + kLookAgain);
  }

  void on_queue_deadline() {
    on_grant();  // it may have come just now
    if (state_ != State::queued) return;
    if (core_.now < std::min(queue_deadline_, request_deadline_)) {
      if (const auto next = selection_.look_again()) return follow(*next);
      return arm_queue_deadline();
    }
    core_.slab.queue_rejected(QueueRejection::timeout);
    core_.slab.limit_hit(Limit::queue_timeout);
    refuse(Refusal::queue_timeout, true);
  }

  // ---- an attempt ----

  void begin_attempt() {
    assert(upstream_ == nullptr);
    backend_ = selection_.backend();
    record_.backend = backend_->id;
    if (selection_.choice().fallback) {
      record_.fell_back = true;
      record_.fallback_from = entry_->target_id;
      record_.fallback_to = selection_.choice().model;
    }
    core_.slab.add_pending(backend_->id, 1);
    pending_ = true;
    attempt_open_ = true;
    stale_retry_ = false;
    remove_usage_event_ = asks_for_usage(*backend_, facts_, record_.stream);
    const std::string& model = *selection_.choice().model_name;
    compose_request(own_, image_, request_, facts_, *backend_, model == entry_->name ? std::string_view() : model,
                    remove_usage_event_, request_id_, core_.shared.via_line);
    image_sent_ = 0;
    upstream_ = pool_.take_idle(backend_->id, *backend_->address, owner_);
    if (upstream_ == nullptr) return connect();
    begin_sending();
  }

  void connect() {
    const typename Pool<Net>::Connecting connecting = pool_.connect(backend_->id, *backend_->address, owner_);
    if (connecting.upstream == nullptr) {
      if (connecting.outcome == SocketOutcome::no_descriptor) core_.slab.limit_hit(Limit::descriptors);
      if (connecting.outcome == SocketOutcome::no_memory) core_.slab.limit_hit(Limit::memory);
      return fail_attempt(AttemptOutcome::connect_error, Refusal::connect_failed);
    }
    upstream_ = connecting.upstream;
    state_ = State::connecting;
    deadline_ = deadline_after(core_.now, snapshot_->settings->upstream.connect_timeout_ns);
  }

  void on_connected() {
    assert(state_ == State::connecting);
    if (core_.net.connect_error(upstream_->connection.socket()) != 0) {
      return fail_attempt(AttemptOutcome::connect_error, Refusal::connect_failed);
    }
    // What comes before the request is no answer to it, and no further edge would tell of it.
    if (upstream_->connection.may_read()) {
      char early = 0;
      const IoResult result = upstream_->connection.read(core_.net, &early, 1);
      if (result.ok()) {
        log_bad_answer("it came before the request");
        return fail_attempt(AttemptOutcome::bad_response, Refusal::backend_not_http);
      }
      if (result.kind != IoResult::Kind::again) return fail_attempt(AttemptOutcome::truncated, Refusal::backend_broke);
    }
    begin_sending();
  }

  void begin_sending() {
    state_ = State::sending;
    record_.reached_backend = true;
    answer_bytes_seen_ = false;
    interim_answers_ = 0;
    deadline_ = deadline_after(core_.now, snapshot_->settings->upstream.first_byte_timeout_ns);
    send_request();
  }

  void send_request() {
    assert(state_ == State::sending);
    std::array<iovec, RequestImage::kMaxPieces> parts;
    while (image_sent_ < image_.total()) {
      const std::size_t count = image_.fill(parts, own_.data(), request_.body, image_sent_);
      const IoResult result = core_.net.write(upstream_->connection.socket(), std::span(parts.data(), count));
      if (result.kind == IoResult::Kind::again) return;
      // A backend may refuse in the middle of a body and close: what it said can still be read.
      if (!result.ok()) return on_send_failure();
      image_sent_ += result.bytes;
      deadline_ = deadline_after(core_.now, snapshot_->settings->upstream.first_byte_timeout_ns);
    }
    state_ = State::awaiting;
    sent_ns_ = core_.net.now();
    if (selection_.tries() == 1 && !stale_retry_) record_.overhead_ns = sent_ns_ - complete_ns_;
  }

  void on_send_failure() {
    send_failed_ = true;
    state_ = State::awaiting;
    upstream_->connection.note(Event{upstream_->token, true, false, true});
    read_answer();
  }

  // ---- the answer ----

  void read_answer() {
    if (state_ != State::sending && state_ != State::awaiting && state_ != State::streaming) return;
    const std::uint32_t attempt = selection_.tries();
    Upstream<Net>* const upstream = upstream_;
    for (std::uint32_t reads = 0; upstream->connection.may_read(); ++reads) {
      if (state_ == State::streaming && client_.pending() > 0) return note_write_deadline();
      if (reads == kReadsPerTurn) return core_.call_again(owner_);
      char* scratch = core_.scratch();
      if (scratch == nullptr) return out_of_memory();
      const IoResult result = upstream->connection.read(core_.net, scratch, core_.scratch_bytes());
      switch (result.kind) {
        case IoResult::Kind::again: return;
        case IoResult::Kind::eof: return on_upstream_end(false);
        case IoResult::Kind::failed: return on_upstream_end(true);
        case IoResult::Kind::ok: break;
      }
      answer_bytes_seen_ = true;
      if (state_ == State::streaming) {
        relay({}, scratch, result.bytes);
      } else {
        read_head(scratch, result.bytes);
      }
      if (upstream_ != upstream || selection_.tries() != attempt) return;  // this answer is done with
    }
  }

  // Heads come whole in the first read but for slow or strange backends: the rest is kept only then.
  void read_head(char* data, std::size_t bytes) {
    if (!answer_fields_) {
      answer_fields_ = core_.tables.take();
      if (!answer_fields_) return out_of_memory();
      answer_reader_.start(answer_fields_.get());
    }
    if (!partial_head_.empty()) {
      if (!partial_head_.append(core_.blocks, {data, bytes})) return out_of_memory();
      data = partial_head_.data();
      bytes = partial_head_.size();
    }
    for (;;) {
      ResponseHead head;
      const HeadResult result = answer_reader_.feed(data, bytes, head);
      if (result.status == HeadResult::Status::failed ||
          (result.status == HeadResult::Status::need_more && bytes > kMaxAnswerHeadBytes) ||
          result.head_bytes > kMaxAnswerHeadBytes) {
        log_bad_answer(result.why.empty() ? "its head is too large" : result.why);
        return fail_attempt(AttemptOutcome::bad_response, Refusal::backend_not_http);
      }
      if (result.status == HeadResult::Status::need_more) return keep_partial(data, bytes);
      if (head.status >= 200) return on_head(head, data, bytes);
      // RFC 9110 15.2: an interim answer is read past. 101 was not asked for.
      if (head.status == 101 || ++interim_answers_ > kMaxInterimAnswers) {
        log_bad_answer("an interim answer that was not asked for");
        return fail_attempt(AttemptOutcome::bad_response, Refusal::backend_not_http);
      }
      data += result.head_bytes;
      bytes -= result.head_bytes;
      answer_reader_.start(answer_fields_.get());
      if (bytes == 0) return partial_head_.clear();
    }
  }

  void keep_partial(const char* data, std::size_t bytes) {
    if (partial_head_.empty()) {
      if (!partial_head_.append(core_.blocks, {data, bytes})) return out_of_memory();
    } else {
      partial_head_.consume(partial_head_.size() - bytes);  // interim answers before it
    }
  }

  void on_head(const ResponseHead& head, char* data, std::size_t bytes) {
    const bool failed = head.status == 429 || head.status >= 500;
    core_.note_latency(backend_->id, core_.now - sent_ns_);
    if (failed) {
      note_backend_failure(retry_after_of(data));
      if (selection_.another()) return retry_after_status(head, data, bytes);
    } else if (selection_.passage().trial()) {
      selection_.passage().succeeded();  // a stream may last for minutes: others need not wait for its end
    }
    begin_relay(head, data, bytes);
  }

  std::optional<Ns> retry_after_of(const char* base) const {
    const FieldRow* row = find_field(*answer_fields_, Field::retry_after);
    if (row == nullptr) return std::nullopt;
    const auto seconds = parse_decimal(value_of(base, *row));
    if (!seconds) return std::nullopt;  // a date: the host's clock may not be the backend's
    return static_cast<Ns>(std::min<std::uint64_t>(*seconds, 3600)) * kSecond;
  }

  // The answer is thrown away for another backend's. Its connection is kept where the whole of it has come.
  void retry_after_status(const ResponseHead& head, char* data, std::size_t bytes) {
    answer_body_.start(head.framing);
    const AnswerBody::Piece piece = answer_body_.feed(data + head.head_bytes, bytes - head.head_bytes);
    const bool whole = head.framing.kind == Framing::Kind::none || piece.done;
    const bool reuse =
        whole && !piece.excess && !piece.failed && head.keep_alive && !send_failed_ && image_sent_ == image_.total();
    end_attempt(status_outcome(head.status));
    release_upstream(reuse ? AttemptEnd::reuse : AttemptEnd::close);
    leave_backend();
    last_failure_ = Refusal::backend_broke;
    retry_reason_ = name_of(status_outcome(head.status));
    next_attempt();
  }

  static AttemptOutcome status_outcome(std::uint16_t status) {
    if (status == 429) return AttemptOutcome::status_429;
    return status >= 500 ? AttemptOutcome::status_5xx : AttemptOutcome::ok;
  }

  // The client gets this answer: from here on nothing is retried.
  void begin_relay(const ResponseHead& head, char* data, std::size_t bytes) {
    const bool sse = is_event_stream(data);
    state_ = State::streaming;
    answer_status_ = head.status;
    answer_keep_alive_ = head.keep_alive;
    record_.status = head.status;
    record_.error = head.status / 100 == 2 ? ErrorType::none : ErrorType::backend_error;
    record_.stream = sse && head.status / 100 == 2;
    sse_ = sse;
    answer_body_.start(head.framing);
    scan_kind_ = scan_kind(head, data);
    remove_usage_event_ = remove_usage_event_ && scan_kind_ == UsageScan::Kind::event_stream;
    scan_.start(scan_kind_, remove_usage_event_);
    whole_usage_ = Usage{};
    client_framing_ = client_framing(head);
    std::string& out = core_.text;
    out.clear();
    write_route_reason();
    ClientHead to;
    to.backend_line = backend_->answer_line;
    to.request_id = request_id_;
    to.route_reason = reason_;
    if (selection_.choice().fallback) to.fallback_model = *selection_.choice().model_name;
    to.framing = client_framing_;
    to.http_1_0 = http_1_0_;
    if (client_framing_.kind == Framing::Kind::until_close) keep_alive_ = false;
    to.keep_alive = keep_alive_;
    append_response_head(out, HeadView{data, answer_fields_.get(), head.head_bytes}, head, to);
    note_stall_deadline();
    relay(out, data + head.head_bytes, bytes - head.head_bytes);
    // What is only needed to try again, or to read a head, is given back before a long stream.
    answer_fields_.give_back();
    partial_head_.clear();
  }

  bool is_event_stream(const char* base) const {
    const FieldRow* row = find_field(*answer_fields_, Field::content_type);
    return row != nullptr && starts_with_ignoring_case(value_of(base, *row), "text/event-stream");
  }

  UsageScan::Kind scan_kind(const ResponseHead& head, const char* base) const {
    if (head.status / 100 != 2 || head.framing.kind == Framing::Kind::none) return UsageScan::Kind::none;
    const FieldRow* coding = find_field(*answer_fields_, Field::content_encoding);
    if (coding != nullptr && !equals_ignoring_case(value_of(base, *coding), "identity")) return UsageScan::Kind::none;
    return sse_ ? UsageScan::Kind::event_stream : UsageScan::Kind::json;
  }

  Framing client_framing(const ResponseHead& head) const {
    if (head.framing.kind == Framing::Kind::none) {
      // 204 and 304 carry no length; every other answer without a body says so.
      if (head.status == 204 || head.status == 304) return {};
      return {Framing::Kind::length, 0};
    }
    const bool length_holds = !remove_usage_event_;
    if (head.framing.kind == Framing::Kind::length && length_holds) return head.framing;
    return {http_1_0_ ? Framing::Kind::until_close : Framing::Kind::chunked, 0};
  }

  void write_route_reason() {
    reason_.clear();
    if (!retry_reason_.empty()) reason_.append("retry after ").append(retry_reason_).append(", ");
    append_reason(reason_, selection_.choice());
  }

  // Passes a piece of the body on; `head` goes in front of it.
  void relay(std::string_view head, char* data, std::size_t bytes) {
    const bool chunked = client_framing_.kind == Framing::Kind::chunked;
    AnswerBody::Piece piece = answer_body_.feed(data, bytes);
    if (piece.bytes > 0 && first_body_ns_ < 0) first_body_ns_ = core_.now;
    UsageScan::Out out{{}, {piece.data, piece.bytes}};
    if (scan_kind_ == UsageScan::Kind::json && !head.empty() && piece.done && !piece.failed) {
      whole_usage_ = core_.json.read_answer(piece.data, piece.bytes);  // the usual case: all came in one piece
    } else if (!scan_.feed(core_.blocks, core_.json, piece.data, piece.bytes, out)) {
      return out_of_memory();
    }
    ClientWrite write;
    write.add(head);
    write.add_payload(chunked, out.held, out.piece);
    // In one write where nothing is held: finish() ends the life of `out.held`.
    if (!piece.failed && piece.done && scan_.held_bytes() == 0 && out.held.empty()) {
      UsageScan::Out rest;
      if (!scan_.finish(core_.blocks, core_.json, rest)) return out_of_memory();
      assert(rest.held.empty() && rest.piece.empty());
      write.add_end(chunked);
      return end_of_answer(write, piece.excess);
    }
    if (!send_to_client(write)) return client_failed();
    if (!overhead_noted_) note_overhead(core_.net.now());
    if (piece.failed) {
      log_bad_answer("its chunked coding is broken");
      return break_stream(AttemptOutcome::bad_response, Refusal::backend_not_http);
    }
    if (piece.done) return end_of_held_answer(piece.excess);
    note_stall_deadline();
  }

  // The body has ended while the scan still held bytes back: they go on, or are the event that is taken out.
  void end_of_held_answer(bool excess) {
    const bool chunked = client_framing_.kind == Framing::Kind::chunked;
    UsageScan::Out rest;
    if (!scan_.finish(core_.blocks, core_.json, rest)) return out_of_memory();
    ClientWrite write;
    write.add_payload(chunked, rest.held, rest.piece);
    write.add_end(chunked);
    end_of_answer(write, excess);
  }

  // The answer is whole: the connection goes back, and the client gets the end.
  void end_of_answer(ClientWrite& write, bool excess) {
    note_usage();
    record_.without_usage = answer_status_ / 100 == 2 && !usage().told();
    if (!send_to_client(write)) return client_failed();
    const Ns sent_ns = core_.net.now();
    note_overhead(sent_ns);
    if (client_.pending() == 0) ended_ns_ = sent_ns;
    selection_.passage().succeeded();
    end_attempt(status_outcome(answer_status_));
    const bool reuse = answer_keep_alive_ && !excess && !send_failed_ && image_sent_ == image_.total();
    release_upstream(reuse ? AttemptEnd::reuse : AttemptEnd::close);
    finish();
  }

  bool send_to_client(ClientWrite& write) {
    sent_bytes_ += write.payload_bytes();
    const bool written = client_.write(core_.net, core_.blocks, write.parts());
    status_sent_ |= written;
    return written;
  }

  // The answer's first bytes went on at `sent_ns`.
  void note_overhead(Ns sent_ns) {
    if (overhead_noted_) return;
    overhead_noted_ = true;
    if (record_.overhead_ns >= 0) record_.overhead_ns += sent_ns - core_.now;
  }

  void note_usage() {
    if (answer_status_ / 100 != 2) return;
    last_body_ns_ = core_.now;
    const Usage& usage = this->usage();
    record_.prompt_tokens = usage.prompt_tokens;
    record_.completion_tokens = usage.completion_tokens;
    if (record_.stream && first_body_ns_ >= 0) {
      record_.first_byte_ns = first_body_ns_ - complete_ns_;
      if (usage.completion_tokens > 1) {
        record_.per_token_ns = (last_body_ns_ - first_body_ns_) / (usage.completion_tokens - 1);
      }
    }
  }

  const Usage& usage() const { return whole_usage_.told() ? whole_usage_ : scan_.usage(); }

  // The backend's connection ended.
  void on_upstream_end(bool broken) {
    if (state_ == State::streaming) {
      if (answer_body_.ends_with_connection() && !broken && !send_failed_) {
        answer_keep_alive_ = false;
        return end_of_held_answer(false);
      }
      return break_stream(AttemptOutcome::truncated, Refusal::backend_broke);
    }
    // A kept-alive connection that was closed under the request: the backend never saw it, or said nothing of it.
    // One that breaks later may have been broken by this very request, which should then go elsewhere.
    const bool at_once = state_ == State::sending || core_.now - sent_ns_ < kStaleWindow;
    if (upstream_->reused && !answer_bytes_seen_ && !stale_retry_ && at_once) {
      stale_retry_ = true;
      release_upstream(AttemptEnd::close);
      send_failed_ = false;
      image_sent_ = 0;
      return connect();
    }
    if (answer_bytes_seen_) log_bad_answer("it ended within its head");
    fail_attempt(AttemptOutcome::truncated, Refusal::backend_broke);
  }

  // ---- ends ----

  // This attempt failed and nothing went to the client: on to the next candidate, or to an error.
  void fail_attempt(AttemptOutcome outcome, Refusal refusal) {
    note_backend_failure(std::nullopt);
    end_attempt(outcome);
    release_upstream(AttemptEnd::close);
    leave_backend();
    last_failure_ = refusal;
    retry_reason_ = name_of(outcome);
    if (core_.now >= request_deadline_ || !selection_.another()) return refuse(refusal, true);
    next_attempt();
  }

  void note_backend_failure(std::optional<Ns> retry_after) {
    selection_.passage().failed(core_.now, snapshot_->settings->health, retry_after);
  }

  // The answer broke after its head went out: it must not look whole.
  void break_stream(AttemptOutcome outcome, Refusal refusal) {
    assert(state_ == State::streaming);
    const RefusalRow& row = row_of(refusal);
    record_.error = row.label;
    note_usage();
    note_backend_failure(std::nullopt);
    end_attempt(outcome);
    release_upstream(AttemptEnd::close);
    keep_alive_ = false;
    cut_short_ = true;
    if (client_framing_.kind == Framing::Kind::until_close) {
      cut_ = true;  // a FIN would be the proper end of this body: only a reset tells
      return commit();
    }
    if (sse_ && client_framing_.kind == Framing::Kind::chunked) {
      std::string event = "\n\ndata: ";
      append_error_body(event, row, row.message);
      event += "\n\n";
      ClientWrite write;
      write.add_payload(true, event, {});
      if (!client_.write(core_.net, core_.blocks, write.parts())) return commit();
    }
    finish();
  }

  // The client takes nothing: cut it, so that it holds nothing here.
  void cut_client() {
    core_.slab.limit_hit(Limit::write_timeout);
    record_.error = ErrorType::other;
    if (state_ == State::streaming) note_usage();
    abandon();
  }

  // Nothing more can be sent: the connection is reset, so that what was sent does not look whole.
  void abandon() {
    end_attempt(AttemptOutcome::cancelled);
    release_upstream(AttemptEnd::close);
    keep_alive_ = false;
    cut_ = cut_short_ = true;
    commit();
  }

  void out_of_memory() {
    core_.slab.limit_hit(Limit::memory);
    if (state_ == State::streaming) {
      record_.error = ErrorType::other;
      return abandon();
    }
    end_attempt(AttemptOutcome::cancelled);
    refuse(Refusal::out_of_memory, true);
  }

  void end_attempt(AttemptOutcome outcome) {
    if (!attempt_open_) return;
    attempt_open_ = false;
    core_.slab.attempt(backend_->id, outcome);
  }

  void release_upstream(AttemptEnd end) {
    answer_fields_.give_back();
    partial_head_.clear();
    if (upstream_ == nullptr) return;
    Upstream<Net>* upstream = upstream_;
    upstream_ = nullptr;
    if (end == AttemptEnd::reuse) {
      pool_.give_back(*upstream);
    } else {
      pool_.drop(*upstream);
    }
  }

  void leave_backend() {
    send_failed_ = false;
    selection_.leave();
    if (!pending_) return;
    pending_ = false;
    core_.slab.add_pending(backend_->id, -1);
  }

  // All is written; over as soon as the kernel has taken it.
  void finish() {
    state_ = State::finishing;
    request_deadline_ = kNever;  // from here on only the client's own time counts
    if (client_.pending() == 0) return commit();
    note_write_deadline();
  }

  // The client's time to take something runs anew only where it took something.
  void note_write_deadline() {
    if (client_.pending() == blocked_bytes_) return;
    blocked_bytes_ = client_.pending();
    deadline_ = deadline_after(core_.now, core_.settings().server.write_timeout_ns);
  }
  void note_stall_deadline() {
    if (client_.pending() > 0) return note_write_deadline();
    blocked_bytes_ = 0;
    deadline_ = deadline_after(core_.now, snapshot_->settings->upstream.stall_timeout_ns);
  }

  // The one place where a request is counted.
  void commit() {
    assert(state_ != State::over && upstream_ == nullptr);
    leave_backend();
    if (std::exchange(overall_place_, false)) core_.shared.in_flight.fetch_sub(1, std::memory_order_relaxed);
    if (ended_ns_ < 0) ended_ns_ = core_.net.now();
    record_.duration_ns = ended_ns_ - started_ns_;
    core_.slab.record(record_);
    if (core_.log.wants_access()) core_.log.access(access_entry());
    deadline_ = request_deadline_ = kNever;
    overhead_noted_ = false;
    state_ = State::over;
  }

  AccessEntry access_entry() const {
    AccessEntry entry;
    entry.wall_ns = wall_now();
    entry.request_id = request_id_;
    entry.client = client_name_;
    entry.method = "POST";
    entry.path = endpoint_->path;
    entry.model = asked_;
    if (backend_ != nullptr) entry.model_used = *selection_.choice().model_name;
    if (record_.backend != BackendId::none) entry.backend = backend_->name;
    entry.status = record_.status;
    const ErrorType error = error_of(record_);
    if (error != ErrorType::none) entry.error_type = name_of(error);
    entry.attempts = backend_ == nullptr ? 0 : selection_.tries();
    entry.bytes = sent_bytes_;
    entry.prompt_tokens = record_.prompt_tokens;
    entry.completion_tokens = record_.completion_tokens;
    entry.first_byte_ns = first_body_ns_ < 0 ? -1 : first_body_ns_ - started_ns_;
    entry.duration_ns = record_.duration_ns;
    entry.cut = cut_short_;
    return entry;
  }

  void log_bad_answer(std::string_view why) {
    core_.log.event(LogLevel::warning, "bad answer from a backend",
                    {{"backend", backend_->name}, {"why", why}, {"request_id", request_id_}});
  }

  Token owner_;
  Core<Net>& core_;
  Pool<Net>& pool_;
  Connection<Net>& client_;
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
  RequestRecord record_;
  Ns started_ns_ = 0;
  Ns complete_ns_ = 0;  // when its body was whole
  Ns deadline_ = kNever;
  Ns request_deadline_ = kNever;
  Ns queue_deadline_ = kNever;
  bool http_1_0_ = false;
  bool keep_alive_ = true;

  // Of its attempts.
  Selection<Net> selection_;
  const BackendView* backend_ = nullptr;  // the last one tried
  bool overall_place_ = false;            // counted in Shared::in_flight
  bool pending_ = false;                  // counted in nexus_pending_requests of backend_
  bool attempt_open_ = false;             // its outcome is not counted yet
  bool stale_retry_ = false;              // a kept-alive connection was found closed once already
  Refusal last_failure_ = Refusal::connect_failed;
  std::string_view retry_reason_;
  std::string reason_;  // in words, for the client

  // Of the attempt going on.
  Upstream<Net>* upstream_ = nullptr;
  std::string own_;
  RequestImage image_;
  std::size_t image_sent_ = 0;
  Ns sent_ns_ = 0;
  bool send_failed_ = false;
  bool remove_usage_event_ = false;
  bool answer_bytes_seen_ = false;
  std::uint32_t interim_answers_ = 0;
  ResponseReader answer_reader_;
  typename Spares<FieldTable>::Loan answer_fields_;
  Buffer partial_head_;

  // Of the answer on its way to the client.
  AnswerBody answer_body_;
  UsageScan scan_;
  UsageScan::Kind scan_kind_ = UsageScan::Kind::none;
  Usage whole_usage_;  // of an answer that was read whole, without the scan
  Framing client_framing_;
  std::uint16_t answer_status_ = 0;
  bool answer_keep_alive_ = false;
  bool sse_ = false;
  bool overhead_noted_ = false;
  bool cut_ = false;
  bool cut_short_ = false;
  bool status_sent_ = false;       // its first byte was written
  std::size_t blocked_bytes_ = 0;  // what waited for the client when its deadline was set
  std::uint64_t sent_bytes_ = 0;
  Ns first_body_ns_ = -1;
  Ns last_body_ns_ = -1;
  Ns ended_ns_ = -1;  // when the kernel took the last byte
};

}  // namespace nexus
