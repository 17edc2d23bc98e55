// requests.h
// Owns:     hostile requests as rows: the bytes, the RFC section about them, and exactly what Nexus must do.
// Promises: each row's result depends on its bytes alone. Rows that wait for a timeout have the status 408.
// Leaves:   running the rows, whole and cut at every place, to hostile_requests_test.cpp.
// Threads:  any.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace hostile {

struct RequestRow {
  std::string name;
  std::string section;      // of RFC 9110 or 9112, or 8259 for JSON
  std::string bytes;        // all that the client sends
  std::string statuses;     // of the final responses, in order
  bool kept = false;        // the connection stays open after them
  std::size_t reached = 0;  // requests that reached the backend
  bool keys = false;        // API keys are configured
};

using RequestRows = std::vector<RequestRow>;

inline const std::string kBody = R"({"model":"m"})";  // 13 bytes
inline const std::string kNext =
    "GET /v1/models HTTP/1.1\r\nHost: next\r\n\r\n";  // must never be read out of another request's body

inline std::string bytes_of(std::string_view text) { return std::string(text); }
// A request to the proxied endpoint, with these lines after its Host.
inline std::string post(std::string_view lines, std::string_view body = "") {
  return "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n" + bytes_of(lines) + "\r\n" + bytes_of(body);
}
inline std::string get(std::string_view lines, std::string_view target = "/v1/models") {
  return "GET " + bytes_of(target) + " HTTP/1.1\r\nHost: a\r\n" + bytes_of(lines) + "\r\n";
}
inline std::string good_post(std::string_view lines = "") {
  return post("Content-Length: 13\r\n" + bytes_of(lines), kBody);
}
inline std::string chunk(std::string_view text) {
  const char hex[] = {"0123456789abcdef"[text.size() / 16 % 16], "0123456789abcdef"[text.size() % 16], 0};
  return std::string(hex) + "\r\n" + bytes_of(text) + "\r\n";
}
inline std::string chunked_post(std::string_view body, std::string_view lines = "") {
  return post("Transfer-Encoding: chunked\r\n" + bytes_of(lines), body);
}
inline std::string json_post(std::string_view json) {
  return post("Content-Length: " + std::to_string(json.size()) + "\r\n", json);
}

// The client gets a 400 and the connection is closed; nothing is forwarded and nothing more is read as a request.
inline RequestRow bad(std::string name, std::string section, std::string bytes) {
  return {std::move(name), std::move(section), std::move(bytes) + kNext, "400", false, 0, false};
}

