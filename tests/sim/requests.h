// requests.h
// Owns:     the requests that simulated clients send: heads, bodies in each framing, and faulty requests.
// Promises: each carries its id; the ledger records the status that a faulty one must get.
// Leaves:   the time of sending to clients.h.
// Threads:  one.
#pragma once

#include <string>
#include <string_view>

#include "ledger.h"
#include "swarm.h"

namespace nexus::sim {

class RequestMaker {
 public:
  RequestMaker(Ledger& ledger, Dice& dice, const Habits& habits) : ledger_(ledger), dice_(dice), habits_(habits) {}

  // Of the first configuration. 0: no head comes near it.
  std::size_t max_body_bytes = SIZE_MAX, max_header_bytes = 0;

  struct Made {
    std::size_t number;
    std::size_t head_bytes;  // of the request
    bool ends_connection;    // no further request can follow
  };

  // Appends a request to `out`.
  Made make(std::string& out, std::uint32_t client, bool http_1_0, bool keep_alive, bool may_expect) {
    Request request;
    request.client = client;
    request.http_1_0 = http_1_0;
    const std::size_t number = ledger_.requests.size();
    const std::string id = ledger_.id_of(number);
    const std::size_t from = out.size();
    Made made{number, 0, false};
    if (dice_.chance(habits_.page)) {
      write_page(out, request, id, http_1_0, keep_alive);
      made.head_bytes = out.size() - from;
    } else if (dice_.chance(habits_.wrong_request)) {
      made.ends_connection = write_wrong(out, request, id);
      made.head_bytes = out.size() - from;
    } else {
      made.head_bytes = write_completion(out, request, id, http_1_0, keep_alive, may_expect);
    }
    request.head_bytes = made.head_bytes;
    ledger_.requests.push_back(std::move(request));
    return made;
  }

 private:
  void write_page(std::string& out, Request& request, std::string_view id, bool http_1_0, bool keep_alive) {
    constexpr std::string_view kPaths[] = {"/health",  "/v1/models", "/v1/models/m0", "/v1/stats",   "/v1/models?x=y",
                                           "/metrics", "/",          "/api/tags",     "/api/version"};
    request.kind = Request::Kind::page;
    request.page = kPaths[dice_.index(std::size(kPaths))];
    out.append("GET ").append(request.page).append(http_1_0 ? " HTTP/1.0\r\n" : " HTTP/1.1\r\n");
    out.append("Host: nexus\r\nAuthorization: Bearer sk-sim\r\n");
    if (dice_.one_in(2)) out.append("Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n");
    write_id(out, id, http_1_0, keep_alive);
    out += "\r\n";
  }

  static void write_id(std::string& out, std::string_view id, bool http_1_0, bool keep_alive) {
    out.append("X-Request-Id: ").append(id).append("\r\n");
    if (http_1_0 && keep_alive) out.append("Connection: keep-alive\r\n");
    if (!http_1_0 && !keep_alive) out.append("Connection: close\r\n");
  }

  void draw_body(Request& request, std::size_t number, bool streams) {
    BodyParts& body = request.body;
    constexpr std::string_view kModels[] = {"m0", "m0", "m0", "m1", "m1", "m2", "m3", "m3", "m4", "m5", "a0", "a1"};
    body.model = kModels[dice_.index(std::size(kModels))];
    body.stream = streams && dice_.one_in(2);
    body.stream_text = stream_member(*request.api, body.stream);
    body.options = dice_.one_in(2) || !request.api->takes_options ? BodyParts::Options::absent
                                                                  : static_cast<BodyParts::Options>(dice_.number(0, 5));
    const std::size_t bytes = dice_.chance(habits_.large_body) ? dice_.number(5'000, 250'000) : dice_.skewed(0, 1000);
    const std::string text = "\"" + std::string(pattern_of(number * 7, bytes)) + "\"";
    const std::string needs = draw_needs(request);
    const std::string parts = R"([{"type":"image_url","image_url":{"url":"x"}},{"type":"text","text":)" + text + "}]";
    const std::string turn = R"({"role":"user","content":)" + (request.needs.vision ? parts : text) + "}";
    const std::string content = R"("messages":[)" + draw_talk(request) + turn + "]" + needs;
    if (dice_.one_in(2)) {
      body.before = content + ",";
      body.after = R"("n":1)";
    } else {
      body.after = content;
    }
    if (dice_.one_in(4)) body.before.insert(0, "\n ");
    request.sent_body = body.render(body.model, false);
    pad(request);
  }

