// prober.h
// Owns:     probes: asking a backend whether it is well and which models it has, in one short HTTP exchange or two;
//           and fetching one page, or posting one JSON text.
// Promises: every probe ends within its timeout with exactly one result, unless it is cancelled; its memory is bounded;
//           the addresses of a backend are tried in turn until the probe passes at one. What is posted may have
//           reached one address only.
// Leaves:   when to probe, and the consequences, to control.h; the state of a backend to registry.h.
// Threads:  the control thread; the main thread of `nexus check`.
// Tested by: tests/prober_test.cpp
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/model_list.h"
#include "nexus/base/limits.h"
#include "nexus/base/object_pool.h"
#include "nexus/fleet/registry.h"
#include "nexus/http/body_framing.h"
#include "nexus/http/head_writer.h"
#include "nexus/net/connection.h"
#include "nexus/net/timer_wheel.h"

namespace nexus {

constexpr std::uint8_t kProbeKind = 10;  // of a Handle
constexpr std::size_t kProbeReadBytes = 32u << 10;
constexpr std::string_view kAnswerCutShort = "its answer was cut short";

struct ProbeResult {
  std::uint64_t epoch = 0;  // of the probed backend
  bool passed = false;
  Address address;     // where it passed
  std::string reason;  // why it failed; if it passed, why its models could not be read, or not all of them
  bool connected = false;
  std::uint16_t status = 0;  // of the last response; 0: none
  Ns round_trip_ns = 0;
  std::optional<std::uint64_t> retry_after_s;  // told by the last response
  bool models_read = false;
  bool is_nexus = false;    // /health is that of a Nexus, which answers as each kind of backend does
  bool models_cut = false;  // the list has more than kMaxModelsPerBackend models or kMaxProbeBytes bytes
  std::array<std::uint8_t, kTlsOutcomes> handshakes{};  // of TLS, by outcome
  std::string_view lack;  // of this host, a constant text: then nothing but passed == true has a meaning
  ListedModels models;
  std::string page;
};

struct ProbeOrder {
  std::uint64_t epoch = 0;
  BackendKind kind = BackendKind::generic;
  std::vector<Address> addresses;        // the first is tried first
  std::shared_ptr<const TlsClient> tls;  // null: in clear
  std::string host;
  std::string base_path;
  std::string lines;  // fields, whole lines
  bool wants_models = true;
  bool any_answer = false;  // any but a 5xx proves that the backend lives: its models are known without it
  bool has_key = false;     // `lines` holds one of Nexus's own: an answer 401 means that requests would fail too
  std::string page;         // a path that is requested instead: the result is its content
  std::shared_ptr<const std::string> posted;  // JSON for that path; any answer passes then. Null: it is fetched
  std::size_t max_bytes = kMaxProbeBytes;
  Ns timeout_ns = 0;
};

// A probe of a backend as it is configured, models included.
inline ProbeOrder order_of(const BackendSettings& backend, std::vector<Address> addresses, std::uint64_t epoch,
                           Ns timeout_ns) {
  ProbeOrder order;
  order.epoch = epoch;
  order.kind = backend.kind;
  order.addresses = std::move(addresses);
  order.tls = backend.tls.context;
  order.host = host_of(backend);
  order.base_path = backend.base_path;
  order.lines = key_lines_of(backend).append(row_of(backend.kind).check_lines);
  order.any_answer = !backend.models.empty();
  order.has_key = !backend.api_key.empty();
  order.timeout_ns = timeout_ns;
  return order;
}

template <class Net>
class Prober {
 public:
  Prober(Net& net, TimerWheel& wheel, BlockPool& blocks, JsonReader& json)
      : net_(net), wheel_(wheel), blocks_(blocks), json_(json), probes_(kProbeKind) {}
  ~Prober() {
    probes_.each([this](Probe& probe) { drop(probe); });
  }

  // Starts a probe. Its result comes from here, from on_event() or from on_deadline(), as done(ProbeResult&&).
  template <class Done>
  void start(const ProbeOrder& order, Ns now, Done&& done) {
    Probe* probe = probes_.make(order, now);
    if (probe == nullptr) {
      ProbeResult result;
      result.epoch = order.epoch;
      note_no_memory(result);
      return done(std::move(result));
    }
    step(probe->token, now, done, [this](Probe& begun) { return !connect_next(begun); });
  }

