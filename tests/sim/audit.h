// audit.h
// Owns:     comparing Nexus's metrics and log lines with each other and with what both simulated sides saw.
// Promises: checks bounds at each step; at rest, that nothing is left over; at the end, that all counts agree exactly.
// Leaves:   judging single responses to ledger.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <string>
#include <string_view>

#include "ledger.h"
#include "tests/lib/at_rest.h"
#include "tests/lib/gateway.h"

namespace nexus::sim {

class Audit {
 public:
  Audit(Ledger& ledger, Gateway& gateway, Wire& wire) : ledger_(ledger), gateway_(gateway), wire_(wire) {}

  // Remembers a configuration's limits. Requests may still follow older ones, so the highest of each counts; 0: none.
  void note_caps(const Settings& settings) {
    for (const BackendSettings& backend : settings.backends) {
      const auto [at, made] = caps_.try_emplace(backend.name, backend.max_pending);
      if (made) continue;
      std::uint32_t& most = at->second;
      most = most == 0 || backend.max_pending == 0 ? 0 : std::max(most, backend.max_pending);
    }
    const ServerSettings& server = settings.server;
    most_connections_ = std::max(most_connections_, std::size_t{server.max_connections});
    // Per connection: the request, in a block up to twice as large, and part of a response with its head.
    most_held_bytes_ = std::max(most_held_bytes_, 4 * (server.max_body_bytes + server.max_header_bytes + kRoomyBlock));
    longest_write_ = std::max(longest_write_, server.write_timeout_ns);
  }

  // A cap must be in force before the workers see it: they rely on that.
  void check_caps_in_force(const Snapshot& fleet) {
    for (const BackendView& backend : fleet.backends) {
      if (backend.max_pending == 0 || gateway_.admission().cap_of(backend.id) > 0) continue;
      ledger_.wrong("the workers are told that %s has a cap, which is not in force", backend.name.c_str());
    }
  }

  Happened happened;

  // Drops the lines that a failed run left.
  static void empty(LogRing& ring) {
    std::string lines;
    ring.events.take(lines);
    ring.access.take(lines);
  }

  // ---- at each step ----

  void take_lines(LogRing& ring) {
    for (LogLane* lane : {&ring.events, &ring.access}) {
      std::string lines;
      lane->take(lines);
      for (std::size_t at = 0; at < lines.size(); at += line_.size()) {
        line_ = lines.substr(at, lines.find('\n', at) + 1 - at);
        if (line_.find(" request_id=") != std::string::npos && line_.find(" duration_ms=") != std::string::npos) {
          read_line();
        } else if (lane == &ring.access) {
          ledger_.wrong("not an access log line: %.200s", line_.c_str());
        }
      }
    }
  }

  void check_step() {
    const auto& names = gateway_.control().registry().backend_names();
    std::int64_t pending = 0;
    for (std::uint32_t i = 1; i < names.size(); ++i) {
      const BackendId id{i};
      const std::int64_t here = gateway_.metrics().pending(id);
      if (here < 0) ledger_.wrong("pending of %s is %lld", names.name(id).c_str(), static_cast<long long>(here));
      pending += here;
      check_queue(id);
      const auto cap = caps_.find(names.name(id));
      if (cap != caps_.end() && cap->second > 0) check_cap(id, cap->second, here);
    }
    std::size_t connections = 0;
    for (const auto& worker : gateway_.each_worker()) {
      connections += worker->sessions().live();
      if (worker->taken_bytes() > kRoomyBlock + worker->sessions().live() * most_held_bytes_) {
        ledger_.wrong("a worker holds %zu bytes for %zu connections", worker->taken_bytes(), worker->sessions().live());
      }
    }
    if (connections > most_connections_) {
      ledger_.wrong("%zu connections, the limit is %zu", connections, most_connections_);
    }
    if (pending > static_cast<std::int64_t>(connections)) {
      ledger_.wrong("%lld requests pending over %zu connections", static_cast<long long>(pending), connections);
    }
  }

