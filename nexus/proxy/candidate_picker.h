// candidate_picker.h
// Owns:     what a request's body needs of a backend, the errors about a body or a model that can't be served, and
//           the choice of the backend that a request is tried on next: the candidates tried so far, the place held
//           at the backend in use, the place in the queue.
// Promises: no backend is tried twice with one model; an ejected one only as the last resort; a place, a queue place
//           and a half-open probe are given back when the request moves on or ends.
// Leaves:   reading the body to api/request_json.h, the order of candidates to fleet/router.h, caps and queues to
//           fleet/admission.h, ejection to fleet/circuit_breaker.h, sending requests and errors to exchange.h.
// Threads:  its worker's.
// Tested by: tests/sim, tests/e2e/queue.test.mjs, tests/e2e/routing.test.mjs, tests/request_needs_test.cpp,
//           tests/hostile
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/errors.h"
#include "nexus/api/incremental_json.h"
#include "nexus/api/multipart.h"
#include "nexus/api/request_json.h"
#include "nexus/base/limits.h"
#include "nexus/fleet/admission.h"
#include "nexus/fleet/registry.h"
#include "nexus/fleet/router.h"
#include "nexus/proxy/client_key.h"
#include "nexus/proxy/upstream_request.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {

// Reads the complete body.
inline std::optional<ApiError> read_body(JsonReader& json, const Endpoint& endpoint, const BodyReaders& readers,
                                         const RequestView& request, bool find_images, BodyFacts& facts) {
  const std::string_view body(request.body, request.body_bytes);
  if (endpoint.body == BodyFormat::none) {
    facts = BodyFacts{};
    return std::nullopt;
  }
  if (readers.multipart != nullptr) return readers.multipart->read(body, endpoint, facts);
  if (readers.json == nullptr) return read_body(json, endpoint, body, facts, find_images);
  return readers.json->read(json, body, facts, find_images);
}

// The bytes of base64 in a body: images and files as data URLs, sound as `"data":"…"`. They are no text.
inline std::size_t base64_bytes(std::string_view body) {
  constexpr std::string_view kUrl = ";base64,", kKey = R"("data")";
  std::size_t total = 0;
  std::size_t url = body.find(kUrl), key = body.find(kKey);
  while (url != std::string_view::npos || key != std::string_view::npos) {
    std::size_t from = url + kUrl.size();
    if (key < url) {
      from = std::min(body.find_first_not_of(" \t\r\n:", key + kKey.size()), body.size());
      from += body.substr(from, 1) == "\"" ? 1 : 0;
    }
    const std::size_t to = std::min(body.find('"', from), body.size());
    total += to - from;
    if (url < to) url = body.find(kUrl, to);
    if (key < to) key = body.find(kKey, to);
  }
  return total;
}

// `count_text`: a backend's context_length matters.
inline RouteNeeds needs_of(const Endpoint& endpoint, const RequestView& request, const BodyFacts& facts,
                           bool count_text) {
  RouteNeeds needs;
  needs.endpoint = &endpoint;
  needs.tools = facts.has_tools;
  needs.json_mode = facts.json_mode;
  if (count_text) {
    const std::string_view body(request.body, request.body_bytes);
    needs.context_tokens = (body.size() - base64_bytes(body)) / kBytesPerToken;
  }
  needs.vision = facts.has_images;
  return needs;
}

inline bool is_available(const Snapshot& snapshot, const ModelEntry& entry) {
  return std::any_of(entry.offers.begin(), entry.offers.end(),
                     [&](const Offer& offer) { return snapshot.backends[offer.backend].healthy; });
}

// The names of the available models that a key may use, as far as they fit into a message.
inline std::string list_available(const Snapshot& snapshot, const ApiKey* key = nullptr) {
  std::vector<std::string_view> names;
  for (const auto& [name, entry] : snapshot.models) {
    if (is_available(snapshot, entry) && (key == nullptr || key->may_use(name))) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  std::string list;
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (list.size() + names[i].size() > kListedModelBytes) return list + ", … (GET /v1/models lists all)";
    if (i > 0) list += ", ";
    list += names[i];
  }
  return list;
}

// The message of a 404.
inline std::string unknown_model_message(const Snapshot& snapshot, std::string_view asked, const ApiKey* key) {
  const bool all = key == nullptr || key->models.empty();
  const std::string names = all ? snapshot.available_names : list_available(snapshot, key);
  std::string message = "The model '";
  message.append(asked).append("' is not available here. ");
  if (names.empty()) return message + "No model is available now: see /health.";
  return message.append("Available: ").append(names).append(".");
}

