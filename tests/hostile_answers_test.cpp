#include <doctest/doctest.h>

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/fuzz/heads.h"
#include "tests/hostile/answers.h"
#include "tests/hostile/gateway.h"
#include "tests/hostile/requests.h"
#include "tests/hostile/story.h"

namespace {

using hostile::AnswerRow;
using hostile::BackendPlan;
using hostile::Gateway;
using hostile::Peer;
using hostile::Story;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::size_t kPlaceStep = 13;  // a sample of the places, because the build is ten times slower
#else
constexpr std::size_t kPlaceStep = 1;
#endif
constexpr std::size_t kLongRow = 1500;

// Fields that only Nexus sets, and hop-by-hop fields, must not be forwarded.
void check_passed_on(const rfc9112::Message& answer, std::string& outcome) {
  for (const char* name : {"Upgrade", "Proxy-Authenticate", "Keep-Alive", "X-Drop", "X_Request_Id", "Content_Length",
                           "Transfer_Encoding"}) {
    if (answer.has(name)) outcome += ", " + std::string(name) + " was passed on";
  }
  if (answer.value("X-Nexus-Backend") != "b1" && answer.status < 500) outcome += ", X-Nexus-Backend";
  if (answer.all("X-Request-Id").size() != 1 || answer.value("X-Request-Id") == "evil") outcome += ", X-Request-Id";
}

// The client's payload must be the one that the RFC reads in the backend's bytes, or a beginning of it.
void check_payload(const AnswerRow& row, const Story& story, const rfc9112::Message& got, std::string& outcome) {
  if (got.status == 502 || got.status == 504) return;
  const auto told = rfc9112::read_responses(row.bytes, {"POST"}, row.end == AnswerRow::End::fin);
  std::string body = told.open.body;
  for (const rfc9112::Message& message : told.messages) {
    if (message.status >= 200) body = message.body;
  }
  const bool right =
      story.whole ? got.body == body : got.body.substr(0, body.size()) == body.substr(0, got.body.size());
  if (!right) outcome += ", another payload";
}

// The result of a row as text, including the problems that were found.
std::string outcome_of(const AnswerRow& row, const fuzz::Ends& ends) {
  Gateway gateway;
  bool answered = false;
  gateway.answer = [&](const rfc9112::Message&) {
    if (std::exchange(answered, true)) return BackendPlan{{hostile::good_answer()}, false, false};
    return BackendPlan{fuzz::pieces_of(row.bytes, ends), row.end == AnswerRow::End::fin,
                       row.end == AnswerRow::End::reset};
  };
  Peer& client = gateway.connect();
  const std::string request = row.old_client ? "POST /v1/chat/completions HTTP/1.0\r\nConnection: keep-alive\r\n"
                                               "Content-Length: 13\r\n\r\n" +
                                                   hostile::kBody
                                             : hostile::good_post();
  gateway.send(client, request);
  if (row.end == AnswerRow::End::open && (row.status == 504 || !row.whole)) gateway.pass(6 * nexus::kSecond);
  const Story story = hostile::read_story(gateway, request, client);
  std::string outcome = story.statuses.empty() ? "nothing" : std::to_string(story.statuses.front());
  if (story.statuses.size() > 1) outcome += " and more";
  outcome += story.whole ? " whole" : " cut off";
  if (!story.whole && !story.cut_off && !client.cut) outcome += ", but nobody can tell";
  const rfc9112::Reading read = rfc9112::read_responses(client.received, {"POST"}, client.ended && !client.cut);
  const rfc9112::Message& got = read.messages.empty() ? read.open : read.messages.front();
  check_passed_on(got, outcome);
  check_payload(row, story, got, outcome);
  if (gateway.counted_attempts() != 1) outcome += ", attempts counted: " + std::to_string(gateway.counted_attempts());
  Peer& next = gateway.connect();
  gateway.send(next, hostile::good_post());
  outcome += gateway.backend_links() == 1 ? " reused" : " dropped";
  if (next.received.find(hostile::kGoodBody) == std::string::npos) outcome += ", and the next request went wrong";
  return outcome + hostile::joined(story.problems);
}

std::string wanted_of(const AnswerRow& row) {
  return std::to_string(row.status) + (row.whole ? " whole" : " cut off") + (row.reused ? " reused" : " dropped");
}

void run(const hostile::AnswerRows& rows) {
  for (const AnswerRow& row : rows) {
    CAPTURE(row.name);
    CAPTURE(row.section);
    const std::string wanted = wanted_of(row);
    const std::string whole = outcome_of(row, {row.bytes.size()});
    CHECK(whole == wanted);
    if (whole != wanted) continue;
    if (row.bytes.size() < 20'000) {
      CHECK_MESSAGE(outcome_of(row, fuzz::byte_by_byte(row.bytes.size())) == wanted, "byte by byte");
    }
    for (std::size_t place = 1; place < row.bytes.size(); place += kPlaceStep) {
      if (row.bytes.size() > kLongRow && place > 200 && place % (row.bytes.size() / 40) != 0) continue;
      const std::string cut = outcome_of(row, {place, row.bytes.size()});
      if (cut == wanted) continue;
      CAPTURE(place);
      CHECK(cut == wanted);
      break;
    }
    CHECK_NOTHROW(fuzz::response_head(row.bytes));
  }
}

template <class... Add>
hostile::AnswerRows rows_of(Add... add) {
  hostile::AnswerRows rows;
  (add(rows), ...);
  return rows;
}

}  // namespace

