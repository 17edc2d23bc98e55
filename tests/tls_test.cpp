// tls_test.cpp: TLS over a pair of byte queues, in which every short read and write can be made to happen; the words
// that a certificate's fault is told in.
#include <doctest/doctest.h>

#include <deque>
#include <random>
#include <string>
#include <vector>

#include "nexus/net/connection.h"
#include "tests/lib/certificates.h"

using nexus::BlockPool;
using nexus::Connection;
using nexus::Event;
using nexus::Handle;
using nexus::IoResult;
using nexus::SocketOutcome;
using nexus::TlsClient;
using nexus::TlsOutcome;
using nexus::TlsServer;
using nexus::test::CertificateWish;
using nexus::test::Issued;
using nexus::test::serve_with;
using nexus::test::trust;

namespace {

// Which allocation of OpenSSL's fails next: 0 none, 1 the next one.
thread_local std::size_t fail_at = 0;
thread_local std::size_t allocations = 0;
bool fails_now() {
  allocations += 1;
  return fail_at > 0 && --fail_at == 0;
}
const int kReplaced = CRYPTO_set_mem_functions(
    [](std::size_t bytes, const char*, int) { return fails_now() ? nullptr : std::malloc(bytes); },
    [](void* at, std::size_t bytes, const char*, int) { return fails_now() ? nullptr : std::realloc(at, bytes); },
    [](void* at, const char*, int) { std::free(at); });

// Two sockets, 1 and 2, each with the bytes that the other has sent to it.
struct Pipe {
  struct Socket {
    int fd = -1;
    bool open() const { return fd >= 0; }
  };
  struct Opened {
    SocketOutcome outcome = SocketOutcome::ok;
    Socket socket;
  };
  struct End {
    std::string received;
    bool fin = false;     // behind these
    bool broken = false;  // it cannot send any more
    bool reset = false;   // behind what was received
    std::size_t sent = 0;
  };
  End ends[3];
  std::size_t most_read = SIZE_MAX, most_written = SIZE_MAX, room = SIZE_MAX;
  std::size_t empty_reads = 0;

  End& other(Socket socket) { return ends[3 - socket.fd]; }
  Opened connect(const nexus::Address&) { return {SocketOutcome::ok, {1}}; }
  int connect_error(Socket) { return 0; }
  bool watch(Socket, Handle) { return true; }
  IoResult read(Socket socket, char* into, std::size_t bytes) {
    End& end = ends[socket.fd];
    const std::size_t count = std::min({bytes, end.received.size(), most_read});
    if (count == 0 && end.reset) return {IoResult::Kind::failed, 0, ECONNRESET};
    if (count == 0 && end.fin) return {IoResult::Kind::eof, 0, 0};
    if (count == 0) empty_reads += 1;
    if (count == 0) return {IoResult::Kind::again, 0, 0};
    end.received.copy(into, count);
    end.received.erase(0, count);
    return {IoResult::Kind::ok, count, 0};
  }
  IoResult write(Socket socket, std::span<const iovec> parts) {
    if (ends[socket.fd].broken) return {IoResult::Kind::failed, 0, EPIPE};
    End& to = other(socket);
    std::size_t sent = 0;
    for (const iovec& part : parts) {
      const std::size_t left = room - std::min(room, to.received.size());
      const std::size_t count = std::min({part.iov_len, left, most_written - sent});
      to.received.append(static_cast<const char*>(part.iov_base), count);
      sent += count;
    }
    ends[socket.fd].sent += sent;
    return sent > 0 ? IoResult{IoResult::Kind::ok, sent, 0} : IoResult{IoResult::Kind::again, 0, 0};
  }
  void shut_write(Socket socket) { other(socket).fin = true; }
  void close(Socket& socket) {
    if (socket.open()) other(socket).fin = true;
    socket.fd = -1;
  }
  void reset(Socket& socket) { close(socket); }
};

struct Pair {
  Pipe net;
  BlockPool pool;
  Connection<Pipe> client, server;

  ~Pair() {
    client.close(net);
    server.close(net);
  }

  bool open(const std::shared_ptr<const TlsClient>& to, const std::shared_ptr<const TlsServer>& from,
            const nexus::TlsTicket* ticket = nullptr) {
    return client.connect(net, {}, {}, to, ticket) == SocketOutcome::ok &&
           server.adopt(net, {2}, {}, from) == SocketOutcome::ok;
  }

