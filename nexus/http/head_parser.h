// head_parser.h
// Owns:     llhttp wrapped: reading the head of a request and of a response, strictly, and what its framing means.
// Promises: a head is accepted only where llhttp (strict) and our own walk over its lines see the same fields; all
//           positions are offsets from the head's first byte, so the buffer may move between calls; it may be fed one
//           byte at a time with the same outcome; a body's length is decided here, once (RFC 9112 6.3).
// Leaves:   reading bodies to chunked.h and the exchange; limits on size to the caller, who stops feeding.
// Threads:  a reader belongs to its connection.
#pragma once

#include <llhttp.h>

#include <array>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "nexus/base/simd.h"
#include "nexus/base/text.h"
#include "nexus/http/header_fields.h"

namespace nexus {

// Why a head was refused. The texts of `malformed` name the place for the log; clients are told the kind.
enum class HeadError : std::uint8_t {
  none,
  malformed,        // 400
  too_many_fields,  // 431
  unknown_coding,   // 501: a transfer coding that is not `chunked`
  bad_expectation,  // 417
};

struct HeadResult {
  enum class Status : std::uint8_t { need_more, done, failed };
  Status status = Status::need_more;
  HeadError error = HeadError::none;
  std::string_view why;        // a constant text
  std::size_t head_bytes = 0;  // where done: the head with its empty line
};

struct Framing {
  enum class Kind : std::uint8_t { none, length, chunked, until_close };
  Kind kind = Kind::none;
  std::uint64_t length = 0;  // where kind is length
};

struct RequestHead {
  std::uint8_t method = 0;  // llhttp_method_t
  bool http_1_0 = false;
  bool keep_alive = true;
  bool expects_continue = false;
  HeadError refusal = HeadError::none;  // well-formed, yet to be refused: unknown_coding, bad_expectation
  std::uint32_t target_at = 0;
  std::uint32_t target_bytes = 0;
  std::uint32_t head_bytes = 0;
  Framing framing;
};

struct ResponseHead {
  std::uint16_t status = 0;
  bool http_1_0 = false;
  bool keep_alive = true;
  std::uint32_t reason_at = 0;
  std::uint32_t reason_bytes = 0;
  std::uint32_t head_bytes = 0;
  Framing framing;
};

inline std::string_view name_of(const char* base, const FieldRow& row) { return {base + row.name_at, row.name_bytes}; }
inline std::string_view value_of(const char* base, const FieldRow& row) {
  return {base + row.value_at, row.value_bytes};
}

// The first field of that kind, or nullptr.
inline const FieldRow* find_field(const FieldTable& fields, Field wanted) {
  if (!fields.has(wanted)) return nullptr;
  for (const FieldRow& row : fields) {
    if (row.field == wanted) return &row;
  }
  return nullptr;
}

// Whether the comma-separated value holds `token`, ignoring case.
inline bool list_holds(std::string_view list, std::string_view token) {
  while (!list.empty()) {
    if (equals_ignoring_case(next_list_element(list), token)) return true;
  }
  return false;
}

namespace detail {

// llhttp's callbacks take notes here; positions are relative to `base`, set for each run.
class HeadScan {
 public:
  void start(llhttp_type_t type, FieldTable* fields) {
    llhttp_init(&parser_, type, &settings());
    parser_.data = this;
    fields_ = fields;
    fields_->count = fields_->seen = 0;
    fields_->connection_names = false;
    text_at_ = text_bytes_ = 0;
    fed_ = 0;
    overflow_ = false;
  }

  // Runs llhttp over what is new in [base, base + bytes), the message's first byte being at base.
  HeadResult run(const char* base, std::size_t bytes) {
    base_ = base;
    const llhttp_errno_t error = llhttp_execute(&parser_, base + fed_, bytes - fed_);
    fed_ = bytes;
    if (error == HPE_OK) return {};
    if (error == HPE_PAUSED) {
      if (overflow_) return refuse(HeadError::too_many_fields, "too many header fields");
      HeadResult done{HeadResult::Status::done, HeadError::none, {}, 0};
      done.head_bytes = static_cast<std::size_t>(llhttp_get_error_pos(&parser_) - base);
      return done;
    }
    const char* reason = llhttp_get_error_reason(&parser_);
    return refuse(HeadError::malformed, reason == nullptr ? "not HTTP/1.1" : reason);
  }

