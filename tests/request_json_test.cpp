#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/incremental_json.h"
#include "nexus/api/json_reader.h"
#include "nexus/api/request_json.h"

using nexus::ApiError;
using nexus::BodyFacts;
using nexus::BodySpan;
using nexus::JsonReader;
using nexus::ModelList;
using nexus::Usage;
using Flag = nexus::BodyFacts::Flag;
using Options = nexus::BodyFacts::Options;

namespace {

JsonReader& reader() {
  static JsonReader one;
  return one;
}

// A text with exactly the padding that the contract asks for, filled with bytes that would be misread.
class Padded {
 public:
  explicit Padded(std::string_view text) : bytes_(text.size()), data_(new char[text.size() + nexus::kPaddingBytes]) {
    if (!text.empty()) std::memcpy(data_.get(), text.data(), text.size());
    for (std::size_t i = 0; i < nexus::kPaddingBytes; ++i) data_[bytes_ + i] = "\"}],:1{"[i % 7];
  }
  std::string_view view() const { return {data_.get(), bytes_}; }

 private:
  std::size_t bytes_;
  std::unique_ptr<char[]> data_;
};

struct Read {
  std::optional<ApiError> error;
  BodyFacts facts;
  std::string model, text;
  std::string part(BodySpan span) const { return text.substr(span.at, span.bytes); }
};

Read read_body(std::string_view text) {
  const Padded padded(text);
  Read read;
  read.text = text;
  read.error = nexus::read_body(reader(), nexus::kEndpoints[0], padded.view(), read.facts);
  read.model = read.facts.model;
  return read;
}

Usage read_usage(std::string_view text) {
  const Padded padded(text);
  return nexus::read_usage(reader(), nexus::row_of(nexus::Dialect::openai).response, padded.view());
}

}  // namespace

TEST_CASE("a body says which model it wants, and where that stands") {
  struct Row {
    const char *text, *model, *value;
  };
  const Row rows[] = {
      {R"({"model":"llama3:70b"})", "llama3:70b", R"("llama3:70b")"},
      {R"( { "messages" : [] , "model" : "m"  , "x":1 } )", "m", R"("m")"},
      {R"({"\u006dodel":"m"})", "m", R"("m")"},
      {R"({"model":"a\"b\\c\u00e9"})", "a\"b\\c\xc3\xa9", R"("a\"b\\c\u00e9")"},
      {R"({"x":{"model":"no"},"y":[{"model":"no"}],"model":"yes"})", "yes", R"("yes")"},
      {R"({"x":"\"model\":\"no\"","model":"yes"})", "yes", R"("yes")"},
      {"\n{\"model\"\t:\r\n\"m\"\n}\n", "m", "\"m\""},
      {R"({"model":"é"})", "é", R"("é")"},
      {R"({"model":"m","n":1e1000000000})", "m", R"("m")"},
      {R"({"models":"x","mode":"y","Model":"z","model":"m"})", "m", R"("m")"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.text);
    const Read read = read_body(row.text);
    REQUIRE(read.error == std::nullopt);
    CHECK(read.model == row.model);
    CHECK(read.part(read.facts.model_value) == row.value);
    CHECK(read.facts.first_member == read.text.find('{') + 1);
  }
}

