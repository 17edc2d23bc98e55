// trace_context_test.cpp
// Goal:   a parent is followed only if it is one, and what is handed on is one too.
// Method: values as rows, from W3C Trace Context and its test suite; ids and shares counted over many requests.
#include <doctest/doctest.h>

#include <optional>
#include <set>
#include <string>

#include "nexus/http/trace_context.h"
#include "nexus/proxy/request_trace.h"

using namespace nexus;

namespace {

const std::string kTrace = "0af7651916cd43dd8448eb211c80319c", kSpan = "b7ad6b7169203331";

// The parent of a request with these lines.
std::optional<TraceParent> parent_of(const std::string& lines) {
  const std::string text = "GET / HTTP/1.1\r\nHost: a\r\n" + lines + "\r\n";
  FieldTable fields;
  RequestReader reader;
  RequestHead head;
  reader.start(&fields);
  const HeadResult result = reader.feed(text.data(), text.size(), head);
  REQUIRE(result.status == HeadResult::Status::done);
  return trace_parent_of({text.data(), &fields, result.head_bytes});
}

std::string line_of(const TraceParent& parent) {
  std::string line;
  append_traceparent(line, parent);
  return line;
}

}  // namespace

TEST_CASE("a well-formed traceparent is read, and one of an unknown version by its first four fields") {
  struct Row {
    std::string value;
    unsigned flags;
  };
  const std::string middle = "-" + kTrace + "-" + kSpan + "-";
  for (const Row& row : {Row{"00" + middle + "01", 1},
                         {"00" + middle + "00", 0},
                         {"00" + middle + "03", 3},
                         {"00" + middle + "ff", 3},
                         {"00" + middle + "09", 1},
                         {"cc" + middle + "01", 1},
                         {"01" + middle + "01-more", 1},
                         {"cc" + middle + "00-what-ever.comes", 0}}) {
    CAPTURE(row.value);
    const auto parent = parse_traceparent(row.value);
    REQUIRE(parent.has_value());
    CHECK(std::string(parent->trace_id.data(), parent->trace_id.size()) == kTrace);
    CHECK(parent->span_id == 0xb7ad6b7169203331);
    CHECK(parent->flags == row.flags);
    CHECK(line_of(*parent) == "traceparent: 00" + middle + "0" + std::to_string(row.flags) + "\r\n");
  }
}

TEST_CASE("what is no traceparent has no parent") {
  const std::string zeros(32, '0');
  const std::string rows[] = {"",
                              "garbage",
                              "00-" + kTrace + "-" + kSpan,
                              "00-" + kTrace + "-" + kSpan + "-1",
                              "00-" + kTrace + "-" + kSpan + "-01x",
                              "00-" + kTrace + "-" + kSpan + "-01-more",  // of this version nothing follows
                              "cc-" + kTrace + "-" + kSpan + "-01more",
                              "ff-" + kTrace + "-" + kSpan + "-01",
                              "0-" + kTrace + "-" + kSpan + "-0001",
                              "00-" + zeros + "-" + kSpan + "-01",
                              "00-" + kTrace + "-" + zeros.substr(16) + "-01",
                              "00-0AF7651916CD43DD8448EB211C80319C-" + kSpan + "-01",
                              "00-" + kTrace + "-B7AD6B7169203331-01",
                              "00-" + kTrace + "-" + kSpan + "-0A",
                              "0A-" + kTrace + "-" + kSpan + "-01",
                              "00-" + kTrace.substr(1) + ".-" + kSpan + "-01",
                              "00_" + kTrace + "-" + kSpan + "-01",
                              "00-" + kTrace + "_" + kSpan + "-01",
                              "00-" + kTrace + "-" + kSpan + "_01"};
  for (const std::string& value : rows) {
    CAPTURE(value);
    CHECK_FALSE(parse_traceparent(value).has_value());
  }
}

TEST_CASE("a request's parent is that of its one traceparent, in any case") {
  const std::string value = "00-" + kTrace + "-" + kSpan + "-01";
  CHECK(parent_of("TraceParent:  " + value + " \r\n").has_value());
  CHECK_FALSE(parent_of("").has_value());
  CHECK_FALSE(parent_of("trace-parent: " + value + "\r\n").has_value());
  CHECK_FALSE(parent_of("traceparent: " + value + "\r\ntracestate: a=1\r\nTraceparent: " + value + "\r\n").has_value());
}

