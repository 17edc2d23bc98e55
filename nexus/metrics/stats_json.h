// stats_json.h
// Owns:     the totals of each backend and model, which the pages at /v1/stats and / show, and the JSON of the first.
// Promises: `total` = `success` + `errors` in every page; averages with one decimal place, computed in integers and
//           rounded half up.
// Leaves:   sockets, and the 503 if there is no page, to builtin_pages.h; the HTML to status_page.h.
// Threads:  one (control), which also owns the name tables; the slabs may be written meanwhile.
// Tested by: tests/stats_json_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/text_buffer.h"
#include "nexus/metrics/fleet_view.h"
#include "nexus/metrics/histogram.h"
#include "nexus/metrics/ids.h"
#include "nexus/metrics/prometheus.h"
#include "nexus/metrics/slab.h"
#include "nexus/os/log.h"

namespace nexus {

constexpr Ns kLongTurn = 100 * kMillisecond;  // of an event loop; longer ones hold requests up

// Totals of one backend, model or client's key, or of all requests.
struct StatsRow {
  std::string_view name;  // as configured or discovered, not sanitised; owned by the name table
  bool listed = false;
  bool registered = false;  // of a backend
  bool healthy = false;     // of a backend
  Ns ejected_ns = -1;       // of a backend: time left; -1: not ejected
  AttemptOutcome ejected_why{};
  const FleetView::Backend* view = nullptr;  // of a registered backend
  std::int64_t queued = 0;                   // of a backend
  std::array<std::uint64_t, kAttemptOutcomeNames.size()> attempts{};
  std::int64_t pending = 0;  // of a backend or key
  std::uint64_t requests = 0, errors = 0, prompt_tokens = 0, completion_tokens = 0, cached_tokens = 0;
  std::uint64_t durations = 0, duration_sum_ns = 0;  // of requests; of a key: of their waits in the queue

  void add(const PairCounters& counters) {
    counters.statuses.for_each([this](const StatusCounters::Count& count) {
      requests += count.count;
      if (count.failed) errors += count.count;
    });
    HistogramValues<kDurationBounds> duration;
    counters.duration.add_to(duration, counters.duration_sum);
    durations += duration.count();
    duration_sum_ns += duration.sum;
    prompt_tokens += counters.prompt_sum.read();
    completion_tokens += counters.completion_sum.read();
    cached_tokens += counters.cached_sum.read();
  }