TEST_CASE("a body that says no model, or two, is refused") {
  struct Row {
    std::string text;
    std::optional<ApiError> error;
  };
  const Row rows[] = {
      {"", ApiError::bad_json},
      {" ", ApiError::bad_json},
      {"x", ApiError::bad_json},
      {"null", ApiError::bad_json},
      {"\"model\"", ApiError::bad_json},
      {R"([{"model":"m"}])", ApiError::bad_json},
      {R"({"model":"m")", ApiError::bad_json},
      {R"({"model":"m")" + std::string("\0", 1), ApiError::bad_json},
      {R"({"model":"m"}})", ApiError::bad_json},
      {R"({"model":"m"}{})", ApiError::bad_json},
      {R"({"model":"m"} x)", ApiError::bad_json},
      {R"({"model":"m",})", ApiError::bad_json},
      {R"({"model":"m" "x":1})", ApiError::bad_json},
      {R"({"model" "m"})", ApiError::bad_json},
      {R"({model:"m"})", ApiError::bad_json},
      {R"({'model':'m'})", ApiError::bad_json},
      {R"({"model":"m\q"})", ApiError::bad_json},
      {R"({"model":"\ud800"})", ApiError::bad_json},
      {R"({"model":"m","x":")" + std::string("\x01\"}"), ApiError::bad_json},
      {"{\"model\":\"m\xff\"}", ApiError::bad_json},
      {"{\"model\":\"m\",\"x\":\"\xc3\"}", ApiError::bad_json},
      {"\xef\xbb\xbf{\"model\":\"m\"}", ApiError::bad_json},
      {std::string("{\"model\":\"a\0b\"}", 15), ApiError::bad_json},
      {R"({})", ApiError::no_model},
      {R"({"messages":[]})", ApiError::no_model},
      {R"({"model":""})", ApiError::no_model},
      {R"({"x":{"model":"m"}})", ApiError::no_model},
      {R"({"model":null})", ApiError::wrong_type},
      {R"({"model":7})", ApiError::wrong_type},
      {R"({"model":["m"]})", ApiError::wrong_type},
      {R"({"model":{"model":"m"}})", ApiError::wrong_type},
      {R"({"model":"m","stream":"yes"})", ApiError::wrong_type},
      {R"({"model":"m","stream":1})", ApiError::wrong_type},
      {R"({"model":"m","stream":truex})", ApiError::wrong_type},
      {R"({"model":"m","stream_options":[]})", ApiError::wrong_type},
      {R"({"model":"m","stream_options":{"include_usage":1}})", ApiError::wrong_type},
      {R"({"model":"a","model":"a"})", ApiError::duplicate_key},
      {R"({"model":"a","model":"b"})", ApiError::duplicate_key},
      {R"({"model":"a","x":[1,{}],"\u006d\u006fdel":"b"})", ApiError::duplicate_key},
      {R"({"model":"a","stream":true,"stream":false})", ApiError::duplicate_key},
      {R"({"model":"a","stream_options":{},"stream_options":null})", ApiError::duplicate_key},
      {R"({"model":"a","stream_options":{"include_usage":true,"include_usage":true}})", ApiError::duplicate_key},
      {R"({"model":"a","tools":[],"tools":[1]})", ApiError::duplicate_key},
      {R"({"model":"a","messages":[],"messages":[]})", ApiError::duplicate_key},
      {R"({"model":"a","response_format":{},"response_format":{}})", ApiError::duplicate_key},
  };
  for (const Row& row : rows) {
    CAPTURE(row.text);
    CHECK(read_body(row.text).error == row.error);
  }
}

TEST_CASE("only a request to show a model may name it as clients of old Ollama versions do, however its body comes") {
  struct Row {
    const char *path, *text, *model;
  };
  const Row rows[] = {
      {"/api/show", R"({"verbose":true,"name":"m"})", "m"},   {"/api/show", R"({"name":"n","model":"m"})", "m"},
      {"/api/show", R"({"model":"m","name":"n"})", "m"},      {"/api/show", R"({"name":""})", ""},
      {"/api/show", R"({"names":"m","x":{"name":"m"}})", ""}, {"/v1/chat/completions", R"({"name":"m"})", ""},
  };
  for (const Row& row : rows) {
    CAPTURE(row.text);
    const auto endpoint = std::find_if(nexus::kEndpoints.begin(), nexus::kEndpoints.end(),
                                       [&](const nexus::Endpoint& one) { return one.path == row.path; });
    const Padded padded(row.text);
    for (const bool in_pieces : {false, true}) {
      BodyFacts facts;
      nexus::IncrementalJson json;
      json.start(*endpoint);
      if (in_pieces) json.feed(reader(), padded.view().data(), 5);
      const auto error = in_pieces ? json.read(reader(), padded.view(), facts)
                                   : nexus::read_body(reader(), *endpoint, padded.view(), facts);
      CHECK(error == (*row.model == 0 ? std::optional(ApiError::no_model) : std::nullopt));
      CHECK(facts.model == row.model);
    }
  }
}

