// Nexus: one address for a fleet of OpenAI-compatible inference servers.
//
// A worker thread accepts a client's connection (worker.h), parses the request (head_parser.h, request_json.h), chooses
// a backend (router.h), sends the request over a kept connection (upstream_pool.h, exchange.h) and streams the response
// back while it counts the tokens (body_framing.h, usage_scan.h, slab.h). The control thread (control.h) checks the
// backends, resolves their names and renders the pages; the log thread (log_thread.h) writes the log. This file is the
// command line; daemon.h starts and stops the threads.

#include <fcntl.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "nexus/apps/check.h"
#include "nexus/apps/top.h"
#include "nexus/config/parser.h"
#include "nexus/daemon.h"
#include "nexus/net/tls.h"

namespace nexus {
namespace {

constexpr const char* kDefaultConfig = "/etc/nexus/nexus.conf";

// EX_CONFIG of sysexits.h: a restart does not help, so the service manager should not try one.
constexpr int kBadConfiguration = 78;

constexpr std::string_view kHelp =
    R"(usage: nexus [-c FILE]        run the gateway (default FILE: /etc/nexus/nexus.conf)
       nexus -t [FILE]        check the configuration and exit
       nexus check [FILE]     probe each backend of FILE once and print the results
       nexus reload PID       make a running Nexus read its file again, and wait for the outcome
       nexus top [URL]        watch a running Nexus (default http://127.0.0.1:8000)
       nexus --demo [--port N] [--tls]
                              serve a built-in model on 127.0.0.1:8000, without a file; with --tls also on
                              8443, or N + 443
       nexus --version
       nexus --help
--env-file ENV reads variables for api_key_env, as the systemd service does.
Signals: TERM and INT drain and stop (a second one stops at once), HUP reloads FILE.
See nexus(8) and nexus.conf(5).
)";

constexpr std::string_view kDemoConfig = R"([backend demo]
type = echo
models = echo
token_delay = 20ms
)";

constexpr std::uint64_t kDemoTlsPort = 443;  // behind that of --port: 8443 by default

struct Options {
  int (*run)(const Options&);
  std::string config = kDefaultConfig;
  std::string env_file{};                     // empty: the process's own environment alone
  std::string url = "http://127.0.0.1:8000";  // for top
  std::string pid{};                          // for reload
  bool tls = false;                           // for --demo
  std::string port = "8000";                  // the same
};

std::int64_t wall_seconds() { return wall_now() / kSecond; }

// Adds what is wrong with the certificates. `expired_ones` may be used: at the start a gateway with an old certificate
// is better than none. A reload keeps the one that is in use, and is not refused because of it.
enum class ExpiredOnes : bool { refused, used };
ConfigResult with_tls(ConfigResult result, ExpiredOnes expired_ones, const std::string& file) {
  if (!result.ok()) return result;
  for (TlsProblem& problem : make_tls(result.settings, wall_seconds(), file)) {
    if (problem.is_date && expired_ones == ExpiredOnes::used) continue;
    result.errors.push_back(std::move(problem.error));
  }
  return result;
}

int check_fleet(const Options& options);

bool same_certificates(const GivenPairs& a, const GivenPairs& b) {
  const std::string key = "[server] tls_certificate (content)";
  const auto in_a = a.find(key), in_b = b.find(key);
  return in_a != a.end() && in_b != b.end() && in_a->second == in_b->second;
}

// `in_use`: by a reload, of the configuration in use.
ConfigResult read_config(const Options& options, ExpiredOnes expired_ones, const GivenPairs& in_use = {}) {
  ConfigEnvironment environment = system_environment();
  if (options.run != check_fleet) environment.append_problem = append_problem;  // who checks backends writes no log
  if (!options.env_file.empty()) {
    std::string text;
    if (std::string problem = config::read_text(environment, options.env_file, text); !problem.empty()) {
      return {{}, {{options.env_file, 0, problem}}};
    }
    environment = config::with_variables(std::move(environment), config::read_environment_file(text));
  }
  ConfigResult result = load_config(options.config, environment);
  if (same_certificates(in_use, result.settings.given)) expired_ones = ExpiredOnes::used;
  return with_tls(std::move(result), expired_ones, options.config);
}

// Nothing if the file has errors, which are printed then.
std::optional<Settings> read_settings(const Options& options, ExpiredOnes expired_ones = ExpiredOnes::refused) {
  ConfigResult result = read_config(options, expired_ones);
  bool lacks_variable = false;
  for (const ConfigError& error : result.errors) {
    std::fprintf(stderr, "%s\n", error.to_string().c_str());
    lacks_variable |= error.message.ends_with(config::kNoVariable);
  }
  if (lacks_variable && options.env_file.empty()) {
    std::fprintf(stderr, "nexus: to read the variables of the systemd service: --env-file /etc/nexus/environment\n");
  }
  if (!result.ok()) return std::nullopt;
  return std::move(result.settings);
}

int test_config(const Options& options) {
  const std::optional<Settings> settings = read_settings(options);
  if (!settings) return 1;
  for (const std::string& names : backends_with_one_label(*settings)) {
    std::printf("%s: warning: %s: %s\n", options.config.c_str(), std::string(kOneLabel).c_str(), names.c_str());
  }
  std::printf("%s: ok\n", options.config.c_str());
  return 0;
}

// Exit status: 0 all backends are good, 1 some are not, 2 the check could not run.
int check_fleet(const Options& options) {
  const std::optional<Settings> settings = read_settings(options);
  if (!settings) return 2;
  signal(SIGPIPE, SIG_IGN);
  FleetCheck check(*settings);
  const std::vector<CheckState>* states = check.run();
  if (states == nullptr) {
    std::fprintf(stderr, "nexus: epoll: %s\n", strerror(errno));
    return 2;
  }
  std::fputs(check_table(*states).c_str(), stdout);
  const std::vector<std::string> dangling = dangling_names(*settings, *states);
  for (const std::string& remark : dangling) std::printf("%s\n", remark.c_str());
  return all_good(*states) && dangling.empty() ? 0 : 1;
}

int watch(const Options& options) {
  const std::string url = options.url.find("://") == std::string::npos ? "http://" + options.url : options.url;
  const std::string text = "[backend top]\nurl = " + url + "\n";
  ConfigResult result = with_tls(parse_config(text, "top", system_environment()), ExpiredOnes::used, "top");
  if (!result.ok()) {
    const std::string& problem = result.errors.front().message;
    std::fprintf(stderr, "nexus: %s: %s\n", escape_for_terminal(options.url, 200).c_str(), problem.c_str());
    return 2;
  }
  BackendSettings watched = std::move(result.settings.backends.front());
  signal(SIGPIPE, SIG_IGN);
  watched.api_key = system_environment().get_env("NEXUS_API_KEY").value_or("");
  return Top(watched, url).run();
}

// Exit status: 0 the file is in force, 1 it was refused or there was no answer.
int reload(const Options& options) {
  const std::optional<std::uint64_t> pid = parse_decimal(options.pid);
  if (!pid || *pid == 0 || *pid > INT32_MAX) {
    std::fprintf(stderr, "nexus: reload needs the process id of a running nexus\n");
    return 2;
  }
  const ReloadOutcome outcome = request_reload(static_cast<pid_t>(*pid));
  for (std::string_view rest = outcome.text; !rest.empty();) {
    const std::string line = escape_for_terminal(config::take_line(rest), 8000);
    std::fprintf(outcome.in_force ? stdout : stderr, "%s\n", line.c_str());
  }
  return outcome.in_force ? 0 : 1;
}

void print_demo(const std::string& address) {
  const char* at = address.c_str();
  std::printf(
      "Nexus answers on http://%s with a built-in model, `echo`. Try:\n\n"
      "  curl http://%s/v1/models\n"
      "  curl http://%s/v1/chat/completions -d '{\"model\":\"echo\",\"messages\":[{\"role\":\"user\",\"content\":"
      "\"Hello, Nexus\"}]}'\n"
      "  curl -N http://%s/v1/chat/completions -d "
      "'{\"model\":\"echo\",\"stream\":true,\"messages\":[{\"role\":\"user\","
      "\"content\":\"One word at a time\"}]}'\n\n"
      "The counters are at http://%s/metrics and /v1/stats. Ctrl-C stops.\n",
      at, at, at, at, at);
  std::fflush(stdout);
}

void print_demo_tls(const DemoCertificate& certificate, const std::string& address) {
  std::printf(
      "\nThe same over TLS, with a certificate that was made just now (SHA-256 %s):\n\n"
      "  curl -k https://%s/v1/models\n",
      certificate.fingerprint.c_str(), address.c_str());
  std::fflush(stdout);
}

using Addresses = std::vector<std::string>;

// `read` is called again for each reload, `ready` once it serves. `mover`: the option that chooses the addresses;
// empty: the file does.
int serve(Settings settings, const Daemon::ReadConfig& read, const std::function<void(const Addresses&)>& ready,
          std::string_view mover = {}) {
  Daemon daemon(std::make_shared<const Settings>(std::move(settings)));
  if (const std::string why = daemon.start(mover); !why.empty()) {
    daemon.stop();
    std::fprintf(stderr, "nexus: %s\n", why.c_str());
    return 1;
  }
  ready(daemon.addresses());
  daemon.serve(read);
  daemon.stop();
  return 0;
}

int serve_file(const Options& options) {
  const auto read = [&](const GivenPairs& in_use) { return read_config(options, ExpiredOnes::refused, in_use); };
  std::optional<Settings> settings = read_settings(options, ExpiredOnes::used);
  if (settings) return serve(std::move(*settings), read, [](const Addresses&) {});
  if (options.config == kDefaultConfig) std::fprintf(stderr, "nexus: --demo needs no file\n");
  return kBadConfiguration;
}

int serve_demo(const Options& options) {
  const std::optional<DemoCertificate> certificate = options.tls ? make_demo_certificate() : std::nullopt;
  if (options.tls && !certificate) {
    std::fprintf(stderr, "nexus: no certificate could be made: %s\n", tls::library_error().c_str());
    return 1;
  }
  ConfigEnvironment environment = system_environment();
  environment.read_file = [&](const std::string&) { return std::optional(certificate->pem); };
  const std::uint64_t port = parse_decimal(options.port).value_or(0);
  const std::string tls_address = "127.0.0.1:" + std::to_string(port == 0 ? 0 : port + kDemoTlsPort);
  const std::string tls_lines = "tls_listen = " + tls_address + "\ntls_certificate = demo\n";
  const std::string text =
      std::string(kDemoConfig) + "[server]\nlisten = 127.0.0.1:" + options.port + "\n" + (options.tls ? tls_lines : "");
  const auto read = [&](const GivenPairs&) {
    return with_tls(parse_config(text, "demo", environment), ExpiredOnes::used, "demo");
  };
  ConfigResult first = read({});
  if (!first.ok()) {
    std::fprintf(stderr, "nexus: --port %s: %s\n", escape_for_terminal(options.port).c_str(),
                 first.errors.front().message.c_str());
    return 2;
  }
  return serve(
      std::move(first.settings), read,
      [&](const Addresses& addresses) {
        print_demo(addresses.front());
        if (certificate) print_demo_tls(*certificate, addresses.back().substr(std::string_view("tls ").size()));
      },
      options.tls ? "--port N, and TLS goes to N + 443" : "--port N");
}

int print_version(const Options&) {
  std::printf("nexus %s (%s)\n", std::string(kVersion).c_str(), tls_library().c_str());
  return 0;
}

int print_help(const Options&) {
  std::fwrite(kHelp.data(), 1, kHelp.size(), stdout);
  return 0;
}

// Opens those of stdin, stdout and stderr that are closed: a socket would get their number, and a client the log.
void open_standard_descriptors() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(fd, F_GETFD) != -1) continue;
    if (open("/dev/null", O_RDWR) == -1)
      open("/", O_RDONLY | O_DIRECTORY);  // no /dev: it can be neither read nor written
  }
}

