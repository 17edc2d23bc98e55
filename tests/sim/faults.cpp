// The simulator's replacements of malloc and operator new. The linker redirects malloc() of every object to here
// (-Wl,--wrap=malloc).
#include "tests/lib/faults.h"

#include <bit>
#include <cstddef>
#include <cstdlib>
#include <new>

#include "nexus/base/buffer.h"

extern "C" void* __real_malloc(std::size_t bytes);

namespace nexus::sim {

bool allocation_fails() {
  Faults& state = faults();
  if (!state.in_nexus) return false;
  if (++state.allocations == state.failing_allocation) return state.failed = true;
  return state.dice != nullptr && state.dice->chance(state.memory);
}

namespace {

void* allocate(std::size_t bytes, std::size_t align) {
  if (allocation_fails()) return nullptr;
  const std::size_t some = bytes == 0 ? 1 : bytes;
  void* const at = align == 0 ? __real_malloc(some) : std::aligned_alloc(align, (some + align - 1) / align * align);
  if (at != nullptr) faults().live += 1;
  return at;
}
void* allocate_or_throw(std::size_t bytes, std::size_t align) {
  void* const at = allocate(bytes, align);
  if (at == nullptr) throw std::bad_alloc();
  return at;
}
void give_back(void* at) {
  if (at == nullptr) return;
  faults().live -= 1;
  std::free(at);
}

}  // namespace
}  // namespace nexus::sim

// Only blocks of buffer.h may fail here; they are recognised by their size.
extern "C" void* __wrap_malloc(std::size_t bytes) {
  const bool block = bytes > nexus::kSmallestBlock && std::has_single_bit(bytes - nexus::kPaddingBytes);
  return block && nexus::sim::allocation_fails() ? nullptr : __real_malloc(bytes);
}

using nexus::sim::allocate;
using nexus::sim::allocate_or_throw;
using nexus::sim::give_back;
using Align = std::align_val_t;

void* operator new(std::size_t bytes) { return allocate_or_throw(bytes, 0); }
void* operator new[](std::size_t bytes) { return allocate_or_throw(bytes, 0); }
void* operator new(std::size_t bytes, Align align) { return allocate_or_throw(bytes, std::size_t(align)); }
void* operator new[](std::size_t bytes, Align align) { return allocate_or_throw(bytes, std::size_t(align)); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes, 0); }
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes, 0); }
void operator delete(void* at) noexcept { give_back(at); }
void operator delete[](void* at) noexcept { give_back(at); }
void operator delete(void* at, std::size_t) noexcept { give_back(at); }
void operator delete[](void* at, std::size_t) noexcept { give_back(at); }
void operator delete(void* at, Align) noexcept { give_back(at); }
void operator delete[](void* at, Align) noexcept { give_back(at); }
void operator delete(void* at, std::size_t, Align) noexcept { give_back(at); }
void operator delete[](void* at, std::size_t, Align) noexcept { give_back(at); }
