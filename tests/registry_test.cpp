// registry_test.cpp
// Goal:   snapshots follow from the configuration and the health checks, and a reload loses no state.
// Method: each test configures a registry, records checks, and compares the resulting snapshot.
#include "nexus/fleet/registry.h"
#include "nexus/fleet/prober.h"

#include <doctest/doctest.h>

#include <functional>

using namespace nexus;

namespace {

BackendSettings backend(const std::string& name, std::vector<std::string> models = {},
                        const std::string& host = "127.0.0.1", std::uint16_t port = 8080) {
  BackendSettings out;
  out.name = name;
  out.address = {host, port};
  out.models = std::move(models);
  return out;
}

Settings with(std::vector<BackendSettings> backends) {
  Settings out;
  out.backends = std::move(backends);
  return out;
}

void configure(Registry& registry, Settings settings) {
  registry.configure(std::make_shared<const Settings>(std::move(settings)));
}

ListedModels list_of(const std::vector<std::string>& names) {
  ListedModels models;
  for (const std::string& name : names) models.emplace_back().name = name;
  return models;
}

// `+` is a check that passed, `-` one that failed.
void check(Registry& registry, std::size_t at, const std::string& results) {
  for (const char result : results) registry.note_check(registry.backends()[at], result == '+');
}

// `(a) b`: the backends that offer `model`; unhealthy ones in brackets.
std::string offers(const Snapshot& snapshot, const std::string& model) {
  const ModelEntry* entry = snapshot.find(model);
  if (entry == nullptr) return "no such name";
  std::string out;
  for (const Offer& offer : entry->offers) {
    const BackendView& view = snapshot.backends[offer.backend];
    if (!out.empty()) out += ' ';
    out += view.healthy ? view.name : "(" + view.name + ")";
  }
  return out;
}

Capabilities capabilities(const Snapshot& snapshot, const std::string& model) {
  return snapshot.find(model)->offers.at(0).capabilities;
}

}  // namespace

TEST_CASE("the first check sets the health, and so does the first good one; then it takes several in a row") {
  struct Row {
    const char* checks;
    Health health;
  };
  const std::vector<Row> rows = {
      {"", Health::unknown},        {"+", Health::healthy},        {"-", Health::unhealthy},
      {"+--", Health::healthy},     {"+---", Health::unhealthy},   {"+--+--", Health::healthy},
      {"-+", Health::healthy},      {"-++", Health::healthy},      {"-+-+", Health::healthy},
      {"+---+", Health::unhealthy}, {"+---++--", Health::healthy}, {"+---++---", Health::unhealthy},
  };
  for (const Row& row : rows) {
    CAPTURE(row.checks);
    Registry registry;
    configure(registry, with({backend("a")}));  // three failures, two recoveries
    check(registry, 0, row.checks);
    CHECK(registry.backends()[0].health == row.health);
    CHECK(registry.snapshot()->backends[0].healthy == (row.health == Health::healthy));
  }
}

TEST_CASE("a change of health is reported once, with the previous health") {
  Registry registry;
  configure(registry, with({backend("a")}));
  const auto told = [&](bool passed) {
    const Registry::Transition to = registry.note_check(registry.backends()[0], passed);
    CHECK(to.changed == (to.from != to.to));
    return to.changed;
  };
  CHECK(told(true));
  CHECK_FALSE(told(true));
  CHECK_FALSE(told(false));
  CHECK_FALSE(told(false));
  CHECK(told(false));
  CHECK_FALSE(told(false));
  CHECK_FALSE(told(true));
  CHECK(told(true));
}

TEST_CASE("without health checks every backend counts as healthy") {
  Registry registry;
  Settings settings = with({backend("a", {"m"})});
  settings.health.enabled = false;
  configure(registry, settings);
  CHECK(offers(*registry.snapshot(), "m") == "a");
}

TEST_CASE("a backend with a host name is unhealthy for workers until the name is resolved") {
  Registry registry;
  configure(registry, with({backend("a", {"m"}, "gpu.lan", 8080)}));
  check(registry, 0, "+");
  CHECK(offers(*registry.snapshot(), "m") == "(a)");
  const Address address = *parse_address("10.0.0.7", 8080);
  registry.set_address(registry.backends()[0], address);
  const auto snapshot = registry.snapshot();
  CHECK(offers(*snapshot, "m") == "a");
  CHECK(snapshot->backends[0].address == address);
  CHECK(snapshot->backends[0].request_lines == "Host: gpu.lan:8080\r\n");
}

