// body_framing.h
// Owns:      the framing of a response body: removing the backend's, adding the client's.
// Promises:  payload bytes pass unchanged and in order; the client gets an end of body only if the backend sent one;
//            bytes behind the end are never taken for the body.
// Leaves:    sockets and decisions to exchange.h, token counts to usage_scan.h.
// Threads:   parts of one exchange.
// Tested by: tests/hostile_answers_test.cpp, tests/worker_test.cpp
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "nexus/base/text.h"
#include "nexus/http/chunked.h"
#include "nexus/http/head_parser.h"

namespace nexus {

class BodyDecoder {
 public:
  struct Piece {
    char* data = nullptr;
    std::size_t bytes = 0;
    bool done = false;
    bool failed = false;  // the framing is broken
    bool excess = false;  // there are bytes behind the end: the connection must not be used again
  };

  void start(const Framing& framing) {
    framing_ = framing;
    decoder_ = ChunkedDecoder();
  }

  Piece feed(char* data, std::size_t bytes) {
    Piece piece{data, bytes, false, false, false};
    switch (framing_.kind) {
      case Framing::Kind::none:  // a length of 0
      case Framing::Kind::length:
        piece.bytes = static_cast<std::size_t>(std::min<std::uint64_t>(bytes, framing_.length));
        framing_.length -= piece.bytes;
        piece.done = framing_.length == 0;
        piece.excess = bytes > piece.bytes;
        break;
      case Framing::Kind::chunked: {
        const ChunkedDecoder::Result result = decoder_.decode(data, bytes);
        piece.bytes = result.decoded;
        piece.done = result.status == ChunkedDecoder::Status::done;
        piece.failed = result.status == ChunkedDecoder::Status::failed;
        piece.excess = piece.done && result.consumed < bytes;
        break;
      }
      case Framing::Kind::until_close: break;
    }
    return piece;
  }

  // True if the body ends where the connection ends.
  bool ends_with_connection() const { return framing_.kind == Framing::Kind::until_close; }

 private:
  Framing framing_;
  ChunkedDecoder decoder_;
};

// One write to the client: a head, and up to two parts of payload in the client's framing.
class ClientWrite {
 public:
  void add(std::string_view bytes) {
    if (bytes.empty()) return;
    assert(count_ < parts_.size());
    parts_[count_++] = {const_cast<char*>(bytes.data()), bytes.size()};
    total_bytes_ += bytes.size();
  }

  void add_payload(bool chunked, std::string_view first, std::string_view second) {
    const std::size_t bytes = first.size() + second.size();
    if (bytes == 0) return;
    if (chunked) {
      assert(size_line_bytes_ == 0);
      const Digits digits(bytes, 16);
      size_line_bytes_ = digits.view().copy(size_line_.data(), digits.view().size());
      size_line_[size_line_bytes_++] = '\r';
      size_line_[size_line_bytes_++] = '\n';
      add({size_line_.data(), size_line_bytes_});
    }
    add(first);
    add(second);
    newest_ = second;
    if (chunked) add("\r\n");
    payload_bytes_ += bytes;
  }

  void add_end(bool chunked) {
    if (chunked) add("0\r\n\r\n");
  }

  // Copies small parts into one, because a plain send costs less than a gathered one.
  std::span<iovec> parts() {
    if (count_ > 1 && total_bytes_ <= small_.size()) {
      char* at = small_.data();
      for (std::size_t i = 0; i < count_; ++i) {
        std::memcpy(at, parts_[i].iov_base, parts_[i].iov_len);
        at += parts_[i].iov_len;
      }
      parts_[0] = {small_.data(), total_bytes_};
      count_ = 1;
    }
    return {parts_.data(), count_};
  }
  std::size_t payload_bytes() const { return payload_bytes_; }
  std::string_view newest() const { return newest_; }  // the payload that came with the last piece, as it lies there

 private:
  std::array<iovec, 8> parts_;
  std::size_t count_ = 0;
  std::array<char, 20> size_line_;
  std::size_t size_line_bytes_ = 0;
  std::size_t payload_bytes_ = 0;
  std::string_view newest_;
  std::size_t total_bytes_ = 0;
  std::array<char, 2048> small_;
};

}  // namespace nexus