  void add(const StatsRow& other) {
    requests += other.requests;
    errors += other.errors;
    prompt_tokens += other.prompt_tokens;
    completion_tokens += other.completion_tokens;
    cached_tokens += other.cached_tokens;
    durations += other.durations;
    duration_sum_ns += other.duration_sum_ns;
  }
};

struct Stats {
  const FleetView* fleet = nullptr;  // outlives the page
  std::uint64_t uptime_s = 0;
  std::uint64_t registered = 0, healthy = 0, ejected = 0;  // backends; the last: of the healthy ones
  std::uint64_t models_available = 0;
  std::int64_t client_connections = 0;
  StatsRow all;
  std::vector<StatsRow> backends;  // by name: those that are registered, or still have requests
  std::vector<StatsRow> removed;   // by name: others that ever served
  std::vector<StatsRow> models;    // by requests, most first, then by name
  std::vector<StatsRow> keys;      // the same; empty unless a file of keys was read
  std::uint64_t loop_stalls = 0;   // turns of an event loop of more than kLongTurn
  struct Failure {
    FailedRequest request;
    std::string_view backend;  // empty: none
  };
  std::vector<Failure> failures;  // the newest first
};

// The state of a backend in a word, for people.
constexpr std::string_view state_of(const StatsRow& row) {
  if (!row.registered) return row.pending > 0 ? "draining" : "removed";
  if (row.view != nullptr && !row.view->checked) return "unchecked";
  if (!row.healthy) return "down";
  return row.ejected_ns >= 0 ? "ejected" : "up";
}

// The reason of an ejection, and what to do, in the order of AttemptOutcome.
inline constexpr std::array<std::string_view, kAttemptOutcomeNames.size()> kEjectionWords{
    "",
    "its requests fail (connect_error): it refuses or resets connections",
    "its requests fail (timeout): it hangs, or needs longer than the timeouts of [upstream]",
    "its requests fail (bad_response): it does not answer in HTTP",
    "its requests fail (truncated): it breaks off its responses",
    "its requests fail (status_429): it wants fewer at once, lower its max_pending",
    "its requests fail (status_5xx): see its own log",
    ""};

// The reason of that state, or what is wrong besides; empty if nothing is.
constexpr std::string_view why_of(const StatsRow& row) {
  if (row.healthy && row.ejected_ns >= 0) return kEjectionWords[static_cast<std::size_t>(row.ejected_why)];
  return row.view == nullptr ? std::string_view() : row.view->problem;
}

// The time left of an ejection, rounded up.
constexpr std::uint64_t ejected_seconds(const StatsRow& row) {
  return static_cast<std::uint64_t>((row.ejected_ns + kSecond - 1) / kSecond);
}

namespace detail {

// `sum / count` in tenths of a millisecond.
constexpr std::uint64_t average_tenths_of_ms(std::uint64_t sum_ns, std::uint64_t count) {
  if (count == 0) return 0;
  const std::uint64_t divisor = count * static_cast<std::uint64_t>(kMillisecond / 10);
  const std::uint64_t rest = sum_ns % divisor;
  return sum_ns / divisor + (rest >= divisor - rest ? 1 : 0);
}

template <class Id>
std::vector<StatsRow> rows_by_id(const NameTable<Id>& names) {
  std::vector<StatsRow> rows(names.size());
  for (std::uint32_t i = 0; i < rows.size(); ++i) rows[i].name = names.name(Id{i});
  return rows;
}

inline void add_backend(StatsRow& row, const Metrics& metrics, BackendId id) {
  row.pending = metrics.pending(id);
  for (const auto& slab : metrics.slabs()) {
    const BackendCounters* cells = slab->backend(id);
    if (cells == nullptr) continue;
    row.queued += cells->queue_depth.read_signed();
    for (std::size_t i = 0; i < row.attempts.size(); ++i) row.attempts[i] += cells->attempts[i].read();
  }
}

inline void add_fleet(Stats& stats, const Metrics& metrics, const FleetView& fleet) {
  stats.uptime_s = static_cast<std::uint64_t>(fleet.uptime_ns / kSecond);
  stats.registered = fleet.backends.size();
  stats.models_available = fleet.models_available;
  for (const auto& backend : fleet.backends) {
    StatsRow& row = stats.backends[index_of(backend.id)];
    row.listed = row.registered = true;
    row.healthy = backend.healthy;
    row.ejected_ns = backend.ejected_ns;
    row.ejected_why = backend.ejected_why;
    row.view = &backend;
    stats.healthy += backend.healthy ? 1 : 0;
    stats.ejected += backend.healthy && backend.ejected_ns >= 0 ? 1 : 0;
  }
  for (const ModelId id : fleet.models_on_healthy) stats.models[index_of(id)].listed = true;
  for (std::uint32_t i = 0; i < stats.backends.size(); ++i) add_backend(stats.backends[i], metrics, BackendId{i});
  for (const auto& slab : metrics.slabs()) {
    stats.client_connections += slab->thread().client_connections.read_signed();
    HistogramValues<kLoopStallBounds> turns;
    slab->thread().loop_stall.add_to(turns);
    stats.loop_stalls += turns.above(kLongTurn);
  }
}

inline void add_keys(Stats& stats, const Metrics& metrics, const KeyNames& keys) {
  if (keys.size() <= kOwnKeyNames) return;
  stats.keys = rows_by_id(keys);
  for (std::uint32_t i = 0; i < stats.keys.size(); ++i) {
    StatsRow& row = stats.keys[i];
    for (const auto& slab : metrics.slabs()) {
      const KeyCounters* cells = slab->key(KeyId{i});
      if (cells == nullptr) continue;
      row.errors += cells->errors.read();  // before the requests, which are counted first
      row.requests += cells->all_requests();
      row.pending += cells->pending.read_signed();
      row.durations += cells->queue_waits.read();
      row.duration_sum_ns += cells->queue_wait_ns.read();
      row.prompt_tokens += cells->prompt_tokens.read();
      row.completion_tokens += cells->completion_tokens.read();
      row.cached_tokens += cells->cached_tokens.read();
    }
  }
  std::erase_if(stats.keys, [](const auto& row) { return row.requests == 0 && row.pending <= 0; });
}

}  // namespace detail

inline Stats collect_stats(const Metrics& metrics, const FleetView& fleet, const ModelNames& models,
                           const BackendNames& backends, const KeyNames& keys) {
  Stats stats;
  stats.fleet = &fleet;
  for (const FailedRequest& one : metrics.failures().newest()) {
    stats.failures.push_back(
        {one, one.backend == BackendId::none ? std::string_view() : std::string_view(backends.name(one.backend))});
  }
  stats.backends = detail::rows_by_id(backends);
  stats.models = detail::rows_by_id(models);
  detail::add_fleet(stats, metrics, fleet);
  // A model may be configured under the name of the catch-all: both are then one row.
  const std::uint32_t unknown = index_of(models.find(models.name(ModelId::unknown)));
  for (const auto& slab : metrics.slabs()) {
    slab->pairs().for_each([&](std::uint32_t model, std::uint32_t backend, const PairCounters& counters) {
      StatsRow pair;  // read once: a thread may be recording
      pair.add(counters);
      if (model == index_of(ModelId::unknown)) model = unknown;
      stats.all.add(pair);
      stats.models[model].add(pair);
      stats.models[model].listed = true;
      stats.backends[backend].add(pair);
      stats.backends[backend].listed |= backend != index_of(BackendId::none);
    });
  }
  for (auto* rows : {&stats.backends, &stats.models})
    std::erase_if(*rows, [](const auto& row) { return !row.listed && row.pending <= 0; });
  std::sort(stats.backends.begin(), stats.backends.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  const auto gone = std::stable_partition(stats.backends.begin(), stats.backends.end(),
                                          [](const auto& row) { return row.registered || row.pending > 0; });
  stats.removed.assign(gone, stats.backends.end());
  stats.backends.erase(gone, stats.backends.end());
  detail::add_keys(stats, metrics, keys);
  for (auto* rows : {&stats.models, &stats.keys}) {
    std::sort(rows->begin(), rows->end(), [](const auto& a, const auto& b) {
      return a.requests != b.requests ? a.requests > b.requests : a.name < b.name;
    });
  }
  return stats;
}

namespace detail {

inline std::string utc_text(Ns wall_ns) {
  std::string text;
  Rfc3339().append(text, wall_ns);
  return text;
}

// The facts of a backend that only a person asks for.
inline void write_state(JsonWriter<TextBuffer>& json, const StatsRow& row) {
  const auto seconds = [&](std::string_view name, Ns span) {
    span < 0 ? json.key(name).literal("null") : json.field(name, span / kSecond);
  };
  json.field("cached_tokens", row.cached_tokens).field("state", state_of(row)).field("why", why_of(row));
  json.field("in_flight", row.pending - row.queued).field("queued", row.queued);
  json.key("failed_attempts").begin_object();
  for (std::size_t i = 0; i < row.attempts.size(); ++i) {
    const auto outcome = static_cast<AttemptOutcome>(i);
    if (outcome != AttemptOutcome::ok && row.attempts[i] > 0) json.field(name_of(outcome), row.attempts[i]);
  }
  json.end_object();
  if (row.view == nullptr) return;
  json.field("url", row.view->url).field("type", row.view->type).field("max_pending", row.view->max_pending);
  seconds("state_seconds", row.view->state_ns);
  seconds("last_check_seconds", row.view->checked_ns);
  seconds("next_check_seconds", row.view->next_check_ns);
}

// This process, and the requests that failed last.
inline void write_process(JsonWriter<TextBuffer>& json, const Stats& stats) {
  const FleetView& fleet = *stats.fleet;
  json.field("version", fleet.version);
  json.key("configuration").begin_object();
  json.field("loaded", utc_text(static_cast<Ns>(fleet.last_reload_success_timestamp) * kSecond));
  json.field("last_reload_ok", fleet.last_reload_ok).end_object();
  json.field("loop_stalls", stats.loop_stalls);
  json.key("certificates").begin_array();
  for (const FleetView::Certificate& one : fleet.certificates) {
    json.begin_object().field("name", one.name).field("expires", utc_text(one.expiry_s * kSecond)).end_object();
  }
  json.end_array();
  json.key("failures").begin_array();
  for (const auto& [one, backend] : stats.failures) {
    json.begin_object().field("time", utc_text(one.wall_ns)).field("model", one.model.view());
    json.field("backend", backend);
    json.field("status", one.status).field("error_type", one.error);
    json.field("request_id", one.request_id.view()).end_object();
  }
  json.end_array();
}

}  // namespace detail

// The page at /v1/stats.
inline void write_stats(TextBuffer& page, const Stats& stats) {
  JsonWriter<TextBuffer> json(page);
  const auto write_average = [&](std::string_view name, const StatsRow& row) {
    const std::uint64_t tenths = detail::average_tenths_of_ms(row.duration_sum_ns, row.durations);
    json.key(name).literal(Digits(tenths / 10).view());
    page.add(".").add_number(tenths % 10);
  };
  const auto write_rows = [&](std::string_view array, const std::vector<StatsRow>& rows, std::string_view name,
                              std::string_view average, bool of_backends) {
    json.key(array).begin_array();
    for (const StatsRow& row : rows) {
      json.begin_object().field(name, row.name).field("requests", row.requests);
      write_average(average, row);
      if (of_backends) {
        json.field("pending", row.pending).field("healthy", row.healthy);
        if (row.ejected_ns >= 0) {
          json.key("ejected").begin_object().field("why", name_of(row.ejected_why));
          json.field("seconds_left", ejected_seconds(row)).end_object();
        } else {
          json.key("ejected").literal("null");
        }
      }
      json.field("errors", row.errors).field("prompt_tokens", row.prompt_tokens);
      json.field("completion_tokens", row.completion_tokens);
      if (of_backends) detail::write_state(json, row);
      json.end_object();
    }
    json.end_array();
  };
  json.begin_object().field("uptime_seconds", stats.uptime_s);
  json.key("requests").begin_object().field("total", stats.all.requests);
  json.field("success", stats.all.requests - stats.all.errors).field("errors", stats.all.errors).end_object();
  write_rows("backends", stats.backends, "id", "average_latency_ms", true);
  write_rows("models", stats.models, "name", "average_duration_ms", false);
  if (!stats.removed.empty()) write_rows("removed_backends", stats.removed, "id", "average_latency_ms", true);
  if (!stats.keys.empty()) {
    json.key("keys").begin_array();
    for (const StatsRow& row : stats.keys) {
      json.begin_object().field("name", row.name).field("requests", row.requests).field("errors", row.errors);
      json.field("pending", row.pending).field("prompt_tokens", row.prompt_tokens);
      json.field("completion_tokens", row.completion_tokens).field("queued", row.durations);
      write_average("average_queue_wait_ms", row);
      json.field("cached_tokens", row.cached_tokens).end_object();
    }
    json.end_array();
  }
  if (stats.fleet != nullptr) detail::write_process(json, stats);
  json.end_object();
  page += '\n';
}

}  // namespace nexus