  static HeadResult refuse(HeadError error, std::string_view why) {
    return {HeadResult::Status::failed, error, why, 0};
  }

  // Walks over the lines from `at` (behind the start line): each must be `name ":" OWS value OWS CRLF` with nothing
  // between that llhttp passed over (a fold, a bare LF), up to the empty line at `head_bytes`. Fills the values in.
  const char* check_lines(const char* base, std::size_t at, std::size_t head_bytes) {
    for (std::uint32_t i = 0; i < fields_->count; ++i) {
      FieldRow& row = fields_->rows[i];
      if (row.name_at != at || row.name_bytes == 0) return "a header line is folded or has no name";
      std::size_t from = at + row.name_bytes;
      if (base[from] != ':') return "white space before a colon";
      from += 1;
      const std::size_t to = find_control(base, from, head_bytes);
      if (to + 1 >= head_bytes || base[to] != '\r' || base[to + 1] != '\n') return "a line end that is not CRLF";
      const std::string_view value = trim_blanks({base + from, to - from});
      row.value_at = static_cast<std::uint32_t>(value.data() - base);
      row.value_bytes = static_cast<std::uint32_t>(value.size());
      row.field = classify_field({base + row.name_at, row.name_bytes});
      fields_->seen |= 1u << static_cast<unsigned>(row.field);
      at = to + 2;
    }
    if (at + 2 != head_bytes || base[at] != '\r' || base[at + 1] != '\n') return "the head does not end in CRLF CRLF";
    return nullptr;
  }

  const llhttp_t& parser() const { return parser_; }
  std::uint32_t text_at() const { return text_at_; }  // the target, or the reason phrase
  std::uint32_t text_bytes() const { return text_bytes_; }

 private:
  static HeadScan& self(llhttp_t* parser) { return *static_cast<HeadScan*>(parser->data); }
  std::uint32_t offset(const char* at) const { return static_cast<std::uint32_t>(at - base_); }

  static int on_text(llhttp_t* parser, const char* at, std::size_t bytes) {
    HeadScan& scan = self(parser);
    if (scan.text_bytes_ == 0) scan.text_at_ = scan.offset(at);
    scan.text_bytes_ += static_cast<std::uint32_t>(bytes);
    return 0;
  }
  // A name may come in pieces; values are found by check_lines(), which would have to look at them anyway. Fields too
  // many are told at the head's end: a piece of a name can't be told from the beginning of what is none.
  static int on_name(llhttp_t* parser, const char* at, std::size_t bytes) {
    HeadScan& scan = self(parser);
    FieldTable& fields = *scan.fields_;
    const std::uint32_t from = scan.offset(at);
    if (fields.count > 0) {
      FieldRow& last = fields.rows[fields.count - 1];
      if (last.name_at + last.name_bytes == from) {
        last.name_bytes += static_cast<std::uint32_t>(bytes);
        return 0;
      }
    }
    if (fields.count == kMaxFields) {
      scan.overflow_ = true;
      return 0;
    }
    fields.rows[fields.count++] = FieldRow{from, static_cast<std::uint32_t>(bytes), 0, 0, Field::other};
    return 0;
  }
  static int on_head_complete(llhttp_t*) { return HPE_PAUSED; }

  static const llhttp_settings_t& settings() {
    static const llhttp_settings_t made = [] {
      llhttp_settings_t s;
      llhttp_settings_init(&s);
      s.on_url = on_text;
      s.on_status = on_text;
      s.on_header_field = on_name;
      s.on_headers_complete = on_head_complete;
      return s;
    }();
    return made;
  }

