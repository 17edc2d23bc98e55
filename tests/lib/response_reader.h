// response_reader.h
// Owns:     reading one response from a connection while its bytes arrive.
// Promises: the grammar is rfc9112.h's; a complete response is told from one that was cut off.
// Leaves:   which request the response belongs to.
// Threads:  any.
// Tested by: tests/hostile_readers_test.cpp, tests/sim/main.cpp
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

#include "tests/lib/rfc9112.h"

namespace rfc9112 {

// Reads one response from bytes as they arrive.
class ResponseReader {
 public:
  ResponseReader() = default;
  explicit ResponseReader(std::string_view method) : method_(method) {}  // of the request

  Message message;      // its head once head_done(), and the part of its body that has arrived
  std::string problem;  // why the bytes are not a response; empty if they are

  bool idle() const { return !head_done_ && kept_.empty(); }
  bool head_done() const { return head_done_; }
  bool done() const { return done_; }

  // Takes bytes up to the end of the response; returns how many.
  std::size_t feed(std::string_view bytes) {
    kept_ += bytes;
    std::string_view text = kept_;
    Got got = head_done_ ? Got::it : feed_head(text);
    if (got == Got::it) got = body_.take(text, message, false, problem);
    done_ = got == Got::it;
    const std::size_t taken = done_ ? bytes.size() - text.size() : bytes.size();
    kept_.erase(0, kept_.size() - text.size());
    if (done_) kept_.clear();
    return taken;
  }

  // The connection ended in order, which completes a response without a length.
  bool end() { return done_ = done_ || (head_done_ && message.framing == Message::Framing::until_close); }

  // Checks what Nexus promises beyond the RFC about the responses it writes. Returns what is wrong, or nothing.
  std::string check_nexus_style() const {
    std::size_t bytes = message.start_line.size() + 4;
    for (const auto& [name, value] : message.fields) {
      bytes += name.size() + value.size() + 4;
      if (value.find('\t') != std::string::npos) return "a tab in a field's value";
    }
    if (bytes != message.head_bytes) return "a field line that is not `Name: value`";
    if (message.minor != 1 || message.start_line.size() < 13) return "no status line of HTTP/1.1";
    if (message.all("Connection").size() > 1) return "Connection twice";
    if (message.status < 200 || message.status == 204 || message.status == 304) {
      if (message.has("Content-Length") || message.has("Transfer-Encoding")) return "a body where none may be";
    }
    if (message.has("Transfer-Encoding") && message.value("Transfer-Encoding") != "chunked") return "an odd coding";
    if (!body_.plain_sizes()) return "an odd chunk size";
    return message.trailers.empty() ? "" : "trailers";
  }

 private:
  static constexpr std::size_t kMostHeadBytes = 100'000;

  Got feed_head(std::string_view& text) {
    if (kept_.find("\r\n\r\n", searched_) == std::string::npos) {
      searched_ = std::max<std::size_t>(kept_.size(), 3) - 3;
      if (kept_.size() > kMostHeadBytes) problem = "a head without an end";
      return Got::not_yet;
    }
    const Got got = take_head(text, message, false, problem);
    if (got != Got::it) return got;
    problem = read_response_framing(message, method_);
    head_done_ = problem.empty();
    return head_done_ ? Got::it : Got::never;
  }

  std::string method_ = "GET";
  BodyReader body_;
  std::string kept_;          // bytes that are no complete line yet
  std::size_t searched_ = 0;  // no head's end lies before
  bool head_done_ = false;
  bool done_ = false;
};

}  // namespace rfc9112
