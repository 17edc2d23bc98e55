// blame.h
// Owns:     the check that a backend is blamed for what it did itself, and for nothing else: by the outcome that each
//           attempt is counted with, by each ejection, and by each backend that becomes unhealthy.
// Promises: judges by what the network and the server did on the connections that Nexus read from or closed in the same
//           turn; what a limit of the whole request, the client, this host or Nexus spoiled is no reason.
// Leaves:   which backend gets a request to policy.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <vector>

#include "circuits.h"
#include "fleet.h"
#include "names.h"

namespace nexus::sim {

constexpr std::uint32_t bit(AttemptOutcome outcome) { return 1u << static_cast<std::uint32_t>(outcome); }

class Blame {
 public:
  Blame(Ledger& ledger, Wire& wire, Fleet& fleet, const Names& names, const Gateway& gateway, Circuits& circuits,
        Ns slack_ns)
      : ledger_(ledger),
        wire_(wire),
        fleet_(fleet),
        names_(names),
        gateway_(gateway),
        circuits_(circuits),
        slack_ns_(slack_ns) {}

  // Requests may still follow earlier settings, so the least of each limit counts.
  void note(const Settings& settings) {
    const auto lower = [](auto& least, auto value) { least = std::min(least, value); };
    lower(least_.connect_ns, settings.upstream.connect_timeout_ns);
    lower(least_.first_byte_ns, settings.upstream.first_byte_timeout_ns);
    lower(least_.stall_ns, settings.upstream.stall_timeout_ns);
    lower(least_.check_ns, settings.health.timeout_ns);
    lower(least_.head_bytes, std::size_t{settings.server.max_header_bytes});
    lower(least_.eject_after, settings.health.eject_after);
    lower(least_.failures, settings.health.failures);
    lower(least_.recoveries, settings.health.recoveries);
    longest_check_ns_ = std::max(longest_check_ns_, settings.health.timeout_ns);
    request_timeout_ |= settings.upstream.request_timeout_ns > 0;
  }
  // The fleet that the workers were given.
  void note(const Snapshot& fleet) {
    for (const BackendView& view : fleet.backends) {
      if (view.address) servers_[view.id] |= 1u << server_at(*view.address);
    }
  }

  void on_refused_at_once(std::uint32_t server) { seen_.push_back({server, bit(AttemptOutcome::connect_error)}); }
  // A connect() of a health check.
  void on_check(std::uint32_t server) { checks_[server].push_back(wire_.now()); }
  void on_read(LinkId id) {
    const Touched touched{id, wire_.at(id).generation};
    if (touched_.empty() || !(touched_.back() == touched)) touched_.push_back(touched);
  }
  void on_close(LinkId id) { seen_.push_back(look(id)); }

  void begin_turn() {
    seen_.clear();
    touched_.clear();
    failed_now_.clear();
    succeeded_.clear();
  }
  void end_turn(std::uint32_t loop) {
    gather();
    loop < gateway_.workers() ? check_outcomes(loop) : check_health();
    for (Breaker& breaker : circuits_.all()) check_ejection(breaker);
  }

  // At the end: a failure of a backend must not be hidden as one of somebody else.
  void check_cancelled() {
    if (ledger_.memory_faults || ledger_.draining || ledger_.stopped) return;
    std::uint64_t cancelled = 0, allowed = wire_.lacks;
    for (const auto& counts : counted_) {
      for (const Outcomes& outcomes : counts) cancelled += outcomes[index(AttemptOutcome::cancelled)];
    }
    for (const Request& request : ledger_.requests) {
      const std::string& error = request.line_error;
      // When request_timeout passes, the client may get the answer that an earlier attempt has left.
      const bool too_long = request_timeout_ && (error == "timeout" || request.line_attempts > 1);
      allowed += error == "client_closed" || error == "other" || too_long || request.client_left ? 1 : 0;
    }
    if (cancelled <= allowed) return;
    ledger_.wrong("%llu attempts are counted as cancelled, and only %llu were spoiled by others than the backend",
                  static_cast<unsigned long long>(cancelled), static_cast<unsigned long long>(allowed));
  }

 private:
  using Outcomes = std::array<std::uint64_t, kAttemptOutcomeNames.size()>;
  struct Least {
    Ns connect_ns = kNever, first_byte_ns = kNever, stall_ns = kNever, check_ns = kNever;
    std::size_t head_bytes = SIZE_MAX;
    std::uint32_t eject_after = UINT32_MAX, failures = UINT32_MAX, recoveries = UINT32_MAX;
  };
  // A connection, or a connect(), as it showed itself in this turn.
  struct Seen {
    std::uint32_t server = 0;
    std::uint32_t reasons = 0;   // bits of the outcomes for which there is a reason
    bool failed_status = false;  // the head of a 429 or 5xx was read
    bool retry_after = false;    // and it asks for an ejection
  };
  struct Touched {
    LinkId link;
    std::uint32_t generation;
    bool operator==(const Touched&) const = default;
  };