TEST_CASE("a backend's own key goes where its type of server reads it, in requests and in checks") {
  for (const BackendKind kind : {BackendKind::vllm, BackendKind::anthropic}) {
    CAPTURE(std::string(name_of(kind)));
    const bool both = kind == BackendKind::anthropic;
    const std::string keys = std::string("Authorization: Bearer sk-1\r\n") + (both ? "x-api-key: sk-1\r\n" : "");
    BackendSettings of_key = backend("a", {"m"}, "10.0.0.1", 80);
    of_key.kind = kind;
    of_key.api_key = "sk-1";
    Registry registry;
    configure(registry, with({of_key}));
    CHECK(registry.snapshot()->backends[0].request_lines == "Host: 10.0.0.1\r\n" + keys);
    CHECK(registry.snapshot()->backends[0].has_key);
    const nexus::ProbeOrder order = nexus::order_of(of_key, {}, 1, kSecond);
    CHECK(order.lines == keys + (both ? "anthropic-version: 2023-06-01\r\n" : ""));
  }
}

TEST_CASE("a check that passes ends the memory of unknown paths, an address of its own begins without it") {
  Registry registry;
  configure(registry, with({backend("a", {"m"})}));
  check(registry, 0, "+");
  const Endpoint& rerank =
      *std::find_if(kEndpoints.begin(), kEndpoints.end(), [](const Endpoint& row) { return row.path == "/v1/rerank"; });
  const auto speaks = [&](const Endpoint& endpoint) { return registry.snapshot()->backends[0].speaks(endpoint); };
  CHECK(registry.backends()[0].facts->note_missing(bit_of(rerank)));
  CHECK_FALSE(registry.backends()[0].facts->note_missing(bit_of(rerank)));
  CHECK_FALSE(speaks(rerank));
  CHECK(speaks(kEndpoints[0]));
  check(registry, 0, "-");
  CHECK_FALSE(speaks(rerank));
  check(registry, 0, "+");
  CHECK(speaks(rerank));
  registry.backends()[0].facts->note_missing(bit_of(rerank));
  registry.set_address(registry.backends()[0], *parse_address("10.0.0.9", 8080));
  CHECK(speaks(rerank));
}

TEST_CASE("the Host field is the configured host, with its port unless it is 80") {
  struct Row {
    const char* host;
    std::uint16_t port;
    const char* expected;
  };
  const std::vector<Row> rows = {{"127.0.0.1", 11434, "127.0.0.1:11434"},
                                 {"gpu.lan", 80, "gpu.lan"},
                                 {"gpu.lan.", 81, "gpu.lan:81"},
                                 {"::1", 8000, "[::1]:8000"},
                                 {"::1", 80, "[::1]"}};
  for (const Row& row : rows) {
    Registry registry;
    configure(registry, with({backend("a", {}, row.host, row.port)}));
    CHECK(registry.snapshot()->backends[0].request_lines == "Host: " + std::string(row.expected) + "\r\n");
  }
}

TEST_CASE("models are the configured ones, else the discovered ones; unhealthy backends are offered too") {
  Registry registry;
  configure(registry, with({backend("a", {"fixed"}), backend("b"), backend("c")}));
  CHECK(registry.set_models(registry.backends()[0], list_of({"seen"})));
  CHECK(registry.set_models(registry.backends()[1], list_of({"z", "fixed", "y", "z"})));
  CHECK_FALSE(registry.set_models(registry.backends()[1], list_of({"y", "z", "fixed"})));
  check(registry, 1, "+");
  const auto snapshot = registry.snapshot();
  CHECK(offers(*snapshot, "fixed") == "(a) b");
  CHECK(offers(*snapshot, "z") == "b");
  CHECK(offers(*snapshot, "seen") == "no such name");
  CHECK(snapshot->find("unheard of") == nullptr);

  CHECK(registry.set_models(registry.backends()[1], list_of({"y"})));
  CHECK(offers(*registry.snapshot(), "fixed") == "(a)");
  CHECK(offers(*snapshot, "fixed") == "(a) b");  // an old snapshot does not change
}

