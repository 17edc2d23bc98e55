// stats_json_test.cpp
// Goal:   /v1/stats lists what the contract says, in its order, with sums that agree and averages to one decimal place.
// Method: whole pages to the letter for small fleets; rows for averages; a page after page while threads record.
#include "nexus/metrics/stats_json.h"

#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <thread>

using namespace nexus;

namespace {

// What a process that was never configured says of itself, at the end of the page.
const std::string kProcess =
    R"("version":"","configuration":{"loaded":"1970-01-01T00:00:00.000Z","last_reload_ok":true},"loop_stalls":0,)"
    R"("certificates":[],"failures":[]})"
    "\n";

// What is told of a backend besides the numbers.
std::string state_text(std::string_view state, int in_flight, bool registered = true) {
  return R"("cached_tokens":0,"state":")" + std::string(state) + R"(","why":"","in_flight":)" +
         std::to_string(in_flight) + R"(,"queued":0,"failed_attempts":{})" +
         (registered
              ? R"(,"url":"","type":"","max_pending":0,"state_seconds":0,"last_check_seconds":null,"next_check_seconds":null})"
              : "}");
}

struct World {
  Metrics metrics;
  ModelNames models{"unknown", 1000};
  BackendNames backends{"none", 1000};
  KeyNames keys{"none", 1000};
  FleetView fleet;

  BackendId register_backend(std::string_view name, bool healthy = true) {
    const BackendId id = backends.intern(name);
    fleet.backends.push_back({id, healthy});
    return id;
  }
  std::string text() const {
    TextBuffer page;
    write_stats(page, collect_stats(metrics, fleet, models, backends, keys));
    return std::string(page.text());
  }
};

RequestRecord served(ModelId model, BackendId backend, Ns duration_ns) {
  return {.model = model, .backend = backend, .status = 200, .reached_backend = true, .duration_ns = duration_ns};
}

// The integer after `"key":` in the page.
std::uint64_t number_after(const std::string& page, std::string_view key) {
  const std::size_t at = page.find("\"" + std::string(key) + "\":");
  REQUIRE(at != std::string::npos);
  return std::strtoull(page.c_str() + at + key.size() + 3, nullptr, 10);
}

}  // namespace

