// prometheus.h
// Owns:     the page at /metrics: its families, in order.
// Promises: every family once, its lines together; no series twice, whatever the names are; a counter never goes back
//           from one page to the next; recorders are not blocked, not slowed, and not kept from their processor.
//           Memory is kept for the next page.
// Leaves:   the format to exposition.h, adding up to series.h, label values to labels.h; sockets, and the 503 if there
//           is no page, to builtin_pages.h.
// Threads:  one (control), which also owns the name tables; the slabs may be written meanwhile.
// Tested by: tests/prometheus_test.cpp, tests/e2e/metrics.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/text.h"
#include "nexus/base/text_buffer.h"
#include "nexus/config/settings.h"
#include "nexus/metrics/exposition.h"
#include "nexus/metrics/fleet_view.h"
#include "nexus/metrics/histogram.h"
#include "nexus/metrics/ids.h"
#include "nexus/metrics/labels.h"
#include "nexus/metrics/process_families.h"
#include "nexus/metrics/series.h"
#include "nexus/metrics/slab.h"
#include "nexus/os/procfs.h"

namespace nexus {

class PrometheusPage {
 public:
  // The page; it stays as it is until the next call. The name tables must be the same in every call.
  std::string_view render(const Metrics& metrics, const FleetView& fleet, const ProcessStats& process,
                          const ModelNames& models, const BackendNames& backends, const KeyNames& keys, LabelMode mode,
                          MetricsFormat format = MetricsFormat::text) {
    slabs_ = metrics.slabs();
    model_labels_.update(models, mode);
    backend_labels_.update(backends, mode);
    key_labels_.update(keys, mode);
    collect(pairs_, &Slab::pairs, model_labels_, backend_labels_);
    collect(fallbacks_, &Slab::fallbacks, model_labels_, model_labels_);
    collect(models_, &Slab::model, model_labels_);
    collect(backends_, &Slab::backend, backend_labels_);
    collect(keys_, &Slab::key, key_labels_);
    add_registered(fleet);
    threads_.clear();
    for (const auto& slab : slabs_) threads_.push_back({0, &slab->thread()});

    out_.begin(format);
    write_requests();
    write_service_levels(fleet);
    write_endpoints(fleet, mode);
    if (keys.size() > kOwnKeyNames) write_keys();
    write_fleet(fleet);
    write_backends();
    write_threads();
    write_daemon(fleet, mode);
    write_process_families(out_, process);
    out_.end();
    return out_.text();
  }

  // Between two calls its memory may be handed over, and other memory given.
  TextBuffer& page() { return out_.page(); }

 private:
  static constexpr std::string_view kCounter = "counter", kGauge = "gauge", kHistogram = "histogram";

  using Label = Exposition::Label;

  struct BackendState {  // of one label value
    bool registered = false;
    bool up = false;                // all of the backends that share the label: none that is down is hidden
    bool ejected = false;           // any of them
    std::uint64_t max_pending = 0;  // of all of them; 0: one has no cap
  };

  // ---- adding up

  // All counters of one kind, by the labels of their two ids.
  template <class Cells, class First, class Second>
  void collect(Sources<Cells>& sources, const PairTable<Cells>& (Slab::*table)() const, const LabelTable<First>& first,
               const LabelTable<Second>& second) {
    sources.clear();
    for (const auto& slab : slabs_) {
      ((*slab).*table)().for_each([&](std::uint32_t a, std::uint32_t b, const Cells& cells) {
        sources.push_back({std::uint64_t{first.group_of(First{a})} << 32 | second.group_of(Second{b}), &cells});
      });
    }
    std::sort(sources.begin(), sources.end());
  }

  // The same, by the label of their only id.
  template <class Cells, class Id>
  void collect(Sources<Cells>& sources, const Cells* (Slab::*find)(Id) const, const LabelTable<Id>& labels) {
    sources.clear();
    for (std::uint32_t i = 0; i < labels.ids(); ++i) {
      for (const auto& slab : slabs_) {
        if (const Cells* cells = ((*slab).*find)(Id{i})) sources.push_back({labels.group_of(Id{i}), cells});
      }
    }
    std::sort(sources.begin(), sources.end());
  }

