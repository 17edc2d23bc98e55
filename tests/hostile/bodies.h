// bodies.h
// Owns:     hostile bodies as rows: the chunked coding and JSON.
// Promises: those of requests.h.
// Leaves:   running them to hostile_requests_test.cpp.
// Threads:  any.
#pragma once

#include <string>
#include <vector>

#include "tests/hostile/requests.h"

namespace hostile {

inline void add_chunk_rows(RequestRows& rows) {
  const std::string end = "0\r\n\r\n";
  const auto refused = [&](const char* name, const std::string& body) {
    rows.push_back(bad(bytes_of("chunked: ") + name, "9112 7.1", chunked_post(body)));
  };
  const auto taken = [&](const char* name, const std::string& body) {
    rows.push_back({bytes_of("chunked: ") + name, "9112 7.1", chunked_post(body), "200", true, 1, false});
  };
  const std::string d = "\r\n" + kBody + "\r\n" + end;  // the bytes after a valid size of 13
  taken("one chunk", "d" + d);
  taken("a chunk a byte", [] {
    std::string text;
    for (const char c : kBody) text += "1\r\n" + std::string(1, c) + "\r\n";
    return text + "0\r\n\r\n";
  }());
  taken("zeros before the size", "000000000000000d" + d);
  taken("a size in capitals", "D" + d);
  taken("a name as extension", "d;a" + d);
  taken("a name and a value", "d;a=b;c=\"x y\"" + d);
  taken("blanks around an extension", "d \t;\t a" + d);
  taken("blanks around a value", "d; a = b ; c\t=\t\"x y\" ;e" + d);
  taken("an escape in an extension", "d;a=\"\\\"\"" + d);
  taken("an end of many zeros", "d\r\n" + kBody + "\r\n0000\r\n\r\n");
  taken("trailers that look like framing",
        "d\r\n" + kBody +
            "\r\n0\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\nHost: b\r\nAuthorization: Bearer x\r\n\r\n");
  taken("a trailer without a value", "d\r\n" + kBody + "\r\n0\r\nX:\r\n\r\n");
  for (const char* size : {"0xd",
                           "+d",
                           "-d",
                           " d",
                           "\td",
                           "d\t",
                           "0_d",
                           "d_",
                           "d.0",
                           "1g",
                           "0000000000000000d",
                           "8000000000000000",
                           "ffffffffffffffff",
                           "fffffffffffffffff",
                           "10000000000000000d",
                           "d;",
                           "d;;a",
                           "d;a ",
                           "d;=b",
                           "d;a=",
                           "d;a=b=c",
                           "d;a b",
                           "d;a=b c",
                           "d ",
                           "d ; ",
                           "d ;a = ",
                           "d;a=\"b",
                           "d;a=\"b\"c",
                           "d;(a)",
                           "d;\x80",
                           "d,d",
                           "\"d\"",
                           ";a",
                           "",
                           "\xef\xbc\x94",
                           "d\x0b",
                           "d\x7f"}) {
    refused((std::string("a size line of ") + size).c_str(), size + d);
  }
  refused("NUL in a size", std::string("d\0", 2) + d);
  refused("LF behind the size", "d\n" + kBody + "\r\n" + end);
  refused("CR alone behind the size", "d\r" + kBody + "\r\n" + end);
  refused("CR CR LF behind the size", "d\r\r\n" + kBody + "\r\n" + end);
  refused("LF LF behind the size", "d\n\n" + kBody + "\r\n" + end);
  refused("LF in an extension", "2;\nxx\r\n50\r\n0\r\n\r\n" + kNext);
  refused("CR in an extension", "2;\rxx\r\n50\r\n0\r\n\r\n" + kNext);
  refused("CR CR in an extension", "2;\r\rxx\r\n" + end);
  refused("CR and text in an extension", "2;\rX\r\nxx\r\n" + end);
  refused("LF behind text in an extension", "2;a\nxx\r\n" + end);
  refused("LF in a quoted extension", "2;a=\"\n\"\r\nxx\r\n" + end);
  refused("CR LF in a quoted extension", "2;a=\"\r\n\"\r\nxx\r\n" + end);
  refused("NUL in an extension", std::string("2;a\0\r\nxx\r\n", 10) + end);
  refused("LF behind the data", "d\r\n" + kBody + "\n" + end);
  refused("CR alone behind the data", "d\r\n" + kBody + "\r" + end);
  refused("nothing behind the data", "d\r\n" + kBody + end);
  refused("two bytes of text behind the data", "d\r\n" + kBody + "xx" + end);
  refused("text and CRLF behind the data", "d\r\n" + kBody + "x\r\n" + end);
  refused("CR and text behind the data", "d\r\n" + kBody + "\rx" + end);
  refused("text and LF behind the data", "d\r\n" + kBody + "x\n" + end);
  refused("LF LF behind the data", "d\r\n" + kBody + "\n\n" + end);
  refused("CR CR behind the data", "d\r\n" + kBody + "\r\r" + end);
  refused("LF CR behind the data", "d\r\n" + kBody + "\n\r" + end);
  refused("a size too small", "5\r\n" + kBody + "\r\n" + end);
  refused("a size too large", "e\r\n" + kBody + "\r\n" + end);
  refused("a negative end", "d\r\n" + kBody + "\r\n-0\r\n\r\n");
  refused("an end by LF", "d\r\n" + kBody + "\r\n0\r\n\n");
  refused("an end by LF LF", "d\r\n" + kBody + "\r\n0\n\n");
  refused("an end by CR and text", "d\r\n" + kBody + "\r\n0\r\n\rX");
  refused("a request line as trailer", "d\r\n" + kBody + "\r\n0\r\nX:POST / HTTP/1.1\r\nGET / HTTP/1.1\r\n\r\n");
  refused("a trailer without a name", "d\r\n" + kBody + "\r\n0\r\n: x\r\n\r\n");
  refused("a blank before a trailer's colon", "d\r\n" + kBody + "\r\n0\r\nX : y\r\n\r\n");
  refused("a folded trailer", "d\r\n" + kBody + "\r\n0\r\nX: y\r\n z\r\n\r\n");
  refused("LF behind a trailer", "d\r\n" + kBody + "\r\n0\r\nX: y\n\r\n");
  refused("NUL in a trailer", "d\r\n" + kBody + std::string("\r\n0\r\nX: \0\r\n\r\n", 13));
  refused("trailers over their limit", "0\r\nX: " + std::string(9000, 'x') + "\r\n\r\n");
  refused("an extension over its limit", "d;" + std::string(300, 'a') + d);
  std::string flood;
  for (int i = 0; i < 200; ++i) flood += "1;" + std::string(200, 'a') + "\r\nx\r\n";
  refused("a flood of extensions", flood + end);
  RequestRow large{"chunked: more than max_body",
                   "9110 15.5.14",
                   chunked_post("20000\r\n" + std::string(70'000, 'x')),
                   "413",
                   false,
                   0,
                   false};
  rows.push_back(large);
  rows.push_back({"chunked: a body that stops", "9110 15.5.9", chunked_post("d\r\n{"), "408", false, 0, false});
  rows.push_back(
      {"chunked: then another request", "9112 9.3", chunked_post("d" + d) + kNext, "200 200", true, 1, false});
  rows.push_back({"chunked: an empty body", "8259 2", chunked_post(end), "400", true, 0, false});
}

inline void add_json_rows(RequestRows& rows) {
  const auto refused = [&](const char* name, const std::string& json, const char* status = "400") {
    rows.push_back(
        {bytes_of("JSON: ") + name, "8259", json_post(json) + kNext, std::string(status) + " 200", true, 0, false});
  };
  const auto taken = [&](const char* name, const std::string& json) {
    rows.push_back({bytes_of("JSON: ") + name, "8259", json_post(json) + kNext, "200 200", true, 1, false});
  };
  taken("blanks around all", " \r\n\t{ \"model\" : \"m\" } \n");
  taken("an escaped key", R"({"\u006dodel":"m"})");
  taken("an escaped value", R"({"model":"\u006d"})");
  taken("a model within another value", R"({"x":{"model":"n"},"model":"m"})");
  taken("a number that is too large for any type", R"({"model":"m","x":1e1000000000})");
  taken("brackets in a text", R"({"model":"m","x":"}]{["})");
  refused("an escaped key twice", R"({"\u006dodel":"n","model":"m"})");
  refused("two models", R"({"model":"m","model":"n"})");
  refused("two equal models", R"({"model":"m","model":"m"})");
  refused("two streams", R"({"model":"m","stream":true,"stream":false})");
  refused("two stream_options", R"({"model":"m","stream_options":{},"stream_options":null})");
  refused("two include_usage", R"({"model":"m","stream_options":{"include_usage":true,"include_usage":false}})");
  refused("two messages", R"({"model":"m","messages":[],"messages":[1]})");
  refused("no model", R"({"Model":"m"})");
  refused("only a model within another value", R"({"x":{"model":"m"}})");
  refused("an empty model", R"({"model":""})");
  refused("a model that is a number", R"({"model":1})");
  refused("a model that is null", R"({"model":null})");
  refused("a model that is a list", R"({"model":["m"]})");
  refused("an unknown model", R"({"model":"n"})", "404");
  refused("NUL in the model", R"({"model":"m\u0000"})", "404");
  refused("a bare NUL in the model", std::string("{\"model\":\"m\0\"}", 14));
  refused("a line end in the model", "{\"model\":\"m\n\"}");
  refused("a half surrogate in the model", R"({"model":"\ud800"})");
  refused("invalid UTF-8 in the model", "{\"model\":\"m\xff\"}");
  refused("overlong UTF-8", "{\"model\":\"m\",\"x\":\"\xc0\xaf\"}");
  refused("invalid UTF-8 in another value", "{\"model\":\"m\",\"x\":\"\xff\"}");
  refused("a byte order mark", "\xef\xbb\xbf{\"model\":\"m\"}");
  refused("a model of 30 k", "{\"model\":\"" + std::string(30'000, 'm') + "\"}", "404");
  refused("a list", R"([{"model":"m"}])");
  refused("a text", R"("model")");
  refused("null", "null");
  refused("nothing but blanks", "   ");
  refused("two objects", R"({"model":"m"}{"model":"n"})");
  refused("text behind the object", R"({"model":"m"}x)");
  refused("an open object", R"({"model":"m")");
  refused("an open text", R"({"model":"m)");
  refused("no quotes", "{model:m}");
  refused("single quotes", "{'model':'m'}");
  refused("a comma at the end", R"({"model":"m",})");
  refused("a comment", R"({"model":"m"/**/})");
  refused("a fault in a value that is passed over",
          R"({"model":"a","tools":[{}],"response_format":{"type,"x"son_object"}})");
  refused("stream that is a text", R"({"model":"m","stream":"true"})");
  refused("stream_options that is a list", R"({"model":"m","stream_options":[]})");
  refused("include_usage that is a number", R"({"model":"m","stream_options":{"include_usage":1}})");
  refused("nested 513 deep", R"({"model":"m","x":)" + std::string(512, '[') + std::string(512, ']') + "}");
  taken("nested 512 deep", R"({"model":"m","x":)" + std::string(511, '[') + std::string(511, ']') + "}");
  refused("30,000 open brackets", R"({"model":"m","x":)" + std::string(30'000, '['));
  refused("brackets that do not match", R"({"model":"m","x":[}])");
}

}  // namespace hostile
