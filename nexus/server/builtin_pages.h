// builtin_pages.h
// Owns:     the responses of Nexus's own outside an exchange: /health, the model lists, errors, and sending the pages
//           that the control thread renders.
// Promises: a response is written whole or waits in its connection, with a deadline; a large page is never copied, and
//           is sent in shares; JSON is valid whatever a name holds.
// Leaves:   rendering /metrics, /v1/stats and / to control.h; the session before and after to session_driver.h.
// Threads:  BuiltinPages: its worker's. The functions: any.
// Tested by: tests/worker_test.cpp, tests/e2e/endpoints.test.mjs
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/apps/status_page.h"
#include "nexus/base/limits.h"
#include "nexus/base/text_buffer.h"
#include "nexus/fleet/registry.h"
#include "nexus/http/head_writer.h"
#include "nexus/metrics/negotiation.h"
#include "nexus/proxy/candidate_picker.h"
#include "nexus/server/client_keys.h"
#include "nexus/server/model_pages.h"
#include "nexus/server/paths.h"
#include "nexus/server/session.h"

namespace nexus {

constexpr std::string_view kNoListYet = "No backend's list of models was read yet. Try again shortly.";

// GET /health. Returns the status.
inline std::uint16_t render_health(std::string& out, const Snapshot& snapshot, bool draining, Ns uptime_ns) {
  const auto total = snapshot.backends.size();
  const auto healthy = static_cast<std::size_t>(std::count_if(
      snapshot.backends.begin(), snapshot.backends.end(), [](const BackendView& backend) { return backend.healthy; }));
  const std::string_view status = draining           ? "draining"
                                  : healthy == 0     ? "unhealthy"
                                  : healthy == total ? "healthy"
                                                     : "degraded";
  JsonWriter json(out);
  json.begin_object().field("status", status).field("version", kVersion).field("uptime_seconds", uptime_ns / kSecond);
  json.key("backends").begin_object().field("total", total).field("healthy", healthy);
  json.field("unhealthy", total - healthy).end_object().field("models", snapshot.models_available).end_object();
  return draining || healthy == 0 ? 503 : 200;
}

template <class Net>
class BuiltinPages {
 public:
  using SessionT = Session<Net>;
  using State = SessionState;
  using Context = WorkerContext<Net>;

  BuiltinPages(Context& context, Ns process_started_ns) : context_(context), process_started_ns_(process_started_ns) {}
  BuiltinPages(const BuiltinPages&) = delete;
  BuiltinPages& operator=(const BuiltinPages&) = delete;

  // Answers a request that is not for a proxied endpoint. Returns the page to ask the control thread for, if it needs
  // one.
  std::optional<WantedPage> answer(SessionT& session, const char* base, std::string_view path) {
    const RequestHead& head = session.head;
    context_.take_request_id(base, session.fields(), session.request_id);
    const Listens on = use_of_listener(session.metrics_only, context_.settings().server);
    const PageKind kind = page_of(path, on);
    if (const auto refusal = refusal_of(session, base, kind)) {
      refuse(session, *refusal, path, on);
      return std::nullopt;
    }
    session.keep_alive = head.keep_alive && head.framing.kind == Framing::Kind::none;
    if (is_look(head, kind)) {
      answer_json(session, 200, {});
      return std::nullopt;
    }
    if (head.method == HTTP_OPTIONS) {
      answer_options(session, kind, find_endpoint(path, on));
      return std::nullopt;
    }
    if (is_of_backends(kind) && wait_for_checks(session)) return std::nullopt;
    switch (kind) {
      case PageKind::health: answer_health(session); break;
      case PageKind::models: begin_model_page(session, base, list_kind(session)); break;
      case PageKind::tags: begin_model_page(session, base, ModelListKind::ollama); break;
      case PageKind::model: answer_model(session, base, path); break;
      case PageKind::running: return wait_for(session, {kind, narrow_key(session, base)});
      case PageKind::metrics: return wait_for(session, {choose_format(session, base)});
      case PageKind::version:
      case PageKind::stats:
      case PageKind::status: return wait_for(session, {kind});
      case PageKind::none:
      case PageKind::openmetrics:
      case PageKind::endpoint:
      case PageKind::server: assert(false);
    }
    return std::nullopt;
  }

  [[gnu::cold]] void answer_error(SessionT& session, ApiError refusal, std::string_view extra_fields = {},
                                  std::string_view message = {}, ErrorShape shape = ErrorShape::openai) {
    session.keep_alive = session.head.keep_alive && session.head.framing.kind == Framing::Kind::none;
    OwnResponse answer = own_response(session, row_of(refusal).status);
    answer.extra_fields = extra_fields;
    context_.text.clear();
    append_own_error(context_.text, refusal, shape, {.message = message}, answer, session.head.method != HTTP_HEAD);
    write(session, context_.text);
  }

