// bounds_test.cpp
// Goal:   what clients and backends do costs no more memory, time and places than the configuration says, and all of it
//         comes back.
// Method: a whole gateway on a scripted network; each test ends with the oracle of tests/lib/at_rest.h.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "tests/hostile/gateway.h"
#include "tests/lib/at_rest.h"

using namespace hostile;
using nexus::kSecond;
using nexus::Limit;

namespace {

std::string post(const std::string& body, const std::string& more = {}) {
  return "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n" + more + "Content-Length: " + std::to_string(body.size()) +
         "\r\n\r\n" + body;
}
const std::string kPost = post(R"({"model":"m"})");
const std::string kHealth = "GET /health HTTP/1.1\r\nHost: a\r\n\r\n";

std::string head_of(std::size_t length) {
  return "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: " + std::to_string(length) + "\r\n\r\n";
}

std::string fields(std::size_t count) {
  std::string out;
  for (std::size_t i = 0; i < count; ++i) out += "X-" + std::to_string(i) + ": y\r\n";
  return out;
}

std::size_t answers(const Peer& client) {
  std::size_t count = 0;
  for (std::size_t at = client.received.find("HTTP/1.1 "); at != std::string::npos; ++count) {
    at = client.received.find("HTTP/1.1 ", at + 1);
  }
  return count;
}

GatewayOptions options(std::function<void(nexus::Settings&)> edit) {
  GatewayOptions made;
  made.edit = std::move(edit);
  return made;
}

// 5,000 models beside `m`.
void give_many_models(nexus::Settings& settings) {
  for (int i = 0; i < 5'000; ++i) settings.backends[0].models.push_back("model-" + std::to_string(i));
}

}  // namespace

// ---- body memory ----

TEST_CASE("connections that announce large bodies and send none take no memory from others") {
  Gateway gateway(options([](nexus::Settings& s) { s.server.max_body_bytes = s.server.body_memory_bytes = 1u << 20; }));
  for (int i = 0; i < 4; ++i) gateway.send(gateway.connect(), head_of(1'000'000) + "{");
  Peer& client = gateway.connect();
  gateway.send(client, kPost);
  CHECK(client.received.starts_with("HTTP/1.1 200"));
  CHECK(gateway.limit_hits(Limit::body_memory) == 0);
}

TEST_CASE("a body that does not fit into what is free is refused with its head") {
  Gateway gateway(options([](nexus::Settings& s) {
    s.server.max_body_bytes = 1u << 20;
    s.server.body_memory_bytes = 3u << 19;
  }));
  Peer& first = gateway.connect();
  gateway.send(first, head_of(1u << 20) + std::string(900'000, ' '));
  Peer& second = gateway.connect();
  gateway.send(second, head_of(1u << 20));
  CHECK(second.received.starts_with("HTTP/1.1 503"));
  CHECK(second.received.find("body_memory") != std::string::npos);
  gateway.net.break_off(first);
  gateway.settle();
  Peer& third = gateway.connect();
  gateway.send(third, post(R"({"model":"m","x":")" + std::string(1'000'000, 'x') + "\"}"));
  CHECK(third.received.starts_with("HTTP/1.1 200"));
}

TEST_CASE("a body that has begun must go on: one that nearly stops gets 408 long before body_timeout") {
  Gateway gateway;  // body_timeout is 60s
  Peer& slow = gateway.connect();
  Peer& steady = gateway.connect();
  Peer& patient = gateway.connect();
  gateway.send(slow, head_of(60'000) + "{");
  gateway.send(steady, head_of(60'000) + "{");
  gateway.send(patient, head_of(60'000));  // its body has not begun
  for (int second = 1; second <= 30; ++second) {
    gateway.pass(kSecond);
    gateway.send(slow, " ");
    gateway.send(steady, std::string(1'200, ' '));
    if (second == 9) CHECK(slow.received.empty());
  }
  CHECK(slow.received.starts_with("HTTP/1.1 408"));
  CHECK(steady.received.empty());
  CHECK(patient.received.empty());
  CHECK(gateway.limit_hits(Limit::body_timeout) == 1);
  gateway.pass(31 * kSecond);
  CHECK(steady.received.starts_with("HTTP/1.1 408"));
  CHECK(patient.received.starts_with("HTTP/1.1 408"));
  CHECK(gateway.limit_hits(Limit::body_timeout) == 3);
}

// ---- a share of each turn ----

TEST_CASE("pipelined requests share the turns with other clients") {
  Gateway gateway;
  Peer& greedy = gateway.connect();
  Peer& other = gateway.connect();
  std::string many;
  for (int i = 0; i < 400; ++i) many += kHealth;
  gateway.net.send(greedy, many.substr(0, 300 * kHealth.size()));
  gateway.turn();
  CHECK(answers(greedy) > 0);
  CHECK(answers(greedy) <= 2 * nexus::kRequestsPerTurn);
  gateway.net.send(other, kHealth);
  const std::size_t before = answers(greedy);
  gateway.turn();
  CHECK(answers(other) == 1);
  CHECK(answers(greedy) <= before + 2 * nexus::kRequestsPerTurn);
  gateway.settle();
  CHECK(answers(greedy) == 300);
}

TEST_CASE("a refused body is read away in shares of a turn") {
  Gateway gateway(options([](nexus::Settings& s) { s.server.max_body_bytes = 1000; }));
  Peer& refused = gateway.connect();
  Peer& other = gateway.connect();
  gateway.send(refused, head_of(60u << 20));
  CHECK(refused.received.starts_with("HTTP/1.1 413"));
  gateway.net.wire.peer_send(refused.link, std::string(8u << 20, 'x'));  // Script's own ends with Nexus's FIN
  gateway.net.send(other, kHealth);
  const auto unread = [&] { return gateway.net.wire.at(refused.link).to_nexus.unread(); };
  gateway.net.deliver();
  const std::size_t before = unread();
  CHECK(before > 3 * nexus::kRoomyBlock);
  gateway.turn();
  CHECK(answers(other) == 1);
  CHECK(before - unread() <= 2 * nexus::kRoomyBlock);
}

TEST_CASE("a session that is scheduled again and again has one turn in each round") {
  Gateway gateway;
  std::vector<Peer*> crowd;
  for (int i = 0; i < 50; ++i) crowd.push_back(&gateway.connect());
  std::string many;
  for (int i = 0; i < 40; ++i) many += kHealth;
  for (Peer* peer : crowd) gateway.net.send(*peer, many);
  gateway.turn();
  for (const Peer* peer : crowd) CHECK(answers(*peer) <= 2 * nexus::kRequestsPerTurn);
  for (std::size_t i = 0; i < crowd.size(); i += 2) gateway.net.break_off(*crowd[i]);
  Peer& late = gateway.connect();  // perhaps in the slot of one that has left
  gateway.send(late, many);
  CHECK(answers(late) == 40);
  for (std::size_t i = 1; i < crowd.size(); i += 2) CHECK(answers(*crowd[i]) == 40);
}

// ---- heads ----

TEST_CASE("max_fields has its own error, and holds for backends too") {
  Gateway gateway(options([](nexus::Settings& s) { s.server.max_fields = 20; }));
  const auto ask = [&](std::size_t count) {
    Peer& client = gateway.connect();
    gateway.send(client, post(R"({"model":"m"})", fields(count)));
    return client.received;
  };
  CHECK(ask(18).starts_with("HTTP/1.1 200"));  // with Host and Content-Length: 20
  const std::string refused = ask(19);
  CHECK(refused.starts_with("HTTP/1.1 431"));
  CHECK(refused.find("max_fields") != std::string::npos);
  CHECK(gateway.limit_hits(Limit::max_fields) == 1);
  CHECK(gateway.limit_hits(Limit::max_header) == 0);

  gateway.answer = [](const rfc9112::Message&) {
    return BackendPlan{{"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + fields(20) + "\r\n{}"}, false, false};
  };
  const std::string garbled = ask(0);
  CHECK(garbled.starts_with("HTTP/1.1 502"));
  CHECK(garbled.find("max_fields") != std::string::npos);
  CHECK(gateway.limit_hits(Limit::max_fields) == 2);
}

TEST_CASE("a head of exactly max_header is served, and one that is a byte longer is refused") {
  constexpr std::size_t kMost = 2'000;
  const std::string begin = "GET /health HTTP/1.1\r\nHost: a\r\nX: ", end = "\r\n\r\n";
  for (const std::size_t bytes : {kMost, kMost + 1}) {
    Gateway gateway(options([](nexus::Settings& s) { s.server.max_header_bytes = kMost; }));
    Peer& client = gateway.connect();
    gateway.send(client, begin + std::string(bytes - begin.size() - end.size(), 'x') + end);
    CHECK(client.received.starts_with(bytes == kMost ? "HTTP/1.1 200" : "HTTP/1.1 431"));
    CHECK(gateway.limit_hits(Limit::max_header) == (bytes == kMost ? 0 : 1));
  }
}

TEST_CASE("max_header holds for the heads of backends too") {
  for (const std::size_t bytes : {1'500u, 2'500u}) {
    Gateway gateway(options([](nexus::Settings& s) { s.server.max_header_bytes = 2'000; }));
    gateway.answer = [&](const rfc9112::Message&) {
      return BackendPlan{
          {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Long: " + std::string(bytes, 'x') + "\r\n\r\n{}"}, false, false};
    };
    Peer& client = gateway.connect();
    gateway.send(client, kPost);
    CHECK(client.received.starts_with(bytes < 2'000 ? "HTTP/1.1 200" : "HTTP/1.1 502"));
    CHECK((client.received.find("max_header") != std::string::npos) == (bytes > 2'000));
    CHECK(gateway.limit_hits(Limit::max_header) == (bytes > 2'000 ? 1 : 0));
  }
}

TEST_CASE("a large head leaves nothing with its connection") {
  Gateway gateway;
  Peer& client = gateway.connect();
  gateway.send(client, post(R"({"model":"m","x":")" + std::string(4'000, 'x') + "\"}",
                            "X-Long: " + std::string(15'000, 'x') + "\r\n"));
  CHECK(client.received.starts_with("HTTP/1.1 200"));
  CHECK(gateway.left_over() == "");
}

// ---- pages ----

TEST_CASE("clients that ask for a page in the same turn get the same one, and none is kept for longer") {
  Gateway gateway(options(give_many_models));
  std::vector<Peer*> crowd;
  for (int i = 0; i < 40; ++i) {
    crowd.push_back(&gateway.connect());
    gateway.net.stop_reading(*crowd.back(), 1'000);
  }
  gateway.control_sleeps = true;
  for (Peer* peer : crowd) gateway.net.send(*peer, "GET /v1/stats HTTP/1.1\r\nHost: a\r\n\r\n");
  gateway.settle();
  gateway.control_sleeps = false;
  gateway.settle();
  CHECK(gateway.unsent_page_bytes() > 300'000);
  CHECK(gateway.unsent_page_bytes() < 4'000'000);
  for (Peer* peer : crowd) gateway.net.break_off(*peer);
  gateway.settle();
  CHECK(gateway.unsent_page_bytes() == 0);
}

TEST_CASE("unsent pages are bounded, and pages are rendered again when they have gone") {
  Gateway gateway(options(give_many_models));
  const std::string ask = "GET /v1/stats HTTP/1.1\r\nHost: a\r\n\r\n";
  std::vector<Peer*> crowd;
  while (gateway.limit_hits(Limit::page_memory) == 0 && crowd.size() < 1'000) {
    crowd.push_back(&gateway.connect());
    gateway.net.stop_reading(*crowd.back(), 1'000);
    gateway.send(*crowd.back(), ask);
  }
  CHECK(crowd.size() < 1'000);
  CHECK(gateway.unsent_page_bytes() < nexus::kPageMemory + (4u << 20));
  CHECK(crowd.back()->received.starts_with("HTTP/1.1 503"));
  for (Peer* peer : crowd) gateway.net.break_off(*peer);
  gateway.settle();
  Peer& client = gateway.connect();
  gateway.send(client, ask);
  CHECK(client.received.starts_with("HTTP/1.1 200"));
}

// ---- connections to backends ----

TEST_CASE("as many connections are kept as were in use at once, for idle_timeout") {
  Gateway gateway(options([](nexus::Settings& s) { s.upstream.idle_timeout_ns = 20 * kSecond; }));
  constexpr std::size_t kCrowd = 100;
  std::vector<Peer*> crowd;
  for (std::size_t i = 0; i < kCrowd; ++i) crowd.push_back(&gateway.connect());
  for (int round = 0; round < 3; ++round) {
    for (Peer* peer : crowd) gateway.net.send(*peer, kPost);
    gateway.settle();
  }
  for (const Peer* peer : crowd) CHECK(answers(*peer) == 3);
  const std::size_t made = gateway.backend_links();
  CHECK(made > 0);
  CHECK(made <= kCrowd);
  for (int second = 0; second < 25; ++second) {
    gateway.pass(kSecond);
    gateway.send(*crowd[0], kPost);  // one stays in use
  }
  CHECK(gateway.backend_links() == made);
  CHECK(gateway.open_backend_links() == 1);
}

// ---- places and names ----

TEST_CASE("a request that [server] max_pending refuses holds nothing") {
  Gateway gateway(options([](nexus::Settings& s) { s.server.max_pending = 1; }));
  gateway.answer = [](const rfc9112::Message&) { return BackendPlan{}; };  // never
  Peer& first = gateway.connect();
  gateway.send(first, kPost);
  Peer& second = gateway.connect();
  for (int i = 0; i < 5; ++i) gateway.send(second, kPost);
  CHECK(answers(second) == 5);
  CHECK(second.received.starts_with("HTTP/1.1 503"));
  CHECK(gateway.limit_hits(Limit::max_pending) == 5);
  gateway.net.break_off(first);
  gateway.settle();
  CHECK(gateway.left_over() == "");
  gateway.answer = [](const rfc9112::Message&) { return BackendPlan{{good_answer()}, false, false}; };
  Peer& third = gateway.connect();
  gateway.send(third, kPost);
  CHECK(third.received.starts_with("HTTP/1.1 200"));
}

TEST_CASE("more than kMaxBackendNames names over all reloads: the reload is refused, and the process serves on") {
  Gateway gateway;
  const auto with_names = [](std::size_t round) {
    return options([round](nexus::Settings& s) {
      for (std::size_t i = 0; i < s.backends.size(); ++i) {
        s.backends[i].name = "r" + std::to_string(round) + "-" + std::to_string(i);
      }
    });
  };
  std::size_t round = 0;
  while (gateway.limit_hits(Limit::backend_names) == 0 && round < 20) {
    GatewayOptions next = with_names(++round);
    next.backends = nexus::kMaxBackends;
    gateway.reload(next);
  }
  CHECK(round == nexus::kMaxBackendNames / nexus::kMaxBackends);
  Peer& client = gateway.connect();
  gateway.send(client, kPost);
  CHECK(client.received.starts_with("HTTP/1.1 200"));
  GatewayOptions known = with_names(1);
  known.backends = nexus::kMaxBackends;
  gateway.reload(known);
  CHECK(gateway.limit_hits(Limit::backend_names) == 1);  // names that come back need no new place
}

// ---- the oracle itself ----

TEST_CASE("the oracle names what a request under way holds") {
  nexus::sim::Script net;
  auto settings = std::make_shared<nexus::Settings>();
  settings->health.enabled = false;
  settings->server.max_pending = 10;
  settings->backends.resize(1);
  settings->backends[0].name = "b1";
  settings->backends[0].address = {"10.0.0.1", 8001};
  settings->backends[0].models = {"m"};
  nexus::sim::Gateway gateway(net.wire, settings, 1, 7);
  net.wire.on_ready = [&](std::uint32_t loop, nexus::sim::LinkId link) { gateway.net(loop).make_ready(link); };
  const auto settle = [&] {
    for (int i = 0; i < 20; ++i) {
      net.deliver();
      for (std::uint32_t loop = 0; loop < gateway.loops(); ++loop) {
        if (gateway.due_at(loop) <= net.wire.now()) gateway.turn(loop);
      }
    }
  };
  settle();
  CHECK(nexus::sim::is_at_rest(gateway));
  CHECK(nexus::sim::left_over(gateway) == "");
  Peer& first = net.connect_client();
  net.send(first, kPost.substr(0, kPost.size() - 1));
  settle();
  CHECK_FALSE(nexus::sim::is_at_rest(gateway));
  CHECK(nexus::sim::left_over(gateway).starts_with("left over: tables of fields"));
  net.send(first, kPost.substr(kPost.size() - 1));
  settle();
  CHECK_FALSE(nexus::sim::is_at_rest(gateway));
  CHECK(nexus::sim::left_over(gateway) == "left over: requests pending = 1 of b1");
  net.break_off(first);
  settle();
  CHECK(nexus::sim::is_at_rest(gateway));
  CHECK(nexus::sim::left_over(gateway) == "");
}
