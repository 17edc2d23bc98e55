// affinity_test.cpp
// Goal:   requests of one session find the same backend, several gateways agree, and no backend gets too much.
// Method: thousands of keys over fleets with and without one backend, counted; arrivals and ends drawn at random,
//         against the bound; heads and bodies with and without names of a session.
#include "nexus/fleet/affinity.h"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <map>
#include <random>
#include <set>

#include "nexus/api/incremental_json.h"
#include "nexus/fleet/router.h"

using namespace nexus;

namespace {

constexpr int kKeys = 4'000;

std::uint64_t key_of(int i) { return affinity_hash("session-" + std::to_string(i)); }

// Backends `gpu-0` … in an order of its own, as another instance may have them.
struct Gateway {
  Snapshot snapshot;
  std::vector<BackendLoad> loads;
  RoutingSettings routing;
  mutable std::uint64_t turn = 0;
  mutable std::vector<Choice> out;

  explicit Gateway(const std::vector<int>& backends) : loads(backends.size()) {
    routing.affinity = Affinity::session;
    ModelEntry& model = snapshot.models["m"];
    model.name = model.target = "m";
    for (const int i : backends) {
      BackendView view;
      view.id = BackendId{static_cast<std::uint32_t>(snapshot.backends.size() + 1)};
      view.name = "gpu-" + std::to_string(i);
      view.affinity = affinity_hash(view.name);
      view.healthy = true;
      view.facts = std::make_shared<ServerFacts>();
      model.offers.push_back({static_cast<std::uint32_t>(snapshot.backends.size()), {}});
      snapshot.backends.push_back(view);
    }
  }
  BackendView& backend(std::size_t i) { return snapshot.backends[i]; }

  // `seen_at`: if not given, of a backend that is gone.
  const Choice& choose(std::uint64_t key, std::uint16_t seen_at = 2) const {
    RouteNeeds needs;
    needs.affinity = key;
    needs.seen_at = seen_at;
    const auto load_of = [&](const BackendView& view) { return loads[index_of(view.id) - 1]; };
    turn += 1;
    std::vector<Choice> unordered;
    route(snapshot, *snapshot.find("m"), needs, routing, mix(turn), load_of, unordered);
    out.clear();
    BestFirst order(unordered, turn);
    while (const Choice* choice = order.next()) out.push_back(*choice);
    return out.front();
  }
  std::string name(std::uint64_t key) const { return snapshot.backends[choose(key).backend].name; }
  std::string reason(std::uint64_t key) const {
    std::string text;
    append_reason(text, choose(key));
    return text;
  }
};

// A head with these fields, and a body.
struct Request {
  std::string head;
  FieldTable fields;
  RoutingSettings routing;
  BodyFacts facts;
  JsonReader json;
  std::string body;

  Request() { routing.affinity = Affinity::session; }
  Request& field(const std::string& name, const std::string& value) {
    FieldRow& row = fields.rows[fields.count++];
    row.name_at = static_cast<std::uint32_t>(head.size());
    row.name_bytes = static_cast<std::uint32_t>(name.size());
    row.value_at = row.name_at + row.name_bytes;
    row.value_bytes = static_cast<std::uint32_t>(value.size());
    head += name + value;
    return *this;
  }
  Request& with_body(const std::string& members, const Endpoint& endpoint = kEndpoints.front(),
                     const std::string& model = "m") {
    body = R"({"model":")" + model + "\"" + members + "}" + std::string(kPaddingBytes, ' ');
    REQUIRE_FALSE(read_body(json, endpoint, text(), facts));
    return *this;
  }
  std::string_view text() const { return {body.data(), body.size() - std::min(body.size(), kPaddingBytes)}; }
  std::uint64_t key(std::string_view client = "") const {
    return affinity_key(routing, head.data(), fields, text(), facts, client);
  }
};

std::uint64_t key_of_field(const std::string& name, const std::string& value) {
  return Request().field(name, value).key();
}
std::uint64_t key_of_body(const std::string& members) { return Request().with_body(members).key(); }

}  // namespace

