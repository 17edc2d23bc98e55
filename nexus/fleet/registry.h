// registry.h
// Owns:     the backends, the state of each (health, models, address), and the snapshot of it that workers read.
// Promises: a snapshot is immutable and complete: names resolved, aliases followed, ids assigned; ids outlive backends;
//           a reload keeps the state of every backend whose url and type are unchanged; health, ejection and latency
//           belong to an address, and a backend with a new one begins anew.
// Leaves:   health checks and model lists to prober.h; choosing a backend to router.h.
// Threads:  the Registry belongs to the control thread; snapshots are shared as std::shared_ptr<const Snapshot>.
// Tested by: tests/registry_test.cpp, tests/hostile_reload_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nexus/api/endpoints.h"
#include "nexus/api/model_list.h"
#include "nexus/base/limits.h"
#include "nexus/base/text_buffer.h"
#include "nexus/config/settings.h"
#include "nexus/fleet/affinity.h"
#include "nexus/fleet/circuit_breaker.h"
#include "nexus/fleet/key_states.h"
#include "nexus/metrics/ids.h"
#include "nexus/net/epoll.h"

namespace nexus {

enum class Health : std::uint8_t { unknown, healthy, unhealthy };

// The configured capabilities of a model on a backend.
struct Capabilities {
  bool vision = true;
  bool tools = true;
  bool json_mode = true;
  std::uint64_t context_tokens = 0;  // 0: not configured

  bool operator==(const Capabilities&) const = default;
};

// A backend as workers see it.
struct alignas(64) BackendView {
  // Each request reads these of each candidate: they share a cache line.
  BackendId id{};
  std::uint32_t priority = 50;
  std::uint32_t max_pending = 0;
  Apis apis = kAllApis;
  bool healthy = false;
  bool ask_usage = false;
  bool has_key = false;
  std::shared_ptr<CircuitBreaker> circuit;  // of the server at `address`
  std::shared_ptr<ServerFacts> facts;       // of the same

  std::uint64_t affinity = 0;            // affinity_hash() of its name
  std::optional<Address> address;        // none until its host name is resolved
  std::shared_ptr<const TlsClient> tls;  // null: it speaks in clear
  std::string name;
  HostPort server;  // as configured, for spans; and what it is:
  std::string_view provider;
  std::string base_path;
  std::string request_lines;                   // sent with every request: Host, and its key if it has one
  std::string response_line;                   // sent with every response from it: X-Nexus-Backend
  std::shared_ptr<const ListedModels> listed;  // what the offers point to

  bool speaks(const Endpoint& endpoint) const {
    return (apis & bit_of(endpoint.api)) != 0 && !facts->lacks(bit_of(endpoint));
  }
};

// A model that a backend offers.
struct Offer {
  std::uint32_t backend = 0;  // index into Snapshot::backends
  Capabilities capabilities;
  const ListedModel* listed = nullptr;  // as the backend lists it; null: the configuration does
  bool implied = false;                 // it takes this name for another one, which it lists
};

// A model name that a client may use.
struct ModelEntry {
  ModelId id{};
  std::string name;
  std::string target;  // `name` after aliases: the name that backends know
  ModelId target_id{};
  std::vector<Offer> offers;           // of `target`, in the order of the backends; unhealthy ones too
  std::vector<std::string> fallbacks;  // models to try if no offer can serve the request

  bool is_alias() const { return !same_text(name, target); }
};

struct Snapshot {
  std::uint64_t version = 0;
  std::shared_ptr<const Settings> settings;
  std::vector<BackendView> backends;
  std::shared_ptr<const std::vector<KeyView>> keys;  // in the order of [server] api_keys
  std::unordered_map<std::string, ModelEntry, StringHash, std::equal_to<>> models;
  ModelEntry any;                     // for a request that names no model: an offer for each backend
  BackendId admin = BackendId::none;  // gets requests that change models
  bool any_vision_stated = false;     // some backend has a `vision` list
  bool any_context_stated = false;    // some backend has a `context_length`
  bool discovering = false;           // some backend's model list was not read yet: an unknown model may still appear
  bool unchecked = false;             // some backend was never checked
  // Made once per snapshot, because a fleet may have thousands of models; see complete() in model_pages.h.
  std::array<std::shared_ptr<const TextBuffer>, kModelListKinds> model_pages;  // the lists of models, by their shape
  std::size_t models_available = 0;  // on healthy backends; aliases do not count
  std::string available_names;       // for the message of a 404

