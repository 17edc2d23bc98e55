// resolver_test.cpp
// Goal:   a name becomes its addresses or an error message, whatever the DNS server does, and no lookup delays another.
// Method: a DNS server of this file's own on a loopback port, which answers by rows: each name has the behaviour that
//         its first label says. localhost is asked where no server answers at all.
#include "nexus/net/resolver.h"

#include <doctest/doctest.h>
#include <sys/socket.h>

#include <atomic>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

using namespace nexus;

namespace {

constexpr unsigned kA = 1;
constexpr unsigned kAaaa = 28;

// Answers over UDP: `both.*` has two A (listed in either order, in turn) and one AAAA, `six.*` an AAAA alone, `fails.*`
// SERVFAIL, `garbage.*` bytes that are no DNS, `silent.*` nothing; any other name does not exist. Names with an A only:
// of `quiet4.*` AAAA questions get no answer, of `mixed.*` NXDOMAIN, of `half.*` SERVFAIL, of `once.*` garbage at the
// first question of each kind, `many.*` has 25 of them, `alias.*` names itself by another name.
class DnsServer {
 public:
  DnsServer() {
    fd_ = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    REQUIRE(bind(fd_, reinterpret_cast<sockaddr*>(&at), sizeof at) == 0);
    socklen_t length = sizeof at;
    REQUIRE(getsockname(fd_, reinterpret_cast<sockaddr*>(&at), &length) == 0);
    port_ = ntohs(at.sin_port);
    thread_ = std::thread([this] { run(); });
  }
  ~DnsServer() {
    stopping_.store(true);
    shutdown(fd_, SHUT_RDWR);
    // A datagram of our own ends a recvfrom() that shutdown() does not.
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    at.sin_port = htons(port_);
    const int end = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sendto(end, "", 1, 0, reinterpret_cast<sockaddr*>(&at), sizeof at);
    ::close(end);
    thread_.join();
    ::close(fd_);
  }

  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  int questions() const { return questions_.load(); }

 private:
  void run() {
    while (!stopping_.load()) {
      char bytes[1500];
      sockaddr_in from{};
      socklen_t length = sizeof from;
      const ssize_t n = recvfrom(fd_, bytes, sizeof bytes, 0, reinterpret_cast<sockaddr*>(&from), &length);
      if (n < 17) continue;
      questions_.fetch_add(1);
      const std::string reply = answer(std::string(bytes, static_cast<std::size_t>(n)));
      if (!reply.empty()) sendto(fd_, reply.data(), reply.size(), 0, reinterpret_cast<sockaddr*>(&from), length);
    }
  }

  std::string answer(const std::string& question) {
    std::size_t end = 12;
    while (question[end] != 0) end += 1 + static_cast<unsigned char>(question[end]);
    const unsigned type = static_cast<unsigned char>(question[end + 2]);
    const std::string label = question.substr(13, static_cast<unsigned char>(question[12]));
    if (label == "silent") return "";
    if (label == "garbage") return question.substr(0, 2) + "no DNS";
    std::vector<std::string> data;
    unsigned code = 0;
    const std::string one("\x0a\x00\x00\x07", 4);
    if (label == "once" && spoiled_++ < 2) return question.substr(0, 2) + "no DNS";
    if (label == "quiet4" && type == kAaaa) return "";
    if (label == "alias") return by_alias(question, end, type, one);
    if (label == "both" && type == kA) {
      data = {std::string("\x0a\x00\x00\x02", 4), std::string("\x0a\x00\x00\x01", 4)};
      if (turn_++ % 2 == 1) std::swap(data[0], data[1]);
    } else if ((label == "both" || label == "six") && type == kAaaa) {
      data = {std::string("\xfd\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x05", 16)};
    } else if ((label == "quiet4" || label == "mixed" || label == "half" || label == "once") && type == kA) {
      data = {one};
    } else if (label == "many") {
      for (char i = 1; i <= 25 && type == kA; ++i) data.push_back(one.substr(0, 3) + i);
    } else if (label == "fails" || label == "half") {
      code = 2;
    } else if (label != "six" && label != "both" && label != "once") {
      code = 3;
    }
    std::string reply = question.substr(0, 2);
    reply += {'\x81', static_cast<char>(0x80 | code), 0, 1, 0, static_cast<char>(data.size()), 0, 0, 0, 0};
    reply += question.substr(12, end + 5 - 12);
    for (const std::string& each : data) {
      reply +=
          std::string("\xc0\x0c\x00", 3) + static_cast<char>(type) + std::string("\x00\x01\x00\x00\x00\x3c\x00", 7);
      reply += static_cast<char>(each.size());
      reply += each;
    }
    return reply;
  }

