// at_rest.h
// Owns:     the oracle for memory and places: at rest, every budget, place, pending count and trial is given back.
// Promises: left_over() names the first thing that is not; it changes nothing.
// Leaves:   bringing the gateway to rest to sim/simulation.h and hostile/gateway.cpp.
// Threads:  one.
// Tested by: tests/bounds_test.cpp
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "tests/lib/gateway.h"

namespace nexus::sim {

// True if no client has sent a byte of a request that is not answered whole.
inline bool is_at_rest(const Gateway& gateway) {
  bool rests = true;
  for (const auto& worker : gateway.each_worker()) {
    worker->sessions().each([&](const auto& session) {
      rests &= session.state == SessionState::reading_head && session.input.empty() && !session.head_input.started();
    });
  }
  return rests;
}

// Lists each thing that is not given back, with its amount; empty if everything is. REQUIRES: is_at_rest().
class LeftOver {
 public:
  explicit LeftOver(const Gateway& gateway) : gateway_(gateway) {
    look_at_backends();
    look_at_workers();
    look_at_keys();
    note("requests in the queue", gateway.admission().waiting());
    note("places of [server] max_pending", gateway.in_flight());
    note("bytes of bodies", gateway.budget().held());
    note("bytes of unsent pages", gateway.control().unsent_page_bytes());
  }
  const std::string& text() const { return text_; }

 private:
  void note(std::string_view what, std::uint64_t amount, std::string_view where = {}) {
    if (amount == 0 || !text_.empty()) return;
    text_.append("left over: ").append(what).append(" = ").append(std::to_string(amount));
    if (!where.empty()) text_.append(" of ").append(where);
  }

  void look_at_backends() {
    const Registry& registry = gateway_.control().registry();
    const BackendNames& names = registry.backend_names();
    for (std::uint32_t i = 0; i < names.size(); ++i) {
      const BackendId id{i};
      std::uint64_t pending = 0, queued = 0;  // sums over the workers; a negative one is as wrong as a positive one
      for (const auto& slab : gateway_.metrics().slabs()) {
        const BackendCounters* cells = slab->backend(id);
        if (cells == nullptr) continue;
        pending += cells->pending.read();
        queued += cells->queue_depth.read();
      }
      note("requests pending", pending, names.name(id));
      note("requests queued", queued, names.name(id));
      note("places taken", gateway_.admission().running_on(id), names.name(id));
    }
    for (const Registry::Backend& backend : registry.backends()) {
      note("trials", backend.circuit->probing(), backend.settings.name);
    }
  }

  void look_at_keys() {
    const Registry& registry = gateway_.control().registry();
    for (std::uint32_t i = 0; i < registry.keys().names().size(); ++i) {
      std::uint64_t of_key = 0;
      for (const auto& slab : gateway_.metrics().slabs()) {
        if (const KeyCounters* cells = slab->key(KeyId{i})) of_key += cells->pending.read();
      }
      note("requests pending of a key", of_key, registry.keys().names().name(KeyId{i}));
    }
    for (const KeyView& key : *registry.keys().views()) {
      note("places of a key taken", gateway_.admission().running_on(key.state->places), key.settings->name);
    }
  }

  void look_at_workers() {
    for (const auto& worker : gateway_.each_worker()) {
      note("tables of fields and readers of bodies", worker->taken_objects());
      const std::size_t blocks = worker->taken_bytes();
      note("bytes in blocks", blocks > kRoomyBlock ? blocks : 0);  // a worker keeps its scratch block
      worker->sessions().each([&](const auto& session) {
        const std::size_t kept = session.kept_bytes();
        note("bytes with an idle connection", kept > kIdleSessionBytes ? kept : 0);
      });
    }
  }

  const Gateway& gateway_;
  std::string text_;
};

inline std::string left_over(const Gateway& gateway) { return LeftOver(gateway).text(); }

}  // namespace nexus::sim
