// incremental_json.h
// Owns:     the fuzz target of reading a large body while it arrives.
// Promises: at any cut the incremental reader gives the same result as the reader of whole bodies, spans included. It
//           never accepts a body that the other refuses, and refuses more only if the body is not JSON.
// Leaves:   the correct result to body.h.
// Threads:  one.
#pragma once

#include "nexus/api/incremental_json.h"
#include "tests/fuzz/body.h"

namespace fuzz {

inline bool same_span(const nexus::BodySpan& a, const nexus::BodySpan& b) { return a.at == b.at && a.bytes == b.bytes; }

inline void check_same_facts(const nexus::BodyFacts& facts, const nexus::BodyFacts& wanted) {
  check(facts.model == wanted.model, "the models differ");
  check(same_span(facts.model_value, wanted.model_value), "model stands elsewhere");
  check(facts.first_member == wanted.first_member, "the first member stands elsewhere");
  check(facts.stream == wanted.stream, "stream differs");
  check(facts.stream_options == wanted.stream_options, "stream_options differ");
  check(same_span(facts.stream_options_value, wanted.stream_options_value), "stream_options stand elsewhere");
  check(facts.stream_options_empty == wanted.stream_options_empty, "whether stream_options are empty");
  check(facts.include_usage == wanted.include_usage, "include_usage differs");
  check(same_span(facts.include_usage_value, wanted.include_usage_value), "include_usage stands elsewhere");
  check(same_span(facts.continuous_usage_value, wanted.continuous_usage_value),
        "continuous_usage_stats stands elsewhere");
  check(same_span(facts.session_value, wanted.session_value), "the name of the session stands elsewhere");
  check(same_span(facts.turns_value, wanted.turns_value), "the turns of the conversation stand elsewhere");
  check(same_span(facts.system_value, wanted.system_value), "the instructions stand elsewhere");
  check(facts.has_tools == wanted.has_tools, "tools differ");
  check(facts.json_mode == wanted.json_mode, "json_mode differs");
  check(facts.has_images == wanted.has_images, "images differ");
}

// Reads a body in pieces that end at `ends`. The body moves with each piece and has a guard page behind its padding.
// With very many pieces it stays in place, because copying would take most of the time.
inline std::optional<nexus::ApiError> read_in_pieces(std::string_view input, const std::vector<std::size_t>& ends,
                                                     Guarded& whole, nexus::BodyFacts& facts, bool find_images) {
  static nexus::IncrementalJson incremental;
  incremental.start(nexus::kEndpoints[0]);
  constexpr std::size_t kMostCopies = 256;
  for (const std::size_t end : ends) {
    if (ends.size() > kMostCopies) {
      incremental.feed(json_reader(), whole.data(), end);
    } else {
      Guarded piece(input.substr(0, end), nexus::kPaddingBytes);
      incremental.feed(json_reader(), piece.data(), end);
    }
  }
  return incremental.read(json_reader(), whole.view(), facts, find_images);
}

inline void check_pieces(std::string_view input, const std::vector<std::vector<std::size_t>>& ways) {
  static nexus::JsonReader direct_reader;  // static, because its last result must stay valid
  Guarded whole(input, nexus::kPaddingBytes);
  const auto plain = plain_json::read(input);
  const bool is_body = plain && plain->kind == Kind::object;
  for (const bool find_images : {true, false}) {
    nexus::BodyFacts wanted;
    const auto error = nexus::read_body(direct_reader, nexus::kEndpoints[0], whole.view(), wanted, find_images);
    for (const auto& ends : ways) {
      nexus::BodyFacts facts;
      const auto pieces_error = read_in_pieces(input, ends, whole, facts, find_images);
      if (error) check(pieces_error.has_value(), "an error was missed");
      if (is_body) check(pieces_error == error, "another error is reported");
      if (!pieces_error) check_same_facts(facts, wanted);
    }
  }
  check(whole.view() == input, "the body was changed");
}

inline void incremental_json(std::string_view input) {
  Draw draw(input);
  check_pieces(input, cuts_of(input.size(), draw));
}

}  // namespace fuzz
