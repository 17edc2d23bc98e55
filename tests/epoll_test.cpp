// epoll_test.cpp
// Goal:   EpollNet and Connection report what the kernel does, and lose no byte. Method: real sockets on loopback.
#include <doctest/doctest.h>

#include <array>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "nexus/net/connection.h"
#include "nexus/net/epoll.h"

using namespace nexus;
using Socket = EpollNet::Socket;
using Kind = IoResult::Kind;

namespace {

constexpr Ns kPatience = 5 * kSecond;  // a wait for what must come; none of them is to be used up

Handle token_of(std::uint32_t slot) { return Handle::make(1, 7, slot); }

// A loop with a listener on a port that the kernel chose, and one connection through it.
struct Loopback {
  EpollNet net;
  Socket listener, client, served;
  Address address;

  explicit Loopback(const char* host = "127.0.0.1") {
    REQUIRE(net.open() == 0);
    EpollNet::Opened listening = EpollNet::listen(*parse_address(host, 0));
    REQUIRE(listening.outcome == SocketOutcome::ok);
    listener = listening.socket;
    address = listening.peer;
    REQUIRE(net.watch_listener(listener, token_of(0)));
  }
  ~Loopback() {
    for (Socket* socket : {&listener, &client, &served}) net.close(*socket);
  }

  // Waits until an event of `slot` says what `wanted` asks for.
  template <class Wanted>
  bool await(std::uint32_t slot, const Wanted& wanted) {
    const Ns deadline = net.now() + kPatience;
    std::array<Event, 16> events;
    bool woken = false;
    while (net.now() < deadline) {
      const std::size_t count = net.wait(events, deadline, woken);
      for (std::size_t i = 0; i < count; ++i) {
        if (events[i].token == token_of(slot) && wanted(events[i])) return true;
      }
    }
    return false;
  }

  void connect() {
    EpollNet::Opened opened = net.connect(address);
    REQUIRE(opened.outcome == SocketOutcome::ok);
    client = opened.socket;
    REQUIRE(net.watch(client, token_of(1)));
    REQUIRE(await(1, [](const Event& event) { return event.writable; }));
    REQUIRE(net.connect_error(client) == 0);
    EpollNet::Opened taken = net.accept(listener);
    const Ns deadline = net.now() + kPatience;  // the last step of the handshake may be under way
    while (taken.outcome == SocketOutcome::again && net.now() < deadline) taken = net.accept(listener);
    REQUIRE(taken.outcome == SocketOutcome::ok);
    served = taken.socket;
    CHECK(taken.peer == EpollNet::local_address(client));
    REQUIRE(net.watch(served, token_of(2)));
  }

  std::string read_all(Socket socket, std::size_t bytes) {
    std::string text;
    const Ns deadline = net.now() + kPatience;
    while (text.size() < bytes && net.now() < deadline) {
      char part[65536];
      const IoResult result = net.read(socket, part, sizeof part);
      if (result.ok())
        text.append(part, result.bytes);
      else if (result.kind != Kind::again)
        break;
    }
    return text;
  }

  IoResult write(Socket socket, std::string_view bytes) {
    const iovec part{const_cast<char*>(bytes.data()), bytes.size()};
    return net.write(socket, std::span(&part, 1));
  }
};

bool readable(const Event& event) { return event.readable; }

}  // namespace

TEST_CASE("addresses are read and written in the form that URLs have") {
  CHECK(to_string(*parse_address("127.0.0.1", 8000)) == "127.0.0.1:8000");
  CHECK(to_string(*parse_address("::1", 80)) == "[::1]:80");
  CHECK(to_string(*parse_address("0:0::2", 1)) == "[::2]:1");
  CHECK(parse_address("::1", 1)->v6);
  CHECK_FALSE(parse_address("127.0.0.1", 1)->v6);
  CHECK_FALSE(*parse_address("127.0.0.1", 1) == *parse_address("127.0.0.1", 2));
  for (const char* text :
       {"", "localhost", "127.0.0.1.1", "256.0.0.1", "127.1", "[::1]", "::1%lo", "1:2", " 127.0.0.1"}) {
    CAPTURE(std::string(text));
    CHECK_FALSE(parse_address(text, 1));
  }
}

