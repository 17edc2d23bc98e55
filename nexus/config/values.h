// values.h
// Owns:     how one value of nexus.conf is written: numbers, sizes, durations, addresses, URLs, names, lists; and the
//           limits on names and lists.
// Promises: pure functions over any bytes: a value, or nothing (or a problem in words); no exception, no clock, no
//           file; a problem with a URL never repeats it (it may hold a password).
// Leaves:   keys, their ranges and where a value is stored to keys.h; lines and sections to parser.h.
// Threads:  any.
#pragma once

#include <arpa/inet.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/config/settings.h"

namespace nexus::config {

constexpr std::size_t kMaxConfigFileBytes = 1u << 20;  // nexus.conf and each key file; more is a wrong path
constexpr std::size_t kMaxConfigErrors = 100;          // a person reads them; a binary file must not flood the log
constexpr std::size_t kMaxBackends = 256;
constexpr std::size_t kMaxBackendNameBytes = 64;
constexpr std::size_t kMaxModelsPerList = 10'000;  // also aliases, and models with fallbacks
constexpr std::size_t kMaxModelNameBytes = 256;
constexpr std::size_t kMaxListens = 64;  // each costs a descriptor per worker
constexpr std::size_t kMaxUrlBytes = 2048;
constexpr std::size_t kMaxHostBytes = 253;   // RFC 1035 2.3.4, as text
constexpr std::size_t kMaxLabelBytes = 63;   // RFC 1035 2.3.4
constexpr std::size_t kMaxPathBytes = 4095;  // PATH_MAX without its NUL
constexpr std::size_t kMaxQuotedBytes = 60;  // of a value, in a message

// ---- text

constexpr bool is_blank(char c) { return c == ' ' || c == '\t'; }
constexpr bool is_digit(char c) { return c >= '0' && c <= '9'; }
constexpr bool is_alpha(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
constexpr bool is_control(char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }
constexpr char to_lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

constexpr std::string_view trim(std::string_view s) {
  while (!s.empty() && is_blank(s.front())) s.remove_prefix(1);
  while (!s.empty() && is_blank(s.back())) s.remove_suffix(1);
  return s;
}

// The line without its comment and outer blanks. `#` opens a comment at the start or after a blank only, so that a
// key or a path may hold one.
constexpr std::string_view without_comment(std::string_view line) {
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '#' && (i == 0 || is_blank(line[i - 1]))) return trim(line.substr(0, i));
  }
  return trim(line);
}

// Takes the first line off `text`, without its LF or CRLF.
constexpr std::string_view take_line(std::string_view& text) {
  const std::size_t end = text.find('\n');
  std::string_view line = text.substr(0, end);
  text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  return line;
}

constexpr std::string_view without_bom(std::string_view text) {
  return text.substr(0, 3) == "\xEF\xBB\xBF" ? text.substr(3) : text;
}

// The length of the UTF-8 sequence that begins the non-empty `s`; 0 where it is not valid (RFC 3629 4).
constexpr std::size_t utf8_sequence(std::string_view s) {
  const auto byte = [s](std::size_t i) { return static_cast<unsigned char>(s[i]); };
  const unsigned lead = byte(0);
  const std::size_t length = lead < 0x80   ? 1
                             : lead < 0xC2 ? 0
                             : lead < 0xE0 ? 2
                             : lead < 0xF0 ? 3
                             : lead < 0xF5 ? 4
                                           : 0;
  if (length == 0 || s.size() < length) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  const unsigned second = length > 2 ? byte(1) : 0u;
  const bool too_long = (lead == 0xE0 && second < 0xA0) || (lead == 0xF0 && second < 0x90);
  const bool no_character = (lead == 0xED && second >= 0xA0) || (lead == 0xF4 && second >= 0x90);
  return too_long || no_character ? 0 : length;
}

// Valid UTF-8 without control characters but for tabs: what a line may hold, so that names fit JSON and logs.
constexpr bool is_plain_text(std::string_view s) {
  while (!s.empty()) {
    if (is_control(s.front()) && s.front() != '\t') return false;
    const std::size_t length = utf8_sequence(s);
    if (length == 0) return false;
    s.remove_prefix(length);
  }
  return true;
}

