// trace_config_test.cpp
// Goal:   nexus.conf decides where spans go; OpenTelemetry's variables say it where it does not.
// Method: texts and variables as rows.
#include <doctest/doctest.h>

#include <map>
#include <optional>
#include <string>

#include "nexus/config/parser.h"

using namespace nexus;

namespace {

using Set = std::map<std::string, std::string>;

ConfigResult read(const std::string& lines, const Set& variables = {}) {
  const ConfigEnvironment env{[variables](const std::string& name) {
                                const auto found = variables.find(name);
                                return found == variables.end() ? std::nullopt : std::optional(found->second);
                              },
                              {}};
  return parse_config("[backend b]\ntype = echo\n[trace]\n" + lines, "c", env);
}

std::string collector(const ConfigResult& result) {
  const TraceSettings& trace = result.settings.trace;
  return trace.on() ? config::address_text(trace.collector) + trace.base_path : "off";
}

const Set kVariable{{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://sidecar:4318"}};

}  // namespace

TEST_CASE("a collector is a URL in clear, with or without a prefix and the path that is posted to") {
  struct Row {
    const char *text, *expected;
  };
  for (const Row& row : {Row{"http://127.0.0.1:4318", "127.0.0.1:4318"},
                         {"http://127.0.0.1:4318/", "127.0.0.1:4318"},
                         {"http://otel.lan", "otel.lan:80"},
                         {"http://[::1]:4318/otlp", "[::1]:4318/otlp"},
                         {"http://a:4318/v1/traces", "a:4318"},
                         {"http://a:4318/x/v1/traces/", "a:4318/x"},
                         {"off", "off"}}) {
    CAPTURE(std::string(row.text));
    const ConfigResult result = read("endpoint = " + std::string(row.text) + "\n");
    CHECK(result.ok());
    CHECK(collector(result) == row.expected);
  }
  CHECK(collector(read("")) == "off");
}

TEST_CASE("a collector that is none is an error with its line, and a password is not quoted") {
  for (const char* text : {"https://a:4318", "a:4318", "http://", "http://a:0", "http://user:secret@a:4318",
                           "http://a:4318?x=1", "none", "grpc://a:4317"}) {
    CAPTURE(std::string(text));
    const ConfigResult result = read("endpoint = " + std::string(text) + "\n");
    REQUIRE(result.errors.size() == 1);
    CHECK(result.errors[0].line == 4);
    CHECK(result.errors[0].message.starts_with("endpoint: expected "));
    CHECK(result.errors[0].message.find("secret") == std::string::npos);
  }
}

TEST_CASE("the variable names the collector if nexus.conf does not, and off keeps it out") {
  CHECK(collector(read("", kVariable)) == "sidecar:4318");
  CHECK(collector(read("trace_ratio = 0.5\n", kVariable)) == "sidecar:4318");
  CHECK(collector(read("endpoint = http://own:1\n", kVariable)) == "own:1");
  CHECK(collector(read("endpoint = off\n", kVariable)) == "off");
}

TEST_CASE("an unfit variable keeps nothing from starting: a remark says what is wrong") {
  for (const char* text : {"https://user:secret@a", "a:4318", "http://user:secret@a"}) {
    const ConfigResult result = read("", {{"OTEL_EXPORTER_OTLP_ENDPOINT", text}});
    CHECK(result.ok());
    CHECK(collector(result) == "off");
    CHECK(result.settings.trace.remark.starts_with("OTEL_EXPORTER_OTLP_ENDPOINT: expected "));
    CHECK(result.settings.trace.remark.find("secret") == std::string::npos);
  }
  CHECK(read("endpoint = off\n", {{"OTEL_EXPORTER_OTLP_ENDPOINT", "a:4318"}}).settings.trace.remark.empty());
  CHECK(read("", {{"OTEL_EXPORTER_OTLP_ENDPOINT", ""}}).settings.trace.remark.empty());
}

TEST_CASE("a share has a digit before its point and at most six behind it") {
  struct Row {
    const char* text;
    std::optional<std::uint64_t> expected;
  };
  for (const Row& row : {Row{"0", 0},
                         {"1", 1'000'000},
                         {"1.0", 1'000'000},
                         {"0.25", 250'000},
                         {"0.000001", 1},
                         {"0.0000001", {}},
                         {"1.000001", {}},
                         {"2", {}},
                         {"-1", {}},
                         {".5", {}},
                         {"0.", {}},
                         {"0.5x", {}},
                         {"50%", {}},
                         {"0,5", {}},
                         {"", {}},
                         {"1e-3", {}},
                         {"99999999999999", {}}}) {
    CAPTURE(std::string(row.text));
    CHECK(config::kShare.parse(row.text, "0 to 1") == row.expected);
  }
  CHECK(read("").settings.trace.ratio_ppm == 1'000'000);
  CHECK(read("trace_ratio = 0.05\n").settings.trace.ratio_ppm == 50'000);
  CHECK(read("trace_ratio = 5%\n").errors[0].message ==
        "trace_ratio: expected a share with at most six decimals, 0 to 1, not '5%'");
}

TEST_CASE("the service has the name and the attributes that the variables give it") {
  using Attributes = std::vector<std::pair<std::string, std::string>>;
  const auto trace = [](const Set& variables) { return read("", variables).settings.trace; };
  CHECK(trace({}).service_name == "nexus");
  CHECK(trace({{"OTEL_SERVICE_NAME", "edge"}}).service_name == "edge");
  const char* list = "service.name=listed, deployment.environment = prod%2Fa ,k=a=b,bad,=x,broken=%zz,k=c,cut=%4";
  CHECK(trace({{"OTEL_RESOURCE_ATTRIBUTES", list}}).service_name == "listed");
  CHECK(trace({{"OTEL_RESOURCE_ATTRIBUTES", list}, {"OTEL_SERVICE_NAME", "edge"}}).service_name == "edge");
  CHECK(trace({{"OTEL_RESOURCE_ATTRIBUTES", list}}).attributes ==
        Attributes{{"deployment.environment", "prod/a"}, {"k", "c"}});
  std::string many, long_one = "n=" + std::string(kMaxResourceAttributeBytes + 1, 'x');
  for (int i = 0; i < 200; ++i) many += "a" + std::to_string(i) + "=1,";
  CHECK(trace({{"OTEL_RESOURCE_ATTRIBUTES", many}}).attributes.size() == kMaxResourceAttributes);
  CHECK(trace({{"OTEL_RESOURCE_ATTRIBUTES", long_one}}).attributes.empty());
}
