// ledger.h
// Owns:     the record of one run: each request with what both sides saw of it, and an attempt for each arrival at a
//           backend.
// Promises: keeps the first violation with its time. Judges a request by what both simulated sides saw and by its log
//           line, never by Nexus's internal state.
// Leaves:   detecting violations to clients.h, fleet.h and audit.h.
// Threads:  one.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "apis.h"
#include "tests/lib/wire.h"

namespace nexus::sim {

constexpr std::uint32_t kMostTokens = 5000;
constexpr std::int64_t kTokensUnsure = -2;  // the usage may or may not lie before the cut

// One arrival of a request at a backend, and the response to it.
struct Attempt {
  std::uint32_t server = 0;
  Ns sent_at = 0;  // when Nexus wrote it
  std::uint16_t status = 0;
  std::string payload;       // without framing
  std::size_t extra_at = 0;  // position of the usage event that the client did not request
  std::size_t extra_bytes = 0;
  bool may_be_whole = false;  // a reader may take the response for complete
  bool in_disguise = false;   // if complete, it is an error nonetheless: nothing was said, or an error event
  std::int64_t prompt_tokens = -1;
  std::int64_t completion_tokens = -1;
  bool told_before_end = false;  // the usage of a stream, which then ended too soon
  bool lacks_end = false;        // a stream without its end mark
  bool is_cut_unseen = false;    // no reader can tell that something is missing, and neither can the counts

  // The part of the payload that the client must get.
  std::string expected() const {
    std::string out = payload;
    if (extra_bytes > 0) out.erase(extra_at, extra_bytes);
    return out;
  }
};

// A JSON body in parts, so that the parts which Nexus may change are known.
struct BodyParts {
  enum class Options : std::uint8_t { absent, null, empty, other, no, yes };
  std::string model;
  std::string before, after;  // members before the options and after the rest
  bool stream = false;
  std::string_view stream_text;  // the member
  Options options = Options::absent;

  static std::string_view text_of(Options options) {
    switch (options) {
      case Options::absent: return "";
      case Options::null: return R"("stream_options":null,)";
      case Options::empty: return R"("stream_options":{ },)";
      case Options::other: return R"("stream_options":{"x":[1]},)";
      case Options::no: return R"("stream_options": {"include_usage" : false},)";
      case Options::yes: return R"("stream_options":{"include_usage":true},)";
    }
    return "";
  }
  // The same option as Nexus forwards it when it requests usage.
  static std::string_view asking(Options options) {
    switch (options) {
      case Options::absent: return "";
      case Options::null: return R"("stream_options":{"include_usage":true},)";
      case Options::empty: return R"("stream_options":{"include_usage":true },)";
      case Options::other: return R"("stream_options":{"include_usage":true,"x":[1]},)";
      case Options::no: return R"("stream_options": {"include_usage" : true},)";
      case Options::yes: return text_of(options);
    }
    return "";
  }
  std::string render(std::string_view as_model, bool asks) const {
    std::string out = "{";
    if (asks && options == Options::absent) out += R"("stream_options":{"include_usage":true},)";
    out.append(before).append(asks ? asking(options) : text_of(options));
    out.append(R"("model":")").append(as_model).append(R"(",)").append(stream_text);
    return out.append(after).append("}");
  }
};

// A request as it came to a backend.
struct Arrived {
  std::string_view model;
  bool usage_added = false;  // it asks for usage, and its client did not
};

// The capabilities that a request needs of its backend.
struct Needs {
  bool vision = false, tools = false, json = false;
};

struct Request {
  enum class Kind : std::uint8_t { completion, page, wrong, malformed };
  Kind kind = Kind::completion;
  const ApiRow* api = &kApiRows[0];
  bool counted = false;  // it must have a log line: its endpoint is proxied and its head is well-formed
  bool http_1_0 = false;
  bool expects_continue = false;
  bool chunked = false;
  bool kept = false;          // not the first one on its connection
  bool cross_origin = false;  // it names the page that it comes from
  std::int32_t talk = -1;     // the conversation that it is a turn of; -1: none
  std::size_t head_bytes = 0;
  bool pipelined = false;             // sent before the response to the one before it
  std::string_view page;              // the path, for Kind::page
  std::uint16_t expected_status = 0;  // for Kind::wrong; 0: any
  std::string_view key;               // the name of the key that the client gave; empty: none or a wrong one
  Needs needs;
  std::uint32_t most_tokens = kMostTokens;  // of each kind, in an answer to it
  BodyParts body;
  std::string sent_body;  // as rendered, for Kind::wrong too
  std::uint32_t client = 0;
  bool client_left = false;   // the client did something after which it need not get a response
  bool behind_close = false;  // the response before it ended the connection
  std::vector<Attempt> attempts;

