// config_test.cpp
// Owns:     tests of every accepted and every refused form of nexus.conf; each refusal with its exact line and words.
// Leaves:   the manual and the example, which must agree with the table, to docs_test.cpp.

#include "nexus/config/changes.h"
#include "nexus/config/parser.h"

#include <doctest/doctest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <random>
#include <set>

using namespace nexus;

namespace {

using Texts = std::map<std::string, std::string>;

// An environment of given variables and files; a file that is not among them does not exist.
ConfigEnvironment fake_environment(Texts variables = {}, Texts files = {}) {
  const auto look_up = [](Texts texts) {
    return [texts = std::move(texts)](const std::string& name) -> std::optional<std::string> {
      const auto found = texts.find(name);
      return found == texts.end() ? std::nullopt : std::optional<std::string>(found->second);
    };
  };
  return {look_up(std::move(variables)), look_up(std::move(files))};
}

ConfigResult parse_as_it_is(std::string_view text) { return parse_config(text, "n", fake_environment()); }

// Adds a backend to a text that has none, because one is needed.
ConfigResult parse(std::string_view text) {
  const bool has_backend = text.find("[backend") != std::string_view::npos;
  return parse_as_it_is(has_backend ? std::string(text) : std::string(text) + "\n[backend any]\ntype = echo\n");
}

std::string all_messages(const ConfigResult& result) {
  std::string text;
  for (const ConfigError& error : result.errors) text += error.to_string() + "\n";
  return text;
}

struct Row {
  std::string text;
  std::string errors;  // each with its newline; empty: accepted
};

void check_rows(const std::vector<Row>& rows) {
  for (const Row& row : rows) {
    const std::string begin = row.text.substr(0, 300);
    CAPTURE(begin);
    CHECK_EQ(all_messages(parse(row.text)), row.errors);
  }
}

// The settings of a text that must be accepted.
Settings accepted(std::string_view text) {
  const ConfigResult result = parse(text);
  CAPTURE(text);
  CHECK_EQ(all_messages(result), "");
  return result.settings;
}

BackendSettings accepted_backend(const std::string& lines) {
  const Settings settings = accepted("[backend b]\n" + lines);
  REQUIRE_EQ(settings.backends.size(), 1);
  return settings.backends[0];
}

// `lines` behind a header and a url, so that the backend is complete but for what is tested: line 3 on.
std::string with_url(const std::string& lines) { return "[backend b]\nurl = http://h\n" + lines; }

std::string url_problem(const std::string& url) {
  BackendSettings backend;
  return config::parse_url(url, backend);
}

const std::string kServer = "[server]\n";
const std::string kModelName = "expected a model name (1 to 256 bytes, without commas and not `*`)";
const std::string kDuration = "expected a duration (with ms, s, m, h), ";
const std::string kSize = "expected a size (bytes, or with k, M, G), ";
const std::string kListen = "expected a numeric address:port, [v6]:port, *:port or localhost:port";

TEST_CASE("the descriptors that a configuration may need: one for each client, and one for its request at a backend") {
  const auto needed = [](const char* text, std::size_t threads) {
    const ConfigResult result = parse(text);
    REQUIRE(result.ok());
    return descriptors_needed(result.settings, threads);
  };
  const std::string two = "[server]\nmax_connections = 100\n[backend a]\ntype = echo\n[backend b]\ntype = echo\n";
  const std::uint64_t base = needed(two.c_str(), 1);
  CHECK(base >= 200);
  CHECK(base < 250);
  CHECK(needed(two.c_str(), 3) > base);
  CHECK(needed((two + "max_pending = 10\n").c_str(), 1) == base);  // the other backend has no cap
  const std::string capped = "[server]\nmax_connections = 100\n[backend a]\ntype = echo\nmax_pending = 20\n";
  CHECK(needed((capped + "[backend b]\ntype = echo\nmax_pending = 10\n").c_str(), 1) == base - 70);
  CHECK(needed((capped + "[backend b]\ntype = echo\nmax_pending = 999\n").c_str(), 1) == base);
  const std::string few =
      "[server]\nmax_connections = 100\nmax_pending = 5\n[backend a]\ntype = echo\n[backend b]\ntype = echo\n";
  CHECK(needed(few.c_str(), 1) == base - 95);
}

}  // namespace

TEST_CASE("a configuration without a backend is refused, at its last line") {
  const std::string why = ": no [backend NAME] section; at least one is needed\n";
  for (std::string_view text : {"", "\n", "\xEF\xBB\xBF", "# all comment"}) {
    CHECK_EQ(all_messages(parse_as_it_is(text)), "n:1" + why);
  }
  CHECK_EQ(all_messages(parse_as_it_is("[server]\nthreads = 2\n")), "n:2" + why);
  CHECK_EQ(all_messages(parse_as_it_is("[server]\nthreads = two\n")),
           "n:2: threads: expected a number, 0 to 256, not 'two'\n");
}

TEST_CASE("a configuration of only a backend has the default settings") {
  for (std::string_view text :
       {"", "\n", "\xEF\xBB\xBF", "\xEF\xBB\xBF\n", "# all comment", "  \t \r\n\r\n", "[server]", "\n[log]"}) {
    const Settings settings = accepted(text);
    CHECK(settings.server.listen == std::vector<HostPort>{{"127.0.0.1", 8000}});
    CHECK_EQ(settings.routing.weight_load, 30);
  }
}

