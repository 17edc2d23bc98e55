// status_policy.h
// Owns:     the header fields that go with the status page: what a browser may do on it.
// Promises: nothing runs or styles it but its own script and style, known by their digests; it asks nobody but this
//           server; no other page frames it; it is never kept.
// Leaves:   the page to status_page.h. A test compares the digests with it, and says the right ones.
// Threads:  any; constants.
#pragma once

#include <string_view>

namespace nexus {

inline constexpr std::string_view kStatusFields =
    "Content-Security-Policy: default-src 'none'; "
    "script-src 'sha256-RidT0KF7hKa5x1xohvKXsC6Fk4G7XM3SGdqf7ATwlUE='; "
    "style-src 'sha256-tapObstn3kzwUXsDlSm2JKc/no1+3ZZlE31Mqql3HpQ='; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"
    "Cache-Control: no-store\r\n"
    "Referrer-Policy: no-referrer\r\n"
    "X-Content-Type-Options: nosniff\r\n";

}  // namespace nexus
