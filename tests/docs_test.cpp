// docs_test.cpp
// Owns:     proof that nexus.conf(5), nexus.conf.example and the parser's table of keys say the same.
// Leaves:   what the parser does with a value to config_test.cpp.
// Runs from the root of the source, as tests/run.sh and make do.
#include <doctest/doctest.h>

#include <cerrno>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/config/parser.h"

namespace {

using nexus::config::ConfigKey;
using nexus::config::kConfigKeys;
using SectionAndKey = std::pair<std::string, std::string>;

std::string read_file(const char* path) {
  std::ifstream file(path);
  REQUIRE_MESSAGE(file.good(), path, " cannot be read; the tests run from the root of the source");
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (std::string_view rest = text; !rest.empty();) {
    const std::size_t end = rest.find('\n');
    lines.emplace_back(rest.substr(0, end));
    rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
  }
  return lines;
}

// The first word of "[backend NAME]", "backend" and the like.
std::string section_name(std::string_view title) {
  if (!title.empty() && title.front() == '[') title.remove_prefix(1);
  return std::string(title.substr(0, title.find_first_of(" ]")));
}

bool starts_with(std::string_view text, std::string_view prefix) { return text.substr(0, prefix.size()) == prefix; }

bool is_free(const ConfigKey& row) { return row.kind.free_key; }

// What the manual says of each key: the text from its `.It Ic key` to the next item or section. A section of names of
// the user's own ([aliases]) is one such text, under the empty key.
std::map<SectionAndKey, std::string> manual_entries() {
  std::map<SectionAndKey, std::string> entries;
  std::string* entry = nullptr;
  std::string section;
  for (const std::string& line : lines_of(read_file("man/nexus.conf.5"))) {
    if (starts_with(line, ".Sh ")) entry = nullptr;
    if (starts_with(line, ".Ss [")) {
      section = section_name(std::string_view(line).substr(4));
      entry = &entries[{section, ""}];
    } else if (entry && starts_with(line, ".It Ic ")) {
      const std::string key = line.substr(7, line.find(' ', 7) - 7);
      CHECK_MESSAGE(!entries.contains({section, key}), "twice in the manual: ", section, " ", key);
      entry = &entries[{section, key}];
    } else if (entry) {
      *entry += line + "\n";
    }
  }
  return entries;
}

// The entry's line that begins with `label`, without it and the full stop; nothing where there is none.
std::optional<std::string> labelled(const std::string& entry, std::string_view label) {
  for (const std::string& line : lines_of(entry)) {
    if (!starts_with(line, label)) continue;
    std::string value = line.substr(label.size());
    if (!value.empty() && value.back() == '.') value.pop_back();
    return value;
  }
  return std::nullopt;
}

// A line of the example is `key = value` or `# key = value`; everything else in comments is prose.
struct ExampleLine {
  std::string section, key, value;
  bool active;
};

std::vector<ExampleLine> example_lines() {
  std::vector<ExampleLine> found;
  std::string section;
  for (std::string line : lines_of(read_file("nexus.conf.example"))) {
    const bool active = !starts_with(line, "# ");
    if (!active) line.erase(0, 2);
    if (starts_with(line, "[")) section = section_name(line);
    const std::size_t equals = line.find(" = ");
    if (equals == std::string::npos) continue;
    const std::string value(nexus::config::without_comment(std::string_view(line).substr(equals + 3)));
    found.push_back({section, line.substr(0, equals), value, active});
  }
  return found;
}

// The example with every key and section in force.
std::string example_uncommented() {
  std::string text;
  for (std::string line : lines_of(read_file("nexus.conf.example"))) {
    const bool is_setting =
        starts_with(line, "# [") || (starts_with(line, "# ") && line.find(" = ") != std::string::npos);
    text += (is_setting ? line.substr(2) : line) + "\n";
  }
  return text;
}

nexus::ConfigEnvironment environment_with_keys() {
  return {[](const std::string&) { return std::optional<std::string>("a-backend-key"); },
          [](const std::string& path) {
            const bool of_clients = path == "/etc/nexus/keys";
            const bool of_tls = path.ends_with(".pem") || path.ends_with(".crt") || path == "/etc/nexus/gateway.key" ||
                                path == "/etc/nexus/client.key";
            if (of_tls) return std::optional<std::string>("-----BEGIN CERTIFICATE-----\n");
            return std::optional<std::string>(of_clients ? "client a-client-key\n" : "a-backend-key\n");
          }};
}

std::string errors_of(const nexus::ConfigResult& result) {
  std::string all;
  for (const auto& error : result.errors) all += error.to_string() + "\n";
  return all;
}

}  // namespace

TEST_CASE("every key of the parser is in nexus.conf(5), with its default, its range and an example") {
  const auto entries = manual_entries();
  for (const ConfigKey& row : kConfigKeys) {
    CAPTURE(row.section);
    CAPTURE(row.key);
    const auto found = entries.find({std::string(row.section), is_free(row) ? "" : std::string(row.key)});
    REQUIRE(found != entries.end());
    const std::string& entry = found->second;
    if (!row.default_text.empty()) CHECK(labelled(entry, "Default: ") == std::string(row.default_text));
    CHECK(entry.find("\nDefault:") != std::string::npos);
    CHECK(labelled(entry, "Range: ") == std::string(row.range));
    CHECK(labelled(entry, ".Dl ").has_value());
  }
}

