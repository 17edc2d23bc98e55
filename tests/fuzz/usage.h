// usage.h
// Owns:     the fuzz target of the usage scan over event streams and plain bodies.
// Promises: any cut gives the same bytes and counts; a plain body passes unchanged; only events that have a usage, no
//           choice and nothing else that matters are removed from a stream, and those that hold more lose their usage
//           alone; the counts equal those that plain_json.h reads.
// Leaves:   the limits on held bytes to usage_scan_test.cpp.
// Threads:  one.
#pragma once

#include <cmath>
#include <cstdlib>

#include "nexus/api/usage_scan.h"
#include "tests/fuzz/body.h"
#include "tests/fuzz/fuzz.h"

namespace fuzz {

struct UsageRun {
  std::string out;
  std::int64_t prompt_tokens = -1, completion_tokens = -1;
  bool removed = false;
  bool operator==(const UsageRun&) const = default;
};

inline UsageRun run_usage(std::string_view text, nexus::UsageScan::Kind kind, bool removing, const Ends& ends) {
  static nexus::BlockPool pool;
  UsageRun run;
  {
    nexus::UsageScan scan;
    scan.start(kind, &nexus::row_of(nexus::Dialect::openai).response, removing);
    nexus::UsageScan::Out out;
    for (const std::string& bytes : pieces_of(text, ends)) {
      Guarded piece(bytes, nexus::kPaddingBytes);
      check(scan.feed(pool, json_reader(), piece.data(), bytes.size(), false, out), "no memory");
      run.out.append(out.held).append(out.piece);
    }
    check(scan.feed(pool, json_reader(), nullptr, 0, true, out), "no memory");
    run.out.append(out.held).append(out.piece);
    check(scan.held_bytes() == 0, "bytes stayed behind");
    run.prompt_tokens = scan.usage().prompt_tokens;
    run.completion_tokens = scan.usage().completion_tokens;
    run.removed = run.out.size() < text.size();
  }
  check(pool.taken_bytes() == 0, "a block stayed away");
  return run;
}

// The events by WHATWG HTML 9.2.6: their data, and if they have other fields.
struct PlainEvent {
  std::string data;
  bool others = false;
  bool has_data = false;
  bool operator==(const PlainEvent&) const = default;
};

inline std::vector<PlainEvent> plain_events(std::string_view text) {
  std::vector<PlainEvent> events;
  PlainEvent event;
  bool open = false;
  if (text.substr(0, 3) == "\xef\xbb\xbf") text.remove_prefix(3);
  while (!text.empty()) {
    const std::size_t end = std::min(text.find_first_of("\r\n"), text.size());
    const std::string_view line = text.substr(0, end);
    const bool both = text.substr(end, 2) == "\r\n";
    text.remove_prefix(std::min(text.size(), end + (both ? 2u : 1u)));
    if (line.empty()) {
      if (open) events.push_back(event);
      event = {};
      open = false;
      continue;
    }
    if (line[0] == ':' && !open) continue;
    open = true;
    const std::string_view name = line.substr(0, line.find(':'));
    std::string_view value = line.substr(std::min(line.size(), name.size() + 1));
    if (value.substr(0, 1) == " ") value.remove_prefix(1);
    if (name == "data") {
      if (event.has_data) event.data += '\n';
      event.has_data = true;
      event.data += value;
    } else {
      event.others = true;
    }
  }
  if (open) events.push_back(event);
  return events;
}

inline std::int64_t count_of(const plain_json::Value& usage, std::string_view name) {
  std::int64_t count = -1;
  for (const auto& [key, value] : usage.members) {
    if (key != name || value.kind != Kind::number || value.text.size() > 18) continue;
    const double number = std::strtod(value.text.c_str(), nullptr);
    const bool whole = number >= 0 && number == std::floor(number);
    if (number > static_cast<double>(nexus::kMaxTokenCount)) continue;
    if (value.text.find_first_not_of("0123456789") == std::string::npos) {
      count = std::stoll(value.text);
    } else if (whole) {
      count = static_cast<std::int64_t>(number);
    }
  }
  return count;
}

// The counts of the last `usage` that is an object, or nothing.
inline bool counts_of(const plain_json::Value& object, UsageRun& wanted) {
  const plain_json::Value* usage = nullptr;
  for (const auto& [key, value] : object.members) {
    if (key == "usage" && value.kind == Kind::object) usage = &value;
  }
  if (usage == nullptr) return false;
  wanted.prompt_tokens = count_of(*usage, "prompt_tokens");
  wanted.completion_tokens = count_of(*usage, "completion_tokens");
  return true;
}

enum class Fate : std::uint8_t { passes, loses_usage, goes };

// `usages`: the objects of that name.
inline Fate fate_of(const plain_json::Value& object, int& usages) {
  constexpr std::string_view kKnown =
      " choices created id model object obfuscation provider service_tier system_fingerprint usage ";
  bool choice = false, more = false;
  usages = 0;
  for (const auto& [key, value] : object.members) {
    if (value.kind == Kind::null) continue;
    choice |= key == "choices" && (value.kind != Kind::list || !value.items.empty());
    usages += key == "usage" && value.kind == Kind::object ? 1 : 0;
    more |= key.find(' ') != std::string::npos || kKnown.find(" " + key + " ") == std::string_view::npos;
  }
  if (choice || usages == 0) return Fate::passes;
  return more ? Fate::loses_usage : Fate::goes;
}

// The members and their values as they stand in `data`, but for the `usage` that is an object.
inline std::string members_without_usage(const std::string& data) {
  const auto object = plain_json::read(data);
  if (!object || object->kind != Kind::object) return data;
  std::string text;
  for (const auto& [key, value] : object->members) {
    if (key == "usage" && value.kind == Kind::object) continue;
    text += key + "\n" + data.substr(value.at, value.bytes) + "\n";
  }
  return text;
}

// The scan does not decode escapes in keys, and ignores text that is not JSON and large events.
inline bool is_simple(std::string_view text) { return text.find('\\') == std::string_view::npos && text.size() < 8192; }

inline void compare_json(std::string_view text, const UsageRun& run) {
  check(run.out == text, "a plain body was changed");
  const auto object = plain_json::read(text);
  if (!object || object->kind != Kind::object || !is_simple(text)) return;
  UsageRun wanted;
  counts_of(*object, wanted);
  check(run.prompt_tokens == wanted.prompt_tokens && run.completion_tokens == wanted.completion_tokens, "the counts");
}

inline void compare_events(std::string_view text, const UsageRun& run, bool removing) {
  if (!removing) check(run.out == text, "a stream was changed");
  if (!is_simple(text)) return;
  UsageRun wanted;
  const std::vector<PlainEvent> out = plain_events(run.out);
  std::size_t at = 0;
  for (PlainEvent event : plain_events(text)) {
    const auto object = plain_json::read(event.data);
    if (event.data.find('{') != std::string::npos && !object) return;
    const bool is_object = object && object->kind == Kind::object;
    if (is_object) counts_of(*object, wanted);
    int usages = 0;
    const Fate fate = removing && is_object ? fate_of(*object, usages) : Fate::passes;
    if (fate == Fate::goes) continue;
    check(at < out.size(), "an event is missing");
    PlainEvent got = out[at++];
    if (fate == Fate::loses_usage) {
      if (usages > 1) continue;  // only one of them is cut out
      check(plain_json::read(got.data).has_value(), "an event is no JSON any more");
      check(got.data.find("\"usage\"") == std::string::npos || got.data.size() < event.data.size(), "nothing was cut");
      if (const std::size_t at = got.data.find(nexus::UsageScan::kEmptyChoice); at != std::string::npos)
        got.data.erase(at, nexus::UsageScan::kEmptyChoice.size());
      event.data = members_without_usage(event.data);
      got.data = members_without_usage(got.data);
      event.others = got.others;  // lines between the cut ones go with them
    }
    check(got == event, "another event went on than should");
  }
  check(at == out.size(), "more events went on than should");
  check(run.prompt_tokens == wanted.prompt_tokens && run.completion_tokens == wanted.completion_tokens, "the counts");
}

// The first byte selects the kind of body.
inline void usage(std::string_view input) {
  if (input.empty()) return;
  const bool json = input[0] == 'j';
  const bool removing = !json && input[0] != 'e';
  const auto kind = json ? nexus::UsageScan::Kind::json : nexus::UsageScan::Kind::event_stream;
  const std::string_view text = input.substr(1);
  Draw draw(input);
  const auto ways = cuts_of(text.size(), draw);
  const UsageRun whole = run_usage(text, kind, removing, ways[0]);
  for (const auto& way : ways) check(run_usage(text, kind, removing, way) == whole, "a cut changes what goes on");
  if (json) {
    compare_json(text, whole);
  } else {
    compare_events(text, whole, removing);
  }
}

}  // namespace fuzz