  // Refuses a head that can't be read: the endpoint is not known, and the connection ends.
  [[gnu::cold]] void refuse_head(SessionT& session, ApiError refusal) {
    session.keep_alive = false;
    context_.text.clear();
    try {
      write_cors_lines(session.cors_lines, context_.settings().server, {});
      context_.take_request_id(nullptr, nullptr, session.request_id);
    } catch (const std::bad_alloc&) {
      // the response has no id
    }
    OwnResponse answer;
    answer.request_id = session.request_id;
    answer.date_line = context_.date_line();
    answer.cors_lines = session.cors_lines;
    answer.keep_alive = false;
    const bool to_head = session.input.view().substr(0, 5) == "HEAD ";  // RFC 9110 9.3.2: never a body
    append_own_error(context_.text, refusal, ErrorShape::openai, {}, answer, !to_head);
    write(session, context_.text);
  }

  // Refuses a connection over max_connections. Best effort: no session holds what the kernel does not take; and with
  // `tls` nothing can be said before a handshake, which would cost what is to be saved.
  [[gnu::cold]] void turn_away(typename Net::Socket socket, bool tls) {
    if (tls) return context_.net.close(socket);
    context_.text.clear();
    OwnResponse response;
    response.keep_alive = false;
    response.date_line = context_.date_line();
    if (allows_any_origin(context_.settings().server)) response.cors_lines = kAnyOriginLines;
    append_own_error(context_.text, ApiError::too_many_connections, ErrorShape::openai, {}, response, true);
    Connection<Net> connection;
    connection.attach(socket);
    const iovec part{context_.text.data(), context_.text.size()};
    connection.write_some(context_.net, std::span(&part, 1));
    connection.finish(context_.net, true);
    connection.close(context_.net);
  }

  // Starts to send the page that the session waits for.
  [[gnu::cold]] void begin_page(SessionT& session, std::shared_ptr<const TextBuffer> body, PageKind kind) {
    if (body == nullptr) return answer_error(session, ApiError::metrics_unavailable);
    OwnResponse answer = own_response(session, 200);
    if (kind == PageKind::metrics || kind == PageKind::openmetrics) {
      answer.content_type = content_type_of(session.metrics_form);
      if (context_.settings().metrics.openmetrics) answer.extra_fields = "Vary: Accept\r\n";
    }
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

  // Sends what the kernel takes, straight from the rendered text, but at most kPageShareBytes, so that other sessions
  // get their turn. `over`: the connection failed.
  Step send_page(SessionT& session) {
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
      const IoResult result = session.connection.write_some(context_.net, std::span(parts.data(), count));
      if (!result.ok()) return result.kind == IoResult::Kind::again ? Step::wait : Step::over;
      session.page_sent += result.bytes;
      arm_write_deadline(session);
    }
    if (share_end < total) {
      context_.reschedule(session.handle);
      return Step::wait;
    }
    session.page.reset();
    session.state = State::answering;
    return Step::again;
  }

 private:
  // Clients look if there is a server at all with HEAD /, before they show a key.
  static bool is_look(const RequestHead& head, PageKind kind) {
    return head.method == HTTP_HEAD && kind == PageKind::status;
  }

  std::optional<ApiError> refusal_of(const SessionT& session, const char* base, PageKind kind) const {
    const RequestHead& head = session.head;
    const Settings& settings = context_.settings();
    if (head.refusal == HeadError::unknown_method) return ApiError::unknown_method;
    if (head.method == HTTP_CONNECT) return ApiError::method_not_allowed;
    // A health check of this process's own: its backend must not pass.
    if (is_loop({base, session.fields(), head.head_bytes}, context_.shared.instance)) return ApiError::loop_detected;
    const FieldRow* upgrade = head.method == HTTP_GET ? find_field(*session.fields(), Field::upgrade) : nullptr;
    if (upgrade != nullptr && (kind == PageKind::none || kind == PageKind::endpoint) &&
        equals_ignoring_case(value_of(base, *upgrade), "websocket")) {
      return ApiError::websocket;
    }
    const bool asks = head.method == HTTP_OPTIONS;
    if (kind == PageKind::endpoint && !asks) return ApiError::method_not_allowed;
    if (head.refusal == HeadError::unknown_coding) return ApiError::unknown_coding;
    if (kind == PageKind::none) return ApiError::not_found;
    if (asks) return std::nullopt;
    if (head.method != HTTP_GET && head.method != HTTP_HEAD) return ApiError::method_not_allowed;
    if (is_look(head, kind)) return std::nullopt;
    const bool shows_metrics = kind == PageKind::metrics || kind == PageKind::stats || kind == PageKind::status;
    if (needs_key(kind) && !session.metrics_only) {
      const HeadView view{base, session.fields(), head.head_bytes};
      const FoundKey key = find_key(settings.server, view, session.certificate_name);
      if (!key.authorized) return ApiError::unauthorized;
      if (shows_metrics && key.index && settings.server.api_keys[*key.index].options.admin == 0)
        return ApiError::admin_only;
    }
    if (shows_metrics && !settings.metrics.enabled) return ApiError::metrics_unavailable;
    return std::nullopt;
  }

