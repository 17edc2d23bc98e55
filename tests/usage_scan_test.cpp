#include <doctest/doctest.h>

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/usage_scan.h"

using nexus::BlockPool;
using nexus::JsonReader;
using nexus::Usage;
using nexus::UsageScan;
using Kind = nexus::UsageScan::Kind;

namespace {

struct Result {
  std::string out;
  Usage usage;
  bool removed = false;
  bool fed = true;  // and never held more than came, nor anything behind the end
  std::size_t most_held = 0;
  std::vector<std::size_t> sent;  // bytes that had gone on after each piece

  bool operator==(const Result& other) const {
    return out == other.out && usage.prompt_tokens == other.usage.prompt_tokens &&
           usage.completion_tokens == other.usage.completion_tokens && removed == other.removed;
  }
};

// The pool is looked at after each body: everything that it gave must have come home.
BlockPool& pool() {
  static BlockPool one;
  return one;
}
JsonReader& reader() {
  static JsonReader one;
  return one;
}

// Feeds `text`, cut behind each of `ends`. Each piece lies in a block of its own whose readable padding ends where the
// contract says, so that an address sanitizer sees a read behind it; the padding holds bytes that would be misread.
Result scan(std::string_view text, Kind kind, bool removing, std::vector<std::size_t> ends = {}) {
  if (ends.empty() || ends.back() != text.size()) ends.push_back(text.size());
  Result result;
  UsageScan scan;
  scan.start(kind, &nexus::row_of(nexus::Dialect::openai).response, removing);
  UsageScan::Out out;
  std::size_t from = 0;
  const bool end_follows = ends.size() % 2 == 1;  // else the body ends with its last piece
  for (std::size_t i = 0; i < ends.size(); ++i) {
    const std::size_t end = ends[i], bytes = end - from;
    const bool last = !end_follows && i + 1 == ends.size();
    const std::unique_ptr<char[]> piece(new char[bytes + nexus::kPaddingBytes]);
    if (bytes > 0) std::memcpy(piece.get(), text.data() + from, bytes);
    for (std::size_t k = 0; k < nexus::kPaddingBytes; ++k) piece[bytes + k] = "\n\n\"}]{data:"[k % 11];
    result.fed = result.fed && scan.feed(pool(), reader(), piece.get(), bytes, last, out);
    result.out.append(out.held).append(out.piece);
    result.most_held = std::max(result.most_held, scan.held_bytes());
    result.fed = result.fed && result.out.size() + scan.held_bytes() <= end;
    result.sent.push_back(result.out.size());
    from = end;
  }
  if (end_follows) {
    result.fed = result.fed && scan.feed(pool(), reader(), nullptr, 0, true, out);
    result.out.append(out.held).append(out.piece);
  }
  result.fed = result.fed && scan.held_bytes() == 0;
  result.usage = scan.usage();
  result.removed = result.out.size() < text.size();
  return result;
}

std::vector<std::size_t> byte_by_byte(std::size_t bytes) {
  std::vector<std::size_t> ends;
  for (std::size_t i = 1; i <= bytes; ++i) ends.push_back(i);
  return ends;
}

// Calls `check` for the text whole, byte by byte, and cut in two and in three at every place (in three: at a sample of
// places where the text is long).
template <typename Check>
void for_every_cut(std::size_t bytes, const Check& check) {
  check(std::vector<std::size_t>{bytes});
  check(byte_by_byte(bytes));
  const std::size_t stride = bytes <= 160 ? 1 : bytes / 80;
  for (std::size_t one = 0; one <= bytes; ++one) {
    check(std::vector<std::size_t>{one, bytes});
    for (std::size_t two = one; two <= bytes; two += stride) check(std::vector<std::size_t>{one, two, bytes});
  }
}

bool is_subsequence(std::string_view part, std::string_view whole) {
  std::size_t at = 0;
  for (const char byte : whole) at += at < part.size() && part[at] == byte ? 1 : 0;
  return at == part.size();
}

// An event of a stream in a test, and what is to become of it.
struct Event {
  std::string text;
  bool extra = false;  // the one that is taken out
};

// `\n` in `text` stands for the stream's line end.
std::string with_line_ends(std::string_view text, std::string_view line_end) {
  std::string out;
  for (const char byte : text) {
    if (byte == '\n')
      out += line_end;
    else
      out += byte;
  }
  return out;
}

struct Stream {
  std::string text, kept;
  // After this many bytes of the text came, at least that many must have gone on.
  struct Mark {
    std::size_t came, gone;
  };
  std::vector<Mark> marks;

