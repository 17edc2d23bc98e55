// client_keys.h
// Owns:     the check of a client's API key, and of a request that comes back to the gateway that sent it.
// Promises: keys are compared in constant time; only a key's length can be measured.
// Leaves:   reading keys to config/parser.h, answering 401 and 508 to session_driver.h.
// Threads:  any.
// Tested by: tests/e2e/auth.test.mjs
#pragma once

#include <algorithm>
#include <string_view>

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

// True if the request has one of the configured keys, as a bearer token (RFC 6750 2.1) or as the value of x-api-key or
// api-key, or if none are configured, or if a key has the name of the client's verified certificate. Of a field that
// comes twice the first counts, as for whoever reads it so.
inline bool is_authorized(const ServerSettings& server, const HeadView& head, std::string_view certificate_name) {
  if (server.api_keys.empty()) return true;
  bool known = !certificate_name.empty() &&
               std::any_of(server.api_keys.begin(), server.api_keys.end(),
                           [&](const ApiKey& candidate) { return candidate.name == certificate_name; });
  for (const Field field : {Field::authorization, Field::x_api_key, Field::api_key}) {
    const FieldRow* row = find_field(*head.fields, field);
    if (row == nullptr) continue;
    std::string_view key = value_of(head.base, *row);
    if (field == Field::authorization) {
      if (!starts_with_ignoring_case(key, "bearer ")) continue;
      key = trim_blanks(key.substr(7));
    }
    for (const ApiKey& candidate : server.api_keys) known |= detail::equal_in_constant_time(candidate.key, key);
  }
  return known;
}

// True if a Via field (RFC 9110 7.6.3) names this process: one of its backends forwards to it.
inline bool is_loop(const HeadView& head, std::string_view instance) {
  for (const FieldRow& row : *head.fields) {
    if (row.field == Field::via && value_of(head.base, row).find(instance) != std::string_view::npos) return true;
  }
  return false;
}

}  // namespace nexus
