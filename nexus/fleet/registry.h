// registry.h
// Owns:     the backends, what is known of each (health, models, address), and the snapshot of it that workers read.
// Promises: a snapshot is immutable and complete: names resolved, aliases followed, ids given; ids outlive backends;
//           a reload keeps what is known of a backend whose url and type did not change.
// Leaves:   asking the backends to prober.h; choosing among them to router.h.
// Threads:  the Registry belongs to the control thread; snapshots are shared as std::shared_ptr<const Snapshot>.
#pragma once

#include <algorithm>
#include <cassert>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "nexus/config/settings.h"
#include "nexus/metrics/ids.h"
#include "nexus/net/epoll.h"

namespace nexus {

constexpr std::size_t kMaxModelNames = 20'000;   // over the process's life; what comes after is counted as `unknown`
constexpr std::size_t kMaxBackendNames = 4'096;  // the same for backends, over all reloads
constexpr std::size_t kMaxModelsPerBackend = 10'000;

enum class Health : std::uint8_t { unknown, healthy, unhealthy };

// What a model on a backend can do, as configured. A request needs a set of them.
struct Capabilities {
  bool vision = true;
  bool tools = true;
  bool json_mode = true;
  std::uint64_t context_tokens = 0;  // 0: not stated

  bool operator==(const Capabilities&) const = default;
};

// A backend as workers see it.
struct BackendView {
  BackendId id{};
  std::string name;
  BackendKind kind = BackendKind::generic;
  std::optional<Address> address;  // nothing while its host name is not resolved
  std::string base_path;
  std::string request_lines;  // of every request to it: Host, and Authorization where it has a key
  std::string answer_line;    // of every answer of it: X-Nexus-Backend
  bool has_key = false;
  std::uint32_t priority = 50;
  std::uint32_t max_pending = 0;
  bool ask_usage = false;
  bool healthy = false;
};

// A model that a backend offers.
struct Offer {
  std::uint32_t backend = 0;  // index into Snapshot::backends
  Capabilities capabilities;
};

// A name that a client may ask for.
struct ModelEntry {
  ModelId id{};
  std::string name;
  std::string target;  // after aliases: the name that backends know (`name` itself where it is no alias)
  ModelId target_id{};
  std::vector<Offer> offers;           // of `target`, in the order of the configuration; unhealthy backends too
  std::vector<std::string> fallbacks;  // models to try when none of the offers will do

  bool is_alias() const { return name != target; }
};

struct Snapshot {
  std::uint64_t version = 0;
  std::shared_ptr<const Settings> settings;
  std::vector<BackendView> backends;
  std::unordered_map<std::string, ModelEntry, StringHash, std::equal_to<>> models;
  bool any_vision_stated = false;  // some backend states which of its models see images
  bool discovering = false;        // some backend was not asked yet: a model that is not here may still turn up
  std::string models_page;         // what GET /v1/models answers, made once for all who ask

  const ModelEntry* find(std::string_view model) const {
    auto found = models.find(model);
    return found == models.end() ? nullptr : &found->second;
  }
};

using SnapshotPtr = std::shared_ptr<const Snapshot>;

// What a backend is called in a Host field: host[:port], an IPv6 address in brackets.
inline std::string host_of(const BackendSettings& backend) {
  const auto& [host, port] = backend.address;
  if (host.empty()) return "localhost";
  return port == 80 ? url_host(host) : host_port(host, port);
}

class Registry {
 public:
  struct Backend {
    BackendSettings settings;
    BackendId id{};
    Health health = Health::unknown;
    std::uint32_t streak = 0;             // failures (healthy) or successes (unhealthy) in a row
    std::vector<std::string> discovered;  // models, where the configuration lists none
    std::optional<Address> address;
    std::uint64_t epoch = 0;  // tells a check of an earlier life of this backend apart

    const std::vector<std::string>& models() const { return settings.models.empty() ? discovered : settings.models; }
  };

  struct Transition {
    bool changed = false;  // the snapshot must be made anew
    Health from = Health::unknown;
    Health to = Health::unknown;
  };

  Registry() : models_("unknown", kMaxModelNames), backend_names_("none", kMaxBackendNames) {}

  // Takes the configuration over. Backends of the same name, type and url keep their health, models and address.
  // Where memory is short it throws, and all is as it was.
  void configure(std::shared_ptr<const Settings> settings) {
    std::vector<Backend> next;
    std::vector<Backend*> known;
    next.reserve(settings->backends.size());
    known.reserve(settings->backends.size());
    for (const BackendSettings& wanted : settings->backends) {
      Backend& backend = next.emplace_back();
      backend.settings = wanted;
      known.push_back(find(wanted.name));
      if (known.back() != nullptr && same_place(known.back()->settings, wanted)) continue;
      known.back() = nullptr;
      backend.id = backend_names_.intern(wanted.name);
      backend.epoch = ++epochs_;
      backend.address = parse_address(wanted.address.host, wanted.address.port);
    }
    for (std::size_t i = 0; i < next.size(); ++i) {
      if (known[i] != nullptr) {
        std::swap(next[i].settings, known[i]->settings);
        next[i] = std::move(*known[i]);
      }
      if (!settings->health.enabled) next[i].health = Health::healthy;
    }
    backends_ = std::move(next);
    settings_ = std::move(settings);
  }

