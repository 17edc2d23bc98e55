// known_lines.h
// Owns:     the lines that heads brought before: clients and backends send most of theirs again and again.
// Promises: a line is found only if each of its bytes is the same, but for the digits at a field line's end: they may
// be
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
    std::size_t digits() const { return bytes_ - begin_.size(); }
    // Words are compared; more digits than a number has are none.
    bool fits() const {
      return begin_.size() >= kWordBytes && begin_.size() <= kLongestLine && digits() <= kMostDigits;
    }

   private:
    std::string_view begin_;
    std::size_t bytes_;
  };

  // The index in lines_ of the line that was read last. A head's lines mostly come in the same order again.
  using Place = std::uint16_t;
  static constexpr Place kRequestBegins = 2 << kKnownLineBits;
  static constexpr Place kAnswerBegins = kRequestBegins + 1;
  static constexpr Place kNowhere = kRequestBegins + 2;  // the last line is not kept

  // The bytes, with its CRLF, of the line at offset `at` of `head` if it is the one that came behind that at `place`
  // before; 0: it is another, or not complete. `row` then tells its parts, and `place` is where it is kept.
  std::size_t follow(Place& place, std::string_view head, std::size_t at, FieldRow& row) const {
    const Place next = next_[place];
    const Line& known = lines_[next];
    const char* const from = head.data() + at;
    const std::size_t left = head.size() - at;
    if (known.bytes == 0 || left < std::size_t{known.bytes} + kMostDigits + 2) return 0;
    if (!equal_words(known.text.data(), from, known.bytes)) return 0;
    std::size_t bytes = known.bytes;
    while (is_digit(from[bytes]) && bytes - known.bytes < kMostDigits) ++bytes;
    if (!known.has_digits(bytes - known.bytes) || from[bytes] != '\r' || from[bytes + 1] != '\n') return 0;
    row = known.row_at(at, bytes);
    place = next;
    return bytes + 2;
  }

  // True if the line, which begins at offset `at` of a head, came before: `row` then tells its parts.
  bool find(Place& place, const Parts& line, std::size_t at, FieldRow& row) {
    if (!line.fits()) return false;
    const Place first = set_of(line.begin());
    for (const Place here : {first, static_cast<Place>(first + 1)}) {
      if (!lines_[here].is(line)) continue;
      row = lines_[here].row_at(at, line.bytes());
      go_on(place, here);
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
  void keep(Place& place, const Parts& line, const FieldRow& row) {
    const std::string_view value(line.begin().data() + (row.value_at - row.name_at), row.value_bytes);
    if (!line.fits() || (bit_of(row.field) & kReadEachTime) != 0 ||
        (row.field == Field::host && detail::check_host(value) != nullptr)) {
      place = kNowhere;
      return;
    }
    const Place here = set_of(line.begin());
    lines_[here + 1] = lines_[here];
    go_on(place, here);
    Line& newest = lines_[here];
    newest.bytes = static_cast<std::uint8_t>(line.begin().size());
    newest.most_digits = line.digits() == 0 ? std::uint8_t{0} : row.field == Field::host ? kPortDigits : kMostDigits;
    newest.name_bytes = static_cast<std::uint8_t>(row.name_bytes);
    newest.value_at = static_cast<std::uint8_t>(row.value_at - row.name_at);
    newest.value_bytes = static_cast<std::uint8_t>(row.value_bytes - line.digits());
    newest.field = row.field;
    std::memcpy(newest.text.data(), line.begin().data(), line.begin().size());
  }

 private:
  struct Line {
    std::uint8_t bytes = 0;  // of `text`; 0: the place is free
    std::uint8_t name_bytes = 0;
    std::uint8_t value_at = 0;     // counted from the line's first byte
    std::uint8_t value_bytes = 0;  // without the digits
    std::uint8_t most_digits = 0;  // behind `text`; at least one, if not 0
    Field field = Field::other;
    std::array<char, kLongestLine> text{};

    // Of such a line of so many bytes, without its CRLF, at offset `at` of a head.
    FieldRow row_at(std::size_t at, std::size_t line_bytes) const {
      const auto from = static_cast<std::uint32_t>(at);
      const std::uint32_t digits = static_cast<std::uint32_t>(line_bytes) - bytes;
      return {from, name_bytes, from + value_at, value_bytes + digits, field, true};
    }
    bool has_digits(std::size_t count) const { return (count > 0) == (most_digits > 0) && count <= most_digits; }

    bool is(const Parts& line) const {
      return bytes == line.begin().size() && has_digits(line.digits()) &&
             equal_words(text.data(), line.begin().data(), bytes);
    }
  };

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

  static constexpr std::uint8_t kMostDigits = 19;  // behind `text`
  static constexpr std::uint8_t kPortDigits = 5;
  static constexpr std::uint32_t kReadEachTime = kCredentials | bit_of(Field::transfer_encoding) |
                                                 bit_of(Field::upgrade) | bit_of(Field::traceparent) |
                                                 bit_of(Field::tracestate) | bit_of(Field::x_request_id);

  void go_on(Place& place, Place to) { place = next_[place] = to; }

  // The first place of the line's set: by its first and last bytes, for names differ there, and most values.
  static Place set_of(std::string_view begin) {
    const char* const last = begin.data() + begin.size() - kWordBytes;
    const std::uint64_t words = word_at<std::uint64_t>(begin.data()) ^ word_at<std::uint64_t>(last) >> 3;
    return static_cast<Place>((words * 0x9e3779b97f4a7c15) >> (64 - kKnownLineBits) << 1);
  }

  std::array<Line, kRequestBegins> lines_{};  // in sets of two, the newer one first
  std::array<Place, kNowhere + 1> next_{};    // by Place: where the line is kept that came behind it
  std::tuple<Firsts<RequestLine>, Firsts<StatusLine>> firsts_;
};

}  // namespace nexus
