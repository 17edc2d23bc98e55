// told_model_test.cpp
// Goal:   the model of a response is read where each API tells it, and from nowhere else.
// Method: first pieces of answers and streams, whole and cut.
#include "nexus/api/told_model.h"

#include <doctest/doctest.h>

#include <string>
#include <string_view>

#include "nexus/base/buffer.h"

using namespace nexus;

namespace {

std::string told(Dialect dialect, bool stream, std::string_view piece) {
  static JsonReader reader;
  std::string padded(piece);
  padded.append(kPaddingBytes, '"');  // what stands behind it is not read as a part of it
  return std::string(
      told_model(reader, row_of(dialect).response, stream, std::string_view(padded.data(), piece.size())));
}

}  // namespace

TEST_CASE("the model that answered is read where each API tells it") {
  struct Row {
    Dialect dialect;
    bool stream;
    std::string_view piece, model;
  };
  const Row rows[] = {
      {Dialect::openai, false, R"({"id":"1","model":"m1","choices":[{"message":{"content":"\"model\":\"no\""}}]})",
       "m1"},
      {Dialect::openai, false, R"( {"choices":[{"model":"no"}],"usage":{"model":"no"},"model" : "m\u0031"})", "m1"},
      {Dialect::openai, false, R"({"id":"1","model":null,"choices":[]})", ""},
      {Dialect::openai, false, R"({"id":"1","model":7})", ""},
      {Dialect::openai, false, R"({"error":{"message":"no","model":"no"}})", ""},
      {Dialect::openai, false, R"(["model","no"])", ""},
      {Dialect::openai, false, "", ""},
      {Dialect::openai, false, "data: {\"model\":\"no\"}\n\n", ""},
      {Dialect::openai, true, "data: {\"model\":\"m1\",\"choices\":[]}\n\ndata: {\"model\":\"m2\"}\n\n", "m1"},
      {Dialect::openai, true, ": still here\r\n\r\ndata:{\"model\":\"m1\"}\r\n\r\n", "m1"},
      {Dialect::openai, true, "data: [DONE]\n\n", ""},
      {Dialect::openai, true, ": ping\n", ""},
      {Dialect::openai, true, "data: {\"id\":\"1\"}\n\ndata: {\"model\":\"no\"}\n\n", ""},
      {Dialect::responses, false, R"({"id":"resp_1","response":{"x":1},"model":"m1","output":[]})", "m1"},
      {Dialect::responses, true,
       "event: response.created\ndata: "
       "{\"type\":\"response.created\",\"response\":{\"id\":\"r\",\"model\":\"m1\"}}\n\n",
       "m1"},
      {Dialect::messages, true,
       "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"model\":\"m1\",\"content\":[]}}\n\n",
       "m1"},
      {Dialect::messages, false, R"({"type":"message","model":"m1","content":[]})", "m1"},
      {Dialect::ollama_chat, true, "{\"model\":\"m1\",\"done\":false}\n{\"model\":\"m2\",\"done\":true}\n", "m1"},
      {Dialect::ollama_chat, false, R"({"model":"m1","done":true})", "m1"},
      {Dialect::openai, false, "{\"model\":\"\xff\"}", ""},
  };
  for (const Row& row : rows) {
    CAPTURE(row.piece);
    CHECK(told(row.dialect, row.stream, row.piece) == row.model);
  }
}

TEST_CASE("a piece that is cut anywhere tells the whole name or none") {
  const std::string event =
      "event: x\ndata: {\"id\":\"1\",\"model\":\"a model\",\"choices\":[{\"text\":\"and so on\"}]}\n\n";
  const std::string answer = event.substr(15, event.size() - 17);
  bool read = false;
  for (std::size_t cut = 0; cut <= event.size(); ++cut) {
    for (const bool stream : {true, false}) {
      const std::string model = told(Dialect::openai, stream, (stream ? event : answer).substr(0, cut));
      CHECK((model.empty() || model == "a model"));
      read |= cut < answer.size() && !model.empty();
    }
  }
  CHECK(read);  // also before the end of the object
  CHECK(told(Dialect::openai, true, event) == "a model");
}