TEST_SUITE("US1 T005c T017 the page at /v1/stats") {
  TEST_CASE("an idle daemon without backends") {
    World world;
    world.metrics.add_slab();
    world.fleet.uptime_ns = 61 * kSecond + 999 * kMillisecond;
    CHECK(world.text() ==
          R"({"uptime_seconds":61,"requests":{"total":0,"success":0,"errors":0},"backends":[],"models":[],)" +
              kProcess);
  }

  TEST_CASE("requests of two threads are written to the letter") {
    World world;
    Slab& a = world.metrics.add_slab();
    Slab& b = world.metrics.add_slab();
    const ModelId model = world.models.intern("llama3:70b");
    const BackendId backend = world.register_backend("ollama-local:11434");
    RequestRecord r = served(model, backend, 1'500 * kMillisecond);
    r.prompt_tokens = 10;
    r.completion_tokens = 20;
    a.record(r);
    b.record(served(model, backend, 1'000'300 * kMicrosecond));
    b.record({.status = 404, .error = ErrorType::no_backend});
    b.add_in_flight(backend, 2);
    CHECK(world.text() ==
          R"({"uptime_seconds":0,"requests":{"total":3,"success":2,"errors":1},)"
          R"("backends":[{"id":"ollama-local:11434","requests":2,"average_latency_ms":1250.2,"pending":2,)"
          R"("healthy":true,"ejected":null,"errors":0,"prompt_tokens":10,"completion_tokens":20,)" +
              state_text("up", 2) +
              R"(],)"
              R"("models":[{"name":"llama3:70b","requests":2,"average_duration_ms":1250.2,)"
              R"("errors":0,"prompt_tokens":10,"completion_tokens":20},)"
              R"({"name":"unknown","requests":1,"average_duration_ms":0.0,)"
              R"("errors":1,"prompt_tokens":0,"completion_tokens":0}],)" +
              kProcess);
  }

  TEST_CASE("an ejected backend says why, and for how many seconds more, rounded up") {
    World world;
    world.register_backend("a");
    world.register_backend("b");
    world.fleet.backends[0].ejected_ns = 4 * kSecond + 1;
    world.fleet.backends[0].ejected_why = AttemptOutcome::connect_error;
    world.fleet.backends[1].ejected_ns = 0;  // its trial request is running
    world.fleet.backends[1].ejected_why = AttemptOutcome::timeout;
    const std::string page = world.text();
    CHECK(page.find(R"("ejected":{"why":"connect_error","seconds_left":5})") != std::string::npos);
    CHECK(page.find(R"("ejected":{"why":"timeout","seconds_left":0})") != std::string::npos);
  }

  TEST_CASE("T021 a stream that broke after its 200 is an error, a whole 2xx a success") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const ModelId model = world.models.intern("m");
    const BackendId backend = world.register_backend("b");
    RequestRecord r = served(model, backend, 1);
    slab.record(r);
    r.status = 201;
    slab.record(r);
    r.status = 200;
    r.error = ErrorType::backend_error;
    slab.record(r);
    r.status = 301;
    r.error = ErrorType::none;
    slab.record(r);
    CHECK(world.text().find(R"("requests":{"total":4,"success":2,"errors":2})") != std::string::npos);
  }

  TEST_CASE("keys are listed by their requests once there are some, with the mean of the waits in the queue") {
    World world;
    Slab& slab = world.metrics.add_slab();
    for (const char* name : {"other", "alice", "bob", "idle"}) world.keys.intern(name);
    const BackendId backend = world.register_backend("b");
    RequestRecord r = served(world.models.intern("m"), backend, 1);
    r.key = world.keys.find("alice");
    r.completion_tokens = 5;
    slab.record(r);
    slab.record(r);
    slab.key_cells(world.keys.find("bob")).pending.add(1);
    slab.key_cells(r.key).queue_waits.add(2);
    slab.key_cells(r.key).queue_wait_ns.add(2'500'500 * kMicrosecond);
    const std::string page = world.text();
    CHECK(page.substr(page.find(R"("keys")")) ==
          R"("keys":[{"name":"alice","requests":2,"errors":0,"pending":0,"prompt_tokens":0,"completion_tokens":10,)"
          R"("queued":2,"average_queue_wait_ms":1250.3,"cached_tokens":0},)"
          R"({"name":"bob","requests":0,"errors":0,"pending":1,"prompt_tokens":0,"completion_tokens":0,)"
          R"("queued":0,"average_queue_wait_ms":0.0,"cached_tokens":0}],)" +
              kProcess);
  }

  TEST_CASE("names are escaped for JSON, not sanitised") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const BackendId backend = world.register_backend("a\"b\\c\nd\xFF");
    slab.record(served(world.models.intern("模型/x"), backend, 1));
    const std::string page = world.text();
    CHECK(page.find("{\"id\":\"a\\\"b\\\\c\\nd\xEF\xBF\xBD\",") != std::string::npos);
    CHECK(page.find("{\"name\":\"模型/x\",") != std::string::npos);
  }

  TEST_CASE("a model that is called like the catch-all is one entry with it") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const BackendId backend = world.register_backend("b");
    slab.record(served(world.models.intern("unknown"), backend, 1));
    slab.record({.status = 400, .error = ErrorType::other});
    const std::string page = world.text();
    CHECK(page.find(R"("models":[{"name":"unknown","requests":2,)") != std::string::npos);
    CHECK(page.find("unknown") == page.rfind("unknown"));
  }
}

