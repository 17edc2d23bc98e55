// member_scan.h
// Owns:      finding `usage`, `error`, `choices` and members that are not of a usage event among the outermost members
//            of a JSON object in pieces. Deeper levels are skipped by their brackets; keys are not unescaped.
// Promises:  the same result however the text is cut; every byte is read once; nothing is allocated.
// Leaves:    reading the `usage` to json_reader.h.
// Threads:   a scan belongs to one thread.
// Tested by: tests/usage_scan_test.cpp, tests/fuzz/usage.h
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "nexus/base/simd.h"

namespace nexus {

class MemberScan {
 public:
  enum class Step : std::uint8_t {
    need_more,
    usage_begins,     // `at` is behind its `{`
    usage_ends,       // `at` is behind its `}`
    between_members,  // `at` is behind the `{`, `,` or `}` of the outermost object
  };

  // A lane behind `end` must be readable.
  Step next(const char*& at, const char* end) {
    while (at < end) {
      switch (in_) {
        case In::nested:
          at = skip_nested(at, end);
          if (depth_ > 0 || in_string_) break;
          in_ = In::after_value;
          if (std::exchange(in_usage_, false)) return Step::usage_ends;
          break;
        case In::key: read_key(at, end); break;
        case In::scalar:
          while (at < end && *at != ',' && *at != '}') ++at;
          if (at < end) in_ = In::after_value;
          break;
        case In::broken: at = end; break;
        default: {
          const char mark = *at++;
          if (mark == ' ' || mark == '\n' || mark == '\r' || mark == '\t') break;
          const Step step = read_mark(mark);
          if (step != Step::need_more) return step;
        }
      }
    }
    return Step::need_more;
  }

  // A line end between two `data` lines: white space, and an error inside a string.
  void line_break() {
    if (in_ == In::key || (in_ == In::nested && in_string_)) in_ = In::broken;
    if (in_ == In::scalar) in_ = In::after_value;
  }

  bool in_usage() const { return in_usage_; }
  // The text was one whole object.
  bool is_object() const { return in_ == In::closed; }
  // It was an object with an `error` that holds an object or a text.
  bool is_error() const { return is_object() && error_found_; }
  // It was an object with a `usage` and without a choice.
  bool is_usage_event() const { return is_object() && usage_found_ && !choices_found_; }
  // True once it can no longer become the usage event.
  bool is_other_event() const { return in_ == In::broken || choices_found_ || (is_object() && !usage_found_); }
  // There is a member that usage events do not have, and it is not null.
  bool holds_more() const { return holds_more_; }

 private:
  enum class In : std::uint8_t {
    opening,       // before the `{`
    member,        // before a key or the `}`
    key,           // in a key
    colon,         // behind a key
    value,         // before a value
    first_choice,  // behind the `[` of `choices`
    scalar,        // in a number, true, false or null
    nested,        // in a list, an object or a string
    after_value,   // before `,` or `}`
    closed,        // behind the `}`
    broken,        // this is not a JSON object
  };
  static constexpr std::size_t kLongestKey = 18;
  // The members of a usage event, as OpenAI and OpenRouter send it.
  static constexpr auto kUsageEventKeys =
      std::to_array<std::string_view>({"choices", "created", "id", "model", "object", "obfuscation", "provider",
                                       "service_tier", "system_fingerprint", "usage"});

  // Reads a byte between two tokens.
  Step read_mark(char mark) {
    switch (in_) {
      case In::opening: return go_on(mark == '{' ? In::member : In::broken);
      case In::member:
        key_bytes_ = 0;
        if (mark == '}') return go_on(In::closed);
        in_ = mark == '"' ? In::key : In::broken;
        break;
      case In::colon: in_ = mark == ':' ? In::value : In::broken; break;
      case In::value: return begin_value(mark) ? Step::usage_begins : Step::need_more;
      case In::first_choice:
        if (mark == ']') {
          in_ = In::after_value;
          break;
        }
        choices_found_ = true;
        begin_nested(mark == '{' || mark == '[' ? 2 : 1, mark == '"');
        if (mark == '}') in_ = In::broken;
        break;
      case In::after_value: return go_on(mark == ',' ? In::member : mark == '}' ? In::closed : In::broken);
      default: in_ = In::broken; break;
    }
    return Step::need_more;
  }

