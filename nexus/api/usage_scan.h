// usage_scan.h
// Owns:     the token counts of an answer, read while it passes; the extra usage event that Nexus asked a backend for,
//           taken out of the stream for a client that had not.
// Promises: what it says and what goes on are the same however the bytes are cut; a plain body is never held or
//           changed; in a stream only an event that may yet be the extra one is held, up to kHeldEventBytes; nothing is
//           allocated but for what is cut between two pieces.
// Leaves:   which bodies to read to the exchange; the lines of a stream to sse.h; the counts themselves to
// request_json.h. Threads:  a scan belongs to one thread.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>

#include "nexus/api/request_json.h"
#include "nexus/api/sse.h"
#include "nexus/base/buffer.h"

namespace nexus {

constexpr std::size_t kUsageBytes = 16u << 10;      // a larger `usage` is none: real ones are a few hundred bytes
constexpr std::size_t kHeldEventBytes = 16u << 10;  // a larger event is not the extra one, and is not held

// The members of one JSON object, read in any cuts: where does `usage` lie, and is `choices` an empty list? Only the
// outermost level is understood; deeper ones are stepped over by their brackets. Escaped keys are not undone.
class MemberScan {
 public:
  enum class Step : std::uint8_t {
    need_more,
    usage_begins,  // at stands behind its `{`
    usage_ends,    // at stands behind its `}`
  };

  // A lane behind `end` must be readable.
  Step next(const char*& at, const char* end) {
    while (at < end) {
      switch (in_) {
        case In::nested: {
          at = skip_nested(at, end);
          if (depth_ > 0) break;
          in_ = In::after_value;
          if (std::exchange(in_usage_, false)) return Step::usage_ends;
          break;
        }
        case In::key: read_key(at, end); break;
        case In::text: skip_text(at, end); break;
        case In::scalar:
          while (at < end && *at != ',' && *at != '}') ++at;
          if (at < end) in_ = In::after_value;
          break;
        case In::broken: at = end; break;
        default: {
          const char mark = *at++;
          if (mark != ' ' && mark != '\n' && mark != '\r' && mark != '\t' && read_mark(mark)) return Step::usage_begins;
        }
      }
    }
    return Step::need_more;
  }

  // A line end between two lines of data: white space, but not inside a string.
  void line_break() {
    if (in_ == In::key || in_ == In::text || (in_ == In::nested && in_string_)) in_ = In::broken;
    if (in_ == In::scalar) in_ = In::after_value;
  }

  bool in_usage() const { return in_usage_; }
  // One object stood there, whole, and nothing behind it.
  bool is_object() const { return in_ == In::closed; }
  // It was an object with a `usage` and an empty `choices`, and no other `choices`.
  bool is_usage_event() const { return is_object() && usage_found_ && choices_empty_ && !choices_other_; }
  // It can't be that any more, whatever comes.
  bool is_other_event() const { return in_ == In::broken || choices_other_ || (is_object() && !is_usage_event()); }

 private:
  enum class In : std::uint8_t {
    opening,       // before the `{`
    member,        // before a key or the `}`
    key,           // in a key
    colon,         // behind a key
    value,         // before a value
    first_choice,  // behind the `[` of `choices`
    text,          // in a string that is a value
    scalar,        // in a number, true, false or null
    nested,        // in a list or an object
    after_value,   // before `,` or `}`
    closed,        // behind the `}`
    broken,        // this is no JSON object
  };
  static constexpr std::size_t kLongestKey = 7;

  // Reads a byte between two tokens. True where a `usage` object begins.
  bool read_mark(char mark) {
    switch (in_) {
      case In::opening: in_ = mark == '{' ? In::member : In::broken; break;
      case In::member: begin_member(mark); break;
      case In::colon: in_ = mark == ':' ? In::value : In::broken; break;
      case In::value: return begin_value(mark);
      case In::first_choice:
        choices_empty_ = true;
        if (mark == ']')
          in_ = In::after_value;
        else
          begin_first_choice(mark);
        break;
      case In::after_value: in_ = mark == ',' ? In::member : mark == '}' ? In::closed : In::broken; break;
      default: in_ = In::broken; break;
    }
    return false;
  }

  void begin_member(char mark) {
    key_bytes_ = 0;
    in_ = mark == '"' ? In::key : mark == '}' ? In::closed : In::broken;
  }

