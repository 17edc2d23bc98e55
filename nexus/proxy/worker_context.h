// worker_context.h
// Owns:     the parts that all objects of one worker use: net, timers, memory, counters, scratch space, snapshot;
//           its log lines about attempts that failed, and about backends that are ejected and used again.
// Promises: used by one worker thread, so nothing in it locks; values shared by all threads are in Shared. At most
//           one line about a failed attempt per backend in kAttemptLogInterval, which counts those left out before
//           it; each ejection has a line, and so has its end.
// Leaves:   events to server/worker.h, connections to upstream_pool.h, requests and their failures to exchange.h.
// Threads:  WorkerContext: one worker's. Shared: every worker's, as each member's own header says.
// Tested by: tests/sim, tests/hostile, tests/counted_test.cpp, tests/e2e/health.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/api/incremental_json.h"
#include "nexus/api/request_json.h"
#include "nexus/base/buffer.h"
#include "nexus/base/limits.h"
#include "nexus/base/memory_budget.h"
#include "nexus/base/object_pool.h"
#include "nexus/base/random.h"
#include "nexus/base/text.h"
#include "nexus/fleet/admission.h"
#include "nexus/fleet/registry.h"
#include "nexus/fleet/response_ids.h"
#include "nexus/fleet/router.h"
#include "nexus/http/head_parser.h"
#include "nexus/http/head_writer.h"
#include "nexus/http/header_fields.h"
#include "nexus/metrics/slab.h"
#include "nexus/net/epoll.h"
#include "nexus/net/timer_wheel.h"
#include "nexus/os/log.h"
#include "nexus/proxy/request_trace.h"
#include "nexus/proxy/upstream_request.h"

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
    log.event(LogLevel::warning, "backend is ejected: others get its requests for a while",
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

inline bool is_request_id(std::string_view id) {
  if (id.empty() || id.size() > kMaxRequestIdBytes) return false;
  return std::all_of(id.begin(), id.end(), [](char c) { return c > 0x20 && c < 0x7f; });
}

// The eight hex digits of a number, the highest first in the highest byte: each nibble gets a byte, and the ones above
// nine are moved on to the letters.
constexpr std::uint64_t hex_digits_of(std::uint32_t number) {
  constexpr std::uint64_t kEach = 0x0101010101010101;
  std::uint64_t nibbles = number;
  nibbles = (nibbles | nibbles << 16) & 0x0000ffff0000ffff;
  nibbles = (nibbles | nibbles << 8) & 0x00ff00ff00ff00ff;
  nibbles = (nibbles | nibbles << 4) & 0x0f * kEach;
  const std::uint64_t letters = (nibbles + 6 * kEach) >> 4 & kEach;
  return nibbles + '0' * kEach + letters * ('a' - '0' - 10);
}
static_assert(hex_digits_of(0x09afbe10) == 0x3039616662653130);

// Grows `list` so that `list[index]` exists. False if memory is short.
template <class T>
bool make_room(std::vector<T>& list, std::size_t index) {
  try {
    if (index >= list.size()) list.resize(index + 1);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

struct Shared {
  Metrics& metrics;
  Admission& admission;
  BodyBudget& body_budget;
  // Requests in flight over all threads; written only if [server] max_pending is set. Relaxed: the number alone is
  // shared.
  std::atomic<std::uint32_t>& in_flight;
  std::string instance;  // this process in a Via field: `nexus-` and eight hex digits
  std::string via_line = "Via: 1.1 " + instance + "\r\n";
  std::function<void(BackendId)> ask_check = [](BackendId) {};  // of a backend; `none`: of all that are not up
  std::atomic<Ns> next_stray_log_ns{0};                         // relaxed: only the number is shared
  ResponseIds response_ids{};
  RecentKeys recent_keys{};  // of affinity
  KeylessFlows keyless{};    // guarded by admission's mutex
};

// A snapshot in use by one worker, with a reference count of its own, without atomics: an exchange keeps the one of its
// last decision, and its attempt the one that its backend is from.
struct LocalSnapshot {
  SnapshotPtr ptr;
  std::uint32_t users = 0;
};

class SnapshotUse {
 public:
  SnapshotUse() = default;
  explicit SnapshotUse(LocalSnapshot* local) : local_(local) {
    if (local_ != nullptr) local_->users += 1;
  }
  SnapshotUse(SnapshotUse&& other) noexcept : local_(std::exchange(other.local_, nullptr)) {}
  SnapshotUse& operator=(SnapshotUse&& other) noexcept {
    SnapshotUse taken(std::move(other));
    std::swap(local_, taken.local_);
    return *this;
  }
  ~SnapshotUse() {
    if (local_ == nullptr) return;
    local_->users -= 1;
    if (local_->users == 0) delete local_;  // the WorkerContext is a user of the current one
  }
  const Snapshot* operator->() const { return local_->ptr.get(); }
  const Snapshot& operator*() const { return *local_->ptr; }
  const Snapshot* get() const { return local_ == nullptr ? nullptr : local_->ptr.get(); }
  SnapshotUse again() const { return SnapshotUse(local_); }
  bool operator==(const SnapshotUse& other) const { return local_ == other.local_; }

 private:
  LocalSnapshot* local_ = nullptr;
};

template <class Net>
struct WorkerContext {
  WorkerContext(Net& net_in, Shared& shared_in, Slab& slab_in, Log& log_in, std::uint32_t worker_in, std::uint64_t seed,
                SnapshotPtr snapshot_in)
      : net(net_in),
        shared(shared_in),
        slab(slab_in),
        log(log_in),
        worker(worker_in),
        now(net_in.now()),
        wheel(now),
        budget(shared_in.body_budget),
        random(seed) {
    text.reserve(kTextBytes);
    use(std::make_unique<LocalSnapshot>(LocalSnapshot{std::move(snapshot_in), 0}));
  }

  // The log's settings are those of `next`.
  void use(std::unique_ptr<LocalSnapshot> next) {
    snapshot = SnapshotUse(next.release());
    log.configure(settings().log);
    keeps_exemplars = settings().metrics.openmetrics;
    watches = log.wants_access() || settings().trace.on() || settings().slo.on() || keeps_exemplars;
  }
  const Settings& settings() const { return *snapshot->settings; }

  // A buffer to receive into, for the present step only. Null if memory is short.
  char* scratch() {
    if (!scratch_block) scratch_block = blocks.take(kRoomyBlock);
    return scratch_block.data();
  }
  std::size_t scratch_bytes() const { return scratch_block.capacity(); }

  // Schedules `session` for another turn after the current events. Idempotent: a session that is already scheduled is
  // not added again.
  // REQUIRES: make_turn().
  void reschedule(Handle session) noexcept {
    Handle& next = next_turns[session.slot()];
    if (next.value == 0) again.push_back(session.slot());
    next = session;  // one that was there before has ended
  }
  // Makes room for a new session's turns, so that scheduling them needs no memory. False if there is none.
  bool make_turn(Handle session) {
    if (!make_room(next_turns, session.slot())) return false;
    try {
      for (auto* list : {&again, &running}) {
        if (list->capacity() < next_turns.size()) list->reserve(2 * next_turns.size());
      }
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    }
  }
  // Calls `resume(session)` for each scheduled session; it may schedule them again.
  template <class Resume>
  void run_rescheduled(Resume&& resume) {
    running.swap(again);
    for (const std::uint32_t slot : running) resume(std::exchange(next_turns[slot], Handle{}));
    running.clear();
  }

  // Asks for an early check, because requests fail. A message that is left out follows with a later request.
  [[gnu::cold]] void want_check(BackendId backend) {
    if (now < next_check_wanted_ns) return;
    next_check_wanted_ns = now + kCheckPause;
    shared.ask_check(backend);
  }

  // The time to first byte of the server at a backend's address, as this thread measured it, smoothed with weight 1/8.
  // 0 if nothing was measured within kLatencyLife: one slow response, for instance a model's cold load, must not keep
  // requests away for good.
  Ns latency_of(const BackendView& backend) const {
    if (index_of(backend.id) >= latencies.size()) return 0;
    const Latency& latency = latencies[index_of(backend.id)];
    const bool stale = latency.server != backend.circuit->server() || now - latency.seen_at_ns > kLatencyLife;
    return stale ? 0 : latency.smoothed_ns;
  }
  void note_latency(const BackendView& backend, Ns seen_ns) {
    if (!make_room(latencies, index_of(backend.id))) return;  // it stays unknown
    Latency& latency = latencies[index_of(backend.id)];
    if (latency.server > backend.circuit->server()) return;  // the backend has another address by now
    const Ns before_ns = latency_of(backend);
    latency = {backend.circuit->server(), before_ns == 0 ? seen_ns : before_ns + (seen_ns - before_ns) / 8, now};
  }

  // The Date line for a response that begins now.
  std::string_view date_line() {
    if (date.is_due(now)) date.write(now, net.wall_now());
    return date.view();
  }

  // Sets `id` to the client's own X-Request-Id if it is usable, else to a new one.
  void take_request_id(const char* base, const FieldTable* fields, std::string& id) {
    const FieldRow* row = fields == nullptr ? nullptr : find_field(*fields, Field::x_request_id);
    if (row != nullptr && is_request_id(value_of(base, *row))) {
      id.clear();
      id.assign(value_of(base, *row));
      return;
    }
    std::array<std::uint64_t, 4> digits;
    for (std::size_t i = 0; i < digits.size(); i += 2) {
      const std::uint64_t bits = random.next();
      digits[i] = hex_digits_of(static_cast<std::uint32_t>(bits));
      digits[i + 1] = hex_digits_of(static_cast<std::uint32_t>(bits >> 32));
    }
    id.clear();  // if memory is short, the request has no id
    id.append(reinterpret_cast<const char*>(digits.data()), sizeof digits);
  }

  // Logs that this host lacks what a connection to a backend needs; at most one line in kLackLogInterval.
  [[gnu::cold]] void log_lack(SocketOutcome outcome) {
    if (lack_of(outcome).empty() || now < next_lack_log_ns) return;
    next_lack_log_ns = now + kLackLogInterval;
    log.event(LogLevel::warning, "cannot connect to backends", {{"why", lack_of(outcome)}});
  }

  // Logs a request for something that Nexus does not serve; at most one line in kStrayLogInterval, over all workers.
  [[gnu::cold]] void log_stray(std::string_view message, std::string_view client, std::string_view method,
                               std::string_view path) {
    Ns next_ns = shared.next_stray_log_ns.load(std::memory_order_relaxed);
    if (now < next_ns) return;
    if (!shared.next_stray_log_ns.compare_exchange_strong(next_ns, now + kStrayLogInterval)) return;
    log.event(LogLevel::info, message, {{"client", client}, {"method", method}, {"path", path}});
  }

  // Frees what was not needed since the last call. Returns its size, in bytes.
  std::size_t trim() {
    return blocks.trim() + response_heads.trim() + request_texts.trim() + trace_texts.trim() +
           incremental_readers.trim();
  }
  // For the tests: objects of requests.
  std::size_t taken_objects() const {
    return response_heads.taken() + request_texts.taken() + trace_texts.taken() + incremental_readers.taken();
  }

  Net& net;
  Shared& shared;
  Slab& slab;
  Log& log;
  std::uint32_t worker;
  Ns now;  // read when a wait ends, and each kFreshEvents
  TimerWheel wheel;
  BlockPool blocks;
  Block scratch_block;
  KnownLines known_lines;
  ObjectPool<HeadParts<ResponseHead>> response_heads;
  ObjectPool<RequestText> request_texts;
  ObjectPool<TraceTexts> trace_texts;
  ObjectPool<IncrementalJson> incremental_readers;
  JsonReader json;
  ThreadBudget budget;
  Random random;
  SnapshotUse snapshot;
  std::uint64_t turn = 0;  // requests routed
  bool watches = false;    // requests leave a line in the access log, spans, an exemplar, or are judged
  bool draining = false;
  bool events_fresh = false;  // all were noted that came before the last wait's end, and that was just now
  bool keeps_exemplars = false;
  DateLine date;
  Ns next_lack_log_ns = 0;
  Ns next_failure_log_ns = 0;
  std::uint64_t failures_left_out = 0;  // since the last such line
  struct Latency {
    std::uint64_t server = 0;
    Ns smoothed_ns = 0;
    Ns seen_at_ns = 0;
  };
  Ns next_check_wanted_ns = 0;
  std::vector<Latency> latencies;  // by BackendId
  AttemptLog attempt_log;
  std::vector<Choice> choices;       // of the route being picked
  std::vector<std::uint32_t> again;  // slots of the sessions that are scheduled for another turn
  std::vector<std::uint32_t> running;
  std::vector<Handle> next_turns;  // by slot; none if it is not scheduled
  std::string text;                // heads and errors are written here; reserved, so that an error needs no memory
  std::string trace_lines;         // of the request that is being composed
};

}  // namespace nexus
