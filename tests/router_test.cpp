// router_test.cpp
// Goal:   a request goes to the right backends in the right order, whatever the fleet and the strategy.
// Method: tables with one fleet per row; thousands of random fleets, checked against properties that must always hold;
//         the distribution of each strategy over 10,000 turns.
#include "nexus/fleet/router.h"

#include <doctest/doctest.h>

#include <map>
#include <random>
#include <set>
#include <sstream>

using namespace nexus;

namespace {

struct FleetBackend {
  std::string name;
  std::uint32_t priority = 50;
  BackendLoad load{};
  bool healthy = true;
};

struct Fleet {
  Snapshot snapshot;
  std::map<std::string, BackendLoad> loads;
  std::uint32_t next_model = 1;
  mutable int load_calls = 0;

  explicit Fleet(const std::vector<FleetBackend>& backends) {
    for (const FleetBackend& from : backends) {
      BackendView view;
      view.id = BackendId{static_cast<std::uint32_t>(snapshot.backends.size() + 1)};
      view.name = from.name;
      view.priority = from.priority;
      view.healthy = from.healthy;
      view.facts = std::make_shared<nexus::ServerFacts>();
      snapshot.backends.push_back(view);
      loads[from.name] = from.load;
    }
  }

  ModelEntry& model(const std::string& name) {
    auto [at, made] = snapshot.models.try_emplace(name);
    if (made) {
      at->second.id = at->second.target_id = ModelId{next_model++};
      at->second.name = at->second.target = name;
    }
    return at->second;
  }

  // The backends in `on` offer `name`, or all if it is empty.
  Fleet& offer(const std::string& name, std::vector<std::uint32_t> on = {}, Capabilities capabilities = {}) {
    if (on.empty()) {
      for (std::uint32_t i = 0; i < snapshot.backends.size(); ++i) on.push_back(i);
    }
    for (const std::uint32_t backend : on) model(name).offers.push_back(Offer{backend, capabilities});
    return *this;
  }

  Fleet& alias(const std::string& name, const std::string& target) {
    const ModelEntry real = model(target);
    ModelEntry& entry = model(name);
    entry.target = real.target;
    entry.target_id = real.target_id;
    entry.offers = real.offers;
    entry.fallbacks = real.fallbacks;
    return *this;
  }

  RouteOutcome ask(const std::string& name, const RouteNeeds& needs, const RoutingSettings& routing, std::uint64_t turn,
                   std::uint64_t random_bits, std::vector<Choice>& out) const {
    const auto load_of = [&](const BackendView& backend) {
      ++load_calls;
      return loads.at(backend.name);
    };
    std::vector<Choice> unordered;
    const RouteOutcome outcome = route(snapshot, *snapshot.find(name), needs, routing, random_bits, load_of, unordered);
    out.clear();
    BestFirst order(unordered, turn);
    while (const Choice* choice = order.next()) out.push_back(*choice);
    REQUIRE(out.size() == unordered.size());
    return outcome;
  }
};

RoutingSettings with(Strategy strategy) {
  RoutingSettings routing;
  routing.strategy = strategy;
  return routing;
}

RoutingSettings weighing(std::uint32_t priority, std::uint32_t load, std::uint32_t latency) {
  RoutingSettings routing;
  routing.weight_priority = priority;
  routing.weight_load = load;
  routing.weight_latency = latency;
  return routing;
}

// `a b/qwen`: the backends in order, with the model if it is a fallback.
std::string spelled(const Fleet& fleet, const std::vector<Choice>& choices) {
  std::string out;
  for (const Choice& choice : choices) {
    if (!out.empty()) out += ' ';
    out += fleet.snapshot.backends[choice.backend].name;
    if (choice.fallback) out += "/" + *choice.model_name;
  }
  return out;
}

std::string reason(const Choice& choice) {
  std::string out;
  append_reason(out, choice);
  return out;
}

const char* name_of(RouteOutcome outcome) {
  switch (outcome) {
    case RouteOutcome::ok: return "ok";
    case RouteOutcome::unknown_model: return "unknown_model";
    case RouteOutcome::none_healthy: return "none_healthy";
    case RouteOutcome::not_spoken: return "not_spoken";
    case RouteOutcome::not_capable: return "not_capable";
  }
  return "?";
}

constexpr Capabilities kBlind{.vision = false};
constexpr Capabilities kNoTools{.tools = false};
constexpr Capabilities kNoJson{.json_mode = false};
constexpr Capabilities kShort{.context_tokens = 4096};

BackendLoad pending(std::int64_t n) { return BackendLoad{.pending = n}; }
BackendLoad ejected(std::int64_t n = 0) { return BackendLoad{.pending = n, .ejected = true}; }
BackendLoad latency(Ns milliseconds) { return BackendLoad{.latency_ns = milliseconds * kMillisecond}; }

}  // namespace