  // Ends the probes of `epoch` without a result.
  void cancel(std::uint64_t epoch) {
    probes_.each([&](Probe& probe) {
      if (probe.order.epoch == epoch) drop(probe);
    });
  }

  template <class Done>
  void on_event(const Event& event, Ns now, Done&& done) {
    step(event.token, now, done, [&](Probe& probe) {
      probe.connection.note(event);
      if (!probe.asked) {
        const IoResult established = probe.connection.establish(net_);
        if (established.kind == IoResult::Kind::again) return false;
        count_handshake(probe);
        if (!established.ok()) return end_unconnected(probe, established);
        ask(probe);
      }
      if (event.writable) probe.connection.flush(net_);
      return read(probe);
    });
  }

  template <class Done>
  void on_deadline(Handle token, Ns now, Done&& done) {
    step(token, now, done, [&](Probe& probe) {
      if (probe.asked) return end(probe, "no answer in time");
      count_handshake(probe);
      return end(probe, probe.connection.handshaking() ? "no TLS handshake in time: does it speak TLS on this port?"
                                                       : "no connection in time");
    });
  }

 private:
  struct Probe {
    Probe(Handle token_in, const ProbeOrder& order_in, Ns now)
        : token(token_in),
          order(order_in),
          row(row_of(order_in.kind)),
          timer(token_in),
          now_ns(now),
          started_ns(now),
          deadline_ns(deadline_after(now, order_in.timeout_ns)) {
      result.epoch = order.epoch;
    }
    Handle token;
    ProbeOrder order;
    const BackendKindRow& row;
    Connection<Net> connection;
    Timer timer;
    Ns now_ns;  // of the present step
    Ns started_ns;
    Ns deadline_ns;         // of the probe
    std::size_t tried = 0;  // addresses; the last of them is in use
    bool asked = false;     // the connection is established, and the request is on its way
    bool second = false;    // the health request passed, and the models are requested now
    bool head_done = false;
    std::uint32_t interim_heads = 0;
    Buffer input;
    FieldTable fields;
    ResponseReader reader;
    ResponseHead head;
    BodyDecoder body;
    std::size_t body_bytes = 0;  // decoded, behind the head in `input`
    ProbeResult result;

    // True if the current request is for the models.
    bool asks_for_models() const { return order.wants_models && (second || row.models_path == row.health_path); }
    bool connected() const { return asked || second; }
    std::uint16_t status() const { return head_done ? head.status : std::uint16_t{0}; }
  };

  // Runs `work`, which returns true if the probe is over, and then reports the result.
  template <class Done, class Work>
  void step(Handle token, Ns now, Done&& done, Work&& work) {
    Probe* probe = probes_.get(token);
    if (probe == nullptr) return;
    probe->now_ns = now;
    try {
      if (!work(*probe)) return;
    } catch (const std::bad_alloc&) {
      note_no_memory(probe->result);
    }
    ProbeResult result = std::move(probe->result);
    if (result.passed) {
      result.connected = true;
      result.status = probe->status();
    }
    drop(*probe);
    done(std::move(result));
  }

  static void count_handshake(Probe& probe) {
    const std::optional<TlsOutcome> outcome = probe.connection.handshake_outcome();
    if (outcome) probe.result.handshakes[static_cast<std::size_t>(*outcome)] += 1;
  }

  bool end_unconnected(Probe& probe, const IoResult& failure) {
    const std::string why(probe.connection.why(failure));
    const bool lacks_memory = probe.connection.out_of_memory();
    const bool by_tls = probe.connection.handshake_outcome().has_value();
    return end(probe, by_tls ? why : "connect: " + why, lacks_memory ? lack_of(SocketOutcome::no_memory) : "");
  }

  // If the health request passed, `passed` stays true.
  static void note_no_memory(ProbeResult& result) {
    result.lack = lack_of(SocketOutcome::no_memory);
    result.models_read = result.models_cut = false;
    result.reason = "out of memory";  // short enough to be stored without an allocation
  }

