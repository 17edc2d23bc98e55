#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "tests/fuzz/body.h"
#include "tests/fuzz/chunked.h"
#include "tests/fuzz/config.h"
#include "tests/fuzz/dialects.h"
#include "tests/fuzz/exchange.h"
#include "tests/fuzz/heads.h"
#include "tests/fuzz/incremental_json.h"
#include "tests/fuzz/labels.h"
#include "tests/fuzz/multipart.h"
#include "tests/fuzz/usage.h"

namespace {

struct Target {
  const char* name;
  void (*run)(std::string_view);
};

constexpr Target kTargets[] = {
    {"config", fuzz::config},
    {"request_head", fuzz::request_head},
    {"response_head", fuzz::response_head},
    {"chunked", fuzz::chunked},
    {"request_body", fuzz::request_body},
    {"model_list", fuzz::model_list},
    {"usage", fuzz::usage},
    {"label_page", fuzz::label_page},
    {"exchange", fuzz::exchange},
    {"answer", fuzz::answer},
    {"incremental_json", fuzz::incremental_json},
    {"multipart", fuzz::multipart},
    {"dialects", fuzz::dialects},
};

const std::filesystem::path kCorpora = "tests/fuzz/corpus";  // tests run in the repository's root

std::vector<std::filesystem::path> files_of(const std::filesystem::path& directory) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

TEST_CASE("every fuzz target passes on its corpus") {
  for (const Target& target : kTargets) {
    CAPTURE(target.name);
    REQUIRE(std::filesystem::is_directory(kCorpora / target.name));
    const auto files = files_of(kCorpora / target.name);
    CHECK(files.size() >= 5);
    for (const auto& file : files) {
      const std::string name = file.filename().string();
      CAPTURE(name);
      CHECK_NOTHROW(target.run(read_file(file)));
    }
  }
}

TEST_CASE("every corpus belongs to a target, and the corpora are small") {
  std::uintmax_t bytes = 0;
  for (const auto& directory : files_of(kCorpora)) {
    const std::string name = directory.filename().string();
    CAPTURE(name);
    CHECK(std::any_of(std::begin(kTargets), std::end(kTargets), [&](const Target& t) { return t.name == name; }));
    for (const auto& file : files_of(directory)) {
      CHECK(std::filesystem::file_size(file) <= 20'000);
      bytes += std::filesystem::file_size(file);
    }
  }
  CHECK(bytes <= 300'000);
}

TEST_CASE("the checks of the fuzz targets can fail") {
  CHECK_THROWS_AS(fuzz::check(false, "a thing"), fuzz::Broken);
  // The checks must notice a forwarded request that the client did not send.
  rfc9112::Reading two = rfc9112::read_requests("GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n");
  CHECK(two.messages.size() == 2);
  CHECK(two.whole());
  hostile::Problems problems;
  hostile::check_origin(two, {two.messages[0], two.messages[1], two.messages[1]}, problems);
  CHECK(problems.size() == 1);
  CHECK_THROWS_AS(fuzz::check_edited(R"({"model":"m","stream":true})", R"({"model":"m","stream":true})"), fuzz::Broken);
  CHECK_THROWS_AS(fuzz::check_edited(R"({"model":"m","stream":true})",
                                     R"({"model":"n","stream":true,"stream_options":{"include_usage":true}})"),
                  fuzz::Broken);
  CHECK_NOTHROW(fuzz::check_edited(R"({"model":"m","stream":true})",
                                   R"({"stream_options":{"include_usage":true},"model":"m","stream":true})"));
}
