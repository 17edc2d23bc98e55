// clients.h
// Owns:     the simulated clients: one visit (a connection with its requests) after another, each with its own habits.
// Promises: reads strictly and in order: a response to each request or the end of the connection, and nothing after it.
// Leaves:   making requests to requests.h, judging responses to ledger.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <ctime>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "requests.h"
#include "tests/lib/response_reader.h"

namespace nexus::sim {

class Clients {
 public:
  Clients(Wire& wire, Ledger& ledger, Dice& dice, const Swarm& swarm)
      : wire_(wire),
        ledger_(ledger),
        dice_(dice),
        swarm_(swarm),
        maker_(ledger, dice, swarm.habits),
        clients_(swarm.clients),
        left_(swarm.requests) {}

  void limits(const ServerSettings& server) {
    maker_.max_body_bytes = server.max_body_bytes;
    maker_.max_header_bytes = swarm_.gentle ? 0 : server.max_header_bytes;
  }
  void start() {
    for (std::uint32_t i = 0; i < clients_.size(); ++i) set_timer(i, kVisit, dice_.span(0, 20 * kMillisecond));
  }
  // From now on no client makes new requests, and all except the stalled ones read everything that they get.
  void calm() {
    left_ = 0;
    for (std::uint32_t i = 0; i < clients_.size(); ++i) {
      Client& client = clients_[i];
      client.read_bytes = 0;
      if (client.link == kNoLink || client.gone_quiet) continue;
      wire_.ease(client.link);
      take(i);
    }
  }
  bool finished() const {
    if (left_ > 0) return false;
    for (const Client& client : clients_) {
      if (client.link != kNoLink && !client.gone_quiet) return false;
    }
    return true;
  }
  // Nexus is gone: ends all visits.
  void end_all() {
    calm();
    for (std::uint32_t i = 0; i < clients_.size(); ++i) {
      if (clients_[i].link != kNoLink) end_visit(i, true);
    }
  }

  void on_data(LinkId id) { take(wire_.at(id).peer); }
  void on_fin(LinkId id) { take(wire_.at(id).peer); }
  void on_room(LinkId id) { send(wire_.at(id).peer); }
  void on_reset(LinkId id) {
    const std::uint32_t who = wire_.at(id).peer;
    Client& client = clients_[who];
    if (client.link != id) return;
    // On Linux the bytes before a reset can still be read; other systems discard them.
    if (!dice_.one_in(4) && !client.gone_quiet) read(who, wire_.peer_view(id).size());
    if (client.link != id) return;
    // A reset that Nexus sent for a later request's response may also have discarded the responses before it.
    const auto is_cut = [&](std::size_t number) { return ledger_.requests[number].line_cut; };
    if (std::any_of(client.waiting.begin(), client.waiting.end(), is_cut)) leave_all(who);
    end_visit(who, true);
  }
  // A call of Nexus failed on this client's connection; the client can't know yet.
  void on_broken(std::uint32_t who) { leave_all(who); }
  void on_timer(std::uint32_t who, std::uint64_t value) {
    Client& client = clients_[who];
    if (value >> 8 != client.visits && (value & 0xff) != kVisit) return;  // the timer belongs to an earlier visit
    switch (value & 0xff) {
      case kVisit:
        if (client.link == kNoLink) begin_visit(who);
        return;
      case kAsk: return ask(who);
      case kRead: return take(who);
      case kSendBody: return release_body(who);
      case kAbort: return abort(who);
      case kLeave:
        if (client.link != kNoLink && client.waiting.empty()) end_visit(who, false);
        return;
      default: return;
    }
  }

 private:
  static constexpr Ns kOldestDate = 20 * kSecond;    // the head of a response may have waited for its first event
  static constexpr Ns kOldestOwnDate = 6 * kSecond;  // and one of Nexus's own for the client to read the one before
  enum Timer : std::uint64_t { kVisit, kAsk, kRead, kSendBody, kAbort, kLeave };
  enum class Abort : std::uint8_t { none, shut, close, reset };

