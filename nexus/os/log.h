// log.h
// Owns:     how a line of the log looks: events for people, one access line a request; text or JSON.
// Promises: one line is one line: whatever a client sent is escaped and cut short, so that it can neither forge a line
//           nor steer a terminal; no allocation in the steady state, no system call but the ring's rare wake-up.
// Leaves:   the way to the file to log_thread.h and log_thread.h; what is worth a line to everybody else. Prompts are
//           never handed in.
// Threads:  a Log belongs to one thread, and so does its ring's putting end.
#pragma once

#include <array>
#include <charconv>
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

constexpr std::size_t kMaxLogValueBytes = 256;     // of one value; behind it stands an ellipsis
constexpr std::size_t kMaxLogMessageBytes = 2048;  // of an event's own text: it may name many things

enum class AccessTarget : std::uint8_t { off, standard_error, file };

// Changed on reload by each owner of a Log, in its own thread.
struct LogConfig {
  LogLevel level = LogLevel::info;
  LogFormat format = LogFormat::text;
  AccessTarget access = AccessTarget::off;
  bool journald = false;  // stderr is systemd's (JOURNAL_STREAM is set): `<6>` in front, and no time of our own
};

inline LogConfig log_config(const LogSettings& settings, bool journald) {
  LogConfig config{settings.level, settings.format, AccessTarget::file, journald};
  if (settings.access == "off") config.access = AccessTarget::off;
  if (settings.access == "stderr") config.access = AccessTarget::standard_error;
  return config;
}

// One request, when it ended.
struct AccessEntry {
  Ns wall_ns = 0;
  std::string_view request_id;
  std::string_view client;  // its address
  std::string_view method;
  std::string_view path;
  std::string_view model;       // as asked for
  std::string_view model_used;  // as sent to the backend
  std::string_view backend;
  unsigned status = 0;
  std::string_view error_type;  // empty: a success
  std::uint32_t attempts = 0;
  std::uint64_t bytes = 0;              // to the client
  std::int64_t prompt_tokens = -1;      // -1: not told
  std::int64_t completion_tokens = -1;  // -1: not told
  Ns first_byte_ns = -1;                // -1: none came
  Ns duration_ns = 0;
  bool cut = false;  // the body ended before it was whole
};

namespace detail {

// Characters that must not reach a terminal or a log reader as they are: controls (C0, DEL, C1), line and paragraph
// separators, and those that turn the direction of what follows.
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
    default: return 0x10000;  // four bytes: nothing unsafe up there
  }
}

// Visible ASCII or a space, and neither a quote nor a backslash.
constexpr bool is_harmless(char c) { return c >= 0x20 && c < 0x7f && c != '"' && c != '\\'; }

