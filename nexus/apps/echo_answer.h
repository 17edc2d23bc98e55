// echo_answer.h
// Owns:     what the built-in model says: a completion as a stream of events or whole, vectors, the model list, errors.
// Promises: the words of the question, one token after the other; `usage` tells exactly what was sent; the same input
//           has the same vector.
// Leaves:   when a token is due, and HTTP, to echo_backend.h.
// Threads:  plain values.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "nexus/apps/echo_question.h"
#include "nexus/base/text.h"

namespace nexus {

constexpr std::size_t kEchoDimensions = 8;

// The texts of one answer; `ordinal` and `created_s` make its id and date. The question must outlive it.
class EchoAnswer {
 public:
  EchoAnswer(EchoEndpoint endpoint, const EchoQuestion& question, std::uint64_t ordinal, std::int64_t created_s)
      : chat_(endpoint == EchoEndpoint::chat), question_(question), tokens_(question.text) {
    lead_ = chat_ ? "\"id\":\"chatcmpl-echo-" : "\"id\":\"cmpl-echo-";
    lead_ += Digits(ordinal).view();
    lead_ += "\",\"object\":\"";
    lead_ += !chat_ ? "text_completion" : question.stream ? "chat.completion.chunk" : "chat.completion";
    lead_ += "\",\"created\":";
    lead_ += Digits(static_cast<std::uint64_t>(created_s)).view();
    lead_ += ",\"model\":" + json_string(question.model) + ",\"choices\":[";
  }

  std::uint64_t sent() const { return sent_; }
  bool tokens_left() const { return !tokens_.done() && sent_ < question_.max_tokens; }

  // ---- as a stream of events ----

  void append_opening(std::string& out) const {
    if (chat_) append_event(out, "\"delta\":{\"role\":\"assistant\",\"content\":\"\"}", "null");
  }
  void append_next_token(std::string& out) {
    std::string text = chat_ ? "\"delta\":{\"content\":\"" : "\"text\":\"";
    append_token(text);
    text += chat_ ? "\"}" : "\"";
    append_event(out, text, "null");
  }
  void append_closing(std::string& out) const {
    append_event(out, chat_ ? "\"delta\":{}" : "\"text\":\"\"", finish_reason());
    if (question_.include_usage) {
      out += "data: {" + lead_ + "],\"usage\":";
      append_usage(out);
      out += "}\n\n";
    }
    out += "data: [DONE]\n\n";
  }

  // ---- as a whole ----

  std::string whole() {
    std::string out = "{" + lead_ + "{\"index\":0,";
    out += chat_ ? "\"message\":{\"role\":\"assistant\",\"content\":\"" : "\"text\":\"";
    while (tokens_left()) append_token(out);
    out += chat_ ? "\",\"refusal\":null}" : "\"";
    out += ",\"logprobs\":null,\"finish_reason\":";
    out += finish_reason();
    out += "}],\"usage\":";
    append_usage(out);
    return out += '}';
  }

 private:
  void append_token(std::string& out) {
    if (sent_ > 0 && tokens_.begins_word()) out += ' ';
    append_json_escaped(out, tokens_.next());
    sent_ += 1;
  }

  void append_event(std::string& out, std::string_view what, std::string_view finish) const {
    out += "data: {";
    out += lead_;
    out += "{\"index\":0,";
    out += what;
    out += ",\"logprobs\":null,\"finish_reason\":";
    out += finish;
    out += question_.include_usage ? "}],\"usage\":null}\n\n" : "}]}\n\n";
  }

  std::string_view finish_reason() const { return tokens_.done() ? "\"stop\"" : "\"length\""; }

  void append_usage(std::string& out) const {
    out += "{\"prompt_tokens\":";
    out += Digits(question_.prompt_tokens).view();
    out += ",\"completion_tokens\":";
    out += Digits(sent_).view();
    out += ",\"total_tokens\":";
    out += Digits(question_.prompt_tokens + sent_).view();
    out += '}';
  }