  struct Client {
    LinkId link = kNoLink;
    std::uint64_t visits = 0;
    // The current visit:
    bool http_1_0 = false;
    bool keep_alive = true;
    std::uint32_t to_ask = 0;
    std::uint32_t at_once = 1;
    std::size_t read_bytes = 0;  // per read; 0: everything
    Ns read_pause_ns = 0;
    std::size_t stop_reading_at = SIZE_MAX;
    std::size_t stop_sending_at = SIZE_MAX;
    Abort abort = Abort::none;
    std::size_t abort_at_sent = SIZE_MAX;
    std::size_t abort_at_received = SIZE_MAX;
    bool shut = false;        // our FIN is sent
    bool gone_quiet = false;  // stalled for good
    bool last_asked = false;  // no further request can follow
    bool closing = false;     // Nexus announced the connection's end
    bool answered = false;    // at least one response has arrived
    bool reading_later = false;
    std::string out;
    std::size_t sent = 0;
    std::size_t hold_at = SIZE_MAX;  // start of a body that waits for 100 Continue
    std::size_t received = 0;
    std::deque<std::size_t> waiting;  // requests without a response, in order
    std::deque<std::size_t> ends;     // the end of each request in `out`
    bool head_seen = false;
    Ns began_at = 0;  // when Nexus wrote the first byte of the response being read
    rfc9112::ResponseReader reader;
  };

  void set_timer(std::uint32_t who, Timer what, Ns in) {
    wire_.timer(Notice::Kind::client_timer, who, wire_.now() + in, clients_[who].visits << 8 | what);
  }

  void begin_visit(std::uint32_t who) {
    if (left_ == 0) return;
    const std::uint64_t visits = clients_[who].visits + 1;
    Client& client = clients_[who] = Client{};
    client.visits = visits;
    const Habits& habits = swarm_.habits;
    client.http_1_0 = dice_.chance(habits.http_1_0);
    client.keep_alive = !client.http_1_0 || dice_.one_in(2);
    client.to_ask = client.keep_alive ? dice_.skewed(1, 12) : 1;
    if (dice_.chance(habits.pipelined)) client.at_once = dice_.number(2, 5);
    if (dice_.chance(habits.slow_reader)) {
      client.read_bytes = dice_.skewed(1, 4000);
      client.read_pause_ns = dice_.span(0, 50 * kMillisecond);
    }
    if (dice_.chance(habits.stalled_reader)) client.stop_reading_at = dice_.skewed(0, 5000);
    if (dice_.chance(habits.stalled_sender)) client.stop_sending_at = dice_.skewed(0, 3000);
    draw_abort(who);
    client.link = wire_.client_connects(who, swarm_.draw_shape(dice_));
    ask(who);
  }

  void draw_abort(std::uint32_t who) {
    Client& client = clients_[who];
    const Habits& habits = swarm_.habits;
    const auto how = static_cast<Abort>(dice_.number(1, 3));
    if (dice_.chance(habits.aborts_sending)) {
      client.abort = how;
      client.abort_at_sent = dice_.skewed(0, 3000);
    } else if (dice_.chance(habits.aborts_receiving)) {
      client.abort = how;
      client.abort_at_received = dice_.skewed(1, 5000);
    } else if (dice_.chance(habits.aborts_by_time)) {
      client.abort = how;
      set_timer(who, kAbort, dice_.span(0, 500 * kMillisecond));
    } else if (dice_.chance(habits.half_closes)) {
      client.abort = Abort::shut;
      client.abort_at_sent = SIZE_MAX - 1;  // after the first request
    }
  }

  void ask(std::uint32_t who) {
    Client& client = clients_[who];
    if (client.link == kNoLink || client.shut || client.closing || client.last_asked) return;
    for (std::uint32_t i = 0; i < client.at_once && client.to_ask > 0 && !client.last_asked; ++i) {
      if (left_ == 0) {
        client.to_ask = 0;
        break;
      }
      left_ -= 1;
      client.to_ask -= 1;
      ask_one(who);
    }
    if (client.to_ask == 0) client.last_asked = true;
    send(who);
  }

  void ask_one(std::uint32_t who) {
    Client& client = clients_[who];
    const std::size_t from = client.out.size();
    const bool alone = client.at_once == 1;
    const RequestMaker::Made made = maker_.make(client.out, who, client.http_1_0, client.keep_alive, alone);
    Request& request = ledger_.requests[made.number];
    request.began_at = wire_.now();
    request.kept = client.answered;
    request.pipelined = !client.waiting.empty();
    client.waiting.push_back(made.number);
    client.last_asked = client.last_asked || made.ends_connection;
    if (request.expects_continue) {
      client.hold_at = from + made.head_bytes;
      set_timer(who, kSendBody, 50 * kMillisecond);
    }
    client.ends.push_back(client.out.size());
    if (client.gone_quiet) leave_all(who);
  }

