// parser.h
// Owns:     nexus.conf from its text to Settings, or to the list of everything that is wrong with it; reading its
//           files.
// Promises: nothing is ignored: each unknown, repeated or unfit thing is an error with its line and what was expected.
//           parse_config is pure over any bytes; no message holds a key's text. At most 100 errors are listed.
// Leaves:   keys, ranges and defaults to keys.h; how values are written to values.h; keys of clients and
//           backends to secrets.h.
// Threads:  any, one call at a time (errno, getenv).
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "nexus/config/keys.h"
#include "nexus/config/secrets.h"
#include "nexus/config/settings.h"
#include "nexus/config/values.h"

namespace nexus {

struct ConfigResult {
  Settings settings;  // to be used if ok() only
  std::vector<ConfigError> errors;
  bool ok() const { return errors.empty(); }
};

// What a configuration takes from the system. A read_file that gives nothing leaves the reason in errno.
struct ConfigEnvironment {
  std::function<std::optional<std::string>(const std::string& name)> get_env;
  std::function<std::optional<std::string>(const std::string& path)> read_file;
};

namespace config {

// The whole text of a file of at most kMaxConfigFileBytes.
inline std::optional<std::string> read_bounded_file(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return std::nullopt;
  std::string text;
  std::array<char, 16'384> piece;
  int failure = 0;
  for (;;) {
    const ssize_t n = ::read(fd, piece.data(), piece.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) failure = errno;
    if (n <= 0) break;
    text.append(piece.data(), static_cast<std::size_t>(n));
    if (text.size() > kMaxConfigFileBytes) {
      failure = EFBIG;
      break;
    }
  }
  close(fd);
  errno = failure;
  if (failure != 0) return std::nullopt;
  return text;
}

// read_file with the reason in words where it fails.
inline Parsed<std::string> read_text(const ConfigEnvironment& env, const std::string& path) {
  errno = ENOENT;  // for a read_file that leaves no reason
  auto text = env.read_file ? env.read_file(path) : std::nullopt;
  if (!text) return {{}, "cannot be read: " + std::generic_category().message(errno)};
  return {std::move(*text), {}};
}

// A key that was given, with its line and text as they stand in the file.
struct GivenKey {
  const ConfigKey* row;
  int line;
  std::string_view value;
  bool stored;
};

struct Section {
  std::string_view name;
  int line = 0;  // 0: not there
  std::vector<GivenKey> keys;

  const GivenKey* find(std::string_view key) const {
    for (const GivenKey& given : keys) {
      if (given.row->key == key) return &given;
    }
    return nullptr;
  }
  int line_of(std::string_view key) const {
    const GivenKey* given = find(key);
    return given ? given->line : line;
  }
};

struct BackendSection : Section {
  BackendDraft draft;
};

// The word of `words` that `typed` was probably meant to be; empty where none is near.
template <class Words>
std::string_view nearest(std::string_view typed, const Words& words) {
  std::string_view best;
  std::size_t least = std::min<std::size_t>(3, (typed.size() + 1) / 2 + 1);  // short words are all near one another
  for (std::string_view word : words) {
    const std::size_t distance = edit_distance(typed, word);
    if (distance >= least) continue;
    least = distance;
    best = word;
  }
  return best;
}

constexpr std::array kSectionNames = std::to_array<std::string_view>(
    {"server", "upstream", "health", "routing", "queue", "fallbacks", "aliases", "metrics", "log", "backend"});

// `a, b, c`, each with `open` before and `close` behind it.
template <class Words>
std::string joined(const Words& words, std::string_view open, std::string_view close, std::string_view between = ", ") {
  std::string result;
  for (std::string_view word : words) {
    if (!result.empty()) result += between;
    result.append(open).append(word).append(close);
  }
  return result;
}

inline std::string unknown_key_message(std::string_view section, std::string_view key) {
  std::vector<std::string_view> keys, elsewhere;
  for (const ConfigKey& row : config_keys()) {
    if (row.section == section) keys.push_back(row.key);
    if (row.key == key && row.kind != ValueKind::free_key) elsewhere.push_back(row.section);
  }
  const std::string unknown = "unknown key " + in_quotes(key) + " in [" + std::string(section) + "]; ";
  if (!elsewhere.empty()) return unknown + "it belongs in " + joined(elsewhere, "[", "]", " or ");
  const std::string_view meant = nearest(key, keys);
  if (!meant.empty()) return unknown + "did you mean " + in_quotes(meant) + "?";
  return unknown + "expected one of " + joined(keys, "", "");
}

// Where the `=` between key and value stands. A model's name may hold one: there it is the first with blanks around it,
// if any has.
constexpr std::size_t find_equals(std::string_view line, bool free_key) {
  const std::size_t first = line.find('=');
  for (std::size_t i = first; free_key && i != std::string_view::npos; i = line.find('=', i + 1)) {
    const bool blank_behind = i + 1 == line.size() || is_blank(line[i + 1]);
    if (i > 0 && is_blank(line[i - 1]) && blank_behind) return i;
  }
  return first;
}

// One reading of one text. The lines come first, then what two of them must agree on, then the keys in other files.
class ConfigReader {
 public:
  ConfigReader(std::string_view file, const ConfigEnvironment& env) : file_(file), env_(env) {
    for (std::size_t i = 0; i < sections_.size(); ++i) sections_[i].name = kSectionNames[i];
  }

