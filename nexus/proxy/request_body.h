// request_body.h
// Owns:     a client's request body while it is received: how much has come, its share of the memory, its limits.
// Promises: the budget is charged for the bytes that have come, not for those that were announced; memory grows with
//           them; a chunked body is decoded in place, behind the head; no byte behind the body's end is touched; a
//           large body is read while it comes; a body that has begun must go on (kLeastBodyBytes).
// Leaves:   reading the socket to server/session_driver.h, the meaning to api/request_json.h, api/incremental_json.h.
// Threads:  one worker's.
// Tested by: tests/courses_test.cpp, tests/hostile_requests_test.cpp, tests/sim, tests/e2e/limits.test.mjs
#pragma once

#include <algorithm>
#include <cassert>
#include <cstring>
#include <optional>

#include "nexus/api/errors.h"
#include "nexus/api/multipart.h"
#include "nexus/base/limits.h"
#include "nexus/http/chunked.h"
#include "nexus/http/head_parser.h"
#include "nexus/proxy/upstream_request.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {

// A larger body is read while it comes; a smaller one is still in the processor's cache when its last byte comes, and
// is read in one pass, which costs less.

template <class Net>
class RequestBody {
 public:
  enum class Status : std::uint8_t { need_more, whole, refused };
  struct Step {
    Status status;
    ApiError refusal{};  // if refused
  };

  explicit RequestBody(WorkerContext<Net>& core) : context_(core) {}
  RequestBody(const RequestBody&) = delete;
  RequestBody& operator=(const RequestBody&) = delete;

  std::size_t bytes() const { return bytes_; }  // decoded so far
  // What has read the body while it came.
  BodyReaders readers() { return {incremental_.get(), is_form_ ? &multipart_ : nullptr}; }

  // The error that is known from the head alone, if any. `client`: a hash of the client's address. `most_bytes` holds
  // for the whole body.
  std::optional<ApiError> begin(const Endpoint& endpoint, const RequestHead& head, const HeadView& view,
                                std::size_t client, std::size_t most_bytes) {
    endpoint_ = &endpoint;
    client_ = client;
    is_form_ = false;
    if (endpoint.body >= BodyFormat::multipart) {
      const FieldRow* row = find_field(*view.fields, Field::content_type);
      const std::string_view type = row == nullptr ? "" : value_of(view.base, *row);
      is_form_ = endpoint.body == BodyFormat::multipart || !starts_with_ignoring_case(type, "application/json");
      if (is_form_) multipart_.start(boundary_of(type));
    }
    bytes_ = looked_at_bytes_ = 0;
    most_bytes_ = most_bytes;
    until_ns_ = deadline_after(context_.now, context_.settings().server.body_timeout_ns);
    next_look_ns_ = kNever;
    decoder_ = ChunkedDecoder();
    if (head.framing.kind != Framing::Kind::length) return std::nullopt;
    if (head.framing.length > most_bytes) return too_large();
    const std::size_t length = static_cast<std::size_t>(head.framing.length);
    if (length > kIncrementalBytes && !context_.budget.has_room(length)) return no_share();
    return std::nullopt;
  }

  // How much room to make: the missing rest of a body of known length, else as much again as is held. Up to
  // kCopiedInputBytes the memory is not much more than what has come: a client may announce much and send nothing. A
  // larger buffer grows eightfold: memory that is never written costs nothing, and copying would hold up the loop.
  std::size_t room_wanted(const RequestHead& head, const Buffer& input, std::size_t least_bytes) const {
    const std::size_t held = input.size();
    const bool small = held < kCopiedInputBytes;
    if (head.framing.kind == Framing::Kind::length) {
      const std::size_t rest = head.head_bytes + static_cast<std::size_t>(head.framing.length) - held;
      if (input.room() >= std::min(rest, least_bytes)) return input.room();
      return small ? std::min(rest, kCopiedInputBytes) : rest;
    }
    if (input.room() >= least_bytes) return input.room();
    return std::max(small ? held : std::min(7 * held, most_bytes_), least_bytes);
  }

