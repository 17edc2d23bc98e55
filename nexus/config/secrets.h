// secrets.h
// Owns:     reading keys: the clients' (api_keys_file) and a backend's own (api_key_env, api_key_file).
// Promises: no message repeats any part of a line or a value: what stands in the wrong place may be a key.
// Leaves:   where the texts come from to parser.h; comparing keys to worker.h.
// Threads:  any.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nexus/config/settings.h"
#include "nexus/config/values.h"

namespace nexus {

struct ConfigError {
  std::string file;
  int line = 0;  // from 1; 0: the file as a whole
  std::string message;
  std::string to_string() const { return file + ":" + std::to_string(line) + ": " + message; }
  bool operator==(const ConfigError&) const = default;
};

}  // namespace nexus

namespace nexus::config {

constexpr std::size_t kMinClientKeyBytes = 8;      // shorter ones can be guessed
constexpr std::size_t kMaxClientKeyBytes = 512;    // fits the smallest max_header
constexpr std::size_t kMaxBackendKeyBytes = 4096;  // tokens that carry claims are long
constexpr std::size_t kMaxClientKeys = 10'000;

constexpr bool is_visible_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c > 0x20 && c < 0x7f; });
}

// A backend's key, as it goes behind `Authorization: Bearer `.
constexpr bool is_backend_key(std::string_view key) {
  return !key.empty() && key.size() <= kMaxBackendKeyBytes && is_visible_ascii(key);
}

// The key in a file: its first line, trimmed.
constexpr std::string_view first_line_key(std::string_view text) {
  text = without_bom(text);
  return trim(take_line(text));
}

// The lines `name key` of api_keys_file, and every error in them under the name `file`.
class ClientKeyReader {
 public:
  ClientKeyReader(std::string_view file, std::vector<ConfigError>& errors) : file_(file), errors_(errors) {}

  std::vector<ApiKey> read(std::string_view text) {
    const std::size_t errors_before = errors_.size();
    text = without_bom(text);
    while (!text.empty() && errors_.size() < kMaxConfigErrors) {
      ++line_;
      read_line(without_comment(take_line(text)));
    }
    if (keys_.empty() && errors_.size() == errors_before) {
      line_ = 0;
      report("expected at least one line `name key`");
    }
    return std::move(keys_);
  }

 private:
  void report(std::string message) { errors_.push_back({std::string(file_), line_, std::move(message)}); }

  void read_line(std::string_view line) {
    if (line.empty()) return;
    const std::size_t blank = std::min(line.find_first_of(" \t"), line.size());
    const std::string_view name = line.substr(0, blank);
    const std::string_view key = trim(line.substr(blank));
    if (key.empty() || key.find_first_of(" \t") != std::string_view::npos) return report("expected `name key`");
    if (!is_backend_name(name)) {
      return report("expected a name of 1 to 64 letters, digits and . _ : - before the key");
    }
    if (key.size() < kMinClientKeyBytes || key.size() > kMaxClientKeyBytes || !is_visible_ascii(key)) {
      return report("expected a key of 8 to 512 visible ASCII characters");
    }
    if (keys_.size() == kMaxClientKeys) return report_once_full();
    add(name, key);
  }

  void add(std::string_view name, std::string_view key) {
    const auto [same_name, name_is_new] = names_.emplace(name, line_);
    if (!name_is_new) return report("this name already stands at line " + std::to_string(same_name->second));
    const auto [same_key, key_is_new] = lines_of_keys_.emplace(key, line_);
    if (!key_is_new) return report("this key already stands at line " + std::to_string(same_key->second));
    keys_.push_back({std::string(name), std::string(key)});
  }

  void report_once_full() {
    if (!full_) report("expected at most 10000 keys");
    full_ = true;
  }

  std::string_view file_;
  std::vector<ConfigError>& errors_;
  int line_ = 0;
  bool full_ = false;
  std::vector<ApiKey> keys_;
  std::unordered_map<std::string_view, int> names_, lines_of_keys_;  // views into the text
};

}  // namespace nexus::config
