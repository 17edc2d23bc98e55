// attempt_test.cpp
// Goal:   an attempt holds one connection and one pending count, gives both back however it ends, and leaves nothing
//         of itself to the next one.
// Method: the attempt and the pool alone on the scripted network.
#include <doctest/doctest.h>

#include <cerrno>
#include <cstddef>
#include <string>

#include "nexus/proxy/attempt.h"
#include "tests/lib/pool_stage.h"

using namespace nexus;
using sim::PoolStage;

namespace {

using Try = Attempt<sim::SimNet>;

struct Scene : PoolStage {
  explicit Scene(std::uint32_t backends = 2) : PoolStage(backends) {}

  void begin(std::uint32_t n = 0, std::size_t body_bytes = 0) {
    attempt.attach(owner());
    attempt.begin(context.snapshot.again(), context.snapshot->backends[n]);
    body.assign(body_bytes, 'b');
    head.method = HTTP_POST;
    head.target_bytes = static_cast<std::uint32_t>(kTarget.size());
    RequestView request;
    request.base = kTarget.data();
    request.head = &head;
    request.fields = &fields;
    request.body = body.data();
    request.body_bytes = body.size();
    attempt.compose(request, BodyFacts{}, {}, false, "id", {});
  }
  void connect() {
    REQUIRE(attempt.connect() == SocketOutcome::ok);
    arrive();
    REQUIRE(attempt.connection().establish(net).ok());
    attempt.begin_sending();
  }
  Try::Sent send() { return attempt.send(body.data()); }
  void send_all() {
    while (send() == Try::Sent::share) settle();
    settle();
  }
  // Events come; those of the attempt's connection are noted by PoolStage.
  void arrive() { settle(); }
  std::int64_t pending(std::uint32_t n = 0) const { return slab.pending(id(n)); }
  std::uint64_t outcomes(AttemptOutcome outcome, std::uint32_t n = 0) const {
    const BackendCounters* cells = slab.backend(id(n));
    return cells == nullptr ? 0 : cells->attempts[static_cast<std::size_t>(outcome)].read();
  }

  const std::string kTarget = "/v1/chat/completions";
  RequestHead head;
  FieldTable fields;
  std::string body;
  Try attempt{context, pool};
};

std::size_t count_of(const std::string& text, std::string_view part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) count += 1;
  return count;
}

}  // namespace

TEST_CASE(
    "an attempt is pending at its own backend from begin() to leave(), and its connection goes back or is closed") {
  for (const bool clean : {true, false}) {
    CAPTURE(clean);
    Scene scene;
    scene.begin(1);
    CHECK(scene.pending(0) == 0);
    CHECK(scene.pending(1) == 1);
    CHECK_FALSE(scene.attempt.take_kept());
    scene.connect();
    CHECK(scene.counted(1) == 1);
    scene.send_all();
    scene.attempt.release(clean);
    CHECK(scene.attempt.upstream() == nullptr);
    CHECK(scene.pending(1) == 1);
    scene.attempt.leave();
    CHECK(scene.pending(1) == 0);
    CHECK(scene.counted(1) == (clean ? 1 : 0));
    CHECK((scene.take(1) != nullptr) == clean);
  }
}

TEST_CASE(
    "a connection over which the request was not sent whole, or could not be sent, is closed though all else is well") {
  for (const bool broken : {false, true}) {
    CAPTURE(broken);
    Scene scene;
    scene.begin(0, 4 * kSentPerTurn);
    scene.connect();
    REQUIRE(scene.send() == Try::Sent::share);
    if (broken) {
      scene.settle();
      scene.script.break_off(scene.script.peers[0]);
      scene.settle();
      CHECK(scene.send() == Try::Sent::failed);
      CHECK(scene.attempt.send_failed());
    }
    scene.attempt.release(true);
    CHECK(scene.counted() == 0);
    CHECK(scene.pool.open() == 0);
  }
}

TEST_CASE("a connect() that fails leaves no connection, and the place is given back by leave()") {
  for (const int error : {ECONNREFUSED, EMFILE, ENOMEM, ENETUNREACH}) {
    CAPTURE(error);
    Scene scene;
    scene.begin();
    scene.script.wire.connect_error = error;
    CHECK(scene.attempt.connect() != SocketOutcome::ok);
    CHECK(scene.attempt.upstream() == nullptr);
    scene.attempt.close();
    scene.attempt.leave();
    CHECK(scene.pending() == 0);
    CHECK(scene.counted() == 0);
    CHECK(scene.pool.open() == 0);
  }
}

TEST_CASE("a refused connection is closed once, and one that was given back is not closed by close()") {
  Scene scene;
  scene.script.fate = sim::ConnectFate::Kind::refused;
  scene.begin();
  REQUIRE(scene.attempt.connect() == SocketOutcome::ok);
  scene.arrive();
  CHECK_FALSE(scene.attempt.connection().establish(scene.net).ok());
  scene.attempt.close();
  scene.attempt.close();
  CHECK(scene.counted() == 0);
  scene.attempt.leave();
  scene.script.fate = sim::ConnectFate::Kind::accepted;
  scene.begin();
  scene.connect();
  scene.send_all();
  scene.attempt.release(true);
  scene.attempt.close();
  CHECK(scene.counted() == 1);
}

