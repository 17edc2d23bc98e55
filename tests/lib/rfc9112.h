// rfc9112.h
// Owns:     the tests' only C++ reader of HTTP/1.1 requests and responses, written from RFC 9112 alone: slow and plain.
// Promises: it shares no code with nexus/. It refuses what the RFC calls invalid, and also what the RFC lets a reader
//           tolerate (bare LF, folded lines, equal lengths), because a proxy must never send it.
// Leaves:   the inner grammar of targets, hosts and other values; limits.
// Threads:  any.
// Tested by: tests/hostile_readers_test.cpp
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace rfc9112 {

using Fields = std::vector<std::pair<std::string, std::string>>;

struct Message {
  enum class Framing : std::uint8_t { none, length, chunked, until_close };

  std::string start_line;
  std::string method, target;  // of a request
  int status = 0;              // of a response
  std::string reason;
  int minor = 1;  // of HTTP/1.x
  Fields fields;  // values without the blanks around them
  Framing framing = Framing::none;
  bool coding_unknown = false;  // the codings end in chunked, but there are others before it
  std::uint64_t length = 0;     // where framing is length
  std::string body;             // the content, without the chunked coding
  Fields trailers;
  std::size_t head_bytes = 0;
  bool stays_open = true;  // 9.3

  // The values of that field, in order.
  std::vector<std::string> all(std::string_view name) const;
  bool has(std::string_view name) const { return !all(name).empty(); }
  std::string value(std::string_view name) const {
    const auto values = all(name);
    return values.size() == 1 ? values[0] : values.empty() ? "<absent>" : "<several>";
  }
  std::string value_or_empty(std::string_view name) const { return has(name) ? value(name) : ""; }
};

struct Reading {
  std::vector<Message> messages;  // the complete ones
  std::string problem;            // why the text is not HTTP from `rest` on; empty if it is
  std::string rest;               // the bytes behind the last complete message
  bool within_body = false;       // `rest` begins with a complete head; its body is incomplete or malformed
  bool unframed = false;          // `rest` begins with a complete head that does not tell its body's length
  Message open;                   // in both cases: that head, and the part of its body that is there

  bool whole() const { return problem.empty() && rest.empty(); }
};

// ---- 5.6 of RFC 9110: tokens, blanks, lists ----

inline bool is_tchar(char c) {
  if ((c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z')) return true;
  return std::string("!#$%&'*+-.^_`|~").find(c) != std::string::npos;
}

inline bool is_token(std::string_view text) {
  for (const char c : text) {
    if (!is_tchar(c)) return false;
  }
  return !text.empty();
}

inline std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c + 32);
  }
  return out;
}

inline std::string trimmed(std::string_view text) {
  const std::size_t first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos) return "";
  return std::string(text.substr(first, text.find_last_not_of(" \t") - first + 1));
}

// RFC 9110 5.5: field-vchar, SP and HTAB.
inline bool is_field_value(std::string_view text) {
  for (const char c : text) {
    const unsigned char byte = static_cast<unsigned char>(c);
    if (byte != 0x09 && (byte < 0x20 || byte == 0x7f)) return false;
  }
  return true;
}

// RFC 9110 5.6.1.2: empty elements are passed over.
inline std::vector<std::string> list_of(const std::vector<std::string>& values) {
  std::vector<std::string> out;
  for (const std::string& value : values) {
    std::size_t at = 0;
    while (at <= value.size()) {
      const std::size_t comma = std::min(value.find(',', at), value.size());
      const std::string element = trimmed(std::string_view(value).substr(at, comma - at));
      if (!element.empty()) out.push_back(element);
      at = comma + 1;
    }
  }
  return out;
}

inline std::vector<std::string> Message::all(std::string_view name) const {
  std::vector<std::string> values;
  const std::string wanted = lower(name);
  for (const auto& [field, value] : fields) {
    if (field.size() == wanted.size() && lower(field) == wanted) values.push_back(value);
  }
  return values;
}

// ---- 2.2, 5: lines and fields ----

enum class Got : std::uint8_t { it, not_yet, never };

