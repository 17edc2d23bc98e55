// hostile_reload_test.cpp
// Goal:   each decision uses the fleet and the settings as they are when it is made, not as they were.
// Method: one gateway on a scripted network; the fleet or the configuration changes while a request is under way.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "tests/hostile/gateway.h"
#include "tests/hostile/requests.h"

using namespace hostile;
using nexus::kMillisecond;
using nexus::kSecond;
using nexus::Settings;

namespace {

const std::string kModels = R"({"data":[{"id":"m"}]})";

BackendPlan ok(const std::string& body) {
  return {{"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) +
           "\r\n\r\n" + body},
          false,
          false};
}
BackendPlan broken() { return {{}, false, true}; }
BackendPlan silent() { return {{}, false, false}; }

bool is_check(const rfc9112::Message& message) { return message.method == "GET"; }
bool is_at(const rfc9112::Message& message, const char* address) { return message.value("Host") == address; }

std::string ask(const std::string& fields = "") {
  return "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n" + fields +
         "Content-Length: " + std::to_string(kBody.size()) + "\r\n\r\n";
}

// The statuses that `client` got, in order.
std::vector<int> statuses(const Peer& client) {
  const std::vector<std::string> methods(100, "POST");
  std::vector<int> all;
  for (const auto& message : rfc9112::read_responses(client.received, methods, client.ended).messages) {
    all.push_back(message.status);
  }
  return all;
}
using Statuses = std::vector<int>;

// The requests that came to `address`, without health checks.
std::vector<rfc9112::Message> requests_at(const Gateway& gateway, const char* address) {
  std::vector<rfc9112::Message> found;
  for (const auto& reading : gateway.backend_saw()) {
    for (const auto& message : reading.messages) {
      if (!is_check(message) && is_at(message, address)) found.push_back(message);
    }
  }
  return found;
}

std::size_t checks_at(const Gateway& gateway, const char* address) {
  std::size_t count = 0;
  for (const auto& reading : gateway.backend_saw()) {
    for (const auto& message : reading.messages) count += is_check(message) && is_at(message, address) ? 1 : 0;
  }
  return count;
}

constexpr const char* kFirst = "10.0.0.1:8001";
constexpr const char* kSecond_ = "10.0.0.2:8001";
constexpr const char* kThird = "10.0.0.3:8001";

void at(Settings& settings, std::size_t backend, const char* host) { settings.backends[backend].address.host = host; }

}  // namespace

TEST_CASE("a backend that comes up while a body uploads serves that request") {
  Gateway gateway({.edit = [](Settings& s) {
    s.health.enabled = true;
    s.health.interval_ns = kSecond;
    s.health.recoveries = 1;
  }});
  bool up = false;
  gateway.answer = [&](const rfc9112::Message& message) {
    if (!up) return BackendPlan{{"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"}, false, false};
    return ok(is_check(message) ? kModels : kGoodBody);
  };
  gateway.pass(2 * kSecond);
  Peer& client = gateway.connect();
  gateway.send(client, ask() + kBody);
  REQUIRE(statuses(client) == Statuses{503});
  gateway.send(client, ask() + kBody.substr(0, 5));
  up = true;
  gateway.pass(2 * kSecond);
  gateway.send(client, kBody.substr(5));
  CHECK(statuses(client) == Statuses{503, 200});
}

TEST_CASE("a key that Nexus checked is never passed on, even if a reload drops the keys before the request is sent") {
  Gateway gateway({.keys = true});
  Peer& client = gateway.connect();
  gateway.send(client, ask("Authorization: Bearer secret\r\n") + kBody.substr(0, 5));
  gateway.reload({.keys = false});
  gateway.send(client, kBody.substr(5));
  REQUIRE(statuses(client) == Statuses{200});
  CHECK_FALSE(requests_at(gateway, kFirst).at(0).has("Authorization"));
  gateway.send(client, ask("Authorization: Bearer of-the-backend\r\n") + kBody);
  CHECK(requests_at(gateway, kFirst).at(1).value("Authorization") == "Bearer of-the-backend");
}

