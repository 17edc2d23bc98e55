// tls_stream.h
// Owns:     one connection's TLS: handshake, records, close_notify (RFC 8446, RFC 5246), over the reads and writes of
//           a socket that it is lent for each call.
// Promises: no call blocks, and none makes a system call of its own: all bytes go through the lent socket. read() says
//           `again` only when the socket is drained and no byte is buffered here; a FIN without close_notify is a
//           failure, never an end (RFC 8446 6.1); after a failure nothing but the destructor touches the library's
//           object; a peer can't keep a loop busy with key updates.
// Leaves:   contexts and certificates to tls_context.h; readiness and what waits to be sent to connection.h.
// Threads:  the loop's own thread.
// Tested by: tests/tls_test.cpp, tests/e2e/tls.test.mjs
#pragma once

#include <sys/uio.h>

#include <cassert>
#include <cerrno>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "nexus/base/limits.h"
#include "nexus/net/epoll.h"
#include "nexus/net/tls_bio.h"
#include "nexus/net/tls_context.h"
#include "nexus/net/tls_outcome.h"

namespace nexus {

// The session that a later connection to the same backend resumes, or nothing.
using TlsTicket = tls::Owned<SSL_SESSION, SSL_SESSION_free>;

class TlsStream {
 public:
  // A connection that a client opened. Null if there is no memory.
  static std::unique_ptr<TlsStream> accept(std::shared_ptr<const TlsServer> server) {
    std::unique_ptr<TlsStream> stream = make(server->context(), server->bio_method());
    if (stream == nullptr) return nullptr;
    SSL_set_accept_state(stream->ssl_.get());
    stream->server_ = std::move(server);
    return stream;
  }

  // A connection to a backend, which resumes with `ticket` if that is not empty.
  static std::unique_ptr<TlsStream> connect(std::shared_ptr<const TlsClient> client, const TlsTicket* ticket) {
    std::unique_ptr<TlsStream> stream = make(client->context(), client->bio_method());
    if (stream == nullptr) return nullptr;
    SSL* const ssl = stream->ssl_.get();
    SSL_set_connect_state(ssl);
    if (client->verifies()) SSL_set_verify(ssl, SSL_VERIFY_PEER, on_verified);
    if (!client->is_address() && SSL_set_tlsext_host_name(ssl, client->name().c_str()) != 1) return nullptr;
    if (ticket != nullptr && *ticket) SSL_set_session(ssl, ticket->get());
    stream->client_ = std::move(client);
    return stream;
  }