TEST_SUITE("US2 T033 averages") {
  TEST_CASE("an average has one decimal place, rounded half up, and is 0.0 at none") {
    struct Row {
      std::uint64_t sum_ns, count, tenths;
    };
    const Row rows[] = {
        {0, 0, 0},
        {0, 5, 0},
        {49'999, 1, 0},
        {50'000, 1, 1},
        {149'999, 1, 1},
        {150'000, 1, 2},
        {1'000'000, 1, 10},
        {1'000'000, 3, 3},
        {2'000'000, 3, 7},
        {18'446'744'073'709'551'615u, 1, 184'467'440'737'096},
        {18'446'744'073'709'551'615u, 1'000'000'000, 184'467},
    };
    for (const Row& row : rows) {
      CAPTURE(row.sum_ns);
      CAPTURE(row.count);
      CHECK(detail::average_tenths_of_ms(row.sum_ns, row.count) == row.tenths);
    }
  }

  TEST_CASE("a request that reached no backend is in no average") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const ModelId model = world.models.intern("m");
    const BackendId backend = world.register_backend("b");
    slab.record(served(model, backend, 100 * kMillisecond));
    RequestRecord r = served(model, backend, 900 * kMillisecond);
    r.reached_backend = false;
    slab.record(r);
    const std::string page = world.text();
    CHECK(page.find(R"("id":"b","requests":2,"average_latency_ms":100.0,)") != std::string::npos);
    CHECK(page.find(R"("name":"m","requests":2,"average_duration_ms":100.0,)") != std::string::npos);
  }
}

TEST_SUITE("US4 T054 T060 T061 the breakdown") {
  TEST_CASE("backends are sorted by id: every registered one, also at zero; those that were removed stand apart") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const ModelId model = world.models.intern("m");
    world.register_backend("zeta");
    const BackendId removed = world.register_backend("mid");
    world.register_backend("alpha", false);
    world.backends.intern("never registered, never used");
    slab.record(served(model, removed, kMillisecond));
    slab.record({.model = model, .status = 503, .error = ErrorType::no_healthy_backend});
    std::erase_if(world.fleet.backends, [&](const auto& b) { return b.id == removed; });
    CHECK(world.text().find(
              R"("backends":[{"id":"alpha","requests":0,"average_latency_ms":0.0,"pending":0,"healthy":false,)"
              R"("ejected":null,"errors":0,"prompt_tokens":0,"completion_tokens":0,)" +
              state_text("down", 0) +
              R"(,{"id":"zeta","requests":0,"average_latency_ms":0.0,"pending":0,"healthy":true,)"
              R"("ejected":null,"errors":0,"prompt_tokens":0,"completion_tokens":0,)" +
              state_text("up", 0) + "],") != std::string::npos);
    CHECK(world.text().find(
              R"("removed_backends":[{"id":"mid","requests":1,"average_latency_ms":1.0,"pending":0,"healthy":false,)"
              R"("ejected":null,"errors":0,"prompt_tokens":0,"completion_tokens":0,)" +
              state_text("removed", 0, false) + "]") != std::string::npos);
    // One that was removed stands among the others until its last request has ended.
    slab.add_in_flight(removed, 1);
    CHECK(world.text().find(R"({"id":"mid","requests":1,"average_latency_ms":1.0,"pending":1,)") <
          world.text().find(R"({"id":"zeta")"));
    CHECK(world.text().find("removed_backends") == std::string::npos);
    CHECK(world.text().find(R"("state":"draining")") != std::string::npos);
  }

  TEST_CASE(
      "a backend says its state, since when, why, and what failed there; the last failures are listed, newest first") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const BackendId id = world.register_backend("gpu", false);
    FleetView::Backend& view = world.fleet.backends[0];
    view.problem = "connect: refused";
    view.url = "http://10.0.0.7:8000";
    view.type = "vllm";
    view.max_pending = 16;
    view.state_ns = 185 * kSecond;
    view.checked_ns = 4 * kSecond;
    view.next_check_ns = 26 * kSecond;
    slab.attempt(id, AttemptOutcome::connect_error);
    slab.attempt(id, AttemptOutcome::connect_error);
    slab.attempt(id, AttemptOutcome::ok);
    for (int i = 0; i < 25; ++i) {
      world.metrics.failures().note(i * kSecond, 502, "backend_error", i == 24 ? BackendId::none : id,
                                    std::string(100, 'm'), "id-" + std::to_string(i));
    }
    const std::string page = world.text();
    CHECK(
        page.find(
            R"("state":"down","why":"connect: refused","in_flight":0,"queued":0,"failed_attempts":{"connect_error":2},)"
            R"("url":"http://10.0.0.7:8000","type":"vllm","max_pending":16,"state_seconds":185,)"
            R"("last_check_seconds":4,"next_check_seconds":26})") != std::string::npos);
    CHECK(page.find(R"("failures":[{"time":"1970-01-01T00:00:24.000Z","model":")" + std::string(64, 'm') +
                    R"(","backend":"","status":502,"error_type":"backend_error","request_id":"id-24"},)"
                    R"({"time":"1970-01-01T00:00:23.000Z")") != std::string::npos);
    CHECK(page.find("id-5\"}]}") != std::string::npos);  // the oldest of twenty
    view.checked = false;
    CHECK(world.text().find(R"("state":"unchecked")") != std::string::npos);
    view.checked = view.healthy = true;
    view.ejected_ns = kSecond;
    view.ejected_why = AttemptOutcome::timeout;
    CHECK(world.text().find(R"("state":"ejected","why":"its requests fail (timeout): )") != std::string::npos);
  }

  TEST_CASE("models are sorted by requests, most first, then by name: every one on a healthy backend or ever counted") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const BackendId backend = world.register_backend("b");
    const ModelId a = world.models.intern("a"), z = world.models.intern("z"), busy = world.models.intern("busy");
    const ModelId idle = world.models.intern("idle");
    world.models.intern("on no healthy backend");
    world.fleet.models_on_healthy = {idle, busy};
    for (const ModelId model : {z, a, busy, busy}) slab.record(served(model, backend, 1));
    const std::string page = world.text();
    std::string order;
    for (std::size_t at = page.find("\"name\":\""); at != std::string::npos; at = page.find("\"name\":\"", at + 1)) {
      order += page.substr(at + 8, page.find('"', at + 8) - at - 8) + " ";
    }
    CHECK(order == "busy a z idle ");
  }
}

