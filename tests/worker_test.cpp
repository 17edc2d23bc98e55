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

// One worker may have told a client of it already, which then comes to this one.
TEST_CASE("a new configuration holds for the request whose turn it is, also where nobody has woken the worker yet") {
  Gateway gateway;
  Link& client = gateway.connect();
  gateway.send(client, kPost);
  CHECK(client.outgoing.starts_with("HTTP/1.1 200"));
  const std::size_t answered = client.outgoing.size();
  gateway.reload_unnoticed({.keys = true});
  gateway.net.send(client, kPost);
  gateway.settle();
  CHECK(client.outgoing.substr(answered).starts_with("HTTP/1.1 401"));
}

TEST_CASE("a large page is sent in shares, and others are served between them") {
  constexpr std::size_t kMostHeadBytes = 1000;
  Gateway gateway({.page = std::string(3'000'000, 'p')});
  Link& scraper = gateway.connect();
  Link& client = gateway.connect();
  gateway.net.send(scraper, "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
  while (scraper.outgoing.empty()) gateway.turn();
  CHECK(scraper.outgoing.size() <= 2 * nexus::kPageShareBytes);  // it began, and its turn came again
  gateway.net.send(client, "GET /health HTTP/1.1\r\nHost: a\r\n\r\n");
  const std::size_t before = scraper.outgoing.size();
  gateway.turn();
  CHECK(client.outgoing.starts_with("HTTP/1.1 200"));
  CHECK(scraper.outgoing.size() == before + nexus::kPageShareBytes);
  gateway.settle();
  CHECK(scraper.outgoing.size() > 3'000'000);
  CHECK(scraper.outgoing.size() < 3'000'000 + kMostHeadBytes);
}
