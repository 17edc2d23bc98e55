// rates.h
// Owns:     the rates and quantiles between two samples of a running Nexus.
// Promises: after a restart between the samples the new process is measured from its start; a quantile is estimated as
//           Prometheus does, and absent if nothing was observed; no rate is negative.
// Leaves:   how it is shown to top.h. The status page's script computes the same in the browser.
// Threads:  any.
// Tested by: tests/top_test.cpp
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "nexus/apps/scrape.h"

namespace nexus {

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
};

struct Rates {
  double seconds = 0;  // between the samples
  ScrapedFleet fleet;
  RateRow all;
  std::vector<RateRow> by_backend, by_model;
};

namespace detail {

inline RateRow rate_row(const ScrapedEntry& before, const ScrapedEntry& now, double seconds) {
  const auto rate = [&](std::uint64_t ScrapedEntry::*count) {
    const std::uint64_t more = now.*count - (now.*count >= before.*count ? before.*count : 0);
    return seconds > 0 ? static_cast<double>(more) / seconds : 0;
  };
  const ScrapedHistogram duration = difference(before.duration, now.duration);
  return {.now = now,
          .requests_per_s = rate(&ScrapedEntry::requests),
          .errors_per_s = rate(&ScrapedEntry::errors),
          .tokens_per_s = rate(&ScrapedEntry::completion_tokens),
          .p50_s = quantile(duration, 0.5),
          .p95_s = quantile(duration, 0.95),
          .first_token_s = quantile(difference(before.first_token, now.first_token), 0.5)};
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
          .by_model = detail::rate_rows(before.by_model, now.by_model, seconds)};
}

}  // namespace nexus