  // When to call has_time(): at once if the first byte has just come.
  Ns deadline() {
    if (bytes_ > 0 && next_look_ns_ == kNever) next_look_ns_ = deadline_after(context_.now, kBodyLook);
    return std::min(until_ns_, next_look_ns_);
  }
  // Called at the deadline. False if the client was too slow: body_timeout has passed, or too little has come.
  bool has_time() {
    if (context_.now >= until_ns_ || bytes_ - looked_at_bytes_ < kLeastBodyBytes) return false;
    looked_at_bytes_ = bytes_;
    next_look_ns_ = deadline_after(context_.now, kBodyLook);
    return true;
  }

  // Reads the new bytes of `input`, which begins with the head.
  Step read(const RequestHead& head, Buffer& input) {
    switch (head.framing.kind) {
      case Framing::Kind::none: return {Status::whole};
      case Framing::Kind::length: {
        const std::size_t length = static_cast<std::size_t>(head.framing.length);
        bytes_ = std::min(length, input.size() - head.head_bytes);
        if (!share_.grow_to(context_.budget, bytes_, client_)) return {Status::refused, no_share()};
        if (length > kIncrementalBytes && !read_new(input.data() + head.head_bytes)) return no_memory();
        return {bytes_ == length ? Status::whole : Status::need_more};
      }
      case Framing::Kind::chunked: return decode(head.head_bytes, input);
      case Framing::Kind::until_close: break;
    }
    assert(false);
    return {Status::need_more};
  }

  // The whole body was read.
  void end_incremental() { incremental_.reset(); }
  // The body is no longer in `input`. Prepares for the next one.
  void reset() {
    incremental_.reset();
    share_.give_back();
    bytes_ = 0;
  }

 private:
  // Decodes the new bytes in place: the payload follows the head, then come the bytes that the decoder has not seen.
  Step decode(std::size_t head_bytes, Buffer& input) {
    const std::size_t decoded_end = head_bytes + bytes_;
    const std::size_t fresh = input.size() - decoded_end;
    if (fresh == 0) return {Status::need_more};
    if (!share_.grow_to(context_.budget, std::min(bytes_ + fresh, most_bytes_), client_)) {
      return {Status::refused, no_share()};
    }
    char* data = input.data() + decoded_end;
    const ChunkedDecoder::Result result = decoder_.decode(data, fresh);
    bytes_ += result.decoded;
    if (result.status == ChunkedDecoder::Status::failed) return {Status::refused, ApiError::malformed};
    if (bytes_ > most_bytes_) return {Status::refused, too_large()};
    const std::size_t behind = fresh - result.consumed;
    std::memmove(data + result.decoded, data + result.consumed, behind);
    input.truncate(decoded_end + result.decoded + behind);
    if (bytes_ > kIncrementalBytes && !read_new(input.data() + head_bytes)) return no_memory();
    return {result.status == ChunkedDecoder::Status::done ? Status::whole : Status::need_more};
  }

  // Reads the new bytes of a large body. False if there is no memory for its reader.
  bool read_new(const char* body) {
    if (endpoint_->body == BodyFormat::none) return true;
    if (is_form_) {
      multipart_.feed(body, bytes_);
      return true;
    }
    if (!incremental_) {
      incremental_ = context_.incremental_readers.take();
      if (!incremental_) return false;
      incremental_->start(*endpoint_);
    }
    incremental_->feed(context_.json, body, bytes_);
    return true;
  }

  ApiError too_large() {
    context_.slab.limit_hit(Limit::max_body);
    return ApiError::body_too_large;
  }
  ApiError no_share() {
    context_.slab.limit_hit(Limit::body_memory);
    return ApiError::body_memory;
  }
  Step no_memory() {
    context_.slab.limit_hit(Limit::memory);
    return {Status::refused, ApiError::out_of_memory};
  }

  WorkerContext<Net>& context_;
  std::size_t client_ = 0;
  const Endpoint* endpoint_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t most_bytes_ = 0;  // [server] max_body when the head came
  Ns until_ns_ = kNever;        // for the whole body
  Ns next_look_ns_ = kNever;    // for the next kLeastBodyBytes
  std::size_t looked_at_bytes_ = 0;
  ChunkedDecoder decoder_;
  BodyShare share_;
  typename ObjectPool<IncrementalJson>::Lease incremental_;  // of a large body
  MultipartScan multipart_;
  bool is_form_ = false;  // the body is read by it
};

}  // namespace nexus
