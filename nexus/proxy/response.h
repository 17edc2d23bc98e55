// response.h
// Owns:     a backend's response on its way to the client: its head while it is read, its body with the usage read in
//           passing, and the writes to the client with their byte count.
// Promises: bytes in, one write out; a response never looks whole if the backend's was not; interim heads are skipped;
//           a response that comes in pieces is read as one that comes whole; payload is counted, heads and framing are
//           not.
// Leaves:   framing to http/body_framing.h, token counts to api/usage_scan.h, decisions and deadlines to exchange.h.
// Threads:  a part of one exchange.
// Tested by: tests/courses_test.cpp, tests/hostile_answers_test.cpp, tests/sim, tests/e2e/stream.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "nexus/api/errors.h"
#include "nexus/api/json_reader.h"
#include "nexus/api/usage_scan.h"
#include "nexus/base/buffer.h"
#include "nexus/base/limits.h"
#include "nexus/base/object_pool.h"
#include "nexus/http/body_framing.h"
#include "nexus/http/head_parser.h"
#include "nexus/http/head_writer.h"
#include "nexus/http/header_fields.h"
#include "nexus/metrics/slab.h"
#include "nexus/net/connection.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {
class Response {
 public:
  enum class Step : std::uint8_t {
    goes_on,        // there is more of the body to come
    whole,          // the write holds the end
    broken,         // bad framing; the write holds the payload before it
    out_of_memory,  // and bytes are lost
  };

  void reset() {
    framing_ = Framing{};
    scan_.drop_memory();
    first_ns_ = last_ns_ = -1;
  }

  // Starts a response. `asked_stream`: the request asks for a stream; `remove_usage_event`: Nexus asked for the token
  // counts, the client did not.
  void begin(const Endpoint& endpoint, const ResponseHead& head, const HeadView& view, bool to_http_1_0,
             bool asked_stream, bool remove_usage_event) {
    endpoint_ = &endpoint;
    status_ = head.status;
    keep_alive_ = head.keep_alive;
    excess_ = false;
    stream_ = stream_kind(view);
    first_ns_ = last_ns_ = -1;
    body_.start(head.framing);
    scan_kind_ = scan_kind(head, view);
    untyped_ =
        asked_stream && scan_kind_ == UsageScan::Kind::json && find_field(*view.fields, Field::content_type) == nullptr;
    removing_ = remove_usage_event && (untyped_ || scan_kind_ == UsageScan::Kind::event_stream);
    start_scan();
    framing_ = client_framing(head, to_http_1_0, removing_);
  }

  // Puts a piece of the body into `write`, behind `head`. The write is valid until the next call.
  Step feed(BlockPool& blocks, JsonReader& json, Ns now, std::string_view head, char* data, std::size_t bytes,
            ClientWrite& write) {
    const BodyDecoder::Piece piece = body_.feed(data, bytes);
    excess_ = piece.excess;
    if (untyped_ && piece.bytes > 0) [[unlikely]]
      note_type({piece.data, piece.bytes});
    const std::uint64_t events_before = scan_.events();
    UsageScan::Out out{{}, {piece.data, piece.bytes}};
    const bool at_once = !head.empty() && piece.done && !piece.failed && !endpoint_->row().response.has_ids;
    if (scan_kind_ == UsageScan::Kind::json && at_once) {
      // The usual case: the body came in one piece.
      scan_.read_whole(json, {piece.data, piece.bytes});
    } else if (!scan_.feed(blocks, json, piece.data, piece.bytes, piece.done && !piece.failed, out)) {
      return Step::out_of_memory;
    }
    note_time(now, piece.bytes, events_before);
    write.add(head);
    write.add_payload(is_chunked(), out.held, out.piece);
    if (piece.failed) return Step::broken;
    if (!piece.done) return Step::goes_on;
    write.add_end(is_chunked());
    return Step::whole;
  }

  // The end of the connection ended the body. Bytes that were held are sent, or are the usage event and dropped.
  void end(BlockPool& blocks, JsonReader& json, Ns now, ClientWrite& write) {
    const std::uint64_t events_before = scan_.events();
    UsageScan::Out rest;
    scan_.feed(blocks, json, nullptr, 0, true, rest);
    note_time(now, 0, events_before);
    write.add_payload(is_chunked(), rest.held, {});
    write.add_end(is_chunked());
  }

