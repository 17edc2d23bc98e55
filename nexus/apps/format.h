// format.h
// Owns:     numbers as a person reads them: rates, times, spans, shares.
// Promises: about three digits whatever the size; the same in `nexus top` and on the status page.
// Leaves:   exact numbers to text_buffer.h.
// Threads:  any.
// Owns:     text in columns for a terminal or a pipe, and what keeps foreign text escape_for_terminal there.
// Promises: nothing that a server calls itself moves the cursor, colours, or ends the line; a column is as wide as its
//           widest cell; no line ends in blanks.
// Leaves:   which columns there are to check.h and top.h.
// Threads:  any.
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/os/log.h"

namespace nexus {
inline std::string with_decimals(double value, int decimals) {
  std::array<char, 64> text;
  const int length = std::snprintf(text.data(), text.size(), "%.*f", decimals, value);
  return {text.data(), std::min(static_cast<std::size_t>(length), text.size() - 1)};
}

// Three digits or so, whatever the size.
inline std::string rate_text(double value) {
  if (value < 0.005) return "0";
  return with_decimals(value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
}

inline std::string seconds_text(const std::optional<double>& seconds) {
  if (!seconds) return "-";
  if (std::isinf(*seconds)) return ">5 min";  // beyond the last bound of a histogram, which is later yet
  if (*seconds < 0.9995) return with_decimals(*seconds * 1000, *seconds < 0.00995 ? 1 : 0) + " ms";
  return with_decimals(*seconds, *seconds < 9.995 ? 2 : 1) + " s";
}

// `3d 4h`, `4h 12m`, `12m 7s`, `7s`
inline std::string span_text(std::uint64_t seconds) {
  const auto two = [](std::uint64_t a, const char* unit, std::uint64_t b, const char* lesser) {
    return std::to_string(a) + unit + " " + std::to_string(b) + lesser;
  };
  if (seconds >= 86400) return two(seconds / 86400, "d", seconds / 3600 % 24, "h");
  if (seconds >= 3600) return two(seconds / 3600, "h", seconds / 60 % 60, "m");
  if (seconds >= 60) return two(seconds / 60, "m", seconds % 60, "s");
  return std::to_string(seconds) + "s";
}

inline std::string percent_text(std::uint64_t part, std::uint64_t whole) {
  if (whole == 0) return "0%";
  return with_decimals(100.0 * static_cast<double>(part) / static_cast<double>(whole), 2) + "%";
}

// Foreign text made fit for a line: controls escaped, cut to `limit` bytes.
inline std::string escape_for_terminal(std::string_view text, std::size_t limit = 64) {
  std::string out;
  detail::append_log_escaped(out, text, limit, false);
  return out;
}

// The characters of well-formed UTF-8: what a terminal shows, but for those that are wide.
inline std::size_t width_of(std::string_view text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

// The first `width` characters.
inline std::string_view cut_to_width(std::string_view text, std::size_t width) {
  std::size_t at = 0;
  for (; at < text.size(); ++at) {
    if ((static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) continue;
    if (width == 0) break;
    width -= 1;
  }
  return text.substr(0, at);
}

class Columns {
 public:
  enum class Align : std::uint8_t { left, right };
  struct Head {
    std::string title;
    Align align = Align::left;
  };

  explicit Columns(std::vector<Head> heads) : heads_(std::move(heads)) {}

  void add(std::vector<std::string> cells) {
    assert(cells.size() == heads_.size());
    rows_.push_back(std::move(cells));
  }

  // A line of titles and a line a row.
  std::string text() const {
    std::vector<std::size_t> widths;
    for (std::size_t i = 0; i < heads_.size(); ++i) {
      std::size_t widest = width_of(heads_[i].title);
      for (const auto& row : rows_) widest = std::max(widest, width_of(row[i]));
      widths.push_back(widest);
    }
    std::string out;
    for (std::size_t i = 0; i < heads_.size(); ++i) append(out, heads_[i].title, widths[i], heads_[i].align, i == 0);
    end_line(out);
    for (const auto& row : rows_) {
      for (std::size_t i = 0; i < row.size(); ++i) append(out, row[i], widths[i], heads_[i].align, i == 0);
      end_line(out);
    }
    return out;
  }

 private:
  static void append(std::string& out, std::string_view cell, std::size_t width, Align align, bool first) {
    if (!first) out += "  ";
    const std::string blanks(width - width_of(cell), ' ');
    if (align == Align::right) out += blanks;
    out += cell;
    if (align == Align::left) out += blanks;
  }

  static void end_line(std::string& out) {
    while (!out.empty() && out.back() == ' ') out.pop_back();
    out += '\n';
  }

  std::vector<Head> heads_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace nexus
