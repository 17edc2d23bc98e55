// check.h
// Owns:     `nexus check`: every configured backend asked once, what that shows, and its table.
// Promises: it ends within the health check's time for each question, and the resolver's; what a backend says of itself
//           cannot harm a terminal; a backend is good only where Nexus could serve with it as it is configured.
// Leaves:   asking to prober.h and resolver.h; the command line to nexus.cpp.
// Threads:  the main thread's.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/request_json.h"
#include "nexus/apps/format.h"
#include "nexus/base/buffer.h"
#include "nexus/config/settings.h"
#include "nexus/fleet/prober.h"
#include "nexus/net/epoll.h"
#include "nexus/net/resolver.h"
#include "nexus/net/timer_wheel.h"

namespace nexus {

// In the order of the enum, as `type` spells them.
inline constexpr std::array<std::string_view, 8> kKindNames{"ollama", "vllm", "llamacpp", "lmstudio",
                                                            "openai", "exo",  "generic",  "echo"};

constexpr std::string_view name_of(BackendKind kind) { return kKindNames[static_cast<std::size_t>(kind)]; }

// What is known of one backend so far.
struct CheckState {
  BackendSettings settings;
  bool resolved = false;
  std::string resolve_error;
  std::optional<ProbeResult> own;     // asked as the kind that is configured
  std::optional<ProbeResult> ollama;  // and, where that leaves a doubt, as others
  std::optional<ProbeResult> llamacpp;
  std::optional<ProbeResult> generic;
};

namespace detail {

inline bool passed(const std::optional<ProbeResult>& result) { return result && result->passed; }
inline bool lists_models(const std::optional<ProbeResult>& result) { return passed(result) && result->models_read; }
inline bool refuses_key(const ProbeResult& result) { return result.status == 401 || result.status == 403; }

// Ollama takes a name without a tag for `latest`.
inline bool has_model(const std::vector<std::string>& found, const std::string& model) {
  return std::any_of(found.begin(), found.end(),
                     [&](const std::string& name) { return name == model || name == model + ":latest"; });
}

}  // namespace detail

// As which kind to ask it next, or nothing where enough is known. Ollama is known by /api/tags; llama.cpp answers that
// too, but has /health.
inline std::optional<BackendKind> next_question(const CheckState& state) {
  const BackendKind kind = state.settings.kind;
  if (kind == BackendKind::echo || !state.resolved) return std::nullopt;
  if (!state.own) return kind;
  const bool not_found = state.own->status == 404 || state.own->status == 405 || state.own->status == 501;
  if (!state.own->passed && !not_found) return std::nullopt;
  if (kind == BackendKind::llamacpp && state.own->passed) return std::nullopt;
  const bool is_ollama = kind == BackendKind::ollama;
  if (!is_ollama && !state.ollama) return BackendKind::ollama;
  const bool has_tags = detail::lists_models(is_ollama ? state.own : state.ollama);
  if (has_tags && kind != BackendKind::llamacpp && !state.llamacpp) return BackendKind::llamacpp;
  // These two are asked for their health elsewhere than at /v1/models.
  const bool has_own_path = is_ollama || kind == BackendKind::llamacpp;
  if (!has_tags && !state.own->passed && has_own_path && !state.generic) return BackendKind::generic;
  return std::nullopt;
}

// Which kind it shows itself to be, where that is another than the configured one.
inline std::optional<BackendKind> shown_kind(const CheckState& state) {
  if (!state.own) return std::nullopt;
  const BackendKind kind = state.settings.kind;
  const bool has_tags = detail::lists_models(kind == BackendKind::ollama ? state.own : state.ollama);
  if (has_tags) {
    const BackendKind shown = detail::passed(state.llamacpp) ? BackendKind::llamacpp : BackendKind::ollama;
    if (shown == kind) return std::nullopt;
    return shown;
  }
  if (!state.own->passed && detail::lists_models(state.generic)) return BackendKind::generic;
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
  const auto shown = shown_kind(state);
  if (!shown) return;
  if (*shown == BackendKind::generic) {
    line.remarks.push_back("it lists models at /v1/models, but is no " + std::string(name_of(state.settings.kind)) +
                           ": type = generic would do");
    return;
  }
  const std::string name(name_of(*shown));
  line.remarks.push_back("it answers as " + name + " does: type = " + name);
}

inline void remark_on_key(const CheckState& state, CheckLine& line) {
  const std::string status = std::to_string(state.own->status);
  line.remarks.push_back(state.settings.api_key.empty()
                             ? "it wants a key (" + status + "): set api_key_env or api_key_file"
                             : "it refuses the key (" + status + ")");
}

inline void remark_on_models(const CheckState& state, CheckLine& line) {
  for (const std::string& model : state.settings.models) {
    if (has_model(line.models, model)) continue;
    line.good = false;
    line.remarks.push_back("it has no model " + escape_for_terminal(model));
  }
  if (state.settings.models.empty() && line.models.empty()) line.remarks.push_back("it lists no model");
}

}  // namespace detail

