// text.h
// Owns:     small functions of text and numbers: case, lists, likeness, decimal and hex numbers, UTF-8, host:port,
//           JSON strings; splitmix64's hash and random sequence.
// Promises: pure functions with ASCII rules, whatever the locale, that give the same on every machine; they throw
//           only std::bad_alloc. No hash is for secrets.
// Leaves:   searching long text to simd.h, reading JSON to json_reader.h, label rules to labels.h.
// Threads:  any.
// Tested by: tests/text_test.cpp, tests/router_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace nexus {

// A hash of a text that comes in pieces (FNV-1a). Not for secrets.
class TextHash {
 public:
  void add(char byte) { state_ = (state_ ^ static_cast<unsigned char>(byte)) * 0x100000001b3; }
  void add(std::string_view text) {
    for (const char byte : text) add(byte);
  }
  std::uint64_t value() const;  // never 0

 private:
  std::uint64_t state_ = 0xcbf29ce484222325;
};

// Spreads every bit of `x` over the whole result; 0 stays 0.
constexpr std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// The n-th number of the random sequence that starts at `seed`.
constexpr std::uint64_t random_at(std::uint64_t seed, std::uint64_t n) {
  return mix(seed + (n + 1) * 0x9e3779b97f4a7c15);
}

constexpr std::string_view kVersion = "0.1.0";

constexpr char to_lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }
constexpr bool is_digit(char c) { return c >= '0' && c <= '9'; }

// True for the bytes of a field value or a reason phrase (RFC 9110 5.5): tab, space, visible ASCII, and above 0x7f.
constexpr bool is_field_text(char c) { return c == '\t' || (static_cast<unsigned char>(c) >= 0x20 && c != 0x7f); }

// As starts_with(), without a call.
template <std::size_t N>
inline bool begins_with(std::string_view text, const char (&constant)[N]) {
  return text.size() >= N - 1 && std::memcmp(text.data(), constant, N - 1) == 0;
}

template <class Word>
constexpr std::uint64_t word_at(const char* at) {
  std::array<char, sizeof(Word)> bytes{};
  std::copy_n(at, bytes.size(), bytes.begin());
  return std::bit_cast<Word>(bytes);
}

constexpr std::size_t kWordBytes = sizeof(std::uint64_t);

// True if both have the same bytes: a memcmp() without a call. `bytes` is at least kWordBytes.
inline bool equal_words(const char* a, const char* b, std::size_t bytes) {
  const std::size_t last = bytes - kWordBytes;
  for (std::size_t at = 0; at < last; at += kWordBytes) {
    if (word_at<std::uint64_t>(a + at) != word_at<std::uint64_t>(b + at)) return false;
  }
  return word_at<std::uint64_t>(a + last) == word_at<std::uint64_t>(b + last);
}

// As a == b, without a call.
inline bool same_text(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  if (a.size() >= kWordBytes) return equal_words(a.data(), b.data(), a.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
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

// Removes spaces and tabs (RFC 9110 5.6.3: OWS) at both ends.
constexpr std::string_view trim_blanks(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}

// Removes the first element from the comma-separated `list` and returns it trimmed. It may be empty.
constexpr std::string_view next_list_element(std::string_view& list) {
  const std::size_t comma = list.find(',');
  const std::string_view element = list.substr(0, comma);
  list.remove_prefix(comma == std::string_view::npos ? list.size() : comma + 1);
  return trim_blanks(element);
}

// Digits only, without a leading zero except in "0", below 2^63. Nothing for any other text.
constexpr std::optional<std::uint64_t> parse_decimal(std::string_view text) {
  if (text.empty() || text.size() > 19 || (text.size() > 1 && text[0] == '0')) return std::nullopt;
  std::uint64_t number = 0;
  for (const char c : text) {
    const unsigned digit = static_cast<unsigned char>(c) - unsigned{'0'};
    if (digit > 9) return std::nullopt;
    number = number * 10 + digit;
  }
  if (number > INT64_MAX) return std::nullopt;
  return number;
}

// How many insertions, removals and replacements make `a` into `b`; 99 if either has more than 64 bytes.
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  constexpr std::size_t longest = 64;
  if (a.size() > longest || b.size() > longest) return 99;
  std::array<std::size_t, longest + 1> row{};
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = std::exchange(row[j], std::min({row[j] + 1, row[j - 1] + 1, replaced}));
    }
  }
  return row[b.size()];
}

inline constexpr std::string_view kHexDigits = "0123456789abcdef";

