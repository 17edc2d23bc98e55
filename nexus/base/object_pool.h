// object_pool.h
// Owns:     objects of one type that are needed now and then: taken, given back, used again.
// Promises: the steady state allocates nothing; a Lease gives back what it holds when it dies.
// Leaves:   resetting an object to its taker.
// Threads:  one.
#pragma once

#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace nexus {

template <class T>
class ObjectPool {
 public:
  // A taken object. Empty where memory was short.
  class Lease {
   public:
    Lease() = default;
    Lease(Lease&& other) noexcept : home_(other.home_), object_(std::move(other.object_)) {}
    Lease& operator=(Lease&& other) noexcept {
      give_back();
      home_ = other.home_;
      object_ = std::move(other.object_);
      return *this;
    }
    ~Lease() { give_back(); }

    explicit operator bool() const { return object_ != nullptr; }
    T* get() const { return object_.get(); }
    T* operator->() const { return object_.get(); }
    T& operator*() const { return *object_; }
    void give_back() {
      if (object_ == nullptr) return;
      if (home_->spare_.size() < home_->spare_.capacity()) {
        home_->spare_.push_back(std::move(object_));
      } else {
        object_.reset();
      }
    }

   private:
    friend class ObjectPool;
    Lease(ObjectPool* home, std::unique_ptr<T> object) : home_(home), object_(std::move(object)) {}
    ObjectPool* home_ = nullptr;
    std::unique_ptr<T> object_;
  };

  // Keeps at most `most` spare objects.
  explicit ObjectPool(std::size_t most) { spare_.reserve(most); }
  ObjectPool(const ObjectPool&) = delete;
  ObjectPool& operator=(const ObjectPool&) = delete;

  Lease take() {
    if (spare_.empty()) return Lease(this, std::unique_ptr<T>(new (std::nothrow) T));
    std::unique_ptr<T> object = std::move(spare_.back());
    spare_.pop_back();
    return Lease(this, std::move(object));
  }

 private:
  std::vector<std::unique_ptr<T>> spare_;
};

}  // namespace nexus
