// key_file.h
// Owns:     the lines of api_keys_file, `name key option=value…`, and the table of their options.
// Promises: no message quotes any part of a line but the name of an option that is known: all else may be a key. An
//           option that a line lacks has its value of [keys], if that section has it.
// Leaves:   what the options mean to their users; comparing keys to server/client_keys.h.
// Threads:  any.
// Tested by: tests/config_test.cpp, tests/fuzz/config.h
#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/config/settings.h"
#include "nexus/config/values.h"

namespace nexus::config {

// An option with a number; [keys] has a default for each.
struct KeyOption {
  std::string_view name;
  std::uint64_t least, most;
  std::uint64_t KeyOptions::*field;
};

inline constexpr std::array kKeyOptions{
    KeyOption{"weight", 1, 1000, &KeyOptions::weight},
    KeyOption{"priority", 0, kMaxKeyPriority, &KeyOptions::priority},
    KeyOption{"max_pending", 0, 1'000'000, &KeyOptions::max_pending},
    KeyOption{"rpm", 0, kMaxPerMinute, &KeyOptions::rpm},
    KeyOption{"tpm", 0, kMaxPerMinute, &KeyOptions::tpm},
    KeyOption{"admin", 0, 1, &KeyOptions::admin},
};

// The number of an option; `k` stands for 1000 and `M` for 1000000.
constexpr std::optional<std::uint64_t> parse_key_number(std::string_view text) {
  return parse_with_unit(text, {{"k", 1000}, {"M", 1'000'000}, {"", 1}});
}

// Returns a problem, or an empty text.
inline std::string read_key_number(const KeyOption& option, std::string_view text, ApiKey& key) {
  const auto number = parse_key_number(text);
  if (!number || *number < option.least || *number > option.most) {
    return std::string(option.name) + ": expected a number, " + std::to_string(option.least) + " to " +
           std::to_string(option.most);
  }
  key.options.*option.field = *number;
  return {};
}

// The same. A model ends with `*` for all that begin with the rest.
inline std::string read_key_models(std::string_view text, ApiKey& key) {
  const std::string problem = "models: expected a comma-separated list of models, each with or without a * at its end";
  while (!text.empty()) {
    const std::string_view model = text.substr(0, text.find(','));
    text.remove_prefix(std::min(model.size() + 1, text.size()));
    const std::string_view start = model.ends_with('*') ? model.substr(0, model.size() - 1) : model;
    if (model.empty() || (!start.empty() && !is_model_name(start))) return problem;
    if (key.models.size() == kMaxModelsPerList) return "models: " + at_most(kMaxModelsPerList, "models");
    key.models.emplace_back(model);
  }
  return key.models.empty() ? problem : "";
}

// Reads `option=value` into `key`. Returns a problem, or an empty text.
inline std::string read_key_option(std::string_view word, ApiKey& key) {
  const std::size_t equals = word.find('=');
  const std::string_view name = word.substr(0, equals);
  const auto option =
      std::find_if(kKeyOptions.begin(), kKeyOptions.end(), [&](const KeyOption& row) { return row.name == name; });
  const bool models = name == "models";
  if (equals == std::string_view::npos || (option == kKeyOptions.end() && !models)) {
    std::string known;
    for (const KeyOption& row : kKeyOptions) known.append(row.name).append("=, ");
    return "expected an option behind the key, one of " + known + "models=";
  }
  const unsigned bit = 1u << static_cast<unsigned>(option - kKeyOptions.begin());
  if ((key.given & bit) != 0) return std::string(name) + " is repeated on this line";
  key.given |= bit;
  const std::string_view value = word.substr(equals + 1);
  return models ? read_key_models(value, key) : read_key_number(*option, value, key);
}

// The word up to the next blank, which is taken off `rest`.
inline std::string_view next_word(std::string_view& rest) {
  rest = trim_blanks(rest);
  const std::string_view word = rest.substr(0, std::min(rest.find_first_of(" \t"), rest.size()));
  rest.remove_prefix(word.size());
  return word;
}

// Reads one line into `key`. Returns a problem, or an empty text.
inline std::string read_key_line(std::string_view line, ApiKey& key) {
  const std::string_view name = next_word(line), secret = next_word(line);
  if (secret.empty()) return "expected `name key`";
  if (!is_backend_name(name)) return "expected a name of 1 to 64 letters, digits and . _ : - before the key";
  if (name == "none" || name == "other")
    return "'" + std::string(name) + "' is reserved for the metrics of other clients";
  if (secret.size() < kMinClientKeyBytes || secret.size() > kMaxClientKeyBytes || !is_visible_ascii(secret)) {
    return "expected a key of 8 to 512 visible ASCII characters";
  }
  if (is_quoted(secret)) return "expected a key without quotes";
  key.name = name;
  key.key = secret;
  for (std::string_view word; !(word = next_word(line)).empty();) {
    if (std::string problem = read_key_option(word, key); !problem.empty()) return problem;
  }
  return {};
}

inline void read_client_keys(std::string_view text, const std::string& file, std::vector<ConfigError>& errors,
                             std::vector<ApiKey>& keys) {
  std::unordered_map<std::string, int> lines_of_names, lines_of_keys;
  bool full = false;
  read_lines(text, errors, [&](int number, std::string_view line) {
    const auto report = [&](std::string message) { errors.push_back({file, number, std::move(message)}); };
    ApiKey key;
    if (std::string problem = read_key_line(line, key); !problem.empty()) return report(std::move(problem));
    if (keys.size() == kMaxClientKeys) {
      if (!std::exchange(full, true)) report(at_most(kMaxClientKeys, "keys"));
      return;
    }
    const auto [same_name, name_is_new] = lines_of_names.emplace(key.name, number);
    if (!name_is_new) return report("this name is already used on line " + std::to_string(same_name->second));
    const auto [same_key, key_is_new] = lines_of_keys.emplace(key.key, number);
    if (!key_is_new) return report("this key is already used on line " + std::to_string(same_key->second));
    keys.push_back(std::move(key));
  });
  if (keys.empty() && errors.empty()) errors.push_back({file, 0, "expected at least one line `name key`"});
}

// [keys] has the value of each option that a line leaves out.
inline void fill_key_options(const KeyOptions& defaults, std::vector<ApiKey>& keys) {
  for (ApiKey& key : keys) {
    for (std::size_t i = 0; i < kKeyOptions.size(); ++i) {
      if ((key.given & 1u << i) == 0) key.options.*kKeyOptions[i].field = defaults.*kKeyOptions[i].field;
    }
  }
}

// The files with keys that every user of this host can read.
inline std::vector<std::string> open_key_files(const Settings& settings) {
  std::vector<std::string> out;
  const auto note = [&](const std::string& path) {
    struct stat file {};
    if (::stat(path.c_str(), &file) == 0 && (file.st_mode & S_IROTH) != 0) out.push_back(path);
  };
  const auto note_keys = [&](const TlsCertificate& one) {
    if (one.chain.has_private_key) note(one.chain.path);
    if (one.key.has_private_key) note(one.key.path);
  };
  for (const auto& [name, path] : settings.given) {
    if (name.ends_with("] api_keys_file") || name.ends_with("] api_key_file")) note(path);
  }
  for (const TlsCertificate& one : settings.server.tls_certificates) note_keys(one);
  for (const BackendSettings& backend : settings.backends) note_keys(backend.tls.certificate);
  return out;
}

}  // namespace nexus::config