  static std::size_t index(AttemptOutcome outcome) { return static_cast<std::size_t>(outcome); }

  Seen look(LinkId id) const {
    using enum AttemptOutcome;
    const Link& link = wire_.at(id);
    Seen seen;
    seen.server = link.peer;
    const bool ended = link.to_nexus.fin_arrived || link.reset_seen || link.broken;
    if (link.refused || ((link.reset_seen || link.broken) && link.to_nexus.read == 0))
      seen.reasons |= bit(connect_error);
    if (ended) seen.reasons |= bit(truncated);
    const Fleet::Conduct conduct = fleet_.conduct(id);
    if (is_silent(link, conduct)) seen.reasons |= bit(timeout);
    if (conduct.overlong) seen.reasons |= bit(bad_response);
    if (conduct.answer != nullptr) look_at(*conduct.answer, conduct, link.to_nexus.read, seen);
    return seen;
  }

  void look_at(const Answer& answer, const Fleet::Conduct& conduct, std::uint64_t read, Seen& seen) const {
    using enum AttemptOutcome;
    if (read <= conduct.begins) return;
    const std::uint64_t bytes = read - conduct.begins;
    const bool garbled = answer.garbled || answer.body_at > least_.head_bytes;
    if (garbled) seen.reasons |= bit(bad_response);
    if (bytes < answer.body_at) return;
    const bool failed = answer.status == 429 || answer.status >= 500;
    if (failed) seen.reasons |= bit(answer.status == 429 ? status_429 : status_5xx);
    if (answer.in_disguise) seen.reasons |= bit(bad_response);
    const bool good = !failed && !answer.in_disguise && !answer.garbled && answer.may_be_whole;
    if (good && bytes >= answer.whole_bytes) seen.reasons |= bit(ok);
    seen.failed_status = failed && !conduct.seen;
    seen.retry_after = seen.failed_status && answer.retry_after;
  }

  // True if the backend has kept Nexus waiting for as long as the limit of what it waits for.
  bool is_silent(const Link& link, const Fleet::Conduct& conduct) const {
    const Ns now = wire_.now();
    if (link.loop == static_cast<std::int32_t>(gateway_.workers())) return is_check_late(link);
    const bool shakes = link.tls != nullptr && !link.tls->established();
    if (!link.connected || shakes) return now - link.made_at >= least_.connect_ns;
    // The bytes are here. In TLS they come record by record: an event is queued for the next one.
    if (link.to_nexus.unread() > 0 && link.edge_due <= now && link.tls == nullptr) return false;
    const Ns written_at = link.to_peer.marks.empty() ? link.made_at : link.to_peer.marks.back().at;
    const std::uint64_t read = link.to_nexus.read;
    const bool awaits_first = conduct.answer == nullptr || read < conduct.begins + conduct.answer->first_end;
    if (awaits_first && now - written_at >= least_.first_byte_ns) return true;
    const bool awaits_more = conduct.answer != nullptr && read >= conduct.begins + conduct.answer->first_at;
    return awaits_more && now - std::max(link.read_at, written_at) >= least_.stall_ns;
  }

  // A check may need two connections, and two for each address of a name; its time begins with the first.
  bool is_check_late(const Link& link) const {
    if (link.to_nexus.unread() > 0 && link.edge_due <= wire_.now()) return false;
    if (names_.lookups() == 0) return has_check_of(checks_[link.peer]);
    return std::any_of(checks_.begin(), checks_.end(), [this](const auto& begun) { return has_check_of(begun); });
  }
  // True if one of these may have begun so early that its check ends now.
  bool has_check_of(const std::vector<Ns>& begun) const {
    const Ns latest = wire_.now() - least_.check_ns / (names_.lookups() == 0 ? 1 : kMostOfName);  // each has a share
    const Ns earliest = wire_.now() - longest_check_ns_ - slack_ns_;
    return std::any_of(begun.begin(), begun.end(), [&](Ns at) { return at >= earliest && at <= latest; });
  }

