// upstream_request.h
// Owns:     the bytes of a request as a backend gets it: a new head, and the client's body with a few values replaced.
// Promises: a large body is never copied; the request can be sent from any offset on, and again to another backend.
// Leaves:   reading the body to api/request_json.h, sending to attempt.h.
// Threads:  a part of one exchange.
// Tested by: tests/courses_test.cpp, tests/hostile, tests/sim, tests/e2e/usage.test.mjs
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/api/incremental_json.h"
#include "nexus/api/multipart.h"
#include "nexus/api/request_json.h"
#include "nexus/base/limits.h"
#include "nexus/fleet/registry.h"
#include "nexus/http/head_writer.h"

namespace nexus {

// The request in the session's input; it stays in place until the response begins.
struct RequestView {
  const char* base = nullptr;  // the head's first byte
  const RequestHead* head = nullptr;
  const FieldTable* fields = nullptr;
  char* body = nullptr;
  std::size_t body_bytes = 0;
  std::uint32_t withheld = 0;  // a set of its fields that no backend gets
};

// The readers of a body that may have read it while it came.
struct BodyReaders {
  IncrementalJson* json = nullptr;     // null: it is read at once
  MultipartScan* multipart = nullptr;  // null: it is no form
};

// A request as a list of pieces of two texts: `own` (the head, then the values inserted into the body) and the client's
// body.
class UpstreamRequest {
 public:
  static constexpr std::size_t kMaxPieces = 8;

  void clear() {
    count_ = 0;
    total_ = 0;
  }
  void add_own(std::size_t at, std::size_t bytes) { add(false, at, bytes); }
  void add_body(std::size_t at, std::size_t bytes) { add(true, at, bytes); }
  std::size_t total() const { return total_; }

  // Fills `out` with the bytes from offset `sent` to `end`; returns the number of parts.
  std::size_t fill(std::array<iovec, kMaxPieces>& out, char* own, char* body, std::size_t sent, std::size_t end) const {
    std::size_t filled = 0;
    std::size_t begin = 0;  // offset of the piece
    for (std::size_t i = 0; i < count_ && begin < end; begin += pieces_[i++].bytes) {
      const Piece& piece = pieces_[i];
      const std::size_t from = std::max(sent, begin), to = std::min(end, begin + piece.bytes);
      if (from < to) out[filled++] = {(piece.of_body ? body : own) + piece.at + (from - begin), to - from};
    }
    return filled;
  }

 private:
  struct Piece {
    bool of_body;
    std::size_t at;
    std::size_t bytes;
  };

  void add(bool of_body, std::size_t at, std::size_t bytes) {
    if (bytes == 0) return;
    total_ += bytes;
    if (count_ > 0 && pieces_[count_ - 1].of_body == of_body &&
        pieces_[count_ - 1].at + pieces_[count_ - 1].bytes == at) {
      pieces_[count_ - 1].bytes += bytes;  // continues the last piece
      return;
    }
    assert(count_ < kMaxPieces);
    pieces_[count_++] = {of_body, at, bytes};
  }

