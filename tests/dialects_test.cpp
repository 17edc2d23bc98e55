// dialects_test.cpp
// Covers: the rows of dialects.h: what each API's responses tell, and what each API's requests need.
// Method: responses as their servers write them, in every cut, with each line end; the bytes must pass unchanged.
#include <doctest/doctest.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/endpoints.h"
#include "nexus/api/incremental_json.h"
#include "nexus/api/request_json.h"
#include "nexus/api/usage_scan.h"

using nexus::BodyFacts;
using nexus::Dialect;
using nexus::UsageScan;

namespace {

struct Told {
  std::int64_t prompt = -1, completion = -1, cached = -1;
  std::uint64_t events = 0;
  bool error = false, ended = false;
  bool operator==(const Told&) const = default;
};

// Feeds `text` in pieces that end at `ends`; false in `unchanged` if other bytes came out.
Told scan(Dialect dialect, UsageScan::Kind kind, std::string_view text, const std::vector<std::size_t>& ends,
          bool& unchanged) {
  static nexus::BlockPool pool;
  static nexus::JsonReader reader;
  UsageScan scan;
  UsageScan::Out out;
  std::string passed;
  scan.start(kind, &nexus::row_of(dialect).response, false);
  std::size_t from = 0;
  for (const std::size_t end : ends) {
    std::string piece(text.substr(from, end - from));
    piece.resize(piece.size() + nexus::kPaddingBytes, '"');
    REQUIRE(scan.feed(pool, reader, piece.data(), end - from, false, out));
    passed.append(out.held).append(out.piece);
    from = end;
  }
  REQUIRE(scan.feed(pool, reader, nullptr, 0, true, out));
  passed.append(out.held).append(out.piece);
  unchanged = passed == text;
  const nexus::Usage usage = scan.usage();
  scan.drop_memory();
  CHECK(pool.taken_bytes() == 0);
  return {usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens,
          scan.events(),       scan.told_error(),       scan.ended_well()};
}

struct Stream {
  const char* name;
  Dialect dialect;
  std::string text;
  Told told;
};

std::string event(std::string_view type, std::string_view rest) {
  return std::string("event: ").append(type).append("\ndata: {\"type\":\"").append(type).append("\"").append(rest) +
         "}\n\n";
}

const std::string kMessageStart = event(
    "message_start",
    R"(,"message":{"id":"msg_1","type":"message","role":"assistant","content":[],"stop_reason":null,"usage":{"input_tokens":25,"cache_read_input_tokens":100,"cache_creation_input_tokens":7,"output_tokens":1}})");
const std::string kMessageDelta =
    event("content_block_delta",
          R"(,"index":0,"delta":{"type":"text_delta","text":"Hello {\"usage\": message_stop} and more"})");
const std::string kPing = event("ping", "");
const std::string kMessageStop = event("message_stop", "");

const std::string kResponseBegin = event(
    "response.created",
    R"(,"sequence_number":0,"response":{"id":"resp_1","object":"response","status":"in_progress","error":null,"usage":null})");
const std::string kResponseDelta =
    event("response.output_text.delta", R"(,"sequence_number":4,"item_id":"msg_1","delta":"response.completed")");

std::vector<Stream> streams() {
  const auto completed = [](std::string_view type, std::string_view error) {
    return event(type, std::string(R"(,"response":{"id":"resp_1","error":)").append(error) +
                           R"(,"output":[{"type":"message"}],"usage":{"input_tokens":36,"input_tokens_details":)"
                           R"({"cached_tokens":30},"output_tokens":87,"output_tokens_details":{"reasoning_tokens":5},)"
                           R"("total_tokens":123}})");
  };
  return {
      {"messages",
       Dialect::messages,
       kMessageStart + kPing + kMessageDelta +
           event("message_delta", R"(,"delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":15})") + kMessageStop,
       {132, 15, 100, 5, false, true}},
      {"messages whose usage comes late alone",
       Dialect::messages,
       event("message_start", R"(,"message":{"usage":{"input_tokens":3,"output_tokens":0}})") +
           event("message_delta", R"(,"usage":{"input_tokens":8,"cache_read_input_tokens":2,"output_tokens":4})") +
           "data: {\"type\": \"message_stop\"}\n\n",
       {10, 4, 2, 3, false, true}},
      {"messages that break off", Dialect::messages, kMessageStart + kMessageDelta, {132, 1, 100, 2, false, false}},
      {"messages with an error",
       Dialect::messages,
       kMessageStart + event("error", R"(,"error":{"type":"overloaded_error","message":"Overloaded"})"),
       {132, 1, 100, 2, true, false}},
      {"responses",
       Dialect::responses,
       kResponseBegin + kResponseDelta + completed("response.completed", "null"),
       {36, 87, 30, 3, false, true}},
      {"responses without names of events",
       Dialect::responses,
       R"(data: {"type":"response.incomplete","response":{"usage":{"input_tokens":1,"output_tokens":2}}})"
       "\n\n",
       {1, 2, -1, 1, false, true}},
      {"responses with types that are parts of an end mark",
       Dialect::responses,
       kResponseBegin + event("completed", "") + event("response", "") + event("response.completed response", ""),
       {-1, -1, -1, 4, false, false}},
      {"responses that failed",
       Dialect::responses,
       kResponseBegin + completed("response.failed", R"({"code":"server_error","message":"x"})"),
       {36, 87, 30, 2, true, true}},
      {"responses that failed without a reason",
       Dialect::responses,
       R"(data: {"type":"response.failed","response":{}})"
       "\n\n",
       {-1, -1, -1, 1, true, true}},
      {"responses with an error",
       Dialect::responses,
       kResponseBegin + event("error", R"(,"code":"x","message":"y")"),
       {-1, -1, -1, 2, true, false}},
      {"responses in which a tool failed",
       Dialect::responses,
       kResponseBegin + event("response.mcp_call.failed", R"(,"item_id":"mcp_1","output_index":1)") +
           completed("response.completed", "null"),
       {36, 87, 30, 3, false, true}},
      {"a transcript",
       Dialect::media,
       event("transcript.text.delta", R"(,"delta":"I see skies of blue and transcript.text.done")") +
           event("transcript.text.done",
                 R"(,"text":"x","usage":{"type":"tokens","input_tokens":14,"output_tokens":45,"total_tokens":59})"),
       {14, 45, -1, 2, false, true}},
      {"a transcript of vLLM",
       Dialect::media,
       "data: {\"object\":\"transcription.chunk\",\"choices\":[{\"delta\":{\"content\":\"I see\"}}]}\n\n"
       "data: {\"object\":\"transcription.chunk\",\"choices\":[],"
       "\"usage\":{\"prompt_tokens\":200,\"total_tokens\":212,\"completion_tokens\":12}}\n\ndata: [DONE]\n\n",
       {200, 12, -1, 3, false, true}},
      {"llama.cpp's own completion",
       Dialect::llamacpp,
       "data: {\"index\":0,\"content\":\"a\",\"tokens\":[1],\"stop\":false,\"tokens_predicted\":1,"
       "\"tokens_evaluated\":7}\n\n"
       "data: {\"content\":\"\",\"stop\":true,\"tokens_predicted\":6,\"tokens_evaluated\":7,\"timings\":{\"cache_n\":5,"
       "\"prompt_n\":2},\"generation_settings\":{\"stop\":false,\"tokens_evaluated\":99}}\n\n",
       {7, 6, 5, 2, false, true}},
      {"Ollama",
       Dialect::ollama_chat,
       "{\"model\":\"m\",\"message\":{\"role\":\"assistant\",\"content\":\"{\\\"done\\\":true}\"},\"done\":false}\n"
       "{\"model\":\"m\",\"message\":{\"content\":\"\"},\"done\":true,\"done_reason\":\"stop\",\"total_duration\":5,"
       "\"prompt_eval_count\":26,\"context\":[1,2,3],\"eval_count\":290}\n",
       {26, 290, -1, 2, false, true}},
      {"Ollama without a last line end",
       Dialect::ollama_generate,
       "{\"response\":\"x\",\"done\":false}\n\n{ \"done\" : true, \"eval_count\" : 3 , \"prompt_eval_count\": 4 }",
       {4, 3, -1, 2, false, true}},
      {"Ollama with an error",
       Dialect::ollama_chat,
       "{\"done\":false}\n{\"error\":\"model runner has stopped\"}\n",
       {-1, -1, -1, 2, true, false}},
      {"no lines", Dialect::ollama_chat, "\n\n", {-1, -1, -1, 0, false, false}},
  };
}

std::string with_line_ends(std::string_view text, std::string_view line_end) {
  std::string out;
  for (const char c : text) c == '\n' ? out += line_end : out += c;
  return out;
}

struct Padded {
  explicit Padded(std::string_view text) : bytes(text), held(text) { held.append(nexus::kPaddingBytes, '"'); }
  std::string_view view() const { return {held.data(), bytes.size()}; }
  std::string_view bytes;
  std::string held;
};

const nexus::Endpoint& endpoint(std::string_view path) {
  for (const nexus::Endpoint& row : nexus::kEndpoints) {
    if (row.path == path) return row;
  }
  FAIL("no such endpoint");
  return nexus::kEndpoints[0];
}

}  // namespace

