// circuit_breaker.h
// Owns:     one circuit breaker per backend: consecutive failures, the end of its ejection, the half-open probe.
// Promises: while the circuit is closed a request costs one relaxed load and a success writes nothing; after an
//           ejection exactly one request over all threads is the probe; a probe that ends without a result passes to
//           the next request.
// Leaves:   what counts as a failure to exchange.h (of the 4xx only 429 does); trying an ejected backend as the last
//           resort to candidate_picker.h; failed health checks to registry.h.
// Threads:  any; all state of a backend is one atomic word.
// Tested by: tests/circuit_breaker_test.cpp
#pragma once

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <memory>
#include <optional>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/config/settings.h"
#include "nexus/fleet/registry.h"
#include "nexus/metrics/ids.h"

namespace nexus {

enum class CircuitState : std::uint8_t {
  closed,     // the backend gets requests
  open,       // it is ejected, or its probe is still running: requests only as a last resort
  half_open,  // its ejection is over: the next request is the probe that decides
};

class CircuitBreaker {
 public:
  // Permission to send one request to a backend, from enter(). Its result is reported once. A probe that is destroyed
  // without one (the client left, no descriptor was free) makes the circuit half-open again.
  class Permit {
   public:
    Permit() = default;

    // The circuit's state when the request entered. Open: the request may be sent only as a last resort.
    bool circuit_open() const { return breaker_.get_deleter().entered == CircuitState::open; }
    bool is_probe() const { return breaker_.get_deleter().entered == CircuitState::half_open; }

    void succeeded() {
      if (CircuitBreaker* breaker = breaker_.release()) breaker->record_success(breaker_.get_deleter().id, is_probe());
    }

    // `retry_after` is from the backend's 429 or 503. Returns for how long this failure ejects the backend, or 0.
    Ns failed(Ns now, const HealthSettings& settings, std::optional<Ns> retry_after = {}) {
      CircuitBreaker* breaker = breaker_.release();
      if (breaker == nullptr) return 0;
      return breaker->record_failure(breaker_.get_deleter().id, is_probe(), now, settings, retry_after);
    }

   private:
    friend class CircuitBreaker;
    struct Abandon {
      BackendId id;
      CircuitState entered;
      void operator()(CircuitBreaker* breaker) const {
        if (entered == CircuitState::half_open) breaker->abandon_probe(id);
      }
    };

    Permit(CircuitBreaker& breaker, BackendId id, CircuitState entered) : breaker_(&breaker, Abandon{id, entered}) {}

    std::unique_ptr<CircuitBreaker, Abandon> breaker_;  // null once the result was reported
  };

  CircuitBreaker() : backends_(new Slot[kMaxBackendNames]) {}

  // True if the backend may get a request that is not a last resort.
  bool usable(BackendId id, Ns now) const {
    return State::unpack(word_of(id).load(std::memory_order_relaxed)).at(now) != CircuitState::open;
  }

  // Call when a request is about to be sent. If several find the circuit half-open, only one becomes the probe.
  Permit enter(BackendId id, Ns now) {
    CircuitState entered = CircuitState::closed;
    update(id, [&](State& state) {
      entered = state.at(now);
      state.probing = true;
      return entered == CircuitState::half_open;
    });
    return Permit(*this, id, entered);
  }

 private:
  // Packed into one word so that each change is one compare-and-swap. The initial word is 0.
  struct State {
    std::uint32_t failures = 0;   // consecutive; counted while not ejected
    std::uint32_t ejections = 0;  // consecutive, without a success between: the next lasts eject_time << ejections
    bool probing = false;         // the probe is running
    Ns ejected_until_ms = 0;      // of the monotonic clock; 0: not ejected

    static constexpr std::uint32_t kMaxFailures = 0xffff;
    static constexpr std::uint32_t kMaxEjections = 31;
    static constexpr Ns kMaxUntilMs = (Ns{1} << 40) - 1;  // 34 years of uptime

    static State unpack(std::uint64_t word) {
      return {static_cast<std::uint32_t>(word & kMaxFailures), static_cast<std::uint32_t>(word >> 16 & kMaxEjections),
              (word >> 23 & 1) != 0, static_cast<Ns>(word >> 24)};
    }
    std::uint64_t pack() const {
      return std::uint64_t{failures} | std::uint64_t{ejections} << 16 | std::uint64_t{probing} << 23 |
             static_cast<std::uint64_t>(ejected_until_ms) << 24;
    }

    bool ejected() const { return ejected_until_ms != 0; }
    CircuitState at(Ns now) const {
      if (!ejected()) return CircuitState::closed;
      return probing || now < ejected_until_ms * kMillisecond ? CircuitState::open : CircuitState::half_open;
    }
  };

  // One cache line each, so that a failing backend's writes do not evict the words of the others.
  struct alignas(64) Slot {
    std::atomic<std::uint64_t> word{0};
  };

  std::atomic<std::uint64_t>& word_of(BackendId id) const {
    assert(index_of(id) < kMaxBackendNames);
    return backends_[index_of(id)].word;
  }

  // Applies `change(State&)` atomically, and nothing if it returns false. It is called again if another thread changed
  // the state in between. Relaxed: the word is complete in itself and publishes no other memory.
  template <class Change>
  void update(BackendId id, Change&& change) {
    std::atomic<std::uint64_t>& word = word_of(id);
    std::uint64_t seen = word.load(std::memory_order_relaxed);
    for (;;) {
      State state = State::unpack(seen);
      if (!change(state) || word.compare_exchange_weak(seen, state.pack(), std::memory_order_relaxed)) return;
    }
  }

  // While a backend is ejected only the probe changes its state; results of other requests (sent earlier, or as a last
  // resort) are ignored.
  void record_success(BackendId id, bool probe) {
    if (word_of(id).load(std::memory_order_relaxed) == 0) return;  // nothing to reset
    update(id, [&](State& state) {
      if (state.ejected() && !probe) return false;
      state = State{};
      return true;
    });
  }

  Ns record_failure(BackendId id, bool probe, Ns now, const HealthSettings& settings, std::optional<Ns> retry_after) {
    if (id == BackendId::none) return 0;  // the name table was full: this id is shared by several backends
    const Ns requested = std::clamp<Ns>(retry_after.value_or(0), 0, kMaxRetryAfter);
    Ns ejected_for = 0;
    update(id, [&](State& state) {
      ejected_for = state.ejected() && !probe ? prolong(state, now, requested)
                                              : count_failure(state, probe, now, settings, requested);
      return true;
    });
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
  static Ns prolong(State& state, Ns now, Ns requested) {
    if (requested == 0 || state.probing || end_ms(now, requested) <= state.ejected_until_ms) return 0;
    state.ejected_until_ms = end_ms(now, requested);
    return requested;
  }

  void abandon_probe(BackendId id) {
    update(id, [](State& state) {
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

  std::unique_ptr<Slot[]> backends_;  // by BackendId; never grows, so no lock is needed
};

}  // namespace nexus