TEST_CASE("a request follows its parent, sampled or not, whatever the ratio says") {
  Random random(7);
  for (std::uint8_t flags = 0; flags <= kKnownFlags; ++flags) {
    TraceParent client;
    client.trace_id.fill('a');
    client.span_id = 5;
    client.flags = flags;
    for (const std::uint32_t ratio : {0u, 1'000'000u}) {
      RequestTrace trace;
      trace.begin(client, ratio, random);
      CHECK((trace.state == RequestTrace::State::sampled) == (flags % 2 == 1));
      CHECK(trace.makes_lines());
      CHECK(trace.id == client.trace_id);
      CHECK(trace.parent == 5);
      CHECK(trace.flags == flags);
      CHECK(trace.server_span != 0);
      CHECK(trace.withheld == bit_of(Field::traceparent));  // its tracestate is handed on
    }
  }
}

TEST_CASE("without a parent a trace begins, and the ratio says how many are sampled") {
  struct Row {
    std::uint32_t ratio;
    int least, most;
  };
  constexpr int kRequests = 20'000;
  for (const Row& row :
       {Row{0, 0, 0}, {10'000, 130, 270}, {500'000, 9'700, 10'300}, {1'000'000, kRequests, kRequests}}) {
    CAPTURE(row.ratio);
    Random random(99);
    std::set<std::string> ids;
    int sampled = 0;
    for (int i = 0; i < kRequests; ++i) {
      RequestTrace trace;
      trace.begin(std::nullopt, row.ratio, random);
      sampled += trace.state == RequestTrace::State::sampled ? 1 : 0;
      CHECK(trace.flags == (trace.state == RequestTrace::State::sampled ? 1 : 0));
      CHECK(trace.parent == 0);
      const std::string id(trace.id.data(), trace.id.size());
      ids.insert(id);
      // What Nexus writes it reads as a parent.
      const std::string line = line_of({trace.id, trace.server_span, trace.flags});
      CHECK(parse_traceparent(std::string_view(line).substr(13, line.size() - 15)).has_value());
    }
    CHECK(sampled >= row.least);
    CHECK(sampled <= row.most);
    CHECK(ids.size() == kRequests);
  }
}

TEST_CASE("the operation of an endpoint is the convention's word where it has one") {
  struct Row {
    const char *path, *expected;
  };
  for (const Row& row : {Row{"/v1/chat/completions", "chat"},
                         {"/v1/completions", "text_completion"},
                         {"/v1/embeddings", "embeddings"},
                         {"/v1/responses", "chat"},
                         {"/v1/messages", "chat"},
                         {"/v1/messages/count_tokens", "count_tokens"},
                         {"/api/chat", "chat"},
                         {"/api/generate", "text_completion"},
                         {"/api/embed", "embeddings"},
                         {"/api/embeddings", "embeddings"},
                         {"/api/show", "ollama"},
                         {"/embedding", "embeddings"},
                         {"/completion", "text_completion"},
                         {"/apply-template", "llamacpp"},
                         {"/v1/rerank", "rerank"},
                         {"/v1/responses/{id}", "responses"},
                         {"/v1/audio/speech", "speech"}}) {
    CAPTURE(std::string(row.path));
    const auto found = std::find_if(kEndpoints.begin(), kEndpoints.end(),
                                    [&](const Endpoint& endpoint) { return endpoint.path == row.path; });
    REQUIRE(found != kEndpoints.end());
    CHECK(operation_of(*found) == row.expected);
  }
}

TEST_CASE(
    "the pieces of a response are asked for its model until one tells it, four at most, and each at its beginning") {
  Random random(1);
  ObjectPool<TraceTexts> texts;
  RequestTrace trace;
  CHECK_FALSE(trace.wants_model());
  trace.begin(std::nullopt, 1'000'000, random);
  CHECK_FALSE(trace.wants_model());  // there may be no memory for it
  trace.texts = texts.take();
  for (int piece = 0; piece < 4; ++piece) {
    CHECK(trace.wants_model());
    trace.note_model("", true);
  }
  CHECK_FALSE(trace.wants_model());
  trace.expect_answer();
  CHECK(trace.wants_model());
  trace.note_model("", false);  // the next one begins within an event
  CHECK_FALSE(trace.wants_model());
  trace.expect_answer();
  trace.note_model("m1", true);
  CHECK_FALSE(trace.wants_model());
  CHECK(trace.texts->response_model.view() == "m1");
  trace.reset();
  CHECK_FALSE(trace.wants_model());
  CHECK(texts.taken() == 0);
  CHECK(texts.take()->response_model.view().empty());
}
