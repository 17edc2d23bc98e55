// fuzz.h
// Owns:     what every fuzz target needs: input that ends at a guard page, cuts drawn from the input, a check that ends
//           the run.
// Promises: a target is a function of its input alone, so that a file of the corpus always tells the same story.
// Leaves:   what is to be proved to the targets, one header each; running them to fuzzer.cpp and fuzz_corpus_test.cpp.
// Threads:  one.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
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

// A copy whose last byte is the last of a page, with a page behind it that faults.
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
    std::memset(data_ + bytes.size(), '"', padding);  // what stands behind a text must not matter
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
    static std::vector<char*> mappings;  // used again: mapping costs more than most inputs
    return mappings;
  }

  char* map_ = nullptr;
  char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Numbers that follow from the input, for cuts.
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

// The ways in which a text of that many bytes is fed: whole, byte by byte (up to a bound), and in a few random pieces.
// Each is a list of ends, the last of them `bytes`.
inline std::vector<std::vector<std::size_t>> cuts_of(std::size_t bytes, Draw& draw) {
  std::vector<std::vector<std::size_t>> ways{{bytes}};
  if (bytes < 2) return ways;
  if (bytes <= 2048) {
    std::vector<std::size_t> each;
    for (std::size_t i = 1; i <= bytes; ++i) each.push_back(i);
    ways.push_back(each);
  }
  ways.push_back({1 + draw.below(bytes - 1), bytes});
  std::vector<std::size_t> several;
  for (std::size_t at = 1 + draw.below(bytes / 4 + 1); at < bytes; at += 1 + draw.below(bytes / 4 + 1)) {
    several.push_back(at);
  }
  several.push_back(bytes);
  ways.push_back(several);
  return ways;
}

}  // namespace fuzz
