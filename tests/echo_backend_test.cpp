// echo_backend_test.cpp
// Goal:   the built-in model answers as an OpenAI-compatible server would, its `usage` counts what it sent, and no
//         client can harm it.
// Method: token, question and answer rules as rows; then a real server on a port that the kernel chooses, and a
//         blocking client.
#include "nexus/apps/echo_backend.h"

#include <doctest/doctest.h>
#include <poll.h>
#include <sys/time.h>

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "tests/lib/response_reader.h"

using namespace nexus;
using namespace std::string_view_literals;

namespace {

struct Response {
  int status = 0;
  std::string head;  // lower-cased, for looking things up
  std::string body;  // chunks taken apart
  bool whole = false;
};

class Client {
 public:
  explicit Client(const Address& address) {
    fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const timeval limit{20, 0};  // a test that would hang fails
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(address.port);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    REQUIRE(connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0);
  }
  ~Client() { ::close(fd_); }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  void send_all(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return;
      bytes.remove_prefix(static_cast<std::size_t>(n));
    }
  }

  // Receives more bytes into buffer_; false at the end of the connection.
  bool more() {
    char bytes[65536];
    const ssize_t n = ::recv(fd_, bytes, sizeof bytes, 0);
    if (n <= 0) return false;
    buffer_.append(bytes, static_cast<std::size_t>(n));
    return true;
  }

  bool wait_for(std::string_view text) {
    while (buffer_.find(text) == std::string::npos) {
      if (!more()) return false;
    }
    return true;
  }

  // An interim response is complete without a body, as is a response to HEAD.
  Response read_response(std::string_view method = "GET") {
    rfc9112::ResponseReader reader(method);
    while (!reader.done() && reader.problem.empty()) {
      buffer_.erase(0, reader.feed(buffer_));
      if (!reader.done() && !more()) break;
    }
    CHECK(reader.problem == "");
    Response response{reader.message.status, reader.message.start_line + "\r\n", reader.message.body, reader.end()};
    for (const auto& [name, value] : reader.message.fields) response.head += name + ": " + value + "\r\n";
    for (char& c : response.head) c = to_lower(c);
    return response;
  }

  bool at_end() { return buffer_.empty() && !more(); }
  int fd() const { return fd_; }

 private:
  int fd_;
  std::string buffer_;
};

std::string post(std::string_view path, std::string_view body, std::string_view fields = "") {
  return "POST " + std::string(path) + " HTTP/1.1\r\nHost: x\r\n" + std::string(fields) +
         "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + std::string(body);
}

std::string chat_body(std::string_view content, std::string_view more = "") {
  return R"({"model":"echo","messages":[{"role":"user","content":)" + json_string(content) + "}]" + std::string(more) +
         "}";
}

// Everything between `before` and the next `after` behind it, in order.
std::vector<std::string> all_between(std::string_view text, std::string_view before, std::string_view after) {
  std::vector<std::string> found;
  for (std::size_t at = 0; (at = text.find(before, at)) != std::string_view::npos;) {
    at += before.size();
    found.emplace_back(text.substr(at, text.find(after, at) - at));
  }
  return found;
}

std::string joined(const std::vector<std::string>& pieces) {
  std::string all;
  for (const std::string& piece : pieces) all += piece;
  return all;
}

bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

// Puts the padding that the reader needs behind the body.
std::optional<EchoError> read_question(std::string_view endpoint, std::string_view body, EchoQuestion& question) {
  std::string padded(body);
  padded.resize(body.size() + kPaddingBytes);
  return read_echo_question(*find_echo_endpoint(endpoint), {padded.data(), body.size()}, {"echo", "other"}, question);
}

constexpr std::string_view chat = "/v1/chat/completions";
constexpr std::string_view completions = "/v1/completions";
constexpr std::string_view embeddings = "/v1/embeddings";

struct Serving {
  explicit Serving(Ns token_delay_ns = 0) : server(EchoOptions{{"echo"}, token_delay_ns}) {
    REQUIRE(server.start() == 0);
  }
  EchoServer server;
};

}  // namespace

