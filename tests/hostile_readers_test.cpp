#include <doctest/doctest.h>

#include <simdjson.h>

#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz.h"
#include "tests/lib/plain_json.h"
#include "tests/lib/response_reader.h"

// Tests of the readers that the hostile rows, the fuzz targets and the simulator rely on.

using Framing = rfc9112::Message::Framing;

TEST_CASE("rfc9112: the RFC's own example of a request and its response is read") {
  const auto asked = rfc9112::read_requests(
      "GET /hello.txt HTTP/1.1\r\nUser-Agent: curl/7.64.1\r\nHost: www.example.com\r\nAccept-Language: en, mi\r\n\r\n");
  REQUIRE(asked.whole());
  REQUIRE(asked.messages.size() == 1);
  CHECK(asked.messages[0].method == "GET");
  CHECK(asked.messages[0].target == "/hello.txt");
  CHECK(asked.messages[0].value("accept-language") == "en, mi");
  const auto told = rfc9112::read_responses(
      "HTTP/1.1 200 OK\r\nDate: Mon, 27 Jul 2009 12:28:53 GMT\r\nContent-Length: 51\r\nVary: Accept-Encoding\r\n"
      "Content-Type: text/plain\r\n\r\nHello World! My content includes a trailing CRLF.\r\n",
      {"GET"}, false);
  REQUIRE(told.whole());
  CHECK(told.messages[0].status == 200);
  CHECK(told.messages[0].body.size() == 51);
}

TEST_CASE("rfc9112: a message ends where its framing says, and malformed messages are refused") {
  struct Row {
    const char* name;
    std::string text;
    std::vector<std::string> bodies;
    bool whole;
  };
  const std::string head = "POST / HTTP/1.1\r\nHost: a\r\n", te = "Transfer-Encoding: chunked\r\n\r\n";
  const Row rows[] = {
      {"no body", head + "\r\n", {""}, true},
      {"a length", head + "Content-Length: 2\r\n\r\nhi", {"hi"}, true},
      {"chunks with all that they may have",
       head + te + "2 ; a = \"x;\\\"\"\r\nhi\r\n1\r\n!\r\n00\r\nX: y\r\n\r\n",
       {"hi!"},
       true},
      {"two", head + "Content-Length: 2\r\n\r\nhi" + head + "\r\n", {"hi", ""}, true},
      {"a body that is not whole", head + "Content-Length: 3\r\n\r\nhi", {}, false},
      {"a chunk that is not whole", head + te + "3\r\nhi", {}, false},
      {"half a head", head, {}, false},
      {"both framings", head + "Content-Length: 2\r\n" + te + "0\r\n\r\n", {}, false},
      {"a blank before the colon", head + "Content-Length : 2\r\n\r\nhi", {}, false},
      {"a bare LF", "POST / HTTP/1.1\nHost: a\r\n\r\n", {}, false},
      {"a fold", head + "X: y\r\n z\r\n\r\n", {}, false},
      {"two Hosts", head + "Host: a\r\n\r\n", {}, false},
      {"a size with a sign", head + te + "+2\r\nhi\r\n0\r\n\r\n", {}, false},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    const auto reading = rfc9112::read_requests(row.text);
    CHECK(reading.whole() == row.whole);
    REQUIRE(reading.messages.size() == row.bodies.size());
    for (std::size_t i = 0; i < row.bodies.size(); ++i) CHECK(reading.messages[i].body == row.bodies[i]);
  }
}

TEST_CASE("rfc9112: some responses have no body, and some end with their connection") {
  const std::string ok = "HTTP/1.1 200 OK\r\n";
  CHECK(rfc9112::read_responses(ok + "Content-Length: 5\r\n\r\n", {"HEAD"}, false).whole());
  CHECK(rfc9112::read_responses("HTTP/1.1 204 x\r\n\r\n", {"GET"}, false).whole());
  CHECK(rfc9112::read_responses("HTTP/1.1 100 x\r\n\r\n" + ok + "Content-Length: 0\r\n\r\n", {"GET"}, false)
            .messages.size() == 2);
  CHECK_FALSE(rfc9112::read_responses(ok + "\r\nhi", {"GET"}, false).whole());
  CHECK(rfc9112::read_responses(ok + "\r\nhi", {"GET"}, true).whole());
  CHECK_FALSE(rfc9112::read_responses(ok + "Content-Length: 0\r\n\r\n" + ok, {"GET"}, false).whole());
}

