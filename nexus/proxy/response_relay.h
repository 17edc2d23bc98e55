// response_relay.h
// Owns:     a response on its way from the backend to the client: its head, its body, its usage, the time it took.
// Promises: a piece is read into one write, which the caller sends or holds; the client is told the end only if the
//           backend told it.
// Leaves:   the bytes to response.h; retries, deadlines and failures to exchange.h.
// Threads:  a part of one exchange.
// Tested by: tests/courses_test.cpp, tests/hostile_answers_test.cpp, tests/sim, tests/e2e/stream.test.mjs
#pragma once

#include <string_view>

#include "nexus/api/told_model.h"
#include "nexus/proxy/exchange_times.h"
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

template <class Net>
class ResponseRelay {
 public:
  using Context = WorkerContext<Net>;

  ResponseRelay(Context& context, ClientResponse<Net>& client, ExchangeSummary& summary)
      : context_(context), client_(client), summary_(summary) {}
  ResponseRelay(const ResponseRelay&) = delete;
  ResponseRelay& operator=(const ResponseRelay&) = delete;

  const Response& response() const { return response_; }
  std::uint64_t take_id() { return response_.take_id(); }
  bool says_close() const { return says_close_; }  // the head in hand; then the connection is closed after it
  // True if a client that gets a broken response can be sent an error event first.
  bool tells_error_event() const { return response_.follows_events() && response_.is_chunked(); }

  ResponseHeadReader::Result read_head(char* data, std::size_t bytes) {
    return head_.feed(context_.response_heads, context_.known_lines, context_.blocks, context_.settings().server, data,
                      bytes);
  }
  HeadView view(const ResponseHeadReader::Result& result) const { return head_.view(result); }
  void drop_head() { head_.clear(); }

  // Writes the client's head into the context's text, for the first write.
  void begin(const Endpoint& endpoint, const ResponseHeadReader::Result& result, const RouteInfo& route,
             bool asked_stream, bool remove_usage_event) {
    const ResponseHead& head = result.head;
    const HeadView view = head_.view(result);
    response_.begin(endpoint, head, view, client_.http_1_0(), asked_stream, remove_usage_event);
    says_close_ = response_.lasts_until_close() || context_.draining;
    ClientHead to;
    to.backend_line = route.backend_line;
    to.request_id = route.request_id;
    to.route_reason = route.reason;
    to.fallback_model = route.fallback_model;
    to.date_line = context_.date_line();
    to.cors_lines = client_.cors_lines();
    to.rate_lines = client_.rate_lines();
    to.framing = response_.framing();
    to.http_1_0 = client_.http_1_0();
    to.keep_alive = client_.keep_alive() && !says_close_;
    context_.text.clear();
    append_response_head(context_.text, view, head, to);
  }

  // Reads a piece of the body into `write`, behind `head`.
  Response::Step read(std::string_view head, char* data, std::size_t bytes, ClientWrite& write) {
    const Response::Step step = response_.feed(context_.blocks, context_.json, context_.now, head, data, bytes, write);
    if (summary_.trace.wants_model()) [[unlikely]]
      note_model(write.newest());
    return step;
  }
  // The end of the backend's connection ended the body.
  void read_end(ClientWrite& write) { response_.end(context_.blocks, context_.json, context_.now, write); }

  // The client gets this response.
  void note_begun() {
    RequestRecord& record = summary_.record;
    record.status = response_.status();
    record.error = error_of_status(response_.status());
    record.stream = response_.is_success() && response_.is_stream();
    if (says_close_) client_.end_connection();
  }

  // Sends what was read.
  RelayOutcome send(Response::Step step, ClientWrite& write) {
    if (step == Response::Step::out_of_memory) return RelayOutcome::out_of_memory;
    if (step == Response::Step::whole) return send_end(write);
    if (!client_.send(write)) return RelayOutcome::client_failed;
    if (!summary_.overhead_noted) summary_.note_response_sent(context_.now, context_.net.now());
    return step == Response::Step::broken ? RelayOutcome::broken : RelayOutcome::more;
  }

  void note_usage() {
    response_.note_usage(summary_.record, summary_.complete_ns);
    if (response_.usage_lost()) context_.slab.limit_hit(Limit::memory);
  }

  // Prepares for the next request.
  void reset() { response_.reset(); }

 private:
  // `piece`: payload of the response.
  [[gnu::cold]] void note_model(std::string_view piece) {
    const ResponseShape* const shape = response_.shape();
    if (shape == nullptr || !response_.is_success() || piece.empty()) return;
    summary_.trace.note_model(told_model(context_.json, *shape, response_.is_stream(), piece),
                              response_.is_stream() && piece.ends_with('\n'));
  }

  RelayOutcome send_end(ClientWrite& write) {
    note_usage();
    const bool good = !response_.is_error_in_disguise(true);
    summary_.record.without_usage = good && response_.lacks_usage();
    summary_.record.without_end = good && response_.lacks_end_mark();
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
  bool says_close_ = false;
};

}  // namespace nexus
