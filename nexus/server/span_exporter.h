// span_exporter.h
// Owns:     the way of the spans from the workers' queue to the collector: batches, requests, tries, losses.
// Promises: at most one request is on its way, and one batch is held beside the queue, so memory is bounded whatever
//           the collector does; a client never waits for it. A batch is sent again only if the collector cannot have
//           it (it was not reached) or asks for that (429, 502, 503, 504), for at most kExportPatience. Each span is
//           counted once, as exported or as dropped. A line a minute at most tells of a collector's failures, and one
//           of their end.
// Leaves:   HTTP to fleet/prober.h, the JSON to metrics/otlp_json.h, names to net/resolver.h.
// Threads:  control's.
// Tested by: tests/span_exporter_test.cpp, tests/e2e/trace.test.mjs
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/api/json_reader.h"
#include "nexus/base/limits.h"
#include "nexus/fleet/prober.h"
#include "nexus/metrics/otlp_json.h"
#include "nexus/metrics/slab.h"
#include "nexus/os/log.h"

namespace nexus {

// The spans of a batch of `sent` that the collector has refused, as its response to a success says (partialSuccess).
inline std::size_t refused_spans(JsonReader& json, std::string_view answer, std::size_t sent) {
  std::string text(answer);
  text.resize(answer.size() + kPaddingBytes);
  std::uint64_t refused = 0;
  JsonReader::Object object;
  if (!json.open({text.data(), answer.size()}, object)) return 0;
  json.each_member(object, [&](std::string_view key, JsonReader::Value value) {
    JsonReader::Object partial;
    if (key != "partialSuccess" || value.get_object().get(partial)) return true;
    return json.each_member(partial, [&](std::string_view name, JsonReader::Value count) {
      std::string_view number = count.raw_json_token();
      if (number.starts_with('"')) number.remove_prefix(1);  // 64-bit integers are text; some write numbers
      if (name == "rejectedSpans") std::from_chars(number.data(), number.data() + number.size(), refused);
      return true;
    });
  });
  return static_cast<std::size_t>(std::min<std::uint64_t>(refused, sent));
}

template <class Net>
class SpanExporter {
 public:
  // `slab`: where this thread counts; `instance`: this process, in service.instance.id.
  SpanExporter(Net& net, Prober<Net>& prober, typename Net::Resolver& resolver, SpanQueue& queue, Slab& slab, Log& log,
               JsonReader& json, std::string instance)
      : net_(net),
        prober_(prober),
        resolver_(resolver),
        queue_(queue),
        slab_(slab),
        log_(log),
        json_(json),
        instance_(std::move(instance)) {}
  SpanExporter(const SpanExporter&) = delete;
  SpanExporter& operator=(const SpanExporter&) = delete;

  // Before any worker sees these settings. Throws std::bad_alloc: call it again.
  void configure(const TraceSettings& trace) {
    if (trace.on()) queue_.open([this] { net_.wake(); });
    const bool same = trace.collector == settings_.collector && trace.base_path == settings_.base_path;
    if (trace.remark != settings_.remark && !trace.remark.empty()) {
      log_.event(LogLevel::warning, "spans are not exported", {{"why", trace.remark}});
    }
    settings_ = trace;
    if (same) return;
    addresses_.clear();
    if (const auto address = parse_address(trace.collector.host, trace.collector.port)) addresses_ = {*address};
    is_name_ = addresses_.empty();
    next_lookup_ns_ = not_before_ns_ = next_line_ns_ = 0;
    retry_ns_ = kExportRetry;
    in_trouble_ = false;
    epoch_ += 1;
  }

  // True for the result of a lookup or of a probe that was started here.
  static constexpr bool is_own(std::uint64_t epoch) { return epoch >> kOwnBit == 1; }

  // When step() has something to do.
  Ns next() const {
    if (!settings_.on() || busy_) return flush_until_ns_;
    if (posted_ != nullptr) return std::min(not_before_ns_, flush_until_ns_);
    if (queue_.front() == nullptr) return kNever;
    const Ns due = is_due() || !first_seen_ns_ ? 0 : *first_seen_ns_ + kExportInterval;
    return std::min(std::max(due, not_before_ns_), flush_until_ns_);
  }

