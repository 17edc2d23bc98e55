// counted_test.cpp
// Goal:   the numbers that a whole gateway counts mean what their names say.
// Method: a gateway on a scripted network (hostile/gateway.h), whose clock moves only when the test says so.
#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/proxy/exchange_times.h"
#include "nexus/proxy/worker_context.h"
#include "tests/hostile/gateway.h"
#include "tests/hostile/requests.h"

using namespace nexus;
using hostile::BackendPlan;
using hostile::Gateway;
using hostile::Peer;

namespace {

Ns overhead_of(const Gateway& gateway, std::uint64_t expected_requests) {
  HistogramValues<kOverheadBounds> values;
  gateway.slab().thread().overhead.add_to(values);
  CHECK(values.count() == expected_requests);
  return static_cast<Ns>(values.sum);
}

std::uint64_t hits(const Gateway& gateway, Limit limit) {
  return gateway.slab().thread().limits[static_cast<std::size_t>(limit)].read();
}

std::function<void(Settings&)> capped(std::uint32_t queue_size) {
  return [queue_size](Settings& settings) {
    settings.backends[0].max_pending = 1;
    settings.queue.size = queue_size;
  };
}

std::string taken_from(LogRing& ring) {
  std::string lines;
  ring.events.take(lines);
  return lines;
}

std::string post_for(std::string_view model) {
  return hostile::json_post(R"({"model":")" + std::string(model) + "\"}");
}

}  // namespace

TEST_CASE("the overhead is without the waits for the queue and for a connection") {
  ExchangeSummary summary;
  summary.complete_ns = 100;
  summary.begin_wait(110);  // in the queue
  summary.end_wait(ExchangeState::queued, 1'000'110);
  summary.begin_wait(1'000'115);  // for a connection
  summary.end_wait(ExchangeState::connecting, 3'000'115);
  summary.note_request_sent(3'000'120);
  CHECK(summary.record.overhead_ns == 20);
  summary.note_response_sent(4'000'000, 4'000'007);
  summary.note_response_sent(5'000'000, 6'000'000);  // only the first bytes count
  CHECK(summary.record.overhead_ns == 27);
  summary.reset();
  summary.complete_ns = 7'000'000;
  summary.note_request_sent(7'000'003);
  CHECK(summary.record.overhead_ns == 3);
}

TEST_CASE("a request that waits two seconds in the queue adds nothing to the overhead") {
  Gateway gateway({.edit = capped(1)});
  gateway.answer = [](const rfc9112::Message&) { return BackendPlan{}; };
  Peer& first = gateway.connect();
  gateway.send(first, hostile::good_post());
  Peer& second = gateway.connect();
  gateway.send(second, hostile::good_post());
  REQUIRE(gateway.backend_links() == 1);
  gateway.pass(2 * kSecond);

  Peer& backend = *std::find_if(gateway.net.peers.begin(), gateway.net.peers.end(),
                                [](const Peer& peer) { return peer.to_backend; });
  gateway.answer = [](const rfc9112::Message&) { return BackendPlan{{hostile::good_answer()}, false, false}; };
  gateway.net.send(backend, hostile::good_answer());
  gateway.settle();
  CHECK(second.received.starts_with("HTTP/1.1 200 "));
  CHECK(overhead_of(gateway, 2) < kMillisecond);
}

TEST_CASE("the time for which a backend takes no more of a large request is not overhead") {
  Gateway gateway({.max_body_bytes = 1u << 20});
  gateway.net.on_connect = [&](Peer& backend) { gateway.net.stop_reading(backend, 1000); };
  gateway.answer = [](const rfc9112::Message&) { return BackendPlan{{hostile::good_answer()}, false, false}; };
  Peer& client = gateway.connect();
  gateway.send(client, hostile::json_post(R"({"model":"m","x":")" + std::string(300'000, 'x') + "\"}"));
  REQUIRE(gateway.backend_links() == 1);
  for (const std::size_t window : {2'000u, 3'000u}) {  // it goes on for a moment, twice
    gateway.pass(2 * kSecond);
    Peer& backend = gateway.net.peers.back();
    gateway.net.read_on(backend);
    gateway.net.stop_reading(backend, window);
    gateway.settle();
  }
  CHECK(client.received.empty());
  gateway.pass(2 * kSecond);
  gateway.net.read_on(gateway.net.peers.back());
  gateway.settle();
  CHECK(client.received.starts_with("HTTP/1.1 200 "));
  CHECK(overhead_of(gateway, 1) < kMillisecond);
}

TEST_CASE("without a queue the refusal says so and counts under the backend's limit, with one under the queue's") {
  for (const std::uint32_t queue_size : {0u, 1u}) {
    CAPTURE(queue_size);
    Gateway gateway({.edit = capped(queue_size)});
    gateway.answer = [](const rfc9112::Message&) { return BackendPlan{}; };
    for (std::uint32_t i = 0; i <= queue_size; ++i) gateway.send(gateway.connect(), hostile::good_post());
    Peer& refused = gateway.connect();
    gateway.send(refused, hostile::good_post());
    CHECK(refused.received.starts_with("HTTP/1.1 429 "));
    const bool queue = queue_size > 0;
    CHECK(refused.received.find(queue ? "\"code\":\"queue_full\"" : "\"code\":\"backends_full\"") != std::string::npos);
    CHECK(hits(gateway, Limit::backend_max_pending) == (queue ? 0 : 1));
    CHECK(hits(gateway, Limit::queue_size) == (queue ? 1 : 0));
    CHECK(gateway.slab().thread().queue_rejections[0].read() == (queue ? 1 : 0));
  }
}