  llhttp_t parser_;
  FieldTable* fields_ = nullptr;
  const char* base_ = nullptr;
  std::size_t fed_ = 0;
  std::uint32_t text_at_ = 0;
  std::uint32_t text_bytes_ = 0;
  bool overflow_ = false;
};

// What Content-Length and Transfer-Encoding say together.
struct LengthFields {
  const char* malformed = nullptr;  // why it is 400 (or 502)
  bool unknown_coding = false;
  bool has_length = false;
  bool chunked = false;
  std::uint64_t length = 0;
};

inline LengthFields read_length_fields(const char* base, const FieldTable& fields, bool http_1_0) {
  LengthFields out;
  if (!fields.has(Field::content_length) && !fields.has(Field::transfer_encoding)) return out;
  bool has_coding = false;
  for (const FieldRow& row : fields) {
    if (row.field != Field::content_length && row.field != Field::transfer_encoding) continue;
    const std::string_view value = value_of(base, row);
    if (row.field == Field::content_length) {
      if (out.has_length) out.malformed = "Content-Length twice";
      out.has_length = true;
      const auto length = parse_decimal(value);
      if (!length) out.malformed = "Content-Length is not a number";
      out.length = length.value_or(0);
    } else {
      if (has_coding) out.malformed = "Transfer-Encoding twice";
      has_coding = true;
      out.chunked = equals_ignoring_case(value, "chunked");
      if (!out.chunked) {
        // A list of real codings that ends in chunked is well-formed, but not one that we can undo.
        std::string_view list = value;
        const std::string_view first = next_list_element(list);
        const bool known = equals_ignoring_case(first, "gzip") || equals_ignoring_case(first, "deflate") ||
                           equals_ignoring_case(first, "compress") || equals_ignoring_case(first, "x-gzip");
        if (known && (list.empty() || equals_ignoring_case(trim_blanks(list), "chunked"))) {
          out.unknown_coding = true;
        } else {
          out.malformed = "Transfer-Encoding is not chunked";
        }
      }
    }
  }
  if (has_coding && out.has_length) out.malformed = "both Content-Length and Transfer-Encoding";
  if (has_coding && http_1_0) out.malformed = "Transfer-Encoding in HTTP/1.0";
  return out;
}

// RFC 9112 9.3: HTTP/1.1 stays open unless told to close, HTTP/1.0 closes unless told to stay. Notes whether the
// Connection fields name other fields, which few do.
inline bool read_connection(const char* base, FieldTable& fields, bool http_1_0) {
  if (!fields.has(Field::connection)) return !http_1_0;
  bool close = false;
  bool keep = false;
  for (const FieldRow& row : fields) {
    if (row.field != Field::connection) continue;
    std::string_view list = value_of(base, row);
    while (!list.empty()) {
      const std::string_view option = next_list_element(list);
      if (equals_ignoring_case(option, "keep-alive")) {
        keep = true;
      } else if (equals_ignoring_case(option, "close")) {
        close = true;
      } else if (!option.empty()) {
        fields.connection_names = true;
      }
    }
  }
  return !close && (!http_1_0 || keep);
}

// RFC 9110 7.2: host [":" port], with no user, path, list or space in it.
inline const char* check_host(std::string_view host) {
  if (host.empty()) return "Host is empty";
  std::size_t at = 0;
  if (host[0] == '[') {
    at = host.find(']');
    if (at == std::string_view::npos || at < 3) return "Host is not a host";
    for (const char c : host.substr(1, at - 1)) {
      if (hex_value(c) < 0 && c != ':' && c != '.') return "Host is not a host";
    }
    at += 1;
  } else {
    while (at < host.size() && host[at] != ':') {
      const char c = to_lower(host[at]);
      if (!is_digit(c) && !(c >= 'a' && c <= 'z') && c != '-' && c != '.' && c != '_' && c != '~') {
        return "Host is not a host";
      }
      at += 1;
    }
    if (at == 0) return "Host is empty";
  }
  if (at == host.size()) return nullptr;
  const std::string_view port = host.substr(at + 1);
  if (host[at] != ':' || port.size() > 5) return "Host is not a host";
  for (const char c : port) {
    if (!is_digit(c)) return "Host is not a host";
  }
  return nullptr;
}

// What may stand in a target as it is: visible ASCII but for the characters that RFC 3986 excludes, `#` and `\\`.
constexpr std::array<bool, 256> make_target_bytes() {
  std::array<bool, 256> plain{};
  for (std::size_t c = 0x21; c < 0x7f; ++c) plain[c] = true;
  for (const char c : std::string_view("#\\\"<>^`{|}")) plain[static_cast<unsigned char>(c)] = false;
  return plain;
}
inline constexpr std::array<bool, 256> kTargetBytes = make_target_bytes();

// Origin form (RFC 9112 3.2.1), and nothing that another reader could see a second meaning in.
inline const char* check_target(std::string_view target) {
  if (target.empty() || target[0] != '/') return "the target is not an absolute path";
  bool escapes = false;
  for (const char c : target) {
    if (!kTargetBytes[static_cast<unsigned char>(c)]) return "a byte in the target that must be escaped";
    escapes |= c == '%';
  }
  if (!escapes) return nullptr;
  for (std::size_t i = target.find('%'); i != std::string_view::npos; i = target.find('%', i + 1)) {
    const std::string_view hex = target.substr(i + 1, 2);
    if (hex.size() != 2 || hex_value(hex[0]) < 0 || hex_value(hex[1]) < 0) return "a broken escape in the target";
    if (hex[0] < '2' || hex == "7f" || hex == "7F") return "a control character in the target";
  }
  return nullptr;
}

}  // namespace detail

// Reads one request's head.
class RequestReader {
 public:
  void start(FieldTable* fields) {
    fields_ = fields;
    scan_.start(HTTP_REQUEST, fields);
  }

