// multipart.h
// Owns:     reading a multipart/form-data request (RFC 7578, RFC 2046 5.1) while it arrives: its fields `model` and
//           `stream`, wherever they stand between the files.
// Promises: the same result however the body is cut; the bytes of a file are searched once, and none is copied; a field
//           that Nexus reads may occur once only, because a backend might read the other one; nothing is allocated.
// Leaves:   the body's memory and its limit to proxy/request_body.h; every other field to the backend.
// Threads:  a scan belongs to one thread.
// Tested by: tests/multipart_test.cpp, tests/fuzz/multipart.h
#pragma once

#include <string.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "nexus/api/request_json.h"
#include "nexus/base/limits.h"
#include "nexus/base/text.h"

namespace nexus {

namespace detail {

// Cuts the next parameter, `name=value` or `name="value"`, off a field's value (RFC 9110 5.6.6). False at its end. The
// value of a quoted string comes without its quotes, and with its escapes.
inline bool next_parameter(std::string_view& rest, std::string_view& name, std::string_view& value) {
  const std::size_t semicolon = rest.find(';');
  if (semicolon == std::string_view::npos) return false;
  rest = trim_blanks(rest.substr(semicolon + 1));
  const std::size_t equals = std::min(rest.find_first_of("=;"), rest.size());
  name = trim_blanks(rest.substr(0, equals));
  value = {};
  rest.remove_prefix(equals);
  if (!rest.starts_with('=')) return true;
  rest = trim_blanks(rest.substr(1));
  if (!rest.starts_with('"')) {
    value = trim_blanks(rest.substr(0, std::min(rest.find(';'), rest.size())));
    rest.remove_prefix(std::min(rest.find(';'), rest.size()));
    return true;
  }
  std::size_t end = 1;
  while (end < rest.size() && rest[end] != '"') end += rest[end] == '\\' ? 2 : 1;
  end = std::min(end, rest.size());
  value = rest.substr(1, end - 1);
  rest.remove_prefix(end);
  return true;
}

}  // namespace detail

// The boundary of a multipart/form-data body; empty if `content_type` is another type, or its boundary is not one of 1
// to kMaxBoundaryBytes bytes (RFC 2046 5.1.1).
inline std::string_view boundary_of(std::string_view content_type) {
  constexpr std::string_view kType = "multipart/form-data";
  if (!starts_with_ignoring_case(content_type, kType)) return {};
  std::string_view rest = content_type.substr(kType.size()), name, value;
  if (!rest.empty() && rest.front() != ';' && trim_blanks(rest).substr(0, 1) != ";") return {};
  while (detail::next_parameter(rest, name, value)) {
    if (!equals_ignoring_case(name, "boundary")) continue;
    const bool fits = value.size() <= kMaxBoundaryBytes && value.find_first_of("\"\\\r\n") == std::string_view::npos;
    return fits ? value : std::string_view();
  }
  return {};
}

class MultipartScan {
 public:
  // Prepares for another body. `boundary`: as boundary_of() returns it.
  void start(std::string_view boundary) {
    *this = MultipartScan();
    assert(boundary.size() <= kMaxBoundaryBytes);
    constexpr std::string_view kBegin = "\r\n--";
    kBegin.copy(delimiter_.data(), kBegin.size());
    delimiter_bytes_ = kBegin.size() + boundary.copy(delimiter_.data() + kBegin.size(), boundary.size());
    if (boundary.empty()) in_ = In::broken;
  }

  // `body`: everything received so far. It may have moved since the last call, but its earlier bytes are unchanged.
  void feed(const char* body, std::size_t bytes) {
    const std::string_view text(body, bytes);
    while (step(text)) {
    }
  }

  // The body is complete. The model is found, and `facts` filled, or the error is returned.
  std::optional<ApiError> read(std::string_view body, const Endpoint& endpoint, BodyFacts& facts) {
    facts = BodyFacts{};
    feed(body.data(), body.size());
    if (in_ != In::epilogue) return ApiError::bad_multipart;
    if (twice_) return ApiError::duplicate_key;
    facts.model_is_json = false;
    facts.model_value = model_.value_or(BodySpan{});
    facts.model = body.substr(facts.model_value.at, std::min(facts.model_value.bytes, kCutNameBytes));
    if (facts.model.empty() && (endpoint.model == Model::required || model_)) return ApiError::no_model;
    facts.stream = stream_ && endpoint.streams != Streams::never && body.substr(stream_->at, stream_->bytes) == "true";
    return std::nullopt;
  }

 private:
  enum class In : std::uint8_t {
    preamble,   // before the first delimiter
    delimiter,  // behind one: blanks and CRLF, or the `--` that ends the body
    head,       // of a part
    content,    // of a part
    epilogue,   // behind the last delimiter: anything
    broken,
  };

  // True if the next step can be taken; false if more bytes are needed, or nothing more matters.
  bool step(std::string_view text) {
    switch (in_) {
      case In::preamble: return find_first(text);
      case In::delimiter: return read_delimiter(text);
      case In::head: return read_head(text);
      case In::content: return find_end(text);
      case In::epilogue:
      case In::broken: return false;
    }
    return false;
  }