TEST_CASE("each API's stream tells its counts, errors and end, in every cut and with each line end") {
  for (const Stream& row : streams()) {
    const bool lines = nexus::row_of(row.dialect).framing == nexus::StreamFraming::lines;
    const auto kind = lines ? UsageScan::Kind::lines : UsageScan::Kind::event_stream;
    for (const std::string_view line_end : {"\n", "\r\n"}) {
      const std::string name = row.name;
      CAPTURE(name);
      CAPTURE(line_end.size());
      const std::string text = with_line_ends(row.text, line_end);
      bool unchanged = false;
      CHECK(scan(row.dialect, kind, text, {text.size()}, unchanged) == row.told);
      CHECK(unchanged);
      std::vector<std::size_t> bytes;
      for (std::size_t i = 1; i <= text.size(); ++i) bytes.push_back(i);
      CHECK(scan(row.dialect, kind, text, bytes, unchanged) == row.told);
      bool right = true;
      for (std::size_t cut = 0; cut <= text.size() && right; ++cut) {
        right = scan(row.dialect, kind, text, {cut, text.size()}, unchanged) == row.told && unchanged;
      }
      CHECK(right);
    }
  }
}

TEST_CASE("the id of a response is told by its first event, however long that is, and in every cut") {
  const std::string begin = event("response.created", R"(,"response":{"object":"response","instructions":")" +
                                                          std::string(300, 'x') + R"(","id":"resp_1","usage":null})");
  const std::string text =
      begin + event("response.output_text.delta", R"(,"item_id":"resp_2","delta":"a longer text"})");
  for (std::size_t cut = 0; cut <= text.size(); ++cut) {
    static nexus::BlockPool pool;
    static nexus::JsonReader reader;
    UsageScan scan;
    UsageScan::Out out;
    scan.start(UsageScan::Kind::event_stream, &nexus::row_of(Dialect::responses).response, false);
    std::uint64_t id = 0;
    for (const auto& [from, to] : {std::pair(std::size_t{0}, cut), std::pair(cut, text.size())}) {
      std::string piece = text.substr(from, to - from);
      piece.resize(piece.size() + nexus::kPaddingBytes, '"');
      REQUIRE(scan.feed(pool, reader, piece.data(), to - from, false, out));
      if (const std::uint64_t told = scan.take_id()) id = told;
    }
    if (id == nexus::hash_of("resp_1")) continue;
    CAPTURE(cut);
    CHECK(id == nexus::hash_of("resp_1"));
  }
}