  ConfigResult read(std::string_view text) {
    text = without_bom(text);
    while (!text.empty() && errors_.size() <= kMaxConfigErrors) {
      ++line_;
      read_line(without_comment(take_line(text)));
    }
    check_aliases();
    check_weights();
    check_body_memory();
    check_listens();
    for (BackendSection& backend : backends_) finish_backend(backend);
    read_client_keys();
    return {std::move(settings_), all_errors()};
  }

 private:
  void report_at(int line, std::string message) { errors_.push_back({std::string(file_), line, std::move(message)}); }
  void report(std::string message) { report_at(line_, std::move(message)); }
  void report_repeated(std::string_view what, int line) {
    report(std::string(what) + " is repeated: it already stands at line " + std::to_string(line));
  }

  // ---- lines

  void read_line(std::string_view line) {
    if (line.empty()) return;
    const bool is_header = line.front() == '[';
    if (is_header) leave_section();
    if (!is_plain_text(line)) return report("expected valid UTF-8 text without control characters");
    if (is_header) return read_header(line);
    const bool free_key = section_ && (section_->name == "aliases" || section_->name == "fallbacks");
    const std::size_t equals = find_equals(line, free_key);
    // The line is not repeated: what has no `=` may be a key that was pasted alone.
    if (equals == std::string_view::npos || equals == 0) return report("expected `key = value` or `[section]`");
    read_pair(trim(line.substr(0, equals)), trim(line.substr(equals + 1)));
  }

  // The lines up to the next good header are passed over: their section's error says enough.
  void leave_section() {
    section_ = nullptr;
    backend_ = nullptr;
    in_unknown_section_ = true;
  }

  void enter(Section& section) {
    section_ = &section;
    in_unknown_section_ = false;
  }

  void read_header(std::string_view line) {
    if (line.back() != ']') return report("expected a `]` at the end of the line");
    const std::string_view inner = trim(line.substr(1, line.size() - 2));
    const std::size_t blank = std::min(inner.find_first_of(" \t"), inner.size());
    const std::string_view word = inner.substr(0, blank);
    const std::string_view name = trim(inner.substr(blank));
    if (word == "backend") return open_backend(name);
    auto found = std::find_if(sections_.begin(), sections_.end(), [&](const Section& s) { return s.name == word; });
    if (found == sections_.end()) return report_unknown_section(word);
    if (!name.empty()) return report("[" + std::string(word) + "] takes no name; expected [" + std::string(word) + "]");
    if (found->line != 0) report_repeated("[" + std::string(word) + "]", found->line);
    if (found->line == 0) found->line = line_;
    enter(*found);
  }

  void report_unknown_section(std::string_view word) {
    const std::string_view meant = nearest(word, kSectionNames);
    report("unknown section " + in_quotes(word) + "; " +
           (meant.empty() ? "expected one of " + joined(kSectionNames, "[", "]")
                          : "did you mean [" + std::string(meant) + "]?"));
  }

  void open_backend(std::string_view name) {
    if (name.empty()) {
      report("expected a name, [backend NAME]");
    } else if (!is_backend_name(name)) {
      report("expected a backend's name of 1 to 64 letters, digits and . _ : -, not " + in_quotes(name));
    } else if (name == "none") {
      report("'none' can't name a backend: it stands for requests that reached no backend");
    } else {
      const auto [same, is_new] = backend_lines_.emplace(name, line_);
      if (!is_new) report_repeated("[backend " + std::string(name) + "]", same->second);
    }
    if (backends_.size() == kMaxBackends) report("expected at most " + std::to_string(kMaxBackends) + " backends");
    backend_ = &backends_.emplace_back();
    backend_->name = "backend";
    backend_->line = line_;
    backend_->draft.settings.name = name;
    enter(*backend_);
  }

