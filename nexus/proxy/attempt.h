// attempt.h
// Owns:     a request's try at one backend: the connection it has there, what of the request was sent, its outcome.
// Promises: it is counted as pending from begin() to leave(), and has one outcome; a connection goes back to the pool
//           only where the request went out whole.
// Leaves:   which backend and what a failure means to exchange.h, the request's bytes to upstream_request.h.
// Threads:  its worker's.
#pragma once

#include <array>
#include <cassert>
#include <span>
#include <string>
#include <string_view>

#include "nexus/proxy/upstream_pool.h"
#include "nexus/proxy/upstream_request.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {

constexpr std::size_t kSentPerTurn = 512u << 10;  // of a request, before others get their turn
constexpr Ns kStaleWindow = kSecond;              // a kept connection found closed so soon was closed before

template <class Net>
class Attempt {
 public:
  enum class Sent : std::uint8_t {
    some,   // the kernel takes no more now
    share,  // as much as goes out in one turn
    all,
    failed,  // what the backend said before it closed can still be read
  };

  Attempt(Handle owner, WorkerContext<Net>& core, UpstreamPool<Net>& pool)
      : owner_(owner), context_(core), pool_(pool) {}
  Attempt(const Attempt&) = delete;
  Attempt& operator=(const Attempt&) = delete;

  const BackendView* backend() const { return backend_; }  // the last one tried
  Upstream<Net>* upstream() const { return upstream_; }
  Connection<Net>& connection() const { return upstream_->connection; }

  void begin(const BackendView& backend) {
    assert(upstream_ == nullptr && !pending_);
    backend_ = &backend;
    context_.slab.add_pending(backend.id, 1);
    pending_ = true;
    open_ = true;
    stale_seen_ = false;
    answered_ = false;
  }

  // Its connection stands: from here on the answer may come, also before the request is sent whole.
  void begin_sending() { sent_ns_ = context_.now; }

  // Writes the request as this backend gets it; `model` is empty where it is the client's own.
  void compose(const RequestView& request, const BodyFacts& facts, std::string_view model, bool ask_usage,
               std::string_view request_id) {
    compose_request(own_, image_, request, facts, *backend_, model, ask_usage, request_id, context_.shared.via_line);
    image_sent_ = 0;
  }

  // A kept connection, where there is one.
  bool take_kept() {
    upstream_ = pool_.take_idle(backend_->id, *backend_->address, owner_);
    return upstream_ != nullptr;
  }

  // A new one, on its way. False where there is none to be had.
  [[gnu::cold]] bool connect() {
    const typename UpstreamPool<Net>::Connecting connecting = pool_.connect(backend_->id, *backend_->address, owner_);
    if (connecting.upstream == nullptr) {
      if (connecting.outcome == SocketOutcome::no_descriptor) context_.slab.limit_hit(Limit::descriptors);
      if (connecting.outcome == SocketOutcome::no_memory) context_.slab.limit_hit(Limit::memory);
      return false;
    }
    upstream_ = connecting.upstream;
    return true;
  }

  bool is_connected() const { return context_.net.connect_error(connection().socket()) == 0; }

  // Sends what the kernel takes of the request; `body` is where it was composed from.
  Sent send(char* body) {
    std::array<iovec, UpstreamRequest::kMaxPieces> parts;
    const std::size_t share_end = image_sent_ + kSentPerTurn;
    while (image_sent_ < image_.total()) {
      if (image_sent_ == share_end) return Sent::share;
      const std::size_t count = image_.fill(parts, own_.data(), body, image_sent_, share_end);
      const IoResult result = context_.net.write(connection().socket(), std::span(parts.data(), count));
      if (result.kind == IoResult::Kind::again) return Sent::some;
      if (!result.ok()) {
        send_failed_ = true;
        connection().note(Event{upstream_->token, true, false, true});
        return Sent::failed;
      }
      image_sent_ += result.bytes;
    }
    sent_ns_ = context_.net.now();
    return Sent::all;
  }

  std::size_t sent_bytes() const { return image_sent_; }
  Ns sent_ns() const { return sent_ns_; }  // or when sending began, until all is sent
  bool send_failed() const { return send_failed_; }
  bool is_first() const { return !stale_seen_; }  // on this backend
  void note_answer() { answered_ = true; }
  bool answered() const { return answered_; }  // with a byte at least

  // A kept-alive connection that was closed under the request: the backend never saw it, or said nothing of it. One
  // that breaks later may have been broken by this very request, which should then go elsewhere.
  bool found_closed(bool still_sending) const {
    const bool at_once = still_sending || context_.now - sent_ns_ < kStaleWindow;
    return upstream_->reused && !answered_ && !stale_seen_ && at_once;
  }

  // After found_closed(): the same again; connect() follows.
  [[gnu::cold]] void start_over() {
    close();
    stale_seen_ = true;
    send_failed_ = false;
    image_sent_ = 0;
  }

  // The first outcome counts.
  void end(AttemptOutcome outcome) {
    if (!open_) return;
    open_ = false;
    context_.slab.attempt(backend_->id, outcome);
  }

  // Gives the connection back for another request; `clean`: the answer leaves it so.
  void release(bool clean) {
    if (!clean || send_failed_ || image_sent_ != image_.total()) return close();
    pool_.give_back(*std::exchange(upstream_, nullptr));
  }

  void close() {
    if (upstream_ != nullptr) pool_.drop(*std::exchange(upstream_, nullptr));
  }

  void leave() {
    send_failed_ = false;
    if (!std::exchange(pending_, false)) return;
    context_.slab.add_pending(backend_->id, -1);
  }

  // Makes ready for the next request.
  void reset() {
    backend_ = nullptr;
    stale_seen_ = false;
  }

 private:
  Handle owner_;
  WorkerContext<Net>& context_;
  UpstreamPool<Net>& pool_;
  const BackendView* backend_ = nullptr;
  Upstream<Net>* upstream_ = nullptr;
  std::string own_;
  UpstreamRequest image_;
  std::size_t image_sent_ = 0;
  Ns sent_ns_ = 0;
  bool pending_ = false;     // counted in nexus_pending_requests of backend_
  bool open_ = false;        // its outcome is not counted yet
  bool stale_seen_ = false;  // a kept-alive connection was found closed once already
  bool send_failed_ = false;
  bool answered_ = false;
};

}  // namespace nexus
