// The Worker behind gateway.h and what it needs, put together as daemon.h does.
#include "tests/hostile/gateway.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "nexus/server/worker.h"

namespace hostile {

namespace {

using Work = nexus::Worker<ScriptNet>;

std::shared_ptr<const nexus::Settings> settings_of(const GatewayOptions& options) {
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
  return settings;
}

}  // namespace

struct Gateway::Nexus {
  Nexus(ScriptNet& net, const GatewayOptions& options)
      : admission([](std::uint32_t, Handle) {}),
        budget(64u << 20),
        shared{metrics, breaker, admission, budget, in_flight, "nexus-00c0ffee"},
        slab(metrics.add_slab()),
        page_text(options.page) {
    const auto snapshot = configure(options);
    backend_id = snapshot->backends[0].id;
    peers.placement.loads = std::vector<nexus::WorkerLoad>(1);
    peers.ask_page = [this](std::uint32_t, Handle session, nexus::PageKind kind) {
      auto page = std::make_shared<nexus::TextBuffer>();
      page->add(page_text);
      worker->post(Work::RenderedPage{session, std::move(page), kind});
      return true;
    };
    worker = std::make_unique<Work>(net, shared, slab, nexus::Log(), 0, 7, snapshot, peers, net.now());
    peers.workers.push_back(worker.get());
  }

  std::shared_ptr<nexus::Snapshot> configure(const GatewayOptions& options) {
    registry.configure(settings_of(options));
    auto snapshot = registry.snapshot();
    snapshot->models_page = nexus::render_models(*snapshot);
    return snapshot;
  }

  nexus::Metrics metrics;
  nexus::CircuitBreaker breaker;
  nexus::Admission admission;
  nexus::BodyBudget budget;
  std::atomic<std::uint32_t> in_flight{0};
  nexus::Shared shared;
  nexus::Slab& slab;
  Work::Peers peers;
  nexus::Registry registry;
  nexus::BackendId backend_id{};
  std::string page_text;
  std::unique_ptr<Work> worker;
};

// Where the backend is with the answers of one connection.
struct Gateway::Speech {
  bool speaking = false;
  BackendPlan plan;
  std::size_t next_piece = 0;
  std::size_t read_bytes = 0;
};

Gateway::Gateway(const GatewayOptions& options)
    : answer([](const rfc9112::Message&) {
        return BackendPlan{{good_answer()}, false, false};
      }),
      nexus_(std::make_unique<Nexus>(net, options)) {}

Gateway::~Gateway() = default;

Link& Gateway::connect() {
  Link& link = net.open_client();
  nexus_->worker->post(Work::Adopt{ScriptNet::Socket{link.id}, nexus::Address{{127, 0, 0, 1}, 40000, false}, false});
  settle();
  return link;
}

void Gateway::send(Link& client, std::string_view bytes) {
  net.send(client, bytes);
  settle();
}

void Gateway::turn() { nexus_->worker->turn(); }

void Gateway::settle() {
  for (int rounds = 0;; ++rounds) {
    run();
    if (!backend_step()) return;
    if (rounds == 100'000) throw std::logic_error("the story has no end");
  }
}

void Gateway::reload_unnoticed(const GatewayOptions& options) {
  auto snapshot = std::make_unique<nexus::LocalSnapshot>(nexus::LocalSnapshot{nexus_->configure(options), 0});
  nexus_->worker->put(Work::NewSnapshot{std::move(snapshot)});
}

void Gateway::pass(Ns span) {
  for (Ns gone = 0; gone < span; gone += nexus::kSecond) {
    net.move_clock(nexus::kSecond);
    settle();
  }
}

std::vector<rfc9112::Reading> Gateway::backend_saw() const {
  std::vector<rfc9112::Reading> out;
  for (const Link& link : net.links()) {
    if (link.to_backend) out.push_back(rfc9112::read_requests(link.outgoing));
  }
  return out;
}

std::size_t Gateway::backend_links() const {
  return static_cast<std::size_t>(
      std::count_if(net.links().begin(), net.links().end(), [](const Link& link) { return link.to_backend; }));
}

std::uint64_t Gateway::counted_attempts() const {
  const nexus::BackendCounters* cells = nexus_->slab.backend(nexus_->backend_id);
  std::uint64_t sum = 0;
  if (cells != nullptr) {
    for (const nexus::Counter& cell : cells->attempts) sum += cell.read();
  }
  return sum;
}

const nexus::Slab& Gateway::slab() const { return nexus_->slab; }
std::size_t Gateway::client_sessions() const { return nexus_->worker->connections(); }

// Until the worker has nothing to do.
void Gateway::run() {
  for (int rounds = 0; rounds < 100'000; ++rounds) {
    const std::uint64_t before = net.calls();
    nexus_->worker->turn();
    if (net.quiet() && net.calls() == before) return;
  }
  throw std::logic_error("the worker does not come to rest");
}

// One piece of one answer. False where the backend has nothing more to say.
bool Gateway::backend_step() {
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

Gateway::Speech& Gateway::speech_of(const Link& link) {
  if (speeches_.size() <= link.id) speeches_.resize(link.id + 1);
  return speeches_[link.id];
}

}  // namespace hostile
