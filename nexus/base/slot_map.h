// slot_map.h
// Owns:     objects of one type at fixed addresses, each named by a slot number and a generation.
// Promises: get() with the handle of a destroyed object returns nullptr, even if its slot is in use again; objects
// never
//           move; memory is allocated in chunks and reused.
// Leaves:   the meaning of a handle's kind to worker.h.
// Threads:  one.
// Tested by: tests/slot_map_test.cpp
#pragma once

#include <cassert>
#include <cstdint>
#include <memory>
#include <new>
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
  ~SlotMap() {
    for (auto& chunk : chunks_) {
      for (Slot& slot : chunk->slots) {
        if (slot.live) slot.object()->~T();
      }
    }
  }

  // A new object, or nullptr if there is no memory for it or its constructor throws std::bad_alloc. The constructor
  // gets the object's handle as its first argument.
  template <class... Args>
  T* make(Args&&... args) {
    try {
      if (free_ == kNone) grow();
      const std::uint32_t number = free_;
      Slot& slot = at(number);
      T* const made = new (slot.storage) T(Handle::make(kind_, slot.generation, number), std::forward<Args>(args)...);
      free_ = slot.next_free;
      slot.live = true;
      live_ += 1;
      return made;
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }

  T* get(Handle handle) {
    assert(handle.kind() == kind_);
    if (handle.slot() >= chunks_.size() * kChunk) return nullptr;
    Slot& slot = at(handle.slot());
    return slot.live && slot.generation == handle.generation() ? slot.object() : nullptr;
  }

  void destroy(Handle handle) {
    T* object = get(handle);
    assert(object != nullptr);
    object->~T();
    Slot& slot = at(handle.slot());
    slot.live = false;
    slot.generation = (slot.generation + 1) & Handle::kGenerationMask;
    slot.next_free = free_;
    free_ = handle.slot();
    live_ -= 1;
  }

  std::size_t live() const { return live_; }

  // Calls `visit(T&)` for every object; it may destroy that object.
  template <class Visit>
  void each(Visit&& visit) {
    for (std::size_t chunk = 0; chunk < chunks_.size(); ++chunk) {
      for (Slot& slot : chunks_[chunk]->slots) {
        if (slot.live) visit(*slot.object());
      }
    }
  }

 private:
  static constexpr std::uint32_t kChunk = 64;
  static constexpr std::uint32_t kNone = UINT32_MAX;

  struct Slot {
    T* object() { return std::launder(reinterpret_cast<T*>(storage)); }
    alignas(T) unsigned char storage[sizeof(T)];
    std::uint32_t generation = 0;
    std::uint32_t next_free = kNone;
    bool live = false;
  };
  struct Chunk {
    Slot slots[kChunk];
  };

  Slot& at(std::uint32_t number) { return chunks_[number / kChunk]->slots[number % kChunk]; }

  void grow() {
    auto chunk = std::make_unique_for_overwrite<Chunk>();
    const auto first = static_cast<std::uint32_t>(chunks_.size() * kChunk);
    for (std::uint32_t i = 0; i < kChunk; ++i) chunk->slots[i].next_free = i + 1 < kChunk ? first + i + 1 : kNone;
    chunks_.push_back(std::move(chunk));
    free_ = first;
  }

  std::uint8_t kind_;
  std::vector<std::unique_ptr<Chunk>> chunks_;
  std::uint32_t free_ = kNone;
  std::size_t live_ = 0;
};

}  // namespace nexus
