// log.h
// Owns:     the form of a log line: events for people, one access line per request; text or JSON.
// Promises: one event is one line: foreign text is escaped and cut, so that it can neither forge a line nor control a
//           terminal. No allocation after the first line, and no system call except the ring's wake-up. Prompts and
//           responses are never arguments.
// Leaves:   the files to log_thread.h, the choice of what to log to its callers.
// Threads:  a Log belongs to one thread, and so does the putting side of its ring.
// Tested by: tests/log_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <ctime>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/config/settings.h"
#include "nexus/os/log_thread.h"

namespace nexus {

using LogField = std::pair<std::string_view, std::string_view>;

struct AccessEntry {
  Ns wall_ns = 0;
  std::string_view request_id;
  std::string_view client;  // its address
  std::string_view key;     // the name of the client's key
  std::string_view method;
  std::string_view path;
  std::string_view model;       // in the client's request
  std::string_view model_used;  // in the request to the backend
  std::string_view backend;
  std::string_view affinity;  // of a hash of the session's key; empty: it has none
  unsigned status = 0;
  std::string_view error_type;  // empty: success
  std::uint32_t attempts = 0;
  std::uint64_t bytes = 0;              // to the client
  std::int64_t prompt_tokens = -1;      // -1: unknown
  std::int64_t completion_tokens = -1;  // -1: unknown
  Ns first_byte_ns = -1;                // -1: no byte came
  Ns duration_ns = 0;
  bool cut = false;           // the response body is truncated
  std::string_view endpoint;  // of the path: chat, embeddings, …
  bool stream = false;
  std::string_view route;  // the reason of the backend's choice, as the client gets it
  std::string_view tries;  // `gpu-1:status_5xx:12 gpu-2:ok:340`: each attempt's backend, outcome and milliseconds
  std::uint64_t request_bytes = 0;  // of the body
  std::int64_t cached_tokens = -1;  // -1: unknown
  Ns queue_ns = 0;                  // in the queue
  Ns connect_ns = 0;                // until connections to backends stood
  std::string_view trace_id;        // of the client's traceparent; empty: none
  bool has_slo = false;             // there is a service level
  std::string_view slo;             // if the request met it; empty: it was not judged
};

namespace detail {

// Characters that must be escaped for a terminal or a log reader: controls (C0, DEL, C1), line and paragraph
// separators, and those that change the writing direction.
inline bool is_unsafe(char32_t c) {
  return c < 0x20 || (c >= 0x7f && c <= 0x9f) || c == 0x200e || c == 0x200f || (c >= 0x2028 && c <= 0x202e) ||
         (c >= 0x2066 && c <= 0x2069) || c == 0xfeff;
}

// ASCII that needs no escape, quoted or not.
constexpr bool is_harmless(char c) { return c >= 0x20 && c < 0x7f && c != '"' && c != '\\'; }

// Appends `text`, cut and escaped so that it stays on one line and, if `quoted`, within its quotes. The escapes are
// JSON's; bytes that are not UTF-8 become U+FFFD.
inline void append_log_escaped(std::string& out, std::string_view text, std::size_t limit, bool quoted) {
  std::string_view rest = text.substr(0, limit);
  const bool is_cut = rest.size() < text.size();
  if (is_cut) rest = rest.substr(0, without_cut_character(rest));
  while (!rest.empty()) {
    // Nearly all bytes need no escape: copy them in one piece.
    const auto harmless =
        static_cast<std::size_t>(std::find_if_not(rest.begin(), rest.end(), is_harmless) - rest.begin());
    out += rest.substr(0, harmless);
    rest.remove_prefix(harmless);
    if (rest.empty()) break;
    const Utf8Character character = read_utf8(rest);
    const char32_t c = character.code;
    if (character.bytes == 0) {
      out += "\xef\xbf\xbd";
    } else if (c == '\n') {
      out += "\\n";
    } else if (is_unsafe(c)) {
      out += "\\u";
      for (int shift = 12; shift >= 0; shift -= 4) out += kHexDigits[(c >> shift) & 15];
    } else {
      if (quoted && (c == '"' || c == '\\')) out += '\\';
      out += rest.substr(0, character.bytes);
    }
    rest.remove_prefix(std::max<std::size_t>(character.bytes, 1));
  }
  if (is_cut) out += "\xe2\x80\xa6";
}

// True if a value in text format needs no quotes.
inline bool is_plain(std::string_view value) {
  return !value.empty() && value != "-" && value.size() <= kMaxLogValueBytes &&
         std::all_of(value.begin(), value.end(), [](char c) { return is_harmless(c) && c != ' ' && c != '='; });
}

// Appends the three digits of a number below 1000.
inline void append_thousandths(std::string& out, std::uint64_t number) {
  out += Digits(1000 + number).view().substr(1);
}

// Writes `2026-01-31T23:59:59.123Z`. It keeps the part up to the second, which most lines share.
class Rfc3339 {
 public:
  void append(std::string& out, Ns wall) {
    const std::time_t second = wall / kSecond - (wall % kSecond < 0);
    if (second != second_) {
      second_ = second;
      std::tm utc{};
      gmtime_r(&second, &utc);
      bytes_ = std::strftime(text_.data(), text_.size(), "%Y-%m-%dT%H:%M:%S.", &utc);
    }
    out.append(text_.data(), bytes_);
    append_thousandths(out, static_cast<std::uint64_t>((wall - second * kSecond) / kMillisecond));
    out += 'Z';
  }

