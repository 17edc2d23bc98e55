// page_renderer.h
// Owns:     rendering /metrics, /v1/stats and the status page, and the memory of the rendered pages.
// Promises: a page is one consistent view of the registry; a rendered page is handed over without a copy, and its
//           memory is reused once no client reads it; after a lack of memory the next page is complete again.
// Leaves:   the text to prometheus.h, stats_json.h and status_page.h; sending it to builtin_pages.h.
// Threads:  the control thread.
// Tested by: tests/prometheus_test.cpp, tests/stats_json_test.cpp, tests/e2e/metrics.test.mjs
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/api/endpoints.h"
#include "nexus/apps/status_page.h"
#include "nexus/base/text_buffer.h"
#include "nexus/fleet/registry.h"
#include "nexus/metrics/prometheus.h"
#include "nexus/metrics/slab.h"
#include "nexus/metrics/stats_json.h"
#include "nexus/os/procfs.h"
#include "nexus/server/builtin_pages.h"

namespace nexus {

class PageRenderer {
 public:
  struct Sources {
    std::function<Ns()> wall_time = wall_now;
    std::function<std::uint64_t()> log_lines_dropped = [] { return std::uint64_t{0}; };  // since the start
    std::function<ProcessStats()> process_stats = read_process_stats;
  };

  // `slab`: where this thread counts.
  PageRenderer(const Metrics& metrics, Slab& slab, const Registry& registry, Sources sources, Ns process_started)
      : metrics_(metrics),
        slab_(slab),
        registry_(registry),
        sources_(std::move(sources)),
        process_started_ns_(process_started) {}
  PageRenderer(const PageRenderer&) = delete;
  PageRenderer& operator=(const PageRenderer&) = delete;

  void note_reload(bool succeeded) {
    last_reload_ok_ = succeeded;
    if (succeeded) last_reload_wall_ns_ = sources_.wall_time();
  }

  // Of the pages that somebody may still read. Any thread may end its reading meanwhile.
  std::size_t unsent_bytes() const { return metrics_memory_.lent_bytes() + stats_memory_.lent_bytes(); }

  // Throws std::bad_alloc; the next page is complete again.
  std::shared_ptr<const TextBuffer> render(PageKind kind, Ns now) {
    const bool is_exposition = kind == PageKind::metrics || kind == PageKind::openmetrics;
    const FleetView fleet = fleet_view(now, !is_exposition);
    count_dropped_lines();
    const ModelNames& models = registry_.model_names();
    const BackendNames& backends = registry_.backend_names();
    if (is_exposition) {
      metrics_memory_.take_back(prometheus_page_.page());
      prometheus_page_.render(metrics_, fleet, sources_.process_stats(), models, backends, registry_.keys().names(),
                              registry_.settings().metrics.labels,
                              kind == PageKind::metrics ? MetricsFormat::text : MetricsFormat::openmetrics);
      return metrics_memory_.lend(prometheus_page_.page());
    }
    stats_memory_.take_back(stats_page_);
    const Stats stats = collect_stats(metrics_, fleet, models, backends, registry_.keys().names());
    kind == PageKind::stats ? write_stats(stats_page_, stats) : write_status_page(stats_page_, stats, kVersion);
    return stats_memory_.lend(stats_page_);
  }

 private:
  void count_dropped_lines() {
    const std::uint64_t dropped = sources_.log_lines_dropped();
    if (dropped == lines_dropped_) return;
    slab_.log_dropped(dropped - lines_dropped_);
    slab_.limit_hit(Limit::log_volume);
    lines_dropped_ = dropped;
  }

  static std::string url_of(const BackendSettings& backend) {
    if (backend.kind == BackendKind::echo) return {};
    const auto& [host, port] = backend.address;
    return (backend.tls.on ? "https://" : "http://") + host_port(host, port) + backend.base_path;
  }

  // As people read it. Its url without a password, which no BackendSettings holds.
  void describe(const Registry::Backend& backend, Ns now, FleetView::Backend& view) const {
    view.checked = backend.health != Health::unknown;
    const bool up = backend.health == Health::healthy;  // else an ejection does not show
    view.state_ns = now - (up ? std::max(backend.changed_ns, backend.circuit->changed_ns(now)) : backend.changed_ns);
    if (backend.checked_ns > 0) view.checked_ns = now - backend.checked_ns;
    const bool checked = backend.is_checked(registry_.settings().health.enabled);
    if (checked && backend.next_check_ns != kNever) view.next_check_ns = std::max<Ns>(backend.next_check_ns - now, 0);
    view.problem = backend.problem;
    view.url = url_of(backend.settings);
    view.type = name_of(backend.settings.kind);
  }

  // `for_people`: with what only they read.
  FleetView fleet_view(Ns now, bool for_people) const {
    FleetView fleet;
    for (const Registry::Backend& backend : registry_.backends()) {
      FleetView::Backend& view = fleet.backends.emplace_back();
      view.id = backend.id;
      view.healthy = backend.is_up();
      view.max_pending = backend.settings.max_pending;
      if (for_people) describe(backend, now, view);
      if (const auto ejection = backend.circuit->ejection(now)) {
        view.ejected_ns = ejection->left_ns;
        view.ejected_why = ejection->why;
      }
    }
    fleet.models_on_healthy = registry_.models_on_healthy();
    fleet.models_available = fleet.models_on_healthy.size();
    fleet.queue_size = registry_.settings().queue.size;
    fleet.has_service_levels = registry_.settings().slo.on();
    fleet.endpoints = endpoint_paths_;
    fleet.uptime_ns = now - process_started_ns_;
    fleet.wall_ns = sources_.wall_time();
    fleet.last_reload_ok = last_reload_ok_;
    fleet.last_reload_success_timestamp = static_cast<double>(last_reload_wall_ns_) / static_cast<double>(kSecond);
    fleet.version = kVersion;
    fleet.tls_library = tls_library_;
    if (const auto& tls = registry_.settings().server.tls) {
      for (const TlsCertificateInfo& one : tls->certificates())
        fleet.certificates.push_back({one.name, one.not_after_s});
    }
    return fleet;
  }

  static std::vector<std::string_view> endpoint_paths() {
    std::vector<std::string_view> paths;
    for (const Endpoint& row : kEndpoints) paths.push_back(row.path);
    return paths;
  }

  const Metrics& metrics_;
  Slab& slab_;
  const Registry& registry_;
  const Sources sources_;
  const Ns process_started_ns_;
  const std::vector<std::string_view> endpoint_paths_ = endpoint_paths();
  const std::string tls_library_ = tls_library();
  bool last_reload_ok_ = true;
  Ns last_reload_wall_ns_ = 0;
  std::uint64_t lines_dropped_ = 0;
  PrometheusPage prometheus_page_;
  TextBuffer stats_page_;  // of the status page too
  BufferRecycler metrics_memory_, stats_memory_;
};

}  // namespace nexus