inline void add_framing_rows(RequestRows& rows) {
  const std::string te = "Transfer-Encoding: chunked\r\n", cl = "Content-Length: 13\r\n",
                    both = chunk(kBody) + "0\r\n\r\n";
  rows.push_back(bad("length, then coding", "9112 6.1", post(cl + te, both)));
  rows.push_back(bad("coding, then length", "9112 6.1", post(te + cl, both)));
  rows.push_back(bad("a length of 0 and a coding", "9112 6.1", post("Content-Length: 0\r\n" + te, both)));
  rows.push_back(bad("a length twice and a coding", "9112 6.1", post(cl + cl + te, both)));
  rows.push_back(
      bad("coding in HTTP/1.0", "9112 6.1", "POST /v1/chat/completions HTTP/1.0\r\nHost: a\r\n" + te + "\r\n" + both));
  rows.push_back(bad("coding in HTTP/1.0 that stays", "9112 6.1",
                     "POST /v1/chat/completions HTTP/1.0\r\nConnection: keep-alive\r\n" + te + "\r\n" + both));
  rows.push_back(bad("two lengths", "9112 6.3", post("Content-Length: 5\r\nContent-Length: 6\r\n", "hello!")));
  rows.push_back(bad("two equal lengths", "9112 6.3", post(cl + cl, kBody)));
  rows.push_back(bad("an empty length, then a number", "9112 6.3", post("Content-Length:\r\n" + cl, kBody)));
  rows.push_back(bad("a number, then an empty length", "9112 6.3", post(cl + "Content-Length:\r\n", kBody)));
  rows.push_back(bad("two lengths of 0", "9112 6.3", post("Content-Length: 0\r\nContent-Length: 0\r\n")));
  rows.push_back(
      bad("lengths in different cases", "9112 6.3", post("content-length: 13\r\nCONTENT-LENGTH: 13\r\n", kBody)));
  for (const char* value : {"5, 5",
                            "5, 0",
                            "13,",
                            ",13",
                            "+13",
                            "-13",
                            "-0",
                            "0x0d",
                            "013",
                            "00",
                            "1_3",
                            "13e0",
                            "1.3e1",
                            "13.0",
                            "13Z",
                            "1 3",
                            "",
                            "\"13\"",
                            "13;q=1",
                            "9223372036854775808",
                            "18446744073709551616",
                            "18446744073709551629",
                            "4294967309x",
                            "1313131313131313131313131313131313131313",
                            "\xd9\xa1\xd9\xa3",
                            "infinity",
                            "13\xa0",
                            "\xa0"
                            "13",
                            "0b1101"}) {
    rows.push_back(
        bad("a length of " + bytes_of(value), "9110 8.6", post("Content-Length: " + bytes_of(value) + "\r\n", kBody)));
  }
  for (const char* value : {"chunked, chunked",
                            "identity",
                            "chunked, identity",
                            "identity, chunked",
                            "xchunked",
                            "chunk",
                            "chunkedd",
                            "\"chunked\"",
                            ",chunked",
                            "chunked,",
                            "",
                            ",",
                            "chunked;q=1",
                            "chun ked",
                            "chunked gzip",
                            "chunked, gzip",
                            "gzip, chunked, chunked",
                            "br",
                            "x-custom, chunked",
                            "chunked\\",
                            "Chunked; ",
                            "c",
                            "(comment) chunked"}) {
    rows.push_back(bad("a coding of " + bytes_of(value), "9112 6.1",
                       post("Transfer-Encoding: " + bytes_of(value) + "\r\n", both)));
  }
  rows.push_back(bad("the coding twice", "9112 6.1", post(te + te, both)));
  rows.push_back(
      bad("identity, then chunked on another line", "9112 6.1", post("Transfer-Encoding: identity\r\n" + te, both)));
  rows.push_back(
      bad("chunked, then identity on another line", "9112 6.1", post(te + "Transfer-Encoding: identity\r\n", both)));
  rows.push_back(bad("an empty coding, then chunked", "9112 6.1", post("Transfer-Encoding:\r\n" + te, both)));
  for (const char* value : {"gzip, chunked", "gzip", "deflate, chunked", "compress, chunked", "GZIP , Chunked"}) {
    RequestRow row = bad("an unknown coding, " + bytes_of(value), "9112 6.1",
                         post("Transfer-Encoding: " + bytes_of(value) + "\r\n", both));
    row.statuses = "501";
    rows.push_back(row);
  }
  for (const char odd : {'\x09', '\x0b', '\x0c', '\x0d', '\x7f', '\xa0', '\x00', '\x0a', '\x1f', '\x85'}) {
    for (const std::size_t at : {0u, 4u, 7u}) {
      if (odd == '\t' && at != 4) continue;  // blanks around a value are legal
      std::string value = "chunked";
      value.insert(at, 1, odd);
      rows.push_back(bad("byte " + std::to_string(static_cast<unsigned char>(odd)) + " at place " + std::to_string(at) +
                             " of the coding",
                         "9110 5.5", post("Transfer-Encoding: " + value + "\r\n", both)));
    }
  }
  rows.push_back({"blanks around the coding", "9110 5.5", post("Transfer-Encoding:\t chunked \t\r\n", both), "200",
                  true, 1, false});
  rows.push_back(
      {"the coding in capitals", "9112 7", post("TRANSFER-ENCODING: CHUNKED\r\n", both), "200", true, 1, false});
}

