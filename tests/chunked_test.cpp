// chunked_test.cpp
// Goal:   chunked bodies are decoded exactly, anything else is refused, and the cuts make no difference.
// Method: rows of bodies, each decoded whole, cut in two at every place and byte by byte; random bodies and chunks.
#include "nexus/http/chunked.h"

#include <doctest/doctest.h>

#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

using nexus::ChunkedDecoder;
using Status = nexus::ChunkedDecoder::Status;

namespace {

struct Outcome {
  Status status = Status::need_more;
  std::string payload;
  std::size_t consumed = 0;
  bool operator==(const Outcome&) const = default;
};

// Decodes `text` cut after each of `ends`; each piece is in a block of exactly its size.
Outcome decode(std::string_view text, std::vector<std::size_t> ends) {
  ends.push_back(text.size());
  ChunkedDecoder decoder;
  Outcome outcome;
  std::size_t from = 0;
  for (const std::size_t end : ends) {
    const std::size_t bytes = end - from;
    const std::unique_ptr<char[]> piece(new char[bytes]);
    if (bytes > 0) std::memcpy(piece.get(), text.data() + from, bytes);
    const ChunkedDecoder::Result result = decoder.decode(piece.get(), bytes);
    outcome.payload.append(piece.get(), result.decoded);
    outcome.consumed += result.consumed;
    outcome.status = result.status;
    // Bytes after the end of the body are unchanged.
    const std::string_view behind(piece.get() + result.consumed, bytes - result.consumed);
    if (behind != text.substr(from + result.consumed, behind.size())) outcome.payload += "<changed>";
    if (result.status != Status::need_more) break;
    if (result.consumed != bytes) outcome.payload += "<unread>";
    from = end;
  }
  return outcome;
}

// The result for the whole text, which must be the same cut in two at every place, and byte by byte.
Outcome decode_any(std::string_view text) {
  const Outcome whole = decode(text, {});
  std::vector<std::size_t> each;
  for (std::size_t i = 0; i <= text.size(); ++i) {
    each.push_back(i);
    const Outcome cut = decode(text, {i});
    CAPTURE(i);
    CHECK(cut.status == whole.status);
    if (whole.status != Status::failed) CHECK(cut == whole);
  }
  const Outcome bytewise = decode(text, each);
  CHECK(bytewise.status == whole.status);
  if (whole.status != Status::failed) CHECK(bytewise == whole);
  return whole;
}

const std::string kEnd = "0\r\n\r\n";

}  // namespace

