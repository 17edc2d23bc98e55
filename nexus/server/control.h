// control.h
// Owns:     the control thread: the registry, the schedule of health checks and DNS lookups, reloads, and the pages
//           that show the counts of all threads.
// Promises: workers learn of a change by one message with a complete snapshot; all changes of one turn share one
//           snapshot; nothing here delays a proxied byte; work that found no memory is retried.
// Leaves:   probes to prober.h, lookups to resolver.h, the pages' text to page_renderer.h, spans to span_exporter.h,
//           what follows from a lookup and a check to control_checks.h, which its users include; signals to daemon.h.
// Threads:  run() is the control thread; post() may be called from any thread.
// Tested by: tests/e2e/health.test.mjs, tests/e2e/lifecycle.test.mjs, tests/e2e/fleet_hosts.test.mjs, tests/sim
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "nexus/base/limits.h"
#include "nexus/base/mailbox.h"
#include "nexus/base/memory_budget.h"
#include "nexus/fleet/admission.h"
#include "nexus/fleet/check_words.h"
#include "nexus/fleet/prober.h"
#include "nexus/fleet/registry.h"
#include "nexus/metrics/slab.h"
#include "nexus/net/resolver.h"
#include "nexus/os/log.h"
#include "nexus/os/systemd.h"
#include "nexus/server/builtin_pages.h"
#include "nexus/server/fleet_join.h"
#include "nexus/server/page_renderer.h"
#include "nexus/server/span_exporter.h"
#include "nexus/server/worker.h"

namespace nexus {

template <class Net>
class Control {
 public:
  struct AskPage {
    std::uint32_t worker = 0;
    Handle session;
    std::uint32_t number = 0;  // of the session's question; the answer carries it
    WantedPage page;
  };
  struct Reload {
    std::shared_ptr<const Settings> settings;  // null: the new configuration was refused
  };
  // Requests fail on this backend; `none`: no backend can serve them, so that each that is not up is meant.
  struct CheckSoon {
    BackendId backend = BackendId::none;
  };
  struct Stop {
    bool flush = true;  // the last spans are sent first
  };
  using Message = std::variant<AskPage, Reload, CheckSoon, Stop, Heartbeat>;

  struct Hooks {
    std::function<std::optional<Address>(const BackendSettings&)> echo_address;  // may throw std::bad_alloc
    PageRenderer::Sources pages;
    std::string instance{};  // this process, for spans and in a Via field
  };

  Control(Net& net, Metrics& metrics, Slab& slab, Admission& admission, BodyBudget& budget, Log log, Hooks hooks,
          Ns process_started)
      : net_(net),
        slab_(slab),
        admission_(admission),
        budget_(budget),
        log_(std::move(log)),
        hooks_(std::move(hooks)),
        now_(net.now()),
        wheel_(now_),
        prober_(net, wheel_, blocks_, json_),
        resolver_(net, [this](std::uint64_t epoch, const std::vector<Address>& addresses,
                              const std::string& error) { on_resolved(epoch, addresses, error); }),
        spans_(net, prober_, resolver_, metrics.spans(), slab, log_, json_, hooks_.instance),
        pages_(metrics, slab, registry_, hooks_.pages, process_started) {}
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  // Before any thread runs: takes the first configuration and returns the snapshot that workers begin with.
  SnapshotPtr begin(std::shared_ptr<const Settings> settings) {
    take_settings(std::move(settings));
    unpublished_ = false;
    pages_.note_reload(true);
    note_published(make_snapshot());
    return published_;
  }

  void set_workers(std::vector<Worker<Net>*> workers) { workers_ = std::move(workers); }

  // Called from any thread. Only no_memory means that the message is lost.
  using Posted = typename Mailbox<Message>::Posted;
  Posted post(Message message) noexcept {
    const Posted posted = mailbox_.post(std::move(message));
    if (posted == Posted::first) net_.wake();
    return posted;
  }

