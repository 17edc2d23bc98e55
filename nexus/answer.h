// answer.h
// Owns:     an answer on its way from a backend to the client: how its body is framed there, and the usage that is read
//           in passing.
// Promises: bytes in, one write out; it never looks whole where the backend's was not; what is read of an answer cut in
//           pieces is the same as of one that came whole.
// Leaves:   the framings themselves to relay.h, token counts to usage.h, sockets and decisions to exchange.h.
// Threads:  parts of one exchange.
#pragma once

#include <cassert>
#include <cstdint>
#include <string_view>

#include "bytes.h"
#include "heads.h"
#include "json.h"
#include "metrics.h"
#include "relay.h"
#include "usage.h"

namespace nexus {

class Answer {
 public:
  enum class Step : std::uint8_t {
    goes_on,        // more of the body is to come
    holds_back,     // the body has ended, but not all of it is in the write: end() tells the rest
    whole,          // the write holds the end
    broken,         // the backend's framing is; the write holds what came before
    out_of_memory,  // bytes are lost
  };

  void reset() {
    framing_ = Framing{};
    first_body_ns_ = -1;
  }

  // The client gets the answer with this head. `remove_usage_event`: Nexus asked for the counts, the client did not.
  void begin(const ResponseHead& head, const HeadView& view, bool to_http_1_0, bool remove_usage_event) {
    status_ = head.status;
    keep_alive_ = head.keep_alive;
    excess_ = false;
    event_stream_ = is_event_stream(view);
    body_.start(head.framing);
    scan_kind_ = scan_kind(head, view);
    remove_usage_event = remove_usage_event && scan_kind_ == UsageScan::Kind::event_stream;
    scan_.start(scan_kind_, remove_usage_event);
    whole_usage_ = Usage{};
    usage_lost_ = false;
    framing_ = client_framing(head, to_http_1_0, remove_usage_event);
  }

  // Puts a piece of the body into `write`, behind `head`. The write lasts until the next call.
  Step feed(BlockPool& blocks, JsonReader& json, Ns now, std::string_view head, char* data, std::size_t bytes,
            ClientWrite& write) {
    const AnswerBody::Piece piece = body_.feed(data, bytes);
    excess_ = piece.excess;
    if (piece.bytes > 0 && first_body_ns_ < 0) first_body_ns_ = now;
    UsageScan::Out out{{}, {piece.data, piece.bytes}};
    if (scan_kind_ == UsageScan::Kind::json && !head.empty() && piece.done && !piece.failed) {
      whole_usage_ = json.read_answer(piece.data, piece.bytes);  // the usual case: all came in one piece
      usage_lost_ = json.out_of_memory();
    } else if (!scan_.feed(blocks, json, piece.data, piece.bytes, out)) {
      return Step::out_of_memory;
    }
    write.add(head);
    write.add_payload(is_chunked(), out.held, out.piece);
    if (piece.failed) return Step::broken;
    if (!piece.done) return Step::goes_on;
    // In one write where nothing is held: finish() ends the life of `out.held`.
    if (scan_.held_bytes() > 0 || !out.held.empty()) return Step::holds_back;
    UsageScan::Out rest;
    if (!scan_.finish(blocks, json, rest)) return Step::out_of_memory;
    assert(rest.held.empty() && rest.piece.empty());
    write.add_end(is_chunked());
    return Step::whole;
  }

  // The body has ended while bytes were held back: they go on, or are the event that is taken out.
  Step end(BlockPool& blocks, JsonReader& json, ClientWrite& write) {
    UsageScan::Out rest;
    if (!scan_.finish(blocks, json, rest)) return Step::out_of_memory;
    write.add_payload(is_chunked(), rest.held, rest.piece);
    write.add_end(is_chunked());
    return Step::whole;
  }

  // Whether the end of the backend's connection is the body's proper end.
  bool ends_with_connection() const { return body_.ends_with_connection(); }

  // What was read of the counts and times, once no more is to come; `asked_ns`: when the request was whole.
  void note_usage(RequestRecord& record, Ns asked_ns, Ns now) const {
    if (!is_success()) return;
    const Usage& told = usage();
    record.prompt_tokens = told.prompt_tokens;
    record.completion_tokens = told.completion_tokens;
    if (!record.stream || first_body_ns_ < 0) return;
    record.first_byte_ns = first_body_ns_ - asked_ns;
    if (told.completion_tokens > 1) record.per_token_ns = (now - first_body_ns_) / (told.completion_tokens - 1);
  }
  bool lacks_usage() const { return is_success() && !usage().told() && !usage_lost(); }
  // The backend may have told it, and memory was too short to read that.
  bool usage_lost() const { return is_success() && !usage().told() && (usage_lost_ || scan_.out_of_memory()); }

  std::uint16_t status() const { return status_; }
  bool is_success() const { return status_ / 100 == 2; }
  bool is_event_stream() const { return event_stream_; }
  const Framing& framing() const { return framing_; }  // towards the client
  bool is_chunked() const { return framing_.kind == Framing::Kind::chunked; }
  bool lasts_until_close() const { return framing_.kind == Framing::Kind::until_close; }
  Ns first_body_ns() const { return first_body_ns_; }  // -1: none came
  // Whether the backend's connection can carry another request; of an answer that is whole.
  bool leaves_connection() const { return keep_alive_ && !excess_ && !ends_with_connection(); }

 private:
  static bool is_event_stream(const HeadView& head) {
    const FieldRow* row = find_field(*head.fields, Field::content_type);
    return row != nullptr && starts_with_ignoring_case(value_of(head.base, *row), "text/event-stream");
  }

  UsageScan::Kind scan_kind(const ResponseHead& head, const HeadView& view) const {
    if (head.status / 100 != 2 || head.framing.kind == Framing::Kind::none) return UsageScan::Kind::none;
    const FieldRow* coding = find_field(*view.fields, Field::content_encoding);
    if (coding != nullptr && !equals_ignoring_case(value_of(view.base, *coding), "identity")) {
      return UsageScan::Kind::none;
    }
    return event_stream_ ? UsageScan::Kind::event_stream : UsageScan::Kind::json;
  }

  static Framing client_framing(const ResponseHead& head, bool to_http_1_0, bool remove_usage_event) {
    if (head.framing.kind == Framing::Kind::none) {
      // 204 and 304 carry no length; every other answer without a body says so.
      if (head.status == 204 || head.status == 304) return {};
      return {Framing::Kind::length, 0};
    }
    const bool length_holds = !remove_usage_event;
    if (head.framing.kind == Framing::Kind::length && length_holds) return head.framing;
    return {to_http_1_0 ? Framing::Kind::until_close : Framing::Kind::chunked, 0};
  }

  const Usage& usage() const { return whole_usage_.told() ? whole_usage_ : scan_.usage(); }

  AnswerBody body_;
  UsageScan scan_;
  UsageScan::Kind scan_kind_ = UsageScan::Kind::none;
  bool usage_lost_ = false;
  Usage whole_usage_;  // of an answer that was read whole, without the scan
  Framing framing_;
  std::uint16_t status_ = 0;
  bool keep_alive_ = false;
  bool excess_ = false;  // bytes came behind the body's end
  bool event_stream_ = false;
  Ns first_body_ns_ = -1;
};

}  // namespace nexus
