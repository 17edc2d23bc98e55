// procfs.h
// Owns:     what the kernel reports about this process, for the standard process_* metrics.
// Promises: a value that cannot be read is kUnknown, never a guess. One call reads four short files; where the kernel
//           counts open descriptors itself (Linux 6.2), the cost does not grow with their number.
// Leaves:   the text to prometheus.h.
// Threads:  any.
// Tested by: tests/prometheus_test.cpp
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "nexus/base/clock.h"
#include "nexus/base/text.h"

namespace nexus {

struct ProcessStats {
  static constexpr std::int64_t kUnknown = -1;
  Ns cpu_ns = kUnknown;  // user + system
  std::int64_t resident_bytes = kUnknown;
  std::int64_t virtual_bytes = kUnknown;
  std::int64_t open_fds = kUnknown;
  std::int64_t max_fds = kUnknown;
  Ns start_time_ns = kUnknown;  // since 1970
  std::int64_t threads = kUnknown;
};

struct KernelUnits {
  std::int64_t ticks_per_second = 100;
  std::int64_t page_bytes = 4096;
};

namespace detail {

inline std::int64_t parse_count(std::string_view text) {
  const std::optional<std::uint64_t> value = parse_decimal(text);
  return value ? static_cast<std::int64_t>(*value) : ProcessStats::kUnknown;
}

// Reads a file of /proc; empty if that fails. All are short except /proc/stat, whose end may be cut off.
inline std::string read_proc_file(const char* path) {
  std::string text;
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return text;
  std::array<char, 4096> piece;
  for (ssize_t got; text.size() < (1u << 20) && (got = read(fd, piece.data(), piece.size())) > 0;) {
    text.append(piece.data(), static_cast<std::size_t>(got));
  }
  close(fd);
  return text;
}

inline std::int64_t count_open_fds() {
  struct stat info {};
  if (stat("/proc/self/fd", &info) == 0 && info.st_size > 0) return info.st_size;
  DIR* dir = opendir("/proc/self/fd");
  if (dir == nullptr) return ProcessStats::kUnknown;
  std::int64_t entries = 0;
  while (readdir(dir) != nullptr) ++entries;
  closedir(dir);
  return entries - 3;  // `.`, `..` and the directory itself
}

}  // namespace detail

// Parses the line `btime N` of /proc/stat; returns ns since 1970.
inline Ns parse_boot_time(std::string_view text) {
  constexpr std::string_view kKey = "\nbtime ";
  const std::size_t at = text.find(kKey);
  if (at == std::string_view::npos) return ProcessStats::kUnknown;
  const std::string_view rest = text.substr(at + kKey.size());
  const std::int64_t seconds = detail::parse_count(rest.substr(0, rest.find('\n')));
  return seconds < 0 ? ProcessStats::kUnknown : seconds * kSecond;
}

// Parses /proc/self/stat (proc(5)) into `out`. Field 3 follows the last `)`: field 2 is a file name, which may contain
// blanks and brackets.
inline void parse_process_stat(std::string_view text, const KernelUnits& units, Ns boot_time_ns, ProcessStats& out) {
  const std::size_t name_end = text.rfind(')');
  if (name_end == std::string_view::npos) return;
  std::array<std::int64_t, 25> fields;  // numbered as in proc(5)
  fields.fill(ProcessStats::kUnknown);
  std::string_view rest = text.substr(name_end + 1);
  for (std::size_t field = 3; field < fields.size(); ++field) {
    rest.remove_prefix(std::min(rest.find_first_not_of(" \n"), rest.size()));
    const std::size_t length = std::min(rest.find_first_of(" \n"), rest.size());
    fields[field] = detail::parse_count(rest.substr(0, length));
    rest.remove_prefix(length);
  }
  const std::int64_t user = fields[14], system = fields[15], start = fields[22], pages = fields[24];
  const Ns tick_ns = kSecond / units.ticks_per_second;
  if (user >= 0 && system >= 0) out.cpu_ns = (user + system) * tick_ns;
  if (start >= 0 && boot_time_ns >= 0) out.start_time_ns = boot_time_ns + start * tick_ns;
  if (pages >= 0) out.resident_bytes = pages * units.page_bytes;
  out.threads = fields[20];
  out.virtual_bytes = fields[23];
}

// True if a thread with this status file (proc(5)) blocks, catches or ignores the signal, so that it does not end by
// it.
inline bool takes_signal(std::string_view status, int signal) {
  std::uint64_t masks = 0;
  for (const std::string_view key : {"\nSigBlk:\t", "\nSigIgn:\t", "\nSigCgt:\t"}) {
    const std::size_t at = status.find(key);
    if (at == std::string_view::npos) continue;
    std::uint64_t mask = 0;
    const std::string_view digits = status.substr(at + key.size(), 16);
    if (std::from_chars(digits.data(), digits.data() + digits.size(), mask, 16).ec == std::errc()) masks |= mask;
  }
  return (masks >> (signal - 1) & 1) != 0;
}

inline ProcessStats read_process_stats() {
  static const Ns kBootTime = parse_boot_time(detail::read_proc_file("/proc/stat"));  // slow to read, never changes
  ProcessStats stats;
  parse_process_stat(detail::read_proc_file("/proc/self/stat"), {sysconf(_SC_CLK_TCK), sysconf(_SC_PAGESIZE)},
                     kBootTime, stats);
  stats.open_fds = detail::count_open_fds();
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) stats.max_fds = static_cast<std::int64_t>(limit.rlim_cur);
  return stats;
}

}  // namespace nexus
