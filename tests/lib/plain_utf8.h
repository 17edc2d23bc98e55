// plain_utf8.h
// Owns:     the tests' own decoder of UTF-8: by arithmetic, with every range checked afterwards.
// Promises: it shares no code with nexus/.
// Leaves:   which characters may occur to the callers.
// Threads:  any.
// Tested by: tests/hostile_readers_test.cpp, tests/labels_test.cpp
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace plain_utf8 {

// Takes one character off `text`, which is not empty. Nothing if it does not begin with valid UTF-8.
inline std::optional<std::uint32_t> take(std::string_view& text) {
  static constexpr std::uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
  const auto lead = static_cast<unsigned char>(text[0]);
  const std::size_t bytes = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
  if (bytes == 0 || bytes > text.size()) return std::nullopt;
  std::uint32_t point = bytes == 1 ? lead : lead & (0x7fu >> bytes);
  for (std::size_t i = 1; i < bytes; ++i) {
    const auto tail = static_cast<unsigned char>(text[i]);
    if ((tail & 0xc0) != 0x80) return std::nullopt;
    point = point << 6 | (tail & 0x3fu);
  }
  if (point < kLeast[bytes] || point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff)) return std::nullopt;
  text.remove_prefix(bytes);
  return point;
}

}  // namespace plain_utf8
