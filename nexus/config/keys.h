// keys.h
// Owns:     the table of every key of nexus.conf: its section, kind, default, range, meaning, and where it is stored.
// Promises: one row a key, and the row is all there is to say about it: ranges are checked against the very text
//           that the manual shows (static_assert below).
// Leaves:   how a value is written to values.h; lines, repeats and what two keys must agree on to parser.h.
// Threads:  any; the table is constant.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "nexus/config/settings.h"
#include "nexus/config/values.h"

namespace nexus::config {

enum class ValueKind : std::uint8_t {
  number,
  size,
  duration,
  yes_no,
  choice,  // `range` lists the words, in the order of the enum
  listen,  // the one kind that may be repeated
  access,  // off, stderr or a path
  path,
  variable,  // the name of an environment variable
  url,
  models,
  capability,
  context_length,
  free_key,  // the key is a name of the user's own
};

// One [backend NAME] while its lines are read: its settings, and where its key is to be had.
struct BackendDraft {
  BackendSettings settings;
  std::string api_key_env;
  std::string api_key_file;
};

// Where a row stores its value.
struct ConfigTarget {
  Settings& settings;
  BackendDraft* backend;  // set in [backend NAME] only
  bool repeated = false;  // this section had this key before
};

// A row. An empty default means that there is none.
struct ConfigKey {
  std::string_view section;
  std::string_view key;
  ValueKind kind;
  std::string_view default_text;
  std::string_view range;  // what may stand behind the `=`
  std::string_view meaning;
  // Stores the value, or says what is wrong with it (empty: stored). None in sections of free keys.
  std::string (*store)(ConfigTarget&, const ConfigKey&, std::string_view value);
};

namespace detail {

struct NumberRange {
  bool or_zero = false;
  std::uint64_t least = 0;
  std::uint64_t most = 0;
  constexpr bool contains(std::uint64_t n) const { return (or_zero && n == 0) || (n >= least && n <= most); }
};

constexpr std::optional<std::uint64_t> parse_by_kind(ValueKind kind, std::string_view text) {
  switch (kind) {
    case ValueKind::number: return parse_number(text);
    case ValueKind::size: return parse_size(text);
    case ValueKind::duration: return parse_duration(text);
    case ValueKind::yes_no: return parse_yes_no(text);
    default: return std::nullopt;
  }
}

// Reads `LEAST to MOST` or `0, or LEAST to MOST`, in the units of the kind.
constexpr std::optional<NumberRange> parse_range(ValueKind kind, std::string_view text) {
  constexpr std::string_view zero = "0, or ", to = " to ";
  NumberRange range;
  range.or_zero = text.substr(0, zero.size()) == zero;
  if (range.or_zero) text.remove_prefix(zero.size());
  const std::size_t middle = text.find(to);
  if (middle == std::string_view::npos) return std::nullopt;
  const auto least = parse_by_kind(kind, text.substr(0, middle));
  const auto most = parse_by_kind(kind, text.substr(middle + to.size()));
  if (!least || !most || *least >= *most) return std::nullopt;
  range.least = *least;
  range.most = *most;
  return range;
}

// The place of `word` in a list like `text, json`.
constexpr std::optional<std::uint64_t> parse_choice(std::string_view choices, std::string_view word) {
  for (std::uint64_t place = 0;; ++place) {
    const std::size_t comma = choices.find(',');
    if (trim(choices.substr(0, comma)) == word) return place;
    if (comma == std::string_view::npos) return std::nullopt;
    choices.remove_prefix(comma + 1);
  }
}

constexpr std::optional<std::uint64_t> parse_scalar(const ConfigKey& row, std::string_view text) {
  if (row.kind == ValueKind::choice) return parse_choice(row.range, text);
  const auto number = parse_by_kind(row.kind, text);
  if (row.kind == ValueKind::yes_no || !number) return number;
  const auto range = parse_range(row.kind, row.range);
  return range && range->contains(*number) ? number : std::nullopt;
}

inline std::string expectation(const ConfigKey& row) {
  const std::string range(row.range);
  switch (row.kind) {
    case ValueKind::number: return "expected a number, " + range;
    case ValueKind::size: return "expected a size (bytes, or with k, M, G), " + range;
    case ValueKind::duration: return "expected a duration (with ms, s, m, h), " + range;
    case ValueKind::choice: return "expected one of " + range;
    default: return "expected " + range;
  }
}

inline std::string expected_not(const ConfigKey& row, std::string_view value) {
  return expectation(row) + ", not " + in_quotes(value);
}

// Places: how a row names the field that it fills.
template <auto Section, auto Field>
struct Of {
  static auto& field(ConfigTarget& target) { return target.settings.*Section.*Field; }
};
template <auto Field>
using Server = Of<&Settings::server, Field>;
template <auto Field>
using Upstream = Of<&Settings::upstream, Field>;
template <auto Field>
using Health = Of<&Settings::health, Field>;
template <auto Field>
using Routing = Of<&Settings::routing, Field>;
template <auto Field>
using Queue = Of<&Settings::queue, Field>;
template <auto Field>
using Metrics = Of<&Settings::metrics, Field>;
template <auto Field>
using Log = Of<&Settings::log, Field>;
template <auto Field>
struct Backend {
  static auto& field(ConfigTarget& target) { return target.backend->settings.*Field; }
};
template <auto Field>
struct Draft {
  static auto& field(ConfigTarget& target) { return target.backend->*Field; }
};

template <class Place>
std::string scalar(ConfigTarget& target, const ConfigKey& row, std::string_view value) {
  const auto number = parse_scalar(row, value);
  if (!number) return expected_not(row, value);
  auto& field = Place::field(target);
  field = static_cast<std::remove_reference_t<decltype(field)>>(*number);
  return {};
}

// The first address replaces the default, the others join it.
template <class Place>
std::string listens(ConfigTarget& target, const ConfigKey& row, std::string_view value) {
  auto address = parse_listen(value);
  if (!address) return expected_not(row, value);
  auto& field = Place::field(target);
  if (!target.repeated) field.clear();
  const bool same = std::find(field.begin(), field.end(), *address) != field.end();
  if (same && address->port != 0) return address_text(*address) + " is listed twice";
  if (field.size() == kMaxListens) return "expected at most " + std::to_string(kMaxListens) + " addresses";
  field.push_back(std::move(*address));
  return {};
}

// No message here repeats the value: a key that was put where its file's path belongs must not reach a log.
template <class Place>
std::string path(ConfigTarget& target, const ConfigKey&, std::string_view value) {
  if (value.size() > kMaxPathBytes) return "expected a path of at most " + std::to_string(kMaxPathBytes) + " bytes";
  Place::field(target) = value;
  return {};
}

template <class Place>
std::string access_log(ConfigTarget& target, const ConfigKey& row, std::string_view value) {
  if (value != "off" && value != "stderr" && value.find('/') == std::string_view::npos) return expected_not(row, value);
  return path<Place>(target, row, value);
}

template <class Place>
std::string variable(ConfigTarget& target, const ConfigKey& row, std::string_view value) {
  const auto allowed = [](char c) { return is_alpha(c) || is_digit(c) || c == '_'; };
  if (is_digit(value.front()) || !std::all_of(value.begin(), value.end(), allowed)) return expectation(row);
  Place::field(target) = value;
  return {};
}

inline std::string backend_url(ConfigTarget& target, const ConfigKey&, std::string_view value) {
  auto url = parse_url(value);
  if (!url.ok()) return url.problem;
  target.backend->settings.address = std::move(url.value.address);
  target.backend->settings.base_path = std::move(url.value.base_path);
  return {};
}

inline std::string backend_models(ConfigTarget& target, const ConfigKey&, std::string_view value) {
  auto models = parse_models(value);
  if (!models.ok()) return models.problem;
  target.backend->settings.models = std::move(models.value);
  return {};
}

template <class Place>
std::string capability(ConfigTarget& target, const ConfigKey&, std::string_view value) {
  Capability& field = Place::field(target);
  if (value == "*" || value == "all") {
    field = {true, {"*"}};
    return {};
  }
  if (value == "none") {
    field = {true, {}};
    return {};
  }
  auto models = parse_models(value);
  if (!models.ok()) return models.problem;
  for (const std::string& model : models.value) {
    if (model == "all" || model == "none") return in_quotes(model) + " must stand alone";
  }
  field = {true, std::move(models.value)};
  return {};
}

// One number for every model, or `model number` pairs; a pair for `*` is the number of the models not named.
inline std::string context_lengths(ConfigTarget& target, const ConfigKey& row, std::string_view value) {
  const auto items = split_list(value);
  if (!items.ok()) return items.problem;
  constexpr NumberRange range{false, 1, 1u << 30};
  std::vector<ContextLength> lengths;
  std::unordered_set<std::string_view> seen;
  for (std::string_view item : items.value) {
    const std::size_t blank = item.find_last_of(" \t");
    const bool alone = blank == std::string_view::npos && items.value.size() == 1;
    if (blank == std::string_view::npos && !alone) return expected_not(row, item);
    const std::string_view model = alone ? "*" : trim(item.substr(0, blank));
    const auto tokens = parse_size(alone ? item : item.substr(blank + 1));
    if (!tokens || !range.contains(*tokens)) return expected_not(row, item);
    if (model != "*" && !is_model_name(model)) return expected_model_name() + ", not " + in_quotes(model);
    if (!seen.insert(model).second) return in_quotes(model) + " is listed twice";
    lengths.push_back({std::string(model), *tokens});
  }
  target.backend->settings.context_length = std::move(lengths);
  return {};
}

using K = ValueKind;
using ServerF = ServerSettings;
using UpstreamF = UpstreamSettings;
using HealthF = HealthSettings;
using RoutingF = RoutingSettings;
using BackendF = BackendSettings;

// clang-format off
inline constexpr std::array kConfigKeys = std::to_array<ConfigKey>({
  {"server", "listen", K::listen, "127.0.0.1:8000", "a numeric address:port, [v6]:port, *:port or localhost:port", "where clients connect; may be repeated", listens<Server<&ServerF::listen>>},
  {"server", "threads", K::number, "0", "0 to 256", "worker threads; 0 is one per core", scalar<Server<&ServerF::threads>>},
  {"server", "max_connections", K::number, "10000", "1 to 1000000", "client connections at once, over all threads", scalar<Server<&ServerF::max_connections>>},
  {"server", "max_body", K::size, "64M", "1k to 1G", "the largest request body; a larger one is answered 413", scalar<Server<&ServerF::max_body_bytes>>},
  {"server", "body_memory", K::size, "256M", "1k to 1024G", "all buffered request bodies together; over it 503", scalar<Server<&ServerF::body_memory_bytes>>},
  {"server", "max_header", K::size, "16k", "1k to 64k", "the largest request head; a larger one is answered 431", scalar<Server<&ServerF::max_header_bytes>>},
  {"server", "max_pending", K::number, "0", "0 to 1000000", "requests in flight over all backends; 0 is no limit", scalar<Server<&ServerF::max_pending>>},
  {"server", "header_timeout", K::duration, "10s", "1ms to 24h", "from a request's first byte to the end of its head", scalar<Server<&ServerF::header_timeout_ns>>},
  {"server", "body_timeout", K::duration, "60s", "1ms to 24h", "from the end of a request's head to the end of its body", scalar<Server<&ServerF::body_timeout_ns>>},
  {"server", "idle_timeout", K::duration, "75s", "1ms to 24h", "how long a client's connection is kept between requests", scalar<Server<&ServerF::idle_timeout_ns>>},
  {"server", "write_timeout", K::duration, "60s", "1ms to 24h", "a client that takes no byte for so long is cut", scalar<Server<&ServerF::write_timeout_ns>>},
  {"server", "drain_timeout", K::duration, "600s", "1ms to 24h", "how long requests in flight may take to finish on shutdown", scalar<Server<&ServerF::drain_timeout_ns>>},
  {"server", "metrics_listen", K::listen, "", "a numeric address:port, [v6]:port, *:port or localhost:port", "where /metrics, /v1/stats and /health stand, and then only there; may be repeated", listens<Server<&ServerF::metrics_listen>>},
  {"server", "api_keys_file", K::path, "", "the path of a file", "clients' keys, `name key` a line; then a valid one is demanded", path<Server<&ServerF::api_keys_file>>},

  {"upstream", "connect_timeout", K::duration, "2s", "1ms to 24h", "to connect to a backend", scalar<Upstream<&UpstreamF::connect_timeout_ns>>},
  {"upstream", "first_byte_timeout", K::duration, "300s", "1ms to 24h", "from the request sent to the first byte of the response", scalar<Upstream<&UpstreamF::first_byte_timeout_ns>>},
  {"upstream", "stall_timeout", K::duration, "120s", "1ms to 24h", "between two pieces of a response", scalar<Upstream<&UpstreamF::stall_timeout_ns>>},
  {"upstream", "request_timeout", K::duration, "0", "0, or 1ms to 24h", "for a whole request; 0 is no limit", scalar<Upstream<&UpstreamF::request_timeout_ns>>},
  {"upstream", "idle_connections", K::number, "64", "0 to 10000", "idle connections kept, per backend and thread", scalar<Upstream<&UpstreamF::idle_connections>>},
  {"upstream", "idle_timeout", K::duration, "60s", "1ms to 24h", "how long an idle connection to a backend is kept", scalar<Upstream<&UpstreamF::idle_timeout_ns>>},

  {"health", "enabled", K::yes_no, "yes", "yes or no", "whether backends are checked", scalar<Health<&HealthF::enabled>>},
  {"health", "interval", K::duration, "30s", "1ms to 24h", "between two checks of a backend", scalar<Health<&HealthF::interval_ns>>},
  {"health", "timeout", K::duration, "5s", "1ms to 24h", "for a whole check", scalar<Health<&HealthF::timeout_ns>>},
  {"health", "failures", K::number, "3", "1 to 100", "failed checks in a row that make a backend unhealthy", scalar<Health<&HealthF::failures>>},
  {"health", "recoveries", K::number, "2", "1 to 100", "good checks in a row that make it healthy again", scalar<Health<&HealthF::recoveries>>},
  {"health", "eject_after", K::number, "3", "1 to 1000", "failed requests in a row that eject a backend", scalar<Health<&HealthF::eject_after>>},
  {"health", "eject_time", K::duration, "5s", "1ms to 24h", "the first ejection's length; it doubles up to 60s", scalar<Health<&HealthF::eject_time_ns>>},

  {"routing", "strategy", K::choice, "smart", "smart, round_robin, priority, random, least_pending", "how a backend is chosen among those that can serve", scalar<Routing<&RoutingF::strategy>>},
  {"routing", "retries", K::number, "2", "0 to 10", "other backends tried after the first failed", scalar<Routing<&RoutingF::retries>>},
  {"routing", "weight_priority", K::number, "50", "0 to 100", "the weight of priority in `smart`", scalar<Routing<&RoutingF::weight_priority>>},
  {"routing", "weight_load", K::number, "30", "0 to 100", "the weight of requests in flight in `smart`", scalar<Routing<&RoutingF::weight_load>>},
  {"routing", "weight_latency", K::number, "20", "0 to 100", "the weight of latency in `smart`", scalar<Routing<&RoutingF::weight_latency>>},

  {"queue", "size", K::number, "0", "0 to 1000000", "requests that may wait for a full backend; 0 is no queue", scalar<Queue<&QueueSettings::size>>},
  {"queue", "timeout", K::duration, "30s", "1ms to 24h", "the longest wait in the queue", scalar<Queue<&QueueSettings::timeout_ns>>},

  {"fallbacks", "MODEL", K::free_key, "", "a comma-separated list of models", "models to try, in order, where none can serve MODEL", nullptr},
  {"aliases", "NAME", K::free_key, "", "a model", "another name for a model; up to 3 aliases in a chain", nullptr},

  {"metrics", "enabled", K::yes_no, "yes", "yes or no", "whether /metrics and /v1/stats answer", scalar<Metrics<&MetricsSettings::enabled>>},
  {"metrics", "labels", K::choice, "sanitize", "sanitize, raw", "how names become label values", scalar<Metrics<&MetricsSettings::labels>>},

  {"log", "level", K::choice, "info", "error, warning, info, debug", "the least important lines that are written", scalar<Log<&LogSettings::level>>},
  {"log", "format", K::choice, "text", "text, json", "how a line is written", scalar<Log<&LogSettings::format>>},
  {"log", "access", K::access, "off", "off, stderr or a path with a `/` in it", "where each request's line goes", access_log<Log<&LogSettings::access>>},

  {"backend", "url", K::url, "", "http://host[:port][/prefix]", "where it is; every type but echo needs it", backend_url},
  {"backend", "type", K::choice, "generic", "ollama, vllm, llamacpp, lmstudio, openai, exo, generic, echo", "what it is; echo is Nexus's own small model", scalar<Backend<&BackendF::kind>>},
  {"backend", "priority", K::number, "50", "0 to 100", "lower is preferred", scalar<Backend<&BackendF::priority>>},
  {"backend", "models", K::models, "", "a comma-separated list of models", "its models; without it they are discovered", backend_models},
  {"backend", "api_key_env", K::variable, "", "the name of an environment variable (letters, digits, _)", "the variable that holds its key", variable<Draft<&BackendDraft::api_key_env>>},
  {"backend", "api_key_file", K::path, "", "the path of a file", "the file whose first line is its key", path<Draft<&BackendDraft::api_key_file>>},
  {"backend", "max_pending", K::number, "0", "0 to 1000000", "requests in flight on it, over all threads; 0 is no cap", scalar<Backend<&BackendF::max_pending>>},
  {"backend", "stream_usage", K::choice, "by_kind", "by_kind, ask, as_is", "whether streams are asked for token counts; by_kind is ask, but as_is for generic", scalar<Backend<&BackendF::stream_usage>>},
  {"backend", "vision", K::capability, "", "a comma-separated list of models, *, all or none", "models that read images; without it, all", capability<Backend<&BackendF::vision>>},
  {"backend", "tools", K::capability, "", "a comma-separated list of models, *, all or none", "models that call tools; without it, all", capability<Backend<&BackendF::tools>>},
  {"backend", "json_mode", K::capability, "", "a comma-separated list of models, *, all or none", "models with JSON mode; without it, all", capability<Backend<&BackendF::json_mode>>},
  {"backend", "context_length", K::context_length, "", "a number of tokens, 1 to 1G, or a comma-separated list of `model number`", "the longest context; k is 1024", context_lengths},
  {"backend", "token_delay", K::duration, "20ms", "0, or 1ms to 24h", "echo only: the time between two tokens", scalar<Backend<&BackendF::token_delay_ns>>},
});
// clang-format on

constexpr bool every_row_is_sound() {
  for (const ConfigKey& row : kConfigKeys) {
    const bool counted = row.kind == K::number || row.kind == K::size || row.kind == K::duration;
    if (counted && !parse_range(row.kind, row.range)) return false;
    if ((counted || row.kind == K::yes_no || row.kind == K::choice) && !parse_scalar(row, row.default_text))
      return false;
  }
  return true;
}
static_assert(every_row_is_sound(), "a range that does not parse, or a default outside of it");

}  // namespace detail

inline const ConfigKey* find_key(std::string_view section, std::string_view key) {
  for (const ConfigKey& row : detail::kConfigKeys) {
    if (row.section == section && row.key == key && row.kind != ValueKind::free_key) return &row;
  }
  return nullptr;
}

}  // namespace nexus::config

namespace nexus {

using config::ConfigKey;

// Every key, in the order of the manual.
constexpr std::span<const ConfigKey> config_keys() { return config::detail::kConfigKeys; }

}  // namespace nexus
