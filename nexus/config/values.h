// values.h
// Owns:     the syntax of one value in nexus.conf: numbers, sizes, durations, addresses, URLs, names, lists, and the
//           secret keys in the files and variables that a value names.
// Promises: pure functions over any bytes: a value, or nothing, or a problem in words; no exception, no clock; files
//           and variables through ConfigEnvironment only. No problem quotes a URL (it may hold a password) or a key.
// Leaves:   keys, ranges and where a value is stored to keys.h; lines and sections to parser.h.
// Threads:  any.
// Tested by: tests/config_test.cpp, tests/fuzz/config.h
#pragma once

#include <arpa/inet.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/config/settings.h"

namespace nexus {

struct ConfigError {
  std::string file;
  int line = 0;  // from 1; 0: the file as a whole
  std::string message;
  std::string to_string() const {
    return file + (line > 0 ? ":" + std::to_string(line) : std::string()) + ": " + message;
  }
};

// Access to the system. A read_file that returns nothing leaves the reason in errno. append_problem returns the errno
// with which the file could not be opened for appending, or created, or 0; without it no file is asked for.
struct ConfigEnvironment {
  std::function<std::optional<std::string>(const std::string& name)> get_env;
  std::function<std::optional<std::string>(const std::string& path)> read_file;
  std::function<int(const std::string& path)> append_problem{};
};

}  // namespace nexus

namespace nexus::config {

// A function that returns a std::string returns what is wrong, in words that fit after "key: "; empty: nothing is, and
// its last argument holds the value.

// ---- text

constexpr bool is_blank(char c) { return c == ' ' || c == '\t'; }
constexpr bool is_alpha(char c) { return to_lower(c) >= 'a' && to_lower(c) <= 'z'; }

// True if `text` holds only letters, digits and `marks`.
constexpr bool consists_of(std::string_view text, std::string_view marks) {
  return std::all_of(text.begin(), text.end(),
                     [marks](char c) { return is_alpha(c) || is_digit(c) || marks.find(c) != std::string_view::npos; });
}

constexpr bool is_quoted(std::string_view text) {
  return text.size() >= 2 && text.front() == text.back() && (text.front() == '"' || text.front() == '\'');
}

constexpr bool is_visible_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c > 0x20 && c < 0x7f; });
}

// Valid UTF-8 without control characters but tabs: all that a line may hold, so that names fit JSON and logs.
inline bool is_plain_text(std::string_view s) {
  while (!s.empty()) {
    const std::size_t length = nexus::detail::utf8_length(s);
    if (length == 0 || !is_field_text(s.front())) return false;
    s.remove_prefix(length);
  }
  return true;
}

// 'text' for a message: cut between two characters, control characters shown as `?`.
inline std::string in_quotes(std::string_view text) {
  std::size_t length = std::min(text.size(), kMaxQuotedBytes);
  if (length < text.size()) {
    while (length > 0 && (static_cast<unsigned char>(text[length]) & 0xC0) == 0x80) --length;
  }
  std::string result = "'";
  for (char c : text.substr(0, length)) result += is_field_text(c) && c != '\t' ? c : '?';
  return result + (length < text.size() ? "...'" : "'");
}

inline std::string at_most(std::size_t limit, std::string_view things) {
  return "expected at most " + std::to_string(limit) + " " + std::string(things);
}

// ---- numbers

// Digits only: no sign, no blank, no separator. Nothing above INT64_MAX, so that it fits both `Ns` and a size.
constexpr std::optional<std::uint64_t> parse_number(std::string_view text) {
  while (text.size() > 1 && text.front() == '0') text.remove_prefix(1);
  return parse_decimal(text);
}

// `25%`.
constexpr std::optional<std::uint64_t> parse_percent(std::string_view text) {
  if (!text.ends_with('%')) return std::nullopt;
  return parse_number(text.substr(0, text.size() - 1));
}

struct Unit {
  std::string_view suffix;
  std::uint64_t factor;
};

// A number with the first suffix of `units` that fits.
constexpr std::optional<std::uint64_t> parse_with_unit(std::string_view text, std::initializer_list<Unit> units) {
  for (const Unit& unit : units) {
    if (!text.ends_with(unit.suffix)) continue;
    const auto number = parse_number(text.substr(0, text.size() - unit.suffix.size()));
    if (!number || *number > static_cast<std::uint64_t>(INT64_MAX) / unit.factor) return std::nullopt;
    return *number * unit.factor;
  }
  return std::nullopt;
}

