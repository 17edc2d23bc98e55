// freshness.h
// Owns:     the check that each decision uses a view that was current when it was made.
// Promises: judges by what was published to the workers and by what both simulated sides saw; a decision is wrong only
//           if it agrees with no fleet that was current in its time.
// Leaves:   everything else that a request is checked for to ledger.h and audit.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "ledger.h"
#include "tests/lib/gateway.h"
#include "tests/lib/rfc9112.h"

namespace nexus::sim {

inline bool speaks(const BackendView& backend, Api api) { return (backend.apis & apis(api)) != 0; }

class Freshness {
 public:
  Freshness(Ledger& ledger, Wire& wire) : ledger_(ledger), wire_(wire) {}

  // After a turn of the control thread.
  void note(const SnapshotPtr& published) {
    if (!published_.empty() && published_.back().snapshot == published) return;
    published_.push_back({wire_.now(), published});
    const std::vector<BackendSettings>& settings = published->settings->backends;
    if (published->backends.size() != settings.size())
      return ledger_.wrong("the fleet has not the configured backends");
    for (std::size_t i = 0; i < settings.size(); ++i) check_view(published->backends[i], settings[i]);
  }

  // Before a turn of a worker: the connections that it has.
  void begin_turn(std::uint32_t worker) {
    worker_ = static_cast<std::int32_t>(worker);
    open_.clear();
    for (std::size_t id = 0; id < wire_.all_links(); ++id) {
      const Link& link = wire_.at(static_cast<LinkId>(id));
      if (is_open(link)) open_.push_back({static_cast<LinkId>(id), link.generation});
    }
  }
  void end_turn() { worker_ = -1; }

  // A worker connects: to a server of the fleet of this moment, or again to one that had closed a kept connection.
  void on_connect(const Address& address, std::uint32_t server) {
    if (worker_ < 0 || ledger_.memory_faults) return;
    if (lost_connection_to(server)) return again_.push_back({wire_.now(), server});
    const bool known = any_view(wire_.now(), wire_.now(), [&](const BackendView& backend, const Snapshot&) {
      return backend.healthy && backend.address == address;
    });
    if (!known) ledger_.wrong("a request goes to %s, which no fleet of now has", to_string(address).c_str());
  }

  // A request has come to `server`; `arrived` has the model of its body. `first`: of its connection. `slack`: how long
  // a write may have waited for the kernel.
  void on_request(const Link& link, const Address& server, const rfc9112::Message& head, const Request& request,
                  const Arrived& arrived, bool first, Ns sent_at, Ns slack) {
    const std::string_view model = arrived.model;
    if (ledger_.memory_faults) return;
    const Ns from = first ? link.made_at : sent_at - slack, to = first ? link.made_at : sent_at;
    if (first && connects_again(link)) return;
    const std::string key = head.value_or_empty("Authorization");
    const bool own_key = key.starts_with("Bearer sk-of-");
    const bool right = any_view(from, to, [&](const BackendView& backend, const Snapshot& snapshot) {
      return backend.healthy && backend.address == server && offers(snapshot, backend, model, request) &&
             (backend.ask_usage || !arrived.usage_added) && head.target.starts_with(backend.base_path + "/") &&
             head.target[backend.base_path.size() + 1] != 'b' &&
             (own_key ? backend.request_lines.find(key + "\r\n") != std::string::npos
                      : !backend.has_key && (key.empty() || snapshot.settings->server.api_keys.empty()));
    });
    if (!right) {
      ledger_.wrong("a request for %.*s came to %s as no fleet of its time allows: %.300s",
                    static_cast<int>(model.size()), model.data(), to_string(server).c_str(),
                    (head.start_line + ", " + key).c_str());
    }
  }

  // Calls visit(Snapshot) for each fleet that was current at some moment from `from` to `to`.
  template <class Visit>
  void each_fleet(Ns from, Ns to, Visit&& visit) const {
    for (std::size_t i = 0; i < published_.size(); ++i) {
      if (was_current(i, from, to)) visit(*published_[i].snapshot);
    }
  }

  // True if this connection was made because another one to the same server had ended under its request.
  bool connects_again(const Link& link) const {
    return std::any_of(again_.begin(), again_.end(),
                       [&](const Again& again) { return again.at == link.made_at && again.server == link.peer; });
  }

