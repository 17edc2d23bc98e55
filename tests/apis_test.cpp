// apis_test.cpp
// Goal:   a request goes only to a server that serves its API, and an error has the shape that the API's clients read.
// Method: one worker on the scripted network, with up to three backends that answer as real servers do.
#include <doctest/doctest.h>

#include <string>

#include "tests/lib/stage.h"

using namespace nexus;
using sim::Peer;
using sim::Stage;

namespace {

std::string response(int status, std::string_view type, std::string_view body) {
  return "HTTP/1.1 " + std::to_string(status) + " X\r\nContent-Type: " + std::string(type) +
         "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + std::string(body);
}
std::string json(int status, std::string_view body) { return response(status, "application/json", body); }

const std::string kGood = json(200, R"({"ok":true,"usage":{"prompt_tokens":1}})");

void no_retries(Settings& settings) { settings.routing.retries = 0; }

}  // namespace

TEST_CASE("a server that does not know the path is passed over, without a retry, and not asked again") {
  const std::string errors[] = {
      json(404, R"({"detail":"Not Found"})"),
      response(404, "text/plain", "404 page not found"),
      response(404, "application/json", "Not Found"),
      response(404, "text/plain", "404: Not Found"),
      json(404, R"({"error":{"code":404,"message":"File Not Found","type":"not_found_error"}})"),
      json(404, "{\"error\": {\n \"message\": \"File Not Found\", \"code\": 404}}"),
      json(404, R"x({"error":{"message":"Invalid URL (POST /v1/rerank)","type":"invalid_request_error"}})x"),
      json(200, R"({"error":"Unexpected endpoint or method. (POST /v1/rerank). Returning 200 anyway"})"),
      json(404, ""),
      "HTTP/1.1 404 X\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
      "HTTP/1.1 404 X\r\nTransfer-Encoding: chunked\r\n\r\n16\r\n{\"detail\":\"Not Found\"}\r\n0\r\n\r\n",
  };
  for (const std::string& error : errors) {
    CAPTURE(error);
    Stage stage(3, no_retries);
    Peer& client = stage.ask(sim::kAsk, "/v1/rerank");
    stage.say(*stage.backend(1), error);
    REQUIRE(stage.backend(2) != nullptr);
    stage.say(*stage.backend(2), error);
    REQUIRE(stage.backend(3) != nullptr);
    stage.say(*stage.backend(3), kGood);
    CHECK(stage.answer_to(client).status == 200);
    CHECK(stage.attempts(AttemptOutcome::ok, 1) == 1);
    CHECK(stage.attempts(AttemptOutcome::ok, 3) == 1);
    CHECK_FALSE(stage.ejected(1));
    CHECK(stage.all_errors() == 0);
    Peer& second = stage.ask(sim::kAsk, "/v1/rerank");
    CHECK(stage.attempts(AttemptOutcome::ok, 1) == 1);
    stage.say(*stage.backend(3), kGood);
    CHECK(stage.answer_to(second).status == 200);
    // It is one path that the server does not know.
    Peer& chat = stage.ask();
    stage.say(*stage.backend(1), kGood);
    CHECK(stage.answer_to(chat).status == 200);
  }
}

TEST_CASE("a 404 about a model, and every other answer, is the client's") {
  const std::string answers[] = {
      json(404, R"({"error":{"message":"The model `m` does not exist.","type":"NotFoundError","code":404}})"),
      json(404, R"({"error":"model 'm' not found"})"),
      json(404, std::string(5000, ' ') + R"({"detail":"Not Found"})"),
      json(405, R"({"detail":"Method Not Allowed"})"),
      json(200, R"({"results":[]})"),
      response(404, "text/html", "<h1>File not found</h1>"),
      response(404, "text/plain", "Not Found: the model m"),
  };
  for (const std::string& answer : answers) {
    CAPTURE(answer);
    Stage stage(2);
    Peer& client = stage.ask(sim::kAsk, "/v1/rerank");
    stage.say(*stage.backend(1), answer);
    CHECK(stage.backend(2) == nullptr);
    CHECK(stage.answer_to(client).status == std::stoi(answer.substr(9)));
    CHECK(client.received.ends_with(answer.substr(answer.find("\r\n\r\n") + 4)));
  }
}