TEST_CASE("a key that came before a reload asked for keys is not passed on after it") {
  Gateway gateway({.keys = false});
  Peer& client = gateway.connect();
  gateway.send(client, ask("Authorization: Bearer secret\r\n") + kBody.substr(0, 5));
  gateway.reload({.keys = true});
  gateway.send(client, kBody.substr(5));
  REQUIRE(statuses(client) == Statuses{200});
  CHECK_FALSE(requests_at(gateway, kFirst).at(0).has("Authorization"));
}

TEST_CASE("a backend whose url is corrected is not ejected for the failures of its old server, nor for later ones") {
  const auto with_host = [](const char* host) {
    return GatewayOptions{.edit = [host](Settings& s) {
      s.health.eject_after = 1;
      s.health.eject_time_ns = 3600 * kSecond;
      s.routing.strategy = nexus::Strategy::priority;
      at(s, 0, host);
      s.backends.push_back(s.backends[0]);  // another choice, or an ejected backend is the last resort
      s.backends[1].name = "other";
      s.backends[1].priority = 100;
      at(s, 1, "10.0.0.3");
    }};
  };
  Gateway gateway(with_host("10.0.0.1"));
  bool holds = true;
  gateway.answer = [&](const rfc9112::Message& message) {
    if (is_at(message, kFirst)) return holds ? silent() : broken();
    return ok(kGoodBody);
  };
  Peer& slow = gateway.connect();
  gateway.send(slow, ask() + kBody);  // waits at the old server, and fails after the reload
  holds = false;
  Peer& client = gateway.connect();
  gateway.send(client, ask() + kBody);
  REQUIRE(requests_at(gateway, kFirst).size() == 2);
  REQUIRE(requests_at(gateway, kThird).size() == 1);
  gateway.send(client, ask() + kBody);
  REQUIRE(requests_at(gateway, kThird).size() == 2);  // ejected

  gateway.reload(with_host("10.0.0.2"));
  gateway.send(client, ask() + kBody);
  CHECK(requests_at(gateway, kSecond_).size() == 1);
  gateway.pass(6 * kSecond);  // first_byte_timeout: the old server fails once more, and its request goes to the new one
  CHECK(statuses(slow) == Statuses{200});
  CHECK(requests_at(gateway, kSecond_).size() == 2);
  gateway.send(client, ask() + kBody);
  CHECK(requests_at(gateway, kSecond_).size() == 3);
  CHECK(requests_at(gateway, kThird).size() == 2);
}

TEST_CASE("a shorter eject_time ends an ejection of the old length") {
  const auto with_time = [](Ns eject_time_ns) {
    return GatewayOptions{.backends = 2, .edit = [=](Settings& s) {
                            s.health.eject_after = 1;
                            s.health.eject_time_ns = eject_time_ns;
                            s.routing.strategy = nexus::Strategy::priority;
                            s.backends[1].priority = 100;
                            at(s, 1, "10.0.0.2");
                          }};
  };
  Gateway gateway(with_time(3600 * kSecond));
  bool fails = true;
  gateway.answer = [&](const rfc9112::Message& message) {
    return is_at(message, kFirst) && fails ? broken() : ok(kGoodBody);
  };
  Peer& client = gateway.connect();
  gateway.send(client, ask() + kBody + ask() + kBody);
  REQUIRE(requests_at(gateway, kFirst).size() == 1);
  REQUIRE(requests_at(gateway, kSecond_).size() == 2);
  fails = false;
  gateway.reload(with_time(kSecond));
  gateway.send(client, ask() + kBody);
  CHECK(requests_at(gateway, kFirst).size() == 2);
}

