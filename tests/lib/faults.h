// faults.h
// Owns:     the failures inside Nexus: allocations, at random or the n-th one, and the n-th system call.
// Promises: nothing fails except in Nexus's own code during its turn, so the simulation itself always has memory;
//           allocations that are not freed are counted. Nothing fails unless a run asks for it.
// Leaves:   replacing malloc and operator new to sim/faults.cpp, which only the simulator links; what a failed call
//           does to a connection to sim_net.h.
// Threads:  one.
// Tested by: tests/sim/every_failure.h
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "tests/lib/dice.h"

namespace nexus::sim {

enum class Call : std::uint8_t { accept, connect, connect_error, watch, watch_listener, read, write };

struct Faults {
  bool in_nexus = false;
  Rate memory;  // how often an allocation fails at random
  Dice* dice = nullptr;
  // Which allocation or call of a run fails, counted from 1; 0: none.
  std::uint64_t failing_allocation = 0;
  std::uint64_t failing_call = 0;
  int call_error = 0;
  // What has happened so far.
  std::uint64_t allocations = 0;  // of Nexus's
  std::uint64_t calls = 0;
  std::vector<Call>* call_list = nullptr;  // if set, receives the kind of each call
  bool failed = false;                     // the n-th one was reached
  std::int64_t live = 0;                   // allocations not freed yet, including the simulation's own
};
inline Faults& faults() {
  static Faults state;
  return state;
}
bool allocation_fails();  // sim/faults.cpp

// Counts a call. Returns the errno with which it is to fail, or 0.
inline int call_fails(Call call) {
  Faults& state = faults();
  state.calls += 1;
  if (state.call_list != nullptr) state.call_list->push_back(call);
  if (state.calls != state.failing_call) return 0;
  state.failed = true;
  return state.call_error;
}

// While one of these lives, Nexus is running (or, nested in that, the simulation again).
class Runs {
 public:
  explicit Runs(bool nexus) : before_(std::exchange(faults().in_nexus, nexus)) {}
  Runs(const Runs&) = delete;
  Runs& operator=(const Runs&) = delete;
  ~Runs() { faults().in_nexus = before_; }

 private:
  bool before_;
};

}  // namespace nexus::sim
