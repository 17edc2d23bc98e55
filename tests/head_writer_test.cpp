// head_writer_test.cpp
// Goal:   a rebuilt head has exactly the fields that may be forwarded and Nexus's own, and fits the room measured for
// it. Method: parsed heads as rows, against the expected bytes; then the longest values of everything that is variable.
#include "nexus/http/head_writer.h"

#include <doctest/doctest.h>

#include <memory>
#include <string>
#include <string_view>

using namespace nexus;

namespace {

template <class Head>
struct Parsed {
  std::string text;
  std::unique_ptr<FieldTable> fields = std::make_unique<FieldTable>();
  Head head;

  explicit Parsed(std::string bytes) : text(std::move(bytes)) {
    HeadReader<Head> reader;
    reader.start(fields.get());
    REQUIRE(reader.feed(text.data(), text.size(), head).status == HeadResult::Status::done);
  }
  HeadView view() const { return {text.data(), fields.get(), head.head_bytes}; }
};

// The head that a backend gets for a request with these lines after its Host.
std::string forwarded(const std::string& lines, bool pass_credentials = true) {
  const Parsed<RequestHead> request("POST /v1/x HTTP/1.1\r\nHost: nexus\r\n" + lines + "\r\n");
  UpstreamHead to;
  to.method = "POST";
  to.target = "/v1/x";
  to.base_path = "/base";
  to.backend_lines = "Host: b\r\n";
  to.withheld = pass_credentials ? 0 : kCredentials;
  to.request_id = "id";
  to.own_lines = "Via: 1.1 nexus\r\n";
  to.content_length = 3;
  std::string out = "before ";
  append_request_head(out, request.view(), to);
  return out;
}

// The same with what is always there taken away: the lines that were forwarded.
std::string forwarded_lines(const std::string& lines, bool pass_credentials = true) {
  const std::string begin = "before POST /base/v1/x HTTP/1.1\r\nHost: b\r\n";
  const std::string end = "X-Request-Id: id\r\nVia: 1.1 nexus\r\nContent-Length: 3\r\n\r\n";
  const std::string out = forwarded(lines, pass_credentials);
  REQUIRE(out.size() >= begin.size() + end.size());
  CHECK(out.substr(0, begin.size()) == begin);
  CHECK(out.substr(out.size() - end.size()) == end);
  return out.substr(begin.size(), out.size() - begin.size() - end.size());
}

}  // namespace

