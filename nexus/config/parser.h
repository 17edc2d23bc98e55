// parser.h
// Owns:     nexus.conf from its text to Settings, or to the list of everything that is wrong with it; reading its
//           files, and the keys of clients and backends in them.
// Promises: nothing is ignored: each unknown, repeated or unfit thing is an error with its line and what was expected.
//           parse_config is pure over any bytes; no message holds a key's text. At most 100 errors are listed.
// Leaves:   keys, ranges and defaults to keys.h; the syntax of values to values.h; comparing keys to worker.h.
// Threads:  any, one call at a time (errno, getenv).
// Tested by: tests/config_test.cpp, tests/fuzz/config.h
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nexus/base/text.h"
#include "nexus/config/keys.h"
#include "nexus/config/settings.h"
#include "nexus/config/values.h"

namespace nexus {

struct ConfigError {
  std::string file;
  int line = 0;  // from 1; 0: the file as a whole
  std::string message;
  std::string to_string() const { return file + ":" + std::to_string(line) + ": " + message; }
};

struct ConfigResult {
  Settings settings;  // to be used only if ok()
  std::vector<ConfigError> errors;
  bool ok() const { return errors.empty(); }
};

// Access to the system. A read_file that returns nothing leaves the reason in errno.
struct ConfigEnvironment {
  std::function<std::optional<std::string>(const std::string& name)> get_env;
  std::function<std::optional<std::string>(const std::string& path)> read_file;
};

namespace config {

// ---- files and lines

// The whole text of a file of at most kMaxConfigFileBytes.
inline std::optional<std::string> read_bounded_file(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return std::nullopt;
  std::string text(kMaxConfigFileBytes + 1, '\0');
  std::size_t bytes = 0;
  ssize_t n = 0;
  do {
    n = ::read(fd, text.data() + bytes, text.size() - bytes);
    if (n > 0) bytes += static_cast<std::size_t>(n);
  } while (n > 0 || (n < 0 && errno == EINTR));
  const int failure = n < 0 ? errno : bytes > kMaxConfigFileBytes ? EFBIG : 0;
  close(fd);
  errno = failure;
  if (failure != 0) return std::nullopt;
  text.resize(bytes);
  return text;
}

// read_file with its failure in words.
inline std::string read_text(const ConfigEnvironment& env, const std::string& path, std::string& text) {
  errno = ENOENT;  // for a read_file that leaves no reason
  auto read = env.read_file ? env.read_file(path) : std::nullopt;
  if (!read) return "cannot read this file: " + std::generic_category().message(errno);
  text = std::move(*read);
  return {};
}

// The line without its comment and outer blanks. `#` opens a comment only at the start or after a blank, so that a key
// or a path may hold one.
constexpr std::string_view without_comment(std::string_view line) {
  std::size_t end = line.find('#');
  while (end != std::string_view::npos && end > 0 && !is_blank(line[end - 1])) end = line.find('#', end + 1);
  return trim_blanks(line.substr(0, end));
}

constexpr std::string_view without_bom(std::string_view text) {
  return text.starts_with("\xEF\xBB\xBF") ? text.substr(3) : text;
}

// Takes the first line off `text`, without its LF or CRLF.
constexpr std::string_view take_line(std::string_view& text) {
  const std::size_t end = text.find('\n');
  std::string_view line = text.substr(0, end);
  text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  if (line.ends_with('\r')) line.remove_suffix(1);
  return line;
}

// Calls `take` (number, text without comment) for each line that is not blank, until there are too many `errors`.
template <class Take>
void read_lines(std::string_view text, const std::vector<ConfigError>& errors, Take take) {
  text = without_bom(text);
  for (int number = 1; !text.empty() && errors.size() <= kMaxConfigErrors; ++number) {
    const std::string_view line = without_comment(take_line(text));
    if (!line.empty()) take(number, line);
  }
}

// The index of the `=` between key and value. A model's name may hold a `=`: after a free key it is the first one that
// has blanks around it, if any has.
constexpr std::size_t find_equals(std::string_view line, bool free_key) {
  const std::size_t first = line.find('=');
  for (std::size_t i = first; free_key && i != std::string_view::npos; i = line.find('=', i + 1)) {
    const bool blank_after = i + 1 == line.size() || is_blank(line[i + 1]);
    if (i > 0 && is_blank(line[i - 1]) && blank_after) return i;
  }
  return first;
}

// ---- secrets

// A backend's key, as it goes after `Authorization: Bearer `.
constexpr bool is_backend_key(std::string_view key) {
  return !key.empty() && key.size() <= kMaxBackendKeyBytes && is_visible_ascii(key);
}

constexpr bool is_client_key(std::string_view key) {
  return key.size() >= kMinClientKeyBytes && key.size() <= kMaxClientKeyBytes && is_visible_ascii(key);
}

// The key in a file: its first line, trimmed.
constexpr std::string_view first_line_key(std::string_view text) {
  text = without_bom(text);
  return trim_blanks(take_line(text));
}

// Reads the lines `name key` of api_keys_file. No error quotes any part of a line: it may be a key.
inline std::vector<ApiKey> parse_client_keys(std::string_view text, const std::string& file,
                                             std::vector<ConfigError>& errors) {
  std::vector<ApiKey> keys;
  std::unordered_map<std::string_view, int> lines_of_names, lines_of_keys;  // views into the text
  bool full = false;
  read_lines(text, errors, [&](int number, std::string_view line) {
    const auto report = [&](std::string message) { errors.push_back({file, number, std::move(message)}); };
    const std::size_t blank = std::min(line.find_first_of(" \t"), line.size());
    const std::string_view name = line.substr(0, blank), key = trim_blanks(line.substr(blank));
    if (key.empty() || key.find_first_of(" \t") != std::string_view::npos) return report("expected `name key`");
    if (!is_backend_name(name)) {
      return report("expected a name of 1 to 64 letters, digits and . _ : - before the key");
    }
    if (!is_client_key(key)) return report("expected a key of 8 to 512 visible ASCII characters");
    if (keys.size() == kMaxClientKeys) {
      if (!std::exchange(full, true)) report(at_most(kMaxClientKeys, "keys"));
      return;
    }
    const auto [same_name, name_is_new] = lines_of_names.emplace(name, number);
    if (!name_is_new) return report("this name is already used on line " + std::to_string(same_name->second));
    const auto [same_key, key_is_new] = lines_of_keys.emplace(key, number);
    if (!key_is_new) return report("this key is already used on line " + std::to_string(same_key->second));
    keys.push_back({std::string(name), std::string(key)});
  });
  if (keys.empty() && errors.empty()) errors.push_back({file, 0, "expected at least one line `name key`"});
  return keys;
}

// ---- the reader

inline std::string unknown_key_message(std::string_view section, std::string_view key) {
  Words keys, elsewhere;
  for (const ConfigKey& row : kConfigKeys) {
    if (row.section == section) keys.push_back(row.key);
    if (row.key == key && !row.kind.free_key) elsewhere.push_back(row.section);
  }
  const std::string unknown = "unknown key " + in_quotes(key) + " in [" + std::string(section) + "]; ";
  if (!elsewhere.empty()) return unknown + "it belongs in " + joined(elsewhere, "[", "]", " or ");
  return unknown + suggestion(key, keys, "", "");
}

// A key that was given, with its text as in the file.
struct GivenKey {
  int line;
  std::string_view value;
  bool valid;
};

struct Section {
  std::string_view name;
  int line = 0;                                              // 0: not in the file
  std::unordered_multimap<std::string_view, GivenKey> keys;  // views into the text; only `listen`s are repeated

