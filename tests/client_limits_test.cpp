// client_limits_test.cpp
// Goal:   each wait for a client has its own limit, which ends at its time, under its name and with its answer; places
//         for connections are exact, and come back.
// Method: one worker on the scripted network; the clock moves only when the test says so.
#include <doctest/doctest.h>

#include <functional>
#include <string>

#include "tests/lib/stage.h"

using namespace nexus;
using sim::Peer;
using sim::Stage;

namespace {

constexpr Ns kHeaderTime = 3 * kSecond, kWriteTime = 4 * kSecond, kBodyTime = 5 * kSecond, kIdleTime = 7 * kSecond;
constexpr Ns kMoment = 100 * kMillisecond;

const std::string kAnswer = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
const std::string kHead = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n";
const std::string kGet = "GET /health HTTP/1.1\r\nHost: a\r\n\r\n";

void set_limits(Settings& settings) {
  settings.server.header_timeout_ns = kHeaderTime;
  settings.server.write_timeout_ns = kWriteTime;
  settings.server.body_timeout_ns = kBodyTime;
  settings.server.idle_timeout_ns = kIdleTime;
}

Peer& connect(Stage& stage) {
  Peer& client = stage.net.connect_client();
  stage.settle();
  return client;
}

// A connection on which a request was answered.
Peer& kept(Stage& stage) {
  Peer& client = stage.ask();
  stage.say(*stage.backend(), kAnswer);
  return client;
}

// A client that asks for a page and takes only 20 bytes of it.
Peer& ask_unread(Stage& stage, const std::string& path) {
  Peer& client = connect(stage);
  stage.say(client, "GET " + path + " HTTP/1.1\r\nHost: a\r\n");
  stage.net.stop_reading(client, 20);
  stage.say(client, "\r\n");
  return client;
}

std::uint64_t all_limit_hits(const Stage& stage) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < kLimitNames.size(); ++i) sum += stage.limit_hits(static_cast<Limit>(i));
  return sum;
}

struct Wait {
  const char* name;
  Limit limit;
  Ns time_left;  // when it has begun
  const char* told;
  std::function<Peer&(Stage&)> begin;
};

const Wait kWaits[] = {
    {"for the first byte of a connection", Limit::idle_timeout, kHeaderTime, "",
     [](Stage& stage) -> Peer& { return connect(stage); }},
    {"for the rest of a connection's first head, since its beginning", Limit::header_timeout, kHeaderTime - 2 * kSecond,
     "HTTP/1.1 408",
     [](Stage& stage) -> Peer& {
       Peer& client = connect(stage);
       stage.pass(kSecond);
       stage.say(client, kHead.substr(0, 1));
       stage.pass(kSecond);
       stage.say(client, kHead.substr(1, 20));
       return client;
     }},
    {"for the rest of a later head, since its first byte", Limit::header_timeout, kHeaderTime - kSecond, "HTTP/1.1 408",
     [](Stage& stage) -> Peer& {
       Peer& client = kept(stage);
       stage.pass(kIdleTime - kSecond);
       stage.say(client, kHead.substr(0, 1));
       stage.pass(kSecond);
       stage.say(client, kHead.substr(1, 20));
       return client;
     }},
    {"for the next request", Limit::idle_timeout, kIdleTime, "", [](Stage& stage) -> Peer& { return kept(stage); }},
    {"for a body, since its head", Limit::body_timeout, kBodyTime, "HTTP/1.1 408",
     [](Stage& stage) -> Peer& {
       Peer& client = connect(stage);
       stage.pass(kSecond);
       stage.say(client, kHead);
       return client;
     }},
    {"for the rest of a body, since its head", Limit::body_timeout, kBodyTime - kSecond, "HTTP/1.1 408",
     [](Stage& stage) -> Peer& {
       Peer& client = connect(stage);
       stage.say(client, kHead + "{");
       stage.pass(kSecond);
       stage.say(client, " ");
       return client;
     }},
    {"until it takes an answer of Nexus's own", Limit::write_timeout, kWriteTime, "HTTP/1.1 200",
     [](Stage& stage) -> Peer& { return ask_unread(stage, "/health"); }},
    {"until it takes a page of Nexus's own", Limit::write_timeout, kWriteTime, "HTTP/1.1 200",
     [](Stage& stage) -> Peer& { return ask_unread(stage, "/metrics"); }},
    {"until it takes a response", Limit::write_timeout, kWriteTime, "HTTP/1.1 200",
     [](Stage& stage) -> Peer& {
       Peer& client = stage.ask();
       stage.net.stop_reading(client, 20);
       stage.say(*stage.backend(), kAnswer);
       return client;
     }},
};

}  // namespace