  Step go_on(In next) {
    in_ = next;
    return Step::between_members;
  }

  // True if a `usage` object begins.
  bool begin_value(char mark) {
    const std::string_view key(key_, key_bytes_ <= kLongestKey ? key_bytes_ : 0);
    if (mark != 'n') {  // null
      holds_more_ =
          holds_more_ || std::find(kUsageEventKeys.begin(), kUsageEventKeys.end(), key) == kUsageEventKeys.end();
      if (key == "choices" && mark != '[') choices_found_ = true;
    }
    if (key == "error" && (mark == '{' || mark == '"')) error_found_ = true;
    if (key == "choices" && mark == '[') {
      in_ = In::first_choice;
      return false;
    }
    if (mark == '"') {
      begin_nested(0, true);
    } else if (mark == '{' || mark == '[') {
      begin_nested(1, false);
      in_usage_ = mark == '{' && key == "usage";
      usage_found_ = usage_found_ || in_usage_;
    } else {
      in_ = mark == ',' || mark == '}' || mark == ']' || mark == ':' ? In::broken : In::scalar;
    }
    return in_usage_;
  }

  void begin_nested(std::size_t depth, bool in_string) {
    in_ = In::nested;
    depth_ = depth;
    in_string_ = in_string;
  }

  void read_key(const char*& at, const char* end) {
    while (at < end) {
      const char byte = *at++;
      if (byte == '"' && !escaped_) {
        in_ = In::colon;
        return;
      }
      escaped_ = byte == '\\' && !escaped_;
      if (key_bytes_ < kLongestKey) key_[key_bytes_] = byte;
      if (key_bytes_ <= kLongestKey) ++key_bytes_;
    }
  }

  // The quotes, backslashes and brackets of a lane.
  static unsigned marks_of(const char* at) {
    const Lane lane(at);
    return ((lane.bracket('[') | lane.bracket(']')) | (lane.equal('"') | lane.equal('\\'))).mask();
  }

  // Returns the position behind the bracket or quote that ends the value, with depth_ 0 and not in_string_; or `end`.
  const char* skip_nested(const char* at, const char* end) {
    bool in_string = in_string_;
    unsigned escaped = escaped_ ? 1 : 0;  // the first byte of the lane is escaped
    std::size_t depth = depth_;
    while (at < end) {
      const std::size_t lane_bytes = std::min(kLaneBytes, static_cast<std::size_t>(end - at));
      unsigned mask = before_end(marks_of(at), at, end) & ~escaped;
      escaped = 0;
      while (mask != 0) {
        const unsigned bit = static_cast<unsigned>(std::countr_zero(mask));
        const char byte = at[bit];
        mask &= mask - 1;
        if (byte == '"') {
          in_string = !in_string;
          if (in_string || depth > 0) continue;
        } else if (in_string) {
          if (byte != '\\') continue;
          if (bit + 1 == lane_bytes) escaped = 1;
          mask &= ~(2u << bit);
          continue;
        } else if (byte == '{' || byte == '[') {
          ++depth;
          continue;
        } else if (byte == '\\' || --depth > 0) {
          continue;
        }
        depth_ = 0;
        escaped_ = in_string_ = false;
        return at + bit + 1;
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
  bool in_string_ = false;  // in the nested value, or in a string of it
  bool escaped_ = false;    // the last byte was a backslash that escapes the next
  bool in_usage_ = false;   // the nested value is a `usage`
  bool usage_found_ = false;
  bool error_found_ = false;
  bool choices_found_ = false;  // a `choices` that is neither an empty list nor null
  bool holds_more_ = false;
  std::uint8_t key_bytes_ = 0;  // kLongestKey + 1: longer than every key that matters
  char key_[kLongestKey] = {};
};

}  // namespace nexus
