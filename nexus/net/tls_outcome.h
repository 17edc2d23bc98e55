// tls_outcome.h
// Owns:     how TLS handshakes end, by side; the texts of TLS that do not depend on the library.
// Promises: plain values, so that counters can name them without the library.
// Leaves:   handshakes to tls_stream.h, counting to metrics/slab.h.
// Threads:  any; constants.
// Tested by: tests/tls_test.cpp
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace nexus {

enum class TlsSide : std::uint8_t { client, backend };  // the peer
inline constexpr std::array<std::string_view, 2> kTlsSideNames{"client", "backend"};

enum class TlsOutcome : std::uint8_t {
  full,
  resumed,      // with the keys of an earlier connection
  closed,       // the peer closed or reset the connection, or did not speak TLS
  timeout,      // header_timeout or connect_timeout passed
  certificate,  // one side did not accept the other's certificate
  failed,       // anything else: no common version, cipher or protocol; a broken message; no memory
};
inline constexpr std::array<std::string_view, 6> kTlsOutcomeNames{"full",    "resumed",     "closed",
                                                                  "timeout", "certificate", "failed"};
inline constexpr std::size_t kTlsOutcomes = kTlsOutcomeNames.size();

}  // namespace nexus
