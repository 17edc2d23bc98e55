// stats_json.h
// Owns:     the totals of each backend and model, which the pages at /v1/stats and / show, and the JSON of the first.
// Promises: `total` = `success` + `errors` in every page; averages with one decimal place, computed in integers and
//           rounded half up.
// Leaves:   sockets, and the 503 if there is no page, to builtin_pages.h; the HTML to status_page.h.
// Threads:  one (control), which also owns the name tables; the slabs may be written meanwhile.
// Tested by: tests/stats_json_test.cpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/text_buffer.h"
#include "nexus/metrics/histogram.h"
#include "nexus/metrics/ids.h"
#include "nexus/metrics/prometheus.h"
#include "nexus/metrics/slab.h"

namespace nexus {

// Totals of one backend, model or client's key, or of all requests.
struct StatsRow {
  std::string_view name;  // as configured or discovered, not sanitised; owned by the name table
  bool listed = false;
  bool registered = false;  // of a backend
  bool healthy = false;     // of a backend
  Ns ejected_ns = -1;       // of a backend: time left; -1: not ejected
  AttemptOutcome ejected_why{};
  std::int64_t pending = 0;  // of a backend or key
  std::uint64_t requests = 0, errors = 0, prompt_tokens = 0, completion_tokens = 0;
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
  }

  void add(const StatsRow& other) {
    requests += other.requests;
    errors += other.errors;
    prompt_tokens += other.prompt_tokens;
    completion_tokens += other.completion_tokens;
    durations += other.durations;
    duration_sum_ns += other.duration_sum_ns;
  }
};

struct Stats {
  std::uint64_t uptime_s = 0;
  std::uint64_t registered = 0, healthy = 0, ejected = 0;  // backends; the last: of the healthy ones
  std::uint64_t models_available = 0;
  std::int64_t client_connections = 0;
  StatsRow all;
  std::vector<StatsRow> backends;  // by name: those that are registered, or still have requests
  std::vector<StatsRow> removed;   // by name: others that ever served
  std::vector<StatsRow> models;    // by requests, most first, then by name
  std::vector<StatsRow> keys;      // the same; empty unless a file of keys was read
};

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
    stats.healthy += backend.healthy ? 1 : 0;
    stats.ejected += backend.healthy && backend.ejected_ns >= 0 ? 1 : 0;
  }
  for (const ModelId id : fleet.models_on_healthy) stats.models[index_of(id)].listed = true;
  for (std::uint32_t i = 0; i < stats.backends.size(); ++i) stats.backends[i].pending = metrics.pending(BackendId{i});
  for (const auto& slab : metrics.slabs()) stats.client_connections += slab->thread().client_connections.read_signed();
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
    }
  }
  std::erase_if(stats.keys, [](const auto& row) { return row.requests == 0 && row.pending <= 0; });
}

}  // namespace detail

inline Stats collect_stats(const Metrics& metrics, const FleetView& fleet, const ModelNames& models,
                           const BackendNames& backends, const KeyNames& keys) {
  Stats stats;
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

// The page at /v1/stats.
inline void write_stats(TextBuffer& page, const Stats& stats) {
  JsonWriter json(page);
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
      json.field("completion_tokens", row.completion_tokens).end_object();
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
      json.end_object();
    }
    json.end_array();
  }
  json.end_object();
  page += '\n';
}

}  // namespace nexus