TEST_CASE("where no backend of the model serves the path, the client is told so and who has the model") {
  SUBCASE("by their answers") {
    Stage stage(2);
    Peer& client = stage.ask(sim::kAsk, "/v1/messages");
    stage.say(*stage.backend(1), json(404, R"({"detail":"Not Found"})"));
    stage.say(*stage.backend(2), response(404, "text/plain", "404 page not found"));
    const rfc9112::Message answer = stage.answer_to(client);
    CHECK(answer.status == 501);
    CHECK(answer.body.find(R"("message":"None of the backends of the model 'm' serves POST /v1/messages: b1, b2.)") !=
          std::string::npos);
    CHECK(answer.body.starts_with(R"({"type":"error","error":{"type":"api_error",)"));
    CHECK(stage.errors(ErrorType::no_backend) == 1);
    CHECK(stage.all_errors() == 1);
  }
  SUBCASE("by the configuration") {
    Stage stage(2, [](Settings& settings) {
      for (BackendSettings& backend : settings.backends) backend.apis = apis(Api::chat, Api::embeddings);
    });
    const rfc9112::Message answer = stage.answer_to(stage.ask(sim::kAsk, "/v1/rerank"));
    CHECK(answer.status == 501);
    CHECK(answer.body.find("serves POST /v1/rerank: b1, b2.") != std::string::npos);
    CHECK(stage.backend() == nullptr);
  }
}

TEST_CASE("a request goes to the backend that serves its API, also under another model") {
  Stage stage(2, [](Settings& settings) {
    settings.backends[0].apis = apis(Api::chat);
    settings.backends[1].models = {"other"};
    settings.fallbacks = {{"m", {"other"}}};
  });
  Peer& client = stage.ask(sim::kAsk, "/v1/rerank");
  CHECK(stage.backend(1) == nullptr);
  REQUIRE(stage.backend(2) != nullptr);
  CHECK(stage.backend(2)->received.find(R"({"model":"other")") != std::string::npos);
  stage.say(*stage.backend(2), kGood);
  CHECK(stage.answer_to(client).status == 200);
}

TEST_CASE("a body without a model goes to any backend that serves the path, unchanged") {
  Stage stage(2, [](Settings& settings) { settings.backends[0].apis = apis(Api::chat); });
  Peer& client = stage.ask(R"({"content":"x"})", "/tokenize");
  REQUIRE(stage.backend(2) != nullptr);
  CHECK(stage.backend(2)->received.ends_with("\r\n\r\n{\"content\":\"x\"}"));
  stage.say(*stage.backend(2), json(200, R"({"tokens":[1]})"));
  CHECK(stage.answer_to(client).status == 200);
  CHECK(stage.all_errors() == 0);
  CHECK(stage.answer_to(stage.ask(R"({"content":"x"})", "/v1/rerank")).status == 400);
}

TEST_CASE("Nexus's own errors have the shape of the endpoint") {
  struct Row {
    const char* path;
    const char* body;
    const char* begins;
    const char* holds;
  };
  const Row rows[] = {
      {"/v1/chat/completions", R"({"model":"x"})", R"({"error":{"message":"The model 'x' )",
       R"("type":"invalid_request_error","param":"model","code":"model_not_found"}})"},
      {"/v1/responses", R"({})", R"({"error":{"message":"The request body has no)", R"("code":"missing_model"}})"},
      {"/v1/messages", R"({"model":"x"})", R"({"type":"error","error":{"type":"not_found_error","message":"The model)",
       R"(},"request_id":"req-7"})"},
      {"/v1/messages", R"({)", R"({"type":"error","error":{"type":"invalid_request_error","message":")", "req-7"},
      {"/v1/messages/count_tokens", R"({})", R"({"type":"error","error":{"type":"invalid_request_error")", "req-7"},
      {"/api/chat", R"({"model":"x"})", R"({"error":"The model 'x' )", "\"}"},
      {"/api/generate", R"([])", R"({"error":"The request body is not)", "\"}"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.path);
    Stage stage;
    Peer& client = stage.net.connect_client();
    stage.settle();
    const std::string body = row.body;
    stage.net.send(client, "POST " + std::string(row.path) +
                               " HTTP/1.1\r\nHost: a\r\nX-Request-Id: req-7\r\nContent-Length: " +
                               std::to_string(body.size()) + "\r\n\r\n" + body);
    stage.settle();
    const rfc9112::Message answer = stage.answer_to(client);
    CHECK(answer.body.starts_with(row.begins));
    CHECK(answer.body.find(row.holds) != std::string::npos);
  }
}