// The 16 hex digits of a number.
constexpr std::array<char, 16> hex_of(std::uint64_t number) {
  std::array<char, 16> digits{};
  for (std::size_t i = digits.size(); i-- > 0; number >>= 4) digits[i] = kHexDigits[number & 15];
  return digits;
}

// 0 to 15, or -1 if `c` is not a hex digit of either case.
constexpr int hex_value(char c) {
  if (is_digit(c)) return c - '0';
  const char lower = to_lower(c);
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

// The digits of a number, without an allocation.
class Digits {
 public:
  explicit Digits(std::integral auto value, int base = 10) {
    const char* end = std::to_chars(text_.data(), text_.data() + text_.size(), value, base).ptr;
    bytes_ = static_cast<std::size_t>(end - text_.data());
  }
  std::string_view view() const { return {text_.data(), bytes_}; }

 private:
  std::array<char, 64> text_;
  std::size_t bytes_;
};

struct Utf8Character {
  char32_t code = 0;
  std::size_t bytes = 0;  // 0: not a well-formed character
};

// Reads the character at the beginning of `text`, which is not empty (RFC 3629).
constexpr Utf8Character read_utf8(std::string_view text) {
  constexpr std::array<char32_t, 5> kLeastCode{0, 0, 0x80, 0x800, 0x10000};  // a lower code is overlong
  const auto byte = [text](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  const std::size_t bytes = lead < 0xc0 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf8 ? 4 : 0;
  if (bytes == 0 || bytes > text.size()) return {};
  char32_t code = lead & (0x7fu >> bytes);
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return {};
    code = code << 6 | (byte(i) & 0x3fu);
  }
  const bool is_surrogate = code >= 0xd800 && code <= 0xdfff;
  if (code < kLeastCode[bytes] || code > 0x10ffff || is_surrogate) return {};
  return {code, bytes};
}

namespace detail {
constexpr std::size_t utf8_length(std::string_view text) { return read_utf8(text).bytes; }
}  // namespace detail

// The length of `text` without a last character that is cut. The rest of `text` must be UTF-8.
inline std::size_t without_cut_character(std::string_view text) {
  for (std::size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if (byte < 0x80) break;
    if (byte < 0xc0) continue;
    const std::size_t bytes = byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
    return bytes > back ? text.size() - back : text.size();
  }
  return text.size();
}

// The host as a URL and a Host field write it: an IPv6 address stands in brackets (RFC 3986 3.2.2).
inline std::string url_host(std::string_view host) {
  const bool is_v6 = host.find(':') != std::string_view::npos;
  std::string out(is_v6 ? "[" : "");
  out += host;
  return is_v6 ? out += ']' : out;
}

// `127.0.0.1:8000`, `[::1]:8000`.
inline std::string host_port(std::string_view host, std::uint16_t port) {
  return url_host(host).append(":").append(Digits(port).view());
}

// Appends `text` as the inside of a JSON string (RFC 8259 7). Every byte that is not part of a UTF-8 character becomes
// U+FFFD, so that the result is always valid JSON.
template <class Out>  // with += for text and for a character
void append_json_escaped(Out& out, std::string_view text) {
  constexpr std::string_view kEscaped = "\"\\\n\r\t", kLetters = "\"\\nrt";
  const auto stands_for_itself = [](char c) { return c >= ' ' && c < 0x7f && c != '"' && c != '\\'; };
  while (!text.empty()) {
    const char c = text[0];
    if (stands_for_itself(c)) {
      const auto end = std::find_if_not(text.begin(), text.end(), stands_for_itself);
      const auto run = static_cast<std::size_t>(end - text.begin());
      out += text.substr(0, run);
      text.remove_prefix(run);
      continue;
    }
    const std::size_t length = read_utf8(text).bytes;
    const std::size_t letter = kEscaped.find(c);
    if (length == 0) {
      out += "\xef\xbf\xbd";
    } else if (letter != std::string_view::npos) {
      out += '\\';
      out += kLetters[letter];
    } else if (is_field_text(c)) {
      out += text.substr(0, length);
    } else {
      out += "\\u00";
      out += kHexDigits[static_cast<unsigned char>(c) >> 4];
      out += kHexDigits[static_cast<unsigned char>(c) & 15];
    }
    text.remove_prefix(std::max<std::size_t>(length, 1));
  }
}

inline std::string json_string(std::string_view text) {
  std::string out = "\"";
  append_json_escaped(out, text);
  return out += '"';
}

inline std::uint64_t TextHash::value() const { return mix(state_) | 1u << 31; }

inline std::uint64_t hash_of(std::string_view text) {
  TextHash hash;
  hash.add(text);
  return hash.value();
}

}  // namespace nexus