  // Nexus must not keep a client that has taken no byte for longer than write_timeout.
  void check_blocked(LinkId id, Ns slack) {
    const Link& link = wire_.at(id);
    if (!link.live || !link.nexus_open || link.to_backend || link.blocked_since < 0) return;
    if (wire_.now() - link.blocked_since <= longest_write_ + slack) return;
    ledger_.wrong("a client that takes nothing is held for %lld ms, write_timeout is %lld ms",
                  static_cast<long long>((wire_.now() - link.blocked_since) / kMillisecond),
                  static_cast<long long>(longest_write_ / kMillisecond));
  }

  // ---- at rest: all limits have passed since the last fault ----

  void check_rest() {
    if (const std::string left = left_over(gateway_); !left.empty()) ledger_.wrong("%s", left.c_str());
    const auto& names = gateway_.control().registry().backend_names();
    for (std::uint32_t i = 1; i < names.size(); ++i) {
      const BackendId id{i};
      expect_zero("pending", gateway_.metrics().pending(id));
      expect_zero("running by admission", gateway_.admission().running_on(id));
      std::int64_t open = 0;
      std::int64_t queued = 0;
      for (const auto& slab : gateway_.metrics().slabs()) {
        if (const BackendCounters* cells = slab->backend(id)) {
          open += cells->connections.read_signed();
          queued += cells->queue_depth.read_signed();
        }
      }
      expect_zero("backend connections by the gauge", open);
      expect_zero("queue depth", queued);
    }
    expect_zero("requests in the queue", gateway_.admission().waiting());
    if (!ledger_.draining) {
      expect_zero("clients that nobody accepts", static_cast<std::int64_t>(wire_.listener.backlog.size()));
    }
    for (const auto& worker : gateway_.each_worker()) {
      expect_zero("client connections", static_cast<std::int64_t>(worker->sessions().live()));
      expect_zero("backend connections", static_cast<std::int64_t>(worker->sessions().pool().open()));
      expect_zero("armed timers", static_cast<std::int64_t>(worker->armed_timers()));
      // A worker keeps its scratch block.
      if (worker->taken_bytes() > kRoomyBlock) ledger_.wrong("at rest a worker holds %zu bytes", worker->taken_bytes());
    }
    std::int64_t clients = 0;
    for (const auto& slab : gateway_.metrics().slabs()) clients += slab->thread().client_connections.read_signed();
    expect_zero("client connections by the gauge", clients);
    expect_zero("client connections placed", gateway_.placed());
  }

  void check_closed() {
    expect_zero("descriptors", static_cast<std::int64_t>(wire_.descriptors()));
    expect_zero("bytes of the body budget", static_cast<std::int64_t>(gateway_.budget().used()));
  }

  // ---- at the end ----

  // `slack_ns`: how late a worker may hear of a drain.
  void check_counts(Ns slack_ns) {
    Totals lines;
    for (std::size_t i = 0; i < ledger_.requests.size() && ledger_.ok(); ++i) {
      const Request& request = ledger_.requests[i];
      check_request(request, static_cast<unsigned>(i));
      const bool late = ledger_.draining && request.began_at > ledger_.drained_at + slack_ns;
      if (late && !request.attempts.empty()) ledger_.wrong("r%zu: came to a backend, though Nexus drains", i);
      if (ledger_.gentle) check_gentle(request, static_cast<unsigned>(i));
      if (request.lines == 1) lines.add(request);
      happened.add(request);
    }
    if (ledger_.ok()) compare(lines, counted());
  }

 private:
  struct Totals {
    std::map<std::pair<std::string, unsigned>, std::int64_t> statuses;  // by backend and status
    std::map<std::string, std::int64_t> errors;
    std::map<bool, std::array<std::int64_t, 4>> keys;  // requests, failed ones, tokens; false: without a known key
    std::int64_t requests = 0, failed = 0, attempts = 0, left = 0;
    std::int64_t prompts = 0, prompt_tokens = 0, completions = 0, completion_tokens = 0;

