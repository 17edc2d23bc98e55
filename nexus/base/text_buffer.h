// text_buffer.h
// Owns:     written text: the memory of a rendered page, numbers as text, the syntax of JSON (commas, brackets,
//           quotes and escapes), and the reuse of a page's memory for the next.
// Promises: seconds are written exactly from integer nanoseconds, without a trailing zero and without floating
//           point; a JSON string is valid even if its bytes are not valid UTF-8; a page is lent to its readers
//           without a copy, and its memory comes back when the last one lets go of it: touching fresh memory costs
//           more than writing the page. At most one returned page is kept.
// Leaves:   the text, balanced begin and end calls and unique keys to the writers; when a client is done with a page
//           to builtin_pages.h; reading JSON to request_json.h.
// Threads:  a TextBuffer belongs to one thread. lend() and take_back(): one (control); a lent page, and the
//           recycler, may be released by any.
// Tested by: tests/text_buffer_test.cpp, tests/prometheus_test.cpp, tests/json_writer_test.cpp
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <charconv>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>

#include "nexus/base/clock.h"
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

constexpr std::size_t kNumberBytes = 24;  // the longest number: a sign and 20 digits, or 10 digits, a point and 9 more

// Each of these writes to `at`, where kNumberBytes must be free, and returns the end.

char* write_number(char* at, std::integral auto value) { return std::to_chars(at, at + kNumberBytes, value).ptr; }

// 1'500'000'000 → 1.5; 123 → 0.000000123
inline char* write_seconds(char* at, std::uint64_t ns) {
  constexpr auto kPerSecond = static_cast<std::uint64_t>(kSecond);
  at = write_number(at, ns / kPerSecond);
  const std::uint64_t rest = ns % kPerSecond;
  if (rest == 0) return at;
  char digits[kNumberBytes];
  write_number(digits, kPerSecond + rest);  // a 1 in front keeps the zeros behind the point
  std::size_t length = 9;
  while (digits[length] == '0') --length;
  *at++ = '.';
  std::memcpy(at, digits + 1, length);
  return at + length;
}

// Copies in steps of a fixed size: faster than memcpy for the lengths of a line. Reads and writes up to kSlack bytes
// beyond the length.
inline char* copy_padded(char* at, const char* from, std::size_t length) {
  for (std::size_t i = 0; i < length; i += 32) std::memcpy(at + i, from + i, 32);
  return at + length;
}

class TextBuffer {
 public:
  static constexpr std::size_t kSlack = 64;

  void clear() { size_ = 0; }
  void swap(TextBuffer& other) noexcept {
    memory_.swap(other.memory_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }
  std::string_view text() const { return {memory_.get(), size_}; }
  const char* data() const { return memory_.get(); }  // kSlack bytes after the text may be read
  std::size_t size() const { return size_; }
  std::size_t capacity() const { return capacity_; }

  // Returns room for `bytes`; kSlack bytes after them may be overwritten. finish() sets the end.
  char* room(std::size_t bytes) {
    if (capacity_ - size_ < bytes + kSlack) [[unlikely]]
      grow(bytes + kSlack);
    return memory_.get() + size_;
  }
  void finish(const char* end) {
    size_ = static_cast<std::size_t>(end - memory_.get());
    assert(size_ <= capacity_);
  }

  TextBuffer& add(std::string_view text) {
    char* at = room(text.size());
    if (!text.empty()) std::memcpy(at, text.data(), text.size());
    finish(at + text.size());
    return *this;
  }
  TextBuffer& operator+=(std::string_view text) { return add(text); }
  TextBuffer& operator+=(char c) { return add({&c, 1}); }
  TextBuffer& add_number(std::integral auto value) { return finish(write_number(room(kNumberBytes), value)), *this; }
  TextBuffer& add_seconds(std::uint64_t ns) { return finish(write_seconds(room(kNumberBytes), ns)), *this; }

 private:
  void grow(std::size_t needed) {
    const std::size_t capacity = std::max(capacity_ * 2, std::bit_ceil(size_ + needed));
    std::unique_ptr<char[]> memory(new char[capacity]);  // not zeroed: zeroing costs more than writing a line does
    if (size_ > 0) std::memcpy(memory.get(), memory_.get(), size_);
    memory_ = std::move(memory);
    capacity_ = capacity;
  }

  std::unique_ptr<char[]> memory_;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

class BufferRecycler {
 public:
  // Hands over the text and leaves `page` without memory. Throws std::bad_alloc; the text is lost then.
  std::shared_ptr<const TextBuffer> lend(TextBuffer& page) {
    const std::size_t bytes = page.capacity();
    auto text = std::make_unique<TextBuffer>();
    lent_bytes_->fetch_add(bytes, std::memory_order_relaxed);
    lent_ = std::shared_ptr<TextBuffer>(text.release(), [count = lent_bytes_, bytes](TextBuffer* read) {
      count->fetch_sub(bytes, std::memory_order_relaxed);
      delete read;
    });
    newest_bytes_ = bytes;
    lent_->swap(page);
    return lent_;
  }

  // The memory of all pages that have readers.
  std::size_t lent_bytes() const {
    const std::size_t unread = lent_.use_count() == 1 ? newest_bytes_ : 0;
    return lent_bytes_->load(std::memory_order_relaxed) - unread;
  }

  // Clears `page`, and gives it the memory of the last lent one if no reader has that any more.
  void take_back(TextBuffer& page) {
    page.clear();
    if (lent_.use_count() != 1) return;
    std::shared_ptr(lent_).reset();  // its decrement acquires what the last reader's released: the reads came before
    lent_->clear();
    lent_->swap(page);
    lent_.reset();
  }

 private:
  std::shared_ptr<TextBuffer> lent_;  // the newest page
  std::size_t newest_bytes_ = 0;
  // Relaxed: the number alone is shared. A reader may outlive the recycler.
  std::shared_ptr<std::atomic<std::size_t>> lent_bytes_ = std::make_shared<std::atomic<std::size_t>>(0);
};

}  // namespace nexus
