// fairness.h
// Owns:     the check of the fair queue's bound: while the requests of two keys wait, what the keys were served,
// divided by
//           their weights, differs by at most 2 × the largest request × the places.
// Promises: judges by what the clients sent, when the servers got it, and by the tokens of the log lines.
// Leaves:   the order of the requests of one key to policy.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "ledger.h"
#include "nexus/config/settings.h"

namespace nexus::sim {

class Fairness {
 public:
  // The requests of the first two keys of `settings`, each of which came to a server once. Returns how many of them
  // began while others of both keys waited.
  static std::size_t check(Ledger& ledger, const Settings& settings, Ns latency_ns) {
    const auto& keys = settings.server.api_keys;
    std::vector<Event> events;
    double largest = 0;
    for (const Request& request : ledger.requests) {
      const auto key = static_cast<std::size_t>(
          std::find_if(keys.begin(), keys.end(), [&](const ApiKey& one) { return one.name == request.key; }) -
          keys.begin());
      if (key >= kKeys || request.attempts.size() != 1 || request.asked_at < 0) continue;
      const double cost = cost_of(request) / static_cast<double>(keys[key].options.weight);
      largest = std::max(largest, cost);
      events.push_back({request.asked_at + latency_ns, key, 0});
      events.push_back({request.attempts.front().sent_at, key, cost});
    }
    std::stable_sort(events.begin(), events.end(), [](const Event& a, const Event& b) { return a.at < b.at; });
    const double bound = 2 * largest * settings.backends.front().max_pending;
    return sweep(ledger, events, bound);
  }

 private:
  static constexpr std::size_t kKeys = 2;
  struct Event {
    Ns at;
    std::size_t key;
    double cost;  // 0: the request has come; else it is served
  };

  static double cost_of(const Request& request) {
    const bool told = request.line_prompt_tokens >= 0;
    const auto prompt = static_cast<double>(request.line_prompt_tokens);
    const auto completion = static_cast<double>(std::max<std::int64_t>(request.line_completion_tokens, 0));
    constexpr double kBytesAToken = 4;
    return told ? prompt + 2 * completion : static_cast<double>(request.sent_body.size()) / kBytesAToken;
  }

  static std::size_t sweep(Ledger& ledger, const std::vector<Event>& events, double bound) {
    std::array<std::int64_t, kKeys> waiting{};
    double ahead = 0, least = 0, most = 0;  // of the first key, since both wait
    std::size_t contended = 0;
    for (const Event& event : events) {
      const bool both = waiting[0] > 0 && waiting[1] > 0;
      waiting[event.key] += event.cost > 0 ? -1 : 1;
      if (!both) {
        ahead = least = most = 0;
      } else if (event.cost > 0) {
        contended += 1;
        ahead += event.key == 0 ? event.cost : -event.cost;
        least = std::min(least, ahead);
        most = std::max(most, ahead);
      }
      if (most - least <= bound) continue;
      ledger.wrong("one of two keys that wait is %.0f tokens ahead of the other, %.0f are allowed", most - least,
                   bound);
    }
    return contended;
  }
};

}  // namespace nexus::sim
