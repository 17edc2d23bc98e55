// first_event_test.cpp
// Goal:   an answer begins with its first byte that means something: until then another backend can be tried.
// Method: one worker on the scripted network; each backend is ejected by its first failure.
#include <doctest/doctest.h>

#include <memory>
#include <string>

#include "tests/lib/stage.h"

using namespace nexus;
using sim::Peer;
using sim::Stage;

namespace {

const std::string kHead = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
const std::string kEnd = "0\r\n\r\n";

std::string chunk(const std::string& text) {
  char size[32];
  std::snprintf(size, sizeof size, "%zx\r\n", text.size());
  return size + text + "\r\n";
}
const std::string kToken = chunk("data: {\"choices\":[{\"delta\":{\"content\":\"one\"}}]}\n\n");
const std::string kDone = chunk("data: [DONE]\n\n") + kEnd;
const std::string kError = chunk("data: {\"error\":{\"message\":\"broken\"}}\n\n");
const std::string kUseful = "HTTP/1.1 500 No\r\nContent-Length: 6\r\n\r\nuseful";

}  // namespace

TEST_CASE("a stream that ends, breaks or fails before its first event is tried elsewhere, and its backend is blamed") {
  for (const std::string& first : {kHead, kHead + chunk(": ping\n\n"), kHead + kEnd, kHead + kError + kEnd}) {
    CAPTURE(first);
    Stage stage(2);
    const Peer& client = stage.ask(sim::kAskStream);
    stage.say(*stage.backend(1), first);
    if (first.find(kEnd) == std::string::npos) stage.net.break_off(*stage.backend(1));
    stage.settle();
    REQUIRE(stage.backend(2) != nullptr);
    stage.say(*stage.backend(2), kHead + kToken + kDone);
    CHECK(stage.answer_to(client).value("X-Nexus-Backend") == "b2");
    CHECK(stage.ejected(1));
    CHECK_FALSE(stage.ejected(2));
    CHECK(stage.all_errors() == 0);
  }
}

TEST_CASE("an error event behind tokens, or with no backend left, passes unchanged and counts against its backend") {
  for (const std::string& body : {kToken + kError + kEnd, kError + kDone, kEnd}) {
    CAPTURE(body);
    Stage stage;
    const Peer& client = stage.ask(sim::kAskStream);
    stage.say(*stage.backend(), kHead + body);
    CHECK(stage.answer_to(client).status == 200);
    CHECK((stage.answer_to(client).body.find("broken") != std::string::npos) == (body != kEnd));
    CHECK(stage.errors(ErrorType::backend_error) == 1);
    CHECK(stage.attempts(AttemptOutcome::bad_response) == 1);
    CHECK(stage.ejected());
  }
}

TEST_CASE("if no backend gives a better answer, the client gets the last real one") {
  for (const bool refused : {true, false}) {
    CAPTURE(refused);
    Stage stage(2, [](Settings& settings) { settings.upstream.first_byte_timeout_ns = kSecond; });
    const Peer& client = stage.ask();
    if (refused) stage.net.wire.connect_error = ECONNREFUSED;
    stage.say(*stage.backend(1), kUseful);
    stage.pass(2 * kSecond);
    const rfc9112::Message answer = stage.answer_to(client);
    CHECK(answer.status == 500);
    CHECK(answer.body == "useful");
    CHECK(answer.value("X-Nexus-Backend") == "b1");
    CHECK(stage.errors(ErrorType::backend_error) == 1);
  }
}

TEST_CASE("after head_delay the client gets the head and comments, and first_byte_timeout goes on") {
  Stage stage(1, [](Settings& settings) {
    settings.upstream.head_delay_ns = kSecond;
    settings.upstream.stall_timeout_ns = kSecond / 2;
    settings.upstream.first_byte_timeout_ns = 5 * kSecond;
  });
  const Peer& client = stage.ask(sim::kAskStream);
  stage.say(*stage.backend(), kHead + chunk(": ping\n\n"));
  stage.pass(kSecond / 2);
  CHECK(client.received.empty());
  stage.pass(kSecond);
  CHECK(stage.answer_to(client).body == ": ping\n\n");
  stage.pass(kSecond);
  stage.say(*stage.backend(), kToken);
  CHECK(stage.all_errors() == 0);
  CHECK(stage.answer_to(client).body.find("one") != std::string::npos);
  stage.pass(kSecond);
  CHECK(stage.limit_hits(Limit::stall_timeout) == 1);
}

TEST_CASE("a client that sends bytes, and takes none, does not prolong the backend's stall_timeout") {
  Stage stage(1, [](Settings& settings) { settings.upstream.stall_timeout_ns = kSecond; });
  Peer& client = stage.ask(sim::kAskStream);
  stage.say(*stage.backend(), kHead + kToken);
  for (int i = 0; i < 5 && stage.limit_hits(Limit::stall_timeout) == 0; ++i) {
    stage.pass(400 * kMillisecond);
    stage.say(client, "P");
  }
  CHECK(stage.limit_hits(Limit::stall_timeout) == 1);
  CHECK(stage.attempts(AttemptOutcome::timeout) == 1);
}

namespace {

// A stage with an access log.
struct Logged {
  std::unique_ptr<sim::LogRings> rings = std::make_unique<sim::LogRings>();
  Stage stage{2,
              [](Settings& settings) {
                settings.log.access = "stderr";
                settings.upstream.head_delay_ns = 0;
              },
              rings.get()};
  std::string line() {
    std::string text;
    (*rings)[0].access.take(text);
    return text;
  }
};

}  // namespace

TEST_CASE("a stream without a Content-Type whose head was sent at once is logged and counted as a stream") {
  Logged logged;
  logged.stage.ask(sim::kAskStream);
  logged.stage.say(*logged.stage.backend(1), "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
  logged.stage.pass(kSecond);
  logged.stage.say(*logged.stage.backend(1), kToken + kDone);
  const std::string line = logged.line();
  CHECK(line.find(" stream=true ") != std::string::npos);
  CHECK(line.find(" first_byte_ms=1000.000 ") != std::string::npos);
  std::uint64_t first_tokens = 0;
  logged.stage.slab().pairs().for_each([&](std::uint32_t, std::uint32_t, const PairCounters& cells) {
    first_tokens += static_cast<std::uint64_t>(cells.first_token_sum.read());
  });
  CHECK(first_tokens == kSecond);
}

TEST_CASE("the first byte of an answer that was kept until no backend gave a better one has its time in the log") {
  Logged logged;
  const Peer& client = logged.stage.ask();
  logged.stage.pass(20 * kMillisecond);
  logged.stage.say(*logged.stage.backend(1), kUseful);
  REQUIRE(logged.stage.backend(2) != nullptr);
  logged.stage.pass(20 * kMillisecond);
  logged.stage.net.break_off(*logged.stage.backend(2));
  logged.stage.settle();
  CHECK(logged.stage.answer_to(client).body == "useful");
  CHECK(logged.line().find(" first_byte_ms=20.000 ") != std::string::npos);
}
