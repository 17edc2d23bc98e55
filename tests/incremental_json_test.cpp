#include <doctest/doctest.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/incremental_json.h"
#include "tests/fuzz/incremental_json.h"

using nexus::ApiError;
using nexus::BodyFacts;
using nexus::IncrementalJson;

namespace {

// Whole, byte by byte, and cut once at every place.
std::vector<std::vector<std::size_t>> every_cut(std::size_t bytes) {
  std::vector<std::vector<std::size_t>> ways{{bytes}, {}};
  for (std::size_t at = 1; at <= bytes; ++at) ways[1].push_back(at);
  for (std::size_t at = 1; at < bytes; ++at) ways.push_back({at, bytes});
  return ways;
}

// Large bodies: in pieces of that many bytes.
std::vector<std::size_t> pieces_of(std::size_t bytes, std::size_t piece) {
  std::vector<std::size_t> ends;
  for (std::size_t at = piece; at < bytes; at += piece) ends.push_back(at);
  ends.push_back(bytes);
  return ends;
}

void check_every_cut(const std::string& body) {
  CAPTURE(body);
  CHECK_NOTHROW(fuzz::check_pieces(body, every_cut(body.size())));
}

void check_large(const std::string& body) {
  CHECK_NOTHROW(fuzz::check_pieces(body, {{body.size()}, pieces_of(body.size(), 4096), pieces_of(body.size(), 1013)}));
}

struct Result {
  std::optional<ApiError> error;
  BodyFacts facts;
  std::string model;
};

// Through a buffer of its own, for bodies that are too large for a guarded copy.
Result incremental(std::string body, std::size_t piece) {
  const std::size_t bytes = body.size();
  body.append(nexus::kPaddingBytes, '"');
  nexus::JsonReader reader;
  const auto incremental_reader = std::make_unique<IncrementalJson>();
  incremental_reader->start(nexus::kEndpoints[0]);
  for (const std::size_t end : pieces_of(bytes, piece)) incremental_reader->feed(reader, body.data(), end);
  Result result;
  result.error = incremental_reader->read(reader, {body.data(), bytes}, result.facts);
  result.model = result.facts.model;
  return result;
}

std::string repeated(std::string_view text, std::size_t times) {
  std::string all;
  for (std::size_t i = 0; i < times; ++i) all += text;
  return all;
}

}  // namespace

TEST_CASE("a body read in pieces says what it says read at once, however it is cut") {
  const char* bodies[] = {
      R"({"model":"llama3:70b"})",
      R"( { "messages" : [ ] , "model" : "m"  , "x":1 } )",
      "\n{\"model\"\t:\r\n\"m\"\n}\n",
      R"({"model":"a\"b\\c\u00e9","stream":true})",
      R"({"\u006dodel":"m"})",
      R"({"\u006dode\u006c":"m","strea\u006d":true,"\ud83d\ude00":1})",
      R"({"model":"é😀","messages":[{"content":"日本語 \\ \" \n"},"é"]})",
      R"({"x":{"model":"no"},"y":[{"model":"no"}],"model":"yes"})",
      R"({"x":"\"model\":\"no\"","model":"yes"})",
      R"({"models":"x","mode":"y","Model":"z","model":"m"})",
      R"({"model":"m","stream":true,"stream_options":{"include_usage":true}})",
      R"({"stream_options":{"include_usage":false,"continuous_usage_stats" : true },"model":"m"})",
      R"({"stream_options":{"continuous_usage_stats":[1],"x":"continuous_usage_stats"},"model":"m"})",
      R"({"stream_options": null ,"model":"m","stream":false})",
      R"({"stream_options":{},"model":"m"})",
      R"({"stream_options":{ } ,"model":"m"})",
      R"({"stream_options":{"a":{"include_usage":true}},"model":"m"})",
      R"({"stream_options":{"include_usage" : false , "b":[1]},"model":"m"})",
      R"({"stream_options":{"b":"}","include\u005fusage":null},"model":"m"})",
      R"({"stream_options":{"b":{},"c":[[],{}],"include_usage":true,"d":0},"model":"m"})",
      R"({"model":"m","tools":[]})",
      R"({"model":"m","tools":[ ]})",
      R"({"model":"m","tools":[ {} ]})",
      R"({"model":"m","tools":[[]]})",
      R"({"model":"m","tools":null})",
      R"({"model":"m","tools":{}})",
      R"({"model":"m","tools":[{"type":"function"}],"response_format":{"type":"text"}})",
      R"({"model":"m","response_format":{"type":"json_object"}})",
      R"({"model":"m","response_format":{"type":"json\u005fobject"}})",
      R"({"model":"m","response_format":{"json_schema":{"type":"x"},"type":"json_schema"}})",
      R"({"model":"m","response_format":{"type":"text","type":"json_object","type":1}})",
      R"({"model":"m","response_format":{"\u0074ype":"json_object"}})",
      R"({"model":"m","response_format":{"\ud800":1,"type":"json_object"}})",
      R"({"model":"m","response_format":{"type":{"type":"json_object"}}})",
      R"({"model":"m","response_format":{"type":["json_object"]}})",
      R"({"model":"m","response_format":null})",
      R"({"model":"m","response_format":[]})",
      R"({"model":"m","response_format":{}})",
      R"({"model":"m","messages":[{"content":[{"type":"image_url","image_url":{"url":"data:"}}]}]})",
      R"({"model":"m","messages":[{"content":"\"image_url"}]})",
      R"({"model":"m","messages":[{"content":"image_url\""}]})",
      R"({"model":"m","messages":[{"content":"image_url "}]})",
      R"({"model":"m","messages":"image_url"})",
      R"({"model":"m","messages":[],"image_url":"image_url"})",
      R"({"model":"m","messages": "x" })",
      R"({"model":"m","messages":{"a":[1,2,{"b":"c"}]}})",
      R"({"model":"m","n":1e1000000000,"t":-0.5E+3,"u":true,"v":null})",
      R"({"":1,"model":"m"})",
  };
  for (const char* body : bodies) check_every_cut(body);
}

