// status_page.h
// Owns:     the page at /: its style, its frame, and the tables that are readable where scripts are off.
// Promises: one self-contained document; it needs nothing but itself, /v1/stats and /metrics; every name is text, its
//           invisible characters spelled out; without a script it is whole, with the numbers since the start.
// Leaves:   drawing it anew to status_script.h, what a browser may do to status_policy.h, sockets to worker.h.
// Threads:  one (control).
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "nexus/apps/format.h"
#include "nexus/apps/rates.h"
#include "nexus/apps/scrape.h"
#include "nexus/apps/status_script.h"

namespace nexus {

constexpr std::size_t kMaxStatusRows = 200;  // of each table, as in the script

inline constexpr std::string_view kStatusStyle = R"css(:root {
  color-scheme: light dark;
  --bg: #f4f6f8; --card: #fff; --ink: #16202b; --soft: #566373; --rule: #dde2e8;
  --line: #2a63d4; --fill: #2a63d41f; --ok: #146c43; --ok-bg: #d9f2e3; --warn: #7a4d00; --warn-bg: #fdedc8; --bad: #b3261e; --bad-bg: #fbe3e1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #0e141b; --card: #161e27; --ink: #e4eaf1; --soft: #95a3b3; --rule: #273240;
    --line: #78a9ff; --fill: #78a9ff26; --ok: #6fdc9b; --ok-bg: #123524; --warn: #f2c465; --warn-bg: #3d2f10; --bad: #ff8f87; --bad-bg: #43191a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 14px/1.4 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
body > * { max-width: 1360px; margin: 0 auto; padding: 0 20px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px; padding-top: 18px; }
h1 { margin: 0; font-size: 20px; letter-spacing: -.01em; }
h2 { margin: 26px 0 8px; font-size: 15px; }
small, .soft, dt, thead th, footer, h2 span { color: var(--soft); font-weight: 400; }
.state { padding: 1px 10px; border-radius: 10px; font-weight: 600; }
.up { color: var(--ok); background: var(--ok-bg); }
.some { color: var(--warn); background: var(--warn-bg); }
.down { color: var(--bad); background: var(--bad-bg); }
td.bad b, dd.bad b { color: var(--bad); }
#live { margin-left: auto; }
#live.late { color: var(--bad); }
dl { display: grid; grid-template-columns: repeat(8, 1fr); gap: 10px; margin: 14px 0 0; }
dl div, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
dl div { padding: 10px 12px; min-width: 0; }
dt { font-size: 12px; }
dd { margin: 0; }
dd b { font-size: 21px; font-weight: 600; white-space: nowrap; }
svg { display: block; width: 100%; height: 26px; margin-top: 4px; overflow: visible; }
td svg { height: 14px; margin-top: 1px; }
.area { fill: var(--fill); }
.edge { fill: none; stroke: var(--line); stroke-width: 1.5; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 7px 10px; text-align: right; vertical-align: top; font-weight: 400; }
thead th { font-size: 12px; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--rule); }
th:first-child { text-align: left; }
tbody th { min-width: 170px; max-width: 300px; overflow-wrap: anywhere; font-weight: 600; }
tbody th .state { margin-left: 8px; font-size: 12px; white-space: nowrap; }
td { width: 7.5%; min-width: 76px; white-space: nowrap; }
td b { font-weight: 500; }
footer { padding-top: 18px; padding-bottom: 24px; font-size: 12px; }
footer a { color: inherit; }
@media (max-width: 1000px) { dl { grid-template-columns: repeat(4, 1fr); } }
@media (max-width: 860px) {
  body > * { padding: 0 12px; }
  #live { margin-left: 0; width: 100%; }
  dl { grid-template-columns: repeat(2, 1fr); gap: 8px; }
  table, tbody, tbody th, td { display: block; }
  thead { display: none; }
  tbody tr { display: grid; grid-template-columns: repeat(4, 1fr); padding: 8px 10px 10px; gap: 6px 10px; }
  #backends tr { grid-template-columns: repeat(5, 1fr); }
  tbody tr:first-child { border-top: 0; }
  tbody th { grid-column: 1 / -1; padding: 0; max-width: none; }
  td { padding: 0; width: auto; min-width: 0; text-align: left; }
  td::before { content: attr(data-title); display: block; font-size: 11px; color: var(--soft); }
}
)css";

// A bar chart of three, in the colour of the lines.
inline constexpr std::string_view kStatusHead = R"html(<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Nexus</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath fill='%232a63d4' d='M1 9h4v6H1zM6 5h4v10H6zM11 1h4v14h-4z'/%3E%3C/svg%3E">
<noscript><meta http-equiv="refresh" content="10"></noscript>
<style>)html";

namespace detail {

inline void append_html(std::string& out, std::string_view text) {
  for (const char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      default: out += c;
    }
  }
}

struct StatusCell {
  std::string_view id, title, short_title;
  std::string text;
  bool bad = false;
};

// In the order of the script's METRICS.
inline std::vector<StatusCell> status_cells(const RateRow& row) {
  return {{"rate", "Requests/s", "Req/s", rate_text(row.requests_per_s)},
          {"errors", "Errors/s", "Err/s", rate_text(row.errors_per_s), row.errors_per_s > 0},
          {"pending", "Pending", "Pending", std::to_string(row.pending)},
          {"queue", "Queue", "Queue", std::to_string(row.queue_depth)},
          {"p50", "p50", "p50", seconds_text(row.p50_s)},
          {"p95", "p95", "p95", seconds_text(row.p95_s)},
          {"first", "First token", "First token", seconds_text(row.first_token_s)},
          {"tokens", "Tokens/s", "Tokens/s", rate_text(row.tokens_per_s)},
          {"sum", "", "Requests", std::to_string(row.requests)},
          {"failed", "", "Errors", std::to_string(row.errors)}};
}

