// reload.h
// Owns:     the request of `nexus reload` to a running daemon, and the daemon's answer.
// Promises: the answer is that of a reload which began after the request, and it comes once. Only a process that may
//           signal the daemon can ask, and an answer delays the daemon by a second at most.
// Leaves:   the reload itself to daemon.h.
// Threads:  the main thread.
// Tested by: tests/e2e/systemd.test.mjs
#pragma once

#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/os/procfs.h"
#include "nexus/os/systemd.h"

namespace nexus {

constexpr const char* kControlThread = "nexus-control";  // each serving process has one thread of this name

struct ReloadOutcome {
  bool in_force = false;
  std::string text{};  // for the operator
};

// A request is a SIGHUP with a random number, its ticket; the answer goes to a socket whose name holds this number.
// Nobody can guess the name before the signal is sent, and it works across PID namespaces.
class ReloadTicket {
 public:
  ReloadTicket() = default;  // a SIGHUP of another program, which waits for no answer
  explicit ReloadTicket(int number) : number_(number) {}
  explicit ReloadTicket(const siginfo_t& signal)
      : number_(signal.si_code == SI_QUEUE ? signal.si_value.sival_int : 0) {}

  static ReloadTicket random() {
    int number = 0;
    while (number <= 0) {
      if (getrandom(&number, sizeof number, 0) != sizeof number) number = static_cast<int>(monotonic_now() & INT32_MAX);
    }
    return ReloadTicket(number);
  }

  std::string socket_name() const { return "@nexus-reload-" + std::to_string(number_); }

  bool send_to(pid_t daemon) const {
    sigval value{};
    value.sival_int = number_;
    return ::sigqueue(daemon, SIGHUP, value) == 0;
  }

  void answer(const ReloadOutcome& outcome) const {
    if (number_ == 0) return;
    Notifier(socket_name()).send((outcome.in_force ? '+' : '-') + outcome.text);
  }

 private:
  int number_ = 0;
};

// Empty if `pid` is a serving Nexus, which may be sent a SIGHUP; else why it is not. The signal would end a process
// that does not expect it, as one that got the number of a stale pid file. A Nexus has a control thread, which blocks
// the signal; a file's name may be another, and shows to its own user alone. The main thread waits for the signal, and
// while it does, proc(5) does not show it as blocked there.
inline std::string not_reloadable(pid_t pid) {
  const std::string proc = "/proc/" + std::to_string(pid);
  if (detail::read_proc_file((proc + "/status").c_str()).empty()) {
    const bool there = ::kill(pid, 0) == 0 || errno == EPERM;
    return there ? "cannot read its entry in /proc, so it was sent no signal: run this as its user or as root"
                 : "there is no such process: is the number of an old run?";
  }
  bool serves = false;
  if (DIR* tasks = opendir((proc + "/task").c_str())) {
    while (const dirent* task = readdir(tasks)) {
      const std::string at = proc + "/task/" + task->d_name;
      if (detail::read_proc_file((at + "/comm").c_str()) != kControlThread + std::string("\n")) continue;
      serves |= takes_signal(detail::read_proc_file((at + "/status").c_str()), SIGHUP);
    }
    closedir(tasks);
  }
  return serves ? "" : "it is no serving nexus, so it was sent no signal: give the process id of one";
}

// Asks `daemon` to reload and waits for the outcome. Asks again while no answer comes: the kernel merges a signal with
// one of its kind that is still pending, and drops the ticket of the second.
inline ReloadOutcome request_reload(pid_t daemon, Ns limit = kReloadAnswer) {
  const ReloadTicket ticket = ReloadTicket::random();
  Notifier answers(ticket.socket_name());
  const int socket = answers.bind();
  if (socket < 0) return {false, std::string("nexus: cannot wait for an answer: ") + strerror(errno)};
  const std::string process = "nexus: process " + std::to_string(daemon) + ": ";
  for (const Ns end = monotonic_now() + limit; monotonic_now() < end;) {
    if (const std::string why = not_reloadable(daemon); !why.empty()) return {false, process + why};
    if (!ticket.send_to(daemon)) {
      const bool forbidden = errno == EPERM;
      return {false, process + "cannot signal it: " + strerror(errno) +
                         (forbidden ? "; run this as its user or as root" : "")};
    }
    pollfd entry{socket, POLLIN, 0};
    if (::poll(&entry, 1, static_cast<int>((kReloadWait + kSecond) / kMillisecond)) <= 0) continue;
    std::array<char, 16 * 1024> text{};
    const ssize_t bytes = ::recv(socket, text.data(), text.size(), 0);
    if (bytes > 0) return {text[0] == '+', std::string(text.data() + 1, static_cast<std::size_t>(bytes - 1))};
  }
  return {false, process + "it gave no answer in time: see its log"};
}

}  // namespace nexus