TEST_CASE("a stream that breaks off ends with an error in the framing and shape of its API") {
  struct Row {
    const char* path;
    const char* type;
    const char* end;
  };
  const Row rows[] = {
      {"/v1/chat/completions", "text/event-stream", "\n\ndata: {\"error\":{\"message\":\"The backend closed"},
      {"/v1/messages", "text/event-stream",
       "\n\nevent: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"The backend "
       "closed"},
      {"/v1/responses", "text/event-stream",
       "\n\nevent: error\ndata: {\"type\":\"error\",\"code\":\"bad_gateway\",\"message\":\"The backend closed"},
      {"/api/chat", "application/x-ndjson", "\n{\"error\":\"The backend closed"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.path);
    Stage stage;
    Peer& client = stage.ask(sim::kAskStream, row.path);
    stage.say(*stage.backend(), "HTTP/1.1 200 OK\r\nContent-Type: " + std::string(row.type) +
                                    "\r\nTransfer-Encoding: chunked\r\n\r\n10\r\ndata: {\"a\": 1}\n\n\r\n");
    stage.net.finish(*stage.backend());
    stage.settle();
    CHECK(client.received.find(row.end) != std::string::npos);
    CHECK(client.received.find("\r\n0\r\n\r\n") == std::string::npos);
    CHECK(stage.errors(ErrorType::backend_error) == 1);
  }
}

TEST_CASE("the error line of a broken stream of lines is a line of its own, without an empty one before it") {
  for (const bool whole : {true, false}) {
    Stage stage;
    Peer& client = stage.ask(sim::kAskStream, "/api/chat");
    const std::string lines = std::string("{\"a\":1}\n{\"a\":2}") + (whole ? "\n" : " ");  // 16 bytes
    stage.say(*stage.backend(),
              "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n" +
                  lines + "\r\n");
    stage.net.finish(*stage.backend());
    stage.settle();
    std::string body;
    for (std::size_t at = client.received.find("\r\n\r\n") + 4; at < client.received.size();) {  // of each chunk
      const std::size_t bytes = std::stoul(client.received.substr(at), nullptr, 16);
      at = client.received.find("\r\n", at) + 2;
      body += client.received.substr(at, bytes);
      at += bytes + 2;
    }
    CHECK(body.starts_with(lines + (whole ? "{\"error\":\"" : "\n{\"error\":\"")));
    CHECK(body.ends_with("\"}\n"));
  }
}

namespace {

Peer& send(Stage& stage, const std::string& method, const std::string& target) {
  Peer& client = stage.net.connect_client();
  stage.settle();
  stage.net.send(client, method + " " + target + " HTTP/1.1\r\nHost: a\r\n\r\n");
  stage.settle();
  return client;
}

rfc9112::Message answer_to(const Stage& stage, const Peer& client) { return stage.answer_to(client); }

const std::string kStored = R"({"id":"resp_1","usage":{"input_tokens":1,"output_tokens":1}})";
const std::string kNotFound = json(404, R"({"error":{"message":"Response with id 'resp_1' not found."}})");

}  // namespace

