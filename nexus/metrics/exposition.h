// exposition.h
// Owns:     the two text formats of a page, 0.0.4 of Prometheus and 1.0 of OpenMetrics: HELP, TYPE and UNIT lines,
//           samples, histograms, exemplars.
// Promises: the formats differ in the names of families, in the bounds of buckets (`1`, `1.0`), in exemplars and in the
//           last line alone; buckets are cumulative and `_count` is the +Inf bucket; a sample costs one copy of its
//           prepared beginning and one number; memory is kept for the next page.
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

#include "nexus/base/text.h"
#include "nexus/base/text_buffer.h"
#include "nexus/metrics/exemplars.h"
#include "nexus/metrics/histogram.h"

namespace nexus {

enum class MetricsFormat : std::uint8_t { text, openmetrics };

namespace detail {

// The end of a bucket's labels: `le="0.25"} `. Of a fixed size, so that it is copied without a loop.
struct BucketTail {
  static constexpr std::size_t kBytes = 16;
  std::array<char, kBytes> text{};
  std::size_t length = 0;
};

// A number below a million as Go's %g writes it, and `.0` behind a whole one: OpenMetrics calls that canonical.
inline void make_canonical(TextBuffer& text, std::uint64_t number, Unit unit) {
  constexpr std::uint64_t kLeastPlain = 100'000;  // ns: 0.0001 s; smaller ones have an exponent
  if (unit == Unit::seconds && number > 0 && number < kLeastPlain) {
    const Digits digits(number);
    const std::size_t exponent = 10 - digits.view().size();  // one digit alone is the ninth behind the point
    const std::string_view rest = digits.view().substr(1, digits.view().find_last_not_of('0'));
    text.add(digits.view().substr(0, 1)).add(rest.empty() ? "" : ".").add(rest);
    text.add("e-0").add_number(exponent);
    return;
  }
  const std::size_t from = text.size();
  unit == Unit::seconds ? text.add_seconds(number) : text.add_number(number);
  if (text.text().substr(from).find('.') == std::string_view::npos) text.add(".0");
}

template <const auto& kBounds>
std::span<const BucketTail> bucket_tails(MetricsFormat format) {
  using Tails = std::array<BucketTail, HistogramValues<kBounds>::kBuckets>;
  constexpr auto make = [](MetricsFormat of) {
    Tails tails;
    TextBuffer text;
    for (std::size_t i = 0; i < tails.size(); ++i) {
      text.clear();
      text.add("le=\"");
      const auto upper = static_cast<std::uint64_t>(i == kBounds.upper.size() ? 0 : kBounds.upper[i]);
      if (upper == 0) {
        text.add("+Inf");
      } else if (of == MetricsFormat::openmetrics) {
        make_canonical(text, upper, kBounds.unit);
      } else {
        kBounds.unit == Unit::seconds ? text.add_seconds(upper) : text.add_number(upper);
      }
      text.add("\"} ");
      assert(text.size() <= BucketTail::kBytes);
      tails[i].length = text.text().copy(tails[i].text.data(), BucketTail::kBytes);
    }
    return tails;
  };
  static const std::array<Tails, 2> kTails{make(MetricsFormat::text), make(MetricsFormat::openmetrics)};
  return kTails[static_cast<std::size_t>(format)];
}

}  // namespace detail

class Exposition {
 public:
  using Label = std::pair<std::string_view, std::string_view>;  // the value is escaped already

  void begin(MetricsFormat format) {
    page_.clear();
    format_ = format;
  }
  void end() {
    if (format_ == MetricsFormat::openmetrics) page_.add("# EOF\n");
  }
  MetricsFormat format() const { return format_; }
  std::string_view text() const { return page_.text(); }
  TextBuffer& page() { return page_; }

