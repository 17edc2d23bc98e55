// dialects.h
// Owns:     the fuzz target of what each API's responses tell: its first byte chooses the dialect and the framing.
// Promises: any cut gives the same counts, events, errors, end and id; the bytes pass unchanged; nothing stays held.
// Leaves:   the right counts by row to dialects_test.cpp; streams that lose an event to usage.h.
// Threads:  one.
#pragma once

#include <tuple>

#include "nexus/api/usage_scan.h"
#include "tests/fuzz/body.h"
#include "tests/fuzz/fuzz.h"

namespace fuzz {

inline void dialects(std::string_view input) {
  using Scan = nexus::UsageScan;
  if (input.empty()) return;
  const auto choice = static_cast<unsigned char>(input[0]);
  const nexus::DialectRow& row = nexus::kDialects[choice % nexus::kDialects.size()];
  const auto kind = choice >= 128                                ? Scan::Kind::json
                    : row.framing == nexus::StreamFraming::lines ? Scan::Kind::lines
                                                                 : Scan::Kind::event_stream;
  const std::string_view text = input.substr(1);
  static nexus::BlockPool pool;
  Draw draw(input);
  using Told = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::uint64_t, bool, bool, std::uint64_t>;
  std::optional<Told> first;
  for (const auto& ends : cuts_of(text.size(), draw)) {
    Scan scan;
    Scan::Out out;
    std::string passed;
    scan.start(kind, &row.response, false);
    for (const std::string& bytes : pieces_of(text, ends)) {
      Guarded piece(bytes, nexus::kPaddingBytes);
      check(scan.feed(pool, json_reader(), piece.data(), bytes.size(), false, out), "no memory");
      passed.append(out.held).append(out.piece);
    }
    check(scan.feed(pool, json_reader(), nullptr, 0, true, out), "no memory");
    passed.append(out.held).append(out.piece);
    check(passed == text, "the bytes were changed");
    check(scan.held_bytes() == 0, "bytes stayed behind");
    const nexus::Usage usage = scan.usage();
    const Told told{usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, scan.events(),
                    scan.told_error(),   scan.ended_well(),       scan.take_id()};
    if (!first) first = told;
    check(told == *first, "a cut changes what is told");
    scan.drop_memory();
  }
  check(pool.taken_bytes() == 0, "a block stayed away");
}

}  // namespace fuzz
