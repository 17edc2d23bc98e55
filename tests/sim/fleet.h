// fleet.h
// Owns:     the simulated backends: servers that go down and come back, and the state of each of their connections.
// Promises: checks strictly what Nexus forwards. A malformed head, a body that differs from the client's by more than
//           Nexus may change, and a request that no client sent are each reported as wrong.
// Leaves:   the responses to answers.h, the bytes to wire.h.
// Threads:  one.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "answers.h"
#include "ledger.h"
#include "tests/lib/rfc9112.h"

namespace nexus::sim {

class Fleet {
 public:
  Fleet(Wire& wire, Ledger& ledger, Dice& dice, Manners& manners)
      : wire_(wire), ledger_(ledger), dice_(dice), manners_(manners), answers_(dice, manners), servers_(kAddresses) {
    for (Server& server : servers_) {
      for (std::uint32_t i = 0; i < kModels; ++i) {
        if (!dice_.one_in(6)) server.models.push_back("m" + std::to_string(i));
      }
    }
  }

  // The outcome of a connect() to `address`.
  ConnectFate fate_of(const Address& address, const Shape& shape) {
    ConnectFate fate;
    fate.shape = shape;
    fate.backend = server_at(address);
    if (fate.backend >= kAddresses || !(address == address_of_server(fate.backend))) {
      ledger_.wrong("a connection to an address that no backend has: %s", to_string(address).c_str());
      fate.kind = ConnectFate::Kind::refused;
    } else if (fate.backend >= kServers) {
      fate.kind = fate.backend % 2 == 0 ? ConnectFate::Kind::refused : ConnectFate::Kind::ignored;
    } else if (dice_.chance(manners_.refuse_at_once)) {
      fate.kind = ConnectFate::Kind::refused_at_once;
    } else if (wire_.now() < servers_[fate.backend].down_until || dice_.chance(manners_.refuse)) {
      fate.kind = ConnectFate::Kind::refused;
    } else if (dice_.chance(manners_.ignore)) {
      fate.kind = ConnectFate::Kind::ignored;
    }
    return fate;
  }

  // The request `number` with this head has come whole, or `first` on its connection.
  std::function<void(LinkId id, std::size_t number, const rfc9112::Message& head, const Arrived& arrived, bool first,
                     const Flow::Mark& sent)>
      on_request;

  void on_connected(LinkId id) {
    if (id >= talks_.size()) talks_.resize(id + 1);
    talks_[id] = Talk{};
    talks_[id].server = wire_.at(id).peer;
    servers_[talks_[id].server].links.push_back(id);
    connections_ += 1;
  }

  void on_data(LinkId id) {
    Talk& talk = talks_[id];
    if (talk.deaf) return;
    const std::string_view view = wire_.peer_view(id);
    if (talk.unasked) return ledger_.wrong("link %u: a request came over it behind bytes that nobody asked for", id);
    if (talk.phase != Phase::reading) return;  // wait until the current response is sent
    if (talk.input.empty()) talk.begun = Wire::written(wire_.at(id).to_peer, wire_.at(id).to_peer.read);
    talk.input.append(view);
    wire_.peer_take(id, view.size());
    read(id);
  }
  void on_fin(LinkId id) {
    Talk& talk = talks_[id];
    talk.peer_done = true;
    if (talk.phase != Phase::answering) end(id, false);
  }
  void on_reset(LinkId id) { end(id, true); }
  void on_room(LinkId id) { send(id); }

  enum Timer : std::uint64_t { kGoOn, kCloseIdle, kUnasked };
  void on_timer(LinkId id, std::uint64_t value) {
    Talk& talk = talks_[id];
    if (value == kGoOn) return send(id);
    if (value == kUnasked) return send_unasked(id);
    if (talk.phase == Phase::reading && talk.input.empty() && wire_.peer_view(id).empty()) {
      end(id, dice_.one_in(3));
    }
  }

  // Requests in progress on this server over connections that Nexus has not closed. An answer with bytes behind its end
  // is over for Nexus before it is for its server.
  std::uint32_t running_on(std::uint32_t server) {
    std::uint32_t running = 0;
    for (const LinkId id : servers_[server].links) {
      const Talk& talk = talks_[id];
      const bool answering = talk.phase == Phase::answering && talk.number >= 0 && !talk.answer.overlong;
      running += answering && wire_.at(id).nexus_open ? 1 : 0;
    }
    return running;
  }

