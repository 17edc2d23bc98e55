// prometheus.h
// Owns:     what the two pages say about the fleet at one moment, as plain values.
// Promises: nothing; it is filled by the control thread from the registry's snapshot for each page.
// Leaves:   counts of requests to slab.h.
// Threads:  any; a value.
// Owns:     the page at /metrics: its families, in order, and the adding up of the threads' slabs.
// Promises: every family once, its lines together; no series twice, whatever the names are; a counter never goes back
//           from one page to the next; recorders are neither blocked nor slowed, nor kept from their processor. Memory
//           is kept for the next page.
// Leaves:   the format to exposition.h, label values to labels.h, sockets and the 503 when there is no page to others.
// Threads:  one (control), which also owns the name tables; the slabs may be written meanwhile.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/text_buffer.h"
#include "nexus/config/settings.h"
#include "nexus/metrics/exposition.h"
#include "nexus/metrics/histogram.h"
#include "nexus/metrics/ids.h"
#include "nexus/metrics/labels.h"
#include "nexus/metrics/slab.h"
#include "nexus/os/procfs.h"

namespace nexus {
struct FleetView {
  struct Backend {
    BackendId id;
    bool healthy;
  };
  std::vector<Backend> backends;           // registered now, in the order of the configuration
  std::vector<ModelId> models_on_healthy;  // distinct
  std::uint64_t models_available = 0;
  Ns uptime_ns = 0;
  bool last_reload_ok = true;
  double last_reload_success_timestamp = 0;  // seconds since 1970; 0 = not known
  std::string_view version;
};

class PrometheusPage {
 public:
  // The page; it stays as it is until the next call. The name tables must be the same in every call.
  std::string_view render(const Metrics& metrics, const FleetView& fleet, const ProcessStats& process,
                          const ModelNames& models, const BackendNames& backends, LabelMode mode) {
    models_.update(models, mode);
    backends_.update(backends, mode);
    collect_pairs(metrics);
    collect_fallbacks(metrics);
    collect_errors(metrics);
    collect_backends(metrics, fleet);
    collect_threads(metrics);

    out_.clear();
    write_requests();
    write_fleet(fleet);
    write_backends();
    write_threads();
    write_daemon(fleet, mode);
    write_process(process);
    return out_.text();
  }

  // Between two calls its memory may be handed over, and other memory given.
  TextBuffer& page() { return out_.page(); }

 private:
  static constexpr std::size_t kPairsAtOnce = 64;  // some 20 µs

  // The cells of one thread under the labels that they are shown with: several threads, and several names that became
  // one label, may share a key. Sorted by key, the sources of a series stand side by side.
  template <class Cells>
  struct Source {
    std::uint64_t key;  // label groups, first << 32 | second
    const Cells* cells;
    bool operator<(const Source& other) const { return key < other.key; }
  };

  struct BackendSums {  // of one label value
    bool registered = false;
    bool up = false;  // of several backends that share the label: any of them
    std::int64_t pending = 0, connections = 0, queue_depth = 0;
    std::uint64_t without_usage = 0;
    std::array<std::uint64_t, kAttemptOutcomeNames.size()> attempts{};
    HistogramValues<kDurationBounds> latency;
  };

  using ErrorSums = std::array<std::uint64_t, kErrorTypeNames.size()>;  // of one model label

  struct ThreadSums {
    HistogramValues<kOverheadBounds> overhead;
    HistogramValues<kLoopStallBounds> loop_stall;
    HistogramValues<kDurationBounds> queue_wait;
    std::int64_t client_connections = 0;
    std::uint64_t log_lines_dropped = 0;
    std::array<std::uint64_t, kDisconnectPhaseNames.size()> disconnects{};
    std::array<std::uint64_t, kHttpRejectionNames.size()> http_rejections{};
    std::array<std::uint64_t, kQueueRejectionNames.size()> queue_rejections{};
    std::array<std::uint64_t, kLimitNames.size()> limits{};
  };

  // All families of one pair of labels have the same sources, and the same labels but for one more at their end.
  struct Pair {
    std::span<const Source<PairCounters>> sources;
    std::size_t labels_offset, labels_length;  // in pair_labels_
  };