TEST_CASE("only the first outcome of an attempt counts, and each attempt has its own") {
  Scene scene;
  scene.begin(0);
  scene.attempt.end(AttemptOutcome::timeout);
  scene.attempt.end(AttemptOutcome::ok);
  scene.attempt.leave();
  scene.begin(1);
  scene.attempt.end(AttemptOutcome::ok);
  CHECK(scene.outcomes(AttemptOutcome::timeout, 0) == 1);
  CHECK(scene.outcomes(AttemptOutcome::ok, 0) == 0);
  CHECK(scene.outcomes(AttemptOutcome::ok, 1) == 1);
  CHECK(scene.outcomes(AttemptOutcome::timeout, 1) == 0);
}

TEST_CASE("a second attempt on the next backend has nothing from the first, and sends the request from its start") {
  Scene scene;
  scene.begin(0, 2 * kSentPerTurn);
  scene.connect();
  REQUIRE(scene.send() == Try::Sent::share);
  scene.settle();
  scene.attempt.note_answer();
  scene.script.break_off(scene.script.peers[0]);
  scene.settle();
  REQUIRE(scene.send() == Try::Sent::failed);
  scene.attempt.end(AttemptOutcome::connect_error);
  scene.attempt.close();
  scene.attempt.leave();
  scene.begin(1, 2 * kSentPerTurn);
  CHECK(scene.attempt.backend()->id == PoolStage::id(1));
  CHECK_FALSE(scene.attempt.answered());
  CHECK_FALSE(scene.attempt.send_failed());
  CHECK(scene.attempt.is_first());
  CHECK(scene.attempt.sent_bytes() == 0);
  CHECK(scene.pending(0) == 0);
  CHECK(scene.pending(1) == 1);
  scene.connect();
  scene.send_all();
  const std::string& received = scene.script.peers[1].received;
  CHECK(received.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"));
  CHECK(received.size() == received.find("\r\n\r\n") + 4 + scene.body.size());
  scene.attempt.release(true);
  CHECK(scene.counted(0) == 0);
  CHECK(scene.counted(1) == 1);
}

TEST_CASE(
    "a reused connection found closed is replaced once per backend, and the request is sent again from its start") {
  Scene scene;
  for (const std::uint32_t n : {0u, 1u}) {
    CAPTURE(n);
    scene.keep(1, n);
    sim::Peer& stale = scene.script.peers.back();
    scene.begin(n);
    REQUIRE(scene.attempt.take_kept());
    scene.attempt.begin_sending();
    scene.send_all();
    scene.script.finish(stale);
    scene.settle();
    CHECK(scene.attempt.found_closed(false));
    scene.attempt.start_over();
    CHECK(scene.attempt.sent_bytes() == 0);
    CHECK(scene.counted(n) == 0);
    scene.connect();
    scene.send_all();
    CHECK(count_of(scene.script.peers.back().received, "POST ") == 1);
    CHECK_FALSE(scene.attempt.found_closed(false));
    CHECK_FALSE(scene.attempt.is_first());
    scene.attempt.release(false);
    scene.attempt.leave();
  }
}

TEST_CASE("a connection that is new, or answered, or closed long after the request is no stale one") {
  Scene scene;
  scene.begin();
  scene.connect();
  scene.send_all();
  CHECK_FALSE(scene.attempt.found_closed(false));  // new
  scene.attempt.release(true);
  scene.attempt.leave();
  scene.begin();
  REQUIRE(scene.attempt.take_kept());
  scene.attempt.begin_sending();
  scene.send_all();
  CHECK(scene.attempt.found_closed(false));
  scene.pass(kStaleWindow);
  CHECK_FALSE(scene.attempt.found_closed(false));
  CHECK(scene.attempt.found_closed(true));  // the request was never whole there
  scene.attempt.note_answer();
  CHECK_FALSE(scene.attempt.found_closed(true));
  scene.attempt.close();
}

TEST_CASE("a large request leaves no large text behind, a small one its own") {
  Scene scene;
  scene.fields.count = 0;
  scene.begin(0, kCopiedBodyBytes);  // copied behind the head
  scene.attempt.leave();
  scene.attempt.reset();
  REQUIRE(scene.context.request_texts.idle() == 1);
  const auto text = scene.context.request_texts.take();
  CHECK(text->own.capacity() <= kKeptTextBytes);
  CHECK(scene.attempt.backend() == nullptr);
}

TEST_CASE("an attempt keeps the snapshot that it began with through a reload that removes its backend") {
  Scene scene;
  scene.begin(0);
  scene.connect();
  scene.reload(2, kAutomatic, 1);
  CHECK(scene.attempt.backend()->id == PoolStage::id(0));
  CHECK(scene.attempt.backend()->name == "b0");
  scene.send_all();
  scene.attempt.release(true);
  scene.attempt.leave();
  CHECK(scene.counted(0) == 0);
  CHECK(scene.pending(0) == 0);
}
