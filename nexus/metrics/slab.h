// slab.h
// Owns:     everything that is counted: the outcomes and their label names, a request's record, a slab per thread.
// Promises: record() is wait-free: no lock, no read-modify-write on a shared line and, for a known pair of model and
//           backend, no allocation (but for its sixth status). A count is never lost.
// Leaves:   what to record, and when, to its callers; which model names have an id to registry.h; text to prometheus.h.
// Threads:  a Slab's recording functions: its own thread alone; everything const: any thread. Slabs are added at start.
// Tested by: tests/slab_test.cpp
#pragma once

#include <array>
#include <atomic>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string_view>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/metrics/counters.h"
#include "nexus/metrics/exemplars.h"
#include "nexus/metrics/failure_log.h"
#include "nexus/metrics/histogram.h"
#include "nexus/metrics/ids.h"
#include "nexus/metrics/span.h"
#include "nexus/net/tls_outcome.h"

namespace nexus {

// Outcomes, and their label values in the order of the enum.

enum class ErrorType : std::uint8_t {
  none,
  timeout,
  backend_error,
  no_backend,
  no_healthy_backend,
  parse_error,
  client_closed,
  bad_request,  // the client's mistake, as Nexus or the backend says
  overloaded,   // a limit of Nexus or a lack on this host
  drain,        // refused or cut because this process ends
  other
};
inline constexpr std::array<std::string_view, 11> kErrorTypeNames{
    "none",        "timeout",    "backend_error", "no_backend", "no_healthy_backend", "parse_error", "client_closed",
    "bad_request", "overloaded", "drain",         "other"};

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

// The first three: of a head that could not be read.
enum class HttpRejection : std::uint8_t { malformed, header_timeout, header_too_large, unknown_path, method };
inline constexpr std::array<std::string_view, 5> kHttpRejectionNames{"malformed", "header_timeout", "header_too_large",
                                                                     "unknown_path", "method"};

enum class QueueRejection : std::uint8_t { full, timeout };
inline constexpr std::array<std::string_view, 2> kQueueRejectionNames{"full", "timeout"};

// A request with the key of a session went to the backend of its key (kept), or to another one because that has too
// much to do (moved_load) or cannot be used (moved_health).
enum class AffinityOutcome : std::uint8_t { none, kept, moved_load, moved_health, no_key };
inline constexpr std::array<std::string_view, 5> kAffinityOutcomeNames{"none", "kept", "moved_load", "moved_health",
                                                                       "no_key"};

// If a request kept to the service level; none: it is not judged.
enum class Slo : std::uint8_t { none, met, missed };
inline constexpr std::array<std::string_view, 3> kSloNames{"none", "yes", "no"};

constexpr bool is_keyed(AffinityOutcome x) { return x != AffinityOutcome::none && x != AffinityOutcome::no_key; }

// A span that the collector did not take: there was no room for it, the collector has refused it, or it did not answer.
enum class SpanLoss : std::uint8_t { queue_full, refused, unanswered };
inline constexpr std::array<std::string_view, 3> kSpanLossNames{"queue_full", "refused", "unanswered"};

enum class Limit : std::uint8_t {
  max_connections,
  max_header,
  max_fields,
  max_body,
  body_memory,
  max_pending,
  backend_max_pending,  // of a [backend], where nothing may wait because there is no queue
  header_timeout,
  body_timeout,
  idle_timeout,
  write_timeout,
  connect_timeout,
  first_byte_timeout,
  stall_timeout,
  request_timeout,
  queue_size,
  queue_timeout,
  json_depth,
  models,
  backend_names,
  page_memory,
  descriptors,
  ports,
  memory,
  log_volume,
  key_requests,
  key_tokens,
  key_concurrency,
  key_model
};
inline constexpr std::array<std::string_view, 29> kLimitNames{"max_connections",
                                                              "max_header",
                                                              "max_fields",
                                                              "max_body",
                                                              "body_memory",
                                                              "max_pending",
                                                              "backend_max_pending",
                                                              "header_timeout",
                                                              "body_timeout",
                                                              "idle_timeout",
                                                              "write_timeout",
                                                              "connect_timeout",
                                                              "first_byte_timeout",
                                                              "stall_timeout",
                                                              "request_timeout",
                                                              "queue_size",
                                                              "queue_timeout",
                                                              "json_depth",
                                                              "models",
                                                              "backend_names",
                                                              "page_memory",
                                                              "descriptors",
                                                              "ports",
                                                              "memory",
                                                              "log_volume",
                                                              "key_requests",
                                                              "key_tokens",
                                                              "key_concurrency",
                                                              "key_model"};

constexpr std::string_view name_of(ErrorType x) { return kErrorTypeNames[static_cast<std::size_t>(x)]; }
constexpr std::string_view name_of(AttemptOutcome x) { return kAttemptOutcomeNames[static_cast<std::size_t>(x)]; }

static_assert(name_of(ErrorType::other) == "other" && name_of(AttemptOutcome::cancelled) == "cancelled");
static_assert(static_cast<std::size_t>(Limit::key_model) + 1 == kLimitNames.size());

// The error type of a backend's answer, by its status.
constexpr ErrorType error_of_status(std::uint16_t status) {
  if (status / 100 == 2) return ErrorType::none;
  if (status >= 500 || status == 408 || status == 429) return ErrorType::backend_error;
  return status / 100 == 4 ? ErrorType::bad_request : ErrorType::other;
}

// One exchange, recorded when it has ended.
struct RequestRecord {
  ModelId model = ModelId::unknown;        // as requested, before alias and fallback
  BackendId backend = BackendId::none;     // the last one tried
  ModelId fallback_to = ModelId::unknown;  // read only if fell_back
  bool fell_back = false;                  // served by a backend under another model than `model` stands for
  std::uint16_t status = 0;                // as sent to the client; 499 if the client left before
  ErrorType error = ErrorType::none;
  bool reached_backend = false;
  bool stream = false;
  DisconnectPhase disconnect = DisconnectPhase::none;
  bool without_usage = false;
  bool without_end = false;  // a stream that succeeded without its end mark
  bool by_client = false;    // it failed by what its client did, or for a limit of the client's own key
  Slo slo = Slo::none;
  std::int64_t prompt_tokens = -1;  // here and below: negative = unknown, not recorded
  std::int64_t completion_tokens = -1;
  Ns duration_ns = 0;     // recorded if the request reached a backend
  Ns first_byte_ns = -1;  // time to first token; recorded for streams only
  Ns per_token_ns = -1;   // recorded for streams only
  Ns overhead_ns = -1;
  std::int64_t cached_tokens = -1;                   // of prompt_tokens; negative: unknown
  std::int64_t reasoning_tokens = -1;                // of completion_tokens; negative: unknown; for spans alone
  std::uint8_t endpoint = 0;                         // row of the table of endpoints
  AffinityOutcome affinity = AffinityOutcome::none;  // of the last choice; none: [routing] affinity is off
  bool is_noted = false;                             // `slo` or `trace` is set
  KeyId key = KeyId::none;
  const TraceMark* trace = nullptr;  // of a sampled request, for an exemplar; valid until record() returns
};

// The classes of statuses that a key's requests are counted by.
inline constexpr std::array<std::string_view, 6> kStatusClassNames{"2xx", "3xx", "4xx", "429", "499", "5xx"};
constexpr std::size_t status_class_of(std::uint16_t status) {
  if (status < 300) return 0;
  if (status < 400) return 1;
  if (status >= 500) return 5;
  return status == 429 ? 3 : status == 499 ? 4 : 2;
}
static_assert(kStatusClassNames[status_class_of(200)] == "2xx" && kStatusClassNames[status_class_of(429)] == "429" &&
              kStatusClassNames[status_class_of(499)] == "499" && kStatusClassNames[status_class_of(503)] == "5xx");

// The error type that a request is counted under: the recorded one, else client_closed if the client left, else other
// if the status is no success. So the error counters and the failed requests always have the same total.
constexpr ErrorType error_of(const RequestRecord& r) {
  if (r.error != ErrorType::none) return r.error;
  if (r.disconnect != DisconnectPhase::none) return ErrorType::client_closed;
  return r.status >= 200 && r.status <= 299 ? ErrorType::none : ErrorType::other;
}

// One model on one backend. The sums and the first status, which every record writes, share one cache line with the key
// of the node; each histogram then costs only the line of its bucket.
struct PairCounters {
  Counter duration_sum, prompt_sum, completion_sum, first_token_sum, per_token_sum;
  StatusCounters statuses;
  Buckets<kDurationBounds> duration;
  Buckets<kTokenBounds> prompt_tokens;
  Buckets<kTokenBounds> completion_tokens;
  Buckets<kFirstTokenBounds> first_token;
  Buckets<kPerTokenBounds> per_token;
  Counter cached_sum;
  std::atomic<PairExemplars*> exemplars{nullptr};  // made for the first sampled request
  std::array<Counter, 14> unused;  // a node of PairTable has an odd number of cache lines, to use all sets of the cache

