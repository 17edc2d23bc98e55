// scrape.h
// Owns:     comparing the pages /metrics and /v1/stats, rendered when everything is over, with what the log lines say.
// Promises: each total of the pages equals that of the requests' lines; the page is well-formed; every histogram has
//           the buckets that the lines give it.
// Leaves:   comparing the lines with what both simulated sides saw to audit.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "fleet.h"
#include "ledger.h"
#include "tests/lib/exposition_parser.h"
#include "tests/lib/gateway.h"

namespace nexus::sim {

class Scrape {
 public:
  Scrape(Ledger& ledger, const Gateway& gateway, const Fleet& servers)
      : ledger_(ledger), gateway_(gateway), servers_(servers), registry_(gateway.control().registry()) {
    fleet_.backends.reserve(registry_.backends().size());
    for (const Registry::Backend& backend : registry_.backends()) {
      fleet_.backends.push_back({backend.id, backend.is_up(), backend.settings.max_pending});
    }
    std::transform(kEndpoints.begin(), kEndpoints.end(), paths_.begin(), [](const Endpoint& row) { return row.path; });
    fleet_.endpoints = paths_;
    fleet_.has_service_levels = registry_.settings().slo.on();
    PrometheusPage page;
    text_ = page.render(gateway.metrics(), fleet_, ProcessStats{}, registry_.model_names(), registry_.backend_names(),
                        registry_.keys().names(), LabelMode::sanitize);
    stats_ = collect_stats(gateway.metrics(), fleet_, registry_.model_names(), registry_.backend_names(),
                           registry_.keys().names());
  }

  // While requests run: what the page says of now is so.
  void check_now() {
    const exposition::Reader page(text_);
    std::uint64_t connections = 0, queued = 0, in_flight = 0, ending = 0;
    for (const auto& worker : gateway_.each_worker()) {
      connections += worker->sessions().live();
      worker->sessions().each([&](const auto& session) {
        const ExchangeState state = session.exchange_state();
        queued += state == ExchangeState::queued ? 1 : 0;
        in_flight += state >= ExchangeState::connecting && state <= ExchangeState::streaming ? 1 : 0;
        ending += state == ExchangeState::finishing ? 1 : 0;
      });
    }
    shows("nexus_client_connections", page, connections);
    shows("nexus_queue_depth", page, queued);
    within("nexus_backend_in_flight", page.sum("nexus_backend_in_flight"), in_flight, ending);
    const double of_no_backend = page.sum("nexus_queue_depth", {{"backend", "none"}});  // they wait for their own key
    within("nexus_pending_requests", page.sum("nexus_pending_requests") + of_no_backend, queued + in_flight, ending);
  }

  void check() {
    const exposition::Reader page(text_);
    if (!page.problems.empty()) ledger_.wrong("/metrics: %s", page.problems.front().c_str());
    Lines lines;
    for (const Request& request : ledger_.requests) {
      if (request.lines == 1) lines.add(request);
    }
    same("nexus_requests_total", page.sum("nexus_requests_total"), lines.requests);
    same("nexus_endpoint_requests_total", page.sum("nexus_endpoint_requests_total"), lines.requests);
    same("nexus_errors_total", page.sum("nexus_errors_total"), lines.failed);
    for (const auto& [error, count] : lines.errors) {
      same(("nexus_errors_total of " + error).c_str(), page.sum("nexus_errors_total", {{"error_type", error}}), count);
    }
    for (const auto& [status, count] : lines.statuses) {
      const std::string text = std::to_string(status);
      same("nexus_requests_total of a status", page.sum("nexus_requests_total", {{"status", text}}), count);
      same("nexus_endpoint_requests_total of a status", page.sum("nexus_endpoint_requests_total", {{"status", text}}),
           count);
    }
    same("nexus_client_disconnects_total", page.sum("nexus_client_disconnects_total"), lines.left);
    same("nexus_backend_attempts_total", page.sum("nexus_backend_attempts_total"), lines.attempts);
    const double keyless = page.sum("nexus_affinity_total", {{"outcome", "no_key"}});
    same("nexus_affinity_total of requests with a key", page.sum("nexus_affinity_total") - keyless, lines.keyed);
    if (gateway_.control().published()->settings->trace.on()) check_spans(page, lines);
    check_tokens(page, "prompt", lines.prompts);
    check_tokens(page, "completion", lines.completions);
    check_whole(page);
    check_rejections(page);
    check_levels(page);
    check_gauges(page);
    check_stats(lines);
  }

 private:
  struct Lines;
  // Each request has one span and each attempt another one, whether they found room or not.
  void check_spans(const exposition::Reader& page, const Lines& lines) {
    const double lost = page.sum("nexus_spans_dropped_total", {{"reason", "queue_full"}});
    const auto made = static_cast<double>(gateway_.metrics().spans().pushed()) + lost;
    same("the number of spans", made,
         lines.requests + static_cast<std::uint64_t>(page.sum("nexus_backend_attempts_total")));
  }

