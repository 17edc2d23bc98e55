// incremental_json.h
// Owns:      reading a large request body while it arrives: each piece is scanned once, while it is in the processor's
//            cache, and the members that Nexus reads are copied into a short JSON text, the skeleton.
// Promises:  read() returns what read_body() would return for the whole body, spans included. A body that is not JSON
//            is refused whenever read_body() refuses it. Memory is bounded by kSkeletonBytes, and the cost of a call by
//            the bytes that are new.
// Leaves:    the meaning of a member to request_json.h, which reads the skeleton; receiving to request_body.h.
// Threads:   one.
// Tested by: tests/incremental_json_test.cpp, tests/fuzz/incremental_json.h
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>

#include "nexus/api/request_json.h"
#include "nexus/base/limits.h"
#include "nexus/base/simd.h"
#include "nexus/base/text.h"

namespace nexus {

constexpr std::size_t kShortBytes = 16;  // of a string are scanned byte by byte

// The bytes kept of a string, a number or a word. Longer values have no meaning, except that of a model name.
constexpr std::size_t kKeptWordBytes = 128;
constexpr std::size_t kept_bytes(BodyKey key) { return key == BodyKey::model ? kReadNameBytes + 2 : kKeptWordBytes; }

// Each key stands in the skeleton twice at most, the second time with the value 0; each of its three objects may begin
// with a `"":0`.
inline constexpr std::size_t kSkeletonBytes = [] {
  std::size_t bytes = 3 * std::string_view(R"({"":0,})").size();
  for (const BodyKeyRow& row : kBodyKeys) bytes += 2 * (row.name.size() + 4) + kept_bytes(row.key) + 1;
  return bytes;
}();

class IncrementalJson {
 public:
  // Prepares for another body.
  void start(const Endpoint& endpoint) {
    *this = IncrementalJson();
    endpoint_ = &endpoint;
  }

  // `body`: everything received so far. It may have moved since the last call, but its earlier bytes are unchanged.
  // Behind it kPaddingBytes must be readable.
  void feed(JsonReader& reader, const char* body, std::size_t bytes) {
    assert(bytes >= end_);
    body_ = body;
    new_ = end_;
    end_ = bytes;
    ascii_ = true;
    while (!fault_ && at_ < end_ && step(reader)) {
    }
    check_characters();
  }

  // The body is complete: returns what read_body() would.
  std::optional<ApiError> read(JsonReader& reader, std::string_view body, BodyFacts& facts, bool find_images = true) {
    facts = BodyFacts{};
    feed(reader, body.data(), body.size());
    if (fault_) return fault_;
    if (state_ != State::behind || checked_ != body.size()) return ApiError::bad_json;
    const auto error = read_body(reader, *endpoint_, {skeleton_.data(), used_}, facts, find_images);
    if (error == ApiError::no_model && may_say_name(*endpoint_)) return read_body(reader, *endpoint_, body, facts);
    if (error) return error;
    facts.first_member = first_member_;
    if (facts.model_value.bytes > 0) facts.model_value = span_of(BodyKey::model);  // else the body names none
    facts.stream_options_value = span_of(BodyKey::stream_options);
    facts.include_usage_value = span_of(BodyKey::include_usage);
    if (facts.continuous_usage_value.at > 0) facts.continuous_usage_value = span_of(BodyKey::continuous_usage_stats);
    if (facts.session_key != BodyKey::other) facts.session_value = span_of(facts.session_key);
    if (facts.turns_key != BodyKey::other) facts.turns_value = span_of(facts.turns_key);
    if (facts.system_key != BodyKey::other) facts.system_value = span_of(facts.system_key);
    facts.has_images = find_images && has_images_;
    facts.json_mode = json_mode_;
    // A name without escapes must lie in the body, which outlives the skeleton; one with escapes lies in the reader.
    // Of a name that is too long for the skeleton, the body has the beginning.
    if (facts.model_value.bytes == 0) return std::nullopt;
    const std::string_view name = text(facts.model_value.at + 1, facts.model_value.bytes - 2);
    if (name.size() > kReadNameBytes) facts.model = name.substr(0, kCutNameBytes);
    if (facts.model.data() > skeleton_.data() && facts.model.data() < skeleton_.data() + used_) facts.model = name;
    return std::nullopt;
  }

