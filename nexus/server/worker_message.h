// worker_message.h
// Owns:     what may be posted to a worker, message by message.
// Promises: plain data; whoever holds one holds what it names.
// Leaves:   carrying them to mailbox.h, acting on them to worker.h.
// Threads:  made on any, taken by the worker's.
#pragma once

#include <memory>
#include <string>
#include <variant>

#include "nexus/base/slot_map.h"
#include "nexus/base/text_buffer.h"
#include "nexus/fleet/registry.h"
#include "nexus/net/epoll.h"
#include "nexus/os/systemd.h"
#include "nexus/proxy/worker_context.h"
#include "nexus/server/builtin_pages.h"

namespace nexus {

template <class Net>
struct WorkerMessage {
  // A new connection, which is counted as the worker's already.
  struct Adopt {
    typename Net::Socket socket;
    Address peer;
    bool metrics_only = false;
  };
  struct NewSnapshot {
    std::unique_ptr<LocalSnapshot> snapshot;  // made by the sender: taking it over needs no memory
  };
  // The page that the session waits for.
  struct RenderedPage {
    Handle session;
    std::shared_ptr<const TextBuffer> body;  // nothing: metrics_unavailable
    PageKind kind = PageKind::metrics;
  };
  // A place on a backend, for the session's request that waits in the queue.
  struct Grant {
    Handle session;
  };
  struct Drain {};  // stop accepting, finish what is in flight
  struct Stop {};   // end now

  using Any = std::variant<Adopt, NewSnapshot, RenderedPage, Grant, Drain, Stop, Heartbeat>;
};

}  // namespace nexus