// The text cut to `limit` bytes, at a character's border where it has any.
inline std::string_view cut_text(std::string_view text, std::size_t limit) {
  if (text.size() <= limit) return text;
  std::size_t end = limit;
  while (end > limit - 3 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  return text.substr(0, end);
}

// Appends `text`, cut and escaped so that it stays within one line and, where it stands in quotes, within them. The
// escapes are JSON's; a byte that belongs to no character becomes U+FFFD.
inline void append_log_escaped(std::string& out, std::string_view text, std::size_t limit, bool quoted) {
  constexpr std::string_view kHex = "0123456789abcdef";
  const std::string_view kept = cut_text(text, limit);
  for (std::size_t at = 0; at < kept.size();) {
    // What needs no escape, which is nearly everything, goes over in one piece.
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

// Whether a text value may stand without quotes: nothing in it could end it or be taken for "absent".
inline bool is_plain(std::string_view value) {
  if (value.empty() || value == "-" || value.size() > kMaxLogValueBytes) return false;
  for (const char c : value) {
    if (!is_harmless(c) || c == ' ' || c == '=') return false;
  }
  return true;
}

// `2026-01-31T23:59:59.123Z`; the part up to the second is kept, as most lines share it.
class Rfc3339 {
 public:
  void append(std::string& out, Ns wall) {
    const std::int64_t second = wall / kSecond - (wall % kSecond < 0 ? 1 : 0);
    if (second != second_) write_second(second);
    out.append(text_.data(), text_.size());
    std::array<char, 5> tail{'.', '0', '0', '0', 'Z'};
    put(&tail[1], (wall - second * kSecond) / kMillisecond, 3);
    out.append(tail.data(), tail.size());
  }

 private:
  static void put(char* at, std::int64_t value, int digits) {
    for (int i = digits - 1; i >= 0; --i, value /= 10) at[i] = static_cast<char>('0' + value % 10);
  }

  // Days to a date by the 400-year cycle of the calendar, each year beginning in March (H. Hinnant's civil_from_days).
  void write_second(std::int64_t second) {
    second_ = second;
    std::int64_t days = second / 86400 - (second % 86400 < 0 ? 1 : 0);
    const std::int64_t of_day = second - days * 86400;
    days += 719468;  // from 0000-03-01
    const std::int64_t era = (days >= 0 ? days : days - 146096) / 146097;
    const std::int64_t day_of_era = days - era * 146097;
    const std::int64_t year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
    const std::int64_t day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    const std::int64_t month_from_march = (5 * day_of_year + 2) / 153;
    const std::int64_t month = month_from_march < 10 ? month_from_march + 3 : month_from_march - 9;
    put(&text_[0], year_of_era + era * 400 + (month <= 2 ? 1 : 0), 4);
    put(&text_[5], month, 2);
    put(&text_[8], day_of_year - (153 * month_from_march + 2) / 5 + 1, 2);
    put(&text_[11], of_day / 3600, 2);
    put(&text_[14], of_day / 60 % 60, 2);
    put(&text_[17], of_day % 60, 2);
  }

  std::int64_t second_ = INT64_MIN;
  std::array<char, 19> text_{'0', '0', '0', '0', '-', '0', '0', '-', '0', '0',
                             'T', '0', '0', ':', '0', '0', ':', '0', '0'};
};

}  // namespace detail

constexpr std::string_view name_of(LogLevel level) {
  switch (level) {
    case LogLevel::error: return "error";
    case LogLevel::warning: return "warning";
    case LogLevel::info: return "info";
    case LogLevel::debug: return "debug";
  }
  return "error";
}

class Log {
 public:
  // Without a ring nothing is written, whatever the level.
  explicit Log(LogRing* ring = nullptr, LogConfig config = {}) : ring_(ring), config_(config) {
    line_.reserve(kLineBytes);
  }

  void configure(const LogConfig& config) { config_ = config; }
  const LogConfig& config() const { return config_; }
  bool wants(LogLevel level) const { return ring_ != nullptr && level <= config_.level; }
  bool wants_access() const { return ring_ != nullptr && config_.access != AccessTarget::off; }

  // One line, of a message of our own and fields whose values may be anybody's.
  void event(LogLevel level, std::string_view message, std::initializer_list<LogField> fields = {}) {
    if (wants(level)) event_at(wall_now(), level, message, fields);
  }
  void event_at(Ns wall, LogLevel level, std::string_view message, std::initializer_list<LogField> fields = {}) {
    if (!wants(level)) return;
    line_.clear();
    if (config_.journald) append_priority(level);
    if (config_.format == LogFormat::json) {
      write_json_event(wall, level, message, fields);
    } else {
      write_text_event(wall, level, message, fields);
    }
    line_ += '\n';
    ring_->put(LogDestination::events, line_);
  }

  void access(const AccessEntry& entry) {
    if (!wants_access()) return;
    line_.clear();
    if (config_.journald && config_.access == AccessTarget::standard_error) append_priority(LogLevel::info);
    if (json()) line_ += '{';
    first_ = true;
    key("time");
    if (json()) line_ += '"';
    time_.append(line_, entry.wall_ns);
    if (json()) line_ += '"';
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
    line_ += json() ? "}\n" : "\n";
    ring_->put(LogDestination::access, line_);
  }

 private:
  // The longest line there can be, so that none needs memory: an event's text and seven values, or an access line, each
  // byte of them escaped. Of the room only as much is ever touched as a line had bytes.
  static constexpr std::size_t kLineBytes = 6 * (kMaxLogMessageBytes + 7 * kMaxLogValueBytes) + 1024;

  bool json() const { return config_.format == LogFormat::json; }

  // sd-daemon(3): journald takes the level from here. syslog has a notice between warning (4) and info (6).
  void append_priority(LogLevel level) {
    constexpr std::array<char, 4> kPriority{'3', '4', '6', '7'};
    line_ += '<';
    line_ += kPriority[static_cast<std::size_t>(level)];
    line_ += '>';
  }

  void write_text_event(Ns wall, LogLevel level, std::string_view message, std::initializer_list<LogField> fields) {
    if (!config_.journald) {
      time_.append(line_, wall);
      line_ += ' ';
      line_ += name_of(level);
      line_ += ' ';
    }
    detail::append_log_escaped(line_, message, kMaxLogMessageBytes, false);
    first_ = false;
    for (const auto& [name, value] : fields) text(name, value);
  }

  void write_json_event(Ns wall, LogLevel level, std::string_view message, std::initializer_list<LogField> fields) {
    line_ += '{';
    first_ = true;
    if (!config_.journald) {
      key("time");
      line_ += '"';
      time_.append(line_, wall);
      line_ += '"';
    }
    key("level");
    line_ += '"';
    line_ += name_of(level);
    line_ += '"';
    key("message");
    append_quoted(message, kMaxLogMessageBytes);
    for (const auto& [name, value] : fields) text(name, value);
    line_ += '}';
  }

  // `"name":` or ` name=`. Names are our own constants.
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

  // Milliseconds with three decimals: whole microseconds.
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
  bool first_ = true;  // no member was written yet
};

}  // namespace nexus
