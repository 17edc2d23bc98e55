// chunked.h
// Owns:     the fuzz target of the chunked decoder, compared with rfc9112.h and llhttp.
// Promises: any cut gives the same payload and end; both others accept what the decoder accepts and read the same
//           payload; the decoder does not change bytes that it has not read.
// Leaves:   the limits to chunked_test.cpp.
// Threads:  one.
#pragma once

#include <llhttp.h>

#include "nexus/http/chunked.h"
#include "tests/fuzz/fuzz.h"
#include "tests/lib/rfc9112.h"

namespace fuzz {

struct ChunkedRun {
  nexus::ChunkedDecoder::Status status = nexus::ChunkedDecoder::Status::need_more;
  std::string payload;
  std::size_t consumed = 0;
  bool operator==(const ChunkedRun&) const = default;
};

inline ChunkedRun run_chunked(std::string_view input, const Ends& ends) {
  ChunkedRun run;
  nexus::ChunkedDecoder decoder;
  for (const std::string& piece : pieces_of(input, ends)) {
    Guarded copy(piece);
    const auto result = decoder.decode(copy.data(), piece.size());
    run.payload.append(copy.data(), result.decoded);
    run.consumed += result.consumed;
    run.status = result.status;
    check(result.decoded <= result.consumed && result.consumed <= piece.size(), "more came out than went in");
    check(copy.view().substr(result.consumed) == piece.substr(result.consumed), "bytes behind the end were changed");
    if (result.status != nexus::ChunkedDecoder::Status::need_more) break;
    check(result.consumed == piece.size(), "bytes were left though it wants more");
  }
  return run;
}

// Sets the payload as llhttp reads it, and where the message ended. False if llhttp refuses it.
inline bool run_llhttp(std::string_view input, std::string& payload, std::size_t& consumed) {
  static constexpr std::string_view kHead = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
  llhttp_settings_t settings;
  llhttp_settings_init(&settings);
  settings.on_body = [](llhttp_t* parser, const char* at, std::size_t bytes) {
    static_cast<std::string*>(parser->data)->append(at, bytes);
    return 0;
  };
  settings.on_message_complete = [](llhttp_t*) { return static_cast<int>(HPE_PAUSED); };
  llhttp_t parser;
  llhttp_init(&parser, HTTP_REQUEST, &settings);
  parser.data = &payload;
  if (llhttp_execute(&parser, kHead.data(), kHead.size()) != HPE_OK) return false;
  if (llhttp_execute(&parser, input.data(), input.size()) != HPE_PAUSED) return false;
  consumed = static_cast<std::size_t>(llhttp_get_error_pos(&parser) - input.data());
  return true;
}

inline void chunked(std::string_view input) {
  Draw draw(input);
  const auto ways = cuts_of(input.size(), draw);
  const ChunkedRun whole = run_chunked(input, ways[0]);
  for (const auto& way : ways) check(run_chunked(input, way) == whole, "a cut changes what comes out");
  std::string body, why;
  rfc9112::Fields trailers;
  std::string_view rest = input;
  const rfc9112::Got got = rfc9112::BodyReader().take_chunked(rest, body, trailers, why);
  if (whole.status == nexus::ChunkedDecoder::Status::need_more) {
    check(body.substr(0, whole.payload.size()) == whole.payload, "the payload so far differs from the RFC's");
  }
  if (whole.status != nexus::ChunkedDecoder::Status::done) return;
  check(got == rfc9112::Got::it, "taken, but not the RFC's coding: " + why);
  check(body == whole.payload && input.size() - rest.size() == whole.consumed, "the RFC reads another payload");
  std::string payload;
  std::size_t consumed = 0;
  const bool read = run_llhttp(input, payload, consumed);
  // llhttp may refuse valid extensions (it knows no escapes and only one extension) and trailers (it parses them as
  // header fields).
  if (!read && (!trailers.empty() || input.find(';') != std::string_view::npos)) return;
  check(read, "taken, but llhttp refuses it");
  check(payload == whole.payload && consumed == whole.consumed, "llhttp reads another payload");
}

}  // namespace fuzz