  void release_body(std::uint32_t who) {
    if (clients_[who].link == kNoLink) return;
    clients_[who].hold_at = SIZE_MAX;
    send(who);
  }

  void send(std::uint32_t who) {
    Client& client = clients_[who];
    if (client.link == kNoLink || client.shut) return;
    const std::size_t limit =
        std::min({client.out.size(), client.hold_at, client.stop_sending_at, client.abort_at_sent});
    if (limit > client.sent) {
      client.sent +=
          wire_.peer_send(client.link, std::string_view(client.out).substr(client.sent, limit - client.sent));
    }
    while (!client.ends.empty() && client.ends.front() <= client.sent) {
      ledger_.requests[client.waiting[client.waiting.size() - client.ends.size()]].asked_at = wire_.now();
      client.ends.pop_front();
    }
    if (client.sent >= client.abort_at_sent) return abort(who);
    const bool behind_first = client.abort_at_sent == SIZE_MAX - 1 && client.ends.size() < client.waiting.size();
    if (behind_first) return abort(who);
    if (client.sent >= client.stop_sending_at && client.sent < client.out.size()) go_quiet(who);
  }

  void leave_all(std::uint32_t who) {
    for (const std::size_t number : clients_[who].waiting) ledger_.requests[number].client_left = true;
  }

  // The client does nothing any more; Nexus has to end the connection.
  void go_quiet(std::uint32_t who) {
    clients_[who].gone_quiet = true;
    leave_all(who);
  }

  void abort(std::uint32_t who) {
    Client& client = clients_[who];
    if (client.link == kNoLink || client.shut) return;
    leave_all(who);
    switch (client.abort) {
      case Abort::none: return;
      case Abort::shut:
        client.shut = true;
        client.last_asked = true;
        return wire_.peer_shut(client.link);
      case Abort::close:
      case Abort::reset: return end_visit(who, client.abort == Abort::reset);
    }
  }

  // Reads everything, a little at a time, or nothing, depending on this client's habits.
  void take(std::uint32_t who) {
    Client& client = clients_[who];
    if (client.link == kNoLink || client.gone_quiet) return;
    const std::size_t there = wire_.peer_view(client.link).size();
    if (client.read_bytes == 0) {
      read(who, there);
    } else if (!client.reading_later) {
      read(who, std::min(there, client.read_bytes));
      if (client.link != kNoLink && !wire_.peer_view(client.link).empty()) {
        client.reading_later = true;
        set_timer(who, kRead, client.read_pause_ns);
      }
    } else if (there > 0) {
      client.reading_later = false;
      return take(who);
    }
    if (client.link == kNoLink || client.gone_quiet) return;
    if (wire_.peer_view(client.link).empty() && wire_.at(client.link).to_peer.fin_arrived) on_end(who);
  }

  void read(std::uint32_t who, std::size_t bytes) {
    Client& client = clients_[who];
    const LinkId link = client.link;
    std::string_view view = wire_.peer_view(link).substr(0, bytes);
    std::size_t taken = 0;
    while (taken < view.size() && ledger_.ok()) {
      if (client.reader.idle()) begin_answer(who, wire_.at(link).to_peer.read + taken);
      taken += client.reader.feed(view.substr(taken));
      std::string problem = client.reader.problem;
      if (problem.empty() && client.reader.head_done()) problem = client.reader.check_nexus_style();
      if (!problem.empty()) return ledger_.wrong("client %u: not HTTP/1.1 from Nexus: %s", who, problem.c_str());
      if (client.reader.head_done() && !client.head_seen) on_head(who);
      if (client.reader.done()) finish_answer(who);
    }
    if (!ledger_.ok()) return;
    wire_.peer_take(link, taken);
    client.received += taken;
    if (client.received >= client.abort_at_received && client.link == link) return abort(who);
    if (client.received >= client.stop_reading_at && client.link == link) go_quiet(who);
  }

