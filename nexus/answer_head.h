// answer_head.h
// Owns:     the head of a backend's answer while it comes: its fields, and the bytes of one that comes in pieces.
// Promises: nothing is kept where the head comes in one read; interim answers are read past, up to a bound; what it
//           holds goes back with clear().
// Leaves:   HTTP's grammar to http.h, what the head means to exchange.h.
// Threads:  parts of one exchange.
#pragma once

#include <string_view>

#include "bytes.h"
#include "fields.h"
#include "heads.h"
#include "http.h"
#include "spares.h"

namespace nexus {

constexpr std::size_t kMaxAnswerHeadBytes = 64u << 10;
constexpr std::uint32_t kMaxInterimAnswers = 16;  // 1xx heads before the final one

class AnswerHead {
 public:
  enum class Status : std::uint8_t { need_more, done, failed, out_of_memory };

  struct Result {
    Status status = Status::need_more;
    std::string_view why;  // it failed: a constant text
    ResponseHead head;     // where done; it begins at `data`, the body's first bytes stand behind it
    char* data = nullptr;
    std::size_t bytes = 0;
  };

  // Reads what came; where done, the fields last until clear().
  Result feed(Spares<FieldTable>& tables, BlockPool& blocks, char* data, std::size_t bytes) {
    if (!fields_) {
      fields_ = tables.take();
      if (!fields_) return failed(Status::out_of_memory);
      reader_.start(fields_.get());
    }
    if (!partial_.empty()) {
      if (!partial_.append(blocks, {data, bytes})) return failed(Status::out_of_memory);
      data = partial_.data();
      bytes = partial_.size();
    }
    for (;;) {
      Result told;
      const HeadResult result = reader_.feed(data, bytes, told.head);
      if (result.status == HeadResult::Status::failed ||
          (result.status == HeadResult::Status::need_more && bytes > kMaxAnswerHeadBytes) ||
          result.head_bytes > kMaxAnswerHeadBytes) {
        return failed(Status::failed, result.why.empty() ? "its head is too large" : result.why);
      }
      if (result.status == HeadResult::Status::need_more) return keep_partial(blocks, data, bytes);
      if (told.head.status >= 200) {
        told.status = Status::done;
        told.data = data;
        told.bytes = bytes;
        return told;
      }
      // RFC 9110 15.2: an interim answer is read past. 101 was not asked for.
      if (told.head.status == 101 || ++interim_answers_ > kMaxInterimAnswers) {
        return failed(Status::failed, "an interim answer that was not asked for");
      }
      data += result.head_bytes;
      bytes -= result.head_bytes;
      reader_.start(fields_.get());
      if (bytes == 0) {
        partial_.clear();
        return {};
      }
    }
  }

  HeadView view(const Result& result) const { return {result.data, fields_.get(), result.head.head_bytes}; }

  void clear() {
    fields_.give_back();
    partial_.clear();
    interim_answers_ = 0;
  }

 private:
  static Result failed(Status status, std::string_view why = {}) {
    Result result;
    result.status = status;
    result.why = why;
    return result;
  }

  // Heads come whole in the first read but for slow or strange backends: the rest is kept only then.
  Result keep_partial(BlockPool& blocks, const char* data, std::size_t bytes) {
    if (partial_.empty()) {
      if (!partial_.append(blocks, {data, bytes})) return failed(Status::out_of_memory);
    } else {
      partial_.consume(partial_.size() - bytes);  // interim answers before it
    }
    return {};
  }

  ResponseReader reader_;
  Spares<FieldTable>::Loan fields_;
  Buffer partial_;
  std::uint32_t interim_answers_ = 0;
};

// When the backend wants to be asked again, if it says so in seconds.
inline std::optional<Ns> retry_after_of(const HeadView& head) {
  const FieldRow* row = find_field(*head.fields, Field::retry_after);
  if (row == nullptr) return std::nullopt;
  const auto seconds = parse_decimal(value_of(head.base, *row));
  if (!seconds) return std::nullopt;  // a date: the host's clock may not be the backend's
  return static_cast<Ns>(std::min<std::uint64_t>(*seconds, 3600)) * kSecond;
}

}  // namespace nexus