  void run() {
    check_new_backends();
    while (!stopped_ || spans_.is_flushing(now_)) turn();
  }

  // The simulator calls the next two itself. The first checks run at once, but only kFirstChecks in a millisecond, so
  // that the first backends serve meanwhile. Those after them are spread over the interval.
  void check_new_backends() {
    auto& backends = registry_.backends();
    const Ns interval = registry_.settings().health.interval_ns;
    std::size_t begun = 0;
    for (std::size_t i = 0; i < backends.size() && begun < kFirstChecks; ++i) {
      if (backends[i].next_check_ns != kNever) continue;
      begun += 1;
      backends[i].next_check_ns = now_ + interval * static_cast<Ns>(i + 1) / static_cast<Ns>(backends.size());
      backends[i].next_lookup_ns = backends[i].changed_ns = now_;
      guarded([&] { look_up_if_due(backends[i]), check(backends[i]); });
    }
    new_checks_ns_ = begun < kFirstChecks ? kNever : now_ + kMillisecond;
  }

  void turn() {
    bool woken = false;
    Ns deadline = std::min({wheel_.next(), resolver_.next(), retry_at_ns_, new_checks_ns_, spans_.next()});
    if (may_publish()) deadline = std::min(deadline, hold_until_ns_);
    for (const auto& backend : registry_.backends()) deadline = std::min(deadline, due_ns(backend));
    const std::size_t count = net_.wait(events_, deadline, woken);
    now_ = net_.now();
    for (std::size_t i = 0; i < count; ++i) guarded([&] { on_event(events_[i]); });
    guarded([&] { resolver_.step(); });
    wheel_.fire(now_, [this](Handle token) { guarded([&] { prober_.on_deadline(token, now_, probe_done()); }); });
    for (auto& backend : registry_.backends()) {
      if (now_ >= due_ns(backend)) guarded([&] { check_and_look_up(backend); });
    }
    if (now_ >= new_checks_ns_) check_new_backends();
    if (woken) take_messages();
    if (now_ >= retry_at_ns_) retry();
    spans_.step(now_, probe_done());
    if (may_publish() && (now_ >= hold_until_ns_ || !any_unknown())) publish();
  }

  // Any thread: the settings that all workers were given last. Relaxed: the address is only compared.
  const Settings* in_force() const { return in_force_.load(std::memory_order_relaxed); }

  // For the simulator:
  const Registry& registry() const { return registry_; }
  const SnapshotPtr& published() const { return published_; }
  std::size_t unsent_page_bytes() const { return pages_.unsent_bytes(); }

 private:
  // Runs `work`. False if memory ran out on the way: the rest of it is left undone, and retry() is scheduled.
  template <class Work>
  bool guarded(Work&& work) {
    try {
      work();
      return true;
    } catch (const std::bad_alloc&) {
      slab_.limit_hit(Limit::memory);
      retry_at_ns_ = std::min(retry_at_ns_, now_ + kMemoryRetry);
      return false;
    }
  }

  void retry() {
    retry_at_ns_ = kNever;
    if (reloading_) reload();
    check_new_backends();
  }

  void on_event(const Event& event) {
    if (event.token.kind() == kResolverKind) return resolver_.on_event(event);
    prober_.on_event(event, now_, probe_done());
  }

  // ---- messages ----

  void take_messages() {
    mailbox_.take(messages_);
    for (Message& message : messages_) {
      guarded([&] { std::visit([this](auto& m) { this->on_message(m); }, message); });
    }
    messages_.clear();
    turns_pages_ = {};
  }

  // All that ask in the same turn get the same page. Null if it can't be rendered.
  std::shared_ptr<const TextBuffer> page_of(PageKind kind) {
    std::shared_ptr<const TextBuffer>& page = turns_pages_[static_cast<std::size_t>(kind)];
    if (page != nullptr) return page;
    if (pages_.unsent_bytes() > kPageMemory) {
      slab_.limit_hit(Limit::page_memory);
    } else {
      guarded([&] { page = pages_.render(kind, now_); });
    }
    return page;
  }

