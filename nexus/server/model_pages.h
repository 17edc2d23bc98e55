// model_pages.h
// Owns:     the lists of models that clients ask for, in the shape of each API, and a model's own entry.
// Promises: each model and alias that a healthy backend serves is listed once, sorted by its id; JSON is valid whatever
//           a name holds; a list is made once for each snapshot.
// Leaves:   the entries to api/model_list.h, sending to builtin_pages.h.
// Threads:  complete(): control's. The others: any.
// Tested by: tests/worker_test.cpp, tests/e2e/endpoints.test.mjs
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/api/model_list.h"
#include "nexus/base/text.h"
#include "nexus/base/text_buffer.h"
#include "nexus/fleet/registry.h"
#include "nexus/proxy/candidate_picker.h"
#include "nexus/server/paths.h"

namespace nexus {

// The offer that shows a model in the list; null if the list does not have it.
inline const Offer* listed_offer(const Snapshot& snapshot, const ModelEntry& entry) {
  const Offer* offer = snapshot.preferred_offer(entry);
  return offer != nullptr && offer->implied && !entry.is_alias() ? nullptr : offer;
}

// A model under one of its names, in the shape of a list.
inline void append_model(std::string& out, ModelListKind kind, std::string_view name, const Offer& offer,
                         const Snapshot& snapshot) {
  switch (kind) {
    case ModelListKind::openai:
      return append_openai_model(out, name, offer.listed, snapshot.backends[offer.backend].name);
    case ModelListKind::anthropic: return append_anthropic_model(out, name);
    case ModelListKind::ollama: return append_ollama_model(out, name, offer.listed);
  }
}

// GET /v1/models, as OpenAI's or Anthropic's clients read it, and /api/tags: each model and alias that a healthy
// backend serves, by id, once.
inline std::string render_models(const Snapshot& snapshot, ModelListKind kind, const ApiKey* key = nullptr) {
  std::vector<std::pair<std::string_view, const Offer*>> rows;
  for (const auto& [name, entry] : snapshot.models) {
    if (key != nullptr && !key->may_use(name)) continue;
    if (const Offer* offer = listed_offer(snapshot, entry)) rows.emplace_back(name, offer);
  }
  std::sort(rows.begin(), rows.end());
  std::string out = kind == ModelListKind::openai   ? R"({"object":"list","data":[)"
                    : kind == ModelListKind::ollama ? R"({"models":[)"
                                                    : R"({"data":[)";
  for (const auto& [model, offer] : rows) {
    if (model != rows.front().first) out += ',';
    append_model(out, kind, model, *offer, snapshot);
  }
  out += ']';
  if (kind == ModelListKind::anthropic) {
    const auto id = [&](bool last) {
      return rows.empty() ? "null" : json_string(last ? rows.back().first : rows.front().first);
    };
    out.append(R"(,"has_more":false,"first_id":)").append(id(false)).append(R"(,"last_id":)").append(id(true));
  }
  return out += '}';
}

// Adds to a new snapshot what is made of all its models.
inline void complete(Snapshot& snapshot) {
  for (std::size_t kind = 0; kind < kModelListKinds; ++kind) {
    auto page = std::make_shared<TextBuffer>();
    page->add(render_models(snapshot, static_cast<ModelListKind>(kind)));
    snapshot.model_pages[kind] = std::move(page);
  }
  snapshot.available_names = list_available(snapshot);
}

// Decodes the percent-escapes of a path (RFC 3986 2.1); the head parser has checked that they are complete.
inline std::string unescape_path(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size()) {
      out += static_cast<char>(hex_value(text[i + 1]) * 16 + hex_value(text[i + 2]));
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

// GET /v1/models/{id}: the model's entry in the list, also under a name that the list does not have. False if there is
// none.
inline bool render_model(std::string& out, const Snapshot& snapshot, std::string_view path, ModelListKind kind,
                         const ApiKey* key) {
  const std::string id = unescape_path(path.substr(kModelPrefix.size()));
  const ModelEntry* entry = key != nullptr && !key->may_use(id) ? nullptr : snapshot.find(id);
  const Offer* offer = entry == nullptr ? nullptr : snapshot.preferred_offer(*entry);
  if (offer == nullptr) return false;
  append_model(out, kind, id, *offer, snapshot);
  return true;
}

}  // namespace nexus
