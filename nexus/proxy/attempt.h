// attempt.h
// Owns:     a request's try at one backend: its upstream connection, how much of the request was sent, its outcome.
// Promises: the attempt is counted as pending from begin() to leave() and has exactly one outcome; a connection goes
//           back to the pool only if the whole request was sent over it.
// Leaves:   which backend, and what a failure means, to exchange.h; the request's bytes to upstream_request.h.
// Threads:  its worker's.
// Tested by: tests/attempt_test.cpp, tests/sim, tests/hostile
#pragma once

#include <array>
#include <cassert>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/base/limits.h"
#include "nexus/fleet/admission.h"
#include "nexus/proxy/upstream_pool.h"
#include "nexus/proxy/upstream_request.h"
#include "nexus/proxy/worker_context.h"

namespace nexus {

template <class Net>
class Attempt {
 public:
  using Context = WorkerContext<Net>;
  using Pool = UpstreamPool<Net>;
  enum class Sent : std::uint8_t {
    some,   // the kernel takes no more now
    share,  // kSentPerTurn bytes; there are more
    all,
    failed,  // the backend closed; its last bytes can still be read
  };

  Attempt(Context& context, Pool& pool) : context_(context), pool_(pool) {}
  Attempt(const Attempt&) = delete;
  Attempt& operator=(const Attempt&) = delete;

  // The events of its connections are for `owner`.
  void attach(Handle owner) { owner_ = owner; }

  const BackendView* backend() const { return backend_; }  // the last one tried
  Upstream<Net>* upstream() const { return upstream_; }
  Connection<Net>& connection() const { return upstream_->connection; }

  // `backend` is of `snapshot`, which is kept: the exchange may look at a newer one meanwhile.
  void begin(SnapshotUse snapshot, const BackendView& backend) {
    assert(upstream_ == nullptr && !pending_);
    snapshot_ = std::move(snapshot);
    backend_ = &backend;
    pending_ = count_pending(context_.slab, backend.id);
    open_ = Open::yes;
    began_ns_ = context_.now;
    stale_seen_ = answered_ = send_failed_ = false;
  }

  // A span is made of this attempt, from begin() to end().
  void make_span() { open_ = Open::with_span; }
  Ns began_ns() const { return began_ns_; }

  // Writes the request as this backend gets it; `model` is empty if it is the client's own. `own_lines`: of Nexus, in
  // its head.
  void compose(const RequestView& request, const BodyFacts& facts, std::string_view model, bool ask_usage,
               std::string_view request_id, std::string_view own_lines) {
    if (!text_) text_ = context_.request_texts.take();
    if (!text_) throw std::bad_alloc();
    compose_request(*text_, request, facts, *backend_, model, ask_usage, request_id, own_lines);
    bytes_ = text_->image.total();
    sent_bytes_ = 0;
  }

  // Takes an idle connection from the pool. False if there is none.
  bool take_kept() {
    upstream_ = pool_.take_idle(backend_->id, *backend_->address, owner_, backend_->tls);
    return upstream_ != nullptr;
  }

  // Starts a new connection.
  [[gnu::cold]] SocketOutcome connect() {
    return pool_.connect(backend_->id, *backend_->address, owner_, upstream_, backend_->tls);
  }

  // The handshake is over, or its time is.
  void count_handshake() {
    const std::optional<TlsOutcome> outcome = connection().handshake_outcome();
    if (outcome) context_.slab.tls_handshake(TlsSide::backend, *outcome);
  }

  // The connection is established: the response may come at any time, also before the request is sent whole.
  void begin_sending() { sent_ns_ = context_.now; }

  // Sends what the kernel takes of the request; `body` is the body that it was composed from. Inlined: nearly each
  // request is sent by one of its two callers.
  [[gnu::always_inline]] Sent send(char* body) {
    std::array<iovec, UpstreamRequest::kMaxPieces> parts;
    const std::size_t share_end = sent_bytes_ + kSentPerTurn;
    while (sent_bytes_ < bytes_) {
      if (sent_bytes_ == share_end) return Sent::share;
      const std::size_t count = text_->image.fill(parts, text_->own.data(), body, sent_bytes_, share_end);
      const IoResult result = connection().write_some(context_.net, std::span(parts.data(), count));
      if (result.kind == IoResult::Kind::again) return Sent::some;
      if (!result.ok()) {
        send_failed_ = true;
        return Sent::failed;
      }
      sent_bytes_ += result.bytes;
    }
    sent_ns_ = context_.net.now();
    return Sent::all;
  }

