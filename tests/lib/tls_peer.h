// tls_peer.h
// Owns:     the far end of a simulated TLS connection: it takes Nexus's records apart and puts what the peer says into
//           records, so that the simulated network and its oracles see plain bytes, and Nexus sees TLS.
// Promises: the same bytes in each run of a seed, because its randomness is drawn from a counter; what Nexus sends must
// be
//           valid TLS, else the run aborts.
// Leaves:   the bytes in transit to wire.h, the calls of Nexus to sim_net.h.
// Threads:  one.
// Tested by: tests/sim/main.cpp
#pragma once

#include <openssl/rand.h>

#include <cassert>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "nexus/config/settings.h"
#include "tests/lib/certificates.h"
#include "tests/lib/dice.h"

namespace nexus::sim {

// Replaces the library's randomness for the whole process: it must be the same in each run. Not for anything but tests.
class CountedRandomness {
 public:
  static void install() {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    static const RAND_METHOD method{nullptr, fill, nullptr, nullptr, fill, [] { return 1; }};
    RAND_set_rand_method(&method);
#pragma GCC diagnostic pop
  }
  static void restart(std::uint64_t seed) { state() = seed; }

 private:
  static std::uint64_t& state() {
    static std::uint64_t counter = 1;
    return counter;
  }
  static int fill(unsigned char* into, int bytes) {
    for (int i = 0; i < bytes; ++i) into[i] = static_cast<unsigned char>(mix(++state()) >> 32);
    return 1;
  }
};

// What both ends of all simulated connections know: made once, because a certificate's signature has a random length.
struct TlsWorld {
  TlsWorld() {
    CountedRandomness::install();
    const test::CertificateWish wish{.alternatives = "DNS:localhost,IP:10.0.0.1", .for_ever = true};
    const test::Issued issued(wish);
    server = test::serve_with({{issued.certificate(), issued.key()}});
    TlsClient::Options options;
    options.host = "localhost";
    client = test::trust(issued.certificate(), options);
    peer_server.reset(SSL_CTX_new(TLS_server_method()));
    [[maybe_unused]] const tls::Unfit problem =
        tls::use_certificate(peer_server.get(), issued.certificate(), issued.key());
    assert(problem.empty());
    SSL_CTX_set_session_cache_mode(peer_server.get(), SSL_SESS_CACHE_OFF);
    peer_client.reset(SSL_CTX_new(TLS_client_method()));
  }
  std::shared_ptr<const TlsServer> server;  // for the settings of Nexus
  std::shared_ptr<const TlsClient> client;
  tls::Context peer_server, peer_client;
};

inline const TlsWorld& tls_world() {
  static const TlsWorld world;
  return world;
}

class TlsPeer {
 public:
  // `of_backend`: Nexus opened the connection.
  TlsPeer(const TlsWorld& world, bool of_backend)
      : ssl_(SSL_new(of_backend ? world.peer_server.get() : world.peer_client.get())),
        in_(BIO_new(BIO_s_mem())),
        out_(BIO_new(BIO_s_mem())) {
    SSL_set_bio(ssl_.get(), in_, out_);
    of_backend ? SSL_set_accept_state(ssl_.get()) : SSL_set_connect_state(ssl_.get());
    shake();
  }

  bool established() const { return SSL_is_init_finished(ssl_.get()) == 1; }
  bool was_told_end() const { return told_end_; }  // Nexus has sent close_notify

  // Records from Nexus; the plain bytes in them.
  std::string take(std::string_view records) {
    BIO_write(in_, records.data(), static_cast<int>(records.size()));
    shake();
    std::string plain;
    char some[16384];
    for (;;) {
      const int count = SSL_read(ssl_.get(), some, sizeof some);
      if (count > 0) {
        plain.append(some, static_cast<std::size_t>(count));
        continue;
      }
      const int error = SSL_get_error(ssl_.get(), count);
      told_end_ |= error == SSL_ERROR_ZERO_RETURN;
      assert(error == SSL_ERROR_WANT_READ || error == SSL_ERROR_ZERO_RETURN);
      ERR_clear_error();
      return plain;
    }
  }

  // Plain bytes to Nexus: they wait in records() then.
  void say(std::string_view plain) {
    [[maybe_unused]] const int count = SSL_write(ssl_.get(), plain.data(), static_cast<int>(plain.size()));
    assert(count == static_cast<int>(plain.size()));
  }
  void say_end() {
    if (established() && !std::exchange(said_end_, true)) SSL_shutdown(ssl_.get());
  }

  // What waits to be read by Nexus.
  std::size_t waiting() const { return static_cast<std::size_t>(BIO_ctrl_pending(out_)); }
  std::size_t give(char* into, std::size_t most) {
    const int count = BIO_read(out_, into, static_cast<int>(most));
    return count > 0 ? static_cast<std::size_t>(count) : 0;
  }

 private:
  void shake() {
    if (established()) return;
    SSL_do_handshake(ssl_.get());
    ERR_clear_error();
  }

  tls::Owned<SSL, SSL_free> ssl_;
  BIO *in_, *out_;  // the SSL's
  bool told_end_ = false, said_end_ = false;
};

}  // namespace nexus::sim