TEST_CASE("a shorter interval and timeout of the health checks are in force at once") {
  const auto with = [](Ns interval_ns, Ns timeout_ns) {
    return GatewayOptions{.edit = [=](Settings& s) {
      s.health.enabled = true;
      s.health.interval_ns = interval_ns;
      s.health.timeout_ns = timeout_ns;
      s.health.failures = 1;
    }};
  };
  Gateway gateway(with(3600 * kSecond, 3600 * kSecond));
  bool hangs = false;
  gateway.answer = [&](const rfc9112::Message& message) {
    return hangs ? silent() : ok(is_check(message) ? kModels : kGoodBody);
  };
  gateway.settle();
  REQUIRE(checks_at(gateway, kFirst) == 1);
  gateway.reload(with(200 * kMillisecond, 3600 * kSecond));
  REQUIRE(checks_at(gateway, kFirst) == 2);
  gateway.pass(250 * kMillisecond);
  CHECK(checks_at(gateway, kFirst) == 3);

  hangs = true;
  gateway.pass(kSecond);
  REQUIRE(checks_at(gateway, kFirst) == 4);  // it waits for its answer
  gateway.reload(with(200 * kMillisecond, 100 * kMillisecond));
  gateway.pass(300 * kMillisecond);
  Peer& client = gateway.connect();
  gateway.send(client, ask() + kBody);
  CHECK(statuses(client) == Statuses{503});  // found unhealthy
}

TEST_CASE("a backend's corrected api_key is tried at once, though a check with the wrong one is under way") {
  const auto with_key = [](const char* key) {
    return GatewayOptions{.edit = [key](Settings& s) {
      s.health.enabled = true;
      s.health.interval_ns = s.health.timeout_ns = 3600 * kSecond;
      s.backends[0].api_key = key;
    }};
  };
  Gateway gateway(with_key("wrong"));
  gateway.answer = [&](const rfc9112::Message& message) {
    if (message.value("Authorization") == "Bearer wrong") return silent();
    return ok(is_check(message) ? kModels : kGoodBody);
  };
  gateway.settle();
  gateway.reload(with_key("right"));
  Peer& client = gateway.connect();
  gateway.send(client, ask() + kBody);
  CHECK(statuses(client) == Statuses{200});
}

TEST_CASE("checks that a reload switches on decide anew") {
  const auto with_checks = [](bool enabled) {
    return GatewayOptions{.edit = [enabled](Settings& s) { s.health.enabled = enabled; }};
  };
  Gateway gateway(with_checks(false));
  gateway.answer = [](const rfc9112::Message& message) { return is_check(message) ? broken() : ok(kGoodBody); };
  Peer& client = gateway.connect();
  gateway.send(client, ask() + kBody);
  gateway.reload(with_checks(true));
  gateway.send(client, ask() + kBody);
  CHECK(statuses(client) == Statuses{200, 503});
}

TEST_CASE("a queued request looks at each new fleet") {
  const auto fleet = [](bool second, bool with_model) {
    return GatewayOptions{.edit = [=](Settings& s) {
      s.queue = {10, 3600 * kSecond};
      s.backends[0].max_pending = 1;
      if (second) s.backends.push_back(s.backends[0]);
      if (second) s.backends[1].name = "second", at(s, 1, "10.0.0.2");
      if (!with_model) s.backends[0].models = {"another"};
    }};
  };
  Gateway gateway(fleet(false, true));
  gateway.answer = [](const rfc9112::Message& message) { return is_at(message, kFirst) ? silent() : ok(kGoodBody); };
  Peer& running = gateway.connect();
  gateway.send(running, ask() + kBody);
  Peer& waiting = gateway.connect();
  gateway.send(waiting, ask() + kBody);
  REQUIRE(statuses(waiting).empty());

  SUBCASE("and goes to a backend that was added") {
    gateway.reload(fleet(true, true));
    CHECK(statuses(waiting) == Statuses{200});
    CHECK(requests_at(gateway, kSecond_).size() == 1);
  }
  SUBCASE("and is refused at once if nobody has its model any more") {
    gateway.reload(fleet(false, false));
    CHECK(statuses(waiting) == Statuses{404});
  }
  SUBCASE("and keeps its place if it has no other choice") {
    gateway.reload(fleet(false, true));
    CHECK(statuses(waiting).empty());
    gateway.net.break_off(gateway.net.peers[1]);
    gateway.settle();
    CHECK(requests_at(gateway, kFirst).size() == 2);
  }
}

