// span.h
// Owns:     a span as it is handed over, and the queue of spans from the workers to the control thread.
// Promises: a record has a fixed size and no content of a request: names, ids, counts and times alone, cut to their
//           limits. push() takes no lock and no memory; at most kMaxSpansWaiting wait. The receiver is woken for the
//           first span in an empty queue, and when another kSpansPerExport wait; no wake-up is lost.
// Leaves:   what a span tells to proxy/request_trace.h, its text to otlp_json.h, sending to server/span_exporter.h,
//           counting those that found no room to the caller.
// Threads:  push(): any, after open(). The others: the receiver's.
// Tested by: tests/span_test.cpp, tests/e2e/trace.test.mjs
#pragma once

#include <array>
#include <atomic>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>
#include <type_traits>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"
#include "nexus/base/text.h"

namespace nexus {

// A text of at most N bytes; a longer one is cut between two characters.
template <std::size_t N>
struct BoundedText {
  std::array<char, N> bytes;
  std::uint16_t length = 0;

  void set(std::string_view text) {
    const std::string_view part = text.substr(0, N);
    length = static_cast<std::uint16_t>(part.size() < text.size() ? without_cut_character(part) : part.size());
    part.copy(bytes.data(), length);
  }
  std::string_view view() const { return {bytes.data(), length}; }
};

struct SpanRecord {
  enum class Kind : std::uint8_t { server = 2, client = 3 };  // as OTLP numbers them

  std::array<char, 32> trace_id{};  // hex digits
  std::uint64_t span_id = 0;
  std::uint64_t parent_id = 0;  // 0: none
  Kind kind = Kind::server;
  std::uint8_t flags = 0;      // of the traceparent
  bool remote_parent = false;  // another process's span
  bool stream = false;         // asked for
  bool failed = false;
  std::uint16_t status = 0;  // 0: none
  std::uint16_t port = 0;    // of the backend
  Ns began_wall_ns = 0;
  Ns ended_wall_ns = 0;
  Ns first_chunk_ns = -1;  // here and below: negative = unknown
  std::int64_t input_tokens = -1;
  std::int64_t output_tokens = -1;
  std::int64_t cached_tokens = -1;     // of input_tokens
  std::int64_t reasoning_tokens = -1;  // of output_tokens
  // Constants:
  std::string_view method, route;  // of a server's span
  std::string_view operation, provider;
  std::string_view error;                          // its type; empty: none, or the status says it
  BoundedText<kMaxModelNameBytes> model;           // asked for
  BoundedText<kMaxModelNameBytes> response_model;  // as the response tells it
  BoundedText<kMaxConversationBytes> conversation;
  BoundedText<kMaxBackendNameBytes> backend;  // of a client's span, as host and port
  BoundedText<kMaxHostBytes> host;
  BoundedText<kMaxRequestIdBytes> request_id;
};
static_assert(std::is_trivially_copyable_v<SpanRecord>);

// Many senders, one receiver: each slot's turn says who may use it next (a ring after D. Vyukov).
class SpanQueue {
 public:
  SpanQueue() = default;
  SpanQueue(const SpanQueue&) = delete;
  SpanQueue& operator=(const SpanQueue&) = delete;

  // Before anyone is told that spans are wanted: takes the memory. `wake` may be called by any thread.
  void open(std::function<void()> wake) {
    if (turns_ != nullptr) return;
    auto turns = std::make_unique<std::atomic<std::uint64_t>[]>(kMaxSpansWaiting);
    for (std::size_t i = 0; i < kMaxSpansWaiting; ++i) turns[i].store(i, std::memory_order_relaxed);
    records_ = std::make_unique_for_overwrite<SpanRecord[]>(kMaxSpansWaiting);
    wake_ = std::move(wake);
    turns_ = std::move(turns);
  }

  // Calls fill(SpanRecord&), which must set what it wants different from SpanRecord(). False, without a call, if there
  // is no room.
  template <class Fill>
  bool push(Fill&& fill) {
    if (turns_ == nullptr) return false;
    std::uint64_t at = tail_.load(std::memory_order_relaxed);
    for (;;) {
      const std::uint64_t turn = turns_[slot(at)].load(std::memory_order_acquire);  // its last record was read
      if (turn < at) return false;
      // Relaxed: the slot's turn orders what is in it.
      if (turn == at && tail_.compare_exchange_weak(at, at + 1, std::memory_order_relaxed)) break;
      if (turn > at) at = tail_.load(std::memory_order_relaxed);
    }
    SpanRecord& record = records_[slot(at)];
    record = SpanRecord();
    fill(record);
    // seq_cst, as in pop(): either this thread sees that the queue was empty, or the receiver sees the record.
    turns_[slot(at)].store(at + 1, std::memory_order_seq_cst);
    const std::uint64_t before = at - head_.load(std::memory_order_seq_cst);
    if (before == 0 || (before + 1) % kSpansPerExport == 0) wake_();
    return true;
  }

  // The oldest record, until pop(); null if there is none.
  const SpanRecord* front() const {
    const std::uint64_t head = head_.load(std::memory_order_relaxed);  // only this thread changes it
    const bool ready = turns_ != nullptr && turns_[slot(head)].load(std::memory_order_seq_cst) == head + 1;
    return ready ? &records_[slot(head)] : nullptr;
  }
  void pop() {
    const std::uint64_t head = head_.load(std::memory_order_relaxed);
    assert(front() != nullptr);
    turns_[slot(head)].store(head + kMaxSpansWaiting, std::memory_order_release);  // the record was read
    head_.store(head + 1, std::memory_order_seq_cst);
  }
  // With those that are being written just now.
  std::size_t size() const {
    return static_cast<std::size_t>(tail_.load(std::memory_order_relaxed) - head_.load(std::memory_order_relaxed));
  }

  // For the simulator: all that ever found room.
  std::uint64_t pushed() const { return tail_.load(std::memory_order_relaxed); }

 private:
  static std::size_t slot(std::uint64_t position) { return static_cast<std::size_t>(position) % kMaxSpansWaiting; }

  // Of each slot: the position that may be written into it next, or, one more, the one that may be read.
  std::unique_ptr<std::atomic<std::uint64_t>[]> turns_;
  std::unique_ptr<SpanRecord[]> records_;
  std::function<void()> wake_;
  alignas(64) std::atomic<std::uint64_t> tail_{0};  // the next position for a sender
  alignas(64) std::atomic<std::uint64_t> head_{0};  // the next for the receiver, which alone changes it
};

}  // namespace nexus
