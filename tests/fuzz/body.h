// body.h
// Owns:     the fuzz targets of reading JSON: a request's body, and a list of models.
// Promises: in a body that is JSON, every fact equals what plain_json.h reads, and each span holds its value; a body
//           that is refused is not JSON or has the reported fault.
// Leaves:   the edits made with the spans to exchange.h.
// Threads:  one.
#pragma once

#include "nexus/api/json_reader.h"
#include "nexus/api/model_list.h"
#include "nexus/api/request_json.h"
#include "tests/fuzz/fuzz.h"
#include "tests/lib/plain_json.h"

namespace fuzz {

inline nexus::JsonReader& json_reader() {
  static nexus::JsonReader reader;
  return reader;
}

using Kind = plain_json::Value::Kind;

inline bool is_flag(Kind kind) { return kind == Kind::no || kind == Kind::yes || kind == Kind::null; }

// The faults of a request's body as plain_json.h reads it. If there are several, Nexus may report any of them.
struct WantedBody {
  bool duplicate = false, no_model = false, wrong_type = false;
  bool faulty() const { return duplicate || no_model || wrong_type; }
};

inline WantedBody wanted_of(const plain_json::Value& body) {
  WantedBody wanted;
  for (const char* key : {"model", "stream", "stream_options", "messages", "tools", "response_format"}) {
    wanted.duplicate |= body.count(key) > 1;
  }
  const plain_json::Value* model = body.find("model");
  wanted.no_model = model == nullptr;
  for (const auto& [key, value] : body.members) {
    if (key == "model" && value.kind != Kind::text) wanted.wrong_type = true;
    if (key == "model" && value.kind == Kind::text && value.text.empty()) wanted.no_model = true;
    if (key == "stream" && !is_flag(value.kind)) wanted.wrong_type = true;
    if (key != "stream_options") continue;
    if (value.kind != Kind::object && value.kind != Kind::null) wanted.wrong_type = true;
    wanted.duplicate |= value.count("include_usage") > 1 || value.count("continuous_usage_stats") > 1;
    for (const auto& [option, flag] : value.members) {
      if (option == "include_usage" && !is_flag(flag.kind)) wanted.wrong_type = true;
    }
  }
  return wanted;
}

inline void check_span(std::string_view body, const nexus::BodySpan& span, const plain_json::Value& value,
                       const char* what) {
  check(span.at == value.at && span.bytes == value.bytes,
        std::string("the span of ") + what + " holds " + std::string(body.substr(span.at, span.bytes)));
}

inline void check_facts(std::string_view text, const plain_json::Value& body, const nexus::BodyFacts& facts) {
  using Facts = nexus::BodyFacts;
  check(facts.model == body.find("model")->text, "the models differ");
  check_span(text, facts.model_value, *body.find("model"), "model");
  check(facts.first_member == body.at + 1, "the first member is elsewhere");
  const plain_json::Value* stream = body.find("stream");
  check(facts.stream == (stream != nullptr && stream->kind == Kind::yes), "stream differs");
  const plain_json::Value* tools = body.find("tools");
  check(facts.has_tools == (tools != nullptr && tools->kind == Kind::list && !tools->items.empty()), "tools differ");
  const plain_json::Value* options = body.find("stream_options");
  if (options == nullptr) return check(facts.stream_options == Facts::Options::absent, "stream_options made up");
  check_span(text, facts.stream_options_value, *options, "stream_options");
  const bool object = options->kind == Kind::object;
  check(facts.stream_options == (object ? Facts::Options::object : Facts::Options::null), "stream_options differ");
  if (object) check(facts.stream_options_empty == options->members.empty(), "empty stream_options differ");
  const plain_json::Value* continuous = options->find("continuous_usage_stats");
  if (continuous != nullptr && continuous->kind == Kind::yes) {
    check_span(text, facts.continuous_usage_value, *continuous, "continuous_usage_stats");
  } else {
    check(facts.continuous_usage_value.bytes == 0, "continuous_usage_stats made up");
  }
  const plain_json::Value* usage = options->find("include_usage");
  if (usage == nullptr) return check(facts.include_usage == Facts::Flag::absent, "include_usage made up");
  check_span(text, facts.include_usage_value, *usage, "include_usage");
  check(facts.include_usage == (usage->kind == Kind::yes  ? Facts::Flag::yes
                                : usage->kind == Kind::no ? Facts::Flag::no
                                                          : Facts::Flag::null),
        "include_usage differs");
}

inline void request_body(std::string_view input) {
  Guarded copy(input, nexus::kPaddingBytes);
  nexus::BodyFacts facts;
  const auto error = nexus::read_body(json_reader(), nexus::kEndpoints[0], copy.view(), facts);
  check(copy.view() == input, "the body was changed");
  plain_json::Reader plain(input);
  const auto body = plain.read();
  if (!body || body->kind != Kind::object) return;  // Nexus may forward it; the backend refuses it
  if (plain.deepest() > nexus::kMaxJsonDepth)
    return check(error == nexus::ApiError::too_deep, "not reported as too deep");
  const WantedBody wanted = wanted_of(*body);
  if (!error) {
    check(!wanted.faulty(), "a fault was passed over");
    return check_facts(input, *body, facts);
  }
  switch (*error) {
    case nexus::ApiError::duplicate_key: return check(wanted.duplicate, "no key stands twice");
    case nexus::ApiError::no_model: return check(wanted.no_model, "there is a model");
    case nexus::ApiError::wrong_type: return check(wanted.wrong_type, "the types are right");
    case nexus::ApiError::too_deep: return check(false, "it is not too deep");
    case nexus::ApiError::bad_json: return check(false, "it is JSON");
    case nexus::ApiError::out_of_memory: return;
    default: return check(false, "not an error of a body");
  }
}

// One list, read as nexus::read_models() should: the names, and if they are a list of models.
struct PlainList {
  std::vector<std::string> names;
  std::size_t unreadable = 0;
  bool more = false;
  bool read() const { return !names.empty() || unreadable == 0; }
};

inline PlainList plain_model_list(const plain_json::Value& list, const std::string& key, std::size_t most) {
  PlainList plain;
  for (const plain_json::Value& item : list.items) {
    plain.more = plain.names.size() == most;
    if (plain.more) break;
    const plain_json::Value* name = nullptr;
    for (const auto& [member, value] : item.members) {
      if (member == key && name == nullptr) name = &value;
    }
    if (name == nullptr || name->kind != Kind::text || name->text.empty() || name->text.size() > 256) {
      plain.unreadable += 1;
    } else {
      plain.names.push_back(name->text);
    }
  }
  return plain;
}

inline void model_list(std::string_view input) {
  Guarded copy(input, nexus::kPaddingBytes);
  constexpr std::size_t kMost = 5;
  const nexus::ModelList found = nexus::read_models(json_reader(), copy.view(), kMost);
  const bool read = found.status == nexus::ModelList::Status::read;
  check(found.models.size() <= kMost, "more names than asked for");
  std::vector<std::string> names;
  for (const nexus::ListedModel& model : found.models) {
    names.push_back(model.name);
    check(!model.name.empty() && model.name.size() <= 256, "a name out of its bounds");
    for (const std::string_view name : {std::string_view(model.name), std::string_view("other")}) {
      std::string entry;
      nexus::append_openai_model(entry, name, &model, "b");
      const auto shown = plain_json::read(entry);
      check(shown && shown->kind == Kind::object, "an entry that is no JSON object");
      bool named = false;
      for (const auto& [member, value] : shown->members) named |= member == "id" && value.text == name;
      check(named, "an entry without its name");
    }
  }
  const auto body = plain_json::read(input);
  if (!body || body->kind != Kind::object || plain_json::Reader(input).deepest() > 500) return;
  PlainList wanted;
  bool is_list = false, by_id = false;
  for (const auto& [name, value] : body->members) {
    if ((name != "data" && name != "models") || value.kind != Kind::list || by_id) continue;
    if (is_list && name == "models") continue;  // the first of them, until there is one of OpenAI's shape
    by_id = name == "data";
    wanted = plain_model_list(value, by_id ? "id" : "name", kMost);
    is_list = wanted.read();
  }
  check(read == is_list, "only one reader takes it for a list of models");
  if (read) check(names == wanted.names && found.more == wanted.more, "the names differ");
}

}  // namespace fuzz
