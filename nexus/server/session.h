// session.h
// Owns:     one client connection's state between and during requests: its input, its request's head, its exchange.
// Promises: plain data with the invariants written beside it; it holds no block while idle.
// Leaves:   driving it to worker.h.
// Threads:  its worker's.
#pragma once

#include <memory>
#include <string>

#include "nexus/base/text_buffer.h"
#include "nexus/proxy/exchange.h"
#include "nexus/proxy/request_body.h"

namespace nexus {

constexpr std::uint8_t kSessionKind = 2;  // of a Handle

template <class Net>
struct Session {
  enum class State : std::uint8_t {
    reading_head,  // between requests too: then `input` is empty
    reading_body,
    exchanging,    // the exchange decides
    waiting_page,  // the control thread renders
    sending_page,
    answering,  // an answer of our own waits for the kernel
    lingering,  // our FIN is sent; what the client still sends is read away, so that no reset eats our answer
  };

  Session(Handle token_in, WorkerContext<Net>& core, UpstreamPool<Net>& pool, typename Net::Socket socket,
          const Address& peer, bool metrics_only_in)
      : token(token_in),
        connection(socket),
        client_name(to_string(peer)),
        metrics_only(metrics_only_in),
        timer(token_in),
        body(core),
        exchange(token_in, core, pool, connection) {}

  Handle token;
  Connection<Net> connection;
  std::string client_name;
  bool metrics_only;   // it came in on metrics_listen
  bool asked = false;  // a request came on it
  State state = State::reading_head;
  Timer timer;

  Buffer input;            // the head and body of the request in hand, and what was pipelined behind it
  std::size_t parsed = 0;  // of `input`, bytes that the head's reader has seen
  bool head_started = false;
  bool line_skipped = false;  // one empty line before a request line is allowed (RFC 9112 2.2)
  RequestReader reader;
  typename ObjectPool<FieldTable>::Lease fields;  // while a request is in hand
  RequestHead head;

  RequestBody<Net> body;
  bool request_released = false;  // head and body are gone from `input`: the answer is on its way

  bool keep_alive = true;  // of an answer of our own
  std::string request_id;  // the same
  std::shared_ptr<const TextBuffer> page;
  std::string page_head;
  std::size_t page_sent = 0;  // of page_head and page together
  bool page_body = true;      // not for HEAD
  std::size_t lingered_bytes = 0;

  Exchange<Net> exchange;
};

}  // namespace nexus
