// start_line.h
// Owns:     the first line of a message: a request's method, target and version, a response's version, status and
//           reason.
// Promises: the line's grammar is decided here alone, whatever the version of llhttp: one space between the parts, no
//           byte that another parser could read differently; every HTTP/1.x is read as HTTP/1.1 (RFC 9110 2.5) but 1.0.
// Leaves:   finding the line's end, and the fields, to head_parser.h; paths and methods that exist to server/.
// Threads:  pure functions.
// Tested by: tests/head_parser_test.cpp, tests/hostile_requests_test.cpp, tests/fuzz/heads.h
#pragma once

#include <llhttp.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>
#include <utility>

#include "nexus/base/text.h"

namespace nexus {

// Why a head was refused. HeadResult::why is more precise, for the log.
enum class HeadError : std::uint8_t {
  none,
  malformed,        // 400
  bad_version,      // 505: HTTP, but not HTTP/1.x
  too_many_fields,  // 431
  unknown_method,   // 501
  unknown_coding,   // 501: a transfer coding other than `chunked`
  bad_expectation,  // 417
};

struct RequestLine {
  std::uint8_t method = 0;  // llhttp_method_t, if refusal is not unknown_method
  bool http_1_0 = false;
  HeadError refusal = HeadError::none;  // well-formed, but to be refused: unknown_method, unknown_coding, …
  std::uint32_t target_at = 0;          // a path with its query, or `*`, or the host and port of a CONNECT
  std::uint32_t target_bytes = 0;
  std::uint32_t path_bytes = 0;  // of these, before a `?`