  // The healthy backend's offer that speaks for a model: a listed one before an implied one, then by priority. Null if
  // there is none.
  const Offer* preferred_offer(const ModelEntry& entry) const {
    const Offer* best = nullptr;
    const auto rank = [this](const Offer& offer) { return std::pair(offer.implied, backends[offer.backend].priority); };
    for (const Offer& offer : entry.offers) {
      if (backends[offer.backend].healthy && (best == nullptr || rank(offer) < rank(*best))) best = &offer;
    }
    return best;
  }

  // The entry of a model, or of none.
  const ModelEntry* find(std::string_view model) const {
    if (model.empty()) return &any;
    auto found = models.find(model);
    return found == models.end() ? nullptr : &found->second;
  }
};

// gen_ai.provider.name: what a backend is, or whose format it speaks.
constexpr std::string_view provider_of(BackendKind kind) {
  return name_of(kind == BackendKind::generic ? BackendKind::openai : kind);
}

using SnapshotPtr = std::shared_ptr<const Snapshot>;

// The Host field for a backend: host[:port], with an IPv6 address in brackets.
inline std::string host_of(const BackendSettings& backend) {
  const auto& [name, port] = backend.address;
  const std::string host = name.ends_with('.') ? name.substr(0, name.size() - 1) : name;  // the dot is for DNS alone
  if (host.empty()) return "localhost";
  return port == (backend.tls.on ? 443 : 80) ? url_host(host) : host_port(host, port);
}

// The fields with the backend's own key, as whole lines; empty if it has none.
inline std::string key_lines_of(const BackendSettings& backend) {
  if (backend.api_key.empty()) return {};
  std::string lines = "Authorization: Bearer " + backend.api_key + "\r\n";
  if (row_of(backend.kind).takes_x_api_key) lines += "x-api-key: " + backend.api_key + "\r\n";
  return lines;
}

// Ollama takes a name without a tag for `latest`. Returns the other name of the same model, or nothing.
inline std::string other_name(BackendKind kind, std::string_view model) {
  constexpr std::string_view kLatest = ":latest";
  if (kind != BackendKind::ollama) return {};
  if (model.ends_with(kLatest)) return std::string(model.substr(0, model.size() - kLatest.size()));
  const bool has_tag = model.substr(model.rfind('/') + 1).find(':') != std::string_view::npos;
  return has_tag ? std::string() : std::string(model).append(kLatest);
}

// `+phi3, -mistral`: the names in one of two sorted lists alone; of a first list all of them are new. No more than a
// line of the log shows.
inline std::string changed_models(const ListedModels* before, const ListedModels& after) {
  std::string out;
  const auto add = [&](char sign, const ListedModel& model) {
    if (out.size() < kMaxLogValueBytes) out.append(out.empty() ? "" : ", ").append(1, sign).append(model.name);
  };
  std::size_t at = 0;
  for (const ListedModel& model : after) {
    for (; before != nullptr && at < before->size() && (*before)[at].name < model.name; ++at) add('-', (*before)[at]);
    const bool known = before != nullptr && at < before->size() && (*before)[at].name == model.name;
    known ? void(++at) : add('+', model);
  }
  for (; before != nullptr && at < before->size(); ++at) add('-', (*before)[at]);
  return out;
}

class Registry {
 public:
  struct Backend {
    BackendSettings settings;
    BackendId id{};
    Health health = Health::unknown;
    std::uint32_t streak = 0;                        // consecutive checks that contradict `health`
    bool was_up = false;                             // a check at its address has passed
    std::uint32_t failed_checks = 0;                 // since the last one that passed, for the schedule
    std::size_t tried = 0;                           // the same, for the addresses: it has no upper bound
    std::shared_ptr<const ListedModels> discovered;  // used if the configuration lists no models; null: not read yet
    std::string list_remark;                         // the last problem with its list that was logged
    std::string problem;                             // of its last check, in words; empty: it passed
    Ns changed_ns = 0;                               // when its health changed, or it was configured
    std::optional<Address> address;                  // in use
    std::vector<Address> addresses;                  // of its host name
    bool looking_up = false;
    bool lookup_failed = false;                                            // the last one
    std::shared_ptr<CircuitBreaker> circuit;                               // changes with the address
    std::shared_ptr<ServerFacts> facts = std::make_shared<ServerFacts>();  // the same
    std::uint64_t epoch = 0;  // changes with url or type, so that results of earlier checks can be ignored
    // control.h's schedule.
    Ns next_check_ns = kNever;  // kNever: the first check was not scheduled yet
    Ns next_lookup_ns = kNever;
    Ns checked_ns = 0;  // when the last check or lookup began
    bool checking = false;

