// sse.h
// Owns:      the lines of an event stream (WHATWG HTML 9.2.5, 9.2.6): where an event begins and ends, and the text of
//            its `data` lines, however the bytes are cut.
// Promises:  LF, CRLF and a lone CR end a line; a byte order mark, comments and other fields are not data; nothing is
//            kept but a few counters; no byte is changed.
// Leaves:    the meaning of the data to usage_scan.h.
// Threads:   a reader belongs to one thread.
// Tested by: tests/usage_scan_test.cpp, tests/fuzz/usage.h
#pragma once

#include <bit>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "nexus/base/buffer.h"
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
    need_more,       // everything was read
    event_begins,    // `at` is its first byte; blank lines and comments before it do not belong to it
    data_begins,     // the next `data` line of this event: a LF joins its text to that of the line before
    data,            // a part of this line's text
    event_ends,      // `at` is behind its blank line
    late_line_feed,  // the LF of the blank line that ended the last event; `at` is behind it
  };

  // Reads from `at` to the next step. A lane behind `end` must be readable.
  Step next(const char*& at, const char* end, std::string_view& text) {
    if (mark_read_ < kByteOrderMark.size() && read_mark(at, end)) return Step::event_begins;
    while (at < end) {
      if (after_cr_ != AfterCr::none && read_line_feed(at)) return Step::late_line_feed;
      if (at == end) break;
      switch (in_) {
        case In::line_start: {
          const Step step = begin_line(at, end);
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
        case In::other:
          at = find_either(at, end, '\r', '\n');
          if (at < end) end_line(at);
          break;
      }
    }
    return Step::need_more;
  }

  // True outside of events and line ends: the caller may skip whole events.
  bool between_events() const {
    return in_ == In::line_start && !event_open_ && after_cr_ == AfterCr::none && mark_read_ == kByteOrderMark.size();
  }

  bool event_open() const { return event_open_; }
  // The open event, or the last one, has a line other than `data`.
  bool other_lines() const { return other_lines_; }

  // The stream ended, and so does an open event.
  void finish() {
    if (in_ == In::name && name_read_ < kData.size()) other_lines_ = true;
    event_open_ = false;
    in_ = In::line_start;
  }

 private:
  enum class AfterCr : std::uint8_t { none, line, event };  // the line end to which a LF that follows belongs
  enum class In : std::uint8_t { line_start, name, value_start, value, other };
  static constexpr std::string_view kData = "data";
  static constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";

  // Skips a byte order mark before the first line. True if only a part of the mark came: those bytes begin a line with
  // an unknown field.
  bool read_mark(const char*& at, const char* end) {
    while (at < end && mark_read_ < kByteOrderMark.size() && *at == kByteOrderMark[mark_read_]) {
      ++at;
      ++mark_read_;
    }
    if (at == end || mark_read_ == kByteOrderMark.size()) return false;
    const bool junk = mark_read_ > 0;
    mark_read_ = kByteOrderMark.size();
    if (!junk) return false;
    event_open_ = true;
    begin_other_line();
    return true;
  }

  // Skips the LF of a CRLF. True if it belongs to an event that has ended.
  bool read_line_feed(const char*& at) {
    const bool late = after_cr_ == AfterCr::event;
    after_cr_ = AfterCr::none;
    if (*at != '\n') return false;
    ++at;
    return late;
  }

  // need_more: nothing to report yet.
  Step begin_line(const char*& at, const char* end) {
    if (*at == '\r' || *at == '\n') return end_event(at, end);
    if (*at == ':' && !event_open_) {  // a comment outside of events
      in_ = In::other;
      return Step::need_more;
    }
    in_ = In::name;
    name_read_ = 0;
    if (event_open_) return Step::need_more;
    event_open_ = true;
    other_lines_ = false;
    return Step::event_begins;
  }

  Step end_event(const char*& at, const char* end) {
    const bool ended = event_open_;
    event_open_ = false;
    end_line(at);
    if (!ended) return Step::need_more;
    if (after_cr_ != AfterCr::none && at < end) read_line_feed(at);
    if (after_cr_ != AfterCr::none) after_cr_ = AfterCr::event;
    return Step::event_ends;
  }

  // True if a `data` line begins.
  bool read_name(const char*& at) {
    if (name_read_ < kData.size()) {
      if (*at == kData[name_read_]) {
        ++name_read_;
        ++at;
      } else {
        begin_other_line();
      }
      return false;
    }
    if (*at == ':') {
      ++at;
      in_ = In::value_start;
      return true;
    }
    if (*at != '\r' && *at != '\n') {
      begin_other_line();
      return false;
    }
    in_ = In::value;  // a name without a colon is a field with no text
    return true;
  }

  void begin_other_line() {
    in_ = In::other;
    other_lines_ = true;
  }

  void end_line(const char*& at) {
    after_cr_ = *at == '\r' ? AfterCr::line : AfterCr::none;
    ++at;
    in_ = In::line_start;
  }

  In in_ = In::line_start;
  AfterCr after_cr_ = AfterCr::none;
  std::uint8_t name_read_ = 0;  // bytes of the name `data` found so far
  std::uint8_t mark_read_ = 0;  // bytes of the byte order mark found so far; all of them: not expected any more
  bool event_open_ = false;
  bool other_lines_ = false;
};

}  // namespace nexus