  // `base`: the head's first byte.
  std::string_view target(const char* base) const { return {base + target_at, target_bytes}; }
  std::string_view path(const char* base) const { return {base + target_at, path_bytes}; }
};

constexpr std::size_t kStatusAt = 9;  // in a status line: behind `HTTP/1.1 `

struct StatusLine {
  std::uint16_t status = 0;
  bool http_1_0 = false;
  std::uint32_t reason_at = 0;
  std::uint32_t reason_bytes = 0;
};

struct LineResult {
  const char* why = nullptr;  // a constant; null: the line is well-formed
  HeadError error = HeadError::malformed;
};

namespace detail {

// RFC 9110 9.3 and RFC 5789. A method is compared in its own case.
inline constexpr auto kMethods = std::to_array<std::pair<std::string_view, llhttp_method>>({{"POST", HTTP_POST},
                                                                                            {"GET", HTTP_GET},
                                                                                            {"HEAD", HTTP_HEAD},
                                                                                            {"OPTIONS", HTTP_OPTIONS},
                                                                                            {"PUT", HTTP_PUT},
                                                                                            {"DELETE", HTTP_DELETE},
                                                                                            {"CONNECT", HTTP_CONNECT},
                                                                                            {"TRACE", HTTP_TRACE},
                                                                                            {"PATCH", HTTP_PATCH}});

// The methods by their numbers in llhttp; empty: none that is known here.
inline constexpr auto kMethodNames = [] {
  std::array<std::string_view, HTTP_PATCH + 1> names{};
  for (const auto& [name, method] : kMethods) names[method] = name;
  return names;
}();

// The places in which a byte may occur, as bits. A target may contain visible ASCII but for `#`, `\\` and what RFC 3986
// excludes.
constexpr std::uint8_t kInTarget = 1;
constexpr std::uint8_t kInHostName = 2;
constexpr std::uint8_t kInIpv6 = 4;
constexpr std::uint8_t kInToken = 8;      // RFC 9110 5.6.2
constexpr std::uint8_t kAsItStands = 16;  // any byte but `%`
inline constexpr auto kBytePlaces = [] {
  std::array<std::uint8_t, 256> places{};
  for (std::size_t at = 0x21; at < 0x7f; ++at) {
    const char c = static_cast<char>(at);
    const char lower = to_lower(c);
    const auto is_in = [c](std::string_view set) { return set.find(c) != std::string_view::npos; };
    const bool alphanumeric = is_digit(c) || (lower >= 'a' && lower <= 'z');
    const bool target = !is_in("#\\\"<>^`{|}");
    const bool host_name = alphanumeric || is_in("-._~");
    const bool ipv6 = is_digit(c) || (lower >= 'a' && lower <= 'f') || is_in(":.");
    const bool token = alphanumeric || is_in("!#$%&'*+-.^_`|~");
    places[at] = static_cast<std::uint8_t>(target * kInTarget + host_name * kInHostName + ipv6 * kInIpv6 +
                                           token * kInToken + (c != '%') * kAsItStands);
  }
  return places;
}();

constexpr bool may_be(std::uint8_t place, char c) { return (kBytePlaces[static_cast<unsigned char>(c)] & place) != 0; }

// The places in which each byte of the text may occur.
inline std::uint8_t places_of(std::string_view text) {
  std::uint8_t places = 0xff;
  for (std::size_t i = 0; i < text.size() && places != 0; ++i)
    places &= kBytePlaces[static_cast<unsigned char>(text[i])];
  return places;
}
inline bool all_may_be(std::uint8_t place, std::string_view text) { return (places_of(text) & place) != 0; }

// RFC 9110 7.2: host [":" port], with no user, path, list or space in it.
inline const char* check_host(std::string_view host) {
  if (host.empty() || host[0] == ':') return "Host is empty";
  const bool v6 = host[0] == '[';
  std::size_t end = v6 ? 1 : 0;  // of the name
  while (end < host.size() && may_be(v6 ? kInIpv6 : kInHostName, host[end])) ++end;
  if (v6) {
    if (end < 3 || end == host.size() || host[end] != ']') return "Host is not a host";
    end += 1;
  }
  if (end == host.size()) return nullptr;
  if (host[end] != ':' || host.size() - end > 6) return "Host is not a host";
  for (std::size_t at = end + 1; at < host.size(); ++at) {
    if (!is_digit(host[at])) return "Host is not a host";
  }
  return nullptr;
}

// Origin form (RFC 9112 3.2.1), and nothing that another parser could read differently.
inline const char* check_path(std::string_view target) {
  if (target.empty() || target[0] != '/') return "the target is not an absolute path";
  const std::uint8_t places = places_of(target);
  if ((places & kInTarget) == 0) return "a byte in the target that must be escaped";
  if ((places & kAsItStands) != 0) return nullptr;
  for (std::size_t i = target.find('%'); i != std::string_view::npos; i = target.find('%', i + 1)) {
    const std::string_view hex = target.substr(i + 1, 2);
    if (hex.size() != 2 || hex_value(hex[0]) < 0 || hex_value(hex[1]) < 0) return "a broken escape in the target";
    if (hex[0] < '2' || hex == "7f" || hex == "7F") return "a control character in the target";
  }
  return nullptr;
}

// Takes scheme and host off a target in the absolute form (RFC 9112 3.2.2). The host is checked and then not needed: a
// backend gets its own. Returns what is wrong, or nullptr.
[[gnu::cold]] inline const char* strip_authority(std::string_view& target) {
  const std::size_t from = starts_with_ignoring_case(target, "http://")    ? 7
                           : starts_with_ignoring_case(target, "https://") ? 8
                                                                           : 0;
  if (from == 0) return "the target is not an absolute path";
  const std::size_t end = std::min(target.find_first_of("/?", from), target.size());
  if (const char* why = check_host(target.substr(from, end - from))) return why;
  const bool has_path = end < target.size() && target[end] == '/';
  if (!has_path && end < target.size() && !all_may_be(kInTarget, target.substr(end))) return "a query that is none";
  target =
      has_path ? target.substr(end) : target.substr(from - 1, 1);  // no path means `/`, which stands before the host
  return nullptr;
}

inline const char* check_target(std::uint8_t method, std::string_view& target) {
  if (method == HTTP_CONNECT) return check_host(target);
  if (target == "*") return method == HTTP_OPTIONS ? nullptr : "the target is not an absolute path";
  if (!target.starts_with('/')) {
    if (const char* why = strip_authority(target)) return why;
  }
  return check_path(target);
}

// `HTTP/1.x`.
inline LineResult read_version(std::string_view text, bool& http_1_0) {
  const bool well_formed =
      text.size() == 8 && begins_with(text, "HTTP/") && is_digit(text[5]) && text[6] == '.' && is_digit(text[7]);
  if (!well_formed) return {"the version is not HTTP/1.1 or HTTP/1.0"};
  if (text[5] != '1') return {"the version is not HTTP/1.1 or HTTP/1.0", HeadError::bad_version};
  http_1_0 = text[7] == '0';
  return {};
}

}  // namespace detail

// `line` is without its CRLF and has no control characters. Offsets are counted from its first byte.
inline LineResult read_start_line(std::string_view line, RequestLine& out) {
  const std::size_t method_end = line.find(' ');
  const std::size_t target_end = method_end == std::string_view::npos ? method_end : line.find(' ', method_end + 1);
  if (target_end == std::string_view::npos) return {"the request line has no target or no version"};
  const std::string_view method = line.substr(0, method_end);
  const LineResult version = detail::read_version(line.substr(target_end + 1), out.http_1_0);
  if (version.why != nullptr) return version;
  const auto* known = std::find_if(detail::kMethods.begin(), detail::kMethods.end(),
                                   [&](const auto& row) { return row.first == method; });
  if (known != detail::kMethods.end()) {
    out.method = static_cast<std::uint8_t>(known->second);
  } else {
    if (method.empty() || !detail::all_may_be(detail::kInToken, method)) return {"the method is not a token"};
    out.method = HTTP_GET;  // only the target's form depends on it
    out.refusal = HeadError::unknown_method;
  }
  std::string_view target = line.substr(method_end + 1, target_end - method_end - 1);
  if (const char* why = detail::check_target(out.method, target)) return {why};
  out.target_at = static_cast<std::uint32_t>(target.data() - line.data());
  out.target_bytes = static_cast<std::uint32_t>(target.size());
  out.path_bytes = static_cast<std::uint32_t>(std::min(target.find('?'), target.size()));
  return {};
}

// Of a method that was read from a request line.
inline std::string_view method_name(std::uint8_t method) { return detail::kMethodNames[method]; }

// True if `begun` can be the beginning of a request line. (Control characters are found elsewhere.)
constexpr bool may_begin(std::string_view, const RequestLine&) { return true; }

inline LineResult read_start_line(std::string_view line, StatusLine& out) {
  const LineResult version = detail::read_version(line.substr(0, 8), out.http_1_0);
  if (version.why != nullptr) return version;
  const bool well_formed = line.size() >= 12 && line[8] == ' ' && is_digit(line[9]) && is_digit(line[10]) &&
                           is_digit(line[11]) && (line.size() == 12 || line[12] == ' ');
  if (!well_formed) return {"not a status line"};
  out.status = static_cast<std::uint16_t>((line[9] - '0') * 100 + (line[10] - '0') * 10 + (line[11] - '0'));
  if (out.status < 100 || out.status > 599) return {"not a status line"};
  out.reason_at = static_cast<std::uint32_t>(std::min<std::size_t>(line.size(), 13));
  out.reason_bytes = static_cast<std::uint32_t>(line.size()) - out.reason_at;
  return {};
}

// A backend that speaks another protocol is found out by its first bytes: it may never send a line's end.
constexpr bool may_begin(std::string_view begun, const StatusLine&) {
  constexpr std::string_view kBegin = "HTTP/1.";
  return begun.substr(0, kBegin.size()) == kBegin.substr(0, begun.size());
}

}  // namespace nexus
