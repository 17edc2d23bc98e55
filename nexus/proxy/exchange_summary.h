// exchange_summary.h
// Owns:     the facts about a request that are known when it is over: its metrics record, its times, its log entry.
// Promises: the overhead is taken once, of the response's first bytes, without the waits for the queue and for a
//           connection; the duration ends when the kernel took the last.
// Leaves:   when to count it, and the names in its log entry, to exchange.h.
// Threads:  a part of one exchange.
// Tested by: tests/sim, tests/hostile, tests/first_event_test.cpp
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "nexus/metrics/slab.h"
#include "nexus/os/log.h"

namespace nexus {

struct ExchangeSummary {
  // The request, from its head and body.
  std::string_view path;
  std::string_view client_name;
  std::string request_id;
  std::string model;  // as the client asked for it

  RequestRecord record;
  Ns started_ns = 0;
  Ns complete_ns = 0;  // when the request's body was complete
  Ns ended_ns = -1;    // when the kernel took the last byte
  Ns wait_began_ns = 0;
  Ns waited_ns = 0;  // for others: a place, a connection
  bool overhead_noted = false;
  bool cut_short = false;

  // Prepares for the next request, and keeps the memory of the strings.
  void reset() {
    request_id.clear();
    model.clear();
    record = RequestRecord{};
    started_ns = complete_ns = waited_ns = 0;
    ended_ns = -1;
    overhead_noted = cut_short = false;
  }

  // The request was sent whole to the first backend.
  void note_request_sent(Ns sent_ns) { record.overhead_ns = sent_ns - complete_ns - waited_ns; }

  // The time between the two is a wait, not a part of the overhead.
  void begin_wait(Ns now) { wait_began_ns = now; }
  void end_wait(Ns now) { waited_ns += now - wait_began_ns; }

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
    entry.method = "POST";
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
    return entry;
  }
};

}  // namespace nexus
