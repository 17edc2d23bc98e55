// session.h
// Owns:     the state of one client connection: its input, how far the head of its next request has been read, its
//           exchange or page.
// Promises: an idle session holds no block of memory, and at most kIdleSessionBytes in its texts. Each byte of a
//           head is parsed once, however it is cut; one empty line before the request line is skipped (RFC 9112
//           2.2); no byte behind the first `most_bytes` of a head is looked at; a head has at most `most_fields`
//           fields.
// Leaves:   the grammar to http/head_parser.h; driving it, time limits and responses to session_driver.h.
// Threads:  its worker's.
// Tested by: tests/worker_test.cpp, tests/sim, tests/hostile, tests/hostile_requests_test.cpp,
//           tests/next_request_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "nexus/api/errors.h"
#include "nexus/base/buffer.h"
#include "nexus/base/object_pool.h"
#include "nexus/base/text.h"
#include "nexus/base/text_buffer.h"
#include "nexus/http/head_parser.h"
#include "nexus/http/head_writer.h"
#include "nexus/metrics/negotiation.h"
#include "nexus/metrics/slab.h"
#include "nexus/proxy/exchange_steps.h"
#include "nexus/proxy/request_body.h"

namespace nexus {

class HeadInput {
 public:
  enum class Status : std::uint8_t {
    need_more,
    done,
    malformed,
    bad_version,
    target_too_long,
    too_large,
    too_many_fields,
    out_of_memory
  };

  bool started() const { return started_; }      // a first byte of the request line was seen
  std::string_view why() const { return why_; }  // after `malformed`: a constant text

  // Reads the bytes that are new in `input`. With the first of them take() is called: it returns the RequestInput to
  // read with, or nullptr if there is no memory.
  template <class Take>
  Status read(Buffer& input, Take&& take, KnownLines& known, RequestHead& head, std::size_t most_bytes,
              std::size_t most_fields) {
    skip_empty_line(input);
    if (input.size() == parsed_) return Status::need_more;
    if (!started_) {
      auto* const made = take();
      if (made == nullptr) return Status::out_of_memory;
      started_ = true;
      reader_ = &made->reader;
      reader_->start(&made->fields, most_fields, &known);
    }
    const bool over = parsed_ > most_bytes;  // a reload has lowered the limit meanwhile
    parsed_ = input.size();
    const HeadResult result = over ? HeadResult{} : reader_->feed(input.data(), std::min(parsed_, most_bytes), head);
    if (result.status == HeadResult::Status::done) return Status::done;
    if (result.status == HeadResult::Status::need_more) {
      if (parsed_ < most_bytes) return Status::need_more;
      return reader_->line_bytes() == 0 ? Status::target_too_long : Status::too_large;
    }
    why_ = result.why;
    if (result.error == HeadError::bad_version) return Status::bad_version;
    return result.error == HeadError::too_many_fields ? Status::too_many_fields : Status::malformed;
  }

  // Prepares for the next request.
  void reset() {
    parsed_ = 0;
    started_ = line_skipped_ = false;
  }

 private:
  void skip_empty_line(Buffer& input) {
    if (started_ || line_skipped_ || input.empty() || input.view()[0] != '\r') return;
    if (input.size() == 1) {
      parsed_ = 1;
      return;
    }
    parsed_ = 0;
    if (input.view()[1] != '\n') return;
    input.consume(2);
    line_skipped_ = true;
  }

