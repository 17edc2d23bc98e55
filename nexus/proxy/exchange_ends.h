// exchange_ends.h
// Owns:     the ways of an exchange that fail: passed deadlines, the endings of attempts, cut responses.
// Promises: another backend is tried only while no byte went to the client; a client that has got a part of a response
//           can tell that it is not whole.
// Leaves:   what each ending means to kEndings (exchange_state.h); counting the request to exchange.h.
// Threads:  its worker's.
// Tested by: tests/endings_test.cpp, tests/sim, tests/hostile
#pragma once

#include "nexus/proxy/exchange.h"

namespace nexus {

template <class Net>
void Exchange<Net>::on_deadline() {
  if (deadlines_.request_passed_first()) {
    end(Ending::request_timed_out);
    return drive();
  }
  switch (state_) {
    case State::queued: on_queue_deadline(); break;
    case State::connecting: end(Ending::connect_silent); break;
    case State::sending:
    case State::awaiting: end(Ending::first_byte_silent); break;
    case State::streaming: end(client_.waits() ? Ending::client_stalled : Ending::stalled); break;
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
  if (ending == Ending::client_left) summary_.record.disconnect = disconnect_phase();
  if (row.fault == Fault::backend) note_backend_failure(row.outcome, std::exchange(failure_, {}));
  if (state_ == State::streaming && row.fault != Fault::host) relay_.note_usage();
  attempt_.end(row.outcome);
  close_upstream();
  if (client_.has_begun() || !row.error) return cut_response(row);
  leave_backend();
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
  summary_.record.error = row.error_type;
  summary_.cut_short = true;
  client_.end_connection();
  // The FIN would be the proper end of a body that lasts until the connection's end.
  if (row.cut == Cut::by_reset || relay_.response().lasts_until_close()) client_.cut_connection();
  // While the exchange is finishing, the end of the body is written already.
  const bool told = row.cut == Cut::by_error_event && !client_.cut() && state_ == State::streaming &&
                    (!relay_.tells_error_event() || client_.send_error_event(row_of(*row.error)));
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
void Exchange<Net>::note_backend_failure(AttemptOutcome why, std::string_view detail, std::optional<Ns> retry_after) {
  const BackendView& backend = *attempt_.backend();
  context_.attempt_log.failed(context_.log, context_.now, backend, why, detail, to_string(state_), summary_.request_id);
  const Ns span = picker_.permit().failed(context_.now, context_.settings().health, why, retry_after);
  if (span > 0) AttemptLog::ejected(context_.log, backend, why, span);
}

}  // namespace nexus
