// top.h
// Owns:     `nexus top`: the text drawn from a running Nexus, and the terminal that it is drawn on.
// Promises: top_page() depends on its arguments alone; no name from the server reaches the terminal unescaped; the
// terminal is
//           restored at the end, also after a signal; without a terminal one page is printed.
// Leaves:   numbers to scrape.h, fetching to probe_loop.h.
// Threads:  the main thread's.
// Tested by: tests/top_test.cpp, tests/e2e/top.test.mjs
#pragma once

#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "nexus/apps/format.h"
#include "nexus/apps/probe_loop.h"
#include "nexus/apps/scrape.h"
#include "nexus/base/limits.h"

namespace nexus {

constexpr Ns kTopInterval = 2 * kSecond;
constexpr Ns kTopWindow = 10 * kSecond;  // of rates and quantiles
constexpr Ns kTopFetchTime = 2 * kSecond;

// The user's choice of what to see. `width` and `height` are those of the screen, or 0.
struct TopView {
  std::size_t width = 0, height = 0;
  std::size_t order = 0;     // of detail::kTopOrders
  std::size_t scrolled = 0;  // lines
};

namespace detail {

inline std::string first_token_text(const std::optional<double>& seconds) { return seconds_text(seconds, ">10 min"); }

// The parts on as few lines as fit; 0 means no limit.
inline std::string in_lines(const std::vector<std::string>& parts, std::size_t width) {
  std::string out;
  std::size_t used = 0;
  for (const std::string& part : parts) {
    const std::size_t bytes = width_of(part);
    if (used > 0) {
      const bool fits = width == 0 || used + 3 + bytes <= width;
      out += fits ? "   " : "\n";
      used = fits ? used + 3 : 0;
    }
    out += part;
    used += bytes;
  }
  return out + "\n";
}

// Three lines: what is there; how much is done; and where the time goes: to the models, the queue, or Nexus itself.
inline std::string top_head(const Rates& rates, std::string_view where, std::size_t width) {
  const RateRow& all = rates.all;
  const ScrapedFleet& fleet = rates.fleet;
  const auto count = [](std::string_view what, std::int64_t number) {
    return std::string(what) + " " + std::to_string(number);
  };
  std::string out = "nexus at " + escape_for_terminal(where, 128) + ", up " + span_text(fleet.uptime_s) + "; last " +
                    with_decimals(rates.seconds, 0) + " s:\n";
  out += in_lines(
      {"backends " + std::to_string(fleet.backends_healthy) + " of " + std::to_string(fleet.backends) + " healthy" +
           ejected_text(fleet.backends_ejected),
       count("models", fleet.models_available), count("connections", fleet.client_connections),
       "requests " + std::to_string(all.now.requests),
       "errors " + std::to_string(all.now.errors) + " (" + percent_text(all.now.errors, all.now.requests) + ")"},
      width);
  out += in_lines(
      {rate_text(all.requests_per_s) + " req/s", rate_text(all.errors_per_s) + " err/s",
       count("pending", all.now.pending), count("queue", all.now.queue_depth), rate_text(all.tokens_per_s) + " tok/s"},
      width);
  out += in_lines({"p95: requests " + seconds_text(all.p95_s), "first token " + first_token_text(all.first_token_p95_s),
                   "queue " + seconds_text(all.queue_p95_s), "nexus itself " + seconds_text(all.overhead_p95_s)},
                  width);
  return out;
}

enum TopTable : unsigned { of_backends = 1, of_models = 2, of_keys = 4, of_all = 7 };

struct TopColumn {
  std::string_view title;
  unsigned tables;  // that have it
  unsigned spared;  // on a narrow screen the columns with the highest number are left out first; 0: never
  std::string (*text)(const RateRow& row);
};

// `DOWN 3m 5s`, `ejected 12s`: for how long, or for how much longer.
inline std::string top_state(const ScrapedEntry& now) {
  if (now.state.empty())
    return state_text(now.healthy, "DOWN", escape_for_terminal(now.ejected_why), now.ejected_seconds);
  if (now.state == "ejected") return "ejected " + span_text(now.ejected_seconds);
  if (now.state == "up") return "up";
  return (now.state == "down" ? "DOWN" : escape_for_terminal(now.state, 12)) + " " + span_text(now.state_seconds);
}

constexpr std::array kTopColumns = std::to_array<TopColumn>({
    {"STATE", of_backends, 0, [](const RateRow& row) { return top_state(row.now); }},
    {"PENDING", of_backends | of_keys, 0, [](const RateRow& row) { return std::to_string(row.now.pending); }},
    {"QUEUE", of_backends, 2, [](const RateRow& row) { return std::to_string(row.now.queue_depth); }},
    {"REQ/S", of_all, 0, [](const RateRow& row) { return rate_text(row.requests_per_s); }},
    {"ERR/S", of_all, 0, [](const RateRow& row) { return rate_text(row.errors_per_s); }},
    {"P50", of_backends | of_models, 5, [](const RateRow& row) { return seconds_text(row.p50_s); }},
    {"P95", of_backends | of_models, 0, [](const RateRow& row) { return seconds_text(row.p95_s); }},
    {"FIRST", of_backends | of_models, 3, [](const RateRow& row) { return first_token_text(row.first_token_s); }},
    {"WAIT", of_keys, 0, [](const RateRow& row) { return seconds_text(row.wait_s); }},
    {"TOK/S", of_all, 4, [](const RateRow& row) { return rate_text(row.tokens_per_s); }},
    {"REQUESTS", of_all, 6, [](const RateRow& row) { return std::to_string(row.now.requests); }},
    {"ERRORS", of_all, 7, [](const RateRow& row) { return std::to_string(row.now.errors); }},
    {"TOKENS", of_keys, 1,
     [](const RateRow& row) { return std::to_string(row.now.prompt_tokens + row.now.completion_tokens); }},
});

// The orders of the rows, which the user goes through: as /v1/stats lists them, or the largest first.
struct TopOrder {
  std::string_view name;
  double (*key)(const RateRow& row);
};
inline constexpr auto kTopOrders = std::to_array<TopOrder>({
    {"as listed", nullptr},
    {"req/s", [](const RateRow& row) { return row.requests_per_s; }},
    {"err/s", [](const RateRow& row) { return row.errors_per_s; }},
    {"pending", [](const RateRow& row) { return static_cast<double>(row.now.pending); }},
    {"p95", [](const RateRow& row) { return row.p95_s.value_or(-1); }},
});

inline std::vector<RateRow> in_order(std::vector<RateRow> rows, const TopOrder& order) {
  if (order.key == nullptr) return rows;
  std::stable_sort(rows.begin(), rows.end(),
                   [&](const RateRow& a, const RateRow& b) { return order.key(a) > order.key(b); });
  return rows;
}

// A table with names of at most `name_bytes`, without the columns that are spared from `spared` on.
inline std::string top_table_of(const std::vector<RateRow>& rates, TopTable table, std::string_view name,
                                std::size_t name_bytes, unsigned spared) {
  std::vector<std::vector<std::string>> rows{{std::string(name)}};
  for (const RateRow& row : rates) rows.push_back({escape_for_terminal(row.now.name, name_bytes)});
  std::string alignment = "l";
  for (const TopColumn& column : kTopColumns) {
    if ((column.tables & table) == 0 || column.spared >= spared) continue;
    alignment += column.title == "STATE" ? 'l' : 'r';
    rows[0].emplace_back(column.title);
    for (std::size_t i = 0; i < rates.size(); ++i) rows[i + 1].push_back(column.text(rates[i]));
  }
  return in_columns(rows, alignment);
}

// The table as it fits: names shrink first, then columns are left out. Below a backend that is not up, why.
inline std::string top_table(const std::vector<RateRow>& rates, TopTable table, std::string_view name,
                             std::size_t width) {
  std::string text;
  const auto fits = [&](std::size_t name_bytes, unsigned spared) {
    text = top_table_of(rates, table, name, name_bytes, spared);
    std::size_t widest = 0;
    for (std::string_view rest = text; !rest.empty(); rest.remove_prefix(rest.find('\n') + 1))
      widest = std::max(widest, width_of(rest.substr(0, rest.find('\n'))));
    return width == 0 || widest <= width;
  };
  bool done = false;
  for (std::size_t name_bytes = 48; !done && name_bytes >= 12; name_bytes -= 4) done = fits(name_bytes, 8);
  for (unsigned spared = 7; !done && spared > 0; --spared) done = fits(12, spared);
  std::string out = text.substr(0, text.find('\n') + 1);
  std::string_view rest = std::string_view(text).substr(out.size());
  for (const RateRow& row : rates) {
    const std::size_t bytes = rest.find('\n') + 1;
    out += rest.substr(0, bytes);
    rest.remove_prefix(bytes);
    if (!row.now.why.empty()) out += "  " + escape_for_terminal(row.now.why, 200) + "\n";
  }
  return out;
}

// Cuts the text to the screen, whose first `fixed` lines stay while the others are scrolled, at most to the last line.
inline std::string fit(std::string_view text, TopView& view, std::size_t fixed = 0) {
  const auto [width, height] = std::pair(view.width, view.height);
  std::vector<std::string_view> lines;
  for (; !text.empty(); text.remove_prefix(lines.back().size() + 1)) lines.push_back(text.substr(0, text.find('\n')));
  if (height > 0 && lines.size() > height && fixed + 1 < height) {
    const std::size_t most = lines.size() - (height - 1);  // then the last line is seen
    const auto from = lines.begin() + static_cast<std::ptrdiff_t>(fixed);
    view.scrolled = std::min(view.scrolled, most);
    lines.erase(from, from + static_cast<std::ptrdiff_t>(view.scrolled));
  }
  const std::size_t shown = height > 0 && lines.size() > height ? height - 1 : lines.size();
  std::string out;
  for (std::size_t i = 0; i < shown; ++i) out.append(width > 0 ? cut_to_width(lines[i], width) : lines[i]) += '\n';
  return shown == lines.size() ? out : out + "\xe2\x80\xa6 " + std::to_string(lines.size() - shown) + " more lines\n";
}

}  // namespace detail

// The whole page.
inline std::string top_page(const Rates& rates, std::string_view where, TopView& view) {
  const detail::TopOrder& order = detail::kTopOrders[view.order];
  const auto table = [&](const std::vector<RateRow>& rows, detail::TopTable which, std::string_view name) {
    return "\n" + detail::top_table(detail::in_order(rows, order), which, name, view.width);
  };
  std::string page = detail::top_head(rates, where, view.width);
  if (view.height > 0) page += "sorted " + std::string(order.name) + " (s: sort, j and k: scroll, q: quit)\n";
  const auto fixed = static_cast<std::size_t>(std::count(page.begin(), page.end(), '\n'));
  page += table(rates.by_backend, detail::of_backends, "BACKEND") + table(rates.by_model, detail::of_models, "MODEL");
  if (!rates.by_key.empty()) page += table(rates.by_key, detail::of_keys, "KEY");
  return detail::fit(page, view, fixed);
}

// Puts the terminal into raw input and its alternate screen until destroyed.
class Terminal {
 public:
  Terminal() {
    sigemptyset(&signals_);
    for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGWINCH}) sigaddset(&signals_, signal);
    pthread_sigmask(SIG_BLOCK, &signals_, &before_signals_);
    signal_fd_ = ::signalfd(-1, &signals_, SFD_CLOEXEC | SFD_NONBLOCK);
    has_input_ = ::tcgetattr(STDIN_FILENO, &before_) == 0;
    if (has_input_) {
      termios raw = before_;
      raw.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
      raw.c_cc[VMIN] = 0;
      raw.c_cc[VTIME] = 0;
      raw.c_cc[VSUSP] = _POSIX_VDISABLE;  // Ctrl-Z would leave the alternate screen behind
      ::tcsetattr(STDIN_FILENO, TCSANOW, &raw);
    }
    put("\x1b[?1049h\x1b[?25l\x1b[2J");  // the alternate screen, without a cursor
  }
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;
  ~Terminal() {
    put("\x1b[?25h\x1b[?1049l");
    if (has_input_) ::tcsetattr(STDIN_FILENO, TCSANOW, &before_);
    if (signal_fd_ >= 0) ::close(signal_fd_);
    pthread_sigmask(SIG_SETMASK, &before_signals_, nullptr);
  }

  // Columns and lines.
  std::pair<std::size_t, std::size_t> size() const {
    winsize size{};
    if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0 || size.ws_row == 0) return {80, 24};
    return {size.ws_col, size.ws_row};
  }

  // Overwrites the last page: clearing the screen first would flicker.
  void draw(std::string_view page) {
    std::string out = "\x1b[H";
    for (const char c : page.substr(0, page.size() - 1)) {  // the last line must not scroll
      if (c == '\n') out += "\x1b[K\r";
      out += c;
    }
    put(out + "\x1b[J");
  }

  enum class Wish : std::uint8_t { none, quit, sort, down, up };

  // Waits until `deadline`, until the screen is resized, or until the user wishes something.
  Wish wait(Ns deadline) {
    for (;;) {
      const Ns left = deadline - monotonic_now();
      if (left <= 0) return Wish::none;
      std::array<pollfd, 2> entries{pollfd{signal_fd_, POLLIN, 0}, pollfd{has_input_ ? STDIN_FILENO : -1, POLLIN, 0}};
      if (::poll(entries.data(), entries.size(), static_cast<int>(left / kMillisecond) + 1) <= 0) continue;
      if (entries[0].revents != 0) {
        signalfd_siginfo info{};
        if (::read(signal_fd_, &info, sizeof info) != sizeof info) continue;
        return info.ssi_signo == SIGWINCH ? Wish::none : Wish::quit;
      }
      std::array<char, 64> keys;
      const ssize_t count = ::read(STDIN_FILENO, keys.data(), keys.size());
      if (count <= 0) return Wish::quit;  // the terminal is gone
      const std::string_view typed(keys.data(), static_cast<std::size_t>(count));
      if (typed.find_first_of("qQ\x03\x04") != std::string_view::npos) return Wish::quit;
      if (typed == "j" || typed == "\x1b[B") return Wish::down;
      if (typed == "k" || typed == "\x1b[A") return Wish::up;
      if (typed == "s") return Wish::sort;
    }
  }

 private:
  static void put(std::string_view text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  }

  sigset_t signals_{};
  sigset_t before_signals_{};
  int signal_fd_ = -1;
  termios before_{};
  bool has_input_ = false;
};