  const Settings& settings() const { return *settings_; }
  std::vector<Backend>& backends() { return backends_; }
  const std::vector<Backend>& backends() const { return backends_; }
  const ModelNames& model_names() const { return models_; }
  const BackendNames& backend_names() const { return backend_names_; }

  // The backend that a check of `epoch` was for, or nullptr when it is gone.
  Backend* find_epoch(std::uint64_t epoch) {
    for (Backend& backend : backends_) {
      if (backend.epoch == epoch) return &backend;
    }
    return nullptr;
  }

  // Takes in how a check ended: unknown follows the first result, a change of mind takes `failures` or `recoveries`
  // results in a row.
  Transition note_check(Backend& backend, bool passed) {
    Transition result;
    result.from = backend.health;
    const Health seen = passed ? Health::healthy : Health::unhealthy;
    if (backend.health == seen) {
      backend.streak = 0;
    } else {
      backend.streak += 1;
      const std::uint32_t needed = backend.health == Health::unknown ? 1
                                   : passed                          ? settings_->health.recoveries
                                                                     : settings_->health.failures;
      if (backend.streak >= needed) {
        backend.health = seen;
        backend.streak = 0;
        result.changed = true;
      }
    }
    result.to = backend.health;
    return result;
  }

  // Replaces the discovered models as a whole; true where that changed anything. Duplicates are dropped.
  bool set_models(Backend& backend, std::vector<std::string> names) {
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
    if (names == backend.discovered) return false;
    backend.discovered = std::move(names);
    return true;
  }

  bool set_address(Backend& backend, const Address& address) {
    if (backend.address == address) return false;
    backend.address = address;
    return true;
  }

  // What the workers are to see from now on; the caller adds models_page before it shares it.
  std::shared_ptr<Snapshot> snapshot() {
    auto made = std::make_shared<Snapshot>();
    made->version = ++version_;
    made->settings = settings_;
    for (const Backend& backend : backends_) {
      made->backends.push_back(view_of(backend));
      made->any_vision_stated |= backend.settings.vision.stated;
      made->discovering |= backend.health == Health::unknown && backend.models().empty();
    }
    for (std::uint32_t i = 0; i < backends_.size(); ++i) {
      for (const std::string& model : backends_[i].models()) {
        entry(*made, model).offers.push_back(Offer{i, capabilities_of(backends_[i].settings, model)});
      }
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
    return made;
  }

 private:
  static bool same_place(const BackendSettings& a, const BackendSettings& b) {
    return a.kind == b.kind && a.address == b.address && a.base_path == b.base_path;
  }

  Backend* find(std::string_view name) {
    for (Backend& backend : backends_) {
      if (backend.settings.name == name) return &backend;
    }
    return nullptr;
  }

  ModelEntry& entry(Snapshot& snapshot, const std::string& model) {
    auto [at, made] = snapshot.models.try_emplace(model);
    if (made) {
      at->second.id = at->second.target_id = models_.intern(model);
      at->second.name = at->second.target = model;
    }
    return at->second;
  }

  // The configuration holds no loop of aliases and no longer chain; an alias shadows a model of its name.
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
    view.kind = from.kind;
    view.address = backend.address;
    view.base_path = from.base_path;
    view.has_key = !from.api_key.empty();
    view.request_lines = "Host: " + host_of(from) + "\r\n";
    if (view.has_key) view.request_lines += "Authorization: Bearer " + from.api_key + "\r\n";
    view.answer_line = "X-Nexus-Backend: " + from.name + "\r\n";
    view.priority = from.priority;
    view.max_pending = from.max_pending;
    view.ask_usage = from.stream_usage == StreamUsage::ask ||
                     (from.stream_usage == StreamUsage::by_kind && row_of(from.kind).takes_stream_options);
    view.healthy = backend.health == Health::healthy && backend.address.has_value();
    return view;
  }

  static bool lists(const Capability& capability, std::string_view model) {
    if (!capability.stated) return true;
    return std::any_of(capability.models.begin(), capability.models.end(),
                       [&](const std::string& listed) { return listed == "*" || listed == model; });
  }

  static Capabilities capabilities_of(const BackendSettings& backend, std::string_view model) {
    Capabilities out;
    out.vision = lists(backend.vision, model);
    out.tools = lists(backend.tools, model);
    out.json_mode = lists(backend.json_mode, model);
    for (const ContextLength& row : backend.context_length) {
      if (row.model == model || (row.model == "*" && out.context_tokens == 0)) out.context_tokens = row.tokens;
    }
    return out;
  }

  std::shared_ptr<const Settings> settings_ = std::make_shared<Settings>();
  std::vector<Backend> backends_;
  ModelNames models_;
  BackendNames backend_names_;
  std::uint64_t version_ = 0;
  std::uint64_t epochs_ = 0;
};

}  // namespace nexus