// A model waits on no queue: that is a backend's.
inline bool is_shown(const StatusCell& cell, bool backends) {
  return backends || (cell.id != "pending" && cell.id != "queue");
}

inline void append_status_row(std::string& out, const RateRow& row, bool backends) {
  out += "<tr><th scope=\"row\"><bdi>";
  append_html(out, escape_for_terminal(row.name, 1024));
  out += "</bdi>";
  if (backends) {
    out += row.healthy ? "<span class=\"state up\">up</span>" : "<span class=\"state down\">down</span>";
  }
  out += "</th>";
  for (const StatusCell& cell : status_cells(row)) {
    if (!is_shown(cell, backends)) continue;
    out.append("<td data-title=\"").append(cell.short_title).append(cell.bad ? "\" class=\"bad\"><b>" : "\"><b>");
    append_html(out, cell.text);
    out += "</b></td>";
  }
  out += "</tr>\n";
}

inline void append_status_table(std::string& out, std::string_view title, std::string_view id,
                                const std::vector<RateRow>& rows, bool backends) {
  const std::string name(id);
  out.append("<h2>").append(title).append(" <span id=\"" + name + "_more\">");
  if (rows.size() > kMaxStatusRows) out += "and " + std::to_string(rows.size() - kMaxStatusRows) + " more";
  out.append("</span></h2>\n<div class=\"card\"><table><thead><tr><th scope=\"col\">Name</th>");
  for (const StatusCell& cell : status_cells(RateRow{})) {
    if (is_shown(cell, backends)) out.append("<th scope=\"col\">").append(cell.short_title).append("</th>");
  }
  out += "</tr></thead>\n<tbody id=\"" + name + "\">\n";
  for (std::size_t i = 0; i < std::min(rows.size(), kMaxStatusRows); ++i) append_status_row(out, rows[i], backends);
  out += "</tbody></table></div>\n";
}

inline void append_status_header(std::string& out, const Rates& board, std::string_view version) {
  const auto number = [&](std::string_view id, std::uint64_t value) {
    out.append("<span id=\"").append(id).append("\">").append(Digits(value).view()).append("</span>");
  };
  const std::uint64_t healthy = board.backends_healthy;
  out += "<header><h1>Nexus</h1>\n<span id=\"state\" class=\"state ";
  out += healthy == 0 ? "down" : healthy < board.backends ? "some" : "up";
  out += "\">" + std::to_string(healthy) + " of " + std::to_string(board.backends) + " backends healthy</span>\n";
  out += "<span class=\"soft\">up <span id=\"uptime\">" + span_text(board.uptime_s) + "</span></span>\n<span>";
  number("model_count", board.models_available);
  out += " <small>models</small></span>\n<span>";
  number("clients", static_cast<std::uint64_t>(std::max<std::int64_t>(board.client_connections, 0)));
  out += " <small>clients</small></span>\n<span>";
  number("total", board.all.requests);
  out += " <small>requests:</small> ";
  number("success", board.success);
  out += " <small>good,</small> ";
  number("errors", board.all.errors);
  out += " <small>errors</small></span>\n<small>version ";
  append_html(out, version);
  out += "</small>\n<span id=\"live\" class=\"soft\"></span></header>\n";
}

inline void append_status_tiles(std::string& out, const Rates& board) {
  out += "<dl>";
  for (const StatusCell& cell : status_cells(board.all)) {
    if (cell.title.empty()) continue;
    out.append("<div><dt>").append(cell.title).append("</dt><dd id=\"all_").append(cell.id);
    out += cell.bad ? "\" class=\"bad\"><b>" : "\"><b>";
    append_html(out, cell.text);
    out += "</b></dd></div>\n";
  }
  out += "</dl>\n";
}

}  // namespace detail

inline std::string status_page(const Rates& board, std::string_view version) {
  std::string out(kStatusHead);
  out.append(kStatusStyle).append("</style>\n</head>\n<body>\n");
  detail::append_status_header(out, board, version);
  out += "<section>";
  detail::append_status_tiles(out, board);
  detail::append_status_table(out, "Backends", "backends", board.by_backend, true);
  detail::append_status_table(out, "Models", "models", board.by_model, false);
  out += "</section>\n<footer>Rates and quantiles <span id=\"span\">since the start</span>. ";
  out +=
      "<a href=\"v1/stats\">/v1/stats</a> <a href=\"metrics\">/metrics</a> <a href=\"health\">/health</a></footer>\n";
  out.append("<script>").append(kStatusScript).append("</script>\n</body>\n</html>\n");
  return out;
}

// The page of what the two others say, so that the three never tell different things. Nothing where memory is short:
// pages of our own have no other reason not to be read.
inline std::optional<std::string> render_status(std::string_view stats, std::string_view metrics,
                                                std::string_view version) {
  ScrapeReader reader;
  Scrape sample;
  if (!reader.read(stats, metrics, 0, sample)) return std::nullopt;
  return status_page(compute_rates(start_of(sample), sample), version);
}

}  // namespace nexus
