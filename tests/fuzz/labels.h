// labels.h
// Owns:     the fuzz target of the label sanitiser and the exposition writer, read back by exposition_parser.h.
// Promises: for any names the page parses strictly and has each series once; its labels are the names themselves (raw)
//           or the names as the sanitiser's rule changes them.
// Leaves:   the numbers to the metrics tests.
// Threads:  one.
#pragma once

#include <map>

#include "nexus/metrics/exposition.h"
#include "nexus/metrics/labels.h"
#include "tests/fuzz/fuzz.h"
#include "tests/lib/exposition_parser.h"

namespace fuzz {

// A second implementation of the rule: it works on code points, and on single bytes that are not UTF-8.
inline std::vector<std::string> characters_of(std::string_view name) {
  std::vector<std::string> out;
  while (!name.empty()) {
    std::size_t bytes = 1;
    for (std::size_t n = 4; n > 0; --n) {
      std::vector<std::uint32_t> points;
      if (n <= name.size() && exposition::decode_utf8(name.substr(0, n), &points) && points.size() == 1) bytes = n;
    }
    out.emplace_back(name.substr(0, bytes));
    name.remove_prefix(bytes);
  }
  return out;
}

inline std::string plain_label(std::string_view name, nexus::LabelMode mode) {
  std::string out;
  for (const std::string& c : characters_of(name)) {
    if (mode == nexus::LabelMode::raw) {
      out += exposition::decode_utf8(c) && c != std::string(1, '\0') ? c : "\xef\xbf\xbd";
    } else {
      out += c.size() == 1 && (std::isalnum(static_cast<unsigned char>(c[0])) != 0) ? c : "_";
    }
  }
  if (mode == nexus::LabelMode::sanitize && (out.empty() || std::isdigit(static_cast<unsigned char>(out[0])) != 0)) {
    out.insert(0, "_");
  }
  return out;
}

inline void write_page(nexus::Exposition& page, const nexus::NameTable<nexus::ModelId>& names, nexus::LabelMode mode) {
  nexus::LabelTable<nexus::ModelId> labels;
  labels.update(names, mode);
  check(labels.ids() == names.size() && labels.groups() <= names.size(), "the table is of another size");
  page.begin(nexus::MetricsFormat::text);
  page.family("fuzz_total", "counter", "Names.");
  for (std::uint32_t group = 0; group < labels.groups(); ++group) {
    std::uint64_t members = 0;
    for (std::uint32_t id = 0; id < names.size(); ++id) members += labels.group_of(nexus::ModelId{id}) == group ? 1 : 0;
    page.labels({{"model", labels.text(group)}, {"kind", "x"}});
    page.sample(members);
  }
}

// A byte 0xFF separates the names.
inline void label_page(std::string_view input) {
  if (input.size() > 4096) return;
  nexus::NameTable<nexus::ModelId> names("unknown", 64);
  while (!input.empty()) {
    const std::size_t end = std::min(input.find('\xff'), input.size());
    Guarded name(input.substr(0, end));
    names.intern(name.view());
    input.remove_prefix(std::min(input.size(), end + 1));
  }
  nexus::Exposition page;
  for (const nexus::LabelMode mode : {nexus::LabelMode::sanitize, nexus::LabelMode::raw}) {
    write_page(page, names, mode);
    const exposition::Reader read(page.text());
    check(read.problems.empty(), "the page does not parse: " + exposition::joined(read.problems));
    std::map<std::string, std::uint64_t> wanted;
    for (std::uint32_t id = 0; id < names.size(); ++id) wanted[plain_label(names.name(nexus::ModelId{id}), mode)] += 1;
    check(read.samples() == wanted.size(), "another number of series");
    for (const auto& [label, members] : wanted) {
      check(read.text("fuzz_total", {{"model", label}, {"kind", "x"}}) == std::to_string(members), "series: " + label);
    }
  }
}

}  // namespace fuzz
