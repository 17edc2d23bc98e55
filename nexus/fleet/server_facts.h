// server_facts.h
// Owns:     facts that requests have shown about the server at a backend's address.
// Promises: a fact is noted once; it lasts until the backend gets another address or becomes healthy again.
// Leaves:   finding them to proxy/exchange.h.
// Threads:  any; relaxed, because only the fact is shared.
// Tested by: tests/e2e/usage.test.mjs
#pragma once

#include <atomic>

namespace nexus {

class ServerFacts {
 public:
  // It refuses requests with stream_options.
  bool refuses_stream_options() const { return refuses_stream_options_.load(std::memory_order_relaxed); }
  // True for the first call.
  bool note_refusal() { return !refuses_stream_options_.exchange(true, std::memory_order_relaxed); }
  void forget() { refuses_stream_options_.store(false, std::memory_order_relaxed); }

 private:
  std::atomic<bool> refuses_stream_options_{false};
};

}  // namespace nexus
