// memory.h
// Owns:     failing allocations: those of which Nexus promises that no memory is an answer (blocks of bytes.h, and what
//           it makes with new (std::nothrow)).
// Promises: none fails but while a MemoryFaults lives, so the simulation itself always has memory.
// Leaves:   the functions that are replaced to memory.cpp: malloc by the linker (--wrap), operator new by the language.
// Threads:  one.
#pragma once

#include "dice.h"

namespace nexus::sim {

struct MemoryState {
  Rate rate;
  Dice* dice = nullptr;
};
MemoryState& memory_state();
bool memory_fails();

class MemoryFaults {
 public:
  MemoryFaults(Rate rate, Dice& dice) { memory_state() = {rate, &dice}; }
  MemoryFaults(const MemoryFaults&) = delete;
  MemoryFaults& operator=(const MemoryFaults&) = delete;
  ~MemoryFaults() { memory_state() = {}; }
};

}  // namespace nexus::sim
