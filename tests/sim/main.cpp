// The simulator's command line. `sim 1..1000` runs those seeds. `make test` runs `sim --test`, which checks that each
// canary is noticed, runs a fixed set of seeds, and compares their traces with those of another process. `sim --traces`
// prints a trace per seed. The message of a seed that fails says how to replay it.
#include <signal.h>
#include <unistd.h>

#include <charconv>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <string_view>
#include <vector>

#include "every_failure.h"
#include "simulation.h"

namespace nexus::sim {
namespace {

volatile std::uint64_t current_seed = 0;

// Prints the seed if an assertion fails or the process crashes.
void on_crash(int signal) {
  char text[200];
  const int bytes =
      std::snprintf(text, sizeof text, "seed %llu: ended by %s; replay: make sim SEEDS=%llu..%llu\n",
                    static_cast<unsigned long long>(current_seed), strsignal(signal),
                    static_cast<unsigned long long>(current_seed), static_cast<unsigned long long>(current_seed));
  if (write(STDERR_FILENO, text, static_cast<std::size_t>(bytes)) < 0) _exit(3);
  ::signal(signal, SIG_DFL);
  raise(signal);
}

Outcome run_seed(std::uint64_t seed, Canary canary, LogRings& rings) {
  current_seed = seed;
  Simulation simulation(seed, canary, rings);
  if (std::getenv("TRACE") != nullptr) simulation.tell(stderr);
  return simulation.run();
}

struct Tally {
  std::uint64_t seeds = 0, failed = 0, requests = 0, answers = 0, arrivals = 0, unasked = 0, turns = 0, lookups = 0,
                moves = 0;
  Ns simulated_ns = 0;
  std::vector<std::uint64_t> traces;  // seed by seed
  Ns began_cpu_ns = 0;
  Happened happened;
  ReloadCoverage reloads;
};

Ns cpu_now() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return Ns{t.tv_sec} * kSecond + t.tv_nsec;
}

void add(Tally& tally, const Outcome& outcome, std::uint64_t seed) {
  tally.seeds += 1;
  tally.requests += outcome.requests;
  tally.answers += outcome.answers;
  tally.arrivals += outcome.arrivals;
  tally.unasked += outcome.unasked;
  tally.turns += outcome.turns;
  tally.lookups += outcome.lookups;
  tally.moves += outcome.moves;
  tally.simulated_ns += outcome.simulated_ns;
  tally.happened.add(outcome.happened);
  tally.reloads.add(outcome.reloads);
  tally.traces.push_back(outcome.trace);
  if (outcome.wrong.empty()) return;
  tally.failed += 1;
  std::printf("seed %llu: %s; replay: make sim SEEDS=%llu..%llu\n", static_cast<unsigned long long>(seed),
              outcome.wrong.c_str(), static_cast<unsigned long long>(seed), static_cast<unsigned long long>(seed));
  std::fflush(stdout);
}

std::uint64_t trace_of(const Tally& tally) {
  std::uint64_t trace = 0;
  for (const std::uint64_t one : tally.traces) trace = mix(trace ^ one);
  return trace;
}

double seconds(Ns span) { return static_cast<double>(span) / static_cast<double>(kSecond); }

void print(const Tally& tally) {
  const double cpu = seconds(cpu_now() - tally.began_cpu_ns);
  std::printf(
      "%llu seeds, %llu requests (%llu answered whole, %llu arrivals at backends, %llu times bytes unasked, "
      "%llu lookups of hosts that moved %llu times), %llu turns; "
      "%.0f s simulated in %.1f s (%.0f times real time), %.0f requests a second; trace %016llx\n",
      static_cast<unsigned long long>(tally.seeds), static_cast<unsigned long long>(tally.requests),
      static_cast<unsigned long long>(tally.answers), static_cast<unsigned long long>(tally.arrivals),
      static_cast<unsigned long long>(tally.unasked), static_cast<unsigned long long>(tally.lookups),
      static_cast<unsigned long long>(tally.moves), static_cast<unsigned long long>(tally.turns),
      seconds(tally.simulated_ns), cpu, seconds(tally.simulated_ns) / cpu, static_cast<double>(tally.requests) / cpu,
      static_cast<unsigned long long>(trace_of(tally)));
}

void print(const Happened& happened) {
  const auto tell = [](const char* what, std::uint64_t count) {
    std::printf("%s %llu", what, static_cast<unsigned long long>(count));
  };
  tell("of these: retried", happened.retried);
  tell(", served after that", happened.failed_over);
  tell(", under another model", happened.fell_back);
  tell(", cut", happened.cut);
  tell(", left by their client", happened.left);
  tell(", timed out", happened.timed_out);
  tell(", bad answers", happened.parse_errors);
  tell(", other failures of backends", happened.backend_errors);
  tell(", refused", happened.refused);
  std::printf("\n");
}

// Runs the seeds. `progress`: prints how far it is from time to time.
Tally run_seeds(std::uint64_t first, std::uint64_t last, LogRings& rings, bool progress) {
  constexpr Ns kTellEvery = 15 * kSecond;
  Tally tally;
  tally.began_cpu_ns = cpu_now();
  const Ns began = monotonic_now();
  Ns tell_at = began + kTellEvery;
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    add(tally, run_seed(seed, Canary::none, rings), seed);
    if (!progress || monotonic_now() < tell_at) continue;
    tell_at = monotonic_now() + kTellEvery;
    const double done = static_cast<double>(seed - first + 1) / static_cast<double>(last - first + 1);
    const double spent = seconds(monotonic_now() - began);
    std::printf("%3.0f%%: %llu seeds, %llu failed, %llu requests; %.0f s left\n", done * 100,
                static_cast<unsigned long long>(tally.seeds), static_cast<unsigned long long>(tally.failed),
                static_cast<unsigned long long>(tally.requests), spent / done - spent);
    std::fflush(stdout);
  }
  return tally;
}