  void read_pair(std::string_view key, std::string_view value) {
    if (in_unknown_section_) return;
    if (!section_) return report(in_quotes(key) + " stands before any section; expected a line like [server] above it");
    if (section_->name == "aliases") return read_alias(key, value);
    if (section_->name == "fallbacks") return read_fallback(key, value);
    const ConfigKey* row = find_key(section_->name, key);
    if (!row) return report(unknown_key_message(section_->name, key));
    const GivenKey* earlier = section_->find(key);
    if (earlier && row->kind != ValueKind::listen) return report_repeated(in_quotes(key), earlier->line);
    std::string problem = detail::expectation(*row);
    if (!value.empty()) {
      ConfigTarget target{settings_, backend_ ? &backend_->draft : nullptr, earlier != nullptr};
      problem = row->store(target, *row, value);
    }
    section_->keys.push_back({row, line_, value, problem.empty()});
    if (!problem.empty()) report(std::string(key) + ": " + problem);
  }

  // ---- sections whose keys are model names

  using NameLines = std::unordered_map<std::string_view, int>;

  // Whether `name` is a new and fit key of a section that allows kMaxModelsPerList of them.
  bool accept_name(std::string_view name, NameLines& lines) {
    if (!is_model_name(name)) {
      report(expected_model_name() + ", not " + in_quotes(name));
      return false;
    }
    const auto [same, is_new] = lines.emplace(name, line_);
    if (!is_new) report_repeated(in_quotes(name), same->second);
    if (is_new && lines.size() == kMaxModelsPerList + 1) {
      report("expected at most " + std::to_string(kMaxModelsPerList) + " lines in this section");
    }
    return is_new;
  }

  void read_alias(std::string_view name, std::string_view model) {
    if (!accept_name(name, alias_lines_)) return;
    if (!is_model_name(model))
      return report(in_quotes(name) + ": " + expected_model_name() + ", not " + in_quotes(model));
    settings_.aliases.emplace_back(name, model);
  }

  void read_fallback(std::string_view model, std::string_view list) {
    if (!accept_name(model, fallback_lines_)) return;
    auto models = parse_models(list);
    if (!models.ok()) return report(in_quotes(model) + ": " + models.problem);
    if (std::find(models.value.begin(), models.value.end(), model) != models.value.end()) {
      return report(in_quotes(model) + " can't fall back to itself");
    }
    settings_.fallbacks.emplace_back(model, std::move(models.value));
  }

  // ---- what two lines must agree on

  Section& section(std::string_view name) {
    return *std::find_if(sections_.begin(), sections_.end(), [name](const Section& s) { return s.name == name; });
  }

  // An alias may lead to an alias, kMaxAliasHops in all. Loops that are longer than that are reported as too long.
  void check_aliases() {
    std::unordered_map<std::string_view, std::string_view> targets;
    for (const auto& [name, model] : settings_.aliases) targets.emplace(name, model);
    for (const auto& [name, model] : settings_.aliases) {
      const int line = alias_lines_.find(name)->second;
      std::string_view at = model;
      for (std::size_t hops = 1;; ++hops) {
        if (at == name) {
          report_at(line, in_quotes(name) + " leads back to itself");
          break;
        }
        const auto next = targets.find(at);
        if (next == targets.end()) break;
        if (hops == kMaxAliasHops) {
          report_at(line, in_quotes(name) + " leads through more than " + std::to_string(kMaxAliasHops) + " aliases");
          break;
        }
        at = next->second;
      }
    }
  }

  void check_weights() {
    const RoutingSettings& routing = settings_.routing;
    if (routing.weight_priority + routing.weight_load + routing.weight_latency > 0) return;
    const Section& given = section("routing");
    report_at(
        std::max({given.line_of("weight_priority"), given.line_of("weight_load"), given.line_of("weight_latency")}),
        "weight_priority, weight_load and weight_latency are all 0; expected one above 0");
  }

  // `key = value (line N)`, for a message about two keys.
  std::string as_given(const Section& section, std::string_view key) {
    const GivenKey* given = section.find(key);
    const std::string_view value = given ? given->value : find_key(section.name, key)->default_text;
    return std::string(key) + " = " + std::string(value) +
           (given ? " (line " + std::to_string(given->line) + ")" : " (the default)");
  }

  void check_body_memory() {
    if (settings_.server.body_memory_bytes >= settings_.server.max_body_bytes) return;
    const Section& server = section("server");
    for (std::string_view key : {"body_memory", "max_body"}) {
      const GivenKey* given = server.find(key);
      if (given && !given->stored) return;
    }
    report_at(server.line_of(server.find("body_memory") ? "body_memory" : "max_body"),
              as_given(server, "body_memory") + " must be at least " + as_given(server, "max_body"));
  }

