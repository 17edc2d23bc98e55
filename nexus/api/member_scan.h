// member_scan.h
// Owns:      finding the token counts, `error`, `choices`, the mark of a stream's end and members that are not of a
//            usage event among the outermost members of a JSON object in pieces, and in the dialect's wrapper. Deeper
//            levels are skipped by their brackets; keys are not unescaped.
// Promises:  the same result however the text is cut; every byte is read once; nothing is allocated.
// Leaves:    reading the counts to json_reader.h.
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

#include "nexus/api/dialects.h"
#include "nexus/base/simd.h"
#include "nexus/base/text.h"

namespace nexus {

class MemberScan {
 public:
  enum class Step : std::uint8_t {
    need_more,
    usage_begins,     // `at` is behind the first byte of a `usage`; of a count, if they stand in the response itself
    usage_ends,       // `at` is behind its last byte
    between_members,  // `at` is behind the `{`, `,` or `}` of the outermost object
    no_choice,        // `at` is behind the `]` of an empty list of choices
  };

  MemberScan() = default;
  explicit MemberScan(const ResponseShape* shape) : shape_(shape) {}

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
          if (at == end) break;
          in_ = In::after_value;
          if (std::exchange(in_usage_, false)) return Step::usage_ends;
          break;
        case In::word: read_word(at, end); break;
        case In::id: read_id(at, end); break;
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
    if (in_ == In::key || in_ == In::word || in_ == In::id || (in_ == In::nested && in_string_)) in_ = In::broken;
    if (in_ == In::scalar && !in_usage_) in_ = In::after_value;
  }

  bool in_usage() const { return in_usage_; }
  // Of the count or `usage` that was found.
  std::string_view key() const { return {key_, key_bytes_ <= kLongestKey ? std::size_t{key_bytes_} : 0}; }
  // The text was one whole object.
  bool is_object() const { return in_ == In::closed; }
  // It was an object with an `error` that holds an object or a text, or an event that says so by its type.
  bool is_error() const { return is_object() && (error_found_ || word() == "error" || word() == "response.failed"); }
  // The hash of its `id`, or of the wrapper's; 0 if the dialect has none.
  std::uint64_t id() const { return id_; }
  // It was the event that ends a stream of this dialect.
  bool is_end() const { return is_object() && !word().empty() && has_word(shape_->end, word()); }
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
    word,          // in the text of the dialect's end_key
    id,            // in the text of `id`
    nested,        // in a list, an object or a string
    after_value,   // before `,` or `}`
    closed,        // behind the `}`
    broken,        // this is not a JSON object
  };
  static constexpr std::size_t kLongestKey = 18;
  static constexpr std::size_t kLongestWord = 26;  // image_generation.completed
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
        if (mark == '}') return close();
        in_ = mark == '"' ? In::key : In::broken;
        break;
      case In::colon: in_ = mark == ':' ? In::value : In::broken; break;
      case In::value: return begin_value(mark) ? Step::usage_begins : Step::need_more;
      case In::first_choice:
        if (mark == ']') {
          in_ = In::after_value;
          return Step::no_choice;
        }
        choices_found_ = true;
        begin_nested(mark == '{' || mark == '[' ? 2 : 1, mark == '"');
        if (mark == '}') in_ = In::broken;
        break;
      case In::after_value: return mark == '}' ? close() : go_on(mark == ',' ? In::member : In::broken);
      default: in_ = In::broken; break;
    }
    return Step::need_more;
  }

  Step go_on(In next) {
    in_ = next;
    return Step::between_members;
  }

  // A `}`: of the wrapper, or of the outermost object.
  Step close() { return go_on(std::exchange(in_wrapper_, false) ? In::after_value : In::closed); }

  // True if a `usage` object or a count begins.
  bool begin_value(char mark) {
    const std::string_view name = key();
    if (mark != 'n') {  // null
      holds_more_ =
          holds_more_ || std::find(kUsageEventKeys.begin(), kUsageEventKeys.end(), name) == kUsageEventKeys.end();
      if (name == "choices" && mark != '[') choices_found_ = true;
    }
    if (name == "error" && (mark == '{' || mark == '"')) error_found_ = true;
    if (shape_ != nullptr && !name.empty() && begin_of_dialect(name, mark)) return false;
    if (name == "choices" && mark == '[') {
      in_ = In::first_choice;
      return false;
    }
    in_usage_ = holds_counts(name, mark);
    usage_found_ = usage_found_ || in_usage_;
    if (mark == '"') {
      begin_nested(0, true);
    } else if (mark == '{' || mark == '[') {
      begin_nested(1, false);
    } else {
      in_ = mark == ',' || mark == '}' || mark == ']' || mark == ':' ? In::broken : In::scalar;
    }
    return in_usage_;
  }

  bool holds_counts(std::string_view name, char mark) const {
    if (shape_ == nullptr || !shape_->bare) return mark == '{' && name == "usage";
    return !name.empty() && (name == shape_->prompt || name == shape_->completion || name == shape_->details);
  }

  // True if the value is the dialect's wrapper, or the text that marks its last event.
  bool begin_of_dialect(std::string_view name, char mark) {
    if (mark == '"' && shape_->has_ids && name == "id") {
      hash_ = TextHash();
      in_ = In::id;
      return true;
    }
    if (in_wrapper_) return false;
    if (mark == '{' && name == shape_->wrapper) {
      in_wrapper_ = true;
      in_ = In::member;
      return true;
    }
    if (name != shape_->end_key || word_bytes_ > 0) return false;  // the first one counts
    if (mark == 't') word_bytes_ = static_cast<std::uint8_t>(std::string_view("true").copy(word_, kLongestWord));
    if (mark != '"') return false;
    in_ = In::word;
    return true;
  }

  // Empty if there is none, or one that is longer than every one that matters.
  std::string_view word() const { return {word_, word_bytes_ <= kLongestWord ? std::size_t{word_bytes_} : 0}; }

  void read_id(const char*& at, const char* end) {
    while (at < end) {
      const char byte = *at++;
      if (byte == '"') {  // ids have no escapes
        in_ = In::after_value;
        id_ = hash_.value();
        return;
      }
      hash_.add(byte);
    }
  }

  // `list`: words, separated by blanks.
  static bool has_word(std::string_view list, std::string_view word) {
    for (std::size_t at = list.find(word); at != std::string_view::npos; at = list.find(word, at + 1)) {
      const std::size_t end = at + word.size();
      if ((at == 0 || list[at - 1] == ' ') && (end == list.size() || list[end] == ' ')) return true;
    }
    return false;
  }

  void read_word(const char*& at, const char* end) {
    while (at < end) {
      const char byte = *at++;
      if (byte == '"' && !escaped_) {
        in_ = In::after_value;
        return;
      }
      escaped_ = byte == '\\' && !escaped_;
      if (word_bytes_ < kLongestWord) word_[word_bytes_] = byte;
      if (word_bytes_ <= kLongestWord) ++word_bytes_;
    }
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
  bool in_usage_ = false;   // the value is a `usage`, or a count
  bool in_wrapper_ = false;
  bool usage_found_ = false;
  bool error_found_ = false;
  bool choices_found_ = false;  // a `choices` that is neither an empty list nor null
  bool holds_more_ = false;
  const ResponseShape* shape_ = nullptr;
  TextHash hash_;
  std::uint64_t id_ = 0;
  std::uint8_t key_bytes_ = 0;   // kLongestKey + 1: longer than every key that matters
  std::uint8_t word_bytes_ = 0;  // the same
  char key_[kLongestKey];
  char word_[kLongestWord];
};

}  // namespace nexus