TEST_CASE("an alias resolves to its model over up to three hops, and hides a model of its name") {
  Registry registry;
  Settings settings = with({backend("a", {"llama", "shadowed"}), backend("b", {"qwen"})});
  settings.aliases = {{"one", "two"}, {"two", "three"}, {"three", "llama"}, {"shadowed", "qwen"}, {"dead", "nothing"}};
  settings.fallbacks = {{"llama", {"qwen"}}, {"two", {"other"}}};
  settings.health.enabled = false;
  configure(registry, settings);
  const auto snapshot = registry.snapshot();
  for (const char* name : {"one", "two", "three"}) {
    CAPTURE(name);
    const ModelEntry* entry = snapshot->find(name);
    REQUIRE(entry != nullptr);
    CHECK(entry->is_alias());
    CHECK(entry->name == name);
    CHECK(entry->target == "llama");
    CHECK(entry->target_id == snapshot->find("llama")->id);
    CHECK(entry->id != entry->target_id);
    CHECK(offers(*snapshot, name) == "a");
  }
  CHECK(snapshot->find("one")->fallbacks == std::vector<std::string>{"qwen"});
  CHECK(snapshot->find("two")->fallbacks == std::vector<std::string>{"other"});  // its own, if it has any
  CHECK(offers(*snapshot, "shadowed") == "b");
  CHECK(offers(*snapshot, "dead") == "");
  CHECK_FALSE(snapshot->find("llama")->is_alias());
}

TEST_CASE("a name that occurs only in the configuration has an id and no offer") {
  Registry registry;
  Settings settings = with({backend("a", {"m"})});
  settings.fallbacks = {{"absent", {"m", "missing"}}};
  configure(registry, settings);
  const auto snapshot = registry.snapshot();
  for (const char* name : {"absent", "missing"}) {
    CAPTURE(name);
    REQUIRE(snapshot->find(name) != nullptr);
    CHECK(snapshot->find(name)->id != ModelId::unknown);
    CHECK(snapshot->find(name)->offers.empty());
  }
  CHECK(snapshot->find("absent")->fallbacks == std::vector<std::string>{"m", "missing"});
}

TEST_CASE("a capability without a list holds for all models, one with a list for the listed models") {
  Registry registry;
  BackendSettings a = backend("a", {"sees", "blind"});
  a.vision = {true, {"sees"}};
  a.tools = {true, {"*"}};
  a.json_mode = {true, {}};
  configure(registry, with({a}));
  const auto snapshot = registry.snapshot();
  CHECK(snapshot->any_vision_stated);
  CHECK(capabilities(*snapshot, "sees") == Capabilities{.vision = true, .tools = true, .json_mode = false});
  CHECK(capabilities(*snapshot, "blind") == Capabilities{.vision = false, .tools = true, .json_mode = false});

  configure(registry, with({backend("a", {"m"})}));
  CHECK_FALSE(registry.snapshot()->any_vision_stated);
  CHECK(capabilities(*registry.snapshot(), "m") == Capabilities{});
}

TEST_CASE("a model's own context length overrides that of `*`, in either order") {
  const std::vector<std::vector<ContextLength>> orders = {{{"*", 4096}, {"long", 131072}},
                                                          {{"long", 131072}, {"*", 4096}}};
  for (const auto& order : orders) {
    Registry registry;
    BackendSettings a = backend("a", {"long", "short"});
    a.context_length = order;
    configure(registry, with({a}));
    CHECK(capabilities(*registry.snapshot(), "long").context_tokens == 131072);
    CHECK(capabilities(*registry.snapshot(), "short").context_tokens == 4096);
  }
}

