// keys.h
// Owns:     the table of every key of nexus.conf: its section, kind, default, range, and where it is stored;
//           and the hint in an error about an unknown word: the one that was probably meant, or all that are known.
// Promises: one row a key, and the row is all that the program knows of it: ranges are checked against the very text
//           that the manual shows (static_assert below).
// Leaves:   the syntax of values to values.h; lines, repeats and relations between keys to parser.h.
// Threads:  any; the table is constant.
// Tested by: tests/config_test.cpp, tests/docs_test.cpp (table, manual and example agree)
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/config/key_file.h"
#include "nexus/config/own_address.h"
#include "nexus/config/settings.h"
#include "nexus/config/trace_values.h"
#include "nexus/config/values.h"

namespace nexus::config {

using Words = std::vector<std::string_view>;

// `a, b, c`, each between `open` and `close`.
inline std::string joined(const Words& words, std::string_view open, std::string_view close,
                          std::string_view between = ", ") {
  std::string result;
  for (std::string_view word : words) {
    if (!result.empty()) result += between;
    result.append(open).append(word).append(close);
  }
  return result;
}

// The word that was probably meant by `typed`, which is none of them; or empty.
inline std::string_view nearest_word(std::string_view typed, const Words& words) {
  std::string small(typed);
  std::transform(small.begin(), small.end(), small.begin(), to_lower);
  std::string_view meant;
  std::size_t least = std::min<std::size_t>(3, typed.size() / 2 + 1);  // short words are all near one another
  for (std::string_view word : words) {
    const std::size_t distance = edit_distance(small, word);
    if (distance < least) meant = word;
    least = std::min(least, distance);
  }
  return meant;
}

// The word that was probably meant, or all of them, between `open` and `close`.
inline std::string suggestion(std::string_view typed, const Words& words, std::string_view open,
                              std::string_view close) {
  const std::string_view meant = nearest_word(typed, words);
  if (meant.empty()) return "expected one of " + joined(words, open, close);
  return "did you mean " + joined({meant}, open, close) + "?";
}

// ---- kinds of values

// The number that `text` stands for, if it is in the range.
using ScalarParser = std::optional<std::uint64_t>(std::string_view text, std::string_view range);

// For a range `LEAST to MOST` or `0, or LEAST to MOST`, in the units that Parse reads; a range of another form is
// empty.
template <auto Parse>
constexpr std::optional<std::uint64_t> parse_ranged(std::string_view text, std::string_view range) {
  constexpr std::string_view zero = "0, or ", to = " to ";
  const auto number = Parse(text);
  if (range.starts_with(zero)) {
    if (number == 0u) return number;
    range.remove_prefix(zero.size());
  }
  const std::size_t middle = range.find(to);
  if (middle == std::string_view::npos) return std::nullopt;
  const auto least = Parse(range.substr(0, middle)), most = Parse(range.substr(middle + to.size()));
  return number && least && most && *number >= *least && *number <= *most ? number : std::nullopt;
}

struct ValueKind {
  std::string_view words = "";  // between "expected " and the range
  ScalarParser* parse = [](std::string_view, std::string_view) { return std::optional<std::uint64_t>(0); };
  bool repeats = false;   // the key may be given more than once
  bool free_key = false;  // the key is a name that the user chooses
};

constexpr ValueKind kNumber{"a number, ", parse_ranged<parse_number>};
constexpr ValueKind kPerMinute{"a number (or with k, M), ", parse_ranged<parse_key_number>};
constexpr ValueKind kPercent{"a percentage, ", parse_ranged<parse_percent>};
constexpr ValueKind kShare{"a share with at most six decimals, ", parse_ranged<parse_share>};
constexpr ValueKind kNumberOrAuto{"", [](std::string_view text, std::string_view range) {
                                    constexpr std::string_view automatic = "auto, or ";
                                    if (text == "auto") return std::optional<std::uint64_t>(kAutomatic);
                                    return parse_ranged<parse_number>(text, range.substr(automatic.size()));
                                  }};
constexpr ValueKind kSize{"a size (bytes, or with k, M, G), ", parse_ranged<parse_size>};
constexpr ValueKind kDuration{"a duration (with ms, s, m, h), ", parse_ranged<parse_duration>};
constexpr ValueKind kYesNo{"", [](std::string_view text, std::string_view) { return parse_yes_no(text); }};
constexpr ValueKind kChoice{"one of ", parse_choice};  // the range lists the words in the order of the enum
constexpr ValueKind kListen{.repeats = true};
constexpr ValueKind kText{};
constexpr ValueKind kTexts{.repeats = true};
constexpr ValueKind kFreeKey{.free_key = true};

struct Value;

// A row. An empty default means that there is none.
struct ConfigKey {
  std::string_view section;
  std::string_view key;
  ValueKind kind;
  std::string_view default_text;
  std::string_view range;  // allowed values, as in the manual's "Range:"
  void (*store)(Value& value);
  std::string expectation() const { return "expected " + std::string(kind.words) + std::string(range); }
};

// ---- storing

// One value while a row's lambda stores it. The type of the field selects the reader; if the text is unfit,
// `problem` says why.
struct Value {
  Settings& s;
  const ConfigKey& row;
  std::string_view key, text;  // as written
  bool repeated;               // this section had this key before
  int line;
  const ConfigEnvironment& env;
  std::vector<ConfigError>& file_errors;  // in the file that the value names
  std::string problem{};

