// courses.h
// Owns:     courses that a request can take through Nexus, each driven to its end on a Stage; what is seen of it.
// Promises: each course begins and ends at rest. Those of kCourses need nothing of their own but a connection.
// Leaves:   what must be seen to the tests.
// Threads:  one.
// Tested by: tests/next_request_test.cpp, tests/courses_test.cpp
#pragma once

#include <cstdio>
#include <functional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include <doctest/doctest.h>

#include "tests/lib/at_rest.h"
#include "tests/lib/stage.h"

namespace courses {

using namespace nexus;
using sim::Peer;
using sim::Stage;

// ---- what is asked and answered ----

inline const std::string kFree = "Authorization: Bearer free-of-limits\r\n";
inline const std::string kLimited = "Authorization: Bearer a-limited-key\r\n";
inline const std::string kHost = " HTTP/1.1\r\nHost: a\r\n";

inline std::string with_length(const std::string& body) {
  return "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}
inline std::string ask(const std::string& body, const std::string& fields = kFree,
                       const std::string& path = "/v1/chat/completions") {
  return "POST " + path + kHost + fields + with_length(body);
}
inline std::string get(const std::string& path, const std::string& method = "GET") {
  return method + " " + path + kHost + kFree + "\r\n";
}
inline std::string ask_for(const std::string& model) { return R"({"model":")" + model + R"(","messages":[]})"; }

inline std::string chunk(const std::string& text) {
  char size[32];
  std::snprintf(size, sizeof size, "%zx\r\n", text.size());
  return size + text + "\r\n";
}
inline std::string answer(const std::string& body, const std::string& status = "200 OK",
                          const std::string& fields = {}) {
  return "HTTP/1.1 " + status + "\r\nContent-Type: application/json\r\n" + fields + with_length(body);
}

inline const std::string kUsage = R"({"id":"x","usage":{"prompt_tokens":30,"completion_tokens":40}})";
inline const std::string kNoUsage = R"({"id":"x"})";
inline const std::string kChunks = "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
inline const std::string kToken = chunk("data: {\"choices\":[{\"delta\":{\"content\":\"one\"}}]}\n\n");
inline const std::string kLast =
    chunk("data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":5}}\n\n");
inline const std::string kDone = chunk("data: [DONE]\n\n") + "0\r\n\r\n";

inline const std::string kImage =
    R"({"model":"m","messages":[{"content":[{"type":"image_url","image_url":{"url":"data:"}}]}]})";
inline const std::string kForm =
    "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nnick\r\n--b\r\n"
    "Content-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nmodel\r\n--b--\r\n";

struct Scene : Stage {
  explicit Scene(sim::LogRings& rings, const std::function<void(Settings&)>& more = {})
      : Stage(
            3,
            [&](Settings& settings) {
              change(settings);
              if (more) more(settings);
            },
            &rings) {}