// The message of a 501.
inline std::string not_spoken_message(const Snapshot& snapshot, const ModelEntry& entry, const Endpoint& endpoint,
                                      std::string_view method) {
  std::string message = "None of the backends ";
  if (!entry.name.empty()) message.append("of the model '").append(entry.name).append("' ");
  message.append("serves ").append(method).append(" ").append(endpoint.path).append(": ");
  const std::size_t listed_at = message.size();
  for (const Offer& offer : entry.offers) {
    const std::string& name = snapshot.backends[offer.backend].name;
    if (message.size() + name.size() > kListedModelBytes) break;
    if (message.size() > listed_at) message += ", ";
    message += name;
  }
  return message.append(". Use an API that they serve, or correct apis in nexus.conf.");
}

template <class Net>
class CandidatePicker {
 public:
  enum class Next : std::uint8_t {
    chosen,        // see backend() and choice()
    all_full,      // every candidate is at its cap: call wait_in_queue()
    no_queue,      // and none may wait
    queue_full,    // and so is the queue
    nothing_left,  // all have been tried
    unknown_model,
    none_healthy,
    not_spoken,
    not_capable,
  };

  explicit CandidatePicker(WorkerContext<Net>& core) : context_(core) {}
  CandidatePicker(const CandidatePicker&) = delete;
  CandidatePicker& operator=(const CandidatePicker&) = delete;

  // The fleet that the next decisions use: `snapshot` must outlive them. `entry` is one of its models, or null if it
  // does not have the request's model.
  void look_at(const Snapshot& snapshot, const ModelEntry* entry, const RouteNeeds& needs) {
    snapshot_ = &snapshot;
    entry_ = entry;
    needs_ = needs;
  }

  // Starts a request, after look_at(). `key` is its own until end().
  void begin(ClientKey& key, std::size_t body_bytes) {
    key_ = &key;
    body_bytes_ = body_bytes;
    of_key_ = key.places();
    tried_.clear();
    tries_ = primary_tries_ = fallback_tries_ = 0;
    backend_ = nullptr;
  }

  const BackendView* backend() const { return backend_; }  // the last one chosen
  const Choice& choice() const { return choice_; }
  std::uint32_t tries() const { return tries_; }
  std::uint64_t affinity() const { return needs_.affinity; }
  CircuitBreaker::Permit& permit() { return permit_; }

  // Chooses the next candidate and takes its place; it counts as tried from here on.
  Next next() {
    const RouteOutcome outcome = find_choices(context_.turn++);
    if (tried_.empty()) {
      switch (outcome) {
        case RouteOutcome::ok: break;
        case RouteOutcome::unknown_model: return Next::unknown_model;
        case RouteOutcome::none_healthy: return Next::none_healthy;
        case RouteOutcome::not_spoken: return Next::not_spoken;
        case RouteOutcome::not_capable: return Next::not_capable;
      }
    }
    return enter_key() ? pick() : Next::all_full;
  }

  // True if next() would find an untried candidate; a full one counts if its queue can be joined.
  bool another() {
    find_choices(context_.turn);
    return std::any_of(context_.choices.begin(), context_.choices.end(), [this](const Choice& choice) {
      return may_try(choice) && (snapshot_->settings->queue.size > 0 || has_room(choice));
    });
  }

  // After all_full: queues for the first free place on any of the full candidates. Returns all_full once queued,
  // no_queue or queue_full if that is not possible, and otherwise as next(): a place has become free meanwhile.
  Next wait_in_queue(Handle owner, KeyId key) {
    for (bool queued = false; !queued;) {
      Admission::Place place;
      switch (context_.shared.admission.enqueue(full_, context_.worker, owner, ticket_, place,
                                                waits_for_key() ? nullptr : claim())) {
        case Admission::Outcome::full: return snapshot_->settings->queue.size == 0 ? Next::no_queue : Next::queue_full;
        case Admission::Outcome::queued: queued = true; break;
        case Admission::Outcome::entered:
          if (const Next next = use(std::move(place)); next != Next::all_full) return next;
      }
    }
    queued_ =
        count_queued(context_.slab, waits_for_key() ? BackendId::none : full_.front(), entry_->id, key, context_.now);
    return Next::all_full;
  }

  // Uses the place that was granted while the request was queued, if any: then as next().
  std::optional<Next> take_grant() {
    if (!waits_for_key()) decline_ejected();
    std::optional<Admission::Place> place = context_.shared.admission.take_grant(ticket_);
    if (!place) return std::nullopt;
    leave_queue();
    return use(std::move(*place));
  }

  // True if a candidate was skipped because it is ejected: call look_again() from time to time.
  bool passed_over_ejected() const { return passed_over_ejected_; }