TEST_CASE("affinity: two gateways with their backends in another order agree on every key") {
  const Gateway one({0, 1, 2, 3, 4}), other({3, 1, 4, 0, 2});
  int apart = 0;
  for (int i = 0; i < kKeys; ++i) apart += one.name(key_of(i)) == other.name(key_of(i)) ? 0 : 1;
  CHECK(apart == 0);
}

TEST_CASE("affinity: keys spread evenly, and without one of n backends only its own keys move, evenly") {
  for (const std::size_t n : {2u, 3u, 16u}) {
    CAPTURE(n);
    std::vector<int> all(n);
    for (std::size_t i = 0; i < n; ++i) all[i] = static_cast<int>(i);
    const Gateway whole(all), less(std::vector<int>(all.begin() + 1, all.end()));
    std::map<std::string, int> before, moved;
    int strayed = 0;
    for (int i = 0; i < kKeys; ++i) {
      const std::string home = whole.name(key_of(i)), now = less.name(key_of(i));
      before[home] += 1;
      if (home == "gpu-0") moved[now] += 1;
      strayed += home != "gpu-0" && now != home ? 1 : 0;
    }
    const double share = kKeys / static_cast<double>(n), deviation = std::sqrt(share);
    CHECK(strayed == 0);
    CHECK(before.size() == n);
    for (const auto& [name, count] : before) CHECK(std::abs(count - share) < 5 * deviation);
    for (const auto& [name, count] : moved) {
      const double expected = share / static_cast<double>(n - 1);
      CHECK(std::abs(count - expected) < 5 * std::sqrt(expected) + 1);
    }
  }
}

TEST_CASE("affinity: the last byte and the length of a name matter, and no bit of the hash is idle") {
  std::set<std::uint64_t> seen;
  const std::string zeros(64, '\0');
  for (std::size_t bytes = 0; bytes <= zeros.size(); ++bytes)
    seen.insert(affinity_hash(std::string_view(zeros).substr(0, bytes)));
  CHECK(seen.size() == zeros.size() + 1);
  std::array<int, 64> ones{};
  for (int i = 0; i < kKeys; ++i) {
    std::uint64_t left = key_of(i);
    for (int& count : ones) {
      count += static_cast<int>(left & 1);
      left >>= 1;
    }
  }
  for (const int count : ones) CHECK(std::abs(count - kKeys / 2) < 5 * std::sqrt(kKeys) / 2);
  // To the letter: other versions and machines must agree.
  CHECK(affinity_hash("session-0") == 16177311200688460134u);
  CHECK(affinity_hash("", 1) == 6238072747940578789u);
}

