// slab_test.cpp
// Goal:   every record is counted exactly, in the right cells, with any number of keys and with concurrent readers.
// Method: cells and tables against plain maps, buckets against a linear search, records as rows, threads as in the
//         daemon.
#include "nexus/metrics/slab.h"

#include <doctest/doctest.h>
#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

using namespace nexus;

namespace {

template <const auto& kBounds>
void check_buckets() {
  const auto linear = [](std::int64_t value) {
    std::size_t i = 0;
    while (i < kBounds.upper.size() && value > kBounds.upper[i]) ++i;
    return i;
  };
  std::vector<std::int64_t> values{0, 1, 2, 3, INT64_MAX - 1, INT64_MAX};
  for (const std::int64_t bound : kBounds.upper) values.insert(values.end(), {bound - 1, bound, bound + 1});
  for (int bit = 0; bit < 63; ++bit) {
    values.insert(values.end(), {(std::int64_t{1} << bit) - 1, std::int64_t{1} << bit, (std::int64_t{1} << bit) + 1});
  }
  std::mt19937_64 random(1);
  for (int i = 0; i < 2000; ++i) values.push_back(static_cast<std::int64_t>(random() >> (1 + random() % 60)));
  for (const std::int64_t value : values) {
    CAPTURE(value);
    REQUIRE(bucket_of<kBounds>(value) == linear(value));
  }
  CHECK(std::is_sorted(kBounds.upper.begin(), kBounds.upper.end()));
}

using StatusMap = std::map<std::pair<std::uint32_t, bool>, std::uint64_t>;

StatusMap statuses_of(const StatusCounters& cells) {
  StatusMap all;
  cells.for_each([&](const StatusCounters::Count& c) {
    CHECK(all.emplace(std::pair{c.status, c.failed}, c.count).second);
  });
  return all;
}

const PairCounters* pair_of(const Slab& slab, ModelId model, BackendId backend) {
  const PairCounters* found = nullptr;
  slab.pairs().for_each([&](std::uint32_t m, std::uint32_t b, const PairCounters& cells) {
    if (m == index_of(model) && b == index_of(backend)) found = &cells;
  });
  return found;
}

template <const auto& kBounds>
HistogramValues<kBounds> values_of(const Histogram<kBounds>& histogram) {
  HistogramValues<kBounds> values;
  histogram.add_to(values);
  return values;
}

template <const auto& kBounds>
HistogramValues<kBounds> values_of(const Buckets<kBounds>& buckets, const Counter& sum) {
  HistogramValues<kBounds> values;
  buckets.add_to(values, sum);
  return values;
}

std::uint64_t errors_of(const Slab& slab, ModelId model, ErrorType type) {
  const ModelCounters* cells = slab.model(model);
  return cells == nullptr ? 0 : cells->errors[static_cast<std::size_t>(type)].read();
}

constexpr ModelId kModel{7};
constexpr BackendId kBackend{3};

RequestRecord plain(std::uint16_t status) {
  return {.model = kModel, .backend = kBackend, .status = status, .reached_backend = true, .duration_ns = kSecond};
}

// The bytes allocated at present, according to the allocator.
std::size_t allocated_bytes() { return mallinfo2().uordblks; }

}  // namespace