TEST_CASE("a body read in pieces is refused where one that is read at once is") {
  const std::string bodies[] = {
      "",
      " ",
      "x",
      "null",
      "\"model\"",
      "{}",
      R"([{"model":"m"}])",
      R"({"model":"m")",
      R"({"model":"m")" + std::string("\0", 1),
      R"({"model":"m"}})",
      R"({"model":"m"}{})",
      R"({"model":"m"} x)",
      R"({"model":"m"}")",
      R"({"model":"m",})",
      R"({,"model":"m"})",
      R"({"model":"m" "x":1})",
      R"({"model" "m"})",
      R"({"model":"m"])",
      R"({model:"m"})",
      R"({'model':'m'})",
      R"({"model":"m\q"})",
      R"({"\q":1,"model":"m"})",
      R"({"model":"\ud800"})",
      R"({"\ud800":1,"model":"m"})",
      R"({"stream_options":{"\ud800":1},"model":"m"})",
      R"({"model":"m","x":")" + std::string("\x01\"}"),
      R"({"model":"m","x":"\)" + std::string("\n\"}"),
      "{\"model\":\"m\xff\"}",
      "{\"model\":\"m\",\"x\":\"\xc3\"}",
      "{\"model\":\"m\",\"x\":[\"\xe2\x82\"]}",
      "{\"model\":\"m\",\"x\":[\"\xed\xa0\x80\"]}",
      "{\"model\":\"m\",\"x\":[\"\xf0\x9f\x98\"]}",
      "{\"model\":\"m\",\"x\":[\x80]}",
      "{\"model\":\"m\"}\xc3\xa9",
      "{\"model\":\"m\"}\xf0\x9f\x98",
      "\xef\xbb\xbf{\"model\":\"m\"}",
      std::string("{\"model\":\"a\0b\"}", 15),
      R"({"messages":[]})",
      R"({"model":""})",
      R"({"x":{"model":"m"}})",
      R"({"model":null})",
      R"({"model":7})",
      R"({"model":["m"]})",
      R"({"model":{"model":"m"}})",
      R"({"model":"m","stream":"yes"})",
      R"({"model":"m","stream":[]})",
      R"({"model":"m","stream":{}})",
      R"({"model":"m","stream":truex})",
      R"({"model":"m","stream":"x","x":1\f})",
      "{\"model\":\"m\",\"x\":1\f}",
      "{\"model\":\"m\",\"x\":1\x1a}",
      R"({"model":"m","stream_options":[]})",
      R"({"model":"m","stream_options":"x"})",
      R"({"model":"m","stream_options":{"include_usage":1}})",
      R"({"model":"m","stream_options":{"include_usage":{}}})",
      R"({"model":"m","stream_options":{"include_usage":true,}})",
      R"({"model":"m","stream_options":{"include_usage":true]})",
      R"({"model":"a","model":"a"})",
      R"({"model":"a","model":{}})",
      R"({"model":"a","x":[1,{}],"\u006d\u006fdel":"b"})",
      R"({"model":"a","stream":true,"stream":false})",
      R"({"model":"a","stream_options":{},"stream_options":null})",
      R"({"model":"a","stream_options":{},"stream_options":{"include_usage":1}})",
      R"({"model":"a","stream_options":{"include_usage":true,"include_usage":true}})",
      R"({"model":"a","tools":[],"tools":[1]})",
      R"({"model":"a","messages":[],"messages":[],"messages":[]})",
      R"({"model":"a","response_format":{},"response_format":{}})",
      R"({"stream":1,"model":"a","model":"a"})",
  };
  for (const std::string& body : bodies) check_every_cut(body);
}

