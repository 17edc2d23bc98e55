// control.h
// Owns:     the control thread: the registry, the health checks' schedule, host names, reloads, and the pages that are
//           rendered from all threads' counts.
// Promises: workers learn of a change by one message with a whole snapshot; several changes of one turn are one
//           snapshot; no work of this thread holds up a proxied byte; what there was no memory for is done later.
// Leaves:   probing to prober.h, resolving to the hook it is given, signals to nexus.cpp.
// Threads:  run() is the control thread; post() may be called from any.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "nexus/apps/status_page.h"
#include "nexus/base/mailbox.h"
#include "nexus/base/memory_budget.h"
#include "nexus/base/text_buffer.h"
#include "nexus/fleet/admission.h"
#include "nexus/fleet/prober.h"
#include "nexus/fleet/registry.h"
#include "nexus/metrics/prometheus.h"
#include "nexus/metrics/slab.h"
#include "nexus/metrics/stats_json.h"
#include "nexus/os/log.h"
#include "nexus/os/procfs.h"
#include "nexus/os/systemd.h"
#include "nexus/server/builtin_pages.h"
#include "nexus/server/worker.h"

namespace nexus {

constexpr std::uint8_t kPlanKind = 11;  // of a Handle: a backend's next check
constexpr Ns kResolveInterval = 30 * kSecond;
constexpr Ns kMaxReloadHold = 2 * kSecond;
constexpr Ns kTryAgain = 100 * kMillisecond;  // what there was no memory for

template <class Net>
class Control {
 public:
  struct AskPage {
    std::uint32_t worker = 0;
    Handle session;
    PageKind kind = PageKind::metrics;
  };
  struct Reload {
    std::shared_ptr<const Settings> settings;
  };
  struct ReloadFailed {};
  struct Resolved {
    std::uint64_t epoch = 0;
    std::vector<Address> addresses;  // empty: not resolved
    std::string error;
  };
  struct Stop {};
  using Message = std::variant<AskPage, Reload, ReloadFailed, Resolved, Stop, Heartbeat>;

  // What the outside does for it. Each may throw std::bad_alloc.
  struct Hooks {
    std::function<void(const HostPort& where, std::uint64_t epoch)> resolve;  // answers with Resolved, later
    std::function<std::optional<Address>(const BackendSettings&)> echo_address;
    std::function<std::uint64_t()> log_lines_dropped;  // since the start
    // What no two runs have alike; the simulator says something of its own.
    std::function<ProcessStats()> process_stats = read_process_stats;
    std::function<Ns()> wall_time = wall_now;
  };

  Control(Net& net, Metrics& metrics, Slab& slab, Admission& admission, BodyBudget& budget, Log log, Hooks hooks,
          Ns process_started)
      : net_(net),
        metrics_(metrics),
        slab_(slab),
        admission_(admission),
        budget_(budget),
        log_(std::move(log)),
        hooks_(std::move(hooks)),
        process_started_ns_(process_started),
        now_(net.now()),
        wheel_(now_),
        prober_(net, wheel_, blocks_, json_) {}
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  // Before any thread runs: the first configuration, and the snapshot that workers begin with.
  SnapshotPtr begin(std::shared_ptr<const Settings> settings) {
    take_settings(std::move(settings));
    dirty_ = false;
    reload_ok_at_ns_ = hooks_.wall_time();
    return make_snapshot();
  }

  void set_workers(std::vector<Worker<Net>*> workers) { workers_ = std::move(workers); }

  // Any thread. It is posted, or memory is too short.
  using Posted = typename Mailbox<Message>::Posted;
  Posted post(Message message) noexcept {
    const Posted posted = mailbox_.post(std::move(message));
    if (posted == Posted::first) net_.wake();
    return posted;
  }

  void run() {
    check_new_backends();
    while (!stopped_) turn();
  }

  // The simulator calls these two itself.
  void check_new_backends() {
    for (std::size_t i = 0; i < registry_.backends().size(); ++i) {
      guarded([&] { plan_first(registry_.backends()[i], i); });
    }
  }

  void turn() {
    bool woken = false;
    const Ns hold = dirty_ ? hold_until_ns_ : kNever;
    const std::size_t count = net_.wait(events_, std::min({wheel_.next(), hold, again_at_ns_}), woken);
    now_ = net_.now();
    for (std::size_t i = 0; i < count; ++i) {
      guarded(
          [&] { prober_.on_event(events_[i], now_, [this](ProbeResult&& result) { on_result(std::move(result)); }); });
    }
    wheel_.fire(now_, [this](Handle token) { guarded([&] { on_deadline(token); }); });
    if (woken) take_messages();
    if (now_ >= again_at_ns_) try_again();
    if (dirty_ && (now_ >= hold_until_ns_ || !any_unknown())) publish();
  }