    bool is_up() const { return health == Health::healthy && address.has_value(); }
    bool has_models() const { return !settings.models.empty() || discovered != nullptr; }
    bool is_checked(bool health_on) const { return health_on || settings.models.empty(); }  // else nothing is to learn
    bool is_unresolved() const { return lookup_failed && !address; }

    // Calls visit(name, ListedModel*) for each of its models; the pointer is null if the configuration lists them.
    template <class Visit>
    void each_model(Visit&& visit) const {
      for (const std::string& model : settings.models) visit(model, static_cast<const ListedModel*>(nullptr));
      if (!settings.models.empty() || discovered == nullptr) return;
      for (const ListedModel& model : *discovered) visit(model.name, &model);
    }

    // The addresses for the next check: the one in use first, or another one in each check if that failed.
    std::vector<Address> to_try() const {
      if (addresses.empty()) return {*address};
      std::vector<Address> out = addresses;
      const auto in_use = std::find(out.begin(), out.end(), *address);
      const auto after_failures = out.begin() + static_cast<std::ptrdiff_t>(tried % out.size());
      std::rotate(out.begin(), tried == 0 ? in_use : after_failures, out.end());
      return out;
    }
  };

  struct Transition {
    bool changed = false;  // a new snapshot is needed
    Health from = Health::unknown;
    Health to = Health::unknown;
  };

  Registry() : models_("unknown", kMaxModelNames), backend_names_("none", kMaxBackendNames) {}

  // Applies a configuration. Backends of the same name, type and url keep their health, models and address; other
  // limits of ejection begin anew. Changes nothing if it throws std::bad_alloc.
  void configure(std::shared_ptr<const Settings> settings) {
    const HealthSettings &before = settings_->health, &after = settings->health;
    const bool ejects_anew = before.eject_after != after.eject_after || before.eject_time_ns != after.eject_time_ns;
    auto keys = keys_.views_of(*settings);
    std::vector<Backend> next;
    std::vector<Backend*> known;
    next.reserve(settings->backends.size());
    known.reserve(settings->backends.size());
    for (const BackendSettings& wanted : settings->backends) {
      Backend& backend = next.emplace_back();
      backend.settings = wanted;
      known.push_back(find_if([&](const Backend& old) { return is_same(old.settings, wanted); }));
      if (known.back() != nullptr) {
        const auto& circuit = known.back()->circuit;
        backend.circuit = ejects_anew ? std::make_shared<CircuitBreaker>(circuit->server()) : circuit;
        continue;
      }
      backend.circuit = std::make_shared<CircuitBreaker>(++servers_);
      backend.id = backend_names_.intern(wanted.name);
      backend.epoch = ++epochs_;
      backend.address = parse_address(wanted.address.host, wanted.address.port);
    }
    for (std::size_t i = 0; i < next.size(); ++i) {
      const bool had_list = known[i] != nullptr && !known[i]->settings.models.empty();
      if (known[i] != nullptr) {
        std::swap(next[i].settings, known[i]->settings);
        std::swap(next[i].circuit, known[i]->circuit);
        next[i] = std::move(*known[i]);
      }
      // A backend that was not checked while checks were off, or whose list of models is wanted now, is not known yet.
      if (!before.enabled || (had_list && !next[i].has_models())) next[i].health = Health::unknown;
      if (after.enabled) continue;
      next[i].health = Health::healthy;
      next[i].problem.clear();
    }
    backends_ = std::move(next);
    keys_.use(std::move(keys));
    settings_ = std::move(settings);
  }

  // False if the backends of `settings` have too many names that no configuration had before: the ids of names last as
  // long as their counts, which is for the life of the process.
  bool has_names_for(const Settings& settings) const {
    const auto added = std::count_if(
        settings.backends.begin(), settings.backends.end(),
        [this](const BackendSettings& backend) { return backend_names_.find(backend.name) == BackendId::none; });
    return backend_names_.size() + static_cast<std::size_t>(added) <= kMaxBackendNames;
  }

  const Settings& settings() const { return *settings_; }
  std::vector<Backend>& backends() { return backends_; }
  const std::vector<Backend>& backends() const { return backends_; }
  const ModelNames& model_names() const { return models_; }
  const BackendNames& backend_names() const { return backend_names_; }
  KeyStates& keys() { return keys_; }
  const KeyStates& keys() const { return keys_; }

