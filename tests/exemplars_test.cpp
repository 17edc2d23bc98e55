// exemplars_test.cpp
// Goal:   an exemplar is of one sampled request that is counted in its bucket, and no other request leaves one.
// Method: slots and slabs alone, with a writer beside the reader; then requests through a gateway with simulated time.
#include "nexus/metrics/exemplars.h"

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "nexus/metrics/prometheus.h"
#include "tests/lib/courses.h"

using namespace courses;

namespace {

const std::string kTrace = "0af7651916cd43dd8448eb211c80319c", kOther = "4bf92f3577b34da6a3ce929d0e0e4736";

RequestRecord sampled(ModelId model, BackendId backend, const TraceMark& mark, Ns duration_ns) {
  return {.model = model,
          .backend = backend,
          .status = 200,
          .reached_backend = true,
          .duration_ns = duration_ns,
          .is_noted = true,
          .trace = &mark};
}

// The lines of a page that have an exemplar.
Lines marked(const std::string& page) {
  Lines all = lines_of(page);
  std::erase_if(all, [](const std::string& line) { return line.find(" # {") == std::string::npos; });
  return all;
}

struct Page {
  Metrics metrics;
  ModelNames models{"unknown", 100};
  BackendNames backends{"none", 100};
  KeyNames keys{"none", 100};
  FleetView fleet;
  PrometheusPage page;

  std::string text(MetricsFormat format) {
    return std::string(
        page.render(metrics, fleet, ProcessStats{}, models, backends, keys, LabelMode::sanitize, format));
  }
};

}  // namespace

