// slab.h
// Owns:     what is counted: the outcomes and their label names, the record of a request, a slab of cells per thread.
// Promises: record() is wait-free and takes no lock, no read-modify-write on a shared line and, for a known pair of
//           model and backend, no memory (but for a sixth status code of it). A count once made is never lost.
// Leaves:   what to record, and when, to its callers; which model names may have an id to registry.h; text to
//           prometheus.h.
// Threads:  a Slab's recording functions: its own thread alone; everything const: any thread. Slabs are added at start.
#pragma once

#include <array>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/metrics/counters.h"
#include "nexus/metrics/histogram.h"
#include "nexus/metrics/ids.h"

namespace nexus {

// The outcomes that label values are made of. Each table of names is in the order of its enum.

enum class ErrorType : std::uint8_t {
  none,
  timeout,
  backend_error,
  no_backend,
  no_healthy_backend,
  parse_error,
  client_closed,
  other
};
inline constexpr std::array<std::string_view, 8> kErrorTypeNames{
    "none", "timeout", "backend_error", "no_backend", "no_healthy_backend", "parse_error", "client_closed", "other"};

enum class AttemptOutcome : std::uint8_t {
  ok,
  connect_error,
  timeout,
  bad_response,
  truncated,
  status_429,
  status_5xx,
  cancelled
};
inline constexpr std::array<std::string_view, 8> kAttemptOutcomeNames{
    "ok", "connect_error", "timeout", "bad_response", "truncated", "status_429", "status_5xx", "cancelled"};

enum class DisconnectPhase : std::uint8_t { none, request, waiting, streaming };
inline constexpr std::array<std::string_view, 4> kDisconnectPhaseNames{"none", "request", "waiting", "streaming"};

enum class HttpRejection : std::uint8_t { malformed, header_timeout, header_too_large };
inline constexpr std::array<std::string_view, 3> kHttpRejectionNames{"malformed", "header_timeout", "header_too_large"};

enum class QueueRejection : std::uint8_t { full, timeout };
inline constexpr std::array<std::string_view, 2> kQueueRejectionNames{"full", "timeout"};

enum class Limit : std::uint8_t {
  max_connections,
  max_header,
  max_body,
  body_memory,
  max_pending,
  header_timeout,
  body_timeout,
  idle_timeout,
  write_timeout,
  queue_size,
  queue_timeout,
  json_depth,
  models,
  descriptors,
  memory,
  log_volume
};
inline constexpr std::array<std::string_view, 16> kLimitNames{
    "max_connections", "max_header",   "max_body",      "body_memory", "max_pending",   "header_timeout",
    "body_timeout",    "idle_timeout", "write_timeout", "queue_size",  "queue_timeout", "json_depth",
    "models",          "descriptors",  "memory",        "log_volume"};

constexpr std::string_view name_of(ErrorType x) { return kErrorTypeNames[static_cast<std::size_t>(x)]; }
constexpr std::string_view name_of(AttemptOutcome x) { return kAttemptOutcomeNames[static_cast<std::size_t>(x)]; }
constexpr std::string_view name_of(DisconnectPhase x) { return kDisconnectPhaseNames[static_cast<std::size_t>(x)]; }
constexpr std::string_view name_of(HttpRejection x) { return kHttpRejectionNames[static_cast<std::size_t>(x)]; }
constexpr std::string_view name_of(QueueRejection x) { return kQueueRejectionNames[static_cast<std::size_t>(x)]; }
constexpr std::string_view name_of(Limit x) { return kLimitNames[static_cast<std::size_t>(x)]; }

static_assert(name_of(ErrorType::other) == "other" && name_of(AttemptOutcome::cancelled) == "cancelled");
static_assert(name_of(DisconnectPhase::streaming) == "streaming" && name_of(Limit::log_volume) == "log_volume");

// What one exchange was, told once when it has ended.
struct RequestRecord {
  ModelId model = ModelId::unknown;          // the client's own choice, before alias and fallback
  BackendId backend = BackendId::none;       // the one that served, or the last one tried
  ModelId fallback_from = ModelId::unknown;  // after aliases; this and the next are read only if fell_back
  ModelId fallback_to = ModelId::unknown;
  bool fell_back = false;
  std::uint16_t status = 0;  // as sent to the client; 499 if it left before one was
  ErrorType error = ErrorType::none;
  bool reached_backend = false;
  bool stream = false;
  DisconnectPhase disconnect = DisconnectPhase::none;
  bool without_usage = false;
  std::int64_t prompt_tokens = -1;  // here and below: negative = not known, not recorded
  std::int64_t completion_tokens = -1;
  Ns duration_ns = 0;     // recorded if the request reached a backend
  Ns first_byte_ns = -1;  // time to first token; recorded for streams only
  Ns per_token_ns = -1;   // recorded for streams only
  Ns overhead_ns = -1;
};

// The one error type that a request counts under, so that errors and failed requests agree to the unit whatever the
// caller left out: an error that was told, else a client that left, else a status that is no success.
constexpr ErrorType error_of(const RequestRecord& r) {
  if (r.error != ErrorType::none) return r.error;
  if (r.disconnect != DisconnectPhase::none) return ErrorType::client_closed;
  return r.status >= 200 && r.status <= 299 ? ErrorType::none : ErrorType::other;
}

// One model on one backend. What every record of it touches, the sums and the first status, fills one cache line with
// the key of its node; a histogram then costs the line of its bucket alone.
struct PairCounters {
  Counter duration_sum, prompt_sum, completion_sum, first_token_sum, per_token_sum;
  StatusCounters statuses;
  Buckets<kDurationBounds> duration;
  Buckets<kTokenBounds> prompt_tokens;
  Buckets<kTokenBounds> completion_tokens;
  Buckets<kFirstTokenBounds> first_token;
  Buckets<kPerTokenBounds> per_token;
};

struct alignas(kCacheAlign) BackendCounters {
  Counter pending, connections, queue_depth;  // gauges; what a request touches stands in the first line
  Counter without_usage;
  std::array<Counter, kAttemptOutcomeNames.size()> attempts;
  Histogram<kDurationBounds> health_latency;
};

struct alignas(kCacheAlign) ModelCounters {
  std::array<Counter, kErrorTypeNames.size()> errors;
};

struct alignas(kCacheAlign) ThreadCounters {  // what has no id in its labels
  Histogram<kOverheadBounds> overhead;
  Histogram<kLoopStallBounds> loop_stall;
  Histogram<kDurationBounds> queue_wait;
  Counter client_connections;
  Counter log_lines_dropped;
  std::array<Counter, kDisconnectPhaseNames.size()> disconnects;
  std::array<Counter, kHttpRejectionNames.size()> http_rejections;
  std::array<Counter, kQueueRejectionNames.size()> queue_rejections;
  std::array<Counter, kLimitNames.size()> limits;
};

// All cells of one thread. A gauge is the sum over the slabs: what one thread adds another may take away.
class alignas(kCacheAlign) Slab {
 public:
  // In line: it has one caller, the end of an exchange. Where memory for new cells is short it throws and has counted
  // nothing: the same record can be told again.
  [[gnu::always_inline]] void record(const RequestRecord& r) {
    assert(!r.reached_backend || r.backend != BackendId::none);
    if (is_rare(r)) [[unlikely]]
      return record_rare(r);
    record_pair(r, false);
  }