  // True if the end of the backend's connection ends the body (RFC 9112 6.3).
  bool ends_with_connection() const { return body_.ends_with_connection(); }

  // Copies token counts and times into the record, at the end; `asked_ns`: when the request was complete.
  void note_usage(RequestRecord& record, Ns asked_ns) const {
    if (!is_success()) return;
    const Usage told = scan_.usage();
    record.prompt_tokens = told.prompt_tokens;
    record.completion_tokens = told.completion_tokens;
    if (told.cached_tokens <= told.prompt_tokens) record.cached_tokens = told.cached_tokens;
    if (told.reasoning_tokens <= told.completion_tokens) record.reasoning_tokens = told.reasoning_tokens;
    record.stream = is_stream();  // one without a Content-Type may have shown it with its first bytes
    if (!record.stream || first_ns_ < 0) return;
    record.first_byte_ns = first_ns_ - asked_ns;
    if (told.completion_tokens > 1) record.per_token_ns = (last_ns_ - first_ns_) / (told.completion_tokens - 1);
  }
  // A 2xx that is an error nonetheless: a stream that tells one, or ended (`whole`) without an event; or a 200 without
  // a byte, for a request whose answer is JSON. Other answers may be empty: a transcript of silence, a model deleted.
  bool is_error_in_disguise(bool whole) const {
    if (scan_.told_error()) return true;
    const bool of_json = status_ == 200 && endpoint_->body == BodyFormat::json;
    return whole && first_ns_ < 0 && (of_json || (is_success() && is_stream()));
  }
  // After the end of a stream: true if it had an end mark to send, and did not.
  bool lacks_end_mark() const { return has_end_mark_ && !scan_.ended_well(); }
  bool lacks_usage() const {
    return is_success() && endpoint_->tells == Tells::counts && !scan_.told_usage() && !usage_lost();
  }
  // True if the usage could not be read for want of memory.
  bool usage_lost() const { return is_success() && !scan_.told_usage() && scan_.out_of_memory(); }

  std::uint16_t status() const { return status_; }
  bool is_success() const { return status_ / 100 == 2; }
  bool is_stream() const { return UsageScan::is_stream(stream_); }  // of events, or of lines
  // True if its events are followed: only then it is known where one of Nexus's own may stand, and with which number.
  bool follows_events() const { return UsageScan::is_stream(scan_kind_); }
  StreamEnd stream_end() const { return {scan_.events(), scan_.in_line()}; }
  std::uint64_t take_id() { return scan_.take_id(); }
  const ResponseShape* shape() const { return endpoint_->response(); }
  const Framing& framing() const { return framing_; }  // towards the client
  bool is_chunked() const { return framing_.kind == Framing::Kind::chunked; }
  bool lasts_until_close() const { return framing_.kind == Framing::Kind::until_close; }
  // When the answer began to say something: with the first event of a stream that is no comment, else with the first
  // byte of the body. -1: not yet.
  Ns first_ns() const { return first_ns_; }
  // True if the backend's connection can carry another request after this whole response.
  bool leaves_connection() const { return keep_alive_ && !excess_ && !ends_with_connection(); }

 private:
  void note_time(Ns now, std::size_t bytes, std::uint64_t events_before) {
    if (UsageScan::is_stream(scan_kind_) ? scan_.events() == events_before : bytes == 0) return;
    if (first_ns_ < 0) first_ns_ = now;
    last_ns_ = now;
  }

  void start_scan() {
    has_end_mark_ = UsageScan::is_stream(scan_kind_);
    scan_.start(scan_kind_, endpoint_->response(), removing_ && scan_kind_ == UsageScan::Kind::event_stream);
  }

  // A body without Content-Type is a stream if it begins as one; `piece` is its first.
  [[gnu::cold]] void note_type(std::string_view piece) {
    untyped_ = false;
    for (const std::string_view line : {"data:", "event:", ":", "id:", "retry:"}) {
      if (piece.starts_with(line) || line.starts_with(piece)) stream_ = UsageScan::Kind::event_stream;
    }
    if (!is_stream()) return;
    scan_kind_ = stream_;
    start_scan();
  }

