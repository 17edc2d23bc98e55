// key_limits_test.cpp
// Goal:   a minute's limit holds over all threads, comes in again evenly, and is put right by what was used.
// Method: the bucket alone, with the clock passed in; threads that compete for it.
#include "nexus/fleet/key_limits.h"

#include <doctest/doctest.h>

#include <atomic>
#include <thread>
#include <vector>

using namespace nexus;

namespace {
constexpr Ns kNow = 1000 * kSecond;
}

TEST_CASE("a full bucket gives its limit at once, and then one unit each minute / limit") {
  MinuteBucket bucket;
  for (int i = 0; i < 60; ++i) CHECK(bucket.take(kNow, 60, 1) == 0);
  CHECK(bucket.left(kNow, 60) == 0);
  CHECK(bucket.take(kNow, 60, 1) == kSecond);
  CHECK(bucket.take(kNow + kSecond - 1, 60, 1) == 1);
  CHECK(bucket.take(kNow + kSecond, 60, 1) == 0);
  CHECK(bucket.take(kNow + kSecond, 60, 1) == kSecond);
  CHECK(bucket.left(kNow + 11 * kSecond, 60) == 10);
  CHECK(bucket.full_in(kNow + 11 * kSecond) == 50 * kSecond);
  CHECK(bucket.left(kNow + 3600 * kSecond, 60) == 60);  // and no more than that is saved
  for (int i = 0; i < 60; ++i) CHECK(bucket.take(kNow + 3600 * kSecond, 60, 1) == 0);
  CHECK(bucket.take(kNow + 3600 * kSecond, 60, 1) > 0);
}

TEST_CASE("what a request used beyond its estimate holds up the next one, and what it did not use comes back") {
  MinuteBucket bucket;
  CHECK(bucket.take(kNow, 1000, 500) == 0);
  bucket.settle(1000, 500, 100);
  CHECK(bucket.left(kNow, 1000) == 900);
  CHECK(bucket.take(kNow, 1000, 800) == 0);
  bucket.settle(1000, 800, 1400);
  CHECK(bucket.left(kNow, 1000) == 0);
  CHECK(bucket.take(kNow, 1000, 100) == 36 * kSecond);  // 500 too many, and 100 for itself
}

TEST_CASE("more than the whole bucket is let in when the bucket is full, and only then") {
  MinuteBucket bucket;
  CHECK(bucket.take(kNow, 100, 1) == 0);
  CHECK(bucket.take(kNow, 100, 250) == 600 * kMillisecond);
  CHECK(bucket.take(kNow + 600 * kMillisecond, 100, 250) == 0);
  CHECK(bucket.take(kNow + 600 * kMillisecond, 100, 1) == 90 * kSecond + 600 * kMillisecond);
}

TEST_CASE("an incredible count holds a key up for an hour at most") {
  MinuteBucket bucket;
  CHECK(bucket.take(kNow, 1, 1) == 0);
  bucket.settle(1, 1, 1ull << 40);
  CHECK(bucket.full_in(kNow) <= 3600 * kSecond);
}

TEST_CASE("five requests at once near the limit pass it by at most what one of them used beyond its estimate") {
  MinuteBucket bucket;
  constexpr std::uint64_t kLimit = 1000, kEstimate = 300, kUsed = 450;
  int admitted = 0;
  for (int i = 0; i < 5; ++i) admitted += bucket.take(kNow, kLimit, kEstimate) == 0 ? 1 : 0;
  CHECK(admitted == 3);
  for (int i = 0; i < admitted; ++i) bucket.settle(kLimit, kEstimate, kUsed);
  CHECK(bucket.take(kNow, kLimit, 1) > 0);
}

TEST_CASE("threads that compete take no more than the limit together") {
  MinuteBucket bucket;
  std::atomic<int> taken{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int j = 0; j < 1000; ++j) taken += bucket.take(kNow, 500, 1) == 0 ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(taken == 500);
}
