// request_json.h
// Owns:     simdjson behind a few questions: what does a request ask for, where do its values lie, what did a `usage`
//           say, which models does a list name?
// Promises: one pass over the bytes where they were received; no copy; two keys of one meaning are refused, since a
//           backend might read the other one; nothing throws.
// Leaves:   what the answers mean to errors.h, usage_scan.h and the exchange.
// Threads:  a reader belongs to one thread; views in its answers last until its next call.
#pragma once

#include <emmintrin.h>
#include <simdjson.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/base/buffer.h"

namespace nexus {

static_assert(kPaddingBytes >= simdjson::SIMDJSON_PADDING);

// A piece of a body, counted from its first byte.
struct BodySpan {
  std::size_t at = 0;
  std::size_t bytes = 0;
};

enum class BodyError : std::uint8_t {
  none,
  not_json,       // not one JSON object, or not UTF-8
  duplicate_key,  // a key that Nexus acts on stands twice
  no_model,       // no `model`, or it is empty
  wrong_type,     // `model` is no string, `stream` no boolean, …
  too_deep,       // nested deeper than kMaxJsonDepth
  out_of_memory,  // it may be in order: it was not read
};

// What came of reading a list of models.
enum class ModelList : std::uint8_t { read, none, out_of_memory };

constexpr std::size_t kMaxJsonDepth = 512;

// The longest string, as it stands in a body, that is read as a name: a longer one comes as it stands, cut. Names that
// an owner can set have kMaxModelNameBytes at most.
constexpr std::size_t kReadNameBytes = 4096 - simdjson::SIMDJSON_PADDING;
constexpr std::size_t kCutNameBytes = 4096;
constexpr std::size_t kReadKeyBytes = 256 - simdjson::SIMDJSON_PADDING;

// Messages with images say so by this key.
inline constexpr std::string_view kImageKey = "\"image_url\"";

// What a request's body says that matters here.
struct BodyFacts {
  enum class Options : std::uint8_t { absent, null, object };
  enum class Flag : std::uint8_t { absent, no, yes, null };

  std::string_view model;        // decoded
  BodySpan model_value;          // with its quotes
  std::size_t first_member = 0;  // just behind the `{` of the body
  bool stream = false;
  Options stream_options = Options::absent;
  BodySpan stream_options_value;
  bool stream_options_empty = true;  // an object without members
  Flag include_usage = Flag::absent;
  BodySpan include_usage_value;
  bool has_tools = false;
  bool json_mode = false;
  BodySpan messages;        // the value of `messages`, if any
  bool has_images = false;  // they say "image_url" somewhere
};

// Handle counts of a `usage` object; -1 where it tells none.
struct Usage {
  std::int64_t prompt_tokens = -1;
  std::int64_t completion_tokens = -1;
  bool told() const { return prompt_tokens >= 0 || completion_tokens >= 0; }
};

// How many `[` (0x5b) and `{` (0x7b) there are, in strings too. Sixteen bytes at a time: large bodies are looked at.
inline std::size_t count_openers(std::string_view text) {
  const __m128i fold = _mm_set1_epi8(static_cast<char>(0xdf));
  const __m128i opener = _mm_set1_epi8(0x5b);
  std::size_t count = 0;
  std::size_t at = 0;
  while (at + 16 <= text.size()) {
    // A byte counts to 255 at most: so many rounds, then the sixteen sums are added up.
    __m128i sums = _mm_setzero_si128();
    for (int round = 0; round < 255 && at + 16 <= text.size(); ++round, at += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(text.data() + at));
      sums = _mm_sub_epi8(sums, _mm_cmpeq_epi8(_mm_and_si128(bytes, fold), opener));
    }
    const __m128i halves = _mm_sad_epu8(sums, _mm_setzero_si128());
    count += static_cast<std::size_t>(_mm_cvtsi128_si64(halves) + _mm_cvtsi128_si64(_mm_srli_si128(halves, 8)));
  }
  for (; at < text.size(); ++at) count += (text[at] & 0xdf) == 0x5b ? 1u : 0u;
  return count;
}

// Whether the text nests arrays and objects deeper than `limit`. Cheap where it can't: few brackets open in most
// bodies.
inline bool nests_deeper(std::string_view text, std::size_t limit) {
  if (text.size() <= limit) return false;
  if (count_openers(text) <= limit) return false;
  std::size_t depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > limit) return true;
    } else if (c == ']' || c == '}') {
      depth -= depth > 0 ? 1 : 0;
    }
  }
  return false;
}