    void add(const Request& request) {
      statuses[{request.line_backend == "-" ? "none" : request.line_backend, request.line_status}] += 1;
      requests += 1;
      auto& key = keys[request.line_key != "-"];
      key[0] += 1;
      key[1] += request.line_error != "-" ? 1 : 0;
      key[2] += std::max<std::int64_t>(request.line_prompt_tokens, 0);
      key[3] += std::max<std::int64_t>(request.line_completion_tokens, 0);
      attempts += request.line_attempts;
      if (request.line_error != "-") {
        errors[request.line_error] += 1;
        failed += 1;
        left += request.line_error == "client_closed" ? 1 : 0;
      }
      if (request.line_prompt_tokens >= 0) prompts += 1, prompt_tokens += request.line_prompt_tokens;
      if (request.line_completion_tokens >= 0) completions += 1, completion_tokens += request.line_completion_tokens;
    }
  };

  Totals counted() const {
    Totals sums;
    const Registry& registry = gateway_.control().registry();
    HistogramValues<kTokenBounds> prompts;
    HistogramValues<kTokenBounds> completions;
    for (const auto& slab : gateway_.metrics().slabs()) {
      slab->pairs().for_each([&](std::uint32_t, std::uint32_t backend, const PairCounters& pair) {
        pair.statuses.for_each([&](const StatusCounters::Count& count) {
          sums.statuses[{registry.backend_names().name(BackendId{backend}), count.status}] +=
              static_cast<std::int64_t>(count.count);
          sums.requests += static_cast<std::int64_t>(count.count);
          if (count.failed) sums.failed += static_cast<std::int64_t>(count.count);
        });
        pair.prompt_tokens.add_to(prompts, pair.prompt_sum);
        pair.completion_tokens.add_to(completions, pair.completion_sum);
      });
      for (std::uint32_t i = 0; i < registry.model_names().size(); ++i) {
        const ModelCounters* cells = slab->model(ModelId{i});
        for (std::size_t type = 1; cells != nullptr && type < kErrorTypeNames.size(); ++type) {
          const auto count = static_cast<std::int64_t>(cells->errors[type].read());
          if (count > 0) sums.errors[std::string(kErrorTypeNames[type])] += count;
        }
      }
      for (std::uint32_t i = 0; i < registry.keys().names().size(); ++i) {
        const KeyCounters* cells = slab->key(KeyId{i});
        if (cells == nullptr || cells->all_requests() == 0) continue;
        auto& key = sums.keys[i != 0];
        key[0] += static_cast<std::int64_t>(cells->all_requests());
        key[1] += cells->errors.read_signed();
        key[2] += cells->prompt_tokens.read_signed();
        key[3] += cells->completion_tokens.read_signed();
      }
      for (std::uint32_t i = 0; i < registry.backend_names().size(); ++i) {
        const BackendCounters* cells = slab->backend(BackendId{i});
        if (cells == nullptr) continue;
        for (const Counter& outcome : cells->attempts) sums.attempts += static_cast<std::int64_t>(outcome.read());
      }
      for (const Counter& phase : slab->thread().disconnects) sums.left += static_cast<std::int64_t>(phase.read());
    }
    sums.prompts = static_cast<std::int64_t>(prompts.count());
    sums.prompt_tokens = static_cast<std::int64_t>(prompts.sum);
    sums.completions = static_cast<std::int64_t>(completions.count());
    sums.completion_tokens = static_cast<std::int64_t>(completions.sum);
    return sums;
  }