// 'text' for a message: shortened at a character's border, control characters shown as `?`.
inline std::string in_quotes(std::string_view text) {
  std::size_t length = std::min(text.size(), kMaxQuotedBytes);
  if (length < text.size()) {
    while (length > 0 && (static_cast<unsigned char>(text[length]) & 0xC0) == 0x80) --length;
  }
  std::string result = "'";
  for (char c : text.substr(0, length)) result += is_control(c) ? '?' : c;
  return result + (length < text.size() ? "...'" : "'");
}

// How many insertions, removals and replacements make `a` into `b`; 99 where either is too long to be a key.
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  constexpr std::size_t longest = 64;
  if (a.size() > longest || b.size() > longest) return 99;
  std::array<std::size_t, longest + 1> row{};
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = std::exchange(row[j], std::min({row[j] + 1, row[j - 1] + 1, replaced}));
    }
  }
  return row[b.size()];
}

// ---- numbers

// Digits only: no sign, no blank, no separator. Nothing where it overflows.
constexpr std::optional<std::uint64_t> parse_number(std::string_view text) {
  if (text.empty()) return std::nullopt;
  std::uint64_t number = 0;
  for (char c : text) {
    if (!is_digit(c)) return std::nullopt;
    const auto digit = static_cast<std::uint64_t>(c - '0');
    if (number > (UINT64_MAX - digit) / 10) return std::nullopt;
    number = number * 10 + digit;
  }
  return number;
}

// `text` as a number of `unit`s; nothing above INT64_MAX, so that it fits both `Ns` and a size.
constexpr std::optional<std::uint64_t> parse_scaled(std::string_view text, std::uint64_t unit) {
  const auto number = parse_number(text);
  if (!number || *number > static_cast<std::uint64_t>(INT64_MAX) / unit) return std::nullopt;
  return *number * unit;
}

// Bytes, or with k, M, G (either case): 1024, 1024², 1024³.
constexpr std::optional<std::uint64_t> parse_size(std::string_view text) {
  if (text.empty()) return std::nullopt;
  const char last = to_lower(text.back());
  const std::uint64_t unit = last == 'k' ? 1u << 10 : last == 'm' ? 1u << 20 : last == 'g' ? 1u << 30 : 1u;
  return parse_scaled(unit == 1 ? text : text.substr(0, text.size() - 1), unit);
}

// `300ms`, `30s`, `5m`, `1h`; only 0 may stand without a unit.
constexpr std::optional<std::uint64_t> parse_duration(std::string_view text) {
  if (text == "0") return 0;
  struct Unit {
    std::string_view suffix;
    Ns span;
  };
  constexpr std::array<Unit, 4> units{
      {{"ms", kMillisecond}, {"s", kSecond}, {"m", 60 * kSecond}, {"h", 3600 * kSecond}}};
  for (const Unit& unit : units) {
    if (text.size() <= unit.suffix.size() || text.substr(text.size() - unit.suffix.size()) != unit.suffix) continue;
    return parse_scaled(text.substr(0, text.size() - unit.suffix.size()), static_cast<std::uint64_t>(unit.span));
  }
  return std::nullopt;
}

constexpr std::optional<std::uint64_t> parse_yes_no(std::string_view text) {
  if (text == "yes" || text == "true" || text == "on") return 1;
  if (text == "no" || text == "false" || text == "off") return 0;
  return std::nullopt;
}

// ---- names and lists

constexpr bool is_backend_name(std::string_view name) {
  const auto allowed = [](char c) {
    return is_alpha(c) || is_digit(c) || c == '.' || c == '_' || c == ':' || c == '-';
  };
  return !name.empty() && name.size() <= kMaxBackendNameBytes && std::all_of(name.begin(), name.end(), allowed);
}

// A comma would part it in a list; `*` means every model.
constexpr bool is_model_name(std::string_view name) {
  return !name.empty() && name.size() <= kMaxModelNameBytes && name != "*" && is_plain_text(name) &&
         name.find_first_of(",\t") == std::string_view::npos;
}

// A value, or what is wrong with the text in words that fit behind "key: ".
template <class T>
struct Parsed {
  T value;
  std::string problem;
  bool ok() const { return problem.empty(); }
};

inline std::string expected_model_name() {
  return "expected a model name (1 to " + std::to_string(kMaxModelNameBytes) + " bytes, without commas and not `*`)";
}

