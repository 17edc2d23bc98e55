// answers.h
// Owns:     the responses of simulated backends: bytes in a framing, pauses between them, and how they end.
// Promises: the payload is derived from the request and the attempt, so that no two responses can be confused; each
//           response says if a reader may take it for complete.
// Leaves:   sending to fleet.h; judging to ledger.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "ledger.h"
#include "swarm.h"

namespace nexus::sim {

struct Answer {
  enum class End : std::uint8_t { keep, close, reset, stall };
  static constexpr std::size_t kNever = std::size_t{1} << 48;
  struct Pause {
    std::size_t at;  // before this byte of `bytes`
    Ns span;
  };
  std::string bytes;
  std::vector<Pause> pauses;  // in order
  std::size_t body_at = 0;    // behind the head
  std::size_t first_at = 0;   // of the first byte that means something, and behind that event
  std::size_t first_end = 0;
  std::size_t whole_bytes = 0;  // kNever: it cannot become whole
  std::uint16_t status = 0;
  bool garbled = false;  // no well-formed HTTP
  bool in_disguise = false, may_be_whole = false;
  bool retry_after = false;
  bool until_close = false;  // whole only at the end of the connection
  End end = End::keep;
  bool overlong = false;
};

class AnswerMaker {
 public:
  AnswerMaker(Dice& dice, const Manners& manners) : dice_(dice), manners_(manners) {}

  // `asked`: the body requests usage; `by_client`: the client requested it.
  Answer make(std::string_view id, std::size_t number, const ApiRow& api, bool stream, bool asked, bool by_client,
              Attempt& attempt) {
    Answer answer;
    api_ = &api;
    number_ = number;
    usage_end_ = 0;
    attempt.status = draw_status();
    const bool events = stream && attempt.status == 200;
    if (attempt.status == 204) {
      attempt.payload.clear();
    } else if (events) {
      event_payload(id, asked, by_client, attempt);
    } else if (attempt.status == 200) {
      json_payload(id, attempt);
    } else {
      attempt.payload = R"({"error":{"message":")" + std::string(id) + R"(","code":"backend"}})";
    }
    write(answer, id, events, attempt);
    const bool by_data = events && !api.is_lines();
    const bool says_nothing =
        by_data ? ("\n" + attempt.payload).find("\ndata:") == std::string::npos : attempt.payload.empty();
    attempt.in_disguise = attempt.status == 200 && (says_nothing || (events && tells_error(api, attempt.payload)));
    answer.status = attempt.status;
    answer.in_disguise = attempt.in_disguise;
    answer.may_be_whole = attempt.may_be_whole;
    return answer;
  }

 private:
  enum class Framing : std::uint8_t { length, chunked, until_close };

  std::uint16_t draw_status() {
    if (!dice_.chance(manners_.error_status)) return dice_.one_in(50) ? 204 : 200;
    constexpr std::uint16_t kStatuses[] = {400, 404, 422, 429, 500, 502, 503};
    return kStatuses[dice_.index(std::size(kStatuses))];
  }
  std::size_t draw_bytes() {
    return dice_.chance(manners_.large) ? dice_.number(10'000, 200'000) : dice_.skewed(0, 2000);
  }

  void draw_usage(Attempt& attempt) {
    attempt.prompt_tokens = draw_count();
    if (api_->completes) attempt.completion_tokens = draw_count();
  }
  // Often a bound of a histogram.
  std::int64_t draw_count() {
    constexpr auto& kBounds = kTokenBounds.upper;
    const bool usual = most_tokens_ == kMostTokens;
    if (usual && dice_.one_in(4)) return static_cast<std::int64_t>(kBounds[dice_.index(kBounds.size())]);
    return dice_.number(usual ? 0 : most_tokens_ / 2, most_tokens_);
  }
  static Counts counts_of(const Attempt& attempt) { return {attempt.prompt_tokens, attempt.completion_tokens}; }

  void json_payload(std::string_view id, Attempt& attempt) {
    if (!api_->empty_is_unknown && dice_.chance(manners_.hollow)) return;  // an empty body
    attempt.payload = plain_body(*api_, id, pattern_of(number_ * 64 + attempt.server, draw_bytes()));
    if (!dice_.one_in(4)) {
      draw_usage(attempt);
      attempt.payload += "," + usage_text(*api_, counts_of(attempt));
    }
    attempt.payload += "}";
  }

