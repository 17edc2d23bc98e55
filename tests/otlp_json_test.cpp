// otlp_json_test.cpp
// Goal:   a batch is JSON of OTLP, whatever names are in it; no attribute stands for what is unknown.
// Method: a span to the letter; hostile names read back by the tests' own reader of JSON. The end-to-end test reads
//         batches by OpenTelemetry's own schema.
#include <doctest/doctest.h>

#include <string>

#include "nexus/metrics/otlp_json.h"
#include "tests/lib/plain_json.h"

using namespace nexus;

namespace {

SpanRecord attempt() {
  SpanRecord span;
  span.trace_id.fill('a');
  span.span_id = 0x0123456789abcdef;
  span.parent_id = 0xf;
  span.kind = SpanRecord::Kind::client;
  span.flags = 1;
  span.began_wall_ns = 1'700'000'000'000'000'001;
  span.ended_wall_ns = 1'700'000'001'500'000'000;
  span.operation = "chat";
  span.provider = "vllm";
  span.model.set("llama3:70b");
  span.backend.set("gpu-1");
  span.host.set("gpu.lan");
  span.port = 8000;
  span.status = 200;
  return span;
}

std::string text_of(const SpanRecord& span) {
  std::string text;
  detail::SpanWriter json(text);
  write_span(json, span);
  return text;
}

// The value of an attribute, or `none`.
std::string attribute(const SpanRecord& span, std::string_view name) {
  const auto value = plain_json::Reader(text_of(span)).read();
  REQUIRE(value.has_value());
  for (const auto& item : value->find("attributes")->items) {
    if (item.find("key")->text == name) return item.find("value")->members.at(0).value.text;
  }
  return "none";
}

}  // namespace

TEST_CASE("a span is written with hex ids, numbers for enums, and decimal text for 64 bits") {
  SpanRecord span = attempt();
  span.stream = true;
  span.first_chunk_ns = 250 * kMillisecond;
  span.input_tokens = 12;
  span.output_tokens = 0;
  span.reasoning_tokens = 0;
  span.response_model.set("llama3:70b-q4");
  CHECK(text_of(span) ==
        R"({"traceId":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","spanId":"0123456789abcdef",)"
        R"("parentSpanId":"000000000000000f","flags":257,"name":"chat llama3:70b","kind":3,)"
        R"("startTimeUnixNano":"1700000000000000001","endTimeUnixNano":"1700000001500000000","attributes":[)"
        R"({"key":"http.response.status_code","value":{"intValue":"200"}},)"
        R"({"key":"gen_ai.operation.name","value":{"stringValue":"chat"}},)"
        R"({"key":"gen_ai.provider.name","value":{"stringValue":"vllm"}},)"
        R"({"key":"gen_ai.request.model","value":{"stringValue":"llama3:70b"}},)"
        R"({"key":"gen_ai.request.stream","value":{"boolValue":true}},)"
        R"({"key":"gen_ai.response.model","value":{"stringValue":"llama3:70b-q4"}},)"
        R"({"key":"gen_ai.response.time_to_first_chunk","value":{"doubleValue":0.25}},)"
        R"({"key":"gen_ai.usage.input_tokens","value":{"intValue":"12"}},)"
        R"({"key":"gen_ai.usage.output_tokens","value":{"intValue":"0"}},)"
        R"({"key":"gen_ai.usage.reasoning.output_tokens","value":{"intValue":"0"}},)"
        R"({"key":"server.address","value":{"stringValue":"gpu.lan"}},)"
        R"({"key":"server.port","value":{"intValue":"8000"}},)"
        R"({"key":"nexus.backend","value":{"stringValue":"gpu-1"}}],"status":{}})");
}

TEST_CASE("a request's span has its method and route, and says if its parent is another process's") {
  SpanRecord span = attempt();
  span.kind = SpanRecord::Kind::server;
  span.method = "POST";
  span.route = "/v1/chat/completions";
  span.host.set("");
  span.backend.set("");
  span.remote_parent = true;
  const std::string remote = text_of(span);
  CHECK(remote.find(R"("flags":769,"name":"POST /v1/chat/completions","kind":2,)") != std::string::npos);
  CHECK(attribute(span, "http.request.method") == "POST");
  CHECK(attribute(span, "http.route") == "/v1/chat/completions");
  CHECK(attribute(span, "server.port") == "none");
  span.parent_id = 0;
  span.remote_parent = false;
  CHECK(text_of(span).find("parentSpanId") == std::string::npos);
  CHECK(text_of(span).find(R"("flags":257)") != std::string::npos);
}

