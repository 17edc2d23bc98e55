// format.h
// Owns:     numbers as a person reads them, and text in columns for a terminal or a pipe.
// Promises: a rate or time has about three digits; foreign text cannot move the cursor, colour, or end the line; a
//           column is as wide as its widest cell; no line ends in spaces.
// Leaves:   exact numbers to text_buffer.h; which columns there are to check.h and top.h.
// Threads:  any.
// Tested by: tests/top_test.cpp, tests/check_test.cpp
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
#include <vector>

#include "nexus/os/log.h"

namespace nexus {

inline std::string with_decimals(double value, int decimals) {
  std::array<char, 64> text;
  const int length = std::snprintf(text.data(), text.size(), "%.*f", decimals, value);
  return {text.data(), std::min(static_cast<std::size_t>(length), text.size() - 1)};
}

inline std::string rate_text(double value) {
  if (value < 0.005) return "0";
  return with_decimals(value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
}

// `beyond` is shown for what is over the histogram's last bound.
inline std::string seconds_text(const std::optional<double>& seconds, std::string_view beyond = ">5 min") {
  if (!seconds) return "-";
  if (std::isinf(*seconds)) return std::string(beyond);
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

// How a backend is: `up`, the word for one whose health checks fail, or for how long it gets no requests and why.
inline std::string state_text(bool healthy, std::string_view down, std::string_view ejected_why,
                              std::uint64_t seconds_left) {
  if (!healthy) return std::string(down);
  return ejected_why.empty() ? "up" : "ejected " + span_text(seconds_left) + ": " + std::string(ejected_why);
}

// Text for behind the number of healthy backends: empty if none is ejected.
inline std::string ejected_text(std::uint64_t ejected) {
  return ejected > 0 ? ", " + std::to_string(ejected) + " ejected" : "";
}

inline std::string percent_text(std::uint64_t part, std::uint64_t whole) {
  if (whole == 0) return "0%";
  return with_decimals(100.0 * static_cast<double>(part) / static_cast<double>(whole), 2) + "%";
}

// Foreign text for one line of a terminal: control and invisible characters escaped, cut to `limit` bytes.
inline std::string escape_for_terminal(std::string_view text, std::size_t limit = 64) {
  std::string out;
  detail::append_log_escaped(out, text, limit, false);
  return out;
}

// The number of characters of well-formed UTF-8. East Asian wide characters count as one.
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

// Rows of as many cells as `alignment` has characters: 'l' for left, 'r' for right.
inline std::string in_columns(const std::vector<std::vector<std::string>>& rows, std::string_view alignment) {
  std::vector<std::size_t> widths(alignment.size());
  for (const auto& row : rows) {
    assert(row.size() == alignment.size());
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], width_of(row[i]));
  }
  std::string out;
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string blanks(widths[i] - width_of(row[i]), ' ');
      if (i > 0) out += "  ";
      out += alignment[i] == 'r' ? blanks + row[i] : row[i] + blanks;
    }
    out.erase(out.find_last_not_of(' ') + 1);
    out += '\n';
  }
  return out;
}

}  // namespace nexus
