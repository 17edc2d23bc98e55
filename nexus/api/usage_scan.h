// usage_scan.h
// Owns:      the token counts of a response body while it passes, and the number of its events, its errors and its end
//            mark if it is a stream, of events or of lines; removing the extra usage event that Nexus asked for from a
//            stream whose client did not ask for it. An event that holds more than such an event does loses only its
//            `usage`, and gets a choice if it has none: such a client reads the first choice of each event.
// Promises:  counts and output are the same however the bytes are cut; a plain body is never held or changed; a stream
//            holds only an event that may be the extra one, up to kHeldEventBytes; memory is allocated only for what is
//            cut between two pieces.
// Leaves:    which bodies to scan to response.h; lines to sse.h; members to member_scan.h; counts to json_reader.h.
// Threads:   a scan belongs to one thread.
// Tested by: tests/usage_scan_test.cpp, tests/fuzz/usage.h
#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "nexus/api/json_reader.h"
#include "nexus/api/member_scan.h"
#include "nexus/api/sse.h"
#include "nexus/base/buffer.h"
#include "nexus/base/limits.h"

namespace nexus {

class UsageScan {
 public:
  enum class Kind : std::uint8_t { none, json, event_stream, lines };
  static constexpr bool is_stream(Kind kind) { return kind >= Kind::event_stream; }
  // A choice that says nothing, for an empty list of choices.
  static constexpr std::string_view kEmptyChoice = R"({"index":0,"delta":{},"finish_reason":null})";

  // The bytes to send to the client now, in this order; the views last until the next call.
  struct Out {
    std::string_view held;
    std::string_view piece;
  };

  UsageScan() = default;

  // A new body begins; `shape` may be null if `kind` is none. Only an event stream may remove_usage_event.
  void start(Kind kind, const ResponseShape* shape, bool remove_usage_event) {
    assert(kind == Kind::event_stream || !remove_usage_event);
    assert(kind == Kind::none || shape != nullptr);
    *this = UsageScan(shape);
    kind_ = kind;
    removing_ = remove_usage_event;
    if (shape != nullptr) end_mark_ = shape->end_data;
  }

  // Reads a piece of the body, and may compact it in place; behind it kPaddingBytes must be readable. False: bytes are
  // lost for lack of memory, and the body must end. `last`: the body ends with this piece, and no byte stays held.
  bool feed(BlockPool& pool, JsonReader& reader, char* data, std::size_t bytes, bool last, Out& out) {
    released_.clear();
    out = {{}, {data, bytes}};
    bool complete = true;
    switch (kind_) {
      case Kind::none: break;
      case Kind::json:
        read_text(pool, reader, data, data + bytes);
        if (last) take_counts(pool, reader);
        break;
      case Kind::event_stream: complete = feed_events(events_in_, pool, reader, data, bytes, last, out); break;
      case Kind::lines: complete = feed_events(lines_, pool, reader, data, bytes, last, out); break;
    }
    if (last) capture_.clear();
    return complete;
  }

  // Reads a body that came whole: faster than feed(). It passes unchanged.
  void read_whole(JsonReader& reader, std::string_view body) {
    usage_ = read_answer(reader, *shape_, body);
    out_of_memory_ = reader.out_of_memory();
  }

  // The body has ended, and what feed() told was sent: no memory is held.
  void drop_memory() {
    held_.clear();
    released_.clear();
    capture_.clear();
  }

  Usage usage() const { return shape_ == nullptr ? usage_ : usage_.added_up(*shape_); }
  bool told_usage() const { return usage_.told(); }
  // The hash of the id that the response has told since the last call; 0: none.
  std::uint64_t take_id() { return std::exchange(id_, 0); }
  std::uint64_t events() const { return events_; }  // complete ones that carry data or tell an error
  bool in_line() const { return kind_ != Kind::lines || lines_.in_line(); }  // false: behind a complete line
  bool told_error() const { return told_error_; }                            // one of them
  bool ended_well() const { return ended_well_; }                            // one of them was the end mark
  std::size_t held_bytes() const { return held_.size(); }
  bool out_of_memory() const { return out_of_memory_; }  // counts may be missing

 private:
  explicit UsageScan(const ResponseShape* shape) : shape_(shape), members_(shape) {}

