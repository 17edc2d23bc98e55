// endpoints.h
// Owns:      the table of proxied endpoints, and the table of the request members that Nexus reads.
// Promises:  a new endpoint whose framing, usage and error shape are known takes one row and no other change.
// Leaves:    reading requests to request_json.h, responses to json_reader.h, error bodies to errors.h.
// Threads:   any; constant.
// Tested by: tests/request_json_test.cpp, tests/e2e/endpoints.test.mjs
#pragma once

#include <llhttp.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "nexus/base/limits.h"
#include "nexus/base/simd.h"

namespace nexus {

// The members of a request's JSON object that Nexus reads.
enum class BodyKey : std::uint8_t {
  model,
  tools,
  stream,
  messages,
  stream_options,
  response_format,
  include_usage,
  continuous_usage_stats,
  type,
  other,  // any other member
  none,   // not a member: the body itself
};

struct BodyKeyRow {
  std::string_view name;
  BodyKey key;
  BodyKey within;  // the member whose value holds it; none: it stands in the body itself
};

inline constexpr std::array<BodyKeyRow, 9> kBodyKeys{{
    {"model", BodyKey::model, BodyKey::none},
    {"tools", BodyKey::tools, BodyKey::none},
    {"stream", BodyKey::stream, BodyKey::none},
    {"messages", BodyKey::messages, BodyKey::none},
    {"stream_options", BodyKey::stream_options, BodyKey::none},
    {"response_format", BodyKey::response_format, BodyKey::none},
    {"include_usage", BodyKey::include_usage, BodyKey::stream_options},
    {"continuous_usage_stats", BodyKey::continuous_usage_stats, BodyKey::stream_options},
    {"type", BodyKey::type, BodyKey::response_format},
}};

constexpr std::size_t index_of(BodyKey key) { return static_cast<std::size_t>(key); }

// As find_body_key(), for names that do not fit in a lane.
[[gnu::cold]] inline BodyKey find_long_body_key(std::string_view name, BodyKey within) {
  for (const BodyKeyRow& row : kBodyKeys) {
    if (row.name == name && row.within == within) return row.key;
  }
  return BodyKey::other;
}

// The key of a member called `name` in the value of `within`. Behind the name kLaneBytes must be readable: it is
// compared as one lane.
inline BodyKey find_body_key(std::string_view name, BodyKey within) {
  static constexpr auto kNames = [] {
    std::array<std::array<char, kLaneBytes>, kBodyKeys.size()> names{};
    for (std::size_t i = 0; i < names.size(); ++i) kBodyKeys[i].name.copy(names[i].data(), kLaneBytes);
    return names;
  }();
  static constexpr auto kRowsOfLength = [] {
    std::array<std::uint16_t, kLaneBytes> rows{};  // a bit for each row
    for (const BodyKeyRow& row : kBodyKeys) {
      if (row.name.size() < kLaneBytes) rows[row.name.size()] |= static_cast<std::uint16_t>(1u << index_of(row.key));
    }
    return rows;
  }();
  if (name.size() >= kLaneBytes) return find_long_body_key(name, within);
  for (unsigned rows = kRowsOfLength[name.size()]; rows != 0; rows &= rows - 1) {
    const auto i = static_cast<std::size_t>(std::countr_zero(rows));
    const unsigned differs = ~Lane(name.data()).equal(Lane(kNames[i].data())).mask() & ((1u << name.size()) - 1);
    if (differs == 0 && kBodyKeys[i].within == within) return kBodyKeys[i].key;
  }
  return BodyKey::other;
}

enum class BodyFormat : std::uint8_t { json };          // of a request
enum class StreamFraming : std::uint8_t { none, sse };  // of a response, if the request says `stream: true`
enum class ErrorShape : std::uint8_t { openai };

// The names of the token counts in a response's `usage` object.
struct UsageNames {
  std::string_view prompt;
  std::string_view completion;
  std::string_view prompt_details = {};  // the object that holds the next one
  std::string_view cached = {};          // of the prompt's tokens
};
inline constexpr UsageNames kOpenAiUsage{"prompt_tokens", "completion_tokens", "prompt_tokens_details",
                                         "cached_tokens"};

struct Endpoint {
  std::string_view path;
  llhttp_method method;
  BodyFormat body;
  BodyKey model;  // the member that names the model
  StreamFraming framing;
  const UsageNames* usage;    // null: its responses tell no token counts
  std::string_view end_mark;  // the data of the event that ends a complete stream
  ErrorShape errors;
};

inline constexpr std::array kEndpoints{
    Endpoint{"/v1/chat/completions", HTTP_POST, BodyFormat::json, BodyKey::model, StreamFraming::sse, &kOpenAiUsage,
             "[DONE]", ErrorShape::openai},
    Endpoint{"/v1/completions", HTTP_POST, BodyFormat::json, BodyKey::model, StreamFraming::sse, &kOpenAiUsage,
             "[DONE]", ErrorShape::openai},
    Endpoint{"/v1/embeddings", HTTP_POST, BodyFormat::json, BodyKey::model, StreamFraming::none, &kOpenAiUsage, "",
             ErrorShape::openai},
};

static_assert(kEndpoints.size() <= kMaxEndpoints);

constexpr std::uint8_t index_of(const Endpoint& row) { return static_cast<std::uint8_t>(&row - kEndpoints.data()); }

static_assert(
    [] {
      for (std::size_t i = 0; i < kBodyKeys.size(); ++i) {
        if (index_of(kBodyKeys[i].key) != i) return false;
      }
      return std::all_of(kEndpoints.begin(), kEndpoints.end(),
                         [](const Endpoint& row) { return index_of(row.model) < kBodyKeys.size(); });
    }(),
    "the body keys stand in the order of the enum, and each endpoint has a model");

}  // namespace nexus
