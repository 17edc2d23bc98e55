// head_input.h
// Owns:     how far the head of a session's next request has been read.
// Promises: each byte is parsed once, however the head is cut; one empty line before the request line is skipped
//           (RFC 9112 2.2); no byte behind the first `most_bytes` of a head is looked at; a head has at most
//           `most_fields` fields.
// Leaves:   the grammar to http/head_parser.h, time limits and responses to session_driver.h.
// Threads:  a part of one session.
// Tested by: tests/hostile_requests_test.cpp, tests/sim
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

#include "nexus/api/errors.h"
#include "nexus/base/buffer.h"
#include "nexus/base/object_pool.h"
#include "nexus/http/head_parser.h"
#include "nexus/metrics/slab.h"

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
    too_many_fields,
    out_of_memory
  };

  bool started() const { return started_; }      // a first byte of the request line was seen
  std::string_view why() const { return why_; }  // after `malformed`: a constant text

  // Reads the bytes that are new in `input`; `fields` are taken from `tables` with the first of them.
  Status read(Buffer& input, ObjectPool<FieldTable>& tables, ObjectPool<FieldTable>::Lease& fields, RequestHead& head,
              std::size_t most_bytes, std::size_t most_fields) {
    skip_empty_line(input);
    if (input.size() == parsed_) return Status::need_more;
    if (!started_) {
      fields = tables.take();
      if (!fields) return Status::out_of_memory;
      started_ = true;
      reader_.start(fields.get(), most_fields);
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
    return result.error == HeadError::too_many_fields ? Status::too_many_fields : Status::malformed;
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

// How a head that can't be read is refused and counted.
struct HeadRefusal {
  ApiError error;
  std::optional<HttpRejection> counted;
  std::optional<Limit> limit;
};

// In the order of HeadInput::Status, from `malformed` on.
inline constexpr std::array<HeadRefusal, 6> kHeadRefusals{{
    {ApiError::malformed, HttpRejection::malformed, {}},
    {ApiError::bad_version, HttpRejection::malformed, {}},
    {ApiError::target_too_long, HttpRejection::header_too_large, Limit::max_header},
    {ApiError::header_too_large, HttpRejection::header_too_large, Limit::max_header},
    {ApiError::too_many_fields, HttpRejection::header_too_large, Limit::max_fields},
    {ApiError::out_of_memory, {}, Limit::memory},
}};

constexpr const HeadRefusal& refusal_of(HeadInput::Status status) {
  return kHeadRefusals[static_cast<std::size_t>(status) - static_cast<std::size_t>(HeadInput::Status::malformed)];
}
static_assert(refusal_of(HeadInput::Status::too_large).error == ApiError::header_too_large &&
              refusal_of(HeadInput::Status::out_of_memory).error == ApiError::out_of_memory);

}  // namespace nexus
