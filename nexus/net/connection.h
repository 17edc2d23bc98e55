// connection.h
// Owns:     one TCP connection: its socket, its TLS if it has that, its readiness under edge-triggered epoll, and the
//           bytes that the kernel would not take yet.
// Promises: bytes leave in the order in which they were written; no call blocks; a failure sticks. may_read() and
//           may_write() are true until a call has seen the socket drained or full, so no edge is lost.
// Leaves:   how much may wait to be sent to the caller, who stops writing while pending() is not 0; records and
//           handshakes to tls_stream.h. Nothing above this class touches the socket.
// Threads:  the loop's own thread.
// Tested by: tests/epoll_test.cpp, tests/tls_test.cpp, tests/sim, tests/hostile
#pragma once

#include <array>
#include <cassert>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/base/buffer.h"
#include "nexus/net/epoll.h"
#include "nexus/net/tls.h"

namespace nexus {

template <class Net>
class Connection {
 public:
  // `connecting` and `handshaking`: establish() has not said `ok` yet. Clear text passes through the latter at once.
  enum class State : std::uint8_t { closed, connecting, handshaking, open };

  Connection() = default;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Takes over an accepted socket; its events carry `handle`. With `tls`, establish() tells how the handshake went.
  // Without memory the socket is closed.
  SocketOutcome adopt(Net& net, typename Net::Socket socket, Handle handle,
                      const std::shared_ptr<const TlsServer>& tls = nullptr) {
    start(socket, tls == nullptr ? State::open : State::handshaking);
    if (tls != nullptr) tls_ = TlsStream::accept(tls);
    if ((tls == nullptr || tls_ != nullptr) && net.watch(socket_, handle)) return SocketOutcome::ok;
    close(net);
    return SocketOutcome::no_memory;
  }

  // The same without events, for a connection that is closed at once.
  void attach(typename Net::Socket socket) { start(socket, State::open); }

  // Starts a connection; its events carry `handle`. establish() tells how it went.
  // With `tls` the handshake belongs to that; it resumes with `ticket` if there is one.
  SocketOutcome connect(Net& net, const Address& address, Handle handle,
                        const std::shared_ptr<const TlsClient>& tls = nullptr, const TlsTicket* ticket = nullptr) {
    const typename Net::Opened opened = net.connect(address);
    if (opened.outcome != SocketOutcome::ok) return opened.outcome;
    start(opened.socket, State::connecting);
    if (tls != nullptr) tls_ = TlsStream::connect(tls, ticket);
    if ((tls == nullptr || tls_ != nullptr) && net.watch(socket_, handle)) return SocketOutcome::ok;
    close(net);
    return SocketOutcome::no_memory;
  }

  // Call after each event until the result is not `again`: `ok` once bytes can be exchanged.
  IoResult establish(Net& net) {
    if (state_ == State::connecting) {
      if (!writable_ && !hangup_) return {IoResult::Kind::again, 0, 0};
      if (const int error = net.connect_error(socket_); error != 0) {
        fail();
        return {IoResult::Kind::failed, 0, error};
      }
      state_ = State::handshaking;
    }
    if (tls_ != nullptr && state_ == State::handshaking) {
      const IoResult shaken = tls_->handshake(wire(net));
      if (shaken.kind == IoResult::Kind::failed) fail();
      if (!shaken.ok()) return shaken;
      readable_ = writable_ = true;  // bytes may wait in the library
    }
    state_ = State::open;
    return {IoResult::Kind::ok, 0, 0};
  }

  // True until establish() has said how the handshake went.
  bool handshaking() const { return state_ == State::handshaking && !failed_; }
  // How the handshake went, or that its time has passed. Nothing if there was none.
  std::optional<TlsOutcome> handshake_outcome() const {
    if (tls_ == nullptr || state_ == State::connecting) return std::nullopt;
    return handshaking() ? TlsOutcome::timeout : tls_->outcome();
  }
  // Null in clear text.
  const TlsStream* tls() const { return tls_.get(); }
  // A failure in words.
  std::string_view why(const IoResult& failure) const {
    return tls_ != nullptr && !tls_->why().empty() ? tls_->why() : std::string_view(strerror(failure.error));
  }
  // After a failed handshake with a peer that speaks in clear: so does the answer to it.
  void continue_in_clear() {
    tls_.reset();
    state_ = State::open;
    failed_ = false;
    writable_ = true;
  }

  // Records an edge. Call first for every event of this connection.
  void note(const Event& event) {
    readable_ |= event.readable;
    writable_ |= event.writable;
    hangup_ |= event.hangup;
    if (tls_ == nullptr) return;
    tls_->note(event);
    readable_ |= event.writable && tls_->read_wants_write();
  }

  bool is_open() const { return socket_.open(); }
  bool may_read() const { return readable_ && !failed_; }
  bool may_write() const { return writable_ && !failed_; }
  bool hangup() const { return hangup_; }  // the peer's FIN or reset waits behind what can still be read
  bool failed() const { return failed_ || write_failed_; }
  // The failure was here, not at the peer.
  bool out_of_memory() const { return out_of_memory_ || (tls_ != nullptr && tls_->out_of_memory()); }
  std::size_t pending() const { return out_.size(); }

