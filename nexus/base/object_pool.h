// object_pool.h
// Owns:     objects of one type that are reused: taken, given back, taken again.
// Promises: the steady state allocates nothing; a Lease gives its object back when it is destroyed, and resets it if
//           its type has reset(); trim() frees the idle objects that were not needed since the last call.
// Leaves:   when to trim to the caller, and how a type without reset() is used again.
// Threads:  one.
// Tested by: tests/object_pool_test.cpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace nexus {

template <class T>
class ObjectPool {
  struct GiveBack {
    ObjectPool* pool = nullptr;
    void operator()(T* object) const { pool->keep(object); }
  };

 public:
  using Lease = std::unique_ptr<T, GiveBack>;  // a taken object, or nothing

  ObjectPool() = default;
  ObjectPool(const ObjectPool&) = delete;
  ObjectPool& operator=(const ObjectPool&) = delete;
  ~ObjectPool() { free(idle_.size()); }

  // An idle object, or a new one made from `args`; empty if there is no memory.
  template <class... Args>
  Lease take(Args&&... args) {
    T* object = nullptr;
    if (idle_.empty()) {
      object = make(std::forward<Args>(args)...);
    } else {
      object = idle_.back();
      idle_.pop_back();
      least_idle_ = std::min(least_idle_, idle_.size());
    }
    taken_ += object != nullptr;
    return Lease(object, GiveBack{this});
  }

  std::size_t taken() const { return taken_; }  // and not given back
  std::size_t idle() const { return idle_.size(); }

  // Frees the objects that were idle since the last call. Returns their size, in bytes.
  std::size_t trim() {
    const std::size_t spare = least_idle_;
    free(spare);
    least_idle_ = idle_.size();
    return spare * sizeof(T) + shrink();
  }

 private:
  // Also makes room for its return, which must not fail.
  template <class... Args>
  T* make(Args&&... args) {
    try {
      if (idle_.capacity() <= taken_) idle_.reserve(2 * taken_ + 1);
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
    return new (std::nothrow) T(std::forward<Args>(args)...);
  }

  // Gives back the list's own memory if most of it was for objects of a busier time.
  std::size_t shrink() {
    const std::size_t needed = taken_ + idle_.size();
    if (idle_.capacity() <= 4 * needed + kKeptPlaces) return 0;
    std::vector<T*> smaller;
    try {
      smaller.reserve(2 * needed + 1);
    } catch (const std::bad_alloc&) {
      return 0;
    }
    smaller.assign(idle_.begin(), idle_.end());
    const std::size_t freed = (idle_.capacity() - smaller.capacity()) * sizeof(T*);
    idle_.swap(smaller);
    return freed;
  }

  void free(std::size_t count) {
    for (; count > 0; --count, idle_.pop_back()) delete idle_.back();
  }

  void keep(T* object) {
    if constexpr (requires { object->reset(); }) object->reset();
    taken_ -= 1;
    idle_.push_back(object);
  }

  static constexpr std::size_t kKeptPlaces = 64;

  std::size_t taken_ = 0;
  std::size_t least_idle_ = 0;  // since the last trim()
  std::vector<T*> idle_;        // owned
};

}  // namespace nexus
