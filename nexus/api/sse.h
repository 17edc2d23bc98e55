// sse.h
// Owns:      the lines of an event stream (WHATWG HTML 9.2.5, 9.2.6): where an event begins and ends, and the text of
//            its `data` lines, however the bytes are cut; the same of newline-delimited JSON, a line an event.
// Promises:  LF, CRLF and a lone CR end a line; a byte order mark, comments and other fields are not data; nothing is
//            kept but a few counters; no byte is changed.
// Leaves:    the meaning of the data to usage_scan.h.
// Threads:   a reader belongs to one thread.
// Tested by: tests/usage_scan_test.cpp, tests/fuzz/usage.h
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "nexus/base/buffer.h"
#include "nexus/base/limits.h"
#include "nexus/base/simd.h"

namespace nexus {

static_assert(kPaddingBytes > 2 * kLaneBytes, "the searches load whole lanes behind the last byte");

// Returns the position behind the first blank line in [at, end), or null if there is none; `at` must begin a line. If
// the blank line is a CRLF, the position is behind its CR: the LF then reads as another blank line. A lane behind `end`
// must be readable.
inline const char* find_event_end(const char* at, const char* end) {
  for (; at < end; at += kLaneBytes) {
    const Lane first(at), second(at + 1);
    const Lane second_cr = second.equal('\r');
    // LF LF, LF CR and CR CR are two line ends; CR LF is one.
    const Lane pairs = (first.equal('\n') & (second.equal('\n') | second_cr)) | (first.equal('\r') & second_cr);
    const unsigned mask = before_end(pairs.mask(), at, end - 1);
    if (mask != 0) return at + std::countr_zero(mask) + 2;
  }
  return nullptr;
}

class SseReader {
 public:
  enum class Step : std::uint8_t {
    need_more,     // everything was read
    event_begins,  // `at` is its first byte; blank lines and comments before it do not belong to it
    data_begins,   // the next `data` line of this event: a LF joins its text to that of the line before
    data,          // a part of this line's text
    event_ends,    // `at` is behind its blank line
  };

  // Reads from `at` to the next step. A lane behind `end` must be readable.
  Step next(const char*& at, const char* end, std::string_view& text) {
    while (at < end) {
      if (std::exchange(after_cr_, false) && *at == '\n') {
        ++at;
        continue;
      }
      switch (in_) {
        case In::mark:
          if (read_mark(at)) return Step::event_begins;
          break;
        case In::line_start: {
          const Step step = begin_line(at);
          if (step != Step::need_more) return step;
          break;
        }
        case In::name:
          if (read_name(at)) return Step::data_begins;
          break;
        case In::value_start:
          if (*at == ' ') ++at;
          in_ = In::value;
          break;
        case In::value: {
          const char* from = at;
          at = find_either(at, end, '\r', '\n');
          text = {from, static_cast<std::size_t>(at - from)};
          if (!text.empty()) return Step::data;
          end_line(at);
          break;
        }
        case In::error_line: read_error_line(at); break;
        case In::blank_line_cr:
          if (*at == '\n') ++at;
          return end_event();
        case In::other:
          at = find_either(at, end, '\r', '\n');
          if (at < end) end_line(at);
          break;
      }
    }
    return Step::need_more;
  }

  // True outside of events and line ends: the caller may skip whole events.
  bool between_events() const { return in_ == In::line_start && !event_open_ && !after_cr_; }

  // The open event is complete, but for a LF that may belong to it.
  bool event_complete() const { return in_ == In::blank_line_cr; }
  // The open event, or the last one, has `event: error`, or a field named `error` (llama.cpp until 2025).
  bool error_line() const { return error_line_; }

  // The stream ended. True if that ends an event.
  bool finish() { return std::exchange(event_open_, false); }

 private:
  // mark: before the first line, perhaps in a byte order mark; other: in a line that is not `data`; error_line: in one
  // that may be kErrorEvent or kErrorField; blank_line_cr: behind the CR that ends an event, to which a LF would
  // belong.
  enum class In : std::uint8_t { mark, line_start, name, value_start, value, other, error_line, blank_line_cr };
  static constexpr std::string_view kData = "data";
  static constexpr std::string_view kErrorEvent = "event: error";  // the blank is optional
  static constexpr std::string_view kErrorField = "error:";
  static constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";