  // The response as the client saw it:
  std::uint16_t status = 0;
  bool whole = false;
  std::int32_t attempt = -1;  // the attempt whose response it is; -1: Nexus's own
  Ns answered_at = -1;        // when Nexus wrote the first byte
  Ns began_at = -1;           // the client had sent no byte of the request before that
  Ns asked_at = -1;           // when the client had sent the last byte of the request
  std::string received;       // the body
  std::string backend, fallback_model;
  bool event_stream = false;

  // The request's log line:
  std::uint32_t lines = 0;
  std::uint16_t line_status = 0;
  std::string line_error, line_backend, line_model, line_key, line_affinity, line_slo;
  std::uint32_t line_attempts = 0;
  std::uint64_t line_bytes = 0;
  std::int64_t line_prompt_tokens = -1, line_completion_tokens = -1;
  bool line_cut = false;
};

// Counts of what happened to the requests of a run, to see that the faults have their effects.
struct Happened {
  std::uint64_t retried = 0, fell_back = 0, failed_over = 0, cut = 0, timed_out = 0, left = 0, parse_errors = 0,
                backend_errors = 0, refused = 0;

  void add(const Request& request) {
    if (request.lines == 0) return;
    const bool served = request.line_error == "-";
    retried += request.line_attempts > 1 ? 1 : 0;
    failed_over += request.line_attempts > 1 && served ? 1 : 0;
    fell_back += request.fallback_model.empty() ? 0 : 1;
    cut += request.line_cut ? 1 : 0;
    timed_out += request.line_error == "timeout" ? 1 : 0;
    left += request.line_error == "client_closed" ? 1 : 0;
    parse_errors += request.line_error == "parse_error" ? 1 : 0;
    backend_errors += request.line_error == "backend_error" ? 1 : 0;
    refused += request.line_error == "overloaded" || request.line_error.starts_with("no_") ? 1 : 0;
  }
  void add(const Happened& more) {
    retried += more.retried, fell_back += more.fell_back, failed_over += more.failed_over, cut += more.cut;
    timed_out += more.timed_out, left += more.left, parse_errors += more.parse_errors;
    backend_errors += more.backend_errors, refused += more.refused;
  }
};

class Ledger {
 public:
  explicit Ledger(const Wire& wire) : wire_(wire) {}

  std::vector<Request> requests;
  std::uint64_t answers = 0;  // complete ones
  bool memory_faults = false;
  bool long_ids = false;  // some are
  bool gentle = false;    // see swarm.h
  bool draining = false;
  Ns drained_at = kNever;  // when the drain began
  Ns way_ns = 0;           // the longest time that a client's bytes are on their way
  bool takes_all = false;  // no connection is refused for want of something on this host
  bool reads_all = false;  // no read finds nothing although bytes are there
  bool stopped = false;    // Nexus was stopped

  [[gnu::format(printf, 2, 3)]] void wrong(const char* format, ...) {
    if (!first_wrong_.empty()) return;
    char text[2000];
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    first_wrong_ = text;
    first_wrong_ += " (at " + std::to_string((wire_.now() - 1000 * kSecond) / 1000) + " us)";
  }
  bool ok() const { return first_wrong_.empty(); }
  const std::string& first_wrong() const { return first_wrong_; }

  // Some are as long as a client's id may be, if memory for it is sure.
  std::string id_of(std::size_t number) const {
    std::string id = "r" + std::to_string(number);
    if (number % 8 == 3 && long_ids) id.resize(kMaxRequestIdBytes, '.');
    return id;
  }
  // The number of a request by its id, or -1.
  std::int64_t number_of(std::string_view id) const {
    if (id.size() == kMaxRequestIdBytes) id = id.substr(0, id.find_last_not_of('.') + 1);
    if (id.size() < 2 || id.size() > 9 || id[0] != 'r') return -1;
    std::int64_t number = 0;
    for (const char c : id.substr(1)) {
      if (c < '0' || c > '9') return -1;
      number = number * 10 + (c - '0');
    }
    return number < static_cast<std::int64_t>(requests.size()) ? number : -1;
  }