TEST_CASE("affinity: the bound is the average with the new request, and the slack above it, rounded up") {
  CHECK(affinity_bound(0, 3, 25) == 1);
  CHECK(affinity_bound(3, 4, 0) == 1);
  CHECK(affinity_bound(4, 4, 0) == 2);
  CHECK(affinity_bound(15, 4, 25) == 5);
  CHECK(affinity_bound(16, 4, 25) == 6);
  CHECK(affinity_bound(9, 1, 0) == 10);
  CHECK(affinity_bound(1'000'000, 256, 1000) == 42'969);
}

TEST_CASE("affinity: however requests come and end, none goes to a backend that is above the bound") {
  std::mt19937_64 dice(1);
  for (const std::uint32_t slack : {0u, 25u, 100u}) {
    Gateway gateway({0, 1, 2, 3, 4, 5, 6, 7});
    gateway.routing.affinity_slack = slack;
    std::vector<std::uint32_t> running;
    int kept = 0, above = 0;
    for (int i = 0; i < kKeys; ++i) {
      if (running.size() > 60 || (!running.empty() && dice() % 2 == 0)) {
        std::swap(running[dice() % running.size()], running.back());
        gateway.loads[running.back()].pending -= 1;
        running.pop_back();
      }
      const Choice choice =
          gateway.choose(key_of(static_cast<int>(dice() % 16)));  // a few sessions, some of one backend
      const auto bound = affinity_bound(static_cast<std::int64_t>(running.size()), 8, slack);
      above += gateway.loads[choice.backend].pending > bound ? 1 : 0;
      kept += choice.affinity == AffinityOutcome::kept ? 1 : 0;
      gateway.loads[choice.backend].pending += 1;
      running.push_back(choice.backend);
    }
    CHECK(above == 0);
    CHECK(kept > kKeys / 10);
    CHECK(kept < kKeys);
  }
}

TEST_CASE("affinity: priority, health, ejection and caps decide before the key, and the outcome says why it moved") {
  Gateway gateway({0, 1, 2});
  const std::uint64_t key = key_of(0);
  const std::uint32_t home = gateway.choose(key).backend, next = gateway.out[1].backend, last = gateway.out[2].backend;
  CHECK(gateway.out[0].affinity == AffinityOutcome::kept);
  CHECK(gateway.out[1].affinity == AffinityOutcome::moved_load);
  CHECK(gateway.reason(key) == "affinity");
  CHECK(gateway.choose(0).affinity == AffinityOutcome::no_key);
  CHECK(gateway.reason(0) == "smart 0.75");

  const auto goes_to = [&](std::uint32_t backend, AffinityOutcome outcome, const char* reason) {
    const Choice choice = gateway.choose(key);
    CHECK(choice.backend == backend);
    CHECK(choice.affinity == outcome);
    CHECK(gateway.reason(key) == reason);
    gateway = Gateway({0, 1, 2});
  };
  gateway.loads[home].pending = 9;
  goes_to(next, AffinityOutcome::moved_load, "affinity moved");
  gateway.loads[home].pending = 1;
  goes_to(home, AffinityOutcome::kept, "affinity");
  gateway.loads[home].pending = gateway.backend(home).max_pending = 1;
  goes_to(next, AffinityOutcome::moved_load, "affinity moved");
  gateway.loads[home].ejected = true;
  goes_to(next, AffinityOutcome::moved_health, "affinity moved");
  gateway.backend(home).healthy = false;
  goes_to(next, AffinityOutcome::moved_health, "affinity moved");
  gateway.backend(last).priority = 10;
  goes_to(last, AffinityOutcome::kept, "affinity");
  gateway.backend(home).healthy = gateway.backend(next).healthy = false;
  goes_to(last, AffinityOutcome::moved_health, "only candidate");
  for (BackendLoad& load : gateway.loads) load.pending = 1000;  // all alike: nobody is above the bound
  goes_to(home, AffinityOutcome::kept, "affinity");
  gateway.routing.strategy = Strategy::random;
  goes_to(home, AffinityOutcome::kept, "affinity");

  gateway.backend(home).priority = 90;
  gateway.loads[next].pending = 50;  // the strategy orders those behind the best priority
  CHECK(gateway.choose(key).backend == last);
  CHECK(gateway.out[1].backend == next);
  CHECK(gateway.out[2].backend == home);
  CHECK(gateway.out[2].reason == RouteReason::smart);
}

TEST_CASE("affinity: a new key goes to an idle backend if its first is busy, and stays where it was seen") {
  Gateway gateway({0, 1, 2, 3});
  const std::uint64_t key = key_of(0);
  const std::uint32_t home = gateway.choose(key).backend, next = gateway.out[1].backend, third = gateway.out[2].backend;
  const auto mark = [&](std::uint32_t backend) { return backend_mark(gateway.backend(backend).affinity); };
  CHECK(gateway.choose(key, 0).backend == home);
  gateway.loads[home].pending = gateway.loads[next].pending = 1;
  CHECK(gateway.choose(key, 0).backend == third);
  CHECK(gateway.out[0].affinity == AffinityOutcome::moved_load);
  CHECK(gateway.out[1].affinity == AffinityOutcome::moved_load);
  CHECK(gateway.choose(key).backend == home);
  CHECK(gateway.choose(key, mark(third)).backend == third);
  CHECK(gateway.out[0].affinity == AffinityOutcome::kept);
  gateway.loads[third].pending = 1;
  CHECK(gateway.choose(key, mark(third)).backend == third);
  gateway.loads[third].pending = 9;  // the bound holds there too
  CHECK(gateway.choose(key, mark(third)).backend == home);
  CHECK(gateway.out[0].affinity == AffinityOutcome::moved_load);
  gateway.backend(third).healthy = false;
  CHECK(gateway.choose(key, mark(third)).backend == home);
  CHECK(gateway.out[0].affinity == AffinityOutcome::moved_health);
  for (BackendLoad& load : gateway.loads) load.pending = 1;  // nobody is idle
  CHECK(gateway.choose(key, 0).backend == home);
}

TEST_CASE("affinity: the table of keys forgets after 10 minutes, and one key may take the place of another") {
  RecentKeys keys;
  constexpr Ns kStart = 1'000'000 * kSecond;
  const std::uint64_t key = key_of(0), other_tag = key ^ std::uint64_t{1} << 63, neighbour = key ^ 1;
  CHECK(keys.find(key, kStart) == 0);
  CHECK(keys.find(0, 0) == 0);
  keys.note(key, 7, kStart);
  CHECK(keys.find(key, kStart) == 7);
  CHECK(keys.find(key, kStart + kSeenLately - 8 * kSecond) == 7);
  CHECK(keys.find(key, kStart + kSeenLately + 8 * kSecond) == 0);
  CHECK(keys.find(other_tag, kStart) == 0);
  CHECK(keys.find(neighbour, kStart) == 0);
  keys.note(neighbour, 9, kStart);
  keys.note(key, 7, kStart + kSeenLately);
  CHECK(keys.find(key, kStart + 2 * kSeenLately - 8 * kSecond) == 7);
  keys.note(other_tag, 0xffff, kStart + kSeenLately);
  CHECK(keys.find(other_tag, kStart + kSeenLately) == 0xffff);
  CHECK(keys.find(key, kStart + kSeenLately) == 0);
  CHECK(keys.find(neighbour, kStart) == 9);
}

TEST_CASE("affinity: the first listed field that a request has names its session, in any case") {
  const std::uint64_t key = key_of_field("X-Session-Id", "abc");
  CHECK(key != 0);
  CHECK(key_of_field("x-session-id", "abc") == key);
  CHECK(key_of_field("x-session-id", "abd") != key);
  for (const std::string& name : RoutingSettings().affinity_headers) CHECK(key_of_field(name, "abc") == key);
  for (const char* name :
       {"X-Request-Id", "X-Client-Request-Id", "Authorization", "X-Api-Key", "User-Agent", "X-Session"}) {
    CAPTURE(name);
    CHECK(key_of_field(name, "abc") == 0);
  }
  CHECK(Request().field("X-Session-Id", "second").field("Session-Id", "abc").key() == key);
  CHECK(Request().field("Session-Id", "abc").field("Session-Id", "second").key() == key);
  Request other;
  other.routing.affinity_headers = {"x-mine"};
  CHECK(other.field("X-Session-Id", "abc").key() == 0);
  CHECK(other.field("X-Mine", "abc").key() == key);
  other.routing.affinity = Affinity::none;
  CHECK(other.key() == 0);
}

TEST_CASE("affinity: a name that is empty or has more than 256 bytes is none") {
  const std::string most(256, 's'), more(257, 's');
  CHECK(key_of_field("X-Session-Id", "") == 0);
  CHECK(key_of_field("X-Session-Id", most) != 0);
  CHECK(key_of_field("X-Session-Id", more) == 0);
  CHECK(Request().field("Session-Id", more).field("X-Session-Id", "abc").key() == key_of_field("X-Session-Id", "abc"));
  CHECK(key_of_body(R"(,"prompt_cache_key":"")") == 0);
  CHECK(key_of_body(R"(,"prompt_cache_key":")" + most + "\"") == key_of_field("X-Session-Id", most));
  CHECK(key_of_body(R"(,"prompt_cache_key":")" + more + "\"") == 0);
}