  std::array<Piece, kMaxPieces> pieces_;
  std::size_t count_ = 0;
  std::size_t total_ = 0;
};

// A request as an attempt sends it: the bytes that are not of the client's body, and the order of both.
struct RequestText {
  std::string own;
  UpstreamRequest image;
};

// Replaces `removed` bytes at `at` of the client's body by `inserted`.
struct BodyEdit {
  std::size_t at = 0;
  std::size_t removed = 0;
  std::string_view inserted;
};

// The fields of the request that this backend does not get: the client's key, if Nexus has one for it.
inline std::uint32_t withheld_from(const BackendView& backend, const RequestView& request) {
  return request.withheld | (backend.has_key ? kCredentials : 0);
}
// True if it gets a key of the client's own.
inline bool passes_credentials(const RequestView& request, const BackendView& backend) {
  const std::uint32_t passed = kCredentials & ~withheld_from(backend, request);
  return std::any_of(request.fields->begin(), request.fields->end(),
                     [passed](const FieldRow& row) { return (bit_of(row.field) & passed) != 0; });
}

// True if Nexus asks this backend for token counts that the client did not ask for.
inline bool asks_for_usage(const Endpoint& endpoint, const BackendView& backend, const BodyFacts& facts) {
  return backend.ask_usage && facts.stream && endpoint.row().takes_stream_options &&
         facts.include_usage != BodyFacts::Flag::yes && !backend.facts->refuses_stream_options();
}

// The edit that sets `"include_usage": true` in stream_options.
inline BodyEdit usage_edit(const BodyFacts& facts) {
  switch (facts.stream_options) {
    case BodyFacts::Options::absent: return {facts.first_member, 0, R"("stream_options":{"include_usage":true},)"};
    case BodyFacts::Options::null:
      return {facts.stream_options_value.at, facts.stream_options_value.bytes, R"({"include_usage":true})"};
    case BodyFacts::Options::object: break;
  }
  if (facts.include_usage != BodyFacts::Flag::absent) {
    return {facts.include_usage_value.at, facts.include_usage_value.bytes, "true"};
  }
  const std::string_view member = facts.stream_options_empty ? R"("include_usage":true)" : R"("include_usage":true,)";
  return {facts.stream_options_value.at + 1, 0, member};
}

// Writes the request for `backend` into `out`. `model`: the name that the backend knows, empty if it is the client's
// own.
inline void compose_request(RequestText& out, const RequestView& request, const BodyFacts& facts,
                            const BackendView& backend, std::string_view model, bool ask_usage,
                            std::string_view request_id, std::string_view own_lines) {
  std::string& own = out.own;
  UpstreamRequest& image = out.image;
  // Up to three edits, in the order of the body; one that edits nothing stands for none.
  std::string model_json;
  if (!model.empty()) model_json = facts.model_is_json ? json_string(model) : std::string(model);
  std::array<BodyEdit, 3> edits{};
  if (!model.empty()) edits[0] = {facts.model_value.at, facts.model_value.bytes, model_json};
  if (ask_usage) {
    edits[1] = usage_edit(facts);
    if (const BodySpan& value = facts.continuous_usage_value; value.bytes > 0)
      edits[2] = {value.at, value.bytes, "false"};
    std::sort(edits.begin(), edits.end(), [](const BodyEdit& a, const BodyEdit& b) { return a.at < b.at; });
  }
  UpstreamHead head;
  head.method = method_name(request.head->method);
  head.target = request.head->target(request.base);
  head.base_path = backend.base_path;
  head.backend_lines = backend.request_lines;
  head.withheld = withheld_from(backend, request);
  head.request_id = request_id;
  head.own_lines = own_lines;
  head.content_length = request.body_bytes;
  for (const BodyEdit& edit : edits) head.content_length += edit.inserted.size() - edit.removed;
  own.clear();
  append_request_head(own, HeadView{request.base, request.fields, request.head->head_bytes}, head);
  image.clear();
  image.add_own(0, own.size());
  // A small body is copied behind the head: send() costs less than sendmsg().
  const bool copy = request.body_bytes <= kCopiedBodyBytes;
  const auto add_body = [&](std::size_t at, std::size_t bytes) {
    if (!copy) return image.add_body(at, bytes);
    image.add_own(own.size(), bytes);
    own.append(request.body + at, bytes);
  };
  std::size_t at = 0;
  for (const BodyEdit& edit : edits) {
    if (edit.at == 0) continue;  // before the body's `{`: none
    add_body(at, edit.at - at);
    image.add_own(own.size(), edit.inserted.size());
    own += edit.inserted;
    at = edit.at + edit.removed;
  }
  add_body(at, request.body_bytes - at);
}

}  // namespace nexus
