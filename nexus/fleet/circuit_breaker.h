// circuit_breaker.h
// Owns:     how requests have found one server: its circuit breaker (consecutive failures, the end of its ejection,
//           the half-open probe), and facts that they have shown about it.
// Promises: while the circuit is closed a request costs one relaxed load and a success writes nothing; after an
//           ejection exactly one request over all threads is the probe; a probe that ends without a result passes to
//           the next request. A backend with a new address has a new breaker (registry.h): results of requests to
//           the old server never count against the new one. A fact is noted once; it lasts until the backend gets
//           another address or becomes healthy again.
// Leaves:   what counts as a failure to exchange.h (of the 4xx only 429 does); trying an ejected backend as the last
//           resort to candidate_picker.h; failed health checks to registry.h.
// Threads:  any; a breaker's state is one atomic word, facts are relaxed, because only the fact is shared.
// Tested by: tests/circuit_breaker_test.cpp, tests/e2e/usage.test.mjs
#pragma once

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/config/settings.h"
#include "nexus/metrics/slab.h"

namespace nexus {

class ServerFacts {
 public:
  // It refuses requests with stream_options.
  bool refuses_stream_options() const { return refuses_stream_options_.load(std::memory_order_relaxed); }
  // True for the first call.
  bool note_refusal() { return !refuses_stream_options_.exchange(true, std::memory_order_relaxed); }
  void forget() { refuses_stream_options_.store(false, std::memory_order_relaxed); }

  // Paths that the server does not know: a bit for each endpoint, since the last health check that passed.
  bool lacks(std::uint64_t path) const { return (missing_paths_.load(std::memory_order_relaxed) & path) != 0; }
  // True for the first call.
  bool note_missing(std::uint64_t path) {
    return (missing_paths_.fetch_or(path, std::memory_order_relaxed) & path) == 0;
  }
  void forget_paths() { missing_paths_.store(0, std::memory_order_relaxed); }

 private:
  std::atomic<bool> refuses_stream_options_{false};
  std::atomic<std::uint64_t> missing_paths_{0};
};

enum class CircuitState : std::uint8_t {
  closed,     // the server gets requests
  open,       // it is ejected, or its probe is still running: requests only as a last resort
  half_open,  // its ejection is over: the next request is the probe that decides
};

// Aligned to a cache line, so that a failing server's writes do not evict the words of the others.
class alignas(64) CircuitBreaker {
 public:
  // Permission to send one request to the server, from enter(); the breaker outlives it. Its result is reported once. A
  // probe that is destroyed without one (the client left, no descriptor was free) makes the circuit half-open again.
  class Permit {
   public:
    Permit() = default;

    // The circuit's state when the request entered. Open: the request may be sent only as a last resort.
    bool circuit_open() const { return breaker_.get_deleter().entered == CircuitState::open; }
    bool is_probe() const { return breaker_.get_deleter().entered == CircuitState::half_open; }

    // True if this ends an ejection.
    bool succeeded(Ns now) {
      CircuitBreaker* breaker = breaker_.release();
      return breaker != nullptr && breaker->record_success(is_probe(), now);
    }

    // `retry_after` is from the backend's 429 or 503. Returns for how long this failure ejects the backend, or 0: also
    // if the backend is ejected already, and only the end of that moves.
    Ns failed(Ns now, const HealthSettings& settings, AttemptOutcome why, std::optional<Ns> retry_after = {}) {
      CircuitBreaker* breaker = breaker_.release();
      if (breaker == nullptr) return 0;
      return breaker->record_failure(is_probe(), now, settings, why, retry_after);
    }

   private:
    friend class CircuitBreaker;
    struct Abandon {
      CircuitState entered;
      void operator()(CircuitBreaker* breaker) const {
        if (entered == CircuitState::half_open) breaker->abandon_probe();
      }
    };

    Permit(CircuitBreaker& breaker, CircuitState entered) : breaker_(&breaker, Abandon{entered}) {}

    std::unique_ptr<CircuitBreaker, Abandon> breaker_;  // null once the result was reported
  };

  explicit CircuitBreaker(std::uint64_t server = 0) : server_(server) {}

  // The number of the server, which no other one ever gets: a backend name and an address belong to it.
  std::uint64_t server() const { return server_; }
  bool probing() const { return State::unpack(word_.load(std::memory_order_relaxed)).probing; }

  // True if the server may get a request that is not a last resort.
  bool usable(Ns now) const {
    return State::unpack(word_.load(std::memory_order_relaxed)).at(now) != CircuitState::open;
  }

  struct Ejection {
    Ns left_ns;  // 0: its probe is running
    AttemptOutcome why;
  };

  // The ejection that keeps requests away now, if there is one.
  std::optional<Ejection> ejection(Ns now) const {
    const State state = State::unpack(word_.load(std::memory_order_relaxed));
    if (state.at(now) != CircuitState::open) return std::nullopt;
    return Ejection{std::max<Ns>(state.ejected_until_ms * kMillisecond - now, 0), state.why};
  }

  // The time of the last ejection, or of its end; 0: there was none. Relaxed: for people, and may differ from the state
  // for a moment.
  Ns changed_ns(Ns now) const {
    const State state = State::unpack(word_.load(std::memory_order_relaxed));
    if (state.at(now) == CircuitState::half_open) return state.ejected_until_ms * kMillisecond;
    return changed_ns_.load(std::memory_order_relaxed);
  }

  // Call when a request is about to be sent. If several find the circuit half-open, only one becomes the probe.
  Permit enter(Ns now) {
    CircuitState entered = CircuitState::closed;
    update([&](State& state) {
      entered = state.at(now);
      state.probing = true;
      return entered == CircuitState::half_open;
    });
    return Permit(*this, entered);
  }

