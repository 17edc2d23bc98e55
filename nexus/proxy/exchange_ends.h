// exchange_ends.h
// Owns:     the ways of an exchange that fail: passed deadlines, the endings of attempts, cut responses; and the
//           responses that are held back or kept, because another backend may give a better one.
// Promises: another backend is tried only while no byte went to the client; a client that has got a part of a response
//           can tell that it is not whole.
// Leaves:   what each ending means to kEndings (exchange_state.h); counting the request to exchange.h.
// Threads:  its worker's.
// Tested by: tests/endings_test.cpp, tests/sim, tests/hostile
#pragma once

#include <array>

#include "nexus/api/path_errors.h"
#include "nexus/proxy/exchange.h"
#include "nexus/proxy/exchange_trace.h"

namespace nexus {

template <class Net>
void Exchange<Net>::on_deadline() {
  if (deadlines_.request_passed_first()) {
    end(Ending::request_timed_out);
    return drive();
  }
  switch (state_) {
    case State::expecting: go(State::choosing); break;
    case State::queued: on_queue_deadline(); break;
    case State::connecting:
      attempt_.count_handshake();
      end(Ending::connect_silent);
      break;
    case State::sending:
    case State::awaiting: end(Ending::first_byte_silent); break;
    case State::holding: on_hold_deadline(); break;
    case State::streaming:
      end(client_.waits()             ? Ending::client_stalled
          : deadlines_.awaits_first() ? Ending::first_byte_silent
                                      : Ending::stalled);
      break;
    case State::finishing: end(Ending::client_stalled); break;
    case State::counting: break;
    case State::idle:
    case State::reading:
    case State::choosing:
    case State::over: assert(false);
  }
  drive();
}

template <class Net>
void Exchange<Net>::give_up() {
  if (active() && state_ != State::counting) end(Ending::drained);
  drive();
  if (state_ == State::finishing) commit();  // the kernel does not take the rest at once
  if (state_ != State::counting) return;
  deadlines_.expire_state();  // the last chance
  count();
  if (state_ != State::over) go(State::over);
}

template <class Net>
void Exchange<Net>::end(Ending ending) {
  if (summary_.cut_short) {  // for an earlier reason, which counts; now not even the error event can be sent
    client_.cut_connection();
    return commit();
  }
  const EndingRow& row = row_of(ending);
  if (row.limit) context_.slab.limit_hit(*row.limit);
  // A client may leave because of the error that it was told: then the backend failed first.
  if (ending == Ending::client_left && !failed_for_client()) summary_.record.disconnect = disconnect_phase();
  if (row.fault == Fault::backend) note_backend_failure(row.outcome, std::exchange(failure_, {}));
  if (state_ == State::streaming && row.fault != Fault::host) relay_.note_usage();
  end_attempt(answer_failed_ ? failed_outcome_ : row.outcome);  // what the backend has answered remains
  close_upstream();
  leave_backend();  // its place and its trial do not wait for a slow client
  if (client_.has_begun() || !row.error) return cut_response(row);
  drop_answer();
  if (row.retry && !deadlines_.request_expired() && another()) {
    return try_elsewhere(row.outcome, *row.error);
  }
  client_.forget_unsent();
  refuse(*row.error, state_ != State::reading);
}

template <class Net>
void Exchange<Net>::try_elsewhere(AttemptOutcome outcome, ApiError error) {
  last_failure_ = error;
  retry_reason_ = name_of(outcome);
  go(State::choosing);
}

template <class Net>
void Exchange<Net>::cut_response(const EndingRow& row) {
  if (!client_.has_begun()) summary_.record.status = 499;
  summary_.record.error = failed_for_client() ? ErrorType::backend_error : row.error_type;
  summary_.record.by_client = row.fault == Fault::client && !failed_for_client();
  if (!client_.has_begun()) drop_answer();
  summary_.cut_short = true;
  client_.end_connection();
  // The FIN would be the proper end of a body that lasts until the connection's end.
  if (row.cut == Cut::by_reset || relay_.response().lasts_until_close()) client_.cut_connection();
  // While the exchange is finishing, the end of the body is written already.
  const bool told =
      row.cut == Cut::by_error_event && !client_.cut() && state_ == State::streaming &&
      (!relay_.tells_error_event() ||
       client_.send_error_event(row_of(*row.error), *endpoint_, relay_.response().stream_end(), summary_.request_id));
  if (!told) return commit();
  go(State::finishing);
}

template <class Net>
DisconnectPhase Exchange<Net>::disconnect_phase() const {
  const bool first_choice = state_ == State::choosing && picker_.tries() == 0;
  if (state_ == State::reading || first_choice) return DisconnectPhase::request;
  const bool answering = state_ == State::streaming || state_ == State::finishing;
  return answering ? DisconnectPhase::streaming : DisconnectPhase::waiting;
}

template <class Net>
void Exchange<Net>::log_failed_attempt(AttemptOutcome why, std::string_view detail) {
  context_.attempt_log.failed(context_.log, context_.now, *attempt_.backend(), why, detail, to_string(state_),
                              summary_.request_id);
}

template <class Net>
void Exchange<Net>::note_backend_failure(AttemptOutcome why, std::string_view detail, std::optional<Ns> retry_after) {
  const BackendView& backend = *attempt_.backend();
  log_failed_attempt(why, detail);
  const Ns span = picker_.permit().failed(context_.now, context_.settings().health, why, retry_after);
  if (span > 0) AttemptLog::ejected(context_.log, backend, why, span);
  context_.want_check(backend.id);
}

template <class Net>
void Exchange<Net>::refuse(ApiError error, bool keep_alive, std::string_view message, std::string_view param) {
  assert(active());
  close_upstream();
  leave_backend();
  if (client_.keeps()) return give_kept_answer();
  const ApiErrorRow& row = row_of(error);
  if (!keep_alive || context_.draining) client_.end_connection();
  summary_.record.status = row.status;
  summary_.record.error = row.label;
  if (!client_.send_error(error, endpoint_->row().errors, {message, param, summary_.request_id}))
    return end(client_ending());
  go(State::finishing);
}

// ---- responses that the client has not got yet ----

template <class Net>
void Exchange<Net>::note_failed_answer(AttemptOutcome outcome) {
  answer_failed_ = true;
  failed_outcome_ = outcome;
  keeping_ = !client_.has_begun() && !deadlines_.request_expired() && another();
}

template <class Net>
void Exchange<Net>::look_for_disguise(bool whole) {
  if (!answer_failed_ && relay_.response().is_error_in_disguise(whole)) note_disguise();
}

template <class Net>
void Exchange<Net>::note_disguise() {
  note_backend_failure(AttemptOutcome::bad_response, "its 2xx is an error");
  note_failed_answer(AttemptOutcome::bad_response);
  end_attempt(failed_outcome_);
  if (keeping_ && state_ == State::holding) deadlines_.arm_hold(kKeptAnswerTime);
}

template <class Net>
void Exchange<Net>::hold(Response::Step step, ClientWrite& write) {
  if (step == Response::Step::broken) {
    failure_ = "its chunked coding is broken";
    return end(Ending::backend_garbled);
  }
  const bool fits = client_.hold(write);
  if (doubt_ != Doubt::none && (!fits || step == Response::Step::whole)) return settle_doubt(fits, step, write);
  if (!fits && !keeping_) {
    begin_streaming();
    return on_relayed(relay_.send(step, write));
  }
  if (!fits || step == Response::Step::whole) return leave_failed_answer(fits);
  if (state_ == State::holding) return;
  go(State::holding);
  if (keeping_ || doubt_ != Doubt::none) deadlines_.arm_hold(kKeptAnswerTime);
}

template <class Net>
void Exchange<Net>::settle_doubt(bool fits, Response::Step step, ClientWrite& write) {
  const Doubt doubt = std::exchange(doubt_, Doubt::none);
  const bool about_usage = doubt == Doubt::usage && client_.held().find("stream_options") != std::string_view::npos;
  if (fits && about_usage) return ask_without_usage();
  const Response& response = relay_.response();
  if (fits && doubt == Doubt::path && named_id_ == 0 &&
      is_path_error(*endpoint_, response.status(), body_of(client_.held(), response.is_chunked())))
    return pass_over_server();
  // An id in the path may be the reason of a 404: nothing follows for other ids.
  if (fits && doubt == Doubt::path && named_id_ != 0 && response.status() == 404) {
    picker_.forgive();
    if (another()) return ask_next_for_id();
  }
  look_for_disguise(step == Response::Step::whole);
  if (keeping_) return leave_failed_answer(fits);
  begin_streaming();
  ClientWrite nothing;
  on_relayed(relay_.send(step, fits ? nothing : write));
}

// The backend is asked again without the option, which may be the reason of its refusal.
template <class Net>
void Exchange<Net>::ask_without_usage() {
  asked_without_usage_ = attempt_.backend()->id;
  end_answered_attempt();
  begin_attempt();
}

// A refusal is believed once the request without the option went well. If the client sent options of its own, they may
// have been the reason.
template <class Net>
void Exchange<Net>::note_usage_refused(std::uint16_t status) {
  const BackendView& backend = *attempt_.backend();
  if (backend.id != asked_without_usage_ || status / 100 != 2) return;
  if (facts_.stream_options != BodyFacts::Options::absent || !backend.facts->note_refusal()) return;
  context_.log.event(
      LogLevel::warning,
      "backend refuses stream_options: its streams tell no token counts; stream_usage = as_is stops asking",
      {{"backend", backend.name}});
}

// The server does not know the path: the request goes to another one, which does not count as a retry.
template <class Net>
void Exchange<Net>::pass_over_server() {
  const BackendView& backend = *attempt_.backend();
  if (backend.facts->note_missing(bit_of(*endpoint_))) {
    context_.log.event(LogLevel::info, "backend does not serve this path: other backends get its requests",
                       {{"backend", backend.name}, {"path", endpoint_->path}});
  }
  end_answered_attempt();
  picker_.leave();
  picker_.take_back();
  go(State::choosing);
}

// The backend does not know the stored response: another one may have it.
template <class Net>
void Exchange<Net>::ask_next_for_id() {
  end_answered_attempt();
  picker_.leave();
  go(State::choosing);
}

// The attempt is over with an answer that nobody gets.
template <class Net>
void Exchange<Net>::end_answered_attempt() {
  if (state_ != State::holding) go(State::holding);
  end_attempt(AttemptOutcome::ok);
  const bool reusable = relay_.response().leaves_connection();
  drop_answer();
  release_upstream(reusable);
  attempt_.leave();
}

template <class Net>
void Exchange<Net>::on_hold_deadline() {
  const Doubt doubt = std::exchange(doubt_, Doubt::none);
  if (doubt != Doubt::none) look_for_disguise(false);
  if (keeping_) return leave_failed_answer(false);
  if (deadlines_.first_byte_expired()) return end(Ending::first_byte_silent);
  const Ns head_delay = context_.settings().upstream.head_delay_ns;
  if (doubt != Doubt::none && head_delay > kKeptAnswerTime && is_held(Response::Step::goes_on))
    return deadlines_.arm_hold(head_delay - kKeptAnswerTime);
  begin_streaming();  // after head_delay the client sees life
  ClientWrite nothing;
  on_relayed(relay_.send(Response::Step::goes_on, nothing));
}

template <class Net>
void Exchange<Net>::leave_failed_answer(bool whole) {
  end_attempt(failed_outcome_);
  const bool reusable = whole && relay_.response().leaves_connection();
  if (whole) keep_answer();
  drop_answer();
  release_upstream(reusable);
  leave_backend();
  try_elsewhere(failed_outcome_, ApiError::backend_broke);
}

template <class Net>
void Exchange<Net>::drop_answer() {
  client_.drop_held();
  relay_.reset();
}

template <class Net>
void Exchange<Net>::keep_answer() {
  kept_ = std::make_unique<Kept>();
  kept_->backend.assign(attempt_.backend()->name);
  kept_->model_used.assign(*picker_.choice().model_name);
  kept_->first_ns = relay_.response().first_ns();
  kept_->ends_connection = relay_.says_close();
  kept_->record = summary_.record;
  kept_->record.status = relay_.response().status();
  kept_->record.error = ErrorType::backend_error;
  kept_->record.stream = relay_.response().is_success() && relay_.response().is_stream();
  note_fallback(kept_->record);
  relay_.response().note_usage(kept_->record, summary_.complete_ns);
  client_.keep_held();
}

template <class Net>
void Exchange<Net>::give_kept_answer() {
  kept_->given = true;
  summary_.record = kept_->record;
  if (kept_->ends_connection) client_.end_connection();
  if (!client_.send_kept()) return end(client_ending());
  go(State::finishing);
}

template <class Net>
void Exchange<Net>::refuse_unknown_model() {
  if (snapshot_->discovering) return refuse(ApiError::no_healthy_backend, true);
  refuse(ApiError::model_not_found, true, unknown_model_message(*snapshot_, summary_.model, key_.settings()), "model");
}

template <class Net>
void Exchange<Net>::refuse_by_key(Limit limit, ApiError error) {
  context_.slab.limit_hit(limit);
  summary_.record.by_client = true;
  client_.set_rate_lines(key_.rate_lines());
  if (error != ApiError::model_not_found) return refuse(error, true, key_.message());
  refuse(error, true, unknown_model_message(*snapshot_, summary_.model, key_.settings()), "model");
}

template <class Net>
void Exchange<Net>::commit() {
  assert(attempt_.upstream() == nullptr);
  leave_backend();
  picker_.end();
  overall_place_.reset();
  key_.leave(context_.shared.admission, summary_.record);
  if (summary_.ended_ns < 0) summary_.ended_ns = context_.net.now();
  summary_.record.duration_ns = summary_.ended_ns - summary_.started_ns;
  if (context_.watches) note_end();
  if (error_of(summary_.record) != ErrorType::none) [[unlikely]]
    note_failed_request();
  go(State::counting);
}

template <class Net>
void Exchange<Net>::note_failed_request() {
  const RequestRecord& record = summary_.record;
  if (record.disconnect != DisconnectPhase::none) return;
  context_.shared.metrics.failures().note(context_.net.wall_now(), record.status, name_of(error_of(record)),
                                          record.backend, summary_.model, summary_.request_id);
  // Without an access log a failure leaves a line all the same, but no more than one a second.
  if (context_.log.wants_access() || (record.status < 500 && record.status != 429)) return;
  if (context_.now < context_.next_failure_log_ns) return void(context_.failures_left_out += 1);
  context_.next_failure_log_ns = context_.now + kAttemptLogInterval;
  std::array<char, kMaxLogValueBytes> tries;
  context_.log.event(LogLevel::warning, "request failed",
                     {{"request_id", summary_.request_id},
                      {"key", key_.name()},
                      {"model", summary_.model},
                      {"status", Digits(record.status).view()},
                      {"error_type", name_of(error_of(record))},
                      {"tries", attempt_.tries(tries)},
                      {"duration_ms", Digits(static_cast<std::uint64_t>(record.duration_ns / kMillisecond)).view()},
                      {"left_out", Digits(std::exchange(context_.failures_left_out, 0)).view()}});
}

template <class Net>
Step Exchange<Net>::count() {
  if (deadlines_.state_pending()) return Step::wait;
  try {
    context_.slab.record(summary_.record);
  } catch (const std::bad_alloc&) {
    context_.slab.limit_hit(Limit::memory);
    deadlines_.arm_count_retry();
    return Step::wait;
  }
  return go(State::over);
}

template <class Net>
void Exchange<Net>::log_access() {
  const bool gave_kept = kept_ && kept_->given;
  const Ns first_ns = gave_kept ? kept_->first_ns : relay_.response().first_ns();
  AccessEntry entry = summary_.access_entry(first_ns, client_.sent_bytes());
  entry.key = key_.name();
  entry.endpoint = name_of(endpoint_->api);
  entry.has_slo = context_.settings().slo.on();
  if (summary_.record.slo != Slo::none) entry.slo = kSloNames[static_cast<std::size_t>(summary_.record.slo)];
  entry.request_bytes = body_bytes_;
  entry.route = reason_;
  std::array<char, kMaxLogValueBytes> tries;
  entry.tries = attempt_.tries(tries);
  const bool keyed = attempt_.backend() != nullptr && is_keyed(summary_.record.affinity);
  const Digits affinity(keyed ? picker_.affinity() >> 32 | 1ull << 32 : 0, 16);  // eight behind the 1
  if (keyed) entry.affinity = affinity.view().substr(1);
  if (attempt_.backend() != nullptr) {
    entry.model_used = *picker_.choice().model_name;
    entry.attempts = picker_.tries();
  }
  if (summary_.record.backend != BackendId::none) entry.backend = attempt_.backend()->name;
  if (gave_kept) {
    entry.backend = kept_->backend;
    entry.model_used = kept_->model_used;
  }
  context_.log.access(entry);
}

}  // namespace nexus