  ~PairCounters() { delete exemplars.load(std::memory_order_relaxed); }
};

struct alignas(kCacheAlign) BackendCounters {
  // Gauges; a request writes only to the first cache line. `pending` is in_flight and queue_depth together.
  Counter pending, in_flight, connections, queue_depth;
  Counter without_usage, without_end;
  std::array<Counter, kAttemptOutcomeNames.size()> attempts;
  Histogram<kDurationBounds> health_latency;
};

struct alignas(kCacheAlign) ModelCounters {
  std::array<Counter, kErrorTypeNames.size()> errors;
  Histogram<kDurationBounds> queue_wait;
  std::array<Counter, kSloNames.size()> slo;
};

struct alignas(kCacheAlign) KeyCounters {
  std::array<Counter, kStatusClassNames.size()> requests;
  Counter pending;  // a gauge
  Counter errors;
  Counter prompt_tokens, completion_tokens, cached_tokens;
  Counter queue_waits, queue_wait_ns;

  std::uint64_t all_requests() const {
    std::uint64_t sum = 0;
    for (const Counter& cell : requests) sum += cell.read();
    return sum;
  }
};

struct alignas(kCacheAlign) ThreadCounters {  // metrics without a model or backend label
  Histogram<kOverheadBounds> overhead;
  Histogram<kLoopStallBounds> loop_stall;
  std::array<StatusCounters, kMaxEndpoints> endpoints;
  Counter client_connections;
  Counter log_lines_dropped;
  std::array<Counter, kDisconnectPhaseNames.size()> disconnects;
  std::array<Counter, kHttpRejectionNames.size()> http_rejections;
  std::array<Counter, kQueueRejectionNames.size()> queue_rejections;
  std::array<Counter, kLimitNames.size()> limits;
  std::array<Counter, kAffinityOutcomeNames.size()> affinity;
  std::array<Counter, kTlsSideNames.size() * kTlsOutcomes> tls_handshakes;  // by side, then outcome
  Counter spans_exported;
  std::array<Counter, kSpanLossNames.size()> spans_dropped;
};

// All counters of one thread. A gauge is the sum over the slabs, so one thread may add and another subtract.
class alignas(kCacheAlign) Slab {
 public:
  // Inlined: only the end of an exchange calls it. If it throws std::bad_alloc, nothing was counted and the caller may
  // record again.
  [[gnu::always_inline]] void record(const RequestRecord& r) {
    if (is_rare(r)) [[unlikely]]
      return record_rare(r);
    record_pair(r, false);
  }