  bool begin_value(char mark) {
    const std::string_view key(key_, key_bytes_ <= kLongestKey ? key_bytes_ : 0);
    if (key == "choices" && mark != '[') choices_other_ = true;
    if (key == "choices" && mark == '[') {
      in_ = In::first_choice;
      return false;
    }
    if (mark == '{' || mark == '[') {
      begin_nested(1);
      in_usage_ = mark == '{' && key == "usage";
      usage_found_ = usage_found_ || in_usage_;
      return in_usage_;
    }
    in_ = mark == '"' ? In::text : mark == ',' || mark == '}' || mark == ']' || mark == ':' ? In::broken : In::scalar;
    return false;
  }

  void begin_first_choice(char mark) {
    choices_other_ = true;
    begin_nested(mark == '{' || mark == '[' ? 2 : 1);
    in_string_ = mark == '"';
    if (mark == '}') in_ = In::broken;
  }

  void begin_nested(std::size_t depth) {
    in_ = In::nested;
    depth_ = depth;
    in_string_ = false;
  }

  void read_key(const char*& at, const char* end) {
    while (at < end) {
      const char byte = *at++;
      if (escaped_)
        escaped_ = false;
      else if (byte == '\\')
        escaped_ = true;
      else if (byte == '"') {
        in_ = In::colon;
        return;
      }
      if (key_bytes_ < kLongestKey) key_[key_bytes_] = byte;
      if (key_bytes_ <= kLongestKey) ++key_bytes_;
    }
  }

  void skip_text(const char*& at, const char* end) {
    while (at < end) {
      if (std::exchange(escaped_, false)) {
        ++at;
        continue;
      }
      at = detail::find_either(at, end, '"', '\\');
      if (at == end) return;
      if (*at++ == '"') {
        in_ = In::after_value;
        return;
      }
      escaped_ = true;
    }
  }

  // The bytes of a lane that open or close a string, a list or an object, and the backslashes.
  static unsigned marks_of(__m128i lane) {
    using detail::where_equal;
    const __m128i folded = _mm_or_si128(lane, _mm_set1_epi8(0x20));  // [ and { differ in this bit, and so do ] and }
    const __m128i brackets = _mm_or_si128(where_equal(folded, '{'), where_equal(folded, '}'));
    const __m128i quotes = _mm_or_si128(where_equal(lane, '"'), where_equal(lane, '\\'));
    return detail::mask_of(_mm_or_si128(brackets, quotes));
  }

  // Just behind the bracket that closes the value (depth_ is 0 then), or `end`.
  const char* skip_nested(const char* at, const char* end) {
    bool in_string = in_string_;
    unsigned escaped = escaped_ ? 1 : 0;  // the first byte of the lane is escaped
    std::size_t depth = depth_;
    while (at < end) {
      const std::size_t lane_bytes = std::min(detail::kLane, static_cast<std::size_t>(end - at));
      unsigned mask = detail::before_end(marks_of(detail::load_lane(at)), at, end) & ~escaped;
      escaped = 0;
      while (mask != 0) {
        const unsigned bit = static_cast<unsigned>(std::countr_zero(mask));
        const char byte = at[bit];
        mask &= mask - 1;
        if (byte == '"') {
          in_string = !in_string;
        } else if (in_string) {
          if (byte != '\\') continue;
          if (bit + 1 == lane_bytes) escaped = 1;
          mask &= ~(2u << bit);
        } else if (byte == '{' || byte == '[') {
          ++depth;
        } else if (byte != '\\' && --depth == 0) {
          depth_ = 0;
          escaped_ = in_string_ = false;
          return at + bit + 1;
        }
      }
      at += lane_bytes;
    }
    in_string_ = in_string;
    escaped_ = escaped != 0;
    depth_ = depth;
    return end;
  }

  In in_ = In::opening;
  std::size_t depth_ = 0;   // of the nested value
  bool in_string_ = false;  // in a string of the nested value
  bool escaped_ = false;    // the last byte was a backslash that escapes the next
  bool in_usage_ = false;   // the nested value is a `usage`
  bool usage_found_ = false;
  bool choices_empty_ = false;
  bool choices_other_ = false;  // a `choices` that is no empty list
  std::uint8_t key_bytes_ = 0;  // kLongestKey + 1: longer than any key that is looked for
  char key_[kLongestKey] = {};
};

class UsageScan {
 public:
  enum class Kind : std::uint8_t { none, json, event_stream };

  // What goes on to the client now, in this order; the views last until the next call.
  struct Out {
    std::string_view held;
    std::string_view piece;
  };