  void begin_answer(std::uint32_t who, std::uint64_t position) {
    Client& client = clients_[who];
    client.head_seen = false;
    if (client.closing) return ledger_.wrong("client %u: bytes after the last response", who);
    if (client.waiting.empty()) return;  // Nexus may refuse the connection
    client.began_at = Wire::written_at(wire_.at(client.link).to_peer, position);
  }

  void on_head(std::uint32_t who) {
    Client& client = clients_[who];
    const rfc9112::Message& answer = client.reader.message;
    client.head_seen = true;
    if (client.waiting.empty()) {
      const bool turned_away = answer.status == 503 && !client.answered;
      if (!turned_away) ledger_.wrong("client %u: a response without a request, %d", who, answer.status);
      return;
    }
    const std::size_t number = client.waiting.front();
    Request& request = ledger_.requests[number];
    if (answer.status < 200) {
      if (answer.status != 100 || !request.expects_continue) {
        ledger_.wrong("client %u: an unexpected %d", who, answer.status);
      }
      return;
    }
    request.status = static_cast<std::uint16_t>(answer.status);
    request.answered_at = client.began_at;
    request.backend = answer.value_or_empty("X-Nexus-Backend");
    request.fallback_model = answer.value_or_empty("X-Nexus-Fallback-Model");
    const std::string type = answer.value_or_empty("Content-Type");
    request.event_stream = type == "text/event-stream" || type == "application/x-ndjson";
    if (request.http_1_0 && answer.has("Transfer-Encoding")) ledger_.wrong("client %u: chunked for HTTP/1.0", who);
    if (answer.has("X-Hop")) ledger_.wrong("client %u: a hop-by-hop field was forwarded", who);
    check_fields(who, request);
    check_whose(who, number, request);
  }

  // The fields that Nexus itself answers for.
  void check_fields(std::uint32_t who, const Request& request) {
    const rfc9112::Message& answer = clients_[who].reader.message;
    for (const char* name : {"Date", "X-Nexus-Backend", "X-Nexus-Fallback-Model", "Content-Length", "Content-Type"}) {
      if (answer.all(name).size() > 1) ledger_.wrong("client %u: a response with two fields %s", who, name);
    }
    if (request.backend == "forged" || request.fallback_model == "forged") {
      ledger_.wrong("client %u: a backend has set a field of Nexus's own", who);
    }
    const std::string origin = answer.value_or_empty("Access-Control-Allow-Origin");
    if (!origin.empty() && origin != "*" && !request.cross_origin) {
      ledger_.wrong("client %u: a page may read a response that it did not ask for", who);
    }
    if (answer.status == 204 && answer.has("Content-Length")) ledger_.wrong("client %u: 204 with a length", who);
    if (answer.has("X-Nexus-Route-Reason") && !is_reason(answer.value("X-Nexus-Route-Reason"))) {
      ledger_.wrong("client %u: a route reason that is none: %s", who, answer.value("X-Nexus-Route-Reason").c_str());
    }
    const bool own = !answer.has("X-Sim") && request.kind == Request::Kind::completion;
    const bool busy = answer.status == 503 || (answer.status == 429 && own);
    if (own && busy && !answer.has("Retry-After"))
      ledger_.wrong("client %u: %u without Retry-After", who, request.status);
    std::tm date{};
    const std::string text = answer.value_or_empty("Date");
    if (strptime(text.c_str(), "%a, %d %b %Y %H:%M:%S GMT", &date) == nullptr) {
      return ledger_.wrong("client %u: Date: %s", who, text.c_str());
    }
    // An answer that was kept while another backend was tried is as old as that took.
    const Ns began = clients_[who].began_at, age = began - Ns{timegm(&date)} * kSecond;
    const Ns kept = request.asked_at < 0 ? kNever / 2 : std::max<Ns>(began - request.asked_at, 0);
    const Ns oldest = answer.has("X-Sim") ? kOldestDate + kept : kOldestOwnDate;
    if (began > 0 && (age < 0 || age > oldest)) {
      ledger_.wrong("client %u: the Date of a response is %lld ms old", who,
                    static_cast<long long>(age / kMillisecond));
    }
  }

