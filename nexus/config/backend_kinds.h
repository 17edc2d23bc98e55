// backend_kinds.h
// Owns:      the table of backend types: the names in nexus.conf, where each answers, what each understands.
// Promises:  a new type takes one value of the enum and one row and one name here; all else reads the table.
// Leaves:    asking a backend to prober.h; the shape of its model list, which response_json.h recognises by itself.
// Threads:   any; constant.
// Tested by: tests/config_test.cpp, tests/prober_test.cpp, tests/registry_test.cpp
#pragma once

#include <algorithm>
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

// The names of the rows, in their order: keys.h checks them.
constexpr std::string_view kBackendKindNames = "ollama, vllm, llamacpp, lmstudio, openai, exo, generic, echo";

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

static_assert(std::all_of(kBackendKinds.begin(), kBackendKinds.end(),
                          [](const BackendKindRow& row) { return &row == &row_of(row.kind); }),
              "the rows are in the order of the enum");

}  // namespace nexus
