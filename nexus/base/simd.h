// simd.h
// Owns:     a large JSON text seen as bits: sixty-four bytes at a time, a bit each, for the few kinds that matter.
// Promises: hardly a branch depends on what the bytes are. May read kBlockBytes past a text's end; a caller masks what
//           lies there.
// Leaves:   what the bits mean to incremental.h; proving that text is UTF-8 to simdjson.
// Threads:  any.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace nexus {

constexpr std::size_t kBlockBytes = 64;

class ByteBlock {
 public:
  explicit ByteBlock(const char* text)
      : a_(load(text)), b_(load(text + 16)), c_(load(text + 32)), d_(load(text + 48)) {}

  // One bit a byte, the first the lowest.
  std::uint64_t equal(char c) const {
    return bits([c](__m128i part) { return is(part, c); });
  }
  std::uint64_t control() const { return bits(is_control); }
  // `[` and `{`, or `]` and `}`: the one row of ASCII lies 0x20 above the other.
  std::uint64_t bracket(char square) const {
    return bits([square](__m128i part) { return is(_mm_and_si128(part, _mm_set1_epi8(char(0xdf))), square); });
  }
  bool is_ascii() const { return _mm_movemask_epi8(_mm_or_si128(_mm_or_si128(a_, b_), _mm_or_si128(c_, d_))) == 0; }

 private:
  static __m128i load(const char* text) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(text)); }
  static __m128i is(__m128i part, char c) { return _mm_cmpeq_epi8(part, _mm_set1_epi8(c)); }
  static __m128i is_control(__m128i part) { return is(_mm_max_epu8(part, _mm_set1_epi8(0x1f)), 0x1f); }

  template <class Match>
  std::uint64_t bits(Match match) const {
    const auto mask = [&](__m128i part) { return static_cast<std::uint64_t>(_mm_movemask_epi8(match(part))); };
    return mask(a_) | mask(b_) << 16 | mask(c_) << 32 | mask(d_) << 48;
  }

  __m128i a_, b_, c_, d_;
};

// The lowest `count` bits, 1 to 64 of them.
inline std::uint64_t low_bits(std::size_t count) { return ~std::uint64_t{0} >> (64 - count); }

// How many bits are set; without an instruction for it, which not every processor has.
inline std::size_t count_bits(std::uint64_t bits) {
  bits -= (bits >> 1) & 0x5555555555555555u;
  bits = (bits & 0x3333333333333333u) + ((bits >> 2) & 0x3333333333333333u);
  return ((bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56;
}

// Each bit is the exclusive or of itself and all below it: between quotes, if the bits are quotes.
inline std::uint64_t between_pairs(std::uint64_t bits) {
  bits ^= bits << 1;
  bits ^= bits << 2;
  bits ^= bits << 4;
  bits ^= bits << 8;
  bits ^= bits << 16;
  return bits ^ bits << 32;
}

// Which backslashes escape what follows them: every other one of a row.
struct Escapes {
  std::uint64_t escaping;
  std::uint64_t escaped;

  // `first_escaped`: whether the byte before this block escapes its first.
  Escapes(std::uint64_t backslashes, bool first_escaped) {
    // A row of backslashes carries like a sum: rows that begin at an odd place and at an even one are told apart by
    // where the carry ends. (As simdjson does it.)
    constexpr std::uint64_t kOdd = 0xaaaaaaaaaaaaaaaaULL;
    const std::uint64_t starts = backslashes & ~std::uint64_t{first_escaped};
    const std::uint64_t codes = (((starts << 1) | kOdd) - starts) ^ kOdd;
    escaped = codes ^ (backslashes | std::uint64_t{first_escaped});
    escaping = codes & backslashes;
  }
};

// How far a string goes on.
struct TextRun {
  std::size_t at;     // where a block begins in which it ends, or what is no whole block
  bool escaped;       // whether the byte there is
  bool ascii = true;  // what was passed over
};

// Goes on by whole blocks while a string does. A control character ends it, too: it breaks it.
inline TextRun skip_text_by_16(const char* text, std::size_t at, std::size_t end, bool escaped) {
  TextRun run{at, escaped};
  for (; end - run.at >= kBlockBytes; run.at += kBlockBytes) {
    const ByteBlock block(text + run.at);
    run.ascii = run.ascii && block.is_ascii();
    const Escapes escapes(block.equal('\\'), run.escaped);
    if (((block.equal('"') & ~escapes.escaped) | block.control()) != 0) break;
    run.escaped = escapes.escaping >> (kBlockBytes - 1) != 0;
  }
  return run;
}

// The same where the processor has AVX2.
[[gnu::target("avx2")]] inline std::uint64_t bits_of(__m256i low, __m256i high) {
  return static_cast<std::uint32_t>(_mm256_movemask_epi8(low)) |
         std::uint64_t{static_cast<std::uint32_t>(_mm256_movemask_epi8(high))} << 32;
}
[[gnu::target("avx2")]] inline TextRun skip_text_by_32(const char* text, std::size_t at, std::size_t end,
                                                       bool escaped) {
  const __m256i quote = _mm256_set1_epi8('"'), backslash = _mm256_set1_epi8('\\'), last = _mm256_set1_epi8(0x1f);
  __m256i seen = _mm256_setzero_si256();
  TextRun run{at, escaped};
  for (; end - run.at >= kBlockBytes; run.at += kBlockBytes) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text + run.at));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text + run.at + 32));
    seen = _mm256_or_si256(seen, _mm256_or_si256(low, high));
    const Escapes escapes(bits_of(_mm256_cmpeq_epi8(low, backslash), _mm256_cmpeq_epi8(high, backslash)), run.escaped);
    const std::uint64_t quotes = bits_of(_mm256_cmpeq_epi8(low, quote), _mm256_cmpeq_epi8(high, quote));
    const std::uint64_t controls = bits_of(_mm256_cmpeq_epi8(_mm256_max_epu8(low, last), last),
                                           _mm256_cmpeq_epi8(_mm256_max_epu8(high, last), last));
    if (((quotes & ~escapes.escaped) | controls) != 0) break;
    run.escaped = escapes.escaping >> (kBlockBytes - 1) != 0;
  }
  run.ascii = _mm256_movemask_epi8(seen) == 0;
  return run;
}

inline const bool kHasAvx2 = __builtin_cpu_supports("avx2") != 0;

inline TextRun skip_text(const char* text, std::size_t at, std::size_t end, bool escaped) {
  return kHasAvx2 ? skip_text_by_32(text, at, end, escaped) : skip_text_by_16(text, at, end, escaped);
}

// Where the last whole character ends in text that is UTF-8 from `begin` on: at `end`, or before a character whose last
// bytes are behind it.
inline std::size_t end_of_characters(const char* text, std::size_t begin, std::size_t end) {
  for (std::size_t back = 1; back <= 3 && back <= end - begin; ++back) {
    const auto byte = static_cast<unsigned char>(text[end - back]);
    if (byte < 0x80) return end;
    if (byte < 0xc0) continue;
    const std::size_t length = byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
    return length > back ? end - back : end;
  }
  return end;
}

}  // namespace nexus
