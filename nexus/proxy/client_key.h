// client_key.h
// Owns:     the client's key of one request: its id and name, its unit of nexus_key_pending, and its claim to a turn.
// Promises: the key is the one that the request came with, whatever a reload does to the file meanwhile; what it holds
//           is given back by leave(), or by the destructor.
// Leaves:   finding the key to server/client_keys.h; counting the request to exchange.h.
// Threads:  its worker's.
// Tested by: tests/e2e/keys.test.mjs, tests/sim, tests/hostile_reload_test.cpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "nexus/fleet/admission.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {

class ClientKey {
 public:
  KeyId id() const { return view_ == nullptr ? KeyId::none : view_->id; }
  std::string_view name() const { return view_ == nullptr ? std::string_view() : view_->settings->name; }

  // `index`: of the key in the snapshot's api_keys, if the request has one; `host`: a number of the client's host.
  template <class Net>
  void enter(WorkerContext<Net>& context, std::optional<std::size_t> index, std::size_t host) {
    host_ = host;
    if (index) {
      snapshot_ = context.snapshot.again();
      view_ = &(*snapshot_->keys)[*index];
    }
    count_ = count_key(context.slab, id());
  }

  // The request looks for a backend: its claim, for all its attempts.
  template <class Net>
  Claim& claim(WorkerContext<Net>& context, std::size_t body_bytes) {
    const Settings& settings = context.settings();
    KeylessFlows& keyless = context.shared.keyless;
    const KeyOptions& options = view_ == nullptr ? settings.keys.defaults : view_->settings->options;
    claim_.flow = view_ != nullptr                           ? &view_->state->flow
                  : settings.keys.fair_by == FairBy::address ? &keyless.by_address[host_ % kAddressFlows]
                                                             : &keyless.all;
    claim_.weight = view_ == nullptr ? 1 : static_cast<std::uint32_t>(options.weight);
    claim_.priority = static_cast<std::uint32_t>(options.priority);
    claim_.cost = fair_cost(body_bytes / kBytesPerToken, 0);
    claim_.now_ns = context.now;
    claim_.aged_after_ns = settings.queue.timeout_ns / 2;
    claim_.charged = false;
    return claim_;
  }

  // The request is over, and holds no place. What it has cost is known now, or what is estimated stands if it was
  // served. Its id and name stay until forget().
  void leave(Admission& admission, const RequestRecord& record) {
    count_.reset();
    if (!claim_.charged) return;
    const bool told = record.prompt_tokens >= 0 || record.completion_tokens >= 0;
    const auto tokens = [](std::int64_t count) { return static_cast<std::uint64_t>(std::max<std::int64_t>(count, 0)); };
    const std::uint64_t cost = told ? fair_cost(tokens(record.prompt_tokens), tokens(record.completion_tokens))
                               : record.status / 100 == 2 ? claim_.cost
                                                          : 0;
    admission.settle(claim_, cost);
  }

  // Prepares for the next request.
  void forget() {
    claim_ = Claim();
    view_ = nullptr;
    snapshot_ = SnapshotUse();
  }

 private:
  SnapshotUse snapshot_;  // of view_
  const KeyView* view_ = nullptr;
  KeyCount count_;
  Claim claim_;
  std::size_t host_ = 0;
};

}  // namespace nexus
