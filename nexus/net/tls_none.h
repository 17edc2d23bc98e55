// tls_none.h
// Owns:     the names of TLS in a build without it.
// Promises: no connection ever has a TlsStream: a configuration that asks for one is refused.
// Leaves:   TLS to a proxy on the same host.
// Threads:  any.
// Tested by: tests/e2e/packages.test.mjs
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/config/settings.h"
#include "nexus/config/values.h"
#include "nexus/net/epoll.h"
#include "nexus/net/tls_outcome.h"

namespace nexus {

inline std::string tls_library() { return "without TLS"; }

namespace tls {
inline std::string date_text(std::int64_t) { return {}; }
inline std::string library_error() { return "this build has no TLS"; }
}  // namespace tls

struct TlsCertificateInfo {
  std::string name;
  std::int64_t not_before_s = 0, not_after_s = 0;
};

class TlsServer {
 public:
  const std::vector<TlsCertificateInfo>& certificates() const { return certificates_; }

 private:
  std::vector<TlsCertificateInfo> certificates_;
};

class TlsClient {
 public:
  std::uint64_t identity() const { return 0; }
};

struct TlsWire {
  void* net;
  void* socket;
  IoResult (*read)(void* net, void* socket, char* into, std::size_t bytes);
  IoResult (*write)(void* net, void* socket, const char* from, std::size_t bytes);
};

using TlsTicket = std::unique_ptr<int>;

class TlsStream {
 public:
  static std::unique_ptr<TlsStream> accept(const std::shared_ptr<const TlsServer>&) { return nullptr; }
  static std::unique_ptr<TlsStream> connect(const std::shared_ptr<const TlsClient>&, const TlsTicket*) {
    return nullptr;
  }
  void note(const Event&) {}
  void look_again() {}
  bool read_wants_write() const { return false; }
  IoResult handshake(const TlsWire&) { return {IoResult::Kind::failed, 0, EPROTO}; }
  TlsOutcome outcome() const { return TlsOutcome::failed; }
  std::string_view why() const { return {}; }
  bool out_of_memory() const { return false; }
  bool spoke_http() const { return false; }
  std::string certificate_name() const { return {}; }
  IoResult read(const TlsWire&, char*, std::size_t) { return {IoResult::Kind::failed, 0, EPROTO}; }
  bool may_read() const { return false; }
  IoResult write(const TlsWire&, std::span<const iovec>) { return {IoResult::Kind::failed, 0, EPROTO}; }
  bool say_end(const TlsWire&) { return true; }
  TlsTicket ticket() const { return nullptr; }
};

struct TlsProblem {
  ConfigError error;
  bool is_date = false;
};

inline std::vector<TlsProblem> make_tls(Settings& settings, std::int64_t, std::string_view = {}) {
  constexpr std::string_view kNone =
      "this Nexus was built without TLS (make TLS=no): put a proxy on this host in front";
  std::vector<TlsProblem> problems;
  if (!settings.server.tls_listen.empty()) problems.push_back({{"tls_listen", 0, std::string(kNone)}});
  for (const BackendSettings& backend : settings.backends) {
    if (backend.tls.on) problems.push_back({{"[backend " + backend.name + "]", 0, std::string(kNone)}});
  }
  return problems;
}

struct DemoCertificate {
  std::string pem, fingerprint;
};

inline std::optional<DemoCertificate> make_demo_certificate() { return std::nullopt; }

}  // namespace nexus
