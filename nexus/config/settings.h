// settings.h
// Owns:     what a configuration can say: one struct a section, each field with its default and unit; its limits;
//           the table of backend types (the names in nexus.conf, where each answers, what each understands).
// Promises: plain values; a default-constructed Settings is valid and listens on 127.0.0.1:8000 with no backend. A
//           new type takes one value of the enum and one row and one name here; all else reads the table.
// Leaves:   reading nexus.conf, ranges and error messages to parser.h; meaning to the modules that use a field;
//           asking a backend to prober.h; the shape of its model list, which model_list.h recognises by itself.
// Threads:  immutable once parser.h returned it; shared as std::shared_ptr<const Settings>.
// Tested by: tests/config_test.cpp, tests/prober_test.cpp, tests/registry_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/base/text.h"

namespace nexus {

// What a backend may speak: an API is a group of endpoints (api/endpoints.h) that a server has all of or none.
enum class Api : std::uint8_t {
  chat,
  completions,
  embeddings,
  responses,
  messages,
  rerank,
  score,
  tokenize,
  moderations,
  speech,
  transcriptions,
  images,
  llamacpp,  // its own completion, infill and templates
  ollama,
};

// Their names in nexus.conf, in the order of the enum: keys.h checks them.
constexpr std::string_view kApiNames =
    "chat, completions, embeddings, responses, messages, rerank, score, tokenize, moderations, speech, transcriptions, "
    "images, llamacpp, ollama";
inline constexpr std::size_t kApis = static_cast<std::size_t>(Api::ollama) + 1;

constexpr std::string_view name_of(Api api) {
  std::string_view names = kApiNames;
  for (auto i = static_cast<std::size_t>(api); i > 0; --i) next_list_element(names);
  return next_list_element(names);
}

// A set of APIs: bit_of() each.
using Apis = std::uint32_t;
constexpr Apis bit_of(Api api) { return Apis{1} << static_cast<unsigned>(api); }
constexpr Apis kAllApis = (Apis{1} << kApis) - 1;

template <class... Api>
constexpr Apis apis(Api... api) {
  return (bit_of(api) | ...);
}

enum class BackendKind : std::uint8_t { ollama, vllm, llamacpp, lmstudio, openai, anthropic, exo, generic, echo };

struct BackendKindRow {
  BackendKind kind;
  std::string_view name;         // `type =` in nexus.conf
  std::string_view health_path;  // if it equals models_path, one request serves both
  std::string_view models_path;
  bool takes_stream_options;          // understands stream_options.include_usage
  Apis apis;                          // that its servers speak, in some version
  bool takes_x_api_key = false;       // the key goes there as well
  std::string_view check_lines = {};  // fields that a health check needs
};

// The names of the rows, in their order: keys.h checks them.
constexpr std::string_view kBackendKindNames =
    "ollama, vllm, llamacpp, lmstudio, openai, anthropic, exo, generic, echo";

namespace detail {
constexpr Apis kCommonApis = apis(Api::chat, Api::completions, Api::embeddings);
}

inline constexpr std::array kBackendKinds{
    BackendKindRow{BackendKind::ollama, "ollama", "/api/tags", "/api/tags", true,
                   detail::kCommonApis | apis(Api::responses, Api::messages, Api::transcriptions, Api::ollama)},
    BackendKindRow{BackendKind::vllm, "vllm", "/v1/models", "/v1/models", true,
                   detail::kCommonApis | apis(Api::responses, Api::messages, Api::rerank, Api::score, Api::tokenize,
                                              Api::transcriptions)},
    BackendKindRow{BackendKind::llamacpp, "llamacpp", "/health", "/v1/models", true,
                   detail::kCommonApis | apis(Api::responses, Api::messages, Api::rerank, Api::tokenize,
                                              Api::transcriptions, Api::llamacpp)},
    BackendKindRow{BackendKind::lmstudio, "lmstudio", "/v1/models", "/v1/models", true,
                   detail::kCommonApis | apis(Api::responses, Api::messages)},
    BackendKindRow{
        BackendKind::openai, "openai", "/v1/models", "/v1/models", true,
        detail::kCommonApis | apis(Api::responses, Api::moderations, Api::speech, Api::transcriptions, Api::images)},
    BackendKindRow{BackendKind::anthropic, "anthropic", "/v1/models?limit=1000", "/v1/models?limit=1000", true,
                   apis(Api::messages, Api::chat), true, "anthropic-version: 2023-06-01\r\n"},
    BackendKindRow{BackendKind::exo, "exo", "/v1/models", "/v1/models", true,
                   detail::kCommonApis | apis(Api::responses, Api::messages)},
    BackendKindRow{BackendKind::generic, "generic", "/v1/models", "/v1/models", false, kAllApis},
    BackendKindRow{BackendKind::echo, "echo", "/v1/models", "/v1/models", true, detail::kCommonApis},
};

constexpr const BackendKindRow& row_of(BackendKind kind) { return kBackendKinds[static_cast<std::size_t>(kind)]; }
constexpr std::string_view name_of(BackendKind kind) { return row_of(kind).name; }

static_assert(std::all_of(kBackendKinds.begin(), kBackendKinds.end(),
                          [](const BackendKindRow& row) { return &row == &row_of(row.kind); }),
              "the rows are in the order of the enum");

namespace config {

// Limits of everything but the range of a key, which is in its row in keys.h.
static_assert(kMaxLabelBytes < kMaxHostBytes && kMaxHostBytes < kMaxUrlBytes);
static_assert(kMinClientKeyBytes < kMaxClientKeyBytes);
static_assert(kMaxClientKeyBytes < 1024, "a client's key fits in a head of the smallest max_header");

}  // namespace config

struct HostPort {
  std::string host;  // an address or a name; an IPv6 address without its brackets
  std::uint16_t port = 0;
  bool operator==(const HostPort&) const = default;
};

enum class Strategy : std::uint8_t { smart, round_robin, priority, random, least_pending };
enum class Affinity : std::uint8_t { none, session, prefix, session_prefix };
enum class LabelMode : std::uint8_t { sanitize, raw };
enum class LogLevel : std::uint8_t { error, warning, info, debug };
enum class LogFormat : std::uint8_t { text, json };
enum class Resend : std::uint8_t { stale, never };
enum class StreamUsage : std::uint8_t { by_kind, ask, as_is };  // by_kind: ask, but as_is for `generic`

struct KeyOptions {
  std::uint64_t weight = 1;                      // its share of the turns where requests wait
  std::uint64_t priority = kDefaultKeyPriority;  // lower first
  std::uint64_t max_pending = 0;                 // requests at once; here and below, 0: no limit
  std::uint64_t rpm = 0;                         // requests a minute
  std::uint64_t tpm = 0;                         // tokens a minute
  std::uint64_t admin = 1;                       // 1: it may read the metrics
  bool operator==(const KeyOptions&) const = default;
};

struct ApiKey {
  std::string name;
  std::string key;
  KeyOptions options{};
  std::vector<std::string> models{};  // that it may use, `*` at the end for any rest; empty: all
  unsigned given = 0;                 // bits of the options that its line has
  bool operator==(const ApiKey&) const = default;