  void add(const Event& event, std::string_view line_end) {
    const std::string bytes = with_line_ends(event.text, line_end);
    text += bytes;
    if (!event.extra) kept += bytes;
    // A blank line that is a CRLF is over with its CR.
    marks.push_back({text.size() - (line_end.size() - 1), kept.size() - (event.extra ? 0 : line_end.size() - 1)});
  }
};

std::size_t owed(const Stream& stream, std::size_t came) {
  std::size_t gone = 0;
  for (const auto& mark : stream.marks) {
    if (mark.came <= came) gone = mark.gone;
  }
  return gone;
}

std::string cut_places(const std::vector<std::size_t>& ends) {
  std::string text;
  for (const std::size_t end : ends) text += std::to_string(end) + " ";
  return text;
}

bool tells(const Usage& one, const Usage& other) {
  return one.prompt_tokens == other.prompt_tokens && one.completion_tokens == other.completion_tokens;
}

// One bool for a run, since there are millions of them; what went wrong is then said by the checks.
void check_stream(const Stream& stream, bool removed, Usage usage) {
  for_every_cut(stream.text.size(), [&](const std::vector<std::size_t>& ends) {
    const Result removing = scan(stream.text, Kind::event_stream, true, ends);
    const Result passing = scan(stream.text, Kind::event_stream, false, ends);
    bool in_time = true, at_once = true;
    for (std::size_t i = 0; i < ends.size(); ++i) {
      in_time = in_time && removing.sent[i] >= owed(stream, ends[i]);
      at_once = at_once && passing.sent[i] == ends[i];
    }
    const bool right = removing.fed && removing.out == stream.kept && removing.removed == removed && in_time &&
                       tells(removing.usage, usage) && passing.out == stream.text && !passing.removed &&
                       passing.most_held == 0 && at_once && tells(passing.usage, usage);
    if (right) return;
    CAPTURE(cut_places(ends));
    CHECK(in_time);
    CHECK(at_once);
    CHECK(removing.out == stream.kept);
    CHECK(removing.removed == removed);
    CHECK(removing.usage.prompt_tokens == usage.prompt_tokens);
    CHECK(removing.usage.completion_tokens == usage.completion_tokens);
    REQUIRE(right);
  });
  CHECK(pool().taken_bytes() == 0);
}

const Event kDelta{R"(data: {"id":"c1","choices":[{"index":0,"delta":{"content":"Hi \"usage\" {"}}],"usage":null})"
                   "\n\n"};
const Event kExtra{R"(data: {"id":"c1","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}})"
                   "\n\n",
                   true};
const Event kDone{"data: [DONE]\n\n"};

Usage counts(std::int64_t prompt, std::int64_t completion) {
  Usage usage;
  usage.prompt_tokens = prompt;
  usage.completion_tokens = completion;
  return usage;
}

}  // namespace

TEST_CASE("a plain body tells its usage and goes on untouched, however it is cut") {
  struct Row {
    const char* name;
    std::string text;
    std::int64_t prompt, completion;
  };
  const std::string wide(40, '7');
  const Row rows[] = {
      {"a completion",
       R"({"id":"x","choices":[{"message":{"content":"a"}}],"usage":{"prompt_tokens":12,"completion_tokens":34}})", 12,
       34},
      {"white space", "\n{ \"usage\" \t:\r\n { \"prompt_tokens\" : 1 , \"completion_tokens\":2 } }\n", 1, 2},
      {"an embedding", R"({"data":[{"embedding":[0.1,-2e5,3]}],"usage":{"prompt_tokens":8,"total_tokens":8}})", 8, -1},
      {"usage first", R"({"usage":{"prompt_tokens":3,"completion_tokens":4},"choices":[[[{}]]]})", 3, 4},
      {"details inside", R"({"usage":{"d":{"prompt_tokens":9,"x":[{}]},"prompt_tokens":5,"completion_tokens":6}})", 5,
       6},
      {"the last one wins", R"({"usage":{"prompt_tokens":1},"usage":{"prompt_tokens":2}})", 2, -1},
      {"null is none", R"({"usage":{"prompt_tokens":1},"usage":null})", 1, -1},
      {"a deeper usage is another", R"({"a":{"usage":{"prompt_tokens":1}},"b":[{"usage":{"prompt_tokens":1}}]})", -1,
       -1},
      {"a usage in a string", R"({"a":"\\\"usage\":{\"prompt_tokens\":1}","b":"}"})", -1, -1},
      {"brackets and escapes in strings", R"({"a":{"b\"}]":"\\","c":"{[\\\""},"usage":{"prompt_tokens":4}})", 4, -1},
      {"a longer key", R"({"usages":{"prompt_tokens":1},"usag":{"prompt_tokens":1},"usage_":{"prompt_tokens":2}})", -1,
       -1},
      {"a very long key", "{\"" + wide + wide + "usage\":{\"prompt_tokens\":1}}", -1, -1},
      {"a list", R"([{"usage":{"prompt_tokens":1}}])", -1, -1},
      {"no object", R"("usage":{"prompt_tokens":1})", -1, -1},
      {"values that are no objects", R"({"usage":[{"prompt_tokens":1}],"usage":"x","usage":1})", -1, -1},
      {"scalars before it", R"({"a":true,"b":-1.5e3,"c":null,"d":"","usage":{"prompt_tokens":6}})", 6, -1},
      {"a body that ends early", R"({"usage":{"prompt_tokens":1)", -1, -1},
      {"a string with a usage as its value", R"({"k":"usage","usage":{"prompt_tokens":1}})", 1, -1},
      {"nothing", "", -1, -1},
      {"no JSON", "Internal Server Error", -1, -1},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    for_every_cut(row.text.size(), [&](const std::vector<std::size_t>& ends) {
      const Result result = scan(row.text, Kind::json, false, ends);
      bool right = result.fed && result.out == row.text && tells(result.usage, counts(row.prompt, row.completion));
      for (std::size_t i = 0; i < ends.size(); ++i) right = right && result.sent[i] == ends[i];
      CAPTURE(cut_places(ends));
      REQUIRE(right);
    });
  }
  CHECK(pool().taken_bytes() == 0);
}

