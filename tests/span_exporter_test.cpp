// span_exporter_test.cpp
// Goal:   spans are sent when it is time, again only when that can't double them, and each is counted once.
// Method: a collector on a simulated network that does what it is told; the clock moves when the test says so.
#include "nexus/server/span_exporter.h"

#include <doctest/doctest.h>

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/config/values.h"
#include "tests/lib/script.h"

using namespace nexus;
using sim::SimNet;

namespace {

struct Exporting {
  explicit Exporting(const std::string& host = "10.0.0.9") {
    script.wire.on_ready = [this](std::uint32_t, sim::LinkId link) { net.make_ready(link); };
    script.wire.on_lookup = [this](std::uint64_t, const std::string&, std::uint16_t port) {
      lookups += 1;
      sim::Looked looked;
      if (resolves) looked.addresses = {*parse_address("10.0.0.8", port)};
      if (!resolves) looked.error = "no such host";
      return looked;
    };
    script.wire.on_looked_up = [](std::uint64_t, const sim::Looked&) {};
    settings.collector = {host, 4318};
    exporter.configure(settings);
  }

  void make(std::size_t spans) {
    for (std::size_t i = 0; i < spans; ++i) {
      if (!queue.push([&](SpanRecord& span) { span.span_id = ++made; })) slab.spans_dropped(SpanLoss::queue_full, 1);
    }
  }

  auto done() {
    return [this](ProbeResult&& result) { exporter.on_result(std::move(result), net.now()); };
  }

  void turn() {
    std::array<Event, SimNet::kMaxEvents> events;
    bool woken = false;
    script.deliver();
    const std::size_t count = net.wait(events, net.now(), woken);
    for (std::size_t i = 0; i < count; ++i) prober.on_event(events[i], net.now(), done());
    resolver.step();
    wheel.fire(net.now(), [&](Handle token) { prober.on_deadline(token, net.now(), done()); });
    exporter.step(net.now(), done());
    script.deliver();
  }
  void settle() {
    for (int i = 0; i < 20; ++i) turn();
  }
  void pass(Ns span) {
    script.wire.advance(net.now() + span);
    settle();
  }