TEST_CASE("idle_connections is automatic unless a number is given") {
  CHECK(accepted("").upstream.idle_connections == nexus::kAutomatic);
  CHECK(accepted("[upstream]\nidle_connections = auto\n").upstream.idle_connections == nexus::kAutomatic);
  CHECK(accepted("[upstream]\nidle_connections = 0\n").upstream.idle_connections == 0);
  CHECK(accepted("[upstream]\nidle_connections = 10000\n").upstream.idle_connections == 10'000);
  for (const char* text : {"automatic", "-1", "4294967295", "10001", ""}) {
    CHECK_FALSE(parse_as_it_is(std::string("[upstream]\nidle_connections = ") + text + "\n").ok());
  }
}

TEST_CASE("every key of a whole configuration arrives in its field") {
  const Settings s = accepted(R"(# a comment
[server]
listen = 0.0.0.0:80      # behind a value
listen=[::1]:81
threads = 3
max_connections = 5
max_body = 2M
body_memory = 4M
max_header = 8k
max_fields = 99
max_pending = 7
header_timeout = 1s
body_timeout = 2s
idle_timeout = 3s
write_timeout = 4s
drain_timeout = 5s
metrics_listen = localhost:9000
[upstream]
connect_timeout = 300ms
first_byte_timeout = 5m
stall_timeout = 1h
request_timeout = 9s
idle_connections = 11
idle_timeout = 12s
[health]
enabled = no
interval = 13s
timeout = 14s
failures = 15
recoveries = 16
eject_after = 17
eject_time = 18s
[routing]
strategy = least_pending
retries = 1
weight_priority = 2
weight_load = 3
weight_latency = 4
affinity = session
affinity_headers = X-A, b_c
affinity_slack = 7%
[queue]
size = 19
timeout = 20s
[metrics]
enabled = off
labels = raw
openmetrics = yes
[slo]
ttft = 2s
tpot = 100ms
[log]
level = debug
format = json
access = /var/log/nexus
[aliases]
gpt-4 = llama3:70b
[fallbacks]
llama3:70b = qwen2:72b, mixtral:8x7b
[backend gpu-1]
url = http://10.0.0.1:11434
type = ollama
priority = 21
models = a, b
max_pending = 22
stream_usage = as_is
vision = a
tools = all
json_mode = none
context_length = a 8k, b 100
)");
  CHECK(s.server.listen == std::vector<HostPort>{{"0.0.0.0", 80}, {"::1", 81}});
  CHECK(s.server.metrics_listen == std::vector<HostPort>{{"127.0.0.1", 9000}});
  CHECK_EQ(s.server.threads, 3);
  CHECK_EQ(s.server.max_connections, 5);
  CHECK_EQ(s.server.max_body_bytes, 2u << 20);
  CHECK_EQ(s.server.body_memory_bytes, 4u << 20);
  CHECK_EQ(s.server.max_header_bytes, 8192);
  CHECK_EQ(s.server.max_fields, 99);
  CHECK_EQ(s.server.max_pending, 7);
  CHECK_EQ(s.server.header_timeout_ns, 1 * kSecond);
  CHECK_EQ(s.server.body_timeout_ns, 2 * kSecond);
  CHECK_EQ(s.server.idle_timeout_ns, 3 * kSecond);
  CHECK_EQ(s.server.write_timeout_ns, 4 * kSecond);
  CHECK_EQ(s.server.drain_timeout_ns, 5 * kSecond);
  CHECK_EQ(s.upstream.connect_timeout_ns, 300 * kMillisecond);
  CHECK_EQ(s.upstream.first_byte_timeout_ns, 300 * kSecond);
  CHECK_EQ(s.upstream.stall_timeout_ns, 3600 * kSecond);
  CHECK_EQ(s.upstream.request_timeout_ns, 9 * kSecond);
  CHECK_EQ(s.upstream.idle_connections, 11);
  CHECK_EQ(s.upstream.idle_timeout_ns, 12 * kSecond);
  CHECK_FALSE(s.health.enabled);
  CHECK_EQ(s.health.interval_ns, 13 * kSecond);
  CHECK_EQ(s.health.timeout_ns, 14 * kSecond);
  CHECK_EQ(s.health.failures, 15);
  CHECK_EQ(s.health.recoveries, 16);
  CHECK_EQ(s.health.eject_after, 17);
  CHECK_EQ(s.health.eject_time_ns, 18 * kSecond);
  CHECK(s.routing.strategy == Strategy::least_pending);
  CHECK_EQ(s.routing.retries, 1);
  CHECK_EQ(s.routing.weight_priority, 2);
  CHECK_EQ(s.routing.weight_load, 3);
  CHECK_EQ(s.routing.weight_latency, 4);
  CHECK(s.routing.affinity == nexus::Affinity::session);
  CHECK(s.routing.affinity_headers == std::vector<std::string>{"x-a", "b_c"});
  CHECK_EQ(s.routing.affinity_slack, 7);
  CHECK_EQ(s.queue.size, 19);
  CHECK_EQ(s.queue.timeout_ns, 20 * kSecond);
  CHECK_FALSE(s.metrics.enabled);
  CHECK(s.metrics.labels == LabelMode::raw);
  CHECK(s.metrics.openmetrics);
  CHECK_EQ(s.slo.ttft_ns, 2 * kSecond);
  CHECK_EQ(s.slo.tpot_ns, 100 * kMillisecond);
  CHECK(s.log.level == LogLevel::debug);
  CHECK(s.log.format == LogFormat::json);
  CHECK_EQ(s.log.access, "/var/log/nexus");
  CHECK(s.aliases == std::vector<NamePair>{{"gpt-4", "llama3:70b"}});
  REQUIRE_EQ(s.fallbacks.size(), 1);
  CHECK_EQ(s.fallbacks[0].first, "llama3:70b");
  CHECK(s.fallbacks[0].second == std::vector<std::string>{"qwen2:72b", "mixtral:8x7b"});
  REQUIRE_EQ(s.backends.size(), 1);
  const BackendSettings& b = s.backends[0];
  CHECK_EQ(b.name, "gpu-1");
  CHECK(b.address == HostPort{"10.0.0.1", 11434});
  CHECK_EQ(b.base_path, "");
  CHECK(b.kind == BackendKind::ollama);
  CHECK_EQ(b.priority, 21);
  CHECK(b.models == std::vector<std::string>{"a", "b"});
  CHECK_EQ(b.max_pending, 22);
  CHECK(b.stream_usage == StreamUsage::as_is);
  CHECK((b.vision.stated && b.vision.models == std::vector<std::string>{"a"}));
  CHECK((b.tools.stated && b.tools.models == std::vector<std::string>{"*"}));
  CHECK((b.json_mode.stated && b.json_mode.models.empty()));
  REQUIRE_EQ(b.context_length.size(), 2);
  CHECK((b.context_length[0].model == "a" && b.context_length[0].tokens == 8192));
  CHECK((b.context_length[1].model == "b" && b.context_length[1].tokens == 100));
}

TEST_CASE("a configuration that spells out every default of the table equals the default one") {
  std::string text, section;
  for (const config::ConfigKey& row : config::kConfigKeys) {
    if (row.section == "backend" || row.default_text.empty()) continue;
    if (row.section != section) text += "[" + (section = row.section) + "]\n";
    text += std::string(row.key) + " = " + std::string(row.default_text) + "\n";
  }
  const Settings got = accepted(text), want;
  CHECK(got.server.listen == want.server.listen);
  CHECK_EQ(got.server.threads, want.server.threads);
  CHECK_EQ(got.server.max_connections, want.server.max_connections);
  CHECK_EQ(got.server.max_body_bytes, want.server.max_body_bytes);
  CHECK_EQ(got.server.body_memory_bytes, want.server.body_memory_bytes);
  CHECK_EQ(got.server.max_header_bytes, want.server.max_header_bytes);
  CHECK_EQ(got.server.max_fields, want.server.max_fields);
  CHECK_EQ(got.server.max_pending, want.server.max_pending);
  CHECK_EQ(got.server.header_timeout_ns, want.server.header_timeout_ns);
  CHECK_EQ(got.server.body_timeout_ns, want.server.body_timeout_ns);
  CHECK_EQ(got.server.idle_timeout_ns, want.server.idle_timeout_ns);
  CHECK_EQ(got.server.write_timeout_ns, want.server.write_timeout_ns);
  CHECK_EQ(got.server.drain_timeout_ns, want.server.drain_timeout_ns);
  CHECK_EQ(got.upstream.connect_timeout_ns, want.upstream.connect_timeout_ns);
  CHECK_EQ(got.upstream.first_byte_timeout_ns, want.upstream.first_byte_timeout_ns);
  CHECK_EQ(got.upstream.stall_timeout_ns, want.upstream.stall_timeout_ns);
  CHECK_EQ(got.upstream.request_timeout_ns, want.upstream.request_timeout_ns);
  CHECK_EQ(got.upstream.idle_connections, want.upstream.idle_connections);
  CHECK_EQ(got.upstream.idle_timeout_ns, want.upstream.idle_timeout_ns);
  CHECK_EQ(got.health.enabled, want.health.enabled);
  CHECK_EQ(got.health.interval_ns, want.health.interval_ns);
  CHECK_EQ(got.health.timeout_ns, want.health.timeout_ns);
  CHECK_EQ(got.health.failures, want.health.failures);
  CHECK_EQ(got.health.recoveries, want.health.recoveries);
  CHECK_EQ(got.health.eject_after, want.health.eject_after);
  CHECK_EQ(got.health.eject_time_ns, want.health.eject_time_ns);
  CHECK(got.routing.strategy == want.routing.strategy);
  CHECK_EQ(got.routing.retries, want.routing.retries);
  CHECK_EQ(got.routing.weight_priority, want.routing.weight_priority);
  CHECK_EQ(got.routing.weight_load, want.routing.weight_load);
  CHECK_EQ(got.routing.weight_latency, want.routing.weight_latency);
  CHECK(got.routing.affinity == want.routing.affinity);
  CHECK(got.routing.affinity_headers == want.routing.affinity_headers);
  CHECK_EQ(got.routing.affinity_slack, want.routing.affinity_slack);
  CHECK_EQ(got.queue.size, want.queue.size);
  CHECK_EQ(got.queue.timeout_ns, want.queue.timeout_ns);
  CHECK(got.keys.defaults == want.keys.defaults);
  CHECK_EQ(got.metrics.enabled, want.metrics.enabled);
  CHECK(got.metrics.labels == want.metrics.labels);
  CHECK_EQ(got.metrics.openmetrics, want.metrics.openmetrics);
  CHECK_EQ(got.slo.ttft_ns, want.slo.ttft_ns);
  CHECK_EQ(got.slo.tpot_ns, want.slo.tpot_ns);
  CHECK(got.log.level == want.log.level);
  CHECK(got.log.format == want.log.format);
  CHECK_EQ(got.log.access, want.log.access);
}

TEST_CASE("a backend's defaults in the table are those of its settings") {
  std::string text;
  for (const config::ConfigKey& row : config::kConfigKeys) {
    if (row.section != "backend" || row.default_text.empty() || row.key == "token_delay") continue;
    text += std::string(row.key) + " = " + std::string(row.default_text) + "\n";
  }
  const ConfigEnvironment environment = fake_environment({}, {{"/etc/ssl/cert.pem", "-----BEGIN"}});
  const ConfigResult result = nexus::parse_config("[backend b]\nurl = https://h\n" + text, "n", environment);
  REQUIRE_EQ(all_messages(result), "");
  const BackendSettings got = result.settings.backends.front(), want;
  CHECK(got.tls.verify == want.tls.verify);
  CHECK(got.tls.ca_file.path == want.tls.ca_file.path);
  CHECK(got.kind == want.kind);
  CHECK_EQ(got.priority, want.priority);
  CHECK_EQ(got.max_pending, want.max_pending);
  CHECK(got.stream_usage == want.stream_usage);
  CHECK_FALSE(got.vision.stated);
  CHECK_EQ(accepted_backend("type = echo\ntoken_delay = 20ms").token_delay_ns, want.token_delay_ns);
}

TEST_CASE("no key is in the table twice, and every row says its range") {
  std::set<std::pair<std::string_view, std::string_view>> keys;
  for (const config::ConfigKey& row : config::kConfigKeys) {
    CHECK(keys.emplace(row.section, row.key).second);
    CHECK_FALSE(row.range.empty());
  }
  CHECK_GE(keys.size(), 54);
}

TEST_CASE("each counted key takes its least and its most and refuses one below and one above") {
  struct Limit {
    std::string_view section, key, least, most, below, above;
  };
  const std::vector<Limit> limits{
      {"server", "threads", "0", "256", "", "257"},
      {"server", "max_connections", "1", "1000000", "0", "1000001"},
      {"server", "max_body", "1024", "256M", "1023", ""},
      {"server", "body_memory", "67108864", "1024G", "1023", "1099511627777"},
      {"server", "max_header", "1k", "65536", "1023", "65537"},
      {"server", "max_fields", "16", "256", "15", "257"},
      {"server", "max_pending", "0", "1000000", "", "1000001"},
      {"server", "header_timeout", "1ms", "24h", "0", "86400001ms"},
      {"server", "body_timeout", "1ms", "1440m", "0ms", "86401s"},
      {"server", "idle_timeout", "1ms", "86400s", "0", "1441m"},
      {"server", "write_timeout", "1ms", "24h", "0", "25h"},
      {"server", "drain_timeout", "1ms", "24h", "0", "86400001ms"},
      {"upstream", "connect_timeout", "1ms", "24h", "0", "86400001ms"},
      {"upstream", "first_byte_timeout", "1ms", "24h", "0", "86400001ms"},
      {"upstream", "stall_timeout", "1ms", "24h", "0", "86400001ms"},
      {"upstream", "head_delay", "0", "24h", "", "86400001ms"},
      {"upstream", "request_timeout", "0", "24h", "", "86400001ms"},
      {"upstream", "idle_timeout", "1ms", "24h", "0", "86400001ms"},
      {"health", "interval", "1ms", "24h", "0", "86400001ms"},
      {"health", "timeout", "1ms", "24h", "0", "86400001ms"},
      {"health", "failures", "1", "100", "0", "101"},
      {"health", "recoveries", "1", "100", "0", "101"},
      {"health", "eject_after", "1", "1000", "0", "1001"},
      {"health", "eject_time", "1ms", "24h", "0", "86400001ms"},
      {"routing", "retries", "0", "10", "", "11"},
      {"routing", "weight_priority", "0", "100", "", "101"},
      {"routing", "weight_load", "0", "100", "", "101"},
      {"routing", "weight_latency", "0", "100", "", "101"},
      {"routing", "affinity_slack", "0%", "1000%", "25", "1001%"},
      {"queue", "size", "0", "1000000", "", "1000001"},
      {"queue", "timeout", "1ms", "24h", "0", "86400001ms"},
      {"metrics", "keys", "0", "10000", "", "10001"},
      {"slo", "ttft", "0", "24h", "", "86400001ms"},
      {"slo", "tpot", "0", "24h", "", "86400001ms"},
      {"keys", "weight", "1", "1000", "0", "1001"},
      {"keys", "priority", "0", "100", "", "101"},
      {"keys", "max_pending", "0", "1000000", "", "1000001"},
      {"keys", "rpm", "0", "1000M", "", "1000000001"},
      {"keys", "tpm", "0", "1000000k", "", "1000000001"},
      {"keys", "admin", "0", "1", "", "2"},
      {"backend b", "priority", "0", "100", "", "101"},
      {"backend b", "max_pending", "0", "1000000", "", "1000001"},
      {"backend b", "context_length", "1", "1G", "0", "1073741825"},
  };
  for (const Limit& limit : limits) {
    CAPTURE(limit.key);
    const std::string head = "[" + std::string(limit.section) + "]\n";
    const std::string url = limit.section == "backend b" ? "url = http://h\n" : "";
    const auto errors_of = [&](std::string_view value) {
      return parse(head + std::string(limit.key) + " = " + std::string(value) + "\n" + url).errors;
    };
    CHECK(errors_of(limit.least).empty());
    CHECK(errors_of(limit.most).empty());
    for (std::string_view value : {limit.below, limit.above}) {
      if (value.empty()) continue;
      CAPTURE(value);
      const auto errors = errors_of(value);
      REQUIRE_EQ(errors.size(), 1);
      CHECK_EQ(errors[0].line, 2);
      CHECK_EQ(errors[0].message.substr(0, limit.key.size() + 11), std::string(limit.key) + ": expected ");
      CHECK(errors[0].message.find(", not '" + std::string(value) + "'") != std::string::npos);
    }
  }
  std::size_t counted = 0;
  for (const config::ConfigKey& row : config::kConfigKeys) {
    for (const auto& kind : {config::kNumber, config::kPerMinute, config::kPercent, config::kSize, config::kDuration})
      counted += row.kind.parse == kind.parse;
  }
  CHECK_EQ(counted, limits.size());  // context_length is in the rows only, token_delay in its own test
}

TEST_CASE("max_body and echo's token_delay have limits of their own") {
  CHECK_EQ(accepted("[server]\nmax_body = 1G\nbody_memory = 1G").server.max_body_bytes, 1u << 30);
  CHECK_EQ(accepted_backend("type = echo\ntoken_delay = 0").token_delay_ns, 0);
  CHECK_EQ(accepted_backend("type = echo\ntoken_delay = 24h").token_delay_ns, 86'400 * kSecond);
  check_rows({
      {"[server]\nmax_body = 1073741825\nbody_memory = 2G", "n:2: max_body: " + kSize + "1k to 1G, not '1073741825'\n"},
      {"[backend b]\ntype = echo\ntoken_delay = 86400001ms",
       "n:3: token_delay: " + kDuration + "0, or 1ms to 24h, not '86400001ms'\n"},
  });
}

TEST_CASE("numbers, sizes and durations are read in full or not at all") {
  using config::parse_duration, config::parse_number, config::parse_size, config::parse_yes_no;
  struct Number {
    std::string_view text;
    std::optional<std::uint64_t> number, size, duration;
  };
  const std::vector<Number> rows{
      {"0", 0, 0, 0},
      {"00", 0, 0, {}},
      {"7", 7, 7, {}},
      {"18446744073709551615", {}, {}, {}},
      {"18446744073709551616", {}, {}, {}},
      {"99999999999999999999999", {}, {}, {}},
      {"9223372036854775807", INT64_MAX, INT64_MAX, {}},
      {"9223372036854775808", {}, {}, {}},
      {"1k", {}, 1024, {}},
      {"1K", {}, 1024, {}},
      {"10M", {}, 10u << 20, {}},
      {"10m", {}, 10u << 20, 600ull * kSecond},
      {"2G", {}, 2ull << 30, {}},
      {"8589934591G", {}, 8589934591ull << 30, {}},
      {"8589934592G", {}, {}, {}},
      {"300ms", {}, {}, 300ull * kMillisecond},
      {"0ms", {}, {}, 0},
      {"30s", {}, {}, 30ull * kSecond},
      {"1h", {}, {}, 3600ull * kSecond},
      {"2562047h", {}, {}, 2562047ull * 3600 * kSecond},
      {"2562048h", {}, {}, {}},
      {"", {}, {}, {}},
      {"k", {}, {}, {}},
      {"ms", {}, {}, {}},
      {"s", {}, {}, {}},
      {"-1", {}, {}, {}},
      {"+1", {}, {}, {}},
      {"1.5", {}, {}, {}},
      {"1 k", {}, {}, {}},
      {"1 s", {}, {}, {}},
      {"1kb", {}, {}, {}},
      {"1us", {}, {}, {}},
      {"1S", {}, {}, {}},
      {"0x10", {}, {}, {}},
      {"1_000", {}, {}, {}},
      {std::string_view("1\0", 2), {}, {}, {}},
  };
  for (const Number& row : rows) {
    CAPTURE(row.text);
    CHECK(parse_number(row.text) == row.number);
    CHECK(parse_size(row.text) == row.size);
    CHECK(parse_duration(row.text) == row.duration);
  }
  for (std::string_view text : {"yes", "true", "on"}) CHECK(parse_yes_no(text) == 1u);
  for (std::string_view text : {"no", "false", "off"}) CHECK(parse_yes_no(text) == 0u);
  for (std::string_view text : {"", "1", "0", "Yes", "y", "yes "}) CHECK_FALSE(parse_yes_no(text));
}

TEST_CASE("only whole characters of UTF-8 are plain text, and a quotation is cut between two of them") {
  using config::is_plain_text, config::in_quotes;
  for (std::string_view text : {"", "a\tb", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80",
                                "\xEF\xBF\xBF", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"}) {
    CAPTURE(text);
    CHECK(is_plain_text(text));
  }
  for (std::string_view text : {"\x01", "\x1f", "\x7f", "\x80", "\xC0\x80", "\xC1\xBF", "\xC2", "\xC2 ", "\xE0\x9F\xBF",
                                "\xED\xA0\x80", "\xED\xBF\xBF", "\xE2\x82", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80",
                                "\xF5\x80\x80\x80", "\xF0\x90\x80", "\xFF", "ok\xC3"}) {
    CAPTURE(text);
    CHECK_FALSE(is_plain_text(text));
  }
  const std::string fits(kMaxQuotedBytes, 'x'), one_less(kMaxQuotedBytes - 1, 'x');
  CHECK_EQ(in_quotes(fits), "'" + fits + "'");
  CHECK_EQ(in_quotes(fits + "x"), "'" + fits + "...'");
  CHECK_EQ(in_quotes(one_less + "\xC3\xA9"), "'" + one_less + "...'");
  CHECK_EQ(in_quotes(one_less.substr(1) + "\xC3\xA9"), "'" + one_less.substr(1) + "\xC3\xA9'");
  CHECK_EQ(in_quotes("a\nb\x7f"), "'a?b?'");
}

TEST_CASE("every word of a choice is its value of the enum") {
  const std::vector<std::pair<std::string, BackendKind>> kinds{
      {"ollama", BackendKind::ollama},     {"vllm", BackendKind::vllm},     {"llamacpp", BackendKind::llamacpp},
      {"lmstudio", BackendKind::lmstudio}, {"openai", BackendKind::openai}, {"exo", BackendKind::exo},
      {"generic", BackendKind::generic}};
  for (const auto& [word, kind] : kinds) CHECK(accepted_backend("url = http://h\ntype = " + word).kind == kind);
  CHECK(accepted_backend("type = echo").kind == BackendKind::echo);
  const std::vector<std::pair<std::string, Strategy>> strategies{{"smart", Strategy::smart},
                                                                 {"round_robin", Strategy::round_robin},
                                                                 {"priority", Strategy::priority},
                                                                 {"random", Strategy::random},
                                                                 {"least_pending", Strategy::least_pending}};
  for (const auto& [word, value] : strategies) {
    CHECK(accepted("[routing]\nstrategy = " + word).routing.strategy == value);
  }
  const std::vector<std::pair<std::string, LogLevel>> levels{
      {"error", LogLevel::error}, {"warning", LogLevel::warning}, {"info", LogLevel::info}, {"debug", LogLevel::debug}};
  for (const auto& [word, value] : levels) CHECK(accepted("[log]\nlevel = " + word).log.level == value);
  for (const auto& [word, value] : std::vector<std::pair<std::string, StreamUsage>>{
           {"by_kind", StreamUsage::by_kind}, {"ask", StreamUsage::ask}, {"as_is", StreamUsage::as_is}}) {
    CHECK(accepted_backend("url = http://h\nstream_usage = " + word).stream_usage == value);
  }
  CHECK(accepted("[metrics]\nlabels = sanitize").metrics.labels == LabelMode::sanitize);
  CHECK(accepted("[log]\nformat = text").log.format == LogFormat::text);
  check_rows({
      {"[routing]\nstrategy = fast",
       "n:2: strategy: expected one of smart, round_robin, priority, random, least_pending, not 'fast'\n"},
      {"[log]\nlevel = Info",
       "n:2: level: expected one of error, warning, info, debug, not 'Info'; did you mean info?\n"},
      {"[log]\nformat = text, json", "n:2: format: expected one of text, json, not 'text, json'\n"},
      {"[health]\nenabled = maybe", "n:2: enabled: expected yes or no, not 'maybe'\n"},
  });
}

TEST_CASE("affinity_headers are names of fields that do not differ in each request") {
  const std::string head = "[routing]\naffinity_headers = ", why = "n:2: affinity_headers: ";
  CHECK(accepted(head + "none").routing.affinity_headers.empty());
  check_rows({
      {head + "X-Request-ID", why + "'X-Request-ID' differs in each request\n"},
      {head + "a, x-client-request-id", why + "'x-client-request-id' differs in each request\n"},
      {head + "a, A", why + "'A' is listed twice\n"},
      {head + "a b", why + "expected names of header fields, not 'a b'\n"},
      {head + "a,", why + "expected a name before and after every comma\n"},
      {head + std::string(65, 'a'), why + "expected names of header fields, not '" + std::string(60, 'a') + "...'\n"},
  });
  std::string many = "h0";
  for (int i = 1; i < 33; ++i) many += ", h" + std::to_string(i);
  check_rows({{head + many, why + "expected at most 32 names\n"}});
}

TEST_CASE("a line that is neither a section nor a pair is refused with its number") {
  check_rows({
      {"threads = 3", "n:1: 'threads' is outside any section; put a line like [server] above it\n"},
      {"[server]\nthreads", "n:2: expected `key = value` or `[section]`\n"},
      {"[server]\n= 3", "n:2: expected `key = value` or `[section]`\n"},
      {"[server]\n\n# c\nthreads =", "n:4: threads: expected a number, 0 to 256\n"},
      {"[server]\nthreads = # 3", "n:2: threads: expected a number, 0 to 256\n"},
      {"[server]\nthreads = 3#4", "n:2: threads: expected a number, 0 to 256, not '3#4'\n"},
      {"[server]\nthreads = 3\t# 4", ""},
      {"[server]\r\nthreads = 3\r\n\r\n", ""},
      {"[server]\nthreads = 3\r\r\n", "n:2: expected valid UTF-8 text without control characters\n"},
      {"[server]\nthreads = 3\rthreads = 4", "n:2: expected valid UTF-8 text without control characters\n"},
      {std::string("[server]\nthreads = 3\0\n", 22), "n:2: expected valid UTF-8 text without control characters\n"},
      {"[log]\naccess = /\x80", "n:2: expected valid UTF-8 text without control characters\n"},
      {"[log]\naccess = /\x7f", "n:2: expected valid UTF-8 text without control characters\n"},
      {"[log]\naccess = /\xC3\xA9", ""},
      {"[log] # caf\xE9\n", ""},
      {"[server\nthreads = 999", "n:1: expected a `]` at the end of the line\n"},
      {"[server] threads = 3", "n:1: expected a `]` at the end of the line\n"},
      {"[ser\x01ver]\nthreads = 999", "n:1: expected valid UTF-8 text without control characters\n"},
      {"\n\xEF\xBB\xBF[server]", "n:2: expected `key = value` or `[section]`\n"},
  });
}

TEST_CASE("unknown, repeated and misplaced sections are errors") {
  const std::string all =
      "[server], [upstream], [health], [routing], [queue], [keys], [fallbacks], [aliases], [metrics], "
      "[slo], [trace], [log], [backend]";
  check_rows({
      {"[sever]\nthreads = 999\nbroken =", "n:1: unknown section 'sever'; did you mean [server]?\n"},
      {"[tls]\n", "n:1: unknown section 'tls'; expected one of " + all + "\n"},
      {"[]", "n:1: unknown section ''; expected one of " + all + "\n"},
      {"[Log]", "n:1: unknown section 'Log'; did you mean [log]?\n"},
      {"[ server ]", ""},
      {"[server main]", "n:1: [server] takes no name; expected [server]\n"},
      {"[server]\nthreads = 1\n[log]\n[server]\nthreads = 2",
       "n:4: [server] is repeated; the first is on line 1\nn:5: 'threads' is repeated; the first is on line "
       "2\n"},
      {"[backend]\ntype = echo", "n:1: expected a name, [backend NAME]\n"},
      {"[backend a b]\ntype = echo",
       "n:1: expected a backend's name of 1 to 64 letters, digits and . _ : -, not 'a b'\n"},
      {"[backend none]\ntype = echo", "n:1: 'none' is reserved for requests that reached no backend\n"},
      {"[backend a]\ntype = echo\n[backend b]\ntype = echo\n[backend a]\ntype = echo\npriority = 101",
       "n:5: [backend a] is repeated; the first is on line 1\n"
       "n:7: priority: expected a number, 0 to 100, not '101'\n"},
      {"[backend " + std::string(64, 'x') + "]\ntype = echo", ""},
      {"[backend " + std::string(65, 'x') + "]\ntype = echo",
       "n:1: expected a backend's name of 1 to 64 letters, digits and . _ : -, not '" + std::string(60, 'x') +
           "...'\n"},
      {"[backend A.b_c:1-z]\ntype = echo", ""},
  });
}

TEST_CASE("an unknown key is met with the one that was meant") {
  check_rows({
      {"[server]\nlisen = 1", "n:2: unknown key 'lisen' in [server]; did you mean listen?\n"},
      {"[server]\nThreads = 1", "n:2: unknown key 'Threads' in [server]; did you mean threads?\n"},
      {"[server]\nretries = 1", "n:2: unknown key 'retries' in [server]; it belongs in [routing]\n"},
      {"[server]\ntimeout = 1", "n:2: unknown key 'timeout' in [server]; it belongs in [health] or [queue]\n"},
      {"[queue]\ncolour = 1", "n:2: unknown key 'colour' in [queue]; expected one of size, timeout\n"},
      {"[queue]\nMODEL = 1", "n:2: unknown key 'MODEL' in [queue]; expected one of size, timeout\n"},
      {"[backend b]\ntype = echo\napi_key = sk-12345678",
       "n:3: unknown key 'api_key' in [backend]; expected one of url, tls_ca, tls_verify, tls_name, tls_certificate, "
       "tls_key, type, priority, models, api_key_env, api_key_file, max_pending, stream_usage, apis, vision, tools, "
       "json_mode, context_length, token_delay\n"},
      {"[queue]\nsize = 1\nsize = 2", "n:3: 'size' is repeated; the first is on line 2\n"},
      {"[queue]\nsize = x\nsize = 2",
       "n:2: size: expected a number, 0 to 1000000, not 'x'\nn:3: 'size' is repeated; the first is on line 2\n"},
  });
  const std::string longest(1 << 20, 'k');
  const ConfigResult result = parse("[queue]\n" + longest + " = 1");
  REQUIRE_EQ(result.errors.size(), 1);
  CHECK_LT(result.errors[0].message.size(), 200);
}

TEST_CASE("all errors are listed, by line, up to a bound") {
  check_rows({{"[server]\nmax_body = 512M\nthreads = x\n[backend b]\n[log]\nlevel = loud",
               "n:2: body_memory = 256M (the default) must be at least max_body = 512M (line 2)\n"
               "n:3: threads: expected a number, 0 to 256, not 'x'\n"
               "n:4: url is missing; expected http:// or https://host[:port][/prefix]\n"
               "n:6: level: expected one of error, warning, info, debug, not 'loud'\n"}});
  for (std::size_t count : {99u, 100u, 101u, 5000u}) {
    std::string text;
    for (std::size_t i = 0; i < count; ++i) text += "x\n";
    const ConfigResult result = parse(text);
    CHECK_EQ(result.errors.size(), std::min<std::size_t>(count, 101));
    CHECK_EQ(result.errors.back().line, static_cast<int>(std::min<std::size_t>(count, 100)));
    const bool cut = result.errors.back().message == "too many errors; those after this line are not listed";
    CHECK_EQ(cut, count > 100);
  }
}

TEST_CASE("listen takes numeric addresses, and each only once") {
  const std::vector<std::pair<std::string, HostPort>> rows{{"127.0.0.1:8000", {"127.0.0.1", 8000}},
                                                           {"*:1", {"0.0.0.0", 1}},
                                                           {"localhost:65535", {"127.0.0.1", 65535}},
                                                           {"[::]:80", {"::", 80}},
                                                           {"[::ffff:127.0.0.1]:80", {"127.0.0.1", 80}},
                                                           {"[::ffff:7f00:1]:80", {"127.0.0.1", 80}},
                                                           {"[::ffff]:80", {"::ffff", 80}},
                                                           {"[0:0::1]:80", {"::1", 80}},
                                                           {"0.0.0.0:0", {"0.0.0.0", 0}}};
  for (const auto& row : rows) {
    CAPTURE(row.first);
    CHECK(config::parse_listen(row.first) == row.second);
  }
  for (std::string text : {"",
                           ":",
                           ":80",
                           "80",
                           "host:80",
                           "127.0.0.1",
                           "127.0.0.1:",
                           "127.0.0.1:65536",
                           "127.0.0.1:-1",
                           "127.0.0.1:8 0",
                           "127.0.0.256:80",
                           "127.1:80",
                           "0127.0.0.1:80",
                           "::1:80",
                           "[::1]",
                           "[::1]80",
                           "[::1",
                           "[]:80",
                           "[127.0.0.1]:80",
                           "[*]:80",
                           "[localhost]:80",
                           "[fe80::1%eth0]:80",
                           "[::1]:80x",
                           "http://127.0.0.1:80",
                           "127.0.0.1:80:80"}) {
    CAPTURE(text);
    CHECK_FALSE(config::parse_listen(text));
    const std::string hint = text == ":80" || text == "80" ? "; for every IPv4 address: *:80" : "";
    if (!text.empty())
      check_rows({{kServer + "listen = " + text, "n:2: listen: " + kListen + ", not '" + text + "'" + hint + "\n"}});
  }
  CHECK_FALSE(config::parse_listen(std::string("127.0.0.1\0x:80", 14)));
  check_rows({
      {kServer + "listen = 127.0.0.1:8000", ""},
      {kServer + "listen = 127.0.0.1:80\nlisten = localhost:80", "n:3: listen: 127.0.0.1:80 is listed twice\n"},
      {kServer + "listen = [::]:80\nlisten = [0::0]:80", "n:3: listen: [::]:80 is listed twice\n"},
      {kServer + "listen = 127.0.0.1:0\nlisten = 127.0.0.1:0\nmetrics_listen = 127.0.0.1:0", ""},
      {kServer + "metrics_listen = *:9\nmetrics_listen = 0.0.0.0:9",
       "n:3: metrics_listen: 0.0.0.0:9 is listed twice\n"},
      {kServer + "metrics_listen = 127.0.0.1:8000", "n:2: metrics_listen: 127.0.0.1:8000 is already in listen\n"},
      {kServer + "metrics_listen = *:1\nmetrics_listen = 127.0.0.1:8000\nlisten = *:2", ""},
      {kServer + "metrics_listen = *:1\nmetrics_listen = *:2\nlisten = *:2",
       "n:3: metrics_listen: 0.0.0.0:2 is already in listen\n"},
  });
}

TEST_CASE("addresses at which two sockets cannot listen are refused, and none that are apart") {
  const auto again = [](std::string_view second, std::string_view first) {
    return "n:3: listen: " + std::string(second) + " and " + std::string(first) + " above it include one another\n";
  };
  check_rows({
      {kServer + "listen = 127.0.0.1:80\nlisten = *:80", again("0.0.0.0:80", "127.0.0.1:80")},
      {kServer + "listen = *:80\nlisten = 10.0.0.1:80", again("10.0.0.1:80", "0.0.0.0:80")},
      {kServer + "listen = [::]:80\nlisten = [::1]:80", again("[::1]:80", "[::]:80")},
      {kServer + "listen = *:80\nlisten = [::]:80\nlisten = *:81", ""},
      {kServer + "listen = 127.0.0.1:80\nlisten = 127.0.0.2:80", ""},
      {kServer + "listen = *:80\nmetrics_listen = 127.0.0.1:80",
       "n:3: metrics_listen: 127.0.0.1:80 is already in listen (0.0.0.0:80)\n"},
      {kServer + "listen = *:80\nmetrics_listen = [::1]:80", ""},
  });
}

TEST_CASE("a backend's url that leads to Nexus itself is refused, and none that may lead to another process") {
  const auto loop = [](std::string_view listen, std::string_view url) {
    return all_messages(
        parse("[server]\nlisten = " + std::string(listen) + "\n[backend b]\nurl = " + std::string(url)));
  };
  const auto refused = [](std::string_view at, std::string_view listen) {
    return "n:4: url: " + std::string(at) + " is an address of this Nexus: listen = " + std::string(listen) +
           " (line 2)\n";
  };
  CHECK_EQ(loop("127.0.0.1:80", "http://127.0.0.1"), refused("127.0.0.1:80", "127.0.0.1:80"));
  CHECK_EQ(loop("10.0.0.1:80", "http://10.0.0.1/v1"), refused("10.0.0.1:80", "10.0.0.1:80"));
  CHECK_EQ(loop("localhost:80", "http://LOCALHOST"), refused("localhost:80", "localhost:80"));
  CHECK_EQ(loop("*:80", "http://127.1.2.3"), refused("127.1.2.3:80", "*:80"));
  CHECK_EQ(loop("*:80", "http://0.0.0.0"), refused("0.0.0.0:80", "*:80"));
  CHECK_EQ(loop("127.0.0.1:80", "http://0.0.0.0"), refused("0.0.0.0:80", "127.0.0.1:80"));
  CHECK_EQ(loop("[::]:80", "http://[::1]"), refused("[::1]:80", "[::]:80"));
  CHECK_EQ(loop("[::1]:80", "http://[0::0]"), refused("[::]:80", "[::1]:80"));
  for (const auto& [listen, url] : std::vector<NamePair>{{"127.0.0.1:80", "http://127.0.0.1:81"},
                                                         {"127.0.0.1:80", "http://127.0.0.2"},
                                                         {"127.0.0.1:80", "http://[::1]"},
                                                         {"*:80", "http://[::1]"},
                                                         {"*:80", "http://10.0.0.1"},  // of this host or of another
                                                         {"*:80", "http://127.0.0.1.example"},
                                                         {"[::]:80", "http://127.0.0.1"},
                                                         {"[::]:80", "http://localhost"},
                                                         {"127.0.0.1:0", "http://127.0.0.1:1"}}) {
    CAPTURE(listen);
    CAPTURE(url);
    CHECK_EQ(loop(listen, url), "");
  }
  check_rows({{"[backend b]\nurl = http://127.0.0.1:8000",
               "n:2: url: 127.0.0.1:8000 is an address of this Nexus: listen = 127.0.0.1:8000 (the default)\n"},
              {"[server]\nmetrics_listen = *:9\n[backend b]\nurl = http://localhost:9",
               "n:4: url: localhost:9 is an address of this Nexus: metrics_listen = *:9 (line 2)\n"}});
  // A service manager's sockets are elsewhere.
  CHECK(parse_config("[backend b]\nurl = http://127.0.0.1:8000", "n", fake_environment({{"LISTEN_FDS", "1"}})).ok());
}

TEST_CASE("an access log that cannot be written is an error of its line, where files are asked for") {
  ConfigEnvironment environment = fake_environment();
  const auto messages = [&](int error, const std::string& access) {
    environment.append_problem = [error](const std::string& path) { return path == "/a/log" ? error : 0; };
    return all_messages(parse_config("[log]\naccess = " + access + "\n[backend b]\ntype = echo", "n", environment));
  };
  const std::string why = "n:2: access: cannot write this file: ";
  CHECK_EQ(messages(0, "/a/log"), "");
  CHECK_EQ(messages(ENOENT, "/a/log"), why + "No such file or directory: create its directory\n");
  CHECK_EQ(messages(EACCES, "/a/log"),
           why + "Permission denied: the user of this process must own it, or its directory\n");
  CHECK_EQ(messages(EISDIR, "/a/log"), why + "Is a directory\n");
  CHECK_EQ(messages(EACCES, "off") + messages(EACCES, "stderr"), "");
}

TEST_CASE("as many addresses as the limit are listened on, and no more") {
  std::string text = kServer;
  for (std::size_t i = 1; i <= kMaxListens; ++i) text += "listen = *:" + std::to_string(i) + "\n";
  CHECK_EQ(accepted(text).server.listen.size(), kMaxListens);
  check_rows({{text + "listen = *:999", "n:66: listen: expected at most 64 addresses\n"}});
}

TEST_CASE("body_memory holds at least one body, and the error names both lines") {
  check_rows({
      {kServer + "body_memory = 64M", ""},
      {kServer + "body_memory = 67108863",
       "n:2: body_memory = 67108863 (line 2) must be at least max_body = 64M (the default)\n"},
      {kServer + "max_body = 256M", ""},
      {kServer + "max_body = 1M\nthreads = 1\nbody_memory = 1023k",
       "n:4: body_memory = 1023k (line 4) must be at least max_body = 1M (line 2)\n"},
      {kServer + "max_body = 2G\nbody_memory = 1M", "n:2: max_body: " + kSize + "1k to 1G, not '2G'\n"},
  });
}

TEST_CASE("the weights may not all be 0") {
  const std::string zeros = "[routing]\nweight_latency = 0\nweight_load = 0\nweight_priority = ";
  check_rows({{zeros + "1", ""},
              {zeros + "0",
               "n:4: weight_priority, weight_load and weight_latency are all 0; at least one must be above 0\n"}});
}

TEST_CASE("a url is taken apart into address and prefix") {
  struct Good {
    std::string url;
    HostPort address;
    std::string base_path;
  };
  const std::vector<Good> rows{
      {"http://h", {"h", 80}, ""},
      {"http://h/", {"h", 80}, ""},
      {"http://h/v1", {"h", 80}, ""},
      {"http://h/v1/", {"h", 80}, ""},
      {"http://h/v1//", {"h", 80}, ""},
      {"http://h/v10", {"h", 80}, "/v10"},
      {"http://h/api/v1", {"h", 80}, "/api"},
      {"http://h/api//v1", {"h", 80}, "/api"},
      {"http://h/v1/v1", {"h", 80}, "/v1"},
      {"http://h/a%2F~b;c=d", {"h", 80}, "/a%2F~b;c=d"},
      {"http://h/a.b/..c", {"h", 80}, "/a.b/..c"},
      {"HTTP://Gpu-1.Example:8080/P", {"gpu-1.example", 8080}, "/P"},
      {"http://my_service:65535", {"my_service", 65535}, ""},
      {"http://host.:8000", {"host.", 8000}, ""},
      {"http://10.0.0.1:1", {"10.0.0.1", 1}, ""},
      {"http://[::1]", {"::1", 80}, ""},
      {"https://h", {"h", 443}, ""},
      {"HTTPS://[::1]:8443/x", {"::1", 8443}, "/x"},
      {"http://[2001:DB8::1]:8000/x", {"2001:db8::1", 8000}, "/x"},
      {"http://" + std::string(63, 'a') + ".b", {std::string(63, 'a') + ".b", 80}, ""},
  };
  for (const Good& row : rows) {
    CAPTURE(row.url);
    BackendSettings backend;
    CHECK_EQ(config::parse_url(row.url, backend), "");
    CHECK(backend.address == row.address);
    CHECK_EQ(backend.base_path, row.base_path);
  }
}

TEST_CASE("a url that can't be served is refused in words, without repeating it") {
  const std::string shape = "expected http:// or https://host[:port][/prefix]";
  const std::string host = "expected a host name or address, [v6] in brackets, and a port of 1 to 65535 after http";
  const std::string prefix = "expected a prefix of URL characters, without `.` and `..` segments";
  const std::string marks = "expected a URL without `?` and `#`";
  const std::string user = "expected a URL without a user or password; a key goes into api_key_env or api_key_file";
  const std::vector<std::pair<std::string, std::string>> rows{
      {"https:/h", shape},
      {"https://", host + "s://"},
      {"https://h:0", host + "s://"},
      {"h", shape},
      {"h:80", shape},
      {"http:/h", shape},
      {"ftp://h", shape},
      {"http://", host + "://"},
      {"http:///x", host + "://"},
      {"http://:80", host + "://"},
      {"http://h:", host + "://"},
      {"http://h:0", host + "://"},
      {"http://h:65536", host + "://"},
      {"http://h:80:80", host + "://"},
      {"http://h:8x", host + "://"},
      {"http://::1", host + "://"},
      {"http://[::1", host + "://"},
      {"http://[h]", host + "://"},
      {"http://[127.0.0.1]", host + "://"},
      {"http://[::1]x", host + "://"},
      {"http://10.0.0.256", host + "://"},
      {"http://1.2.3", host + "://"},
      {"http://a..b", host + "://"},
      {"http://a..", host + "://"},
      {"http://.", host + "://"},
      {"http://-a", host + "://"},
      {"http://a-", host + "://"},
      {"http://a b", host + "://"},
      {"http://h\\x", host + "://"},
      {"http://\xC3\xA9", host + "://"},
      {"http://" + std::string(64, 'a'), host + "://"},
      {"http://u:secret@h", user},
      {"http://@h", user},
      {"http://h?x", marks},
      {"http://h/#x", marks},
      {"http://h/a b", prefix},
      {"http://h/../x", prefix},
      {"http://h/x/.", prefix},
      {"http://h/%2", prefix},
      {"http://h/%zz", prefix},
      {"http://h/\xC3\xA9", prefix},
      {"http://h/\"", prefix},
  };
  for (const auto& row : rows) {
    CAPTURE(row.first);
    CHECK_EQ(url_problem(row.first), row.second);
    CHECK_EQ(all_messages(parse("[backend b]\nurl = " + row.first)), "n:2: url: " + row.second + "\n");
  }
  const std::string longest = "http://h/" + std::string(kMaxUrlBytes - 9, 'x');
  CHECK_EQ(url_problem(longest), "");
  CHECK_EQ(url_problem(longest + "x"), "expected a URL of at most 2048 bytes");
  std::string name;
  for (int i = 0; i < 126; ++i) name += "a.";
  CHECK_EQ(url_problem("http://" + name + "a"), "");             // 253 bytes
  CHECK_EQ(url_problem("http://" + name + "aa"), host + "://");  // 254
}

TEST_CASE("only an echo backend has no url, and only it has a token_delay") {
  check_rows({
      {"[backend b]\ntype = echo", ""},
      {"[backend b]\ntype = echo\nurl = http://h", "n:3: url: not allowed with type = echo\n"},
      {"[backend b]\nurl = http://h\ntype = echo", "n:2: url: not allowed with type = echo\n"},
      {"[backend b]\n\ntype = vllm", "n:1: url is missing; expected http:// or https://host[:port][/prefix]\n"},
      {"[backend b]", "n:1: url is missing; expected http:// or https://host[:port][/prefix]\n"},
      {"[backend b]\nurl = ", "n:2: url: expected http:// or https://host[:port][/prefix]\n"},
      {with_url("token_delay = 5ms"), "n:3: token_delay: allowed with type = echo only\n"},
      {"[backend b]\ntype = ech",
       "n:2: type: expected one of ollama, vllm, llamacpp, lmstudio, openai, anthropic, exo, generic, echo, not "
       "'ech'; did you mean echo?\n"},
  });
}

TEST_CASE("there may be 256 backends, and no more") {
  std::string text;
  for (std::size_t i = 0; i < kMaxBackends; ++i) text += "[backend b" + std::to_string(i) + "]\ntype = echo\n";
  CHECK_EQ(accepted(text).backends.size(), 256);
  check_rows({{text + "[backend more]\ntype = echo\n[backend yet-more]\ntype = echo",
               "n:513: expected at most 256 backends\n"}});
}

TEST_CASE("lists of models are trimmed, and every odd item is refused") {
  CHECK(accepted_backend("url = http://h\nmodels =  a/b:1 ,c d,e=f ").models ==
        std::vector<std::string>{"a/b:1", "c d", "e=f"});
  const std::string comma = "expected a name before and after every comma";
  check_rows({
      {with_url("models = a,"), "n:3: models: " + comma + "\n"},
      {with_url("models = ,a"), "n:3: models: " + comma + "\n"},
      {with_url("models = a,,b"), "n:3: models: " + comma + "\n"},
      {with_url("models = ,"), "n:3: models: " + comma + "\n"},
      {with_url("models = a, b, a"), "n:3: models: 'a' is listed twice\n"},
      {with_url("models = a\tb"), "n:3: models: " + kModelName + ", not 'a?b'\n"},
      {with_url("models = *"), "n:3: models: " + kModelName + ", not '*'\n"},
      {with_url("models = " + std::string(256, 'm')), ""},
      {with_url("models = " + std::string(257, 'm')),
       "n:3: models: " + kModelName + ", not '" + std::string(60, 'm') + "...'\n"},
      {with_url("vision = a, all"), "n:3: vision: 'all' must be the only item\n"},
      {with_url("tools = none, a"), "n:3: tools: 'none' must be the only item\n"},
      {with_url("json_mode = *, a"), "n:3: json_mode: " + kModelName + ", not '*'\n"},
      {with_url("vision = a, a"), "n:3: vision: 'a' is listed twice\n"},
  });
  std::string longest = "m0";
  for (std::size_t i = 1; i < kMaxModelsPerList; ++i) longest += ",m" + std::to_string(i);
  CHECK_EQ(accepted_backend("url = http://h\nmodels = " + longest).models.size(), 10'000);
  check_rows({{with_url("models = " + longest + ",x"), "n:3: models: expected at most 10000 names in a list\n"}});
}

TEST_CASE("context_length is one number, or a number for each model") {
  struct Good {
    std::string text;
    std::vector<std::pair<std::string, std::uint64_t>> lengths;
  };
  for (const Good& row : std::vector<Good>{{"8k", {{"*", 8192}}},
                                           {"8000", {{"*", 8000}}},
                                           {"a 1", {{"a", 1}}},
                                           {"a b  8k ,\tc\t1M", {{"a b", 8192}, {"c", 1u << 20}}},
                                           {"* 4k, big 128k", {{"*", 4096}, {"big", 131072}}}}) {
    CAPTURE(row.text);
    const auto got = accepted_backend("url = http://h\ncontext_length = " + row.text).context_length;
    REQUIRE_EQ(got.size(), row.lengths.size());
    for (std::size_t i = 0; i < got.size(); ++i) {
      CHECK_EQ(got[i].model, row.lengths[i].first);
      CHECK_EQ(got[i].tokens, row.lengths[i].second);
    }
  }
  const std::string expected =
      "n:3: context_length: expected a number of tokens, 1 to 1G, or a comma-separated list of `model number`, not ";
  check_rows({
      {with_url("context_length = a"), expected + "'a'\n"},
      {with_url("context_length = a 8k, 9"), expected + "'9'\n"},
      {with_url("context_length = 8k a"), expected + "'8k a'\n"},
      {with_url("context_length = a 0"), expected + "'a 0'\n"},
      {with_url("context_length = a 8k, a 9k"), "n:3: context_length: 'a' is listed twice\n"},
      {with_url("context_length = a 8k,"), "n:3: context_length: expected a name before and after every comma\n"},
      {with_url("context_length = " + std::string(257, 'm') + " 1"),
       "n:3: context_length: " + kModelName + ", not '" + std::string(60, 'm') + "...'\n"},
  });
}

TEST_CASE("names of aliases may hold `=`: blanks around one tell which one parts") {
  CHECK(accepted("[aliases]\na=b\nx= y = z\nc=d = e\nf = g=h\n i j = k l \nm =n").aliases ==
        std::vector<NamePair>{{"a", "b"}, {"x= y", "z"}, {"c=d", "e"}, {"f", "g=h"}, {"i j", "k l"}, {"m", "n"}});
  check_rows({
      {"[aliases]\na = b\na = c", "n:3: 'a' is repeated; the first is on line 2\n"},
      {"[aliases]\na =", "n:2: 'a': expected a model\n"},
      {"[aliases]\na=b =", "n:2: 'a=b': expected a model\n"},
      {"[aliases]\na = b, c", "n:2: 'a': " + kModelName + ", not 'b, c'\n"},
      {"[aliases]\n* = b", "n:2: " + kModelName + ", not '*'\n"},
      {"[aliases]\na", "n:2: expected `key = value` or `[section]`\n"},
  });
}

TEST_CASE("aliases lead on up to 3 times, and never back") {
  const std::string three = "[aliases]\nc = d\na = b\nb = c\n";
  CHECK_EQ(accepted(three).aliases.size(), 3);
  check_rows({
      {three + "d = e", "n:3: alias 'a' leads through more than 3 aliases\n"},
      {three + "0 = a", "n:5: alias '0' leads through more than 3 aliases\n"},
      {"[aliases]\na = a", "n:2: alias 'a' leads back to itself\n"},
      {"[aliases]\na = b\nb = a", "n:2: alias 'a' leads back to itself\nn:3: alias 'b' leads back to itself\n"},
      {"[aliases]\na = b\nb = c\nc = a",
       "n:2: alias 'a' leads back to itself\nn:3: alias 'b' leads back to itself\nn:4: alias 'c' leads back to "
       "itself\n"},
      {"[aliases]\na = b\nb = b",
       "n:2: alias 'a' leads through more than 3 aliases\nn:3: alias 'b' leads back to itself\n"},
      {"[aliases]\na = b\nb = c\nc = d\nd = a",
       "n:2: alias 'a' leads through more than 3 aliases\nn:3: alias 'b' leads through more than 3 aliases\n"
       "n:4: alias 'c' leads through more than 3 aliases\nn:5: alias 'd' leads through more than 3 aliases\n"},
  });
}

TEST_CASE("there may be 10,000 aliases, and no more") {
  std::string text = "[aliases]\n";
  for (std::size_t i = 0; i < kMaxModelsPerList; ++i) text += "a" + std::to_string(i) + " = m\n";
  CHECK_EQ(accepted(text).aliases.size(), 10'000);
  check_rows({{text + "x = m\ny = m", "n:10002: expected at most 10000 lines in this section\n"}});
}

TEST_CASE("a model falls back to other models only") {
  check_rows({
      {"[fallbacks]\na = b, a", "n:2: 'a': a model cannot fall back to itself\n"},
      {"[fallbacks]\na = b, c, b", "n:2: 'a': 'b' is listed twice\n"},
      {"[fallbacks]\na = b\na = c", "n:3: 'a' is repeated; the first is on line 2\n"},
      {"[fallbacks]\na = ", "n:2: 'a': expected a comma-separated list of models\n"},
      {"[fallbacks]\na = b,", "n:2: 'a': expected a name before and after every comma\n"},
      {"[fallbacks]\na = b\nb = a", ""},
  });
}

TEST_CASE("the access log goes off, to stderr, or to what is plainly a path") {
  for (std::string value : {"off", "stderr", "/var/log/a", "./a"})
    CHECK_EQ(accepted("[log]\naccess = " + value).log.access, value);
  check_rows({{"[log]\naccess = yes", "n:2: access: expected off, stderr or a path with a `/` in it, not 'yes'\n"},
              {"[log]\naccess = /" + std::string(4094, 'x'), ""},
              {"[log]\naccess = /" + std::string(4095, 'x'), "n:2: access: expected a path of at most 4095 bytes\n"}});
}

TEST_CASE("a backend's key comes from a variable or the first line of a file") {
  const ConfigEnvironment env = fake_environment({{"GOOD", "sk-1"},
                                                  {"EMPTY", ""},
                                                  {"BAD", "sk 1"},
                                                  {"QUOTED", "\"sk-1\""},
                                                  {"LONG", std::string(4096, 'k')},
                                                  {"LONGER", std::string(4097, 'k')}},
                                                 {{"/good", " sk-2 \r\nmore\n"},
                                                  {"/bare", "sk-3"},
                                                  {"/bom", "\xEF\xBB\xBFsk-4\n"},
                                                  {"/empty", ""},
                                                  {"/blank", "  \nsk-5"},
                                                  {"/quoted", "'sk-6'\n"},
                                                  {"/bad", "sk\x01\n"},
                                                  {"/nul", std::string("sk\0x", 4)}});
  const auto parse_with = [&](const std::string& lines) { return parse_config(with_url(lines), "n", env); };
  for (const auto& row : std::vector<NamePair>{{"api_key_env = GOOD", "sk-1"},
                                               {"api_key_env = LONG", std::string(4096, 'k')},
                                               {"api_key_file = /good", "sk-2"},
                                               {"api_key_file = /bare", "sk-3"},
                                               {"api_key_file = /bom", "sk-4"}}) {
    CAPTURE(row.first);
    const ConfigResult result = parse_with(row.first);
    CHECK_EQ(all_messages(result), "");
    CHECK_EQ(result.settings.backends.at(0).api_key, row.second);
  }
  const auto unset = [](const std::string& name) { return "n:3: api_key_env: " + name + " is not set, or empty\n"; };
  const std::string unfit = ": the key in it must be 1 to 4096 visible ASCII characters\n";
  const std::string quoted = ": the key in it must be without quotes\n";
  for (const auto& row : std::vector<NamePair>{
           {"api_key_env = MISSING", unset("the variable MISSING")},
           {"api_key_env = EMPTY", unset("the variable EMPTY")},
           {"api_key_env = hf_AbCdEf", unset("this variable")},  // it may be a key
           {"api_key_env = " + std::string(65, 'A'), unset("this variable")},
           {"api_key_env = BAD", "n:3: api_key_env" + unfit},
           {"api_key_env = LONGER", "n:3: api_key_env" + unfit},
           {"api_key_env = sk-x",
            "n:3: api_key_env: expected the name of an environment variable (letters, digits, _)\n"},
           {"api_key_env = 1X",
            "n:3: api_key_env: expected the name of an environment variable (letters, digits, _)\n"},
           {"api_key_file = /none", "n:3: api_key_file: cannot read this file: No such file or directory\n"},
           {"api_key_file = /empty", "n:3: api_key_file" + unfit},
           {"api_key_file = /blank", "n:3: api_key_file" + unfit},
           {"api_key_file = /bad", "n:3: api_key_file" + unfit},
           {"api_key_file = /nul", "n:3: api_key_file" + unfit},
           {"api_key_file = /quoted", "n:3: api_key_file" + quoted},
           {"api_key_env = QUOTED", "n:3: api_key_env" + quoted},
           {"api_key_file = /good\napi_key_env = GOOD",
            "n:4: set either api_key_env (line 4) or api_key_file (line 3), not both\n"},
           {"api_key_file = /none\napi_key_env = GOOD",
            "n:3: api_key_file: cannot read this file: No such file or directory\n"
            "n:4: set either api_key_env (line 4) or api_key_file (line 3), not both\n"}}) {
    CAPTURE(row.first);
    CHECK_EQ(all_messages(parse_with(row.first)), row.second);
  }
}

TEST_CASE("a mistake of another program's habits is answered with the way to write it here") {
  const auto problem = [](const std::string& text) {
    const std::string messages = all_messages(parse(text));
    return messages.substr(0, messages.find('\n'));
  };
  const std::string kinds = std::string(kBackendKindNames);
  const auto choice = [&](const std::string& typed, const std::string& meant) {
    CHECK_EQ(problem("[backend b]\nurl = http://h\ntype = " + typed),
             "n:3: type: expected one of " + kinds + ", not '" + typed + "'" +
                 (meant.empty() ? "" : "; did you mean " + meant + "?"));
  };
  choice("vLLM", "vllm");
  choice("Ollama", "ollama");
  choice("llama.cpp", "llamacpp");
  choice("abacus", "");
  const std::string listen = "n:2: listen: expected a numeric address:port, [v6]:port, *:port or localhost:port, not ";
  CHECK_EQ(problem("[server]\nlisten = :8000"), listen + "':8000'; for every IPv4 address: *:8000");
  CHECK_EQ(problem("[server]\nlisten = 8000"), listen + "'8000'; for every IPv4 address: *:8000");
  CHECK_EQ(problem("[server]\nlisten = host:8000"), listen + "'host:8000'");
  CHECK_EQ(problem("; a comment\n[server]"), "n:1: expected `#` before a comment");
  CHECK_EQ(problem("[server]\n// listen = 1"), "n:2: expected `#` before a comment");
  const std::string quotes = ": expected the value without quotes";
  CHECK_EQ(problem("[backend b]\nurl = \"http://h\""), "n:2: url" + quotes);
  CHECK_EQ(problem("[backend b]\nurl = http://h\nmodels = \"llama3:70b\""), "n:3: models" + quotes);
  CHECK_EQ(problem("[server]\nthreads = '2'"), "n:2: threads" + quotes);
  CHECK_EQ(problem("[backend b]\nurl = http://h\nmodels = a, \"b\", c"),
           "n:3: models: expected a model name without quotes, not '\"b\"'");
  CHECK_EQ(problem("[aliases]\n\"a\" = b"), "n:2: expected a model name without quotes, not '\"a\"'");
}

TEST_CASE("the environment file of a service gives variables as systemd reads them, before the environment's own") {
  const auto variables = config::read_environment_file(
      "# a comment\n#Z=26\n; another\n;Y=25\n\n  A = 1 \r\nB=\"two "
      "words\"\nC='3'\nD=\nnothing\nE=a=b#c\nA=last\nF=\"half\n");
  CHECK(variables ==
        config::Variables{{"A", "last"}, {"B", "two words"}, {"C", "3"}, {"D", ""}, {"E", "a=b#c"}, {"F", "\"half"}});
  const ConfigEnvironment env = config::with_variables(fake_environment({{"A", "own"}, {"G", "own"}}), variables);
  CHECK(env.get_env("A") == "last");
  CHECK(env.get_env("G") == "own");
  CHECK_FALSE(env.get_env("H").has_value());
}

TEST_CASE("cors_origins is * or a list of origins as browsers send them") {
  const auto origins = [](const std::string& text) {
    return accepted("[server]\ncors_origins = " + text + "\n[backend b]\ntype = echo").server.cors_origins;
  };
  using Origins = std::vector<std::string>;
  CHECK(origins("*") == Origins{"*"});
  CHECK(origins("HTTPS://Chat.Example , http://localhost:3000") ==
        Origins{"https://chat.example", "http://localhost:3000"});
  CHECK(origins("null, tauri://localhost, chrome-extension://abc, http://[::1]:80").size() == 4);
  const auto refused = [](const std::string& text, const std::string& problem) {
    CAPTURE(text);
    const auto messages = all_messages(parse("[server]\ncors_origins = " + text));
    CHECK(messages.starts_with("n:2: cors_origins: " + problem));
  };
  for (const char* text : {"chat.example", "https://chat.example/", "https://", "://a", "https://a b", "http://u@a",
                           "**", "https://*.example", "1http://a"}) {
    refused(text, "expected * or origins like https://app.example:8443 (no path and no slash at the end), not '");
  }
  refused("*, https://a", "* must be the only item");
  refused("https://a, *", "* must be the only item");
  refused("https://a, https://A", "'https://A' is listed twice");
  refused("https://a,", "expected a name before and after every comma");
  std::string many = "http://a0";
  for (int i = 1; i < 65; ++i) many += ",http://a" + std::to_string(i);
  refused(many, "expected at most 64 origins");
}

TEST_CASE("api_keys_file is read line by line, and its errors carry its own name and lines") {
  const auto parse_keys = [](const std::string& text) {
    return parse_config("[server]\napi_keys_file = /k\n[backend b]\ntype = echo", "n",
                        fake_environment({}, {{"/k", text}}));
  };
  const ConfigResult good =
      parse_keys("\xEF\xBB\xBF# keys\r\n\r\nalice\t sk-alice1 # hers\r\nbob@ # no key\nbob sk-bob#23");
  CHECK_EQ(all_messages(good), "/k:4: expected `name key`\n");
  CHECK(good.settings.server.api_keys == std::vector<ApiKey>{{"alice", "sk-alice1"}, {"bob", "sk-bob#23"}});
  CHECK(parse_keys("a 12345678").ok());
  CHECK(parse_keys("a 12345678 weight=1000 priority=100 max_pending=1000000 rpm=1000000k tpm=1000000k").ok());
  CHECK(parse_keys("a " + std::string(512, 'k')).ok());
  CHECK(parse_keys(std::string(64, 'a') + " 12345678").ok());
  const std::string bad_key = "/k:1: expected a key of 8 to 512 visible ASCII characters\n";
  const std::string bad_name = "/k:1: expected a name of 1 to 64 letters, digits and . _ : - before the key\n";
  const std::string shape = "/k:1: expected `name key`\n";
  const std::string models =
      "/k:1: models: expected a comma-separated list of models, each with or without a * at its end\n";
  const std::string options = "weight=, priority=, max_pending=, rpm=, tpm=, admin=, models=";
  const std::vector<NamePair> rows{
      {"", "/k: expected at least one line `name key`\n"},
      {"# none\n", "/k: expected at least one line `name key`\n"},
      {"a 1234567", bad_key},
      {"a " + std::string(513, 'k'), bad_key},
      {"a 1234567\xC3\xA9", bad_key},
      {"a 1234567\x7f", bad_key},
      {std::string("a 1234567\0", 10), bad_key},
      {std::string(65, 'a') + " 12345678", bad_name},
      {"a \"12345678\"", "/k:1: expected a key without quotes\n"},
      {"a/b 12345678", bad_name},
      {"none 12345678", "/k:1: 'none' is reserved for the metrics of other clients\n"},
      {"a 12345678\nother 87654321", "/k:2: 'other' is reserved for the metrics of other clients\n"},
      {"sk-12345678", shape},
      {"a 12345678 x", "/k:1: expected an option behind the key, one of " + options + "\n"},
      {"a 12345678 weight", "/k:1: expected an option behind the key, one of " + options + "\n"},
      {"a 12345678 Weight=2", "/k:1: expected an option behind the key, one of " + options + "\n"},
      {"a 12345678 weight=0", "/k:1: weight: expected a number, 1 to 1000\n"},
      {"a 12345678 weight=1001", "/k:1: weight: expected a number, 1 to 1000\n"},
      {"a 12345678 weight=", "/k:1: weight: expected a number, 1 to 1000\n"},
      {"a 12345678\nb 87654321 priority=101", "/k:2: priority: expected a number, 0 to 100\n"},
      {"a 12345678 weight=2 weight=3", "/k:1: weight is repeated on this line\n"},
      {"a 12345678 models=a models=b", "/k:1: models is repeated on this line\n"},
      {"a 12345678 tpm=1000001k", "/k:1: tpm: expected a number, 0 to 1000000000\n"},
      {"a 12345678 models=", models},
      {"a 12345678 models=a,,b", models},
      {"a 12345678\nb 87654321\na 11111111", "/k:3: this name is already used on line 1\n"},
      {"a 12345678\nb 12345678", "/k:2: this key is already used on line 1\n"},
  };
  for (const auto& row : rows) {
    CAPTURE(row.first);
    CHECK_EQ(all_messages(parse_keys(row.first)), row.second);
  }
  CHECK_EQ(all_messages(parse("[server]\napi_keys_file = /none")),
           "n:2: api_keys_file: cannot read this file: No such file or directory\n");
}

TEST_CASE("options behind a key are read, and a key without them has the defaults") {
  const auto parsed =
      parse_config("[server]\napi_keys_file = /k\n[backend b]\ntype = echo", "n",
                   fake_environment({}, {{"/k", "a 12345678\tweight=3  priority=0 # his\nb 87654321"}}));
  REQUIRE(parsed.ok());
  const std::vector<ApiKey>& keys = parsed.settings.server.api_keys;
  REQUIRE(keys.size() == 2);
  CHECK(keys[0].key == "12345678");
  CHECK(keys[0].options.weight == 3);
  CHECK(keys[0].options.priority == 0);
  CHECK(keys[1].options == KeyOptions{});
  CHECK(KeyOptions{}.weight == 1);
  const auto limited = parse_config(
      "[keys]\nrpm = 60\nmax_pending = 3\nweight = 2\npriority = 0\n[server]\napi_keys_file = /k\n[backend b]\ntype = "
      "echo",
      "n",
      fake_environment(
          {},
          {{"/k",
            "a 12345678 rpm=0 tpm=100k models=llama3:70b,qwen2:*\nb 87654321 max_pending=4 weight=1 priority=50"}}));
  REQUIRE(limited.ok());
  const ApiKey &a = limited.settings.server.api_keys[0], &b = limited.settings.server.api_keys[1];
  CHECK(a.options.rpm == 0);
  CHECK(a.options.tpm == 100'000);
  CHECK(a.options.max_pending == 3);
  CHECK(a.options.weight == 2);
  CHECK(a.options.priority == 0);
  CHECK(b.options.rpm == 60);
  CHECK(b.options.tpm == 0);
  CHECK(b.options.max_pending == 4);
  CHECK(b.options.weight == 1);
  CHECK(b.options.priority == 50);
  CHECK(a.may_use("llama3:70b"));
  CHECK(a.may_use("qwen2:7b"));
  CHECK_FALSE(a.may_use("llama3:8b"));
  CHECK_FALSE(a.may_use("qwen"));
  CHECK(b.may_use("anything"));
  CHECK(KeyOptions{}.priority == 50);
}

TEST_CASE("there may be 10,000 client keys, and no more") {
  std::string text;
  for (int i = 0; i < 10'000; ++i) text += "n" + std::to_string(i) + " key-number-" + std::to_string(i) + "\n";
  const auto parse_keys = [](const std::string& keys) {
    return parse_config("[server]\napi_keys_file = /k\n[backend b]\ntype = echo", "n",
                        fake_environment({}, {{"/k", keys}}));
  };
  CHECK_EQ(parse_keys(text).settings.server.api_keys.size(), 10'000);
  CHECK_EQ(all_messages(parse_keys(text + "x key-more-1\ny key-more-2")), "/k:10001: expected at most 10000 keys\n");
}

TEST_CASE("no message holds a key, wherever it was put") {
  // Each text puts the key in another wrong place; each must be refused without a piece of it.
  const std::string key = "sk-Sup3rS3cret";
  const std::vector<std::string> texts{
      "[server]\n" + key + "\n",
      "[server]\napi_keys_file = " + key,
      with_url("api_key_env = " + key),
      with_url("api_key_env = Sup3rS3cret"),
      with_url("api_key_file = " + key),
      with_url("api_key = " + key),
      with_url("api_key_env = GOOD\napi_key_file = " + key),
      "[backend b]\nurl = http://user:" + key + "@h",
      "[backend b]\nurl = http://h?key=" + key,
      "[backend b]\nurl = " + key,
  };
  for (const std::string& text : texts) {
    const std::string messages = all_messages(parse_config(text, "n", fake_environment({{"GOOD", key}})));
    CAPTURE(messages);
    CHECK_NE(messages, "");
    CHECK_EQ(messages.find("Sup3r"), std::string::npos);
  }
  for (const std::string& text : {key, key + " name", "a b " + key, "a " + key + "\nb " + key, key + "\x01 " + key}) {
    const std::string messages = all_messages(parse_config("[server]\napi_keys_file = /k\n[backend b]\ntype = echo",
                                                           "n", fake_environment({}, {{"/k", text}})));
    CAPTURE(messages);
    CHECK_NE(messages, "");
    CHECK_EQ(messages.find("Sup3r"), std::string::npos);
  }
}

TEST_CASE("a file is read whole up to 1 MB, and what can't be read says why") {
  char path[] = "/tmp/config_test.XXXXXX";
  const int fd = mkstemp(path);
  REQUIRE_GE(fd, 0);
  const auto write_file = [&](const std::string& text) {
    REQUIRE_EQ(ftruncate(fd, 0), 0);
    REQUIRE_EQ(pwrite(fd, text.data(), text.size(), 0), static_cast<ssize_t>(text.size()));
  };
  const ConfigEnvironment env = system_environment();
  const std::string name = path;
  write_file("[server]\nthreads = 3\n");
  CHECK_EQ(load_config(name, env).settings.server.threads, 3);
  write_file("[server]\nthreads = x\n");
  CHECK_EQ(all_messages(load_config(name, env)), name + ":2: threads: expected a number, 0 to 256, not 'x'\n");
  const std::string largest = "[server]\nthreads = 4\n" + std::string((1 << 20) - 21, '\n');
  write_file(largest);
  CHECK_EQ(load_config(name, env).settings.server.threads, 4);
  write_file(largest + "\n");
  CHECK_EQ(all_messages(load_config(name, env)), name + ": cannot read this file: File too large\n");
  close(fd);
  unlink(path);
  CHECK_EQ(all_messages(load_config(name, env)), name + ": cannot read this file: No such file or directory\n");
  CHECK_EQ(all_messages(load_config("/tmp", env)), "/tmp: cannot read this file: Is a directory\n");
  const std::string long_path = "/" + std::string(4096, 'x');
  CHECK_EQ(all_messages(load_config(long_path, env)), long_path + ": cannot read this file: File name too long\n");
  CHECK_EQ(all_messages(parse_config("[server]\napi_keys_file = " + long_path, "n", env)),
           "n:2: api_keys_file: cannot read this file: File name too long\n");
  CHECK_FALSE(env.get_env("NEXUS_CONFIG_TEST_UNSET"));
  CHECK_EQ(all_messages(load_config("/c", {})), "/c: cannot read this file: No such file or directory\n");
}

TEST_CASE("any bytes are read to an end: cut, flipped and repeated pieces of a good file") {
  // Seeded, so that a failure replays. What is checked: no crash, bounded and plain messages, errors in order.
  const std::string good =
      "\xEF\xBB\xBF[server]\r\nlisten = [::1]:80\nmax_body = 1M # c\n[aliases]\na = b\nb=c = d\n[fallbacks]\nm = n, o\n"
      "[backend x]\nurl = http://[::1]:8/v1\ntype = vllm\nmodels = a, b\ncontext_length = a 8k, b 4k\nvision = *\n"
      "api_key_env = E\n[routing]\nweight_load = 0\n[log]\naccess = /\xC3\xA9\n";
  const ConfigEnvironment env = fake_environment({{"E", "key"}});
  CHECK_EQ(all_messages(parse_config(good, "n", env)), "");
  std::mt19937 random(7);
  const auto below = [&random](std::size_t n) { return random() % n; };
  for (int round = 0; round < 20'000; ++round) {
    std::string text = good;
    for (std::size_t changes = 1 + below(6); changes > 0 && !text.empty(); --changes) {
      const std::size_t at = below(text.size()), length = below(20);
      switch (below(4)) {
        case 0: text.erase(at, length); break;
        case 1: text[at] = static_cast<char>(below(256)); break;
        case 2: text.insert(at, text.substr(below(text.size()), length)); break;
        default: text.insert(at, 1, "=#[],: \n\t"[below(9)]); break;
      }
    }
    const ConfigResult result = parse_config(text, "n", env);
    int line = 0;
    for (const ConfigError& error : result.errors) {
      const bool sound = error.line >= line && config::is_plain_text(error.message) && error.message.size() < 500;
      if (!sound) FAIL(error.to_string());
      line = error.line;
    }
  }
}

TEST_CASE("long lines and many lines cost no more than their length") {
  const std::string long_line(1 << 20, 'a');
  std::string nul_line(1 << 20, '\0');
  for (const std::string& text : {long_line, nul_line, "[" + long_line + "]", "[backend " + long_line + "]",
                                  "[aliases]\n" + long_line + "=" + long_line, "[server]\n" + std::string(1 << 20, '='),
                                  "[fallbacks]\na = " + std::string(1 << 20, ','), std::string(1 << 20, '[')}) {
    const ConfigResult result = parse(text);
    CHECK_FALSE(result.ok());
    for (const ConfigError& error : result.errors) CHECK_LT(error.message.size(), 500);
  }
}

// Not a static_assert: g++ 12 with -fsanitize=undefined takes a function's address for no constant.
TEST_CASE("the keys of TLS need one another, and their files") {
  const std::string pem = "-----BEGIN CERTIFICATE-----\n";
  const ConfigEnvironment environment = fake_environment({}, {{"/c.pem", pem}, {"/k.pem", pem}, {"/text", "text\n"}});
  const auto problems = [&](const std::string& text) {
    return all_messages(nexus::parse_config(text + "\n[backend any]\ntype = echo\n", "n", environment));
  };
  const std::string server = "[server]\n", listen = server + "tls_listen = *:1\n";
  CHECK_EQ(problems(listen + "tls_certificate = /c.pem\ntls_key = /k.pem\ntls_certificate = /c.pem"), "");
  CHECK_EQ(problems(listen), "n:2: tls_listen needs a tls_certificate\n");
  CHECK_EQ(problems(server + "tls_certificate = /c.pem"), "n:2: tls_certificate needs a tls_listen\n");
  CHECK_EQ(problems(server + "tls_client_ca = /c.pem"), "n:2: tls_client_ca needs a tls_listen\n");
  CHECK_EQ(problems(listen + "tls_key = /k.pem\ntls_certificate = /c.pem"),
           "n:3: tls_key: expected a tls_certificate above it, to which it belongs\n");
  CHECK_EQ(problems(listen + "tls_certificate = /c.pem\ntls_key = /k.pem\ntls_key = /k.pem"),
           "n:5: tls_key: the tls_certificate above it has a key already\n");
  CHECK_EQ(problems(listen + "tls_certificate = /text"),
           "n:3: tls_certificate: expected PEM texts in this file (-----BEGIN …-----)\n");
  CHECK_EQ(problems(listen + "tls_certificate = /none"),
           "n:3: tls_certificate: cannot read this file: No such file or directory\n");
  CHECK_EQ(problems(server + "listen = *:1\ntls_listen = *:1\ntls_certificate = /c.pem"),
           "n:3: tls_listen: 0.0.0.0:1 is already in listen\n");
  std::string many = listen;
  for (std::size_t i = 0; i < kMaxCertificates; ++i) many += "tls_certificate = /c.pem\n";
  CHECK_EQ(problems(many), "");
  CHECK_EQ(problems(many + "tls_certificate = /c.pem"), "n:67: tls_certificate: expected at most 64 certificates\n");

  const auto backend = [&](const std::string& lines) {
    return all_messages(nexus::parse_config("[backend b]\n" + lines, "n", environment));
  };
  CHECK_EQ(backend("url = https://h\ntls_ca = /c.pem\ntls_certificate = /c.pem\ntls_key = /k.pem"), "");
  CHECK_EQ(backend("url = https://h\ntls_verify = no"), "");
  CHECK_EQ(backend("url = https://h\ntls_ca = /c.pem\ntls_key = /k.pem"), "n:4: tls_key needs a tls_certificate\n");
  CHECK_EQ(backend("url = http://h\ntls_verify = no"), "n:3: tls_verify: allowed with an https:// url only\n");
  CHECK(backend("url = https://h\ntls_ca = /c.pem\ntls_name = a b")
            .starts_with("n:4: tls_name: expected the name or address"));
  CHECK_EQ(backend("url = https://h"),
           "n:1: [backend b]: this host has no bundle of trusted certificates (Debian: apt-get install "
           "ca-certificates); set tls_ca to a PEM file\n");
}

TEST_CASE("the host's bundle is the first that there is, or the file that SSL_CERT_FILE names") {
  const auto path_with = [](Texts variables, Texts files) {
    const ConfigResult result = nexus::parse_config("[backend b]\nurl = https://h\n[backend c]\nurl = https://i\n", "n",
                                                    fake_environment(std::move(variables), std::move(files)));
    return result.ok() ? result.settings.system_ca.path : all_messages(result);
  };
  for (const char* path : kSystemCa) CHECK_EQ(path_with({}, {{path, "x"}}), path);
  CHECK_EQ(path_with({}, {{kSystemCa[0], "x"}, {kSystemCa[2], "y"}}), kSystemCa[0]);
  const Texts both{{kSystemCa[0], "x"}, {"/mine", "y"}};
  CHECK_EQ(path_with({{"SSL_CERT_FILE", "/mine"}}, both), "/mine");
  CHECK(path_with({{"SSL_CERT_FILE", "/gone"}}, both).find("no bundle") != std::string::npos);
}

TEST_CASE("every key knows how it is stored") {
  for (const config::ConfigKey& row : config::kConfigKeys) {
    CAPTURE(row.key);
    CHECK((row.store != nullptr));
  }
}

TEST_CASE("a reload names the keys that changed, by section, and whole backends that came or went") {
  const std::string one = "[backend b1]\nurl = http://h:1\n";
  const auto change = [&](const std::string& before, const std::string& after) {
    const auto given = [&](const std::string& text) {
      const ConfigResult result = nexus::parse_config(one + text, "n", fake_environment());
      REQUIRE_EQ(all_messages(result), "");
      return result.settings.given;
    };
    return nexus::describe_changes(given(before), given(after));
  };
  const std::string other = "[backend b2]\nurl = http://h:2\n", aliased = "[aliases]\nx = m\n";
  CHECK_EQ(change("", ""), "nothing");
  CHECK_EQ(change("# a comment\n", "\n"), "nothing");
  CHECK_EQ(change("", "priority = 7\n"), "[backend b1] priority");
  CHECK_EQ(change("priority = 7\n", "priority = 8\ntype = vllm\n"), "[backend b1] priority, type");
  CHECK_EQ(change("priority = 7\n", ""), "[backend b1] priority");
  CHECK_EQ(change("", other), "[backend b2] added");
  CHECK_EQ(change(other, ""), "[backend b2] removed");
  CHECK_EQ(change(other, "[backend b20]\nurl = http://h:2\n"), "[backend b20] added; [backend b2] removed");
  CHECK_EQ(change("", aliased), "[aliases] x");
  CHECK_EQ(change("[queue]\nsize = 1\n", "[queue]\nsize = 2\n" + other + aliased),
           "[aliases] x; [backend b2] added; [queue] size");
}

TEST_CASE("a reload names a file or variable whose content changed, and does not tell the content") {
  const std::string text =
      "[server]\napi_keys_file = /k\n[backend b1]\nurl = http://h:1\napi_key_env = KEY\n[backend b2]\n"
      "url = http://h:2\napi_key_file = /b2\n";
  const auto given = [&](const std::string& client, const std::string& key, const std::string& file) {
    const ConfigResult result =
        nexus::parse_config(text, "n", fake_environment({{"KEY", key}}, {{"/k", "a " + client}, {"/b2", file}}));
    REQUIRE_EQ(all_messages(result), "");
    return result.settings.given;
  };
  const auto before = given("12345678", "x", "y");
  CHECK_EQ(nexus::describe_changes(before, given("12345678", "x", "y")), "nothing");
  CHECK_EQ(nexus::describe_changes(before, given("12345679", "x", "y")), "[server] api_keys_file (content)");
  CHECK_EQ(nexus::describe_changes(before, given("12345678", "z", "z")),
           "[backend b1] api_key_env (content); [backend b2] api_key_file (content)");
  for (const auto& [name, value] : before) CHECK(value.find("12345678") == std::string::npos);
}

TEST_CASE("a FIFO that nobody writes to ends at once, as an empty file") {
  char path[] = "/tmp/nexus_fifo_XXXXXX";
  REQUIRE(mkdtemp(path) != nullptr);
  const std::string fifo = std::string(path) + "/keys";
  REQUIRE(mkfifo(fifo.c_str(), 0600) == 0);
  CHECK_EQ(config::read_bounded_file(fifo), std::optional<std::string>(""));
  unlink(fifo.c_str());
  rmdir(path);
}
