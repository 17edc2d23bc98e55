// endings_test.cpp
// Goal:   whose fault it was. Each way that an exchange can end badly, but for the two that need a lack of memory (the
//         simulator's failing allocations), is driven, and its row of kEndings compared with what was counted.
// Method: one worker on the scripted network; a backend is ejected by its first failure.
#include <doctest/doctest.h>

#include <functional>
#include <memory>
#include <string>

#include "tests/lib/stage.h"

using namespace nexus;
using sim::Peer;
using sim::Stage;

namespace {

constexpr Ns kConnectTime = 2 * kSecond, kFirstByteTime = 3 * kSecond, kStallTime = 4 * kSecond;
constexpr Ns kWriteTime = 5 * kSecond, kRequestTime = 20 * kSecond;

void set_limits(Settings& settings) {
  settings.upstream.connect_timeout_ns = kConnectTime;
  settings.upstream.first_byte_timeout_ns = kFirstByteTime;
  settings.upstream.stall_timeout_ns = kStallTime;
  settings.upstream.request_timeout_ns = kRequestTime;
  settings.server.write_timeout_ns = kWriteTime;
  settings.backends[0].api_key = "key-of-nexus";
}

const std::string kBegin = "HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n{";
const std::string kStream = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
const std::string kEvent = "f\r\ndata: {\"a\":1}\n\n\r\n";

const std::string kNoKey = "HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\n{}";

void cannot_connect(Stage& stage, int error) {
  stage.net.wire.connect_error = error;
  stage.ask();
}

struct Row {
  Ending ending;
  std::function<void(Stage&)> drive;
};

const Row kRows[] = {
    {Ending::not_connected, [](Stage& stage) { cannot_connect(stage, ECONNREFUSED); }},
    {Ending::no_descriptor, [](Stage& stage) { cannot_connect(stage, EMFILE); }},
    {Ending::no_port, [](Stage& stage) { cannot_connect(stage, EADDRNOTAVAIL); }},
    {Ending::no_route, [](Stage& stage) { cannot_connect(stage, ENETUNREACH); }},
    {Ending::connect_silent,
     [](Stage& stage) {
       stage.net.fate = sim::ConnectFate::Kind::ignored;
       stage.ask();
       stage.pass(kConnectTime + kSecond);
     }},
    {Ending::first_byte_silent,
     [](Stage& stage) {
       stage.ask();
       stage.pass(kFirstByteTime + kSecond);
     }},
    {Ending::stalled,
     [](Stage& stage) {
       stage.ask();
       stage.say(*stage.backend(), kBegin);
       stage.pass(kStallTime + kSecond);
     }},
    {Ending::request_timed_out,
     [](Stage& stage) {
       stage.ask(sim::kAskStream);
       stage.say(*stage.backend(), kStream);
       for (Ns gone = 0; gone < kRequestTime + kSecond; gone += kSecond) {
         stage.say(*stage.backend(), kEvent);
         stage.pass(kSecond);
       }
     }},
    {Ending::backend_closed,
     [](Stage& stage) {
       stage.ask();
       stage.say(*stage.backend(), kBegin);
       stage.net.finish(*stage.backend());
       stage.settle();
     }},
    {Ending::backend_garbled,
     [](Stage& stage) {
       stage.ask();
       stage.say(*stage.backend(), "SSH-2.0-OpenSSH\r\n\r\n");
     }},
    {Ending::key_refused,
     [](Stage& stage) {
       stage.ask();
       stage.say(*stage.backend(), kNoKey);
     }},
    {Ending::backend_head_large,
     [](Stage& stage) {
       stage.ask();
       stage.say(*stage.backend(), "HTTP/1.1 200 OK\r\nX-Long: " + std::string(20'000, 'x'));
     }},
    {Ending::client_left,
     [](Stage& stage) {
       Peer& client = stage.ask();
       stage.net.finish(client);
       stage.settle();
     }},
    {Ending::client_stalled,
     [](Stage& stage) {
       Peer& client = stage.ask();
       stage.net.stop_reading(client, 1000);
       stage.say(*stage.backend(), kBegin + std::string(100'000, ' '));
       stage.pass(kWriteTime + kSecond);
     }},
    {Ending::drained,
     [](Stage& stage) {
       stage.ask(sim::kAskStream);
       stage.say(*stage.backend(), kStream + kEvent);
       stage.end();
     }},
};

}  // namespace

TEST_CASE("each ending counts its outcome, its limit and its error, and only a backend's own failure ejects it") {
  std::uint32_t driven = 0;
  for (const Row& row : kRows) {
    driven |= 1u << static_cast<unsigned>(row.ending);
    CAPTURE(static_cast<int>(row.ending));
    Stage stage(1, set_limits);
    row.drive(stage);
    const EndingRow& wanted = row_of(row.ending);
    CHECK(stage.ejected() == (wanted.fault == Fault::backend));
    CHECK(stage.attempts(wanted.outcome) == 1);
    CHECK(stage.all_errors() == 1);
    CHECK(stage.errors(wanted.error_type) == 1);
    for (std::size_t i = 0; i < kLimitNames.size(); ++i) {
      CAPTURE(kLimitNames[i]);
      const auto limit = static_cast<Limit>(i);
      const bool head = row.ending == Ending::backend_head_large && limit == Limit::max_header;  // one of two limits
      CHECK(stage.limit_hits(limit) == (head || wanted.limit == limit ? 1 : 0));
    }
  }
  driven |= 1u << static_cast<unsigned>(Ending::client_unwritable) | 1u << static_cast<unsigned>(Ending::out_of_memory);
  CHECK(driven == (1u << kEndings.size()) - 1);
}

TEST_CASE("a lack on this host is answered with 503, and its code names what is missing") {
  const std::pair<int, const char*> rows[] = {{EMFILE, "\"no_descriptor\""},  {ENFILE, "\"no_descriptor\""},
                                              {ENOMEM, "\"out_of_memory\""},  {ENOBUFS, "\"out_of_memory\""},
                                              {EADDRNOTAVAIL, "\"no_port\""}, {EAGAIN, "\"no_port\""},
                                              {ENETUNREACH, "\"no_route\""},  {EAFNOSUPPORT, "\"no_route\""}};
  for (const auto& [error, code] : rows) {
    CAPTURE(code);
    Stage stage(2);
    stage.net.wire.connect_error = error;
    const rfc9112::Message answer = stage.answer_to(stage.ask());
    CHECK(answer.status == 503);
    CHECK(answer.body.find(code) != std::string::npos);
    CHECK_FALSE(stage.ejected(1));
    CHECK_FALSE(stage.ejected(2));
    CHECK(stage.errors(ErrorType::overloaded) == 1);
  }
}

TEST_CASE("a backend that is silent is still blamed where request_timeout passes later") {
  Stage stage(1, set_limits);
  const Peer& client = stage.ask();
  stage.pass(kFirstByteTime + kSecond);
  CHECK(stage.ejected());
  CHECK(stage.answer_to(client).status == 504);
  CHECK(stage.limit_hits(Limit::request_timeout) == 0);
}

TEST_CASE("a client that is slow is not blamed for request_timeout, nor is its backend") {
  Stage stage(1, [](Settings& settings) {
    set_limits(settings);
    settings.upstream.request_timeout_ns = kWriteTime - kSecond;
  });
  Peer& client = stage.ask();
  stage.net.stop_reading(client, 1000);
  stage.say(*stage.backend(), kBegin + std::string(100'000, ' '));
  stage.pass(kWriteTime + kSecond);
  CHECK(stage.limit_hits(Limit::write_timeout) == 0);
  CHECK(stage.limit_hits(Limit::request_timeout) == 1);
  CHECK(stage.errors(ErrorType::timeout) == 1);
  CHECK_FALSE(stage.ejected());
}

TEST_CASE("an error event for a client that takes nothing does not prolong the client's time") {
  Stage stage(1, [](Settings& settings) {
    set_limits(settings);
    settings.upstream.request_timeout_ns = kWriteTime - kSecond;
  });
  Peer& client = stage.ask(sim::kAskStream);
  stage.net.stop_reading(client, 1000);
  stage.say(*stage.backend(), kStream + "186a7\r\ndata: " + std::string(99'999, 'x') + "\n\n\r\n");
  stage.pass(kWriteTime - kSecond / 2);
  CHECK(stage.limit_hits(Limit::request_timeout) == 1);
  CHECK_FALSE(client.ended);
  stage.pass(kSecond);
  CHECK(client.ended);
}

TEST_CASE("a backend's error is counted, though the client leaves or request_timeout passes before it is whole") {
  for (const bool leaves : {true, false}) {
    CAPTURE(leaves);
    Stage stage(1, set_limits);
    Peer& client = stage.ask();
    stage.say(*stage.backend(), "HTTP/1.1 503 Busy\r\nContent-Length: 1000\r\n\r\n{");
    if (leaves) stage.net.break_off(client);
    for (Ns gone = 0; !leaves && gone < kRequestTime + kSecond; gone += kSecond) {
      stage.say(*stage.backend(), " ");
      stage.pass(kSecond);
    }
    stage.settle();
    CHECK(stage.attempts(AttemptOutcome::status_5xx) == 1);
    CHECK(stage.attempts(AttemptOutcome::cancelled) == 0);
    CHECK(stage.errors(ErrorType::backend_error) == 1);
  }
}

TEST_CASE("request_timeout is told before an answer has begun, wherever its time was spent") {
  const auto with_limit = [](Settings& settings) {
    settings.upstream.request_timeout_ns = kSecond;
    settings.upstream.connect_timeout_ns = settings.upstream.first_byte_timeout_ns = 60 * kSecond;
    settings.queue.size = 5;
    settings.queue.timeout_ns = 60 * kSecond;
    settings.backends[0].max_pending = 1;
  };
  SUBCASE("while the backend works") {
    Stage stage(1, with_limit);
    const Peer& client = stage.ask();
    stage.pass(2 * kSecond);
    CHECK(stage.answer_to(client).status == 504);
    CHECK(stage.answer_to(client).body.find("\"request_timeout\"") != std::string::npos);
    CHECK_FALSE(stage.ejected());
  }
  SUBCASE("while connecting") {
    Stage stage(1, with_limit);
    stage.net.fate = sim::ConnectFate::Kind::ignored;
    const Peer& client = stage.ask();
    stage.pass(2 * kSecond);
    CHECK(stage.answer_to(client).status == 504);
    CHECK_FALSE(stage.ejected());
  }
  SUBCASE("in the queue") {
    Stage stage(1, with_limit);
    stage.ask(sim::kAskStream);
    stage.say(*stage.backend(), kStream + kEvent);
    stage.pass(kSecond / 2);
    const Peer& waiting = stage.ask();
    stage.pass(2 * kSecond);
    CHECK(stage.limit_hits(Limit::queue_timeout) == 0);
    CHECK(stage.limit_hits(Limit::request_timeout) == 2);
    CHECK_FALSE(stage.ejected());
    CHECK(waiting.ended == false);
  }
  SUBCASE("on an earlier backend") {
    Stage stage(2, [&](Settings& settings) {
      with_limit(settings);
      settings.backends[0].max_pending = 0;
      settings.upstream.first_byte_timeout_ns = 600 * kMillisecond;
    });
    const Peer& client = stage.ask();
    stage.pass(2 * kSecond);
    CHECK(stage.answer_to(client).status == 504);
    CHECK(stage.ejected(1));
    CHECK_FALSE(stage.ejected(2));
  }
}

TEST_CASE("a client whose stream is cut by the end of the process gets an error event") {
  Stage stage;
  const Peer& client = stage.ask(sim::kAskStream);
  stage.say(*stage.backend(), kStream + kEvent);
  stage.end();
  CHECK(client.ended);
  CHECK_FALSE(client.cut);
  const rfc9112::Message answer = stage.answer_to(client);
  CHECK(answer.status == 200);
  CHECK(answer.body.find("data: {\"error\":{") != std::string::npos);
  CHECK(answer.body.find("\"shutting_down\"") != std::string::npos);
}

TEST_CASE("a client without an answer at the end of the process gets 503") {
  Stage stage;
  const Peer& client = stage.ask();
  stage.end();
  CHECK(stage.answer_to(client).status == 503);
  CHECK(stage.errors(ErrorType::drain) == 1);
}

TEST_CASE("an answer that its client has not read at the end of the process gets nothing behind its end") {
  Stage stage;
  Peer& client = stage.ask(sim::kAskStream);
  stage.net.stop_reading(client, 1000);
  stage.say(*stage.backend(), kStream + "186a3\r\ndata: " + std::string(99'995, 'x') + "\n\n\r\n0\r\n\r\n");
  stage.end();
  CHECK(client.received.find("shutting_down") == std::string::npos);
  CHECK(stage.errors(ErrorType::drain) == 1);
}

TEST_CASE("a health check that could not be made for a lack on this host changes nothing") {
  for (const int error : {EMFILE, ENOMEM, EADDRNOTAVAIL, ENETUNREACH}) {
    Stage stage(1, [](Settings& settings) {
      settings.health = {};
      settings.health.interval_ns = kSecond;
      settings.health.failures = 1;
    });
    stage.say(*stage.backend(), "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
    REQUIRE(stage.registry().backends()[0].health == Health::healthy);
    stage.net.wire.connect_error = error;
    stage.pass(5 * kSecond);
    CHECK(stage.registry().backends()[0].health == Health::healthy);
    stage.net.wire.connect_error = ECONNREFUSED;
    stage.pass(2 * kSecond);
    CHECK(stage.registry().backends()[0].health == Health::unhealthy);
  }
}

TEST_CASE("a backend that refuses Nexus's key is the one to blame, and one that refuses the client's is not") {
  for (const bool of_nexus : {true, false}) {
    CAPTURE(of_nexus);
    Stage stage(2, [&](Settings& settings) {
      if (of_nexus) settings.backends[0].api_key = settings.backends[1].api_key = "key-of-nexus";
    });
    const Peer& client = stage.ask();
    stage.say(*stage.backend(1), kNoKey);
    REQUIRE((stage.backend(2) != nullptr) == of_nexus);
    if (of_nexus) stage.say(*stage.backend(2), kNoKey);
    CHECK(stage.answer_to(client).status == (of_nexus ? 502 : 401));
    CHECK(stage.errors(of_nexus ? ErrorType::backend_error : ErrorType::bad_request) == 1);
    CHECK(stage.ejected(1) == of_nexus);
  }
}

TEST_CASE("a broken stream whose events are not followed gets no error event: it would stand anywhere") {
  const std::string coded =
      "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n"
      "Transfer-Encoding: chunked\r\n\r\n5\r\n\x1f\x8b\b..\r\n";
  const std::string plain =
      "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + kEvent;
  const std::pair<std::string, std::string> rows[] = {
      {sim::post(sim::kAskStream), coded},
      {"GET /v1/responses/resp_1?stream=true HTTP/1.1\r\nHost: a\r\n\r\n", plain},
  };
  for (const auto& [request, answer] : rows) {
    CAPTURE(request);
    Stage stage(1, [](Settings& settings) { settings.upstream.head_delay_ns = 0; });
    Peer& client = stage.net.connect_client();
    stage.settle();
    stage.say(client, request);
    stage.say(*stage.backend(), answer);
    stage.net.finish(*stage.backend());
    stage.settle();
    CHECK(client.ended);
    CHECK(client.received.ends_with(answer.substr(answer.find("\r\n\r\n") + 4)));
    CHECK(stage.errors(ErrorType::backend_error) == 1);
  }
}

TEST_CASE("a 429 to the client's own key does not eject the backend for all") {
  for (const std::string key : {"", "Authorization: Bearer of-the-client\r\n", "x-api-key: of-the-client\r\n"}) {
    CAPTURE(key);
    const auto rings = std::make_unique<sim::LogRings>();
    Stage stage(2, {}, rings.get());
    Peer& client = stage.net.connect_client();
    stage.settle();
    std::string text = sim::post(sim::kAsk);
    stage.say(client, text.insert(text.find("Host: "), key));
    stage.say(*stage.backend(1), "HTTP/1.1 429 No\r\nRetry-After: 120\r\nContent-Length: 2\r\n\r\n{}");
    std::string logged;
    (*rings)[0].events.take(logged);
    CHECK(logged.find("request to a backend failed") != std::string::npos);
    CHECK(logged.find("429") != std::string::npos);
    CHECK(stage.backend(2) != nullptr);
    CHECK(stage.ejected(1) == key.empty());
    CHECK(stage.attempts(AttemptOutcome::status_429, 1) == 1);
  }
}
