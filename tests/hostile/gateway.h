// gateway.h
// Owns:     a whole gateway (lib/gateway.h, one worker) on a scripted network (lib/script.h), with backends whose
//           responses the test writes; what each side saw.
// Promises: the same input gives the same story. Nothing is left in transit when send(), connect() or settle() returns.
// Leaves:   what must hold of the story to story.h; which responses a request deserves to the tables and fuzz targets.
//           The gateway's code is in gateway.cpp, so that it is compiled once.
// Threads:  one.
// Tested by: tests/worker_test.cpp
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/config/settings.h"
#include "nexus/metrics/slab.h"
#include "tests/lib/rfc9112.h"
#include "tests/lib/script.h"

namespace hostile {

using nexus::Ns;
using nexus::sim::Peer;

struct GatewayOptions {
  bool tls = false;   // clients and backends speak TLS
  bool keys = false;  // clients need `Authorization: Bearer secret`
  std::size_t max_body_bytes = 64u << 10;
  bool ask_usage = false;
  std::size_t backends = 1;                                              // all at the same address, with the same model
  std::function<void(nexus::Settings&)> edit = [](nexus::Settings&) {};  // after all the above
};

// How a backend answers one request, once the request is complete.
struct BackendPlan {
  std::vector<std::string> pieces;  // of the response; each is sent when Nexus has handled the one before
  bool fin = false;                 // closes after them
  bool reset = false;               // resets after them
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

  Peer& connect();
  void send(Peer& client, std::string_view bytes);
  void turn();         // one turn of each loop that has something to do
  void settle();       // turns until nothing more happens; the backends answer the requests that are complete
  void pass(Ns span);  // lets time pass
  void drain();        // as on SIGTERM
  void reload(const GatewayOptions& options);
  void reload_unnoticed(const GatewayOptions& options);  // the worker gets new settings, but is not woken

  std::vector<rfc9112::Reading> backend_saw() const;  // what was written to the backends, one reading per connection
  std::size_t backend_links() const;                  // ever made
  std::size_t open_backend_links() const;             // that Nexus has not closed

  std::uint64_t counted_attempts() const;  // over all outcomes
  const nexus::Slab& slab() const;         // the worker's
  std::size_t client_sessions() const;
  std::size_t unsent_page_bytes() const;
  std::uint64_t limit_hits(nexus::Limit limit) const;  // of all threads
  std::size_t kept_places() const;                     // backends and keys of which admission.h keeps something
  // Lists each thing that is not given back though no request is under way; empty while one is. The destructor ends the
  // process if there is anything.
  std::string left_over() const;

  nexus::sim::Script net;
  std::function<BackendPlan(const rfc9112::Message&)> answer;
  bool control_sleeps = false;  // its loop gets no turn

 private:
  struct Nexus;
  // A backend's progress with the requests of one connection.
  struct Speech {
    bool speaking = false;
    BackendPlan plan;
    std::size_t next_piece = 0;
    std::size_t looked_at = 0;  // bytes received when it last looked for a request
    std::size_t answered = 0;   // requests
  };

  bool is_due(std::uint32_t loop) const;
  bool backend_step();

  std::vector<Speech> speeches_;  // one for each of net.peers
  std::unique_ptr<Nexus> nexus_;
};

}  // namespace hostile
