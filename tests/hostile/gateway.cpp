#include "tests/hostile/gateway.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>

#include "tests/lib/at_rest.h"
#include "tests/lib/gateway.h"

namespace hostile {

namespace {

constexpr int kMostRounds = 100'000;  // more means that something spins

std::shared_ptr<const nexus::Settings> settings_of(const GatewayOptions& options) {
  auto settings = std::make_shared<nexus::Settings>();
  settings->server.max_body_bytes = options.max_body_bytes;
  settings->server.body_memory_bytes = 64u << 20;
  settings->upstream.first_byte_timeout_ns = settings->upstream.stall_timeout_ns = 5 * nexus::kSecond;
  settings->health.enabled = false;
  settings->health.eject_after = 1'000'000;
  if (options.keys) settings->server.api_keys = {{"client", "secret"}};
  nexus::BackendSettings backend;
  backend.kind = options.ask_usage ? nexus::BackendKind::vllm : nexus::BackendKind::generic;
  backend.address = {"10.0.0.1", 8001};
  backend.models = {"m"};
  if (options.tls) {
    settings->server.tls = nexus::sim::tls_world().server;
    backend.tls.on = true;
    backend.tls.context = nexus::sim::tls_world().client;
  }
  for (std::size_t i = 1; i <= options.backends; ++i) {
    backend.name = "b" + std::to_string(i);
    settings->backends.push_back(backend);
  }
  options.edit(*settings);
  return settings;
}

nexus::sim::Wire& prepared(nexus::sim::Wire& wire, const GatewayOptions& options) {
  if (options.tls) wire.tls_clients = wire.tls_backends = &nexus::sim::tls_world();
  return wire;
}

}  // namespace

struct Gateway::Nexus {
  Nexus(nexus::sim::Wire& wire, const GatewayOptions& options)
      : gateway(prepared(wire, options), settings_of(options), 1, 7) {
    wire.on_ready = [this](std::uint32_t loop, nexus::sim::LinkId link) { gateway.net(loop).make_ready(link); };
  }
  nexus::sim::Gateway gateway;
};

Gateway::Gateway(const GatewayOptions& options)
    : answer([](const rfc9112::Message&) {
        return BackendPlan{{good_answer()}, false, false};
      }),
      nexus_(std::make_unique<Nexus>(net.wire, options)) {}

Gateway::~Gateway() {
  const std::string left = left_over();
  if (left.empty() || std::uncaught_exceptions() > 0) return;
  std::fprintf(stderr, "hostile gateway: %s\n", left.c_str());
  std::abort();
}

Peer& Gateway::connect() {
  Peer& peer = net.connect_client();
  settle();
  return peer;
}

void Gateway::send(Peer& client, std::string_view bytes) {
  net.send(client, bytes);
  settle();
}

void Gateway::turn() {
  net.deliver();
  for (std::uint32_t loop = 0; loop < nexus_->gateway.loops(); ++loop) {
    if (is_due(loop)) nexus_->gateway.turn(loop);
  }
  net.deliver();
}

void Gateway::settle() {
  for (int rounds = 0; rounds < kMostRounds; ++rounds) {
    net.deliver();
    if (is_due(0) || is_due(1)) {
      turn();
    } else if (!backend_step()) {
      return;
    }
  }
  throw std::logic_error("the gateway does not come to rest");
}

void Gateway::pass(Ns span) {
  for (const Ns until = net.wire.now() + span; net.wire.now() < until;) {
    net.wire.advance(std::min(until, net.wire.now() + nexus::kSecond));
    settle();
  }
}

void Gateway::reload(const GatewayOptions& options) {
  nexus_->gateway.reload(settings_of(options));
  settle();
}

void Gateway::drain() {
  nexus_->gateway.drain();
  settle();
}

void Gateway::reload_unnoticed(const GatewayOptions& options) {
  nexus_->gateway.reload_unnoticed(0, settings_of(options));
}

std::vector<rfc9112::Reading> Gateway::backend_saw() const {
  std::vector<rfc9112::Reading> out;
  for (const Peer& peer : net.peers) {
    if (peer.to_backend) out.push_back(rfc9112::read_requests(peer.received));
  }
  return out;
}

std::size_t Gateway::backend_links() const {
  return static_cast<std::size_t>(
      std::count_if(net.peers.begin(), net.peers.end(), [](const Peer& peer) { return peer.to_backend; }));
}

std::size_t Gateway::open_backend_links() const { return nexus_->gateway.each_worker()[0]->sessions().pool().open(); }

std::size_t Gateway::unsent_page_bytes() const { return nexus_->gateway.control().unsent_page_bytes(); }

std::uint64_t Gateway::counted_attempts() const {
  std::uint64_t sum = 0;
  if (const nexus::BackendCounters* cells = slab().backend(nexus_->gateway.control().registry().backends()[0].id)) {
    for (const nexus::Counter& cell : cells->attempts) sum += cell.read();
  }
  return sum;
}

const nexus::Slab& Gateway::slab() const { return *nexus_->gateway.metrics().slabs().back(); }
std::size_t Gateway::client_sessions() const { return nexus_->gateway.each_worker()[0]->sessions().live(); }

std::uint64_t Gateway::limit_hits(nexus::Limit limit) const {
  std::uint64_t sum = 0;
  for (const auto& slab : nexus_->gateway.metrics().slabs()) {
    sum += slab->thread().limits[static_cast<std::size_t>(limit)].read();
  }
  return sum;
}

std::size_t Gateway::kept_places() const { return nexus_->gateway.admission().kept(); }

std::string Gateway::left_over() const {
  return nexus::sim::is_at_rest(nexus_->gateway) ? nexus::sim::left_over(nexus_->gateway) : std::string();
}

// The worker's loop is 0, control's is 1.
bool Gateway::is_due(std::uint32_t loop) const {
  return !(control_sleeps && loop == 1) && nexus_->gateway.due_at(loop) <= net.wire.now();
}

// Sends one piece of one response. False if no backend has anything to say.
bool Gateway::backend_step() {
  speeches_.resize(net.peers.size());
  for (std::size_t i = 0; i < net.peers.size(); ++i) {
    Peer& peer = net.peers[i];
    Speech& speech = speeches_[i];
    if (!peer.to_backend || peer.ended || peer.finished) continue;
    if (!speech.speaking) {
      if (peer.received.size() == speech.looked_at) continue;
      speech.looked_at = peer.received.size();
      const rfc9112::Reading seen = rfc9112::read_requests(peer.received);
      if (!seen.problem.empty() || seen.messages.size() == speech.answered) continue;
      speech = {true, answer(seen.messages[speech.answered]), 0, speech.looked_at, speech.answered + 1};
    }
    if (speech.next_piece < speech.plan.pieces.size()) {
      net.send(peer, speech.plan.pieces[speech.next_piece++]);
    } else {
      speech.speaking = false;
      speech.looked_at = 0;  // the next request may have arrived already
      if (speech.plan.fin) net.finish(peer);
      if (speech.plan.reset) net.break_off(peer);
    }
    return true;
  }
  return false;
}

}  // namespace hostile