class Top {
 public:
  Top(BackendSettings server, std::string url)
      : server_(std::move(server)),
        url_(std::move(url)),
        loop_(
            [this](std::uint64_t, const std::vector<Address>& addresses, std::string error) {
              addresses_ = addresses;
              resolve_error_ = std::move(error);
            },
            [this](ProbeResult&& result) { result_ = std::move(result); }) {}

  // Runs the command and returns its exit status.
  int run() {
    std::string why = resolve();
    if (why.empty() && ::isatty(STDOUT_FILENO) == 1) {
      watch();
      return 0;
    }
    if (why.empty()) why = sample();
    if (why.empty()) {
      ::poll(nullptr, 0, 1000);
      why = sample();
    }
    if (!why.empty()) {
      std::fprintf(stderr, "nexus: %s: %s\n", url_.c_str(), escape_for_terminal(why, 200).c_str());
      return 1;
    }
    TopView all;
    std::fputs(page(all).c_str(), stdout);
    return 0;
  }

 private:
  // Draws a page every kTopInterval until the user quits.
  void watch() {
    Terminal terminal;
    std::string why;
    TopView view;
    Ns next = 0;
    for (Terminal::Wish wish{}; wish != Terminal::Wish::quit; wish = terminal.wait(next)) {
      follow(wish, view);
      if (monotonic_now() >= next) {
        why = sample();
        next = monotonic_now() + kTopInterval;
      }
      std::tie(view.width, view.height) = terminal.size();
      terminal.draw(why.empty() ? page(view)
                                : detail::fit(url_ + ": " + escape_for_terminal(why, 200) + "\n\nq quits\n", view));
    }
  }

