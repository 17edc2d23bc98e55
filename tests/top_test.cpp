// Goal: the numbers that `nexus top` and the status page show, and that no name escapes its cell. Method: pages written
// by hand and by Nexus's own writers, read back.
#include "nexus/apps/top.h"

#include <doctest/doctest.h>

#include "nexus/metrics/prometheus.h"
#include "nexus/metrics/slab.h"
#include "nexus/metrics/stats_json.h"

using namespace nexus;

namespace {

const std::string kStats =
    R"({"uptime_seconds":100,"requests":{"total":30,"success":27,"errors":3},"backends":[)"
    R"({"id":"gpu-1","requests":20,"average_latency_ms":10.0,"pending":2,"healthy":true,"errors":1,"prompt_tokens":50,"completion_tokens":400},)"
    R"({"id":"gpu-2","requests":10,"average_latency_ms":10.0,"pending":0,"healthy":false,"errors":2,"prompt_tokens":5,"completion_tokens":40}],)"
    R"("models":[{"name":"llama3:70b","requests":30,"average_duration_ms":10.0,"errors":3,"prompt_tokens":55,"completion_tokens":440,"new":[1]}],"more":{}})";

std::string page_of(const Rates& rates, std::string_view where, TopView view) { return top_page(rates, where, view); }

std::string buckets(const std::string& labels, int upto_1, int upto_10, int all) {
  const auto line = [&](const char* le, int count) {
    return "nexus_request_duration_seconds_bucket{" + labels + ",le=\"" + le + "\"} " + std::to_string(count) + "\n";
  };
  return line("1", upto_1) + line("10", upto_10) + line("+Inf", all);
}

Scrape read_pages(std::string_view stats, std::string_view metrics, Ns at) {
  const std::optional<Scrape> sample = read_scrape(stats, metrics, at);
  REQUIRE(sample);
  return *sample;
}

TEST_CASE("both pages are read, and a label is found under the name that it came from") {
  const std::string metrics =
      "# HELP nexus_backends_total x\nnexus_backends_total 2\nnexus_backends_healthy 1\nnexus_models_available 4\n"
      "nexus_client_connections 7\nnexus_queue_depth{backend=\"gpu_1\"} 5\n" +
      buckets("model=\"llama3_70b\",backend=\"gpu_1\"", 10, 18, 20) +
      buckets("model=\"llama3_70b\",backend=\"gpu_2\"", 0, 10, 10) + "nonsense\n{}\nnexus_queue_depth{backend=\"gpu";
  const Scrape sample = read_pages(kStats, metrics, kSecond);
  CHECK(sample.all.requests == 30);
  CHECK(sample.all.errors == 3);
  CHECK(sample.all.pending == 2);
  CHECK(sample.all.queue_depth == 5);
  CHECK(sample.all.completion_tokens == 440);
  CHECK(sample.fleet.backends == 2);
  CHECK(sample.fleet.backends_healthy == 1);
  CHECK(sample.fleet.models_available == 4);
  CHECK(sample.fleet.client_connections == 7);
  REQUIRE(sample.by_backend.size() == 2);
  CHECK(sample.by_backend[0].name == "gpu-1");
  CHECK(sample.by_backend[0].pending == 2);
  CHECK(sample.by_backend[0].queue_depth == 5);
  CHECK_FALSE(sample.by_backend[1].healthy);
  CHECK(sample.by_backend[0].duration.count() == 20);
  REQUIRE(sample.by_model.size() == 1);
  CHECK(sample.by_model[0].duration.count() == 30);
  CHECK(sample.by_model[0].completion_tokens == 440);
  CHECK(sample.all.duration.count() == 30);
}

TEST_CASE("raw labels are found too, their escapes undone") {
  const std::string stats =
      R"({"uptime_seconds":1,"requests":{"total":1,"success":1,"errors":0},"backends":[],"models":[{"name":"a\"\\\nb","requests":1}]})";
  const Scrape sample = read_pages(stats, buckets(R"(model="a\"\\\nb",backend="x,}")", 1, 1, 1), 0);
  REQUIRE(sample.by_model.size() == 1);
  CHECK(sample.by_model[0].duration.count() == 1);
}

