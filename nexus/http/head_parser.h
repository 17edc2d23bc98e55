// head_parser.h
// Owns:     llhttp wrapped: strict reading of request and response heads, and of the body framing that they announce.
// Promises: a line is accepted only if llhttp (strict) and our own check of it find the same name; positions are
// offsets
//           from the head's first byte, so the buffer may move between calls; feeding byte by byte gives the same
//           result; a body's length is decided here, once (RFC 9112 6.3).
// Leaves:   the first line to start_line.h, bodies to chunked.h and exchange.h; the size limit to the caller, who stops
//           feeding.
// Threads:  a reader belongs to its connection.
// Tested by: tests/head_parser_test.cpp, tests/hostile_requests_test.cpp, tests/hostile_answers_test.cpp,
//           tests/fuzz/heads.h (against tests/lib/rfc9112.h)
#pragma once

#include <llhttp.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "nexus/base/limits.h"
#include "nexus/base/simd.h"
#include "nexus/base/text.h"
#include "nexus/http/header_fields.h"
#include "nexus/http/known_lines.h"
#include "nexus/http/start_line.h"

namespace nexus {

struct HeadResult {
  enum class Status : std::uint8_t { need_more, done, failed };
  Status status = Status::need_more;
  HeadError error = HeadError::none;
  std::string_view why;        // if failed; a constant
  std::size_t head_bytes = 0;  // if done; includes the empty line
};

struct Framing {
  enum class Kind : std::uint8_t { none, length, chunked, until_close };
  Kind kind = Kind::none;
  std::uint64_t length = 0;  // if kind is length
};

struct RequestHead : RequestLine {
  using FirstLine = RequestLine;
  static constexpr llhttp_type_t kType = HTTP_REQUEST;
  bool keep_alive = true;
  bool expects_continue = false;
  std::uint32_t head_bytes = 0;
  Framing framing;
};

struct ResponseHead : StatusLine {
  using FirstLine = StatusLine;
  static constexpr llhttp_type_t kType = HTTP_RESPONSE;
  bool keep_alive = true;
  std::uint32_t head_bytes = 0;
  Framing framing;
};

inline std::string_view name_of(const char* base, const FieldRow& row) { return {base + row.name_at, row.name_bytes}; }
inline std::string_view value_of(const char* base, const FieldRow& row) {
  return {base + row.value_at, row.value_bytes};
}

// The first such field, or nullptr.
inline const FieldRow* find_field(const FieldTable& fields, Field wanted) {
  if (!fields.has(wanted)) return nullptr;
  return std::find_if(fields.begin(), fields.end(), [&](const FieldRow& row) { return row.field == wanted; });
}

namespace detail {

// Reads the field lines of a head, one by one: each must be `name ":" OWS value OWS CRLF` (llhttp tolerates folds and
// bare LFs), and llhttp must find the same name in it. A line that came before is not read again.
class HeadScan {
 public:
  // The first field line will begin at offset `fields_at`. `known` may be nullptr.
  void start(llhttp_type_t type, FieldTable* table, std::size_t fields_at, std::size_t most_fields, KnownLines* known) {
    assert(most_fields <= kMaxFields);
    type_ = type;
    parsing_ = false;
    fields_ = table;
    known_ = known;
    place_ = type == HTTP_REQUEST ? KnownLines::kRequestBegins : KnownLines::kAnswerBegins;
    most_fields_ = most_fields;
    fields_->count = fields_->seen = 0;
    fields_->connection_names = false;
    line_at_ = fed_ = fields_at;
    name_bytes_ = 0;
  }

  // Reads those bytes of [base, base + bytes) that are new since the last call.
  HeadResult run(const char* base, std::size_t bytes) {
    base_ = base;
    for (;;) {
      if (skip_known(bytes)) continue;
      const std::size_t end = find_control(base, fed_, bytes);
      if (end < bytes && base[end] != '\r') return refuse("a line end that is not CRLF");
      if (end > line_at_ && (base[line_at_] == ' ' || base[line_at_] == '\t')) return refuse("a folded field");
      if (end + 1 >= bytes) return feed(end) == HPE_OK ? HeadResult{} : refuse(reason());
      if (base[end + 1] != '\n') return refuse("a line end that is not CRLF");
      const std::size_t next = end + 2;
      if (end == line_at_) {
        const bool complete = !parsing_ || feed(next) == HPE_PAUSED;
        return complete ? HeadResult{HeadResult::Status::done, HeadError::none, {}, next} : refuse(reason());
      }
      if (fields_->count == most_fields_) {
        if (feed(next) != HPE_OK) return refuse(reason());
        return refuse("too many header fields", HeadError::too_many_fields);
      }
      FieldRow& row = fields_->rows[fields_->count];
      const KnownLines::Parts line({base + line_at_, end - line_at_});
      const bool known = known_ != nullptr && fed_ == line_at_ && known_->find(place_, line, line_at_, row);
      if (!known) {
        if (const char* why = read_line(line, row)) return refuse(why);
      }
      end_line(row, next);
    }
  }