// Bytes, or with k, M, G (either case): 1024, 1024², 1024³.
constexpr std::optional<std::uint64_t> parse_size(std::string_view text) {
  constexpr std::uint64_t k = 1u << 10, m = 1u << 20, g = 1u << 30;
  return parse_with_unit(text, {{"k", k}, {"K", k}, {"m", m}, {"M", m}, {"g", g}, {"G", g}, {"", 1}});
}

// Nanoseconds from `300ms`, `30s`, `5m`, `1h`; only 0 needs no unit.
constexpr std::optional<std::uint64_t> parse_duration(std::string_view text) {
  if (text == "0") return 0;
  return parse_with_unit(text, {{"ms", kMillisecond}, {"s", kSecond}, {"m", 60 * kSecond}, {"h", 3600 * kSecond}});
}

constexpr std::optional<std::uint64_t> parse_yes_no(std::string_view text) {
  if (text == "yes" || text == "true" || text == "on") return 1;
  if (text == "no" || text == "false" || text == "off") return 0;
  return std::nullopt;
}

// The index of `word` in a list like `text, json`.
constexpr std::optional<std::uint64_t> parse_choice(std::string_view word, std::string_view choices) {
  for (std::uint64_t index = 0; !choices.empty(); ++index) {
    if (next_list_element(choices) == word) return index;
  }
  return std::nullopt;
}

// ---- names and lists

constexpr bool is_backend_name(std::string_view name) {
  return !name.empty() && name.size() <= kMaxBackendNameBytes && consists_of(name, "._:-");
}

// Without commas, because lists of names are separated by them; `*` means every model.
inline bool is_model_name(std::string_view name) {
  return !name.empty() && name.size() <= kMaxModelNameBytes && name != "*" && is_plain_text(name) && !is_quoted(name) &&
         name.find_first_of(",\t") == std::string_view::npos;
}

inline std::string expected_model_name(std::string_view name) {
  if (is_quoted(name)) return "expected a model name without quotes, not " + in_quotes(name);
  return "expected a model name (1 to " + std::to_string(kMaxModelNameBytes) +
         " bytes, without commas and not `*`), not " + in_quotes(name);
}

// Calls `take` (item → problem) for each item between commas, trimmed, until one is a problem; an empty item is one.
template <class Take>
std::string read_list(std::string_view list, Take take) {
  bool more = true;
  for (std::size_t count = 0; more; ++count) {
    if (count == kMaxModelsPerList) return at_most(kMaxModelsPerList, "names in a list");
    more = list.find(',') != std::string_view::npos;
    const std::string_view item = next_list_element(list);
    if (item.empty()) return "expected a name before and after every comma";
    if (std::string problem = take(item); !problem.empty()) return problem;
  }
  return {};
}

using NameSet = std::unordered_set<std::string_view>;

// The problem of `name` in a list whose earlier names are `seen`.
inline std::string check_name(std::string_view name, NameSet& seen, bool star_allowed = false) {
  if (!is_model_name(name) && !(star_allowed && name == "*")) return expected_model_name(name);
  return seen.insert(name).second ? std::string() : in_quotes(name) + " is listed twice";
}

// Reads different model names, in order. `all` and `none` are names only if `words_are_names`.
inline std::string read_models(std::string_view text, std::vector<std::string>& models, bool words_are_names = true) {
  NameSet seen;
  return read_list(text, [&](std::string_view item) {
    if (!words_are_names && (item == "all" || item == "none")) return in_quotes(item) + " must be the only item";
    models.emplace_back(item);
    return check_name(item, seen);
  });
}

// Reads the models that have a capability; `*` or `all`, and `none`, are lists of their own.
inline std::string read_capability(std::string_view text, Capability& capability) {
  capability.stated = true;
  if (text == "none") return {};
  if (text != "*" && text != "all") return read_models(text, capability.models, false);
  capability.models = {"*"};
  return {};
}

constexpr std::string_view kApisText = "a comma-separated list of APIs, or all";

// Reads a list of kApiNames.
inline std::string read_apis(std::string_view text, Apis& apis) {
  apis = 0;
  if (text == "all") apis = kAllApis;
  if (text == "all") return {};
  return read_list(text, [&](std::string_view item) {
    const auto api = parse_choice(item, kApiNames);
    if (!api) return "expected one of " + std::string(kApiNames) + ", not " + in_quotes(item);
    apis |= bit_of(static_cast<Api>(*api));
    return std::string();
  });
}

