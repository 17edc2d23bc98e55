// request_json.h
// Owns:      reading a request body: its model, whether it streams, what it needs of a backend, where its values lie.
// Promises:  one pass over the bytes where they were received, without a copy; a key that Nexus reads may occur once
//            only, because a backend might read the other one; nothing throws.
// Leaves:    bodies that are read while they arrive to incremental_json.h; the answer to a refused body to errors.h.
// Threads:   as its JsonReader.
// Tested by: tests/request_json_test.cpp, tests/fuzz/body.h
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "nexus/api/endpoints.h"
#include "nexus/api/errors.h"
#include "nexus/api/json_reader.h"
#include "nexus/base/limits.h"
#include "nexus/base/simd.h"

namespace nexus {

// A part of a body, counted from its first byte.
struct BodySpan {
  std::size_t at = 0;
  std::size_t bytes = 0;
};

struct BodyFacts {
  enum class Options : std::uint8_t { absent, null, object };
  enum class Flag : std::uint8_t { absent, no, yes, null };

  std::string_view model;        // unescaped
  BodySpan model_value;          // with its quotes
  bool model_is_json = true;     // else it has no quotes: it stands in a form
  std::size_t first_member = 0;  // behind the `{` of the body
  bool stream = false;           // it asks for a stream, and the endpoint has streams
  Options stream_options = Options::absent;
  BodySpan stream_options_value;
  bool stream_options_empty = true;  // an object without members
  Flag include_usage = Flag::absent;
  BodySpan include_usage_value;
  BodySpan continuous_usage_value;  // its `true`: vLLM then adds usage to each chunk, if include_usage is true too
  bool has_tools = false;
  bool json_mode = false;
  bool has_images = false;
  bool background = false;               // the answer comes at once, and the work goes on
  BodyKey session_key = BodyKey::other;  // of the member that names the session
  BodySpan session_value;                // with its quotes
  BodyKey turns_key = BodyKey::other;    // of a conversation; here and below, the last member of the kind counts
  BodySpan turns_value;
  BodyKey system_key = BodyKey::other;
  BodySpan system_value;
  std::uint64_t continues = 0;  // the hash of the response's id that it continues; 0: none

  void note(Need need) { (need == Need::images ? has_images : json_mode) = true; }
};

// True if the body has the mark of an image anywhere: for a body that was read without looking for them.
inline bool mentions_images(const Endpoint& endpoint, std::string_view body) {
  return std::any_of(endpoint.row().marks.begin(), endpoint.row().marks.end(), [&](const NeedMark& row) {
    return row.need == Need::images && row.mark.size() > 1 && body.find(row.mark) != std::string_view::npos;
  });
}

// True if the text nests arrays and objects deeper than `limit`. Fast if it has few brackets, as most bodies have.
// Behind the text kBlockBytes must be readable.
inline bool nests_deeper(std::string_view text, std::size_t limit) {
  if (text.size() <= limit) return false;
  std::size_t brackets = 0;  // that open, those in strings included
  for (std::size_t at = 0; at < text.size(); at += kBlockBytes) {
    const std::uint64_t open = ByteBlock(text.data() + at).bracket('[');
    if (open == 0) continue;
    brackets += static_cast<std::size_t>(std::popcount(open & low_bits(std::min(kBlockBytes, text.size() - at))));
  }
  if (brackets <= limit) return false;
  std::size_t depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > limit) return true;
    } else if (c == ']' || c == '}') {
      depth -= depth > 0 ? 1 : 0;
    }
  }
  return false;
}

// True if `name` stands for the model in a body without `model`.
inline bool may_say_name(const Endpoint& endpoint) { return endpoint.path == "/api/show"; }

namespace detail {

// One pass over one body.
class BodyPass {
 public:
  using Value = JsonReader::Value;
  using Type = simdjson::ondemand::json_type;

  BodyPass(JsonReader& json, const Endpoint& endpoint, std::string_view body, BodyFacts& facts, bool find_images)
      : json_(json), endpoint_(endpoint), body_(body), facts_(facts), find_images_(find_images) {}