  void on_message(AskPage& ask) {
    if (!join_.joins(ask.page.kind)) return tell(ask, page_of(ask.page.kind));
    join_.ask(ask, registry_, prober_, json_, now_, probe_done(), teller());
  }

  auto teller() {
    return [this](const AskPage& ask, std::shared_ptr<const TextBuffer> page) { tell(ask, std::move(page)); };
  }

  void tell(const AskPage& ask, std::shared_ptr<const TextBuffer> body) {
    typename Worker<Net>::RenderedPage page;
    page.session = ask.session;
    page.number = ask.number;
    page.kind = ask.page.kind;
    page.body = std::move(body);
    const auto posted = workers_[ask.worker]->post(std::move(page));
    if (posted == Worker<Net>::Posted::no_memory) slab_.limit_hit(Limit::memory);  // its session waits in vain
  }

  void on_message(Reload& message) {
    if (message.settings == nullptr) return pages_.note_reload(false);
    reloading_ = std::move(message.settings);
    reload();
  }

  void on_message(CheckSoon& wanted) {
    for (Registry::Backend& backend : registry_.backends()) {
      const bool is_down = backend.health != Health::healthy || !backend.has_models();
      if (wanted.backend == BackendId::none ? !is_down : backend.id != wanted.backend) continue;
      const Ns at_ns = std::max(now_, backend.checked_ns + kFirstRecheck);
      backend.next_check_ns = std::min(backend.next_check_ns, at_ns);
      if (is_down) backend.next_lookup_ns = std::min(backend.next_lookup_ns, at_ns);
    }
  }

  void on_message(Stop& stop) {
    stopped_ = true;
    if (stop.flush) spans_.flush(now_);
  }
  void on_message(Heartbeat& heartbeat) { heartbeat.answer(); }

  // ---- configuration ----

  void reload() {
    if (!registry_.has_names_for(*reloading_)) return refuse_names();
    if (!guarded([&] { take_settings(reloading_); })) return;
    reloading_.reset();
    pages_.note_reload(true);
    // Workers keep the old backends until the first checks of the new ones are done.
    hold_until_ns_ = now_ + std::min(registry_.settings().health.timeout_ns, kMaxReloadHold);
    check_new_backends();
    // The API key, the source of the model list, the interval or the timeout may have changed.
    for (Registry::Backend& backend : registry_.backends()) {
      if (backend.next_check_ns == kNever) continue;  // its first check is to come
      backend.next_check_ns = std::min(backend.next_check_ns, now_ + registry_.settings().health.interval_ns);
      if (backend.lookup_failed) backend.next_lookup_ns = now_;
      guarded([&] { check_anew(backend); });
    }
  }

  [[gnu::cold]] void refuse_names() {
    reloading_.reset();
    slab_.limit_hit(Limit::backend_names);
    pages_.note_reload(false);
    log_.event(LogLevel::error, "configuration not applied: too many names of backends since the start, restart Nexus",
               {{"limit", Digits(kMaxBackendNames - 1).view()}});
  }

  void take_settings(std::shared_ptr<const Settings> settings) {
    log_.configure(settings->log);
    budget_.set_limit(settings->server.body_memory_bytes);
    spans_.configure(settings->trace);
    registry_.configure(std::move(settings));
    std::vector<Admission::Cap> caps;
    for (Registry::Backend& backend : registry_.backends()) {
      if (backend.settings.kind == BackendKind::echo && hooks_.echo_address) {
        backend.address = hooks_.echo_address(backend.settings);
      }
      caps.push_back({backend.id, backend.settings.max_pending});
    }
    for (const KeyView& key : *registry_.keys().views()) {
      caps.push_back({key.state->places, static_cast<std::uint32_t>(key.settings->options.max_pending)});
    }
    admission_.configure(caps, registry_.settings().queue.size);
    registry_.keys().forget_gone([this](BackendId places) { return admission_.forget(places); });
    unpublished_ = true;
  }

