// figures.h
// Owns:     numbers as a person reads them: rates, times, spans, shares.
// Promises: about three digits whatever the size; the same in `nexus top` and on the status page.
// Leaves:   exact numbers to page.h.
// Threads:  any.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

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

}  // namespace nexus