  void compare(const Totals& lines, const Totals& sums) {
    same("requests", lines.requests, sums.requests);
    same("failed requests", lines.failed, sums.failed);
    same("attempts", lines.attempts, sums.attempts);
    same("clients that left", lines.left, sums.left);
    same("prompts", lines.prompts, sums.prompts);
    same("prompt tokens", lines.prompt_tokens, sums.prompt_tokens);
    same("completions", lines.completions, sums.completions);
    same("completion tokens", lines.completion_tokens, sums.completion_tokens);
    if (lines.statuses != sums.statuses) ledger_.wrong("requests by backend and status differ from the log's");
    if (lines.keys != sums.keys) ledger_.wrong("requests, failures or tokens by key differ from the log's");
    if (lines.errors != sums.errors) ledger_.wrong("errors by type differ from the log's");
  }
  void same(const char* what, std::int64_t log, std::int64_t metrics) {
    if (log == metrics) return;
    ledger_.wrong("%s: the log says %lld, the metrics %lld", what, static_cast<long long>(log),
                  static_cast<long long>(metrics));
  }
  void expect_zero(const char* what, std::int64_t value) {
    if (value != 0) ledger_.wrong("at rest: %s is %lld, not 0", what, static_cast<long long>(value));
  }

  // Nobody waits for a backend that has a place free.
  void check_queue(BackendId id) {
    const Admission& admission = gateway_.admission();
    const std::uint32_t waiting = admission.waiting_for(id), cap = admission.cap_of(id);
    if (waiting == 0 || (cap > 0 && admission.running_on(id) >= cap)) return;
    ledger_.wrong("%u requests wait for %s, which runs %u and has a cap of %u", waiting,
                  gateway_.control().registry().backend_names().name(id).c_str(), admission.running_on(id), cap);
  }

  void check_cap(BackendId id, std::uint32_t cap, std::int64_t pending) {
    const std::uint32_t running = gateway_.admission().running_on(id);
    const auto& name = gateway_.control().registry().backend_names().name(id);
    if (running > cap) ledger_.wrong("%u requests run on %s, whose cap is %u", running, name.c_str(), cap);
    std::int64_t queued = 0;
    for (const auto& slab : gateway_.metrics().slabs()) {
      if (const BackendCounters* cells = slab->backend(id)) queued += cells->queue_depth.read_signed();
    }
    if (pending - queued > static_cast<std::int64_t>(cap)) {
      ledger_.wrong("%lld requests are pending on %s, whose cap is %u", static_cast<long long>(pending - queued),
                    name.c_str(), cap);
    }
  }

  // ---- one request: its log line, its response, its arrivals at backends ----

  // Without faults every response is complete, and the only errors are a full queue and a missing model.
  void check_gentle(const Request& request, unsigned n) {
    if (request.behind_close) return;
    if (!request.whole) return ledger_.wrong("r%u: not answered whole, though nothing fails", n);
    const auto& error = request.line_error;
    if (request.lines == 1 && error != "-" && error != "bad_request" && error != "overloaded" &&
        error != "no_backend" && error != "no_healthy_backend") {
      ledger_.wrong("r%u: %s (%u), though nothing fails", n, error.c_str(), request.line_status);
    }
    if (request.status == 408) ledger_.wrong("r%u: 408, though nothing fails", n);
  }