TEST_CASE("a stored response is asked for where it is, by its path or by the next request") {
  for (const bool streamed : {false, true}) {
    CAPTURE(streamed);
    Stage stage(3, no_retries);
    // It is made on the third backend: the others are full of nothing, and do not serve the model.
    Peer& made = stage.ask(streamed ? sim::kAskStream : sim::kAsk, "/v1/responses");
    stage.say(*stage.backend(1), streamed ? response(200, "text/event-stream",
                                                     "event: response.created\ndata: {\"type\":\"response.created\","
                                                     "\"response\":{\"id\":\"resp_1\"}}\n\n")
                                          : json(200, kStored));
    CHECK(stage.answer_to(made).status == 200);
    // By priority, every request goes to the first backend: ejected, it gets none but those for what it holds.
    Peer& broken = stage.ask();
    stage.say(*stage.backend(1), json(500, "{}"));
    CHECK(stage.answer_to(broken).status == 500);
    REQUIRE(stage.ejected(1));
    Peer& other = stage.ask(sim::kAsk, "/v1/responses");
    stage.say(*stage.backend(2), json(200, R"({"id":"resp_2"})"));
    CHECK(stage.answer_to(other).status == 200);
    Peer& got = send(stage, "GET", "/v1/responses/resp_1?include[]=x");
    stage.say(*stage.backend(1), json(200, kStored));
    CHECK(answer_to(stage, got).body == kStored);
    Peer& next = stage.ask(R"({"model":"m","previous_response_id":"resp_1"})", "/v1/responses");
    stage.say(*stage.backend(1), json(200, R"({"id":"resp_3"})"));
    CHECK(stage.answer_to(next).status == 200);
    Peer& gone = stage.ask(R"({"model":"m","previous_response_id":"resp_2"})", "/v1/responses");
    stage.say(*stage.backend(2), kNotFound);
    CHECK(stage.answer_to(gone).status == 404);
  }
}

TEST_CASE("for an unknown id each backend that serves the API is asked, once; the first that knows it answers") {
  Stage stage(3, [](Settings& settings) {
    settings.routing.retries = 0;
    settings.backends[1].apis = apis(Api::chat);
  });
  for (const char* method : {"GET", "DELETE"}) {
    CAPTURE(std::string(method));
    Peer& nowhere = send(stage, method, "/v1/responses/resp_none");
    stage.say(*stage.backend(1), kNotFound);
    REQUIRE(stage.backend(3) != nullptr);
    stage.say(*stage.backend(3), kNotFound);
    CHECK(answer_to(stage, nowhere).status == 404);
    CHECK(nowhere.received.ends_with("not found.\"}}"));
  }
  Peer& found = send(stage, "POST", "/v1/responses/resp_1/cancel");
  stage.say(*stage.backend(1), kNotFound);
  stage.say(*stage.backend(3), json(200, kStored));
  CHECK(answer_to(stage, found).status == 200);
  CHECK(stage.backend(2) == nullptr);
  Peer& again = send(stage, "GET", "/v1/responses/resp_1/input_items");
  stage.say(*stage.backend(3), json(200, "{}"));
  CHECK(answer_to(stage, again).status == 200);
  CHECK(stage.attempts(AttemptOutcome::ok, 1) == 3);
  CHECK(answer_to(stage, send(stage, "PUT", "/v1/responses/resp_1")).status == 405);
  CHECK(answer_to(stage, send(stage, "GET", "/v1/responses/a/b")).status == 404);
}

TEST_CASE("work that goes on in the background is not given to a second backend") {
  for (const bool background : {false, true}) {
    CAPTURE(background);
    Stage stage(2);
    Peer& client = stage.ask(background ? R"({"model":"m","background":true})" : R"({"model":"m"})", "/v1/responses");
    stage.say(*stage.backend(1), json(500, "{}"));
    CHECK((stage.backend(2) == nullptr) == background);
    if (background) CHECK(stage.answer_to(client).status == 500);
  }
}

TEST_CASE("a form's model is replaced where an alias stands for it, and nothing else in the form") {
  Stage stage(1, [](Settings& settings) { settings.aliases = {{"whisper-1", "m"}}; });
  const auto form = [](std::string_view model) {
    return "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nwhisper-1\r\n--b\r\n"
           "Content-Disposition: form-data; name=\"model\"\r\n\r\n" +
           std::string(model) + "\r\n--b--\r\n";
  };
  for (const std::size_t cut : {std::size_t{0}, std::size_t{100}}) {
    Peer& client = stage.net.connect_client();
    stage.settle();
    const std::string body = form("whisper-1");
    const std::string head =
        "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; "
        "boundary=b\r\nContent-Length: " +
        std::to_string(body.size()) + "\r\n\r\n";
    stage.say(client, head + body.substr(0, cut));
    stage.say(client, body.substr(cut));
    REQUIRE(stage.backend() != nullptr);
    CHECK(stage.backend()->received.ends_with("\r\n\r\n" + form("m")));
    stage.say(*stage.backend(),
              json(200, R"({"text":"x","usage":{"type":"tokens","input_tokens":1,"output_tokens":2}})"));
    CHECK(stage.answer_to(client).status == 200);
  }
  CHECK(stage.all_errors() == 0);
}

