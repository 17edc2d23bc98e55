// attempt_log.h
// Owns:     the log lines about attempts that failed, and about backends that are ejected and used again.
// Promises: at most one line about a failed attempt per backend in kAttemptLogInterval, which counts those left out
//           before it; each ejection has a line, and so has its end.
// Leaves:   what counts as a failure to exchange.h, ejection to fleet/circuit_breaker.h.
// Threads:  one worker's.
// Tested by: tests/counted_test.cpp, tests/e2e/health.test.mjs
#pragma once

#include <cstdint>
#include <new>
#include <string_view>
#include <vector>

#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/fleet/registry.h"
#include "nexus/metrics/slab.h"
#include "nexus/os/log.h"

namespace nexus {

class AttemptLog {
 public:
  // `detail` says more than the outcome, if it is not empty; `state` is the exchange's.
  [[gnu::cold]] void failed(Log& log, Ns now, const BackendView& backend, AttemptOutcome why, std::string_view detail,
                            std::string_view state, std::string_view request_id) {
    Row* const row = row_of(backend.id);
    if (row == nullptr) return;  // no memory, of which nothing more is to be had for a log line
    if (now < row->next_line_ns) {
      row->left_out += 1;
      return;
    }
    log.event(LogLevel::warning, "request to a backend failed",
              {{"backend", backend.name},
               {"why", name_of(why)},
               {"detail", detail},
               {"state", state},
               {"request_id", request_id},
               {"left_out", Digits(row->left_out).view()}});
    *row = {now + kAttemptLogInterval, 0};
  }

  [[gnu::cold]] static void ejected(Log& log, const BackendView& backend, AttemptOutcome why, Ns span) {
    const auto ms = static_cast<std::uint64_t>(span / kMillisecond);
    log.event(LogLevel::warning, "backend is ejected: it gets no requests for a while",
              {{"backend", backend.name}, {"why", name_of(why)}, {"for_ms", Digits(ms).view()}});
  }

  [[gnu::cold]] static void returned(Log& log, const BackendView& backend) {
    log.event(LogLevel::info, "backend gets requests again: its trial request succeeded", {{"backend", backend.name}});
  }

 private:
  struct Row {
    Ns next_line_ns = 0;
    std::uint64_t left_out = 0;
  };

  Row* row_of(BackendId id) {
    try {
      if (index_of(id) >= rows_.size()) rows_.resize(index_of(id) + 1);
      return &rows_[index_of(id)];
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }

  std::vector<Row> rows_;  // by BackendId
};

}  // namespace nexus
