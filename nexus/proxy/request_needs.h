// request_needs.h
// Owns:     what a request's body needs of a backend, and the errors about a body or a model that can't be served.
// Promises: pure functions over the body's facts and a snapshot.
// Leaves:   reading the body to api/request_json.h, choosing to candidate_picker.h, sending errors to exchange.h.
// Threads:  any.
// Tested by: tests/hostile, tests/e2e/routing.test.mjs
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/errors.h"
#include "nexus/api/incremental_json.h"
#include "nexus/api/request_json.h"
#include "nexus/base/limits.h"
#include "nexus/fleet/registry.h"
#include "nexus/fleet/router.h"
#include "nexus/proxy/upstream_request.h"

namespace nexus {

// Reads the complete body; `incremental`: its reader, if the body was read while it came.
inline std::optional<ApiError> read_body(JsonReader& json, const Endpoint& endpoint, IncrementalJson* incremental,
                                         const RequestView& request, bool find_messages, BodyFacts& facts) {
  const std::string_view body(request.body, request.body_bytes);
  if (incremental == nullptr) return read_body(json, endpoint, body, facts, find_messages);
  return incremental->read(json, endpoint, body, facts, find_messages);
}

inline RouteNeeds needs_of(const RequestView& request, const BodyFacts& facts) {
  RouteNeeds needs;
  needs.tools = facts.has_tools;
  needs.json_mode = facts.json_mode;
  needs.context_tokens = request.body_bytes / kBytesPerToken;
  needs.vision = facts.has_images;
  return needs;
}

inline bool is_available(const Snapshot& snapshot, const ModelEntry& entry) {
  return std::any_of(entry.offers.begin(), entry.offers.end(),
                     [&](const Offer& offer) { return snapshot.backends[offer.backend].healthy; });
}

// The message of a 404: lists the available models, as far as they fit.
inline std::string unknown_model_message(const Snapshot& snapshot, std::string_view asked) {
  std::vector<std::string_view> names;
  for (const auto& [name, entry] : snapshot.models) {
    if (is_available(snapshot, entry)) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  std::string message = "The model '";
  message.append(asked).append("' is not available here. ");
  message += names.empty() ? "No model is available now: see /health." : "Available: ";
  const std::size_t start = message.size();
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (message.size() - start + names[i].size() > kListedModelBytes) {
      message += ", … (GET /v1/models lists all)";
      break;
    }
    if (i > 0) message += ", ";
    message += names[i];
  }
  if (!names.empty()) message += ".";
  return message;
}

}  // namespace nexus