  // Ends the fault phase: all servers are up and answer everything.
  void calm() {
    manners_ = Manners{};
    for (Server& server : servers_) {
      server.down_until = 0;
      for (const LinkId id : server.links) {
        if (!talks_[id].deaf) wire_.ease(id);
      }
    }
  }

  // The course of the newest answer on a connection, as its server knows it. Positions count the bytes of
  // Link::to_nexus.
  struct Conduct {
    const Answer* answer = nullptr;  // null: none was begun, or Nexus was done with it in an earlier turn
    std::uint64_t begins = 0;
    bool overlong = false;  // bytes came behind an answer
    bool seen = false;      // its head was read in an earlier turn
  };
  Conduct conduct(LinkId id) const {
    if (!wire_.at(id).connected || id >= talks_.size()) return {};
    const Talk& talk = talks_[id];
    if (talk.begins_at == kNoPosition || talk.settled) return {nullptr, 0, talk.overlong, false};
    return {&talk.answer, talk.begins_at, talk.overlong, talk.head_seen};
  }
  // True if Nexus has read the newest answer whole, and the connection could serve another request.
  bool is_idle(LinkId id) const {
    if (!wire_.at(id).connected || id >= talks_.size()) return false;
    const Talk& talk = talks_[id];
    const bool kept = talk.answer.end == Answer::End::keep && !talk.overlong && !talk.unasked && !talk.peer_done;
    return kept && is_done_with(id);
  }
  // True if Nexus has read the newest answer whole and has asked for nothing since.
  bool is_done_with(LinkId id) const {
    if (!wire_.at(id).connected || id >= talks_.size()) return false;
    const Talk& talk = talks_[id];
    return talk.settled && talk.phase == Phase::reading && !talk.answered_early && !talk.deaf && talk.input.empty() &&
           wire_.at(id).to_peer.held() == 0;
  }
  // True if Nexus waits for the first byte that means something in an answer of this server.
  bool owes_first(std::uint32_t server) const {
    return std::any_of(servers_[server].links.begin(), servers_[server].links.end(), [this](LinkId id) {
      const Conduct now = conduct(id);
      return wire_.at(id).nexus_open && now.answer != nullptr &&
             wire_.at(id).to_nexus.read < now.begins + now.answer->first_end;
    });
  }
  // At the end of a turn in which Nexus has read from the connection.
  void note_read(LinkId id) {
    if (!wire_.at(id).connected || id >= talks_.size() || talks_[id].begins_at == kNoPosition) return;
    Talk& talk = talks_[id];
    const std::uint64_t read = wire_.at(id).to_nexus.read;
    talk.head_seen = read >= talk.begins_at + talk.answer.body_at;
    talk.settled = !talk.answer.until_close && read >= talk.begins_at + talk.answer.whole_bytes;
  }

  std::uint64_t connections() const { return connections_; }
  std::uint64_t arrivals() const { return arrivals_; }
  std::uint64_t unasked() const { return unasked_; }
  // Checks that were answered well, or begun to be.
  std::uint64_t good_probes() const { return good_probes_; }
  std::size_t open() const {
    std::size_t open = 0;
    for (const Server& server : servers_) open += server.links.size();
    return open;
  }

 private:
  static constexpr std::uint64_t kNoPosition = UINT64_MAX;
  enum class Phase : std::uint8_t { reading, answering, stalled };

  struct Server {
    Ns down_until = 0;
    std::vector<std::string> models;
    std::vector<LinkId> links;
  };
  struct Talk {
    std::uint32_t server = 0;
    Phase phase = Phase::reading;
    bool deaf = false;       // never reads again
    bool peer_done = false;  // Nexus's FIN has arrived
    std::string input;
    rfc9112::Message head;  // of the request in `input`; empty until it is complete
    Flow::Mark begun;       // the write of input[0]; at 0: unknown
    std::uint32_t served = 0;
    std::int64_t number = -1;               // of the request being answered
    std::uint64_t begins_at = kNoPosition;  // of the newest answer
    bool settled = false;                   // Nexus has read that whole
    bool head_seen = false;
    bool overlong = false;
    bool unasked = false;         // bytes were sent that no request asked for
    bool answered = false;        // the request in `input` has been answered
    bool answered_early = false;  // before its body had arrived
    Answer answer;
    std::size_t sent = 0;
    std::size_t pause = 0;