TEST_CASE("each API's plain response tells its counts, whole and in pieces") {
  struct Row {
    Dialect dialect;
    std::string_view text;
    std::int64_t prompt, completion, cached;
  };
  const Row rows[] = {
      {Dialect::responses,
       R"({"id":"resp_1","error":null,"usage":{"input_tokens":36,"input_tokens_details":{"cached_tokens":4},"output_tokens":87},"user":null})",
       36, 87, 4},
      {Dialect::messages,
       R"({"type":"message","content":[{"type":"text","text":"\"usage\":{}"}],"usage":{"input_tokens":5,"cache_read_input_tokens":11,"cache_creation_input_tokens":null,"output_tokens":9}})",
       16, 9, 11},
      {Dialect::media, R"({"text":"hi","usage":{"type":"duration","seconds":3}})", -1, -1, -1},
      {Dialect::media, R"({"text":"hi","usage":{"type":"tokens","input_tokens":14,"output_tokens":45}})", 14, 45, -1},
      {Dialect::media, R"({"text":"hi","usage":{"prompt_tokens":200,"completion_tokens":12}})", 200, 12, -1},
      {Dialect::llamacpp,
       R"({"content":"x","tokens_predicted":8,"stop":true,"tokens_evaluated":3,"timings":{"cache_n":1}})", 3, 8, 1},
      {Dialect::ollama_chat, R"({"message":{"eval_count":7},"done":true,"prompt_eval_count":11,"eval_count":18.0})", 11,
       18, -1},
      {Dialect::ollama_chat, R"({"embeddings":[[0.1]],"prompt_eval_count":8})", 8, -1, -1},
      {Dialect::openai, R"({"results":[],"usage":{"prompt_tokens":17,"total_tokens":17}})", 17, -1, -1},
  };
  for (const Row& row : rows) {
    const std::string text(row.text);
    CAPTURE(text);
    const auto check = [&](const nexus::Usage& usage) {
      CHECK(usage.prompt_tokens == row.prompt);
      CHECK(usage.completion_tokens == row.completion);
      CHECK(usage.cached_tokens == row.cached);
    };
    const Padded padded(row.text);
    nexus::JsonReader reader;
    check(nexus::read_answer(reader, nexus::row_of(row.dialect).response, padded.view())
              .added_up(nexus::row_of(row.dialect).response));
    bool unchanged = false;
    for (std::size_t cut = 0; cut <= text.size(); ++cut) {
      const Told told = scan(row.dialect, UsageScan::Kind::json, text, {cut, text.size()}, unchanged);
      check({told.prompt, told.completion, told.cached});
    }
  }
}