  // The backend that a check of `epoch` was for, or nullptr if it is gone.
  Backend* find_epoch(std::uint64_t epoch) {
    return find_if([&](const Backend& backend) { return backend.epoch == epoch; });
  }

  // Records a check's result. The first result sets the health, and so does the first good one; others change it after
  // `failures` or `recoveries` consecutive results.
  Transition note_check(Backend& backend, bool passed) {
    const Health seen = passed ? Health::healthy : Health::unhealthy;
    const HealthSettings& health = settings_->health;
    const bool first = backend.health == Health::unknown || (passed && !backend.was_up);
    const std::uint32_t needed = first ? 1 : passed ? health.recoveries : health.failures;
    backend.was_up |= passed;
    if (passed) backend.facts->forget_paths();
    if (backend.health == seen) backend.streak = 0;
    if (backend.health == seen || ++backend.streak < needed) return {false, backend.health, backend.health};
    backend.streak = 0;
    if (passed) backend.facts->forget();
    return {true, std::exchange(backend.health, seen), seen};
  }

  // Counts a check's result, or a lookup without an address, for the schedule. Returns the time until the next check: a
  // backend that is not up is checked after kFirstRecheck, doubled with each failure, at most after the interval.
  Ns next_check_in(Backend& backend, bool passed) const {
    constexpr std::uint32_t kDoublings = 20;
    const std::uint32_t failures =
        std::exchange(backend.failed_checks, passed ? 0 : std::min(backend.failed_checks + 1, kDoublings));
    backend.tried = passed ? 0 : backend.tried + 1;
    const Ns interval = settings_->health.interval_ns;
    const bool up = passed && backend.health == Health::healthy && backend.has_models();
    return up ? interval : std::min(interval, kFirstRecheck << (passed ? 0 : failures));
  }

  // Replaces the discovered models and drops duplicates. True if that changed anything.
  bool set_models(Backend& backend, ListedModels models) {
    const auto by_name = [](const ListedModel& a, const ListedModel& b) { return a.name < b.name; };
    const auto same_name = [](const ListedModel& a, const ListedModel& b) { return a.name == b.name; };
    std::stable_sort(models.begin(), models.end(), by_name);
    models.erase(std::unique(models.begin(), models.end(), same_name), models.end());
    if (backend.discovered != nullptr && models == *backend.discovered) return false;
    backend.discovered = std::make_shared<const ListedModels>(std::move(models));
    return true;
  }

  // The server at another address has shown nothing yet: one good check is enough.
  void set_address(Backend& backend, const Address& address) {
    if (backend.address == address) return;
    backend.circuit = std::make_shared<CircuitBreaker>(++servers_);
    backend.facts = std::make_shared<ServerFacts>();
    backend.address = address;
    backend.streak = 0;
    backend.was_up = false;
    if (backend.health == Health::unhealthy) backend.health = Health::unknown;
  }

  // The models that healthy backends have, each once; also one that is hidden, because an alias has its name.
  std::vector<ModelId> models_on_healthy() const {
    std::vector<ModelId> models;
    for (const Backend& backend : backends_) {
      if (!backend.is_up()) continue;
      backend.each_model([&](const std::string& model, const ListedModel*) { models.push_back(models_.find(model)); });
    }
    std::sort(models.begin(), models.end());
    models.erase(std::unique(models.begin(), models.end()), models.end());
    return models;
  }

  // A snapshot of the current state. The caller completes and publishes it.
  std::shared_ptr<Snapshot> snapshot() {
    auto made = std::make_shared<Snapshot>();
    made->version = ++version_;
    made->settings = settings_;
    made->keys = keys_.views();
    for (const Backend& backend : backends_) {
      made->backends.push_back(view_of(backend));
      made->any_vision_stated |= backend.settings.vision.stated;
      made->any_context_stated |= !backend.settings.context_length.empty();
      made->unchecked |= backend.health == Health::unknown;
      made->discovering |= !backend.has_models() && !backend.is_unresolved();
    }
    for (std::uint32_t i = 0; i < backends_.size(); ++i) {
      const BackendSettings& from = backends_[i].settings;
      made->any.offers.push_back({i, {}, nullptr});
      if (from.name == settings_->server.ollama_admin) made->admin = backends_[i].id;
      backends_[i].each_model([&](const std::string& model, const ListedModel* listed) {
        const Offer offer{i, capabilities_of(from, model), listed};
        entry(*made, model).offers.push_back(offer);
        if (const std::string other = other_name(from.kind, model); !other.empty()) {
          entry(*made, other).offers.push_back({i, offer.capabilities, listed, true});
        }
      });
    }
    for (const auto& [model, others] : settings_->fallbacks) {
      for (const std::string& other : others) entry(*made, other);
      entry(*made, model).fallbacks = others;
    }
    for (const auto& [alias, target] : settings_->aliases) {
      entry(*made, alias);
      entry(*made, target);
    }
    const std::unordered_map<std::string_view, std::string_view> aliases(settings_->aliases.begin(),
                                                                         settings_->aliases.end());
    for (const auto& [alias, first] : settings_->aliases) follow_alias(*made, aliases, alias);
    made->models_available = models_on_healthy().size();
    return made;
  }

