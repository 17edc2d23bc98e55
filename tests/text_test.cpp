#include <doctest/doctest.h>
#include <simdjson.h>

#include <random>
#include <string>
#include <string_view>

#include "nexus/base/simd.h"
#include "nexus/base/text.h"

using namespace nexus;

TEST_CASE("case is ASCII's alone") {
  CHECK(to_lower('A') == 'a');
  CHECK(to_lower('Z') == 'z');
  for (const char c : {'@', '[', '`', '{', '0', '\xc4', '\0'}) CHECK(to_lower(c) == c);
  CHECK(equals_ignoring_case("Content-LENGTH", "content-length"));
  CHECK_FALSE(equals_ignoring_case("a", "ab"));
  CHECK_FALSE(equals_ignoring_case("\xc4", "\xe4"));
  CHECK_FALSE(equals_ignoring_case("@", "`"));
  CHECK(starts_with_ignoring_case("Bearer x", "bearer "));
  CHECK(starts_with_ignoring_case("x", ""));
  CHECK_FALSE(starts_with_ignoring_case("Bear", "bearer"));
}

TEST_CASE("field text is what RFC 9110 says") {
  for (int byte = 0; byte < 256; ++byte) {
    const bool allowed = byte == '\t' || (byte >= 0x20 && byte != 0x7f);
    CHECK(is_field_text(static_cast<char>(byte)) == allowed);
  }
}

TEST_CASE("blanks at both ends are spaces and tabs, and nothing else") {
  CHECK(trim_blanks(" \t a b\t ") == "a b");
  CHECK(trim_blanks("\t \t").empty());
  CHECK(trim_blanks("").empty());
  CHECK(trim_blanks("\r\n") == "\r\n");
  CHECK(trim_blanks("\va\f") == "\va\f");
}

TEST_CASE("a list's elements come out in turn, empty ones too") {
  std::string_view list = " a ,,b\t, c d";
  CHECK(next_list_element(list) == "a");
  CHECK(next_list_element(list).empty());
  CHECK(next_list_element(list) == "b");
  CHECK(next_list_element(list) == "c d");
  CHECK(list.empty());
  CHECK(next_list_element(list).empty());
  list = ",";
  CHECK(next_list_element(list).empty());
  CHECK(list.empty());
}

TEST_CASE("a decimal is digits alone, below 2^63") {
  CHECK(parse_decimal("0") == 0u);
  CHECK(parse_decimal("7") == 7u);
  CHECK(parse_decimal("9223372036854775807") == 9223372036854775807u);
  for (const char* text : {"", "00", "01", "+1", "-1", " 1", "1 ", "1a", "0x1", "1.0", "1e3", "1_0",
                           "9223372036854775808", "9999999999999999999", "10000000000000000000", "18446744073709551616",
                           "99999999999999999999999999", "\xd9\xa5"}) {
    CAPTURE(text);
    CHECK_FALSE(parse_decimal(text));
  }
  CHECK_FALSE(parse_decimal(std::string_view("1\0", 2)));
}

TEST_CASE("a hex digit has its value in either case, and nothing else has one") {
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    const std::size_t at = kHexDigits.find(to_lower(c));
    CHECK(hex_value(c) == (at == std::string_view::npos ? -1 : static_cast<int>(at)));
  }
}

TEST_CASE("a host stands before its port, an IPv6 address in brackets") {
  CHECK(host_port("127.0.0.1", 8000) == "127.0.0.1:8000");
  CHECK(host_port("example.org", 0) == "example.org:0");
  CHECK(host_port("::1", 8000) == "[::1]:8000");
  CHECK(host_port("fe80::1", 65535) == "[fe80::1]:65535");
  CHECK(url_host("::1") == "[::1]");
  CHECK(url_host("example.org") == "example.org");
}

TEST_CASE("a number's digits read back as the number") {
  CHECK(Digits(0).view() == "0");
  CHECK(Digits(UINT64_MAX).view() == "18446744073709551615");
  CHECK(Digits(255, 16).view() == "ff");
  CHECK(Digits(UINT64_MAX, 2).view() == std::string(64, '1'));
  const Digits one(123);
  const Digits copy = one;  // its digits are its own
  CHECK(copy.view() == "123");
  CHECK(copy.view().data() != one.view().data());
}

