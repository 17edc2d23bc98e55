// threads.h
// Owns:     how Nexus starts a thread.
// Promises: the new thread takes no signal, from its first instruction on (they belong to the control thread), and
//           bears a name that top(1) shows; a thread that could not be had is an answer, not an exception.
// Leaves:   joining to the owner.
// Threads:  any.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <cassert>
#include <system_error>
#include <thread>
#include <utility>

namespace nexus {

// A running thread, or one that is not joinable() where the system has none to give. `name`: up to 15 bytes.
template <class Body>
std::thread start_thread(const char* name, Body body) {
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // inherited by the thread that is made below
  std::thread thread;
  try {
    thread = std::thread(std::move(body));
  } catch (const std::system_error&) {
    // no thread: the caller sees it
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (thread.joinable()) pthread_setname_np(thread.native_handle(), name);
  return thread;
}

}  // namespace nexus
