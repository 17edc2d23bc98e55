// affinity.h
// Owns:     the key by which the requests of one session find the same backend, and the order of equal backends by it.
// Promises: pure functions that give the same on every machine: several Nexus whose files name the backends alike agree
//           without talking; without one of n backends only its own keys move. The text of a key is not kept.
// Leaves:   choosing to router.h, the members of a body to api/request_json.h, names of fields to config/keys.h.
// Threads:  any.
// Tested by: tests/affinity_test.cpp, tests/router_test.cpp, tests/e2e/affinity.test.mjs
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/request_json.h"
#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/config/settings.h"
#include "nexus/http/head_parser.h"
#include "nexus/http/header_fields.h"

namespace nexus {

// A hash that takes 8 bytes a step: texts may be long. Not for secrets.
inline std::uint64_t affinity_hash(std::string_view text, std::uint64_t seed = 0) {
  __extension__ using Wide = unsigned __int128;
  std::uint64_t state = seed ^ text.size();
  for (std::size_t at = 0; at < text.size(); at += sizeof(std::uint64_t)) {
    std::uint64_t word = 0;
    std::memcpy(&word, text.data() + at, std::min(sizeof word, text.size() - at));
    const Wide product = Wide{state ^ word ^ 0xa0761d6478bd642f} * 0xe7037ed1a0b428db;
    state = static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
  }
  return mix(state);
}

// The value of the first of `names` that the head has with a fit value; empty if it has none.
inline std::string_view session_field(const std::vector<std::string>& names, const char* base,
                                      const FieldTable& fields) {
  std::string_view found;
  std::size_t first = names.size();
  for (const FieldRow& row : fields) {
    for (std::size_t i = 0; i < first; ++i) {
      if (row.name_bytes != names[i].size() || !equals_ignoring_case(name_of(base, row), names[i])) continue;
      if (row.value_bytes == 0 || row.value_bytes > kMaxSessionBytes) break;
      found = value_of(base, row);
      first = i;
    }
  }
  return found;
}

// The value of the member that names the session; empty if there is none, or none of a fit length.
inline std::string_view session_member(std::string_view body, const BodyFacts& facts) {
  const BodySpan& span = facts.session_value;  // with its quotes
  if (span.bytes <= 2 || span.bytes - 2 > kMaxSessionBytes) return {};
  return body.substr(span.at + 1, span.bytes - 2);
}

// The key of a request; 0 if it has none. Requests of different clients, by the name of their key, do not meet.
inline std::uint64_t affinity_key(const RoutingSettings& routing, const char* head, const FieldTable& fields,
                                  std::string_view body, const BodyFacts& facts, std::string_view client) {
  if (routing.affinity == Affinity::none) return 0;
  std::string_view session = session_field(routing.affinity_headers, head, fields);
  if (session.empty()) session = session_member(body, facts);
  if (session.empty()) return 0;
  return std::max<std::uint64_t>(affinity_hash(session, affinity_hash(client)), 1);
}

// Bounded load: the most requests in flight that a backend may have if it is to get one more for its key's sake:
// `slack` percent above the average of n backends, this request included, rounded up.
constexpr std::int64_t affinity_bound(std::int64_t in_flight, std::size_t n, std::uint32_t slack) {
  const auto whole = 100 * static_cast<std::int64_t>(n);
  return ((100 + std::int64_t{slack}) * (in_flight + 1) + whole - 1) / whole;
}

// Rendezvous hashing: the place of a backend, by the hash of its name, in the order for a key. The lowest is the first;
// `passed_over`: it is behind all others.
constexpr std::uint64_t affinity_rank(std::uint64_t key, std::uint64_t backend, bool passed_over) {
  return mix(key ^ backend) >> 1 | std::uint64_t{passed_over} << 63;
}

}  // namespace nexus