  void attempt(BackendId id, AttemptOutcome outcome) { count(backends_.at(index_of(id)).attempts, outcome); }
  void health_check(BackendId id, Ns round_trip_ns) {
    backends_.at(index_of(id)).health_latency.observe(round_trip_ns);
  }

  void add_backend_connections(BackendId id, int delta) { backends_.at(index_of(id)).connections.add_signed(delta); }
  void add_client_connections(int delta) { thread_.client_connections.add_signed(delta); }
  void add_in_flight(BackendId id, int delta) {
    BackendCounters& cells = backends_.at(index_of(id));
    cells.pending.add_signed(delta);
    cells.in_flight.add_signed(delta);
  }
  // `none`: it waits for another request of its key, and is pending on no backend.
  void add_queued(BackendId id, int delta) {
    BackendCounters& cells = backends_.at(index_of(id));
    if (id != BackendId::none) cells.pending.add_signed(delta);
    cells.queue_depth.add_signed(delta);
  }

  // Cells of a key; they never move.
  KeyCounters& key_cells(KeyId id) { return keys_.at(index_of(id)); }
  // The cells of the waits for a model; they never move.
  Histogram<kDurationBounds>& queue_waits(ModelId id) { return models_.at(index_of(id)).queue_wait; }
  void queue_rejected(QueueRejection reason) { count(thread_.queue_rejections, reason); }
  void http_rejected(HttpRejection reason) { count(thread_.http_rejections, reason); }
  void limit_hit(Limit limit) { count(thread_.limits, limit); }
  void tls_handshake(TlsSide side, TlsOutcome outcome) { tls_handshakes(side, outcome, 1); }
  void tls_handshakes(TlsSide side, TlsOutcome outcome, std::uint64_t count) {
    const std::size_t at = static_cast<std::size_t>(side) * kTlsOutcomes + static_cast<std::size_t>(outcome);
    thread_.tls_handshakes[at].add(count);
  }
  void spans_exported(std::uint64_t spans) { thread_.spans_exported.add(spans); }
  void spans_dropped(SpanLoss why, std::uint64_t spans) {
    thread_.spans_dropped[static_cast<std::size_t>(why)].add(spans);
  }
  void log_dropped(std::uint64_t lines) { thread_.log_lines_dropped.add(lines); }
  void loop_stall(Ns turn_ns) { thread_.loop_stall.observe(turn_ns); }  // one turn of a loop, between two waits

