// Nexus: one address for a fleet of OpenAI-compatible inference servers.
//
// A worker thread accepts a client's connection (worker.h), parses the request (head_parser.h, request_json.h), chooses
// a backend (router.h), sends the request over a kept connection (upstream_pool.h, exchange.h) and streams the response
// back while it counts the tokens (body_framing.h, usage_scan.h, slab.h). The control thread (control.h) checks the
// backends, resolves their names and renders the pages; the log thread (log_thread.h) writes the log. This file is the
// command line; daemon.h starts and stops the threads.

#include <cstdio>
#include <cstring>
#include <string>

#include "nexus/apps/check.h"
#include "nexus/apps/top.h"
#include "nexus/config/parser.h"
#include "nexus/daemon.h"

namespace nexus {
namespace {

constexpr const char* kDefaultConfig = "/etc/nexus/nexus.conf";

constexpr std::string_view kHelp =
    R"(usage: nexus [-c FILE]        run the gateway (default FILE: /etc/nexus/nexus.conf)
       nexus -t [-c FILE]     check the configuration and exit
       nexus check [-c FILE]  probe each backend of FILE once and print the results
       nexus top [URL]        watch a running Nexus (default http://127.0.0.1:8000)
       nexus --demo           serve a built-in model on 127.0.0.1:8000, without a file
       nexus --version
       nexus --help
Signals: TERM and INT drain and stop (a second one stops at once), HUP reloads FILE.
See nexus(8) and nexus.conf(5).
)";

constexpr std::string_view kDemoConfig = R"([backend demo]
type = echo
models = echo
token_delay = 20ms
)";

enum class Mode { serve, test_config, check_fleet, top, demo, version, help, wrong };

struct Options {
  Mode mode = Mode::serve;
  std::string config = kDefaultConfig;
  std::string url = "http://127.0.0.1:8000";  // for top
  std::string wrong;                          // error message of Mode::wrong
};

Options read_options(int argc, char** argv) {
  Options options;
  const std::string_view command = argc > 1 ? argv[1] : "";
  int first = 1;
  if (command == "top") {
    options.mode = Mode::top;
    if (argc > 2) options.url = argv[2];
    first = 3;
  } else if (command == "check") {
    options.mode = Mode::check_fleet;
    first = 2;
  }
  for (int i = first; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "-c" && i + 1 < argc) {
      options.config = argv[++i];
    } else if (argument == "-t") {
      options.mode = Mode::test_config;
    } else if (argument == "--demo") {
      options.mode = Mode::demo;
    } else if (argument == "--version" || argument == "-V") {
      options.mode = Mode::version;
    } else if (argument == "--help" || argument == "-h") {
      options.mode = Mode::help;
    } else {
      options.mode = Mode::wrong;
      options.wrong = argument == "-c" ? "-c needs a file" : "unknown argument: " + std::string(argument);
      return options;
    }
  }
  return options;
}

ConfigResult read_config(const Options& options) {
  if (options.mode == Mode::demo) return parse_config(kDemoConfig, "demo", system_environment());
  return load_config(options.config, system_environment());
}

void print_errors(const ConfigResult& result) {
  for (const ConfigError& error : result.errors) std::fprintf(stderr, "%s\n", error.to_string().c_str());
}

int test_config(const Options& options) {
  const ConfigResult result = read_config(options);
  print_errors(result);
  if (result.ok()) std::printf("%s: ok\n", options.config.c_str());
  return result.ok() ? 0 : 1;
}

// Exit status: 0 all backends are good, 1 some are not, 2 the check could not run.
int check_fleet(const Options& options) {
  const ConfigResult result = read_config(options);
  print_errors(result);
  if (!result.ok()) return 2;
  signal(SIGPIPE, SIG_IGN);
  FleetCheck check(result.settings);
  const std::vector<CheckState>* states = check.run();
  if (states == nullptr) {
    std::fprintf(stderr, "nexus: epoll: %s\n", strerror(errno));
    return 2;
  }
  const std::string table = check_table(*states);
  std::fwrite(table.data(), 1, table.size(), stdout);
  return all_good(*states) ? 0 : 1;
}

int watch(const Options& options) {
  BackendSettings watched;
  if (const std::string problem = config::parse_url(options.url, watched); !problem.empty()) {
    std::fprintf(stderr, "nexus: %s: %s\n", escape_for_terminal(options.url, 200).c_str(), problem.c_str());
    return 2;
  }
  signal(SIGPIPE, SIG_IGN);
  watched.api_key = process_variable("NEXUS_API_KEY").value_or("");
  return Top(watched, options.url).run();
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

int serve(const Options& options) {
  ConfigResult first = read_config(options);
  if (!first.ok()) {
    print_errors(first);
    if (options.config == kDefaultConfig) std::fprintf(stderr, "nexus: --demo needs no file\n");
    return 1;
  }
  Daemon daemon(std::make_shared<const Settings>(std::move(first.settings)));
  if (const std::string why = daemon.start(); !why.empty()) {
    daemon.stop();
    std::fprintf(stderr, "nexus: %s\n", why.c_str());
    return 1;
  }
  if (options.mode == Mode::demo) print_demo(daemon.addresses().front());
  daemon.serve([&]() -> std::shared_ptr<Settings> {
    ConfigResult next = read_config(options);
    if (next.ok()) return std::make_shared<Settings>(std::move(next.settings));
    for (const ConfigError& error : next.errors) {
      daemon.log().event(LogLevel::error, "reload failed, keeping the old configuration",
                         {{"error", error.to_string()}});
    }
    return nullptr;
  });
  daemon.stop();
  return 0;
}

int run(int argc, char** argv) {
  const Options options = read_options(argc, argv);
  switch (options.mode) {
    case Mode::serve:
    case Mode::demo: return serve(options);
    case Mode::test_config: return test_config(options);
    case Mode::check_fleet: return check_fleet(options);
    case Mode::top: return watch(options);
    case Mode::version: std::printf("nexus %s\n", std::string(kVersion).c_str()); return 0;
    case Mode::help: std::fwrite(kHelp.data(), 1, kHelp.size(), stdout); return 0;
    case Mode::wrong:
      std::fprintf(stderr, "nexus: %s\n%s", options.wrong.c_str(), std::string(kHelp).c_str());
      return 2;
  }
  return 2;
}

}  // namespace
}  // namespace nexus

int main(int argc, char** argv) { return nexus::run(argc, argv); }
