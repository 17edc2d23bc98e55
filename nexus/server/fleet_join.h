// fleet_join.h
// Owns:     pages that are asked of each backend that serves Ollama's API, when a client asks for them, and joined:
//           the models that are loaded (/api/ps), and the version (/api/version).
// Promises: all who ask while the backends are being asked get the same page, but for the models that their keys may
//           not use; it has what those told that answered within health.timeout; an entry is passed on byte for byte;
//           JSON is valid whatever a backend says.
// Leaves:   asking to prober.h, the clients to control.h.
// Threads:  control's.
// Tested by: tests/fleet_join_test.cpp
#pragma once

#include <array>
#include <charconv>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nexus/api/json_reader.h"
#include "nexus/base/limits.h"
#include "nexus/base/text_buffer.h"
#include "nexus/fleet/prober.h"
#include "nexus/fleet/registry.h"
#include "nexus/server/paths.h"

namespace nexus {

struct JoinedPage {
  PageKind kind;
  std::string_view path;
};
inline constexpr std::array<JoinedPage, 2> kJoinedPages{
    {{PageKind::running, "/api/ps"}, {PageKind::version, "/api/version"}}};

// True if an element of a list of models is one that the key may use.
inline bool is_allowed(JsonReader& json, JsonReader::Object& element, const ApiKey& key) {
  bool allowed = false;
  const bool whole = json.each_member(element, [&](std::string_view field, JsonReader::Value value) {
    std::string_view name;
    if (field == "name" && json.read_name(value, name)) allowed = key.may_use(name);
    return true;
  });
  return whole && allowed;
}

// Those elements of a list that are models which the key may use.
inline std::string allowed_elements(JsonReader& json, simdjson::ondemand::array& list, const ApiKey& key) {
  std::string elements;
  for (auto element : list) {
    JsonReader::Object object;
    std::string_view text;
    if (element.get_object().get(object) || object.raw_json().get(text) || object.reset().error()) return {};
    if (is_allowed(json, object, key)) elements.append(elements.empty() ? "" : ",").append(trim_json_end(text));
  }
  return elements;
}

// Appends the elements of the list `models` of a page, each of which is valid JSON; with a key, the models that it may
// use.
inline void append_running(JsonReader& json, std::string_view page, const ApiKey* allowed, std::string& out) {
  JsonReader::Object object;
  if (!json.open(page, object)) return;
  std::string elements;
  const bool whole = json.each_member(object, [&](std::string_view key, JsonReader::Value value) {
    simdjson::ondemand::array list;
    std::string_view text;
    if (key != "models" || value.get_array().get(list)) return true;
    if (allowed != nullptr) {
      elements = allowed_elements(json, list, *allowed);
    } else if (!list.raw_json().get(text)) {
      text = trim_json_end(text);
      elements = text.substr(1, text.size() - 2);
    }
    return true;
  });
  if (!whole || !json.at_end() || !json.is_valid("[" + elements + "]")) return;
  if (elements.find_first_not_of(" \t\r\n") == std::string::npos) return;
  if (!out.empty()) out += ',';
  out += elements;
}

// A version as its numbers; those behind the third do not matter. Empty if it is none.
inline std::optional<std::array<std::uint32_t, 3>> numbers_of(std::string_view version) {
  std::array<std::uint32_t, 3> numbers{};
  const char *at = version.data(), *const end = at + version.size();
  for (std::uint32_t& number : numbers) {
    const auto read = std::from_chars(at, end, number);
    if (read.ec != std::errc()) return std::nullopt;
    at = read.ptr;
    if (at == end || *at != '.') break;
    ++at;
  }
  return numbers;
}

// The lowest of the versions that the pages tell: a client may use what each backend has.
inline std::string lowest_version(JsonReader& json, const std::vector<std::string>& pages) {
  std::string lowest = "0.0.0";
  std::optional<std::array<std::uint32_t, 3>> least;
  for (std::string page : pages) {
    const std::size_t bytes = page.size();
    page.resize(bytes + kPaddingBytes);
    JsonReader::Object object;
    if (!json.open({page.data(), bytes}, object)) continue;
    json.each_member(object, [&](std::string_view key, JsonReader::Value value) {
      std::string_view version;
      if (key != "version" || !json.read_name(value, version)) return true;
      const auto numbers = numbers_of(version);
      if (!numbers || (least && *least <= *numbers)) return true;
      least = numbers;
      lowest = version;
      return true;
    });
  }
  return lowest;
}

inline std::string join_pages(JsonReader& json, PageKind kind, const std::vector<std::string>& pages,
                              const ApiKey* key = nullptr) {
  if (kind == PageKind::version) return R"({"version":)" + json_string(lowest_version(json, pages)) + "}";
  std::string models;
  for (std::string page : pages) {
    const std::size_t bytes = page.size();
    page.resize(bytes + kPaddingBytes);
    append_running(json, {page.data(), bytes}, key, models);
  }
  return R"({"models":[)" + models + "]}";
}

// `Ask`: who waits for a page; its `page` is a WantedPage.
template <class Net, class Ask>
class FleetJoin {
 public:
  static constexpr bool joins(PageKind kind) { return kind == PageKind::running || kind == PageKind::version; }
  // True for the result of a probe that was started here.
  static constexpr bool is_own(std::uint64_t epoch) { return (epoch & kOwnEpoch) != 0; }