  // A registered backend has a series even if no slab has counters of it yet.
  void add_registered(const FleetView& fleet) {
    static const BackendCounters kZeros;
    backend_states_.assign(backend_labels_.groups(), BackendState{});
    for (const auto& backend : fleet.backends) {
      const std::uint32_t group = backend_labels_.group_of(backend.id);
      BackendState& state = backend_states_[group];
      state.max_pending = backend.max_pending == 0 || (state.registered && state.max_pending == 0)
                              ? 0
                              : state.max_pending + backend.max_pending;
      state.up = backend.healthy && (state.up || !state.registered);
      state.registered = true;
      state.ejected |= backend.ejected_ns >= 0;
      backends_.push_back({group, &kZeros});
    }
    std::sort(backends_.begin(), backends_.end());
  }

  // ---- families

  void write_requests() {
    out_.family("nexus_requests_total", kCounter, "Finished requests, by the status sent to the client.");
    for_each_series(pairs_, [this](auto model, auto backend, auto series) { write_statuses(model, backend, series); });

    out_.family("nexus_errors_total", kCounter, "Failed requests, by error type.");
    for_each_series(models_, [this](auto, auto model, auto series) {
      for (std::size_t type = 1; type < kErrorTypeNames.size(); ++type) {
        const auto sum = sum_of(
            series, [type](const ModelCounters& cells) -> auto& { return cells.errors[type]; });
        if (sum != 0) sample({{"error_type", kErrorTypeNames[type]}, {"model", model_labels_.text(model)}}, sum);
      }
    });

    out_.family("nexus_queue_wait_seconds", kHistogram, "Time requests waited in the queue.");
    for_each_series(models_, [this](auto, auto model, auto series) {
      const auto values = sum_of(series, &ModelCounters::queue_wait);
      if (values.count() == 0) return;
      out_.labels({{"model", model_labels_.text(model)}});
      out_.histogram(values);
    });

    out_.family("nexus_fallbacks_total", kCounter,
                "Requests served by a fallback model, by the model in the request and the model that served it.");
    for_each_series(fallbacks_, [this](auto from, auto to, auto series) {
      const auto sum = sum_of(series, std::identity());
      if (sum != 0) sample({{"from_model", model_labels_.text(from)}, {"to_model", model_labels_.text(to)}}, sum);
    });

    pair_family("nexus_request_duration_seconds", "Time from the complete request head to the last response byte.",
                &PairCounters::duration, &PairCounters::duration_sum, &PairExemplars::duration);
    pair_family("nexus_time_to_first_token_seconds",
                "Streams: time from the complete request to the first event from the backend that is no comment.",
                &PairCounters::first_token, &PairCounters::first_token_sum, &PairExemplars::first_token);
    pair_family("nexus_time_per_output_token_seconds", "Streams with usage: mean time between two output tokens.",
                &PairCounters::per_token, &PairCounters::per_token_sum);
    out_.family("nexus_tokens_total", kHistogram, "Tokens of each response, from its usage.");
    for_each_series(pairs_, [this](auto model, auto backend, auto series) {
      pair_histogram(model, backend, series, &PairCounters::prompt_tokens, &PairCounters::prompt_sum,
                     {"type", "prompt"});
      pair_histogram(model, backend, series, &PairCounters::completion_tokens, &PairCounters::completion_sum,
                     {"type", "completion"});
    });
    // Shown from the first prompt that was counted: what was cached is a part of it.
    out_.family("nexus_prompt_tokens_cached_total", kCounter, "Prompt tokens that the backend had in its cache.");
    for_each_series(pairs_, [this](auto model, auto backend, auto series) {
      if (sum_of(series, &PairCounters::prompt_sum) == 0) return;
      pair_labels(model, backend, {});
      out_.sample(sum_of(series, &PairCounters::cached_sum));
    });
  }