  void attempt(BackendId id, AttemptOutcome outcome) { count(backends_.at(index_of(id)).attempts, outcome); }
  void health_check(BackendId id, Ns round_trip_ns) {
    backends_.at(index_of(id)).health_latency.observe(round_trip_ns);
  }

  void add_pending(BackendId id, int delta) { backends_.at(index_of(id)).pending.add_signed(delta); }
  void add_backend_connections(BackendId id, int delta) { backends_.at(index_of(id)).connections.add_signed(delta); }
  void add_client_connections(int delta) { thread_.client_connections.add_signed(delta); }
  void queue_depth(BackendId id, int delta) { backends_.at(index_of(id)).queue_depth.add_signed(delta); }

  void queue_wait(Ns waited_ns) { thread_.queue_wait.observe(waited_ns); }
  void queue_rejected(QueueRejection reason) { count(thread_.queue_rejections, reason); }
  void http_rejected(HttpRejection reason) { count(thread_.http_rejections, reason); }
  void limit_hit(Limit limit) { count(thread_.limits, limit); }
  void log_dropped(std::uint64_t lines) { thread_.log_lines_dropped.add(lines); }
  void loop_stall(Ns turn_ns) { thread_.loop_stall.observe(turn_ns); }  // one turn of a loop, between two waits

