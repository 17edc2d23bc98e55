// The switch of `make mutants`: included before each source of the mutated copy, and by nothing else.
// Promises: NEXUS_MUTANT=17 in the environment turns mutant 17 on, and only that one; without it, the code is
//           unchanged.
#pragma once

#include <cstdlib>
#include <type_traits>

inline const int kNexusMutant = std::getenv("NEXUS_MUTANT") == nullptr ? 0 : std::atoi(std::getenv("NEXUS_MUTANT"));

// True if the mutant with this number is on; never while the compiler evaluates a constant.
constexpr bool nexus_mutant(int number) { return !std::is_constant_evaluated() && kNexusMutant == number; }
