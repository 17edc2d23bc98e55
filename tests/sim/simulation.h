// simulation.h
// Owns:     one run: the order of the loops' turns and the network's events, the schedule of reloads and drains, and
//           the phases: a storm with faults, a calm in which everything must come to rest, the end.
// Promises: a seed always gives the same run; time advances only when nothing is left to do.
// Leaves:   the checks to audit.h and ledger.h.
// Threads:  one.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "audit.h"
#include "blame.h"
#include "circuits.h"
#include "clients.h"
#include "fairness.h"
#include "fleet.h"
#include "freshness.h"
#include "kinds.h"
#include "limits.h"
#include "names.h"
#include "policy.h"
#include "reloads.h"
#include "scrape.h"
#include "swarm.h"
#include "tests/lib/faults.h"
#include "tests/lib/gateway.h"
#include "upkeep.h"

namespace nexus::sim {

struct Outcome {
  std::string wrong;  // the first violation, or empty
  std::uint64_t trace = 0;
  std::uint64_t requests = 0;  // that clients made
  std::uint64_t answers = 0;   // that arrived complete
  std::uint64_t arrivals = 0;  // of requests at backends
  std::uint64_t unasked = 0;   // times that a backend sent bytes on an idle connection
  std::uint64_t turns = 0;
  std::uint64_t lookups = 0, moves = 0;  // of hosts
  Ns simulated_ns = 0;
  Happened happened;
  ReloadCoverage reloads;
  std::uint32_t kinds = 0;  // a bit for each of kKinds that occurred
};

class Simulation {
 public:
  Simulation(std::uint64_t seed, Canary canary, LogRings& rings, Scale scale = Scale::whole)
      : dice_(seed),
        swarm_(make_swarm(scale)),
        settings_maker_(dice_),
        wire_(seed ^ 0x5eed,
              [this](const Address& address) {
                if (address.port == kCollectorPort) return ConnectFate{ConnectFate::Kind::refused_at_once, 0, {}};
                const ConnectFate fate = fleet_.fate_of(address, swarm_.draw_shape(dice_));
                freshness_.on_connect(address, fate.backend);
                if (fate.kind == ConnectFate::Kind::refused_at_once) blame_.on_refused_at_once(fate.backend);
                if (in_control_) blame_.on_check(fate.backend);
                return fate;
              }),
        scale_(scale),
        ledger_(wire_),
        freshness_(ledger_, wire_),
        names_(ledger_, wire_, dice_, swarm_.manners, slack()),
        fleet_(wire_, ledger_, dice_, swarm_.manners),
        clients_(wire_, ledger_, dice_, swarm_),
        blame_(ledger_, wire_, fleet_, names_, gateway_, circuits_, slack()),
        policy_(ledger_, wire_, freshness_, gateway_, circuits_),
        upkeep_(ledger_, wire_, fleet_, gateway_, circuits_, slack()),
        settings_(first_settings(seed, canary)),
        gateway_(wire_, settings_, swarm_.workers, seed, &rings, canary),
        audit_(ledger_, gateway_, wire_),
        rings_(rings),
        not_before_(gateway_.loops()) {
    wire_.on_ready = [this](std::uint32_t loop, LinkId link) { gateway_.net(loop).make_ready(link); };
    wire_.on_broken = [this](LinkId link) {
      if (wire_.at(link).to_backend) return;
      clients_.on_broken(wire_.at(link).peer);
      broken_ = link;
      broken_life_ = wire_.at(link).generation;
    };
    wire_.on_backend_read = [this](LinkId link) { blame_.on_read(link); };
    wire_.on_backend_close = [this](LinkId link) { blame_.on_close(link); };
    fleet_.on_request = [this](LinkId id, std::size_t number, const rfc9112::Message& head, const Arrived& arrived,
                               bool first, const Flow::Mark& sent) {
      const Link& link = wire_.at(id);
      const Request& request = ledger_.requests[number];
      freshness_.on_request(link, address_of_server(link.peer), head, request, arrived, first, sent.at, slack());
      policy_.on_request(link, number, arrived.model, first, sent);
    };
    clients_.limits(settings_->server);
    blame_.note(*settings_);
    policy_.note(*settings_);
    end_turn(gateway_.workers());  // the first checks have begun
    wire_.weather = swarm_.weather;
    wire_.most_descriptors = swarm_.most_descriptors;
    audit_.note_caps(*settings_);
    ledger_.memory_faults = swarm_.memory_fails || faults().failing_allocation > 0;
    ledger_.long_ids = scale_ == Scale::whole && !ledger_.memory_faults;
    ledger_.gentle = swarm_.gentle;
    ledger_.reads_all = swarm_.weather.eagain_read.never();
    ledger_.way_ns = swarm_.latency_ns + swarm_.jitter_ns + swarm_.most_pieces * swarm_.gap_ns;
    ledger_.takes_all = swarm_.weather.accept_fails.never() && swarm_.weather.watch_fails.never() &&
                        swarm_.most_descriptors == SIZE_MAX && swarm_.reloads == 0 &&
                        settings_->server.max_connections > swarm_.clients;
  }