  // While queued: checks whether ejected backends are usable again, or the fleet has changed. As next() if that gave a
  // place, or if no candidate is left; else the place in the queue is kept.
  std::optional<Next> look_again() {
    if (waits_for_key()) return take_grant();
    const bool no_cap = gather_usable();
    if (no_cap || context_.choices.empty()) {
      leave_queue();
      return next();
    }
    if (!full_.empty()) {
      context_.shared.admission.renew(ticket_, full_);
      count_wait();
    }
    return take_grant();
  }

  // The last choice did not count: its server does not know the request's path, and is no candidate any more.
  void take_back() {
    tried_.pop_back();
    forgive();
  }

  // The last choice does not count as a retry, but is not tried again.
  void forgive() { (choice_.fallback ? fallback_tries_ : primary_tries_) -= 1; }

  // Gives back what the request holds: its place, its half-open probe, its place in the queue.
  void leave() {
    leave_queue();
    place_ = Admission::Place();
    permit_ = CircuitBreaker::Permit();
  }

  // The request is over: it does not count on its key's max_pending any more.
  void end() {
    leave();
    key_place_ = Admission::Place();
  }

  // True if the request waits, or would have to, for another one of its key.
  bool waits_for_key() const { return full_.size() == 1 && full_.front() == of_key_.backend && of_key_.places > 0; }

 private:
  Claim* claim() { return &key_->claim(context_, body_bytes_); }

  // Takes the request's place among those of its key, once. False if there is none: full_ then has it.
  bool enter_key() {
    if (of_key_.places == 0 || key_place_.held()) return true;
    if (context_.shared.admission.try_enter(of_key_.backend, of_key_.places, key_place_)) return true;
    full_.assign(1, of_key_.backend);
    passed_over_ejected_ = false;
    return false;
  }

  struct Tried {
    std::uint64_t server;
    ModelId model;
  };

  RouteOutcome find_choices(std::uint64_t turn) {
    turn_ = turn;
    context_.choices.clear();
    if (entry_ == nullptr) return RouteOutcome::unknown_model;
    return route(
        *snapshot_, *entry_, needs_, snapshot_->settings->routing, context_.random.next(),
        [this](const BackendView& backend) { return load_of(backend); }, context_.choices);
  }

  BackendLoad load_of(const BackendView& backend) const {
    BackendLoad load;
    load.pending = context_.shared.metrics.pending(backend.id);
    load.latency_ns = context_.latency_of(backend);
    load.ejected = !usable(backend);
    return load;
  }

  bool may_try(const Choice& choice) const {
    const std::uint32_t retries = snapshot_->settings->routing.retries;
    if ((choice.fallback ? fallback_tries_ : primary_tries_) > retries) return false;
    const std::uint64_t server = snapshot_->backends[choice.backend].circuit->server();
    return std::none_of(tried_.begin(), tried_.end(),
                        [&](const Tried& tried) { return tried.server == server && tried.model == choice.model; });
  }

  bool usable(const BackendView& backend) const { return backend.circuit->usable(context_.now); }

  bool has_room(const Choice& choice) const {
    const BackendView& backend = snapshot_->backends[choice.backend];
    return backend.max_pending == 0 || context_.shared.admission.running_on(backend.id) < backend.max_pending;
  }

  // Takes the first choice that may be tried and has a place. An ejected backend is the last resort: it is used only if
  // nothing else is left, not even a full backend or a fallback.
  Next pick() {
    full_.clear();
    passed_over_ejected_ = false;
    for (const bool last_resort : {false, true}) {
      BestFirst order(context_.choices, turn_);
      while (const Choice* choice = order.next()) {
        if (may_try(*choice) && enter(*choice, last_resort)) return Next::chosen;
      }
      if (!full_.empty()) return Next::all_full;
    }
    return Next::nothing_left;
  }

  bool enter(const Choice& choice, bool last_resort) {
    const BackendView& backend = snapshot_->backends[choice.backend];
    if (!last_resort && !usable(backend)) {
      passed_over_ejected_ = true;
      return false;
    }
    Admission::Place place;
    if (backend.max_pending > 0 &&
        !context_.shared.admission.try_enter(backend.id, backend.max_pending, place, claim())) {
      full_.push_back(backend.id);
      return false;
    }
    CircuitBreaker::Permit permit = backend.circuit->enter(context_.now);
    if (permit.circuit_open() && !last_resort) return false;  // another request took the probe just now
    take(choice, std::move(place), std::move(permit));
    return true;
  }

