// prometheus.h
// Owns:     the page at /metrics: its families, in order, and the adding up of the threads' slabs; FleetView.
// Promises: every family once, its lines together; no series twice, whatever the names are; a counter never goes back
//           from one page to the next; recorders are not blocked, not slowed, and not kept from their processor.
//           Memory is kept for the next page.
// Leaves:   the format to exposition.h, label values to labels.h; sockets, and the 503 if there is no page, to
//           builtin_pages.h.
// Threads:  one (control), which also owns the name tables; the slabs may be written meanwhile.
// Tested by: tests/prometheus_test.cpp, tests/e2e/metrics.test.mjs
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

// The fleet at one moment, filled from the registry for each page.
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
  double last_reload_success_timestamp = 0;  // seconds since 1970; 0: unknown
  std::string_view version;
};

class PrometheusPage {
 public:
  // The page; it stays as it is until the next call. The name tables must be the same in every call.
  std::string_view render(const Metrics& metrics, const FleetView& fleet, const ProcessStats& process,
                          const ModelNames& models, const BackendNames& backends, LabelMode mode) {
    slabs_ = metrics.slabs();
    models_.update(models, mode);
    backends_.update(backends, mode);
    collect_pairs();
    collect(fallbacks_, &Slab::fallbacks, models_, models_);
    collect_errors();
    collect_backends(fleet);

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
  static constexpr FamilyType kCounter = FamilyType::counter;
  static constexpr FamilyType kGauge = FamilyType::gauge;
  static constexpr FamilyType kHistogram = FamilyType::histogram;
  static constexpr std::size_t kPairsAtOnce = 64;  // about 20 µs

  // The counters of one thread, with the key of their series. Several threads, and several names with the same label
  // value, may share a key; sorting by key puts the sources of a series side by side.
  template <class Cells>
  struct Source {
    std::uint64_t key;  // label groups, first << 32 | second
    const Cells* cells;
    bool operator<(const Source& other) const { return key < other.key; }
  };

  struct BackendSums {  // of one label value
    bool registered = false;
    int up = 0;  // any of the backends that share the label
    std::int64_t pending = 0, connections = 0, queue_depth = 0;
    std::uint64_t without_usage = 0;
    std::array<std::uint64_t, kAttemptOutcomeNames.size()> attempts{};
    HistogramValues<kDurationBounds> latency;
  };

  using ErrorSums = std::array<std::uint64_t, kErrorTypeNames.size()>;  // of one model label

  // All families of one model and backend have the same sources and begin with the same labels.
  struct Pair {
    std::span<const Source<PairCounters>> sources;
    std::size_t labels_offset, labels_length;  // in pair_labels_
  };

  // ---- adding up

  // All counters of one kind, by the labels of their two ids.
  template <class Cells, class First, class Second>
  void collect(std::vector<Source<Cells>>& sources, const PairTable<Cells>& (Slab::*table)() const,
               const LabelTable<First>& first, const LabelTable<Second>& second) {
    sources.clear();
    for (const auto& slab : slabs_) {
      ((*slab).*table)().for_each([&](std::uint32_t a, std::uint32_t b, const Cells& cells) {
        sources.push_back({std::uint64_t{first.group_of(First{a})} << 32 | second.group_of(Second{b}), &cells});
      });
    }
    std::sort(sources.begin(), sources.end());
  }

  void collect_pairs() {
    collect(pair_sources_, &Slab::pairs, models_, backends_);
    pairs_.clear();
    pair_labels_.clear();
    for_each_series(pair_sources_, [this](std::uint32_t model, std::uint32_t backend, auto sources) {
      const std::size_t offset = pair_labels_.size();
      Exposition::write_labels(pair_labels_, {{"model", models_.text(model)}, {"backend", backends_.text(backend)}});
      pairs_.push_back({sources, offset, pair_labels_.size() - offset});
    });
  }

  void collect_errors() {
    errors_.assign(models_.groups(), ErrorSums{});
    for (std::uint32_t i = 0; i < models_.ids(); ++i) {
      const ModelId id{i};
      for (const auto& slab : slabs_) {
        if (const ModelCounters* cells = slab->model(id)) add_cells(errors_[models_.group_of(id)], cells->errors);
      }
    }
  }

  void collect_backends(const FleetView& fleet) {
    backend_sums_.assign(backends_.groups(), BackendSums{});
    for (const auto& backend : fleet.backends) {
      BackendSums& sums = backend_sums_[backends_.group_of(backend.id)];
      sums.registered = true;
      sums.up |= backend.healthy;
    }
    for (std::uint32_t i = 0; i < backends_.ids(); ++i) {
      const BackendId id{i};
      BackendSums& sums = backend_sums_[backends_.group_of(id)];
      for (const auto& slab : slabs_) {
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
    out_.family("nexus_requests_total", kCounter, "Finished requests, by the status sent to the client.");
    for_each_pair([this](const Pair& pair) { write_statuses(pair); });

    out_.family("nexus_errors_total", kCounter, "Failed requests, by error type.");
    for (std::uint32_t model = 0; model < errors_.size(); ++model) {
      for (std::size_t type = 1; type < kErrorTypeNames.size(); ++type) {
        if (errors_[model][type] == 0) continue;
        out_.labels({{"error_type", kErrorTypeNames[type]}, {"model", models_.text(model)}});
        out_.sample(errors_[model][type]);
      }
    }

    out_.family("nexus_fallbacks_total", kCounter, "Requests served by a fallback model.");
    for_each_series(fallbacks_, [this](std::uint32_t from, std::uint32_t to, auto sources) {
      std::uint64_t sum = 0;
      for (const auto& source : sources) sum += source.cells->read();
      if (sum == 0) return;
      out_.labels({{"from_model", models_.text(from)}, {"to_model", models_.text(to)}});
      out_.sample(sum);
    });

    out_.family("nexus_request_duration_seconds", kHistogram,
                "Time from the complete request head to the last response byte.");
    write_pair_histograms(&PairCounters::duration, &PairCounters::duration_sum);
    out_.family("nexus_time_to_first_token_seconds", kHistogram,
                "Streams: time from the complete request to the first body byte from the backend.");
    write_pair_histograms(&PairCounters::first_token, &PairCounters::first_token_sum);
    out_.family("nexus_time_per_output_token_seconds", kHistogram,
                "Streams with usage: mean time between two output tokens.");
    write_pair_histograms(&PairCounters::per_token, &PairCounters::per_token_sum);
    out_.family("nexus_tokens_total", kHistogram, "Tokens of each response, from its usage.");
    for_each_pair([this](const Pair& pair) {
      write_pair_histogram(pair, &PairCounters::prompt_tokens, &PairCounters::prompt_sum, {"type", "prompt"});
      write_pair_histogram(pair, &PairCounters::completion_tokens, &PairCounters::completion_sum,
                           {"type", "completion"});
    });
  }

  // Yields the processor now and then: a worker on it would wait milliseconds for a large page.
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
      const std::string_view text(digits.data(), write_number(digits.data(), status));
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
    single("nexus_backends_total", kGauge, "Registered backends.", fleet.backends.size());
    single("nexus_backends_healthy", kGauge, "Registered backends that are healthy.", healthy);
    single("nexus_models_available", kGauge, "Distinct models on healthy backends.", fleet.models_available);
  }

  // A registered backend is shown from the start; another one as long as its value is not 0.
  void write_backends() {
    backend_family("nexus_pending_requests", kGauge, "Requests in flight or queued.", &BackendSums::pending);
    backend_family("nexus_queue_depth", kGauge, "Requests waiting in the queue.", &BackendSums::queue_depth);
    backend_family("nexus_backend_connections", kGauge, "Open connections to the backend.", &BackendSums::connections);
    backend_family("nexus_backend_up", kGauge, "1 if the backend is healthy.", &BackendSums::up);

    out_.family("nexus_backend_latency_seconds", kHistogram, "Round-trip time of successful health checks.");
    for_each_backend([this](const BackendSums& sums, std::string_view name) {
      if (!sums.registered && sums.latency.count() == 0) return;
      out_.labels({{"backend", name}});
      out_.histogram(sums.latency);
    });

    backend_family("nexus_responses_without_usage_total", kCounter, "Successful responses without token counts.",
                   &BackendSums::without_usage);

    out_.family("nexus_backend_attempts_total", kCounter, "Attempts to serve a request from a backend, by outcome.");
    for_each_backend([this](const BackendSums& sums, std::string_view name) {
      for (std::size_t i = 0; i < sums.attempts.size(); ++i) {
        if (!sums.registered && sums.attempts[i] == 0) continue;
        out_.labels({{"backend", name}, {"outcome", kAttemptOutcomeNames[i]}});
        out_.sample(sums.attempts[i]);
      }
    });
  }

  template <class Value>
  void backend_family(std::string_view name, FamilyType type, std::string_view help, Value BackendSums::*member) {
    out_.family(name, type, help);
    for_each_backend([this, member](const BackendSums& sums, std::string_view backend) {
      if (!sums.registered && sums.*member == Value{}) return;
      out_.labels({{"backend", backend}});
      out_.sample(sums.*member);
    });
  }

  template <class Write>
  void for_each_backend(Write&& write) {
    for (std::uint32_t group = 0; group < backend_sums_.size(); ++group) {
      write(backend_sums_[group], backends_.text(group));
    }
  }

  void write_threads() {
    thread_family("nexus_overhead_seconds", "Time Nexus added to a request.", &ThreadCounters::overhead);
    thread_family("nexus_queue_wait_seconds", "Time requests waited in the queue.", &ThreadCounters::queue_wait);
    thread_family("nexus_loop_stall_seconds", "Duration of one iteration of an event loop, between two waits.",
                  &ThreadCounters::loop_stall);

    by_name("nexus_client_disconnects_total", "Clients that disconnected before the end of their response.", "phase",
            kDisconnectPhaseNames, &ThreadCounters::disconnects, 1);  // without `none`
    by_name("nexus_queue_rejected_total", "Requests rejected by the queue.", "reason", kQueueRejectionNames,
            &ThreadCounters::queue_rejections);
    by_name("nexus_limit_rejections_total", "Requests and connections rejected or cut by a limit.", "limit",
            kLimitNames, &ThreadCounters::limits);
    by_name("nexus_http_rejections_total", "Connections that ended before a request head was read.", "reason",
            kHttpRejectionNames, &ThreadCounters::http_rejections);

    thread_family("nexus_client_connections", kGauge, "Open client connections.", &ThreadCounters::client_connections);
    thread_family("nexus_log_lines_dropped_total", kCounter, "Log lines that were not written.",
                  &ThreadCounters::log_lines_dropped);
  }

  template <const auto& kBounds>
  void thread_family(std::string_view name, std::string_view help, Histogram<kBounds> ThreadCounters::*member) {
    HistogramValues<kBounds> values;
    for (const auto& slab : slabs_) (slab->thread().*member).add_to(values);
    out_.family(name, kHistogram, help);
    out_.histogram(values);
  }

  void thread_family(std::string_view name, FamilyType type, std::string_view help, Counter ThreadCounters::*member) {
    std::int64_t sum = 0;
    for (const auto& slab : slabs_) sum += (slab->thread().*member).read_signed();
    single(name, type, help, sum);
  }

  // A counter with one label, whose values are `names` from `first` on.
  template <std::size_t N>
  void by_name(std::string_view family, std::string_view help, std::string_view label,
               const std::array<std::string_view, N>& names, std::array<Counter, N> ThreadCounters::*member,
               std::size_t first = 0) {
    std::array<std::uint64_t, N> counts{};
    for (const auto& slab : slabs_) add_cells(counts, slab->thread().*member);
    out_.family(family, kCounter, help);
    for (std::size_t i = first; i < N; ++i) {
      out_.labels({{label, names[i]}});
      out_.sample(counts[i]);
    }
  }

  void write_daemon(const FleetView& fleet, LabelMode mode) {
    out_.family("nexus_build_info", kGauge, "Always 1; the version of Nexus is in the label.");
    out_.labels({{"version", label_of(fleet.version, mode)}});
    out_.sample(1);
    single("nexus_config_last_reload_successful", kGauge, "1 if the last load of the configuration succeeded.",
           fleet.last_reload_ok ? 1 : 0);
    out_.family("nexus_config_last_reload_success_timestamp_seconds", kGauge,
                "Time of the last successful load of the configuration, since 1970.");
    out_.sample_double(fleet.last_reload_success_timestamp);
  }

  void write_process(const ProcessStats& process) {
    struct Row {
      std::string_view name;
      FamilyType type;
      std::string_view help;
      std::int64_t value;
      bool is_time = false;
    };
    const Row rows[] = {
        {"process_cpu_seconds_total", kCounter, "User and system CPU time spent.", process.cpu_ns, true},
        {"process_resident_memory_bytes", kGauge, "Resident memory size.", process.resident_bytes},
        {"process_virtual_memory_bytes", kGauge, "Virtual memory size.", process.virtual_bytes},
        {"process_open_fds", kGauge, "Open file descriptors.", process.open_fds},
        {"process_max_fds", kGauge, "Maximum number of open file descriptors.", process.max_fds},
        {"process_start_time_seconds", kGauge, "Start time of the process, since 1970.", process.start_time_ns, true},
        {"process_threads", kGauge, "Threads of the process.", process.threads},
    };
    for (const Row& row : rows) {
      if (row.value == ProcessStats::kUnknown) continue;
      out_.family(row.name, row.type, row.help);
      row.is_time ? out_.sample_seconds(static_cast<std::uint64_t>(row.value)) : out_.sample(row.value);
    }
  }

  void single(std::string_view name, FamilyType type, std::string_view help, std::integral auto value) {
    out_.family(name, type, help);
    out_.sample(value);
  }

  std::span<const std::unique_ptr<Slab>> slabs_;  // during a call
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
};

// One page, for callers that keep none of its memory.
inline std::string render_prometheus(const Metrics& metrics, const FleetView& fleet, const ProcessStats& process,
                                     const ModelNames& models, const BackendNames& backends, LabelMode mode) {
  PrometheusPage page;
  return std::string(page.render(metrics, fleet, process, models, backends, mode));
}

}  // namespace nexus
