// client_side.h
// Owns:     what an exchange sends to its client: the writes, their count, and what becomes of the connection after.
// Promises: bytes are counted as payload, framing and heads are not; the client's time to take something runs anew only
//           where it took something.
// Leaves:   which bytes to answer.h and heads.h, when and what then to exchange.h.
// Threads:  parts of one exchange.
#pragma once

#include <string>
#include <string_view>

#include "connection.h"
#include "core.h"
#include "heads.h"
#include "openai.h"
#include "relay.h"

namespace nexus {

template <class Net>
class ClientSide {
 public:
  ClientSide(Core<Net>& core, Connection<Net>& connection) : core_(core), connection_(connection) {}
  ClientSide(const ClientSide&) = delete;
  ClientSide& operator=(const ClientSide&) = delete;

  // A request begins.
  void open(bool http_1_0, bool keep_alive) {
    http_1_0_ = http_1_0;
    keep_alive_ = keep_alive;
  }

  bool http_1_0() const { return http_1_0_; }
  bool keep_alive() const { return keep_alive_; }
  bool cut() const { return cut_; }
  bool has_begun() const { return begun_; }  // a first byte was written
  bool waits() const { return connection_.pending() > 0; }
  bool out_of_memory() const { return connection_.out_of_memory(); }  // why a send failed
  std::uint64_t sent_bytes() const { return sent_bytes_; }

  // This answer is the connection's last.
  void end_connection() { keep_alive_ = false; }
  // It must not end with a FIN, which would make what was sent look whole.
  void cut_connection() {
    keep_alive_ = false;
    cut_ = true;
  }

  // False where the connection failed, or memory did.
  bool send(ClientWrite& write) {
    sent_bytes_ += write.payload_bytes();
    return note(connection_.write(core_.net, core_.blocks, write.parts()));
  }

  // An answer of our own, whole.
  bool send_error(Refusal refusal, std::string_view message, std::string_view param, std::string_view request_id) {
    OwnAnswer answer;
    answer.request_id = request_id;
    answer.http_1_0 = http_1_0_;
    answer.keep_alive = keep_alive_;
    core_.text.clear();
    append_own_error(core_.text, refusal, message, answer, true, param);
    sent_bytes_ += core_.text.size() - (core_.text.find("\r\n\r\n") + 4);
    return note(connection_.write(core_.net, core_.blocks, core_.text));
  }

  // The last event of a chunked event stream that broke; no end of the body follows.
  bool send_error_event(const RefusalRow& row) {
    core_.text = "\n\ndata: ";
    append_error_body(core_.text, row, row.message);
    core_.text += "\n\n";
    ClientWrite write;
    write.add_payload(true, core_.text, {});
    return connection_.write(core_.net, core_.blocks, write.parts());
  }

  // No byte of what was to be sent went out: nothing of it counts.
  void forget_unsent() { sent_bytes_ = 0; }

  // Whether less waits than when this was asked last, or more.
  bool has_moved() {
    if (connection_.pending() == waiting_bytes_) return false;
    waiting_bytes_ = connection_.pending();
    return true;
  }
  void forget_waiting() { waiting_bytes_ = 0; }

  // Makes ready for the next request.
  void reset() {
    cut_ = begun_ = false;
    waiting_bytes_ = 0;
    sent_bytes_ = 0;
  }

 private:
  bool note(bool written) {
    begun_ |= written;
    return written;
  }

  Core<Net>& core_;
  Connection<Net>& connection_;
  bool http_1_0_ = false;
  bool keep_alive_ = true;
  bool cut_ = false;
  bool begun_ = false;
  std::size_t waiting_bytes_ = 0;  // of what was sent, when the client's deadline was set
  std::uint64_t sent_bytes_ = 0;
};

}  // namespace nexus