TEST_CASE("a usage of kUsageBytes is read and one byte more is not, in one piece or in many") {
  for (const std::size_t more : {std::size_t{0}, std::size_t{1}}) {
    const std::string head = R"({"usage":{"prompt_tokens":5,"pad":")", tail = "\"}}";
    const std::size_t pad = nexus::kUsageBytes + more - (head.size() - 9) - (tail.size() - 1);
    const std::string text = head + std::string(pad, 'p') + tail;
    const std::int64_t prompt = more == 0 ? 5 : -1;
    CHECK(scan(text, Kind::json, false).usage.prompt_tokens == prompt);
    CHECK(scan(text, Kind::json, false, {100}).usage.prompt_tokens == prompt);
    CHECK(scan(text, Kind::json, false, byte_by_byte(text.size())).usage.prompt_tokens == prompt);
  }
}

TEST_CASE("a usage of 150 MB passes unchanged, and no more than kUsageBytes of it is captured") {
  for (const Kind kind : {Kind::json, Kind::event_stream}) {
    const bool stream = kind == Kind::event_stream;
    CAPTURE(stream);
    constexpr std::size_t kPieceBytes = 64u << 10, kPieces = 150'000'000 / kPieceBytes;
    constexpr std::size_t kMostBytes = 2 * (nexus::kUsageBytes + nexus::kHeldEventBytes);  // blocks are powers of two
    BlockPool blocks;
    UsageScan scan;
    scan.start(kind, &nexus::row_of(nexus::Dialect::openai).response, stream);
    std::size_t in = 0, out_bytes = 0, most = 0;
    const auto feed = [&](std::string_view text, bool last) {
      std::string piece(text);
      piece.resize(text.size() + nexus::kPaddingBytes);
      UsageScan::Out out;
      REQUIRE(scan.feed(blocks, reader(), piece.data(), text.size(), last, out));
      in += text.size();
      out_bytes += out.held.size() + out.piece.size();
      most = std::max(most, blocks.taken_bytes());
    };
    feed(std::string(stream ? "data: " : "") + R"({"usage":{"prompt_tokens":5,"pad":")", false);
    for (std::size_t i = 0; i < 40; ++i) feed(std::string(1000, 'p'), false);  // through the bound in small steps
    const std::string pad(kPieceBytes, 'p');
    for (std::size_t i = 0; i < kPieces; ++i) feed(pad, false);
    feed(std::string("\"}}") + (stream ? "\n\n" : ""), true);
    CHECK(out_bytes == in);
    CHECK(most <= kMostBytes);
    CHECK_FALSE(scan.usage().told());
    scan.drop_memory();
    CHECK(blocks.taken_bytes() == 0);
  }
}

TEST_CASE("a body of no kind goes on unread") {
  const std::string text = R"({"usage":{"prompt_tokens":5}})";
  const Result result = scan(text, Kind::none, false, {3, 9});
  CHECK(result.out == text);
  CHECK_FALSE(result.usage.told());
}

TEST_CASE("a stream loses the extra usage event and nothing else, however it is cut") {
  for (const char* line_end : {"\n", "\r\n", "\r"}) {
    CAPTURE(std::string(line_end).size());
    Stream stream;
    for (const Event& event : {kDelta, kExtra, kDone}) stream.add(event, line_end);
    check_stream(stream, true, counts(7, 5));
  }
}

