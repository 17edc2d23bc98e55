// slot_map_test.cpp
// Goal:   handles find exactly the living objects, which never move.
// Method: single steps, then random operations against a std::map.
#include "nexus/base/slot_map.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <map>
#include <new>
#include <random>
#include <set>
#include <vector>

using nexus::Handle;
using nexus::SlotMap;

namespace {

struct Thing {
  Thing(Handle own, int& count, int number_given) : handle(own), living(count), number(number_given) { living += 1; }
  ~Thing() { living -= 1; }
  Thing(const Thing&) = delete;
  Thing& operator=(const Thing&) = delete;
  Handle handle;
  int& living;
  int number;
};

}  // namespace

TEST_CASE("a handle has a kind, a generation and a slot") {
  const Handle handle = Handle::make(0xfe, 0xabcdef, 0xffffffff);
  CHECK(handle.kind() == 0xfe);
  CHECK(handle.generation() == 0xabcdef);
  CHECK(handle.slot() == 0xffffffff);
  CHECK(Handle::make(1, 0x1000002, 3) == Handle::make(1, 2, 3));  // a generation has 24 bits
  CHECK_FALSE(Handle::make(1, 2, 3) == Handle::make(2, 2, 3));
  CHECK_FALSE(Handle::make(1, 2, 3) == Handle::make(1, 3, 3));
  CHECK_FALSE(Handle::make(1, 2, 3) == Handle::make(1, 2, 4));
}

TEST_CASE("if a constructor throws bad_alloc there is no object, and its slot is free") {
  struct Needy {
    Needy(Handle, bool short_of_memory) {
      if (short_of_memory) throw std::bad_alloc();
    }
  };
  SlotMap<Needy> slots(5);
  CHECK(slots.make(true) == nullptr);
  CHECK(slots.live() == 0);
  CHECK(slots.make(false) != nullptr);
  CHECK(slots.live() == 1);
}

TEST_CASE("the handle of a destroyed object finds nothing, even if its slot is in use again") {
  int living = 0;
  SlotMap<Thing> slots(5);
  Thing* first = slots.make(living, 1);
  const Handle gone = first->handle;
  CHECK(gone.kind() == 5);
  CHECK(slots.get(gone) == first);
  slots.destroy(gone);
  CHECK(slots.get(gone) == nullptr);
  Thing* second = slots.make(living, 2);
  CHECK(second->handle.slot() == gone.slot());
  CHECK(slots.get(gone) == nullptr);
  CHECK(slots.get(second->handle)->number == 2);
  CHECK(living == 1);
}

TEST_CASE("the handle of a slot that never existed finds nothing") {
  int living = 0;
  SlotMap<Thing> slots(1);
  CHECK(slots.get(Handle::make(1, 0, 0)) == nullptr);
  slots.make(living, 1);
  CHECK(slots.get(Handle::make(1, 0, 63)) == nullptr);
  CHECK(slots.get(Handle::make(1, 0, 64)) == nullptr);
  CHECK(slots.get(Handle::make(1, 0, UINT32_MAX)) == nullptr);
}

TEST_CASE("objects do not move while others come and go") {
  int living = 0;
  SlotMap<Thing> slots(1);
  Thing* first = slots.make(living, 0);
  std::vector<Handle> others;
  for (int i = 0; i < 1000; ++i) others.push_back(slots.make(living, i)->handle);
  CHECK(slots.get(first->handle) == first);
  CHECK(slots.live() == 1001);
  for (const Handle handle : others) slots.destroy(handle);
  CHECK(slots.get(first->handle) == first);
  CHECK(living == 1);
}

TEST_CASE("remaining objects are destroyed with their slots") {
  int living = 0;
  {
    SlotMap<Thing> slots(1);
    for (int i = 0; i < 100; ++i) slots.make(living, i);
    slots.destroy(Handle::make(1, 0, 3));
    CHECK(living == 99);
  }
  CHECK(living == 0);
}