  static HeadResult refuse(std::string_view why, HeadError error = HeadError::malformed) {
    return {HeadResult::Status::failed, error, why, 0};
  }

 private:
  // A parser that has read a first line. start_line.h reads the real one, because the versions of llhttp differ there.
  template <llhttp_type_t kType>
  static const llhttp_t& behind_line() {
    static const llhttp_t made = [] {
      constexpr std::string_view kLine = kType == HTTP_REQUEST ? "GET / HTTP/1.1\r\n" : "HTTP/1.1 200 OK\r\n";
      llhttp_t parser;
      llhttp_init(&parser, kType, &settings());
      [[maybe_unused]] const llhttp_errno_t error = llhttp_execute(&parser, kLine.data(), kLine.size());
      assert(error == HPE_OK);
      return parser;
    }();
    return made;
  }

  // True if the next line came behind the last one before.
  bool skip_known(std::size_t bytes) {
    if (known_ == nullptr || fed_ != line_at_ || fields_->count == most_fields_) return false;
    FieldRow& row = fields_->rows[fields_->count];
    const std::size_t line_bytes = known_->follow(place_, {base_, bytes}, line_at_, row);
    if (line_bytes == 0) return false;
    end_line(row, line_at_ + line_bytes);
    return true;
  }

  void end_line(const FieldRow& row, std::size_t next) {
    fields_->count += 1;
    fields_->seen |= bit_of(row.field);
    line_at_ = fed_ = next;
    name_bytes_ = 0;
  }

  // Feeds llhttp the bytes before offset `to` that are new to it.
  llhttp_errno_t feed(std::size_t to) {
    if (!parsing_) {
      parsing_ = true;
      parser_ = type_ == HTTP_REQUEST ? behind_line<HTTP_REQUEST>() : behind_line<HTTP_RESPONSE>();
      parser_.data = this;
    }
    const std::size_t from = std::exchange(fed_, to);
    return llhttp_execute(&parser_, base_ + from, to - from);
  }
  const char* reason() const {
    const char* why = llhttp_get_error_reason(&parser_);
    return why == nullptr ? "not HTTP/1.1" : why;
  }

  // Reads the line at line_at_ into a row. Returns what is wrong, or nullptr.
  [[gnu::noinline]] const char* read_line(const KnownLines::Parts& parts, FieldRow& row) {
    const std::string_view line(base_ + line_at_, parts.bytes());
    if (feed(line_at_ + line.size() + 2) != HPE_OK) return reason();
    if (name_at_ != line_at_ || name_bytes_ == 0) return "a field without a name";
    if (base_[line_at_ + name_bytes_] != ':') return "white space before a colon";
    const std::string_view value = trim_blanks(line.substr(name_bytes_ + 1));
    row.name_at = name_at_;
    row.name_bytes = name_bytes_;
    row.value_at = offset(value.data());
    row.value_bytes = static_cast<std::uint32_t>(value.size());
    row.field = classify_field(line.substr(0, name_bytes_));
    row.known = false;
    if (known_ != nullptr) known_->keep(place_, parts, row);
    return nullptr;
  }

  static HeadScan& self(llhttp_t* parser) { return *static_cast<HeadScan*>(parser->data); }
  std::uint32_t offset(const char* at) const { return static_cast<std::uint32_t>(at - base_); }

  // A name may come in pieces.
  static int on_name(llhttp_t* parser, const char* at, std::size_t bytes) {
    HeadScan& scan = self(parser);
    if (scan.name_bytes_ == 0) scan.name_at_ = scan.offset(at);
    scan.name_bytes_ += static_cast<std::uint32_t>(bytes);
    return 0;
  }
  static int on_head_complete(llhttp_t*) { return HPE_PAUSED; }

  static const llhttp_settings_t& settings() {
    static const llhttp_settings_t made = [] {
      llhttp_settings_t s;
      llhttp_settings_init(&s);
      s.on_header_field = on_name;
      s.on_headers_complete = on_head_complete;
      return s;
    }();
    return made;
  }