TEST_CASE("what is no page of Nexus is refused") {
  for (const char* text :
       {"", "{", "[]", "{}", "<html>", R"({"requests":{},"backends":{},"models":[]})",
        R"({"requests":{},"backends":[{}],"models":[]})", R"({"requests":{},"backends":[{"id":1}],"models":[]})"}) {
    CAPTURE(text);
    CHECK_FALSE(read_scrape(text, "", 0));
  }
}

TEST_CASE("what Nexus writes is what is read") {
  Metrics metrics;
  Slab& slab = metrics.add_slab();
  ModelNames models("unknown", 10);
  BackendNames backends("none", 10);
  KeyNames keys{"none", 1000};
  const ModelId model = models.intern("<img src=x onerror=alert(1)>");
  const BackendId backend = backends.intern("b:1");
  slab.add_in_flight(backend, 3);
  FleetView fleet;
  fleet.backends.push_back({backend, true});
  fleet.backends[0].ejected_ns = 7 * kSecond;
  fleet.backends[0].ejected_why = AttemptOutcome::status_5xx;
  fleet.models_on_healthy.push_back(model);
  fleet.models_available = 1;
  fleet.uptime_ns = 5 * kSecond;
  fleet.version = "9.9";
  for (const LabelMode mode : {LabelMode::sanitize, LabelMode::raw}) {
    TextBuffer stats;
    write_stats(stats, collect_stats(metrics, fleet, models, backends, keys));
    const Scrape sample = read_pages(
        stats.text(),
        std::string(PrometheusPage().render(metrics, fleet, ProcessStats{}, models, backends, keys, mode)), 0);
    CHECK(sample.fleet.uptime_s == 5);
    CHECK(sample.fleet.backends_healthy == 1);
    REQUIRE(sample.by_backend.size() == 1);
    CHECK(sample.by_backend[0].name == "b:1");
    CHECK(sample.by_backend[0].pending == 3);
    CHECK(sample.by_backend[0].ejected_why == "status_5xx");
    CHECK(sample.by_backend[0].ejected_seconds == 7);
    CHECK(sample.fleet.backends_ejected == 1);
    REQUIRE(sample.by_model.size() == 1);
    CHECK(sample.by_model[0].name == "<img src=x onerror=alert(1)>");
  }
}

ScrapedHistogram histogram(double upto_1, double upto_10, double all) {
  return {{{1.0, upto_1}, {10.0, upto_10}, {std::numeric_limits<double>::infinity(), all}}};
}

TEST_CASE("a quantile is interpolated within its bucket, as histogram_quantile() does") {
  struct Row {
    ScrapedHistogram given;
    double q;
    double expected;  // below 0: none
  };
  const std::vector<Row> rows{
      {histogram(10, 10, 10), 0.5, 0.5},    {histogram(0, 10, 10), 0.5, 5.5},      {histogram(5, 10, 10), 0.5, 1.0},
      {histogram(0, 0, 10), 0.5, INFINITY}, {histogram(9, 9, 10), 0.95, INFINITY}, {histogram(0, 0, 0), 0.5, -1},
      {ScrapedHistogram{}, 0.5, -1},
  };
  for (const Row& row : rows) {
    const std::optional<double> got = quantile(row.given, row.q);
    CHECK(got.has_value() == (row.expected >= 0));
    if (got && std::isinf(row.expected)) CHECK(std::isinf(*got));
    if (got && !std::isinf(row.expected)) CHECK(*got == doctest::Approx(row.expected));
  }
}

