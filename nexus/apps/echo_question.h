// echo_question.h
// Owns:     what the built-in model understands: OpenAI-style requests for completions and embeddings.
// Promises: a token is a word (a long one is several), by one rule for prompt and answer; what it can't do as asked is
//           refused, not passed over.
// Leaves:   the answer to echo_answer.h; HTTP to echo_backend.h.
// Threads:  an EchoReader belongs to one thread.
#pragma once

#include <simdjson.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/api/request_json.h"

namespace nexus {

enum class EchoEndpoint : std::uint8_t { models, chat, completions, embeddings };

constexpr std::size_t kMaxEchoTokenBytes = 1024;  // a longer word is several tokens, so that an event stays small
constexpr std::size_t kMaxEchoInputs = 2048;      // of one embeddings request, as at OpenAI

// An answer that is none.
struct EchoError {
  unsigned status = 400;
  std::string message;
  std::string_view param;  // empty: null
  std::string_view code;   // empty: null
};

// What was asked, as far as it matters to an echo.
struct EchoQuestion {
  std::string model;
  bool stream = false;
  bool include_usage = false;
  std::uint64_t prompt_tokens = 0;
  std::string text;                       // to be echoed
  std::uint64_t max_tokens = UINT64_MAX;  // of the answer
  bool base64 = false;                    // embeddings: how vectors are written
  std::vector<std::uint64_t> inputs;      // embeddings: a digest each
};

// The tokens of a text, one after the other.
class EchoTokens {
 public:
  explicit EchoTokens(std::string_view text) : rest_(text) { skip_blanks(); }

  bool done() const { return rest_.empty(); }
  bool begins_word() const { return begins_word_; }  // the next token does

  std::string_view next() {
    std::size_t end = 0;
    while (end < rest_.size() && end < kMaxEchoTokenBytes && !is_blank(rest_[end])) ++end;
    // Never within a character: back to the byte that begins one.
    for (int i = 0; i < 3 && end < rest_.size() && (static_cast<unsigned char>(rest_[end]) & 0xc0) == 0x80; ++i) --end;
    const std::string_view token = rest_.substr(0, end);
    rest_.remove_prefix(end);
    begins_word_ = rest_.empty() || is_blank(rest_[0]);
    skip_blanks();
    return token;
  }

  static std::uint64_t count(std::string_view text) {
    std::uint64_t tokens = 0;
    for (EchoTokens each(text); !each.done(); each.next()) tokens += 1;
    return tokens;
  }

 private:
  static bool is_blank(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
  void skip_blanks() {
    while (!rest_.empty() && is_blank(rest_[0])) rest_.remove_prefix(1);
  }

  std::string_view rest_;
  bool begins_word_ = true;
};

// Reads a request's body.
class EchoReader {
 public:
  explicit EchoReader(std::vector<std::string> models) : models_(std::move(models)) {}

  const std::vector<std::string>& models() const { return models_; }

  // Behind the body's last byte kPaddingBytes more must be readable. An error, or nothing and the question.
  std::optional<EchoError> read(EchoEndpoint endpoint, const char* body, std::size_t bytes, EchoQuestion& question) {
    question = EchoQuestion{};
    BodyFacts facts;
    if (bytes == 0) return EchoError{400, "The request has no body; send a JSON object.", {}, {}};
    if (const BodyError error = json_.read_body(body, bytes, facts); error != BodyError::none) return refuse(error);
    question.model = facts.model;
    question.stream = facts.stream && endpoint != EchoEndpoint::embeddings;
    question.include_usage = facts.include_usage == BodyFacts::Flag::yes;
    if (std::find(models_.begin(), models_.end(), question.model) == models_.end()) {
      return EchoError{404, "The model `" + question.model.substr(0, 256) + "` does not exist here.", "model",
                       "model_not_found"};
    }
    Reading reading{endpoint, question, false, {}};
    if (!read_members(body, bytes, reading)) {
      if (!reading.error) return EchoError{400, "The body is not valid JSON.", {}, {}};
      return reading.error;
    }
    if (!reading.asked) {
      return EchoError{400, "`" + std::string(what_of(endpoint)) + "` is missing.", what_of(endpoint), {}};
    }
    return std::nullopt;
  }

 private:
  using Value = simdjson::ondemand::value;
  using Type = simdjson::ondemand::json_type;

  struct Reading {
    EchoEndpoint endpoint;
    EchoQuestion& question;
    bool asked;  // what is to be echoed was there
    std::optional<EchoError> error;
  };

  static std::string_view what_of(EchoEndpoint endpoint) {
    if (endpoint == EchoEndpoint::chat) return "messages";
    return endpoint == EchoEndpoint::completions ? "prompt" : "input";
  }