// What the answers come to.
inline CheckLine judge(const CheckState& state) {
  CheckLine line;
  if (state.settings.kind == BackendKind::echo) {
    line.reachable = line.healthy = line.good = true;
    line.models = state.settings.models.empty() ? std::vector<std::string>{"echo"} : state.settings.models;
    line.remarks.push_back("built in");
    return line;
  }
  if (!state.own) {
    line.remarks.push_back("host " + escape_for_terminal(state.settings.address.host) +
                           " is not resolved: " + escape_for_terminal(state.resolve_error));
    return line;
  }
  const ProbeResult& own = *state.own;
  line.reachable = own.connected;
  line.healthy = own.passed;
  line.good = own.passed;
  if (own.passed) line.round_trip_ns = own.round_trip_ns;
  line.models = own.models;
  if (detail::refuses_key(own)) {
    line.good = false;
    detail::remark_on_key(state, line);
  } else if (!own.reason.empty()) {
    line.good = line.good && own.models_read;
    line.remarks.push_back(escape_for_terminal(own.reason, 120));
  }
  if (own.models_read) detail::remark_on_models(state, line);
  detail::remark_on_kind(state, line);
  return line;
}

namespace detail {

// `3: llama3:70b, mistral, phi3`, of many the first few.
inline std::string model_summary(const std::vector<std::string>& models) {
  constexpr std::size_t kShown = 3;
  std::string out = std::to_string(models.size());
  for (std::size_t i = 0; i < std::min(models.size(), kShown); ++i) {
    out += (i == 0 ? ": " : ", ") + escape_for_terminal(models[i], 40);
  }
  return models.size() > kShown ? out + ", \xe2\x80\xa6" : out;
}

inline std::string in_milliseconds(Ns span) {
  if (span < 0) return "-";
  const Ns tenths = (span + kMillisecond / 20) / (kMillisecond / 10);
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " ms";
}

}  // namespace detail

// The table, and one line in closing.
inline std::string check_table(const std::vector<CheckState>& states) {
  using Align = Columns::Align;
  Columns columns(
      {{"BACKEND"}, {"TYPE"}, {"REACHABLE"}, {"HEALTHY"}, {"LATENCY", Align::right}, {"MODELS"}, {"REMARKS"}});
  std::size_t good = 0;
  for (const CheckState& state : states) {
    const CheckLine line = judge(state);
    good += line.good ? 1 : 0;
    std::string remarks;
    for (const std::string& remark : line.remarks) remarks += (remarks.empty() ? "" : "; ") + remark;
    columns.add({escape_for_terminal(state.settings.name), std::string(name_of(state.settings.kind)),
                 line.reachable ? "yes" : "no", line.healthy ? "yes" : "no",
                 detail::in_milliseconds(line.round_trip_ns), detail::model_summary(line.models),
                 remarks.empty() ? "-" : remarks});
  }
  return columns.text() + std::to_string(good) + " of " + std::to_string(states.size()) + " backends are good\n";
}

inline bool all_good(const std::vector<CheckState>& states) {
  return std::all_of(states.begin(), states.end(), [](const CheckState& state) { return judge(state).good; });
}

