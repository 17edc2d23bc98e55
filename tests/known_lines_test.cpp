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
    return known->find(KnownLines::Parts(line), 0, row);
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
    for (const std::string broken : {"007", "9223372036854775808", "18446744073709551617", "99999999999999999999", "1 2"}) {
      CHECK(heads.read(kHost + "Content-Length: " + broken + "\r\n").status == Status::failed);
    }
    CHECK_FALSE(heads.knows("Content-Length: "));
    CHECK_FALSE(heads.knows("Content-Length: 1 "));
    CHECK_FALSE(heads.knows("Content-Length: -1"));
    CHECK_FALSE(heads.knows("Content-Length:  1"));
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
    for (const std::string line :
         {"Upgrade: websocket", "Authorization: Bearer sk-1", "authorization: Bearer sk-a", "X-API-Key: sk-1",
          "Api-Key: sk-1", "api_key: sk-1", "Transfer-Encoding: chunked", "Traceparent: 00-11-22-01",
          "Tracestate: vendor=1", "X-Request-Id: 0123456789"}) {
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