  struct Lines {
    std::uint64_t requests = 0, failed = 0, left = 0, attempts = 0, keyed = 0;
    std::map<std::string, std::uint64_t> errors;
    std::map<unsigned, std::uint64_t> statuses;
    std::vector<std::int64_t> prompts, completions;

    void add(const Request& request) {
      requests += 1;
      statuses[request.line_status] += 1;
      attempts += request.line_attempts;
      keyed += request.line_affinity != "-" ? 1 : 0;
      if (request.line_error != "-") {
        failed += 1;
        errors[request.line_error] += 1;
        left += request.line_error == "client_closed" ? 1 : 0;
      }
      if (request.line_prompt_tokens >= 0) prompts.push_back(request.line_prompt_tokens);
      if (request.line_completion_tokens >= 0) completions.push_back(request.line_completion_tokens);
    }
  };

  void shows(const char* name, const exposition::Reader& page, std::uint64_t there) {
    if (page.sum(name) == static_cast<double>(there)) return;
    ledger_.wrong("%s is %.0f, and %llu are there", name, page.sum(name), static_cast<unsigned long long>(there));
  }
  void same(const char* what, double shown, std::uint64_t lines) {
    if (shown == static_cast<double>(lines)) return;
    ledger_.wrong("%s is %.0f, the log says %llu", what, shown, static_cast<unsigned long long>(lines));
  }

  // Each bucket counts the responses of at most so many tokens.
  void check_tokens(const exposition::Reader& page, const char* type, const std::vector<std::int64_t>& lines) {
    const exposition::Family* family = page.family("nexus_tokens_total");
    if (family == nullptr) return lines.empty() ? void() : ledger_.wrong("no nexus_tokens_total");
    std::map<std::string, double> buckets;
    for (const exposition::Sample& sample : family->samples) {
      const auto of_type = sample.labels.find("type"), bound = sample.labels.find("le");
      if (of_type == sample.labels.end() || of_type->second != type || bound == sample.labels.end()) continue;
      buckets[bound->second] += sample.value;
    }
    for (const auto& [bound, shown] : buckets) {
      const double most = bound == "+Inf" ? INFINITY : std::stod(bound);
      const auto count = std::count_if(lines.begin(), lines.end(),
                                       [most](std::int64_t tokens) { return static_cast<double>(tokens) <= most; });
      same("a bucket of nexus_tokens_total", shown, static_cast<std::uint64_t>(count));
    }
  }

  // Requests whose client and backend both saw a whole answer tell what must be counted besides.
  void check_whole(const exposition::Reader& page) {
    std::uint64_t mute = 0, endless = 0, fallbacks = 0, unsure = 0, streams = 0;
    for (const Request& request : ledger_.requests) {
      if (request.lines != 1) continue;
      fallbacks += request.fallback_model.empty() ? 0 : 1;
      const bool good = request.line_error == "-" && request.line_status / 100 == 2;
      const bool sure = good && request.whole && request.attempt >= 0 && !request.client_left &&
                        !request.attempts[static_cast<std::size_t>(request.attempt)].is_cut_unseen;
      if (!sure) {
        unsure += good || !request.attempts.empty() ? 1 : 0;
        continue;
      }
      const Attempt& attempt = request.attempts[static_cast<std::size_t>(request.attempt)];
      mute += attempt.prompt_tokens < 0 && attempt.completion_tokens < 0 ? 1 : 0;
      endless += attempt.lacks_end && attempt.status == 200 ? 1 : 0;
      streams += request.event_stream && request.status == 200 ? 1 : 0;
    }
    if (ledger_.memory_faults) return;
    within("nexus_responses_without_usage_total", page.sum("nexus_responses_without_usage_total"), mute, unsure);
    within("nexus_streams_without_end_total", page.sum("nexus_streams_without_end_total"), endless, unsure);
    // Others were begun, and failed or were left.
    at_least("nexus_fallbacks_total", page.sum("nexus_fallbacks_total"), fallbacks);
    at_least("nexus_time_to_first_token_seconds", page.sum("nexus_time_to_first_token_seconds_count"), streams);
  }
  // Requests that are refused for their head, path or method are counted by that alone.
  void check_rejections(const exposition::Reader& page) {
    std::map<std::string, std::uint64_t> least;
    std::uint64_t unsure = 0;
    for (const Request& request : ledger_.requests) {
      const bool wrong = request.kind == Request::Kind::wrong || request.kind == Request::Kind::malformed;
      if (request.status == 431) least["header_too_large"] += 1;
      if (request.status == 400 && request.kind == Request::Kind::malformed) least["malformed"] += 1;
      if (request.status == 405) least["method"] += 1;
      if (request.status == 404 && request.lines == 0 && wrong) least["unknown_path"] += 1;
      // Without memory for its answer, one that was counted gets 503.
      unsure += request.status == 408 || request.status == 503 || request.status == 0 ? 1 : 0;
    }
    for (const char* reason : {"header_too_large", "malformed", "method", "unknown_path"}) {
      within(reason, page.sum("nexus_http_rejections_total", {{"reason", reason}}), least[reason], unsure);
    }
  }

