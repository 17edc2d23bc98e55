// names.h
// Owns:     the simulated DNS: what each host name stands for, and how the server answers a lookup: late, never, with
//           nothing, with a part, with dead addresses, and with others than before, because the host has moved.
// Promises: remembers each answer as Nexus got it. A backend is at an address that the last complete answer for its
//           name has, the workers hear of it, and each lookup is answered once.
// Leaves:   delivering answers to tests/lib/sim_net.h, blame for failed lookups to blame.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "ledger.h"
#include "swarm.h"
#include "tests/lib/gateway.h"

namespace nexus::sim {

class Names {
 public:
  Names(Ledger& ledger, Wire& wire, Dice& dice, Manners& manners, Ns slack_ns)
      : ledger_(ledger), wire_(wire), dice_(dice), manners_(manners), slack_ns_(slack_ns) {
    for (Host& host : hosts_) {
      if (!dice_.chance(manners_.name_fails)) host.servers = some_servers();  // else unknown until it moves
    }
    wire_.on_lookup = [this](std::uint64_t id, const std::string& host, std::uint16_t) { return look_up(id, host); };
    wire_.on_looked_up = [this](std::uint64_t id, const Looked& told) { note(id, told); };
  }

  // From now on every name has an answer with a server that is up.
  void calm() {
    calm_ = true;
    for (Host& host : hosts_) {
      host.mute_until = 0;
      const bool lives =
          std::any_of(host.servers.begin(), host.servers.end(), [](std::uint32_t one) { return one < kServers; });
      if (!lives) host.servers = {dice_.number(0, kServers - 1)};
    }
  }

  // After a turn of control.
  void end_turn(const Registry& registry, const Snapshot& published) {
    for (const Flight& flight : flights_) {
      if (wire_.now() - flight.began > kLookupLimit + slack_ns_) {
        ledger_.wrong("the lookup of %s is not answered in time", flight.host.c_str());
      }
    }
    longest_hold_ = std::max(longest_hold_, registry.settings().health.timeout_ns);
    for (const Registry::Backend& backend : registry.backends()) {
      const HostPort& where = backend.settings.address;
      if (!parse_address(where.host, where.port)) check(backend, published);
    }
  }

  // The backends whose lookups ended without an address in this turn.
  std::vector<std::uint64_t> failed;

  bool idle() const { return flights_.empty(); }
  std::uint64_t lookups() const { return lookups_; }
  std::uint64_t moves() const { return moves_; }

 private:
  static constexpr Ns kMostReloads = 5;  // of a run; each may hold the fleet back until its first checks
  struct Host {
    std::vector<std::uint32_t> servers;
    Ns mute_until = 0;  // the server for this name does not answer
  };
  struct Flight {
    std::uint64_t id;
    std::string host;
    Ns began;
  };
  struct Told {
    std::vector<Address> addresses;  // that Nexus may use
    Ns stale_since = -1;             // the workers have another address since then
  };

  std::vector<std::uint32_t> some_servers() {
    std::vector<std::uint32_t> servers;
    for (std::uint32_t i = dice_.number(1, kMostOfName); i > 0; --i) {
      const bool dead = dice_.chance(manners_.name_dead);
      servers.push_back(dead ? dice_.number(kServers, kAddresses - 1) : dice_.number(0, kServers - 1));
    }
    return servers;
  }

  Looked look_up(std::uint64_t id, const std::string& name) {
    lookups_ += 1;
    flights_.push_back({id, name, wire_.now()});
    const auto number = static_cast<std::size_t>(name[1] - '0');  // h0 to h3
    if (name.size() < 2 || number >= hosts_.size()) ledger_.wrong("a lookup of %s", name.c_str());
    if (!ledger_.ok()) return {};
    if (std::count_if(flights_.begin(), flights_.end(), [&](const Flight& one) { return one.id == id; }) > 1) {
      ledger_.wrong("%s is looked up twice at once for the same backend", name.c_str());
    }
    return calm_ ? answer(hosts_[number]) : spoiled(hosts_[number]);
  }