  std::int64_t pending(BackendId id) const {
    const BackendCounters* cells = backends_.find(index_of(id));
    return cells == nullptr ? 0 : cells->pending.read_signed();
  }

  // For the writers of pages.
  const PairTable<PairCounters>& pairs() const { return pairs_; }                              // (model, backend)
  const PairTable<Counter>& fallbacks() const { return fallbacks_; }                           // (from, to)
  const BackendCounters* backend(BackendId id) const { return backends_.find(index_of(id)); }  // null reads as zero
  const ModelCounters* model(ModelId id) const { return models_.find(index_of(id)); }          // null reads as zero
  const ThreadCounters& thread() const { return thread_; }

 private:
  // Whether it is more than a success of a model on its backend. Without branches, but for the one that is made of it.
  [[gnu::always_inline]] static bool is_rare(const RequestRecord& r) {
    const auto told = static_cast<unsigned>(r.error) | static_cast<unsigned>(r.disconnect) |
                      static_cast<unsigned>(r.without_usage) | static_cast<unsigned>(r.fell_back);
    return (told | static_cast<unsigned>(r.status < 200) | static_cast<unsigned>(r.status > 299)) != 0;
  }

  [[gnu::always_inline]] void record_pair(const RequestRecord& r, bool failed) {
    PairCounters& pair = pairs_.at(index_of(r.model), index_of(r.backend));
    pair.statuses.add(r.status, failed);
    if (r.reached_backend) pair.duration.observe(r.duration_ns, pair.duration_sum);
    if (r.prompt_tokens >= 0) pair.prompt_tokens.observe(r.prompt_tokens, pair.prompt_sum);
    if (r.completion_tokens >= 0) pair.completion_tokens.observe(r.completion_tokens, pair.completion_sum);
    if (r.stream && r.first_byte_ns >= 0) pair.first_token.observe(r.first_byte_ns, pair.first_token_sum);
    if (r.stream && r.per_token_ns >= 0) pair.per_token.observe(r.per_token_ns, pair.per_token_sum);
    if (r.overhead_ns >= 0) thread_.overhead.observe(r.overhead_ns);
  }

  // What most requests have nothing of, out of the way of those. A client that left is an error, see error_of(). All
  // cells are there before the first is written to: nothing is counted where there is no memory for one of them.
  [[gnu::noinline]] void record_rare(const RequestRecord& r) {
    const ErrorType error = error_of(r);
    ModelCounters& model = models_.at(index_of(r.model));
    BackendCounters& backend = backends_.at(index_of(r.backend));
    Counter* const fallback =
        r.fell_back ? &fallbacks_.at(index_of(r.fallback_from), index_of(r.fallback_to)) : nullptr;
    record_pair(r, error != ErrorType::none);
    if (error != ErrorType::none) count(model.errors, error);
    if (r.disconnect != DisconnectPhase::none) count(thread_.disconnects, r.disconnect);
    if (r.without_usage) backend.without_usage.add(1);
    if (fallback != nullptr) fallback->add(1);
  }

  template <std::size_t N, class Outcome>
  static void count(std::array<Counter, N>& cells, Outcome outcome) {
    const auto i = static_cast<std::size_t>(outcome);
    assert(i < N);
    cells[i].add(1);
  }

  PairTable<PairCounters> pairs_;
  PairTable<Counter> fallbacks_;
  GrowingTable<BackendCounters> backends_;
  GrowingTable<ModelCounters> models_;
  ThreadCounters thread_;
};

class Metrics {
 public:
  Metrics() = default;
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // Before the threads run: readers walk the list of slabs without a lock.
  Slab& add_slab() {
    slabs_.push_back(std::make_unique<Slab>());
    return *slabs_.back();
  }

  // Requests in flight on a backend now, over all threads. Two loads a thread.
  std::int64_t pending(BackendId id) const {
    std::int64_t sum = 0;
    for (const auto& slab : slabs_) sum += slab->pending(id);
    return sum;
  }

  const std::vector<std::unique_ptr<Slab>>& slabs() const { return slabs_; }

 private:
  std::vector<std::unique_ptr<Slab>> slabs_;
};

}  // namespace nexus
