// json_reader.h
// Owns:     simdjson: a parser for small texts, one for large texts, and room for unescaped strings; reading the
//           token counts that backends answer.
// Promises: reads the bytes where they lie; a text up to kSmallText needs no allocation, and the index of a large
//           text is freed again; only the constructor and is_valid() throw. A count that is missing, negative, too
//           large or no whole number reads as -1.
// Leaves:   requests to request_json.h, finding a `usage` in a stream to usage_scan.h, lists of models to
//           model_list.h.
// Threads:  a reader belongs to one thread; a view that it returned lasts until the next call.
// Tested by: tests/request_json_test.cpp, tests/fuzz/body.h
#pragma once

#include <simdjson.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <new>
#include <string_view>
#include <utility>

#include "nexus/api/dialects.h"
#include "nexus/base/buffer.h"
#include "nexus/base/limits.h"
#include "nexus/base/simd.h"
#include "nexus/base/text.h"

namespace nexus {

static_assert(kPaddingBytes >= simdjson::SIMDJSON_PADDING);

// The longest string, with its escapes, that is read as a name. A longer one comes with its escapes, cut to
// kCutNameBytes. Names in nexus.conf have kMaxModelNameBytes at most.
constexpr std::size_t kReadNameBytes = 4096 - simdjson::SIMDJSON_PADDING;
constexpr std::size_t kCutNameBytes = 4096;
constexpr std::size_t kReadKeyBytes = 256 - simdjson::SIMDJSON_PADDING;

constexpr bool is_json_blank(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

// Removes white space at the end.
constexpr std::string_view trim_json_end(std::string_view text) {
  while (!text.empty() && is_json_blank(text.back())) text.remove_suffix(1);
  return text;
}

class JsonReader {
 public:
  using Object = simdjson::ondemand::object;
  using Value = simdjson::ondemand::value;

  JsonReader() {
    if (small_.allocate(kSmallText) != simdjson::SUCCESS) throw std::bad_alloc();
  }

  // True if the last open() failed for lack of memory.
  bool out_of_memory() const { return out_of_memory_; }

  // Begins to read a text, behind which kPaddingBytes must be readable. False if it does not begin like an object.
  bool open(std::string_view text, Object& object) {
    out_of_memory_ = false;
    if (text.empty()) return false;  // simdjson would use an index that it may not have allocated
    // The large parser keeps its index: free it when a much smaller text follows.
    if (large_.capacity() > kKeptCapacity && text.size() < kKeptCapacity) large_ = simdjson::ondemand::parser();
    const simdjson::padded_string_view padded(text.data(), text.size(), text.size() + simdjson::SIMDJSON_PADDING);
    const simdjson::error_code error = (text.size() <= kSmallText ? small_ : large_).iterate(padded).get(document_);
    out_of_memory_ = error == simdjson::MEMALLOC;
    return error == simdjson::SUCCESS && document_.get_object().get(object) == simdjson::SUCCESS;
  }

  // True if the whole text was read and was one object. A broken value that was skipped shows only here.
  bool at_end() { return document_.is_alive() && document_.at_end(); }

  // True if a part of an opened text is one whole JSON value of its own. Throws std::bad_alloc.
  bool is_valid(std::string_view part) {
    const simdjson::error_code error = validator_.parse(part.data(), part.size(), false).error();
    if (error == simdjson::MEMALLOC) {
      validator_ = simdjson::dom::parser();  // one that was allocated in part would crash in its next use
      throw std::bad_alloc();
    }
    return error == simdjson::SUCCESS;
  }

  // Calls visit(key, value), the key unescaped, for each member until it returns false. False if it did, or if the
  // object is broken.
  template <class Visit>
  bool each_member(Object& object, Visit&& visit) {
    for (auto member : object) {
      simdjson::ondemand::field field;
      std::string_view key;
      if (std::move(member).get(field) || !text_of(field.key(), field.key_raw_json_token(), key_text_, key))
        return false;
      if (!visit(key, field.value())) return false;
    }
    return true;
  }

  // Unescapes a key that stands in `token` with its quotes. Behind it kPaddingBytes must be readable.
  bool read_key(std::string_view token, std::string_view& key) {
    const simdjson::ondemand::raw_json_string raw(reinterpret_cast<const std::uint8_t*>(token.data()) + 1);
    return text_of(raw, token, key_text_, key);
  }

  // Reads a string. A name lasts until the next name; a word until the next key or word. False if it is no string.
  bool read_name(Value& value, std::string_view& name) { return read_string(value, value_text_, name); }
  bool read_word(Value& value, std::string_view& word) { return read_string(value, key_text_, word); }

 private:
  static constexpr std::size_t kKeptCapacity = 1u << 20;
  static constexpr std::size_t kSmallText = kRoomyBlock;  // one read of a response, and most requests

  template <std::size_t N>
  bool read_string(Value& value, std::array<std::uint8_t, N>& room, std::string_view& text) {
    simdjson::ondemand::raw_json_string raw;
    const std::string_view token = value.raw_json_token();
    return value.get_raw_json_string().get(raw) == simdjson::SUCCESS && text_of(raw, token, room, text);
  }

  // Returns the string's own bytes, or unescapes them into `room`. A string that is longer than `room` comes cut, with
  // its escapes. False if an escape is invalid. (simdjson's own buffer is not used: it does not check its allocation.)
  template <std::size_t N>
  bool text_of(simdjson::ondemand::raw_json_string raw, std::string_view token, std::array<std::uint8_t, N>& room,
               std::string_view& text) {
    const std::size_t close = token.rfind('"');
    if (close == 0 || close == std::string_view::npos) return false;
    text = {raw.raw(), close - 1};
    if (text.size() + simdjson::SIMDJSON_PADDING > N) {
      text = text.substr(0, N);
      return true;
    }
    const char* const end = text.data() + text.size();
    if (find_either(text.data(), end, '\\', '\\') == end) return true;
    std::uint8_t* to = room.data();
    return small_.unescape(raw, to, false).get(text) == simdjson::SUCCESS;
  }

  simdjson::ondemand::parser small_;
  simdjson::ondemand::parser large_;
  simdjson::ondemand::document document_;
  simdjson::dom::parser validator_;  // takes memory with its first use
  bool out_of_memory_ = false;
  std::array<std::uint8_t, kReadKeyBytes + simdjson::SIMDJSON_PADDING> key_text_;
  std::array<std::uint8_t, kCutNameBytes> value_text_;
};

// Token counts; -1 where the response has none.
struct Usage {
  std::int64_t prompt_tokens = -1;
  std::int64_t completion_tokens = -1;
  std::int64_t cached_tokens = -1;     // of prompt_tokens
  std::int64_t created_tokens = -1;    // written to the cache, where the API counts them apart
  std::int64_t reasoning_tokens = -1;  // of completion_tokens
  bool told() const { return prompt_tokens >= 0 || completion_tokens >= 0; }

  // Takes later counts. `each`: each of them by itself, for they tell a part of the counts.
  void take(const Usage& later, bool each) {
    if (!each) {
      *this = later;
      return;
    }
    for (std::int64_t Usage::*count : {&Usage::prompt_tokens, &Usage::completion_tokens, &Usage::cached_tokens,
                                       &Usage::created_tokens, &Usage::reasoning_tokens}) {
      if (later.*count >= 0) this->*count = later.*count;
    }
  }

  // With all of the prompt's tokens in prompt_tokens, whatever the API's way to count.
  Usage added_up(const ResponseShape& shape) const {
    Usage all = *this;
    if (shape.adds_up && prompt_tokens >= 0) {
      all.prompt_tokens += std::max<std::int64_t>(cached_tokens, 0) + std::max<std::int64_t>(created_tokens, 0);
    }
    return all;
  }
};

namespace detail {

// An integer, also one that is written as a fraction (11.0), up to kMaxTokenCount.
inline void read_count(JsonReader::Value& value, std::int64_t& count) {
  std::int64_t read = -1;
  double number = -1;
  if (value.get_int64().get(read) && !value.get_double().get(number) && number >= 0 &&
      number <= static_cast<double>(kMaxTokenCount)) {
    read = static_cast<std::int64_t>(number);
    if (static_cast<double>(read) != number) return;
  }
  if (read >= 0 && read <= kMaxTokenCount) count = read;
}

// The object in which a count stands.
enum class UsagePart : std::uint8_t { whole, prompt_details, completion_details, other };

// The object that `key` names in a usage.
inline UsagePart part_of(const ResponseShape& shape, std::string_view key) {
  if (key.empty()) return UsagePart::other;
  if (same_text(key, shape.details)) return UsagePart::prompt_details;
  return same_text(key, shape.written) ? UsagePart::completion_details : UsagePart::other;
}

// The count that `key` names in `part`; null: none that is read.
inline std::int64_t Usage::*count_of(const ResponseShape& shape, std::string_view key, UsagePart part) {
  if (key.empty()) return nullptr;
  switch (part) {
    case UsagePart::whole: break;
    case UsagePart::prompt_details: return same_text(key, shape.cached) ? &Usage::cached_tokens : nullptr;
    case UsagePart::completion_details: return same_text(key, shape.reasoning) ? &Usage::reasoning_tokens : nullptr;
    case UsagePart::other: return nullptr;
  }
  if (same_text(key, shape.prompt)) return &Usage::prompt_tokens;
  if (same_text(key, shape.completion)) return &Usage::completion_tokens;
  if (shape.details.empty()) {
    if (same_text(key, shape.cached)) return &Usage::cached_tokens;
    if (same_text(key, shape.prompt_too)) return &Usage::prompt_tokens;
    if (same_text(key, shape.completion_too)) return &Usage::completion_tokens;
  }
  return same_text(key, shape.created) ? &Usage::created_tokens : nullptr;
}

inline void read_counts(JsonReader& json, const ResponseShape& shape, JsonReader::Object& object, Usage& usage) {
  json.each_member(object, [&](std::string_view key, JsonReader::Value value) {
    JsonReader::Object details;
    if (std::int64_t Usage::*const count = count_of(shape, key, UsagePart::whole)) {
      read_count(value, usage.*count);
      return true;
    }
    const UsagePart part = part_of(shape, key);
    if (part == UsagePart::other || value.get_object().get(details)) return true;
    json.each_member(details, [&](std::string_view detail, JsonReader::Value counted) {
      if (std::int64_t Usage::*const deep = count_of(shape, detail, part)) read_count(counted, usage.*deep);
      return true;
    });
    return true;
  });
}

// Reads a usage as servers write it: names without escapes, whole numbers, null, details of the same kind, at most a
// space between two tokens. That takes a third of the instructions of simdjson, which reads every other form.
class PlainUsage {
 public:
  PlainUsage(const ResponseShape& shape, std::string_view text)
      : shape_(shape), at_(text.data()), end_(text.data() + text.size()) {}

  // False if `text` is not one whole object of this form; then nothing was read.
  bool read(Usage& usage) {
    Usage read;
    if (!members(read, UsagePart::whole) || at_ != end_) return false;
    usage = read;
    return true;
  }

 private:
  static constexpr int kMostDigits = 18;  // fit into 64 bits

  bool take(char mark) {
    if (at_ == end_ || *at_ != mark) return false;
    ++at_;
    return true;
  }
  void skip_space() { take(' '); }

  bool members(Usage& usage, UsagePart part) {
    if (!take('{')) return false;
    do {
      skip_space();
      std::string_view key;
      if (!name(key)) return false;
      skip_space();
      if (!take(':')) return false;
      skip_space();
      if (!value(usage, key, part)) return false;
      skip_space();
    } while (take(','));
    return take('}');
  }

  bool name(std::string_view& key) {
    if (!take('"')) return false;
    const char* const from = at_;
    at_ = find_end_of_name(at_, end_);
    key = {from, static_cast<std::size_t>(at_ - from)};
    return take('"');
  }

  bool value(Usage& usage, std::string_view key, UsagePart part) {
    if (at_ == end_) return false;
    if (*at_ == '{') return part == UsagePart::whole && members(usage, part_of(shape_, key));
    if (begins_with({at_, static_cast<std::size_t>(end_ - at_)}, "null")) {
      at_ += 4;
      return true;
    }
    const char* const from = at_;
    std::int64_t number = 0;
    for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_) {
      if (at_ - from == kMostDigits) return false;
      number = number * 10 + (*at_ - '0');
    }
    if (at_ == from || (*from == '0' && at_ - from > 1)) return false;
    std::int64_t Usage::*const count = count_of(shape_, key, part);
    if (count != nullptr && number <= kMaxTokenCount) usage.*count = number;
    return true;
  }

  const ResponseShape& shape_;
  const char* at_;
  const char* end_;
};

// True if `text` ends with `"usage":`, and the first quote is not escaped.
inline bool ends_with_usage_key(std::string_view text) {
  constexpr std::string_view kKey = "\"usage\"";
  text = trim_json_end(text);
  if (!text.ends_with(':')) return false;
  text.remove_suffix(1);
  text = trim_json_end(text);
  if (text.size() <= kKey.size() || text[text.size() - kKey.size() - 1] == '\\') return false;
  return std::memcmp(text.data() + text.size() - kKey.size(), kKey.data(), kKey.size()) == 0;
}

// Reads a `usage` that is the last member and small, the usual case, from the end of the response. An object between
// `"usage":` and the brace that ends the text is a member of the outermost object, because JSON escapes quotes inside
// strings and braces pair. False if the response ends otherwise.
inline bool read_last_usage(JsonReader& json, const ResponseShape& shape, std::string_view text, Usage& usage) {
  constexpr std::size_t kTailBytes = 512;
  constexpr int kObjects = 4;  // that may begin in a usage: its details
  text = trim_json_end(text);
  if (!text.ends_with('}')) return false;
  text.remove_suffix(1);
  text.remove_prefix(text.size() - std::min(text.size(), kTailBytes));
  std::size_t at = text.size();
  for (int i = 0; i < kObjects; ++i) {
    const void* const brace = memrchr(text.data(), '{', at);
    if (brace == nullptr) return false;
    at = static_cast<std::size_t>(static_cast<const char*>(brace) - text.data());
    if (!ends_with_usage_key({text.data(), at})) continue;
    const std::string_view last(text.data() + at, text.size() - at);
    if (PlainUsage(shape, trim_json_end(last)).read(usage)) return true;
    JsonReader::Object object;
    if (!json.open(last, object)) return false;
    read_counts(json, shape, object, usage);
    if (json.at_end()) return true;
    usage = Usage{};
    return false;
  }
  return false;
}

}  // namespace detail

// Reads the counts of an object.
inline Usage read_usage(JsonReader& json, const ResponseShape& shape, std::string_view text) {
  JsonReader::Object object;
  Usage usage;
  if (json.open(text, object)) detail::read_counts(json, shape, object, usage);
  return usage;
}

// Reads the counts of a whole response; the last `usage` counts, as in a stream.
inline Usage read_answer(JsonReader& json, const ResponseShape& shape, std::string_view text) {
  if (shape.bare) return read_usage(json, shape, text);
  Usage usage;
  if (detail::read_last_usage(json, shape, text, usage)) return usage;
  JsonReader::Object object;
  if (!json.open(text, object)) return usage;
  json.each_member(object, [&](std::string_view key, JsonReader::Value value) {
    JsonReader::Object counts;
    if (key != "usage" || value.get_object().get(counts)) return true;
    usage = Usage{};
    detail::read_counts(json, shape, counts, usage);
    return true;
  });
  return usage;
}

}  // namespace nexus
