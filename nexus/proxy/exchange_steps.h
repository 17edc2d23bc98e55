// exchange_steps.h
// Owns:     the steps of an exchange with a backend: connect, send the request, read the response, pass it on.
// Promises: a step does not block and calls no other step; it leaves the state with go() or end().
// Leaves:   the order of the steps, choosing a backend, and the ends to exchange.h. Users of Exchange include this.
// Threads:  its worker's.
// Tested by: tests/sim, tests/hostile
#pragma once

#include <cstring>

#include "nexus/base/limits.h"
#include "nexus/proxy/exchange.h"
#include "nexus/proxy/exchange_ends.h"

namespace nexus {

// ---- an attempt ----

template <class Net>
Step Exchange<Net>::begin_attempt() {
  const BackendView& backend = *picker_.backend();
  const Choice& choice = picker_.choice();
  attempt_.begin(snapshot_.again(), backend);
  summary_.record.backend = backend.id;
  adds_usage_event_ = asks_for_usage(backend, facts_, summary_.record.stream);
  const std::string& model = *choice.model_name;
  attempt_.compose(request_, facts_, model == entry_->name ? std::string_view() : model, adds_usage_event_,
                   summary_.request_id);
  return attempt_.take_kept() ? begin_sending() : connect();
}

template <class Net>
Step Exchange<Net>::connect() {
  const SocketOutcome outcome = attempt_.connect();
  if (outcome == SocketOutcome::ok) {
    summary_.begin_wait(context_.now);
    return go(State::connecting);
  }
  context_.log_lack(outcome);
  end(ending_of(outcome));
  return Step::again;
}

template <class Net>
Step Exchange<Net>::finish_connecting() {
  const IoResult established = attempt_.connection().establish(context_.net);
  if (established.kind == IoResult::Kind::again) return Step::wait;
  if (!established.ok()) {
    failure_ = strerror(established.error);
    end(Ending::not_connected);
    return Step::again;
  }
  // Bytes received before we sent anything are not a response. Check now: edge-triggered epoll reports them only
  // once.
  if (attempt_.connection().may_read()) {
    char early = 0;
    const IoResult result = attempt_.connection().read(context_.net, &early, 1);
    if (result.ok()) failure_ = "a response came before the request";
    if (result.kind != IoResult::Kind::again) {
      end(result.ok() ? Ending::backend_garbled : Ending::backend_closed);
      return Step::again;
    }
  }
  return begin_sending();
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
    const Step read = read_response(reads);
    if (state_ != State::sending || read != Step::wait) return read;
  }
  if (!attempt_.connection().may_write()) return Step::wait;
  const std::size_t sent_before = attempt_.sent_bytes();
  const auto sent = attempt_.send(request_.body);
  if (attempt_.sent_bytes() > sent_before) deadlines_.arm_first_byte();
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
  if (state_ == State::streaming) {
    on_relayed(relay_.pass(scratch, result.bytes));
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
    case ResponseHeadReader::Status::failed: failure_ = result.why; return end(Ending::backend_garbled);
  }
}

template <class Net>
void Exchange<Net>::on_head(const ResponseHeadReader::Result& result) {
  const std::uint16_t status = result.head.status;
  context_.note_latency(*attempt_.backend(), context_.now - attempt_.sent_ns());
  if (status == 429 || status >= 500) {
    note_backend_failure(status_outcome(status), Digits(status).view(), retry_after_of(relay_.view(result)));
    if (another()) return retry_after_status(result);
  } else if (picker_.permit().is_probe()) {
    note_backend_success();  // a stream may last for minutes: others need not wait for its end
  }
  // The client gets this response: from here on nothing is retried.
  summary_.record.fell_back = picker_.choice().fallback;
  summary_.record.fallback_to = picker_.choice().model;
  relay_.begin(*endpoint_, result, route(), adds_usage_event_);
  go(State::streaming);
  on_relayed(relay_.pass_first(result));
}

template <class Net>
void Exchange<Net>::retry_after_status(const ResponseHeadReader::Result& result) {
  const AttemptOutcome outcome = status_outcome(result.head.status);
  attempt_.end(outcome);
  release_upstream(leaves_connection(result));
  leave_backend();
  try_elsewhere(outcome, ApiError::backend_broke);
}

template <class Net>
AttemptOutcome Exchange<Net>::status_outcome(std::uint16_t status) {
  if (status == 429) return AttemptOutcome::status_429;
  return status >= 500 ? AttemptOutcome::status_5xx : AttemptOutcome::ok;
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
  note_backend_success();
  attempt_.end(status_outcome(relay_.response().status()));
  release_upstream(relay_.response().leaves_connection());
  go(State::finishing);
}

template <class Net>
Step Exchange<Net>::on_upstream_end(bool broken) {
  if (state_ == State::streaming) {
    if (relay_.response().ends_with_connection() && !broken && !attempt_.send_failed()) {
      on_relayed(relay_.end_body());
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