  // A new body begins. `remove_usage_event` is for an event stream alone.
  void start(Kind kind, bool remove_usage_event) {
    assert(kind == Kind::event_stream || !remove_usage_event);
    *this = UsageScan();
    kind_ = kind;
    removing_ = remove_usage_event;
  }

  // Reads a piece of the body, which may be compacted in place; behind it kPaddingBytes are readable. False: memory is
  // short and bytes are lost, so the body can't go on.
  bool feed(BlockPool& pool, JsonReader& reader, char* data, std::size_t bytes, Out& out) {
    released_.clear();
    out = {{}, {data, bytes}};
    if (kind_ == Kind::json) read_text(pool, reader, data, data + bytes);
    if (kind_ != Kind::event_stream) return true;
    return feed_events(pool, reader, data, bytes, out);
  }

  // The body ended: what was held goes on, or was the extra event.
  bool finish(BlockPool&, JsonReader&, Out& out) {
    released_.clear();
    capture_.clear();
    out = {};
    if (kind_ != Kind::event_stream || !lines_.event_open()) return true;
    lines_.finish();
    take_counts();
    if (!undecided_) return true;
    if (is_extra_event())
      remove_held();
    else
      release(out);
    return true;
  }

  const Usage& usage() const { return usage_; }
  bool removed() const { return removed_; }
  std::size_t held_bytes() const { return held_.size(); }
  bool out_of_memory() const { return out_of_memory_; }  // so that counts may be missing

 private:
  // How far a piece was dealt with: [start, write) goes on, and so does [run, …) unless an event in it may not.
  struct Pass {
    char* start;
    char* write;
    const char* run;
    const char* event;  // where the undecided event's bytes begin in this piece
    void keep_up_to(const char* to) {
      const auto bytes = static_cast<std::size_t>(to - run);
      if (write != run) std::memmove(write, run, bytes);
      write += bytes;
      run = to;
    }
  };
  static constexpr std::size_t kLineBytes = 8;  // of a `data` line beside its text, at most

  bool feed_events(BlockPool& pool, JsonReader& reader, char* data, std::size_t bytes, Out& out) {
    const char* at = data;
    const char* end = data + bytes;
    Pass pass{data, data, data, data};
    std::string_view text;
    for (;;) {
      if (lines_.between_events()) at = skip_dull_events(at, end);
      switch (lines_.next(at, end, text)) {
        case SseReader::Step::need_more: return park(pool, pass, end, out);
        case SseReader::Step::event_begins: begin_event(pass, at); break;
        case SseReader::Step::data_begins: begin_data_line(pool); break;
        case SseReader::Step::data:
          event_bytes_ += text.size();
          read_text(pool, reader, text.data(), text.data() + text.size());
          break;
        case SseReader::Step::event_ends: end_event(pass, at, out); break;
        case SseReader::Step::late_line_feed:
          if (last_removed_) pass.run = at;  // the removed event's; nothing stands before it
          break;
      }
    }
  }

  // Steps over whole events that tell no usage: nearly all of them.
  const char* skip_dull_events(const char* at, const char* end) {
    while (at < end) {
      const char* behind = find_event_end(at, end);
      if (behind == nullptr || may_tell_usage(at, behind)) break;
      at = behind;
    }
    return at;
  }

  // Whether `"usage"` stands in [at, end) before anything but `: null`.
  static bool may_tell_usage(const char* at, const char* end) {
    using namespace detail;
    static constexpr std::string_view kKey = "\"usage\"";
    if (end - at < static_cast<std::ptrdiff_t>(kKey.size())) return false;
    for (const char* last = end - kKey.size(); at <= last; at += kLane) {
      const __m128i hits =
          _mm_and_si128(_mm_and_si128(where_equal(load_lane(at), '"'), where_equal(load_lane(at + 1), 'u')),
                        where_equal(load_lane(at + kKey.size() - 1), '"'));
      for (unsigned mask = before_end(mask_of(hits), at, last + 1); mask != 0; mask &= mask - 1) {
        const char* key = at + std::countr_zero(mask);
        if (std::string_view(key, kKey.size()) == kKey && !null_follows(key + kKey.size(), end)) return true;
      }
    }
    return false;
  }

  static bool null_follows(const char* at, const char* end) {
    while (at < end && *at == ' ') ++at;
    if (at == end || *at++ != ':') return false;
    while (at < end && *at == ' ') ++at;
    return at < end && *at == 'n';
  }