  // `done` takes the prober's results.
  template <class Done>
  void step(Ns now, Done&& done) {
    if (!settings_.on()) return drop_all();  // of requests that began while there was a collector
    if (busy_) return;
    if (posted_ == nullptr) {
      if (queue_.front() == nullptr) return first_seen_ns_.reset();
      if (!first_seen_ns_) first_seen_ns_ = now;
      if (now < not_before_ns_ || (!is_due() && now < *first_seen_ns_ + kExportInterval)) return;
      if (!make_batch(now)) return;
    }
    if (now < not_before_ns_) return;
    try {
      if (is_name_ && (addresses_.empty() || now >= next_lookup_ns_)) return look_up(now);
      send(now, done);
    } catch (const std::bad_alloc&) {
      slab_.limit_hit(Limit::memory);
      busy_ = false;
      not_before_ns_ = now + kMemoryRetry;
    }
  }

  void on_resolved(std::uint64_t epoch, const std::vector<Address>& addresses, const std::string& error, Ns now) {
    busy_ = false;
    if (epoch != epoch_) return;  // of another collector
    if (!addresses.empty()) addresses_ = addresses;
    next_lookup_ns_ = now + kResolveInterval;
    if (addresses_.empty()) try_later(now, "host name not resolved: " + error, {});
  }

  void on_result(ProbeResult&& result, Ns now) {
    busy_ = false;
    if (posted_ == nullptr) return;  // given up meanwhile
    if (!result.lack.empty() && !result.passed) return try_later(now, std::string(result.lack), {});
    const std::uint16_t status = result.status;
    if (!result.passed && !result.connected) return try_later(now, std::move(result.reason), {});
    if (!result.passed) return lose(now, SpanLoss::unanswered, std::move(result.reason));
    if (status == 429 || (status >= 502 && status <= 504)) {
      return try_later(now, "it answered " + std::to_string(status), result.retry_after_s);
    }
    if (status / 100 != 2) return lose(now, SpanLoss::refused, "it answered " + std::to_string(status));
    const std::size_t refused = refused_spans(json_, result.page, count_);
    slab_.spans_exported(count_ - refused);
    if (refused > 0) {
      slab_.spans_dropped(SpanLoss::refused, refused);
      note_trouble(now, "it has refused some of them");
    } else if (std::exchange(in_trouble_, false)) {
      log_.event(LogLevel::info, "spans are exported again", {{"collector", address_text()}});
    }
    retry_ns_ = kExportRetry;
    forget_batch();
  }

  // The process ends: what waits is sent, but for no longer than kLastExportTime.
  void flush(Ns now) {
    if (!settings_.on() || flush_until_ns_ != kNever) return;
    flush_until_ns_ = now + kLastExportTime;
    not_before_ns_ = now;  // there is no later
  }
  // After flush(): false once nothing more can be sent.
  bool is_flushing(Ns now) const {
    return now < flush_until_ns_ && flush_until_ns_ != kNever &&
           (busy_ || posted_ != nullptr || queue_.front() != nullptr);
  }

 private:
  static constexpr int kOwnBit = 62;  // of the epoch; the bit above it is FleetJoin's

  bool is_due() const { return queue_.size() >= kSpansPerExport || flush_until_ns_ != kNever; }

  // Takes spans from the queue. False if there is no memory for any.
  bool make_batch(Ns now) {
    try {
      batch_.begin(settings_, instance_);
      while (batch_.count() < kSpansPerExport && queue_.front() != nullptr) {
        batch_.add(*queue_.front());
        queue_.pop();
      }
    } catch (const std::bad_alloc&) {
      slab_.limit_hit(Limit::memory);
    }
    count_ = batch_.count();
    first_seen_ns_.reset();
    if (count_ > 0) {
      batch_.end();
      given_up_ns_ = now + kExportPatience;
      try {
        posted_ = std::make_shared<const std::string>(batch_.take_text());
      } catch (const std::bad_alloc&) {
        slab_.limit_hit(Limit::memory);
        slab_.spans_dropped(SpanLoss::unanswered, count_);
      }
    }
    batch_.clear();
    if (posted_ == nullptr) not_before_ns_ = now + kMemoryRetry;
    return posted_ != nullptr;
  }

