// The functions that memory.h replaces. The linker sends malloc() of every object here (-Wl,--wrap=malloc).
#include "memory.h"

#include <bit>
#include <cstddef>
#include <cstdlib>
#include <new>

#include "nexus/bytes.h"

extern "C" void* __real_malloc(std::size_t bytes);

namespace nexus::sim {

MemoryState& memory_state() {
  static MemoryState state;
  return state;
}

bool memory_fails() {
  MemoryState& state = memory_state();
  return state.dice != nullptr && state.dice->chance(state.rate);
}

}  // namespace nexus::sim

// A block of bytes.h is known by its size.
extern "C" void* __wrap_malloc(std::size_t bytes) {
  const bool block = bytes > nexus::kSmallestBlock && std::has_single_bit(bytes - nexus::kPaddingBytes);
  return block && nexus::sim::memory_fails() ? nullptr : __real_malloc(bytes);
}

void* operator new(std::size_t bytes) {
  void* const at = __real_malloc(bytes == 0 ? 1 : bytes);
  if (at == nullptr) throw std::bad_alloc();
  return at;
}
void* operator new[](std::size_t bytes) { return operator new(bytes); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return nexus::sim::memory_fails() ? nullptr : __real_malloc(bytes == 0 ? 1 : bytes);
}
// Not made to fail: simdjson reads an empty text without a parser once one of these gave nothing.
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return __real_malloc(bytes == 0 ? 1 : bytes);
}
void operator delete(void* at) noexcept { std::free(at); }
void operator delete(void* at, std::size_t) noexcept { std::free(at); }
void operator delete[](void* at) noexcept { std::free(at); }
void operator delete[](void* at, std::size_t) noexcept { std::free(at); }