  void take(const Choice& choice, Admission::Place place, CircuitBreaker::Permit permit) {
    choice_ = choice;
    // Its first choice has failed: that was not load.
    if (tries_ > 0 && choice_.affinity == AffinityOutcome::moved_load) choice_.affinity = AffinityOutcome::moved_health;
    backend_ = &snapshot_->backends[choice.backend];
    place_ = std::move(place);
    permit_ = std::move(permit);
    tried_.push_back({backend_->circuit->server(), choice.model});
    (choice.fallback ? fallback_tries_ : primary_tries_) += 1;
    tries_ += 1;
    if (needs_.affinity == 0) return;
    // It stays where load has moved it: its prompt is in the cache there. After a failure it comes back.
    const bool stays = needs_.seen_at != 0 && choice_.affinity != AffinityOutcome::moved_load;
    const std::uint16_t its = stays ? needs_.seen_at : backend_mark(backend_->affinity);
    context_.shared.recent_keys.note(needs_.affinity, its, context_.now);
  }

  // Collects in full_ the backends that may be tried and are not ejected. True if one of them has no cap, so that there
  // is nothing to wait for.
  bool gather_usable() {
    find_choices(context_.turn);
    full_.clear();
    bool no_cap = false;
    BestFirst order(context_.choices, turn_);
    while (const Choice* choice = order.next()) {
      const BackendView& backend = snapshot_->backends[choice->backend];
      if (!may_try(*choice) || !usable(backend)) continue;
      no_cap |= backend.max_pending == 0;
      full_.push_back(backend.id);
    }
    return no_cap;
  }

  // The backend for which the wait was counted may be no candidate any more.
  void count_wait() {
    if (queued_ && std::find(full_.begin(), full_.end(), queued_.get_deleter().backend) == full_.end())
      move_queued(queued_, full_.front());
  }

  // Passes a place on a backend that was ejected or removed meanwhile to the next in line, if the request can wait for
  // another backend: with its old position and deadline, and even if the queue is full by now.
  void decline_ejected() {
    const std::optional<BackendId> granted = context_.shared.admission.granted(ticket_);
    const auto is_granted = [&](const BackendView& backend) { return backend.id == *granted && usable(backend); };
    if (!granted || std::any_of(snapshot_->backends.begin(), snapshot_->backends.end(), is_granted)) return;
    if (gather_usable() || full_.empty()) return;
    context_.shared.admission.decline(ticket_, full_);
    count_wait();
    passed_over_ejected_ = true;
  }

  // Uses a place. A backend that was ejected meanwhile frees its places fast because it fails; it must not drain the
  // queue, so another usable backend is preferred.
  Next use(Admission::Place place) {
    if (waits_for_key()) {
      key_place_ = std::move(place);
      full_.clear();
      return next();
    }
    find_choices(context_.turn++);
    for (const Choice& choice : context_.choices) {
      const BackendView& backend = snapshot_->backends[choice.backend];
      if (backend.id != place.backend() || !may_try(choice)) continue;
      CircuitBreaker::Permit permit = backend.circuit->enter(context_.now);
      if (permit.circuit_open() && another_usable(backend.id)) break;
      take(choice, std::move(place), std::move(permit));
      return Next::chosen;
    }
    place = Admission::Place();
    return pick();
  }

  bool another_usable(BackendId but) const {
    return std::any_of(context_.choices.begin(), context_.choices.end(), [&](const Choice& choice) {
      const BackendView& backend = snapshot_->backends[choice.backend];
      return backend.id != but && may_try(choice) && usable(backend);
    });
  }

  void leave_queue() {
    ticket_ = Admission::Ticket();
    queued_.reset();
  }

  WorkerContext<Net>& context_;
  const Snapshot* snapshot_ = nullptr;
  const ModelEntry* entry_ = nullptr;
  RouteNeeds needs_;
  ClientKey* key_ = nullptr;
  std::size_t body_bytes_ = 0;
  Choice choice_;
  const BackendView* backend_ = nullptr;
  Admission::Cap of_key_{};     // of the key's requests at once
  Admission::Place key_place_;  // one of these
  Admission::Place place_;      // on backend_, if it has a cap
  CircuitBreaker::Permit permit_;
  Admission::Ticket ticket_;  // while queued
  QueuedCount queued_;
  std::uint64_t turn_ = 0;       // of the last choices
  std::vector<BackendId> full_;  // candidates that had no place
  std::vector<Tried> tried_;
  bool passed_over_ejected_ = false;
  std::uint32_t tries_ = 0;
  std::uint32_t primary_tries_ = 0;   // of those, the ones that count as retries but for the first
  std::uint32_t fallback_tries_ = 0;  // the same, under another model
};

}  // namespace nexus
