// affinity.h
// Owns:     the key by which the requests of one session find the same backend, the order of equal backends by it, and
//           the table of the keys that were seen lately.
// Promises: functions that give the same on every machine: several Nexus whose files name the backends alike agree
//           without talking; without one of n backends only its own keys move. A lost entry of the table costs a miss
//           in a backend's cache. The text of a key is not kept.
// Leaves:   choosing to router.h, the members of a body to api/request_json.h, names of fields to config/keys.h.
// Threads:  any.
// Tested by: tests/affinity_test.cpp, tests/router_test.cpp, tests/e2e/affinity.test.mjs
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/request_json.h"
#include "nexus/base/limits.h"
#include "nexus/base/simd.h"
#include "nexus/base/text.h"
#include "nexus/config/settings.h"
#include "nexus/http/head_parser.h"
#include "nexus/http/header_fields.h"

namespace nexus {

// A hash that takes 8 bytes a step: texts may be long. Not for secrets.
inline std::uint64_t affinity_hash(std::string_view text, std::uint64_t seed = 0) {
  __extension__ using Wide = unsigned __int128;
  std::uint64_t state = seed ^ text.size();
  const auto add = [&state](const char* at, std::size_t bytes) {
    std::uint64_t word = 0;
    std::memcpy(&word, at, bytes);
    const Wide product = Wide{state ^ word ^ 0xa0761d6478bd642f} * 0xe7037ed1a0b428db;
    state = static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
  };
  constexpr std::size_t kWord = sizeof(std::uint64_t);
  std::size_t at = 0;
  for (; at + kWord <= text.size(); at += kWord) add(text.data() + at, kWord);
  if (at < text.size()) add(text.data() + at, text.size() - at);
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

// The closing quote of a JSON string, or `end` if it is not before that; `begin` is behind the opening quote. Behind
// `end` kPaddingBytes must be readable.
inline std::size_t string_end(const char* base, std::size_t begin, std::size_t end) {
  const TextRun run = skip_text(base, begin, end, false);
  std::size_t at = run.at + (run.escaped ? 1 : 0);
  for (; at < end; at += 2) {
    at = static_cast<std::size_t>(find_either(base + at, base + end, '"', '\\') - base);
    if (at >= end || base[at] == '"') break;
  }
  return std::min(at, end);
}

// The end of the first message of the user in the turns of a conversation, a JSON text, as far as it is scanned: all
// requests of the conversation have the same bytes before it. A string is a whole prompt. Behind the text kPaddingBytes
// must be readable.
inline std::size_t opening_end(std::string_view turns) {
  const char* const base = turns.data();
  const std::size_t end = std::min(turns.size(), kScannedOpening);
  if (turns.starts_with('"')) return std::min(end, kHashedOpening);
  std::size_t depth = 0;
  bool of_user = false;
  for (std::size_t at = 0; at < end; ++at) {
    switch (base[at]) {
      case '[':
      case '{': depth += 1; break;
      case ']':
      case '}':
        depth -= depth > 0 ? 1 : 0;
        if (depth == 1 && of_user) return at + 1;
        if (depth == 0) return at;
        break;
      case '"': {
        const std::size_t begin = at + 1;
        at = string_end(base, begin, end);
        of_user |= depth == 2 && at < end && turns.substr(begin, at - begin) == "user";
        break;
      }
      default: break;
    }
  }
  return end;
}

// A hash of the beginning of a conversation: the model, what it is told first, and the turns up to the first message of
// the user. Of long texts it takes the beginning, the end and the length. 0 if the conversation is short.
inline std::uint64_t opening_hash(std::string_view body, const BodyFacts& facts, std::uint64_t seed) {
  const auto text_of = [body](const BodySpan& span) { return body.substr(span.at, span.bytes); };
  const auto add = [&seed](std::string_view text) {
    seed = affinity_hash(text.substr(0, kHashedOpening), seed + text.size());
    if (text.size() <= kHashedOpening) return;
    const std::size_t rest = std::min(text.size() - kHashedOpening, kHashedOpening);
    seed = affinity_hash(text.substr(text.size() - rest), seed);
  };
  if (facts.turns_value.bytes + facts.system_value.bytes < kLeastOpening) return 0;
  add(text_of(facts.model_value));
  add(text_of(facts.system_value));
  const std::string_view turns = text_of(facts.turns_value);
  add(turns.substr(0, opening_end(turns)));
  return seed;
}

// The key of a request; 0 if it has none. Requests of different clients, by the name of their key, do not meet.
inline std::uint64_t affinity_key(const RoutingSettings& routing, const char* head, const FieldTable& fields,
                                  std::string_view body, const BodyFacts& facts, std::string_view client) {
  if (routing.affinity == Affinity::none) return 0;
  const std::uint64_t seed = affinity_hash(client);
  if (routing.affinity != Affinity::prefix) {
    std::string_view session = session_field(routing.affinity_headers, head, fields);
    if (session.empty()) session = session_member(body, facts);
    if (!session.empty()) return std::max<std::uint64_t>(affinity_hash(session, seed), 1);
  }
  return routing.affinity == Affinity::session ? 0 : opening_hash(body, facts, seed);
}

// Bounded load: the most requests in flight that a backend may have if it is to get one more for its key's sake:
// `slack` percent above the average of n backends, this request included, rounded up.
constexpr std::int64_t affinity_bound(std::int64_t in_flight, std::size_t n, std::uint32_t slack) {
  const auto whole = 100 * static_cast<std::int64_t>(n);
  return ((100 + std::int64_t{slack}) * (in_flight + 1) + whole - 1) / whole;
}

// Stands for a backend where 16 bits must do, by the hash of its name; never 0.
constexpr std::uint16_t backend_mark(std::uint64_t backend) { return static_cast<std::uint16_t>(backend >> 48 | 1); }

// Rendezvous hashing: the place of a backend, by the hash of its name, in the order for a key. The lowest is the first:
// that where the key was seen lately, if it is there. `passed_over`: it is behind all others.
constexpr std::uint64_t affinity_rank(std::uint64_t key, std::uint16_t seen_at, std::uint64_t backend,
                                      bool passed_over) {
  const std::uint64_t place = seen_at == backend_mark(backend) ? 0 : mix(key ^ backend) >> 1;
  return place | std::uint64_t{passed_over} << 63;
}

// The backends of the keys that were seen within kSeenLately, as far as the table has room: a new key takes the place
// of an old one. Any thread; an entry is one atomic word, and publishes nothing else.
class RecentKeys {
 public:
  RecentKeys() : words_(static_cast<std::uint64_t*>(std::calloc(kRecentKeys, sizeof(std::uint64_t)))) {
    if (words_ == nullptr) throw std::bad_alloc();
  }

  // The mark of the key's backend; 0 if the key was not seen lately.
  std::uint16_t find(std::uint64_t key, Ns now) const {
    const std::uint64_t word = at(key).load(std::memory_order_relaxed);
    const auto age = static_cast<std::uint8_t>(tick_of(now) - word);
    return (word ^ key) >> kTagShift == 0 && age <= kSeenLately / kTick ? static_cast<std::uint16_t>(word >> 8) : 0;
  }

  void note(std::uint64_t key, std::uint16_t mark, Ns now) {
    const std::uint64_t word = key >> kTagShift << kTagShift | std::uint64_t{mark} << 8 | tick_of(now);
    if (at(key).load(std::memory_order_relaxed) != word) at(key).store(word, std::memory_order_relaxed);
  }

 private:
  struct Free {
    void operator()(std::uint64_t* words) const { std::free(words); }
  };
  // Ages wrap after 256 ticks, 34 minutes: an old key may seem to be seen lately then, which does no harm.
  static constexpr Ns kTick = 8 * kSecond;
  static constexpr int kTagShift = 24;  // 40 bits of the key, the mark, the tick
  static_assert(kSeenLately / kTick < 128 && (kRecentKeys & (kRecentKeys - 1)) == 0);

  static std::uint8_t tick_of(Ns now) { return static_cast<std::uint8_t>(now / kTick); }
  std::atomic_ref<std::uint64_t> at(std::uint64_t key) const {
    return std::atomic_ref(words_.get()[key & (kRecentKeys - 1)]);
  }

  std::unique_ptr<std::uint64_t, Free> words_;  // zero pages, until affinity is on
};

}  // namespace nexus
