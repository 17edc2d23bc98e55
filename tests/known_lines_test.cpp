// known_lines_test.cpp
// Goal:   a field line that came before is known, byte for byte; lines that must be read each time never are.
// Method: lines kept and looked for; heads read with and without known lines.
#include "nexus/http/known_lines.h"

#include <doctest/doctest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "nexus/http/head_parser.h"

using nexus::Field;
using nexus::FieldRow;
using nexus::FieldTable;
using nexus::HeadError;
using nexus::KnownLines;
using Status = nexus::HeadResult::Status;

namespace {

struct Heads {
  std::unique_ptr<KnownLines> known = std::make_unique<KnownLines>();
  FieldTable fields;
  nexus::RequestHead head;
  std::string text;

  // Reads one request with these field lines; the fields are then in `fields`.
  nexus::HeadResult read(const std::string& lines, std::size_t most_fields = nexus::kMaxFields) {
    text = "GET / HTTP/1.1\r\n" + lines + "\r\n";
    nexus::RequestReader reader;
    reader.start(&fields, most_fields, known.get());
    return reader.feed(text.data(), text.size(), head);
  }
  bool knows(const std::string& line) const {
    FieldRow row;
    KnownLines::Place place = KnownLines::kNowhere;
    return known->find(place, KnownLines::Parts(line), 0, row);
  }
  // The name and the value of the last field.
  std::pair<std::string, std::string> last() const {
    const FieldRow& row = fields.rows[fields.count - 1];
    return {std::string(nexus::name_of(text.data(), row)), std::string(nexus::value_of(text.data(), row))};
  }
};

using Pair = std::pair<std::string, std::string>;
const std::string kHost = "Host: gateway\r\n";

}  // namespace

