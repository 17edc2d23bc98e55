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
    T* object = nullptr;
    if (idle_.empty()) {
      object = new (std::nothrow) T;
    } else {
      object = idle_.back().release();
      idle_.pop_back();
    }
    taken_ += object != nullptr;
    return Lease(object, GiveBack{this});
  }

  std::size_t taken() const { return taken_; }  // and not given back

 private:
  void keep(std::unique_ptr<T> object) {
    taken_ -= 1;
    if (idle_.size() < idle_.capacity()) idle_.push_back(std::move(object));
  }

  std::size_t taken_ = 0;
  std::vector<std::unique_ptr<T>> idle_;  // its capacity is the limit
};

}  // namespace nexus
