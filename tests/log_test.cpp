// log_test.cpp
// Goal:   an event is one line whatever a client sends, and it reaches its file or is counted, whatever the file does.
// Method: rows of values against golden lines; a ring that is small enough to fill and wrap all the time, between two
//         threads; a writer on real files and pipes: full (/dev/full), closed, not read, renamed.
#include "nexus/os/log.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "nexus/os/log_thread.h"

using namespace nexus;
using namespace std::string_view_literals;

namespace {

constexpr Ns kWall = 1'700'000'000'123'456'789;  // 2023-11-14T22:13:20.123Z

std::string take(LogLane& lane) {
  std::string lines;
  lane.take(lines);
  return lines;
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

std::string file_text(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

// A directory of this test's own, removed with the files that the tests name.
struct Directory {
  Directory() { REQUIRE(mkdtemp(path) != nullptr); }
  ~Directory() {
    for (const auto& name : names) unlink(name.c_str());
    rmdir(path);
  }
  std::string file(std::string_view name) {
    names.push_back(std::string(path) + "/" + std::string(name));
    return names.back();
  }
  char path[32] = "/tmp/nexus_log_XXXXXX";
  std::vector<std::string> names;
};

struct Pipe {
  Pipe() { REQUIRE(pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0); }
  ~Pipe() {
    close_reader();
    ::close(ends[1]);
  }
  void close_reader() {
    if (ends[0] >= 0) ::close(ends[0]);
    ends[0] = -1;
  }
  std::string read_all() {
    std::string text;
    char bytes[4096];
    for (ssize_t n; (n = ::read(ends[0], bytes, sizeof bytes)) > 0;) text.append(bytes, static_cast<std::size_t>(n));
    return text;
  }
  int ends[2];
};

// All that was put before is written, or dropped, when this returns.
void flush(LogWriter& writer) {
  writer.stop();
  REQUIRE(writer.start());
}

AccessEntry full_entry() {
  AccessEntry entry;
  entry.wall_ns = kWall;
  entry.request_id = "r-1";
  entry.client = "127.0.0.1:5000";
  entry.key = "alice";
  entry.method = "POST";
  entry.path = "/v1/chat/completions";
  entry.model = "gpt-4";
  entry.model_used = "llama3:70b";
  entry.affinity = "00c0ffee";
  entry.backend = "gpu-box";
  entry.status = 200;
  entry.attempts = 2;
  entry.bytes = 5120;
  entry.prompt_tokens = 12;
  entry.completion_tokens = 0;
  entry.first_byte_ns = 1'234'567;
  entry.duration_ns = 2'000'000'000;
  entry.endpoint = "chat";
  entry.stream = true;
  entry.route = "retry after closed, priority";
  entry.tries = "a:closed:1 gpu-box:ok:2";
  entry.request_bytes = 77;
  entry.cached_tokens = 5;
  entry.queue_ns = 1'500'000;
  entry.connect_ns = 250'000;
  entry.trace_id = "4bf92f3577b34da6a3ce929d0e0e4736";
  return entry;
}

}  // namespace

TEST_CASE("log: an event is one line with its time, level, message and fields") {
  struct Row {
    const char* name;
    LogSettings settings;
    bool journald;
    LogLevel level;
    std::string_view expected;
  };
  const Row rows[] = {
      {"text",
       {LogLevel::debug, LogFormat::text, "off"},
       false,
       LogLevel::warning,
       "2023-11-14T22:13:20.123Z warning backend down backend=gpu-box reason=\"no route\" code=-\n"},
      {"json",
       {LogLevel::debug, LogFormat::json, "off"},
       false,
       LogLevel::info,
       "{\"time\":\"2023-11-14T22:13:20.123Z\",\"level\":\"info\",\"message\":\"backend down\","
       "\"backend\":\"gpu-box\",\"reason\":\"no route\",\"code\":\"\"}\n"},
      {"text under systemd",
       {LogLevel::debug, LogFormat::text, "off"},
       true,
       LogLevel::error,
       "<3>backend down backend=gpu-box reason=\"no route\" code=-\n"},
      {"debug under systemd",
       {LogLevel::debug, LogFormat::text, "off"},
       true,
       LogLevel::debug,
       "<7>backend down backend=gpu-box reason=\"no route\" code=-\n"},
      {"json under systemd",
       {LogLevel::debug, LogFormat::json, "off"},
       true,
       LogLevel::warning,
       "<4>{\"level\":\"warning\",\"message\":\"backend down\",\"backend\":\"gpu-box\",\"reason\":\"no route\","
       "\"code\":\"\"}\n"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    LogRing ring;
    Log log(&ring, row.settings, row.journald);
    log.event_at(kWall, row.level, "backend down", {{"backend", "gpu-box"}, {"reason", "no route"}, {"code", ""}});
    CHECK(take(ring.events) == row.expected);
    CHECK(ring.events.empty());
  }
}

TEST_CASE("log: an event above the configured level is not written, and the level may change") {
  LogRing ring;
  Log log(&ring, {LogLevel::warning, LogFormat::text, "off"}, true);
  log.event(LogLevel::info, "quiet");
  log.event(LogLevel::debug, "quieter");
  CHECK(ring.events.empty());
  log.event(LogLevel::warning, "heard");
  CHECK(take(ring.events) == "<4>heard\n");
  log.configure({LogLevel::info, LogFormat::text, "off"});
  log.event(LogLevel::info, "quiet");
  CHECK(take(ring.events) == "<6>quiet\n");
  Log nowhere;
  CHECK(!nowhere.wants(LogLevel::error));
  nowhere.event(LogLevel::error, "no ring, no line");
}

TEST_CASE("log: values are quoted and escaped so that no line can be forged and no terminal steered") {
  struct Row {
    std::string_view value, text, json;
  };
  const Row rows[] = {
      {"plain-1.5:a/b", "plain-1.5:a/b", "\"plain-1.5:a/b\""},
      {"a b", "\"a b\"", "\"a b\""},
      {"-", "\"-\"", "\"-\""},
      {"a=b", "\"a=b\"", "\"a=b\""},
      {"say \"hi\"\\", "\"say \\\"hi\\\"\\\\\"", "\"say \\\"hi\\\"\\\\\""},
      {"x\nforged line", "\"x\\nforged line\"", "\"x\\nforged line\""},
      {"x\r\t\x1b[31m", "\"x\\u000d\\u0009\\u001b[31m\"", "\"x\\u000d\\u0009\\u001b[31m\""},
      {"nul\0nul"sv, "\"nul\\u0000nul\"", "\"nul\\u0000nul\""},
      {"\x7f", "\"\\u007f\"", "\"\\u007f\""},
      {"\xc2\x9b"
       "31m",
       "\"\\u009b31m\"", "\"\\u009b31m\""},  // C1: CSI in one character
      {"\xe2\x80\xae"
       "cod",
       "\"\\u202ecod\"", "\"\\u202ecod\""},            // right-to-left override
      {"\xe2\x80\xa8", "\"\\u2028\"", "\"\\u2028\""},  // line separator
      {"z\xc3\xbcrich \xf0\x9f\x99\x82", "\"z\xc3\xbcrich \xf0\x9f\x99\x82\"", "\"z\xc3\xbcrich \xf0\x9f\x99\x82\""},
      {"\xff\xc0\xaf", "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\"", "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\""},
      {"half \xe2\x82", "\"half \xef\xbf\xbd\xef\xbf\xbd\"", "\"half \xef\xbf\xbd\xef\xbf\xbd\""},
  };
  for (const Row& row : rows) {
    CAPTURE(row.text);
    LogRing ring;
    Log text(&ring, {LogLevel::info, LogFormat::text, "off"}, true);
    text.event(LogLevel::info, "m", {{"v", row.value}});
    CHECK(take(ring.events) == "<6>m v=" + std::string(row.text) + "\n");
    Log json(&ring, {LogLevel::info, LogFormat::json, "off"}, true);
    json.event(LogLevel::info, "m", {{"v", row.value}});
    CHECK(take(ring.events) == "<6>{\"level\":\"info\",\"message\":\"m\",\"v\":" + std::string(row.json) + "}\n");
  }
  LogRing ring;
  Log log(&ring, {LogLevel::info, LogFormat::text, "off"}, true);
  log.event(LogLevel::info, "a message\nof two lines");
  CHECK(take(ring.events) == "<6>a message\\nof two lines\n");
}

TEST_CASE("log: a long value is cut at 256 bytes, never within a character, and shows that it was") {
  LogRing ring;
  Log log(&ring, {LogLevel::info, LogFormat::text, "off"}, true);
  const std::string at_limit(256, 'a');
  log.event(LogLevel::info, "m", {{"v", at_limit}});
  CHECK(take(ring.events) == "<6>m v=" + at_limit + "\n");
  log.event(LogLevel::info, "m", {{"v", at_limit + "b"}});
  CHECK(take(ring.events) == "<6>m v=\"" + at_limit + "\xe2\x80\xa6\"\n");
  for (std::size_t before = 253; before <= 256; ++before) {
    CAPTURE(before);
    const std::string lead(before, 'a');
    log.event(LogLevel::info, "m", {{"v", lead + "\xf0\x9f\x99\x82!"}});
    CHECK(take(ring.events) == "<6>m v=\"" + lead + "\xe2\x80\xa6\"\n");
  }
  log.event(LogLevel::info, "m", {{"v", std::string(300, '\x80')}});  // no character's border anywhere
  const std::string line = take(ring.events);
  CHECK(line.size() < 900);
  CHECK(line.substr(line.size() - 5) == "\xe2\x80\xa6\"\n");
}

TEST_CASE("log: times are right across leap days, centuries and the epoch") {
  struct Row {
    std::int64_t second;
    std::string_view expected;
  };
  const Row rows[] = {{0, "1970-01-01T00:00:00.000Z"},          {-1, "1969-12-31T23:59:59.000Z"},
                      {951782400, "2000-02-29T00:00:00.000Z"},  {1709164799, "2024-02-28T23:59:59.000Z"},
                      {1709164800, "2024-02-29T00:00:00.000Z"}, {4107542400, "2100-03-01T00:00:00.000Z"},
                      {1767225599, "2025-12-31T23:59:59.000Z"}};
  detail::Rfc3339 time;
  for (const Row& row : rows) {
    std::string out;
    time.append(out, row.second * kSecond);
    CHECK(out == row.expected);
  }
  std::string out;
  time.append(out, -1);
  CHECK(out == "1969-12-31T23:59:59.999Z");
}

TEST_CASE("log: an access line has every key, in JSON and in text") {
  LogRing ring;
  Log log(&ring, {LogLevel::info, LogFormat::json, "a file"}, true);
  AccessEntry entry = full_entry();
  log.access(entry);
  CHECK(ring.events.empty());
  CHECK(take(ring.access) ==
        "{\"time\":\"2023-11-14T22:13:20.123Z\",\"request_id\":\"r-1\",\"client\":\"127.0.0.1:5000\",\"key\":\"alice\","
        "\"method\":\"POST\",\"path\":\"/v1/chat/completions\",\"model\":\"gpt-4\",\"model_used\":\"llama3:70b\","
        "\"backend\":\"gpu-box\",\"affinity\":\"00c0ffee\",\"status\":200,\"error_type\":null,\"attempts\":2,\"bytes\":"
        "5120,"
        "\"prompt_tokens\":12,\"completion_tokens\":0,\"first_byte_ms\":1.234,\"duration_ms\":2000.000,"
        "\"cut\":false,\"endpoint\":\"chat\",\"stream\":true,\"route\":\"retry after closed, priority\","
        "\"tries\":\"a:closed:1 "
        "gpu-box:ok:2\",\"request_bytes\":77,\"cached_tokens\":5,\"queue_ms\":1.500,\"connect_ms\":0.250,"
        "\"trace_id\":\"4bf92f3577b34da6a3ce929d0e0e4736\"}\n");
  entry = AccessEntry{};
  entry.wall_ns = kWall;
  entry.model = "x\" \n";
  entry.status = 499;
  entry.error_type = "client_closed";
  entry.duration_ns = 999;
  entry.cut = true;
  log.access(entry);
  CHECK(take(ring.access) ==
        "{\"time\":\"2023-11-14T22:13:20.123Z\",\"request_id\":\"\",\"client\":\"\",\"key\":\"\",\"method\":\"\","
        "\"path\":\"\","
        "\"model\":\"x\\\" \\n\",\"model_used\":\"\",\"backend\":\"\",\"affinity\":null,\"status\":499,"
        "\"error_type\":\"client_closed\",\"attempts\":0,\"bytes\":0,\"prompt_tokens\":null,"
        "\"completion_tokens\":null,\"first_byte_ms\":null,\"duration_ms\":0.000,\"cut\":true,"
        "\"endpoint\":\"\",\"stream\":false,\"route\":\"\",\"tries\":\"\",\"request_bytes\":0,\"cached_tokens\":null,"
        "\"queue_ms\":0.000,\"connect_ms\":0.000,\"trace_id\":null}\n");
  log.configure({LogLevel::error, LogFormat::text, "a file"});
  log.access(entry);
  CHECK(
      take(ring.access) ==
      "time=2023-11-14T22:13:20.123Z request_id=- client=- key=- method=- path=- model=\"x\\\" \\n\" model_used=- "
      "backend=- affinity=- status=499 error_type=client_closed attempts=0 bytes=0 prompt_tokens=- completion_tokens=- "
      "first_byte_ms=- duration_ms=0.000 cut=true endpoint=- stream=false route=- tries=- request_bytes=0 "
      "cached_tokens=- "
      "queue_ms=0.000 connect_ms=0.000 trace_id=-\n");
  log.configure({LogLevel::error, LogFormat::text, "stderr"});
  log.access(full_entry());
  CHECK(take(ring.access) ==
        "<6>time=2023-11-14T22:13:20.123Z request_id=r-1 client=127.0.0.1:5000 key=alice method=POST "
        "path=/v1/chat/completions model=gpt-4 model_used=llama3:70b backend=gpu-box affinity=00c0ffee status=200 "
        "error_type=- attempts=2 bytes=5120 prompt_tokens=12 completion_tokens=0 first_byte_ms=1.234 "
        "duration_ms=2000.000 "
        "cut=false endpoint=chat stream=true route=\"retry after closed, priority\" tries=\"a:closed:1 gpu-box:ok:2\" "
        "request_bytes=77 cached_tokens=5 queue_ms=1.500 connect_ms=0.250 trace_id=4bf92f3577b34da6a3ce929d0e0e4736\n");
  log.configure({LogLevel::debug, LogFormat::text, "off"});
  log.access(full_entry());
  CHECK(ring.access.empty());
}

TEST_CASE("log: the settings decide which access lines are written, and which begin with a priority") {
  struct Row {
    const char* access;
    bool journald;
    bool wanted;
    bool has_priority;
  };
  const Row rows[] = {{"off", true, false, false},
                      {"stderr", false, true, false},
                      {"stderr", true, true, true},
                      {"/var/log/nexus/access.log", true, true, false}};
  for (const Row& row : rows) {
    CAPTURE(row.access);
    LogRing ring;
    Log log(&ring, {LogLevel::error, LogFormat::text, row.access}, row.journald);
    CHECK(log.wants_access() == row.wanted);
    log.access(full_entry());
    CHECK(take(ring.access).substr(0, 8) == (!row.wanted ? "" : row.has_priority ? "<6>time=" : "time=202"));
  }
  CHECK_FALSE(Log(nullptr, {LogLevel::error, LogFormat::text, "stderr"}).wants_access());
}

TEST_CASE("log ring: a line that does not fit is refused whole and counted by where it was to go") {
  LogRing ring(nullptr, 64);
  CHECK(ring.events.put(std::string(31, 'a') + "\n"));
  CHECK(ring.access.put(std::string(31, 'b') + "\n"));
  CHECK(ring.access.put(std::string(31, 'c') + "\n"));  // 2 × 32: full to the byte
  CHECK(!ring.access.put("\n"));
  CHECK(!ring.access.put(std::string(100, 'd') + "\n"));
  CHECK(ring.access.dropped() == 2);
  CHECK(ring.events.dropped() == 0);
  CHECK(take(ring.events) == std::string(31, 'a') + "\n");
  CHECK(!ring.access.put("\n"));  // the room of the other lane is not its own
  CHECK(take(ring.access) == std::string(31, 'b') + "\n" + std::string(31, 'c') + "\n");
  CHECK(ring.access.put("again\n"));
  CHECK(take(ring.access) == "again\n");
  CHECK(ring.access.empty());
  CHECK(ring.events.empty());
}

TEST_CASE("log ring: between two threads every line comes out whole and in order, or is counted") {
  // A ring of 256 bytes under lines of 2 to 60: it wraps every few lines, at every offset, and is often full.
  constexpr int kLines = 100'000;
  LogRing ring(nullptr, 256);
  const auto line_of = [](int i) {
    return std::to_string(i) + std::string(static_cast<std::size_t>(i % 53), static_cast<char>('a' + i % 26)) + "\n";
  };
  std::atomic<bool> ended{false};
  std::thread putter([&] {
    for (int i = 0; i < kLines; ++i) {
      LogLane& lane = i % 2 == 0 ? ring.events : ring.access;
      if (!lane.put(line_of(i)) && i % 7 == 0) std::this_thread::yield();
    }
    ended.store(true);
  });
  int taken = 0;
  int wrong = 0;
  int last[2] = {-1, -1};
  for (;;) {
    const bool over = ended.load();
    const bool empty = ring.events.empty() && ring.access.empty();
    if (empty && over) break;
    if (empty) std::this_thread::yield();
    for (int lane = 0; lane < 2; ++lane) {
      for (const std::string& line : lines_of(take(lane == 0 ? ring.events : ring.access))) {
        const int i = std::atoi(line.c_str());
        if (i <= last[lane] || line + "\n" != line_of(i) || i % 2 != lane) wrong += 1;
        last[lane] = i;
        taken += 1;
      }
    }
  }
  putter.join();
  CHECK(wrong == 0);
  CHECK(taken > 0);
  CHECK(static_cast<std::uint64_t>(taken) + ring.events.dropped() + ring.access.dropped() == kLines);
}

TEST_CASE("log writer: what several threads put is in the files after stop(), each thread's lines in order") {
  Directory directory;
  const std::string path = directory.file("access.log");
  Pipe events;
  LogWriter writer(events.ends[1]);
  REQUIRE(writer.reconfigure(path) == 0);
  constexpr int kThreads = 3;
  constexpr int kLines = 400;
  std::vector<LogRing*> rings;
  for (int i = 0; i < kThreads; ++i) rings.push_back(writer.add_ring());
  REQUIRE(writer.start());
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Log log(rings[static_cast<std::size_t>(t)], {LogLevel::info, LogFormat::text, "a file"}, true);
      const std::string name = std::to_string(t);
      for (int i = 0; i < kLines; ++i) {
        AccessEntry entry;
        entry.request_id = name;
        entry.bytes = static_cast<std::uint64_t>(i);
        log.access(entry);
      }
      log.event(LogLevel::info, "ended");
    });
  }
  for (auto& thread : threads) thread.join();
  writer.stop();
  CHECK(events.read_all() == "<6>ended\n<6>ended\n<6>ended\n");
  std::vector<int> next(kThreads, 0);
  for (const std::string& line : lines_of(file_text(path))) {
    const std::size_t t = static_cast<std::size_t>(line[line.find("request_id=") + 11] - '0');
    REQUIRE(t < kThreads);
    REQUIRE(line.find(" bytes=" + std::to_string(next[t]) + " ") != std::string::npos);
    next[t] += 1;
  }
  CHECK(next == std::vector<int>(kThreads, kLines));
  CHECK(writer.dropped() == 0);
}

