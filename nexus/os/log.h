// log.h
// Owns:     the form of a log line: events for people, one access line per request; text or JSON.
// Promises: one event is one line: foreign text is escaped and cut, so that it can neither forge a line nor control a
//           terminal. No allocation after the first line, and no system call except the ring's wake-up. Prompts and
//           responses are never arguments.
// Leaves:   the files to log_thread.h, the choice of what to log to its callers.
// Threads:  a Log belongs to one thread, and so does the putting side of its ring.
// Tested by: tests/log_test.cpp
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/base/clock.h"
#include "nexus/base/text.h"
#include "nexus/config/settings.h"
#include "nexus/os/log_thread.h"

namespace nexus {

using LogField = std::pair<std::string_view, std::string_view>;

constexpr std::size_t kMaxLogValueBytes = 256;     // of one value; a longer one is cut and ends in an ellipsis
constexpr std::size_t kMaxLogMessageBytes = 2048;  // of an event's message, which may be a list

enum class AccessTarget : std::uint8_t { off, standard_error, file };

struct LogConfig {
  LogLevel level = LogLevel::info;
  LogFormat format = LogFormat::text;
  AccessTarget access = AccessTarget::off;
  bool journald = false;  // stderr is the journal ($JOURNAL_STREAM): lines begin with `<6>` and have no time
};

inline LogConfig log_config(const LogSettings& settings, bool journald) {
  LogConfig config{settings.level, settings.format, AccessTarget::file, journald};
  if (settings.access == "off") config.access = AccessTarget::off;
  if (settings.access == "stderr") config.access = AccessTarget::standard_error;
  return config;
}

struct AccessEntry {
  Ns wall_ns = 0;
  std::string_view request_id;
  std::string_view client;  // its address
  std::string_view method;
  std::string_view path;
  std::string_view model;       // in the client's request
  std::string_view model_used;  // in the request to the backend
  std::string_view backend;
  unsigned status = 0;
  std::string_view error_type;  // empty: success
  std::uint32_t attempts = 0;
  std::uint64_t bytes = 0;              // to the client
  std::int64_t prompt_tokens = -1;      // -1: unknown
  std::int64_t completion_tokens = -1;  // -1: unknown
  Ns first_byte_ns = -1;                // -1: no byte came
  Ns duration_ns = 0;
  bool cut = false;  // the response body is truncated
};

namespace detail {

// Characters that must be escaped for a terminal or a log reader: controls (C0, DEL, C1), line and paragraph
// separators, and those that change the writing direction.
inline bool is_unsafe(char32_t c) {
  return c < 0x20 || (c >= 0x7f && c <= 0x9f) || c == 0x200e || c == 0x200f || (c >= 0x2028 && c <= 0x202e) ||
         (c >= 0x2066 && c <= 0x2069) || c == 0xfeff;
}

inline char32_t decode_utf8(std::string_view character) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(character[i]); };
  switch (character.size()) {
    case 1: return byte(0);
    case 2: return static_cast<char32_t>((byte(0) & 0x1f) << 6 | (byte(1) & 0x3f));
    case 3: return static_cast<char32_t>((byte(0) & 0x0f) << 12 | (byte(1) & 0x3f) << 6 | (byte(2) & 0x3f));
    default: return 0x10000;  // four bytes: none of these is unsafe
  }
}

// ASCII that needs no escape, quoted or not.
constexpr bool is_harmless(char c) { return c >= 0x20 && c < 0x7f && c != '"' && c != '\\'; }