  // ---- adding up

  void collect_pairs(const Metrics& metrics) {
    pair_sources_.clear();
    for (const auto& slab : metrics.slabs()) {
      slab->pairs().for_each([this](std::uint32_t model, std::uint32_t backend, const PairCounters& cells) {
        pair_sources_.push_back(
            {std::uint64_t{models_.group_of(ModelId{model})} << 32 | backends_.group_of(BackendId{backend}), &cells});
      });
    }
    std::sort(pair_sources_.begin(), pair_sources_.end());
    pairs_.clear();
    pair_labels_.clear();
    for_each_series(pair_sources_, [this](std::uint32_t model, std::uint32_t backend, auto sources) {
      const std::size_t offset = pair_labels_.size();
      Exposition::write_labels(pair_labels_, {{"model", models_.text(model)}, {"backend", backends_.text(backend)}});
      pairs_.push_back({sources, offset, pair_labels_.size() - offset});
    });
  }

  void collect_fallbacks(const Metrics& metrics) {
    fallbacks_.clear();
    for (const auto& slab : metrics.slabs()) {
      slab->fallbacks().for_each([this](std::uint32_t from, std::uint32_t to, const Counter& cell) {
        fallbacks_.push_back(
            {std::uint64_t{models_.group_of(ModelId{from})} << 32 | models_.group_of(ModelId{to}), &cell});
      });
    }
    std::sort(fallbacks_.begin(), fallbacks_.end());
  }

  void collect_errors(const Metrics& metrics) {
    errors_.assign(models_.groups(), ErrorSums{});
    for (std::uint32_t i = 0; i < models_.ids(); ++i) {
      const ModelId id{i};
      for (const auto& slab : metrics.slabs()) {
        if (const ModelCounters* cells = slab->model(id)) add_cells(errors_[models_.group_of(id)], cells->errors);
      }
    }
  }

  void collect_backends(const Metrics& metrics, const FleetView& fleet) {
    backend_sums_.assign(backends_.groups(), BackendSums{});
    for (const auto& backend : fleet.backends) {
      BackendSums& sums = backend_sums_[backends_.group_of(backend.id)];
      sums.registered = true;
      sums.up |= backend.healthy;
    }
    for (std::uint32_t i = 0; i < backends_.ids(); ++i) {
      const BackendId id{i};
      BackendSums& sums = backend_sums_[backends_.group_of(id)];
      for (const auto& slab : metrics.slabs()) {
        const BackendCounters* cells = slab->backend(id);
        if (cells == nullptr) continue;
        sums.pending += cells->pending.read_signed();
        sums.connections += cells->connections.read_signed();
        sums.queue_depth += cells->queue_depth.read_signed();
        sums.without_usage += cells->without_usage.read();
        add_cells(sums.attempts, cells->attempts);
        cells->health_latency.add_to(sums.latency);
      }
    }
  }

  void collect_threads(const Metrics& metrics) {
    threads_ = ThreadSums{};
    for (const auto& slab : metrics.slabs()) {
      const ThreadCounters& cells = slab->thread();
      cells.overhead.add_to(threads_.overhead);
      cells.loop_stall.add_to(threads_.loop_stall);
      cells.queue_wait.add_to(threads_.queue_wait);
      threads_.client_connections += cells.client_connections.read_signed();
      threads_.log_lines_dropped += cells.log_lines_dropped.read();
      add_cells(threads_.disconnects, cells.disconnects);
      add_cells(threads_.http_rejections, cells.http_rejections);
      add_cells(threads_.queue_rejections, cells.queue_rejections);
      add_cells(threads_.limits, cells.limits);
    }
  }

  template <std::size_t N>
  static void add_cells(std::array<std::uint64_t, N>& sums, const std::array<Counter, N>& cells) {
    for (std::size_t i = 0; i < N; ++i) sums[i] += cells[i].read();
  }

  // visit(first group, second group, the sources of that series)
  template <class Cells, class Visit>
  static void for_each_series(const std::vector<Source<Cells>>& sources, Visit&& visit) {
    for (std::size_t begin = 0, end = 0; begin < sources.size(); begin = end) {
      while (end < sources.size() && sources[end].key == sources[begin].key) ++end;
      visit(static_cast<std::uint32_t>(sources[begin].key >> 32), static_cast<std::uint32_t>(sources[begin].key),
            std::span(sources).subspan(begin, end - begin));
    }
  }