  std::size_t sent_bytes() const { return sent_bytes_; }
  Ns sent_ns() const { return sent_ns_; }  // when all was sent; until then, when sending began
  bool send_failed() const { return send_failed_; }
  bool is_first() const { return !stale_seen_; }  // connection to this backend
  void note_answer() { answered_ = true; }
  bool answered() const { return answered_; }  // with at least one byte

  // True if a reused connection was closed before the backend can have seen the request. One that closes later may have
  // been closed because of this very request, which should then go to another backend.
  bool found_closed(bool still_sending) const {
    const bool at_once = still_sending || context_.now - sent_ns_ < kStaleWindow;
    const bool resend = context_.settings().upstream.resend == Resend::stale;
    return resend && upstream_->reused && !answered_ && !stale_seen_ && at_once;
  }

  // After found_closed(): the request is sent again from its start; connect() follows.
  [[gnu::cold]] void start_over() {
    close();
    stale_seen_ = true;
    send_failed_ = false;
    sent_bytes_ = 0;
  }

  // Counts the attempt's outcome; only the first call counts. True if that ends its span.
  bool end(AttemptOutcome outcome) {
    const Open was = std::exchange(open_, Open::no);
    if (was != Open::yes) [[unlikely]] {
      if (was == Open::no) return false;
    }
    context_.slab.attempt(backend_->id, outcome);
    Ended& row = ended_[std::min<std::size_t>(ended_count_++, ended_.size() - 1)];
    row = {backend_->id, outcome, context_.now - began_ns_};
    return was == Open::with_span;
  }

  // Each attempt's backend, outcome and milliseconds, as `gpu-1:status_5xx:12 gpu-2:ok:340`, written into `room`. Of
  // many the last ones are left out but for the very last.
  std::string_view tries(std::span<char> room) const {
    std::size_t used = 0;
    const auto add = [&](std::string_view text) { used += text.copy(room.data() + used, room.size() - used); };
    for (std::size_t i = 0; i < std::min<std::size_t>(ended_count_, ended_.size()); ++i) {
      if (i > 0) add(" ");
      add(name_of_backend(ended_[i].backend));
      add(":");
      add(name_of(ended_[i].outcome));
      add(":");
      add(Digits(static_cast<std::uint64_t>(ended_[i].span_ns / kMillisecond)).view());
    }
    return {room.data(), used};
  }

  // Gives the connection back to the pool if `clean` (the response leaves it usable), else closes it.
  void release(bool clean) {
    if (!clean || send_failed_ || sent_bytes_ != bytes_) return close();
    pool_.give_back(*std::exchange(upstream_, nullptr));
  }

  void close() {
    if (upstream_ != nullptr) pool_.drop(*std::exchange(upstream_, nullptr));
  }

  void leave() { pending_.reset(); }

  // The request will not be sent again.
  void drop_text() {
    if (text_ && text_->own.capacity() > kKeptTextBytes) std::string().swap(text_->own);  // `= ""` would keep it
    text_.reset();
  }

  // Prepares for the next request.
  void reset() {
    backend_ = nullptr;
    snapshot_ = SnapshotUse();
    stale_seen_ = false;
    ended_count_ = 0;
    drop_text();
  }

 private:
  enum class Open : std::uint8_t { no, yes, with_span };

  struct Ended {
    BackendId backend;
    AttemptOutcome outcome;
    Ns span_ns;
  };

  // A reload may have removed a backend since.
  std::string_view name_of_backend(BackendId id) const {
    for (const Snapshot* snapshot : {snapshot_.get(), context_.snapshot.get()}) {
      if (snapshot == nullptr) continue;
      for (const BackendView& backend : snapshot->backends) {
        if (backend.id == id) return backend.name;
      }
    }
    return "removed";
  }

  Handle owner_;
  Context& context_;
  Pool& pool_;
  SnapshotUse snapshot_;
  const BackendView* backend_ = nullptr;
  Upstream<Net>* upstream_ = nullptr;
  ObjectPool<RequestText>::Lease text_;
  std::size_t bytes_ = 0;       // of the request
  std::size_t sent_bytes_ = 0;  // of these
  Ns sent_ns_ = 0;
  PendingCount pending_;
  Ns began_ns_ = 0;
  std::array<Ended, 4> ended_;  // attempts, the last one in the last row
  std::uint32_t ended_count_ = 0;
  Open open_ = Open::no;     // its outcome is not counted yet
  bool stale_seen_ = false;  // a reused connection was found closed once already
  bool send_failed_ = false;
  bool answered_ = false;
};

}  // namespace nexus