 private:
  static bool is_same(const BackendSettings& a, const BackendSettings& b) {
    return a.name == b.name && a.kind == b.kind && a.address == b.address && a.base_path == b.base_path &&
           a.tls.on == b.tls.on;
  }

  template <class Matches>
  Backend* find_if(Matches&& matches) {
    const auto found = std::find_if(backends_.begin(), backends_.end(), matches);
    return found == backends_.end() ? nullptr : &*found;
  }

  // The entry of `model`, added if it is new.
  ModelEntry& entry(Snapshot& snapshot, const std::string& model) {
    auto [at, made] = snapshot.models.try_emplace(model);
    if (made) {
      at->second.id = at->second.target_id = models_.intern(model);
      at->second.name = at->second.target = model;
    }
    return at->second;
  }

  // An alias hides a model of the same name. The parser has refused loops and longer chains.
  void follow_alias(Snapshot& snapshot, const std::unordered_map<std::string_view, std::string_view>& aliases,
                    const std::string& alias) {
    std::string_view target = alias;
    for (std::uint32_t hops = 0; hops < kMaxAliasHops; ++hops) {
      const auto next = aliases.find(target);
      if (next == aliases.end()) break;
      target = next->second;
    }
    const ModelEntry& real = snapshot.models.find(target)->second;
    ModelEntry& entry = snapshot.models.find(alias)->second;
    entry.target = real.name;
    entry.target_id = real.id;
    entry.offers = real.offers;
    if (entry.fallbacks.empty()) entry.fallbacks = real.fallbacks;
  }

  BackendView view_of(const Backend& backend) const {
    const BackendSettings& from = backend.settings;
    BackendView view;
    view.id = backend.id;
    view.name = from.name;
    view.affinity = affinity_hash(from.name);
    view.address = backend.address;
    view.circuit = backend.circuit;
    view.facts = backend.facts;
    view.tls = from.tls.context;
    view.server = from.address;
    view.provider = provider_of(from.kind);
    view.base_path = from.base_path;
    view.has_key = !from.api_key.empty();
    view.request_lines = "Host: " + host_of(from) + "\r\n" + key_lines_of(from);
    view.response_line = "X-Nexus-Backend: " + from.name + "\r\n";
    view.priority = from.priority;
    view.max_pending = from.max_pending;
    view.apis = from.apis != 0 ? from.apis : row_of(from.kind).apis;
    view.ask_usage = from.stream_usage == StreamUsage::ask ||
                     (from.stream_usage == StreamUsage::by_kind && row_of(from.kind).takes_stream_options);
    view.healthy = backend.is_up();
    view.listed = backend.discovered;
    return view;
  }

  static bool has(const Capability& capability, std::string_view model, std::string_view other) {
    if (!capability.stated) return true;
    return std::any_of(capability.models.begin(), capability.models.end(),
                       [&](const std::string& listed) { return listed == "*" || listed == model || listed == other; });
  }

  static Capabilities capabilities_of(const BackendSettings& backend, std::string_view model) {
    Capabilities out;
    const std::string other = other_name(backend.kind, model);
    out.vision = has(backend.vision, model, other);
    out.tools = has(backend.tools, model, other);
    out.json_mode = has(backend.json_mode, model, other);
    for (const ContextLength& row : backend.context_length) {
      if (row.model == model || row.model == other || (row.model == "*" && out.context_tokens == 0))
        out.context_tokens = row.tokens;
    }
    return out;
  }

  std::shared_ptr<const Settings> settings_ = std::make_shared<Settings>();
  std::vector<Backend> backends_;
  ModelNames models_;
  BackendNames backend_names_;
  KeyStates keys_;
  std::uint64_t version_ = 0;
  std::uint64_t epochs_ = 0;
  std::uint64_t servers_ = 0;
};

}  // namespace nexus