TEST_SUITE("US1 T074 stats while recording") {
  TEST_CASE("success and errors make up the total in every page while a thread records, and nothing goes back") {
    World world;
    Slab& slab = world.metrics.add_slab();
    constexpr int kRecords = 200'000;
    for (int i = 0; i < 8; ++i) world.models.intern("m" + std::to_string(i));
    world.register_backend("b");
    std::atomic<bool> done{false};
    std::thread writer([&] {
      for (int i = 0; i < kRecords; ++i) {
        RequestRecord r = served(ModelId{1 + static_cast<std::uint32_t>(i) * 8 / kRecords}, BackendId{1}, 1);
        if (i % 4 == 0) r.error = ErrorType::backend_error;
        slab.record(r);
      }
      done = true;
    });
    std::uint64_t last_success = 0, last_errors = 0;
    bool last = false;
    do {
      last = done;
      const std::string page = world.text();
      const std::uint64_t success = number_after(page, "success"), errors = number_after(page, "errors");
      REQUIRE(number_after(page, "total") == success + errors);
      REQUIRE(success >= last_success);
      REQUIRE(errors >= last_errors);
      last_success = success;
      last_errors = errors;
    } while (!last);
    writer.join();
    CHECK(last_success == kRecords * 3 / 4);
    CHECK(last_errors == kRecords / 4);
  }
}
