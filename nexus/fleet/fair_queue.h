// fair_queue.h
// Owns:     the order of the requests that wait for one backend, by what their keys have been served (the virtual token
//           counter of Sheng et al., "Fairness in Serving LLMs", with the start tags of start-time fair queueing).
// Promises: of the keys of the most urgent class, the one that was served least goes next, its requests in the order of
//           their arrival; with one key that is the order of arrival. A key that did not wait has saved no credit. A
//           request that has waited for half of [queue] timeout is of the most urgent class.
// Leaves:   places, tickets and the mutex that guards all of it to admission.h.
// Threads:  whoever holds the mutex of its Admission.
// Tested by: tests/fair_queue_test.cpp, tests/admission_test.cpp, tests/sim
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <utility>

#include "nexus/base/clock.h"
#include "nexus/base/limits.h"

namespace nexus {

// All requests that are served in turn with those of others: of a client's key, or of all clients without one.
struct Flow {
  double served = 0;          // tokens, divided by the key's weight
  std::uint32_t waiting = 0;  // requests
};

// The flows of requests without a key.
struct KeylessFlows {
  Flow all;
  std::array<Flow, kAddressFlows> by_address;  // by a hash of the host: a few may share one
};

// A request's claim to a turn of its flow. It belongs to the request and outlives its tickets.
struct Claim {
  Flow* flow = nullptr;
  std::uint32_t priority = kDefaultKeyPriority;  // lower first
  std::uint32_t weight = 1;
  std::uint64_t cost = 0;     // tokens; an estimate until charged for good
  Ns now_ns = 0;              // when it looks for a place
  Ns aged_after_ns = kNever;  // it is of the most urgent class once it has waited for so long
  bool charged = false;

  double share(std::uint64_t tokens) const {
    return static_cast<double>(std::min(tokens, kMaxFairCost)) / static_cast<double>(weight);
  }
};

// The cost of one request. A completion token takes a step of the model, a prompt token a part of one.
constexpr std::uint64_t fair_cost(std::uint64_t prompt_tokens, std::uint64_t completion_tokens) {
  constexpr std::uint64_t kCompletionWeight = 2;
  return std::min(prompt_tokens, kMaxFairCost) + kCompletionWeight * std::min(completion_tokens, kMaxFairCost);
}

// The state that the flows of one Admission share.
class FairClock {
 public:
  // A flow of which nothing waits is served as much as whoever went last: it has saved nothing.
  void begin(const Claim& claim) {
    now_ns_ = std::max(now_ns_, claim.now_ns);
    Flow& flow = *claim.flow;
    if (flow.waiting == 0) flow.served = std::max(flow.served, last_served_[claim.priority]);
  }

  // The claim's request goes; once per request it is charged.
  void charge(Claim& claim) {
    if (claim.charged) return;
    claim.charged = true;
    double& last = last_served_[claim.priority];
    last = std::max(last, claim.flow->served);
    claim.flow->served += claim.share(claim.cost);
  }

  // The request has ended and has cost this.
  static void settle(Claim& claim, std::uint64_t cost) {
    if (!claim.charged) return;
    claim.flow->served = std::max(0.0, claim.flow->served + claim.share(cost) - claim.share(claim.cost));
    claim.cost = cost;
  }

  // The latest time of which a request told; somebody who waits is overtaken only by requests that tell of theirs.
  Ns now() const { return now_ns_; }

 private:
  std::array<double, kMaxKeyPriority + 1> last_served_{};  // by priority: of the flow that went last, before it did
  Ns now_ns_ = 0;
};

// The waiting requests of one backend; Waiter has a Claim* as `claim` and its `arrival`.
template <class Waiter>
class FairQueue {
 public:
  struct Order {
    const Flow* flow = nullptr;
    std::uint64_t arrival = 0;
    bool operator<(const Order& other) const {
      if (flow != other.flow) return std::less<const Flow*>()(flow, other.flow);
      return arrival < other.arrival;
    }
  };
  using Nodes = std::map<Order, Waiter*>;
  using Node = typename Nodes::node_type;

  static Order order_of(const Waiter& waiter) { return {waiter.claim->flow, waiter.arrival}; }

  // An element that is not in a queue yet; allocates.
  static Node make_node(Waiter& waiter) {
    Nodes made;
    made.emplace(Order{}, &waiter);
    return made.extract(made.begin());
  }
  void insert(Node node) {
    node.key() = order_of(*node.mapped());
    waiting_.insert(std::move(node));
  }
  void erase(const Waiter& waiter) { waiting_.erase(order_of(waiter)); }

  bool empty() const { return waiting_.empty(); }
  std::size_t size() const { return waiting_.size(); }

  // The request that goes next. REQUIRES: !empty().
  Waiter& next(Ns now) const {
    Waiter* best = nullptr;
    for (auto head = waiting_.begin(); head != waiting_.end();
         head = waiting_.upper_bound({head->first.flow, std::numeric_limits<std::uint64_t>::max()})) {
      if (best == nullptr || goes_before(*head->second, *best, now)) best = head->second;
    }
    return *best;
  }

 private:
  static std::uint32_t class_of(const Claim& claim, Ns now) {
    return now - claim.now_ns >= claim.aged_after_ns ? 0 : claim.priority;
  }
  static bool goes_before(const Waiter& a, const Waiter& b, Ns now) {
    const std::uint32_t a_class = class_of(*a.claim, now), b_class = class_of(*b.claim, now);
    if (a_class != b_class) return a_class < b_class;
    if (a.claim->flow->served != b.claim->flow->served) return a.claim->flow->served < b.claim->flow->served;
    return a.arrival < b.arrival;
  }

  Nodes waiting_;
};

}  // namespace nexus