TEST_CASE("which event is the extra one") {
  struct Row {
    const char* name;
    std::string text;
    bool extra;
    std::int64_t prompt;  // what the stream tells
  };
  const std::string usage = R"("usage":{"prompt_tokens":3})";
  const Row rows[] = {
      {"choices behind usage", "data: {" + usage + R"(,"choices": [ ] })" + "\n\n", true, 3},
      {"no space behind data", "data:{" + usage + R"(,"choices":[]})" + "\n\n", true, 3},
      {"two spaces behind data", "data:  {" + usage + R"(,"choices":[]})" + "\n\n", true, 3},
      {"a usage that tells nothing", "data: {\"usage\":{},\"choices\":[]}\n\n", true, -1},
      {"over several lines",
       "data: {\ndata: \"usage\"\ndata: :\ndata:{\"prompt_tokens\"\ndata: :3\ndata: }\ndata: "
       ",\"choices\":[\ndata\ndata: ]}\n\n",
       true, 3},
      {"a choice in it", "data: {" + usage + R"(,"choices":[{}]})" + "\n\n", false, 3},
      {"a choice that is a list", "data: {" + usage + R"(,"choices":[[]]})" + "\n\n", false, 3},
      {"a choice that is a string", "data: {" + usage + R"(,"choices":["]"]})" + "\n\n", false, 3},
      {"a choice that is a number", "data: {" + usage + R"(,"choices":[0]})" + "\n\n", false, 3},
      {"choices that are null", "data: {" + usage + R"(,"choices":null})" + "\n\n", true, 3},
      {"no choices", "data: {" + usage + "}\n\n", true, 3},
      {"OpenRouter's",
       R"(data: {"id":"gen-1","provider":"X","model":"m","object":"chat.completion.chunk","created":1,)" + usage +
           "}\n\n",
       true, 3},
      {"all that OpenAI sends",
       R"(data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","service_tier":"default",)"
       R"("system_fingerprint":"fp","choices":[],)" +
           usage + R"(,"obfuscation":"vL"})" + "\n\n",
       true, 3},
      {"an unknown member that is null", "data: {" + usage + R"(,"timings":null,"choices":[]})" + "\n\n", true, 3},
      {"choices twice, once full", "data: {" + usage + R"(,"choices":[1],"choices":[]})" + "\n\n", false, 3},
      {"deeper full choices", "data: {" + usage + R"(,"provider":{"choices":[1]},"choices":[]})" + "\n\n", true, 3},
      {"deeper usage",
       R"(data: {"x":{"usage":{"prompt_tokens":3}},"choices":[]})"
       "\n\n",
       false, -1},
      {"usage null",
       R"(data: {"usage":null,"choices":[]})"
       "\n\n",
       false, -1},
      {"usage null with spaces",
       R"(data: {"usage" : null,"choices":[]})"
       "\n\n",
       false, -1},
      {"usage null and then not", "data: {\"usage\":null," + usage + ",\"choices\":[]}\n\n", true, 3},
      {"no usage",
       R"(data: {"choices":[],"prompt_filter_results":[]})"
       "\n\n",
       false, -1},
      {"something behind the object", "data: {" + usage + R"(,"choices":[]} x)" + "\n\n", false, -1},
      {"two objects", "data: {" + usage + R"(,"choices":[]})" + "\ndata: {}\n\n", false, -1},
      {"an object that does not end", "data: {" + usage + R"(,"choices":[])" + "\n\n", false, -1},
      {"a list around it", "data: [{" + usage + R"(,"choices":[]}])" + "\n\n", false, -1},
      {"a key cut by a line end", "data: {\"usa\ndata: ge\":{\"prompt_tokens\":3},\"choices\":[]}\n\n", false, -1},
      {"a number cut by a line end", "data: {\"usage\":{},\"a\":1\ndata: 2,\"choices\":[]}\n\n", false, -1},
      {"a count cut by a line end", "data: {\"usage\":{\"prompt_tokens\":3\ndata: 4},\"choices\":[]}\n\n", true, 3},
      {"another field before it", "id: 1\ndata: {" + usage + R"(,"choices":[]})" + "\n\n", true, 3},
      {"another field behind it", "data: {" + usage + R"(,"choices":[]})" + "\nevent: usage\n\n", true, 3},
      {"a comment inside it", "data: {" + usage + "\n: comment\ndata: " + R"(,"choices":[]})" + "\n\n", true, 3},
      {"the beginning of a name behind it", "data: {" + usage + R"(,"choices":[]})" + "\ndat\n\n", true, 3},
      {"a longer name", "datax: {" + usage + R"(,"choices":[]})" + "\n\n", false, -1},
      {"a space before the colon", "data : {" + usage + R"(,"choices":[]})" + "\n\n", false, -1},
      {"only another field", "event: {" + usage + R"(,"choices":[]})" + "\n\n", false, -1},
      {"only comments", ": {" + usage + R"(,"choices":[]})" + "\n\n", false, -1},
      {"blank lines", "\n\n\n", false, -1},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    for (const char* line_end : {"\n", "\r\n", "\r"}) {
      Stream stream;
      stream.add(Event{row.text, row.extra}, line_end);
      stream.add(kDone, line_end);
      check_stream(stream, row.extra, counts(row.prompt, -1));
    }
  }
}