// Takes one line and its CRLF off `text`. A CR or LF that is not part of a CRLF is never a line's end.
inline Got take_line(std::string_view& text, std::string& line) {
  const std::size_t end = text.find_first_of("\r\n");
  if (end == std::string_view::npos) return Got::not_yet;
  if (text[end] == '\n') return Got::never;
  if (end + 1 == text.size()) return Got::not_yet;
  if (text[end + 1] != '\n') return Got::never;
  line = text.substr(0, end);
  text.remove_prefix(end + 2);
  return Got::it;
}

// Takes field lines up to and including the empty line. Sets `why` if the result is `never`.
// Can be called again with more text after `not_yet`, as long as the caller keeps what was not taken.
inline Got take_fields(std::string_view& text, Fields& fields, std::string& why) {
  for (;;) {
    std::string line;
    const Got got = take_line(text, line);
    if (got == Got::never) why = "a field line's end is not CRLF";
    if (got != Got::it) return got;
    if (line.empty()) return Got::it;
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos || !is_token(std::string_view(line).substr(0, colon))) {
      why = "no field name and colon: " + line;
      return Got::never;
    }
    if (!is_field_value(std::string_view(line).substr(colon + 1))) {
      why = "a control character in the value of " + line.substr(0, colon);
      return Got::never;
    }
    fields.emplace_back(line.substr(0, colon), trimmed(std::string_view(line).substr(colon + 1)));
  }
}

// ---- 3, 4: start lines ----

// RFC 9110 2.5: a later minor version is read as the latest that the reader knows.
inline std::optional<int> minor_version(std::string_view text) {
  if (text.size() != 8 || text.substr(0, 7) != "HTTP/1." || text[7] < '0' || text[7] > '9') return std::nullopt;
  return text[7] == '0' ? 0 : 1;
}

inline bool read_request_line(Message& message) {
  const std::string& line = message.start_line;
  const std::size_t first = line.find(' ');
  const std::size_t second = first == std::string::npos ? first : line.find(' ', first + 1);
  if (second == std::string::npos) return false;
  message.method = line.substr(0, first);
  message.target = line.substr(first + 1, second - first - 1);
  const auto minor = minor_version(std::string_view(line).substr(second + 1));
  if (!is_token(message.method) || message.target.empty() || !minor) return false;
  for (const char c : message.target) {
    if (c <= 0x20 || c == 0x7f) return false;  // negative: not ASCII
  }
  message.minor = *minor;
  return true;
}

// 3.2.2: the path and query of a target in the absolute form; any other target as it is.
inline std::string path_of(const std::string& target) {
  const std::string small = lower(target);
  const std::size_t scheme = small.find("://");
  if (scheme == std::string::npos || (small.substr(0, scheme) != "http" && small.substr(0, scheme) != "https"))
    return target;
  const std::size_t end = target.find_first_of("/?", scheme + 3);
  return end == std::string::npos || target[end] == '?' ? "/" : target.substr(end);
}

// A sender must write the blank behind the code, but many leave it out before an empty reason.
inline bool read_status_line(Message& message) {
  const std::string& line = message.start_line;
  const auto minor = minor_version(std::string_view(line).substr(0, 8));
  if (!minor || line.size() < 12 || line[8] != ' ' || (line.size() > 12 && line[12] != ' ')) return false;
  for (std::size_t i = 9; i < 12; ++i) {
    if (line[i] < '0' || line[i] > '9') return false;
    message.status = message.status * 10 + (line[i] - '0');
  }
  message.minor = *minor;
  if (line.size() > 13) message.reason = line.substr(13);
  return message.status >= 100 && message.status <= 599 && is_field_value(message.reason);
}

// ---- 6, 7: the body ----

