// apis.h
// Owns:     the endpoints that the simulated clients ask, a row each, and how the bodies of each API look: requests,
//           plain answers, the events or lines of a stream, token counts, end marks and errors.
// Promises: a body says nothing but what it is given, in the names of its API.
// Leaves:   which parts a response has to answers.h, those of a request to requests.h.
// Threads:  one.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "nexus/api/endpoints.h"

namespace nexus::sim {

enum class Style : std::uint8_t { openai, responses, messages, ollama };
enum class Asks : std::uint8_t { never, if_said, unless_refused };  // for a stream

struct ApiRow {
  std::string_view path;
  Api api;
  Style style;
  Asks stream;
  bool takes_options;  // stream_options
  bool completes;      // it counts tokens of a completion

  bool empty_is_unknown;  // an answer without a byte says that the server does not know the path

  constexpr bool is_lines() const { return style == Style::ollama; }
};

inline constexpr std::array kApiRows = std::to_array<ApiRow>({
    {"/v1/chat/completions", Api::chat, Style::openai, Asks::if_said, true, true, false},
    {"/v1/completions", Api::completions, Style::openai, Asks::if_said, true, true, false},
    {"/v1/embeddings", Api::embeddings, Style::openai, Asks::never, true, true, false},
    {"/v1/responses", Api::responses, Style::responses, Asks::if_said, false, true, true},
    {"/v1/messages", Api::messages, Style::messages, Asks::if_said, false, true, true},
    {"/api/chat", Api::ollama, Style::ollama, Asks::unless_refused, false, true, true},
    {"/api/generate", Api::ollama, Style::ollama, Asks::unless_refused, false, true, true},
    {"/v1/rerank", Api::rerank, Style::openai, Asks::never, false, false, true},
});

// The member `stream` of a request's body.
inline std::string_view stream_member(const ApiRow& row, bool streams) {
  switch (row.stream) {
    case Asks::never: return "";
    case Asks::if_said: return streams ? R"("stream":true,)" : "";
    case Asks::unless_refused: return streams ? "" : R"("stream":false,)";
  }
  return "";
}

struct Counts {
  std::int64_t prompt = -1, completion = -1;  // -1: not told
};

// Token counts as one member of a response, or several.
inline std::string usage_text(const ApiRow& row, const Counts& counts) {
  const std::string prompt = std::to_string(counts.prompt), completion = std::to_string(counts.completion);
  switch (row.style) {
    case Style::openai:
      return R"("usage":{"prompt_tokens":)" + prompt + (row.completes ? R"(,"completion_tokens":)" + completion : "") +
             "}";
    case Style::responses: return R"("usage":{"input_tokens":)" + prompt + R"(,"output_tokens":)" + completion + "}";
    case Style::messages: {  // a third of the prompt came from the cache: it adds up
      const std::int64_t cached = counts.prompt / 3;
      return R"("usage":{"input_tokens":)" + std::to_string(counts.prompt - cached) + R"(,"cache_read_input_tokens":)" +
             std::to_string(cached) + R"(,"output_tokens":)" + completion + "}";
    }
    case Style::ollama: return R"("prompt_eval_count":)" + prompt + R"(,"eval_count":)" + completion;
  }
  return "";
}

inline std::string plain_body(const ApiRow& row, std::string_view id, std::string_view content) {
  const std::string text(content), name(id);
  switch (row.style) {
    case Style::openai: return R"({"id":")" + name + R"(","choices":[{"message":{"content":")" + text + R"("}}])";
    case Style::responses: return R"({"id":"resp_)" + name + R"(","output":[{"content":")" + text + R"("}])";
    case Style::messages: return R"({"id":")" + name + R"(","content":[{"type":"text","text":")" + text + R"("}])";
    case Style::ollama: return R"({"model":")" + name + R"(","response":")" + text + R"(","done":true)";
  }
  return "";
}

// One event or line, with its end. `name`: of its type.
inline std::string event_text(const ApiRow& row, std::string_view name, std::string_view members,
                              std::string_view end) {
  std::string out;
  const std::string_view line_end = end.substr(0, end.size() / 2);
  if (row.is_lines()) return out.append("{").append(members).append("}").append(line_end);
  if (row.style == Style::openai) return out.append("data: {").append(members).append("}").append(end);
  out.append("event: ").append(name).append(line_end).append(R"(data: {"type":")").append(name).append("\"");
  return out.append(members.empty() ? "" : ",").append(members).append("}").append(end);
}