  BackendSettings& backend() { return s.backends.back(); }  // of the open section

  void refuse() {
    problem = row.expectation() + (text.empty() ? "" : ", not " + in_quotes(text));
    if (row.kind.parse != parse_choice) return;
    Words words;
    for (std::string_view rest = row.range; !rest.empty();) words.push_back(next_list_element(rest));
    const std::string_view meant = nearest_word(text, words);
    if (!meant.empty()) problem.append("; did you mean ").append(meant).append("?");
  }

  template <class T>
  requires std::is_arithmetic_v<T> || std::is_enum_v<T>
  void to(T& field) {
    const auto number = row.kind.parse(text, row.range);
    if (!number) return refuse();
    field = static_cast<T>(*number);
  }

  // The first address replaces the default, the others join it.
  void to(std::vector<HostPort>& field) {
    auto address = parse_listen(text);
    if (!address) {
      refuse();
      // `:8000` and `8000`, as other programs take them.
      const std::string_view port = text.substr(text.starts_with(':') ? 1 : 0);
      if (parse_number(port)) problem.append("; for every IPv4 address: *:").append(port);
      return;
    }
    if (!repeated) field.clear();
    const auto same = std::find_if(field.begin(), field.end(), [&](const HostPort& other) {
      return address->port != 0 && overlap(*address, other);
    });
    if (same != field.end()) {
      problem =
          address_text(*address) +
          (*same == *address ? " is listed twice" : " and " + address_text(*same) + " above it include one another");
    } else if (field.size() == kMaxListens) {
      problem = at_most(kMaxListens, "addresses");
    } else {
      field.push_back(std::move(*address));
    }
  }

  void to_access(std::string& path) {
    if (text != "off" && text != "stderr" && text.find('/') == std::string_view::npos) return refuse();
    if (text.size() > kMaxPathBytes) problem = "expected a path of at most " + std::to_string(kMaxPathBytes) + " bytes";
    path = text;
    if (!problem.empty() || !env.append_problem || text == "off" || text == "stderr") return;
    const int error = env.append_problem(path);
    if (error == 0) return;
    problem = "cannot write this file: " + std::generic_category().message(error);
    if (error == ENOENT) problem += ": create its directory";
    if (error == EACCES) problem += ": the user of this process must own it, or its directory";
  }

  // No problem of these three quotes the text, but a variable's plain name: it may be a key, pasted where its variable
  // or file belongs.
  void to_key_of_variable(std::string& backend_key) {
    const bool is_name = !is_digit(text.front()) && consists_of(text, "_");
    problem = is_name ? read_key_variable(env, text, backend_key) : row.expectation();
  }
  void to_key_of_file(std::string& backend_key) { problem = read_key_file(env, text, backend_key); }
  void to(std::vector<ApiKey>& keys) {
    std::string lines;
    problem = read_text(env, text, lines);
    if (problem.empty()) read_client_keys(lines, std::string(text), file_errors, keys);
  }

