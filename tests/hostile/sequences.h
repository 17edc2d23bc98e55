// sequences.h
// Owns:     hostile sequences as rows: unread bodies, pipelines, expectations, upgrades, fields named in Connection.
// Promises: those of requests.h.
// Leaves:   running them to hostile_requests_test.cpp.
// Threads:  any.
#pragma once

#include <string>

#include "tests/hostile/requests.h"

namespace hostile {

inline void add_unread_body_rows(RequestRows& rows) {
  const std::string smuggled = "GET /v1/models HTTP/1.1\r\nHost: smuggled\r\n\r\n";
  const std::string length = "Content-Length: " + std::to_string(smuggled.size()) + "\r\n";
  const std::string hex = "29\r\n" + smuggled + "\r\n0\r\n\r\n";  // 0x29: its length
  const auto row = [&](const char* name, const char* section, std::string bytes, const char* statuses,
                       bool kept = false) {
    rows.push_back({name, section, std::move(bytes), statuses, kept, 0, false});
  };
  const auto keyed = [&](const char* name, std::string bytes, const char* statuses, bool kept, std::size_t reached) {
    rows.push_back({name, "9110 11.6.2", std::move(bytes), statuses, kept, reached, true});
  };
  row("a page asked with a body", "9112 9.3", get(length) + smuggled, "200");
  row("a page asked with a chunked body", "9112 9.3", get("Transfer-Encoding: chunked\r\n") + hex, "200");
  row("a page asked with a body in a coding that is not known", "9112 6.1",
      get("Transfer-Encoding: gzip, chunked\r\n") + hex, "501");
  row("a page asked with a body in gzip", "9112 6.1", get("Transfer-Encoding: gzip\r\n") + hex, "501");
  row("HEAD with a body", "9110 9.3.2", "HEAD /v1/models HTTP/1.1\r\nHost: a\r\n" + length + "\r\n" + smuggled, "200");
  row("no such page, with a body", "9112 9.3", "POST /nope HTTP/1.1\r\nHost: a\r\n" + length + "\r\n" + smuggled,
      "404");
  row("no such page, with a chunked body", "9112 9.3",
      "POST /nope HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + hex, "404");
  row("no such page, with a body in an unknown coding", "9112 6.1",
      "POST /nope HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n" + hex, "501");
  row("a wrong method, with a body", "9112 9.3",
      "PUT /v1/chat/completions HTTP/1.1\r\nHost: a\r\n" + length + "\r\n" + smuggled, "405");
  row("a wrong method, with a body in an unknown coding", "9112 6.1",
      "PUT /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n" + hex, "405");
  row("a body too large, by its length", "9110 15.5.14", post("Content-Length: 65537\r\n", smuggled), "413");
  row("the largest length of all", "9110 15.5.14", post("Content-Length: 9223372036854775807\r\n", smuggled), "413");
  row("a length of 20 digits less one", "9110 15.5.14", post("Content-Length: 9999999999999999\r\n", smuggled), "413");
  row("a body that stops", "9110 15.5.9", post("Content-Length: 14\r\n", kBody), "408");
  row("no body at all", "8259 2", post(""), "400", true);
  row("no length, and a body: it is the next request", "9112 6.3", post("") + smuggled, "400 200", true);
  row("a length too small: the rest is the next request", "9112 6.3", post("Content-Length: 12\r\n", kBody) + kNext,
      "400 400");
  keyed("no key", good_post() + smuggled, "401", false, 0);
  keyed("a wrong key", good_post("Authorization: Bearer wrong\r\n") + smuggled, "401", false, 0);
  keyed("a wrong key of the right length", good_post("Authorization: Bearer secreT\r\n"), "401", false, 0);
  keyed("a key of another scheme", good_post("Authorization: Basic secret\r\n"), "401", false, 0);
  keyed("a key without a scheme", good_post("Authorization: secret\r\n"), "401", false, 0);
  keyed("a key in an underscore twin", good_post("Authorizat_on: Bearer secret\r\n"), "401", false, 0);
  keyed("a key in a trailer", chunked_post("d\r\n" + kBody + "\r\n0\r\nAuthorization: Bearer secret\r\n\r\n"), "401",
        false, 0);
  keyed("a key with more behind it", good_post("Authorization: Bearer secret x\r\n"), "401", false, 0);
  keyed("the right key", good_post("Authorization: bearer  secret \r\n"), "200", true, 1);
  keyed("the right key behind a wrong one",
        good_post("Authorization: Bearer wrong\r\nAuthorization: Bearer secret\r\n"), "401", false, 0);
  keyed("a page without a key", get(""), "401", true, 0);
  keyed("a page without a key, with a body", get(length) + smuggled, "401", false, 0);
  keyed("the health page needs none", get("", "/health"), "200", true, 0);
}

inline void add_expectation_rows(RequestRows& rows) {
  const std::string expect = "Expect: 100-continue\r\n";
  const auto row = [&](const char* name, std::string bytes, const char* statuses, bool kept, std::size_t reached) {
    rows.push_back({bytes_of("expectation: ") + name, "9110 10.1.1", std::move(bytes), statuses, kept, reached, false});
  };
  row("kept", good_post(expect), "200", true, 1);
  row("in capitals", good_post("EXPECT: 100-CONTINUE\r\n"), "200", true, 1);
  row("chunked", chunked_post(chunk(kBody) + "0\r\n\r\n", expect), "200", true, 1);
  row("the body never comes", post(expect + "Content-Length: 13\r\n"), "408", false, 0);
  row("without a body", get(expect), "200", true, 0);
  row("with a length of 0", post(expect + "Content-Length: 0\r\n"), "400", true, 0);
  row("in HTTP/1.0", "POST /v1/chat/completions HTTP/1.0\r\n" + expect + "Content-Length: 13\r\n\r\n" + kBody, "200",
      false, 1);
  row("and a body too large", post(expect + "Content-Length: 65537\r\n", "GET / HTTP/1.1\r\n\r\n"), "413", false, 0);
  for (const char* odd :
       {"100-continues", "100", "200-ok", "", "100-continue, x", "100-continue;q=1", "\"100-continue\"", "x"}) {
    row((std::string("of ") + odd).c_str(), good_post("Expect: " + std::string(odd) + "\r\n") + kNext, "417", false, 0);
  }
  row("twice", good_post(expect + expect) + kNext, "417", false, 0);
}

inline void add_upgrade_rows(RequestRows& rows) {
  const auto row = [&](const char* name, std::string bytes, const char* statuses, std::size_t reached) {
    rows.push_back({name, "9110 7.8", std::move(bytes), statuses, true, reached, false});
  };
  row("websocket", good_post("Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n") + kNext,
      "200 200", 1);
  row("h2c",
      good_post("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n") + kNext,
      "200 200", 1);
  row("a page and websocket", get("Connection: Upgrade\r\nUpgrade: websocket\r\n") + kNext, "200 200", 0);
  row("Upgrade without Connection", good_post("Upgrade: websocket\r\n"), "200", 1);
}

inline void add_field_rows(RequestRows& rows) {
  const auto row = [&](const char* name, const std::string& lines) {
    rows.push_back({bytes_of("field: ") + name, "9110 7.6.1", good_post(lines) + kNext, "200 200", true, 1, false});
  };
  row("Connection names what matters",
      "Connection: Authorization, X-Request-Id, Host, Content-Length, Content-Type, Via\r\n"
      "Authorization: Bearer k\r\nContent-Type: application/json\r\n");
  row("Connection names another field", "Connection: X-Secret\r\nX-Secret: 1\r\n");
  row("Connection twice", "Connection: keep-alive\r\nConnection: x-a\r\nX-A: 1\r\n");
  row("an empty Connection", "Connection:\r\n");
  row("a list of commas in Connection", "Connection: ,,, ,\r\n");
  row("hop-by-hop fields",
      "Keep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nTE: trailers\r\nTrailer: X\r\nProxy-Authorization: "
      "x\r\n");
  row("twins with underscores",
      "Content_Length: 99\r\nTransfer_Encoding: chunked\r\nX_Request_Id: evil\r\nKeep_Alive: 1\r\n");
  row("a forged answer's field", "X-Nexus-Backend: evil\r\nX_Nexus_Route_Reason: evil\r\nX-Nexus-: y\r\n");
  row("two request ids", "X-Request-Id: one\r\nX-Request-Id: two\r\n");
  row("a request id with blanks", "X-Request-Id: a b\r\n");
  row("a request id above ASCII", "X-Request-Id: \xff\xfe\r\n");
  row("a request id of 129 bytes", "X-Request-Id: " + std::string(129, 'a') + "\r\n");
  row("an empty request id", "X-Request-Id:\r\n");
  row("bytes above ASCII in a value", "X-Name: \xe4\xf6\xfc\r\n");
  row("blanks alone in a value", "X-Name: \t \t \r\n");
  row("somebody else's Via", "Via: 1.1 nexus-12345678, 1.0 other\r\n");
  rows.push_back(
      {"field: our own Via", "9110 7.6.3", good_post("Via: 1.1 x, 1.1 nexus-51515151\r\n"), "508", false, 0, false});
}

inline void add_pipeline_rows(RequestRows& rows) {
  const std::string models = get("");
  const auto row = [&](const char* name, std::string bytes, const char* statuses, bool kept, std::size_t reached) {
    rows.push_back({bytes_of("pipeline: ") + name, "9112 9.3.2", std::move(bytes), statuses, kept, reached, false});
  };
  row("three good ones", good_post() + models + good_post(), "200 200 200", true, 2);
  row("good, then no HTTP", good_post() + "\x16\x03\x01", "200 400", false, 1);
  row("good, then both framings",
      good_post() + post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n") + models, "200 400", false,
      1);
  row("good, then a bad line, then good", good_post() + "GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n" + good_post(),
      "200 400", false, 1);
  row("good, then half a head", good_post() + "GET /v1/mo", "200 408", false, 1);
  row("good, then too much head", models + "GET /" + std::string(20000, 'x'), "200 414", false, 0);
  row("good, then a bad chunk", models + chunked_post("z\r\n"), "200 400", false, 0);
  row("close, then another", good_post("Connection: close\r\n") + models, "200", false, 1);
  row("close among others, then another", good_post("Connection: x, Close\r\n") + models, "200", false, 1);
  row("close on a second line, then another", good_post("Connection: keep-alive\r\nConnection: close\r\n") + models,
      "200", false, 1);
  row("HTTP/1.0, then another", "GET /v1/models HTTP/1.0\r\n\r\n" + models, "200", false, 0);
  row("HTTP/1.0 that says both, then another",
      "GET /v1/models HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n" + models, "200", false, 0);
  row("HTTP/1.0 that stays, then another", "GET /v1/models HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n" + models,
      "200 200", true, 0);
  row("HEAD, then another", "HEAD /v1/models HTTP/1.1\r\nHost: a\r\n\r\n" + models, "200 200", true, 0);
  row("HEAD of the endpoint, then another", "HEAD /v1/chat/completions HTTP/1.1\r\nHost: a\r\n\r\n" + models, "405 200",
      true, 0);
  row("a body that looks like a request", json_post(R"({"model":"m","x":"\r\n\r\nGET / HTTP/1.1\r\n\r\n"})") + models,
      "200 200", true, 1);
  row("refused JSON, then another", json_post("GET / HTTP/1.1\r\nHost: b\r\n\r\n") + models, "400 200", true, 0);
  row(
      "twenty pages",
      [&] {
        std::string all;
        for (int i = 0; i < 20; ++i) all += models;
        return all;
      }(),
      "200 200 200 200 200 200 200 200 200 200 200 200 200 200 200 200 200 200 200 200", true, 0);
}

inline void add_sequence_rows(RequestRows& rows) {
  add_unread_body_rows(rows);
  add_expectation_rows(rows);
  add_upgrade_rows(rows);
  add_field_rows(rows);
  add_pipeline_rows(rows);
}

}  // namespace hostile