// 6.3, for a message that may have a body. Returns why its length is unknown, or nothing.
inline std::string read_framing(Message& message, bool is_request) {
  const auto lengths = message.all("Content-Length");
  const auto codings = list_of(message.all("Transfer-Encoding"));
  if (message.has("Transfer-Encoding")) {
    if (!lengths.empty()) return "Content-Length beside Transfer-Encoding";
    if (message.minor == 0) return "Transfer-Encoding in HTTP/1.0";
    if (codings.empty()) return "Transfer-Encoding without a coding";
    for (std::size_t i = 0; i + 1 < codings.size(); ++i) {
      if (lower(codings[i]) == "chunked") return "chunked is not the last coding";
    }
    message.coding_unknown = codings.size() > 1 || lower(codings[0]) != "chunked";
    if (lower(codings.back()) == "chunked") {
      message.framing = Message::Framing::chunked;
    } else if (is_request) {
      return "chunked is not the last coding";
    } else {
      message.framing = Message::Framing::until_close;
    }
    return "";
  }
  if (lengths.empty()) {
    message.framing = is_request ? Message::Framing::none : Message::Framing::until_close;
    return "";
  }
  if (lengths.size() > 1 || lengths[0].empty()) return "not one Content-Length";
  for (const char c : lengths[0]) {
    if (c < '0' || c > '9') return "Content-Length is not a number";
    if (message.length > (UINT64_MAX - 9) / 10) return "Content-Length is too large";
    message.length = message.length * 10 + static_cast<std::uint64_t>(c - '0');
  }
  message.framing = message.length == 0 && is_request ? Message::Framing::none : Message::Framing::length;
  return "";
}

// 7.1.1, from behind the size: *( BWS ";" BWS name [ BWS "=" BWS value ] ).
inline bool is_chunk_extension(std::string_view text) {
  std::size_t at = 0;
  const auto blanks = [&] {
    while (at < text.size() && (text[at] == ' ' || text[at] == '\t')) ++at;
  };
  const auto token = [&] {
    const std::size_t from = at;
    while (at < text.size() && is_tchar(text[at])) ++at;
    return at > from;
  };
  const auto quoted = [&] {
    for (++at; at < text.size(); ++at) {
      if (text[at] == '"') return ++at, true;
      if (text[at] == '\\' && ++at == text.size()) return false;
      if (!is_field_value(text.substr(at, 1))) return false;
    }
    return false;
  };
  while (at < text.size()) {
    blanks();
    if (at == text.size() || text[at++] != ';') return false;
    blanks();
    if (!token()) return false;
    const std::size_t behind = at;
    blanks();
    if (at == text.size() || text[at] != '=') {
      at = behind;
      continue;
    }
    ++at;
    blanks();
    if (at < text.size() && text[at] == '"' ? !quoted() : !token()) return false;
  }
  return true;
}

// Takes a body off texts that come one after another. After `not_yet` the caller keeps what was not taken.
class BodyReader {
 public:
  // `closed`: the connection ended behind `text`.
  Got take(std::string_view& text, Message& message, bool closed, std::string& why) {
    switch (message.framing) {
      case Message::Framing::none: return Got::it;
      case Message::Framing::chunked: return take_chunked(text, message.body, message.trailers, why);
      case Message::Framing::length:
        take_content(text, message.body, message.length - message.body.size());
        return message.body.size() == message.length ? Got::it : Got::not_yet;
      case Message::Framing::until_close:
        message.stays_open = false;
        take_content(text, message.body, text.size());
        return closed ? Got::it : Got::not_yet;
    }
    return Got::never;
  }

  Got take_chunked(std::string_view& text, std::string& body, Fields& trailers, std::string& why) {
    for (;;) {
      Got got = Got::it;
      switch (next_) {
        case Next::size: got = take_size(text, why); break;
        case Next::content:
          left_ -= take_content(text, body, left_);
          if (left_ > 0) return Got::not_yet;
          next_ = Next::end;
          break;
        case Next::end: got = take_end(text, why); break;
        case Next::trailers: return take_fields(text, trailers, why);
      }
      if (got != Got::it) return got;
    }
  }

  // True if every chunk size so far was 1 to 8 lower-case hex digits without an extension, as Nexus writes them.
  bool plain_sizes() const { return plain_sizes_; }

 private:
  enum class Next : std::uint8_t { size, content, end, trailers };

  static std::size_t take_content(std::string_view& text, std::string& body, std::uint64_t most) {
    const std::size_t there = std::min<std::uint64_t>(most, text.size());
    body += text.substr(0, there);
    text.remove_prefix(there);
    return there;
  }

  Got take_size(std::string_view& text, std::string& why) {
    std::string line;
    const Got got = take_line(text, line);
    if (got == Got::never) why = "a chunk-size line's end is not CRLF";
    if (got != Got::it) return got;
    std::size_t digits = 0;
    for (; digits < line.size(); ++digits) {
      const std::size_t value = std::string("0123456789abcdef").find(lower(line)[digits]);
      if (value == std::string::npos) break;
      if (left_ >> 60 != 0) return why = "a chunk size is too large", Got::never;
      left_ = left_ * 16 + value;
    }
    if (digits == 0 || !is_chunk_extension(std::string_view(line).substr(digits))) {
      return why = "not a chunk size: " + line, Got::never;
    }
    plain_sizes_ = plain_sizes_ && digits == line.size() && digits <= 8 && lower(line) == line;
    next_ = left_ == 0 ? Next::trailers : Next::content;
    return Got::it;
  }

