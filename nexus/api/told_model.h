// told_model.h
// Owns:     finding the name of the model that answered, as a response tells it: the `model` of its outermost
//           object, or of the dialect's wrapper.
// Promises: reads one piece of a body and keeps nothing. Empty if the piece does not tell it: it holds no object, or
//           the object is cut before its model, or within a text that goes on in the next piece.
// Leaves:   which pieces to look at to response_relay.h.
// Threads:  one at a time for a JsonReader.
// Tested by: tests/told_model_test.cpp, tests/e2e/trace.test.mjs
#pragma once

#include <algorithm>
#include <string_view>

#include "nexus/api/dialects.h"
#include "nexus/api/json_reader.h"

namespace nexus {

namespace detail {

// Returns true until it has read the name.
inline bool read_model(JsonReader& json, std::string_view key, JsonReader::Value& value, std::string_view& name) {
  return key != "model" || !json.read_name(value, name);
}

inline std::string_view model_of_object(JsonReader& json, const ResponseShape& shape, std::string_view text) {
  JsonReader::Object object;
  std::string_view name;
  if (!json.open(text, object)) return {};
  json.each_member(object, [&](std::string_view key, JsonReader::Value value) {
    JsonReader::Object wrapped;
    if (key.empty() || key != shape.wrapper || value.get_object().get(wrapped))
      return read_model(json, key, value, name);
    return json.each_member(wrapped, [&](std::string_view inner, JsonReader::Value inner_value) {
      return read_model(json, inner, inner_value, name);
    });
  });
  return name;
}

}  // namespace detail

// `piece`: the first bytes of a body, or of a later part of a stream that begins with an event or a line; behind it
// kPaddingBytes must be readable. `stream`: it is one, of events or of lines, and its first object is read. The name
// lasts until `json` is used again.
inline std::string_view told_model(JsonReader& json, const ResponseShape& shape, bool stream, std::string_view piece) {
  if (!stream) return detail::model_of_object(json, shape, piece);
  while (!piece.empty()) {
    std::string_view line = piece.substr(0, piece.find('\n'));
    piece.remove_prefix(std::min(line.size() + 1, piece.size()));
    if (line.starts_with("data:")) line.remove_prefix(std::string_view("data:").size());
    while (line.starts_with(' ')) line.remove_prefix(1);
    if (line.starts_with('{')) return detail::model_of_object(json, shape, line);
  }
  return {};
}

}  // namespace nexus
