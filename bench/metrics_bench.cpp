// metrics_bench.cpp
// Measures, in one process and one run, each beside its anchors:
//   what recording one request costs, every family of it: bare slab (only the arithmetic), Nexus, prometheus-cpp;
//   what one line of /metrics costs: copying ready-made lines, Nexus, prometheus-cpp; and what /v1/stats costs;
//   how many bytes a series takes.
// Figures are medians of CPU time of the measuring thread, so that other work on the machine disturbs them little.
// build:  g++ -std=c++20 -O2 -I. bench/metrics_bench.cpp -lprometheus-cpp-core -pthread -o build/metrics_bench
// usage:  metrics_bench [ROUNDS]
#include <malloc.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "bare_slab.h"
#include "nexus/metrics/prometheus.h"
#include "nexus/metrics/stats_json.h"
#include "prometheus_cpp_peer.h"

using namespace nexus;
using namespace nexus::bench;

namespace {

constexpr std::uint32_t kModels = 20, kBackends = 10;

double thread_cpu_ns() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e9 + static_cast<double>(t.tv_nsec);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Keeps the compiler from merging one request's stores with the next one's.
void barrier() { asm volatile("" ::: "memory"); }

std::string output_of(const char* command) {
  std::string out;
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return out;
  char piece[256];
  while (fgets(piece, sizeof piece, pipe) != nullptr) out += piece;
  pclose(pipe);
  while (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

void print_machine() {
  std::ifstream info("/proc/cpuinfo");
  std::string line, model = "?";
  while (std::getline(info, line)) {
    if (line.starts_with("model name")) model = line.substr(line.find(':') + 2);
  }
  std::printf("machine: %s, %u cores, Linux %s; compiler %s; prometheus-cpp %s; load %s\n", model.c_str(),
              std::thread::hardware_concurrency(), output_of("uname -r").c_str(), __VERSION__,
              output_of("dpkg-query -W -f '${Version}' prometheus-cpp-dev 2>/dev/null").c_str(),
              output_of("cut -d' ' -f1 /proc/loadavg").c_str());
}

// Requests as a gateway sees them: mostly streams with usage, 3 % failures, times over several decades.
std::vector<RequestRecord> make_requests(std::uint32_t models, std::uint32_t backends, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::lognormal_distribution<double> spread(0, 1);
  const auto ns = [&](Ns typical) { return static_cast<Ns>(spread(random) * static_cast<double>(typical)); };
  std::vector<RequestRecord> all(1024);
  for (RequestRecord& r : all) {
    r.model = ModelId{static_cast<std::uint32_t>(random() % models)};
    r.backend = BackendId{static_cast<std::uint32_t>(random() % backends)};
    const bool failed = random() % 100 < 3;
    r.status = failed ? 502 : 200;
    r.error = failed ? ErrorType::backend_error : ErrorType::none;
    r.reached_backend = r.backend != BackendId::none;
    r.stream = !failed && random() % 4 != 0;
    r.duration_ns = ns(2 * kSecond);
    r.overhead_ns = ns(60 * kMicrosecond);
    if (failed) continue;
    r.prompt_tokens = ns(600);
    r.completion_tokens = ns(200);
    r.first_byte_ns = ns(120 * kMillisecond);
    r.per_token_ns = ns(20 * kMillisecond);
  }
  return all;
}

// One request from its beginning to its end, each behind one call, as an exchange makes it.
[[gnu::noinline]] void request_on(BareSlab& slab, const RequestRecord& r) {
  slab.begin(r.backend);
  barrier();
  slab.end(r);
}

[[gnu::noinline]] void request_on(Slab& slab, const RequestRecord& r) {
  slab.add_in_flight(r.backend, 1);
  slab.attempt(r.backend, AttemptOutcome::ok);
  slab.record(r);
  slab.add_in_flight(r.backend, -1);
}

// CPU time of one request, in ns: `record` over all requests, as often as makes about `total` of them.
template <class Record>
double time_requests(const std::vector<RequestRecord>& requests, std::size_t total, Record&& record) {
  for (const RequestRecord& r : requests) record(r);
  const std::size_t passes = total / requests.size();
  const double begin = thread_cpu_ns();
  for (std::size_t pass = 0; pass < passes; ++pass) {
    for (const RequestRecord& r : requests) {
      record(r);
      barrier();
    }
  }
  return (thread_cpu_ns() - begin) / static_cast<double>(passes * requests.size());
}

// Both threads begin together and record side by side; the mean of their costs.
template <class Make>
double time_two_threads(std::size_t total, Make&& make) {
  std::atomic<int> ready{0};
  double cost[2]{};
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      const auto requests = make_requests(kModels, kBackends, static_cast<std::uint32_t>(i) + 1);
      auto record = make(i);
      ++ready;
      while (ready < 2) std::this_thread::yield();
      cost[i] = time_requests(requests, total, record);
    });
  }
  for (std::thread& t : threads) t.join();
  return (cost[0] + cost[1]) / 2;
}