  // By its Content-Type; none: it is no stream.
  UsageScan::Kind stream_kind(const HeadView& head) const {
    const FieldRow* row = find_field(*head.fields, Field::content_type);
    const std::string_view type = row == nullptr ? std::string_view() : value_of(head.base, *row);
    if (starts_with_ignoring_case(type, "text/event-stream")) return UsageScan::Kind::event_stream;
    const bool lines = endpoint_->row().framing == StreamFraming::lines;
    return lines && starts_with_ignoring_case(type, "application/x-ndjson") ? UsageScan::Kind::lines
                                                                            : UsageScan::Kind::none;
  }

  UsageScan::Kind scan_kind(const ResponseHead& head, const HeadView& view) const {
    if (head.status / 100 != 2 || head.framing.kind == Framing::Kind::none) return UsageScan::Kind::none;
    if (endpoint_->response() == nullptr) return UsageScan::Kind::none;
    const FieldRow* coding = find_field(*view.fields, Field::content_encoding);
    if (coding != nullptr && !equals_ignoring_case(value_of(view.base, *coding), "identity")) {
      return UsageScan::Kind::none;
    }
    return is_stream() ? stream_ : UsageScan::Kind::json;
  }

  static Framing client_framing(const ResponseHead& head, bool to_http_1_0, bool remove_usage_event) {
    if (head.framing.kind == Framing::Kind::none) {
      // 204 and 304 have no Content-Length; every other response without a body has 0 (RFC 9110 8.6).
      if (head.status == 204 || head.status == 304) return {};
      return {Framing::Kind::length, 0};
    }
    const bool length_holds = !remove_usage_event;
    if (head.framing.kind == Framing::Kind::length && length_holds) return head.framing;
    return {to_http_1_0 ? Framing::Kind::until_close : Framing::Kind::chunked, 0};
  }

  BodyDecoder body_;
  UsageScan scan_;
  UsageScan::Kind scan_kind_ = UsageScan::Kind::none;
  const Endpoint* endpoint_ = nullptr;
  Framing framing_;
  std::uint16_t status_ = 0;
  bool keep_alive_ = false;
  bool excess_ = false;                             // bytes follow the body's end
  UsageScan::Kind stream_ = UsageScan::Kind::none;  // by its type
  bool untyped_ = false;                            // it may be an event stream: its first bytes tell
  bool removing_ = false;                           // the usage event that Nexus asked for
  bool has_end_mark_ = false;
  Ns first_ns_ = -1;
  Ns last_ns_ = -1;  // of the last event or byte
};

class ResponseHeadReader {
 public:
  enum class Status : std::uint8_t { need_more, done, failed, too_large, too_many_fields, out_of_memory };

  struct Result {
    Status status = Status::need_more;
    std::string_view why;  // if failed: a constant text
    ResponseHead head;     // if done; it begins at `data`, and the body's first bytes follow it
    char* data = nullptr;
    std::size_t bytes = 0;
  };

  // Reads received bytes; once done, the fields are valid until clear().
  Result feed(ObjectPool<HeadParts<ResponseHead>>& heads, KnownLines& known, BlockPool& blocks,
              const ServerSettings& limits, char* data, std::size_t bytes) {
    if (!parts_) {
      parts_ = heads.take();
      if (!parts_) return failed(Status::out_of_memory);
      parts_->reader.start(&parts_->fields, limits.max_fields, &known);
    }
    if (!partial_.empty()) {
      if (!partial_.append(blocks, {data, bytes})) return failed(Status::out_of_memory);
      data = partial_.data();
      bytes = partial_.size();
    }
    for (;;) {
      Result told;
      const HeadResult result = parts_->reader.feed(data, bytes, told.head);
      if (result.error == HeadError::too_many_fields) return failed(Status::too_many_fields, result.why);
      if (result.status == HeadResult::Status::failed) return failed(Status::failed, result.why);
      const std::size_t head_bytes = result.status == HeadResult::Status::need_more ? bytes : result.head_bytes;
      if (head_bytes > limits.max_header_bytes) return failed(Status::too_large, "its head is larger than max_header");
      if (result.status == HeadResult::Status::need_more) return keep_partial(blocks, data, bytes);
      if (told.head.status >= 200) {
        told.status = Status::done;
        told.data = data;
        told.bytes = bytes;
        return told;
      }
      // RFC 9110 15.2: interim responses are skipped. 101 was not asked for.
      if (told.head.status == 101 || ++interim_heads_ > kMaxInterimHeads) {
        return failed(Status::failed, "an interim answer that was not asked for");
      }
      data += result.head_bytes;
      bytes -= result.head_bytes;
      parts_->reader.start(&parts_->fields, limits.max_fields, &known);
      if (bytes == 0) {
        partial_.clear();
        return {};
      }
    }
  }