 private:
  enum class State : std::uint8_t {
    before,        // before the body's `{`
    first_key,     // a key, or the `}` of an empty object
    key,           // behind a comma
    in_key,        // within its quotes
    colon,         // behind a key
    value,         // behind a colon
    in_string,     // a value that is a string
    in_scalar,     // a value that is a number or a word
    array_begun,   // behind the `[` of a value
    object_begun,  // behind the `{` of a value that is skipped
    in_first_string,
    behind_first_string,
    nested,  // within an array or object that is skipped, outside its strings
    in_nested_string,
    next,    // behind a member: a comma or a `}`
    behind,  // the body's `}`
  };

  // Runs until the state changes. False if more bytes are needed, or if there is a fault.
  bool step(JsonReader& reader) {
    switch (state_) {
      case State::in_key: return in_key(reader);
      case State::in_string: return in_string();
      case State::in_scalar: return in_scalar();
      case State::in_first_string: return in_first_string();
      case State::nested:
      case State::in_nested_string: return in_nested();
      default: break;
    }
    while (is_json_blank(body_[at_])) {
      if (++at_ == end_) return false;
    }
    return between(body_[at_]);
  }

  // The states in which only a few characters are allowed.
  bool between(char c) {
    switch (state_) {
      case State::before: return c == '{' ? open_body() : fail();
      case State::first_key: return c == '}' ? close_object() : begin_key(c);
      case State::key: return begin_key(c);
      case State::colon: return c == ':' ? pass(State::value) : fail();
      case State::value: return begin_value(c);
      case State::array_begun: return begin_elements(c);
      case State::object_begun: return c == '"' ? pass(State::in_first_string) : c == '}' ? go(State::nested) : fail();
      case State::behind_first_string: return behind_first_string(c);
      case State::next: return c == '}' ? close_object() : c == ',' ? pass(State::key) : fail();
      default: return fail();  // bytes behind the body
    }
  }

  // The next state begins with the current character.
  bool go(State state) {
    state_ = state;
    return true;
  }
  // The next state begins with the next character.
  bool pass(State state) {
    at_ += 1;
    return go(state);
  }

  bool fail(ApiError fault = ApiError::bad_json) {
    fault_ = fault;
    return false;
  }
  // True for the bytes of numbers and words.
  static bool is_scalar_byte(char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '+' ||
           c == '.';
  }

  std::string_view text(std::size_t at, std::size_t bytes) const { return {body_ + at, bytes}; }
  BodySpan span_of(BodyKey key) const { return spans_[index_of(key)]; }

  // ---- objects whose members are read: the body (level 1), and one of its values (level 2) ----

  bool open_body() {
    put("{");
    level_ = depth_ = 1;
    first_member_ = at_ + 1;
    return pass(State::first_key);
  }

  // Only the members of it that read_body() reads are kept.
  bool open_walked() {
    put_name();
    put("{");
    spans_[index_of(key_)].at = at_;
    within_ = key_;
    level_ = depth_ = 2;
    return pass(State::first_key);
  }

  bool close_object() {
    put("}");
    depth_ = --level_;
    if (level_ == 0) return pass(State::behind);
    BodySpan& span = spans_[index_of(within_)];
    span.bytes = at_ + 1 - span.at;
    within_ = BodyKey::none;
    return pass(State::next);
  }

  // ---- a member ----

  bool begin_key(char c) {
    begin_ = at_;
    return c == '"' ? pass(State::in_key) : fail();
  }

  bool in_key(JsonReader& reader) {
    if (!to_quote()) return false;
    const std::string_view token = text(begin_, at_ + 1 - begin_);
    std::string_view name = token.substr(1, token.size() - 2);
    if (name.find('\\') != std::string_view::npos && !reader.read_key(token, name)) return fail();
    key_ = find_body_key(name, within_);
    std::uint8_t& times = times_[index_of(key_)];  // more than 2 make no difference
    time_ = times;
    if (times < 2) times += 1;
    return pass(State::colon);
  }

