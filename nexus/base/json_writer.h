// json_writer.h
// Owns:     the syntax of written JSON: commas, brackets, quotes and escapes, appended to any text that has `+=`.
// Promises: no allocation of its own; a string is valid JSON even if its bytes are not valid UTF-8.
// Leaves:   balanced begin and end calls, and unique keys, to the caller; reading JSON to request_json.h.
// Threads:  any.
// Tested by: tests/json_writer_test.cpp
#pragma once

#include <concepts>
#include <string_view>

#include "nexus/base/text.h"

namespace nexus {

template <class Out>
class JsonWriter {
 public:
  explicit JsonWriter(Out& out) : out_(out) {}

  JsonWriter& begin_object() { return begin('{'); }
  JsonWriter& end_object() { return end('}'); }
  JsonWriter& begin_array() { return begin('['); }
  JsonWriter& end_array() { return end(']'); }

  // The next call writes the value of this key.
  JsonWriter& key(std::string_view name) {
    string(name);
    out_ += ':';
    comma_ = false;
    return *this;
  }

  JsonWriter& value(std::string_view text) { return string(text), *this; }
  JsonWriter& value(const char* text) { return value(std::string_view(text)); }
  JsonWriter& value(bool value) { return literal(value ? "true" : "false"); }
  JsonWriter& value(std::integral auto number) { return literal(Digits(number).view()); }

  // Text that is JSON already: a number with decimals, or null.
  JsonWriter& literal(std::string_view json) {
    separate();
    out_ += json;
    return *this;
  }

  template <class T>
  JsonWriter& field(std::string_view name, const T& content) {
    return key(name).value(content);
  }

 private:
  JsonWriter& begin(char bracket) {
    separate();
    out_ += bracket;
    comma_ = false;
    return *this;
  }
  JsonWriter& end(char bracket) {
    out_ += bracket;
    comma_ = true;
    return *this;
  }
  void string(std::string_view text) {
    separate();
    out_ += '"';
    append_json_escaped(out_, text);
    out_ += '"';
  }
  void separate() {
    if (comma_) out_ += ',';
    comma_ = true;
  }

  Out& out_;
  bool comma_ = false;  // the next value follows another one in its object or array
};

}  // namespace nexus
