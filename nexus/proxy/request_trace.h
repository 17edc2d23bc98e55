// request_trace.h
// Owns:     the trace of one request: its ids, whether it is sampled, and what its spans say of an endpoint.
// Promises: a sampled or unsampled parent is followed; without one [trace] trace_ratio decides. No id is zero. Of the
//           request nothing is kept but ids and the name of its session, as a header field gives it.
// Leaves:   the fields' grammar to http/trace_context.h; when spans begin and end to exchange_trace.h.
// Threads:  a part of one exchange.
// Tested by: tests/trace_context_test.cpp, tests/e2e/trace.test.mjs
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "nexus/api/endpoints.h"
#include "nexus/base/limits.h"
#include "nexus/base/object_pool.h"
#include "nexus/base/random.h"
#include "nexus/http/trace_context.h"
#include "nexus/metrics/exemplars.h"
#include "nexus/metrics/span.h"

namespace nexus {

// The texts of a sampled request's spans.
struct TraceTexts {
  BoundedText<kMaxConversationBytes> conversation;
  BoundedText<kMaxModelNameBytes> response_model;  // of the last attempt

  // Prepares for another request.
  void reset() { conversation.length = response_model.length = 0; }
};

struct RequestTrace {
  enum class State : std::uint8_t {
    none,
    noted,      // its trace id is known, for the log; the two fields are passed on as they are
    unsampled,  // backends get a traceparent of Nexus's own
    sampled,    // and spans are made
  };

  State state = State::none;  // all else has a meaning only if it is not `none`
  bool has_parent = false;
  std::uint8_t flags = 0;
  std::uint32_t withheld = 0;  // a set of the client's fields that Nexus's own replace
  TraceId id{};
  std::uint64_t parent = 0;
  std::uint64_t server_span = 0;
  std::uint64_t attempt_span = 0;       // of the last attempt
  Ns to_wall_ns = 0;                    // what makes a time of the loop one since 1970, for all spans alike
  ObjectPool<TraceTexts>::Lease texts;  // if it is sampled, and there was memory
  std::uint32_t pieces_read = 0;        // for the model that answers
  TraceMark mark;                       // for an exemplar, when the request has ended

  // Prepares for another request.
  void reset() {
    state = State::none;
    texts.reset();
  }

  bool makes_lines() const { return state >= State::unsampled; }
  // By the client's trace, or by Nexus's own.
  bool is_sampled() const { return state != State::none && (flags & kSampled) != 0; }

  // An attempt begins. Its first pieces are asked for the model that answers.
  void expect_answer() {
    if (texts) texts->response_model.length = 0;
    pieces_read = 0;
  }
  bool wants_model() const { return texts && texts->response_model.length == 0 && pieces_read < kPiecesForModel; }
  // A piece of the response has told `model`, or none. `goes_on`: the next piece begins with an event or a line.
  void note_model(std::string_view model, bool goes_on) {
    texts->response_model.set(model);
    pieces_read = goes_on ? pieces_read + 1 : kPiecesForModel;
  }

  // The parent that the client names is noted.
  void note(const TraceParent& parent_in) {
    state = State::noted;
    id = parent_in.trace_id;
    flags = parent_in.flags;
  }

  // Spans are made: `client` is the parent, if there is one. A sampled request should get `texts`.
  void begin(const std::optional<TraceParent>& client, std::uint32_t ratio_ppm, Random& random) {
    has_parent = client.has_value();
    withheld = set_of(Field::traceparent, Field::tracestate);
    if (client) {
      withheld = bit_of(Field::traceparent);  // tracestate belongs to it
      id = client->trace_id;
      parent = client->span_id;
      flags = client->flags;
    } else {
      parent = 0;
      flags = make_id(random) < ratio_ppm ? kSampled : 0;
    }
    server_span = random.next();  // never 0
    pieces_read = 0;
    state = (flags & kSampled) != 0 ? State::sampled : State::unsampled;
  }

 private:
  // A number of millionths, evenly spread, comes with the new id.
  std::uint64_t make_id(Random& random) {
    const std::uint64_t numbers[] = {random.next(), random.next()};
    for (std::size_t i = 0; i < 2; ++i) {
      const auto digits = hex_of(numbers[i]);
      std::copy(digits.begin(), digits.end(), id.begin() + static_cast<std::ptrdiff_t>(i * digits.size()));
    }
    constexpr int kWeakBits = 20;
    return (numbers[1] >> kWeakBits) % 1'000'000;
  }
};

// gen_ai.operation.name: the well-known word, or the name of the API.
constexpr std::string_view operation_of(const Endpoint& endpoint) {
  if (endpoint.path.ends_with("_tokens")) return "count_tokens";
  if (endpoint.path.find("embed") != std::string_view::npos) return "embeddings";
  if (endpoint.path == "/api/generate") return "text_completion";
  if (endpoint.body == BodyFormat::none || (endpoint.tells == Tells::nothing && endpoint.api != Api::embeddings)) {
    return name_of(endpoint.api);
  }
  switch (endpoint.api) {
    case Api::chat:
    case Api::responses:
    case Api::messages:
    case Api::ollama: return "chat";
    case Api::completions:
    case Api::llamacpp: return "text_completion";
    default: return name_of(endpoint.api);
  }
}

}  // namespace nexus
