// echo_model.h
// Owns:     the built-in model: what a request of the OpenAI API asks of it, and the JSON of its answers.
// Promises: a chat or completion repeats the user's text token by token; `usage` counts exactly the tokens sent, by one
//           rule for prompt and answer; equal inputs have equal vectors.
// Leaves:   HTTP and time to echo_backend.h. Parameters that do not matter to an echo (n, temperature, dimensions, ...)
//           are ignored, and so are values of the wrong type, but for `model` and the input.
// Threads:  pure functions and plain values.
// Tested by: tests/echo_backend_test.cpp
#pragma once

#include <simdjson.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/api/errors.h"
#include "nexus/base/buffer.h"
#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/base/text.h"

namespace nexus {

constexpr std::size_t kMaxEchoTokenBytes = 1024;  // a longer word is several tokens, so that an event stays small
constexpr std::size_t kMaxEchoInputs = 2048;      // of one embeddings request, as at OpenAI

// ---- what a request asks for ----

struct EchoError {
  ApiError error;
  std::string_view message = {};  // empty: that of the error's row
  std::string_view param = {};    // empty: null
};

struct EchoQuestion {
  std::string model;
  std::string text;   // to be echoed
  bool chat = false;  // else a text completion, or embeddings if there are inputs
  bool stream = false;
  bool include_usage = false;
  bool base64 = false;  // embeddings: how vectors are written
  std::uint64_t prompt_tokens = 0;
  std::uint64_t max_tokens = UINT64_MAX;
  std::vector<std::uint64_t> inputs;  // embeddings: a hash of each
};

namespace detail {

constexpr std::string_view kEchoBlanks = " \t\n\v\f\r";

// Cuts the first token off `text`: a word with the white space before it. Never cuts within a character.
inline std::string_view next_echo_token(std::string_view& text) {
  const std::string_view most = text.substr(0, kMaxEchoTokenBytes);
  std::size_t end = std::min(most.find_first_of(kEchoBlanks, most.find_first_not_of(kEchoBlanks)), most.size());
  while (end > 1 && end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  const std::string_view token = text.substr(0, end);
  text.remove_prefix(end);
  return token;
}

inline std::uint64_t count_echo_tokens(std::string_view text) {
  std::uint64_t tokens = 0;
  for (; !text.empty(); ++tokens) next_echo_token(text);
  return tokens;
}

using JsonValue = simdjson::simdjson_result<simdjson::ondemand::value>;

template <class T>
T value_or(simdjson::simdjson_result<T> result, T otherwise) {
  T value = otherwise;
  return std::move(result).get(value) == simdjson::SUCCESS ? value : otherwise;
}

// Appends the text of a string, of the strings of a list, or of the `text` members of a list of objects; white space at
// the end of each is dropped. False if `value` is neither a string nor a list.
inline bool read_echo_text(JsonValue value, std::string& out) {
  std::string_view text;
  const auto append = [&] {
    if (!out.empty()) out += ' ';
    out += text.substr(0, text.find_last_not_of(kEchoBlanks) + 1);
    return true;
  };
  if (!value.get_string(true).get(text)) return append();
  simdjson::ondemand::array list;
  if (value.get_array().get(list)) return false;
  for (auto element : list) {
    if (!element.get_object()["text"].get_string(true).get(text) || !element.get_string(true).get(text)) append();
  }
  return true;
}

// The text of the user's last message is echoed; the texts of all messages count as prompt.
inline bool read_echo_messages(JsonValue value, EchoQuestion& question) {
  question.chat = true;
  simdjson::ondemand::array messages;
  if (value.get_array().get(messages)) return false;
  for (auto element : messages) {
    simdjson::ondemand::object message;
    if (element.get_object().get(message)) return false;
    std::string text;
    read_echo_text(message["content"], text);
    question.prompt_tokens += count_echo_tokens(text);
    if (value_or(message["role"].get_string(), {}) == "user") question.text = std::move(text);
  }
  return true;
}

inline bool read_echo_prompt(JsonValue value, EchoQuestion& question) {
  const bool read = read_echo_text(value, question.text);
  question.prompt_tokens = count_echo_tokens(question.text);
  return read;
}

// A string is one input; so is each string, and each list of token numbers, in a list.
inline bool read_echo_inputs(JsonValue value, EchoQuestion& question) {
  std::string_view text;
  const auto add = [&](std::uint64_t tokens) {
    question.inputs.push_back(std::hash<std::string_view>()(text));
    question.prompt_tokens += tokens;
    return question.inputs.size() <= kMaxEchoInputs;
  };
  if (!value.get_string(true).get(text)) return add(count_echo_tokens(text));
  simdjson::ondemand::array list;
  if (value.get_array().get(list)) return false;
  for (auto element : list) {
    const bool words = !element.get_string(true).get(text);
    if (!words && element.get_array().raw_json().get(text)) return false;
    const auto commas = static_cast<std::uint64_t>(std::count(text.begin(), text.end(), ','));
    if (!add(words ? count_echo_tokens(text) : commas + 1)) return false;
  }
  return !question.inputs.empty();
}

}  // namespace detail

struct EchoEndpoint {
  std::string_view path;
  std::string_view allow;                          // the methods, as a header line
  std::string_view input_key;                      // the member of the body that is echoed
  bool (*read)(detail::JsonValue, EchoQuestion&);  // reads that member; null: there is no body
  std::string_view rule;                           // the error message if it can't be read
};

constexpr std::array<EchoEndpoint, 4> kEchoEndpoints{{
    {"/v1/models", "Allow: GET, HEAD\r\n", {}, nullptr, {}},
    {"/v1/chat/completions", "Allow: POST\r\n", "messages", detail::read_echo_messages,
     "messages must be a list of objects."},
    {"/v1/completions", "Allow: POST\r\n", "prompt", detail::read_echo_prompt, "prompt must be a string."},
    {"/v1/embeddings", "Allow: POST\r\n", "input", detail::read_echo_inputs,
     "input must be a string, or a list of 1 to 2048 strings or lists of token numbers."},
}};

inline const EchoEndpoint* find_echo_endpoint(std::string_view path) {
  for (const EchoEndpoint& each : kEchoEndpoints) {
    if (each.path == path) return &each;
  }
  return nullptr;
}

// Reads a body into `question`; an error if it is not in order. REQUIRES: kPaddingBytes readable bytes behind the body.
inline std::optional<EchoError> read_echo_question(const EchoEndpoint& endpoint, std::string_view body,
                                                   const std::vector<std::string>& models, EchoQuestion& question) {
  using detail::value_or;
  question = EchoQuestion{};
  simdjson::ondemand::parser parser;
  simdjson::ondemand::document document;
  simdjson::ondemand::object object;
  const simdjson::padded_string_view padded(body.data(), body.size(), body.size() + kPaddingBytes);
  if (body.empty() || parser.iterate(padded).get(document) || document.get_object().get(object)) {
    return EchoError{ApiError::bad_json};
  }
  question.model = value_or(object["model"].get_string(), {});
  question.stream = value_or(object["stream"].get_bool(), false);
  question.include_usage = value_or(object["stream_options"]["include_usage"].get_bool(), false);
  question.base64 = value_or(object["encoding_format"].get_string(), {}) == "base64";
  question.max_tokens = std::min(value_or(object["max_tokens"].get_uint64(), UINT64_MAX),
                                 value_or(object["max_completion_tokens"].get_uint64(), UINT64_MAX));
  const bool read = endpoint.read(object[endpoint.input_key], question);
  if (!document.is_alive()) return EchoError{ApiError::bad_json};
  if (question.model.empty()) return EchoError{ApiError::no_model, {}, "model"};
  if (std::find(models.begin(), models.end(), question.model) == models.end()) {
    return EchoError{ApiError::model_not_found, "Unknown model. GET /v1/models lists the available models.", "model"};
  }
  if (!read) return EchoError{ApiError::wrong_type, endpoint.rule, endpoint.input_key};
  return std::nullopt;
}

// ---- what is answered ----

// A completion, as a stream of events or as one object. `question` must outlive it.
class EchoAnswer {
 public:
  EchoAnswer(const EchoQuestion& question, std::uint64_t ordinal) : question_(question), rest_(question.text) {
    const bool chat = question.chat;
    head_ = chat ? R"({"id":"chatcmpl-echo-)" : R"({"id":"cmpl-echo-)";
    head_ += std::to_string(ordinal) + R"(","object":")";
    head_ += !chat ? "text_completion" : question.stream ? "chat.completion.chunk" : "chat.completion";
    head_ += R"(","created":)" + std::to_string(wall_now() / kSecond);
    head_ += R"(,"model":)" + json_string(question.model) + R"(,"choices":[)";
  }