  // The requests that the collector has got so far.
  std::size_t posts() const {
    std::size_t count = 0;
    for (const sim::Peer& peer : script.peers) count += peer.received.starts_with("POST ") ? 1 : 0;
    return count;
  }
  void answer(const std::string& head, const std::string& body = "") {
    script.send(script.peers.back(),
                "HTTP/1.1 " + head + "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body);
    settle();
  }

  // The lines that were logged since the last call.
  std::vector<std::string> lines() {
    std::string text;
    ring.events.take(text);
    std::vector<std::string> out;
    for (std::string_view rest = text; !rest.empty();) out.emplace_back(config::take_line(rest));
    return out;
  }

  std::uint64_t exported() const { return slab.thread().spans_exported.read(); }
  std::uint64_t dropped(SpanLoss why) const {
    return slab.thread().spans_dropped[static_cast<std::size_t>(why)].read();
  }

  sim::Script script;
  bool resolves = true;
  int lookups = 0;
  std::uint64_t made = 0;
  SimNet net{script.wire, 0};
  TimerWheel wheel{net.now()};
  BlockPool blocks;
  JsonReader json;
  LogRing ring;
  Log log{&ring};
  Slab slab;
  SpanQueue queue;
  Prober<SimNet> prober{net, wheel, blocks, json};
  SimNet::Resolver resolver{net,
                            [this](std::uint64_t id, const std::vector<Address>& addresses, const std::string& error) {
                              exporter.on_resolved(id, addresses, error, net.now());
                            }};
  SpanExporter<SimNet> exporter{net, prober, resolver, queue, slab, log, json, "nexus-1"};
  TraceSettings settings;
};

constexpr Ns kSoon = 10 * kMillisecond;

}  // namespace

TEST_CASE("what the collector refuses in part is read from its answer, and never more than it got") {
  struct Row {
    const char* answer;
    std::size_t refused;
  };
  JsonReader json;
  for (const Row& row : {Row{"", 0},
                         {"{}", 0},
                         {R"({"partialSuccess":{}})", 0},
                         {R"({"partialSuccess":{"rejectedSpans":"3"}})", 3},
                         {R"({"partialSuccess":{"errorMessage":"x","rejectedSpans":4}})", 4},
                         {R"({"partialSuccess":{"rejectedSpans":"0","errorMessage":"a hint"}})", 0},
                         {R"({"partialSuccess":{"rejectedSpans":"-1"}})", 0},
                         {R"({"partialSuccess":{"rejectedSpans":"999999999999999999999"}})", 0},
                         {R"({"partialSuccess":{"rejectedSpans":"11"}})", 10},
                         {R"({"partialSuccess":7})", 0},
                         {R"({"other":{"rejectedSpans":"3"}})", 0},
                         {"[1]", 0},
                         {R"({"partialSuccess":{"rejec)", 0},
                         {"\xff\xfe", 0}}) {
    CAPTURE(std::string(row.answer));
    CHECK(refused_spans(json, row.answer, 10) == row.refused);
  }
}

TEST_CASE("a span waits for others, but no longer than it may, and a full batch does not wait") {
  Exporting one;
  CHECK(one.exporter.next() == kNever);
  one.make(1);
  one.settle();
  CHECK(one.exporter.next() == one.net.now() + kExportInterval);
  one.pass(kExportInterval - kSoon);
  CHECK(one.posts() == 0);
  one.pass(kSoon);
  CHECK(one.posts() == 1);
  CHECK(one.script.peers[0].received.starts_with("POST /v1/traces HTTP/1.1\r\nHost: 10.0.0.9:4318\r\n"));
  one.answer("200 OK", "{}");
  CHECK(one.exported() == 1);
  one.make(kSpansPerExport);
  one.settle();
  CHECK(one.posts() == 2);
  one.answer("200 OK");
  CHECK(one.exported() == 1 + kSpansPerExport);
  CHECK(one.exporter.next() == kNever);
}

TEST_CASE("one request is on its way at a time, and what finds no room is lost") {
  Exporting one;
  one.make(kSpansPerExport);
  one.settle();
  one.make(kMaxSpansWaiting + 7);
  one.settle();
  CHECK(one.posts() == 1);
  CHECK(one.dropped(SpanLoss::queue_full) == 7);
  for (int i = 0; i < 4; ++i) one.answer("200 OK");
  CHECK(one.posts() == 5);
  one.answer("200 OK");
  CHECK(one.exported() == kSpansPerExport + kMaxSpansWaiting);
}

TEST_CASE("a busy collector gets the same batch again, after the time that it asks for, until patience ends") {
  Exporting one;
  one.make(kSpansPerExport);
  one.settle();
  const std::string first = one.script.peers.back().received;
  one.answer("429 No\r\nRetry-After: 7");
  one.pass(7 * kSecond - kSoon);
  CHECK(one.posts() == 1);
  one.pass(kSoon);
  REQUIRE(one.posts() == 2);
  CHECK(one.script.peers.back().received == first);
  for (int i = 0; i < 20 && one.dropped(SpanLoss::unanswered) == 0; ++i) {
    one.answer("503 No");
    one.pass(kMaxExportRetry);
  }
  CHECK(one.dropped(SpanLoss::unanswered) == kSpansPerExport);
  CHECK(one.exported() == 0);
  CHECK(one.posts() < 8);
}

TEST_CASE("a Retry-After is believed up to a limit") {
  Exporting one;
  one.make(kSpansPerExport);
  one.settle();
  one.answer("503 No\r\nRetry-After: 86400");
  one.pass(kMaxExportRetry);
  CHECK(one.posts() == 2);
}

TEST_CASE("what may have arrived is not sent again") {
  for (const char* head : {"400 No", "404 No", "500 No", "501 No"}) {
    CAPTURE(std::string(head));
    Exporting one;
    one.make(kSpansPerExport);
    one.settle();
    one.answer(head);
    one.pass(kExportPatience);
    CHECK(one.posts() == 1);
    CHECK(one.dropped(SpanLoss::refused) == kSpansPerExport);
  }
  Exporting silent;
  silent.make(kSpansPerExport);
  silent.settle();
  silent.pass(kExportTime + kSoon);
  silent.pass(kExportPatience);
  CHECK(silent.posts() == 1);
  CHECK(silent.dropped(SpanLoss::unanswered) == kSpansPerExport);
}

TEST_CASE("a collector that can't be reached gets the batch once it can") {
  Exporting one;
  one.script.fate = sim::ConnectFate::Kind::refused;
  one.make(kSpansPerExport);
  one.settle();
  CHECK(one.posts() == 0);
  one.pass(kExportRetry);
  one.script.fate = sim::ConnectFate::Kind::accepted;
  one.pass(2 * kExportRetry);
  CHECK(one.posts() == 1);
  one.answer("200 OK");
  CHECK(one.exported() == kSpansPerExport);
}

TEST_CASE("a name is looked up before the first batch, and again after a while") {
  Exporting one("otel.lan");
  CHECK(one.lookups == 0);
  one.resolves = false;
  one.make(kSpansPerExport);
  one.settle();
  CHECK(one.lookups == 1);
  CHECK(one.posts() == 0);
  one.resolves = true;
  one.pass(kExportRetry);
  CHECK(one.lookups == 2);
  REQUIRE(one.posts() == 1);
  CHECK(one.script.peers.back().received.find("\r\nHost: otel.lan:4318\r\n") != std::string::npos);
  one.answer("200 OK");
  one.make(kSpansPerExport);
  one.settle();
  CHECK(one.lookups == 2);
  one.answer("200 OK");
  one.pass(kResolveInterval);
  one.make(kSpansPerExport);
  one.settle();
  CHECK(one.lookups == 3);
  CHECK(one.posts() == 3);
}

TEST_CASE("a drain sends what waits at once, and ends with the first failure or its time") {
  Exporting well;
  well.make(3);
  well.settle();
  well.exporter.flush(well.net.now());
  well.settle();
  CHECK(well.exporter.is_flushing(well.net.now()));
  CHECK(well.posts() == 1);
  well.answer("200 OK");
  CHECK(well.exported() == 3);
  CHECK_FALSE(well.exporter.is_flushing(well.net.now()));

  Exporting ill;
  ill.script.fate = sim::ConnectFate::Kind::refused;
  ill.make(3);
  ill.exporter.flush(ill.net.now());
  ill.settle();
  CHECK_FALSE(ill.exporter.is_flushing(ill.net.now()));

  Exporting silent;
  silent.make(3);
  silent.exporter.flush(silent.net.now());
  silent.settle();
  CHECK(silent.exporter.is_flushing(silent.net.now()));
  CHECK(silent.exporter.next() <= silent.net.now() + kLastExportTime);
  silent.script.wire.advance(silent.net.now() + kLastExportTime);
  CHECK_FALSE(silent.exporter.is_flushing(silent.net.now()));

  Exporting idle;
  idle.exporter.flush(idle.net.now());
  CHECK_FALSE(idle.exporter.is_flushing(idle.net.now()));
}

TEST_CASE("without a collector what waits is dropped and counted, and another one gets what comes then") {
  Exporting one;
  one.make(5);
  one.settle();
  one.exporter.configure(TraceSettings());
  one.settle();
  CHECK(one.dropped(SpanLoss::unanswered) == 5);
  CHECK(one.exporter.next() == kNever);
  one.settings.collector = {"10.0.0.7", 4318};
  one.exporter.configure(one.settings);
  one.make(kSpansPerExport);
  one.settle();
  REQUIRE(one.posts() == 1);
  CHECK(one.script.peers.back().received.find("\r\nHost: 10.0.0.7:4318\r\n") != std::string::npos);
}

TEST_CASE("spans of requests that end after their collector is gone are dropped and counted, and reach no other one") {
  Exporting one;
  one.exporter.configure(TraceSettings());
  one.make(3);
  one.settle();
  CHECK(one.dropped(SpanLoss::unanswered) == 3);
  one.exporter.configure(one.settings);
  one.pass(kExportInterval);
  CHECK(one.posts() == 0);
}

TEST_CASE("a drain tries at once what waits for another try") {
  Exporting one;
  one.script.fate = sim::ConnectFate::Kind::refused;
  one.make(kSpansPerExport);
  for (int i = 0; i < 6; ++i) one.pass(4 * kSecond);
  one.script.fate = sim::ConnectFate::Kind::accepted;
  REQUIRE(one.posts() == 0);
  one.exporter.flush(one.net.now());
  CHECK(one.exporter.next() <= one.net.now());
  one.settle();
  REQUIRE(one.posts() == 1);
  one.answer("200 OK");
  CHECK(one.exported() == kSpansPerExport);
}

TEST_CASE("a drain goes on with the next batch after one that was refused in part") {
  Exporting one;
  one.make(kSpansPerExport + 3);
  one.settle();
  one.exporter.flush(one.net.now());
  one.answer("200 OK", R"({"partialSuccess":{"rejectedSpans":"1"}})");
  CHECK(one.exporter.is_flushing(one.net.now()));
  REQUIRE(one.posts() == 2);
  one.answer("200 OK");
  CHECK(one.exported() == kSpansPerExport + 2);
}

TEST_CASE("a collector that fails every other time costs two lines a minute, and another collector's failure is told") {
  Exporting one;
  for (int i = 0; i < 10; ++i) {
    one.make(kSpansPerExport);
    one.settle();
    one.answer("503 No");
    one.pass(kExportRetry);
    one.answer("200 OK");
    one.pass(kSecond);
  }
  CHECK(one.exported() == 10 * kSpansPerExport);
  CHECK(one.lines().size() == 2);
  one.pass(kLackLogInterval);
  one.make(kSpansPerExport);
  one.settle();
  one.answer("503 No");
  CHECK(one.lines().size() == 1);
  one.settings.collector = {"10.0.0.7", 4318};
  one.exporter.configure(one.settings);
  one.pass(kExportRetry);
  one.answer("503 No");
  const std::vector<std::string> lines = one.lines();
  REQUIRE(lines.size() == 1);
  CHECK(lines[0].find("10.0.0.7") != std::string::npos);
}
