// service_level.h
// Owns:     the judgement if a request kept to the service levels of [slo].
// Promises: a request is judged once, by its record at its end and by the numbers that the histograms show; only
//           requests for streams are judged, and none that failed by what its client did.
// Leaves:   which requests ask for a stream to proxy/exchange_ends.h; counting to slab.h.
// Threads:  any; a pure function.
// Tested by: tests/service_level_test.cpp, tests/sim
#pragma once

#include "nexus/base/clock.h"
#include "nexus/config/settings.h"
#include "nexus/metrics/slab.h"

namespace nexus {

// `record` is of a request that asked for a stream; `first_ns`: from the complete request to the first token, or -1.
constexpr Slo judge(const SloSettings& levels, const RequestRecord& record, Ns first_ns) {
  switch (error_of(record)) {
    case ErrorType::none: break;
    case ErrorType::client_closed:
    case ErrorType::bad_request:
    case ErrorType::no_backend: return Slo::none;
    default: return record.by_client ? Slo::none : Slo::missed;
  }
  const bool has_rate = levels.tpot_ns > 0 && record.per_token_ns >= 0;
  if (levels.ttft_ns == 0 && !has_rate) return Slo::none;  // there is nothing to judge it by
  const bool began_late = levels.ttft_ns > 0 && (first_ns < 0 || first_ns > levels.ttft_ns);
  const bool was_slow = has_rate && record.per_token_ns > levels.tpot_ns;
  return began_late || was_slow ? Slo::missed : Slo::met;
}

}  // namespace nexus
