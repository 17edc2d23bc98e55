// hostile_names.h
// Owns:     random names for models and backends, of the kinds that could break a page.
// Promises: the same names for the same seed; names often become equal once they are sanitised.
// Leaves:   what the names should become to the tests.
// Threads:  any.
#pragma once

#include <cstddef>
#include <iterator>
#include <random>
#include <string>
#include <string_view>

// The pieces are those that break things in combination: truncated and overlong UTF-8, surrogates, quotes, NUL, digits.
inline std::string hostile_name(std::mt19937& random) {
  using namespace std::string_view_literals;
  static constexpr std::string_view kPieces[] = {"",
                                                 "a",
                                                 "Z",
                                                 "_",
                                                 "-",
                                                 ":",
                                                 "/",
                                                 ".",
                                                 "0",
                                                 "9",
                                                 " ",
                                                 "\"",
                                                 "\\",
                                                 "\n",
                                                 "\r",
                                                 "\t",
                                                 "{",
                                                 "}",
                                                 ",",
                                                 "=",
                                                 "\x7F",
                                                 "é",
                                                 "模",
                                                 "🦙",
                                                 "\u0301",
                                                 "\xC3",
                                                 "\xE6\xA8",
                                                 "\xF0\x9F\xA6",
                                                 "\x80",
                                                 "\xFF",
                                                 "\xC0\xAF",
                                                 "\xED\xA0\x80",
                                                 "\xF4\x90\x80\x80",
                                                 "\xE0\x80\x80",
                                                 "llama3",
                                                 "gpt-4",
                                                 "\0"sv};
  std::string name;
  const std::size_t pieces = random() % 7;
  for (std::size_t i = 0; i < pieces; ++i) name += kPieces[random() % std::size(kPieces)];
  if (random() % 4 == 0) {
    for (std::size_t i = random() % 6; i > 0; --i) name += static_cast<char>(random() % 256);
  }
  return name;
}