  void event_payload(std::string_view id, bool asked, bool by_client, Attempt& attempt) {
    const std::string_view end = dice_.one_in(4) ? "\r\n\r\n" : "\n\n";
    const bool hollow = dice_.chance(manners_.hollow);
    const std::uint32_t events = dice_.skewed(hollow && !api_->empty_is_unknown ? 0 : 1, 30);
    const std::size_t each = draw_bytes() / (events + 1) + 1;
    std::string& out = attempt.payload;
    const std::string_view content = pattern_of(number_ * 64 + attempt.server, each * events);
    const bool comments = !api_->is_lines();
    if (comments && dice_.chance(manners_.comments_first)) {
      for (std::uint32_t i = dice_.number(1, 5); i > 0; --i) out.append(dice_.one_in(2) ? ":" : ": wait").append(end);
    }
    // An error before this event, or behind all.
    const std::uint32_t error_at = !dice_.chance(manners_.error_event) ? UINT32_MAX : dice_.number(0, events);
    const bool ends = !dice_.one_in(20) && !(hollow && events == 0);
    const bool openai = api_->style == Style::openai;
    // The others tell their counts unasked, and some of them with the end.
    if (openai ? asked && !dice_.one_in(10) : (ends || api_->style == Style::messages) && !dice_.one_in(4)) {
      draw_usage(attempt);
    }
    if (events > 0) out += opening_event(*api_, id, counts_of(attempt), end);
    for (std::uint32_t i = 0; i < events; ++i) {
      if (i == error_at) out += error_event(*api_, dice_.one_in(4), end);
      if (comments && dice_.one_in(20)) out.append(": ping").append(end);
      out += piece_event(*api_, id, content.substr(std::min(content.size(), i * each), each), end);
    }
    if (openai && attempt.prompt_tokens >= 0) {
      attempt.extra_at = out.size();
      const std::string name(id);
      out +=
          event_text(*api_, "", R"("id":")" + name + R"(","choices":[],)" + usage_text(*api_, counts_of(attempt)), end);
      if (!by_client) attempt.extra_bytes = out.size() - attempt.extra_at;
      usage_end_ = out.size();
    }
    if (error_at == events) out += error_event(*api_, dice_.one_in(4), end);
    if (events > 0 || openai || ends) out += closing_events(*api_, id, counts_of(attempt), ends, end);
    attempt.lacks_end = !ends;
    if (events == 0 && !openai && !ends) attempt.prompt_tokens = attempt.completion_tokens = -1;
  }

  void write(Answer& answer, std::string_view id, bool events, Attempt& attempt) {
    const bool no_body = attempt.status == 204;
    Framing framing = static_cast<Framing>(dice_.number(0, 2));
    if (framing == Framing::until_close && !dice_.one_in(4)) framing = Framing::chunked;
    const bool http_1_0 = dice_.one_in(20) && framing != Framing::chunked;
    bool close = dice_.one_in(10) || (framing == Framing::until_close && !no_body);
    std::string& out = answer.bytes;
    write_interim(out);
    const std::size_t final_at = out.size();
    out.append(http_1_0 ? "HTTP/1.0 " : "HTTP/1.1 ").append(std::to_string(attempt.status)).append(" Sim\r\n");
    if (!no_body) {
      const std::string_view stream = api_->is_lines() ? "application/x-ndjson" : "text/event-stream";
      out.append("Content-Type: ").append(events ? stream : "application/json").append("\r\n");
    }
    out.append("X-Sim: ").append(id).append("/").append(std::to_string(attempt_number_)).append("\r\n");
    answer.retry_after = attempt.status == 429 && dice_.one_in(3);
    if (answer.retry_after) out.append("Retry-After: ").append(dice_.one_in(2) ? "1" : "0").append("\r\n");
    if (close && !http_1_0) out.append("Connection: close\r\n");
    if (dice_.one_in(10)) out.append("X-Nexus-Backend: forged\r\nX-Nexus-Fallback-Model: forged\r\n");
    if (dice_.one_in(10)) out.append("Connection: x-hop\r\nX-Hop: not for clients\r\n");
    if (framing == Framing::length && !no_body) {
      out.append("Content-Length: ").append(std::to_string(attempt.payload.size())).append("\r\n");
    }
    if (framing == Framing::chunked && !no_body) out.append("Transfer-Encoding: chunked\r\n");
    out.append("\r\n");
    const std::size_t body_at = answer.body_at = out.size();
    attempt.may_be_whole = true;
    if (!no_body) write_body(answer, framing, events, attempt);
    answer.whole_bytes = answer.garbled ? Answer::kNever : out.size();
    if (answer.first_end == 0) answer.first_at = answer.first_end = answer.whole_bytes;
    answer.end = close || http_1_0 ? Answer::End::close : Answer::End::keep;
    answer.until_close = framing == Framing::until_close && !no_body;
    spoil(answer, framing, no_body, final_at, body_at, attempt);
    draw_pauses(answer, events);
  }

