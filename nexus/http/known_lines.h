// known_lines.h
// Owns:     the lines that heads brought before: clients and backends send most of theirs again and again.
// Promises: a line is found only if each of its bytes is the same, but for the digits at a field line's end: they may be
//           others, as in Content-Length. It can be skipped, because what the fields mean together is decided without
//           llhttp. A line that may hold a key is never kept, nor one that differs in each request, nor
//           Transfer-Encoding. The memory is fixed: of the two field lines of a set, a new one takes the older one's
//           place, and a first line that of the last one of about its length.
// Leaves:   reading a line to start_line.h and head_parser.h, and there what the fields mean together.
// Threads:  one.
// Tested by: tests/known_lines_test.cpp, tests/head_parser_test.cpp, tests/fuzz/heads.h
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <tuple>

#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/http/header_fields.h"
#include "nexus/http/start_line.h"

namespace nexus {

class KnownLines {
 public:
  static constexpr std::size_t kLongestLine = 122;  // without its CRLF and the digits before it

  // A line without its CRLF, divided before the digits at its end.
  class Parts {
   public:
    explicit Parts(std::string_view line) : bytes_(line.size()) {
      while (!line.empty() && is_digit(line.back())) line.remove_suffix(1);
      begin_ = line;
    }
    std::string_view begin() const { return begin_; }
    std::size_t bytes() const { return bytes_; }
    bool ends_in_digits() const { return begin_.size() < bytes_; }
    // Words are compared; more digits than a number has are none.
    bool fits() const {
      return begin_.size() >= kWordBytes && begin_.size() <= kLongestLine && bytes_ - begin_.size() <= kMostDigits;
    }

   private:
    std::string_view begin_;
    std::size_t bytes_;
  };

  // True if the line came before: `row` then tells its parts, of the line at offset `at` of a head.
  bool find(const Parts& line, std::size_t at, FieldRow& row) const {
    if (!line.fits()) return false;
    for (const Line& known : sets_[set_of(line.begin())]) {
      if (!known.is(line)) continue;
      const auto from = static_cast<std::uint32_t>(at);
      const std::uint32_t value_bytes =
          known.ends_in_digits ? static_cast<std::uint32_t>(line.bytes()) - known.value_at : known.value_bytes;
      row = {from, known.name_bytes, from + known.value_at, value_bytes, known.field};
      return true;
    }
    return false;
  }

  // The first line of a head: what it says, if it came before.
  template <class FirstLine>
  bool find_first(std::string_view line, FirstLine& said) const {
    const First<FirstLine>& known = firsts<FirstLine>()[line.size() % kFirstLines];
    if (line.size() < kWordBytes || known.bytes != line.size()) return false;
    if (!equal_words(known.text.data(), line.data(), line.size())) return false;
    said = known.said;
    return true;
  }

  // Keeps a well-formed first line, but for one with a query, which may hold a key.
  template <class FirstLine>
  void keep_first(std::string_view line, const FirstLine& said) {
    First<FirstLine>& known = firsts<FirstLine>()[line.size() % kFirstLines];
    if (line.size() > known.text.size() || line.find('?') != std::string_view::npos) return;
    known.bytes = line.size();
    known.said = said;
    line.copy(known.text.data(), line.size());
  }

  // Keeps a well-formed line, of which `row` tells the parts, unless one of its kind is read each time.
  void keep(const Parts& line, const FieldRow& row) {
    if (!line.fits() || (bit_of(row.field) & kReadEachTime) != 0) return;
    Set& set = sets_[set_of(line.begin())];
    set[1] = set[0];
    Line& newest = set[0];
    newest.bytes = static_cast<std::uint8_t>(line.begin().size());
    newest.ends_in_digits = line.ends_in_digits();
    newest.name_bytes = static_cast<std::uint8_t>(row.name_bytes);
    newest.value_at = static_cast<std::uint8_t>(row.value_at - row.name_at);
    newest.value_bytes = newest.ends_in_digits ? std::uint8_t{0} : static_cast<std::uint8_t>(row.value_bytes);
    newest.field = row.field;
    std::memcpy(newest.text.data(), line.begin().data(), line.begin().size());
  }

 private:
  struct Line {
    std::uint8_t bytes = 0;  // of `text`; 0: the place is free
    std::uint8_t name_bytes = 0;
    std::uint8_t value_at = 0;     // counted from the line's first byte
    std::uint8_t value_bytes = 0;  // if it does not end in digits
    Field field = Field::other;
    bool ends_in_digits = false;
    std::array<char, kLongestLine> text{};

    bool is(const Parts& line) const {
      return bytes == line.begin().size() && ends_in_digits == line.ends_in_digits() &&
             equal_words(text.data(), line.begin().data(), bytes);
    }
  };
  using Set = std::array<Line, 2>;

  static constexpr std::size_t kFirstLines = 8;
  template <class FirstLine>
  struct First {
    std::size_t bytes = 0;  // 0: the place is free
    FirstLine said;
    std::array<char, 100> text{};
  };
  template <class FirstLine>
  using Firsts = std::array<First<FirstLine>, kFirstLines>;

  template <class FirstLine>
  const Firsts<FirstLine>& firsts() const {
    return std::get<Firsts<FirstLine>>(firsts_);
  }
  template <class FirstLine>
  Firsts<FirstLine>& firsts() {
    return std::get<Firsts<FirstLine>>(firsts_);
  }

  static constexpr std::size_t kMostDigits = 19;
  static constexpr std::uint32_t kReadEachTime =
      kCredentials | bit_of(Field::transfer_encoding) | bit_of(Field::upgrade) | bit_of(Field::traceparent) |
      bit_of(Field::tracestate) | bit_of(Field::x_request_id);

  // By the first and the last bytes: names differ there, and most values.
  static std::size_t set_of(std::string_view begin) {
    const std::uint64_t words = word_of(begin.data()) ^ word_of(begin.data() + begin.size() - kWordBytes) >> 3;
    return (words * 0x9e3779b97f4a7c15) >> (64 - kKnownLineBits);
  }

  std::array<Set, std::size_t{1} << kKnownLineBits> sets_{};
  std::tuple<Firsts<RequestLine>, Firsts<StatusLine>> firsts_;
};

}  // namespace nexus
