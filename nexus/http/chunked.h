// chunked.h
// Owns:     the chunked transfer coding (RFC 9112 7.1), decoded in place.
// Promises: exactly the RFC's grammar: CRLF line ends, 1 to 16 hex digits, extensions that are a name or a name and a
//           value, with blanks around `;` and `=` (its "bad white space"); each line and the trailer section are
//           bounded; extensions and trailers are checked and dropped; it may be fed byte by byte; bytes after the end
//           are not touched.
// Leaves:   what a failure means to its caller. (llhttp reads heads only, so one strict decoder decides on framing.)
// Threads:  a decoder belongs to its connection.
// Tested by: tests/chunked_test.cpp, tests/fuzz/chunked.h (against tests/lib/rfc9112.h)
#pragma once

#include <cassert>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "nexus/base/limits.h"
#include "nexus/base/text.h"

namespace nexus {

class ChunkedDecoder {
 public:
  enum class Status : std::uint8_t { need_more, done, failed };
  struct Result {
    Status status = Status::need_more;
    std::size_t consumed = 0;  // bytes of this body, out of those given
    std::size_t decoded = 0;   // payload bytes, moved to the front
  };

  // Reads `bytes` at `data` and moves their payload to `data`.
  Result decode(char* data, std::size_t bytes) {
    Result result;
    while (result.consumed < bytes && state_ != State::done && state_ != State::failed) {
      if (state_ == State::data) {
        const std::size_t left = bytes - result.consumed;
        const std::size_t take = remaining_ < left ? static_cast<std::size_t>(remaining_) : left;
        if (result.decoded != result.consumed) std::memmove(data + result.decoded, data + result.consumed, take);
        result.decoded += take;
        result.consumed += take;
        remaining_ -= take;
        if (remaining_ == 0) state_ = State::data_cr;
      } else {
        step(data[result.consumed]);
        result.consumed += 1;
      }
    }
    result.status = state_ == State::done ? Status::done : state_ == State::failed ? Status::failed : Status::need_more;
    return result;
  }

 private:
  enum class State : std::uint8_t {
    size_first,  // the first digit of a chunk size
    size,        // the other digits
    size_blank,  // blanks after the size; a `;` must follow
    extension,   // after `;`, and blanks after it
    extension_name,
    extension_name_blank,  // blanks after the name; a `;` or `=` must follow
    extension_equals,      // after `=`, and blanks after it
    extension_value,
    extension_quoted,
    extension_escape,     // after a backslash in a quoted value
    extension_quote_end,  // after the closing quote
    extension_end_blank,  // blanks after the value; a `;` must follow
    size_lf,              // the LF of the size line
    data,                 // remaining_ bytes of payload
    data_cr,              // the CRLF after the payload
    data_lf,
    trailer_start,  // the first byte of a trailer line, or of the empty line that ends the body
    trailer_name,
    trailer_value,
    trailer_lf,
    last_lf,  // the LF of the empty line
    done,
    failed,
  };

  static constexpr std::string_view kTokenMarks = "!#$%&'*+-.^_`|~";
  static bool is_token(char c) {  // RFC 9110 5.6.2
    const char lower = to_lower(c);
    return is_digit(c) || (lower >= 'a' && lower <= 'z') || kTokenMarks.find(c) != std::string_view::npos;
  }

  static bool is_blank(char c) { return c == ' ' || c == '\t'; }

  void step(char c) {
    switch (state_) {
      case State::size_first:
      case State::size: return on_size(c);
      case State::size_blank:
      case State::extension:
      case State::extension_name:
      case State::extension_name_blank:
      case State::extension_equals:
      case State::extension_value:
      case State::extension_quoted:
      case State::extension_escape:
      case State::extension_quote_end:
      case State::extension_end_blank: return on_extension(c);
      case State::size_lf: return go(c == '\n', remaining_ == 0 ? State::trailer_start : State::data);
      case State::data_cr: return go(c == '\r', State::data_lf);
      case State::data_lf: return go(c == '\n', State::size_first);
      case State::trailer_start:
      case State::trailer_name:
      case State::trailer_value: return on_trailer(c);
      case State::trailer_lf: return go(c == '\n', State::trailer_start);
      case State::last_lf: return go(c == '\n', State::done);
      case State::data:
      case State::done:
      case State::failed: assert(false);
    }
  }

  void go(bool allowed, State next) { state_ = allowed ? next : State::failed; }
  void fail() { state_ = State::failed; }

  void on_size(char c) {
    const bool first = state_ == State::size_first;
    if (first) line_bytes_ = 0;
    if (++line_bytes_ > kMaxChunkLineBytes) return fail();
    if (!first && c == '\r') return go(true, State::size_lf);
    if (!first && c == ';') return go(true, State::extension);
    if (!first && is_blank(c)) return go(true, State::size_blank);
    const int value = hex_value(c);
    // At most 16 digits, and below 2^63 after this one: a size can't wrap.
    if (value < 0 || line_bytes_ > 16 || remaining_ >= std::uint64_t{1} << 59) return fail();
    remaining_ = remaining_ << 4 | static_cast<std::uint64_t>(value);
    state_ = State::size;
  }

  void on_extension(char c) {
    if (++line_bytes_ > kMaxChunkLineBytes || ++extension_bytes_ > kMaxChunkExtensionBytes) return fail();
    const bool blank = is_blank(c);
    switch (state_) {
      case State::extension: return go(blank || is_token(c), blank ? state_ : State::extension_name);
      case State::extension_equals:
        if (blank) return;
        return go(c == '"' || is_token(c), c == '"' ? State::extension_quoted : State::extension_value);
      case State::extension_quoted:
        if (c == '"') return go(true, State::extension_quote_end);
        return go(is_field_text(c), c == '\\' ? State::extension_escape : State::extension_quoted);
      case State::extension_escape: return go(is_field_text(c), State::extension_quoted);
      default: break;
    }
    // After a size, a name or a value: the line's end, the next extension, or blanks before that.
    if (c == ';') return go(true, State::extension);
    const bool in_name = state_ == State::extension_name || state_ == State::extension_name_blank;
    if (c == '=') return go(in_name, State::extension_equals);
    const bool in_blanks =
        state_ == State::size_blank || state_ == State::extension_name_blank || state_ == State::extension_end_blank;
    if (blank) return in_blanks ? void() : go(true, in_name ? State::extension_name_blank : State::extension_end_blank);
    if (c == '\r') return go(!in_blanks, State::size_lf);
    go(!in_blanks && state_ != State::extension_quote_end && is_token(c), state_);
  }

  void on_trailer(char c) {
    if (state_ == State::trailer_start && c == '\r') return go(true, State::last_lf);
    if (++trailer_bytes_ > kMaxTrailerBytes) return fail();
    if (state_ == State::trailer_value)
      return go(c == '\r' || is_field_text(c), c == '\r' ? State::trailer_lf : state_);
    if (state_ == State::trailer_name && c == ':') return go(true, State::trailer_value);
    go(is_token(c), State::trailer_name);
  }

  std::uint64_t remaining_ = 0;  // of the chunk; 0 at the beginning of a size
  std::uint32_t line_bytes_ = 0;
  std::uint32_t extension_bytes_ = 0;
  std::uint32_t trailer_bytes_ = 0;
  State state_ = State::size_first;
};

}  // namespace nexus