TEST_CASE("affinity: without a field a member of the body names the session") {
  const std::uint64_t key = key_of_field("X-Session-Id", "abc");
  CHECK(key_of_body(R"(,"prompt_cache_key":"abc")") == key);
  CHECK(key_of_body(R"(,"session_id" : "abc" )") == key);
  CHECK(key_of_body(R"(,"metadata":{"a":{"user_id":"no"},"user_id":"abc"})") == key);
  CHECK(key_of_body(R"(,"metadata":{"user_id":"second"},"session_id":"third","prompt_cache_key":"abc")") == key);
  CHECK(key_of_body(R"(,"prompt_cache_key":"abc","session_id":"second")") == key);
  for (const char* members :
       {"", R"(,"user":"abc")", R"(,"user_id":"abc")", R"(,"prompt_cache_key":7)", R"(,"metadata":"abc")",
        R"(,"prompt_cache_key":null)", R"(,"metadata":{"session_id":"abc"})", R"(,"metadata":{})",
        R"(,"x":{"prompt_cache_key":"abc"})"}) {
    CAPTURE(members);
    CHECK(key_of_body(members) == 0);
  }
  CHECK(Request().field("Session-Id", "abc").with_body(R"(,"prompt_cache_key":"second")").key() == key);
}

namespace {

// The key of a conversation of these members, read at once and in small pieces.
std::uint64_t key_of_conversation(const std::string& members, Affinity affinity = Affinity::prefix,
                                  const Endpoint& endpoint = kEndpoints.front()) {
  Request request;
  request.routing.affinity = affinity;
  request.with_body(members, endpoint);
  const std::uint64_t key = request.key();
  IncrementalJson pieces;
  pieces.start(endpoint);
  for (std::size_t at = 0; at < request.text().size(); at += 100) pieces.feed(request.json, request.body.data(), at);
  REQUIRE_FALSE(pieces.read(request.json, request.text(), request.facts));
  CHECK(request.key() == key);
  return key;
}

std::string message(const std::string& role, const std::string& content, bool sorted = false) {
  return sorted ? R"({"content":")" + content + R"(","role":")" + role + "\"}"
                : R"({"role":")" + role + R"(","content":")" + content + "\"}";
}