TEST_CASE("each() visits every object once, and the visitor may destroy it") {
  int living = 0;
  SlotMap<Thing> slots(1);
  for (int i = 0; i < 150; ++i) slots.make(living, i);
  int sum = 0;
  slots.each([&](Thing& thing) {
    sum += thing.number;
    if (thing.number % 2 == 0) slots.destroy(thing.handle);
  });
  CHECK(sum == 149 * 150 / 2);
  CHECK(slots.live() == 75);
  slots.each([&](Thing& thing) { CHECK(thing.number % 2 == 1); });
}

TEST_CASE("trim() frees the memory that holds no object, and no handle is valid again because of it") {
  int living = 0;
  SlotMap<Thing> slots(1);
  CHECK(slots.trim() == 0);
  std::vector<Handle> all;
  for (int i = 0; i < 1000; ++i) all.push_back(slots.make(living, i)->handle);
  CHECK(slots.trim() == 0);
  for (int i = 0; i < 999; ++i) slots.destroy(all[static_cast<std::size_t>(i)]);
  const Thing* const last = slots.get(all.back());
  CHECK(slots.trim() >= 900 * sizeof(Thing));
  CHECK(slots.trim() == 0);
  CHECK(slots.get(all.back()) == last);
  CHECK(last->number == 999);
  for (int i = 0; i < 1000; ++i) CHECK(slots.make(living, i) != nullptr);
  for (int i = 0; i < 999; ++i) CHECK(slots.get(all[static_cast<std::size_t>(i)]) == nullptr);
  CHECK(living == 1001);
}

TEST_CASE("trim() gives up the slots behind the last object, and their handles are never given again") {
  int living = 0;
  SlotMap<Thing> slots(1);
  std::set<std::uint64_t> seen;
  for (int wave = 0; wave < 3; ++wave) {
    std::vector<Handle> all;
    for (int i = 0; i < 1000; ++i) {
      all.push_back(slots.make(living, i)->handle);
      CHECK(seen.insert(all.back().value).second);
    }
    const Thing* const kept = slots.get(all[100]);
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (i != 100) slots.destroy(all[i]);
    }
    CHECK(slots.trim() >= 900 * (sizeof(Thing) + 2 * sizeof(void*)));
    CHECK(slots.trim() == 0);
    CHECK(slots.get(all[100]) == kept);
    for (const std::uint64_t handle : seen) CHECK((slots.get(Handle{handle}) == kept) == (handle == all[100].value));
    CHECK(slots.make(living, 0)->handle.slot() == 0);  // the first slots are used first
    std::size_t count = 0;
    slots.each([&](Thing& thing) {
      seen.insert(thing.handle.value);
      slots.destroy(thing.handle);
      count += 1;
    });
    CHECK(count == 2);
  }
  CHECK(living == 0);
}

TEST_CASE("handles find what a map would, under any sequence of operations") {
  std::mt19937 random(5);
  int living = 0;
  SlotMap<Thing> slots(9);
  std::map<std::uint64_t, int> model;
  std::vector<Handle> all;
  std::set<std::uint64_t> given;
  for (int step = 0; step < 20'000; ++step) {
    const bool grows = step / 2'000 % 2 == 0;  // up to 600 objects, and down to a few
    if (random() % 100 == 0) slots.trim();
    if (model.size() < 5 || (random() % 4 < (grows ? 3u : 1u) && model.size() < 600)) {
      const Thing* thing = slots.make(living, step);
      CHECK(model.emplace(thing->handle.value, step).second);
      CHECK(given.insert(thing->handle.value).second);  // no handle twice
      all.push_back(thing->handle);
    } else {
      const Handle handle = all[random() % all.size()];
      const auto known = model.find(handle.value);
      const Thing* found = slots.get(handle);
      REQUIRE((found != nullptr) == (known != model.end()));
      if (found == nullptr) continue;
      REQUIRE(found->number == known->second);
      slots.destroy(handle);
      model.erase(known);
    }
    REQUIRE(slots.live() == model.size());
  }
  CHECK(living == static_cast<int>(model.size()));
}