  const Registry& registry() const { return registry_; }
  std::size_t armed_timers() const { return wheel_.armed(); }
  std::size_t probes_running() const { return prober_.running(); }

 private:
  // When a backend is checked and resolved next. It outlives a backend by one deadline at most.
  struct Plan {
    Plan(Handle token, std::uint64_t epoch_in) : epoch(epoch_in), timer(token) {}
    std::uint64_t epoch;
    Timer timer;
    Ns next_check_ns = 0;
    Ns next_resolve_ns = 0;
    bool checking = false;
    bool resolve_failed_logged = false;
  };

  // Runs what may find memory short. False where it did: what was not done by then is left undone.
  template <class Work>
  bool guarded(Work&& work) {
    try {
      work();
      return true;
    } catch (const std::bad_alloc&) {
      slab_.limit_hit(Limit::memory);
      again_at_ns_ = std::min(again_at_ns_, now_ + kTryAgain);
      return false;
    }
  }

  void try_again() {
    again_at_ns_ = kNever;
    if (reloading_) reload();
    check_new_backends();
  }

  void take_messages() {
    mailbox_.take(messages_);
    for (Message& message : messages_) {
      guarded([&] { std::visit([this](auto& m) { this->on_message(m); }, message); });
    }
    messages_.clear();
  }

  void on_message(AskPage& ask) {
    typename Worker<Net>::RenderedPage page;
    page.session = ask.session;
    page.kind = ask.kind;
    page.body = render(ask.kind);
    const auto posted = workers_[ask.worker]->post(std::move(page));
    if (posted == Worker<Net>::Posted::no_memory) slab_.limit_hit(Limit::memory);  // its session waits in vain
  }

  void on_message(Reload& message) {
    reloading_ = std::move(message.settings);
    reload();
  }

  void reload() {
    if (!guarded([&] { take_settings(reloading_); })) return;
    reloading_.reset();
    reload_ok_ = true;
    reload_ok_at_ns_ = hooks_.wall_time();
    // Made before broken: what the new backends have is found out before the old ones go.
    hold_until_ns_ = now_ + std::min(registry_.settings().health.timeout_ns, kMaxReloadHold);
    check_new_backends();
    // What changed may be the key, or where the list of models comes from.
    for (const Registry::Backend& backend : registry_.backends()) check_now(backend.epoch);
  }

  void on_message(ReloadFailed&) { reload_ok_ = false; }

  void on_message(Resolved& resolved) {
    Registry::Backend* backend = registry_.find_epoch(resolved.epoch);
    if (backend == nullptr) return;
    if (!resolved.addresses.empty()) {
      // An address that is still one of its own stays: connections to it are kept.
      const bool first = !backend->address.has_value();
      const auto& all = resolved.addresses;
      if (!first && std::find(all.begin(), all.end(), *backend->address) != all.end()) return;
      registry_.set_address(*backend, all.front());
      dirty_ = true;
      if (first) check_now(resolved.epoch);
      log_.event(LogLevel::info, "backend's address",
                 {{"backend", backend->settings.name}, {"address", to_string(all.front())}});
    } else {
      log_.event(
          LogLevel::warning, "backend's host name is not resolved",
          {{"backend", backend->settings.name}, {"host", backend->settings.address.host}, {"why", resolved.error}});
    }
  }

  void on_message(Stop&) { stopped_ = true; }
  void on_message(Heartbeat& ping) { ping.answer(); }

  // ---- configuration ----

  void take_settings(std::shared_ptr<const Settings> settings) {
    log_.configure(log_config(settings->log, log_.config().journald));
    budget_.set_limit(settings->server.body_memory_bytes);
    registry_.configure(std::move(settings));
    std::vector<Admission::Cap> caps;
    for (Registry::Backend& backend : registry_.backends()) {
      if (backend.settings.kind == BackendKind::echo && !backend.address && hooks_.echo_address) {
        backend.address = hooks_.echo_address(backend.settings);
      }
      caps.push_back({backend.id, backend.settings.max_pending});
    }
    admission_.configure(caps, registry_.settings().queue.size);
    dirty_ = true;
  }

  SnapshotPtr make_snapshot() {
    std::shared_ptr<Snapshot> made = registry_.snapshot();
    made->models_page = render_models(*made);
    if (registry_.model_names().full()) slab_.limit_hit(Limit::models);
    return made;
  }

  bool any_unknown() const {
    return std::any_of(registry_.backends().begin(), registry_.backends().end(),
                       [](const Registry::Backend& backend) { return backend.health == Health::unknown; });
  }

