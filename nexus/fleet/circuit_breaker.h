// circuit_breaker.h
// Owns:     for each backend: how many requests failed on it in a row, until when it is left out, whether it is on
//           probe.
// Promises: a backend in order costs one relaxed load to ask about and no write when it serves; after an ejection
//           exactly one request over all threads is the probe; a probe that is dropped undecided is given to the next
//           request.
// Leaves:   what counts as a failure to exchange.h (never a 4xx but 429); that the last candidate is tried none the
//           less to router.h; failed health checks to registry.h.
// Threads:  any; all state of a backend is one atomic word.
#pragma once

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "nexus/base/clock.h"
#include "nexus/config/settings.h"
#include "nexus/fleet/registry.h"
#include "nexus/metrics/ids.h"

namespace nexus {

constexpr Ns kMaxEjection = 60 * kSecond;     // doubling ends here, or at eject_time where that is longer
constexpr Ns kMaxRetryAfter = 300 * kSecond;  // a backend's own wish is kept to up to this

class CircuitBreaker {
 public:
  // The leave to send one request to a backend, asked for with enter(). How the request ended is told to it once; a
  // probe that is destroyed undecided (the client left, no descriptor was free) leaves the probe to another request.
  class Permit {
   public:
    Permit() = default;
    Permit(Permit&& other) noexcept
        : breaker_(std::exchange(other.breaker_, nullptr)), id_(other.id_), kind_(other.kind_) {}
    Permit& operator=(Permit&& other) noexcept {
      if (this != &other) {
        abandon();
        breaker_ = std::exchange(other.breaker_, nullptr);
        id_ = other.id_;
        kind_ = other.kind_;
      }
      return *this;
    }
    ~Permit() { abandon(); }

    bool closed() const { return kind_ == Kind::closed; }  // ejected: only for the last candidate
    bool probe() const { return kind_ == Kind::probe; }

    // The backend answered as it should.
    void succeeded() {
      if (CircuitBreaker* breaker = std::exchange(breaker_, nullptr)) breaker->note_success(id_, probe());
    }

    // The backend failed the request; `retry_after` is what its 429 or 503 asked for. The time for which it is ejected
    // from now on because of this, or 0.
    Ns failed(Ns now, const HealthSettings& settings, std::optional<Ns> retry_after = {}) {
      CircuitBreaker* breaker = std::exchange(breaker_, nullptr);
      return breaker == nullptr ? 0 : breaker->note_failure(id_, probe(), now, settings, retry_after);
    }

   private:
    friend class CircuitBreaker;
    enum class Kind : std::uint8_t { open, probe, closed };

    Permit(CircuitBreaker& breaker, BackendId id, Kind kind) : breaker_(&breaker), id_(id), kind_(kind) {}

    void abandon() {
      CircuitBreaker* breaker = std::exchange(breaker_, nullptr);
      if (breaker != nullptr && probe()) breaker->abandon_probe(id_);
    }

    CircuitBreaker* breaker_ = nullptr;  // null once it was told how the request ended
    BackendId id_{};
    Kind kind_ = Kind::open;
  };

  CircuitBreaker() : backends_(new Slot[kMaxBackendNames]) {}

  // Whether a request may go there without being the last resort: not ejected, or due for a probe that nobody runs.
  bool usable(BackendId id, Ns now) const {
    const State state = State::unpack(word(id).load(std::memory_order_relaxed));
    return state.until_ms == 0 || (!state.probe && now >= state.until_ms * kMillisecond);
  }

  // Until when it is ejected; 0 where it is not. The time may have passed, while its probe goes on or none has begun.
  Ns ejected_until(BackendId id) const {
    return State::unpack(word(id).load(std::memory_order_relaxed)).until_ms * kMillisecond;
  }

  // To be called when a request is about to be sent. Of many that find a backend due at once, one gets the probe.
  Permit enter(BackendId id, Ns now) {
    std::uint64_t seen = word(id).load(std::memory_order_relaxed);
    for (;;) {
      State state = State::unpack(seen);
      if (state.until_ms == 0) return Permit(*this, id, Permit::Kind::open);
      if (state.probe || now < state.until_ms * kMillisecond) return Permit(*this, id, Permit::Kind::closed);
      state.probe = true;
      if (replace(id, seen, state)) return Permit(*this, id, Permit::Kind::probe);
    }
  }

 private:
  // A backend's state, packed into one word so that every change is one compare-and-swap. All zeros: in order.
  // Every access is relaxed: a word is complete in itself and publishes nothing else.
  struct State {
    std::uint32_t streak = 0;  // failures in a row; counts while not ejected
    std::uint32_t rounds = 0;  // ejections without a success in between: the next one is eject_time << rounds
    bool probe = false;        // a request is on its way that decides
    Ns until_ms = 0;           // of the monotonic clock; 0: not ejected

