// tls_context.h
// Owns:     the contexts of OpenSSL, made of PEM texts: one for the listeners (its certificates chosen by SNI), one for
//           each backend (whom it trusts, which name it expects); what is wrong with a certificate, in words.
// Promises: immutable once made, and shared by all threads; TLS 1.2 or later, forward secrecy, no renegotiation, no
//           compression, no early data; a backend is verified, chain and name, unless the configuration says no.
//           openssl.cnf is never read: a provider in it would load a module into a static binary, which crashes.
// Leaves:   connections to tls_stream.h; reading files to config/keys.h; which context a backend gets to tls_setup.h.
// Threads:  made by the main thread; used by any.
// Tested by: tests/tls_test.cpp, tests/e2e/tls.test.mjs
#pragma once

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/base/clock.h"
#include "nexus/base/text.h"
#include "nexus/net/tls_bio.h"

namespace nexus {

// The library by name and version, as nexus --version prints it.
inline std::string tls_library() { return OpenSSL_version(OPENSSL_VERSION); }

// Call before anything else of TLS; a second call does nothing. It takes 2 ms, which a Nexus without TLS need not
// spend.
inline void start_tls_library() { OPENSSL_init_ssl(OPENSSL_INIT_NO_LOAD_CONFIG | OPENSSL_INIT_NO_ATEXIT, nullptr); }

namespace tls {

template <class T, void (*Free)(T*)>
struct Freed {
  void operator()(T* object) const { Free(object); }
};
template <class T, void (*Free)(T*)>
using Owned = std::unique_ptr<T, Freed<T, Free>>;
using Context = Owned<SSL_CTX, SSL_CTX_free>;
using Certificate = Owned<X509, X509_free>;
using Key = Owned<EVP_PKEY, EVP_PKEY_free>;
using Store = Owned<X509_STORE, X509_STORE_free>;
inline void free_all(BIO* bio) { BIO_free_all(bio); }
using Text = Owned<BIO, free_all>;
inline void free_names(GENERAL_NAMES* names) { GENERAL_NAMES_free(names); }
using Names = Owned<GENERAL_NAMES, free_names>;

inline Text reader(std::string_view pem) { return Text(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size()))); }

// The certificates of a PEM text, in its order; other things in it are skipped.
inline std::vector<Certificate> read_certificates(std::string_view pem) {
  std::vector<Certificate> all;
  const Text text = reader(pem);
  while (X509* one = text ? PEM_read_bio_X509(text.get(), nullptr, nullptr, nullptr) : nullptr) all.emplace_back(one);
  ERR_clear_error();
  return all;
}

inline std::string one_line(const X509_NAME* name) {
  const Text text(BIO_new(BIO_s_mem()));
  if (!text || X509_NAME_print_ex(text.get(), name, 0, XN_FLAG_RFC2253 & ~ASN1_STRFLGS_ESC_MSB) < 0) return "?";
  char* data = nullptr;
  const long bytes = BIO_get_mem_data(text.get(), &data);
  return {data, static_cast<std::size_t>(std::max(bytes, 0L))};
}

// The text of an address in a certificate (RFC 5280 4.2.1.6: 4 or 16 bytes).
inline std::string address_of(const ASN1_OCTET_STRING& ip) {
  const unsigned char* at = ASN1_STRING_get0_data(&ip);
  std::string text;
  if (ASN1_STRING_length(&ip) == 4) {
    for (int i = 0; i < 4; ++i) text.append(i == 0 ? "" : ".").append(std::to_string(at[i]));
    return text;
  }
  for (int i = 0; i + 1 < ASN1_STRING_length(&ip); i += 2) {
    char group[8];
    std::snprintf(group, sizeof group, "%s%x", i == 0 ? "" : ":", static_cast<unsigned>(at[i] << 8 | at[i + 1]));
    text += group;
  }
  return text;
}

inline std::string common_name(const X509& certificate) {
  const X509_NAME* subject = X509_get_subject_name(&certificate);
  const int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
  if (at < 0) return {};
  const ASN1_STRING* value = X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at));
  return {reinterpret_cast<const char*>(ASN1_STRING_get0_data(value)),
          static_cast<std::size_t>(ASN1_STRING_length(value))};
}

