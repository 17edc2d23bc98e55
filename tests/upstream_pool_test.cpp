// upstream_pool_test.cpp
// Goal:   which connections to backends are kept, for how long, and which one the next request gets; the counts.
// Method: the pool alone on the scripted network. The far ends are numbered in the order of their connections.
#include <doctest/doctest.h>

#include <cerrno>
#include <cstddef>
#include <string_view>
#include <vector>

#include "tests/lib/pool_stage.h"

using namespace nexus;
using sim::PoolStage;
using Ends = std::vector<std::size_t>;

namespace {

// Bytes that nobody asked for, or an end, come on the connection that was made second.
void say_unasked(PoolStage& stage, bool by_bytes) {
  sim::Peer& peer = stage.script.peers[1];
  by_bytes ? stage.script.send(peer, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") : stage.script.finish(peer);
  stage.script.deliver();
}

}  // namespace

TEST_CASE("the most recently used connection is taken first, and it is the reused one") {
  PoolStage stage;
  stage.keep(3);
  std::vector<Upstream<sim::SimNet>*> taken;
  for (int i = 0; i < 3; ++i) taken.push_back(stage.take());
  for (std::size_t i = 0; i < 3; ++i) {
    REQUIRE(taken[i] != nullptr);
    CHECK(taken[i]->connection.write(stage.net, stage.context.blocks, "x"));
    CHECK(taken[i]->reused);
    CHECK(taken[i]->owner == PoolStage::owner());
    stage.settle();
    CHECK(stage.script.peers[2 - i].received == "x");
  }
  CHECK(stage.take() == nullptr);
  stage.pool.give_back(*taken[2]);
  stage.pool.give_back(*taken[0]);
  CHECK(stage.take() == taken[0]);
}

TEST_CASE("idle_connections bounds each backend for itself: none, one below, at and above it") {
  for (const std::uint32_t most : {0u, 1u, 3u}) {
    for (const std::uint32_t used : {1u, 2u, 3u, 4u}) {
      CAPTURE(most);
      CAPTURE(used);
      PoolStage stage(2, most);
      stage.keep(used, 0);
      stage.keep(used, 1);
      const std::uint32_t kept = std::min(most, used);
      CHECK(stage.pool.open() == 2 * kept);
      CHECK(stage.open_ends().size() == 2 * kept);
      CHECK(stage.counted(0) == kept);
      CHECK(stage.counted(1) == kept);
    }
  }
}

TEST_CASE("places in the bound are free again when a connection is taken, closed by its peer or has expired") {
  PoolStage stage(1, 1);
  for (int round = 0; round < 3; ++round) {
    stage.keep(1);
    REQUIRE(stage.pool.open() == 1);
    if (round == 0) stage.pool.drop(*stage.take());
    if (round == 1) stage.script.finish(stage.script.peers.back());
    if (round == 2) stage.pass(PoolStage::kIdleTime + kSecond);
    stage.settle();
    CHECK(stage.pool.open() == 0);
    CHECK(stage.counted() == 0);
  }
  stage.keep(1);
  CHECK(stage.pool.open() == 1);
}

TEST_CASE("without a bound all are kept for idle_timeout since their last use, and those in use for longer") {
  PoolStage stage;
  stage.keep(40);
  CHECK(stage.counted() == 40);
  stage.pass(PoolStage::kIdleTime - kSecond);
  CHECK(stage.counted() == 40);
  Upstream<sim::SimNet>* again = stage.take();
  Upstream<sim::SimNet>* in_use = stage.take();
  REQUIRE(again != nullptr);
  REQUIRE(in_use != nullptr);
  stage.pool.give_back(*again);
  stage.pass(2 * kSecond);
  CHECK(stage.open_ends() == Ends{38, 39});
  CHECK(stage.counted() == 2);
  stage.pass(PoolStage::kIdleTime);
  CHECK(stage.open_ends() == Ends{38});
  stage.pool.give_back(*in_use);
  stage.pass(PoolStage::kIdleTime + kSecond);
  CHECK(stage.open_ends().empty());
  CHECK(stage.counted() == 0);
}

TEST_CASE("an idle connection on which anything comes is closed at once") {
  for (const std::string_view bytes : {"", "Z", "HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"}) {
    for (const bool by_reset : {false, true}) {
      CAPTURE(bytes);
      CAPTURE(by_reset);
      PoolStage stage;
      stage.keep(2);
      sim::Peer& newest = stage.script.peers[1];
      stage.script.send(newest, bytes);
      if (bytes.empty() && by_reset) stage.script.break_off(newest);
      if (bytes.empty() && !by_reset) stage.script.finish(newest);
      stage.settle();
      CHECK(stage.open_ends() == Ends{0});
      CHECK(stage.counted() == 1);
    }
  }
}

TEST_CASE("a connection whose event was not fetched yet is not taken, but closed, and the next one is taken") {
  for (const bool by_bytes : {true, false}) {
    CAPTURE(by_bytes);
    PoolStage stage;
    stage.keep(2);
    say_unasked(stage, by_bytes);  // it is in the socket, and the loop has not waited
    Upstream<sim::SimNet>* taken = stage.take();
    REQUIRE(taken != nullptr);
    CHECK(stage.open_ends() == Ends{0});
    CHECK(stage.counted() == 1);
    CHECK(stage.take() == nullptr);
    stage.pool.drop(*taken);
  }
}

TEST_CASE("a connection of which the last wait has told something is not taken, also before its event is handled") {
  for (const bool by_bytes : {true, false}) {
    for (const bool fresh : {true, false}) {
      CAPTURE(by_bytes);
      CAPTURE(fresh);
      PoolStage stage;
      stage.keep(2);
      say_unasked(stage, by_bytes);
      stage.note_events();
      stage.context.events_fresh = fresh;
      Upstream<sim::SimNet>* taken = stage.take();
      REQUIRE(taken != nullptr);
      CHECK(stage.open_ends() == Ends{0});
      stage.pool.drop(*taken);
    }
  }
}

TEST_CASE(
    "while the events of a wait are fresh, a connection of which it told nothing is taken without a system call") {
  PoolStage stage;
  stage.keep(1);
  stage.note_events();
  stage.context.events_fresh = true;
  stage.script.send(stage.script.peers[0], "x");
  stage.script.deliver();  // behind the wait: nobody looks
  Upstream<sim::SimNet>* taken = stage.take();
  REQUIRE(taken != nullptr);
  CHECK(stage.open_ends() == Ends{0});
  stage.pool.drop(*taken);
}

TEST_CASE("a connection that has unread bytes or its end behind an answer is not kept") {
  for (const bool by_bytes : {true, false}) {
    PoolStage stage;
    Upstream<sim::SimNet>& used = stage.open();
    if (by_bytes) {
      stage.script.send(stage.script.peers[0], "behind");
    } else {
      stage.script.finish(stage.script.peers[0]);
    }
    stage.settle();
    stage.pool.give_back(used);
    CHECK(stage.pool.open() == 0);
    CHECK(stage.counted() == 0);
  }
}

TEST_CASE("a connection to another backend, or to an address that the backend had before, is not taken") {
  PoolStage stage(2);
  stage.keep(1, 0);
  CHECK(stage.take(1) == nullptr);
  CHECK(stage.counted(0) == 1);
  CHECK(stage.pool.take_idle(PoolStage::id(0), PoolStage::address(5), PoolStage::owner()) == nullptr);
  CHECK(stage.counted(0) == 0);
  CHECK(stage.pool.take_idle(PoolStage::id(9), PoolStage::address(9), PoolStage::owner()) == nullptr);
}

TEST_CASE(
    "a reload closes the idle connections of a backend that it removes, and those in use when they are given back") {
  PoolStage stage(2);
  stage.keep(2, 0);
  stage.keep(2, 1);
  Upstream<sim::SimNet>* removed = stage.take(0);
  Upstream<sim::SimNet>* stays = stage.take(1);
  stage.reload(2, kAutomatic, 1);
  stage.settle();
  CHECK(stage.counted(0) == 1);
  CHECK(stage.counted(1) == 2);
  stage.pool.give_back(*removed);
  stage.pool.give_back(*stays);
  stage.settle();
  CHECK(stage.counted(0) == 0);
  CHECK(stage.counted(1) == 2);
  CHECK(stage.open_ends() == Ends{2, 3});
}

TEST_CASE("after a reload that shrinks the pool none is kept above the bound, and the others end by idle_timeout") {
  PoolStage stage;
  stage.keep(4);
  Upstream<sim::SimNet>* used = stage.take();
  stage.reload(1, 2);
  stage.pool.give_back(*used);
  CHECK(stage.counted() == 3);
  for (int round = 0; round < 3; ++round) {
    Upstream<sim::SimNet>* first = stage.take();
    Upstream<sim::SimNet>* second = stage.take();
    if (first != nullptr) stage.pool.give_back(*first);
    if (second != nullptr) stage.pool.give_back(*second);
  }
  CHECK(stage.counted() <= 3);
  stage.pass(PoolStage::kIdleTime + kSecond);
  CHECK(stage.counted() == 0);
  stage.keep(4);
  CHECK(stage.counted() == 2);
}

TEST_CASE("while the worker drains no connection is kept") {
  PoolStage stage;
  Upstream<sim::SimNet>& used = stage.open();
  stage.context.draining = true;
  stage.pool.give_back(used);
  CHECK(stage.counted() == 0);
}

TEST_CASE("a connect() that fails leaves nothing; without a descriptor idle connections of the fullest backend go") {
  for (const int error : {EMFILE, ENOMEM, EADDRNOTAVAIL, ECONNREFUSED}) {
    CAPTURE(error);
    PoolStage stage(2);
    stage.keep(kShedAtOnce + 2, 0);
    stage.keep(1, 1);
    stage.script.wire.connect_error = error;
    Upstream<sim::SimNet>* made = nullptr;
    CHECK(stage.pool.connect(PoolStage::id(1), PoolStage::address(1), PoolStage::owner(), made) != SocketOutcome::ok);
    CHECK(made == nullptr);
    const bool sheds = error == EMFILE;
    CHECK(stage.counted(0) == (sheds ? 2 : kShedAtOnce + 2));
    CHECK(stage.counted(1) == 1);
    CHECK(stage.pool.open() == static_cast<std::size_t>(stage.counted(0) + stage.counted(1)));
  }
}

TEST_CASE("an idle connection gives its descriptor to a new one where there is none left") {
  PoolStage stage(2);
  stage.keep(1, 0);
  stage.script.wire.most_descriptors = stage.script.wire.descriptors();
  stage.open(1);
  CHECK(stage.counted(0) == 0);
  CHECK(stage.counted(1) == 1);
}
