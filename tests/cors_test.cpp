// cors_test.cpp
// Goal:   the fields of a response for each setting of cors_origins and each Origin of a request.
// Method: rows of settings and heads.
#include "nexus/http/head_writer.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

namespace {

std::string lines_for(const std::vector<std::string>& origins, const std::string& request_lines) {
  nexus::ServerSettings server;
  server.cors_origins = origins;
  const std::string text = "GET / HTTP/1.1\r\nHost: a\r\n" + request_lines + "\r\n";
  nexus::FieldTable fields;
  nexus::RequestReader reader;
  nexus::RequestHead head;
  reader.start(&fields);
  REQUIRE(reader.feed(text.data(), text.size(), head).status == nexus::HeadResult::Status::done);
  std::string lines = "old";
  nexus::write_cors_lines(lines, server, {text.data(), &fields, text.size()});
  return lines;
}

const std::string kExpose = "Access-Control-Expose-Headers: *\r\n";

}  // namespace

TEST_CASE("an origin is allowed only if it is listed, byte for byte, and a list varies by it") {
  const std::vector<std::string> list{"https://app.example", "http://localhost:3000"};
  struct Row {
    std::vector<std::string> origins;
    const char* request_lines;
    std::string lines;
  };
  const std::string vary = "Vary: Origin\r\n";
  const Row rows[] = {
      {{}, "Origin: https://app.example\r\n", ""},
      {{"*"}, "", "Access-Control-Allow-Origin: *\r\n" + kExpose},
      {{"*"}, "Origin: https://app.example\r\n", "Access-Control-Allow-Origin: *\r\n" + kExpose},
      {list, "", vary},
      {list, "Origin: http://localhost:3000\r\n",
       "Access-Control-Allow-Origin: http://localhost:3000\r\n" + kExpose + vary},
      {list, "Origin: http://localhost:3001\r\n", vary},
      {list, "Origin: https://app.example.evil\r\n", vary},
      {list, "Origin: https://APP.example\r\n", vary},
      {list, "Origin:\r\n", vary},
      {{"null"}, "Origin: null\r\n", "Access-Control-Allow-Origin: null\r\n" + kExpose + vary},
  };
  for (const Row& row : rows) {
    CAPTURE(row.request_lines);
    const std::string lines = lines_for(row.origins, row.request_lines);
    CHECK(lines == row.lines);
    CHECK(nexus::allows_origin(lines) == (lines.find("Allow-Origin") != std::string::npos));
  }
}