  // The probe failed at this address, for want of what `lack` names if that is not empty. True if it is over, false if
  // another address is tried. The result is of the address that got furthest; a backend's failure precedes a lack.
  bool end(Probe& probe, std::string_view reason, std::string_view lack = {}) {
    ProbeResult& result = probe.result;
    const bool first = result.reason.empty(), further = probe.connected() && !result.connected;
    if (first || further || (lack.empty() && !result.lack.empty())) {
      result.reason = reason;
      result.lack = lack;
      result.connected = probe.connected();
      result.status = probe.status();
    }
    const bool sent = probe.order.posted != nullptr && probe.asked;
    if (result.passed || sent || probe.now_ns >= probe.deadline_ns) return true;
    return !connect_next(probe);
  }

  // False if there is no other address. Each gets an equal share of the time that is left for connecting.
  bool connect_next(Probe& probe) {
    if (probe.tried == probe.order.addresses.size()) return false;
    const auto left = static_cast<Ns>(probe.order.addresses.size() - probe.tried);
    probe.tried += 1;
    wheel_.arm(probe.timer, probe.now_ns + (probe.deadline_ns - probe.now_ns) / left);
    return connect(probe);
  }

  // False if the probe is over.
  bool connect(Probe& probe) {
    if (probe.connection.is_open()) probe.connection.close(net_);
    probe.asked = probe.head_done = false;
    probe.interim_heads = 0;
    probe.input.clear();
    probe.reader.start(&probe.fields);
    const Address& address = probe.order.addresses[probe.tried - 1];
    const SocketOutcome outcome = probe.connection.connect(net_, address, probe.token, probe.order.tls);
    if (outcome == SocketOutcome::ok) return true;
    const std::string_view lack = lack_of(outcome);
    return !end(probe, lack.empty() ? "the connection was refused at once" : lack, lack);
  }

  void ask(Probe& probe) {
    const std::string* const posted = probe.order.posted.get();
    std::string head = (posted == nullptr ? "GET " : "POST ") + probe.order.base_path;
    const std::string_view path = probe.second ? probe.row.models_path : probe.row.health_path;
    head.append(probe.order.page.empty() ? path : probe.order.page).append(" HTTP/1.1\r\n");
    detail::append_field(head, "Host", probe.order.host);
    detail::append_field(head, "User-Agent", std::string("nexus/").append(kVersion));
    detail::append_field(head, "Accept", "application/json");
    if (posted != nullptr) {
      detail::append_field(head, "Content-Type", "application/json");
      detail::append_field(head, "Content-Length", Digits(posted->size()).view());
    }
    head += probe.order.lines;
    head += "Connection: close\r\n\r\n";
    probe.asked = true;
    wheel_.arm(probe.timer, probe.deadline_ns);
    probe.connection.write(net_, blocks_, head);  // reading the response reports a failure
    if (posted != nullptr) probe.connection.write(net_, blocks_, *posted);
  }

  // True if the probe is over.
  bool read(Probe& probe) {
    while (probe.connection.may_read()) {
      if (probe.input.size() > probe.order.max_bytes) {
        probe.result.models_cut = probe.asks_for_models();
        return end(probe, "its answer is too large");
      }
      if (!probe.input.reserve(blocks_, std::max(kProbeReadBytes, probe.input.size()))) throw std::bad_alloc();
      const IoResult result = probe.connection.read(net_, probe.input.tail(), probe.input.room());
      if (result.kind == IoResult::Kind::again) return false;
      if (result.kind == IoResult::Kind::failed)
        return end(probe, "read: " + std::string(probe.connection.why(result)));
      const bool ended = result.kind == IoResult::Kind::eof;
      if (!ended) probe.input.commit(result.bytes);
      if (const std::optional<bool> over = parse(probe, ended)) return *over;
    }
    return false;
  }