  // Judges a response when the client has all that it will get of it.
  void judge_answer(std::size_t number) {
    Request& request = requests[number];
    const unsigned n = static_cast<unsigned>(number);
    if (request.whole) answers += 1;
    if (request.status == 0) return;
    if (request.attempt < 0) return judge_own_answer(request, n);
    if (static_cast<std::size_t>(request.attempt) >= request.attempts.size()) {
      return wrong("r%u: the answer is of no attempt", n);
    }
    const Attempt& attempt = request.attempts[static_cast<std::size_t>(request.attempt)];
    if (attempt.status != request.status) return wrong("r%u: status %u, not %u", n, request.status, attempt.status);
    const std::string expected = attempt.expected();
    if (request.whole && !attempt.may_be_whole) return wrong("r%u: a broken answer looks whole", n);
    if (request.whole && request.received != expected) {
      return wrong("r%u: a whole answer differs from its backend's: %zu bytes, not %zu, from byte %zu on", n,
                   request.received.size(), expected.size(), difference(request.received, expected));
    }
    if (!request.whole) judge_part(request, attempt, expected, n);
  }

  // A truncated response must be a beginning of the payload; Nexus may end a truncated stream with an error event.
  void judge_part(const Request& request, const Attempt& attempt, const std::string& expected, unsigned n) {
    const std::string_view got = request.received;
    if (begins(expected, got) || begins(attempt.payload, got)) return;
    const std::string_view opening = own_error_event(*request.api);
    const std::size_t at = request.event_stream ? got.rfind(opening) : std::string_view::npos;
    if (at != std::string_view::npos && begins(opening, got.substr(at, opening.size())) &&
        (begins(expected, got.substr(0, at)) || begins(attempt.payload, got.substr(0, at)) ||
         begins_before_line_end(*request.api, attempt.payload, got.substr(0, at)))) {
      return;
    }
    // The error event may itself be truncated.
    for (std::size_t cut = 1; request.event_stream && cut <= opening.size() && cut <= got.size(); ++cut) {
      const std::string_view before = got.substr(0, got.size() - cut);
      if (got.substr(got.size() - cut) == opening.substr(0, cut) &&
          (begins(expected, before) || begins_before_line_end(*request.api, attempt.payload, before)))
        return;
    }
    wrong("r%u: a part of an answer differs from its backend's, from byte %zu of %zu on", n, difference(got, expected),
          got.size());
  }

  void judge_own_answer(const Request& request, unsigned n) {
    if (request.kind == Request::Kind::page) return;
    if (request.status < 400) return wrong("r%u: status %u without a backend's answer", n, request.status);
    const bool is_own_shape = request.kind == Request::Kind::completion && request.counted;
    const std::string_view opening = is_own_shape ? own_error(*request.api) : own_error(kApiRows[0]);
    if (request.whole && (!begins(request.received, opening) || request.received.back() != '}')) {
      return wrong("r%u: an error of Nexus's own that is none: %.60s", n, request.received.c_str());
    }
    const std::uint16_t expected = request.expected_status;
    // A request can fail before Nexus checks it: it arrives too slowly, or there is no place, memory or backend.
    // While models are still discovered, a key's minute is charged before its model is known to be unknown.
    const bool charged = request.status == 429 && expected == 404 && !request.line_key.empty();
    const bool not_looked_at = request.status == 408 || request.status == 503 || request.status == 504 || charged;
    if (expected != 0 && request.status != expected && !not_looked_at) {
      wrong("r%u: status %u for a request that is to get %u", n, request.status, expected);
    }
  }

  // Within a line, Nexus ends it before its error.
  static bool begins_before_line_end(const ApiRow& api, std::string_view whole, std::string_view part) {
    return api.is_lines() && part.ends_with('\n') && begins(whole, part.substr(0, part.size() - 1));
  }
  static bool begins(std::string_view whole, std::string_view part) { return whole.substr(0, part.size()) == part; }
  static std::size_t difference(std::string_view a, std::string_view b) {
    std::size_t at = 0;
    while (at < a.size() && at < b.size() && a[at] == b[at]) ++at;
    return at;
  }

 private:
  const Wire& wire_;
  std::string first_wrong_;
};

}  // namespace nexus::sim
