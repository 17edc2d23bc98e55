// seccomp_test.cpp
// Goal:   a bound process can serve, and can do nothing else. Method: each case binds a forked process of its own.
#include "nexus/os/seccomp.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <atomic>
#include <thread>

using namespace nexus;

extern "C" [[noreturn]] void __stack_chk_fail();  // called by -fstack-protector where the stack was overwritten

namespace {

// Runs `body` in a process of its own, bound; its status from wait(2), or -1 where the kernel has no seccomp.
template <class Body>
int run_bound(Body body) {
  constexpr int kNotBound = 99;
  const pid_t child = fork();
  if (child == 0) {
    if (!enter_sandbox().empty()) _exit(kNotBound);
    _exit(body());
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  return WIFEXITED(status) && WEXITSTATUS(status) == kNotBound ? -1 : status;
}

bool can_bind() {
  static const bool can = run_bound([] { return 0; }) == 0;
  if (!can) MESSAGE("not shown: the filter cannot be installed here");
  return can;
}

TEST_CASE("sandbox: what serving needs is allowed") {
  if (!can_bind()) return;
  const int status = run_bound([] {
    const int file = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    char byte = 0;
    if (file < 0 || read(file, &byte, 1) != 1 || close(file) != 0) return 1;
    rlimit limit{};
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return 2;
    std::atomic<int> ran{0};
    std::thread([&] { ran = prctl(PR_SET_NAME, "later") == 0 ? 1 : 2; }).join();
    return ran == 1 ? 0 : 3;
  });
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("sandbox: a failed check of the compiler or the C library still ends the process with SIGABRT") {
  if (!can_bind()) return;
  const int status = run_bound([] {
    close(STDERR_FILENO);  // for its message; older C libraries write that to the terminal unless this is set
    setenv("LIBC_FATAL_STDERR_", "1", 1);
    signal(SIGABRT, SIG_DFL);  // not doctest's
    __stack_chk_fail();
    return 0;
  });
  CHECK(WIFSIGNALED(status));
  CHECK(WTERMSIG(status) == SIGABRT);
}

TEST_CASE("sandbox: a call that is not on the list fails with EPERM and does nothing") {
  if (!can_bind()) return;
  const int status = run_bound([] {
    if (unlink("/nowhere/to/be/found") != -1 || errno != EPERM) return 1;  // unbound: ENOENT
    if (syscall(SYS_personality, 0xffffffffUL) != -1 || errno != EPERM) return 2;
    if (kill(getpid(), 0) != -1 || errno != EPERM) return 3;
    rlimit limit{};
    getrlimit(RLIMIT_CORE, &limit);
    if (setrlimit(RLIMIT_CORE, &limit) != -1 || errno != EPERM) return 4;
    if (prctl(PR_SET_DUMPABLE, 1) != -1 || errno != EPERM) return 5;
    return 0;
  });
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("sandbox: a call that only an intruder makes ends the process, in whichever thread") {
  if (!can_bind()) return;
  for (const long number : {SYS_execve, SYS_ptrace, SYS_unshare, SYS_setuid, SYS_bpf}) {
    CAPTURE(number);
    const int status = run_bound([number] { return static_cast<int>(syscall(number, 0, 0, 0, 0, 0)); });
    CHECK(WIFSIGNALED(status));
    CHECK(WTERMSIG(status) == SIGSYS);
  }
}

TEST_CASE("sandbox: a thread that ran before is bound as well") {
  if (!can_bind()) return;
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> step{0};
    std::thread early([&] {
      while (step.load() == 0) std::this_thread::yield();
      _exit(unlink("/nowhere/to/be/found") == -1 && errno == EPERM ? 0 : 1);
    });
    if (!enter_sandbox().empty()) _exit(2);
    step = 1;
    early.join();
    _exit(3);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("sandbox: no new privileges, even where there is no filter") {
  const pid_t child = fork();
  if (child == 0) {
    enter_sandbox();
    char text[4096] = {};
    const int file = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    const ssize_t got = read(file, text, sizeof text - 1);
    _exit(got > 0 && strstr(text, "NoNewPrivs:\t1") != nullptr ? 0 : 1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

}  // namespace