  SnapshotPtr make_snapshot() {
    std::shared_ptr<Snapshot> made = registry_.snapshot();
    complete(*made);
    if (registry_.model_names().full()) slab_.limit_hit(Limit::models);
    return made;
  }

  bool any_unknown() const {
    return std::any_of(registry_.backends().begin(), registry_.backends().end(),
                       [](const Registry::Backend& backend) { return backend.health == Health::unknown; });
  }

  void note_published(SnapshotPtr snapshot) {
    published_ = std::move(snapshot);
    in_force_.store(published_->settings.get(), std::memory_order_relaxed);
  }

  // Not while a reload lacks memory: the registry may have caps by then that are not in force yet.
  bool may_publish() const { return unpublished_ && reloading_ == nullptr; }

  // Posts to all workers before it wakes any: a woken worker may preempt this thread.
  void publish() {
    const bool published = guarded([&] {
      const SnapshotPtr snapshot = make_snapshot();
      for (Worker<Net>* worker : workers_) {
        auto local = std::make_unique<LocalSnapshot>(LocalSnapshot{snapshot, 0});
        const auto posted = worker->put(typename Worker<Net>::NewSnapshot{std::move(local)});
        if (posted == Worker<Net>::Posted::no_memory) throw std::bad_alloc();
      }
      note_published(snapshot);
    });
    for (Worker<Net>* worker : workers_) worker->wake();
    unpublished_ = !published;
    hold_until_ns_ = published ? 0 : now_ + kMemoryRetry;
  }

  // ---- schedule of checks and lookups ----

  static Ns due_ns(const Registry::Backend& backend) { return std::min(backend.next_check_ns, backend.next_lookup_ns); }

  void check_and_look_up(Registry::Backend& backend) {
    if (now_ >= backend.next_check_ns) {
      backend.next_check_ns = now_ + registry_.settings().health.interval_ns;
      check(backend);
    }
    look_up_if_due(backend);
  }

  void look_up_if_due(Registry::Backend& backend) {
    const HostPort& where = backend.settings.address;
    if (backend.settings.kind == BackendKind::echo || parse_address(where.host, where.port)) {
      backend.next_lookup_ns = kNever;
      return;
    }
    if (now_ < backend.next_lookup_ns) return;
    backend.next_lookup_ns = now_ + kResolveInterval;
    if (backend.looking_up) return;
    backend.checked_ns = now_;
    backend.looking_up = resolver_.lookup(where.host, where.port, backend.epoch);
    if (backend.looking_up) return;
    on_resolved(backend.epoch, {}, "too many lookups are waiting");
  }

  // With an error beside addresses, some are missing: then the one in use stays.
  void on_resolved(std::uint64_t epoch, const std::vector<Address>& addresses, const std::string& error);

  void use_address(Registry::Backend& backend, const Address& address) {
    registry_.set_address(backend, address);
    unpublished_ = true;
    log_.event(LogLevel::info, "backend address resolved",
               {{"backend", backend.settings.name}, {"address", to_string(address)}});
  }

  // The backend is unhealthy; its name is looked up again when a check would be due.
  void note_unresolved(Registry::Backend& backend, const std::string& error) {
    unpublished_ |= !backend.has_models();
    ProbeResult result;
    backend.problem = result.reason = "host name not resolved: " + error;
    if (registry_.settings().health.enabled) note_health(backend, result);
    backend.next_lookup_ns = now_ + registry_.next_check_in(backend, false);
  }

  // ---- checks ----

  auto probe_done() {
    return [this](ProbeResult&& result) { on_result(std::move(result)); };
  }