  bool chat_;
  const EchoQuestion& question_;
  EchoTokens tokens_;
  std::string lead_;  // what every event begins with, up to its choices
  std::uint64_t sent_ = 0;
};

namespace detail {

// A unit vector that belongs to the digest (splitmix64 for its numbers).
inline std::array<float, kEchoDimensions> echo_vector(std::uint64_t digest) {
  std::array<double, kEchoDimensions> raw;
  double squares = 0;
  for (double& x : raw) {
    digest += 0x9e3779b97f4a7c15;
    std::uint64_t z = digest;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    z ^= z >> 31;
    x = static_cast<double>(z >> 11) * 0x1p-52 - 1;  // [-1, 1)
    squares += x * x;
  }
  std::array<float, kEchoDimensions> unit;
  for (std::size_t i = 0; i < unit.size(); ++i) unit[i] = static_cast<float>(raw[i] / std::sqrt(squares));
  return unit;
}

inline void append_base64(std::string& out, std::string_view bytes) {
  constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (std::size_t at = 0; at < bytes.size(); at += 3) {
    const std::size_t have = std::min<std::size_t>(3, bytes.size() - at);
    std::uint32_t group = 0;
    for (std::size_t i = 0; i < 3; ++i) group = group << 8 | (i < have ? static_cast<unsigned char>(bytes[at + i]) : 0);
    for (std::size_t i = 0; i < 4; ++i) out += i <= have ? kAlphabet[group >> (18 - 6 * i) & 63] : '=';
  }
}

inline void append_echo_vector(std::string& out, std::uint64_t digest, bool base64) {
  static_assert(std::endian::native == std::endian::little);  // the form in which clients decode base64
  const auto vector = echo_vector(digest);
  if (base64) {
    out += '"';
    append_base64(out, {reinterpret_cast<const char*>(vector.data()), sizeof vector});
    out += '"';
    return;
  }
  for (std::size_t i = 0; i < vector.size(); ++i) {
    std::array<char, 32> digits;
    const char* end = std::to_chars(digits.data(), digits.data() + digits.size(), vector[i]).ptr;
    out += i == 0 ? '[' : ',';
    out.append(digits.data(), static_cast<std::size_t>(end - digits.data()));
  }
  out += ']';
}

}  // namespace detail

inline std::string echo_embeddings(const EchoQuestion& question) {
  std::string out = "{\"object\":\"list\",\"data\":[";
  for (std::size_t i = 0; i < question.inputs.size(); ++i) {
    if (i > 0) out += ',';
    out += "{\"object\":\"embedding\",\"index\":";
    out += Digits(i).view();
    out += ",\"embedding\":";
    detail::append_echo_vector(out, question.inputs[i], question.base64);
    out += '}';
  }
  out += "],\"model\":" + json_string(question.model) + ",\"usage\":{\"prompt_tokens\":";
  out += Digits(question.prompt_tokens).view();
  out += ",\"total_tokens\":";
  out += Digits(question.prompt_tokens).view();
  return out += "}}";
}

inline std::string echo_model_list(std::span<const std::string> models, std::int64_t created_s) {
  std::string out = "{\"object\":\"list\",\"data\":[";
  for (const std::string& model : models) {
    if (out.back() == '}') out += ',';
    out += "{\"id\":" + json_string(model) + ",\"object\":\"model\",\"created\":";
    out += Digits(static_cast<std::uint64_t>(created_s)).view();
    out += ",\"owned_by\":\"nexus\"}";
  }
  return out += "]}";
}

inline std::string echo_error_text(const EchoError& error) {
  const auto or_null = [](std::string_view text) { return text.empty() ? std::string("null") : json_string(text); };
  return "{\"error\":{\"message\":" + json_string(error.message) +
         ",\"type\":\"invalid_request_error\",\"param\":" + or_null(error.param) + ",\"code\":" + or_null(error.code) +
         "}}";
}

}  // namespace nexus
