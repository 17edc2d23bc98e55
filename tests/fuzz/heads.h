// heads.h
// Owns:     the fuzz targets of the two head readers, compared with rfc9112.h.
// Promises: any cut gives the same outcome, and so do lines that are known from the inputs before; a head that a
//           reader accepts is valid by the RFC's grammar and has the same start line, fields, framing and persistence
//           there.
// Leaves:   bodies to chunked.h, whole exchanges to exchange.h.
// Threads:  one.
#pragma once

#include "nexus/http/head_parser.h"
#include "tests/fuzz/fuzz.h"
#include "tests/lib/rfc9112.h"

namespace fuzz {

template <class Head>
struct HeadRun {
  nexus::HeadResult result;
  Head head;
  rfc9112::Fields fields;
  std::string text;  // the target or the reason
};

inline std::string text_of(const char* base, const nexus::RequestHead& head) { return std::string(head.target(base)); }
inline std::string text_of(const char* base, const nexus::ResponseHead& head) {
  return {base + head.reason_at, head.reason_bytes};
}

// Feeds the text up to each of `ends`, each time at another address, as in a buffer that grows.
template <class Reader, class Head>
HeadRun<Head> run_head(std::string_view input, const Ends& ends, nexus::KnownLines* known) {
  static nexus::FieldTable fields;
  HeadRun<Head> run;
  Reader reader;
  reader.start(&fields, nexus::kMaxFields, known);
  for (const std::size_t end : ends) {
    Guarded copy(input.substr(0, end));
    run.result = reader.feed(copy.data(), end, run.head);
    if (run.result.status == nexus::HeadResult::Status::need_more) continue;
    if (run.result.status == nexus::HeadResult::Status::done) {
      for (const nexus::FieldRow& row : fields) {
        run.fields.emplace_back(nexus::name_of(copy.data(), row), nexus::value_of(copy.data(), row));
      }
      run.text = text_of(copy.data(), run.head);
    }
    break;
  }
  return run;
}

template <class Reader, class Head>
HeadRun<Head> run_all_cuts(std::string_view input) {
  Draw draw(input);
  const auto ways = cuts_of(input.size(), draw);
  static nexus::KnownLines before;
  const auto whole = run_head<Reader, Head>(input, ways[0], nullptr);
  for (std::size_t i = 0; i < 2 * ways.size(); ++i) {
    const bool known = i % 2 == 1;
    auto cut = run_head<Reader, Head>(input, ways[i / 2], known ? &before : nullptr);
    if (known && whole.result.status == nexus::HeadResult::Status::failed) {
      // That two fields exclude each other is found at the head's end at the latest.
      if (cut.result.status == nexus::HeadResult::Status::need_more) {
        const std::string ended = std::string(input) + "\r\n\r\n";
        cut = run_head<Reader, Head>(ended, {ended.size()}, &before);
      }
      check(cut.result.status == nexus::HeadResult::Status::failed, "what is refused is taken if its lines are known");
      continue;
    }
    check(cut.result.status == whole.result.status && cut.result.error == whole.result.error, "a cut changes the end");
    if (whole.result.status != nexus::HeadResult::Status::done) continue;
    check(cut.fields == whole.fields && cut.text == whole.text, "a cut changes the fields");
    check(cut.head.head_bytes == whole.head.head_bytes && cut.head.keep_alive == whole.head.keep_alive &&
              cut.head.framing.kind == whole.head.framing.kind && cut.head.framing.length == whole.head.framing.length,
          "a cut changes the meaning");
  }
  return whole;
}

inline rfc9112::Message::Framing plain(nexus::Framing::Kind kind) {
  switch (kind) {
    case nexus::Framing::Kind::none: return rfc9112::Message::Framing::none;
    case nexus::Framing::Kind::length: return rfc9112::Message::Framing::length;
    case nexus::Framing::Kind::chunked: return rfc9112::Message::Framing::chunked;
    case nexus::Framing::Kind::until_close: return rfc9112::Message::Framing::until_close;
  }
  return rfc9112::Message::Framing::none;
}

// Both readers must agree on a head that Nexus accepted.
template <class Head>
void compare(const HeadRun<Head>& run, const rfc9112::Message& message) {
  check(run.head.head_bytes == message.head_bytes, "the heads end at different places");
  check(run.fields == message.fields, "the fields differ");
  check(run.head.http_1_0 == (message.minor == 0), "the versions differ");
  check(plain(run.head.framing.kind) == message.framing, "the framings differ");
  if (run.head.framing.kind == nexus::Framing::Kind::length) {
    check(run.head.framing.length == message.length, "the lengths differ");
  }
}

inline void request_head(std::string_view input) {
  const auto run = run_all_cuts<nexus::RequestReader, nexus::RequestHead>(input);
  rfc9112::Message message;
  std::string why;
  std::string_view text = input;
  const rfc9112::Got got = rfc9112::take_head(text, message, true, why);
  if (run.result.status != nexus::HeadResult::Status::done) return;
  check(got == rfc9112::Got::it, "taken, but not HTTP: " + why);
  check(rfc9112::check_host(message).empty(), "taken, but " + rfc9112::check_host(message));
  if (run.head.refusal == nexus::HeadError::unknown_coding) return;  // Nexus refuses it after the head
  const std::string framing = rfc9112::read_framing(message, true);
  check(framing.empty(), "taken, but " + framing);
  compare(run, message);
  check(run.text == rfc9112::path_of(message.target), "the targets differ");
  const bool unknown = run.head.refusal == nexus::HeadError::unknown_method;
  check(unknown || llhttp_method_name(static_cast<llhttp_method_t>(run.head.method)) == message.method,
        "the methods differ");
  check(run.head.keep_alive == message.stays_open, "one stays open");
}

inline void response_head(std::string_view input) {
  const auto run = run_all_cuts<nexus::ResponseReader, nexus::ResponseHead>(input);
  if (run.result.status != nexus::HeadResult::Status::done) return;
  rfc9112::Message message;
  std::string why;
  std::string_view text = input;
  check(rfc9112::take_head(text, message, false, why) == rfc9112::Got::it, "taken, but not HTTP: " + why);
  check(run.head.status == message.status && run.text == message.reason, "the status lines differ");
  const std::string framing = rfc9112::read_framing(message, false);
  check(framing.empty(), "taken, but " + framing);
  if (message.status < 200 || message.status == 204 || message.status == 304) {
    message.framing = rfc9112::Message::Framing::none;
  }
  compare(run, message);
  const bool stays = message.stays_open && message.framing != rfc9112::Message::Framing::until_close;
  check(run.head.keep_alive == stays, "one stays open");
}

}  // namespace fuzz