TEST_CASE("an exemplar is read whole or not at all while it is written") {
  ExemplarSlot slot;
  CHECK_FALSE(slot.get());
  std::atomic<bool> done{false};
  std::thread writer([&] {
    for (std::uint64_t i = 1; i <= 200'000; ++i) {
      slot.put({{{i, i}, static_cast<Ns>(i)}, static_cast<std::int64_t>(i)});
    }
    done = true;
  });
  std::uint64_t last = 0, torn = 0, back = 0;
  while (!done) {
    const auto seen = slot.get();
    if (!seen) continue;
    const auto& [trace, value] = *seen;
    const auto number = static_cast<std::uint64_t>(value);
    torn += trace.id.high != number || trace.id.low != number || static_cast<std::uint64_t>(trace.wall_ns) != number;
    back += number < last;
    last = number;
  }
  writer.join();
  CHECK(torn == 0);
  CHECK(back == 0);
  REQUIRE(slot.get());
  CHECK(slot.get()->value == 200'000);
}

TEST_CASE("a bucket shows the newest exemplar of all threads and of all names with its label, and 0.0.4 none") {
  Page page;
  Slab* slabs[] = {&page.metrics.add_slab(), &page.metrics.add_slab()};
  const BackendId backend = page.backends.intern("b");
  const ModelId dash = page.models.intern("gpt-4"), underscore = page.models.intern("gpt_4");
  const TraceMark old{trace_number(kTrace), 1'700'000'000 * kSecond};
  const TraceMark newer{trace_number(kOther), 1'700'000'001 * kSecond + 234'567'891};
  slabs[0]->record(sampled(dash, backend, newer, 1'500 * kMillisecond));
  slabs[1]->record(sampled(underscore, backend, old, 2 * kSecond));
  slabs[1]->record(sampled(dash, backend, old, 100 * kMillisecond));
  RequestRecord stream = sampled(dash, backend, old, 700 * kSecond);
  stream.stream = true;
  stream.first_byte_ns = 7 * kMillisecond;
  slabs[0]->record(stream);

  CHECK(marked(page.text(MetricsFormat::text)).empty());
  const std::string pair = R"({model="gpt_4",backend="b",le=")", old_one = " # {trace_id=\"" + kTrace + "\"} ";
  const std::string duration = "nexus_request_duration_seconds_bucket" + pair;
  CHECK(marked(page.text(MetricsFormat::openmetrics)) ==
        Lines{duration + "0.1\"} 1" + old_one + "0.1 1700000000",
              duration + "2.5\"} 3 # {trace_id=\"" + kOther + "\"} 1.5 1700000001.234",
              duration + "+Inf\"} 4" + old_one + "700 1700000000",
              "nexus_time_to_first_token_seconds_bucket" + pair + "0.01\"} 1" + old_one + "0.007 1700000000"});
}

TEST_CASE("no page shows an exemplar in a bucket that has not counted it") {
  Page page;
  Slab& slab = page.metrics.add_slab();
  const ModelId model = page.models.intern("m");
  const BackendId backend = page.backends.intern("b");
  std::atomic<bool> done{false};
  std::thread recorder([&] {
    constexpr Ns kSpans[] = {50 * kMillisecond, 300 * kMillisecond, 3 * kSecond, 40 * kSecond};
    TraceMark mark{trace_number(kTrace), kSecond};
    for (int i = 0; i < 4; ++i) {
      mark.wall_ns += kSecond;
      slab.record(sampled(model, backend, mark, kSpans[i]));
      std::this_thread::yield();
    }
    done = true;
  });
  std::size_t empty = 0;
  while (!done) {
    std::uint64_t before = 0;
    for (const std::string& line : lines_of(page.text(MetricsFormat::openmetrics))) {
      if (!line.starts_with("nexus_request_duration_seconds_bucket")) continue;
      const std::uint64_t count = std::stoull(line.substr(line.find("} ") + 2));
      empty += line.find(" # {") != std::string::npos && count == before;
      before = count;
    }
  }
  recorder.join();
  CHECK(empty == 0);
  CHECK(marked(page.text(MetricsFormat::openmetrics)).size() == 4);
}

TEST_CASE("a request leaves an exemplar if its trace is valid and sampled, and OpenMetrics is on") {
  const std::string id = kTrace;
  const std::string with = "00-" + id + "-00f067aa0ba902b7-";
  const std::vector<std::pair<std::string, bool>> rows{
      {with + "01", true},
      {with + "03", true},
      {with + "ff", true},
      {with + "00", false},
      {with + "02", false},
      {with + "0g", false},
      {with + "0", false},
      {"01-" + id + "-00f067aa0ba902b7-01-more", true},
      {"00-" + std::string(32, '0') + "-00f067aa0ba902b7-01", false},
      {"00-" + std::string(31, 'a') + "G-00f067aa0ba902b7-01", false},
      {"00-" + id + "-00f067aa0ba902b7x01", false},
      {"", false},
  };
  for (const bool on : {true, false}) {
    for (const auto& [traceparent, sampled] : rows) {
      CAPTURE(traceparent);
      CAPTURE(on);
      const auto rings = std::make_unique<sim::LogRings>();
      Scene scene(*rings, [on](Settings& settings) {
        settings.metrics.openmetrics = on;
        settings.log.access = "off";
      });
      Peer& scraper = scene.connect();
      Peer& client = scene.connect();
      scene.say(client, ask(sim::kAskStream, kFree + "Traceparent: " + traceparent + "\r\n"));
      scene.say_after(20 * kMillisecond, 1, "HTTP/1.1 200 OK\r\n" + kChunks + kToken);
      scene.say_after(400 * kMillisecond, 1, kLast + kDone);
      scene.say(client, ask(sim::kAsk));  // and one without a trace behind it
      scene.say_after(2 * kSecond, 1, answer(kUsage));
      scene.say(scraper, "GET /metrics" + kHost + kFree + "Accept: application/openmetrics-text\r\n\r\n");
      const Lines lines = marked(scraper.received);
      if (!on || !sampled) {
        CHECK(lines.empty());
        continue;
      }
      REQUIRE(lines.size() == 2);
      CHECK(lines[0].starts_with(
          R"(nexus_request_duration_seconds_bucket{model="m",backend="b1",le="0.5"} 1 # {trace_id=")" + id +
          "\"} 0.42 "));
      CHECK(lines[1].starts_with(
          R"(nexus_time_to_first_token_seconds_bucket{model="m",backend="b1",le="0.02"} 1 # {trace_id=")" + id +
          "\"} 0.02 "));
    }
  }
}
