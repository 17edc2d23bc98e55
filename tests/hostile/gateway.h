// gateway.h
// Owns:     a whole Worker on a network in memory, with one backend whose answers a test writes; what each side saw.
// Promises: the same input gives the same story; every byte that left is there to be read by rfc9112.h.
// Leaves:   the Worker itself to gateway.cpp, so that it is compiled once; what should have happened to the tables and
//           the fuzz targets.
// Threads:  one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/metrics/slab.h"
#include "tests/hostile/script_net.h"
#include "tests/rfc9112.h"

namespace hostile {

struct GatewayOptions {
  bool keys = false;  // clients need `Authorization: Bearer secret`
  std::size_t max_body_bytes = 64u << 10;
  bool ask_usage = false;
  std::string page = "nexus_up 1\n";  // what is shown at /metrics
};

// What a backend does with the bytes of a request that came whole.
struct BackendPlan {
  std::vector<std::string> pieces;  // of its answer, each sent when Nexus has dealt with the one before
  bool fin = false;                 // closes behind them
  bool reset = false;               // breaks off behind them
};

inline const std::string kGoodBody =
    R"({"id":"x","choices":[{"index":0}],"usage":{"prompt_tokens":3,"completion_tokens":4}})";

inline std::string good_answer() {
  return "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " + std::to_string(kGoodBody.size()) +
         "\r\n\r\n" + kGoodBody;
}

class Gateway {
 public:
  explicit Gateway(const GatewayOptions& options = {});
  ~Gateway();

  Link& connect();
  void send(Link& client, std::string_view bytes);
  void turn();    // the worker's next one
  void settle();  // turns until nothing more happens; the backend answers what is whole
  void reload_unnoticed(const GatewayOptions& options);  // what the worker goes by has changed, and nobody woke it
  void pass(Ns span);                                    // lets time pass until the far end's patience is at its end

  std::vector<rfc9112::Reading> backend_saw() const;  // all that was written to the backend, one reading a connection
  std::size_t backend_links() const;

  std::uint64_t counted_attempts() const;  // over all outcomes
  const nexus::Slab& slab() const;
  std::size_t client_sessions() const;

  mutable ScriptNet net;
  std::function<BackendPlan(const rfc9112::Message&)> answer;

 private:
  struct Nexus;
  struct Speech;

  void run();
  bool backend_step();
  Speech& speech_of(const Link& link);

  std::vector<Speech> speeches_;
  std::unique_ptr<Nexus> nexus_;
};

}  // namespace hostile
