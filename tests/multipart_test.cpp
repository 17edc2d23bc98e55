// multipart_test.cpp
// Goal:   a form's `model` and `stream` are found wherever they stand, in every cut; what is no whole form is refused.
// Method: bodies as rows, in every cut into two pieces, byte by byte, and against a plain reader that looks at all at
//         once; bodies drawn from pieces of what matters.
#include <doctest/doctest.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/endpoints.h"
#include "nexus/api/multipart.h"
#include "tests/lib/dice.h"

using nexus::ApiError;
using nexus::BodyFacts;
using nexus::MultipartScan;

namespace {

const nexus::Endpoint& row(std::string_view path) {
  for (const nexus::Endpoint& endpoint : nexus::kEndpoints) {
    if (endpoint.path == path) return endpoint;
  }
  FAIL("no such endpoint");
  return nexus::kEndpoints[0];
}

struct Read {
  std::optional<ApiError> error;
  std::string model;
  std::string value;
  bool stream = false;
  bool operator==(const Read&) const = default;
};

Read scan(std::string_view boundary, const std::string& body, const std::vector<std::size_t>& ends,
          std::string_view path = "/v1/audio/transcriptions") {
  MultipartScan scan;
  scan.start(boundary);
  for (const std::size_t end : ends) {
    const std::string moved = body.substr(0, end);  // a copy, so that a read behind the piece is one behind the memory
    scan.feed(moved.data(), moved.size());
  }
  BodyFacts facts;
  Read read;
  read.error = scan.read(body, row(path), facts);
  if (read.error) return read;
  read.model = facts.model;
  read.value = body.substr(facts.model_value.at, facts.model_value.bytes);
  read.stream = facts.stream;
  return read;
}

// The same in every cut.
Read scan(const std::string& body, std::string_view boundary = "b",
          std::string_view path = "/v1/audio/transcriptions") {
  const Read whole = scan(boundary, body, {}, path);
  std::vector<std::size_t> bytes;
  bool same = true;
  for (std::size_t i = 0; i <= body.size(); ++i) {
    bytes.push_back(i);
    same = same && scan(boundary, body, {i}, path) == whole;
  }
  CHECK(same);
  CHECK(scan(boundary, body, bytes, path) == whole);
  return whole;
}

std::string part(std::string_view name, std::string_view content, std::string_view more = "") {
  return "--b\r\nContent-Disposition: form-data; name=\"" + std::string(name) + "\"" + std::string(more) + "\r\n\r\n" +
         std::string(content) + "\r\n";
}

const std::string kFile =
    part("file", std::string("\0\r\n--c\r\n\r\n--\r\n-b\xff", 16), "; filename=\"a.wav\"\r\nContent-Type: audio/wav");

}  // namespace

TEST_CASE("the model is found before, between and behind the files") {
  const std::string model = part("model", "whisper-1"), stream = part("stream", "true"), end = "--b--\r\n";
  for (const std::string& body :
       {model + kFile + end, kFile + model + end, kFile + model + kFile + end, "preamble\r\n" + kFile + model + end,
        kFile + model + "--b--", kFile + model + "--b--\r\nepilogue --b\r\n"}) {
    const Read read = scan(body);
    CHECK(read == Read{std::nullopt, "whisper-1", "whisper-1", false});
  }
  CHECK(scan(stream + kFile + model + end).stream);
  CHECK_FALSE(scan(part("stream", "false") + model + end).stream);
  CHECK_FALSE(scan(part("stream", "true", "; filename=x") + model + end).stream);
  CHECK_FALSE(scan(model + stream + end, "b", "/v1/audio/translations").stream);
}

TEST_CASE("a field's name is read in each of its spellings") {
  struct Row {
    const char* head;
    bool found;
  };
  const Row rows[] = {
      {"Content-Disposition: form-data; name=model", true},
      {"content-disposition:form-data;NAME=\"model\"", true},
      {"Content-Type: text/plain\r\nContent-Disposition: form-data ; name = \"model\"\r\nX: y", true},
      {"Content-Disposition: form-data; x=\"a;name=\\\"b\\\"\"; name=\"model\"", true},
      {"Content-Disposition: form-data; name=\"model\"; filename=\"f\"", false},
      {"Content-Disposition: form-data; filename*=UTF-8''f; name=\"model\"", false},
      {"Content-Disposition: form-data; name=\"Model\"", false},
      {"Content-Disposition: form-data; name=\"model%22\"", false},
      {"Content-Disposition: form-data; filename=\"; name=model\"", false},
      {"Content-Disposition: form-data; name=\"a\\\"; name=model\"", false},
      {"X-Disposition: form-data; name=\"model\"", false},
      {"Content-Disposition: form-data", false},
  };
  for (const Row& each : rows) {
    CAPTURE(std::string(each.head));
    const Read read = scan(std::string("--b\r\n") + each.head + "\r\n\r\nm\r\n--b--");
    CHECK(read == (each.found ? Read{std::nullopt, "m", "m", false} : Read{ApiError::no_model, "", "", false}));
  }
}

