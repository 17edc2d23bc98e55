// systemd_test.cpp
// Goal:   the service manager's messages, watchdog and passed sockets work as systemd does it.
// Method: real sockets, with the test in the manager's place; the whole daemon if build/nexus is beside this program.
#include "nexus/os/systemd.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <array>
#include <charconv>
#include <fstream>
#include <map>
#include <thread>
#include <vector>

#include "nexus/net/epoll.h"

using namespace nexus;

namespace {

GetVariable variables(std::map<std::string, std::string> values) {
  return [values = std::move(values)](const std::string& name) -> std::optional<std::string> {
    const auto at = values.find(name);
    if (at == values.end()) return std::nullopt;
    return at->second;
  };
}

std::string scratch_directory() {
  char path[] = "/tmp/nexus-notify-XXXXXX";
  REQUIRE(mkdtemp(path) != nullptr);
  return path;
}

// The service manager's end.
class Manager {
 public:
  explicit Manager(const std::string& name) : name_(name) {
    socket_ = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_un at{};
    at.sun_family = AF_UNIX;
    REQUIRE(name.size() < sizeof at.sun_path);
    std::memcpy(at.sun_path, name.data(), name.size());
    if (name[0] == '@') at.sun_path[0] = '\0';
    const std::size_t bytes = offsetof(sockaddr_un, sun_path) + name.size() + (name[0] == '@' ? 0 : 1);
    REQUIRE(::bind(socket_, reinterpret_cast<const sockaddr*>(&at), static_cast<socklen_t>(bytes)) == 0);
  }
  ~Manager() {
    ::close(socket_);
    if (name_[0] == '/') ::unlink(name_.c_str());
  }

  // The next message, or nothing after `limit`.
  std::string hear(Ns limit = 10 * kSecond) {
    pollfd entry{socket_, POLLIN, 0};
    if (::poll(&entry, 1, static_cast<int>(limit / kMillisecond)) != 1) return {};
    std::array<char, 4096> text;
    const ssize_t bytes = ::recv(socket_, text.data(), text.size(), 0);
    return {text.data(), static_cast<std::size_t>(bytes)};
  }

  // The next message that begins with `beginning`; others are passed over.
  std::string hear_of(const std::string& beginning) {
    for (;;) {
      const std::string message = hear();
      if (message.empty() || message.rfind(beginning, 0) == 0) return message;
    }
  }

 private:
  std::string name_;
  int socket_;
};

// A daemon of our own, with these variables and, where >= 0, `passed` as its descriptor 3.
class Child {
 public:
  Child(const std::string& binary, const std::string& config, std::vector<std::string> environment, int passed) {
    environment.push_back("LISTEN_PID=          ");  // the number is known in the child alone
    std::vector<char*> pointers;
    for (std::string& one : environment) pointers.push_back(one.data());
    pointers.push_back(nullptr);
    std::string* pid_variable = &environment.back();
    std::vector<std::string> words{binary, "-c", config};
    std::vector<char*> arguments;
    for (std::string& one : words) arguments.push_back(one.data());
    arguments.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      char* digits = pid_variable->data() + std::strlen("LISTEN_PID=");
      char* end = std::to_chars(digits, digits + 10, getpid()).ptr;
      *end = '\0';
      const int null = ::open("/dev/null", O_RDWR);
      ::dup2(null, 2);
      if (passed >= 0) {
        if (passed == kFirstPassedDescriptor) ::fcntl(passed, F_SETFD, 0);
        if (passed != kFirstPassedDescriptor) ::dup2(passed, kFirstPassedDescriptor);
      }
      ::execve(binary.c_str(), arguments.data(), pointers.data());
      _exit(127);
    }
  }
  ~Child() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
  }
  pid_t pid() const { return pid_; }
  void signal(int number) { ::kill(pid_, number); }
  int exit_code() {
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

 private:
  pid_t pid_;
};

// The daemon built beside this program, or what runs it in an emulator (tests/run.sh), or an empty text.
std::string daemon_binary() {
  std::array<char, 4096> path{};
  const ssize_t bytes = ::readlink("/proc/self/exe", path.data(), path.size() - 1);
  if (bytes <= 0) return {};
  std::string folder(path.data(), static_cast<std::size_t>(bytes));
  for (int up = 0; up < 2; ++up) {
    folder.resize(folder.rfind('/'));
    for (const char* name : {"/nexus-emulated", "/nexus"}) {
      if (::access((folder + name).c_str(), X_OK) == 0) return folder + name;
    }
  }
  return {};
}