TEST_CASE("a connection carries bytes both ways, in both families") {
  for (const char* host : {"127.0.0.1", "::1"}) {
    CAPTURE(std::string(host));
    if (EpollNet::Opened probe = EpollNet::listen(*parse_address(host, 0)); probe.outcome != SocketOutcome::ok) {
      CHECK(probe.error == EADDRNOTAVAIL);  // a machine without that family
      continue;
    } else {
      EpollNet().close(probe.socket);
    }
    Loopback loop(host);
    CHECK(loop.address.port != 0);
    loop.connect();
    CHECK(loop.net.read(loop.served, std::array<char, 8>{}.data(), 8).kind == Kind::again);
    std::string one = "hello ", two = "world";
    const std::array parts{iovec{one.data(), one.size()}, iovec{two.data(), two.size()}};
    CHECK(loop.net.write(loop.client, parts).bytes == 11);
    CHECK(loop.await(2, readable));
    CHECK(loop.read_all(loop.served, 11) == "hello world");
    CHECK(loop.write(loop.served, "back").bytes == 4);
    CHECK(loop.await(1, readable));
    CHECK(loop.read_all(loop.client, 4) == "back");
  }
}

TEST_CASE("a listener without connections says again") {
  Loopback loop;
  CHECK(loop.net.accept(loop.listener).outcome == SocketOutcome::again);
}

TEST_CASE("a connection that is refused says so") {
  Loopback loop;
  loop.net.close(loop.listener);  // its port is free now
  EpollNet::Opened opened = loop.net.connect(loop.address);
  if (opened.outcome == SocketOutcome::ok) {
    loop.client = opened.socket;
    REQUIRE(loop.net.watch(loop.client, token_of(1)));
    REQUIRE(loop.await(1, [](const Event& event) { return event.writable && event.hangup; }));
    CHECK(loop.net.connect_error(loop.client) == ECONNREFUSED);
  } else {
    CHECK(opened.error == ECONNREFUSED);
  }
}

TEST_CASE("a port that is taken can't be listened on twice") {
  Loopback loop;
  const EpollNet::Opened second = EpollNet::listen(loop.address);
  CHECK(second.outcome == SocketOutcome::failed);
  CHECK(second.error == EADDRINUSE);
  CHECK_FALSE(second.socket.open());
}

TEST_CASE("a FIN comes as a hangup behind the bytes before it") {
  Loopback loop;
  loop.connect();
  loop.write(loop.client, "last");
  loop.net.shut_write(loop.client);
  CHECK(loop.await(2, [](const Event& event) { return event.hangup; }));
  char bytes[16];
  const IoResult first = loop.net.read(loop.served, bytes, sizeof bytes);
  CHECK(std::string_view(bytes, first.bytes) == "last");
  CHECK(loop.net.read(loop.served, bytes, sizeof bytes).kind == Kind::eof);
  CHECK(loop.write(loop.served, "still open").ok());  // the other way
  CHECK(loop.read_all(loop.client, 10) == "still open");
}

TEST_CASE("a reset is seen as one, and writing after it fails without a signal") {
  Loopback loop;
  loop.connect();
  loop.net.reset(loop.client);
  CHECK_FALSE(loop.client.open());
  CHECK(loop.await(2, [](const Event& event) { return event.hangup; }));
  char byte;
  const IoResult result = loop.net.read(loop.served, &byte, 1);
  CHECK(result.kind == Kind::failed);
  CHECK(result.error == ECONNRESET);
  CHECK(loop.write(loop.served, "x").kind == Kind::failed);
  loop.net.close(loop.served);
  CHECK_FALSE(loop.served.open());
  loop.net.close(loop.served);  // closing twice closes nothing else
}

TEST_CASE("a full socket says again, and an edge tells when it takes more") {
  Loopback loop;
  loop.connect();
  const std::string block(1u << 20, 'b');
  std::size_t sent = 0;
  IoResult result;
  while ((result = loop.write(loop.client, block)).ok() && sent < (1u << 30)) sent += result.bytes;
  REQUIRE(result.kind == Kind::again);
  CHECK(loop.read_all(loop.served, sent).size() == sent);
  CHECK(loop.await(1, [](const Event& event) { return event.writable; }));
  CHECK(loop.write(loop.client, "more").ok());
}

TEST_CASE("a wait ends at its deadline, and not before it") {
  EpollNet net;
  REQUIRE(net.open() == 0);
  std::array<Event, 4> events;
  bool woken = false;
  const Ns start = net.now();
  CHECK(net.wait(events, start + 3 * kMillisecond + 1, woken) == 0);
  CHECK(net.now() >= start + 3 * kMillisecond + 1);
  CHECK(net.wait(events, start, woken) == 0);  // past: it does not wait
  CHECK_FALSE(woken);
}

TEST_CASE("a wake ends a wait, also one that comes after it, and many are one") {
  EpollNet net;
  REQUIRE(net.open() == 0);
  std::array<Event, 4> events;
  bool woken = false;
  for (int i = 0; i < 3; ++i) net.wake();
  CHECK(net.wait(events, net.now() + kPatience, woken) == 0);
  CHECK(woken);
  woken = false;
  CHECK(net.wait(events, net.now(), woken) == 0);
  CHECK_FALSE(woken);
  std::thread other([&] { net.wake(); });
  CHECK(net.wait(events, kNever, woken) == 0);
  other.join();
  CHECK(woken);
}