  // `model` m: on b1, which sees no images and is asked for counts, and on b2. `spare`: on b3, one request at a time.
  static void change(Settings& settings) {
    settings.server.api_keys = {{"free", "free-of-limits"},
                                {"limited", "a-limited-key", {.max_pending = 5, .rpm = 1000, .tpm = 100'000}}};
    settings.server.max_pending = 5;
    settings.server.cors_origins = {"http://page.example"};
    settings.server.header_timeout_ns = settings.server.idle_timeout_ns = 1000 * kSecond;
    settings.health.eject_after = 1'000'000;
    settings.log.access = "stderr";
    settings.queue.size = 5;
    settings.queue.timeout_ns = 3 * kSecond;
    settings.upstream.request_timeout_ns = 6 * kSecond;
    settings.aliases = {{"nick", "m"}};
    settings.fallbacks = {{"big", {"spare"}}};
    settings.backends[0].kind = BackendKind::vllm;
    settings.backends[0].vision.stated = true;
    settings.backends[2].models = {"spare"};
    settings.backends[2].max_pending = 1;
  }

  Peer& connect() {
    Peer& peer = net.connect_client();
    settle();
    return peer;
  }
  // What Nexus answers if the backend with this number says `text` after `span`.
  void say_after(Ns span, std::size_t n, const std::string& text) {
    pass(span);
    REQUIRE(backend(n) != nullptr);
    say(*backend(n), text);
  }
};

// ---- the requests ----

struct Course {
  const char* name;
  const char* statuses;  // of its responses
  std::function<void(Scene&, Peer&)> go;
};

// The client sends `text`; then the backend with this number answers.
inline std::function<void(Scene&, Peer&)> plain(const std::string& text, std::size_t n = 1,
                                                const std::string& said = answer(kUsage)) {
  return [=](Scene& scene, Peer& client) {
    scene.say(client, text);
    if (n != 0) scene.say_after(30 * kMillisecond, n, said);
  };
}

inline const Course kCourses[] = {
    {"plain", "200", plain(ask(sim::kAsk))},
    {"an answer without counts", "200", plain(ask(sim::kAsk), 1, answer(kNoUsage))},
    {"a body in chunks", "200",
     [](Scene& scene, Peer& client) {
       scene.say(client, "POST /v1/chat/completions" + kHost + kFree + "Transfer-Encoding: chunked\r\n\r\n" +
                             chunk(sim::kAsk.substr(0, 9)));
       scene.say(client, chunk(sim::kAsk.substr(9)) + "0\r\n\r\n");
       scene.say_after(kMillisecond, 1, answer(kUsage));
     }},
    {"a stream with counts", "200",
     [](Scene& scene, Peer& client) {
       scene.say(client, ask(sim::kAskStream));
       scene.say_after(20 * kMillisecond, 1, "HTTP/1.1 200 OK\r\n" + kChunks + kToken);
       scene.say_after(40 * kMillisecond, 1, kToken + kLast + kDone);
     }},
    {"a stream without counts and without its end mark", "200",
     [](Scene& scene, Peer& client) {
       scene.say(client, ask(sim::kAskStream));
       scene.say_after(80 * kMillisecond, 1, "HTTP/1.1 200 OK\r\n" + kChunks + kToken);
       scene.say_after(kMillisecond, 1, "0\r\n\r\n");
     }},
    {"an answer in chunks", "200",
     plain(ask(sim::kAsk), 1,
           "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(kUsage) +
               "0\r\n\r\n")},
    {"a retry", "200",
     [](Scene& scene, Peer& client) {
       scene.say(client, ask(sim::kAskStream));
       scene.say_after(5 * kMillisecond, 1, answer("", "500 No"));
       scene.say_after(7 * kMillisecond, 2, "HTTP/1.1 200 OK\r\n" + kChunks + kToken + kDone);
     }},
    {"no backend left", "503",
     [](Scene& scene, Peer& client) {
       scene.say(client, ask(sim::kAsk));
       scene.say_after(kMillisecond, 1, answer("{}", "503 No"));
       scene.say_after(kMillisecond, 2, answer("{}", "503 No"));
     }},
    {"an image", "200", plain(ask(kImage), 2)},
    {"an alias", "200", plain(ask(ask_for("nick")))},
    {"a fallback", "200", plain(ask(ask_for("big")), 3)},
    {"two seconds in the queue", "200",
     [](Scene& scene, Peer& client) {
       Peer& first = scene.net.connect_client();
       scene.settle();
       scene.say(first, ask(ask_for("spare")));
       scene.say(client, ask(ask_for("spare")));
       scene.say_after(2 * kSecond, 3, answer(kUsage));
       scene.say_after(kMillisecond, 3, answer(kUsage));
       scene.net.finish(first);
       scene.settle();
     }},
    {"a page of an allowed origin", "200", plain(ask(sim::kAsk, kFree + "Origin: http://page.example\r\n"))},
    {"as many interim heads as a backend may send", "200",
     [](Scene& scene, Peer& client) {
       scene.say(client, ask(sim::kAsk));
       for (std::uint32_t i = 0; i < kMaxInterimHeads; ++i) {
         scene.say_after(0, 1, "HTTP/1.1 102 Wait\r\n\r\n");
       }
       scene.say_after(0, 1, answer(kUsage));
     }},
    {"a page behind a body in chunks", "200 200",
     plain("POST /v1/chat/completions" + kHost + kFree + "Transfer-Encoding: chunked\r\n\r\n" + chunk(sim::kAsk) +
           "0\r\n\r\n" + get("/health"))},
    {"health", "200", plain(get("/health"), 0)},
    {"the models", "200", plain(get("/v1/models"), 0)},
    {"the head of a page", "200", plain(get("/v1/models", "HEAD"), 0)},
    {"an unknown path", "404", plain(get("/nothing"), 0)},
    {"an empty line before the head", "200", plain("\r\n" + ask(sim::kAsk))},
    {"a large body", "200", plain(ask(R"({"model":"m","stop":")" + std::string(100'000, 'x') + "\"}"))},
    {"a form", "200",
     plain(ask(kForm, kFree + "Content-Type: multipart/form-data; boundary=b\r\n", "/v1/audio/transcriptions"))},
    {"a body that is waited for", "100 200",
     [](Scene& scene, Peer& client) {
       const std::string text = ask(sim::kAsk, kFree + "Expect: 100-continue\r\n");
       scene.say(client, text.substr(0, text.size() - sim::kAsk.size()));
       scene.pass(kSecond);
       scene.say(client, sim::kAsk);
       scene.say_after(0, 1, answer(kUsage));
     }},
    {"no JSON", "400", plain(ask("{"), 0)},
    {"an unknown model", "404", plain(ask(ask_for("unheard-of")), 0)},
    {"a body that is too large", "413",
     plain("POST /v1/chat/completions" + kHost + kFree + "Content-Length: 99999999999\r\n\r\n", 0)},
    {"no key", "401", plain(get("/v1/models").replace(get("/v1/models").find(kFree), kFree.size(), ""), 0)},
    {"a key with limits", "200", plain(ask(sim::kAsk, kLimited))},
    {"an id of its own", "200", plain(ask(sim::kAsk, kFree + "X-Request-Id: mine\r\n"))},
    {"a mistake that the backend finds", "400", plain(ask(sim::kAsk), 1, answer("{}", "400 No"))},
    {"the last one of its connection", "200", plain(ask(sim::kAsk, kFree + "Connection: close\r\n"))},
    {"a client that leaves", "",
     [](Scene& scene, Peer& client) {
       scene.say(client, ask(sim::kAsk));
       scene.pass(kSecond);
       scene.net.finish(client);
       scene.settle();
     }},
};

// ---- what is seen ----

using Lines = std::vector<std::string>;

inline Lines lines_of(const std::string& text) {
  Lines lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

inline std::string statuses_of(const std::string& responses) {
  constexpr std::string_view kVersion = "HTTP/1.1 ";
  std::string all;
  for (std::size_t at = responses.find(kVersion); at != std::string::npos; at = responses.find(kVersion, at + 1)) {
    all.append(all.empty() ? "" : " ").append(responses, at + kVersion.size(), 3);
  }
  return all;
}

// The lines of the access log without the true time, the client's port and, if `anonymous`, the request's id.
inline Lines take_log(sim::LogRings& rings, bool anonymous = false) {
  std::string text;
  rings[0].access.take(text);
  Lines all = lines_of(text);
  for (std::string& line : all) {
    for (const std::string_view name : {"time=", "client=", "request_id="}) {
      if (name == "request_id=" && !anonymous) continue;
      const std::size_t at = line.find(name);
      if (at != std::string::npos) line.erase(at, line.find(' ', at) + 1 - at);
    }
  }
  return all;
}

// The metrics, without the histogram of the loop's turns, because a connection costs some, and without the length.
inline Lines scrape(Scene& scene, Peer& scraper) {
  const std::size_t answered = scraper.received.size();
  scene.say(scraper, get("/metrics"));
  Lines all = lines_of(scraper.received.substr(answered));
  std::erase_if(all, [](const std::string& line) {
    return line.find("nexus_loop_stall") != std::string::npos || line.starts_with("Content-Length");
  });
  return all;
}

}  // namespace courses
