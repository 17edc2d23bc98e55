// top.h
// Owns:     `nexus top`: the text drawn from a running Nexus, and the terminal that it is drawn on.
// Promises: top_page() is a pure function; no name from the server reaches the terminal unescaped; the terminal is
//           restored at the end, also after a signal; without a terminal one page is printed.
// Leaves:   numbers to rates.h, fetching to page_client.h.
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
#include "nexus/apps/page_client.h"
#include "nexus/apps/rates.h"
#include "nexus/apps/scrape.h"
#include "nexus/fleet/registry.h"

namespace nexus {

constexpr Ns kTopInterval = 2 * kSecond;
constexpr Ns kTopWindow = 10 * kSecond;  // of rates and quantiles
constexpr Ns kTopFetchTime = 2 * kSecond;

namespace detail {

inline std::string top_head(const Rates& rates, std::string_view where) {
  const RateRow& all = rates.all;
  std::string out = "nexus at " + escape_for_terminal(where, 128) + ", up " + span_text(rates.fleet.uptime_s) +
                    "; rates and quantiles of the last " + with_decimals(rates.seconds, 0) + " s\n";
  out += "backends " + std::to_string(rates.fleet.backends_healthy) + " of " + std::to_string(rates.fleet.backends) +
         " healthy   models " + std::to_string(rates.fleet.models_available) + "   clients " +
         std::to_string(rates.fleet.client_connections) + "   requests " + std::to_string(all.now.requests) +
         "   errors " + std::to_string(all.now.errors) + " (" + percent_text(all.now.errors, all.now.requests) + ")\n";
  out += rate_text(all.requests_per_s) + " req/s   " + rate_text(all.errors_per_s) + " err/s   pending " +
         std::to_string(all.now.pending) + "   queue " + std::to_string(all.now.queue_depth) + "   p50 " +
         seconds_text(all.p50_s) + "   p95 " + seconds_text(all.p95_s) + "   first token " +
         seconds_text(all.first_token_s) + "   " + rate_text(all.tokens_per_s) + " tok/s\n";
  return out;
}

inline std::string top_table(const std::vector<RateRow>& rates, bool backends) {
  std::vector<std::vector<std::string>> rows;
  const auto add = [&](std::string name, const std::vector<std::string>& state, const std::vector<std::string>& cells) {
    std::vector<std::string>& row = rows.emplace_back();
    row.push_back(std::move(name));
    if (backends) row.insert(row.end(), state.begin(), state.end());
    row.insert(row.end(), cells.begin(), cells.end());
  };
  add(backends ? "BACKEND" : "MODEL", {"STATE", "PENDING", "QUEUE"},
      {"REQ/S", "ERR/S", "P50", "P95", "FIRST", "TOK/S", "REQUESTS", "ERRORS"});
  for (const RateRow& row : rates) {
    add(escape_for_terminal(row.now.name, 48),
        {row.now.healthy ? "up" : "DOWN", std::to_string(row.now.pending), std::to_string(row.now.queue_depth)},
        {rate_text(row.requests_per_s), rate_text(row.errors_per_s), seconds_text(row.p50_s), seconds_text(row.p95_s),
         seconds_text(row.first_token_s), rate_text(row.tokens_per_s), std::to_string(row.now.requests),
         std::to_string(row.now.errors)});
  }
  return in_columns(rows, backends ? "llrrrrrrrrrr" : "lrrrrrrrr");
}

// Cuts the text to a screen; 0 means no limit.
inline std::string fit(const std::string& text, std::size_t width, std::size_t height) {
  std::string out;
  std::size_t lines = 0;
  const auto total = static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = text.find('\n', at);
    if (height > 0 && lines + 1 == height && total > height) {
      return out + "\xe2\x80\xa6 " + std::to_string(total - lines) + " more lines\n";
    }
    const std::string_view line(text.data() + at, end - at);
    out.append(width > 0 ? cut_to_width(line, width) : line).append("\n");
    lines += 1;
    at = end + 1;
  }
  return out;
}

}  // namespace detail