  // At the end: a request was refused for want of a backend only if there was none at some moment between its last byte
  // and its answer.
  void check_refusals() {
    if (ledger_.memory_faults || ledger_.draining || ledger_.stopped) return;
    for (std::size_t i = 0; i < ledger_.requests.size(); ++i) {
      const Request& request = ledger_.requests[i];
      const bool refused = request.line_error == "no_backend" || request.line_error == "no_healthy_backend";
      if (!refused || request.lines != 1 || request.line_attempts > 0 || request.kind != Request::Kind::completion ||
          request.asked_at < 0 || request.answered_at < 0 || request.client_left) {
        continue;
      }
      if (all_serve(request.asked_at, request.answered_at, request)) {
        ledger_.wrong("r%zu: %u (%s), though each fleet between its last byte and its answer serves %s", i,
                      request.status, request.line_error.c_str(), request.body.model.c_str());
      }
    }
  }

 private:
  struct Published {
    Ns at;
    SnapshotPtr snapshot;
  };
  struct Opened {
    LinkId link;
    std::uint32_t generation;
  };
  struct Again {
    Ns at;
    std::uint32_t server;
  };

  // What the workers see of a backend is what is configured now.
  void check_view(const BackendView& view, const BackendSettings& settings) {
    const auto address = parse_address(settings.address.host, settings.address.port);
    const bool there = !address || view.address == address;  // a name may stand for any
    const bool key = view.has_key == !settings.api_key.empty() &&
                     (!view.has_key || view.request_lines.find(settings.api_key + "\r\n") != std::string::npos);
    const bool usage =
        settings.stream_usage == StreamUsage::by_kind || view.ask_usage == (settings.stream_usage == StreamUsage::ask);
    const bool same = view.name == settings.name && view.priority == settings.priority &&
                      view.max_pending == settings.max_pending && view.base_path == settings.base_path;
    if (there && key && usage && same) return;
    ledger_.wrong("%s is not as it is configured: %s%s%s%s", settings.name.c_str(), there ? "" : "address ",
                  key ? "" : "key ", usage ? "" : "usage ", same ? "" : "priority, cap or path");
  }

  bool is_open(const Link& link) const {
    return link.live && link.to_backend && link.nexus_open && link.loop == worker_;
  }

  bool lost_connection_to(std::uint32_t server) {
    return std::any_of(open_.begin(), open_.end(), [&](const Opened& opened) {
      const Link& link = wire_.at(opened.link);
      return link.peer == server && (link.generation != opened.generation || !is_open(link));
    });
  }

  // True if `test` holds for a backend of a fleet that was current at some moment from `from` to `to`.
  template <class Test>
  bool any_view(Ns from, Ns to, Test&& test) const {
    for (std::size_t i = 0; i < published_.size(); ++i) {
      if (!was_current(i, from, to)) continue;
      const Snapshot& snapshot = *published_[i].snapshot;
      for (const BackendView& backend : snapshot.backends) {
        if (test(backend, snapshot)) return true;
      }
    }
    return false;
  }

  bool all_serve(Ns from, Ns to, const Request& request) const {
    for (std::size_t i = 0; i < published_.size(); ++i) {
      if (!was_current(i, from, to)) continue;
      const Snapshot& snapshot = *published_[i].snapshot;
      const ModelEntry* entry = snapshot.find(request.body.model);
      // A backend that cannot serve this request may be the healthy one: count those that can serve any.
      const auto serves = [&](const Offer& offer) {
        const Capabilities& can = offer.capabilities;
        const BackendView& backend = snapshot.backends[offer.backend];
        return backend.healthy && speaks(backend, request.api->api) && can.vision && can.tools && can.json_mode &&
               can.context_tokens == 0;
      };
      if (entry == nullptr || std::none_of(entry->offers.begin(), entry->offers.end(), serves)) return false;
    }
    return true;
  }

  bool was_current(std::size_t i, Ns from, Ns to) const {
    return published_[i].at <= to && (i + 1 == published_.size() || published_[i + 1].at >= from);
  }

  // True if the backend has the model, with what the request needs.
  static bool offers(const Snapshot& snapshot, const BackendView& backend, std::string_view model,
                     const Request& request) {
    const ModelEntry* entry = snapshot.find(model);
    if (entry == nullptr) return false;
    return std::any_of(entry->offers.begin(), entry->offers.end(), [&](const Offer& offer) {
      const Capabilities& can = offer.capabilities;
      const Needs& needs = request.needs;
      const bool able = (can.vision || !needs.vision) && (can.tools || !needs.tools) && (can.json_mode || !needs.json);
      const bool fits = can.context_tokens == 0 || request.sent_body.size() / kBytesPerToken <= can.context_tokens;
      return &snapshot.backends[offer.backend] == &backend && able && fits;
    });
  }

  Ledger& ledger_;
  Wire& wire_;
  std::vector<Published> published_;  // in order
  std::int32_t worker_ = -1;          // whose turn it is; -1: not a worker's
  std::vector<Opened> open_;          // its connections to backends when its turn began
  std::vector<Again> again_;
};

}  // namespace nexus::sim