struct Names {
  ModelNames models{"unknown", 100'000};
  BackendNames backends{"none", 100'000};
  FleetView fleet;

  Names(std::uint32_t model_count, std::uint32_t backend_count) {
    for (std::uint32_t i = 1; i < model_count; ++i) models.intern("model-" + std::to_string(i));
    for (std::uint32_t i = 1; i < backend_count; ++i) {
      fleet.backends.push_back({backends.intern("backend-" + std::to_string(i) + ":11434"), true});
    }
  }
};

void bench_recording(std::size_t rounds) {
  // 30 ms of a slab: that it finds the caches full of the other's cells at the beginning must not count.
  constexpr std::size_t kSlice = 3'000'000;
  constexpr std::size_t kPeerSlice = kSlice / 10;
  const auto requests = make_requests(kModels, kBackends, 1);
  Names names(kModels, kBackends);
  Metrics metrics;
  Slab* slabs[] = {&metrics.add_slab(), &metrics.add_slab()};
  BareSlab bare(kModels, kBackends), second_bare(kModels, kBackends);
  BareSlab* bares[] = {&bare, &second_bare};
  PrometheusCppPeer peer(kModels, kBackends);

  const auto on = [](auto& slab) { return [&slab](const RequestRecord& r) { request_on(slab, r); }; };
  const auto cached = [&peer](const RequestRecord& r) { peer.record_cached(r); };
  const auto looked_up = [&peer](const RequestRecord& r) { peer.record_looked_up(r); };
  std::vector<double> bare_1, bare_2, nexus_1, nexus_2, nexus_scraped, cached_1, cached_2, looked_up_1, looked_up_2;
  for (std::size_t round = 0; round < rounds; ++round) {
    for (int slice = 0; slice < 8; ++slice) {  // side by side, so that a disturbance meets both
      bare_1.push_back(time_requests(requests, kSlice, on(bare)));
      nexus_1.push_back(time_requests(requests, kSlice, on(*slabs[0])));
      bare_2.push_back(time_two_threads(kSlice, [&](std::size_t i) { return on(*bares[i]); }));
      nexus_2.push_back(time_two_threads(kSlice, [&](std::size_t i) { return on(*slabs[i]); }));
    }
    {
      std::atomic<bool> stop{false};
      std::thread scraper([&] {
        PrometheusPage page;
        while (!stop) {
          page.render(metrics, names.fleet, {}, names.models, names.backends, LabelMode::sanitize);
          std::this_thread::sleep_for(std::chrono::milliseconds(100));
        }
      });
      for (int slice = 0; slice < 8; ++slice) nexus_scraped.push_back(time_requests(requests, kSlice, on(*slabs[0])));
      stop = true;
      scraper.join();
    }
    cached_1.push_back(time_requests(requests, kPeerSlice, cached));
    cached_2.push_back(time_two_threads(kPeerSlice, [&](std::size_t) { return cached; }));
    looked_up_1.push_back(time_requests(requests, kPeerSlice / 20, looked_up));
    looked_up_2.push_back(time_two_threads(kPeerSlice / 20, [&](std::size_t) { return looked_up; }));
  }

  std::printf("\nrecording one request, every family, %u models x %u backends, ns\n", kModels, kBackends);
  std::printf("  %-34s %10s %10s %14s\n", "", "1 thread", "2 threads", "scraped 10/s");
  std::printf("  %-34s %10.1f %10.1f\n", "bare slab (only the arithmetic)", median(bare_1), median(bare_2));
  std::printf("  %-34s %10.1f %10.1f %14.1f\n", "nexus", median(nexus_1), median(nexus_2), median(nexus_scraped));
  std::printf("  %-34s %10.2f %10.2f %14.2f\n", "nexus / bare slab", median(nexus_1) / median(bare_1),
              median(nexus_2) / median(bare_2), median(nexus_scraped) / median(bare_1));
  std::printf("  %-34s %10.1f %10.1f\n", "prometheus-cpp, handles kept", median(cached_1), median(cached_2));
  std::printf("  %-34s %10.1f %10.1f\n", "prometheus-cpp, looked up", median(looked_up_1), median(looked_up_2));
}

// A fleet in which every pair of model and backend was used on both threads.
struct Filled {
  Names names;
  Metrics metrics;
  double bytes_before = 0, bytes_after = 0;

  Filled(std::uint32_t models, std::uint32_t backends, bool streams) : names(models + 1, backends + 1) {
    Slab* slabs[] = {&metrics.add_slab(), &metrics.add_slab()};
    bytes_before = static_cast<double>(mallinfo2().uordblks);
    std::vector<RequestRecord> requests = make_requests(2, 2, 7);
    for (std::uint32_t m = 1; m <= models; ++m) {
      for (std::uint32_t b = 1; b <= backends; ++b) {
        for (std::size_t i = 0; i < 400; ++i) {
          RequestRecord r = requests[(i * 7 + m * 31 + b) % requests.size()];
          r.model = ModelId{m};
          r.backend = BackendId{b};
          r.reached_backend = true;
          r.stream = streams && r.stream;
          if (!streams) r.status = 200, r.error = ErrorType::none;
          request_on(*slabs[i % 2], r);
        }
      }
    }
    bytes_after = static_cast<double>(mallinfo2().uordblks);
  }
};

template <class Work>
double time_median_ns(std::size_t repeats, Work&& work) {
  std::vector<double> costs;
  for (std::size_t i = 0; i < repeats + 3; ++i) {
    const double begin = thread_cpu_ns();
    work();
    if (i >= 3) costs.push_back(thread_cpu_ns() - begin);
  }
  return median(costs);
}

std::vector<std::string_view> lines_of(std::string_view page) {
  std::vector<std::string_view> lines;
  while (!page.empty()) {
    const std::size_t end = page.find('\n') + 1;
    lines.push_back(page.substr(0, end));
    page.remove_prefix(end);
  }
  return lines;
}

void bench_rendering(const char* name, std::uint32_t models, std::uint32_t backends, bool streams,
                     std::size_t repeats) {
  Filled filled(models, backends, streams);
  const Names& names = filled.names;
  PrometheusPage page;
  TextBuffer stats;
  const auto render = [&] {
    return page.render(filled.metrics, names.fleet, {}, names.models, names.backends, LabelMode::sanitize);
  };
  const std::string text(render());
  const std::vector<std::string_view> lines = lines_of(text);
  const auto samples = static_cast<double>(
      std::count_if(lines.begin(), lines.end(), [](std::string_view line) { return line[0] != '#'; }));

  std::vector<char> copy(text.size());
  const double copied = time_median_ns(repeats, [&] {
    char* at = copy.data();
    for (const std::string_view line : lines) {
      std::memcpy(at, line.data(), line.size());
      at += line.size();
    }
    barrier();
  });
  const double rendered = time_median_ns(repeats, [&] {
    render();
    barrier();
  });
  const double fresh = time_median_ns(repeats, [&] {
    const std::string once = std::string(
        PrometheusPage().render(filled.metrics, names.fleet, {}, names.models, names.backends, LabelMode::sanitize));
    barrier();
  });
  const double json = time_median_ns(repeats, [&] {
    stats.clear();
    write_stats(stats, collect_stats(filled.metrics, names.fleet, names.models, names.backends));
    barrier();
  });
  std::printf(
      "  %-22s %8.0f lines %6.2f MB | %6.1f ns copied, %6.1f ns rendered, %6.1f ns as a new string"
      " | page %8.3f ms, stats %7.3f ms | %5.1f bytes a line\n",
      name, samples, static_cast<double>(text.size()) / 1e6, copied / samples, rendered / samples, fresh / samples,
      rendered / 1e6, json / 1e6, (filled.bytes_after - filled.bytes_before) / samples);
}

void bench_peer_rendering(std::size_t repeats) {
  PrometheusCppPeer peer(kModels, kBackends);
  const auto requests = make_requests(kModels, kBackends, 7);
  for (int i = 0; i < 50; ++i) {
    for (const RequestRecord& r : requests) peer.record_cached(r);
  }
  const std::string text = peer.page();
  const std::vector<std::string_view> lines = lines_of(text);
  const auto samples = static_cast<double>(
      std::count_if(lines.begin(), lines.end(), [](std::string_view line) { return line[0] != '#'; }));
  const double rendered = time_median_ns(repeats, [&] { peer.page(); });
  std::printf("  %-22s %8.0f lines %6.2f MB | %30.1f ns rendered\n", "prometheus-cpp", samples,
              static_cast<double>(text.size()) / 1e6, rendered / samples);
}

}  // namespace

int main(int argc, char** argv) {
  const std::size_t rounds = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 7;
  if (rounds == 0) {
    std::fprintf(stderr, "usage: metrics_bench [ROUNDS]\n");
    return 2;
  }
  print_machine();
  bench_recording(rounds);
  std::printf("\nrendering /metrics from two threads' slabs, per sample line; /v1/stats over the same\n");
  bench_rendering("20 models x 10, bodies", 20, 10, false, 30 * rounds);
  bench_rendering("20 models x 10, streams", 20, 10, true, 30 * rounds);
  bench_rendering("10,000 series", 12, 10, true, 30 * rounds);
  bench_rendering("100,000 series", 59, 20, true, 5 * rounds);
  bench_peer_rendering(2 * rounds);
  return 0;
}