  // Adds what the connections showed that Nexus has read from and not closed. An answer that is an error in disguise
  // may be held, and is judged in the turn of a deadline, in which nothing was read.
  void gather() {
    const auto is_gone = [this](const Touched& touched) {
      const Link& link = wire_.at(touched.link);
      return !link.live || !link.nexus_open || link.generation != touched.generation;
    };
    std::erase_if(held_, is_gone);
    for (const Touched& held : held_) {
      const Seen seen = look(held.link);
      seen_.push_back({seen.server, seen.reasons & bit(AttemptOutcome::bad_response)});
    }
    for (const Touched& touched : touched_) {
      if (is_gone(touched)) continue;
      seen_.push_back(look(touched.link));
      const Answer* answer = fleet_.conduct(touched.link).answer;
      if (answer != nullptr && answer->in_disguise && std::find(held_.begin(), held_.end(), touched) == held_.end())
        held_.push_back(touched);
      fleet_.note_read(touched.link);
    }
  }

  void tell() const {
    if (wire_.story == nullptr) return;
    for (const Seen& seen : seen_)
      std::fprintf(wire_.story, "seen: server %u, reasons %x\n", seen.server, seen.reasons);
  }

  // The outcomes that this worker has counted in this turn.
  void check_outcomes(std::uint32_t worker) {
    const auto& slabs = gateway_.metrics().slabs();
    const Slab& slab = *slabs[worker + 1];  // the first is control's
    auto& counted = counted_[worker];
    const auto& names = gateway_.control().registry().backend_names();
    counted.resize(std::max<std::size_t>(counted.size(), names.size()));
    for (std::uint32_t i = 0; i < names.size(); ++i) {
      const BackendCounters* cells = slab.backend(BackendId{i});
      if (cells == nullptr) continue;
      Outcomes fresh{};
      for (std::size_t outcome = 0; outcome < fresh.size(); ++outcome) {
        const std::uint64_t count = cells->attempts[outcome].read();
        fresh[outcome] = count - std::exchange(counted[i][outcome], count);
        if (fresh[outcome] > 0) check_outcome(BackendId{i}, static_cast<AttemptOutcome>(outcome), fresh[outcome]);
      }
      note_failures(BackendId{i}, fresh);
    }
  }

  void check_outcome(BackendId backend, AttemptOutcome outcome, std::uint64_t count) {
    if (outcome == AttemptOutcome::cancelled) return;
    // Without memory for all of them, some workers get a fleet that is not known here.
    const std::uint32_t servers = ledger_.memory_faults ? UINT32_MAX : servers_[backend];
    const auto reasons = std::count_if(seen_.begin(), seen_.end(), [&](const Seen& seen) {
      return (servers >> seen.server & 1) != 0 && (seen.reasons & bit(outcome)) != 0;
    });
    if (count <= static_cast<std::uint64_t>(reasons)) return;
    tell();
    ledger_.wrong("%llu attempts at %s are counted as %s, and its server gave a reason for %lld",
                  static_cast<unsigned long long>(count),
                  gateway_.control().registry().backend_names().name(backend).c_str(),
                  std::string(name_of(outcome)).c_str(), static_cast<long long>(reasons));
  }

  // A failed status counts when its head is read, and its attempt is counted later. A 429 that may be that of a
  // client's quota does not count, but the backend may fail in its body.
  void note_failures(BackendId backend, const Outcomes& fresh) {
    using enum AttemptOutcome;
    const std::uint64_t failed = fresh[index(connect_error)] + fresh[index(timeout)] + fresh[index(truncated)] +
                                 fresh[index(bad_response)] + fresh[index(status_429)];
    for (Breaker& breaker : circuits_.all()) {
      if (breaker.backend != backend) continue;
      const auto statuses = std::count_if(seen_.begin(), seen_.end(), [&](const Seen& seen) {
        return seen.server == breaker.server && seen.failed_status;
      });
      const auto now_failed = static_cast<std::uint32_t>(failed) + static_cast<std::uint32_t>(statuses);
      failed_now_[breaker.circuit->server()] = now_failed;
      breaker.failures += now_failed;
      // A success may have come before all of this turn's failures, or behind them.
      if (fresh[index(ok)] > 0 && !breaker.lax) succeeded_.push_back(breaker.circuit->server());
    }
  }

  void check_ejection(Breaker& breaker) {
    const std::uint64_t number = breaker.circuit->server();
    const std::uint32_t failed = failed_now_[number];
    if (breaker.ejected) {
      const bool asked = std::any_of(seen_.begin(), seen_.end(), [&](const Seen& seen) {
        return seen.server == breaker.server && seen.retry_after;
      });
      const bool on_trial = breaker.before == Circuit::half_open || breaker.before == Circuit::probing;
      const std::uint32_t needed = on_trial ? 1 : least_.eject_after;
      if (!asked && breaker.failures < needed) {
        tell();
        ledger_.wrong("%s is ejected after %u failures of its own, at least %u are needed",
                      gateway_.control().registry().backend_names().name(breaker.backend).c_str(), breaker.failures,
                      needed);
      }
      breaker.failures = 0;
    }
    if (std::find(succeeded_.begin(), succeeded_.end(), number) != succeeded_.end()) {
      breaker.failures = std::min(breaker.failures, failed);
    }
  }

