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

// An error at the line of nexus.conf that names the file. `key`: in nexus.conf.
inline ConfigError error_in(std::string_view conf, std::string_view key, const PemFile& file,
                            std::string_view problem) {
  if (file.line == 0) return {file.path, 0, std::string(problem)};  // it is the host's own
  return {std::string(conf), file.line, std::string(key) + ": " + file.path + ": " + std::string(problem)};
}

inline ConfigError error_in(std::string_view conf, const TlsCertificate& one, const Unfit& problem) {
  const bool own_file = !one.key.path.empty();
  std::string text = problem.text;
  if (text == kNoPrivateKey) {
    const bool other = own_file && one.key.text.find("BEGIN CERTIFICATE") != std::string::npos;
    text += own_file ? (other ? ", but a certificate" : "") : "; a key in another file is set with tls_key";
  }
  return problem.of_key && own_file ? error_in(conf, "tls_key", one.key, text)
                                    : error_in(conf, "tls_certificate", one.chain, text);
}

inline std::string_view key_text(const TlsCertificate& certificate) {
  return certificate.key.path.empty() ? certificate.chain.text : certificate.key.text;
}

inline void make_server(ServerSettings& server, std::int64_t now_s, std::string_view conf,
                        std::vector<TlsProblem>& problems) {
  if (server.tls_listen.empty()) return;
  start_tls_library();
  std::vector<TlsServer::Pair> pairs;
  for (const TlsCertificate& one : server.tls_certificates) {
    pairs.push_back({one.chain.text, std::string(key_text(one))});
  }
  const int least = server.tls_min_version == TlsVersion::tls_1_3 ? TLS1_3_VERSION : TLS1_2_VERSION;
  Unfit problem;
  std::size_t at = 0;
  server.tls = TlsServer::make(pairs, least, server.tls_client_ca.text, problem, at);
  if (server.tls == nullptr) {
    const bool client_ca = at == pairs.size();
    problems.push_back({client_ca ? error_in(conf, "tls_client_ca", server.tls_client_ca, problem.text)
                                  : error_in(conf, server.tls_certificates[at], problem)});
    return;
  }
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    const TlsCertificateInfo& info = server.tls->certificates()[i];
    const bool expired = info.not_after_s <= now_s;
    if (!expired && info.not_before_s <= now_s) continue;
    problem = {"the certificate " + info.name +
               (expired ? " expired on " + date_text(info.not_after_s)
                        : " is not valid before " + date_text(info.not_before_s) + ": is this host's clock right?")};
    problems.push_back({error_in(conf, server.tls_certificates[i], problem), true});
  }
}

// Whom backends trust, by the text that names them.
using Stores = std::map<std::string_view, Store>;

inline void make_client(BackendSettings& backend, const PemFile& system_ca, Stores& stores, std::string_view conf,
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
      problems.push_back({error_in(conf, "tls_ca", ca, "there is no certificate in PEM form in it")});
      return;
    }
  }
  Unfit problem;
  from.context = TlsClient::make(options, store, problem);
  if (from.context == nullptr) problems.push_back({error_in(conf, from.certificate, problem)});
}

}  // namespace tls

// Makes the contexts of `settings`, whose PEM texts are dropped then. Returns what is wrong; `conf`: the file that the
// settings are from.
inline std::vector<TlsProblem> make_tls(Settings& settings, std::int64_t now_s, std::string_view conf = "nexus.conf") {
  std::vector<TlsProblem> problems;
  tls::make_server(settings.server, now_s, conf, problems);
  {
    tls::Stores stores;
    for (BackendSettings& backend : settings.backends) {
      tls::make_client(backend, settings.system_ca, stores, conf, problems);
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
