// page_client.h
// Owns:     fetching one page of a running Nexus after the other, for a command that a person waits for.
// Promises: a response, or the reason why there is none, within the time limit; the size of a response is bounded.
// Leaves:   the content of a page to scrape.h.
// Threads:  the caller's.
// Tested by: tests/e2e/top.test.mjs
#pragma once

#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/base/buffer.h"
#include "nexus/config/settings.h"
#include "nexus/http/body_framing.h"
#include "nexus/http/head_parser.h"
#include "nexus/http/head_writer.h"
#include "nexus/net/connection.h"
#include "nexus/net/epoll.h"
#include "nexus/net/resolver.h"

namespace nexus {

constexpr std::size_t kMaxPageBytes = 64u << 20;

struct FetchedPage {
  std::uint16_t status = 0;  // 0: no response
  std::string body;
  std::string why;  // there is no response
};

// The first address of a host, or nothing and the reason. Blocks until the resolver has an answer.
inline std::optional<Address> resolve_host(const HostPort& where, std::string& why) {
  if (const auto address = parse_address(where.host, where.port)) return address;
  EpollNet net;
  if (net.open() != 0) {
    why = strerror(errno);
    return std::nullopt;
  }
  std::optional<Address> found;
  bool done = false;
  Resolver resolver(net, [&](std::uint64_t, const std::vector<Address>& addresses, std::string error) {
    if (!addresses.empty()) found = addresses.front();
    why = std::move(error);
    done = true;
  });
  resolver.lookup(where.host, where.port, 0);
  while (!done) resolver.turn();
  return found;
}

class PageClient {
 public:
  // `prefix` comes before every path; `key` may be empty.
  PageClient(const Address& address, std::string host, std::string prefix, std::string key)
      : address_(address), host_(std::move(host)), prefix_(std::move(prefix)), key_(std::move(key)) {}
  PageClient(const PageClient&) = delete;
  PageClient& operator=(const PageClient&) = delete;

  // 0, or errno.
  int open() { return net_.open(); }

  FetchedPage get(std::string_view path, Ns limit_ns) {
    FetchedPage page;
    Connection<EpollNet> connection;
    input_.clear();
    page.why = exchange(connection, request(path), net_.now() + limit_ns);
    connection.close(net_);
    if (page.why.empty()) page.why = read_page(page);
    return page;
  }

 private:
  static constexpr std::size_t kReadBytes = 64u << 10;

  std::string request(std::string_view path) const {
    std::string head = "GET " + prefix_ + std::string(path) + " HTTP/1.1\r\n";
    detail::append_field(head, "Host", host_);
    detail::append_field(head, "User-Agent", std::string("nexus/").append(kVersion));
    if (!key_.empty()) detail::append_field(head, "Authorization", "Bearer " + key_);
    return head += "Connection: close\r\n\r\n";
  }

  // Sends the request and reads until the server closes. Returns the reason of a failure, or an empty text.
  std::string exchange(Connection<EpollNet>& connection, const std::string& head, Ns deadline) {
    if (connection.connect(net_, address_, Handle::make(1, 0, 0)) != SocketOutcome::ok) return strerror(errno);
    bool connected = false;
    for (;;) {
      if (net_.now() >= deadline) return connected ? "no response in time" : "no connection in time";
      std::array<Event, 4> events;
      bool woken = false;
      if (net_.wait(events, deadline, woken) == 0) continue;
      connection.note(events[0]);
      if (!connected) {
        const IoResult established = connection.establish(net_);
        if (established.kind == IoResult::Kind::again) continue;
        if (!established.ok()) return strerror(established.error);
        connection.write(net_, blocks_, head);
        connected = true;
      }
      if (!connection.flush(net_)) return "the connection was closed before the request was sent";
      while (connection.may_read()) {
        if (input_.size() > kMaxPageBytes) return "the response is too large";
        const std::size_t held = input_.size();
        input_.resize(held + kReadBytes);
        const IoResult result = connection.read(net_, input_.data() + held, kReadBytes);
        input_.resize(held + result.bytes);
        if (result.kind == IoResult::Kind::eof) return {};
        if (result.kind == IoResult::Kind::failed) return strerror(result.error);
      }
    }
  }

  // The same for the response in input_.
  std::string read_page(FetchedPage& page) {
    FieldTable fields;
    ResponseReader reader;
    ResponseHead head;
    reader.start(&fields);
    const HeadResult result = reader.feed(input_.data(), input_.size(), head);
    if (result.status == HeadResult::Status::need_more) return "the response is truncated";
    if (result.status == HeadResult::Status::failed || head.status < 200) return "the response is not valid HTTP";
    BodyDecoder framing;
    framing.start(head.framing);
    char* const body = input_.data() + head.head_bytes;
    const BodyDecoder::Piece piece = framing.feed(body, input_.size() - head.head_bytes);
    if (piece.failed) return "the response is not valid HTTP";
    if (!piece.done && !framing.ends_with_connection()) return "the response is truncated";
    page.status = head.status;
    page.body.assign(body, piece.bytes);
    return {};
  }

  Address address_;
  std::string host_, prefix_, key_;
  EpollNet net_;
  BlockPool blocks_;
  std::string input_;
};

}  // namespace nexus