TEST_SUITE("US2 T034 buckets") {
  TEST_CASE("every value is counted in the bucket that a linear search finds") {
    check_buckets<kDurationBounds>();
    check_buckets<kTokenBounds>();
    check_buckets<kFirstTokenBounds>();
    check_buckets<kPerTokenBounds>();
    check_buckets<kOverheadBounds>();
    check_buckets<kLoopStallBounds>();
  }

  TEST_CASE("a histogram's count is the sum of its buckets, and its sum is exact") {
    Histogram<kDurationBounds> histogram;
    for (const Ns ns : {Ns{0}, 100 * kMillisecond, 100 * kMillisecond + 1, 300 * kSecond, 300 * kSecond + 1}) {
      histogram.observe(ns);
    }
    const auto values = values_of(histogram);
    CHECK(values.count() == 5);
    CHECK(values.buckets[0] == 2);
    CHECK(values.buckets[1] == 1);
    CHECK(values.buckets[10] == 1);
    CHECK(values.buckets[11] == 1);
    CHECK(values.sum == 600'200'000'002u);
  }
}

TEST_SUITE("US1 cells") {
  TEST_CASE("every status from 100 to 999 is counted exactly, failed ones separately") {
    StatusCounters cells;
    StatusMap expected;
    std::mt19937 random(3);
    for (int i = 0; i < 20'000; ++i) {
      const auto status = static_cast<std::uint32_t>(100 + random() % 900);
      const bool failed = random() % 2 == 0;
      cells.add(status, failed);
      ++expected[{status, failed}];
    }
    CHECK(statuses_of(cells) == expected);
  }

  TEST_CASE("each pair has its own cells, which do not move while the table grows") {
    PairTable<Counter> table;
    std::map<std::pair<std::uint32_t, std::uint32_t>, std::uint64_t> expected;
    std::map<std::pair<std::uint32_t, std::uint32_t>, Counter*> places;
    std::mt19937 random(4);
    for (int i = 0; i < 50'000; ++i) {
      const auto first = static_cast<std::uint32_t>(random() % 3 == 0 ? UINT32_MAX - random() % 9 : random() % 200);
      const std::pair key{first, static_cast<std::uint32_t>(random() % 20)};
      Counter& cell = table.at(key.first, key.second);
      const auto [at, is_new] = places.emplace(key, &cell);
      REQUIRE(at->second == &cell);
      cell.add(1);
      ++expected[key];
    }
    std::map<std::pair<std::uint32_t, std::uint32_t>, std::uint64_t> found;
    table.for_each([&](std::uint32_t a, std::uint32_t b, const Counter& cell) {
      CHECK(found.emplace(std::pair{a, b}, cell.read()).second);
    });
    CHECK(found == expected);
    CHECK(found.size() > 3000);
  }

  TEST_CASE("cells are found at every edge of a block, and absent ones are null") {
    GrowingTable<Counter> cells;
    const std::vector<std::uint32_t> edges{0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 1023, 1024, 100'000};
    CHECK(cells.find(32) == nullptr);
    CHECK(cells.find(UINT32_MAX) == nullptr);
    std::map<std::uint32_t, Counter*> places;
    for (const std::uint32_t i : edges) {
      places[i] = &cells.at(i);
      cells.at(i).add(i + 1);
    }
    std::set<const Counter*> distinct;
    for (const std::uint32_t i : edges) {
      CAPTURE(i);
      REQUIRE(cells.find(i) == places[i]);
      CHECK(cells.find(i)->read() == i + 1);
      distinct.insert(cells.find(i));
    }
    CHECK(distinct.size() == edges.size());
    CHECK(cells.find(300'000) == nullptr);
  }

  TEST_CASE("no two threads write to the same pair of cache lines") {
    Metrics metrics;
    Slab& slab = metrics.add_slab();
    slab.record(plain(200));
    CHECK(reinterpret_cast<std::uintptr_t>(&slab) % kCacheAlign == 0);
    // Nodes are adjacent in chunks of their own thread. A stride of an odd number of lines spreads them over all sets
    // of the cache; with an even one half of it would be unused.
    constexpr std::size_t kLine = 64, kNode = sizeof(PairTable<PairCounters>::Node);
    CHECK(kNode % kLine == 0);
    CHECK(kNode / kLine % 2 == 1);
    CHECK(sizeof(BackendCounters) % kCacheAlign == 0);
  }

  TEST_CASE("recording a known pair allocates nothing") {
    Metrics metrics;
    Slab& slab = metrics.add_slab();
    const auto use = [&slab](ModelId model) {
      RequestRecord r = plain(200);
      r.model = model;
      r.stream = true;
      r.prompt_tokens = r.completion_tokens = r.first_byte_ns = r.per_token_ns = r.overhead_ns = 5;
      r.fell_back = true;
      r.fallback_to = kModel;
      slab.record(r);
      r.status = 503;
      slab.record(r);
      slab.attempt(kBackend, AttemptOutcome::ok);
      slab.add_in_flight(kBackend, 1);
      slab.add_in_flight(kBackend, -1);
    };
    std::size_t before = allocated_bytes();
    use(kModel);
    if (allocated_bytes() == before) {
      MESSAGE("this build's allocator does not count its bytes: not tested");
      return;
    }
    before = allocated_bytes();
    for (int i = 0; i < 1000; ++i) use(kModel);
    CHECK(allocated_bytes() == before);
  }
}

TEST_SUITE("US1 T026 T028 T029 a record") {
  TEST_CASE("a request is counted once, under its status and as a success or an error") {
    struct Row {
      std::string_view name;
      std::uint16_t status;
      ErrorType error;
      DisconnectPhase disconnect;
      ErrorType expected;
    };
    const auto none = DisconnectPhase::none;
    const Row rows[] = {
        {"whole", 200, ErrorType::none, none, ErrorType::none},
        {"created", 201, ErrorType::none, none, ErrorType::none},
        {"a stream that broke after its 200", 200, ErrorType::backend_error, none, ErrorType::backend_error},
        {"the backend's own 500", 500, ErrorType::backend_error, none, ErrorType::backend_error},
        {"a limit of Nexus", 504, ErrorType::timeout, none, ErrorType::timeout},
        {"no such model", 404, ErrorType::no_backend, none, ErrorType::no_backend},
        {"none healthy", 503, ErrorType::no_healthy_backend, none, ErrorType::no_healthy_backend},
        {"no HTTP", 502, ErrorType::parse_error, none, ErrorType::parse_error},
        {"left early", 499, ErrorType::client_closed, DisconnectPhase::waiting, ErrorType::client_closed},
        {"left early, type not told", 499, ErrorType::none, DisconnectPhase::streaming, ErrorType::client_closed},
        {"refused, type not told", 400, ErrorType::none, none, ErrorType::other},
        {"redirected, type not told", 302, ErrorType::none, none, ErrorType::other},
    };
    for (const Row& row : rows) {
      CAPTURE(row.name);
      Slab slab;
      RequestRecord r = plain(row.status);
      r.error = row.error;
      r.disconnect = row.disconnect;
      slab.record(r);
      const bool failed = row.expected != ErrorType::none;
      CHECK(statuses_of(pair_of(slab, kModel, kBackend)->statuses) == StatusMap{{{row.status, failed}, 1}});
      for (std::size_t type = 0; type < kErrorTypeNames.size(); ++type) {
        const auto error = static_cast<ErrorType>(type);
        CHECK(errors_of(slab, kModel, error) == (failed && error == row.expected ? 1 : 0));
      }
      CHECK(slab.thread().disconnects[static_cast<std::size_t>(row.disconnect)].read() ==
            (row.disconnect == none ? 0 : 1));
    }
  }

  TEST_CASE("histograms observe only known values, and the times of streams only for streams") {
    Slab slab;
    RequestRecord r = plain(200);
    slab.record(r);
    const PairCounters& pair = *pair_of(slab, kModel, kBackend);
    CHECK(values_of(pair.duration, pair.duration_sum).count() == 1);
    CHECK(values_of(pair.prompt_tokens, pair.prompt_sum).count() +
              values_of(pair.completion_tokens, pair.completion_sum).count() ==
          0);
    CHECK(values_of(pair.first_token, pair.first_token_sum).count() +
              values_of(pair.per_token, pair.per_token_sum).count() ==
          0);
    CHECK(values_of(slab.thread().overhead).count() == 0);

    r.prompt_tokens = 0;
    r.completion_tokens = 12;
    r.first_byte_ns = 5;
    r.per_token_ns = 6;
    r.overhead_ns = 7;
    slab.record(r);
    CHECK(values_of(pair.prompt_tokens, pair.prompt_sum).count() == 1);
    CHECK(values_of(pair.completion_tokens, pair.completion_sum).sum == 12);
    CHECK(values_of(pair.first_token, pair.first_token_sum).count() +
              values_of(pair.per_token, pair.per_token_sum).count() ==
          0);
    CHECK(values_of(slab.thread().overhead).sum == 7);

    r.stream = true;
    slab.record(r);
    CHECK(values_of(pair.first_token, pair.first_token_sum).sum == 5);
    CHECK(values_of(pair.per_token, pair.per_token_sum).sum == 6);

    r.reached_backend = false;
    slab.record(r);
    CHECK(values_of(pair.duration, pair.duration_sum).count() == 3);
    CHECK(statuses_of(pair.statuses).at({200, false}) == 4);
  }

  TEST_CASE("T045 a fallback is counted from the requested model to the one that was used") {
    Slab slab;
    RequestRecord r = plain(200);
    r.fallback_to = ModelId{9};
    slab.record(r);
    r.fell_back = true;
    slab.record(r);
    slab.record(r);
    std::map<std::pair<std::uint32_t, std::uint32_t>, std::uint64_t> found;
    slab.fallbacks().for_each([&](std::uint32_t a, std::uint32_t b, const Counter& cell) {
      found[{a, b}] = cell.read();
    });
    CHECK(found == std::map<std::pair<std::uint32_t, std::uint32_t>, std::uint64_t>{{{7, 9}, 2}});
  }

  TEST_CASE("a response without usage is counted at its backend") {
    Slab slab;
    RequestRecord r = plain(200);
    r.without_usage = true;
    slab.record(r);
    CHECK(slab.backend(kBackend)->without_usage.read() == 1);
  }

  TEST_CASE("every other event has its own cell") {
    Slab slab;
    slab.attempt(kBackend, AttemptOutcome::status_5xx);
    slab.health_check(kBackend, 2 * kSecond);
    slab.add_backend_connections(kBackend, 2);
    slab.add_backend_connections(kBackend, -1);
    slab.add_client_connections(5);
    slab.add_in_flight(kBackend, 5);
    slab.add_queued(kBackend, 4);
    slab.queue_waits(kModel).observe(3);
    slab.queue_rejected(QueueRejection::timeout);
    slab.http_rejected(HttpRejection::header_too_large);
    slab.limit_hit(Limit::log_volume);
    slab.log_dropped(11);
    slab.loop_stall(20);
    const BackendCounters& backend = *slab.backend(kBackend);
    CHECK(backend.attempts[6].read() == 1);
    CHECK(values_of(backend.health_latency).sum == 2'000'000'000u);
    CHECK(backend.connections.read() == 1);
    CHECK(backend.queue_depth.read() == 4);
    CHECK(backend.in_flight.read() == 5);
    CHECK(backend.pending.read() == 9);
    CHECK(slab.thread().client_connections.read() == 5);
    CHECK(values_of(slab.model(kModel)->queue_wait).sum == 3);
    CHECK(slab.thread().queue_rejections[1].read() == 1);
    CHECK(slab.thread().http_rejections[2].read() == 1);
    CHECK(slab.thread().limits[static_cast<std::size_t>(Limit::log_volume)].read() == 1);
    CHECK(slab.thread().log_lines_dropped.read() == 11);
    CHECK(values_of(slab.thread().loop_stall).sum == 20);
  }

  TEST_CASE("label values are those of the metrics contract, in the order of their enums") {
    const auto joined = [](const auto& names) {
      std::string all;
      for (const std::string_view name : names) (all += name) += ' ';
      return all;
    };
    const auto at = [](const auto& names, auto value) { return names[static_cast<std::size_t>(value)]; };
    CHECK(joined(kErrorTypeNames) ==
          "none timeout backend_error no_backend no_healthy_backend parse_error client_closed bad_request overloaded "
          "drain other ");
    CHECK(joined(kAttemptOutcomeNames) ==
          "ok connect_error timeout bad_response truncated status_429 status_5xx cancelled ");
    CHECK(joined(kDisconnectPhaseNames) == "none request waiting streaming ");
    CHECK(joined(kHttpRejectionNames) == "malformed header_timeout header_too_large unknown_path method ");
    CHECK(joined(kQueueRejectionNames) == "full timeout ");
    CHECK(name_of(ErrorType::client_closed) == "client_closed");
    CHECK(name_of(AttemptOutcome::status_429) == "status_429");
    CHECK(at(kDisconnectPhaseNames, DisconnectPhase::waiting) == "waiting");
    CHECK(at(kHttpRejectionNames, HttpRejection::header_timeout) == "header_timeout");
    CHECK(at(kQueueRejectionNames, QueueRejection::full) == "full");
    CHECK(at(kLimitNames, Limit::max_connections) == "max_connections");
    CHECK(at(kLimitNames, Limit::idle_timeout) == "idle_timeout");
    CHECK(at(kLimitNames, Limit::queue_size) == "queue_size");
    CHECK(at(kLimitNames, Limit::descriptors) == "descriptors");
    const std::set<std::string_view> distinct(kLimitNames.begin(), kLimitNames.end());
    CHECK(distinct.size() == kLimitNames.size());
  }
}

TEST_SUITE("US3 T043 pending requests") {
  TEST_CASE("pending is the sum over all threads, and zero if nothing was recorded") {
    Metrics metrics;
    Slab& a = metrics.add_slab();
    Slab& b = metrics.add_slab();
    CHECK(metrics.pending(kBackend) == 0);
    a.add_in_flight(kBackend, 1);
    b.add_in_flight(kBackend, 1);
    b.add_in_flight(BackendId{1000}, 1);
    CHECK(metrics.pending(kBackend) == 2);
    CHECK(metrics.pending(BackendId{1000}) == 1);
    b.add_in_flight(kBackend, -1);
    b.add_in_flight(kBackend, -1);  // subtracted by another thread than the one that added it
    CHECK(metrics.pending(kBackend) == 0);
    CHECK(b.pending(kBackend) == -1);
  }

  // Two writers add and subtract in growing tables while two readers sum: a sum is never negative or above the
  // requests in flight, and the final sum is exact.
  TEST_CASE("pending is never negative while it changes, and no change is lost") {
    Metrics metrics;
    Slab* slabs[] = {&metrics.add_slab(), &metrics.add_slab()};
    constexpr std::uint32_t kBackends = 200;
    constexpr int kRounds = 20'000;
    std::atomic<int> writers{2};
    std::atomic<bool> strange{false};

    std::vector<std::thread> threads;
    for (Slab* slab : slabs) {
      threads.emplace_back([slab, &writers] {
        for (int i = 0; i < kRounds; ++i) {
          const BackendId id{static_cast<std::uint32_t>(i) * 7 % kBackends};
          slab->add_in_flight(id, 1);
          slab->add_in_flight(id, 1);
          slab->add_in_flight(id, -1);
          if (i % 100 != 0) slab->add_in_flight(id, -1);
        }
        --writers;
      });
    }
    for (int reader = 0; reader < 2; ++reader) {
      threads.emplace_back([&] {
        do {
          for (std::uint32_t b = 0; b < kBackends; ++b) {
            const std::int64_t pending = metrics.pending(BackendId{b});
            if (pending < 0 || pending > 2 * kRounds / 100 + 4) strange = true;
          }
        } while (writers > 0);
      });
    }
    for (std::thread& t : threads) t.join();

    CHECK_FALSE(strange);
    std::int64_t left = 0;
    for (std::uint32_t b = 0; b < kBackends; ++b) left += metrics.pending(BackendId{b});
    CHECK(left == 2 * kRounds / 100);
  }
}
