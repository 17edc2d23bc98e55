// own_answers.h
// Owns:     what Nexus itself answers to a client outside an exchange: the pages, and the errors.
// Promises: an answer is written whole or waits in its connection, with a deadline; a large page is never copied.
// Leaves:   what a page says to pages.h and the control thread, the session's course before and after to server.h.
// Threads:  its worker's.
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "asked.h"
#include "page.h"
#include "pages.h"
#include "session.h"
#include "status_policy.h"

namespace nexus {

constexpr Ns kPageTime = 30 * kSecond;
constexpr std::size_t kPageShareBytes = 128u << 10;  // of a page in one go: some 50 µs

template <class Net>
class OwnAnswers {
 public:
  using SessionT = Session<Net>;
  using State = typename SessionT::State;

  OwnAnswers(Core<Net>& core, Ns process_started_ns) : core_(core), process_started_ns_(process_started_ns) {}
  OwnAnswers(const OwnAnswers&) = delete;
  OwnAnswers& operator=(const OwnAnswers&) = delete;

  // Answers a request that is for no proxied endpoint. Says which page is to be asked for, if it waits for one.
  std::optional<PageKind> answer(SessionT& session, const char* base, std::string_view path) {
    const RequestHead& head = session.head;
    core_.take_request_id(base, session.fields.get(), session.request_id);
    const PageKind kind = page_of(path, core_.settings().server, session.metrics_only);
    if (const auto refusal = refusal_of(session, base, kind)) {
      answer_error(session, *refusal, *refusal == Refusal::method_not_allowed ? "Allow: GET, HEAD\r\n" : "");
      return std::nullopt;
    }
    session.keep_alive = head.keep_alive && head.framing.kind == Framing::Kind::none && !core_.draining;
    switch (kind) {
      case PageKind::health: answer_health(session); break;
      case PageKind::models: answer_json(session, 200, core_.snapshot->models_page); break;
      case PageKind::model: answer_model(session, path); break;
      case PageKind::metrics:
      case PageKind::stats:
      case PageKind::status:
        session.state = State::waiting_page;
        arm(session, core_.now + kPageTime);
        return kind;
      case PageKind::none: assert(false);
    }
    return std::nullopt;
  }

  [[gnu::cold]] void answer_error(SessionT& session, Refusal refusal, std::string_view extra_fields = {},
                                  std::string_view message = {}) {
    session.keep_alive = session.head.keep_alive && session.head.framing.kind == Framing::Kind::none && !core_.draining;
    OwnAnswer answer = own_answer(session, row_of(refusal).status);
    answer.extra_fields = extra_fields;
    core_.text.clear();
    append_own_error(core_.text, refusal, message, answer, session.head.method != HTTP_HEAD);
    write(session, core_.text);
  }

  // For a head that can't be read: no endpoint is known, and the connection ends.
  [[gnu::cold]] void refuse_head(SessionT& session, Refusal refusal) {
    session.keep_alive = false;
    core_.text.clear();
    try {
      core_.take_request_id(nullptr, nullptr, session.request_id);
    } catch (const std::bad_alloc&) {
      // then it bears none
    }
    OwnAnswer answer;
    answer.request_id = session.request_id;
    answer.keep_alive = false;
    const bool to_head = session.input.view().substr(0, 5) == "HEAD ";  // RFC 9110 9.3.2: never a body
    append_own_error(core_.text, refusal, {}, answer, !to_head);
    write(session, core_.text);
  }

  // For a connection that is one too many.
  [[gnu::cold]] void turn_away(typename Net::Socket socket) {
    core_.text.clear();
    OwnAnswer answer;
    answer.keep_alive = false;
    append_own_error(core_.text, Refusal::too_many_connections, {}, answer, true);
    iovec part{core_.text.data(), core_.text.size()};
    core_.net.write(socket, std::span(&part, 1));  // best effort: there is no session to hold what is left
    core_.net.shut_write(socket);
    core_.net.close(socket);
  }

  // The page that the session waits for is here.
  [[gnu::cold]] void begin_page(SessionT& session, std::shared_ptr<const Page> body, PageKind kind) {
    if (body == nullptr) return answer_error(session, Refusal::metrics_unavailable);
    OwnAnswer answer = own_answer(session, 200);
    if (kind == PageKind::metrics) answer.content_type = "text/plain; version=0.0.4; charset=utf-8";
    if (kind == PageKind::status) {
      answer.content_type = "text/html; charset=utf-8";
      answer.extra_fields = kStatusFields;
    }
    session.page_head.clear();
    append_own_head(session.page_head, answer, body->size());
    session.page = std::move(body);
    session.page_body = session.head.method != HTTP_HEAD;
    session.page_sent = 0;
    session.state = State::sending_page;
    arm_write_deadline(session);
  }