  // Reads a file of PEM texts.
  void to(PemFile& file) {
    file.path = text;
    file.line = line;
    problem = read_text(env, text, file.text);
    if (problem.empty() && file.text.find("-----BEGIN ") == std::string::npos) {
      problem = "expected PEM texts in this file (-----BEGIN …-----)";
    }
    file.has_private_key = file.text.find("PRIVATE KEY-----") != std::string::npos;
  }
  void to(std::vector<TlsCertificate>& certificates) {
    if (certificates.size() == kMaxCertificates) problem = at_most(kMaxCertificates, "certificates");
    if (problem.empty()) to(certificates.emplace_back().chain);
  }
  void to_key(std::vector<TlsCertificate>& certificates) {
    if (certificates.empty()) {
      problem = "expected a tls_certificate above it, to which it belongs";
    } else if (!certificates.back().key.path.empty()) {
      problem = "the tls_certificate above it has a key already";
    } else {
      to(certificates.back().key);
    }
  }
  void to_ca(PemFile& file) {
    if (text != "system") to(file);
  }
  void to_host_name(std::string& name) {
    if (!is_host_name(text) && !numeric_address(text, AF_INET) && !numeric_address(text, AF_INET6)) return refuse();
    name = text;
  }

  void to_backend_name(std::string& name) { name = text == "no" ? "" : text; }
  void to_headers(std::vector<std::string>& names) { problem = read_affinity_headers(text, names); }
  void to_collector(TraceSettings& trace) { problem = read_collector(text, trace); }
  void to_origins(std::vector<std::string>& origins) { problem = read_origins(text, origins); }

