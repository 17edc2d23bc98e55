// response_parser.h
// Owns:     a client's reading of what Nexus sends: heads, bodies in each framing, and where each answer ends.
// Promises: strict and written apart from Nexus's own readers: the grammar of RFC 9112, nothing let pass; it tells the
//           whole from the cut.
// Leaves:   whose answer it is to clients.h.
// Threads:  one.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

namespace nexus::sim {

class ResponseParser {
 public:
  enum class State : std::uint8_t { head, length, chunk_size, chunk, chunk_end, trailer, until_close, done, broken };

  State state = State::head;
  std::string head;  // whole where state is past it
  std::string body;
  std::uint16_t status = 0;
  bool close = false;    // the connection ends behind this answer
  const char* why = "";  // where broken

  bool head_done() const { return state != State::head && state != State::broken; }
  bool idle() const { return state == State::head && head.empty(); }

  void start() { *this = ResponseParser(); }

  // Takes bytes up to the end of this answer; says how many.
  std::size_t feed(std::string_view bytes) {
    std::size_t at = 0;
    while (at < bytes.size() && state != State::done && state != State::broken) {
      switch (state) {
        case State::head: at += feed_head(bytes.substr(at)); break;
        case State::length: {
          const std::size_t count = std::min<std::size_t>(left_, bytes.size() - at);
          body.append(bytes.substr(at, count));
          left_ -= count;
          at += count;
          if (left_ == 0) state = State::done;
          break;
        }
        case State::until_close:
          body.append(bytes.substr(at));
          at = bytes.size();
          break;
        case State::chunk: {
          const std::size_t count = std::min<std::size_t>(left_, bytes.size() - at);
          body.append(bytes.substr(at, count));
          left_ -= count;
          at += count;
          if (left_ == 0) go(State::chunk_end);
          break;
        }
        default: feed_line(bytes[at++]); break;
      }
    }
    return at;
  }

  // The connection ended in order. True where that is the answer's end.
  bool on_fin() {
    if (state != State::until_close) return state == State::done;
    state = State::done;
    return true;
  }

  std::string_view field(std::string_view name) const {
    const std::string start = "\r\n" + std::string(name) + ": ";
    const std::size_t at = head.find(start);
    if (at == std::string::npos) return {};
    const std::size_t from = at + start.size();
    return std::string_view(head).substr(from, head.find("\r\n", from) - from);
  }
  std::size_t count(std::string_view name) const {
    const std::string start = "\r\n" + std::string(name) + ": ";
    std::size_t found = 0;
    for (std::size_t at = head.find(start); at != std::string::npos; at = head.find(start, at + 2)) ++found;
    return found;
  }

 private:
  void go(State next) {
    state = next;
    line_.clear();
  }
  void fail(const char* reason) {
    state = State::broken;
    why = reason;
  }

  std::size_t feed_head(std::string_view bytes) {
    const std::size_t before = head.size();
    head.append(bytes);
    const std::size_t end = head.find("\r\n\r\n", before < 3 ? 0 : before - 3);
    if (end == std::string::npos) {
      if (head.size() > 100'000) fail("a head without an end");
      return bytes.size();
    }
    head.resize(end + 4);
    const std::size_t taken = head.size() - before;
    read_head();
    return taken;
  }

  void read_head() {
    if (head.compare(0, 9, "HTTP/1.1 ") != 0 || head.size() < 15 || head[12] != ' ') return fail("no status line");
    status = 0;
    for (std::size_t i = 9; i < 12; ++i) {
      if (head[i] < '0' || head[i] > '9') return fail("no status");
      status = static_cast<std::uint16_t>(status * 10 + (head[i] - '0'));
    }
    if (!lines_are_well()) return fail("a header line that is none");
    const std::size_t lengths = count("Content-Length");
    const std::size_t codings = count("Transfer-Encoding");
    if (lengths + codings > 1) return fail("more than one framing");
    if (count("Connection") > 1) return fail("Connection twice");
    close = field("Connection") == "close";
    if (status < 200) {
      if (lengths + codings > 0) return fail("an interim answer with a body");
      state = State::done;
    } else if (status == 204 || status == 304) {
      if (lengths + codings > 0) return fail("a body where none may be");
      state = State::done;
    } else if (codings == 1) {
      if (field("Transfer-Encoding") != "chunked") return fail("a coding that is not chunked");
      go(State::chunk_size);
    } else if (lengths == 1) {
      left_ = 0;
      for (const char c : field("Content-Length")) {
        if (c < '0' || c > '9') return fail("a length that is no number");
        left_ = left_ * 10 + static_cast<std::size_t>(c - '0');
      }
      state = left_ == 0 ? State::done : State::length;
    } else {
      close = true;
      state = State::until_close;
    }
  }

  bool lines_are_well() const {
    std::size_t at = head.find("\r\n") + 2;
    while (at + 2 < head.size()) {
      const std::size_t end = head.find("\r\n", at);
      const std::size_t colon = head.find(": ", at);
      if (colon == std::string::npos || colon >= end || colon == at) return false;
      for (std::size_t i = at; i < end; ++i) {
        const auto c = static_cast<unsigned char>(head[i]);
        if (c < 0x20 || c == 0x7f || (i < colon && (c == ' ' || c == ':'))) return false;
      }
      at = end + 2;
    }
    return true;
  }

  // The lines of the chunked coding, byte by byte.
  void feed_line(char c) {
    line_ += c;
    if (line_.size() > 100) return fail("a chunk's line without an end");
    if (c != '\n') return;
    if (line_.size() < 2 || line_[line_.size() - 2] != '\r') return fail("a chunk's line that does not end in CRLF");
    const std::string_view text(line_.data(), line_.size() - 2);
    if (state == State::chunk_end || state == State::trailer) {
      if (!text.empty()) return fail("text where a chunk's end is due");
      if (state == State::trailer) return go(State::done);
      return go(State::chunk_size);
    }
    if (text.empty() || text.size() > 8 || text.find_first_not_of("0123456789abcdef") != std::string_view::npos) {
      return fail("a chunk size that is none");
    }
    left_ = std::strtoul(std::string(text).c_str(), nullptr, 16);
    go(left_ == 0 ? State::trailer : State::chunk);
  }

  std::size_t left_ = 0;
  std::string line_;
};

}  // namespace nexus::sim
