// swarm.h
// Owns:     the parameters of one seed's run: the rate of each fault, the peers' behaviour, and Nexus's configurations.
// Promises: all are drawn from the seed before the run begins. Many seeds have none of a given fault and some have much
//           of it, so faults occur in all combinations.
// Leaves:   acting on them to wire.h, clients.h and fleet.h.
// Threads:  one.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "nexus/config/settings.h"
#include "reloads.h"
#include "tests/lib/wire.h"

namespace nexus::sim {

constexpr std::uint32_t kServers = 6;               // servers that exist; a configuration names some of them
constexpr std::uint32_t kAddresses = kServers + 2;  // nobody is at the last ones; host names may stand for them
constexpr std::uint32_t kNames = 4;                 // of hosts: h0 to h3
constexpr std::uint32_t kMostOfName = 3;            // addresses
constexpr std::uint32_t kModels = 6;

// How often backends misbehave, in each way.
struct Manners {
  Rate refuse, refuse_at_once, ignore;  // a new connection
  Rate die_and_return;                  // on each request: all connections reset, then refused for a time
  Rate error_status;                    // 4xx and 5xx
  Rate hollow;                          // a 200 without an event or a body
  Rate error_event;                     // in a stream, anywhere
  Rate comments_first;                  // before the first event of a stream
  Rate early_head;                      // sends the head, and the first byte that means something long after it
  Rate malformed_head, malformed_body, overlong;
  Rate truncated, reset, stall;
  Rate interim;                                                    // sends 1xx before the response
  Rate early;                                                      // responds before it has read the body
  Rate close_idle;                                                 // ends a kept-alive connection, at any time
  Rate unasked;                                                    // sends bytes on it that no request asked for
  Rate close_under_request;                                        // ends it as the next request arrives
  Rate slow;                                                       // pauses within the response
  Rate never_reads;                                                // ignores the request's body
  Rate large;                                                      // sends a large response
  Rate name_late, name_mute, name_fails, name_part, name_refused;  // a lookup of a host name
  Rate name_moves, name_dead;                                      // what the name stands for
};

// How often clients behave in each of these ways.
struct Habits {
  Rate http_1_0, pipelined, chunked_body, expect_continue, wrong_request, page;
  Rate aborts_sending, aborts_receiving, aborts_by_time;
  Rate half_closes;  // sends a FIN after the request and keeps reading
  Rate slow_reader, stalled_reader, stalled_sender;
  Rate large_body;
  bool crowded = false;  // every second client has the second key, and gets long answers
};

struct Swarm {
  bool gentle = false;  // no faults except delays and split writes, so every request must succeed
  std::uint32_t workers = 1;
  std::uint32_t clients = 4;
  std::uint32_t requests = 100;
  std::uint32_t reloads = 0;
  bool drains = false;
  bool stops = false;  // Nexus is stopped at a random time
  bool memory_fails = false;
  Rate memory_fault;
  Rate late_turn;  // a loop runs later than it is due
  Ns late_by_ns = 0;
  Ns turn_ns = 0;  // the longest duration of a turn
  Weather weather;
  Manners manners;
  Habits habits;
  Ns latency_ns = 0, jitter_ns = 0, gap_ns = 0;
  Rate split;
  std::uint32_t most_pieces = 1;
  std::size_t least_window = 256u << 10;
  Ns think_ns = 0;
  std::size_t most_descriptors = SIZE_MAX;
  std::uint32_t lacks = 0;  // times in which this host has no descriptor, port or memory for connections to backends

  // The properties of a new connection.
  Shape draw_shape(Dice& dice) const {
    Shape shape;
    shape.latency_ns = latency_ns;
    shape.jitter_ns = jitter_ns;
    shape.split = split;
    shape.most_pieces = most_pieces;
    shape.gap_ns = gap_ns;
    shape.window_bytes = dice.one_in(2) ? 256u << 10 : std::max<std::size_t>(least_window, 1);
    return shape;
  }
};

class SwarmMaker {
 public:
  explicit SwarmMaker(Dice& dice) : dice_(dice), brutality_(dice.number(0, 4)) {}