  // A run has service levels throughout, or none (reloads.h). Each request that must be judged has been, once, and no
  // other one.
  void check_levels(const exposition::Reader& page) {
    const bool on = registry_.settings().slo.on();
    std::uint64_t met = 0, missed = 0;
    for (std::size_t i = 0; i < ledger_.requests.size(); ++i) {
      const Request& request = ledger_.requests[i];
      if (request.lines != 1) continue;
      const std::string& told = request.line_slo;
      const bool judged = told == "yes" || told == "no";
      met += told == "yes" ? 1 : 0;
      missed += told == "no" ? 1 : 0;
      if (!judged && told != (on ? "-" : "")) ledger_.wrong("r%zu: slo=%s in its line", i, told.c_str());
      if (judged && !may_be_judged(request)) ledger_.wrong("r%zu: judged, though it is none of those that are", i);
      if (on && !judged && must_be_judged(request))
        ledger_.wrong("r%zu: not judged (%s)", i, request.line_error.c_str());
      if (told == "yes" && request.line_error != "-") ledger_.wrong("r%zu: failed, and in time", i);
    }
    same("nexus_slo_requests_total in time", page.sum("nexus_slo_requests_total", {{"met", "yes"}}), met);
    same("nexus_slo_requests_total too late", page.sum("nexus_slo_requests_total", {{"met", "no"}}), missed);
    same("nexus_slo_requests_total", page.sum("nexus_slo_requests_total"), met + missed);
    const bool shown = page.family("nexus_slo_requests_total") != nullptr;
    if (shown != on) ledger_.wrong("nexus_slo_requests_total is %s", shown ? "there" : "missing");
  }
  static bool may_be_judged(const Request& request) {
    const std::string& error = request.line_error;
    return request.kind == Request::Kind::completion && request.body.stream && error != "client_closed" &&
           error != "bad_request" && error != "no_backend";
  }
  // Others may have failed before their body was read, by a limit of their key, or by what their client did.
  static bool must_be_judged(const Request& request) {
    const std::string& error = request.line_error;
    const bool tried = request.line_attempts > 0 && (error == "timeout" || error == "drain");
    return may_be_judged(request) && (tried || error == "-" || error == "backend_error" || error == "parse_error" ||
                                      error == "no_healthy_backend");
  }

  void within(const char* what, double shown, std::uint64_t least, std::uint64_t more) {
    at_least(what, shown, least);
    if (shown <= static_cast<double>(least + more)) return;
    ledger_.wrong("%s is %.0f, at most %llu were seen", what, shown, static_cast<unsigned long long>(least + more));
  }
  void at_least(const char* what, double shown, std::uint64_t least) {
    if (shown >= static_cast<double>(least)) return;
    ledger_.wrong("%s is %.0f, at least %llu were seen", what, shown, static_cast<unsigned long long>(least));
  }

  void check_gauges(const exposition::Reader& page) {
    same("nexus_pending_requests", page.sum("nexus_pending_requests"), 0);
    same("nexus_backend_in_flight", page.sum("nexus_backend_in_flight"), 0);
    same("nexus_queue_depth", page.sum("nexus_queue_depth"), 0);
    same("nexus_client_connections", page.sum("nexus_client_connections"), 0);
    const double passed = page.sum("nexus_backend_latency_seconds_count");
    if (passed > static_cast<double>(servers_.good_probes())) {
      ledger_.wrong("nexus_backend_latency_seconds counts %.0f checks, %llu were answered", passed,
                    static_cast<unsigned long long>(servers_.good_probes()));
    }
  }

  void check_stats(const Lines& lines) {
    same("/v1/stats: requests", static_cast<double>(stats_.all.requests), lines.requests);
    std::uint64_t backends = 0, models = 0;
    for (const auto* rows : {&stats_.backends, &stats_.removed}) {
      for (const StatsRow& row : *rows) backends += row.requests;
    }
    for (std::size_t i = 0; i < stats_.models.size(); ++i) {
      models += stats_.models[i].requests;
      const bool ordered = i == 0 || stats_.models[i - 1].requests >= stats_.models[i].requests;
      if (!ordered) ledger_.wrong("/v1/stats: the models are not in order of their requests");
    }
    for (const StatsRow& row : stats_.backends) {
      const auto& registered = registry_.backends();
      const bool known = std::any_of(registered.begin(), registered.end(),
                                     [&](const auto& backend) { return backend.settings.name == row.name; });
      if (!known && row.name != "none")
        ledger_.wrong("/v1/stats: %s is shown as one of the fleet", std::string(row.name).c_str());
    }
    if (backends > lines.requests || models > lines.requests) ledger_.wrong("/v1/stats: a request counts twice");
  }

  Ledger& ledger_;
  const Gateway& gateway_;
  const Fleet& servers_;
  const Registry& registry_;
  std::array<std::string_view, kEndpoints.size()> paths_{};
  FleetView fleet_;
  std::string text_;
  Stats stats_;
};

}  // namespace nexus::sim
