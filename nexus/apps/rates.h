// rates.h
// Owns:     what two samples of a Nexus say of the time between them: rates, quantiles, and what there is now.
// Promises: a restart between the samples is taken for a start from nothing; a quantile is estimated as Prometheus does
//           and is absent where nothing was observed; no rate is negative.
// Leaves:   how it is shown to top.h and status_page.h.
// Threads:  any.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "nexus/apps/scrape.h"

namespace nexus {

// What is between two cumulative histograms; `before` may be empty.
inline ScrapedHistogram difference(const ScrapedHistogram& before, const ScrapedHistogram& after) {
  ScrapedHistogram out = after;
  if (before.count() > after.count()) return out;  // it began anew
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
  std::string name;
  bool healthy = true;
  std::int64_t pending = 0, queue_depth = 0;
  double requests_per_s = 0, errors_per_s = 0;
  double tokens_per_s = 0;  // completion tokens
  std::optional<double> p50_s, p95_s, first_token_s;
  std::uint64_t requests = 0, errors = 0, prompt_tokens = 0, completion_tokens = 0;  // since the start
};

struct Rates {
  double seconds = 0;  // between the samples
  std::uint64_t uptime_s = 0;
  std::uint64_t backends = 0, backends_healthy = 0, models_available = 0;
  std::int64_t client_connections = 0;
  std::uint64_t success = 0;
  RateRow all;
  std::vector<RateRow> by_backend, by_model;
};

namespace detail {

inline double rate(std::uint64_t before, std::uint64_t after, double seconds) {
  const std::uint64_t more = after >= before ? after - before : after;
  return seconds > 0 ? static_cast<double>(more) / seconds : 0;
}

inline void fill_row(RateRow& row, const ScrapedEntry& before, const ScrapedEntry& after, double seconds) {
  row.name = after.name;
  row.healthy = after.healthy;
  row.pending = after.pending;
  row.queue_depth = after.queue_depth;
  row.requests = after.requests;
  row.errors = after.errors;
  row.prompt_tokens = after.prompt_tokens;
  row.completion_tokens = after.completion_tokens;
  row.requests_per_s = rate(before.requests, after.requests, seconds);
  row.errors_per_s = rate(before.errors, after.errors, seconds);
  row.tokens_per_s = rate(before.completion_tokens, after.completion_tokens, seconds);
  const ScrapedHistogram duration = difference(before.duration, after.duration);
  row.p50_s = quantile(duration, 0.5);
  row.p95_s = quantile(duration, 0.95);
  row.first_token_s = quantile(difference(before.first_token, after.first_token), 0.5);
}

inline std::vector<RateRow> rate_rows(const std::vector<ScrapedEntry>& before, const std::vector<ScrapedEntry>& after,
                                      double seconds) {
  std::unordered_map<std::string_view, const ScrapedEntry*> earlier;
  for (const ScrapedEntry& entry : before) earlier.emplace(entry.name, &entry);
  std::vector<RateRow> rows(after.size());
  const ScrapedEntry nothing;
  for (std::size_t i = 0; i < after.size(); ++i) {
    const auto at = earlier.find(after[i].name);
    fill_row(rows[i], at == earlier.end() ? nothing : *at->second, after[i], seconds);
  }
  return rows;
}

// All of it as one entry.
inline ScrapedEntry sum_of(const Scrape& sample) {
  ScrapedEntry all;
  all.requests = sample.total;
  all.errors = sample.errors;
  all.duration = sample.duration;
  all.first_token = sample.first_token;
  for (const ScrapedEntry& backend : sample.by_backend) {
    all.pending += backend.pending;
    all.queue_depth += backend.queue_depth;
    all.prompt_tokens += backend.prompt_tokens;
    all.completion_tokens += backend.completion_tokens;
  }
  return all;
}

}  // namespace detail

// What stands in `before` where there is none: the moment of the start, when all was 0.
inline Scrape start_of(const Scrape& sample) {
  Scrape start;
  start.at_ns = sample.at_ns - static_cast<Ns>(sample.uptime_s) * kSecond;
  return start;
}

inline Rates compute_rates(const Scrape& earlier, const Scrape& after) {
  const bool restarted = after.uptime_s < earlier.uptime_s || after.total < earlier.total;
  const Scrape before = restarted ? start_of(after) : earlier;
  Rates board;
  board.seconds = static_cast<double>(after.at_ns - before.at_ns) / static_cast<double>(kSecond);
  board.uptime_s = after.uptime_s;
  board.backends = after.backends;
  board.backends_healthy = after.backends_healthy;
  board.models_available = after.models_available;
  board.client_connections = after.client_connections;
  board.success = after.success;
  detail::fill_row(board.all, detail::sum_of(before), detail::sum_of(after), board.seconds);
  board.by_backend = detail::rate_rows(before.by_backend, after.by_backend, board.seconds);
  board.by_model = detail::rate_rows(before.by_model, after.by_model, board.seconds);
  return board;
}

}  // namespace nexus