  Swarm make() {
    Swarm swarm;
    swarm.workers = dice_.number(1, 3);
    swarm.clients = dice_.skewed(1, 40);
    swarm.requests = dice_.number(60, 400);
    swarm.reloads = dice_.one_in(3) ? dice_.number(1, 4) : 0;
    swarm.drains = dice_.one_in(4);
    swarm.stops = dice_.one_in(8);
    if (dice_.one_in(5)) {
      swarm.memory_fails = true;
      swarm.memory_fault = per_mille(dice_.number(5, 200));
    }
    swarm.late_turn = often(100);
    swarm.late_by_ns = dice_.span(kMillisecond, 500 * kMillisecond);
    swarm.turn_ns = dice_.one_in(2) ? dice_.span(0, 500 * kMicrosecond) : 0;
    swarm.latency_ns = dice_.span(5 * kMicrosecond, dice_.one_in(4) ? 100 * kMillisecond : kMillisecond);
    swarm.jitter_ns = dice_.one_in(2) ? dice_.span(0, 10 * kMillisecond) : 0;
    swarm.gap_ns = dice_.one_in(2) ? dice_.span(0, 5 * kMillisecond) : 0;
    swarm.split = often(900);
    swarm.most_pieces = dice_.number(2, dice_.one_in(4) ? 40 : 6);
    swarm.least_window = dice_.one_in(3) ? dice_.number(1, 2000) : dice_.number(4, 256) << 10;
    swarm.think_ns = dice_.span(0, 200 * kMillisecond);
    if (dice_.one_in(6)) swarm.most_descriptors = dice_.number(3, 30);
    if (dice_.one_in(4)) swarm.lacks = dice_.number(1, 4);
    swarm.weather = weather();
    swarm.manners = manners();
    swarm.habits = habits();
    if (dice_.one_in(8)) make_gentle(swarm);
    return swarm;
  }

  // A few requests of every kind, without other faults: together they reach all of Nexus's paths.
  static Swarm make_small() {
    Swarm swarm;
    swarm.workers = 2;
    swarm.clients = 3;
    swarm.requests = 20;
    swarm.latency_ns = 50 * kMicrosecond;
    swarm.think_ns = 5 * kMillisecond;
    swarm.weather.edge_delay_ns = kMillisecond;
    swarm.manners.error_status = per_mille(150);
    swarm.manners.slow = per_mille(300);
    swarm.manners.large = per_mille(50);
    Habits& habits = swarm.habits;
    habits.pipelined = per_mille(300);
    habits.chunked_body = per_mille(300);
    habits.expect_continue = per_mille(100);
    habits.page = per_mille(250);
    habits.aborts_receiving = per_mille(80);
    habits.large_body = per_mille(150);
    return swarm;
  }

  // Only clients that leave within their request's body: the first request that is counted is a 499.
  static Swarm make_leavers() {
    Swarm swarm = make_small();
    swarm.requests = 8;
    swarm.manners = Manners{};
    swarm.split = per_mille(1000);  // so that Nexus reads the head before the end arrives
    swarm.most_pieces = 4;
    swarm.gap_ns = kMillisecond;
    swarm.habits = Habits{};
    swarm.habits.aborts_sending = per_mille(1000);
    return swarm;
  }

  // Clients of two keys that ask again at once, and never find a place free.
  static Swarm make_crowd() {
    Swarm swarm;
    swarm.gentle = true;
    swarm.workers = 2;
    swarm.clients = 12;
    swarm.requests = 400;
    swarm.latency_ns = 50 * kMicrosecond;
    swarm.weather.edge_delay_ns = 100 * kMicrosecond;
    swarm.manners.slow = per_mille(1000);
    swarm.habits.crowded = true;
    return swarm;
  }

  // A few requests while a reload is taken.
  static Swarm make_reload() {
    Swarm swarm = make_small();
    swarm.requests = 6;
    swarm.manners = Manners{};
    swarm.habits = Habits{};
    return swarm;
  }

 private:
  void make_gentle(Swarm& swarm) {
    swarm.gentle = true;
    swarm.reloads = swarm.lacks = 0;
    swarm.drains = swarm.stops = swarm.memory_fails = false;
    swarm.late_turn = Rate{};
    swarm.turn_ns = swarm.jitter_ns = 0;
    swarm.latency_ns = dice_.span(5 * kMicrosecond, 100 * kMicrosecond);
    swarm.gap_ns = dice_.span(0, 20 * kMicrosecond);
    swarm.least_window = std::max<std::size_t>(swarm.least_window, 4096);
    swarm.most_descriptors = SIZE_MAX;
    swarm.manners = Manners{};
    const Habits drawn = swarm.habits;
    swarm.habits = Habits{};
    swarm.habits.http_1_0 = drawn.http_1_0;
    swarm.habits.pipelined = drawn.pipelined;
    swarm.habits.chunked_body = drawn.chunked_body;
    Weather& weather = swarm.weather;
    weather.accept_fails = weather.connect_fails = weather.watch_fails = Rate{};
    weather.edge_delay_ns = 100 * kMicrosecond;
  }