  // Shown where [slo] has a level, and from then on.
  void write_service_levels(const FleetView& fleet) {
    const auto judged = [](Series<ModelCounters> series, Slo outcome) {
      return sum_of(
          series, [outcome](const ModelCounters& cells) -> auto& {
            return cells.slo[static_cast<std::size_t>(outcome)];
          });
    };
    const auto all = [&](Series<ModelCounters> series) {
      return judged(series, Slo::met) + judged(series, Slo::missed);
    };
    if (!fleet.has_service_levels && all(models_) == 0) return;
    out_.family("nexus_slo_requests_total", kCounter, "Requests for streams, by whether they met the service level.");
    for_each_series(models_, [&](auto, auto model, auto series) {
      if (all(series) == 0) return;
      for (const Slo outcome : {Slo::met, Slo::missed}) {
        sample({{"model", model_labels_.text(model)}, {"met", kSloNames[static_cast<std::size_t>(outcome)]}},
               judged(series, outcome));
      }
    });
  }

  void write_endpoints(const FleetView& fleet, LabelMode mode) {
    out_.family("nexus_endpoint_requests_total", kCounter, "Finished requests, by endpoint and status.");
    for (std::size_t i = 0; i < fleet.endpoints.size(); ++i) {
      const std::string endpoint = label_of(fleet.endpoints[i], mode);
      const auto counts = by_status(
          Series<ThreadCounters>(threads_), [i](const ThreadCounters& cells) -> auto& { return cells.endpoints[i]; });
      for (const auto& [status, count] : counts) {
        sample({{"endpoint", endpoint}, {"status", Digits(status).view()}}, count);
      }
    }
  }

  // Shown once a file of keys was read.
  void write_keys() {
    out_.family("nexus_key_requests_total", kCounter, "Finished requests of a client's key, by class of status.");
    for_each_series(keys_, [this](auto, auto key, auto series) {
      for (std::size_t i = 0; i < kStatusClassNames.size(); ++i) {
        const auto sum = sum_of(
            series, [i](const KeyCounters& cells) -> auto& { return cells.requests[i]; });
        sample({{"key", key_labels_.text(key)}, {"status", kStatusClassNames[i]}}, sum);
      }
    });
    out_.family("nexus_key_tokens_total", kCounter, "Tokens of a client's key; those cached are prompt tokens too.");
    for_each_series(keys_, [this](auto, auto key, auto series) {
      const auto one = [&](std::string_view type, Counter KeyCounters::*counter) {
        sample({{"key", key_labels_.text(key)}, {"type", type}}, sum_of(series, counter));
      };
      one("prompt", &KeyCounters::prompt_tokens);
      one("completion", &KeyCounters::completion_tokens);
      one("cached", &KeyCounters::cached_tokens);
    });
    out_.family("nexus_key_pending", kGauge, "Requests of a client's key that have not ended.");
    for_each_series(keys_, [this](auto, auto key, auto series) {
      sample({{"key", key_labels_.text(key)}}, sum_of(series, &KeyCounters::pending));
    });
    out_.family("nexus_key_queue_wait_seconds", "summary", "Time requests of a client's key waited in the queue.");
    for_each_series(keys_, [this](auto, auto key, auto series) {
      out_.labels({{"key", key_labels_.text(key)}});
      out_.summary(static_cast<std::uint64_t>(sum_of(series, &KeyCounters::queue_wait_ns)),
                   static_cast<std::uint64_t>(sum_of(series, &KeyCounters::queue_waits)));
    });
  }

  // The counts that `pick` finds in the cells, whole and failed ones together.
  template <class Cells, class Pick>
  static std::map<std::uint32_t, std::uint64_t> by_status(Series<Cells> series, Pick&& pick) {
    std::map<std::uint32_t, std::uint64_t> counts;
    for (const auto& source : series) {
      std::invoke(pick, *source.cells).for_each([&](const StatusCounters::Count& count) {
        counts[count.status] += count.count;
      });
    }
    return counts;
  }

