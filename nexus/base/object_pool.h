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
    ObjectPool* pool;
    void operator()(T* object) const { pool->keep(std::unique_ptr<T>(object)); }
  };

 public:
  // A taken object, or nothing.
  class Lease {
   public:
    Lease() = default;

    explicit operator bool() const { return object_ != nullptr; }
    T* get() const { return object_.get(); }
    T* operator->() const { return object_.get(); }
    T& operator*() const { return *object_; }
    void give_back() { object_.reset(); }

   private:
    friend class ObjectPool;
    Lease(ObjectPool* pool, T* object) : object_(object, GiveBack{pool}) {}
    std::unique_ptr<T, GiveBack> object_;
  };

  explicit ObjectPool(std::size_t most) { idle_.reserve(most); }
  ObjectPool(const ObjectPool&) = delete;
  ObjectPool& operator=(const ObjectPool&) = delete;

  // An idle object or a new one; empty if there is no memory.
  Lease take() {
    if (idle_.empty()) return Lease(this, new (std::nothrow) T);
    T* const object = idle_.back().release();
    idle_.pop_back();
    return Lease(this, object);
  }

 private:
  void keep(std::unique_ptr<T> object) {
    if (idle_.size() < idle_.capacity()) idle_.push_back(std::move(object));
  }

  std::vector<std::unique_ptr<T>> idle_;  // its capacity is the limit
};

}  // namespace nexus
