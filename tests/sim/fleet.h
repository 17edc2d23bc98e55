// fleet.h
// Owns:     the simulated backends: servers that come and go, and what each of their connections is about to do.
// Promises: reads what Nexus forwards by the letter: a head that is not as it must be, a body that differs from the
//           client's by more than Nexus may change, a request that nobody sent: each is wrong.
// Leaves:   answers to answers.h, bytes to wire.h.
// Threads:  one.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "answers.h"
#include "ledger.h"

namespace nexus::sim {

class Fleet {
 public:
  Fleet(Wire& wire, Ledger& ledger, Dice& dice, Manners& manners)
      : wire_(wire), ledger_(ledger), dice_(dice), manners_(manners), answers_(dice, manners), servers_(kServers) {
    for (Server& server : servers_) {
      for (std::uint32_t i = 0; i < kModels; ++i) {
        if (!dice_.one_in(6)) server.models.push_back("m" + std::to_string(i));
      }
    }
  }

  // How a connection of Nexus's to `address` goes.
  ConnectFate fate_of(const Address& address, const Shape& shape) {
    ConnectFate fate;
    fate.shape = shape;
    fate.backend = address.port - 9000u;
    if (fate.backend >= kServers || !(address == address_of_server(fate.backend))) {
      ledger_.wrong("a connection to an address that no backend has: %s", to_string(address).c_str());
      fate.kind = ConnectFate::Kind::refused;
    } else if (dice_.chance(manners_.refuse_at_once)) {
      fate.kind = ConnectFate::Kind::refused_at_once;
    } else if (wire_.now() < servers_[fate.backend].down_until || dice_.chance(manners_.refuse)) {
      fate.kind = ConnectFate::Kind::refused;
    } else if (dice_.chance(manners_.ignore)) {
      fate.kind = ConnectFate::Kind::ignored;
    }
    return fate;
  }

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
    if (talk.phase != Phase::reading) return;  // it waits until this answer is out
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

  enum Timer : std::uint64_t { kGoOn, kCloseIdle };
  void on_timer(LinkId id, std::uint64_t value) {
    Talk& talk = talks_[id];
    if (value == kGoOn) return send(id);
    if (talk.phase == Phase::reading && talk.input.empty() && wire_.peer_view(id).empty()) {
      end(id, dice_.one_in(3));
    }
  }

  // Requests that are running on this server over connections that Nexus has open.
  std::uint32_t running_on(std::uint32_t server) {
    std::uint32_t running = 0;
    for (const LinkId id : servers_[server].links) {
      const Talk& talk = talks_[id];
      running += talk.phase == Phase::answering && talk.number >= 0 && wire_.at(id).nexus_open ? 1 : 0;
    }
    return running;
  }

  // The fault phase is over: everything up, and answers what comes.
  void calm() {
    manners_ = Manners{};
    for (Server& server : servers_) {
      server.down_until = 0;
      for (const LinkId id : server.links) {
        if (!talks_[id].deaf) wire_.ease(id);
      }
    }
  }

  std::uint64_t connections() const { return connections_; }
  std::uint64_t arrivals() const { return arrivals_; }
  std::size_t open() const {
    std::size_t open = 0;
    for (const Server& server : servers_) open += server.links.size();
    return open;
  }

 private:
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
    bool peer_done = false;  // Nexus's FIN came
    std::string input;
    std::size_t head_bytes = 0;
    std::size_t body_bytes = 0;
    std::uint64_t taken = 0;  // position of input[0] in the flow
    std::uint32_t served = 0;
    std::int64_t number = -1;     // of the request being answered
    bool answered = false;        // the request in `input`
    bool answered_early = false;  // before its body had come
    Answer answer;
    std::size_t sent = 0;
    std::size_t pause = 0;
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

  static std::string_view value(std::string_view head, std::string_view name) {
    const std::string start = "\r\n" + std::string(name) + ": ";
    const std::size_t at = head.find(start);
    if (at == std::string_view::npos) return {};
    const std::size_t from = at + start.size();
    return head.substr(from, head.find("\r\n", from) - from);
  }
  static std::size_t count(std::string_view head, std::string_view what) {
    std::size_t found = 0;
    for (std::size_t at = head.find(what); at != std::string_view::npos; at = head.find(what, at + 1)) ++found;
    return found;
  }

  void read(LinkId id) {
    Talk& talk = talks_[id];
    if (talk.head_bytes == 0) {
      if (!talk.input.empty() && talk.served > 0 && dice_.chance(manners_.close_under_request)) {
        return end(id, dice_.one_in(2));
      }
      const std::size_t at = talk.input.find("\r\n\r\n");
      if (at == std::string::npos) return;
      talk.head_bytes = at + 4;
      if (!read_head(id)) return;
    }
    if (talk.phase != Phase::reading || talk.input.size() < talk.head_bytes + talk.body_bytes) return;
    if (!talk.answered) return begin_answer(id);
    forget_request(id);
    if (!talk.input.empty()) read(id);
  }

