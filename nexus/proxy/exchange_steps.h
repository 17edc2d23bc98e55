// exchange_steps.h
// Owns:     the steps of an exchange with a backend: wait for it, connect, send the request, read the response, pass it
//           on.
// Promises: a step does not block and calls no other step; it leaves the state with go() or end().
// Leaves:   the order of the steps, choosing a backend, and the ends to exchange.h. Users of Exchange include this.
// Threads:  its worker's.
// Tested by: tests/courses_test.cpp, tests/sim, tests/hostile
#pragma once

#include <cstring>

#include "nexus/api/path_errors.h"
#include "nexus/base/limits.h"
#include "nexus/proxy/exchange.h"
#include "nexus/proxy/exchange_ends.h"

namespace nexus {

// ---- choosing a backend, and waiting for one ----

// True if the backend is one that may get a request to this endpoint for this model.
inline bool may_serve(const Snapshot& fleet, const ModelEntry* entry, const Endpoint& endpoint, BackendId id) {
  return entry != nullptr && std::any_of(entry->offers.begin(), entry->offers.end(), [&](const Offer& offer) {
           const BackendView& backend = fleet.backends[offer.backend];
           return backend.id == id && backend.speaks(endpoint);
         });
}

template <class Net>
void Exchange<Net>::prepare_choice() {
  // A key that may be one of Nexus's own is not passed on.
  if (!snapshot_->settings->server.api_keys.empty()) request_.withheld |= kCredentials;
  RouteNeeds needs = needs_of(*endpoint_, request_, facts_, snapshot_->any_context_stated);
  const std::uint64_t id = named_id_ != 0 ? named_id_ : facts_.continues;
  if (id != 0) needs.only = context_.shared.response_ids.find(id);
  // The fleet may have the holder of a stored response no more: then the id is as good as unknown.
  if (needs.only && !may_serve(*snapshot_, entry_, *endpoint_, *needs.only)) needs.only.reset();
  if (endpoint_->model == Model::of_admin) needs.only = snapshot_->admin;
  needs.affinity = affinity_key(snapshot_->settings->routing, request_.base, *request_.fields,
                                {request_.body, request_.body_bytes}, facts_, key_.name());
  if (needs.affinity != 0) needs.seen_at = context_.shared.recent_keys.find(needs.affinity, context_.now);
  picker_.look_at(*snapshot_, entry_, needs);
}

template <class Net>
Step Exchange<Net>::expect_or_refuse(Next next) {
  if (snapshot_->unchecked && !deadlines_.expecting_expired()) {
    go(State::expecting);
    summary_.begin_wait(context_.now);
    deadlines_.arm_expecting();
    return Step::wait;
  }
  context_.want_check(BackendId::none);
  switch (next) {
    case Next::unknown_model: refuse_unknown_model(); break;
    case Next::not_spoken:
      refuse(ApiError::not_spoken, true, not_spoken_message(*snapshot_, *entry_, *endpoint_, summary_.method));
      break;
    default: refuse(ApiError::no_healthy_backend, true); break;
  }
  return Step::again;
}

template <class Net>
void Exchange<Net>::on_queue_deadline() {
  look_at_fleet();
  follow_or_wait(picker_.take_grant());  // one may have been given just now
  if (state_ != State::queued) return;
  if (!deadlines_.queue_expired()) return follow_or_wait(picker_.look_again());
  context_.slab.queue_rejected(QueueRejection::timeout);
  refuse_unplaced(Limit::queue_timeout, ApiError::queue_timeout);
}

template <class Net>
void Exchange<Net>::refuse_unplaced(Limit limit, ApiError error, std::optional<QueueRejection> counted) {
  if (picker_.waits_for_key()) return refuse_by_key(Limit::key_concurrency, ApiError::key_concurrency);
  if (counted) context_.slab.queue_rejected(*counted);
  context_.slab.limit_hit(limit);
  refuse(error, true);
}

// ---- an attempt ----

template <class Net>
Step Exchange<Net>::begin_attempt() {
  const BackendView& backend = *picker_.backend();
  const Choice& choice = picker_.choice();
  attempt_.begin(snapshot_.again(), backend);
  summary_.record.backend = backend.id;
  summary_.record.affinity = choice.affinity;
  answer_failed_ = keeping_ = sends_on_ = false;
  doubt_ = Doubt::none;
  adds_usage_event_ = asked_without_usage_ != backend.id && asks_for_usage(*endpoint_, backend, facts_);
  const std::string& model = *choice.model_name;
  std::string_view own_lines = context_.shared.via_line;
  if (summary_.trace.makes_lines()) [[unlikely]]
    own_lines = begin_span();
  attempt_.compose(request_, facts_, same_text(model, entry_->name) ? std::string_view() : model, adds_usage_event_,
                   summary_.request_id, own_lines);
  return attempt_.take_kept() ? begin_sending() : connect();
}

template <class Net>
Step Exchange<Net>::connect() {
  const SocketOutcome outcome = attempt_.connect();
  if (outcome == SocketOutcome::ok) {
    go(State::connecting);
    summary_.begin_wait(context_.now);
    return Step::again;
  }
  context_.log_lack(outcome);
  end(ending_of(outcome));
  return Step::again;
}

template <class Net>
Step Exchange<Net>::finish_connecting() {
  const IoResult established = attempt_.connection().establish(context_.net);
  if (established.kind == IoResult::Kind::again) return Step::wait;
  attempt_.count_handshake();
  if (!established.ok()) {
    failure_ = attempt_.connection().why(established);
    end(attempt_.connection().out_of_memory() ? Ending::out_of_memory : Ending::not_connected);
    return Step::again;
  }
  // Bytes received before we sent anything are not a response. Check now: edge-triggered epoll reports them only
  // once, and may not have yet.
  char early = 0;
  const IoResult result = attempt_.connection().read_now(context_.net, &early, 1);
  if (result.kind == IoResult::Kind::again) return begin_sending();
  if (result.ok()) failure_ = "a response came before the request";
  end(result.ok() ? Ending::backend_garbled : Ending::backend_closed);
  return Step::again;
}

template <class Net>
Step Exchange<Net>::begin_sending() {
  attempt_.begin_sending();
  summary_.record.reached_backend = true;
  return go(State::sending);
}

template <class Net>
Step Exchange<Net>::send_request(std::uint32_t& reads) {
  if (attempt_.connection().may_read()) {
    sends_on_ = true;
    const Step read = read_response(reads);
    if (state_ == State::holding || state_ == State::streaming) context_.reschedule(owner_);  // for send_on()
    if (state_ != State::sending || read != Step::wait) return read;
    sends_on_ = false;
  }
  if (!attempt_.connection().may_write()) return Step::wait;
  summary_.end_wait(state_, context_.now);
  const std::size_t sent_before = attempt_.sent_bytes();
  const auto sent = attempt_.send(request_.body);
  if (attempt_.sent_bytes() > sent_before) deadlines_.arm_first_byte();
  switch (sent) {
    case Attempt<Net>::Sent::some: summary_.begin_wait(context_.net.now()); return Step::wait;
    case Attempt<Net>::Sent::share: context_.reschedule(owner_); return Step::wait;
    case Attempt<Net>::Sent::all:
      if (picker_.tries() == 1 && attempt_.is_first() && asked_without_usage_ == BackendId::none) {
        summary_.note_request_sent(attempt_.sent_ns());
      }
      break;
    case Attempt<Net>::Sent::failed: break;  // a backend may refuse within the body, and close: read what it said
  }
  return go(State::awaiting);
}

// A backend may stream its answer while it reads, and one that takes more has not stalled. An answer that is no success
// refuses the rest (RFC 9112 9.5).
template <class Net>
void Exchange<Net>::send_on() {
  if (relay_.response().is_success()) {
    if (!attempt_.connection().may_write()) return;
    const std::size_t sent_before = attempt_.sent_bytes();
    const auto sent = attempt_.send(request_.body);
    if (attempt_.sent_bytes() > sent_before) deadlines_.note_sent_on(state_);
    if (sent == Attempt<Net>::Sent::share) context_.reschedule(owner_);
    if (sent == Attempt<Net>::Sent::share || sent == Attempt<Net>::Sent::some) return;
  }
  sends_on_ = false;
}

// ---- the response ----

template <class Net>
Step Exchange<Net>::read_response(std::uint32_t& reads) {
  Connection<Net>& upstream = attempt_.connection();
  if (state_ == State::streaming && client_.waits()) {
    deadlines_.arm_write();
    return Step::wait;
  }
  if (!upstream.may_read()) return Step::wait;
  if (++reads > kReadsPerTurn) {
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
  if (state_ == State::streaming || state_ == State::holding) {
    pass({}, scratch, result.bytes);
  } else {
    read_head(scratch, result.bytes);
  }
  return Step::again;
}

template <class Net>
void Exchange<Net>::read_head(char* data, std::size_t bytes) {
  const ResponseHeadReader::Result result = relay_.read_head(data, bytes);
  switch (result.status) {
    case ResponseHeadReader::Status::need_more: return;
    case ResponseHeadReader::Status::done: return on_head(result);
    case ResponseHeadReader::Status::out_of_memory: return end(Ending::out_of_memory);
    case ResponseHeadReader::Status::too_large:
    case ResponseHeadReader::Status::too_many_fields: {
      const bool too_large = result.status == ResponseHeadReader::Status::too_large;
      context_.slab.limit_hit(too_large ? Limit::max_header : Limit::max_fields);
      failure_ = result.why;
      return end(Ending::backend_head_large);
    }
    case ResponseHeadReader::Status::failed: failure_ = result.why; return end(Ending::backend_garbled);
  }
}

inline bool is_short(const Framing& framing) {
  return framing.kind == Framing::Kind::length && framing.length <= kPathErrorBytes;
}

template <class Net>
void Exchange<Net>::on_head(const ResponseHeadReader::Result& result) {
  const std::uint16_t status = result.head.status;
  // Nexus's own key, in place of the client's: a 401 would tell the client that its key is wrong.
  if (status == 401 && attempt_.backend()->has_key) {
    failure_ = "401: it refuses the API key of its section (api_key_env or api_key_file)";
    return end(Ending::key_refused);
  }
  if (status == 429 || status >= 500) {
    const AttemptOutcome outcome = status == 429 ? AttemptOutcome::status_429 : AttemptOutcome::status_5xx;
    // A quota may be that of the key which the client sent: the backend serves the others.
    if (status != 429 || !passes_credentials(request_, *attempt_.backend())) {
      note_backend_failure(outcome, Digits(status).view(), retry_after_of(relay_.view(result)));
    } else {
      log_failed_attempt(outcome, "429 to the client's own key");
    }
    note_failed_answer(outcome);
  } else if (status >= 300 && picker_.permit().is_probe()) {
    note_backend_success();
  }
  if (adds_usage_event_ && (status == 400 || status == 422)) doubt_ = Doubt::usage;
  if (may_be_path_error(*endpoint_, status) && (status == 404 || is_short(result.head.framing))) doubt_ = Doubt::path;
  if (asked_without_usage_ != BackendId::none) [[unlikely]]
    note_usage_refused(status);
  if (named_id_ != 0 && status / 100 == 2) context_.shared.response_ids.remember(named_id_, attempt_.backend()->id);
  relay_.begin(*endpoint_, result, route(), facts_.stream, adds_usage_event_);
  const std::size_t head_bytes = result.head.head_bytes;
  pass(context_.text, result.data + head_bytes, result.bytes - head_bytes);
  relay_.drop_head();  // not needed any more, and a stream may be long
}

template <class Net>
void Exchange<Net>::pass(std::string_view head, char* data, std::size_t bytes) {
  ClientWrite write;
  pass_on(relay_.read(head, data, bytes, write), write);
}

template <class Net>
void Exchange<Net>::pass_on(Response::Step step, ClientWrite& write) {
  if (step == Response::Step::out_of_memory) return end(Ending::out_of_memory);
  const Response& response = relay_.response();
  if (const std::uint64_t id = relay_.take_id()) context_.shared.response_ids.remember(id, attempt_.backend()->id);
  if (doubt_ == Doubt::none) look_for_disguise(step == Response::Step::whole);
  if (deadlines_.awaits_first() && response.first_ns() >= 0) note_first();
  if (state_ != State::streaming) {
    if (is_held(step)) return hold(step, write);
    begin_streaming();
  }
  on_relayed(relay_.send(step, write));
}

template <class Net>
void Exchange<Net>::note_first() {
  deadlines_.note_first();
  if (answer_failed_ || !relay_.response().is_success()) return;
  context_.note_latency(*attempt_.backend(), context_.now - attempt_.sent_ns());
  // A stream may last for minutes: others need not wait for its end.
  if (picker_.permit().is_probe()) note_backend_success();
}

template <class Net>
bool Exchange<Net>::is_held(Response::Step step) const {
  if (answer_failed_) return keeping_;
  if (doubt_ != Doubt::none) return true;
  const Response& response = relay_.response();
  if (response.first_ns() >= 0 || !response.is_success() || step == Response::Step::whole) return false;
  return step == Response::Step::broken || context_.settings().upstream.head_delay_ns > 0;
}

template <class Net>
void Exchange<Net>::begin_streaming() {
  relay_.note_begun();
  note_fallback(summary_.record);
  go(State::streaming);
  if (!sends_on_) [[likely]]
    attempt_.drop_text();
  if (client_.holds()) client_.send_held();  // the next write to the client reports a failure
}

template <class Net>
RouteInfo Exchange<Net>::route() {
  reason_.clear();
  if (!retry_reason_.empty()) reason_.append("retry after ").append(retry_reason_).append(", ");
  append_reason(reason_, picker_.choice());
  RouteInfo route;
  route.backend_line = attempt_.backend()->response_line;
  route.request_id = summary_.request_id;
  route.reason = reason_;
  if (picker_.choice().fallback) route.fallback_model = *picker_.choice().model_name;
  return route;
}

template <class Net>
void Exchange<Net>::on_relayed(RelayOutcome outcome) {
  switch (outcome) {
    case RelayOutcome::more: return deadlines_.arm_stall();
    case RelayOutcome::whole: return end_response();
    case RelayOutcome::client_failed: return end(client_ending());
    case RelayOutcome::out_of_memory: return end(Ending::out_of_memory);
    case RelayOutcome::broken: failure_ = "its chunked coding is broken"; return end(Ending::backend_garbled);
  }
}

template <class Net>
void Exchange<Net>::end_response() {
  if (answer_failed_) {
    summary_.record.error = ErrorType::backend_error;
  } else {
    note_backend_success();
  }
  end_attempt(answer_failed_ ? failed_outcome_ : AttemptOutcome::ok);
  release_upstream(relay_.response().leaves_connection());
  go(State::finishing);
}

template <class Net>
Step Exchange<Net>::on_upstream_end(bool broken) {
  if (state_ == State::streaming || state_ == State::holding) {
    if (relay_.response().ends_with_connection() && !broken && !attempt_.send_failed()) {
      ClientWrite write;
      relay_.read_end(write);
      pass_on(Response::Step::whole, write);
    } else {
      end(Ending::backend_closed);
    }
  } else if (attempt_.found_closed(state_ == State::sending)) {
    relay_.drop_head();
    attempt_.start_over();
    return connect();
  } else {
    if (attempt_.answered()) failure_ = "it ended within its head";
    end(Ending::backend_closed);
  }
  return Step::again;
}

}  // namespace nexus