TEST_CASE("each wait for a client ends at its own limit, not before and not later, and counts under its name alone") {
  for (const Wait& wait : kWaits) {
    CAPTURE(std::string(wait.name));
    Stage stage(1, set_limits);
    Peer& client = wait.begin(stage);
    const std::size_t answered = client.received.size();
    stage.pass(wait.time_left - kMoment);
    CHECK_FALSE(client.ended);
    CHECK(all_limit_hits(stage) == 0);
    stage.pass(2 * kMoment);
    CHECK(client.ended);
    CHECK(stage.limit_hits(wait.limit) == 1);
    CHECK(all_limit_hits(stage) == 1);
    const bool in_head = wait.limit == Limit::header_timeout;
    CHECK(stage.slab().thread().http_rejections[static_cast<std::size_t>(HttpRejection::header_timeout)].read() ==
          (in_head ? 1 : 0));
    const bool taking = wait.limit == Limit::write_timeout;  // all that it took came before
    CHECK(client.received.substr(taking ? 0 : answered).starts_with(wait.told));
    if (taking || *wait.told == '\0') CHECK(client.received.size() == answered);
    stage.pass(kLingerTime + kSecond);
    CHECK(stage.net.closed(client));
    CHECK(stage.slab().thread().client_connections.read_signed() == 0);
  }
}

TEST_CASE("a client that does not close its connection after Nexus's FIN has kLingerTime for it") {
  Stage stage(1, set_limits);
  Peer& client = connect(stage);
  stage.say(client, "no HTTP\r\n\r\n");
  CHECK(client.ended);
  stage.pass(kLingerTime - kMoment);
  CHECK_FALSE(stage.net.closed(client));
  stage.pass(2 * kMoment);
  CHECK(stage.net.closed(client));
}

TEST_CASE("a slow body that goes on has body_timeout, and one that nearly stops has kBodyLook") {
  const auto with_long_time = [](Settings& settings) {
    set_limits(settings);
    settings.server.body_timeout_ns = 10 * kBodyLook;
  };
  for (const bool goes_on : {true, false}) {
    CAPTURE(goes_on);
    Stage stage(1, with_long_time);
    Peer& client = connect(stage);
    stage.say(client, "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n{");
    for (int look = 0; look < 3; ++look) {
      stage.say(client, std::string(goes_on ? kLeastBodyBytes : kLeastBodyBytes / 2, ' '));
      stage.pass(kBodyLook);
    }
    stage.pass(kMoment);
    CHECK(client.ended != goes_on);
    CHECK(stage.limit_hits(Limit::body_timeout) == (goes_on ? 0 : 1));
  }
}

TEST_CASE("max_connections is exact, and a connection that is refused takes no place") {
  Stage stage(1, [](Settings& settings) { settings.server.max_connections = 2; });
  Peer& first = connect(stage);
  connect(stage);
  for (int i = 1; i <= 3; ++i) {
    const Peer& refused = connect(stage);
    CHECK(refused.received.starts_with("HTTP/1.1 503"));
    CHECK(refused.ended);
    CHECK(stage.limit_hits(Limit::max_connections) == static_cast<std::uint64_t>(i));
  }
  CHECK(stage.slab().thread().client_connections.read_signed() == 2);
  stage.net.finish(first);
  stage.settle();
  Peer& next = connect(stage);
  stage.say(next, kGet);
  CHECK(next.received.starts_with("HTTP/1.1 200"));
  CHECK(connect(stage).received.starts_with("HTTP/1.1 503"));
}

TEST_CASE("clients for whom there was no descriptor are accepted after a pause, though no connection has ended") {
  Stage stage;
  connect(stage);
  stage.net.wire.most_descriptors = stage.net.wire.descriptors();
  Peer& client = connect(stage);
  stage.say(client, kGet);
  CHECK(client.received.empty());
  CHECK(stage.limit_hits(Limit::descriptors) == 1);
  CHECK(all_limit_hits(stage) == 1);
  stage.net.wire.most_descriptors += 1;
  stage.settle();
  CHECK(client.received.empty());
  stage.pass(2 * kAcceptPause);
  CHECK(client.received.starts_with("HTTP/1.1 200"));
}