// Its DNS names and addresses; without any, its common name.
inline std::vector<std::string> names_of(const X509& certificate) {
  std::vector<std::string> all;
  const Names names(
      static_cast<GENERAL_NAMES*>(X509_get_ext_d2i(&certificate, NID_subject_alt_name, nullptr, nullptr)));
  for (int i = 0; names && i < sk_GENERAL_NAME_num(names.get()); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names.get(), i);
    if (name->type == GEN_IPADD) all.push_back(address_of(*name->d.iPAddress));
    if (name->type != GEN_DNS) continue;
    const ASN1_STRING& dns = *name->d.dNSName;
    all.emplace_back(reinterpret_cast<const char*>(ASN1_STRING_get0_data(&dns)),
                     static_cast<std::size_t>(ASN1_STRING_length(&dns)));
  }
  if (all.empty()) all.push_back(common_name(certificate));
  ERR_clear_error();
  return all;
}

// A time of a certificate in seconds since 1970.
inline std::int64_t seconds_of(const ASN1_TIME* time) {
  tm parts{};
  return ASN1_TIME_to_tm(time, &parts) == 1 ? static_cast<std::int64_t>(timegm(&parts)) : 0;
}

// `2026-11-25 13:00 UTC`.
inline std::string date_text(std::int64_t seconds) {
  const time_t time = seconds;
  tm parts{};
  char text[32] = "";
  gmtime_r(&time, &parts);
  strftime(text, sizeof text, "%Y-%m-%d %H:%M UTC", &parts);
  return text;
}

inline std::string joined_names(const std::vector<std::string>& names) {
  constexpr std::size_t kMost = 5;
  std::string text;
  for (std::size_t i = 0; i < std::min(names.size(), kMost); ++i) text += (i == 0 ? "" : ", ") + names[i];
  return names.size() > kMost ? text + ", …" : text;
}

// The newest error of the library on this thread, in its own words; clears them all.
inline std::string library_error() {
  const unsigned long code = ERR_peek_last_error();
  const char* reason = ERR_reason_error_string(code);
  ERR_clear_error();
  return reason == nullptr ? "unknown error" : reason;
}

// Says in words why `certificate` is refused, by the error of its verification (X509_STORE_CTX_get_error(3)).
[[gnu::cold]] inline std::string verify_problem(int error, const X509* certificate, std::string_view expected_name) {
  if (certificate == nullptr) return X509_verify_cert_error_string(error);
  const std::string issuer = one_line(X509_get_issuer_name(certificate));
  switch (error) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
      return "its certificate " + one_line(X509_get_subject_name(certificate)) + " expired on " +
             date_text(seconds_of(X509_get0_notAfter(certificate)));
    case X509_V_ERR_CERT_NOT_YET_VALID:
      return "its certificate is not valid before " + date_text(seconds_of(X509_get0_notBefore(certificate))) +
             ": is this host's clock right?";
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH:
      return "its certificate is for " + joined_names(names_of(*certificate)) + ", not for " +
             std::string(expected_name) + ": set tls_name to the name in it";
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
      return "its certificate is self-signed: put it into a file and set tls_ca to that";
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
      return "the issuer of its certificate is unknown: " + issuer + "; set tls_ca to a file with the issuer's";
    default: return std::string("its certificate is not accepted: ") + X509_verify_cert_error_string(error);
  }
}

// ---- what both sides have in common ----

inline constexpr std::array<unsigned char, 9> kHttp11{8, 'h', 't', 't', 'p', '/', '1', '.', '1'};

inline bool configure(SSL_CTX* context, int min_version) {
  SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_CIPHER_SERVER_PREFERENCE);
  SSL_CTX_clear_options(context, SSL_OP_IGNORE_UNEXPECTED_EOF);  // a truncated response must not look whole
  SSL_CTX_set_mode(context,
                   SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_read_ahead(context, 1);
  return SSL_CTX_set_min_proto_version(context, min_version) == 1 &&
         SSL_CTX_set_cipher_list(context, "ECDHE+AESGCM:ECDHE+CHACHA20") == 1;
}

constexpr const char* kNoPrivateKey = "there is no private key in PEM form in it";

// Empty: there is none.
struct Unfit {
  std::string text;
  bool of_key = false;  // it concerns the private key, not the certificate
  bool empty() const { return text.empty(); }
};

// Gives `context` the certificate, its chain and its key. Returns the problem, if there is one.
inline Unfit use_certificate(SSL_CTX* context, std::string_view chain_pem, std::string_view key_pem) {
  const std::vector<Certificate> chain = read_certificates(chain_pem);
  if (chain.empty()) return {"there is no certificate in PEM form in it"};
  if (SSL_CTX_use_certificate(context, chain[0].get()) != 1)
    return {"its certificate is not usable: " + library_error()};
  for (std::size_t i = 1; i < chain.size(); ++i) {
    if (SSL_CTX_add1_chain_cert(context, chain[i].get()) != 1) return {"its chain is not usable: " + library_error()};
  }
  const Text text = reader(key_pem);
  pem_password_cb* const no_password = [](char*, int, int, void*) { return 0; };
  const Key key(text ? PEM_read_bio_PrivateKey(text.get(), nullptr, no_password, nullptr) : nullptr);
  if (!key) {
    const bool encrypted = key_pem.find("ENCRYPTED") != std::string_view::npos;
    ERR_clear_error();
    return {encrypted ? "its private key has a password: Nexus needs one without (openssl pkey)" : kNoPrivateKey, true};
  }
  if (SSL_CTX_use_PrivateKey(context, key.get()) != 1 || SSL_CTX_check_private_key(context) != 1) {
    ERR_clear_error();
    return {"certificate and private key do not belong together", true};
  }
  return {};
}

