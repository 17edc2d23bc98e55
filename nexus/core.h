// core.h
// Owns:     what the parts of one worker share: its net, timers, memory, counters, scratch space and snapshot.
// Promises: one worker thread uses it, so nothing in it locks; what all threads share is in Shared, named as such.
// Leaves:   everything that happens to pool.h, exchange.h and server.h.
// Threads:  Core: one worker's. Shared: every worker's, see each member's own header.
#pragma once

#include <cassert>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "admission.h"
#include "budget.h"
#include "bytes.h"
#include "ejection.h"
#include "fields.h"
#include "json.h"
#include "log.h"
#include "metrics.h"
#include "registry.h"
#include "router.h"
#include "spares.h"
#include "timers.h"

namespace nexus {

struct Shared {
  Metrics& metrics;
  Ejector& ejector;
  Admission& admission;
  BodyBudget& body_budget;
  std::string instance;  // this process in a Via field: `nexus-` and eight hex digits
};

// A snapshot in use by one worker, counted without atomics: exchanges hold on to the one they began with.
struct LocalSnapshot {
  SnapshotPtr ptr;
  std::uint32_t users = 0;
};

class SnapshotUse {
 public:
  SnapshotUse() = default;
  explicit SnapshotUse(LocalSnapshot* local) : local_(local) {
    if (local_ != nullptr) local_->users += 1;
  }
  SnapshotUse(SnapshotUse&& other) noexcept : local_(std::exchange(other.local_, nullptr)) {}
  SnapshotUse& operator=(SnapshotUse&& other) noexcept {
    SnapshotUse taken(std::move(other));
    std::swap(local_, taken.local_);
    return *this;
  }
  ~SnapshotUse() {
    if (local_ == nullptr) return;
    local_->users -= 1;
    if (local_->users == 0) delete local_;  // the current one has its Core as a user
  }
  const Snapshot* operator->() const { return local_->ptr.get(); }
  const Snapshot& operator*() const { return *local_->ptr; }
  explicit operator bool() const { return local_ != nullptr; }
  SnapshotUse again() const { return SnapshotUse(local_); }

 private:
  LocalSnapshot* local_ = nullptr;
};

// xorshift64*: for request ids and the order of equal candidates, not for secrets.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed | 1) {}
  std::uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 2685821657736338717ull;
  }

 private:
  std::uint64_t state_;
};

template <class Net>
struct Core {
  Core(Net& net_in, Shared& shared_in, Slab& slab_in, Log& log_in, std::uint32_t worker_in, std::uint64_t seed,
       SnapshotPtr snapshot_in)
      : net(net_in),
        shared(shared_in),
        slab(slab_in),
        log(log_in),
        worker(worker_in),
        now(net_in.now()),
        wheel(now),
        tables(64),
        budget(shared_in.body_budget),
        random(seed) {
    use(std::move(snapshot_in));
  }

  void use(SnapshotPtr next) { snapshot = SnapshotUse(new LocalSnapshot{std::move(next), 0}); }
  const Settings& settings() const { return *snapshot->settings; }

  // Room to read an answer into; empty where memory is short.
  char* scratch() {
    if (!scratch_block) scratch_block = blocks.take(kRoomyBlock);
    return scratch_block.data();
  }
  std::size_t scratch_bytes() const { return scratch_block.capacity(); }

  // Asks the worker to call on `session` once more in this turn, after the events of others.
  void call_again(Token session) { again.push_back(session); }

  // Time to first byte of a backend as this thread saw it, smoothed (1/8 of each new one).
  Ns latency_of(BackendId id) const { return index_of(id) < latency.size() ? latency[index_of(id)] : 0; }
  void note_latency(BackendId id, Ns seen) {
    if (index_of(id) >= latency.size()) latency.resize(index_of(id) + 1, 0);
    Ns& smoothed = latency[index_of(id)];
    smoothed = smoothed == 0 ? seen : smoothed + (seen - smoothed) / 8;
  }

  Net& net;
  Shared& shared;
  Slab& slab;
  Log& log;
  std::uint32_t worker;
  Ns now;  // read when a wait ends
  TimerWheel wheel;
  BlockPool blocks;
  Block scratch_block;
  Spares<FieldTable> tables;
  JsonReader json;
  ThreadBudget budget;
  Random random;
  SnapshotUse snapshot;
  std::uint64_t turn = 0;  // requests routed
  bool draining = false;
  std::vector<Ns> latency;      // by BackendId
  std::vector<Choice> choices;  // of the route being picked
  std::vector<Token> again;
  std::string text;  // heads and errors are written here
};

}  // namespace nexus
