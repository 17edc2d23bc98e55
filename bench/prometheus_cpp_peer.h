// prometheus_cpp_peer.h
// Owns:     the peer: the same families in prometheus-cpp (Debian prometheus-cpp-dev), with the same labels and bounds.
// Promises: used as its authors mean it: handles kept per series (cached), or looked up by labels for each request.
// Leaves:   what has no counterpart here (a page in integers, merging of names).
// Threads:  any; the library's own atomics and locks.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "nexus/metrics/histogram.h"
#include "nexus/metrics/slab.h"

namespace nexus::bench {

class PrometheusCppPeer {
 public:
  PrometheusCppPeer(std::size_t models, std::size_t backends) : backends_count_(backends) {
    for (std::size_t i = 0; i < models; ++i) models_.push_back("model_" + std::to_string(i));
    for (std::size_t i = 0; i < backends; ++i) backends_.push_back("backend_" + std::to_string(i) + "_11434");
    for (std::size_t m = 0; m < models; ++m) {
      for (std::size_t b = 0; b < backends; ++b) pairs_.push_back(look_up(m, b));
    }
    overhead_ = &overheads_.Add({}, bounds_of(kOverheadBounds));
  }

  void record_cached(const RequestRecord& r) {
    record(pairs_[index_of(r.model) * backends_count_ + index_of(r.backend)], r);
  }
  void record_looked_up(const RequestRecord& r) { record(look_up(index_of(r.model), index_of(r.backend)), r); }

  std::string page() const { return prometheus::TextSerializer().Serialize(registry_.Collect()); }

 private:
  struct Handles {
    prometheus::Counter *ok, *failed, *errors, *attempts;
    prometheus::Gauge* pending;
    prometheus::Histogram *duration, *prompt, *completion, *first_token, *per_token;
  };

  template <std::size_t N>
  static prometheus::Histogram::BucketBoundaries bounds_of(const Bounds<N>& bounds) {
    prometheus::Histogram::BucketBoundaries all;
    for (const std::int64_t bound : bounds.upper) all.push_back(shown(static_cast<double>(bound), bounds.unit));
    return all;
  }
  static double shown(double value, Unit unit) { return unit == Unit::seconds ? value / 1e9 : value; }
  static double seconds(Ns ns) { return shown(static_cast<double>(ns), Unit::seconds); }

  Handles look_up(std::size_t m, std::size_t b) {
    const prometheus::Labels pair{{"model", models_[m]}, {"backend", backends_[b]}};
    const auto with = [&pair](const char* name, const char* value) {
      prometheus::Labels labels = pair;
      labels.emplace(name, value);
      return labels;
    };
    return {&requests_.Add(with("status", "200")),
            &requests_.Add(with("status", "502")),
            &errors_.Add({{"error_type", "backend_error"}, {"model", models_[m]}}),
            &attempts_.Add({{"backend", backends_[b]}, {"outcome", "ok"}}),
            &pendings_.Add({{"backend", backends_[b]}}),
            &durations_.Add(pair, bounds_of(kDurationBounds)),
            &tokens_.Add(with("type", "prompt"), bounds_of(kTokenBounds)),
            &tokens_.Add(with("type", "completion"), bounds_of(kTokenBounds)),
            &first_tokens_.Add(pair, bounds_of(kFirstTokenBounds)),
            &per_tokens_.Add(pair, bounds_of(kPerTokenBounds))};
  }

  void record(const Handles& handles, const RequestRecord& r) {
    handles.pending->Increment();
    handles.attempts->Increment();
    (r.error == ErrorType::none ? handles.ok : handles.failed)->Increment();
    if (r.error != ErrorType::none) handles.errors->Increment();
    if (r.reached_backend) handles.duration->Observe(seconds(r.duration_ns));
    if (r.prompt_tokens >= 0) handles.prompt->Observe(static_cast<double>(r.prompt_tokens));
    if (r.completion_tokens >= 0) handles.completion->Observe(static_cast<double>(r.completion_tokens));
    if (r.stream && r.first_byte_ns >= 0) handles.first_token->Observe(seconds(r.first_byte_ns));
    if (r.stream && r.per_token_ns >= 0) handles.per_token->Observe(seconds(r.per_token_ns));
    if (r.overhead_ns >= 0) overhead_->Observe(seconds(r.overhead_ns));
    handles.pending->Decrement();
  }

  std::size_t backends_count_;
  std::vector<std::string> models_, backends_;
  prometheus::Registry registry_;
  prometheus::Family<prometheus::Counter>& requests_ =
      prometheus::BuildCounter().Name("nexus_requests_total").Help("Requests.").Register(registry_);
  prometheus::Family<prometheus::Counter>& errors_ =
      prometheus::BuildCounter().Name("nexus_errors_total").Help("Errors.").Register(registry_);
  prometheus::Family<prometheus::Counter>& attempts_ =
      prometheus::BuildCounter().Name("nexus_backend_attempts_total").Help("Attempts.").Register(registry_);
  prometheus::Family<prometheus::Gauge>& pendings_ =
      prometheus::BuildGauge().Name("nexus_pending_requests").Help("Pending.").Register(registry_);
  prometheus::Family<prometheus::Histogram>& durations_ =
      prometheus::BuildHistogram().Name("nexus_request_duration_seconds").Help("Duration.").Register(registry_);
  prometheus::Family<prometheus::Histogram>& tokens_ =
      prometheus::BuildHistogram().Name("nexus_tokens_total").Help("Tokens.").Register(registry_);
  prometheus::Family<prometheus::Histogram>& first_tokens_ =
      prometheus::BuildHistogram().Name("nexus_time_to_first_token_seconds").Help("First.").Register(registry_);
  prometheus::Family<prometheus::Histogram>& per_tokens_ =
      prometheus::BuildHistogram().Name("nexus_time_per_output_token_seconds").Help("Per.").Register(registry_);
  prometheus::Family<prometheus::Histogram>& overheads_ =
      prometheus::BuildHistogram().Name("nexus_overhead_seconds").Help("Overhead.").Register(registry_);
  prometheus::Histogram* overhead_ = nullptr;
  std::vector<Handles> pairs_;
};

}  // namespace nexus::bench