TEST_CASE("what is no whole form, or could be read in two ways, is refused") {
  const std::string model = part("model", "m");
  struct Row {
    std::string body;
    ApiError error;
  };
  const Row rows[] = {
      {"", ApiError::bad_multipart},
      {"{}", ApiError::bad_multipart},
      {model, ApiError::bad_multipart},
      {model + "--b", ApiError::bad_multipart},
      {model + "--b-", ApiError::bad_multipart},
      {"--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm", ApiError::bad_multipart},
      {"--b\nContent-Disposition: form-data; name=\"model\"\n\nm\n--b--\n", ApiError::bad_multipart},
      {"--b  x\r\n\r\nm\r\n--b--", ApiError::bad_multipart},
      {"--b\r\nX: " + std::string(nexus::kMaxPartHeadBytes, 'x') + "\r\n\r\nm\r\n--b--", ApiError::bad_multipart},
      {"--b--", ApiError::no_model},
      {kFile + "--b--", ApiError::no_model},
      {part("model", "") + "--b--", ApiError::no_model},
      {model + model + "--b--", ApiError::duplicate_key},
      {model + part("stream", "true") + part("stream", "true") + "--b--", ApiError::duplicate_key},
  };
  for (const Row& each : rows) {
    CAPTURE(each.body.substr(0, 80));
    const std::vector<std::size_t> ends = {each.body.size() / 2};
    CHECK(scan("b", each.body, ends).error == each.error);
    if (each.body.size() < 1000) CHECK(scan(each.body).error == each.error);
  }
  CHECK(scan(model + "--b--", "").error == ApiError::bad_multipart);
  CHECK(scan(kFile + "--b--", "b", "/v1/images/edits") == Read{std::nullopt, "", "", false});
  std::string many;
  for (std::size_t i = 0; i < nexus::kMaxParts; ++i) many += part("x", "");
  CHECK(scan("b", many + "--b--", {}, "/v1/images/edits").error == std::nullopt);
  CHECK(scan("b", many + model + "--b--", {}).error == ApiError::bad_multipart);
}

TEST_CASE("a delimiter is one at the beginning of a line, and nothing behind it but blanks") {
  const std::string end = "\r\n--b--";
  for (const char* content : {"m", "m--b", "m\r\n--bb\r\n", "a\n--b\r\n", "m\r\n--b-x", "\r\n--bx\r\n--b\rx"}) {
    CAPTURE(std::string(content));
    const Read read = scan("--b \t\r\nContent-Disposition: form-data; name=model\r\n\r\n" + std::string(content) + end);
    CHECK(read == Read{std::nullopt, content, content, false});
  }
}

TEST_CASE("the boundary is read from the Content-Type in each of its spellings") {
  using nexus::boundary_of;
  CHECK(boundary_of("multipart/form-data; boundary=x") == "x");
  CHECK(boundary_of("Multipart/Form-Data;charset=\"a;boundary=y\"; BOUNDARY=\"a b\"") == "a b");
  CHECK(boundary_of("multipart/form-data ; boundary = ----WebKit'() ; x=y") == "----WebKit'()");
  CHECK(boundary_of("multipart/form-data") == "");
  CHECK(boundary_of("multipart/form-data; boundary=") == "");
  CHECK(boundary_of("multipart/form-data; boundary=\"\"") == "");
  CHECK(boundary_of("multipart/form-datax; boundary=x") == "");
  CHECK(boundary_of("multipart/mixed; boundary=x") == "");
  CHECK(boundary_of("application/json; boundary=x") == "");
  CHECK(boundary_of("multipart/form-data; boundary=" + std::string(nexus::kMaxBoundaryBytes, 'x')).size() ==
        nexus::kMaxBoundaryBytes);
  CHECK(boundary_of("multipart/form-data; boundary=" + std::string(nexus::kMaxBoundaryBytes + 1, 'x')) == "");
  CHECK(boundary_of("multipart/form-data; boundary=\"a\\\"b\"") == "");
}

TEST_CASE("forms put together at random are the same in pieces and at once") {
  nexus::sim::Dice dice(7);
  const std::string pieces[] = {
      "--b", "\r\n", "--",       "\r\n--b\r\n",  "\r\n--b--", "Content-Disposition: form-data; name=model", "m", " ",
      "\r",  "\n",   "\r\n\r\n", "; filename=x", "--b--"};
  for (int i = 0; i < 3000; ++i) {
    std::string body = dice.one_in(2) ? "--b\r\n" : "";
    for (std::uint64_t left = dice.number(0, 12); left > 0; --left) body += pieces[dice.index(std::size(pieces))];
    if (dice.one_in(2)) body += "\r\n--b--";
    CAPTURE(body);
    scan(body, "b", "/v1/images/edits");
  }
}
