// otlp_json.h
// Owns:     a batch of spans as the JSON of OTLP over HTTP (opentelemetry-proto, "JSON Protobuf Encoding"), with the
//           names of OpenTelemetry's conventions for HTTP and for generative AI.
// Promises: valid JSON, whatever bytes the names are: ids are hex digits, enums numbers, 64-bit integers decimal text,
//           keys in lowerCamelCase. A value that is unknown has no attribute. What cannot be added for want of memory
//           leaves the batch as it was.
// Leaves:   what a span knows to span.h, sending to server/span_exporter.h.
// Threads:  one (control).
// Tested by: tests/otlp_json_test.cpp, tests/e2e/trace.test.mjs
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <string>
#include <string_view>

#include "nexus/base/text.h"
#include "nexus/base/text_buffer.h"
#include "nexus/config/settings.h"
#include "nexus/metrics/span.h"

namespace nexus {

namespace detail {

using SpanWriter = JsonWriter<std::string>;

// The attributes of one list.
class Attributes {
 public:
  explicit Attributes(SpanWriter& json) : json_(json) { json_.key("attributes").begin_array(); }
  Attributes(const Attributes&) = delete;
  Attributes& operator=(const Attributes&) = delete;
  void end() { json_.end_array(); }

  void text(std::string_view name, std::string_view value) {
    if (!value.empty()) begin(name).field("stringValue", value).end_object().end_object();
  }
  void number(std::string_view name, std::int64_t value) {
    if (value >= 0) begin(name).field("intValue", Digits(value).view()).end_object().end_object();
  }
  void truth(std::string_view name, bool value) { begin(name).field("boolValue", value).end_object().end_object(); }
  void seconds(std::string_view name, Ns span) {
    if (span < 0) return;
    std::array<char, kNumberBytes> digits;
    const char* const end = write_seconds(digits.data(), static_cast<std::uint64_t>(span));
    begin(name).key("doubleValue").literal({digits.data(), static_cast<std::size_t>(end - digits.data())});
    json_.end_object().end_object();
  }

 private:
  SpanWriter& begin(std::string_view name) {
    return json_.begin_object().field("key", name).key("value").begin_object();
  }

  SpanWriter& json_;
};

}  // namespace detail

// `POST /v1/chat/completions`, `chat llama3`.
inline std::string name_of(const SpanRecord& span) {
  const bool server = span.kind == SpanRecord::Kind::server;
  std::string name(server ? span.method : span.operation);
  const std::string_view rest = server ? span.route : span.model.view();
  if (!rest.empty()) name.append(" ").append(rest);
  return name;
}

// An error type, or the status as one.
inline std::string error_text(const SpanRecord& span) {
  if (!span.error.empty()) return std::string(span.error);
  return span.failed && span.status >= 400 ? std::string(Digits(span.status).view()) : std::string();
}

inline void write_attributes(detail::SpanWriter& json, const SpanRecord& span) {
  detail::Attributes attributes(json);
  const bool server = span.kind == SpanRecord::Kind::server;
  attributes.text("http.request.method", span.method);
  attributes.text("http.route", span.route);
  attributes.number("http.response.status_code", span.status == 0 ? -1 : span.status);
  attributes.text("gen_ai.operation.name", span.operation);
  attributes.text("gen_ai.provider.name", span.provider);
  attributes.text("gen_ai.request.model", span.model.view());
  attributes.truth("gen_ai.request.stream", span.stream);
  attributes.text("gen_ai.response.model", span.response_model.view());
  attributes.seconds("gen_ai.response.time_to_first_chunk", span.first_chunk_ns);
  attributes.number("gen_ai.usage.input_tokens", span.input_tokens);
  attributes.number("gen_ai.usage.output_tokens", span.output_tokens);
  attributes.number("gen_ai.usage.cache_read.input_tokens", span.cached_tokens);
  attributes.number("gen_ai.usage.reasoning.output_tokens", span.reasoning_tokens);
  attributes.text("gen_ai.conversation.id", span.conversation.view());
  attributes.text("error.type", error_text(span));
  attributes.text("server.address", span.host.view());
  attributes.number("server.port", server || span.host.length == 0 ? -1 : span.port);
  attributes.text("nexus.backend", span.backend.view());
  attributes.text("nexus.request_id", span.request_id.view());
  attributes.end();
}

inline void write_span(detail::SpanWriter& json, const SpanRecord& span) {
  // Bits 8 and 9 of the flags tell that it is known if the parent is another process's, and that it is.
  constexpr unsigned kKnown = 0x100, kRemote = 0x200;
  constexpr int kError = 2;
  const auto id = hex_of(span.span_id), parent = hex_of(span.parent_id);
  json.begin_object();
  json.field("traceId", std::string_view(span.trace_id.data(), span.trace_id.size()));
  json.field("spanId", std::string_view(id.data(), id.size()));
  if (span.parent_id != 0) json.field("parentSpanId", std::string_view(parent.data(), parent.size()));
  json.field("flags", span.flags | kKnown | (span.remote_parent ? kRemote : 0));
  json.field("name", std::string_view(name_of(span)));
  json.field("kind", static_cast<int>(span.kind));
  json.field("startTimeUnixNano", Digits(span.began_wall_ns).view());
  json.field("endTimeUnixNano", Digits(span.ended_wall_ns).view());
  write_attributes(json, span);
  json.key("status").begin_object();
  if (span.failed) json.field("code", kError);
  json.end_object().end_object();
}

// The body of one request to the collector.
class SpanBatch {
 public:
  // Throws std::bad_alloc: then the batch is empty. The same for add(), which leaves out the span.
  void begin(const TraceSettings& trace, std::string_view instance) {
    clear();
    try {
      text_.reserve(kFirstBytes);
      write_resource(trace, instance);
    } catch (const std::bad_alloc&) {
      clear();
      throw;
    }
  }
  void add(const SpanRecord& span) {
    const std::size_t before = text_.size();
    try {
      if (count_ > 0) text_ += ',';
      detail::SpanWriter json(text_);
      write_span(json, span);
      text_.reserve(text_.size() + kEnd.size());  // so that end() needs no memory
    } catch (const std::bad_alloc&) {
      text_.resize(before);
      throw;
    }
    count_ += 1;
  }
  void end() { text_ += kEnd; }
  void clear() {
    text_.clear();
    count_ = 0;
  }

  std::size_t count() const { return count_; }
  const std::string& text() const { return text_; }
  std::string take_text() { return std::move(text_); }

 private:
  static constexpr std::size_t kFirstBytes = 16u << 10;
  static constexpr std::string_view kEnd = "]}]}]}";

  void write_resource(const TraceSettings& trace, std::string_view instance) {
    detail::SpanWriter json(text_);
    json.begin_object().key("resourceSpans").begin_array().begin_object();
    json.key("resource").begin_object();
    detail::Attributes attributes(json);
    attributes.text("service.name", trace.service_name);
    const auto own = [&](std::string_view name, std::string_view value) {
      const bool replaced = std::any_of(trace.attributes.begin(), trace.attributes.end(),
                                        [name](const auto& given) { return given.first == name; });
      if (!replaced) attributes.text(name, value);  // a name may be there only once
    };
    own("service.version", kVersion);
    own("service.instance.id", instance);
    for (const auto& [name, value] : trace.attributes) attributes.text(name, value);
    attributes.end();
    json.end_object().key("scopeSpans").begin_array().begin_object();
    json.key("scope").begin_object().field("name", "nexus").field("version", kVersion).end_object();
    json.key("spans").begin_array();
  }

  std::string text_;
  std::size_t count_ = 0;
};

}  // namespace nexus
