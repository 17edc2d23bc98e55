// every_failure.h
// Owns:     repeating a small run: each time another allocation or another system call fails, with each possible errno.
// Promises: no allocation and no call is left out; in each run all checks hold and every allocation is freed.
// Leaves:   the run and its checks to simulation.h, the failures to faults.h.
// Threads:  one.
#pragma once

#include <cerrno>
#include <cstdio>
#include <span>
#include <string>
#include <vector>

#include "simulation.h"

namespace nexus::sim {

// The failure of one run: the n-th allocation, or the n-th call with this errno.
struct Failure {
  std::uint64_t allocation = 0;
  std::uint64_t call = 0;
  int error = 0;
};

// The errors that Nexus may handle differently, for each kind of call.
inline std::span<const int> errors_of(Call call) {
  static constexpr int kAccept[] = {EMFILE, ENOMEM, ECONNABORTED};
  static constexpr int kConnect[] = {EMFILE, ENOMEM, EADDRNOTAVAIL};
  static constexpr int kConnectError[] = {ECONNREFUSED};
  static constexpr int kWatch[] = {ENOMEM};
  static constexpr int kRead[] = {ECONNRESET};
  static constexpr int kWrite[] = {EPIPE, ENOBUFS};
  switch (call) {
    case Call::accept: return kAccept;
    case Call::connect: return kConnect;
    case Call::connect_error: return kConnectError;
    case Call::watch:
    case Call::watch_listener: return kWatch;
    case Call::read: return kRead;
    case Call::write: return kWrite;
  }
  return {};
}

class EveryFailure {
 public:
  EveryFailure(LogRings& rings, Scale scale) : rings_(rings), scale_(scale) {}

  // Runs all failures.
  struct Counts {
    std::uint64_t runs = 0, failed = 0;
  };
  Counts run() {
    if (!find_seed()) return {1, 1};
    clean_run();
    std::printf("seed %llu, %llu requests%s: %llu allocations and %zu calls of Nexus's, each made to fail\n",
                static_cast<unsigned long long>(seed_), static_cast<unsigned long long>(requests_),
                scale_ == Scale::leavers  ? " of clients that leave within their body"
                : scale_ == Scale::reload ? " during a reload"
                                          : "",
                static_cast<unsigned long long>(allocations_), calls_.size());
    Counts counts;
    for (std::uint64_t n = 1; n <= allocations_; ++n) add(counts, {n, 0, 0});
    for (std::size_t i = 0; i < calls_.size(); ++i) {
      for (const int error : errors_of(calls_[i])) add(counts, {0, i + 1, error});
    }
    return counts;
  }

  // Runs one failure, and describes it in words if TRACE is set.
  bool run_one(const Failure& failure) {
    if (!find_seed()) return false;
    const std::string wrong = run_with(failure, std::getenv("TRACE") != nullptr);
    std::printf("%s\n", wrong.empty() ? "all is well" : wrong.c_str());
    return wrong.empty();
  }

 private:
  // Finds the first seed from kFirstSeed on whose run has all the wanted kinds of requests.
  static constexpr std::uint64_t kFirstSeed = 11673;
  static constexpr std::uint64_t kLastSeed = kFirstSeed + 20'000;

  bool find_seed() {
    std::uint32_t most = 0;
    for (seed_ = kFirstSeed; seed_ <= kLastSeed; ++seed_) {
      const Outcome outcome = simulate(nullptr);
      if (!outcome.wrong.empty()) {
        std::printf("FAILED: small run of seed %llu: %s\n", static_cast<unsigned long long>(seed_),
                    outcome.wrong.c_str());
        return false;
      }
      const std::uint32_t kinds = outcome.kinds & wanted_kinds(scale_);
      if (kinds == wanted_kinds(scale_)) return true;
      if (std::popcount(kinds) > std::popcount(most)) most = kinds;
    }
    std::printf("FAILED: no seed has all kinds of requests that are wanted;");
    for (std::size_t i = 0; i < std::size(kKinds); ++i) {
      if ((wanted_kinds(scale_) & ~most) >> i & 1u) std::printf(" the best one lacks: %s", kKinds[i]);
    }
    std::printf("\n");
    return false;
  }

  Outcome simulate(std::FILE* story) {
    Simulation simulation(seed_, Canary::none, rings_, scale_);
    if (story != nullptr) simulation.tell(story);
    return simulation.run();
  }

  void clean_run() {
    faults() = Faults{};
    faults().call_list = &calls_;
    requests_ = simulate(nullptr).requests;
    allocations_ = faults().allocations;
    faults() = Faults{};
  }

  // Returns what went wrong, or nothing.
  std::string run_with(const Failure& failure, bool tell) {
    faults() = Faults{};
    faults().failing_allocation = failure.allocation;
    faults().failing_call = failure.call;
    faults().call_error = failure.error;
    std::string wrong = simulate(tell ? stderr : nullptr).wrong;
    const std::int64_t own = wrong.capacity() > std::string().capacity() ? 1 : 0;
    const std::int64_t kept = faults().live - own;
    const bool failed = faults().failed;
    faults() = Faults{};
    if (wrong.empty() && !failed) return "the run did not reach that failure";
    if (wrong.empty() && kept != 0) return std::to_string(kept) + " allocations were not freed";
    return wrong;
  }

  void add(Counts& counts, const Failure& failure) {
    counts.runs += 1;
    const std::string wrong = run_with(failure, false);
    if (wrong.empty()) return;
    counts.failed += 1;
    const bool memory = failure.allocation > 0;
    std::printf("%s %llu", memory ? "allocation" : "call",
                static_cast<unsigned long long>(memory ? failure.allocation : failure.call));
    if (!memory) std::printf(" (%s)", strerrorname_np(failure.error));
    std::printf(" failed: %s; replay: build/sim --failure %s %llu %llu %d\n", wrong.c_str(),
                scale_ == Scale::leavers  ? "leavers"
                : scale_ == Scale::reload ? "reload"
                                          : "small",
                static_cast<unsigned long long>(failure.allocation), static_cast<unsigned long long>(failure.call),
                failure.error);
    std::fflush(stdout);
  }

  LogRings& rings_;
  Scale scale_;
  std::uint64_t seed_ = 0;
  std::uint64_t requests_ = 0;
  std::uint64_t allocations_ = 0;
  std::vector<Call> calls_;
};

}  // namespace nexus::sim
