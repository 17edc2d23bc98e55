// trace_values.h
// Owns:     the values of [trace], and OpenTelemetry's own variables, which say the same where nexus.conf does not.
// Promises: pure functions over any bytes; a variable that is unfit never keeps Nexus from starting, because others set
//           it for all programs of a host: a remark says why it is not used. No problem and no remark quotes a URL.
// Leaves:   keys to keys.h, other values to values.h, spans to proxy/request_trace.h.
// Threads:  any.
// Tested by: tests/trace_config_test.cpp, tests/config_test.cpp
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/config/settings.h"
#include "nexus/config/values.h"

namespace nexus::config {

constexpr std::string_view kCollectorText = "off, or http://host[:port][/prefix]";

// Millionths, from `0`, `1`, `0.25`; a digit before the point and at most six behind it.
constexpr std::optional<std::uint64_t> parse_share(std::string_view text) {
  constexpr std::size_t kDecimals = 6;
  const std::size_t point = text.find('.');
  const std::string_view decimals = point == std::string_view::npos ? std::string_view() : text.substr(point + 1);
  if (decimals.size() > kDecimals || (point != std::string_view::npos && decimals.empty())) return std::nullopt;
  const auto whole = parse_number(text.substr(0, point));
  if (!whole || *whole > 1'000'000) return std::nullopt;
  std::uint64_t millionths = *whole;
  for (std::size_t i = 0; i < kDecimals; ++i) {
    const char digit = i < decimals.size() ? decimals[i] : '0';
    if (!is_digit(digit)) return std::nullopt;
    millionths = millionths * 10 + static_cast<std::uint64_t>(digit - '0');
  }
  return millionths;
}

// Reads a kCollectorText; /v1/traces at its end may be there or not.
inline std::string read_collector(std::string_view text, TraceSettings& trace) {
  trace.collector = HostPort();
  if (text == "off") return {};
  if (starts_with_ignoring_case(text, "https://"))
    return "expected http://: spans are sent in clear, to a collector near by";
  if (!starts_with_ignoring_case(text, "http://")) return "expected " + std::string(kCollectorText);
  if (text.find('@') != std::string_view::npos) return "expected a URL without a user or password";
  constexpr std::string_view kPath = "/v1/traces";
  text = text.substr(0, text.find_last_not_of('/') + 1);
  if (text.ends_with(kPath)) text.remove_suffix(kPath.size());
  BackendSettings parsed;
  if (std::string problem = parse_url(text, parsed); !problem.empty()) return problem;
  trace.collector = std::move(parsed.address);
  trace.base_path = std::move(parsed.base_path);
  return {};
}

// Undoes percent-encoding; nothing if it is broken.
inline std::optional<std::string> percent_decoded(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    const int high = i + 1 < text.size() ? hex_value(text[i + 1]) : -1;
    const int low = i + 2 < text.size() ? hex_value(text[i + 2]) : -1;
    if (high < 0 || low < 0) return std::nullopt;
    out += static_cast<char>(high * 16 + low);
    i += 2;
  }
  return out;
}

// Reads OTEL_RESOURCE_ATTRIBUTES, `name=value,…`; what is unfit is left out. A service.name among them is the
// service's.
inline void read_resource_attributes(std::string_view list, TraceSettings& trace) {
  while (!list.empty() && trace.attributes.size() < kMaxResourceAttributes) {
    const std::string_view item = next_list_element(list);
    const std::size_t equals = item.find('=');
    if (equals == std::string_view::npos) continue;
    auto name = percent_decoded(trim_blanks(item.substr(0, equals)));
    auto value = percent_decoded(trim_blanks(item.substr(equals + 1)));
    if (!name || name->empty() || !value) continue;
    if (name->size() > kMaxResourceAttributeBytes || value->size() > kMaxResourceAttributeBytes) continue;
    if (*name == "service.name") {
      if (!value->empty()) trace.service_name = std::move(*value);
      continue;
    }
    std::erase_if(trace.attributes, [&](const auto& one) { return one.first == *name; });
    trace.attributes.emplace_back(std::move(*name), std::move(*value));
  }
}

// `endpoint_given`: nexus.conf names the collector, or says that there is none.
inline void read_trace_variables(const ConfigEnvironment& env, bool endpoint_given, TraceSettings& trace) {
  const auto variable = [&](const char* name) { return env.get_env ? env.get_env(name).value_or("") : std::string(); };
  read_resource_attributes(variable("OTEL_RESOURCE_ATTRIBUTES"), trace);
  if (std::string name = variable("OTEL_SERVICE_NAME"); !name.empty() && name.size() <= kMaxResourceAttributeBytes) {
    trace.service_name = std::move(name);
  }
  constexpr const char* kEndpoint = "OTEL_EXPORTER_OTLP_ENDPOINT";
  const std::string endpoint = endpoint_given ? std::string() : variable(kEndpoint);
  if (endpoint.empty()) return;
  const std::string problem = read_collector(trim_blanks(endpoint), trace);
  if (!problem.empty()) trace.remark = std::string(kEndpoint) + ": " + problem;
}

}  // namespace nexus::config
