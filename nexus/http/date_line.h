// date_line.h
// Owns:     the Date field of a response (RFC 9110 6.6.1), as a whole line.
// Promises: it is written once a second, and no allocation is made for it.
// Leaves:   reading the clocks to the caller.
// Threads:  a part of one loop.
// Tested by: tests/head_writer_test.cpp, tests/e2e/endpoints.test.mjs
#pragma once

#include <array>
#include <cstddef>
#include <ctime>
#include <string_view>

#include "nexus/base/clock.h"

namespace nexus {

class DateLine {
 public:
  // True if the line must be written again at `now`, a time of the loop.
  bool is_due(Ns now) const { return now >= next_; }

  void write(Ns now, Ns wall) {
    const std::time_t second = wall / kSecond;
    std::tm utc{};
    gmtime_r(&second, &utc);
    bytes_ = std::strftime(text_.data(), text_.size(), "Date: %a, %d %b %Y %H:%M:%S GMT\r\n", &utc);
    next_ = now + kSecond - wall % kSecond;
  }
  std::string_view view() const { return {text_.data(), bytes_}; }

 private:
  std::array<char, 48> text_{};
  std::size_t bytes_ = 0;
  Ns next_ = 0;
};

}  // namespace nexus
