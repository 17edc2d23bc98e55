// scrape.h
// Owns:     reading /v1/stats and /metrics of a running Nexus back into numbers.
// Promises: names are those of /v1/stats; a name's histograms are found with sanitised and with raw labels; a text that
//           is not /v1/stats is refused, an unknown family or field is skipped; nothing throws but for memory.
// Leaves:   fetching to top.h, rates to rates.h.
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

// One backend, one model, or all requests.
struct ScrapedEntry {
  std::string name;
  bool healthy = true;                // of a backend, as the next three lines
  std::string ejected_why;            // empty: it is not ejected
  std::uint64_t ejected_seconds = 0;  // time left
  std::int64_t pending = 0, queue_depth = 0;
  std::uint64_t requests = 0, errors = 0, completion_tokens = 0;
  ScrapedHistogram duration, first_token;
};

struct ScrapedFleet {
  std::uint64_t uptime_s = 0, backends_ejected = 0;
  std::int64_t backends = 0, backends_healthy = 0, models_available = 0, client_connections = 0;
};

struct Scrape {
  Ns at_ns = 0;
  ScrapedFleet fleet;
  ScrapedEntry all;
  std::vector<ScrapedEntry> by_backend, by_model;  // in the order of /v1/stats
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
    read_field(object, "completion_tokens", entry.completion_tokens);
    read_field(object, "pending", entry.pending);
    read_field(object, "healthy", entry.healthy);
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
  simdjson::dom::array backends, models;
  if (parser.parse(text.data(), text.size()).get_object().get(page)) return false;
  if (page["requests"].get_object().get(requests)) return false;
  if (page["backends"].get_array().get(backends) || page["models"].get_array().get(models)) return false;
  if (!read_entries(backends, "id", sample.by_backend) || !read_entries(models, "name", sample.by_model)) return false;
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

// Adds one line of /metrics to all requests, to its backend and to its model.
inline void read_line(std::string_view line, const ByLabel& backends, const ByLabel& models, Scrape& sample) {
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
                                                                              : nullptr;
  if (histogram == nullptr && name != "nexus_queue_depth") return;
  if (histogram != nullptr && !read_sample_value(label_value(labels, "le"), bound)) return;
  const auto add = [&](ScrapedEntry& entry) {
    if (histogram != nullptr) {
      (entry.*histogram).buckets[bound] += value;
    } else {
      entry.queue_depth += whole(value);
    }
  };
  add(sample.all);
  for (const auto& [map, label] : {std::pair{&backends, "backend"}, std::pair{&models, "model"}}) {
    const auto [first, last] = map->equal_range(std::string(label_value(labels, label)));
    for (auto at = first; at != last; ++at) add(*at->second);
  }
}

}  // namespace detail

// Nothing if `stats` is not the text of /v1/stats. `metrics` may be empty: what it alone contains is 0 then.
inline std::optional<Scrape> read_scrape(std::string_view stats, std::string_view metrics, Ns at_ns) {
  Scrape sample;
  sample.at_ns = at_ns;
  if (!detail::read_stats(stats, sample)) return std::nullopt;
  const detail::ByLabel backends = detail::by_label(sample.by_backend), models = detail::by_label(sample.by_model);
  while (!metrics.empty()) {
    const std::size_t end = std::min(metrics.find('\n'), metrics.size());
    detail::read_line(metrics.substr(0, end), backends, models, sample);
    metrics.remove_prefix(std::min(end + 1, metrics.size()));
  }
  return sample;
}

}  // namespace nexus