 private:
  // Packed into one word so that each change is one compare-and-swap. The initial word is 0.
  struct State {
    std::uint32_t failures = 0;   // consecutive; counted while not ejected
    std::uint32_t ejections = 0;  // consecutive, without a success between: the next lasts eject_time << ejections
    bool probing = false;         // the probe is running
    AttemptOutcome why{};         // of the last failure, if ejected
    Ns ejected_until_ms = 0;      // of the monotonic clock; 0: not ejected

    static constexpr std::uint32_t kMaxFailures = 0x1fff;  // config/keys.h: eject_after is 1000 at most
    static constexpr std::uint32_t kMaxEjections = 31;
    static constexpr std::uint32_t kMaxOutcomes = 32;
    static_assert(kAttemptOutcomeNames.size() <= kMaxOutcomes);
    static constexpr Ns kMaxUntilMs = (Ns{1} << 40) - 1;  // 34 years of uptime

    static State unpack(std::uint64_t word) {
      return {static_cast<std::uint32_t>(word & kMaxFailures), static_cast<std::uint32_t>(word >> 13 & kMaxEjections),
              (word >> 18 & 1) != 0, static_cast<AttemptOutcome>(word >> 19 & (kMaxOutcomes - 1)),
              static_cast<Ns>(word >> 24)};
    }
    std::uint64_t pack() const {
      return std::uint64_t{failures} | std::uint64_t{ejections} << 13 | std::uint64_t{probing} << 18 |
             static_cast<std::uint64_t>(why) << 19 | static_cast<std::uint64_t>(ejected_until_ms) << 24;
    }

    bool ejected() const { return ejected_until_ms != 0; }
    CircuitState at(Ns now) const {
      if (!ejected()) return CircuitState::closed;
      return probing || now < ejected_until_ms * kMillisecond ? CircuitState::open : CircuitState::half_open;
    }
  };

  // Applies `change(State&)` atomically, and nothing if it returns false. It is called again if another thread changed
  // the state in between. Relaxed: the word is complete in itself and publishes no other memory.
  template <class Change>
  void update(Change&& change) {
    std::uint64_t seen = word_.load(std::memory_order_relaxed);
    for (;;) {
      State state = State::unpack(seen);
      if (!change(state) || word_.compare_exchange_weak(seen, state.pack(), std::memory_order_relaxed)) return;
    }
  }

  // While a backend is ejected only the probe changes its state; results of other requests (sent earlier, or as a last
  // resort) are ignored.
  bool record_success(bool probe, Ns now) {
    if (word_.load(std::memory_order_relaxed) == 0) return false;  // nothing to reset
    bool was_ejected = false;
    update([&](State& state) {
      was_ejected = state.ejected() && probe;
      if (state.ejected() && !probe) return false;
      state = State{};
      return true;
    });
    if (was_ejected) changed_ns_.store(now, std::memory_order_relaxed);
    return was_ejected;
  }

  Ns record_failure(bool probe, Ns now, const HealthSettings& settings, AttemptOutcome why,
                    std::optional<Ns> retry_after) {
    const Ns requested = std::clamp<Ns>(retry_after.value_or(0), 0, kMaxRetryAfter);
    Ns ejected_for = 0;
    update([&](State& state) {
      ejected_for = 0;
      if (state.ejected() && !probe) return prolong(state, now, requested);
      ejected_for = count_failure(state, probe, now, settings, requested);
      if (ejected_for > 0) state.why = why;
      return true;
    });
    if (ejected_for > 0) changed_ns_.store(now, std::memory_order_relaxed);
    return ejected_for;
  }

  static Ns count_failure(State& state, bool probe, Ns now, const HealthSettings& settings, Ns requested) {
    state.failures = std::min(state.failures + 1, State::kMaxFailures);
    const bool enough = probe || state.failures >= settings.eject_after;
    const Ns ejected_for = std::max(requested, enough ? ejection_time(settings, state.ejections) : 0);
    if (ejected_for == 0) return 0;
    if (enough) state.ejections = std::min(state.ejections + 1, State::kMaxEjections);
    state.failures = 0;
    state.probing = false;
    state.ejected_until_ms = end_ms(now, ejected_for);
    return ejected_for;
  }

  // An ejected backend can extend its ejection with a longer Retry-After, unless its probe is running.
  static bool prolong(State& state, Ns now, Ns requested) {
    if (requested == 0 || state.probing || end_ms(now, requested) <= state.ejected_until_ms) return false;
    state.ejected_until_ms = end_ms(now, requested);
    return true;
  }

  void abandon_probe() {
    update([](State& state) {
      assert(state.probing);
      state.probing = false;
      return true;
    });
  }

  static Ns ejection_time(const HealthSettings& settings, std::uint32_t ejections) {
    const Ns limit = std::max(kMaxEjection, settings.eject_time_ns);
    Ns time = std::max(settings.eject_time_ns, kMillisecond);
    for (; ejections > 0 && time < limit; --ejections) time *= 2;
    return std::min(time, limit);
  }

  // Rounded up, so that no ejection is too short, and never 0.
  static Ns end_ms(Ns now, Ns span) {
    return std::clamp<Ns>((now + span + kMillisecond - 1) / kMillisecond, 1, State::kMaxUntilMs);
  }

  const std::uint64_t server_;
  std::atomic<std::uint64_t> word_{0};
  std::atomic<Ns> changed_ns_{0};
};

}  // namespace nexus