inline void add_line_rows(RequestRows& rows) {
  const std::string body = "hello\r\n0\r\n\r\n";
  struct Line {
    const char* name;
    const char* section;
    std::string line;
  };
  const std::vector<Line> lines = {
      {"a folded coding", "9112 5.2", "Transfer-Encoding:\r\n chunked\r\n"},
      {"a folded length", "9112 5.2", "Content-Length:\r\n 7\r\n"},
      {"a length continued", "9112 5.2", "Content-Length: 1\r\n 3\r\n"},
      {"a coding continued", "9112 5.2", "Transfer-Encoding: chunked\r\n , gzip\r\n"},
      {"a fold by a tab", "9112 5.2", "X: y\r\n\tz\r\n"},
      {"a fold of nothing", "9112 5.2", "X: y\r\n \r\n"},
      {"a blank before the colon", "9112 5.1", "Content-Length : 13\r\n"},
      {"a tab before the colon", "9112 5.1", "Content-Length\t: 13\r\n"},
      {"a blank before the coding's colon", "9112 5.1", "Transfer-Encoding : chunked\r\n"},
      {"a blank before any colon", "9112 5.1", "X : y\r\n"},
      {"a vertical tab before the colon", "9112 5.1", "Transfer-Encoding\x0b: chunked\r\n"},
      {"a blank before the name", "9112 5.2", " Content-Length: 13\r\n"},
      {"a tab before the name", "9112 5.2", "\tTransfer-Encoding: chunked\r\n"},
      {"no name", "9112 5", ": x\r\n"},
      {"no name and no value", "9112 5", ":\r\n"},
      {"no colon", "9112 5", "Transfer-Encoding chunked\r\n"},
      {"a name alone", "9112 5", "Transfer-Encoding\r\n"},
      {"LF in a name", "9112 2.2", "Te\nst: x\r\n"},
      {"CR in a name", "9112 2.2", "Te\rst: x\r\n"},
      {"LF in a value", "9112 2.2", "X: a\nContent-Length: 13\r\n"},
      {"CR in a value", "9112 2.2", "X: a\rContent-Length: 13\r\n"},
      {"CR CR LF", "9112 2.2", "X: a\r\r\n"},
      {"LF CR", "9112 2.2", "X: a\n\rContent-Length: 13\r\n"},
      {"NUL in a name", "9110 5.1", bytes_of({"X\0Y: z\r\n", 8})},
      {"NUL in a value", "9110 5.5", bytes_of({"X: y\0z\r\n", 8})},
      {"NUL before a value", "9110 5.5", bytes_of({"Content-Length:\0 13\r\n", 21})},
      {"NUL behind a line", "9110 5.5", bytes_of({"X: y\0\r\n", 7})},
      {"an escape in a value", "9110 5.5", "X: \x1b[2J\r\n"},
      {"a backspace in a value", "9110 5.5", "X: a\x08\r\n"},
      {"DEL in a value", "9110 5.5", "X: a\x7f\r\n"},
      {"parentheses in a name", "9110 5.6.2", "X(y): z\r\n"},
      {"a bracket in a name", "9110 5.6.2", "Content-Length[]: 13\r\n"},
      {"a quoted name", "9110 5.6.2", "\"Content-Length\": 13\r\n"},
      {"an at in a name", "9110 5.6.2", "@: z\r\n"},
      {"a slash in a name", "9110 5.6.2", "X/Y: z\r\n"},
      {"UTF-8 in a name", "9110 5.1", "X\xc3\xa4: y\r\n"},
      {"a byte above ASCII before a name", "9110 5.1",
       "\xa0"
       "Content-Length: 13\r\n"},
      {"a status line among the fields", "9112 5", "HTTP/1.1 200 OK\r\n"},
      {"a request line among the fields", "9112 5", "GET / HTTP/1.1\r\n"},
  };
  for (const Line& line : lines) rows.push_back(bad(line.name, line.section, post(line.line, body)));
  const std::string start = "POST /v1/chat/completions HTTP/1.1";
  const std::vector<Line> heads = {
      {"LF behind the request line", "9112 2.2", start + "\nHost: a\r\n\r\n"},
      {"LF everywhere", "9112 2.2", start + "\nHost: a\n\n"},
      {"LF at the head's end", "9112 2.2", start + "\r\nHost: a\r\n\n"},
      {"LF before the head's end", "9112 2.2", start + "\r\nHost: a\n\r\n"},
      {"CR alone behind the request line", "9112 2.2", start + "\rHost: a\r\n\r\n"},
      {"CR alone between fields", "9112 2.2", start + "\r\nHost: a\rX: y\r\n\r\n"},
      {"CR and text at the head's end", "9112 2.2", start + "\r\nHost: a\r\n\rX"},
      {"CR CR at the head's end", "9112 2.2", start + "\r\nHost: a\r\n\r\r\n"},
      {"a fold behind the request line", "9112 2.2", start + "\r\n Host: a\r\n\r\n"},
      {"a blank line of blanks before the fields", "9112 2.2", start + "\r\n \r\nHost: a\r\n\r\n"},
      {"two empty lines before the request", "9112 2.2", "\r\n\r\n" + good_post()},
      {"LF before the request", "9112 2.2", "\n" + good_post()},
      {"CR before the request", "9112 2.2", "\r" + good_post()},
      {"a blank before the request", "9112 3", " " + good_post()},
      {"NUL before the request", "9112 3", bytes_of({"\0", 1}) + good_post()},
      {"a byte order mark before the request", "9112 3", "\xef\xbb\xbf" + good_post()},
  };
  for (const Line& head : heads) rows.push_back(bad(head.name, head.section, head.line));
  rows.push_back({"an empty line before the request", "9112 2.2", "\r\n" + good_post(), "200", true, 1, false});
  rows.push_back(
      {"an empty line between requests", "9112 2.2", good_post() + "\r\n" + good_post(), "200 200", true, 2, false});
  rows.push_back({"a name of 64 k", "9110 5.4", post(std::string(65536, 'a') + ": 1\r\nContent-Length: 13\r\n", kBody),
                  "431", false, 0, false});
  rows.push_back({"a name of 256 and a length", "9110 5.4",
                  post(std::string(256, 'a') + "Content-Length: 7\r\nContent-Length: 13\r\n", kBody), "200", true, 1,
                  false});
  rows.push_back(
      {"a value of 16 k", "9110 5.4", post("X: " + std::string(16384, 'v') + "\r\n"), "431", false, 0, false});
  std::string many;
  for (int i = 0; i < 128; ++i) many += "a:b\r\n";
  rows.push_back({"129 fields", "9110 5.4", post(many), "431", false, 0, false});
  rows.push_back({"an endless request line", "9112 3", "GET /" + std::string(20000, 'x'), "414", false, 0, false});
  rows.push_back(
      {"a request line of 20 k", "9110 15.5.15", get("", "/" + std::string(20000, 'x')), "414", false, 0, false});
  rows.push_back({"empty lines for ever", "9112 2.2", std::string(20000, '\n'), "400", false, 0, false});
  rows.push_back(
      {"a head that stops", "9110 15.5.9", "GET /v1/models HTTP/1.1\r\nHost: a\r\n", "408", false, 0, false});
  rows.push_back({"a request line that stops", "9110 15.5.9", "GE", "408", false, 0, false});
}

