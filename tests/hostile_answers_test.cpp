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
constexpr std::size_t kPlaceStep = 13;  // ten times slower: a sample of the places
#else
constexpr std::size_t kPlaceStep = 1;
#endif
constexpr std::size_t kLongRow = 1500;

std::vector<std::string> cut_in_two(const std::string& bytes, std::size_t place) {
  return {bytes.substr(0, place), bytes.substr(place)};
}

std::vector<std::string> byte_by_byte(const std::string& bytes) {
  std::vector<std::string> pieces;
  for (const char c : bytes) pieces.emplace_back(1, c);
  return pieces;
}

// No field of the backend's that is Nexus's to say, or meant for the next hop alone.
void check_passed_on(const rfc9112::Message& answer, std::string& outcome) {
  for (const char* name : {"Upgrade", "Proxy-Authenticate", "Keep-Alive", "X-Drop", "X_Request_Id", "Content_Length",
                           "Transfer_Encoding"}) {
    if (answer.has(name)) outcome += ", " + std::string(name) + " was passed on";
  }
  if (answer.value("X-Nexus-Backend") != "b1" && answer.status < 500) outcome += ", X-Nexus-Backend";
  if (answer.all("X-Request-Id").size() != 1 || answer.value("X-Request-Id") == "evil") outcome += ", X-Request-Id";
}

// The client's payload is what the RFC reads out of the backend's bytes, or the beginning of it.
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

// What came of a row, as text; problems stand in it too.
std::string outcome_of(const AnswerRow& row, const std::vector<std::string>& pieces) {
  Gateway gateway;
  bool answered = false;
  gateway.answer = [&](const rfc9112::Message&) {
    if (std::exchange(answered, true)) return BackendPlan{{hostile::good_answer()}, false, false};
    return BackendPlan{pieces, row.end == AnswerRow::End::fin, row.end == AnswerRow::End::reset};
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
  for (const std::string& problem : story.problems) outcome += "\n  " + problem;
  return outcome;
}

std::string wanted_of(const AnswerRow& row) {
  return std::to_string(row.status) + (row.whole ? " whole" : " cut off") + (row.reused ? " reused" : " dropped");
}

void run(const hostile::AnswerRows& rows) {
  for (const AnswerRow& row : rows) {
    CAPTURE(row.name);
    CAPTURE(row.section);
    const std::string wanted = wanted_of(row);
    const std::string whole = outcome_of(row, {row.bytes});
    CHECK(whole == wanted);
    if (whole != wanted) continue;
    if (row.bytes.size() < 20'000) CHECK_MESSAGE(outcome_of(row, byte_by_byte(row.bytes)) == wanted, "byte by byte");
    for (std::size_t place = 1; place < row.bytes.size(); place += kPlaceStep) {
      if (row.bytes.size() > kLongRow && place > 200 && place % (row.bytes.size() / 40) != 0) continue;
      const std::string cut = outcome_of(row, cut_in_two(row.bytes, place));
      if (cut == wanted) continue;
      CAPTURE(place);
      CHECK(cut == wanted);
      break;
    }
    CHECK_NOTHROW(fuzz::response_head(row.bytes));
  }
}

hostile::AnswerRows all_rows() {
  hostile::AnswerRows rows;
  hostile::add_status_line_rows(rows);
  hostile::add_answer_line_rows(rows);
  hostile::add_answer_framing_rows(rows);
  hostile::add_answer_chunk_rows(rows);
  hostile::add_interim_rows(rows);
  return rows;
}

}  // namespace

TEST_CASE("the table of hostile answers is large, and names each row once") {
  const auto rows = all_rows();
  MESSAGE("hostile answers: ", rows.size());
  CHECK(rows.size() >= 80);
  std::set<std::string> names;
  for (const AnswerRow& row : rows) {
    CAPTURE(row.name);
    CHECK(names.insert(row.name).second);
  }
}

TEST_CASE("an answer that is not HTTP is a 502, however it is cut") {
  hostile::AnswerRows rows;
  hostile::add_status_line_rows(rows);
  hostile::add_answer_line_rows(rows);
  run(rows);
}

TEST_CASE("an answer's end is known or the client can tell that it is not, however it is cut") {
  hostile::AnswerRows rows;
  hostile::add_answer_framing_rows(rows);
  hostile::add_answer_chunk_rows(rows);
  run(rows);
}

TEST_CASE("interim answers are bounded and never open a tunnel, however they are cut") {
  hostile::AnswerRows rows;
  hostile::add_interim_rows(rows);
  run(rows);
}

TEST_CASE("an answer that ends after any of its bytes never looks whole") {
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
        const bool began = bytes >= head;
        const AnswerRow row{"", "9112 8", answer.substr(0, bytes), began ? 200 : 502, !began, false, end, false};
        CAPTURE(row.bytes);
        CHECK(outcome_of(row, {row.bytes}) == wanted_of(row));
      }
    }
  }
}

TEST_CASE("a connection on which an answer came unasked is not used") {
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

TEST_CASE("an answer that came before the request is never passed on as its answer") {
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

TEST_CASE("a backend that answers before it has the whole request is not asked again on that connection") {
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
