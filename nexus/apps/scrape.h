// scrape.h
// Owns:     samples of a running Nexus: /v1/stats and /metrics read back into numbers, and the rates and quantiles
//           between two of them.
// Promises: names are those of /v1/stats; a name's histograms are found with sanitised and with raw labels; a text
//           that is not /v1/stats is refused, an unknown family or field is skipped; nothing throws but for memory.
//           After a restart between the samples the new process is measured from its start; a quantile is estimated
//           as Prometheus does, and absent if nothing was observed; no rate is negative.
// Leaves:   fetching and showing to top.h. The status page's script computes the same rates in the browser.
// Threads:  any.
// Tested by: tests/top_test.cpp
#pragma once

#include <simdjson.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/metrics/labels.h"

namespace nexus {

// Cumulative counts by upper bound in seconds, +Inf included. Series are added bound by bound.
struct ScrapedHistogram {
  std::map<double, double> buckets;

  double count() const { return buckets.empty() ? 0 : buckets.rbegin()->second; }
};

// One backend, model or client's key, or all requests.
struct ScrapedEntry {
  std::string name;
  bool healthy = true;                // of a backend, as the next three lines
  std::string ejected_why;            // empty: it is not ejected
  std::uint64_t ejected_seconds = 0;  // time left
  std::string state, why;             // in words; a Nexus before 0.2 tells neither
  std::uint64_t state_seconds = 0;
  std::int64_t pending = 0, queue_depth = 0;  // the first also of a key
  std::uint64_t requests = 0, errors = 0, prompt_tokens = 0, completion_tokens = 0;
  double waits = 0, wait_sum_s = 0;  // in the queue, of a key
  ScrapedHistogram duration, first_token, queue_wait, overhead;
};

struct ScrapedFleet {
  std::uint64_t uptime_s = 0, backends_ejected = 0;
  std::int64_t backends = 0, backends_healthy = 0, models_available = 0, client_connections = 0;
};

struct Scrape {
  Ns at_ns = 0;
  ScrapedFleet fleet;
  ScrapedEntry all;
  std::vector<ScrapedEntry> by_backend, by_model, by_key;  // in the order of /v1/stats
};

namespace detail {

// The value of a label in `model="x",backend="y"`, with its escapes; empty if there is no such label.
inline std::string_view label_value(std::string_view labels, std::string_view name) {
  for (std::size_t equals; (equals = labels.find("=\"")) != std::string_view::npos;) {
    const std::size_t begin = equals + 2;
    std::size_t end = begin;
    while (end < labels.size() && labels[end] != '"') end += labels[end] == '\\' ? 2 : 1;
    if (end >= labels.size()) return {};
    if (labels.substr(0, equals) == name) return labels.substr(begin, end - begin);
    labels.remove_prefix(std::min(end + 2, labels.size()));  // the quote and the comma
  }
  return {};
}

inline bool read_sample_value(std::string_view text, double& value) {
  if (text.starts_with('+')) text.remove_prefix(1);
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  return result.ec == std::errc() && result.ptr == text.data() + text.size() && !std::isnan(value);
}

// A gauge as a whole number; 0 if Nexus could not have counted it.
inline std::int64_t whole(double value) {
  constexpr double kMost = 1e15;
  return value > -kMost && value < kMost ? static_cast<std::int64_t>(value) : 0;
}

// Leaves `value` as it is if the field is missing or of another type.
template <class T>
void read_field(const simdjson::dom::object& object, std::string_view key, T& value) {
  T read{};
  if (object[key].get<T>().get(read) == simdjson::SUCCESS) value = read;
}

inline bool read_entries(simdjson::dom::array list, std::string_view key, std::vector<ScrapedEntry>& out) {
  for (const simdjson::dom::element element : list) {
    simdjson::dom::object object;
    std::string_view name;
    if (element.get_object().get(object) || object[key].get_string().get(name)) return false;
    ScrapedEntry& entry = out.emplace_back();
    entry.name = name;
    read_field(object, "requests", entry.requests);
    read_field(object, "errors", entry.errors);
    read_field(object, "prompt_tokens", entry.prompt_tokens);
    read_field(object, "completion_tokens", entry.completion_tokens);
    read_field(object, "pending", entry.pending);
    read_field(object, "healthy", entry.healthy);
    read_field(object, "state_seconds", entry.state_seconds);
    std::string_view state, reason;
    read_field(object, "state", state);
    read_field(object, "why", reason);
    entry.state = state;
    entry.why = reason;
    simdjson::dom::object ejected;
    std::string_view why;
    if (object["ejected"].get_object().get(ejected) || ejected["why"].get_string().get(why)) continue;
    entry.ejected_why = why;
    read_field(ejected, "seconds_left", entry.ejected_seconds);
  }
  return true;
}

// False if `text` is not the text of /v1/stats.
inline bool read_stats(std::string_view text, Scrape& sample) {
  simdjson::dom::parser parser;
  simdjson::dom::object page, requests;
  simdjson::dom::array backends, models, keys;
  if (parser.parse(text.data(), text.size()).get_object().get(page)) return false;
  if (page["requests"].get_object().get(requests)) return false;
  if (page["backends"].get_array().get(backends) || page["models"].get_array().get(models)) return false;
  if (!read_entries(backends, "id", sample.by_backend) || !read_entries(models, "name", sample.by_model)) return false;
  if (page["keys"].get_array().get(keys) == simdjson::SUCCESS && !read_entries(keys, "name", sample.by_key))
    return false;
  read_field(page, "uptime_seconds", sample.fleet.uptime_s);
  read_field(requests, "total", sample.all.requests);
  read_field(requests, "errors", sample.all.errors);
  for (const ScrapedEntry& backend : sample.by_backend) {
    sample.all.pending += backend.pending;
    sample.all.completion_tokens += backend.completion_tokens;
    sample.fleet.backends_ejected += backend.healthy && !backend.ejected_why.empty() ? 1 : 0;
  }
  return true;
}

// Two names may have the same label value: both then show what is counted under it.
using ByLabel = std::unordered_multimap<std::string, ScrapedEntry*>;

inline ByLabel by_label(std::vector<ScrapedEntry>& entries) {
  ByLabel map;
  for (ScrapedEntry& entry : entries) {
    const std::string sanitized = sanitize_label(entry.name), escaped = escape_label(entry.name);
    map.emplace(sanitized, &entry);
    if (escaped != sanitized) map.emplace(escaped, &entry);
  }
  return map;
}

// The entries of a sample, by the label that names them.
struct Labelled {
  std::array<std::pair<std::string_view, ByLabel>, 3> of;
  explicit Labelled(Scrape& sample)
      : of{{{"backend", by_label(sample.by_backend)},
            {"model", by_label(sample.by_model)},
            {"key", by_label(sample.by_key)}}} {}
};

// Adds one line of /metrics to all requests, and to its backend, model or key.
inline void read_line(std::string_view line, const Labelled& entries, Scrape& sample) {
  static constexpr std::array<std::pair<std::string_view, std::int64_t ScrapedFleet::*>, 4> kGauges{{
      {"nexus_backends_total", &ScrapedFleet::backends},
      {"nexus_backends_healthy", &ScrapedFleet::backends_healthy},
      {"nexus_models_available", &ScrapedFleet::models_available},
      {"nexus_client_connections", &ScrapedFleet::client_connections},
  }};
  const std::string_view name = line.substr(0, line.find_first_of("{ "));
  const std::size_t space = line.rfind(' '), open = line.find('{'), close = line.rfind('}');
  double value = 0, bound = 0;
  if (space == std::string_view::npos || !read_sample_value(line.substr(space + 1), value)) return;
  for (const auto& [gauge, member] : kGauges) {
    if (name == gauge) sample.fleet.*member = std::max<std::int64_t>(whole(value), 0);
  }
  if (open == std::string_view::npos || close == std::string_view::npos || close < open) return;
  const std::string_view labels = line.substr(open + 1, close - open - 1);
  const auto histogram = name == "nexus_request_duration_seconds_bucket"      ? &ScrapedEntry::duration
                         : name == "nexus_time_to_first_token_seconds_bucket" ? &ScrapedEntry::first_token
                         : name == "nexus_queue_wait_seconds_bucket"          ? &ScrapedEntry::queue_wait
                         : name == "nexus_overhead_seconds_bucket"            ? &ScrapedEntry::overhead
                                                                              : nullptr;
  const auto sum = name == "nexus_key_queue_wait_seconds_sum"     ? &ScrapedEntry::wait_sum_s
                   : name == "nexus_key_queue_wait_seconds_count" ? &ScrapedEntry::waits
                                                                  : nullptr;
  if (histogram == nullptr && sum == nullptr && name != "nexus_queue_depth") return;
  if (histogram != nullptr && !read_sample_value(label_value(labels, "le"), bound)) return;
  const auto add = [&](ScrapedEntry& entry) {
    if (histogram != nullptr) {
      (entry.*histogram).buckets[bound] += value;
    } else if (sum != nullptr) {
      entry.*sum += value;
    } else {
      entry.queue_depth += whole(value);
    }
  };
  add(sample.all);
  for (const auto& [label, map] : entries.of) {
    const auto [first, last] = map.equal_range(std::string(label_value(labels, label)));
    for (auto at = first; at != last; ++at) add(*at->second);
  }
}

}  // namespace detail

// Nothing if `stats` is not the text of /v1/stats. `metrics` may be empty: what it alone contains is 0 then.
inline std::optional<Scrape> read_scrape(std::string_view stats, std::string_view metrics, Ns at_ns) {
  Scrape sample;
  sample.at_ns = at_ns;
  if (!detail::read_stats(stats, sample)) return std::nullopt;
  const detail::Labelled entries(sample);
  while (!metrics.empty()) {
    const std::size_t end = std::min(metrics.find('\n'), metrics.size());
    detail::read_line(metrics.substr(0, end), entries, sample);
    metrics.remove_prefix(std::min(end + 1, metrics.size()));
  }
  return sample;
}

// The observations between two cumulative histograms; `before` may be empty.
inline ScrapedHistogram difference(const ScrapedHistogram& before, const ScrapedHistogram& after) {
  ScrapedHistogram out = after;
  if (before.count() > after.count()) return out;  // it was reset
  for (const auto& [bound, count] : before.buckets) {
    const auto at = out.buckets.find(bound);
    if (at != out.buckets.end()) at->second = std::max(0.0, at->second - count);
  }
  return out;
}

// The `q`-quantile in seconds, by linear interpolation within its bucket; infinite beyond the last bound.
inline std::optional<double> quantile(const ScrapedHistogram& histogram, double q) {
  const double count = histogram.count();
  if (!(count > 0)) return std::nullopt;
  const double rank = q * count;
  double lower = 0, below = 0;
  for (const auto& [bound, cumulative] : histogram.buckets) {
    if (cumulative >= rank && cumulative > below) {
      if (std::isinf(bound)) return bound;
      return lower + (bound - lower) * (rank - below) / (cumulative - below);
    }
    lower = bound;
    below = cumulative;
  }
  return std::nullopt;
}

struct RateRow {
  ScrapedEntry now;
  double requests_per_s = 0, errors_per_s = 0;
  double tokens_per_s = 0;  // completion tokens
  std::optional<double> p50_s, p95_s, first_token_s;
  std::optional<double> first_token_p95_s, queue_p95_s, overhead_p95_s;
  std::optional<double> wait_s;  // mean
};

struct Rates {
  double seconds = 0;  // between the samples
  ScrapedFleet fleet;
  RateRow all;
  std::vector<RateRow> by_backend, by_model, by_key;
};

namespace detail {

inline RateRow rate_row(const ScrapedEntry& before, const ScrapedEntry& now, double seconds) {
  const auto rate = [&](std::uint64_t ScrapedEntry::*count) {
    const std::uint64_t more = now.*count - (now.*count >= before.*count ? before.*count : 0);
    return seconds > 0 ? static_cast<double>(more) / seconds : 0;
  };
  const ScrapedHistogram duration = difference(before.duration, now.duration);
  const double waits = now.waits - before.waits, wait_sum_s = now.wait_sum_s - before.wait_sum_s;
  return {.now = now,
          .requests_per_s = rate(&ScrapedEntry::requests),
          .errors_per_s = rate(&ScrapedEntry::errors),
          .tokens_per_s = rate(&ScrapedEntry::completion_tokens),
          .p50_s = quantile(duration, 0.5),
          .p95_s = quantile(duration, 0.95),
          .first_token_s = quantile(difference(before.first_token, now.first_token), 0.5),
          .first_token_p95_s = quantile(difference(before.first_token, now.first_token), 0.95),
          .queue_p95_s = quantile(difference(before.queue_wait, now.queue_wait), 0.95),
          .overhead_p95_s = quantile(difference(before.overhead, now.overhead), 0.95),
          .wait_s = waits > 0 ? std::optional(std::max(wait_sum_s, 0.0) / waits) : std::nullopt};
}

inline std::vector<RateRow> rate_rows(const std::vector<ScrapedEntry>& before, const std::vector<ScrapedEntry>& now,
                                      double seconds) {
  std::unordered_map<std::string_view, const ScrapedEntry*> earlier;
  for (const ScrapedEntry& entry : before) earlier.emplace(entry.name, &entry);
  const ScrapedEntry nothing;
  std::vector<RateRow> rows;
  for (const ScrapedEntry& entry : now) {
    const auto at = earlier.find(entry.name);
    rows.push_back(rate_row(at == earlier.end() ? nothing : *at->second, entry, seconds));
  }
  return rows;
}

}  // namespace detail

// The sample at the start of the process, when every count was 0.
inline Scrape start_of(const Scrape& sample) {
  Scrape start;
  start.at_ns = sample.at_ns - static_cast<Ns>(sample.fleet.uptime_s) * kSecond;
  return start;
}

inline Rates compute_rates(const Scrape& earlier, const Scrape& now) {
  const bool restarted = now.fleet.uptime_s < earlier.fleet.uptime_s || now.all.requests < earlier.all.requests;
  const Scrape before = restarted ? start_of(now) : earlier;
  const double seconds = static_cast<double>(now.at_ns - before.at_ns) / static_cast<double>(kSecond);
  return {.seconds = seconds,
          .fleet = now.fleet,
          .all = detail::rate_row(before.all, now.all, seconds),
          .by_backend = detail::rate_rows(before.by_backend, now.by_backend, seconds),
          .by_model = detail::rate_rows(before.by_model, now.by_model, seconds),
          .by_key = detail::rate_rows(before.by_key, now.by_key, seconds)};
}

}  // namespace nexus