TEST_CASE("echo tokens: a token is a word and the white space before it; a long word is cut between characters") {
  struct Row {
    std::string text;
    std::vector<std::string> tokens;
  };
  const std::string long_word(kMaxEchoTokenBytes, 'x');
  const std::string odd = std::string(kMaxEchoTokenBytes - 1, 'x');
  const Row rows[] = {{"", {}},
                      {" \t\r\n", {" \t\r\n"}},
                      {"one", {"one"}},
                      {"  one\ntwo\t three", {"  one", "\ntwo", "\t three"}},
                      {long_word, {long_word}},
                      {long_word + " y", {long_word, " y"}},
                      {long_word + "y z", {long_word, "y", " z"}},
                      {std::string(kMaxEchoTokenBytes, ' ') + "z", {std::string(kMaxEchoTokenBytes, ' '), "z"}},
                      {odd + "\xf0\x9f\x99\x82", {odd, "\xf0\x9f\x99\x82"}}};
  for (const Row& row : rows) {
    CAPTURE(row.text.size());
    std::vector<std::string> tokens;
    for (std::string_view rest = row.text; !rest.empty();) tokens.emplace_back(detail::next_echo_token(rest));
    CHECK(tokens == row.tokens);
    CHECK(detail::count_echo_tokens(row.text) == row.tokens.size());
  }
  // Quadratic in the length of a word, this would take minutes.
  for (const char c : {'x', ' '}) CHECK(detail::count_echo_tokens(std::string(16u << 20, c)) == 16384);
}

TEST_CASE("echo questions: what is echoed is the last user message, and all contents count") {
  struct Row {
    const char* name;
    std::string_view endpoint;
    std::string_view body;
    std::string_view text;
    std::uint64_t prompt_tokens;
  };
  const Row rows[] = {
      {"one message", chat, R"({"model":"echo","messages":[{"role":"user","content":"a b"}]})", "a b", 2},
      {"the last of the user", chat,
       R"({"messages":[{"role":"system","content":"be kind"},{"role":"user","content":"one"},)"
       R"({"role":"assistant","content":"x y z"},{"content":"two too","role":"user"},{"role":"tool","content":"t"}],)"
       R"("model":"echo"})",
       "two too", 9},
      {"parts", chat,
       R"({"model":"echo","messages":[{"role":"user","content":[{"type":"text","text":"a b"},)"
       R"({"type":"image_url","image_url":{"url":"data:..."}},{"type":"text","text":"c"}]}]})",
       "a b c", 3},
      {"null content", chat,
       R"({"model":"echo","messages":[{"role":"user","content":"q"},{"role":"assistant","content":null,)"
       R"("tool_calls":[{"id":"1","function":{"arguments":"{\"messages\":[]}"}}]}]})",
       "q", 1},
      {"escapes", chat, R"({"model":"echo","messages":[{"role":"user","content":"\u00e4 \"b\""}]})", "\xc3\xa4 \"b\"",
       2},
      {"a prompt", completions, R"({"model":"other","prompt":"x  y"})", "x  y", 2},
      {"a prompt in a list", completions, R"({"model":"other","prompt":["x y z"]})", "x y z", 3},
      {"white space at the end", completions, R"({"model":"other","prompt":" x\ny \n"})", " x\ny", 2},
      {"a lone surrogate", completions, R"({"model":"other","prompt":"x \ud800"})", "x \xef\xbf\xbd", 2},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    EchoQuestion question;
    const auto error = read_question(row.endpoint, row.body, question);
    REQUIRE_MESSAGE(!error, (error ? error->message : ""));
    CHECK(question.text == row.text);
    CHECK(question.prompt_tokens == row.prompt_tokens);
  }
}

TEST_CASE("echo questions: stream, usage, limits and formats are read") {
  EchoQuestion question;
  REQUIRE(!read_question(chat,
                         chat_body("x", R"(,"stream":true,"stream_options":{"include_usage":true},"max_tokens":7,)"
                                        R"("max_completion_tokens":5,"n":1,"temperature":0.5)"),
                         question));
  CHECK(question.stream);
  CHECK(question.include_usage);
  CHECK(question.max_tokens == 5);
  REQUIRE(!read_question(chat, chat_body("x", R"(,"stream":false,"max_tokens":null,"n":null)"), question));
  CHECK(!question.stream);
  CHECK(!question.include_usage);
  CHECK(question.max_tokens == UINT64_MAX);
}

