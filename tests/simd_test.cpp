#include "nexus/base/simd.h"

#include <doctest/doctest.h>

#include <array>
#include <string>

#include "tests/lib/dice.h"

using namespace nexus;

namespace {

// Bits of the bytes for which `is` is true, one at a time.
template <class Is>
unsigned bits_of_bytes(const std::string& bytes, Is is) {
  unsigned bits = 0;
  for (std::size_t i = 0; i < kLaneBytes; ++i) bits |= unsigned{is(static_cast<unsigned char>(bytes[i]))} << i;
  return bits;
}

std::string random_bytes(sim::Dice& dice) {
  std::string bytes(kLaneBytes, '\0');
  for (char& c : bytes)
    c = static_cast<char>(dice.below(4) == 0 ? "[]{}\"\\\n\r\t\x7f\x80\xff\x1f\x20\xdf\xdb`az_"[dice.below(20)]
                                             : static_cast<char>(dice.below(256)));
  return bytes;
}

}  // namespace

TEST_CASE("each comparison of a lane says the same of every byte as plain C++ does") {
  sim::Dice dice(1);
  for (int round = 0; round < 20'000; ++round) {
    const std::string bytes = random_bytes(dice), other = random_bytes(dice);
    const Lane lane(bytes.data());
    const char c = bytes[dice.below(kLaneBytes)];
    std::array<bool, kLaneBytes> same{};
    for (std::size_t i = 0; i < kLaneBytes; ++i) same[i] = bytes[i] == other[i];
    CHECK(lane.mask() == bits_of_bytes(bytes, [](unsigned char b) { return b >= 0x80; }));
    CHECK(lane.equal(c).mask() ==
          bits_of_bytes(bytes, [c](unsigned char b) { return b == static_cast<unsigned char>(c); }));
    CHECK(lane.control().mask() == bits_of_bytes(bytes, [](unsigned char b) { return b < 0x20; }));
    CHECK(lane.bracket('[').mask() == bits_of_bytes(bytes, [](unsigned char b) { return b == '[' || b == '{'; }));
    CHECK(lane.bracket(']').mask() == bits_of_bytes(bytes, [](unsigned char b) { return b == ']' || b == '}'; }));
    CHECK(lane.name().mask() ==
          bits_of_bytes(bytes, [](unsigned char b) { return (b >= 'a' && b <= 'z') || b == '_'; }));
    CHECK(lane.control().without(lane.equal('\t')).mask() ==
          bits_of_bytes(bytes, [](unsigned char b) { return b < 0x20 && b != '\t'; }));
    unsigned expected = 0;
    for (std::size_t i = 0; i < kLaneBytes; ++i) expected |= unsigned{same[i]} << i;
    CHECK(lane.equal(Lane(other.data())).mask() == expected);
  }
}

TEST_CASE("the highest bits are gathered alike by this processor's instruction and by plain C++") {
  sim::Dice dice(2);
  for (int round = 0; round < 20'000; ++round) {
    LaneBytes bytes;
    std::memcpy(&bytes, random_bytes(dice).data(), sizeof bytes);
    CHECK(highest_bits(bytes) == plain_highest_bits(bytes));
  }
}

TEST_CASE("text is skipped alike 16 bytes at a time and as far as this processor can, wherever it ends") {
  sim::Dice dice(3);
  for (int round = 0; round < 5'000; ++round) {
    std::string text(64 + dice.below(400), 'a');
    for (std::uint64_t changes = dice.below(4); changes > 0; --changes)
      text[dice.below(text.size())] = "\\\\\"\n\x80"[dice.below(5)];
    const std::size_t from = dice.below(8);
    const TextRun plain = skip_text_by_16(text.data(), from, text.size(), round % 2 == 0);
    const TextRun fast = skip_text(text.data(), from, text.size(), round % 2 == 0);
    CHECK(plain.at == fast.at);
    CHECK(plain.escaped == fast.escaped);
    CHECK((plain.ascii == fast.ascii || plain.at < text.size()));
  }
}