  // True if only a part of the byte order mark came: those bytes begin a line with an unknown field.
  bool read_mark(const char*& at) {
    if (*at == kByteOrderMark[matched_]) {
      ++at;
      if (++matched_ == kByteOrderMark.size()) in_ = In::line_start;
      return false;
    }
    in_ = In::line_start;
    if (matched_ == 0) return false;
    event_open_ = true;
    in_ = In::other;
    return true;
  }

  // need_more: nothing to report yet.
  Step begin_line(const char*& at) {
    if (*at == '\r' || *at == '\n') {
      if (!event_open_) {
        end_line(at);
      } else if (*at++ == '\n') {
        return end_event();
      } else {
        in_ = In::blank_line_cr;
      }
      return Step::need_more;
    }
    if (*at == ':' && !event_open_) {  // a comment outside of events
      in_ = In::other;
      return Step::need_more;
    }
    in_ = In::name;
    matched_ = 0;
    if (event_open_) return Step::need_more;
    event_open_ = true;
    error_line_ = false;
    return Step::event_begins;
  }

  Step end_event() {
    event_open_ = false;
    in_ = In::line_start;
    return Step::event_ends;
  }

  // True if a `data` line begins.
  bool read_name(const char*& at) {
    if (matched_ < kData.size() && *at == kData[matched_]) {
      ++matched_;
      ++at;
      return false;
    }
    // A name without a colon is a field with no text.
    const bool has_colon = *at == ':';
    if (matched_ < kData.size() || !(has_colon || *at == '\r' || *at == '\n')) {
      in_ = matched_ == 0 ? In::error_line : In::other;
      is_error_field_ = false;
      return false;
    }
    if (has_colon) ++at;
    in_ = has_colon ? In::value_start : In::value;
    return true;
  }

  // Reads a byte of a line that is kErrorEvent or begins with kErrorField so far. A name `data` was not begun.
  void read_error_line(const char*& at) {
    const std::string_view wanted = is_error_field_ ? kErrorField : kErrorEvent;
    if (matched_ == wanted.size()) {
      error_line_ |= is_error_field_ || *at == '\r' || *at == '\n';
      in_ = In::other;
    } else if (*at == wanted[matched_]) {
      ++matched_;
      ++at;
    } else if (matched_ == 1 && !is_error_field_) {
      is_error_field_ = true;
    } else if (wanted[matched_] == ' ') {
      ++matched_;
    } else {
      in_ = In::other;
    }
  }

  void end_line(const char*& at) {
    after_cr_ = *at++ == '\r';
    in_ = In::line_start;
  }

  In in_ = In::mark;
  bool after_cr_ = false;     // a line ended with a CR: a LF that follows belongs to it
  std::uint8_t matched_ = 0;  // bytes of the byte order mark, of the name `data` or of an error line found so far
  bool event_open_ = false;
  bool error_line_ = false;
  bool is_error_field_ = false;  // what is read may be kErrorField, and not kErrorEvent
};

// Newline-delimited JSON, read as an event stream: each line that is not empty is an event with that text as its data.
class LineReader {
 public:
  using Step = SseReader::Step;

  Step next(const char*& at, const char* end, std::string_view& text) {
    if (!open_) {
      while (at < end && (*at == '\n' || *at == '\r')) ++at;
      if (at == end) return Step::need_more;
      open_ = true;
      return Step::event_begins;
    }
    if (at == end) return Step::need_more;
    const char* const from = at;
    at = find_either(at, end, '\n', '\n');
    text = {from, static_cast<std::size_t>(at - from)};
    if (!text.empty()) return Step::data;
    ++at;
    open_ = false;
    return Step::event_ends;
  }

  bool between_events() const { return false; }
  bool event_complete() const { return false; }
  bool in_line() const { return open_; }
  bool finish() { return std::exchange(open_, false); }

 private:
  bool open_ = false;
};

}  // namespace nexus