  // One seed in twenty speaks TLS: to clients, to backends, or to both. One in ten makes spans.
  std::shared_ptr<const Settings> first_settings(std::uint64_t seed, Canary canary) {
    if (scale_ == Scale::crowd) return settings_maker_.crowd();
    if (scale_ != Scale::whole) return settings_maker_.small();
    if (seed % 20 == 0 && canary == Canary::none) {
      const std::uint64_t third = seed / 20 % 3;
      const TlsWorld& world = tls_world();
      CountedRandomness::restart(seed);
      wire_.tls_clients = third != 0 ? &world : nullptr;
      wire_.tls_backends = third != 1 ? &world : nullptr;
      settings_maker_.speak_tls(wire_.tls_clients, wire_.tls_backends);
    }
    if (seed % 10 == 3 && canary == Canary::none) settings_maker_.make_spans();
    return settings_maker_.first(swarm_.gentle);
  }

  // Describes the run in words.
  void tell(std::FILE* to) { wire_.story = to; }

  Outcome run() {
    const Ns began = wire_.now();
    for (LogRing& ring : rings_) Audit::empty(ring);
    clients_.start();
    write_script();
    storm();
    if (ledger_.ok()) calm();
    if (ledger_.ok()) end();
    Outcome outcome;
    outcome.wrong = ledger_.first_wrong();
    outcome.trace = wire_.trace();
    outcome.requests = ledger_.requests.size();
    outcome.answers = ledger_.answers;
    outcome.arrivals = fleet_.arrivals();
    outcome.unasked = fleet_.unasked();
    outcome.turns = turns_;
    outcome.lookups = names_.lookups();
    outcome.moves = names_.moves();
    outcome.happened = audit_.happened;
    outcome.reloads = reloads_;
    outcome.simulated_ns = wire_.now() - began;
    outcome.kinds = kinds_of(ledger_, gateway_);
    return outcome;
  }

 private:
  static constexpr Ns kLongestStorm = 300 * kSecond;
  static constexpr Ns kCalm = 400 * kSecond;  // longer than the sum of all timeouts that swarm.h draws

  static constexpr std::uint32_t kMostTurnsAtOnce = 20'000;

  enum Step : std::uint32_t { kReload, kDrain, kStop, kLack, kLackEnds };

  Swarm make_swarm(Scale scale) {
    switch (scale) {
      case Scale::whole: break;
      case Scale::small: return SwarmMaker::make_small();
      case Scale::leavers: return SwarmMaker::make_leavers();
      case Scale::crowd: return SwarmMaker::make_crowd();
      case Scale::reload: return SwarmMaker::make_reload();
    }
    return SwarmMaker(dice_).make();
  }

  void write_script() {
    const Ns span = static_cast<Ns>(swarm_.requests) * 10 * kMillisecond;
    for (std::uint32_t i = 0; i < swarm_.reloads; ++i) {
      wire_.timer(Notice::Kind::script, kReload, wire_.now() + dice_.span(0, span), 0);
    }
    for (std::uint32_t i = 0; i < swarm_.lacks; ++i) {
      wire_.timer(Notice::Kind::script, kLack, wire_.now() + dice_.span(0, span), 0);
    }
    if (scale_ == Scale::reload) reload(settings_maker_.with_another());
    if (swarm_.drains) wire_.timer(Notice::Kind::script, kDrain, wire_.now() + dice_.span(0, 2 * span), 0);
    if (swarm_.stops) wire_.timer(Notice::Kind::script, kStop, wire_.now() + dice_.span(0, 2 * span), 0);
  }