TEST_CASE("a usage event that holds more loses its usage and nothing else, and has a choice, however it is cut") {
  struct Row {
    const char* name;
    std::string text, kept;
  };
  const std::string usage = R"("usage":{"prompt_tokens":3,"details":{"a":[1,"}"]}})";
  const std::string timings = R"("timings":{"cache_n":0,"predicted_ms":12.5})";
  const std::string choice(UsageScan::kEmptyChoice);
  const Row rows[] = {
      {"llama.cpp's", R"(data: {"choices":[],"created":1,"id":"c",)" + usage + "," + timings + "}\n\n",
       R"(data: {"choices":[)" + choice + R"(],"created":1,"id":"c",)" + timings + "}\n\n"},
      {"choices behind usage", "data: {" + usage + "," + timings + ",\"choices\": [ ] }\n\n",
       "data: {" + timings + ",\"choices\": [ " + choice + "] }\n\n"},
      {"a usage shorter than a choice", R"(data: {"choices":[],"usage":{"prompt_tokens":3},)" + timings + "}\n\n",
       R"(data: {"choices":[],)" + timings + "}\n\n"},
      {"usage last", R"(data: {"choices":[],)" + timings + " , " + usage + " }\n\n",
       R"(data: {"choices":[)" + choice + "]," + timings + " }\n\n"},
      {"usage first", "data: { " + usage + " ," + timings + "}\n\n", "data: {" + timings + "}\n\n"},
      {"no choices", "data: {" + timings + "," + usage + "}\n\n", "data: {" + timings + "}\n\n"},
      {"other fields and comments", "id: 7\ndata: {" + usage + "," + timings + "}\n: c\nevent: e\n\n",
       "id: 7\ndata: {" + timings + "}\n: c\nevent: e\n\n"},
      {"over several lines", "data: {" + timings + ",\ndata: " + usage + ",\ndata: \"x\":1}\n\n",
       "data: {" + timings + ",\ndata: \"x\":1}\n\n"},
      {"over several lines, usage last", "data: {" + timings + "\ndata: ,\ndata: " + usage + "\ndata: }\n\n",
       "data: {" + timings + "\ndata: }\n\n"},
      {"a usage that is null before it", R"(data: {"usage":null,"x":1,)" + usage + "}\n\n",
       "data: {\"usage\":null,\"x\":1}\n\n"},
      {"deeper choices", "data: {" + usage + R"(,"x":{"choices":[]}})" + "\n\n", "data: {\"x\":{\"choices\":[]}}\n\n"},
      {"an error", R"(data: {"error":{"message":"m"},)" + usage + "}\n\n", "data: {\"error\":{\"message\":\"m\"}}\n\n"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    for (const char* line_end : {"\n", "\r\n", "\r"}) {
      Stream stream;
      stream.add(kDelta, line_end);
      const std::string text = with_line_ends(row.text, line_end), kept = with_line_ends(row.kept, line_end);
      stream.text += text;
      stream.kept += kept;
      stream.add(kDone, line_end);
      check_stream(stream, true, counts(3, -1));
    }
  }
}

TEST_CASE("random members of a usage event: one that holds only what such events have goes, others lose the usage") {
  std::mt19937 random(5);
  const auto draw = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  const std::string usage = R"("usage" : {"prompt_tokens":7,"x":{"y":"\"}"}})";
  const char* known[] = {R"("id":"a,\"}{")",     R"("object":"o")",   R"("created":17)",   R"("model":"m")",
                         R"("choices": [ ])",    R"("choices":null)", R"("provider":"p")", R"("service_tier":null)",
                         R"("obfuscation":"x")", R"("timings":null)"};
  const char* unknown[] = {R"("timings":{"a":[1,{}],"usage":{"prompt_tokens":9}})",
                           R"("x":true)",
                           R"("idx":"n")",
                           R"("x_groq":[])",
                           R"("system_fingerprints":0)",
                           R"("":"")"};
  int cut = 0, removed = 0;
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::string> members;
    for (std::size_t n = draw(5); n > 0; --n) members.push_back(known[draw(std::size(known))]);
    const std::size_t more = draw(3);
    for (std::size_t n = more; n > 0; --n) {
      members.insert(members.begin() + static_cast<std::ptrdiff_t>(draw(members.size() + 1)),
                     unknown[draw(std::size(unknown))]);
    }
    const std::size_t place = draw(members.size() + 1);
    const auto object = [&](bool with_usage) {
      std::string text;
      for (std::size_t i = 0; i <= members.size(); ++i) {
        if (with_usage && i == place) text.append(text.empty() ? "" : ",").append(usage);
        if (i < members.size()) text.append(text.empty() ? "" : ",").append(members[i]);
      }
      const std::size_t no_choice = text.rfind("[ ]");
      if (!with_usage && no_choice != std::string::npos) text.insert(no_choice + 2, UsageScan::kEmptyChoice);
      return "{" + text + "}";
    };
    const std::string line_end = draw(2) == 0 ? "\n" : "\r\n";
    const auto event = [&](bool with_usage) { return "data: " + object(with_usage) + line_end + line_end; };
    const std::string text = kDelta.text + event(true) + kDone.text;
    const std::string kept = kDelta.text + (more > 0 ? event(false) : "") + kDone.text;
    std::vector<std::size_t> ends;
    for (std::size_t at = 0; at < text.size();) ends.push_back(at = std::min(text.size(), at + 1 + draw(90)));
    CAPTURE(text);
    const Result result = scan(text, Kind::event_stream, true, ends);
    REQUIRE(result.fed);
    REQUIRE(result.out == kept);
    REQUIRE(result.usage.prompt_tokens == 7);
    REQUIRE(scan(text, Kind::event_stream, false, ends).out == text);
    (more > 0 ? cut : removed) += 1;
  }
  CHECK(cut > 500);
  CHECK(removed > 500);
  CHECK(pool().taken_bytes() == 0);
}

