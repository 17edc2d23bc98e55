// status_page.h
// Owns:     the page at /, filled into page/status.html, and the header fields that limit what a browser does with it.
// Promises: one document, readable without scripts: it then shows the totals of /v1/stats. Names are text and nothing
//           else, with invisible characters escaped. Only its own script and style run, and only this server is asked.
// Leaves:   rates, quantiles and their lines to page/status.js; sockets to builtin_pages.h. tools/embed.sh makes the
//           constants of the three files and the digests of two.
// Threads:  one (control).
// Tested by: tests/status_page_test.cpp, tests/e2e/status.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "build/gen/status_files.h"
#include "nexus/apps/format.h"
#include "nexus/base/limits.h"
#include "nexus/base/text_buffer.h"
#include "nexus/metrics/stats_json.h"

namespace nexus {

constexpr std::size_t kMaxStatusRows = 200;  // of each table; MOST_ROWS of the script

inline const std::string kStatusFields =
    "Content-Security-Policy: default-src 'none'; script-src 'sha256-" + std::string(kStatusScriptSha256) +
    "'; style-src 'sha256-" + std::string(kStatusStyleSha256) +
    "'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"
    "Cache-Control: no-store\r\nReferrer-Policy: no-referrer\r\nX-Content-Type-Options: nosniff\r\n";

namespace detail {

inline std::string html_text(std::string_view text) {
  constexpr std::string_view kSpecial = "&<>\"'";
  constexpr std::array<std::string_view, kSpecial.size()> kEntities{"&amp;", "&lt;", "&gt;", "&quot;", "&#39;"};
  std::string out;
  for (const char& c : text) {
    const std::size_t at = kSpecial.find(c);
    out += at == std::string_view::npos ? std::string_view(&c, 1) : kEntities[at];
  }
  return out;
}

inline std::string mean_wait_text(const StatsRow& key) {
  const double waits = static_cast<double>(key.durations), sum_ns = static_cast<double>(key.duration_sum_ns);
  return seconds_text(waits > 0 ? std::optional(sum_ns / static_cast<double>(kSecond) / waits) : std::nullopt);
}

// `down 3m 5s`, and below it why, what it is and where, and when it is checked.
inline std::string state_cell(const StatsRow& row) {
  const std::string_view state = state_of(row);
  const bool ejected = state == "ejected";
  const std::string_view kind = state == "up" ? "up" : state == "down" || state == "removed" ? "down" : "some";
  const auto seconds = [](Ns span) { return span_text(static_cast<std::uint64_t>(span / kSecond)); };
  std::string span = ejected               ? seconds(row.ejected_ns + kSecond - 1)
                     : row.view != nullptr ? seconds(row.view->state_ns)
                                           : "";
  std::string out = "<span class=\"state " + std::string(kind) + "\">" + std::string(state) +
                    (span.empty() ? "" : (ejected ? " for " : " ") + span) + "</span>";
  if (!why_of(row).empty())
    out += "<small class=\"why\">" + html_text(escape_for_terminal(why_of(row), 300)) + "</small>";
  if (row.view == nullptr) return out;
  std::string facts = std::string(row.view->type) + (row.view->url.empty() ? "" : " " + row.view->url);
  if (row.view->max_pending > 0) facts += ", at most " + std::to_string(row.view->max_pending);
  if (row.view->checked_ns >= 0) facts += ", checked " + seconds(row.view->checked_ns) + " ago";
  if (row.view->next_check_ns >= 0) facts += ", next in " + seconds(row.view->next_check_ns);
  return out + "<small class=\"facts\">" + html_text(escape_for_terminal(facts, 300)) + "</small>";
}

inline std::string failure_rows(const Stats& stats) {
  std::string out;
  for (const auto& [one, backend] : stats.failures) {
    out += "<tr>";
    for (const std::string& text :
         {utc_text(one.wall_ns), std::to_string(one.status), std::string(one.error), std::string(one.model.view()),
          std::string(backend.empty() ? "-" : backend), std::string(one.request_id.view())})
      out += "<td>" + html_text(escape_for_terminal(text, 128)) + "</td>";
    out += "</tr>\n";
  }
  return out;
}

// Lists faults of the configuration and of certificates.
inline std::string notes_of(const FleetView& fleet) {
  std::string out = fleet.last_reload_ok ? "" : "The last reload failed: see the log. ";
  for (const FleetView::Certificate& one : fleet.certificates) {
    const std::int64_t left_s = one.expiry_s - fleet.wall_ns / kSecond;
    if (left_s * kSecond > kExpiryWarning) continue;
    out += "The certificate " + one.name +
           (left_s <= 0 ? " has expired. " : " expires in " + span_text(static_cast<std::uint64_t>(left_s)) + ". ");
  }
  return html_text(escape_for_terminal(out, 1000));
}

enum class StatusTable : std::uint8_t { backends, models, keys };

inline std::string status_rows(const std::vector<StatsRow>& rows, StatusTable table) {
  std::string out;
  const auto cell = [&out](std::string_view title, std::string_view text) {
    out.append("<td data-title=\"").append(title).append("\"><b>").append(text).append("</b></td>");
  };
  for (std::size_t i = 0; i < std::min(rows.size(), kMaxStatusRows); ++i) {
    const StatsRow& row = rows[i];
    out += "<tr><th scope=\"row\"><bdi>" + html_text(escape_for_terminal(row.name, 1024)) + "</bdi>";
    if (table == StatusTable::backends) out += state_cell(row);
    out += "</th>";
    if (table != StatusTable::models) cell("Pending", std::to_string(row.pending));
    cell("Requests", std::to_string(row.requests));
    cell("Errors", std::to_string(row.errors));
    cell("Tokens in", std::to_string(row.prompt_tokens));
    cell("Tokens out", std::to_string(row.completion_tokens));
    if (table == StatusTable::keys) cell("Mean wait", mean_wait_text(row));
    out += "</tr>\n";
  }
  return out;
}

inline std::string more_rows(const std::vector<StatsRow>& rows) {
  return rows.size() > kMaxStatusRows ? "and " + std::to_string(rows.size() - kMaxStatusRows) + " more" : "";
}

}  // namespace detail

inline void write_status_page(TextBuffer& page, const Stats& stats, std::string_view version) {
  static const FleetView kNone;
  const FleetView& fleet = stats.fleet == nullptr ? kNone : *stats.fleet;
  const std::string healthy = std::to_string(stats.healthy) + " of " + std::to_string(stats.registered);
  // By the name between `{{` and `}}` in status.html.
  const std::map<std::string_view, std::string> parts{
      {"style", std::string(kStatusStyle)},
      {"script", std::string(kStatusScript)},
      {"state", stats.healthy == 0                                      ? "down"
                : stats.healthy < stats.registered || stats.ejected > 0 ? "some"
                                                                        : "up"},
      {"title", "Nexus: " + healthy + " healthy" + ejected_text(stats.ejected)},
      {"fleet", healthy + " backends healthy" + ejected_text(stats.ejected)},
      {"loaded", detail::utc_text(static_cast<Ns>(fleet.last_reload_success_timestamp) * kSecond)},
      {"stalls", std::to_string(stats.loop_stalls)},
      {"notes", detail::notes_of(fleet)},
      {"no_failures", stats.failures.empty() ? "hidden" : ""},
      {"failures", detail::failure_rows(stats)},
      {"uptime", span_text(stats.uptime_s)},
      {"available", std::to_string(stats.models_available)},
      {"clients", std::to_string(stats.client_connections)},
      {"total", std::to_string(stats.all.requests)},
      {"success", std::to_string(stats.all.requests - stats.all.errors)},
      {"errors", std::to_string(stats.all.errors)},
      {"version", detail::html_text(version)},
      {"more_backends", detail::more_rows(stats.backends)},
      {"backends", detail::status_rows(stats.backends, detail::StatusTable::backends)},
      {"more_models", detail::more_rows(stats.models)},
      {"models", detail::status_rows(stats.models, detail::StatusTable::models)},
      {"no_keys", stats.keys.empty() ? "hidden" : ""},
      {"more_keys", detail::more_rows(stats.keys)},
      {"keys", detail::status_rows(stats.keys, detail::StatusTable::keys)},
  };
  std::string_view rest = kStatusPage;
  for (std::size_t open; (open = rest.find("{{")) != std::string_view::npos;) {
    const std::size_t close = rest.find("}}", open);
    page.add(rest.substr(0, open)).add(parts.at(rest.substr(open + 2, close - open - 2)));
    rest.remove_prefix(close + 2);
  }
  page += rest;
}

}  // namespace nexus
