// labels.h
// Owns:     how a name becomes a label value, sanitised or escaped, and which names become the same one.
// Promises: a sanitised value matches [a-zA-Z_][a-zA-Z0-9_]*; an escaped one is valid UTF-8 that Prometheus can parse;
//           names whose values are equal share one group, so a page written by group has no series twice.
// Leaves:   adding up a group's numbers to prometheus.h.
// Threads:  the functions: any. A LabelTable: one thread (control), as the NameTable that it reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "nexus/base/text.h"
#include "nexus/config/settings.h"
#include "nexus/metrics/ids.h"

namespace nexus {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// Each code point outside [a-zA-Z0-9_], and each byte that is no UTF-8, as one `_`; never empty, never digit first.
inline std::string sanitize_label(std::string_view name) {
  std::string out;
  out.reserve(name.size() + 1);
  for (std::size_t i = 0; i < name.size();) {
    const char c = name[i];
    const bool digit = is_digit(c);
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
    if (digit && out.empty()) out += '_';
    out += digit || letter ? c : '_';
    const std::size_t length = detail::utf8_length(name.substr(i));
    i += length == 0 ? 1 : length;
  }
  if (out.empty()) out += '_';
  return out;
}

// The name as it is, escaped as the exposition format asks. A byte that is no UTF-8, and NUL, would have Prometheus
// refuse the whole page: each becomes U+FFFD.
inline std::string escape_label(std::string_view name) {
  std::string out;
  out.reserve(name.size() + 8);
  for (std::size_t i = 0; i < name.size();) {
    const std::size_t length = detail::utf8_length(name.substr(i));
    switch (name[i]) {
      case '\\': out += "\\\\"; break;
      case '"': out += "\\\""; break;
      case '\n': out += "\\n"; break;
      case '\0': out += kReplacementCharacter; break;
      default:
        if (length == 0) {
          out += kReplacementCharacter;
        } else {
          out += name.substr(i, length);
        }
    }
    i += length == 0 ? 1 : length;
  }
  return out;
}

inline std::string label_of(std::string_view name, LabelMode mode) {
  return mode == LabelMode::sanitize ? sanitize_label(name) : escape_label(name);
}

// The label value of every id of a NameTable, made once, and the group that the ids with that value form.
template <class Id>
class LabelTable {
 public:
  // Takes in the names that were added since; all anew where the mode changed.
  void update(const NameTable<Id>& names, LabelMode mode) {
    if (mode != mode_) {
      groups_.clear();
      texts_.clear();
      by_text_.clear();
      mode_ = mode;
    }
    for (std::size_t i = groups_.size(); i < names.size(); ++i) {
      const std::string text = label_of(names.name(Id{static_cast<std::uint32_t>(i)}), mode);
      const auto [at, is_new] = by_text_.try_emplace(text, static_cast<std::uint32_t>(texts_.size()));
      if (is_new) texts_.push_back(text);
      groups_.push_back(at->second);
    }
  }

  std::uint32_t group_of(Id id) const { return groups_.at(index_of(id)); }
  std::string_view text(std::uint32_t group) const { return texts_[group]; }
  std::size_t ids() const { return groups_.size(); }
  std::size_t groups() const { return texts_.size(); }

 private:
  LabelMode mode_ = LabelMode::sanitize;
  std::vector<std::uint32_t> groups_;  // by id
  std::deque<std::string> texts_;      // by group
  std::unordered_map<std::string, std::uint32_t> by_text_;
};

}  // namespace nexus
