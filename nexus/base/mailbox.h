// mailbox.h
// Owns:     messages from any thread to the one that owns a loop.
// Promises: messages arrive in the order in which each sender posted them; post() says when the receiver must be woken,
//           and where memory was too short to post anything.
// Leaves:   waking to the sender (net's wake()), meaning to the receiver.
// Threads:  post(): any. The others: the owner's.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace nexus {

template <class Message>
class Mailbox {
 public:
  enum class Posted : std::uint8_t {
    first,  // the box was empty: the receiver may be asleep
    behind_others,
    no_memory,  // this and the next: the message is lost, and its sender's to see to
    closed,
  };

  Posted post(Message message) noexcept {
    const std::lock_guard lock(mutex_);
    if (closed_) return Posted::closed;
    try {
      messages_.push_back(std::move(message));
    } catch (const std::bad_alloc&) {
      return Posted::no_memory;
    }
    any_.store(true, std::memory_order_release);
    return messages_.size() == 1 ? Posted::first : Posted::behind_others;
  }

  // Without waiting for whoever posts.
  bool has_any() const { return any_.load(std::memory_order_acquire); }

  // Moves all messages to `out`, which is emptied first.
  void take(std::vector<Message>& out) {
    out.clear();
    const std::lock_guard lock(mutex_);
    out.swap(messages_);
    any_.store(false, std::memory_order_relaxed);
  }

  // False where a message is there. From then on none is taken any more.
  bool close_if_empty() {
    const std::lock_guard lock(mutex_);
    closed_ = messages_.empty();
    return closed_;
  }

 private:
  std::mutex mutex_;
  std::vector<Message> messages_;
  bool closed_ = false;
  std::atomic<bool> any_{false};
};

}  // namespace nexus