constexpr std::string_view kContextText = "a number of tokens, 1 to 1G, or a comma-separated list of `model number`";

// Reads kContextText; a number for `*` is that of the models not named.
inline std::string read_context_lengths(std::string_view text, std::vector<ContextLength>& lengths) {
  const bool for_all = text.find_first_of(" \t,") == std::string_view::npos;
  NameSet seen;
  return read_list(text, [&](std::string_view item) {
    const std::size_t blank = std::min(item.find_last_of(" \t"), item.size());
    const std::string_view model = for_all ? "*" : trim_blanks(item.substr(0, blank));
    const auto tokens = parse_size(for_all ? item : trim_blanks(item.substr(blank)));
    if (!tokens || *tokens == 0 || *tokens > kMaxContextTokens) {
      return "expected " + std::string(kContextText) + ", not " + in_quotes(item);
    }
    lengths.push_back({std::string(model), *tokens});
    return check_name(model, seen, true);
  });
}

// ---- addresses

// The address in its shortest spelling, so that two spellings of one address compare equal; nothing for a name.
inline std::optional<std::string> numeric_address(std::string_view host, int family) {
  if (host.size() >= INET6_ADDRSTRLEN || host.find('\0') != std::string_view::npos) return std::nullopt;
  std::array<unsigned char, sizeof(in6_addr)> address{};
  std::array<char, INET6_ADDRSTRLEN> shortest{};
  if (inet_pton(family, std::string(host).c_str(), address.data()) != 1) return std::nullopt;
  if (!inet_ntop(family, address.data(), shortest.data(), shortest.size())) return std::nullopt;
  // An IPv4 address that is written as one of IPv6 (RFC 4291 2.5.5.2): a socket for IPv6 alone does not take it.
  constexpr std::string_view kMapped = "::ffff:";
  const std::string_view text(shortest.data());
  const bool mapped = text.starts_with(kMapped) && text.find('.') != std::string_view::npos;
  return std::string(text.substr(mapped ? kMapped.size() : 0));
}

// Reads `host:port` and `[v6]:port`; also without the port if there is a `default_port`. `resolve` turns a host that is
// no IPv4 address into one or into a name (std::optional<std::string>).
template <class Resolve>
std::optional<HostPort> parse_host_port(std::string_view text, std::optional<std::uint64_t> default_port,
                                        Resolve resolve) {
  const bool in_brackets = text.starts_with('[');
  const std::size_t end = in_brackets ? text.find(']') : std::min(text.find(':'), text.size());
  if (end == std::string_view::npos) return std::nullopt;
  const std::string_view name = in_brackets ? text.substr(1, end - 1) : text.substr(0, end);
  const std::string_view rest = text.substr(in_brackets ? end + 1 : end);
  auto host = numeric_address(name, in_brackets ? AF_INET6 : AF_INET);
  if (!host && !in_brackets) host = resolve(name);
  const auto port = rest.empty() ? default_port : parse_number(rest.substr(1));
  if (!host || !port || *port > UINT16_MAX || !(rest.empty() || rest.front() == ':')) return std::nullopt;
  return HostPort{std::move(*host), static_cast<std::uint16_t>(*port)};
}

// `address:port` to listen on. `*` is every IPv4 address, `localhost` is 127.0.0.1; port 0 lets the kernel choose.
inline std::optional<HostPort> parse_listen(std::string_view text) {
  return parse_host_port(text, std::nullopt, [](std::string_view name) -> std::optional<std::string> {
    if (name == "*") return "0.0.0.0";
    if (name == "localhost") return "127.0.0.1";
    return std::nullopt;
  });
}

// `host:port` or `[v6]:port`, as parse_listen reads it.
inline std::string address_text(const HostPort& address) { return host_port(address.host, address.port); }

// A name for DNS, maybe with a final dot. One that ends in a number is a mistyped address (`10.0.0.256`, `1.2.3`).
constexpr bool is_host_name(std::string_view host) {
  if (host.ends_with('.')) host.remove_suffix(1);
  if (host.size() > kMaxHostBytes) return false;
  for (;;) {
    const std::size_t dot = host.find('.');
    const std::string_view label = host.substr(0, dot);
    if (label.empty() || label.size() > kMaxLabelBytes || !consists_of(label, "-_")) return false;
    if (label.front() == '-' || label.back() == '-') return false;
    if (dot == std::string_view::npos) return !std::all_of(label.begin(), label.end(), is_digit);
    host.remove_prefix(dot + 1);
  }
}