TEST_CASE("every key of nexus.conf(5) is one of the parser's") {
  for (const auto& [name, entry] : manual_entries()) {
    const std::string& section = name.first;
    const std::string& key = name.second;
    CAPTURE(section);
    CAPTURE(key);
    bool known = false;
    for (const ConfigKey& row : kConfigKeys) {
      known = known || (row.section == section && (key.empty() || row.key == key));
    }
    CHECK(known);
  }
}

TEST_CASE("every example of nexus.conf(5) is one that the parser takes") {
  for (const auto& [name, entry] : manual_entries()) {
    const std::string& section = name.first;
    const std::string& key = name.second;
    const auto example = labelled(entry, ".Dl ");
    if (!example) continue;
    std::string text = "[" + section + (section == "backend" ? " b" : "") + "]\n" + *example + "\n";
    const bool tls = key.starts_with("tls_");
    const bool of_certificate = section == "backend" ? key == "tls_key" : tls && key != "tls_certificate";
    // The keys of TLS stand below others that they belong to.
    if (of_certificate) text.insert(text.find('\n') + 1, "tls_certificate = /c.pem\n");
    if (section == "server" && tls && key != "tls_listen") text += "tls_listen = 127.0.0.1:9\n";
    if (section != "backend") text += "[backend b]\n";
    if (section == "backend" && tls) {
      text += "url = https://127.0.0.1:9\n";
    } else if (key == "token_delay") {
      text += "type = echo\n";
    } else if (key != "url") {
      text += "url = http://127.0.0.1:9\n";
    }
    // A fixed list of models lets any other key refer to one.
    if (key != "models") text += "models = llama3:70b, qwen2:72b, mixtral:8x7b, llava:13b\n";
    CAPTURE(text);
    CHECK(errors_of(nexus::parse_config(text, "example", environment_with_keys())) == "");
  }
}

TEST_CASE("the whole configuration that nexus.conf(5) shows is one that the parser takes") {
  const std::string page = read_file("man/nexus.conf.5");
  const std::string opening = ".Bd -literal -offset indent\n";
  const std::size_t begin = page.find(opening);
  REQUIRE(begin != std::string::npos);
  const std::size_t from = begin + opening.size();
  const std::string text = page.substr(from, page.find("\n.Ed\n", from) - from);
  const auto result = nexus::parse_config(text, "manual", environment_with_keys());
  CHECK(errors_of(result) == "");
  CHECK(result.settings.backends.size() == 2);
}

TEST_CASE("every key of the parser is in nexus.conf.example, commented out or not, with its default where it has one") {
  const auto lines = example_lines();
  for (const ConfigKey& row : kConfigKeys) {
    CAPTURE(row.section);
    CAPTURE(row.key);
    bool found = false, default_shown = false;
    for (const ExampleLine& line : lines) {
      if (line.section != row.section || (!is_free(row) && line.key != row.key)) continue;
      found = true;
      default_shown = default_shown || line.value == row.default_text;
    }
    CHECK(found);
    // A backend's lines are examples of backends; elsewhere a comment shows what is in force without it.
    if (!row.default_text.empty() && row.section != "backend") CHECK(default_shown);
  }
}

TEST_CASE("every key of nexus.conf.example is one of the parser's") {
  for (const ExampleLine& line : example_lines()) {
    CAPTURE(line.section);
    CAPTURE(line.key);
    bool known = false;
    for (const ConfigKey& row : kConfigKeys) {
      known = known || (row.section == line.section && (is_free(row) || row.key == line.key));
    }
    CHECK(known);
  }
}

TEST_CASE("nexus.conf.example starts as it is: one echo backend, and nothing that a machine may lack") {
  const nexus::ConfigEnvironment nothing{[](const std::string&) { return std::optional<std::string>(); },
                                         [](const std::string&) {
                                           errno = ENOENT;
                                           return std::optional<std::string>();
                                         }};
  const auto result = nexus::parse_config(read_file("nexus.conf.example"), "nexus.conf.example", nothing);
  REQUIRE(errors_of(result) == "");
  REQUIRE(result.settings.backends.size() == 1);
  CHECK(result.settings.backends[0].kind == nexus::BackendKind::echo);
  CHECK(result.settings.server.listen == nexus::ServerSettings{}.listen);
}

TEST_CASE("nexus.conf.example is still right with every line of it in force") {
  const auto result = nexus::parse_config(example_uncommented(), "nexus.conf.example", environment_with_keys());
  CHECK(errors_of(result) == "");
  CHECK(result.settings.backends.size() == 5);
  CHECK(result.settings.aliases.size() == 1);
  CHECK(result.settings.fallbacks.size() == 1);
}
