// scrape.h
// Owns:     what the pages of a running Nexus say, read back into numbers: /v1/stats, and of /metrics what it lacks.
// Promises: names are the ones of /v1/stats; a name's histograms are found whether labels are sanitised or raw; a page
//           that is none is refused, an unknown family or field passed over; nothing throws.
// Leaves:   fetching to page_client.h, rates to rates.h.
// Threads:  a reader belongs to one thread.
#pragma once

#include <simdjson.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/metrics/labels.h"

namespace nexus {

// Cumulative counts by upper bound in seconds; +Inf is one of them. Series with the same bounds add up.
struct ScrapedHistogram {
  std::map<double, double> buckets;

  void add(const ScrapedHistogram& other) {
    for (const auto& [bound, count] : other.buckets) buckets[bound] += count;
  }
  double count() const { return buckets.empty() ? 0 : buckets.rbegin()->second; }
};

// One backend or one model.
struct ScrapedEntry {
  std::string name;
  std::uint64_t requests = 0, errors = 0, prompt_tokens = 0, completion_tokens = 0;
  std::int64_t pending = 0;  // backends only, as the next two
  std::int64_t queue_depth = 0;
  bool healthy = true;
  ScrapedHistogram duration, first_token;
};

struct Scrape {
  Ns at_ns = 0;
  std::uint64_t uptime_s = 0;
  std::uint64_t total = 0, success = 0, errors = 0;
  std::uint64_t backends = 0, backends_healthy = 0, models_available = 0;
  std::int64_t client_connections = 0;
  std::vector<ScrapedEntry> by_backend, by_model;  // in the order of /v1/stats
  ScrapedHistogram duration, first_token;          // of all
};

namespace detail {

// One line of the exposition, its labels' escapes undone.
struct SampleLine {
  std::string_view name;
  std::vector<std::pair<std::string_view, std::string>> labels;
  double value = 0;

  std::string_view label(std::string_view key) const {
    for (const auto& [name_of_label, text] : labels) {
      if (name_of_label == key) return text;
    }
    return {};
  }
};

// The quoted text at the front of `rest`, which loses it and its quotes. False where there is none.
inline bool take_quoted(std::string_view& rest, std::string& out) {
  if (rest.empty() || rest[0] != '"') return false;
  for (std::size_t i = 1; i < rest.size(); ++i) {
    if (rest[i] == '"') {
      rest.remove_prefix(i + 1);
      return true;
    }
    if (rest[i] == '\\' && i + 1 < rest.size()) {
      i += 1;
      out += rest[i] == 'n' ? '\n' : rest[i];
    } else {
      out += rest[i];
    }
  }
  return false;
}

inline bool take_value(std::string_view text, double& value) {
  if (text == "+Inf") {
    value = std::numeric_limits<double>::infinity();
    return true;
  }
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  return result.ec == std::errc() && result.ptr == text.data() + text.size() && std::isfinite(value);
}

// A gauge as a whole number; 0 where it is none that Nexus could have counted.
inline std::int64_t whole(double value) {
  constexpr double kMost = 1e15;
  return value > -kMost && value < kMost ? static_cast<std::int64_t>(value) : 0;
}

// False where the line is a comment, or none that Nexus would write.
inline bool read_sample_line(std::string_view line, SampleLine& out) {
  if (line.empty() || line[0] == '#') return false;
  const std::size_t name_end = line.find_first_of("{ ");
  if (name_end == std::string_view::npos) return false;
  out.name = line.substr(0, name_end);
  out.labels.clear();
  std::string_view rest = line.substr(name_end);
  if (rest[0] == '{') {
    rest.remove_prefix(1);
    while (!rest.empty() && rest[0] != '}') {
      const std::size_t equals = rest.find('=');
      if (equals == std::string_view::npos) return false;
      const std::string_view key = rest.substr(0, equals);
      rest.remove_prefix(equals + 1);
      out.labels.emplace_back(key, std::string());
      if (!take_quoted(rest, out.labels.back().second)) return false;
      if (!rest.empty() && rest[0] == ',') rest.remove_prefix(1);
    }
    if (rest.empty()) return false;
    rest.remove_prefix(1);
  }
  if (rest.empty() || rest[0] != ' ') return false;
  return take_value(rest.substr(1), out.value);
}

}  // namespace detail

class ScrapeReader {
 public:
  // False where `stats` is not the page of /v1/stats. `metrics` may be empty: then what it alone tells is 0.
  bool read(std::string_view stats, std::string_view metrics, Ns at_ns, Scrape& sample) {
    sample = Scrape{};
    sample.at_ns = at_ns;
    if (!read_stats(stats, sample)) return false;
    read_metrics(metrics, sample);
    return true;
  }