TEST_CASE("an event is judged alike where the stream ends within it") {
  const std::string extra = R"(data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}})";
  for (const std::string& end : {std::string(), std::string("\n"), std::string("\r"), std::string("\r\n")}) {
    Stream stream;
    stream.add(kDelta, "\n");
    stream.text += extra + end;
    check_stream(stream, true, counts(7, 5));
  }
  for (std::size_t bytes = 0; bytes < extra.size(); ++bytes) {  // a part of it is no object, and goes on
    Stream stream;
    stream.add(kDelta, "\n");
    stream.text += extra.substr(0, bytes);
    stream.kept = stream.text;
    for (const std::size_t cut : {std::size_t{0}, stream.text.size() - bytes / 2}) {
      const Result result = scan(stream.text, Kind::event_stream, true, {cut});
      CHECK(result.out == stream.kept);
      CHECK_FALSE(result.removed);
    }
  }
}

TEST_CASE("what stands around the extra event stays: byte order mark, comments, blank lines") {
  const std::string bytes = kExtra.text;
  struct Row {
    std::string before, behind;
  };
  const Row rows[] = {{"\xef\xbb\xbf", ""},   {"\n", ""},          {": ping\n", ": ping\n\n"},
                      {": ping\n\n", "\n"},   {"", "\n\n\n"},      {"\xef\xbb\xbf:\n", "data: x"},
                      {"retry: 3\n\n", "id"}, {"data\n\n", "dat"}, {"\r\n: a\r\n\r\n", "\r"}};
  for (const Row& row : rows) {
    Stream stream;
    stream.text = row.before + bytes + row.behind;
    stream.kept = row.before + row.behind;
    check_stream(stream, true, counts(7, 5));
  }
  for (const char* mark : {"\xef", "\xef\xbb", "\xef\xbb\xbe", "\xef\xbb\xbf\xef\xbb\xbf"}) {  // no such mark
    Stream stream;
    stream.text = stream.kept = mark + bytes;
    check_stream(stream, false, counts(-1, -1));
  }
}

TEST_CASE("the last event with a usage gives the counts") {
  Stream stream;
  stream.add({R"(data: {"choices":[{}],"usage":{"prompt_tokens":1,"completion_tokens":1}})"
              "\n\n"},
             "\n");
  stream.add({R"(data: {"choices":[{}],"usage":{"prompt_tokens":1,"completion_tokens":2}})"
              "\n\n"},
             "\n");
  stream.add({R"(data: {"choices":[{}],"usage":null})"
              "\n\n"},
             "\n");
  check_stream(stream, false, counts(1, 2));
}

TEST_CASE("an event is held no longer than it may be the extra one") {
  struct Row {
    const char* name;
    std::string text;
    std::size_t ruled_out;  // so many of its bytes show that it is another one
  };
  const Row rows[] = {
      {"a choice", R"(data: {"id":1,"choices":[{"index":0}]})", std::string(R"(data: {"id":1,"choices":[{)").size()},
      {"no object", "data: [DONE]", 7},
      {"a comment", ": ping", 0},
      {"no list of choices", R"(data: {"choices":0)", std::string(R"(data: {"choices":0)").size()},
      {"an object without usage",
       R"(data: {"error":{}})"
       "\n",
       std::string(R"(data: {"error":{}})").size()},
  };
  for (const Row& row : rows) {
    CAPTURE(row.name);
    const Result result = scan(row.text, Kind::event_stream, true, byte_by_byte(row.text.size()));
    CHECK(result.out == row.text);
    for (std::size_t came = 1; came <= row.text.size(); ++came) {
      const std::size_t sent = result.sent[came - 1];
      CHECK(sent == (came >= row.ruled_out ? came : 0));
    }
  }
}

TEST_CASE("an event of kHeldEventBytes may be the extra one, a larger one goes on") {
  const std::string head = R"(data: {"id":")", tail = R"(","choices":[],"usage":{"prompt_tokens":2}})";
  for (const std::size_t more : {std::size_t{0}, std::size_t{1}}) {
    const std::size_t line = nexus::kHeldEventBytes - 8 + more;  // the text, without what makes it a line
    const std::string pad(line - (head.size() - 6) - tail.size(), 'p');
    const std::string text = head + pad + tail + "\r\n\r\n";
    for (const auto& ends : {std::vector<std::size_t>{}, {5000}, {text.size() - 1}, byte_by_byte(text.size())}) {
      const Result result = scan(text, Kind::event_stream, true, ends);
      CHECK(result.removed == (more == 0));
      CHECK(result.out == (more == 0 ? "" : text));
      CHECK(result.usage.prompt_tokens == 2);
      CHECK(result.most_held <= nexus::kHeldEventBytes + 4);
    }
  }
  std::string lines;  // lines without text count as well
  for (int i = 0; i < 5000; ++i) lines += "data:\n";
  CHECK(scan(lines, Kind::event_stream, true, byte_by_byte(lines.size())).most_held <= nexus::kHeldEventBytes);
}

