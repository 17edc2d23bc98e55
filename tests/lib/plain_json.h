// plain_json.h
// Owns:     the tests' own reader of JSON, written from RFC 8259 alone: recursive and slow.
// Promises: it shares no code with nexus/ and simdjson. It reads a complete text or fails; every value has its
//           position; members keep their order, and duplicates stay separate.
// Leaves:   converting numbers to the tests: a number is its digits.
// Threads:  any.
// Tested by: tests/hostile_readers_test.cpp
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tests/lib/plain_utf8.h"

namespace plain_json {

struct Member;

struct Value {
  enum class Kind : std::uint8_t { null, no, yes, number, text, list, object };
  Kind kind = Kind::null;
  std::string text;  // decoded, or a number's digits
  std::vector<Value> items;
  std::vector<Member> members;
  std::size_t at = 0, bytes = 0;  // its position in the text

  inline std::size_t count(std::string_view name) const;
  // The last member of that name, which is the one that most readers use.
  inline const Value* find(std::string_view name) const;
};

struct Member {
  std::string name;
  Value value;
};

inline std::size_t Value::count(std::string_view name) const {
  std::size_t found = 0;
  for (const Member& member : members) found += member.name == name ? 1 : 0;
  return found;
}

inline const Value* Value::find(std::string_view name) const {
  const Value* found = nullptr;
  for (const Member& member : members) {
    if (member.name == name) found = &member.value;
  }
  return found;
}

class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  std::optional<Value> read() {
    Value value;
    blanks();
    if (!read_value(value, 0)) return std::nullopt;
    blanks();
    if (at_ != text_.size()) return std::nullopt;
    return value;
  }
  std::size_t deepest() const { return deepest_; }

 private:
  static constexpr std::size_t kDeepest = 3000;

  bool more() const { return at_ < text_.size(); }
  bool take(char c) {
    if (!more() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void blanks() {
    while (more() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }

  bool read_value(Value& value, std::size_t depth) {
    if (!more() || depth > kDeepest) return false;
    value.at = at_;
    const char first = text_[at_];
    bool good = false;
    if (first == '{' || first == '[') {
      deepest_ = std::max(deepest_, depth + 1);
      ++at_;
      value.kind = first == '{' ? Value::Kind::object : Value::Kind::list;
      good = first == '{' ? read_members(value, depth) : read_items(value, depth);
    } else if (first == '"') {
      value.kind = Value::Kind::text;
      good = read_text(value.text);
    } else if (first == '-' || (first >= '0' && first <= '9')) {
      value.kind = Value::Kind::number;
      good = read_number(value.text);
    } else {
      good = read_word(value);
    }
    value.bytes = at_ - value.at;
    return good;
  }

  bool read_word(Value& value) {
    static constexpr std::pair<std::string_view, Value::Kind> kWords[] = {
        {"null", Value::Kind::null}, {"false", Value::Kind::no}, {"true", Value::Kind::yes}};
    for (const auto& [word, kind] : kWords) {
      if (text_.substr(at_, word.size()) != word) continue;
      at_ += word.size();
      value.kind = kind;
      return true;
    }
    return false;
  }

  bool read_items(Value& list, std::size_t depth) {
    blanks();
    if (take(']')) return true;
    do {
      Value item;
      blanks();
      if (!read_value(item, depth + 1)) return false;
      list.items.push_back(std::move(item));
      blanks();
    } while (take(','));
    return take(']');
  }

  bool read_members(Value& object, std::size_t depth) {
    blanks();
    if (take('}')) return true;
    do {
      std::string key;
      Value value;
      blanks();
      if (!read_text(key)) return false;
      blanks();
      if (!take(':')) return false;
      blanks();
      if (!read_value(value, depth + 1)) return false;
      object.members.push_back({std::move(key), std::move(value)});
      blanks();
    } while (take(','));
    return take('}');
  }

  bool read_digits(std::string& out) {
    const std::size_t from = at_;
    while (more() && text_[at_] >= '0' && text_[at_] <= '9') out += text_[at_++];
    return at_ > from;
  }

  bool read_number(std::string& out) {
    if (take('-')) out += '-';
    const bool zero = more() && text_[at_] == '0';
    const std::size_t from = at_;
    if (!read_digits(out) || (zero && at_ - from > 1)) return false;
    if (take('.')) {
      out += '.';
      if (!read_digits(out)) return false;
    }
    if (take('e') || take('E')) {
      out += 'e';
      if (take('-')) {
        out += '-';
      } else {
        take('+');
      }
      if (!read_digits(out)) return false;
    }
    return true;
  }

  bool read_hex(std::uint32_t& unit) {
    unit = 0;
    for (int i = 0; i < 4; ++i) {
      if (!more()) return false;
      const std::size_t digit = std::string_view("0123456789abcdefABCDEF").find(text_[at_++]);
      if (digit == std::string_view::npos) return false;
      unit = unit * 16 + static_cast<std::uint32_t>(digit > 15 ? digit - 6 : digit);
    }
    return true;
  }

  static void append(std::string& out, std::uint32_t point) {
    const auto put = [&](std::uint32_t byte) { out += static_cast<char>(byte); };
    if (point < 0x80) return put(point);
    if (point < 0x800) return put(0xc0 | point >> 6), put(0x80 | (point & 63));
    if (point < 0x10000) return put(0xe0 | point >> 12), put(0x80 | (point >> 6 & 63)), put(0x80 | (point & 63));
    put(0xf0 | point >> 18), put(0x80 | (point >> 12 & 63)), put(0x80 | (point >> 6 & 63)), put(0x80 | (point & 63));
  }

  bool read_escape(std::string& out) {
    if (!more()) return false;
    const char c = text_[at_++];
    const std::size_t simple = std::string_view("\"\\/bfnrt").find(c);
    if (simple != std::string_view::npos) return out += "\"\\/\b\f\n\r\t"[simple], true;
    std::uint32_t unit = 0, low = 0;
    if (c != 'u' || !read_hex(unit)) return false;
    if (unit >= 0xdc00 && unit <= 0xdfff) return false;
    if (unit >= 0xd800 && unit <= 0xdbff) {  // a surrogate pair, or invalid
      if (!take('\\') || !take('u') || !read_hex(low) || low < 0xdc00 || low > 0xdfff) return false;
      unit = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
    }
    return append(out, unit), true;
  }

  bool read_character(std::string& out) {
    std::string_view rest = text_.substr(at_);
    if (static_cast<unsigned char>(rest[0]) < 0x20 || !plain_utf8::take(rest)) return false;
    const std::size_t bytes = text_.size() - at_ - rest.size();
    out += text_.substr(at_, bytes);
    at_ += bytes;
    return true;
  }

  bool read_text(std::string& out) {
    if (!take('"')) return false;
    while (more()) {
      if (take('"')) return true;
      if (take('\\') ? !read_escape(out) : !read_character(out)) return false;
    }
    return false;
  }

  std::string_view text_;
  std::size_t at_ = 0;
  std::size_t deepest_ = 0;
};

inline std::optional<Value> read(std::string_view text) { return Reader(text).read(); }

}  // namespace plain_json
