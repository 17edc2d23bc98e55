// errors.h
// Owns:     what Nexus says in the OpenAI API's words: the table of its own errors, and the bodies made of them.
// Promises: one row an error (status, type, code, metrics label, what to do); bodies are valid JSON whatever a name in
//           them holds.
// Leaves:   when an error is due to exchange.h and worker.h; heads to head_writer.h.
// Threads:  pure functions.
#pragma once

#include <array>
#include <cassert>
#include <cstdint>
#include <string>
#include <string_view>

#include "nexus/base/text.h"
#include "nexus/http/head_writer.h"
#include "nexus/metrics/slab.h"

namespace nexus {

enum class ApiError : std::uint8_t {
  malformed,
  header_too_large,
  header_timeout,
  unknown_coding,
  bad_expectation,
  not_found,
  method_not_allowed,
  unauthorized,
  body_too_large,
  body_timeout,
  body_memory,
  bad_json,
  duplicate_key,
  no_model,
  wrong_type,
  too_deep,
  model_not_found,
  not_capable,
  no_healthy_backend,
  overload,
  queue_full,
  queue_timeout,
  draining,
  too_many_connections,
  out_of_memory,
  connect_failed,
  backend_broke,
  backend_not_http,
  backend_timeout,
  loop_detected,
  metrics_unavailable,
  count,
};

struct ApiErrorRow {
  std::uint16_t status;
  std::string_view type;
  std::string_view code;
  ErrorType label;
  std::uint8_t retry_after_s;  // 0: no Retry-After
  std::string_view message;    // what happened and what to do
};

namespace detail {
constexpr std::string_view kBadRequest = "invalid_request_error";
constexpr std::string_view kUnavailable = "service_unavailable";

constexpr std::array<ApiErrorRow, static_cast<std::size_t>(ApiError::count)> kApiErrors{{
    {400, kBadRequest, "malformed_request", ErrorType::other, 0,
     "The request is not well-formed HTTP/1.1. Check the client or the proxy in front of it."},
    {431, kBadRequest, "header_too_large", ErrorType::other, 0,
     "The request's header is larger than max_header. Send fewer or shorter header fields."},
    {408, kBadRequest, "header_timeout", ErrorType::other, 0,
     "The request's header did not arrive within header_timeout. Send it again."},
    {501, kBadRequest, "unknown_transfer_coding", ErrorType::other, 0,
     "The only transfer coding understood is chunked. Send the body with Content-Length or chunked."},
    {417, kBadRequest, "expectation_failed", ErrorType::other, 0,
     "The only expectation understood is 100-continue. Drop the Expect field."},
    {404, kBadRequest, "not_found", ErrorType::other, 0,
     "There is nothing at this path. See /v1/models for what can be asked for."},
    {405, kBadRequest, "method_not_allowed", ErrorType::other, 0,
     "This path does not take that method. The Allow field lists those that it takes."},
    {401, kBadRequest, "invalid_api_key", ErrorType::other, 0,
     "The API key is missing or not known here. Send it as Authorization: Bearer KEY."},
    {413, kBadRequest, "body_too_large", ErrorType::other, 0,
     "The request's body is larger than max_body. Send a shorter prompt or smaller images."},
    {408, kBadRequest, "body_timeout", ErrorType::other, 0,
     "The request's body did not arrive within body_timeout. Send it again."},
    {503, kUnavailable, "body_memory", ErrorType::other, 1,
     "The memory for request bodies (body_memory) is in use. Try again shortly."},
    {400, kBadRequest, "invalid_json", ErrorType::other, 0,
     "The body is not a JSON object in UTF-8. Send one, with at least a model."},
    {400, kBadRequest, "duplicate_key", ErrorType::other, 0,
     "A key that decides where the request goes stands twice in the body. Send it once."},
    {400, kBadRequest, "missing_model", ErrorType::other, 0,
     "The body names no model. Add \"model\"; GET /v1/models lists those available."},
    {400, kBadRequest, "invalid_type", ErrorType::other, 0,
     "model must be a string, stream a boolean and stream_options an object. Correct the body."},
    {400, kBadRequest, "json_too_deep", ErrorType::other, 0,
     "The body is nested deeper than 512 levels. Send a flatter one."},
    {404, kBadRequest, "model_not_found", ErrorType::no_backend, 0, "No backend serves this model."},
    {400, kBadRequest, "model_not_capable", ErrorType::other, 0,
     "No backend's copy of this model can do what the request needs (images, tools, JSON mode or its length). Ask for "
     "another model, or correct vision, tools, json_mode and context_length in the configuration."},
    {503, kUnavailable, "no_healthy_backend", ErrorType::no_healthy_backend, 5,
     "Backends serve this model, but none is healthy now. Try again shortly."},
    {503, kUnavailable, "overloaded", ErrorType::other, 1,
     "As many requests as max_pending allows are in flight. Try again shortly."},
    {429, "rate_limit_error", "queue_full", ErrorType::other, 1,
     "Every backend for this model is full and so is the queue. Try again later."},
    {503, kUnavailable, "queue_timeout", ErrorType::other, 5,
     "No backend for this model became free within the queue's timeout. Try again later."},
    {503, kUnavailable, "shutting_down", ErrorType::other, 5,
     "This gateway is shutting down. Try again, or ask another one."},
    {503, kUnavailable, "too_many_connections", ErrorType::other, 1,
     "As many clients as max_connections allows are connected. Try again shortly."},
    {503, kUnavailable, "out_of_memory", ErrorType::other, 1, "Memory is short on this host. Try again shortly."},
    {502, "server_error", "bad_gateway", ErrorType::backend_error, 0,
     "No connection to the backend could be made. See whether it runs, and its url in the configuration."},
    {502, "server_error", "bad_gateway", ErrorType::backend_error, 0,
     "The backend closed its connection before it had answered. See its log."},
    {502, "server_error", "bad_gateway", ErrorType::parse_error, 0,
     "The backend's answer is not well-formed HTTP/1.1. See whether its url names an inference server."},
    {504, "server_error", "gateway_timeout", ErrorType::timeout, 0,
     "The backend did not answer in time. See its load, and the [upstream] timeouts."},
    {508, kBadRequest, "loop_detected", ErrorType::other, 0,
     "This request has been here before: a backend of this gateway leads back to it. Correct the backends' urls."},
    {503, kUnavailable, "metrics_unavailable", ErrorType::other, 0,
     "Metrics are switched off ([metrics] enabled = no) or can't be rendered now."},
}};
}  // namespace detail

constexpr const ApiErrorRow& row_of(ApiError refusal) { return detail::kApiErrors[static_cast<std::size_t>(refusal)]; }

// The body of an error; `message` is escaped here, `param` is null where it is empty.
inline void append_error_body(std::string& out, const ApiErrorRow& row, std::string_view message,
                              std::string_view param = {}) {
  out += R"({"error":{"message":")";
  append_json_escaped(out, message);
  out += R"(","type":")";
  out += row.type;
  out += R"(","param":)";
  if (param.empty()) {
    out += "null";
  } else {
    out += '"';
    append_json_escaped(out, param);
    out += '"';
  }
  out += R"(,"code":")";
  out += row.code;
  out += R"("}})";
}

// An error of Nexus's own, head and body. `message` is the row's where it is empty. Nothing is allocated where `out`
// has room: these are the words for having no memory, too.
inline void append_own_error(std::string& out, ApiError refusal, std::string_view message, OwnResponse answer,
                             bool with_body, std::string_view param = {}) {
  const ApiErrorRow& row = row_of(refusal);
  const std::size_t body_at = out.size();
  append_error_body(out, row, message.empty() ? row.message : message, param);
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
