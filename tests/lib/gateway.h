// gateway.h
// Owns:     the Nexus under test: control, workers and what they share, assembled as in nexus/daemon.h, on SimNets.
// Promises: only the sockets, the clock and the process's own statistics are replaced; a loop runs only while turn() is
//           called for it.
// Leaves:   when each loop takes its turn to sim/simulation.h and hostile/gateway.cpp.
// Threads:  one.
// Tested by: tests/sim/main.cpp, tests/hostile_requests_test.cpp
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <vector>

#include "nexus/server/control.h"
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
        admission_([this](std::uint32_t worker, Handle session) { peers_.workers[worker]->grant(session); }),
        shared_{metrics_, admission_, budget_, in_flight_, kInstance} {
    for (std::uint32_t i = 0; i <= workers; ++i) nets_.emplace_back(wire, i, canary);
    control_ = std::make_unique<SimControl>(nets_[workers], metrics_, metrics_.add_slab(), admission_, budget_, Log(),
                                            hooks(wire), wire.now());
    SnapshotPtr snapshot = first_ = control_->begin(settings);
    peers_.placement.loads = std::vector<WorkerLoad>(workers);
    peers_.ask_page = [this](std::uint32_t worker, Handle session, std::uint32_t number, PageKind kind) {
      return control_->post(SimControl::AskPage{worker, session, number, kind}) != SimControl::Posted::no_memory;
    };
    shared_.ask_check = [this](BackendId backend) {
      if (control_ != nullptr) control_->post(SimControl::CheckSoon{backend});
    };
    for (std::uint32_t i = 0; i < workers; ++i) {
      Log log = rings == nullptr ? Log() : Log(&(*rings)[i], settings->log);
      workers_.push_back(std::make_unique<SimWorker>(nets_[i], shared_, metrics_.add_slab(), std::move(log), i,
                                                     seed + i, snapshot, peers_, wire.now()));
      peers_.workers.push_back(workers_.back().get());
      workers_.back()->add_listener(SimNet::listening_socket(), false);
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
      if (canary_ == Canary::stale_fleet) go_back();
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

  void go_back() {
    const Runs simulation(false);  // its memory does not fail
    for (auto& worker : workers_) {
      worker->put(SimWorker::NewSnapshot{std::make_unique<LocalSnapshot>(LocalSnapshot{first_, 0})});
    }
  }

  const Canary canary_;
  SnapshotPtr first_;
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