  // All have it before the first is woken: a woken one may run at once, in place of this thread.
  void publish() {
    const bool published = guarded([&] {
      const SnapshotPtr snapshot = make_snapshot();
      for (Worker<Net>* worker : workers_) {
        auto local = std::make_unique<LocalSnapshot>(LocalSnapshot{snapshot, 0});
        const auto posted = worker->put(typename Worker<Net>::NewSnapshot{std::move(local)});
        if (posted == Worker<Net>::Posted::no_memory) throw std::bad_alloc();
      }
    });
    for (Worker<Net>* worker : workers_) worker->wake();
    dirty_ = !published;
    hold_until_ns_ = published ? 0 : now_ + kTryAgain;
  }

  // ---- checks ----

  Plan* find_plan(std::uint64_t epoch) {
    Plan* found = nullptr;
    plans_.each([&](Plan& plan) {
      if (plan.epoch == epoch) found = &plan;
    });
    return found;
  }

  // First checks run at once; the ones after them are spread over the interval.
  void plan_first(const Registry::Backend& backend, std::size_t index) {
    if (find_plan(backend.epoch) != nullptr) return;
    Plan* plan = plans_.make(backend.epoch);
    if (plan == nullptr) throw std::bad_alloc();
    const Ns interval = registry_.settings().health.interval_ns;
    const auto share = static_cast<Ns>(index % registry_.backends().size() + 1);
    plan->next_check_ns = now_ + interval * share / static_cast<Ns>(registry_.backends().size());
    plan->next_resolve_ns = now_;
    guarded([&] {
      resolve_if_due(*plan, backend);
      check(*plan, backend);
    });
    arm(*plan);
  }

  void arm(Plan& plan) { wheel_.arm(plan.timer, std::min(plan.next_check_ns, plan.next_resolve_ns)); }

  void resolve_if_due(Plan& plan, const Registry::Backend& backend) {
    const HostPort& where = backend.settings.address;
    const bool is_name = backend.settings.kind != BackendKind::echo && !parse_address(where.host, where.port);
    if (!is_name || !hooks_.resolve) {
      plan.next_resolve_ns = kNever;
      return;
    }
    if (now_ < plan.next_resolve_ns) return;
    plan.next_resolve_ns = now_ + kResolveInterval;
    hooks_.resolve(where, backend.epoch);
  }

  bool wants_check(const Registry::Backend& backend) const {
    return registry_.settings().health.enabled || backend.settings.models.empty();
  }

  void check_now(std::uint64_t epoch) {
    Plan* plan = find_plan(epoch);
    const Registry::Backend* backend = registry_.find_epoch(epoch);
    if (plan != nullptr && backend != nullptr) check(*plan, *backend);
  }

  void check(Plan& plan, const Registry::Backend& backend) {
    if (plan.checking || !wants_check(backend)) return;
    if (!backend.address) {
      ProbeResult result;
      result.epoch = backend.epoch;
      result.reason = "its host name is not resolved";
      // The name was asked for a moment ago: the answer decides the first check.
      if (backend.health != Health::unknown) on_result(std::move(result));
      return;
    }
    const BackendSettings& from = backend.settings;
    ProbeOrder order;
    order.epoch = backend.epoch;
    order.kind = from.kind;
    order.address = *backend.address;
    order.host = host_of(from);
    order.base_path = from.base_path;
    if (!from.api_key.empty()) order.authorization = "Bearer " + from.api_key;
    order.wants_models = from.models.empty();
    order.timeout_ns = registry_.settings().health.timeout_ns;
    plan.checking = true;
    if (!guarded([&] { prober_.start(order, now_, [this](ProbeResult&& result) { on_result(std::move(result)); }); })) {
      plan.checking = false;
    }
  }

  void on_deadline(Handle token) {
    if (token.kind() == kProbeKind) {
      return prober_.on_deadline(token, [this](ProbeResult&& result) { on_result(std::move(result)); });
    }
    Plan* plan = plans_.get(token);
    if (plan == nullptr) return;
    const Registry::Backend* backend = registry_.find_epoch(plan->epoch);
    if (backend == nullptr) return plans_.destroy(token);
    guarded([&] {
      if (now_ >= plan->next_check_ns) {
        plan->next_check_ns = now_ + registry_.settings().health.interval_ns;
        check(*plan, *backend);
      }
      resolve_if_due(*plan, *backend);
    });
    arm(*plan);
  }

  void on_result(ProbeResult&& result) {
    if (Plan* plan = find_plan(result.epoch)) plan->checking = false;
    Registry::Backend* backend = registry_.find_epoch(result.epoch);
    if (backend == nullptr) return;
    if (result.out_of_memory) slab_.limit_hit(Limit::memory);
    if (result.out_of_memory && !result.passed) return;  // nothing is known of the backend: the next check tells
    if (result.passed) slab_.health_check(backend->id, result.round_trip_ns);
    if (result.models_cut) slab_.limit_hit(Limit::models);
    if (registry_.settings().health.enabled) note_health(*backend, result);
    if (result.models_read && registry_.set_models(*backend, std::move(result.models))) {
      dirty_ = true;
      log_.event(LogLevel::info, "backend's models changed",
                 {{"backend", backend->settings.name}, {"models", Digits(backend->discovered.size()).view()}});
    } else if (result.passed && !result.reason.empty()) {
      log_.event(LogLevel::warning, "backend's models are not known anew",
                 {{"backend", backend->settings.name}, {"why", result.reason}});
    }
  }

