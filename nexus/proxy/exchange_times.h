// exchange_times.h
// Owns:     the times of one exchange: its limits (of its state, of the whole request, of the queue, of the client's
//           reading), and those that were measured, with the rest of its metrics record and of its log entry.
// Promises: entering a state sets the deadline that belongs to it; a client's time starts anew only if it took
//           bytes; each wait has the limit that is configured when it begins. The overhead is taken once, of the
//           response's first bytes, without the waits for the queue, for a connection, and for a backend to take the
//           rest of the request; the duration ends when the kernel took the last.
// Leaves:   what a passed deadline means, when to count, and the names in the log entry, to exchange.h.
// Threads:  a part of one exchange.
// Tested by: tests/sim, tests/e2e/limits.test.mjs, tests/hostile, tests/first_event_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/base/limits.h"
#include "nexus/metrics/slab.h"
#include "nexus/os/log.h"
#include "nexus/proxy/exchange_state.h"
#include "nexus/proxy/request_trace.h"
#include "nexus/proxy/response.h"

namespace nexus {

struct ExchangeSummary {
  // The request, from its head and body.
  std::string_view method;
  std::string_view path;
  std::string_view client_name;
  std::string request_id;
  std::string model;  // as the client asked for it

  RequestRecord record;
  Ns started_ns = 0;
  Ns complete_ns = 0;                   // when the request's body was complete
  Ns ended_ns = -1;                     // when the kernel took the last byte
  Ns wait_began_ns = -1;                // -1: it does not wait
  Ns waited_ns = 0;                     // for others: a place, a connection, a backend that takes no more bytes
  Ns queued_ns = 0, connecting_ns = 0;  // of these
  RequestTrace trace;
  bool overhead_noted = false;
  bool cut_short = false;

  // Prepares for the next request, and keeps the memory of the strings.
  void reset() {
    request_id.clear();
    model.clear();
    record = RequestRecord{};
    started_ns = complete_ns = waited_ns = queued_ns = connecting_ns = 0;
    trace.reset();
    ended_ns = wait_began_ns = -1;
    overhead_noted = cut_short = false;
  }

  // The request was sent whole to the first backend.
  void note_request_sent(Ns sent_ns) { record.overhead_ns = sent_ns - complete_ns - waited_ns; }

  // The time between the two is a wait, not a part of the overhead.
  void begin_wait(Ns now) { wait_began_ns = now; }
  void end_wait(ExchangeState state, Ns now) {
    if (wait_began_ns < 0) return;
    const Ns span = now - std::exchange(wait_began_ns, -1);
    waited_ns += span;
    if (state == ExchangeState::queued) queued_ns += span;
    if (state == ExchangeState::connecting) connecting_ns += span;
  }

  // Bytes of the response that were received at `received_ns` were sent on at `sent_ns`; the first call counts.
  void note_response_sent(Ns received_ns, Ns sent_ns) {
    if (overhead_noted) return;
    overhead_noted = true;
    if (record.overhead_ns >= 0) record.overhead_ns += sent_ns - received_ns;
  }

  // The line of the access log, but for the backend. `first_ns` is -1 if the response said nothing.
  AccessEntry access_entry(Ns first_ns, std::uint64_t sent_bytes) const {
    AccessEntry entry;
    entry.wall_ns = wall_now();
    entry.request_id = request_id;
    entry.client = client_name;
    entry.method = method;
    entry.path = path;
    entry.model = model;
    entry.status = record.status;
    const ErrorType error = error_of(record);
    if (error != ErrorType::none) entry.error_type = name_of(error);
    entry.bytes = sent_bytes;
    entry.prompt_tokens = record.prompt_tokens;
    entry.completion_tokens = record.completion_tokens;
    entry.first_byte_ns = first_ns < 0 ? -1 : first_ns - started_ns;
    entry.duration_ns = record.duration_ns;
    entry.cut = cut_short;
    entry.stream = record.stream;
    entry.cached_tokens = record.cached_tokens;
    entry.queue_ns = queued_ns;
    entry.connect_ns = connecting_ns;
    if (trace.state != RequestTrace::State::none) entry.trace_id = {trace.id.data(), trace.id.size()};
    return entry;
  }
};

template <class Net>
class ExchangeDeadlines {
 public:
  using Context = WorkerContext<Net>;

