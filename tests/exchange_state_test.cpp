#include "nexus/proxy/exchange_state.h"

#include <doctest/doctest.h>

#include "nexus/server/session.h"

using namespace nexus;

namespace {

constexpr std::size_t kStates = kExchangeStateNames.size();

ExchangeState state(std::size_t index) { return static_cast<ExchangeState>(index); }

}  // namespace

TEST_CASE("every state of an exchange can be reached from idle, and idle from every state") {
  for (std::size_t from = 0; from < kStates; ++from) {
    std::uint32_t reached = 1u << from;
    for (std::size_t round = 0; round < kStates; ++round) {
      for (std::size_t at = 0; at < kStates; ++at) {
        if ((reached >> at & 1u) == 0) continue;
        for (std::size_t to = 0; to < kStates; ++to) reached |= std::uint32_t{may_follow(state(at), state(to))} << to;
      }
    }
    CAPTURE(to_string(state(from)));
    CHECK(reached == (1u << kStates) - 1);
  }
}

TEST_CASE("an exchange is counted before it is over, and nothing but idle follows that") {
  for (std::size_t from = 0; from < kStates; ++from) {
    CAPTURE(to_string(state(from)));
    CHECK(may_follow(state(from), ExchangeState::over) == (state(from) == ExchangeState::counting));
    CHECK(may_follow(ExchangeState::over, state(from)) == (state(from) == ExchangeState::idle));
  }
}

TEST_CASE("once a response streams, no other backend can be tried") {
  for (const ExchangeState to : {ExchangeState::choosing, ExchangeState::queued, ExchangeState::connecting,
                                 ExchangeState::sending, ExchangeState::awaiting}) {
    CHECK_FALSE(may_follow(ExchangeState::streaming, to));
    CHECK_FALSE(may_follow(ExchangeState::finishing, to));
  }
}

TEST_CASE("only a backend's failure, and a lack that another backend may not meet, is retried; each can be told") {
  for (const EndingRow& row : kEndings) {
    const bool memory = row.limit == Limit::memory;
    CHECK(row.retry == (row.fault == Fault::backend || (row.fault == Fault::host && !memory)));
    CHECK((!row.retry || row.error.has_value()));
    CHECK((row.outcome == AttemptOutcome::cancelled) == (row.fault != Fault::backend));
    CHECK(row.error_type != ErrorType::none);
    if (row.error) CHECK(row_of(*row.error).label == row.error_type);
  }
}

TEST_CASE("a session waits with an exchange in a state that belongs to it") {
  using enum ExchangeState;
  for (std::size_t i = 0; i < kSessionStateNames.size(); ++i) {
    const auto session = static_cast<SessionState>(i);
    CAPTURE(to_string(session));
    const bool holds_exchange = session == SessionState::reading_body || session == SessionState::exchanging;
    CHECK(may_wait(session, idle) == !holds_exchange);
    CHECK(may_wait(session, reading) == (session == SessionState::reading_body));
    CHECK(may_wait(session, streaming) == (session == SessionState::exchanging));
    CHECK_FALSE(may_wait(session, choosing));  // a step of its own, in which nobody waits
    CHECK_FALSE(may_wait(session, over));
  }
}
