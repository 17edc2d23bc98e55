// courses_test.cpp
// Goal:   whichever course a request takes, the client, the backends, the access log and /metrics tell the same of it.
// Method: each course of lib/courses.h and of the table below is driven on a gateway of its own, and all that is seen
//         of it is compared with its part of tests/courses.txt, which was made by a run: it tells a change, not that
//         each line is right. Read what a failure prints, the whole part as it is now, before it goes there.
#include <algorithm>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tests/lib/courses.h"

using namespace courses;

namespace {

struct OwnCourse {
  const char* name;
  std::function<void(Settings&)> change;
  std::function<void(Scene&, Peer&)> go;
};

// ---- what far ends do ----

const std::string kStream = "HTTP/1.1 200 OK\r\n" + kChunks;
const std::string kSpare = ask_for("spare");

std::function<void(Settings&)> none() {
  return [](Settings&) {};
}
std::function<void(Settings&)> ejects(std::uint32_t after) {
  return [after](Settings& settings) {
    settings.health.eject_after = after;
    settings.health.eject_time_ns = 2 * kSecond;
  };
}
void slow_client(Settings& settings) {
  settings.server.write_timeout_ns = 2 * kSecond;
  settings.upstream.request_timeout_ns = 0;
}
void small_bodies(Settings& settings) { settings.server.max_body_bytes = 1000; }

// The far end takes what waits for it, and reads again.
void read_on(Scene& scene, Peer& peer) {
  peer.reads = true;
  scene.net.wire.at(peer.link).shape.window_bytes = 64u << 20;
  scene.net.wire.peer_take(peer.link, scene.net.wire.at(peer.link).to_peer.unread());
  scene.settle();
}
void reset(Scene& scene, std::size_t n) {
  scene.net.break_off(*scene.backend(n));
  scene.settle();
}
void leave(Scene& scene, Peer& peer) {
  scene.net.finish(peer);
  scene.settle();
}
// Another client's request, answered by the backend with this number if it has one.
Peer& another(Scene& scene, const std::string& text, std::size_t n = 0) {
  Peer& peer = scene.connect();
  scene.say(peer, text);
  if (n != 0) scene.say(*scene.backend(n), answer(kUsage));
  return peer;
}
// A request on which backend 1 fails and 2 answers, and a time behind it.
void eject_first(Scene& scene, Ns then) {
  another(scene, ask(sim::kAsk));
  reset(scene, 1);
  scene.say(*scene.backend(2), answer(kUsage));
  scene.pass(then);
}
std::string nested(std::size_t levels) {
  return R"({"model":"m","x":)" + std::string(levels - 1, '[') + std::string(levels - 1, ']') + "}";
}
std::string in_chunks(const std::string& body) {
  return "POST /v1/chat/completions" + kHost + kFree + "Transfer-Encoding: chunked\r\n\r\n" + chunk(body) + "0\r\n\r\n";
}
std::string of_size(std::size_t bytes) {
  std::string body = sim::kAsk;
  return body.append(bytes - body.size(), ' ');
}
// A stream is asked for in these words, and comes.
OwnCourse edited(const char* name, const std::string& body) {
  return {name, none(), plain(ask(body), 1, kStream + kToken + kLast + kDone)};
}
OwnCourse with_status(const char* status) { return {status, none(), plain(ask(sim::kAsk), 1, answer("{}", status))}; }
OwnCourse said(const char* name, const std::string& text) { return {name, none(), plain(ask(sim::kAsk), 1, text)}; }
// The first backend says this, and the second is asked.
OwnCourse dropped(const char* name, const std::string& text) {
  return {name, none(), [text](Scene& scene, Peer& client) {
            scene.say(client, ask(sim::kAsk));
            scene.say(*scene.backend(1), text);
            scene.pass(kSecond);
            scene.say_after(0, 2, answer(kUsage));
          }};
}

// ---- the courses ----

std::vector<OwnCourse> own_courses() {
  const std::string until_end = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + kUsage;
  const std::string part = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{";
  std::vector<OwnCourse> all = {
      {"a stream that breaks behind its counts", none(),
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.say_after(kSecond, 1, kStream + kToken + kLast);
         reset(scene, 1);
       }},
      {"a body that the connection's end ends", none(),
       [=](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAsk));
         scene.say(*scene.backend(1), until_end);
         scene.net.finish(*scene.backend(1));
         scene.settle();
       }},
      {"the same for a client of HTTP/1.0", none(),
       [=](Scene& scene, Peer& client) {
         scene.say(client,
                   "POST /v1/chat/completions HTTP/1.0\r\nConnection: keep-alive\r\n" + kFree + with_length(sim::kAsk));
         scene.say(*scene.backend(1), until_end);
         scene.net.finish(*scene.backend(1));
         scene.settle();
       }},
      {"an answer for a client of HTTP/1.0 that keeps its connection", none(),
       plain("POST /v1/chat/completions HTTP/1.0\r\nConnection: keep-alive\r\n" + kFree + with_length(sim::kAsk))},
      {"a body without a length that a reset ends", none(),
       [=](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAsk));
         scene.say(*scene.backend(1), until_end);
         reset(scene, 1);
       }},
      {"a body with a length that breaks off", none(),
       [=](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAsk));
         scene.say(*scene.backend(1), part);
         reset(scene, 1);
       }},
      {"no stream, though one was asked for", none(), plain(ask(sim::kAskStream))},
      {"a client that takes the end a second late", slow_client,
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAsk));
         scene.net.stop_reading(client, 20);
         scene.say(*scene.backend(1), answer(kUsage));
         scene.pass(kSecond);
         read_on(scene, client);
       }},
      {"a client that stops reading", slow_client,
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.net.stop_reading(client, 20);
         scene.say(*scene.backend(1), kStream + kToken);
         scene.pass(3 * kSecond);
       }},
      {"a client that has read again while its backend thinks", slow_client,
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.net.stop_reading(client, 20);
         scene.say(*scene.backend(1), kStream + kToken);
         scene.pass(kSecond);
         read_on(scene, client);
         scene.say_after(5 * kSecond, 1, kLast + kDone);
       }},
      {"a client that falls behind twice", slow_client,
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.say(*scene.backend(1), kStream);
         for (int i = 0; i < 2; ++i) {
           scene.net.stop_reading(client, 20);
           scene.say(*scene.backend(1), kToken);
           scene.pass(1500 * kMillisecond);
           read_on(scene, client);
         }
         scene.say(*scene.backend(1), kLast + kDone);
       }},
      {"one request too many for max_pending", [](Settings& settings) { settings.server.max_pending = 1; },
       [](Scene& scene, Peer& client) {
         another(scene, ask(sim::kAsk));
         scene.say(client, ask(sim::kAsk));
         scene.say(*scene.backend(1), answer(kUsage));
       }},
      {"512 levels", none(), plain(ask(nested(512)))},
      {"513 levels", none(), plain(ask(nested(513)), 0)},
      {"refused before its body", none(),
       plain("POST /v1/chat/completions" + kHost + "Content-Length: 100\r\n\r\n", 0)},
      {"a client that leaves within its body", none(),
       [](Scene& scene, Peer& client) {
         const std::string text = ask(sim::kAsk);
         scene.say(client, text.substr(0, text.size() - 1));
         leave(scene, client);
       }},
      {"a client that leaves within a stream", none(),
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.say(*scene.backend(1), kStream + kToken);
         leave(scene, client);
       }},
      {"a client that leaves the queue", none(),
       [](Scene& scene, Peer& client) {
         another(scene, ask(kSpare));
         scene.say(client, ask(kSpare));
         leave(scene, client);
         scene.say(*scene.backend(3), answer(kUsage));
       }},
      {"a backend that knows no counts, and the request behind it", none(),
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAskStream));
         scene.say(*scene.backend(1), answer(R"({"error":"unknown: stream_options"})", "400 No"));
         scene.say(*scene.backend(1), kStream + kToken + kDone);
         scene.say(client, ask(sim::kAskStream));
         scene.say(*scene.backend(1), kStream + kToken + kDone);
       }},
      {"a mistake in a stream's request", none(),
       plain(ask(sim::kAskStream), 1, answer(R"({"error":"temperature"})", "400 No"))},
      {"too long in the queue", none(),
       [](Scene& scene, Peer& client) {
         another(scene, ask(kSpare));
         scene.say(client, ask(kSpare));
         scene.pass(3100 * kMillisecond);
         scene.say(*scene.backend(3), answer(kUsage));
       }},
      {"too long in the queue beside an ejected backend",
       [](Settings& settings) {
         ejects(1)(settings);
         settings.health.eject_time_ns = 1000 * kSecond;
         settings.backends[1].max_pending = 1;
       },
       [](Scene& scene, Peer& client) {
         another(scene, ask(sim::kAsk));
         reset(scene, 1);
         scene.say(client, ask(sim::kAsk));
         scene.pass(3100 * kMillisecond);
         scene.say(*scene.backend(2), answer(kUsage));
       }},
      {"a full queue", [](Settings& settings) { settings.queue.size = 1; },
       [](Scene& scene, Peer& client) {
         another(scene, ask(kSpare));
         another(scene, ask(kSpare));
         scene.say(client, ask(kSpare));
         for (int i = 0; i < 2; ++i) scene.say(*scene.backend(3), answer(kUsage));
       }},
      {"a failed backend, and a full one without a queue",
       [](Settings& settings) {
         settings.queue.size = 0;
         settings.backends[1].max_pending = 1;
       },
       [](Scene& scene, Peer& client) {
         another(scene, ask(kImage));
         scene.say(client, ask(sim::kAsk));
         scene.say(*scene.backend(1), answer("{}", "503 No"));
         scene.pass(kSecond);
         scene.say(*scene.backend(2), answer(kUsage));
       }},
      {"an upload that goes on for longer than first_byte_timeout",
       [](Settings& settings) {
         settings.upstream.first_byte_timeout_ns = 2 * kSecond;
         settings.upstream.request_timeout_ns = 0;
       },
       [](Scene& scene, Peer& client) {
         scene.net.on_connect = [&](Peer& peer) { scene.net.stop_reading(peer, 200'000); };
         scene.say(client, ask(of_size(700'000)));
         for (int i = 0; i < 4; ++i) {
           scene.pass(1500 * kMillisecond);
           Peer& backend = *scene.backend(1);
           scene.net.wire.peer_take(backend.link, scene.net.wire.at(backend.link).to_peer.unread());
           scene.settle();
         }
         scene.say(*scene.backend(1), answer(kUsage));
       }},
      {"a Retry-After that lasts longer than eject_time", ejects(1),
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAsk));
         scene.say(*scene.backend(1), answer("{}", "503 No", "Retry-After: 30\r\n"));
         scene.pass(kSecond);
         scene.say(*scene.backend(2), answer(kUsage));
         scene.pass(20 * kSecond);
         another(scene, ask(sim::kAsk), 2);
         scene.pass(10 * kSecond);
         another(scene, ask(sim::kAsk), 1);
       }},
      {"a trial that streams, and a request beside it", ejects(1),
       [](Scene& scene, Peer& client) {
         eject_first(scene, 2100 * kMillisecond);
         scene.say(client, ask(sim::kAskStream));
         Peer& streams = *scene.backend(1);
         scene.say(streams, kStream + kToken);
         another(scene, ask(sim::kAsk), 1);
         scene.say(streams, kLast + kDone);
       }},
      {"a trial whose client leaves, and the next one", ejects(1),
       [](Scene& scene, Peer& client) {
         eject_first(scene, 2100 * kMillisecond);
         leave(scene, another(scene, ask(sim::kAsk)));
         scene.say(client, ask(sim::kAsk));
         scene.say(*scene.backend(1), answer(kUsage));
       }},
      {"two failures with a success between them", ejects(2),
       [](Scene& scene, Peer& client) {
         for (int i = 0; i < 2; ++i) {
           another(scene, ask(sim::kAsk));
           scene.say(*scene.backend(1), answer("{}", "500 No"));
           scene.say(*scene.backend(2), answer(kUsage));
           if (i == 0) another(scene, ask(sim::kAsk), 1);
         }
         scene.say(client, ask(sim::kAsk));
         leave(scene, client);
       }},
      {"tools", [](Settings& settings) { settings.backends[0].tools.stated = true; },
       plain(ask(R"({"model":"m","tools":[{}]})"), 2)},
      {"no tools", [](Settings& settings) { settings.backends[0].tools.stated = true; },
       plain(ask(R"({"model":"m","tools":[]})"))},
      {"a body of max_body", small_bodies, plain(ask(of_size(1000)))},
      {"a body above max_body", small_bodies, plain(ask(of_size(1001)), 0)},
      {"a body of max_body in chunks", small_bodies, plain(in_chunks(of_size(1000)))},
      {"a body above max_body in chunks", small_bodies, plain(in_chunks(of_size(1001)), 0)},
      {"a backend with a key of its own",
       [](Settings& settings) {
         settings.server.api_keys.clear();
         settings.backends[0].api_key = "its-own";
       },
       plain(ask(sim::kAsk))},
      {"a backend without a key", [](Settings& settings) { settings.server.api_keys.clear(); }, plain(ask(sim::kAsk))},
      {"a key's only place for a request that is tried again",
       [](Settings& settings) { settings.server.api_keys[1].options.max_pending = 1; },
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAsk, kLimited));
         reset(scene, 1);
         scene.say(*scene.backend(2), answer(kUsage));
       }},
      {"a fallback on the backend that has failed",
       [](Settings& settings) {
         settings.backends[0].models = {"big", "spare"};
       },
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(ask_for("big")));
         reset(scene, 1);
         scene.say_after(0, 1, answer(kUsage));
       }},
      {"a head that is too large", none(), plain("GET /health" + kHost + "X: " + std::string(20'000, 'x'), 0)},
      {"a target that is too long", none(), plain("GET /" + std::string(20'000, 'x'), 0)},
      {"a field too many", [](Settings& settings) { settings.server.max_fields = 3; },
       plain("GET /health" + kHost + "A: 1\r\nB: 2\r\nC: 3\r\n\r\n", 0)},
      {"an id of 128 bytes", none(), plain(ask(sim::kAsk, kFree + "X-Request-Id: " + std::string(128, 'i') + "\r\n"))},
      {"an id of 129 bytes", none(), plain(ask(sim::kAsk, kFree + "X-Request-Id: " + std::string(129, 'i') + "\r\n"))},
      {"a path with a query", none(), plain(ask(sim::kAsk, kFree, "/v1/chat/completions?a=b"))},
      {"twenty requests at once", none(),
       [](Scene& scene, Peer& client) {
         std::string text;
         for (int i = 0; i < 20; ++i) text += get("/v1/models/m");
         scene.say(client, text);
       }},
      {"an unknown model for a page of an allowed origin", none(),
       plain(ask(ask_for("unheard-of"), kFree + "Origin: http://page.example\r\n"), 0)},
      {"an unknown model for a page of another origin", none(),
       plain(ask(ask_for("unheard-of"), kFree + "Origin: http://other.example\r\n"), 0)},
      {"a failure behind request_timeout", none(),
       [](Scene& scene, Peer& client) {
         scene.say(client, ask(sim::kAsk));
         scene.net.break_off(*scene.backend(1));
         scene.net.wire.advance(scene.net.wire.now() + 7 * kSecond);
         scene.settle();
       }},
      edited("options without members", R"({"model":"m","stream":true,"stream_options":{}})"),
      edited("options that are null", R"({"model":"m","stream":true,"stream_options":null})"),
      edited("no counts wanted", R"({"model":"m","stream":true,"stream_options":{"include_usage":false}})"),
      edited("counts wanted", R"({"model":"m","stream":true,"stream_options":{"include_usage":true}})"),
      edited("another option", R"({"model":"m","stream":true,"stream_options":{"a":1}})"),
      edited("options before an alias", R"({"stream_options":{},"model":"nick","stream":true})"),
      edited("options behind an alias", R"({"model":"nick","stream":true,"stream_options":{}})"),
      said("a connection that its backend closes", answer(kUsage, "200 OK", "Connection: close\r\n")),
      said("bytes behind an answer", answer(kUsage) + "x"),
      said("bytes behind the last chunk",
           "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(kUsage) + "0\r\n\r\nx"),
      dropped("a switch to another protocol", "HTTP/1.1 101 Switch\r\nUpgrade: x\r\n\r\n"),
      dropped("too many requests", answer("{}", "429 X")),
      dropped("an answer that is dropped", answer("{}", "500 No")),
      dropped("an answer that is dropped with bytes behind it", answer("{}", "500 No") + "x"),
      dropped("an answer that is dropped before its end", "HTTP/1.1 500 No\r\nContent-Length: 100\r\n\r\n{"),
  };
  for (const char* status : {"302 X", "404 X", "408 X", "422 X"}) all.push_back(with_status(status));
  return all;
}

// ---- what is seen of them ----

std::map<std::string, double> values_of(const Lines& page) {
  std::map<std::string, double> all;
  for (const std::string& line : page) {
    const std::size_t at = line.rfind(' ');
    const bool told = line.starts_with("nexus_") && line.find("_bucket") == std::string::npos;
    if (told && at != std::string::npos) all[line.substr(0, at)] = std::stod(line.substr(at));
  }
  return all;
}

std::string number(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%+.6g", value);
  return text;
}

// The field of a head with this name; empty if it has none.
std::string field_of(const std::string& text, const std::string& name) {
  const std::size_t at = text.find("\r\n" + name + ": ");
  return at == std::string::npos ? "" : "  " + text.substr(at + 2, text.find("\r\n", at + 2) - at - 2) + "\n";
}

std::string end_of(std::string text) {
  constexpr std::size_t kShown = 90;
  if (const std::size_t head = text.rfind("\r\n\r\n"); head != std::string::npos) text = text.substr(head + 4);
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c == '\r' || c == '\n'; }, '.');
  return text.size() <= kShown ? text : ".." + text.substr(text.size() - kShown);
}

// Without the ids that Nexus made.
std::string without_ids(std::string text) {
  constexpr std::string_view kName = "request_id=";
  constexpr std::size_t kOwnIdBytes = 32;
  for (std::size_t at = 0; (at = text.find(kName, at)) != std::string::npos;) {
    at += kName.size();
    const std::string id = text.substr(at, text.find(' ', at) - at);
    if (id.size() != kOwnIdBytes) continue;
    for (std::size_t each = 0; (each = text.find(id, each)) != std::string::npos;) text.replace(each, id.size(), "id");
  }
  return text;
}

template <class Go>
std::string seen_of(const std::function<void(Settings&)>& change, Go&& go) {
  const auto rings = std::make_unique<sim::LogRings>();
  Scene scene(*rings, change);
  Peer& scraper = scene.connect();
  Peer& client = scene.connect();
  const auto before = values_of(scrape(scene, scraper));
  go(scene, client);
  std::string out = "client: " + statuses_of(client.received) +
                    (client.cut     ? " cut"
                     : client.ended ? " ended"
                                    : "") +
                    " " + end_of(client.received) + "\n";
  for (const char* name : {"Content-Length", "Connection", "X-Nexus-Route-Reason", "X-Nexus-Fallback-Model",
                           "Retry-After", "WWW-Authenticate", "Allow", "Access-Control-Allow-Origin", "Vary"}) {
    out += field_of(client.received, name);
  }
  for (auto at = scene.net.peers.begin(); at != scene.net.peers.end(); ++at) {
    const Peer& peer = *at;
    const bool gone = std::any_of(at + 1, scene.net.peers.end(), [&](Peer& later) { return later.link == peer.link; });
    if (!peer.to_backend || gone) continue;
    out += "backend " + std::to_string(scene.net.wire.at(peer.link).peer - Stage::kFirstPort + 1) +
           (scene.net.closed(peer) ? " closed: " : ": ") + std::to_string(peer.received.size()) + " bytes " +
           end_of(peer.received) + "\n" + field_of(peer.received, "Authorization");
  }
  for (const std::string& line : take_log(*rings)) out += line + "\n";
  for (const auto& [name, value] : values_of(scrape(scene, scraper))) {
    const auto was = before.find(name);
    const double more = value - (was == before.end() ? 0 : was->second);
    if (more != 0 && name.find("uptime") == std::string::npos && !name.starts_with("nexus_tokens_total_count"))
      out += name + " " + number(more) + "\n";
  }
  CHECK(sim::left_over(scene.gateway()) == "");
  return without_ids(out);
}

// Each part of the file begins with a line `# its name`.
std::map<std::string, std::string> wanted_parts() {
  std::map<std::string, std::string> parts;
  std::ifstream in("tests/courses.txt");
  std::string name;
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("# ")) {
      name = line.substr(2);
    } else if (!name.empty() && !line.empty()) {
      parts[name] += line + "\n";
    }
  }
  return parts;
}

void compare(const std::map<std::string, std::string>& wanted, const std::string& name, const std::string& seen) {
  const auto part = wanted.find(name);
  const bool same = part != wanted.end() && part->second == seen;
  CHECK_MESSAGE(same, "# " << name << "\n" << seen);
}

}  // namespace

TEST_CASE("each course of a request is told by the client's response, the log and the counts as it was") {
  const auto wanted = wanted_parts();
  for (const Course& course : kCourses) {
    compare(wanted, course.name, seen_of({}, [&](Scene& scene, Peer& client) { course.go(scene, client); }));
  }
  const std::vector<OwnCourse> own = own_courses();
  for (const OwnCourse& course : own) compare(wanted, course.name, seen_of(course.change, course.go));
  CHECK(wanted.size() == std::size(kCourses) + own.size());
}