  // `base` is the request's first byte (empty lines before it are the caller's), `bytes` all that has come since.
  HeadResult feed(const char* base, std::size_t bytes, RequestHead& head) {
    HeadResult result = scan_.run(base, bytes);
    if (result.status != HeadResult::Status::done) return result;
    const llhttp_t& parser = scan_.parser();
    const std::string_view method = llhttp_method_name(static_cast<llhttp_method_t>(parser.method));
    head = RequestHead{};
    head.method = parser.method;
    head.http_1_0 = parser.http_minor == 0;
    head.target_at = scan_.text_at();
    head.target_bytes = scan_.text_bytes();
    head.head_bytes = static_cast<std::uint32_t>(result.head_bytes);
    const std::size_t version_at = head.target_at + head.target_bytes + 1;
    if (std::string_view(base, method.size()) != method || base[method.size()] != ' ' ||
        head.target_at != method.size() + 1 || base[version_at - 1] != ' ') {
      return bad("white space in the request line");
    }
    const std::string_view line_end(base + version_at, 10);
    if (line_end != "HTTP/1.1\r\n" && line_end != "HTTP/1.0\r\n") return bad("the version is not HTTP/1.1 or HTTP/1.0");
    if (const char* why = scan_.check_lines(base, version_at + 10, result.head_bytes)) return bad(why);
    if (head.method == HTTP_CONNECT) return bad("CONNECT asks for a tunnel");
    if (const char* why = detail::check_target({base + head.target_at, head.target_bytes})) return bad(why);
    return read_meaning(base, head, result);
  }

 private:
  static HeadResult bad(const char* why) { return detail::HeadScan::refuse(HeadError::malformed, why); }

  HeadResult read_meaning(const char* base, RequestHead& head, HeadResult result) {
    const detail::LengthFields lengths = detail::read_length_fields(base, *fields_, head.http_1_0);
    if (lengths.malformed != nullptr) return bad(lengths.malformed);
    if (lengths.unknown_coding) head.refusal = HeadError::unknown_coding;
    std::uint32_t hosts = 0;
    for (const FieldRow& row : *fields_) {
      if (row.field == Field::host) {
        hosts += 1;
        if (const char* why = detail::check_host(value_of(base, row))) return bad(why);
      } else if (row.field == Field::expect) {
        const bool known = equals_ignoring_case(value_of(base, row), "100-continue") && !head.expects_continue;
        if (!known && head.refusal == HeadError::none) head.refusal = HeadError::bad_expectation;
        head.expects_continue = known;
      }
    }
    if (hosts > 1) return bad("Host twice");
    if (hosts == 0 && !head.http_1_0) return bad("no Host");
    // Behind a body in an unknown coding nobody knows where the next request begins.
    head.keep_alive = detail::read_connection(base, *fields_, head.http_1_0) && !lengths.unknown_coding;
    if (lengths.chunked) {
      head.framing = {Framing::Kind::chunked, 0};
    } else if (lengths.has_length && lengths.length > 0) {
      head.framing = {Framing::Kind::length, lengths.length};
    }
    // RFC 9110 10.1.1: from HTTP/1.0, or where no body follows, an expectation is ignored.
    if (head.http_1_0 || head.framing.kind == Framing::Kind::none) head.expects_continue = false;
    return result;
  }

