// head_writer.h
// Owns:     writing heads: a request's to a backend, a response's to a client, those of Nexus's own responses; the
//           Date field (RFC 9110 6.6.1); cross-origin access for browsers (the Fetch standard, "CORS protocol").
// Promises: a head is always rebuilt from parsed fields; hop-by-hop fields and those that Connection names are
//           removed (RFC 9110 7.6.1), but never a field that matters to Nexus; the framing is Nexus's own. Date is
//           written once a second. Without `cors_origins` a backend's own fields are passed on; with it, they are
//           Nexus's alone, on every response, so that a browser never sees two.
// Leaves:   when to send a head to exchange.h and worker.h; answering a preflight request to builtin_pages.h; the
//           syntax of origins to config/values.h; reading the clocks to the caller.
// Threads:  pure functions over the caller's buffers; a DateLine is a part of one loop.
// Tested by: tests/head_writer_test.cpp, tests/e2e/endpoints.test.mjs, tests/cors_test.cpp, tests/e2e/cors.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <charconv>
#include <cstddef>
#include <cstring>
#include <ctime>
#include <string>
#include <string_view>

#include "nexus/base/clock.h"
#include "nexus/base/text.h"
#include "nexus/config/settings.h"
#include "nexus/http/head_parser.h"

namespace nexus {

class DateLine {
 public:
  // True if the line must be written again at `now`, a time of the loop.
  bool is_due(Ns now) const { return now >= next_; }

  void write(Ns now, Ns wall) {
    const std::time_t second = wall / kSecond;
    std::tm utc{};
    gmtime_r(&second, &utc);
    bytes_ = std::strftime(text_.data(), text_.size(), "Date: %a, %d %b %Y %H:%M:%S GMT\r\n", &utc);
    next_ = now + kSecond - wall % kSecond;
  }
  std::string_view view() const { return {text_.data(), bytes_}; }

 private:
  std::array<char, 48> text_{};
  std::size_t bytes_ = 0;
  Ns next_ = 0;
};

// A parsed head and its bytes.
struct HeadView {
  const char* base = nullptr;
  const FieldTable* fields = nullptr;
  std::size_t head_bytes = 0;
};

namespace detail {

constexpr std::size_t kOwnLinesBytes = 256;  // more than the constant texts and numbers of any head take

// Appends to a string, which is sized once: no check and no call per piece.
class Cursor {
 public:
  // At most `most` bytes will be added to `out`.
  Cursor(std::string& out, std::size_t most) : out_(out) {
    const std::size_t held = out.size();
    out.resize(held + most);
    at_ = out.data() + held;
  }
  ~Cursor() {
    const auto written = static_cast<std::size_t>(at_ - out_.data());
    assert(written <= out_.size());
    out_.resize(written);
  }
  Cursor(const Cursor&) = delete;
  Cursor& operator=(const Cursor&) = delete;

  template <std::size_t N>
  Cursor& add(const char (&literal)[N]) {
    std::memcpy(at_, literal, N - 1);
    at_ += N - 1;
    return *this;
  }
  [[gnu::always_inline]] Cursor& add(std::string_view text) {
    if (!text.empty()) std::memcpy(at_, text.data(), text.size());
    at_ += text.size();
    return *this;
  }
  Cursor& number(std::uint64_t value) {
    at_ = std::to_chars(at_, at_ + 20, value).ptr;
    return *this;
  }
  template <std::size_t N>
  Cursor& field(const char (&name_and_colon)[N], std::string_view value) {
    return add(name_and_colon).add(value).add("\r\n");
  }
  template <std::size_t N>
  Cursor& field(const char (&name_and_colon)[N], std::uint64_t value) {
    return add(name_and_colon).number(value).add("\r\n");
  }