  void write_statuses(std::uint32_t model, std::uint32_t backend, Series<PairCounters> series) {
    for (const auto& [status, count] : by_status(series, &PairCounters::statuses)) {
      pair_labels(model, backend, {"status", Digits(status).view()});
      out_.sample(count);
    }
  }

  void pair_labels(std::uint32_t model, std::uint32_t backend, Label last) {
    out_.labels({{"model", model_labels_.text(model)}, {"backend", backend_labels_.text(backend)}, last});
  }

  template <const auto& kBounds>
  void pair_family(std::string_view name, std::string_view help, Buckets<kBounds> PairCounters::*buckets,
                   Counter PairCounters::*sum, Exemplars<kBounds> PairExemplars::*exemplars = nullptr) {
    out_.family(name, kHistogram, help);
    for_each_series(pairs_, [&](auto model, auto backend, auto series) {
      pair_histogram(model, backend, series, buckets, sum, {}, exemplars);
    });
  }

  // A series appears with its first observation, and stays. Its exemplars are read before its counts, in which they are
  // then.
  template <const auto& kBounds>
  void pair_histogram(std::uint32_t model, std::uint32_t backend, Series<PairCounters> series,
                      Buckets<kBounds> PairCounters::*buckets, Counter PairCounters::*sum, Label last,
                      Exemplars<kBounds> PairExemplars::*exemplars = nullptr) {
    std::optional<typename Exemplars<kBounds>::Newest> newest;
    if (exemplars != nullptr && out_.format() == MetricsFormat::openmetrics) newest = newest_of(series, exemplars);
    HistogramValues<kBounds> values;
    for (const auto& source : series) (source.cells->*buckets).add_to(values, source.cells->*sum);
    if (values.count() == 0) return;
    pair_labels(model, backend, last);
    newest ? out_.histogram(values, *newest) : out_.histogram(values);
  }

  template <const auto& kBounds>
  static std::optional<typename Exemplars<kBounds>::Newest> newest_of(Series<PairCounters> series,
                                                                      Exemplars<kBounds> PairExemplars::*exemplars) {
    std::optional<typename Exemplars<kBounds>::Newest> newest;
    for (const auto& source : series) {
      const PairExemplars* all = source.cells->exemplars.load(std::memory_order_acquire);
      if (all == nullptr) continue;
      if (!newest) newest.emplace();
      (all->*exemplars).add_to(*newest);
    }
    return newest;
  }

  void write_fleet(const FleetView& fleet) {
    const auto healthy = std::count_if(fleet.backends.begin(), fleet.backends.end(),
                                       [](const FleetView::Backend& backend) { return backend.healthy; });
    single("nexus_backends_total", kGauge, "Registered backends.", fleet.backends.size());
    single("nexus_backends_healthy", kGauge, "Registered backends that pass their health checks.", healthy);
    single("nexus_models_available", kGauge, "Distinct models on healthy backends.", fleet.models_available);
    single("nexus_queue_capacity", kGauge, "Requests that may wait in the queue, for all backends together.",
           fleet.queue_size);
  }