TEST_CASE("each API's body says what its model must be able to do") {
  struct Row {
    std::string_view path, body;
    bool images, json_mode, stream;
  };
  const Row rows[] = {
      {"/v1/responses", R"({"model":"m","input":"an \"input_image\" in words","text":{"format":{"type":"text"}}})",
       false, false, false},
      {"/v1/responses",
       R"({"model":"m","stream":true,"input":[{"role":"user","content":[{"type":"input_image","image_url":"x"}]}]})",
       true, false, true},
      {"/v1/responses", R"({"model":"m","input":"x","text":{"format":{"type":"json_schema","schema":{}}}})", false,
       true, false},
      {"/v1/messages",
       R"({"model":"m","messages":[{"role":"user","content":[{"type":"image","source":{"type":"base64"}}]}]})", true,
       false, false},
      {"/v1/messages", R"({"model":"m","messages":[{"role":"user","content":"an \"image\""}]})", false, false, false},
      {"/api/chat", R"({"model":"m","messages":[{"role":"user","content":"x","images":["aGk="]}]})", true, false, true},
      {"/api/chat", R"({"model":"m","stream":false,"format":"json","messages":[]})", false, true, false},
      {"/api/chat", R"({"model":"m","stream":null,"format":"","messages":[]})", false, false, true},
      {"/api/chat", R"({"model":"m","format":{"type":"object","properties":{}},"messages":[]})", false, true, true},
      {"/api/generate", R"({"model":"m","prompt":"x","images":["aGk="]})", true, false, true},
      {"/api/generate", R"({"model":"m","prompt":"x","images":[]})", false, false, true},
      {"/v1/chat/completions", R"({"model":"m","images":["x"],"input":"\"input_image\"","text":"json_object"})", false,
       false, false},
  };
  for (const Row& row : rows) {
    const std::string body(row.body);
    CAPTURE(body);
    const Padded padded(row.body);
    nexus::JsonReader reader;
    BodyFacts direct, pieces;
    REQUIRE(nexus::read_body(reader, endpoint(row.path), padded.view(), direct) == std::nullopt);
    nexus::IncrementalJson incremental;
    incremental.start(endpoint(row.path));
    for (std::size_t end = 1; end < padded.view().size(); ++end) incremental.feed(reader, padded.view().data(), end);
    REQUIRE(incremental.read(reader, padded.view(), pieces) == std::nullopt);
    for (const BodyFacts* facts : {&direct, &pieces}) {
      CHECK(facts->has_images == row.images);
      CHECK(facts->json_mode == row.json_mode);
      CHECK(facts->stream == row.stream);
    }
  }
}

TEST_CASE("a model is required, or not, by the endpoint's row; a body without one is read in pieces as at once") {
  for (const nexus::Endpoint& row : nexus::kEndpoints) {
    if (row.body != nexus::BodyFormat::json) continue;
    CAPTURE(std::string(row.path));
    const Padded padded(R"({"content":"x"})");
    nexus::JsonReader reader;
    BodyFacts facts;
    const auto wanted = row.model == nexus::Model::required ? std::optional(nexus::ApiError::no_model) : std::nullopt;
    CHECK(nexus::read_body(reader, row, padded.view(), facts) == wanted);
    nexus::IncrementalJson incremental;
    incremental.start(row);
    CHECK(incremental.read(reader, padded.view(), facts) == wanted);
    CHECK(facts.model.empty());
  }
}
