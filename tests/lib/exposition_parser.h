// exposition_parser.h
// Owns:     the tests' own reader of the text exposition format: stricter than Prometheus itself.
// Promises: it shares no code with the writer; each violation is one line in `problems`.
// Leaves:   the correct numbers to the tests.
// Threads:  any.
// Tested by: tests/prometheus_test.cpp, tests/labels_test.cpp
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "tests/lib/plain_utf8.h"

namespace exposition {

using Labels = std::map<std::string, std::string>;  // values without escapes

struct Sample {
  std::string name;
  Labels labels;
  double value = 0;
  std::string text;  // the value as written
};

struct Family {
  std::string name, type, help;
  std::vector<Sample> samples;
};

// False if `text` is not UTF-8. Appends its code points to `out`.
inline bool decode_utf8(std::string_view text, std::vector<std::uint32_t>* out = nullptr) {
  while (!text.empty()) {
    const auto point = plain_utf8::take(text);
    if (!point) return false;
    if (out != nullptr) out->push_back(*point);
  }
  return true;
}

class Reader {
 public:
  std::vector<Family> families;
  std::vector<std::string> problems;

  explicit Reader(std::string_view page) {
    if (page.empty() || page.back() != '\n') fail("the page does not end with a line feed");
    while (!page.empty()) {
      const std::size_t end = page.find('\n');
      read_line(page.substr(0, end));
      if (end == std::string_view::npos) break;
      page.remove_prefix(end + 1);
    }
    for (const Family& family : families) {
      if (family.type == "histogram") check_histogram(family);
    }
  }

  const Family* family(std::string_view name) const {
    for (const Family& f : families) {
      if (f.name == name) return &f;
    }
    return nullptr;
  }

  // The value of one series as written, or "absent".
  std::string text(std::string_view name, const Labels& labels = {}) const {
    const Sample* sample = find(name, labels);
    return sample == nullptr ? "absent" : sample->text;
  }

  double value(std::string_view name, const Labels& labels = {}) const {
    const Sample* sample = find(name, labels);
    return sample == nullptr ? std::numeric_limits<double>::quiet_NaN() : sample->value;
  }

  // The sum of all samples of that name whose labels include `labels`.
  double sum(std::string_view name, const Labels& labels = {}) const {
    double total = 0;
    for (const Family& f : families) {
      for (const Sample& s : f.samples) {
        if (s.name == name && includes(s.labels, labels)) total += s.value;
      }
    }
    return total;
  }

  std::size_t samples() const {
    std::size_t n = 0;
    for (const Family& f : families) n += f.samples.size();
    return n;
  }

 private:
  void fail(const std::string& problem) { problems.push_back(problem); }

  static bool includes(const Labels& all, const Labels& some) {
    for (const auto& [name, value] : some) {
      const auto at = all.find(name);
      if (at == all.end() || at->second != value) return false;
    }
    return true;
  }

  const Sample* find(std::string_view name, const Labels& labels) const {
    const auto at = index_.find(key_of(std::string(name), labels));
    return at == index_.end() ? nullptr : &families[at->second.first].samples[at->second.second];
  }

  static std::string key_of(const std::string& name, const Labels& labels) {
    std::string key = name;
    for (const auto& [label, value] : labels) {
      key += '\0' + label + '\0' + value;
    }
    return key;
  }

  static bool is_name(std::string_view name, bool colons) {
    if (name.empty() || (name[0] >= '0' && name[0] <= '9')) return false;
    for (const char c : name) {
      const bool ok = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
                      (colons && c == ':');
      if (!ok) return false;
    }
    return true;
  }

  void read_line(std::string_view line) {
    if (line.starts_with("# HELP ")) return read_help(line.substr(7));
    if (line.starts_with("# TYPE ")) return read_type(line.substr(7));
    if (line.empty() || line[0] == '#') return fail("neither HELP, TYPE nor a sample: " + std::string(line));
    read_sample(line);
  }

  void read_help(std::string_view rest) {
    const std::size_t blank = rest.find(' ');
    const std::string name(rest.substr(0, blank));
    if (family(name) != nullptr) fail("a second HELP: " + name);
    if (!is_name(name, true)) fail("a bad family name: " + name);
    if (blank == std::string_view::npos || blank + 1 == rest.size()) fail("no help: " + name);
    if (!families.empty() && families.back().type.empty()) fail("no TYPE: " + families.back().name);
    families.push_back({name, "", std::string(rest.substr(blank + 1)), {}});
  }

  void read_type(std::string_view rest) {
    const std::size_t blank = rest.find(' ');
    const std::string name(rest.substr(0, blank));
    const std::string type(blank == std::string_view::npos ? "" : rest.substr(blank + 1));
    if (type != "counter" && type != "gauge" && type != "histogram" && type != "summary")
      fail("a bad type: " + std::string(rest));
    if (families.empty() || families.back().name != name || !families.back().type.empty()) {
      return fail("TYPE does not follow its HELP: " + name);
    }
    families.back().type = type;
  }