  bool begin_value(char c) {
    begin_ = at_;
    switch (c) {
      case '"': return pass(State::in_string);
      case '[': return nest(State::array_begun);
      case '{': {
        if (is_read_into(key_) && time_ == 0) return open_walked();
        stand_in_ = "{}";
        return nest(State::object_begun);
      }
      default: return is_scalar_byte(c) ? go(State::in_scalar) : fail();
    }
  }

  bool in_string() {
    if (!to_quote()) return false;
    note_marks(1);
    at_ += 1;
    return end_value(kept_or(R"("-")"));
  }

  bool in_scalar() {
    while (is_scalar_byte(body_[at_])) {
      if (++at_ == end_) return false;
    }
    return end_value(kept_or("0"));
  }

  // The value that ends here, or `stand_in` if the skeleton does not need it.
  std::string_view kept_or(std::string_view stand_in) const {
    if (key_ == BodyKey::other || at_ - begin_ > kept_bytes(key_)) return stand_in;
    return text(begin_, at_ - begin_);
  }

  bool end_value(std::string_view shown) {
    state_ = State::next;
    if (key_ == BodyKey::other) {
      if (skeleton_[used_ - 1] == '{') put(R"("":0)");  // so that the object is not empty
    } else if (time_ == 0) {
      put_name();
      put(shown);
      spans_[index_of(key_)] = {begin_, at_ - begin_};
    } else if (time_ == 1) {
      put_name();
      put("0");
    }
    return true;
  }

  // ---- arrays and objects that are skipped ----

  bool nest(State state) {
    if (depth_ == kMaxJsonDepth) return fail(ApiError::too_deep);
    depth_ += 1;
    return pass(state);
  }

  // Refuses what read_body() refuses when it opens an array: a first byte that no element begins with.
  bool begin_elements(char c) {
    if (c == ':' || c == ',' || c == '}') return fail();
    stand_in_ = c == ']' ? "[]" : "[0]";
    return c == '"' ? pass(State::in_first_string) : go(State::nested);
  }

  bool in_first_string() {
    if (!to_quote()) return false;
    note_marks(1);
    return pass(State::behind_first_string);
  }

  bool behind_first_string(char c) {
    const bool fits = stand_in_ == "{}" ? c == ':' : c == ',' || c == ']';
    return fits ? go(State::nested) : fail();
  }

  bool in_nested() {
    bool in_string = state_ == State::in_nested_string;
    bool escaped = false;  // the byte at at_
    while (at_ < end_) {
      if (in_string) pass_text(escaped);
      if (at_ == end_) break;
      const ByteBlock block(body_ + at_);
      const std::size_t count = std::min(kBlockBytes, end_ - at_);
      ascii_ = ascii_ && block.is_ascii();
      const std::uint64_t backslashes = block.equal('\\');
      const Escapes escapes(backslashes, escaped);
      const std::uint64_t quotes = block.equal('"') & ~escapes.escaped;
      const std::uint64_t strings = between_pairs(quotes) ^ (in_string ? ~std::uint64_t{0} : 0);
      std::uint64_t here = low_bits(count);
      const bool closed = count_brackets(block.bracket('[') & ~strings, block.bracket(']') & ~strings, here);
      if (fault_) return false;
      if ((((block.control() & strings) | (backslashes & ~strings)) & here) != 0) return fail();
      note_marks(quotes & ~strings & here);
      if (closed) {
        at_ += static_cast<std::size_t>(std::countr_one(here));
        return end_value(stand_in_);
      }
      in_string = (strings >> (count - 1) & 1) != 0;
      escaped = (escapes.escaping >> (count - 1) & 1) != 0;
      at_ += count;
    }
    if (escaped) at_ -= 1;  // read the backslash again together with the byte that it escapes
    return go(in_string ? State::in_nested_string : State::nested) && false;
  }

  // Counts the brackets among the bits of `here`. True if the value ends: `here` then stops at its last byte.
  bool count_brackets(std::uint64_t opening, std::uint64_t closing, std::uint64_t& here) {
    for (std::uint64_t left = (opening | closing) & here; left != 0; left &= left - 1) {
      const std::uint64_t bit = left & (~left + 1);
      if ((opening & bit) != 0) {
        if (depth_ == kMaxJsonDepth) return fail(ApiError::too_deep);
        depth_ += 1;
      } else if (--depth_ == level_) {
        here = bit | (bit - 1);
        return true;
      }
    }
    return false;
  }

