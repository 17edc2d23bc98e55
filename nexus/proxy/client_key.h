// client_key.h
// Owns:     the client's key of one request: its id and name, its unit of nexus_key_pending, and its claim to a turn.
// Promises: the key is the one that the request came with, whatever a reload does to the file meanwhile; what it holds
//           is given back by leave(), or by the destructor.
// Leaves:   finding the key to server/client_keys.h; counting the request to exchange.h.
// Threads:  its worker's.
// Tested by: tests/e2e/keys.test.mjs, tests/sim, tests/hostile_reload_test.cpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "nexus/fleet/admission.h"
#include "nexus/proxy/rate_lines.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {

class ClientKey {
 public:
  KeyId id() const { return view_ == nullptr ? KeyId::none : view_->id; }
  std::string_view name() const { return view_ == nullptr ? std::string_view() : view_->settings->name; }

  // `index`: of the key in the snapshot's api_keys, if the request has one; `host`: a number of the client's host.
  template <class Net>
  void enter(WorkerContext<Net>& context, std::optional<std::size_t> index, std::size_t host) {
    host_ = host;
    if (index) {
      snapshot_ = context.snapshot.again();
      view_ = &(*snapshot_->keys)[*index];
    }
    count_ = count_key(context.slab, id());
  }

  // Its claim to a turn, for all its attempts, from the first time that the request finds a cap.
  template <class Net>
  Claim& claim(WorkerContext<Net>& context, std::size_t body_bytes) {
    if (claim_.flow != nullptr) return claim_;
    const Settings& settings = context.settings();
    KeylessFlows& keyless = context.shared.keyless;
    const KeyOptions& options = view_ == nullptr ? settings.keys.defaults : view_->settings->options;
    claim_.flow = view_ != nullptr                           ? &view_->state->flow
                  : settings.keys.fair_by == FairBy::address ? &keyless.by_address[host_ % kAddressFlows]
                                                             : &keyless.all;
    claim_.weight = static_cast<std::uint32_t>(options.weight);
    claim_.priority = static_cast<std::uint32_t>(options.priority);
    claim_.cost = fair_cost(body_bytes / kBytesPerToken, 0);
    claim_.now_ns = context.now;
    claim_.aged_after_ns = settings.queue.timeout_ns / 2;
    return claim_;
  }

  // The limit of the key's requests at once, for admission.h.
  Admission::Cap places() const {
    if (view_ == nullptr) return {};
    return {view_->state->places, static_cast<std::uint32_t>(view_->settings->options.max_pending)};
  }
  bool may_use(std::string_view model) const {
    return view_ == nullptr || model.empty() || view_->settings->may_use(model);
  }
  const ApiKey* settings() const { return view_ == nullptr ? nullptr : view_->settings; }

  // Takes the request, and the tokens that it may need, from what the key has left of this minute. An error if that is
  // not enough; message() says more then. Else rate_lines() are for the response. Both are empty without limits.
  template <class Net>
  std::optional<ApiError> charge(WorkerContext<Net>& context, const Endpoint& endpoint, std::string_view body) {
    if (view_ == nullptr || (view_->settings->options.rpm == 0 && view_->settings->options.tpm == 0))
      return std::nullopt;
    const KeyOptions& options = view_->settings->options;
    KeyState& state = *view_->state;
    const std::uint64_t tokens = std::min(body.size() / kBytesPerToken, kMaxFairCost) +
                                 (has_completion(endpoint.api) ? expected_completion(body) : 0);
    Ns wait = options.rpm > 0 ? state.requests.take(context.now, options.rpm, 1) : 0;
    std::optional<ApiError> refusal;
    if (wait > 0) refusal = ApiError::key_requests;
    if (!refusal && options.tpm > 0) {
      wait = state.tokens.take(context.now, options.tpm, tokens);
      if (wait == 0) taken_tokens_ = tokens;
      if (wait > 0) refusal = ApiError::key_tokens;
      if (wait > 0 && options.rpm > 0) state.requests.settle(options.rpm, 1, 0);
    }
    write_lines(endpoint.row().errors, context.now, context.net.wall_now());
    if (refusal) note_refusal(*refusal == ApiError::key_requests, wait);
    return refusal;
  }
  const std::string& rate_lines() const { return lines_; }
  const std::string& message() const { return message_; }

  // The request is over, and holds no place. What it has cost is known now, or what is estimated stands if it was
  // served. Its id and name stay until forget().
  void leave(Admission& admission, const RequestRecord& record) {
    count_.reset();
    const bool told = record.prompt_tokens >= 0 || record.completion_tokens >= 0;
    const auto tokens = [](std::int64_t count) { return static_cast<std::uint64_t>(std::max<std::int64_t>(count, 0)); };
    if (taken_tokens_ > 0 && (told || record.status / 100 != 2)) {
      const std::uint64_t used = tokens(record.prompt_tokens) + tokens(record.completion_tokens);
      view_->state->tokens.settle(view_->settings->options.tpm, taken_tokens_, used);
    }
    taken_tokens_ = 0;
    if (!claim_.charged) return;
    const std::uint64_t cost = told ? fair_cost(tokens(record.prompt_tokens), tokens(record.completion_tokens))
                               : record.status / 100 == 2 ? claim_.cost
                                                          : 0;
    admission.settle(claim_, cost);
  }

  // Prepares for the next request.
  void forget() {
    if (claim_.flow != nullptr) claim_ = Claim();
    if (view_ == nullptr) return;
    lines_.clear();
    message_.clear();
    view_ = nullptr;
    snapshot_ = SnapshotUse();
  }

 private:
  static constexpr bool has_completion(Api api) {
    return api != Api::embeddings && api != Api::rerank && api != Api::score && api != Api::tokenize &&
           api != Api::moderations;
  }

  void write_lines(ErrorShape shape, Ns now, Ns wall) {
    const KeyOptions& options = view_->settings->options;
    const auto write = [&](std::string_view what, std::uint64_t limit, const MinuteBucket& bucket) {
      if (limit > 0)
        append_rate_lines(lines_, shape, what, {limit, bucket.left(now, limit), bucket.full_in(now)}, wall);
    };
    lines_.clear();
    write("requests", options.rpm, view_->state->requests);
    write("tokens", options.tpm, view_->state->tokens);
  }

  [[gnu::cold]] void note_refusal(bool of_requests, Ns wait) {
    const KeyOptions& options = view_->settings->options;
    append_retry_lines(lines_, wait);
    message_ = "Rate limit reached for key '" + std::string(name()) + "' on " + (of_requests ? "requests" : "tokens") +
               " per minute: limit " + std::to_string(of_requests ? options.rpm : options.tpm) + ". Try again in " +
               go_duration(wait) + ".";
  }

  SnapshotUse snapshot_;  // of view_
  const KeyView* view_ = nullptr;
  KeyCount count_;
  Claim claim_;
  std::size_t host_ = 0;
  std::uint64_t taken_tokens_ = 0;  // of this minute's, until they are put right
  std::string lines_, message_;
};

}  // namespace nexus
