// daemon.h
// Owns:     the running process: sockets, threads and their order of life; what a signal does to them.
// Promises: what can fail at the start fails before any thread runs, with one line that says what; a stop joins every
//           thread and writes out the log; a reload never drops a connection or a count.
// Leaves:   the command line and reading the configuration to nexus.cpp.
// Threads:  the main thread's.
#pragma once

#include <sched.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/resource.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "nexus/apps/echo_backend.h"
#include "nexus/base/threads.h"
#include "nexus/net/resolver.h"
#include "nexus/os/log_thread.h"
#include "nexus/os/seccomp.h"
#include "nexus/os/systemd.h"
#include "nexus/server/control.h"
#include "nexus/server/worker.h"

namespace nexus {

// The signals that the main thread waits for; every thread blocks them, so that no handler and no flag is needed.
constexpr int kWorkerDone = SIGUSR1;
constexpr Ns kLastAccepts = 50 * kMillisecond;  // after the drain begins

inline sigset_t daemon_signals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, kWorkerDone}) sigaddset(&set, signal);
  return set;
}

class Daemon {
 public:
  explicit Daemon(std::shared_ptr<const Settings> settings)
      : settings_(std::move(settings)),
        started_ns_(monotonic_now()),
        journald_(std::getenv("JOURNAL_STREAM") != nullptr),
        budget_(settings_->server.body_memory_bytes),
        admission_([this](std::uint32_t worker, Handle session) { peers_.workers[worker]->grant(session); }),
        shared_{metrics_, breaker_, admission_, budget_, in_flight_, instance_name()} {}
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  // Opens the listening sockets and starts every thread. What failed, or an empty text.
  std::string start() {
    const sigset_t signals = daemon_signals();
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    signal(SIGPIPE, SIG_IGN);
    raise_descriptor_limit();
    if (std::string why = open_listeners(); !why.empty()) return why;
    log_ = make_log();
    if (const int error = log_writer_.reconfigure(settings_->log.access)) {
      return "access log " + settings_->log.access + ": " + strerror(error);
    }
    if (std::string why = make_control(); !why.empty()) return why;
    if (std::string why = make_workers(); !why.empty()) return why;
    return start_threads();
  }

  // Serves until told to stop. `reload` reads the configuration again: nothing where it is bad, which it has logged.
  template <class ReadSettings>
  void serve(ReadSettings&& read_settings) {
    notifier_.ready(status());
    for (;;) {
      switch (wait_signal(kNever)) {
        case SIGHUP: reload(read_settings); break;
        case SIGTERM:
        case SIGINT: return drain();
        default: break;  // a worker cannot be done before it was asked to
      }
    }
  }

  // Joins everything and writes the log out.
  void stop() {
    for (auto& worker : workers_) deliver<Worker<EpollNet>::Stop>(*worker);
    for (std::thread& thread : worker_threads_) thread.join();
    worker_threads_.clear();
    if (control_thread_.joinable()) {
      deliver<Control<EpollNet>::Stop>(*control_);
      control_thread_.join();
    }
    if (resolver_) resolver_->stop();
    workers_.clear();  // closes what is left, and counts it
    for (Listening& listening : listeners_) EpollNet().close(listening.socket);
    listeners_.clear();
    log_.event(LogLevel::info, "stopped");
    log_writer_.stop();
  }

  Log& log() { return log_; }
  const std::vector<std::string>& addresses() const { return addresses_; }

 private:
  struct Listening {
    EpollNet::Socket socket;
    bool metrics_only;
    bool passed;  // by the service manager, which keeps it: who connects now is served by the next process
  };

  static std::string instance_name() {
    std::uint32_t bits = 0;
    if (getrandom(&bits, sizeof bits, 0) != sizeof bits) bits = static_cast<std::uint32_t>(monotonic_now());
    std::string digits(Digits(bits, 16).view());
    return "nexus-" + std::string(8 - digits.size(), '0') + digits;
  }

