#include "nexus/fleet/prober.h"

#include <doctest/doctest.h>

#include <array>
#include <optional>
#include <string>

#include "tests/hostile/script_net.h"

using namespace nexus;
using hostile::ScriptNet;

namespace {

// One probe of a backend that answers as it is told, a connection after the other.
struct Probing {
  ProbeResult ask(BackendKind kind, std::initializer_list<std::string> answers) {
    ProbeOrder order;
    order.kind = kind;
    order.host = "b";
    order.timeout_ns = kSecond;
    std::optional<ProbeResult> result;
    const auto done = [&](ProbeResult&& ended) { result = std::move(ended); };
    prober.start(order, net.now(), done);
    std::size_t links = 0;
    for (const std::string& answer : answers) {
      turn(done);
      REQUIRE(net.links().size() > links);
      net.send(net.links()[links++], answer);
      for (int turns = 0; turns < 2000 && !result && net.links().size() == links; ++turns) turn(done);
    }
    REQUIRE(result.has_value());
    return std::move(*result);
  }

  template <class Done>
  void turn(Done&& done) {
    std::array<Event, ScriptNet::kMaxEvents> events;
    bool woken = false;
    const std::size_t count = net.wait(events, net.now(), woken);
    for (std::size_t i = 0; i < count; ++i) prober.on_event(events[i], net.now(), done);
  }

  ScriptNet net;
  TimerWheel wheel{net.now()};
  BlockPool blocks;
  JsonReader json;
  Prober<ScriptNet> prober{net, wheel, blocks, json};
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
