// trace_context.h
// Owns:     the fields traceparent and tracestate of a request (W3C Trace Context).
// Promises: a traceparent is read as the standard says: four fields of lower-case hex digits, no id all zeros, version
//           00 of exactly 55 bytes, and of a version that is not known the same four fields; two traceparents are none.
// Leaves:   which of the two fields are forwarded to proxy/request_trace.h.
// Threads:  pure functions.
// Tested by: tests/trace_context_test.cpp, tests/e2e/trace.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "nexus/base/text.h"
#include "nexus/http/head_writer.h"
#include "nexus/http/header_fields.h"

namespace nexus {

using TraceId = std::array<char, 32>;  // hex digits

constexpr std::uint8_t kSampled = 1;  // a flag: spans of the trace are wanted
constexpr std::uint8_t kKnownFlags = 3;

struct TraceParent {
  TraceId trace_id{};
  std::uint64_t span_id = 0;
  std::uint8_t flags = 0;  // of kKnownFlags
};

namespace detail {

constexpr bool is_lower_hex(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return is_digit(c) || (c >= 'a' && c <= 'f'); });
}

constexpr std::uint64_t hex_number(std::string_view digits) {
  std::uint64_t number = 0;
  for (const char digit : digits) number = number << 4 | static_cast<std::uint64_t>(hex_value(digit));
  return number;
}

}  // namespace detail

// Nothing if it is malformed.
constexpr std::optional<TraceParent> parse_traceparent(std::string_view value) {
  constexpr std::size_t kTraceAt = 3, kSpanAt = 36, kFlagsAt = 53, kBytes = 55;
  if (value.size() < kBytes) return std::nullopt;
  const std::string_view version = value.substr(0, 2), trace = value.substr(kTraceAt, 32),
                         span = value.substr(kSpanAt, 16), flags = value.substr(kFlagsAt, 2);
  for (const std::string_view field : {version, trace, span, flags}) {
    if (!detail::is_lower_hex(field)) return std::nullopt;
  }
  if (value[2] != '-' || value[kSpanAt - 1] != '-' || value[kFlagsAt - 1] != '-') return std::nullopt;
  if (version == "ff" || (version == "00" && value.size() != kBytes)) return std::nullopt;
  if (value.size() > kBytes && value[kBytes] != '-') return std::nullopt;
  TraceParent out;
  std::copy(trace.begin(), trace.end(), out.trace_id.begin());
  out.span_id = detail::hex_number(span);
  out.flags = static_cast<std::uint8_t>(detail::hex_number(flags) & kKnownFlags);
  const bool no_trace = std::all_of(trace.begin(), trace.end(), [](char c) { return c == '0'; });
  return no_trace || out.span_id == 0 ? std::nullopt : std::optional(out);
}

// The parent that a request names; nothing if it names none, or none that is well-formed.
inline std::optional<TraceParent> trace_parent_of(const HeadView& head) {
  const FieldRow* const first = find_field(*head.fields, Field::traceparent);
  if (first == nullptr) return std::nullopt;
  const bool twice =
      std::any_of(first + 1, head.fields->end(), [](const FieldRow& row) { return row.field == Field::traceparent; });
  return twice ? std::nullopt : parse_traceparent(value_of(head.base, *first));
}

inline void append_traceparent(std::string& out, const TraceParent& parent) {
  const auto span = hex_of(parent.span_id);
  out += "traceparent: 00-";
  out.append(parent.trace_id.data(), parent.trace_id.size()).append("-").append(span.data(), span.size()).append("-0");
  out += kHexDigits[parent.flags & kKnownFlags];
  out += "\r\n";
}

}  // namespace nexus
