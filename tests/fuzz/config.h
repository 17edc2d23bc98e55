// config.h
// Owns:     the fuzz target of the configuration parser.
// Promises: any text gives settings or errors, the same ones twice; errors name an existing line, in order, and are
//           bounded; accepted settings have the properties that the other modules rely on.
// Leaves:   the meaning of each key to config_test.cpp.
// Threads:  one.
#pragma once

#include <cerrno>

#include "nexus/config/parser.h"
#include "tests/fuzz/fuzz.h"

namespace fuzz {

// The text of a file is the part of its path after `/text/`; the value of a variable is its own name.
inline nexus::ConfigEnvironment made_up_environment() {
  nexus::ConfigEnvironment env;
  env.get_env = [](const std::string& name) -> std::optional<std::string> {
    if (name.size() % 3 == 0) return std::nullopt;
    return name;
  };
  env.read_file = [](const std::string& path) -> std::optional<std::string> {
    const std::size_t at = path.find("/text/");
    if (at != std::string::npos) {
      std::string text = path.substr(at + 6);
      for (char& c : text) c = c == '|' ? '\n' : c == '+' ? ' ' : c;
      return text;
    }
    errno = ENOENT;
    return std::nullopt;
  };
  return env;
}

inline void check_settings(const nexus::Settings& settings) {
  const nexus::ServerSettings& server = settings.server;
  check(server.body_memory_bytes >= server.max_body_bytes, "body_memory is below max_body");
  check(server.header_timeout_ns > 0 && server.body_timeout_ns > 0 && server.idle_timeout_ns > 0 &&
            server.write_timeout_ns > 0,
        "a time limit of nothing");
  check(!server.listen.empty() || !server.metrics_listen.empty(), "nowhere to listen");
  const nexus::RoutingSettings& routing = settings.routing;
  check(routing.weight_priority + routing.weight_load + routing.weight_latency > 0, "all weights are 0");
  check(2 * (1 + routing.retries) <= 24, "more attempts than an exchange has room for");
  for (std::size_t i = 0; i < settings.backends.size(); ++i) {
    const nexus::BackendSettings& backend = settings.backends[i];
    check(!backend.name.empty(), "a backend without a name");
    for (std::size_t j = 0; j < i; ++j) check(settings.backends[j].name != backend.name, "two backends of one name");
    const bool echo = backend.kind == nexus::BackendKind::echo;
    check(echo == backend.address.host.empty(), "a backend without an address");
    check(backend.base_path.empty() || (backend.base_path[0] == '/' && backend.base_path.back() != '/'), "base path");
    for (const char c : backend.base_path + backend.address.host + backend.api_key) {
      check(c > 0x20 && c < 0x7f, "a byte in a backend's address or key that would break a head");
    }
  }
  for (const nexus::ApiKey& key : server.api_keys) check(!key.key.empty() && !key.name.empty(), "an empty key");
}

inline void config(std::string_view input) {
  Guarded copy(input);
  const nexus::ConfigEnvironment env = made_up_environment();
  const nexus::ConfigResult first = nexus::parse_config(copy.view(), "nexus.conf", env);
  const nexus::ConfigResult second = nexus::parse_config(copy.view(), "nexus.conf", env);
  check(first.errors.size() == second.errors.size(), "another outcome the second time");
  check(first.errors.size() <= nexus::kMaxConfigErrors + 1, "too many errors");
  const auto lines = static_cast<int>(std::count(input.begin(), input.end(), '\n')) + 1;
  int last = 0;
  for (std::size_t i = 0; i < first.errors.size(); ++i) {
    const nexus::ConfigError& error = first.errors[i];
    check(error.message == second.errors[i].message && error.line == second.errors[i].line, "another error");
    check(!error.message.empty() && error.message.find('\n') == std::string::npos, "not one line");
    if (error.file != "nexus.conf") continue;
    check(error.line >= 0 && error.line <= lines && error.line >= last, "an error at no line, or out of order");
    last = error.line;
  }
  if (first.ok()) check_settings(first.settings);
}

}  // namespace fuzz