struct CanaryRow {
  const char* name;
  std::string_view by;  // a part of the message of the check that must notice it; empty: any
};
constexpr CanaryRow kCanaries[] = {
    {"none", ""},
    {"a flipped byte", ""},
    {"a dropped byte", ""},
    {"a repeated write", ""},
    {"a FIN in place of a reset", ""},
    {"a leaked descriptor", ""},
    {"a request sent twice", ""},
    {"a forgotten edge", ""},
    {"a stale fleet", ""},
    {"a lack of this host that looks as if the backend had refused", "counted as connect_error"},
    {"the same in a health check", "is unhealthy after"},
    {"a refusal that looks like a lack of this host", "counted as cancelled"},
    {"a backend that is not heard", "counted as timeout"},
    {"a 500 taken for a 200", "counted as ok"},
    {"an ejection without a failure", "is ejected after"},
    {"workers that do not see ejections", "is ejected, and"},
    {"a request that is not tried again", "was not tried"},
    {"a retry at the same backend", "came again to"},
    {"a cap that is not obeyed", "whose cap is"},
    {"a queued request that is overtaken", "overtook"},
    {"a place that is not given back", "left over"},
    {"bytes on an idle connection that are not seen", "that nobody asked for"},
    {"a host that has moved", "which the last answer for its name does not have"},
    {"a lookup that fails and takes others with it", "is unhealthy after"},
    {"a lookup that is never answered", "is not answered in time"},
};
static_assert(std::size(kCanaries) == static_cast<std::size_t>(Canary::count));

// True if the checks notice this defect within a few seeds.
bool is_noticed(Canary canary, LogRings& rings) {
  constexpr std::uint64_t kSeeds = 200;
  const CanaryRow& row = kCanaries[static_cast<std::size_t>(canary)];
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const Outcome outcome = run_seed(seed, canary, rings);
    if (outcome.wrong.empty() || outcome.wrong.find(row.by) == std::string::npos) continue;
    std::printf("noticed: %s (seed %llu: %s)\n", row.name, static_cast<unsigned long long>(seed),
                outcome.wrong.c_str());
    return true;
  }
  std::printf("FAILED: nobody noticed %s\n", row.name);
  return false;
}

// The traces of a range of seeds as another process prints them, last seed first: both its addresses and the state that
// each seed leaves to the next one differ from this process's.
class TracesElsewhere {
 public:
  TracesElsewhere(std::uint64_t first, std::uint64_t last) : first_(first), last_(last) {
    char self[PATH_MAX] = "";
    if (readlink("/proc/self/exe", self, sizeof self - 1) <= 0) return;
    const std::string range = std::to_string(last) + ".." + std::to_string(first);
    output_ = popen(("exec '" + std::string(self) + "' --traces " + range).c_str(), "re");
  }
  TracesElsewhere(const TracesElsewhere&) = delete;
  TracesElsewhere& operator=(const TracesElsewhere&) = delete;
  ~TracesElsewhere() {
    if (output_ != nullptr) pclose(output_);
  }

  // True if they equal `here`, which is in order from the first seed.
  bool are(const std::vector<std::uint64_t>& here) {
    std::uint64_t expected = last_;
    unsigned long long seed = 0;
    unsigned long long trace = 0;
    for (; output_ != nullptr && std::fscanf(output_, "%llu %llx", &seed, &trace) == 2; --expected) {
      if (seed == expected && trace == here[seed - first_]) continue;
      std::printf("FAILED: seed %llu has a different trace in another process\n", seed);
      return false;
    }
    if (expected == first_ - 1) return true;
    std::printf("FAILED: the other process ended before seed %llu\n", static_cast<unsigned long long>(expected));
    return false;
  }

 private:
  std::uint64_t first_, last_;
  std::FILE* output_ = nullptr;
};

int print_traces(std::uint64_t from, std::uint64_t to, LogRings& rings) {
  for (std::uint64_t seed = from;; seed = from < to ? seed + 1 : seed - 1) {
    std::printf("%llu %016llx\n", static_cast<unsigned long long>(seed),
                static_cast<unsigned long long>(run_seed(seed, Canary::none, rings).trace));
    if (seed == to) return 0;
  }
}

