// errors.h
// Owns:      the table of Nexus's own errors, and the response bodies made from it.
// Promises:  one row for each error (status, type, code, metrics label, message); a body is valid JSON whatever bytes a
//            name in it has.
// Leaves:    when an error is due to exchange.h and worker.h; heads to head_writer.h.
// Threads:   pure functions.
// Tested by: tests/worker_test.cpp, tests/e2e/errors.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "nexus/api/endpoints.h"
#include "nexus/base/text_buffer.h"
#include "nexus/http/head_writer.h"
#include "nexus/metrics/slab.h"

namespace nexus {

enum class ApiError : std::uint8_t {
  malformed,
  tls_expected,
  bad_version,
  target_too_long,
  header_too_large,
  too_many_fields,
  header_timeout,
  unknown_method,
  unknown_coding,
  bad_expectation,
  websocket,
  not_found,
  method_not_allowed,
  unauthorized,
  admin_refused,
  admin_only,
  body_too_large,
  body_timeout,
  body_memory,
  bad_json,
  bad_multipart,
  duplicate_key,
  no_model,
  wrong_type,
  too_deep,
  model_not_found,
  not_spoken,
  not_capable,
  no_healthy_backend,
  overload,
  backends_full,
  queue_full,
  queue_timeout,
  key_requests,
  key_tokens,
  key_concurrency,
  draining,
  too_many_connections,
  out_of_memory,
  no_descriptor,
  no_port,
  no_route,
  connect_failed,
  backend_broke,
  backend_refuses_key,
  backend_not_http,
  backend_head_too_large,
  backend_timeout,
  request_timeout,
  loop_detected,
  metrics_unavailable,
  count,
};

struct ApiErrorRow {
  ApiError error;
  std::uint16_t status;
  std::string_view type;
  std::string_view code;
  ErrorType label;
  std::uint8_t retry_after_s;  // 0: no Retry-After
  std::string_view message;    // what happened, and what to do
};

namespace detail {
constexpr std::string_view kBadRequest = "invalid_request_error";
constexpr std::string_view kUnavailable = "service_unavailable";
constexpr std::string_view kServerError = "server_error";

constexpr std::array<ApiErrorRow, static_cast<std::size_t>(ApiError::count)> kApiErrors{{
    {ApiError::malformed, 400, kBadRequest, "malformed_request", ErrorType::bad_request, 0,
     "The request is not valid HTTP/1.1. Check the client, or the proxy in front of Nexus."},
    {ApiError::tls_expected, 400, kBadRequest, "tls_expected", ErrorType::bad_request, 0,
     "This port speaks TLS. Use https:// in place of http://."},
    {ApiError::bad_version, 505, kBadRequest, "http_version", ErrorType::bad_request, 0,
     "Nexus speaks HTTP/1.1 and HTTP/1.0. Send the request in one of these versions."},
    {ApiError::target_too_long, 414, kBadRequest, "target_too_long", ErrorType::bad_request, 0,
     "The path of the request, with its query, is longer than max_header. Send data in the body."},
    {ApiError::header_too_large, 431, kBadRequest, "header_too_large", ErrorType::bad_request, 0,
     "The request header is larger than max_header. Send fewer or shorter header fields."},
    {ApiError::too_many_fields, 431, kBadRequest, "too_many_fields", ErrorType::bad_request, 0,
     "The request header has more than max_fields fields. Send fewer."},
    {ApiError::header_timeout, 408, kBadRequest, "header_timeout", ErrorType::bad_request, 0,
     "The request header did not arrive within header_timeout. Send the request again."},
    {ApiError::unknown_method, 501, kBadRequest, "unknown_method", ErrorType::bad_request, 0,
     "Nexus does not know this method. It serves GET, HEAD, POST, DELETE and OPTIONS."},
    {ApiError::unknown_coding, 501, kBadRequest, "unknown_transfer_coding", ErrorType::bad_request, 0,
     "The only supported transfer coding is chunked. Send the body with Content-Length or chunked."},
    {ApiError::bad_expectation, 417, kBadRequest, "expectation_failed", ErrorType::bad_request, 0,
     "The only supported expectation is 100-continue. Remove the Expect field."},
    {ApiError::websocket, 501, kBadRequest, "websocket_not_supported", ErrorType::bad_request, 0,
     "Nexus does not pass on WebSocket connections. Use the HTTP API, with stream: true for a stream."},
    {ApiError::not_found, 404, kBadRequest, "not_found", ErrorType::bad_request, 0,
     "Unknown path. GET /v1/models lists the available models."},
    {ApiError::method_not_allowed, 405, kBadRequest, "method_not_allowed", ErrorType::bad_request, 0,
     "This path does not support this method. The Allow field lists the methods that it supports."},
    {ApiError::unauthorized, 401, kBadRequest, "invalid_api_key", ErrorType::bad_request, 0,
     "The API key is missing or unknown. Send it as Authorization: Bearer KEY or x-api-key: KEY."},
    {ApiError::admin_refused, 403, kBadRequest, "admin_refused", ErrorType::bad_request, 0,
     "This changes the models of a server. Send it to the server, or name a backend for it as ollama_admin in "
     "nexus.conf."},
    {ApiError::admin_only, 403, kBadRequest, "admin_only", ErrorType::bad_request, 0,
     "This API key may not read the metrics. That needs admin=1 behind the key in api_keys_file."},
    {ApiError::body_too_large, 413, kBadRequest, "body_too_large", ErrorType::bad_request, 0,
     "The request body is larger than max_body. Send a shorter prompt or smaller images."},
    {ApiError::body_timeout, 408, kBadRequest, "body_timeout", ErrorType::bad_request, 0,
     "The request body did not arrive within body_timeout. Send the request again."},
    {ApiError::body_memory, 503, kUnavailable, "body_memory", ErrorType::overloaded, 1,
     "The memory for request bodies (body_memory) is full. Try again shortly."},
    {ApiError::bad_json, 400, kBadRequest, "invalid_json", ErrorType::bad_request, 0,
     "The request body is not a JSON object in UTF-8. Send one with at least \"model\"."},
    {ApiError::bad_multipart, 400, kBadRequest, "invalid_multipart", ErrorType::bad_request, 0,
     "The request body is not a whole multipart/form-data form. Send one with the boundary of its Content-Type."},
    {ApiError::duplicate_key, 400, kBadRequest, "duplicate_key", ErrorType::bad_request, 0,
     "A key that Nexus reads occurs twice in the request body. Send it once."},
    {ApiError::no_model, 400, kBadRequest, "missing_model", ErrorType::bad_request, 0,
     "The request body has no \"model\". GET /v1/models lists the available models."},
    {ApiError::wrong_type, 400, kBadRequest, "invalid_type", ErrorType::bad_request, 0,
     "A value has the wrong type: model must be a string, stream a boolean, stream_options an object."},
    {ApiError::too_deep, 400, kBadRequest, "json_too_deep", ErrorType::bad_request, 0,
     "The request body is nested deeper than 512 levels. Send a flatter one."},
    {ApiError::model_not_found, 404, kBadRequest, "model_not_found", ErrorType::no_backend, 0,
     "No backend serves this model. GET /v1/models lists the available models."},
    {ApiError::not_spoken, 501, kBadRequest, "api_not_served", ErrorType::no_backend, 0,
     "None of the model's backends serves this path. Use an API that they serve, or correct apis in nexus.conf."},
    {ApiError::not_capable, 400, kBadRequest, "model_not_capable", ErrorType::bad_request, 0,
     "No backend's copy of this model supports what the request needs (images, tools, JSON mode or its length). Use "
     "another model, or correct vision, tools, json_mode and context_length in nexus.conf."},
    {ApiError::no_healthy_backend, 503, kUnavailable, "no_healthy_backend", ErrorType::no_healthy_backend, 1,
     "No backend of this model is healthy now. Try again shortly."},
    {ApiError::overload, 503, kUnavailable, "overloaded", ErrorType::overloaded, 1,
     "Nexus has max_pending requests in flight already. Try again shortly."},
    {ApiError::backends_full, 429, "rate_limit_error", "backends_full", ErrorType::overloaded, 1,
     "Every backend of this model has max_pending requests in flight, and there is no queue. Try again later."},
    {ApiError::queue_full, 429, "rate_limit_error", "queue_full", ErrorType::overloaded, 1,
     "Every backend of this model has max_pending requests in flight, and the queue of all models is full. Try again "
     "later."},
    {ApiError::queue_timeout, 503, kUnavailable, "queue_timeout", ErrorType::overloaded, 5,
     "No backend of this model became free within the queue's timeout. Try again later."},
    {ApiError::key_requests, 429, "requests", "rate_limit_exceeded", ErrorType::overloaded, 0,
     "The API key has used its requests of this minute. Try again later."},
    {ApiError::key_tokens, 429, "tokens", "rate_limit_exceeded", ErrorType::overloaded, 0,
     "The API key has used its tokens of this minute. Try again later."},
    {ApiError::key_concurrency, 429, "rate_limit_error", "key_concurrency", ErrorType::overloaded, 1,
     "The API key has max_pending requests in flight already. Try again later."},
    {ApiError::draining, 503, kUnavailable, "shutting_down", ErrorType::drain, 5,
     "This gateway is shutting down. Try again, or use another one."},
    {ApiError::too_many_connections, 503, kUnavailable, "too_many_connections", ErrorType::overloaded, 1,
     "Nexus has max_connections client connections already. Try again shortly."},
    {ApiError::out_of_memory, 503, kUnavailable, "out_of_memory", ErrorType::overloaded, 1,
     "This host is out of memory. Try again shortly."},
    {ApiError::no_descriptor, 503, kUnavailable, "no_descriptor", ErrorType::overloaded, 1,
     "Nexus has no free file descriptor for a connection to a backend. Raise its limit (LimitNOFILE), or lower "
     "max_connections."},
    {ApiError::no_port, 503, kUnavailable, "no_port", ErrorType::overloaded, 1,
     "This host has no free local port for a connection to a backend. Raise idle_connections, or "
     "net.ipv4.ip_local_port_range."},
    {ApiError::no_route, 503, kUnavailable, "no_route", ErrorType::overloaded, 1,
     "This host has no route to the backend's network. Check its network, and IPv6 if the backend's address needs it."},
    {ApiError::connect_failed, 502, kServerError, "bad_gateway", ErrorType::backend_error, 0,
     "Could not connect to the backend. Check that it runs, and its url in nexus.conf."},
    {ApiError::backend_broke, 502, kServerError, "bad_gateway", ErrorType::backend_error, 0,
     "The backend closed the connection before its response was complete. See its log."},
    {ApiError::backend_refuses_key, 502, kServerError, "bad_gateway", ErrorType::backend_error, 0,
     "The backend refused the API key that Nexus has for it. Correct api_key_env or api_key_file of its section."},
    {ApiError::backend_not_http, 502, kServerError, "bad_gateway", ErrorType::parse_error, 0,
     "The backend's response is not valid HTTP/1.1. Check that its url names an inference server."},
    {ApiError::backend_head_too_large, 502, kServerError, "bad_gateway", ErrorType::parse_error, 0,
     "The backend's response header exceeds max_header or max_fields. Raise these in nexus.conf, or see the backend."},
    {ApiError::backend_timeout, 504, kServerError, "gateway_timeout", ErrorType::timeout, 0,
     "The backend did not respond in time. Check its load, and the timeouts in [upstream]."},
    {ApiError::request_timeout, 504, kServerError, "request_timeout", ErrorType::timeout, 0,
     "The request took longer than request_timeout. Ask for a shorter answer, or raise it in [upstream]."},
    {ApiError::loop_detected, 508, kBadRequest, "loop_detected", ErrorType::other, 0,
     "Routing loop: one of Nexus's backends forwards to this same Nexus. Check the url of each backend."},
    {ApiError::metrics_unavailable, 503, kUnavailable, "metrics_unavailable", ErrorType::other, 0,
     "Metrics are disabled ([metrics] enabled = no), or cannot be rendered now."},
}};
}  // namespace detail

constexpr const ApiErrorRow& row_of(ApiError error) { return detail::kApiErrors[static_cast<std::size_t>(error)]; }

static_assert(std::all_of(detail::kApiErrors.begin(), detail::kApiErrors.end(),
                          [](const ApiErrorRow& row) { return &row == &row_of(row.error); }),
              "the rows stand in the order of the enum");

namespace detail {

// Anthropic's error types go by the status.
constexpr std::string_view anthropic_type_of(std::uint16_t status) {
  switch (status) {
    case 401: return "authentication_error";
    case 403: return "permission_error";
    case 404: return "not_found_error";
    case 413: return "request_too_large";
    case 429: return "rate_limit_error";
    case 503: return "overloaded_error";
    case 504: return "timeout_error";
    default: return status < 500 ? "invalid_request_error" : "api_error";
  }
}

}  // namespace detail

// What the body of an error says besides its row.
struct ErrorText {
  std::string_view message = {};  // empty: the row's
  std::string_view param = {};    // the member of the request that is wrong; empty: none
  std::string_view request_id = {};
};

// Appends the body of an error, as clients of an API expect it.
inline void append_error_body(std::string& out, const ApiErrorRow& row, ErrorShape shape, const ErrorText& text) {
  const std::string_view message = text.message.empty() ? row.message : text.message;
  JsonWriter json(out);
  json.begin_object();
  switch (shape) {
    case ErrorShape::openai:
      json.key("error").begin_object().field("message", message).field("type", row.type).key("param");
      text.param.empty() ? json.literal("null") : json.value(text.param);
      json.field("code", row.code).end_object();
      break;
    case ErrorShape::anthropic:
      json.field("type", "error").key("error").begin_object();
      json.field("type", detail::anthropic_type_of(row.status)).field("message", message).end_object();
      json.field("request_id", text.request_id);
      break;
    case ErrorShape::ollama: json.field("error", message); break;
  }
  json.end_object();
}

// Where a stream breaks off.
struct StreamEnd {
  std::uint64_t events = 0;  // complete ones before it
  bool in_line = true;       // false: behind a complete line
};

// Appends an error as the last event of a stream. Behind a complete line there is no empty one, because readers of
// newline-delimited JSON take it for a value.
inline void append_error_event(std::string& out, const ApiErrorRow& row, const DialectRow& dialect, StreamEnd end,
                               const ErrorText& text) {
  const bool lines = dialect.framing == StreamFraming::lines;
  out += lines ? (end.in_line ? "\n" : "") : dialect.response.named ? "\n\nevent: error\ndata: " : "\n\ndata: ";
  if (dialect.dialect == Dialect::responses) {
    JsonWriter json(out);
    json.begin_object().field("type", "error").field("code", row.code).field("message", row.message);
    json.key("param").literal("null").field("sequence_number", end.events).end_object();
  } else {
    append_error_body(out, row, dialect.errors, text);
  }
  out += lines ? "\n" : "\n\n";
}

// Appends an error response, head and body; the request id is the answer's. Allocates nothing if `out` has room,
// because it also reports that there is no memory.
inline void append_own_error(std::string& out, ApiError error, ErrorShape shape, ErrorText text, OwnResponse answer,
                             bool with_body) {
  const ApiErrorRow& row = row_of(error);
  const std::size_t body_at = out.size();
  text.request_id = answer.request_id;
  append_error_body(out, row, shape, text);
  const std::size_t head_at = out.size();
  answer.status = row.status;
  answer.retry_after_s = row.retry_after_s;
  append_own_head(out, answer, head_at - body_at);
  const auto at = [&out](std::size_t byte) { return out.begin() + static_cast<std::ptrdiff_t>(byte); };
  if (with_body) {
    std::rotate(at(body_at), at(head_at), out.end());
  } else {
    out.erase(at(body_at), at(head_at));
  }
}

}  // namespace nexus