TEST_CASE("echo questions: embeddings take a text, texts and lists of token numbers") {
  struct Row {
    std::string_view input;
    std::size_t inputs;
    std::uint64_t prompt_tokens;
  };
  const Row rows[] = {
      {R"("a b c")", 1, 3}, {R"(["a b","c","d"])", 3, 4}, {"[[1,2,3]]", 1, 3}, {"[[1,2],[3],[1,2]]", 3, 5}};
  for (const Row& row : rows) {
    CAPTURE(row.input);
    EchoQuestion question;
    const std::string body = R"({"model":"echo","input":)" + std::string(row.input) + "}";
    REQUIRE(!read_question(embeddings, body, question));
    CHECK(question.inputs.size() == row.inputs);
    CHECK(question.prompt_tokens == row.prompt_tokens);
  }
  EchoQuestion question;
  REQUIRE(
      !read_question(embeddings, R"({"model":"echo","input":[[1,2],[3],[1,2]],"encoding_format":"base64"})", question));
  CHECK(question.base64);
  CHECK(question.inputs[0] == question.inputs[2]);
  CHECK(question.inputs[0] != question.inputs[1]);
}

TEST_CASE("echo questions: a body without a known model and an input is refused, with the member's name") {
  struct Row {
    std::string_view endpoint;
    std::string body;
    ApiError error;
    std::string_view param;
  };
  const std::string inputs_at_limit = [] {
    std::string list = R"({"model":"echo","input":["x")";
    for (std::size_t i = 1; i < kMaxEchoInputs; ++i) list += R"(,"x")";
    return list;
  }();
  const Row rows[] = {
      {chat, "", ApiError::bad_json, ""},
      {chat, "[]", ApiError::bad_json, ""},
      {chat, R"({"model":"echo","messages":[{"role":"user","content":"x"}])", ApiError::bad_json, ""},
      {chat, R"({"model":"echo","messages":[{"role":"user","content":"x"}],nonsense})", ApiError::bad_json, ""},
      {chat, "{\"model\":\"echo\",\"messages\":[{\"role\":\"user\",\"content\":\"\xff\"}]}", ApiError::bad_json, ""},
      {chat, R"({"messages":[]})", ApiError::no_model, "model"},
      {chat, R"({"model":5,"messages":[]})", ApiError::no_model, "model"},
      {chat, R"({"model":"gpt-4","messages":[]})", ApiError::model_not_found, "model"},
      {chat, R"({"model":"echo"})", ApiError::wrong_type, "messages"},
      {chat, R"({"model":"echo","messages":"x"})", ApiError::wrong_type, "messages"},
      {chat, R"({"model":"echo","messages":["x"]})", ApiError::wrong_type, "messages"},
      {completions, R"({"model":"echo","prompt":null})", ApiError::wrong_type, "prompt"},
      {completions, R"({"model":"echo","messages":[]})", ApiError::wrong_type, "prompt"},
      {embeddings, R"({"model":"echo","input":[]})", ApiError::wrong_type, "input"},
      {embeddings, R"({"model":"echo","input":[1,2]})", ApiError::wrong_type, "input"},
      {embeddings, R"({"model":"echo","input":["a",1]})", ApiError::wrong_type, "input"},
      {embeddings, R"({"model":"echo","input":{}})", ApiError::wrong_type, "input"},
      {embeddings, inputs_at_limit + R"(,"one too many"]})", ApiError::wrong_type, "input"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.body.substr(0, 100));
    EchoQuestion question;
    const auto error = read_question(row.endpoint, row.body, question);
    REQUIRE(error);
    CHECK(error->error == row.error);
    CHECK(error->param == row.param);
  }
  EchoQuestion question;
  CHECK(!read_question(embeddings, inputs_at_limit + "]}", question));
}