// Items between commas, trimmed, none empty.
inline Parsed<std::vector<std::string_view>> split_list(std::string_view text) {
  if (text.empty()) return {{}, "expected a comma-separated list"};
  std::vector<std::string_view> items;
  for (;;) {
    if (items.size() == kMaxModelsPerList) {
      return {{}, "expected at most " + std::to_string(kMaxModelsPerList) + " names in a list"};
    }
    const std::size_t comma = text.find(',');
    items.push_back(trim(text.substr(0, comma)));
    if (items.back().empty()) return {{}, "expected a name on each side of every comma"};
    if (comma == std::string_view::npos) return {std::move(items), {}};
    text.remove_prefix(comma + 1);
  }
}

// Different model names, in order.
inline Parsed<std::vector<std::string>> parse_models(std::string_view text) {
  auto items = split_list(text);
  if (!items.ok()) return {{}, std::move(items.problem)};
  std::vector<std::string> models;
  std::unordered_set<std::string_view> seen;
  for (std::string_view item : items.value) {
    if (!is_model_name(item)) return {{}, expected_model_name() + ", not " + in_quotes(item)};
    if (!seen.insert(item).second) return {{}, in_quotes(item) + " is listed twice"};
    models.emplace_back(item);
  }
  return {std::move(models), {}};
}

// ---- addresses

namespace detail {

// The address in its shortest spelling, so that two spellings of one address compare equal; nothing for a name.
inline std::optional<std::string> numeric_address(std::string_view host, int family) {
  if (host.size() >= INET6_ADDRSTRLEN || host.find('\0') != std::string_view::npos) return std::nullopt;
  std::array<unsigned char, sizeof(in6_addr)> address{};
  std::array<char, INET6_ADDRSTRLEN> shortest{};
  if (inet_pton(family, std::string(host).c_str(), address.data()) != 1) return std::nullopt;
  if (!inet_ntop(family, address.data(), shortest.data(), shortest.size())) return std::nullopt;
  return std::string(shortest.data());
}

struct AddressText {
  std::string_view host;
  std::string_view port;  // empty: not given
  bool in_brackets = false;
};

// Cuts `host`, `host:port`, `[v6]` and `[v6]:port`; nothing for any other shape.
constexpr std::optional<AddressText> split_address(std::string_view text) {
  AddressText result;
  result.in_brackets = !text.empty() && text.front() == '[';
  const std::size_t end = result.in_brackets ? text.find(']') : std::min(text.find(':'), text.size());
  if (end == std::string_view::npos) return std::nullopt;
  result.host = result.in_brackets ? text.substr(1, end - 1) : text.substr(0, end);
  const std::string_view rest = text.substr(result.in_brackets ? end + 1 : end);
  if (result.host.empty()) return std::nullopt;
  if (rest.empty()) return result;
  if (rest.front() != ':' || rest.size() < 2) return std::nullopt;
  result.port = rest.substr(1);
  return result;
}

constexpr std::optional<std::uint16_t> parse_port(std::string_view text) {
  const auto number = parse_number(text);
  if (!number || *number > UINT16_MAX) return std::nullopt;
  return static_cast<std::uint16_t>(*number);
}

constexpr bool is_host_label(std::string_view label) {
  const auto allowed = [](char c) { return is_alpha(c) || is_digit(c) || c == '-' || c == '_'; };
  return !label.empty() && label.size() <= kMaxLabelBytes && label.front() != '-' && label.back() != '-' &&
         std::all_of(label.begin(), label.end(), allowed);
}

// A name for DNS. One that ends in a number is no name but an address gone wrong (`10.0.0.256`, `1.2.3`).
constexpr bool is_host_name(std::string_view host) {
  if (host.size() > kMaxHostBytes) return false;
  for (;;) {
    const std::size_t dot = host.find('.');
    const std::string_view label = host.substr(0, dot);
    if (!is_host_label(label)) return false;
    if (dot == std::string_view::npos) return !std::all_of(label.begin(), label.end(), is_digit);
    host.remove_prefix(dot + 1);
  }
}

// What may stand in a URL's path (RFC 3986 3.3), without `.` and `..` segments, which a backend may resolve.
constexpr bool is_url_path(std::string_view path) {
  constexpr std::string_view marks = "/-._~!$&'()*+,;=:@";
  const auto is_hex = [](char c) { return is_digit(c) || (to_lower(c) >= 'a' && to_lower(c) <= 'f'); };
  for (std::size_t i = 0; i < path.size(); ++i) {
    const char c = path[i];
    const bool escape = c == '%' && i + 2 < path.size() && is_hex(path[i + 1]) && is_hex(path[i + 2]);
    if (!escape && !is_alpha(c) && !is_digit(c) && marks.find(c) == std::string_view::npos) return false;
    const std::string_view segment = path.substr(i + 1, path.find('/', i + 1) - (i + 1));
    if (c == '/' && (segment == "." || segment == "..")) return false;
  }
  return true;
}

}  // namespace detail