  void check_listens() {
    const auto& listen = settings_.server.listen;
    for (const GivenKey& given : section("server").keys) {
      if (given.row->key != "metrics_listen" || !given.stored) continue;
      const auto address = parse_listen(given.value);
      if (address && address->port != 0 && std::find(listen.begin(), listen.end(), *address) != listen.end()) {
        report_at(given.line, "metrics_listen: " + address_text(*address) + " is already in listen");
      }
    }
  }

  // ---- backends and keys

  void finish_backend(BackendSection& backend) {
    const bool is_echo = backend.draft.settings.kind == BackendKind::echo;
    const GivenKey* type = backend.find("type");
    if (!type || type->stored) {
      const GivenKey* url = backend.find("url");
      const GivenKey* delay = backend.find("token_delay");
      if (is_echo && url) report_at(url->line, "url: an echo backend has none");
      if (!is_echo && !url) report_at(backend.line, "this backend needs a url, http://host[:port][/prefix]");
      if (!is_echo && delay) report_at(delay->line, "token_delay: only an echo backend has one");
    }
    read_backend_key(backend);
    settings_.backends.push_back(std::move(backend.draft.settings));
  }

  void read_backend_key(BackendSection& backend) {
    const GivenKey* env = backend.find("api_key_env");
    const GivenKey* file = backend.find("api_key_file");
    if (env && file) {
      report_at(std::max(env->line, file->line), "expected either api_key_env (line " + std::to_string(env->line) +
                                                     ") or api_key_file (line " + std::to_string(file->line) + ")");
    } else if (env && env->stored) {
      const auto value = env_.get_env ? env_.get_env(backend.draft.api_key_env) : std::nullopt;
      if (!value || value->empty()) return report_at(env->line, "api_key_env: this variable is not set, or empty");
      keep_backend_key(backend, *env, *value);
    } else if (file && file->stored) {
      const auto text = read_text(env_, backend.draft.api_key_file);
      if (!text.ok()) return report_at(file->line, "api_key_file: this file " + text.problem);
      keep_backend_key(backend, *file, first_line_key(text.value));
    }
  }

  void keep_backend_key(BackendSection& backend, const GivenKey& given, std::string_view key) {
    if (is_backend_key(key)) {
      backend.draft.settings.api_key = key;
    } else {
      report_at(given.line,
                std::string(given.row->key) + ": expected a key of 1 to 4096 visible ASCII characters in it");
    }
  }

  void read_client_keys() {
    const GivenKey* given = section("server").find("api_keys_file");
    if (!given || !given->stored) return;
    const std::string& file = settings_.server.api_keys_file;
    const auto text = read_text(env_, file);
    if (!text.ok()) return report_at(given->line, "api_keys_file: this file " + text.problem);
    settings_.server.api_keys = ClientKeyReader(file, key_errors_).read(text.value);
  }

  // nexus.conf's by line, then the key file's.
  std::vector<ConfigError> all_errors() {
    std::stable_sort(errors_.begin(), errors_.end(),
                     [](const ConfigError& a, const ConfigError& b) { return a.line < b.line; });
    std::move(key_errors_.begin(), key_errors_.end(), std::back_inserter(errors_));
    if (errors_.size() > kMaxConfigErrors) {
      errors_.resize(kMaxConfigErrors);
      const ConfigError& last = errors_.back();
      errors_.push_back({last.file, last.line, "too many errors; the ones behind this line are not listed"});
    }
    return std::move(errors_);
  }

  std::string_view file_;
  const ConfigEnvironment& env_;
  Settings settings_;
  std::vector<ConfigError> errors_;      // in nexus.conf
  std::vector<ConfigError> key_errors_;  // in api_keys_file

  int line_ = 0;
  Section* section_ = nullptr;         // where the next key belongs; none before the first header
  BackendSection* backend_ = nullptr;  // set while section_ is a [backend NAME]
  bool in_unknown_section_ = false;

  std::array<Section, kSectionNames.size() - 1> sections_;  // all but the backends
  std::deque<BackendSection> backends_;                     // a deque: section_ points into it
  NameLines backend_lines_, alias_lines_, fallback_lines_;  // views into the text
};

}  // namespace config

// The real environment. Files are bounded at 1 MB.
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

// parse_config on a file; one that can't be read is an error at its line 0.
inline ConfigResult load_config(const std::string& path, const ConfigEnvironment& env) {
  const auto text = config::read_text(env, path);
  if (!text.ok()) return {{}, {{path, 0, text.problem}}};
  return parse_config(text.value, path, env);
}

}  // namespace nexus
