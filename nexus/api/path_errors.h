// path_errors.h
// Owns:     the answers by which a server says that it does not know a path.
// Promises: a text within an answer is no such answer: the whole of it has to have the server's own form.
// Leaves:   what follows from it to proxy/exchange_ends.h.
// Threads:  any.
// Tested by: tests/apis_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>

#include "nexus/api/endpoints.h"
#include "nexus/base/limits.h"
#include "nexus/base/text.h"

namespace nexus {

struct PathError {
  std::uint16_t status;
  std::string_view form;  // a space stands for any white space, or none
  bool whole;             // nothing but white space follows
};

inline constexpr auto kPathErrors = std::to_array<PathError>({
    {404, R"({ "detail" : "Not Found" })", true},                                  // FastAPI: vLLM, SGLang
    {404, "404 page not found", true},                                             // Go: Ollama
    {404, "Not Found", true},                                                      // mlx_lm, Starlette
    {404, "404: Not Found", true},                                                 // aiohttp
    {404, R"({ "error" : { "code" : 404 , "message" : "File Not Found")", false},  // llama.cpp
    {404, R"({ "error" : { "message" : "File Not Found")", false},
    {404, R"({ "error" : { "message" : "Invalid URL ()", false},    // OpenAI
    {200, R"({ "error" : "Unexpected endpoint or method)", false},  // LM Studio
});

inline bool has_form(std::string_view text, const PathError& row) {
  const auto skip = [&text] { text.remove_prefix(std::min(text.find_first_not_of(" \t\r\n"), text.size())); };
  skip();
  for (const char expected : row.form) {
    if (expected == ' ') {
      skip();
    } else if (text.empty() || text.front() != expected) {
      return false;
    } else {
      text.remove_prefix(1);
    }
  }
  skip();
  return text.empty() || !row.whole;
}

// True if a short answer with this status may be one. The three oldest endpoints are known to all servers, and a
// success there is not held up.
inline bool may_be_path_error(const Endpoint& endpoint, std::uint16_t status) {
  return status == 404 || (status == 200 && index_of(endpoint) > 2);
}

// The body of a whole response that was written for a client; of several chunks only if they are one.
inline std::string_view body_of(std::string_view response, bool chunked) {
  constexpr std::string_view kBlankLine = "\r\n\r\n", kLastChunk = "0\r\n\r\n";
  std::string_view body = response.substr(std::min(response.find(kBlankLine), response.size() - 4) + 4);
  if (!chunked) return body;
  if (body.ends_with(kLastChunk)) body.remove_suffix(kLastChunk.size());
  body.remove_prefix(std::min(body.find("\r\n"), body.size()));
  return body.size() < 4 ? std::string_view() : body.substr(2, body.size() - 4);
}

// `body` is whole.
inline bool is_path_error(const Endpoint& endpoint, std::uint16_t status, std::string_view body) {
  if (body.empty()) return status == 404 && index_of(endpoint) > 2;
  return body.size() <= 2 * kPathErrorBytes &&
         std::any_of(kPathErrors.begin(), kPathErrors.end(),
                     [&](const PathError& row) { return row.status == status && has_form(body, row); });
}

}  // namespace nexus