  // ---- families

  void write_requests() {
    out_.family("nexus_requests_total", FamilyType::counter, "Requests ended, by the status sent to the client.");
    for_each_pair([this](const Pair& pair) { write_statuses(pair); });

    out_.family("nexus_errors_total", FamilyType::counter, "Requests that ended as an error, one type each.");
    for (std::uint32_t model = 0; model < errors_.size(); ++model) {
      for (std::size_t type = 1; type < kErrorTypeNames.size(); ++type) {
        if (errors_[model][type] == 0) continue;
        out_.labels({{"error_type", kErrorTypeNames[type]}, {"model", models_.text(model)}});
        out_.sample(errors_[model][type]);
      }
    }

    out_.family("nexus_fallbacks_total", FamilyType::counter, "Requests sent to a backend under a fallback model.");
    for_each_series(fallbacks_, [this](std::uint32_t from, std::uint32_t to, auto sources) {
      std::uint64_t sum = 0;
      for (const auto& source : sources) sum += source.cells->read();
      if (sum == 0) return;
      out_.labels({{"from_model", models_.text(from)}, {"to_model", models_.text(to)}});
      out_.sample(sum);
    });

    out_.family("nexus_request_duration_seconds", FamilyType::histogram,
                "From the request's head being complete to the last response byte.");
    write_pair_histograms(&PairCounters::duration, &PairCounters::duration_sum);
    out_.family("nexus_time_to_first_token_seconds", FamilyType::histogram,
                "Streams: from the request being complete to the backend's first body byte.");
    write_pair_histograms(&PairCounters::first_token, &PairCounters::first_token_sum);
    out_.family("nexus_time_per_output_token_seconds", FamilyType::histogram,
                "Streams that told their usage: the mean time between two output tokens.");
    write_pair_histograms(&PairCounters::per_token, &PairCounters::per_token_sum);
    out_.family("nexus_tokens_total", FamilyType::histogram, "Tokens of each response, as its usage told.");
    for_each_pair([this](const Pair& pair) {
      write_pair_histogram(pair, &PairCounters::prompt_tokens, &PairCounters::prompt_sum, {"type", "prompt"});
      write_pair_histogram(pair, &PairCounters::completion_tokens, &PairCounters::completion_sum,
                           {"type", "completion"});
    });
  }

  // A worker that shares this processor gets it again and again: it would wait milliseconds for a large page.
  template <class Write>
  void for_each_pair(Write&& write) {
    std::size_t written = 0;
    for (const Pair& pair : pairs_) {
      write(pair);
      if (++written % kPairsAtOnce == 0) std::this_thread::yield();
    }
  }

  void write_statuses(const Pair& pair) {
    statuses_.clear();
    for (const auto& source : pair.sources) {
      source.cells->statuses.for_each([this](const StatusCounters::Count& count) {
        const auto at = std::lower_bound(statuses_.begin(), statuses_.end(), count.status,
                                         [](const auto& held, std::uint32_t status) { return held.first < status; });
        if (at != statuses_.end() && at->first == count.status) {
          at->second += count.count;
        } else {
          statuses_.insert(at, {count.status, count.count});
        }
      });
    }
    for (const auto& [status, count] : statuses_) {
      std::array<char, kNumberBytes> digits;
      const std::string_view text(digits.data(), write_unsigned(digits.data(), status));
      out_.labels(pair_labels_, pair.labels_offset, pair.labels_length, {"status", text});
      out_.sample(count);
    }
  }

  template <const auto& kBounds>
  void write_pair_histograms(Buckets<kBounds> PairCounters::*buckets, Counter PairCounters::*sum) {
    for_each_pair([&](const Pair& pair) { write_pair_histogram(pair, buckets, sum, {}); });
  }

