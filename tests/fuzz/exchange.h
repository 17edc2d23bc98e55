// exchange.h
// Owns:     the fuzz targets of whole exchanges: a client's bytes, and a backend's, through a gateway in memory.
// Promises: any cut gives the same story; Nexus forwards and counts exactly the messages that the RFC reads in the
//           input; an edited body is the JSON that was wanted; no truncated response looks complete.
// Leaves:   faults of the network to the simulator.
// Threads:  one.
#pragma once

#include "tests/fuzz/fuzz.h"
#include "tests/hostile/gateway.h"
#include "tests/hostile/requests.h"
#include "tests/hostile/story.h"
#include "tests/lib/plain_json.h"

namespace fuzz {

// ---- a client's bytes ----

struct ClientStory {
  std::vector<int> statuses;
  std::vector<std::string> bodies;  // as the backend received them
  bool kept = false;
  bool operator==(const ClientStory&) const = default;
};

inline bool same_value(const plain_json::Value& a, const plain_json::Value& b) {
  if (a.kind != b.kind || a.text != b.text || a.items.size() != b.items.size() ||
      a.members.size() != b.members.size()) {
    return false;
  }
  for (std::size_t i = 0; i < a.items.size(); ++i) {
    if (!same_value(a.items[i], b.items[i])) return false;
  }
  for (std::size_t i = 0; i < a.members.size(); ++i) {
    if (a.members[i].name != b.members[i].name || !same_value(a.members[i].value, b.members[i].value)) return false;
  }
  return true;
}

// The body of a streamed request must reach the backend unchanged except for `stream_options.include_usage`.
inline void check_edited(const std::string& came, const std::string& went) {
  const auto before = plain_json::read(came), after = plain_json::read(went);
  if (!before) return;  // Nexus checks only the members that it needs; the backend refuses the body
  check(after.has_value(), "valid JSON became invalid: " + went);
  const plain_json::Value* stream = before->find("stream");
  if (stream == nullptr || stream->kind != plain_json::Value::Kind::yes) {
    return check(came == went, "a body was edited for nothing");
  }
  check(after->count("stream_options") == 1, "not one stream_options: " + went);
  const plain_json::Value* options = after->find("stream_options");
  check(options->count("include_usage") == 1, "not one include_usage: " + went);
  check(options->find("include_usage")->kind == plain_json::Value::Kind::yes, "usage was not asked for: " + went);
  std::size_t same = 0;
  for (const plain_json::Member& member : before->members) {
    if (member.name == "stream_options") continue;
    check(after->count(member.name) >= 1, "a member was lost: " + member.name);
    for (const plain_json::Member& other : after->members) {
      same += other.name == member.name && same_value(other.value, member.value) ? 1 : 0;
    }
  }
  check(same + 1 >= after->members.size(), "a member was changed");
}

inline ClientStory tell_client_story(std::string_view sent, bool keys, bool edits, const Ends& ends) {
  hostile::GatewayOptions options;
  options.keys = keys;
  options.ask_usage = edits;
  hostile::Gateway gateway(options);
  hostile::Peer& client = gateway.connect();
  for (const std::string& piece : pieces_of(sent, ends)) gateway.send(client, piece);
  const hostile::Story story = hostile::read_story(gateway, sent, client, edits);
  check(story.problems.empty(), hostile::joined(story.problems));
  ClientStory told{story.statuses, {}, story.kept};
  for (const rfc9112::Message& message : story.forwarded) told.bodies.push_back(message.body);
  const auto asked = rfc9112::read_requests(sent, true);
  if (edits && story.forwarded.size() == 1 && asked.messages.size() == 1) {
    check_edited(asked.messages[0].body, story.forwarded[0].body);
  }
  gateway.net.finish(client);
  gateway.settle();
  check(gateway.client_sessions() == 0, "the session stays");
  return told;
}

// The first byte: bit 0, clients need a key; bit 1, Nexus asks the backend for usage.
inline void exchange(std::string_view input) {
  if (input.empty()) return;
  const bool keys = (input[0] & 1) != 0, edits = (input[0] & 2) != 0;
  const std::string_view sent = input.substr(1);
  Draw draw(input);
  auto ways = cuts_of(sent.size(), draw);
  if (sent.size() > 400 && ways.size() > 3) ways.erase(ways.begin() + 1);  // byte by byte would cost too much
  const ClientStory whole = tell_client_story(sent, keys, edits, ways[0]);
  for (const auto& way : ways) check(tell_client_story(sent, keys, edits, way) == whole, "a cut changes the story");
}

// ---- a backend's bytes ----

struct BackendStory {
  std::vector<int> statuses;
  std::string body;
  bool whole = false;
  bool operator==(const BackendStory&) const = default;
};

struct BackendCase {
  bool fin = false, reset = false, edits = false, old_client = false;
};

// The payload that the RFC reads in a backend's bytes; sets `whole` if it is complete.
inline std::string told_payload(std::string_view text, bool closed, bool& whole) {
  const auto told = rfc9112::read_responses(text, {"POST"}, closed);
  whole = false;
  for (const rfc9112::Message& message : told.messages) {
    if (message.status < 200) continue;
    whole = true;
    return message.body;
  }
  return told.open.body;
}

inline BackendStory tell_backend_story(std::string_view text, const BackendCase& given, const Ends& ends) {
  hostile::GatewayOptions options;
  options.ask_usage = given.edits;
  hostile::Gateway gateway(options);
  bool answered = false;
  gateway.answer = [&](const rfc9112::Message&) {
    if (std::exchange(answered, true)) return hostile::BackendPlan{{hostile::good_answer()}, false, false};
    return hostile::BackendPlan{pieces_of(text, ends), given.fin, given.reset};
  };
  hostile::Peer& client = gateway.connect();
  const std::string json = given.edits ? R"({"model":"m","stream":true})" : R"({"model":"m"})";
  const std::string request =
      "POST /v1/chat/completions HTTP/1." + std::string(given.old_client ? "0" : "1") +
      "\r\nHost: a\r\nConnection: keep-alive\r\nContent-Length: " + std::to_string(json.size()) + "\r\n\r\n" + json;
  gateway.send(client, request);
  if (!given.fin && !given.reset) gateway.pass(6 * nexus::kSecond);
  const hostile::Story story = hostile::read_story(gateway, request, client, given.edits);
  check(story.problems.empty(), hostile::joined(story.problems));
  check(story.statuses.size() == 1, "not one answer");
  check(gateway.counted_attempts() == 1, "not one attempt");
  check(story.whole || client.ended, "an answer that is neither whole nor over");
  const auto read = rfc9112::read_responses(client.received, {"POST"}, client.ended && !client.cut);
  const rfc9112::Message& got = read.messages.empty() ? read.open : read.messages.back();
  BackendStory told{story.statuses, got.body, story.whole};
  const bool own = got.all("X-Nexus-Backend").empty();
  bool whole = false;
  const std::string payload = told_payload(text, given.fin, whole);
  if (!own && !given.edits) {
    std::string_view body = got.body;
    if (!story.whole) body = body.substr(0, body.find("\n\ndata: {\"error\""));  // a stream gets an error event
    check(payload.substr(0, body.size()) == body, "another payload than the backend's");
    if (story.whole) check(whole && payload == got.body, "a broken answer looks whole");
  }
  if (!own && story.whole) check(whole, "a broken answer looks whole");
  hostile::Peer& next = gateway.connect();
  gateway.send(next, hostile::good_post());
  check(next.received.find(hostile::kGoodBody) != std::string::npos, "the next request went wrong");
  return told;
}

// The first byte: bits 0 and 1, how the response ends; bit 2, Nexus asks for usage; bit 3, the client speaks HTTP/1.0.
inline void answer(std::string_view input) {
  if (input.empty()) return;
  const BackendCase given{(input[0] & 3) == 1, (input[0] & 3) == 2, (input[0] & 4) != 0, (input[0] & 8) != 0};
  const std::string_view text = input.substr(1);
  Draw draw(input);
  auto ways = cuts_of(text.size(), draw);
  if (text.size() > 400 && ways.size() > 3) ways.erase(ways.begin() + 1);
  const BackendStory whole = tell_backend_story(text, given, ways[0]);
  for (const auto& way : ways) check(tell_backend_story(text, given, way) == whole, "a cut changes the story");
}

}  // namespace fuzz
