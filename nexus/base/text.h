// text.h
// Owns:     small helpers on text: case, tokens, numbers, escapes, base names.
// Promises: pure functions; ASCII rules, whatever the locale; nothing throws but for memory.
// Leaves:   JSON reading to request_json.h, label rules to labels.h.
// Threads:  any.
#pragma once

#include <emmintrin.h>

#include <array>
#include <bit>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace nexus {

constexpr std::string_view kVersion = "0.1.0";

constexpr char to_lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }
constexpr bool is_digit(char c) { return c >= '0' && c <= '9'; }

// What a field's value or a reason phrase may hold (RFC 9110 5.5): tabs, spaces, visible ASCII and bytes above it.
constexpr bool is_field_text(char c) { return c == '\t' || (static_cast<unsigned char>(c) >= 0x20 && c != 0x7f); }

namespace detail {

// A bit for each of the sixteen bytes that is no field text.
inline unsigned controls_in(const char* at) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  const __m128i below = _mm_cmpeq_epi8(_mm_min_epu8(bytes, _mm_set1_epi8(0x1f)), bytes);
  const __m128i bad = _mm_or_si128(_mm_andnot_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('\t')), below),
                                   _mm_cmpeq_epi8(bytes, _mm_set1_epi8(0x7f)));
  return static_cast<unsigned>(_mm_movemask_epi8(bad));
}

}  // namespace detail

// Where the first byte that is no field text stands in [from, to) of `base`, or `to`. Sixteen bytes at a time; fewer
// are looked at together with those before them.
inline std::size_t find_control(const char* base, std::size_t from, std::size_t to) {
  for (; from + 16 <= to; from += 16) {
    const unsigned mask = detail::controls_in(base + from);
    if (mask != 0) return from + static_cast<std::size_t>(std::countr_zero(mask));
  }
  if (to < 16) {
    while (from < to && is_field_text(base[from])) ++from;
    return from;
  }
  const unsigned mask = detail::controls_in(base + to - 16) >> (16 - (to - from));
  return mask == 0 ? to : from + static_cast<std::size_t>(std::countr_zero(mask));
}

constexpr bool equals_ignoring_case(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (to_lower(a[i]) != to_lower(b[i])) return false;
  }
  return true;
}

constexpr bool starts_with_ignoring_case(std::string_view text, std::string_view prefix) {
  return text.size() >= prefix.size() && equals_ignoring_case(text.substr(0, prefix.size()), prefix);
}

// Without the spaces and tabs (RFC 9110 5.6.3: OWS) at both ends.
constexpr std::string_view trim_blanks(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}

// The next element of a comma-separated list, trimmed; `list` loses it. Empty elements come out empty.
constexpr std::string_view next_list_element(std::string_view& list) {
  const std::size_t comma = list.find(',');
  const std::string_view element = list.substr(0, comma);
  list.remove_prefix(comma == std::string_view::npos ? list.size() : comma + 1);
  return trim_blanks(element);
}

// Digits alone, no sign, no leading zero but in "0" itself, below 2^63. Anything else: nothing.
constexpr std::optional<std::uint64_t> parse_decimal(std::string_view text) {
  if (text.empty() || text.size() > 19 || (text.size() > 1 && text[0] == '0')) return std::nullopt;
  std::uint64_t value = 0;
  for (const char c : text) {
    if (!is_digit(c)) return std::nullopt;
    value = value * 10 + static_cast<std::uint64_t>(c - '0');
  }
  if (value > INT64_MAX) return std::nullopt;
  return value;
}

// A number's digits, without an allocation.
class Digits {
 public:
  explicit Digits(std::uint64_t value, int base = 10) {
    const char* end = std::to_chars(text_.data(), text_.data() + text_.size(), value, base).ptr;
    bytes_ = static_cast<std::size_t>(end - text_.data());
  }
  std::string_view view() const { return {text_.data(), bytes_}; }

 private:
  std::array<char, 64> text_;
  std::size_t bytes_;
};

namespace detail {

// The bytes of the well-formed UTF-8 character at the front of `text` (RFC 3629), or 0 where there is none.
inline std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const auto follows = [&](std::size_t i) { return i < text.size() && (byte(i) & 0xc0) == 0x80; };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return follows(1) ? 2 : 0;
  if (first >= 0xe0 && first <= 0xef) {
    if (!follows(1) || !follows(2)) return 0;
    if (first == 0xe0 && byte(1) < 0xa0) return 0;  // overlong
    if (first == 0xed && byte(1) > 0x9f) return 0;  // a surrogate
    return 3;
  }
  if (first >= 0xf0 && first <= 0xf4) {
    if (!follows(1) || !follows(2) || !follows(3)) return 0;
    if (first == 0xf0 && byte(1) < 0x90) return 0;
    if (first == 0xf4 && byte(1) > 0x8f) return 0;
    return 4;
  }
  return 0;
}

}  // namespace detail

// Appends `text` as the inside of a JSON string (RFC 8259 7): always valid JSON, also where `text` is not valid UTF-8
// (a byte that belongs to no character becomes U+FFFD).
template <class Out>  // with += for text and for a character
void append_json_escaped(Out& out, std::string_view text) {
  constexpr std::string_view kHex = "0123456789abcdef";
  while (!text.empty()) {
    const char c = text[0];
    const std::size_t length = detail::utf8_length(text);
    if (length == 0) {
      out += "\xef\xbf\xbd";
      text.remove_prefix(1);
      continue;
    }
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      out += "\\u00";
      out += kHex[static_cast<unsigned char>(c) >> 4];
      out += kHex[static_cast<unsigned char>(c) & 15];
    } else {
      out += text.substr(0, length);
    }
    text.remove_prefix(length);
  }
}

inline std::string json_string(std::string_view text) {
  std::string out = "\"";
  append_json_escaped(out, text);
  return out += '"';
}

}  // namespace nexus
