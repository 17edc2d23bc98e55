// answers.h
// Owns:     hostile responses of a backend as rows: the bytes, the RFC section about them, exactly what the client must
//           see, and if the backend's connection must be reused.
// Promises: no row lets a broken response reach the client as a complete one.
// Leaves:   running the rows, whole and cut at every place, to hostile_answers_test.cpp.
// Threads:  any.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace hostile {

struct AnswerRow {
  enum class End : std::uint8_t { open, fin, reset };  // what the backend does after its bytes

  std::string name;
  std::string section;  // of RFC 9110 or 9112
  std::string bytes;
  int status = 502;     // as the client sees it
  bool whole = true;    // the client gets a complete response
  bool reused = false;  // the connection carries the next request
  End end = End::open;
  bool old_client = false;  // the client speaks HTTP/1.0
};

using AnswerRows = std::vector<AnswerRow>;

inline std::string text_of(std::string_view text) { return std::string(text); }
inline std::string answer_of(std::string_view lines, std::string_view body = "",
                             std::string_view line = "HTTP/1.1 200 OK") {
  return text_of(line) + "\r\n" + text_of(lines) + "\r\n" + text_of(body);
}

// The client gets a 502 and keeps its connection; the backend's connection is closed.
inline AnswerRow broken(std::string name, std::string section, std::string bytes) {
  return {std::move(name), std::move(section), std::move(bytes), 502, true, false, AnswerRow::End::open, false};
}
inline AnswerRow cut_off(std::string name, std::string section, std::string bytes,
                         AnswerRow::End end = AnswerRow::End::open) {
  return {std::move(name), std::move(section), std::move(bytes), 200, false, false, end, false};
}
inline AnswerRow passed(std::string name, std::string section, std::string bytes, int status = 200,
                        bool reused = true) {
  return {std::move(name), std::move(section), std::move(bytes), status, true, reused, AnswerRow::End::open, false};
}

inline void add_status_line_rows(AnswerRows& rows) {
  const std::string rest = "\r\nContent-Length: 2\r\n\r\nhi";
  for (const char* line :
       {"HTTP/1.1 2000 OK", "HTTP/1.1 99 OK",      "HTTP/1.1 099 OK",     "HTTP/1.1 600 OK",  "HTTP/1.1 999 OK",
        "HTTP/1.1 20 OK",   "HTTP/1.1 2x0 OK",     "HTTP/1.1 -20 OK",     "HTTP/1.1 +20 OK",  "HTTP/1.1 200OK",
        "HTTP/1.1  200 OK", " HTTP/1.1 200 OK",    "HTTP/1.1\t200 OK",    "HTTP/1.1 200\tOK", "HTTP/1.1 OK",
        "HTTP/1.1",         "HTTP/1.1 ",           "HTTP/2.0 200 OK",     "HTTP/2 200",       "HTTP/3.0 200 OK",
        "HTTP/1.10 200 OK", "HTTP/0.9 200 OK",     "HTTP/01.1 200 OK",    "http/1.1 200 OK",  "HTTPS/1.1 200 OK",
        "HTTP 200 OK",      "ICY 200 OK",          "RTSP/1.0 200 OK",     "200 OK",           "POST / HTTP/1.1",
        "<html>",           "HTTP/1.1 200 O\x07K", "HTTP/1.1 200 O\x7fK", "HTTP/1.1 200 O\rK"}) {
    rows.push_back(broken("status line: " + text_of(line), "9112 4", line + rest));
  }
  rows.push_back(broken("status line: NUL in the reason", "9112 4", text_of({"HTTP/1.1 200 O\0K", 16}) + rest));
  rows.push_back(broken("status line: LF alone", "9112 2.2", "HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\nhi"));
  rows.push_back(broken("status line: CR alone", "9112 2.2", "HTTP/1.1 200 OK\rContent-Length: 2\r\n\r\nhi"));
  rows.push_back(broken("status line: an empty line before", "9112 2.2", "\r\nHTTP/1.1 200 OK" + rest));
  rows.push_back(broken("status line: LF before", "9112 2.2", "\nHTTP/1.1 200 OK" + rest));
  rows.push_back(broken("status line: a byte order mark before", "9112 4", "\xef\xbb\xbfHTTP/1.1 200 OK" + rest));
  rows.push_back(passed("status line: HTTP/1.2", "9110 2.5", "HTTP/1.2 200 OK" + rest));
  rows.push_back(passed("status line: no reason", "9112 4", "HTTP/1.1 200 " + rest));
  rows.push_back(passed("status line: no blank and no reason", "9112 4", "HTTP/1.1 200" + rest));
  rows.push_back(passed("status line: a reason above ASCII", "9112 4", "HTTP/1.1 200 \xc3\xa4\t!" + rest));
  rows.push_back(passed("status line: an odd code", "9110 15", "HTTP/1.1 299 x" + rest, 299));
  rows.push_back(passed("status line: an error passes", "9110 15", "HTTP/1.1 500 x" + rest, 500));
  rows.push_back(passed("status line: 429 passes", "9110 15", "HTTP/1.1 429 x\r\nRetry-After: 1" + rest, 429));
}