  const GivenKey* find(std::string_view key) const {
    const auto found = keys.find(key);
    return found == keys.end() ? nullptr : &found->second;
  }
  int line_of(std::string_view key) const {
    const GivenKey* given = find(key);
    return given ? given->line : line;
  }
};

// One reading of one text. First the lines, then the relations between keys, then the keys in other files.
class ConfigReader {
 public:
  ConfigReader(std::string_view file, const ConfigEnvironment& env) : file_(file), env_(env) {
    for (const ConfigKey& row : kConfigKeys) {
      if (sections_.empty() || sections_.back().name != row.section) sections_.push_back({row.section, 0, {}});
    }
  }

  ConfigResult read(std::string_view text) {
    read_lines(text, errors_, [this](int number, std::string_view line) {
      line_ = number;
      read_line(line);
    });
    leave_section();
    check_aliases();
    check_weights();
    check_body_memory();
    check_metrics_listen();
    read_client_keys();
    return {std::move(settings_), all_errors()};
  }

 private:
  void report_at(int line, std::string message) { errors_.push_back({std::string(file_), line, std::move(message)}); }
  void report(std::string message) { report_at(line_, std::move(message)); }
  void report_repeated(const std::string& what, int line) {
    report(what + " is repeated; the first is on line " + std::to_string(line));
  }