TEST_CASE("rates and quantiles are of the time between, totals of all time") {
  const std::string labels = "model=\"llama3_70b\",backend=\"gpu_1\"";
  const Scrape before = read_pages(kStats, buckets(labels, 20, 20, 20), 0);
  std::string later = kStats;
  later.replace(later.find("\"total\":30"), 10, "\"total\":50");
  later.replace(later.find("\"requests\":20"), 13, "\"requests\":40");
  later.replace(later.find("\"completion_tokens\":400"), 23, "\"completion_tokens\":500");
  const Scrape after = read_pages(later, buckets(labels, 20, 40, 40), 10 * kSecond);
  const Rates rates = compute_rates(before, after);
  CHECK(rates.seconds == doctest::Approx(10));
  CHECK(rates.all.now.requests == 50);
  CHECK(rates.all.requests_per_s == doctest::Approx(2));
  CHECK(rates.all.tokens_per_s == doctest::Approx(10));
  CHECK(rates.all.now.pending == 2);
  CHECK(*rates.all.p50_s == doctest::Approx(5.5));  // all twenty of the window lie between 1 and 10
  CHECK(rates.by_backend[0].requests_per_s == doctest::Approx(2));
  CHECK(rates.by_backend[1].requests_per_s == doctest::Approx(0));
  CHECK_FALSE(rates.by_backend[1].p50_s.has_value());
}

TEST_CASE("after a restart the new process's own time counts") {
  const Scrape before = read_pages(kStats, "", 0);
  std::string later = kStats;
  later.replace(later.find("\"uptime_seconds\":100"), 20, "\"uptime_seconds\":5");
  const Rates rates = compute_rates(before, read_pages(later, "", 20 * kSecond));
  CHECK(rates.seconds == doctest::Approx(5));
  CHECK(rates.all.requests_per_s == doctest::Approx(6));
}

TEST_CASE("the page says what is so, in columns, and fits a screen") {
  Rates rates = compute_rates(start_of(read_pages(kStats, "", 0)),
                              read_pages(kStats, buckets("model=\"llama3_70b\",backend=\"gpu_1\"", 10, 18, 20), 0));
  rates.fleet.backends = 2;
  rates.fleet.backends_healthy = 1;
  const std::string page = page_of(rates, "http://x:1", {0, 0});
  CHECK(page ==
        "nexus at http://x:1, up 1m 40s; last 100 s:\n"
        "backends 1 of 2 healthy   models 0   connections 0   requests 30   errors 3 (10.00%)\n"
        "0.30 req/s   0.03 err/s   pending 2   queue 0   4.40 tok/s\n"
        "p95: requests >5 min   first token -   queue -   nexus itself -\n"
        "\n"
        "BACKEND  STATE  PENDING  QUEUE  REQ/S  ERR/S     P50     P95  FIRST  TOK/S  REQUESTS  ERRORS\n"
        "gpu-1    up           2      0   0.20   0.01  1.00 s  >5 min      -   4.00        20       1\n"
        "gpu-2    DOWN         0      0   0.10   0.02       -       -      -   0.40        10       2\n"
        "\n"
        "MODEL       REQ/S  ERR/S     P50     P95  FIRST  TOK/S  REQUESTS  ERRORS\n"
        "llama3:70b   0.30   0.03  1.00 s  >5 min      -   4.40        30       3\n");
  const std::string small = page_of(rates, "http://x:1", {20, 9});
  CHECK(std::count(small.begin(), small.end(), '\n') == 9);
  CHECK(small.find(" more lines\n") != std::string::npos);
  for (std::size_t at = 0; at < small.size(); at = small.find('\n', at) + 1) {
    CHECK(width_of(std::string_view(small).substr(at, small.find('\n', at) - at)) <= 20);
  }
}

