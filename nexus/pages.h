// pages.h
// Owns:     the small built-in pages and who may read them: /health, /v1/models, /v1/models/{id}, the API keys.
// Promises: pure functions of a snapshot; keys are compared in constant time; valid JSON whatever a name holds.
// Leaves:   /metrics, /v1/stats and / to prometheus.h, stats.h and status_page.h.
// Threads:  any.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "heads.h"
#include "registry.h"

namespace nexus {

enum class PageKind : std::uint8_t { none, health, models, model, metrics, stats, status };

constexpr std::string_view kModelPrefix = "/v1/models/";

// Which page stands at `path`. With metrics_listen set, the operator's pages stand there and only there.
inline PageKind page_of(std::string_view path, const ServerSettings& server, bool metrics_only) {
  const bool operators_pages = metrics_only || server.metrics_listen.empty();
  if (path == "/health") return operators_pages ? PageKind::health : PageKind::none;
  if (path == "/metrics") return operators_pages ? PageKind::metrics : PageKind::none;
  if (path == "/v1/stats") return operators_pages ? PageKind::stats : PageKind::none;
  if (path == "/") return operators_pages ? PageKind::status : PageKind::none;
  if (metrics_only) return PageKind::none;
  if (path == "/v1/models") return PageKind::models;
  if (path.substr(0, kModelPrefix.size()) == kModelPrefix && path.size() > kModelPrefix.size()) return PageKind::model;
  return PageKind::none;
}

constexpr bool needs_key(PageKind kind) { return kind != PageKind::health && kind != PageKind::none; }

namespace detail {

// Takes as long for a near miss as for a far one; only the length shows.
inline bool equal_in_constant_time(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  unsigned difference = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i]);
  }
  return difference == 0;
}

}  // namespace detail

// Whether the request bears one of the configured keys (RFC 6750 2.1), or none are configured.
inline bool is_authorized(const ServerSettings& server, const HeadView& head) {
  if (server.api_keys.empty()) return true;
  const FieldRow* row = find_field(*head.fields, Field::authorization);
  if (row == nullptr) return false;
  const std::string_view value = value_of(head.base, *row);
  if (!starts_with_ignoring_case(value, "bearer ")) return false;
  const std::string_view key = trim_blanks(value.substr(7));
  bool known = false;
  for (const ApiKey& candidate : server.api_keys) known |= detail::equal_in_constant_time(candidate.key, key);
  return known;
}

// Whether a Via field names this very process: a backend of ours leads back to us.
inline bool came_round(const HeadView& head, std::string_view instance) {
  for (const FieldRow& row : *head.fields) {
    if (row.field == Field::via && value_of(head.base, row).find(instance) != std::string_view::npos) return true;
  }
  return false;
}

namespace detail {

inline void append_model(std::string& out, std::string_view model, std::string_view backend) {
  out += R"({"id":")";
  append_json_escaped(out, model);
  out += R"(","object":"model","created":0,"owned_by":")";
  append_json_escaped(out, backend);
  out += R"("})";
}

}  // namespace detail

// GET /v1/models: every model of every healthy backend, by id, then backend.
inline std::string render_models(const Snapshot& snapshot) {
  std::vector<std::pair<std::string_view, std::string_view>> rows;
  for (const auto& [name, entry] : snapshot.models) {
    if (entry.is_alias()) continue;
    for (const Offer& offer : entry.offers) {
      const BackendView& backend = snapshot.backends[offer.backend];
      if (backend.healthy) rows.emplace_back(name, backend.name);
    }
  }
  std::sort(rows.begin(), rows.end());
  std::string out = R"({"object":"list","data":[)";
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (i > 0) out += ',';
    detail::append_model(out, rows[i].first, rows[i].second);
  }
  return out += "]}";
}

// The escapes of a path undone (RFC 3986 2.1); the head's reader has seen that they are whole.
inline std::string unescape_path(std::string_view text) {
  std::string out;
  const auto value = [](char c) { return is_digit(c) ? c - '0' : to_lower(c) - 'a' + 10; };
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size()) {
      out += static_cast<char>(value(text[i + 1]) * 16 + value(text[i + 2]));
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

// GET /v1/models/{id}: the model on the first healthy backend that has it; an alias answers under its own name. False
// where there is none.
inline bool render_model(std::string& out, const Snapshot& snapshot, std::string_view path) {
  const std::string id = unescape_path(path.substr(kModelPrefix.size()));
  const ModelEntry* entry = snapshot.find(id);
  if (entry == nullptr) return false;
  for (const Offer& offer : entry->offers) {
    const BackendView& backend = snapshot.backends[offer.backend];
    if (!backend.healthy) continue;
    detail::append_model(out, id, backend.name);
    return true;
  }
  return false;
}

// GET /health; the status to send with it.
inline std::uint16_t render_health(std::string& out, const Snapshot& snapshot, bool draining, Ns uptime_ns) {
  const auto total = snapshot.backends.size();
  std::size_t healthy = 0;
  for (const BackendView& backend : snapshot.backends) healthy += backend.healthy ? 1 : 0;
  std::size_t models = 0;
  for (const auto& [name, entry] : snapshot.models) {
    models += !entry.is_alias() && std::any_of(entry.offers.begin(), entry.offers.end(), [&](const Offer& offer) {
      return snapshot.backends[offer.backend].healthy;
    });
  }
  const std::string_view status = draining           ? "draining"
                                  : healthy == 0     ? "unhealthy"
                                  : healthy == total ? "healthy"
                                                     : "degraded";
  out += R"({"status":")";
  out.append(status).append(R"(","version":")").append(kVersion).append(R"(","uptime_seconds":)");
  out.append(Digits(static_cast<std::uint64_t>(uptime_ns / kSecond)).view());
  out.append(R"(,"backends":{"total":)").append(Digits(total).view());
  out.append(R"(,"healthy":)").append(Digits(healthy).view());
  out.append(R"(,"unhealthy":)").append(Digits(total - healthy).view());
  out.append(R"(},"models":)").append(Digits(models).view()).append("}");
  return draining || healthy == 0 ? 503 : 200;
}

}  // namespace nexus
