// Goal: the status page before any script runs, and the fields that go with it. Method: pages rendered from totals
// made here; the digests computed anew.
#include "nexus/apps/status_page.h"

#include <doctest/doctest.h>

#include <array>
#include <bit>
#include <cstdint>

using namespace nexus;

namespace {

// FIPS 180-4.
std::array<std::uint8_t, 32> sha256(std::string text) {
  constexpr std::array<std::uint32_t, 64> kRound{
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
      0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
      0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
      0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
      0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
      0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
      0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
  std::array<std::uint32_t, 8> state{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  const std::uint64_t bits = text.size() * 8;
  text += '\x80';
  while (text.size() % 64 != 56) text += '\0';
  for (int shift = 56; shift >= 0; shift -= 8) text += static_cast<char>(bits >> shift);
  for (std::size_t block = 0; block < text.size(); block += 64) {
    std::array<std::uint32_t, 64> w{};
    for (std::size_t i = 0; i < 64; ++i) w[i / 4] = w[i / 4] << 8 | static_cast<unsigned char>(text[block + i]);
    for (std::size_t i = 16; i < 64; ++i) {
      const std::uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + w[i - 7] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3) +
             (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10);
    }
    std::array<std::uint32_t, 8> s = state;
    for (std::size_t i = 0; i < 64; ++i) {
      const std::uint32_t first = s[7] + (std::rotr(s[4], 6) ^ std::rotr(s[4], 11) ^ std::rotr(s[4], 25)) +
                                  ((s[4] & s[5]) ^ (~s[4] & s[6])) + kRound[i] + w[i];
      const std::uint32_t second = (std::rotr(s[0], 2) ^ std::rotr(s[0], 13) ^ std::rotr(s[0], 22)) +
                                   ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      s = {first + second, s[0], s[1], s[2], s[3] + first, s[4], s[5], s[6]};
    }
    for (std::size_t i = 0; i < 8; ++i) state[i] += s[i];
  }
  std::array<std::uint8_t, 32> digest;
  for (std::size_t i = 0; i < 32; ++i) digest[i] = static_cast<std::uint8_t>(state[i / 4] >> (24 - i % 4 * 8));
  return digest;
}

std::string policy_source(std::string_view text) {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const auto digest = sha256(std::string(text));
  std::string out = "'sha256-";
  for (std::size_t i = 0; i < 32; i += 3) {
    const std::uint32_t three = std::uint32_t{digest[i]} << 16 | std::uint32_t{i + 1 < 32 ? digest[i + 1] : 0u} << 8 |
                                (i + 2 < 32 ? digest[i + 2] : 0u);
    for (int shift = 18; shift >= 0; shift -= 6) out += kDigits[three >> shift & 63];
  }
  out.back() = '=';  // 32 bytes are 43 digits and one to fill
  return out + "'";
}

std::size_t times(std::string_view text, std::string_view part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != std::string_view::npos; at = text.find(part, at + part.size())) ++count;
  return count;
}

std::string status_page(const Stats& stats, std::string_view version = "1") {
  TextBuffer page;
  write_status_page(page, stats, version);
  return std::string(page.text());
}

// `name` must outlive it.
Stats stats_of(std::size_t backends, std::string_view name = "b") {
  Stats stats;
  for (std::size_t i = 0; i < backends; ++i) {
    StatsRow row;
    row.name = name;
    row.requests = 10 + i;
    stats.backends.push_back(row);
  }
  return stats;
}

TEST_CASE("the digest is right for a text whose digest is known") {
  CHECK(policy_source("abc") == "'sha256-ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0='");
}

TEST_CASE("the policy names the script and the style that the page has, and nothing else may run") {
  const std::string_view fields = kStatusFields;
  const std::string script = policy_source(kStatusScript), style = policy_source(kStatusStyle);
  CHECK(fields.find("script-src " + script + ";") != std::string::npos);
  CHECK(fields.find("style-src " + style + ";") != std::string::npos);
  CHECK(fields.find("default-src 'none';") != std::string::npos);
  CHECK(fields.find("unsafe") == std::string::npos);
  CHECK(fields.substr(fields.size() - 2) == "\r\n");
  const std::string page = status_page(Stats{});
  CHECK(page.find("<script>" + std::string(kStatusScript) + "</script>") != std::string::npos);
  CHECK(page.find("<style>" + std::string(kStatusStyle) + "</style>") != std::string::npos);
  CHECK(times(page, "<script") == 1);
  CHECK(times(page, "<style") == 1);
}

TEST_CASE("the page is under 40 kB and asks no other server for anything") {
  const std::string page = status_page(Stats{});
  CHECK(page.size() < 40'000);
  CHECK(times(page, "http://") == times(page, "http://www.w3.org/"));  // names of namespaces
  CHECK(page.find("https://") == std::string::npos);
  CHECK(page.find(" style=") == std::string::npos);  // the policy would refuse it
  CHECK(page.find(" onclick=") == std::string::npos);
  CHECK(kStatusScript.find("innerHTML") == std::string::npos);
}

TEST_CASE("a hostile name is text, in the table that needs no script") {
  for (const char* name :
       {"<img src=x onerror=alert(1)>", "</tbody><script>alert(1)</script>", "a\"b'c&d", "\x1b[2J\xe2\x80\xae"}) {
    CAPTURE(name);
    const std::string page = status_page(stats_of(1, name), "<b>");
    CHECK(times(page, "<script") == 1);
    CHECK(page.find("<img") == std::string::npos);
    CHECK(page.find("version &lt;b&gt;") != std::string::npos);
    CHECK(page.find('\x1b') == std::string::npos);
    CHECK(page.find("\xe2\x80\xae") == std::string::npos);
  }
  CHECK(status_page(stats_of(1, "a\"b'c&d<e>")).find("<bdi>a&quot;b&#39;c&amp;d&lt;e&gt;</bdi>") != std::string::npos);
}

TEST_CASE("a row has a cell under each title, and many rows are cut with a word on it") {
  const std::string page = status_page(stats_of(1));
  CHECK(times(page, "<td data-title=") == 5);
  CHECK(times(page, "<th scope=\"col\">") == 6 + 5 + 7 + 6);
  CHECK(page.find("<td data-title=\"Requests\"><b>10</b></td>") != std::string::npos);
  const std::string many = status_page(stats_of(kMaxStatusRows + 7));
  CHECK(times(many, "<tr><th scope=\"row\">") == kMaxStatusRows);
  CHECK(many.find("and 7 more") != std::string::npos);
}

TEST_CASE("keys have a table if there are some, with what they use and the mean of their waits") {
  Stats stats = stats_of(1);
  CHECK(status_page(stats).find("<div id=\"by_key\" hidden>") != std::string::npos);
  StatsRow row;
  row.name = "alice";
  row.requests = 9;
  row.pending = 2;
  row.prompt_tokens = 300;
  stats.keys = {row, row};
  stats.keys[1].durations = 4;
  stats.keys[1].duration_sum_ns = 6 * kSecond;
  const std::string page = status_page(stats);
  CHECK(page.find("<div id=\"by_key\" >") != std::string::npos);
  const std::string used =
      "<bdi>alice</bdi></th><td data-title=\"Pending\"><b>2</b></td><td data-title=\"Requests\"><b>9</b></td>"
      "<td data-title=\"Errors\"><b>0</b></td><td data-title=\"Tokens in\"><b>300</b></td>"
      "<td data-title=\"Tokens out\"><b>0</b></td><td data-title=\"Mean wait\"><b>";
  CHECK(page.find(used + "-</b></td></tr>") != std::string::npos);
  CHECK(page.find(used + "1.50 s</b></td></tr>") != std::string::npos);
}

TEST_CASE("without a script the page shows the totals of /v1/stats") {
  Stats stats = stats_of(1, "g");
  stats.uptime_s = 10;
  stats.registered = 1;
  stats.models_available = 3;
  stats.client_connections = 8;
  stats.all.requests = 31;
  stats.all.errors = 4;
  stats.backends[0].registered = true;
  stats.backends[0].pending = 2;
  stats.backends[0].errors = 5;
  stats.backends[0].prompt_tokens = 6;
  stats.backends[0].completion_tokens = 50;
  stats.models = stats.backends;
  const std::string page = status_page(stats, "0.1.0");
  for (const char* part :
       {"<span id=\"total\">31</span>", "<span id=\"success\">27</span>", "<span id=\"errors\">4</span>",
        "0 of 1 backends healthy", "class=\"state down\"", "<span id=\"model_count\">3</span>",
        "<span id=\"clients\">8</span>", "<span id=\"uptime\">10s</span>", "version 0.1.0",
        "<bdi>g</bdi><span class=\"state down\">down</span></th><td data-title=\"Pending\"><b>2</b></td>"
        "<td data-title=\"Requests\"><b>10</b></td><td data-title=\"Errors\"><b>5</b></td>"
        "<td data-title=\"Tokens in\"><b>6</b></td><td data-title=\"Tokens out\"><b>50</b></td></tr>",
        "<bdi>g</bdi></th><td data-title=\"Requests\"><b>10</b></td>"}) {
    CAPTURE(part);
    CHECK(page.find(part) != std::string::npos);
  }
  CHECK(page.find("{{") == page.find("}}"));  // neither is left
  stats.healthy = 1;
  CHECK(status_page(stats).find("class=\"state up\">1 of 1") != std::string::npos);
  stats.ejected = 1;
  stats.backends[0].healthy = true;
  stats.backends[0].ejected_ns = 3 * kSecond;
  stats.backends[0].ejected_why = AttemptOutcome::timeout;
  const std::string with_ejected = status_page(stats);
  CHECK(with_ejected.find("class=\"state some\">1 of 1 backends healthy, 1 ejected<") != std::string::npos);
  CHECK(with_ejected.find(
            "<span class=\"state some\">ejected for 3s</span><small class=\"why\">its requests fail (timeout): ") !=
        std::string::npos);
}

}  // namespace