  std::int64_t pending(BackendId id) const {
    const BackendCounters* cells = backends_.find(index_of(id));
    return cells == nullptr ? 0 : cells->pending.read_signed();
  }

  // For the exposition.
  const PairTable<PairCounters>& pairs() const { return pairs_; }                              // (model, backend)
  const PairTable<Counter>& fallbacks() const { return fallbacks_; }                           // (from, to)
  const BackendCounters* backend(BackendId id) const { return backends_.find(index_of(id)); }  // null reads as zero
  const ModelCounters* model(ModelId id) const { return models_.find(index_of(id)); }          // null reads as zero
  const KeyCounters* key(KeyId id) const { return keys_.find(index_of(id)); }                  // null reads as zero
  const ThreadCounters& thread() const { return thread_; }

 private:
  // True unless the request simply succeeded. Computed without branches, so that the caller has only one.
  [[gnu::always_inline]] static bool is_rare(const RequestRecord& r) {
    const auto flags = static_cast<unsigned>(r.error) | static_cast<unsigned>(r.disconnect) |
                       static_cast<unsigned>(r.without_usage) | static_cast<unsigned>(r.without_end) |
                       static_cast<unsigned>(r.fell_back) | static_cast<unsigned>(r.is_noted);
    return (flags | static_cast<unsigned>(r.status < 200) | static_cast<unsigned>(r.status > 299)) != 0;
  }