  void check_request(const Request& request, unsigned n) {
    if (request.lines > 1) return ledger_.wrong("r%u: counted %u times", n, request.lines);
    if (request.lines == 0) {
      if (!request.attempts.empty()) ledger_.wrong("r%u: came to a backend and was not counted", n);
      if (request.status != 0 && request.counted)
        ledger_.wrong("r%u: answered with %u and not counted", n, request.status);
      check_drained(request, n);
      return;
    }
    if (!request.counted && request.kind != Request::Kind::completion && request.kind != Request::Kind::wrong) {
      return ledger_.wrong("r%u: counted, though it is no request", n);
    }
    if (request.line_key != "-" && !request.key.empty() && request.line_key != request.key) {
      return ledger_.wrong("r%u: counted for the key %s, sent with %.*s", n, request.line_key.c_str(),
                           static_cast<int>(request.key.size()), request.key.data());
    }
    // An attempt may arrive twice: over a reused connection that was already closed, and again over a new one.
    if (request.attempts.size() > 2 * request.line_attempts) {
      return ledger_.wrong("r%u: %zu arrivals at backends of %u attempts", n, request.attempts.size(),
                           request.line_attempts);
    }
    for (const Attempt& attempt : request.attempts) {
      if (request.answered_at >= 0 && attempt.sent_at > request.answered_at) {
        ledger_.wrong("r%u: sent to a backend after its answer had begun", n);
      }
    }
    if (request.status == 0) return check_unanswered(request, n);
    check_answered(request, n);
  }

  // A drain waits for the first request of each connection that is there when it begins.
  void check_drained(const Request& request, unsigned n) {
    const bool first = request.kind == Request::Kind::completion && !request.kept && !request.pipelined;
    const bool before = request.asked_at >= 0 && request.asked_at + ledger_.way_ns < ledger_.drained_at;
    if (!ledger_.draining || ledger_.stopped || !ledger_.takes_all || !first || !before || request.client_left) return;
    if (request.status == 0 && !ledger_.memory_faults) {
      ledger_.wrong("r%u: was sent before the drain began, and got no answer", n);
    }
  }

  void check_unanswered(const Request& request, unsigned n) {
    if (request.client_left || ledger_.stopped) return;
    if (request.line_cut) return;  // the reset may have discarded the response
    ledger_.wrong("r%u: counted as %u (%s) and its client, still there, got nothing", n, request.line_status,
                  request.line_error.c_str());
  }

  void check_answered(const Request& request, unsigned n) {
    const bool succeeded = request.line_error == "-";
    const bool may_have_left = request.client_left || ledger_.stopped;
    if (request.line_status != request.status && !(may_have_left && request.line_status == 499)) {
      return ledger_.wrong("r%u: the client saw %u, counted is %u", n, request.status, request.line_status);
    }
    if (succeeded && request.status / 100 != 2) ledger_.wrong("r%u: %u counted as a success", n, request.status);
    if (request.whole) {
      const bool good = request.attempt < 0 || !request.attempts[static_cast<std::size_t>(request.attempt)].in_disguise;
      if (request.status / 100 == 2 && succeeded != good && !request.client_left) {
        ledger_.wrong("r%u: a whole 2xx counted as %s", n, request.line_error.c_str());
      }
      if (request.line_cut && !request.client_left) ledger_.wrong("r%u: whole for its client, cut for the log", n);
      if (!request.client_left && request.line_bytes != sent_bytes(request)) {
        ledger_.wrong("r%u: the client got %zu bytes, the log says %llu", n, sent_bytes(request),
                      static_cast<unsigned long long>(request.line_bytes));
      }
      check_tokens(request, n);
    } else if (was_told(request)) {
      check_tokens(request, n);
    } else if (!request.client_left && !request.line_cut && !ledger_.stopped && !ledger_.draining) {
      // Not in a drain, which waits a second for the rest of a refused body, and then resets.
      ledger_.wrong("r%u: %u, whole for the log, and its client got a part", n, request.status);
    }
    check_error(request, n);
    if (request.attempt >= 0 && request.backend != request.line_backend) {
      ledger_.wrong("r%u: answered by %s, counted for %s", n, request.backend.c_str(), request.line_backend.c_str());
    }
  }