TEST_CASE("keys have a table if there are some, and it fits 80 columns") {
  const auto with_keys = [](const char* keys) {
    return kStats.substr(0, kStats.size() - 1) + R"(,"keys":[)" + keys + "]}";
  };
  const std::string stats =
      with_keys(R"({"name":"al.ice","requests":20,"errors":1,"pending":2,"prompt_tokens":50,"completion_tokens":400},)"
                R"({"name":"none","requests":10,"errors":2,"pending":0,"prompt_tokens":5,"completion_tokens":40})");
  const auto waits = [](const char* sum, const char* count) {
    const std::string wait = "nexus_key_queue_wait_seconds_";
    return wait + "sum{key=\"al_ice\"} " + sum + "\n" + wait + "count{key=\"al_ice\"} " + count + "\n";
  };
  const Rates since_start = compute_rates(start_of(read_pages(stats, "", 0)), read_pages(stats, waits("6", "4"), 0));
  const std::string page = page_of(since_start, "http://x:1", {80, 24});
  CHECK(page.substr(page.find("\nKEY")) ==
        "\nKEY     PENDING  REQ/S  ERR/S    WAIT  TOK/S  REQUESTS  ERRORS  TOKENS\n"
        "al.ice        2   0.20   0.01  1.50 s   4.00        20       1     450\n"
        "none          0   0.10   0.02       -   0.40        10       2      45\n");
  CHECK(page_of(since_start, "http://x:1", {80, 10}).find(" more lines\n") != std::string::npos);
  const Scrape before = read_pages(stats, waits("6", "4"), 0), after = read_pages(stats, waits("7", "8"), kSecond);
  CHECK(*compute_rates(before, after).by_key[0].wait_s == doctest::Approx(0.25));
  CHECK(page_of(compute_rates(before, read_pages(kStats, "", kSecond)), "x", {0, 0}).find("KEY") == std::string::npos);
  CHECK_FALSE(read_scrape(with_keys(R"({"requests":1})"), "", 0));
}

TEST_CASE("an ejected backend is shown with the time that is left and the reason") {
  Rates rates;
  rates.fleet.backends = rates.fleet.backends_healthy = 3;
  rates.fleet.backends_ejected = 2;
  for (const char* why : {"", "connect_error", "\x1b[0m"}) {
    RateRow row;
    row.now.name = "b";
    row.now.ejected_why = why;
    row.now.ejected_seconds = 65;
    rates.by_backend.push_back(row);
  }
  const std::string page = page_of(rates, "http://x:1", {0, 0});
  CHECK(page.find("backends 3 of 3 healthy, 2 ejected   models") != std::string::npos);
  CHECK(page.find("b        up  ") != std::string::npos);
  CHECK(page.find("ejected 1m 5s: connect_error  ") != std::string::npos);
  CHECK(page.find('\x1b') == std::string::npos);
  rates.by_backend[1].now.healthy = false;
  CHECK(page_of(rates, "http://x:1", {0, 0}).find("b        DOWN  ") != std::string::npos);
}

TEST_CASE(
    "on 80 columns names shrink first, then columns go; a reason stands below its backend; rows are sorted and "
    "scrolled") {
  Rates rates;
  for (int i = 0; i < 8; ++i) {
    RateRow row;
    row.now.name = "a-rather-long-name-of-a-gpu-server-in-rack-" + std::to_string(i);
    row.now.state = i == 3 ? "down" : "up";
    row.now.state_seconds = 185;
    row.now.why = i == 3 ? "connect: Connection refused" : "";
    row.requests_per_s = i;
    rates.by_backend.push_back(row);
  }
  const std::string page = page_of(rates, "http://x:1", {80, 0});
  CHECK(page.find("\na-rather-lon") != std::string::npos);
  CHECK(page.find(" DOWN 3m 5s ") != std::string::npos);
  CHECK(page.find("\n  connect: Connection refused\n") != std::string::npos);
  for (const char* title : {" STATE ", " PENDING ", " REQ/S ", " ERR/S ", " P95"})
    CHECK(page.find(title) != std::string::npos);
  const std::string wide = page_of(rates, "http://x:1", {200, 0});
  CHECK(wide.find("in-rack-7  up") != std::string::npos);
  CHECK(wide.find("REQUESTS  ERRORS\n") != std::string::npos);
  const auto first_of = [](const std::string& text) { return text.substr(text.find("in-rack-"), 9); };
  CHECK(first_of(wide) == "in-rack-0");
  CHECK(first_of(page_of(rates, "http://x:1", {200, 0, 1})) == "in-rack-7");  // by req/s
  CHECK(first_of(page_of(rates, "http://x:1", {200, 12, 0, 4})) == "in-rack-2");
  CHECK(page_of(rates, "http://x:1", {200, 12, 0, 4}).starts_with("nexus at"));
}

