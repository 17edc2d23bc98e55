// header_fields.h
// Owns:     the header fields that Nexus has an opinion on, and the table of a head's fields.
// Promises: a name is recognised whatever its case; a twin with underscores for dashes is told apart, not mistaken.
// Leaves:   reading heads to head_parser.h; which field goes on to whom to body_framing.h.
// Threads:  plain values.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <type_traits>

#include "nexus/base/text.h"

namespace nexus {

enum class Field : std::uint8_t {
  other,
  accept_encoding,
  authorization,
  connection,
  content_encoding,
  content_length,
  content_type,
  expect,
  host,
  keep_alive,
  proxy_authenticate,
  proxy_authorization,
  proxy_connection,
  retry_after,
  te,
  trailer,
  transfer_encoding,
  upgrade,
  via,
  x_nexus,  // x-nexus-…: only Nexus says these
  x_request_id,
  underscore_twin,  // one of the above (or of what Nexus sets) spelled with an underscore
};

struct FieldName {
  std::string_view name;
  Field field;
};

constexpr std::array kFieldNames{
    FieldName{"accept-encoding", Field::accept_encoding},
    FieldName{"authorization", Field::authorization},
    FieldName{"connection", Field::connection},
    FieldName{"content-encoding", Field::content_encoding},
    FieldName{"content-length", Field::content_length},
    FieldName{"content-type", Field::content_type},
    FieldName{"expect", Field::expect},
    FieldName{"host", Field::host},
    FieldName{"keep-alive", Field::keep_alive},
    FieldName{"proxy-authenticate", Field::proxy_authenticate},
    FieldName{"proxy-authorization", Field::proxy_authorization},
    FieldName{"proxy-connection", Field::proxy_connection},
    FieldName{"retry-after", Field::retry_after},
    FieldName{"te", Field::te},
    FieldName{"trailer", Field::trailer},
    FieldName{"transfer-encoding", Field::transfer_encoding},
    FieldName{"upgrade", Field::upgrade},
    FieldName{"via", Field::via},
    FieldName{"x-request-id", Field::x_request_id},
};

namespace detail {

constexpr std::string_view kNexusPrefix = "x-nexus-";

// The rows of kFieldNames by length and first letter: a name is compared with one of them, or with none.
constexpr std::size_t kLongestName = 20;

struct FieldIndex {
  std::array<std::array<std::uint8_t, 26>, kLongestName> row{};  // 1 + the row's number; 0: none
};

constexpr FieldIndex make_field_index() {
  FieldIndex index;
  for (std::size_t i = 0; i < kFieldNames.size(); ++i) {
    const std::string_view name = kFieldNames[i].name;
    std::uint8_t& slot = index.row[name.size()][static_cast<std::size_t>(name[0] - 'a')];
    if (slot != 0) throw "two recognised names of one length and first letter";  // at compile time only
    slot = static_cast<std::uint8_t>(i + 1);
  }
  return index;
}
inline constexpr FieldIndex kFieldIndex = make_field_index();

// Two words that hold the first and the last bytes of a name (they overlap in a short one), and what is between them.
// With the bit that tells upper from lower case set: no two characters of a token (RFC 9110 5.6.2) that a recognised
// name may hold become one that way.
struct NameWords {
  std::uint64_t first = 0;
  std::uint64_t last = 0;
  std::uint64_t middle = 0;
  constexpr bool operator==(const NameWords&) const = default;
};

constexpr std::uint64_t kLowerCase = 0x2020202020202020;

template <class Word>
constexpr std::uint64_t word_at(const char* at) {
  if (std::is_constant_evaluated()) {
    std::uint64_t word = 0;
    for (std::size_t i = 0; i < sizeof(Word); ++i) {
      word |= std::uint64_t{static_cast<unsigned char>(at[i])} << (8 * i);
    }
    return word;
  }
  Word word = 0;
  std::memcpy(&word, at, sizeof word);
  return word;
}

// Of a name of 2 to 24 bytes.
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

inline constexpr auto kFieldWords = [] {
  std::array<NameWords, kFieldNames.size()> words{};
  for (std::size_t i = 0; i < kFieldNames.size(); ++i) words[i] = words_of(kFieldNames[i].name);
  return words;
}();
inline constexpr std::uint64_t kNexusWord = words_of(kNexusPrefix).first;
static_assert(kNexusPrefix.size() == 8 && kLongestName <= 24);

// The field of a name without underscores.
inline Field classify_dashed(std::string_view name) {
  const auto letter = static_cast<unsigned char>((name[0] | 0x20) - 'a');
  if (letter >= 26 || name.size() < 2) return Field::other;
  if (letter == 'x' - 'a' && name.size() >= 8 && words_of(name.substr(0, 8)).first == kNexusWord) return Field::x_nexus;
  if (name.size() >= kLongestName) return Field::other;
  const std::uint8_t row = kFieldIndex.row[name.size()][letter];
  if (row == 0 || words_of(name) != kFieldWords[row - 1u]) return Field::other;
  return kFieldNames[row - 1u].field;
}

// Whether the name would be another's with dashes for its underscores.
inline bool is_underscore_twin(std::string_view name) {
  std::array<char, kLongestName> dashed{};
  const std::size_t bytes = std::min(name.size(), dashed.size());
  for (std::size_t i = 0; i < bytes; ++i) dashed[i] = name[i] == '_' ? '-' : name[i];
  // (A longer name is one that begins as ours do, or none: its end does not matter.)
  return classify_dashed({dashed.data(), bytes}) != Field::other;
}

}  // namespace detail

inline Field classify_field(std::string_view name) {
  if (name.empty()) return Field::other;
  const bool underscore = std::memchr(name.data(), '_', name.size()) != nullptr;
  if (!underscore) return detail::classify_dashed(name);
  return detail::is_underscore_twin(name) ? Field::underscore_twin : Field::other;
}

// RFC 9110 7.6.1: meant for the next hop alone. (Content-Length is framing, not hop-by-hop, and is written anew too.)
constexpr bool is_hop_by_hop(Field field) {
  switch (field) {
    case Field::connection:
    case Field::keep_alive:
    case Field::proxy_authenticate:
    case Field::proxy_authorization:
    case Field::proxy_connection:
    case Field::te:
    case Field::trailer:
    case Field::transfer_encoding:
    case Field::upgrade: return true;
    default: return false;
  }
}

constexpr std::size_t kMaxFields = 128;  // of one head; more is 431

// Where a field's name and value lie, counted from the head's first byte: the buffer may move.
struct FieldRow {
  std::uint32_t name_at = 0;
  std::uint32_t name_bytes = 0;
  std::uint32_t value_at = 0;
  std::uint32_t value_bytes = 0;  // without the white space around it
  Field field = Field::other;
};

struct FieldTable {
  std::array<FieldRow, kMaxFields> rows;
  std::uint32_t count = 0;
  std::uint32_t seen = 0;         // a bit for each kind of field in it: most questions end there
  bool connection_names = false;  // a Connection field names others, beside close and keep-alive

  bool has(Field field) const { return (seen >> static_cast<unsigned>(field) & 1u) != 0; }

  const FieldRow* begin() const { return rows.data(); }
  const FieldRow* end() const { return rows.data() + count; }
};

}  // namespace nexus