  llhttp_type_t type_ = HTTP_REQUEST;
  bool parsing_ = false;  // a line of this head was given to llhttp
  llhttp_t parser_;
  FieldTable* fields_ = nullptr;
  KnownLines* known_ = nullptr;
  KnownLines::Place place_ = KnownLines::kNowhere;  // of the last line
  const char* base_ = nullptr;
  std::size_t line_at_ = 0;       // where the line begins that is not complete
  std::size_t fed_ = 0;           // llhttp has what lies before it, but for lines that it need not read
  std::uint32_t name_at_ = 0;     // of that line's name, as llhttp found it
  std::uint32_t name_bytes_ = 0;  // 0: it has not begun
  std::size_t most_fields_ = kMaxFields;
};

// The meaning of Content-Length and Transfer-Encoding together.
struct LengthFields {
  const char* malformed = nullptr;  // what is wrong, if anything
  bool has_coding = false;
  bool unknown_coding = false;
  bool chunked = false;
  std::optional<std::uint64_t> length;

  // Of a body that is delimited by these fields; `none` if there is none of them.
  Framing framing() const {
    if (chunked) return {Framing::Kind::chunked, 0};
    return length ? Framing{Framing::Kind::length, *length} : Framing{};
  }
};

// A list of known codings that ends in chunked is well-formed, but Nexus can't decode it.
inline bool is_known_coding_list(std::string_view list) {
  constexpr std::array<std::string_view, 4> kCodings{"gzip", "deflate", "compress", "x-gzip"};
  const std::string_view first = next_list_element(list);
  const bool known = std::any_of(kCodings.begin(), kCodings.end(),
                                 [&](std::string_view coding) { return equals_ignoring_case(first, coding); });
  return known && (list.empty() || equals_ignoring_case(trim_blanks(list), "chunked"));
}

inline LengthFields read_length_fields(const char* base, const FieldTable& fields, bool http_1_0) {
  LengthFields out;
  if (!fields.has(Field::content_length) && !fields.has(Field::transfer_encoding)) return out;
  for (const FieldRow& row : fields) {
    const std::string_view value = value_of(base, row);
    if (row.field == Field::content_length) {
      if (out.length) out.malformed = "Content-Length twice";
      out.length = parse_decimal(value);
      if (!out.length) out.malformed = "Content-Length is not a number";
    } else if (row.field == Field::transfer_encoding) {
      if (out.has_coding) out.malformed = "Transfer-Encoding twice";
      out.has_coding = true;
      out.chunked = equals_ignoring_case(value, "chunked");
      out.unknown_coding = !out.chunked && is_known_coding_list(value);
      if (!out.chunked && !out.unknown_coding) out.malformed = "Transfer-Encoding is not chunked";
    }
  }
  if (out.has_coding && fields.has(Field::content_length)) out.malformed = "both Content-Length and Transfer-Encoding";
  if (out.has_coding && http_1_0) out.malformed = "Transfer-Encoding in HTTP/1.0";
  return out;
}

// True if the connection is kept (RFC 9112 9.3): by default in HTTP/1.1, on request in HTTP/1.0. Also sets
// connection_names.
inline bool read_connection(const char* base, FieldTable& fields, bool http_1_0) {
  if (!fields.has(Field::connection)) return !http_1_0;
  bool close = false, keep = false;
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

// Sets what the fields say. Returns what is wrong, or nullptr.
inline const char* read_fields(const char* base, FieldTable& fields, RequestHead& head) {
  const LengthFields lengths = read_length_fields(base, fields, head.http_1_0);
  if (lengths.malformed != nullptr) return lengths.malformed;
  if (lengths.unknown_coding && head.refusal == HeadError::none) head.refusal = HeadError::unknown_coding;
  std::uint32_t hosts = 0;
  for (const FieldRow& row : fields) {
    if (row.field == Field::host) {
      hosts += 1;
      const char* const why = row.known ? nullptr : check_host(value_of(base, row));
      if (why != nullptr) return why;
    } else if (row.field == Field::expect) {
      const bool known = equals_ignoring_case(value_of(base, row), "100-continue") && !head.expects_continue;
      if (!known && head.refusal == HeadError::none) head.refusal = HeadError::bad_expectation;
      head.expects_continue = known;
    }
  }
  if (hosts > 1) return "Host twice";
  if (hosts == 0 && !head.http_1_0) return "no Host";
  // After a body in an unknown coding the beginning of the next request is unknown.
  head.keep_alive = read_connection(base, fields, head.http_1_0) && !lengths.unknown_coding;
  if (lengths.length.value_or(1) > 0) head.framing = lengths.framing();
  // RFC 9110 10.1.1: an expectation is ignored in HTTP/1.0, and if there is no body.
  if (head.http_1_0 || head.framing.kind == Framing::Kind::none) head.expects_continue = false;
  return nullptr;
}

inline const char* read_fields(const char* base, FieldTable& fields, ResponseHead& head) {
  const LengthFields lengths = read_length_fields(base, fields, head.http_1_0);
  if (lengths.malformed != nullptr) return lengths.malformed;
  if (lengths.unknown_coding) return "a transfer coding other than chunked";
  head.keep_alive = read_connection(base, fields, head.http_1_0);
  if (head.status < 200 || head.status == 204 || head.status == 304) {
    // RFC 9112 6.3: these never have a body. An announced one is an error; a 304 may tell the length that it saves.
    if (lengths.chunked || (lengths.length.value_or(0) > 0 && head.status != 304))
      return "a body where none is allowed";
    return nullptr;
  }
  head.framing = lengths.framing();
  if (head.framing.kind == Framing::Kind::none) {
    head.framing.kind = Framing::Kind::until_close;
    head.keep_alive = false;
  }
  return nullptr;
}

}  // namespace detail

// Reads one head. Interim responses (1xx) are returned like others; the caller then starts again.
template <class Head>
class HeadReader {
 public:
  // More than `most_fields` (at most kMaxFields) fields: the error is too_many_fields. `known`: the lines that this
  // thread knows; nullptr: each is read.
  void start(FieldTable* fields, std::size_t most_fields = kMaxFields, KnownLines* known = nullptr) {
    fields_ = fields;
    known_ = known;
    most_fields_ = most_fields;
    line_seen_ = fields_at_ = 0;
  }

