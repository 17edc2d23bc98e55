// negotiation.h
// Owns:     the choice between the formats of /metrics by a request's Accept fields, and their Content-Types.
// Promises: there is always a format: 0.0.4 if nothing fits or nothing is asked. No byte of a request gets into the
//           response: a scheme of escaping is echoed only if it is one of a fixed list.
// Leaves:   the fields to server/builtin_pages.h; writing the formats to exposition.h.
// Threads:  any; pure functions.
// Tested by: tests/negotiation_test.cpp, tests/e2e/openmetrics.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "nexus/base/text.h"
#include "nexus/metrics/exposition.h"

namespace nexus {

// How Prometheus 3 wants names with other characters than [a-zA-Z0-9_:] written. Nexus has none, so that all are alike.
enum class Escaping : std::uint8_t { none, allow_utf_8, underscores, dots, values };

struct MetricsForm {
  MetricsFormat format = MetricsFormat::text;
  Escaping escaping = Escaping::none;
  bool operator==(const MetricsForm&) const = default;
};

inline constexpr std::array<std::string_view, 5> kEscapingNames{"", "allow-utf-8", "underscores", "dots", "values"};
constexpr std::string_view kTextType = "text/plain; version=0.0.4; charset=utf-8";
inline constexpr std::array<std::string_view, kEscapingNames.size()> kOpenMetricsTypes{
    "application/openmetrics-text; version=1.0.0; charset=utf-8",
    "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8",
    "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores",
    "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=dots",
    "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=values"};

constexpr std::string_view content_type_of(const MetricsForm& form) {
  return form.format == MetricsFormat::text ? kTextType : kOpenMetricsTypes[static_cast<std::size_t>(form.escaping)];
}

namespace detail {

// Takes the part up to the next `separator` that is not in a quoted string, without its blanks.
constexpr std::string_view take_part(std::string_view& rest, char separator) {
  bool quoted = false;
  std::size_t end = 0;
  for (; end < rest.size() && (quoted || rest[end] != separator); ++end) {
    if (rest[end] == '"') quoted = !quoted;
    if (quoted && rest[end] == '\\') ++end;
  }
  end = std::min(end, rest.size());
  const std::string_view part = rest.substr(0, end);
  rest.remove_prefix(std::min(end + 1, rest.size()));
  return trim_blanks(part);
}

// `0.75` as 750 (RFC 9110 12.4.2).
constexpr std::optional<int> read_quality(std::string_view text) {
  if (text.empty() || text.size() > 5 || (text[0] != '0' && text[0] != '1')) return std::nullopt;
  if (text.size() > 1 && text[1] != '.') return std::nullopt;
  int quality = (text[0] - '0') * 1000;
  for (std::size_t i = 2, step = 100; i < text.size(); ++i, step /= 10) {
    if (!is_digit(text[i])) return std::nullopt;
    quality += (text[i] - '0') * static_cast<int>(step);
  }
  return quality <= 1000 ? std::optional(quality) : std::nullopt;
}

// One element of an Accept field.
struct MediaRange {
  std::string_view type;  // `text/plain`
  std::string_view version;
  Escaping escaping = Escaping::none;
  int quality = 1000;
};

// Nothing if its quality can't be read.
constexpr std::optional<MediaRange> read_media_range(std::string_view text) {
  MediaRange range;
  range.type = take_part(text, ';');
  while (!text.empty()) {
    std::string_view value = take_part(text, ';');
    const std::string_view name = take_part(value, '=');
    value = trim_blanks(value);
    if (value.size() >= 2 && value.front() == '"' && value.back() == '"') value = value.substr(1, value.size() - 2);
    if (equals_ignoring_case(name, "version")) range.version = value;
    if (equals_ignoring_case(name, "escaping")) {
      const auto known = std::find(kEscapingNames.begin() + 1, kEscapingNames.end(), value);
      range.escaping = static_cast<Escaping>((known - kEscapingNames.begin()) % std::ssize(kEscapingNames));
    }
    if (!equals_ignoring_case(name, "q")) continue;
    const auto quality = read_quality(value);
    if (!quality) return std::nullopt;
    range.quality = *quality;
  }
  return range;
}

}  // namespace detail

// Takes the Accept fields of a request, and makes the choice.
class MetricsAccept {
 public:
  constexpr void add(std::string_view field) {
    while (!field.empty()) {
      const auto range = detail::read_media_range(detail::take_part(field, ','));
      if (!range) continue;
      text_.weigh(*range, "text/plain", "text/*", "0.0.4");
      openmetrics_.weigh(*range, "application/openmetrics-text", "application/*", "1.0.0");
    }
  }

  // The format of the highest quality; of two, the one that is named more exactly; else 0.0.4.
  constexpr MetricsForm choice() const {
    const bool wanted = openmetrics_.quality > 0;
    const bool preferred = openmetrics_.quality != text_.quality ? openmetrics_.quality > text_.quality
                                                                 : openmetrics_.exactness > text_.exactness;
    if (!wanted || !preferred) return {};
    return {MetricsFormat::openmetrics, openmetrics_.escaping};
  }

 private:
  // The most exact range that fits a format says how much it is wanted.
  struct Wish {
    int exactness = -1;
    int quality = 0;
    Escaping escaping = Escaping::none;

    constexpr void weigh(const detail::MediaRange& range, std::string_view type, std::string_view of_kind,
                         std::string_view version) {
      int fits = -1;
      if (range.type == "*/*") fits = 0;
      if (equals_ignoring_case(range.type, of_kind)) fits = 1;
      if (equals_ignoring_case(range.type, type)) fits = range.version.empty() ? 2 : range.version == version ? 3 : -1;
      if (fits < 0 || fits < exactness || (fits == exactness && range.quality <= quality)) return;
      exactness = fits;
      quality = range.quality;
      escaping = range.escaping;
    }
  };

  Wish text_, openmetrics_;
};

}  // namespace nexus