  // nullptr if there is no such section in the table.
  Section* find_section(std::string_view name) {
    const auto found =
        std::find_if(sections_.begin(), sections_.end(), [&](const Section& s) { return s.name == name; });
    return found == sections_.end() ? nullptr : &*found;
  }

  // ---- lines

  void read_line(std::string_view line) {
    const bool is_header = line.front() == '[';
    if (is_header) leave_section();
    if (!is_plain_text(line)) return report("expected valid UTF-8 text without control characters");
    if (is_header) return read_header(line);
    const ConfigKey* row = section_ ? find_key(section_->name, {}) : nullptr;  // a free key matches any name
    const std::size_t equals = find_equals(line, row != nullptr);
    // The line is not quoted: without a `=` it may be a key that was pasted alone.
    if (equals == std::string_view::npos || equals == 0) return report("expected `key = value` or `[section]`");
    read_pair(trim_blanks(line.substr(0, equals)), trim_blanks(line.substr(equals + 1)));
  }

  // The lines up to the next valid header are skipped: the error of their header is enough.
  void leave_section() {
    if (section_ && section_->name == "backend") finish_backend(*section_);
    section_ = nullptr;
    skipping_ = true;
  }

  void read_header(std::string_view line) {
    if (line.back() != ']') return report("expected a `]` at the end of the line");
    const std::string_view inner = trim_blanks(line.substr(1, line.size() - 2));
    const std::size_t blank = std::min(inner.find_first_of(" \t"), inner.size());
    const std::string_view word = inner.substr(0, blank), name = trim_blanks(inner.substr(blank));
    Section* const found = find_section(word);
    if (!found) return report_unknown_section(word);
    const std::string header = "[" + std::string(word) + "]";
    if (word == "backend") {
      open_backend(name);
      *found = {word, line_, {}};
    } else if (!name.empty()) {
      return report(header + " takes no name; expected " + header);
    } else if (found->line != 0) {
      report_repeated(header, found->line);
    } else {
      found->line = line_;
    }
    section_ = found;
    skipping_ = false;
  }

  void report_unknown_section(std::string_view word) {
    Words names;
    for (const Section& section : sections_) names.push_back(section.name);
    report("unknown section " + in_quotes(word) + "; " + suggestion(word, names, "[", "]"));
  }

  void open_backend(std::string_view name) {
    if (name.empty()) {
      report("expected a name, [backend NAME]");
    } else if (!is_backend_name(name)) {
      report("expected a backend's name of 1 to 64 letters, digits and . _ : -, not " + in_quotes(name));
    } else if (name == "none") {
      report("'none' is reserved for requests that reached no backend");
    } else {
      const auto [same, is_new] = backend_lines_.emplace(name, line_);
      if (!is_new) report_repeated("[backend " + std::string(name) + "]", same->second);
    }
    if (settings_.backends.size() == kMaxBackends) report(at_most(kMaxBackends, "backends"));
    settings_.backends.emplace_back().name = name;
  }