TEST_CASE("a value that is skipped may be broken, but it hides no key") {
  for (const std::string value :
       {"tru",      "01",    "1.",      "-",         "NaN", "[1 2]", "[1,]", "[,]",   "[}",    "{]",   "{\"a\"}",
        "{\"a\":}", "{a:1}", "\"\\q\"", "\"\\u12\"", "[[]", "[[}",   "{]}",  "[]]",   "}",     "]",    ":",
        ",",        "",      "[\\]",    "[|]",       "\\",  "1 2",   "1\"",  "\"\"1", "\"\":", "[\"]", "{\"}"}) {
    const std::string before = R"({"model":"a","x":)" + value, after = R"("model":"b"})";
    check_every_cut(before + "," + after);
    check_every_cut(before + "}," + after);
    check_every_cut(before + "]," + after);
    check_every_cut(before + "}");
  }
}

// As skip_text(), a byte after the other: whole blocks without a quote that ends the text and without a control byte.
static nexus::TextRun skip_plainly(const std::string& text, std::size_t at, bool escaped) {
  nexus::TextRun run{at, escaped};
  bool ascii = true;
  for (; text.size() - run.at >= nexus::kBlockBytes; run.at += nexus::kBlockBytes) {
    bool ends = false, next_escaped = run.escaped;
    for (std::size_t i = run.at; i < run.at + nexus::kBlockBytes; ++i) {
      const auto byte = static_cast<unsigned char>(text[i]);
      ascii = ascii && byte < 0x80;
      ends = ends || byte < ' ' || (byte == '"' && !next_escaped);
      next_escaped = byte == '\\' && !next_escaped;
    }
    if (ends) break;
    run.escaped = next_escaped;
  }
  run.ascii = ascii;
  return run;
}

TEST_CASE("text is passed over as a byte after the other, whatever the width of the registers") {
  for (std::uint64_t seed = 1; seed <= 2000; ++seed) {
    fuzz::Draw draw(std::to_string(seed));
    std::string text(64 + draw.below(400), 'x');
    for (std::size_t i = draw.below(6); i > 0; --i) text[draw.below(text.size())] = "\\\\\\\x80\x01\"z"[draw.below(7)];
    for (std::size_t i = draw.below(70), at = draw.below(text.size()); i > 0 && at < text.size(); --i, ++at)
      text[at] = '\\';
    const std::size_t at = draw.below(10);
    const bool escaped = draw.below(2) == 0;
    const nexus::TextRun plain = skip_plainly(text, at, escaped);
    std::vector<nexus::TextRun> runs{nexus::skip_text(text.data(), at, text.size(), escaped),
                                     nexus::skip_text_by_16(text.data(), at, text.size(), escaped)};
#if defined(__x86_64__)
    if (nexus::kHasAvx2) runs.push_back(nexus::skip_text_by_32(text.data(), at, text.size(), escaped));
#endif
    CAPTURE(text);
    for (const nexus::TextRun& run : runs) {
      CHECK(run.at == plain.at);
      CHECK(run.escaped == plain.escaped);
      CHECK(run.ascii == plain.ascii);
    }
  }
}

TEST_CASE("an array or object that is opened when it is read at once must look like one") {
  for (const std::string value :
       {"[}", "[}]", "[:]", "[:]]", "[,]", "[,]]", R"(["a":1])", R"(["a":1]])", "{1}", "{]", "{]}", R"({"a"})",
        R"({"a",1})", R"({"a" 1})", "{:}", "{,}", R"(["a" "b"])", "[[}]", "[{]]"}) {
    for (const std::string key : {"messages", "tools", "stream_options", "response_format", "x"}) {
      check_every_cut(R"({"model":"m",")" + key + "\":" + value + "}");
      check_every_cut(R"({"model":"m",")" + key + "\":" + value + "}}");
      check_every_cut("{\"" + key + "\":" + value + R"(,"model":"m"})");
    }
  }
}

