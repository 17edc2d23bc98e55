// cors.h
// Owns:     cross-origin access for browsers (the Fetch standard, "CORS protocol"): the fields that a response gets.
// Promises: without `cors_origins` there are none, and a backend's own are passed on; with it, they are Nexus's
//           alone, on every response, so that a browser never sees two.
// Leaves:   answering a preflight request to server/builtin_pages.h; the syntax of origins to config/values.h.
// Threads:  pure functions.
// Tested by: tests/cors_test.cpp, tests/e2e/cors.test.mjs
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

#include "nexus/config/settings.h"
#include "nexus/http/head_writer.h"

namespace nexus {

constexpr std::string_view kAnyOriginLines = "Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: *\r\n";

// For a preflight request. `*` does not stand for Authorization. Browsers remember the response for two hours at most.
constexpr std::string_view kPreflightLines =
    "Access-Control-Allow-Methods: GET, HEAD, POST, OPTIONS\r\n"
    "Access-Control-Allow-Headers: *, Authorization\r\n"
    "Access-Control-Max-Age: 7200\r\n";

inline bool allows_any_origin(const ServerSettings& server) {
  return !server.cors_origins.empty() && server.cors_origins.front() == "*";
}

// Sets `lines` to the fields for the response to the request in `head`. Without `fields` the request is not known.
inline void write_cors_lines(std::string& lines, const ServerSettings& server, const HeadView& head) {
  lines.clear();
  if (server.cors_origins.empty()) return;
  if (allows_any_origin(server)) {
    lines = kAnyOriginLines;
    return;
  }
  const FieldRow* row = head.fields == nullptr ? nullptr : find_field(*head.fields, Field::origin);
  const std::string_view origin = row == nullptr ? std::string_view() : value_of(head.base, *row);
  if (std::find(server.cors_origins.begin(), server.cors_origins.end(), origin) != server.cors_origins.end()) {
    detail::append_field(lines, "Access-Control-Allow-Origin", origin);
    lines += "Access-Control-Expose-Headers: *\r\n";
  }
  lines += "Vary: Origin\r\n";  // also where it is not allowed: a cache must not give this response to another origin
}

// True if these lines allow the request's origin. Then a backend does not see it, which might refuse it.
constexpr bool allows_origin(std::string_view cors_lines) { return cors_lines.starts_with("Access-Control"); }

}  // namespace nexus
