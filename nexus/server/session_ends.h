// session_ends.h
// Owns:     the ways of a client connection between two requests and to its end: handshakes of TLS, idle times, our FIN
//           and what may still come after it, deadlines.
// Promises: a response that was sent is not destroyed by a reset of ours; each handshake is counted once, and one that
//           failed is no request.
// Leaves:   heads, bodies and responses to session_driver.h.
// Threads:  its worker's.
// Tested by: tests/worker_test.cpp, tests/client_limits_test.cpp, tests/sim, tests/hostile, tests/e2e/tls.test.mjs
#pragma once

#include "nexus/server/session_driver.h"

namespace nexus {

template <class Net>
bool SessionDriver<Net>::finish_handshake(SessionT& session) {
  const IoResult shaken = session.connection.establish(context_.net);
  if (shaken.kind == IoResult::Kind::again) return false;
  if (!shaken.ok()) {
    context_.log.event(LogLevel::debug, "TLS handshake failed",
                       {{"client", session.client_name}, {"why", session.connection.why(shaken)}});
    end_handshake(session);
    return false;
  }
  context_.slab.tls_handshake(TlsSide::client, *session.connection.handshake_outcome());
  session.certificate_name = session.connection.tls()->certificate_name();
  return true;
}

// The library has said what it could. Its alert would be destroyed by a reset, so the client's last bytes are read.
template <class Net>
void SessionDriver<Net>::end_handshake(SessionT& session) {
  Connection<Net>& connection = session.connection;
  context_.slab.tls_handshake(TlsSide::client, *connection.handshake_outcome());
  if (connection.out_of_memory()) context_.slab.limit_hit(Limit::memory);
  const bool spoke_http = connection.tls()->spoke_http();
  connection.continue_in_clear();
  if (spoke_http) {
    context_.slab.http_rejected(HttpRejection::malformed);
    pages_.refuse_head(session, ApiError::tls_expected);
  } else if (begin_linger(session, false) == Step::over) {
    return;
  }
  drive(session);
}

template <class Net>
Step SessionDriver<Net>::next_request(SessionT& session) {
  session.next_request();
  arm(session, context_.settings().server.idle_timeout_ns);
  return Step::again;
}

template <class Net>
Step SessionDriver<Net>::begin_linger(SessionT& session, bool whole) {
  session.input.clear();
  session.reading.reset();
  session.exchange.reset();
  session.lingered_bytes = 0;
  if (session.connection.failed() || session.connection.hangup()) return close(session);
  session.connection.finish(context_.net, whole);
  session.state = State::lingering;
  arm(session, context_.draining ? kFarewellTime : kLingerTime);
  return Step::again;
}

template <class Net>
Step SessionDriver<Net>::linger(SessionT& session, TurnShare& share) {
  if (session.connection.finishing()) session.connection.finish(context_.net, true);
  char* scratch = context_.scratch();
  while (scratch != nullptr && session.connection.may_read()) {
    if (++share.reads > kClientReadsPerTurn) return next_turn(session);
    const IoResult result = session.connection.read(context_.net, scratch, context_.scratch_bytes());
    if (result.kind == IoResult::Kind::again) break;
    session.lingered_bytes += result.bytes;
    if (!result.ok() || session.lingered_bytes > kMaxLingerBytes) return close(session);
  }
  return Step::wait;
}

template <class Net>
void SessionDriver<Net>::client_gone(SessionT& session) {
  if (session.exchange_active()) session.exchange->client_left();
  if (session.exchange_active()) {  // not counted yet: there was no memory
    session.state = State::exchanging;
    return arm_at(session, session.exchange->deadline());
  }
  if (session.exchange_state() == ExchangeState::over) {
    in_flight_ -= 1;
    if (session.exchange->cut()) session.connection.reset(context_.net);
    session.exchange.reset();
  }
  close(session);
}

template <class Net>
Step SessionDriver<Net>::close(SessionT& session) {
  assert(!session.exchange_active());
  session.connection.close(context_.net);
  placement_.give_back(context_.worker);
  context_.slab.add_client_connections(-1);
  sessions_.destroy(session.handle);
  acceptor_.resume();
  return Step::over;
}

template <class Net>
void SessionDriver<Net>::on_session_deadline(SessionT& session) {
  if (session.connection.handshaking()) {
    context_.slab.limit_hit(Limit::header_timeout);
    return end_handshake(session);
  }
  switch (session.state) {
    case State::reading_head:
      if (session.input.empty()) {  // idle between requests
        context_.slab.limit_hit(Limit::idle_timeout);
        // Not closed at once: a request that has just come would become a reset, which may overtake the last
        // response.
        if (begin_linger(session) == Step::over) return;
        break;
      }
      context_.slab.http_rejected(HttpRejection::header_timeout);
      context_.slab.limit_hit(Limit::header_timeout);
      pages_.refuse_head(session, ApiError::header_timeout);
      break;
    case State::reading_body:
      if (context_.now < session.exchange->deadline()) {
        if (session.reading->body.has_time()) return arm_body_deadline(session);
        context_.slab.limit_hit(Limit::body_timeout);
        refuse_body(session, ApiError::body_timeout);
        break;
      }
      session.state = State::exchanging;  // request_timeout has passed
      [[fallthrough]];
    case State::exchanging: session.exchange->on_deadline(); break;
    case State::waiting_page:
      if (session.waits_for_checks()) {
        answer_page(session);
      } else {
        pages_.answer_error(session, ApiError::metrics_unavailable);
      }
      break;
    case State::sending_page:
    case State::answering: context_.slab.limit_hit(Limit::write_timeout); [[fallthrough]];
    case State::lingering: close(session); return;
  }
  drive(session);
}

}  // namespace nexus