// Cuts the text to `limit` bytes, between two characters if it is UTF-8.
inline std::string_view cut_text(std::string_view text, std::size_t limit) {
  if (text.size() <= limit) return text;
  std::size_t end = limit;
  while (end > limit - 3 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  return text.substr(0, end);
}

// Appends `text`, cut and escaped so that it stays on one line and, if `quoted`, within its quotes. The escapes are
// JSON's; bytes that are not UTF-8 become U+FFFD.
inline void append_log_escaped(std::string& out, std::string_view text, std::size_t limit, bool quoted) {
  constexpr std::string_view kHex = "0123456789abcdef";
  const std::string_view kept = cut_text(text, limit);
  for (std::size_t at = 0; at < kept.size();) {
    // Nearly all bytes need no escape: copy them in one piece.
    std::size_t end = at;
    while (end < kept.size() && is_harmless(kept[end])) ++end;
    out += kept.substr(at, end - at);
    at = end;
    if (at == kept.size()) break;
    const std::size_t length = utf8_length(kept.substr(at));
    if (length == 0) {
      out += "\xef\xbf\xbd";
      at += 1;
      continue;
    }
    const std::string_view character = kept.substr(at, length);
    const char32_t c = decode_utf8(character);
    if (c == '\n') {
      out += "\\n";
    } else if (is_unsafe(c)) {
      out += "\\u";
      for (int shift = 12; shift >= 0; shift -= 4) out += kHex[(c >> shift) & 15];
    } else {
      if (quoted && (c == '"' || c == '\\')) out += '\\';
      out += character;
    }
    at += length;
  }
  if (kept.size() < text.size()) out += "\xe2\x80\xa6";
}

// True if a value in text format needs no quotes.
inline bool is_plain(std::string_view value) {
  if (value.empty() || value == "-" || value.size() > kMaxLogValueBytes) return false;
  for (const char c : value) {
    if (!is_harmless(c) || c == ' ' || c == '=') return false;
  }
  return true;
}

// Writes `2026-01-31T23:59:59.123Z`. It keeps the part up to the second, which most lines share.
class Rfc3339 {
 public:
  void append(std::string& out, Ns wall) {
    using namespace std::chrono;
    const sys_time<nanoseconds> time{nanoseconds(wall)};
    const sys_seconds second = floor<seconds>(time);
    if (second != second_) write_second(second);
    put(20, (time - second) / 1ms, 3);
    out.append(text_.data(), text_.size());
  }

 private:
  void put(std::size_t at, std::int64_t value, int digits) {
    for (int i = digits - 1; i >= 0; --i, value /= 10) {
      text_[at + static_cast<std::size_t>(i)] = static_cast<char>('0' + value % 10);
    }
  }

  void write_second(std::chrono::sys_seconds second) {
    second_ = second;
    const auto day = std::chrono::floor<std::chrono::days>(second);
    const std::chrono::year_month_day date(day);
    const std::chrono::hh_mm_ss time(second - day);
    put(0, static_cast<int>(date.year()), 4);
    put(5, static_cast<unsigned>(date.month()), 2);
    put(8, static_cast<unsigned>(date.day()), 2);
    put(11, time.hours().count(), 2);
    put(14, time.minutes().count(), 2);
    put(17, time.seconds().count(), 2);
  }

  std::chrono::sys_seconds second_ = std::chrono::sys_seconds::min();
  std::string text_ = "0000-00-00T00:00:00.000Z";
};

}  // namespace detail

constexpr std::array<std::string_view, 4> kLogLevelNames{"error", "warning", "info", "debug"};

class Log {
 public:
  // Without a ring no line is written.
  explicit Log(LogRing* ring = nullptr, LogConfig config = {}) : ring_(ring), config_(config) {
    line_.reserve(kLineBytes);
  }

  void configure(const LogConfig& config) { config_ = config; }
  const LogConfig& config() const { return config_; }
  bool wants(LogLevel level) const { return ring_ != nullptr && level <= config_.level; }
  bool wants_access() const { return ring_ != nullptr && config_.access != AccessTarget::off; }

  // `message` is our own text; the fields' values may be foreign.
  void event(LogLevel level, std::string_view message, std::initializer_list<LogField> fields = {}) {
    if (wants(level)) event_at(wall_now(), level, message, fields);
  }
  void event_at(Ns wall, LogLevel level, std::string_view message, std::initializer_list<LogField> fields = {}) {
    if (!wants(level)) return;
    begin(config_.journald, level);
    const std::string_view level_name = kLogLevelNames[static_cast<std::size_t>(level)];
    if (json()) {
      if (!config_.journald) time(wall);
      text("level", level_name);
      key("message");
      append_quoted(message, kMaxLogMessageBytes);
    } else {
      if (!config_.journald) {
        time_.append(line_, wall);
        line_.append(" ").append(level_name).append(" ");
      }
      detail::append_log_escaped(line_, message, kMaxLogMessageBytes, false);
      first_ = false;
    }
    for (const auto& [name, value] : fields) text(name, value);
    end(LogDestination::events);
  }