  // A series appears with its first observation, and stays.
  template <const auto& kBounds>
  void write_pair_histogram(const Pair& pair, Buckets<kBounds> PairCounters::*buckets, Counter PairCounters::*sum,
                            Exposition::Label last) {
    HistogramValues<kBounds> values;
    for (const auto& source : pair.sources) (source.cells->*buckets).add_to(values, source.cells->*sum);
    if (values.count() == 0) return;
    out_.labels(pair_labels_, pair.labels_offset, pair.labels_length, last);
    out_.histogram(values);
  }

  void write_fleet(const FleetView& fleet) {
    const auto healthy = std::count_if(fleet.backends.begin(), fleet.backends.end(),
                                       [](const FleetView::Backend& backend) { return backend.healthy; });
    single("nexus_backends_total", FamilyType::gauge, "Registered backends.", fleet.backends.size());
    single("nexus_backends_healthy", FamilyType::gauge, "Registered backends that are healthy now.",
           static_cast<std::uint64_t>(healthy));
    single("nexus_models_available", FamilyType::gauge, "Distinct models over the healthy backends.",
           fleet.models_available);
  }

  // A backend that is registered is shown from the start; one that no longer is, as long as it has something to say.
  void write_backends() {
    backend_gauge("nexus_pending_requests", "Requests in flight or queued now.", &BackendSums::pending);
    backend_gauge("nexus_queue_depth", "Requests that wait in the queue now.", &BackendSums::queue_depth);
    backend_gauge("nexus_backend_connections", "Open connections to the backend.", &BackendSums::connections);

    out_.family("nexus_backend_up", FamilyType::gauge, "1 if the backend is healthy now.");
    for_each_backend([](const BackendSums& sums) { return sums.registered; },
                     [this](const BackendSums& sums) { out_.sample(sums.up ? 1 : 0); });

    out_.family("nexus_backend_latency_seconds", FamilyType::histogram, "Round trip of each successful health check.");
    for_each_backend([](const BackendSums& sums) { return sums.registered || sums.latency.count() != 0; },
                     [this](const BackendSums& sums) { out_.histogram(sums.latency); });

    out_.family("nexus_responses_without_usage_total", FamilyType::counter,
                "Successful answers that told no token counts.");
    for_each_backend([](const BackendSums& sums) { return sums.registered || sums.without_usage != 0; },
                     [this](const BackendSums& sums) { out_.sample(sums.without_usage); });

    out_.family("nexus_backend_attempts_total", FamilyType::counter,
                "Tries of a request at a backend, by their outcome.");
    for (std::uint32_t group = 0; group < backend_sums_.size(); ++group) {
      const BackendSums& sums = backend_sums_[group];
      for (std::size_t i = 0; i < sums.attempts.size(); ++i) {
        if (!sums.registered && sums.attempts[i] == 0) continue;
        out_.labels({{"backend", backends_.text(group)}, {"outcome", kAttemptOutcomeNames[i]}});
        out_.sample(sums.attempts[i]);
      }
    }
  }

  void backend_gauge(std::string_view name, std::string_view help, std::int64_t BackendSums::*member) {
    out_.family(name, FamilyType::gauge, help);
    for_each_backend([member](const BackendSums& sums) { return sums.registered || sums.*member != 0; },
                     [this, member](const BackendSums& sums) { out_.sample_signed(sums.*member); });
  }

  template <class Shown, class Write>
  void for_each_backend(Shown&& shown, Write&& write) {
    for (std::uint32_t group = 0; group < backend_sums_.size(); ++group) {
      if (!shown(backend_sums_[group])) continue;
      out_.labels({{"backend", backends_.text(group)}});
      write(backend_sums_[group]);
    }
  }