// The characters of a URL's path (RFC 3986 3.3), without `.` and `..` segments, which a backend may resolve.
constexpr bool is_url_path(std::string_view path) {
  const auto is_hex = [](char c) { return is_digit(c) || (to_lower(c) >= 'a' && to_lower(c) <= 'f'); };
  for (std::size_t i = 0; i < path.size(); ++i) {
    const bool escape = path[i] == '%' && i + 2 < path.size() && is_hex(path[i + 1]) && is_hex(path[i + 2]);
    if (!escape && !consists_of(path.substr(i, 1), "/-._~!$&'()*+,;=:@")) return false;
    const std::string_view segment = path.substr(i + 1, path.find('/', i + 1) - (i + 1));
    if (path[i] == '/' && (segment == "." || segment == "..")) return false;
  }
  return true;
}

inline std::optional<HostPort> parse_authority(std::string_view text, std::uint64_t default_port) {
  auto address = parse_host_port(text, default_port, [](std::string_view name) -> std::optional<std::string> {
    if (!is_host_name(name)) return std::nullopt;
    std::string lower(name);
    std::transform(name.begin(), name.end(), lower.begin(), to_lower);
    return lower;
  });
  return address && address->port != 0 ? address : std::nullopt;
}

// The path without what users often append: slashes, and a /v1 with which the API's own paths begin.
constexpr std::string_view base_path_of(std::string_view path) {
  const auto without_slashes = [](std::string_view text) { return text.substr(0, text.find_last_not_of('/') + 1); };
  path = without_slashes(path);
  return without_slashes(path.ends_with("/v1") ? path.substr(0, path.size() - 3) : path);
}

constexpr std::string_view kUrlText = "http:// or https://host[:port][/prefix]";

// Reads a kUrlText into address, base_path and tls.on.
inline std::string parse_url(std::string_view text, BackendSettings& backend) {
  const bool tls = starts_with_ignoring_case(text, "https://");
  const std::string_view scheme = tls ? "https://" : "http://";
  if (!starts_with_ignoring_case(text, scheme)) return "expected " + std::string(kUrlText);
  if (text.size() > kMaxUrlBytes) return "expected a URL of at most " + std::to_string(kMaxUrlBytes) + " bytes";
  text.remove_prefix(scheme.size());
  if (text.find_first_of("?#") != std::string_view::npos) return "expected a URL without `?` and `#`";
  const std::size_t slash = std::min(text.find('/'), text.size());
  const std::string_view authority = text.substr(0, slash), path = text.substr(slash);
  if (authority.find('@') != std::string_view::npos) {
    return "expected a URL without a user or password; a key goes into api_key_env or api_key_file";
  }
  auto address = parse_authority(authority, tls ? 443 : 80);
  if (!address) {
    return "expected a host name or address, [v6] in brackets, and a port of 1 to 65535 after " + std::string(scheme);
  }
  if (!is_url_path(path)) return "expected a prefix of URL characters, without `.` and `..` segments";
  backend.address = std::move(*address);
  backend.base_path = base_path_of(path);
  backend.tls.on = tls;
  return {};
}

// An origin as a browser sends it (RFC 6454 6.1): `scheme://host[:port]` in small letters, or `null`, which a page from
// a file has.
inline bool is_origin(std::string_view text) {
  const std::size_t colon = text.find("://");
  if (colon == std::string_view::npos || colon == 0) return text == "null";
  const std::string_view host = text.substr(colon + 3);
  return is_alpha(text.front()) && consists_of(text.substr(0, colon), "+-.") && !host.empty() &&
         consists_of(host, "-._~:[]");
}

// Reads `*` alone, or different origins.
inline std::string read_origins(std::string_view text, std::vector<std::string>& origins) {
  std::unordered_set<std::string> seen;
  return read_list(text, [&](std::string_view item) -> std::string {
    std::string& origin = origins.emplace_back(item);
    std::transform(origin.begin(), origin.end(), origin.begin(), to_lower);
    if (origins.size() > kMaxOrigins) return at_most(kMaxOrigins, "origins");
    if (origin != "*" && !is_origin(origin)) {
      return "expected * or origins like https://app.example:8443 (no path and no slash at the end), not " +
             in_quotes(item);
    }
    if (!seen.insert(origin).second) return in_quotes(item) + " is listed twice";
    return seen.contains("*") && seen.size() > 1 ? "* must be the only item" : "";
  });
}