TEST_CASE("every truncation of a body read in pieces is refused") {
  const std::string body =
      R"({"model":"m","stream":true,"stream_options":{"include_usage":true},"tools":[{"a":1}],"messages":[{"b":"c"}]})";
  for (std::size_t bytes = 0; bytes < body.size(); ++bytes) {
    CHECK(incremental(body.substr(0, bytes), 7).error == ApiError::bad_json);
    check_every_cut(body.substr(0, bytes));
  }
}

TEST_CASE("a body read in pieces may be nested to kMaxJsonDepth, and no deeper") {
  const auto nested = [](std::string_view key, std::size_t depth, char open, char close) {
    std::string text = R"({"model":"m",")" + std::string(key) + R"(":)";
    for (std::size_t i = 1; i < depth; ++i) text += open == '{' ? "{\"a\":" : "[";
    text += "1";
    return text + std::string(depth - 1, close) + "}";
  };
  for (const std::string_view key : {"x", "messages", "stream_options", "response_format"}) {
    for (const auto& [open, close] : {std::pair('[', ']'), std::pair('{', '}')}) {
      for (std::size_t depth = nexus::kMaxJsonDepth - 1; depth <= nexus::kMaxJsonDepth + 1; ++depth) {
        check_large(nested(key, depth, open, close));
      }
      check_large(nested(key, 5000, open, close));
    }
  }
  CHECK(incremental(nested("x", nexus::kMaxJsonDepth, '[', ']'), 100).error == std::nullopt);
  CHECK(incremental(nested("x", nexus::kMaxJsonDepth + 1, '[', ']'), 100).error == ApiError::too_deep);
  check_large(R"({"model":"m","x":[)" + repeated(R"([{}],"[[[{{{\"[[",)", 2000) + "1]}");
}

TEST_CASE("long values are read in pieces at their bounds") {
  for (const std::size_t limit :
       {nexus::kReadKeyBytes, nexus::kKeptWordBytes, nexus::kReadNameBytes, nexus::kCutNameBytes}) {
    for (std::size_t bytes = limit - 3; bytes <= limit + 3; ++bytes) {
      CAPTURE(bytes);
      const std::string plain(bytes, 'a'), escaped = "\\u006d" + std::string(bytes - 6, 'a');
      const std::string broken = "\\q" + std::string(bytes - 2, 'a'), digits(bytes, '1'), spaces(bytes, ' ');
      for (const std::string& text : {plain, escaped, broken}) {
        check_large(R"({"model":")" + text + "\"}");
        check_large(R"({"model":"m",")" + text + "\":1}");
        for (const char* key : {"stream", "tools", "messages", "stream_options", "response_format"}) {
          check_large(R"({"model":"m",")" + std::string(key) + "\":\"" + text + "\"}");
        }
        check_large(R"({"model":"m","response_format":{"type":")" + text + "\"}}");
        check_large(R"({"model":"m","response_format":{")" + text + R"(":1,"type":"json_object"}})");
        check_large(R"({"model":"m","stream_options":{"include_usage":")" + text + "\"}}");
        check_large(R"({"model":"m","stream_options":{")" + text + R"(":1,"include_usage":true}})");
      }
      for (const char* key : {"model", "stream", "tools", "messages", "stream_options", "response_format", "x"}) {
        const std::string quoted = '"' + std::string(key) + '"';
        check_large("{" + spaces + quoted + ":" + digits + R"(,"model":"m"})");
        check_large("{" + quoted + spaces + ":" + spaces + "[" + spaces + "]" + spaces + R"(,"model":"m"})");
      }
    }
  }
}