  ExchangeDeadlines(Context& context, ClientResponse<Net>& client) : context_(context), client_(client) {}
  ExchangeDeadlines(const ExchangeDeadlines&) = delete;
  ExchangeDeadlines& operator=(const ExchangeDeadlines&) = delete;

  void reset() { state_ = request_ = expecting_ = queue_ = write_ = first_byte_ = kNever; }

  Ns next() const { return std::min(state_, request_); }
  bool request_expired() const { return context_.now >= request_; }
  // True if request_timeout is the limit that passed, and not one of the state, which passed before it.
  bool request_passed_first() const { return request_expired() && request_ <= state_; }
  bool queue_expired() const { return context_.now >= queue_; }
  bool state_pending() const { return state_ != kNever && context_.now < state_; }

  // The [upstream] request_timeout starts, if there is one.
  void arm_request() {
    const Ns limit = upstream().request_timeout_ns;
    if (limit > 0) request_ = after(limit);
  }

  void enter(ExchangeState state) {
    state_ = kNever;
    switch (state) {
      case ExchangeState::connecting: state_ = after(upstream().connect_timeout_ns); break;
      case ExchangeState::sending:
      case ExchangeState::awaiting: arm_first_byte(); break;
      case ExchangeState::holding: arm_hold(upstream().head_delay_ns); break;
      case ExchangeState::streaming: arm_stall(); break;
      case ExchangeState::finishing:
        request_ = kNever;  // from here on only the client's own time counts
        arm_write();
        break;
      case ExchangeState::counting: request_ = kNever; break;
      default: break;
    }
  }

  // However often a request waits for a backend's first check, it waits no longer than for a connection.
  bool expecting_expired() const { return context_.now >= expecting_; }
  void arm_expecting() {
    if (expecting_ == kNever) expecting_ = after(upstream().connect_timeout_ns);
    state_ = expecting_;
  }

  // However often a request is queued, it has one queue timeout, which starts with the first wait.
  void arm_queue(bool recheck_ejected) {
    if (queue_ == kNever) queue_ = after(context_.settings().queue.timeout_ns);
    state_ = recheck_ejected ? std::min(queue_, context_.now + kRecheckEjected) : queue_;
  }

  void arm_first_byte() { state_ = first_byte_ = after(upstream().first_byte_timeout_ns); }
  // The backend has first_byte_timeout until its response says something; from then on, stall_timeout.
  bool awaits_first() const { return first_byte_ != kNever; }
  bool first_byte_expired() const { return context_.now >= first_byte_; }
  void note_first() { first_byte_ = kNever; }

  // The backend has taken more of the request, though its response has begun.
  void note_sent_on(ExchangeState state) {
    if (!awaits_first() && state == ExchangeState::streaming) return arm_stall();
    if (!awaits_first()) return;
    const Ns before = std::exchange(first_byte_, after(upstream().first_byte_timeout_ns));
    if (state_ == before) state_ = first_byte_;
  }

  // A response is held back for `span`, within the time that the backend has.
  void arm_hold(Ns span) { state_ = std::min(first_byte_, after(span)); }

  // Time runs for the client while bytes wait for it, else for the backend.
  void arm_stall() {
    if (client_.waits()) return arm_write();
    client_.forget_waiting();
    state_ = awaits_first() ? first_byte_ : after(upstream().stall_timeout_ns);
  }

  // The client took bytes, or may take some: if its time ran, the backend's begins once none wait.
  void note_taken() {
    if (state_ == write_) arm_stall();
  }

  void arm_write() {
    if (client_.has_moved()) write_ = after(context_.settings().server.write_timeout_ns);
    state_ = write_;
  }

  void arm_count_retry() { state_ = context_.now + kCountRetry; }
  void expire_state() { state_ = kNever; }

 private:
  const UpstreamSettings& upstream() const { return context_.settings().upstream; }
  Ns after(Ns span) const { return deadline_after(context_.now, span); }

  Context& context_;
  ClientResponse<Net>& client_;
  Ns state_ = kNever;
  Ns request_ = kNever;
  Ns expecting_ = kNever;
  Ns queue_ = kNever;
  Ns write_ = kNever;
  Ns first_byte_ = kNever;
};

}  // namespace nexus
