// model_list.h
// Owns:     reading the list of models that a backend gives, and the entry of each model in /v1/models.
// Promises: an entry that is kept is valid JSON, byte for byte as the backend sent it, and has the model's name where
//           `name_at` says; elements that can't be read are left out and counted; nothing throws but std::bad_alloc.
// Leaves:   asking for the list to prober.h, keeping it to registry.h, merging the lists to server/builtin_pages.h.
// Threads:  as its JsonReader.
// Tested by: tests/model_list_test.cpp, tests/fuzz/body.h
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/json_reader.h"
#include "nexus/base/limits.h"
#include "nexus/base/text_buffer.h"

namespace nexus {

struct ListedModel {
  std::string name;
  std::string entry;          // the backend's own object; empty: none that could be kept
  std::uint32_t name_at = 0;  // the name's place in `entry`, with its quotes
  std::uint32_t name_bytes = 0;
  bool has_owner = false;  // `entry` has an `owned_by`
  bool is_openai = false;  // `entry` has OpenAI's shape, not Ollama's

  bool operator==(const ListedModel&) const = default;
};

using ListedModels = std::vector<ListedModel>;

struct ModelList {
  enum class Status : std::uint8_t { read, none, out_of_memory };
  Status status = Status::none;
  ListedModels models;
  bool more = false;           // there are more models than asked for
  std::size_t unreadable = 0;  // elements without a name
  bool shortened = false;      // not all entries could be kept
};

namespace detail {

// The shapes of a list: the member that holds it, and the member of each element that names a model. If a response has
// both (llama.cpp), the first row's is read.
struct ModelListShape {
  std::string_view list;
  std::string_view name;
  bool is_openai;
};
inline constexpr std::array<ModelListShape, 2> kModelListShapes{{{"data", "id", true}, {"models", "name", false}}};

// Reads one element. False if its JSON is broken.
inline bool read_model(JsonReader& json, simdjson::simdjson_result<JsonReader::Value> element,
                       const ModelListShape& shape, std::size_t& entry_bytes, ModelList& list) {
  JsonReader::Object object;
  JsonReader::Value id;
  std::string_view name;
  if (element.error()) return false;
  if (element.get_object().get(object)) return ++list.unreadable, true;
  const auto found = object.find_field_unordered(shape.name).get(id);
  if (found) return ++list.unreadable, found == simdjson::NO_SUCH_FIELD;
  const std::string_view token = trim_json_end(id.raw_json_token());
  if (!json.read_name(id, name) || name.empty() || name.size() > kMaxModelNameBytes) return ++list.unreadable, true;
  ListedModel& model = list.models.emplace_back();
  model.name = name;
  model.is_openai = shape.is_openai;
  model.has_owner = shape.is_openai && object.find_field_unordered("owned_by").error() == simdjson::SUCCESS;
  std::string_view text;
  if (object.reset().error() || object.raw_json().get(text)) return list.models.pop_back(), false;
  text = trim_json_end(text);
  const bool fits = text.size() <= std::min(kMaxModelEntryBytes, kMaxModelEntriesBytes - entry_bytes);
  if (!fits || !json.is_valid(text)) return list.shortened = true;
  model.entry = text;
  model.name_at = static_cast<std::uint32_t>(token.data() - text.data());
  model.name_bytes = static_cast<std::uint32_t>(token.size());
  entry_bytes += text.size();
  return true;
}

inline void read_elements(JsonReader& json, simdjson::ondemand::array elements, const ModelListShape& shape,
                          std::size_t most, ModelList& list) {
  list = {};
  std::size_t entry_bytes = 0;
  for (auto element : elements) {
    list.more = list.models.size() == most;
    if (list.more) break;
    if (!read_model(json, element, shape, entry_bytes, list)) return;
  }
  if (!list.models.empty() || list.unreadable == 0) list.status = ModelList::Status::read;
}

}  // namespace detail

// Reads at most `most` models of a list in either shape. Each backend may use either, whatever its type; Together AI's
// is the array alone.
inline ModelList read_models(JsonReader& json, std::string_view text, std::size_t most) {
  ModelList list;
  if (const std::size_t at = text.find_first_not_of(" \t\r\n"); at != std::string_view::npos && text[at] == '[') {
    std::string object;
    object.reserve(text.size() + 16 + kPaddingBytes);
    object.append(R"({"data":)").append(text) += '}';
    list = read_models(json, object, most);
    return list.models.empty() ? ModelList() : list;
  }
  JsonReader::Object object;
  if (!json.open(text, object)) {
    if (json.out_of_memory()) list.status = ModelList::Status::out_of_memory;
    return list;
  }
  json.each_member(object, [&](std::string_view key, JsonReader::Value value) {
    const auto* const shape = std::find_if(detail::kModelListShapes.begin(), detail::kModelListShapes.end(),
                                           [key](const detail::ModelListShape& row) { return row.list == key; });
    simdjson::ondemand::array elements;
    const bool has_read = list.status == ModelList::Status::read;
    if (shape == detail::kModelListShapes.end() || (has_read && !shape->is_openai)) return true;
    if (value.get_array().get(elements)) return true;
    detail::read_elements(json, elements, *shape, most, list);
    return !shape->is_openai;
  });
  return list;
}

// The shapes in which Nexus lists models.
enum class ModelListKind : std::uint8_t { openai, anthropic, ollama };
constexpr std::size_t kModelListKinds = 3;

// Appends the object that a list has for the model under `name`. `model`: as the backend lists it, or null. An entry
// of the list's shape is passed on, but Anthropic's are all alike: no backend needs more.
inline void append_anthropic_model(std::string& out, std::string_view name) {
  JsonWriter json(out);
  json.begin_object().field("type", "model").field("id", name).field("display_name", name);
  json.field("created_at", "1970-01-01T00:00:00Z").end_object();
}
inline void append_ollama_model(std::string& out, std::string_view name, const ListedModel* model) {
  if (model != nullptr && !model->is_openai && !model->entry.empty() && model->name == name) {
    out += model->entry;
    return;
  }
  JsonWriter json(out);
  json.begin_object().field("name", name).field("model", name).field("modified_at", "1970-01-01T00:00:00Z");
  json.field("size", 0).field("digest", "").key("details").begin_object().field("format", "").field("family", "");
  json.key("families").literal("null").field("parameter_size", "").field("quantization_level", "").end_object();
  json.end_object();
}

inline void append_openai_model(std::string& out, std::string_view name, const ListedModel* model,
                                std::string_view backend) {
  if (model == nullptr || model->entry.empty() || !model->is_openai) {
    JsonWriter json(out);
    json.begin_object().field("id", name).field("object", "model").field("created", 0).field("owned_by", backend);
    json.end_object();
    return;
  }
  const std::string_view entry = model->entry;
  const std::size_t name_end = std::size_t{model->name_at} + model->name_bytes;
  out += '{';
  if (!model->has_owner) out.append("\"owned_by\":").append(json_string(backend)).append(",");
  out += entry.substr(1, model->name_at - 1);
  name == model->name ? out += entry.substr(model->name_at, model->name_bytes) : out += json_string(name);
  out += entry.substr(name_end);
}

}  // namespace nexus