  void write_threads() {
    out_.family("nexus_overhead_seconds", FamilyType::histogram, "The time that Nexus itself kept a request.");
    out_.histogram(threads_.overhead);
    out_.family("nexus_queue_wait_seconds", FamilyType::histogram, "How long requests waited in the queue.");
    out_.histogram(threads_.queue_wait);
    out_.family("nexus_loop_stall_seconds", FamilyType::histogram, "One turn of an event loop, between two waits.");
    out_.histogram(threads_.loop_stall);

    by_name<1>("nexus_client_disconnects_total", "Clients that left before the end of their response.", "phase",
               kDisconnectPhaseNames, threads_.disconnects);
    by_name<0>("nexus_queue_rejected_total", "Requests that the queue turned away.", "reason", kQueueRejectionNames,
               threads_.queue_rejections);
    by_name<0>("nexus_limit_rejections_total", "What a limit of the configuration turned away or cut.", "limit",
               kLimitNames, threads_.limits);
    by_name<0>("nexus_http_rejections_total", "Connections that ended before a request's head could be read.", "reason",
               kHttpRejectionNames, threads_.http_rejections);

    out_.family("nexus_client_connections", FamilyType::gauge, "Open connections of clients.");
    out_.sample_signed(threads_.client_connections);
    single("nexus_log_lines_dropped_total", FamilyType::counter, "Log lines that were not written.",
           threads_.log_lines_dropped);
  }

  // A counter with one label; kFirst skips the `none` of an enum.
  template <std::size_t kFirst, std::size_t N>
  void by_name(std::string_view family, std::string_view help, std::string_view label,
               const std::array<std::string_view, N>& names, const std::array<std::uint64_t, N>& counts) {
    out_.family(family, FamilyType::counter, help);
    for (std::size_t i = kFirst; i < N; ++i) {
      out_.labels({{label, names[i]}});
      out_.sample(counts[i]);
    }
  }

  void write_daemon(const FleetView& fleet, LabelMode mode) {
    out_.family("nexus_build_info", FamilyType::gauge, "Always 1; the version of Nexus.");
    out_.labels({{"version", label_of(fleet.version, mode)}});
    out_.sample(1);
    single("nexus_config_last_reload_successful", FamilyType::gauge,
           "1 if the last load of the configuration succeeded.", fleet.last_reload_ok ? 1 : 0);
    out_.family("nexus_config_last_reload_success_timestamp_seconds", FamilyType::gauge,
                "When a configuration was last loaded with success.");
    out_.sample_double(fleet.last_reload_success_timestamp);
  }

  void write_process(const ProcessStats& process) {
    known_seconds("process_cpu_seconds_total", FamilyType::counter, "User and system CPU time spent.", process.cpu_ns);
    known("process_resident_memory_bytes", "Resident memory size.", process.resident_bytes);
    known("process_virtual_memory_bytes", "Virtual memory size.", process.virtual_bytes);
    known("process_open_fds", "Open file descriptors.", process.open_fds);
    known("process_max_fds", "The most file descriptors that may be open.", process.max_fds);
    known_seconds("process_start_time_seconds", FamilyType::gauge, "When the process started, since 1970.",
                  process.start_time_ns);
    known("process_threads", "Threads of the process.", process.threads);
  }

  void single(std::string_view name, FamilyType type, std::string_view help, std::uint64_t value) {
    out_.family(name, type, help);
    out_.sample(value);
  }

  void known(std::string_view name, std::string_view help, std::int64_t value) {
    if (value != ProcessStats::kUnknown) single(name, FamilyType::gauge, help, static_cast<std::uint64_t>(value));
  }

  void known_seconds(std::string_view name, FamilyType type, std::string_view help, Ns value) {
    if (value == ProcessStats::kUnknown) return;
    out_.family(name, type, help);
    out_.sample_seconds(static_cast<std::uint64_t>(value));
  }

  Exposition out_;
  LabelTable<ModelId> models_;
  LabelTable<BackendId> backends_;
  std::vector<Source<PairCounters>> pair_sources_;
  std::vector<Pair> pairs_;
  TextBuffer pair_labels_;
  std::vector<Source<Counter>> fallbacks_;
  std::vector<ErrorSums> errors_;                                  // by model label
  std::vector<BackendSums> backend_sums_;                          // by backend label
  std::vector<std::pair<std::uint32_t, std::uint64_t>> statuses_;  // of the series being written, ascending
  ThreadSums threads_;
};

// One page, for callers that keep none of its memory.
inline std::string render_prometheus(const Metrics& metrics, const FleetView& fleet, const ProcessStats& process,
                                     const ModelNames& models, const BackendNames& backends, LabelMode mode) {
  PrometheusPage page;
  return std::string(page.render(metrics, fleet, process, models, backends, mode));
}

}  // namespace nexus
