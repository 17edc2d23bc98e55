// response_ids_test.cpp
// Goal:   the backend of a stored response is remembered while there is room, and never taken for another's.
// Method: a table with ids by the thousand; a thread that asks while another remembers.
#include <doctest/doctest.h>

#include <string>
#include <thread>

#include "nexus/fleet/response_ids.h"

using nexus::BackendId;
using nexus::hash_of;
using nexus::ResponseIds;

namespace {

std::uint64_t id(std::uint32_t n) { return hash_of("resp_" + std::to_string(n)); }

}  // namespace

TEST_CASE("an id is found again with its backend, also the first and the last backend") {
  ResponseIds ids;
  CHECK(ids.find(id(1)) == std::nullopt);
  const BackendId last{static_cast<std::uint32_t>(nexus::kMaxBackendNames)};
  ids.remember(id(1), BackendId{0});
  ids.remember(id(2), last);
  CHECK(ids.find(id(1)) == BackendId{0});
  CHECK(ids.find(id(2)) == last);
  CHECK(ids.find(id(3)) == std::nullopt);
  ids.remember(id(1), BackendId{7});
  CHECK(ids.find(id(1)) == BackendId{7});
}

TEST_CASE("a full table forgets ids, most of them old ones, and gives none a wrong backend") {
  ResponseIds ids;
  constexpr std::uint32_t kIds = 2 * nexus::kResponseIds;
  for (std::uint32_t n = 0; n < kIds; ++n) ids.remember(id(n), BackendId{n % 100});
  std::uint32_t known = 0, wrong = 0, newest = 0;
  for (std::uint32_t n = 0; n < kIds; ++n) {
    const auto found = ids.find(id(n));
    known += found ? 1 : 0;
    wrong += found && *found != BackendId{n % 100} ? 1 : 0;
    newest += found && n >= kIds - 10'000 ? 1 : 0;
  }
  CHECK(wrong == 0);
  CHECK(known > nexus::kResponseIds / 2);
  CHECK(known <= nexus::kResponseIds);
  CHECK(newest > 8'000);
}

TEST_CASE("threads may remember and ask at the same time") {
  ResponseIds ids;
  std::thread other([&] {
    for (std::uint32_t n = 0; n < 50'000; ++n) ids.remember(id(n), BackendId{n % 100});
  });
  std::uint32_t wrong = 0;
  for (std::uint32_t n = 0; n < 50'000; ++n) {
    const auto found = ids.find(id(n));
    wrong += found && *found != BackendId{n % 100} ? 1 : 0;
  }
  other.join();
  CHECK(wrong == 0);
}
