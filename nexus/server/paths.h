// paths.h
// Owns:     the paths that Nexus serves (its own pages and the proxied endpoints), and the nearest one to any other.
// Promises: a path is compared byte by byte: no escape is decoded and no slash dropped, so that nothing behind Nexus
//           can read another path than Nexus did.
// Leaves:   the endpoints to api/endpoints.h; answering to builtin_pages.h and session_driver.h.
// Threads:  any; constants and pure functions.
// Tested by: tests/paths_test.cpp, tests/e2e/endpoints.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "nexus/api/endpoints.h"
#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/config/settings.h"

namespace nexus {

enum class PageKind : std::uint8_t {
  none,
  health,
  models,
  model,
  tags,
  running,
  version,
  metrics,
  openmetrics,  // at the path of `metrics`, for a client that prefers it
  stats,
  status,
  endpoint,
  server
};
// A page that the control thread makes.
struct WantedPage {
  PageKind kind = PageKind::metrics;
  std::shared_ptr<const ApiKey> key{};  // it has only the models that this key may use; null: all
};

constexpr std::size_t kPageKinds = static_cast<std::size_t>(PageKind::server) + 1;

constexpr std::string_view kModelPrefix = "/v1/models/";

struct PageRow {
  std::string_view path;
  PageKind kind;
  bool for_operators;  // served on metrics_listen alone, if that is set
};

inline constexpr std::array<PageRow, 8> kPages{{
    {"/health", PageKind::health, true},
    {"/metrics", PageKind::metrics, true},
    {"/v1/stats", PageKind::stats, true},
    {"/", PageKind::status, true},
    {"/v1/models", PageKind::models, false},
    {"/api/tags", PageKind::tags, false},
    {"/api/ps", PageKind::running, false},
    {"/api/version", PageKind::version, false},
}};

// The use of the listener on which a request came.
enum class Listens : std::uint8_t { for_all, for_clients, for_operators };  // for_all: there is no metrics_listen

inline Listens use_of_listener(bool metrics_only, const ServerSettings& server) {
  if (metrics_only) return Listens::for_operators;
  return server.metrics_listen.empty() ? Listens::for_all : Listens::for_clients;
}

constexpr bool is_served(const PageRow& row, Listens on) {
  return on == Listens::for_all || row.for_operators == (on == Listens::for_operators);
}

inline const Endpoint* find_endpoint(std::string_view path, Listens on) {
  if (on == Listens::for_operators) return nullptr;
  for (const Endpoint& endpoint : kEndpoints) {
    if (path == endpoint.path || (endpoint.body == BodyFormat::none && !endpoint.id_in(path).empty())) return &endpoint;
  }
  return nullptr;
}

inline PageKind page_of(std::string_view path, Listens on) {
  for (const PageRow& row : kPages) {
    if (row.path == path) return is_served(row, on) ? row.kind : PageKind::none;
  }
  if (path == "*") return PageKind::server;  // the head parser lets it through for OPTIONS alone (RFC 9112 3.2.4)
  if (find_endpoint(path, on) != nullptr) return PageKind::endpoint;
  const bool is_model = path.starts_with(kModelPrefix) && path.size() > kModelPrefix.size();
  return is_model && on != Listens::for_operators ? PageKind::model : PageKind::none;
}

// True if the page tells what backends have, so that it says little before they were asked.
constexpr bool is_of_backends(PageKind kind) { return kind >= PageKind::models && kind <= PageKind::version; }
static_assert(is_of_backends(PageKind::models) && is_of_backends(PageKind::model) && is_of_backends(PageKind::tags) &&
              is_of_backends(PageKind::running) && is_of_backends(PageKind::version) &&
              !is_of_backends(PageKind::health) && !is_of_backends(PageKind::metrics));

constexpr bool needs_key(PageKind kind) { return kind != PageKind::health && kind != PageKind::none; }

// The methods that a path has; `endpoint`: null if it is none.
inline std::string methods_of(PageKind kind, const Endpoint* endpoint) {
  if (endpoint == nullptr) return kind == PageKind::server ? "GET, HEAD, POST, DELETE, OPTIONS" : "GET, HEAD, OPTIONS";
  std::string methods;
  for (const llhttp_method method : {HTTP_GET, HTTP_POST, HTTP_DELETE}) {
    if (endpoint->serves(method)) methods.append(method_name(method)).append(", ");
  }
  return methods += "OPTIONS";
}

// The served path that is probably meant by `path`, which is none; empty if none is like it. A part of a path is most
// like it (`/chat`, `/openai/v1/models/`); else at most a third of its bytes may differ (`/v1/embedding`).
inline std::string_view nearest_path(std::string_view path, Listens on) {
  const std::string_view asked = path.substr(0, path.find_last_not_of('/') + 1);
  std::string_view nearest;
  std::size_t least = SIZE_MAX;
  const auto consider = [&](std::string_view known) {
    constexpr std::size_t kNoPart = 1u << 20;  // more than any distance between parts
    const bool is_part = asked.size() > 1 && known.size() > 1 &&
                         (known.find(asked) != std::string_view::npos || asked.find(known) != std::string_view::npos);
    const std::size_t typos = is_part ? 0 : edit_distance(asked, known);
    const std::size_t distance =
        is_part ? std::max(asked.size(), known.size()) - std::min(asked.size(), known.size()) : kNoPart + typos;
    if (typos > known.size() / 3 || distance >= least) return;
    least = distance;
    nearest = known;
  };
  for (const PageRow& row : kPages) {
    if (is_served(row, on)) consider(row.path);
  }
  if (on == Listens::for_operators) return nearest;
  for (const Endpoint& endpoint : kEndpoints) {  // an OpenAI path has a twin without /v1
    if (endpoint.body == BodyFormat::none) continue;
    if (endpoint.path.starts_with("/v1/") || endpoint.path.starts_with("/api/")) consider(endpoint.path);
  }
  return nearest;
}

}  // namespace nexus