  static bool is_null(Value& value) {
    bool yes = false;
    return value.is_null().get(yes) == simdjson::SUCCESS && yes;
  }

  static EchoError refuse(BodyError error) {
    switch (error) {
      case BodyError::no_model: return {400, "`model` is missing.", "model", {}};
      case BodyError::wrong_type: return {400, "A value has the wrong type.", {}, {}};
      case BodyError::duplicate_key: return {400, "A key stands twice.", {}, {}};
      case BodyError::too_deep: return {400, "The body is nested too deeply.", {}, {}};
      default: return {400, "The body is not a JSON object.", {}, {}};
    }
  }

  static bool wrong(Reading& reading, std::string_view param, std::string_view message) {
    reading.error = EchoError{400, std::string(message), param, {}};
    return false;
  }

  // False: with an error set, or else the text is no JSON.
  bool read_members(const char* body, std::size_t bytes, Reading& reading) {
    simdjson::ondemand::document document;
    simdjson::ondemand::object object;
    const simdjson::padded_string_view padded(body, bytes, bytes + simdjson::SIMDJSON_PADDING);
    if (parser_.iterate(padded).get(document) || document.get_object().get(object)) return false;
    for (auto member : object) {
      simdjson::ondemand::field field;
      std::string_view key;
      if (std::move(member).get(field) || field.unescaped_key(false).get(key)) return false;
      if (!read_member(key, field.value(), reading)) return false;
    }
    return true;
  }

  bool read_member(std::string_view key, Value value, Reading& reading) {
    const EchoEndpoint endpoint = reading.endpoint;
    if (key == what_of(endpoint)) {
      if (reading.asked) return wrong(reading, what_of(endpoint), "A key stands twice.");
      reading.asked = true;
      if (endpoint == EchoEndpoint::chat) return read_messages(value, reading);
      return endpoint == EchoEndpoint::completions ? read_prompt(value, reading) : read_input(value, reading);
    }
    if (endpoint == EchoEndpoint::embeddings) return key != "encoding_format" || read_encoding(value, reading);
    if (key == "max_tokens") return read_max_tokens(value, "max_tokens", reading);
    if (key == "max_completion_tokens") return read_max_tokens(value, "max_completion_tokens", reading);
    if (key == "n") return read_choices(value, reading);
    return true;
  }

  bool read_max_tokens(Value value, std::string_view param, Reading& reading) {
    if (is_null(value)) return true;
    std::int64_t most = 0;
    if (value.get_int64().get(most) || most < 1) return wrong(reading, param, "It must be a whole number from 1 on.");
    reading.question.max_tokens = std::min(reading.question.max_tokens, static_cast<std::uint64_t>(most));
    return true;
  }

  bool read_choices(Value value, Reading& reading) {
    if (is_null(value)) return true;
    std::int64_t choices = 0;
    if (value.get_int64().get(choices) || choices != 1) return wrong(reading, "n", "This model gives one choice.");
    return true;
  }

  bool read_encoding(Value value, Reading& reading) {
    if (is_null(value)) return true;
    std::string_view name;
    if (value.get_string().get(name) || (name != "float" && name != "base64")) {
      return wrong(reading, "encoding_format", "It must be `float` or `base64`.");
    }
    reading.question.base64 = name == "base64";
    return true;
  }

  bool read_messages(Value value, Reading& reading) {
    simdjson::ondemand::array messages;
    if (value.get_array().get(messages)) return wrong(reading, "messages", "It must be a list.");
    std::size_t count = 0;
    for (auto element : messages) {
      Value message;
      if (std::move(element).get(message)) return false;
      if (!read_message(message, reading)) return false;
      count += 1;
    }
    return count > 0 || wrong(reading, "messages", "It must not be empty.");
  }

  bool read_message(Value value, Reading& reading) {
    simdjson::ondemand::object message;
    if (value.get_object().get(message)) return wrong(reading, "messages", "Each message must be an object.");
    parts_.clear();
    bool from_user = false;
    for (auto member : message) {
      simdjson::ondemand::field field;
      std::string_view key;
      if (std::move(member).get(field) || field.unescaped_key(false).get(key)) return false;
      if (key == "role") {
        std::string_view role;
        if (field.value().get_string().get(role)) return wrong(reading, "messages", "`role` must be a string.");
        from_user = role == "user";
      } else if (key == "content") {
        if (!read_content(field.value(), reading)) return false;
      }
    }
    for (const std::string_view part : parts_) reading.question.prompt_tokens += EchoTokens::count(part);
    if (!from_user) return true;
    std::string& text = reading.question.text;
    text.clear();
    for (const std::string_view part : parts_) {
      if (!text.empty()) text += ' ';
      text += part;
    }
    return true;
  }