  detail::HeadScan scan_;
  FieldTable* fields_ = nullptr;
};

// Reads one response's head. Interim ones (1xx) come out as they are; the caller reads on.
class ResponseReader {
 public:
  void start(FieldTable* fields) {
    fields_ = fields;
    scan_.start(HTTP_RESPONSE, fields);
  }

  HeadResult feed(const char* base, std::size_t bytes, ResponseHead& head) {
    HeadResult result = scan_.run(base, bytes);
    if (result.status != HeadResult::Status::done) return result;
    const llhttp_t& parser = scan_.parser();
    head = ResponseHead{};
    head.status = parser.status_code;
    head.http_1_0 = parser.http_minor == 0;
    head.head_bytes = static_cast<std::uint32_t>(result.head_bytes);
    // "HTTP/1.x NNN" and then " reason" or the line end: 12 bytes, which any complete head has.
    const std::string_view line(base, 13);
    if ((line.substr(0, 9) != "HTTP/1.1 " && line.substr(0, 9) != "HTTP/1.0 ") || head.status < 100 ||
        head.status > 599 || (line[12] != ' ' && line[12] != '\r')) {
      return bad("not a status line");
    }
    const char* line_end = static_cast<const char*>(std::memchr(base, '\r', result.head_bytes));
    if (line_end == nullptr || line_end[1] != '\n') return bad("a line end that is not CRLF");
    const std::size_t line_bytes = static_cast<std::size_t>(line_end - base);
    for (std::size_t i = 12; i < line_bytes; ++i) {  // RFC 9112 4: the reason is tabs, spaces and visible text
      if (!is_field_text(base[i])) return bad("a control character in the status line");
    }
    head.reason_at = line_bytes > 13 ? 13 : 12;
    head.reason_bytes = static_cast<std::uint32_t>(line_bytes > 13 ? line_bytes - 13 : 0);
    if (const char* why = scan_.check_lines(base, line_bytes + 2, result.head_bytes)) return bad(why);
    return read_meaning(base, head, result);
  }

 private:
  static HeadResult bad(const char* why) { return detail::HeadScan::refuse(HeadError::malformed, why); }

  HeadResult read_meaning(const char* base, ResponseHead& head, HeadResult result) {
    const detail::LengthFields lengths = detail::read_length_fields(base, *fields_, head.http_1_0);
    if (lengths.malformed != nullptr) return bad(lengths.malformed);
    if (lengths.unknown_coding) return bad("a transfer coding other than chunked");
    head.keep_alive = detail::read_connection(base, *fields_, head.http_1_0);
    if (head.status < 200 || head.status == 204 || head.status == 304) {
      // RFC 9112 6.3: never a body; a sign of one says that the two sides disagree. 304 may tell the length it saves.
      if (lengths.chunked || (lengths.has_length && lengths.length > 0 && head.status != 304)) {
        return bad("a body where none may be");
      }
    } else if (lengths.chunked) {
      head.framing = {Framing::Kind::chunked, 0};
    } else if (lengths.has_length) {
      head.framing = {Framing::Kind::length, lengths.length};
    } else {
      head.framing = {Framing::Kind::until_close, 0};
      head.keep_alive = false;
    }
    return result;
  }

  detail::HeadScan scan_;
  FieldTable* fields_ = nullptr;
};

}  // namespace nexus