 private:
  using Object = simdjson::dom::object;
  // A label value to the entry that bears it. Where two names became one label, both show what is counted there.
  using ByLabel = std::unordered_multimap<std::string, ScrapedEntry*>;

  bool read_stats(std::string_view text, Scrape& sample) {
    Object page, requests;
    simdjson::dom::array backends, models;
    if (parser_.parse(text.data(), text.size()).get_object().get(page)) return false;
    if (page["requests"].get_object().get(requests)) return false;
    if (page["backends"].get_array().get(backends) || page["models"].get_array().get(models)) return false;
    sample.uptime_s = number(page, "uptime_seconds");
    sample.total = number(requests, "total");
    sample.success = number(requests, "success");
    sample.errors = number(requests, "errors");
    return read_entries(backends, "id", sample.by_backend) && read_entries(models, "name", sample.by_model);
  }

  static bool read_entries(simdjson::dom::array list, std::string_view key, std::vector<ScrapedEntry>& out) {
    for (const simdjson::dom::element element : list) {
      Object object;
      std::string_view name;
      if (element.get_object().get(object) || object[key].get_string().get(name)) return false;
      ScrapedEntry entry;
      entry.name = name;
      entry.requests = number(object, "requests");
      entry.errors = number(object, "errors");
      entry.prompt_tokens = number(object, "prompt_tokens");
      entry.completion_tokens = number(object, "completion_tokens");
      if (object["pending"].get_int64().get(entry.pending)) entry.pending = 0;
      if (object["healthy"].get_bool().get(entry.healthy)) entry.healthy = true;
      out.push_back(std::move(entry));
    }
    return true;
  }

  static std::uint64_t number(const Object& object, std::string_view key) {
    std::uint64_t value = 0;
    if (object[key].get_uint64().get(value)) return 0;
    return value;
  }

  static ByLabel index(std::vector<ScrapedEntry>& entries) {
    ByLabel by_label;
    for (ScrapedEntry& entry : entries) {
      const std::string sanitised = sanitize_label(entry.name);
      by_label.emplace(sanitised, &entry);
      if (sanitised != entry.name) by_label.emplace(entry.name, &entry);
    }
    return by_label;
  }

  static void read_metrics(std::string_view text, Scrape& sample) {
    const ByLabel backends = index(sample.by_backend);
    const ByLabel models = index(sample.by_model);
    detail::SampleLine line;
    while (!text.empty()) {
      const std::size_t end = std::min(text.find('\n'), text.size());
      if (detail::read_sample_line(text.substr(0, end), line)) take(line, backends, models, sample);
      text.remove_prefix(std::min(end + 1, text.size()));
    }
  }

  static void take(const detail::SampleLine& line, const ByLabel& backends, const ByLabel& models, Scrape& sample) {
    if (line.name == "nexus_request_duration_seconds_bucket") {
      take_bucket(line, backends, models, &ScrapedEntry::duration, sample.duration);
    } else if (line.name == "nexus_time_to_first_token_seconds_bucket") {
      take_bucket(line, backends, models, &ScrapedEntry::first_token, sample.first_token);
    } else if (line.name == "nexus_queue_depth") {
      const auto [first, last] = backends.equal_range(std::string(line.label("backend")));
      for (auto at = first; at != last; ++at) at->second->queue_depth += detail::whole(line.value);
    } else if (line.name == "nexus_backends_total") {
      sample.backends = static_cast<std::uint64_t>(std::max<std::int64_t>(detail::whole(line.value), 0));
    } else if (line.name == "nexus_backends_healthy") {
      sample.backends_healthy = static_cast<std::uint64_t>(std::max<std::int64_t>(detail::whole(line.value), 0));
    } else if (line.name == "nexus_models_available") {
      sample.models_available = static_cast<std::uint64_t>(std::max<std::int64_t>(detail::whole(line.value), 0));
    } else if (line.name == "nexus_client_connections") {
      sample.client_connections = detail::whole(line.value);
    }
  }

  static void take_bucket(const detail::SampleLine& line, const ByLabel& backends, const ByLabel& models,
                          ScrapedHistogram ScrapedEntry::*member, ScrapedHistogram& all) {
    double bound = 0;
    if (!detail::take_value(line.label("le"), bound)) return;
    all.buckets[bound] += line.value;
    for (const auto& [map, key] : {std::pair{&backends, "backend"}, std::pair{&models, "model"}}) {
      const auto [first, last] = map->equal_range(std::string(line.label(key)));
      for (auto at = first; at != last; ++at) (at->second->*member).buckets[bound] += line.value;
    }
  }

  simdjson::dom::parser parser_;
};

}  // namespace nexus