  void note_health(Registry::Backend& backend, const ProbeResult& result) {
    const Registry::Transition transition = registry_.note_check(backend, result.passed);
    if (!transition.changed) {
      if (!result.passed) {
        log_.event(LogLevel::debug, "health check failed",
                   {{"backend", backend.settings.name}, {"why", result.reason}});
      }
      return;
    }
    dirty_ = true;
    if (transition.to == Health::healthy) {
      log_.event(LogLevel::info, "backend is healthy", {{"backend", backend.settings.name}});
    } else {
      log_.event(LogLevel::warning, "backend is unhealthy",
                 {{"backend", backend.settings.name}, {"why", result.reason}});
    }
  }

  // ---- pages ----

  std::shared_ptr<const TextBuffer> render(PageKind kind) {
    try {
      const FleetView fleet = fleet_view();
      const LabelMode labels = registry_.settings().metrics.labels;
      note_dropped_lines();
      const ModelNames& models = registry_.model_names();
      const BackendNames& backends = registry_.backend_names();
      if (kind == PageKind::metrics) {
        metrics_shelf_.take_back(prometheus_page_.page());
        prometheus_page_.render(metrics_, fleet, hooks_.process_stats(), models, backends, labels);
        return metrics_shelf_.lend(prometheus_page_.page());
      }
      stats_shelf_.take_back(stats_page_);
      const Stats stats = collect_stats(metrics_, fleet, models, backends);
      kind == PageKind::stats ? write_stats(stats_page_, stats) : write_status_page(stats_page_, stats, kVersion);
      return stats_shelf_.lend(stats_page_);
    } catch (const std::bad_alloc&) {
      slab_.limit_hit(Limit::memory);
      return nullptr;
    }
  }

  void note_dropped_lines() {
    if (!hooks_.log_lines_dropped) return;
    const std::uint64_t dropped = hooks_.log_lines_dropped();
    if (dropped == lines_dropped_) return;
    slab_.log_dropped(dropped - lines_dropped_);
    slab_.limit_hit(Limit::log_volume);
    lines_dropped_ = dropped;
  }

  FleetView fleet_view() {
    FleetView fleet;
    for (const Registry::Backend& backend : registry_.backends()) {
      const bool healthy = backend.health == Health::healthy && backend.address.has_value();
      fleet.backends.push_back({backend.id, healthy});
      if (!healthy) continue;
      for (const std::string& model : backend.models()) {
        fleet.models_on_healthy.push_back(registry_.model_names().find(model));
      }
    }
    auto& models = fleet.models_on_healthy;
    std::sort(models.begin(), models.end());
    models.erase(std::unique(models.begin(), models.end()), models.end());
    fleet.models_available = models.size();
    fleet.uptime_ns = now_ - process_started_ns_;
    fleet.last_reload_ok = reload_ok_;
    fleet.last_reload_success_timestamp = static_cast<double>(reload_ok_at_ns_) / static_cast<double>(kSecond);
    fleet.version = kVersion;
    return fleet;
  }

  Net& net_;
  Metrics& metrics_;
  Slab& slab_;
  Admission& admission_;
  BodyBudget& budget_;
  Log log_;
  Hooks hooks_;
  Ns process_started_ns_;
  Ns now_;
  TimerWheel wheel_;
  BlockPool blocks_;
  JsonReader json_;
  Registry registry_;
  Prober<Net> prober_;
  SlotMap<Plan> plans_{kPlanKind};
  std::vector<Worker<Net>*> workers_;
  Mailbox<Message> mailbox_;
  std::vector<Message> messages_;
  std::array<Event, Net::kMaxEvents> events_;
  bool dirty_ = false;    // the workers' snapshot is not what the registry says
  Ns hold_until_ns_ = 0;  // it may wait so long for first checks
  bool stopped_ = false;
  bool reload_ok_ = true;
  Ns reload_ok_at_ns_ = 0;
  Ns again_at_ns_ = kNever;                    // for what there was no memory for
  std::shared_ptr<const Settings> reloading_;  // not taken over yet
  std::uint64_t lines_dropped_ = 0;
  PrometheusPage prometheus_page_;
  TextBuffer stats_page_;                       // also of the status page
  BufferRecycler metrics_shelf_, stats_shelf_;  // pages keep their room between scrapes
};

}  // namespace nexus