  void tell(Connection<Pipe>& whom, int fd) {
    Event event;
    event.hangup = net.ends[fd].fin || net.ends[fd].reset;
    event.readable = !net.ends[fd].received.empty() || event.hangup;
    event.writable = net.room > net.ends[3 - fd].received.size();
    whom.note(event);
  }

  IoResult client_result, server_result;
  // True if both sides can exchange bytes.
  bool shake() {
    for (int turn = 0; turn < 20'000; ++turn) {
      tell(client, 1);
      tell(server, 2);
      if (client_result.kind != IoResult::Kind::failed) client_result = client.establish(net);
      if (server_result.kind != IoResult::Kind::failed) server_result = server.establish(net);
      if (client_result.kind == IoResult::Kind::failed && client.is_open()) client.close(net);
      if (client_result.ok() && server_result.ok()) return true;
      if (client_result.kind == IoResult::Kind::failed || server_result.kind == IoResult::Kind::failed) break;
    }
    return false;
  }

  // All that `from` can read now, `step` bytes a call.
  std::string read(Connection<Pipe>& from, int fd, std::size_t step = 4096, IoResult* last = nullptr) {
    std::string text;
    std::vector<char> into(step);
    tell(from, fd);
    while (from.may_read()) {
      const IoResult result = from.read(net, into.data(), step);
      if (last != nullptr) *last = result;
      if (!result.ok()) break;
      text.append(into.data(), result.bytes);
    }
    return text;
  }
};

const Issued& authority() {
  static const Issued made(CertificateWish{.name = "Test authority", .alternatives = "", .is_authority = true});
  return made;
}
TlsServer::Pair pair_for(const CertificateWish& wish) {
  const Issued issued(wish, &authority());
  return {issued.certificate(), issued.key()};
}
std::shared_ptr<const TlsServer> a_server() {
  static const auto server = serve_with({pair_for({})});
  return server;
}
TlsClient::Options for_host(const std::string& host) {
  TlsClient::Options options;
  options.host = host;
  return options;
}
std::shared_ptr<const TlsClient> a_client() {
  static const auto client = trust(authority().certificate(), for_host("localhost"));
  return client;
}

std::string noise(std::size_t bytes) {
  std::mt19937 random(static_cast<unsigned>(bytes));
  std::string text(bytes, 0);
  for (char& c : text) c = static_cast<char>(random());
  return text;
}

// How the handshake of a client with a server of this certificate ends, and why.
std::pair<TlsOutcome, std::string> outcome_of(const TlsServer::Pair& certificate, std::string_view ca,
                                              const TlsClient::Options& options) {
  Pair pair;
  REQUIRE(pair.client.connect(pair.net, {}, {}, trust(ca, options)) == SocketOutcome::ok);
  REQUIRE(pair.server.adopt(pair.net, {2}, {}, serve_with({certificate})) == SocketOutcome::ok);
  IoResult result{IoResult::Kind::again, 0, 0};
  for (int turn = 0; turn < 10 && result.kind == IoResult::Kind::again; ++turn) {
    pair.tell(pair.client, 1);
    result = pair.client.establish(pair.net);
    pair.tell(pair.server, 2);
    pair.server.establish(pair.net);
  }
  return {*pair.client.handshake_outcome(), result.ok() ? "" : std::string(pair.client.why(result))};
}

}  // namespace

