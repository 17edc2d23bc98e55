// client_key.h
// Owns:     the client's key of one request: its id and name, and its unit of nexus_key_pending.
// Promises: the key is the one that the request came with, whatever a reload does to the file meanwhile; what it holds
//           is given back by leave(), or by the destructor.
// Leaves:   finding the key to server/client_keys.h; counting the request to exchange.h.
// Threads:  its worker's.
// Tested by: tests/e2e/keys.test.mjs, tests/sim, tests/hostile_reload_test.cpp
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

#include "nexus/fleet/admission.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {

class ClientKey {
 public:
  KeyId id() const { return view_ == nullptr ? KeyId::none : view_->id; }
  std::string_view name() const { return view_ == nullptr ? std::string_view() : view_->name; }

  // `index`: of the key in the snapshot's api_keys, if the request has one.
  template <class Net>
  void enter(WorkerContext<Net>& context, std::optional<std::size_t> index) {
    if (index) {
      snapshot_ = context.snapshot.again();
      view_ = &(*snapshot_->keys)[*index];
    }
    count_ = count_key(context.slab, id());
  }

  // The request is over. Its id and name stay until forget().
  void leave() { count_.reset(); }

  // Prepares for the next request.
  void forget() {
    view_ = nullptr;
    snapshot_ = SnapshotUse();
  }

 private:
  SnapshotUse snapshot_;  // of view_
  const KeyView* view_ = nullptr;
  KeyCount count_;
};

}  // namespace nexus
