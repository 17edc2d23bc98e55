// certificates.h
// Owns:     certificates for tests, made when they are asked for: an authority, and what it signs.
// Promises: nothing is read from a file; what is not said is valid for a day and for `localhost`.
// Leaves:   using them to the tests.
// Threads:  one.
// Tested by: tests/tls_test.cpp
#pragma once

#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/x509v3.h>

#include <cassert>
#include <cstdint>
#include <string>
#include <string_view>

#include "nexus/net/tls.h"

namespace nexus::test {

struct CertificateWish {
  std::string name = "localhost";              // common name
  std::string alternatives = "DNS:localhost";  // as in openssl.cnf; empty: none
  long from_s = -3600, to_s = 24 * 3600;       // from now
  bool is_authority = false;
  bool for_ever = false;  // its times are the same whenever it is made
};

class Issued {
 public:
  // Signed by `issuer`, or by itself.
  explicit Issued(const CertificateWish& wish, const Issued* issuer = nullptr)
      : key_(EVP_EC_gen("P-256")), certificate_(X509_new()) {
    X509* const made = certificate_.get();
    X509_set_version(made, X509_VERSION_3);
    ASN1_INTEGER_set_uint64(X509_get_serialNumber(made), ++serial());
    X509_gmtime_adj(X509_getm_notBefore(made), wish.from_s);
    X509_gmtime_adj(X509_getm_notAfter(made), wish.to_s);
    if (wish.for_ever) {
      ASN1_TIME_set_string(X509_getm_notBefore(made), "20200101000000Z");
      ASN1_TIME_set_string(X509_getm_notAfter(made), "20991231235959Z");
    }
    X509_set_pubkey(made, key_.get());
    X509_NAME* const name = X509_get_subject_name(made);
    const auto* text = reinterpret_cast<const unsigned char*>(wish.name.data());
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_UTF8, text, static_cast<int>(wish.name.size()), -1, 0);
    const Issued& by = issuer == nullptr ? *this : *issuer;
    X509_set_issuer_name(made, X509_get_subject_name(by.certificate_.get()));
    if (!wish.alternatives.empty()) tls::add_extension(made, NID_subject_alt_name, wish.alternatives.c_str());
    tls::add_extension(made, NID_basic_constraints, wish.is_authority ? "critical,CA:TRUE" : "critical,CA:FALSE");
    [[maybe_unused]] const int bytes = X509_sign(made, by.key_.get(), EVP_sha256());
    assert(bytes > 0);
  }

  std::string certificate() const {
    return text([&](BIO* out) { PEM_write_bio_X509(out, certificate_.get()); });
  }
  std::string key() const {
    return text([&](BIO* out) { PEM_write_bio_PrivateKey(out, key_.get(), nullptr, nullptr, 0, nullptr, nullptr); });
  }
  std::string encrypted_key() const {
    unsigned char secret[] = "secret";
    return text([&](BIO* out) {
      PEM_write_bio_PrivateKey(out, key_.get(), EVP_aes_128_cbc(), secret, sizeof secret - 1, nullptr, nullptr);
    });
  }

 private:
  template <class Write>
  static std::string text(Write&& write) {
    const tls::Text out(BIO_new(BIO_s_mem()));
    write(out.get());
    char* data = nullptr;
    const long bytes = BIO_get_mem_data(out.get(), &data);
    return {data, static_cast<std::size_t>(bytes)};
  }
  static std::uint64_t& serial() {
    static std::uint64_t last = 0;
    return last;
  }

  tls::Key key_;
  tls::Certificate certificate_;
};

inline std::shared_ptr<const TlsServer> serve_with(std::vector<TlsServer::Pair> pairs, int least = TLS1_2_VERSION,
                                                   std::string_view client_ca = {}) {
  tls::Unfit problem;
  std::size_t at = 0;
  auto server = TlsServer::make(pairs, least, client_ca, problem, at);
  assert(server != nullptr);
  return server;
}

inline std::shared_ptr<const TlsClient> trust(std::string_view ca, TlsClient::Options options) {
  tls::Unfit problem;
  const tls::Store store = tls::make_store(ca);
  auto client = TlsClient::make(options, store.get(), problem);
  assert(client != nullptr);
  return client;
}

}  // namespace nexus::test
