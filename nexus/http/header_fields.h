// header_fields.h
// Owns:     the header fields that Nexus knows, and the table of one head's fields.
// Promises: names are recognised in any case; a name with underscores for dashes is reported as such (underscore_twin),
//           except that of a key.
// Leaves:   reading heads to head_parser.h; which fields are forwarded to head_writer.h.
// Threads:  plain values.
// Tested by: tests/head_parser_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "nexus/base/limits.h"
#include "nexus/base/text.h"

namespace nexus {

enum class Field : std::uint8_t {
  other,
  accept_encoding,
  anthropic_version,
  api_key,
  authorization,
  connection,
  content_encoding,
  content_length,
  content_type,
  date,
  expect,
  host,
  keep_alive,
  origin,
  proxy_authenticate,
  proxy_authorization,
  proxy_connection,
  retry_after,
  te,
  traceparent,
  tracestate,
  trailer,
  transfer_encoding,
  upgrade,
  via,
  x_api_key,
  x_request_id,
  x_nexus,          // x-nexus-…: only Nexus sets these
  access_control,   // access-control-…: of a response (head_writer.h)
  underscore_twin,  // one of the above but a key, spelled with an underscore
};

// The names of the fields from accept_encoding to x_request_id, in the order of the enum.
inline constexpr auto kFieldNames = std::to_array<std::string_view>({"accept-encoding",
                                                                     "anthropic-version",
                                                                     "api-key",
                                                                     "authorization",
                                                                     "connection",
                                                                     "content-encoding",
                                                                     "content-length",
                                                                     "content-type",
                                                                     "date",
                                                                     "expect",
                                                                     "host",
                                                                     "keep-alive",
                                                                     "origin",
                                                                     "proxy-authenticate",
                                                                     "proxy-authorization",
                                                                     "proxy-connection",
                                                                     "retry-after",
                                                                     "te",
                                                                     "traceparent",
                                                                     "tracestate",
                                                                     "trailer",
                                                                     "transfer-encoding",
                                                                     "upgrade",
                                                                     "via",
                                                                     "x-api-key",
                                                                     "x-request-id"});
static_assert(kFieldNames[static_cast<std::size_t>(Field::retry_after) - 1] == "retry-after" &&
              kFieldNames.size() == static_cast<std::size_t>(Field::x_request_id));

constexpr std::uint32_t bit_of(Field field) { return 1u << static_cast<unsigned>(field); }

template <class... Fields>
constexpr std::uint32_t set_of(Fields... fields) {
  return (bit_of(fields) | ...);
}

// RFC 9110 7.6.1: meant for the next hop alone. (Content-Length is framing, not hop-by-hop, and is rewritten too.)
constexpr std::uint32_t kHopByHop =
    set_of(Field::connection, Field::keep_alive, Field::proxy_authenticate, Field::proxy_authorization,
           Field::proxy_connection, Field::te, Field::trailer, Field::transfer_encoding, Field::upgrade);

// Each may hold a client's key.
constexpr std::uint32_t kCredentials = set_of(Field::authorization, Field::api_key, Field::x_api_key);

namespace detail {

constexpr std::string_view kNexusPrefix = "x-nexus-";
constexpr std::string_view kAccessControlPrefix = "access-control-";

constexpr std::size_t kMaxNameBytes = 20;  // longer than any of kFieldNames

// The Field of each known name by length and first letter: no two names share both, so a name is compared once.
inline constexpr auto kFieldByLength = [] {
  std::array<std::array<Field, 26>, kMaxNameBytes> index{};
  for (std::size_t i = 0; i < kFieldNames.size(); ++i) {
    Field& slot = index[kFieldNames[i].size()][static_cast<std::size_t>(kFieldNames[i][0] - 'a')];
    if (slot != Field::other) throw "two known names with the same length and first letter";  // at compile time only
    slot = static_cast<Field>(i + 1);
  }
  return index;
}();

// The first and the last bytes of a name (they overlap in a short one) and those between, in lower case: the case bit
// of every byte is set. That maps no other token character (RFC 9110 5.6.2) to a letter or a dash.
struct NameWords {
  std::uint64_t first = 0;
  std::uint64_t last = 0;
  std::uint64_t middle = 0;
  constexpr bool operator==(const NameWords&) const = default;
};

constexpr std::uint64_t kLowerCase = 0x2020202020202020;

// `name` has 2 to 24 bytes.
constexpr NameWords words_of(std::string_view name) {
  const char* const at = name.data();
  const std::size_t bytes = name.size();
  NameWords words;
  if (bytes >= 8) {
    words.first = word_at<std::uint64_t>(at) | kLowerCase;
    words.last = word_at<std::uint64_t>(at + bytes - 8) | kLowerCase;
    if (bytes > 16) words.middle = word_at<std::uint64_t>(at + 8) | kLowerCase;
  } else if (bytes >= 4) {
    words.first = word_at<std::uint32_t>(at) | kLowerCase;
    words.last = word_at<std::uint32_t>(at + bytes - 4) | kLowerCase;
  } else {
    words.first = word_at<std::uint16_t>(at) | kLowerCase;
    words.last = word_at<std::uint16_t>(at + bytes - 2) | kLowerCase;
  }
  return words;
}

inline constexpr auto kFieldWords = [] {  // by Field
  std::array<NameWords, kFieldNames.size() + 1> words{};
  for (std::size_t i = 0; i < kFieldNames.size(); ++i) words[i + 1] = words_of(kFieldNames[i]);
  return words;
}();
inline constexpr std::uint64_t kNexusWord = words_of(kNexusPrefix).first;
static_assert(kNexusPrefix.size() == 8 && kMaxNameBytes <= 24);

// `name` is not empty and has no underscores.
inline Field classify_dashed(std::string_view name) {
  const auto letter = static_cast<unsigned char>((name[0] | 0x20) - 'a');
  if (letter >= 26 || name.size() < 2) return Field::other;
  if (letter == 'x' - 'a' && name.size() >= 8 && (word_at<std::uint64_t>(name.data()) | kLowerCase) == kNexusWord) {
    return Field::x_nexus;
  }
  if (letter == 0 && starts_with_ignoring_case(name, kAccessControlPrefix)) return Field::access_control;
  if (name.size() >= kMaxNameBytes) return Field::other;
  const Field field = kFieldByLength[name.size()][letter];
  if (field == Field::other || words_of(name) != kFieldWords[static_cast<std::size_t>(field)]) return Field::other;
  return field;
}

// A known name with underscores for dashes is its twin, but a key is a key in either spelling.
inline Field classify_underscored(std::string_view name) {
  std::array<char, kMaxNameBytes> dashed{};
  const std::size_t bytes = std::min(name.size(), dashed.size());
  for (std::size_t i = 0; i < bytes; ++i) dashed[i] = name[i] == '_' ? '-' : name[i];
  // Of a longer name only the prefix x-nexus- matters.
  const Field field = classify_dashed({dashed.data(), bytes});
  return field == Field::other || (bit_of(field) & kCredentials) != 0 ? field : Field::underscore_twin;
}

}  // namespace detail

inline Field classify_field(std::string_view name) {
  if (name.empty()) return Field::other;
  const Field field = detail::classify_dashed(name);
  const bool by_prefix = field == Field::x_nexus || field == Field::access_control;  // an underscore may follow
  if (field != Field::other && !by_prefix) return field;
  const bool underscore = std::memchr(name.data(), '_', name.size()) != nullptr;
  return underscore ? detail::classify_underscored(name) : field;
}

// The position of a field's name and value, as offsets from the head's first byte: the buffer may move.
struct FieldRow {
  std::uint32_t name_at = 0;
  std::uint32_t name_bytes = 0;
  std::uint32_t value_at = 0;
  std::uint32_t value_bytes = 0;  // without surrounding white space
  Field field = Field::other;
  bool known = false;  // the line came before; if it is a Host, that is well-formed
};

struct FieldTable {
  std::array<FieldRow, kMaxFields> rows;
  std::uint32_t count = 0;
  std::uint32_t seen = 0;         // the set of known fields that occur
  bool connection_names = false;  // a Connection field names other fields, besides close and keep-alive

  bool has(Field field) const { return (seen & bit_of(field)) != 0; }

  const FieldRow* begin() const { return rows.data(); }
  const FieldRow* end() const { return rows.data() + count; }
};

}  // namespace nexus
