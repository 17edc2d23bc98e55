// request_needs.h
// Owns:     what a request's body needs of a backend, and the errors about a body or a model that can't be served.
// Promises: pure functions over the body's facts and a snapshot.
// Leaves:   reading the body to api/request_json.h, choosing to candidate_picker.h, sending errors to exchange.h.
// Threads:  any.
// Tested by: tests/request_needs_test.cpp, tests/hostile, tests/e2e/routing.test.mjs
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

// The bytes of base64 in a body: images and files as data URLs, sound as `"data":"…"`. They are no text.
inline std::size_t base64_bytes(std::string_view body) {
  constexpr std::string_view kUrl = ";base64,", kKey = R"("data")";
  std::size_t total = 0;
  std::size_t url = body.find(kUrl), key = body.find(kKey);
  while (url != std::string_view::npos || key != std::string_view::npos) {
    std::size_t from = url + kUrl.size();
    if (key < url) {
      from = std::min(body.find_first_not_of(" \t\r\n:", key + kKey.size()), body.size());
      from += body.substr(from, 1) == "\"" ? 1 : 0;
    }
    const std::size_t to = std::min(body.find('"', from), body.size());
    total += to - from;
    if (url < to) url = body.find(kUrl, to);
    if (key < to) key = body.find(kKey, to);
  }
  return total;
}

// `count_text`: a backend's context_length matters.
inline RouteNeeds needs_of(const RequestView& request, const BodyFacts& facts, bool count_text) {
  RouteNeeds needs;
  needs.tools = facts.has_tools;
  needs.json_mode = facts.json_mode;
  if (count_text) {
    const std::string_view body(request.body, request.body_bytes);
    needs.context_tokens = (body.size() - base64_bytes(body)) / kBytesPerToken;
  }
  needs.vision = facts.has_images;
  return needs;
}

inline bool is_available(const Snapshot& snapshot, const ModelEntry& entry) {
  return std::any_of(entry.offers.begin(), entry.offers.end(),
                     [&](const Offer& offer) { return snapshot.backends[offer.backend].healthy; });
}

// The names of the available models, as far as they fit into a message.
inline std::string list_available(const Snapshot& snapshot) {
  std::vector<std::string_view> names;
  for (const auto& [name, entry] : snapshot.models) {
    if (is_available(snapshot, entry)) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  std::string list;
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (list.size() + names[i].size() > kListedModelBytes) return list + ", … (GET /v1/models lists all)";
    if (i > 0) list += ", ";
    list += names[i];
  }
  return list;
}

// The message of a 404.
inline std::string unknown_model_message(const Snapshot& snapshot, std::string_view asked) {
  const std::string& names = snapshot.available_names;
  std::string message = "The model '";
  message.append(asked).append("' is not available here. ");
  if (names.empty()) return message + "No model is available now: see /health.";
  return message.append("Available: ").append(names).append(".");
}

}  // namespace nexus