  bool go(In in, std::size_t at) {
    in_ = in;
    at_ = searched_ = at;
    return true;
  }
  bool fail() { return go(In::broken, at_) && false; }

  std::string_view delimiter() const { return {delimiter_.data(), delimiter_bytes_}; }

  // The place of `what` from searched_ on. What was searched is not searched again.
  std::size_t find(std::string_view text, std::string_view what) {
    const std::size_t found = text.find(what, searched_);
    if (found == std::string_view::npos && text.size() >= what.size()) {
      searched_ = std::max(searched_, text.size() - what.size() + 1);
    }
    return found;
  }

  // The first delimiter may stand at the very beginning, without the line end before it.
  bool find_first(std::string_view text) {
    const std::string_view first = delimiter().substr(2);
    if (text.size() < first.size()) return false;
    if (at_ == 0 && text.starts_with(first)) return go(In::delimiter, first.size());
    const std::size_t found = find(text, delimiter());
    return found != std::string_view::npos && go(In::delimiter, found + delimiter_bytes_);
  }

  bool read_delimiter(std::string_view text) {
    std::size_t at = at_;
    if (text.substr(at, 2) == "--") {
      end_part();
      return go(In::epilogue, at + 2);
    }
    while (at < text.size() && (text[at] == ' ' || text[at] == '\t')) ++at;
    if (text.size() - at < 2) return at - at_ > kMaxPartHeadBytes && fail();
    if (text.substr(at, 2) != "\r\n") return at == at_ ? pass_false_delimiter() : fail();
    end_part();
    if (++parts_ > kMaxParts) return fail();
    return go(In::head, at);  // with the line end before it, so that an empty head ends like any other
  }

  // A longer text that begins like the delimiter is a part of the content.
  bool pass_false_delimiter() { return go(content_at_ ? In::content : In::preamble, at_); }

  bool read_head(std::string_view text) {
    const std::size_t end = find(text, "\r\n\r\n");
    const bool found = end != std::string_view::npos;
    if ((found ? end : text.size()) - at_ > kMaxPartHeadBytes) return fail();
    if (!found) return false;
    is_file_ = false;
    field_ = nullptr;
    const std::size_t from = std::min(at_ + 2, end);
    read_fields(text.substr(from, end - from));
    content_at_ = end + 4;
    go(In::content, end + 4);
    searched_ = end + 2;  // the content may be empty: its delimiter begins with the head's last line end
    return true;
  }

  void read_fields(std::string_view head) {
    constexpr std::string_view kName = "content-disposition";
    while (!head.empty()) {
      const std::string_view line = head.substr(0, head.find("\r\n"));
      head.remove_prefix(std::min(line.size() + 2, head.size()));
      const std::size_t colon = line.find(':');
      if (colon == std::string_view::npos || !equals_ignoring_case(trim_blanks(line.substr(0, colon)), kName)) continue;
      std::string_view rest = line.substr(colon + 1), name, value;
      while (detail::next_parameter(rest, name, value)) {
        if (equals_ignoring_case(name, "filename") || equals_ignoring_case(name, "filename*")) is_file_ = true;
        if (equals_ignoring_case(name, "name")) field_ = field_of(value);
      }
    }
  }

  static std::optional<BodySpan> MultipartScan::*field_of(std::string_view name) {
    return name == "model" ? &MultipartScan::model_ : name == "stream" ? &MultipartScan::stream_ : nullptr;
  }

  bool find_end(std::string_view text) {
    const std::size_t found = find(text, delimiter());
    if (found == std::string_view::npos) return false;
    const std::size_t behind = found + delimiter_bytes_;
    if (text.size() - behind < 2) return false;  // it may be the beginning of a longer text
    const char next = text[behind];
    const bool is_delimiter = next == '\r' || next == ' ' || next == '\t' || text.substr(behind, 2) == "--";
    if (!is_delimiter) {
      searched_ = behind;
      return true;
    }
    content_end_ = found;
    return go(In::delimiter, behind);
  }

  void end_part() {
    if (field_ == nullptr || is_file_) return;
    std::optional<BodySpan>& field = this->*field_;
    twice_ |= field.has_value();
    field = BodySpan{*content_at_, content_end_ - std::min(*content_at_, content_end_)};
  }

  In in_ = In::preamble;
  std::size_t at_ = 0;                     // where the present part of the body begins
  std::size_t searched_ = 0;               // what is searched for does not begin before
  std::optional<std::size_t> content_at_;  // of the open part
  std::size_t content_end_ = 0;
  std::size_t parts_ = 0;
  bool is_file_ = false;                                     // the open part has a file name
  std::optional<BodySpan> MultipartScan::*field_ = nullptr;  // that the open part's content becomes
  std::optional<BodySpan> model_, stream_;
  bool twice_ = false;  // one of the two
  std::array<char, kMaxBoundaryBytes + 4> delimiter_{};
  std::size_t delimiter_bytes_ = 0;
};

}  // namespace nexus