class JsonReader {
 public:
  // What a piece of an answer or a usual body needs is there from the start; it is touched only as far as it is used.
  JsonReader() {
    if (small_.allocate(kSmallText) != simdjson::SUCCESS) throw std::bad_alloc();
  }

  // The text of the last call was not read, for memory was too short.
  bool out_of_memory() const { return out_of_memory_; }

  // Reads a request's body. Behind its last byte kPaddingBytes more must be readable.
  // `find_messages`: whether facts.messages and facts.has_images are wanted.
  BodyError read_body(const char* body, std::size_t bytes, BodyFacts& facts, bool find_messages = true) {
    facts = BodyFacts{};
    if (nests_deeper({body, bytes}, kMaxJsonDepth)) return BodyError::too_deep;
    simdjson::ondemand::document document;
    simdjson::ondemand::object object;
    // A byte order mark is no JSON (RFC 8259 8.1), though simdjson would step over it.
    if (bytes >= 3 && std::string_view(body, 3) == "\xef\xbb\xbf") return BodyError::not_json;
    if (iterate(body, bytes, document)) return out_of_memory_ ? BodyError::out_of_memory : BodyError::not_json;
    if (document.get_object().get(object)) return BodyError::not_json;
    Reading reading{body, facts, {}, find_messages};
    bool first = true;
    for (auto member : object) {
      simdjson::ondemand::field field;
      if (std::move(member).get(field)) return BodyError::not_json;
      if (first) facts.first_member = first_member_of(body);
      first = false;
      std::string_view key;
      if (key_of(field, key)) return BodyError::not_json;
      const BodyError error = read_member(key, field.value(), reading);
      if (error != BodyError::none) return error;
    }
    // A fault inside a value that was passed over ends the iteration without a word; the document is dead then, and
    // must not be asked for its end.
    if (!document.is_alive() || !document.at_end()) return BodyError::not_json;
    if (!reading.seen.model) return BodyError::no_model;
    return BodyError::none;
  }

  // A key of a body, quotes and all, as read_body() sees it: escapes undone where there are any. Behind its quote
  // kPaddingBytes must be readable. False where its escapes are broken.
  bool read_key(std::string_view token, std::string_view& key) {
    const simdjson::ondemand::raw_json_string raw(reinterpret_cast<const std::uint8_t*>(token.data()) + 1);
    return !text_of(raw, token, key_text_, key);
  }

  // Reads `{"prompt_tokens": …, "completion_tokens": …}`.
  Usage read_usage(const char* object_text, std::size_t bytes) {
    simdjson::ondemand::document document;
    simdjson::ondemand::object object;
    Usage usage;
    if (iterate(object_text, bytes, document) || document.get_object().get(object)) return usage;
    read_usage_members(object, usage);
    return usage;
  }

  // The `usage` of a whole answer; the last one counts, as in a stream.
  Usage read_answer(const char* text, std::size_t bytes) {
    Usage usage;
    if (read_last_member({text, bytes}, usage)) return usage;
    simdjson::ondemand::document document;
    simdjson::ondemand::object object;
    if (iterate(text, bytes, document) || document.get_object().get(object)) return usage;
    for (auto member : object) {
      simdjson::ondemand::field field;
      std::string_view key;
      if (std::move(member).get(field) || key_of(field, key)) return usage;
      simdjson::ondemand::object counts;
      if (key != "usage" || field.value().get_object().get(counts)) continue;
      usage = Usage{};
      read_usage_members(counts, usage);
    }
    return usage;
  }

  // The model names of a list: `{"data":[{"id":…}]}` (OpenAI) or `{"models":[{"name":…}]}` (Ollama). At most `most`
  // of them; `more` says that there were others.
  ModelList read_models(const char* text, std::size_t bytes, std::size_t most, std::vector<std::string>& names,
                        bool& more) {
    names.clear();
    more = false;
    simdjson::ondemand::document document;
    simdjson::ondemand::object object;
    if (iterate(text, bytes, document)) return out_of_memory_ ? ModelList::out_of_memory : ModelList::none;
    if (document.get_object().get(object)) return ModelList::none;
    for (auto member : object) {
      simdjson::ondemand::field field;
      std::string_view key;
      if (std::move(member).get(field) || key_of(field, key)) return ModelList::none;
      if (key != "data" && key != "models") continue;
      simdjson::ondemand::array list;
      if (field.value().get_array().get(list)) return ModelList::none;
      const bool read = read_model_list(list, key == "data" ? "id" : "name", most, names, more);
      return read ? ModelList::read : ModelList::none;
    }
    return ModelList::none;
  }