  // A CNAME to `x.` before the name's own label, and that one's address.
  static std::string by_alias(const std::string& question, std::size_t end, unsigned type, const std::string& data) {
    const bool is_a = type == kA;
    std::string reply = question.substr(0, 2);
    reply += {'\x81', '\x80', 0, 1, 0, static_cast<char>(is_a ? 2 : 1), 0, 0, 0, 0};
    reply += question.substr(12, end + 5 - 12);
    reply += std::string("\xc0\x0c\x00\x05\x00\x01\x00\x00\x00\x3c\x00\x04\x01x\xc0\x0c", 16);
    const std::string target("\xc0", 1);
    if (is_a) {
      reply += target + static_cast<char>(12 + (end + 5 - 12) + 12);
      reply += std::string("\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04", 10) + data;
    }
    return reply;
  }

  int fd_;
  std::uint16_t port_ = 0;
  int turn_ = 0;
  int spoiled_ = 0;
  std::atomic<bool> stopping_{false};
  std::atomic<int> questions_{0};
  std::thread thread_;
};

struct Got {
  std::vector<std::string> addresses;
  std::string error;
  int times = 0;
};

// A resolver on a loop of its own, and the answers that it gave.
class Lookups {
 public:
  explicit Lookups(ResolverOptions options = {}) {
    REQUIRE(net_.open() == 0);
    resolver_.emplace(
        net_,
        [this](std::uint64_t id, const std::vector<Address>& addresses, std::string error) {
          Got& got = got_[id];
          for (const Address& address : addresses) got.addresses.push_back(to_string(address));
          got.error = std::move(error);
          got.times += 1;
          if (std::exchange(throw_next, false)) throw std::bad_alloc();
        },
        std::move(options));
  }

  bool start(std::string host, std::uint16_t port, std::uint64_t id) {
    return resolver_->lookup(std::move(host), port, id);
  }
  // Runs the loop until the lookup is answered.
  Got wait(std::uint64_t id) {
    const Ns deadline = monotonic_now() + 20 * kSecond;
    while (got_.count(id) == 0 && monotonic_now() < deadline) turn();
    CHECK(got_.count(id) == 1);
    return got_[id];
  }
  void turn() { resolver_->turn(); }
  void forget(std::uint64_t id) { got_.erase(id); }
  Ns next() const { return resolver_->next(); }
  void end() { resolver_.reset(); }
  std::size_t answers() const { return got_.size(); }

  bool throw_next = false;  // the next answer finds no memory

 private:
  EpollNet net_;
  std::optional<Resolver> resolver_;
  std::map<std::uint64_t, Got> got_;
};

using Texts = std::vector<std::string>;

}  // namespace