std::string write_config(const std::string& folder, const std::string& text) {
  const std::string path = folder + "/nexus.conf";
  std::ofstream(path) << text;
  return path;
}

const std::string kBackend = "[backend b]\nurl = http://127.0.0.1:1\n";

// The status line of GET `path` there, or an empty text.
std::string ask(const Address& address, const std::string& path) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_port = htons(address.port);
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string text;
  if (::connect(fd, reinterpret_cast<sockaddr*>(&at), sizeof at) == 0) {
    const timeval limit{20, 0};
    ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    const std::string request = "GET " + path + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    if (::send(fd, request.data(), request.size(), MSG_NOSIGNAL) > 0) {
      std::array<char, 2048> piece;
      for (ssize_t n; (n = ::recv(fd, piece.data(), piece.size(), 0)) > 0;) {
        text.append(piece.data(), static_cast<std::size_t>(n));
      }
    }
  }
  ::close(fd);
  return text.substr(0, text.find('\r'));
}

EpollNet::Opened listen_anywhere() {
  const EpollNet::Opened opened = EpollNet::listen(*parse_address("127.0.0.1", 0));
  REQUIRE(opened.outcome == SocketOutcome::ok);
  return opened;
}

TEST_CASE("a message reaches a socket that is a file, and one in the abstract namespace") {
  const std::string folder = scratch_directory();
  for (const std::string& name : {folder + "/socket", "@nexus-notify-test-" + std::to_string(getpid())}) {
    CAPTURE(name);
    Manager manager(name);
    Notifier notifier(name);
    CHECK(notifier.ready("serving"));
    CHECK(manager.hear() == "READY=1\nSTATUS=serving");
    CHECK(notifier.reloading(1'234'567'899));
    CHECK(manager.hear() == "RELOADING=1\nMONOTONIC_USEC=1234567");
    CHECK(notifier.stopping("draining"));
    CHECK(manager.hear() == "STOPPING=1\nSTATUS=draining");
    CHECK(notifier.alive());
    CHECK(manager.hear() == "WATCHDOG=1");
  }
  ::rmdir(folder.c_str());
}

TEST_CASE("where nobody listens, telling says so and harms nothing") {
  CHECK_FALSE(Notifier(std::nullopt).send("READY=1"));
  for (const char* path : {"", "@", "relative", "vsock:2:1", "/nonexistent/nexus-test"}) {
    CAPTURE(path);
    CHECK_FALSE(Notifier(std::string(path)).send("READY=1"));
  }
  CHECK_FALSE(Notifier("/" + std::string(200, 'x')).send("READY=1"));
}

TEST_CASE("stderr is the journal if JOURNAL_STREAM names that very file, and not if the variable was inherited") {
  int ends[2];
  REQUIRE(pipe2(ends, O_CLOEXEC) == 0);
  struct stat status {};
  REQUIRE(fstat(ends[1], &status) == 0);
  const std::string device = std::to_string(status.st_dev), inode = std::to_string(status.st_ino);
  CHECK(is_journal(device + ":" + inode, ends[1]));
  for (const std::string& other :
       {device + ":1", "1:" + inode, device + ":", device, std::string(), std::string("x:y")}) {
    CAPTURE(other);
    CHECK_FALSE(is_journal(other, ends[1]));
  }
  CHECK_FALSE(is_journal(std::nullopt, ends[1]));
  close(ends[0]);
  close(ends[1]);
  CHECK_FALSE(is_journal(device + ":" + inode, ends[1]));
}

TEST_CASE("the watchdog's limit is taken where it is meant for this process, and is a number") {
  struct Row {
    std::map<std::string, std::string> set;
    Ns expected;
  };
  const std::vector<Row> rows{
      {{}, 0},
      {{{"WATCHDOG_USEC", "30000000"}}, 30 * kSecond},
      {{{"WATCHDOG_USEC", "30000000"}, {"WATCHDOG_PID", "77"}}, 30 * kSecond},
      {{{"WATCHDOG_USEC", "30000000"}, {"WATCHDOG_PID", "78"}}, 0},
      {{{"WATCHDOG_USEC", "soon"}}, 0},
      {{{"WATCHDOG_USEC", "-1"}}, 0},
      {{{"WATCHDOG_USEC", "9223372036854775807"}}, 0},
  };
  for (const Row& row : rows) CHECK(watchdog_limit_ns(variables(row.set), 77) == row.expected);
}

TEST_CASE("the watchdog is due at half the limit, and only while every loop answers") {
  Watchdog watchdog(2, 8 * kSecond, 0);
  std::array<std::vector<Heartbeat>, 2> asked;
  const auto post = [&](std::size_t loop, const Heartbeat& heartbeat) { asked[loop].push_back(heartbeat); };
  CHECK(watchdog.due(0, post));  // no heartbeat was sent before
  CHECK(watchdog.next() == 4 * kSecond);
  CHECK_FALSE(watchdog.due(4 * kSecond - 1, post));
  asked[0].back().answer();
  CHECK_FALSE(watchdog.due(4 * kSecond, post));  // the second hangs
  CHECK(asked[0].size() == 1);                   // and gets no second heartbeat
  const Ns soon = watchdog.next();
  CHECK(soon > 4 * kSecond);
  CHECK(soon < 5 * kSecond);
  asked[1].back().answer();
  CHECK(watchdog.due(soon, post));
  CHECK(asked[0].size() == 2);
  CHECK(asked[1].size() == 2);
  watchdog.loop_ended(1);  // ended on purpose
  asked[0].back().answer();
  CHECK(watchdog.due(soon + 4 * kSecond, post));
}

TEST_CASE("without a limit the watchdog is never due") {
  Watchdog watchdog(1, 0, 0);
  CHECK(watchdog.next() == kNever);
  CHECK_FALSE(watchdog.due(1000 * kSecond, [](std::size_t, const Heartbeat&) { FAIL("asked"); }));
}

TEST_CASE("sockets are taken where they were passed to this process, with their names, and do not block") {
  const int first = 700;
  EpollNet::Opened opened = listen_anywhere();
  REQUIRE(::dup2(opened.socket.fd, first) == first);
  REQUIRE(::dup2(opened.socket.fd, first + 1) == first + 1);
  ::fcntl(first, F_SETFL, ::fcntl(first, F_GETFL) & ~O_NONBLOCK);
  const auto taken = [&](const std::map<std::string, std::string>& environment) {
    std::vector<PassedSocket> sockets;
    CHECK(passed_sockets(variables(environment), 5, sockets, first) == "");
    return sockets;
  };
  const std::vector<PassedSocket> passed =
      taken({{"LISTEN_PID", "5"}, {"LISTEN_FDS", "2"}, {"LISTEN_FDNAMES", "nexus.socket:metrics"}});
  REQUIRE(passed.size() == 2);
  CHECK(passed[0].fd == first);
  CHECK(passed[0].name == "nexus.socket");
  CHECK(passed[1].name == "metrics");
  CHECK((::fcntl(first, F_GETFL) & O_NONBLOCK) != 0);
  CHECK(::fcntl(first, F_GETFD) == FD_CLOEXEC);
  CHECK(taken({{"LISTEN_PID", "6"}, {"LISTEN_FDS", "2"}}).empty());
  CHECK(taken({{"LISTEN_FDS", "2"}}).empty());
  CHECK(taken({}).empty());
  CHECK(taken({{"LISTEN_PID", "5"}, {"LISTEN_FDS", "1"}})[0].name == "");
  ::close(first);
  ::close(first + 1);
  EpollNet().close(opened.socket);
}

TEST_CASE("what is passed but no listening TCP socket is refused, by name of its descriptor") {
  const int first = 710;
  const auto refuse = [&](int from, const char* count) {
    REQUIRE(::dup2(from, first) == first);
    std::vector<PassedSocket> sockets;
    std::string why = passed_sockets(variables({{"LISTEN_PID", "5"}, {"LISTEN_FDS", count}}), 5, sockets, first);
    ::close(first);
    CHECK(why != "");
    return why;
  };
  const int datagram = ::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  const int local = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int idle = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  for (const int fd : {datagram, local, idle, 0}) {
    CHECK(refuse(fd, "1").find("descriptor 710") != std::string::npos);
  }
  for (const char* count : {"", "x", "-1", "65"}) CHECK(refuse(idle, count).find("LISTEN_FDS") != std::string::npos);
  for (const int fd : {datagram, local, idle}) ::close(fd);
}

TEST_CASE("the daemon says ready, reloading, alive and stopping, and serves on a passed socket over a restart") {
  const std::string binary = daemon_binary();
  if (binary.empty()) {
    MESSAGE("skipped: no nexus stands beside this program");
    return;
  }
  // Goal: the whole course of a service. Method: this test is systemd: it holds the listening socket, starts the daemon
  // twice with it, and hears what it says. A connection made between the two is answered by the second.
  const std::string folder = scratch_directory();
  const std::string text = "[server]\nlisten = 127.0.0.1:1\nthreads = 2\n" + kBackend;
  const std::string config = write_config(folder, text);
  // Each text with what the status says of it; the last one is right again.
  const std::string failed = "; reload failed, keeping the old configuration: " + config;
  const std::string other = "[server]\nlisten = 127.0.0.1:2\nmetrics_listen = 127.0.0.1:3\nthreads = 3\n" + kBackend;
  const std::vector<std::pair<std::string, std::string>> reloads{
      {other,
       "; reloaded, except: listen (not in use: the service manager passes its sockets), metrics_listen (needs a "
       "restart; still none), threads (needs a restart; still 2)"},
      {"", failed + ":1: no [backend NAME] section; at least one is needed"},
      {"[server]\nthreads = two\n" + kBackend, failed + ":2: threads: expected a number, 0 to 256, not 'two'"},
      {text, ""}};
  Manager manager(folder + "/notify");
  EpollNet::Opened listening = listen_anywhere();
  const std::vector<std::string> environment{"NOTIFY_SOCKET=" + folder + "/notify", "LISTEN_FDS=1",
                                             "LISTEN_FDNAMES=nexus.socket", "WATCHDOG_USEC=400000"};
  std::string health_between;
  std::thread between;
  for (const bool second : {false, true}) {
    Child daemon(binary, config, environment, listening.socket.fd);
    const std::string ready = manager.hear_of("READY=1");
    CHECK(ready.find("STATUS=serving on " + to_string(listening.peer)) != std::string::npos);
    CHECK(ask(listening.peer, "/health").find("HTTP/1.1 503") == 0);  // its backend is down
    CHECK(manager.hear_of("WATCHDOG=1") == "WATCHDOG=1");
    CHECK(manager.hear_of("WATCHDOG=1") == "WATCHDOG=1");
    daemon.signal(SIGHUP);
    CHECK(manager.hear_of("RELOADING=1\nMONOTONIC_USEC=") != "");
    CHECK(manager.hear_of("READY=1") == ready);
    for (const auto& [text, note] : reloads) {
      write_config(folder, text);
      daemon.signal(SIGHUP);
      CHECK(manager.hear_of("READY=1") == ready + note);
    }
    if (second) {
      between.join();
      CHECK(health_between.find("HTTP/1.1 503") == 0);
    }
    daemon.signal(SIGTERM);
    CHECK(manager.hear_of("STOPPING=1") != "");
    CHECK(daemon.exit_code() == 0);
    if (!second) between = std::thread([&] { health_between = ask(listening.peer, "/health"); });
  }
  EpollNet().close(listening.socket);
  ::unlink(config.c_str());
  ::unlink((folder + "/notify").c_str());
  ::rmdir(folder.c_str());
}

TEST_CASE("the daemon says ready after a reload when its new settings are in force, not before") {
  const std::string binary = daemon_binary();
  if (binary.empty()) {
    MESSAGE("skipped: no nexus stands beside this program");
    return;
  }
  // Method: a backend that accepts and never answers keeps the workers on the old settings for kMaxReloadHold.
  const std::string folder = scratch_directory();
  EpollNet::Opened silent = listen_anywhere(), listening = listen_anywhere();
  const std::string head = "[server]\nlisten = 127.0.0.1:1\nthreads = 2\n" + kBackend;
  const std::string config = write_config(folder, head);
  Manager manager(folder + "/notify");
  Child daemon(binary, config, {"NOTIFY_SOCKET=" + folder + "/notify", "LISTEN_FDS=1"}, listening.socket.fd);
  REQUIRE(manager.hear_of("READY=1") != "");
  CHECK(ask(listening.peer, "/metrics") == "HTTP/1.1 200 OK");
  write_config(folder, head + "[backend c]\nurl = http://" + to_string(silent.peer) + "\n[metrics]\nenabled = no\n");
  daemon.signal(SIGHUP);
  REQUIRE(manager.hear_of("READY=1") != "");
  CHECK(ask(listening.peer, "/metrics") == "HTTP/1.1 503 Service Unavailable");
  daemon.signal(SIGTERM);
  CHECK(daemon.exit_code() == 0);
  for (EpollNet::Opened* opened : {&silent, &listening}) EpollNet().close(opened->socket);
  ::unlink(config.c_str());
  ::unlink((folder + "/notify").c_str());
  ::rmdir(folder.c_str());
}

}  // namespace
