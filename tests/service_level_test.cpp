// service_level_test.cpp
// Goal:   each request for a stream is judged once, by the rule that nexus.conf(5) states, and no other request is.
// Method: the rule as rows of records; then whole courses on a gateway with simulated time: both sides of each level,
//         each way to fail, and what the access log and /metrics tell of it.
#include "nexus/metrics/service_level.h"

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tests/lib/courses.h"

using namespace courses;

namespace {

// ---- the rule ----

struct RuleRow {
  const char* name;
  SloSettings levels;
  RequestRecord record;
  Ns first_ns;
  Slo expected;
};

constexpr SloSettings kBoth{.ttft_ns = 2 * kSecond, .tpot_ns = 100 * kMillisecond};
constexpr SloSettings kFirstOnly{.ttft_ns = 2 * kSecond};
constexpr SloSettings kRateOnly{.tpot_ns = 100 * kMillisecond};

RequestRecord served(Ns per_token_ns = -1) { return {.status = 200, .stream = true, .per_token_ns = per_token_ns}; }
RequestRecord failed(std::uint16_t status, ErrorType error, bool by_client = false) {
  return {.status = status, .error = error, .by_client = by_client};
}

// ---- whole courses ----

const std::string kHead = "HTTP/1.1 200 OK\r\n" + kChunks;
const std::string kNoModel = R"({"model":"nobody","stream":true,"messages":[]})";
const std::string kForSpare = R"({"model":"spare","stream":true,"messages":[]})";

struct CourseRow {
  const char* name;
  const char* met;  // as the access log has it
  std::function<void(Scene&, Peer&)> go;
};

// Two levels: 1 s, and 100 ms a token. The answer of kLast has five tokens.
void with_levels(Settings& settings) {
  settings.slo = {.ttft_ns = kSecond, .tpot_ns = 100 * kMillisecond};
  settings.upstream.first_byte_timeout_ns = settings.upstream.stall_timeout_ns = 3 * kSecond;
  settings.server.write_timeout_ns = 2 * kSecond;
}

// A stream whose first token comes after `first`, and its last after `rest` more.
std::function<void(Scene&, Peer&)> stream(Ns first, Ns rest, const std::string& body = sim::kAskStream) {
  return [=](Scene& scene, Peer& client) {
    scene.say(client, ask(body));
    scene.say_after(first, 1, kHead + kToken);
    scene.say_after(rest, 1, kLast + kDone);
  };
}
std::function<void(Scene&, Peer&)> just(const std::string& text) {
  return [=](Scene& scene, Peer& client) { scene.say(client, text); };
}
std::vector<CourseRow> course_rows() {
  return {
      {"a stream at both levels", "yes", stream(kSecond, 400 * kMillisecond)},
      {"a stream that begins a moment too late", "no", stream(kSecond + 10 * kMillisecond, 0)},
      {"a stream whose tokens come a moment too slowly", "no", stream(kMillisecond, 410 * kMillisecond)},
      {"a stream without counts is judged by its first token", "yes",
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.say_after(kSecond, 1, kHead + kToken);
         scene.say_after(2 * kSecond, 1, kToken + kDone);
       }},
      {"a comment is no token", "no",
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.say_after(0, 1, kHead + chunk(": hold on\n\n"));
         scene.say_after(kSecond + 10 * kMillisecond, 1, kToken + kLast + kDone);
       }},
      {"a plain answer to a request for a stream is judged by its first byte", "yes",
       plain(ask(sim::kAskStream), 1, answer(kUsage))},
      {"a request for a plain answer", "-", plain(ask(sim::kAsk))},
      {"a plain answer that fails", "-", plain(ask(ask_for("spare")), 3, answer("{}", "500 Internal Server Error"))},
      {"embeddings have no stream", "-",
       plain(ask(R"({"model":"m","stream":true})", kFree, "/v1/embeddings"), 1, answer(kUsage))},
      {"Ollama streams unless it is told not to", "yes",
       plain(ask(R"({"model":"m"})", kFree, "/api/generate"), 2,
             answer(R"({"done":true,"eval_count":1,"prompt_eval_count":1})"))},
      {"a stream that breaks off", "no",
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.say_after(kMillisecond, 1, kHead + kToken);
         scene.net.break_off(*scene.backend(1));
         scene.settle();
       }},
      {"a stream that tells an error", "no",
       plain(ask(R"({"model":"spare","stream":true,"messages":[]})"), 3,
             kHead + chunk("data: {\"error\":{}}\n\n") + "0\r\n\r\n")},
      {"a backend that answers with 500", "no", plain(ask(kForSpare), 3, answer("{}", "500 Internal Server Error"))},
      {"a backend that says nothing in time", "no",
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(kForSpare));
         scene.pass(4 * kSecond);
       }},
      {"a backend that answers a client's mistake with 422", "-",
       plain(ask(kForSpare), 3, answer("{}", "422 Unprocessable Entity"))},
      {"a model that nobody has", "-", just(ask(kNoModel))},
      {"a body that is no JSON", "-", just(ask("{"))},
      {"a request without a key", "-", just(ask(sim::kAskStream, ""))},
      {"a client that leaves before its stream begins", "-",
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.pass(2 * kSecond);
         scene.net.break_off(client);
         scene.settle();
       }},
      {"a client that leaves a late stream", "-",
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.say_after(2 * kSecond, 1, kHead + kToken);
         scene.net.break_off(client);
         scene.settle();
       }},
      {"a client that reads nothing for write_timeout", "-",
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.net.stop_reading(client, 20);
         scene.say_after(kMillisecond, 1, kHead + kToken + kToken + kToken);
         scene.pass(3 * kSecond);
       }},
      {"a retry that is in time", "yes",
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.pass(500 * kMillisecond);
         scene.net.break_off(*scene.backend(1));
         scene.settle();
         scene.say_after(400 * kMillisecond, 2, kHead + kToken + kLast + kDone);
       }},
      {"a retry that is late", "no",
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.pass(900 * kMillisecond);
         scene.net.break_off(*scene.backend(1));
         scene.settle();
         scene.say_after(200 * kMillisecond, 2, kHead + kToken + kLast + kDone);
       }},
  };
}