  // ---- strings ----

  // Skips whole blocks of a string. `escaped`: the byte at at_ is escaped.
  void pass_text(bool& escaped) {
    if (end_ - at_ < kBlockBytes) return;
    const TextRun run = skip_text(body_, at_, end_, escaped);
    at_ = run.at;
    escaped = run.escaped;
    ascii_ = ascii_ && run.ascii;
  }

  // Moves to the quote that ends the string. False if it has not arrived yet, or if there is a fault.
  bool to_quote() {
    bool escaped = false;
    for (const std::size_t near = at_ + kShortBytes; at_ < end_; ++at_) {
      if (at_ == near) pass_text(escaped);
      if (at_ == end_) break;
      const char c = body_[at_];
      if (c == '"' && !escaped) return true;
      if (static_cast<unsigned char>(c) < ' ') return fail();
      ascii_ = ascii_ && static_cast<unsigned char>(c) < 0x80;
      escaped = c == '\\' && !escaped;
    }
    if (escaped) at_ -= 1;  // read the backslash again together with the byte that it escapes
    return false;
  }

  // `closing_quotes`: of strings; the lowest bit is the byte at at_.
  void note_marks(std::uint64_t closing_quotes) {
    if (key_ == BodyKey::other) return;
    for (const NeedMark& row : endpoint_->row().marks) {
      bool& found = row.need == Need::images ? has_images_ : json_mode_;
      if (row.within == key_ && !row.mark.empty() && !found) found = ends_with_mark(row.mark, closing_quotes);
    }
  }

  // True if one of the strings that end here ends with `mark`.
  bool ends_with_mark(std::string_view mark, std::uint64_t closing_quotes) const {
    for (std::uint64_t left = closing_quotes; left != 0; left &= left - 1) {
      const std::size_t end = at_ + static_cast<std::size_t>(std::countr_zero(left)) + 1;
      if (end >= begin_ + mark.size() && text(end - mark.size(), mark.size()) == mark) return true;
    }
    return false;
  }

  // Validates UTF-8 up to the last complete character. ASCII was recognised while it was scanned.
  void check_characters() {
    if (fault_) return;
    if (ascii_ && checked_ == new_) {
      checked_ = end_;
      return;
    }
    const std::size_t bytes = without_cut_character(text(checked_, end_ - checked_));
    if (!simdjson::validate_utf8(body_ + checked_, bytes)) fault_ = ApiError::bad_json;
    checked_ += bytes;
  }

  // ---- the skeleton ----

  void put(std::string_view piece) {
    assert(used_ + piece.size() <= kSkeletonBytes);
    std::memcpy(skeleton_.data() + used_, piece.data(), piece.size());
    used_ += piece.size();
  }

  void put_name() {
    put(skeleton_[used_ - 1] == '{' ? "\"" : ",\"");
    put(kBodyKeys[index_of(key_)].name);
    put("\":");
  }

  const Endpoint* endpoint_ = nullptr;
  const char* body_ = nullptr;
  std::size_t new_ = 0;  // where the newest piece begins
  std::size_t end_ = 0;
  bool ascii_ = true;  // the newest piece, as far as it was scanned

  State state_ = State::before;
  std::optional<ApiError> fault_;
  std::size_t at_ = 0;       // the next byte to scan
  std::size_t checked_ = 0;  // the bytes before it are valid UTF-8
  std::size_t first_member_ = 0;
  std::size_t depth_ = 0;
  std::size_t level_ = 0;             // of the object whose members are read
  BodyKey within_ = BodyKey::none;    // the key of that object
  BodyKey key_ = BodyKey::other;      // of the current member
  std::uint8_t time_ = 0;             // how often that key occurred before
  std::size_t begin_ = 0;             // of the current key or value
  std::string_view stand_in_ = "{}";  // for the current array or object
  bool has_images_ = false;
  bool json_mode_ = false;
  std::array<std::uint8_t, kBodyKeys.size() + 1> times_{};
  std::array<BodySpan, kBodyKeys.size()> spans_{};

  std::array<char, kSkeletonBytes + kPaddingBytes> skeleton_{};
  std::size_t used_ = 0;
};

}  // namespace nexus