  // Begins a family of type `counter`, `gauge`, `summary`, `histogram` or `info`; the name of a counter ends in
  // `_total`, that of an info in `_info`. The next samples belong to it and have no labels until labels() is called.
  void family(std::string_view name, std::string_view type, std::string_view help) {
    name_.clear();
    name_.add(name);
    labels_.clear();
    if (format_ == MetricsFormat::openmetrics) return begin_openmetrics(name, type, help);
    page_.add("# HELP ").add(name).add(" ").add(help).add("\n# TYPE ").add(name).add(" ");
    page_.add(type == "info" ? "gauge" : type).add("\n");
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
    write_histogram<false>(detail::bucket_tails<kBounds>(format_), values.buckets, values.sum, kBounds.unit, {});
  }
  // The same with exemplars, which only OpenMetrics has.
  template <const auto& kBounds>
  void histogram(const HistogramValues<kBounds>& values, const typename Exemplars<kBounds>::Newest& exemplars) {
    assert(format_ == MetricsFormat::openmetrics && kBounds.unit == Unit::seconds);
    write_histogram<true>(detail::bucket_tails<kBounds>(format_), values.buckets, values.sum, kBounds.unit, exemplars);
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

  // A counter and an info are named without their suffix; a unit has a line of its own.
  void begin_openmetrics(std::string_view name, std::string_view type, std::string_view help) {
    const std::string_view suffix = type == "counter" ? "_total" : type == "info" ? "_info" : "";
    assert(name.ends_with(suffix));
    name.remove_suffix(suffix.size());
    page_.add("# HELP ").add(name).add(" ");
    add_escaped(help);
    page_.add("\n# TYPE ").add(name).add(" ").add(type).add("\n");
    for (const std::string_view unit : {"_seconds", "_bytes"}) {
      if (name.ends_with(unit)) page_.add("# UNIT ").add(name).add(" ").add(unit.substr(1)).add("\n");
    }
  }

  // A text of our own: `\\`, `\"` and `\n` for what OpenMetrics wants escaped.
  void add_escaped(std::string_view text) {
    for (const char c : text) {
      if (c == '\\' || c == '"') page_ += '\\';
      c == '\n' ? page_.add("\\n") : page_ += c;
    }
  }

  // ` # {trace_id="…"} value time`, with the time in milliseconds.
  static constexpr std::size_t kExemplarBytes = 40 + kTraceDigits + 2 * kNumberBytes;
  static char* write_exemplar(char* at, const Exemplar& exemplar) {
    constexpr std::string_view kStart = " # {trace_id=\"";
    at = std::copy(kStart.begin(), kStart.end(), at);
    for (const std::uint64_t half : {exemplar.trace.id.high, exemplar.trace.id.low}) {
      for (int shift = 60; shift >= 0; shift -= 4) *at++ = kHexDigits[half >> shift & 15];
    }
    constexpr std::string_view kEnd = "\"} ";
    at = write_seconds(std::copy(kEnd.begin(), kEnd.end(), at), static_cast<std::uint64_t>(exemplar.value));
    *at++ = ' ';
    return write_seconds(at, static_cast<std::uint64_t>(exemplar.trace.wall_ns / kMillisecond * kMillisecond));
  }

  template <bool kWithExemplars>
  void write_histogram(std::span<const detail::BucketTail> tails, std::span<const std::uint64_t> counts,
                       std::uint64_t sum, Unit unit, std::span<const Exemplar> exemplars) {
    begin_.clear();
    begin_.add(name_.text()).add("_bucket{").add(labels_.text()).add(labels_.size() > 0 ? "," : "");
    const std::size_t line_bytes =
        start_bytes() + detail::BucketTail::kBytes + kNumberBytes + 1 + (kWithExemplars ? kExemplarBytes : 0);
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
      if constexpr (kWithExemplars) {
        if (exemplars[i].trace.wall_ns == 0) continue;
        at = write_exemplar(at - 1, exemplars[i]);
        *at++ = '\n';
      }
    }
    at = write_start(at, "_sum");
    at = unit == Unit::seconds ? write_seconds(at, sum) : write_number(at, sum);
    *at++ = '\n';
    at = write_start(at, "_count");
    std::memcpy(at, number.data(), number.size());  // that of the +Inf bucket
    page_.finish(at + number_length);
  }

  MetricsFormat format_ = MetricsFormat::text;
  TextBuffer page_;
  TextBuffer name_;
  TextBuffer labels_;  // `a="x",b="y"`
  TextBuffer begin_;   // the common beginning of a histogram's bucket lines
};

}  // namespace nexus