TEST_CASE("a body of many members leaves a short skeleton, and is read as ever") {
  const std::string many = repeated(R"("a":1,)", 30'000), escaped = repeated(R"("\u0061":[],)", 15'000);
  check_large("{" + many + R"("model":"m","stream":true})");
  check_large("{" + escaped + R"("model":"m"})");
  check_large(R"({"stream_options":{)" + many + R"("include_usage":true},"model":"m"})");
  check_large(R"({"response_format":{)" + many + R"("type":"json_object"},"model":"m"})");
  check_large("{" + repeated(R"("model":"m",)", 15'000) + R"("stream":true})");
  check_large(R"({"stream_options":{)" + repeated(R"("include_usage":true,)", 9'000) + R"("x":0},"model":"m"})");
  const std::string longest = std::string(nexus::kReadNameBytes, 'm'), word(nexus::kKeptWordBytes, '1');
  std::string full = R"({"x":0,"model":")" + longest + "\"", again;
  for (const auto& row : nexus::kBodyKeys) {
    if (row.within != nexus::BodyKey::none || row.name == "model") continue;
    const bool walked = row.name == "stream_options" || row.name == "response_format";
    const std::string inner = row.name == "stream_options" ? "include_usage" : "type";
    full += ",\"" + std::string(row.name) +
            "\":" + (walked ? R"({"x":0,")" + inner + "\":" + word + ",\"" + inner + "\":" + word + "}" : word);
    again += ",\"" + std::string(row.name) + "\":" + word;
  }
  check_large(full + R"(,"model":"m")" + again + "}");  // each key twice, with all that is kept of it
}

TEST_CASE("a large body's characters may be cut anywhere") {
  for (const std::string_view text : {"plain text, no more", "\\\"q\\\\\\n", "é", "日本", "😀", "a日"}) {
    const std::string content = repeated(text, 20'000 / text.size());
    for (std::size_t shift = 0; shift < 4; ++shift) {
      check_large(R"({"model":"m","messages":[")" + std::string(shift, 'x') + content + "\"]}");
      check_large(R"({"model":"m","messages":[")" + std::string(shift, 'x') + content + "\xf0\x9f\x98\"]}");
    }
  }
}

TEST_CASE("a body of many megabytes is read in pieces, spans and all") {
  const std::string image =
      R"({"type":"image_url","image_url":{"url":"data:image/png;base64,)" + std::string(5'000'000, 'A') + "\"}}";
  const std::string messages = R"([{"role":"user","content":[)" + image + "]}]";
  const std::string body = R"({"messages":)" + messages + R"( ,"stream":true,"model":"m\u0021"})";
  const Result result = incremental(body, 200'000);
  REQUIRE(result.error == std::nullopt);
  CHECK(result.model == "m!");
  CHECK(result.facts.stream);
  CHECK(result.facts.has_images);
  CHECK(body.substr(result.facts.model_value.at, result.facts.model_value.bytes) == R"("m\u0021")");
  CHECK(incremental(body.substr(0, body.size() - 1), 200'000).error == ApiError::bad_json);
}

// Bodies put together at random from what matters and what is near it, whole and with a byte changed.
TEST_CASE("random bodies are the same read in pieces and at once") {
  const std::vector<std::string> keys = {
      "model",     "stream",   "tools", "messages",      "stream_options",         "response_format",
      "type",      "x",        "",      "include_usage", "continuous_usage_stats", R"(\u006dodel)",
      R"(\ud800)", R"(\/\"s)", "é",     "modell",        R"(include\u005fusage)"};
  const std::vector<std::string> words = {
      "true",     "false",       "null",   "0",  "-1.5e3",           "\"\"",
      "\"m\"",    R"("a\"b\\")", "[]",     "{}", R"("json_object")", R"("image_url")",
      R"(["x"])", "[1,[{}]]",    "\"é😀\"", "[ ]"};
  for (std::uint64_t seed = 1; seed <= 3000; ++seed) {
    fuzz::Draw draw(std::to_string(seed));
    const auto space = [&] { return std::string(draw.below(5) == 0 ? draw.below(3) : 0, " \n\t\r"[draw.below(4)]); };
    const auto object = [&](auto& self, std::size_t depth) -> std::string {
      std::string text = "{" + space();
      const std::size_t count = draw.below(depth == 0 ? 8 : 4);
      for (std::size_t i = 0; i < count; ++i) {
        if (i > 0) text += "," + space();
        text += '"' + keys[draw.below(keys.size())] + '"' + space() + ":" + space();
        text += depth < 3 && draw.below(3) == 0 ? self(self, depth + 1) : words[draw.below(words.size())];
        text += space();
      }
      return text + "}";
    };
    std::string body = space() + object(object, 0) + space();
    if (draw.below(2) == 0)
      body.insert(body.find('{') + 1, R"("model":"m")" + std::string(body.find('"') < body.npos ? "," : ""));
    CAPTURE(seed);
    CAPTURE(body);
    CHECK_NOTHROW(fuzz::check_pieces(body, fuzz::cuts_of(body.size(), draw)));
    for (int i = 0; i < 3; ++i) {
      std::string changed = body;
      changed[draw.below(changed.size())] = "{}[]\":,\\ \x01\x80\xc3tn1e|"[draw.below(18)];
      CAPTURE(changed);
      CHECK_NOTHROW(fuzz::check_pieces(changed, fuzz::cuts_of(changed.size(), draw)));
    }
  }
}
