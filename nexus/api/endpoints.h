// endpoints.h
// Owns:     the table of proxied endpoints.
// Promises: a row here is all that another one takes.
// Leaves:   the rest of a request's path to builtin_pages.h, the request itself to exchange.h.
// Threads:  any.
#pragma once

#include <array>
#include <string_view>

namespace nexus {

struct Endpoint {
  std::string_view path;
  bool streams;  // `stream: true` is understood, and `stream_options` with it
};

inline constexpr std::array<Endpoint, 3> kEndpoints{{
    {"/v1/chat/completions", true},
    {"/v1/completions", true},
    {"/v1/embeddings", false},
}};

}  // namespace nexus
