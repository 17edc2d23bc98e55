// environment.h
// Owns:     the files and variables that a configuration may name: of this process, and of the environment file of
//           a systemd service (systemd.exec(5), EnvironmentFile=); and what of them changed.
// Promises: a variable of that file is read as systemd reads it, but without its escapes and continued lines. A file is
//           read up to kMaxConfigFileBytes, and one that nobody writes to does not hold up the caller.
// Leaves:   the meaning of the texts to keys.h and key_file.h.
// Threads:  any, one call at a time (errno, getenv).
// Tested by: tests/config_test.cpp, tests/fuzz/config.h, tests/e2e/cli.test.mjs
#pragma once

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/config/values.h"

namespace nexus {

namespace config {

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

// `env`, which also notes in `hash` what of a file or variable it has read last: the text itself may be secret.
inline ConfigEnvironment noting(ConfigEnvironment env, std::optional<std::size_t>& hash) {
  for (auto* read : {&env.get_env, &env.read_file}) {
    if (!*read) continue;
    *read = [&hash, own = std::move(*read)](const std::string& name) {
      auto text = own(name);
      if (text) hash = std::hash<std::string>{}(*text);
      return text;
    };
  }
  return env;
}

// The whole text of a file of at most kMaxConfigFileBytes.
inline std::optional<std::string> read_bounded_file(const std::string& path) {
  // O_NONBLOCK for open() alone: a FIFO that nobody writes to is empty then, instead of a wait without end.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
  if (fd < 0 || fcntl(fd, F_SETFL, 0) != 0) return std::nullopt;
  const std::unique_ptr<FILE, int (*)(FILE*)> file(fdopen(fd, "r"), fclose);
  if (!file) return std::nullopt;
  std::string text;
  do {  // memory that is never read into would cost as much time as all else
    const std::size_t held = text.size();
    text.resize(std::clamp<std::size_t>(2 * held, 16u << 10, kMaxConfigFileBytes + 1));
    text.resize(held + fread(text.data() + held, 1, text.size() - held, file.get()));
  } while (feof(file.get()) == 0 && ferror(file.get()) == 0 && text.size() <= kMaxConfigFileBytes);
  if (ferror(file.get())) return std::nullopt;
  if (text.size() <= kMaxConfigFileBytes) return text;
  errno = EFBIG;
  return std::nullopt;
}

}  // namespace config

// The process's own environment.
inline ConfigEnvironment system_environment() {
  return {[](const std::string& name) -> std::optional<std::string> {
            const char* value = std::getenv(name.c_str());
            return value ? std::optional<std::string>(value) : std::nullopt;
          },
          config::read_bounded_file};
}

}  // namespace nexus
