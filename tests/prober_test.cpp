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

  ProbeResult ask(BackendKind kind, const std::vector<std::string>& answers) {
    ProbeOrder order;
    order.kind = kind;
    order.host = "b";
    order.timeout_ns = kSecond;
    std::optional<ProbeResult> result;
    const auto done = [&](ProbeResult&& ended) { result = std::move(ended); };
    prober.start(order, net.now(), done);
    std::size_t connections = 0;
    for (const std::string& answer : answers) {
      turn(done);
      REQUIRE(script.peers.size() > connections);
      script.send(script.peers[connections++], answer);
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
const std::string kModels = answer(R"({"data":[{"id":"m"}]})");

TEST_CASE("a probe reads how a backend is and which models it has, in one answer or in two") {
  CHECK(Probing().ask(BackendKind::vllm, {kModels}).models == std::vector<std::string>{"m"});
  const ProbeResult two = Probing().ask(BackendKind::llamacpp, {answer("{}"), kModels});
  CHECK(two.passed);
  CHECK(two.models == std::vector<std::string>{"m"});
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

}  // namespace
