// simd.h
// Owns:      every vector instruction of Nexus: bytes compared 16 (Lane) or 64 (ByteBlock) at a time, one bit for each.
// Promises:  the same results with SSE2, AVX2, NEON and plain C++. Lanes are the compilers' vector types, so a
//            processor needs no more than a highest_bits() of its own. Only find_control() stays inside its text: the
//            others may read a whole lane or block past the end.
// Leaves:    the meaning of the bits to sse.h, member_scan.h and the JSON readers.
// Threads:   any.
// Tested by: tests/simd_test.cpp, tests/text_test.cpp, tests/incremental_json_test.cpp, tests/usage_scan_test.cpp
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nexus/base/text.h"

namespace nexus {

constexpr std::size_t kLaneBytes = 16;
constexpr std::size_t kBlockBytes = 64;
static_assert(std::endian::native == std::endian::little, "the first byte of a word is its lowest");

using LaneBytes [[gnu::vector_size(kLaneBytes)]] = unsigned char;

// The highest bit of each byte; that of the first byte is the lowest bit. In plain C++: the multiplication moves the
// lowest bits of eight bytes into the highest byte, without a carry.
inline unsigned plain_highest_bits(LaneBytes bytes) {
  std::uint64_t words[2];
  std::memcpy(words, &bytes, sizeof words);
  const auto gather = [](std::uint64_t word) {
    return static_cast<unsigned>(((word >> 7 & 0x0101010101010101) * 0x0102040810204080) >> 56);
  };
  return gather(words[0]) | gather(words[1]) << 8;
}

inline unsigned highest_bits(LaneBytes bytes) {
#if defined(__SSE2__)
  return static_cast<unsigned>(_mm_movemask_epi8(reinterpret_cast<__m128i>(bytes)));
#elif defined(__aarch64__)
  constexpr uint8x16_t kWeights{1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t bits = vandq_u8(vcltzq_s8(reinterpret_cast<int8x16_t>(bytes)), kWeights);
  return vaddv_u8(vget_low_u8(bits)) | static_cast<unsigned>(vaddv_u8(vget_high_u8(bits))) << 8;
#else
  return plain_highest_bits(bytes);
#endif
}

// Sixteen bytes. A comparison yields a lane in which each byte is 0xff (true) or 0 (false).
class Lane {
 public:
  explicit Lane(const char* at) { std::memcpy(&bytes_, at, sizeof bytes_); }

  Lane equal(char c) const { return Lane(bytes_ == every(c)); }
  Lane equal(Lane other) const { return Lane(bytes_ == other.bytes_); }
  Lane control() const { return Lane(bytes_ <= every(0x1f)); }
  // `[` and `{`, or `]` and `}`: they differ in one bit.
  Lane bracket(char square) const { return Lane((bytes_ & every(char(0xdf))) == every(square)); }
  // a-z and `_`
  Lane name() const { return Lane(LaneBytes(bytes_ - every('a')) <= every(25)) | equal('_'); }
  Lane operator|(Lane other) const { return Lane(bytes_ | other.bytes_); }
  Lane operator&(Lane other) const { return Lane(bytes_ & other.bytes_); }
  Lane without(Lane other) const { return Lane(bytes_ & ~other.bytes_); }
  unsigned mask() const { return highest_bits(bytes_); }

 private:
  template <class Bytes>
  explicit Lane(Bytes bytes) : bytes_(reinterpret_cast<LaneBytes>(bytes)) {}
  static LaneBytes every(char c) { return LaneBytes{} + static_cast<unsigned char>(c); }

  LaneBytes bytes_;
};

class ByteBlock {
 public:
  explicit ByteBlock(const char* at) : a_(at), b_(at + 16), c_(at + 32), d_(at + 48) {}

  std::uint64_t equal(char c) const {
    return bits([c](Lane lane) { return lane.equal(c); });
  }
  std::uint64_t control() const {
    return bits([](Lane lane) { return lane.control(); });
  }
  std::uint64_t bracket(char square) const {
    return bits([square](Lane lane) { return lane.bracket(square); });
  }
  bool is_ascii() const { return ((a_ | b_) | (c_ | d_)).mask() == 0; }

 private:
  template <class Match>
  std::uint64_t bits(Match match) const {
    const auto mask = [&](Lane lane) { return std::uint64_t{match(lane).mask()}; };
    return mask(a_) | mask(b_) << 16 | mask(c_) << 32 | mask(d_) << 48;
  }

  Lane a_, b_, c_, d_;
};

// ---- bits ----

// The lowest `count` bits, 1 to 64 of them.
inline std::uint64_t low_bits(std::size_t count) { return ~std::uint64_t{0} >> (64 - count); }

// Each bit becomes the exclusive or of itself and all lower bits. If the bits are quotes, the result marks strings.
inline std::uint64_t between_pairs(std::uint64_t bits) {
  bits ^= bits << 1;
  bits ^= bits << 2;
  bits ^= bits << 4;
  bits ^= bits << 8;
  bits ^= bits << 16;
  return bits ^ bits << 32;
}

// The backslashes that escape the next byte (every second one of a run), and the bytes that they escape.
struct Escapes {
  std::uint64_t escaping;
  std::uint64_t escaped;

  // `first_escaped`: the byte before this block escapes its first byte.
  Escapes(std::uint64_t backslashes, bool first_escaped) {
    // An addition carries through each run of backslashes; the place where the carry ends tells runs that begin at an
    // odd bit from those that begin at an even one. (The method is simdjson's.)
    constexpr std::uint64_t kOdd = 0xaaaaaaaaaaaaaaaaULL;
    const std::uint64_t starts = backslashes & ~std::uint64_t{first_escaped};
    const std::uint64_t codes = (((starts << 1) | kOdd) - starts) ^ kOdd;
    escaped = codes ^ (backslashes | std::uint64_t{first_escaped});
    escaping = codes & backslashes;
  }
};

// ---- searches ----

// The bits of a lane at `at` that lie before `end`.
inline unsigned before_end(unsigned mask, const char* at, const char* end) {
  const auto left = static_cast<std::size_t>(end - at);
  return left >= kLaneBytes ? mask : mask & ((1u << left) - 1);
}

// The first byte in [at, end) that equals `one` or `other`, or `end`.
inline const char* find_either(const char* at, const char* end, char one, char other) {
  for (; at < end; at += kLaneBytes) {
    const Lane lane(at);
    const unsigned mask = before_end((lane.equal(one) | lane.equal(other)).mask(), at, end);
    if (mask != 0) return at + std::countr_zero(mask);
  }
  return end;
}

// The first byte in [at, end) that is neither a-z nor `_`, or `end`.
inline const char* find_end_of_name(const char* at, const char* end) {
  for (; at < end; at += kLaneBytes) {
    const unsigned mask = before_end(Lane(at).name().mask() ^ 0xffff, at, end);
    if (mask != 0) return at + std::countr_zero(mask);
  }
  return end;
}

// The index of the first byte in [from, to) of `base` that is no field text (see is_field_text), or `to`. Reads within
// [base, base + to) only.
inline std::size_t find_control(const char* base, std::size_t from, std::size_t to) {
  const auto controls = [base](std::size_t at) {
    const Lane lane(base + at);
    return (lane.control().without(lane.equal('\t')) | lane.equal(0x7f)).mask();
  };
  for (; from + kLaneBytes <= to; from += kLaneBytes) {
    const unsigned mask = controls(from);
    if (mask != 0) return from + static_cast<std::size_t>(std::countr_zero(mask));
  }
  if (to < kLaneBytes) {
    while (from < to && is_field_text(base[from])) ++from;
    return from;
  }
  // The last lane overlaps bytes that were seen before.
  const unsigned mask = controls(to - kLaneBytes) >> (kLaneBytes - (to - from));
  return mask == 0 ? to : from + static_cast<std::size_t>(std::countr_zero(mask));
}

// The result of skip_text().
struct TextRun {
  std::size_t at;     // the block in which the string ends, or the last part of the text, shorter than a block
  bool escaped;       // the byte at `at` is escaped
  bool ascii = true;  // everything before `at` is ASCII
};

// Skips whole blocks while a string goes on. A control character, which JSON forbids in strings, ends it too.
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

#if defined(__x86_64__)
// The same with AVX2.
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
#else
inline TextRun skip_text(const char* text, std::size_t at, std::size_t end, bool escaped) {
  return skip_text_by_16(text, at, end, escaped);
}
#endif

}  // namespace nexus