std::string field_of(const std::string& line, const std::string& name) {
  const std::size_t at = line.find(" " + name + "=");
  if (at == std::string::npos) return "absent";
  const std::size_t from = at + name.size() + 2;
  return line.substr(from, line.find_first_of(" \n", from) - from);
}

// The samples of the family, by their labels.
std::map<std::string, std::string> judged(Scene& scene, Peer& scraper) {
  std::map<std::string, std::string> samples;
  const std::string name = "nexus_slo_requests_total{";
  for (const std::string& line : scrape(scene, scraper)) {
    if (!line.starts_with(name)) continue;
    const std::size_t end = line.find("} ");
    samples[line.substr(name.size(), end - name.size())] = line.substr(end + 2);
  }
  return samples;
}

}  // namespace

TEST_CASE("a request is judged by the levels that there are, and not for what its client did") {
  const RuleRow rows[] = {
      {"both in time", kBoth, served(50 * kMillisecond), kSecond, Slo::met},
      {"exactly at both", kBoth, served(100 * kMillisecond), 2 * kSecond, Slo::met},
      {"a nanosecond late", kBoth, served(100 * kMillisecond), 2 * kSecond + 1, Slo::missed},
      {"a nanosecond slow", kBoth, served(100 * kMillisecond + 1), 2 * kSecond, Slo::missed},
      {"without a rate", kBoth, served(), kSecond, Slo::met},
      {"without a rate, and late", kBoth, served(), 3 * kSecond, Slo::missed},
      {"without a first token", kBoth, served(), -1, Slo::missed},
      {"slow, where only the first token counts", kFirstOnly, served(kSecond), kSecond, Slo::met},
      {"late, where only the rate counts", kRateOnly, served(kMillisecond), 9 * kSecond, Slo::met},
      {"without a rate, where only that counts", kRateOnly, served(), 9 * kSecond, Slo::none},
      {"failed, where only the rate counts", kRateOnly, failed(502, ErrorType::backend_error), -1, Slo::missed},
      {"too late for Nexus", kBoth, failed(504, ErrorType::timeout), -1, Slo::missed},
      {"a fault behind a token in time", kBoth, failed(200, ErrorType::backend_error), 1, Slo::missed},
      {"nobody healthy", kBoth, failed(503, ErrorType::no_healthy_backend), -1, Slo::missed},
      {"not HTTP", kBoth, failed(502, ErrorType::parse_error), -1, Slo::missed},
      {"no room", kBoth, failed(429, ErrorType::overloaded), -1, Slo::missed},
      {"no room for this key", kBoth, failed(429, ErrorType::overloaded, true), -1, Slo::none},
      {"cut by the end of a drain", kBoth, failed(200, ErrorType::drain), 1, Slo::missed},
      {"a redirection", kBoth, failed(302, ErrorType::other), -1, Slo::missed},
      {"a client that takes nothing", kBoth, failed(200, ErrorType::other, true), 1, Slo::none},
      {"the client's mistake", kBoth, failed(400, ErrorType::bad_request), -1, Slo::none},
      {"a model that nobody has", kBoth, failed(404, ErrorType::no_backend), -1, Slo::none},
      {"a client that left", kBoth, failed(499, ErrorType::client_closed), -1, Slo::none},
  };
  for (const RuleRow& row : rows) {
    CAPTURE(std::string(row.name));
    CHECK(judge(row.levels, row.record, row.first_ns) == row.expected);
  }
  RequestRecord left = served();
  left.disconnect = DisconnectPhase::streaming;
  CHECK(judge(kBoth, left, kSecond) == Slo::none);
}

