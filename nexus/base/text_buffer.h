// text_buffer.h
// Owns:     the memory that a page of text is written into, and numbers as text.
// Promises: seconds are written exactly from integer nanoseconds, without a trailing zero and without floating point;
//           the memory is kept from one page to the next, and kSlack bytes beyond what was asked for may be
//           overwritten.
// Leaves:   what the text means to prometheus.h and stats_json.h.
// Threads:  a TextBuffer belongs to one thread; the functions: any.
// Owns:     rendered pages while clients are sent them, and the memory of one that all its clients have let go of.
// Promises: a page is handed over without a copy, and its memory comes home to be written anew: the first touch of
//           fresh memory costs more than all that is written into it. At most one page lies on the shelf.
// Leaves:   what a page says to its writer, when a client lets go of it to builtin_pages.h.
// Threads:  lend() and take_back() one (control); the last to let go of a page, and of the shelf, may be any.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>

#include "nexus/base/clock.h"

namespace nexus {
constexpr std::size_t kNumberBytes = 24;  // the longest number here: 20 digits or 10.9 digits, and a sign

// Each writes at `at`, where kNumberBytes must be free, and returns the end of what it wrote.

inline char* write_unsigned(char* at, std::uint64_t value) { return std::to_chars(at, at + kNumberBytes, value).ptr; }

inline char* write_signed(char* at, std::int64_t value) { return std::to_chars(at, at + kNumberBytes, value).ptr; }

// 1'500'000'000 → 1.5; 123 → 0.000000123
inline char* write_seconds(char* at, std::uint64_t ns) {
  constexpr auto kPerSecond = static_cast<std::uint64_t>(kSecond);
  at = write_unsigned(at, ns / kPerSecond);
  const std::uint64_t rest = ns % kPerSecond;
  if (rest == 0) return at;
  char digits[kNumberBytes];
  write_unsigned(digits, kPerSecond + rest);  // a 1 in front keeps the zeros behind the point
  std::size_t length = 9;
  while (digits[length] == '0') --length;
  *at++ = '.';
  std::memcpy(at, digits + 1, length);
  return at + length;
}

// Copies in steps of a fixed size, faster than memcpy for the lengths of a line. Reads and writes up to kSlack bytes
// too many.
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
  const char* data() const { return memory_.get(); }  // kSlack bytes behind the text may be read
  std::size_t size() const { return size_; }
  std::size_t capacity() const { return capacity_; }

  // Where to write up to `bytes`, with kSlack behind them; tell the end by finish().
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
  TextBuffer& add_unsigned(std::uint64_t value) { return finish(write_unsigned(room(kNumberBytes), value)), *this; }
  TextBuffer& add_signed(std::int64_t value) { return finish(write_signed(room(kNumberBytes), value)), *this; }
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
  // Hands over what was written; `page` has no memory then. Throws std::bad_alloc, and the text is lost.
  std::shared_ptr<const TextBuffer> lend(TextBuffer& page) {
    auto lent = std::make_unique<TextBuffer>();
    lent->swap(page);
    return {lent.release(), [home = home_](const TextBuffer* back) { home->put(const_cast<TextBuffer*>(back)); }};
  }

  // Gives `page` the memory that came home, if some did, and an empty text.
  void take_back(TextBuffer& page) {
    page.clear();
    const std::unique_ptr<TextBuffer> back = home_->take();
    if (back == nullptr) return;
    back->clear();
    back->swap(page);
  }

 private:
  class Home {
   public:
    Home() = default;
    Home(const Home&) = delete;
    Home& operator=(const Home&) = delete;
    ~Home() { put(nullptr); }

    std::unique_ptr<TextBuffer> take() {
      return std::unique_ptr<TextBuffer>(page_.exchange(nullptr, std::memory_order_acquire));
    }
    // In the place of what lay there. Whoever takes it sees that the others have read it.
    void put(TextBuffer* page) { delete page_.exchange(page, std::memory_order_acq_rel); }

   private:
    std::atomic<TextBuffer*> page_{nullptr};
  };

  std::shared_ptr<Home> home_ = std::make_shared<Home>();  // outlives this where a client still reads
};

}  // namespace nexus