  bool tokens_left() const { return !rest_.empty() && sent_ < question_.max_tokens; }

  // The first event of a stream.
  void append_begin(std::string& out) const {
    if (question_.chat) append_event(out, R"("delta":{"role":"assistant","content":""})", "null");
  }

  // A stream's event for the next token; nothing if all comes as one object at the end.
  void append_token(std::string& out) {
    const std::string_view text = detail::next_echo_token(rest_);
    sent_ += 1;
    if (!question_.stream) return;
    const std::string token = json_string(text);
    append_event(out, question_.chat ? R"("delta":{"content":)" + token + "}" : R"("text":)" + token, "null");
  }

  // A stream's last events, or the one object.
  void append_end(std::string& out) const {
    const char* reason = rest_.empty() ? "\"stop\"" : "\"length\"";
    if (!question_.stream) {
      const std::string text = json_string(question_.text.substr(0, question_.text.size() - rest_.size()));
      out += choice(question_.chat ? R"("message":{"role":"assistant","content":)" + text + R"(,"refusal":null})"
                                   : R"("text":)" + text,
                    reason);
      out += usage() + "}";
      return;
    }
    append_event(out, question_.chat ? R"("delta":{})" : R"("text":"")", reason);
    if (question_.include_usage) out += "data: " + head_ + "]" + usage() + "}\n\n";
    out += "data: [DONE]\n\n";
  }

