// faults.h
// Owns:     what fails inside Nexus: allocations of every kind, by chance or the n-th one, and the n-th system call.
// Promises: nothing fails but in code of Nexus's own, while it takes its turn: the simulation always has memory; what
//           was allocated and not given back is counted.
// Leaves:   the functions that are replaced to faults.cpp: malloc by the linker (--wrap), operator new by the language;
//           what a failed call means for a connection to sim_net.h.
// Threads:  one.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "dice.h"

namespace nexus::sim {

enum class Call : std::uint8_t { accept, connect, connect_error, watch, watch_listener, read, write };

struct Faults {
  bool in_nexus = false;
  // By chance.
  Rate memory;
  Dice* dice = nullptr;
  // The n-th of a run, counted from 1; 0: none.
  std::uint64_t failing_allocation = 0;
  std::uint64_t failing_call = 0;
  int call_error = 0;
  // What was seen.
  std::uint64_t allocations = 0;  // of Nexus's
  std::uint64_t calls = 0;
  std::vector<Call>* call_list = nullptr;  // which they were, where that is wanted
  bool failed = false;                     // the n-th came
  std::int64_t live = 0;                   // allocations in use, the simulation's included
};
Faults& faults();
bool allocation_fails();

// The errno of this call, or 0: it goes its way.
inline int call_fails(Call call) {
  Faults& state = faults();
  state.calls += 1;
  if (state.call_list != nullptr) state.call_list->push_back(call);
  if (state.calls != state.failing_call) return 0;
  state.failed = true;
  return state.call_error;
}

// Nexus runs, or within that the simulation again, as long as one of these lives.
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
