// backend_kinds.h
// Owns:      the table of backend types: the names in nexus.conf, where each answers, what each understands.
// Promises:  a new type takes one value of the enum and one row here; every other file reads the table.
// Leaves:    asking a backend to prober.h; the shape of its model list, which response_json.h recognises by itself.
// Threads:   any; constant.
// Tested by: tests/config_test.cpp, tests/prober_test.cpp, tests/registry_test.cpp
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace nexus {

enum class BackendKind : std::uint8_t { ollama, vllm, llamacpp, lmstudio, openai, exo, generic, echo };

struct BackendKindRow {
  BackendKind kind;
  std::string_view name;         // `type =` in nexus.conf
  std::string_view health_path;  // if it equals models_path, one request serves both
  std::string_view models_path;
  bool takes_stream_options;  // understands stream_options.include_usage
};

inline constexpr std::array kBackendKinds{
    BackendKindRow{BackendKind::ollama, "ollama", "/api/tags", "/api/tags", true},
    BackendKindRow{BackendKind::vllm, "vllm", "/v1/models", "/v1/models", true},
    BackendKindRow{BackendKind::llamacpp, "llamacpp", "/health", "/v1/models", true},
    BackendKindRow{BackendKind::lmstudio, "lmstudio", "/v1/models", "/v1/models", true},
    BackendKindRow{BackendKind::openai, "openai", "/v1/models", "/v1/models", true},
    BackendKindRow{BackendKind::exo, "exo", "/v1/models", "/v1/models", true},
    BackendKindRow{BackendKind::generic, "generic", "/v1/models", "/v1/models", false},
    BackendKindRow{BackendKind::echo, "echo", "/v1/models", "/v1/models", true},
};

constexpr const BackendKindRow& row_of(BackendKind kind) { return kBackendKinds[static_cast<std::size_t>(kind)]; }
constexpr std::string_view name_of(BackendKind kind) { return row_of(kind).name; }

static_assert(
    [] {
      for (const BackendKindRow& row : kBackendKinds) {
        if (&row != &row_of(row.kind)) return false;
      }
      return true;
    }(),
    "the rows stand in the order of the enum");

namespace detail {

// "ollama, vllm, …": the values of `type` as the table of configuration keys lists them. Not inline: gcc's UBSan does not
// take the address of an inline variable for a constant.
constexpr auto kBackendKindList = [] {
  constexpr std::size_t kBytes = [] {
    std::size_t bytes = 0;
    for (const BackendKindRow& row : kBackendKinds) bytes += row.name.size() + 2;
    return bytes - 2;
  }();
  std::array<char, kBytes> list{};
  std::size_t used = 0;
  for (const BackendKindRow& row : kBackendKinds) {
    if (used > 0) list[used++] = ',', list[used++] = ' ';
    for (const char c : row.name) list[used++] = c;
  }
  return list;
}();

}  // namespace detail

constexpr std::string_view kBackendKindNames(detail::kBackendKindList.data(), detail::kBackendKindList.size());

}  // namespace nexus