inline void add_start_line_rows(RequestRows& rows) {
  const auto line = [&](const char* name, const char* section, const std::string& text) {
    rows.push_back(bad(name, section, text + "\r\nHost: a\r\n\r\n"));
  };
  const std::string ok = " HTTP/1.1";
  line("two blanks before the target", "9112 3", "GET  /v1/models" + ok);
  line("two blanks behind the target", "9112 3", "GET /v1/models " + ok);
  line("a tab before the target", "9112 3", "GET\t/v1/models" + ok);
  line("a tab behind the target", "9112 3", "GET /v1/models\tHTTP/1.1");
  line("a vertical tab in the line", "9112 3", "GET\x0b/v1/models" + ok);
  line("a blank behind the version", "9112 3", "GET /v1/models HTTP/1.1 ");
  line("no version", "9112 3", "GET /v1/models");
  line("a version in small letters", "9112 2.3", "GET /v1/models http/1.1");
  line("HTTP/1.10", "9112 2.3", "GET /v1/models HTTP/1.10");
  line("HTTP/01.1", "9112 2.3", "GET /v1/models HTTP/01.1");
  line("HTTP/1,1", "9112 2.3", "GET /v1/models HTTP/1,1");
  line("HTTP/1", "9112 2.3", "GET /v1/models HTTP/1");
  line("another protocol", "9112 2.3", "GET /v1/models RTSP/1.0");
  line("ICE", "9112 2.3", "SOURCE /v1/models ICE/1.0");
  line("no method", "9112 3", "/v1/models" + ok);
  line("a method with a colon", "9110 9.1", "GET: /v1/models" + ok);
  line("a method with NUL", "9110 9.1", bytes_of({"GE\0T /v1/models HTTP/1.1", 24}));
  line("CONNECT to a path", "9110 9.3.6", "CONNECT /v1/models" + ok);
  line("the authority form", "9112 3.2.3", "GET a:80" + ok);
  const auto well_formed = [&](const char* name, const char* section, const std::string& text, const char* statuses,
                               bool kept = true, std::size_t reached = 0) {
    rows.push_back({name, section, text + "\r\nHost: a\r\n\r\n", statuses, kept, reached, false});
  };
  well_formed("HTTP/2.0", "9110 15.6.6", "GET /v1/models HTTP/2.0", "505", false);
  well_formed("HTTP/0.9", "9110 15.6.6", "GET /v1/models HTTP/0.9", "505", false);
  well_formed("the preface of HTTP/2", "9113 3.4", "PRI * HTTP/2.0\r\n\r\nSM\r\n", "505", false);
  well_formed("HTTP/1.2", "9110 2.5", "GET /v1/models HTTP/1.2", "200");
  well_formed("HTTP/1.9", "9110 2.5", "GET /v1/models HTTP/1.9", "200");
  well_formed("a method in small letters", "9110 9.1", "get /v1/models" + ok, "501");
  well_formed("an unknown method", "9110 15.6.2", "BREW /v1/models" + ok, "501");
  well_formed("QUERY", "9110 15.6.2", "QUERY /v1/chat/completions" + ok, "501");
  well_formed("a method longer than any", "9110 15.6.2", std::string(200, 'M') + " /v1/models" + ok, "501");
  well_formed("CONNECT", "9110 15.5.6", "CONNECT backend:8001" + ok, "405");
  well_formed("the absolute form", "9112 3.2.2", "GET http://a/v1/models" + ok, "200");
  well_formed("the absolute form of https", "9112 3.2.2", "GET HTTPS://a:443/v1/models?x" + ok, "200");
  well_formed("the absolute form of another host", "9112 3.2.2", "GET http://b/v1/models" + ok, "200");
  well_formed("the absolute form without a path", "9112 3.2.2", "DELETE http://b" + ok, "405");
  well_formed("the absolute form without a path, but a query", "9112 3.2.2", "DELETE http://b?x" + ok, "405");
  well_formed("the asterisk form", "9112 3.2.4", "OPTIONS *" + ok, "204");
  well_formed("OPTIONS of an endpoint", "9110 9.3.7", "OPTIONS /v1/chat/completions" + ok, "204");
  well_formed("OPTIONS of nothing", "9110 9.3.7", "OPTIONS /v1" + ok, "404");
  rows.push_back({"the absolute form of an endpoint", "9112 3.2.2",
                  "POST http://a/v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 13\r\n\r\n" + kBody, "200",
                  true, 1, false});
  line("the absolute form of ftp", "9112 3.2.2", "GET ftp://a/v1/models" + ok);
  line("the absolute form without a host", "9112 3.2.2", "GET http:///v1/models" + ok);
  line("the absolute form with a user", "9110 4.2.4", "GET http://u@a/v1/models" + ok);
  line("the absolute form with a fragment", "9112 3.2.2", "GET http://a?x#y" + ok);
  line("an asterisk for GET", "9112 3.2.4", "GET *" + ok);
  line("a fragment", "9110 4.2.5", "GET /v1/models#x" + ok);
  line("a backslash", "9110 4.1", "GET /v1\\models" + ok);
  line("an escaped NUL", "9110 4.1", "GET /v1/models%00" + ok);
  line("an escaped line end", "9110 4.1", "GET /v1/models%0d%0aX:y" + ok);
  line("an escaped line end in capitals", "9110 4.1", "GET /v1/models%0D%0AX:y" + ok);
  line("an escaped DEL", "9110 4.1", "GET /v1/models%7f" + ok);
  line("a broken escape", "9110 4.1", "GET /v1/models%4" + ok);
  line("an escape that is no number", "9110 4.1", "GET /v1/models%zz" + ok);
  line("UTF-8 in the target", "9112 3.2", "GET /v1/models/\xc3\xa4" + ok);
  line("overlong UTF-8 in the target", "9112 3.2", "GET /\xc0\xaf" + ok);
  line("a quote in the target", "9112 3.2", "GET /\"" + ok);
  line("a bracket in the target", "9112 3.2", "GET /<script>" + ok);
  line("a brace in the target", "9112 3.2", "GET /{x}" + ok);
  line("NUL in the target", "9112 3.2", bytes_of({"GET /v1/\0models HTTP/1.1", 24}));
  line("DEL in the target", "9112 3.2", "GET /v1/models\x7f" + ok);
  rows.push_back(bad("HTTP/0.9, a line alone", "9112 2.3", "GET /v1/models\r\n"));
  rows.push_back(bad("TLS", "9112 2.3", bytes_of({"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11})));
  rows.push_back({"dots in the path", "9110 4.1", get("", "/v1/../v1/models"), "404", true, 0, false});
  rows.push_back({"an escaped slash in the path", "9110 4.1", get("", "/v1%2fmodels"), "404", true, 0, false});
  rows.push_back({"two slashes in the path", "9110 4.1", get("", "//v1/models"), "404", true, 0, false});
  rows.push_back({"an endpoint in capitals", "9110 4.2.3", "POST /V1/CHAT/COMPLETIONS HTTP/1.1\r\nHost: a\r\n\r\n",
                  "404", true, 0, false});
  rows.push_back({"TRACE", "9110 9.3.8", "TRACE /v1/models HTTP/1.1\r\nHost: a\r\n\r\n", "405", true, 0, false});
  rows.push_back(
      {"DELETE of a model", "9110 9.3.5", "DELETE /v1/models/m HTTP/1.1\r\nHost: a\r\n\r\n", "405", true, 0, false});
}

inline void add_host_rows(RequestRows& rows) {
  const std::string line = "GET /v1/models HTTP/1.1\r\n";
  const auto host = [&](const char* name, const std::string& fields) {
    rows.push_back(bad(bytes_of("Host: ") + name, "9112 3.2", line + fields + "\r\n"));
  };
  host("no Host", "");
  host("no Host but an underscore twin", "Ho_st: a\r\n");
  host("two Hosts", "Host: a\r\nHost: b\r\n");
  host("two equal Hosts", "Host: a\r\nHost: a\r\n");
  host("two Hosts in different cases", "Host: a\r\nhOST: b\r\n");
  host("a list", "Host: a, b\r\n");
  host("a user", "Host: user@a\r\n");
  host("a path", "Host: a/v1\r\n");
  host("a scheme", "Host: http://a\r\n");
  host("an empty Host", "Host:\r\n");
  host("a Host of blanks", "Host: \t \r\n");
  host("a blank within", "Host: a b\r\n");
  host("a port that is no number", "Host: a:b\r\n");
  host("a port of six digits", "Host: a:123456\r\n");
  host("two ports", "Host: a:1:2\r\n");
  host("a port alone", "Host: :80\r\n");
  host("an open bracket", "Host: [::1\r\n");
  host("text behind a bracket", "Host: [::1]x\r\n");
  host("an empty bracket", "Host: []\r\n");
  host("a quote", "Host: a\"\r\n");
  host("an escape", "Host: a%41\r\n");
  host("UTF-8", "Host: \xc3\xa4\r\n");
  host("a fragment", "Host: a#b\r\n");
  host("a query", "Host: a?b\r\n");
  host("a backslash", "Host: a\\b\r\n");
  host("HTTP/1.1 with a folded Host", "Host:\r\n a\r\n");
  rows.push_back({"HTTP/1.0 without a Host", "9112 3.2", "GET /v1/models HTTP/1.0\r\n\r\n", "200", false, 0, false});
  rows.push_back(bad("HTTP/1.0 with two Hosts", "9112 3.2", "GET /v1/models HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n"));
  rows.push_back({"HTTP/1.0 that stays", "9112 C.2.2", "GET /v1/models HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
                  "200", true, 0, false});
}

}  // namespace hostile
