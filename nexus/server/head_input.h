// head_input.h
// Owns:     how far the head of a session's next request has been read.
// Promises: each byte is parsed once, however the head is cut; one empty line before the request line is skipped
//           (RFC 9112 2.2); no byte behind the first `most_bytes` of a head is looked at.
// Leaves:   the grammar to http/head_parser.h, time limits and errors to session_driver.h.
// Threads:  a part of one session.
// Tested by: tests/hostile_requests_test.cpp, tests/sim
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "nexus/base/buffer.h"
#include "nexus/base/object_pool.h"
#include "nexus/http/head_parser.h"

namespace nexus {

class HeadInput {
 public:
  enum class Status : std::uint8_t {
    need_more,
    done,
    malformed,
    bad_version,
    target_too_long,
    too_large,
    out_of_memory
  };

  bool started() const { return started_; }      // a first byte of the request line was seen
  std::string_view why() const { return why_; }  // after `malformed`: a constant text

  // Reads the bytes that are new in `input`; `fields` are taken from `tables` with the first of them.
  Status read(Buffer& input, ObjectPool<FieldTable>& tables, ObjectPool<FieldTable>::Lease& fields, RequestHead& head,
              std::size_t most_bytes) {
    skip_empty_line(input);
    if (input.size() == parsed_) return Status::need_more;
    if (!started_) {
      fields = tables.take();
      if (!fields) return Status::out_of_memory;
      started_ = true;
      reader_.start(fields.get());
    }
    const bool over = parsed_ > most_bytes;  // a reload has lowered the limit meanwhile
    parsed_ = input.size();
    const HeadResult result = over ? HeadResult{} : reader_.feed(input.data(), std::min(parsed_, most_bytes), head);
    if (result.status == HeadResult::Status::done) return Status::done;
    if (result.status == HeadResult::Status::need_more) {
      if (parsed_ < most_bytes) return Status::need_more;
      return reader_.line_bytes() == 0 ? Status::target_too_long : Status::too_large;
    }
    why_ = result.why;
    if (result.error == HeadError::bad_version) return Status::bad_version;
    return result.error == HeadError::too_many_fields ? Status::too_large : Status::malformed;
  }

  // Prepares for the next request.
  void reset() {
    parsed_ = 0;
    started_ = line_skipped_ = false;
  }

 private:
  void skip_empty_line(Buffer& input) {
    if (started_ || line_skipped_ || input.empty() || input.view()[0] != '\r') return;
    if (input.size() == 1) {
      parsed_ = 1;
      return;
    }
    parsed_ = 0;
    if (input.view()[1] != '\n') return;
    input.consume(2);
    line_skipped_ = true;
  }

  RequestReader reader_;
  std::size_t parsed_ = 0;  // bytes of the input that the reader has seen
  bool started_ = false;
  bool line_skipped_ = false;
  std::string_view why_;
};

}  // namespace nexus
