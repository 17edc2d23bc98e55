// reload_keys.h
// Owns:     the table of all keys of nexus.conf: what a reload does to each, and a way to see it.
// Promises: each row shows two values of its key that have different results.
// Leaves:   running the rows to hostile_reload_keys_test.cpp; rows of Seen::by_daemon to e2e/reload_keys.test.mjs.
// Threads:  one.
// Tested by: tests/hostile_reload_keys_test.cpp
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/config/parser.h"
#include "tests/hostile/gateway.h"
#include "tests/hostile/requests.h"

namespace hostile {

using nexus::kSecond;

// When a new value is in force after a reload; the manual has the same words.
enum class When : std::uint8_t { at_once, new_requests, new_connections, restart };
inline constexpr std::string_view kWhenWords[] = {"at once", "for new requests", "for new connections", "restart only"};

inline BackendPlan json_answer(const std::string& body, const std::string& status = "200 OK") {
  return {{"HTTP/1.1 " + status +
           "\r\nContent-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body},
          false,
          false};
}
inline BackendPlan no_answer() { return {{}, false, false}; }
inline BackendPlan reset_answer() { return {{}, false, true}; }
inline bool is_check(const rfc9112::Message& message) { return message.method == "GET"; }

// A gateway with one configuration after another, and a client in front of it.
class Scene {
 public:
  explicit Scene(const nexus::Settings& settings) : gateway(options(settings)) {
    gateway.answer = [this](const rfc9112::Message& message) {
      return is_check(message) ? check(message) : serve(message);
    };
  }

  void reload(const nexus::Settings& settings) { gateway.reload(options(settings)); }
  void connect() { client = &gateway.connect(); }
  void send(const std::string& bytes) { gateway.send(*client, bytes); }
  void pass(nexus::Ns span) { gateway.pass(span); }
  void settle() { gateway.settle(); }

  // What the client was sent since the last call: the status of the last response, else `closed` or `nothing`.
  std::string result() {
    const auto read = rfc9112::read_responses(std::string_view(client->received).substr(seen_),
                                              std::vector<std::string>(50, "POST"), client->ended && !client->cut);
    seen_ = client->received.size();
    answer = read.messages.empty() ? read.open : read.messages.back();
    return answer.status > 0 ? std::to_string(answer.status) : client->ended ? "closed" : "nothing";
  }
  // The connection to the backend that was made last.
  Peer& backend() {
    return *std::find_if(gateway.net.peers.rbegin(), gateway.net.peers.rend(),
                         [](const Peer& peer) { return peer.to_backend; });
  }
  // The last request that came to a backend, without checks.
  rfc9112::Message last_request() const { return requests().back(); }
  std::size_t requests_at(std::string_view host) const {
    std::size_t count = 0;
    for (const auto& message : requests()) count += message.value("Host") == host ? 1 : 0;
    return count;
  }
  std::size_t checks() const { return all().size() - requests().size(); }

  Gateway gateway;
  Peer* client = nullptr;
  rfc9112::Message answer;    // of the last result()
  std::size_t count = 0;      // of the row's own
  Peer* other = nullptr;      // a second client
  bool backend_ails = false;  // for the rows of checks
  std::function<BackendPlan(const rfc9112::Message&)> check = [](const auto&) {
    return json_answer(R"({"data":[{"id":"m"}]})");
  };
  // `hold` in a body: no answer.
  std::function<BackendPlan(const rfc9112::Message&)> serve = [](const rfc9112::Message& message) {
    return message.body.find("hold") != std::string::npos ? no_answer() : json_answer(kGoodBody);
  };

 private:
  static GatewayOptions options(const nexus::Settings& settings) {
    return {.edit = [settings](nexus::Settings& s) { s = settings; }};
  }
  std::vector<rfc9112::Message> all() const {
    std::vector<rfc9112::Message> messages;
    for (const auto& reading : gateway.backend_saw()) {
      messages.insert(messages.end(), reading.messages.begin(), reading.messages.end());
    }
    return messages;
  }
  std::vector<rfc9112::Message> requests() const {
    std::vector<rfc9112::Message> found = all();
    std::erase_if(found, is_check);
    return found;
  }

  std::size_t seen_ = 0;
};

using Lines = std::vector<std::pair<std::string, std::string>>;  // a section without its brackets, and a line of it

// `begin` brings a request into the state in which the reload comes; `end` goes on and tells what is in force.
struct Seen {
  std::function<void(Scene&)> begin;
  std::function<std::string(Scene&)> end;
};

struct ReloadRow {
  std::string_view section, key;
  When when;
  std::string before, after;  // the key's line; empty: it is left out
  std::string old_result, new_result;
  Seen seen;     // empty: shown by e2e/reload_keys.test.mjs, because it needs the whole daemon
  Lines rest{};  // what else the row needs
};

// ---- what is sent

inline std::string with_body(const std::string& body, const std::string& fields = "") {
  return "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n" + fields +
         "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}
inline std::string body_for(const std::string& model, const std::string& more = "") {
  return R"({"model":")" + model + "\"" + more + "}";
}
inline const std::string kHeld = with_body(body_for("m", R"(,"user":"hold")"));

inline std::string with_key(const std::string& name, const std::string& body) {
  return with_body(body, "Authorization: Bearer sk-" + name + "-0123456789\r\n");
}

// A request whose last byte comes after the reload.
inline Seen late_post(
    const std::string& text, std::function<std::string(Scene&)> tell = [](Scene& s) { return s.result(); }) {
  return {[text](Scene& s) { s.send(text.substr(0, text.size() - 1)); },
          [text, tell](Scene& s) {
            s.send(text.substr(text.size() - 1));
            return tell(s);
          }};
}
inline Seen post_model(const std::string& more = "") { return late_post(with_body(body_for("m", more))); }
// Only what comes after the reload matters.
inline Seen after(std::function<std::string(Scene&)> end) {
  return {[](Scene&) {}, std::move(end)};
}

// A second client's request is on its way, and stays there.
inline void hold_one(Scene& s) {
  s.other = &s.gateway.connect();
  s.gateway.send(*s.other, kHeld);
}

inline Seen page(const std::string& path, const std::string& holds) {
  return after([=](Scene& s) {
    s.send("GET " + path + " HTTP/1.1\r\nHost: a\r\n\r\n");
    const std::string status = s.result();
    if (status != "200" || holds.empty()) return status;
    return std::string(s.answer.body.find(holds) != std::string::npos ? "yes" : "no");
  });
}

// ---- the rows

using ReloadRows = std::vector<ReloadRow>;

inline void add_server_rows(ReloadRows& rows) {
  const std::string hour = " = 1h", second = " = 1s";
  const std::string chunked = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
  const auto in_chunks = [=](std::size_t bytes) {
    const std::string body = body_for("m", R"(,"user":")" + std::string(bytes, 'x') + "\"");
    char size[16];
    std::snprintf(size, sizeof size, "%zx", body.size());
    return std::string(size) + "\r\n" + body + "\r\n0\r\n\r\n";
  };
  const auto wait = [](const std::string& begin) {
    return Seen{[begin](Scene& s) { s.send(begin); },
                [](Scene& s) {
                  s.pass(5 * kSecond);
                  return s.result();
                }};
  };
  rows.push_back({"server", "listen", When::restart, "", "", "", "", {}});
  rows.push_back({"server", "threads", When::restart, "", "", "", "", {}});
  rows.push_back({"server", "tls_listen", When::restart, "", "", "", "", {}});
  for (const char* key : {"tls_certificate", "tls_key", "tls_min_version", "tls_client_ca"}) {
    rows.push_back({"server", key, When::new_connections, "", "", "", "", {}});
  }
  rows.push_back({"server", "metrics_listen", When::restart, "", "", "", "", {}});
  rows.push_back({"server", "drain_timeout", When::at_once, "", "", "", "", {}});
  rows.push_back({"server", "max_connections", When::new_connections, "max_connections = 9", "max_connections = 1",
                  "200", "503", after([](Scene& s) {
                    s.connect();  // beside the one that is there
                    s.send("GET /health HTTP/1.1\r\nHost: a\r\n\r\n");
                    return s.result();
                  })});
  rows.push_back({"server",
                  "max_body",
                  When::new_requests,
                  "max_body = 64k",
                  "max_body = 1k",
                  "200",
                  "413",
                  {[=](Scene& s) { s.send(chunked); },
                   [=](Scene& s) {
                     s.send(in_chunks(2000));
                     return s.result();
                   }}});
  rows.push_back({"server",
                  "body_memory",
                  When::at_once,
                  "body_memory = 64M",
                  "body_memory = 1k",
                  "200",
                  "503",
                  {[=](Scene& s) { s.send(chunked); },
                   [=](Scene& s) {
                     s.other = &s.gateway.connect();
                     const std::string whole = with_body(std::string(1000, ' '));
                     s.gateway.send(*s.other, whole.substr(0, whole.size() - 1));
                     s.send(in_chunks(900));
                     return s.result();
                   }},
                  {{"server", "max_body = 1k"}}});
  rows.push_back({"server",
                  "max_header",
                  When::at_once,
                  "max_header = 16k",
                  "max_header = 1k",
                  "200",
                  "431",
                  {[](Scene& s) { s.send("GET /health HTTP/1.1\r\nHost: a\r\nX: " + std::string(900, 'x')); },
                   [](Scene& s) {
                     s.send(std::string(900, 'x') + "\r\n\r\n");
                     return s.result();
                   }}});
  rows.push_back({"server",
                  "max_fields",
                  When::new_requests,
                  "max_fields = 100",
                  "max_fields = 16",
                  "200",
                  "431",
                  {[](Scene& s) { s.send("GET /health HTTP/1.1\r\nHost: a\r\n"); },
                   [](Scene& s) {
                     std::string lines;
                     for (int i = 0; i < 20; ++i) lines += "X-" + std::to_string(i) + ": y\r\n";
                     s.send(lines + "\r\n");
                     return s.result();
                   }}});
  rows.push_back({"server", "max_pending", When::at_once, "max_pending = 0", "max_pending = 1", "200", "503",
                  late_post(with_body(body_for("m")))});
  const auto end = rows.back().seen.end;
  rows.back().seen.end = [=](Scene& s) {
    hold_one(s);
    return end(s);
  };
  rows.push_back({"server", "header_timeout", When::new_requests, "header_timeout" + hour, "header_timeout" + second,
                  "nothing", "408", wait("GET /hea")});
  rows.push_back({"server", "body_timeout", When::new_requests, "body_timeout" + hour, "body_timeout" + second,
                  "nothing", "408", wait(chunked)});
  rows.push_back({"server",
                  "idle_timeout",
                  When::new_requests,
                  "idle_timeout" + hour,
                  "idle_timeout" + second,
                  "open",
                  "closed",
                  {[](Scene& s) {
                     s.send("GET /health HTTP/1.1\r\nHost: a\r\n\r\n");
                     s.result();
                   },
                   [](Scene& s) {
                     s.pass(5 * kSecond);
                     return std::string(s.client->ended ? "closed" : "open");
                   }}});
  rows.push_back({"server",
                  "write_timeout",
                  When::at_once,
                  "write_timeout" + hour,
                  "write_timeout" + second,
                  "open",
                  "closed",
                  {[](Scene& s) {
                     s.serve = [](const auto&) {
                       return BackendPlan{{"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\nx"}, false, false};
                     };
                     s.send(with_body(body_for("m")));
                   },
                   [](Scene& s) {
                     s.gateway.net.stop_reading(*s.client, 1000);
                     s.gateway.net.send(s.backend(), std::string(200'000, 'x'));
                     s.gateway.settle();
                     s.pass(5 * kSecond);
                     return std::string(s.gateway.net.closed(*s.client) ? "closed" : "open");
                   }}});
  rows.push_back(
      {"server", "api_keys_file", When::new_requests, "", "api_keys_file = /keys", "200", "401", post_model()});
  rows.push_back({"server", "ollama_admin", When::at_once, "ollama_admin = b1", "ollama_admin = no", "200", "403",
                  late_post("POST /api/pull HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")});
  rows.push_back({"server", "cors_origins", When::new_requests, "", "cors_origins = http://page", "<absent>",
                  "http://page", late_post(with_body(body_for("m"), "Origin: http://page\r\n"), [](Scene& s) {
                    s.result();
                    return s.answer.value("Access-Control-Allow-Origin");
                  })});
}

inline void add_upstream_rows(ReloadRows& rows) {
  const auto held = [](const std::string& text) {
    return late_post(text, [](Scene& s) {
      s.pass(5 * kSecond);
      return s.result();
    });
  };
  rows.push_back({"upstream",
                  "connect_timeout",
                  When::at_once,
                  "connect_timeout = 1h",
                  "connect_timeout = 1s",
                  "nothing",
                  "504",
                  held(with_body(body_for("m"))),
                  {{"backend b1", "url = http://" + std::string(nexus::sim::kSilentHost) + ":8001"}}});
  rows.push_back({"upstream", "first_byte_timeout", When::at_once, "first_byte_timeout = 1h", "first_byte_timeout = 1s",
                  "nothing", "504", held(kHeld)});
  rows.push_back({"upstream",
                  "stall_timeout",
                  When::at_once,
                  "stall_timeout = 1h",
                  "stall_timeout = 1s",
                  "open",
                  "cut",
                  {[](Scene& s) {
                     s.serve = [](const auto&) {
                       return BackendPlan{{"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\nx"}, false, false};
                     };
                     s.send(with_body(body_for("m")));
                   },
                   [](Scene& s) {
                     s.gateway.net.send(s.backend(), "y");
                     s.gateway.settle();
                     s.pass(5 * kSecond);
                     return std::string(s.client->ended ? "cut" : "open");
                   }}});
  rows.push_back({"upstream",
                  "head_delay",
                  When::at_once,
                  "head_delay = 1h",
                  "head_delay = 1s",
                  "nothing",
                  "a head",
                  {[](Scene& s) {
                     s.serve = [](const auto&) {
                       return BackendPlan{{"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"}, false, false};
                     };
                   },
                   [](Scene& s) {
                     s.send(with_body(body_for("m")));
                     s.pass(5 * kSecond);
                     return std::string(s.client->received.empty() ? "nothing" : "a head");
                   }}});
  rows.push_back({"upstream",
                  "request_timeout",
                  When::new_requests,
                  "request_timeout = 0",
                  "request_timeout = 1s",
                  "nothing",
                  "504",
                  {[](Scene& s) { s.send(kHeld); },
                   [](Scene& s) {
                     s.pass(5 * kSecond);
                     return s.result();
                   }}});
  const auto kept = [](nexus::Ns span) {
    return late_post(with_body(body_for("m")), [span](Scene& s) {
      s.pass(span);
      return std::string(s.backend().ended ? "closed" : "kept");
    });
  };
  rows.push_back({"upstream", "idle_connections", When::at_once, "idle_connections = auto", "idle_connections = 0",
                  "kept", "closed", kept(0)});
  rows.push_back({"upstream", "idle_timeout", When::at_once, "idle_timeout = 1h", "idle_timeout = 1s", "kept", "closed",
                  kept(5 * kSecond)});
  rows.push_back({"upstream",
                  "resend",
                  When::at_once,
                  "resend = stale",
                  "resend = never",
                  "200",
                  "502",
                  {[](Scene& s) {
                     s.send(with_body(body_for("m")));
                     s.result();
                   },
                   [](Scene& s) {
                     s.count = 0;
                     s.serve = [&s](const auto&) { return s.count++ == 0 ? reset_answer() : json_answer(kGoodBody); };
                     s.send(with_body(body_for("m")));
                     return s.result();
                   }},
                  {{"routing", "retries = 0"}}});
}

// The rows of health checks: from `begin` on checks fail, or hang.
inline void add_health_rows(ReloadRows& rows) {
  const auto ails = [](BackendPlan ailing, nexus::Ns span, bool comes_back) {
    return Seen{[=](Scene& s) {
                  s.check = [&s, ailing](const auto&) {
                    return s.backend_ails ? ailing : json_answer(R"({"data":[{"id":"m"}]})");
                  };
                  s.backend_ails = true;
                  if (!comes_back) return;
                  s.pass(5 * kSecond);
                  s.backend_ails = false;
                },
                [span](Scene& s) {
                  s.pass(span);
                  s.send(with_body(body_for("m")));
                  return s.result();
                }};
  };
  const BackendPlan fails = json_answer("{}", "500 No");
  const Lines checks{{"health", "enabled = yes"}, {"health", "interval = 1s"}, {"health", "failures = 1"}};
  rows.push_back({"health",
                  "enabled",
                  When::at_once,
                  "enabled = no",
                  "enabled = yes",
                  "200",
                  "503",
                  ails(fails, 5 * kSecond, false),
                  {{"health", "interval = 1s"}, {"health", "failures = 1"}}});
  rows.push_back({"health",
                  "interval",
                  When::at_once,
                  "interval = 1h",
                  "interval = 1s",
                  "rarely",
                  "often",
                  {[](Scene& s) { s.count = s.checks(); },
                   [](Scene& s) {
                     s.pass(10 * kSecond);
                     return std::string(s.checks() - s.count > 5 ? "often" : "rarely");
                   }},
                  {{"health", "enabled = yes"}}});
  rows.push_back({"health", "timeout", When::at_once, "timeout = 1h", "timeout = 1s", "200", "503",
                  ails(no_answer(), 10 * kSecond, false), checks});
  rows.push_back({"health",
                  "failures",
                  When::at_once,
                  "failures = 100",
                  "failures = 1",
                  "200",
                  "503",
                  ails(fails, 5 * kSecond, false),
                  {{"health", "enabled = yes"}, {"health", "interval = 1s"}}});
  rows.push_back({"health", "recoveries", When::at_once, "recoveries = 100", "recoveries = 1", "503", "200",
                  ails(fails, 5 * kSecond, true), checks});
}

inline const Lines kSecondBackend{{"backend b1", "priority = 1"},
                                  {"backend b2", "url = http://10.0.0.2:8001"},
                                  {"backend b2", "models = m"},
                                  {"backend b2", "priority = 90"}};

inline Lines operator+(Lines lines, const Lines& more) {
  lines.insert(lines.end(), more.begin(), more.end());
  return lines;
}

// The backend that served.
inline std::string who(Scene& s) {
  s.result();
  return s.answer.value_or_empty("X-Nexus-Backend");
}

// A request of the key `client`, which has no options of its own, and one of `fixed`, which has some, wait for the only
// place; the result is the one that gets it. `client` was served more before. The reload comes amid its request that
// waits if `waiting`, else amid the one before.
inline Seen turns(bool waiting) {
  const auto request = [](const std::string& name, const std::string& user, std::size_t bytes) {
    return with_key(name, body_for("m", R"(,"user":")" + user + R"(","x":")" + std::string(bytes, 'x') + "\""));
  };
  const std::string first = request("client", "first", 600), last = request("client", "client", 0);
  const auto hold = [=](Scene& s) {
    s.other = &s.gateway.connect();
    s.gateway.send(*s.other, request("fixed", "hold", 0));
  };
  return {[=](Scene& s) {
            s.serve = [](const rfc9112::Message& message) {
              return message.body.find("first") == std::string::npos ? no_answer() : json_answer("{}");
            };
            s.gateway.send(s.gateway.connect(), request("fixed", "first", 400));
            if (waiting) s.send(first), hold(s);
            s.send((waiting ? last : first).substr(0, (waiting ? last : first).size() - 1));
          },
          [=](Scene& s) {
            s.send("}");
            if (!waiting) hold(s), s.send(last);
            s.gateway.send(s.gateway.connect(), request("fixed", "fixed", 0));
            s.gateway.net.break_off(*s.other);
            s.settle();
            const std::string body = s.last_request().body;
            return std::string(body.find("client") != std::string::npos ? "client" : "fixed");
          }};
}

inline void add_routing_rows(ReloadRows& rows) {
  const auto first_fails = [](Scene& s) {
    s.serve = [](const rfc9112::Message& message) {
      return message.value("Host") == "10.0.0.1:8001" ? reset_answer() : json_answer(kGoodBody);
    };
  };
  const auto ask_twice = [](Scene& s) {
    s.count = s.requests_at("10.0.0.1:8001");
    s.send(with_body(body_for("m")) + with_body(body_for("m")));
    s.result();
    return std::to_string(s.requests_at("10.0.0.1:8001") - s.count);
  };
  const Lines by_priority = kSecondBackend + Lines{{"routing", "strategy = priority"}};
  rows.push_back({"health",
                  "eject_after",
                  When::at_once,
                  "eject_after = 100",
                  "eject_after = 1",
                  "2",
                  "1",
                  {first_fails, ask_twice},
                  by_priority});
  rows.push_back({"health",
                  "eject_time",
                  When::at_once,
                  "eject_time = 1h",
                  "eject_time = 1s",
                  "b2",
                  "b1",
                  {[=](Scene& s) {
                     first_fails(s);
                     s.send(with_body(body_for("m")));
                     s.result();
                     s.serve = [](const auto&) { return json_answer(kGoodBody); };
                   },
                   [](Scene& s) {
                     s.pass(5 * kSecond);
                     s.send(with_body(body_for("m")));
                     return who(s);
                   }},
                  by_priority + Lines{{"health", "eject_after = 1"}}});
  rows.push_back({"routing", "strategy", When::at_once, "strategy = priority", "strategy = random", "priority",
                  "random",
                  late_post(with_body(body_for("m")),
                            [](Scene& s) {
                              s.result();
                              return s.answer.value_or_empty("X-Nexus-Route-Reason");
                            }),
                  kSecondBackend});
  rows.push_back({"routing", "retries", When::at_once, "retries = 0", "retries = 2", "1", "2",
                  late_post(with_body(body_for("m")),
                            [](Scene& s) {
                              s.count = s.requests_at("10.0.0.1:8001") + s.requests_at("10.0.0.2:8001");
                              return std::to_string(s.count);
                            }),
                  kSecondBackend});
  const auto begin = rows.back().seen.begin;
  rows.back().seen.begin = [=](Scene& s) {
    s.serve = [](const auto&) { return reset_answer(); };
    begin(s);
  };
  const auto loaded = [](Scene& s) {  // b1 is loaded, and b2 is not
    hold_one(s);
    s.send(with_body(body_for("m")));
    return who(s);
  };
  const auto weights = [](const std::string& a, const std::string& b) {
    return kSecondBackend + Lines{{"routing", a}, {"routing", b}};
  };
  rows.push_back({"routing", "weight_priority", When::at_once, "weight_priority = 100", "weight_priority = 0", "b1",
                  "b2", after(loaded), weights("weight_load = 10", "weight_latency = 0")});
  rows.push_back({"routing", "weight_load", When::at_once, "weight_load = 0", "weight_load = 100", "b1", "b2",
                  after(loaded), weights("weight_priority = 10", "weight_latency = 0")});
  rows.push_back({"routing",
                  "weight_latency",
                  When::at_once,
                  "weight_latency = 0",
                  "weight_latency = 100",
                  "b1",
                  "b2",
                  {[](Scene& s) {  // b1 takes 3 s; b2, to which a request goes only as a retry, 20 ms
                     const auto answer_after = [&s](nexus::Ns span) {
                       s.pass(span);
                       s.gateway.net.send(s.backend(), json_answer(kGoodBody).pieces[0]);
                       s.settle();
                     };
                     hold_one(s);
                     answer_after(3 * kSecond);
                     s.serve = [](const rfc9112::Message& message) {
                       return message.value("Host") == "10.0.0.1:8001" ? reset_answer() : no_answer();
                     };
                     s.gateway.send(*s.other, kHeld);
                     answer_after(20 * nexus::kMillisecond);
                     s.serve = [](const auto&) { return json_answer(kGoodBody); };
                   },
                   [](Scene& s) {
                     s.send(with_body(body_for("m")));
                     return who(s);
                   }},
                  weights("weight_priority = 10", "weight_load = 1")});
  const std::string of_session = with_body(body_for("m"), "Session-Id: s\r\n");
  const auto why = [](Scene& s) {
    s.result();
    return s.answer.value_or_empty("X-Nexus-Route-Reason");
  };
  rows.push_back({"routing", "affinity", When::at_once, "affinity = none", "affinity = session", "priority", "affinity",
                  late_post(of_session, why), by_priority});
  rows.push_back({"routing", "affinity_headers", When::at_once, "affinity_headers = none",
                  "affinity_headers = session-id", "priority", "affinity", late_post(of_session, why),
                  by_priority + Lines{{"routing", "affinity = session"}}});
  const auto fourth = [=](Scene& s) {  // of a session whose backend has three in flight, and the other none
    for (int i = 0; i < 3; ++i) {
      s.other = &s.gateway.connect();
      s.gateway.send(*s.other, with_body(body_for("m", R"(,"user":"hold")"), "Session-Id: s\r\n"));
    }
    s.send(of_session);
    return why(s);
  };
  rows.push_back({"routing", "affinity_slack", When::at_once, "affinity_slack = 0%", "affinity_slack = 1000%",
                  "affinity moved", "affinity", after(fourth),
                  Lines{{"routing", "affinity = session"},
                        {"backend b2", "url = http://10.0.0.2:8001"},
                        {"backend b2", "models = m"}}});
  rows.push_back({"queue",
                  "size",
                  When::at_once,
                  "size = 0",
                  "size = 9",
                  "429",
                  "nothing",
                  post_model(),
                  {{"backend b1", "max_pending = 1"}}});
  const auto end = rows.back().seen.end;
  const auto behind_one = [=](Scene& s) {
    hold_one(s);
    return end(s);
  };
  rows.back().seen.end = behind_one;
  rows.push_back({"queue",
                  "timeout",
                  When::at_once,
                  "timeout = 1h",
                  "timeout = 1s",
                  "nothing",
                  "503",
                  {rows.back().seen.begin,
                   [=](Scene& s) {
                     behind_one(s);
                     s.pass(5 * kSecond);
                     return s.result();
                   }},
                  {{"backend b1", "max_pending = 1"}, {"queue", "size = 9"}}});
  const std::string by_key = with_key("client", body_for("m"));
  const Lines with_keys{{"server", "api_keys_file = /keys"}};
  // The second of two requests, the first of which has ended, or goes on.
  const auto second = [=](bool held) {
    return Seen{[=](Scene& s) {
                  s.serve = [=](const auto&) { return held ? no_answer() : json_answer(kGoodBody); };
                  s.other = &s.gateway.connect();
                  s.gateway.send(*s.other, by_key);
                  s.send(by_key.substr(0, by_key.size() - 1));
                },
                [=](Scene& s) {
                  s.send(by_key.substr(by_key.size() - 1));
                  return s.result();
                }};
  };
  const Lines one_place{{"server", "api_keys_file = /keys"}, {"backend b1", "max_pending = 1"}, {"queue", "size = 9"}};
  rows.push_back(
      {"keys", "weight", When::new_requests, "weight = 1", "weight = 2", "fixed", "client", turns(false), one_place});
  rows.push_back({"keys", "priority", When::new_requests, "priority = 50", "priority = 49", "fixed", "client",
                  turns(true), one_place});
  rows.push_back({"keys", "max_pending", When::new_requests, "max_pending = 0", "max_pending = 1", "nothing", "429",
                  second(true), with_keys});
  rows.push_back({"keys", "rpm", When::new_requests, "rpm = 0", "rpm = 1", "200", "429", second(false), with_keys});
  rows.push_back({"keys", "tpm", When::new_requests, "tpm = 0", "tpm = 1", "200", "429", second(false), with_keys});
  rows.push_back({"keys", "fair_by", When::new_requests, "", "", "", "", {}});
  rows.push_back({"fallbacks", "MODEL", When::at_once, "", "x = m", "404", "200", late_post(with_body(body_for("x")))});
  rows.push_back({"aliases", "NAME", When::at_once, "", "x = m", "404", "200", late_post(with_body(body_for("x")))});
  rows.push_back(
      {"metrics", "enabled", When::at_once, "enabled = yes", "enabled = no", "200", "503", page("/metrics", "")});
  rows.push_back({"metrics",
                  "labels",
                  When::at_once,
                  "labels = sanitize",
                  "labels = raw",
                  "yes",
                  "no",
                  page("/metrics", "backend=\"b_1\""),
                  {{"backend b.1", "url = http://10.0.0.2:8001"}, {"backend b.1", "models = m"}}});
  const auto metrics_with_key = [](Scene& s) {
    s.send("GET /metrics HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer sk-client-0123456789\r\n\r\n");
    return s.result();
  };
  rows.push_back(
      {"keys", "admin", When::at_once, "admin = 1", "admin = 0", "200", "403", after(metrics_with_key), with_keys});
  const auto page_of_key = after([=](Scene& s) {
    metrics_with_key(s);
    return std::string(s.answer.body.find("key=\"client\"") != std::string::npos ? "yes" : "no");
  });
  rows.push_back({"metrics",
                  "keys",
                  When::at_once,
                  "keys = 0",
                  "keys = 1",
                  "no",
                  "yes",
                  page_of_key,
                  {{"server", "api_keys_file = /keys"}}});
  const auto flags = late_post(with_body(body_for("m")), [](Scene& s) {  // of the traceparent that the backend gets
    const std::string parent = s.last_request().value_or_empty("traceparent");
    return parent.empty() ? "none" : parent.substr(parent.size() - 2);
  });
  const std::string collector = "endpoint = http://10.0.0.9:4318";
  rows.push_back({"trace", "endpoint", When::new_requests, "endpoint = off", collector, "none", "01", flags});
  rows.push_back({"trace",
                  "trace_ratio",
                  When::new_requests,
                  "trace_ratio = 0",
                  "trace_ratio = 1",
                  "00",
                  "01",
                  flags,
                  {{"trace", collector}}});
  rows.push_back({"metrics", "openmetrics", When::at_once, "openmetrics = no", "openmetrics = yes", "no", "yes",
                  after([](Scene& s) {
                    s.send("GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: application/openmetrics-text\r\n\r\n");
                    s.result();
                    return std::string(s.answer.body.ends_with("# EOF\n") ? "yes" : "no");
                  })});
  // A request for a stream, which gets this answer, is judged or not.
  const auto judged = [](const std::string& status) {
    const Seen post = post_model(R"(,"stream":true)");
    return Seen{[=](Scene& s) {
                  s.serve = [=](const auto&) { return json_answer(kGoodBody, status); };
                  post.begin(s);
                },
                [=](Scene& s) {
                  post.end(s);
                  return page("/metrics", "nexus_slo_requests_total{").end(s);
                }};
  };
  rows.push_back({"slo", "ttft", When::at_once, "ttft = 0", "ttft = 1h", "no", "yes", judged("200 OK")});
  rows.push_back({"slo", "tpot", When::at_once, "tpot = 0", "tpot = 1h", "no", "yes", judged("500 Error")});
  for (const char* key : {"level", "format", "access"}) {
    rows.push_back({"log", key, When::at_once, "", "", "", "", {}});
  }
}

inline void add_backend_rows(ReloadRows& rows) {
  const auto at_backend = [](std::string_view field) {
    return late_post(with_body(body_for("m", R"(,"stream":true)")), [field](Scene& s) {
      const rfc9112::Message request = s.last_request();
      if (field == "body") return std::string(request.body.find("include_usage") == std::string::npos ? "no" : "yes");
      return request.value_or_empty(std::string(field));
    });
  };
  const std::string image = R"(,"messages":[{"content":[{"type":"image_url","image_url":{"url":"u"}}]}])";
  const std::string tools = R"(,"tools":[{"type":"function"}])";
  const std::string json_mode = R"(,"response_format":{"type":"json_object"})";
  const std::string text = R"(,"messages":[{"content":")" + std::string(4000, 'x') + "\"}]";
  rows.push_back({"backend", "url", When::at_once, "url = http://10.0.0.1:8001", "url = http://10.0.0.2:8001",
                  "10.0.0.1:8001", "10.0.0.2:8001", at_backend("Host")});
  for (const char* key : {"tls_ca", "tls_verify", "tls_name", "tls_certificate", "tls_key"}) {
    rows.push_back({"backend", key, When::at_once, "", "", "", "", {}});
  }
  rows.push_back({"backend", "type", When::at_once, "type = generic", "type = vllm", "no", "yes", at_backend("body")});
  rows.push_back({"backend",
                  "priority",
                  When::at_once,
                  "priority = 1",
                  "priority = 99",
                  "b1",
                  "b2",
                  late_post(with_body(body_for("m")), who),
                  {{"routing", "strategy = priority"},
                   {"backend b2", "url = http://10.0.0.2:8001"},
                   {"backend b2", "models = m"},
                   {"backend b2", "priority = 50"}}});
  rows.push_back({"backend", "models", When::at_once, "models = m", "models = other", "200", "404", post_model()});
  rows.push_back({"backend", "api_key_env", When::at_once, "api_key_env = KEY_A", "api_key_env = KEY_B",
                  "Bearer a-key-of-a-backend", "Bearer b-key-of-a-backend", at_backend("Authorization")});
  rows.push_back({"backend", "api_key_file", When::at_once, "api_key_file = /a", "api_key_file = /b",
                  "Bearer a-key-of-a-backend", "Bearer b-key-of-a-backend", at_backend("Authorization")});
  rows.push_back(
      {"backend", "max_pending", When::at_once, "max_pending = 0", "max_pending = 1", "200", "429", post_model()});
  const auto end = rows.back().seen.end;
  rows.back().seen.end = [=](Scene& s) {
    hold_one(s);
    return end(s);
  };
  rows.push_back({"backend", "stream_usage", When::at_once, "stream_usage = as_is", "stream_usage = ask", "no", "yes",
                  at_backend("body")});
  rows.push_back({"backend", "apis", When::at_once, "apis = all", "apis = embeddings", "200", "501", post_model()});
  rows.push_back(
      {"backend", "vision", When::at_once, "vision = all", "vision = none", "200", "400", post_model(image)});
  rows.push_back({"backend", "tools", When::at_once, "tools = all", "tools = none", "200", "400", post_model(tools)});
  rows.push_back({"backend", "json_mode", When::at_once, "json_mode = all", "json_mode = none", "200", "400",
                  post_model(json_mode)});
  rows.push_back({"backend", "context_length", When::at_once, "context_length = 100000", "context_length = 100", "200",
                  "400", post_model(text)});
  rows.push_back({"backend", "token_delay", When::new_requests, "", "", "", "", {}});
}

inline ReloadRows reload_rows() {
  ReloadRows rows;
  add_server_rows(rows);
  add_upstream_rows(rows);
  add_health_rows(rows);
  add_routing_rows(rows);
  add_backend_rows(rows);
  return rows;
}

}  // namespace hostile