TEST_CASE("a model that is null is a missing one where it may be missing, however the body comes") {
  for (const nexus::Endpoint& endpoint : nexus::kEndpoints) {
    if (endpoint.body != nexus::BodyFormat::json) continue;
    CAPTURE(endpoint.path);
    const Padded padded(R"({"prompt":"a cat","model": null ,"stream":false})");
    const bool may = endpoint.model == nexus::Model::optional;
    for (const bool in_pieces : {false, true}) {
      BodyFacts facts;
      nexus::IncrementalJson json;
      json.start(endpoint);
      if (in_pieces) json.feed(reader(), padded.view().data(), 30);
      const auto error = in_pieces ? json.read(reader(), padded.view(), facts)
                                   : nexus::read_body(reader(), endpoint, padded.view(), facts);
      CHECK(error == (may ? std::nullopt : std::optional(ApiError::wrong_type)));
      CHECK(facts.model.empty());
      CHECK(facts.model_value.bytes == 0);
    }
  }
}

TEST_CASE("a value that is stepped over may be broken, but it hides no key") {
  // Its numbers, words and escapes are the backend's to judge. A second model behind or within it is not overlooked:
  // the body is refused, or the key stands where every reader sees it as deeper.
  for (const std::string value :
       {"tru",   "01",      "1.",        "-",   "NaN", "[1 2]", "[1,]", "[,]", "[}", "{]", "{\"a\"}", "{\"a\":}",
        "{a:1}", "\"\\q\"", "\"\\u12\"", "[[]", "[[}", "{]}",   "[]]",  "}",   "]",  ":",  ",",       ""}) {
    CAPTURE(value);
    const std::string before = R"({"model":"a","x":)" + value, after = R"("model":"b"})";
    CHECK(read_body(before + "," + after).error != std::nullopt);
    CHECK(read_body(before + "}," + after).error != std::nullopt);
    CHECK(read_body(before + "]," + after).error != std::nullopt);
  }
}

