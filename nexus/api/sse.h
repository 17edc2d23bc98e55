// sse.h
// Owns:     the lines of an event stream (WHATWG HTML, 9.2.5 and 9.2.6): where an event begins and ends, and the text
//           of its `data` lines, however the bytes are cut.
// Promises: LF, CRLF and a lone CR end a line; a byte order mark, comments and other fields are no data; nothing is
//           kept but a few counters; no byte is changed.
// Leaves:   what the data means to usage_scan.h.
// Threads:  a reader belongs to one thread.
#pragma once

#include <emmintrin.h>

#include <bit>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "nexus/base/buffer.h"

namespace nexus {

namespace detail {

constexpr std::size_t kLane = 16;  // bytes that one SSE2 register holds
static_assert(kPaddingBytes > 2 * kLane, "the loops below load whole lanes behind the last byte");

inline __m128i load_lane(const char* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
inline __m128i where_equal(__m128i lane, char byte) { return _mm_cmpeq_epi8(lane, _mm_set1_epi8(byte)); }
inline unsigned mask_of(__m128i lane) { return static_cast<unsigned>(_mm_movemask_epi8(lane)); }

// The marks of a lane that lie before `end`.
inline unsigned before_end(unsigned mask, const char* at, const char* end) {
  const auto left = static_cast<std::size_t>(end - at);
  return left >= kLane ? mask : mask & ((1u << left) - 1);
}

// The first byte in [at, end) that is one of two, or `end`.
inline const char* find_either(const char* at, const char* end, char one, char other) {
  for (; at < end; at += kLane) {
    const __m128i lane = load_lane(at);
    const __m128i hits = _mm_or_si128(where_equal(lane, one), where_equal(lane, other));
    const unsigned mask = before_end(mask_of(hits), at, end);
    if (mask != 0) return at + std::countr_zero(mask);
  }
  return end;
}

}  // namespace detail

// Just behind the first blank line in [at, end), which begins at a line's start; null where there is none. Where the
// blank line is a CRLF that is behind its CR: the LF then reads as one more blank line. A lane behind `end` must be
// readable.
inline const char* find_event_end(const char* at, const char* end) {
  using namespace detail;
  for (; at < end; at += kLane) {
    const __m128i first = load_lane(at);
    const __m128i second = load_lane(at + 1);
    const __m128i first_cr = where_equal(first, '\r');
    const __m128i second_cr = where_equal(second, '\r');
    // LF LF, LF CR and CR CR are two line ends; CR LF is one.
    const __m128i after_lf =
        _mm_and_si128(where_equal(first, '\n'), _mm_or_si128(where_equal(second, '\n'), second_cr));
    const __m128i pairs = _mm_or_si128(after_lf, _mm_and_si128(first_cr, second_cr));
    const unsigned mask = before_end(mask_of(pairs), at, end - 1);
    if (mask != 0) return at + std::countr_zero(mask) + 2;
  }
  return nullptr;
}

class SseReader {
 public:
  enum class Step : std::uint8_t {
    need_more,       // all was read
    event_begins,    // at stands on its first byte; blank lines and comments before it are no part of it
    data_begins,     // the next `data` line of this event: its text is joined to the last one's by a LF
    data,            // a part of this line's text
    event_ends,      // at stands behind its blank line
    late_line_feed,  // the LF of the blank line that ended the last event came now; at stands behind it
  };

  // Reads on from `at` to the next thing to tell. A lane behind `end` must be readable.
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
          at = detail::find_either(at, end, '\r', '\n');
          text = {from, static_cast<std::size_t>(at - from)};
          if (!text.empty()) return Step::data;
          end_line(at);
          break;
        }
        case In::other:
        case In::comment:
          at = detail::find_either(at, end, '\r', '\n');
          if (at < end) end_line(at);
          break;
      }
    }
    return Step::need_more;
  }

  // Nothing of an event was read, nor half of a line end: whole events may be stepped over.
  bool between_events() const {
    return in_ == In::line_start && !event_open_ && after_cr_ == AfterCr::none && mark_read_ == kByteOrderMark.size();
  }

  bool event_open() const { return event_open_; }
  // The open event, or the one that ended last, holds a line that is no `data`.
  bool other_lines() const { return other_lines_; }

  // The stream ended: what stands open is over.
  void finish() {
    if (in_ == In::name && name_read_ < kData.size()) other_lines_ = true;
    event_open_ = false;
    in_ = In::line_start;
  }

 private:
  enum class AfterCr : std::uint8_t { none, line, event };  // a LF that comes next belongs to which line end
  enum class In : std::uint8_t { line_start, name, value_start, value, other, comment };
  static constexpr std::string_view kData = "data";
  static constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";

  // The mark may stand before the first line, and is no part of it. True where only its beginning came: those bytes
  // then began a line of a field that nobody knows.
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

  // The LF behind a CR, if it is one. True where it belongs to an event that is over.
  bool read_line_feed(const char*& at) {
    const bool late = after_cr_ == AfterCr::event;
    after_cr_ = AfterCr::none;
    if (*at != '\n') return false;
    ++at;
    return late;
  }

  // need_more where there is nothing to tell.
  Step begin_line(const char*& at, const char* end) {
    if (*at == '\r' || *at == '\n') return end_event(at, end);
    if (*at == ':' && !event_open_) {
      in_ = In::comment;
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

  // True where a `data` line began.
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
  std::uint8_t name_read_ = 0;  // bytes of `data` that were found
  std::uint8_t mark_read_ = 0;  // bytes of the byte order mark that were found, or all: it was looked for
  bool event_open_ = false;
  bool other_lines_ = false;
};

}  // namespace nexus
