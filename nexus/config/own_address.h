// own_address.h
// Owns:     which addresses lead to the same listening socket: of two listeners, and of a backend's url and a listener.
// Promises: by the text of nexus.conf alone; an address of this host that a wildcard stands for is not known here.
// Leaves:   the addresses of this host to apps/check.h; a loop while Nexus runs to server/builtin_pages.h.
// Threads:  any.
// Tested by: tests/config_test.cpp
#pragma once

#include <string>
#include <string_view>

#include "nexus/config/settings.h"

namespace nexus::config {

constexpr std::string_view kEveryV4 = "0.0.0.0", kEveryV6 = "::";

// True if a socket that listens on `where` takes connections to the numeric address `host`, both as values.h reads
// them. `local`: that address is one of this host.
inline bool covers(std::string_view where, std::string_view host, bool local) {
  const bool v6 = host.find(':') != std::string_view::npos;
  return where == host || (local && where == (v6 ? kEveryV6 : kEveryV4));
}

// True if both sockets cannot listen at once.
inline bool overlap(const HostPort& a, const HostPort& b) {
  return a.port == b.port && (covers(a.host, b.host, true) || covers(b.host, a.host, true));
}

// True if a connection to the host and port of a url surely reaches the listener. The kernel takes a wildcard in
// connect(2) for loopback.
inline bool leads_to(const HostPort& url, const HostPort& listener) {
  std::string_view host = url.host;
  if (host == "localhost" || host == kEveryV4) host = "127.0.0.1";
  if (host == kEveryV6) host = "::1";
  const bool v6 = host.find(':') != std::string_view::npos;
  const bool loopback =
      v6 ? host == "::1" : host.starts_with("127.") && host.find_first_not_of("0123456789.") > host.size();
  return listener.port != 0 && url.port == listener.port && covers(listener.host, host, loopback);
}

}  // namespace nexus::config