TEST_CASE("a body may be nested to kMaxJsonDepth, and no deeper") {
  const auto nested = [](std::size_t depth, char open, char close) {  // depth counts the body's own object
    std::string text = R"({"model":"m","x":)";
    for (std::size_t i = 1; i < depth; ++i) text += open == '{' ? "{\"a\":" : "[";
    text += "1";
    return text + std::string(depth - 1, close) + "}";
  };
  for (const auto& [open, close] : {std::pair('[', ']'), std::pair('{', '}')}) {
    CHECK(read_body(nested(nexus::kMaxJsonDepth - 1, open, close)).error == std::nullopt);
    const std::string deepest = nested(nexus::kMaxJsonDepth, open, close);
    CHECK(read_body(deepest).error == std::nullopt);
    CHECK(read_body(deepest.substr(0, deepest.size() - 1) + R"(,"y":[{},[]]})").error == std::nullopt);
    CHECK(read_body(nested(nexus::kMaxJsonDepth + 1, open, close)).error == ApiError::too_deep);
    CHECK(read_body(nested(200'000, open, close)).error == ApiError::too_deep);
  }
  std::string flat = R"({"model":"m","x":[)";  // many brackets are not deep, nor are those in strings
  for (int i = 0; i < 2000; ++i) flat += R"([{}],"[[[{{{\"[[",)";
  CHECK(read_body(flat + "1]}").error == std::nullopt);
}

TEST_CASE("a body says whether it streams, and with which options") {
  struct Row {
    const char* rest;
    bool stream;
    Options options;
    const char* options_text;
    bool empty;
    Flag flag;
    const char* flag_text;
  };
  const Row rows[] = {
      {"", false, Options::absent, "", true, Flag::absent, ""},
      {R"(,"stream":true)", true, Options::absent, "", true, Flag::absent, ""},
      {R"(,"stream":false)", false, Options::absent, "", true, Flag::absent, ""},
      {R"(,"stream":null)", false, Options::absent, "", true, Flag::absent, ""},
      {R"(,"stream":true,"stream_options":null)", true, Options::null, "null", true, Flag::absent, ""},
      {R"(,"stream_options": null ,"stream":true)", true, Options::null, "null", true, Flag::absent, ""},
      {R"(,"stream_options":{})", false, Options::object, "{}", true, Flag::absent, ""},
      {R"(,"stream_options":{ } ,"x":1)", false, Options::object, "{ }", true, Flag::absent, ""},
      {R"(,"stream_options":{"a":{"include_usage":true}})", false, Options::object, R"({"a":{"include_usage":true}})",
       false, Flag::absent, ""},
      {R"(,"stream_options":{"include_usage":true})", false, Options::object, R"({"include_usage":true})", false,
       Flag::yes, "true"},
      {R"(,"stream_options":{"include_usage" : false , "b":[1]})", false, Options::object,
       R"({"include_usage" : false , "b":[1]})", false, Flag::no, "false"},
      {R"(,"stream_options":{"b":"}","include\u005fusage":null})", false, Options::object,
       R"({"b":"}","include\u005fusage":null})", false, Flag::null, "null"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.rest);
    const Read read = read_body(std::string(R"({"model":"m")") + row.rest + "}");
    REQUIRE(read.error == std::nullopt);
    CHECK(read.facts.stream == row.stream);
    CHECK(read.facts.stream_options == row.options);
    CHECK(read.part(read.facts.stream_options_value) == row.options_text);
    CHECK(read.facts.stream_options_empty == row.empty);
    CHECK(read.facts.include_usage == row.flag);
    CHECK(read.part(read.facts.include_usage_value) == row.flag_text);
  }
}

TEST_CASE("continuous_usage_stats is found where it is true") {
  const std::pair<const char*, bool> rows[] = {
      {R"({"model":"m","stream_options":{"continuous_usage_stats":true}})", true},
      {R"({"model":"m","stream_options":{"x":"","continuous_usage\u005fstats" : true ,"include_usage":false}})", true},
      {R"({"model":"m","stream_options":{"continuous_usage_stats":false}})", false},
      {R"({"model":"m","stream_options":{"continuous_usage_stats":"true"}})", false},
      {R"({"model":"m","continuous_usage_stats":true,"stream_options":{"a":{"continuous_usage_stats":true}}})", false},
      {R"({"model":"m","stream_options":{"continuous_usage_statss":true,"continuous_usage_stat":true}})", false},
  };
  for (const auto& [body, found] : rows) {
    CAPTURE(body);
    const Read read = read_body(body);
    REQUIRE(read.error == std::nullopt);
    CHECK(read.part(read.facts.continuous_usage_value) == (found ? "true" : ""));
  }
}

TEST_CASE("an endpoint without streams has none, whatever its body says") {
  for (const nexus::Endpoint& endpoint : nexus::kEndpoints) {
    CAPTURE(endpoint.path);
    const Padded padded(R"({"model":"m","stream":true})");
    BodyFacts facts;
    REQUIRE(nexus::read_body(reader(), endpoint, padded.view(), facts) == std::nullopt);
    CHECK(facts.stream == (endpoint.streams != nexus::Streams::never));
  }
}

TEST_CASE("a key is found by its whole name, in the object that it belongs to") {
  using nexus::BodyKey;
  for (const nexus::BodyKeyRow& row : nexus::kBodyKeys) {
    CAPTURE(row.name);
    for (const BodyKey within : {BodyKey::none, BodyKey::stream_options, BodyKey::messages}) {
      const Padded exact(row.name);
      CHECK(nexus::find_body_key(exact.view(), within) == (within == row.within ? row.key : BodyKey::other));
    }
    for (std::size_t i = 0; i < row.name.size(); ++i) {
      std::string name(row.name);
      name[i] ^= 1;
      CHECK(nexus::find_body_key(Padded(name).view(), row.within) == BodyKey::other);
      const std::string_view part = row.name.substr(0, i);
      const bool is_one = std::any_of(nexus::kBodyKeys.begin(), nexus::kBodyKeys.end(), [&](const auto& other) {
        return other.name == part && other.within == row.within;
      });
      if (!is_one) CHECK(nexus::find_body_key(Padded(part).view(), row.within) == BodyKey::other);
    }
    CHECK(nexus::find_body_key(Padded(std::string(row.name) + "x").view(), row.within) == BodyKey::other);
  }
  CHECK(nexus::find_body_key(Padded(std::string(5000, 'm')).view(), BodyKey::none) == BodyKey::other);
}

TEST_CASE("a body says what its model must be able to do") {
  struct Row {
    const char* rest;
    bool tools, json_mode;
  };
  const Row rows[] = {
      {"", false, false},
      {R"(,"tools":[])", false, false},
      {R"(,"tools":null)", false, false},
      {R"(,"tools":[{"type":"function"}])", true, false},
      {R"(,"response_format":{"type":"text"})", false, false},
      {R"(,"response_format":{"type":"json_object"})", false, true},
      {R"(,"response_format":{"json_schema":{"type":"x"},"type":"json_schema"},"tools":[1])", true, true},
      {R"(,"response_format":null)", false, false},
      {R"(,"messages":[{"role":"user","content":"]"}] ,"x":1)", false, false},
      {R"(,"messages": "x" )", false, false},
  };
  for (const Row& row : rows) {
    CAPTURE(row.rest);
    const Read read = read_body(std::string(R"({"model":"m")") + row.rest + "}");
    REQUIRE(read.error == std::nullopt);
    CHECK(read.facts.has_tools == row.tools);
    CHECK(read.facts.json_mode == row.json_mode);
  }
}

TEST_CASE("every truncation of a body is refused") {
  const std::string text =
      R"({"model":"m","stream":true,"stream_options":{"include_usage":true},"tools":[{"a":1}],"messages":[{"b":"c"}]})";
  REQUIRE(read_body(text).error == std::nullopt);
  for (std::size_t bytes = 0; bytes < text.size(); ++bytes) {
    CHECK(read_body(text.substr(0, bytes)).error == ApiError::bad_json);
  }
}

TEST_CASE("a large body is read, and its index is given back") {
  std::string text = R"({"model":"m","messages":")" + std::string(3'000'000, 'x') + "\"}";
  CHECK(read_body(text).error == std::nullopt);
  CHECK(read_body(R"({"model":"small"})").model == "small");
}

TEST_CASE("a model's name comes whole up to kReadNameBytes, and cut as it stands behind that") {
  for (const std::size_t bytes : {nexus::kReadNameBytes - 1, nexus::kReadNameBytes}) {
    CHECK(read_body(R"({"model":")" + std::string(bytes, 'm') + "\"}").model == std::string(bytes, 'm'));
    CHECK(read_body(R"({"model":"\n)" + std::string(bytes - 2, 'm') + "\"}").model ==
          "\n" + std::string(bytes - 2, 'm'));
  }
  for (const std::size_t bytes : {nexus::kReadNameBytes + 1, nexus::kCutNameBytes, nexus::kCutNameBytes + 1}) {
    const std::size_t cut = std::min(bytes, nexus::kCutNameBytes);
    CHECK(read_body(R"({"model":")" + std::string(bytes, 'm') + "\"}").model == std::string(cut, 'm'));
    const std::string escaped = R"(\n)" + std::string(bytes - 2, 'm');
    const Read read = read_body(R"({"model":")" + escaped + "\"}");
    CHECK(read.model == escaped.substr(0, cut));
    CHECK(read.part(read.facts.model_value) == '"' + escaped + '"');
  }
  CHECK(read_body(R"({"model":")" + std::string(1'000'000, 'm') + "\"}").model.size() == nexus::kCutNameBytes);
}

