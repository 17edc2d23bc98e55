// mailbox.h
// Owns:     messages from any thread to the thread of one loop.
// Promises: messages of one sender arrive in their order. post() returns whether the receiver must be woken, or that
//           there was no memory.
// Leaves:   the wake-up to the sender (EpollNet::wake()), the meaning to the receiver.
// Threads:  post(): any. The others: the owner.
// Tested by: tests/mailbox_test.cpp
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
    first,  // the mailbox was empty: the receiver may be asleep
    behind_others,
    no_memory,  // the message is lost; the sender must handle that
    closed,     // likewise
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

  // Takes no lock.
  bool has_any() const { return any_.load(std::memory_order_acquire); }

  // Replaces the content of `out` by all messages.
  void take(std::vector<Message>& out) {
    out.clear();
    const std::lock_guard lock(mutex_);
    out.swap(messages_);
    any_.store(false, std::memory_order_relaxed);
  }

  // Returns false if there is a message; else post() returns `closed` from now on.
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
