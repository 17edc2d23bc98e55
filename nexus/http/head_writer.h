// head_writer.h
// Owns:     writing heads: the request's to a backend, the response's to a client, and whole answers of Nexus's own.
// Promises: a head is always written anew from parsed fields; hop-by-hop fields and those that Connection names stay
//           behind (RFC 9110 7.6.1), but no field that matters can be dropped that way; framing is ours.
// Leaves:   when to send what to exchange.h and worker.h.
// Threads:  pure functions over buffers of the caller.
#pragma once

#include <algorithm>
#include <cassert>
#include <charconv>
#include <cstring>
#include <string>
#include <string_view>

#include "nexus/base/text.h"
#include "nexus/http/head_parser.h"

namespace nexus {

// A parsed head beside the bytes that it lies in.
struct HeadView {
  const char* base = nullptr;
  const FieldTable* fields = nullptr;
  std::size_t head_bytes = 0;
};

namespace detail {

// Writes into room that the caller has measured: no check and no call for each piece.
class Cursor {
 public:
  // `most` bytes at most will be added behind what `out` holds.
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
  Cursor& add(std::string_view text) {
    std::memcpy(at_, text.data(), text.size());
    at_ += text.size();
    return *this;
  }
  Cursor& number(std::uint64_t value) {
    at_ = std::to_chars(at_, at_ + 20, value).ptr;
    return *this;
  }

