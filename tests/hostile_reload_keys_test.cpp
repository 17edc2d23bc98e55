// hostile_reload_keys_test.cpp
// Goal:   a reload does to each key what the table, and the manual, say.
// Method: for each row a gateway with the old value, which is then reloaded with the new one: a request that is under
//         way, the next one of its connection, and one of a new connection show which value is in force.
#include <doctest/doctest.h>

#include <cerrno>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

#include "tests/hostile/reload_keys.h"

using namespace hostile;

namespace {

nexus::ConfigEnvironment environment() {
  return {[](const std::string& name) {
            return std::optional<std::string>(name == "KEY_A" ? "a-key-of-a-backend" : "b-key-of-a-backend");
          },
          [](const std::string& path) {
            const bool of_clients = path == "/keys";
            return std::optional<std::string>(of_clients ? "client sk-client-0123456789\n"
                                                           "fixed sk-fixed-0123456789 weight=1 priority=50"
                                                         : path.substr(1) + "-key-of-a-backend");
          }};
}

// What all rows have, except the lines of the same key that a row has itself.
const Lines kBase = {{"server", "idle_timeout = 1h"},
                     {"server", "body_timeout = 1h"},
                     {"server", "header_timeout = 1h"},
                     {"server", "write_timeout = 1h"},
                     {"upstream", "first_byte_timeout = 1h"},
                     {"upstream", "stall_timeout = 1h"},
                     {"health", "enabled = no"},
                     {"backend b1", "url = http://10.0.0.1:8001"},
                     {"backend b1", "models = m"}};

std::string key_of(const std::string& line) { return line.substr(0, line.find(' ')); }

nexus::Settings settings_of(const ReloadRow& row, const std::string& line) {
  const std::string own = row.section == "backend" ? "backend b1" : std::string(row.section);
  Lines lines = row.rest;
  if (!line.empty()) lines.emplace_back(own, line);
  std::set<std::pair<std::string, std::string>> given{{own, std::string(row.key)}};
  for (const auto& [section, text] : lines) given.emplace(section, key_of(text));
  for (const auto& [section, text] : kBase) {
    if (!given.contains({section, key_of(text)})) lines.emplace_back(section, text);
  }
  std::map<std::string, std::string> sections;
  for (const auto& [section, text] : lines) sections[section] += text + "\n";
  std::string whole;
  for (const auto& [section, text] : sections) whole += "[" + section + "]\n" + text;
  nexus::ConfigResult read = nexus::parse_config(whole, "row", environment());
  for (const nexus::ConfigError& error : read.errors) FAIL_CHECK(error.to_string(), "\n", whole);
  return read.settings;
}

struct Run {
  explicit Run(const ReloadRow& row_in)
      : row(row_in), before(settings_of(row, row.before)), after(settings_of(row, row.after)) {}

  // With `line` from the start.
  std::string with(const nexus::Settings& settings) const {
    Scene scene(settings);
    scene.connect();
    row.seen.begin(scene);
    return row.seen.end(scene);
  }
  std::string under_way() const {
    Scene scene(before);
    scene.connect();
    row.seen.begin(scene);
    scene.reload(after);
    return row.seen.end(scene);
  }
  std::string next_on_connection() const {
    Scene scene(before);
    scene.connect();
    scene.send("GET /health HTTP/1.1\r\nHost: a\r\n\r\n");
    scene.result();
    scene.reload(after);
    row.seen.begin(scene);
    return row.seen.end(scene);
  }
  std::string on_new_connection() const {
    Scene scene(before);
    scene.settle();
    scene.reload(after);
    scene.connect();
    row.seen.begin(scene);
    return row.seen.end(scene);
  }

  const ReloadRow& row;
  const nexus::Settings before, after;
};

std::string read_file(const char* path) {
  std::ifstream file(path);
  REQUIRE_MESSAGE(file.good(), path, " cannot be read; the tests run from the root of the source");
  return {std::istreambuf_iterator<char>(file), {}};
}

// By section and key: the words behind "Reload: " in the manual. A section of free names has them under its own.
std::map<std::pair<std::string, std::string>, std::string> manual_words() {
  std::map<std::pair<std::string, std::string>, std::string> words;
  std::istringstream page(read_file("man/nexus.conf.5"));
  std::string section, key;
  for (std::string line; std::getline(page, line);) {
    if (line.starts_with(".Ss [")) section = line.substr(5, line.find_first_of(" ]", 5) - 5), key.clear();
    if (line.starts_with(".It Ic ")) key = line.substr(7, line.find(' ', 7) - 7);
    if (!line.starts_with("Reload: ")) continue;
    CHECK_MESSAGE(words.emplace(std::pair(section, key), line.substr(8, line.size() - 9)).second, line);
  }
  return words;
}

}  // namespace

TEST_CASE("every key of the parser has one row of what a reload does to it, and the manual says the same") {
  const ReloadRows rows = reload_rows();
  const auto words = manual_words();
  CHECK(rows.size() == nexus::config::kConfigKeys.size());
  CHECK(words.size() == nexus::config::kConfigKeys.size());
  for (const nexus::config::ConfigKey& key : nexus::config::kConfigKeys) {
    CAPTURE(key.section);
    CAPTURE(key.key);
    const auto row = std::find_if(rows.begin(), rows.end(),
                                  [&](const ReloadRow& r) { return r.section == key.section && r.key == key.key; });
    REQUIRE(row != rows.end());
    const auto told = words.find({std::string(key.section), key.kind.free_key ? "" : std::string(key.key)});
    REQUIRE(told != words.end());
    CHECK(told->second == kWhenWords[static_cast<std::size_t>(row->when)]);
  }
}

TEST_CASE("a new value of each key is in force when the table says") {
  for (const ReloadRow& row : reload_rows()) {
    if (!row.seen.begin) continue;
    CAPTURE(row.section);
    CAPTURE(row.key);
    const Run run(row);
    CHECK(run.with(run.before) == row.old_result);
    CHECK(run.with(run.after) == row.new_result);
    REQUIRE(row.old_result != row.new_result);
    CHECK(run.on_new_connection() == row.new_result);
    if (row.when == When::new_connections) continue;
    CHECK(run.next_on_connection() == row.new_result);
    CHECK(run.under_way() == (row.when == When::at_once ? row.new_result : row.old_result));
  }
}

TEST_CASE("the keys that need the whole daemon are driven end to end") {
  const std::string tests = read_file("tests/e2e/reload_keys.test.mjs");
  for (const ReloadRow& row : reload_rows()) {
    if (row.seen.begin) continue;
    const std::string name = "'[" + std::string(row.section) + "] " + std::string(row.key) + ": " +
                             std::string(kWhenWords[static_cast<std::size_t>(row.when)]) + "'";
    CHECK_MESSAGE(tests.find(name) != std::string::npos, name);
  }
}