  // The state of a piece: [start, write) is to be sent, and so are the bytes from `run` on, except for an event that is
  // removed or held.
  struct Pass {
    char* start;
    char* write;
    const char* run;
    const char* event;  // where the bytes of the undecided event begin in this piece
    void keep_up_to(const char* to) {
      const auto bytes = static_cast<std::size_t>(to - run);
      if (write != run) std::memmove(write, run, bytes);
      write += bytes;
      run = to;
    }
  };
  // The part of an event that is its `usage` and one comma, as offsets from the event's first byte.
  struct UsageMember {
    std::size_t last_mark = 0;  // behind the last `{` or comma between members
    std::size_t from = 0;
    std::size_t to = 0;         // 0: not known yet
    std::size_t no_choice = 0;  // the `]` of an empty list of choices; 0: there is none
    // `mark` ends at `end`: the first one behind `usage` ends the part. If that is the `}`, the comma before goes.
    void mark(std::size_t end, char mark) {
      if (to == 0) {
        const std::size_t back = mark == '}' ? 1 : 0;
        from -= std::min(back, from);
        to = end - back;
      }
      last_mark = end;
    }
  };
  static constexpr std::size_t kLineBytes = 8;  // at most, of a `data` line in addition to its text
  static constexpr std::size_t kNoMark = SIZE_MAX;

  template <class Reader>  // an SseReader or a LineReader
  bool feed_events(Reader& lines, BlockPool& pool, JsonReader& reader, char* data, std::size_t bytes, bool last,
                   Out& out) {
    const char* at = data;
    const char* end = data + bytes;
    Pass pass{data, data, data, data};
    std::string_view text;
    for (;;) {
      if (lines.between_events()) at = skip_other_events(at, end);
      switch (lines.next(at, end, text)) {
        case SseReader::Step::need_more: return park(lines, pool, reader, pass, end, last, out);
        case SseReader::Step::event_begins: begin_event(pass, at); break;
        case SseReader::Step::data_begins: begin_data_line(pool); break;
        case SseReader::Step::data:
          match_end_mark(text);
          event_bytes_ += text.size();
          read_text(pool, reader, text.data(), text.data() + text.size(), &pass);
          break;
        case SseReader::Step::event_ends: end_event(pool, reader, pass, at, out); break;
      }
    }
  }

  // Skips whole events of one data line without usage, error and end mark: nearly all of them. Where the mark is a
  // member of the data, only the event's name tells that it does not have it.
  const char* skip_other_events(const char* at, const char* end) {
    if (end_mark_.empty() && !shape_->named) return at;
    const auto shortest =
        static_cast<std::ptrdiff_t>(kLineBytes + end_mark_.size() + 4);  // a shorter one may be the mark
    while (at < end) {
      if (*at == '\n' || *at == '\r') {  // of the blank line before
        ++at;
        continue;
      }
      const char* behind = find_event_end(at, end);
      if (behind == nullptr || behind - at <= shortest || !is_plain(at, behind) || may_tell(at, behind)) break;
      at = behind;
      events_ += 1;
    }
    return at;
  }

  // True for an event that begins with its data, or with a name that marks neither an error nor the end, and then its
  // data with the same name in it.
  bool is_plain(const char* at, const char* end) const {
    if (!shape_->named) return std::string_view(at, 5) == "data:";
    std::string_view event(at, static_cast<std::size_t>(end - at));
    if (!take(event, "event: ")) return false;
    const std::string_view name = event.substr(0, event.find_first_of("\r\n"));
    if (name == "error" || name.ends_with(".failed") || shape_->end.find(name) != std::string_view::npos) return false;
    event.remove_prefix(name.size());
    take(event, "\r");
    take(event, "\n");
    if (!take(event, "data: {\"type\":")) return false;
    take(event, " ");
    if (!take(event, "\"") || !take(event, name) || !take(event, "\"")) return false;
    return !shape_->has_ids || event.find("\"id\"") == std::string_view::npos;
  }

  static bool take(std::string_view& text, std::string_view part) {
    if (!text.starts_with(part)) return false;
    text.remove_prefix(part.size());
    return true;
  }

  // True if [at, end) contains `"usage"` or `"error"` that is not followed by `: null`, or a line that begins with `e`.
  static bool may_tell(const char* at, const char* end) {
    static constexpr std::string_view kUsage = "\"usage\"", kError = "\"error\"";
    static_assert(kUsage.size() == kError.size());
    constexpr std::size_t size = kUsage.size();
    if (end - at < static_cast<std::ptrdiff_t>(size)) return false;
    for (const char* last = end - size; at <= last; at += kLaneBytes) {
      const Lane first(at), second(at + 1);
      const Lane second_e = second.equal('e');
      const Lane key_like = first.equal('"') & (second.equal('u') | second_e) & Lane(at + size - 1).equal('"');
      const Lane hits = key_like | (first.equal('\n') & second_e);
      for (unsigned mask = before_end(hits.mask(), at, last + 1); mask != 0; mask &= mask - 1) {
        const char* const found = at + std::countr_zero(mask);
        const std::string_view key(found, size);
        if (*found == '\n') return true;
        if ((key == kUsage || key == kError) && !null_follows(found + size, end)) return true;
      }
    }
    return false;
  }

