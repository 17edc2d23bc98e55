// gateway.h
// Owns:     the Nexus under test: control, workers and what they share, assembled as in nexus/daemon.h, on SimNets.
// Promises: only the sockets, the clock and the process's own statistics are replaced; a loop runs only while turn() is
//           called for it.
// Leaves:   when each loop takes its turn to sim/simulation.h and hostile/gateway.cpp.
// Threads:  one.
// Tested by: tests/sim/main.cpp, tests/hostile_requests_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "nexus/server/control_checks.h"
#include "nexus/server/worker.h"
#include "tests/lib/faults.h"
#include "tests/lib/sim_net.h"

namespace nexus::sim {

using SimWorker = Worker<SimNet>;
using SimControl = Control<SimNet>;

constexpr std::uint32_t kMostWorkers = 3;

// The workers' log lines. Large, so they are kept from run to run.
using LogRings = std::array<LogRing, kMostWorkers>;

constexpr const char* kInstance = "nexus-51515151";  // in the Via field

class Gateway {
 public:
  Gateway(Wire& wire, std::shared_ptr<const Settings> settings, std::uint32_t workers, std::uint64_t seed,
          LogRings* rings = nullptr, Canary canary = Canary::none)
      : canary_(canary),
        budget_(settings->server.body_memory_bytes),
        admission_([this](std::uint32_t worker, Handle session) { grant(worker, session); }),
        shared_{metrics_, admission_, budget_, in_flight_, kInstance} {
    const bool in_checks = canary == Canary::check_lack_as_refusal;
    const bool in_requests = canary == Canary::lack_as_refusal || canary == Canary::refusal_as_lack ||
                             canary == Canary::flattered_status || canary == Canary::deaf_to_backends;
    for (std::uint32_t i = 0; i < workers; ++i) nets_.emplace_back(wire, i, canary);
    nets_.emplace_back(wire, workers, in_checks ? Canary::lack_as_refusal : in_requests ? Canary::none : canary);
    if (canary == Canary::keep_a_place) in_flight_ += 1;
    control_ = std::make_unique<SimControl>(nets_[workers], metrics_, metrics_.add_slab(), admission_, budget_, Log(),
                                            hooks(wire), wire.now());
    SnapshotPtr snapshot = first_ = control_->begin(settings);
    peers_.placement.loads = std::vector<WorkerLoad>(workers);
    peers_.ask_page = [this](std::uint32_t worker, Handle session, std::uint32_t number, WantedPage page) {
      return control_->post(SimControl::AskPage{worker, session, number, std::move(page)}) !=
             SimControl::Posted::no_memory;
    };
    shared_.ask_check = [this](BackendId backend) {
      if (control_ != nullptr) control_->post(SimControl::CheckSoon{backend});
    };
    for (std::uint32_t i = 0; i < workers; ++i) {
      Log log = rings == nullptr ? Log() : Log(&(*rings)[i], settings->log);
      workers_.push_back(std::make_unique<SimWorker>(nets_[i], shared_, metrics_.add_slab(), std::move(log), i,
                                                     seed + i, snapshot, peers_, wire.now()));
      peers_.workers.push_back(workers_.back().get());
      workers_.back()->add_listener(SimNet::listening_socket(), {.tls = wire.tls_clients != nullptr});
    }
    control_->set_workers(peers_.workers);
    control_->check_new_backends();
  }

  std::uint32_t loops() const { return static_cast<std::uint32_t>(nets_.size()); }
  std::uint32_t workers() const { return loops() - 1; }
  SimNet& net(std::uint32_t loop) { return nets_[loop]; }
  bool ended(std::uint32_t loop) const { return loop < workers() && workers_[loop]->stopped(); }
  // When this loop has something to do: in the past if it has now, kNever if it never will unless something happens.
  Ns due_at(std::uint32_t loop) const {
    const SimNet& net = nets_[loop];
    return ended(loop) ? kNever : net.waiting() || !net.slept() ? 0 : net.wait_until();
  }
  void turn(std::uint32_t loop) {
    if (loop < workers()) {
      workers_[loop]->turn();
    } else {
      control_->turn();
      if (canary_ != Canary::none) misbehave();
    }
  }

  void reload(std::shared_ptr<const Settings> settings) { control_->post(SimControl::Reload{std::move(settings)}); }
  // As reload(), but the worker is not woken: the snapshot lies in its mailbox.
  void reload_unnoticed(std::uint32_t worker, std::shared_ptr<const Settings> settings) {
    auto snapshot = std::make_unique<LocalSnapshot>(LocalSnapshot{control_->begin(std::move(settings)), 0});
    workers_[worker]->put(SimWorker::NewSnapshot{std::move(snapshot)});
  }
  void drain() {
    for (auto& worker : workers_) worker->post(SimWorker::Drain{});
  }
  void stop() {
    for (auto& worker : workers_) worker->post(SimWorker::Stop{});
  }
  bool workers_ended() const {
    for (const auto& worker : workers_) {
      if (!worker->stopped()) return false;
    }
    return true;
  }
  bool is_empty() const {
    for (const auto& worker : workers_) {
      if (worker->sessions().live() > 0 || worker->sessions().pool().open() > 0 || worker->armed_timers() > 0)
        return false;
    }
    return true;
  }
  // As at the daemon's end: each loop closes its remaining connections.
  void end_workers() {
    workers_.clear();
    peers_.workers.clear();
  }
  void end_control() { control_.reset(); }

