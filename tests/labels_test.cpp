// labels_test.cpp
// Goal:   every label value is one that Prometheus accepts, and names that become the same one are known to be.
// Method: rows from the contract; then seeded random names against a decoder that shares no code with labels.h.
#include "nexus/metrics/labels.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "tests/lib/exposition_parser.h"
#include "tests/lib/hostile_names.h"

using namespace nexus;
using namespace std::string_view_literals;

namespace {

struct Row {
  std::string_view name, expected;
};

bool is_sanitised(std::string_view value) {
  if (value.empty() || (value[0] >= '0' && value[0] <= '9')) return false;
  return value.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") ==
         std::string_view::npos;
}

// The code points of `name`; a byte that is part of none counts as one, above all code points.
std::vector<std::uint32_t> characters(std::string_view name) {
  std::vector<std::uint32_t> all;
  for (std::size_t i = 0; i < name.size();) {
    std::size_t length = 0;
    for (std::size_t n = 1; n <= 4 && i + n <= name.size() && length == 0; ++n) {
      std::vector<std::uint32_t> points;
      if (exposition::decode_utf8(name.substr(i, n), &points) && points.size() == 1) {
        all.push_back(points[0]);
        length = n;
      }
    }
    if (length == 0) all.push_back(0x110000u + static_cast<unsigned char>(name[i]));
    i += length == 0 ? 1 : length;
  }
  return all;
}

std::string expected_sanitised(std::string_view name) {
  std::string out;
  for (const std::uint32_t c : characters(name)) {
    const bool word = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    out += word ? static_cast<char>(c) : '_';
  }
  if (out.empty()) return "_";
  return out[0] >= '0' && out[0] <= '9' ? "_" + out : out;
}

std::string unescaped(std::string_view value) {
  std::string out;
  for (std::size_t i = 0; i < value.size(); ++i) {
    if (value[i] != '\\') {
      out += value[i];
    } else {
      REQUIRE(i + 1 < value.size());
      const char c = value[++i];
      REQUIRE((c == '\\' || c == '"' || c == 'n'));
      out += c == 'n' ? '\n' : c;
    }
  }
  return out;
}

}  // namespace

TEST_SUITE("US1 T005b T015 label sanitising") {
  TEST_CASE("a name becomes the label value that the contract says") {
    const Row rows[] = {
        {"llama3:70b", "llama3_70b"},
        {"123model", "_123model"},
        {"ollama-local:11434", "ollama_local_11434"},
        {"", "_"},
        {"_", "_"},
        {"valid_Name9", "valid_Name9"},
        {"7", "_7"},
        {":7", "_7"},
        {"gpt-4", "gpt_4"},
        {"meta-llama/Llama-3.1-8B", "meta_llama_Llama_3_1_8B"},
        {"a b\tc\nd", "a_b_c_d"},
        {"\"}\n", "___"},
        {"é", "_"},                    // one code point, two bytes
        {"模型", "__"},                // two code points, six bytes
        {"🦙x", "_x"},               // four bytes
        {"e\u0301", "e_"},             // a letter and a combining mark are two
        {"\xC3", "_"},                 // a lead byte alone
        {"\xE6\xA8", "__"},            // a cut sequence: each byte counts
        {"\xC0\xAF", "__"},            // overlong
        {"\xED\xA0\x80", "___"},       // a surrogate
        {"\xF4\x90\x80\x80", "____"},  // above U+10FFFF
        {"\xFF\xFE", "__"},
        {"a\0b"sv, "a_b"},
    };
    for (const Row& row : rows) {
      CAPTURE(row.name);
      CHECK(sanitize_label(row.name) == row.expected);
    }
  }
}