  // As many descriptors as the host allows: each request may need two.
  static void raise_descriptor_limit() {
    rlimit limit{};
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);  // not allowed: then what there is must do
  }

  Log make_log() { return Log(log_writer_.add_ring(), log_config(settings_->log, journald_)); }

  std::string open_listeners() {
    const PassedSockets passed = passed_sockets(process_variable, getpid());
    if (!passed.error.empty()) return passed.error;
    const bool for_metrics = std::any_of(passed.sockets.begin(), passed.sockets.end(),
                                         [](const PassedSocket& socket) { return socket.name == "metrics"; });
    if (for_metrics && settings_->server.metrics_listen.empty()) {
      return "a socket named metrics was passed, but metrics_listen is not set: the pages would stand on both";
    }
    for (const bool metrics_only : {false, true}) {
      if (adopt(passed, metrics_only)) continue;
      const ServerSettings& server = settings_->server;
      for (const HostPort& where : metrics_only ? server.metrics_listen : server.listen) {
        const std::optional<Address> address = parse_address(where.host, where.port);
        const std::string name = host_port(where.host, where.port);
        if (!address) return "cannot listen on " + name + ": not a numeric address";
        const EpollNet::Opened opened = EpollNet::listen(*address);
        if (opened.outcome != SocketOutcome::ok) {
          std::string why = "cannot listen on " + name + ": " + strerror(opened.error);
          if (opened.error == EADDRINUSE) why += " (is another nexus running? change `listen` or stop it)";
          return why;
        }
        listeners_.push_back({opened.socket, metrics_only, false});
        addresses_.push_back((metrics_only ? "metrics " : "") + to_string(opened.peer));
      }
    }
    return {};
  }

  // Takes over the sockets that the service manager opened in place of `listen`, or, named `metrics`, of
  // `metrics_listen`: they are there before this process and after it, so a restart turns no connection away.
  bool adopt(const PassedSockets& passed, bool metrics_only) {
    bool any = false;
    for (const PassedSocket& socket : passed.sockets) {
      if ((socket.name == "metrics") != metrics_only) continue;
      any = true;
      listeners_.push_back({EpollNet::Socket{socket.fd}, metrics_only, true});
      addresses_.push_back((metrics_only ? "metrics " : "") +
                           to_string(EpollNet::local_address(EpollNet::Socket{socket.fd})) + " (passed)");
    }
    return any;
  }

  std::string make_control() {
    if (const int error = control_net_.open()) return std::string("epoll: ") + strerror(error);
    Control<EpollNet>::Hooks hooks;
    hooks.resolve = [this](const HostPort& where, std::uint64_t epoch) { resolve(where, epoch); };
    hooks.echo_address = [this](const BackendSettings& backend) { return echo_address(backend); };
    hooks.log_lines_dropped = [this] {
      return log_writer_.dropped(LogDestination::events) + log_writer_.dropped(LogDestination::access);
    };
    control_ = std::make_unique<Control<EpollNet>>(control_net_, metrics_, metrics_.add_slab(), admission_, budget_,
                                                   make_log(), std::move(hooks), started_ns_);
    snapshot_ = control_->begin(settings_);
    return {};
  }

  std::uint32_t worker_count() const {
    if (settings_->server.threads > 0) return settings_->server.threads;
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    return static_cast<std::uint32_t>(std::max(1, CPU_COUNT(&set)));
  }

  std::string make_workers() {
    const std::uint32_t count = worker_count();
    peers_.placement.loads = std::vector<WorkerLoad>(count);
    peers_.ask_page = [this](std::uint32_t worker, Handle session, PageKind kind) {
      using Posted = Control<EpollNet>::Posted;
      return control_->post(Control<EpollNet>::AskPage{worker, session, kind}) != Posted::no_memory;
    };
    for (std::uint32_t i = 0; i < count; ++i) {
      EpollNet& net = nets_.emplace_back();
      if (const int error = net.open()) return std::string("epoll: ") + strerror(error);
      std::uint64_t seed = 0;
      if (getrandom(&seed, sizeof seed, 0) != sizeof seed) seed = static_cast<std::uint64_t>(monotonic_now()) + i;
      workers_.push_back(std::make_unique<Worker<EpollNet>>(net, shared_, metrics_.add_slab(), make_log(), i, seed,
                                                            snapshot_, peers_, started_ns_));
      peers_.workers.push_back(workers_.back().get());
      for (const Listening& listening : listeners_) {
        if (!workers_.back()->add_listener(listening.socket, listening.metrics_only)) return "epoll: no memory";
      }
    }
    control_->set_workers(peers_.workers);
    snapshot_.reset();
    return {};
  }

  std::string start_threads() {
    constexpr const char* kNoThread = "no thread can be started: is the system's limit reached?";
    if (!log_writer_.start()) return kNoThread;
    const Ns watchdog_ns = watchdog_limit_ns(process_variable, getpid());
    pulse_ = std::make_unique<Watchdog>(workers_.size() + 1, watchdog_ns, monotonic_now());
    control_thread_ = start_thread("nexus-control", [this] { control_->run(); });
    if (!control_thread_.joinable()) return kNoThread;
    const pthread_t main_thread = pthread_self();
    for (std::size_t i = 0; i < workers_.size(); ++i) {
      worker_threads_.push_back(start_thread("nexus-worker", [this, main_thread, i] {
        workers_[i]->run();
        pulse_->over(i);
        workers_done_.fetch_add(1, std::memory_order_release);
        pthread_kill(main_thread, kWorkerDone);
      }));
      if (!worker_threads_.back().joinable()) return kNoThread;
    }
    // The last step: every socket is bound and every thread of the start runs, and none of them can ask for more now.
    if (const std::string why = enter_sandbox(); !why.empty()) {
      log_.event(LogLevel::warning, "system calls are not limited", {{"why", why}});
    }
    for (const std::string& address : addresses_) log_.event(LogLevel::info, "listening", {{"address", address}});
    return {};
  }

  // Posts what must arrive: where memory is short, as soon as there is some.
  template <class Message, class Loop, class... Parts>
  static void deliver(Loop& loop, const Parts&... parts) {
    constexpr timespec kPause{0, 10 * kMillisecond};
    while (loop.post(Message{parts...}) == Loop::Posted::no_memory) nanosleep(&kPause, nullptr);
  }

  // ---- hooks of the control thread ----

  void resolve(const HostPort& where, std::uint64_t epoch) {
    using Resolved = Control<EpollNet>::Resolved;
    if (!resolver_) {
      resolver_ = std::make_unique<Resolver>([this](std::uint64_t id, std::vector<Address> all, std::string error) {
        control_->post(Resolved{id, std::move(all), std::move(error)});
      });
    }
    if (!resolver_->lookup(where.host, where.port, epoch)) {
      control_->post(Resolved{epoch, {}, "too many lookups wait, or no thread can be had"});
    }
  }

  // The loopback address of a built-in backend, started on first use. A changed one is another server.
  std::optional<Address> echo_address(const BackendSettings& backend) {
    EchoOptions options;
    if (!backend.models.empty()) options.models = backend.models;
    options.token_delay_ns = backend.token_delay_ns;
    auto& echo = echoes_[backend.name];
    echo = std::make_unique<EchoServer>(options);
    if (echo->start() != 0) {
      echo.reset();
      return std::nullopt;
    }
    return echo->address();
  }

  // ---- signals ----

  // The next signal, or 0 when `deadline` has come first. Meanwhile the service manager hears that all is well.
  int wait_signal(Ns deadline) {
    const sigset_t signals = daemon_signals();
    for (;;) {
      beat();
      const Ns until = std::min(deadline, pulse_->next());
      int signal = 0;
      if (until == kNever) {
        signal = sigwaitinfo(&signals, nullptr);
      } else {
        const Ns left = std::max<Ns>(until - monotonic_now(), 0);
        const timespec wait{left / kSecond, left % kSecond};
        signal = sigtimedwait(&signals, nullptr, &wait);
        if (signal < 0 && errno == EAGAIN) {
          if (monotonic_now() >= deadline) return 0;
          continue;
        }
      }
      if (signal > 0) return signal;
      assert(errno == EINTR);
    }
  }

  // The last loop is the control thread's, the others are the workers', in their order.
  void beat() {
    const bool well = pulse_->due(monotonic_now(), [this](std::size_t loop, const Heartbeat& ping) {
      using ByWorker = Worker<EpollNet>::Posted;
      using ByControl = Control<EpollNet>::Posted;
      const bool lost = loop < workers_.size() ? workers_[loop]->post(ping) == ByWorker::no_memory
                                               : control_->post(ping) == ByControl::no_memory;
      if (lost) ping.answer();  // that memory is short is not the loop's fault
    });
    if (well) notifier_.alive();
  }

  // For systemctl status.
  std::string status() const {
    std::string text = "serving on";
    for (const std::string& address : addresses_) text += " " + address;
    return text;
  }

  template <class ReadSettings>
  void reload(ReadSettings&& read_settings) {
    notifier_.reloading(monotonic_now());
    take_settings(read_settings());
    notifier_.ready(status());
  }

  void take_settings(std::shared_ptr<const Settings> next) {
    if (next == nullptr) return deliver<Control<EpollNet>::ReloadFailed>(*control_);
    if (next->server.listen != settings_->server.listen || next->server.threads != settings_->server.threads ||
        next->server.metrics_listen != settings_->server.metrics_listen) {
      log_.event(LogLevel::warning, "listen, metrics_listen and threads change with a restart only");
    }
    // A rotated access log is opened anew, whatever else the file says.
    if (const int error = log_writer_.reconfigure(next->log.access)) {
      log_.event(LogLevel::error, "the access log cannot be opened: the old one is kept",
                 {{"path", next->log.access}, {"why", strerror(error)}});
    }
    settings_ = next;
    log_.configure(log_config(settings_->log, journald_));
    deliver<Control<EpollNet>::Reload>(*control_, next);
    log_.event(LogLevel::info, "reloaded");
  }

  // Ends when every stream has, when drain_timeout has passed, or at the next signal.
  void drain() {
    notifier_.stopping("draining");
    log_.event(LogLevel::info, "draining");
    for (auto& worker : workers_) deliver<Worker<EpollNet>::Drain>(*worker);
    const Ns began = monotonic_now();
    const Ns deadline = deadline_after(began, settings_->server.drain_timeout_ns);
    bool refusing = false;
    while (workers_done_.load(std::memory_order_acquire) < workers_.size()) {
      // The workers take what has come so far; then new connections are refused, rather than left to wait for the end.
      const int signal = wait_signal(refusing ? deadline : std::min(deadline, began + kLastAccepts));
      if (!refusing && monotonic_now() >= began + kLastAccepts) {
        refusing = true;
        for (const Listening& listening : listeners_) {
          if (!listening.passed) EpollNet::refuse_connections(listening.socket);
        }
      }
      if (signal == 0 && monotonic_now() < deadline) continue;
      if (signal == SIGTERM || signal == SIGINT || signal == 0) {
        log_.event(LogLevel::warning, signal == 0 ? "drain_timeout has passed" : "told again to stop");
        return;
      }
    }
  }

  std::shared_ptr<const Settings> settings_;
  Ns started_ns_;
  bool journald_;
  Notifier notifier_{process_variable("NOTIFY_SOCKET")};
  LogWriter log_writer_;  // before all that logs: it goes last
  Log log_;
  Metrics metrics_;
  CircuitBreaker breaker_;
  BodyBudget budget_;
  std::atomic<std::uint32_t> in_flight_{0};
  Worker<EpollNet>::Peers peers_;
  Admission admission_;
  Shared shared_;
  std::vector<Listening> listeners_;
  std::vector<std::string> addresses_;
  std::map<std::string, std::unique_ptr<EchoServer>> echoes_;  // the control thread's once it runs
  EpollNet control_net_;
  std::unique_ptr<Control<EpollNet>> control_;
  std::unique_ptr<Resolver> resolver_;  // the control thread's
  SnapshotPtr snapshot_;
  std::deque<EpollNet> nets_;  // a worker's, at a fixed place
  std::vector<std::unique_ptr<Worker<EpollNet>>> workers_;
  std::atomic<std::size_t> workers_done_{0};
  std::unique_ptr<Watchdog> pulse_;
  std::thread control_thread_;
  std::vector<std::thread> worker_threads_;
};

}  // namespace nexus