// The whole page. `width` and `height` are those of the screen, or 0.
inline std::string top_page(const Rates& rates, std::string_view where, std::size_t width, std::size_t height) {
  return detail::fit(detail::top_head(rates, where) + "\n" + detail::top_table(rates.by_backend, true) + "\n" +
                         detail::top_table(rates.by_model, false),
                     width, height);
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
  void draw(const std::string& page) {
    std::string out = "\x1b[H";
    for (std::size_t at = 0; at < page.size();) {
      const std::size_t end = std::min(page.find('\n', at), page.size());
      const bool last = end + 1 >= page.size();
      out.append(page, at, end - at).append(last ? "\x1b[K" : "\x1b[K\r\n");  // the last line must not scroll
      at = end + 1;
    }
    put(out + "\x1b[J");
  }

  enum class Woke : std::uint8_t { time, resized, quit };

  Woke wait(Ns deadline) {
    for (;;) {
      const Ns left = deadline - monotonic_now();
      if (left <= 0) return Woke::time;
      std::array<pollfd, 2> entries{pollfd{signal_fd_, POLLIN, 0}, pollfd{has_input_ ? STDIN_FILENO : -1, POLLIN, 0}};
      if (::poll(entries.data(), entries.size(), static_cast<int>(left / kMillisecond) + 1) <= 0) continue;
      if (entries[0].revents != 0) {
        signalfd_siginfo info{};
        if (::read(signal_fd_, &info, sizeof info) != sizeof info) continue;
        return info.ssi_signo == SIGWINCH ? Woke::resized : Woke::quit;
      }
      std::array<char, 64> keys;
      const ssize_t count = ::read(STDIN_FILENO, keys.data(), keys.size());
      if (count <= 0) return Woke::quit;  // the terminal is gone
      const std::string_view typed(keys.data(), static_cast<std::size_t>(count));
      if (typed.find_first_of("qQ\x03\x04") != std::string_view::npos) return Woke::quit;
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
  Top(PageClient& client, std::string where) : client_(client), where_(std::move(where)) {}

  // One page from two samples a second apart. Returns the reason of a failure, or an empty text.
  std::string once(std::string& page) {
    Scrape first, second;
    if (std::string why = take(first); !why.empty()) return why;
    ::poll(nullptr, 0, 1000);
    if (std::string why = take(second); !why.empty()) return why;
    page = top_page(compute_rates(first, second), where_, 0, 0);
    return {};
  }

  // Draws a page every kTopInterval until the user quits.
  void run() {
    Terminal terminal;
    std::string why = step();
    Ns next = monotonic_now() + kTopInterval;
    for (;;) {
      const auto [width, height] = terminal.size();
      terminal.draw(page(why, width, height));
      switch (terminal.wait(next)) {
        case Terminal::Woke::quit: return;
        case Terminal::Woke::resized: break;
        case Terminal::Woke::time:
          why = step();
          next = monotonic_now() + kTopInterval;
          break;
      }
    }
  }

 private:
  // Fetches one page. Returns the reason of a failure, or an empty text.
  std::string fetch(const std::string& path, std::string& body) {
    FetchedPage page = client_.get(path, kTopFetchTime);
    if (page.status == 0) return page.why;
    if (page.status == 401) return "an API key is required: set NEXUS_API_KEY";
    if (page.status != 200) return path + " returned " + std::to_string(page.status);
    body = std::move(page.body);
    return {};
  }

  std::string take(Scrape& sample) {
    std::string stats, metrics;
    if (std::string why = fetch("/v1/stats", stats); !why.empty()) return why;
    if (std::string why = fetch("/metrics", metrics); !why.empty()) return why;
    const bool read = reader_.read(stats, metrics, monotonic_now(), sample);
    return read ? "" : "the response does not come from Nexus";
  }

  std::string step() {
    Scrape sample;
    if (std::string why = take(sample); !why.empty()) return why;
    samples_.push_back(std::move(sample));
    while (samples_.size() > 2 && samples_[1].at_ns <= samples_.back().at_ns - kTopWindow) samples_.pop_front();
    return {};
  }

  std::string page(const std::string& why, std::size_t width, std::size_t height) const {
    if (!why.empty())
      return detail::fit(where_ + ": " + escape_for_terminal(why, 200) + "\n\nq quits\n", width, height);
    const Scrape& last = samples_.back();
    const Scrape first = samples_.size() > 1 ? samples_.front() : start_of(last);
    return top_page(compute_rates(first, last), where_, width, height);
  }

  PageClient& client_;
  std::string where_;
  ScrapeReader reader_;
  std::deque<Scrape> samples_;  // of the last kTopWindow, oldest first
};

// Runs the command and returns its exit status.
inline int run_top(const HostPort& address, const std::string& prefix, const std::string& url, const std::string& key) {
  std::string why;
  const std::optional<Address> resolved = resolve_host(address, why);
  if (!resolved) {
    std::fprintf(stderr, "nexus: DNS lookup failed for %s: %s\n", address.host.c_str(), why.c_str());
    return 1;
  }
  BackendSettings host;
  host.address = address;
  PageClient client(*resolved, host_of(host), prefix, key);
  if (const int error = client.open()) {
    std::fprintf(stderr, "nexus: epoll: %s\n", strerror(error));
    return 1;
  }
  Top top(client, url);
  if (::isatty(STDOUT_FILENO) == 1) {
    top.run();
    return 0;
  }
  std::string page;
  if (why = top.once(page); !why.empty()) {
    std::fprintf(stderr, "nexus: %s: %s\n", url.c_str(), escape_for_terminal(why, 200).c_str());
    return 1;
  }
  std::fwrite(page.data(), 1, page.size(), stdout);
  return 0;
}

}  // namespace nexus