  TlsStream(const TlsStream&) = delete;
  TlsStream& operator=(const TlsStream&) = delete;
  ~TlsStream() {
    // Else the library takes the session for broken, and does not resume it.
    if (!dead_ && established_) SSL_set_shutdown(ssl_.get(), SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
  }

  // Records an edge of the socket.
  void note(const Event& event) { socket_.note(event); }
  // The next read() asks the socket, whatever is known of it.
  void look_again() { socket_.readable = true; }
  bool read_wants_write() const { return read_wants_write_; }

  // `ok` once bytes can be exchanged.
  IoResult handshake(const TlsWire& wire) {
    if (dead_) return {IoResult::Kind::failed, 0, error_};
    const Lent lent(socket_, wire);
    const int result = SSL_do_handshake(ssl_.get());
    if (result == 1) {
      established_ = true;
      return {};
    }
    return outcome_of_call(result);
  }

  // How the handshake ended: after handshake() said `ok` or `failed`.
  TlsOutcome outcome() const {
    if (established_) return SSL_session_reused(ssl_.get()) == 1 ? TlsOutcome::resumed : TlsOutcome::full;
    return failure_;
  }

  // In words: why the connection failed.
  std::string_view why() const { return why_; }
  bool out_of_memory() const { return error_ == ENOMEM; }
  // True if the peer spoke HTTP in clear: it gets an answer in clear.
  bool spoke_http() const { return spoke_http_; }

  // The common name of the client's certificate, which was verified; empty without one.
  std::string certificate_name() const {
    const tls::Certificate certificate(SSL_get1_peer_certificate(ssl_.get()));
    return certificate ? tls::common_name(*certificate) : std::string();
  }

  // Reads once. `again` also if a message for the library alone has come.
  IoResult read(const TlsWire& wire, char* into, std::size_t bytes) {
    if (dead_) return {IoResult::Kind::failed, 0, error_};
    const Lent lent(socket_, wire);
    read_wants_write_ = false;
    const int result = SSL_read(ssl_.get(), into, static_cast<int>(std::min<std::size_t>(bytes, INT32_MAX)));
    if (result > 0) {
      key_updates_ = 0;
      return {IoResult::Kind::ok, static_cast<std::size_t>(result), 0};
    }
    return outcome_of_call(result);
  }

  // True if a read may give something without another edge.
  bool may_read() const { return !dead_ && (socket_.readable || SSL_has_pending(ssl_.get()) == 1); }

  // Sends what the socket takes now. A record that it took in part is not counted as sent: the next call must begin
  // with the same bytes, and with at least as many of them.
  // Not inlined: its stack frame would become that of writes in clear.
  [[gnu::noinline]] IoResult write(const TlsWire& wire, std::span<const iovec> parts) {
    if (dead_) return {IoResult::Kind::failed, 0, error_};
    const Lent lent(socket_, wire);
    std::size_t total = 0, sent = 0;
    for (const iovec& part : parts) total += part.iov_len;
    char gathered[kRecordBytes];
    while (sent < total) {
      const std::string_view next = piece_at(parts, sent, std::max(kRecordBytes, record_begun_), gathered);
      const int result = SSL_write(ssl_.get(), next.data(), static_cast<int>(next.size()));
      if (result <= 0) {
        if (socket_.write_error != 0) return {IoResult::Kind::failed, 0, socket_.write_error};  // reading goes on
        const IoResult outcome = outcome_of_call(result);
        if (outcome.kind == IoResult::Kind::again) record_begun_ = next.size();
        return sent > 0 ? IoResult{IoResult::Kind::ok, sent, 0} : outcome;
      }
      record_begun_ = 0;
      sent += static_cast<std::size_t>(result);
    }
    return {IoResult::Kind::ok, sent, 0};
  }

  // Says that nothing more will be sent (RFC 8446 6.1). False if the socket is full: it must be called again.
  bool say_end(const TlsWire& wire) {
    if (dead_ || !established_) return true;
    const Lent lent(socket_, wire);
    const int result = SSL_shutdown(ssl_.get());
    const bool full = result < 0 && SSL_get_error(ssl_.get(), result) == SSL_ERROR_WANT_WRITE;
    ERR_clear_error();
    return !full || socket_.write_error != 0;
  }

  // Of a connection that has exchanged bytes; empty if the peer gave nothing to resume with.
  TlsTicket ticket() const {
    if (dead_ || !established_) return nullptr;
    TlsTicket ticket(SSL_get1_session(ssl_.get()));
    return ticket && SSL_SESSION_is_resumable(ticket.get()) == 1 ? std::move(ticket) : nullptr;
  }

 private:
  static constexpr std::size_t kRecordBytes = SSL3_RT_MAX_PLAIN_LENGTH;

  // The library's BIO reads and writes by what is lent, and nothing else.
  struct Lent {
    Lent(TlsSocket& lent, const TlsWire& wire) : socket(lent) {
      ERR_clear_error();  // the queue belongs to the thread: an older error would be blamed on this connection
      socket.wire = &wire;
    }
    ~Lent() { socket.wire = nullptr; }
    TlsSocket& socket;
  };

  TlsStream() = default;

  static std::unique_ptr<TlsStream> make(SSL_CTX* context, const BIO_METHOD* method) {
    std::unique_ptr<TlsStream> stream(new (std::nothrow) TlsStream);
    if (stream == nullptr) return nullptr;
    stream->ssl_.reset(SSL_new(context));
    BIO* const bio = BIO_new(method);
    if (stream->ssl_ == nullptr || bio == nullptr) {
      BIO_free(bio);
      return nullptr;
    }
    BIO_set_data(bio, &stream->socket_);
    BIO_set_init(bio, 1);
    SSL_set_bio(stream->ssl_.get(), bio, bio);  // which takes it over
    SSL_set_app_data(stream->ssl_.get(), stream.get());
    SSL_set_msg_callback(stream->ssl_.get(), on_message);
    SSL_set_msg_callback_arg(stream->ssl_.get(), stream.get());
    return stream;
  }

  // Counts key updates without a byte of data between them (RFC 8446 4.6.3): each costs new keys and an answer.
  static void on_message(int is_write, int, int type, const void* data, std::size_t bytes, SSL*, void* self) {
    const bool update = is_write == 0 && type == SSL3_RT_HANDSHAKE && bytes > 0 &&
                        *static_cast<const unsigned char*>(data) == SSL3_MT_KEY_UPDATE;
    if (!update) return;
    auto* const stream = static_cast<TlsStream*>(self);
    stream->key_updates_ += 1;
    stream->socket_.refuses = stream->key_updates_ > kMaxKeyUpdates;
  }

  [[gnu::cold]] static int on_verified(int ok, X509_STORE_CTX* store) {
    if (ok == 1) return 1;
    SSL* const ssl = static_cast<SSL*>(X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx()));
    auto* self = static_cast<TlsStream*>(SSL_get_app_data(ssl));
    self->why_ = tls::verify_problem(X509_STORE_CTX_get_error(store), X509_STORE_CTX_get_current_cert(store),
                                     self->client_->name());
    return 0;
  }