TEST_CASE("scrolling ends where the last line is seen, so that one step back moves the page at once") {
  Rates rates;
  for (int i = 0; i < 8; ++i) rates.by_backend.emplace_back().now.name = "b" + std::to_string(i);
  TopView view{80, 12, 0, 1000};
  const std::string last = top_page(rates, "http://x:1", view);
  CHECK(view.scrolled < 20);
  CHECK(last.find("more lines") == std::string::npos);
  view.scrolled -= 1;
  CHECK_NE(top_page(rates, "http://x:1", view), last);
}

TEST_CASE("a hostile name is shown escaped") {
  Rates rates;
  for (const char* name : {"\x1b]0;owned\a", "a\nb\rc",
                           "\xc2\x9b"
                           "31m",
                           "\xff\xfe",
                           "\xe2\x80\xae"
                           "evil"}) {
    RateRow row;
    row.now.name = name;
    rates.by_backend.push_back(row);
    rates.by_model.push_back(row);
  }
  const std::string page = page_of(rates, "http://x\x1b[0m", {0, 0});
  for (const char c : page) CHECK((static_cast<unsigned char>(c) >= 0x20 || c == '\n'));
  CHECK(page.find("\xc2\x9b") == std::string::npos);
  CHECK(page.find("\xe2\x80\xae") == std::string::npos);
  CHECK(page.find("\\u001b]0;owned\\u0007") != std::string::npos);
  CHECK(std::count(page.begin(), page.end(), '\n') == 5 + 6 + 1 + 6);
}

TEST_CASE("a page of anything, cut anywhere, is read without harm") {
  const std::string metrics =
      "nexus_backends_total 1e300\nnexus_client_connections -1e300\nnexus_queue_depth{backend=\"gpu_1\"} +Inf\n"
      "nexus_models_available NaN\nnexus_backends_healthy inf\n"
      "nexus_request_duration_seconds_bucket{model=\"llama3_70b\",backend=\"gpu_1\",le=\"nan\"} 4\n"
      "nexus_request_duration_seconds_bucket{model=\"llama3_70b\",backend=\"gpu_1\",le=\"1e308\"} 4\n"
      "nexus_request_duration_seconds_bucket{model=\"llama3_70b\",backend=\"gpu_1\",le=\"+Inf\"} 4\n";
  for (std::size_t end = 0; end <= metrics.size(); ++end) {
    const Scrape sample = read_pages(kStats, std::string_view(metrics).substr(0, end), 0);
    CHECK(sample.fleet.backends < 1'000'000);
    CHECK(page_of(compute_rates(start_of(sample), sample), "x", {0, 0}).size() < 4000);
  }
  for (std::size_t end = 0; end < kStats.size(); ++end) {
    CHECK_FALSE(read_scrape(std::string_view(kStats).substr(0, end), "", 0));
  }
}

TEST_CASE("numbers keep about three digits") {
  CHECK(rate_text(0) == "0");
  CHECK(rate_text(0.004) == "0");
  CHECK(rate_text(1.234) == "1.23");
  CHECK(rate_text(12.34) == "12.3");
  CHECK(rate_text(1234.5) == "1234");
  CHECK(seconds_text(0.0042) == "4.2 ms");
  CHECK(seconds_text(0.342) == "342 ms");
  CHECK(seconds_text(1.5) == "1.50 s");
  CHECK(seconds_text(42.44) == "42.4 s");
  CHECK(seconds_text(std::nullopt) == "-");
  CHECK(span_text(7) == "7s");
  CHECK(span_text(90061) == "1d 1h");
}

}  // namespace