 private:
  std::time_t second_ = INT64_MIN;
  std::array<char, 32> text_{};
  std::size_t bytes_ = 0;
};

}  // namespace detail

class Log {
 public:
  // Without a ring no line is written. `journald`: stderr is the journal ($JOURNAL_STREAM), so that lines to it begin
  // with `<6>`, and events have no time.
  explicit Log(LogRing* ring = nullptr, const LogSettings& settings = {}, bool journald = false)
      : ring_(ring), journald_(journald) {
    line_.reserve(kLineBytes);
    configure(settings);
  }

  void configure(const LogSettings& settings) {
    level_ = settings.level;
    json_ = settings.format == LogFormat::json;
    wants_access_ = ring_ != nullptr && settings.access != "off";
    access_has_priority_ = journald_ && settings.access == "stderr";
  }
  bool wants(LogLevel level) const { return ring_ != nullptr && level <= level_; }
  bool wants_access() const { return wants_access_; }

  // `message` is our own text; the fields' values may be foreign.
  void event(LogLevel level, std::string_view message, std::initializer_list<LogField> fields = {}) {
    if (wants(level)) event_at(wall_now(), level, message, fields);
  }
  void event_at(Ns wall, LogLevel level, std::string_view message, std::initializer_list<LogField> fields = {}) {
    if (!wants(level)) return;
    begin(journald_, level);
    if (!journald_) {
      event_key("time");
      time(wall);
    }
    if (json_ || !journald_) {
      event_key("level");
      value(kLevelNames[static_cast<std::size_t>(level)]);
    }
    event_key("message");
    quote();
    detail::append_log_escaped(line_, message, kMaxLogMessageBytes, json_);
    quote();
    for (const auto& [name, content] : fields) text(name, content);
    end(ring_->events);
  }

