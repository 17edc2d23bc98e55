// tls_bio.h
// Owns:     the socket as OpenSSL sees it: a BIO whose bytes go through reads and writes that are lent for one call.
// Promises: no system call but those that are lent; a socket that is known to be drained or full is not asked again;
//           a failed write looks like a full socket, so that what the peer sent before can still be read.
// Leaves:   the protocol to tls_stream.h.
// Threads:  a TlsSocket: its loop's own. A method: any, once made.
// Tested by: tests/tls_test.cpp
#pragma once

#include <openssl/bio.h>

#include <cstddef>
#include <memory>

#include "nexus/net/epoll.h"

namespace nexus {

// The socket for one call.
struct TlsWire {
  void* net;
  void* socket;
  IoResult (*read)(void* net, void* socket, char* into, std::size_t bytes);
  IoResult (*write)(void* net, void* socket, const char* from, std::size_t bytes);
};

struct TlsSocket {
  const TlsWire* wire = nullptr;                         // during a call
  bool readable = true, writable = true, ended = false;  // edges of the socket; `ended`: its FIN waits to be read
  bool at_end = false;                                   // the FIN was read
  bool refuses = false;                                  // the connection is to fail at its next read
  int read_error = 0, write_error = 0;                   // errno

  void note(const Event& event) {
    readable |= event.readable;
    writable |= event.writable;
    ended |= event.hangup;
  }

  static TlsSocket& of(BIO* bio) { return *static_cast<TlsSocket*>(BIO_get_data(bio)); }

  static int on_read(BIO* bio, char* into, int bytes) {
    TlsSocket& self = of(bio);
    BIO_clear_retry_flags(bio);
    if (self.wire == nullptr || self.refuses) return -1;
    const auto wanted = static_cast<std::size_t>(bytes);
    const IoResult result = self.readable ? self.wire->read(self.wire->net, self.wire->socket, into, wanted)
                                          : IoResult{IoResult::Kind::again, 0, 0};
    switch (result.kind) {
      case IoResult::Kind::ok:
        // A short read proves the socket empty, but not after the FIN: its end has to be read too.
        if (result.bytes < wanted && !self.ended) self.readable = false;
        return static_cast<int>(result.bytes);
      case IoResult::Kind::again:
        self.readable = false;
        BIO_set_retry_read(bio);
        return -1;
      case IoResult::Kind::eof: self.at_end = true; return 0;
      case IoResult::Kind::failed: self.read_error = result.error; return -1;
    }
    return -1;
  }

  static int on_write(BIO* bio, const char* from, int bytes) {
    TlsSocket& self = of(bio);
    BIO_clear_retry_flags(bio);
    if (self.wire == nullptr) return bytes;  // the library's object is being destroyed
    const auto given = static_cast<std::size_t>(bytes);
    if (self.writable && self.write_error == 0) {
      const IoResult result = self.wire->write(self.wire->net, self.wire->socket, from, given);
      if (result.kind == IoResult::Kind::failed) self.write_error = result.error;
      if (!result.ok() || result.bytes < given) self.writable = false;
      if (result.ok()) return static_cast<int>(result.bytes);
    }
    BIO_set_retry_write(bio);
    return -1;
  }

  static long on_control(BIO* bio, int command, long, void*) {
    if (command == BIO_CTRL_EOF) return of(bio).at_end ? 1 : 0;
    return command == BIO_CTRL_FLUSH ? 1 : 0;
  }
};

struct FreeBioMethod {
  void operator()(BIO_METHOD* method) const { BIO_meth_free(method); }
};

// Of every TlsSocket's BIO. Null if there is no memory.
inline std::unique_ptr<BIO_METHOD, FreeBioMethod> make_bio_method() {
  std::unique_ptr<BIO_METHOD, FreeBioMethod> method(BIO_meth_new(BIO_TYPE_SOURCE_SINK, "nexus"));
  if (method == nullptr) return nullptr;
  BIO_meth_set_read(method.get(), TlsSocket::on_read);
  BIO_meth_set_write(method.get(), TlsSocket::on_write);
  BIO_meth_set_ctrl(method.get(), TlsSocket::on_control);
  return method;
}

}  // namespace nexus
