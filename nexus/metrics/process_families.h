// process_families.h
// Owns:     the families process_* of the page at /metrics.
// Promises: a number that is unknown has no family.
// Leaves:   reading the numbers to os/procfs.h.
// Threads:  one (control).
// Tested by: tests/prometheus_test.cpp
#pragma once

#include <cstdint>
#include <string_view>

#include "nexus/metrics/exposition.h"
#include "nexus/os/procfs.h"

namespace nexus {

inline void write_process_families(Exposition& out, const ProcessStats& process) {
  const auto row = [&out](std::string_view name, std::string_view type, std::string_view help, std::int64_t value,
                          bool is_time = false) {
    if (value == ProcessStats::kUnknown) return;
    out.family(name, type, help);
    is_time ? out.sample_seconds(static_cast<std::uint64_t>(value)) : out.sample(value);
  };
  row("process_cpu_seconds_total", "counter", "User and system CPU time spent.", process.cpu_ns, true);
  row("process_resident_memory_bytes", "gauge", "Resident memory size.", process.resident_bytes);
  row("process_virtual_memory_bytes", "gauge", "Virtual memory size.", process.virtual_bytes);
  row("process_open_fds", "gauge", "Open file descriptors.", process.open_fds);
  row("process_max_fds", "gauge", "Maximum number of open file descriptors.", process.max_fds);
  row("process_start_time_seconds", "gauge", "Start time of the process, since 1970.", process.start_time_ns, true);
  row("process_threads", "gauge", "Threads of the process.", process.threads);
}

}  // namespace nexus