  // A string, a list of parts of which those with a `text` count, or null.
  bool read_content(Value value, Reading& reading) {
    Type type;
    if (value.type().get(type)) return false;
    std::string_view text;
    if (type == Type::null) return true;
    if (type == Type::string) {
      if (value.get_string(true).get(text)) return false;
      parts_.push_back(text);
      return true;
    }
    simdjson::ondemand::array list;
    if (value.get_array().get(list)) return wrong(reading, "messages", "`content` must be a string or a list.");
    for (auto element : list) {
      simdjson::ondemand::object part;
      if (element.get_object().get(part)) return wrong(reading, "messages", "Each part must be an object.");
      if (part.find_field_unordered("text").get_string(true).get(text) == simdjson::SUCCESS) parts_.push_back(text);
    }
    return true;
  }

  bool read_prompt(Value value, Reading& reading) {
    constexpr std::string_view kExpected = "It must be a string, or a list of one string.";
    Type type;
    if (value.type().get(type)) return false;
    std::string_view text;
    if (type == Type::string) {
      if (value.get_string(true).get(text)) return false;
    } else {
      simdjson::ondemand::array list;
      if (type != Type::array || value.get_array().get(list)) return wrong(reading, "prompt", kExpected);
      std::size_t count = 0;
      for (auto element : list) {
        if (++count > 1 || element.get_string(true).get(text)) return wrong(reading, "prompt", kExpected);
      }
      if (count == 0) return wrong(reading, "prompt", kExpected);
    }
    reading.question.text = text;
    reading.question.prompt_tokens = EchoTokens::count(text);
    return true;
  }

  // A string, a list of strings, a list of token numbers, or a list of such lists.
  bool read_input(Value value, Reading& reading) {
    Type type;
    if (value.type().get(type)) return false;
    if (type == Type::string) return add_text(value, reading);
    simdjson::ondemand::array list;
    if (type != Type::array || value.get_array().get(list)) return wrong_input(reading);
    std::optional<Type> all;  // the type that every element must have
    std::uint64_t digest = kDigestStart;
    for (auto element : list) {
      Value each;
      if (std::move(element).get(each) || each.type().get(type)) return false;
      if (all.value_or(type) != type) return wrong_input(reading);
      all = type;
      if (type == Type::string   ? !add_text(each, reading)
          : type == Type::number ? !add_number(each, digest, reading)
                                 : !add_numbers(each, reading)) {
        return false;
      }
    }
    if (!all) return wrong_input(reading);
    return *all != Type::number || add_input(digest, reading);
  }

  static bool wrong_input(Reading& reading) {
    return wrong(reading, "input", "It must be a string, a list of strings, or token numbers, and not empty.");
  }

  static bool add_input(std::uint64_t digest, Reading& reading) {
    if (reading.question.inputs.size() == kMaxEchoInputs)
      return wrong(reading, "input", "It has more than 2048 entries.");
    reading.question.inputs.push_back(digest);
    return true;
  }

  static bool add_text(Value value, Reading& reading) {
    std::string_view text;
    if (value.get_string(true).get(text)) return false;
    if (text.empty()) return wrong_input(reading);
    reading.question.prompt_tokens += EchoTokens::count(text);
    std::uint64_t digest = kDigestStart;
    for (const char c : text) digest = add_to_digest(digest, static_cast<unsigned char>(c));
    return add_input(digest, reading);
  }

  static bool add_number(Value value, std::uint64_t& digest, Reading& reading) {
    std::uint64_t token = 0;
    if (value.get_uint64().get(token)) return wrong_input(reading);
    digest = add_to_digest(digest, token);
    reading.question.prompt_tokens += 1;
    return true;
  }

  static bool add_numbers(Value value, Reading& reading) {
    simdjson::ondemand::array list;
    if (value.get_array().get(list)) return wrong_input(reading);
    std::uint64_t digest = kDigestStart;
    bool empty = true;
    for (auto element : list) {
      Value each;
      if (std::move(element).get(each)) return false;
      if (!add_number(each, digest, reading)) return false;
      empty = false;
    }
    return empty ? wrong_input(reading) : add_input(digest, reading);
  }

  // FNV-1a.
  static constexpr std::uint64_t kDigestStart = 0xcbf29ce484222325;
  static std::uint64_t add_to_digest(std::uint64_t digest, std::uint64_t value) {
    return (digest ^ value) * 0x100000001b3;
  }

  std::vector<std::string> models_;
  JsonReader json_;
  simdjson::ondemand::parser parser_;
  std::vector<std::string_view> parts_;  // the texts of the message that is being read
};

}  // namespace nexus
