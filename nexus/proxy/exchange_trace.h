// exchange_trace.h
// Owns:     the spans of an exchange: a server's for the request and a client's for each attempt; the trace id in the
//           access log, and the traceparent that a backend gets.
// Promises: without [trace] endpoint the two fields are passed on unchanged. A sampled request hands over one server
//           span, when it is over, and before it one client span an attempt, as a child of that; or it counts that
//           there was no room. A backend's parent is the span of its own attempt.
// Leaves:   sampling and ids to request_trace.h, the queue to metrics/span.h.
// Threads:  its worker's.
// Tested by: tests/e2e/trace.test.mjs, tests/sim
#pragma once

#include <string_view>

#include "nexus/fleet/affinity.h"
#include "nexus/metrics/service_level.h"
#include "nexus/proxy/exchange.h"

namespace nexus {

template <class Net>
void Exchange<Net>::begin_trace(const HeadView& view) {
  RequestTrace& trace = summary_.trace;
  const std::optional<TraceParent> client = trace_parent_of(view);
  if (client) trace.note(*client);
  const TraceSettings& settings = context_.settings().trace;
  if (!settings.on()) return;
  trace.begin(client, settings.ratio_ppm, context_.random);
  if (trace.state != RequestTrace::State::sampled) return;
  trace.to_wall_ns = context_.net.wall_now() - context_.now;
  trace.texts = context_.trace_texts.take();
  if (!trace.texts) return context_.slab.limit_hit(Limit::memory);  // its spans do without
  const std::string_view session = session_field(context_.settings().routing.affinity_headers, view.base, *view.fields);
  if (session.size() <= kMaxConversationBytes) trace.texts->conversation.set(session);
}

// The lines of Nexus's own in the head of an attempt that begins.
template <class Net>
std::string_view Exchange<Net>::begin_span() {
  RequestTrace& trace = summary_.trace;
  if (trace.state == RequestTrace::State::sampled) attempt_.make_span();
  trace.expect_answer();
  trace.attempt_span = context_.random.next();
  request_.withheld |= trace.withheld;
  context_.trace_lines = context_.shared.via_line;
  append_traceparent(context_.trace_lines, {trace.id, trace.attempt_span, trace.flags});
  return context_.trace_lines;
}

template <class Net>
template <class Fill>
void Exchange<Net>::hand_over_span(Fill&& fill) {
  const RequestTrace& trace = summary_.trace;
  const bool taken = context_.shared.metrics.spans().push([&](SpanRecord& span) {
    span.trace_id = trace.id;
    span.flags = trace.flags;
    span.stream = facts_.stream;
    span.operation = operation_of(*endpoint_);
    fill(span);
    span.began_wall_ns += trace.to_wall_ns;
    span.ended_wall_ns += trace.to_wall_ns;
  });
  if (!taken) context_.slab.spans_dropped(SpanLoss::queue_full, 1);
}

// The attempt in hand has ended. Its response's head has come if there is an answer, or a failed one.
template <class Net>
void Exchange<Net>::end_span(AttemptOutcome outcome) {
  const RequestTrace& trace = summary_.trace;
  const RequestRecord& record = summary_.record;
  const Response& response = relay_.response();
  const bool streaming = state_ == State::streaming;
  const bool has_head = streaming || state_ == State::holding || answer_failed_;
  hand_over_span([&](SpanRecord& span) {
    const BackendView& backend = *attempt_.backend();
    span.kind = SpanRecord::Kind::client;
    span.span_id = trace.attempt_span;
    span.parent_id = trace.server_span;
    span.began_wall_ns = attempt_.began_ns();
    span.ended_wall_ns = context_.now;
    span.provider = backend.provider;
    span.backend.set(backend.name);
    span.host.set(backend.server.host);
    span.port = backend.server.port;
    span.model.set(*picker_.choice().model_name);
    if (trace.texts) span.conversation = trace.texts->conversation;
    const bool told_by_status =
        outcome == AttemptOutcome::ok || outcome == AttemptOutcome::status_429 || outcome == AttemptOutcome::status_5xx;
    if (!told_by_status) span.error = name_of(outcome);
    span.failed = !told_by_status && outcome != AttemptOutcome::cancelled;
    if (!has_head) return;
    if (trace.texts) span.response_model = trace.texts->response_model;
    span.status = response.status();
    span.failed |= response.status() >= 400;
    if (span.stream && response.first_ns() >= 0) span.first_chunk_ns = response.first_ns() - attempt_.began_ns();
    if (!streaming) return;
    span.input_tokens = record.prompt_tokens;
    span.output_tokens = record.completion_tokens;
    span.cached_tokens = record.cached_tokens;
    span.reasoning_tokens = record.reasoning_tokens;
  });
}

// The request is over: judges it, marks it for an exemplar, and logs it.
template <class Net>
void Exchange<Net>::note_end() {
  RequestRecord& record = summary_.record;
  const SloSettings& levels = context_.settings().slo;
  // Its body was read, so that it is known what it asked for.
  if (levels.on() && summary_.complete_ns > 0 && facts_.stream) {
    const Ns first_ns = relay_.response().first_ns();
    record.slo = judge(levels, record, first_ns < 0 ? -1 : first_ns - summary_.complete_ns);
  }
  RequestTrace& trace = summary_.trace;
  if (context_.keeps_exemplars && trace.is_sampled()) {
    trace.mark = {trace_number({trace.id.data(), trace.id.size()}), context_.net.wall_now()};
    record.trace = &trace.mark;
  }
  record.is_noted = record.slo != Slo::none || record.trace != nullptr;
  if (context_.log.wants_access()) log_access();
  if (trace.state == RequestTrace::State::sampled) end_trace();
}

template <class Net>
void Exchange<Net>::end_trace() {
  const RequestTrace& trace = summary_.trace;
  const RequestRecord& record = summary_.record;
  hand_over_span([&](SpanRecord& span) {
    span.span_id = trace.server_span;
    span.parent_id = trace.parent;
    span.remote_parent = trace.has_parent;
    span.began_wall_ns = summary_.started_ns;
    span.ended_wall_ns = summary_.ended_ns;
    span.method = summary_.method;
    span.route = endpoint_->path;
    span.model.set(summary_.model);
    if (trace.texts) span.conversation = trace.texts->conversation;
    if (trace.texts && client_.has_begun()) span.response_model = trace.texts->response_model;
    span.request_id.set(summary_.request_id);
    if (record.disconnect == DisconnectPhase::none || client_.has_begun()) span.status = record.status;
    const ErrorType error = error_of(record);
    if (error != ErrorType::none) span.error = name_of(error);
    const bool in_disguise = error != ErrorType::none && record.status < 400;
    span.failed =
        record.disconnect == DisconnectPhase::none && (record.status >= 500 || summary_.cut_short || in_disguise);
    if (span.stream && relay_.response().first_ns() >= 0) {
      span.first_chunk_ns = relay_.response().first_ns() - summary_.started_ns;
    }
    span.input_tokens = record.prompt_tokens;
    span.output_tokens = record.completion_tokens;
    span.cached_tokens = record.cached_tokens;
    span.reasoning_tokens = record.reasoning_tokens;
    if (attempt_.backend() != nullptr) span.provider = attempt_.backend()->provider;
  });
}

}  // namespace nexus