  // Refuses a request whose head could be read. One that no path or method of Nexus's fits is counted and logged.
  [[gnu::cold]] void refuse(SessionT& session, ApiError error, std::string_view path, Listens on) {
    std::string message, fields;
    if (error == ApiError::not_found) {
      note_stray(session, HttpRejection::unknown_path, path);
      const std::string_view nearest = nearest_path(path, on);
      if (!nearest.empty()) message = "Unknown path. The nearest known path is " + std::string(nearest) + ".";
      if (on == Listens::for_clients && page_of(path, Listens::for_operators) != PageKind::none)
        message = "This page is for operators: it is served at the address of metrics_listen, not at that of listen.";
      if (on == Listens::for_operators && page_of(path, Listens::for_clients) != PageKind::none)
        message = "This path is for clients: it is served at the address of listen, not at that of metrics_listen.";
    } else if (error == ApiError::method_not_allowed || error == ApiError::unknown_method) {
      note_stray(session, HttpRejection::method, path);
      const PageKind kind = session.head.method == HTTP_CONNECT ? PageKind::server : page_of(path, on);
      if (error == ApiError::method_not_allowed) fields = allow_line(kind, find_endpoint(path, on));
    }
    if (error == ApiError::unauthorized && page_of(path, on) == PageKind::status && wants_html(session))
      return answer_browser(session);
    if (error == ApiError::websocket) note_stray(session, HttpRejection::method, path);
    answer_error(session, error, fields, message, shape_of(session, path, on));
  }

  // The shape of errors that the client probably reads.
  static ErrorShape shape_of(const SessionT& session, std::string_view path, Listens on) {
    if (const Endpoint* endpoint = find_endpoint(path, on)) return endpoint->row().errors;
    if (path.starts_with("/api/")) return ErrorShape::ollama;
    return session.fields()->has(Field::anthropic_version) ? ErrorShape::anthropic : ErrorShape::openai;
  }

  // take(value) for each Accept field.
  template <class Take>
  static void each_accept(const SessionT& session, const char* base, Take&& take) {
    for (const FieldRow& row : *session.fields()) {
      if (row.field == Field::other && equals_ignoring_case(name_of(base, row), "accept")) take(value_of(base, row));
    }
  }
  static bool wants_html(const SessionT& session) {
    bool wants = false;
    each_accept(session, session.input.data(),
                [&wants](std::string_view accept) { wants |= accept.find("text/html") != std::string_view::npos; });
    return wants;
  }

  // The form of /metrics that the client prefers.
  PageKind choose_format(SessionT& session, const char* base) const {
    MetricsAccept accepts;
    if (context_.settings().metrics.openmetrics) {
      each_accept(session, base, [&accepts](std::string_view accept) { accepts.add(accept); });
    }
    session.metrics_form = accepts.choice();
    return session.metrics_form.format == MetricsFormat::text ? PageKind::metrics : PageKind::openmetrics;
  }

  // For the person behind a browser, which sends no key.
  [[gnu::cold]] void answer_browser(SessionT& session) {
    static constexpr std::string_view kText =
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Nexus: a key is needed</title>"
        "<h1>This page needs an API key</h1><p>Clients of this gateway show a key, and a browser sends none. Give the "
        "status page an address of its own in <code>nexus.conf</code>, without a key:"
        "<pre>[server]\nmetrics_listen = 127.0.0.1:8001</pre><p>and open that; from another host through "
        "<code>ssh -L 8001:127.0.0.1:8001 HOST</code>. Or see the same numbers in a terminal:"
        "<pre>NEXUS_API_KEY=\xe2\x80\xa6 nexus top URL</pre></html>\n";
    session.keep_alive = session.head.keep_alive && session.head.framing.kind == Framing::Kind::none;
    OwnResponse answer = own_response(session, 401);
    answer.content_type = "text/html; charset=utf-8";
    context_.text.clear();
    append_own_head(context_.text, answer, kText.size());
    if (session.head.method != HTTP_HEAD) context_.text += kText;
    write(session, context_.text);
  }

  void note_stray(const SessionT& session, HttpRejection reason, std::string_view path) {
    context_.slab.http_rejected(reason);
    const std::string_view head = session.input.view();
    context_.log_stray(reason == HttpRejection::method ? "method not served" : "unknown path", session.client_name,
                       head.substr(0, head.find(' ')), path);
  }

