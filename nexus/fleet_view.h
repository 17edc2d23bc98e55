// fleet_view.h
// Owns:     what the two pages say about the fleet at one moment, as plain values.
// Promises: nothing; it is filled by the control thread from the registry's snapshot for each page.
// Leaves:   counts of requests to metrics.h.
// Threads:  any; a value.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "clock.h"
#include "names.h"

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

}  // namespace nexus