 private:
  void append_event(std::string& out, const std::string& member, const char* reason) const {
    out += "data: " + choice(member, reason) + (question_.include_usage ? ",\"usage\":null}\n\n" : "}\n\n");
  }

  // An object with one choice, its last brace left out.
  std::string choice(const std::string& member, const char* reason) const {
    return head_ + R"({"index":0,)" + member + R"(,"logprobs":null,"finish_reason":)" + reason + "}]";
  }

  std::string usage() const {
    return R"(,"usage":{"prompt_tokens":)" + std::to_string(question_.prompt_tokens) + R"(,"completion_tokens":)" +
           std::to_string(sent_) + R"(,"total_tokens":)" + std::to_string(question_.prompt_tokens + sent_) + "}";
  }

  const EchoQuestion& question_;
  std::string_view rest_;  // of the text: not sent yet
  std::string head_;       // of every object, up to its choices
  std::uint64_t sent_ = 0;
};

namespace detail {

inline std::string base64_of(std::string_view bytes) {
  constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (std::size_t at = 0; at < bytes.size(); at += 3) {
    const std::size_t have = std::min<std::size_t>(3, bytes.size() - at);
    std::uint32_t group = 0;
    for (std::size_t i = 0; i < 3; ++i) group = group << 8 | (i < have ? static_cast<unsigned char>(bytes[at + i]) : 0);
    for (std::size_t i = 0; i < 4; ++i) out += i <= have ? kAlphabet[group >> (18 - 6 * i) & 63] : '=';
  }
  return out;
}

// A vector of length one: 64 parts of equal size, whose signs are the bits of the input's hash.
inline std::string echo_vector(std::uint64_t hash, bool base64) {
  static_assert(std::endian::native == std::endian::little);  // the order that clients expect in base64
  std::array<float, 64> vector;
  for (std::size_t i = 0; i < vector.size(); ++i) vector[i] = (hash >> i & 1) != 0 ? -0.125F : 0.125F;
  if (base64) return '"' + base64_of({reinterpret_cast<const char*>(vector.data()), sizeof vector}) + '"';
  std::string out = "[";
  for (const float part : vector) out += part < 0 ? "-0.125," : "0.125,";
  out.back() = ']';
  return out;
}

}  // namespace detail

inline std::string echo_embeddings(const EchoQuestion& question) {
  std::string out = R"({"object":"list","data":[)";
  for (std::size_t i = 0; i < question.inputs.size(); ++i) {
    out += (i > 0 ? R"(,{"object":"embedding","index":)" : R"({"object":"embedding","index":)") + std::to_string(i);
    out += R"(,"embedding":)" + detail::echo_vector(question.inputs[i], question.base64) + "}";
  }
  const std::string tokens = std::to_string(question.prompt_tokens);
  return out + R"(],"model":)" + json_string(question.model) + R"(,"usage":{"prompt_tokens":)" + tokens +
         R"(,"total_tokens":)" + tokens + "}}";
}

inline std::string echo_model_list(const std::vector<std::string>& models) {
  std::string out = R"({"object":"list","data":[)";
  for (const std::string& model : models) {
    out += (out.back() == '}' ? R"(,{"id":)" : R"({"id":)") + json_string(model);
    out += R"(,"object":"model","created":0,"owned_by":"nexus"})";
  }
  return out + "]}";
}

}  // namespace nexus
