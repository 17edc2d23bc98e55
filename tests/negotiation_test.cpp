// negotiation_test.cpp
// Goal:   /metrics is written in the format that a scraper prefers, and in 0.0.4 for all others.
// Method: rows of Accept fields: those that scrapers send, then each rule with its neighbours; random bytes.
#include "nexus/metrics/negotiation.h"

#include <doctest/doctest.h>

#include <random>
#include <string>
#include <string_view>
#include <vector>

using namespace nexus;

namespace {

constexpr MetricsForm kText{};
constexpr MetricsForm open_metrics(Escaping escaping = Escaping::none) {
  return {MetricsFormat::openmetrics, escaping};
}

MetricsForm chosen(const std::vector<std::string>& fields) {
  MetricsAccept accepts;
  for (const std::string& field : fields) accepts.add(field);
  return accepts.choice();
}

}  // namespace

TEST_CASE("scrapers get the format that they prefer") {
  const std::string protobuf =
      "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
  const std::pair<std::string, MetricsForm> rows[] = {
      // Prometheus 2.42
      {"application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
       "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
       open_metrics()},
      // the same with native histograms
      {protobuf + ",application/openmetrics-text;version=1.0.0;q=0.8,application/openmetrics-text;version=0.0.1;q=0.75,"
                  "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
       open_metrics()},
      // Prometheus 3
      {"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
       "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
       "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
       open_metrics(Escaping::allow_utf_8)},
      // the same with native histograms
      {protobuf +
           ";escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
           "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
           "text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
       open_metrics(Escaping::allow_utf_8)},
      // vmagent
      {"text/plain;version=0.0.4;q=1,*/*;q=0.1", kText},
      // a browser, curl
      {"text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", kText},
      {"*/*", kText},
  };
  for (const auto& [field, expected] : rows) {
    CAPTURE(field);
    CHECK(chosen({field}) == expected);
  }
}

TEST_CASE("the highest quality decides, then the more exact range, else 0.0.4") {
  const std::string om = "application/openmetrics-text", text = "text/plain";
  const std::pair<std::vector<std::string>, MetricsForm> rows[] = {
      {{}, kText},
      {{""}, kText},
      {{","}, kText},
      {{"application/json"}, kText},
      {{om}, open_metrics()},
      {{"APPLICATION/OpenMetrics-Text; VERSION=1.0.0"}, open_metrics()},
      {{om + "; version=\"1.0.0\""}, open_metrics()},
      {{om + ";version=0.0.1"}, kText},
      {{om + ";version=2.0.0"}, kText},
      {{om + ";version=1.0.00"}, kText},
      {{om + ";version=2.0.0," + om + ";version=1.0.0;q=0.1"}, open_metrics()},
      {{om + ";q=0"}, kText},
      {{om + ";q=0.001"}, open_metrics()},
      {{om + ";q=0.001," + text + ";q=0.002"}, kText},
      {{om + ";q=0.5," + text + ";q=0.499"}, open_metrics()},
      {{text + ";q=0.4," + om + ";q=0.5"}, open_metrics()},
      {{om + "," + text}, kText},
      {{om + ";version=1.0.0," + text}, open_metrics()},
      {{om + "," + text + ";version=0.0.4"}, kText},
      {{om + ";version=1.0.0," + text + ";version=0.0.4"}, kText},
      {{om + ";version=1.0.0," + text + ";version=1.0.0"}, open_metrics()},
      {{om + ",*/*"}, open_metrics()},
      {{om + ";q=0.5,*/*"}, kText},
      {{"application/*"}, open_metrics()},
      {{"application/*,text/*"}, kText},
      {{"application/*;q=0.3,*/*;q=0.2"}, open_metrics()},
      {{om + ";q=0,application/*"}, kText},
      {{"*/*;q=0," + om}, open_metrics()},
      {{"*/*;q=0"}, kText},
      {{text + ";q=0"}, kText},
      {{text + ";q=0,*/*;q=0.1"}, open_metrics()},
      {{om + ";q=0.2," + om + ";q=0.9," + text + ";q=0.5"}, open_metrics()},
      // several fields are one list
      {{text + ";q=0.5", om}, open_metrics()},
      {{om, text + ";version=0.0.4"}, kText},
      // what can't be read asks for nothing
      {{om + ";q=1.5"}, kText},
      {{om + ";q=2"}, kText},
      {{om + ";q=.5"}, kText},
      {{om + ";q=0.1234"}, kText},
      {{om + ";q=1.001"}, kText},
      {{om + ";q="}, kText},
      {{om + ";q=x," + om + ";q=0.1"}, open_metrics()},
      {{om + " ; q = 1"}, open_metrics()},
      {{om + ";q=1.000"}, open_metrics()},
      {{om + ";x=\"a,b;q=0\""}, open_metrics()},
      {{om + ";x=\"a\\\",b"}, open_metrics()},
      {{om + ";x=\"\\"}, open_metrics()},
      {{"xapplication/openmetrics-text"}, kText},
      {{"application/openmetrics-textx"}, kText},
  };
  for (const auto& [fields, expected] : rows) {
    CAPTURE(fields.size());
    if (!fields.empty()) CAPTURE(fields[0]);
    CHECK(chosen(fields) == expected);
  }
}

TEST_CASE("a known scheme of escaping is echoed, and nothing else of a request is") {
  const std::pair<std::string, std::string> rows[] = {
      {"", ""},
      {";escaping=allow-utf-8", "; escaping=allow-utf-8"},
      {";escaping=underscores", "; escaping=underscores"},
      {";escaping=dots", "; escaping=dots"},
      {";escaping=values", "; escaping=values"},
      {";escaping=\"dots\"", "; escaping=dots"},
      {";escaping=", ""},
      {";escaping=none", ""},
      {";escaping=Dots", ""},
      {";escaping=dots%0d%0aX: y", ""},
      {";escaping=\"dots; x=y\"", ""},
      {";escaping=allow-utf-8x", ""},
  };
  for (const auto& [asked, expected] : rows) {
    CAPTURE(asked);
    const MetricsForm form = chosen({"application/openmetrics-text;version=1.0.0" + asked});
    CHECK(content_type_of(form) == "application/openmetrics-text; version=1.0.0; charset=utf-8" + expected);
  }
  CHECK(content_type_of(chosen({"text/plain;version=0.0.4;escaping=dots"})) ==
        "text/plain; version=0.0.4; charset=utf-8");
}

TEST_CASE("any bytes lead to a format, and to a Content-Type of the list") {
  std::mt19937 random(7);
  const std::string_view words[] = {"application/openmetrics-text",
                                    "text/plain",
                                    "*/*",
                                    ";",
                                    ",",
                                    "=",
                                    "\"",
                                    "\\",
                                    "q",
                                    "q=0.5",
                                    "1",
                                    "escaping",
                                    " ",
                                    "version=1.0.0"};
  for (int i = 0; i < 20'000; ++i) {
    std::string field;
    for (auto n = random() % 12; n > 0; --n) {
      random() % 8 == 0 ? field += static_cast<char>(random() % 256) : field += words[random() % std::size(words)];
    }
    CAPTURE(field);
    const std::string_view type = content_type_of(chosen({field}));
    const bool known = type == kTextType ||
                       std::find(kOpenMetricsTypes.begin(), kOpenMetricsTypes.end(), type) != kOpenMetricsTypes.end();
    REQUIRE(known);
  }
}