TEST_CASE("a usage tells its counts, as far as they are counts") {
  struct Row {
    const char* text;
    std::int64_t prompt, completion;
  };
  const Row rows[] = {
      {R"({"prompt_tokens":12,"completion_tokens":34,"total_tokens":46})", 12, 34},
      {R"({ "completion_tokens" : 0 })", -1, 0},
      {R"({"prompt_tokens_details":{"prompt_tokens":9},"prompt_tokens":5})", 5, -1},
      {R"({"prompt_tokens":-1,"completion_tokens":2})", -1, 2},
      {R"({"prompt_tokens":1.5,"completion_tokens":2})", -1, 2},
      {R"({"prompt_tokens":11.0,"completion_tokens":1.2e1})", 11, 12},
      {R"({"prompt_tokens":-1.0,"completion_tokens":1e300})", -1, -1},
      {R"({"prompt_tokens":1099511627776.0,"completion_tokens":1099511627777.0})", std::int64_t{1} << 40, -1},
      {R"({"prompt_tokens":"7","completion_tokens":2})", -1, 2},
      {R"({"prompt_tokens":null,"completion_tokens":2})", -1, 2},
      {R"({"prompt_tokens":[1],"completion_tokens":2})", -1, 2},
      {R"({"prompt_tokens":{"x":[1]},"completion_tokens":2})", -1, 2},
      {R"({"prompt_tokens":9223372036854775807,"completion_tokens":9223372036854775808})", -1, -1},
      {R"({"prompt_tokens":1099511627776,"completion_tokens":1099511627777})", std::int64_t{1} << 40, -1},
      {R"({"prompt\u005ftokens":3})", 3, -1},
      {R"({"a_prompt_tokens":3,"prompt_tokensx":3})", -1, -1},
      {"{}", -1, -1},
      {"[]", -1, -1},
      {"null", -1, -1},
      {"", -1, -1},
      {"{", -1, -1},
  };
  for (const Row& row : rows) {
    CAPTURE(row.text);
    const Usage usage = read_usage(row.text);
    CHECK(usage.prompt_tokens == row.prompt);
    CHECK(usage.completion_tokens == row.completion);
    CHECK(usage.told() == (row.prompt >= 0 || row.completion >= 0));
  }
}

