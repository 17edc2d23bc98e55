// tls_demo.h
// Owns:     the certificate of the demonstration: made when it starts, signed by itself, for this host alone.
// Promises: the key is never written to a file; valid for a year; ECDSA P-256.
// Leaves:   serving with it to the daemon. Nobody but a newcomer who tries should trust it.
// Threads:  the main thread.
// Tested by: tests/tls_test.cpp, tests/e2e/cli.test.mjs
#pragma once

#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/x509v3.h>

#include <optional>
#include <string>

#include "nexus/net/tls_context.h"

namespace nexus {

struct DemoCertificate {
  std::string pem;          // the certificate and its key
  std::string fingerprint;  // SHA-256, as browsers and openssl show it
};

namespace tls {

inline bool add_extension(X509* certificate, int kind, const char* value) {
  const Owned<X509_EXTENSION, X509_EXTENSION_free> extension(X509V3_EXT_conf_nid(nullptr, nullptr, kind, value));
  return extension && X509_add_ext(certificate, extension.get(), -1) == 1;
}

inline std::string fingerprint_of(const X509& certificate) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned bytes = 0;
  if (X509_digest(&certificate, EVP_sha256(), digest, &bytes) != 1) return {};
  std::string text;
  for (unsigned i = 0; i < bytes; ++i) {
    char pair[4];
    std::snprintf(pair, sizeof pair, "%s%02X", i == 0 ? "" : ":", digest[i]);
    text += pair;
  }
  return text;
}

}  // namespace tls

// Nothing if the library fails.
inline std::optional<DemoCertificate> make_demo_certificate() {
  start_tls_library();
  const tls::Key key(EVP_EC_gen("P-256"));
  const tls::Certificate certificate(X509_new());
  if (!key || !certificate) return std::nullopt;
  constexpr long kYear = 365L * 24 * 3600;
  X509* const made = certificate.get();
  X509_set_version(made, X509_VERSION_3);
  ASN1_INTEGER_set_uint64(X509_get_serialNumber(made), static_cast<std::uint64_t>(wall_now()) >> 1);
  X509_gmtime_adj(X509_getm_notBefore(made), -3600);
  X509_gmtime_adj(X509_getm_notAfter(made), kYear);
  X509_set_pubkey(made, key.get());
  X509_NAME* const name = X509_get_subject_name(made);
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>("localhost"), -1, -1, 0);
  X509_set_issuer_name(made, name);
  const bool whole = tls::add_extension(made, NID_subject_alt_name, "DNS:localhost,IP:127.0.0.1,IP:0:0:0:0:0:0:0:1") &&
                     tls::add_extension(made, NID_basic_constraints, "critical,CA:FALSE") &&
                     tls::add_extension(made, NID_ext_key_usage, "serverAuth") &&
                     X509_sign(made, key.get(), EVP_sha256()) > 0;
  const tls::Text text(BIO_new(BIO_s_mem()));
  if (!whole || !text || PEM_write_bio_X509(text.get(), made) != 1 ||
      PEM_write_bio_PrivateKey(text.get(), key.get(), nullptr, nullptr, 0, nullptr, nullptr) != 1) {
    return std::nullopt;
  }
  char* data = nullptr;
  const long bytes = BIO_get_mem_data(text.get(), &data);
  return DemoCertificate{{data, static_cast<std::size_t>(bytes)}, tls::fingerprint_of(*made)};
}

}  // namespace nexus
