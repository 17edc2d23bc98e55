// columns.h
// Owns:     text in columns for a terminal or a pipe, and what keeps foreign text harmless there.
// Promises: nothing that a server calls itself moves the cursor, colours, or ends the line; a column is as wide as its
//           widest cell; no line ends in blanks.
// Leaves:   which columns there are to check.h and top.h.
// Threads:  any.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "log.h"

namespace nexus {

// Foreign text made fit for a line: controls escaped, cut to `limit` bytes.
inline std::string harmless(std::string_view text, std::size_t limit = 64) {
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