TEST_CASE("a backlog is told of when its listener is watched again, and until it is taken") {
  Loopback loop;
  loop.net.unwatch(loop.listener);
  loop.connect();
  EpollNet::Opened second = loop.net.connect(loop.address);
  REQUIRE(second.outcome == SocketOutcome::ok);
  CHECK(loop.net.watch_listener(loop.listener, token_of(9)));
  CHECK(loop.await(9, readable));
  CHECK(loop.await(9, readable));  // level-triggered: it is still there
  loop.net.close(second.socket);
}

TEST_CASE("a library's descriptor is watched for the directions it names, until it names none") {
  EpollNet net;
  REQUIRE(net.open() == 0);
  int ends[2];
  REQUIRE(pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0);
  const auto events_of = [&](bool readable, bool writable) {
    REQUIRE(net.watch_foreign(ends[1], token_of(1), readable, writable));
    std::array<Event, 4> events;
    bool woken = false;
    return net.wait(events, net.now(), woken);
  };
  CHECK(events_of(true, false) == 0);
  CHECK(events_of(false, true) == 1);
  CHECK(events_of(false, true) == 1);  // level-triggered: it is still writable
  CHECK(events_of(false, false) == 0);
  CHECK_FALSE(net.watch_foreign(ends[1], token_of(1), false, false));  // it was not watched
  ::close(ends[0]);
  ::close(ends[1]);
  CHECK_FALSE(net.watch_foreign(ends[1], token_of(1), true, false));
}

TEST_CASE("a connection keeps what its kernel buffer does not take, in order") {
  Loopback loop;
  BlockPool pool;
  loop.connect();
  std::string sent;
  {
    Connection<EpollNet> connection;
    connection.attach(loop.client);
    for (int i = 0; connection.pending() == 0 && i < 10'000; ++i) {
      std::string head = "<" + std::to_string(i) + ">", body(70'000, static_cast<char>('a' + i % 26));
      std::array parts{iovec{head.data(), head.size()}, iovec{body.data(), body.size()}};
      REQUIRE(connection.write(loop.net, pool, parts));
      sent += head + body;
    }
    REQUIRE(connection.pending() > 0);
    REQUIRE(connection.write(loop.net, pool, "behind"));
    sent += "behind";
    std::string got;
    const Ns deadline = loop.net.now() + kPatience;
    while (got.size() < sent.size() && loop.net.now() < deadline) {
      got += loop.read_all(loop.served, 1);
      REQUIRE(connection.flush(loop.net));
    }
    CHECK(got == sent);
    CHECK(connection.pending() == 0);
    CHECK(pool.taken_bytes() == 0);
  }
}

TEST_CASE("a connection's short read ends its readable edge, and a hangup keeps it") {
  Loopback loop;
  loop.connect();
  Connection<EpollNet> connection;
  connection.attach(loop.served);
  CHECK_FALSE(connection.may_read());
  loop.write(loop.client, "abc");
  const auto note = [&](const Event& event) {
    connection.note(event);
    return event.readable;
  };
  REQUIRE(loop.await(2, note));
  char bytes[16];
  CHECK(connection.read(loop.net, bytes, 2).bytes == 2);
  CHECK(connection.may_read());  // it was full: there may be more
  CHECK(connection.read(loop.net, bytes, sizeof bytes).bytes == 1);
  CHECK_FALSE(connection.may_read());

  loop.write(loop.client, "d");
  loop.net.shut_write(loop.client);
  REQUIRE(loop.await(2, [&](const Event& event) {
    connection.note(event);
    return connection.hangup();
  }));
  CHECK(connection.read(loop.net, bytes, sizeof bytes).bytes == 1);
  CHECK(connection.may_read());  // the FIN is to be read yet
  CHECK(connection.read(loop.net, bytes, sizeof bytes).kind == Kind::eof);
  CHECK_FALSE(connection.may_read());
  CHECK_FALSE(connection.failed());
}

TEST_CASE("a connection that failed stays failed and keeps nothing") {
  Loopback loop;
  BlockPool pool;
  loop.connect();
  Connection<EpollNet> connection;
  connection.attach(loop.served);
  loop.net.reset(loop.client);
  REQUIRE(loop.await(2, [](const Event& event) { return event.hangup; }));
  CHECK_FALSE(connection.write(loop.net, pool, "x"));
  CHECK(connection.failed());
  CHECK_FALSE(connection.write(loop.net, pool, "y"));
  CHECK_FALSE(connection.flush(loop.net));
  CHECK(connection.pending() == 0);
  connection.close(loop.net);
  CHECK_FALSE(connection.is_open());
  loop.served = Socket();  // closed already
}