  void read_pair(std::string_view key, std::string_view text) {
    if (skipping_) return;
    if (!section_) return report(in_quotes(key) + " is outside any section; put a line like [server] above it");
    const ConfigKey* row = find_key(section_->name, key);
    if (!row) return report(unknown_key_message(section_->name, key));
    const bool is_free = row->kind.free_key;
    if (is_free && !is_model_name(key)) return report(expected_model_name(key));
    const GivenKey* earlier = section_->find(key);
    if (earlier && !row->kind.repeats) return report_repeated(in_quotes(key), earlier->line);
    Value value{*row, key, text, earlier != nullptr, text.empty() ? row->expectation() : ""};
    if (!text.empty()) row->store(settings_, value);
    section_->keys.emplace(key, GivenKey{line_, text, value.problem.empty()});
    if (!value.problem.empty()) report((is_free ? in_quotes(key) : std::string(key)) + ": " + value.problem);
    if (is_free && section_->keys.size() == kMaxModelsPerList + 1) {
      report(at_most(kMaxModelsPerList, "lines in this section"));
    }
  }

  // ---- relations between keys

  // Loops of more than kMaxAliasHops aliases are reported as too long.
  void check_aliases() {
    const Section& given = *find_section("aliases");
    const std::unordered_map<std::string_view, std::string_view> targets(settings_.aliases.begin(),
                                                                         settings_.aliases.end());
    for (const auto& [name, model] : settings_.aliases) {
      std::string_view at = model;
      auto next = targets.find(at);
      for (std::uint32_t hops = 1; at != name && next != targets.end() && hops < kMaxAliasHops; ++hops) {
        at = next->second;
        next = targets.find(at);
      }
      if (at == name) {
        report_at(given.line_of(name), "alias " + in_quotes(name) + " leads back to itself");
      } else if (next != targets.end()) {
        report_at(given.line_of(name), "alias " + in_quotes(name) + " leads through more than " +
                                           std::to_string(kMaxAliasHops) + " aliases");
      }
    }
  }

  void check_weights() {
    const RoutingSettings& routing = settings_.routing;
    if (routing.weight_priority + routing.weight_load + routing.weight_latency > 0) return;
    const Section& given = *find_section("routing");
    report_at(
        std::max({given.line_of("weight_priority"), given.line_of("weight_load"), given.line_of("weight_latency")}),
        "weight_priority, weight_load and weight_latency are all 0; expected one above 0");
  }

  // `key = value (line N)`, for a message about two keys.
  std::string as_given(std::string_view key, const GivenKey* given) {
    const std::string_view value = given ? given->value : find_key("server", key)->default_text;
    const std::string line = given ? "line " + std::to_string(given->line) : "the default";
    return std::string(key) + " = " + std::string(value) + " (" + line + ")";
  }

  void check_body_memory() {
    const Section& server = *find_section("server");
    const GivenKey* memory = server.find("body_memory");
    const GivenKey* body = server.find("max_body");
    const bool invalid = (memory && !memory->valid) || (body && !body->valid);
    if (invalid || settings_.server.body_memory_bytes >= settings_.server.max_body_bytes) return;
    report_at((memory ? memory : body)->line,
              as_given("body_memory", memory) + " must be at least " + as_given("max_body", body));
  }

  void check_metrics_listen() {
    const auto& listen = settings_.server.listen;
    const auto [first, last] = find_section("server")->keys.equal_range("metrics_listen");
    for (auto given = first; given != last; ++given) {
      const auto address = parse_listen(given->second.value);
      if (!given->second.valid || !address || address->port == 0) continue;
      if (std::find(listen.begin(), listen.end(), *address) == listen.end()) continue;
      report_at(given->second.line, "metrics_listen: " + to_string(*address) + " is already in listen");
    }
  }

  // ---- backends and keys

