// connection.h
// Owns:     one TCP connection's socket and the bytes that its kernel buffer would not take yet.
// Promises: bytes leave in the order in which they were written; a write never blocks and never loses a byte short of
//           a failure, which sticks; the edge-triggered state (may there be more to read?) is kept here.
// Leaves:   how much may wait in `out` to the writer, who stops while pending() is not 0. A connection under TLS would
//           put its records between these calls and the socket; nothing above may assume otherwise.
// Threads:  the loop's own thread.
#pragma once

#include <array>
#include <cassert>
#include <span>
#include <string_view>

#include "nexus/base/buffer.h"
#include "nexus/net/epoll.h"

namespace nexus {

template <class Net>
class Connection {
 public:
  Connection() = default;
  explicit Connection(typename Net::Socket socket) : socket_(socket) {}
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  void attach(typename Net::Socket socket) { socket_ = socket; }
  bool open() const { return socket_.open(); }
  typename Net::Socket socket() const { return socket_; }

  // An edge was seen. Called first for every event of this connection.
  void note(const Event& event) {
    if (event.readable) readable_ = true;
    if (event.hangup) hangup_ = true;
  }

  bool may_read() const { return readable_ && !failed_; }
  bool hangup() const { return hangup_; }  // the peer's FIN or a reset is waiting behind what can still be read
  bool failed() const { return failed_; }
  bool out_of_memory() const { return out_of_memory_; }  // it failed here, not at the peer
  std::size_t pending() const { return out_.size(); }

  // Reads once. A short read empties the socket (epoll(7)), which saves the read that would say `again`; behind a
  // hangup only the end of file or an error does.
  IoResult read(Net& net, char* into, std::size_t bytes) {
    assert(bytes > 0);
    const IoResult result = net.read(socket_, into, bytes);
    if (result.ok()) {
      if (result.bytes < bytes && !hangup_) readable_ = false;
      return result;
    }
    readable_ = false;
    if (result.kind == IoResult::Kind::failed) failed_ = true;
    return result;
  }

  // Writes the parts; what the kernel does not take waits in order. False when the connection failed (or memory did).
  bool write(Net& net, BlockPool& pool, std::span<iovec> parts) {
    if (failed_) return false;
    if (!out_.empty()) return keep(pool, parts);
    std::size_t total = 0;
    for (const iovec& part : parts) total += part.iov_len;
    if (total == 0) return true;
    const IoResult result = net.write(socket_, parts);
    if (result.kind == IoResult::Kind::failed) return fail();
    if (result.bytes == total) return true;
    drop_front(parts, result.bytes);
    return keep(pool, parts);
  }

  bool write(Net& net, BlockPool& pool, std::string_view bytes) {
    iovec part{const_cast<char*>(bytes.data()), bytes.size()};
    return write(net, pool, std::span(&part, 1));
  }

  // Tries what waits. False when the connection failed.
  bool flush(Net& net) {
    if (failed_) return false;
    while (!out_.empty()) {
      iovec part{out_.data(), out_.size()};
      const IoResult result = net.write(socket_, std::span(&part, 1));
      if (result.kind == IoResult::Kind::again) return true;
      if (result.kind == IoResult::Kind::failed) return fail();
      out_.consume(result.bytes);
    }
    return true;
  }

  void close(Net& net) {
    out_.clear();
    net.close(socket_);
  }

  // Ends the connection so that the peer can't take what it got for whole.
  void reset(Net& net) {
    out_.clear();
    net.reset(socket_);
  }

 private:
  bool fail() {
    failed_ = true;
    out_.clear();
    return false;
  }

  bool keep(BlockPool& pool, std::span<const iovec> parts) {
    for (const iovec& part : parts) {
      if (out_.append(pool, {static_cast<const char*>(part.iov_base), part.iov_len})) continue;
      out_of_memory_ = true;
      return fail();
    }
    return true;
  }

  static void drop_front(std::span<iovec> parts, std::size_t bytes) {
    for (iovec& part : parts) {
      const std::size_t gone = std::min(bytes, part.iov_len);
      part.iov_base = static_cast<char*>(part.iov_base) + gone;
      part.iov_len -= gone;
      bytes -= gone;
    }
  }

  typename Net::Socket socket_;
  Buffer out_;
  bool readable_ = false;
  bool hangup_ = false;
  bool failed_ = false;
  bool out_of_memory_ = false;
};

}  // namespace nexus