TEST_CASE("resolver: names become sorted addresses with the port, or an error in words") {
  DnsServer server;
  Lookups lookups({20 * kSecond, server.address()});
  struct Row {
    std::string host;
    Texts addresses;
    std::string error;
  };
  // c-ares 1.18 cannot tell SERVFAIL from silence, 1.34 can.
  const std::string failure = ares_version(nullptr) < std::string("1.2") ? "Could not contact DNS servers"
                                                                         : "DNS server returned general failure";
  const Row rows[] = {
      {"both.test", {"10.0.0.1:80", "10.0.0.2:80", "[fd00::5]:80"}, ""},
      {"both.test", {"10.0.0.1:80", "10.0.0.2:80", "[fd00::5]:80"}, ""},  // listed the other way round
      {"six.test", {"[fd00::5]:80"}, ""},
      {"none.test", {}, "Domain name not found"},
      {"fails.test", {}, failure},
      {"192.0.2.7", {"192.0.2.7:80"}, ""},
      {"2001:db8::1", {"[2001:db8::1]:80"}, ""},
      {"", {}, "not a host name"},
      {std::string("both.test\0.test", 15), {}, "not a host name"},
      {"mixed.test", {"10.0.0.7:80"}, ""},
      {"half.test", {"10.0.0.7:80"}, failure},  // there may be an AAAA
      {"quiet4.test", {"10.0.0.7:80"}, "no answer in time"},
      {"alias.test", {"10.0.0.7:80"}, ""},
      {std::string(254, 'a'), {}, "not a host name"},
      {std::string(254, 'a') + ".", {}, "not a host name"},
      {std::string(64, 'a') + ".test", {}, "Misformatted domain name"},  // a label of 64 bytes
  };
  std::uint64_t id = 0;
  for (const Row& row : rows) {
    CAPTURE(row.host);
    REQUIRE(lookups.start(row.host, 80, ++id));
    const Got got = lookups.wait(id);
    CHECK(got.addresses == row.addresses);
    CHECK(got.error == row.error);
  }
}

TEST_CASE("resolver: localhost needs neither a server nor /etc/hosts, and has both addresses") {
  Lookups lookups({5 * kSecond, "127.0.0.1:1"});
  for (const char* name : {"localhost", "localhost."}) {
    REQUIRE(lookups.start(name, 8080, 1));
    const Got got = lookups.wait(1);
    CHECK(got.error == "");
    CHECK(got.addresses == Texts{"127.0.0.1:8080", "[::1]:8080"});
    lookups.forget(1);
  }
}

TEST_CASE("resolver: the addresses of one family are used if those of the other do not come, and soon") {
  DnsServer server;
  Lookups lookups({20 * kSecond, server.address()});
  const Ns start = monotonic_now();
  REQUIRE(lookups.start("quiet4.test", 80, 1));
  CHECK(lookups.wait(1).addresses == Texts{"10.0.0.7:80"});
  CHECK(monotonic_now() - start < 5 * kSecond);
  CHECK(lookups.next() == kNever);  // nothing waits for the other family
}

TEST_CASE("resolver: a name of 253 bytes may have a final dot") {
  DnsServer server;
  Lookups lookups({20 * kSecond, server.address()});
  std::string name = "both";
  while (name.size() < 253 - 64) name += "." + std::string(60, 'a');
  name += "." + std::string(253 - name.size() - 1, 'b');
  REQUIRE(name.size() == 253);
  REQUIRE(lookups.start(name + ".", 80, 1));
  CHECK(lookups.wait(1).addresses.size() == 3);
}

TEST_CASE("resolver: of many addresses the first are taken, in their order") {
  DnsServer server;
  Lookups lookups({20 * kSecond, server.address()});
  REQUIRE(lookups.start("many.test", 80, 1));
  const Got got = lookups.wait(1);
  REQUIRE(got.addresses.size() == Resolver::kMaxAddresses);
  CHECK(got.addresses[0] == "10.0.0.1:80");
  CHECK(got.addresses[15] == "10.0.0.16:80");
}

TEST_CASE("resolver: after one garbled answer the server is asked again, or the lookup fails in time") {
  DnsServer server;
  Lookups lookups({20 * kSecond, server.address()});
  REQUIRE(lookups.start("once.test", 80, 1));
  REQUIRE(lookups.start("both.test", 80, 2));
  CHECK(lookups.wait(1).addresses == Texts{"10.0.0.7:80"});
  CHECK(lookups.wait(2).addresses.size() == 3);
}

TEST_CASE("resolver: a server that is silent or talks nonsense costs its lookup the time limit, and no other") {
  DnsServer server;
  constexpr Ns kLimit = 300 * kMillisecond;
  Lookups lookups({kLimit, server.address()});
  const Ns start = monotonic_now();
  REQUIRE(lookups.start("silent.test", 1, 1));
  REQUIRE(lookups.start("garbage.test", 1, 2));
  REQUIRE(lookups.start("both.test", 1, 3));
  CHECK(lookups.wait(3).addresses.size() == 3);
  CHECK(lookups.wait(1).error == "no answer in time");
  CHECK(monotonic_now() - start >= kLimit);
  CHECK(lookups.wait(2).error != "");
  REQUIRE(lookups.start("both.test", 1, 4));
  CHECK(lookups.wait(4).addresses.size() == 3);
  for (const std::uint64_t id : {1u, 2u, 3u, 4u}) CHECK(lookups.wait(id).times == 1);
}