// The responses of a connection, each read from pieces that end at `ends` of its text.
std::vector<rfc9112::ResponseReader> read_pieces(const std::string& text, const fuzz::Ends& ends) {
  std::vector<rfc9112::ResponseReader> readers(1);
  for (std::string piece : fuzz::pieces_of(text, ends)) {
    while (!piece.empty() && readers.back().problem.empty()) {
      piece.erase(0, readers.back().feed(piece));
      if (readers.back().done()) readers.emplace_back();
    }
  }
  return readers;
}

TEST_CASE("a response that arrives in pieces is read as the complete text is, at every cut") {
  const std::string ok = "HTTP/1.1 200 OK\r\n", te = "Transfer-Encoding: chunked\r\n\r\n";
  const std::string texts[] = {
      ok + "Content-Length: 5\r\n\r\nhello" + ok + "Content-Length: 0\r\n\r\n",
      "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 x\r\n\r\n" + ok + te +
          "5\r\nhello\r\na;x=y\r\n0123456789\r\n0\r\nX: y\r\n\r\n",
      ok + te + "5\r\nhel",
      ok + te + "5\r\nhello!\r\n",
      ok + "X : y\r\n\r\n",
      ok + "\r\nuntil the end",
  };
  for (const std::string& text : texts) {
    CAPTURE(text);
    const auto whole = rfc9112::read_responses(text, {3, "GET"}, false);
    for (std::size_t place = 0; place < text.size(); ++place) {
      const auto pieces =
          read_pieces(text, place == 0 ? fuzz::byte_by_byte(text.size()) : fuzz::Ends{place, text.size()});
      REQUIRE(pieces.size() == whole.messages.size() + 1);
      for (std::size_t i = 0; i < whole.messages.size(); ++i) CHECK(pieces[i].message.body == whole.messages[i].body);
      CHECK(pieces.back().message.body == whole.open.body);
      CHECK(pieces.back().problem == whole.problem);
      CHECK_FALSE(pieces.back().done());
    }
  }
  CHECK(read_pieces(texts[5], {texts[5].size()}).back().end());
  CHECK_FALSE(read_pieces(texts[2], {texts[2].size()}).back().end());
}

TEST_CASE("the check of Nexus's own style refuses what the RFC allows and Nexus never writes") {
  const auto style_of = [](const std::string& text) {
    rfc9112::ResponseReader reader;
    reader.feed(text);
    REQUIRE(reader.head_done());
    return reader.check_nexus_style();
  };
  const std::string ok = "HTTP/1.1 200 OK\r\n", te = "Transfer-Encoding: chunked\r\n\r\n";
  CHECK(style_of(ok + "X: y\r\nConnection: close\r\n" + te + "5\r\nhello\r\n0\r\n\r\n") == "");
  const std::string odd[] = {
      "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
      "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n",
      "HTTP/1.1 204 x\r\nContent-Length: 0\r\n\r\n",
      ok + "X:y\r\n" + te,
      ok + "X: y \r\n" + te,
      ok + "X: y\tz\r\n" + te,
      ok + "Transfer-Encoding: Chunked\r\n\r\n",
      ok + "Connection: close\r\nConnection: close\r\n" + te,
      ok + te + "A\r\n0123456789\r\n",
      ok + te + "5;x=y\r\nhello\r\n",
      ok + te + "000000005\r\nhello\r\n",
      ok + te + "0\r\nX: y\r\n\r\n",
  };
  for (const std::string& text : odd) {
    CAPTURE(text);
    CHECK(style_of(text) != "");
  }
}

TEST_CASE("plain_json and simdjson agree on which texts are JSON") {
  std::mt19937 random(3);
  const std::string seed = R"({"a":[1,-2.5e3,null,true,false,"x\u00e9\ud83d\ude00\n"],"b":{"c":{}}," ":[]})";
  simdjson::dom::parser parser;
  int valid = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string text = seed;
    for (std::size_t changes = random() % 3; changes > 0; --changes) {
      const std::size_t at = random() % text.size();
      switch (random() % 3) {
        case 0: text[at] = "{}[]\",:\\0e-tn \x01\x80"[random() % 17]; break;
        case 1: text.erase(at, 1); break;
        default: text.insert(at, 1, "{}[]\",:\\0e-tn \xc3"[random() % 16]); break;
      }
    }
    const auto plain = plain_json::read(text);
    const bool other = parser.parse(text).error() == simdjson::SUCCESS;
    CAPTURE(text);
    CHECK(plain.has_value() == other);
    valid += other ? 1 : 0;
  }
  CHECK(valid > 5'000);
  CHECK(valid < 19'000);
}
