// json_writer_test.cpp
// Goal:   whatever is written is JSON, with commas where they belong and strings that keep their characters.
// Method: documents to the letter, over both kinds of text; what was written read back by simdjson.

#include <doctest/doctest.h>
#include <simdjson.h>

#include <cstdint>
#include <string>

#include "nexus/base/text_buffer.h"

using namespace nexus;

namespace {

template <class Out>
void write_sample(Out& out) {
  JsonWriter json(out);
  json.begin_object().field("text", "a\"b").field("yes", true).field("no", false);
  json.key("numbers").begin_array().value(0).value(-7).value(INT64_MIN).value(UINT64_MAX).literal("1.5").end_array();
  json.key("none").begin_array().end_array().key("empty").begin_object().end_object();
  json.key("list").begin_array();
  for (int i = 0; i < 2; ++i) json.begin_object().field("i", i).end_object();
  json.end_array().end_object();
}

TEST_CASE("a document has a comma between two values and nowhere else") {
  const std::string expected =
      R"({"text":"a\"b","yes":true,"no":false,"numbers":[0,-7,-9223372036854775808,18446744073709551615,1.5],)"
      R"("none":[],"empty":{},"list":[{"i":0},{"i":1}]})";
  std::string text;
  write_sample(text);
  CHECK(text == expected);
  TextBuffer buffer;
  write_sample(buffer);
  CHECK(buffer.text() == expected);
}

TEST_CASE("keys and strings of any bytes are valid JSON") {
  simdjson::dom::parser parser;
  for (int byte = 0; byte < 256; ++byte) {
    const std::string hostile = "a" + std::string(1, static_cast<char>(byte)) + "\"}\\";
    std::string text;
    JsonWriter(text).begin_object().field(hostile, hostile).end_object();
    CAPTURE(text);
    simdjson::dom::object object;
    REQUIRE(parser.parse(text).get_object().get(object) == simdjson::SUCCESS);
    CHECK(object.size() == 1);
    for (const auto [key, value] : object) CHECK(key == value.get_string().value());
  }
}

}  // namespace