TEST_CASE("each course of a request is judged as it ends, in the log and in the metrics") {
  for (const CourseRow& row : course_rows()) {
    CAPTURE(std::string(row.name));
    const auto rings = std::make_unique<sim::LogRings>();
    Scene scene(*rings, with_levels);
    Peer& scraper = scene.connect();
    Peer& client = scene.connect();
    row.go(scene, client);
    scene.pass(kSecond);
    const Lines log = take_log(*rings);
    REQUIRE(log.size() == 1);
    CAPTURE(log[0]);
    CHECK(field_of(log[0], "slo") == row.met);
    const std::string model = field_of(log[0], "model");
    std::map<std::string, std::string> expected;
    if (std::string_view(row.met) != "-") {
      for (const std::string met : {"yes", "no"}) {
        expected["model=\"" + model + "\",met=\"" + met + "\""] = met == row.met ? "1" : "0";
      }
    }
    CHECK(judged(scene, scraper) == expected);
  }
}

TEST_CASE("a key over its own limit is not judged, and no room for anybody is") {
  const auto rings = std::make_unique<sim::LogRings>();
  Scene scene(*rings, [](Settings& settings) {
    with_levels(settings);
    settings.server.api_keys[1].options.rpm = 1;
    settings.server.max_pending = 1;
  });
  Peer& limited = scene.connect();
  scene.say(limited, ask(sim::kAskStream, kLimited));
  scene.say(*scene.backend(1), kHead + kToken + kLast + kDone);
  scene.say(limited, ask(sim::kAskStream, kLimited));
  Peer& first = scene.connect();
  scene.say(first, ask(sim::kAskStream));
  Peer& second = scene.connect();
  scene.say(second, ask(sim::kAskStream));
  const Lines log = take_log(*rings);
  REQUIRE(log.size() == 3);
  CHECK(field_of(log[0], "slo") == "yes");
  CHECK(field_of(log[1], "status") == "429");
  CHECK(field_of(log[1], "slo") == "-");
  CHECK(field_of(log[2], "status") == "503");
  CHECK(field_of(log[2], "slo") == "no");
  scene.end();
  const Lines last = take_log(*rings);
  REQUIRE(last.size() == 1);
  CHECK(field_of(last[0], "error_type") == "drain");
  CHECK(field_of(last[0], "slo") == "no");
}

TEST_CASE("without a level there is no family, and no field in the log") {
  const auto rings = std::make_unique<sim::LogRings>();
  Scene scene(*rings);
  Peer& scraper = scene.connect();
  Peer& client = scene.connect();
  stream(kMillisecond, 0)(scene, client);
  const Lines log = take_log(*rings);
  REQUIRE(log.size() == 1);
  CHECK(field_of(log[0], "slo") == "absent");
  for (const std::string& line : scrape(scene, scraper)) CHECK(line.find("nexus_slo") == std::string::npos);
}

TEST_CASE("a request whose body was not read is not judged by the one before it on the connection") {
  const auto rings = std::make_unique<sim::LogRings>();
  Scene scene(*rings, with_levels);
  Peer& client = scene.connect();
  stream(kMillisecond, 0)(scene, client);
  scene.say(client, ask("{"));
  scene.say(client, ask(sim::kAsk));
  scene.say(*scene.backend(1), answer(kUsage));
  stream(kMillisecond, 0)(scene, client);
  scene.say(client, ask(sim::kAskStream, kFree + "Via: 1.1 " + sim::kInstance + "\r\n"));  // refused by its head alone
  const Lines log = take_log(*rings);
  REQUIRE(log.size() == 5);
  CHECK(field_of(log[0], "slo") == "yes");
  CHECK(field_of(log[1], "slo") == "-");
  CHECK(field_of(log[2], "slo") == "-");
  CHECK(field_of(log[3], "slo") == "yes");
  CHECK(field_of(log[4], "status") == "508");
  CHECK(field_of(log[4], "slo") == "-");
}
