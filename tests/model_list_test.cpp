// model_list_test.cpp
// Goal:   what can be read of a backend's list of models is read, and an entry goes on as the backend wrote it.
// Method: rows of answers, and the names and entries that come out.
#include "nexus/api/model_list.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using namespace nexus;

namespace {

using Names = std::vector<std::string>;

ModelList read(std::string text, std::size_t most = 100) {
  static JsonReader reader;
  const std::size_t bytes = text.size();
  text.append(kPaddingBytes, '\0');
  return read_models(reader, std::string_view(text.data(), bytes), most);
}

bool is_read(const ModelList& list) { return list.status == ModelList::Status::read; }

Names names(const ModelList& list) {
  Names out;
  for (const ListedModel& model : list.models) out.push_back(model.name);
  return out;
}

std::string entry(const std::string& element, std::string_view name = "m") {
  const ModelList list = read(R"({"data":[)" + element + "]}");
  std::string out;
  append_openai_model(out, name, list.models.empty() ? nullptr : &list.models[0], "b1");
  return out;
}

const std::string kPlain = R"({"id":"m","object":"model","created":0,"owned_by":"b1"})";

}  // namespace

TEST_CASE("a list of models names them, in either form") {
  const std::string long_name(kMaxModelNameBytes, 'n');
  struct Row {
    std::string text;
    Names names;
    std::size_t unreadable = 0;
  };
  const Row rows[] = {
      {R"({"object":"list","data":[{"id":"a","object":"model"},{"object":"model","id":"b:7b"}]})", {"a", "b:7b"}},
      {R"({"models":[{"name":"x","model":"y"},{"name":"z\u00e9"}]})", {"x", "z\xc3\xa9"}},
      {R"({"data":[]})", {}},
      {R"({"models":[{"name":"file.gguf"}],"object":"list","data":[{"id":"alias"}]})", {"alias"}},  // llama.cpp
      {R"({"models":[{"name":"a"}],"data":null})", {"a"}},
      {R"({"data":[null,{"id":"a"}]})", {"a"}, 1},
      {R"({"data":[7,"x",[],{},{"id":7},{"id":""},{"id":"a"},{"id":null}]})", {"a"}, 7},
      {R"({"data":[{"id":")" + long_name + R"("}]})", {long_name}},
      {R"({"data":[{"id":")" + long_name + R"(n"},{"id":"a"}]})", {"a"}, 1},
  };
  for (const Row& row : rows) {
    CAPTURE(row.text);
    const ModelList list = read(row.text);
    CHECK(is_read(list));
    CHECK(names(list) == row.names);
    CHECK(list.unreadable == row.unreadable);
  }
  for (const char* text :
       {"", "[]", "{}", R"({"data":null})", R"({"data":{}})", R"({"data":["a"]})", R"({"data":[{}]})",
        R"({"data":[null]})", R"({"data":[{"id":7}]})", R"({"data":[{"id":"a"})", "<html>"}) {
    CAPTURE(text);
    CHECK_FALSE(is_read(read(text)));
  }
}

TEST_CASE("a list may be an array alone") {
  CHECK(names(read(R"( [{"id":"a","object":"model"},{"id":"b"}])")) == Names{"a", "b"});
}

TEST_CASE("a list of models ends where its bound is") {
  const std::string text = R"({"data":[{"id":"a"},{"id":"b"},{"id":"c"}]})";
  const ModelList two = read(text, 2);
  CHECK(is_read(two));
  CHECK(names(two) == Names{"a", "b"});
  CHECK(two.more);
  const ModelList three = read(text, 3);
  CHECK(three.models.size() == 3);
  CHECK_FALSE(three.more);
}

TEST_CASE("a model's own entry is passed on byte for byte, and gets an owner only if it has none") {
  struct Row {
    const char *element, *expected;
  };
  const Row rows[] = {
      {R"({"id":"m","created":17.50,"owned_by":"vllm","max_model_len":4096})",
       R"({"id":"m","created":17.50,"owned_by":"vllm","max_model_len":4096})"},
      {R"( { "meta" : {"n_ctx":[1, 2]}, "id" : "m" } )",
       R"({"owned_by":"b1", "meta" : {"n_ctx":[1, 2]}, "id" : "m" })"},
      {R"({"id":"m","owned_by":null})", R"({"id":"m","owned_by":null})"},
      {R"({"x":"\u00e9 \"id\":","id":"\u006d"})", R"({"owned_by":"b1","x":"\u00e9 \"id\":","id":"\u006d"})"},
  };
  for (const Row& row : rows) CHECK(entry(row.element) == row.expected);
  CHECK(entry(R"({"a":1,"id":"m","z":{"id":"m"}})", "al\"ias") ==
        R"({"owned_by":"b1","a":1,"id":"al\"ias","z":{"id":"m"}})");
}

TEST_CASE("an entry that is no valid JSON, or too large, is replaced by a plain one") {
  for (const char* element : {R"({"id":"m","x":tru})", R"({"id":"m","x":01})", R"({"id":"m","x":"\ud800"})",
                              R"({"id":"m","x":[1,,2]})", R"({"id":"m" "x":1})"}) {
    CAPTURE(element);
    const std::string out = entry(element);
    CHECK(out == kPlain);
  }
  const auto of_bytes = [](std::size_t bytes) {
    const std::string begin = R"({"id":"m","owned_by":"x","pad":")";
    return begin + std::string(bytes - begin.size() - 2, 'p') + "\"}";
  };
  CHECK(entry(of_bytes(kMaxModelEntryBytes)) == of_bytes(kMaxModelEntryBytes));
  CHECK(entry(of_bytes(kMaxModelEntryBytes + 1)) == kPlain);
  std::string many;
  const std::size_t fit = kMaxModelEntriesBytes / kMaxModelEntryBytes;
  for (std::size_t i = 0; i <= fit; ++i) many += (i > 0 ? "," : "") + of_bytes(kMaxModelEntryBytes);
  const ModelList list = read(R"({"data":[)" + many + "]}", 10'000);
  CHECK(list.shortened);
  REQUIRE(list.models.size() == fit + 1);
  CHECK(list.models[fit - 1].entry.size() == kMaxModelEntryBytes);
  CHECK(list.models[fit].entry.empty());
  CHECK(entry(R"(null)") == kPlain);
}