  // False where the connection is gone, or answers already.
  bool read_head(LinkId id) {
    Talk& talk = talks_[id];
    const std::string_view head(talk.input.data(), talk.head_bytes);
    talk.body_bytes = 0;
    if (head.substr(0, 4) == "GET ") return true;
    if (head.substr(0, 5) != "POST ") {
      ledger_.wrong("a backend got %.40s", talk.input.c_str());
      return false;
    }
    const std::string_view length = value(head, "Content-Length");
    for (const char c : length) talk.body_bytes = talk.body_bytes * 10 + static_cast<std::size_t>(c - '0');
    check_head(head, length);
    if (dice_.chance(manners_.die_and_return)) {
      die(talk.server);
      return false;
    }
    if (dice_.chance(manners_.never_reads)) {
      talk.deaf = true;
      return false;
    }
    const bool body_misses = talk.input.size() < talk.head_bytes + talk.body_bytes;
    if (body_misses && dice_.chance(manners_.early)) {
      talk.answered_early = true;
      begin_answer(id);
      return false;
    }
    return true;
  }

  void check_head(std::string_view head, std::string_view length) {
    const auto one = [&](std::string_view name) { return count(head, "\r\n" + std::string(name) + ": ") == 1; };
    const bool well = !length.empty() && one("Content-Length") && one("Host") && one("X-Request-Id") && one("Via") &&
                      head.find("Transfer-Encoding") == std::string_view::npos &&
                      head.find("X-Hop") == std::string_view::npos && head.find("Expect") == std::string_view::npos &&
                      head.find("\r\nConnection") == std::string_view::npos;
    const std::string_view line = head.substr(0, head.find("\r\n"));
    if (!well || line.substr(line.size() - 9) != " HTTP/1.1") {
      ledger_.wrong("a head that is not as it must be came to a backend: %.300s", std::string(head).c_str());
    }
    // A backend with a key of its own gets that; a client's own key is for this gateway where it has some.
    const std::string_view key = value(head, "Authorization");
    if (!key.empty() && key.substr(0, 13) != "Bearer sk-of-" && key != "Bearer sk-client" && key != "Bearer sk-sim") {
      ledger_.wrong("a key of nobody's came to a backend: %s", std::string(key).c_str());
    }
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
    if (talk.input.compare(0, 4, "GET ") == 0) {
      answer_probe(talk);
    } else {
      answer_request(id, talk);
    }
    talk.served += 1;
    if (!ledger_.ok()) return;
    send(id);
  }

  // A health check or a list of models, mostly in order.
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
    talk.number = -1;
    if (dice_.chance(manners_.malformed_head)) talk.answer.bytes[dice_.index(8)] = '?';
    if (dice_.chance(manners_.truncated)) talk.answer.bytes.resize(dice_.index(talk.answer.bytes.size()));
    if (dice_.chance(manners_.stall)) talk.answer.end = Answer::End::stall;
    if (dice_.chance(manners_.reset)) talk.answer.end = Answer::End::reset;
  }

  void answer_request(LinkId id, Talk& talk) {
    const std::string_view head(talk.input.data(), talk.head_bytes);
    const std::string_view request_id = value(head, "X-Request-Id");
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
                           talk.input.c_str() + talk.head_bytes);
    }
    Attempt attempt;
    attempt.server = talk.server;
    attempt.sent_at = Wire::written_at(wire_.at(id).to_peer, talk.taken);
    talk.number = number;
    answers_.attempt_number_ = request.attempts.size();
    // Where the body was not read it is not known whether usage was asked for: no event tells it then.
    const bool by_client = request.body.options == BodyParts::Options::yes;
    talk.answer = answers_.make(request_id, static_cast<std::size_t>(number), request.body.stream,
                                asked && !talk.answered_early, by_client, attempt);
    request.attempts.push_back(std::move(attempt));
    wire_.note(8, static_cast<std::uint64_t>(number), talk.answer.bytes.size());
  }

  // Whether the body is the client's, but for the model and the wish for usage; `asked` says whether that is in it.
  bool check_body(const Request& request, const Talk& talk, bool& asked) const {
    const std::string_view body(talk.input.data() + talk.head_bytes, talk.body_bytes);
    constexpr std::string_view kModel = R"("model":")";
    const std::size_t at = body.find(kModel);
    if (at == std::string_view::npos) return false;
    const std::size_t from = at + kModel.size();
    const std::string_view model = body.substr(from, body.find('"', from) - from);
    for (const bool asks : {false, true}) {
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
      if (taken < piece.size()) return;  // goes on when there is room
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

  // The request is answered and read: the next one may come.
  void forget_request(LinkId id) {
    Talk& talk = talks_[id];
    const std::size_t whole = talk.head_bytes + talk.body_bytes;
    talk.input.erase(0, whole);
    talk.taken += whole;
    talk.head_bytes = talk.body_bytes = 0;
    const bool in_turn = !talk.answered_early && !talk.answer.overlong;  // else the next may be here already
    talk.answered = talk.answered_early = false;
    if (in_turn && !talk.input.empty())
      ledger_.wrong("link %u: a backend got bytes behind a request: %.100s", id, talk.input.c_str());
    if (dice_.chance(manners_.close_idle)) {
      wire_.link_timer(Notice::Kind::backend_timer, id, wire_.now() + dice_.span(0, 300 * kMillisecond), kCloseIdle);
    }
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
};

}  // namespace nexus::sim
