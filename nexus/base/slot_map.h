// slot_map.h
// Owns:     objects of one type at fixed addresses, each named by a slot number and a generation.
// Promises: get() with the handle of a destroyed object returns nullptr, even if its slot is in use again; objects
//           never move; the memory of a slot is reused.
// Leaves:   the meaning of a handle's kind to worker.h.
// Threads:  one.
// Tested by: tests/slot_map_test.cpp
#pragma once

#include <cassert>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <utility>
#include <vector>

namespace nexus {

// Used by epoll, timers and messages instead of a pointer: kind (8 bits), generation (24), slot (32).
struct Handle {
  std::uint64_t value = 0;

  static constexpr Handle make(std::uint8_t kind, std::uint32_t generation, std::uint32_t slot) {
    return Handle{std::uint64_t{kind} << 56 | std::uint64_t{generation & kGenerationMask} << 32 | slot};
  }
  constexpr std::uint8_t kind() const { return static_cast<std::uint8_t>(value >> 56); }
  constexpr std::uint32_t generation() const { return static_cast<std::uint32_t>(value >> 32) & kGenerationMask; }
  constexpr std::uint32_t slot() const { return static_cast<std::uint32_t>(value); }
  constexpr bool operator==(const Handle&) const = default;

  static constexpr std::uint32_t kGenerationMask = 0xffffff;
};

template <class T>
class SlotMap {
 public:
  explicit SlotMap(std::uint8_t kind) : kind_(kind) {}
  SlotMap(const SlotMap&) = delete;
  SlotMap& operator=(const SlotMap&) = delete;

  // A new object, or nullptr if there is no memory for it or its constructor throws std::bad_alloc. The constructor
  // gets the object's handle as its first argument.
  template <class... Args>
  T* make(Args&&... args) {
    try {
      if (free_ == kNone) {
        slots_.push_back(std::make_unique_for_overwrite<Slot>());
        free_ = static_cast<std::uint32_t>(slots_.size() - 1);
      }
      const std::uint32_t number = free_;
      Slot& slot = *slots_[number];
      T& made = slot.object.emplace(Handle::make(kind_, slot.generation, number), std::forward<Args>(args)...);
      free_ = slot.next_free;
      live_ += 1;
      return &made;
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }

  T* get(Handle handle) {
    assert(handle.kind() == kind_);
    if (handle.slot() >= slots_.size()) return nullptr;
    Slot& slot = *slots_[handle.slot()];
    return slot.object && slot.generation == handle.generation() ? &*slot.object : nullptr;
  }

  void destroy(Handle handle) {
    assert(get(handle) != nullptr);
    Slot& slot = *slots_[handle.slot()];
    slot.object.reset();
    slot.generation = (slot.generation + 1) & Handle::kGenerationMask;
    slot.next_free = free_;
    free_ = handle.slot();
    live_ -= 1;
  }

  std::size_t live() const { return live_; }

  // Calls `visit(T&)` for every object; it may destroy that object.
  template <class Visit>
  void each(Visit&& visit) {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i]->object) visit(*slots_[i]->object);
    }
  }

 private:
  static constexpr std::uint32_t kNone = UINT32_MAX;

  struct Slot {
    std::optional<T> object;
    std::uint32_t generation = 0;
    std::uint32_t next_free = kNone;
  };

  std::uint8_t kind_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::uint32_t free_ = kNone;
  std::size_t live_ = 0;
};

}  // namespace nexus
