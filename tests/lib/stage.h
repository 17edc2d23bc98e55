// stage.h
// Owns:     one worker of Nexus with up to three backends on a scripted network, for tests of an exchange's course:
//           what was counted for each backend, and if it is ejected.
// Promises: a backend is ejected by its first failure, and stays so for the whole test. Each backend has its own port.
// Leaves:   what the far ends do to the tests.
// Threads:  one.
// Tested by: tests/endings_test.cpp, tests/apis_test.cpp, tests/next_request_test.cpp, tests/client_limits_test.cpp
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "tests/lib/gateway.h"
#include "tests/lib/rfc9112.h"
#include "tests/lib/script.h"

namespace nexus::sim {

inline const std::string kAsk = R"({"model":"m","messages":[]})";
inline const std::string kAskStream = R"({"model":"m","stream":true,"messages":[]})";

inline std::string post(const std::string& body, std::string_view version = "HTTP/1.1",
                        std::string_view path = "/v1/chat/completions") {
  return "POST " + std::string(path) + " " + std::string(version) +
         "\r\nHost: a\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

class Stage {
 public:
  static constexpr std::uint16_t kFirstPort = 8001;

  explicit Stage(std::size_t backends = 1, const std::function<void(Settings&)>& change = {}, LogRings* rings = nullptr)
      : gateway_(net.wire, settings(backends, change), 1, 7, rings) {
    net.wire.on_ready = [this](std::uint32_t loop, LinkId link) { gateway_.net(loop).make_ready(link); };
    settle();
  }

  Script net;

  // Everything that can happen now happens.
  void settle() {
    for (int i = 0; i < 50; ++i) {
      net.deliver();
      for (std::uint32_t loop = 0; loop < gateway_.loops(); ++loop) {
        if (gateway_.due_at(loop) <= net.wire.now()) gateway_.turn(loop);
      }
    }
    net.deliver();
  }
  void pass(Ns span) {
    constexpr Ns kStep = 10 * kMillisecond;
    for (Ns gone = 0; gone < span; gone += kStep) {
      net.wire.advance(net.wire.now() + std::min(kStep, span - gone));
      settle();
    }
  }
  // The process ends.
  void end() {
    gateway_.end_workers();
    net.deliver();
  }

  Peer& ask(const std::string& body = kAsk, std::string_view path = "/v1/chat/completions") {
    Peer& client = net.connect_client();
    settle();
    net.send(client, post(body, "HTTP/1.1", path));
    settle();
    return client;
  }
  void say(Peer& peer, std::string_view bytes) {
    net.send(peer, bytes);
    settle();
  }

  // The newest connection to a backend, or the newest one to backend `n`, counted from 1; null if there is none.
  Peer* backend(std::size_t n = 0) {
    for (auto peer = net.peers.rbegin(); peer != net.peers.rend(); ++peer) {
      if (peer->to_backend && (n == 0 || net.wire.at(peer->link).peer == kFirstPort + n - 1)) return &*peer;
    }
    return nullptr;
  }

  // The final response to a client's only request; its status is 0 if not even the head has come.
  rfc9112::Message answer_to(const Peer& client) const {
    const auto read = rfc9112::read_responses(client.received, {"POST"}, client.ended && !client.cut);
    if (!read.messages.empty()) return read.messages.back();
    return read.within_body ? read.open : rfc9112::Message{};
  }

  bool ejected(std::size_t n = 1) const { return !registry().backends()[n - 1].circuit->usable(net.wire.now()); }
  std::uint64_t attempts(AttemptOutcome outcome, std::size_t n = 1) const {
    const BackendCounters* cells = slab().backend(id_of(n));
    return cells == nullptr ? 0 : cells->attempts[static_cast<std::size_t>(outcome)].read();
  }
  std::uint64_t errors(ErrorType type) const {
    std::uint64_t sum = 0;
    for (std::uint32_t model = 0; model < 4; ++model) {
      const ModelCounters* cells = slab().model(ModelId{model});
      if (cells != nullptr) sum += cells->errors[static_cast<std::size_t>(type)].read();
    }
    return sum;
  }
  std::uint64_t all_errors() const {
    std::uint64_t sum = 0;
    for (std::size_t type = 0; type < kErrorTypeNames.size(); ++type) sum += errors(static_cast<ErrorType>(type));
    return sum;
  }
  std::uint64_t limit_hits(Limit limit) const {
    std::uint64_t sum = 0;
    for (const auto& each : gateway_.metrics().slabs()) {
      sum += each->thread().limits[static_cast<std::size_t>(limit)].read();
    }
    return sum;
  }
  const Slab& slab() const { return *gateway_.metrics().slabs().back(); }
  const Registry& registry() const { return gateway_.control().registry(); }
  const Gateway& gateway() const { return gateway_; }

 private:
  static std::shared_ptr<const Settings> settings(std::size_t backends, const std::function<void(Settings&)>& change) {
    auto settings = std::make_shared<Settings>();
    settings->server.body_memory_bytes = 64u << 20;
    settings->health.enabled = false;
    settings->health.eject_after = 1;
    settings->health.eject_time_ns = 1000 * kSecond;
    settings->routing.strategy = Strategy::priority;
    for (std::size_t i = 0; i < backends; ++i) {
      BackendSettings backend;
      backend.name = "b" + std::to_string(i + 1);
      backend.kind = BackendKind::generic;
      backend.address = {"10.0.0.1", static_cast<std::uint16_t>(kFirstPort + i)};
      backend.models = {"m"};
      backend.priority = static_cast<std::uint32_t>(10 * (i + 1));
      settings->backends.push_back(std::move(backend));
    }
    if (change) change(*settings);
    return settings;
  }
  BackendId id_of(std::size_t n) const { return registry().backends()[n - 1].id; }

  Gateway gateway_;
};

}  // namespace nexus::sim