// `address:port` to listen on. `*` is every IPv4 address, `localhost` is 127.0.0.1; port 0 lets the kernel choose.
inline std::optional<HostPort> parse_listen(std::string_view text) {
  const auto parts = detail::split_address(text);
  if (!parts) return std::nullopt;
  const auto port = detail::parse_port(parts->port);
  if (!port) return std::nullopt;
  if (!parts->in_brackets && parts->host == "*") return HostPort{"0.0.0.0", *port};
  if (!parts->in_brackets && parts->host == "localhost") return HostPort{"127.0.0.1", *port};
  auto address = detail::numeric_address(parts->host, parts->in_brackets ? AF_INET6 : AF_INET);
  if (!address) return std::nullopt;
  return HostPort{std::move(*address), *port};
}

// `host:port` or `[v6]:port`, as parse_listen reads it.
inline std::string address_text(const HostPort& address) {
  const bool v6 = address.host.find(':') != std::string::npos;
  return (v6 ? "[" + address.host + "]" : address.host) + ":" + std::to_string(address.port);
}

struct BackendUrl {
  HostPort address;
  std::string base_path;  // as BackendSettings has it
};

namespace detail {

inline std::optional<HostPort> parse_authority(std::string_view text) {
  const auto parts = split_address(text);
  if (!parts) return std::nullopt;
  const auto port = parts->port.empty() ? std::optional<std::uint16_t>(80) : parse_port(parts->port);
  if (!port || *port == 0) return std::nullopt;
  auto host = numeric_address(parts->host, parts->in_brackets ? AF_INET6 : AF_INET);
  if (!host && !parts->in_brackets && is_host_name(parts->host)) {
    host.emplace(parts->host);
    std::transform(host->begin(), host->end(), host->begin(), to_lower);
  }
  if (!host) return std::nullopt;
  return HostPort{std::move(*host), *port};
}

// Drops what clients habitually put at the end: the paths of the API begin with /v1 themselves.
constexpr std::string_view base_path_of(std::string_view path) {
  const auto drop_slashes = [&path] {
    while (!path.empty() && path.back() == '/') path.remove_suffix(1);
  };
  drop_slashes();
  if (path.size() >= 3 && path.substr(path.size() - 3) == "/v1") path.remove_suffix(3);
  drop_slashes();
  return path;
}

}  // namespace detail

// `http://host[:port][/prefix]`.
inline Parsed<BackendUrl> parse_url(std::string_view text) {
  const auto starts_with = [text](std::string_view prefix) {
    return text.size() >= prefix.size() &&
           std::equal(prefix.begin(), prefix.end(), text.begin(), [](char a, char b) { return a == to_lower(b); });
  };
  if (starts_with("https://")) {
    return {{}, "https is not supported yet: put a TLS-terminating proxy on this host in front of it, or use http://"};
  }
  if (!starts_with("http://")) return {{}, "expected http://host[:port][/prefix]"};
  if (text.size() > kMaxUrlBytes) return {{}, "expected a URL of at most " + std::to_string(kMaxUrlBytes) + " bytes"};
  text.remove_prefix(std::string_view("http://").size());
  if (text.find_first_of("?#") != std::string_view::npos) return {{}, "expected a URL without `?` and `#`"};
  const std::size_t slash = std::min(text.find('/'), text.size());
  const std::string_view authority = text.substr(0, slash);
  const std::string_view path = text.substr(slash);
  if (authority.find('@') != std::string_view::npos) {
    return {{}, "expected a URL without a user or password; a key goes into api_key_env or api_key_file"};
  }
  auto address = detail::parse_authority(authority);
  if (!address)
    return {{}, "expected a host name or address, [v6] in brackets, and a port of 1 to 65535 behind http://"};
  if (!detail::is_url_path(path)) return {{}, "expected a prefix of URL characters, without `.` and `..` segments"};
  return {{std::move(*address), std::string(detail::base_path_of(path))}, {}};
}

}  // namespace nexus::config