// Asks all of them at once.
class FleetCheck {
 public:
  explicit FleetCheck(const Settings& settings)
      : timeout_ns_(settings.health.timeout_ns),
        wheel_(monotonic_now()),
        resolver_(net_,
                  [this](std::uint64_t id, const std::vector<Address>& all, std::string error) {
                    on_resolved(static_cast<std::size_t>(id), all, std::move(error));
                  }),
        prober_(net_, wheel_, blocks_, json_) {
    for (const BackendSettings& backend : settings.backends) states_.push_back({backend, false, "", {}, {}, {}, {}});
    addresses_.resize(states_.size());
  }

  // What it found, or nothing where the system refuses the means (errno).
  const std::vector<CheckState>* run() {
    if (net_.open() != 0) return nullptr;
    for (std::size_t i = 0; i < states_.size(); ++i) begin(i);
    while (open_ > 0) turn();
    return &states_;
  }

 private:
  void begin(std::size_t i) {
    const HostPort& where = states_[i].settings.address;
    if (states_[i].settings.kind == BackendKind::echo) return;
    open_ += 1;
    if (const auto address = parse_address(where.host, where.port)) return on_address(i, *address);
    if (resolver_.lookup(where.host, where.port, i)) return;
    states_[i].resolve_error = "too many lookups are waiting";
    open_ -= 1;
  }

  void turn() {
    std::array<Event, EpollNet::kMaxEvents> events;
    bool woken = false;
    const std::size_t count = net_.wait(events, std::min(wheel_.next(), resolver_.next()), woken);
    const auto done = [this](ProbeResult&& result) { on_result(std::move(result)); };
    for (std::size_t i = 0; i < count; ++i) {
      if (events[i].token.kind() == kResolverKind) {
        resolver_.on_event(events[i]);
      } else {
        prober_.on_event(events[i], net_.now(), done);
      }
    }
    resolver_.step();
    wheel_.fire(net_.now(), [&](Handle token) { prober_.on_deadline(token, done); });
  }

  void on_resolved(std::size_t i, const std::vector<Address>& addresses, std::string error) {
    if (!addresses.empty()) return on_address(i, addresses.front());
    states_[i].resolve_error = std::move(error);
    open_ -= 1;
  }

  void on_address(std::size_t i, const Address& address) {
    states_[i].resolved = true;
    addresses_[i] = address;
    ask(i);
  }

  void ask(std::size_t i) {
    const std::optional<BackendKind> kind = next_question(states_[i]);
    if (!kind) {
      open_ -= 1;
      return;
    }
    const BackendSettings& from = states_[i].settings;
    ProbeOrder order;
    order.epoch = std::uint64_t{i} << 8 | static_cast<std::uint64_t>(*kind);
    order.kind = *kind;
    order.address = addresses_[i];
    order.host = host_of(from);
    order.base_path = from.base_path;
    if (!from.api_key.empty()) order.authorization = "Bearer " + from.api_key;
    order.timeout_ns = timeout_ns_;
    prober_.start(order, net_.now(), [this](ProbeResult&& result) { on_result(std::move(result)); });
  }

  void on_result(ProbeResult&& result) {
    const std::size_t i = static_cast<std::size_t>(result.epoch >> 8);
    CheckState& state = states_[i];
    std::optional<ProbeResult>* place = &state.own;
    if (state.own) {
      const auto kind = static_cast<BackendKind>(result.epoch & 255);
      place = kind == BackendKind::ollama     ? &state.ollama
              : kind == BackendKind::llamacpp ? &state.llamacpp
                                              : &state.generic;
    }
    *place = std::move(result);
    ask(i);
  }

  Ns timeout_ns_;
  EpollNet net_;
  TimerWheel wheel_;
  BlockPool blocks_;
  JsonReader json_;
  Resolver resolver_;
  Prober<EpollNet> prober_;
  std::vector<CheckState> states_;
  std::vector<Address> addresses_;  // beside states_
  std::size_t open_ = 0;            // backends that still wait for an answer
};

}  // namespace nexus