// The store with the certificates of `pem`; null if there are none.
inline Store make_store(std::string_view pem) {
  Store store(X509_STORE_new());
  std::size_t added = 0;
  for (const Certificate& one : read_certificates(pem)) added += X509_STORE_add_cert(store.get(), one.get()) == 1;
  X509_STORE_set_flags(store.get(), X509_V_FLAG_PARTIAL_CHAIN);  // a certificate in the file is trusted by itself
  ERR_clear_error();
  return added > 0 ? std::move(store) : nullptr;
}

}  // namespace tls

// A certificate of the listeners, for the metrics and the log.
struct TlsCertificateInfo {
  std::string name;  // its first
  std::int64_t not_before_s = 0, not_after_s = 0;
};

// ---- towards clients ----

class TlsServer {
 public:
  struct Pair {
    std::string chain, key;  // PEM
  };

  // `min_version`: as TLS1_2_VERSION. `client_ca` empty: clients need no certificate. Null, with `problem` and the
  // index of the pair at fault, if something is unfit; one behind the last pair: client_ca.
  static std::shared_ptr<const TlsServer> make(const std::vector<Pair>& pairs, int min_version,
                                               std::string_view client_ca, tls::Unfit& problem, std::size_t& at) {
    auto server = std::make_shared<TlsServer>();
    for (at = 0; at < pairs.size(); ++at) {
      problem = server->add(pairs[at], min_version);
      if (!problem.empty()) return nullptr;
    }
    if (!client_ca.empty() && !(server->asks_for_certificate_ = server->ask_for(client_ca))) {
      problem = {"there is no certificate in PEM form in it"};
      return nullptr;
    }
    return server;
  }

  SSL_CTX* context() const { return contexts_.front().get(); }
  const BIO_METHOD* bio_method() const { return bio_method_.get(); }
  const std::vector<TlsCertificateInfo>& certificates() const { return certificates_; }
  bool asks_for_certificate() const { return asks_for_certificate_; }

 private:
  tls::Unfit add(const Pair& pair, int min_version) {
    tls::Context context(SSL_CTX_new(TLS_server_method()));
    if (!context || !tls::configure(context.get(), min_version)) return {"out of memory"};
    if (tls::Unfit problem = tls::use_certificate(context.get(), pair.chain, pair.key); !problem.empty())
      return problem;
    SSL_CTX_set_session_cache_mode(context.get(), SSL_SESS_CACHE_OFF);  // tickets alone: nothing is kept here
    SSL_CTX_set_num_tickets(context.get(), 1);  // a client that makes several connections gets one with each
    constexpr unsigned char kId[] = "nexus";
    SSL_CTX_set_session_id_context(context.get(), kId, sizeof kId);
    SSL_CTX_set_alpn_select_cb(context.get(), choose_protocol, nullptr);
    SSL_CTX_set_tlsext_servername_callback(context.get(), choose_certificate);
    SSL_CTX_set_tlsext_servername_arg(context.get(), this);
    const X509& leaf = *SSL_CTX_get0_certificate(context.get());
    const std::vector<std::string> names = tls::names_of(leaf);
    for (std::string name : names) {
      std::transform(name.begin(), name.end(), name.begin(), to_lower);
      by_name_.emplace(std::move(name), context.get());  // the first of a name counts
    }
    certificates_.push_back(
        {names.front(), tls::seconds_of(X509_get0_notBefore(&leaf)), tls::seconds_of(X509_get0_notAfter(&leaf))});
    contexts_.push_back(std::move(context));
    return {};
  }