  [[gnu::always_inline]] void record_pair(const RequestRecord& r, bool failed) {
    PairCounters& pair = pairs_.at(index_of(r.model), index_of(r.backend));
    StatusCounters::Cell status = pair.statuses.find(r.status, failed);
    KeyCounters& key = keys_.at(index_of(r.key));
    thread_.endpoints[r.endpoint].find(r.status, false).add();
    status.add();  // after all that may throw
    key.requests[status_class_of(r.status)].add(1);
    if (failed) key.errors.add(1);
    if (r.prompt_tokens >= 0) key.prompt_tokens.add_signed(r.prompt_tokens);
    if (r.completion_tokens >= 0) key.completion_tokens.add_signed(r.completion_tokens);
    if (r.cached_tokens > 0) key.cached_tokens.add_signed(r.cached_tokens);
    if (r.reached_backend) pair.duration.observe(r.duration_ns, pair.duration_sum);
    if (r.prompt_tokens >= 0) pair.prompt_tokens.observe(r.prompt_tokens, pair.prompt_sum);
    if (r.completion_tokens >= 0) pair.completion_tokens.observe(r.completion_tokens, pair.completion_sum);
    if (r.cached_tokens > 0) pair.cached_sum.add_signed(r.cached_tokens);
    if (r.stream && r.first_byte_ns >= 0) pair.first_token.observe(r.first_byte_ns, pair.first_token_sum);
    if (r.stream && r.per_token_ns >= 0) pair.per_token.observe(r.per_token_ns, pair.per_token_sum);
    if (r.overhead_ns >= 0) thread_.overhead.observe(r.overhead_ns);
    if (r.affinity != AffinityOutcome::none) count(thread_.affinity, r.affinity);
  }

  // For errors, disconnects, fallbacks, missing usage, service levels and exemplars. All cells are looked up first, so
  // that nothing is counted if one can't be allocated.
  [[gnu::noinline]] void record_rare(const RequestRecord& r) {
    const ErrorType error = error_of(r);
    ModelCounters& model = models_.at(index_of(r.model));
    BackendCounters& backend = backends_.at(index_of(r.backend));
    Counter* const fallback = r.fell_back ? &fallbacks_.at(index_of(r.model), index_of(r.fallback_to)) : nullptr;
    record_pair(r, error != ErrorType::none);
    if (error != ErrorType::none) count(model.errors, error);
    if (r.disconnect != DisconnectPhase::none) count(thread_.disconnects, r.disconnect);
    if (r.without_usage) backend.without_usage.add(1);
    if (r.without_end) backend.without_end.add(1);
    if (fallback != nullptr) fallback->add(1);
    if (r.slo != Slo::none) count(model.slo, r.slo);
    if (r.trace != nullptr) keep_exemplars(r);
  }

  // After the counts, so that no reader sees an exemplar in an empty bucket. Without memory there is none.
  void keep_exemplars(const RequestRecord& r) {
    PairCounters& pair = pairs_.at(index_of(r.model), index_of(r.backend));
    PairExemplars* exemplars = pair.exemplars.load(std::memory_order_relaxed);
    if (exemplars == nullptr) {
      exemplars = new (std::nothrow) PairExemplars;
      if (exemplars == nullptr) return;
      pair.exemplars.store(exemplars, std::memory_order_release);  // publishes the zeros
    }
    if (r.reached_backend) exemplars->duration.put(*r.trace, r.duration_ns);
    if (r.stream && r.first_byte_ns >= 0) exemplars->first_token.put(*r.trace, r.first_byte_ns);
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
  GrowingTable<KeyCounters> keys_;
  ThreadCounters thread_;
};

class Metrics {
 public:
  // Call before the threads start: readers walk the list of slabs without a lock. `serves`: its thread has requests.
  Slab& add_slab(bool serves = true) {
    slabs_.push_back(std::make_unique<Slab>());
    if (serves) serving_.push_back(slabs_.back().get());
    return *slabs_.back();
  }

  // Requests in flight on a backend, over all threads. Costs two loads per thread that serves.
  std::int64_t pending(BackendId id) const {
    std::int64_t sum = 0;
    for (const Slab* slab : serving_) sum += slab->pending(id);
    return sum;
  }

  const std::vector<std::unique_ptr<Slab>>& slabs() const { return slabs_; }
  FailureLog& failures() { return failures_; }
  const FailureLog& failures() const { return failures_; }
  SpanQueue& spans() { return spans_; }
  const SpanQueue& spans() const { return spans_; }

 private:
  std::vector<std::unique_ptr<Slab>> slabs_;
  std::vector<const Slab*> serving_;  // of these
  FailureLog failures_;
  SpanQueue spans_;
};

}  // namespace nexus