  HeadView view(const Result& result) const { return {result.data, &parts_->fields, result.head.head_bytes}; }

  void clear() {
    parts_.reset();
    partial_.clear();
    interim_heads_ = 0;
  }

 private:
  static Result failed(Status status, std::string_view why = {}) {
    Result result;
    result.status = status;
    result.why = why;
    return result;
  }

  // A head comes whole in the first read, except from slow or strange backends: only then is the part kept.
  Result keep_partial(BlockPool& blocks, const char* data, std::size_t bytes) {
    if (partial_.empty()) {
      if (!partial_.append(blocks, {data, bytes})) return failed(Status::out_of_memory);
    } else {
      partial_.consume(partial_.size() - bytes);  // interim heads before it
    }
    return {};
  }

  ObjectPool<HeadParts<ResponseHead>>::Lease parts_;
  Buffer partial_;
  std::uint32_t interim_heads_ = 0;
};

// The Retry-After of a backend, if it is given in seconds.
inline std::optional<Ns> retry_after_of(const HeadView& head) {
  const FieldRow* row = find_field(*head.fields, Field::retry_after);
  if (row == nullptr) return std::nullopt;
  const auto seconds = parse_decimal(value_of(head.base, *row));
  if (!seconds) return std::nullopt;  // a date: the two hosts' clocks may differ
  return static_cast<Ns>(std::min<std::uint64_t>(*seconds, 3600)) * kSecond;
}

template <class Net>
class ClientResponse {
 public:
  explicit ClientResponse(WorkerContext<Net>& context) : context_(context) {}
  ClientResponse(const ClientResponse&) = delete;
  ClientResponse& operator=(const ClientResponse&) = delete;

  void attach(Connection<Net>& connection) { connection_ = &connection; }

  // Starts a response to a new request.
  // `cors_lines`: of the response's head; they stay in place until it was written.
  void open(bool http_1_0, bool keep_alive, std::string_view cors_lines) {
    cors_lines_ = cors_lines;
    rate_lines_ = {};
    http_1_0_ = http_1_0;
    keep_alive_ = keep_alive;
  }

  bool http_1_0() const { return http_1_0_; }
  bool keep_alive() const { return keep_alive_; }
  std::string_view cors_lines() const { return cors_lines_; }
  // Of the limits of the client's key; they stay in place too.
  std::string_view rate_lines() const { return rate_lines_; }
  void set_rate_lines(std::string_view lines) { rate_lines_ = lines; }
  bool cut() const { return cut_; }
  bool has_begun() const { return begun_; }  // a first byte was written
  bool waits() const { return connection_->pending() > 0; }
  bool out_of_memory() const { return connection_->out_of_memory(); }  // the reason of a failed send
  std::uint64_t sent_bytes() const { return sent_bytes_; }

  // Keeps `write` in place of sending it. False if the budget, memory or kHeldAnswerBytes has no room for it; then only
  // what was held before is held.
  [[gnu::cold]] bool hold(ClientWrite& write) {
    const std::span<iovec> parts = write.parts();
    std::size_t bytes = held_.size();
    for (const iovec& part : parts) bytes += part.iov_len;
    if (bytes > kHeldAnswerBytes || !held_share_.grow_to(context_.budget, bytes)) return false;
    if (!held_.reserve(context_.blocks, bytes - held_.size())) return false;
    for (const iovec& part : parts) held_.append(context_.blocks, {static_cast<char*>(part.iov_base), part.iov_len});
    held_payload_bytes_ += write.payload_bytes();
    return true;
  }
  bool holds() const { return !held_.empty(); }
  std::string_view held() const { return held_.view(); }