  static void follow(Terminal::Wish wish, TopView& view) {
    if (wish == Terminal::Wish::sort) view.order = (view.order + 1) % detail::kTopOrders.size();
    if (wish == Terminal::Wish::up && view.scrolled > 0) view.scrolled -= 1;
    if (wish == Terminal::Wish::down) view.scrolled += 1;
  }

  // Finds the address. Returns the reason of a failure, or an empty text.
  std::string resolve() {
    if (const int error = loop_.open()) return std::string("epoll: ") + strerror(error);
    loop_.lookup(server_.address, 0);
    while (!resolve_error_) loop_.turn();
    return !addresses_.empty() ? "" : "DNS lookup failed for " + server_.address.host + ": " + *resolve_error_;
  }

  // Fetches a page. Returns the reason of a failure, or an empty text.
  std::string fetch(const std::string& path, std::string& page) {
    ProbeOrder order = order_of(server_, addresses_, 0, kTopFetchTime);
    order.page = path;
    order.wants_models = false;
    order.max_bytes = kMaxTopPageBytes;
    result_.reset();
    loop_.start(order);
    while (!result_) loop_.turn();
    if (result_->status == 401) return "an API key is required: set NEXUS_API_KEY";
    if (result_->status == 403) return "the API key may not read the metrics: it needs admin=1 in api_keys_file";
    if (result_->status == 404)
      return path + " is not served here (404): where metrics_listen is set, give its address to nexus top";
    if (!result_->passed) return (result_->status == 0 ? "" : path + ": ") + result_->reason;
    page = std::move(result_->page);
    return {};
  }

  // Takes a sample. Returns the reason of a failure, or an empty text.
  std::string sample() {
    std::string stats, metrics;
    std::string why = fetch("/v1/stats", stats);
    if (why.empty()) why = fetch("/metrics", metrics);
    if (!why.empty()) return why;
    std::optional<Scrape> now = read_scrape(stats, metrics, monotonic_now());
    if (!now) return "the response does not come from Nexus";
    samples_.push_back(*std::move(now));
    while (samples_.size() > 2 && samples_[1].at_ns <= samples_.back().at_ns - kTopWindow) samples_.pop_front();
    return {};
  }

  std::string page(TopView& view) const {
    const Scrape& last = samples_.back();
    const Scrape first = samples_.size() > 1 ? samples_.front() : start_of(last);
    return top_page(compute_rates(first, last), url_, view);
  }

  const BackendSettings server_;
  const std::string url_;
  ProbeLoop loop_;
  std::vector<Address> addresses_;
  std::optional<std::string> resolve_error_;  // of resolve(); empty if there are addresses
  std::optional<ProbeResult> result_;         // of fetch()
  std::deque<Scrape> samples_;                // of the last kTopWindow, oldest first
};

}  // namespace nexus
