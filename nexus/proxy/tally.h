// tally.h
// Owns:     what is known of a request when it is over: its metrics record, its times, what the access log says of it.
// Promises: an overhead is told once, of the answer's first bytes; a duration ends when the kernel took the last one.
// Leaves:   when to count it, and the names in the log's line, to exchange.h.
// Threads:  parts of one exchange.
#pragma once

#include <cstdint>

#include "nexus/metrics/slab.h"
#include "nexus/os/log.h"

namespace nexus {

struct Tally {
  RequestRecord record;
  Ns started_ns = 0;
  Ns complete_ns = 0;  // when its body was whole
  Ns ended_ns = -1;    // when the kernel took the last byte
  bool overhead_noted = false;
  bool cut_short = false;

  // The request was sent whole, to the first backend that was tried.
  void note_request_sent(Ns sent_ns) { record.overhead_ns = sent_ns - complete_ns; }

  // What came at `came_ns` of the answer went on at `sent_ns`; the first of it counts.
  void note_answer_sent(Ns came_ns, Ns sent_ns) {
    if (overhead_noted) return;
    overhead_noted = true;
    if (record.overhead_ns >= 0) record.overhead_ns += sent_ns - came_ns;
  }

  // The numbers of the log's line; `first_body_ns` is -1 where no body came.
  AccessEntry access_entry(Ns first_body_ns, std::uint64_t sent_bytes) const {
    AccessEntry entry;
    entry.status = record.status;
    const ErrorType error = error_of(record);
    if (error != ErrorType::none) entry.error_type = name_of(error);
    entry.bytes = sent_bytes;
    entry.prompt_tokens = record.prompt_tokens;
    entry.completion_tokens = record.completion_tokens;
    entry.first_byte_ns = first_body_ns < 0 ? -1 : first_body_ns - started_ns;
    entry.duration_ns = record.duration_ns;
    entry.cut = cut_short;
    return entry;
  }
};

}  // namespace nexus
