// response_json.h
// Owns:      reading the token counts that backends answer.
// Promises:  a count that is missing, negative, too large or no whole number reads as -1; nothing throws.
// Leaves:    finding a `usage` in a stream to usage_scan.h; lists of models to model_list.h.
// Threads:   as its JsonReader.
// Tested by: tests/request_json_test.cpp, tests/fuzz/body.h
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "nexus/api/endpoints.h"
#include "nexus/api/json_reader.h"
#include "nexus/base/limits.h"

namespace nexus {

// Token counts; -1 where the response has none.
struct Usage {
  std::int64_t prompt_tokens = -1;
  std::int64_t completion_tokens = -1;
  std::int64_t cached_tokens = -1;  // of prompt_tokens
  bool told() const { return prompt_tokens >= 0 || completion_tokens >= 0; }
};

namespace detail {

// An integer, also one that is written as a fraction (11.0), up to kMaxTokenCount.
inline void read_count(JsonReader::Value& value, std::int64_t& count) {
  std::int64_t read = -1;
  double number = -1;
  if (value.get_int64().get(read) && !value.get_double().get(number) && number >= 0 &&
      number <= static_cast<double>(kMaxTokenCount)) {
    read = static_cast<std::int64_t>(number);
    if (static_cast<double>(read) != number) return;
  }
  if (read >= 0 && read <= kMaxTokenCount) count = read;
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

}  // namespace nexus
