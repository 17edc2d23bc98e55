// exchange_test.cpp
// Goal:   what the simulator hardly ever meets: a client gone at one certain write, a backend that answers while the
//         request is blocked, or before it was asked.
// Method: one worker on the simulated network, far ends that do what a test says, one call made to fail.
#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tests/lib/courses.h"
#include "tests/lib/gateway.h"
#include "tests/lib/script.h"

using namespace nexus;

namespace {

const std::string kBody = R"({"model":"m","messages":[{"role":"user","content":"a longer text than the context"}]})";
const std::string kPost =
    "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: " + std::to_string(kBody.size()) + "\r\n\r\n" +
    kBody;

std::shared_ptr<const Settings> settings(bool small_context) {
  auto settings = std::make_shared<Settings>();
  settings->server.body_memory_bytes = 64u << 20;
  settings->health.enabled = false;
  BackendSettings backend;
  backend.kind = BackendKind::generic;
  backend.address = {"10.0.0.1", 8001};
  backend.models = {"m"};
  backend.name = "b1";
  if (small_context) backend.context_length.push_back({"m", 1});
  settings->backends.push_back(backend);
  return settings;
}

}  // namespace

TEST_CASE("a client that has left when a request without a backend is refused has left within its request") {
  sim::Script net;
  sim::Gateway gateway(net.wire, settings(true), 1, 7);
  net.wire.on_ready = [&](std::uint32_t loop, sim::LinkId link) { gateway.net(loop).make_ready(link); };
  const auto settle = [&] {
    for (int i = 0; i < 20; ++i) {
      net.deliver();
      for (std::uint32_t loop = 0; loop < gateway.loops(); ++loop) {
        if (gateway.due_at(loop) <= net.wire.now()) gateway.turn(loop);
      }
    }
  };
  sim::Peer& client = net.connect_client();
  settle();
  std::vector<sim::Call> calls;
  sim::faults() = {};
  sim::faults().failing_call = 2;  // read, then write
  sim::faults().call_error = EPIPE;
  sim::faults().call_list = &calls;
  net.send(client, kPost);
  settle();
  sim::faults() = {};
  REQUIRE(calls.size() >= 2);
  REQUIRE(calls[1] == sim::Call::write);
  const Slab& slab = *gateway.metrics().slabs().back();
  const auto& seen = slab.thread().disconnects;
  CHECK(seen[static_cast<std::size_t>(DisconnectPhase::request)].read() == 1);
}

// A hostile backend: 16 interim heads of one read each, then a long body, while the request is still blocked.
TEST_CASE("a response that begins before the request is sent whole is read in shares") {
  sim::Script net;
  sim::Gateway gateway(net.wire, settings(false), 1, 7);
  net.wire.on_ready = [&](std::uint32_t loop, sim::LinkId link) { gateway.net(loop).make_ready(link); };
  sim::Peer* backend = nullptr;
  net.on_connect = [&](sim::Peer& peer) {
    backend = &peer;
    net.stop_reading(peer, 100);
  };
  const auto turns = [&](int count) {
    for (int i = 0; i < count; ++i) {
      net.deliver();
      for (std::uint32_t loop = 0; loop < gateway.loops(); ++loop) {
        if (gateway.due_at(loop) <= net.wire.now()) gateway.turn(loop);
      }
    }
  };
  sim::Peer& client = net.connect_client();
  turns(5);
  net.send(client, kPost);
  turns(5);
  REQUIRE(backend != nullptr);
  REQUIRE(backend->received.size() == 100);  // the rest waits
  // 16 interim heads, each as long as one read; then a long response.
  std::string said;
  for (int i = 0; i < 16; ++i) {
    std::string head = "HTTP/1.1 102 Processing\r\nX: ";
    head.append(65536 - head.size() - 4, 'x').append("\r\n\r\n");
    said += head;
  }
  constexpr std::size_t kLong = 32u << 20;
  said += "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: " + std::to_string(kLong) + "\r\n\r\n";
  said.append(kLong, 'y');
  backend->reads = true;
  net.wire.at(backend->link).shape.window_bytes = 64u << 20;
  net.send(*backend, said);
  net.wire.peer_take(backend->link, net.wire.at(backend->link).to_peer.unread());
  net.deliver();
  std::vector<sim::Call> calls;
  sim::faults() = {};
  sim::faults().call_list = &calls;
  gateway.turn(0);
  sim::faults() = {};
  const auto reads = std::count(calls.begin(), calls.end(), sim::Call::read);
  CHECK(reads <= 3 * kReadsPerTurn);  // by the event, after the request was sent, and by reschedule()
}

