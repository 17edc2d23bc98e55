// failure_log.h
// Owns:     the last failed requests, for people: /v1/stats, the status page and `nexus top` show them.
// Promises: fixed memory; no content of a request, names and ids alone, cut to kFailureTextBytes; note() takes no
// memory
//           and cannot fail. A request whose client left is none of them: nothing can be mended there.
// Leaves:   counting to slab.h, which misses none; every single line to the access log.
// Threads:  any; a mutex is held for a copy.
// Tested by: tests/stats_json_test.cpp, tests/e2e/why.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string_view>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/metrics/ids.h"

namespace nexus {

struct FailedRequest {
  struct Text {
    std::array<char, kFailureTextBytes> bytes{};
    std::size_t length = 0;
    void set(std::string_view text) { length = text.copy(bytes.data(), bytes.size()); }
    std::string_view view() const { return {bytes.data(), length}; }
  };
  Ns wall_ns = 0;
  std::uint16_t status = 0;
  std::string_view error;  // its type, a constant
  BackendId backend = BackendId::none;
  Text model;  // as requested
  Text request_id;
};

class FailureLog {
 public:
  void note(Ns wall_ns, std::uint16_t status, std::string_view error, BackendId backend, std::string_view model,
            std::string_view request_id) noexcept {
    const std::lock_guard lock(mutex_);
    FailedRequest& row = rows_[count_++ % rows_.size()];
    row.wall_ns = wall_ns;
    row.status = status;
    row.error = error;
    row.backend = backend;
    row.model.set(model);
    row.request_id.set(request_id);
  }

  // The newest first.
  std::vector<FailedRequest> newest() const {
    std::vector<FailedRequest> out;
    out.reserve(rows_.size());
    const std::lock_guard lock(mutex_);
    for (std::uint64_t i = count_; i > 0 && count_ - i < rows_.size(); --i)
      out.push_back(rows_[(i - 1) % rows_.size()]);
    return out;
  }

 private:
  mutable std::mutex mutex_;
  std::array<FailedRequest, kFailuresShown> rows_;
  std::uint64_t count_ = 0;
};

}  // namespace nexus