TEST_CASE("a retry goes to the fleet of that moment") {
  const auto at_host = [](const char* host) { return GatewayOptions{.edit = [host](Settings& s) { at(s, 0, host); }}; };
  Gateway gateway(at_host("10.0.0.1"));
  gateway.answer = [](const rfc9112::Message& message) { return is_at(message, kFirst) ? silent() : ok(kGoodBody); };
  Peer& client = gateway.connect();
  gateway.send(client, ask() + kBody);
  gateway.reload(at_host("10.0.0.2"));
  gateway.pass(6 * kSecond);
  CHECK(statuses(client) == Statuses{200});
  CHECK(requests_at(gateway, kSecond_).size() == 1);
}

TEST_CASE("a request that a retry brings back from a fallback to its own model counts as no fallback") {
  const auto fleet = [](bool third) {
    return GatewayOptions{.edit = [third](Settings& s) {
      s.fallbacks = {{"m", {"other"}}};
      s.backends.resize(1);
      s.backends.push_back(s.backends[0]);
      s.backends[1].name = "second", s.backends[1].models = {"other"}, at(s, 1, "10.0.0.2");
      if (!third) return;
      s.backends.push_back(s.backends[0]);
      s.backends[2].name = "third", at(s, 2, "10.0.0.3");
    }};
  };
  Gateway gateway(fleet(false));
  gateway.answer = [](const rfc9112::Message& message) {
    return is_at(message, kFirst) ? broken() : is_at(message, kSecond_) ? silent() : ok(kGoodBody);
  };
  Peer& client = gateway.connect();
  gateway.send(client, ask() + kBody);
  REQUIRE(requests_at(gateway, kSecond_).size() == 1);
  gateway.reload(fleet(true));
  gateway.pass(6 * kSecond);
  REQUIRE(statuses(client) == Statuses{200});
  REQUIRE(requests_at(gateway, kThird).size() == 1);
  gateway.send(client, "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
  CHECK(client.received.find("nexus_requests_total{") != std::string::npos);
  CHECK(client.received.find("nexus_fallbacks_total{") == std::string::npos);
}

TEST_CASE("a retry respects capabilities that a reload stated meanwhile") {
  const auto with_vision = [](bool stated) {
    return GatewayOptions{.backends = 2, .edit = [stated](Settings& s) {
                            s.routing.strategy = nexus::Strategy::priority;
                            s.backends[1].priority = 100;
                            at(s, 1, "10.0.0.2");
                            if (stated) s.backends[1].vision = {true, {}};
                          }};
  };
  Gateway gateway(with_vision(false));
  gateway.answer = [](const rfc9112::Message& message) { return is_at(message, kFirst) ? silent() : ok(kGoodBody); };
  const std::string body = R"({"model":"m","messages":[{"content":[{"type":"image_url","image_url":{"url":"u"}}]}]})";
  Peer& client = gateway.connect();
  gateway.send(client, "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: " +
                           std::to_string(body.size()) + "\r\n\r\n" + body);
  gateway.reload(with_vision(true));
  gateway.pass(6 * kSecond);
  CHECK(statuses(client) == Statuses{504});
  CHECK(requests_at(gateway, kSecond_).empty());
}

TEST_CASE("a page that comes too late is not the answer to the next question") {
  Gateway gateway;
  Peer& client = gateway.connect();
  gateway.control_sleeps = true;
  gateway.send(client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n");
  gateway.pass(31 * kSecond);
  REQUIRE(statuses(client) == Statuses{503});
  gateway.send(client, "GET /v1/stats HTTP/1.1\r\nHost: a\r\n\r\n");
  gateway.control_sleeps = false;
  gateway.settle();
  const auto read = rfc9112::read_responses(client.received, {"GET", "GET"}, false);
  REQUIRE(read.messages.size() == 2);
  CHECK(read.messages[1].value("Content-Type") == "application/json");
  CHECK(read.messages[1].body.find("uptime_seconds") != std::string::npos);
}

namespace {

// One place of a key, two of the backend, and a queue.
GatewayOptions with_keys(const std::vector<nexus::ApiKey>& keys) {
  return {.edit = [keys](Settings& s) {
    s.server.api_keys = keys;
    s.backends[0].max_pending = 2;
    s.queue.size = 9;
  }};
}
std::string as(const std::string& name) { return ask("Authorization: Bearer sk-" + name + "\r\n"); }
nexus::ApiKey key(const std::string& name, nexus::KeyOptions options = {}, std::vector<std::string> models = {}) {
  return {name, "sk-" + name, options, std::move(models)};
}

// Backends that answer when they are told to.
struct Held {
  Gateway& gateway;
  std::map<const Peer*, std::size_t> answered;

  explicit Held(Gateway& g) : gateway(g) {
    gateway.answer = [](const rfc9112::Message&) { return silent(); };
  }
  bool answer_one() {
    for (Peer& peer : gateway.net.peers) {
      if (!peer.to_backend || peer.ended || peer.finished) continue;
      if (rfc9112::read_requests(peer.received).messages.size() == answered[&peer]) continue;
      answered[&peer] += 1;
      gateway.net.send(peer, good_answer());
      gateway.settle();
      return true;
    }
    return false;
  }
};

std::uint64_t requests_of(const Gateway& gateway, std::uint32_t first_key, std::uint32_t last_key) {
  std::uint64_t sum = 0;
  for (std::uint32_t i = first_key; i <= last_key; ++i) {
    if (const nexus::KeyCounters* cells = gateway.slab().key(nexus::KeyId{i})) sum += cells->all_requests();
  }
  return sum;
}

}  // namespace

TEST_CASE("requests of a key that a reload removes or limits anew run out under their old limits") {
  const nexus::ApiKey alice = key("alice", {.max_pending = 1}), bob = key("bob");
  struct Row {
    const char* after;
    std::vector<nexus::ApiKey> keys;
    int next_status;                // of one more request with that key
    std::uint64_t counted_for_her;  // with that one
  };
  nexus::ApiKey renamed = alice;
  renamed.name = "carol";
  const std::vector<Row> rows{
      {"she is removed", {bob}, 401, 3},
      {"all are removed", {}, 200, 3},
      {"she has another name", {renamed, bob}, 200, 3},
      {"she has no limit", {key("alice"), bob}, 200, 4},
      {"she has three places", {key("alice", {.max_pending = 3}), bob}, 200, 4},
      {"she has one request a minute", {key("alice", {.max_pending = 1, .rpm = 1, .tpm = 1}), bob}, 200, 4},
      {"she may use other models", {key("alice", {.max_pending = 1}, {"x"}), bob}, 404, 4},
  };
  for (const Row& row : rows) {
    CAPTURE(row.after);
    Gateway gateway(with_keys({alice, bob}));
    Held held(gateway);
    std::vector<Peer*> clients;
    for (const char* name : {"alice", "alice", "bob", "bob", "alice"}) {  // the 2nd waits for the 1st, the 4th for all
      clients.push_back(&gateway.connect());
      gateway.send(*clients.back(), as(name) + kBody.substr(0, clients.size() < 5 ? kBody.size() : 4));
    }
    REQUIRE(requests_at(gateway, kFirst).size() == 2);
    gateway.reload(with_keys(row.keys));
    for (const Peer* client : clients) CHECK(client->received.empty());
    gateway.send(*clients.back(), kBody.substr(4));
    Peer& next = gateway.connect();
    gateway.send(next, as("alice") + kBody);
    while (held.answer_one()) {
    }
    for (const Peer* client : clients) CHECK(statuses(*client) == Statuses{200});
    CHECK(statuses(next) == Statuses{row.next_status});
    CHECK(requests_of(gateway, 2, 2) == row.counted_for_her);
    CHECK(requests_of(gateway, 3, 3) == 2);
    CHECK(gateway.left_over().empty());
  }
}

TEST_CASE("a removed key that comes back begins anew") {
  const std::vector<nexus::ApiKey> keys{key("alice", {.rpm = 1}), key("bob")};
  Gateway gateway(with_keys(keys));
  Peer& client = gateway.connect();
  for (int i = 0; i < 2; ++i) gateway.send(client, as("alice") + kBody);
  gateway.reload(with_keys(keys));
  gateway.send(client, as("alice") + kBody);
  CHECK(statuses(client) == Statuses{200, 429, 429});
  gateway.reload(with_keys({key("bob")}));
  gateway.reload(with_keys(keys));
  gateway.send(client, as("alice") + kBody);
  CHECK(statuses(client) == Statuses{200, 429, 429, 200});
}

TEST_CASE("what is kept for the places of keys does not grow with the reloads") {
  const auto nth = [](int i) { return with_keys({key("k" + std::to_string(i), {.max_pending = 1})}); };
  Gateway gateway(nth(0));
  Held held(gateway);
  Peer &runs = gateway.connect(), &waits = gateway.connect();
  for (Peer* client : {&runs, &waits}) gateway.send(*client, as("k0") + kBody);
  for (int i = 1; i <= 100; ++i) {
    gateway.reload(nth(i));
    gateway.send(gateway.connect(), as("k" + std::to_string(i - 1)) + kBody);
  }
  CHECK(gateway.kept_places() <= 4);  // of the backend, the key, the one before, and the one whose requests go on
  CHECK(requests_at(gateway, kFirst).size() == 1);
  while (held.answer_one()) {
  }
  CHECK(statuses(runs) == Statuses{200});
  CHECK(statuses(waits) == Statuses{200});
  for (int i = 0; i < 2; ++i) gateway.reload(nth(0));
  CHECK(gateway.kept_places() <= 3);
}

TEST_CASE("no order of requests, responses, clients that leave, and reloads of their keys loses a place or a count") {
  std::map<int, int> seen;  // statuses
  for (unsigned seed = 1; seed <= 40; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    const auto below = [&](unsigned n) { return static_cast<std::uint64_t>(random() % n); };
    const std::vector<std::string> names{"alice", "bob", "carol"};
    const auto drawn = [&] {
      std::vector<nexus::ApiKey> keys;
      for (const std::string& name : names) {
        if (below(4) > 0)
          keys.push_back(key(name, {1 + below(3), 50 * below(3), below(3), 3 * below(3), 40 * below(3)}));
      }
      return with_keys(keys);
    };
    Gateway gateway(drawn());
    Held held(gateway);
    std::vector<Peer*> clients, uploading;
    const auto finish_one = [&] {
      gateway.send(*uploading.back(), kBody.substr(4));
      uploading.pop_back();
    };
    for (int step = 0; step < 80; ++step) {
      const std::uint64_t what = below(8);
      if (what == 0) gateway.reload(drawn());
      if (what == 1 && !clients.empty()) {
        gateway.net.break_off(*clients[below(static_cast<unsigned>(clients.size()))]);
        gateway.settle();
      }
      if (what == 2) held.answer_one();
      if (what == 3) gateway.pass(kSecond / 4);
      if (what == 4 && !uploading.empty()) finish_one();
      if (what < 5) continue;
      clients.push_back(&gateway.connect());
      if (what == 5) uploading.push_back(clients.back());
      gateway.send(*clients.back(), as(names[below(3)]) + kBody.substr(0, what == 5 ? 4 : kBody.size()));
    }
    while (!uploading.empty()) finish_one();
    while (held.answer_one()) {
    }
    for (const Peer* client : clients) {
      const Statuses got = statuses(*client);
      CHECK((client->finished ? got.size() <= 1 : got.size() == 1));
      for (const int status : got) seen[status] += 1;
    }
    CHECK(requests_of(gateway, 0, 4) == clients.size());
    CHECK(gateway.left_over().empty());
  }
  for (const int status : {200, 401, 429}) CHECK(seen[status] > 40);
}