TEST_CASE("a chunked body is decoded whole, and the bytes after it are unchanged") {
  struct Row {
    const char* name;
    std::string text, payload;
  };
  const Row rows[] = {
      {"no payload", kEnd, ""},
      {"one chunk", "5\r\nhello\r\n" + kEnd, "hello"},
      {"chunks", "1\r\na\r\n2\r\nbc\r\n3\r\ndef\r\n" + kEnd, "abcdef"},
      {"both cases of hex digits", "a\r\n0123456789\r\nB\r\n0123456789a\r\n" + kEnd, "01234567890123456789a"},
      {"leading zeros", "0000000000000001\r\nx\r\n" + kEnd, "x"},
      {"many zeros at the end", "1\r\nx\r\n0000000000000000\r\n\r\n", "x"},
      {"line ends in the payload", "6\r\n\r\n0\r\n\r\r\n" + kEnd, "\r\n0\r\n\r"},
      {"extensions", "2;a=b;c\r\nhi\r\n0;last=\"x y\"\r\n\r\n", "hi"},
      {"blanks around extensions", "2 ; a = b;c\t;d=\t\"x\" ; e\r\nhi\r\n0\t;f\r\n\r\n", "hi"},
      {"trailers", "1\r\nx\r\n0\r\nX-A: 1\r\nContent-Length: 5\r\nb:\r\n\r\n", "x"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    const Outcome whole = decode_any(row.text);
    CHECK(whole.status == Status::done);
    CHECK(whole.payload == row.payload);
    CHECK(whole.consumed == row.text.size());
    const std::string next = "GET / HTTP/1.1\r\n";
    const Outcome pipelined = decode_any(row.text + next);
    CHECK(pipelined.status == Status::done);
    CHECK(pipelined.payload == row.payload);
    CHECK(pipelined.consumed == row.text.size());
    for (std::size_t bytes = 0; bytes < row.text.size(); ++bytes) {
      CHECK(decode(row.text.substr(0, bytes), {}).status == Status::need_more);
    }
  }
}

TEST_CASE("anything but the chunked coding is refused") {
  const std::string flood_line(nexus::kMaxChunkLineBytes, 'e');
  struct Row {
    const char* name;
    std::string text;
  };
  const Row rows[] = {
      {"a hexadecimal prefix", "0x5\r\nhello\r\n"},
      {"a plus sign", "+5\r\nhello\r\n"},
      {"a minus sign", "-0\r\n\r\n"},
      {"a space before the size", " 5\r\nhello\r\n"},
      {"a space behind the size", "5 \r\nhello\r\n"},
      {"a tab behind the size", "5\t\r\nhello\r\n"},
      {"a space behind an extension", "5;a \r\nhello\r\n"},
      {"a space behind a value", "5;a=b \r\nhello\r\n"},
      {"a space in a name", "5;a b\r\nhello\r\n"},
      {"a space in a value", "5;a=b c\r\nhello\r\n"},
      {"a digit behind a space", "5 5\r\nhello\r\n"},
      {"a value without a name", "5 = b\r\nhello\r\n"},
      {"an underscore", "0_2e\r\n"},
      {"17 digits", "00000000000000005\r\nhello\r\n"},
      {"2^63", "8000000000000000\r\n"},
      {"2^64 - 1", "ffffffffffffffff\r\n"},
      {"2^64 + 5", "10000000000000005\r\nhello\r\n"},
      {"no size", "\r\nhello\r\n"},
      {"an empty extension", "5;\r\nhello\r\n"},
      {"no size but an extension", ";a\r\n"},
      {"a LF behind the size", "5\nhello\r\n"},
      {"a CR alone behind the size", "5\rhello\r\n"},
      {"two CRs behind the size", "5\r\r\nhello\r\n"},
      {"a LF in an extension", "2;\nXX\r\nhi\r\n"},
      {"a LF behind text in an extension", "2;a\nXX\r\nhi\r\n"},
      {"a CR in an extension", "2;a\rXX\r\nhi\r\n"},
      {"two CRs in an extension", "2;a\r\r\nhi\r\n"},
      {"a NUL in an extension", std::string("2;a\0b\r\nhi\r\n", 12)},
      {"a DEL in an extension", "2;a\x7f\r\nhi\r\n"},
      {"a LF behind the payload", "5\r\nAAAAA\n0\r\n\r\n"},
      {"a CR behind the payload", "5\r\nAAAAA\r0\r\n\r\n"},
      {"nothing behind the payload", "5\r\nAAAAA0\r\n\r\n"},
      {"text behind the payload", "5\r\nAAAAAXX\r\n0\r\n\r\n"},
      {"a CR and text behind the payload", "5\r\nAAAAA\rX0\r\n\r\n"},
      {"two CRs behind the payload", "5\r\nAAAAA\r\r\n0\r\n\r\n"},
      {"a line over the limit", "1;" + flood_line + "\r\nx\r\n"},
      {"a request as a trailer", "0\r\nGET / HTTP/1.1\r\n\r\n"},
      {"a folded trailer", "0\r\nA: b\r\n c\r\n\r\n"},
      {"a trailer without a name", "0\r\n: b\r\n\r\n"},
      {"a trailer with a space before the colon", "0\r\nA : b\r\n\r\n"},
      {"a LF behind a trailer", "0\r\nA: b\n\r\n"},
      {"a CR in a trailer", "0\r\nA: b\rc\r\n\r\n"},
      {"a NUL in a trailer's value", std::string("0\r\nA: \0\r\n\r\n", 11)},
      {"a NUL in a trailer's name", std::string("0\r\nA\0: b\r\n\r\n", 12)},
      {"a LF alone at the end", "0\r\n\n"},
      {"a CR alone at the end", "0\r\n\rX"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    CHECK(decode_any(row.text).status == Status::failed);
  }
}

TEST_CASE("after a failure or the end no more is read") {
  ChunkedDecoder decoder;
  char bad[] = "x";
  CHECK(decoder.decode(bad, 1).status == Status::failed);
  char good[] = "0\r\n\r\n";
  const auto after = decoder.decode(good, 5);
  CHECK(after.status == Status::failed);
  CHECK(after.consumed == 0);

  ChunkedDecoder ended;
  CHECK(ended.decode(good, 5).status == Status::done);
  char more[] = "5\r\n";
  CHECK(ended.decode(more, 3).status == Status::done);
  CHECK(ended.decode(more, 3).consumed == 0);
}

TEST_CASE("a size line may be as long as the limit, and no longer") {
  // The size digit, the semicolon and the CR count too.
  for (const std::size_t more : {0u, 1u}) {
    const std::string line = "1;" + std::string(nexus::kMaxChunkLineBytes - 3 + more, 'e') + "\r\n";
    CHECK(decode(line + "x\r\n" + kEnd, {}).status == (more == 0 ? Status::done : Status::failed));
  }
}

TEST_CASE("all trailers together may be as long as the limit, and no longer") {
  for (const std::size_t more : {0u, 1u}) {
    // Two lines: each counts its name, colon, value and CR.
    const std::string first = "a:" + std::string(4093, 'v'), second = "b:" + std::string(4093 + more, 'v');
    CHECK(first.size() + 1 == nexus::kMaxTrailerBytes / 2);
    const std::string text = "0\r\n" + first + "\r\n" + second + "\r\n\r\n";
    CHECK(decode(text, {}).status == (more == 0 ? Status::done : Status::failed));
  }
}

TEST_CASE("a flood of extensions is refused, though each line is short") {
  const std::string chunk = "1;" + std::string(127, 'e') + "\r\nx\r\n";
  std::string flood;
  for (int i = 0; i < 127; ++i) flood += chunk;
  CHECK(decode(flood, {}).status == Status::need_more);
  CHECK(decode(flood + chunk + chunk, {}).status == Status::failed);
}

TEST_CASE("any body, in any chunks and cut anywhere, is decoded unchanged") {
  std::mt19937 random(11);
  for (int round = 0; round < 300; ++round) {
    std::string payload, text;
    for (std::size_t chunks = random() % 6; chunks > 0; --chunks) {
      std::string chunk;
      for (std::size_t n = 1 + random() % 40; n > 0; --n) chunk += "\r\n0;aF"[random() % 7];
      char size[32];
      std::snprintf(size, sizeof size, random() % 2 ? "%zx" : "%04zX", chunk.size());
      text += size + std::string(random() % 4 == 0 ? ";x=1" : "") + "\r\n" + chunk + "\r\n";
      payload += chunk;
    }
    text += kEnd;
    std::vector<std::size_t> ends;
    for (std::size_t at = 0; at < text.size(); at += random() % 30) ends.push_back(at);
    const Outcome outcome = decode(text + "more", ends);
    CHECK(outcome.status == Status::done);
    CHECK(outcome.payload == payload);
    CHECK(outcome.consumed == text.size());
  }
}