  // The bytes of the first line with its CRLF; 0: its end has not come yet.
  std::size_t line_bytes() const { return fields_at_; }

  // `base` is the message's first byte (the caller skips empty lines before it); `bytes` counts all received since.
  HeadResult feed(const char* base, std::size_t bytes, Head& head) {
    if (fields_at_ == 0) {
      const HeadResult line = read_line(base, bytes);
      if (line.status != HeadResult::Status::done) return line;
      fields_at_ = line.head_bytes;
      scan_.start(Head::kType, fields_, fields_at_, most_fields_, known_);
    }
    const HeadResult result = scan_.run(base, bytes);
    if (result.status != HeadResult::Status::done) return result;
    head = head_;
    head.head_bytes = static_cast<std::uint32_t>(result.head_bytes);
    const char* why = detail::read_fields(base, *fields_, head);
    return why == nullptr ? result : scan_.refuse(why);
  }

 private:
  using FirstLine = typename Head::FirstLine;

  // Reads the first line into head_ once its end has come; `head_bytes` of the result is the offset behind it.
  HeadResult read_line(const char* base, std::size_t bytes) {
    const std::size_t end = find_control(base, line_seen_, bytes);
    line_seen_ = end;
    const std::string_view line(base, end);
    head_ = Head{};
    FirstLine& said = head_;
    const bool whole = end + 1 < bytes && base[end] == '\r' && base[end + 1] == '\n';
    if (!whole || known_ == nullptr || !known_->find_first(line, said)) {
      if (!may_begin(line, head_)) return scan_.refuse("it does not begin as HTTP/1.1 does");
      if (!whole && end < bytes && (base[end] != '\r' || end + 1 < bytes)) {
        return scan_.refuse("a line end that is not CRLF");
      }
      if (!whole) return {};
      const LineResult result = read_start_line(line, said);
      if (result.why != nullptr) return scan_.refuse(result.why, result.error);
      if (known_ != nullptr) known_->keep_first(line, said);
    }
    return {HeadResult::Status::done, HeadError::none, {}, end + 2};
  }

  detail::HeadScan scan_;
  FieldTable* fields_ = nullptr;
  KnownLines* known_ = nullptr;
  std::size_t most_fields_ = kMaxFields;
  Head head_;                  // of the first line alone
  std::size_t line_seen_ = 0;  // bytes of the first line that were looked at
  std::size_t fields_at_ = 0;  // 0: the first line is not complete
};

using RequestReader = HeadReader<RequestHead>;
using ResponseReader = HeadReader<ResponseHead>;

// The reader of one head, and the table that it fills.
template <class Head>
struct HeadParts {
  HeadReader<Head> reader;
  FieldTable fields;
};

}  // namespace nexus
