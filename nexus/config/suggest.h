// suggest.h
// Owns:     the hint in an error about an unknown word: the word that was probably meant, or all that are known.
// Promises: pure functions; a word is compared in small letters.
// Leaves:   which words are known to keys.h and parser.h.
// Threads:  any.
// Tested by: tests/config_test.cpp
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/base/text.h"

namespace nexus::config {

using Words = std::vector<std::string_view>;

// `a, b, c`, each between `open` and `close`.
inline std::string joined(const Words& words, std::string_view open, std::string_view close,
                          std::string_view between = ", ") {
  std::string result;
  for (std::string_view word : words) {
    if (!result.empty()) result += between;
    result.append(open).append(word).append(close);
  }
  return result;
}

// The word that was probably meant by `typed`, which is none of them; or empty.
inline std::string_view nearest_word(std::string_view typed, const Words& words) {
  std::string small(typed);
  std::transform(small.begin(), small.end(), small.begin(), to_lower);
  std::string_view meant;
  std::size_t least = std::min<std::size_t>(3, (typed.size() + 1) / 2 + 1);  // short words are all near one another
  for (std::string_view word : words) {
    const std::size_t distance = edit_distance(small, word);
    if (distance < least) meant = word;
    least = std::min(least, distance);
  }
  return meant;
}

// The word that was probably meant, or all of them, between `open` and `close`.
inline std::string suggestion(std::string_view typed, const Words& words, std::string_view open,
                              std::string_view close) {
  const std::string_view meant = nearest_word(typed, words);
  if (meant.empty()) return "expected one of " + joined(words, open, close);
  return "did you mean " + joined({meant}, open, close) + "?";
}

}  // namespace nexus::config