  // ---- health checks, after a turn of control ----

  void check_health() {
    std::array<std::uint32_t, kAddresses> failed_now{}, good_now{};
    for (const Seen& seen : seen_) {
      const std::uint32_t good = bit(AttemptOutcome::ok);
      if ((seen.reasons & ~good) != 0 && (seen.reasons & good) == 0) failed_now[seen.server] += 1;
      if ((seen.reasons & good) != 0) good_now[seen.server] += 1;
    }
    const Registry& registry = gateway_.control().registry();
    const bool reloaded = std::exchange(settings_, &registry.settings()) != &registry.settings();
    for (const Registry::Backend& backend : registry.backends()) {
      Checked& checked = health_[backend.epoch];
      // A check tries each address of a name, and an answer may have replaced these in this turn.
      const std::uint32_t before_servers = std::exchange(checked.servers, servers_of(backend));
      auto failed = static_cast<std::uint32_t>(std::count(names_.failed.begin(), names_.failed.end(), backend.epoch));
      for (std::uint32_t server = 0; server < kAddresses; ++server) {
        if (((before_servers | checked.servers) >> server & 1u) == 0) continue;
        failed += failed_now[server];
        checked.good += good_now[server];
      }
      checked.failed += failed;
      const Health before = std::exchange(checked.health, backend.health);
      if (before == backend.health) continue;
      const std::uint32_t total = std::exchange(checked.failed, failed);  // these may have come behind the change
      const std::uint32_t needed = before == Health::unknown || reloaded ? 1 : least_.failures;
      const std::uint32_t good = std::exchange(checked.good, 0);
      // One that is healthy because checks are off has passed none.
      const bool passed = backend.health == Health::healthy && good > 0;
      const bool first_up = passed && !std::exchange(checked.was_up, true);
      const std::uint32_t wanted = first_up || before == Health::unknown || reloaded ? 1 : least_.recoveries;
      if (backend.health == Health::healthy && good < wanted && is_checked(registry)) {
        ledger_.wrong("%s is healthy after %u good checks, at least %u are needed", backend.settings.name.c_str(), good,
                      wanted);
      }
      if (backend.health != Health::unhealthy || total >= needed) continue;
      ledger_.wrong("%s is unhealthy after %u failed checks of its own, at least %u are needed",
                    backend.settings.name.c_str(), total, needed);
    }
  }
  // A name that moves brings another server, whose checks are counted anew.
  bool is_checked(const Registry& registry) const {
    return registry.settings().health.enabled && names_.lookups() == 0 && !ledger_.memory_faults;
  }
  static std::uint32_t servers_of(const Registry::Backend& backend) {
    std::uint32_t servers = backend.address ? 1u << server_at(*backend.address) : 0;
    for (const Address& address : backend.addresses) servers |= 1u << server_at(address);
    return servers;
  }

  struct Checked {
    Health health = Health::unknown;
    std::uint32_t good = 0;    // checks, since its health changed last
    std::uint32_t failed = 0;  // checks of its servers and lookups of its name, since its health changed last
    bool was_up = false;
    std::uint32_t servers = 0;  // a bit for each of its addresses
  };

  Ledger& ledger_;
  Wire& wire_;
  Fleet& fleet_;
  const Names& names_;
  const Gateway& gateway_;
  Circuits& circuits_;
  Least least_;
  Ns longest_check_ns_ = 0;
  const Settings* settings_ = nullptr;  // of control
  const Ns slack_ns_;
  bool request_timeout_ = false;
  std::map<BackendId, std::uint32_t> servers_;               // that each backend ever had: a bit for each
  std::vector<Seen> seen_;                                   // in this turn
  std::vector<Touched> touched_;                             // connections that were read from in this turn
  std::vector<Touched> held_;                                // with an error in disguise, in earlier turns
  std::array<std::vector<Outcomes>, kMostWorkers> counted_;  // by backend
  std::map<std::uint64_t, std::uint32_t> failed_now_;        // in this turn, by breaker
  std::vector<std::uint64_t> succeeded_;                     // the same
  std::array<std::vector<Ns>, kAddresses> checks_;           // when each connect() of a health check was made
  std::map<std::uint64_t, Checked> health_;                  // by epoch
};

}  // namespace nexus::sim
