#include "nexus/fleet/prober.h"

#include <doctest/doctest.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "tests/lib/script.h"

using namespace nexus;
using sim::SimNet;

namespace {

// One probe of a backend that answers as it is told, a connection after the other.
struct Probing {
  Probing() {
    script.wire.on_ready = [this](std::uint32_t, sim::LinkId link) { net.make_ready(link); };
  }

  ProbeResult ask(BackendKind kind, const std::vector<std::string>& answers, bool fixed_list = false,
                  bool own_key = false) {
    ProbeOrder order;
    order.kind = kind;
    order.has_key = own_key;
    order.any_answer = fixed_list;
    order.wants_models = !fixed_list;
    order.addresses = {Address{}};
    order.host = "b";
    order.lines = "Authorization: Bearer k\r\n";
    order.timeout_ns = kSecond;
    std::optional<ProbeResult> result;
    const auto done = [&](ProbeResult&& ended) { result = std::move(ended); };
    prober.start(order, net.now(), done);
    std::size_t connections = 0;
    for (const std::string& answer : answers) {
      turn(done);
      REQUIRE(script.peers.size() > connections);
      sim::Peer& peer = script.peers[connections++];
      CHECK(peer.received.find("\r\nAuthorization: Bearer k\r\n") != std::string::npos);
      script.wire.advance(net.now() + delay_ns);
      script.send(peer, answer);
      if (ends) script.finish(peer);
      for (int turns = 0; turns < 2000 && !result && script.peers.size() == connections; ++turns) turn(done);
    }
    REQUIRE(result.has_value());
    return std::move(*result);
  }

  template <class Done>
  void turn(Done&& done) {
    std::array<Event, SimNet::kMaxEvents> events;
    bool woken = false;
    script.deliver();
    const std::size_t count = net.wait(events, net.now(), woken);
    for (std::size_t i = 0; i < count; ++i) prober.on_event(events[i], net.now(), done);
    script.deliver();
  }

  // Nothing else happens: the next deadline passes.
  template <class Done>
  void pass_time(Done&& done) {
    script.wire.advance(wheel.next());
    wheel.fire(net.now(), [&](Handle token) { prober.on_deadline(token, net.now(), done); });
  }

