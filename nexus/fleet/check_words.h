// check_words.h
// Owns:     a health check's result in words, with what to do about it.
// Promises: the same words in the log, on the pages and from `nexus check`; empty if there is nothing to say.
// Leaves:   escaping to who shows them; what more `nexus check` finds out by further probes to apps/check.h.
// Threads:  any.
// Tested by: tests/check_test.cpp, tests/e2e/why.test.mjs
#pragma once

#include <string>
#include <string_view>

#include "nexus/config/settings.h"
#include "nexus/fleet/prober.h"

namespace nexus {

// Empty unless the url ends in the path of an endpoint: users often copy that.
inline std::string remark_on_url(const BackendSettings& backend) {
  for (const std::string_view path : {"/chat/completions", "/completions", "/embeddings", "/models"}) {
    if (!backend.base_path.ends_with(path)) continue;
    return "its url ends in " + std::string(path) + ", which Nexus adds itself: remove that";
  }
  return {};
}

inline std::string explain_check(const BackendSettings& backend, const ProbeResult& result) {
  const std::string status = " (" + std::to_string(result.status) + ")";
  if (result.status == 401 || result.status == 403) {
    if (!backend.api_key.empty()) return "it rejects the API key" + status;
    if (result.passed && !backend.models.empty())
      return "it requires an API key" + status + ": clients must send theirs";
    return "it requires an API key" + status + ": set api_key_env or api_key_file";
  }
  if (result.reason.empty()) return {};
  const std::string url = remark_on_url(backend);
  if (!url.empty()) return result.reason + "; " + url;
  const bool no_such_path = result.status == 404 || result.status == 405 || result.status == 501;
  if (no_such_path && !result.passed) {
    return result.reason + ": is type = " + std::string(name_of(backend.kind)) + " right? `nexus check` finds it out";
  }
  if (result.reason.find("Connection refused") != std::string::npos)
    return result.reason + ": is it running, and on this port?";
  return result.reason;
}

}  // namespace nexus
