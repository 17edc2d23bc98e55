// head_parser_test.cpp
// Goal:   well-formed heads are read correctly, all others refused, and the cuts between reads make no difference.
// Method: rows of heads, each read whole, cut in two at every place and byte by byte, in front of a guard page.
#include "nexus/http/head_parser.h"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <string_view>
#include <vector>

using nexus::FieldTable;
using nexus::Framing;
using nexus::HeadError;
using nexus::HeadResult;
using nexus::RequestHead;
using nexus::ResponseHead;
using Status = nexus::HeadResult::Status;

namespace {

// Memory that ends at a page boundary, before a page that faults: reading past the given bytes crashes the test.
class GuardedCopy {
 public:
  GuardedCopy() {
    map_ =
        static_cast<char*>(::mmap(nullptr, kBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    REQUIRE(map_ != MAP_FAILED);
    REQUIRE(::mprotect(map_ + kBytes, kPage, PROT_NONE) == 0);
  }
  ~GuardedCopy() { ::munmap(map_, kBytes + kPage); }
  GuardedCopy(const GuardedCopy&) = delete;
  GuardedCopy& operator=(const GuardedCopy&) = delete;

  const char* put(std::string_view bytes) {
    REQUIRE(bytes.size() <= kBytes);
    char* at = map_ + kBytes - bytes.size();
    if (!bytes.empty()) std::memcpy(at, bytes.data(), bytes.size());
    return at;
  }

 private:
  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kBytes = 64 * kPage;
  char* map_;
};

// The result of a reader, as plain values.
template <class Head>
struct Read {
  HeadResult result;
  Head head;
  std::vector<std::pair<std::string, std::string>> fields;
  std::string text;  // the head's bytes, to which the positions refer
};

// Feeds `text` up to each of `ends` in turn; the bytes move each time.
template <class Reader, class Head>
Read<Head> read_cut(std::string_view text, std::vector<std::size_t> ends, nexus::KnownLines* known = nullptr) {
  static GuardedCopy copy;
  static FieldTable fields;
  ends.push_back(text.size());
  Reader reader;
  Read<Head> out;
  reader.start(&fields, nexus::kMaxFields, known);
  for (const std::size_t end : ends) {
    const char* base = copy.put(text.substr(0, end));
    out.result = reader.feed(base, end, out.head);
    if (out.result.status == Status::need_more) continue;
    if (out.result.status == Status::done) {
      for (const auto& row : fields) {
        out.fields.emplace_back(nexus::name_of(base, row), nexus::value_of(base, row));
      }
    }
    break;
  }
  out.text = text;
  return out;
}

template <class Head>
bool same(const Read<Head>& a, const Read<Head>& b) {
  if (a.result.status != b.result.status || a.result.error != b.result.error) return false;
  if (a.result.status != Status::done) return true;
  return a.fields == b.fields && a.head.head_bytes == b.head.head_bytes && a.head.keep_alive == b.head.keep_alive &&
         a.head.framing.kind == b.head.framing.kind && a.head.framing.length == b.head.framing.length;
}

// True if it is the same with lines that are known. Then llhttp may not see that two fields exclude each other, which
// is found at the head's end at the latest.
template <class Reader, class Head>
bool same_if_known(const std::string& text, std::vector<std::size_t> ends, nexus::KnownLines& known,
                   const Read<Head>& whole) {
  const Read<Head> read = read_cut<Reader, Head>(text, ends, &known);
  if (whole.result.status != Status::failed) return same(read, whole);
  if (read.result.status == Status::failed) return true;
  return read.result.status == Status::need_more &&
         read_cut<Reader, Head>(text + "\r\n\r\n", ends, &known).result.status == Status::failed;
}

// The result for the whole text, which must be the same cut in two at every place, byte by byte, and if its lines are
// known, from itself or from heads before.
template <class Reader, class Head>
Read<Head> read_any(const std::string& text) {
  const Read<Head> whole = read_cut<Reader, Head>(text, {});
  std::vector<std::size_t> each;
  static nexus::KnownLines before;
  bool all_same = same_if_known<Reader>(text, {}, before, whole);
  for (std::size_t i = 1; i < text.size(); ++i) {
    each.push_back(i);
    if (text.size() >= 2000) continue;
    all_same = all_same && same(read_cut<Reader, Head>(text, {i}), whole);
    all_same = all_same && same_if_known<Reader>(text, {i}, before, whole);
  }
  CHECK(all_same);
  CHECK(same(read_cut<Reader, Head>(text, each), whole));
  CHECK(same_if_known<Reader>(text, each, before, whole));
  return whole;
}

Read<RequestHead> read_request(const std::string& text) { return read_any<nexus::RequestReader, RequestHead>(text); }
Read<ResponseHead> read_response(const std::string& text) {
  return read_any<nexus::ResponseReader, ResponseHead>(text);
}

// A request with these lines after its Host.
std::string post(std::string_view lines) {
  return "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n" + std::string(lines) + "\r\n";
}
std::string answer(std::string_view lines, std::string_view status_line = "HTTP/1.1 200 OK") {
  return std::string(status_line) + "\r\n" + std::string(lines) + "\r\n";
}
std::string bytes_of(std::string_view text) { return std::string(text); }

}  // namespace

TEST_CASE("a request's head is read into its method, target and fields") {
  const std::string text =
      "POST /v1/chat/completions?a=b%20c HTTP/1.1\r\nHost: gateway:8000\r\nContent-Length:  17 \r\nX-Empty:\r\n"
      "X-Tab:\t a b\t\r\n\r\n";
  const auto read = read_request(text + "{\"model\":");
  REQUIRE(read.result.status == Status::done);
  CHECK(read.head.head_bytes == text.size());
  CHECK(read.head.target(read.text.data()) == "/v1/chat/completions?a=b%20c");
  CHECK(read.head.path(read.text.data()) == "/v1/chat/completions");
  CHECK(read.head.method == HTTP_POST);
  CHECK(read.head.keep_alive);
  CHECK_FALSE(read.head.http_1_0);
  CHECK(read.head.framing.kind == Framing::Kind::length);
  CHECK(read.head.framing.length == 17);
  REQUIRE(read.fields.size() == 4);
  CHECK(read.fields[0] == std::pair<std::string, std::string>("Host", "gateway:8000"));
  CHECK(read.fields[1] == std::pair<std::string, std::string>("Content-Length", "17"));
  CHECK(read.fields[2] == std::pair<std::string, std::string>("X-Empty", ""));
  CHECK(read.fields[3] == std::pair<std::string, std::string>("X-Tab", "a b"));
}

TEST_CASE("an incomplete head needs more") {
  const std::string text = post("Content-Length: 2\r\n");
  for (std::size_t bytes = 0; bytes < text.size(); ++bytes) {
    CHECK(read_cut<nexus::RequestReader, RequestHead>(text.substr(0, bytes), {}).result.status == Status::need_more);
  }
  const std::string reply = answer("Content-Length: 2\r\n");
  for (std::size_t bytes = 0; bytes < reply.size(); ++bytes) {
    CHECK(read_cut<nexus::ResponseReader, ResponseHead>(reply.substr(0, bytes), {}).result.status == Status::need_more);
  }
}

TEST_CASE("the framing and persistence of requests") {
  struct Row {
    const char* name;
    std::string text;
    Framing::Kind kind;
    std::uint64_t length;
    bool keep_alive, expects_continue;
  };
  using enum Framing::Kind;
  const std::string old = "POST / HTTP/1.0\r\n";
  const Row rows[] = {
      {"nothing said", post(""), none, 0, true, false},
      {"a length of 0", post("Content-Length: 0\r\n"), none, 0, true, false},
      {"the largest length", post("Content-Length: 9223372036854775807\r\n"), length, INT64_MAX, true, false},
      {"chunked", post("Transfer-Encoding: chunked\r\n"), chunked, 0, true, false},
      {"chunked in capitals and blanks", post("TRANSFER-ENCODING: \t CHUNKED \t\r\n"), chunked, 0, true, false},
      {"close", post("Connection: close\r\n"), none, 0, false, false},
      {"close in a list", post("Connection: x, CLOSE ,y\r\n"), none, 0, false, false},
      {"close on a second line", post("Connection: keep-alive\r\nConnection: close\r\n"), none, 0, false, false},
      {"closer is not close", post("Connection: closer\r\n"), none, 0, true, false},
      {"HTTP/1.0", old + "\r\n", none, 0, false, false},
      {"HTTP/1.0 that stays", old + "Connection: Keep-Alive\r\n\r\n", none, 0, true, false},
      {"HTTP/1.0 that says both", old + "Connection: keep-alive, close\r\n\r\n", none, 0, false, false},
      {"an expectation", post("Content-Length: 3\r\nExpect: 100-Continue\r\n"), length, 3, true, true},
      {"an expectation without a body", post("Expect: 100-continue\r\n"), none, 0, true, false},
      {"an expectation in HTTP/1.0", old + "Content-Length: 3\r\nExpect: 100-continue\r\n\r\n", length, 3, false,
       false},
      {"an underscore twin", post("Content_Length: 5\r\nTransfer_Encoding: chunked\r\n"), none, 0, true, false},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    const auto read = read_request(row.text);
    REQUIRE(read.result.status == Status::done);
    CHECK(read.head.refusal == HeadError::none);
    CHECK(read.head.framing.kind == row.kind);
    CHECK(read.head.framing.length == row.length);
    CHECK(read.head.keep_alive == row.keep_alive);
    CHECK(read.head.expects_continue == row.expects_continue);
  }
}

TEST_CASE("some well-formed requests are marked for refusal") {
  struct Row {
    std::string lines;
    HeadError refusal;
  };
  const Row rows[] = {
      {"Transfer-Encoding: gzip, chunked\r\n", HeadError::unknown_coding},
      {"Transfer-Encoding: gzip\r\n", HeadError::unknown_coding},
      {"Content-Length: 1\r\nExpect: 200-ok\r\n", HeadError::bad_expectation},
      {"Content-Length: 1\r\nExpect: \r\n", HeadError::bad_expectation},
      {"Content-Length: 1\r\nExpect: 100-continue, x\r\n", HeadError::bad_expectation},
      {"Content-Length: 1\r\nExpect: 100-continue\r\nExpect: 100-continue\r\n", HeadError::bad_expectation},
  };
  for (const Row& row : rows) {
    CAPTURE(row.lines);
    const auto read = read_request(post(row.lines));
    REQUIRE(read.result.status == Status::done);
    CHECK(read.head.refusal == row.refusal);
    CHECK_FALSE(read.head.expects_continue);
  }
}

TEST_CASE("lengths and codings that two parsers could read differently are refused") {
  std::vector<std::string> lines = {
      "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
      "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
      "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
      "Content-Length: 5\r\nContent-Length: 6\r\n",
      "Content-Length: 5\r\nContent-Length: 5\r\n",
      "Content-Length:\r\nContent-Length: 5\r\n",
      "Content-Length: 5\r\nContent-Length:\r\n",
      "Content-Length: 0\r\nContent-Length: 0\r\n",
      "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
      "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
      "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
      "Transfer-Encoding:\r\n chunked\r\n",
      "Transfer-Encoding: chunked\r\n x\r\n",
      "Transfer-Encoding:\r\n\tchunked\r\n",
      "Content-Length:\r\n 7\r\n",
      "Content-Length: 7\r\n \r\n",
      "X: y\r\n z\r\n",
      "X:\r\n \r\n",
      "Content-Length : 5\r\n",
      "Content-Length\t: 5\r\n",
      "Transfer-Encoding : chunked\r\n",
      "X : y\r\n",
  };
  for (const char* value : {"+5",
                            "-48",
                            "0x10",
                            "010",
                            "00",
                            "1_0",
                            "5e0",
                            "5.0",
                            "1Z",
                            "0 5",
                            "",
                            "5, 5",
                            "5, 0",
                            "5,",
                            ",5",
                            "\"5\"",
                            "9223372036854775808",
                            "18446744073709551616",
                            "18446744073709551621",
                            "5555555555555555555555555555555555555555",
                            "\x0b"
                            "5",
                            "5\x0c",
                            "5\xa0",
                            "٥"}) {
    lines.push_back("Content-Length: " + std::string(value) + "\r\n");
  }
  for (const char* value : {"chunked, chunked", "identity", "chunked, identity", "xchunked", "chunk", "chunkedx",
                            "\"chunked\"", ",chunked", "chunked,", "", ", chunked", "chunked;q=1", "chunked, gzip",
                            "gzip, chunked, chunked", "identity, chunked", "chun ked"}) {
    lines.push_back("Transfer-Encoding: " + std::string(value) + "\r\n");
  }
  for (const char odd : {'\x0b', '\x0c', '\r', '\x7f', '\xa0', '\0', '\n'}) {
    for (const std::size_t at : {0u, 4u, 7u}) {
      std::string value = "chunked";
      lines.push_back("Transfer-Encoding: " + value.insert(at, 1, odd) + "\r\n");
    }
  }
  lines.push_back("Transfer-Encoding: chun\tked\r\n");
  for (const std::string& line : lines) {
    CAPTURE(line);
    const auto read = read_request(post(line));
    CHECK(read.result.status == Status::failed);
    CHECK(read.result.error == HeadError::malformed);
    CHECK_FALSE(read.result.why.empty());
    CHECK(read_response(answer(line)).result.status == Status::failed);
  }
  for (const char* text :
       {"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n"}) {
    CHECK(read_request(text).result.status == Status::failed);
  }
}

TEST_CASE("lines without CRLF or a name are refused") {
  const std::string_view heads[] = {
      "GET / HTTP/1.1\nHost: a\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\n\n",
      "GET / HTTP/1.1\r\nHost: a\r\n\n",
      "GET / HTTP/1.1\r\nHost: a\r\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
      "GET / HTTP/1.1\rHost: a\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\r\n\rX\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\r\n\r\rX",
      "GET / HTTP/1.1\r\nHost: a\r\n: x\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\r\nnocolon\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\r\nTe\nst: x\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\r\n Content-Length: 5\r\n\r\n",
      "GET / HTTP/1.1\r\n Host: a\r\n\r\n",
      "GET / HTTP/1.1\r\n\tX: y\r\nHost: a\r\n\r\n",
      {"GET / HTTP/1.1\r\nHost: a\r\nX\0: y\r\n\r\n", 34},
      {"GET / HTTP/1.1\r\nHost: a\r\nX: y\0z\r\n\r\n", 35},
      {"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", 29},
      "GET / HTTP/1.1\r\nHost: a\r\nX(y): z\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\r\nX\xc3\xa4: z\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a\r\nX: \x7f\r\n\r\n",
  };
  for (const std::string_view text : heads) {
    CAPTURE(text);
    const auto read = read_request(bytes_of(text));
    CHECK(read.result.status == Status::failed);
    CHECK(read.result.error == HeadError::malformed);
  }
}

TEST_CASE("a request line is method, one space, path, one space, version") {
  for (const char* line : {"GET  / HTTP/1.1",
                           "GET /  HTTP/1.1",
                           "GET\t/ HTTP/1.1",
                           "GET /\tHTTP/1.1",
                           " GET / HTTP/1.1",
                           "GET / HTTP/1.1 ",
                           "GET / http/1.1",
                           "GET / HTTP/1.10",
                           "GET / HTTP/01.1",
                           "GET / HTTP/1",
                           "GET /",
                           "GET / HTTP/1.1x",
                           "GET / RTSP/1.0",
                           "SOURCE / ICE/1.0",
                           "GET * HTTP/1.1",
                           "GE(T / HTTP/1.1",
                           "GET: / HTTP/1.1",
                           "CONNECT /a HTTP/1.1",
                           "GET ftp://a/ HTTP/1.1",
                           "GET http:///a HTTP/1.1",
                           "GET http://u@a/ HTTP/1.1",
                           "GET http://a?<> HTTP/1.1",
                           "GET a/b HTTP/1.1",
                           "GET a:80 HTTP/1.1",
                           "GET /#x HTTP/1.1",
                           "GET /a#b HTTP/1.1",
                           "GET /a\\b HTTP/1.1",
                           "GET /%00 HTTP/1.1",
                           "GET /%0d%0aX HTTP/1.1",
                           "GET /%1f HTTP/1.1",
                           "GET /%7f HTTP/1.1",
                           "GET /%7F HTTP/1.1",
                           "GET /% HTTP/1.1",
                           "GET /%2 HTTP/1.1",
                           "GET /%g0 HTTP/1.1",
                           "GET /\x80 HTTP/1.1",
                           "GET /\xc0\xaf HTTP/1.1",
                           "GET /\xff HTTP/1.1",
                           "GET /a b HTTP/1.1",
                           "GET /{ HTTP/1.1",
                           "GET /\x7f HTTP/1.1",
                           "GET /\x0b HTTP/1.1",
                           "GET ?a HTTP/1.1",
                           " / HTTP/1.1",
                           "GET HTTP/1.1"}) {
    CAPTURE(line);
    CHECK(read_request(std::string(line) + "\r\nHost: a\r\n\r\n").result.status == Status::failed);
  }
  for (const char* line :
       {"GET / HTTP/1.1", "DELETE /a/b?c=d&e=%2F HTTP/1.1", "GET //a HTTP/1.1", "OPTIONS /x HTTP/1.0"}) {
    CAPTURE(line);
    CHECK(read_request(std::string(line) + "\r\nHost: a\r\n\r\n").result.status == Status::done);
  }
}

TEST_CASE("a first line is read the same by every version of llhttp, because llhttp does not read it") {
  struct Row {
    const char* line;
    int method;  // -1: unknown
    const char* target;
    bool http_1_0;
  };
  const Row rows[] = {
      {"GET / HTTP/1.2", HTTP_GET, "/", false},
      {"GET / HTTP/1.9", HTTP_GET, "/", false},
      {"GET / HTTP/1.0", HTTP_GET, "/", true},
      {"PATCH /a HTTP/1.1", HTTP_PATCH, "/a", false},
      {"QUERY /a HTTP/1.1", -1, "/a", false},
      {"get /a HTTP/1.1", -1, "/a", false},
      {"M-SEARCH /a HTTP/1.1", -1, "/a", false},
      {"OPTIONS * HTTP/1.1", HTTP_OPTIONS, "*", false},
      {"CONNECT a:443 HTTP/1.1", HTTP_CONNECT, "a:443", false},
      {"GET http://a/ HTTP/1.1", HTTP_GET, "/", false},
      {"GET HTTPS://[::1]:80/a?b=/c HTTP/1.1", HTTP_GET, "/a?b=/c", false},
      {"GET http://a HTTP/1.1", HTTP_GET, "/", false},
      {"GET http://a?b HTTP/1.1", HTTP_GET, "/", false},
  };
  for (const Row& row : rows) {
    CAPTURE(row.line);
    const auto read = read_request(std::string(row.line) + "\r\nHost: a\r\n\r\n");
    REQUIRE(read.result.status == Status::done);
    CHECK((read.head.refusal == HeadError::unknown_method) == (row.method < 0));
    if (row.method >= 0) CHECK(read.head.method == row.method);
    const std::string_view target = row.target;
    CHECK(read.head.target(read.text.data()) == target);
    CHECK(read.head.path(read.text.data()) == target.substr(0, target.find('?')));
    CHECK(read.head.http_1_0 == row.http_1_0);
  }
  for (const char* line : {"GET / HTTP/2.0", "GET / HTTP/0.9", "PRI * HTTP/2.0", "BREW / HTTP/3.0"}) {
    CAPTURE(line);
    CHECK(read_request(std::string(line) + "\r\nHost: a\r\n\r\n").result.error == HeadError::bad_version);
  }
}

TEST_CASE("there is one Host, and it is a host") {
  const auto with_host = [](std::string_view lines) {
    return read_request("GET / HTTP/1.1\r\n" + std::string(lines) + "\r\n").result.status;
  };
  for (const char* host : {"a", "a.b-c_d", "a:80", "a:", "127.0.0.1:8000", "[::1]", "[::1]:80", "A.EXAMPLE"}) {
    CAPTURE(host);
    CHECK(with_host("Host: " + std::string(host) + "\r\n") == Status::done);
  }
  for (const char* host : {"",    " ",        "a, b",   "a,b",      "user@host", "host/path", "a b",  "a?b",
                           "a#b", "http://a", "a:b",    "a:123456", "a:80:80",   ":80",       "[::1", "::1",
                           "[]",  "[::1]x",   "[g::1]", "a\\b",     "a\xc3\xa4", "a:-1",      "a%41"}) {
    CAPTURE(host);
    CHECK(with_host("Host: " + std::string(host) + "\r\n") == Status::failed);
  }
  CHECK(with_host("") == Status::failed);
  CHECK(with_host("X: a\r\n") == Status::failed);
  CHECK(with_host("Host: a\r\nHost: a\r\n") == Status::failed);
  CHECK(with_host("Host: a\r\nhost: b\r\n") == Status::failed);
  CHECK(with_host("Host: a\r\n b\r\n") == Status::failed);
  CHECK(read_request("GET / HTTP/1.0\r\n\r\n").result.status == Status::done);
  CHECK(read_request("GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n").result.status == Status::failed);
}

TEST_CASE("a head has at most kMaxFields fields") {
  for (const std::size_t more : {0u, 1u}) {
    std::string lines;
    for (std::size_t i = 1; i < nexus::kMaxFields + more; ++i) lines += "X: y\r\n";
    const auto read = read_request(post(lines));
    CHECK(read.result.status == (more == 0 ? Status::done : Status::failed));
    if (more == 0) CHECK(read.fields.size() == nexus::kMaxFields);
    if (more == 1) CHECK(read.result.error == HeadError::too_many_fields);
  }
}

TEST_CASE("one field too many, without a valid name, is malformed, however it is cut") {
  std::string lines;
  for (std::size_t i = 1; i < nexus::kMaxFields; ++i) lines += "a:\r\n";
  const auto read = read_request(post(lines + "na me: y\r\n"));
  CHECK(read.result.error == HeadError::malformed);
  CHECK(read_response(answer("a:\r\n" + lines + "na me: y\r\n")).result.error == HeadError::malformed);
}

TEST_CASE("a name of any length is read whole, even if the length would wrap in a smaller integer") {
  for (const std::size_t bytes : {255u, 256u, 257u, 65535u, 65536u, 65550u}) {
    const std::string name(bytes, 'n');
    const auto read = read_cut<nexus::RequestReader, RequestHead>(post(name + ": 1\r\nContent-Length: 3\r\n"), {});
    REQUIRE(read.result.status == Status::done);
    REQUIRE(read.fields.size() == 3);
    CHECK(read.fields[1].first == name);
    CHECK(read.head.framing.length == 3);
    // A longer name that only begins with Content-Length.
    const std::string twin = "Content-Length" + std::string(bytes + 1 - 256 % (bytes + 1), 'n');
    CHECK(read_cut<nexus::RequestReader, RequestHead>(post(twin + ": 9\r\n"), {}).head.framing.kind ==
          Framing::Kind::none);
  }
}

TEST_CASE("names are recognised in any case, and those with underscores are reported as such") {
  using nexus::Field;
  struct Row {
    const char* name;
    Field field;
  };
  const Row rows[] = {
      {"Host", Field::host},
      {"hOST", Field::host},
      {"TE", Field::te},
      {"Via", Field::via},
      {"Content-Length", Field::content_length},
      {"Content_Length", Field::underscore_twin},
      {"content-lengths", Field::other},
      {"X-Request-ID", Field::x_request_id},
      {"X_Request_Id", Field::underscore_twin},
      {"X_Request-Id", Field::underscore_twin},
      {"X-Nexus-Backend", Field::x_nexus},
      {"x_nexus_backend", Field::underscore_twin},
      {"X-Nexus", Field::other},
      {"Transfer_Encoding", Field::underscore_twin},
      {"X_Other", Field::other},
      {"_", Field::other},
      {"", Field::other},
      {"Kost", Field::other},
      {"a-name-that-is-longer-than-thirty-two-bytes", Field::other},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    CHECK(nexus::classify_field(row.name) == row.field);
  }
  for (std::size_t i = 0; i < nexus::kFieldNames.size(); ++i) {
    std::string upper(nexus::kFieldNames[i]);
    for (char& c : upper) c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c;
    CHECK(nexus::classify_field(upper) == static_cast<Field>(i + 1));
  }
  CHECK(nexus::classify_field("x-request-id") == Field::x_request_id);
}

TEST_CASE("a response's head is read into its status, reason and fields") {
  const std::string text = "HTTP/1.1 404 Not  Found \r\nContent-Type: a/b\r\nContent-Length: 12\r\n\r\n";
  const auto read = read_response(text + "body");
  REQUIRE(read.result.status == Status::done);
  CHECK(read.head.status == 404);
  CHECK(read.head.head_bytes == text.size());
  CHECK(read.text.substr(read.head.reason_at, read.head.reason_bytes) == "Not  Found ");
  CHECK(read.head.framing.length == 12);
  REQUIRE(read.fields.size() == 2);
  CHECK(read.fields[0] == std::pair<std::string, std::string>("Content-Type", "a/b"));
}

TEST_CASE("the framing and persistence of responses") {
  struct Row {
    const char* name;
    std::string text;
    Framing::Kind kind;
    std::uint64_t length;
    bool keep_alive;
  };
  using enum Framing::Kind;
  const Row rows[] = {
      {"a length", answer("Content-Length: 5\r\n"), length, 5, true},
      {"a length of 0", answer("Content-Length: 0\r\n"), length, 0, true},
      {"chunked", answer("Transfer-Encoding: chunked\r\n"), chunked, 0, true},
      {"neither", answer(""), until_close, 0, false},
      {"neither, keep-alive", answer("Connection: keep-alive\r\n"), until_close, 0, false},
      {"close", answer("Content-Length: 5\r\nConnection: close\r\n"), length, 5, false},
      {"HTTP/1.0", answer("Content-Length: 5\r\n", "HTTP/1.0 200 OK"), length, 5, false},
      {"204", answer("", "HTTP/1.1 204 No Content"), none, 0, true},
      {"tabs and other alphabets in the reason", answer("", "HTTP/1.1 204 \tV\xc3\xa4l"), none, 0, true},
      {"204 with a length of 0", answer("Content-Length: 0\r\n", "HTTP/1.1 204 No Content"), none, 0, true},
      {"304 that tells the length it saves", answer("Content-Length: 9\r\n", "HTTP/1.1 304 X"), none, 0, true},
      {"100", answer("", "HTTP/1.1 100 Continue"), none, 0, true},
      {"no reason", answer("Content-Length: 5\r\n", "HTTP/1.1 200 "), length, 5, true},
      {"no reason and no space", answer("Content-Length: 5\r\n", "HTTP/1.1 200"), length, 5, true},
      {"an upgrade that nobody asked for", answer("Content-Length: 5\r\nUpgrade: x\r\n"), length, 5, true},
      {"an upgrade with its option", answer("Content-Length: 5\r\nConnection: upgrade\r\nUpgrade: x\r\n"), length, 5,
       true},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    const auto read = read_response(row.text);
    REQUIRE(read.result.status == Status::done);
    CHECK(read.head.framing.kind == row.kind);
    CHECK(read.head.framing.length == row.length);
    CHECK(read.head.keep_alive == row.keep_alive);
  }
}

TEST_CASE("invalid responses are refused") {
  const std::string heads[] = {
      answer("", "HTTP/1.1 2000 OK"),
      answer("", "HTTP/1.1 99 OK"),
      answer("", "HTTP/1.1 099 OK"),
      answer("", "HTTP/1.1 600 OK"),
      answer("", "HTTP/1.1 20 OK"),
      answer("", "HTTP/1.1 2x0 OK"),
      answer("", "HTTP/1.1 -20 OK"),
      answer("", "HTTP/2.0 200 OK"),
      answer("", "HTTP/1.12 200 OK"),
      answer("", "HTTP/1.10 200 OK"),
      answer("", "http/1.1 200 OK"),
      answer("", "HTTP/1.1  200 OK"),
      answer("", "HTTP/1.1\t200 OK"),
      answer("", "HTTP/1.1 200\tOK"),
      answer("", " HTTP/1.1 200 OK"),
      answer("", "\r\nHTTP/1.1 200 OK"),
      answer("", "ICY 200 OK"),
      answer("", "GET / HTTP/1.1"),
      answer("Content-Length: 5\r\n", "HTTP/1.1 204 No Content"),
      answer("Transfer-Encoding: chunked\r\n", "HTTP/1.1 204 No Content"),
      answer("Transfer-Encoding: chunked\r\n", "HTTP/1.1 304 Not Modified"),
      answer("Content-Length: 5\r\n", "HTTP/1.1 100 Continue"),
      answer("Transfer-Encoding: gzip, chunked\r\n"),
      answer("Transfer-Encoding: chunked\r\n", "HTTP/1.0 200 OK"),
      "HTTP/1.1 200 OK\nContent-Length: 5\r\n\r\n",
      "HTTP/1.1 200 OK\r\nContent-Length: 5\n\r\n",
      "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\n",
      "HTTP/1.1 200 O\nK\r\nContent-Length: 5\r\n\r\n",
      "HTTP/1.1 200 O\rK\r\nContent-Length: 5\r\n\r\n",
      "HTTP/1.1 200\nContent-Length: 5\n\n",
      "HTTP/1.1 200\n\n",
      bytes_of({"HTTP/1.1 200 O\0K\r\n\r\n", 20}),
      answer("", "HTTP/1.1 200 O\x01K"),
      answer("", "HTTP/1.1 200 O\x7fK"),
      bytes_of({"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n", 27}),
  };
  for (const std::string& text : heads) {
    CAPTURE(text);
    CHECK(read_response(text).result.status == Status::failed);
  }
}

TEST_CASE("arbitrary bytes give the same result however they are cut, and are never read past their end") {
  constexpr std::string_view kTokens[] = {"GET ",
                                          "POST ",
                                          "/",
                                          " HTTP/1.1",
                                          "\r\n",
                                          "\r",
                                          "\n",
                                          "Host: a\r\n",
                                          ":",
                                          " ",
                                          "\t",
                                          "Content-Length: 5\r\n",
                                          "Transfer-Encoding: chunked\r\n",
                                          "X",
                                          "x: y\r\n",
                                          "HTTP/1.1 200 OK\r\n",
                                          "\r\n\r\n",
                                          "200",
                                          "\xff",
                                          "a",
                                          ",",
                                          "Connection: close\r\n"};
  std::uint64_t state = 9;
  const auto draw = [&](std::size_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::size_t>(state >> 33) % n;
  };
  int done = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string text = round % 3 == 0 ? "" : round % 3 == 1 ? "GET / HTTP/1.1\r\nHost: a\r\n" : "HTTP/1.1 200 OK\r\n";
    for (std::size_t n = draw(10); n > 0; --n) text += kTokens[draw(std::size(kTokens))];
    if (draw(3) == 0) text.insert(draw(text.size() + 1), 1, static_cast<char>(draw(256)));
    CAPTURE(text);
    done += read_request(text).result.status == Status::done ? 1 : 0;
    done += read_response(text).result.status == Status::done ? 1 : 0;
  }
  CHECK(done > 200);
}