  // Never, rarely, or up to `most` in a thousand.
  Rate often(std::uint32_t most) {
    if (dice_.number(1, 4) > brutality_) return Rate{};
    return per_mille(dice_.one_in(2) ? dice_.number(1, most) : dice_.skewed(1, most));
  }

  Weather weather() {
    Weather w;
    w.eagain_read = often(200);
    w.eagain_write = often(200);
    w.short_read = often(300);
    w.short_write = often(300);
    w.accept_fails = often(100);
    w.connect_fails = often(100);
    w.watch_fails = often(30);
    w.spurious_event = often(100);
    w.reset_overtakes = often(700);
    w.edge_delay_ns = dice_.span(kMicrosecond, 20 * kMillisecond);
    return w;
  }
  Manners manners() {
    Manners m;
    m.refuse = often(300);
    m.refuse_at_once = often(200);
    m.ignore = often(60);
    m.die_and_return = often(20);
    m.error_status = often(300);
    m.hollow = often(300);
    m.error_event = often(300);
    m.comments_first = often(400);
    m.early_head = often(300);
    m.malformed_head = often(100);
    m.malformed_body = often(100);
    m.overlong = often(100);
    m.truncated = often(150);
    m.reset = often(150);
    m.stall = often(50);
    m.interim = often(150);
    m.early = often(200);
    m.close_idle = often(300);
    m.close_under_request = often(300);
    m.slow = often(400);
    m.never_reads = often(20);
    m.large = often(80);
    m.unasked = often(200);
    m.name_late = often(500);
    m.name_mute = often(100);
    m.name_fails = often(400);
    m.name_part = often(300);
    m.name_refused = often(100);
    m.name_moves = often(600);
    m.name_dead = often(400);
    return m;
  }
  Habits habits() {
    Habits h;
    h.http_1_0 = often(300);
    h.pipelined = often(500);
    h.chunked_body = often(500);
    h.expect_continue = often(200);
    h.wrong_request = often(250);
    h.page = often(200);
    h.aborts_sending = often(250);
    h.aborts_receiving = often(250);
    h.aborts_by_time = often(250);
    h.half_closes = often(200);
    h.slow_reader = often(400);
    h.stalled_reader = often(60);
    h.stalled_sender = often(60);
    h.large_body = often(100);
    return h;
  }

  Dice& dice_;
  std::uint32_t brutality_;
};

constexpr std::uint16_t kServerPort = 9000;

inline Address address_of_server(std::uint32_t server) {
  return *parse_address("10.0.0." + std::to_string(server + 1), kServerPort);
}

inline std::uint32_t server_at(const Address& address) { return address.ip[3] - 1u; }

// Makes configurations: the first one, and those of the reloads.
constexpr const char* kCollectorHost = "10.0.0.98";
constexpr std::uint16_t kCollectorPort = 4318;

class SettingsMaker {
 public:
  explicit SettingsMaker(Dice& dice) : dice_(dice) {}

  // `gentle`: a run without faults must not reach any limit except the queue's.
  std::shared_ptr<const Settings> first(bool gentle) {
    if (!gentle) {
      server();
      upstream();
      by_name_ = dice_.one_in(3);
    }
    settings_.log.level = LogLevel::error;
    settings_.log.access = "stderr";
    settings_.health.enabled = !dice_.one_in(3);
    settings_.health.interval_ns = dice_.span(200 * kMillisecond, 5 * kSecond);
    settings_.health.timeout_ns = dice_.span(100 * kMillisecond, kSecond);
    settings_.health.failures = dice_.number(1, 3);
    settings_.health.recoveries = dice_.number(1, 2);
    settings_.health.eject_after = dice_.number(1, 8);
    settings_.health.eject_time_ns = dice_.span(10 * kMillisecond, 2 * kSecond);
    routing();
    if (dice_.one_in(2)) settings_.slo.ttft_ns = dice_.span(kMillisecond, kSecond);
    settings_.metrics.openmetrics = dice_.one_in(2);
    const std::uint32_t count = dice_.number(1, 4);
    for (std::uint32_t i = 0; i < count; ++i) add_backend();
    return now();
  }

  // Every request is sampled, and the collector is dead.
  void make_spans() { settings_.trace.collector = {kCollectorHost, kCollectorPort}; }