  void check(Registry::Backend& backend) {
    if (backend.checking || !backend.is_checked(registry_.settings().health.enabled)) return;
    if (!backend.address) return;  // its lookup is due, or on its way, and leads to the first check
    const Ns timeout_ns = registry_.settings().health.timeout_ns;
    ProbeOrder order = order_of(backend.settings, backend.to_try(), backend.epoch, timeout_ns);
    order.wants_models = backend.settings.models.empty();
    if (!hooks_.instance.empty()) order.lines.append("Via: 1.1 ").append(hooks_.instance).append("\r\n");
    backend.checking = true;
    backend.checked_ns = now_;
    if (!guarded([&] { prober_.start(order, now_, probe_done()); })) backend.checking = false;
  }

  // As check(), but a check that runs is dropped: it asks in another way, or at another address.
  void check_anew(Registry::Backend& backend) {
    prober_.cancel(backend.epoch);
    backend.checking = false;
    check(backend);
  }

  void on_result(ProbeResult&& result) {
    for (std::size_t i = 0; i < result.handshakes.size(); ++i) {
      slab_.tls_handshakes(TlsSide::backend, static_cast<TlsOutcome>(i), result.handshakes[i]);
    }
    if (spans_.is_own(result.epoch)) return spans_.on_result(std::move(result), now_);
    if (join_.is_own(result.epoch)) return join_.on_result(std::move(result), json_, teller());
    Registry::Backend* backend = registry_.find_epoch(result.epoch);
    if (backend == nullptr) return;
    backend->checking = false;
    if (!result.lack.empty()) note_lack(result);
    if (!result.lack.empty() && !result.passed) return check_again_in(*backend, kFirstRecheck);  // it says nothing
    backend->problem = explain_check(backend->settings, result);
    if (result.passed) note_passed(*backend, result);
    if (registry_.settings().health.enabled) note_health(*backend, result);
    if (result.passed) note_models(*backend, result);
    check_again_in(*backend, registry_.next_check_in(*backend, result.passed));
  }

  // A name whose server is not up may have another address by then.
  void check_again_in(Registry::Backend& backend, Ns span) {
    backend.next_check_ns = std::min(backend.next_check_ns, now_ + span);
    if (backend.failed_checks > 0) backend.next_lookup_ns = std::min(backend.next_lookup_ns, backend.next_check_ns);
  }

  void note_passed(Registry::Backend& backend, const ProbeResult& result) {
    slab_.health_check(backend.id, result.round_trip_ns);
    if (backend.address != result.address) use_address(backend, result.address);
  }

  void note_models(Registry::Backend& backend, ProbeResult& result);
  void note_lack(const ProbeResult& result);
  void note_health(Registry::Backend& backend, const ProbeResult& result);

  Net& net_;
  Slab& slab_;  // this thread's counts
  Admission& admission_;
  BodyBudget& budget_;
  Log log_;
  Hooks hooks_;
  Ns now_;
  TimerWheel wheel_;
  BlockPool blocks_;
  JsonReader json_;
  Registry registry_;
  Prober<Net> prober_;
  FleetJoin<Net, AskPage> join_;
  typename Net::Resolver resolver_;
  SpanExporter<Net> spans_;
  PageRenderer pages_;
  std::vector<Worker<Net>*> workers_;
  Mailbox<Message> mailbox_;
  std::vector<Message> messages_;
  std::array<std::shared_ptr<const TextBuffer>, kPageKinds> turns_pages_;
  std::array<Event, Net::kMaxEvents> events_;
  SnapshotPtr published_;  // that all workers were given last
  std::atomic<const Settings*> in_force_{nullptr};
  Ns new_checks_ns_ = kNever;  // when more first checks may begin
  bool unpublished_ = false;   // the registry has changes that the workers' snapshot lacks
  Ns hold_until_ns_ = 0;       // until when publish() may wait for first checks
  bool stopped_ = false;
  Ns next_lack_log_ns_ = 0;
  Ns retry_at_ns_ = kNever;
  std::shared_ptr<const Settings> reloading_;  // null, or settings for which there was no memory yet
};

}  // namespace nexus
