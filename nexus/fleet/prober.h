// prober.h
// Owns:     asking a backend how it is and which models it has: one probe is one short HTTP exchange, or two.
// Promises: every probe ends within its time with exactly one result; what it may hold is bounded.
// Leaves:   when to ask and what follows to control.h; the state of a backend to registry.h.
// Threads:  the control thread's.
#pragma once

#include <array>
#include <cassert>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "nexus/api/request_json.h"
#include "nexus/base/object_pool.h"
#include "nexus/fleet/registry.h"
#include "nexus/http/body_framing.h"
#include "nexus/http/head_writer.h"
#include "nexus/net/connection.h"
#include "nexus/net/timer_wheel.h"

namespace nexus {

constexpr std::uint8_t kProbeKind = 10;  // of a Handle
constexpr std::size_t kMaxProbeBytes = 16u << 20;
constexpr std::size_t kProbeReadBytes = 32u << 10;

// How a kind of backend is asked. Both paths the same: one exchange does for both.
struct ProbePaths {
  BackendKind kind;
  std::string_view health;
  std::string_view models;
};

inline constexpr std::array<ProbePaths, 8> kProbePaths{{
    {BackendKind::ollama, "/api/tags", "/api/tags"},
    {BackendKind::vllm, "/v1/models", "/v1/models"},
    {BackendKind::llamacpp, "/health", "/v1/models"},
    {BackendKind::lmstudio, "/v1/models", "/v1/models"},
    {BackendKind::openai, "/v1/models", "/v1/models"},
    {BackendKind::exo, "/v1/models", "/v1/models"},
    {BackendKind::generic, "/v1/models", "/v1/models"},
    {BackendKind::echo, "/v1/models", "/v1/models"},
}};

constexpr const ProbePaths& probe_paths(BackendKind kind) {
  const ProbePaths& row = kProbePaths[static_cast<std::size_t>(kind)];
  assert(row.kind == kind);
  return row;
}

struct ProbeResult {
  std::uint64_t epoch = 0;  // of the backend that was asked
  bool passed = false;
  std::string reason;  // why it did not pass; or, where it did, why its models could not be read
  bool connected = false;
  std::uint16_t status = 0;  // of its last answer; 0: none came
  Ns round_trip_ns = 0;
  bool models_read = false;
  bool models_cut = false;     // it lists more than kMaxModelsPerBackend, or in more than kMaxProbeBytes
  bool out_of_memory = false;  // then `passed` alone says something, and only where it is true
  std::vector<std::string> models;
};

// What a probe is to ask.
struct ProbeOrder {
  std::uint64_t epoch = 0;
  BackendKind kind = BackendKind::generic;
  Address address;
  std::string host;
  std::string base_path;
  std::string authorization;
  bool wants_models = true;
  Ns timeout_ns = 0;
};

template <class Net>
class Prober {
 public:
  Prober(Net& net, TimerWheel& wheel, BlockPool& blocks, JsonReader& json)
      : net_(net), wheel_(wheel), blocks_(blocks), json_(json), probes_(kProbeKind) {}
  Prober(const Prober&) = delete;
  Prober& operator=(const Prober&) = delete;
  ~Prober() {
    probes_.each([this](Probe& probe) { drop(probe); });
  }

  // Starts a probe; its result comes from on_event() or on_deadline(), or at once. `done(ProbeResult&&)`.
  template <class Done>
  void start(const ProbeOrder& order, Ns now, Done&& done) {
    Probe* probe = probes_.make(order, now);
    if (probe == nullptr) {
      ProbeResult result;
      result.epoch = order.epoch;
      return done(without_memory(std::move(result)));
    }
    guarded(probe->token, done, [&] {
      if (const char* why = connect(*probe)) return end(*probe, failure(order.epoch, why), done);
      wheel_.arm(probe->timer, deadline_after(now, order.timeout_ns));
    });
  }

  template <class Done>
  void on_event(const Event& event, Ns now, Done&& done) {
    Probe* probe = probes_.get(event.token);
    if (probe == nullptr) return;
    probe->connection.note(event);
    guarded(event.token, done, [&] {
      if (!probe->asked) {
        const IoResult established = probe->connection.establish(net_);
        if (established.kind == IoResult::Kind::again) return;
        if (!established.ok()) {
          return end(*probe, failure(probe->order.epoch, std::string("connect: ") + strerror(established.error)), done);
        }
        ask(*probe);
      }
      if (event.writable) probe->connection.flush(net_);
      read(*probe, now, done);
    });
  }