  std::optional<ApiError> read() {
    facts_ = BodyFacts{};
    if (nests_deeper(body_, kMaxJsonDepth)) return ApiError::too_deep;
    // A byte order mark is no JSON (RFC 8259 8.1), though simdjson would skip it.
    if (begins_with(body_, "\xef\xbb\xbf")) return ApiError::bad_json;
    JsonReader::Object object;
    if (!json_.open(body_, object)) {
      return json_.out_of_memory() ? ApiError::out_of_memory : ApiError::bad_json;
    }
    while (body_[facts_.first_member++] != '{') {
    }
    if (!read_members(object, BodyKey::none)) return error_;
    if (!json_.at_end()) return ApiError::bad_json;
    if (endpoint_.model == Model::required && !seen_[index_of(BodyKey::model)]) return read_old_name();
    facts_.stream = endpoint_.streams == Streams::if_asked
                        ? stream_ == BodyFacts::Flag::yes
                        : endpoint_.streams == Streams::unless_refused && stream_ != BodyFacts::Flag::no;
    return std::nullopt;
  }

 private:
  bool read_members(JsonReader::Object& object, BodyKey within) {
    return json_.each_member(object, [&](std::string_view name, Value& value) {
      if (within == BodyKey::stream_options) facts_.stream_options_empty = false;
      const BodyKey key = find_body_key(name, within);
      if (key == BodyKey::other) return true;
      if (std::exchange(seen_[index_of(key)], true)) return fail(ApiError::duplicate_key);
      return read_member(key, value);
    });
  }

  bool read_member(BodyKey key, Value& value) {
    switch (key) {
      case BodyKey::model: return read_model(value);
      case BodyKey::stream: return read_flag(value, stream_);
      case BodyKey::include_usage:
        facts_.include_usage_value = span_of(value.raw_json_token());
        return read_flag(value, facts_.include_usage);
      case BodyKey::continuous_usage_stats: {
        const BodySpan span = span_of(value.raw_json_token());
        bool yes = false;
        if (!value.get_bool().get(yes) && yes) facts_.continuous_usage_value = span;
        return true;
      }
      case BodyKey::tools: return read_tools(value);
      case BodyKey::stream_options: return read_stream_options(value);
      case BodyKey::background: return read_background(value);
      case BodyKey::previous_response_id: return read_id(value);
      case BodyKey::prompt_cache_key:
      case BodyKey::session_id:
      case BodyKey::user_id: note_session(key, value.raw_json_token()); return true;
      case BodyKey::metadata: return read_metadata(value);
      default: return read_needs(key, value);
    }
  }

  bool read_model(Value& value) {
    Type type{};
    if (!read_type(value, type)) return false;
    if (type == Type::null && endpoint_.model == Model::optional) return true;
    if (type != Type::string) return fail(ApiError::wrong_type);
    facts_.model_value = span_of(value.raw_json_token());
    if (!json_.read_name(value, facts_.model)) return fail(ApiError::bad_json);
    return !facts_.model.empty() || fail(ApiError::no_model);
  }

  // Clients of Ollama's first versions name the model that they want shown `name` (ShowRequest of its api/types.go).
  [[gnu::cold]] std::optional<ApiError> read_old_name() {
    JsonReader::Object object;
    if (!may_say_name(endpoint_) || !json_.open(body_, object)) return ApiError::no_model;
    const auto read = [&](std::string_view name, Value& value) { return name != "name" || read_model(value); };
    if (!json_.each_member(object, read)) return error_;
    return facts_.model.empty() ? std::optional(ApiError::no_model) : std::nullopt;
  }

  bool read_flag(Value& value, BodyFacts::Flag& flag) {
    Type type{};
    bool yes = false;
    if (!read_type(value, type)) return false;
    const bool is_null = type == Type::null;
    if (!is_null && value.get_bool().get(yes)) return fail(ApiError::wrong_type);
    flag = is_null ? BodyFacts::Flag::null : yes ? BodyFacts::Flag::yes : BodyFacts::Flag::no;
    return true;
  }

