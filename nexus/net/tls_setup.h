// tls_setup.h
// Owns:     making the contexts of TLS that a configuration asks for, and what is wrong with its certificates.
// Promises: all or nothing: settings with a problem are not used. Private keys leave the settings when their contexts
//           are made. The certificates that backends are trusted by are read once, however many backends share them.
// Leaves:   contexts to tls_context.h, reading the files to config/parser.h.
// Threads:  the main thread: nothing here is for a hot loop (a system's bundle takes 30 ms).
// Tested by: tests/tls_test.cpp, tests/e2e/tls.test.mjs
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/config/settings.h"
#include "nexus/config/values.h"
#include "nexus/net/tls_context.h"

namespace nexus {

struct TlsProblem {
  ConfigError error;
  bool is_date = false;  // the certificate is sound, but expired or not valid yet
};

namespace tls {

inline std::string_view key_text(const TlsCertificate& certificate) {
  return certificate.key.path.empty() ? certificate.chain.text : certificate.key.text;
}

inline void make_server(ServerSettings& server, std::int64_t now_s, std::vector<TlsProblem>& problems) {
  if (server.tls_listen.empty()) return;
  start_tls_library();
  std::vector<TlsServer::Pair> pairs;
  for (const TlsCertificate& one : server.tls_certificates) {
    pairs.push_back({one.chain.text, std::string(key_text(one))});
  }
  const int least = server.tls_min_version == TlsVersion::tls_1_3 ? TLS1_3_VERSION : TLS1_2_VERSION;
  std::string problem;
  std::size_t at = 0;
  server.tls = TlsServer::make(pairs, least, server.tls_client_ca.text, problem, at);
  if (server.tls == nullptr) {
    const bool client_ca = at == pairs.size();
    const PemFile& file = client_ca ? server.tls_client_ca : server.tls_certificates[at].chain;
    problems.push_back({{file.path, 0, problem}});
    return;
  }
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    const TlsCertificateInfo& info = server.tls->certificates()[i];
    const bool expired = info.not_after_s <= now_s;
    if (!expired && info.not_before_s <= now_s) continue;
    problem = "the certificate " + info.name +
              (expired ? " expired on " + date_text(info.not_after_s)
                       : " is not valid before " + date_text(info.not_before_s) + ": is this host's clock right?");
    problems.push_back({{server.tls_certificates[i].chain.path, 0, problem}, true});
  }
}

// Whom backends trust, by the text that names them.
using Stores = std::map<std::string_view, Store>;

inline void make_client(BackendSettings& backend, const PemFile& system_ca, Stores& stores,
                        std::vector<TlsProblem>& problems) {
  BackendTls& from = backend.tls;
  if (!from.on) return;
  start_tls_library();
  const PemFile& ca = from.ca_file.path.empty() ? system_ca : from.ca_file;
  TlsClient::Options options;
  options.host = backend.address.host;
  options.name = from.name;
  options.verify = from.verify;
  options.chain = from.certificate.chain.text;
  options.key = key_text(from.certificate);
  options.trust = std::hash<std::string_view>{}(ca.text);
  X509_STORE* store = nullptr;
  if (from.verify) {
    const auto [found, is_new] = stores.try_emplace(ca.text);
    if (is_new) found->second = make_store(ca.text);
    store = found->second.get();
    if (store == nullptr) {
      problems.push_back({{ca.path, 0, "there is no certificate in PEM form in it"}});
      return;
    }
  }
  std::string problem;
  from.context = TlsClient::make(options, store, problem);
  if (from.context == nullptr) problems.push_back({{from.certificate.chain.path, 0, problem}});
}

}  // namespace tls

// Makes the contexts of `settings`, whose PEM texts are dropped then. Returns what is wrong.
inline std::vector<TlsProblem> make_tls(Settings& settings, std::int64_t now_s) {
  std::vector<TlsProblem> problems;
  tls::make_server(settings.server, now_s, problems);
  {
    tls::Stores stores;
    for (BackendSettings& backend : settings.backends) {
      tls::make_client(backend, settings.system_ca, stores, problems);
    }
  }
  const auto drop = [](PemFile& file) { std::string().swap(file.text); };
  drop(settings.system_ca);
  drop(settings.server.tls_client_ca);
  for (TlsCertificate& one : settings.server.tls_certificates) {
    OPENSSL_cleanse(one.chain.text.data(), one.chain.text.size());
    OPENSSL_cleanse(one.key.text.data(), one.key.text.size());
    drop(one.chain);
    drop(one.key);
  }
  for (BackendSettings& backend : settings.backends) {
    drop(backend.tls.ca_file);
    drop(backend.tls.certificate.chain);
    drop(backend.tls.certificate.key);
  }
  return problems;
}

}  // namespace nexus