  template <class Done>
  void on_deadline(Handle token, Done&& done) {
    Probe* probe = probes_.get(token);
    if (probe == nullptr) return;
    guarded(token, done, [&] {
      end(*probe, failure(probe->order.epoch, probe->asked ? "no answer in time" : "no connection in time"), done);
    });
  }

  std::size_t running() const { return probes_.live(); }

 private:
  struct Probe {
    Probe(Handle token_in, const ProbeOrder& order_in, Ns now)
        : token(token_in), order(order_in), timer(token_in), started_ns(now) {
      result.epoch = order.epoch;
    }
    Handle token;
    ProbeOrder order;
    Connection<Net> connection;
    Timer timer;
    Ns started_ns;
    bool asked = false;
    bool second = false;  // asking for the models after the health
    bool head_done = false;
    Buffer input;
    FieldTable fields;
    ResponseReader reader;
    ResponseHead head;
    BodyDecoder body;
    std::size_t body_bytes = 0;  // decoded, at the front of input behind the head
    ProbeResult result;
  };

  // Where memory is short on the way the probe ends, and says that it found nothing out.
  template <class Done, class Work>
  void guarded(Handle token, Done&& done, Work&& work) {
    try {
      work();
    } catch (const std::bad_alloc&) {
      Probe* probe = probes_.get(token);
      if (probe == nullptr) throw;  // it is over: what was short of memory was done()
      end_without_memory(*probe, done);
    }
  }

  template <class Done>
  void end_without_memory(Probe& probe, Done&& done) {
    end(probe, without_memory(std::move(probe.result)), done);
  }

  // A success of the first step stays one.
  static ProbeResult without_memory(ProbeResult result) {
    result.out_of_memory = true;
    result.models_read = result.models_cut = false;
    result.reason = "memory is short";  // so short that it needs none itself
    return result;
  }

  static ProbeResult failure(std::uint64_t epoch, std::string reason) {
    ProbeResult result;
    result.epoch = epoch;
    result.reason = std::move(reason);
    return result;
  }

  const char* connect(Probe& probe) {
    const SocketOutcome outcome = probe.connection.connect(net_, probe.order.address, probe.token);
    if (outcome == SocketOutcome::no_descriptor) return "no file descriptor is free";
    if (outcome == SocketOutcome::no_memory) throw std::bad_alloc();
    if (outcome != SocketOutcome::ok) return "the connection was refused at once";
    probe.asked = probe.head_done = false;
    probe.input.clear();
    probe.reader.start(&probe.fields);
    return nullptr;
  }

  void ask(Probe& probe) {
    const ProbePaths& paths = probe_paths(probe.order.kind);
    std::string head = "GET " + probe.order.base_path;
    head.append(probe.second ? paths.models : paths.health).append(" HTTP/1.1\r\n");
    detail::append_field(head, "Host", probe.order.host);
    detail::append_field(head, "User-Agent", std::string("nexus/").append(kVersion));
    detail::append_field(head, "Accept", "application/json");
    if (!probe.order.authorization.empty()) detail::append_field(head, "Authorization", probe.order.authorization);
    head += "Connection: close\r\n\r\n";
    probe.asked = true;
    probe.connection.write(net_, blocks_, head);  // a failure shows when the answer is read
  }

  template <class Done>
  void read(Probe& probe, Ns now, Done&& done) {
    while (probe.connection.may_read()) {
      if (probe.input.size() > kMaxProbeBytes) {
        probe.result.models_cut = asks_for_models(probe);
        return end_unread(probe, now, "its answer is too large", done);
      }
      if (!probe.input.reserve(blocks_, std::max(kProbeReadBytes, probe.input.size()))) {
        return end_without_memory(probe, done);
      }
      const IoResult result = probe.connection.read(net_, probe.input.tail(), probe.input.room());
      if (result.kind == IoResult::Kind::again) return;
      if (result.kind == IoResult::Kind::failed) {
        return end(probe, failure(probe.order.epoch, std::string("read: ") + strerror(result.error)), done);
      }
      const bool ended = result.kind == IoResult::Kind::eof;
      if (!ended) probe.input.commit(result.bytes);
      switch (take_in(probe, ended)) {
        case Taken::need_more: break;
        case Taken::bad: return end(probe, failure(probe.order.epoch, "its answer is not HTTP"), done);
        case Taken::cut: return end(probe, failure(probe.order.epoch, "its answer was cut short"), done);
        case Taken::whole: return on_answer(probe, now, done);
      }
    }
  }