    std::size_t request_bytes() const { return head.head_bytes + head.length; }
  };

  void end(LinkId id, bool reset) {
    Talk& talk = talks_[id];
    std::erase(servers_[talk.server].links, id);
    if (reset) {
      wire_.peer_reset(id);
    } else {
      wire_.peer_close(id);
    }
  }

  void read(LinkId id) {
    Talk& talk = talks_[id];
    if (talk.head.head_bytes == 0) {
      if (!talk.input.empty() && talk.served > 0 && dice_.chance(manners_.close_under_request)) {
        return end(id, dice_.one_in(2));
      }
      if (talk.input.find("\r\n\r\n") == std::string::npos || !read_head(id)) return;
    }
    if (talk.phase != Phase::reading || talk.input.size() < talk.request_bytes()) return;
    if (!talk.answered) return begin_answer(id);
    forget_request(id);
    if (!talk.input.empty()) read(id);
  }

  // False if the connection is closed or the response has begun.
  bool read_head(LinkId id) {
    Talk& talk = talks_[id];
    std::string_view text = talk.input;
    std::string problem;
    if (rfc9112::take_head(text, talk.head, true, problem) == rfc9112::Got::it) {
      problem = rfc9112::check_host(talk.head) + rfc9112::read_framing(talk.head, true);
    }
    if (talk.head.method == "GET" && problem.empty()) return true;
    if (talk.head.method != "POST" || !problem.empty() || !is_well(talk.head)) {
      ledger_.wrong("a backend got a malformed head (%s): %.300s", problem.c_str(), talk.input.c_str());
      return false;
    }
    if (dice_.chance(manners_.die_and_return)) {
      die(talk.server);
      return false;
    }
    if (dice_.chance(manners_.never_reads)) {
      talk.deaf = true;
      return false;
    }
    const bool body_misses = talk.input.size() < talk.request_bytes();
    if (body_misses && dice_.chance(manners_.early)) {
      talk.answered_early = true;
      begin_answer(id);
      return false;
    }
    return true;
  }

  // Checks what Nexus promises about the requests that it forwards.
  static bool is_well(const rfc9112::Message& head) {
    for (const char* name : {"Content-Length", "Host", "X-Request-Id", "Via"}) {
      if (head.all(name).size() != 1) return false;
    }
    for (const char* name : {"Transfer-Encoding", "X-Hop", "Expect", "Connection", "Accept-Encoding"}) {
      if (head.has(name)) return false;
    }
    // A backend with a key of its own gets that one. Nexus forwards a client's key only if it has none of its own.
    const std::string key = head.value_or_empty("Authorization");
    return head.minor == 1 && (key.empty() || key.starts_with("Bearer sk-of-") || key == "Bearer sk-client" ||
                               key == "Bearer sk-sim" || key == "Bearer sk-rest");
  }

  void die(std::uint32_t server) {
    servers_[server].down_until = wire_.now() + dice_.span(0, 2 * kSecond);
    const std::vector<LinkId> links = servers_[server].links;
    for (const LinkId id : links) end(id, true);
  }

  void begin_answer(LinkId id) {
    Talk& talk = talks_[id];
    talk.phase = Phase::answering;
    talk.answered = true;
    talk.sent = talk.pause = 0;
    talk.begins_at = wire_.at(id).to_nexus.written;
    talk.settled = talk.head_seen = false;
    if (talk.input.compare(0, 4, "GET ") == 0) {
      answer_probe(talk);
    } else {
      answer_request(id, talk);
    }
    talk.served += 1;
    talk.overlong |= talk.answer.overlong;
    if (!ledger_.ok()) return;
    send(id);
  }

