// Goal: what `nexus check` asks and says. Method: answers as a backend of each kind gives them, and the verdict on
// each.
#include "nexus/apps/check.h"

#include <doctest/doctest.h>

#include "nexus/config/parser.h"

using namespace nexus;

namespace {

ProbeResult answered(std::uint16_t status, std::vector<std::string> models = {}) {
  ProbeResult result;
  result.connected = true;
  result.status = status;
  result.passed = status / 100 == 2;
  result.round_trip_ns = 12'340 * kMicrosecond;
  result.models_read = result.passed && !models.empty();
  for (const std::string& model : models) result.models.emplace_back().name = model;
  if (!result.passed) result.reason = "it answered " + std::to_string(status);
  return result;
}

ProbeResult refused() {
  ProbeResult result;
  result.reason = "connect: Connection refused";
  return result;
}

// What answers where: a server as it is, whatever it is configured as.
struct Server {
  ProbeResult tags, health, list;

  ProbeResult as(BackendKind kind) const {
    if (kind == BackendKind::ollama) return tags;
    if (kind != BackendKind::llamacpp || !health.passed) return kind == BackendKind::llamacpp ? health : list;
    return list;  // its models come from the list, once its health is good
  }
};

const Server kOllama{answered(200, {"llama3:latest"}), answered(404), answered(200, {"llama3:latest"})};
const Server kLlamaCpp{answered(200, {"phi3"}), answered(200), answered(200, {"phi3"})};
const Server kVllm{answered(404), answered(200), answered(200, {"qwen2"})};
const Server kLmStudio{answered(404), answered(404), answered(200, {"gemma"})};
const Server kDown{refused(), refused(), refused()};
const Server kKeyed{answered(401), answered(401), answered(401)};
const Server kNothing{answered(404), answered(404), answered(404)};

CheckState ask_all(const Server& server, BackendKind kind, BackendSettings settings = {}) {
  CheckState state;
  state.settings = std::move(settings);
  state.settings.kind = kind;
  state.settings.name = "b";
  state.addresses.emplace_back();
  for (int probes = 0; probes < 4; ++probes) {
    const auto next = next_probe(state);
    if (!next) return state;
    std::optional<ProbeResult>& place = state.results[static_cast<std::size_t>(*next)];
    CHECK_FALSE(place.has_value());  // no probe is sent twice
    place = server.as(*next);
  }
  CHECK_FALSE(next_probe(state).has_value());
  return state;
}

TEST_CASE("every kind's name is the one that `type` takes") {
  for (std::size_t i = 0; i < kBackendKinds.size(); ++i) {
    const std::string name(kBackendKinds[i].name);
    const ConfigResult result =
        parse_config("[backend b]\ntype = " + name + (name == "echo" ? "\n" : "\nurl = http://127.0.0.1:1\n"), "test",
                     system_environment());
    REQUIRE(result.ok());
    CHECK(static_cast<std::size_t>(result.settings.backends[0].kind) == i);
  }
}

TEST_CASE("a server that is what it is configured as is good, and one that is another is named") {
  struct Row {
    const char* name;
    const Server& server;
    BackendKind kind;
    bool good;
    std::string_view remark;  // part of it; empty: none
  };
  const std::vector<Row> rows{
      {"ollama", kOllama, BackendKind::ollama, true, ""},
      {"ollama as vllm", kOllama, BackendKind::vllm, true, "type = ollama"},
      {"ollama as generic", kOllama, BackendKind::generic, true, "type = ollama"},
      {"ollama as llamacpp", kOllama, BackendKind::llamacpp, false, "type = ollama"},
      {"llamacpp", kLlamaCpp, BackendKind::llamacpp, true, ""},
      {"llamacpp as ollama", kLlamaCpp, BackendKind::ollama, true, "type = llamacpp"},
      {"llamacpp as openai", kLlamaCpp, BackendKind::openai, true, "type = llamacpp"},
      {"vllm", kVllm, BackendKind::vllm, true, ""},
      {"vllm as ollama", kVllm, BackendKind::ollama, false,
       "it is no ollama, but lists models at /v1/models: set type = generic"},
      {"lmstudio", kLmStudio, BackendKind::lmstudio, true, ""},
      {"lmstudio as llamacpp", kLmStudio, BackendKind::llamacpp, false,
       "it is no llamacpp, but lists models at /v1/models: set type = generic"},
      {"down", kDown, BackendKind::vllm, false, "Connection refused"},
      {"keyed", kKeyed, BackendKind::openai, false, "it requires an API key (401)"},
      {"no such path", kNothing, BackendKind::openai, false, "it answered 404"},
      {"no such path, ollama", kNothing, BackendKind::ollama, false, "it answered 404"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    const CheckLine line = judge(ask_all(row.server, row.kind));
    CHECK(line.good == row.good);
    std::string remarks;
    for (const std::string& remark : line.remarks) remarks += remark + "; ";
    CAPTURE(remarks);
    if (row.remark.empty()) CHECK(remarks == "");
    if (!row.remark.empty()) CHECK(remarks.find(row.remark) != std::string::npos);
  }
}

TEST_CASE("a key that is refused is told from one that is missing, also where only the list of models asks for it") {
  BackendSettings settings;
  settings.api_key = "secret";
  CheckState state = ask_all(kKeyed, BackendKind::openai, settings);
  CHECK(judge(state).remarks[0] == "it rejects the API key (401)");
  CHECK(check_table({state}).find("secret") == std::string::npos);

  state.settings.kind = BackendKind::llamacpp;
  ProbeResult& own = state.results[static_cast<std::size_t>(BackendKind::llamacpp)].emplace(answered(200));
  own.status = 403;  // its health is public
  own.reason = "its list of models answered 403";
  const CheckLine line = judge(state);
  CHECK(line.healthy);
  CHECK_FALSE(line.good);
  CHECK(line.remarks == std::vector<std::string>{"it rejects the API key (403)"});
}

TEST_CASE("models of a fixed list that the backend lacks make it bad") {
  BackendSettings settings;
  settings.models = {"llama3", "mistral"};
  const CheckLine line = judge(ask_all(kOllama, BackendKind::ollama, settings));
  CHECK_FALSE(line.good);
  CHECK(line.remarks == std::vector<std::string>{"it has no model mistral"});
  settings.models = {"llama3"};  // Ollama's latest
  CHECK(judge(ask_all(kOllama, BackendKind::ollama, settings)).good);
}

TEST_CASE("a host that is not resolved is asked nothing, and named") {
  CheckState state;
  state.settings.address.host = "gpu.example";
  state.resolve_error = "Domain name not found";
  CHECK_FALSE(next_probe(state).has_value());
  const CheckLine line = judge(state);
  CHECK_FALSE(line.reachable);
  CHECK_FALSE(line.good);
  CHECK(line.remarks == std::vector<std::string>{"DNS lookup failed for gpu.example: Domain name not found"});
}

TEST_CASE("the table lines up, and a hostile name cannot leave its cell") {
  CheckState echo;
  echo.settings.kind = BackendKind::echo;
  echo.settings.name = "demo";
  CheckState hostile =
      ask_all(Server{answered(404), answered(404), answered(200, {"\x1b[2Jx\ny", "m\xc3\xb6"})}, BackendKind::vllm);
  const std::string text = check_table({echo, hostile});
  CHECK(text ==
        "BACKEND  TYPE  REACHABLE  HEALTHY  LATENCY  MODELS                REMARKS\n"
        "demo     echo  yes        yes            -  1: echo               built in\n"
        "b        vllm  yes        yes      12.3 ms  2: \\u001b[2Jx\\ny, m\xc3\xb6  -\n"
        "2 of 2 backends are good\n");
  CHECK(all_good({echo, hostile}));
  CHECK_FALSE(all_good({echo, ask_all(kDown, BackendKind::vllm)}));
}

TEST_CASE("no backend is no trouble") {
  CHECK(check_table({}).find("0 of 0 backends are good\n") != std::string::npos);
}

}  // namespace

TEST_CASE("a url that ends in an endpoint's path is named, because Nexus adds the path itself") {
  for (const char* url : {"http://h/v1/chat/completions", "http://h/v1/completions/", "http://h/x/v1/models"}) {
    CAPTURE(url);
    BackendSettings settings;
    REQUIRE(config::parse_url(url, settings).empty());
    for (const Server* server : {&kNothing, &kVllm}) {
      const CheckLine line = judge(ask_all(*server, BackendKind::vllm, settings));
      CHECK_FALSE(line.good);
      CHECK(std::any_of(line.remarks.begin(), line.remarks.end(),
                        [](const std::string& remark) { return remark.starts_with("its url ends in /"); }));
    }
  }
  BackendSettings settings;
  REQUIRE(config::parse_url("http://h/models/v1", settings).empty());
  CHECK(judge(ask_all(kVllm, BackendKind::vllm, {})).good);
}

TEST_CASE("an alias or a fallback that leads to a model which no backend has gets a line") {
  Settings settings;
  settings.aliases = {{"gpt-4", "qwen2"}, {"gpt-5", "gpt-4"}, {"small", "llama3"}, {"big", "llama3:70b"}};
  settings.fallbacks = {{"qwen2", {"llama3:latest", "fixed", "gone"}}, {"unheard-of", {"big"}}};
  BackendSettings fixed;
  fixed.models = {"fixed"};
  const std::vector<CheckState> states{ask_all(kVllm, BackendKind::vllm), ask_all(kOllama, BackendKind::ollama),
                                       ask_all(kDown, BackendKind::vllm, fixed)};
  CHECK(dangling_names(settings, states) ==
        std::vector<std::string>{"alias big: no backend lists llama3:70b", "fallback of qwen2: no backend lists gone"});
}
