// seccomp.h
// Owns:     the list of system calls that a serving process may make, installed by seccomp(2).
// Promises: other calls fail with EPERM; those that only an intruder makes (starting a program, tracing a process,
//           namespaces, kernel modules) kill the process; no later exec gains privileges. All threads are bound, also
//           those started later. Without seccomp in the kernel nothing changes, and enter_sandbox() says so.
// Leaves:   files, users and addresses to the service manager's sandbox; when to enter to daemon.h.
// Threads:  any; it binds the whole process.
// Tested by: tests/seccomp_test.cpp
#pragma once

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace nexus {

namespace sandbox {

// The runtime of a sanitizer makes system calls of its own, and starts a program that finds the lines of its report.
inline constexpr bool kSanitised =
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    true;
#elif defined(__has_feature)
    __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
    false;
#endif

using Filter = std::vector<sock_filter>;

// Calls that every architecture has.
inline constexpr std::array kAllowed{
    // sockets and events
    SYS_accept4, SYS_bind, SYS_connect, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2,
    SYS_eventfd2, SYS_getpeername, SYS_getsockname, SYS_getsockopt, SYS_listen, SYS_ppoll, SYS_recvfrom, SYS_recvmsg,
    SYS_sendmmsg, SYS_sendmsg, SYS_sendto, SYS_setsockopt, SYS_shutdown, SYS_socket, SYS_pselect6,
    // files
    SYS_close, SYS_faccessat, SYS_fcntl, SYS_fstat, SYS_getdents64, SYS_lseek, SYS_newfstatat, SYS_openat, SYS_pread64,
    SYS_read, SYS_readlinkat, SYS_readv, SYS_statx, SYS_write, SYS_writev,
    // c-ares and the C library: the state of a socket or terminal, the host's name
    SYS_ioctl, SYS_uname,
    // memory
    SYS_brk, SYS_madvise, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap,
    // threads; glibc falls back to clone() if there is no clone3()
    SYS_clone, SYS_clone3, SYS_exit, SYS_futex, SYS_gettid, SYS_membarrier, SYS_rseq, SYS_sched_getaffinity,
    SYS_sched_yield, SYS_set_robust_list,
    // signals, but none to other processes, and exit
    SYS_exit_group, SYS_restart_syscall, SYS_rt_sigaction, SYS_rt_sigpending, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_rt_sigtimedwait, SYS_sigaltstack, SYS_tgkill,
    // time, random numbers, facts about the process
    SYS_clock_getres, SYS_clock_gettime, SYS_clock_nanosleep, SYS_getegid, SYS_geteuid, SYS_getgid, SYS_getpid,
    SYS_getrandom, SYS_getrlimit, SYS_getrusage, SYS_gettimeofday, SYS_getuid, SYS_nanosleep};

inline constexpr std::array kDeadly{// other programs and processes
                                    SYS_execve, SYS_execveat, SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev,
                                    // the kernel
                                    SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_kexec_load, SYS_bpf,
                                    SYS_perf_event_open, SYS_userfaultfd, SYS_io_uring_setup,
                                    // file systems and namespaces
                                    SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_unshare, SYS_setns,
                                    // users and keys
                                    SYS_setuid, SYS_setgid, SYS_setresuid, SYS_setresgid, SYS_keyctl};

// Older architectures have more calls for the same.
#if defined(__x86_64__)
inline constexpr std::uint32_t kMachine = AUDIT_ARCH_X86_64;
inline constexpr std::array kAllowedHere{SYS_access,   SYS_epoll_wait, SYS_lstat, SYS_open, SYS_poll,
                                         SYS_readlink, SYS_select,     SYS_stat,  SYS_time};
inline constexpr std::array kDeadlyHere{SYS_fork, SYS_vfork};
#elif defined(__aarch64__)
inline constexpr std::uint32_t kMachine = AUDIT_ARCH_AARCH64;
inline constexpr std::array<long, 0> kAllowedHere{}, kDeadlyHere{};
#else
inline constexpr std::uint32_t kMachine = 0;
inline constexpr std::array<long, 0> kAllowedHere{}, kDeadlyHere{};
#endif

inline constexpr std::uint32_t kFirstX32Call = 0x40000000;  // the x32 ABI's numbers; no architecture has calls there

// Appends: return `verdict` for the call `number`, go on for any other.
inline void rule(Filter& filter, long number, std::uint32_t verdict) {
  filter.insert(filter.end(), {BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(number), 0, 1),
                               BPF_STMT(BPF_RET | BPF_K, verdict)});
}

// Appends: allow the call `number` if the low half of its argument is `value`, else EPERM; go on for any other call.
inline void rule_if(Filter& filter, long number, std::uint32_t argument, std::uint32_t value) {
  constexpr std::uint32_t kArgs = offsetof(seccomp_data, args);
  filter.insert(filter.end(),
                {BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(number), 0, 4),
                 BPF_STMT(BPF_LD | BPF_W | BPF_ABS, kArgs + argument * 8),  // little-endian
                 BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
                 BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM)});
}

// Empty if there is no list of calls for this architecture.
inline Filter make_filter() {
  if (kMachine == 0) return {};
  Filter filter{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, arch)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kMachine, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, kFirstX32Call, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
  };
  for (const long number : kAllowed) rule(filter, number, SECCOMP_RET_ALLOW);
  for (const long number : kAllowedHere) rule(filter, number, SECCOMP_RET_ALLOW);
  for (const long number : kDeadly) rule(filter, number, SECCOMP_RET_KILL_PROCESS);
  for (const long number : kDeadlyHere) rule(filter, number, SECCOMP_RET_KILL_PROCESS);
  rule_if(filter, SYS_prlimit64, 2, 0);  // without a new limit: it only reads
  rule_if(filter, SYS_prctl, 0, PR_SET_NAME);
  filter.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM));
  return filter;
}

}  // namespace sandbox

// Binds the process. Returns an empty text, or why the filter is not installed.
inline std::string enter_sandbox() {
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return std::string("PR_SET_NO_NEW_PRIVS: ") + strerror(errno);
  if (sandbox::kSanitised) return "a sanitizer needs more system calls";
  sandbox::Filter filter = sandbox::make_filter();
  if (filter.empty()) return "no list of system calls for this architecture";
  const sock_fprog program{static_cast<unsigned short>(filter.size()), filter.data()};
  const long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);
  if (result == 0) return {};
  if (result > 0) return "a thread has a filter of its own";
  return std::string("seccomp: ") + strerror(errno);
}

}  // namespace nexus