  // Answers a health check or a request for the models; the response may be faulty.
  void answer_probe(Talk& talk) {
    const bool ollama = talk.input.find("/api/tags ") != std::string::npos;
    std::string body = ollama ? R"({"models":[)" : R"({"object":"list","data":[)";
    const auto& models = servers_[talk.server].models;
    for (std::size_t i = 0; i < models.size(); ++i) {
      body.append(i > 0 ? "," : "").append(ollama ? R"({"name":")" : R"({"id":")").append(models[i]).append(R"("})");
    }
    body += "]}";
    const bool fails = dice_.chance(manners_.error_status);
    talk.answer = Answer{};
    talk.answer.bytes = std::string(fails ? "HTTP/1.1 500 Sim" : "HTTP/1.1 200 Sim") +
                        "\r\nConnection: close\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
    talk.answer.end = Answer::End::close;
    talk.answer.status = fails ? 500 : 200;
    talk.answer.may_be_whole = true;
    talk.answer.whole_bytes = talk.answer.bytes.size();
    talk.answer.body_at = talk.answer.whole_bytes - body.size();
    talk.number = -1;
    talk.answer.garbled = dice_.chance(manners_.malformed_head);
    good_probes_ += fails || talk.answer.garbled ? 0 : 1;
    if (talk.answer.garbled) talk.answer.bytes[dice_.index(8)] = '?';
    if (dice_.chance(manners_.truncated)) talk.answer.bytes.resize(dice_.index(talk.answer.bytes.size()));
    if (dice_.chance(manners_.stall)) talk.answer.end = Answer::End::stall;
    if (dice_.chance(manners_.reset)) talk.answer.end = Answer::End::reset;
  }

  void answer_request(LinkId id, Talk& talk) {
    const std::string request_id = talk.head.value("X-Request-Id");
    const std::int64_t number = ledger_.number_of(request_id);
    if (number < 0) return ledger_.wrong("a request that nobody sent came to a backend: %.200s", talk.input.c_str());
    arrivals_ += 1;
    Request& request = ledger_.requests[static_cast<std::size_t>(number)];
    bool asked = request.body.options == BodyParts::Options::yes;
    if (request.kind != Request::Kind::completion) {
      return ledger_.wrong("r%lld: a wrong request came to a backend", static_cast<long long>(number));
    }
    if (!talk.answered_early && !check_body(request, talk, asked)) {
      return ledger_.wrong("r%lld: its body came changed to a backend: %.300s", static_cast<long long>(number),
                           talk.input.c_str() + talk.head.head_bytes);
    }
    Attempt attempt;
    attempt.server = talk.server;
    attempt.sent_at = talk.begun.at;
    const bool by_client = request.body.options == BodyParts::Options::yes;
    if (!talk.answered_early && talk.begun.at > 0)
      on_request(id, static_cast<std::size_t>(number), talk.head, {model_of(talk), asked && !by_client},
                 talk.served == 0, talk.begun);
    talk.number = number;
    answers_.attempt_number_ = request.attempts.size();
    answers_.most_tokens_ = request.most_tokens;
    // A backend that did not read the body can't know if usage was requested, and sends none.
    talk.answer = answers_.make(request_id, static_cast<std::size_t>(number), *request.api, request.body.stream,
                                asked && !talk.answered_early, by_client, attempt);
    request.attempts.push_back(std::move(attempt));
    wire_.note(8, static_cast<std::uint64_t>(number), talk.answer.bytes.size());
  }

  // The model of the request in `input`, or an empty text.
  static std::string_view model_of(const Talk& talk) {
    const std::string_view body(talk.input.data() + talk.head.head_bytes, talk.head.length);
    constexpr std::string_view kModel = R"("model":")";
    const std::size_t at = body.find(kModel);
    if (at == std::string_view::npos) return {};
    const std::size_t from = at + kModel.size();
    return body.substr(from, body.find('"', from) - from);
  }

  // Behind a backend's base path.
  static std::string_view request_path(const rfc9112::Message& head) {
    std::string_view target = head.target;
    if (target.starts_with("/base/")) target.remove_prefix(5);
    return target;
  }

  // True if the body is the client's except for the model and the request for usage; sets `asked` if usage is
  // requested.
  bool check_body(const Request& request, const Talk& talk, bool& asked) const {
    if (request_path(talk.head) != request.api->path) return false;
    const std::string_view body(talk.input.data() + talk.head.head_bytes, talk.head.length);
    const std::string_view model = model_of(talk);
    if (model.empty()) return false;
    for (const bool asks : {false, true}) {
      if (asks && !request.api->takes_options) continue;
      if (request.body.render(model, asks) != body) continue;
      asked = asks || asked;
      return true;
    }
    return false;
  }

