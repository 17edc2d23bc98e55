// reloads.h
// Owns:     the change of each key of nexus.conf that a simulated reload makes, and which keys were changed while
//           requests were in which state.
// Promises: every key has a row; keys that the simulator cannot change say why.
// Leaves:   when to reload to simulation.h; backends that come and go to swarm.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <array>
#include <bitset>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/config/keys.h"
#include "nexus/proxy/exchange_state.h"
#include "tests/lib/dice.h"

namespace nexus::sim {

// The settings and the dice that a change may use.
struct Drawn {
  Settings& s;
  Dice& dice;

  BackendSettings& backend() const { return s.backends[dice.index(s.backends.size())]; }
  Ns span(Ns least, Ns most) const { return dice.span(least, most); }
  std::uint32_t number(std::uint32_t least, std::uint32_t most) const { return dice.number(least, most); }
  std::vector<std::string> models() const {
    std::vector<std::string> some;
    for (std::uint32_t i = 0; i < 6; ++i) {
      if (!dice.one_in(6)) some.push_back("m" + std::to_string(i));
    }
    if (some.empty()) some.push_back("m0");
    return some;
  }
  Capability capability() const { return dice.one_in(2) ? Capability{} : Capability{true, models()}; }
};

struct KeyChange {
  std::string_view section, key;
  void (*change)(const Drawn&);  // null: the simulator has no such thing
};

inline constexpr Ns kMs = kMillisecond;

inline constexpr std::array kKeyChanges = std::to_array<KeyChange>({
    {"server", "listen", nullptr},   // a restart changes it
    {"server", "threads", nullptr},  // the same
    {"server", "max_connections",
     [](const Drawn& d) { d.s.server.max_connections = d.dice.one_in(6) ? d.number(1, 10) : 10'000; }},
    {"server", "max_body",
     [](const Drawn& d) { d.s.server.max_body_bytes = d.dice.one_in(6) ? d.number(100, 4000) : 1u << 20; }},
    {"server", "body_memory",
     [](const Drawn& d) { d.s.server.body_memory_bytes = d.dice.one_in(6) ? d.number(1000, 100'000) : 64u << 20; }},
    {"server", "max_header",
     [](const Drawn& d) { d.s.server.max_header_bytes = d.dice.one_in(6) ? d.number(300, 1000) : 16u << 10; }},
    {"server", "max_fields", [](const Drawn& d) { d.s.server.max_fields = d.dice.one_in(6) ? d.number(16, 30) : 128; }},
    {"server", "max_pending", [](const Drawn& d) { d.s.server.max_pending = d.dice.one_in(3) ? d.number(1, 9) : 0; }},
    {"server", "header_timeout", [](const Drawn& d) { d.s.server.header_timeout_ns = d.span(200 * kMs, 3 * kSecond); }},
    {"server", "body_timeout", [](const Drawn& d) { d.s.server.body_timeout_ns = d.span(200 * kMs, 3 * kSecond); }},
    {"server", "idle_timeout", [](const Drawn& d) { d.s.server.idle_timeout_ns = d.span(50 * kMs, 3 * kSecond); }},
    {"server", "write_timeout", [](const Drawn& d) { d.s.server.write_timeout_ns = d.span(200 * kMs, 3 * kSecond); }},
    {"server", "drain_timeout", nullptr},   // the main thread's
    {"server", "tls_listen", nullptr},      // a restart changes it
    {"server", "tls_certificate", nullptr},  // clients speak in clear here, and so do backends
    {"server", "tls_key", nullptr},
    {"server", "tls_min_version", nullptr},
    {"server", "tls_client_ca", nullptr},
    {"server", "metrics_listen", nullptr},  // a restart changes it
    {"server", "api_keys_file",
     [](const Drawn& d) {
       d.s.server.api_keys.clear();
       if (d.dice.one_in(2)) return;
       const KeyOptions options{.weight = d.number(1, 3), .priority = d.number(0, 2) * 50,
                                .max_pending = d.dice.one_in(2) ? d.number(1, 4) : 0,
                                .rpm = d.dice.one_in(3) ? d.number(1, 3000) : 0,
                                .tpm = d.dice.one_in(3) ? d.number(1, 300'000) : 0};
       d.s.server.api_keys = {{"sim", "sk-sim", options}};
       if (!d.dice.one_in(3)) d.s.server.api_keys.push_back({"rest", "sk-rest", {}});
     }},
    {"server", "ollama_admin",
     [](const Drawn& d) { d.s.server.ollama_admin = d.dice.one_in(2) ? "" : d.backend().name; }},
    {"server", "cors_origins",
     [](const Drawn& d) {
       const std::vector<std::string> some{d.dice.one_in(2) ? "*" : "https://page"};
       d.s.server.cors_origins = d.dice.one_in(2) ? std::vector<std::string>{} : some;
     }},
    {"upstream", "connect_timeout", [](const Drawn& d) { d.s.upstream.connect_timeout_ns = d.span(20 * kMs, kSecond); }},
    {"upstream", "first_byte_timeout",
     [](const Drawn& d) { d.s.upstream.first_byte_timeout_ns = d.span(50 * kMs, 2 * kSecond); }},
    {"upstream", "stall_timeout", [](const Drawn& d) { d.s.upstream.stall_timeout_ns = d.span(50 * kMs, 2 * kSecond); }},
    {"upstream", "head_delay",
     [](const Drawn& d) { d.s.upstream.head_delay_ns = d.dice.one_in(4) ? 0 : d.span(kMs, 2 * kSecond); }},
    {"upstream", "request_timeout",
     [](const Drawn& d) { d.s.upstream.request_timeout_ns = d.dice.one_in(4) ? d.span(20 * kMs, 2 * kSecond) : 0; }},
    {"upstream", "idle_connections",
     [](const Drawn& d) { d.s.upstream.idle_connections = d.dice.one_in(4) ? d.number(0, 2) : kAutomatic; }},
    {"upstream", "idle_timeout", [](const Drawn& d) { d.s.upstream.idle_timeout_ns = d.span(20 * kMs, 3 * kSecond); }},
    {"upstream", "resend", nullptr},  // the ledger expects that requests are sent again
    {"health", "enabled", [](const Drawn& d) { d.s.health.enabled = !d.dice.one_in(3); }},
    {"health", "interval", [](const Drawn& d) { d.s.health.interval_ns = d.span(200 * kMs, 5 * kSecond); }},
    {"health", "timeout", [](const Drawn& d) { d.s.health.timeout_ns = d.span(100 * kMs, kSecond); }},
    {"health", "failures", [](const Drawn& d) { d.s.health.failures = d.number(1, 3); }},
    {"health", "recoveries", [](const Drawn& d) { d.s.health.recoveries = d.number(1, 2); }},
    {"health", "eject_after", [](const Drawn& d) { d.s.health.eject_after = d.number(1, 8); }},
    {"health", "eject_time", [](const Drawn& d) { d.s.health.eject_time_ns = d.span(10 * kMs, 2 * kSecond); }},
    {"routing", "strategy", [](const Drawn& d) { d.s.routing.strategy = static_cast<Strategy>(d.number(0, 4)); }},
    {"routing", "retries", [](const Drawn& d) { d.s.routing.retries = d.number(0, 4); }},
    {"routing", "weight_priority", [](const Drawn& d) { d.s.routing.weight_priority = d.number(1, 100); }},
    {"routing", "weight_load", [](const Drawn& d) { d.s.routing.weight_load = d.number(0, 100); }},
    {"routing", "weight_latency", [](const Drawn& d) { d.s.routing.weight_latency = d.number(0, 100); }},
    {"routing", "affinity", [](const Drawn& d) { d.s.routing.affinity = static_cast<Affinity>(d.number(0, 3)); }},
    {"routing", "affinity_headers",
     [](const Drawn& d) { d.s.routing.affinity_headers = {d.dice.one_in(2) ? "x-session-id" : "session-id"}; }},
    {"routing", "affinity_slack", [](const Drawn& d) { d.s.routing.affinity_slack = d.number(0, 200); }},
    {"queue", "size", [](const Drawn& d) { d.s.queue.size = d.dice.one_in(2) ? d.number(1, 20) : 0; }},
    {"queue", "timeout", [](const Drawn& d) { d.s.queue.timeout_ns = d.span(10 * kMs, 2 * kSecond); }},
    {"keys", "weight", nullptr},  // the options of the key, above, change it and the next five
    {"keys", "priority", nullptr},
    {"keys", "max_pending", nullptr},
    {"keys", "rpm", nullptr},
    {"keys", "tpm", nullptr},
    {"keys", "admin", nullptr},
    {"keys", "fair_by", nullptr},  // the order of the queue is judged by its default
    {"fallbacks", "MODEL",
     [](const Drawn& d) {
       d.s.fallbacks = d.dice.one_in(2) ? Fallbacks{} : Fallbacks{{"m1", {"m2"}}, {"m3", {"a3", "m4", "m0"}}};
     }},
    {"aliases", "NAME",
     [](const Drawn& d) {
       d.s.aliases = d.dice.one_in(3) ? std::vector<NamePair>{} : std::vector<NamePair>{{"a0", "m0"}, {"a1", "a0"}, {"a3", "m3"}};
     }},
    {"metrics", "enabled", [](const Drawn& d) { d.s.metrics.enabled = !d.dice.one_in(3); }},
    {"metrics", "labels", [](const Drawn& d) { d.s.metrics.labels = static_cast<LabelMode>(d.number(0, 1)); }},
    {"metrics", "keys", [](const Drawn& d) { d.s.metrics.keys = d.number(0, 3); }},
    {"metrics", "openmetrics", [](const Drawn& d) { d.s.metrics.openmetrics = !d.s.metrics.openmetrics; }},
    // A run has levels from its first request to its last, or none: so it is known which requests must be judged.
    {"slo", "ttft", [](const Drawn& d) { d.s.slo.ttft_ns = d.s.slo.on() ? d.span(kMs, kSecond) : 0; }},
    {"slo", "tpot",
     [](const Drawn& d) { d.s.slo.tpot_ns = d.s.slo.on() && d.dice.one_in(2) ? d.span(kMs, 50 * kMs) : 0; }},
    {"trace", "endpoint", nullptr},     // the fleet has no collector; spans are on in some runs (simulation.h)
    {"trace", "trace_ratio", nullptr},  // the same
    {"log", "level", [](const Drawn& d) { d.s.log.level = static_cast<LogLevel>(d.number(0, 3)); }},
    {"log", "format", nullptr},  // the audit reads the lines
    {"log", "access", nullptr},  // the same
    {"backend", "url", nullptr},  // swarm.h knows the servers
    {"backend", "tls_ca", nullptr},
    {"backend", "tls_verify", nullptr},
    {"backend", "tls_name", nullptr},
    {"backend", "tls_certificate", nullptr},
    {"backend", "tls_key", nullptr},
    {"backend", "type",
     [](const Drawn& d) {
       d.backend().kind = d.dice.one_in(2) ? BackendKind::vllm : BackendKind::generic;
     }},
    {"backend", "priority", [](const Drawn& d) { d.backend().priority = d.number(1, 100); }},
    {"backend", "models",
     [](const Drawn& d) { d.backend().models = d.dice.one_in(2) ? d.models() : std::vector<std::string>{}; }},
    {"backend", "api_key_env",
     [](const Drawn& d) {
       BackendSettings& backend = d.backend();
       backend.api_key = d.dice.one_in(3) ? "" : "sk-of-" + backend.name;
     }},
    {"backend", "api_key_file",
     [](const Drawn& d) {
       BackendSettings& backend = d.backend();
       backend.api_key = "sk-of-" + backend.name + "-" + std::to_string(d.number(1, 9));
     }},
    {"backend", "max_pending", [](const Drawn& d) { d.backend().max_pending = d.number(0, 3); }},
    {"backend", "stream_usage",
     [](const Drawn& d) { d.backend().stream_usage = static_cast<StreamUsage>(d.number(0, 2)); }},
    {"backend", "apis",
     [](const Drawn& d) { d.backend().apis = d.dice.one_in(2) ? 0 : apis(Api::chat, static_cast<Api>(d.number(1, 3))); }},
    {"backend", "vision", [](const Drawn& d) { d.backend().vision = d.capability(); }},
    {"backend", "tools", [](const Drawn& d) { d.backend().tools = d.capability(); }},
    {"backend", "json_mode", [](const Drawn& d) { d.backend().json_mode = d.capability(); }},
    {"backend", "context_length",
     [](const Drawn& d) {
       d.backend().context_length = d.dice.one_in(2) ? std::vector<ContextLength>{}
                                                     : std::vector<ContextLength>{{"*", d.number(10, 100'000)}};
     }},
    {"backend", "token_delay", nullptr},  // of an echo backend
});

static_assert(kKeyChanges.size() == config::kConfigKeys.size() &&
                  std::equal(kKeyChanges.begin(), kKeyChanges.end(), config::kConfigKeys.begin(),
                             [](const KeyChange& change, const config::ConfigKey& row) {
                               return change.section == row.section && change.key == row.key;
                             }),
              "a key without a row, or in another order");

// The states in which a request can wait while a reload comes.
inline constexpr std::array kReloadStates{ExchangeState::reading,    ExchangeState::expecting, ExchangeState::queued,
                                          ExchangeState::connecting, ExchangeState::sending,   ExchangeState::awaiting,
                                          ExchangeState::streaming,  ExchangeState::finishing};

// The state in which a reload comes: often one that few runs have.
inline ExchangeState draw_state(Dice& dice) {
  if (dice.one_in(3)) return dice.one_in(2) ? ExchangeState::queued : ExchangeState::expecting;
  return kReloadStates[dice.index(kReloadStates.size())];
}

// Which keys were changed while a request was in which state.
class ReloadCoverage {
 public:
  using Keys = std::bitset<kKeyChanges.size()>;

  void note(ExchangeState state, const Keys& keys) { seen_[static_cast<std::size_t>(state)] |= keys; }
  void add(const ReloadCoverage& more) {
    for (std::size_t i = 0; i < seen_.size(); ++i) seen_[i] |= more.seen_[i];
  }
  // Prints what was never seen. Returns how much.
  std::size_t print_missing() const {
    std::size_t missing = 0;
    for (const ExchangeState state : kReloadStates) {
      for (std::size_t i = 0; i < kKeyChanges.size(); ++i) {
        if (kKeyChanges[i].change == nullptr || seen_[static_cast<std::size_t>(state)][i]) continue;
        missing += 1;
        std::printf("FAILED: no reload changed [%.*s] %.*s while a request was %.*s\n",
                    static_cast<int>(kKeyChanges[i].section.size()), kKeyChanges[i].section.data(),
                    static_cast<int>(kKeyChanges[i].key.size()), kKeyChanges[i].key.data(),
                    static_cast<int>(to_string(state).size()), to_string(state).data());
      }
    }
    return missing;
  }

 private:
  std::array<Keys, kExchangeStateNames.size()> seen_{};
};

}  // namespace nexus::sim
