// prometheus_test.cpp
// Goal:   the page at /metrics says what was recorded, in a form that no reader can refuse, whatever the names are and
//         whatever is being recorded meanwhile.
// Method: one whole page to the letter; each rule of the contract as a case; seeded hostile names and threads, every
// page
//         through a strict reader (exposition_parser.h) that shares no code with the writer.
#include "nexus/metrics/prometheus.h"

#include <doctest/doctest.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "nexus/fleet/admission.h"
#include "tests/lib/exposition_parser.h"
#include "tests/lib/hostile_names.h"

using namespace nexus;
using exposition::Labels;
using exposition::Reader;

namespace {

// A fleet and its metrics, as the control thread holds them.
struct World {
  Metrics metrics;
  ModelNames models{"unknown", 100'000};
  BackendNames backends{"none", 100'000};
  KeyNames keys{"none", 1000};
  FleetView fleet;
  ProcessStats process;
  LabelMode mode = LabelMode::sanitize;
  MetricsFormat format = MetricsFormat::text;
  PrometheusPage page;

  BackendId register_backend(std::string_view name, bool healthy = true) {
    const BackendId id = backends.intern(name);
    fleet.backends.push_back({id, healthy});
    return id;
  }
  std::string text() { return std::string(page.render(metrics, fleet, process, models, backends, keys, mode, format)); }
  Reader read() {
    Reader reader(text());
    CHECK_MESSAGE(reader.problems.empty(), exposition::joined(reader.problems));
    return reader;
  }
};

RequestRecord whole(ModelId model, BackendId backend, std::uint16_t status = 200) {
  return {.model = model, .backend = backend, .status = status, .reached_backend = true, .duration_ns = kSecond};
}

// Everything that a page can show has happened.
void fill(World& world) {
  static constexpr std::string_view kPaths[] = {"/v1/chat/completions", "/v1/embeddings"};
  Slab* slabs[] = {&world.metrics.add_slab(), &world.metrics.add_slab()};
  const ModelId models[] = {ModelId::unknown, world.models.intern("llama3:70b"), world.models.intern("gpt-4")};
  const BackendId backends[] = {world.register_backend("gpu-1"), world.register_backend("gpu 2", false)};
  const KeyId keys[] = {KeyId::none, world.keys.intern("other"), world.keys.intern("alice")};
  for (int i = 0; i < 60; ++i) {
    RequestRecord r = whole(models[i % 3], backends[i % 2], i % 7 == 0 ? 503 : 200);
    r.error = i % 7 == 0 ? ErrorType::backend_error : ErrorType::none;
    r.duration_ns = (i * i * 137 + 1) * kMillisecond;
    r.stream = i % 4 != 0;
    r.first_byte_ns = (i * i * 3 + 1) * kMillisecond;
    r.per_token_ns = (i * 70 + 1) * kMicrosecond;
    r.overhead_ns = (i * 900 + 1) * kMicrosecond / 100;
    r.prompt_tokens = i * i * 40;
    r.completion_tokens = i % 5 == 0 ? -1 : i * 20;
    r.cached_tokens = i * 10;
    r.endpoint = static_cast<std::uint8_t>(i % 2);
    r.fell_back = i % 9 == 0;
    r.fallback_to = models[2];
    r.without_usage = i % 5 == 0;
    r.without_end = i % 8 == 0;
    r.affinity = static_cast<AffinityOutcome>(i % 5);
    r.key = keys[i % 3];
    Slab& slab = *slabs[i % 2];
    slab.record(r);
    slab.attempt(r.backend, static_cast<AttemptOutcome>(i % 8));
    slab.health_check(r.backend, (i * 7 + 1) * kMillisecond);
    slab.add_in_flight(r.backend, 1);
    slab.queue_waits(r.model).observe((i * 50 + 1) * kMillisecond);
    slab.loop_stall((i * 20 + 1) * kMicrosecond);
    slab.limit_hit(static_cast<Limit>(i % 29));
    slab.http_rejected(static_cast<HttpRejection>(i % 5));
    slab.key_cells(r.key).queue_waits.add(1);
    slab.key_cells(r.key).queue_wait_ns.add(123'456'789);
  }
  world.fleet.backends[0].max_pending = 4;
  world.fleet.models_available = 2;
  world.fleet.queue_size = 100;
  world.fleet.endpoints = kPaths;
  world.fleet.version = "0.1.0";
  world.fleet.tls_library = "OpenSSL 3";
  world.fleet.last_reload_success_timestamp = 1'700'000'000.25;
  world.fleet.certificates = {{"gpu.example", 1'800'000'000}};
  world.process = {.cpu_ns = 1'230'000'000,
                   .resident_bytes = 4096,
                   .virtual_bytes = 1 << 20,
                   .open_fds = 9,
                   .max_fds = 1024,
                   .start_time_ns = 1'700'000'000'070'000'000,
                   .threads = 3};
}

struct FilledWorld : World {
  FilledWorld() { fill(*this); }
};

// From the head of a family to the head of the next.
std::string family_text(const std::string& page, const std::string& name) {
  const std::size_t begin = page.find("# HELP " + name + " ");
  if (begin == std::string::npos) return "absent";
  return page.substr(begin, page.find("# HELP ", begin + 1) - begin);
}

}  // namespace

TEST_SUITE("US1 T016 the page at /metrics") {
  TEST_CASE("every family of the contract stands there once, with its type") {
    World world;
    world.process = {.cpu_ns = 1,
                     .resident_bytes = 2,
                     .virtual_bytes = 3,
                     .open_fds = 4,
                     .max_fds = 5,
                     .start_time_ns = 6,
                     .threads = 7};
    std::string heads;
    const Reader page = world.read();
    for (const auto& family : page.families) heads += family.name + " " + family.type + "\n";
    CHECK(heads ==
          "nexus_requests_total counter\n"
          "nexus_errors_total counter\n"
          "nexus_queue_wait_seconds histogram\n"
          "nexus_fallbacks_total counter\n"
          "nexus_request_duration_seconds histogram\n"
          "nexus_time_to_first_token_seconds histogram\n"
          "nexus_time_per_output_token_seconds histogram\n"
          "nexus_tokens_total histogram\n"
          "nexus_prompt_tokens_cached_total counter\n"
          "nexus_endpoint_requests_total counter\n"
          "nexus_backends_total gauge\n"
          "nexus_backends_healthy gauge\n"
          "nexus_models_available gauge\n"
          "nexus_queue_capacity gauge\n"
          "nexus_pending_requests gauge\n"
          "nexus_backend_in_flight gauge\n"
          "nexus_backend_max_pending gauge\n"
          "nexus_queue_depth gauge\n"
          "nexus_backend_connections gauge\n"
          "nexus_backend_up gauge\n"
          "nexus_backend_ejected gauge\n"
          "nexus_backend_latency_seconds histogram\n"
          "nexus_responses_without_usage_total counter\n"
          "nexus_streams_without_end_total counter\n"
          "nexus_backend_attempts_total counter\n"
          "nexus_overhead_seconds histogram\n"
          "nexus_loop_stall_seconds histogram\n"
          "nexus_client_disconnects_total counter\n"
          "nexus_queue_rejected_total counter\n"
          "nexus_limit_rejections_total counter\n"
          "nexus_affinity_total counter\n"
          "nexus_http_rejections_total counter\n"
          "nexus_tls_handshakes_total counter\n"
          "nexus_client_connections gauge\n"
          "nexus_log_lines_dropped_total counter\n"
          "nexus_spans_exported_total counter\n"
          "nexus_spans_dropped_total counter\n"
          "nexus_build_info gauge\n"
          "nexus_config_last_reload_successful gauge\n"
          "nexus_config_last_reload_success_timestamp_seconds gauge\n"
          "process_cpu_seconds_total counter\n"
          "process_resident_memory_bytes gauge\n"
          "process_virtual_memory_bytes gauge\n"
          "process_open_fds gauge\n"
          "process_max_fds gauge\n"
          "process_start_time_seconds gauge\n"
          "process_threads gauge\n");
  }

  TEST_CASE("a request is written to the letter") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const ModelId model = world.models.intern("llama3:70b");
    const BackendId backend = world.backends.intern("ollama-local:11434");
    RequestRecord r = whole(model, backend);
    r.duration_ns = 1'500'000'000;
    r.prompt_tokens = 10;
    slab.record(r);
    slab.record({.status = 404, .error = ErrorType::no_backend});
    const std::string page = world.text();

    CHECK(family_text(page, "nexus_requests_total") ==
          R"(# HELP nexus_requests_total Finished requests, by the status sent to the client.
# TYPE nexus_requests_total counter
nexus_requests_total{model="unknown",backend="none",status="404"} 1
nexus_requests_total{model="llama3_70b",backend="ollama_local_11434",status="200"} 1
)");
    CHECK(family_text(page, "nexus_errors_total") ==
          R"(# HELP nexus_errors_total Failed requests, by error type.
# TYPE nexus_errors_total counter
nexus_errors_total{error_type="no_backend",model="unknown"} 1
)");
    CHECK(family_text(page, "nexus_request_duration_seconds") ==
          R"(# HELP nexus_request_duration_seconds Time from the complete request head to the last response byte.
# TYPE nexus_request_duration_seconds histogram
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="0.1"} 0
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="0.25"} 0
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="0.5"} 0
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="1"} 0
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="2.5"} 1
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="5"} 1
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="10"} 1
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="30"} 1
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="60"} 1
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="120"} 1
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="300"} 1
nexus_request_duration_seconds_bucket{model="llama3_70b",backend="ollama_local_11434",le="+Inf"} 1
nexus_request_duration_seconds_sum{model="llama3_70b",backend="ollama_local_11434"} 1.5
nexus_request_duration_seconds_count{model="llama3_70b",backend="ollama_local_11434"} 1
)");
    CHECK(family_text(page, "nexus_tokens_total") ==
          R"(# HELP nexus_tokens_total Tokens of each response, from its usage.
# TYPE nexus_tokens_total histogram
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="10"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="50"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="100"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="500"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="1000"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="2000"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="4000"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="8000"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="16000"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="32000"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="64000"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="128000"} 1
nexus_tokens_total_bucket{model="llama3_70b",backend="ollama_local_11434",type="prompt",le="+Inf"} 1
nexus_tokens_total_sum{model="llama3_70b",backend="ollama_local_11434",type="prompt"} 10
nexus_tokens_total_count{model="llama3_70b",backend="ollama_local_11434",type="prompt"} 1
)");
  }

  TEST_CASE("the bounds of every histogram are the contract's, written shortest") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const BackendId backend = world.register_backend("b");
    RequestRecord r = whole(world.models.intern("m"), backend);
    r.stream = true;
    r.prompt_tokens = r.completion_tokens = r.first_byte_ns = r.per_token_ns = 1;
    slab.record(r);
    slab.queue_waits(r.model).observe(1);
    const Reader page = world.read();
    const auto bounds = [&page](std::string_view name) {
      std::string all;
      std::size_t series = 0;
      for (const auto& sample : page.family(name)->samples) {
        if (sample.name.ends_with("_sum")) ++series;
        if (series == 0 && sample.labels.contains("le")) (all += sample.labels.at("le")) += ' ';
      }
      return all;
    };
    const std::string seconds = "0.1 0.25 0.5 1 2.5 5 10 30 60 120 300 +Inf ";
    CHECK(bounds("nexus_request_duration_seconds") == seconds);
    CHECK(bounds("nexus_backend_latency_seconds") == seconds);
    CHECK(bounds("nexus_queue_wait_seconds") == seconds);
    CHECK(bounds("nexus_tokens_total") == "10 50 100 500 1000 2000 4000 8000 16000 32000 64000 128000 +Inf ");
    CHECK(bounds("nexus_time_to_first_token_seconds") ==
          "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 +Inf ");
    CHECK(bounds("nexus_time_per_output_token_seconds") ==
          "0.001 0.0025 0.005 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.5 1 2.5 +Inf ");
    CHECK(bounds("nexus_overhead_seconds") ==
          "0.00001 0.000025 0.00005 0.0001 0.00025 0.0005 0.001 0.0025 0.005 0.01 0.05 0.1 +Inf ");
    CHECK(bounds("nexus_loop_stall_seconds") ==
          "0.0001 0.00025 0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.5 1 +Inf ");
  }

  TEST_CASE("a status that ended whole and failed is one series, and statuses ascend") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const ModelId model = world.models.intern("m");
    const BackendId backend = world.register_backend("b");
    RequestRecord r = whole(model, backend);
    for (const int status : {503, 200, 429, 200}) {
      r.status = static_cast<std::uint16_t>(status);
      slab.record(r);
    }
    r.error = ErrorType::backend_error;
    r.status = 200;
    slab.record(r);
    const std::string text = family_text(world.text(), "nexus_requests_total");
    CHECK(text.substr(text.find("nexus_requests_total{")) ==
          R"(nexus_requests_total{model="m",backend="b",status="200"} 3
nexus_requests_total{model="m",backend="b",status="429"} 1
nexus_requests_total{model="m",backend="b",status="503"} 1
)");
  }

  TEST_CASE("seconds are written exactly, without a trailing zero") {
    const std::pair<std::uint64_t, std::string_view> rows[] = {
        {0, "0"},
        {1, "0.000000001"},
        {123, "0.000000123"},
        {100'000'000, "0.1"},
        {1'500'000'000, "1.5"},
        {12'000'000'000, "12"},
        {1'000'000'010, "1.00000001"},
        {18'446'744'073'709'551'615u, "18446744073.709551615"},
    };
    for (const auto& [ns, expected] : rows) {
      TextBuffer page;
      CHECK(page.add_seconds(ns).text() == expected);
    }
  }
}

TEST_SUITE("the two formats") {
  // tests/metrics.txt was written before there was another format; families of spans came to it since.
  TEST_CASE("0.0.4 stays as it was, byte for byte") {
    FilledWorld world;
    std::ifstream file("tests/metrics.txt");
    REQUIRE(file.good());
    const std::string expected{std::istreambuf_iterator<char>(file), {}};
    const std::string text = world.text();
    const auto [here, there] = std::mismatch(text.begin(), text.end(), expected.begin(), expected.end());
    CAPTURE(text.substr(static_cast<std::size_t>(here - text.begin()), 200));
    CHECK(text == expected);
  }

  // Line by line: by a second implementation of the differences, which works on the text.
  TEST_CASE("OpenMetrics differs in the names of families, in units, in bounds and in the last line alone") {
    FilledWorld world;
    std::string expected, unit;
    const std::string plain = world.text();
    for (std::size_t at = 0; at < plain.size();) {
      const std::size_t end = plain.find('\n', at);
      std::string line = plain.substr(at, end - at);
      at = end + 1;
      if (line.starts_with("# ")) {
        const std::size_t from = 7, to = line.find(' ', from);
        std::string name = line.substr(from, to - from), rest = line.substr(to);
        const bool is_counter = plain.find("# TYPE " + name + " counter\n") != std::string::npos;
        if (name == "nexus_build_info" && rest == " gauge") rest = " info";
        if (is_counter) name.resize(name.size() - std::string_view("_total").size());
        if (name == "nexus_build_info") name = "nexus_build";
        line = line.substr(0, from) + name + rest;
        for (const std::string word : {"seconds", "bytes"}) {
          if (name.ends_with("_" + word) && line.starts_with("# TYPE ")) line += "\n# UNIT " + name + " " + word;
        }
      } else if (const std::size_t le = line.find("le=\""); le != std::string::npos && line[le + 4] != '+') {
        const std::size_t from = le + 4, to = line.find('"', from);
        char text[32];
        std::snprintf(text, sizeof text, "%g", std::stod(line.substr(from, to - from)));
        std::string bound = text;
        if (bound.find_first_of(".e") == std::string::npos) bound += ".0";
        line = line.substr(0, from) + bound + line.substr(to);
      }
      expected += line + "\n";
    }
    expected += "# EOF\n";
    world.format = MetricsFormat::openmetrics;
    const std::string text = world.text();
    const auto [here, there] = std::mismatch(text.begin(), text.end(), expected.begin(), expected.end());
    CAPTURE(text.substr(static_cast<std::size_t>(here - text.begin()), 200));
    CAPTURE(expected.substr(static_cast<std::size_t>(there - expected.begin()), 200));
    CHECK(text == expected);
    world.format = MetricsFormat::text;
    CHECK(world.text() == plain);  // also after a page of the other format
  }

  TEST_CASE("OpenMetrics is written to the letter") {
    World world;
    Slab& slab = world.metrics.add_slab();
    world.fleet.version = "0.1.0";
    RequestRecord r = whole(world.models.intern("m"), world.register_backend("b"));
    r.overhead_ns = 30 * kMicrosecond;
    slab.record(r);
    world.process.cpu_ns = 1'230'000'000;
    world.format = MetricsFormat::openmetrics;
    const std::string page = world.text();
    CHECK(family_text(page, "nexus_requests") ==
          R"(# HELP nexus_requests Finished requests, by the status sent to the client.
# TYPE nexus_requests counter
nexus_requests_total{model="m",backend="b",status="200"} 1
)");
    CHECK(
        family_text(page, "nexus_overhead_seconds") ==
        R"(# HELP nexus_overhead_seconds Time Nexus added to a request, without its waits for first checks, the queue, a connection and the backend.
# TYPE nexus_overhead_seconds histogram
# UNIT nexus_overhead_seconds seconds
nexus_overhead_seconds_bucket{le="1e-05"} 0
nexus_overhead_seconds_bucket{le="2.5e-05"} 0
nexus_overhead_seconds_bucket{le="5e-05"} 1
nexus_overhead_seconds_bucket{le="0.0001"} 1
nexus_overhead_seconds_bucket{le="0.00025"} 1
nexus_overhead_seconds_bucket{le="0.0005"} 1
nexus_overhead_seconds_bucket{le="0.001"} 1
nexus_overhead_seconds_bucket{le="0.0025"} 1
nexus_overhead_seconds_bucket{le="0.005"} 1
nexus_overhead_seconds_bucket{le="0.01"} 1
nexus_overhead_seconds_bucket{le="0.05"} 1
nexus_overhead_seconds_bucket{le="0.1"} 1
nexus_overhead_seconds_bucket{le="+Inf"} 1
nexus_overhead_seconds_sum 0.00003
nexus_overhead_seconds_count 1
)");
    CHECK(family_text(page, "nexus_build") == R"(# HELP nexus_build Always 1; the version of Nexus is in the label.
# TYPE nexus_build info
nexus_build_info{version="_0_1_0",tls_library="_"} 1
)");
    CHECK(family_text(page, "process_cpu_seconds") == R"(# HELP process_cpu_seconds User and system CPU time spent.
# TYPE process_cpu_seconds counter
# UNIT process_cpu_seconds seconds
process_cpu_seconds_total 1.23
# EOF
)");
  }

  TEST_CASE("a help text is escaped for OpenMetrics, and a part of a unit is none") {
    Exposition out;
    out.begin(MetricsFormat::openmetrics);
    out.family("a_milliseconds", "gauge", "say \"x\\y\"\nor not");
    out.sample(1);
    out.family("b_bytes_total", "counter", "B.");
    out.sample(2);
    out.end();
    CHECK(out.text() ==
          "# HELP a_milliseconds say \\\"x\\\\y\\\"\\nor not\n# TYPE a_milliseconds gauge\na_milliseconds 1\n"
          "# HELP b_bytes B.\n# TYPE b_bytes counter\n# UNIT b_bytes bytes\nb_bytes_total 2\n# EOF\n");
    out.begin(MetricsFormat::text);
    out.end();
    CHECK(out.text().empty());
  }

  TEST_CASE("requests that were judged have both series of their model, and stay when the level is gone") {
    World world;
    Slab* slabs[] = {&world.metrics.add_slab(), &world.metrics.add_slab()};
    RequestRecord r = whole(world.models.intern("gpt-4"), world.register_backend("b"));
    slabs[0]->record(r);
    CHECK(family_text(world.text(), "nexus_slo_requests_total") == "absent");
    world.fleet.has_service_levels = true;
    CHECK(world.read().family("nexus_slo_requests_total")->samples.empty());
    r.is_noted = true;
    r.slo = Slo::met;
    slabs[0]->record(r);
    slabs[1]->record(r);
    r.model = world.models.intern("gpt_4");
    slabs[1]->record(r);
    r.model = world.models.intern("other");
    r.slo = Slo::missed;
    slabs[1]->record(r);
    world.fleet.has_service_levels = false;
    const Reader page = world.read();
    CHECK(page.text("nexus_slo_requests_total", {{"model", "gpt_4"}, {"met", "yes"}}) == "3");
    CHECK(page.text("nexus_slo_requests_total", {{"model", "gpt_4"}, {"met", "no"}}) == "0");
    CHECK(page.text("nexus_slo_requests_total", {{"model", "other"}, {"met", "yes"}}) == "0");
    CHECK(page.text("nexus_slo_requests_total", {{"model", "other"}, {"met", "no"}}) == "1");
    CHECK(page.sum("nexus_requests_total") == 5);
  }
}

TEST_SUITE("US1 names") {
  TEST_CASE("names that sanitise to one are one series, their values added") {
    World world;
    Slab& a = world.metrics.add_slab();
    Slab& b = world.metrics.add_slab();
    const ModelId dash = world.models.intern("gpt-4"), underscore = world.models.intern("gpt_4");
    const BackendId up = world.register_backend("host:1", true), down = world.register_backend("host.1", false);
    RequestRecord r = whole(dash, up, 500);
    r.fell_back = true;
    r.fallback_to = underscore;
    a.record(r);
    b.record(r);
    b.record(whole(underscore, down, 500));
    a.add_in_flight(up, 2);
    b.add_in_flight(down, 3);
    a.attempt(up, AttemptOutcome::ok);
    a.attempt(down, AttemptOutcome::ok);
    a.health_check(up, kSecond);
    b.health_check(down, kSecond);

    const Reader page = world.read();
    const Labels pair{{"model", "gpt_4"}, {"backend", "host_1"}}, backend{{"backend", "host_1"}};
    Labels requests = pair;
    requests["status"] = "500";
    CHECK(page.text("nexus_requests_total", requests) == "3");
    CHECK(page.text("nexus_errors_total", {{"error_type", "other"}, {"model", "gpt_4"}}) == "3");
    CHECK(page.text("nexus_fallbacks_total", {{"from_model", "gpt_4"}, {"to_model", "gpt_4"}}) == "2");
    CHECK(page.text("nexus_request_duration_seconds_count", pair) == "3");
    CHECK(page.text("nexus_request_duration_seconds_sum", pair) == "3");
    CHECK(page.text("nexus_pending_requests", backend) == "5");
    CHECK(page.text("nexus_backend_attempts_total", {{"backend", "host_1"}, {"outcome", "ok"}}) == "2");
    CHECK(page.text("nexus_backend_latency_seconds_count", backend) == "2");
    CHECK(page.text("nexus_backend_up", backend) == "0");  // one of them is down
    CHECK(page.text("nexus_backends_total") == "2");
    CHECK(page.text("nexus_backends_healthy") == "1");
  }

  TEST_CASE("raw labels keep such names apart and say them as they are") {
    World world;
    world.mode = LabelMode::raw;
    Slab& slab = world.metrics.add_slab();
    const BackendId backend = world.register_backend("a\"b\\c\nd");
    slab.record(whole(world.models.intern("gpt-4"), backend));
    slab.record(whole(world.models.intern("gpt_4"), backend));
    const Reader page = world.read();
    CHECK(page.text("nexus_requests_total", {{"model", "gpt-4"}, {"backend", "a\"b\\c\nd"}, {"status", "200"}}) == "1");
    CHECK(page.text("nexus_requests_total", {{"model", "gpt_4"}, {"backend", "a\"b\\c\nd"}, {"status", "200"}}) == "1");
  }

  // Random names that break pages, recorded from two slabs in every family that has labels, in both modes. The reader
  // refuses a series that comes twice; the sums say that merging lost nothing.
  TEST_CASE("no series comes twice and nothing is lost, whatever the names are") {
    for (std::uint32_t seed = 1; seed <= 15; ++seed) {
      CAPTURE(seed);
      std::mt19937 random(seed);
      World world;
      world.fleet.version = "1.2";
      Slab* slabs[] = {&world.metrics.add_slab(), &world.metrics.add_slab()};
      std::vector<ModelId> models{ModelId::unknown};
      std::vector<BackendId> backends;
      for (int i = 0; i < 12; ++i) models.push_back(world.models.intern(hostile_name(random)));
      for (int i = 0; i < 8; ++i) {
        backends.push_back(i % 3 == 0 ? world.backends.intern(hostile_name(random))
                                      : world.register_backend(hostile_name(random), random() % 2 == 0));
      }
      for (int pass = 0; pass < 4; ++pass) {
        world.mode = pass % 2 == 0 ? LabelMode::sanitize : LabelMode::raw;
        for (int i = 0; i < 60; ++i) {
          Slab& slab = *slabs[random() % 2];
          const BackendId backend = backends[random() % backends.size()];
          RequestRecord r = whole(models[random() % models.size()], backend);
          r.status = static_cast<std::uint16_t>(random() % 3 == 0 ? 100 + random() % 500 : 200);
          r.stream = random() % 2 == 0;
          r.duration_ns = static_cast<Ns>(random()) * 100;
          r.prompt_tokens = static_cast<std::int64_t>(random() % 10'000) - 1000;
          r.completion_tokens = static_cast<std::int64_t>(random() % 10'000) - 1000;
          r.first_byte_ns = static_cast<Ns>(random() % kSecond);
          r.per_token_ns = r.first_byte_ns / 10;
          r.fell_back = random() % 4 == 0;
          r.fallback_to = models[random() % models.size()];
          r.without_usage = random() % 4 == 0;
          slab.record(r);
          slab.attempt(backend, static_cast<AttemptOutcome>(random() % kAttemptOutcomeNames.size()));
          slab.health_check(backend, static_cast<Ns>(random() % kSecond));
          slab.add_in_flight(backend, 1);
        }
        const Reader page = world.read();
        CHECK(page.sum("nexus_requests_total") == 60 * (pass + 1));
        CHECK(page.sum("nexus_request_duration_seconds_count") == 60 * (pass + 1));
        CHECK(page.sum("nexus_backend_attempts_total") == 60 * (pass + 1));
        CHECK(page.sum("nexus_backend_latency_seconds_count") == 60 * (pass + 1));
        CHECK(page.sum("nexus_pending_requests") == 60 * (pass + 1));
      }
    }
  }
}

TEST_SUITE("US2 T032 health checks") {
  TEST_CASE("a registered backend's latency is there at zero, and each successful check is in its bucket") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const BackendId backend = world.register_backend("b");
    CHECK(world.read().text("nexus_backend_latency_seconds_count", {{"backend", "b"}}) == "0");
    slab.health_check(backend, 7 * kMillisecond);
    slab.health_check(backend, 200 * kMillisecond);
    const Reader page = world.read();
    CHECK(page.text("nexus_backend_latency_seconds_bucket", {{"backend", "b"}, {"le", "0.1"}}) == "1");
    CHECK(page.text("nexus_backend_latency_seconds_bucket", {{"backend", "b"}, {"le", "0.25"}}) == "2");
    CHECK(page.text("nexus_backend_latency_seconds_sum", {{"backend", "b"}}) == "0.207");
  }
}

TEST_SUITE("US4 T051 T052 T053 the fleet") {
  TEST_CASE("gauges follow the fleet") {
    World world;
    Reader page = world.read();
    CHECK(page.text("nexus_backends_total") == "0");
    CHECK(page.text("nexus_backends_healthy") == "0");
    CHECK(page.text("nexus_models_available") == "0");

    world.register_backend("a");
    world.register_backend("b");
    world.fleet.models_available = 3;
    page = world.read();
    CHECK(page.text("nexus_backends_total") == "2");
    CHECK(page.text("nexus_backends_healthy") == "2");
    CHECK(page.text("nexus_models_available") == "3");
    CHECK(page.text("nexus_backend_up", {{"backend", "b"}}) == "1");

    world.fleet.backends[1].healthy = false;
    page = world.read();
    CHECK(page.text("nexus_backends_total") == "2");
    CHECK(page.text("nexus_backends_healthy") == "1");
    CHECK(page.text("nexus_backend_up", {{"backend", "b"}}) == "0");
  }

  TEST_CASE("what is known to exist is there from the start at zero") {
    World world;
    world.metrics.add_slab();
    world.register_backend("b");
    const Reader page = world.read();
    CHECK(page.text("nexus_pending_requests", {{"backend", "b"}}) == "0");
    CHECK(page.text("nexus_queue_depth", {{"backend", "b"}}) == "0");
    CHECK(page.text("nexus_backend_connections", {{"backend", "b"}}) == "0");
    CHECK(page.text("nexus_responses_without_usage_total", {{"backend", "b"}}) == "0");
    for (std::size_t i = 0; i < kAttemptOutcomeNames.size(); ++i) {
      CHECK(page.text("nexus_backend_attempts_total",
                      {{"backend", "b"}, {"outcome", std::string(kAttemptOutcomeNames[i])}}) == "0");
    }
    for (const char* phase : {"request", "waiting", "streaming"}) {
      CHECK(page.text("nexus_client_disconnects_total", {{"phase", phase}}) == "0");
    }
    CHECK(page.text("nexus_client_disconnects_total", {{"phase", "none"}}) == "absent");
    for (const std::string_view limit : kLimitNames) {
      CHECK(page.text("nexus_limit_rejections_total", {{"limit", std::string(limit)}}) == "0");
    }
    CHECK(page.text("nexus_backend_in_flight", {{"backend", "b"}}) == "0");
    CHECK(page.text("nexus_queue_capacity") == "0");
    CHECK(page.text("nexus_queue_rejected_total", {{"reason", "full"}}) == "0");
    CHECK(page.text("nexus_client_connections") == "0");
  }

  TEST_CASE("caps and the queue's size are those of the configuration, and a backend without a cap has no series") {
    World world;
    world.register_backend("capped");
    world.register_backend("open");
    world.register_backend("two.names");
    world.register_backend("two-names");
    world.fleet.backends[0].max_pending = 4;
    world.fleet.backends[2].max_pending = 5;
    world.fleet.backends[3].max_pending = 6;
    world.fleet.queue_size = 100;
    Reader page = world.read();
    CHECK(page.text("nexus_queue_capacity") == "100");
    CHECK(page.text("nexus_backend_max_pending", {{"backend", "capped"}}) == "4");
    CHECK(page.text("nexus_backend_max_pending", {{"backend", "open"}}) == "absent");
    CHECK(page.text("nexus_backend_max_pending", {{"backend", "two_names"}}) == "11");

    world.fleet.backends[3].max_pending = 0;  // with one that has none, there is none on both
    page = world.read();
    CHECK(page.text("nexus_backend_max_pending", {{"backend", "two_names"}}) == "absent");
  }

  TEST_CASE("a backend is ejected while time is left or its trial request runs") {
    World world;
    world.register_backend("a");
    world.register_backend("b.c");
    world.register_backend("b-c");
    world.fleet.backends[1].ejected_ns = 0;
    const Reader page = world.read();
    CHECK(page.text("nexus_backend_ejected", {{"backend", "a"}}) == "0");
    CHECK(page.text("nexus_backend_ejected", {{"backend", "b_c"}}) == "1");
    CHECK(page.text("nexus_backend_up", {{"backend", "b_c"}}) == "1");
  }

  TEST_CASE("what is pending is in flight or queued, and the wait is told by model") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const BackendId backend = world.register_backend("b");
    slab.add_in_flight(backend, 3);
    slab.add_queued(backend, 2);
    slab.queue_waits(world.models.intern("llama3:70b")).observe(2 * kSecond);
    const Reader page = world.read();
    CHECK(page.text("nexus_pending_requests", {{"backend", "b"}}) == "5");
    CHECK(page.text("nexus_backend_in_flight", {{"backend", "b"}}) == "3");
    CHECK(page.text("nexus_queue_depth", {{"backend", "b"}}) == "2");
    CHECK(page.text("nexus_queue_wait_seconds_sum", {{"model", "llama3_70b"}}) == "2");
    CHECK(page.text("nexus_queue_wait_seconds_count", {{"model", "llama3_70b"}}) == "1");
  }

  TEST_CASE("the requests of the endpoints are those of the models, by status") {
    World world;
    Slab* slabs[] = {&world.metrics.add_slab(), &world.metrics.add_slab()};
    const std::string_view paths[] = {"/v1/chat/completions", "/v1/embeddings"};
    world.fleet.endpoints = paths;
    RequestRecord r = whole(world.models.intern("m"), world.register_backend("b"));
    for (int i = 0; i < 60; ++i) {
      r.endpoint = static_cast<std::uint8_t>(i % 3 == 0);
      r.status = static_cast<std::uint16_t>(400 + i % 10);  // more than are kept without an allocation
      r.error = i % 2 == 0 ? ErrorType::none : ErrorType::backend_error;
      slabs[i % 2]->record(r);
    }
    const Reader page = world.read();
    CHECK(page.sum("nexus_endpoint_requests_total") == page.sum("nexus_requests_total"));
    CHECK(page.sum("nexus_requests_total") == 60);
    CHECK(page.text("nexus_endpoint_requests_total", {{"endpoint", "_v1_embeddings"}, {"status", "403"}}) == "2");
    CHECK(page.text("nexus_endpoint_requests_total", {{"endpoint", "_v1_chat_completions"}, {"status", "403"}}) == "4");
    world.mode = LabelMode::raw;
    CHECK(world.read().text("nexus_endpoint_requests_total", {{"endpoint", "/v1/embeddings"}, {"status", "403"}}) ==
          "2");
  }

  TEST_CASE("cached prompt tokens add up, from 0 on once a prompt was counted") {
    World world;
    Slab& slab = world.metrics.add_slab();
    RequestRecord r = whole(world.models.intern("m"), world.register_backend("b"));
    const Labels pair{{"model", "m"}, {"backend", "b"}};
    slab.record(r);
    CHECK(world.read().text("nexus_prompt_tokens_cached_total", pair) == "absent");
    r.prompt_tokens = 100;
    slab.record(r);
    CHECK(world.read().text("nexus_prompt_tokens_cached_total", pair) == "0");
    r.cached_tokens = 64;
    slab.record(r);
    slab.record(r);
    CHECK(world.read().text("nexus_prompt_tokens_cached_total", pair) == "128");
  }

  TEST_CASE("a backend that is removed keeps its counts, and its gauges only while they say something") {
    World world;
    Slab& slab = world.metrics.add_slab();
    const BackendId backend = world.register_backend("b");
    slab.record(whole(world.models.intern("m"), backend));
    slab.attempt(backend, AttemptOutcome::ok);
    slab.health_check(backend, kMillisecond);
    slab.add_in_flight(backend, 1);
    world.fleet.backends.clear();

    Reader page = world.read();
    const Labels labels{{"backend", "b"}};
    CHECK(page.text("nexus_requests_total", {{"model", "m"}, {"backend", "b"}, {"status", "200"}}) == "1");
    CHECK(page.text("nexus_backend_attempts_total", {{"backend", "b"}, {"outcome", "ok"}}) == "1");
    CHECK(page.text("nexus_backend_latency_seconds_count", labels) == "1");
    CHECK(page.text("nexus_backend_up", labels) == "absent");
    CHECK(page.text("nexus_pending_requests", labels) == "1");  // its last request is still in flight

    slab.add_in_flight(backend, -1);
    page = world.read();
    CHECK(page.text("nexus_pending_requests", labels) == "absent");
    CHECK(page.text("nexus_requests_total", {{"model", "m"}, {"backend", "b"}, {"status", "200"}}) == "1");
  }

  TEST_CASE("the daemon's own gauges are written") {
    World world;
    world.mode = LabelMode::raw;
    world.fleet.version = "0.1.0";
    world.fleet.tls_library = "OpenSSL 3";
    world.fleet.last_reload_ok = false;
    world.fleet.last_reload_success_timestamp = 1'700'000'000.25;
    world.process = {.cpu_ns = 1'230'000'000,
                     .resident_bytes = 4096,
                     .virtual_bytes = 1 << 20,
                     .open_fds = 9,
                     .max_fds = 1024,
                     .start_time_ns = 1'700'000'000'070'000'000,
                     .threads = 3};
    const Reader page = world.read();
    CHECK(page.text("nexus_build_info", {{"version", "0.1.0"}, {"tls_library", "OpenSSL 3"}}) == "1");
    CHECK(page.text("nexus_config_last_reload_successful") == "0");
    CHECK(page.text("nexus_config_last_reload_success_timestamp_seconds") == "1700000000.25");
    CHECK(page.text("process_cpu_seconds_total") == "1.23");
    CHECK(page.text("process_resident_memory_bytes") == "4096");
    CHECK(page.text("process_virtual_memory_bytes") == "1048576");
    CHECK(page.text("process_open_fds") == "9");
    CHECK(page.text("process_max_fds") == "1024");
    CHECK(page.text("process_start_time_seconds") == "1700000000.07");
    CHECK(page.text("process_threads") == "3");
  }

  TEST_CASE("what the kernel does not tell is left out") {
    World world;
    world.process.threads = 2;
    const Reader page = world.read();
    CHECK(page.family("process_open_fds") == nullptr);
    CHECK(page.text("process_threads") == "2");
  }
}

TEST_SUITE("US1 process statistics") {
  TEST_CASE("a captured /proc/self/stat is read, also with blanks and brackets in the file's name") {
    ProcessStats stats;
    parse_process_stat(
        "4242 (ne) xus) 7) S 1 4242 4242 0 -1 4194560 1021 0 3 0 150 25 0 0 20 0 5 0 8000 12345678 900 "
        "18446744073709551615 1 1 0 0 0 0 0 4096 81920 0 0 0 17 1 0 0 0 0 0\n",
        {.ticks_per_second = 100, .page_bytes = 4096}, 1'700'000'000 * kSecond, stats);
    CHECK(stats.cpu_ns == 1'750 * kMillisecond);
    CHECK(stats.threads == 5);
    CHECK(stats.start_time_ns == 1'700'000'080 * kSecond);
    CHECK(stats.virtual_bytes == 12345678);
    CHECK(stats.resident_bytes == 900 * 4096);
  }

  TEST_CASE(
      "a signal that is blocked, ignored or caught ends no process; a status that cannot be read promises nothing") {
    const auto status = [](std::string_view blocked, std::string_view ignored, std::string_view caught) {
      return std::string("Name:\tx\nSigQ:\t0/9\nSigPnd:\t0000000000000001\nSigBlk:\t") + std::string(blocked) +
             "\nSigIgn:\t" + std::string(ignored) + "\nSigCgt:\t" + std::string(caught) + "\nCapInh:\t0\n";
    };
    const std::string_view none = "0000000000000000", hangup = "0000000000000001", others = "fffffffffffffffe";
    CHECK(takes_signal(status(hangup, none, none), SIGHUP));
    CHECK(takes_signal(status(none, hangup, none), SIGHUP));
    CHECK(takes_signal(status(none, none, hangup), SIGHUP));
    CHECK_FALSE(takes_signal(status(others, others, others), SIGHUP));
    CHECK(takes_signal(status(others, none, none), SIGTERM));
    CHECK_FALSE(takes_signal(status("x", "", none), SIGHUP));
    CHECK_FALSE(takes_signal("", SIGHUP));
  }

  TEST_CASE("what can't be read is unknown") {
    for (const std::string_view text : {"", "1 (x", "1 (x)", "1 (x) S a b c", "nothing"}) {
      ProcessStats stats;
      parse_process_stat(text, {}, ProcessStats::kUnknown, stats);
      CHECK(stats.cpu_ns == ProcessStats::kUnknown);
      CHECK(stats.start_time_ns == ProcessStats::kUnknown);
      CHECK(stats.resident_bytes == ProcessStats::kUnknown);
      CHECK(stats.threads == ProcessStats::kUnknown);
    }
    CHECK(parse_boot_time("cpu 1 2\nbtime 1700000000\nprocesses 3\n") == 1'700'000'000 * kSecond);
    CHECK(parse_boot_time("cpu 1 2\n") == ProcessStats::kUnknown);
    CHECK(parse_boot_time("cpu 1 2\nbtime x\n") == ProcessStats::kUnknown);
  }

  TEST_CASE("this process has memory, descriptors, threads and a start in the past") {
    const ProcessStats stats = read_process_stats();
    CHECK(stats.cpu_ns >= 0);
    CHECK(stats.resident_bytes > 100'000);
    CHECK(stats.virtual_bytes >= stats.resident_bytes);
    CHECK(stats.open_fds >= 1);
    CHECK(stats.max_fds >= stats.open_fds);
    CHECK(stats.threads >= 1);
    CHECK(stats.start_time_ns > 0);
    CHECK(stats.start_time_ns < wall_now() + kSecond);
  }
}

TEST_SUITE("US1 T074 scrapes while recording") {
  // Two threads record and grow their tables; one scrapes without a pause, kPages times. Every page must be whole,
  // count = +Inf in it, no counter below the page before; and after the last record all is there to the unit.
  TEST_CASE("every page is whole and monotonic while threads record, and the last one is exact") {
    World world;
    constexpr std::uint32_t kModels = 12, kBackends = 5, kPages = 40;
    Slab* slabs[] = {&world.metrics.add_slab(), &world.metrics.add_slab()};
    world.metrics.add_slab();  // the control thread's, idle
    for (std::uint32_t i = 0; i < kModels; ++i)
      world.models.intern("model" + std::to_string(i / 2) + (i % 2 ? "." : "-"));
    for (std::uint32_t i = 0; i < kBackends; ++i) world.register_backend("backend " + std::to_string(i));

    std::atomic<std::uint32_t> pages{0};
    std::uint64_t tens[2]{};  // records of each writer, in tens
    const auto write = [&](std::size_t writer) {
      std::mt19937 random(static_cast<std::uint32_t>(writer));
      while (pages < kPages || tens[writer] < 1000) {
        // Pairs come one by one, so that the tables grow during the whole run.
        const std::uint32_t pairs = 1 + std::min(pages.load(), kPages - 1) * kModels * kBackends / kPages;
        for (int i = 0; i < 10; ++i) {
          const auto pair = static_cast<std::uint32_t>(random() % pairs);
          RequestRecord r = whole(ModelId{1 + pair / kBackends}, BackendId{1 + pair % kBackends});
          r.status = static_cast<std::uint16_t>(i == 0 ? 500 + random() % 20 : 200);
          r.stream = i % 2 == 0;
          r.duration_ns = static_cast<Ns>(random());
          r.prompt_tokens = static_cast<std::int64_t>(random() % 5000);
          r.completion_tokens = 1;
          r.first_byte_ns = r.per_token_ns = r.overhead_ns = static_cast<Ns>(random());
          r.fell_back = i == 1;
          r.fallback_to = ModelId{1};
          slabs[writer]->add_in_flight(r.backend, 1);
          slabs[writer]->attempt(r.backend, AttemptOutcome::ok);
          slabs[writer]->record(r);
          slabs[writer]->add_in_flight(r.backend, -1);
        }
        ++tens[writer];
      }
    };
    std::thread first(write, 0), second(write, 1);

    std::map<std::pair<std::string, Labels>, double> before;
    while (pages < kPages) {
      const Reader page = world.read();
      for (const auto& family : page.families) {
        for (const auto& sample : family.samples) {
          if (family.name == "nexus_pending_requests") CHECK((sample.value >= 0 && sample.value <= 2));
          if (family.type == "gauge") continue;
          double& last = before[{sample.name, sample.labels}];
          if (sample.value < last) FAIL_CHECK("went back: " << sample.name << " " << last << " " << sample.value);
          last = sample.value;
        }
      }
      ++pages;
    }
    first.join();
    second.join();

    const Reader page = world.read();
    const auto records = static_cast<double>(10 * (tens[0] + tens[1]));
    CHECK(page.sum("nexus_requests_total") == records);
    CHECK(page.sum("nexus_requests_total", {{"status", "200"}}) == records * 9 / 10);
    CHECK(page.sum("nexus_errors_total") == records / 10);
    CHECK(page.sum("nexus_fallbacks_total") == records / 10);
    CHECK(page.sum("nexus_request_duration_seconds_count") == records);
    CHECK(page.sum("nexus_time_to_first_token_seconds_count") == records / 2);
    CHECK(page.sum("nexus_tokens_total_sum", {{"type", "completion"}}) == records);
    CHECK(page.sum("nexus_overhead_seconds_count") == records);
    CHECK(page.sum("nexus_backend_attempts_total", {{"outcome", "ok"}}) == records);
    CHECK(page.sum("nexus_pending_requests") == 0);
  }
}

TEST_SUITE("the strict reader of these tests") {
  TEST_CASE("it takes a good page and finds a problem in every bad one") {
    const std::string head = "# HELP a x\n# TYPE a counter\n", histogram = "# HELP h x\n# TYPE h histogram\n";
    const std::string whole = "h_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 3\nh_count 2\n";
    CHECK(Reader(head + "a{b=\"c\\n\\\\\\\"\"} 1\n" + histogram + whole).problems.empty());
    const std::string bad[] = {
        "",
        head + "a 1",
        head + "a 1\na 2\n",
        head + "a{b=\"c\",d=\"e\"} 1\na{d=\"e\",b=\"c\"} 1\n",
        head + "\n",
        head + "a -1\n",
        head + "a 1 \n",
        head + "a x\n",
        head + "b 1\n",
        head + "a{b=\"c} 1\n",
        head + "a{b=\"\\t\"} 1\n",
        head + "a{b=\"\xFF\"} 1\n",
        head + "a{1=\"c\"} 1\n",
        head + head,
        "# HELP a x\na 1\n",
        "# TYPE a counter\na 1\n",
        histogram + "h_bucket{le=\"1\"} 1\nh_sum 3\nh_count 1\n",
        histogram + "h_bucket{le=\"1\"} 3\nh_bucket{le=\"+Inf\"} 2\nh_sum 3\nh_count 2\n",
        histogram + "h_bucket{le=\"2\"} 1\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 3\nh_count 2\n",
        histogram + "h_bucket{le=\"+Inf\"} 2\nh_sum 3\nh_count 3\n",
        histogram + "h_bucket{le=\"+Inf\"} 2\nh_sum 3\n",
        histogram + "h_bucket{le=\"+Inf\"} 2\nh_count 2\nh_sum 3\n",
    };
    for (const std::string& page : bad) {
      CAPTURE(page);
      CHECK_FALSE(Reader(page).problems.empty());
    }
  }
}

TEST_SUITE("the families of clients' keys") {
  TEST_CASE("without a file of keys there are none") {
    World world;
    world.keys.intern("other");
    world.metrics.add_slab().record(whole(ModelId::unknown, BackendId::none));
    CHECK(world.text().find("nexus_key_") == std::string::npos);
  }

  TEST_CASE("each request counts under one key: the sum over the keys is that of nexus_requests_total") {
    World world;
    world.keys.intern("other");
    const KeyId alice = world.keys.intern("alice");
    Slab& slab = world.metrics.add_slab();
    const std::vector<std::pair<KeyId, std::uint16_t>> rows{
        {alice, 200}, {alice, 200}, {alice, 304},       {alice, 404},        {alice, 429},
        {alice, 499}, {alice, 503}, {KeyId::none, 401}, {KeyId::other, 200}, {KeyId::other, 502}};
    for (const auto& [key, status] : rows) {
      RequestRecord record = whole(ModelId::unknown, BackendId::none, status);
      record.key = key;
      record.prompt_tokens = 7;
      record.completion_tokens = 3;
      record.cached_tokens = 2;
      slab.record(record);
    }
    const KeyCount pending = count_key(slab, alice);
    Ns now = kSecond;
    QueuedCount queued = count_queued(slab, BackendId::none, ModelId::unknown, alice, now);
    now += kSecond / 4;
    queued.reset();
    const std::string page = world.text();
    CHECK(family_text(page, "nexus_key_requests_total") ==
          "# HELP nexus_key_requests_total Finished requests of a client's key, by class of status.\n"
          "# TYPE nexus_key_requests_total counter\n"
          "nexus_key_requests_total{key=\"none\",status=\"2xx\"} 0\n"
          "nexus_key_requests_total{key=\"none\",status=\"3xx\"} 0\n"
          "nexus_key_requests_total{key=\"none\",status=\"4xx\"} 1\n"
          "nexus_key_requests_total{key=\"none\",status=\"429\"} 0\n"
          "nexus_key_requests_total{key=\"none\",status=\"499\"} 0\n"
          "nexus_key_requests_total{key=\"none\",status=\"5xx\"} 0\n"
          "nexus_key_requests_total{key=\"other\",status=\"2xx\"} 1\n"
          "nexus_key_requests_total{key=\"other\",status=\"3xx\"} 0\n"
          "nexus_key_requests_total{key=\"other\",status=\"4xx\"} 0\n"
          "nexus_key_requests_total{key=\"other\",status=\"429\"} 0\n"
          "nexus_key_requests_total{key=\"other\",status=\"499\"} 0\n"
          "nexus_key_requests_total{key=\"other\",status=\"5xx\"} 1\n"
          "nexus_key_requests_total{key=\"alice\",status=\"2xx\"} 2\n"
          "nexus_key_requests_total{key=\"alice\",status=\"3xx\"} 1\n"
          "nexus_key_requests_total{key=\"alice\",status=\"4xx\"} 1\n"
          "nexus_key_requests_total{key=\"alice\",status=\"429\"} 1\n"
          "nexus_key_requests_total{key=\"alice\",status=\"499\"} 1\n"
          "nexus_key_requests_total{key=\"alice\",status=\"5xx\"} 1\n");
    CHECK(page.find("nexus_key_tokens_total{key=\"alice\",type=\"prompt\"} 49\n") != std::string::npos);
    CHECK(page.find("nexus_key_tokens_total{key=\"alice\",type=\"completion\"} 21\n") != std::string::npos);
    CHECK(page.find("nexus_key_tokens_total{key=\"alice\",type=\"cached\"} 14\n") != std::string::npos);
    CHECK(page.find("nexus_key_pending{key=\"alice\"} 1\n") != std::string::npos);
    CHECK(page.find("nexus_key_queue_wait_seconds_sum{key=\"alice\"} 0.25\n") != std::string::npos);
    CHECK(page.find("nexus_key_queue_wait_seconds_count{key=\"alice\"} 1\n") != std::string::npos);
    const Reader read = world.read();
    CHECK(read.sum("nexus_key_requests_total") == 10);
    CHECK(read.sum("nexus_requests_total") == 10);
  }
}
