// page_client.h
// Owns:     fetching one page of a running Nexus after the other, for a command that a person waits for.
// Promises: a page, or the reason why there is none, within the time limit; the size of a response is bounded.
// Leaves:   the content of a page to scrape.h.
// Threads:  the caller's.
// Tested by: tests/e2e/top.test.mjs
#pragma once

#include <array>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/base/buffer.h"
#include "nexus/fleet/registry.h"
#include "nexus/http/body_framing.h"
#include "nexus/http/head_parser.h"
#include "nexus/http/head_writer.h"
#include "nexus/net/connection.h"
#include "nexus/net/epoll.h"
#include "nexus/net/resolver.h"

namespace nexus {

constexpr std::size_t kMaxPageBytes = 64u << 20;

class PageClient {
 public:
  // `key` may be empty.
  PageClient(BackendSettings server, std::string key) : server_(std::move(server)), key_(std::move(key)) {}
  PageClient(const PageClient&) = delete;
  PageClient& operator=(const PageClient&) = delete;

  // Resolves the server's name. Returns the reason of a failure, or an empty text.
  std::string open() {
    if (const int error = net_.open()) return std::string("epoll: ") + strerror(error);
    bool done = false;
    std::string why;
    Resolver resolver(net_, [&](std::uint64_t, const std::vector<Address>& addresses, const std::string& error) {
      done = true;
      if (addresses.empty()) {
        why = "DNS lookup failed for " + server_.address.host + ": " + error;
      } else {
        address_ = addresses.front();
      }
    });
    resolver.lookup(server_.address.host, server_.address.port, 0);
    while (!done) resolver.turn();
    return why;
  }

  // Fetches one page. Returns the reason of a failure, or an empty text.
  std::string get(const std::string& path, Ns limit_ns, std::string& body) {
    Connection<EpollNet> connection;
    input_.clear();
    const std::string why = exchange(connection, request(path), net_.now() + limit_ns);
    connection.close(net_);
    return why.empty() ? read_page(path, body) : why;
  }

 private:
  static constexpr std::size_t kReadBytes = 64u << 10;

  std::string request(const std::string& path) const {
    std::string head = "GET " + server_.base_path + path + " HTTP/1.1\r\n";
    detail::append_field(head, "Host", host_of(server_));
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
  std::string read_page(const std::string& path, std::string& body) {
    FieldTable fields;
    ResponseReader reader;
    ResponseHead head;
    reader.start(&fields);
    const HeadResult result = reader.feed(input_.data(), input_.size(), head);
    if (result.status == HeadResult::Status::need_more) return "the response is truncated";
    if (result.status == HeadResult::Status::failed || head.status < 200) return "the response is not valid HTTP";
    BodyDecoder framing;
    framing.start(head.framing);
    char* const content = input_.data() + head.head_bytes;
    const BodyDecoder::Piece piece = framing.feed(content, input_.size() - head.head_bytes);
    if (piece.failed) return "the response is not valid HTTP";
    if (!piece.done && !framing.ends_with_connection()) return "the response is truncated";
    if (head.status == 401) return "an API key is required: set NEXUS_API_KEY";
    if (head.status != 200) return path + " returned " + std::to_string(head.status);
    body.assign(content, piece.bytes);
    return {};
  }

  const BackendSettings server_;
  const std::string key_;
  Address address_;
  EpollNet net_;
  BlockPool blocks_;
  std::string input_;
};

}  // namespace nexus
