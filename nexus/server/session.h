// session.h
// Owns:     the state of one client connection: its input, the head of its request, its exchange or page.
// Promises: plain data; an idle session holds no block of memory, and at most kIdleSessionBytes in its texts.
// Leaves:   driving it to session_driver.h.
// Threads:  its worker's.
// Tested by: tests/worker_test.cpp, tests/sim, tests/hostile
#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "nexus/base/hash.h"
#include "nexus/base/text_buffer.h"
#include "nexus/http/cors.h"
#include "nexus/proxy/exchange_steps.h"
#include "nexus/proxy/request_body.h"
#include "nexus/server/head_input.h"

namespace nexus {

constexpr std::uint8_t kSessionKind = 2;  // of a Handle

enum class SessionState : std::uint8_t {
  reading_head,  // between requests too; then `input` is empty
  reading_body,
  exchanging,    // the exchange decides
  waiting_page,  // the control thread renders
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

template <class Net>
struct Session {
  Session(Handle handle_in, WorkerContext<Net>& context, UpstreamPool<Net>& pool, const Address& peer,
          bool metrics_only_in)
      : handle(handle_in),
        client_name(to_string(peer)),
        metrics_only(metrics_only_in),
        timer(handle_in),
        body(context, host_number(peer)),
        exchange(handle_in, context, pool, connection) {}

  // The request in `input`, for the exchange.
  RequestView request() {
    RequestView view;
    view.base = input.data();
    view.head = &head;
    view.fields = fields.get();
    view.body = input.data() + head.head_bytes;
    view.body_bytes = body.bytes();
    view.pass_credentials = !key_checked;
    view.pass_origin = !allows_origin(cors_lines);
    return view;
  }

  // The response has begun, so the request is not sent again: its memory is given back before what may be a long
  // stream.
  void release_request() {
    if (request_released) return;
    request_released = true;
    input.consume(head.head_bytes + body.bytes());
    fields.reset();
    body.give_back();
  }

  // The memory of a session between two requests, besides its own fixed size; at most kIdleSessionBytes.
  std::size_t kept_bytes() const {
    return client_name.capacity() + cors_lines.capacity() + request_id.capacity() + page_head.capacity() +
           exchange.kept_bytes();
  }

  // Drops the current request (`bytes` of the input) and prepares for the next.
  void next_request(std::size_t bytes) {
    input.consume(bytes);
    head_input.reset();
    fields.reset();
    body.reset();
    request_released = false;
    keep_alive = true;
    state = SessionState::reading_head;
  }

  Handle handle;
  Connection<Net> connection;
  std::string client_name;
  bool metrics_only;   // accepted on metrics_listen
  bool asked = false;  // a request has come on it
  SessionState state = SessionState::reading_head;
  Timer timer;

  Buffer input;  // the head and body of the current request, and bytes pipelined behind it
  HeadInput head_input;
  ObjectPool<FieldTable>::Lease fields;  // while there is a request
  RequestHead head;
  bool key_checked = false;  // its Authorization field holds a key of Nexus's own

  std::string cors_lines;  // of the response
  RequestBody<Net> body;
  bool request_released = false;  // head and body are gone from `input`: the response is on its way

  bool keep_alive = true;         // after a response of our own
  std::string request_id;         // of such a response
  std::uint32_t page_number = 0;  // of the last page asked for: an answer that comes too late carries an earlier one
  std::shared_ptr<const TextBuffer> page;
  std::string page_head;
  std::size_t page_sent = 0;  // bytes of page_head and page together
  bool page_body = true;      // false for HEAD
  std::size_t lingered_bytes = 0;

  Exchange<Net> exchange;
};

}  // namespace nexus