// c-ares 1.18 numbers its DNS queries by rand() where there is no /dev/urandom: without a seed, alike at every start.
void seed_rand() {
  unsigned seed = 0;
  if (getrandom(&seed, sizeof seed, 0) == sizeof seed) std::srand(seed);
}

int run(int argc, char** argv) {
  open_standard_descriptors();
  seed_rand();
  constexpr std::pair<std::string_view, int (*)(const Options&)> kFlags[] = {
      {"-t", test_config},   {"--demo", serve_demo}, {"--version", print_version},
      {"-V", print_version}, {"--help", print_help}, {"-h", print_help}};
  Options options{serve_file};
  const std::string_view command = argc > 1 ? argv[1] : "";
  std::string* operand = nullptr;  // may follow, once
  if (command == "top") {
    options.run = watch;
    operand = &options.url;
  } else if (command == "reload") {
    options.run = reload;
    operand = &options.pid;
  } else if (command == "check") {
    options.run = check_fleet;
    operand = &options.config;
  }
  for (int i = operand == nullptr ? 1 : 2; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto* flag =
        std::find_if(std::begin(kFlags), std::end(kFlags), [&](const auto& each) { return each.first == argument; });
    if (argument == "--tls" && options.run == serve_demo) {
      options.tls = true;
    } else if (flag != std::end(kFlags)) {
      options.run = flag->second;
      if (options.run == test_config) operand = &options.config;
    } else if (argument == "--port" && options.run == serve_demo && i + 1 < argc) {
      options.port = argv[++i];
    } else if ((argument == "-c" || argument == "--env-file") && i + 1 < argc) {
      (argument == "-c" ? options.config : options.env_file) = argv[++i];
    } else if (!argument.starts_with('-') && operand != nullptr) {
      *std::exchange(operand, nullptr) = argument;
    } else {
      const bool is_file = argument == "-c" || argument == "--env-file";
      const std::string wrong = is_file ? argument + " needs a file" : "unknown argument: " + argument;
      std::fprintf(stderr, "nexus: %s\n%s", wrong.c_str(), std::string(kHelp).c_str());
      return 2;
    }
  }
  return options.run(options);
}

}  // namespace
}  // namespace nexus

int main(int argc, char** argv) { return nexus::run(argc, argv); }