  // The bytes from `skip` on, at most `most`: of one part if that has enough, else gathered into `room`.
  static std::string_view piece_at(std::span<const iovec> parts, std::size_t skip, std::size_t most, char* room) {
    std::size_t gathered = 0;
    for (const iovec& part : parts) {
      if (skip >= part.iov_len) {
        skip -= part.iov_len;
        continue;
      }
      const char* const from = static_cast<const char*>(part.iov_base) + skip;
      const std::size_t here = std::min(part.iov_len - skip, most - gathered);
      const bool last = &part == &parts.back();
      if (gathered == 0 && (here == most || last)) return {from, here};
      std::memcpy(room + gathered, from, here);
      gathered += here;
      skip = 0;
      if (gathered == most) break;
    }
    return {room, gathered};
  }

  // Of a call that gave no byte.
  IoResult outcome_of_call(int result) {
    const int error = SSL_get_error(ssl_.get(), result);
    if (error == SSL_ERROR_WANT_READ) return {IoResult::Kind::again, 0, 0};
    if (error == SSL_ERROR_WANT_WRITE && socket_.write_error == 0) {
      read_wants_write_ = true;
      return {IoResult::Kind::again, 0, 0};
    }
    if (error == SSL_ERROR_ZERO_RETURN) return {IoResult::Kind::eof, 0, 0};
    return fail();
  }

  [[gnu::cold]] IoResult fail() {
    const unsigned long code = ERR_peek_error();
    const int reason = ERR_GET_REASON(code);
    dead_ = true;
    failure_ = outcome_of_failure(reason);
    error_ = reason == ERR_R_MALLOC_FAILURE ? ENOMEM : std::max(socket_.read_error, socket_.write_error);
    spoke_http_ = !established_ && (reason == SSL_R_HTTP_REQUEST || reason == SSL_R_HTTPS_PROXY_REQUEST);
    if (why_.empty()) why_ = reason_text(reason);
    if (error_ == 0) error_ = EPROTO;
    ERR_clear_error();
    return {IoResult::Kind::failed, 0, error_};
  }

  bool broke() const { return socket_.read_error != 0 || socket_.write_error != 0; }

  TlsOutcome outcome_of_failure(int reason) const {
    switch (reason) {
      case SSL_R_CERTIFICATE_VERIFY_FAILED:
      case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE:
      case SSL_R_TLSV1_ALERT_UNKNOWN_CA:
      case SSL_R_SSLV3_ALERT_BAD_CERTIFICATE:
      case SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED:
      case SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED:
      case SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN:
      case SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE:
      case SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED: return TlsOutcome::certificate;
      case SSL_R_HTTP_REQUEST:
      case SSL_R_WRONG_VERSION_NUMBER: return TlsOutcome::closed;
      case 0: return broke() || socket_.at_end ? TlsOutcome::closed : TlsOutcome::failed;
      default: return socket_.at_end ? TlsOutcome::closed : TlsOutcome::failed;
    }
  }

  std::string reason_text(int reason) const {
    if (socket_.refuses) return "it sends key updates without data";
    if (reason == SSL_R_WRONG_VERSION_NUMBER || reason == SSL_R_PACKET_LENGTH_TOO_LONG ||
        reason == SSL_R_HTTP_REQUEST) {
      return "it does not speak TLS on this port";
    }
    if (reason == ERR_R_MALLOC_FAILURE) return "out of memory";
    if (reason == 0 && broke()) return strerror(error_);  // else it did not get our alert, which says more
    if (reason == SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED) return "it wants a certificate: set tls_certificate";
    if (reason == SSL_R_SSLV3_ALERT_HANDSHAKE_FAILURE && client_ != nullptr) {
      return "it refuses the handshake: it wants a certificate (tls_certificate), or has no cipher in common with us";
    }
    if (socket_.at_end)
      return established_ ? "it closed without close_notify" : "it closed the connection in the handshake";
    const char* text = ERR_reason_error_string(ERR_peek_error());
    return std::string("TLS: ") + (text == nullptr ? "failed" : text);
  }

  TlsSocket socket_;
  tls::Owned<SSL, SSL_free> ssl_;
  std::shared_ptr<const TlsServer> server_;  // the certificate is chosen in it
  std::shared_ptr<const TlsClient> client_;
  std::size_t record_begun_ = 0;  // plain bytes of the record that the socket took in part
  std::uint32_t key_updates_ = 0;
  int error_ = 0;  // errno, once it is dead
  TlsOutcome failure_ = TlsOutcome::failed;
  bool read_wants_write_ = false;
  bool established_ = false;
  bool dead_ = false;
  bool spoke_http_ = false;
  std::string why_;
};

}  // namespace nexus
