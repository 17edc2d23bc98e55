// response_relay.h
// Owns:     a response on its way from the backend to the client: its head, its body, its usage, the time it took.
// Promises: a piece goes out in the same call in which it came; the client is told the end only if the backend told it.
// Leaves:   the bytes to response.h; retries, deadlines and failures to exchange.h.
// Threads:  a part of one exchange.
// Tested by: tests/hostile_answers_test.cpp, tests/sim, tests/e2e/stream.test.mjs
#pragma once

#include <string_view>

#include "nexus/proxy/exchange_summary.h"
#include "nexus/proxy/response.h"

namespace nexus {

// The lines about the route in the client's head.
struct RouteInfo {
  std::string_view backend_line;  // X-Nexus-Backend, the whole line
  std::string_view request_id;
  std::string_view reason;
  std::string_view fallback_model;  // empty: no fallback
};

enum class RelayOutcome : std::uint8_t {
  more,           // of the body is to come
  whole,          // the end is written
  broken,         // the backend's framing
  client_failed,  // writing to the client
  out_of_memory,
};

// True if the backend's connection can carry another request after a response that is dropped: the whole of it has
// come.
inline bool leaves_connection(const ResponseHeadReader::Result& result) {
  const ResponseHead& head = result.head;
  BodyDecoder body;
  body.start(head.framing);
  const BodyDecoder::Piece piece = body.feed(result.data + head.head_bytes, result.bytes - head.head_bytes);
  const bool whole = head.framing.kind == Framing::Kind::none || piece.done;
  return whole && !piece.excess && !piece.failed && head.keep_alive;
}

template <class Net>
class ResponseRelay {
 public:
  using Context = WorkerContext<Net>;

  ResponseRelay(Context& context, ClientResponse<Net>& client, ExchangeSummary& summary)
      : context_(context), client_(client), summary_(summary) {}
  ResponseRelay(const ResponseRelay&) = delete;
  ResponseRelay& operator=(const ResponseRelay&) = delete;

  const Response& response() const { return response_; }
  // True if a client that gets a broken response can be sent an error event first.
  bool tells_error_event() const { return response_.is_event_stream() && response_.is_chunked(); }

  ResponseHeadReader::Result read_head(char* data, std::size_t bytes) {
    return head_.feed(context_.tables, context_.blocks, data, bytes);
  }
  HeadView view(const ResponseHeadReader::Result& result) const { return head_.view(result); }
  void drop_head() { head_.clear(); }

  // Writes the client's head into the context's text; pass_first() sends it.
  void begin(const Endpoint& endpoint, const ResponseHeadReader::Result& result, const RouteInfo& route,
             bool remove_usage_event) {
    const ResponseHead& head = result.head;
    const HeadView view = head_.view(result);
    response_.begin(endpoint, head, view, client_.http_1_0(), remove_usage_event);
    RequestRecord& record = summary_.record;
    record.status = head.status;
    record.error = error_of_status(head.status);
    record.stream = response_.is_success() && response_.is_event_stream();
    if (response_.lasts_until_close() || context_.draining) client_.end_connection();
    ClientHead to;
    to.backend_line = route.backend_line;
    to.request_id = route.request_id;
    to.route_reason = route.reason;
    to.fallback_model = route.fallback_model;
    to.date_line = context_.date_line();
    to.cors_lines = client_.cors_lines();
    to.framing = response_.framing();
    to.http_1_0 = client_.http_1_0();
    to.keep_alive = client_.keep_alive();
    context_.text.clear();
    append_response_head(context_.text, view, head, to);
  }

  // Sends the head, and the part of the body that came with it, in one write.
  RelayOutcome pass_first(const ResponseHeadReader::Result& result) {
    const std::size_t head_bytes = result.head.head_bytes;
    const RelayOutcome outcome = pass(context_.text, result.data + head_bytes, result.bytes - head_bytes);
    head_.clear();  // not needed any more, and a stream may be long
    return outcome;
  }

  RelayOutcome pass(char* data, std::size_t bytes) { return pass({}, data, bytes); }

  // The body has ended, but the client has not been told so.
  RelayOutcome end_body() {
    ClientWrite write;
    response_.end(context_.blocks, context_.json, write);
    return send_end(write);
  }

  void note_usage() {
    response_.note_usage(summary_.record, summary_.complete_ns, context_.now);
    if (response_.usage_lost()) context_.slab.limit_hit(Limit::memory);
  }

  // Prepares for the next request.
  void reset() { response_.reset(); }

 private:
  RelayOutcome pass(std::string_view head, char* data, std::size_t bytes) {
    ClientWrite write;
    const Response::Step step = response_.feed(context_.blocks, context_.json, context_.now, head, data, bytes, write);
    if (step == Response::Step::out_of_memory) return RelayOutcome::out_of_memory;
    if (step == Response::Step::whole) return send_end(write);
    if (!client_.send(write)) return RelayOutcome::client_failed;
    if (!summary_.overhead_noted) summary_.note_response_sent(context_.now, context_.net.now());
    return step == Response::Step::broken ? RelayOutcome::broken : RelayOutcome::more;
  }

  RelayOutcome send_end(ClientWrite& write) {
    note_usage();
    summary_.record.without_usage = response_.lacks_usage();
    if (!client_.send(write)) return RelayOutcome::client_failed;
    const Ns sent_ns = context_.net.now();
    summary_.note_response_sent(context_.now, sent_ns);
    if (!client_.waits()) summary_.ended_ns = sent_ns;
    return RelayOutcome::whole;
  }

  Context& context_;
  ClientResponse<Net>& client_;
  ExchangeSummary& summary_;
  ResponseHeadReader head_;
  Response response_;
};

}  // namespace nexus
