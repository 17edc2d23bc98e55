// rate_lines.h
// Owns:     the header fields that tell a client of its key's limits, as the SDKs of OpenAI and Anthropic read them.
// Promises: whole lines; no key is in them.
// Leaves:   the limits to fleet/key_limits.h.
// Threads:  any.
// Tested by: tests/key_limits_test.cpp, tests/e2e/keys.test.mjs
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

#include "nexus/api/errors.h"
#include "nexus/base/clock.h"
#include "nexus/base/text.h"
#include "nexus/os/log.h"

namespace nexus {

// A duration as Go writes it, without fractions of a second from one second on: `120ms`, `2s`, `6m0s`, `1h0m0s`.
inline std::string go_duration(Ns span) {
  const auto text = [](Ns number) { return std::to_string(number); };
  if (span < kSecond) return text((span + kMillisecond - 1) / kMillisecond) + "ms";
  const Ns seconds = (span + kSecond - 1) / kSecond;
  std::string out = text(seconds % 60) + "s";
  if (seconds >= 60) out.insert(0, text(seconds / 60 % 60) + "m");
  if (seconds >= 3600) out.insert(0, text(seconds / 3600) + "h");
  return out;
}

struct RateState {
  std::uint64_t limit = 0, left = 0;
  Ns full_in = 0;
};

// `what`: requests or tokens. `wall`: the time of day.
inline void append_rate_lines(std::string& out, ErrorShape shape, std::string_view what, const RateState& state,
                              Ns wall) {
  const auto line = [&](std::string_view name, std::string_view value) {
    const bool anthropic = shape == ErrorShape::anthropic;
    out.append(anthropic ? "anthropic-ratelimit-" : "x-ratelimit-").append(anthropic ? what : name);
    out.append("-").append(anthropic ? name : what).append(": ").append(value).append("\r\n");
  };
  line("limit", Digits(state.limit).view());
  line("remaining", Digits(state.left).view());
  std::string reset;
  if (shape == ErrorShape::anthropic) {
    detail::Rfc3339().append(reset, wall + state.full_in);
  } else {
    reset = go_duration(state.full_in);
  }
  line("reset", reset);
}

// When to try again; both SDKs prefer the second field.
inline void append_retry_lines(std::string& out, Ns wait) {
  const auto rounded_up = [wait](Ns unit) {
    return static_cast<std::uint64_t>(std::max<Ns>((wait + unit - 1) / unit, 1));
  };
  out.append("Retry-After: ").append(Digits(rounded_up(kSecond)).view());
  out.append("\r\nretry-after-ms: ").append(Digits(rounded_up(kMillisecond)).view()).append("\r\n");
}

// The tokens of an answer to come: what the client asks for at most, but not beyond kExpectedCompletion.
inline std::uint64_t expected_completion(std::string_view body) {
  std::uint64_t most = kExpectedCompletion;
  for (const std::string_view name : {R"("max_tokens")", R"("max_completion_tokens")", R"("max_output_tokens")"}) {
    std::size_t at = body.find(name);
    if (at == std::string_view::npos) continue;
    at = body.find_first_not_of(" \t\r\n:", at + name.size());
    std::uint64_t number = 0;
    std::size_t digits = 0;
    for (; at < body.size() && is_digit(body[at]) && digits < 10; ++at, ++digits) {
      number = number * 10 + static_cast<std::uint64_t>(body[at] - '0');
    }
    if (digits > 0) most = std::min(most, number);
  }
  return most;
}

}  // namespace nexus
