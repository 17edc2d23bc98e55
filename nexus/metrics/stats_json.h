// stats_json.h
// Owns:     the JSON at /v1/stats: which backends and models it lists, their order, sums and averages.
// Promises: `total` = `success` + `errors` in every page; names as they are, escaped for JSON; averages with one
//           decimal place, computed in integers and rounded half up.
// Leaves:   sockets and the 503 when there is no page to others.
// Threads:  one (control), which also owns the name tables; the slabs may be written meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/text.h"
#include "nexus/base/text_buffer.h"
#include "nexus/metrics/histogram.h"
#include "nexus/metrics/ids.h"
#include "nexus/metrics/prometheus.h"
#include "nexus/metrics/slab.h"

namespace nexus {

namespace detail {

struct StatsSums {
  bool listed = false;
  std::uint64_t requests = 0;
  std::uint64_t errors = 0;
  std::uint64_t prompt_tokens = 0;
  std::uint64_t completion_tokens = 0;
  std::uint64_t durations = 0;
  std::uint64_t duration_sum_ns = 0;

  void add(const StatsSums& other) {
    requests += other.requests;
    errors += other.errors;
    prompt_tokens += other.prompt_tokens;
    completion_tokens += other.completion_tokens;
    durations += other.durations;
    duration_sum_ns += other.duration_sum_ns;
  }
};

inline StatsSums sums_of(const PairCounters& cells) {
  StatsSums sums;
  cells.statuses.for_each([&sums](const StatusCounters::Count& count) {
    sums.requests += count.count;
    if (count.failed) sums.errors += count.count;
  });
  HistogramValues<kDurationBounds> duration;
  cells.duration.add_to(duration, cells.duration_sum);
  sums.durations = duration.count();
  sums.duration_sum_ns = duration.sum;
  sums.prompt_tokens = cells.prompt_sum.read();
  sums.completion_tokens = cells.completion_sum.read();
  return sums;
}

// `sum / count` in milliseconds, in tenths.
constexpr std::uint64_t average_tenths_of_ms(std::uint64_t sum_ns, std::uint64_t count) {
  if (count == 0) return 0;
  const std::uint64_t divisor = count * static_cast<std::uint64_t>(kMillisecond / 10);
  const std::uint64_t rest = sum_ns % divisor;
  return sum_ns / divisor + (rest >= divisor - rest ? 1 : 0);
}

inline void add_average(TextBuffer& page, const StatsSums& sums) {
  const std::uint64_t tenths = average_tenths_of_ms(sums.duration_sum_ns, sums.durations);
  page.add_unsigned(tenths / 10).add(".").add_unsigned(tenths % 10);
}

}  // namespace detail

class StatsPage {
 public:
  // The page; it stays as it is until the next call.
  std::string_view render(const Metrics& metrics, const FleetView& fleet, const ModelNames& models,
                          const BackendNames& backends) {
    collect(metrics, fleet, models, backends);
    page_.clear();
    page_.add("{\"uptime_seconds\":").add_signed(fleet.uptime_ns / kSecond);
    page_.add(",\"requests\":{\"total\":").add_unsigned(all_.requests);
    page_.add(",\"success\":").add_unsigned(all_.requests - all_.errors);
    page_.add(",\"errors\":").add_unsigned(all_.errors);
    page_.add("},\"backends\":[");
    write_backends(metrics, fleet, backends);
    page_.add("],\"models\":[");
    write_models(models);
    page_.add("]}\n");
    return page_.text();
  }

  // Between two calls its memory may be handed over, and other memory given.
  TextBuffer& page() { return page_; }

 private:
  using Sums = detail::StatsSums;

  void collect(const Metrics& metrics, const FleetView& fleet, const ModelNames& models, const BackendNames& backends) {
    all_ = Sums{};
    models_.assign(models.size(), Sums{});
    backends_.assign(backends.size(), Sums{});
    for (const auto& backend : fleet.backends) backends_[index_of(backend.id)].listed = true;
    for (ModelId id : fleet.models_on_healthy) models_[index_of(id)].listed = true;
    // A model may be configured under the name of the catch-all: both are then one entry.
    const std::uint32_t unknown = index_of(models.find(models.name(ModelId::unknown)));
    for (const auto& slab : metrics.slabs()) {
      slab->pairs().for_each([&](std::uint32_t model, std::uint32_t backend, const PairCounters& cells) {
        const Sums sums = detail::sums_of(cells);
        if (model == index_of(ModelId::unknown)) model = unknown;
        all_.add(sums);
        models_[model].add(sums);
        models_[model].listed = true;
        backends_[backend].add(sums);
        backends_[backend].listed |= backend != index_of(BackendId::none);
      });
    }
  }

  void write_backends(const Metrics& metrics, const FleetView& fleet, const BackendNames& names) {
    std::vector<std::uint32_t> order = listed(backends_);
    std::sort(order.begin(), order.end(),
              [&](std::uint32_t a, std::uint32_t b) { return names.name(BackendId{a}) < names.name(BackendId{b}); });
    std::vector<bool> healthy(backends_.size());
    for (const auto& backend : fleet.backends) healthy[index_of(backend.id)] = backend.healthy;
    for (std::size_t i = 0; i < order.size(); ++i) {
      const Sums& sums = backends_[order[i]];
      page_.add(i == 0 ? "{\"id\":" : ",{\"id\":");
      page_.add(json_string(names.name(BackendId{order[i]})));
      page_.add(",\"requests\":").add_unsigned(sums.requests);
      page_.add(",\"average_latency_ms\":");
      detail::add_average(page_, sums);
      page_.add(",\"pending\":").add_signed(metrics.pending(BackendId{order[i]}));
      page_.add(",\"healthy\":").add(healthy[order[i]] ? "true" : "false");
      write_common(sums);
    }
  }

  void write_models(const ModelNames& names) {
    std::vector<std::uint32_t> order = listed(models_);
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
      if (models_[a].requests != models_[b].requests) return models_[a].requests > models_[b].requests;
      return names.name(ModelId{a}) < names.name(ModelId{b});
    });
    for (std::size_t i = 0; i < order.size(); ++i) {
      const Sums& sums = models_[order[i]];
      page_.add(i == 0 ? "{\"name\":" : ",{\"name\":");
      page_.add(json_string(names.name(ModelId{order[i]})));
      page_.add(",\"requests\":").add_unsigned(sums.requests);
      page_.add(",\"average_duration_ms\":");
      detail::add_average(page_, sums);
      write_common(sums);
    }
  }

  // What goes beyond the contract's fields, and the end of the object.
  void write_common(const Sums& sums) {
    page_.add(",\"errors\":").add_unsigned(sums.errors);
    page_.add(",\"prompt_tokens\":").add_unsigned(sums.prompt_tokens);
    page_.add(",\"completion_tokens\":").add_unsigned(sums.completion_tokens).add("}");
  }

  static std::vector<std::uint32_t> listed(const std::vector<Sums>& all) {
    std::vector<std::uint32_t> ids;
    for (std::uint32_t i = 0; i < all.size(); ++i) {
      if (all[i].listed) ids.push_back(i);
    }
    return ids;
  }

  TextBuffer page_;
  Sums all_;
  std::vector<Sums> models_;    // by id
  std::vector<Sums> backends_;  // by id
};

// One page, for callers that keep none of its memory.
inline std::string render_stats(const Metrics& metrics, const FleetView& fleet, const ModelNames& models,
                                const BackendNames& backends) {
  StatsPage page;
  return std::string(page.render(metrics, fleet, models, backends));
}

}  // namespace nexus