  static std::string allow_line(PageKind kind, const Endpoint* endpoint) {
    return "Allow: " + methods_of(kind, endpoint) + "\r\n";
  }

  [[gnu::cold]] void answer_options(SessionT& session, PageKind kind, const Endpoint* endpoint) {
    std::string fields = allow_line(kind, endpoint);
    if (!session.cors_lines.empty()) fields += kPreflightLines;
    OwnResponse answer = own_response(session, 204);
    answer.extra_fields = fields;
    context_.text.clear();
    append_own_head(context_.text, answer, 0);
    write(session, context_.text);
  }

  void answer_health(SessionT& session) {
    std::string body;
    const std::uint16_t status =
        render_health(body, *context_.snapshot, context_.draining, context_.now - process_started_ns_);
    answer_json(session, status, body);
  }

  // Anthropic's clients say which version of its API they speak.
  static ModelListKind list_kind(const SessionT& session) {
    return session.fields()->has(Field::anthropic_version) ? ModelListKind::anthropic : ModelListKind::openai;
  }
  // The client's key, if it may not use every model.
  std::shared_ptr<const ApiKey> narrow_key(const SessionT& session, const char* base) const {
    const std::shared_ptr<const Settings>& settings = context_.snapshot->settings;
    const HeadView head{base, session.fields(), session.head.head_bytes};
    const auto index = find_key(settings->server, head, session.certificate_name).index;
    if (!index || settings->server.api_keys[*index].models.empty()) return nullptr;
    return {settings, &settings->server.api_keys[*index]};
  }

  // True if a backend was never checked: the page waits as a request does, but no longer than for a connection.
  // answer() is called again when the fleet has changed, or the time has passed.
  bool wait_for_checks(SessionT& session) {
    Ns& due_ns = session.checks_due_ns;
    if (due_ns == 0) due_ns = deadline_after(context_.now, context_.settings().upstream.connect_timeout_ns);
    if (!context_.snapshot->unchecked || context_.now >= due_ns) {
      due_ns = 0;
      return false;
    }
    session.state = State::waiting_page;
    arm(session, due_ns);
    return true;
  }

  WantedPage wait_for(SessionT& session, WantedPage page) {
    session.state = State::waiting_page;
    arm(session, context_.now + kPageTime);
    return page;
  }

  void begin_model_page(SessionT& session, const char* base, ModelListKind kind) {
    if (const auto key = narrow_key(session, base)) {
      auto page = std::make_shared<TextBuffer>();
      page->add(render_models(*context_.snapshot, kind, key.get()));
      return begin_page(session, std::move(page), PageKind::models);
    }
    begin_page(session, context_.snapshot->model_pages[static_cast<std::size_t>(kind)], PageKind::models);
  }

  void answer_model(SessionT& session, const char* base, std::string_view path) {
    std::string body;
    if (!render_model(body, *context_.snapshot, path, list_kind(session), narrow_key(session, base).get())) {
      const std::string id = unescape_path(path.substr(kModelPrefix.size())).substr(0, kMaxModelBytes);
      const ErrorShape shape =
          shape_of(session, path, use_of_listener(session.metrics_only, context_.settings().server));
      if (context_.snapshot->discovering)
        return answer_error(session, ApiError::no_healthy_backend, {}, kNoListYet, shape);
      return answer_error(session, ApiError::model_not_found, {},
                          "The model '" + id + "' is not available here. GET /v1/models lists those that are.", shape);
    }
    answer_json(session, 200, body);
  }

  OwnResponse own_response(SessionT& session, std::uint16_t status) const {
    session.keep_alive &= !context_.draining;
    OwnResponse answer;
    answer.date_line = context_.date_line();
    answer.cors_lines = session.cors_lines;
    answer.status = status;
    answer.request_id = session.request_id;
    answer.http_1_0 = session.head.http_1_0;
    answer.keep_alive = session.keep_alive;
    return answer;
  }

  void answer_json(SessionT& session, std::uint16_t status, std::string_view body) {
    context_.text.clear();
    append_own_head(context_.text, own_response(session, status), body.size());
    if (session.head.method != HTTP_HEAD) context_.text += body;
    write(session, context_.text);
  }

  void write(SessionT& session, std::string_view text) {
    session.state = State::answering;
    arm_write_deadline(session);
    session.connection.write(context_.net, context_.blocks, text);  // end_answer() looks at failures
  }

  void arm(SessionT& session, Ns deadline) { context_.wheel.arm(session.timer, deadline); }
  void arm_write_deadline(SessionT& session) {
    arm(session, deadline_after(context_.now, context_.settings().server.write_timeout_ns));
  }

  Context& context_;
  Ns process_started_ns_;
};

}  // namespace nexus
