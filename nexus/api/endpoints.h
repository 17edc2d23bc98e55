// endpoints.h
// Owns:     the table of proxied endpoints.
// Promises: a new endpoint of a known dialect takes one row and no other change.
// Leaves:   what an API's bodies look like to dialects.h; which backend speaks an API to config/settings.h.
// Threads:  any; constant.
// Tested by: tests/request_json_test.cpp, tests/e2e/endpoints.test.mjs
#pragma once

#include <llhttp.h>

#include <array>
#include <cstdint>
#include <string_view>

#include "nexus/api/dialects.h"
#include "nexus/base/limits.h"
#include "nexus/base/text.h"
#include "nexus/config/settings.h"

namespace nexus {

enum class BodyFormat : std::uint8_t { none, json, multipart, multipart_or_json };  // of a request
enum class Model : std::uint8_t {
  none,
  optional,
  required,
  of_admin
};  // in the request; of_admin: it is for one server alone, whatever model it names
enum class Streams : std::uint8_t { never, if_asked, unless_refused };  // by the member `stream`
enum class Tells : std::uint8_t { nothing, counts };                    // a response: token counts

using Methods = std::uint64_t;
constexpr Methods methods(auto... method) { return ((Methods{1} << method) | ...); }

struct Endpoint {
  std::string_view path;  // `{id}` stands for one segment
  Methods methods;
  Api api;
  Dialect dialect;
  BodyFormat body;
  Model model;
  Streams streams;
  Tells tells;

  constexpr const DialectRow& row() const { return row_of(dialect); }
  // Null if its responses tell no token counts.
  constexpr const ResponseShape* response() const { return tells == Tells::counts ? &row().response : nullptr; }
  constexpr bool serves(unsigned method) const { return (methods >> method & 1) != 0; }