TEST_CASE("each strategy orders a fleet without ties in one way, and gives its reason") {
  struct Row {
    const char* name;
    RoutingSettings routing;
    std::vector<FleetBackend> fleet;
    const char* order;
    const char* reason;
  };
  const std::vector<Row> rows = {
      {"one backend", with(Strategy::smart), {{"a"}}, "a", "only candidate"},
      {"one ejected backend", with(Strategy::smart), {{"a", 50, ejected()}}, "a", "only candidate"},
      {"an unhealthy one leaves one", with(Strategy::priority), {{"a", 1, {}, false}, {"b"}}, "b", "only candidate"},
      {"priority: lower first", with(Strategy::priority), {{"a", 90}, {"b", 10}, {"c", 40}}, "b c a", "priority"},
      {"priority: load is no matter", with(Strategy::priority), {{"a", 1, pending(99)}, {"b", 2}}, "a b", "priority"},
      {"priority: 0 and 100 are the ends",
       with(Strategy::priority),
       {{"a", 100}, {"b", 0}, {"c", 50}},
       "b c a",
       "priority"},
      {"least pending",
       with(Strategy::least_pending),
       {{"a", 50, pending(9)}, {"b", 99, pending(2)}, {"c", 1, pending(5)}},
       "b c a",
       "least pending 2"},
      {"least pending: none", with(Strategy::least_pending), {{"a", 50, pending(1)}, {"b"}}, "b a", "least pending 0"},
      {"round robin: the first turn",
       with(Strategy::round_robin),
       {{"a", 90}, {"b", 10, pending(5)}},
       "a b",
       "round robin"},
      {"smart: the default weighs priority", with(Strategy::smart), {{"a", 60}, {"b", 40}}, "b a", "smart 0.80"},
      {"smart: load outweighs a little priority",
       with(Strategy::smart),
       {{"a", 40, pending(10)}, {"b", 50}},
       "b a",
       "smart 0.75"},
      {"smart: priority outweighs a little load",
       with(Strategy::smart),
       {{"a", 0, pending(10)}, {"b", 50, pending(8)}},
       "a b",
       "smart 0.70"},
      {"smart: the faster of two",
       with(Strategy::smart),
       {{"a", 50, latency(400)}, {"b", 50, latency(100)}},
       "b a",
       "smart 0.75"},
      {"smart: twice the latency counts half",
       weighing(0, 0, 100),
       {{"a", 0, latency(200)}, {"b", 99, latency(100)}},
       "b a",
       "smart 1.00"},
      {"smart: an unknown latency counts as the best",
       weighing(0, 0, 100),
       {{"a", 50, latency(100)}, {"b", 50, latency(200)}, {"c", 99, latency(900)}},
       "a b c",
       "smart 1.00"},
      {"smart: only load weighs",
       weighing(0, 1, 0),
       {{"a", 0, pending(4)}, {"b", 100, pending(1)}, {"c", 50, pending(2)}},
       "b c a",
       "smart 0.75"},
      {"smart: an ejected one's load is no measure",
       weighing(50, 50, 0),
       {{"a", 30, pending(1)}, {"b", 90}, {"c", 50, ejected(1000)}},
       "b a c",
       "smart 0.55"},
      {"ejected go behind", with(Strategy::priority), {{"a", 1, ejected()}, {"b", 50}, {"c", 40}}, "c b a", "priority"},
      {"several ejected keep the strategy's order",
       with(Strategy::priority),
       {{"a", 9, ejected()}, {"b", 50}, {"c", 4, ejected()}},
       "b c a",
       "priority"},
      {"all ejected: all usable",
       with(Strategy::priority),
       {{"a", 9, ejected()}, {"b", 5, ejected()}},
       "b a",
       "priority"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    Fleet fleet(row.fleet);
    fleet.offer("m");
    std::vector<Choice> choices;
    CHECK(fleet.ask("m", {}, row.routing, 0, 7, choices) == RouteOutcome::ok);
    CHECK(spelled(fleet, choices) == row.order);
    REQUIRE_FALSE(choices.empty());
    CHECK(reason(choices[0]) == row.reason);
    for (const Choice& choice : choices) {
      CHECK(*choice.model_name == "m");
      CHECK(choice.model == ModelId{1});
    }
  }
}

TEST_CASE("the needed capabilities decide which backends are candidates, and the error if none is") {
  struct Row {
    const char* name;
    Capabilities a, b;  // of the two backends
    bool a_healthy, b_healthy;
    RouteNeeds needs;
    const char* outcome;
    const char* order;
  };
  const RouteNeeds sees{.vision = true};
  const RouteNeeds calls{.tools = true};
  const RouteNeeds json{.json_mode = true};
  const std::vector<Row> rows = {
      {"nothing needed", kBlind, kNoTools, true, true, {}, "ok", "a b"},
      {"an image", kBlind, {}, true, true, sees, "ok", "b"},
      {"an image that none sees", kBlind, kBlind, true, true, sees, "not_capable", ""},
      {"tools", kNoTools, kBlind, true, true, calls, "ok", "b"},
      {"tools that none has", kNoTools, kNoTools, true, true, calls, "not_capable", ""},
      {"JSON mode", {}, kNoJson, true, true, json, "ok", "a"},
      {"JSON mode that none has", kNoJson, kNoJson, true, true, json, "not_capable", ""},
      {"one token below the context", kShort, {}, true, true, {.context_tokens = 4095}, "ok", "a b"},
      {"the context exactly", kShort, {}, true, true, {.context_tokens = 4096}, "ok", "a b"},
      {"one token more", kShort, {}, true, true, {.context_tokens = 4097}, "ok", "b"},
      {"too long for all", kShort, kShort, true, true, {.context_tokens = 4097}, "not_capable", ""},
      {"two needs on two backends", kNoTools, kBlind, true, true, {.vision = true, .tools = true}, "not_capable", ""},
      {"none healthy", {}, {}, false, false, {}, "none_healthy", ""},
      {"none healthy nor capable", kBlind, kBlind, false, false, sees, "none_healthy", ""},
      {"the capable one is ill: it may come back", kBlind, {}, true, false, sees, "none_healthy", ""},
      {"the capable one is well", kBlind, {}, false, true, sees, "ok", "b"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    Fleet fleet({{"a", 1, {}, row.a_healthy}, {"b", 2, {}, row.b_healthy}});
    fleet.offer("m", {0}, row.a).offer("m", {1}, row.b);
    std::vector<Choice> choices;
    CHECK(name_of(fleet.ask("m", row.needs, with(Strategy::priority), 0, 0, choices)) == std::string(row.outcome));
    CHECK(spelled(fleet, choices) == row.order);
  }
}

TEST_CASE("fallback models follow the model's own backends, in order, aliases followed, not recursively") {
  Fleet fleet({{"a", 1}, {"b", 2}, {"c", 3}, {"ill", 0, {}, false}});
  fleet.offer("llama", {0, 1}).offer("qwen", {1, 2}).offer("mixtral", {2}).offer("gemma", {0}).offer("far", {3});
  fleet.alias("q", "qwen");
  fleet.model("nowhere");
  const auto order = [&](const std::string& asked, std::vector<std::string> fallbacks, const char* outcome = "ok") {
    fleet.model(asked).fallbacks = std::move(fallbacks);
    std::vector<Choice> choices;
    CHECK(name_of(fleet.ask(asked, {}, with(Strategy::priority), 0, 0, choices)) == std::string(outcome));
    return spelled(fleet, choices);
  };
  CHECK(order("llama", {}) == "a b");
  CHECK(order("llama", {"qwen", "mixtral"}) == "a b b/qwen c/qwen c/mixtral");
  CHECK(order("llama", {"mixtral", "qwen"}) == "a b c/mixtral b/qwen c/qwen");
  CHECK(order("llama", {"q"}) == "a b b/qwen c/qwen");
  CHECK(order("llama", {"qwen", "q", "qwen"}) == "a b b/qwen c/qwen");  // the same model under two names is listed once
  CHECK(order("llama", {"llama"}) == "a b");
  CHECK(order("llama", {"unheard of", "nowhere", "gemma"}) == "a b a/gemma");
  CHECK(order("nowhere", {"gemma"}) == "a/gemma");
  CHECK(order("far", {"gemma"}) == "a/gemma");
  CHECK(order("far", {}, "none_healthy") == "");
  CHECK(order("nowhere", {"far"}, "none_healthy") == "");
  CHECK(order("nowhere", {"unheard of"}, "unknown_model") == "");
  CHECK(order("nowhere", {}, "unknown_model") == "");
  order("gemma", {"mixtral"});
  CHECK(order("nowhere", {"gemma"}) == "a/gemma");  // gemma's own fallback is ignored

  SUBCASE("a fallback must be capable too") {
    fleet.offer("blind", {0}, kBlind);
    fleet.model("blind").fallbacks = {"qwen"};
    fleet.model("qwen").offers[0].capabilities = kBlind;
    std::vector<Choice> choices;
    CHECK(fleet.ask("blind", {.vision = true}, with(Strategy::priority), 0, 0, choices) == RouteOutcome::ok);
    CHECK(spelled(fleet, choices) == "c/qwen");
    CHECK(reason(choices[0]) == "fallback");
  }
  SUBCASE("an ejected backend comes after the others of its model, before the fallbacks") {
    fleet.loads["a"].ejected = true;
    CHECK(order("llama", {"mixtral"}) == "b a c/mixtral");
  }
}

TEST_CASE("an alias is served under the model's own name, with the reason alias") {
  Fleet fleet({{"a", 1}, {"b", 2}});
  fleet.offer("llama3:70b").offer("small", {1});
  fleet.model("llama3:70b").fallbacks = {"small"};
  fleet.alias("gpt-4", "llama3:70b");
  std::vector<Choice> choices;
  REQUIRE(fleet.ask("gpt-4", {}, with(Strategy::priority), 0, 0, choices) == RouteOutcome::ok);
  CHECK(spelled(fleet, choices) == "a b b/small");
  CHECK(*choices[0].model_name == "llama3:70b");
  CHECK(choices[0].model == fleet.model("llama3:70b").id);
  CHECK_FALSE(choices[0].fallback);
  CHECK(reason(choices[0]) == "alias");
  CHECK(choices[2].model == fleet.model("small").id);
  CHECK(reason(choices[2]) == "fallback");
}

TEST_CASE("load_of is called once for each of several candidates, and not for a single one") {
  Fleet fleet({{"a"}, {"b"}, {"c"}, {"ill", 0, {}, false}});
  fleet.offer("m", {0, 1, 3}).offer("alone", {2, 3});
  fleet.model("m").fallbacks = {"alone"};
  std::vector<Choice> choices;
  for (const Strategy strategy : {Strategy::smart, Strategy::round_robin, Strategy::priority, Strategy::random}) {
    fleet.load_calls = 0;
    fleet.ask("m", {}, with(strategy), 0, 0, choices);
    CHECK(fleet.load_calls == 2);
  }
}

TEST_CASE("an offer that is listed twice is a candidate once") {
  Fleet fleet({{"a"}, {"b"}});
  fleet.offer("m", {0, 0, 1, 1});
  std::vector<Choice> choices;
  fleet.ask("m", {}, with(Strategy::priority), 0, 0, choices);
  CHECK(choices.size() == 2);
}

TEST_CASE("round robin uses each backend once per round") {
  Fleet fleet({{"a"}, {"b"}, {"c"}});
  fleet.offer("m");
  std::vector<Choice> choices;
  std::string firsts;
  for (std::uint64_t turn = 0; turn < 9; ++turn) {
    fleet.ask("m", {}, with(Strategy::round_robin), turn, 0, choices);
    firsts += fleet.snapshot.backends[choices[0].backend].name;
  }
  CHECK(firsts == "abcabcabc");
  for (std::uint64_t round = 0; round < 1000; ++round) {
    std::set<std::uint32_t> served;
    for (std::uint64_t turn = round * 3; turn < round * 3 + 3; ++turn) {
      fleet.ask("m", {}, with(Strategy::round_robin), turn, 0, choices);
      served.insert(choices[0].backend);
    }
    REQUIRE(served.size() == 3);
  }
}

namespace {

// How often each backend came first (place 0), second, … over `turns` turns from `start` in steps of `step`.
std::vector<int> spread(const Fleet& fleet, const RoutingSettings& routing, std::size_t place, std::uint64_t start = 0,
                        std::uint64_t step = 1, int turns = 10'000) {
  std::mt19937_64 random(42);
  std::vector<int> counts(fleet.snapshot.backends.size());
  std::vector<Choice> choices;
  for (int i = 0; i < turns; ++i) {
    fleet.ask("m", {}, routing, start + static_cast<std::uint64_t>(i) * step, random(), choices);
    if (place < choices.size()) ++counts[choices[place].backend];
  }
  return counts;
}

void check_even(const std::vector<int>& counts, std::size_t first, std::size_t last, int total, int tolerance) {
  std::ostringstream text;
  for (const int count : counts) text << count << ' ';
  CAPTURE(text.str());
  const int share = total / static_cast<int>(last - first);
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (i >= first && i < last) {
      CHECK(std::abs(counts[i] - share) <= tolerance);
    } else {
      CHECK(counts[i] == 0);
    }
  }
}

}  // namespace

TEST_CASE("over 10,000 turns each strategy shares the load as documented") {
  // Turns share exactly among equals. A random share of 10,000/4 has a standard deviation of 43: allow five of them.
  Fleet equals({{"a"}, {"b"}, {"c"}, {"d"}});
  equals.offer("m");
  for (const Strategy strategy :
       {Strategy::smart, Strategy::round_robin, Strategy::priority, Strategy::least_pending}) {
    CAPTURE(static_cast<int>(strategy));
    check_even(spread(equals, with(strategy), 0), 0, 4, 10'000, 1);
    for (std::size_t place = 1; place < 4; ++place)
      check_even(spread(equals, with(strategy), place), 0, 4, 10'000, 215);
  }
  for (std::size_t place = 0; place < 4; ++place) {
    check_even(spread(equals, with(Strategy::random), place), 0, 4, 10'000, 215);
  }

  // The two best of three share; the third gets nothing, at any position.
  Fleet low({{"a", 90, pending(9)}, {"b", 10}, {"c", 10}});
  low.offer("m");
  Fleet high({{"a", 10}, {"b", 10}, {"c", 90, pending(9)}});
  high.offer("m");
  for (const Strategy strategy : {Strategy::smart, Strategy::priority, Strategy::least_pending}) {
    CAPTURE(static_cast<int>(strategy));
    check_even(spread(low, with(strategy), 0), 1, 3, 10'000, 1);
    check_even(spread(high, with(strategy), 0), 0, 2, 10'000, 1);
  }
  check_even(spread(low, with(Strategy::round_robin), 0), 0, 3, 10'000, 1);
  check_even(spread(low, with(Strategy::random), 0), 0, 3, 10'000, 240);
}

TEST_CASE("smart treats latencies that differ by a few per cent as equal, and shares evenly") {
  Fleet fleet({{"a", 50, latency(100)}, {"b", 50, latency(103)}, {"c", 50, latency(200)}});
  fleet.offer("m");
  check_even(spread(fleet, with(Strategy::smart), 0), 0, 2, 10'000, 1);
}

TEST_CASE("a turn that other requests advance in step starves no backend") {
  // Every n-th turn is this model's: modulo the number of backends, the turn would always select the same one.
  for (const std::size_t backends : {2u, 3u, 4u, 8u}) {
    for (const std::uint64_t step : {2u, 3u, 4u, 6u, 8u, 16u, 64u}) {
      for (const std::uint64_t start : {0u, 1u, 5u}) {
        CAPTURE(backends);
        CAPTURE(step);
        CAPTURE(start);
        Fleet fleet(std::vector<FleetBackend>{{"a"}, {"b"}, {"c"}, {"d"}, {"e"}, {"f"}, {"g"}, {"h"}});
        std::vector<std::uint32_t> on;
        for (std::uint32_t i = 0; i < backends; ++i) on.push_back(i);
        fleet.offer("m", on);
        // Up to 16 consecutive requests use the same order, so the deviation is up to four times a random one's.
        check_even(spread(fleet, with(Strategy::round_robin), 0, start, step), 0, backends, 10'000, 1000);
      }
    }
  }
}

TEST_CASE("equal candidates of a later group do not follow the turn of an earlier group") {
  Fleet fleet({{"a", 1}, {"b", 1}, {"c", 2}, {"d", 2}});
  fleet.offer("m");
  std::map<std::string, int> orders;
  std::vector<Choice> choices;
  for (std::uint64_t turn = 0; turn < 10'000; ++turn) {
    fleet.ask("m", {}, with(Strategy::priority), turn, 0, choices);
    ++orders[spelled(fleet, choices)];
  }
  CHECK(orders.size() == 4);
  for (const auto& entry : orders) {
    CAPTURE(entry.first);
    CHECK(std::abs(entry.second - 2500) < 400);
  }
}

TEST_CASE("random draws each order of three equally often") {
  Fleet fleet({{"a"}, {"b"}, {"c"}});
  fleet.offer("m");
  std::mt19937_64 random(1);
  std::map<std::string, int> orders;
  std::vector<Choice> choices;
  for (int i = 0; i < 12'000; ++i) {
    fleet.ask("m", {}, with(Strategy::random), 0, random(), choices);
    ++orders[spelled(fleet, choices)];
  }
  CHECK(orders.size() == 6);
  for (const auto& entry : orders) {
    CAPTURE(entry.first);
    CHECK(std::abs(entry.second - 2000) < 210);
  }
}

namespace {

// A random fleet: up to eight backends, four models with random offers and fallbacks, and an alias of each.
struct RandomFleet {
  std::mt19937_64 random;
  Fleet fleet{{}};

  std::uint64_t below(std::uint64_t n) { return random() % n; }
  bool one_in(std::uint64_t n) { return below(n) == 0; }

  explicit RandomFleet(std::uint64_t seed) : random(seed) {
    std::vector<FleetBackend> backends(below(9));
    for (std::size_t i = 0; i < backends.size(); ++i) {
      backends[i].name = "b" + std::to_string(i);
      backends[i].priority = static_cast<std::uint32_t>(below(5) * 25);
      backends[i].healthy = !one_in(4);
      backends[i].load.pending = static_cast<std::int64_t>(below(4));
      backends[i].load.latency_ns = static_cast<Ns>(below(4)) * 50 * kMillisecond;
      backends[i].load.ejected = one_in(4);
    }
    fleet = Fleet(backends);
    for (const char* name : {"m0", "m1", "m2", "m3"}) {
      fleet.model(name);
      for (std::uint32_t i = 0; i < backends.size(); ++i) {
        if (one_in(2)) continue;
        const Capabilities capabilities{!one_in(4), !one_in(4), !one_in(4), one_in(3) ? 1000 * below(4) : 0};
        fleet.offer(name, {i}, capabilities);
        if (one_in(8)) fleet.offer(name, {i}, capabilities);
      }
      for (std::uint64_t n = below(4); n > 0; --n) fleet.model(name).fallbacks.push_back(one_of());
    }
    for (const char* name : {"m0", "m1", "m2", "m3"}) fleet.alias("alias of " + std::string(name), name);
  }

  std::string one_of() {
    return (one_in(2) ? "m" : one_in(4) ? "unheard of " : "alias of m") + std::to_string(below(4));
  }
  RouteNeeds needs() {
    return {.vision = one_in(4),
            .tools = one_in(4),
            .json_mode = one_in(4),
            .context_tokens = one_in(3) ? 500 * below(8) : 0};
  }
};

// The offer that a choice came from, or nullptr; found by name, independently of the router.
const Offer* offer_of(const Fleet& fleet, const Choice& choice) {
  const ModelEntry* entry = fleet.snapshot.find(*choice.model_name);
  if (entry == nullptr || entry->is_alias()) return nullptr;
  for (const Offer& offer : entry->offers) {
    if (offer.backend == choice.backend) return &offer;
  }
  return nullptr;
}

bool meets(const Capabilities& has, const RouteNeeds& needs) {
  return (has.vision || !needs.vision) && (has.tools || !needs.tools) && (has.json_mode || !needs.json_mode) &&
         (has.context_tokens == 0 || has.context_tokens >= needs.context_tokens);
}

// Every (backend, model) that can serve the request, by brute force.
std::set<std::pair<std::uint32_t, std::string>> all_that_can(const Fleet& fleet, const ModelEntry& asked,
                                                             const RouteNeeds& needs) {
  std::set<std::pair<std::uint32_t, std::string>> out;
  std::vector<std::string> names = asked.fallbacks;
  names.push_back(asked.name);
  for (const std::string& name : names) {
    const ModelEntry* entry = fleet.snapshot.find(name);
    if (entry == nullptr) continue;
    for (const Offer& offer : entry->offers) {
      if (fleet.snapshot.backends[offer.backend].healthy && meets(offer.capabilities, needs)) {
        out.emplace(offer.backend, entry->target);
      }
    }
  }
  return out;
}

}  // namespace

TEST_CASE("on random fleets: every candidate can serve the request, none is listed twice, none is missing") {
  std::vector<Choice> choices;
  int served = 0, refused = 0;
  for (std::uint64_t seed = 0; seed < 4000; ++seed) {
    CAPTURE(seed);
    RandomFleet made(seed);
    const std::string name = (made.one_in(2) ? "m" : "alias of m") + std::to_string(made.below(4));
    const ModelEntry& asked = *made.fleet.snapshot.find(name);
    const RouteNeeds needs = made.needs();
    const RoutingSettings routing = with(static_cast<Strategy>(made.below(5)));
    const RouteOutcome outcome = made.fleet.ask(name, needs, routing, made.random(), made.random(), choices);
    std::set<std::pair<std::uint32_t, std::string>> seen;
    for (const Choice& choice : choices) {
      REQUIRE(made.fleet.snapshot.backends[choice.backend].healthy);
      const Offer* offer = offer_of(made.fleet, choice);
      REQUIRE(offer != nullptr);
      REQUIRE(meets(offer->capabilities, needs));
      REQUIRE(choice.model == made.fleet.snapshot.find(*choice.model_name)->id);
      REQUIRE(choice.fallback == (*choice.model_name != asked.target));
      REQUIRE(seen.emplace(choice.backend, *choice.model_name).second);
    }
    REQUIRE(seen == all_that_can(made.fleet, asked, needs));
    REQUIRE((outcome == RouteOutcome::ok) == !choices.empty());
    ++(choices.empty() ? refused : served);
    for (std::size_t i = 1; i < choices.size(); ++i) {
      const Choice& before = choices[i - 1];
      const Choice& after = choices[i];
      REQUIRE_FALSE((before.fallback && !after.fallback));
      if (*before.model_name == *after.model_name) REQUIRE_FALSE((before.ejected() && !after.ejected()));
    }
  }
  CHECK(served > 1000);  // both happen often enough
  CHECK(refused > 200);
}

TEST_CASE("on random fleets: smart with weights 100/0/0 orders as priority does") {
  std::vector<Choice> smart, priority;
  int compared = 0;
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    CAPTURE(seed);
    RandomFleet made(seed);
    const std::uint64_t turn = made.random();
    made.fleet.ask("m0", {}, weighing(100, 0, 0), turn, made.random(), smart);
    made.fleet.ask("m0", {}, with(Strategy::priority), turn, made.random(), priority);
    REQUIRE(spelled(made.fleet, smart) == spelled(made.fleet, priority));
    for (std::size_t i = 1; i < smart.size(); ++i) {
      const Choice& before = smart[i - 1];
      const Choice& after = smart[i];
      if (before.model != after.model || before.ejected() != after.ejected()) continue;
      REQUIRE(made.fleet.snapshot.backends[before.backend].priority <=
              made.fleet.snapshot.backends[after.backend].priority);
      ++compared;
    }
  }
  CHECK(compared > 1000);
}

TEST_CASE("on random fleets: the same arguments give the same result") {
  std::vector<Choice> once, again;
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    RandomFleet made(seed);
    const RoutingSettings routing = with(static_cast<Strategy>(made.below(5)));
    made.fleet.ask("m1", {}, routing, seed, seed * 7, once);
    made.fleet.ask("m1", {}, routing, seed, seed * 7, again);
    REQUIRE(spelled(made.fleet, once) == spelled(made.fleet, again));
  }
}

TEST_CASE("a pending count that is briefly negative counts as zero") {
  // The threads' counts are read one after the other, so a request that moved meanwhile can make the sum negative.
  Fleet fleet({{"a", 50, pending(-1)}, {"b", 50, pending(0)}, {"c", 50, pending(3)}});
  fleet.offer("m");
  check_even(spread(fleet, with(Strategy::least_pending), 0), 0, 2, 10'000, 1);
  check_even(spread(fleet, with(Strategy::smart), 0), 0, 2, 10'000, 1);
}
