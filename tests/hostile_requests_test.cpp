#include <doctest/doctest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "tests/fuzz/chunked.h"
#include "tests/fuzz/heads.h"
#include "tests/hostile/bodies.h"
#include "tests/hostile/gateway.h"
#include "tests/hostile/requests.h"
#include "tests/hostile/sequences.h"
#include "tests/hostile/story.h"

namespace {

using hostile::Gateway;
using hostile::Peer;
using hostile::RequestRow;
using hostile::Story;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::size_t kPlaceStep = 13;  // a sample of the places, because the build is ten times slower
#else
constexpr std::size_t kPlaceStep = 1;
#endif
constexpr std::size_t kLongRow = 1500;  // longer rows are cut near both ends and at a sample of the places between

std::vector<std::size_t> places_of(std::size_t bytes) {
  std::vector<std::size_t> places;
  for (std::size_t at = 1; at < bytes; at += kPlaceStep) {
    if (bytes > kLongRow && at > 200 && at + 100 < bytes && at % (bytes / 40) != 0) continue;
    places.push_back(at);
  }
  return places;
}

std::string joined(const std::vector<int>& statuses) {
  std::string out;
  for (const int status : statuses) out += (out.empty() ? "" : " ") + std::to_string(status);
  return out;
}

// The result of a row as text, so that two ways of sending it can be compared. It includes the problems that were
// found, so that it differs from the wanted text if there are any.
std::string outcome_of(const RequestRow& row, const fuzz::Ends& ends, bool tls = false) {
  hostile::GatewayOptions options;
  options.tls = tls;
  options.keys = row.keys;
  Gateway gateway(options);
  Peer& client = gateway.connect();
  for (const std::string& piece : fuzz::pieces_of(row.bytes, ends)) gateway.send(client, piece);
  if (row.statuses.find("408") != std::string::npos) gateway.pass(61 * nexus::kSecond);
  Story story = hostile::read_story(gateway, row.bytes, client);
  std::string outcome = joined(story.statuses) + (story.kept ? " kept" : " closed") + " reached " +
                        std::to_string(story.forwarded.size());
  if (story.forwarded.empty() && gateway.backend_links() > 0) outcome += ", and the backend was bothered";
  if (!story.whole) outcome += ", an answer is not whole";
  if (story.kept) {  // then the next request must get its own response
    gateway.send(client, "GET /health HTTP/1.1\r\nHost: a\r\nX-Request-Id: probe-1\r\n\r\n");
    const auto after = hostile::read_story(gateway, row.bytes + hostile::get("", "/health"), client);
    if (after.answers.empty() || after.answers.back().value("X-Request-Id") != "probe-1" ||
        after.answers.back().value("Content-Type") != "application/json" ||
        after.statuses.size() != story.statuses.size() + 1) {
      outcome += ", and the next request was lost";
    }
  }
  gateway.net.finish(client);
  gateway.settle();
  if (gateway.client_sessions() > 0) outcome += ", and the session stays";
  return outcome + hostile::joined(story.problems);
}

std::string wanted_of(const RequestRow& row) {
  return row.statuses + (row.kept ? " kept" : " closed") + " reached " + std::to_string(row.reached);
}

void run(const hostile::RequestRows& rows) {
  for (const RequestRow& row : rows) {
    CAPTURE(row.name);
    CAPTURE(row.section);
    const std::string wanted = wanted_of(row);
    const std::string whole = outcome_of(row, {row.bytes.size()});
    CHECK(whole == wanted);
    if (whole != wanted) continue;
    CHECK_MESSAGE(outcome_of(row, fuzz::byte_by_byte(row.bytes.size())) == wanted, "byte by byte");
    for (const std::size_t place : places_of(row.bytes.size())) {
      const std::string cut = outcome_of(row, {place, row.bytes.size()});
      if (cut == wanted) continue;
      CAPTURE(place);
      CHECK(cut == wanted);
      break;
    }
    // The parsers alone must read the same bytes as rfc9112.h does; the bytes end at a guard page.
    CHECK_NOTHROW(fuzz::request_head(row.bytes));
    const std::size_t head = row.bytes.find("\r\n\r\n");
    if (head != std::string::npos) CHECK_NOTHROW(fuzz::chunked(std::string_view(row.bytes).substr(head + 4)));
  }
}

template <class... Add>
hostile::RequestRows rows_of(Add... add) {
  hostile::RequestRows rows;
  (add(rows), ...);
  return rows;
}

// Every row, sent to another endpoint, whole. One is left out: its fault is in a value that only the chat API's row
// reads.
void run_at(const hostile::RequestRows& rows, std::string_view path) {
  constexpr std::string_view kChat = "/v1/chat/completions";
  for (RequestRow row : rows) {
    if (row.name == "JSON: a fault in a value that is passed over") continue;
    CAPTURE(row.name);
    for (std::size_t at = row.bytes.find(kChat); at != std::string::npos; at = row.bytes.find(kChat, at + 1)) {
      row.bytes.replace(at, kChat.size(), path);
    }
    CHECK(outcome_of(row, {row.bytes.size()}) == wanted_of(row));
  }
}

}  // namespace

TEST_CASE("the table of hostile requests has at least 200 rows, each with its own name and RFC section") {
  const auto rows =
      rows_of(hostile::add_framing_rows, hostile::add_line_rows, hostile::add_start_line_rows, hostile::add_host_rows,
              hostile::add_chunk_rows, hostile::add_json_rows, hostile::add_sequence_rows);
  MESSAGE("hostile requests: ", rows.size());
  CHECK(rows.size() >= 200);
  std::set<std::string> names;
  for (const RequestRow& row : rows) {
    CAPTURE(row.name);
    CHECK(names.insert(row.name).second);
    CHECK_FALSE(row.section.empty());
  }
}

TEST_CASE("framing that two readers could understand differently is refused, at every cut") {
  run(rows_of(hostile::add_framing_rows));
}

TEST_CASE("malformed header lines are refused, at every cut") { run(rows_of(hostile::add_line_rows)); }

TEST_CASE("malformed request lines and hosts are refused, at every cut") {
  run(rows_of(hostile::add_start_line_rows, hostile::add_host_rows));
}

TEST_CASE("a chunked body is read as the RFC says or refused, at every cut") { run(rows_of(hostile::add_chunk_rows)); }

TEST_CASE("bodies that are not valid JSON requests are refused, at every cut") { run(rows_of(hostile::add_json_rows)); }

TEST_CASE("no sequence of requests makes Nexus read a request out of another one's body") {
  run(rows_of(hostile::add_sequence_rows));
}

TEST_CASE("hostile requests to endpoints of other APIs get the same answers") {
  const auto rows =
      rows_of(hostile::add_framing_rows, hostile::add_line_rows, hostile::add_start_line_rows, hostile::add_host_rows,
              hostile::add_chunk_rows, hostile::add_json_rows, hostile::add_sequence_rows);
  run_at(rows, "/v1/messages");
  run_at(rows, "/api/generate");
}

TEST_CASE("hostile requests over TLS get the same answers, whole and byte by byte") {
  for (const RequestRow& row :
       rows_of(hostile::add_framing_rows, hostile::add_line_rows, hostile::add_start_line_rows, hostile::add_host_rows,
               hostile::add_chunk_rows, hostile::add_json_rows, hostile::add_sequence_rows)) {
    CAPTURE(row.name);
    CHECK(outcome_of(row, {row.bytes.size()}, true) == wanted_of(row));
    CHECK(outcome_of(row, fuzz::byte_by_byte(row.bytes.size()), true) == wanted_of(row));
  }
}