TEST_CASE("a request that waits too long for another one of its key is told so, and counts as over the key's limit") {
  Stage stage(1, [](Settings& settings) {
    settings.server.api_keys = {{"alice", "key-of-alice", {.max_pending = 1}}};
    settings.queue.size = 5;
    settings.queue.timeout_ns = kSecond;
  });
  const auto ask = [&]() -> Peer& {
    Peer& client = stage.net.connect_client();
    stage.settle();
    std::string text = sim::post(sim::kAsk);
    stage.say(client, text.insert(text.find("Host: "), "Authorization: Bearer key-of-alice\r\n"));
    return client;
  };
  ask();
  const Peer& second = ask();
  CHECK(second.received.empty());
  stage.pass(1100 * kMillisecond);
  CHECK(stage.answer_to(second).status == 429);
  CHECK(stage.answer_to(second).body.find("\"code\":\"key_concurrency\"") != std::string::npos);
  CHECK(stage.limit_hits(Limit::key_concurrency) == 1);
  CHECK(stage.limit_hits(Limit::queue_timeout) == 0);
  CHECK(stage.errors(ErrorType::overloaded) == 1);
}

TEST_CASE("a request that waits for another one of its key is queued, but is no backend's") {
  Stage stage(1, [](Settings& settings) {
    settings.server.api_keys = {{"alice", "key-of-alice", {.max_pending = 1}}};
    settings.queue.size = 5;
  });
  const std::string key = "Authorization: Bearer key-of-alice\r\n";
  for (int i = 0; i < 3; ++i) {
    Peer& client = stage.net.connect_client();
    stage.settle();
    std::string text = sim::post(sim::kAsk);
    stage.say(client, text.insert(text.find("Host: "), key));
  }
  Peer& scraper = stage.net.connect_client();
  stage.settle();
  stage.say(scraper, "GET /metrics HTTP/1.1\r\nHost: a\r\n" + key + "\r\n");
  const std::string& page = scraper.received;
  CHECK(page.find("\nnexus_pending_requests{backend=\"b1\"} 1\n") != std::string::npos);
  CHECK(page.find("\nnexus_pending_requests{backend=\"none\"}") == std::string::npos);
  CHECK(page.find("\nnexus_queue_depth{backend=\"none\"} 2\n") != std::string::npos);
  CHECK(page.find("\nnexus_key_pending{key=\"alice\"} 3\n") != std::string::npos);
  const std::size_t stats = page.size();
  stage.say(scraper, "GET /v1/stats HTTP/1.1\r\nHost: a\r\n" + key + "\r\n");
  CHECK(page.find(R"({"id":"none")", stats) == std::string::npos);
  CHECK(page.find(R"("keys":[{"name":"alice","requests":0,"errors":0,"pending":3,)", stats) != std::string::npos);
}

TEST_CASE("a key whose own limit fills the queue is told of that limit") {
  Stage stage(1, [](Settings& settings) {
    settings.server.api_keys = {{"alice", "key-of-alice", {.max_pending = 1}}};
    settings.queue.size = 1;
  });
  Peer* client = nullptr;
  for (int i = 0; i < 3; ++i) {
    client = &stage.net.connect_client();
    stage.settle();
    std::string text = sim::post(sim::kAsk);
    stage.say(*client, text.insert(text.find("Host: "), "Authorization: Bearer key-of-alice\r\n"));
  }
  CHECK(stage.answer_to(*client).status == 429);
  CHECK(stage.answer_to(*client).body.find("\"code\":\"key_concurrency\"") != std::string::npos);
  CHECK(stage.limit_hits(Limit::queue_size) == 0);
}

TEST_CASE("a queued request is counted under a backend that it waits for, also when another one is ejected") {
  Stage stage(2, [](Settings& settings) {
    for (BackendSettings& backend : settings.backends) backend.max_pending = 1;
    settings.queue.size = 5;
    settings.routing.retries = 0;
  });
  const auto depth = [&](std::size_t n) {
    return stage.slab().backend(BackendId{static_cast<std::uint32_t>(n)})->queue_depth.read_signed();
  };
  stage.ask();
  stage.ask();
  stage.ask();
  stage.ask();
  REQUIRE(depth(1) == 2);
  stage.say(*stage.backend(1), "SSH-2.0\r\n\r\n");
  REQUIRE(stage.ejected(1));
  stage.pass(2 * kSecond);
  CHECK(depth(1) == 0);
  CHECK(depth(2) == 2);
}