TEST_SUITE("US1 T067 label sanitising, property") {
  TEST_CASE("whatever the name, the value matches [a-zA-Z_][a-zA-Z0-9_]* and has one character a code point") {
    std::mt19937 random(67);
    for (int i = 0; i < 20'000; ++i) {
      const std::string name = hostile_name(random);
      CAPTURE(name);
      const std::string value = sanitize_label(name);
      REQUIRE(is_sanitised(value));
      REQUIRE(value == expected_sanitised(name));
      REQUIRE(sanitize_label(value) == value);
    }
  }
}

TEST_SUITE("US1 raw labels") {
  TEST_CASE("a name is escaped as the exposition format asks") {
    const Row rows[] = {
        {"llama3:70b", "llama3:70b"},
        {"", ""},
        {"a\"b", "a\\\"b"},
        {"a\\b", "a\\\\b"},
        {"a\nb", "a\\nb"},
        {"a\\nb", "a\\\\nb"},
        {"模型 é", "模型 é"},
        {"a\xFFz", "a\xEF\xBF\xBDz"},
        {"a\0z"sv, "a\xEF\xBF\xBDz"},
        {"\xE6\xA8", "\xEF\xBF\xBD\xEF\xBF\xBD"},
    };
    for (const Row& row : rows) {
      CAPTURE(row.name);
      CHECK(escape_label(row.name) == row.expected);
    }
  }

  TEST_CASE("an escaped value is valid UTF-8 on one line, and unescaped it is the name") {
    std::mt19937 random(68);
    for (int i = 0; i < 20'000; ++i) {
      const std::string name = hostile_name(random);
      CAPTURE(name);
      const std::string value = escape_label(name);
      REQUIRE(exposition::decode_utf8(value));
      REQUIRE(value.find('\n') == std::string::npos);
      REQUIRE(value.find('\0') == std::string::npos);
      std::vector<std::uint32_t> expected = characters(name);
      for (std::uint32_t& c : expected) c = c == 0 || c > 0x10FFFF ? 0xFFFD : c;
      std::vector<std::uint32_t> points;
      REQUIRE(exposition::decode_utf8(unescaped(value), &points));
      REQUIRE(points == expected);
    }
  }
}

TEST_SUITE("US1 label groups") {
  TEST_CASE("names whose values are equal share a group, the others have their own") {
    ModelNames names("unknown", 100);
    const ModelId dash = names.intern("gpt-4"), underscore = names.intern("gpt_4"), other = names.intern("gpt-5");
    const ModelId unknown = names.intern("unknown");
    LabelTable<ModelId> labels;

    labels.update(names, LabelMode::sanitize);
    CHECK(labels.group_of(dash) == labels.group_of(underscore));
    CHECK(labels.group_of(dash) != labels.group_of(other));
    CHECK(labels.group_of(unknown) == labels.group_of(ModelId::unknown));
    CHECK(labels.text(labels.group_of(dash)) == "gpt_4");
    CHECK(labels.ids() == 5);
    CHECK(labels.groups() == 3);
  }

  TEST_CASE("names that are added later join the groups that are there") {
    ModelNames names("unknown", 100);
    const ModelId first = names.intern("a.b");
    LabelTable<ModelId> labels;
    labels.update(names, LabelMode::sanitize);
    const std::uint32_t group = labels.group_of(first);
    const ModelId second = names.intern("a-b");
    labels.update(names, LabelMode::sanitize);
    CHECK(labels.group_of(second) == group);
    CHECK(labels.group_of(first) == group);
  }

  TEST_CASE("a change of the mode makes all values anew") {
    ModelNames names("unknown", 100);
    const ModelId dash = names.intern("gpt-4"), underscore = names.intern("gpt_4");
    LabelTable<ModelId> labels;
    labels.update(names, LabelMode::sanitize);
    labels.update(names, LabelMode::raw);
    CHECK(labels.group_of(dash) != labels.group_of(underscore));
    CHECK(labels.text(labels.group_of(dash)) == "gpt-4");
    labels.update(names, LabelMode::sanitize);
    CHECK(labels.group_of(dash) == labels.group_of(underscore));
  }
}
