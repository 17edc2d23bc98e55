// changes.h
// Owns:     the difference of two configurations in words, for the log.
// Promises: names sections, backends and keys alone, no value: a value may be long, or a secret of its owner.
// Leaves:   what the file said to parser.h; when a value is in force to nexus.conf(5).
// Threads:  any.
// Tested by: tests/config_test.cpp, tests/e2e/why.test.mjs
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <string_view>

#include "nexus/config/settings.h"

namespace nexus {

// `[backend b9] added; [backend b2] removed; [routing] strategy, retries`, or `nothing`.
inline std::string describe_changes(const GivenPairs& before, const GivenPairs& after) {
  const auto header_of = [](std::string_view name) { return name.substr(0, name.find("] ") + 1); };
  const auto has = [](const GivenPairs& given, std::string_view header) {
    const auto at = given.lower_bound(std::string(header) + " ");
    return at != given.end() && std::string_view(at->first).starts_with(header);
  };
  std::map<std::string_view, std::string> keys;  // that differ, by header
  const auto note = [&](const GivenPairs& these, const GivenPairs& others, bool both) {
    for (const auto& [name, value] : these) {
      const auto other = others.find(name);
      if (other == others.end() ? false : !both || other->second == value) continue;
      std::string& list = keys[header_of(name)];
      list.append(list.empty() ? "" : ", ").append(name, header_of(name).size() + 1);
    }
  };
  note(before, after, true);
  note(after, before, false);
  std::string out;
  for (const auto& [header, list] : keys) {
    const bool backend = header.starts_with("[backend ");
    const std::string_view what = backend && !has(before, header)  ? "added"
                                  : backend && !has(after, header) ? "removed"
                                                                   : std::string_view(list);
    out.append(out.empty() ? "" : "; ").append(header).append(" ").append(what);
  }
  return out.empty() ? "nothing" : out;
}

}  // namespace nexus