TEST_CASE("usage is requested unless the backend is generic, or as the configuration says") {
  struct Row {
    BackendKind kind;
    StreamUsage stream_usage;
    bool ask;
  };
  const std::vector<Row> rows = {
      {BackendKind::vllm, StreamUsage::by_kind, true},   {BackendKind::generic, StreamUsage::by_kind, false},
      {BackendKind::vllm, StreamUsage::as_is, false},    {BackendKind::generic, StreamUsage::ask, true},
      {BackendKind::ollama, StreamUsage::by_kind, true}, {BackendKind::generic, StreamUsage::as_is, false},
  };
  for (const Row& row : rows) {
    Registry registry;
    BackendSettings a = backend("a");
    a.kind = row.kind;
    a.stream_usage = row.stream_usage;
    configure(registry, with({a}));
    CHECK(registry.snapshot()->backends[0].ask_usage == row.ask);
  }
}

TEST_CASE("a reload keeps the state of an unchanged backend, and resets it if the url or type changed") {
  struct Row {
    const char* name;
    std::function<void(BackendSettings&)> change;
    bool kept;
  };
  const std::vector<Row> rows = {
      {"nothing", [](BackendSettings&) {}, true},
      {"priority", [](BackendSettings& b) { b.priority = 7; }, true},
      {"models", [](BackendSettings& b) { b.models = {"m"}; }, true},
      {"api_key", [](BackendSettings& b) { b.api_key = "k"; }, true},
      {"max_pending", [](BackendSettings& b) { b.max_pending = 7; }, true},
      {"capabilities", [](BackendSettings& b) { b.vision.stated = true; }, true},
      {"type", [](BackendSettings& b) { b.kind = BackendKind::vllm; }, false},
      {"host", [](BackendSettings& b) { b.address.host = "127.0.0.2"; }, false},
      {"port", [](BackendSettings& b) { b.address.port = 1; }, false},
      {"path", [](BackendSettings& b) { b.base_path = "/v2"; }, false},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    Registry registry;
    configure(registry, with({backend("other", {}, "127.0.0.9"), backend("a")}));
    registry.set_models(registry.backends()[1], list_of({"m"}));
    check(registry, 1, "+");
    const std::uint64_t epoch = registry.backends()[1].epoch;
    const BackendId id = registry.backends()[1].id;
    BackendSettings changed = backend("a");
    row.change(changed);
    configure(registry, with({changed, backend("new")}));  // at another position in the file
    const Registry::Backend& now = registry.backends()[0];
    CHECK(now.id == id);
    CHECK(now.health == (row.kept ? Health::healthy : Health::unknown));
    CHECK((registry.find_epoch(epoch) == &now) == row.kept);
    CHECK(offers(*registry.snapshot(), "m") == (row.kept ? "a" : "no such name"));
    const auto snapshot = registry.snapshot();
    CHECK(snapshot->backends[0].priority == changed.priority);
    CHECK(snapshot->backends[0].max_pending == changed.max_pending);
    CHECK(snapshot->backends[0].address == parse_address(changed.address.host, changed.address.port));
  }
}

TEST_CASE("the epoch of a removed or changed backend finds nothing") {
  Registry registry;
  configure(registry, with({backend("a"), backend("b")}));
  const std::uint64_t first = registry.backends()[0].epoch;
  CHECK(registry.find_epoch(first) == &registry.backends()[0]);
  configure(registry, with({backend("b")}));
  CHECK(registry.find_epoch(first) == nullptr);
  configure(registry, with({backend("a"), backend("b")}));
  CHECK(registry.find_epoch(first) == nullptr);
}

TEST_CASE("ids outlive backends and models, and are never reused") {
  Registry registry;
  configure(registry, with({backend("a", {"m"}), backend("b", {"n"})}));
  const auto before = registry.snapshot();
  configure(registry, with({backend("c", {"o"})}));
  const auto between = registry.snapshot();
  CHECK(between->backends[0].id != before->backends[0].id);
  CHECK(between->backends[0].id != before->backends[1].id);
  CHECK(between->find("o")->id != before->find("m")->id);
  configure(registry, with({backend("b", {"n"}), backend("a", {"m"})}));
  const auto after = registry.snapshot();
  CHECK(after->backends[1].id == before->backends[0].id);
  CHECK(after->backends[0].id == before->backends[1].id);
  CHECK(after->find("m")->id == before->find("m")->id);
  CHECK(registry.backend_names().name(before->backends[0].id) == "a");
  CHECK(registry.model_names().name(before->find("m")->id) == "m");
}