TEST_CASE("the table of hostile responses has at least 80 rows, each with its own name") {
  const auto rows =
      rows_of(hostile::add_status_line_rows, hostile::add_answer_line_rows, hostile::add_answer_framing_rows,
              hostile::add_answer_chunk_rows, hostile::add_interim_rows);
  MESSAGE("hostile answers: ", rows.size());
  CHECK(rows.size() >= 80);
  std::set<std::string> names;
  for (const AnswerRow& row : rows) {
    CAPTURE(row.name);
    CHECK(names.insert(row.name).second);
  }
}

TEST_CASE("a backend's response that is not HTTP becomes a 502, at every cut") {
  run(rows_of(hostile::add_status_line_rows, hostile::add_answer_line_rows));
}

TEST_CASE("the client gets a complete response or can tell that it is truncated, at every cut") {
  run(rows_of(hostile::add_answer_framing_rows, hostile::add_answer_chunk_rows));
}

TEST_CASE("interim responses are limited in number and never open a tunnel, at every cut") {
  run(rows_of(hostile::add_interim_rows));
}

TEST_CASE("a response that is truncated after any of its bytes never looks complete") {
  const std::string te = "Transfer-Encoding: chunked\r\n", events = "Content-Type: text/event-stream\r\n";
  const std::vector<std::string> answers = {
      hostile::good_answer(),
      hostile::answer_of(te, "5\r\nhello\r\n1;a=b\r\n!\r\n0\r\nX: y\r\n\r\n"),
      hostile::answer_of(te + events, "b\r\ndata: {}\n\n\r\n\r\n0\r\n\r\n"),
      hostile::answer_of("Content-Length: 11\r\n" + events, "data: {}\n\nx"),
  };
  for (const std::string& answer : answers) {
    const std::size_t head = answer.find("\r\n\r\n") + 4;
    for (std::size_t bytes = 0; bytes < answer.size(); ++bytes) {
      for (const AnswerRow::End end : {AnswerRow::End::fin, AnswerRow::End::reset}) {
        // Before its first event, or its first byte of another body, it can still be tried elsewhere.
        const std::size_t event_end = answer.find("\n\n", head);
        const bool chunked = answer.find(te) != std::string::npos;
        const std::size_t first = answer.find(events) != std::string::npos ? event_end + 2
                                  : chunked                                ? answer.find("hello") + 1
                                                                           : head + 1;
        const bool began = bytes >= first;
        const AnswerRow row{"", "9112 8", answer.substr(0, bytes), began ? 200 : 502, !began, false, end, false};
        CAPTURE(row.bytes);
        CHECK(outcome_of(row, {row.bytes.size()}) == wanted_of(row));
      }
    }
  }
}

TEST_CASE("a backend connection on which bytes came without a request is not used again") {
  Gateway gateway;
  Peer& client = gateway.connect();
  gateway.send(client, hostile::good_post());
  REQUIRE(gateway.backend_links() == 1);
  gateway.net.send(gateway.net.peers.back(), hostile::answer_of("Content-Length: 4\r\n", "evil"));
  gateway.settle();
  gateway.send(client, hostile::good_post());
  CHECK(gateway.backend_links() == 2);
  CHECK(client.received.find("evil") == std::string::npos);
}

TEST_CASE("bytes that a backend sent before the request are never forwarded as its response") {
  Gateway gateway;
  gateway.net.on_connect = [&](Peer& backend) {
    gateway.net.send(backend, hostile::answer_of("Content-Length: 4\r\n", "evil"));
  };
  gateway.answer = [](const rfc9112::Message&) { return BackendPlan{}; };
  Peer& client = gateway.connect();
  gateway.send(client, hostile::good_post());
  gateway.pass(6 * nexus::kSecond);
  const Story story = hostile::read_story(gateway, hostile::good_post(), client);
  REQUIRE(story.statuses.size() == 1);
  CHECK(story.statuses[0] == 502);
  CHECK(client.received.find("evil") == std::string::npos);
}

TEST_CASE("a connection whose backend answered before it had read the whole request is closed") {
  Gateway gateway;
  gateway.net.on_connect = [&](Peer& backend) { gateway.net.stop_reading(backend, 1000); };
  Peer& client = gateway.connect();
  gateway.send(client, hostile::json_post(R"({"model":"m","x":")" + std::string(30'000, 'x') + "\"}"));
  REQUIRE(gateway.backend_links() == 1);
  Peer& backend = gateway.net.peers.back();
  CHECK(backend.received.size() == 1000);
  gateway.net.send(backend, hostile::answer_of("Content-Length: 2\r\n", "hi", "HTTP/1.1 413 x"));
  gateway.settle();
  const auto read = rfc9112::read_responses(client.received, {"POST"}, false);
  REQUIRE(read.messages.size() == 1);
  CHECK(read.messages[0].status == 413);
  CHECK(read.messages[0].body == "hi");
  CHECK(gateway.net.closed(backend));
}
