#include <doctest/doctest.h>

#include <string>

#include "nexus/server/builtin_pages.h"
#include "tests/hostile/gateway.h"

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

// Such a backend has the id `none`, which several share: its requests are counted there.
TEST_CASE("more than kMaxBackendNames backends over all reloads do not end the process") {
  constexpr std::size_t kBackends = nexus::kMaxBackendNames + 100;
  Gateway gateway({.backends = kBackends});
  Peer& client = gateway.connect();
  for (std::size_t i = 0; i < kBackends; ++i) gateway.send(client, kPost);
  CHECK(client.received.starts_with("HTTP/1.1 200"));
}