 private:
  struct Seen {
    bool model = false, stream = false, stream_options = false, include_usage = false, tools = false, format = false,
         messages = false;
  };
  struct Reading {
    const char* body;
    BodyFacts& facts;
    Seen seen;
    bool find_messages;
  };

  // The usual case: `usage` is the last member, and small, so that only the answer's end has to be looked at. An object
  // that stands behind `"usage":` and before nothing but the brace which ends the text is a member of the outermost
  // object: in JSON, a quote inside a string is escaped, and braces pair. False where it is not so.
  bool read_last_member(std::string_view text, Usage& usage) {
    constexpr std::string_view kBlanks = " \n\r\t";
    constexpr std::size_t kLookedAt = 512;
    constexpr int kObjects = 4;  // that may begin in a usage: its details
    const std::size_t last = text.find_last_not_of(kBlanks);
    if (last == std::string_view::npos || text[last] != '}') return false;
    text = text.substr(0, last);
    text.remove_prefix(text.size() - std::min(text.size(), kLookedAt));
    std::size_t at = text.size();
    for (int i = 0; i < kObjects; ++i) {
      const void* const brace = memrchr(text.data(), '{', at);
      if (brace == nullptr) return false;
      at = static_cast<std::size_t>(static_cast<const char*>(brace) - text.data());
      if (ends_with_usage_key(text.substr(0, at))) return read_to_end(text.substr(at), usage);
    }
    return false;
  }

  // `…"usage":`, the first quote being no escaped one.
  static bool ends_with_usage_key(std::string_view text) {
    constexpr std::string_view kBlanks = " \n\r\t";
    constexpr std::string_view kKey = "\"usage\"";
    std::size_t last = text.find_last_not_of(kBlanks);
    if (last == std::string_view::npos || text[last] != ':') return false;
    last = text.substr(0, last).find_last_not_of(kBlanks);
    if (last == std::string_view::npos || last < kKey.size()) return false;
    const std::size_t at = last + 1 - kKey.size();
    return text.substr(at, kKey.size()) == kKey && text[at - 1] != '\\';
  }

  // A text that must be one usage object and nothing else.
  bool read_to_end(std::string_view text, Usage& usage) {
    simdjson::ondemand::document document;
    simdjson::ondemand::object object;
    if (iterate(text.data(), text.size(), document) || document.get_object().get(object)) return false;
    read_usage_members(object, usage);
    if (document.is_alive() && document.at_end()) return true;
    usage = Usage{};
    return false;
  }

  // True where the text can't be read.
  bool iterate(const char* text, std::size_t bytes, simdjson::ondemand::document& document) {
    out_of_memory_ = false;
    if (bytes == 0) return true;  // simdjson would look into an index that it may have no memory for
    // A document far larger than the last ones would keep its index for good: give a large one back.
    if (large_.capacity() > kKeptCapacity && bytes < kKeptCapacity) large_ = simdjson::ondemand::parser();
    const simdjson::padded_string_view padded(text, bytes, bytes + simdjson::SIMDJSON_PADDING);
    const simdjson::error_code error = (bytes <= kSmallText ? small_ : large_).iterate(padded).get(document);
    out_of_memory_ = error == simdjson::MEMALLOC;
    return error != simdjson::SUCCESS;
  }

  // The key as a reader sees it: escapes undone where there are any.
  bool key_of(simdjson::ondemand::field& field, std::string_view& key) {
    return text_of(field.key(), field.key_raw_json_token(), key_text_, key);
  }

  bool string_of(simdjson::ondemand::value value, std::string_view& text) {
    simdjson::ondemand::raw_json_string raw;
    const std::string_view token = value.raw_json_token();
    if (value.get_raw_json_string().get(raw)) return true;
    return text_of(raw, token, value_text_, text);
  }