TEST_CASE("an answer that only holds a path error's text is an answer, also for the clients behind it") {
  const std::string answers[] = {
      json(200, R"({"message":{"content":"It says: 404 page not found"},"done":true,"prompt_eval_count":1})"),
      json(200, R"({"text":"{\"error\":\"Unexpected endpoint or method. (POST /x)\"}"})"),
      json(200, R"({"prompt":"{\"detail\":\"Not Found\"}"})"),
      response(200, "text/plain", "404 page not found"),
      json(404, R"({"error":"model '404 page not found' not found"})"),
      json(404, R"({"detail":"Not Found","model":"m"})"),
      json(404, R"x({"error":{"message":"The model `Invalid URL (POST /x)` does not exist"}})x"),
      json(404, R"({"error":{"code":404,"message":"no adapter \"File Not Found\"","type":"not_found_error"}})"),
  };
  for (const std::string& answer : answers) {
    for (const char* path : {"/api/chat", "/v1/rerank", "/v1/messages", "/tokenize"}) {
      CAPTURE(answer);
      Stage stage(2);
      for (int i = 0; i < 2; ++i) {
        Peer& client = stage.ask(R"({"model":"m","stream":false})", path);
        stage.say(*stage.backend(1), answer);
        CHECK(stage.answer_to(client).status == std::stoi(answer.substr(9)));
      }
      CHECK(stage.backend(2) == nullptr);
    }
  }
}

TEST_CASE("an id in a path has no influence on what other ids get") {
  Stage stage(1);
  Peer& odd = send(stage, "GET", "/v1/responses/a%2Fb");
  stage.say(*stage.backend(1), json(404, R"({"detail":"Not Found"})"));
  CHECK(answer_to(stage, odd).status == 404);
  Peer& good = send(stage, "GET", "/v1/responses/resp_1");
  stage.say(*stage.backend(1), json(200, kStored));
  CHECK(answer_to(stage, good).body == kStored);
}

TEST_CASE("the first backend that knows an unknown id answers, however short its answer is") {
  for (const char* method : {"GET", "DELETE"}) {
    Stage stage(2);
    Peer& client = send(stage, method, "/v1/responses/resp_1");
    stage.say(*stage.backend(1), json(200, "{}"));
    CHECK(answer_to(stage, client).status == 200);
    CHECK(stage.backend(2) == nullptr);
  }
}

TEST_CASE("a stored response whose backend the fleet has no more, or not for this model, is looked for elsewhere") {
  Stage stage(2, [](Settings& settings) { settings.backends[1].models = {"m", "other"}; });
  Peer& made = stage.ask(sim::kAsk, "/v1/responses");
  stage.say(*stage.backend(1), json(200, kStored));
  CHECK(stage.answer_to(made).status == 200);
  Peer& next = stage.ask(R"({"model":"other","previous_response_id":"resp_1"})", "/v1/responses");
  REQUIRE(stage.backend(2) != nullptr);
  stage.say(*stage.backend(2), json(200, R"({"id":"resp_2"})"));
  CHECK(stage.answer_to(next).status == 200);
}

TEST_CASE("an empty 200 is an error only where the answer is JSON") {
  const std::string empty = response(200, "text/plain", "");
  const std::string form =
      "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--b\r\n"
      "Content-Disposition: form-data; name=\"response_format\"\r\n\r\ntext\r\n--b--\r\n";
  const std::pair<std::string, bool> requests[] = {
      {"DELETE /api/delete HTTP/1.1\r\nHost: a\r\nContent-Length: 13\r\n\r\n{\"model\":\"m\"}", true},
      {"POST /api/copy HTTP/1.1\r\nHost: a\r\nContent-Length: 32\r\n\r\n{\"source\":\"m\",\"destination\":\"n\"}",
       true},
      {"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"
       "Content-Length: " +
           std::to_string(form.size()) + "\r\n\r\n" + form,
       true},
      {sim::post(sim::kAsk), false},
      {sim::post(sim::kAsk, "HTTP/1.1", "/api/show"), false},
  };
  for (const auto& [request, good] : requests) {
    CAPTURE(request);
    Stage stage(1, [](Settings& settings) { settings.server.ollama_admin = "b1"; });
    for (int i = 0; i < 2; ++i) {
      Peer& client = stage.net.connect_client();
      stage.settle();
      stage.say(client, request);
      stage.say(*stage.backend(), empty);
      CHECK(stage.answer_to(client).status == 200);
      CHECK(stage.ejected() == !good);
    }
    CHECK(stage.attempts(AttemptOutcome::ok) == (good ? 2 : 0));
    CHECK(stage.all_errors() == (good ? 0 : 2));
  }
}

