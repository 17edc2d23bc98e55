// threads.h
// Owns:     how Nexus starts a thread.
// Promises: the new thread blocks all signals from its first instruction on (the main thread handles them) and has a
//           name that top(1) shows; a failure is a result, not an exception.
// Leaves:   joining to the owner.
// Threads:  any.
// Tested by: tests/log_test.cpp
#pragma once

#include <pthread.h>
#include <signal.h>

#include <cassert>
#include <system_error>
#include <thread>
#include <utility>

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

}  // namespace nexus
