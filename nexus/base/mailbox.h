// mailbox.h
// Owns:     how Nexus starts a thread, and messages from any thread to the thread of one loop.
// Promises: a new thread blocks all signals from its first instruction on (the main thread handles them) and has a
//           name that top(1) shows; a failure is a result, not an exception. Messages of one sender arrive in their
//           order; post() returns whether the receiver must be woken, or that there was no memory.
// Leaves:   joining to the owner, the wake-up to the sender (EpollNet::wake()), the meaning to the receiver.
// Threads:  start_thread(), post(): any. The others: the owner.
// Tested by: tests/mailbox_test.cpp, tests/log_test.cpp
#pragma once

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <cassert>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace nexus {

// Starts a thread; the result is not joinable() if the system has none left. `name`: at most 15 bytes.
template <class Body>
std::thread start_thread(const char* name, Body body) {
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // the new thread inherits it
  std::thread thread;
  try {
    thread = std::thread(std::move(body));
  } catch (const std::system_error&) {
    // the caller sees a thread that is not joinable
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (thread.joinable()) pthread_setname_np(thread.native_handle(), name);
  return thread;
}

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
