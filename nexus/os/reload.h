// reload.h
// Owns:     the request of `nexus reload` to a running daemon, and the daemon's answer.
// Promises: the answer is that of a reload which began after the request, and it comes once. Only a process that may
//           signal the daemon can ask, and an answer delays the daemon by a second at most.
// Leaves:   the reload itself to daemon.h.
// Threads:  the main thread.
// Tested by: tests/e2e/systemd.test.mjs
#pragma once

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
#include "nexus/os/systemd.h"

namespace nexus {

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

// Asks `daemon` to reload and waits for the outcome. Asks again while no answer comes: the kernel merges a signal with
// one of its kind that is still pending, and drops the ticket of the second.
inline ReloadOutcome request_reload(pid_t daemon, Ns limit = kReloadAnswer) {
  const auto failed = [](const char* what) { return ReloadOutcome{false, std::string(what) + ": " + strerror(errno)}; };
  const ReloadTicket ticket = ReloadTicket::random();
  Notifier answers(ticket.socket_name());
  const int socket = answers.bind();
  if (socket < 0) return failed("cannot wait for an answer");
  for (const Ns end = monotonic_now() + limit; monotonic_now() < end;) {
    if (!ticket.send_to(daemon)) return failed("cannot signal that process");
    pollfd entry{socket, POLLIN, 0};
    if (::poll(&entry, 1, static_cast<int>((kReloadWait + kSecond) / kMillisecond)) <= 0) continue;
    std::array<char, 16 * 1024> text{};
    const ssize_t bytes = ::recv(socket, text.data(), text.size(), 0);
    if (bytes > 0) return {text[0] == '+', std::string(text.data() + 1, static_cast<std::size_t>(bytes - 1))};
  }
  return {false, "no answer: is that process a nexus?"};
}

}  // namespace nexus
