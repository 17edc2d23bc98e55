// heads.h
// Owns:     writing heads: the request's to a backend, the response's to a client, and whole answers of Nexus's own.
// Promises: a head is always written anew from parsed fields; hop-by-hop fields and those that Connection names stay
//           behind (RFC 9110 7.6.1), but no field that matters can be dropped that way; framing is ours.
// Leaves:   when to send what to exchange.h and server.h.
// Threads:  pure functions over buffers of the caller.
#pragma once

#include <string>
#include <string_view>

#include "http.h"
#include "openai.h"
#include "text.h"

namespace nexus {

constexpr std::string_view kVersion = "0.1.0";

// A parsed head beside the bytes that it lies in.
struct HeadView {
  const char* base = nullptr;
  const FieldTable* fields = nullptr;
};

namespace detail {

// The values of the Connection fields that name other fields, so that most heads need no second look.
inline bool names_fields(std::string_view connection) {
  while (!connection.empty()) {
    const std::string_view element = next_list_element(connection);
    if (!element.empty() && !equals_ignoring_case(element, "keep-alive") && !equals_ignoring_case(element, "close")) {
      return true;
    }
  }
  return false;
}

inline bool any_connection_names(const HeadView& head) {
  for (const FieldRow& row : *head.fields) {
    if (row.field == Field::connection && names_fields(value_of(head.base, row))) return true;
  }
  return false;
}

inline bool named_by_connection(const HeadView& head, std::string_view name) {
  for (const FieldRow& row : *head.fields) {
    if (row.field == Field::connection && list_holds(value_of(head.base, row), name)) return true;
  }
  return false;
}

inline void append_field(std::string& out, std::string_view name, std::string_view value) {
  out.append(name).append(": ").append(value).append("\r\n");
}

// Appends the end-to-end fields that `keep` lets through.
template <class Keep>
void append_end_to_end(std::string& out, const HeadView& head, Keep&& keep) {
  const bool connection_names = any_connection_names(head);
  for (const FieldRow& row : *head.fields) {
    if (is_hop_by_hop(row.field) || row.field == Field::content_length || row.field == Field::x_nexus ||
        row.field == Field::x_request_id || row.field == Field::underscore_twin || !keep(row.field)) {
      continue;
    }
    const std::string_view name = name_of(head.base, row);
    if (connection_names && row.field == Field::other && named_by_connection(head, name)) continue;
    append_field(out, name, value_of(head.base, row));
  }
}

}  // namespace detail

struct UpstreamHead {
  std::string_view method;
  std::string_view target;
  std::string_view base_path;
  std::string_view host;
  std::string_view authorization;  // of the backend's own key; empty: none
  bool pass_authorization = true;  // the client's own, where the backend has no key
  std::string_view request_id;
  std::string_view via;  // this instance's name in Via
  std::uint64_t content_length = 0;
};

// Accept-Encoding stays behind too: a compressed answer could not be counted.
inline void append_request_head(std::string& out, const HeadView& client, const UpstreamHead& to) {
  out.append(to.method).append(" ").append(to.base_path).append(to.target).append(" HTTP/1.1\r\n");
  detail::append_field(out, "Host", to.host);
  const bool client_key = to.pass_authorization && to.authorization.empty();
  detail::append_end_to_end(out, client, [client_key](Field field) {
    if (field == Field::authorization) return client_key;
    return field != Field::host && field != Field::expect && field != Field::accept_encoding;
  });
  if (!to.authorization.empty()) detail::append_field(out, "Authorization", to.authorization);
  detail::append_field(out, "X-Request-Id", to.request_id);
  out.append("Via: 1.1 ").append(to.via).append("\r\n");
  detail::append_field(out, "Content-Length", Digits(to.content_length).view());
  out.append("\r\n");
}

struct ClientHead {
  std::string_view backend;
  std::string_view request_id;
  std::string_view route_reason;
  std::string_view fallback_model;  // empty: no fallback
  Framing framing;                  // towards the client
  bool http_1_0 = false;
  bool keep_alive = true;
};

inline void append_connection(std::string& out, bool http_1_0, bool keep_alive) {
  if (!keep_alive) {
    out.append("Connection: close\r\n");
  } else if (http_1_0) {
    out.append("Connection: keep-alive\r\n");
  }
}

inline void append_response_head(std::string& out, const HeadView& answer, const ResponseHead& head,
                                 const ClientHead& to) {
  out.append("HTTP/1.1 ").append(Digits(head.status).view()).append(" ");
  out.append(answer.base + head.reason_at, head.reason_bytes).append("\r\n");
  detail::append_end_to_end(out, answer, [](Field) { return true; });
  detail::append_field(out, "X-Nexus-Backend", to.backend);
  detail::append_field(out, "X-Nexus-Route-Reason", to.route_reason);
  if (!to.fallback_model.empty()) detail::append_field(out, "X-Nexus-Fallback-Model", to.fallback_model);
  detail::append_field(out, "X-Request-Id", to.request_id);
  append_connection(out, to.http_1_0, to.keep_alive);
  if (to.framing.kind == Framing::Kind::length) {
    detail::append_field(out, "Content-Length", Digits(to.framing.length).view());
  } else if (to.framing.kind == Framing::Kind::chunked) {
    out.append("Transfer-Encoding: chunked\r\n");
  }
  out.append("\r\n");
}

// How an answer of Nexus's own leaves.
struct OwnAnswer {
  std::uint16_t status = 200;
  std::string_view content_type = "application/json";
  std::string_view extra_fields;  // whole lines
  std::string_view request_id;
  std::uint8_t retry_after_s = 0;
  bool http_1_0 = false;
  bool keep_alive = true;
};

inline void append_own_head(std::string& out, const OwnAnswer& answer, std::size_t body_bytes) {
  out.append("HTTP/1.1 ").append(Digits(answer.status).view()).append(" ");
  out.append(reason_phrase(answer.status)).append("\r\n");
  detail::append_field(out, "Content-Type", answer.content_type);
  detail::append_field(out, "Content-Length", Digits(body_bytes).view());
  out.append(answer.extra_fields);
  if (answer.status == 401) out.append("WWW-Authenticate: Bearer\r\n");  // RFC 9110 15.5.2 asks for it
  if (answer.retry_after_s > 0) detail::append_field(out, "Retry-After", Digits(answer.retry_after_s).view());
  if (!answer.request_id.empty()) detail::append_field(out, "X-Request-Id", answer.request_id);
  append_connection(out, answer.http_1_0, answer.keep_alive);
  out.append("\r\n");
}

// An error of Nexus's own, head and body. `message` is the row's where it is empty.
inline void append_own_error(std::string& out, Refusal refusal, std::string_view message, OwnAnswer answer,
                             bool with_body, std::string_view param = {}) {
  const RefusalRow& row = row_of(refusal);
  std::string body;
  append_error_body(body, row, message.empty() ? row.message : message, param);
  answer.status = row.status;
  answer.retry_after_s = row.retry_after_s;
  append_own_head(out, answer, body.size());
  if (with_body) out += body;
}

}  // namespace nexus
