// check.h
// Owns:     `nexus check`: probing every configured backend once, the verdict on each, and the table of them.
// Promises: it ends within the health check's timeout for each probe, and the resolver's; text from a backend cannot
//           harm the terminal; a backend is good only if Nexus could serve with it as it is configured.
// Leaves:   sending the probes to probe_loop.h; the command line to nexus.cpp.
// Threads:  the main thread's.
// Tested by: tests/check_test.cpp, tests/e2e/check.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/apps/format.h"
#include "nexus/apps/probe_loop.h"
#include "nexus/base/limits.h"
#include "nexus/config/own_address.h"
#include "nexus/config/settings.h"
#include "nexus/fleet/check_words.h"

namespace nexus {

// One backend and its probes so far.
struct CheckState {
  BackendSettings settings;
  std::vector<Address> addresses;
  std::string resolve_error;
  bool leads_back = false;                                               // an address at which Nexus itself listens
  std::array<std::optional<ProbeResult>, kBackendKinds.size()> results;  // by the kind that it was probed as

  const std::optional<ProbeResult>& as(BackendKind kind) const { return results[static_cast<std::size_t>(kind)]; }
  const std::optional<ProbeResult>& own() const { return as(settings.kind); }
  bool lists_models_as(BackendKind kind) const { return as(kind) && as(kind)->passed && as(kind)->models_read; }
};

// The kind to probe the backend as next, or nothing if enough is known. Ollama is recognised by /api/tags; llama.cpp
// answers that too, but has /health.
inline std::optional<BackendKind> next_probe(const CheckState& state) {
  const BackendKind kind = state.settings.kind;
  if (state.addresses.empty()) return std::nullopt;  // the built-in backend, or a host that is not resolved
  if (!state.own()) return kind;
  const ProbeResult& own = *state.own();
  if (state.leads_back || (!own.passed && !is_no_such_path(own.status))) return std::nullopt;
  if (kind == BackendKind::llamacpp && own.passed) return std::nullopt;
  if (!state.as(BackendKind::ollama)) return BackendKind::ollama;
  const bool has_tags = state.lists_models_as(BackendKind::ollama);
  if (has_tags && !state.as(BackendKind::llamacpp)) return BackendKind::llamacpp;
  // The health paths of these two differ from /v1/models.
  const bool has_own_path = kind == BackendKind::ollama || kind == BackendKind::llamacpp;
  if (!has_tags && !own.passed && has_own_path && !state.as(BackendKind::generic)) return BackendKind::generic;
  return std::nullopt;
}

// The kind that the backend turns out to be, if that is not the configured one.
inline std::optional<BackendKind> detected_kind(const CheckState& state) {
  if (!state.own()) return std::nullopt;
  if (state.lists_models_as(BackendKind::ollama)) {
    const auto& llamacpp = state.as(BackendKind::llamacpp);
    if (llamacpp && llamacpp->is_nexus) return std::nullopt;
    const BackendKind kind = llamacpp && llamacpp->passed ? BackendKind::llamacpp : BackendKind::ollama;
    return kind == state.settings.kind ? std::nullopt : std::optional(kind);
  }
  if (!state.own()->passed && state.lists_models_as(BackendKind::generic)) return BackendKind::generic;
  return std::nullopt;
}

// One backend's line.
struct CheckLine {
  bool reachable = false;
  bool healthy = false;
  bool good = false;
  std::vector<std::string> models;
  Ns round_trip_ns = -1;
  std::vector<std::string> remarks;
};

namespace detail {

inline void remark_on_kind(const CheckState& state, CheckLine& line) {
  const auto kind = detected_kind(state);
  if (!kind) return;
  const std::string name(name_of(*kind));
  line.remarks.push_back(*kind == BackendKind::generic ? "it is no " + std::string(name_of(state.settings.kind)) +
                                                             ", but lists models at /v1/models: set type = generic"
                                                       : "it responds as " + name + " does: set type = " + name);
}

// Behind the reason of a check that asked for a path which the backend does not have.
inline std::string advice_on_path(const CheckState& state) {
  const BackendKindRow& row = row_of(state.settings.kind);
  const bool list = state.own()->passed || row.health_path == row.models_path;
  const std::string asked =
      " to GET " + state.settings.base_path + std::string(state.own()->passed ? row.models_path : row.health_path);
  return asked + (list ? ": if it has no list of models, set models = NAME, …" : ": is this its type?");
}

// Ollama takes a name without a tag for `latest`.
inline void remark_on_models(const CheckState& state, CheckLine& line) {
  const auto has = [&](const std::string& name) {
    return std::find(line.models.begin(), line.models.end(), name) != line.models.end();
  };
  for (const std::string& model : state.settings.models) {
    if (has(model) || has(model + ":latest")) continue;
    line.good = false;
    line.remarks.push_back("it has no model " + escape_for_terminal(model));
  }
  if (state.settings.models.empty() && line.models.empty()) line.remarks.push_back("it lists no model");
}

// Users often copy the address of an endpoint.
inline void remark_on_url(const CheckState& state, CheckLine& line) {
  std::string remark = nexus::remark_on_url(state.settings);
  if (remark.empty()) return;
  line.good = false;
  line.remarks.push_back(std::move(remark));
}

}  // namespace detail

// The verdict on the probes.
inline CheckLine judge(const CheckState& state) {
  CheckLine line;
  if (state.settings.kind == BackendKind::echo) {
    line.reachable = line.healthy = line.good = true;
    line.models = state.settings.models.empty() ? std::vector<std::string>{"echo"} : state.settings.models;
    line.remarks.push_back("built in");
    return line;
  }
  if (!state.own()) {
    line.remarks.push_back("DNS lookup failed for " + escape_for_terminal(state.settings.address.host) + ": " +
                           escape_for_terminal(state.resolve_error));
    return line;
  }
  const ProbeResult& own = *state.own();
  line.reachable = own.connected;
  line.healthy = line.good = own.passed;
  if (own.passed) line.round_trip_ns = own.round_trip_ns;
  for (const ListedModel& model : own.models) line.models.push_back(model.name);
  const bool needs_no_list = !state.settings.models.empty();
  if (own.status == 401 || own.status == 403) {
    line.good = line.good && needs_no_list && state.settings.api_key.empty();
    line.remarks.push_back(explain_check(state.settings, own));
  } else if (!own.reason.empty()) {
    line.good = line.good && (own.models_read || needs_no_list);
    std::string remark = explain_check(state.settings, own, FirstLook::no);
    if (is_no_such_path(own.status) && !detected_kind(state)) remark += detail::advice_on_path(state);
    line.remarks.push_back(escape_for_terminal(remark, 400));
  }
  if (state.leads_back) {
    line.healthy = line.good = false;
    line.remarks.push_back("routing loop: Nexus itself listens at this address");
  }
  detail::remark_on_url(state, line);
  if (own.models_read) detail::remark_on_models(state, line);
  detail::remark_on_kind(state, line);
  return line;
}

namespace detail {

// `3: llama3:70b, mistral, phi3`; only the first three names.
inline std::string model_summary(const std::vector<std::string>& models) {
  constexpr std::size_t kShown = 3;
  std::string out = std::to_string(models.size());
  for (std::size_t i = 0; i < std::min(models.size(), kShown); ++i) {
    out += (i == 0 ? ": " : ", ") + escape_for_terminal(models[i], 40);
  }
  return models.size() > kShown ? out + ", \xe2\x80\xa6" : out;
}

inline std::string in_milliseconds(Ns span) {
  return span < 0 ? "-" : with_decimals(static_cast<double>(span) / static_cast<double>(kMillisecond), 1) + " ms";
}

}  // namespace detail

// The table, and a line that counts the good backends.
inline std::string check_table(const std::vector<CheckState>& states) {
  std::vector<std::vector<std::string>> rows{
      {"BACKEND", "TYPE", "REACHABLE", "HEALTHY", "LATENCY", "MODELS", "REMARKS"}};
  std::size_t good = 0;
  for (const CheckState& state : states) {
    const CheckLine line = judge(state);
    good += line.good ? 1 : 0;
    std::string remarks;
    for (const std::string& remark : line.remarks) remarks += (remarks.empty() ? "" : "; ") + remark;
    rows.push_back({escape_for_terminal(state.settings.name), std::string(name_of(state.settings.kind)),
                    line.reachable ? "yes" : "no", line.healthy ? "yes" : "no",
                    detail::in_milliseconds(line.round_trip_ns), detail::model_summary(line.models),
                    remarks.empty() ? "-" : remarks});
  }
  return in_columns(rows, "llllrll") + std::to_string(good) + " of " + std::to_string(states.size()) +
         " backends are good\n";
}

// A line for each alias and fallback that leads to a model which no backend has.
inline std::vector<std::string> dangling_names(const Settings& settings, const std::vector<CheckState>& states) {
  std::set<std::string> known;
  for (const CheckState& state : states) {
    for (const std::string& model : judge(state).models) {
      known.insert(model);
      if (model.ends_with(":latest")) known.insert(model.substr(0, model.rfind(':')));  // Ollama's default tag
    }
    known.insert(state.settings.models.begin(), state.settings.models.end());
  }
  for (const auto& [name, model] : settings.aliases) known.insert(name);  // a wrong one has a line of its own
  std::vector<std::string> lines;
  const auto look_at = [&](std::string_view what, const std::string& name, const std::string& model) {
    if (known.contains(model)) return;
    lines.push_back(std::string(what) + escape_for_terminal(name) + ": no backend lists " + escape_for_terminal(model));
  };
  for (const auto& [name, model] : settings.aliases) look_at("alias ", name, model);
  for (const auto& [name, models] : settings.fallbacks) {
    for (const std::string& model : models) look_at("fallback of ", name, model);
  }
  return lines;
}

inline bool all_good(const std::vector<CheckState>& states) {
  return std::all_of(states.begin(), states.end(), [](const CheckState& state) { return judge(state).good; });
}

// True if Nexus, as it is configured, listens at this address.
inline bool leads_back(const ServerSettings& server, const Address& address) {
  std::array<char, INET6_ADDRSTRLEN> text{};
  inet_ntop(address.v6 ? AF_INET6 : AF_INET, address.ip.data(), text.data(), text.size());
  const HostPort at{text.data(), address.port};
  bool found = false;
  for (const auto* listeners : {&server.listen, &server.tls_listen, &server.metrics_listen}) {
    for (const HostPort& listener : *listeners) {
      found |= config::leads_to(at, listener) ||
               (listener.port == at.port && config::covers(listener.host, at.host, is_of_this_host(address)));
    }
  }
  return found;
}

// Probes all backends at once.
class FleetCheck {
 public:
  explicit FleetCheck(const Settings& settings)
      : server_(settings.server),
        timeout_ns_(settings.health.timeout_ns),
        loop_(
            [this](std::uint64_t i, const std::vector<Address>& addresses, std::string error) {
              states_[i].addresses = addresses;
              states_[i].resolve_error = std::move(error);
              probe(i);
            },
            [this](ProbeResult&& result) {
              const std::uint64_t i = result.epoch >> 8;
              CheckState& state = states_[i];
              if (!state.own()) {
                const Address& at = result.passed ? result.address : state.addresses.front();
                state.leads_back = leads_back(server_, at);
              }
              state.results[result.epoch & 255] = std::move(result);
              probe(i);
            }) {
    for (const BackendSettings& backend : settings.backends) states_.emplace_back().settings = backend;
  }

  // The finished states, or null with errno set if the event loop can't be opened.
  const std::vector<CheckState>* run() {
    if (loop_.open() != 0) return nullptr;
    static_assert(kMaxBackends <= Resolver::kMaxWaiting);
    for (std::size_t i = 0; i < states_.size(); ++i) {
      const BackendSettings& backend = states_[i].settings;
      if (backend.kind != BackendKind::echo && loop_.lookup(backend.address, i)) open_ += 1;
    }
    while (open_ > 0) loop_.turn();
    return &states_;
  }

 private:
  void probe(std::size_t i) {
    const CheckState& state = states_[i];
    const std::optional<BackendKind> kind = next_probe(state);
    if (!kind) {
      open_ -= 1;
      return;
    }
    const std::uint64_t epoch = std::uint64_t{i} << 8 | static_cast<std::uint64_t>(*kind);
    ProbeOrder order = order_of(state.settings, state.addresses, epoch, timeout_ns_);
    order.kind = *kind;
    loop_.start(order);
  }

  const ServerSettings& server_;
  Ns timeout_ns_;
  ProbeLoop loop_;
  std::vector<CheckState> states_;
  std::size_t open_ = 0;  // backends whose probes have not ended
};

}  // namespace nexus
