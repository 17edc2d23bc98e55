// key_states.h
// Owns:     what the requests of each client's key share, over all reloads: its turns, limits and id in the metrics.
// Promises: a key keeps its state while its name is in the file; the first [metrics] keys names that ever were in it
//           have ids of their own. The state of a key that was removed lasts as long as its requests.
// Leaves:   the file to config/key_file.h; using the state to proxy/client_key.h.
// Threads:  KeyStates: control's. A KeyState is shared; fair_queue.h and key_limits.h say how.
// Tested by: tests/registry_test.cpp, tests/hostile_reload_test.cpp
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nexus/base/limits.h"
#include "nexus/config/settings.h"
#include "nexus/fleet/fair_queue.h"
#include "nexus/fleet/key_limits.h"
#include "nexus/metrics/ids.h"

namespace nexus {

// The state that the requests of a key share; it lasts as long as the key's name is in the file, and as its requests.
struct KeyState {
  Flow flow;
  MinuteBucket requests, tokens;
  BackendId places{};  // what its max_pending counts on, for admission.h: no backend has this id
};

// A client's key as workers see it.
struct KeyView {
  KeyId id{};
  const ApiKey* settings = nullptr;  // the snapshot's
  std::shared_ptr<KeyState> state;
};

class KeyStates {
 public:
  using Views = std::shared_ptr<const std::vector<KeyView>>;

  KeyStates() { names_.intern("other"); }

  const KeyNames& names() const { return names_; }
  const Views& views() const { return views_; }  // in the order of [server] api_keys

  // The views for new settings, to be handed to use() once these are taken.
  Views views_of(const Settings& settings) {
    auto made = std::make_shared<std::vector<KeyView>>();
    made->reserve(settings.server.api_keys.size());
    std::unordered_map<std::string_view, const KeyView*> known;
    for (const KeyView& old : *views_) known.emplace(old.settings->name, &old);
    for (const ApiKey& key : settings.server.api_keys) {
      KeyId id = names_.find(key.name);
      if (id == KeyId::none && key.name != names_.name(KeyId::none)) {
        const bool room = names_.size() < settings.metrics.keys + kOwnKeyNames;
        id = room ? names_.intern(key.name) : KeyId::other;
      }
      const auto old = known.find(key.name);
      made->push_back({id, &key, old != known.end() ? old->second->state : make_state()});
    }
    return made;
  }
  void use(Views views) { views_ = std::move(views); }

  // Calls `forget(places)` for each key that is in no snapshot and of no request any more, until that returns true.
  template <class Forget>
  void forget_gone(Forget&& forget) {
    std::erase_if(made_, [&](const auto& key) { return key.second.expired() && forget(key.first); });
  }

 private:
  std::shared_ptr<KeyState> make_state() {
    auto state = std::make_shared<KeyState>();
    state->places = BackendId{kFirstKeyPlaces + count_++};
    made_.emplace_back(state->places, state);
    return state;
  }

  KeyNames names_{"none", kMaxKeyNames};
  Views views_ = std::make_shared<std::vector<KeyView>>();
  std::uint32_t count_ = 0;                                          // of states ever made
  std::vector<std::pair<BackendId, std::weak_ptr<KeyState>>> made_;  // until forget_gone() drops them
};

}  // namespace nexus