  void write_backends() {
    backend_family("nexus_pending_requests", kGauge, "Requests in flight on a backend, or queued for it.",
                   &BackendCounters::pending);
    backend_family("nexus_backend_in_flight", kGauge, "Requests in flight on a backend.", &BackendCounters::in_flight);
    out_.family("nexus_backend_max_pending", kGauge, "Most requests in flight on a backend, where it has a cap.");
    for_each_series(backends_, [this](auto, auto group, auto) {
      const std::uint64_t cap = backend_states_[group].max_pending;
      if (cap > 0) sample({{"backend", backend_labels_.text(group)}}, cap);
    });
    backend_family("nexus_queue_depth", kGauge, "Requests waiting in the queue, each under one of its backends.",
                   &BackendCounters::queue_depth);
    backend_family("nexus_backend_connections", kGauge, "Open connections to the backend.",
                   &BackendCounters::connections);
    out_.family("nexus_backend_up", kGauge, "1 if the backend passes its health checks.");
    for_each_series(backends_, [this](auto, auto group, auto) { backend_sample(group, backend_states_[group].up); });
    out_.family("nexus_backend_ejected", kGauge,
                "1 while the backend is passed over, because requests to it have failed.");
    for_each_series(backends_,
                    [this](auto, auto group, auto) { backend_sample(group, backend_states_[group].ejected); });

    out_.family("nexus_backend_latency_seconds", kHistogram, "Round-trip time of successful health checks.");
    for_each_series(backends_, [this](auto, auto group, auto series) {
      const auto values = sum_of(series, &BackendCounters::health_latency);
      if (!backend_states_[group].registered && values.count() == 0) return;
      out_.labels({{"backend", backend_labels_.text(group)}});
      out_.histogram(values);
    });

    backend_family("nexus_responses_without_usage_total", kCounter, "Successful responses without token counts.",
                   &BackendCounters::without_usage);
    backend_family("nexus_streams_without_end_total", kCounter, "Successful streams that ended without their end mark.",
                   &BackendCounters::without_end);

    out_.family("nexus_backend_attempts_total", kCounter, "Attempts to serve a request from a backend, by outcome.");
    for_each_series(backends_, [this](auto, auto group, auto series) {
      for (std::size_t i = 0; i < kAttemptOutcomeNames.size(); ++i) {
        const auto sum = sum_of(
            series, [i](const BackendCounters& cells) -> auto& { return cells.attempts[i]; });
        backend_sample(group, sum, {"outcome", kAttemptOutcomeNames[i]});
      }
    });
  }

  void backend_family(std::string_view name, std::string_view type, std::string_view help,
                      Counter BackendCounters::*member) {
    out_.family(name, type, help);
    for_each_series(backends_, [&](auto, auto group, auto series) { backend_sample(group, sum_of(series, member)); });
  }

  // A registered backend is shown from the start; another one as long as its value is not 0.
  void backend_sample(std::uint32_t group, std::int64_t value, Label last = {}) {
    if (!backend_states_[group].registered && value == 0) return;
    sample({{"backend", backend_labels_.text(group)}, last}, value);
  }

  void write_threads() {
    thread_family(
        "nexus_overhead_seconds",
        "Time Nexus added to a request, without its waits for first checks, the queue, a connection and the backend.",
        &ThreadCounters::overhead);
    thread_family("nexus_loop_stall_seconds", "Duration of one iteration of an event loop, between two waits.",
                  &ThreadCounters::loop_stall);

    by_name("nexus_client_disconnects_total", "Clients that disconnected before the end of their response.", "phase",
            kDisconnectPhaseNames, &ThreadCounters::disconnects, 1);  // without `none`
    by_name("nexus_queue_rejected_total", "Requests that the queue had no room or no time for.", "reason",
            kQueueRejectionNames, &ThreadCounters::queue_rejections);
    by_name("nexus_limit_rejections_total", "Requests and connections rejected or cut by a limit.", "limit",
            kLimitNames, &ThreadCounters::limits);
    by_name("nexus_affinity_total", "Requests with [routing] affinity that got a backend, by their key.", "outcome",
            kAffinityOutcomeNames, &ThreadCounters::affinity, 1);  // without `none`
    by_name("nexus_http_rejections_total", "Requests refused for their head, path or method.", "reason",
            kHttpRejectionNames, &ThreadCounters::http_rejections);

    out_.family("nexus_tls_handshakes_total", kCounter, "TLS handshakes that ended, by the peer's side and outcome.");
    for (std::size_t i = 0; i < kTlsSideNames.size() * kTlsOutcomes; ++i) {
      const auto pick = [i](const ThreadCounters& cells) -> auto& { return cells.tls_handshakes[i]; };
      sample({{"side", kTlsSideNames[i / kTlsOutcomes]}, {"outcome", kTlsOutcomeNames[i % kTlsOutcomes]}},
             sum_of(Series<ThreadCounters>(threads_), pick));
    }

    single("nexus_client_connections", kGauge, "Open client connections.",
           sum_of(Series<ThreadCounters>(threads_), &ThreadCounters::client_connections));
    single("nexus_log_lines_dropped_total", kCounter, "Log lines that were not written.",
           sum_of(Series<ThreadCounters>(threads_), &ThreadCounters::log_lines_dropped));
    single("nexus_spans_exported_total", kCounter, "Spans that the collector has taken.",
           sum_of(Series<ThreadCounters>(threads_), &ThreadCounters::spans_exported));
    by_name("nexus_spans_dropped_total", "Spans that the collector did not take.", "reason", kSpanLossNames,
            &ThreadCounters::spans_dropped);
  }