  enum class Sent : std::uint8_t { whole, share, waits, failed };

  // Writes what the kernel takes, straight from the rendered text, but no more than a share of it at once, so that
  // others get their turn. Where all is written the state moves on.
  Sent send_page(SessionT& session) {
    const std::size_t head_bytes = session.page_head.size();
    const std::size_t total = head_bytes + (session.page_body ? session.page->size() : 0);
    const std::size_t share_end = std::min(total, session.page_sent + kPageShareBytes);
    while (session.page_sent < share_end) {
      std::array<iovec, 2> parts;
      std::size_t count = 0;
      if (session.page_sent < head_bytes) {
        parts[count++] = {session.page_head.data() + session.page_sent, head_bytes - session.page_sent};
      }
      const std::size_t at = session.page_sent < head_bytes ? 0 : session.page_sent - head_bytes;
      if (share_end > head_bytes + at) {
        parts[count++] = {const_cast<char*>(session.page->data()) + at, share_end - head_bytes - at};
      }
      const IoResult result = core_.net.write(session.connection.socket(), std::span(parts.data(), count));
      if (!result.ok()) return result.kind == IoResult::Kind::again ? Sent::waits : Sent::failed;
      session.page_sent += result.bytes;
      arm_write_deadline(session);
    }
    if (share_end < total) return Sent::share;
    session.page.reset();
    session.state = State::answering;
    return Sent::whole;
  }

 private:
  std::optional<Refusal> refusal_of(const SessionT& session, const char* base, PageKind kind) const {
    const RequestHead& head = session.head;
    const Settings& settings = core_.settings();
    if (head.refusal == HeadError::unknown_coding) return Refusal::unknown_coding;
    if (kind == PageKind::none) return Refusal::not_found;
    if (head.method != HTTP_GET && head.method != HTTP_HEAD) return Refusal::method_not_allowed;
    if (needs_key(kind) && !session.metrics_only &&
        !is_authorized(settings.server, HeadView{base, session.fields.get(), head.head_bytes})) {
      return Refusal::unauthorized;
    }
    const bool shows_metrics = kind == PageKind::metrics || kind == PageKind::stats || kind == PageKind::status;
    if (shows_metrics && !settings.metrics.enabled) return Refusal::metrics_unavailable;
    return std::nullopt;
  }

  void answer_health(SessionT& session) {
    std::string body;
    const std::uint16_t status = render_health(body, *core_.snapshot, core_.draining, core_.now - process_started_ns_);
    answer_json(session, status, body);
  }

  void answer_model(SessionT& session, std::string_view path) {
    std::string body;
    if (!render_model(body, *core_.snapshot, path)) {
      const std::string id = unescape_path(path.substr(kModelPrefix.size())).substr(0, kMaxModelBytes);
      return answer_error(session, Refusal::model_not_found, {},
                          "The model '" + id + "' is not available here. GET /v1/models lists those that are.");
    }
    answer_json(session, 200, body);
  }

  OwnAnswer own_answer(const SessionT& session, std::uint16_t status) const {
    OwnAnswer answer;
    answer.status = status;
    answer.request_id = session.request_id;
    answer.http_1_0 = session.head.http_1_0;
    answer.keep_alive = session.keep_alive;
    return answer;
  }

  void answer_json(SessionT& session, std::uint16_t status, std::string_view body) {
    core_.text.clear();
    append_own_head(core_.text, own_answer(session, status), body.size());
    if (session.head.method != HTTP_HEAD) core_.text += body;
    write(session, core_.text);
  }

  void write(SessionT& session, std::string_view text) {
    session.state = State::answering;
    arm_write_deadline(session);
    session.connection.write(core_.net, core_.blocks, text);  // a failure is seen when the answer ends
  }

  void arm(SessionT& session, Ns deadline) { core_.wheel.arm(session.timer, deadline); }
  void arm_write_deadline(SessionT& session) {
    arm(session, deadline_after(core_.now, core_.settings().server.write_timeout_ns));
  }

  Core<Net>& core_;
  Ns process_started_ns_;
};

}  // namespace nexus