  // A part of an event's data.
  void match_end_mark(std::string_view text) {
    const std::string_view rest = end_mark_.substr(std::min(mark_bytes_, end_mark_.size()));
    mark_bytes_ = mark_bytes_ <= end_mark_.size() && rest.starts_with(text) ? mark_bytes_ + text.size() : kNoMark;
  }

  static bool null_follows(const char* at, const char* end) {
    while (at < end && *at == ' ') ++at;
    if (at == end || *at++ != ':') return false;
    while (at < end && *at == ' ') ++at;
    return at < end && *at == 'n';
  }

  void begin_event(Pass& pass, const char* at) {
    members_ = MemberScan(shape_);
    counts_.reset();
    capture_lost_ = false;
    event_bytes_ = mark_bytes_ = 0;
    usage_member_ = UsageMember();
    undecided_ = removing_;
    pass.event = at;
  }

  void begin_data_line(BlockPool& pool) {
    if (event_bytes_ > 0) {
      mark_bytes_ = kNoMark;
      if (members_.in_usage()) capture(pool, "\n");
      members_.line_break();
    }
    event_bytes_ += kLineBytes;
  }

  void end_event(BlockPool& pool, JsonReader& reader, Pass& pass, const char* behind, Out& out) {
    take_counts(pool, reader);
    const bool error = members_.is_error() || events_in_.error_line();
    events_ += error || event_bytes_ > 0 ? 1 : 0;
    told_error_ |= error;
    ended_well_ |= members_.is_end() || (mark_bytes_ > 0 && mark_bytes_ == end_mark_.size());
    capture_.clear();
    if (!std::exchange(undecided_, false)) return;
    if (!is_extra_event()) return release(out);
    if (members_.holds_more()) return cut_usage(pass, out);
    pass.keep_up_to(pass.event);
    pass.run = behind;
    held_.clear();
  }

  // Puts a choice that says nothing into the empty list of choices. It takes a part of the room of `usage`.
  [[gnu::cold]] void add_choice(const Pass& pass) {
    auto& [last_mark, from, to, at] = usage_member_;
    if (at == 0 || to - from <= kEmptyChoice.size()) return;
    const std::size_t held = held_.size();
    char* const event = pass.start + (pass.event - pass.start);
    const auto byte = [&](std::size_t i) -> char& { return i < held ? held_.data()[i] : event[i - held]; };
    std::size_t put = at;
    if (at < from) {
      for (std::size_t i = from; i > at; --i) byte(i - 1 + kEmptyChoice.size()) = byte(i - 1);
      from += kEmptyChoice.size();
    } else {
      for (std::size_t i = to; i < at; ++i) byte(from++) = byte(i);
      put = from;
      from += kEmptyChoice.size();
      to = at;
    }
    for (const char c : kEmptyChoice) byte(put++) = c;
  }

  // Cuts `usage` out of the event: out of its held part, out of its part in this piece, or out of both.
  void cut_usage(Pass& pass, Out& out) {
    add_choice(pass);
    const std::size_t held = held_.size(), from = usage_member_.from, to = usage_member_.to;
    const std::size_t held_from = std::min(from, held), held_to = std::min(to, held);
    if (held > 0) std::memmove(held_.data() + held_from, held_.data() + held_to, held - held_to);
    held_.truncate(held - (held_to - held_from));
    pass.keep_up_to(pass.event + (std::max(from, held) - held));
    pass.run = pass.event + (std::max(to, held) - held);
    release(out);
  }

  // The piece is read: holds the open event while it may be the extra one, and releases everything else.
  template <class Reader>
  bool park(Reader& lines, BlockPool& pool, JsonReader& reader, Pass& pass, const char* end, bool last, Out& out) {
    if (last && lines.finish()) end_event(pool, reader, pass, end, out);
    if (undecided_ && (is_ruled_out() || (lines.event_complete() && !members_.is_usage_event()))) {
      undecided_ = false;
      release(out);
    }
    pass.keep_up_to(undecided_ ? pass.event : end);
    out.piece = {pass.start, static_cast<std::size_t>(pass.write - pass.start)};
    return !undecided_ || held_.append(pool, {pass.event, static_cast<std::size_t>(end - pass.event)});
  }