TEST_CASE("a fleet with too many model names runs out of ids, and is still served") {
  Registry registry;
  configure(registry, with({backend("a")}));
  check(registry, 0, "+");
  for (int batch = 0; batch < 3; ++batch) {
    std::vector<std::string> names;
    for (std::size_t i = 0; i < kMaxModelsPerBackend; ++i) {
      names.push_back("m" + std::to_string(batch) + "-" + std::to_string(i));
    }
    registry.set_models(registry.backends()[0], list_of(names));
    registry.snapshot();
  }
  CHECK(registry.model_names().full());
  CHECK(registry.model_names().size() == kMaxModelNames);
  const auto snapshot = registry.snapshot();
  CHECK(snapshot->find("m2-9999")->id == ModelId::unknown);
  CHECK(offers(*snapshot, "m2-9999") == "a");
  CHECK(snapshot->find("m0-1") == nullptr);
}

TEST_CASE("each snapshot has its own version and keeps its settings") {
  Registry registry;
  configure(registry, with({backend("a")}));
  const auto first = registry.snapshot();
  configure(registry, with({backend("b")}));
  const auto second = registry.snapshot();
  CHECK(first->version < second->version);
  CHECK(first->settings->backends[0].name == "a");
  CHECK(first->backends[0].name == "a");
  CHECK(second->settings->backends[0].name == "b");
}

TEST_CASE("ejection and health belong to an address: another one begins anew, the same one keeps them") {
  Registry registry;
  configure(registry, with({backend("a", {"m"}, "gpu.lan"), backend("b", {"m"})}));
  check(registry, 0, "-");
  check(registry, 1, "-");
  const Address first = *parse_address("10.0.0.7", 8080), second = *parse_address("10.0.0.8", 8080);
  registry.set_address(registry.backends()[0], first);
  const auto circuit = registry.snapshot()->backends[0].circuit;
  const auto other = registry.snapshot()->backends[1].circuit;
  CHECK(circuit->server() != other->server());
  check(registry, 0, "-");
  registry.set_address(registry.backends()[0], first);
  CHECK(registry.snapshot()->backends[0].circuit == circuit);
  CHECK(registry.backends()[0].health == Health::unhealthy);

  SUBCASE("a new address of its name") {
    registry.set_address(registry.backends()[0], second);
    CHECK(registry.snapshot()->backends[0].circuit->server() != circuit->server());
    check(registry, 0, "+");
    CHECK(registry.backends()[0].health == Health::healthy);
  }
  SUBCASE("another url") {
    configure(registry, with({backend("a", {"m"}, "10.0.0.8"), backend("b", {"m"})}));
    CHECK(registry.snapshot()->backends[0].circuit->server() != circuit->server());
    CHECK(registry.backends()[0].health == Health::unknown);
  }
  SUBCASE("other limits of ejection: no ejection is left, but the server is the same") {
    Settings settings = with({backend("a", {"m"}, "gpu.lan"), backend("b", {"m"})});
    settings.health.eject_time_ns = kSecond;
    configure(registry, settings);
    CHECK(registry.snapshot()->backends[0].circuit != circuit);
    CHECK(registry.snapshot()->backends[0].circuit->server() == circuit->server());
  }
  CHECK(registry.snapshot()->backends[1].circuit->server() == other->server());
}

TEST_CASE("a backend is unknown again if a reload switches checks on, or wants its list of models") {
  Registry registry;
  Settings unchecked = with({backend("a", {"m"})});
  unchecked.health.enabled = false;
  configure(registry, unchecked);
  CHECK(registry.backends()[0].health == Health::healthy);
  configure(registry, with({backend("a", {"m"})}));
  CHECK(registry.backends()[0].health == Health::unknown);
  check(registry, 0, "+");
  configure(registry, with({backend("a", {"m", "n"})}));
  CHECK(registry.backends()[0].health == Health::healthy);
  configure(registry, with({backend("a")}));
  CHECK(registry.backends()[0].health == Health::unknown);
}