inline std::string piece_event(const ApiRow& row, std::string_view id, std::string_view content, std::string_view end) {
  const std::string text(content), name(id);
  switch (row.style) {
    case Style::openai:
      return event_text(row, "",
                        R"("id":")" + name + R"(","choices":[{"index":0,"delta":{"content":")" + text + R"("}}])", end);
    case Style::responses: return event_text(row, "response.output_text.delta", R"("delta":")" + text + "\"", end);
    case Style::messages:
      return event_text(row, "content_block_delta",
                        R"("index":0,"delta":{"type":"text_delta","text":")" + text + R"("})", end);
    case Style::ollama:
      return event_text(row, "", R"("model":")" + name + R"(","response":")" + text + R"(","done":false)", end);
  }
  return "";
}

// The first event of a stream, which may tell a part of its counts, or nothing.
inline std::string opening_event(const ApiRow& row, std::string_view id, const Counts& counts, std::string_view end) {
  const std::string name(id);
  if (row.style == Style::responses) {
    return event_text(row, "response.created", R"("response":{"id":"resp_)" + name + R"(","usage":null})", end);
  }
  if (row.style != Style::messages) return "";
  const std::string told = counts.prompt < 0 ? "" : "," + usage_text(row, {counts.prompt, 1});
  return event_text(row, "message_start", R"("message":{"id":")" + name + "\"" + told + "}", end);
}

// The events at the end of a stream: with token counts, if any are told, and the mark of its end, if it `ends`.
inline std::string closing_events(const ApiRow& row, std::string_view id, const Counts& counts, bool ends,
                                  std::string_view end) {
  const std::string name(id);
  const std::string told = counts.prompt < 0 ? "" : usage_text(row, counts);
  switch (row.style) {
    case Style::openai: return ends ? "data: [DONE]" + std::string(end) : "";
    case Style::responses:
      if (!ends) return "";
      return event_text(row, "response.completed",
                        R"("response":{"id":"resp_)" + name + "\"" + (told.empty() ? "" : ",") + told + "}", end);
    case Style::messages: {
      const std::string last = R"("usage":{"output_tokens":)" + std::to_string(counts.completion) + "}";
      std::string out = event_text(row, "message_delta",
                                   R"("delta":{"stop_reason":"end_turn"})" + (told.empty() ? "" : "," + last), end);
      return ends ? out + event_text(row, "message_stop", "", end) : out;
    }
    case Style::ollama:
      if (!ends) return "";
      return event_text(
          row, "", R"("model":")" + name + R"(","response":"","done":true)" + (told.empty() ? "" : ",") + told, end);
  }
  return "";
}

inline std::string error_event(const ApiRow& row, bool with_name, std::string_view end) {
  const std::string line(end.substr(0, end.size() / 2));
  switch (row.style) {
    case Style::openai:
      return (with_name ? "event: error" + line : "") + R"(data: {"error":{"message":"simulated","code":500}})" +
             std::string(end);
    case Style::responses: return event_text(row, "error", R"("code":"500","message":"simulated")", end);
    case Style::messages: return event_text(row, "error", R"("error":{"type":"api_error","message":"simulated"})", end);
    case Style::ollama: return R"({"error":"simulated"})" + line;
  }
  return "";
}
// True if a stream tells an error, whole or, at the end of its connection, in its first line.
inline bool tells_error(const ApiRow& row, const std::string& payload) {
  const auto has = [&](std::string_view text) { return payload.find(text) != std::string::npos; };
  if (row.is_lines()) return has(R"({"error":"simulated"})");
  const bool named = has("event: error\n") || has("event: error\r");
  return named || (row.style == Style::openai && has(R"(data: {"error":{"message":"simulated","code":500}})"));
}

// The beginnings of the errors of Nexus's own: of a response, and of the last event of a stream that it ends.
inline std::string_view own_error(const ApiRow& row) {
  switch (row.style) {
    case Style::openai:
    case Style::responses: return R"({"error":{"message":")";
    case Style::messages: return R"({"type":"error","error":{"type":")";
    case Style::ollama: return R"({"error":")";
  }
  return "";
}
inline std::string_view own_error_event(const ApiRow& row) {
  switch (row.style) {
    case Style::openai: return "\n\ndata: {\"error\":{\"message\":\"";
    case Style::responses: return "\n\nevent: error\ndata: {\"type\":\"error\",\"code\":\"";
    case Style::messages: return "\n\nevent: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"";
    case Style::ollama: return "{\"error\":\"";
  }
  return "";
}

}  // namespace nexus::sim