  void to(BackendSettings& backend) { problem = parse_url(text, backend); }
  void to(std::vector<std::string>& models) { problem = read_models(text, models); }
  void to(Capability& capability) { problem = read_capability(text, capability); }
  void to_apis(Apis& apis) { problem = read_apis(text, apis); }
  void to(std::vector<ContextLength>& lengths) { problem = read_context_lengths(text, lengths); }
  void to(std::vector<NamePair>& aliases) {
    if (!is_model_name(text)) problem = expected_model_name(text);
    aliases.emplace_back(key, text);
  }
  void to(Fallbacks& fallbacks) {
    auto& models = fallbacks.emplace_back(key, std::vector<std::string>()).second;
    problem = read_models(text, models);
    if (std::find(models.begin(), models.end(), key) != models.end()) problem = "a model cannot fall back to itself";
  }
};

// ---- the table

using V = Value;

constexpr std::string_view kListenText = "a numeric address:port, [v6]:port, *:port or localhost:port";
constexpr std::string_view kPemText = "the path of a PEM file";
constexpr std::string_view kAffinityHeaders =
    "x-claude-code-session-id, session-id, session_id, x-session-affinity, x-session-id, x-opencode-session, "
    "x-amp-thread-id, x-openwebui-chat-id, x-conversation-id";
constexpr std::string_view kCapabilityText = "a comma-separated list of models, *, all or none";

inline constexpr std::array kConfigKeys = std::to_array<ConfigKey>({
    {"server", "listen", kListen, "127.0.0.1:8000", kListenText, [](V& v) { v.to(v.s.server.listen); }},
    {"server", "threads", kNumber, "0", "0 to 256", [](V& v) { v.to(v.s.server.threads); }},
    {"server", "max_connections", kNumber, "10000", "1 to 1000000", [](V& v) { v.to(v.s.server.max_connections); }},
    {"server", "max_body", kSize, "64M", "1k to 1G", [](V& v) { v.to(v.s.server.max_body_bytes); }},
    {"server", "body_memory", kSize, "256M", "1k to 1024G", [](V& v) { v.to(v.s.server.body_memory_bytes); }},
    {"server", "max_header", kSize, "16k", "1k to 64k", [](V& v) { v.to(v.s.server.max_header_bytes); }},
    {"server", "max_fields", kNumber, "128", "16 to 256", [](V& v) { v.to(v.s.server.max_fields); }},
    {"server", "max_pending", kNumber, "0", "0 to 1000000", [](V& v) { v.to(v.s.server.max_pending); }},
    {"server", "header_timeout", kDuration, "10s", "1ms to 24h", [](V& v) { v.to(v.s.server.header_timeout_ns); }},
    {"server", "body_timeout", kDuration, "60s", "1ms to 24h", [](V& v) { v.to(v.s.server.body_timeout_ns); }},
    {"server", "idle_timeout", kDuration, "75s", "1ms to 24h", [](V& v) { v.to(v.s.server.idle_timeout_ns); }},
    {"server", "write_timeout", kDuration, "60s", "1ms to 24h", [](V& v) { v.to(v.s.server.write_timeout_ns); }},
    {"server", "drain_timeout", kDuration, "600s", "1ms to 24h", [](V& v) { v.to(v.s.server.drain_timeout_ns); }},
    {"server", "tls_listen", kListen, "", kListenText, [](V& v) { v.to(v.s.server.tls_listen); }},
    {"server", "tls_certificate", kTexts, "", kPemText, [](V& v) { v.to(v.s.server.tls_certificates); }},
    {"server", "tls_key", kTexts, "", kPemText, [](V& v) { v.to_key(v.s.server.tls_certificates); }},
    {"server", "tls_min_version", kChoice, "1.2", "1.2, 1.3", [](V& v) { v.to(v.s.server.tls_min_version); }},
    {"server", "tls_client_ca", kText, "", kPemText, [](V& v) { v.to(v.s.server.tls_client_ca); }},
    {"server", "metrics_listen", kListen, "", kListenText, [](V& v) { v.to(v.s.server.metrics_listen); }},
    {"server", "api_keys_file", kText, "", "the path of a file", [](V& v) { v.to(v.s.server.api_keys); }},
    {"server", "ollama_admin", kText, "no", "no, or the name of a backend",
     [](V& v) { v.to_backend_name(v.s.server.ollama_admin); }},
    {"server", "cors_origins", kText, "", "* or a comma-separated list of origins like https://app.example",
     [](V& v) { v.to_origins(v.s.server.cors_origins); }},

    {"upstream", "connect_timeout", kDuration, "2s", "1ms to 24h", [](V& v) { v.to(v.s.upstream.connect_timeout_ns); }},
    {"upstream", "first_byte_timeout", kDuration, "300s", "1ms to 24h",
     [](V& v) { v.to(v.s.upstream.first_byte_timeout_ns); }},
    {"upstream", "stall_timeout", kDuration, "120s", "1ms to 24h", [](V& v) { v.to(v.s.upstream.stall_timeout_ns); }},
    {"upstream", "head_delay", kDuration, "10s", "0, or 1ms to 24h", [](V& v) { v.to(v.s.upstream.head_delay_ns); }},
    {"upstream", "request_timeout", kDuration, "0", "0, or 1ms to 24h",
     [](V& v) { v.to(v.s.upstream.request_timeout_ns); }},
    {"upstream", "idle_connections", kNumberOrAuto, "auto", "auto, or 0 to 10000",
     [](V& v) { v.to(v.s.upstream.idle_connections); }},
    {"upstream", "idle_timeout", kDuration, "60s", "1ms to 24h", [](V& v) { v.to(v.s.upstream.idle_timeout_ns); }},
    {"upstream", "resend", kChoice, "stale", "stale, never", [](V& v) { v.to(v.s.upstream.resend); }},

    {"health", "enabled", kYesNo, "yes", "yes or no", [](V& v) { v.to(v.s.health.enabled); }},
    {"health", "interval", kDuration, "30s", "1ms to 24h", [](V& v) { v.to(v.s.health.interval_ns); }},
    {"health", "timeout", kDuration, "5s", "1ms to 24h", [](V& v) { v.to(v.s.health.timeout_ns); }},
    {"health", "failures", kNumber, "3", "1 to 100", [](V& v) { v.to(v.s.health.failures); }},
    {"health", "recoveries", kNumber, "2", "1 to 100", [](V& v) { v.to(v.s.health.recoveries); }},
    {"health", "eject_after", kNumber, "3", "1 to 1000", [](V& v) { v.to(v.s.health.eject_after); }},
    {"health", "eject_time", kDuration, "5s", "1ms to 24h", [](V& v) { v.to(v.s.health.eject_time_ns); }},

    {"routing", "strategy", kChoice, "smart", "smart, round_robin, priority, random, least_pending",
     [](V& v) { v.to(v.s.routing.strategy); }},
    {"routing", "retries", kNumber, "2", "0 to 10", [](V& v) { v.to(v.s.routing.retries); }},
    {"routing", "weight_priority", kNumber, "50", "0 to 100", [](V& v) { v.to(v.s.routing.weight_priority); }},
    {"routing", "weight_load", kNumber, "30", "0 to 100", [](V& v) { v.to(v.s.routing.weight_load); }},
    {"routing", "weight_latency", kNumber, "20", "0 to 100", [](V& v) { v.to(v.s.routing.weight_latency); }},
    {"routing", "affinity", kChoice, "none", "none, session, prefix, session_prefix",
     [](V& v) { v.to(v.s.routing.affinity); }},
    {"routing", "affinity_headers", kText, kAffinityHeaders, "a comma-separated list of header fields, or none",
     [](V& v) { v.to_headers(v.s.routing.affinity_headers); }},
    {"routing", "affinity_slack", kPercent, "25%", "0% to 1000%", [](V& v) { v.to(v.s.routing.affinity_slack); }},

    {"queue", "size", kNumber, "0", "0 to 1000000", [](V& v) { v.to(v.s.queue.size); }},
    {"queue", "timeout", kDuration, "30s", "1ms to 24h", [](V& v) { v.to(v.s.queue.timeout_ns); }},

    {"keys", "weight", kNumber, "1", "1 to 1000", [](V& v) { v.to(v.s.keys.defaults.weight); }},
    {"keys", "priority", kNumber, "50", "0 to 100", [](V& v) { v.to(v.s.keys.defaults.priority); }},
    {"keys", "max_pending", kNumber, "0", "0 to 1000000", [](V& v) { v.to(v.s.keys.defaults.max_pending); }},
    {"keys", "rpm", kPerMinute, "0", "0 to 1000000000", [](V& v) { v.to(v.s.keys.defaults.rpm); }},
    {"keys", "tpm", kPerMinute, "0", "0 to 1000000000", [](V& v) { v.to(v.s.keys.defaults.tpm); }},
    {"keys", "admin", kNumber, "1", "0 to 1", [](V& v) { v.to(v.s.keys.defaults.admin); }},
    {"keys", "fair_by", kChoice, "key", "key, address", [](V& v) { v.to(v.s.keys.fair_by); }},

    {"fallbacks", "MODEL", kFreeKey, "", "a comma-separated list of models", [](V& v) { v.to(v.s.fallbacks); }},

    {"aliases", "NAME", kFreeKey, "", "a model", [](V& v) { v.to(v.s.aliases); }},

    {"metrics", "enabled", kYesNo, "yes", "yes or no", [](V& v) { v.to(v.s.metrics.enabled); }},
    {"metrics", "labels", kChoice, "sanitize", "sanitize, raw", [](V& v) { v.to(v.s.metrics.labels); }},
    {"metrics", "keys", kNumber, "200", "0 to 10000", [](V& v) { v.to(v.s.metrics.keys); }},
    {"metrics", "openmetrics", kYesNo, "no", "yes or no", [](V& v) { v.to(v.s.metrics.openmetrics); }},

    {"slo", "ttft", kDuration, "0", "0, or 1ms to 24h", [](V& v) { v.to(v.s.slo.ttft_ns); }},
    {"slo", "tpot", kDuration, "0", "0, or 1ms to 24h", [](V& v) { v.to(v.s.slo.tpot_ns); }},

    {"trace", "endpoint", kText, "", kCollectorText, [](V& v) { v.to_collector(v.s.trace); }},
    {"trace", "trace_ratio", kShare, "1", "0 to 1", [](V& v) { v.to(v.s.trace.ratio_ppm); }},

    {"log", "level", kChoice, "info", "error, warning, info, debug", [](V& v) { v.to(v.s.log.level); }},
    {"log", "format", kChoice, "text", "text, json", [](V& v) { v.to(v.s.log.format); }},
    {"log", "access", kText, "off", "off, stderr or a path with a `/` in it",
     [](V& v) { v.to_access(v.s.log.access); }},

    {"backend", "url", kText, "", kUrlText, [](V& v) { v.to(v.backend()); }},
    {"backend", "tls_ca", kText, "system", "system, or the path of a PEM file",
     [](V& v) { v.to_ca(v.backend().tls.ca_file); }},
    {"backend", "tls_verify", kYesNo, "yes", "yes or no", [](V& v) { v.to(v.backend().tls.verify); }},
    {"backend", "tls_name", kText, "", "the name or address in the backend's certificate",
     [](V& v) { v.to_host_name(v.backend().tls.name); }},
    {"backend", "tls_certificate", kText, "", kPemText, [](V& v) { v.to(v.backend().tls.certificate.chain); }},
    {"backend", "tls_key", kText, "", kPemText, [](V& v) { v.to(v.backend().tls.certificate.key); }},
    {"backend", "type", kChoice, "generic", kBackendKindNames, [](V& v) { v.to(v.backend().kind); }},
    {"backend", "priority", kNumber, "50", "0 to 100", [](V& v) { v.to(v.backend().priority); }},
    {"backend", "models", kText, "", "a comma-separated list of models", [](V& v) { v.to(v.backend().models); }},
    {"backend", "api_key_env", kText, "", "the name of an environment variable (letters, digits, _)",
     [](V& v) { v.to_key_of_variable(v.backend().api_key); }},
    {"backend", "api_key_file", kText, "", "the path of a file", [](V& v) { v.to_key_of_file(v.backend().api_key); }},
    {"backend", "max_pending", kNumber, "0", "0 to 1000000", [](V& v) { v.to(v.backend().max_pending); }},
    {"backend", "stream_usage", kChoice, "by_kind", "by_kind, ask, as_is",
     [](V& v) { v.to(v.backend().stream_usage); }},
    {"backend", "apis", kText, "", kApisText, [](V& v) { v.to_apis(v.backend().apis); }},
    {"backend", "vision", kText, "", kCapabilityText, [](V& v) { v.to(v.backend().vision); }},
    {"backend", "tools", kText, "", kCapabilityText, [](V& v) { v.to(v.backend().tools); }},
    {"backend", "json_mode", kText, "", kCapabilityText, [](V& v) { v.to(v.backend().json_mode); }},
    {"backend", "context_length", kText, "", kContextText, [](V& v) { v.to(v.backend().context_length); }},
    {"backend", "token_delay", kDuration, "20ms", "0, or 1ms to 24h", [](V& v) { v.to(v.backend().token_delay_ns); }},
});

static_assert(std::all_of(kConfigKeys.begin(), kConfigKeys.end(),
                          [](const ConfigKey& row) {
                            return row.default_text.empty() || row.kind.parse(row.default_text, row.range);
                          }),
              "a default outside of its range, or a range that does not parse");
static_assert(std::all_of(kBackendKinds.begin(), kBackendKinds.end(), [](const BackendKindRow& row) {
  return parse_choice(row.name, kBackendKindNames) == static_cast<std::uint64_t>(row.kind);
}));

inline const ConfigKey* find_key(std::string_view section, std::string_view key) {
  for (const ConfigKey& row : kConfigKeys) {
    if (row.section == section && (row.key == key || row.kind.free_key)) return &row;
  }
  return nullptr;
}

}  // namespace nexus::config
