// environment_file.h
// Owns:     reading the environment file of a systemd service (systemd.exec(5), EnvironmentFile=), so that a command
//           finds the variables that the service has.
// Promises: a variable is read as systemd reads it, but without its escapes and continued lines.
// Leaves:   which variables are needed to values.h.
// Threads:  any.
// Tested by: tests/config_test.cpp, tests/e2e/cli.test.mjs
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "nexus/config/values.h"

namespace nexus::config {

using Variables = std::map<std::string, std::string>;

// Lines of NAME=VALUE; a line that begins with `#` or `;` is a comment. The last line with a name counts.
inline Variables read_environment_file(std::string_view text) {
  Variables variables;
  while (!text.empty()) {
    const std::string_view line = trim_blanks(take_line(text));
    const std::size_t equals = line.find('=');
    if (line.empty() || line[0] == '#' || line[0] == ';' || equals == std::string_view::npos) continue;
    std::string_view value = trim_blanks(line.substr(equals + 1));
    if (is_quoted(value)) value = value.substr(1, value.size() - 2);
    variables[std::string(trim_blanks(line.substr(0, equals)))] = value;
  }
  return variables;
}

// `base` with the variables of a file before its own.
inline ConfigEnvironment with_variables(ConfigEnvironment base, Variables variables) {
  auto own = std::move(base.get_env);
  base.get_env = [own = std::move(own), variables = std::move(variables)](const std::string& name) {
    const auto found = variables.find(name);
    return found == variables.end() ? own(name) : std::optional<std::string>(found->second);
  };
  return base;
}

}  // namespace nexus::config