TEST_CASE("an event of any size is read where it is not held") {
  std::string text = R"(data: {"choices":[{"delta":{"content":")";
  text.append(300'000, 'x');
  text += R"("}}],"usage":{"prompt_tokens":2,"completion_tokens":9}})"
          "\n\n";
  for (const std::size_t cut : {std::size_t{0}, std::size_t{50}, std::size_t{200'000}, text.size() - 30}) {
    for (const bool removing : {false, true}) {
      const Result result = scan(text, Kind::event_stream, removing, {cut});
      CHECK(result.out == text);
      CHECK(result.usage.completion_tokens == 9);
      CHECK(result.most_held < 100);
    }
  }
}

TEST_CASE("a scan that starts again knows nothing of its last body") {
  UsageScan scan;
  UsageScan::Out out;
  std::string piece = R"(data: {"usage":{"prompt_tokens":1,)" + std::string(nexus::kPaddingBytes, ' ');
  const std::size_t bytes = piece.size() - nexus::kPaddingBytes;
  scan.start(Kind::event_stream, &nexus::row_of(nexus::Dialect::openai).response, true);
  REQUIRE(scan.feed(pool(), reader(), piece.data(), bytes, false, out));
  CHECK(scan.held_bytes() == bytes);
  scan.start(Kind::json, &nexus::row_of(nexus::Dialect::openai).response, false);
  CHECK(scan.held_bytes() == 0);
  CHECK(pool().taken_bytes() == 0);
  piece = R"({"usage":{"prompt_tokens":4}})" + std::string(nexus::kPaddingBytes, ' ');
  REQUIRE(scan.feed(pool(), reader(), piece.data(), piece.size() - nexus::kPaddingBytes, false, out));
  CHECK(scan.usage().prompt_tokens == 4);
}

TEST_CASE("random streams lose their extra events and nothing else") {
  // Streams of events of every sort, with a line end drawn for each, cut at random places.
  std::mt19937 random(20240611);
  const auto draw = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  const Event sorts[] = {kDelta,
                         kExtra,
                         kDone,
                         {": keep-alive\n\n"},
                         {"\n"},
                         {"event: ping\ndata: {}\n\n"},
                         {R"(data: {"error":{"message":"no"}})"
                          "\n\n"},
                         {R"(data: {"choices":[],"usage":null})"
                          "\n\n"},
                         {R"(data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":7,"completion_tokens":5}})"
                          "\n\n"},
                         {"data: {\"choices\":[],\ndata: \"usage\":{\"prompt_tokens\":7,\ndata: "
                          "\"completion_tokens\":5}}\n\n",
                          true}};
  for (int round = 0; round < 3000; ++round) {
    Stream stream;
    bool removed = false, told = false;
    for (std::size_t n = 1 + draw(8); n > 0; --n) {
      const std::size_t sort = draw(std::size(sorts));
      constexpr const char* kLineEnds[] = {"\n", "\r\n", "\r"};
      stream.add(sorts[sort], kLineEnds[draw(2)]);  // a lone CR before a LF would be one line end
      removed = removed || sorts[sort].extra;
      told = told || sorts[sort].extra || sort == 8;
    }
    std::vector<std::size_t> ends;
    for (std::size_t at = 0; at < stream.text.size();)
      ends.push_back(at = std::min(stream.text.size(), at + draw(120)));
    CAPTURE(round);
    const Result result = scan(stream.text, Kind::event_stream, true, ends);
    REQUIRE(result.out == stream.kept);
    REQUIRE(result.removed == removed);
    REQUIRE(result.usage.prompt_tokens == (told ? 7 : -1));
    for (std::size_t i = 0; i < ends.size(); ++i) REQUIRE(result.sent[i] >= owed(stream, ends[i]));
  }
}

TEST_CASE("arbitrary bytes are read alike however they are cut, and nothing is added to them") {
  // Tokens that matter in either kind of body, strung together at random: mostly nonsense, sometimes an event.
  constexpr std::string_view kTokens[] = {"data",
                                          ":",
                                          " ",
                                          "data: ",
                                          "{",
                                          "}",
                                          "[",
                                          "]",
                                          "\"",
                                          "\\",
                                          "\"usage\"",
                                          "\"choices\"",
                                          "null",
                                          "\n",
                                          "\r",
                                          ",",
                                          "7",
                                          "\xef",
                                          "\xbb\xbf",
                                          "\n\ndata: {",
                                          "\"usage\":{\"prompt_tokens\":7}",
                                          "\"prompt_tokens\":",
                                          "[]",
                                          "{}",
                                          "x",
                                          "\n\n",
                                          "\"choices\":[],\"usage\":{}}",
                                          "\r\n\r\n"};
  std::mt19937 random(7);
  const auto draw = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  int removals = 0, tellings = 0;
  for (int round = 0; round < 6000; ++round) {
    std::string text = draw(2) == 0 ? kExtra.text + kDelta.text : "";
    for (std::size_t n = text.empty() ? 0 : draw(4); n > 0; --n) {  // an event with a few tokens in the wrong place
      text.replace(draw(text.size()), draw(3), kTokens[draw(std::size(kTokens))]);
    }
    if (draw(2) == 0) text += "data: {";
    for (std::size_t n = draw(40); n > 0; --n) text += kTokens[draw(std::size(kTokens))];
    const Kind kind = draw(3) == 0 ? Kind::json : Kind::event_stream;
    const bool removing = kind == Kind::event_stream && draw(4) != 0;
    const Result whole = scan(text, kind, removing);
    CAPTURE(text);
    REQUIRE(whole.fed);
    std::string left = whole.out;
    for (std::size_t at; (at = left.find(UsageScan::kEmptyChoice)) != std::string::npos;)
      left.erase(at, UsageScan::kEmptyChoice.size());
    REQUIRE(is_subsequence(left, text));
    if (!whole.removed) REQUIRE(whole.out == text);
    REQUIRE(scan(text, kind, removing, byte_by_byte(text.size())) == whole);
    for (int cuts = 0; cuts < 4; ++cuts) {
      const std::size_t one = draw(text.size() + 1), two = one + draw(text.size() - one + 1);
      REQUIRE(scan(text, kind, removing, {one, two}) == whole);
    }
    removals += whole.removed ? 1 : 0;
    tellings += whole.usage.told() ? 1 : 0;
  }
  CHECK(removals > 500);  // the nonsense was not all nonsense
  CHECK(tellings > 500);
  CHECK(pool().taken_bytes() == 0);
}