TEST_CASE("for Ollama a name without a tag is the latest, and the reverse; the list has only what the backend lists") {
  BackendSettings ollama = backend("o");
  ollama.kind = BackendKind::ollama;
  ollama.vision = {true, {"llama3"}};
  Registry registry;
  configure(registry, with({ollama, backend("v", {"llama3"}, "127.0.0.1", 8081)}));
  registry.set_models(registry.backends()[0], list_of({"llama3:latest", "phi3:mini", "host:5000/x"}));
  check(registry, 0, "+");
  check(registry, 1, "+");
  const auto snapshot = registry.snapshot();
  CHECK(offers(*snapshot, "llama3:latest") == "o");
  CHECK(offers(*snapshot, "llama3") == "o v");
  CHECK(offers(*snapshot, "phi3") == "no such name");
  CHECK(offers(*snapshot, "host:5000/x:latest") == "o");
  CHECK(capabilities(*snapshot, "llama3:latest").vision);
  CHECK_FALSE(capabilities(*snapshot, "phi3:mini").vision);
  CHECK(snapshot->backends[snapshot->preferred_offer(*snapshot->find("llama3"))->backend].name == "v");
  CHECK(snapshot->preferred_offer(*snapshot->find("host:5000/x:latest"))->implied);
}

TEST_CASE("an alias and a fallback may name a model of Ollama without its tag") {
  BackendSettings ollama = backend("o");
  ollama.kind = BackendKind::ollama;
  Settings settings = with({ollama});
  settings.aliases = {{"gpt", "llama3"}};
  settings.fallbacks = {{"big", {"llama3"}}};
  Registry registry;
  configure(registry, settings);
  registry.set_models(registry.backends()[0], list_of({"llama3:latest"}));
  check(registry, 0, "+");
  const auto snapshot = registry.snapshot();
  CHECK(offers(*snapshot, "gpt") == "o");
  CHECK(offers(*snapshot, snapshot->find("big")->fallbacks.at(0)) == "o");
}

TEST_CASE("a model's preferred offer is of the healthy backend of the lowest priority number") {
  std::vector<BackendSettings> backends = {backend("a", {"m"}), backend("b", {"m"}), backend("c", {"m"})};
  backends[0].priority = 10;
  backends[1].priority = 30;
  backends[2].priority = 20;
  Registry registry;
  configure(registry, with(backends));
  const auto preferred = [&] {
    const auto snapshot = registry.snapshot();
    const Offer* offer = snapshot->preferred_offer(*snapshot->find("m"));
    return offer == nullptr ? std::string("none") : snapshot->backends[offer->backend].name;
  };
  CHECK(preferred() == "none");
  check(registry, 1, "+");
  CHECK(preferred() == "b");
  check(registry, 2, "+");
  CHECK(preferred() == "c");
  check(registry, 0, "+");
  CHECK(preferred() == "a");
}

TEST_CASE("an unknown model may still appear while a backend's list was never read, unless its name has no address") {
  Registry registry;
  configure(registry, with({backend("a", {"m"}), backend("b", {}, "gpu.lan")}));
  Registry::Backend& b = registry.backends()[1];
  CHECK(registry.snapshot()->discovering);
  check(registry, 1, "-");
  CHECK(registry.snapshot()->discovering);
  b.lookup_failed = true;
  CHECK_FALSE(registry.snapshot()->discovering);
  b.lookup_failed = false;
  registry.set_models(b, {});
  CHECK_FALSE(registry.snapshot()->discovering);
}

TEST_CASE("a backend that is not up is checked again after a second, doubled up to the interval") {
  Settings settings = with({backend("a", {"m"})});
  settings.health.interval_ns = 10 * kSecond;
  Registry registry;
  configure(registry, settings);
  Registry::Backend& a = registry.backends()[0];
  const auto next = [&](bool passed) {
    registry.note_check(a, passed);
    return registry.next_check_in(a, passed) / kSecond;
  };
  for (const Ns expected : {1, 2, 4, 8, 10, 10}) CHECK(next(false) == expected);
  CHECK(next(true) == 10);
  for (const Ns expected : {1, 2, 4}) CHECK(next(false) == expected);  // the third makes it unhealthy
  CHECK(next(true) == 1);                                              // one of two recoveries
  CHECK(next(true) == 10);
  for (int i = 0; i < 1000; ++i) next(false);
  CHECK(next(false) == 10);
}