TEST_CASE("a fallback counts under the name that the client asked for, and an alias alone is none") {
  Gateway gateway({.edit = [](Settings& settings) {
    settings.aliases = {{"gpt-4", "big"}, {"nick", "m"}};
    settings.fallbacks = {{"big", {"m"}}};
  }});
  for (const std::string_view model : {"gpt-4", "gpt-4", "big", "nick", "m"}) {
    Peer& client = gateway.connect();
    gateway.send(client, post_for(model));
    CHECK(client.received.starts_with("HTTP/1.1 200 "));
  }
  std::map<std::uint32_t, std::uint64_t> fallbacks, requests;
  gateway.slab().fallbacks().for_each(
      [&](std::uint32_t from, std::uint32_t, const Counter& count) { fallbacks[from] += count.read(); });
  gateway.slab().pairs().for_each([&](std::uint32_t model, std::uint32_t, const PairCounters& counters) {
    counters.statuses.for_each([&](const StatusCounters::Count& count) { requests[model] += count.count; });
  });
  REQUIRE(fallbacks.size() == 2);
  REQUIRE(requests.size() == 4);
  std::uint64_t sum = 0;
  for (const auto& [model, count] : fallbacks) {
    CHECK(count == requests[model]);  // never more: their ratio is a share
    sum += count;
  }
  CHECK(sum == 3);
}

TEST_CASE("a fallback that fails too has served nobody") {
  Gateway gateway({.edit = [](Settings& settings) { settings.fallbacks = {{"big", {"m"}}}; }});
  gateway.answer = [](const rfc9112::Message&) { return BackendPlan{{}, true, false}; };
  Peer& client = gateway.connect();
  gateway.send(client, post_for("big"));
  CHECK(client.received.starts_with("HTTP/1.1 502 "));
  gateway.slab().fallbacks().for_each(
      [](std::uint32_t, std::uint32_t, const Counter& count) { CHECK(count.read() == 0); });
}

TEST_CASE("cached prompt tokens are counted, unless a backend claims more than the prompt has") {
  for (const auto& [cached, expected] : {std::pair{0u, 0u}, {80u, 80u}, {100u, 100u}, {101u, 0u}}) {
    CAPTURE(cached);
    Gateway gateway;
    const std::string body =
        R"({"usage":{"prompt_tokens":100,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":)" +
        std::to_string(cached) + "}}}";
    gateway.answer = [&](const rfc9112::Message&) {
      return BackendPlan{{"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " +
                          std::to_string(body.size()) + "\r\n\r\n" + body},
                         false,
                         false};
    };
    gateway.send(gateway.connect(), hostile::good_post());
    std::uint64_t counted = 0, prompts = 0;
    gateway.slab().pairs().for_each([&](std::uint32_t, std::uint32_t, const PairCounters& counters) {
      counted += counters.cached_sum.read();
      prompts += counters.prompt_sum.read();
    });
    CHECK(prompts == 100);
    CHECK(counted == expected);
  }
}

TEST_CASE("each request counts under its endpoint, also one that Nexus refuses") {
  Gateway gateway;
  gateway.send(gateway.connect(), hostile::good_post());
  gateway.send(gateway.connect(), post_for("unknown"));
  std::map<std::uint32_t, std::uint64_t> by_status;
  gateway.slab().thread().endpoints[0].for_each(
      [&](const StatusCounters::Count& count) { by_status[count.status] += count.count; });
  CHECK(by_status == std::map<std::uint32_t, std::uint64_t>{{200, 1}, {404, 1}});
}

TEST_CASE("failed requests have one log line a second for each backend, which counts those left out") {
  LogRing ring;
  Log log(&ring, LogSettings{});
  AttemptLog attempts;
  BackendView a, b;
  a.id = BackendId{1};
  a.name = "a";
  b.id = BackendId{40};
  b.name = "b";
  const auto fail = [&](const BackendView& backend, Ns now) {
    attempts.failed(log, now, backend, AttemptOutcome::truncated, "", "awaiting", "r1");
  };
  for (int i = 0; i < 5; ++i) fail(a, kSecond);
  fail(b, kSecond);
  fail(a, 2 * kSecond - 1);
  fail(a, 2 * kSecond);
  const std::string text = taken_from(ring);
  CHECK(std::count(text.begin(), text.end(), '\n') == 3);
  CHECK(text.find("backend=a why=truncated detail=- state=awaiting request_id=r1 left_out=0\n") != std::string::npos);
  CHECK(text.find("backend=b why=truncated detail=- state=awaiting request_id=r1 left_out=0\n") != std::string::npos);
  CHECK(text.find("backend=a why=truncated detail=- state=awaiting request_id=r1 left_out=5\n") != std::string::npos);
}
