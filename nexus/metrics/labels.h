// labels.h
// Owns:     the label value of a name, sanitised or escaped, and the groups of names that have the same one.
// Promises: a sanitised value matches [a-zA-Z_][a-zA-Z0-9_]*; an escaped one is valid UTF-8 that Prometheus can parse;
//           names with equal values share one group, so a page that is written by group has no series twice.
// Leaves:   adding up a group's numbers to prometheus.h.
// Threads:  the functions: any. A LabelTable: one thread (control), as the NameTable that it reads.
// Tested by: tests/labels_test.cpp, tests/prometheus_test.cpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nexus/base/text.h"
#include "nexus/config/settings.h"
#include "nexus/metrics/ids.h"

namespace nexus {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// Replaces each code point outside [a-zA-Z0-9_], and each byte that is not UTF-8, by one `_`. The result is not empty
// and does not begin with a digit.
inline std::string sanitize_label(std::string_view name) {
  std::string out;
  for (std::size_t i = 0; i < name.size();) {
    const char c = name[i];
    const bool digit = is_digit(c);
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
    if (digit && out.empty()) out += '_';
    out += digit || letter ? c : '_';
    const std::size_t length = detail::utf8_length(name.substr(i));
    i += std::max<std::size_t>(length, 1);
  }
  if (out.empty()) out += '_';
  return out;
}

// Escapes the name for the exposition format. Prometheus rejects a page with NUL or with bytes that are not UTF-8, so
// each of these becomes U+FFFD.
inline std::string escape_label(std::string_view name) {
  std::string out;
  for (std::size_t i = 0; i < name.size();) {
    const std::size_t length = detail::utf8_length(name.substr(i));
    if (name[i] == '\n') {
      out += "\\n";
    } else if (name[i] == '\0' || length == 0) {
      out += kReplacementCharacter;
    } else {
      if (name[i] == '\\' || name[i] == '"') out += '\\';
      out += name.substr(i, length);
    }
    i += std::max<std::size_t>(length, 1);
  }
  return out;
}

inline std::string label_of(std::string_view name, LabelMode mode) {
  return mode == LabelMode::sanitize ? sanitize_label(name) : escape_label(name);
}

constexpr std::string_view kOneLabel =
    "these backends share one label in the metrics, where their values are added: rename them, or set [metrics] labels "
    "= "
    "raw";

// The names, `gpu-1, gpu_1`, of each label that several backends have.
inline std::vector<std::string> backends_with_one_label(const Settings& settings) {
  std::map<std::string, std::pair<std::size_t, std::string>> by_label;
  for (const BackendSettings& backend : settings.backends) {
    auto& [count, names] = by_label[label_of(backend.name, settings.metrics.labels)];
    names.append(count++ == 0 ? "" : ", ").append(backend.name);
  }
  std::vector<std::string> out;
  for (auto& [label, group] : by_label) {
    if (group.first > 1) out.push_back(std::move(group.second));
  }
  return out;
}

// The label value of every id of a NameTable, computed once, and the group of ids that share it.
template <class Id>
class LabelTable {
 public:
  // Adds the names that are new since the last call; starts again if the mode changed, or if memory ran out in that
  // call.
  void update(const NameTable<Id>& names, LabelMode mode) {
    if (mode != mode_ || !complete_) {
      groups_.clear();
      texts_.clear();
      by_text_.clear();
      mode_ = mode;
    }
    complete_ = false;
    for (std::size_t i = groups_.size(); i < names.size(); ++i) {
      std::string text = label_of(names.name(Id{static_cast<std::uint32_t>(i)}), mode);
      const auto [at, is_new] = by_text_.try_emplace(std::move(text), static_cast<std::uint32_t>(texts_.size()));
      if (is_new) texts_.push_back(at->first);
      groups_.push_back(at->second);
    }
    complete_ = true;
  }

  std::uint32_t group_of(Id id) const { return groups_.at(index_of(id)); }
  std::string_view text(std::uint32_t group) const { return texts_[group]; }
  std::size_t ids() const { return groups_.size(); }
  std::size_t groups() const { return texts_.size(); }

 private:
  LabelMode mode_ = LabelMode::sanitize;
  bool complete_ = true;
  std::vector<std::uint32_t> groups_;    // by id
  std::vector<std::string_view> texts_;  // by group: the keys of by_text_, which do not move
  std::unordered_map<std::string, std::uint32_t> by_text_;
};

}  // namespace nexus
