// object_pool_test.cpp
// Goal:   every object is given back exactly once, idle ones are reused, and no more than the limit are kept.
// Method: a type that counts its living objects; leases that are destroyed, moved, overwritten and given back early.
#include "nexus/base/object_pool.h"

#include <doctest/doctest.h>

#include <cstdlib>
#include <utility>
#include <vector>

using nexus::ObjectPool;

namespace {

struct Counted {
  static inline int living = 0;
  static inline bool no_memory = false;
  int value = 0;

  Counted() { ++living; }
  ~Counted() { --living; }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

  static void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
    return no_memory ? nullptr : std::malloc(bytes);
  }
  static void operator delete(void* object) { std::free(object); }
};

using Lease = ObjectPool<Counted>::Lease;

}  // namespace

TEST_CASE("an object that is given back is taken again, as it was left") {
  ObjectPool<Counted> pool;
  const Counted* first = nullptr;
  {
    const Lease lease = pool.take();
    REQUIRE(lease);
    lease->value = 7;
    first = lease.get();
  }
  const Lease again = pool.take();
  CHECK(again.get() == first);
  CHECK((*again).value == 7);
  const Lease other = pool.take();
  CHECK(other.get() != first);
  CHECK(Counted::living == 2);
}

TEST_CASE("trim() frees the objects that were idle since the last call, and no other") {
  for (const std::size_t used : {0u, 1u, 3u, 5u}) {
    CAPTURE(used);
    {
      ObjectPool<Counted> pool;
      std::vector<Lease> leases;
      for (std::size_t i = 0; i < 5; ++i) leases.push_back(pool.take());
      leases.clear();
      CHECK(pool.trim() == 0);  // all were in use since the pool was made
      for (std::size_t i = 0; i < used; ++i) leases.push_back(pool.take());
      CHECK(pool.trim() == (5 - used) * sizeof(Counted));
      CHECK(Counted::living == static_cast<int>(used));
      leases.clear();
      CHECK(pool.trim() == 0);  // those were in use
      CHECK(pool.trim() == used * sizeof(Counted));
      CHECK(Counted::living == 0);
      CHECK(pool.take());  // it goes on
    }
    CHECK(Counted::living == 0);  // the pool destroys its idle objects
  }
}

TEST_CASE("after a wave trim() gives back the list of idle objects too, and every object in use can be given back") {
  ObjectPool<Counted> pool;
  std::vector<Lease> leases;
  for (std::size_t i = 0; i < 1000; ++i) leases.push_back(pool.take());
  leases.resize(3);
  pool.trim();
  CHECK(pool.trim() >= 997 * sizeof(Counted) + 900 * sizeof(void*));
  CHECK(pool.trim() == 0);
  CHECK(pool.taken() == 3);
  for (std::size_t i = 0; i < 1000; ++i) leases.push_back(pool.take());
  leases.clear();
  CHECK(pool.idle() == 1003);
}

TEST_CASE("an object with reset() is reset when it is given back") {
  struct Reset {
    int value = 0;
    void reset() { value = 0; }
  };
  ObjectPool<Reset> pool;
  pool.take()->value = 7;
  CHECK(pool.take()->value == 0);
}

TEST_CASE("a lease that is moved, overwritten, moved to itself or given back early gives back once") {
  ObjectPool<Counted> pool;
  {
    Lease first = pool.take();
    Lease moved = std::move(first);
    CHECK_FALSE(first);
    REQUIRE(moved);
    const Counted* const held = moved.get();
    Lease& same = moved;
    moved = std::move(same);
    CHECK(moved.get() == held);

    Lease second = pool.take();
    CHECK(Counted::living == 2);
    second = std::move(moved);  // gives back its own object
    CHECK(second.get() == held);
    CHECK(pool.take().get() != held);
    CHECK(Counted::living == 2);

    second.reset();
    CHECK_FALSE(second);
    second.reset();
    CHECK(Counted::living == 2);
  }
  const Lease one = pool.take(), two = pool.take(), three = pool.take();
  CHECK(one.get() != two.get());  // neither object was kept twice
  CHECK(Counted::living == 3);
}

TEST_CASE("an empty lease is harmless") {
  Lease lease;
  CHECK_FALSE(lease);
  lease.reset();
  lease = Lease();
  CHECK(lease.get() == nullptr);
}

TEST_CASE("without memory a lease is empty, and idle objects are still taken") {
  ObjectPool<Counted> pool;
  pool.take().reset();
  Counted::no_memory = true;
  const Lease idle = pool.take();
  CHECK(idle);
  CHECK_FALSE(pool.take());
  Counted::no_memory = false;
  CHECK(pool.take());
}

TEST_CASE("the steady state allocates nothing") {
  ObjectPool<Counted> pool;
  { const Lease one = pool.take(), two = pool.take(); }
  Counted::no_memory = true;  // a new object would fail
  for (int i = 0; i < 100; ++i) {
    const Lease one = pool.take(), two = pool.take();
    REQUIRE(one);
    REQUIRE(two);
  }
  Counted::no_memory = false;
  CHECK(Counted::living == 2);
}
