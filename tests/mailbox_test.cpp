// mailbox_test.cpp
// Goal:   no message is lost or reordered, and the receiver is woken for the first one of each batch.
// Method: one thread for the rules, then several senders against one receiver.
#include "nexus/base/mailbox.h"

#include <doctest/doctest.h>

#include <array>
#include <thread>
#include <vector>

using nexus::Mailbox;
using Posted = Mailbox<int>::Posted;

TEST_CASE("mailbox: the first message asks for a wake-up, the next ones do not, until all are taken") {
  Mailbox<int> mailbox;
  std::vector<int> out{7};
  for (int round = 0; round < 2; ++round) {
    CHECK_FALSE(mailbox.has_any());
    CHECK(mailbox.post(1) == Posted::first);
    CHECK(mailbox.post(2) == Posted::behind_others);
    CHECK(mailbox.has_any());
    mailbox.take(out);
    CHECK(out == std::vector<int>{1, 2});
  }
  mailbox.take(out);
  CHECK(out.empty());
}

TEST_CASE("mailbox: it closes only while it is empty, and takes no message then") {
  Mailbox<int> mailbox;
  std::vector<int> out;
  mailbox.post(1);
  CHECK_FALSE(mailbox.close_if_empty());
  CHECK(mailbox.post(2) == Posted::behind_others);
  mailbox.take(out);
  CHECK(mailbox.close_if_empty());
  CHECK(mailbox.post(3) == Posted::closed);
  CHECK_FALSE(mailbox.has_any());
}

TEST_CASE("mailbox: messages of several senders all arrive, those of each in order") {
  constexpr int kSenders = 3;
  constexpr int kEach = 20'000;
  Mailbox<int> mailbox;
  std::vector<std::thread> senders;
  for (int sender = 0; sender < kSenders; ++sender) {
    senders.emplace_back([&mailbox, sender] {
      for (int i = 0; i < kEach; ++i) mailbox.post(sender * kEach + i);
    });
  }
  std::array<int, kSenders> next{};
  int taken = 0;
  int wrong = 0;
  std::vector<int> out;
  while (taken < kSenders * kEach) {
    if (!mailbox.has_any()) std::this_thread::yield();
    mailbox.take(out);
    for (const int message : out) {
      const auto sender = static_cast<std::size_t>(message / kEach);
      wrong += message % kEach != next[sender]++ ? 1 : 0;
      taken += 1;
    }
  }
  for (std::thread& sender : senders) sender.join();
  CHECK(wrong == 0);
}