  bool ask_for(std::string_view ca) {
    const tls::Store store = tls::make_store(ca);
    if (!store) return false;
    for (const tls::Context& context : contexts_) {
      SSL_CTX_set1_cert_store(context.get(), store.get());
      for (const tls::Certificate& one : tls::read_certificates(ca)) SSL_CTX_add_client_CA(context.get(), one.get());
      SSL_CTX_set_verify(context.get(), SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
    }
    return true;
  }

  // RFC 7301 3.2: a client that offers other protocols alone is refused.
  static int choose_protocol(SSL*, const unsigned char** chosen, unsigned char* bytes, const unsigned char* offered,
                             unsigned offered_bytes, void*) {
    unsigned char* found = nullptr;
    const int result =
        SSL_select_next_proto(&found, bytes, tls::kHttp11.data(), tls::kHttp11.size(), offered, offered_bytes);
    *chosen = found;
    return result == OPENSSL_NPN_NEGOTIATED ? SSL_TLSEXT_ERR_OK : SSL_TLSEXT_ERR_ALERT_FATAL;
  }

  // By the name that the client asks for (RFC 6066 3): exact, else with its first label as `*`, else the first.
  static int choose_certificate(SSL* connection, int*, void* self) {
    const char* asked = SSL_get_servername(connection, TLSEXT_NAMETYPE_host_name);
    if (asked == nullptr) return SSL_TLSEXT_ERR_NOACK;
    std::string name = asked;
    std::transform(name.begin(), name.end(), name.begin(), to_lower);
    const auto& by_name = static_cast<const TlsServer*>(self)->by_name_;
    auto found = by_name.find(name);
    const std::size_t dot = name.find('.');
    if (found == by_name.end() && dot != std::string::npos) found = by_name.find("*" + name.substr(dot));
    if (found == by_name.end()) return SSL_TLSEXT_ERR_NOACK;
    SSL_set_SSL_CTX(connection, found->second);
    return SSL_TLSEXT_ERR_OK;
  }

  std::unique_ptr<BIO_METHOD, FreeBioMethod> bio_method_ = make_bio_method();
  std::vector<tls::Context> contexts_;  // one a certificate; the first is the default
  std::map<std::string, SSL_CTX*, std::less<>> by_name_;
  std::vector<TlsCertificateInfo> certificates_;
  bool asks_for_certificate_ = false;
};

// ---- towards a backend ----

class TlsClient {
 public:
  struct Options {
    std::string host;  // of the url: a name or an address
    std::string name;  // expected in the certificate instead, and asked for; empty: host
    bool verify = true;
    std::string chain, key;   // PEM, for backends that ask for a certificate; empty: none
    std::uint64_t trust = 0;  // a hash of the certificates that are trusted
  };

  // `store`: whom it trusts; not used without verify. Null with `problem` if something is unfit.
  static std::shared_ptr<const TlsClient> make(const Options& options, X509_STORE* store, tls::Unfit& problem) {
    auto client = std::make_shared<TlsClient>();
    client->context_.reset(SSL_CTX_new(TLS_client_method()));
    SSL_CTX* const context = client->context_.get();
    if (context == nullptr || !tls::configure(context, TLS1_2_VERSION)) {
      problem = {"out of memory"};
      return nullptr;
    }
    if (!options.chain.empty()) problem = tls::use_certificate(context, options.chain, options.key);
    if (!problem.empty()) return nullptr;
    client->name_ = options.name.empty() ? options.host : options.name;
    while (client->name_.ends_with('.')) client->name_.pop_back();
    SSL_CTX_set_alpn_protos(context, tls::kHttp11.data(), tls::kHttp11.size());
    X509_VERIFY_PARAM* const expected = SSL_CTX_get0_param(context);
    client->is_address_ = X509_VERIFY_PARAM_set1_ip_asc(expected, client->name_.c_str()) == 1;
    if (!client->is_address_) X509_VERIFY_PARAM_set1_host(expected, client->name_.c_str(), client->name_.size());
    X509_VERIFY_PARAM_set_hostflags(expected, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    ERR_clear_error();
    client->verifies_ = options.verify;
    if (options.verify) SSL_CTX_set1_cert_store(context, store);
    client->identity_ = std::hash<std::string>{}(client->name_ + '\n' + options.chain + '\n' + options.key) ^
                        (options.verify ? options.trust : 1);
    return client;
  }

  SSL_CTX* context() const { return context_.get(); }
  const BIO_METHOD* bio_method() const { return bio_method_.get(); }
  const std::string& name() const { return name_; }
  bool is_address() const { return is_address_; }  // RFC 6066 3: then no name is sent
  bool verifies() const { return verifies_; }
  // Equal if a connection made with the one may be used in place of one made with the other.
  std::uint64_t identity() const { return identity_; }

 private:
  std::unique_ptr<BIO_METHOD, FreeBioMethod> bio_method_ = make_bio_method();
  tls::Context context_;
  std::string name_;
  bool is_address_ = false;
  bool verifies_ = true;
  std::uint64_t identity_ = 0;
};

}  // namespace nexus