  void on_script(std::uint32_t step) {
    switch (step) {
      case kReload: reload_in_.push_back(draw_state(dice_)); return;
      case kDrain:
        ledger_.draining = true;
        ledger_.drained_at = wire_.now();
        return gateway_.drain();
      case kStop: ledger_.stopped = true; return gateway_.stop();
      case kLack: return begin_lack();
      case kLackEnds: wire_.connect_error = 0; return;
      default: return;
    }
  }

  // For a while connect() fails for want of something on this host.
  void begin_lack() {
    constexpr int kLacks[] = {EMFILE, ENFILE, EADDRNOTAVAIL, ENOBUFS, ENOMEM, EAGAIN, ENETUNREACH};
    if (calm_) return;
    wire_.connect_error = kLacks[dice_.index(std::size(kLacks))];
    wire_.timer(Notice::Kind::script, kLackEnds, wire_.now() + dice_.span(kMillisecond, 3 * kSecond), 0);
  }

  // The reloads wait until a request is in the state that was drawn for them.
  void reload_if_wanted(SimWorker& worker) {
    std::array<bool, kExchangeStateNames.size()> states{};
    worker.sessions().each(
        [&](const auto& session) { states[static_cast<std::size_t>(session.exchange_state())] = true; });
    if (!states[static_cast<std::size_t>(reload_in_.back())]) return;
    reload_in_.pop_back();
    ReloadCoverage::Keys changed;
    const auto next = settings_maker_.next(changed);
    for (std::size_t i = 0; i < states.size(); ++i) {
      if (states[i]) reloads_.note(static_cast<ExchangeState>(i), changed);
    }
    reload(next);
  }
  void reload(const std::shared_ptr<const Settings>& next) {
    reloads_of_run_ += 1;
    if (wire_.story != nullptr) std::fprintf(wire_.story, "%14sreload\n", "");
    audit_.note_caps(*next);
    blame_.note(*next);
    policy_.note(*next);
    gateway_.reload(next);
  }

  // ---- phases ----

  void storm() {
    const Ns until = wire_.now() + kLongestStorm;
    while (ledger_.ok() && wire_.now() < until && !clients_.finished() && !gateway_.workers_ended()) step(until);
  }

  // No more faults. Clients that stall on purpose keep stalling: Nexus has to end their connections.
  void calm() {
    clients_.calm();
    wire_.weather = Weather{};
    wire_.most_descriptors = SIZE_MAX;
    wire_.connect_error = 0;
    fleet_.calm();
    names_.calm();
    swarm_.late_turn = Rate{};
    calm_ = true;
    const Ns until = wire_.now() + kCalm;
    while (ledger_.ok() && wire_.now() < until && !gateway_.workers_ended() &&
           !(gateway_.is_empty() && names_.idle() && (ledger_.draining || wire_.listener.backlog.empty()))) {
      step(until);
    }
    if (ledger_.ok() && !gateway_.workers_ended()) audit_.check_rest();
  }

  void end() {
    gateway_.stop();
    for (std::uint32_t loop = 0; loop < gateway_.workers(); ++loop) {
      if (!gateway_.ended(loop)) turn(loop);
    }
    gateway_.end_workers();
    for (std::uint32_t loop = 0; loop < swarm_.workers; ++loop) audit_.take_lines(rings_[loop]);
    for (const LinkId id : wire_.close_listener()) {
      if (wire_.at(id).live) clients_.on_reset(id);
    }
    clients_.calm();
    deliver_all();
    clients_.end_all();
    audit_.check_counts(slack());
    if (ledger_.ok()) freshness_.check_refusals();
    if (ledger_.ok()) blame_.check_cancelled();
    if (ledger_.ok()) policy_.check_at_end();
    if (ledger_.ok()) Scrape(ledger_, gateway_, fleet_).check();
    if (ledger_.ok() && scale_ == Scale::crowd) check_fairness();
    if (ledger_.ok() && reloads_of_run_ == 0) Limits(ledger_, *settings_, slack()).check();
    gateway_.end_control();
    if (ledger_.ok()) audit_.check_closed();
  }

  void check_fairness() {
    const std::size_t contended = Fairness::check(ledger_, *settings_, swarm_.latency_ns);
    if (contended < swarm_.requests / 2) ledger_.wrong("only %zu requests began while both keys waited", contended);
  }

  // Delivers everything in transit; nobody answers any more.
  void deliver_all() {
    const Ns until = wire_.now() + 1000 * kSecond;  // byte by byte, a large answer takes minutes
    while (ledger_.ok() && wire_.next_at() <= until) {
      wire_.advance(std::max(wire_.now(), wire_.next_at()));
      handle(wire_.step());
    }
  }