  const std::vector<std::unique_ptr<SimWorker>>& each_worker() const { return workers_; }
  const SimControl& control() const { return *control_; }
  const Metrics& metrics() const { return metrics_; }
  const Admission& admission() const { return admission_; }
  const BodyBudget& budget() const { return budget_; }
  std::uint32_t in_flight() const { return in_flight_.load(std::memory_order_relaxed); }
  // Client connections as the placement counts them. Its total and the sum over its workers must agree.
  std::int64_t placed() const {
    std::int64_t held = 0;
    for (const WorkerLoad& load : peers_.placement.loads) held += load.connections.load(std::memory_order_relaxed);
    assert(held == peers_.placement.connections.load(std::memory_order_relaxed));
    return held;
  }

 private:
  // The process's statistics and the date must be the same in every run.
  static SimControl::Hooks hooks(const Wire& wire) {
    SimControl::Hooks hooks;
    hooks.pages.process_stats = [] { return ProcessStats{}; };
    hooks.pages.wall_time = [&wire] { return wire.now(); };
    return hooks;
  }

  // ---- defects on purpose ----

  void misbehave() {
    const Runs simulation(false);
    const Registry& registry = control_->registry();
    switch (canary_) {
      case Canary::stale_fleet: return put(first_);
      case Canary::eject_the_innocent: return eject(registry.backends().front());
      case Canary::raised_caps: return raise_caps(registry);
      case Canary::no_retries: {
        auto settings = std::make_shared<Settings>(*control_->published()->settings);
        settings->routing.retries = 0;
        auto altered = copy_of_published();
        altered->settings = std::move(settings);
        return put(std::move(altered));
      }
      case Canary::twin_backends: return put(with_twins());
      case Canary::blind_to_ejection: {
        if (std::none_of(registry.backends().begin(), registry.backends().end(),
                         [this](const auto& backend) { return backend.circuit->ejection(control_now()).has_value(); }))
          return;
        auto altered = copy_of_published();
        for (BackendView& view : altered->backends) {
          view.circuit = std::make_shared<CircuitBreaker>(view.circuit->server());
        }
        return put(std::move(altered));
      }
      default: return;
    }
  }
  Ns control_now() const { return nets_.back().now(); }

  // In the workers' mailboxes, as if it were newer than what was published.
  void put(const SnapshotPtr& snapshot) {
    for (auto& worker : workers_) {
      worker->put(SimWorker::NewSnapshot{std::make_unique<LocalSnapshot>(LocalSnapshot{snapshot, 0})});
    }
  }
  std::shared_ptr<Snapshot> copy_of_published() const { return std::make_shared<Snapshot>(*control_->published()); }
  std::shared_ptr<Snapshot> with_twins() const {
    auto altered = copy_of_published();
    const auto count = static_cast<std::uint32_t>(altered->backends.size());
    for (std::uint32_t i = 0; i < count; ++i) {
      altered->backends.push_back(altered->backends[i]);
      constexpr std::uint64_t kTwin = 1u << 20;
      altered->backends.back().circuit =
          std::make_shared<CircuitBreaker>(kTwin + altered->backends[i].circuit->server());
    }
    for (auto& [name, entry] : altered->models) {
      for (std::size_t i = 0, offers = entry.offers.size(); i < offers; ++i) {
        entry.offers.push_back(entry.offers[i]);
        entry.offers.back().backend += count;
      }
    }
    return altered;
  }
  void eject(const Registry::Backend& backend) const {
    const HealthSettings& health = control_->registry().settings().health;
    for (std::uint32_t i = 0; i < health.eject_after; ++i) {
      backend.circuit->enter(control_now()).failed(control_now(), health, AttemptOutcome::status_5xx);
    }
  }
  void raise_caps(const Registry& registry) {
    std::vector<Admission::Cap> caps;
    for (const Registry::Backend& backend : registry.backends()) {
      const std::uint32_t cap = backend.settings.max_pending;
      caps.push_back({backend.id, cap == 0 ? 0 : cap + 1});
    }
    admission_.configure(caps, registry.settings().queue.size);
  }

  void grant(std::uint32_t worker, Handle session) {
    if (canary_ == Canary::late_grant && held_back_ == std::nullopt) {
      held_back_ = {worker, session};
      return;
    }
    peers_.workers[worker]->grant(session);
    if (held_back_ == std::nullopt || ++overtaken_by_ < 4) return;
    peers_.workers[held_back_->first]->grant(held_back_->second);
    held_back_.reset();
    overtaken_by_ = 0;
  }

  const Canary canary_;
  SnapshotPtr first_;
  std::optional<std::pair<std::uint32_t, Handle>> held_back_;  // a grant
  std::uint32_t overtaken_by_ = 0;
  Metrics metrics_;
  BodyBudget budget_;
  SimWorker::Peers peers_;
  Admission admission_;
  std::atomic<std::uint32_t> in_flight_{0};
  Shared shared_;
  std::deque<SimNet> nets_;  // the workers', then control's
  std::unique_ptr<SimControl> control_;
  std::vector<std::unique_ptr<SimWorker>> workers_;
};

}  // namespace nexus::sim