TEST_CASE("log writer: after stop() all that was put before is in the file, and it can start again") {
  Pipe events;
  LogWriter writer(events.ends[1]);
  LogRing* ring = writer.add_ring();
  REQUIRE(writer.start());
  Log log(ring, {LogLevel::info, LogFormat::text, "stderr"}, true);
  REQUIRE(writer.reconfigure("stderr") == 0);
  for (int i = 0; i < 20; ++i) {
    const std::string number = std::to_string(i);
    log.event(LogLevel::info, "event", {{"n", number}});
    flush(writer);
    CHECK(events.read_all() == "<6>event n=" + number + "\n");
  }
  log.access(full_entry());
  flush(writer);
  CHECK(events.read_all().substr(0, 8) == "<6>time=");
  REQUIRE(writer.reconfigure("off") == 0);
  flush(writer);
  log.access(full_entry());
  flush(writer);
  CHECK(events.read_all() == "");
  CHECK(writer.dropped() == 0);  // not wanted is not lost
}

TEST_CASE("log writer: a line put while the writer sleeps wakes it") {
  // Each line is put after the one before was read, so that the writer is asleep or about to be at most of them.
  int ends[2];
  REQUIRE(pipe2(ends, O_CLOEXEC) == 0);  // this reader blocks: a wake-up that is lost hangs the test
  {
    LogWriter writer(ends[1]);
    Log log(writer.add_ring(), {LogLevel::info, LogFormat::text, "off"}, true);
    REQUIRE(writer.start());
    for (int i = 0; i < 20; ++i) {
      log.event(LogLevel::info, "x");
      char bytes[16];
      REQUIRE(::read(ends[0], bytes, sizeof bytes) == 5);
    }
  }
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_CASE("log writer: a path configured again after a rename is a new file, and no line is lost") {
  Directory directory;
  const std::string path = directory.file("access.log");
  const std::string old = directory.file("access.log.1");
  Pipe events;
  LogWriter writer(events.ends[1]);
  LogRing* ring = writer.add_ring();
  REQUIRE(writer.start());
  REQUIRE(writer.reconfigure(path) == 0);
  REQUIRE(ring->access.put("one\n"));
  flush(writer);
  REQUIRE(std::rename(path.c_str(), old.c_str()) == 0);
  REQUIRE(ring->access.put("two\n"));
  flush(writer);
  REQUIRE(writer.reconfigure(path) == 0);
  flush(writer);
  REQUIRE(ring->access.put("three\n"));
  writer.stop();
  CHECK(file_text(old) == "one\ntwo\n");
  CHECK(file_text(path) == "three\n");
}

TEST_CASE("log writer: a path that can't be opened is refused with its errno, and the old file stays") {
  Directory directory;
  const std::string path = directory.file("access.log");
  Pipe events;
  LogWriter writer(events.ends[1]);
  LogRing* ring = writer.add_ring();
  REQUIRE(writer.start());
  REQUIRE(writer.reconfigure(path) == 0);
  CHECK(writer.reconfigure(std::string(directory.path) + "/none/access.log") == ENOENT);
  CHECK(writer.reconfigure(directory.path) == EISDIR);
  REQUIRE(ring->access.put("one\n"));
  writer.stop();
  CHECK(file_text(path) == "one\n");
}

TEST_CASE("log writer: lines that a full disk refuses are counted, and the next ones are tried anew") {
  Directory directory;
  const std::string path = directory.file("access.log");
  Pipe events;
  LogWriter writer(events.ends[1]);
  LogRing* ring = writer.add_ring();
  REQUIRE(writer.start());
  REQUIRE(writer.reconfigure("/dev/full") == 0);
  for (int i = 0; i < 5; ++i) REQUIRE(ring->access.put("lost\n"));
  REQUIRE(ring->events.put("seen\n"));
  flush(writer);
  CHECK(events.read_all() == "seen\n");
  CHECK(writer.dropped() == 5);
  REQUIRE(writer.reconfigure(path) == 0);
  flush(writer);
  REQUIRE(ring->access.put("kept\n"));
  writer.stop();
  CHECK(file_text(path) == "kept\n");
  CHECK(writer.dropped() == 5);
}

TEST_CASE("log writer: a closed standard error ends nothing") {
  Pipe events;
  events.close_reader();
  LogWriter writer(events.ends[1]);
  LogRing* ring = writer.add_ring();
  REQUIRE(writer.start());
  REQUIRE(ring->events.put("one\n"));
  REQUIRE(ring->events.put("two\n"));
  flush(writer);  // EPIPE, and SIGPIPE is blocked in the writer's thread
  CHECK(writer.dropped() == 2);
}

TEST_CASE("log writer: a reader that stops reading costs lines, not the other log, and is written to when it is back") {
  Directory directory;
  const std::string path = directory.file("access.log");
  Pipe events;
  LogWriter writer(events.ends[1]);
  LogRing* ring = writer.add_ring();
  REQUIRE(writer.start());
  REQUIRE(writer.reconfigure(path) == 0);
  const std::string line = std::string(999, 'x') + "\n";
  for (int i = 0; i < 200; ++i) REQUIRE(ring->events.put(line));  // a pipe holds 64 KiB
  REQUIRE(ring->access.put("seen\n"));
  flush(writer);
  CHECK(file_text(path) == "seen\n");
  const auto first = events.read_all();
  const auto lost = writer.dropped();
  CHECK(lost > 0);
  REQUIRE(ring->events.put("back\n"));
  writer.stop();
  const auto then = events.read_all();
  CHECK(then.substr(then.size() - 5) == "back\n");
  std::size_t whole = 0;
  for (const std::string& each : lines_of(first + then)) whole += each == std::string(999, 'x') ? 1 : 0;
  CHECK(whole + lost == 200);  // the one that was cut in the middle is lost too, and stands on a line of its own
  CHECK(writer.dropped() == lost);
}

TEST_CASE("log writer: access lines on standard error do not join an event that was cut") {
  Pipe events;
  LogWriter writer(events.ends[1]);
  LogRing* ring = writer.add_ring();
  REQUIRE(writer.start());
  REQUIRE(writer.reconfigure("stderr") == 0);
  const std::string line = std::string(998, 'x') + "\n";
  for (int i = 0; i < 200; ++i) REQUIRE(ring->events.put(line));  // a pipe holds 64 KiB
  flush(writer);
  const auto first = events.read_all();
  REQUIRE(first.back() != '\n');
  REQUIRE(ring->access.put("access\n"));
  flush(writer);
  CHECK(events.read_all() == "\naccess\n");
  CHECK(writer.dropped() + lines_of(first).size() - 1 == 200);
}
