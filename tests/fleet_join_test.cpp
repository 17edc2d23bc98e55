// fleet_join_test.cpp
// Goal:   pages of several servers become one, whatever a server says.
// Method: pages as rows. The asking is tested end to end, with real sockets.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "nexus/net/epoll.h"
#include "nexus/server/fleet_join.h"

using nexus::join_pages;
using nexus::PageKind;

namespace {

std::string joined(PageKind kind, const std::vector<std::string>& pages, const nexus::ApiKey* key = nullptr) {
  nexus::JsonReader json;
  return join_pages(json, kind, pages, key);
}

}  // namespace

TEST_CASE("the models that are loaded are those of all servers, byte for byte") {
  const std::string one = R"({"models":[{"name":"a:latest","size": 5137025024,"details":{"format":"gguf"}}]})";
  const std::string two = R"({ "models" : [ {"name":"b","x":"]}"} , {"name":"c"} ] , "more":1})";
  CHECK(joined(PageKind::running, {}) == R"({"models":[]})");
  CHECK(joined(PageKind::running, {one}) == one);
  CHECK(joined(PageKind::running, {one, two}) ==
        one.substr(0, one.size() - 2) + R"(, {"name":"b","x":"]}"} , {"name":"c"} ]})");
}

TEST_CASE("a page that is not a list of models adds nothing to the others") {
  const std::string good = R"({"models":[{"name":"a"}]})";
  for (const char* page :
       {"", "x", "[]", "{}", R"({"models":{}})", R"({"models":[{]})", R"({"models":[{}])", R"({"models":[)",
        R"({"models":[]})", R"({"models":[ ]} )", R"({"models":[1,]})", R"({"models":null})", R"({"models":[{}]}})"}) {
    CAPTURE(std::string(page));
    CHECK(joined(PageKind::running, {page, good, page}) == good);
  }
}

TEST_CASE("a key with models of its own is told of these alone, byte for byte") {
  const nexus::ApiKey key{.name = "k", .key = "12345678", .models = {"a", "big:*"}};
  const auto told = [&](const std::vector<std::string>& pages) { return joined(PageKind::running, pages, &key); };
  CHECK(told({R"({"models":[{"name":"b"}, { "x":[{"name":"b"}], "name" : "a" } ,{"name":"big:7b","y":{}}]})",
              R"({"more":[1],"models":[{"name":"b"},{"name":"big:8b"}]})"}) ==
        R"({"models":[{ "x":[{"name":"b"}], "name" : "a" },{"name":"big:7b","y":{}},{"name":"big:8b"}]})");
  const std::string good = R"({"models":[{"name":"a"}]})";
  for (const char* page :
       {"", "[]", R"({"models":{}})", R"({"models":[{}]})", R"({"models":[{"name":7}]})", R"({"models":["a"]})",
        R"({"models":[{"name":"a"},1]})", R"({"models":[{"name":"a"})", R"({"models":[{"name":"a",}]})",
        R"({"models":[{"name":"a","x":[}]})", R"({"models":[{"model":"a"}]})", R"({"models":[{"name":"ab"}]})",
        R"({"models":[{"name":"a"}]]})", R"({"models":[{"name":"a"}}]})"}) {
    CAPTURE(std::string(page));
    CHECK(told({page, good, page}) == good);
  }
}

TEST_CASE("the version is the lowest one, by its numbers") {
  const auto lowest = [](const std::vector<std::string>& versions) {
    std::vector<std::string> pages;
    for (const std::string& version : versions) pages.push_back(R"({"version":")" + version + "\"}");
    return joined(PageKind::version, pages);
  };
  CHECK(lowest({"0.14.1"}) == R"({"version":"0.14.1"})");
  CHECK(lowest({"0.14.1", "0.9.10", "0.10.0"}) == R"({"version":"0.9.10"})");
  CHECK(lowest({"1.2", "1.2.0-rc1", "1.10"}) == R"({"version":"1.2"})");
  CHECK(lowest({"latest", "0.15.0"}) == R"({"version":"0.15.0"})");
  CHECK(lowest({}) == R"({"version":"0.0.0"})");
  CHECK(joined(PageKind::version, {"{}", "x", R"({"version":7})", ""}) == R"({"version":"0.0.0"})");
}
