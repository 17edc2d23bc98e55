#include "nexus/proxy/candidate_picker.h"

#include <doctest/doctest.h>

#include <string>
#include <string_view>

using namespace nexus;

TEST_CASE("the estimate of a prompt's length counts text, not images, sound and files in base64") {
  struct Row {
    const char* name;
    std::string before, base64, behind;
  };
  const std::string large(150'000, 'A');
  const Row rows[] = {
      {"text alone", R"({"messages":[{"content":"data;base64 , \"data\" of"}]})", "", ""},
      {"an image", R"({"url":"data:image/png;base64,)", large, "\"}"},
      {"an image that is empty", R"({"url":"data:image/png;base64,)", "", "\"}"},
      {"a body that ends in an image", R"({"url":"data:image/png;base64,)", large, ""},
      {"sound", R"({"input_audio":{"data":")", large, R"(","format":"wav"}})"},
      {"sound, with blanks", "{\"data\" :\n \"", large, "\"}"},
      {"a data URL under the key data", R"({"data":")", "data:audio/wav;base64," + large, "\"}"},
      {"a key at the end", R"({"x":1,"data")", "", ""},
      {"a key without a string", R"({"data": )", "[1,2]", R"(,"x":"y"})"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    const bool is_string = row.base64 != "[1,2]";
    const std::string body = row.before + row.base64 + row.behind;
    if (is_string) CHECK(base64_bytes(body) == row.base64.size());
    CHECK(base64_bytes(body) <= body.size());
    const std::string twice = body + body;
    if (is_string && !row.behind.empty()) CHECK(base64_bytes(twice) == 2 * row.base64.size());
  }
  std::string body = R"({"model":"m","url":"data:image/png;base64,)" + large + "\"}";
  RequestView request;
  request.body = body.data();
  request.body_bytes = body.size();
  CHECK(needs_of(nexus::kEndpoints[0], request, {}, true).context_tokens ==
        (body.size() - large.size()) / kBytesPerToken);
  CHECK(needs_of(nexus::kEndpoints[0], request, {}, false).context_tokens == 0);
}
