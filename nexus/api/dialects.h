// dialects.h
// Owns:     how the APIs that Nexus passes on differ: where a response tells its token counts and its end, how streams
//           are framed, the shape of errors, the members of a request that Nexus reads.
// Promises: an API is one row of kDialects; nothing else knows its names.
// Leaves:   which path speaks which dialect to endpoints.h; reading to request_json.h, json_reader.h, usage_scan.h;
//           error bodies to errors.h.
// Threads:  any; constant.
// Tested by: tests/request_json_test.cpp, tests/usage_scan_test.cpp
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "nexus/base/simd.h"

namespace nexus {

// The members of a request's JSON object that Nexus reads.
enum class BodyKey : std::uint8_t {
  model,
  tools,
  stream,
  messages,
  input,
  images,
  format,
  text,
  stream_options,
  response_format,
  include_usage,
  continuous_usage_stats,
  background,
  previous_response_id,
  prompt_cache_key,  // this and the next two name a session: the first that is there counts
  session_id,
  user_id,
  metadata,
  prompt,
  system,
  instructions,
  other,  // any other member
  none,   // not a member: the body itself
};

struct BodyKeyRow {
  std::string_view name;
  BodyKey key;
  BodyKey within;  // the member whose value holds it; none: it stands in the body itself
};

inline constexpr std::array<BodyKeyRow, 21> kBodyKeys{{
    {"model", BodyKey::model, BodyKey::none},
    {"tools", BodyKey::tools, BodyKey::none},
    {"stream", BodyKey::stream, BodyKey::none},
    {"messages", BodyKey::messages, BodyKey::none},
    {"input", BodyKey::input, BodyKey::none},
    {"images", BodyKey::images, BodyKey::none},
    {"format", BodyKey::format, BodyKey::none},
    {"text", BodyKey::text, BodyKey::none},
    {"stream_options", BodyKey::stream_options, BodyKey::none},
    {"response_format", BodyKey::response_format, BodyKey::none},
    {"include_usage", BodyKey::include_usage, BodyKey::stream_options},
    {"continuous_usage_stats", BodyKey::continuous_usage_stats, BodyKey::stream_options},
    {"background", BodyKey::background, BodyKey::none},
    {"previous_response_id", BodyKey::previous_response_id, BodyKey::none},
    {"prompt_cache_key", BodyKey::prompt_cache_key, BodyKey::none},
    {"session_id", BodyKey::session_id, BodyKey::none},
    {"user_id", BodyKey::user_id, BodyKey::metadata},
    {"metadata", BodyKey::metadata, BodyKey::none},
    {"prompt", BodyKey::prompt, BodyKey::none},
    {"system", BodyKey::system, BodyKey::none},
    {"instructions", BodyKey::instructions, BodyKey::none},
}};

// True for the members whose own members are read.
constexpr bool is_read_into(BodyKey key) { return key == BodyKey::stream_options || key == BodyKey::metadata; }

// The parts of a conversation: the turns, and what the model is told before them.
constexpr bool is_turns(BodyKey key) {
  return key == BodyKey::messages || key == BodyKey::input || key == BodyKey::prompt;
}
constexpr bool is_system(BodyKey key) { return key == BodyKey::system || key == BodyKey::instructions; }

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
    std::array<std::uint32_t, kLaneBytes> rows{};  // a bit for each row
    for (const BodyKeyRow& row : kBodyKeys) {
      if (row.name.size() < kLaneBytes) rows[row.name.size()] |= 1u << index_of(row.key);
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

// ---- the APIs ----

// A need of a request: some string in the value of the member `within` ends with `mark`, quotes included.
enum class Need : std::uint8_t { images, json_mode };
struct NeedMark {
  BodyKey within;
  std::string_view mark;
  Need need;
};

enum class StreamFraming : std::uint8_t { events, lines };  // of Server-Sent Events, or of newline-delimited JSON
enum class ErrorShape : std::uint8_t { openai, anthropic, ollama };

// Where a response tells its token counts, and how a stream shows that it is whole.
struct ResponseShape {
  bool bare = false;              // the counts stand in the response itself, not in its `usage`
  std::string_view wrapper = {};  // the member of an event that may hold `usage` and `error` in its place
  std::string_view prompt = {};
  std::string_view completion = {};
  std::string_view details = {};  // the object that holds `cached`; empty: it stands beside `prompt`
  std::string_view cached = {};   // of the prompt's tokens
  std::string_view created = {};  // that are neither in `prompt` nor in `cached`
  std::string_view written = {};  // the object that holds `reasoning`
  static constexpr std::string_view reasoning = "reasoning_tokens";  // of the completion's tokens
  bool adds_up = false;  // `prompt` is without `cached` and `created`; events tell a part of the counts each
  std::string_view prompt_too = {};  // other names of `prompt` and `completion`; only where `details` is empty
  std::string_view completion_too = {};
  std::string_view end_data = {};  // all of the last event's data
  std::string_view end_key = {};   // the member that marks the last event
  std::string_view end = {};       // the values of end_key, separated by blanks
  bool has_ids = false;            // `id` names a response that the backend may have stored
  bool named = false;              // each event has a line `event: VALUE` with the value of end_key
};

// One API's bodies.
enum class Dialect : std::uint8_t { openai, responses, messages, media, llamacpp, ollama_chat, ollama_generate };

struct DialectRow {
  Dialect dialect;
  StreamFraming framing;
  ErrorShape errors;
  bool takes_stream_options;
  ResponseShape response;
  std::array<NeedMark, 3> marks;  // an empty mark stands for none
};

namespace detail {
constexpr ResponseShape kOllamaResponse{
    .bare = true, .prompt = "prompt_eval_count", .completion = "eval_count", .end_key = "done", .end = "true"};
}

inline constexpr std::array kDialects{
    DialectRow{Dialect::openai,
               StreamFraming::events,
               ErrorShape::openai,
               true,
               {.prompt = "prompt_tokens",
                .completion = "completion_tokens",
                .details = "prompt_tokens_details",
                .cached = "cached_tokens",
                .written = "completion_tokens_details",
                .end_data = "[DONE]"},
               {{{BodyKey::messages, "\"image_url\"", Need::images},
                 {BodyKey::response_format, "\"json_object\"", Need::json_mode},
                 {BodyKey::response_format, "\"json_schema\"", Need::json_mode}}}},
    DialectRow{Dialect::responses,
               StreamFraming::events,
               ErrorShape::openai,
               false,
               {.wrapper = "response",
                .prompt = "input_tokens",
                .completion = "output_tokens",
                .details = "input_tokens_details",
                .cached = "cached_tokens",
                .written = "output_tokens_details",
                .end_key = "type",
                .end = "response.completed response.incomplete response.failed",
                .has_ids = true,
                .named = true},
               {{{BodyKey::input, "\"input_image\"", Need::images},
                 {BodyKey::text, "\"json_object\"", Need::json_mode},
                 {BodyKey::text, "\"json_schema\"", Need::json_mode}}}},
    DialectRow{Dialect::messages,
               StreamFraming::events,
               ErrorShape::anthropic,
               false,
               {.wrapper = "message",
                .prompt = "input_tokens",
                .completion = "output_tokens",
                .cached = "cache_read_input_tokens",
                .created = "cache_creation_input_tokens",
                .adds_up = true,
                .end_key = "type",
                .end = "message_stop",
                .named = true},
               {{{BodyKey::messages, "\"image\"", Need::images}}}},
    DialectRow{Dialect::media,
               StreamFraming::events,
               ErrorShape::openai,
               false,
               {.prompt = "input_tokens",  // OpenAI's names; the others and [DONE] are vLLM's, of a transcript
                .completion = "output_tokens",
                .prompt_too = "prompt_tokens",
                .completion_too = "completion_tokens",
                .end_data = "[DONE]",
                .end_key = "type",
                .end = "transcript.text.done speech.audio.done image_generation.completed image_edit.completed",
                .named = true},
               {}},
    DialectRow{Dialect::llamacpp,
               StreamFraming::events,
               ErrorShape::openai,
               false,
               {.bare = true,
                .prompt = "tokens_evaluated",
                .completion = "tokens_predicted",
                .details = "timings",
                .cached = "cache_n",
                .end_key = "stop",
                .end = "true"},
               {}},
    DialectRow{Dialect::ollama_chat,
               StreamFraming::lines,
               ErrorShape::ollama,
               false,
               detail::kOllamaResponse,
               {{{BodyKey::messages, "\"images\"", Need::images},
                 {BodyKey::format, "\"json\"", Need::json_mode},
                 {BodyKey::format, "\"type\"", Need::json_mode}}}},
    DialectRow{Dialect::ollama_generate,
               StreamFraming::lines,
               ErrorShape::ollama,
               false,
               detail::kOllamaResponse,
               {{{BodyKey::images, "\"", Need::images},
                 {BodyKey::format, "\"json\"", Need::json_mode},
                 {BodyKey::format, "\"type\"", Need::json_mode}}}},
};

constexpr const DialectRow& row_of(Dialect dialect) { return kDialects[static_cast<std::size_t>(dialect)]; }

static_assert(
    [] {
      for (std::size_t i = 0; i < kBodyKeys.size(); ++i) {
        if (index_of(kBodyKeys[i].key) != i) return false;
      }
      for (std::size_t i = 0; i < kDialects.size(); ++i) {
        if (static_cast<std::size_t>(kDialects[i].dialect) != i) return false;
      }
      return true;
    }(),
    "the rows stand in the order of their enums");

}  // namespace nexus