  void access(const AccessEntry& entry) {
    if (!wants_access()) return;
    begin(access_has_priority_, LogLevel::info);
    key("time");
    time(entry.wall_ns);
    text("request_id", entry.request_id);
    text("client", entry.client);
    text("key", entry.key);
    text("method", entry.method);
    text("path", entry.path);
    text("model", entry.model);
    text("model_used", entry.model_used);
    text("backend", entry.backend);
    entry.affinity.empty() ? absent("affinity") : text("affinity", entry.affinity);
    number("status", entry.status);
    entry.error_type.empty() ? absent("error_type") : text("error_type", entry.error_type);
    number("attempts", entry.attempts);
    number("bytes", static_cast<std::int64_t>(entry.bytes));
    number("prompt_tokens", entry.prompt_tokens);
    number("completion_tokens", entry.completion_tokens);
    milliseconds("first_byte_ms", entry.first_byte_ns);
    milliseconds("duration_ms", entry.duration_ns);
    truth("cut", entry.cut);
    text("endpoint", entry.endpoint);
    truth("stream", entry.stream);
    text("route", entry.route);
    text("tries", entry.tries);
    number("request_bytes", static_cast<std::int64_t>(entry.request_bytes));
    number("cached_tokens", entry.cached_tokens);
    milliseconds("queue_ms", entry.queue_ns);
    milliseconds("connect_ms", entry.connect_ns);
    entry.trace_id.empty() ? absent("trace_id") : text("trace_id", entry.trace_id);
    if (entry.has_slo) entry.slo.empty() ? absent("slo") : text("slo", entry.slo);
    end(ring_->access);
  }

 private:
  // The longest possible line, so that none allocates: an access line with eleven values, each byte escaped. Memory is
  // used only as far as a line was ever long.
  static constexpr std::size_t kLineBytes = 6 * (kMaxLogMessageBytes + 11 * kMaxLogValueBytes) + 1024;

  static constexpr std::array<std::string_view, 4> kLevelNames{"error", "warning", "info", "debug"};
  // sd-daemon(3)'s prefixes, from which journald takes the level. syslog has a notice (5) that Nexus has not.
  static constexpr std::array<std::string_view, 4> kPriorities{"<3>", "<4>", "<6>", "<7>"};

  void begin(bool has_priority, LogLevel level) {
    line_ = has_priority ? kPriorities[static_cast<std::size_t>(level)] : std::string_view();
    if (json_) line_ += '{';
    first_ = true;
  }

  void end(LogLane& lane) {
    line_ += json_ ? "}\n" : "\n";
    lane.put(line_);
  }

  void separate() {
    if (!first_) line_ += json_ ? ',' : ' ';
    first_ = false;
  }

  void quote() {
    if (json_) line_ += '"';
  }

  // Appends `"name":` or ` name=`. Names are constants, which need no escape.
  void key(std::string_view name) {
    separate();
    quote();
    line_ += name;
    line_ += json_ ? "\":" : "=";
  }

  // In text, the place shows which value it is.
  void event_key(std::string_view name) { json_ ? key(name) : separate(); }

  void time(Ns wall) {
    quote();
    time_.append(line_, wall);
    quote();
  }

  void value(std::string_view content) {
    if (!json_ && content.empty()) {
      line_ += '-';
    } else if (!json_ && detail::is_plain(content)) {
      line_ += content;
    } else {
      line_ += '"';
      detail::append_log_escaped(line_, content, kMaxLogValueBytes, true);
      line_ += '"';
    }
  }

  void text(std::string_view name, std::string_view content) {
    key(name);
    value(content);
  }

  void truth(std::string_view name, bool value) {
    key(name);
    line_ += value ? "true" : "false";
  }

  void absent(std::string_view name) {
    key(name);
    line_ += json_ ? "null" : "-";
  }

  void number(std::string_view name, std::int64_t value) {
    if (value < 0) return absent(name);
    key(name);
    line_ += Digits(static_cast<std::uint64_t>(value)).view();
  }

  // With three decimals, as whole microseconds.
  void milliseconds(std::string_view name, Ns span) {
    if (span < 0) return absent(name);
    const std::int64_t micros = span / kMicrosecond;
    number(name, micros / 1000);
    line_ += '.';
    detail::append_thousandths(line_, static_cast<std::uint64_t>(micros % 1000));
  }

  LogRing* ring_;
  bool journald_;
  LogLevel level_ = LogLevel::info;
  bool json_ = false;
  bool wants_access_ = false;
  bool access_has_priority_ = false;
  std::string line_;
  detail::Rfc3339 time_;
  bool first_ = true;  // the line has no field yet
};

}  // namespace nexus