  void write_interim(std::string& out) {
    if (!dice_.chance(manners_.interim)) return;
    for (std::uint32_t i = dice_.skewed(1, 20); i > 0; --i) {
      out.append(dice_.one_in(2) ? "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" : "HTTP/1.1 100 Continue\r\n\r\n");
      interim_ += 1;
    }
  }

  void write_body(Answer& answer, Framing framing, bool events, Attempt& attempt) {
    std::string& out = answer.bytes;
    const auto [first, first_end] = first_piece(attempt.payload, events);
    if (framing != Framing::chunked) {
      answer.first_at = out.size() + first;
      answer.first_end = out.size() + first_end;
      usage_end_ += usage_end_ > 0 ? out.size() : 0;
      out += attempt.payload;
      return;
    }
    std::string_view rest = attempt.payload;
    const bool broken = dice_.chance(manners_.malformed_body);
    const bool by_event = events && dice_.one_in(2);
    std::size_t usage_sent = 0;
    while (!rest.empty()) {
      std::size_t bytes = dice_.skewed(1, static_cast<std::uint32_t>(rest.size()));
      if (by_event && rest.find("\n\n") != std::string_view::npos) bytes = rest.find("\n\n") + 2;
      const std::size_t at = attempt.payload.size() - rest.size();
      char size[32];
      std::snprintf(size, sizeof size, dice_.one_in(2) ? "%zx" : "%03zX", bytes);
      out.append(size).append(dice_.one_in(30) ? ";x=y\r\n" : "\r\n").append(rest.substr(0, bytes)).append("\r\n");
      if (first >= at && first < at + bytes) answer.first_at = out.size() - 2 - bytes + (first - at);
      if (first_end > at && first_end <= at + bytes) answer.first_end = out.size();
      if (usage_end_ > at && usage_end_ <= at + bytes) usage_sent = out.size();
      rest.remove_prefix(bytes);
    }
    usage_end_ = usage_sent;
    if (broken) {
      constexpr std::string_view kBroken[] = {"zz\r\n", "\r\n", "5\n12345\r\n", "-1\r\n", "10000000000000000\r\n"};
      out.append(kBroken[dice_.index(std::size(kBroken))]);
      attempt.may_be_whole = false;
      answer.garbled = true;
      return;
    }
    out.append("0\r\n").append(dice_.one_in(30) ? "X-Trailer: t\r\n\r\n" : "\r\n");
  }

  // The positions in a payload of its first byte that means something, and of the end of that event. The first byte
  // of a plain answer is enough.
  std::pair<std::size_t, std::size_t> first_piece(const std::string& payload, bool events) const {
    if (events && api_->is_lines()) return {0, std::min(payload.find('\n'), payload.size() - 1) + 1};
    if (!events) return {0, std::min<std::size_t>(payload.size(), 1)};
    std::size_t at = 0;
    while (at < payload.size() && (payload[at] == ':' || payload[at] == '\r' || payload[at] == '\n')) {
      at = std::min(payload.find('\n', at), payload.size() - 1) + 1;
    }
    const std::size_t end = payload.find("\n\n", at), other_end = payload.find("\r\n\r\n", at);
    if (end == std::string::npos && other_end == std::string::npos) return {at, payload.size()};
    return {at, end < other_end ? end + 2 : other_end + 4};
  }