  // True if the probe is over; nothing if more of the response must be read.
  std::optional<bool> parse(Probe& probe, bool ended) {
    const bool alert = probe.input.view().starts_with("\x15\x03");  // a record of TLS
    const std::string_view invalid =
        alert ? "it speaks TLS on this port: use https://" : "its answer is not valid HTTP";
    constexpr std::string_view cut = kAnswerCutShort;
    while (!probe.head_done) {
      const HeadResult result = probe.reader.feed(probe.input.data(), probe.input.size(), probe.head);
      if (result.status == HeadResult::Status::failed) return end(probe, invalid);
      if (result.status == HeadResult::Status::need_more) return ended ? std::optional(end(probe, cut)) : std::nullopt;
      probe.head_done = probe.head.status >= 200;
      if (!probe.head_done && !skip_interim(probe)) return end(probe, invalid);
      probe.body.start(probe.head.framing);
      probe.body_bytes = 0;
    }
    const std::size_t decoded_end = probe.head.head_bytes + probe.body_bytes;
    const BodyDecoder::Piece piece =
        probe.body.feed(probe.input.data() + decoded_end, probe.input.size() - decoded_end);
    probe.body_bytes += piece.bytes;
    probe.input.truncate(decoded_end + piece.bytes);
    if (piece.failed) return end(probe, invalid);
    if (piece.done || (ended && probe.body.ends_with_connection())) return on_answer(probe);
    if (ended) return end(probe, cut);
    return std::nullopt;
  }

  // RFC 9110 15.2: drops a head that comes before the final one. False if it can't be one.
  static bool skip_interim(Probe& probe) {
    if (probe.head.status == 101 || ++probe.interim_heads > kMaxInterimHeads) return false;
    probe.input.consume(probe.head.head_bytes);
    probe.reader.start(&probe.fields);
    return true;
  }

  // True if the probe is over.
  bool on_answer(Probe& probe) {
    const std::uint16_t status = probe.head.status;
    const bool good = status / 100 == 2;
    const bool posted = probe.order.posted != nullptr;
    const bool refused = status == 401 && probe.order.has_key;
    const bool lives = good || posted || (probe.order.any_answer && !probe.second && status < 500 && !refused);
    const std::string refusal =
        good ? "" : (probe.second ? "its list of models answered " : "it answered ") + std::to_string(status);
    if (!lives) return end(probe, refusal);
    if (!probe.second) note_passed(probe);
    const bool health = !probe.second && probe.order.page.empty() && probe.row.health_path == "/health";
    if (health) probe.result.is_nexus = body_of(probe).find(R"("uptime_seconds":)") != std::string_view::npos;
    if (!probe.order.page.empty()) probe.result.page.assign(body_of(probe));
    if (posted) note_retry_after(probe);
    if (!probe.order.wants_models) return true;
    if (!good) return end(probe, refusal);
    if (!probe.asks_for_models()) {
      probe.second = true;
      return !connect(probe);
    }
    read_models(probe);
    return true;
  }

  static void note_passed(Probe& probe) {
    ProbeResult& result = probe.result;
    result.passed = true;
    result.reason.clear();
    result.lack = {};
    result.address = probe.order.addresses[probe.tried - 1];
    result.round_trip_ns = probe.now_ns - probe.started_ns;
  }

  // If it is told in seconds.
  static void note_retry_after(Probe& probe) {
    const FieldRow* const row = find_field(probe.fields, Field::retry_after);
    if (row != nullptr) probe.result.retry_after_s = parse_decimal(value_of(probe.input.data(), *row));
  }

  static std::string_view body_of(const Probe& probe) {
    return probe.input.view().substr(probe.head.head_bytes, probe.body_bytes);
  }

  void read_models(Probe& probe) {
    ProbeResult& result = probe.result;
    ModelList list = nexus::read_models(json_, body_of(probe), kMaxModelsPerBackend);
    if (list.status == ModelList::Status::out_of_memory) throw std::bad_alloc();
    result.models_read = list.status == ModelList::Status::read;
    result.models_cut = list.more;
    result.models = std::move(list.models);
    if (!result.models_read) {
      result.reason = "its list of models could not be read";
    } else if (list.more) {
      result.reason = "it lists too many models: the rest is left out";
    } else if (list.unreadable > 0) {
      result.reason = std::to_string(list.unreadable) + " entries of its list of models have no readable name";
    } else if (list.shortened) {
      result.reason = "entries of its list of models are too large, or no valid JSON: plain ones replace them";
    }
  }

  void drop(Probe& probe) {
    if (probe.connection.is_open()) probe.connection.close(net_);
    probes_.destroy(probe.token);
  }

  Net& net_;
  TimerWheel& wheel_;
  BlockPool& blocks_;
  JsonReader& json_;
  SlotMap<Probe> probes_;
};

}  // namespace nexus
