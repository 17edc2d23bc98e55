// span_test.cpp
// Goal:   the queue keeps what fits, in order for each sender, and its receiver sleeps through nothing.
// Method: one thread to the letter; then four senders and a receiver that waits for its wake-ups alone.
#include <doctest/doctest.h>

#include <array>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "nexus/metrics/span.h"

using namespace nexus;

namespace {

bool push(SpanQueue& queue, std::uint64_t id, std::uint64_t sender = 0) {
  return queue.push([&](SpanRecord& span) {
    span.span_id = id;
    span.parent_id = sender;
  });
}

}  // namespace

TEST_CASE("a queue that is not open takes nothing") {
  SpanQueue queue;
  CHECK_FALSE(push(queue, 1));
  CHECK(queue.front() == nullptr);
  CHECK(queue.size() == 0);
}

TEST_CASE("spans come out in order, and those beyond the limit find no room") {
  SpanQueue queue;
  int woken = 0;
  queue.open([&] { woken += 1; });
  for (std::uint64_t round = 0; round < 3; ++round) {
    for (std::uint64_t i = 0; i < kMaxSpansWaiting; ++i) CHECK(push(queue, i));
    CHECK(queue.size() == kMaxSpansWaiting);
    for (int i = 0; i < 3; ++i) CHECK_FALSE(push(queue, 9999));
    for (std::uint64_t i = 0; i < kMaxSpansWaiting; ++i) {
      REQUIRE(queue.front() != nullptr);
      CHECK(queue.front()->span_id == i);
      queue.pop();
    }
    CHECK(queue.front() == nullptr);
  }
  CHECK(woken == 3 * (1 + kMaxSpansWaiting / kSpansPerExport));
}

TEST_CASE("a record begins anew in a slot that was used") {
  SpanQueue queue;
  queue.open([] {});
  const auto around = [&](auto&& fill) {
    for (std::size_t i = 0; i < kMaxSpansWaiting; ++i) {
      CHECK(queue.push(fill));
      if (i + 1 < kMaxSpansWaiting) queue.pop();
    }
    const SpanRecord record = *queue.front();
    queue.pop();
    return record;
  };
  around([](SpanRecord& span) {
    span.model.set("m");
    span.failed = true;
    span.input_tokens = 3;
  });
  const SpanRecord clean = around([](SpanRecord&) {});
  CHECK(clean.model.view().empty());
  CHECK_FALSE(clean.failed);
  CHECK(clean.input_tokens == -1);
}

TEST_CASE("a text is cut between two characters") {
  BoundedText<4> text;
  text.set("abcd");
  CHECK(text.view() == "abcd");
  text.set("abcde");
  CHECK(text.view() == "abcd");
  text.set("abc\xc3\xa4");
  CHECK(text.view() == "abc");
  text.set("");
  CHECK(text.view().empty());
}

TEST_CASE("no wake-up is lost and each span arrives once, in its sender's order") {
  constexpr std::uint64_t kSenders = 4, kEach = 20'000;
  SpanQueue queue;
  std::mutex mutex;
  std::condition_variable changed;
  bool woken = false;
  queue.open([&] {
    const std::lock_guard lock(mutex);
    woken = true;
    changed.notify_one();
  });
  std::vector<std::thread> senders;
  for (std::uint64_t sender = 0; sender < kSenders; ++sender) {
    senders.emplace_back([&, sender] {
      for (std::uint64_t i = 1; i <= kEach; ++i) {
        while (!push(queue, i, sender)) std::this_thread::yield();
      }
    });
  }
  std::array<std::uint64_t, kSenders> last{};
  bool in_order = true;
  for (std::uint64_t taken = 0; taken < kSenders * kEach;) {
    if (const SpanRecord* span = queue.front()) {
      in_order &= span->span_id == ++last[span->parent_id];
      queue.pop();
      taken += 1;
      continue;
    }
    std::unique_lock lock(mutex);  // it hangs here if a wake-up is lost
    changed.wait(lock, [&] { return std::exchange(woken, false); });
  }
  for (std::thread& sender : senders) sender.join();
  CHECK(in_order);
  CHECK(queue.size() == 0);
}
