// exposition.h
// Owns:     the text exposition format 0.0.4: HELP and TYPE lines, samples, histograms.
// Promises: buckets are cumulative and `_count` is the +Inf bucket; a sample costs one copy of its prepared beginning
//           and one number; memory is kept for the next page.
// Leaves:   which families there are, and that no series appears twice, to prometheus.h; label values to labels.h.
// Threads:  one.
// Tested by: tests/prometheus_test.cpp
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <charconv>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <span>
#include <string_view>
#include <utility>

#include "nexus/base/text_buffer.h"
#include "nexus/metrics/histogram.h"

namespace nexus {

namespace detail {

// The end of a bucket's labels: `le="0.25"} `. Of a fixed size, so that it is copied without a loop.
struct BucketTail {
  static constexpr std::size_t kBytes = 16;
  std::array<char, kBytes> text{};
  std::size_t length = 0;
};

template <const auto& kBounds>
std::span<const BucketTail> bucket_tails() {
  static const auto kTails = [] {
    std::array<BucketTail, HistogramValues<kBounds>::kBuckets> tails;
    TextBuffer text;
    for (std::size_t i = 0; i < tails.size(); ++i) {
      text.clear();
      text.add("le=\"");
      if (i == kBounds.upper.size()) {
        text.add("+Inf");
      } else if (kBounds.unit == Unit::seconds) {
        text.add_seconds(static_cast<std::uint64_t>(kBounds.upper[i]));
      } else {
        text.add_number(kBounds.upper[i]);
      }
      text.add("\"} ");
      assert(text.size() <= BucketTail::kBytes);
      tails[i].length = text.text().copy(tails[i].text.data(), BucketTail::kBytes);
    }
    return tails;
  }();
  return kTails;
}

}  // namespace detail

class Exposition {
 public:
  using Label = std::pair<std::string_view, std::string_view>;  // the value is escaped already

  void clear() { page_.clear(); }
  std::string_view text() const { return page_.text(); }
  TextBuffer& page() { return page_; }

  // Begins a family of type `counter`, `gauge`, `summary` or `histogram`. The next samples belong to it and have no
  // labels until labels() is called.
  void family(std::string_view name, std::string_view type, std::string_view help) {
    name_.clear();
    name_.add(name);
    labels_.clear();
    page_.add("# HELP ").add(name).add(" ").add(help).add("\n# TYPE ").add(name).add(" ").add(type).add("\n");
  }

  // Sets the labels of the next samples; one without a name is left out.
  void labels(std::initializer_list<Label> labels) {
    labels_.clear();
    for (const auto& [name, value] : labels) {
      if (name.empty()) continue;
      char* at = labels_.room(name.size() + value.size() + 4);
      if (labels_.size() > 0) *at++ = ',';
      at = std::copy(name.begin(), name.end(), at);
      *at++ = '=';
      *at++ = '"';
      at = std::copy(value.begin(), value.end(), at);
      *at++ = '"';
      labels_.finish(at);
    }
  }

  void sample(std::integral auto value) { end_line(write_number(begin_line(), value)); }
  void sample_seconds(std::uint64_t ns) { end_line(write_seconds(begin_line(), ns)); }
  void sample_double(double value) {
    constexpr std::size_t most = 400;  // the longest double without an exponent
    char* const at = write_start(page_.room(start_bytes() + most + 1), "");
    end_line(std::to_chars(at, at + most, value, std::chars_format::fixed).ptr);
  }

  // A summary without quantiles.
  void summary(std::uint64_t sum_ns, std::uint64_t count) {
    end_line(write_seconds(write_start(page_.room(start_bytes() + kNumberBytes + 1), "_sum"), sum_ns));
    end_line(write_number(write_start(page_.room(start_bytes() + kNumberBytes + 1), "_count"), count));
  }

  template <const auto& kBounds>
  void histogram(const HistogramValues<kBounds>& values) {
    write_histogram(detail::bucket_tails<kBounds>(), values.buckets, values.sum, kBounds.unit);
  }

 private:
  // `name_suffix{labels} `, or `name_suffix ` without labels. At most kSuffixBytes longer than name and labels.
  static constexpr std::size_t kSuffixBytes = 16;
  template <std::size_t N>
  char* write_start(char* at, const char (&suffix)[N]) const {
    at = copy_padded(at, name_.data(), name_.size());
    std::memcpy(at, suffix, N - 1);
    at += N - 1;
    if (labels_.size() > 0) {
      *at++ = '{';
      at = copy_padded(at, labels_.data(), labels_.size());
      *at++ = '}';
    }
    *at++ = ' ';
    return at;
  }

  std::size_t start_bytes() const { return name_.size() + labels_.size() + kSuffixBytes; }
  char* begin_line() { return write_start(page_.room(start_bytes() + kNumberBytes + 1), ""); }
  void end_line(char* at) {
    *at++ = '\n';
    page_.finish(at);
  }

  void write_histogram(std::span<const detail::BucketTail> tails, std::span<const std::uint64_t> counts,
                       std::uint64_t sum, Unit unit) {
    begin_.clear();
    begin_.add(name_.text()).add("_bucket{").add(labels_.text()).add(labels_.size() > 0 ? "," : "");
    const std::size_t line_bytes = start_bytes() + detail::BucketTail::kBytes + kNumberBytes + 1;
    char* at = page_.room(line_bytes * (counts.size() + 2));

    std::uint64_t cumulative = 0;
    std::array<char, 32> number{'0', '\n'};  // of the line before: an empty bucket repeats it
    std::size_t number_length = 2;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      if (counts[i] != 0) {
        cumulative += counts[i];
        char* end = write_number(number.data(), cumulative);
        *end++ = '\n';
        number_length = static_cast<std::size_t>(end - number.data());
      }
      at = copy_padded(at, begin_.data(), begin_.size());
      std::memcpy(at, tails[i].text.data(), detail::BucketTail::kBytes);
      at += tails[i].length;
      std::memcpy(at, number.data(), number.size());
      at += number_length;
    }
    at = write_start(at, "_sum");
    at = unit == Unit::seconds ? write_seconds(at, sum) : write_number(at, sum);
    *at++ = '\n';
    at = write_start(at, "_count");
    std::memcpy(at, number.data(), number.size());  // that of the +Inf bucket
    page_.finish(at + number_length);
  }

  TextBuffer page_;
  TextBuffer name_;
  TextBuffer labels_;  // `a="x",b="y"`
  TextBuffer begin_;   // the common beginning of a histogram's bucket lines
};

}  // namespace nexus