  Ns delay_ns = 0;    // before each answer
  bool ends = false;  // the backend's FIN follows each answer
  sim::Script script;
  SimNet net{script.wire, 0};
  TimerWheel wheel{net.now()};
  BlockPool blocks;
  JsonReader json;
  Prober<SimNet> prober{net, wheel, blocks, json};
};

std::string answer(const std::string& body) {
  return "HTTP/1.1 200 OK\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}
std::vector<std::string> names(const ProbeResult& result) {
  std::vector<std::string> out;
  for (const ListedModel& model : result.models) out.push_back(model.name);
  return out;
}
const std::string kModels = answer(R"({"data":[{"id":"m"}]})");

TEST_CASE("a probe reads how a backend is and which models it has, in one answer or in two") {
  CHECK(names(Probing().ask(BackendKind::vllm, {kModels})) == std::vector<std::string>{"m"});
  const ProbeResult two = Probing().ask(BackendKind::llamacpp, {answer("{}"), kModels});
  CHECK(two.passed);
  CHECK(names(two) == std::vector<std::string>{"m"});
}

TEST_CASE("a probe says why it failed, and passes without its models where the second answer is bad") {
  struct Row {
    BackendKind kind;
    std::vector<std::string> answers;
    bool passed, models_read;
    std::uint16_t status;
    const char* reason;
  };
  const std::string broken = "HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", garbage = "SSH-2.0-x\r\n\r\n";
  const Row rows[] = {
      {BackendKind::vllm, {kModels}, true, true, 200, ""},
      {BackendKind::vllm, {broken}, false, false, 500, "it answered 500"},
      {BackendKind::vllm, {garbage}, false, false, 0, "its answer is not valid HTTP"},
      {BackendKind::vllm, {answer("{}")}, true, false, 200, "its list of models could not be read"},
      {BackendKind::ollama, {answer(R"({"models":[{"name":"m"}]})")}, true, true, 200, ""},
      {BackendKind::llamacpp, {broken}, false, false, 500, "it answered 500"},
      {BackendKind::llamacpp, {answer("ok"), broken}, true, false, 500, "its list of models answered 500"},
      {BackendKind::llamacpp, {answer("ok"), garbage}, true, false, 0, "its answer is not valid HTTP"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.reason);
    const ProbeResult result = Probing().ask(row.kind, row.answers);
    CHECK(result.passed == row.passed);
    CHECK(result.models_read == row.models_read);
    CHECK(result.models.size() == (row.models_read ? 1 : 0));
    CHECK(result.status == row.status);
    CHECK(result.reason == row.reason);
    CHECK(result.connected);
    CHECK(result.lack.empty());
  }
}

TEST_CASE("a list of models that is too large to be read is one that is cut, an answer of another kind is not") {
  // As long as a buffer twice as large as the limit, and it goes on.
  const std::string large =
      "HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + std::string(2 * kMaxProbeBytes, ' ');
  CHECK(Probing().ask(BackendKind::vllm, {large}).models_cut);
  CHECK(Probing().ask(BackendKind::llamacpp, {answer("{}"), large}).models_cut);
  const ProbeResult health = Probing().ask(BackendKind::llamacpp, {large});
  CHECK_FALSE(health.models_cut);
  CHECK_FALSE(health.passed);
}

TEST_CASE("an answer that ends before its length is no answer, one without a length ends with its connection") {
  Probing cut, open, second;
  cut.ends = open.ends = second.ends = true;
  const std::string head = "HTTP/1.1 200 OK\r\n", list = R"({"data":[{"id":"m"}]})";
  const ProbeResult failed = cut.ask(BackendKind::vllm, {head + "Content-Length: 100\r\n\r\n" + list});
  CHECK_FALSE(failed.passed);
  CHECK(failed.models.empty());
  CHECK(names(open.ask(BackendKind::vllm, {head + "\r\n" + list})) == std::vector<std::string>{"m"});
  const ProbeResult unread =
      second.ask(BackendKind::llamacpp, {answer("ok"), head + "Content-Length: 100\r\n\r\n" + list});
  CHECK(unread.passed);
  CHECK_FALSE(unread.models_read);
}

TEST_CASE("the round trip of a check is that of its first request") {
  for (const auto& [kind, answers] : {std::pair(BackendKind::vllm, std::vector{kModels}),
                                      std::pair(BackendKind::llamacpp, std::vector{answer("ok"), kModels})}) {
    Probing probing;
    probing.delay_ns = 100 * kMillisecond;
    CHECK(probing.ask(kind, answers).round_trip_ns == 100 * kMillisecond);
  }
}

TEST_CASE("interim heads before the answer are skipped, but not without end") {
  const std::string early = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
  const ProbeResult hinted = Probing().ask(BackendKind::vllm, {early + "HTTP/1.1 100 Go on\r\n\r\n" + kModels});
  CHECK(hinted.passed);
  CHECK(hinted.models_read);
  std::string many;
  for (std::uint32_t i = 0; i <= kMaxInterimHeads; ++i) many += early;
  for (const std::string& bad : {many + kModels, "HTTP/1.1 101 Switch\r\nUpgrade: x\r\n\r\n" + kModels}) {
    CHECK(Probing().ask(BackendKind::vllm, {bad}).reason == "its answer is not valid HTTP");
  }
}

TEST_CASE("if the models are configured, any answer but a 5xx or a refusal of our key shows that the backend lives") {
  for (const int status : {200, 302, 401, 404, 405, 429, 500, 503}) {
    CAPTURE(status);
    const std::string plain = "HTTP/1.1 " + std::to_string(status) + " X\r\nContent-Length: 0\r\n\r\n";
    for (const BackendKind kind : {BackendKind::vllm, BackendKind::llamacpp, BackendKind::ollama}) {
      const ProbeResult fixed = Probing().ask(kind, {plain}, true);
      CHECK(fixed.passed == (status < 500));
      CHECK(fixed.status == status);
      CHECK(fixed.reason == (status < 500 ? "" : "it answered " + std::to_string(status)));
      CHECK(Probing().ask(kind, {plain}, true, true).passed == (status < 500 && status != 401));
      if (status != 200) CHECK_FALSE(Probing().ask(kind, {plain}).passed);
    }
  }
}

TEST_CASE("what can be read of a list of models is taken, and the rest is named") {
  const ProbeResult some = Probing().ask(BackendKind::vllm, {answer(R"({"data":[null,{"id":"a"}]})")});
  CHECK(some.models_read);
  CHECK(names(some) == std::vector<std::string>{"a"});
  CHECK(some.reason == "1 entries of its list of models have no readable name");
}

// Three addresses, one after the other as the rows say; the last one answers.
TEST_CASE("the addresses of a backend are tried in turn") {
  enum class Fate : std::uint8_t { refused, silent, broken, good };
  struct Row {
    std::vector<Fate> fates;
    bool passed;
    const char* reason;
  };
  using enum Fate;
  const Row rows[] = {
      {{good, refused, refused}, true, ""},
      {{refused, good, refused}, true, ""},
      {{silent, silent, good}, true, ""},
      {{broken, refused, good}, true, ""},
      {{refused, broken, silent}, false, "it answered 500"},
      {{refused, refused, refused}, false, "connect: "},
      {{silent, silent, silent}, false, "no connection in time"},
  };
  for (const Row& row : rows) {
    Probing probing;
    ProbeOrder order;
    order.kind = BackendKind::vllm;
    order.timeout_ns = 3 * kSecond;
    for (std::uint16_t port = 0; port < 3; ++port) order.addresses.push_back(*parse_address("10.0.0.1", port));
    std::optional<ProbeResult> result;
    const auto done = [&](ProbeResult&& ended) { result = std::move(ended); };
    probing.script.fate_of = [&](const Address& to) {
      const Fate fate = row.fates[to.port];
      return fate == refused  ? sim::ConnectFate::Kind::refused
             : fate == silent ? sim::ConnectFate::Kind::ignored
                              : sim::ConnectFate::Kind::accepted;
    };
    const auto answer_all = [&] {
      for (sim::Peer& peer : probing.script.peers) {
        const Fate fate = row.fates[probing.script.wire.at(peer.link).peer];
        if (peer.received.empty() || peer.finished) continue;
        probing.script.send(peer, fate == good ? kModels : "HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n");
        probing.script.finish(peer);
      }
    };
    const Ns began = probing.net.now();
    probing.prober.start(order, began, done);
    for (int turns = 0; turns < 100 && !result; ++turns) {
      probing.turn(done);
      answer_all();
      probing.turn(done);
      if (!result && probing.wheel.next() != kNever) probing.pass_time(done);
    }
    REQUIRE(result.has_value());
    CHECK(result->passed == row.passed);
    CHECK(result->reason.starts_with(row.reason));
    if (row.passed) CHECK(row.fates[result->address.port] == good);
    CHECK(probing.net.now() - began <= order.timeout_ns);
  }
}

}  // namespace