TEST_CASE("bytes pass both ways over TLS, however they are cut") {
  for (const std::size_t most : {std::size_t{1}, std::size_t{7}, std::size_t{1000}, SIZE_MAX}) {
    CAPTURE(most);
    Pair pair;
    pair.net.most_read = pair.net.most_written = most;
    REQUIRE(pair.open(a_client(), a_server()));
    REQUIRE(pair.shake());
    CHECK(pair.client.handshake_outcome() == TlsOutcome::full);
    CHECK(pair.server.handshake_outcome() == TlsOutcome::full);
    const std::string question = noise(most == 1 ? 500 : 70'000), answer = noise(most == 1 ? 700 : 90'000);
    REQUIRE(pair.client.write(pair.net, pair.pool, question));
    std::string got;
    for (int turn = 0; turn < 100'000 && got.size() < question.size(); ++turn) {
      pair.tell(pair.client, 1);
      REQUIRE(pair.client.flush(pair.net));
      got += pair.read(pair.server, 2, 333);
    }
    CHECK(got == question);
    REQUIRE(pair.server.write(pair.net, pair.pool, answer));
    got.clear();
    for (int turn = 0; turn < 100'000 && got.size() < answer.size(); ++turn) {
      pair.tell(pair.server, 2);
      REQUIRE(pair.server.flush(pair.net));
      got += pair.read(pair.client, 1, 5000);
    }
    CHECK(got == answer);
    CHECK(pair.client.pending() + pair.server.pending() == 0);
  }
}