    static constexpr std::uint32_t kMaxStreak = 0xffff;
    static constexpr std::uint32_t kMaxRounds = 31;
    static constexpr Ns kMaxUntil = (Ns{1} << 40) - 1;  // in ms: 34 years of uptime

    static State unpack(std::uint64_t word) {
      State state;
      state.streak = static_cast<std::uint32_t>(word & kMaxStreak);
      state.rounds = static_cast<std::uint32_t>(word >> 16 & kMaxRounds);
      state.probe = (word >> 23 & 1) != 0;
      state.until_ms = static_cast<Ns>(word >> 24);
      return state;
    }
    std::uint64_t pack() const {
      return std::uint64_t{streak} | std::uint64_t{rounds} << 16 | std::uint64_t{probe} << 23 |
             static_cast<std::uint64_t>(until_ms) << 24;
    }
  };

  // A line of its own each: the words of good backends stay in every core's cache while a bad one's changes.
  struct alignas(64) Slot {
    std::atomic<std::uint64_t> word{0};
  };

  std::atomic<std::uint64_t>& word(BackendId id) const {
    assert(index_of(id) < kMaxBackendNames);
    return backends_[index_of(id)].word;
  }

  bool replace(BackendId id, std::uint64_t& seen, const State& next) {
    return word(id).compare_exchange_weak(seen, next.pack(), std::memory_order_relaxed, std::memory_order_relaxed);
  }

  // While a backend is ejected only its probe decides: what was sent before, or as a last resort, comes in late and
  // would clear or prolong the ejection at random.
  void note_success(BackendId id, bool probe) {
    std::uint64_t seen = word(id).load(std::memory_order_relaxed);
    while (seen != 0) {
      if (State::unpack(seen).until_ms != 0 && !probe) return;
      if (replace(id, seen, State{})) return;
    }
  }

  Ns note_failure(BackendId id, bool probe, Ns now, const HealthSettings& settings, std::optional<Ns> retry_after) {
    if (id == BackendId::none) return 0;  // the name table was full: this id stands for several backends
    const Ns wished = std::clamp<Ns>(retry_after.value_or(0), 0, kMaxRetryAfter);
    std::uint64_t seen = word(id).load(std::memory_order_relaxed);
    for (;;) {
      State state = State::unpack(seen);
      if (state.until_ms != 0 && !probe) return prolong(id, seen, now, wished);
      state.streak = std::min(state.streak + 1, State::kMaxStreak);
      const bool enough = probe || state.streak >= settings.eject_after;
      const Ns span = std::max(wished, enough ? span_of(settings, state.rounds) : 0);
      if (span > 0) {
        if (enough) state.rounds = std::min(state.rounds + 1, State::kMaxRounds);
        state.streak = 0;
        state.probe = false;
        state.until_ms = until_ms(now, span);
      }
      if (replace(id, seen, state)) return span;
    }
  }

  // An ejected backend may still ask to be left alone for longer, unless its probe is on the way and will tell.
  Ns prolong(BackendId id, std::uint64_t seen, Ns now, Ns wished) {
    for (;;) {
      State state = State::unpack(seen);
      if (wished == 0 || state.probe || state.until_ms == 0 || until_ms(now, wished) <= state.until_ms) return 0;
      state.until_ms = until_ms(now, wished);
      if (replace(id, seen, state)) return wished;
    }
  }

  void abandon_probe(BackendId id) {
    std::uint64_t seen = word(id).load(std::memory_order_relaxed);
    for (;;) {
      State state = State::unpack(seen);
      assert(state.probe);
      state.probe = false;
      if (replace(id, seen, state)) return;
    }
  }

  static Ns span_of(const HealthSettings& settings, std::uint32_t rounds) {
    const Ns limit = std::max(kMaxEjection, settings.eject_time_ns);
    Ns span = std::max(settings.eject_time_ns, kMillisecond);
    for (; rounds > 0 && span < limit; --rounds) span *= 2;
    return std::min(span, limit);
  }

  // Rounded up, so that a backend is left out for no less than it should be, and never 0.
  static Ns until_ms(Ns now, Ns span) {
    return std::clamp<Ns>((now + span + kMillisecond - 1) / kMillisecond, 1, State::kMaxUntil);
  }

  std::unique_ptr<Slot[]> backends_;  // by BackendId; never grows, so nothing guards it
};

}  // namespace nexus
