// parser.h
// Owns:     nexus.conf from its text to Settings, or to the list of everything that is wrong with it.
// Promises: nothing is ignored: each unknown, repeated or unfit thing is an error with its line and what was
//           expected. parse_config is pure over any bytes; no message holds a key's text. At most 100 errors are
//           listed.
// Leaves:   keys, ranges and defaults to keys.h; the syntax of values to values.h; files and variables to
//           environment.h; comparing keys to worker.h.
// Threads:  any, one call at a time (errno, getenv).
// Tested by: tests/config_test.cpp, tests/fuzz/config.h, tests/e2e/cli.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/config/environment.h"
#include "nexus/config/keys.h"
#include "nexus/config/settings.h"
#include "nexus/config/values.h"

namespace nexus {

// The files in which hosts keep the certificates that they trust: Debian and Alpine, RHEL (old and new), SUSE, others.
inline constexpr std::array<const char*, 5> kSystemCa{
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem"};

struct ConfigResult {
  Settings settings;  // to be used only if ok()
  std::vector<ConfigError> errors;
  bool ok() const { return errors.empty(); }
};

namespace config {

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

inline std::string unknown_section_message(std::string_view word) {
  Words names;
  for (const ConfigKey& row : kConfigKeys) {
    if (names.empty() || names.back() != row.section) names.push_back(row.section);
  }
  return "unknown section " + in_quotes(word) + "; " + suggestion(word, names, "[", "]");
}

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

// ---- the reader

// A key that was given, with its text as in the file.
struct GivenKey {
  int line;
  std::string_view value;
  bool valid;
};

struct Section {
  std::string_view name;
  int line = 0;                                              // 0: not in the file
  std::unordered_multimap<std::string_view, GivenKey> keys;  // views into the text

  const GivenKey* find(std::string_view key) const {
    const auto found = keys.find(key);
    return found == keys.end() ? nullptr : &found->second;
  }
  int line_of(std::string_view key) const {
    const GivenKey* given = find(key);
    return given ? given->line : line;
  }
};

// One reading of one text. First the lines, then the relations between keys.
class ConfigReader {
 public:
  ConfigReader(std::string_view file, const ConfigEnvironment& env)
      : file_(file), env_(env), noting_env_(noting(env, content_hash_)) {
    for (const ConfigKey& row : kConfigKeys) sections_[row.section].name = row.section;
  }

  ConfigResult read(std::string_view text) {
    read_lines(text, errors_, [this](int number, std::string_view line) { read_line(number, line); });
    leave_section();
    fill_key_options(settings_.keys.defaults, settings_.server.api_keys);
    read_trace_variables(env_, sections_["trace"].find("endpoint") != nullptr, settings_.trace);
    check_aliases();
    check_weights();
    check_body_memory();
    check_listens("metrics_listen", settings_.server.listen, "listen");
    check_listens("tls_listen", settings_.server.listen, "listen");
    check_listens("tls_listen", settings_.server.metrics_listen, "metrics_listen");
    check_own_urls();
    check_server_tls();
    read_system_ca();
    check_ollama_admin();
    check_backends();
    return {std::move(settings_), all_errors()};
  }

 private:
  void report_at(int line, std::string message) { errors_.push_back({std::string(file_), line, std::move(message)}); }
  void report(std::string message) { report_at(line_, std::move(message)); }
  void report_repeated(const std::string& what, int line) {
    report(what + " is repeated; the first is on line " + std::to_string(line));
  }

  // ---- lines

  void read_line(int number, std::string_view line) {
    line_ = number;
    const bool is_header = line.front() == '[';
    if (is_header) leave_section();
    if (!is_plain_text(line)) return report("expected valid UTF-8 text without control characters");
    if (is_header) return read_header(line);
    if (line.front() == ';' || line.starts_with("//")) return report("expected `#` before a comment");
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
    const auto found = sections_.find(word);
    if (found == sections_.end()) return report(unknown_section_message(word));
    Section& section = found->second;
    const std::string header = "[" + std::string(word) + "]";
    if (word == "backend") {
      open_backend(name);
      section = {found->first, line_, {}};
    } else if (!name.empty()) {
      return report(header + " takes no name; expected " + header);
    } else if (section.line != 0) {
      report_repeated(header, section.line);
    } else {
      section.line = line_;
    }
    section_ = &section;
    skipping_ = false;
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
    Value value{settings_, *row, key, text, earlier != nullptr, line_, noting_env_, file_errors_};
    if (is_quoted(text)) {
      value.problem = "expected the value without quotes";  // and without the value: it may be a key
    } else {
      text.empty() ? value.refuse() : row->store(value);
    }
    section_->keys.emplace(key, GivenKey{line_, text, value.problem.empty()});
    note_given(key, text);
    if (!value.problem.empty()) report((is_free ? in_quotes(key) : std::string(key)) + ": " + value.problem);
    if (is_free && section_->keys.size() == kMaxModelsPerList + 1) {
      report(at_most(kMaxModelsPerList, "lines in this section"));
    }
  }

  void note_given(std::string_view key, std::string_view text) {
    std::string name = "[" + std::string(section_->name);
    if (section_->name == "backend") name += " " + settings_.backends.back().name;
    std::string& value = settings_.given[name.append("] ").append(key)];
    value.append(value.empty() ? "" : ", ").append(text);
    if (content_hash_) settings_.given[name.append(" (content)")] += " " + std::to_string(*content_hash_);
    content_hash_.reset();
  }

  // ---- relations between keys

  // Loops of more than kMaxAliasHops aliases are reported as too long.
  void check_aliases() {
    const Section& given = sections_["aliases"];
    const std::unordered_map<std::string_view, std::string_view> targets(settings_.aliases.begin(),
                                                                         settings_.aliases.end());
    for (const auto& [name, model] : settings_.aliases) {
      std::string_view at = model;
      auto next = targets.find(at);
      for (std::uint32_t hops = 1; at != name && next != targets.end() && hops < kMaxAliasHops; ++hops) {
        at = next->second;
        next = targets.find(at);
      }
      if (at != name && next == targets.end()) continue;
      const std::string beyond = "through more than " + std::to_string(kMaxAliasHops) + " aliases";
      report_at(given.line_of(name), "alias " + in_quotes(name) + " leads " + (at == name ? "back to itself" : beyond));
    }
  }

  void check_weights() {
    const RoutingSettings& routing = settings_.routing;
    if (routing.weight_priority + routing.weight_load + routing.weight_latency > 0) return;
    const Section& given = sections_["routing"];
    report_at(
        std::max({given.line_of("weight_priority"), given.line_of("weight_load"), given.line_of("weight_latency")}),
        "weight_priority, weight_load and weight_latency are all 0; at least one must be above 0");
  }

  // `key = value (line N)`, for a message about two keys.
  std::string as_given(std::string_view key, const GivenKey* given) {
    const std::string_view value = given ? given->value : find_key("server", key)->default_text;
    const std::string line = given ? "line " + std::to_string(given->line) : "the default";
    return std::string(key) + " = " + std::string(value) + " (" + line + ")";
  }

  void check_body_memory() {
    const Section& server = sections_["server"];
    const GivenKey* memory = server.find("body_memory");
    const GivenKey* body = server.find("max_body");
    const bool invalid = (memory && !memory->valid) || (body && !body->valid);
    if (invalid || settings_.server.body_memory_bytes >= settings_.server.max_body_bytes) return;
    report_at((memory ? memory : body)->line,
              as_given("body_memory", memory) + " must be at least " + as_given("max_body", body));
  }

  // No address of `key` is one of `others`.
  void check_listens(std::string_view key, const std::vector<HostPort>& others, std::string_view others_key) {
    const auto [first, last] = sections_["server"].keys.equal_range(key);
    for (auto given = first; given != last; ++given) {
      const auto address = parse_listen(given->second.value);
      if (!given->second.valid || !address || address->port == 0) continue;
      const auto same =
          std::find_if(others.begin(), others.end(), [&](const HostPort& other) { return overlap(*address, other); });
      if (same == others.end()) continue;
      std::string message =
          std::string(key) + ": " + address_text(*address) + " is already in " + std::string(others_key);
      if (*same != *address) message += " (" + address_text(*same) + ")";
      report_at(given->second.line, std::move(message));
    }
  }

  // A backend at an address of Nexus's own would pass its checks for ever, and serve nothing. Not where a service
  // manager passes sockets: nobody listens on these addresses then.
  void check_own_urls() {
    if (env_.get_env && env_.get_env("LISTEN_FDS")) return;
    for (const auto& [index, line] : url_lines_) {
      const HostPort& url = settings_.backends[index].address;
      for (const auto& [key, addresses] :
           {std::pair("listen", &settings_.server.listen), std::pair("tls_listen", &settings_.server.tls_listen),
            std::pair("metrics_listen", &settings_.server.metrics_listen)}) {
        const auto own = std::find_if(addresses->begin(), addresses->end(),
                                      [&url = url](const HostPort& listener) { return leads_to(url, listener); });
        if (own == addresses->end()) continue;
        report_at(line,
                  "url: " + address_text(url) + " is an address of this Nexus: " + as_given(key, line_of(key, *own)));
      }
    }
  }

  // The line of [server] that gives `address` to `key`; null: it is the default.
  const GivenKey* line_of(std::string_view key, const HostPort& address) {
    const auto [first, last] = sections_["server"].keys.equal_range(key);
    const auto found =
        std::find_if(first, last, [&](const auto& given) { return parse_listen(given.second.value) == address; });
    return found == last ? nullptr : &found->second;
  }

  void check_server_tls() {
    const Section& server = sections_["server"];
    const GivenKey* listen = server.find("tls_listen");
    if (listen != nullptr && server.find("tls_certificate") == nullptr) {
      report_at(listen->line, "tls_listen needs a tls_certificate");
    }
    for (const std::string_view key : {"tls_certificate", "tls_key", "tls_client_ca"}) {
      const GivenKey* given = server.find(key);
      if (given != nullptr && listen == nullptr) report_at(given->line, std::string(key) + " needs a tls_listen");
    }
  }

  // The bundle of this host, if a backend is verified by it.
  void read_system_ca() {
    const auto by_system = std::find_if(settings_.backends.begin(), settings_.backends.end(), [](const auto& backend) {
      return backend.tls.on && backend.tls.verify && backend.tls.ca_file.path.empty();
    });
    if (by_system == settings_.backends.end() || !errors_.empty()) return;
    std::vector<std::string> paths(kSystemCa.begin(), kSystemCa.end());
    const auto named = env_.get_env ? env_.get_env("SSL_CERT_FILE") : std::nullopt;
    if (named && !named->empty()) paths.assign(1, *named);
    for (std::string& path : paths) {
      if (!read_text(env_, path, settings_.system_ca.text).empty()) continue;
      settings_.system_ca.path = std::move(path);
      return;
    }
    report_at(backend_lines_[by_system->name],
              "[backend " + by_system->name +
                  "]: this host has no bundle of trusted certificates (Debian: apt-get install ca-certificates); set "
                  "tls_ca to a PEM file");
  }

  void check_ollama_admin() {
    const std::string& name = settings_.server.ollama_admin;
    const GivenKey* given = sections_["server"].find("ollama_admin");
    const bool known = std::any_of(settings_.backends.begin(), settings_.backends.end(),
                                   [&](const BackendSettings& backend) { return backend.name == name; });
    if (given == nullptr || name.empty() || known) return;
    report_at(given->line, "ollama_admin: there is no [backend " + name + "]");
  }

  // Nothing is served without a backend: the file is empty, or was read while a program wrote it.
  void check_backends() {
    const bool none = backend_lines_.empty() && errors_.empty() && file_errors_.empty();
    if (none) report_at(std::max(line_, 1), "no [backend NAME] section; at least one is needed");
  }

  void finish_backend(const Section& given) {
    const GivenKey* type = given.find("type");
    const GivenKey* url = given.find("url");
    const GivenKey* delay = given.find("token_delay");
    const GivenKey* env = given.find("api_key_env");
    const GivenKey* file = given.find("api_key_file");
    const bool is_echo = settings_.backends.back().kind == BackendKind::echo;
    if (url && url->valid && !is_echo) url_lines_.emplace_back(settings_.backends.size() - 1, url->line);
    if (env && file) {
      report_at(std::max(env->line, file->line), "set either api_key_env (line " + std::to_string(env->line) +
                                                     ") or api_key_file (line " + std::to_string(file->line) +
                                                     "), not both");
    }
    if (type && !type->valid) return;
    if (is_echo && url) report_at(url->line, "url: not allowed with type = echo");
    if (!is_echo && !url) report_at(given.line, "url is missing; expected " + std::string(kUrlText));
    for (const std::string_view key : {"tls_ca", "tls_verify", "tls_name", "tls_certificate", "tls_key"}) {
      const GivenKey* tls = given.find(key);
      if (tls != nullptr && !settings_.backends.back().tls.on && (!url || url->valid)) {
        report_at(tls->line, std::string(key) + ": allowed with an https:// url only");
      }
    }
    const GivenKey* key = given.find("tls_key");
    if (key && !given.find("tls_certificate")) report_at(key->line, "tls_key needs a tls_certificate");
    if (!is_echo && delay) report_at(delay->line, "token_delay: allowed with type = echo only");
  }

  // nexus.conf's by line, then the key file's.
  std::vector<ConfigError> all_errors() {
    std::stable_sort(errors_.begin(), errors_.end(),
                     [](const ConfigError& a, const ConfigError& b) { return a.line < b.line; });
    errors_.insert(errors_.end(), file_errors_.begin(), file_errors_.end());
    if (errors_.size() > kMaxConfigErrors) {
      errors_.resize(kMaxConfigErrors);
      const ConfigError& last = errors_.back();
      errors_.push_back({last.file, last.line, "too many errors; those after this line are not listed"});
    }
    return std::move(errors_);
  }

  std::string_view file_;
  const ConfigEnvironment& env_;
  std::optional<std::size_t> content_hash_;  // of the file or variable that the value in hand names
  ConfigEnvironment noting_env_;             // env_, which sets that
  Settings settings_;
  std::vector<ConfigError> errors_;       // in nexus.conf
  std::vector<ConfigError> file_errors_;  // in the file of api_keys_file

  int line_ = 0;
  std::unordered_map<std::string_view, Section> sections_;   // [backend] is that of the open [backend NAME]
  Section* section_ = nullptr;                               // of the next key; none before the first header
  bool skipping_ = false;                                    // after an invalid header
  std::unordered_map<std::string_view, int> backend_lines_;  // views into the text
  std::vector<std::pair<std::size_t, int>> url_lines_;       // by the backend's index
};

}  // namespace config

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