  // One worker whose backends are often full; one model has a fallback, another an alias; health checks are on.
  std::shared_ptr<const Settings> small() {
    settings_.server.idle_timeout_ns = settings_.upstream.idle_timeout_ns = 200 * kMillisecond;
    settings_.server.write_timeout_ns = settings_.server.body_timeout_ns = kSecond;
    settings_.log.level = LogLevel::warning;
    settings_.log.access = "stderr";
    settings_.health.interval_ns = 100 * kMillisecond;
    settings_.health.timeout_ns = 50 * kMillisecond;
    settings_.health.eject_after = 100;
    settings_.routing.retries = 1;
    settings_.queue.size = 5;
    settings_.queue.timeout_ns = 2 * kSecond;
    settings_.aliases = {{"a0", "m0"}, {"a1", "a0"}};
    settings_.fallbacks = {{"m1", {"m5"}}, {"m3", {"m5"}}};
    settings_.slo = {.ttft_ns = 20 * kMillisecond, .tpot_ns = kMillisecond};
    settings_.metrics.openmetrics = true;
    add(0, BackendKind::ollama, 1, {});
    add(1, BackendKind::vllm, 1, {"m0", "m1", "m2", "m3", "m4"});
    add(2, BackendKind::openai, 0, {"m5"});
    return std::make_shared<const Settings>(settings_);
  }
  // One backend with two places, and a queue for all; the second key has three times the weight of the first.
  std::shared_ptr<const Settings> crowd() {
    settings_.server.api_keys = {{"sim", "sk-sim", {.weight = 1}}, {"rest", "sk-rest", {.weight = 3}}};
    settings_.log.level = LogLevel::error;
    settings_.log.access = "stderr";
    settings_.health.enabled = false;
    settings_.queue.size = 100;
    settings_.queue.timeout_ns = 3600 * kSecond;  // no request becomes urgent by its age
    settings_.upstream.first_byte_timeout_ns = settings_.upstream.stall_timeout_ns = 3600 * kSecond;
    settings_.server.idle_timeout_ns = kSecond;
    settings_.aliases = {{"a0", "m0"}, {"a1", "a0"}};
    add(0, BackendKind::generic, 2, {"m0", "m1", "m2", "m3", "m4", "m5"});
    return std::make_shared<const Settings>(settings_);
  }
  // The small settings with one more backend, which has a cap.
  std::shared_ptr<const Settings> with_another() {
    add(3, BackendKind::generic, 2, {"m0"});
    return now();
  }

  // Clients, or backends, speak TLS; also those that a reload adds. Call first.
  void speak_tls(const TlsWorld* clients, const TlsWorld* backends) {
    tls_clients_ = clients;
    tls_backends_ = backends;
  }
  std::shared_ptr<const Settings> now() {
    apply_tls();
    return std::make_shared<const Settings>(settings_);
  }

  // The settings with a few random changes.
  std::shared_ptr<const Settings> next(ReloadCoverage::Keys& changed) {
    if (dice_.one_in(3)) change_backends();
    const std::uint32_t most = dice_.one_in(2) ? 100 : 8;  // so that make test sees each key in each state
    for (std::uint32_t changes = dice_.number(1, most); changes > 0; --changes) {
      std::size_t key = dice_.index(kKeyChanges.size());
      while (kKeyChanges[key].change == nullptr) key = (key + 1) % kKeyChanges.size();
      kKeyChanges[key].change({settings_, dice_});
      changed.set(key);
    }
    return now();
  }

 private:
  void apply_tls() {
    if (tls_clients_ != nullptr) settings_.server.tls = tls_clients_->server;
    for (BackendSettings& backend : settings_.backends) {
      backend.tls.on = tls_backends_ != nullptr;
      if (tls_backends_ != nullptr) backend.tls.context = tls_backends_->client;
    }
  }

