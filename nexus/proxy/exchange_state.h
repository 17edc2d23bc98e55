// exchange_state.h
// Owns:     the state machine of an exchange as data: its states, their legal transitions, and the ways that an attempt
//           or a whole exchange can end badly.
// Promises: each ending is one row: what is counted, what the client is told, whose fault it was, whether another
//           backend may be tried, whether the client's connection is cut.
// Leaves:   acting on a row to exchange.h.
// Threads:  any; constants.
// Tested by: tests/exchange_state_test.cpp, tests/sim
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

#include "nexus/api/errors.h"
#include "nexus/metrics/slab.h"
#include "nexus/net/epoll.h"

namespace nexus {

enum class ExchangeState : std::uint8_t {
  idle,        // no request
  reading,     // the head is complete; the session reads the body
  choosing,    // picks the next backend
  expecting,   // no backend can serve the request yet, but one was never checked
  queued,      // every candidate is at its cap
  connecting,  // to a backend
  sending,     // the request goes out
  awaiting,    // the request is sent; the response's head is to come
  holding,     // the head is here, but the response says nothing yet, or is an error: the client has got nothing
  streaming,   // the response's body is passed on
  finishing,   // all is written; the client's kernel buffer has not taken all of it
  counting,    // the exchange has ended; its record is to be counted
  over,        // counted; the session looks at keep_alive()
};

inline constexpr std::array<std::string_view, 13> kExchangeStateNames{
    "idle",     "reading", "choosing",  "expecting", "queued",   "connecting", "sending",
    "awaiting", "holding", "streaming", "finishing", "counting", "over"};

constexpr std::string_view to_string(ExchangeState state) {
  return kExchangeStateNames[static_cast<std::size_t>(state)];
}

namespace detail {

constexpr std::uint32_t states(auto... state) { return ((1u << static_cast<unsigned>(state)) | ...); }

// By state: the states that may follow. A client may leave, and memory run out, in every state with a request in it.
inline constexpr auto kNextStates = [] {
  using enum ExchangeState;
  return std::array<std::uint32_t, kExchangeStateNames.size()>{
      states(reading),                                                                  // idle
      states(choosing, finishing, counting),                                            // reading
      states(choosing, expecting, queued, connecting, sending, finishing, counting),    // choosing
      states(choosing, finishing, counting),                                            // expecting
      states(choosing, expecting, queued, connecting, sending, finishing, counting),    // queued
      states(sending, choosing, finishing, counting),                                   // connecting
      states(connecting, awaiting, holding, streaming, choosing, finishing, counting),  // sending
      states(connecting, holding, streaming, choosing, finishing, counting),            // awaiting
      states(connecting, sending, streaming, choosing, finishing, counting),            // holding
      states(finishing, counting),                                                      // streaming
      states(counting),                                                                 // finishing
      states(over),                                                                     // counting
      states(idle),                                                                     // over
  };
}();

}  // namespace detail

constexpr bool may_follow(ExchangeState from, ExchangeState to) {
  return (detail::kNextStates[static_cast<std::size_t>(from)] & detail::states(to)) != 0;
}

// How an attempt fails, or an exchange ends before its response is whole.
enum class Ending : std::uint8_t {
  not_connected,       // the backend refused the connection
  no_descriptor,       // for a connection to the backend: on this host, as the next two
  no_port,             // of this host
  no_route,            // from this host to the backend's network
  connect_silent,      // no connection within connect_timeout
  first_byte_silent,   // no byte of the response within first_byte_timeout
  stalled,             // no further byte of the response within stall_timeout
  request_timed_out,   // all of the request together took longer than request_timeout
  backend_closed,      // its connection ended before the response was whole
  backend_garbled,     // its response is not well-formed HTTP
  key_refused,         // it does not take the API key that the configuration has for it
  backend_head_large,  // the head of its response exceeds max_header or max_fields
  client_left,         // the client closed its connection, or writing to it failed
  client_stalled,      // the client took no byte for write_timeout
  client_unwritable,   // no memory for what the client's kernel buffer did not take
  out_of_memory,       // no memory for another step
  drained,             // the process ends
};

enum class Fault : std::uint8_t {
  client,
  backend,
  host,   // lacks descriptors, ports, a route or memory
  nexus,  // a limit of the whole request, or the end of the process
};

// The sign for a client that the response it has begun to get is not whole.
enum class Cut : std::uint8_t {
  by_framing,      // the missing end of a chunked body or of a length; a reset if only the FIN would be the end
  by_error_event,  // as before, and an event stream gets an error event first
  by_reset,        // always a reset
};

struct EndingRow {
  AttemptOutcome outcome;         // of the attempt in hand
  ErrorType error_type;           // of the request, once its response has begun
  std::optional<ApiError> error;  // for the client, before that; none: it can't be told, and its status is 499
  std::optional<Limit> limit;     // the limit that was reached
  Fault fault;                    // only a backend's own failure counts against it
  bool retry;                     // another backend may be tried while no byte went to the client
  Cut cut;
};

inline constexpr auto kEndings = [] {
  using enum AttemptOutcome;
  using E = ErrorType;
  using A = ApiError;
  using L = Limit;
  using F = Fault;
  constexpr Cut event = Cut::by_error_event, reset = Cut::by_reset;
  return std::to_array<EndingRow>({
      {connect_error, E::backend_error, A::connect_failed, {}, F::backend, true, event},          // not_connected
      {cancelled, E::overloaded, A::no_descriptor, L::descriptors, F::host, true, event},         // no_descriptor
      {cancelled, E::overloaded, A::no_port, L::ports, F::host, true, event},                     // no_port
      {cancelled, E::overloaded, A::no_route, {}, F::host, true, event},                          // no_route
      {timeout, E::timeout, A::backend_timeout, L::connect_timeout, F::backend, true, event},     // connect_silent
      {timeout, E::timeout, A::backend_timeout, L::first_byte_timeout, F::backend, true, event},  // first_byte_silent
      {timeout, E::timeout, A::backend_timeout, L::stall_timeout, F::backend, true, event},       // stalled
      {cancelled, E::timeout, A::request_timeout, L::request_timeout, F::nexus, false, event},    // request_timed_out
      {truncated, E::backend_error, A::backend_broke, {}, F::backend, true, event},               // backend_closed
      {bad_response, E::parse_error, A::backend_not_http, {}, F::backend, true, event},           // backend_garbled
      {bad_response, E::backend_error, A::backend_refuses_key, {}, F::backend, true, event},      // key_refused
      {bad_response, E::parse_error, A::backend_head_too_large, {}, F::backend, true, event},     // backend_head_large
      {cancelled, E::client_closed, {}, {}, F::client, false, Cut::by_framing},                   // client_left
      {cancelled, E::other, {}, L::write_timeout, F::client, false, reset},                       // client_stalled
      {cancelled, E::overloaded, {}, L::memory, F::host, false, reset},                           // client_unwritable
      {cancelled, E::overloaded, A::out_of_memory, L::memory, F::host, false, reset},             // out_of_memory
      {cancelled, E::drain, A::draining, {}, F::nexus, false, event},                             // drained
  });
}();
static_assert(kEndings.size() == static_cast<std::size_t>(Ending::drained) + 1);

constexpr const EndingRow& row_of(Ending ending) { return kEndings[static_cast<std::size_t>(ending)]; }

// The ending of an attempt for which connect() could not start.
constexpr Ending ending_of(SocketOutcome outcome) {
  switch (outcome) {
    case SocketOutcome::no_descriptor: return Ending::no_descriptor;
    case SocketOutcome::no_memory: return Ending::out_of_memory;
    case SocketOutcome::again:
    case SocketOutcome::no_port: return Ending::no_port;
    case SocketOutcome::no_route: return Ending::no_route;
    case SocketOutcome::ok:
    case SocketOutcome::failed: break;
  }
  return Ending::not_connected;
}

// The result of a step of an exchange: says if the next step can be taken now.
enum class Step : std::uint8_t {
  again,
  wait,  // for an event, a deadline or a grant
  over,
};

}  // namespace nexus
