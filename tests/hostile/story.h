// story.h
// Owns:     the properties that hold for every exchange, however hostile: both sides' bytes and Nexus's counts agree.
// Promises: all bytes are read by rfc9112.h; each violation is one line in the result.
// Leaves:   the statuses that a request deserves to the tables.
// Threads:  one.
#pragma once

#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/server/paths.h"
#include "tests/hostile/gateway.h"

namespace hostile {

using Problems = std::vector<std::string>;

inline std::string joined(const Problems& problems) {
  std::string all;
  for (const std::string& problem : problems) all += "\n  " + problem;
  return all;
}

inline bool is_endpoint_post(const rfc9112::Message& message) {
  std::string path = rfc9112::path_of(message.target);
  path = path.substr(0, path.find('?'));
  return message.method == "POST" && nexus::find_endpoint(path, nexus::Listens::for_all) != nullptr;
}

// Checks one request as a backend received it.
inline void check_forwarded(const rfc9112::Message& message, Problems& problems) {
  const auto wrong = [&](const std::string& what) { problems.push_back("to the backend: " + what); };
  if (message.value("Host") != "10.0.0.1:8001") wrong("Host is " + message.value("Host"));
  if (message.value("Content-Length") != std::to_string(message.body.size())) wrong("Content-Length");
  if (message.value("X-Request-Id").empty() || message.all("X-Request-Id").size() != 1) wrong("X-Request-Id");
  if (message.all("Via").empty() || message.all("Via").back() != "1.1 nexus-51515151") wrong("Via");
  if (!message.trailers.empty()) wrong("trailers");
  for (const char* name : {"Transfer-Encoding", "Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer",
                           "Upgrade", "Expect", "Proxy-Authorization", "Accept-Encoding"}) {
    if (message.has(name)) wrong(std::string(name) + " was passed on");
  }
  static const std::set<std::string> kOwn = {"content_length",  "transfer_encoding",   "x_request_id",
                                             "accept_encoding", "proxy_authorization", "keep_alive"};
  for (const auto& [name, value] : message.fields) {
    std::string folded = rfc9112::lower(name);
    if (folded.find('_') != std::string::npos && kOwn.count(folded) > 0) wrong("the underscore twin " + name);
    if (folded.rfind("x-nexus-", 0) == 0 || folded.rfind("x_nexus_", 0) == 0) wrong("a forged " + name);
  }
}

// Every request that a backend received must be one that the RFC reads in the client's bytes, and in the same order.
inline void check_origin(const rfc9112::Reading& client, const std::vector<rfc9112::Message>& forwarded,
                         Problems& problems) {
  std::size_t next = 0;
  for (const rfc9112::Message& seen : forwarded) {
    while (next < client.messages.size() && !(client.messages[next].method == seen.method &&
                                              rfc9112::path_of(client.messages[next].target) == seen.target &&
                                              client.messages[next].body == seen.body)) {
      ++next;
    }
    if (next++ >= client.messages.size()) return problems.push_back("a request that nobody sent: " + seen.start_line);
  }
}

inline std::uint64_t sum_of(const auto& cells) {
  std::uint64_t sum = 0;
  for (const nexus::Counter& cell : cells) sum += cell.read();
  return sum;
}

// The requests on proxied endpoints that Nexus counted, except those whose client left.
inline std::uint64_t counted_requests(const Gateway& gateway) {
  std::uint64_t sum = 0;
  gateway.slab().pairs().for_each([&](std::uint32_t, std::uint32_t, const nexus::PairCounters& cells) {
    cells.statuses.for_each(
        [&](const nexus::StatusCounters::Count& count) { sum += count.status == 499 ? 0 : count.count; });
  });
  return sum;
}

struct Story {
  std::vector<int> statuses;  // of the final responses, in order
  std::size_t interim = 0;
  std::vector<rfc9112::Message> answers;
  std::vector<rfc9112::Message> forwarded;
  bool kept = false;     // the client's connection is still open
  bool whole = true;     // all responses are complete
  bool cut_off = false;  // the last response is truncated, and its reader can tell
  Problems problems;
};

// Collects the result of sending `sent` on one client connection. `edits`: the bodies may differ from the client's.
inline Story read_story(const Gateway& gateway, std::string_view sent, const Peer& client, bool edits = false) {
  Story story;
  const auto wrong = [&](const std::string& what) { story.problems.push_back(what); };
  for (const rfc9112::Reading& reading : gateway.backend_saw()) {
    if (!reading.problem.empty()) wrong("to the backend: " + reading.problem);
    if (!reading.rest.empty()) wrong("to the backend: a request that is not whole");
    story.forwarded.insert(story.forwarded.end(), reading.messages.begin(), reading.messages.end());
  }
  for (const rfc9112::Message& message : story.forwarded) check_forwarded(message, story.problems);
  if (gateway.counted_attempts() > story.forwarded.size()) wrong("more attempts counted than requests sent");

  const rfc9112::Reading asked = rfc9112::read_requests(sent, true);
  if (!edits) check_origin(asked, story.forwarded, story.problems);
  std::vector<rfc9112::Message> begun = asked.messages;
  if (asked.within_body || asked.unframed) begun.push_back(asked.open);
  std::vector<std::string> methods;
  for (const rfc9112::Message& message : begun) methods.push_back(message.method);
  methods.push_back("POST");  // for a response to bytes that are not a request

  std::uint64_t rejected = 0;  // heads; requests for an unknown path or method have one
  for (const auto reason : {nexus::HttpRejection::malformed, nexus::HttpRejection::header_timeout,
                            nexus::HttpRejection::header_too_large}) {
    rejected += gateway.slab().thread().http_rejections[static_cast<std::size_t>(reason)].read();
  }
  const rfc9112::Reading read = rfc9112::read_responses(client.received, methods, client.ended && !client.cut);
  if (!read.problem.empty()) wrong("to the client: " + read.problem);
  story.answers = read.messages;
  for (const rfc9112::Message& message : read.messages) {
    if (message.status < 200) {
      story.interim += 1;
    } else {
      story.statuses.push_back(message.status);
    }
  }
  story.whole = read.rest.empty();
  if (read.within_body) {
    story.statuses.push_back(read.open.status);
    story.cut_off = client.ended;
    if (read.open.framing == rfc9112::Message::Framing::until_close && client.ended && !client.cut) {
      wrong("to the client: an answer that is not whole looks whole");
    }
  } else if (!read.rest.empty()) {
    wrong("to the client: an answer without its head");
  }
  story.kept = !client.ended;
  if (story.kept && !read.messages.empty() && !read.messages.back().stays_open) wrong("close was said, and not done");

  if (rejected > 1) wrong("more than one head was refused");
  const std::size_t answered = story.statuses.size() - std::min<std::size_t>(rejected, story.statuses.size());
  std::uint64_t posts = 0;
  for (std::size_t i = 0; i < std::min(answered, begun.size()); ++i) posts += is_endpoint_post(begun[i]) ? 1 : 0;
  if (counted_requests(gateway) != posts) {
    wrong("counted " + std::to_string(counted_requests(gateway)) + " requests, answered " + std::to_string(posts));
  }
  return story;
}

}  // namespace hostile