TEST_CASE("end-to-end fields are forwarded to the backend, all others are removed") {
  struct Row {
    const char* name;
    const char* lines;
    const char* kept;
  };
  const Row rows[] = {
      {"none", "", ""},
      {"unknown fields, in their order and spelling", "B: 1\r\na:2\r\nB:  3 \r\n", "B: 1\r\na:2\r\nB:  3 \r\n"},
      {"hop-by-hop fields", "Keep-Alive: 5\r\nTE: x\r\nA: 1\r\nTrailer: y\r\nUpgrade: z\r\nProxy-Connection: a\r\n",
       "A: 1\r\n"},
      {"framing", "Content-Length: 3\r\nA: 1\r\n", "A: 1\r\n"},
      {"chunked framing", "A: 1\r\nTransfer-Encoding: chunked\r\n", "A: 1\r\n"},
      {"Nexus's own fields", "X-Nexus-Backend: b\r\nX-Request-Id: mine\r\nX-Nexusish: 1\r\n", "X-Nexusish: 1\r\n"},
      {"names with underscores for dashes", "Content_Length: 9\r\nX_Nexus_A: 1\r\nX_Own: 1\r\n", "X_Own: 1\r\n"},
      {"compression and expectations", "Accept-Encoding: gzip\r\nAccept: a\r\nExpect: 100-continue\r\n",
       "Accept: a\r\n"},
      {"fields that Connection names", "Connection: close, X-A\r\nX-A: 1\r\nX-B: 2\r\nx-a: 3\r\n", "X-B: 2\r\n"},
      {"but never one that Nexus knows",
       "Connection: Authorization, Content-Type\r\nAuthorization: k\r\nContent-Type: t\r\n",
       "Authorization: k\r\nContent-Type: t\r\n"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    CHECK(forwarded_lines(row.lines) == row.kept);
  }
}

TEST_CASE("the client's authorization is forwarded only if the backend has no key") {
  CHECK(forwarded_lines("A: 1\r\nAuthorization: k\r\n", true) == "A: 1\r\nAuthorization: k\r\n");
  CHECK(forwarded_lines("A: 1\r\nAuthorization: k\r\n", false) == "A: 1\r\n");
  const std::string keys = "X-API-Key: k\r\nAuthorization: k\r\nx_api_key: k\r\napi-key: k\r\nApi_Key: k\r\n";
  CHECK(forwarded_lines("A: 1\r\n" + keys + "X-API-Keys: 1\r\n", true) == "A: 1\r\n" + keys + "X-API-Keys: 1\r\n");
  CHECK(forwarded_lines("A: 1\r\n" + keys + "X-API-Keys: 1\r\n", false) == "A: 1\r\nX-API-Keys: 1\r\n");
}

TEST_CASE("a response head has the backend's status and fields, and Nexus's own") {
  const Parsed<ResponseHead> response(
      "HTTP/1.0 404 Not  Found\r\nServer: s\r\nConnection: close\r\nContent-Length: 5\r\nX-Nexus-A: b\r\n\r\n");
  ClientHead to;
  to.backend_line = "X-Nexus-Backend: b\r\n";
  to.request_id = "id";
  to.route_reason = "alias";
  const std::string begin =
      "HTTP/1.1 404 Not  Found\r\nServer: s\r\nX-Nexus-Backend: b\r\nX-Nexus-Route-Reason: alias\r\n";
  const auto written = [&] {
    std::string out;
    append_response_head(out, response.view(), response.head, to);
    return out;
  };
  CHECK(written() == begin + "X-Request-Id: id\r\n\r\n");
  to.framing = {Framing::Kind::length, 5};
  CHECK(written() == begin + "X-Request-Id: id\r\nContent-Length: 5\r\n\r\n");
  to.framing = {Framing::Kind::chunked, 0};
  to.fallback_model = "m";
  CHECK(written() == begin + "X-Nexus-Fallback-Model: m\r\nX-Request-Id: id\r\nTransfer-Encoding: chunked\r\n\r\n");
  to.fallback_model = "";
  to.framing = {Framing::Kind::until_close, 0};
  to.keep_alive = false;
  CHECK(written() == begin + "X-Request-Id: id\r\nConnection: close\r\n\r\n");
  to.keep_alive = to.http_1_0 = true;
  CHECK(written() == begin + "X-Request-Id: id\r\nConnection: keep-alive\r\n\r\n");
}

TEST_CASE("Nexus's own response head has what its status asks for") {
  OwnResponse own;
  const auto written = [&](std::size_t body_bytes) {
    std::string out;
    append_own_head(out, own, body_bytes);
    return out;
  };
  CHECK(written(0) == "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n");
  own.status = 401;
  own.request_id = "id";
  own.keep_alive = false;
  CHECK(written(7) ==
        "HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\nContent-Length: 7\r\n"
        "WWW-Authenticate: Bearer\r\nX-Request-Id: id\r\nConnection: close\r\n\r\n");
  own = OwnResponse();
  own.status = 429;
  own.content_type = "text/plain";
  own.extra_fields = "Allow: GET\r\n";
  own.retry_after_s = 2;
  CHECK(written(7) ==
        "HTTP/1.1 429 Too Many Requests\r\nContent-Type: text/plain\r\nContent-Length: 7\r\nAllow: GET\r\n"
        "Retry-After: 2\r\n\r\n");
}

TEST_CASE("a response has one Date, a backend's own if it gave one") {
  ClientHead to;
  to.date_line = "Date: now\r\n";
  to.framing = {Framing::Kind::length, 0};
  const auto written = [&](const char* lines) {
    const Parsed<ResponseHead> response(std::string("HTTP/1.1 200 OK\r\n") + lines + "Content-Length: 0\r\n\r\n");
    std::string out;
    append_response_head(out, response.view(), response.head, to);
    return out;
  };
  CHECK(written("X: y\r\n").starts_with("HTTP/1.1 200 OK\r\nX: y\r\nDate: now\r\n"));
  CHECK(written("DATE: then\r\n").find("now") == std::string::npos);
  CHECK(written("DATE: then\r\n").find("DATE: then\r\n") != std::string::npos);
}

TEST_CASE(
    "a backend's access-control fields stand only where Nexus has none, and a page's origin goes where it is told") {
  ClientHead to;
  const Parsed<ResponseHead> response(
      "HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: theirs\r\naccess-control-x: y\r\nVary: A\r\n\r\n");
  std::string out;
  append_response_head(out, response.view(), response.head, to);
  CHECK(out.find("Access-Control-Allow-Origin: theirs\r\naccess-control-x: y\r\nVary: A\r\n") != std::string::npos);
  to.cors_lines = "Access-Control-Allow-Origin: ours\r\n";
  out.clear();
  append_response_head(out, response.view(), response.head, to);
  CHECK(out.starts_with("HTTP/1.1 200 OK\r\nVary: A\r\nAccess-Control-Allow-Origin: ours\r\n"));
  const Parsed<RequestHead> request("POST / HTTP/1.1\r\nHost: h\r\nOrigin: page\r\n\r\n");
  for (const bool pass : {true, false}) {
    UpstreamHead upstream;
    upstream.withheld = pass ? 0 : bit_of(Field::origin);
    out.clear();
    append_request_head(out, request.view(), upstream);
    CHECK((out.find("Origin: page\r\n") != std::string::npos) == pass);
  }
}

TEST_CASE("a date line is written as RFC 9110 5.6.7 wants it, and again in each second") {
  DateLine date;
  CHECK(date.is_due(0));
  date.write(100, 784111777 * kSecond + kSecond / 4);
  CHECK(date.view() == "Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n");
  CHECK_FALSE(date.is_due(99 + 3 * kSecond / 4));
  CHECK(date.is_due(100 + 3 * kSecond / 4));
}

// Each head is written into a string without spare capacity, so that the sanitizer reports a byte too many.
TEST_CASE("the longest values fit the measured room") {
  const std::string large(20'000, 'x');
  const Parsed<RequestHead> request("POST /" + large + " HTTP/1.1\r\nHost: h\r\nA: " + large + "\r\n\r\n");
  UpstreamHead upstream;
  const std::string target = "/" + large;
  upstream.method = "UNSUBSCRIBE";
  upstream.target = target;
  upstream.base_path = upstream.backend_lines = upstream.request_id = upstream.own_lines = large;
  upstream.content_length = UINT64_MAX;
  std::string out;
  append_request_head(out, request.view(), upstream);
  CHECK(out.substr(out.size() - 40) == "Content-Length: 18446744073709551615\r\n\r\n");

  const Parsed<ResponseHead> response("HTTP/1.1 200 " + large + "\r\nA: " + large + "\r\n\r\n");
  ClientHead client;
  client.backend_line = client.request_id = client.route_reason = client.fallback_model = large;
  client.date_line = client.cors_lines = large;
  client.framing = {Framing::Kind::length, UINT64_MAX};
  client.http_1_0 = true;
  out = std::string();
  append_response_head(out, response.view(), response.head, client);
  CHECK(out.substr(out.size() - 40) == "Content-Length: 18446744073709551615\r\n\r\n");

  OwnResponse own;
  own.content_type = own.extra_fields = own.request_id = own.date_line = own.cors_lines = large;
  own.retry_after_s = 255;
  own.http_1_0 = true;
  for (const int status : {401, 431}) {  // the most fields, and the longest reason
    own.status = static_cast<std::uint16_t>(status);
    out = std::string();
    append_own_head(out, own, SIZE_MAX);
    CHECK(out.size() > 3 * large.size());
  }
}