  // Begins to ask, or joins those who wait. `tell(Ask, page)` is called for each when the page is made.
  template <class Done, class Tell>
  void ask(const Ask& ask, const Registry& registry, Prober<Net>& prober, JsonReader& json, Ns now, Done&& done,
           Tell&& tell) {
    Join& join = join_of(ask.page.kind);
    join.waiting.push_back(ask);
    if (join.missing > 0) return;
    // All that may throw comes before the first answer is missing: it would be waited for without end.
    std::vector<ProbeOrder> orders;
    for (const Registry::Backend& backend : registry.backends()) {
      const BackendSettings& settings = backend.settings;
      const Apis apis = settings.apis != 0 ? settings.apis : row_of(settings.kind).apis;
      if (settings.kind == BackendKind::echo || (apis & bit_of(Api::ollama)) == 0) continue;
      if (backend.health != Health::healthy || !backend.address) continue;
      orders.push_back(order_for(ask.page.kind, backend, registry.settings().health.timeout_ns));
    }
    join.pages.reserve(orders.size());
    join.missing = orders.size() + 1;  // not over before all are asked
    for (const ProbeOrder& order : orders) prober.start(order, now, done);
    end_one(join, json, tell);
  }

  template <class Tell>
  void on_result(ProbeResult&& result, JsonReader& json, Tell&& tell) {
    Join& join = joins_[result.epoch & ~kOwnEpoch];
    if (result.passed && result.status == 200) join.pages.push_back(std::move(result.page));
    end_one(join, json, tell);
  }

 private:
  static constexpr std::uint64_t kOwnEpoch = std::uint64_t{1} << 63;
  struct Join {
    PageKind kind{};
    std::vector<Ask> waiting;
    std::size_t missing = 0;  // answers
    std::vector<std::string> pages;
  };

  Join& join_of(PageKind kind) {
    Join& join = joins_[kind == kJoinedPages[0].kind ? 0 : 1];
    join.kind = kind;
    return join;
  }

  static ProbeOrder order_for(PageKind kind, const Registry::Backend& backend, Ns timeout_ns) {
    const std::size_t index = kind == kJoinedPages[0].kind ? 0 : 1;
    ProbeOrder order = order_of(backend.settings, {*backend.address}, kOwnEpoch | index, timeout_ns);
    order.page = kJoinedPages[index].path;
    order.wants_models = false;
    order.any_answer = true;
    order.max_bytes = kMaxJoinedBytes;
    return order;
  }

  template <class Tell>
  void end_one(Join& join, JsonReader& json, Tell&& tell) {
    if (--join.missing > 0) return;
    const std::vector<std::string> pages = std::exchange(join.pages, {});
    const auto made = [&](const ApiKey* key) {
      auto page = std::make_shared<TextBuffer>();
      page->add(join_pages(json, join.kind, pages, key));
      return page;
    };
    const auto whole = made(nullptr);
    for (const Ask& ask : std::exchange(join.waiting, {})) {
      tell(ask, ask.page.key == nullptr ? whole : made(ask.page.key.get()));
    }
  }

  std::array<Join, kJoinedPages.size()> joins_;
};

}  // namespace nexus
