// page_client.h
// Owns:     fetching a page of a running Nexus, one after the other, for a command that a person waits for.
// Promises: an answer, or why there is none, within the time given; what an answer may hold is bounded.
// Leaves:   what a page says to scrape.h.
// Threads:  the caller's.
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
  std::uint16_t status = 0;  // 0: none came
  std::string body;
  std::string why;  // none came
};

// Returns the first address of a host, or nullopt and why there is none. Blocks until the lookup has ended.
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
  // `prefix` stands before every path; `key` may be empty.
  PageClient(const Address& address, std::string host, std::string prefix, std::string key)
      : address_(address), host_(std::move(host)), prefix_(std::move(prefix)), key_(std::move(key)) {}
  PageClient(const PageClient&) = delete;
  PageClient& operator=(const PageClient&) = delete;

  // 0, or errno.
  int open() { return net_.open(); }

  FetchedPage get(std::string_view path, Ns limit_ns) {
    deadline_ = net_.now() + limit_ns;
    FetchedPage page;
    page.why = fetch(path, page);
    if (!page.why.empty()) page.status = 0;
    connection_.close(net_);
    return page;
  }

 private:
  static constexpr std::size_t kReadBytes = 64u << 10;

  // What went wrong, or an empty text.
  std::string fetch(std::string_view path, FetchedPage& page) {
    connection_ = {};
    input_.clear();
    connected_ = false;
    const EpollNet::Opened opened = net_.connect(address_);
    if (opened.outcome != SocketOutcome::ok) return strerror(opened.error);
    connection_.socket = opened.socket;
    if (!net_.watch(opened.socket, Handle::make(1, 0, 0))) return strerror(errno);
    const std::string head = request(path);
    std::size_t written = 0;
    for (;;) {
      if (net_.now() >= deadline_) return connected_ ? "no answer in time" : "no connection in time";
      std::array<Event, 4> events;
      bool woken = false;
      if (net_.wait(events, deadline_, woken) == 0) continue;
      if (!connected_) {
        if (const int error = net_.connect_error(opened.socket)) return strerror(error);
        connected_ = true;
      }
      if (const char* why = write(head, written)) return why;
      bool whole = false;
      if (std::string why = read(page, whole); !why.empty() || whole) return why;
    }
  }

  std::string request(std::string_view path) const {
    std::string head = "GET " + prefix_ + std::string(path) + " HTTP/1.1\r\n";
    detail::append_field(head, "Host", host_);
    detail::append_field(head, "User-Agent", std::string("nexus/").append(kVersion));
    if (!key_.empty()) detail::append_field(head, "Authorization", "Bearer " + key_);
    return head += "Connection: close\r\n\r\n";
  }

  const char* write(const std::string& head, std::size_t& written) {
    while (written < head.size()) {
      iovec part{const_cast<char*>(head.data()) + written, head.size() - written};
      const IoResult result = net_.write(connection_.socket, std::span(&part, 1));
      if (result.kind == IoResult::Kind::again) return nullptr;
      if (!result.ok()) return strerror(result.error);
      written += result.bytes;
    }
    return nullptr;
  }

  // Reads to EAGAIN, or until the page is whole.
  std::string read(FetchedPage& page, bool& whole) {
    for (;;) {
      if (input_.size() > kMaxPageBytes) return "its answer is too large";
      const std::size_t held = input_.size();
      input_.resize(held + kReadBytes);
      const IoResult result = net_.read(connection_.socket, input_.data() + held, kReadBytes);
      input_.resize(held + result.bytes);
      if (result.kind == IoResult::Kind::again) return {};
      if (result.kind == IoResult::Kind::failed) return strerror(result.error);
      const bool ended = result.kind == IoResult::Kind::eof;
      if (std::string why = take_in(page, ended, whole); !why.empty() || whole) return why;
      if (ended) return "its answer was cut short";
    }
  }

  // The whole answer is looked at anew each time: it is small, and nobody else waits.
  std::string take_in(FetchedPage& page, bool ended, bool& whole) {
    FieldTable fields;
    ResponseReader reader;
    ResponseHead head;
    reader.start(&fields);
    const HeadResult result = reader.feed(input_.data(), input_.size(), head);
    if (result.status == HeadResult::Status::need_more) return {};
    if (result.status == HeadResult::Status::failed || head.status < 200) return "its answer is not HTTP";
    std::string body = input_.substr(head.head_bytes);
    BodyDecoder framing;
    framing.start(head.framing);
    const BodyDecoder::Piece piece = framing.feed(body.data(), body.size());
    if (piece.failed) return "its answer is not HTTP";
    whole = piece.done || (ended && framing.ends_with_connection());
    if (!whole) return {};
    page.status = head.status;
    page.body = body.substr(0, piece.bytes);
    return {};
  }

  struct Held {
    EpollNet::Socket socket;
    void close(EpollNet& net) { net.close(socket); }
  };

  Address address_;
  std::string host_, prefix_, key_;
  EpollNet net_;
  Held connection_;
  std::string input_;
  Ns deadline_ = 0;
  bool connected_ = false;
};

}  // namespace nexus