 private:
  std::string& out_;
  char* at_;
};

inline bool named_by_connection(const HeadView& head, std::string_view name) {
  for (const FieldRow& row : *head.fields) {
    std::string_view list = row.field == Field::connection ? value_of(head.base, row) : "";
    while (!list.empty()) {
      if (equals_ignoring_case(next_list_element(list), name)) return true;
    }
  }
  return false;
}

inline void append_field(std::string& out, std::string_view name, std::string_view value) {
  out.append(name).append(": ").append(value).append("\r\n");
}

// Fields never forwarded in either direction: hop-by-hop, framing, X-Nexus-*, X-Request-Id.
constexpr std::uint32_t kNeverForwarded =
    kHopByHop | set_of(Field::content_length, Field::x_nexus, Field::x_request_id, Field::underscore_twin);

// Connection may name these: they do not matter to Nexus, or not to the framing and the route.
constexpr std::uint32_t kRemovedByName = set_of(Field::other, Field::traceparent, Field::tracestate);

constexpr bool tells_rate(std::string_view name) {
  return starts_with_ignoring_case(name, "x-ratelimit-") || starts_with_ignoring_case(name, "anthropic-ratelimit-");
}

// True if Connection names the field, or if it tells of limits and these are to be left out. Rare, so not inlined.
[[gnu::noinline]] inline bool removed_by_name(const HeadView& head, std::string_view name, bool without_rates) {
  if (without_rates && tells_rate(name)) return true;
  return head.fields->connection_names && named_by_connection(head, name);
}

// Copies all fields but those in the set `removed` and those that Connection names. Adjacent lines are copied at once:
// the parser has checked that each is `name: value` and nothing else. `without_rates`: nor those that tell of limits.
inline void add_fields(Cursor& out, const HeadView& head, std::uint32_t removed, bool without_rates = false) {
  const FieldTable& fields = *head.fields;
  const bool by_name = fields.connection_names || without_rates;
  std::size_t run_from = fields.count > 0 ? fields.rows[0].name_at : 0;
  for (std::uint32_t i = 0; i < fields.count; ++i) {
    const FieldRow& row = fields.rows[i];
    bool skip = (removed & bit_of(row.field)) != 0;
    if (by_name && (bit_of(row.field) & kRemovedByName) != 0) [[unlikely]]
      skip = removed_by_name(head, name_of(head.base, row), without_rates);
    if (!skip) continue;
    out.add(std::string_view(head.base + run_from, row.name_at - run_from));
    run_from = i + 1 < fields.count ? fields.rows[i + 1].name_at : head.head_bytes - 2;
  }
  if (fields.count > 0) out.add(std::string_view(head.base + run_from, head.head_bytes - 2 - run_from));
}

}  // namespace detail

struct UpstreamHead {
  std::string_view method;
  std::string_view target;
  std::string_view base_path;
  std::string_view backend_lines;  // Host, and Authorization if the backend has a key: whole lines
  std::uint32_t withheld = 0;      // a set of the client's fields that are not forwarded
  std::string_view request_id;
  std::string_view own_lines;  // Via, and a traceparent of Nexus's own: whole lines
  std::uint64_t content_length = 0;
};

inline void append_request_head(std::string& out, const HeadView& client, const UpstreamHead& to) {
  // Without Accept-Encoding, because the usage in a compressed response could not be read.
  const std::uint32_t removed =
      detail::kNeverForwarded | set_of(Field::host, Field::expect, Field::accept_encoding) | to.withheld;
  detail::Cursor cursor(out, client.head_bytes + to.base_path.size() + to.backend_lines.size() + to.request_id.size() +
                                 to.own_lines.size() + detail::kOwnLinesBytes);
  cursor.add(to.method).add(" ").add(to.base_path).add(to.target).add(" HTTP/1.1\r\n").add(to.backend_lines);
  detail::add_fields(cursor, client, removed);
  cursor.field("X-Request-Id: ", to.request_id).add(to.own_lines);
  cursor.field("Content-Length: ", to.content_length).add("\r\n");
}

struct ClientHead {
  std::string_view backend_line;  // X-Nexus-Backend, the whole line
  std::string_view request_id;
  std::string_view route_reason;
  std::string_view fallback_model;  // empty: no fallback
  std::string_view date_line;       // used if the backend gave no Date
  std::string_view cors_lines;      // whole lines, instead of the backend's; empty: the backend's are passed on
  std::string_view rate_lines;      // the same
  Framing framing;                  // towards the client
  bool http_1_0 = false;
  bool keep_alive = true;
};

inline std::string_view connection_line(bool http_1_0, bool keep_alive) {
  if (!keep_alive) return "Connection: close\r\n";
  return http_1_0 ? "Connection: keep-alive\r\n" : "";
}

inline void append_response_head(std::string& out, const HeadView& response, const ResponseHead& head,
                                 const ClientHead& to) {
  detail::Cursor cursor(out, response.head_bytes + to.backend_line.size() + to.request_id.size() +
                                 to.route_reason.size() + to.fallback_model.size() + to.date_line.size() +
                                 to.cors_lines.size() + to.rate_lines.size() + detail::kOwnLinesBytes);
  cursor.add("HTTP/1.1 ").add(std::string_view(response.base + kStatusAt, 3)).add(" ");
  cursor.add(std::string_view(response.base + head.reason_at, head.reason_bytes)).add("\r\n");
  const std::uint32_t removed = to.cors_lines.empty() ? 0 : bit_of(Field::access_control);
  detail::add_fields(cursor, response, detail::kNeverForwarded | removed, !to.rate_lines.empty());
  if (!response.fields->has(Field::date)) cursor.add(to.date_line);
  cursor.add(to.cors_lines).add(to.rate_lines).add(to.backend_line).field("X-Nexus-Route-Reason: ", to.route_reason);
  if (!to.fallback_model.empty()) cursor.field("X-Nexus-Fallback-Model: ", to.fallback_model);
  cursor.field("X-Request-Id: ", to.request_id).add(connection_line(to.http_1_0, to.keep_alive));
  if (to.framing.kind == Framing::Kind::length) {
    cursor.field("Content-Length: ", to.framing.length);
  } else if (to.framing.kind == Framing::Kind::chunked) {
    cursor.add("Transfer-Encoding: chunked\r\n");
  }
  cursor.add("\r\n");
}

// RFC 9110 15: the phrases of the statuses that Nexus itself sends.
constexpr std::string_view reason_phrase(std::uint16_t status) {
  switch (status) {
    case 200: return "OK";
    case 204: return "No Content";
    case 400: return "Bad Request";
    case 401: return "Unauthorized";
    case 403: return "Forbidden";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 413: return "Content Too Large";
    case 414: return "URI Too Long";
    case 417: return "Expectation Failed";
    case 429: return "Too Many Requests";
    case 431: return "Request Header Fields Too Large";
    case 501: return "Not Implemented";
    case 502: return "Bad Gateway";
    case 503: return "Service Unavailable";
    case 504: return "Gateway Timeout";
    case 505: return "HTTP Version Not Supported";
    case 508: return "Loop Detected";
    default: assert(false); return "";
  }
}

// The head of a response that Nexus makes itself.
struct OwnResponse {
  std::uint16_t status = 200;
  std::string_view content_type = "application/json";
  std::string_view extra_fields;  // whole lines
  std::string_view date_line;
  std::string_view cors_lines;  // whole lines
  std::string_view request_id;
  std::uint8_t retry_after_s = 0;
  bool http_1_0 = false;
  bool keep_alive = true;
};

inline void append_own_head(std::string& out, const OwnResponse& own, std::size_t body_bytes) {
  const std::string_view reason = reason_phrase(own.status);
  detail::Cursor cursor(out, reason.size() + own.content_type.size() + own.extra_fields.size() + own.date_line.size() +
                                 own.cors_lines.size() + own.request_id.size() + detail::kOwnLinesBytes);
  cursor.add("HTTP/1.1 ").number(own.status).add(" ").add(reason).add("\r\n");
  if (own.status != 204) cursor.field("Content-Type: ", own.content_type).field("Content-Length: ", body_bytes);
  cursor.add(own.extra_fields).add(own.date_line).add(own.cors_lines);
  if (own.status == 401) cursor.add("WWW-Authenticate: Bearer\r\n");  // required by RFC 9110 15.5.2
  if (own.retry_after_s > 0) cursor.field("Retry-After: ", own.retry_after_s);
  if (!own.request_id.empty()) cursor.field("X-Request-Id: ", own.request_id);
  cursor.add(connection_line(own.http_1_0, own.keep_alive)).add("\r\n");
}

constexpr std::string_view kAnyOriginLines = "Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: *\r\n";

// For a preflight request. `*` does not stand for Authorization. Browsers remember the response for two hours at most.
constexpr std::string_view kPreflightLines =
    "Access-Control-Allow-Methods: GET, HEAD, POST, DELETE, OPTIONS\r\n"
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