// Reads different names of header fields, in order; `none` alone for an empty list.
inline std::string read_affinity_headers(std::string_view text, std::vector<std::string>& names) {
  names.clear();
  if (text == "none") return {};
  return read_list(text, [&](std::string_view item) -> std::string {
    std::string name(item);
    std::transform(name.begin(), name.end(), name.begin(), to_lower);
    if (names.size() == kMaxAffinityHeaders) return at_most(kMaxAffinityHeaders, "names");
    if (name.size() > kMaxBackendNameBytes || !consists_of(name, "!#$%&'*+-.^_`|~"))
      return "expected names of header fields, not " + in_quotes(item);
    if (name == "x-request-id" || name == "x-client-request-id") return in_quotes(item) + " differs in each request";
    if (std::find(names.begin(), names.end(), name) != names.end()) return in_quotes(item) + " is listed twice";
    names.push_back(std::move(name));
    return {};
  });
}

// ---- files and lines

// read_file with its failure in words.
inline std::string read_text(const ConfigEnvironment& env, std::string_view path, std::string& text) {
  errno = ENOENT;  // for a read_file that leaves no reason
  auto read = env.read_file ? env.read_file(std::string(path)) : std::nullopt;
  if (!read) return "cannot read this file: " + std::generic_category().message(errno);
  text = std::move(*read);
  return {};
}

// The line without its comment and outer blanks. `#` opens a comment only at the start or after a blank, so that a key
// or a path may hold one.
constexpr std::string_view without_comment(std::string_view line) {
  std::size_t end = line.find('#');
  while (end != std::string_view::npos && end > 0 && !is_blank(line[end - 1])) end = line.find('#', end + 1);
  return trim_blanks(line.substr(0, end));
}

constexpr std::string_view without_bom(std::string_view text) {
  return text.starts_with("\xEF\xBB\xBF") ? text.substr(3) : text;
}

// Takes the first line off `text`, without its LF or CRLF.
constexpr std::string_view take_line(std::string_view& text) {
  const std::size_t end = text.find('\n');
  std::string_view line = text.substr(0, end);
  text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  if (line.ends_with('\r')) line.remove_suffix(1);
  return line;
}

// Calls `take` (number, text without comment) for each line that is not blank, until there are too many `errors`.
template <class Take>
void read_lines(std::string_view text, const std::vector<ConfigError>& errors, Take take) {
  text = without_bom(text);
  for (int number = 1; !text.empty() && errors.size() <= kMaxConfigErrors; ++number) {
    const std::string_view line = without_comment(take_line(text));
    if (!line.empty()) take(number, line);
  }
}

// ---- secrets

inline std::string check_backend_key(std::string_view key) {
  if (is_quoted(key)) return "the key in it must be without quotes";
  const bool fits = !key.empty() && key.size() <= kMaxBackendKeyBytes && is_visible_ascii(key);
  return fits ? "" : "the key in it must be 1 to 4096 visible ASCII characters";
}

constexpr std::string_view kNoVariable = " is not set, or empty";

// True for `NAME_OF_A_VARIABLE`. A key in its place has small letters.
constexpr bool is_plain_variable(std::string_view name) {
  return name.size() <= 64 && std::none_of(name.begin(), name.end(), [](char c) { return c >= 'a' && c <= 'z'; });
}

// Reads a backend's key, as it goes after `Authorization: Bearer `, from an environment variable.
inline std::string read_key_variable(const ConfigEnvironment& env, std::string_view name, std::string& key) {
  key = env.get_env ? env.get_env(std::string(name)).value_or("") : "";
  if (!key.empty()) return check_backend_key(key);
  return (is_plain_variable(name) ? "the variable " + std::string(name) : "this variable").append(kNoVariable);
}

// The same from the first line of a file.
inline std::string read_key_file(const ConfigEnvironment& env, std::string_view path, std::string& key) {
  std::string text;
  if (std::string problem = read_text(env, path, text); !problem.empty()) return problem;
  std::string_view rest = without_bom(text);
  key = trim_blanks(take_line(rest));
  return check_backend_key(key);
}

}  // namespace nexus::config