  template <const auto& kBounds>
  void thread_family(std::string_view name, std::string_view help, Histogram<kBounds> ThreadCounters::*member) {
    out_.family(name, kHistogram, help);
    out_.histogram(sum_of(Series<ThreadCounters>(threads_), member));
  }

  // A counter with one label, whose values are `names` from `first` on.
  template <std::size_t N>
  void by_name(std::string_view family, std::string_view help, std::string_view label,
               const std::array<std::string_view, N>& names, std::array<Counter, N> ThreadCounters::*member,
               std::size_t first = 0) {
    out_.family(family, kCounter, help);
    for (std::size_t i = first; i < N; ++i) {
      const auto pick = [&](const ThreadCounters& cells) -> auto& { return (cells.*member)[i]; };
      sample({{label, names[i]}}, sum_of(Series<ThreadCounters>(threads_), pick));
    }
  }

  void write_daemon(const FleetView& fleet, LabelMode mode) {
    out_.family("nexus_build_info", "info", "Always 1; the version of Nexus is in the label.");
    sample({{"version", label_of(fleet.version, mode)}, {"tls_library", label_of(fleet.tls_library, mode)}}, 1);
    write_certificates(fleet, mode);
    single("nexus_config_last_reload_successful", kGauge, "1 if the last load of the configuration succeeded.",
           fleet.last_reload_ok ? 1 : 0);
    out_.family("nexus_config_last_reload_success_timestamp_seconds", kGauge,
                "Time of the last successful load of the configuration, since 1970.");
    out_.sample_double(fleet.last_reload_success_timestamp);
  }

  // Of several certificates with one name, that which expires first.
  void write_certificates(const FleetView& fleet, LabelMode mode) {
    if (fleet.certificates.empty()) return;
    std::map<std::string, std::int64_t> expiries;
    for (const FleetView::Certificate& certificate : fleet.certificates) {
      const auto [at, is_new] = expiries.try_emplace(label_of(certificate.name, mode), certificate.expiry_s);
      if (!is_new) at->second = std::min(at->second, certificate.expiry_s);
    }
    out_.family("nexus_tls_certificate_expiry_timestamp_seconds", kGauge,
                "Time when a certificate of the listeners expires, since 1970.");
    for (const auto& [name, expiry_s] : expiries) sample({{"certificate", name}}, expiry_s);
  }

  void sample(std::initializer_list<Label> labels, std::integral auto value) {
    out_.labels(labels);
    out_.sample(value);
  }

  void single(std::string_view name, std::string_view type, std::string_view help, std::integral auto value) {
    out_.family(name, type, help);
    out_.sample(value);
  }

  std::span<const std::unique_ptr<Slab>> slabs_;  // during a call
  Exposition out_;
  LabelTable<ModelId> model_labels_;
  LabelTable<BackendId> backend_labels_;
  LabelTable<KeyId> key_labels_;
  Sources<PairCounters> pairs_;
  Sources<Counter> fallbacks_;
  Sources<ModelCounters> models_;
  Sources<BackendCounters> backends_;
  Sources<KeyCounters> keys_;
  Sources<ThreadCounters> threads_;           // one series
  std::vector<BackendState> backend_states_;  // by label group
};

}  // namespace nexus