  // Draws the conversation that the request goes on with. Returns what was said before.
  std::string draw_talk(Request& request) {
    if (!dice_.one_in(4)) return {};
    request.talk = static_cast<std::int32_t>(dice_.number(0, 3));
    const std::string opening = std::to_string(request.talk) + std::string(300, 'o');  // long enough for affinity
    std::string out = R"({"role":"user","content":")" + opening + R"("},)";
    for (std::uint32_t i = dice_.number(1, 3); i > 0; --i) {
      if (i > 1) out += R"({"role":"user","content":"go on"},)";
      out += R"({"role":"assistant","content":")" + std::to_string(dice_.number(0, 9)) + R"("},)";
    }
    return out;
  }

  // Draws what the request needs of its backend. Returns the members that say so, behind the messages.
  std::string draw_needs(Request& request) {
    if (request.api->path != kApiRows[0].path || !dice_.one_in(4)) return {};
    Needs& needs = request.needs;
    needs = {dice_.one_in(2), dice_.one_in(2), dice_.one_in(2)};
    std::string out;
    if (needs.tools) out += R"(,"tools":[{"type":"function","function":{"name":"f"}}])";
    if (needs.json)
      out += R"(,"response_format":{"type":")" + std::string(dice_.one_in(2) ? "json_object\"}" : "json_schema\"}");
    return out;
  }

  // Sometimes as large as a body may be, or larger by a byte.
  void pad(Request& request) {
    const std::size_t wanted = max_body_bytes + (dice_.one_in(2) ? 1 : 0), is = request.sent_body.size();
    if (max_body_bytes > 5000 || is >= wanted || !dice_.one_in(4)) return;
    request.body.before.insert(0, wanted - is, ' ');
    request.sent_body = request.body.render(request.body.model, false);
  }

  // Returns the bytes of its head.
  std::size_t write_completion(std::string& out, Request& request, std::string_view id, bool http_1_0, bool keep_alive,
                               bool may_expect) {
    const std::size_t from = out.size();
    request.api = &kApiRows[dice_.one_in(3) ? 0 : dice_.index(kApiRows.size())];
    draw_body(request, ledger_.requests.size(), request.api->stream != Asks::never);
    request.counted = true;
    out.append("POST ").append(request.api->path).append(http_1_0 ? " HTTP/1.0\r\n" : " HTTP/1.1\r\n");
    out.append("Host: nexus\r\nContent-Type: application/json\r\n");
    if (habits_.crowded) {
      request.key = request.client % 2 == 0 ? "sim" : "rest";
      request.most_tokens = request.client % 2 == 0 ? 200 : 4000;
      out.append("Authorization: Bearer sk-").append(request.key).append("\r\n");
    } else if (dice_.one_in(20)) {
      out.append("Authorization: Bearer sk-client\r\n");
    } else if (!dice_.one_in(20)) {
      request.key = dice_.one_in(4) ? "rest" : "sim";
      out.append("Authorization: Bearer sk-").append(request.key).append("\r\n");
    }
    write_id(out, id, http_1_0, keep_alive);
    if (dice_.one_in(2)) out.append("X-Session-Id: s").append(std::to_string(dice_.number(0, 9))).append("\r\n");
    request.cross_origin = dice_.one_in(8);
    if (request.cross_origin) out.append("Origin: https://page\r\n");
    if (dice_.one_in(8)) out.append("Accept-Encoding: gzip\r\n");
    if (dice_.one_in(4)) out.append("Traceparent: 00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01\r\n");
    if (dice_.one_in(20)) out.append("Connection: X-Hop\r\nX-Hop: for Nexus alone\r\nTE: trailers\r\n");
    const bool chunked = request.chunked = !http_1_0 && dice_.chance(habits_.chunked_body);
    const bool expects = may_expect && dice_.chance(habits_.expect_continue);
    request.expects_continue = expects && !http_1_0;  // RFC 9110 10.1.1: no answer to an HTTP/1.0 client
    if (expects) out.append("Expect: 100-continue\r\n");
    if (!chunked) {
      out.append("Content-Length: ").append(std::to_string(request.sent_body.size())).append("\r\n");
      const std::size_t head_bytes = end_head(out, from);
      out += request.sent_body;
      return head_bytes;
    }
    out.append("Transfer-Encoding: chunked\r\n");
    const std::size_t head_bytes = end_head(out, from);
    write_chunks(out, request.sent_body);
    return head_bytes;
  }

  // Sometimes the head is as large as it may be, or larger by a byte. Returns its bytes.
  std::size_t end_head(std::string& out, std::size_t from) {
    constexpr std::string_view kPad = "X-Pad: \r\n";
    const std::size_t wanted = max_header_bytes + (dice_.one_in(2) ? 1 : 0), is = out.size() + 2 - from;
    if (is + kPad.size() <= wanted && dice_.one_in(max_header_bytes < 2000 ? 4 : 60)) {
      out.append(kPad).insert(out.size() - 2, wanted - is - kPad.size(), 'x');
    }
    out += "\r\n";
    return out.size() - from;
  }

  void write_chunks(std::string& out, std::string_view body) {
    while (!body.empty()) {
      const std::size_t bytes = dice_.skewed(1, static_cast<std::uint32_t>(body.size()));
      char size[32];
      std::snprintf(size, sizeof size, dice_.one_in(2) ? "%zx" : "%04zX", bytes);
      out.append(size).append(dice_.one_in(20) ? ";ext=1\r\n" : "\r\n").append(body.substr(0, bytes)).append("\r\n");
      body.remove_prefix(bytes);
    }
    out.append(dice_.one_in(20) ? "0\r\nX-Trailer: y\r\n\r\n" : "0\r\n\r\n");
  }

  // True if no further request can follow it.
  bool write_wrong(std::string& out, Request& request, std::string_view id) {
    request.kind = Request::Kind::wrong;
    const auto post = [&](std::string_view body, std::string_view fields, std::uint16_t status) {
      request.counted = true;
      request.expected_status = status;
      out.append("POST /v1/chat/completions HTTP/1.1\r\nHost: nexus\r\nAuthorization: Bearer sk-sim\r\n");
      write_id(out, id, false, true);
      out.append(fields).append("Content-Length: ").append(std::to_string(body.size())).append("\r\n\r\n").append(body);
    };
    const auto malformed = [&](std::string_view bytes) {
      request.kind = Request::Kind::malformed;
      request.expected_status = 400;
      out.append(bytes);
      return true;
    };
    switch (dice_.number(0, 14)) {
      case 0: post(R"({"model":"nobody's"})", "", 404); return false;
      case 1: post(R"({"model":"m0")", "", 400); return false;
      case 2: post(R"({"messages":[]})", "", 400); return false;
      case 3: post(R"({"model":7})", "", 400); return false;
      case 4: post(R"({"model":"m0","model":"m1"})", "", 400); return false;
      case 5: post("", "", 400); return false;
      case 6: post(R"({"model":"m0"})", "Expect: the unexpected\r\n", 417); return true;
      case 7:
        request.expected_status = 405;
        out.append("GET /v1/completions HTTP/1.1\r\nHost: nexus\r\n");
        write_id(out, id, false, true);
        out += "\r\n";
        return false;
      case 8:
        request.expected_status = 404;
        out.append("GET /nowhere HTTP/1.1\r\nHost: nexus\r\n");
        write_id(out, id, false, true);
        out += "\r\n";
        return false;
      case 9:
        request.counted = true;
        request.expected_status = 400;
        out.append("POST /v1/completions HTTP/1.1\r\nHost: nexus\r\nAuthorization: Bearer sk-sim\r\n");
        write_id(out, id, false, true);
        out.append("Transfer-Encoding: chunked\r\n\r\n5\r\n{\"mod\r\nZZ\r\n");
        return true;
      case 10: return malformed("POST /v1/completions HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
      case 11: return malformed("GET  /health HTTP/1.1\r\nHost: nexus\r\n\r\n");
      case 12: return malformed("POST /v1/completions HTTP/1.1\r\nHost: nexus\r\nContent-Length : 2\r\n\r\n{}");
      case 13:
        return malformed(
            "POST /v1/completions HTTP/1.1\r\nHost: nexus\r\nContent-Length: 2\r\nTransfer-Encoding: "
            "chunked\r\n\r\n{}");
      default: return malformed("\x16\x03\x01\x02\x01 GET / HTTP/1.1\r\n\r\n");
    }
  }

  Ledger& ledger_;
  Dice& dice_;
  const Habits& habits_;
};

}  // namespace nexus::sim