  void begin_event(Pass& pass, const char* at) {
    members_ = MemberScan();
    counts_found_ = last_removed_ = false;
    data_seen_ = false;
    event_bytes_ = 0;
    undecided_ = removing_;
    pass.event = at;
  }

  void begin_data_line(BlockPool& pool) {
    event_bytes_ += kLineBytes;
    if (!std::exchange(data_seen_, true)) return;
    if (members_.in_usage()) capture(pool, "\n");
    members_.line_break();
  }

  void end_event(Pass& pass, const char* behind, Out& out) {
    take_counts();
    capture_.clear();
    if (!std::exchange(undecided_, false)) return;
    if (!is_extra_event()) return release(out);
    pass.keep_up_to(pass.event);
    pass.run = behind;
    remove_held();
    last_removed_ = true;
  }

  // The piece is read: holds the open event's bytes while it may be the extra one, and lets all else go on.
  bool park(BlockPool& pool, Pass& pass, const char* end, Out& out) {
    if (undecided_ && is_ruled_out()) {
      undecided_ = false;
      release(out);
    }
    pass.keep_up_to(undecided_ ? pass.event : end);
    out.piece = {pass.start, static_cast<std::size_t>(pass.write - pass.start)};
    return !undecided_ || held_.append(pool, {pass.event, static_cast<std::size_t>(end - pass.event)});
  }

  bool is_ruled_out() const {
    return lines_.other_lines() || members_.is_other_event() || event_bytes_ > kHeldEventBytes;
  }
  bool is_extra_event() const { return members_.is_usage_event() && !is_ruled_out(); }

  void release(Out& out) {
    if (held_.empty()) return;
    std::swap(held_, released_);
    out.held = released_.view();
  }

  void remove_held() {
    held_.clear();
    removed_ = true;
  }

  // The event's data is all there: its counts are the stream's, if it was an object.
  void take_counts() {
    if (counts_found_ && members_.is_object()) usage_ = counts_;
    counts_found_ = false;
  }

  // Reads JSON text and what its `usage` tells.
  void read_text(BlockPool& pool, JsonReader& reader, const char* at, const char* end) {
    const char* usage_from = at;  // where the part of `usage` that lies in this piece begins
    for (;;) {
      switch (members_.next(at, end)) {
        case MemberScan::Step::usage_begins:
          usage_from = at - 1;
          capture_.clear();
          capture_lost_ = false;
          break;
        case MemberScan::Step::usage_ends: read_counts(pool, reader, usage_from, at); break;
        case MemberScan::Step::need_more:
          if (members_.in_usage()) capture(pool, {usage_from, static_cast<std::size_t>(end - usage_from)});
          return;
      }
    }
  }

  // Keeps a part of a `usage` that is cut. No memory is no reason to stop the body: it only goes uncounted.
  void capture(BlockPool& pool, std::string_view part) {
    if (capture_lost_) return;
    if (capture_.size() + part.size() > kUsageBytes) {
      capture_lost_ = true;
    } else if (!capture_.append(pool, part)) {
      capture_lost_ = out_of_memory_ = true;
    }
    if (capture_lost_) capture_.clear();
  }

  void read_counts(BlockPool& pool, JsonReader& reader, const char* from, const char* end) {
    std::string_view object(from, static_cast<std::size_t>(end - from));
    if (capture_lost_ || !capture_.empty()) {
      capture(pool, object);
      object = capture_.view();
    }
    const bool readable = !capture_lost_ && object.size() <= kUsageBytes;
    counts_ = readable ? reader.read_usage(object.data(), object.size()) : Usage{};
    capture_.clear();
    capture_lost_ = false;
    if (kind_ == Kind::json)
      usage_ = counts_;
    else
      counts_found_ = true;
  }

  Kind kind_ = Kind::none;
  bool removing_ = false;
  bool undecided_ = false;  // the open event may be the extra one: its bytes are held
  bool removed_ = false;
  bool last_removed_ = false;  // the last event was removed, and so is a LF of its blank line that comes late
  bool capture_lost_ = false;  // the open `usage` is too large, or memory was short
  bool out_of_memory_ = false;
  bool counts_found_ = false;  // this event told counts_
  bool data_seen_ = false;     // this event has a line of data
  std::size_t event_bytes_ = 0;
  SseReader lines_;
  MemberScan members_;
  Usage counts_;
  Usage usage_;
  Buffer held_;      // the open event's bytes from earlier pieces
  Buffer released_;  // what was held, while the caller reads it
  Buffer capture_;   // a `usage` that is cut between pieces
};

}  // namespace nexus