namespace {

// One gateway, one backend, and turns for both.
struct Scene {
  sim::Script net;
  sim::Gateway gateway;
  std::vector<sim::Peer*> backends;  // connections to the backend, in order

  explicit Scene(std::shared_ptr<const Settings> with) : gateway(net.wire, std::move(with), 1, 7) {
    net.wire.on_ready = [this](std::uint32_t loop, sim::LinkId link) { gateway.net(loop).make_ready(link); };
    net.on_connect = [this](sim::Peer& peer) { backends.push_back(&peer); };
  }
  void turns() {
    for (int i = 0; i < 20; ++i) {
      net.deliver();
      for (std::uint32_t loop = 0; loop < gateway.loops(); ++loop) {
        if (gateway.due_at(loop) <= net.wire.now()) gateway.turn(loop);
      }
    }
  }
  // Sends bytes to one side, then to the other: both are there at Nexus's next turn.
  void both_then_turns(sim::Peer& one, std::string_view first, sim::Peer& other, std::string_view second) {
    net.send(one, first);
    net.deliver();
    net.send(other, second);
    turns();
  }
};

std::string answer(std::string_view body, std::string_view fields = {}) {
  std::string text = "HTTP/1.1 200 OK\r\n";
  text.append(fields).append("Content-Length: ").append(std::to_string(body.size())).append("\r\n\r\n").append(body);
  return text;
}

}  // namespace

TEST_CASE("bytes that a backend sent before the request went out are no answer to it") {
  Scene scene(settings(false));
  sim::Peer& client = scene.net.connect_client();
  scene.turns();
  scene.net.send(client, kPost);
  scene.turns();
  REQUIRE(scene.backends.size() == 1);
  scene.net.send(*scene.backends[0], answer("first"));
  scene.turns();
  REQUIRE(client.received.find("first") != std::string::npos);
  // The client's request is there before the bytes of the idle connection, in the same turn.
  scene.both_then_turns(client, kPost, *scene.backends[0], answer("not asked for"));
  REQUIRE(scene.backends.size() == 2);
  CHECK(scene.net.closed(*scene.backends[0]));
  CHECK(scene.backends[0]->received.find(kBody) == scene.backends[0]->received.rfind(kBody));
  scene.net.send(*scene.backends[1], answer("second"));
  scene.turns();
  CHECK(client.received.find("not asked for") == std::string::npos);
  CHECK(client.received.find("second") != std::string::npos);
}

TEST_CASE("a request on a reused connection that closed is sent twice, unless resend is never") {
  for (const Resend resend : {Resend::stale, Resend::never}) {
    auto with = std::make_shared<Settings>(*settings(false));
    with->upstream.resend = resend;
    Scene scene(with);
    sim::Peer& client = scene.net.connect_client();
    scene.turns();
    scene.net.send(client, kPost);
    scene.turns();
    REQUIRE(scene.backends.size() == 1);
    scene.net.send(*scene.backends[0], answer("first"));
    scene.turns();
    scene.net.send(client, kPost);
    scene.turns();
    REQUIRE(scene.backends[0]->received.find(kBody) != scene.backends[0]->received.rfind(kBody));
    scene.net.finish(*scene.backends[0]);  // without an answer to the second
    scene.turns();
    CHECK(scene.backends.size() == (resend == Resend::stale ? 2 : 1));
    CHECK((client.received.find("HTTP/1.1 502") != std::string::npos) == (resend == Resend::never));
  }
}

namespace {

// A backend that has read only the beginning of a large request, which it takes on in pieces.
struct SlowReader : sim::Stage {
  static constexpr std::size_t kWindow = 200'000;
  static constexpr std::size_t kBodyBytes = 1'500'000;  // more than kSentPerTurn

