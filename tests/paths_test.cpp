// paths_test.cpp
// Goal:   the paths that Nexus serves on each listener, and the one that an answer names for a path that it does not.
// Method: rows.
#include "nexus/server/paths.h"

#include <doctest/doctest.h>

using nexus::Listens;
using nexus::PageKind;

TEST_CASE("a path is served where it belongs") {
  struct Row {
    const char* path;
    PageKind for_all, for_clients, for_operators;
  };
  const PageKind none = PageKind::none;
  const Row rows[] = {
      {"/", PageKind::status, none, PageKind::status},
      {"/metrics", PageKind::metrics, none, PageKind::metrics},
      {"/v1/models", PageKind::models, PageKind::models, none},
      {"/v1/models/", none, none, none},
      {"/v1/models/a/b", PageKind::model, PageKind::model, none},
      {"/v1/chat/completions", PageKind::endpoint, PageKind::endpoint, none},
      {"/v1/chat/completions/", none, none, none},
      {"//v1/chat/completions", none, none, none},
      {"/v1/%63hat/completions", none, none, none},
      {"*", PageKind::server, PageKind::server, PageKind::server},
  };
  for (const Row& row : rows) {
    CAPTURE(row.path);
    CHECK(page_of(row.path, Listens::for_all) == row.for_all);
    CHECK(page_of(row.path, Listens::for_clients) == row.for_clients);
    CHECK(page_of(row.path, Listens::for_operators) == row.for_operators);
  }
}

TEST_CASE("the path that was probably meant is found, and never one that this listener does not serve") {
  struct Row {
    const char* path;
    const char* nearest;
  };
  const Row rows[] = {
      {"//v1/chat/completions", "/v1/chat/completions"},
      {"/v1/v1/chat/completions", "/v1/chat/completions"},
      {"/chat/completions", "/v1/chat/completions"},
      {"/openai/v1/chat/completions", "/v1/chat/completions"},
      {"/v1/chat/completions/", "/v1/chat/completions"},
      {"/v1/chat", "/v1/chat/completions"},
      {"/v1/chat/completion", "/v1/chat/completions"},
      {"/v1/chat%2Fcompletions", "/v1/chat/completions"},
      {"/V1/models", "/v1/models"},
      {"/models", "/v1/models"},
      {"/v1/models/", "/v1/models"},
      {"/v1/embedding", "/v1/embeddings"},
      {"/completions", "/v1/completions"},
      {"/healthz", "/health"},
      {"/metric", "/metrics"},
      {"/favicon.ico", ""},
      {"/wp-login.php", ""},
      {"/v2/audio/transcriptions/speech", "/v1/audio/transcriptions"},
      {"/v2/images/of/nothing", ""},
      {"//", ""},
  };
  for (const Row& row : rows) {
    CAPTURE(row.path);
    CHECK(nearest_path(row.path, Listens::for_all) == row.nearest);
  }
  CHECK(nearest_path("/metric", Listens::for_clients).empty());
  CHECK(nearest_path("/chat/completions", Listens::for_operators).empty());
  CHECK(nearest_path(std::string(100'000, '/'), Listens::for_all).empty());
  CHECK(nearest_path("/" + std::string(100'000, 'x'), Listens::for_all).empty());
}
