// fuzz.h
// Owns:     the parts that all fuzz targets share: input that ends at a guard page, cuts drawn from the input, a check
//           that ends the run.
// Promises: a target depends on its input alone, so a file of the corpus always gives the same run.
// Leaves:   the properties to prove to the targets, one header each; running them to fuzzer.cpp and
//           fuzz_corpus_test.cpp.
// Threads:  one.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace fuzz {

struct Broken : std::logic_error {
  using std::logic_error::logic_error;
};

inline void check(bool holds, const std::string& what) {
  if (!holds) throw Broken(what);
}

// A copy whose last byte is the last of a page; the next page faults when it is touched.
class Guarded {
 public:
  explicit Guarded(std::string_view bytes, std::size_t padding = 0) : bytes_(bytes.size()) {
    const std::size_t wanted = bytes.size() + padding;
    check(wanted <= kRoom, "too large for a guarded copy");
    if (spare().empty()) spare().push_back(map());
    map_ = spare().back();
    spare().pop_back();
    data_ = map_ + kRoom - wanted;
    if (!bytes.empty()) std::memcpy(data_, bytes.data(), bytes.size());
    std::memset(data_ + bytes.size(), '"', padding);  // the bytes after a text must not matter
  }
  ~Guarded() { spare().push_back(map_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data() { return data_; }
  std::string_view view() const { return {data_, bytes_}; }

 private:
  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kRoom = 64 * kPage;

  static char* map() {
    void* made = ::mmap(nullptr, kRoom + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(made != MAP_FAILED, "no memory for a guarded copy");
    char* at = static_cast<char*>(made);
    check(::mprotect(at + kRoom, kPage, PROT_NONE) == 0, "no guard page");
    return at;
  }
  static std::vector<char*>& spare() {
    static std::vector<char*> mappings;  // reused, because mapping costs more than most inputs
    return mappings;
  }

  char* map_ = nullptr;
  char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Pseudo-random numbers seeded with the input, for cuts.
class Draw {
 public:
  explicit Draw(std::string_view input) {
    for (const char c : input) state_ = (state_ ^ static_cast<unsigned char>(c)) * 1099511628211u;
  }
  std::size_t below(std::size_t bound) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return bound == 0 ? 0 : state_ % bound;
  }

 private:
  std::uint64_t state_ = 14695981039346656037u;
};

// A way to cut a text into pieces: where each piece ends, the last one at the end of the text.
using Ends = std::vector<std::size_t>;

inline Ends byte_by_byte(std::size_t bytes) {
  Ends ends(bytes);
  std::iota(ends.begin(), ends.end(), 1);
  return ends;
}

inline std::vector<std::string> pieces_of(std::string_view text, const Ends& ends) {
  std::vector<std::string> pieces;
  std::size_t from = 0;
  for (const std::size_t end : ends) {
    pieces.emplace_back(text.substr(from, end - from));
    from = end;
  }
  return pieces;
}

// The ways in which a target feeds a text: whole, byte by byte (if it is short enough), and in a few random pieces.
inline std::vector<Ends> cuts_of(std::size_t bytes, Draw& draw) {
  std::vector<Ends> ways{{bytes}};
  if (bytes < 2) return ways;
  if (bytes <= 2048) ways.push_back(byte_by_byte(bytes));
  ways.push_back({1 + draw.below(bytes - 1), bytes});
  Ends several;
  for (std::size_t at = 1 + draw.below(bytes / 4 + 1); at < bytes; at += 1 + draw.below(bytes / 4 + 1)) {
    several.push_back(at);
  }
  several.push_back(bytes);
  ways.push_back(several);
  return ways;
}

}  // namespace fuzz