  // The same, for what must not overwrite the model's name.
  bool text_of_type(simdjson::ondemand::value value, std::string_view& text) {
    simdjson::ondemand::raw_json_string raw;
    const std::string_view token = value.raw_json_token();
    if (value.get_raw_json_string().get(raw)) return true;
    return text_of(raw, token, key_text_, text);
  }

  // The text of a string: the bytes themselves, or unescaped into `room`. True where its escapes are broken. A longer
  // one than `room` comes as it stands, cut: no name that matters is so long. (simdjson's own buffer is not used: it
  // is not looked at whether there was memory for it.)
  template <std::size_t N>
  bool text_of(simdjson::ondemand::raw_json_string raw, std::string_view token, std::array<std::uint8_t, N>& room,
               std::string_view& text) {
    const std::size_t close = token.rfind('"');
    if (close == 0 || close == std::string_view::npos) return true;
    text = {raw.raw(), close - 1};
    if (text.size() + simdjson::SIMDJSON_PADDING > N) {
      text = text.substr(0, N);
      return false;
    }
    if (std::memchr(text.data(), '\\', text.size()) == nullptr) return false;
    std::uint8_t* to = room.data();
    return small_.unescape(raw, to, false).get(text) != simdjson::SUCCESS;
  }

  static std::size_t first_member_of(const char* body) {
    std::size_t at = 0;
    while (body[at] != '{') ++at;  // white space alone stands before it, or it would be no object
    return at + 1;
  }

  static BodySpan span_of(const char* body, std::string_view text) {
    while (!text.empty() && (text.back() == ' ' || text.back() == '\n' || text.back() == '\r' || text.back() == '\t')) {
      text.remove_suffix(1);
    }
    return {static_cast<std::size_t>(text.data() - body), text.size()};
  }

  BodyError read_member(std::string_view key, simdjson::ondemand::value value, Reading& reading) {
    // By length first: a body has many keys, and almost none of them is one of these.
    switch (key.size()) {
      case 5:
        if (key == "model") return read_model(value, reading);
        if (key == "tools") return read_tools(value, reading);
        return BodyError::none;
      case 6: return key == "stream" ? read_stream(value, reading) : BodyError::none;
      case 8: return key == "messages" ? read_messages(value, reading) : BodyError::none;
      case 14: return key == "stream_options" ? read_stream_options(value, reading) : BodyError::none;
      case 15: return key == "response_format" ? read_format(value, reading) : BodyError::none;
      default: return BodyError::none;
    }
  }

  static bool twice(bool& seen) { return std::exchange(seen, true); }

  BodyError read_model(simdjson::ondemand::value value, Reading& reading) {
    if (twice(reading.seen.model)) return BodyError::duplicate_key;
    simdjson::ondemand::json_type type;
    if (value.type().get(type)) return BodyError::not_json;
    if (type != simdjson::ondemand::json_type::string) return BodyError::wrong_type;
    reading.facts.model_value = span_of(reading.body, value.raw_json_token());
    if (string_of(value, reading.facts.model)) return BodyError::not_json;
    return reading.facts.model.empty() ? BodyError::no_model : BodyError::none;
  }

  BodyError read_stream(simdjson::ondemand::value value, Reading& reading) {
    if (twice(reading.seen.stream)) return BodyError::duplicate_key;
    simdjson::ondemand::json_type type;
    if (value.type().get(type)) return BodyError::not_json;
    if (type == simdjson::ondemand::json_type::null) return BodyError::none;
    if (value.get_bool().get(reading.facts.stream)) return BodyError::wrong_type;
    return BodyError::none;
  }

  BodyError read_tools(simdjson::ondemand::value value, Reading& reading) {
    if (twice(reading.seen.tools)) return BodyError::duplicate_key;
    simdjson::ondemand::array tools;
    bool empty = true;
    if (value.get_array().get(tools)) return BodyError::none;  // null, or the backend's to refuse
    if (tools.is_empty().get(empty)) return BodyError::not_json;
    reading.facts.has_tools = !empty;
    return BodyError::none;
  }

  BodyError read_messages(simdjson::ondemand::value value, Reading& reading) {
    if (twice(reading.seen.messages)) return BodyError::duplicate_key;
    if (!reading.find_messages) return BodyError::none;
    std::string_view text;
    if (value.raw_json().get(text)) return BodyError::not_json;
    reading.facts.messages = span_of(reading.body, text);
    reading.facts.has_images = text.find(kImageKey) != std::string_view::npos;
    return BodyError::none;
  }