  void send(LinkId id) {
    Talk& talk = talks_[id];
    if (talk.phase != Phase::answering || !wire_.at(id).peer_open) return;
    const Answer& answer = talk.answer;
    while (talk.sent < answer.bytes.size()) {
      std::size_t up_to = answer.bytes.size();
      if (talk.pause < answer.pauses.size()) {
        const Answer::Pause& pause = answer.pauses[talk.pause];
        up_to = std::min(pause.at, up_to);
        if (talk.sent >= up_to) {
          talk.pause += 1;
          return wire_.link_timer(Notice::Kind::backend_timer, id, wire_.now() + pause.span, kGoOn);
        }
      }
      const std::string_view piece(answer.bytes.data() + talk.sent, up_to - talk.sent);
      const std::size_t taken = wire_.peer_send(id, piece);
      talk.sent += taken;
      if (taken < piece.size()) return;  // continue when there is room
    }
    end_answer(id);
  }

  void end_answer(LinkId id) {
    Talk& talk = talks_[id];
    const Answer::End how = talk.answer.end;
    talk.number = -1;
    if (how == Answer::End::stall) {
      talk.phase = Phase::stalled;
      return;
    }
    if (how != Answer::End::keep || talk.peer_done) return end(id, how == Answer::End::reset);
    if (talk.answered_early && dice_.one_in(2)) return end(id, false);
    talk.phase = Phase::reading;
    on_data(id);
  }

  // The request is read and answered: drop it, so that the next one can follow.
  void forget_request(LinkId id) {
    Talk& talk = talks_[id];
    const std::size_t whole = talk.request_bytes();
    talk.input.erase(0, whole);
    talk.begun = {};
    talk.head = {};
    const bool in_turn =
        !talk.answered_early && !talk.answer.overlong;  // otherwise the next one may have arrived already
    talk.answered = talk.answered_early = false;
    if (in_turn && !talk.input.empty())
      ledger_.wrong("link %u: a backend got bytes after a request: %.100s", id, talk.input.c_str());
    if (dice_.chance(manners_.close_idle)) {
      wire_.link_timer(Notice::Kind::backend_timer, id, wire_.now() + dice_.span(0, 300 * kMillisecond), kCloseIdle);
    }
    if (dice_.chance(manners_.unasked)) {  // at once: directly behind the answer
      const Ns span = dice_.one_in(3) ? 0 : dice_.span(0, 300 * kMillisecond);
      wire_.link_timer(Notice::Kind::backend_timer, id, wire_.now() + span, kUnasked);
    }
  }

  // Only while Nexus has written nothing that was not read here, and does not try to: bytes that cross a request can't
  // be told from its answer.
  void send_unasked(LinkId id) {
    constexpr std::string_view kBytes[] = {
        "HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n{\"unasked\":true}",
        "HTTP/1.1 200 OK\r\nContent-Le",
        "HTTP/1.1 100 Continue\r\n\r\n",
        "ZZZZ",
        "\r\n"};
    Talk& talk = talks_[id];
    const Link& link = wire_.at(id);
    const bool idle = talk.phase == Phase::reading && talk.input.empty() && !talk.answered && !talk.answer.garbled;
    if (!idle || talk.deaf || talk.peer_done || talk.unasked) return;
    if (!link.peer_open || link.peer_shut || !link.nexus_open || link.reset_seen) return;
    if (link.to_peer.held() > 0 || link.blocked_since >= 0) return;
    if (link.to_nexus.arrived < link.to_nexus.written) {
      return wire_.link_timer(Notice::Kind::backend_timer, id, link.to_nexus.last_at, kUnasked);
    }
    talk.unasked = true;
    unasked_ += 1;
    wire_.peer_sends_unasked(id, kBytes[dice_.index(std::size(kBytes))]);
    if (dice_.one_in(3)) end(id, false);
  }

  Wire& wire_;
  Ledger& ledger_;
  Dice& dice_;
  Manners& manners_;
  AnswerMaker answers_;
  std::vector<Server> servers_;
  std::vector<Talk> talks_;  // by link
  std::uint64_t connections_ = 0;
  std::uint64_t arrivals_ = 0;
  std::uint64_t unasked_ = 0;
  std::uint64_t good_probes_ = 0;
};

}  // namespace nexus::sim