  // One reason and what belongs to it, as `least pending 2`; behind `retry after` and an outcome, for a second attempt.
  static bool is_reason(std::string_view text) {
    constexpr std::string_view kRetry = "retry after ";
    if (text.starts_with(kRetry)) {
      const std::size_t comma = text.find(", ");
      if (comma == std::string_view::npos) return false;
      const std::string_view outcome = text.substr(kRetry.size(), comma - kRetry.size());
      const auto& outcomes = kAttemptOutcomeNames;
      if (std::find(outcomes.begin(), outcomes.end(), outcome) == outcomes.end()) return false;
      text.remove_prefix(comma + 2);
    }
    std::string_view name = text.substr(0, text.find_last_not_of("0123456789.") + 1);
    if (name.ends_with(' ')) name.remove_suffix(1);
    if (name == "affinity moved") return true;
    return std::find(kRouteReasonNames.begin(), kRouteReasonNames.end(), name) != kRouteReasonNames.end();
  }

  void check_whose(std::uint32_t who, std::size_t number, Request& request) {
    const rfc9112::Message& answer = clients_[who].reader.message;
    const std::string mark = answer.value_or_empty("X-Sim");
    const std::string id = ledger_.id_of(number);
    if (!mark.empty()) {
      if (mark.substr(0, mark.find('/')) != id) {
        return ledger_.wrong("client %u: the response to %.20s for %s", who, mark.c_str(), id.c_str());
      }
      request.attempt = std::atoi(mark.c_str() + mark.find('/') + 1);
    }
    if (answer.value("X-Request-Id") == id) return;
    // A request that is refused before its head is parsed gets a response without the client's id.
    const bool unread =
        mark.empty() && (answer.status == 400 || answer.status == 408 || answer.status == 431 || answer.status == 503);
    if (!unread) ledger_.wrong("client %u: a response without the id %s", who, id.c_str());
    request.counted = false;
  }

  void finish_answer(std::uint32_t who) {
    Client& client = clients_[who];
    const bool interim = client.reader.message.status < 200;
    const bool closing = !client.reader.message.stays_open;
    if (!interim && !client.waiting.empty()) {
      Request& request = ledger_.requests[client.waiting.front()];
      request.whole = true;
      request.received.swap(client.reader.message.body);
      ledger_.judge_answer(client.waiting.front());
      client.waiting.pop_front();
      if (client.ends.size() > client.waiting.size()) {  // the response came before the whole request was sent
        client.ends.pop_front();
        client.last_asked = true;
        if (!closing) ledger_.wrong("client %u: the connection is kept although the request was not read", who);
      }
      client.answered = true;
    }
    client.reader = rfc9112::ResponseReader();
    if (interim) return release_body(who);
    client.closing = closing;
    if (closing) {
      for (const std::size_t number : client.waiting) ledger_.requests[number].behind_close = true;
    }
    if (!client.waiting.empty() || closing) return;
    if (client.last_asked || client.to_ask == 0 || left_ == 0) {
      if (!dice_.one_in(4)) set_timer(who, kLeave, dice_.span(0, 50 * kMillisecond));
      client.last_asked = true;
      return;
    }
    set_timer(who, kAsk, dice_.one_in(2) ? 0 : dice_.span(0, swarm_.think_ns));
  }

  // Nexus's FIN has arrived, after all its bytes.
  void on_end(std::uint32_t who) {
    Client& client = clients_[who];
    const TlsPeer* tls = wire_.at(client.link).tls.get();
    const bool begun = !client.reader.idle(), whole = client.reader.end();
    if (tls != nullptr && tls->was_told_end() && begun && !whole) {
      ledger_.wrong("client %u: TLS says the end within a response", who);
    }
    if (whole) finish_answer(who);
    end_visit(who, false);
  }

  void end_visit(std::uint32_t who, bool reset) {
    Client& client = clients_[who];
    const LinkId link = client.link;
    client.link = kNoLink;
    if (!client.waiting.empty() && client.head_seen && client.reader.message.status >= 200) {
      ledger_.requests[client.waiting.front()].received.swap(client.reader.message.body);
      ledger_.judge_answer(client.waiting.front());
    }
    client.waiting.clear();
    if (reset) {
      wire_.peer_reset(link);
    } else {
      wire_.peer_close(link);
    }
    if (left_ > 0) set_timer(who, kVisit, dice_.span(0, swarm_.think_ns));
  }

  Wire& wire_;
  Ledger& ledger_;
  Dice& dice_;
  const Swarm& swarm_;
  RequestMaker maker_;
  std::vector<Client> clients_;
  std::uint32_t left_;  // requests not made yet
};

}  // namespace nexus::sim
