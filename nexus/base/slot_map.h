// slot_map.h
// Owns:     objects of one type at fixed addresses, each named by a slot number and a generation.
// Promises: get() with the handle of a destroyed object returns nullptr, even if its slot is in use again; objects
//           never move; the memory of a destroyed object is used again, or freed by trim().
// Leaves:   the meaning of a handle's kind to worker.h.
// Threads:  one.
// Tested by: tests/slot_map_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cstddef>
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
    each([](T& object) { std::destroy_at(&object); });
  }

  // A new object, or nullptr if there is no memory for it or its constructor throws std::bad_alloc. The constructor
  // gets the object's handle as its first argument.
  template <class... Args>
  T* make(Args&&... args) {
    try {
      if (free_ == kNone) {
        slots_.push_back({nullptr, first_generation_, kNone});
        free_ = static_cast<std::uint32_t>(slots_.size() - 1);
      }
      const std::uint32_t number = free_;
      if (number / kChunkSlots == chunks_.size()) chunks_.emplace_back();
      Chunk& chunk = chunks_[number / kChunkSlots];
      if (!chunk.room) chunk.room = std::make_unique_for_overwrite<Room>();
      Slot& slot = slots_[number];
      const Handle handle = Handle::make(kind_, slot.generation, number);
      slot.object = std::construct_at(room_of(number), handle, std::forward<Args>(args)...);
      free_ = slot.next_free;
      chunk.live += 1;
      live_ += 1;
      return slot.object;
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }

  T* get(Handle handle) {
    assert(handle.kind() == kind_);
    if (handle.slot() >= slots_.size()) return nullptr;
    const Slot& slot = slots_[handle.slot()];
    return slot.generation == handle.generation() ? slot.object : nullptr;
  }

  void destroy(Handle handle) {
    T* const object = get(handle);
    assert(object != nullptr);
    std::destroy_at(object);
    Slot& slot = slots_[handle.slot()];
    slot.generation = (slot.generation + 1) & Handle::kGenerationMask;
    slot.object = nullptr;
    slot.next_free = free_;
    free_ = handle.slot();
    chunks_[handle.slot() / kChunkSlots].live -= 1;
    live_ -= 1;
  }

  std::size_t live() const { return live_; }

  // Frees the memory that holds no object, and the slots behind the last object if they are many. Returns its size, in
  // bytes.
  std::size_t trim() {
    std::size_t freed = 0;
    for (Chunk& chunk : chunks_) {
      if (chunk.live > 0 || !chunk.room) continue;
      chunk.room.reset();
      freed += sizeof(Room);
    }
    return freed + drop_last_slots();
  }

  // Calls `visit(T&)` for every object; it may destroy that object.
  template <class Visit>
  void each(Visit&& visit) {
    for (std::uint32_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].object != nullptr) visit(*slots_[i].object);
    }
  }

 private:
  static constexpr std::uint32_t kNone = UINT32_MAX;
  static constexpr std::uint32_t kChunkSlots = 32;
  static constexpr std::size_t kKeptChunks = 8;

  struct Slot {
    T* object = nullptr;
    std::uint32_t generation = 0;
    std::uint32_t next_free = kNone;
  };
  // Objects lie side by side: single ones, spread over the heap, would keep the pages between them from the system.
  struct Room {
    alignas(T) std::array<std::byte, kChunkSlots * sizeof(T)> bytes;
  };
  struct Chunk {
    std::unique_ptr<Room> room;
    std::uint32_t live = 0;
  };

  // Their numbers come back with generations that they have not had. The lowest free slots are then used first, so that
  // the last ones become free.
  std::size_t drop_last_slots() {
    std::size_t used = chunks_.size();
    while (used > 0 && chunks_[used - 1].live == 0) used -= 1;
    if (used >= chunks_.size() / 2 || chunks_.size() <= kKeptChunks) return 0;
    const std::size_t kept = used * kChunkSlots;
    for (std::size_t i = kept; i < slots_.size(); ++i)
      first_generation_ = std::max(first_generation_, slots_[i].generation);
    const std::size_t freed = (slots_.size() - kept) * sizeof(Slot);
    slots_.resize(kept);
    chunks_.resize(used);
    slots_.shrink_to_fit();
    chunks_.shrink_to_fit();
    free_ = kNone;
    for (std::size_t i = kept; i-- > 0;) {
      if (slots_[i].object == nullptr) slots_[i].next_free = std::exchange(free_, static_cast<std::uint32_t>(i));
    }
    return freed;
  }

  T* room_of(std::uint32_t number) {
    std::byte* const room = chunks_[number / kChunkSlots].room->bytes.data();
    return reinterpret_cast<T*>(room + number % kChunkSlots * sizeof(T));
  }

  std::uint8_t kind_;
  std::vector<Slot> slots_;
  std::vector<Chunk> chunks_;
  std::uint32_t free_ = kNone;
  std::uint32_t first_generation_ = 0;  // of a new slot
  std::size_t live_ = 0;
};

}  // namespace nexus