  // Reads once. A short read proves the socket empty (epoll(7)), which saves the read that would say `again`; after a
  // hangup only the end of file or an error proves it.
  IoResult read(Net& net, char* into, std::size_t bytes) {
    assert(bytes > 0);
    if (tls_ != nullptr) [[unlikely]]
      return read_tls(net, into, bytes);
    const IoResult result = net.read(socket_, into, bytes);
    if (result.ok()) {
      if (result.bytes < bytes && !hangup_) readable_ = false;
      return result;
    }
    readable_ = false;
    if (result.kind == IoResult::Kind::failed) failed_ = true;
    return result;
  }

  // As read(), but asks the kernel also if no event has said that there is something: one may not be fetched yet.
  IoResult read_now(Net& net, char* into, std::size_t bytes) {
    if (tls_ != nullptr) tls_->look_again();
    return read(net, into, bytes);
  }

  // True if the peer has sent nothing: no byte and no end. If false, the connection is of no use any more.
  bool is_quiet(Net& net) {
    char early = 0;
    return !hangup_ && read_now(net, &early, 1).kind == IoResult::Kind::again;
  }

  // Sends what the kernel takes now and keeps nothing. After a failure the peer's last bytes can still be read.
  IoResult write_some(Net& net, std::span<const iovec> parts) {
    assert(out_.empty());
    return send(net, parts);
  }

  // Sends `parts`; what the kernel does not take is kept and sent by flush(). False if the connection or memory failed.
  bool write(Net& net, BlockPool& pool, std::span<iovec> parts) {
    if (failed()) return false;
    if (!out_.empty()) return keep(pool, parts);
    std::size_t total = 0;
    for (const iovec& part : parts) total += part.iov_len;
    if (total == 0) return true;
    const IoResult result = send(net, parts);
    if (result.kind == IoResult::Kind::failed) return fail();
    if (result.bytes == total) return true;
    drop_front(parts, result.bytes);
    return keep(pool, parts);
  }

  bool write(Net& net, BlockPool& pool, std::string_view bytes) {
    iovec part{const_cast<char*>(bytes.data()), bytes.size()};
    return write(net, pool, std::span(&part, 1));
  }

  // Sends what is kept. False if the connection failed.
  bool flush(Net& net) {
    if (failed()) return false;
    while (!out_.empty()) {
      const iovec part{out_.data(), out_.size()};
      const IoResult result = send(net, std::span(&part, 1));
      if (result.kind == IoResult::Kind::again) return true;
      if (result.kind == IoResult::Kind::failed) return fail();
      out_.consume(result.bytes);
    }
    return true;
  }

  // Sends the FIN; the peer may go on sending. `whole`: of all that was begun, nothing is missing. Only then does TLS
  // say that this is the end: without that the peer sees a cut (RFC 8446 6.1).
  // While it is finishing(), because the socket is full, it must be called again.
  void finish(Net& net, bool whole) {
    finishing_ = whole && tls_ != nullptr && out_.empty() && !tls_->say_end(wire(net));
    if (!finishing_) net.shut_write(socket_);
  }
  bool finishing() const { return finishing_; }

  void close(Net& net) {
    out_.clear();
    tls_.reset();
    net.close(socket_);
    state_ = State::closed;
  }

  // Closes so that the peer sees a reset: it must not take what it got for the whole.
  void reset(Net& net) {
    out_.clear();
    tls_.reset();
    net.reset(socket_);
    state_ = State::closed;
  }

 private:
  void start(typename Net::Socket socket, State state) {
    assert(state_ == State::closed && out_.empty());
    socket_ = socket;
    state_ = state;
    readable_ = hangup_ = failed_ = write_failed_ = out_of_memory_ = finishing_ = false;
    writable_ = state == State::open;
  }

  // TLS reads and writes by the same calls as clear text.
  TlsWire wire(Net& net) {
    using Socket = typename Net::Socket;
    return {&net, &socket_,
            [](void* to, void* socket, char* into, std::size_t bytes) {
              return static_cast<Net*>(to)->read(*static_cast<Socket*>(socket), into, bytes);
            },
            [](void* to, void* socket, const char* from, std::size_t bytes) {
              const iovec part{const_cast<char*>(from), bytes};
              return static_cast<Net*>(to)->write(*static_cast<Socket*>(socket), std::span(&part, 1));
            }};
  }

  [[gnu::noinline]] IoResult read_tls(Net& net, char* into, std::size_t bytes) {
    const IoResult result = tls_->read(wire(net), into, bytes);
    readable_ = result.ok() && tls_->may_read();
    if (result.kind == IoResult::Kind::failed) failed_ = true;
    return result;
  }

  [[gnu::noinline]] IoResult write_tls(Net& net, std::span<const iovec> parts) { return tls_->write(wire(net), parts); }

  IoResult send(Net& net, std::span<const iovec> parts) {
    const IoResult result = tls_ == nullptr ? net.write(socket_, parts) : write_tls(net, parts);
    if (result.kind == IoResult::Kind::again) writable_ = false;
    if (result.kind == IoResult::Kind::failed) {
      write_failed_ = true;
      readable_ = hangup_ = true;  // no further edge would report what the peer sent before
    }
    return result;
  }

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
  std::unique_ptr<TlsStream> tls_;  // null in clear text
  Buffer out_;
  State state_ = State::closed;
  bool readable_ = false;
  bool writable_ = false;
  bool hangup_ = false;
  bool failed_ = false;
  bool write_failed_ = false;
  bool out_of_memory_ = false;
  bool finishing_ = false;
};

}  // namespace nexus