  RequestReader* reader_ = nullptr;  // of the request whose head is read
  std::size_t parsed_ = 0;           // bytes of the input that the reader has seen
  bool started_ = false;
  bool line_skipped_ = false;
  std::string_view why_;
};

// How a head that can't be read is refused and counted.
struct HeadRefusal {
  ApiError error;
  std::optional<HttpRejection> counted;
  std::optional<Limit> limit;
};

// In the order of HeadInput::Status, from `malformed` on.
inline constexpr std::array<HeadRefusal, 6> kHeadRefusals{{
    {ApiError::malformed, HttpRejection::malformed, {}},
    {ApiError::bad_version, HttpRejection::malformed, {}},
    {ApiError::target_too_long, HttpRejection::header_too_large, Limit::max_header},
    {ApiError::header_too_large, HttpRejection::header_too_large, Limit::max_header},
    {ApiError::too_many_fields, HttpRejection::header_too_large, Limit::max_fields},
    {ApiError::out_of_memory, {}, Limit::memory},
}};

constexpr const HeadRefusal& refusal_of(HeadInput::Status status) {
  return kHeadRefusals[static_cast<std::size_t>(status) - static_cast<std::size_t>(HeadInput::Status::malformed)];
}
static_assert(refusal_of(HeadInput::Status::too_large).error == ApiError::header_too_large &&
              refusal_of(HeadInput::Status::out_of_memory).error == ApiError::out_of_memory);

constexpr std::uint8_t kSessionKind = 2;  // of a Handle

enum class SessionState : std::uint8_t {
  reading_head,  // between requests too; then `input` is empty
  reading_body,
  exchanging,    // the exchange decides
  waiting_page,  // the control thread renders, or backends are checked for the first time
  sending_page,
  answering,  // a response of our own waits for the kernel
  lingering,  // our FIN is sent; bytes still received are dropped, so that no reset destroys our response
};

inline constexpr std::array<std::string_view, 7> kSessionStateNames{
    "reading_head", "reading_body", "exchanging", "waiting_page", "sending_page", "answering", "lingering"};

constexpr std::string_view to_string(SessionState state) { return kSessionStateNames[static_cast<std::size_t>(state)]; }

// True if a session that waits in `session` may have an exchange in `exchange`.
constexpr bool may_wait(SessionState session, ExchangeState exchange) {
  using enum ExchangeState;
  switch (session) {
    case SessionState::reading_body: return exchange == reading;
    case SessionState::exchanging:
      return exchange == expecting || exchange == queued || exchange == connecting || exchange == sending ||
             exchange == awaiting || exchange == holding || exchange == streaming || exchange == finishing ||
             exchange == counting;
    default: return exchange == idle;
  }
}

// Counts the work of a session in one turn of the loop, for its share of the turn.
struct TurnShare {
  std::uint32_t reads = 0;
  std::uint32_t requests = 0;
};

// A number for the client's host, or for its IPv6 network of 64 bits: who has one such network has all its addresses.
inline std::size_t host_number(const Address& peer) {
  std::uint64_t network = 0;
  std::memcpy(&network, peer.ip.data(), sizeof network);
  return static_cast<std::size_t>(mix(network));
}

// The readers of one request. Needed until its response has begun.
template <class Net>
struct RequestInput : HeadParts<RequestHead> {
  explicit RequestInput(WorkerContext<Net>& context) : body(context) {}
  void reset() { body.reset(); }

  RequestBody<Net> body;
};

template <class Net>
struct Session {
  Session(Handle handle_in, const Address& peer, bool metrics_only_in)
      : handle(handle_in),
        client_name(to_string(peer)),
        metrics_only(metrics_only_in),
        host(host_number(peer)),
        timer(handle_in) {}

  // The fields of the head that was read.
  const FieldTable* fields() const { return &reading->fields; }

  // True if it has asked for a page that waits for the first checks of backends.
  bool waits_for_checks() const { return state == SessionState::waiting_page && checks_due_ns > 0; }

  bool exchange_active() const { return exchange && exchange->active(); }
  ExchangeState exchange_state() const { return exchange ? exchange->state() : ExchangeState::idle; }

  // The request in `input`, for the exchange.
  RequestView request() {
    RequestView view;
    view.base = input.data();
    view.head = &head;
    view.fields = fields();
    view.body = input.data() + head.head_bytes;
    view.body_bytes = reading->body.bytes();
    view.withheld = (key_checked ? kCredentials : 0) | (allows_origin(cors_lines) ? bit_of(Field::origin) : 0);
    return view;
  }

  // The response has begun, so the request is not sent again: its memory is given back before what may be a long
  // stream.
  void release_request() {
    if (!reading) return;
    input.consume(head.head_bytes + reading->body.bytes());
    reading.reset();
  }

  // The memory of a session between two requests, besides its own fixed size; at most kIdleSessionBytes.
  std::size_t kept_bytes() const {
    return client_name.capacity() + certificate_name.capacity() + cors_lines.capacity() + request_id.capacity() +
           page_head.capacity();
  }

  // Drops the current request, if it is not released, and prepares for the next.
  void next_request() {
    release_request();
    exchange.reset();
    head_input.reset();
    keep_alive = true;
    state = SessionState::reading_head;
  }

  Handle handle;
  Connection<Net> connection;
  std::string client_name;
  bool metrics_only;   // accepted on metrics_listen
  std::size_t host;    // a number of the client's
  bool asked = false;  // a request has come on it
  SessionState state = SessionState::reading_head;
  Timer timer;

  Buffer input;  // the head and body of the current request, and bytes pipelined behind it
  HeadInput head_input;
  RequestHead head;
  std::string certificate_name;  // of its certificate, which was verified: a key's name, maybe
  bool key_checked = false;      // its Authorization field holds a key of Nexus's own

  // While there is a request: what reads it, until its response has begun and head and body are gone from `input`; and
  // what handles it.
  typename ObjectPool<RequestInput<Net>>::Lease reading;
  typename ObjectPool<Exchange<Net>>::Lease exchange;

  std::string cors_lines;         // of the response
  bool keep_alive = true;         // after a response of our own
  std::string request_id;         // of such a response
  MetricsForm metrics_form;       // of a page of metrics
  std::uint32_t page_number = 0;  // of the last page asked for: an answer that comes too late carries an earlier one
  Ns checks_due_ns = 0;           // until when a page waits for first checks; 0: it does not
  std::shared_ptr<const TextBuffer> page;
  std::string page_head;
  std::size_t page_sent = 0;  // bytes of page_head and page together
  bool page_body = true;      // false for HEAD
  std::size_t lingered_bytes = 0;
};

}  // namespace nexus
