// daemon.h
// Owns:     the running process: listening sockets, threads, the order of their start and end, and signals.
// Promises: start() reports an error of the configuration or the system in one line, before any thread serves; stop()
//           joins every thread and writes the log out; a reload drops no connection and no count.
// Leaves:   the command line and the configuration file to nexus.cpp.
// Threads:  the main thread.
// Tested by: tests/systemd_test.cpp, tests/e2e/lifecycle.test.mjs, tests/e2e/systemd.test.mjs, tests/e2e/cli.test.mjs
#pragma once

#include <sched.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/resource.h>

#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "nexus/apps/echo_backend.h"
#include "nexus/base/limits.h"
#include "nexus/base/mailbox.h"
#include "nexus/config/changes.h"
#include "nexus/config/parser.h"
#include "nexus/os/log_thread.h"
#include "nexus/os/reload.h"
#include "nexus/os/seccomp.h"
#include "nexus/os/systemd.h"
#include "nexus/server/control_checks.h"
#include "nexus/server/risks.h"
#include "nexus/server/worker.h"

namespace nexus {

constexpr int kWorkerDone = SIGUSR1;  // a worker's thread ended

// The signals that the main thread waits for. All threads block them, so there are no signal handlers.
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
        journald_(is_journal(environment_("JOURNAL_STREAM"), STDERR_FILENO)),
        budget_(settings_->server.body_memory_bytes),
        admission_([this](std::uint32_t worker, Handle session) { peers_.workers[worker]->grant(session); }),
        shared_{metrics_, admission_, budget_, in_flight_, instance_name()} {}
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  // Opens the listening sockets and starts every thread. Returns what failed, or an empty text. `mover`: what chooses
  // the addresses in place of nexus.conf.
  std::string start(std::string_view mover = {}) {
    const sigset_t signals = daemon_signals();
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);  // as process 1 of a container it inherits children: they leave no zombies
    raise_descriptor_limit();
    if (std::string why = open_listeners(mover); !why.empty()) return why;
    log_ = make_log();
    if (const int error = log_writer_.reconfigure(settings_->log.access)) {
      return "access log " + settings_->log.access + ": " + strerror(error);
    }
    if (std::string why = make_loops(); !why.empty()) return why;
    return start_threads();
  }

  // Reads the configuration again, where this one is in use.
  using ReadConfig = std::function<ConfigResult(const GivenPairs& in_use)>;
  // Serves until SIGTERM or SIGINT.
  void serve(const ReadConfig& read_config) {
    notifier_.ready(status_);
    warn_of_settings();
    for (;;) {
      const int signal = wait_signal(next_expiry_look_ns_);
      if (signal == 0) warn_of_expiry();
      if (signal == SIGHUP) reload(read_config);
      if (signal == SIGTERM || signal == SIGINT) return drain();
    }
  }

  // Joins all threads and writes the log out.
  void stop() {
    for (auto& worker : workers_) deliver<Worker<EpollNet>::Stop>(*worker);
    for (std::thread& thread : worker_threads_) {
      if (thread.joinable()) thread.join();  // not if start() failed there
    }
    worker_threads_.clear();
    if (control_thread_.joinable()) {
      deliver<Control<EpollNet>::Stop>(*control_, !at_once_);
      control_thread_.join();
    }
    workers_.clear();  // closes and counts the connections that are left
    for (Listening& listening : listeners_) EpollNet().close(listening.socket);
    listeners_.clear();
    log_.event(LogLevel::info, "stopped");
    log_writer_.stop();
  }

  const std::vector<std::string>& addresses() const { return addresses_; }

 private:
  // A key of nexus.conf that lists addresses, and the name of the sockets that a service manager passes instead.
  struct ListenKey {
    std::string_view key, socket_name;
    std::vector<HostPort> ServerSettings::*addresses;
    ListenerUse use;
  };
  static constexpr std::array<ListenKey, 3> kListenKeys{{
      {"listen", "", &ServerSettings::listen, {}},
      {"tls_listen", "tls", &ServerSettings::tls_listen, {.tls = true}},
      {"metrics_listen", "metrics", &ServerSettings::metrics_listen, {.metrics_only = true}},
  }};

  struct Listening {
    EpollNet::Socket socket;
    const ListenKey* key;
    bool passed;  // by the service manager, which keeps it open: the next process accepts what waits in its backlog
  };

  static std::string instance_name() {
    const Digits digits(std::uint64_t{1} << 32 | (random_bits() & UINT32_MAX), 16);  // the 1 keeps the leading zeros
    return std::string("nexus-").append(digits.view().substr(1));
  }

  static std::uint64_t random_bits() {
    std::uint64_t bits = 0;
    if (getrandom(&bits, sizeof bits, 0) != sizeof bits) bits = static_cast<std::uint64_t>(monotonic_now());
    return bits;
  }

  // Raises the soft limit on descriptors to the hard one: a request may need two.
  static void raise_descriptor_limit() {
    rlimit limit{};
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);  // if this fails, the old limit stays
  }

  void warn_of_few_descriptors() {
    rlimit limit{};
    const std::uint64_t needed = descriptors_needed(*settings_, workers_.size());
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= needed) return;
    log_.event(
        LogLevel::warning,
        "the limit on file descriptors is below what nexus.conf may need: raise it (LimitNOFILE=, ulimit -n), or "
        "lower max_connections",
        {{"needed", Digits(needed).view()},
         {"limit", Digits(limit.rlim_cur).view()},
         {"max_connections", Digits(settings_->server.max_connections).view()}});
  }

  void warn_of_settings() {
    warn_of_expiry();
    warn_of_risks(log_, *settings_);
  }

  void warn_of_expiry() {
    next_expiry_look_ns_ = deadline_after(monotonic_now(), kExpiryLook);
    if (settings_->server.tls != nullptr) nexus::warn_of_expiry(log_, *settings_->server.tls, wall_now());
  }

  Log make_log() { return Log(log_writer_.add_ring(), settings_->log, journald_); }

  static const ListenKey& key_of_socket(std::string_view name) {
    const auto found = std::find_if(kListenKeys.begin(), kListenKeys.end(),
                                    [&](const ListenKey& key) { return key.socket_name == name; });
    return found == kListenKeys.end() ? kListenKeys[0] : *found;
  }

  // Uses the sockets that the service manager passed instead of `listen`, and those named `metrics` or `tls` instead of
  // `metrics_listen` and `tls_listen`: they stay open over a restart, so that no connection is refused meanwhile.
  std::string open_listeners(std::string_view mover) {
    std::vector<PassedSocket> passed;
    if (std::string why = passed_sockets(environment_, getpid(), passed); !why.empty()) return why;
    const ServerSettings& server = settings_->server;
    for (const PassedSocket& socket : passed) {
      const ListenKey& key = key_of_socket(socket.name);
      if ((server.*key.addresses).empty()) {
        return "systemd passed a socket named " + socket.name + ", but " + std::string(key.key) + " is not set";
      }
      add_listener({socket.fd}, key, true);
    }
    for (const ListenKey& key : kListenKeys) {
      const bool passed_here = std::any_of(passed.begin(), passed.end(), [&](const PassedSocket& socket) {
        return &key_of_socket(socket.name) == &key;
      });
      if (passed_here) continue;
      for (const HostPort& where : server.*key.addresses) {
        if (std::string why = listen_on(where, key, mover); !why.empty()) return why;
      }
    }
    return {};
  }

  std::string listen_on(const HostPort& where, const ListenKey& key, std::string_view mover) {
    const std::string failed = "cannot listen on " + config::address_text(where) + ": ";
    const std::optional<Address> address = parse_address(where.host, where.port);
    if (!address) return failed + "not a numeric address";
    const EpollNet::Opened opened = EpollNet::listen(*address);
    if (opened.outcome == SocketOutcome::ok) {
      add_listener(opened.socket, key, false);
      return {};
    }
    if (opened.error != EADDRINUSE) return failed + strerror(opened.error);
    const std::string move = mover.empty() ? "change `" + std::string(key.key) + "`" : "use " + std::string(mover);
    return failed + strerror(opened.error) + " (is another nexus running? " + move + ", or stop it)";
  }

  void add_listener(EpollNet::Socket socket, const ListenKey& key, bool passed) {
    listeners_.push_back({socket, &key, passed});
    addresses_.push_back(std::string(key.socket_name) + (key.socket_name.empty() ? "" : " ") +
                         to_string(EpollNet::local_address(socket)) + (passed ? " (passed)" : ""));
    status_ += " " + addresses_.back();
  }

  std::uint32_t worker_count() const {
    if (settings_->server.threads > 0) return settings_->server.threads;
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    return static_cast<std::uint32_t>(std::max(1, CPU_COUNT(&set)));
  }

  std::string make_loops() {
    if (const int error = control_net_.open()) return std::string("epoll: ") + strerror(error);
    Control<EpollNet>::Hooks hooks;
    hooks.echo_address = [this](const BackendSettings& backend) { return echo_address(backend); };
    hooks.instance = shared_.instance;
    hooks.pages.log_lines_dropped = [this] { return log_writer_.dropped(); };
    control_ = std::make_unique<Control<EpollNet>>(control_net_, metrics_, metrics_.add_slab(false), admission_,
                                                   budget_, make_log(), std::move(hooks), started_ns_);
    const SnapshotPtr snapshot = control_->begin(settings_);
    const std::uint32_t count = worker_count();
    peers_.placement.loads = std::vector<WorkerLoad>(count);
    peers_.ask_page = [this](std::uint32_t worker, Handle session, std::uint32_t number, WantedPage page) {
      return control_->post(Control<EpollNet>::AskPage{worker, session, number, std::move(page)}) !=
             Control<EpollNet>::Posted::no_memory;
    };
    shared_.ask_check = [this](BackendId backend) { control_->post(Control<EpollNet>::CheckSoon{backend}); };
    for (std::uint32_t i = 0; i < count; ++i) {
      EpollNet& net = nets_.emplace_back();
      if (const int error = net.open()) return std::string("epoll: ") + strerror(error);
      workers_.push_back(std::make_unique<Worker<EpollNet>>(net, shared_, metrics_.add_slab(), make_log(), i,
                                                            random_bits() + i, snapshot, peers_, started_ns_));
      peers_.workers.push_back(workers_.back().get());
      for (const Listening& listening : listeners_) {
        if (!workers_.back()->add_listener(listening.socket, listening.key->use)) return "epoll: no memory";
      }
    }
    control_->set_workers(peers_.workers);
    return {};
  }

  std::string start_threads() {
    constexpr const char* kNoThread = "cannot start a thread: is the limit on threads reached?";
    if (!log_writer_.start()) return kNoThread;
    const Ns watchdog_ns = watchdog_limit_ns(environment_, getpid());
    watchdog_ = std::make_unique<Watchdog>(workers_.size() + 1, watchdog_ns, monotonic_now());
    control_thread_ = start_thread(kControlThread, [this] { control_->run(); });
    if (!control_thread_.joinable()) return kNoThread;
    const pthread_t main_thread = pthread_self();
    for (std::size_t i = 0; i < workers_.size(); ++i) {
      worker_threads_.push_back(start_thread("nexus-worker", [this, main_thread, i] {
        workers_[i]->run();
        watchdog_->loop_ended(i);
        workers_done_.fetch_add(1, std::memory_order_release);
        pthread_kill(main_thread, kWorkerDone);
      }));
      if (!worker_threads_.back().joinable()) return kNoThread;
    }
    // Last, because opening the sockets and starting the threads needs system calls that serving does not.
    if (const std::string why = enter_sandbox(); !why.empty()) {
      log_.event(LogLevel::warning, "seccomp sandbox not active", {{"why", why}});
    }
    warn_of_few_descriptors();
    for (const std::string& address : addresses_) log_.event(LogLevel::info, "listening", {{"address", address}});
    return {};
  }

  // Posts a message that must not be lost: waits until there is memory for it.
  template <class Message, class Loop, class... Parts>
  static void deliver(Loop& loop, const Parts&... parts) {
    constexpr timespec kPause{0, 10 * kMillisecond};
    while (loop.post(Message{parts...}) == Loop::Posted::no_memory) nanosleep(&kPause, nullptr);
  }

  // Starts a built-in backend, or gives the running one its new settings; returns its address on loopback, or nullopt.
  std::optional<Address> echo_address(const BackendSettings& backend) {
    EchoOptions options{.token_delay_ns = backend.token_delay_ns};
    if (!backend.models.empty()) options.models = backend.models;
    auto& echo = echoes_[backend.name];
    if (echo) {
      echo->configure(std::move(options));
    } else {
      echo = std::make_unique<EchoServer>(std::move(options));
      if (echo->start() != 0) echo.reset();
    }
    return echo ? std::optional(echo->address()) : std::nullopt;
  }

  // ---- signals ----

  // Returns the next signal, or 0 at `deadline`. Meanwhile it serves the service manager's watchdog.
  int wait_signal(Ns deadline) {
    const sigset_t signals = daemon_signals();
    for (;;) {
      beat();
      const Ns until = std::min(deadline, watchdog_->next());
      const Ns left = std::clamp<Ns>(until - monotonic_now(), 0, 3600 * kSecond);
      const timespec wait{left / kSecond, left % kSecond};
      siginfo_t info{};
      const int signal = sigtimedwait(&signals, &info, &wait);
      if (signal == SIGHUP) ticket_ = ReloadTicket(info);
      if (signal > 0) return signal;
      assert(errno == EAGAIN || errno == EINTR);
      if (errno == EAGAIN && monotonic_now() >= deadline) return 0;
    }
  }

  // Heartbeats go to the workers' loops, in order, and then to the control thread's.
  void beat() {
    const bool well = watchdog_->due(monotonic_now(), [this](std::size_t index, const Heartbeat& heartbeat) {
      const auto is_lost = [&]<class Loop>(Loop& loop) { return loop.post(heartbeat) == Loop::Posted::no_memory; };
      const bool lost = index < workers_.size() ? is_lost(*workers_[index]) : is_lost(*control_);
      if (lost) heartbeat.answer();  // a lack of memory does not mean that the loop hangs
    });
    if (well) notifier_.alive();
  }

  void reload(const ReadConfig& read_config) {
    notifier_.reloading(monotonic_now());
    // First, and whatever the configuration says: the file may have been rotated.
    open_access_log(settings_->log.access);
    ConfigResult next = read_config(settings_->given);
    if (next.ok()) change_access_log(next);
    const bool ok = next.ok();
    const std::string changed = ok ? describe_changes(settings_->given, next.settings.given) : "";
    std::string note = ok ? take_settings(std::move(next.settings)) : refuse_settings(next.errors);
    deliver<Control<EpollNet>::Reload>(*control_, ok ? settings_ : nullptr);
    const bool in_force = wait_until_in_force();
    if (ok) log_reload(in_force, note, changed);
    if (ok && !in_force) note = "reload not in force yet, see the log" + (note.empty() ? "" : "; " + note);
    notifier_.ready(note.empty() ? status_ : status_ + "; " + note.substr(0, note.find('\n')));
    ticket_.answer({ok && in_force, note.empty() ? "reloaded" : note});
  }

  // Workers get the new settings once the first checks of new backends are done. `systemctl reload` returns after that.
  bool wait_until_in_force() {
    constexpr timespec kPause{0, 2 * kMillisecond};
    const Ns deadline = monotonic_now() + kReloadWait;
    while (control_->in_force() != settings_.get() && monotonic_now() < deadline && !is_to_stop()) {
      beat();
      nanosleep(&kPause, nullptr);
    }
    return control_->in_force() == settings_.get();
  }

  static bool is_to_stop() {
    sigset_t pending;
    return sigpending(&pending) == 0 && (sigismember(&pending, SIGTERM) == 1 || sigismember(&pending, SIGINT) == 1);
  }

  void open_access_log(const std::string& path) {
    if (const int error = log_writer_.reconfigure(path)) {
      log_.event(LogLevel::error, "cannot open the access log, keeping the old one",
                 {{"path", path}, {"why", strerror(error)}});
    }
  }

  // With the other path, before anything else changes: a FIFO without a reader is known to be unfit only now.
  void change_access_log(ConfigResult& next) {
    const std::string& path = next.settings.log.access;
    const int error = path == settings_->log.access ? 0 : log_writer_.reconfigure(path);
    if (error != 0) next.errors.push_back({"access log " + path, 0, strerror(error)});
  }

  // Both return what `nexus reload` prints of this reload; its first line is for `systemctl status`.
  std::string refuse_settings(const std::vector<ConfigError>& errors) {
    constexpr std::string_view kFailed = "reload failed, keeping the old configuration";
    for (const ConfigError& error : errors) log_.event(LogLevel::error, kFailed, {{"error", error.to_string()}});
    std::string note = std::string(kFailed) + ": " + errors.front().to_string();
    for (std::size_t i = 1; i < errors.size() && note.size() < kMaxReloadNote; ++i)
      note += '\n' + errors[i].to_string();
    return note;
  }
  std::string take_settings(Settings next) {
    const std::string kept = keep_until_restart(next.server);
    const std::uint64_t needed_before = descriptors_needed(*settings_, workers_.size());
    settings_ = std::make_shared<const Settings>(std::move(next));
    log_.configure(settings_->log);
    if (descriptors_needed(*settings_, workers_.size()) > needed_before) warn_of_few_descriptors();
    warn_of_settings();
    return kept.empty() ? "" : "reloaded, except: " + kept;
  }
  // `note`: of take_settings(). All workers have the new settings if they are in force.
  void log_reload(bool in_force, const std::string& note, const std::string& changed) {
    constexpr std::string_view kLate = "reload not in force yet: new backends are checked, or a line above says why";
    const std::string_view said = !in_force ? kLate : note.empty() ? "reloaded" : std::string_view(note);
    log_.event(in_force && note.empty() ? LogLevel::info : LogLevel::warning, said, {{"changed", changed}});
  }

  // Puts back the settings that only a restart can change, so that all threads see the values in use, and lists them.
  std::string keep_until_restart(ServerSettings& next) const {
    std::string list;
    const auto keep = [&](auto& value, const auto& in_use, std::string_view name, const std::string& text) {
      if (std::exchange(value, in_use) == in_use) return;
      list += (list.empty() ? "" : ", ") + std::string(name) + " (" + text + ")";
    };
    const std::string kRestart = "needs a restart; still ";
    const auto in_use = [&](const ListenKey& key) {
      const bool passed = std::any_of(listeners_.begin(), listeners_.end(),
                                      [&](const Listening& one) { return one.passed && one.key == &key; });
      if (passed) return std::string("not in use: the service manager passes its sockets");
      std::string text;
      for (const HostPort& each : settings_->server.*key.addresses) text += " " + config::address_text(each);
      return kRestart + (text.empty() ? "none" : text.substr(1));
    };
    const ServerSettings& now = settings_->server;
    for (const ListenKey& row : kListenKeys) keep(next.*row.addresses, now.*row.addresses, row.key, in_use(row));
    keep(next.threads, now.threads, "threads", kRestart + std::to_string(workers_.size()));
    // A TLS listener that stays keeps its certificates, too: without any it would speak in clear.
    if (next.tls == nullptr) next.tls = now.tls;
    return list;
  }

  // Returns once every worker has ended, at drain_timeout, or at a second signal.
  void drain() {
    notifier_.stopping("draining");
    log_.event(LogLevel::info, "draining");
    for (auto& worker : workers_) deliver<Worker<EpollNet>::Drain>(*worker);
    const Ns began = monotonic_now();
    const Ns deadline = deadline_after(began, settings_->server.drain_timeout_ns);
    Ns refuse_at = began + kLastAccepts;
    while (workers_done_.load(std::memory_order_acquire) < workers_.size()) {
      // First the workers accept what waits in the backlog; then new connections are refused at once.
      const int signal = wait_signal(std::min(deadline, refuse_at));
      if (monotonic_now() >= refuse_at) {
        refuse_at = kNever;
        for (const Listening& listening : listeners_) {
          if (!listening.passed) EpollNet::refuse_connections(listening.socket);
        }
      }
      if (signal == SIGHUP) {
        open_access_log(settings_->log.access);
        ticket_.answer({false, "draining: only the access log was opened again"});
      }
      if (signal == 0 && monotonic_now() < deadline) continue;
      if (signal == SIGTERM || signal == SIGINT || signal == 0) {
        log_.event(LogLevel::warning, signal == 0 ? "drain_timeout reached, closing remaining connections"
                                                  : "second signal: stopping now");
        at_once_ = signal != 0;
        return;
      }
    }
  }

  std::shared_ptr<const Settings> settings_;  // of the last reload, except those that need a restart
  Ns started_ns_;
  const GetVariable environment_ = system_environment().get_env;
  bool journald_;
  Notifier notifier_{environment_("NOTIFY_SOCKET")};
  LogWriter log_writer_;  // declared before all that logs: destroyed last
  Log log_;
  Metrics metrics_;
  BodyBudget budget_;
  std::atomic<std::uint32_t> in_flight_{0};
  Worker<EpollNet>::Peers peers_;
  Admission admission_;
  Shared shared_;
  std::vector<Listening> listeners_;
  std::vector<std::string> addresses_;
  Ns next_expiry_look_ns_ = kNever;
  bool at_once_ = false;                                       // stop() is not to wait for anything
  ReloadTicket ticket_;                                        // of the last SIGHUP
  std::string status_ = "serving on";                          // shown by systemctl status
  std::map<std::string, std::unique_ptr<EchoServer>> echoes_;  // used by the control thread once it runs
  EpollNet control_net_;
  std::unique_ptr<Control<EpollNet>> control_;
  std::deque<EpollNet> nets_;  // one per worker, at fixed addresses
  std::vector<std::unique_ptr<Worker<EpollNet>>> workers_;
  std::atomic<std::size_t> workers_done_{0};
  std::unique_ptr<Watchdog> watchdog_;
  std::thread control_thread_;
  std::vector<std::thread> worker_threads_;
};

}  // namespace nexus
