#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

#include "nexus/server/builtin_pages.h"
#include "tests/hostile/gateway.h"
#include "tests/lib/stage.h"

using namespace hostile;

namespace {

const std::string kBody = R"({"model":"m"})";
const std::string kPost =
    "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: " + std::to_string(kBody.size()) + "\r\n\r\n" +
    kBody;

}  // namespace

// A client that saw the new configuration on one worker must not see the old one on another.
TEST_CASE("a new configuration applies to the next request even if the worker has not been woken yet") {
  Gateway gateway;
  Peer& client = gateway.connect();
  gateway.send(client, kPost);
  CHECK(client.received.starts_with("HTTP/1.1 200"));
  const std::size_t answered = client.received.size();
  gateway.reload_unnoticed({.keys = true});
  gateway.net.send(client, kPost);
  gateway.settle();
  CHECK(client.received.substr(answered).starts_with("HTTP/1.1 401"));
}

TEST_CASE("a large page is sent in shares, and other clients are served between two shares") {
  Gateway gateway({.backends = 400});
  Peer& scraper = gateway.connect();
  Peer& client = gateway.connect();
  gateway.net.send(scraper, "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
  while (scraper.received.empty()) gateway.turn();
  CHECK(scraper.received.size() <= 2 * nexus::kPageShareBytes);  // the first share, and perhaps its second turn
  gateway.net.send(client, "GET /health HTTP/1.1\r\nHost: a\r\n\r\n");
  const std::size_t before = scraper.received.size();
  gateway.turn();
  CHECK(client.received.starts_with("HTTP/1.1 200"));
  CHECK(scraper.received.size() == before + nexus::kPageShareBytes);
  gateway.settle();
  const auto read = rfc9112::read_responses(scraper.received, {"GET"}, false);
  REQUIRE(read.whole());
  CHECK(read.messages.at(0).body.size() > 4 * nexus::kPageShareBytes);
}

// ---- time ----

TEST_CASE("a head on a kept connection has header_timeout of its own, however little is left of idle_timeout") {
  Gateway gateway({.edit = [](nexus::Settings& settings) {
    settings.server.idle_timeout_ns = 10 * nexus::kSecond;
    settings.server.header_timeout_ns = 5 * nexus::kSecond;
  }});
  Peer& client = gateway.connect();
  gateway.send(client, kPost);
  const std::size_t answered = client.received.size();
  gateway.pass(9 * nexus::kSecond);
  gateway.send(client, kPost.substr(0, 20));
  gateway.pass(4 * nexus::kSecond);
  CHECK(client.received.size() == answered);
  gateway.send(client, kPost.substr(20));
  CHECK(client.received.substr(answered).starts_with("HTTP/1.1 200"));
  gateway.send(client, kPost.substr(0, 20));
  gateway.pass(6 * nexus::kSecond);
  CHECK(client.received.find("HTTP/1.1 408") != std::string::npos);
}

TEST_CASE("request_timeout runs from the head on, while the body comes too") {
  Gateway gateway({.edit = [](nexus::Settings& settings) {
    settings.upstream.request_timeout_ns = 5 * nexus::kSecond;
    settings.server.body_timeout_ns = 60 * nexus::kSecond;
  }});
  Peer& slow = gateway.connect();
  gateway.send(slow, kPost.substr(0, kPost.size() - 1));
  gateway.pass(6 * nexus::kSecond);
  CHECK(slow.received.starts_with("HTTP/1.1 504"));
  CHECK(slow.received.find("request_timeout") != std::string::npos);
  // 4 seconds for the body leave 1 for the backend.
  gateway.answer = [](const rfc9112::Message&) { return BackendPlan{}; };
  Peer& client = gateway.connect();
  gateway.send(client, kPost.substr(0, kPost.size() - 1));
  gateway.pass(4 * nexus::kSecond);
  gateway.send(client, kPost.substr(kPost.size() - 1));
  CHECK(client.received.empty());
  gateway.pass(2 * nexus::kSecond);
  CHECK(client.received.starts_with("HTTP/1.1 504"));
}

TEST_CASE("a head that is longer than a max_header which a reload has just set is refused, wherever it was cut") {
  const auto with = [](std::size_t bytes) {
    return GatewayOptions{.edit = [bytes](nexus::Settings& settings) { settings.server.max_header_bytes = bytes; }};
  };
  const std::string path = "GET /" + std::string(2000, 'x');
  const std::string field = "GET /health HTTP/1.1\r\nHost: a\r\nX: " + std::string(2000, 'x');
  for (const auto& [begun, status] : {std::pair(path, "414"), std::pair(field, "431")}) {
    Gateway gateway(with(16u << 10));
    Peer& client = gateway.connect();
    gateway.send(client, begun);
    gateway.reload(with(1u << 10));
    gateway.send(client, "y");
    CHECK(client.received.starts_with(std::string("HTTP/1.1 ") + status));
    CHECK(client.ended);
  }
}

// ---- drain ----

TEST_CASE("a drain closes idle connections at once, and those in use after a response that says so") {
  Gateway gateway;
  Peer& idle = gateway.connect();
  gateway.send(idle, kPost);
  Peer& busy = gateway.connect();
  gateway.answer = [](const rfc9112::Message&) { return BackendPlan{}; };
  gateway.send(busy, kPost);
  Peer& late = gateway.connect();
  Peer& pipelined = gateway.connect();
  gateway.send(pipelined, kPost.substr(0, 10));
  gateway.drain();
  CHECK(idle.ended);
  CHECK_FALSE(busy.ended);
  CHECK_FALSE(late.ended);  // its first request may be on its way
  gateway.send(late, kPost);
  gateway.send(pipelined, kPost.substr(10));
  for (Peer* peer : {&late, &pipelined}) {
    CHECK(peer->received.starts_with("HTTP/1.1 503"));
    CHECK(peer->received.find("Connection: close\r\n") != std::string::npos);
    CHECK(peer->ended);
  }
}

TEST_CASE("a response whose head is written during a drain says that the connection closes") {
  Gateway gateway;
  Peer& client = gateway.connect();
  Peer& page = gateway.connect();
  gateway.control_sleeps = true;
  gateway.send(page, "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
  bool drained = false;
  gateway.answer = [&](const rfc9112::Message&) {
    if (!std::exchange(drained, true)) gateway.drain();
    return BackendPlan{{good_answer()}};
  };
  gateway.send(client, kPost);
  gateway.control_sleeps = false;
  gateway.settle();
  for (Peer* peer : {&client, &page}) {
    CHECK(peer->received.starts_with("HTTP/1.1 200"));
    CHECK(peer->received.find("Connection: close\r\n") != std::string::npos);
    CHECK(peer->ended);
  }
}

TEST_CASE("a connection is closed after the response that it was getting when the drain began") {
  Gateway gateway;
  gateway.answer = [](const rfc9112::Message&) {
    return BackendPlan{{"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nh"}};
  };
  Peer& client = gateway.connect();
  gateway.send(client, kPost);
  gateway.drain();
  CHECK(client.received.ends_with("h"));
  CHECK_FALSE(client.ended);
  for (Peer& peer : gateway.net.peers) {
    if (peer.to_backend) gateway.net.send(peer, "i");
  }
  gateway.settle();
  CHECK(client.received.ends_with("hi"));
  CHECK(client.ended);
}

// ---- the first checks ----

namespace {

// A backend whose list of models is not read yet, and clients that ask for models.
struct Discovery : nexus::sim::Stage {
  explicit Discovery(bool listed = false)
      : Stage(1, [listed](nexus::Settings& settings) {
          settings.health.enabled = true;
          settings.upstream.connect_timeout_ns = 2 * nexus::kSecond;
          settings.backends[0].apis = bit_of(nexus::Api::chat);  // it is not asked for pages of Ollama's
          if (!listed) settings.backends[0].models.clear();
        }) {}
  Peer& get(const std::string& path, const std::string& fields = {}) {
    Peer& client = net.connect_client();
    settle();
    say(client, "GET " + path + " HTTP/1.1\r\nHost: a\r\n" + fields + "\r\n");
    return client;
  }
  void end_check() { say(*backend(), "HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n{\"data\":[{\"id\":\"mine\"}]}"); }
};

const char* const kModelPages[] = {"/v1/models", "/v1/models/mine", "/api/tags", "/api/ps", "/api/version"};

}  // namespace

TEST_CASE("pages about models wait for the first checks, as requests do") {
  Discovery stage;
  std::vector<Peer*> clients;
  for (const char* path : kModelPages) clients.push_back(&stage.get(path));
  Peer& health = stage.get("/health");
  CHECK(health.received.starts_with("HTTP/1.1 503"));
  stage.pass(nexus::kSecond);
  for (const Peer* client : clients) CHECK(client->received.empty());
  stage.end_check();
  for (std::size_t i = 0; i < clients.size(); ++i) {
    CAPTURE(std::string(kModelPages[i]));
    CHECK(clients[i]->received.starts_with("HTTP/1.1 200"));
    if (i < 3) CHECK(clients[i]->received.find("\"mine") != std::string::npos);
  }
  // From now on none waits, on the same connection too.
  const std::size_t answered = clients[0]->received.size();
  stage.say(*clients[0], "GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n");
  CHECK(clients[0]->received.size() == 2 * answered);
}

TEST_CASE("pages about models wait for first checks no longer than requests do, each in the shape of its API") {
  Discovery stage;
  Peer& list = stage.get("/v1/models");
  Peer& model = stage.get("/v1/models/mine");
  Peer& anthropic = stage.get("/v1/models/mine", "anthropic-version: 2023-06-01\r\n");
  Peer& left = stage.get("/v1/models");
  stage.net.finish(left);
  stage.pass(1900 * nexus::kMillisecond);
  for (const Peer* client : {&list, &model, &anthropic}) CHECK(client->received.empty());
  stage.pass(200 * nexus::kMillisecond);
  CHECK(list.received.find(R"({"object":"list","data":[]})") != std::string::npos);
  for (const Peer* client : {&model, &anthropic}) CHECK(client->received.starts_with("HTTP/1.1 503"));
  CHECK(model.received.find(R"({"error":{"message":"No backend's list)") != std::string::npos);
  CHECK(anthropic.received.find(R"({"type":"error","error":{)") != std::string::npos);
  // The time of one page is not that of the next.
  const std::size_t answered = list.received.size();
  stage.say(list, "GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n");
  CHECK(list.received.size() == answered);
  stage.end_check();
  CHECK(list.received.size() > answered);
}

TEST_CASE("models that the configuration lists are not shown before the first check of their backend") {
  Discovery stage(true);
  Peer& list = stage.get("/v1/models");
  CHECK(list.received.empty());
  stage.end_check();
  CHECK(list.received.find(R"("id":"m")") != std::string::npos);
}

TEST_CASE("/health and /metrics count the same models, also one that an alias of its name hides") {
  nexus::sim::Stage stage(2, [](nexus::Settings& settings) {
    settings.backends[0].models = {"m", "hidden"};
    settings.backends[1].models = {"m", "hidden", "third"};
    settings.aliases = {{"hidden", "m"}, {"alias", "m"}};
  });
  Peer& client = stage.net.connect_client();
  stage.settle();
  stage.say(client, "GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
  CHECK(client.received.find(R"("models":3})") != std::string::npos);
  CHECK(client.received.find("\nnexus_models_available 3\n") != std::string::npos);
}

TEST_CASE("a backend that is never checked has no next check") {
  nexus::sim::Stage stage;  // without health checks, with a list of its own
  Peer& client = stage.net.connect_client();
  stage.settle();
  stage.pass(nexus::kSecond);
  stage.say(client, "GET /v1/stats HTTP/1.1\r\nHost: a\r\n\r\n");
  CHECK(client.received.find(R"("last_check_seconds":null,"next_check_seconds":null)") != std::string::npos);
}
