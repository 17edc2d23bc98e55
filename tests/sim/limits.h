// limits.h
// Owns:     the check of each request by a configuration that was never changed: its limits, and the keys of affinity.
// Promises: judges by what the client sent, what it got and when, and by the log.
// Leaves:   runs with reloads, in which several configurations were in force, to the other checks.
// Threads:  one.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <tuple>

#include "ledger.h"
#include "nexus/config/settings.h"

namespace nexus::sim {

class Limits {
 public:
  // `slack_ns`: how late Nexus may act on a deadline.
  Limits(Ledger& ledger, const Settings& settings, Ns slack_ns)
      : ledger_(ledger), settings_(settings), slack_ns_(slack_ns) {}

  void check() {
    for (std::size_t i = 0; i < ledger_.requests.size(); ++i) {
      const Request& request = ledger_.requests[i];
      const unsigned n = static_cast<unsigned>(i);
      check_head(request, n);
      if (request.kind != Request::Kind::completion || request.lines != 1 || request.client_left) continue;
      check_body(request, n);
      check_time(request, n);
    }
    if (settings_.routing.affinity == Affinity::prefix) check_talks();
  }

 private:
  void check_head(const Request& request, unsigned n) {
    const std::size_t most = settings_.server.max_header_bytes;
    const bool too_large = request.head_bytes > most;
    if (too_large ? request.lines == 0 : request.status != 431) return;
    ledger_.wrong("r%u: %u for a head of %zu bytes, max_header is %zu", n, request.status, request.head_bytes, most);
  }

  void check_body(const Request& request, unsigned n) {
    const std::size_t most = settings_.server.max_body_bytes;
    const bool too_large = request.sent_body.size() > most;
    if (!(too_large ? request.attempt >= 0 || !request.attempts.empty() : request.status == 413)) return;
    ledger_.wrong("r%u: %u for a body of %zu bytes, max_body is %zu", n, request.status, request.sent_body.size(),
                  most);
  }

  void check_time(const Request& request, unsigned n) {
    const Ns most = settings_.upstream.request_timeout_ns;
    // Others wait for a place, or for one before them, and some for a late turn after each read that finds nothing.
    const bool at_once = request.kept && !request.pipelined && ledger_.reads_all;
    const Ns took = request.answered_at - request.asked_at;
    if (most == 0 || !at_once || request.asked_at < 0 || took <= most + 2 * slack_ns_ || ledger_.memory_faults) return;
    ledger_.wrong("r%u: answered after %lld ms, request_timeout is %lld ms", n,
                  static_cast<long long>(took / kMillisecond), static_cast<long long>(most / kMillisecond));
  }

  // The turns of a conversation have the same key.
  void check_talks() {
    using Talk = std::tuple<std::int32_t, const ApiRow*, std::string_view, std::string_view>;
    std::map<Talk, std::string_view> seen;
    for (const Request& request : ledger_.requests) {
      const std::string_view key = request.line_affinity;
      if (request.talk < 0 || request.lines != 1 || key == "-") continue;
      const auto [at, first] = seen.try_emplace({request.talk, request.api, request.line_key, request.body.model}, key);
      if (!first && at->second != key) ledger_.wrong("two turns of a conversation have different keys for affinity");
    }
  }

  Ledger& ledger_;
  const Settings& settings_;
  const Ns slack_ns_;
};

}  // namespace nexus::sim