TEST_SUITE("known lines") {
  TEST_CASE("a line that was read is known afterwards, and has the same field, name and value") {
    for (const std::string line : {"Content-Type: \t application/json ", "Content-Type:application/json"}) {
      Heads heads;
      CHECK_FALSE(heads.knows(line));
      for (int i = 0; i < 2; ++i) {
        REQUIRE(heads.read(kHost + line + "\r\n").status == Status::done);
        CHECK(heads.knows(line));
        CHECK(heads.last() == Pair("Content-Type", "application/json"));
        CHECK(heads.fields.rows[1].field == Field::content_type);
        CHECK(heads.fields.has(Field::content_type));
      }
    }
  }

  TEST_CASE("a line that differs in a byte, in case or in length is another") {
    Heads heads;
    const std::string line = "User-Agent: some-client/1.23.456 (a comment)";
    REQUIRE(heads.read(kHost + line + "\r\n").status == Status::done);
    for (std::size_t i = 0; i < line.size(); ++i) {
      std::string other = line;
      other[i] = static_cast<char>(other[i] ^ 0x20);
      CHECK_FALSE(heads.knows(other));
    }
    CHECK_FALSE(heads.knows(line + ")"));
    CHECK_FALSE(heads.knows(line + "1"));
    CHECK_FALSE(heads.knows(line.substr(0, line.size() - 1)));
    CHECK(heads.knows(line));
  }

  TEST_CASE("of a line that ends in digits, others are known too, and each has its own value") {
    Heads heads;
    REQUIRE(heads.read(kHost + "Content-Length: 7\r\n").status == Status::done);
    CHECK(heads.head.framing.length == 7);
    for (const std::string digits : {"12", "100000", "7", "9223372036854775807"}) {
      CHECK(heads.knows("Content-Length: " + digits));
      REQUIRE(heads.read(kHost + "Content-Length: " + digits + "\r\n").status == Status::done);
      CHECK(heads.last() == Pair("Content-Length", digits));
      CHECK(heads.head.framing.length == std::stoull(digits));
    }
    for (const std::string broken :
         {"007", "9223372036854775808", "18446744073709551617", "99999999999999999999", "1 2"}) {
      CHECK(heads.read(kHost + "Content-Length: " + broken + "\r\n").status == Status::failed);
    }
    CHECK_FALSE(heads.knows("Content-Length: "));
    CHECK_FALSE(heads.knows("Content-Length: 1 "));
    CHECK_FALSE(heads.knows("Content-Length: -1"));
    CHECK_FALSE(heads.knows("Content-Length:  1"));
  }

  TEST_CASE("a Host that is known is well-formed, whatever its digits") {
    Heads heads;
    for (int i = 0; i < 2; ++i) {
      CHECK(heads.read("Host: 10.0.0.1:8080\r\n").status == Status::done);
      CHECK(heads.read("Host: 10.0.0.1:65535\r\n").status == Status::done);
      CHECK(heads.read("Host: 10.0.0.1:655355\r\n").status == Status::failed);
      CHECK(heads.read("Host: 10.0.0.1:\r\n").status == Status::done);
      CHECK(heads.read("Host: a b:8080\r\n").status == Status::failed);
      CHECK(heads.read("Host: [::1]8080\r\n").status == Status::failed);
      CHECK(heads.read("Host: gateway1234567\r\n").status == Status::done);
      CHECK(heads.read("Host: gateway12\r\n").status == Status::done);
    }
    CHECK(heads.knows("Host: 10.0.0.1:1"));
    CHECK_FALSE(heads.knows("Host: a b:8080"));
  }

  TEST_CASE("a line is known in another head, behind another line, and where the line behind it has changed") {
    Heads heads;
    const std::string one = "X-Number-One: a\r\n", two = "X-Number-Two: b\r\n", three = "X-Number-Three: 3\r\n";
    for (const std::string& lines : {kHost + one + two, kHost + two + one, one + kHost + two, kHost + one + three + two,
                                     kHost + one + two, kHost + three + three + one, kHost}) {
      for (int i = 0; i < 2; ++i) {
        REQUIRE(heads.read(lines).status == Status::done);
        std::string read;
        for (const FieldRow& row : heads.fields) {
          const auto name = nexus::name_of(heads.text.data(), row), value = nexus::value_of(heads.text.data(), row);
          read.append(name).append(": ").append(value).append("\r\n");
        }
        CHECK(read == lines);
      }
    }
  }

  TEST_CASE("a first line that came before says the same again; one with a query is read each time") {
    const auto known = std::make_unique<KnownLines>();
    FieldTable fields;
    for (const std::string target : {"/v1/chat/completions", "/v1/models", "/v1/models?key=secret", "/v1/embeddings"}) {
      nexus::RequestHead heads[2];
      const std::string text = "POST " + target + " HTTP/1.1\r\nHost: a\r\n\r\n";
      for (nexus::RequestHead& head : heads) {
        nexus::RequestReader reader;
        reader.start(&fields, nexus::kMaxFields, known.get());
        REQUIRE(reader.feed(text.data(), text.size(), head).status == Status::done);
        CHECK(head.method == HTTP_POST);
        CHECK(head.target(text.data()) == target);
      }
      nexus::RequestLine said;
      const std::string line = text.substr(0, text.find("\r\n"));
      CHECK(known->find_first(line, said) == (target.find('?') == std::string::npos));
      CHECK_FALSE(known->find_first(line.substr(0, line.size() - 1) + "0", said));
    }
    nexus::ResponseHead answer;
    for (const std::string text : {"HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 500 OK\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"}) {
      nexus::ResponseReader reader;
      reader.start(&fields, nexus::kMaxFields, known.get());
      REQUIRE(reader.feed(text.data(), text.size(), answer).status == Status::done);
      CHECK(answer.status == std::stoi(text.substr(nexus::kStatusAt, 3)));
    }
  }

  TEST_CASE("a line that ends in blanks does not pass for one with digits behind them, nor the other way round") {
    Heads heads;
    for (const Pair& row : std::vector<Pair>{{"X-Long-Name: a  ", "a"},
                                             {"X-Long-Name: a  5", "a  5"},
                                             {"X-Long-Name: a  ", "a"},
                                             {"X-Long-Name: ", ""},
                                             {"X-Long-Name: 5", "5"},
                                             {"X-Long-Name: ", ""},
                                             {"X-Long-Name: 66", "66"}}) {
      REQUIRE(heads.read(kHost + row.first + "\r\n").status == Status::done);
      CHECK(heads.last() == Pair("X-Long-Name", row.second));
    }
  }

  TEST_CASE("lines that hold a key or that differ in each request are read each time, and so is Transfer-Encoding") {
    Heads heads;
    for (const std::string line : {"Upgrade: websocket", "Authorization: Bearer sk-1", "authorization: Bearer sk-a",
                                   "X-API-Key: sk-1", "Api-Key: sk-1", "api_key: sk-1", "Transfer-Encoding: chunked",
                                   "Traceparent: 00-11-22-01", "Tracestate: vendor=1", "X-Request-Id: 0123456789"}) {
      REQUIRE(heads.read(kHost + line + "\r\n").status == Status::done);
      CHECK_MESSAGE(!heads.knows(line), line);
    }
  }

  TEST_CASE("a line too short or too long is read each time") {
    Heads heads;
    const std::string longest = "X-Long: " + std::string(KnownLines::kLongestLine - 8, 'a');
    for (int i = 0; i < 2; ++i) {
      REQUIRE(heads.read(kHost + "A:b\r\nAb: \r\n" + longest + "\r\n" + longest + "a\r\n").status == Status::done);
      CHECK_FALSE(heads.knows("A:b"));
      CHECK(heads.knows(longest));
      CHECK_FALSE(heads.knows(longest + "a"));
      CHECK(heads.fields.count == 5);
      CHECK(heads.last().second.size() == KnownLines::kLongestLine - 7);
    }
  }

  TEST_CASE("more lines than there are places take the places of older ones, and all are read right") {
    Heads heads;
    const auto value_of_line = [](int i) { return std::to_string(i * 7919) + "-value"; };
    for (int i = 0; i < 15000; ++i) {
      const std::string value = value_of_line(i % 5000);
      REQUIRE(heads.read(kHost + "X-Number: " + value + "\r\n").status == Status::done);
      REQUIRE(heads.last() == Pair("X-Number", value));
    }
    CHECK(heads.knows("X-Number: " + value_of_line(4999)));
    int known = 0;
    for (int i = 0; i < 5000; ++i) known += heads.knows("X-Number: " + value_of_line(i)) ? 1 : 0;
    CHECK(known <= 256);
  }

  TEST_CASE("known lines count as fields, and what fields mean together is still checked") {
    Heads heads;
    REQUIRE(heads.read(kHost + "Content-Length: 3\r\n").status == Status::done);
    CHECK(heads.read(kHost + kHost).status == Status::failed);
    CHECK(heads.read(kHost + " folded\r\n").status == Status::failed);
    CHECK(heads.read(kHost + "Content-Length: 3\r\nContent-Length: 3\r\n").status == Status::failed);
    CHECK(heads.read("X-One: 1\r\n" + kHost).status == Status::done);
    CHECK(heads.fields.has(Field::host));
    const nexus::HeadResult over = heads.read("X-One: 1\r\n" + kHost, 1);
    CHECK(over.status == Status::failed);
    CHECK(over.error == HeadError::too_many_fields);
    const std::string chunked = "Transfer-Encoding: chunked\r\n";
    CHECK(heads.read(kHost + "Content-Length: 3\r\nX-One: 1\r\n" + chunked).status == Status::failed);
    CHECK(heads.read(kHost + chunked + "X-One: 1\r\nContent-Length: 3\r\n").status == Status::failed);
    CHECK(heads.read(kHost + "Connection: close\r\n").status == Status::done);
    CHECK_FALSE(heads.head.keep_alive);
    CHECK(heads.read(kHost + "Connection: close\r\n").status == Status::done);
    CHECK_FALSE(heads.head.keep_alive);
  }
}