TEST_CASE("an answer tells the usage of its outermost object, wherever that stands") {
  struct Row {
    std::string text;
    std::int64_t prompt, completion;
  };
  const std::string usage = R"("usage":{"prompt_tokens":7,"completion_tokens":9})";
  const std::string other = R"("usage":{"prompt_tokens":1,"completion_tokens":2})";
  const std::string details =
      R"("usage":{"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":3},"completion_tokens":9})";
  const std::string far(2000, 'x');
  const std::vector<Row> rows = {
      {"{" + usage + "}", 7, 9},
      {"{" + details + "}", 7, 9},
      {"{\"id\":1," + usage + "}\n", 7, 9},
      {"{\"id\":1," + usage + " \r\n\t} \n", 7, 9},
      {"{ \"usage\" : { \"prompt_tokens\" : 7 , \"completion_tokens\" : 9 } }", 7, 9},
      {"{" + usage + ",\"timings\":{\"a\":1}}", 7, 9},
      {"{" + usage + ",\"prompt_logprobs\":null}", 7, 9},
      {"{" + usage + ",\"text\":\"" + far + "\"}", 7, 9},
      {"{\"text\":\"" + far + "\"," + usage + "}", 7, 9},
      {"{\"usage\":{\"prompt_tokens\":7,\"note\":\"" + far + "\",\"completion_tokens\":9}}", 7, 9},
      // The last one counts, and null tells nothing.
      {"{" + other + "," + usage + "}", 7, 9},
      {"{\"usage\":null," + usage + "}", 7, 9},
      {"{" + usage + ",\"usage\":null}", 7, 9},
      // One that is nested, or in a string, is another's.
      {"{\"choices\":[{" + other + "}]," + usage + "}", 7, 9},
      {"{" + usage + ",\"choices\":[{" + other + "}]}", 7, 9},
      {"{" + usage + ",\"choices\":{" + other + "}}", 7, 9},
      {"{\"choices\":{" + other + "}}", -1, -1},
      {"{\"usage\":{\"prompt_tokens\":7," + other + ",\"completion_tokens\":9}}", 7, 9},
      {R"({"text":"\"usage\":{\"prompt_tokens\":1}"})", -1, -1},
      {R"({"text":"say \"usage\":{}", "a":{}})", -1, -1},
      {"{" + usage + R"(,"text":"\"usage\":{\"prompt_tokens\":1}"})", 7, 9},
      {R"({"usage\u0041":{"prompt_tokens":1}})", -1, -1},
      {R"({"\u0075sage":{"prompt_tokens":7,"completion_tokens":9}})", 7, 9},
      {R"({"text":"usage","a":{"prompt_tokens":1}})", -1, -1},
      // What is no object tells nothing.
      {"[" + usage + "]", -1, -1},
      {usage + "}", -1, -1},
      {"\"usage\"}", -1, -1},
      {"{\"usage\"}", -1, -1},
      {"{\"usage\":}", -1, -1},
      {"{\"usage\":7}", -1, -1},
      {"}", -1, -1},
      {"", -1, -1},
      {" \n", -1, -1},
  };
  for (const Row& row : rows) {
    CAPTURE(row.text);
    const Padded padded(row.text);
    const Usage found = nexus::read_answer(reader(), nexus::row_of(nexus::Dialect::openai).response, padded.view());
    CHECK(found.prompt_tokens == row.prompt);
    CHECK(found.completion_tokens == row.completion);
  }
}