TEST_CASE("the events of a stream, its errors and its end mark are the same at every cut and with every line end") {
  struct Row {
    const char* name;
    std::string text;
    std::uint64_t events;
    bool error, ended;
  };
  const std::string token = R"(data: {"choices":[{"index":0,"delta":{"content":"a text of a usual length"}}]})"
                            "\n\n";
  const std::string done = "data: [DONE]\n\n";
  const Row rows[] = {
      {"nothing", "", 0, false, false},
      {"comments", ": ping\n\n:\n\n", 0, false, false},
      {"fields without data", "event: x\nid: 1\n\nretry: 10\n\n", 0, false, false},
      {"tokens and the end mark", ": hi\n\n" + token + token + done, 3, false, true},
      {"no end mark", token, 1, false, false},
      {"an end mark without a blank", token + "data:[DONE]\n\n", 2, false, true},
      {"an end mark without a blank line", token + "data: [DONE]", 2, false, true},
      {"nearly an end mark", "data: [DONE]x\n\ndata: [DON\n\ndata: [DO\ndata: NE]\n\n", 3, false, false},
      {"an error alone", "data: {\"error\":{\"message\":\"m\",\"code\":500}}\n\n", 1, true, false},
      {"an error behind tokens", token + "data: {\"error\": {\"message\":\"a long enough text\"}}\n\n", 2, true, false},
      {"an error that is a text", token + "data: {\"error\":\"a long enough text, as Ollama has it\"}\n\n", 2, true,
       false},
      {"an error that is null", "data: {\"choices\":[],\"error\": null,\"x\":\"long enough\"}\n\n", 1, false, false},
      {"an error within", "data: {\"choices\":[{\"error\":{}}],\"x\":\"long enough\"}\n\n", 1, false, false},
      {"an error within a text",
       R"(data: {"x":"{\"error\":{}} and more of it"})"
       "\n\n",
       1, false, false},
      {"an error that is no object as a whole", "data: {\"error\":{\"message\":\"a long enough text\"}\n\n", 1, false,
       false},
      {"an error event", "event: error\ndata: {\"message\":\"a long enough text\"}\n\n", 1, true, false},
      {"an error event without a blank", token + "event:error\ndata: x\n\n", 2, true, false},
      {"an error event behind its data", "data: {\"message\":\"a long enough text\"}\nevent: error\n\n", 1, true,
       false},
      {"nearly an error event", "event: errors\ndata: x\n\nevent: erro\ndata: x\n\nevent:  error\ndata: x\n\n", 3,
       false, false},
      {"a field named error", "error: {\"code\":500,\"message\":\"a long enough text\"}\n\n", 1, true, false},
      {"nearly a field named error", "errors: x\n\nerror\n\nerr: x\n\n", 0, false, false},
  };
  for (const Row& row : rows) {
    for (const std::string_view line_end : {"\n", "\r\n", "\r"}) {
      CAPTURE(std::string(row.name));
      const std::string text = with_line_ends(row.text, line_end);
      bool right = true;
      for_every_cut(text.size(), [&](const std::vector<std::size_t>& ends) {
        UsageScan scan;
        scan.start(Kind::event_stream, &nexus::row_of(nexus::Dialect::openai).response, false);
        UsageScan::Out out;
        std::size_t from = 0;
        for (const std::size_t end : ends) {
          std::string piece = text.substr(from, end - from);
          piece.resize(piece.size() + nexus::kPaddingBytes, 'e');
          scan.feed(pool(), reader(), piece.data(), end - from, false, out);
          from = end;
        }
        scan.feed(pool(), reader(), nullptr, 0, true, out);
        right =
            right && scan.events() == row.events && scan.told_error() == row.error && scan.ended_well() == row.ended;
      });
      CHECK(right);
    }
  }
}
