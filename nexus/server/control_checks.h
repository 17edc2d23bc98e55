// control_checks.h
// Owns:     what the control thread concludes from the end of a lookup and of a check: addresses, health, models, lacks
// of
//           this host, and the log lines about them.
// Promises: a change that workers must see leads to a new snapshot; a lack of this host says nothing about a backend.
// Leaves:   the schedule to control.h, the state to fleet/registry.h. Users of Control include this.
// Threads:  control's.
// Tested by: tests/e2e/health.test.mjs, tests/e2e/fleet_hosts.test.mjs, tests/sim
#pragma once

#include "nexus/server/control.h"

namespace nexus {

template <class Net>
void Control<Net>::on_resolved(std::uint64_t epoch, const std::vector<Address>& addresses, const std::string& error) {
  if (spans_.is_own(epoch)) return spans_.on_resolved(epoch, addresses, error, now_);
  Registry::Backend* backend = registry_.find_epoch(epoch);
  if (backend == nullptr) return;
  backend->looking_up = false;
  const bool had_failed = std::exchange(backend->lookup_failed, addresses.empty());
  if (addresses.empty()) {
    log_.event(had_failed ? LogLevel::debug : LogLevel::warning, "DNS lookup failed",
               {{"backend", backend->settings.name}, {"host", backend->settings.address.host}, {"why", error}});
    if (!backend->address) note_unresolved(*backend, error);
    return;
  }
  const bool in_use =
      backend->address && std::find(addresses.begin(), addresses.end(), *backend->address) != addresses.end();
  if (backend->address && !in_use && !error.empty()) return;
  const bool changed = std::exchange(backend->addresses, addresses) != addresses;
  if (in_use && !(changed && backend->checking)) return;  // it stays, and so do the connections to it
  if (!in_use) use_address(*backend, addresses.front());
  check_anew(*backend);  // the one that runs may pass at an address that is gone
}

template <class Net>
void Control<Net>::note_models(Registry::Backend& backend, ProbeResult& result) {
  const std::string_view name = backend.settings.name;
  if (result.models_cut) slab_.limit_hit(Limit::models);
  const auto before = backend.discovered;
  if (result.models_read && registry_.set_models(backend, std::move(result.models))) {
    unpublished_ = true;
    log_.event(LogLevel::info, "backend models changed",
               {{"backend", name}, {"changed", changed_models(before.get(), *backend.discovered)}});
  }
  if (result.reason == backend.list_remark) return;
  backend.list_remark = result.reason;
  if (result.reason.empty()) return;
  log_.event(LogLevel::warning, result.models_read ? "model list incomplete" : "model list refresh failed",
             {{"backend", name}, {"why", result.reason}});
}

template <class Net>
void Control<Net>::note_lack(const ProbeResult& result) {
  if (result.lack == lack_of(SocketOutcome::no_memory)) slab_.limit_hit(Limit::memory);
  if (result.lack == lack_of(SocketOutcome::no_descriptor)) slab_.limit_hit(Limit::descriptors);
  if (result.lack == lack_of(SocketOutcome::no_port)) slab_.limit_hit(Limit::ports);
  if (now_ < next_lack_log_ns_) return;
  next_lack_log_ns_ = now_ + kLackLogInterval;
  log_.event(LogLevel::warning, "cannot check backends", {{"why", result.lack}});
}

template <class Net>
void Control<Net>::note_health(Registry::Backend& backend, const ProbeResult& result) {
  const Registry::Transition transition = registry_.note_check(backend, result.passed);
  const std::string_view name = backend.settings.name;
  if (transition.changed) unpublished_ = true, backend.changed_ns = now_;
  if (transition.changed && result.passed) {
    log_.event(LogLevel::info, "backend is healthy", {{"backend", name}});
  } else if (!result.passed) {
    log_.event(transition.changed ? LogLevel::warning : LogLevel::debug,
               transition.changed ? "backend is unhealthy" : "health check failed",
               {{"backend", name}, {"why", backend.problem}});
  }
}

}  // namespace nexus