  // The part of `asked` that stands for `{id}`; empty if `asked` is another path, or this one has no such part.
  constexpr std::string_view id_in(std::string_view asked) const {
    constexpr std::string_view kId = "{id}";
    const std::size_t at = path.find(kId);
    if (at == std::string_view::npos || asked.size() <= path.size() - kId.size()) return {};
    const std::string_view before = path.substr(0, at), behind = path.substr(at + kId.size());
    if (!asked.starts_with(before) || !asked.ends_with(behind)) return {};
    const std::string_view id = asked.substr(at, asked.size() - before.size() - behind.size());
    return id.find('/') == std::string_view::npos ? id : std::string_view();
  }
  // The hash of the id in a request's path; 0 if it has none.
  std::uint64_t id_hash(std::string_view asked) const {
    if (body != BodyFormat::none) return 0;
    const std::string_view id = id_in(asked);
    return id.empty() ? 0 : hash_of(id);
  }
};

inline constexpr auto kEndpoints = [] {
  constexpr Methods post = methods(HTTP_POST), look = methods(HTTP_GET),
                    look_or_delete = methods(HTTP_GET, HTTP_DELETE), remove = methods(HTTP_DELETE);
  using enum BodyFormat;
  using D = Dialect;
  using M = Model;
  using S = Streams;
  using T = Tells;
  return std::to_array<Endpoint>({
      {"/v1/chat/completions", post, Api::chat, D::openai, json, M::required, S::if_asked, T::counts},
      {"/v1/completions", post, Api::completions, D::openai, json, M::required, S::if_asked, T::counts},
      {"/v1/embeddings", post, Api::embeddings, D::openai, json, M::required, S::never, T::counts},
      {"/v1/responses", post, Api::responses, D::responses, json, M::required, S::if_asked, T::counts},
      {"/v1/messages", post, Api::messages, D::messages, json, M::required, S::if_asked, T::counts},
      {"/api/chat", post, Api::ollama, D::ollama_chat, json, M::required, S::unless_refused, T::counts},
      {"/api/generate", post, Api::ollama, D::ollama_generate, json, M::required, S::unless_refused, T::counts},
      {"/api/embed", post, Api::ollama, D::ollama_chat, json, M::required, S::never, T::counts},
      {"/api/embeddings", post, Api::ollama, D::ollama_chat, json, M::required, S::never, T::nothing},
      {"/api/show", post, Api::ollama, D::ollama_chat, json, M::required, S::never, T::nothing},
      {"/v1/messages/count_tokens", post, Api::messages, D::messages, json, M::required, S::never, T::nothing},
      {"/v1/responses/input_tokens", post, Api::responses, D::responses, json, M::required, S::never, T::nothing},
      {"/v1/chat/completions/input_tokens", post, Api::chat, D::openai, json, M::required, S::never, T::nothing},
      {"/v1/rerank", post, Api::rerank, D::openai, json, M::required, S::never, T::counts},
      {"/rerank", post, Api::rerank, D::openai, json, M::required, S::never, T::counts},
      {"/v2/rerank", post, Api::rerank, D::openai, json, M::required, S::never, T::counts},
      {"/v1/reranking", post, Api::rerank, D::openai, json, M::required, S::never, T::counts},
      {"/reranking", post, Api::rerank, D::openai, json, M::required, S::never, T::counts},
      {"/v1/score", post, Api::score, D::openai, json, M::required, S::never, T::counts},
      {"/score", post, Api::score, D::openai, json, M::required, S::never, T::counts},
      {"/v1/tokenize", post, Api::tokenize, D::openai, json, M::optional, S::never, T::nothing},
      {"/tokenize", post, Api::tokenize, D::openai, json, M::optional, S::never, T::nothing},
      {"/v1/detokenize", post, Api::tokenize, D::openai, json, M::optional, S::never, T::nothing},
      {"/detokenize", post, Api::tokenize, D::openai, json, M::optional, S::never, T::nothing},
      {"/v1/moderations", post, Api::moderations, D::openai, json, M::optional, S::never, T::nothing},
      {"/v1/audio/speech", post, Api::speech, D::media, json, M::required, S::if_asked, T::counts},
      {"/v1/images/generations", post, Api::images, D::media, json, M::optional, S::if_asked, T::counts},
      {"/images/generations", post, Api::images, D::media, json, M::optional, S::if_asked, T::counts},
      {"/v1/audio/transcriptions", post, Api::transcriptions, D::media, multipart, M::required, S::if_asked, T::counts},
      {"/audio/transcriptions", post, Api::transcriptions, D::media, multipart, M::required, S::if_asked, T::counts},
      {"/v1/audio/translations", post, Api::transcriptions, D::media, multipart, M::required, S::never, T::counts},
      {"/v1/images/edits", post, Api::images, D::media, multipart_or_json, M::optional, S::if_asked, T::counts},
      {"/completion", post, Api::llamacpp, D::llamacpp, json, M::optional, S::if_asked, T::counts},
      {"/infill", post, Api::llamacpp, D::llamacpp, json, M::optional, S::if_asked, T::counts},
      {"/embedding", post, Api::llamacpp, D::llamacpp, json, M::optional, S::never, T::nothing},
      {"/apply-template", post, Api::llamacpp, D::llamacpp, json, M::optional, S::never, T::nothing},
      {"/chat/completions", post, Api::chat, D::openai, json, M::required, S::if_asked, T::counts},
      {"/completions", post, Api::completions, D::openai, json, M::required, S::if_asked, T::counts},
      {"/embeddings", post, Api::embeddings, D::openai, json, M::required, S::never, T::counts},
      {"/responses", post, Api::responses, D::responses, json, M::required, S::if_asked, T::counts},
      {"/api/pull", post, Api::ollama, D::ollama_chat, none, M::of_admin, S::never, T::nothing},
      {"/api/push", post, Api::ollama, D::ollama_chat, none, M::of_admin, S::never, T::nothing},
      {"/api/create", post, Api::ollama, D::ollama_chat, none, M::of_admin, S::never, T::nothing},
      {"/api/copy", post, Api::ollama, D::ollama_chat, none, M::of_admin, S::never, T::nothing},
      {"/api/delete", remove, Api::ollama, D::ollama_chat, none, M::of_admin, S::never, T::nothing},
      {"/api/blobs/{id}", post, Api::ollama, D::ollama_chat, none, M::of_admin, S::never, T::nothing},
      {"/v1/responses/{id}", look_or_delete, Api::responses, D::responses, none, M::none, S::never, T::nothing},
      {"/v1/responses/{id}/cancel", post, Api::responses, D::responses, none, M::none, S::never, T::nothing},
      {"/v1/responses/{id}/input_items", look, Api::responses, D::responses, none, M::none, S::never, T::nothing},
  });
}();

static_assert(kEndpoints.size() <= kMaxEndpoints && kMaxEndpoints <= 64, "a set of endpoints is one word");

constexpr std::uint8_t index_of(const Endpoint& row) { return static_cast<std::uint8_t>(&row - kEndpoints.data()); }
constexpr std::uint64_t bit_of(const Endpoint& row) { return std::uint64_t{1} << index_of(row); }

}  // namespace nexus
