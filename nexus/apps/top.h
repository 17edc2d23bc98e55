// top.h
// Owns:     `nexus top`: the text drawn from a running Nexus, and the terminal that it is drawn on.
// Promises: top_page() is a pure function; no name from the server reaches the terminal unescaped; the terminal is
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

#include <array>
#include <cstdio>
#include <deque>
#include <optional>
#include <string>
#include <string_view>

#include "nexus/apps/format.h"
#include "nexus/apps/probe_loop.h"
#include "nexus/apps/scrape.h"
#include "nexus/base/limits.h"

namespace nexus {

constexpr Ns kTopInterval = 2 * kSecond;
constexpr Ns kTopWindow = 10 * kSecond;  // of rates and quantiles
constexpr Ns kTopFetchTime = 2 * kSecond;

namespace detail {

inline std::string first_token_text(const std::optional<double>& seconds) { return seconds_text(seconds, ">10 min"); }

inline std::string top_head(const Rates& rates, std::string_view where) {
  const RateRow& all = rates.all;
  std::string out = "nexus at " + escape_for_terminal(where, 128) + ", up " + span_text(rates.fleet.uptime_s) +
                    "; rates and quantiles of the last " + with_decimals(rates.seconds, 0) + " s\n";
  out += "backends " + std::to_string(rates.fleet.backends_healthy) + " of " + std::to_string(rates.fleet.backends) +
         " healthy" + ejected_text(rates.fleet.backends_ejected) + "   models " +
         std::to_string(rates.fleet.models_available) + "   connections " +
         std::to_string(rates.fleet.client_connections) + "   requests " + std::to_string(all.now.requests) +
         "   errors " + std::to_string(all.now.errors) + " (" + percent_text(all.now.errors, all.now.requests) + ")\n";
  out += rate_text(all.requests_per_s) + " req/s   " + rate_text(all.errors_per_s) + " err/s   pending " +
         std::to_string(all.now.pending) + "   queue " + std::to_string(all.now.queue_depth) + "   p50 " +
         seconds_text(all.p50_s) + "   p95 " + seconds_text(all.p95_s) + "   first token " +
         first_token_text(all.first_token_s) + "   " + rate_text(all.tokens_per_s) + " tok/s\n";
  return out;
}

enum TopTable : unsigned { of_backends = 1, of_models = 2, of_keys = 4, of_all = 7 };

struct TopColumn {
  std::string_view title;
  unsigned tables;  // that have it
  std::string (*text)(const RateRow& row);
};

constexpr std::array kTopColumns = std::to_array<TopColumn>({
    {"STATE", of_backends,
     [](const RateRow& row) {
       return state_text(row.now.healthy, "DOWN", escape_for_terminal(row.now.ejected_why), row.now.ejected_seconds);
     }},
    {"PENDING", of_backends | of_keys, [](const RateRow& row) { return std::to_string(row.now.pending); }},
    {"QUEUE", of_backends, [](const RateRow& row) { return std::to_string(row.now.queue_depth); }},
    {"REQ/S", of_all, [](const RateRow& row) { return rate_text(row.requests_per_s); }},
    {"ERR/S", of_all, [](const RateRow& row) { return rate_text(row.errors_per_s); }},
    {"P50", of_backends | of_models, [](const RateRow& row) { return seconds_text(row.p50_s); }},
    {"P95", of_backends | of_models, [](const RateRow& row) { return seconds_text(row.p95_s); }},
    {"FIRST", of_backends | of_models, [](const RateRow& row) { return first_token_text(row.first_token_s); }},
    {"WAIT", of_keys, [](const RateRow& row) { return seconds_text(row.wait_s); }},
    {"TOK/S", of_all, [](const RateRow& row) { return rate_text(row.tokens_per_s); }},
    {"REQUESTS", of_all, [](const RateRow& row) { return std::to_string(row.now.requests); }},
    {"ERRORS", of_all, [](const RateRow& row) { return std::to_string(row.now.errors); }},
    {"TOKENS", of_keys,
     [](const RateRow& row) { return std::to_string(row.now.prompt_tokens + row.now.completion_tokens); }},
});

inline std::string top_table(const std::vector<RateRow>& rates, TopTable table, std::string name) {
  std::vector<std::vector<std::string>> rows{{std::move(name)}};
  for (const RateRow& row : rates) rows.push_back({escape_for_terminal(row.now.name, 48)});
  std::string alignment = "l";
  for (const TopColumn& column : kTopColumns) {
    if ((column.tables & table) == 0) continue;
    alignment += column.title == "STATE" ? 'l' : 'r';
    rows[0].emplace_back(column.title);
    for (std::size_t i = 0; i < rates.size(); ++i) rows[i + 1].push_back(column.text(rates[i]));
  }
  return in_columns(rows, alignment);
}

// Cuts the text to a screen; 0 means no limit.
inline std::string fit(std::string_view text, std::size_t width, std::size_t height) {
  const auto lines = static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
  const std::size_t shown = height > 0 && lines > height ? height - 1 : lines;
  std::string out;
  for (std::size_t i = 0; i < shown; ++i) {
    const std::string_view line = text.substr(0, text.find('\n'));
    out.append(width > 0 ? cut_to_width(line, width) : line) += '\n';
    text.remove_prefix(line.size() + 1);
  }
  return shown == lines ? out : out + "\xe2\x80\xa6 " + std::to_string(lines - shown) + " more lines\n";
}

}  // namespace detail

// The whole page. `width` and `height` are those of the screen, or 0.
inline std::string top_page(const Rates& rates, std::string_view where, std::size_t width, std::size_t height) {
  std::string page = detail::top_head(rates, where) + "\n" +
                     detail::top_table(rates.by_backend, detail::of_backends, "BACKEND") + "\n" +
                     detail::top_table(rates.by_model, detail::of_models, "MODEL");
  if (!rates.by_key.empty()) page += "\n" + detail::top_table(rates.by_key, detail::of_keys, "KEY");
  return detail::fit(page, width, height);
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

  // Waits until `deadline`, or until the screen is resized. False if the user quits.
  bool wait(Ns deadline) {
    for (;;) {
      const Ns left = deadline - monotonic_now();
      if (left <= 0) return true;
      std::array<pollfd, 2> entries{pollfd{signal_fd_, POLLIN, 0}, pollfd{has_input_ ? STDIN_FILENO : -1, POLLIN, 0}};
      if (::poll(entries.data(), entries.size(), static_cast<int>(left / kMillisecond) + 1) <= 0) continue;
      if (entries[0].revents != 0) {
        signalfd_siginfo info{};
        if (::read(signal_fd_, &info, sizeof info) != sizeof info) continue;
        return info.ssi_signo == SIGWINCH;
      }
      std::array<char, 64> keys;
      const ssize_t count = ::read(STDIN_FILENO, keys.data(), keys.size());
      if (count <= 0) return false;  // the terminal is gone
      const std::string_view typed(keys.data(), static_cast<std::size_t>(count));
      if (typed.find_first_of("qQ\x03\x04") != std::string_view::npos) return false;
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
    std::fputs(page(0, 0).c_str(), stdout);
    return 0;
  }

 private:
  // Draws a page every kTopInterval until the user quits.
  void watch() {
    Terminal terminal;
    std::string why;
    Ns next = 0;
    do {
      if (monotonic_now() >= next) {
        why = sample();
        next = monotonic_now() + kTopInterval;
      }
      const auto [width, height] = terminal.size();
      terminal.draw(why.empty()
                        ? page(width, height)
                        : detail::fit(url_ + ": " + escape_for_terminal(why, 200) + "\n\nq quits\n", width, height));
    } while (terminal.wait(next));
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

  std::string page(std::size_t width, std::size_t height) const {
    const Scrape& last = samples_.back();
    const Scrape first = samples_.size() > 1 ? samples_.front() : start_of(last);
    return top_page(compute_rates(first, last), url_, width, height);
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