TEST_CASE("an error as a stream's first event is tried elsewhere, however short the answer is, and silence too") {
  const std::string error = "{\"error\":\"model requires more system memory\"}\n";
  const std::string good = response(200, "application/x-ndjson", "{\"message\":{\"content\":\"hi\"},\"done\":true}\n");
  for (const bool silent : {false, true}) {
    CAPTURE(silent);
    Stage stage(2, [](Settings& settings) { settings.upstream.head_delay_ns = 10 * kSecond; });
    Peer& client = stage.ask(sim::kAskStream, "/api/chat");
    const std::string head = response(200, "application/x-ndjson", error);
    if (silent) {
      stage.say(*stage.backend(1), head.substr(0, head.size() - error.size()));
      stage.pass(600 * kMillisecond);
      CHECK(client.received.empty());
      stage.net.break_off(*stage.backend(1));
      stage.settle();
    } else {
      stage.say(*stage.backend(1), head);
    }
    REQUIRE(stage.backend(2) != nullptr);
    stage.say(*stage.backend(2), good);
    CHECK(client.received.ends_with("\"done\":true}\n"));
    CHECK(stage.attempts(silent ? AttemptOutcome::truncated : AttemptOutcome::bad_response, 1) == 1);
    CHECK(stage.attempts(AttemptOutcome::ok, 2) == 1);
    CHECK(stage.all_errors() == 0);
  }
}

namespace {

void ask_for_counts(Settings& settings) {
  settings.routing.retries = 1;
  settings.health.eject_after = 100;
  for (BackendSettings& backend : settings.backends) backend.kind = BackendKind::vllm;
}
bool is_asked_for_counts(const Peer& backend) {
  return backend.received.substr(backend.received.rfind("POST ")).find("include_usage") != std::string::npos;
}
// A validation error as FastAPI writes it: with the request, as Nexus sent it.
const std::string kEcho = json(400, R"({"detail":[{"loc":["messages"],"input":{"stream_options":{}}}]})");
const std::string kTokens = response(200, "text/event-stream", "data: {\"choices\":[{}]}\n\ndata: [DONE]\n\n");

}  // namespace

TEST_CASE("a refusal of the wish for counts is believed once the request without it went well") {
  for (const bool mistake : {true, false}) {
    CAPTURE(mistake);
    Stage stage(1, ask_for_counts);
    Peer& client = stage.ask(sim::kAskStream);
    REQUIRE(is_asked_for_counts(*stage.backend()));
    stage.say(*stage.backend(), kEcho);
    REQUIRE_FALSE(is_asked_for_counts(*stage.backend()));
    stage.say(*stage.backend(), mistake ? kEcho : kTokens);
    CHECK(stage.answer_to(client).status == (mistake ? 400 : 200));
    stage.ask(sim::kAskStream);
    CHECK(is_asked_for_counts(*stage.backend()) == mistake);
    stage.say(*stage.backend(), kTokens);
  }
}

TEST_CASE("a backend that refuses the wish for counts does not speak for the one that is tried next") {
  Stage stage(2, ask_for_counts);
  stage.ask(sim::kAskStream);
  stage.say(*stage.backend(1), kEcho);
  stage.say(*stage.backend(1), json(500, "{}"));
  REQUIRE(stage.backend(2) != nullptr);
  CHECK(is_asked_for_counts(*stage.backend(2)));
  stage.say(*stage.backend(2), kTokens);
}
