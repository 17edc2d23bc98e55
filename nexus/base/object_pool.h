// object_pool.h
// Owns:     objects of one type that are reused: taken, given back, taken again.
// Promises: the steady state allocates nothing; a Lease gives its object back when it is destroyed; at most `most`
//           idle objects are kept.
// Leaves:   resetting a reused object to the caller.
// Threads:  one.
// Tested by: tests/object_pool_test.cpp
#pragma once

#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace nexus {

template <class T>
class ObjectPool {
  struct GiveBack {
    ObjectPool* pool = nullptr;
    void operator()(T* object) const { pool->keep(std::unique_ptr<T>(object)); }
  };

 public:
  using Lease = std::unique_ptr<T, GiveBack>;  // a taken object, or nothing

  explicit ObjectPool(std::size_t most) { idle_.reserve(most); }
  ObjectPool(const ObjectPool&) = delete;
  ObjectPool& operator=(const ObjectPool&) = delete;

  // An idle object or a new one; empty if there is no memory.
  Lease take() {
    if (idle_.empty()) return Lease(new (std::nothrow) T, GiveBack{this});
    T* const object = idle_.back().release();
    idle_.pop_back();
    return Lease(object, GiveBack{this});
  }

 private:
  void keep(std::unique_ptr<T> object) {
    if (idle_.size() < idle_.capacity()) idle_.push_back(std::move(object));
  }

  std::vector<std::unique_ptr<T>> idle_;  // its capacity is the limit
};

}  // namespace nexus