  // Sends what is held.
  [[gnu::cold]] bool send_held() {
    sent_bytes_ += held_payload_bytes_;
    const bool sent = note(connection_->write(context_.net, context_.blocks, held_.view()));
    drop_held();
    return sent;
  }
  void drop_held() {
    held_.clear();
    held_share_.give_back();
    held_payload_bytes_ = 0;
  }

  // Puts what is held aside as the answer for a client that gets no better one; an earlier one is dropped.
  [[gnu::cold]] void keep_held() {
    kept_ = std::move(held_);
    kept_payload_bytes_ = held_payload_bytes_;
    kept_share_.take_over(held_share_);
    drop_held();
  }
  bool keeps() const { return !kept_.empty(); }
  [[gnu::cold]] bool send_kept() {
    sent_bytes_ = kept_payload_bytes_;
    const bool sent = note(connection_->write(context_.net, context_.blocks, kept_.view()));
    drop_kept();
    return sent;
  }
  void drop_kept() {
    kept_.clear();
    kept_share_.give_back();
  }

  // Closes the connection after this response.
  void end_connection() { keep_alive_ = false; }
  // Resets the connection: a FIN would make the part that was sent look whole.
  void cut_connection() {
    keep_alive_ = false;
    cut_ = true;
  }

  // False if the connection or memory failed.
  bool send(ClientWrite& write) {
    sent_bytes_ += write.payload_bytes();
    return note(connection_->write(context_.net, context_.blocks, write.parts()));
  }

  // Sends an error of our own as the whole response.
  bool send_error(ApiError refusal, ErrorShape shape, const ErrorText& text) {
    OwnResponse answer;
    answer.request_id = text.request_id;
    answer.date_line = context_.date_line();
    answer.cors_lines = cors_lines_;
    answer.extra_fields = rate_lines_;
    answer.http_1_0 = http_1_0_;
    answer.keep_alive = keep_alive_;
    context_.text.clear();
    append_own_error(context_.text, refusal, shape, text, answer, true);
    sent_bytes_ += context_.text.size() - (context_.text.find("\r\n\r\n") + 4);
    return note(connection_->write(context_.net, context_.blocks, context_.text));
  }

  // Sends an error as the last event of a chunked stream; the end of the body does not follow. For a client that takes
  // nothing, it does not count as a movement.
  bool send_error_event(const ApiErrorRow& row, const Endpoint& endpoint, StreamEnd end, std::string_view request_id) {
    context_.text.clear();
    append_error_event(context_.text, row, endpoint.row(), end, {.request_id = request_id});
    ClientWrite write;
    write.add_payload(true, context_.text, {});
    const std::size_t waiting = connection_->pending();
    const bool sent = connection_->write(context_.net, context_.blocks, write.parts());
    if (waiting > 0) waiting_bytes_ += connection_->pending() - waiting;
    return sent;
  }

  // Nothing was sent: the bytes given to send() do not count.
  void forget_unsent() { sent_bytes_ = 0; }

  // True if the number of waiting bytes has changed since the last call.
  bool has_moved() {
    if (connection_->pending() == waiting_bytes_) return false;
    waiting_bytes_ = connection_->pending();
    return true;
  }
  void forget_waiting() { waiting_bytes_ = 0; }

  // Prepares for the next request.
  void reset() {
    drop_held();
    drop_kept();
    cut_ = begun_ = false;
    waiting_bytes_ = 0;
    sent_bytes_ = 0;
  }

 private:
  bool note(bool written) {
    begun_ |= written;
    return written;
  }

  WorkerContext<Net>& context_;
  Connection<Net>* connection_ = nullptr;
  std::string_view cors_lines_, rate_lines_;
  bool http_1_0_ = false;
  bool keep_alive_ = true;
  bool cut_ = false;
  bool begun_ = false;
  std::size_t waiting_bytes_ = 0;  // when the client's deadline was set
  std::uint64_t sent_bytes_ = 0;
  Buffer held_;  // of an answer that has not begun for the client
  Buffer kept_;  // a whole answer that is sent if no backend gives a better one
  BodyShare held_share_, kept_share_;
  std::size_t held_payload_bytes_ = 0;
  std::size_t kept_payload_bytes_ = 0;
};

}  // namespace nexus
