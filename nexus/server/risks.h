// risks.h
// Owns:     the warnings about a configuration that is valid, but has a risk its owner may not know of.
// Promises: one line for each, at the start and at each reload; no line holds a key.
// Leaves:   errors to config/parser.h, when to look for certificates that expire to daemon.h.
// Threads:  the main thread.
// Tested by: tests/e2e/why.test.mjs, tests/e2e/reload_keys.test.mjs, tests/e2e/tls.test.mjs
#pragma once

#include <cstdint>
#include <string>

#include "nexus/config/key_file.h"
#include "nexus/config/settings.h"
#include "nexus/metrics/labels.h"
#include "nexus/net/tls.h"
#include "nexus/os/log.h"

namespace nexus {

inline void warn_of_expiry(Log& log, const TlsServer& tls, Ns wall) {
  for (const TlsCertificateInfo& one : tls.certificates()) {
    const std::int64_t left_s = one.not_after_s - wall / kSecond;
    if (left_s > kExpiryWarning / kSecond) continue;
    log.event(LogLevel::warning,
              left_s > 0 ? "a certificate of the listeners expires soon: replace it and reload"
                         : "a certificate of the listeners has expired: replace it and reload",
              {{"certificate", one.name}, {"expires", tls::date_text(one.not_after_s)}});
  }
}

inline void warn_of_risks(Log& log, const Settings& settings) {
  for (const BackendSettings& backend : settings.backends) {
    if (!backend.tls.on || backend.tls.verify) continue;
    log.event(LogLevel::warning, "the backend's certificate is not verified (tls_verify = no): it may be anyone's",
              {{"backend", backend.name}});
  }
  for (const std::string& path : config::open_key_files(settings)) {
    log.event(LogLevel::warning, "a file with keys can be read by every user of this host: chmod o-r",
              {{"file", path}});
  }
  for (const std::string& names : backends_with_one_label(settings)) {
    log.event(LogLevel::warning, kOneLabel, {{"backends", names}});
  }
}

}  // namespace nexus
