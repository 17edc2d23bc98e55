// fleet_view.h
// Owns:     the state of the fleet and of this process as the pages tell it: backends, models, configuration,
//           certificates.
// Promises: plain values, read at one moment by the thread that owns the registry.
// Leaves:   filling it to page_renderer.h, the text to prometheus.h, stats_json.h and status_page.h.
// Threads:  one (control).
// Tested by: tests/prometheus_test.cpp, tests/stats_json_test.cpp
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/metrics/ids.h"
#include "nexus/metrics/slab.h"

namespace nexus {

// The fleet at one moment, filled from the registry for each page.
struct FleetView {
  struct Backend {
    BackendId id;
    bool healthy;
    std::uint32_t max_pending = 0;  // 0: no cap
    Ns ejected_ns = -1;             // time left; 0: its trial request is running; -1: not ejected
    AttemptOutcome ejected_why{};
    // For people: not on /metrics.
    bool checked = true;  // false: nothing is known of its health yet
    Ns state_ns = 0;      // since its health has changed, or since it was configured
    Ns checked_ns = -1;   // since its last check began; -1: there was none
    Ns next_check_ns = -1;
    std::string problem{};  // of its last check, in words; empty: it passed
    std::string url{};
    std::string_view type{};
  };
  std::vector<Backend> backends;           // registered now, in the order of the configuration
  std::vector<ModelId> models_on_healthy;  // distinct
  std::uint64_t models_available = 0;
  std::uint32_t queue_size = 0;
  bool has_service_levels = false;
  std::span<const std::string_view> endpoints;  // their paths, by RequestRecord::endpoint
  Ns uptime_ns = 0;
  Ns wall_ns = 0;
  bool last_reload_ok = true;
  double last_reload_success_timestamp = 0;  // seconds since 1970; 0: unknown
  std::string_view version;
  std::string_view tls_library;  // by name and version; empty in a build without TLS
  struct Certificate {
    std::string name;  // its first
    std::int64_t expiry_s = 0;
  };
  std::vector<Certificate> certificates;  // of the listeners
};

}  // namespace nexus