Tally run_every_failure(LogRings& rings) {
  Tally tally;
  tally.began_cpu_ns = cpu_now();
  for (const Scale scale : {Scale::small, Scale::leavers, Scale::reload}) {
    const EveryFailure::Counts counts = EveryFailure(rings, scale).run();
    tally.seeds += counts.runs;
    tally.failed += counts.failed;
  }
  std::printf("every failure: %llu runs, %llu went wrong, in %.1f s\n", static_cast<unsigned long long>(tally.seeds),
              static_cast<unsigned long long>(tally.failed), seconds(cpu_now() - tally.began_cpu_ns));
  return tally;
}

// Two keys that always wait: is the queue fair?
bool is_fair(std::uint64_t seed, LogRings& rings) {
  const Outcome outcome = Simulation(seed, Canary::none, rings, Scale::crowd).run();
  if (!outcome.wrong.empty())
    std::printf("FAILED: %s; replay: sim --crowd %llu\n", outcome.wrong.c_str(), static_cast<unsigned long long>(seed));
  return outcome.wrong.empty();
}

int test(LogRings& rings) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr std::uint64_t kFixedSeeds = 100;  // each takes ten times as long
#else
  constexpr std::uint64_t kFixedSeeds = 2000;
#endif
  constexpr std::uint64_t kFirst = 1001;
  constexpr std::uint64_t kLast = kFirst + kFixedSeeds - 1;
  TracesElsewhere elsewhere(kFirst, kLast);  // runs while this process does
  unsigned passed = 0;
  unsigned failed = 0;
  const auto count = [&](bool ok) { (ok ? passed : failed) += 1; };
  for (auto canary = 1; canary < static_cast<int>(Canary::count); ++canary) {
    count(is_noticed(static_cast<Canary>(canary), rings));
  }
  constexpr std::uint64_t kCrowds = 40;
  for (std::uint64_t seed = 1; seed <= kCrowds; ++seed) count(is_fair(seed, rings));
  const Tally every = run_every_failure(rings);
  passed += static_cast<unsigned>(every.seeds - every.failed);
  failed += static_cast<unsigned>(every.failed);
  const Tally tally = run_seeds(kFirst, kLast, rings, false);
  print(tally);
  print(tally.happened);
  count(elsewhere.are(tally.traces));
  if (kFixedSeeds > 1000) count(tally.reloads.print_missing() == 0);
  passed += static_cast<unsigned>(tally.seeds - tally.failed);
  failed += static_cast<unsigned>(tally.failed);
  std::printf("%u passed, %u failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

bool read_range(std::string_view text, std::uint64_t& first, std::uint64_t& last) {
  const std::size_t dots = text.find("..");
  const std::string_view from = text.substr(0, dots);
  const std::string_view to = dots == std::string_view::npos ? from : text.substr(dots + 2);
  return std::from_chars(from.data(), from.data() + from.size(), first).ec == std::errc() &&
         std::from_chars(to.data(), to.data() + to.size(), last).ec == std::errc();
}

}  // namespace
}  // namespace nexus::sim

int main(int argc, char** argv) {
  using namespace nexus::sim;
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) ::signal(signal, on_crash);
  LogRings rings;
  const std::string_view what = argc >= 2 ? argv[1] : "";
  const bool traces = argc == 3 && what == "--traces";
  if (argc == 2 && what == "--test") return test(rings);
  if (argc == 2 && what == "--failures") return run_every_failure(rings).failed == 0 ? 0 : 1;
  if (argc == 3 && what == "--crowd") return is_fair(std::strtoull(argv[2], nullptr, 10), rings) ? 0 : 1;
  if (argc == 6 && what == "--failure") {
    const std::string_view name = argv[2];
    const Scale scale = name == "leavers" ? Scale::leavers : name == "reload" ? Scale::reload : Scale::small;
    const Failure failure{std::strtoull(argv[3], nullptr, 10), std::strtoull(argv[4], nullptr, 10), std::atoi(argv[5])};
    return EveryFailure(rings, scale).run_one(failure) ? 0 : 1;
  }
  std::uint64_t first = 0;
  std::uint64_t last = 0;
  if ((argc != 2 && !traces) || !read_range(traces ? argv[2] : what, first, last) || (first > last && !traces)) {
    std::fprintf(stderr, "usage: sim FIRST..LAST | sim --traces FROM..TO | sim --test\n");
    return 2;
  }
  if (traces) return print_traces(first, last, rings);
  const Tally tally = run_seeds(first, last, rings, true);
  print(tally);
  print(tally.happened);
  std::printf("%llu passed, %llu failed\n", static_cast<unsigned long long>(tally.seeds - tally.failed),
              static_cast<unsigned long long>(tally.failed));
  return tally.failed == 0 ? 0 : 1;
}