TEST_CASE("echo answers: a vector has length one, and its base64 is the bytes of its numbers") {
  for (const auto& [bytes, text] :
       std::map<std::string_view, std::string_view>{{"", ""}, {"f", "Zg=="}, {"fo", "Zm8="}, {"foo", "Zm9v"}}) {
    CHECK(detail::base64_of(bytes) == text);
  }
  const std::string vector = detail::echo_vector(0x5, false);
  CHECK(vector.substr(0, 26) == "[-0.125,0.125,-0.125,0.125");
  double squares = 0;
  for (const char* at = vector.data(); *at == '[' || *at == ',';) {
    char* end;
    const double part = std::strtod(at + 1, &end);
    squares += part * part;
    at = end;
  }
  CHECK(squares == doctest::Approx(1));
  CHECK(detail::echo_vector(0x5, true).substr(0, 17) == "\"AAAAvgAAAD4AAAC+");  // bytes 00 00 00 be, 00 00 00 3e
}

TEST_CASE("echo server: a whole chat answer repeats the words and counts them") {
  Serving serving;
  Client client(serving.server.address());
  client.send_all(post("/v1/chat/completions", chat_body("say  \"hi\"\nto the w\xc3\xb6rld")));
  const Response response = client.read_response();
  CHECK(response.status == 200);
  CHECK(contains(response.head, "content-type: application/json"));
  CHECK(contains(response.body, R"("object":"chat.completion")"));
  CHECK(contains(response.body, "{\"role\":\"assistant\",\"content\":\"say  \\\"hi\\\"\\nto the w\xc3\xb6rld\""));
  CHECK(contains(response.body, R"("finish_reason":"stop")"));
  CHECK(contains(response.body, R"("usage":{"prompt_tokens":5,"completion_tokens":5,"total_tokens":10})"));
}

TEST_CASE("echo server: a stream is a role, a chunk a token, an end, the usage if asked for, and [DONE]") {
  Serving serving;
  Client client(serving.server.address());
  client.send_all(
      post("/v1/chat/completions",
           chat_body("a b c d", R"(,"stream":true,"max_tokens":3,"stream_options":{"include_usage":true})")));
  Response response = client.read_response();
  CHECK(response.status == 200);
  CHECK(response.whole);
  CHECK(contains(response.head, "content-type: text/event-stream"));
  auto events = all_between(response.body, "data: ", "\n\n");
  REQUIRE(events.size() == 7);
  CHECK(contains(events[0], R"("delta":{"role":"assistant","content":""})"));
  CHECK(contains(events[1], R"("delta":{"content":"a"},"logprobs":null,"finish_reason":null}],"usage":null})"));
  CHECK(contains(events[3], R"("delta":{"content":" c"})"));
  CHECK(contains(events[4], R"("delta":{},"logprobs":null,"finish_reason":"length")"));
  CHECK(contains(events[5], R"("choices":[],"usage":{"prompt_tokens":4,"completion_tokens":3,"total_tokens":7})"));
  CHECK(events[6] == "[DONE]");

  client.send_all(post("/v1/completions", R"({"model":"echo","prompt":"x y","stream":true})"));
  response = client.read_response();
  events = all_between(response.body, "data: ", "\n\n");
  REQUIRE(events.size() == 4);
  CHECK(contains(events[0], R"("object":"text_completion")"));
  CHECK(joined(all_between(response.body, R"("text":")", "\"")) == "x y");
  CHECK(contains(events[2], R"("finish_reason":"stop")"));
  CHECK(!contains(response.body, "usage"));
  CHECK(events[3] == "[DONE]");
}

TEST_CASE("echo server: an empty message has an empty answer") {
  Serving serving;
  Client client(serving.server.address());
  client.send_all(post("/v1/chat/completions", chat_body(" ", R"(,"stream":true)")));
  CHECK(all_between(client.read_response().body, "data: ", "\n\n").size() == 3);
  client.send_all(post("/v1/chat/completions", chat_body("")));
  CHECK(contains(client.read_response().body, R"("content":"","refusal":null)"));
}

