// mailbox.h
// Owns:     messages from any thread to the one that owns a loop.
// Promises: messages arrive in the order in which each sender posted them; post() says when the receiver must be woken.
// Leaves:   waking to the sender (net's wake()), meaning to the receiver.
// Threads:  post(): any. take(): the owner's.
#pragma once

#include <mutex>
#include <utility>
#include <vector>

namespace nexus {

template <class Message>
class Mailbox {
 public:
  // True where the box was empty: the receiver may be asleep.
  bool post(Message message) {
    const std::lock_guard lock(mutex_);
    messages_.push_back(std::move(message));
    return messages_.size() == 1;
  }

  // Moves all messages to `out`, which is emptied first.
  void take(std::vector<Message>& out) {
    out.clear();
    const std::lock_guard lock(mutex_);
    out.swap(messages_);
  }

 private:
  std::mutex mutex_;
  std::vector<Message> messages_;
};

}  // namespace nexus
