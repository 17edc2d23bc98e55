// next_request_test.cpp
// Goal:   a request has nothing of the one before it on its connection: no fact, no time, no count, no text.
// Method: two gateways see the same requests at the same times, each request behind each other one. One gets them all
//         over one connection, the other each over a new one. All that can be seen of them must be the same.
#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "tests/lib/courses.h"

using namespace courses;

namespace {

// Each one behind each other one, and behind itself.
std::vector<const Course*> tour() {
  std::vector<const Course*> order;
  for (const Course& first : kCourses) {
    order.insert(order.end(), 2, &first);
    for (const Course* second = &first + 1; second != std::end(kCourses); ++second) {
      order.push_back(second);
      order.push_back(&first);
    }
  }
  return order;
}

// A gateway, its clients, and all that there is to see after each request.
class Seen {
 public:
  explicit Seen(bool anew)
      : anew_(anew), rings_(std::make_unique<sim::LogRings>()), scene_(*rings_), scraper_(&scene_.connect()) {}

  Lines after(const Course& course) {
    if (client_ != nullptr && anew_ && !client_->ended) {
      scene_.net.finish(*client_);
      scene_.settle();
    }
    if (client_ == nullptr || anew_ || client_->ended) client_ = &scene_.connect();
    const std::size_t answered = client_->received.size();
    course.go(scene_, *client_);
    const std::string got = client_->received.substr(answered);
    CHECK(statuses_of(got) == course.statuses);
    Lines seen = lines_of(got);
    for (const auto& part : {backends(), take_log(*rings_), scrape(scene_, *scraper_)})
      seen.insert(seen.end(), part.begin(), part.end());
    CHECK(sim::left_over(scene_.gateway()) == "");
    return seen;
  }

 private:
  // What the backends got since they were looked at.
  Lines backends() {
    Lines all;
    read_.resize(scene_.net.peers.size());
    for (std::size_t i = 0; i < read_.size(); ++i) {
      const Peer& peer = scene_.net.peers[i];
      if (!peer.to_backend) continue;
      for (const std::string& line : lines_of(peer.received.substr(read_[i]))) all.push_back(line);
      read_[i] = peer.received.size();
    }
    return all;
  }

  const bool anew_;
  std::unique_ptr<sim::LogRings> rings_;
  Scene scene_;
  Peer* scraper_;
  Peer* client_ = nullptr;
  std::vector<std::size_t> read_;  // of each peer's bytes
};

}  // namespace

TEST_CASE("a request on a kept connection is answered, passed on, logged and counted as one on a new connection") {
  Seen kept(false), anew(true);
  const char* before = "";
  for (const Course* course : tour()) {
    CAPTURE(std::string(before));
    CAPTURE(std::string(course->name));
    const Lines on_kept = kept.after(*course), on_new = anew.after(*course);
    const auto [one, other] = std::mismatch(on_kept.begin(), on_kept.end(), on_new.begin(), on_new.end());
    CHECK((one == on_kept.end() ? "" : *one) == (other == on_new.end() ? "" : *other));
    if (one != on_kept.end() || other != on_new.end()) return;
    before = course->name;
  }
}

TEST_CASE("a request's line in the log has nothing of an earlier request, on whichever connection that was") {
  const auto logged = [](Scene& scene, sim::LogRings& rings, const Course& course) {
    Peer& client = scene.connect();
    course.go(scene, client);
    if (!client.ended) scene.net.finish(client);
    scene.settle();
    return take_log(rings, true);
  };
  const auto rings = std::make_unique<sim::LogRings>();
  Scene scene(*rings);
  for (const Course* course : tour()) {
    CAPTURE(std::string(course->name));
    const auto own_rings = std::make_unique<sim::LogRings>();
    Scene fresh(*own_rings);
    CHECK(logged(scene, *rings, *course) == logged(fresh, *own_rings, *course));
  }
}
