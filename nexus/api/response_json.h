// response_json.h
// Owns:      reading what backends answer: token counts and model lists.
// Promises:  a count that is missing, negative or no integer reads as -1; nothing throws except a list of names that
//            finds no memory.
// Leaves:    finding a `usage` in a stream to usage_scan.h; asking for a model list to prober.h.
// Threads:   as its JsonReader.
// Tested by: tests/request_json_test.cpp, tests/fuzz/body.h
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/endpoints.h"
#include "nexus/api/json_reader.h"

namespace nexus {

// Token counts; -1 where the response has none.
struct Usage {
  std::int64_t prompt_tokens = -1;
  std::int64_t completion_tokens = -1;
  std::int64_t cached_tokens = -1;  // of prompt_tokens
  bool told() const { return prompt_tokens >= 0 || completion_tokens >= 0; }
};

namespace detail {

inline void read_count(JsonReader::Value& value, std::int64_t& count) {
  std::int64_t read = -1;
  if (!value.get_int64().get(read) && read >= 0) count = read;
}

inline void read_counts(JsonReader& json, const UsageNames& names, JsonReader::Object& object, Usage& usage) {
  json.each_member(object, [&](std::string_view key, JsonReader::Value value) {
    JsonReader::Object details;
    if (key == names.prompt) {
      read_count(value, usage.prompt_tokens);
    } else if (key == names.completion) {
      read_count(value, usage.completion_tokens);
    } else if (key == names.prompt_details && !value.get_object().get(details)) {
      json.each_member(details, [&](std::string_view detail, JsonReader::Value cached) {
        if (detail == names.cached) read_count(cached, usage.cached_tokens);
        return true;
      });
    }
    return true;
  });
}

// True if `text` ends with `"usage":`, and the first quote is not escaped.
inline bool ends_with_usage_key(std::string_view text) {
  constexpr std::string_view kKey = "\"usage\"";
  text = trim_json_end(text);
  if (!text.ends_with(':')) return false;
  text.remove_suffix(1);
  text = trim_json_end(text);
  return text.ends_with(kKey) && text.size() > kKey.size() && text[text.size() - kKey.size() - 1] != '\\';
}

// Reads a `usage` that is the last member and small, the usual case, from the end of the response. An object between
// `"usage":` and the brace that ends the text is a member of the outermost object, because JSON escapes quotes inside
// strings and braces pair. False if the response ends otherwise.
inline bool read_last_usage(JsonReader& json, const UsageNames& names, std::string_view text, Usage& usage) {
  constexpr std::size_t kTailBytes = 512;
  constexpr int kObjects = 4;  // that may begin in a usage: its details
  text = trim_json_end(text);
  if (!text.ends_with('}')) return false;
  text.remove_suffix(1);
  text.remove_prefix(text.size() - std::min(text.size(), kTailBytes));
  std::size_t at = text.size();
  for (int i = 0; i < kObjects; ++i) {
    const void* const brace = memrchr(text.data(), '{', at);
    if (brace == nullptr) return false;
    at = static_cast<std::size_t>(static_cast<const char*>(brace) - text.data());
    if (!ends_with_usage_key(text.substr(0, at))) continue;
    JsonReader::Object object;
    if (!json.open(text.substr(at), object)) return false;
    read_counts(json, names, object, usage);
    if (json.at_end()) return true;
    usage = Usage{};
    return false;
  }
  return false;
}

}  // namespace detail

// Reads a `usage` object.
inline Usage read_usage(JsonReader& json, const UsageNames& names, std::string_view text) {
  JsonReader::Object object;
  Usage usage;
  if (json.open(text, object)) detail::read_counts(json, names, object, usage);
  return usage;
}

// Reads the `usage` of a whole response; the last one counts, as in a stream.
inline Usage read_answer(JsonReader& json, const UsageNames& names, std::string_view text) {
  Usage usage;
  if (detail::read_last_usage(json, names, text, usage)) return usage;
  JsonReader::Object object;
  if (!json.open(text, object)) return usage;
  json.each_member(object, [&](std::string_view key, JsonReader::Value value) {
    JsonReader::Object counts;
    if (key != "usage" || value.get_object().get(counts)) return true;
    usage = Usage{};
    detail::read_counts(json, names, counts, usage);
    return true;
  });
  return usage;
}

enum class ModelList : std::uint8_t { read, none, out_of_memory };

// The shapes of a list: the member that holds it, and the member of each element that names a model.
struct ModelListShape {
  std::string_view list;
  std::string_view name;
};
inline constexpr std::array<ModelListShape, 2> kModelListShapes{{{"data", "id"},        // OpenAI
                                                                 {"models", "name"}}};  // Ollama

// Reads the names of a list in either shape, at most `most` of them; `more`: there are others. Each backend may use
// either shape, whatever its type: llama.cpp sends both.
inline ModelList read_models(JsonReader& json, std::string_view text, std::size_t most, std::vector<std::string>& names,
                             bool& more) {
  constexpr std::size_t kMaxNameBytes = 256;
  names.clear();
  more = false;
  JsonReader::Object object;
  if (!json.open(text, object)) return json.out_of_memory() ? ModelList::out_of_memory : ModelList::none;
  ModelList result = ModelList::none;
  const auto read_list = [&](simdjson::ondemand::array list, std::string_view key) {
    for (auto element : list) {
      JsonReader::Object model;
      JsonReader::Value found;
      std::string_view name;
      if (element.get_object().get(model) || model.find_field_unordered(key).get(found)) return ModelList::none;
      if (!json.read_name(found, name)) return ModelList::none;
      if (name.empty() || name.size() > kMaxNameBytes) continue;
      more = names.size() == most;
      if (more) break;
      names.emplace_back(name);
    }
    return ModelList::read;
  };
  json.each_member(object, [&](std::string_view key, JsonReader::Value value) {
    const auto* const shape = std::find_if(kModelListShapes.begin(), kModelListShapes.end(),
                                           [key](const ModelListShape& row) { return row.list == key; });
    if (shape == kModelListShapes.end()) return true;
    simdjson::ondemand::array list;
    if (!value.get_array().get(list)) result = read_list(list, shape->name);
    return false;
  });
  return result;
}

}  // namespace nexus