  bool read_type(Value& value, Type& type) { return !value.type().get(type) || fail(ApiError::bad_json); }

  // Anything but an array is left to the backend to refuse.
  bool read_tools(Value& value) {
    simdjson::ondemand::array tools;
    bool empty = true;
    if (value.get_array().get(tools)) return true;
    if (tools.is_empty().get(empty)) return fail(ApiError::bad_json);
    facts_.has_tools = !empty;
    return true;
  }

  // Anything but a boolean or a text is left to the backend to refuse.
  bool read_background(Value& value) {
    bool yes = false;
    if (!value.get_bool().get(yes)) facts_.background = yes;
    return true;
  }
  bool read_id(Value& value) {
    std::string_view id;
    if (!json_.read_word(value, id)) return true;
    facts_.continues = hash_of(id);
    return true;
  }

  // Anything but a string names no session, and is left to the backend to refuse.
  void note_session(BodyKey key, std::string_view token) {
    if (!token.starts_with('"') || key >= facts_.session_key) return;
    facts_.session_key = key;
    facts_.session_value = span_of(token);
  }
  bool read_metadata(Value& value) {
    JsonReader::Object object;
    return value.get_object().get(object) || read_members(object, BodyKey::metadata);
  }

  bool read_needs(BodyKey key, Value& value) {
    std::string_view text;
    if (endpoint_.streams != Streams::never && (is_turns(key) || is_system(key))) {
      if (value.raw_json().get(text)) return fail(ApiError::bad_json);
      (is_turns(key) ? facts_.turns_key : facts_.system_key) = key;
      (is_turns(key) ? facts_.turns_value : facts_.system_value) = span_of(text);
    }
    for (const NeedMark& row : endpoint_.row().marks) {
      if (row.within != key || row.mark.empty() || (row.need == Need::images && !find_images_)) continue;
      if (text.empty() && value.raw_json().get(text)) return fail(ApiError::bad_json);
      if (text.find(row.mark) != std::string_view::npos) facts_.note(row.need);
    }
    return true;
  }

  bool read_stream_options(Value& value) {
    Type type{};
    if (!read_type(value, type)) return false;
    if (type == Type::null) {
      facts_.stream_options = BodyFacts::Options::null;
      facts_.stream_options_value = span_of(value.raw_json_token());
      return true;
    }
    JsonReader::Object object;
    std::string_view text;
    if (value.get_object().get(object)) return fail(ApiError::wrong_type);
    if (object.raw_json().get(text)) return fail(ApiError::bad_json);
    facts_.stream_options = BodyFacts::Options::object;
    facts_.stream_options_value = span_of(text);
    if (object.reset().error()) return fail(ApiError::bad_json);
    return read_members(object, BodyKey::stream_options);
  }

  bool fail(ApiError error) {
    error_ = error;
    return false;
  }

  BodySpan span_of(std::string_view text) const {
    return {static_cast<std::size_t>(text.data() - body_.data()), trim_json_end(text).size()};
  }

  JsonReader& json_;
  const Endpoint& endpoint_;
  std::string_view body_;
  BodyFacts& facts_;
  bool find_images_;
  BodyFacts::Flag stream_ = BodyFacts::Flag::absent;
  ApiError error_ = ApiError::bad_json;  // the reason where a read function returns false
  std::array<bool, kBodyKeys.size()> seen_{};
};

}  // namespace detail

// Reads the body of a request to `endpoint`; returns the error if it is refused. Behind its last byte kPaddingBytes
// must be readable. `find_images`: facts.has_images is wanted.
inline std::optional<ApiError> read_body(JsonReader& json, const Endpoint& endpoint, std::string_view body,
                                         BodyFacts& facts, bool find_images = true) {
  return detail::BodyPass(json, endpoint, body, facts, find_images).read();
}

}  // namespace nexus