TEST_CASE("a record that is read in small pieces needs no further event") {
  Pair pair;
  REQUIRE(pair.open(a_client(), a_server()));
  REQUIRE(pair.shake());
  pair.read(pair.client, 1);
  const std::string sent = noise(16'000);
  REQUIRE(pair.server.write(pair.net, pair.pool, sent));
  pair.tell(pair.client, 1);
  std::string got;
  char into[4000];
  while (pair.client.may_read()) {
    const IoResult result = pair.client.read(pair.net, into, sizeof into);
    if (!result.ok()) break;
    got.append(into, result.bytes);
  }
  CHECK(got == sent);
}

TEST_CASE("a socket that is known to be drained is not asked again") {
  Pair pair;
  REQUIRE(pair.open(a_client(), a_server()));
  REQUIRE(pair.shake());
  pair.read(pair.client, 1);
  pair.net.empty_reads = 0;
  REQUIRE(pair.server.write(pair.net, pair.pool, "an event"));
  CHECK(pair.read(pair.client, 1) == "an event");
  CHECK_FALSE(pair.client.may_read());
  CHECK(pair.net.empty_reads == 0);
}

TEST_CASE("a full socket takes the same record later, and nothing is sent twice") {
  for (const std::size_t room : {1u, 10u, 100u, 5'000u, 20'000u}) {
    CAPTURE(room);
    Pair pair;
    REQUIRE(pair.open(a_client(), a_server()));
    REQUIRE(pair.shake());
    pair.read(pair.server, 2);
    pair.net.room = room;
    const std::string text = noise(50'000);
    std::string got;
    std::size_t at = 0;
    std::mt19937 random(1);
    for (int turn = 0; turn < 200'000 && got.size() < text.size(); ++turn) {
      pair.tell(pair.client, 1);
      // As many parts as there are; the same bytes again after `again`.
      const std::size_t cut = at + std::min<std::size_t>(random() % 300, text.size() - at);
      iovec parts[] = {{const_cast<char*>(text.data()) + at, cut - at},
                       {const_cast<char*>(text.data()) + cut, text.size() - cut}};
      if (at < text.size() && pair.client.may_write()) {
        const IoResult result = pair.client.write_some(pair.net, parts);
        REQUIRE(result.kind != IoResult::Kind::failed);
        if (result.ok()) at += result.bytes;
      }
      got += pair.read(pair.server, 2, 999);
    }
    CHECK(got == text);
  }
}

TEST_CASE("a FIN without close_notify is a failure, with it an end") {
  for (const bool whole : {false, true}) {
    Pair pair;
    REQUIRE(pair.open(a_client(), a_server()));
    REQUIRE(pair.shake());
    REQUIRE(pair.server.write(pair.net, pair.pool, "the last"));
    pair.server.finish(pair.net, whole);
    IoResult last;
    CHECK(pair.read(pair.client, 1, 4096, &last) == "the last");
    CHECK(last.kind == (whole ? IoResult::Kind::eof : IoResult::Kind::failed));
    if (!whole) CHECK(pair.client.why(last) == "it closed without close_notify");
  }
}

TEST_CASE("what the peer sent before a write failed can still be read") {
  Pair pair;
  REQUIRE(pair.open(a_client(), a_server()));
  REQUIRE(pair.shake());
  REQUIRE(pair.server.write(pair.net, pair.pool, "413 too large"));
  pair.net.ends[1].broken = true;
  char question[] = "a long body";
  const iovec part{question, sizeof question};
  pair.tell(pair.client, 1);
  const IoResult result = pair.client.write_some(pair.net, std::span(&part, 1));
  CHECK(result.kind == IoResult::Kind::failed);
  CHECK(result.error == EPIPE);
  CHECK(pair.read(pair.client, 1) == "413 too large");
}

TEST_CASE("a second connection resumes with the ticket of the first, once it has exchanged bytes") {
  nexus::TlsTicket ticket;
  for (const TlsOutcome expected : {TlsOutcome::full, TlsOutcome::resumed, TlsOutcome::resumed}) {
    Pair pair;
    REQUIRE(pair.open(a_client(), a_server(), &ticket));
    REQUIRE(pair.shake());
    CHECK(pair.client.handshake_outcome() == expected);
    CHECK(pair.server.handshake_outcome() == expected);
    REQUIRE(pair.server.write(pair.net, pair.pool, "answer"));
    CHECK(pair.read(pair.client, 1) == "answer");
    ticket = pair.client.tls()->ticket();
    CHECK(ticket);
  }
}

TEST_CASE("an idle connection on which the library's own messages came is quiet") {
  Pair pair;
  REQUIRE(pair.open(a_client(), a_server()));
  REQUIRE(pair.shake());  // the tickets wait to be read
  pair.tell(pair.client, 1);
  CHECK(pair.client.is_quiet(pair.net));
  REQUIRE(pair.server.write(pair.net, pair.pool, "unasked"));
  pair.tell(pair.client, 1);
  CHECK_FALSE(pair.client.is_quiet(pair.net));
}

TEST_CASE("bytes whose event was not fetched yet are seen when the connection is asked if it is quiet") {
  Pair pair;
  REQUIRE(pair.open(a_client(), a_server()));
  REQUIRE(pair.shake());
  pair.read(pair.client, 1);
  CHECK(pair.client.is_quiet(pair.net));
  REQUIRE(pair.server.write(pair.net, pair.pool, "unasked"));
  CHECK_FALSE(pair.client.is_quiet(pair.net));
}

TEST_CASE("a certificate's fault is told in words that say what to do") {
  const std::string ca = authority().certificate();
  const auto check = [&](const CertificateWish& wish, std::string_view by, const TlsClient::Options& options,
                         const std::string& words) {
    const auto [outcome, why] = outcome_of(pair_for(wish), by, options);
    CAPTURE(why);
    CHECK(outcome == TlsOutcome::certificate);
    CHECK(why.find(words) != std::string::npos);
  };
  check({}, ca, for_host("gpu.example"), "its certificate is for localhost, not for gpu.example: set tls_name");
  check({.alternatives = "IP:10.0.0.7,DNS:a.example"}, ca, for_host("10.0.0.8"),
        "its certificate is for 10.0.0.7, a.example, not for 10.0.0.8");
  check({.from_s = -7200, .to_s = -60}, ca, for_host("localhost"), "its certificate CN=localhost expired on 20");
  check({.from_s = 3600}, ca, for_host("localhost"), "is this host's clock right?");
  const Issued stranger(CertificateWish{.name = "Stranger", .is_authority = true});
  check({}, stranger.certificate(), for_host("localhost"),
        "the issuer of its certificate is unknown: CN=Test authority; set tls_ca");
  const Issued alone(CertificateWish{});
  const auto [outcome, why] = outcome_of({alone.certificate(), alone.key()}, ca, for_host("localhost"));
  CHECK(outcome == TlsOutcome::certificate);
  CHECK(why.find("its certificate is self-signed") != std::string::npos);
}

TEST_CASE("a certificate is accepted for its name, its address, the configured name, or by itself") {
  const std::string ca = authority().certificate();
  const auto accepted = [&](const TlsServer::Pair& pair, std::string_view by, const TlsClient::Options& options) {
    return outcome_of(pair, by, options).first == TlsOutcome::full;
  };
  CHECK(accepted(pair_for({}), ca, for_host("localhost")));
  CHECK(accepted(pair_for({}), ca, for_host("localhost.")));
  CHECK(accepted(pair_for({.alternatives = "IP:10.0.0.7"}), ca, for_host("10.0.0.7")));
  CHECK(accepted(pair_for({.alternatives = "IP:::1"}), ca, for_host("::1")));
  CHECK(accepted(pair_for({.alternatives = "DNS:*.lab.example"}), ca, for_host("gpu.lab.example")));
  CHECK_FALSE(accepted(pair_for({.alternatives = "DNS:*.lab.example"}), ca, for_host("a.gpu.lab.example")));
  TlsClient::Options named = for_host("10.0.0.7");
  named.name = "localhost";
  CHECK(accepted(pair_for({}), ca, named));
  TlsClient::Options careless = for_host("whatever");
  careless.verify = false;
  CHECK(accepted(pair_for({.to_s = -1}), ca, careless));
  const Issued alone(CertificateWish{});
  CHECK(accepted({alone.certificate(), alone.key()}, alone.certificate(), for_host("localhost")));
}

TEST_CASE("the certificate is chosen by the name that a client asks for: exact, wildcard, else the first") {
  const auto server = serve_with({pair_for({.name = "first", .alternatives = "DNS:first.example,IP:127.0.0.1"}),
                                  pair_for({.name = "star", .alternatives = "DNS:*.example"}),
                                  pair_for({.name = "exact", .alternatives = "DNS:gpu.example"})});
  const auto names = [&](const std::string& asked) {
    TlsClient::Options options = for_host(asked);
    options.verify = false;
    Pair pair;
    REQUIRE(pair.open(trust(authority().certificate(), options), server));
    REQUIRE(pair.shake());
    return pair.client.tls()->certificate_name();
  };
  CHECK(names("gpu.example") == "exact");
  CHECK(names("GPU.example") == "exact");
  CHECK(names("other.example") == "star");
  CHECK(names("a.b.example") == "first");
  CHECK(names("127.0.0.1") == "first");
  CHECK(server->certificates().size() == 3);
}

TEST_CASE("a client without an accepted certificate is refused where one is required") {
  const auto server = serve_with({pair_for({})}, TLS1_2_VERSION, authority().certificate());
  const auto shake = [&](const TlsClient::Options& options) {
    Pair pair;
    REQUIRE(pair.open(trust(authority().certificate(), options), server));
    pair.shake();
    return std::pair(*pair.server.handshake_outcome(), pair.server.tls()->certificate_name());
  };
  TlsClient::Options options = for_host("localhost");
  CHECK(shake(options).first == TlsOutcome::certificate);
  const Issued alice(CertificateWish{.name = "alice"}, &authority()), mallory(CertificateWish{.name = "mallory"});
  options.chain = alice.certificate();
  options.key = alice.key();
  CHECK(shake(options) == std::pair(TlsOutcome::full, std::string("alice")));
  options.chain = mallory.certificate();
  options.key = mallory.key();
  CHECK(shake(options).first == TlsOutcome::certificate);
}

TEST_CASE("a peer that speaks HTTP in clear, or closes, is told apart from a failed handshake") {
  const auto end_with = [&](const std::string& bytes, bool fin) {
    Pair pair;
    REQUIRE(pair.server.adopt(pair.net, {2}, {}, a_server()) == SocketOutcome::ok);
    pair.net.ends[2].received = bytes;
    pair.net.ends[2].fin = fin;
    pair.tell(pair.server, 2);
    REQUIRE(pair.server.establish(pair.net).kind == IoResult::Kind::failed);
    return std::pair(*pair.server.handshake_outcome(), pair.server.tls()->spoke_http());
  };
  CHECK(end_with("GET / HTTP/1.1\r\n\r\n", false) == std::pair(TlsOutcome::closed, true));
  CHECK(end_with("", true) == std::pair(TlsOutcome::closed, false));
  CHECK(end_with(std::string("\x16\x03\x01\x00\x10", 5), true) == std::pair(TlsOutcome::closed, false));
  CHECK(end_with(std::string("\x15\x03\x01\x00\x02\x02\x28", 7), false) == std::pair(TlsOutcome::failed, false));
}

TEST_CASE("a reset in the handshake is told apart from a message that is refused, also if its alert cannot be sent") {
  const auto end_with = [&](std::string_view bytes, bool reset, bool broken) {
    Pair pair;
    REQUIRE(pair.server.adopt(pair.net, {2}, {}, a_server()) == SocketOutcome::ok);
    pair.net.ends[2].received = bytes;
    pair.net.ends[2].reset = reset;
    pair.net.ends[2].broken = broken;
    pair.tell(pair.server, 2);
    const IoResult shaken = pair.server.establish(pair.net);
    REQUIRE(shaken.kind == IoResult::Kind::failed);
    return std::pair(*pair.server.handshake_outcome(), std::string(pair.server.why(shaken)));
  };
  const std::pair reset(TlsOutcome::closed, std::string(strerror(ECONNRESET)));
  CHECK(end_with("", true, false) == reset);
  CHECK(end_with({"\x16\x03\x01\x00\x10", 5}, true, false) == reset);
  // A hello of four bytes: it is too short.
  const auto refused = end_with({"\x16\x03\x01\x00\x08\x01\x00\x00\x04\x03\x03\x00\x00", 13}, false, false);
  CHECK(refused.first == TlsOutcome::failed);
  CHECK(end_with({"\x16\x03\x01\x00\x08\x01\x00\x00\x04\x03\x03\x00\x00", 13}, false, true) == refused);
}

TEST_CASE("a peer that sends key updates without data between them is cut off") {
  // A client of the library's own, whose bytes the test carries.
  const auto bytes_read = [](int count, bool with_data, bool& failed) {
    Pair pair;
    REQUIRE(pair.server.adopt(pair.net, {2}, {}, a_server()) == SocketOutcome::ok);
    const nexus::tls::Owned<SSL, SSL_free> ssl(SSL_new(a_client()->context()));
    BIO *const in = BIO_new(BIO_s_mem()), *const out = BIO_new(BIO_s_mem());
    SSL_set_bio(ssl.get(), in, out);
    SSL_set_connect_state(ssl.get());
    SSL_set_verify(ssl.get(), SSL_VERIFY_NONE, nullptr);
    const auto carry = [&] {
      char* data = nullptr;
      const long bytes = BIO_get_mem_data(out, &data);
      pair.net.ends[2].received.append(data, static_cast<std::size_t>(bytes));
      BIO_reset(out);
      std::string& back = pair.net.ends[1].received;
      BIO_write(in, back.data(), static_cast<int>(back.size()));
      back.clear();
      pair.tell(pair.server, 2);
    };
    for (int turn = 0; turn < 5; ++turn) {
      SSL_do_handshake(ssl.get());
      carry();
      pair.server.establish(pair.net);
    }
    std::string got;
    IoResult last;
    for (int i = 0; i < count && !failed; ++i) {
      SSL_key_update(ssl.get(), SSL_KEY_UPDATE_NOT_REQUESTED);
      SSL_do_handshake(ssl.get());
      if (with_data) SSL_write(ssl.get(), "x", 1);
      carry();
      got += pair.read(pair.server, 2, 100, &last);
      failed = last.kind == IoResult::Kind::failed;
    }
    if (failed) CHECK(pair.server.why(last) == "it sends key updates without data");
    return got.size();
  };
  bool failed = false;
  CHECK(bytes_read(500, true, failed) == 500);
  CHECK_FALSE(failed);
  bytes_read(500, false, failed);
  CHECK(failed);
}

TEST_CASE("every allocation of a handshake and an exchange may fail: nothing crashes, nothing leaks") {
  REQUIRE(kReplaced == 1);
  const auto run = [](std::size_t fail) {
    Pair pair;
    allocations = 0;
    fail_at = fail;
    bool done = pair.open(a_client(), a_server()) && pair.shake();
    done = done && pair.client.write(pair.net, pair.pool, "question") && pair.read(pair.server, 2) == "question";
    done = done && pair.server.write(pair.net, pair.pool, "answer");
    if (done) pair.server.finish(pair.net, true);
    IoResult last;
    done = done && pair.read(pair.client, 1, 4096, &last) == "answer" && last.kind == IoResult::Kind::eof;
    if (done) pair.client.tls()->ticket();
    fail_at = 0;
    if (!done && pair.client.tls() != nullptr && pair.client.failed()) {
      CHECK(!pair.client.why({IoResult::Kind::failed, 0, EPROTO}).empty());
    }
    return done;
  };
  REQUIRE(run(0));
  REQUIRE(run(0));
  const std::size_t all = allocations;
  std::size_t failed = 0;
  for (std::size_t k = 1; k <= all; ++k) failed += run(k) ? 0u : 1u;
  CHECK(all > 500);
  CHECK(failed > all / 3);  // the library does without some
  CHECK(run(0));
}

TEST_CASE("settings with unfit certificates are told by file, and dates apart from the rest") {
  const auto problems = [](const TlsServer::Pair& pair, bool own_key) {
    nexus::Settings settings;
    settings.server.tls_listen = {{"127.0.0.1", 8443}};
    nexus::TlsCertificate& one = settings.server.tls_certificates.emplace_back();
    one.chain = {"/c.pem", pair.chain + (own_key ? "" : pair.key), 1};
    if (own_key) one.key = {"/k.pem", pair.key, 2};
    auto found = nexus::make_tls(settings, nexus::wall_now() / nexus::kSecond);
    CHECK(one.chain.text.empty());
    CHECK(one.key.text.empty());
    CHECK(found.empty() == (settings.server.tls != nullptr && found.empty()));
    return found;
  };
  const TlsServer::Pair good = pair_for({});
  CHECK(problems(good, true).empty());
  CHECK(problems(good, false).empty());
  const auto text = [&](const TlsServer::Pair& pair) {
    const auto found = problems(pair, true);
    REQUIRE(found.size() == 1);
    return found[0].error.to_string() + (found[0].is_date ? " (date)" : "");
  };
  CHECK(text({good.chain, pair_for({}).key}) ==
        "nexus.conf:2: tls_key: /k.pem: certificate and private key do not belong together");
  CHECK(text({good.chain, "-----BEGIN NOTHING-----"}) ==
        "nexus.conf:2: tls_key: /k.pem: there is no private key in PEM form in it");
  CHECK(text({good.chain, good.chain}) ==
        "nexus.conf:2: tls_key: /k.pem: there is no private key in PEM form in it, but a certificate");
  CHECK(
      problems({good.chain, ""}, false)[0].error.to_string() ==
      "nexus.conf:1: tls_certificate: /c.pem: there is no private key in PEM form in it; a key in another file is set "
      "with tls_key");
  CHECK(text({good.key, good.key}) ==
        "nexus.conf:1: tls_certificate: /c.pem: there is no certificate in PEM form in it");
  const Issued secret(CertificateWish{}, &authority());
  CHECK(text({secret.certificate(), secret.encrypted_key()}) ==
        "nexus.conf:2: tls_key: /k.pem: its private key has a password: Nexus needs one without (openssl pkey)");
  CHECK(text(pair_for({.from_s = -7200, .to_s = -60}))
            .starts_with("nexus.conf:1: tls_certificate: /c.pem: the certificate localhost expired on 20"));
  CHECK(text(pair_for({.from_s = -7200, .to_s = -60})).ends_with("(date)"));
  CHECK(text(pair_for({.from_s = 3600})).ends_with("is this host's clock right? (date)"));
}

TEST_CASE("a backend's context is another one if whom it trusts, or its name, has changed") {
  const auto identity = [](const std::string& ca, const std::string& name) {
    nexus::Settings settings;
    nexus::BackendSettings& backend = settings.backends.emplace_back();
    backend.address = {"gpu.example", 443};
    backend.tls.on = true;
    backend.tls.ca_file = {"/ca.pem", ca, 1};
    backend.tls.name = name;
    REQUIRE(nexus::make_tls(settings, 0).empty());
    return backend.tls.context->identity();
  };
  const std::string one = authority().certificate(), other = Issued(CertificateWish{}).certificate();
  CHECK(identity(one, "") == identity(one, ""));
  CHECK(identity(one, "") != identity(other, ""));
  CHECK(identity(one, "") != identity(one, "other.example"));
}

TEST_CASE("the demonstration's certificate is for this host and verifies by itself") {
  const auto made = nexus::make_demo_certificate();
  REQUIRE(made);
  CHECK(made->fingerprint.size() == 32 * 3 - 1);
  for (const char* host : {"localhost", "127.0.0.1", "::1"}) {
    CHECK(outcome_of({made->pem, made->pem}, made->pem, for_host(host)).first == TlsOutcome::full);
  }
}