  Got take_end(std::string_view& text, std::string& why) {
    const std::string_view end = text.substr(0, 2);
    if (end != std::string_view("\r\n").substr(0, end.size())) return why = "no CRLF behind a chunk", Got::never;
    if (end.size() < 2) return Got::not_yet;
    text.remove_prefix(2);
    next_ = Next::size;
    return Got::it;
  }

  Next next_ = Next::size;
  std::uint64_t left_ = 0;  // of this chunk's content
  bool plain_sizes_ = true;
};

// 9.3.
inline bool says_stays_open(const Message& message) {
  bool close = false, keep = false;
  for (const std::string& option : list_of(message.all("Connection"))) {
    close |= lower(option) == "close";
    keep |= lower(option) == "keep-alive";
  }
  return !close && (message.minor == 1 || keep);
}

// ---- whole messages ----

// Takes a start line and fields.
inline Got take_head(std::string_view& text, Message& message, bool is_request, std::string& why) {
  const std::size_t bytes = text.size();
  const Got line = take_line(text, message.start_line);
  if (line == Got::never) why = "the start line's end is not CRLF";
  if (line != Got::it) return line;
  if (!(is_request ? read_request_line(message) : read_status_line(message))) {
    return why = "not a start line: " + message.start_line, Got::never;
  }
  const Got fields = take_fields(text, message.fields, why);
  if (fields != Got::it) return fields;
  message.head_bytes = bytes - text.size();
  message.stays_open = says_stays_open(message);
  return Got::it;
}

// 3.2. Returns what is wrong with a request's Host, or nothing.
inline std::string check_host(const Message& message) {
  const std::size_t hosts = message.all("Host").size();
  if (hosts > 1) return "several Host fields";
  return hosts == 0 && message.minor == 1 ? "no Host field" : "";
}

// Reads consecutive requests. 2.2 lets a server skip an empty line before a request; with `empty_lines` this one does.
inline Reading read_requests(std::string_view text, bool empty_lines = false) {
  Reading reading;
  for (;;) {
    reading.rest = text;
    if (empty_lines && text.substr(0, 2) == "\r\n") text.remove_prefix(2);
    if (text.empty()) return reading.rest.clear(), reading;
    Message message;
    if (take_head(text, message, true, reading.problem) != Got::it) return reading;
    reading.problem = check_host(message);
    if (reading.problem.empty()) reading.problem = read_framing(message, true);
    reading.unframed = !reading.problem.empty();
    if (!reading.unframed) {
      reading.within_body = BodyReader().take(text, message, false, reading.problem) != Got::it;
    }
    if (reading.unframed || reading.within_body) return reading.open = message, reading;
    reading.messages.push_back(message);
  }
}

// 6.3, for the response to a request of that method. Returns why its length is unknown, or nothing.
inline std::string read_response_framing(Message& message, std::string_view method) {
  const bool no_body = message.status < 200 || message.status == 204 || message.status == 304 || method == "HEAD";
  return no_body ? "" : read_framing(message, false);
}

// Reads the responses, interim ones too, to requests of these methods. `closed`: the connection ended behind `text`.
inline Reading read_responses(std::string_view text, const std::vector<std::string>& methods, bool closed) {
  Reading reading;
  std::size_t answered = 0;
  for (;;) {
    reading.rest = text;
    if (text.empty()) return reading;
    Message message;
    if (answered == methods.size()) return reading.problem = "a response to no request", reading;
    if (take_head(text, message, false, reading.problem) != Got::it) return reading;
    reading.problem = read_response_framing(message, methods[answered]);
    if (!reading.problem.empty()) return reading;
    reading.within_body = BodyReader().take(text, message, closed, reading.problem) != Got::it;
    if (reading.within_body) return reading.open = message, reading;
    if (message.status >= 200) ++answered;
    reading.messages.push_back(message);
  }
}

}  // namespace rfc9112