TEST_CASE("echo server: embeddings and the model list") {
  Serving serving;
  Client client(serving.server.address());
  client.send_all(post("/v1/embeddings", R"({"model":"echo","input":["a b","c","a b"]})"));
  const Response floats = client.read_response();
  CHECK(floats.status == 200);
  const auto vectors = all_between(floats.body, R"("embedding":[)", "]");
  REQUIRE(vectors.size() == 3);
  CHECK(std::count(vectors[0].begin(), vectors[0].end(), ',') == 63);
  CHECK(vectors[0] == vectors[2]);
  CHECK(vectors[0] != vectors[1]);
  CHECK(contains(floats.body, R"("usage":{"prompt_tokens":5,"total_tokens":5})"));
  client.send_all(post("/v1/embeddings", R"({"model":"echo","input":"c","encoding_format":"base64"})"));
  const auto encoded = all_between(client.read_response().body, R"("embedding":")", "\"");
  REQUIRE(encoded.size() == 1);
  CHECK(encoded[0].size() == 344);

  client.send_all("GET /v1/models?x=1 HTTP/1.1\r\nHost: x\r\n\r\n");
  const Response models = client.read_response();
  CHECK(models.status == 200);
  CHECK(all_between(models.body, R"("id":")", "\"") == std::vector<std::string>{"echo"});
  client.send_all("HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n");
  CHECK(client.read_response("HEAD").status == 200);
  CHECK(client.read_response().body == models.body);
}