TEST_CASE("each check after a failure begins with another address of the backend") {
  Registry registry;
  configure(registry, with({backend("a", {"m"}, "gpu.lan")}));
  Registry::Backend& a = registry.backends()[0];
  for (std::uint16_t port = 1; port <= 3; ++port) a.addresses.push_back(*parse_address("10.0.0.1", port));
  registry.set_address(a, a.addresses[1]);
  const auto order = [&] {
    std::string ports;
    for (const Address& address : a.to_try()) ports += std::to_string(address.port);
    return ports;
  };
  CHECK(order() == "231");
  registry.next_check_in(a, false);
  CHECK(order() == "231");
  registry.next_check_in(a, false);
  CHECK(order() == "312");
  registry.next_check_in(a, false);
  CHECK(order() == "123");
  registry.next_check_in(a, true);
  CHECK(order() == "231");
  // However long none answers.
  std::string first;
  for (int i = 0; i < 60; ++i) {
    registry.next_check_in(a, false);
    if (i >= 50) first += order().front();
  }
  CHECK(first.find("123123") != std::string::npos);
}

TEST_CASE("the first names of keys that were ever read have ids of their own, also after a reload; others share one") {
  const auto configure = [](Registry& registry, std::uint32_t most, std::vector<ApiKey> keys) {
    auto settings = std::make_shared<Settings>();
    settings->metrics.keys = most;
    settings->server.api_keys = std::move(keys);
    registry.configure(settings);
    std::vector<std::uint32_t> ids;
    const auto made = registry.snapshot();
    for (std::size_t i = 0; i < made->keys->size(); ++i) {
      CHECK((*made->keys)[i].settings->name == made->settings->server.api_keys[i].name);
      ids.push_back(index_of((*made->keys)[i].id));
    }
    return ids;
  };
  using Ids = std::vector<std::uint32_t>;
  Registry registry;
  CHECK(configure(registry, 2, {{"a", "k1"}, {"b", "k2"}, {"c", "k3"}}) == Ids{2, 3, 1});
  CHECK(configure(registry, 2, {{"c", "k3"}, {"b", "k2"}}) == Ids{1, 3});
  CHECK(configure(registry, 2, {}).empty());
  CHECK(configure(registry, 3, {{"c", "k3"}, {"a", "k1"}, {"d", "k4"}}) == Ids{4, 2, 1});
  CHECK(configure(registry, 0, {{"a", "k1"}, {"e", "k5"}}) == Ids{2, 1});
  CHECK(configure(registry, 9, {{"none", "k6"}, {"other", "k7"}}) == Ids{0, 1});
}

TEST_CASE("a backend that is spoken to in another way begins anew, and one that is checked no more has no problem") {
  Registry registry;
  Settings settings = with({backend("a", {"m"})});
  configure(registry, settings);
  const std::uint64_t server = registry.backends()[0].circuit->server();
  registry.backends()[0].problem = "connect: Connection refused";
  configure(registry, settings);
  CHECK(registry.backends()[0].circuit->server() == server);
  settings.backends[0].tls.on = true;
  configure(registry, settings);
  CHECK(registry.backends()[0].circuit->server() != server);
  CHECK(registry.backends()[0].problem.empty());
  registry.backends()[0].problem = "connect: Connection refused";
  settings.health.enabled = false;
  configure(registry, settings);
  CHECK(registry.backends()[0].problem.empty());
}

TEST_CASE("a key that may use a model may use it under the name with Ollama's default tag, and without") {
  const ApiKey key{"a", "k", {}, {"llama3", "qwen2:latest", "big:7b", "mini*"}};
  for (const char* model : {"llama3", "llama3:latest", "qwen2", "qwen2:latest", "big:7b", "mini", "mini:1b"}) {
    CAPTURE(std::string(model));
    CHECK(key.may_use(model));
  }
  for (const char* model : {"llama3:8b", "qwen2:7b", "big", "big:latest", "llama", ":latest", ""}) {
    CAPTURE(std::string(model));
    CHECK_FALSE(key.may_use(model));
  }
}