const Endpoint& endpoint_of(std::string_view path) {
  return *std::find_if(kEndpoints.begin(), kEndpoints.end(), [&](const Endpoint& row) { return row.path == path; });
}

}  // namespace

TEST_CASE("affinity: a string ends at the first quote that no backslash stands before, of an even number of them") {
  std::mt19937 dice(1);
  for (int i = 0; i < 2000; ++i) {
    std::string text(dice() % 200, 'a');
    for (char& c : text) c = "\"\\aaaaaa\\"[dice() % (i % 2 == 0 ? 9 : 3)];
    std::size_t end = 0;
    while (end < text.size() && text[end] != '"') end += text[end] == '\\' ? 2 : 1;
    CAPTURE(text);
    const std::string padded = text + std::string(kPaddingBytes, '"');
    CHECK(string_end(padded.data(), 0, text.size()) == std::min(end, text.size()));
  }
}

TEST_CASE("affinity: all requests of a conversation have the same prefix, and others another one") {
  const std::string text(300, 'x');
  for (const bool sorted : {false, true}) {
    const std::string turn = R"(,"messages":[)" + message("system", text + R"(\"user\")", sorted) + " , " +
                             message("user", R"(a\\)" + text, sorted);
    const std::uint64_t key = key_of_conversation(turn + "]");
    CHECK(key != 0);
    CHECK(key_of_conversation(turn + " ],\"n\":1") == key);
    const std::string second = turn + "," + message("assistant", "b", sorted) + "," + message("user", "c", sorted);
    CHECK(key_of_conversation(second + "]") == key);
    CHECK(key_of_conversation(second + R"(],"tools":[{}],"temperature":1)") == key);
    CHECK(key_of_conversation(R"(,"messages":[)" + message("system", text, sorted) + "," +
                              message("user", "other" + text, sorted) + "]") != key);
  }
}