  // The type that the status of an answer is counted under, and no 400 of Nexus's own for a request without a fault.
  void check_error(const Request& request, unsigned n) {
    if (!request.whole || request.client_left || ledger_.stopped || request.line_status == 499) return;
    const std::string& error = request.line_error;
    if (request.attempt < 0) {
      const bool well = request.kind == Request::Kind::completion && request.status == 400;
      if (well && request.received.find("No backend's copy of this model") == std::string::npos) {
        ledger_.wrong("r%u: 400 for a request without a fault: %.200s", n, request.received.c_str());
      }
      return;
    }
    const unsigned status = request.status;
    const bool of_backend = status >= 500 || status == 408 || status == 429;
    if (of_backend && error != "backend_error" && error != "timeout" && error != "parse_error") {
      ledger_.wrong("r%u: a backend's %u is counted as %s", n, status, error.c_str());
    }
    if (!of_backend && status / 100 == 4 && error != "bad_request") {
      ledger_.wrong("r%u: a backend's %u is counted as %s", n, status, error.c_str());
    }
  }
  // True if the stream broke off behind its usage.
  static bool was_told(const Request& request) {
    return request.attempt >= 0 && request.line_cut && request.line_error == "backend_error" &&
           request.attempts[static_cast<std::size_t>(request.attempt)].told_before_end;
  }
  static std::size_t sent_bytes(const Request& request) { return request.received.size(); }

  void check_tokens(const Request& request, unsigned n) {
    if (request.attempt < 0 || request.status / 100 != 2) return;
    const Attempt& attempt = request.attempts[static_cast<std::size_t>(request.attempt)];
    if (attempt.prompt_tokens == kTokensUnsure || request.client_left) return;
    // Without memory for a usage in two pieces Nexus reads no usage, but never a wrong one. A stream may have several.
    const auto same = [this](std::int64_t told, std::int64_t counted) {
      return told == counted || (ledger_.memory_faults && counted == -1);
    };
    if (!same(attempt.prompt_tokens, request.line_prompt_tokens) ||
        !same(attempt.completion_tokens, request.line_completion_tokens)) {
      ledger_.wrong("r%u: its backend told %lld tokens, counted are %lld", n,
                    static_cast<long long>(attempt.prompt_tokens), static_cast<long long>(request.line_prompt_tokens));
    }
  }

  // ---- log lines ----

  std::string_view value(std::string_view name) const {
    const std::string start = " " + std::string(name) + "=";
    const std::size_t at = line_.find(start);
    if (at == std::string::npos) return {};
    const std::size_t from = at + start.size();
    return std::string_view(line_).substr(from, line_.find_first_of(" \n", from) - from);
  }
  std::int64_t number(std::string_view name) const {
    const std::string_view text = value(name);
    std::int64_t out = -1;
    std::from_chars(text.data(), text.data() + text.size(), out);
    return out;
  }

  void read_line() {
    const std::int64_t which = ledger_.number_of(value("request_id"));
    if (which < 0) return ledger_.wrong("a line of a request that nobody sent: %.200s", line_.c_str());
    Request& request = ledger_.requests[static_cast<std::size_t>(which)];
    request.lines += 1;
    if (wire_.story != nullptr) std::fprintf(wire_.story, "              line: %s", line_.c_str());
    request.line_status = static_cast<std::uint16_t>(number("status"));
    request.line_error = value("error_type");
    request.line_backend = value("backend");
    request.line_key = value("key");
    request.line_affinity = value("affinity");
    request.line_slo = value("slo");
    request.line_attempts = static_cast<std::uint32_t>(std::max<std::int64_t>(0, number("attempts")));
    request.line_bytes = static_cast<std::uint64_t>(number("bytes"));
    request.line_prompt_tokens = number("prompt_tokens");
    request.line_completion_tokens = number("completion_tokens");
    request.line_cut = value("cut") == "true";
    wire_.note(9, static_cast<std::uint64_t>(which), request.line_status);
  }

  Ledger& ledger_;
  Gateway& gateway_;
  Wire& wire_;
  std::map<std::string, std::uint32_t> caps_;
  std::size_t most_connections_ = 0;
  std::size_t most_held_bytes_ = 0;
  Ns longest_write_ = 0;
  std::string line_;
};

}  // namespace nexus::sim