TEST_CASE("a JSON string holds its text, escaped where it must be") {
  CHECK(json_string("") == "\"\"");
  CHECK(json_string("a\"b\\c/") == R"("a\"b\\c/")");
  CHECK(json_string("\n\r\t\b\x1f\x7f") == R"("\n\r\t\u0008\u001f\u007f")");
  CHECK(json_string(std::string_view("\0", 1)) == R"("\u0000")");
  CHECK(json_string("é€𝄞") == "\"é€𝄞\"");
}

TEST_CASE("every character of UTF-8 is read back, and no shorter part of it") {
  for (char32_t code = 0; code <= 0x110000; code += code < 0x3000 ? 1 : 61) {
    std::string text;
    if (code < 0x80) {
      text = {static_cast<char>(code)};
    } else if (code < 0x800) {
      text = {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
    } else if (code < 0x10000) {
      text = {static_cast<char>(0xe0 | code >> 12), static_cast<char>(0x80 | (code >> 6 & 63)),
              static_cast<char>(0x80 | (code & 63))};
    } else {
      text = {static_cast<char>(0xf0 | code >> 18), static_cast<char>(0x80 | (code >> 12 & 63)),
              static_cast<char>(0x80 | (code >> 6 & 63)), static_cast<char>(0x80 | (code & 63))};
    }
    const bool is_character = simdjson::validate_utf8(text);
    REQUIRE(read_utf8(text + "z").bytes == (is_character ? text.size() : 0));
    if (!is_character) continue;
    REQUIRE(read_utf8(text).code == code);
    REQUIRE(without_cut_character("a" + text) == 1 + text.size());
    for (std::size_t bytes = 1; bytes < text.size(); ++bytes) {
      REQUIRE(read_utf8(text.substr(0, bytes)).bytes == 0);
      REQUIRE(without_cut_character("a" + text.substr(0, bytes)) == 1);
    }
  }
}

TEST_CASE("bytes that are no UTF-8 become U+FFFD, one for each") {
  struct Row {
    const char* bytes;
    int replaced;
  };
  const Row rows[] = {{"\x80", 1},
                      {"\xc0\xaf", 2},
                      {"\xc1\xbf", 2},
                      {"\xc3", 1},
                      {"\xe0\x9f\xbf", 3},
                      {"\xed\xa0\x80", 3},
                      {"\xe2\x82", 2},
                      {"\xf0\x8f\xbf\xbf", 4},
                      {"\xf4\x90\x80\x80", 4},
                      {"\xf5\x80\x80\x80", 4},
                      {"\xf0\x9f\x98", 3},
                      {"\xff\xfe", 2}};
  for (const Row& row : rows) {
    std::string expected = "\"a";
    for (int i = 0; i < row.replaced; ++i) expected += "\xef\xbf\xbd";
    CHECK(json_string("a" + std::string(row.bytes) + "z") == expected + "z\"");
  }
}

TEST_CASE("whatever bytes go in, a JSON string comes out that reads back") {
  std::mt19937 random(4);
  simdjson::dom::parser parser;
  for (int round = 0; round < 3000; ++round) {
    std::string text;
    bool ascii = true;
    for (std::size_t n = random() % 30; n > 0; --n) {
      const char c = static_cast<char>(random() % (round % 2 == 0 ? 128 : 256));
      ascii = ascii && static_cast<unsigned char>(c) < 128;
      text += c;
    }
    const std::string json = json_string(text);
    std::string_view back;
    REQUIRE(parser.parse(json).get_string().get(back) == simdjson::SUCCESS);
    if (ascii) REQUIRE(back == text);
  }
}

TEST_CASE("the first byte that is no field text is found wherever it stands, and none outside the range") {
  for (std::size_t bytes = 0; bytes <= 40; ++bytes) {
    for (std::size_t at = 0; at <= bytes; ++at) {
      for (const char c : {'\0', '\n', '\r', '\x1f', '\x7f', '\t', ' ', '\x80', '\xff'}) {
        std::string text(bytes, 'x');
        if (at < bytes) text[at] = c;
        for (std::size_t from = 0; from <= bytes; ++from) {
          std::size_t expected = from;
          while (expected < bytes && nexus::is_field_text(text[expected])) ++expected;
          REQUIRE(nexus::find_control(text.data(), from, bytes) == expected);
        }
      }
    }
  }
}