  // ---- one step ----

  void step(Ns until) {
    if (wire_.next_at() <= wire_.now() && (dice_.one_in(2) || !any_can_turn())) return handle(wire_.step());
    if (turn_one()) return;
    if (wire_.next_at() <= wire_.now()) return handle(wire_.step());
    Ns next = std::min(wire_.next_at(), until);
    for (std::uint32_t loop = 0; loop < gateway_.loops(); ++loop) next = std::min(next, due_at(loop));
    assert(next >= wire_.now());
    wire_.advance(next);
  }

  // When a loop has to run next.
  Ns due_at(std::uint32_t loop) {
    const Ns due = gateway_.due_at(loop);
    return due == kNever ? kNever : std::max({due, not_before_[loop], wire_.now()});
  }
  bool any_can_turn() {
    for (std::uint32_t loop = 0; loop < gateway_.loops(); ++loop) {
      if (due_at(loop) <= wire_.now()) return true;
    }
    return false;
  }

  bool turn_one() {
    const std::uint32_t count = gateway_.loops();
    const std::uint32_t first = dice_.number(0, count - 1);
    for (std::uint32_t i = 0; i < count; ++i) {
      const std::uint32_t loop = (first + i) % count;
      if (due_at(loop) > wire_.now()) continue;
      turn(loop);
      return true;
    }
    return false;
  }

  void turn(std::uint32_t loop) {
    SimNet& net = gateway_.net(loop);
    if (!calm_ && wire_.links() > 0 && dice_.chance(wire_.weather.spurious_event)) {
      net.spurious(static_cast<LinkId>(dice_.index(wire_.all_links())));
    }
    wire_.turn = turns_ += 1;
    if (wire_.now() != turns_at_) turns_at_ = wire_.now(), turns_there_ = 0;
    if (++turns_there_ > kMostTurnsAtOnce) ledger_.wrong("a loop spins: %u turns at the same time", turns_there_);
    {
      faults().memory = swarm_.memory_fails && !calm_ ? swarm_.memory_fault : Rate{};
      faults().dice = &wire_.dice();
      begin_turn(loop);
      {
        const Runs nexus(true);
        gateway_.turn(loop);
      }
      end_turn(loop);
    }
    faults().dice = nullptr;
    if (wire_.story != nullptr && loop < gateway_.workers()) tell_states(*gateway_.each_worker()[loop]);
    check_broken();
    // A turn without work sleeps until its deadline. Other turns may have changed something: check everything.
    if (net.slept()) return;
    if (loop < gateway_.workers()) audit_.take_lines(rings_[loop]);
    if (loop < gateway_.workers() && !reload_in_.empty() && !calm_) reload_if_wanted(*gateway_.each_worker()[loop]);
    audit_.check_step();
    check_servers();
    not_before_[loop] = wire_.now() + (swarm_.turn_ns > 0 ? dice_.span(0, swarm_.turn_ns) : 0);
    if (dice_.chance(swarm_.late_turn)) not_before_[loop] += dice_.span(0, swarm_.late_by_ns);
    if (turns_ % 1024 == 0 && !ledger_.memory_faults) Scrape(ledger_, gateway_, fleet_).check_now();
    if (turns_ % 16 == 0 && wire_.all_links() > 0)
      audit_.check_blocked(static_cast<LinkId>(dice_.index(wire_.all_links())), slack());
  }

  // The oracles look at the state before and after a turn.
  void begin_turn(std::uint32_t loop) {
    in_control_ = loop == gateway_.workers();
    if (!in_control_) freshness_.begin_turn(loop);
    circuits_.begin_turn(wire_.now());
    blame_.begin_turn();
    names_.failed.clear();
  }
  void end_turn(std::uint32_t loop) {
    freshness_.end_turn();
    circuits_.end_turn(wire_.now());
    blame_.end_turn(loop);
    if (in_control_) names_.end_turn(gateway_.control().registry(), *gateway_.control().published());
    policy_.end_turn(loop);
    if (!in_control_) upkeep_.end_turn(loop);
    if (in_control_) note_published();
    in_control_ = false;
  }
  void note_published() {
    const SnapshotPtr& published = gateway_.control().published();
    if (published == published_) return;
    published_ = published;
    audit_.check_caps_in_force(*published);
    freshness_.note(published);
    if (!circuits_.note(*published)) ledger_.wrong("a backend has another address and its old breaker");
    blame_.note(*published);
  }