inline void add_answer_line_rows(AnswerRows& rows) {
  struct Line {
    const char* name;
    std::string line;
  };
  const std::vector<Line> lines = {
      {"a fold", "X: y\r\n z\r\n"},
      {"a fold by a tab", "X: y\r\n\tz\r\n"},
      {"a folded length", "Content-Length:\r\n 2\r\n"},
      {"a fold behind the status line", " X: y\r\n"},
      {"a blank before the colon", "Content-Length : 2\r\n"},
      {"a tab before the colon", "Content-Length\t: 2\r\n"},
      {"no name", ": y\r\n"},
      {"no colon", "nocolon\r\n"},
      {"LF between lines", "X: y\nZ: z\r\n"},
      {"CR between lines", "X: y\rZ: z\r\n"},
      {"CR CR LF", "X: y\r\r\n"},
      {"LF in a name", "Te\nst: y\r\n"},
      {"NUL in a name", text_of({"X\0: y\r\n", 7})},
      {"NUL in a value", text_of({"X: y\0z\r\n", 8})},
      {"an escape in a value", "X: \x1b[2J\r\n"},
      {"DEL in a value", "X: \x7f\r\n"},
      {"a bracket in a name", "X[]: y\r\n"},
      {"UTF-8 in a name", "\xc3\xa4: y\r\n"},
      {"another status line", "HTTP/1.1 200 OK\r\n"},
  };
  for (const Line& line : lines) {
    rows.push_back(
        broken("line: " + text_of(line.name), "9112 5", answer_of(line.line + "Content-Length: 2\r\n", "hi")));
  }
  rows.push_back(broken("line: LF ends the head", "9112 2.2", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\nhi"));
  rows.push_back(broken("line: LF everywhere", "9112 2.2", "HTTP/1.1 200 OK\nContent-Length: 2\n\nhi"));
  rows.push_back(broken("line: CR and text end the head", "9112 2.2", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\rX"));
  rows.push_back(broken("line: a head of 70 k", "9110 5.4", answer_of("X: " + std::string(70'000, 'x') + "\r\n")));
  rows.push_back(broken("line: a name of 70 k", "9110 5.4", answer_of(std::string(70'000, 'x') + ": y\r\n")));
  std::string many;
  for (int i = 0; i < 129; ++i) many += "a:b\r\n";
  rows.push_back(broken("line: 129 fields", "9110 5.4", answer_of(many)));
  rows.push_back(broken(
      "line: a head without an end", "9110 5.4", "HTTP/1.1 200 OK\r\n" + [&] {
        std::string endless;
        while (endless.size() < 80'000) endless += "a: b\r\n";
        return endless;
      }()));
}

inline void add_answer_framing_rows(AnswerRows& rows) {
  const std::string te = "Transfer-Encoding: chunked\r\n", two = "Content-Length: 2\r\n", hi = "2\r\nhi\r\n0\r\n\r\n";
  rows.push_back(broken("framing: length and coding", "9112 6.3", answer_of(two + te, hi)));
  rows.push_back(broken("framing: coding and length", "9112 6.3", answer_of(te + two, hi)));
  rows.push_back(broken("framing: two lengths", "9112 6.3", answer_of(two + "Content-Length: 3\r\n", "hi!")));
  rows.push_back(broken("framing: two equal lengths", "9112 6.3", answer_of(two + two, "hi")));
  rows.push_back(
      broken("framing: an empty length and a number", "9112 6.3", answer_of("Content-Length:\r\n" + two, "hi")));
  for (const char* value :
       {"2, 2", "+2", "-2", "0x2", "02", "2_", "2e0", "2.0", "2Z", "1 2", "", "\"2\"", "9223372036854775808",
        "18446744073709551618", "2222222222222222222222222222222222222222"}) {
    rows.push_back(broken("framing: a length of " + text_of(value), "9110 8.6",
                          answer_of("Content-Length: " + text_of(value) + "\r\n", "hi")));
  }
  for (const char* value :
       {"identity", "gzip, chunked", "gzip", "chunked, chunked", "xchunked", "", "chunked, identity", "chunked;q=1",
        "\x0b"
        "chunked",
        "chunked\x0c", "\"chunked\""}) {
    rows.push_back(broken("framing: a coding of " + text_of(value), "9112 6.1",
                          answer_of("Transfer-Encoding: " + text_of(value) + "\r\n", hi)));
  }
  rows.push_back(broken("framing: the coding twice", "9112 6.1", answer_of(te + te, hi)));
  rows.push_back(broken("framing: a coding in HTTP/1.0", "9112 6.1", answer_of(te, hi, "HTTP/1.0 200 OK")));
  rows.push_back(broken("framing: 204 with a length", "9112 6.3", answer_of(two, "hi", "HTTP/1.1 204 No Content")));
  rows.push_back(broken("framing: 204 with a coding", "9112 6.3", answer_of(te, hi, "HTTP/1.1 204 No Content")));
  rows.push_back(broken("framing: 304 with a coding", "9112 6.3", answer_of(te, hi, "HTTP/1.1 304 x")));
  rows.push_back(passed("framing: 204", "9112 6.3", answer_of("", "", "HTTP/1.1 204 No Content"), 204));
  rows.push_back(passed("framing: 204 and bytes behind it", "9112 6.3", answer_of("", "hi", "HTTP/1.1 204 No Content"),
                        204, false));
  rows.push_back(
      passed("framing: 304 with the length that it saves", "9110 15.4.5", answer_of(two, "", "HTTP/1.1 304 x"), 304));
  rows.push_back(passed("framing: 304 with that length, and a body", "9112 6.3", answer_of(two, "hi", "HTTP/1.1 304 x"),
                        304, false));
  rows.push_back(passed("framing: a length", "9112 6.3", answer_of(two, "hi")));
  rows.push_back(passed("framing: a length of 0", "9112 6.3", answer_of("Content-Length: 0\r\n")));
  rows.push_back(passed("framing: chunked", "9112 7.1", answer_of(te, hi)));
  rows.push_back(passed("framing: bytes behind a length's end", "9112 9.2", answer_of(two, "hi!"), 200, false));
  rows.push_back(
      passed("framing: an answer behind the end", "9112 9.2", answer_of(two, "hi" + answer_of(two, "yo")), 200, false));
  rows.push_back(passed("framing: bytes behind the last chunk", "9112 9.2", answer_of(te, hi + "x"), 200, false));
  rows.push_back(
      passed("framing: an empty line behind the last chunk", "9112 9.2", answer_of(te, hi + "\r\n"), 200, false));
  rows.push_back(
      passed("framing: close is said", "9112 9.6", answer_of(two + "Connection: close\r\n", "hi"), 200, false));
  rows.push_back(passed("framing: HTTP/1.0", "9112 9.3", answer_of(two, "hi", "HTTP/1.0 200 OK"), 200, false));
  rows.push_back(passed("framing: HTTP/1.0 that stays", "9112 C.2.2",
                        answer_of(two + "Connection: keep-alive\r\n", "hi", "HTTP/1.0 200 OK")));
  const auto ends = [&](const char* name, const std::string& bytes, AnswerRow::End end, bool old, bool whole) {
    rows.push_back({name, "9112 6.3", bytes, 200, whole, false, end, old});
  };
  ends("framing: until close", answer_of("", "hi"), AnswerRow::End::fin, false, true);
  ends("framing: until close, to an old client", answer_of("", "hi"), AnswerRow::End::fin, true, true);
  ends("framing: until close, and broken off", answer_of("", "hi"), AnswerRow::End::reset, false, false);
  ends("framing: until close, broken off, to an old client", answer_of("", "hi"), AnswerRow::End::reset, true, false);
  ends("framing: until close, and never closed", answer_of("", "hi"), AnswerRow::End::open, false, false);
  ends("framing: a length too large", answer_of("Content-Length: 3\r\n", "hi"), AnswerRow::End::fin, false, false);
  ends("framing: a length too large, to an old client", answer_of("Content-Length: 3\r\n", "hi"), AnswerRow::End::fin,
       true, false);
  ends("framing: a length too large, and broken off", answer_of("Content-Length: 3\r\n", "hi"), AnswerRow::End::reset,
       false, false);
  ends("framing: a length too large, and silence", answer_of("Content-Length: 3\r\n", "hi"), AnswerRow::End::open,
       false, false);
  ends("framing: the largest length", answer_of("Content-Length: 9223372036854775807\r\n", "hi"), AnswerRow::End::fin,
       false, false);
  ends("framing: chunked to an old client", answer_of(te, hi), AnswerRow::End::open, true, true);
  rows.back().reused = true;
  ends("framing: broken chunks to an old client", answer_of(te, "2\r\nhi\r\nz\r\n"), AnswerRow::End::open, true, false);
}

inline void add_answer_chunk_rows(AnswerRows& rows) {
  const std::string te = "Transfer-Encoding: chunked\r\n", end = "0\r\n\r\n", good = "2\r\nhi\r\n";
  const auto row = [&](const std::string& name, const std::string& body) {
    rows.push_back(cut_off("chunk: " + name, "9112 7.1", answer_of(te, good + body)));
  };
  for (const char* size : {"0x2", "+2", "-2", " 2", "2 ", "2\t", "0_2", "2.0", "g", "", "ffffffffffffffff",
                           "8000000000000000", "00000000000000002", "2;", "2;=a", "2;a=\"b", ";a", "2\x0b", "2\x80"}) {
    row("a size line of " + text_of(size), size + ("\r\nhi\r\n" + end));
  }
  row("LF behind the size", "2\nhi\r\n" + end);
  row("CR CR behind the size", "2\r\r\nhi\r\n" + end);
  row("LF in an extension", "2;\nhi\r\n" + end);
  row("LF behind the data", "2\r\nhi\n" + end);
  row("nothing behind the data", "2\r\nhi" + end);
  row("text and LF behind the data", "2\r\nhix\n" + end);
  row("LF LF behind the data", "2\r\nhi\n\n" + end);
  row("text behind the data", "2\r\nhixx" + end);
  row("CR and text behind the data", "2\r\nhi\rx" + end);
  row("LF LF at the end", "0\n\n");
  row("LF at the end", "0\r\n\n");
  row("a folded trailer", "0\r\nX: y\r\n z\r\n\r\n");
  row("a trailer without a colon", "0\r\nXy\r\n\r\n");
  row("NUL in a trailer", text_of({"0\r\nX: \0\r\n\r\n", 11}));
  row("trailers over their limit", "0\r\nX: " + std::string(9000, 'x') + "\r\n\r\n");
  row("a line over its limit", "2;" + std::string(300, 'x') + "\r\nhi\r\n" + end);
  const std::string events = "Content-Type: text/event-stream\r\n" + te;
  rows.push_back(
      cut_off("chunk: broken in an event stream", "9112 7.1", answer_of(events, "9\r\ndata: x\n\n\r\nz\r\n")));
  rows.push_back(cut_off("chunk: an event stream that ends early", "9112 8", answer_of(events, "9\r\ndata: x\n\n\r\n"),
                         AnswerRow::End::fin));
  rows.push_back(cut_off("chunk: an event stream that stalls", "9112 8", answer_of(events, "9\r\ndata: x\n\n\r\n")));
  rows.push_back(passed("chunk: trailers that look like framing", "9112 7.1.2",
                        answer_of(te, good + "0\r\nContent-Length: 9\r\nX-Nexus-Backend: evil\r\n\r\n")));
  rows.push_back(passed("chunk: an extension with blanks", "9112 7.1.1", answer_of(te, "2 ; a = b\r\nhi\r\n" + end)));
  rows.push_back(passed("chunk: an extension", "9112 7.1.1", answer_of(te, "2;a=\"b\"\r\nhi\r\n" + end)));
}

inline void add_interim_rows(AnswerRows& rows) {
  const std::string good = answer_of("Content-Length: 2\r\n", "hi"), proceed = "HTTP/1.1 100 Continue\r\n\r\n";
  std::string sixteen;
  for (int i = 0; i < 16; ++i) sixteen += proceed;
  rows.push_back(passed("interim: 100", "9110 15.2", proceed + good));
  rows.push_back(
      passed("interim: 103 with fields", "9110 15.2", "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + good));
  rows.push_back(passed("interim: sixteen", "9110 15.2", sixteen + good));
  rows.push_back(broken("interim: seventeen", "9110 15.2", sixteen + proceed + good));
  rows.push_back(broken("interim: 101", "9110 15.2.2",
                        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n" + good));
  rows.push_back(
      broken("interim: with a length", "9112 6.3", "HTTP/1.1 100 Continue\r\nContent-Length: 2\r\n\r\nhi" + good));
  rows.push_back(broken("interim: with a coding", "9112 6.3",
                        "HTTP/1.1 103 x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + good));
  rows.push_back(broken("interim: then no HTTP", "9110 15.2", proceed + "hello\r\n\r\n"));
  rows.push_back({"interim: then the end", "9110 15.2", proceed, 502, true, false, AnswerRow::End::fin, false});
  rows.push_back({"interim: then silence", "9110 15.2", proceed, 504, true, false, AnswerRow::End::open, false});
  rows.push_back({"no answer: the end", "9112 8", "", 502, true, false, AnswerRow::End::fin, false});
  rows.push_back({"no answer: a reset", "9112 8", "", 502, true, false, AnswerRow::End::reset, false});
  rows.push_back({"no answer: silence", "9110 15.6.5", "", 504, true, false, AnswerRow::End::open, false});
  rows.push_back(passed("200 with Upgrade", "9110 7.8",
                        answer_of("Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 2\r\n", "hi")));
  rows.push_back(passed("Connection names a field", "9110 7.6.1",
                        answer_of("Connection: X-Drop\r\nX-Drop: 1\r\nContent-Length: 2\r\n", "hi")));
  rows.push_back(passed(
      "forged fields", "9110 5.1",
      answer_of("X-Nexus-Backend: evil\r\nX_Request_Id: evil\r\nX-Request-Id: evil\r\n"
                "Content_Length: 9\r\nTransfer_Encoding: chunked\r\nProxy-Authenticate: x\r\nContent-Length: 2\r\n",
                "hi")));
}

}  // namespace hostile