  explicit SlowReader(const std::function<void(Settings&)>& change = {}) : Stage(2, change) {
    net.on_connect = [this](sim::Peer& peer) { net.stop_reading(peer, kWindow); };
    std::string body = sim::kAskStream;
    client = &ask(body.append(kBodyBytes - body.size(), ' '));
    REQUIRE(backend(1) != nullptr);
    REQUIRE(backend(1)->received.size() == kWindow);
  }
  void take_more() {
    net.wire.peer_take(backend(1)->link, net.wire.at(backend(1)->link).to_peer.unread());
    settle();
  }
  void take_all() {
    net.read_on(*backend(1));
    settle();
  }
  bool has_body() { return backend(1)->received.size() > kBodyBytes; }

  sim::Peer* client = nullptr;
};

const std::string kStreamHead = "HTTP/1.1 200 OK\r\n" + courses::kChunks;

}  // namespace

TEST_CASE("a backend that begins its answer before it has read the request gets the rest of it") {
  const std::string begun[] = {kStreamHead, kStreamHead + courses::kToken};  // held back, or passed on at once
  for (const std::string& first : begun) {
    for (const bool at_once : {true, false}) {
      CAPTURE(first);
      CAPTURE(at_once);
      SlowReader stage;
      stage.say(*stage.backend(1), first);
      for (int i = 0; i < 20 && !at_once; ++i) stage.take_more();
      stage.take_all();
      CHECK(stage.has_body());
      stage.say(*stage.backend(1), courses::kToken + courses::kLast + courses::kDone);
      CHECK(stage.client->received.find("[DONE]") != std::string::npos);
      CHECK(stage.all_errors() == 0);
      // All was sent and read, so that the connection serves the next request.
      CHECK_FALSE(stage.net.closed(*stage.backend(1)));
    }
  }
}

TEST_CASE("a backend that takes more of its request has not stalled, and one that takes no more has") {
  for (const std::string& first : {kStreamHead, kStreamHead + courses::kToken}) {
    CAPTURE(first);
    SlowReader stage([](Settings& settings) {
      settings.upstream.first_byte_timeout_ns = settings.upstream.stall_timeout_ns = 2 * kSecond;
      settings.upstream.request_timeout_ns = 0;
      settings.upstream.head_delay_ns = kSecond;
      settings.routing.retries = 0;
    });
    stage.say(*stage.backend(1), first);
    for (int i = 0; i < 4; ++i) {
      stage.pass(1500 * kMillisecond);
      stage.take_more();
    }
    CHECK(stage.all_errors() == 0);
    CHECK_FALSE(stage.net.closed(*stage.backend(1)));
    stage.pass(2100 * kMillisecond);
    CHECK(stage.errors(ErrorType::timeout) == 1);
    CHECK(stage.net.closed(*stage.backend(1)));
  }
}

TEST_CASE("a backend that refuses a request before it has read it gets no more of it") {
  SlowReader stage;
  stage.say(*stage.backend(1), "HTTP/1.1 413 X\r\nContent-Length: 100\r\n\r\n{");
  stage.take_all();
  CHECK_FALSE(stage.has_body());
  stage.say(*stage.backend(1), std::string(99, ' '));
  CHECK(stage.answer_to(*stage.client).status == 413);
  CHECK(stage.net.closed(*stage.backend(1)));
}

TEST_CASE("a request that is still sent when its client leaves, or its backend, ends as others do") {
  for (const bool client_leaves : {true, false}) {
    for (const std::string& first : {kStreamHead, kStreamHead + courses::kToken}) {
      CAPTURE(client_leaves);
      CAPTURE(first);
      SlowReader stage;
      stage.say(*stage.backend(1), first);
      stage.take_more();
      client_leaves ? stage.net.finish(*stage.client) : stage.net.break_off(*stage.backend(1));
      stage.settle();
      if (!client_leaves && first == kStreamHead) {  // nothing was passed on: the other one gets it whole
        REQUIRE(stage.backend(2) != nullptr);
        stage.net.read_on(*stage.backend(2));
        stage.settle();
        CHECK(stage.backend(2)->received.size() > SlowReader::kBodyBytes);
        stage.say(*stage.backend(2), kStreamHead + courses::kToken + courses::kDone);
        CHECK(stage.all_errors() == 0);
      } else {
        CHECK(stage.all_errors() == 1);
      }
      CHECK(sim::left_over(stage.gateway()) == "");
    }
  }
}