  // The states of the sessions that have a request, after a worker's turn.
  void tell_states(SimWorker& worker) {
    worker.sessions().each([this](const auto& session) {
      if (session.state == SessionState::reading_head) return;
      const std::string_view own = to_string(session.state), exchange = to_string(session.exchange_state());
      std::fprintf(wire_.story, "%14s%s: %.*s, exchange %.*s\n", "", session.client_name.c_str(),
                   static_cast<int>(own.size()), own.data(), static_cast<int>(exchange.size()), exchange.data());
    });
  }

  // Nexus must close a client's connection in the same turn in which a call on it failed.
  void check_broken() {
    if (broken_ == kNoLink) return;
    const Link& link = wire_.at(broken_);
    if (link.live && link.nexus_open && link.generation == broken_life_) {
      ledger_.wrong("client %u: its connection is kept, though a call on it failed", link.peer);
    }
    broken_ = kNoLink;
  }

  // Checks max_pending as the servers see it. Not after reloads, which change which backend is on which server.
  void check_servers() {
    if (swarm_.reloads > 0 || scale_ == Scale::reload) return;
    std::array<std::uint32_t, kServers> caps{};
    std::array<bool, kServers> capped{};
    capped.fill(true);
    for (const BackendSettings& backend : settings_->backends) {
      const auto address = parse_address(backend.address.host, backend.address.port);
      if (!address) return;
      const std::uint32_t server = server_at(*address);
      capped[server] = capped[server] && backend.max_pending > 0;
      caps[server] += backend.max_pending;
    }
    for (std::uint32_t server = 0; server < kServers; ++server) {
      const std::uint32_t running = capped[server] ? fleet_.running_on(server) : 0;
      if (running > caps[server])
        ledger_.wrong("server %u runs %u requests, caps allow %u", server, running, caps[server]);
    }
  }

  // How late Nexus may act on a deadline: the loops' delays, the network's, and a tick of the timer wheel.
  Ns slack() const { return swarm_.late_by_ns + 2 * swarm_.turn_ns + 2 * swarm_.latency_ns + 100 * kMillisecond; }

  void handle(const Notice& notice) {
    switch (notice.kind) {
      case Notice::Kind::none: return;
      case Notice::Kind::script: return on_script(notice.link);
      case Notice::Kind::client_timer: return clients_.on_timer(notice.link, notice.value);
      case Notice::Kind::backend_timer: return fleet_.on_timer(notice.link, notice.value);
      case Notice::Kind::connected: return fleet_.on_connected(notice.link);
      default: break;
    }
    const bool backend = wire_.at(notice.link).to_backend;
    switch (notice.kind) {
      case Notice::Kind::data: return backend ? fleet_.on_data(notice.link) : clients_.on_data(notice.link);
      case Notice::Kind::fin: return backend ? fleet_.on_fin(notice.link) : clients_.on_fin(notice.link);
      case Notice::Kind::reset: return backend ? fleet_.on_reset(notice.link) : clients_.on_reset(notice.link);
      case Notice::Kind::room: return backend ? fleet_.on_room(notice.link) : clients_.on_room(notice.link);
      default: return;
    }
  }

  Dice dice_;
  Swarm swarm_;
  SettingsMaker settings_maker_;
  Wire wire_;
  const Scale scale_;
  Ledger ledger_;
  Freshness freshness_;
  Names names_;
  Fleet fleet_;
  Clients clients_;
  bool in_control_ = true;  // the turn is control's, whose first checks begin with it
  Circuits circuits_;
  Blame blame_;
  Policy policy_;
  Upkeep upkeep_;
  std::shared_ptr<const Settings> settings_;
  Gateway gateway_;
  Audit audit_;
  SnapshotPtr published_;
  ReloadCoverage reloads_;
  std::vector<ExchangeState> reload_in_;  // of the reloads that are due
  LogRings& rings_;
  std::vector<Ns> not_before_;  // per loop: no turn before that
  std::uint64_t turns_ = 0;
  Ns turns_at_ = 0;
  std::uint32_t turns_there_ = 0;
  LinkId broken_ = kNoLink;  // the client's link on which a call failed in this turn
  std::uint32_t broken_life_ = 0;
  std::uint32_t reloads_of_run_ = 0;
  bool calm_ = false;
};

}  // namespace nexus::sim