  void access(const AccessEntry& entry) {
    if (!wants_access()) return;
    begin(config_.journald && config_.access == AccessTarget::standard_error, LogLevel::info);
    time(entry.wall_ns);
    text("request_id", entry.request_id);
    text("client", entry.client);
    text("method", entry.method);
    text("path", entry.path);
    text("model", entry.model);
    text("model_used", entry.model_used);
    text("backend", entry.backend);
    number("status", entry.status);
    if (entry.error_type.empty()) {
      absent("error_type");
    } else {
      text("error_type", entry.error_type);
    }
    number("attempts", entry.attempts);
    number("bytes", static_cast<std::int64_t>(entry.bytes));
    number("prompt_tokens", entry.prompt_tokens);
    number("completion_tokens", entry.completion_tokens);
    milliseconds("first_byte_ms", entry.first_byte_ns);
    milliseconds("duration_ms", entry.duration_ns);
    key("cut");
    line_ += entry.cut ? "true" : "false";
    end(LogDestination::access);
  }

 private:
  // The longest possible line, so that none allocates: an event's message and seven values, or an access line, with
  // each byte escaped. Memory is used only as far as a line was ever long.
  static constexpr std::size_t kLineBytes = 6 * (kMaxLogMessageBytes + 7 * kMaxLogValueBytes) + 1024;

  bool json() const { return config_.format == LogFormat::json; }

  // `priority`: sd-daemon(3)'s prefix, from which journald takes the level. syslog has a notice (5) that we have not.
  void begin(bool priority, LogLevel level) {
    constexpr std::array<std::string_view, 4> kPriority{"<3>", "<4>", "<6>", "<7>"};
    line_ = priority ? kPriority[static_cast<std::size_t>(level)] : std::string_view();
    if (json()) line_ += '{';
    first_ = true;
  }

  void end(LogDestination to) {
    line_ += json() ? "}\n" : "\n";
    ring_->put(to, line_);
  }

  void time(Ns wall) {
    key("time");
    if (json()) line_ += '"';
    time_.append(line_, wall);
    if (json()) line_ += '"';
  }

  // Appends `"name":` or ` name=`. Names are constants, which need no escape.
  void key(std::string_view name) {
    if (!first_) line_ += json() ? ',' : ' ';
    first_ = false;
    if (json()) line_ += '"';
    line_ += name;
    line_ += json() ? "\":" : "=";
  }

  void append_quoted(std::string_view value, std::size_t limit) {
    line_ += '"';
    detail::append_log_escaped(line_, value, limit, true);
    line_ += '"';
  }

  void text(std::string_view name, std::string_view value) {
    key(name);
    if (!json() && value.empty()) {
      line_ += '-';
    } else if (!json() && detail::is_plain(value)) {
      line_ += value;
    } else {
      append_quoted(value, kMaxLogValueBytes);
    }
  }

  void absent(std::string_view name) {
    key(name);
    line_ += json() ? "null" : "-";
  }

  void number(std::string_view name, std::int64_t value) {
    if (value < 0) return absent(name);
    key(name);
    line_ += Digits(static_cast<std::uint64_t>(value)).view();
  }

  // With three decimals, as whole microseconds.
  void milliseconds(std::string_view name, Ns span) {
    if (span < 0) return absent(name);
    key(name);
    const std::uint64_t micros = static_cast<std::uint64_t>(span / kMicrosecond);
    line_ += Digits(micros / 1000).view();
    line_ += '.';
    for (std::uint64_t unit = 100; unit > 0; unit /= 10) line_ += static_cast<char>('0' + micros / unit % 10);
  }

  LogRing* ring_;
  LogConfig config_;
  std::string line_;
  detail::Rfc3339 time_;
  bool first_ = true;  // the line has no field yet
};

}  // namespace nexus