TEST_CASE("resolver: more lookups than may be in flight are all answered, once each") {
  DnsServer server;
  Lookups lookups({20 * kSecond, server.address()});
  constexpr std::uint64_t kLookups = 3 * Resolver::kMaxInFlight;
  for (std::uint64_t id = 0; id < kLookups; ++id) {
    REQUIRE(lookups.start(id % 2 == 0 ? "both.test" : "none.test", 1, id));
  }
  for (std::uint64_t id = 0; id < kLookups; ++id) {
    const Got got = lookups.wait(id);
    CHECK(got.times == 1);
    CHECK(got.addresses.size() == (id % 2 == 0 ? 3 : 0));
  }
}

TEST_CASE("resolver: it can be destroyed with lookups under way, which are not answered then") {
  DnsServer server;
  Lookups lookups({3600 * kSecond, server.address()});
  for (std::uint64_t id = 0; id < 40; ++id) REQUIRE(lookups.start("silent.test", 1, id));
  while (server.questions() == 0) lookups.turn();  // some are under way, others wait
  lookups.end();
  CHECK(lookups.answers() == 0);
  Lookups never_asked;
  CHECK(never_asked.next() == kNever);
}

TEST_CASE("resolver: the queue of waiting lookups has an end") {
  Lookups lookups({3600 * kSecond, "127.0.0.1:1"});
  std::uint64_t taken = 0;
  while (taken < 5000 && lookups.start("silent.test", 1, taken)) taken += 1;
  CHECK(taken == Resolver::kMaxWaiting);
}

TEST_CASE("resolver: it has nothing to do, and holds no socket, once every lookup is answered") {
  DnsServer server;
  Lookups lookups({200 * kMillisecond, server.address()});
  const auto open_sockets = [] {
    std::size_t count = 0;
    for (int fd = 0; fd < 200; ++fd) count += EpollNet::local_address({fd}).port != 0 ? 1 : 0;
    return count;
  };
  const std::size_t before = open_sockets();
  REQUIRE(lookups.start("silent.test", 1, 1));
  REQUIRE(lookups.start("both.test", 1, 2));
  CHECK(lookups.wait(2).addresses.size() == 3);
  CHECK(lookups.next() <= monotonic_now() + 200 * kMillisecond);
  CHECK(open_sockets() > before);
  CHECK(lookups.wait(1).error == "no answer in time");
  CHECK(lookups.next() == kNever);
  CHECK(open_sockets() == before);
}

TEST_CASE("resolver: an answer that throws is not repeated, and the others come") {
  DnsServer server;
  Lookups lookups({20 * kSecond, server.address()});
  for (std::uint64_t id = 0; id < 3; ++id) REQUIRE(lookups.start(std::string(64, 'a'), 1, id));  // refused at once
  lookups.throw_next = true;
  CHECK_THROWS_AS(lookups.turn(), std::bad_alloc);
  CHECK(lookups.answers() == 1);
  CHECK(lookups.next() <= monotonic_now());
  lookups.turn();
  for (std::uint64_t id = 0; id < 3; ++id) CHECK(lookups.wait(id).times == 1);
}

TEST_CASE("resolver: a lookup that cannot even be started is answered, and so are those beside it") {
  Lookups lookups({20 * kSecond, "no address of a server"});
  for (std::uint64_t id = 0; id < 3; ++id) REQUIRE(lookups.start(id == 1 ? "" : "both.test", 1, id));
  lookups.throw_next = true;
  CHECK_THROWS_AS(lookups.turn(), std::bad_alloc);
  CHECK(lookups.next() <= monotonic_now());
  for (std::uint64_t id = 0; id < 3; ++id) {
    const auto got = lookups.wait(id);
    CHECK(got.times == 1);
    CHECK(got.addresses.empty());
    CHECK((got.error == "not a host name") == (id == 1));
    CHECK(got.error != "");
  }
  CHECK(lookups.next() == kNever);
}