TEST_CASE("an error has its type, or its status for one, and only a failure has the status of one") {
  SpanRecord span = attempt();
  CHECK(attribute(span, "error.type") == "none");
  span.failed = true;
  span.status = 503;
  CHECK(attribute(span, "error.type") == "503");
  CHECK(text_of(span).ends_with(R"("status":{"code":2}})"));
  span.error = "timeout";
  span.status = 0;
  CHECK(attribute(span, "error.type") == "timeout");
  CHECK(attribute(span, "http.response.status_code") == "none");
  span.failed = false;
  span.error = "cancelled";
  CHECK(attribute(span, "error.type") == "cancelled");
  CHECK(text_of(span).ends_with(R"("status":{}})"));
}

TEST_CASE("a span without a model is named by its operation") {
  SpanRecord span = attempt();
  span.model.set("");
  CHECK(name_of(span) == "chat");
  CHECK(attribute(span, "gen_ai.request.model") == "none");
}

TEST_CASE("names of any bytes are valid JSON, and come back as far as they are text") {
  struct Row {
    std::string name, expected;
  };
  for (const Row& row : {Row{"a\"b\\c", "a\"b\\c"},
                         {"line\nend\r\t", "line\nend\r\t"},
                         {std::string("\0\x01\x1f\x7f", 4), std::string("\0\x01\x1f\x7f", 4)},
                         {"\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80", "\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80"},
                         {"\xff\xc0\xaf", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
                         {"</script>", "</script>"}}) {
    CAPTURE(row.name);
    SpanRecord span = attempt();
    span.model.set(row.name);
    CHECK(attribute(span, "gen_ai.request.model") == row.expected);
  }
}

TEST_CASE("a batch is one document: the service, then its spans") {
  TraceSettings trace;
  trace.service_name = "edge \"1\"";
  trace.attributes = {{"deployment.environment", "prod"}};
  SpanBatch batch;
  for (int spans = 0; spans < 3; ++spans) {
    batch.begin(trace, "nexus-1");
    for (int i = 0; i < spans; ++i) batch.add(attempt());
    CHECK(batch.count() == static_cast<std::size_t>(spans));
    batch.end();
    const auto document = plain_json::Reader(batch.text()).read();
    REQUIRE(document.has_value());
    const auto& of_resource = document->find("resourceSpans")->items.at(0);
    const auto& attributes = of_resource.find("resource")->find("attributes")->items;
    REQUIRE(attributes.size() == 4);
    CHECK(attributes[0].find("value")->find("stringValue")->text == "edge \"1\"");
    CHECK(attributes[2].find("value")->find("stringValue")->text == "nexus-1");
    CHECK(attributes[3].find("key")->text == "deployment.environment");
    const auto& of_scope = of_resource.find("scopeSpans")->items.at(0);
    CHECK(of_scope.find("scope")->find("name")->text == "nexus");
    CHECK(of_scope.find("spans")->items.size() == static_cast<std::size_t>(spans));
  }
}

TEST_CASE("an attribute of the environment takes the place of Nexus's own: a name is there once") {
  TraceSettings trace;
  trace.attributes = {{"service.instance.id", "pod-7"}, {"service.version", "9"}, {"team", "a"}};
  SpanBatch batch;
  batch.begin(trace, "nexus-1");
  batch.end();
  const auto document = plain_json::Reader(batch.text()).read();
  REQUIRE(document.has_value());
  std::string all;
  for (const auto& one : document->find("resourceSpans")->items.at(0).find("resource")->find("attributes")->items) {
    all += one.find("key")->text + "=" + one.find("value")->find("stringValue")->text + " ";
  }
  CHECK(all == "service.name=nexus service.instance.id=pod-7 service.version=9 team=a ");
}
