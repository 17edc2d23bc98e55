// exposition.h
// Owns:     the text exposition format 0.0.4: family heads, sample lines, histograms.
// Promises: buckets are cumulative and `_count` is the +Inf bucket; a line costs a copy of its ready-made beginning and
// a
//           number; all memory is kept for the next page.
// Leaves:   which families there are, and that no series comes twice, to prometheus.h; label values come in ready-made.
// Threads:  one.
#pragma once

#include <array>
#include <cassert>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <span>
#include <string_view>
#include <utility>

#include "histogram.h"
#include "page.h"

namespace nexus {

enum class FamilyType : std::uint8_t { counter, gauge, histogram };

namespace detail {

// What follows the labels of a bucket's line up to its number: `le="0.25"} `. Padded to the step of copy_padded.
struct BucketTail {
  static constexpr std::size_t kBytes = 16;
  std::array<char, kBytes> text{};
  std::size_t length = 0;
};

inline BucketTail make_bucket_tail(Unit unit, std::int64_t bound) {
  BucketTail tail;
  Page page;
  page.add("le=\"");
  if (bound < 0) {
    page.add("+Inf");
  } else if (unit == Unit::seconds) {
    page.add_seconds(static_cast<std::uint64_t>(bound));
  } else {
    page.add_signed(bound);
  }
  page.add("\"} ");
  assert(page.size() <= BucketTail::kBytes);
  tail.length = page.text().copy(tail.text.data(), BucketTail::kBytes);
  return tail;
}

template <const auto& kBounds>
std::span<const BucketTail> bucket_tails() {
  constexpr std::size_t kBuckets = HistogramValues<kBounds>::kBuckets;
  static const auto kTails = [] {
    std::array<BucketTail, kBuckets> tails;
    for (std::size_t i = 0; i + 1 < kBuckets; ++i) tails[i] = make_bucket_tail(kBounds.unit, kBounds.upper[i]);
    tails[kBuckets - 1] = make_bucket_tail(kBounds.unit, -1);
    return tails;
  }();
  return kTails;
}

}  // namespace detail

class Exposition {
 public:
  using Label = std::pair<std::string_view, std::string_view>;  // the value as it is written, already escaped

  void clear() {
    page_.clear();
    labels_.clear();
  }
  std::string_view text() const { return page_.text(); }
  std::size_t capacity() const { return page_.capacity(); }

  // Begins a family; the samples that follow belong to it and begin without labels.
  void family(std::string_view name, FamilyType type, std::string_view help) {
    static constexpr std::array<std::string_view, 3> kTypes{"counter", "gauge", "histogram"};
    name_ = name;
    labels_.clear();
    page_.add("# HELP ").add(name).add(" ").add(help).add("\n# TYPE ").add(name).add(" ");
    page_.add(kTypes[static_cast<std::size_t>(type)]).add("\n");
  }

  // The labels of the samples that follow.
  void labels(std::initializer_list<Label> labels) {
    labels_.clear();
    for (const auto& [name, value] : labels) {
      if (labels_.size() > 0) labels_.add(",");
      labels_.add(name).add("=\"").add(value).add("\"");
    }
  }

  void sample(std::uint64_t value) { line("").add_unsigned(value).add("\n"); }
  void sample_signed(std::int64_t value) { line("").add_signed(value).add("\n"); }
  void sample_seconds(std::uint64_t ns) { line("").add_seconds(ns).add("\n"); }
  void sample_double(double value) {
    std::array<char, 400> digits;  // the longest double without an exponent
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value, std::chars_format::fixed).ptr;
    line("").add({digits.data(), static_cast<std::size_t>(end - digits.data())}).add("\n");
  }

  template <const auto& kBounds>
  void histogram(const HistogramValues<kBounds>& values) {
    const std::uint64_t count = buckets(detail::bucket_tails<kBounds>(), values.buckets);
    line("_sum");
    kBounds.unit == Unit::seconds ? page_.add_seconds(values.sum) : page_.add_unsigned(values.sum);
    page_.add("\n");
    line("_count").add_unsigned(count).add("\n");
  }

 private:
  // `name_suffix{labels} `
  Page& line(std::string_view suffix) {
    page_.add(name_).add(suffix);
    if (labels_.size() > 0) page_.add("{").add(labels_.text()).add("}");
    return page_.add(" ");
  }

  // Writes the bucket lines and returns the last, cumulative number.
  std::uint64_t buckets(std::span<const detail::BucketTail> tails, std::span<const std::uint64_t> counts) {
    begin_.clear();
    begin_.add(name_).add("_bucket{").add(labels_.text()).add(labels_.size() > 0 ? "," : "");
    const std::size_t line_bytes = begin_.size() + detail::BucketTail::kBytes + kNumberBytes + 1;
    char* at = page_.room(line_bytes * counts.size());

    std::uint64_t cumulative = 0;
    std::array<char, 32> number{'0', '\n'};  // of the line before: a bucket that holds nothing says the same again
    std::size_t number_length = 2;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      if (counts[i] != 0) {
        cumulative += counts[i];
        char* end = write_unsigned(number.data(), cumulative);
        *end++ = '\n';
        number_length = static_cast<std::size_t>(end - number.data());
      }
      at = copy_padded(at, begin_.data(), begin_.size());
      std::memcpy(at, tails[i].text.data(), detail::BucketTail::kBytes);
      at += tails[i].length;
      std::memcpy(at, number.data(), number.size());
      at += number_length;
    }
    page_.finish(at);
    return cumulative;
  }

  Page page_;
  Page labels_;  // `a="x",b="y"`
  Page begin_;   // what all lines of a histogram begin with
  std::string_view name_;
};

}  // namespace nexus