  void finish_backend(const Section& given) {
    const GivenKey* type = given.find("type");
    if (!type || type->valid) {
      const bool is_echo = settings_.backends.back().kind == BackendKind::echo;
      const GivenKey* url = given.find("url");
      const GivenKey* delay = given.find("token_delay");
      if (is_echo && url) report_at(url->line, "url: an echo backend has none");
      if (!is_echo && !url) report_at(given.line, "this backend needs a url, http://host[:port][/prefix]");
      if (!is_echo && delay) report_at(delay->line, "token_delay: only an echo backend has one");
    }
    read_backend_key(given);
  }

  void read_backend_key(const Section& given) {
    const GivenKey* env = given.find("api_key_env");
    const GivenKey* file = given.find("api_key_file");
    if (env && file) {
      report_at(std::max(env->line, file->line), "expected either api_key_env (line " + std::to_string(env->line) +
                                                     ") or api_key_file (line " + std::to_string(file->line) + ")");
    } else if (env && env->valid) {
      const auto value = env_.get_env ? env_.get_env(std::string(env->value)) : std::nullopt;
      if (!value || value->empty()) return report_at(env->line, "api_key_env: this variable is not set, or empty");
      keep_backend_key("api_key_env", env->line, *value);
    } else if (file && file->valid) {
      std::string text;
      const std::string problem = read_text(env_, std::string(file->value), text);
      if (!problem.empty()) return report_at(file->line, "api_key_file: " + problem);
      keep_backend_key("api_key_file", file->line, first_line_key(text));
    }
  }

  void keep_backend_key(const std::string& source, int line, std::string_view key) {
    if (!is_backend_key(key)) {
      return report_at(line, source + ": the key in it must be 1 to 4096 visible ASCII characters");
    }
    settings_.backends.back().api_key = key;
  }

  void read_client_keys() {
    const GivenKey* given = find_section("server")->find("api_keys_file");
    if (!given || !given->valid) return;
    std::string text;
    const std::string problem = read_text(env_, settings_.server.api_keys_file, text);
    if (!problem.empty()) return report_at(given->line, "api_keys_file: " + problem);
    settings_.server.api_keys = parse_client_keys(text, settings_.server.api_keys_file, key_errors_);
  }

  // nexus.conf's by line, then the key file's.
  std::vector<ConfigError> all_errors() {
    std::stable_sort(errors_.begin(), errors_.end(),
                     [](const ConfigError& a, const ConfigError& b) { return a.line < b.line; });
    std::move(key_errors_.begin(), key_errors_.end(), std::back_inserter(errors_));
    if (errors_.size() > kMaxConfigErrors) {
      errors_.resize(kMaxConfigErrors);
      const ConfigError& last = errors_.back();
      errors_.push_back({last.file, last.line, "too many errors; those after this line are not listed"});
    }
    return std::move(errors_);
  }

  std::string_view file_;
  const ConfigEnvironment& env_;
  Settings settings_;
  std::vector<ConfigError> errors_;      // in nexus.conf
  std::vector<ConfigError> key_errors_;  // in api_keys_file

  int line_ = 0;
  std::vector<Section> sections_;  // in the order of the table; [backend] holds the keys of the open [backend NAME]
  Section* section_ = nullptr;     // of the next key; none before the first header
  bool skipping_ = false;          // after an invalid header
  std::unordered_map<std::string_view, int> backend_lines_;  // views into the text
};

}  // namespace config

// The process's own environment.
inline ConfigEnvironment system_environment() {
  return {[](const std::string& name) -> std::optional<std::string> {
            const char* value = std::getenv(name.c_str());
            return value ? std::optional<std::string>(value) : std::nullopt;
          },
          config::read_bounded_file};
}

inline ConfigResult parse_config(std::string_view text, std::string_view file_name, const ConfigEnvironment& env) {
  return config::ConfigReader(file_name, env).read(text);
}

// parse_config on a file; one that cannot be read is an error at its line 0.
inline ConfigResult load_config(const std::string& path, const ConfigEnvironment& env) {
  std::string text;
  if (std::string problem = config::read_text(env, path, text); !problem.empty()) return {{}, {{path, 0, problem}}};
  return parse_config(text, path, env);
}

}  // namespace nexus