  BodyError read_format(simdjson::ondemand::value value, Reading& reading) {
    if (twice(reading.seen.format)) return BodyError::duplicate_key;
    simdjson::ondemand::object object;
    std::string_view type;
    if (value.get_object().get(object)) return BodyError::none;
    simdjson::ondemand::value found;
    if (object.find_field_unordered("type").get(found) || text_of_type(found, type)) return BodyError::none;
    reading.facts.json_mode = type == "json_object" || type == "json_schema";
    return BodyError::none;
  }

  BodyError read_stream_options(simdjson::ondemand::value value, Reading& reading) {
    if (twice(reading.seen.stream_options)) return BodyError::duplicate_key;
    simdjson::ondemand::json_type type;
    if (value.type().get(type)) return BodyError::not_json;
    if (type == simdjson::ondemand::json_type::null) {
      reading.facts.stream_options = BodyFacts::Options::null;
      reading.facts.stream_options_value = span_of(reading.body, value.raw_json_token());
      return BodyError::none;
    }
    simdjson::ondemand::object object;
    if (value.get_object().get(object)) return BodyError::wrong_type;
    std::string_view text;
    if (object.raw_json().get(text)) return BodyError::not_json;
    reading.facts.stream_options = BodyFacts::Options::object;
    reading.facts.stream_options_value = span_of(reading.body, text);
    if (object.reset().error()) return BodyError::not_json;
    for (auto member : object) {
      simdjson::ondemand::field field;
      std::string_view key;
      if (std::move(member).get(field) || key_of(field, key)) return BodyError::not_json;
      reading.facts.stream_options_empty = false;
      if (key != "include_usage") continue;
      const BodyError error = read_include_usage(field.value(), reading);
      if (error != BodyError::none) return error;
    }
    return BodyError::none;
  }

  BodyError read_include_usage(simdjson::ondemand::value value, Reading& reading) {
    if (twice(reading.seen.include_usage)) return BodyError::duplicate_key;
    BodyFacts& facts = reading.facts;
    facts.include_usage_value = span_of(reading.body, value.raw_json_token());
    simdjson::ondemand::json_type type;
    if (value.type().get(type)) return BodyError::not_json;
    if (type == simdjson::ondemand::json_type::null) {
      facts.include_usage = BodyFacts::Flag::null;
      return BodyError::none;
    }
    bool yes = false;
    if (value.get_bool().get(yes)) return BodyError::wrong_type;
    facts.include_usage = yes ? BodyFacts::Flag::yes : BodyFacts::Flag::no;
    return BodyError::none;
  }

  void read_usage_members(simdjson::ondemand::object object, Usage& usage) {
    for (auto member : object) {
      simdjson::ondemand::field field;
      std::string_view key;
      if (std::move(member).get(field) || key_of(field, key)) return;
      std::int64_t count = -1;
      const bool prompt = key == "prompt_tokens";
      if (!prompt && key != "completion_tokens") continue;
      if (field.value().get_int64().get(count) || count < 0) continue;
      (prompt ? usage.prompt_tokens : usage.completion_tokens) = count;
    }
  }

  bool read_model_list(simdjson::ondemand::array list, std::string_view key, std::size_t most,
                       std::vector<std::string>& names, bool& more) {
    for (auto element : list) {
      simdjson::ondemand::object model;
      std::string_view name;
      simdjson::ondemand::value found;
      if (element.get_object().get(model) || model.find_field_unordered(key).get(found)) return false;
      if (string_of(found, name)) return false;
      if (name.empty() || name.size() > 256) continue;
      if (names.size() == most) {
        more = true;
        return true;
      }
      names.emplace_back(name);
    }
    return true;
  }

  static constexpr std::size_t kKeptCapacity = 1u << 20;

  static constexpr std::size_t kSmallText = kRoomyBlock;  // what one read of an answer brings

  simdjson::ondemand::parser small_;  // for texts up to kSmallText
  simdjson::ondemand::parser large_;
  bool out_of_memory_ = false;
  std::array<std::uint8_t, kReadKeyBytes + simdjson::SIMDJSON_PADDING> key_text_;  // an unescaped key, until the next
  std::array<std::uint8_t, kCutNameBytes> value_text_;  // an unescaped model name, until the next call
};

}  // namespace nexus
