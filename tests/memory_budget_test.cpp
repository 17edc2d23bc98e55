// memory_budget_test.cpp
// Goal:   all bodies together never hold more than the limit, and everything is given back: zero at rest.
// Method: the limit at one below, at and one above; then threads that draw on one budget at once, checked against a sum
//         of the test's own.
#include "nexus/base/memory_budget.h"

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <memory>
#include <random>
#include <thread>
#include <vector>

using nexus::BodyBudget;
using nexus::BodyShare;
using nexus::ThreadBudget;

namespace {

constexpr std::size_t kStep = ThreadBudget::kStepBytes;

}  // namespace

TEST_CASE("the budget gives up to its limit, and no byte more") {
  BodyBudget budget(1000);
  CHECK(budget.take(999));
  CHECK_FALSE(budget.take(2));
  CHECK(budget.take(1));
  CHECK_FALSE(budget.take(1));
  CHECK(budget.take(0));
  CHECK(budget.used() == 1000);
  budget.give_back(400);
  CHECK_FALSE(budget.take(401));
  CHECK(budget.take(400));
  budget.give_back(1000);
  CHECK(budget.used() == 0);
}

TEST_CASE("a size near the largest number does not wrap around the limit") {
  BodyBudget budget(1000);
  REQUIRE(budget.take(10));
  CHECK_FALSE(budget.take(SIZE_MAX));
  CHECK_FALSE(budget.take(SIZE_MAX - 9));
  CHECK(budget.used() == 10);
  budget.give_back(10);
}

TEST_CASE("a lowered limit takes nothing away, and refuses until enough was given back") {
  BodyBudget budget(1000);
  REQUIRE(budget.take(800));
  budget.set_limit(500);
  CHECK(budget.used() == 800);
  CHECK_FALSE(budget.take(1));
  budget.give_back(301);
  CHECK_FALSE(budget.take(2));
  CHECK(budget.take(1));
  budget.set_limit(600);
  CHECK(budget.take(100));
  CHECK_FALSE(budget.take(1));
  budget.give_back(600);
}

TEST_CASE("a thread reserves in steps") {
  BodyBudget budget(10 * kStep);
  {
    ThreadBudget thread(budget);
    CHECK(budget.used() == 0);
    REQUIRE(thread.take(1));
    CHECK(budget.used() == kStep);
    REQUIRE(thread.take(kStep - 1));  // to the last byte of the step
    CHECK(budget.used() == kStep);
    REQUIRE(thread.take(1));
    CHECK(budget.used() == 2 * kStep);
    REQUIRE(thread.take(3 * kStep));  // what is left of a step counts
    CHECK(budget.used() == 4 * kStep + 1);
    thread.give_back(4 * kStep + 1);
  }
  CHECK(budget.used() == 0);
}

TEST_CASE("an idle thread keeps at most two steps in reserve, and gives up one step's worth at its end") {
  BodyBudget budget(10 * kStep);
  {
    ThreadBudget thread(budget);
    REQUIRE(thread.take(2 * kStep));
    thread.give_back(2 * kStep);
    CHECK(budget.used() == 2 * kStep);
    REQUIRE(thread.take(2 * kStep + 1));
    thread.give_back(2 * kStep + 1);
    CHECK(budget.used() == kStep);
    REQUIRE(thread.take(kStep));  // from the reserve
    CHECK(budget.used() == kStep);
    thread.give_back(kStep);
  }
  CHECK(budget.used() == 0);
}

TEST_CASE("near the limit a thread reserves only what it needs") {
  BodyBudget budget(kStep + 10);
  ThreadBudget first(budget), second(budget);
  REQUIRE(first.take(kStep));
  CHECK(second.take(10));
  CHECK_FALSE(second.take(1));
  CHECK(budget.used() == kStep + 10);
  second.give_back(10);
  CHECK(second.take(10));
  second.give_back(10);
  first.give_back(kStep);
}

TEST_CASE("another thread's reserve is left to it as long as there is room without it") {
  BodyBudget budget(kStep + 10);
  ThreadBudget first(budget), second(budget);
  REQUIRE(first.take(1));
  first.give_back(1);
  CHECK(second.take(10));
  CHECK(budget.used() == kStep + 10);  // nobody's reserve has become smaller
  CHECK(second.take(1));
  CHECK(budget.used() == kStep + 10);  // that of `first` is the second's now
  second.give_back(11);
}

TEST_CASE("a reserve of another thread is no reason for a refusal") {
  BodyBudget budget(4 * kStep);
  std::vector<std::unique_ptr<ThreadBudget>> threads;
  for (int i = 0; i < 4; ++i) {
    threads.push_back(std::make_unique<ThreadBudget>(budget));
    REQUIRE(threads.back()->take(100));
    threads.back()->give_back(100);
  }
  CHECK(budget.used() == 4 * kStep);  // all of it is reserved
  CHECK(budget.held() == 0);
  CHECK(threads[0]->has_room(4 * kStep));
  CHECK_FALSE(threads[0]->has_room(4 * kStep + 1));
  CHECK(threads[0]->take(4 * kStep));
  CHECK(budget.held() == 4 * kStep);
  CHECK_FALSE(threads[1]->take(1));
  threads[0]->give_back(4 * kStep);
  CHECK(threads[1]->take(4 * kStep));
  threads[1]->give_back(4 * kStep);
  threads.clear();
  CHECK(budget.used() == 0);
}