  void look_up(Ns now) {
    busy_ = resolver_.lookup(settings_.collector.host, settings_.collector.port, epoch_);
    if (!busy_) try_later(now, "too many lookups are waiting", {});
  }

  template <class Done>
  void send(Ns now, Done&& done) {
    ProbeOrder order;
    order.epoch = epoch_;
    order.addresses = addresses_;
    order.host = settings_.collector.port == 80 ? url_host(settings_.collector.host) : address_text();
    order.base_path = settings_.base_path;
    order.page = "/v1/traces";
    order.posted = posted_;
    order.wants_models = false;
    order.max_bytes = kMaxCollectorAnswer;
    order.timeout_ns = flush_until_ns_ == kNever ? kExportTime : std::max<Ns>(flush_until_ns_ - now, kMillisecond);
    busy_ = true;  // first: the result may come at once
    prober_.start(order, now, done);
  }

  void try_later(Ns now, std::string why, std::optional<std::uint64_t> after_s) {
    const Ns asked = static_cast<Ns>(std::min<std::uint64_t>(after_s.value_or(0), kMaxExportRetry / kSecond)) * kSecond;
    if (now >= given_up_ns_) return lose(now, SpanLoss::unanswered, std::move(why));
    back_off(now, asked, why);
  }

  void lose(Ns now, SpanLoss why, std::string reason) {
    slab_.spans_dropped(why, count_);
    forget_batch();
    back_off(now, 0, reason);
  }

  // It also ends a flush: another try would take longer than there is time.
  void back_off(Ns now, Ns least, std::string_view why) {
    not_before_ns_ = now + std::max(least, retry_ns_);
    retry_ns_ = std::min(2 * retry_ns_, kMaxExportRetry);
    if (flush_until_ns_ != kNever) flush_until_ns_ = now;
    note_trouble(now, why);
  }

  void forget_batch() {
    posted_.reset();
    count_ = 0;
  }

  void note_trouble(Ns now, std::string_view why) {
    if (now < next_line_ns_) return;
    in_trouble_ = true;
    next_line_ns_ = now + kLackLogInterval;
    log_.event(LogLevel::warning, "spans are not exported", {{"collector", address_text()}, {"why", why}});
  }

  // The spans that nobody wants any more.
  void drop_all() {
    std::size_t dropped = std::exchange(count_, 0);
    for (; queue_.front() != nullptr; queue_.pop()) dropped += 1;
    slab_.spans_dropped(SpanLoss::unanswered, dropped);
    posted_.reset();
    first_seen_ns_.reset();
  }

  std::string address_text() const { return host_port(settings_.collector.host, settings_.collector.port); }

  Net& net_;
  Prober<Net>& prober_;
  typename Net::Resolver& resolver_;
  SpanQueue& queue_;
  Slab& slab_;
  Log& log_;
  JsonReader& json_;
  const std::string instance_;
  TraceSettings settings_;
  std::vector<Address> addresses_;
  std::uint64_t epoch_ = std::uint64_t{1} << kOwnBit;  // changes with the collector
  bool is_name_ = false;                               // the collector's host is to be looked up
  Ns next_lookup_ns_ = 0;
  SpanBatch batch_;
  std::shared_ptr<const std::string> posted_;  // the batch that is sent, or will be; null: none
  std::size_t count_ = 0;                      // of its spans
  Ns given_up_ns_ = 0;                         // when it is tried no more
  bool busy_ = false;                          // a lookup or a request is on its way
  std::optional<Ns> first_seen_ns_;            // when the oldest span in the queue was
  Ns not_before_ns_ = 0;
  Ns retry_ns_ = kExportRetry;  // the next pause after a failure
  Ns flush_until_ns_ = kNever;
  bool in_trouble_ = false;  // a line has told of a failure, and none yet of its end
  Ns next_line_ns_ = 0;
};

}  // namespace nexus
