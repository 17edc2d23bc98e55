// multipart.h
// Owns:     the fuzz target of reading a form while it arrives.
// Promises: at any cut the result is that of a plain reader that has the whole form before it; a field that is found is
//           the only one of its name, and its value is what stands between its head and the next delimiter.
// Leaves:   well-formed and broken forms by row to multipart_test.cpp.
// Threads:  one.
#pragma once

#include "nexus/api/multipart.h"
#include "tests/fuzz/fuzz.h"

namespace fuzz {

struct PlainForm {
  bool whole = false;
  std::vector<std::string> models, streams;
};

inline std::string field_name(const std::string& head, bool& is_file) {
  std::string name;
  for (std::size_t at = 0; at < head.size();) {
    const std::size_t end = std::min(head.find("\r\n", at), head.size());
    const std::string line = head.substr(at, end - at);
    at = end + 2;
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const std::string_view key = nexus::trim_blanks(std::string_view(line).substr(0, colon));
    if (!nexus::equals_ignoring_case(key, "content-disposition")) continue;
    std::string_view rest = std::string_view(line).substr(colon + 1), parameter, value;
    while (nexus::detail::next_parameter(rest, parameter, value)) {
      is_file = is_file || nexus::equals_ignoring_case(parameter, "filename") ||
                nexus::equals_ignoring_case(parameter, "filename*");
      if (nexus::equals_ignoring_case(parameter, "name")) name = value;
    }
  }
  return name;
}

// Where a delimiter begins from `at` on, and behind it the first byte of what follows; npos if there is none.
inline std::size_t next_delimiter(const std::string& body, const std::string& boundary, std::size_t at, bool first,
                                  std::size_t& behind, bool& is_last) {
  for (; at < body.size(); ++at) {
    const bool at_start = first && at == 0 && body.starts_with("--" + boundary);
    if (!at_start && body.compare(at, boundary.size() + 4, "\r\n--" + boundary) != 0) continue;
    behind = at + boundary.size() + (at_start ? 2 : 4);
    is_last = body.compare(behind, 2, "--") == 0;
    if (is_last) return at;
    const std::size_t blanks = std::min(body.find_first_not_of(" \t", behind), body.size());
    if (body.compare(blanks, 2, "\r\n") == 0) {
      behind = blanks;
      return at;
    }
    if (blanks != behind) return std::string::npos;  // something behind blanks: the form is broken
  }
  return std::string::npos;
}

inline PlainForm plain_form(const std::string& body, const std::string& boundary) {
  PlainForm form;
  std::size_t behind = 0, parts = 0;
  bool is_last = false;
  std::size_t at = next_delimiter(body, boundary, 0, true, behind, is_last);
  while (at != std::string::npos && !is_last) {
    const std::size_t head_at = behind, head_end = body.find("\r\n\r\n", head_at);
    if (++parts > nexus::kMaxParts || head_end == std::string::npos || head_end - head_at > nexus::kMaxPartHeadBytes) {
      return form;
    }
    bool is_file = false;
    const std::size_t from = std::min(head_at + 2, head_end);
    const std::string name = field_name(body.substr(from, head_end - from), is_file);
    const std::size_t content = head_end + 4;
    at = next_delimiter(body, boundary, head_end + 2, false, behind, is_last);
    if (at == std::string::npos) return form;
    const std::string value = body.substr(content, at > content ? at - content : 0);
    if (!is_file && name == "model") form.models.push_back(value);
    if (!is_file && name == "stream") form.streams.push_back(value);
  }
  form.whole = at != std::string::npos;
  return form;
}

inline void multipart(std::string_view input) {
  Draw draw(input);
  const std::string body(input), boundary = "b";
  const PlainForm wanted = plain_form(body, boundary);
  const nexus::Endpoint* endpoint = nullptr;
  for (const nexus::Endpoint& row : nexus::kEndpoints) {
    if (row.path == "/v1/audio/transcriptions") endpoint = &row;
  }
  for (const auto& ends : cuts_of(body.size(), draw)) {
    nexus::MultipartScan scan;
    scan.start(boundary);
    for (const std::size_t end : ends) {
      const std::unique_ptr<char[]> piece(new char[end]);
      body.copy(piece.get(), end);
      scan.feed(piece.get(), end);
    }
    nexus::BodyFacts facts;
    const auto error = scan.read(body, *endpoint, facts);
    const bool twice = wanted.models.size() > 1 || wanted.streams.size() > 1;
    check(wanted.whole == (error != nexus::ApiError::bad_multipart), "a form is whole, or is not");
    if (!wanted.whole) continue;
    check(twice == (error == nexus::ApiError::duplicate_key), "a field occurs twice, or does not");
    if (twice) continue;
    const bool named = wanted.models.size() == 1 && !wanted.models[0].empty();
    check(named == !error.has_value(), "a model is named, or is not");
    if (!named) continue;
    check(body.substr(facts.model_value.at, facts.model_value.bytes) == wanted.models[0], "the model differs");
    check(facts.stream == (wanted.streams.size() == 1 && wanted.streams[0] == "true"), "stream differs");
  }
}

}  // namespace fuzz
