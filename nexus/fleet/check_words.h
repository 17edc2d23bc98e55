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

constexpr bool is_no_such_path(std::uint16_t status) { return status == 404 || status == 405 || status == 501; }

// Appended to the reason of a check that failed before any answer of HTTP, or with one that a server of TLS gives to a
// request in clear: Go and nginx answer 400, others close the connection.
inline std::string_view hint_on_scheme(const BackendSettings& backend, const ProbeResult& result) {
  if (result.passed) return {};
  const std::string_view why = result.reason;
  if (backend.tls.on)
    return why.ends_with("it does not speak TLS on this port") ? ": use http:// if that is meant" : "";
  const bool closed = why == kAnswerCutShort || why == "read: Connection reset by peer";
  return result.status == 400 || (closed && result.status == 0) ? ": if it speaks TLS on this port, use https://" : "";
}

// True for all but `nexus check`, which finds out more than one check tells.
enum class FirstLook : bool { no, yes };

inline std::string explain_check(const BackendSettings& backend, const ProbeResult& result,
                                 FirstLook first = FirstLook::yes) {
  const std::string status = " (" + std::to_string(result.status) + ")";
  if (result.status == 401 || result.status == 403) {
    if (!backend.api_key.empty()) return "it rejects the API key" + status;
    if (result.passed && !backend.models.empty())
      return "it requires an API key" + status + ": clients must send theirs";
    return "it requires an API key" + status + ": set api_key_env or api_key_file";
  }
  if (result.status == 508 && !result.passed) {
    return "routing loop" + status + ": its url leads back to this Nexus";
  }
  if (result.reason.empty()) return {};
  const std::string url = remark_on_url(backend);
  if (!url.empty() && first == FirstLook::yes) return result.reason + "; " + url;
  if (is_no_such_path(result.status) && !result.passed && first == FirstLook::yes) {
    return result.reason + ": is type = " + std::string(name_of(backend.kind)) + " right? `nexus check` finds it out";
  }
  if (result.reason.find("Connection refused") != std::string::npos)
    return result.reason + ": is it running, and on this port?";
  return result.reason + std::string(hint_on_scheme(backend, result));
}

}  // namespace nexus
