// exchange_state.h
// Owns:     the state machine of an exchange as data: its states, their legal transitions, and every way that an
// attempt
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

namespace nexus {

enum class ExchangeState : std::uint8_t {
  idle,        // no request
  reading,     // the head is complete; the session reads the body
  choosing,    // picks the next backend
  queued,      // every candidate is at its cap
  connecting,  // to a backend
  sending,     // the request goes out
  awaiting,    // the request is sent; the response's head is to come
  streaming,   // the response's body is passed on
  finishing,   // all is written; the client's kernel buffer has not taken all of it
  counting,    // the exchange has ended; its record is to be counted
  over,        // counted; the session looks at keep_alive()
};

inline constexpr std::array<std::string_view, 11> kExchangeStateNames{"idle",       "reading",  "choosing", "queued",
                                                                      "connecting", "sending",  "awaiting", "streaming",
                                                                      "finishing",  "counting", "over"};

constexpr std::string_view to_string(ExchangeState state) {
  return kExchangeStateNames[static_cast<std::size_t>(state)];
}

namespace detail {

constexpr std::uint32_t states(auto... state) { return ((1u << static_cast<unsigned>(state)) | ...); }

// By state: the states that may follow. A client may leave, and memory run out, in every state with a request in it.
inline constexpr auto kNextStates = [] {
  using enum ExchangeState;
  return std::array<std::uint32_t, kExchangeStateNames.size()>{
      states(reading),                                                         // idle
      states(choosing, finishing, counting),                                   // reading
      states(choosing, queued, connecting, sending, finishing, counting),      // choosing
      states(choosing, queued, connecting, sending, finishing, counting),      // queued
      states(sending, choosing, finishing, counting),                          // connecting
      states(connecting, awaiting, streaming, choosing, finishing, counting),  // sending
      states(connecting, streaming, choosing, finishing, counting),            // awaiting
      states(finishing, counting),                                             // streaming
      states(counting),                                                        // finishing
      states(over),                                                            // counting
      states(idle),                                                            // over
  };
}();

}  // namespace detail

constexpr bool may_follow(ExchangeState from, ExchangeState to) {
  return (detail::kNextStates[static_cast<std::size_t>(from)] & detail::states(to)) != 0;
}

// How an attempt fails, or an exchange ends before its response is whole.
enum class Ending : std::uint8_t {
  not_connected,      // no connection to the backend
  backend_silent,     // the backend passed one of the [upstream] timeouts
  backend_closed,     // its connection ended before the response was whole
  backend_garbled,    // its response is not well-formed HTTP
  client_left,        // the client closed its connection, or writing to it failed
  client_stalled,     // the client took no byte for write_timeout
  client_unwritable,  // no memory for what the client's kernel buffer did not take
  out_of_memory,      // no memory for another step
};

enum class Fault : std::uint8_t { client, backend, nexus };

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

inline constexpr std::array<EndingRow, 8> kEndings{{
    {AttemptOutcome::connect_error,
     ErrorType::backend_error,
     ApiError::connect_failed,
     {},
     Fault::backend,
     true,
     Cut::by_error_event},
    {AttemptOutcome::timeout,
     ErrorType::timeout,
     ApiError::backend_timeout,
     {},
     Fault::backend,
     true,
     Cut::by_error_event},
    {AttemptOutcome::truncated,
     ErrorType::backend_error,
     ApiError::backend_broke,
     {},
     Fault::backend,
     true,
     Cut::by_error_event},
    {AttemptOutcome::bad_response,
     ErrorType::parse_error,
     ApiError::backend_not_http,
     {},
     Fault::backend,
     true,
     Cut::by_error_event},
    {AttemptOutcome::cancelled, ErrorType::client_closed, {}, {}, Fault::client, false, Cut::by_framing},
    {AttemptOutcome::cancelled, ErrorType::other, {}, Limit::write_timeout, Fault::client, false, Cut::by_reset},
    {AttemptOutcome::cancelled, ErrorType::other, {}, Limit::memory, Fault::nexus, false, Cut::by_reset},
    {AttemptOutcome::cancelled, ErrorType::other, ApiError::out_of_memory, Limit::memory, Fault::nexus, false,
     Cut::by_reset},
}};

constexpr const EndingRow& row_of(Ending ending) { return kEndings[static_cast<std::size_t>(ending)]; }

// The result of a step of an exchange: says if the next step can be taken now.
enum class Step : std::uint8_t {
  again,
  wait,  // for an event, a deadline or a grant
  over,
};

}  // namespace nexus