 private:
  std::string& out_;
  char* at_;
};

inline bool named_by_connection(const HeadView& head, std::string_view name) {
  for (const FieldRow& row : *head.fields) {
    if (row.field == Field::connection && list_holds(value_of(head.base, row), name)) return true;
  }
  return false;
}

inline void append_field(std::string& out, std::string_view name, std::string_view value) {
  out.append(name).append(": ").append(value).append("\r\n");
}

// What stays behind in both directions: hop-by-hop fields, framing, and what only Nexus says.
constexpr std::uint32_t kLeftBehind = [] {
  std::uint32_t set = 0;
  for (std::uint32_t i = 0; i <= static_cast<std::uint32_t>(Field::underscore_twin); ++i) {
    const Field field{static_cast<std::uint8_t>(i)};
    if (is_hop_by_hop(field) || field == Field::content_length || field == Field::x_nexus ||
        field == Field::x_request_id || field == Field::underscore_twin) {
      set |= 1u << i;
    }
  }
  return set;
}();

constexpr std::uint32_t bit_of(Field field) { return 1u << static_cast<unsigned>(field); }

// Adds the end-to-end fields but for those in `left_behind`. Lines that stand together go as one piece: each was seen
// to be `name: value` and nothing else.
inline void add_end_to_end(Cursor& out, const HeadView& head, std::uint32_t left_behind) {
  const FieldTable& fields = *head.fields;
  std::size_t run_from = fields.count > 0 ? fields.rows[0].name_at : 0;
  for (std::uint32_t i = 0; i < fields.count; ++i) {
    const FieldRow& row = fields.rows[i];
    bool leave = (left_behind >> static_cast<unsigned>(row.field) & 1u) != 0;
    if (fields.connection_names && row.field == Field::other)
      leave = named_by_connection(head, name_of(head.base, row));
    if (!leave) continue;
    out.add(std::string_view(head.base + run_from, row.name_at - run_from));
    run_from = i + 1 < fields.count ? fields.rows[i + 1].name_at : head.head_bytes - 2;
  }
  if (fields.count > 0) out.add(std::string_view(head.base + run_from, head.head_bytes - 2 - run_from));
}

constexpr std::size_t kOwnLinesBytes = 256;  // the fixed texts and numbers of a head of ours, with room to spare

}  // namespace detail

struct UpstreamHead {
  std::string_view method;
  std::string_view target;
  std::string_view base_path;
  std::string_view backend_lines;  // Host, and Authorization where the backend has a key: whole lines
  bool pass_authorization = true;  // the client's own goes on
  std::string_view request_id;
  std::string_view via_line;
  std::uint64_t content_length = 0;
};

// Accept-Encoding stays behind too: a compressed answer could not be counted.
inline void append_request_head(std::string& out, const HeadView& client, const UpstreamHead& to) {
  using detail::bit_of;
  std::uint32_t left_behind =
      detail::kLeftBehind | bit_of(Field::host) | bit_of(Field::expect) | bit_of(Field::accept_encoding);
  if (!to.pass_authorization) left_behind |= bit_of(Field::authorization);
  detail::Cursor cursor(out, client.head_bytes + to.base_path.size() + to.backend_lines.size() + to.request_id.size() +
                                 to.via_line.size() + detail::kOwnLinesBytes);
  cursor.add(to.method).add(" ").add(to.base_path).add(to.target).add(" HTTP/1.1\r\n").add(to.backend_lines);
  detail::add_end_to_end(cursor, client, left_behind);
  cursor.add("X-Request-Id: ").add(to.request_id).add("\r\n").add(to.via_line);
  cursor.add("Content-Length: ").number(to.content_length).add("\r\n\r\n");
}

struct ClientHead {
  std::string_view backend_line;  // X-Nexus-Backend, the whole line
  std::string_view request_id;
  std::string_view route_reason;
  std::string_view fallback_model;  // empty: no fallback
  Framing framing;                  // towards the client
  bool http_1_0 = false;
  bool keep_alive = true;
};

inline std::string_view connection_line(bool http_1_0, bool keep_alive) {
  if (!keep_alive) return "Connection: close\r\n";
  return http_1_0 ? "Connection: keep-alive\r\n" : "";
}

inline void append_response_head(std::string& out, const HeadView& answer, const ResponseHead& head,
                                 const ClientHead& to) {
  detail::Cursor cursor(out, answer.head_bytes + to.backend_line.size() + to.request_id.size() +
                                 to.route_reason.size() + to.fallback_model.size() + detail::kOwnLinesBytes);
  cursor.add("HTTP/1.1 ").number(head.status).add(" ");
  cursor.add(std::string_view(answer.base + head.reason_at, head.reason_bytes)).add("\r\n");
  detail::add_end_to_end(cursor, answer, detail::kLeftBehind);
  cursor.add(to.backend_line).add("X-Nexus-Route-Reason: ").add(to.route_reason).add("\r\n");
  if (!to.fallback_model.empty()) cursor.add("X-Nexus-Fallback-Model: ").add(to.fallback_model).add("\r\n");
  cursor.add("X-Request-Id: ").add(to.request_id).add("\r\n").add(connection_line(to.http_1_0, to.keep_alive));
  if (to.framing.kind == Framing::Kind::length) {
    cursor.add("Content-Length: ").number(to.framing.length).add("\r\n");
  } else if (to.framing.kind == Framing::Kind::chunked) {
    cursor.add("Transfer-Encoding: chunked\r\n");
  }
  cursor.add("\r\n");
}

// RFC 9110 15: the phrases of the statuses that Nexus itself sends.
constexpr std::string_view reason_phrase(std::uint16_t status) {
  switch (status) {
    case 200: return "OK";
    case 400: return "Bad Request";
    case 401: return "Unauthorized";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 413: return "Content Too Large";
    case 417: return "Expectation Failed";
    case 429: return "Too Many Requests";
    case 431: return "Request Header Fields Too Large";
    case 501: return "Not Implemented";
    case 502: return "Bad Gateway";
    case 503: return "Service Unavailable";
    case 504: return "Gateway Timeout";
    case 508: return "Loop Detected";
    default: assert(false); return "";
  }
}

// How an answer of Nexus's own leaves.
struct OwnResponse {
  std::uint16_t status = 200;
  std::string_view content_type = "application/json";
  std::string_view extra_fields;  // whole lines
  std::string_view request_id;
  std::uint8_t retry_after_s = 0;
  bool http_1_0 = false;
  bool keep_alive = true;
};

inline void append_own_head(std::string& out, const OwnResponse& answer, std::size_t body_bytes) {
  out.append("HTTP/1.1 ").append(Digits(answer.status).view()).append(" ");
  out.append(reason_phrase(answer.status)).append("\r\n");
  detail::append_field(out, "Content-Type", answer.content_type);
  detail::append_field(out, "Content-Length", Digits(body_bytes).view());
  out.append(answer.extra_fields);
  if (answer.status == 401) out.append("WWW-Authenticate: Bearer\r\n");  // RFC 9110 15.5.2 asks for it
  if (answer.retry_after_s > 0) detail::append_field(out, "Retry-After", Digits(answer.retry_after_s).view());
  if (!answer.request_id.empty()) detail::append_field(out, "X-Request-Id", answer.request_id);
  out.append(connection_line(answer.http_1_0, answer.keep_alive));
  out.append("\r\n");
}

}  // namespace nexus