TEST_CASE("echo server: a request may come byte by byte or behind others, and from HTTP/1.0") {
  Serving serving;
  Client client(serving.server.address());
  const std::string request = post("/v1/chat/completions", chat_body("one two three"));
  const std::string expected = R"("content":"one two three")";
  SUBCASE("byte by byte") {
    const int on = 1;
    setsockopt(client.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    for (const char c : request + request) client.send_all({&c, 1});
    CHECK(contains(client.read_response().body, expected));
    CHECK(contains(client.read_response().body, expected));
  }
  SUBCASE("pipelined: answers come in order") {
    client.send_all(request + post("/v1/chat/completions", chat_body("second", R"(,"stream":true)")) +
                    "GET /none HTTP/1.1\r\nHost: x\r\n\r\n" + request);
    CHECK(contains(client.read_response().body, expected));
    CHECK(contains(client.read_response().body, "second"));
    CHECK(client.read_response().status == 404);
    CHECK(contains(client.read_response().body, expected));
  }
  SUBCASE("HTTP/1.0 has no chunks: a whole answer, and the connection ends") {
    const std::string stream = chat_body("one", R"(,"stream":true)");
    client.send_all("POST /v1/chat/completions HTTP/1.0\r\nContent-Length: " + std::to_string(stream.size()) +
                    "\r\n\r\n" + stream);
    const Response response = client.read_response();
    CHECK(contains(response.head, "content-length"));
    CHECK(contains(response.body, R"("content":"one")"));
    CHECK(client.at_end());
  }
}

TEST_CASE("echo server: what it refuses it answers with an OpenAI-style error") {
  struct Row {
    const char* name;
    std::string request;
    int status;
    std::string_view head;  // part of the answer's head
    bool closes;
  };
  const Row rows[] = {
      {"unknown path", "GET /v1/nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404, "content-length", false},
      {"wrong method", "GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405, "allow: post\r\n", false},
      {"wrong method on models", post("/v1/models", "{}"), 405, "allow: get, head\r\n", false},
      {"unknown model", post("/v1/chat/completions", R"({"model":"no\"pe","messages":[]})"), 404, "", false},
      {"bad JSON", post("/v1/chat/completions", "{"), 400, "", false},
      {"no body", "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n\r\n", 400, "", false},
      {"malformed", "GET\r\n\r\n", 400, "connection: close", true},
      {"both framings",
       "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400,
       "connection: close", true},
      {"chunks", "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nAAAAA\r\n", 501,
       "connection: close", true},
      {"too large", "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 67108865\r\n\r\n", 413,
       "connection: close", true},
      {"head too large", "GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + std::string(140'000, 'x'), 431,
       "connection: close", true},
  };
  Serving serving;
  for (const Row& row : rows) {
    CAPTURE(row.name);
    Client client(serving.server.address());
    client.send_all(row.request);
    const Response response = client.read_response();
    CHECK(response.status == row.status);
    CHECK(contains(response.head, row.head));
    CHECK(contains(response.body, R"({"error":{"message":")"));
    CHECK(contains(response.body, R"("type":"invalid_request_error")"));
    if (row.closes) {
      CHECK(client.at_end());
    } else {
      client.send_all(post("/v1/chat/completions", chat_body("still here")));
      CHECK(contains(client.read_response().body, "still here"));
    }
  }
}

TEST_CASE("echo server: a token takes its delay, in a stream and as a whole") {
  constexpr Ns kDelay = 30 * kMillisecond;
  Serving serving(kDelay);
  Client client(serving.server.address());
  Ns start = monotonic_now();
  client.send_all(post("/v1/chat/completions", chat_body("a b c", R"(,"stream":true)")));
  REQUIRE(client.wait_for("\"assistant\""));
  REQUIRE(client.wait_for("\"content\":\"a\""));
  CHECK(monotonic_now() - start >= kDelay);
  REQUIRE(client.wait_for("\"content\":\" b\""));
  CHECK(monotonic_now() - start >= 2 * kDelay);
  CHECK(client.read_response().whole);
  CHECK(monotonic_now() - start >= 3 * kDelay);
  start = monotonic_now();
  client.send_all(post("/v1/chat/completions", chat_body("a b c")));
  CHECK(client.read_response().status == 200);
  CHECK(monotonic_now() - start >= 3 * kDelay);
}

TEST_CASE("echo server: a client that leaves is dropped at once, in whatever phase") {
  // The server's FIN or reset tells that it let go, long before the answer's time (an hour a token) would come.
  Serving serving(3600 * kSecond);
  const std::string requests[] = {post("/v1/chat/completions", chat_body("a", R"(,"stream":true)")),
                                  post("/v1/chat/completions", chat_body("a")),
                                  post("/v1/chat/completions", chat_body("a")).substr(0, 90), "GET /v1/mo", ""};
  for (const std::string& request : requests) {
    CAPTURE(request);
    Client client(serving.server.address());
    client.send_all(request);
    if (contains(request, "stream")) REQUIRE(client.wait_for("\"assistant\""));
    shutdown(client.fd(), SHUT_WR);
    while (client.more()) {
    }
    pollfd entry{client.fd(), POLLIN, 0};
    CHECK(poll(&entry, 1, 0) == 1);  // ended by the server, not by the client's limit on waiting
  }
}

TEST_CASE("echo server: a large question comes back whole to a slow reader, and others are served meanwhile") {
  Serving serving;
  std::string words;
  for (int i = 0; i < 100'000; ++i) words += "w" + std::to_string(i) + " ";
  Client slow(serving.server.address());
  slow.send_all(post("/v1/chat/completions", chat_body(words, R"(,"stream":true)")));
  REQUIRE(slow.wait_for("\"w0\""));  // some 20 MB of events follow: more than the sockets hold
  Client other(serving.server.address());
  other.send_all(post("/v1/chat/completions", chat_body("quick")));
  CHECK(contains(other.read_response().body, "quick"));
  const Response response = slow.read_response();
  CHECK(response.whole);
  words.pop_back();
  auto pieces = all_between(response.body, R"("delta":{"content":")", "\"");
  CHECK(joined(pieces) == words);
  CHECK(contains(response.body, "data: [DONE]"));
}

TEST_CASE("echo server: many clients at once each get their own answer, and stop() cuts those that wait") {
  Serving serving(10 * kMillisecond);
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 50; ++i) {
    clients.push_back(std::make_unique<Client>(serving.server.address()));
    clients.back()->send_all(
        post("/v1/chat/completions", chat_body("client number " + std::to_string(i) + " !", R"(,"stream":true)")));
  }
  for (int i = 0; i < 50; ++i) {
    const Response response = clients[static_cast<std::size_t>(i)]->read_response();
    CHECK(response.whole);
    CHECK(joined(all_between(response.body, R"("delta":{"content":")", "\"")) ==
          "client number " + std::to_string(i) + " !");
  }
  std::string words;
  for (int i = 0; i < 10'000; ++i) words += "w ";
  clients[0]->send_all(post("/v1/chat/completions", chat_body(words)));
  clients[1]->send_all(post("/v1/chat/completions", chat_body(words, R"(,"stream":true)")));
  REQUIRE(clients[1]->wait_for("assistant"));
  serving.server.stop();
  CHECK(clients[0]->at_end());
  CHECK(!clients[1]->read_response().whole);
}
