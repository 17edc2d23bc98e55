// start_time.cpp
// Owns:     the time from starting a command to its first answered request.
// Promises: the clock runs from just before fork(); the port is tried again every 50 µs; the command gets SIGTERM, and
// is
//           waited for, afterwards. Prints the microseconds.
// Leaves:   a port that nobody else holds to the caller.
// usage:    start_time PORT COMMAND [ARGUMENT…]
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>

#include <string>

#include "loopback.h"

using namespace nexus::bench;

namespace {

constexpr Ns kPatience = 10'000'000'000;

// A socket connected to the port, or -1.
int try_connect(std::uint16_t port) {
  const int fd = connect_to(port);
  if (fd < 0) return -1;
  pollfd wait{fd, POLLOUT, 0};
  int error = 0;
  socklen_t length = sizeof error;
  if (poll(&wait, 1, 1000) == 1 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0) return fd;
  close(fd);
  return -1;
}

bool is_served(int fd) {
  const std::string body = R"({"model":"bench-7b","messages":[{"role":"user","content":"Are you there?"}]})";
  const std::string request =
      "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: " +
      std::to_string(body.size()) + "\r\n\r\n" + body;
  if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(request.size())) return false;
  pollfd wait{fd, POLLIN, 0};
  std::string answer(13, '\0');
  return poll(&wait, 1, 1000) == 1 && recv(fd, answer.data(), answer.size(), 0) == 13 && answer == "HTTP/1.1 200 ";
}

pid_t start(char** command) {
  const pid_t child = fork();
  if (child != 0) return child;
  const int nowhere = open("/dev/null", O_RDWR);
  dup2(nowhere, 1);
  dup2(nowhere, 2);
  execvp(command[0], command);
  _exit(127);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: start_time PORT COMMAND [ARGUMENT…]\n");
    return 2;
  }
  const std::uint16_t port = port_of(argv[1]);
  const Ns started_ns = now_ns();
  const pid_t child = start(argv + 2);
  if (child < 0) die("fork");
  Ns served_ns = 0;
  while (served_ns == 0 && now_ns() - started_ns < kPatience && waitpid(child, nullptr, WNOHANG) == 0) {
    const int fd = try_connect(port);
    if (fd >= 0 && is_served(fd)) served_ns = now_ns();
    if (fd >= 0) close(fd);
    if (served_ns == 0) usleep(50);
  }
  kill(child, SIGTERM);
  waitpid(child, nullptr, 0);
  if (served_ns == 0) {
    std::fprintf(stderr, "start_time: %s did not answer\n", argv[2]);
    return 1;
  }
  std::printf("%lld\n", static_cast<long long>((served_ns - started_ns) / 1000));
}