  Looked answer(const Host& host) {
    Looked looked{dice_.span(50 * kMicrosecond, 5 * kMillisecond), {}, {}};
    for (const std::uint32_t server : host.servers) looked.addresses.push_back(address_of_server(server));
    std::sort(looked.addresses.begin(), looked.addresses.end());
    looked.addresses.erase(std::unique(looked.addresses.begin(), looked.addresses.end()), looked.addresses.end());
    if (looked.addresses.empty()) looked.error = "Domain name not found";
    return looked;
  }

  Looked spoiled(Host& host) {
    if (dice_.chance(manners_.name_moves)) host.servers = some_servers(), moves_ += 1;
    if (dice_.chance(manners_.name_mute)) host.mute_until = wire_.now() + dice_.span(0, 3 * kSecond);
    if (wire_.now() < host.mute_until) return {kLookupLimit, {}, "no answer in time"};
    if (dice_.chance(manners_.name_refused)) return {Looked::kNotTaken, {}, {}};
    Looked looked = answer(host);
    if (dice_.chance(manners_.name_late)) looked.after = dice_.span(0, 3 * kSecond);
    if (dice_.chance(manners_.name_fails)) looked.addresses.clear(), looked.error = "Server failure";
    if (!looked.addresses.empty() && dice_.chance(manners_.name_part)) {
      looked.addresses.resize(dice_.number(1, static_cast<std::uint32_t>(looked.addresses.size())));
      looked.error = "no answer in time";
    }
    return looked;
  }

  // Nexus gets an answer, or the lookup was not taken.
  void note(std::uint64_t id, const Looked& looked) {
    const auto flight = std::find_if(flights_.begin(), flights_.end(), [&](const Flight& one) { return one.id == id; });
    if (flight == flights_.end()) return ledger_.wrong("an answer that no lookup asked for");
    flights_.erase(flight);
    wire_.note(10, id, looked.addresses.size());
    tell(id, looked);
    if (looked.addresses.empty()) return failed.push_back(id);
    std::vector<Address>& known = told_[id].addresses;
    if (looked.error.empty()) known.clear();  // else some are missing: the one in use may stay
    known.insert(known.end(), looked.addresses.begin(), looked.addresses.end());
  }

  void tell(std::uint64_t id, const Looked& looked) const {
    if (wire_.story == nullptr) return;
    std::fprintf(wire_.story, "answer %llu:", static_cast<unsigned long long>(id));
    for (const Address& address : looked.addresses) std::fprintf(wire_.story, " %s", to_string(address).c_str());
    std::fprintf(wire_.story, " %s\n", looked.error.c_str());
  }

  void check(const Registry::Backend& backend, const Snapshot& published) {
    const char* name = backend.settings.name.c_str();
    const auto flying =
        std::count_if(flights_.begin(), flights_.end(), [&](const Flight& one) { return one.id == backend.epoch; });
    if (flying != (backend.looking_up ? 1 : 0)) {
      ledger_.wrong("%lld lookups for %s are on their way", static_cast<long long>(flying), name);
    }
    if (!backend.address || ledger_.memory_faults) return;  // an answer may be lost for want of memory
    Told& told = told_[backend.epoch];
    const auto& may = told.addresses;
    if (std::find(may.begin(), may.end(), *backend.address) == may.end()) {
      ledger_.wrong("%s is at %s, which the last answer for its name does not have", name,
                    to_string(*backend.address).c_str());
    }
    const bool heard = std::any_of(published.backends.begin(), published.backends.end(), [&](const BackendView& view) {
      return view.circuit == backend.circuit && view.address == backend.address;
    });
    if (heard) {
      told.stale_since = -1;
    } else if (told.stale_since < 0) {
      told.stale_since = wire_.now();
    } else if (wire_.now() - told.stale_since > kMostReloads * longest_hold_ + slack_ns_) {
      ledger_.wrong("the workers are not told that %s has moved", name);
    }
  }

  Ledger& ledger_;
  Wire& wire_;
  Dice& dice_;
  Manners& manners_;
  const Ns slack_ns_;
  std::array<Host, kNames> hosts_;
  std::vector<Flight> flights_;         // lookups that Nexus waits for
  std::map<std::uint64_t, Told> told_;  // by epoch of a backend
  Ns longest_hold_ = 0;
  std::uint64_t lookups_ = 0, moves_ = 0;
  bool calm_ = false;
};

}  // namespace nexus::sim
