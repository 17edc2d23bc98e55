// series.h
// Owns:     adding up the threads' counters: every value on /metrics is the sum over one series.
// Promises: the sources of a series are side by side once they are sorted; a walk over many series yields the processor
//           now and then, because a worker on it would wait milliseconds for a large page.
// Leaves:   which counters, and their labels, to prometheus.h.
// Threads:  one (control); the counters may be written meanwhile.
// Tested by: tests/prometheus_test.cpp
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <thread>
#include <vector>

#include "nexus/metrics/histogram.h"

namespace nexus {

// The counters of one thread, with the key of their series. Several threads, and several names with the same label
// value, may share a key; sorting by key puts the sources of a series side by side.
template <class Cells>
struct Source {
  std::uint64_t key;  // label groups: first << 32 | second, or the only one
  const Cells* cells;
  bool operator<(const Source& other) const { return key < other.key; }
};
template <class Cells>
using Sources = std::vector<Source<Cells>>;

// All that is added up for one combination of labels.
template <class Cells>
using Series = std::span<const Source<Cells>>;

// visit(first group, second group, series).
template <class Cells, class Visit>
void for_each_series(const Sources<Cells>& sources, Visit&& visit) {
  constexpr std::size_t kSeriesAtOnce = 64;  // about 20 µs
  std::size_t visited = 0;
  for (std::size_t begin = 0, end = 0; begin < sources.size(); begin = end) {
    while (end < sources.size() && sources[end].key == sources[begin].key) ++end;
    visit(static_cast<std::uint32_t>(sources[begin].key >> 32), static_cast<std::uint32_t>(sources[begin].key),
          Series<Cells>(sources).subspan(begin, end - begin));
    if (++visited % kSeriesAtOnce == 0) std::this_thread::yield();
  }
}

// The sum of one counter, which `pick` (a member, or a function) finds in the cells.
template <class Cells, class Pick>
std::int64_t sum_of(Series<Cells> series, Pick&& pick) {
  std::int64_t sum = 0;
  for (const auto& source : series) sum += std::invoke(pick, *source.cells).read_signed();
  return sum;
}

template <const auto& kBounds, class Cells>
HistogramValues<kBounds> sum_of(Series<Cells> series, Histogram<kBounds> Cells::*histogram) {
  HistogramValues<kBounds> values;
  for (const auto& source : series) (source.cells->*histogram).add_to(values);
  return values;
}

}  // namespace nexus