TEST_CASE("a usage of the usual form is read without simdjson, and read as simdjson reads it") {
  const nexus::ResponseShape* const shapes[] = {&nexus::row_of(nexus::Dialect::openai).response,
                                                &nexus::row_of(nexus::Dialect::responses).response,
                                                &nexus::row_of(nexus::Dialect::messages).response};
  const auto counts_of = [](const Usage& usage) {
    return std::array{usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.created_tokens,
                      usage.reasoning_tokens};
  };
  const char* const names[] = {"prompt_tokens",
                               "completion_tokens",
                               "total_tokens",
                               "prompt_tokens_details",
                               "input_tokens",
                               "output_tokens",
                               "",
                               "cache_read_input_tokens",
                               "cached_tokens",
                               "input_tokens_details",
                               "completion_tokens_details",
                               "reasoning_tokens"};
  const char* const values[] = {"0",
                                "7",
                                "12",
                                "1099511627776",
                                "1099511627777",
                                "999999999999999999",
                                "null",
                                "{}",
                                "01",
                                "-1",
                                "1.0",
                                "9223372036854775808",
                                "true",
                                "\"7\"",
                                "[]",
                                "nul",
                                "1e2"};
  std::mt19937 dice(20);
  const auto one_of = [&](const auto& list) { return list[dice() % std::size(list)]; };
  const auto members = [&](auto&& self, int depth) -> std::string {
    std::string text = "{";
    for (std::size_t i = dice() % 5; i > 0; --i) {
      text.append("\"").append(one_of(names)).append(dice() % 3 != 0 ? "\":" : "\": ");
      // Mostly counts, so that whole texts are good often enough.
      text += depth < 2 && dice() % 6 == 0 ? self(self, depth + 1) : values[dice() % (dice() % 4 == 0 ? 17 : 7)];
      if (i > 1) text += dice() % 3 != 0 ? "," : ", ";
    }
    return text + "}";
  };
  int read = 0, deep = 0;
  for (int i = 0; i < 40'000; ++i) {
    std::string text = members(members, 0);
    if (dice() % 4 == 0) text[dice() % text.size()] = "{}\",: 0a\\\n"[dice() % 10];
    CAPTURE(text);
    const nexus::ResponseShape& shape = *one_of(shapes);
    Usage plain{.prompt_tokens = -7};
    const Padded padded(text);
    if (!nexus::detail::PlainUsage(shape, padded.view()).read(plain)) {
      CHECK(plain.prompt_tokens == -7);
      continue;
    }
    read += 1;
    deep += plain.cached_tokens >= 0 ? 1 : 0;
    JsonReader::Object object;
    Usage usage;
    REQUIRE(reader().open(padded.view(), object));
    nexus::detail::read_counts(reader(), shape, object, usage);
    CHECK(reader().at_end());
    CHECK(counts_of(plain) == counts_of(usage));
  }
  CHECK(read > 4'000);
  CHECK(deep > 100);
}

TEST_CASE("reasoning tokens are read where the completion's details tell them") {
  struct Row {
    std::string_view text;
    std::int64_t reasoning;
  };
  const Row rows[] = {
      {R"({"completion_tokens":9,"completion_tokens_details":{"reasoning_tokens":3,"audio_tokens":0}})", 3},
      {R"({"completion_tokens":9,"completion_tokens_details":{"reasoning_tokens":3.0}})", 3},  // read by simdjson
      {R"({"completion_tokens":9,"prompt_tokens_details":{"reasoning_tokens":3}})", -1},
      {R"({"completion_tokens":9,"reasoning_tokens":3})", -1},
      {R"({"completion_tokens":9,"completion_tokens_details":null})", -1},
      {R"({"completion_tokens":9,"completion_tokens_details":{"deep":{"reasoning_tokens":3}}})", -1},
  };
  for (const Row& row : rows) {
    CAPTURE(row.text);
    CHECK(read_usage(row.text).reasoning_tokens == row.reasoning);
    CHECK(read_usage(row.text).completion_tokens == 9);
  }
}

TEST_CASE("cached prompt tokens are read where the prompt's details tell them") {
  struct Row {
    std::string_view text;
    std::int64_t prompt, completion, cached;
  };
  const Row rows[] = {
      {R"({"prompt_tokens":7,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":3}})", 7, 9, 3},
      {R"({"prompt_tokens_details":{"audio_tokens":0,"cached_tokens":0},"prompt_tokens":7,"completion_tokens":9})", 7,
       9, 0},
      {R"({"prompt_tokens":7,"prompt_tokens_details":{"deep":{"cached_tokens":5}},"completion_tokens":9})", 7, 9, -1},
      {R"({"prompt_tokens":7,"completion_tokens_details":{"cached_tokens":3},"completion_tokens":9})", 7, 9, -1},
      {R"({"prompt_tokens":7,"cached_tokens":3,"completion_tokens":9})", 7, 9, -1},
      {R"({"prompt_tokens":7,"prompt_tokens_details":null,"completion_tokens":9})", 7, 9, -1},
      {R"({"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":null},"completion_tokens":9})", 7, 9, -1},
      {R"({"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":-3},"completion_tokens":9})", 7, 9, -1},
      {R"({"prompt_tokens":7,"prompt_tokens_details":[],"completion_tokens":9})", 7, 9, -1},
  };
  for (const Row& row : rows) {
    CAPTURE(row.text);
    const Usage usage = read_usage(row.text);
    CHECK(usage.prompt_tokens == row.prompt);
    CHECK(usage.completion_tokens == row.completion);
    CHECK(usage.cached_tokens == row.cached);
  }
}