TEST_CASE("affinity: the first message of the user is found behind 30 KiB of instructions, and of it the end counts") {
  const std::string system(30'000, 's'), long_text(3000, 'u');
  const auto key = [&](const std::string& first, const std::string& more = "") {
    return key_of_conversation(R"(,"messages":[)" + message("system", system) + "," + message("user", first) + more +
                               "]");
  };
  CHECK(key("a") != key("b"));
  CHECK(key("a") == key("a", "," + message("assistant", "x")));
  CHECK(key(long_text.substr(2000) + "a") != key(long_text.substr(2000) + "b"));
  CHECK(key("aa") != key("a"));
  // Beyond 32 KiB nothing is scanned.
  CHECK(key(long_text + "a") == key(long_text + "b"));
}

TEST_CASE("affinity: a prefix has the model, the instructions of each API, and the parts of messages") {
  const std::string text(300, 'x'), parts = R"([{"type":"text","text":")" + text + R"("},{"type":"image"}])";
  const auto anthropic = [&](const std::string& system, const std::string& more) {
    return key_of_conversation(R"(,"system":[{"type":"text","text":")" + system +
                                   R"("}],"messages":[{"role":"user","content":)" + parts + "}" + more + "]",
                               Affinity::prefix, endpoint_of("/v1/messages"));
  };
  CHECK(anthropic("a", "") == anthropic("a", "," + message("assistant", "b")));
  CHECK(anthropic("a", "") != anthropic("b", ""));
  const auto responses = [&](const std::string& members) {
    return key_of_conversation(members, Affinity::prefix, endpoint_of("/v1/responses"));
  };
  CHECK(responses(R"(,"instructions":"a","input":")" + text + "\"") !=
        responses(R"(,"instructions":"b","input":")" + text + "\""));
  CHECK(responses(R"(,"input":[)" + message("user", text) + "]") ==
        responses(R"(,"input":[)" + message("user", text) + ",{}]"));
  const std::string prompt(1100, 'p');
  CHECK(key_of_conversation(R"(,"prompt":")" + prompt + "\"", Affinity::prefix, endpoint_of("/v1/completions")) ==
        key_of_conversation(R"(,"prompt":")" + prompt + "more\"", Affinity::prefix, endpoint_of("/v1/completions")));
  Request one, other;
  for (Request* request : {&one, &other}) request->routing.affinity = Affinity::prefix;
  one.with_body(R"(,"messages":[)" + message("user", text) + "]");
  other.with_body(R"(,"messages":[)" + message("user", text) + "]", kEndpoints.front(), "n");
  CHECK(one.key() != other.key());
  CHECK(one.key("alice") != one.key("bob"));
}

TEST_CASE("affinity: short conversations, embeddings and other values have no prefix; a session goes before it") {
  const std::string text(300, 'x'), turns = R"(,"messages":[)" + message("user", text) + "]";
  CHECK(key_of_conversation(R"(,"messages":[)" + message("user", "Hi") + "]") == 0);
  CHECK(key_of_conversation("") == 0);
  CHECK(key_of_conversation(R"(,"input":")" + text + "\"", Affinity::prefix, endpoint_of("/v1/embeddings")) == 0);
  CHECK(key_of_conversation(turns, Affinity::session) == 0);
  const std::string named = R"(,"session_id":"s")" + turns;
  CHECK(key_of_conversation(turns, Affinity::session_prefix) == key_of_conversation(turns));
  CHECK(key_of_conversation(named, Affinity::session_prefix) == key_of_body(R"(,"session_id":"s")"));
  CHECK(key_of_conversation(named) == key_of_conversation(turns));
  for (const char* odd : {"[[[]]]", "{}", "[]", "7", "\"\\\\\"", "[\"user\"]", "[{}]", "[{\"role\":\"user\"}]"}) {
    CAPTURE(odd);
    CHECK(key_of_conversation(R"(,"messages":)" + std::string(odd) + R"(,"system":")" + text + "\"") != 0);
  }
}

TEST_CASE("affinity: the same name of two clients is two sessions") {
  const Request request = std::move(Request().field("Session-Id", "1"));
  CHECK(request.key("alice") != request.key("bob"));
  CHECK(request.key("alice") != request.key());
  CHECK(request.key("alice") == request.key("alice"));
}