TEST_CASE("while memory is short, one client address gets a small part of what is left") {
  constexpr std::size_t kLimit = 64 * kStep, kPart = kLimit / ThreadBudget::kFairPart;
  constexpr std::size_t kGreedy = 1, kModest = 2;
  BodyBudget budget(kLimit);
  ThreadBudget thread(budget);
  std::vector<BodyShare> greedy(100);
  std::size_t taken = 0;
  while (taken < greedy.size() && greedy[taken].grow_to(thread, kStep, kGreedy)) ++taken;
  CHECK(taken == 48);  // three quarters
  BodyShare modest;
  CHECK(modest.grow_to(thread, kPart, kModest));
  CHECK(modest.grow_to(thread, 2 * kPart, kModest));  // its only body
  BodyShare second;
  CHECK_FALSE(second.grow_to(thread, kPart, kModest));
  CHECK(thread.held_by(kModest) == 2 * kPart);  // a refusal takes nothing
  CHECK_FALSE(greedy.back().grow_to(thread, kStep, kGreedy));
}

TEST_CASE("one body that nobody shares the memory with may use all of it") {
  BodyBudget budget(4 * kStep);
  ThreadBudget thread(budget);
  BodyShare share;
  for (std::size_t bytes = kStep / 2; bytes <= 4 * kStep; bytes += kStep / 2) CHECK(share.grow_to(thread, bytes, 7));
  CHECK_FALSE(share.grow_to(thread, 4 * kStep + 1, 7));
  CHECK(budget.held() == 4 * kStep);
}

TEST_CASE("the limit of a reload holds for the next body") {
  BodyBudget budget(100 * kStep);
  ThreadBudget thread(budget);
  BodyShare share;
  REQUIRE(share.grow_to(thread, 10 * kStep));
  budget.set_limit(5 * kStep);
  CHECK_FALSE(thread.has_room(1));
  CHECK_FALSE(share.grow_to(thread, 12 * kStep));
  share.give_back();
  CHECK(thread.has_room(5 * kStep));
  CHECK_FALSE(thread.has_room(5 * kStep + 1));
  CHECK(share.grow_to(thread, 5 * kStep));
}

TEST_CASE("what is refused changes nothing") {
  BodyBudget budget(100);
  ThreadBudget thread(budget);
  REQUIRE(thread.take(60));
  CHECK_FALSE(thread.take(41));
  CHECK(budget.used() == 60);
  CHECK(thread.held_by(0) == 60);
  CHECK(thread.take(40, 1, 0) == false);  // the last part is for clients that hold little
  CHECK(thread.take(6, 1, 0));
  CHECK(budget.used() == 66);
  thread.give_back(6, 1);
  thread.give_back(60);
}

TEST_CASE("a share grows, never shrinks, and is given back once") {
  BodyBudget budget(kStep);
  ThreadBudget thread(budget);
  const auto left = [&] {  // bytes that a second body could hold
    std::size_t bytes = kStep;
    while (!thread.take(bytes)) --bytes;
    thread.give_back(bytes);
    return bytes;
  };
  {
    BodyShare share;
    CHECK(share.grow_to(thread, 0));
    CHECK(share.grow_to(thread, 100));
    CHECK(share.grow_to(thread, 50));
    CHECK(left() == kStep - 100);
    CHECK(share.grow_to(thread, kStep));
    CHECK(left() == 0);
    CHECK_FALSE(share.grow_to(thread, kStep + 1));
    CHECK(left() == 0);  // it still holds what it had
    share.give_back();
    CHECK(left() == kStep);
    share.give_back();
    CHECK(left() == kStep);
    CHECK(share.grow_to(thread, 10));  // a connection's next request
  }
  CHECK(left() == kStep);
}

TEST_CASE("a budget of zero admits only empty bodies") {
  BodyBudget budget(0);
  ThreadBudget thread(budget);
  BodyShare share;
  CHECK(share.grow_to(thread, 0));
  CHECK_FALSE(share.grow_to(thread, 1));
}

TEST_CASE("threads that draw on one budget never exceed it, and leave it empty") {
  constexpr std::size_t kThreads = 4;
  constexpr std::size_t kLimit = 3 * kStep;  // too little for all: some are refused
  BodyBudget budget(kLimit);
  std::atomic<std::size_t> held{0};
  std::atomic<bool> exceeded{false};
  std::atomic<int> refused{0};
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<std::uint32_t>(t));
      ThreadBudget thread(budget);
      std::array<std::unique_ptr<BodyShare>, 4> shares;
      std::array<std::size_t, 4> sizes{};
      for (int i = 0; i < 20'000; ++i) {
        const std::size_t at = random() % shares.size();
        if (shares[at]) {
          held -= sizes[at];  // first: another thread may take the bytes as soon as they are free
          shares[at].reset();
          continue;
        }
        shares[at] = std::make_unique<BodyShare>();
        sizes[at] = random() % kStep;
        if (!shares[at]->grow_to(thread, sizes[at])) {
          ++refused;
          shares[at].reset();
        } else if ((held += sizes[at]) > kLimit || budget.used() > kLimit) {
          exceeded = true;
        }
      }
      for (std::size_t at = 0; at < shares.size(); ++at) {
        if (shares[at]) held -= sizes[at];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_FALSE(exceeded);
  CHECK(refused > 0);
  CHECK(held == 0);
  CHECK(budget.used() == 0);
}
