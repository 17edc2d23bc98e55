// gateway.h
// Owns:     a whole Worker on a network in memory, with one backend whose answers a test writes; what each side saw.
// Promises: the same input gives the same story; every byte that left is there to be read by rfc9112.h.
// Leaves:   what should have happened to the tables and the fuzz targets.
// Threads:  one.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/server.h"
#include "tests/hostile/script_net.h"
#include "tests/rfc9112.h"

namespace hostile {

struct GatewayOptions {
  bool keys = false;  // clients need `Authorization: Bearer secret`
  std::size_t max_body_bytes = 64u << 10;
  bool ask_usage = false;
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
  explicit Gateway(const GatewayOptions& options = {})
      : admission_([](std::uint32_t, Token) {}),
        budget_(64u << 20),
        shared_{metrics_, ejector_, admission_, budget_, in_flight_, "nexus-00c0ffee"},
        slab_(metrics_.add_slab()) {
    peers_.placement.loads = std::vector<nexus::WorkerLoad>(1);
    peers_.ask_page = [this](std::uint32_t, Token session, nexus::PageKind kind) {
      worker_->post(Work::Page{session, std::make_shared<const std::string>("nexus_up 1\n"), kind});
    };
    worker_ = std::make_unique<Work>(net, shared_, slab_, nexus::Log(), 0, 7, snapshot_of(options), peers_, net.now());
    peers_.workers.push_back(worker_.get());
    answer = [](const rfc9112::Message&) { return BackendPlan{{good_answer()}, false, false}; };
  }

  Link& connect() {
    Link& link = net.open_client();
    worker_->post(Work::Adopt{ScriptNet::Socket{link.id}, nexus::Address{{127, 0, 0, 1}, 40000, false}, false});
    settle();
    return link;
  }

  void send(Link& client, std::string_view bytes) {
    net.send(client, bytes);
    settle();
  }

  // Turns until nothing more happens; the backend answers what is whole.
  void settle() {
    for (int rounds = 0;; ++rounds) {
      run();
      if (!backend_step()) return;
      if (rounds == 100'000) throw std::logic_error("the story has no end");
    }
  }

  // Lets time pass until the far end's patience is at its end.
  void pass(Ns span) {
    for (Ns gone = 0; gone < span; gone += nexus::kSecond) {
      net.move_clock(nexus::kSecond);
      settle();
    }
  }

  // All that was written to the backend, one reading a connection.
  std::vector<rfc9112::Reading> backend_saw() const {
    std::vector<rfc9112::Reading> out;
    for (const Link& link : net.links()) {
      if (link.to_backend) out.push_back(rfc9112::read_requests(link.outgoing));
    }
    return out;
  }
  std::size_t backend_bytes() const {
    std::size_t bytes = 0;
    for (const Link& link : net.links()) bytes += link.to_backend ? link.outgoing.size() : 0;
    return bytes;
  }
  std::size_t backend_links() const {
    return static_cast<std::size_t>(
        std::count_if(net.links().begin(), net.links().end(), [](const Link& link) { return link.to_backend; }));
  }

  // Attempts that Nexus counted, over all outcomes.
  std::uint64_t counted_attempts() const {
    const nexus::BackendCells* cells = slab_.backend(backend_id_);
    std::uint64_t sum = 0;
    if (cells != nullptr) {
      for (const nexus::Cell& cell : cells->attempts) sum += cell.read();
    }
    return sum;
  }
  const nexus::Slab& slab() const { return slab_; }
  nexus::BackendId backend_id() const { return backend_id_; }
  std::size_t client_sessions() const { return worker_->connections(); }
  std::size_t taken_bytes() const { return worker_->taken_bytes(); }

  mutable ScriptNet net;
  std::function<BackendPlan(const rfc9112::Message&)> answer;

 private:
  using Work = nexus::Worker<ScriptNet>;

  nexus::SnapshotPtr snapshot_of(const GatewayOptions& options) {
    auto settings = std::make_shared<nexus::Settings>();
    settings->server.max_body_bytes = options.max_body_bytes;
    settings->upstream.first_byte_timeout_ns = settings->upstream.stall_timeout_ns = 5 * nexus::kSecond;
    settings->health.enabled = false;
    settings->health.eject_after = 1'000'000;
    if (options.keys) settings->server.api_keys = {{"client", "secret"}};
    nexus::BackendSettings backend;
    backend.name = "b1";
    backend.kind = options.ask_usage ? nexus::BackendKind::vllm : nexus::BackendKind::generic;
    backend.address = {"10.0.0.1", 8001};
    backend.models = {"m"};
    settings->backends = {backend};
    registry_.configure(settings);
    auto snapshot = registry_.snapshot();
    snapshot->models_page = nexus::render_models(*snapshot);
    backend_id_ = snapshot->backends[0].id;
    return snapshot;
  }

  void run() {
    for (int rounds = 0; rounds < 100'000; ++rounds) {
      const std::uint64_t before = net.calls();
      worker_->turn();
      if (net.quiet() && net.calls() == before) return;
    }
    throw std::logic_error("the worker does not come to rest");
  }

  // One piece of one answer. False where the backend has nothing more to say.
  bool backend_step() {
    for (Link& link : net.links()) {
      if (!link.to_backend || link.closed || link.fin || link.broken) continue;
      Speech& speech = speech_of(link);
      if (!speech.speaking) {
        if (link.outgoing.size() == speech.read_bytes) continue;
        speech.read_bytes = link.outgoing.size();
        const rfc9112::Reading seen = rfc9112::read_requests(link.outgoing);
        if (!seen.problem.empty() || seen.messages.size() == link.answered) continue;
        speech.plan = answer(seen.messages[link.answered]);
        speech.speaking = true;
        speech.next_piece = 0;
        link.answered += 1;
      }
      if (speech.next_piece < speech.plan.pieces.size()) {
        net.send(link, speech.plan.pieces[speech.next_piece++]);
      } else {
        speech.speaking = false;
        speech.read_bytes = 0;  // a next request may have come meanwhile
        if (speech.plan.fin) net.finish(link);
        if (speech.plan.reset) net.break_off(link);
      }
      return true;
    }
    return false;
  }

  struct Speech {
    bool speaking = false;
    BackendPlan plan;
    std::size_t next_piece = 0;
    std::size_t read_bytes = 0;
  };
  Speech& speech_of(const Link& link) {
    if (speeches_.size() <= link.id) speeches_.resize(link.id + 1);
    return speeches_[link.id];
  }

  nexus::Metrics metrics_;
  nexus::Ejector ejector_;
  nexus::Admission admission_;
  nexus::BodyBudget budget_;
  std::atomic<std::uint32_t> in_flight_{0};
  nexus::Shared shared_;
  nexus::Slab& slab_;
  Work::Peers peers_;
  nexus::Registry registry_;
  nexus::BackendId backend_id_{};
  std::vector<Speech> speeches_;
  std::unique_ptr<Work> worker_;
};

}  // namespace hostile