  bool is_ruled_out() const { return members_.is_other_event() || event_bytes_ > kHeldEventBytes; }
  bool is_extra_event() const { return members_.is_usage_event() && !is_ruled_out(); }

  void release(Out& out) {
    if (held_.empty()) return;
    std::swap(held_, released_);
    out.held = released_.view();
  }

  // Reads JSON text and the counts in it. `pass`: of an event.
  void read_text(BlockPool& pool, JsonReader& reader, const char* at, const char* end, const Pass* pass = nullptr) {
    const char* usage_from = at;  // where the part of `usage` in this piece begins
    for (;;) {
      switch (members_.next(at, end)) {
        case MemberScan::Step::usage_begins:
          usage_from = at - 1;
          begin_counts(pool);
          usage_member_.from = usage_member_.last_mark;
          break;
        case MemberScan::Step::usage_ends: {
          const std::string_view part(usage_from, static_cast<std::size_t>(at - usage_from));
          shape_->bare ? capture(pool, part) : read_counts(pool, reader, part);
          if (kind_ == Kind::json && !shape_->bare) take_counts(pool, reader);  // the rest may never come
          usage_member_.to = 0;
          break;
        }
        case MemberScan::Step::between_members:
          if (pass != nullptr && undecided_)
            usage_member_.mark(held_.size() + static_cast<std::size_t>(at - pass->event), at[-1]);
          break;
        case MemberScan::Step::no_choice:
          if (pass != nullptr && undecided_)
            usage_member_.no_choice = held_.size() + static_cast<std::size_t>(at - pass->event) - 1;
          break;
        case MemberScan::Step::need_more:
          if (members_.in_usage()) capture(pool, {usage_from, static_cast<std::size_t>(end - usage_from)});
          return;
      }
    }
  }

  // A `usage` object begins, or one of the counts that stand in the response itself: these are put together.
  void begin_counts(BlockPool& pool) {
    if (!shape_->bare) {
      capture_.clear();
      capture_lost_ = false;
      return;
    }
    capture(pool, capture_.empty() ? "{\"" : ",\"");
    capture(pool, members_.key());
    capture(pool, "\":");
  }

  // The event or the response has ended: what it told counts, unless it is no JSON object.
  void take_counts(BlockPool& pool, JsonReader& reader) {
    if (members_.id() != 0) id_ = members_.id();
    if (shape_->bare && !capture_.empty()) read_counts(pool, reader, "}");
    if (counts_ && (kind_ == Kind::json || members_.is_object())) usage_.take(*counts_, shape_->adds_up);
    counts_.reset();
  }

  // Keeps a part of a `usage` that is cut. Without memory the body goes on, but is not counted.
  void capture(BlockPool& pool, std::string_view part) {
    if (capture_lost_) return;
    if (capture_.size() + part.size() > kUsageBytes) {
      capture_lost_ = true;
    } else if (!capture_.append(pool, part)) {
      capture_lost_ = out_of_memory_ = true;
    }
    if (capture_lost_) capture_.clear();
  }

  // `object`: the rest of the text of the counts.
  void read_counts(BlockPool& pool, JsonReader& reader, std::string_view object) {
    if (capture_lost_ || !capture_.empty()) {
      capture(pool, object);
      object = capture_.view();
    }
    const bool readable = !capture_lost_ && object.size() <= kUsageBytes;
    counts_ = readable ? read_usage(reader, *shape_, object) : Usage{};
    capture_.clear();
  }

  Kind kind_ = Kind::none;
  bool removing_ = false;
  bool undecided_ = false;     // the open event may be the extra one: its bytes are held
  bool capture_lost_ = false;  // the open `usage` is too large, or there was no memory for it
  bool out_of_memory_ = false;
  bool told_error_ = false;
  bool ended_well_ = false;
  std::uint64_t events_ = 0;
  std::uint64_t id_ = 0;
  std::string_view end_mark_;
  std::size_t mark_bytes_ = 0;   // of the end mark that the open event's data is so far, or kNoMark
  std::size_t event_bytes_ = 0;  // of the open event's `data` lines
  UsageMember usage_member_;     // of the open event
  const ResponseShape* shape_ = nullptr;
  SseReader events_in_;  // of an event stream
  LineReader lines_;     // of newline-delimited JSON
  MemberScan members_;
  std::optional<Usage> counts_;  // of the open event, or of the response
  Usage usage_;
  Buffer held_;      // the open event's bytes from earlier pieces
  Buffer released_;  // bytes that were held, until the next call
  Buffer capture_;   // a `usage` that is cut between pieces
};

}  // namespace nexus