  // A name without a tag and that with `latest` are one model, as for Ollama.
  bool may_use(std::string_view model) const {
    return models.empty() || std::any_of(models.begin(), models.end(), [model](std::string_view allowed) {
             return allowed.ends_with('*') ? model.starts_with(allowed.substr(0, allowed.size() - 1))
                                           : without_latest(model) == without_latest(allowed);
           });
  }
  static constexpr std::string_view without_latest(std::string_view model) {
    constexpr std::string_view kLatest = ":latest";
    return model.ends_with(kLatest) ? model.substr(0, model.size() - kLatest.size()) : model;
  }
};

class TlsServer;  // net/tls_context.h
class TlsClient;

enum class TlsVersion : std::uint8_t { tls_1_2, tls_1_3 };

// A PEM file of nexus.conf.
struct PemFile {
  std::string path, text;
  int line = 0;  // where nexus.conf names it
  bool has_private_key = false;
};

struct TlsCertificate {
  PemFile chain;
  PemFile key;  // without a path: the key is in `chain`
};

struct BackendTls {
  bool on = false;  // the url is https
  PemFile ca_file;  // whom it is verified by; without a path: Settings::system_ca
  bool verify = true;
  std::string name;  // expected in its certificate; empty: the url's host
  TlsCertificate certificate;
  std::shared_ptr<const TlsClient> context;  // of net/tls_setup.h, made of the above; null without https
};

struct ServerSettings {
  std::vector<HostPort> listen{{"127.0.0.1", 8000}};
  std::uint32_t threads = 0;  // 0 = one per core
  std::uint32_t max_connections = 10'000;
  std::size_t max_body_bytes = 64u << 20;
  std::size_t body_memory_bytes = 256u << 20;  // all buffered bodies together
  std::size_t max_header_bytes = 16u << 10;    // of a request, and of a backend's response
  std::uint32_t max_fields = 128;              // of the same
  std::uint32_t max_pending = 0;               // requests in flight over all backends and threads; 0 = no limit
  Ns header_timeout_ns = 10 * kSecond;
  Ns body_timeout_ns = 60 * kSecond;
  Ns idle_timeout_ns = 75 * kSecond;
  Ns write_timeout_ns = 60 * kSecond;  // until the client accepts a byte; then it is disconnected
  Ns drain_timeout_ns = 600 * kSecond;
  std::vector<HostPort> tls_listen;
  std::vector<TlsCertificate> tls_certificates;  // the first is for clients that ask for no known name
  TlsVersion tls_min_version = TlsVersion::tls_1_2;
  PemFile tls_client_ca;                  // without a path: clients need no certificate
  std::shared_ptr<const TlsServer> tls;   // of net/tls_setup.h, made of the above; null without tls_listen
  std::vector<HostPort> metrics_listen;   // empty: the built-in pages are on `listen`
  std::vector<ApiKey> api_keys;           // of api_keys_file; empty: no key is required
  std::string ollama_admin;               // the backend that gets requests which change its models; empty: none
  std::vector<std::string> cors_origins;  // of browser pages that may use this gateway; `*` alone: any; empty: none
};

constexpr std::uint32_t kAutomatic = UINT32_MAX;

struct UpstreamSettings {
  Ns connect_timeout_ns = 2 * kSecond;
  Ns first_byte_timeout_ns = 300 * kSecond;
  Ns stall_timeout_ns = 120 * kSecond;
  Ns head_delay_ns = 10 * kSecond;  // how long a response that says nothing yet is held back; 0 = not at all
  Ns request_timeout_ns = 0;        // 0 = none
  std::uint32_t idle_connections = kAutomatic;  // kept per backend and thread; automatic: each, for idle_timeout
  Ns idle_timeout_ns = 60 * kSecond;
  Resend resend = Resend::stale;  // stale: once more, if a reused connection closed without a byte
};

struct HealthSettings {
  bool enabled = true;
  Ns interval_ns = 30 * kSecond;
  Ns timeout_ns = 5 * kSecond;
  std::uint32_t failures = 3;
  std::uint32_t recoveries = 2;
  std::uint32_t eject_after = 3;
  Ns eject_time_ns = 5 * kSecond;
};

struct RoutingSettings {
  Strategy strategy = Strategy::smart;
  std::uint32_t retries = 2;
  std::uint32_t weight_priority = 50;
  std::uint32_t weight_load = 30;
  std::uint32_t weight_latency = 20;
  Affinity affinity = Affinity::none;
  std::vector<std::string> affinity_headers{"x-claude-code-session-id", "session-id",          "session_id",
                                            "x-session-affinity",       "x-session-id",        "x-opencode-session",
                                            "x-amp-thread-id",          "x-openwebui-chat-id", "x-conversation-id"};
  std::uint32_t affinity_slack = 25;  // percent above the average load
};

struct QueueSettings {
  std::uint32_t size = 0;  // 0 = no queue
  Ns timeout_ns = 30 * kSecond;
};

enum class FairBy : std::uint8_t { key, address };

struct KeysSettings {
  FairBy fair_by = FairBy::key;  // requests without a key: all together, or by the client's address
  KeyOptions defaults;           // of keys whose line lacks an option, and of requests without a key
};

struct MetricsSettings {
  bool enabled = true;
  LabelMode labels = LabelMode::sanitize;
  std::uint32_t keys = 200;  // names of clients' keys that have series of their own
  bool openmetrics = false;  // for a scraper that prefers it
};

// The service level of streams; 0: no such level.
struct SloSettings {
  Ns ttft_ns = 0;  // time to first token
  Ns tpot_ns = 0;  // time per output token
  bool on() const { return ttft_ns > 0 || tpot_ns > 0; }
};

struct TraceSettings {
  HostPort collector;                   // takes OTLP over HTTP; without a host no spans are made
  std::string base_path;                // before /v1/traces: "" or "/prefix"
  std::uint32_t ratio_ppm = 1'000'000;  // of the requests without a traceparent that are sampled
  std::string service_name = "nexus";   // here and below: of OpenTelemetry's variables alone
  std::vector<std::pair<std::string, std::string>> attributes{};  // of the resource, besides
  std::string remark{};  // why the variables' collector is not used; empty: it is, or none is named
  bool on() const { return !collector.host.empty(); }
};

struct LogSettings {
  LogLevel level = LogLevel::info;
  LogFormat format = LogFormat::text;
  std::string access = "off";  // off | stderr | a path
};

struct Capability {
  bool stated = false;              // false: every model of the backend has it
  std::vector<std::string> models;  // `*` = all
};

struct ContextLength {
  std::string model;  // `*` = every model of the backend
  std::uint64_t tokens = 0;
};

struct BackendSettings {
  std::string name;
  BackendKind kind = BackendKind::generic;
  HostPort address;       // of `url`; empty for echo
  std::string base_path;  // of `url`: "" or "/prefix", without a trailing slash or /v1
  BackendTls tls;
  std::uint32_t priority = 50;
  std::vector<std::string> models;  // a fixed list; empty: discovered
  std::string api_key;              // read from api_key_env or api_key_file; empty: none
  std::uint32_t max_pending = 0;    // 0 = no cap
  StreamUsage stream_usage = StreamUsage::by_kind;
  Apis apis = 0;  // that it speaks; 0: those of its type
  Capability vision, tools, json_mode;
  std::vector<ContextLength> context_length;
  Ns token_delay_ns = 20 * kMillisecond;  // echo only
};

// The pairs of the file, by `[backend gpu-1] url` or `[routing] strategy`; of a key that repeats, all values.
using GivenPairs = std::map<std::string, std::string>;

using NamePair = std::pair<std::string, std::string>;
using Fallbacks = std::vector<std::pair<std::string, std::vector<std::string>>>;

struct Settings {
  ServerSettings server;
  UpstreamSettings upstream;
  HealthSettings health;
  RoutingSettings routing;
  QueueSettings queue;
  KeysSettings keys;
  MetricsSettings metrics;
  TraceSettings trace;
  SloSettings slo;
  LogSettings log;
  std::vector<NamePair> aliases;  // name → model, in file order
  Fallbacks fallbacks;            // model → models to try, in order
  std::vector<BackendSettings> backends;
  PemFile system_ca;  // the certificates that this host trusts; read if a backend is verified by them
  GivenPairs given;
};

// Descriptors that may be open at once: each client sends a request that goes to a backend, as far as the limits allow
// it.
inline std::uint64_t descriptors_needed(const Settings& settings, std::size_t threads) {
  constexpr std::uint64_t kOwn = 32, kOwnPerThread = 4, kOwnPerBackend = 2;  // log, lookups; event loops; checks
  const std::uint64_t clients = settings.server.max_connections;
  std::uint64_t in_flight = 0;
  for (const BackendSettings& backend : settings.backends) {
    in_flight += backend.max_pending > 0 ? backend.max_pending : clients;
  }
  if (settings.server.max_pending > 0) in_flight = std::min<std::uint64_t>(in_flight, settings.server.max_pending);
  return clients + std::min(in_flight, clients) + settings.server.listen.size() + settings.server.tls_listen.size() +
         settings.server.metrics_listen.size() + kOwn + kOwnPerThread * threads +
         kOwnPerBackend * settings.backends.size();
}

}  // namespace nexus
