// client_keys.h
// Owns:     the check of a client's API key, and of a request that comes back to the gateway that sent it.
// Promises: keys are compared in constant time; only a key's length can be measured.
// Leaves:   reading keys to config/parser.h, answering 401 and 508 to session_driver.h.
// Threads:  any.
// Tested by: tests/e2e/auth.test.mjs
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string_view>
#include <vector>

#include "nexus/config/settings.h"
#include "nexus/http/head_writer.h"

namespace nexus {

namespace detail {

inline bool equal_in_constant_time(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  unsigned difference = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i]);
  }
  return difference == 0;
}

}  // namespace detail

// A key's place in api_keys.
struct FoundKey {
  std::optional<std::size_t> index;  // none: no keys are configured, or the request has none of them
  bool authorized = false;           // it may be served
};

// The configured key that a request has, as a bearer token (RFC 6750 2.1) or as the value of x-api-key or api-key, else
// the key that has the name of the client's verified certificate. Of a field that comes twice the first counts, as for
// whoever reads it so; of two fields with keys the first one in this order.
inline FoundKey find_key(const ServerSettings& server, const HeadView& head, std::string_view certificate_name) {
  const std::vector<ApiKey>& keys = server.api_keys;
  if (keys.empty()) return {{}, true};
  std::size_t found = keys.size();
  for (const Field field : {Field::authorization, Field::x_api_key, Field::api_key}) {
    const FieldRow* row = find_field(*head.fields, field);
    if (row == nullptr) continue;
    std::string_view key = value_of(head.base, *row);
    if (field == Field::authorization) {
      if (!starts_with_ignoring_case(key, "bearer ")) continue;
      key = trim_blanks(key.substr(7));
    }
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const bool same = detail::equal_in_constant_time(keys[i].key, key);
      if (same && found == keys.size()) found = i;
    }
  }
  if (found == keys.size() && !certificate_name.empty()) {
    const auto named = std::find_if(keys.begin(), keys.end(),
                                    [&](const ApiKey& candidate) { return candidate.name == certificate_name; });
    found = static_cast<std::size_t>(named - keys.begin());
  }
  if (found == keys.size()) return {};
  return {found, true};
}

// True if a Via field (RFC 9110 7.6.3) names this process: one of its backends forwards to it.
inline bool is_loop(const HeadView& head, std::string_view instance) {
  for (const FieldRow& row : *head.fields) {
    if (row.field == Field::via && value_of(head.base, row).find(instance) != std::string_view::npos) return true;
  }
  return false;
}

}  // namespace nexus