  void read_sample(std::string_view line) {
    Sample sample;
    std::size_t at = line.find_first_of("{ ");
    if (at == std::string_view::npos) return fail("no value: " + std::string(line));
    sample.name = line.substr(0, at);
    if (line[at] == '{' && !read_labels(line, at, sample.labels)) return fail("bad labels: " + std::string(line));
    if (at >= line.size() || line[at] != ' ') return fail("no blank before the value: " + std::string(line));
    sample.text = line.substr(at + 1);
    char* end = nullptr;
    sample.value = std::strtod(sample.text.c_str(), &end);
    const bool numeric = sample.text.find_first_not_of("0123456789.-") == std::string::npos;
    if (sample.text.empty() || *end != '\0' || !numeric) fail("a bad value: " + std::string(line));
    if (families.empty() || !belongs(sample.name, families.back())) {
      return fail("a sample outside its family: " + std::string(line));
    }
    Family& here = families.back();
    if (here.type != "gauge" && sample.value < 0) fail("below zero: " + std::string(line));
    here.samples.push_back(sample);
    const bool is_new =
        index_.emplace(key_of(sample.name, sample.labels), std::pair{families.size() - 1, here.samples.size() - 1})
            .second;
    if (!is_new) fail("a second sample of a series: " + std::string(line));
  }

  static bool belongs(const std::string& name, const Family& family) {
    if (family.type.empty()) return false;
    if (family.type == "summary") return name == family.name + "_sum" || name == family.name + "_count";
    if (family.type != "histogram") return name == family.name;
    return name == family.name + "_bucket" || name == family.name + "_sum" || name == family.name + "_count";
  }

  // Reads from the opening brace; sets `at` behind the closing one.
  static bool read_labels(std::string_view line, std::size_t& at, Labels& labels) {
    ++at;
    while (true) {
      const std::size_t equals = line.find('=', at);
      if (equals == std::string_view::npos) return false;
      const std::string name(line.substr(at, equals - at));
      at = equals + 1;
      std::string value;
      if (!is_name(name, false) || !read_quoted(line, at, value) || !labels.emplace(name, value).second) return false;
      if (at >= line.size()) return false;
      if (line[at] == '}') return ++at, true;
      if (line[at] != ',') return false;
      ++at;
    }
  }

  static bool read_quoted(std::string_view line, std::size_t& at, std::string& value) {
    if (at >= line.size() || line[at] != '"') return false;
    for (++at; at < line.size() && line[at] != '"'; ++at) {
      if (line[at] != '\\') {
        value += line[at];
        continue;
      }
      if (++at >= line.size()) return false;
      if (line[at] != '\\' && line[at] != '"' && line[at] != 'n') return false;
      value += line[at] == 'n' ? '\n' : line[at];
    }
    if (at >= line.size()) return false;
    ++at;
    return decode_utf8(value) && value.find('\0') == std::string::npos;
  }

  // Each series must have cumulative buckets in ascending order up to +Inf, then sum, then count = the +Inf bucket.
  void check_histogram(const Family& family) {
    std::size_t i = 0;
    while (i < family.samples.size()) {
      Labels labels = family.samples[i].labels;
      labels.erase("le");
      const std::string series = key_of(family.name, labels);
      double last_bound = -std::numeric_limits<double>::infinity(), last_count = 0;
      bool ended = false;
      for (; i < family.samples.size() && family.samples[i].name == family.name + "_bucket"; ++i) {
        Labels own = family.samples[i].labels;
        const std::string le = own["le"];
        own.erase("le");
        if (ended || own != labels) break;
        const double bound = le == "+Inf" ? std::numeric_limits<double>::infinity() : std::atof(le.c_str());
        if (!(bound > last_bound)) fail("bounds do not ascend: " + series);
        if (family.samples[i].value < last_count) fail("buckets are not cumulative: " + series);
        last_bound = bound;
        last_count = family.samples[i].value;
        ended = le == "+Inf";
      }
      if (!ended) fail("no +Inf bucket: " + series);
      if (i + 2 > family.samples.size()) return fail("no sum and count: " + series);
      const Sample& sum = family.samples[i];
      const Sample& count = family.samples[i + 1];
      if (sum.name != family.name + "_sum" || sum.labels != labels) return fail("no sum after the buckets: " + series);
      if (count.name != family.name + "_count" || count.labels != labels)
        return fail("no count after the sum: " + series);
      if (count.value != last_count) fail("count is not the +Inf bucket: " + series);
      i += 2;
    }
  }

  std::map<std::string, std::pair<std::size_t, std::size_t>> index_;
};

inline std::string joined(const std::vector<std::string>& lines) {
  std::string all;
  for (const std::string& line : lines) all += line + "\n";
  return all;
}

}  // namespace exposition