  void server() {
    ServerSettings& server = settings_.server;
    server.max_connections = dice_.one_in(6) ? dice_.number(1, 10) : 10'000;
    server.max_body_bytes = dice_.one_in(6) ? dice_.number(100, 4000) : 1u << 20;
    server.body_memory_bytes = dice_.one_in(6) ? dice_.number(1000, 100'000) : 64u << 20;
    server.max_header_bytes = dice_.one_in(6) ? dice_.number(300, 1000) : 16u << 10;
    server.header_timeout_ns = dice_.span(200 * kMillisecond, 3 * kSecond);
    server.body_timeout_ns = dice_.span(200 * kMillisecond, 3 * kSecond);
    server.idle_timeout_ns = dice_.span(50 * kMillisecond, 3 * kSecond);
    server.write_timeout_ns = dice_.span(200 * kMillisecond, 3 * kSecond);
    if (dice_.one_in(5)) server.api_keys = {{"sim", "sk-sim"}, {"rest", "sk-rest"}};
  }
  void upstream() {
    UpstreamSettings& upstream = settings_.upstream;
    upstream.connect_timeout_ns = dice_.span(20 * kMillisecond, kSecond);
    upstream.first_byte_timeout_ns = dice_.span(50 * kMillisecond, 2 * kSecond);
    upstream.stall_timeout_ns = dice_.span(50 * kMillisecond, 2 * kSecond);
    upstream.head_delay_ns = dice_.one_in(4) ? 0 : dice_.span(kMillisecond, 2 * kSecond);
    upstream.request_timeout_ns = dice_.one_in(4) ? dice_.span(20 * kMillisecond, 2 * kSecond) : 0;
    upstream.idle_connections = dice_.one_in(4) ? dice_.number(0, 2) : kAutomatic;
    upstream.idle_timeout_ns = dice_.span(20 * kMillisecond, 3 * kSecond);
  }
  void routing() {
    settings_.routing.strategy = static_cast<Strategy>(dice_.number(0, 4));
    settings_.routing.retries = dice_.number(0, 4);
    settings_.routing.affinity = static_cast<Affinity>(dice_.number(0, 3));
    settings_.queue.size = dice_.one_in(2) ? dice_.number(1, 20) : 0;
    settings_.queue.timeout_ns = dice_.span(10 * kMillisecond, 2 * kSecond);
    if (!dice_.one_in(3)) settings_.aliases = {{"a0", "m0"}, {"a1", "a0"}, {"a3", "m3"}};
    if (dice_.one_in(3)) settings_.fallbacks = {{"m1", {"m2"}}, {"m3", {"a3", "m4", "m0"}}};
  }
  void add(std::uint32_t server, BackendKind kind, std::uint32_t cap, std::vector<std::string> models) {
    BackendSettings backend;
    backend.name = "b" + std::to_string(made_++);
    backend.kind = kind;
    backend.address = {"10.0.0." + std::to_string(server + 1), kServerPort};
    backend.max_pending = cap;
    backend.models = std::move(models);
    settings_.backends.push_back(std::move(backend));
  }
  void add_backend() {
    BackendSettings backend;
    backend.name = "b" + std::to_string(made_++);
    constexpr BackendKind kKinds[] = {BackendKind::ollama, BackendKind::vllm, BackendKind::llamacpp,
                                      BackendKind::openai, BackendKind::generic};
    backend.kind = kKinds[dice_.index(std::size(kKinds))];
    settle(backend);
    backend.priority = dice_.number(1, 100);
    backend.max_pending = dice_.one_in(2) ? dice_.number(1, 4) : 0;
    if (dice_.one_in(3)) backend.api_key = "sk-of-" + backend.name;
    backend.stream_usage = static_cast<StreamUsage>(dice_.number(0, 2));
    if (dice_.one_in(2)) backend.models = some_models();
    for (Capability* which : {&backend.vision, &backend.tools, &backend.json_mode}) {
      if (dice_.one_in(6)) *which = {true, some_models()};
    }
    if (dice_.one_in(8)) backend.context_length = {{"*", dice_.number(10, 1000)}};
    settings_.backends.push_back(std::move(backend));
  }
  void settle(BackendSettings& backend) {
    const std::uint32_t server = dice_.number(0, kServers - 1);
    backend.address = {"10.0.0." + std::to_string(server + 1), kServerPort};
    if (by_name_ && !dice_.one_in(3)) backend.address.host = "h" + std::to_string(dice_.number(0, kNames - 1));
    backend.base_path = dice_.one_in(4) ? "/base" : "";
  }
  std::vector<std::string> some_models() {
    std::vector<std::string> models;
    for (std::uint32_t i = 0; i < kModels; ++i) {
      if (!dice_.one_in(6)) models.push_back("m" + std::to_string(i));
    }
    if (models.empty()) models.push_back("m0");
    return models;
  }

  void change_backends() {
    auto& backends = settings_.backends;
    switch (dice_.number(0, 2)) {
      case 0: return add_backend();
      case 1:
        if (backends.size() > 1)
          backends.erase(backends.begin() + static_cast<std::ptrdiff_t>(dice_.index(backends.size())));
        return;
      case 2: return settle(backends[dice_.index(backends.size())]);
    }
  }

  Dice& dice_;
  Settings settings_;
  const TlsWorld* tls_clients_ = nullptr;
  const TlsWorld* tls_backends_ = nullptr;
  std::uint32_t made_ = 0;
  bool by_name_ = false;  // some backends are given by a host name
};

}  // namespace nexus::sim