  enum class Taken : std::uint8_t { need_more, bad, cut, whole };

  Taken take_in(Probe& probe, bool ended) {
    if (!probe.head_done) {
      const HeadResult result = probe.reader.feed(probe.input.data(), probe.input.size(), probe.head);
      if (result.status == HeadResult::Status::failed) return Taken::bad;
      if (result.status == HeadResult::Status::need_more) return ended ? Taken::cut : Taken::need_more;
      if (probe.head.status < 200) return Taken::bad;
      probe.head_done = true;
      probe.body.start(probe.head.framing);
      probe.body_bytes = 0;
    }
    const std::size_t decoded_end = probe.head.head_bytes + probe.body_bytes;
    const BodyDecoder::Piece piece =
        probe.body.feed(probe.input.data() + decoded_end, probe.input.size() - decoded_end);
    probe.body_bytes += piece.bytes;
    probe.input.truncate(decoded_end + piece.bytes);
    if (piece.failed) return Taken::bad;
    if (piece.done) return Taken::whole;
    if (!ended) return Taken::need_more;
    return probe.body.ends_with_connection() ? Taken::whole : Taken::cut;
  }

  template <class Done>
  void on_answer(Probe& probe, Ns now, Done&& done) {
    const bool good = probe.head.status / 100 == 2;
    const ProbePaths& paths = probe_paths(probe.order.kind);
    if (!probe.second) {
      if (!good) {
        return end(probe, failure(probe.order.epoch, "it answered " + std::to_string(probe.head.status)), done);
      }
      probe.result.passed = true;
      probe.result.round_trip_ns = now - probe.started_ns;
      if (paths.models != paths.health && probe.order.wants_models) return ask_for_models(probe, now, done);
    }
    if (good && probe.order.wants_models) {
      read_models(probe);
    } else if (!good) {
      probe.result.reason = "its list of models answered " + std::to_string(probe.head.status);
    }
    end(probe, std::move(probe.result), done);
  }

  template <class Done>
  void ask_for_models(Probe& probe, Ns now, Done&& done) {
    probe.connection.close(net_);
    probe.second = true;
    if (const char* why = connect(probe)) return end_unread(probe, now, why, done);
  }

  // It passed, but its models are not known.
  template <class Done>
  void end_unread(Probe& probe, Ns, std::string_view why, Done&& done) {
    probe.result.reason = why;
    end(probe, std::move(probe.result), done);
  }

  // Whether the answer that is being read is the list of models, and that is wanted.
  static bool asks_for_models(const Probe& probe) {
    const ProbePaths& paths = probe_paths(probe.order.kind);
    return probe.order.wants_models && (probe.second || paths.models == paths.health);
  }

  void read_models(Probe& probe) {
    const char* text = probe.input.data() + probe.head.head_bytes;
    ProbeResult& result = probe.result;
    const ModelList list =
        json_.read_models(text, probe.body_bytes, kMaxModelsPerBackend, result.models, result.models_cut);
    if (list == ModelList::out_of_memory) throw std::bad_alloc();
    result.models_read = list == ModelList::read;
    if (!probe.result.models_read) probe.result.reason = "its list of models could not be read";
    if (probe.result.models_cut) probe.result.reason = "it lists too many models: the rest is left out";
  }

  // A failed second step leaves the first one's success.
  template <class Done>
  void end(Probe& probe, ProbeResult result, Done&& done) {
    if (probe.second && !result.passed && !result.out_of_memory) {
      probe.result.reason = result.reason;
      result = std::move(probe.result);
    }
    result.connected = probe.asked || probe.second;
    result.status = probe.head_done ? probe.head.status : std::uint16_t{0};
    drop(probe);
    done(std::move(result));
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