  // Adds a fault, or none.
  void spoil(Answer& answer, Framing framing, bool no_body, std::size_t final_at, std::size_t body_at,
             Attempt& attempt) {
    if (interim_ > 16) attempt.may_be_whole = false, answer.garbled = true;
    interim_ = 0;
    const bool until_close = framing == Framing::until_close && !no_body;
    if (dice_.chance(manners_.malformed_head)) {
      attempt.may_be_whole = false;
      answer.garbled = true;
      break_head(answer, final_at);
      answer.whole_bytes = Answer::kNever;
      answer.first_at = answer.first_end = answer.bytes.size();
      return;
    }
    const bool truncated = dice_.chance(manners_.truncated);
    const bool reset = dice_.chance(manners_.reset);
    const bool stall = dice_.chance(manners_.stall);
    if (truncated || reset || stall) {
      const std::size_t keep = dice_.index(answer.bytes.size() + (reset && until_close ? 1 : 0));
      bool by_fin = truncated && !reset;
      const std::size_t error_at = api_->is_lines() ? attempt.payload.find(R"({"error")") : std::string::npos;
      const bool in_error =
          error_at != std::string::npos && keep > body_at + error_at && keep < body_at + error_at + 21;
      const bool is_empty = api_->empty_is_unknown && keep <= body_at;
      const bool in_extra = in_error || is_empty ||
                            (attempt.extra_bytes > 0 && keep > body_at + attempt.extra_at &&
                             keep < body_at + attempt.extra_at + attempt.extra_bytes);
      if (until_close && keep >= body_at && by_fin && !in_extra) {
        attempt.payload.resize(keep - body_at);  // no reader can tell that the response is truncated
        if (attempt.extra_at >= attempt.payload.size()) attempt.extra_bytes = 0;
        attempt.prompt_tokens = attempt.completion_tokens = kTokensUnsure;
        attempt.is_cut_unseen = true;
      } else {
        attempt.may_be_whole = false;
        by_fin = by_fin && !(until_close && in_extra);
        attempt.told_before_end = by_fin && !stall && usage_end_ > 0 && keep >= usage_end_;
      }
      answer.bytes.resize(keep);
      answer.whole_bytes = attempt.may_be_whole ? keep : Answer::kNever;
      answer.end = stall && !reset ? Answer::End::stall : by_fin ? Answer::End::close : Answer::End::reset;
      if (until_close && answer.end == Answer::End::stall) attempt.may_be_whole = false;
      return;
    }
    if (!until_close && dice_.chance(manners_.overlong)) {
      answer.bytes.append(dice_.number(1, 20), 'Z');
      answer.overlong = true;
    }
    if (!until_close && dice_.chance(manners_.reset)) answer.end = Answer::End::reset;
  }

  void break_head(Answer& answer, std::size_t at) {
    std::string& out = answer.bytes;
    const auto put = [&](std::string_view line) {  // after the status line
      out.insert(out.find("\r\n", at) + 2, line);
    };
    switch (dice_.number(0, 11)) {
      case 0: out.replace(at, 8, "HTTP/2.0"); break;
      case 1: put("No colon here\r\n"); break;
      case 2: put("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n"); break;
      case 3: put("Content-Length: 3\r\nContent-Length: 4\r\n"); break;
      case 4: put("X-Bare: line\nfeed: x\r\n"); break;
      case 5: put("X-Fold: a\r\n b\r\n"); break;
      case 6: out.replace(at, 4, "ZZZZ"); break;
      case 7: put("Transfer-Encoding: gzip\r\n"); break;
      case 8: put("X-Long: " + std::string(200'000, 'a') + "\r\n"); break;
      case 9: out.replace(at + 9, 3, "600"); break;
      case 10: out.replace(at + 9, 3, "101"); break;
      case 11: put("Content-Length: -1\r\n"); break;
    }
  }

  void draw_pauses(Answer& answer, bool events) {
    if (dice_.chance(manners_.early_head) && answer.body_at < answer.bytes.size()) {
      std::size_t at = answer.body_at;  // then before the first event, or within the comments before it
      for (std::uint32_t i = dice_.number(1, 3); i > 0 && at < answer.bytes.size(); --i) {
        answer.pauses.push_back({at, dice_.span(0, dice_.one_in(2) ? 3 * kSecond : 300 * kMillisecond)});
        at += dice_.number(1, 20);
      }
    }
    if (!dice_.chance(manners_.slow) && !(events && dice_.one_in(8))) return;
    std::size_t at = 0;
    if (dice_.one_in(10)) return drip(answer);
    for (std::uint32_t i = dice_.number(1, 6); i > 0 && at < answer.bytes.size(); --i) {
      at += dice_.skewed(0, static_cast<std::uint32_t>(answer.bytes.size() - at));
      answer.pauses.push_back({at, dice_.span(0, dice_.one_in(8) ? kSecond : 50 * kMillisecond)});
    }
    const auto earlier = [](const Answer::Pause& a, const Answer::Pause& b) { return a.at < b.at; };
    std::stable_sort(answer.pauses.begin(), answer.pauses.end(), earlier);
  }

  // A little at a time, for longer than a client that takes nothing is kept.
  void drip(Answer& answer) {
    const std::size_t step = answer.bytes.size() / 100 + 1;
    const Ns span = dice_.span(kMillisecond, 60 * kMillisecond);
    answer.pauses.clear();
    for (std::size_t at = answer.body_at; at < answer.bytes.size(); at += step) answer.pauses.push_back({at, span});
  }

 public:
  std::size_t attempt_number_ = 0;  // of the response being made
  std::uint32_t most_tokens_ = kMostTokens;

 private:
  Dice& dice_;
  const Manners& manners_;
  const ApiRow* api_ = &kApiRows[0];
  std::size_t number_ = 0;
  std::size_t usage_end_ = 0;  // of a stream's event with the usage, in the payload and then in the answer; 0: none
  std::uint32_t interim_ = 0;
};

}  // namespace nexus::sim
